"""The zoo of zoo.yaml: run what is missing of it, keep its record, and render docs/results.md.

python benchmarks/zoo.py

The record, table.json of the zoo, is kept as benchmarks/results/zoo.json, also where a model failed: its row says why,
and the same command tries it again.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import table

FILE = Path(__file__).with_name("zoo.yaml")
RECORD = Path(__file__).parent / "results" / "zoo.json"


def main() -> None:
    """Run the zoo and write the page."""
    done = subprocess.run([sys.executable, "-m", "lfrns_hub", "zoo", os.path.relpath(FILE)])
    made = FILE.parent.parent / "out" / "zoo" / "table.json"
    if made.is_file():
        shutil.copyfile(made, RECORD)
        table.main()
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
