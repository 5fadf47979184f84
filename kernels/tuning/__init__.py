"""The search for better tiles, on request: problems in words, candidates, trials that check them, clocks, rankings."""
