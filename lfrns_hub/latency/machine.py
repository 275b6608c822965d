"""Timing on the machine: of single layers, of layers inside a network, of networks in turns."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lfrns_hub.latency.layer_times import LAYERS, LayerShape
from lfrns_hub.latency.setup import LatencySetup
from lfrns_hub.measure import forward_passes, take_turns, wait_for
from lfrns_hub.model_io.hooks import on_input, on_output

Layer = tuple[LayerShape, int, int]  # with its output and input channels

MAX_BYTES = 2**28  # of layers timed in turns: they evict each other from the processor's caches, as in a network
LAYER_SECONDS = 1.0  # for the grid of one layer
LAYER_RUNS = (3, 9)
RUNS = 10  # of each network, between two checks of the spread
SECONDS = 3.0  # at most, of one comparison of networks
SPREAD = 0.004  # standard error of a median ratio that is good enough


class Machine:
    """Timing with a setup.

    Args:
        setup: The setup, all fields resolved.
        channels_last: Whether convolutions run in this memory format.
    """

    def __init__(self, setup: LatencySetup, channels_last: bool = False):
        self.setup, self.channels_last = setup, channels_last

    def describe(self) -> dict[str, Any]:
        """Return everything that times depend on except the timed module."""
        return {**self.setup.describe(), "channels_last": self.channels_last, "torch": torch.__version__}

    def time_layers(self, layers: Sequence[Layer]) -> list[float]:
        """Time single layers in turns; return the minimum of some runs, the undisturbed time, in ms."""
        found: list[float] = []
        with self.setup.running():
            for part in parts(layers, MAX_BYTES // self.setup.dtype.itemsize):
                calls = {}
                for at, (shape, out, read) in enumerate(part):
                    layer, images = shape.build(out, read, self.setup, self.channels_last)
                    calls |= forward_passes({str(at): layer}, images)
                first = take_turns(calls, runs=1, warmup=1)
                turn = sum(ms[0] for ms in first.values()) / 1000
                runs = min(LAYER_RUNS[1], max(LAYER_RUNS[0], int(LAYER_SECONDS / turn)))
                found += [min(ms) for ms in take_turns(calls, runs=runs, warmup=0).values()]
        return found

    def time_inside(self, models: dict[str, nn.Module], images: Tensor) -> dict[str, dict[str, float]]:
        """Time networks in turns and the layers inside them: name -> {layer: ms of all its calls, "": ms of the rest}.

        Medians over passes; so a layer's time includes fetching its weights, and all times have the same machine load.
        """
        found = {}
        with self.setup.running(), watched_layers(models, images.device) as laps:
            times = take_turns(forward_passes(models, images), runs=2 * RUNS, warmup=3)
        for name, totals in times.items():
            inside = {layer: ms[-len(totals) :] for layer, ms in laps[name].items()}
            rest = [total - sum(ms[at] for ms in inside.values()) for at, total in enumerate(totals)]
            found[name] = {layer: statistics.median(ms) for layer, ms in inside.items()} | {"": statistics.median(rest)}
        return found

    def time_models(self, models: dict[str, nn.Module], images: Tensor) -> dict[str, list[float]]:
        """Time networks in turns until the ratio of the last to the first is accurate enough: name -> ms per turn."""
        with self.setup.running():
            if self.setup.compile:
                torch.compiler.reset()  # else the widths of earlier candidates count towards its limit of recompiles
                models = {name: torch.compile(model, dynamic=False) for name, model in models.items()}
            calls = forward_passes(models, images)
            first, *_, last = calls
            times = take_turns(calls, runs=RUNS, warmup=3)
            end = time.perf_counter() + SECONDS
            while time.perf_counter() < end and spread(times[last], times[first]) > SPREAD:
                for name, more in take_turns(calls, runs=RUNS, warmup=0).items():
                    times[name] += more
        return times


@contextmanager
def watched_layers(models: dict[str, nn.Module], device: torch.device) -> Iterator[dict[str, dict[str, list[float]]]]:
    """Time every stock layer in every pass: model -> layer -> ms of each pass, all its calls together."""
    laps: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in models}
    hooks = [hook for name, model in models.items() for hook in _watch(model, device, laps[name])]
    try:
        yield laps
    finally:
        for hook in hooks:
            hook.remove()


def _watch(model: nn.Module, device: torch.device, laps: dict[str, list[float]]) -> list[RemovableHandle]:
    """Add timing hooks to one model's layers."""
    started: list[float] = []
    passes = 0

    def begin(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def start(*_: Any) -> None:
        wait_for(device)
        started.append(time.perf_counter())

    def stop(mine: list[float]) -> None:
        wait_for(device)
        ms = 1000 * (time.perf_counter() - started.pop())
        if len(mine) < passes:
            mine.append(0.0)
        mine[-1] += ms

    hooks = [on_input(model, begin)]
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            hooks.append(on_input(module, start))
            hooks.append(on_output(module, lambda *_, mine=laps[name]: stop(mine)))
    return hooks


def parts(layers: Sequence[Layer], most: int) -> list[list[Layer]]:
    """Split layers into runs of at most `most` numbers, inputs and weights."""
    found: list[list[Layer]] = [[]]
    total = 0
    for shape, out, read in layers:
        kernel = math.prod(dict(shape.options).get("kernel_size", (1,)))
        numbers = math.prod(shape.positions) * read + out * kernel * (shape.per_group[0] if shape.per_group else read)
        if found[-1] and total + numbers > most:
            found.append([])
            total = 0
        found[-1].append((shape, out, read))
        total += numbers
    return found


def spread(times: Sequence[float], others: Sequence[float]) -> float:
    """Return an estimate of the standard error of the median ratio of two rows of times, as a fraction of it."""
    low, middle, high = statistics.quantiles((t / o for t, o in zip(times, others, strict=True)), n=4)
    # For normal noise: a quartile lies 0.674 deviations off, and a median's error is 1.253 of a mean's.
    return 1.253 * (high - low) / (2 * 0.674) / middle / len(times) ** 0.5
