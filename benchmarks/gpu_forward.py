"""Forward passes of several models in turns on one device: eager, by a CUDA graph, compiled; and what they move."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from turns import Turns, ratio_of

MOST_TURNS, FEWEST_TURNS = 25, 5
TURN_MS = 20.0  # of one model in one turn, at least: many passes where one is short
UNCOUNTED = (nn.Identity, nn.Dropout)  # they move nothing when they do not train


def placed(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    """Return a copy of a model with weights of a dtype, in a layout, that does not train."""
    return copy.deepcopy(model).eval().requires_grad_(False).to(dtype=dtype, memory_format=layout)


def pass_ms(call: Callable[[], Any], passes: int, device: str) -> float:
    """Return the milliseconds of one of several passes, by CUDA events where there are any."""
    if device == "cpu":
        began = time.perf_counter()
        for _ in range(passes):
            call()
        return 1000 * (time.perf_counter() - began) / passes
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(passes):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / passes


def take_turns(calls: dict[str, Callable[[], Any]], device: str, seconds: float) -> Turns:
    """Time calls one after the other, again and again: milliseconds of a pass, each turn, by name.

    Args:
        calls: By name.
        device: Where they run.
        seconds: After which no more turns are taken, after FEWEST_TURNS at the earliest.
    """
    for call in calls.values():
        pass_ms(call, 3, device)
    passes = {name: math.ceil(TURN_MS / pass_ms(call, 1, device)) for name, call in calls.items()}
    times: Turns = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(MOST_TURNS):
        if turn >= FEWEST_TURNS and time.perf_counter() - began > seconds:
            break
        for name, call in calls.items():
            times[name].append(pass_ms(call, min(50, max(1, passes[name])), device))
    return times


def compared(times: Turns) -> dict[str, dict[str, Any]]:
    """Return the median milliseconds of each, and how much faster than dense it was in the same turns."""
    return {
        name: {
            "ms": round(statistics.median(values), 4),
            "times_faster": [round(one, 4) for one in ratio_of(times["dense"], values)],
            "turns": len(values),
        }
        for name, values in times.items()
    }


@torch.no_grad()
def time_forward(models: dict[str, nn.Module], images: Tensor, seconds: float) -> dict[str, dict[str, Any]]:
    """Time models, "dense" among them, on images."""
    calls = {name: lambda model=model: model(images) for name, model in models.items()}
    return compared(take_turns(calls, images.device.type, seconds))


@torch.no_grad()
def time_graphs(models: dict[str, nn.Module], images: Tensor, seconds: float) -> dict[str, dict[str, Any]]:
    """Time the replay of a CUDA graph of each model: its kernels, without what the interpreter takes to launch them."""
    calls = {}
    for name, model in models.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a graph is captured of what ran before
            for _ in range(3):
                model(images)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(images)
        calls[name] = graph.replay
    return compared(take_turns(calls, images.device.type, seconds))


@torch.no_grad()
def bytes_moved(model: nn.Module, images: Tensor) -> int:
    """Count the bytes that the leaves of a module read and write when each runs by itself, weights included.

    What is no module is not counted: sums of branches, attention's products, functions of a forward.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        tensors = [*inputs, output, *module.parameters(), *module.buffers()]
        total += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    leaves = [m for m in model.modules() if not list(m.children()) and not isinstance(m, UNCOUNTED)]
    hooks = [leaf.register_forward_hook(count) for leaf in leaves]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return total
