"""What a layer takes by its width: which multiples a GPU likes."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_forward import pass_ms
from torch import nn

WIDTHS = tuple(range(128, 513, 8))
ODD_WIDTHS = tuple(range(249, 256))  # what any other multiple than 8 costs
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS, PASSES = 3, 10


def layers(smoke: bool) -> dict[str, tuple[Callable[[int, int], nn.Module], int, tuple[int, ...]]]:
    """Return what makes a layer of input and output widths, its usual width, and its input's shape without channels."""
    side, tokens = (4, 8) if smoke else (14, 197)
    return {
        "conv3x3": (lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False), 16 if smoke else 256, (side, side)),
        "conv1x1": (lambda i, o: nn.Conv2d(i, o, 1, bias=False), 16 if smoke else 512, (2 * side, 2 * side)),
        "linear": (nn.Linear, 16 if smoke else 768, (tokens,)),
    }


@torch.no_grad()
def climb(
    build: Callable[[int, int], nn.Module],
    fixed: int,
    shape: tuple[int, ...],
    axis: str,
    batch: int,
    device: str,
    dtype: torch.dtype,
    widths: tuple[int, ...],
) -> dict[int, float]:
    """Time a layer over its output or its input widths: width -> milliseconds, the least of some rounds of passes."""
    found = dict.fromkeys(widths, float("inf"))
    for _ in range(ROUNDS):
        for width in widths:
            read, made = (fixed, width) if axis == "out" else (width, fixed)
            layer = build(read, made).to(device=device, dtype=dtype)
            if len(shape) == 2:
                layer = layer.to(memory_format=torch.channels_last)
                images = torch.randn(batch, read, *shape, device=device, dtype=dtype)
                images = images.contiguous(memory_format=torch.channels_last)
            else:
                images = torch.randn(batch, *shape, read, device=device, dtype=dtype)
            call = lambda layer=layer, images=images: layer(images)  # noqa: E731  (it is timed, not named)
            pass_ms(call, 3, device)
            found[width] = min(found[width], pass_ms(call, PASSES, device))
    return found


def excess(ms: dict[int, float]) -> dict[int, float]:
    """Give, for each multiple, the median of the times at widths that are of it and of no larger one, over the line.

    The line goes through the widths that are multiples of 64; so what is above 1 is what such a width wastes.

    Example:
        >>> excess({64: 1.0, 96: 2.0, 120: 2.0, 128: 2.0})[32]
        1.333
    """
    ends = sorted(width for width in ms if width % 64 == 0)

    def line(width: int) -> float:
        left = max(end for end in ends if end <= width)
        right = min(end for end in ends if end >= width)
        return ms[left] + (ms[right] - ms[left]) * (width - left) / max(1, right - left)

    over: dict[int, list[float]] = {multiple: [] for multiple in MULTIPLES}
    for width, taken in ms.items():
        over[max(multiple for multiple in MULTIPLES if width % multiple == 0)].append(taken / line(width))
    return {multiple: round(statistics.median(ratios), 3) for multiple, ratios in over.items() if ratios}


def staircases(row: dict[str, Any], batch: int, device: str, dtype: torch.dtype, smoke: bool) -> None:
    """Time each layer over both widths, into a row, each as it is known."""
    widths = (128, 136, 144, 160, 192, 255, 256) if smoke else tuple(sorted((*WIDTHS, *ODD_WIDTHS)))
    row["widths"] = list(widths)
    row["layers"] = {}
    for name, (build, fixed, shape) in layers(smoke).items():
        for axis in ("out", "in"):
            ms = climb(build, fixed, shape, axis, batch, device, dtype, widths)
            found = {"other_width": fixed, "input": [batch, *shape], "excess": excess(ms)}
            row["layers"][f"{name}, {axis}"] = found | {"ms": [round(one, 5) for one in ms.values()]}
            print(f"  {name}, {axis}put width: over the line of 64s by multiple {found['excess']}", flush=True)
