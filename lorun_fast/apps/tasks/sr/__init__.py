"""Super-resolution with a known blur kernel."""
