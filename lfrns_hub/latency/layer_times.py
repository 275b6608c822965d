"""Times of stock layers by width: measured once on a grid, stored per machine, interpolated in between."""

import bisect
import contextlib
import functools
import itertools
import json
import math
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.format.untrusted import read_json
from lfrns_hub.latency.setup import LatencySetup
from lfrns_hub.runs import written_aside
from lfrns_hub.runs.cache import digest

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the dense width: the widths timed, in addition to one step
STEPS = (1, 8, 16, 32, 64)  # sizes of vector registers and matrix tiles
PROBE_WIDTHS = tuple(range(64, 129, 4))


@dataclass(frozen=True)
class LayerShape:
    """A layer without its widths: everything else that its time depends on.

    Attributes:
        kind: "linear", "conv1d", "conv2d" or "conv3d".
        positions: Shape of its input without the channels: [batch, tokens] or [batch, height, width].
        options: Arguments of a convolution, JSON values, and whether there is a bias.
        per_group: Input and output channels of one conv group, None for an ungrouped layer.
    """

    kind: str
    positions: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    per_group: tuple[int, int] | None = None

    @classmethod
    def of(cls, layer: nn.Module, shape: Sequence[int]) -> "LayerShape":
        """Return the shape of a stock layer for inputs of a shape."""
        if isinstance(layer, nn.Linear):
            return cls("linear", tuple(shape[:-1]), (("bias", layer.bias is not None),))
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        options = (*((name, getattr(layer, name)) for name in names), ("bias", layer.bias is not None))
        groups = layer.groups
        per_group = None if groups == 1 else (layer.in_channels // groups, layer.out_channels // groups)
        kind = next(c.__name__ for c in LAYERS[1:] if isinstance(layer, c)).lower()
        return cls(kind, (shape[0], *shape[2:]), options, per_group)

    @property
    def family(self) -> str:
        """The family, "linear" or "conv": its layers share the hardware's step."""
        return "linear" if self.kind == "linear" else "conv"

    def build(self, out: int, read: int, setup: LatencySetup, channels_last: bool) -> tuple[nn.Module, Tensor]:
        """Build a stock layer of these widths and an input; their values do not matter if they are normal numbers."""
        place = {"dtype": setup.dtype, "device": setup.device}
        options = dict(self.options)
        if self.kind == "linear":
            layer: nn.Module = nn.utils.skip_init(nn.Linear, read, out, **options, **place)
            images = torch.full((*self.positions, read), 0.1, **place)
        else:
            groups = read // self.per_group[0] if self.per_group else 1
            kind = next(c for c in LAYERS[1:] if c.__name__.lower() == self.kind)
            layer = nn.utils.skip_init(kind, read, out, groups=groups, **options, **place)
            images = torch.full((self.positions[0], read, *self.positions[1:]), 0.1, **place)
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 0.01)
        if channels_last and self.kind == "conv2d":
            layer, images = layer.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
        return layer.eval().requires_grad_(False), images

    def key(self, out: int, read: int) -> str:
        """Return the key of the layer at two widths, for the file."""
        options = " ".join(f"{name}={value}" for name, value in self.options)
        groups = f" per_group={self.per_group}" if self.per_group else ""
        return f"{self.kind} {list(self.positions)} {options}{groups} {read}->{out}"


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of one layer over its variable widths.

    Attributes:
        widths: Ascending widths of each measured axis, the last one dense: [axes][grid].
        ms: The times at these widths, [grid of axis 0 x grid of axis 1 x ...], the last axis fastest.
        step: A width costs as much as the next multiple of this; 1 interpolates.
    """

    widths: tuple[tuple[int, ...], ...]
    ms: tuple[float, ...]
    step: int = 1
    _seen: dict[tuple[float, ...], float] = field(default_factory=dict, compare=False, repr=False)

    def scaled(self, factor: float, step: int) -> "LayerTimes":
        """Return the times multiplied by a factor, with a step."""
        return LayerTimes(self.widths, tuple(factor * ms for ms in self.ms), step)

    def at(self, *kept: float) -> float:
        """Return the time at some widths, one per axis, by linear interpolation; below the grid, that of its smallest.

        Example:
            >>> LayerTimes(((16, 32),), (1.0, 3.0)).at(24), LayerTimes(((16, 32),), (1.0, 3.0), step=16).at(24)
            (2.0, 3.0)
        """
        if kept in self._seen:
            return self._seen[kept]
        corners = [(0, 1.0)]
        for width, grid in zip(kept, self.widths, strict=True):
            if self.step > 1:
                width = min(grid[-1], math.ceil(width / self.step - 1e-9) * self.step)
            width = min(max(width, grid[0]), grid[-1])
            right = min(max(1, bisect.bisect_left(grid, width)), len(grid) - 1)
            left = max(0, right - 1)
            part = (width - grid[left]) / (grid[right] - grid[left]) if right > left else 0.0
            corners = [
                (at * len(grid) + place, weight * share)
                for at, weight in corners
                for place, share in ((left, 1 - part), (right, part))
                if share
            ]
        total = self._seen[kept] = sum(weight * self.ms[at] for at, weight in corners)
        return total


class LayerTable:
    """Layer times on this machine with one setup; unknown ones are measured.

    Args:
        machine: An object that times layers, like `Machine`.
        directory: Folder of the table, one file per machine and setup; None: the user's cache.
    """

    def __init__(
        self,
        machine: Any,
        directory: str | os.PathLike | None = None,
    ):
        self.machine, self.described = machine, machine.describe()
        name = f"latency-{digest(self.described)}.json"
        self.path = (cache_directory() if directory is None else Path(directory)) / name
        self.known = self._read()

    def times(self, shape: LayerShape, widths: Sequence[tuple[int, bool]]) -> LayerTimes:
        """Return a layer's times over its variable widths.

        Args:
            shape: The layer.
            widths: Its dense output and input widths, each with whether plans change it; only the output for a grouped
                convolution.
        Returns:
            Times that never fall as a width grows: a fall is noise, and the slower time before it is lowered.
        """
        step = self.step(shape.family)
        grids = [grid(width, step, shape.per_group) if free else (width,) for width, free in widths]
        points = [self._point(shape, at) for at in itertools.product(*grids)]
        missing = [point for point in points if shape.key(*point) not in self.known]
        if missing:
            for point, ms in zip(
                missing, self.machine.time_layers([(shape, *point) for point in missing]), strict=True
            ):
                self.known[shape.key(*point)] = ms
        ms = torch.tensor([self.known[shape.key(*point)] for point in points], dtype=torch.float64)
        ms = ms.reshape([len(g) for g in grids])
        for axis in range(ms.ndim):
            ms = ms.flip(axis).cummin(axis).values.flip(axis)
        return LayerTimes(tuple(grids), tuple(ms.flatten().tolist()))

    def step(self, family: str) -> int:
        """Return the multiple of channels at which layers of a family get slower, as measured on this machine."""
        key = f"step {family}"
        if key not in self.known:
            if family == "linear":
                shape = LayerShape("linear", (1, 196), (("bias", True),))
            else:
                shape = LayerShape.of(nn.Conv2d(128, 128, 3, padding=1, bias=False), (1, 128, 28, 28))
            # Several times, so that a busy moment is not taken for a step.
            rounds = [self.machine.time_layers([(shape, width, 128) for width in PROBE_WIDTHS]) for _ in range(3)]
            self.known[key] = find_step(dict(zip(PROBE_WIDTHS, map(min, zip(*rounds, strict=True)), strict=True)))
        return int(self.known[key])

    def keep(self) -> None:
        """Write the measured times; if the folder cannot be written, the next call measures again."""
        merged = dict(sorted({**self._read(), **self.known}.items()))
        text = json.dumps({"machine": self.described, "ms": merged, "digest": digest(merged)}, indent=0)
        try:
            with written_aside(self.path) as partial:
                partial.write_text(text, encoding="utf-8")
        except OSError:
            pass

    def _read(self) -> dict[str, float]:
        """Return the content of the file; a damaged file, or one not written by `keep`, counts as empty."""
        try:
            stored = read_json(self.path, str(self.path))
        except (OSError, ValueError):
            return {}
        ms = stored.get("ms")
        return ms if isinstance(ms, dict) and stored.get("digest") == digest(ms) else {}

    def _point(self, shape: LayerShape, widths: tuple[int, ...]) -> tuple[int, int]:
        """Return output and input width of a grid point."""
        if shape.per_group is None:
            return widths[0], widths[1]
        read, made = shape.per_group
        return widths[0], widths[0] // made * read


def grid(width: int, step: int, per_group: tuple[int, int] | None) -> tuple[int, ...]:
    """Return the widths at which a layer of a dense width is timed: one step, and shares of the width in whole steps.

    Example:
        >>> grid(100, 16, None)
        (16, 32, 64, 80, 100)
    """
    least = step if per_group is None else math.lcm(step, per_group[1])
    wanted = {least, *(math.ceil(width * share / least) * least for share in SHARES)}
    return tuple(sorted({min(width, point) for point in wanted}))


def find_step(ms: dict[int, float]) -> int:
    """Find the multiples of a width at which its times rise: the step whose staircase fits best, 1 for none.

    Args:
        ms: Times by width, in ms.

    Example:
        >>> find_step({width: 1 + -(-width // 16) for width in range(64, 129, 4)})
        16
    """
    widths = torch.tensor(list(ms), dtype=torch.float64)
    times = torch.tensor(list(ms.values()), dtype=torch.float64)

    def misfit(step: int) -> float:
        stairs = (widths / step).ceil() * step
        design = torch.stack([torch.ones_like(stairs), stairs], 1)
        return float((times - design @ torch.linalg.lstsq(design, times[:, None]).solution[:, 0]).square().sum())

    line = misfit(1)
    best = min(STEPS, key=misfit)
    return best if misfit(best) < line / 2 else 1


def cache_directory() -> Path:
    """Return the folder of the user's cache: LFRNS_CACHE, or lfrns_hub in XDG_CACHE_HOME or in ~/.cache.

    A user without a home (a container's unknown uid) gets a private folder among the temporary files.
    """
    own, home = os.environ.get("LFRNS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    try:
        return Path(home or Path.home() / ".cache") / "lfrns_hub"
    except RuntimeError:
        return _homeless_directory()


@functools.cache
def _homeless_directory() -> Path:
    """Return a private folder of this user among the temporary files, the same in every process."""
    folder = Path(tempfile.gettempdir()) / f"lfrns_hub-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if mine else Path(tempfile.mkdtemp(prefix="lfrns_hub-"))
