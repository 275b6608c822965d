"""How long `import lfrns_hub` takes against `import timm, transformers`, which it cannot do without.

python benchmarks/import_time.py [--turns 20]

Each turn starts a fresh process for either, one after the other; compared are the medians, at most 1.15x wanted.
Python keeps compiled files, as it does of what pip installs, even where PYTHONDONTWRITEBYTECODE says that it must not.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

THEIRS, OURS = "import timm, transformers", "import lfrns_hub"
LIMIT = 1.15


def seconds(code: str) -> float:
    """Time one import in a fresh process, without the start of Python."""
    timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    root = Path(__file__).resolve().parent.parent
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", timed], cwd=root, env=kept, capture_output=True, text=True, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    turns = parser.parse_args().turns
    seconds(OURS)  # compiles and caches what is new
    times = [(seconds(THEIRS), seconds(OURS)) for _ in range(turns)]
    theirs, ours = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{THEIRS}: {theirs:.2f} s; {OURS}: {ours:.2f} s; {ours / theirs:.3f}x, medians of {turns} turns")
    sys.exit(ours / theirs > LIMIT and f"more than {LIMIT}x")
