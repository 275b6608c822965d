"""Every family, tried: `lfrns coverage` and `python -m lfrns_hub.coverage` write docs/coverage.md.

families.py holds the tables, cases.py chooses from them and builds, trial.py tries one network, processes.py runs many,
table.py prints and writes, command.py reads the command line.
"""

from lfrns_hub.coverage.command import main

__all__ = ["main"]
