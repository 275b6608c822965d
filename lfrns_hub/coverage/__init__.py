"""Trial of every model family: `lfrns coverage` and `python -m lfrns_hub.coverage` write docs/coverage.md.

families.py has the tables, cases.py selects from them and builds, trial.py tries one network, processes.py runs many,
table.py prints and writes, command.py reads the command line.
"""

from lfrns_hub.coverage.command import main

__all__ = ["main"]
