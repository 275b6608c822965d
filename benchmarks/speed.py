"""What the method costs and what it buys, each against its reference in the same run: the table in docs/speed.md.

    python benchmarks/speed.py [--only GLOB ...] [--runs 5] [--device cuda] [--again] [--smoke]
    python benchmarks/speed.py --render

A row is a function that gives seconds (or bytes) of turns, reference and ours side by side; the figure is the median
of the turns' ratios. Rows that are there already are kept, so that a run that was cut off goes on. Weights are random
and images are noise: neither changes what has to be computed. A GPU's rows are kept in a folder of its name. FCR steps,
retraining and latency budgets are timed by benchmarks of their own (fcr_step.py, retraining.py, latency_budget.py), and
are rendered here from their results.
"""

import argparse
import importlib.util
from argparse import Namespace
from fnmatch import fnmatchcase
from pathlib import Path

import method_rows
import model_rows  # noqa: F401  (these two register their rows)
from speed_page import render
from turns import EVERYWHERE, folder_of, measure_row, rows

RESULTS = Path(__file__).parent / "results" / "speed"
DOCUMENT = Path(__file__).parent.parent / "docs" / "speed.md"


def why_not(name: str, options: Namespace) -> str | None:
    """Say why a row cannot be measured here."""
    if options.device not in rows[name].devices:
        return "a GPU's row, give --device cuda" if options.device == "cpu" else "the CPU's row"
    if name == "slim-resnet50" and importlib.util.find_spec("torch_pruning") is None:
        return "needs Torch-Pruning, pip install '.[bench]'"
    return None


def main(arguments: list[str] | None = None) -> None:
    """Measure what is wanted and not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", metavar="GLOB", default=["*"], help="rows by name (default: all)")
    add("--runs", type=int, default=5, help="turns of each row (default: %(default)s)")
    add("--device", choices=EVERYWHERE, default="cpu", help="where rows run that can (default: %(default)s)")
    add("--again", action="store_true", help="also rows that are there")
    add("--smoke", action="store_true", help="tiny networks, one look at the path; figures mean nothing")
    add("--results", type=Path, default=RESULTS, help="where rows are kept (default: beside this file)")
    add("--render", action="store_true", help="write docs/speed.md from what is there and stop")
    add("--list", action="store_true", help="name the rows and stop")
    add("--one", nargs=3, metavar=("KIND", "SIDE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(method_rows.peak_of(options.one[1], options.one[2], options))
    elif options.render:
        DOCUMENT.write_text(render(rows, options.results), encoding="utf-8")
    elif options.list:
        print("\n".join(rows))
    else:
        measure_rows(parser, options)


def measure_rows(parser: argparse.ArgumentParser, options: Namespace) -> None:
    """Measure the rows that are asked for, can be measured here, and are not there."""
    if strange := [glob for glob in options.only if not any(fnmatchcase(name, glob) for name in rows)]:
        parser.error(f"--only {strange[0]}: no row has such a name. They are {', '.join(rows)}.")
    if options.device == "cuda" and not has_gpu():
        parser.error("--device cuda: torch finds no GPU here. Leave it out to measure on the CPU.")
    for name, one in rows.items():
        if not any(fnmatchcase(name, glob) for glob in options.only):
            continue
        if reason := why_not(name, options):
            print(f"{name}: skipped ({reason})", flush=True)
        elif options.again or not (folder_of(options.results, options.device) / f"{name}.json").is_file():
            measure_row(name, one, options)


def has_gpu() -> bool:
    """Return whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
