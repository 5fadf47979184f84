"""Benchmarks that check before they time: ``python -m benchmarks --help``; docs/benchmarks.md explains the rows."""
