"""How long `import lfrns_hub` and the command line's answers take, against what they cannot do without.

python benchmarks/import_time.py [--turns 20]

Each turn starts a fresh process for either side, one after the other; compared are the medians: the import at most
1.15x of `import timm, transformers`; `lfrns --help` and a mistake at most half a second beyond Python's own start. The
help of a command with many options is drawn for longer, and only printed here.
Python keeps compiled files, as it does of what pip installs, even where PYTHONDONTWRITEBYTECODE says that it must not.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

THEIRS, OURS = "import timm, transformers", "import lfrns_hub"
LIMIT = 1.15
NOTHING = "pass"
LINES = {
    "lfrns --help": "import sys; sys.argv = ['lfrns', '--help']; import lfrns_cli; lfrns_cli.main()",
    "lfrns slim --help": "import sys; sys.argv = ['lfrns', 'slim', '--help']; import lfrns_cli; lfrns_cli.main()",
    "a mistake": "import sys; sys.argv = ['lfrns', 'slim', 'x', '--macs', '50']; import lfrns_cli; lfrns_cli.main()",
}
LIMITED, LIMIT_S = ("lfrns --help", "a mistake"), 0.5


def run(code: str) -> tuple[float, str]:
    """Run code in a fresh process: its seconds with Python's own start, and what it prints."""
    root = Path(__file__).resolve().parent.parent
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=kept, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def import_seconds(code: str) -> float:
    """Time one import in a fresh process, without the start of Python."""
    return float(run(f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)")[1])


def medians(turns: int, *sides: object) -> list[float]:
    """Return the median of each side, called in turns."""
    return [
        statistics.median(column) for column in zip(*([side() for side in sides] for _ in range(turns)), strict=True)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    turns = parser.parse_args().turns
    codes = [NOTHING, *LINES.values()]
    for code in [f"{OURS}, lfrns_cli", *codes]:
        run(code)  # compiles and caches what is new
    start, *seconds = medians(turns, *(lambda code=code: run(code)[0] for code in codes))
    for name, taken in zip(LINES, seconds, strict=True):
        print(f"{name}: {taken - start:.2f} s beyond Python's own {start:.2f} s, medians of {turns} turns")
    theirs, ours = medians(turns, lambda: import_seconds(THEIRS), lambda: import_seconds(OURS))
    print(f"{THEIRS}: {theirs:.2f} s; {OURS}: {ours:.2f} s; {ours / theirs:.3f}x, medians of {turns} turns")
    slow = max(taken for name, taken in zip(LINES, seconds, strict=True) if name in LIMITED) - start > LIMIT_S
    sys.exit((ours / theirs > LIMIT and f"more than {LIMIT}x") or (slow and f"an answer took over {LIMIT_S} s") or 0)
