"""Milliseconds of a forward pass, of several models in turns, and the setup of the measurement."""

import contextlib
import copy
import functools
import math
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.model_io.model import as_input, dtype_of, evaluating

_PACKAGES = ("lfrns_hub", "torch", "timm", "transformers", "accelerate")
MIN_TURNS = 5


def measure_latency(
    models: dict[str, nn.Module], example_input: Tensor, *, runs: int = 30, warmup: int = 5
) -> dict[str, float]:
    """Time one forward pass of several models, taking turns so that a busy machine slows them alike.

    Args:
        models: Name -> model, each run as it is (compiled or not, on its device), in eval mode.
        example_input: Images [N, C, H, W], run as given: pass one image for the latency of batch 1.
        runs: Timed passes of each model.
        warmup: Passes of each model before them that are not timed.
    Returns:
        Name -> median milliseconds.
    Raises:
        ValueError: runs is below 1.
    """
    if runs < 1:
        raise ValueError(f"measure_latency(runs={runs}): at least one timed run is needed. The default is 30.")
    with evaluating(*models.values()), torch.no_grad():
        times = take_turns(forward_passes(models, example_input), runs=runs, warmup=warmup)
    return {name: statistics.median(values) for name, values in times.items()}


def forward_passes(models: dict[str, nn.Module], example_input: Tensor) -> dict[str, Callable[[], None]]:
    """Return a call for each model that runs the images on its device and returns when it is done."""

    def call(model: nn.Module, images: Tensor) -> None:
        model(images)
        wait_for(images.device)

    inputs = {name: as_input(example_input, model) for name, model in models.items()}
    for images in inputs.values():
        wait_for(images.device)
    return {name: functools.partial(call, model, inputs[name]) for name, model in models.items()}


def take_turns(
    calls: dict[str, Callable[[], Any]], *, runs: int, warmup: int, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Time several calls in turns.

    Args:
        calls: By name.
        runs, warmup: Turns that are timed, and turns before them that are not.
        seconds: Time limit of the turns: a tenth of it for warming up, after at least one turn; the rest for timing,
            after at least MIN_TURNS.
    Returns:
        Name -> milliseconds of each timed turn, [runs] or fewer; equal positions are from the same turn.
    """
    for turns, least, share in ((warmup, 1, 0.1), (runs, MIN_TURNS, 0.9)):
        times: dict[str, list[float]] = {name: [] for name in calls}
        began = time.perf_counter()
        for turn in range(turns):
            if turn >= least and time.perf_counter() - began > share * seconds:
                break
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def describe_setup(model: nn.Module, example_input: Tensor, device: torch.device) -> dict[str, Any]:
    """Return the setup of the measurement."""
    setup = {
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "batch_size": 1,
        "input_size": list(example_input.shape[1:]),
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }
    provenance = getattr(model, "lfrns_provenance", None)
    return setup if provenance is None else setup | {"provenance": copy.deepcopy(provenance)}


def _version(package: str) -> str | None:
    """Return the installed version of a package, None where it is not installed (as in a plain checkout)."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the name of the processor; on Linux platform.processor() is often empty."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has finished its queued work."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
