"""Where a slim model runs: exported for other runtimes, and timed in them."""
