"""Dense against slim on the clock: batches, eager PyTorch and ONNX Runtime, medians, spreads, ratios of turns."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from lfrns_hub.export import export, installed, open_runner
from lfrns_hub.measure import evaluating, forward_passes, take_turns

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass
class Timing:
    """Milliseconds of one forward pass, each figure as [median, first quartile, third quartile].

    Attributes:
        runtime: "eager" or "onnxruntime".
        batch: Images a pass.
        dense_ms, slim_ms: Of the two models, in turns.
        ratio: Slim over dense, of each turn: what a busy machine slows alike.
    """

    runtime: str
    batch: int
    dense_ms: list[float]
    slim_ms: list[float]
    ratio: list[float]


def bench(
    slim: nn.Module,
    dense: nn.Module,
    example_input: Tensor,
    *,
    batches: Sequence[int] = (1, 32),
    runs: int = 30,
    warmup: int = 5,
) -> list[Timing]:
    """Time a slim model against its dense one, in turns; in ONNX Runtime too where the extra `export` is installed.

    Args:
        slim, dense: Models, each run where it is; ONNX Runtime runs on the CPU, with as many threads as torch has.
        example_input: Images [N, C, H, W], of which the first is repeated.
        batches: Images a pass, from 1.
        runs: Timed turns, from 1.
        warmup: Turns before them that are not timed.
    Returns:
        A timing for each runtime and batch.
    Raises:
        ValueError: No batch, or one or runs below 1.
    """
    if not batches or min(batches) < 1 or runs < 1:
        raise ValueError(f"bench(batches={list(batches)}, runs={runs}): each must be 1 or more, as batches=[1, 32].")
    models, timings = {"dense": dense, "slim": slim}, []
    sized = {batch: example_input[:1].repeat(batch, *[1] * (example_input.ndim - 1)) for batch in batches}
    with evaluating(*models.values()), torch.no_grad():
        for batch, images in sized.items():
            timings.append(_time("eager", batch, forward_passes(models, images), runs, warmup))
        if all(installed(package) for package in ONNX_PACKAGES):
            with tempfile.TemporaryDirectory(prefix="lfrns-bench-") as folder:
                timings += _time_onnx(models, sized, Path(folder), runs, warmup)
    return timings


def _time_onnx(
    models: dict[str, nn.Module], sized: dict[int, Tensor], folder: Path, runs: int, warmup: int
) -> list[Timing]:
    """Export both models and time the sessions; a model that takes one batch size alone is left out."""
    exports = {name: export(model, folder / f"{name}.onnx", sized[min(sized)]) for name, model in models.items()}
    if not all(one.any_batch for one in exports.values()):
        return []
    runners: dict[str, Any] = {
        name: open_runner(one.path, threads=torch.get_num_threads()) for name, one in exports.items()
    }
    plain = {batch: images.detach().float().cpu() for batch, images in sized.items()}
    return [
        _time("onnxruntime", batch, {n: lambda r=r, i=images: r(i) for n, r in runners.items()}, runs, warmup)
        for batch, images in plain.items()
    ]


def _time(runtime: str, batch: int, calls: dict[str, Callable[[], Any]], runs: int, warmup: int) -> Timing:
    """Time the two in turns."""
    times = take_turns(calls, runs=runs, warmup=warmup)
    ratios = [slim / dense for slim, dense in zip(times["slim"], times["dense"], strict=True)]
    return Timing(runtime, batch, _quartiles(times["dense"]), _quartiles(times["slim"]), _quartiles(ratios))


def _quartiles(values: list[float]) -> list[float]:
    """Give median, first and third quartile."""
    if len(values) == 1:
        return values * 3
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return [median, first, third]


def format_timings(timings: Sequence[Timing], title: str) -> Table:
    """Lay timings out as a table."""
    table = Table(title=title)
    for heading in ("runtime", "batch", "dense, ms", "slim, ms", "slim / dense"):
        table.add_column(heading, justify="left" if heading == "runtime" else "right")
    for one in timings:
        figures = (("dense_ms", ".2f"), ("slim_ms", ".2f"), ("ratio", ".3f"))
        cells = [_spread(getattr(one, key), form) for key, form in figures]
        table.add_row(one.runtime, str(one.batch), *cells)
    return table


def _spread(values: list[float], form: str) -> str:
    """Write a median with its quartiles."""
    median, first, third = (format(value, form) for value in values)
    return f"{median} ({first} to {third})"
