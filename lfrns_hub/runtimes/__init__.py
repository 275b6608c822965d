"""Runtimes for slim models: export to other runtimes, and timing."""
