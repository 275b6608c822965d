"""Sides of a comparison run in turns, so that a busy machine slows them alike, and what is kept of a row of them."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Turns = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """A line of the table of speed.

    Attributes:
        what: What is compared with what.
        wanted: Which ratio is wanted.
        measure: Gives seconds (or bytes) of each turn by side, of which "reference" and "ours" are two, from the
            command line's runs, smoke and device.
        devices: Where it can run: "cpu", "cuda".
        batch: Images of what is timed, for images a second; 0 where that says nothing.
    """

    what: str
    wanted: str
    measure: Callable[[argparse.Namespace], Turns]
    devices: tuple[str, ...] = ("cpu",)
    batch: int = 0


rows: dict[str, Row] = {}
EVERYWHERE = ("cpu", "cuda")


def row(name: str, what: str, wanted: str, **more: Any) -> Callable:
    """Add a row to the table: its name, what is compared with what, which ratio is wanted, and where it can run."""

    def add(function: Callable[[argparse.Namespace], Turns]) -> Callable[[argparse.Namespace], Turns]:
        rows[name] = Row(what, wanted, function, **more)
        return function

    return add


def run_turns(calls: dict[str, Callable[[], Any]], runs: int, *, warmup: int = 0, device: str = "cpu") -> Turns:
    """Call several functions in turns.

    Args:
        calls: By side. One that returns a float says itself what it took.
        runs: Turns that count.
        warmup: Turns before them.
        device: Where they run; it is waited for before and after each call.
    Returns:
        Seconds, or what was returned, of each turn by side.
    """
    times: Turns = {name: [] for name in calls}
    for number in range(warmup + runs):
        for name, call in calls.items():
            wait(device)
            began = time.perf_counter()
            told = call()
            wait(device)
            seconds = time.perf_counter() - began
            if number >= warmup:
                times[name].append(told if isinstance(told, float) else seconds)
        if warmup <= number < warmup + runs - 1:
            tell(times)
    return times


def wait(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def tell(times: Turns) -> None:
    """Tell what a row has so far, for a run that is cut off within it."""
    print(f"  {len(next(iter(times.values())))} turns: {ratios_of(times)} {times}", file=sys.stderr, flush=True)


def ratios_of(times: Turns) -> dict[str, list[float]]:
    """Return the ratio of each side to the reference; none where there is no reference."""
    sides = times.items() if "reference" in times else ()
    return {side: ratio_of(values, times["reference"]) for side, values in sides if side != "reference"}


def ratio_of(values: list[float], reference: list[float]) -> list[float]:
    """Return the median of the turns' ratios, the lowest and the highest."""
    ratios = [one / other for one, other in zip(values, reference, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def span(ratio: list[float]) -> str:
    """Write a median with the lowest and the highest."""
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def folder_of(results: Path, device: str) -> Path:
    """Return the folder of a device's rows: the CPU's are at the top, each GPU has one by its name."""
    if device == "cpu":
        return results
    import torch

    return results / torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")


def measure_row(name: str, row: Row, options: argparse.Namespace) -> None:
    """Measure one row, print it and keep it."""
    import torch

    from lfrns_hub.measure.latency import _PACKAGES, _version, cpu_name

    found = row.measure(options)
    ratios = ratios_of(found)
    on_gpu = {"gpu": torch.cuda.get_device_name(options.device)} if options.device != "cpu" else {}
    there = f" --device {options.device}" if on_gpu else ""
    content = {
        "what": row.what,
        "wanted": row.wanted,
        "turns": found,
        "ratios": ratios,
        "command": f"python benchmarks/speed.py --only {name} --runs {options.runs}{there}",
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), **on_gpu},
        "versions": {package: _version(package) for package in (*_PACKAGES, "torch-pruning")},
        "smoke": options.smoke,
    }
    folder = folder_of(options.results, options.device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for side, ratio in ratios.items():
        print(f"{row.what} | {side}: {span(ratio)}, wanted {row.wanted}", flush=True)
