"""Groups read from resolved ids, and MACs and parameters as functions of their widths."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfrns_hub.trace.adapters import find_adapter, find_owner
from lfrns_hub.trace.ids import NONE, Axis, IdTable, resolve
from lfrns_hub.trace.widths import group_widths
from lfrns_hub.units import Slice, Tap, UnitGroup, Width

Axes = list[tuple[dict[str, int], int]]  # per axis: positions per unit of each group, and all positions
UNREAD = "no output of the network in eval mode depends on it"


def element_axes(ids: IdTable, labels: np.ndarray) -> list[Axis]:
    """Find the axis of each elementwise parameter on which units lie; units without one are frozen."""
    axes = []
    for name, element_ids in ids.tensors.items():
        units = resolve(element_ids, labels).reshape(element_ids.shape)
        for dim in range(units.ndim):
            along = np.moveaxis(units, dim, 0).reshape(units.shape[dim], -1)
            if (along == along[:, :1]).all() and (units.ndim == 1 or len(np.unique(along[:, 0])) > 1):
                axes.append(
                    Axis(
                        name,
                        dim,
                        torch.from_numpy(element_ids.movedim(dim, 0).reshape(len(along), -1)[:, 0].numpy()),
                        False,
                    )
                )
                break
        else:
            ids.freeze(element_ids.flatten(), f"its units do not lie on one axis of {name}")
    return axes


def marks(ids: IdTable, labels: np.ndarray) -> tuple[dict[int, str], set[int], set[int], set[int]]:
    """Return the units that are frozen (with the reason), approximate, heads, and activated."""
    approximate: set[int] = set()
    frozen: dict[int, str] = {}
    for rows, freeze in ids.deferred:
        units = resolve(rows, labels).reshape(rows.shape)
        for row in units[(units != units[:, :1]).any(1)]:
            real = [int(u) for u in np.unique(row) if u != NONE]
            if freeze is None:
                approximate.update(real)
            else:
                frozen.update((unit, freeze) for unit in real)
    for frozen_ids, reason in ids.frozen:
        for unit in np.unique(resolve(frozen_ids, labels)).tolist():
            frozen.setdefault(unit, reason)
    heads = {int(u) for h in ids.heads for u in np.unique(resolve(h, labels))}
    activated = {int(u) for a in ids.activated for u in np.unique(resolve(a, labels))}
    return frozen, approximate, heads, activated


@dataclass
class Places:
    """Axes of each unit in ascending order, and its positions along each of them."""

    axes: dict[int, list[int]]
    counts: dict[int, list[int]]
    positions: dict[int, list[np.ndarray]]

    def __init__(self, unit_axes: list[np.ndarray]):
        units = np.concatenate(unit_axes) if unit_axes else np.zeros(0, np.int64)
        numbers = np.repeat(np.arange(len(unit_axes)), [len(u) for u in unit_axes])
        places = np.concatenate([np.arange(len(u)) for u in unit_axes]) if unit_axes else units
        real = units != NONE
        units, numbers, places = units[real], numbers[real], places[real]
        order = np.lexsort((places, numbers, units))
        units, numbers, places = units[order], numbers[order], places[order]
        breaks = np.flatnonzero((np.diff(units) != 0) | (np.diff(numbers) != 0)) + 1
        starts = np.concatenate([[0], breaks]) if len(units) else np.zeros(0, np.int64)
        self.axes, self.counts, self.positions = defaultdict(list), defaultdict(list), defaultdict(list)
        pieces = np.split(places, breaks)
        for unit, number, piece in zip(
            units[starts].tolist(), numbers[starts].tolist(), pieces, strict=bool(len(starts))
        ):
            self.axes[unit].append(number)
            self.counts[unit].append(len(piece))
            self.positions[unit].append(piece)

    def index(self, units: list[int], place: int) -> Tensor:
        """Return the positions of units of one family along their `place`-th axis, [U, width]."""
        return torch.from_numpy(np.stack([self.positions[u][place] for u in units]))


def read_groups(ids: IdTable, model: nn.Module) -> list[UnitGroup]:
    """Group together units that lie on the same axes.

    Args:
        ids: A finished id table.
        model: The traced model, for names and adapters.
    Returns:
        All groups, in the order of the axes that make them.
    """
    labels = ids.classes()
    axes = ids.axes + element_axes(ids, labels)
    frozen, approximate, heads, activated = marks(ids, labels)
    normed = {int(u) for n in ids.normed for u in np.unique(resolve(n, labels))}
    unobserved = {int(u) for n in ids.unobserved for u in np.unique(resolve(n, labels))}
    places = Places([resolve(axis.ids, labels) for axis in axes])
    consumed = Places([resolve(consumer.ids, labels) for consumer in ids.consumers])
    families: dict[Any, list[int]] = defaultdict(list)
    for unit, where in sorted(places.axes.items(), key=lambda item: item[1][0]):
        if any(axes[number].makes for number in where):
            family = (
                tuple(where),
                tuple(places.counts[unit]),
                tuple(consumed.axes[unit]),
                tuple(consumed.counts[unit]),
            )
            families[*family, frozen.get(unit), unit in approximate, unit in heads].append(unit)
    groups: list[UnitGroup] = []
    names: set[str] = set()
    unit_group: dict[int, int] = {}
    for (where, _, taps, _, reason, inexact, is_head), units in families.items():
        makers = [axes[number].tensor.removesuffix(".weight") for number in where if axes[number].makes]
        units.sort(key=lambda unit: places.positions[unit][0][0])
        tap_names = [ids.consumers[number].module for number in taps]
        kind = "channel"
        if is_head:
            kind = "head"
        elif all(u in activated and u not in normed for u in units) and in_mlp_role(model, makers, tap_names):
            kind = "neuron"
        name = makers[0].rpartition(".")[0] if kind == "head" and "." in makers[0] else makers[0]
        while name in names:
            stem, _, number = name.partition("#")
            name = f"{stem}#{int(number or 1) + 1}"
        names.add(name)
        reason = reason or ("only one unit" if len(units) == 1 else None)
        if not taps:
            reason = reason or (UNREAD if unobserved.intersection(units) else "no layer reads it")
        if kind == "head" and reason is None:
            adapter = find_adapter(model, tap_names[0])
            reason = adapter.frozen_heads if adapter else None
        unit_group.update(dict.fromkeys(units, len(groups)))
        slices = tuple(Slice(axes[n].tensor, axes[n].dim, places.index(units, at)) for at, n in enumerate(where))
        read = tuple(Tap(name, consumed.index(units, at)) for at, name in enumerate(tap_names))
        groups.append(UnitGroup(name, kind, len(units), not inexact, reason, slices, read))
    widths = group_widths(ids.literals, labels, unit_group, model)
    whole = [
        UnitGroup(name, "channel", size, frozen_reason=why)
        for name, (size, why) in ids.unmade.items()
        if name not in names
    ]
    return [*(replace(g, widths=stated_widths(model, g, widths.get(n, ()))) for n, g in enumerate(groups)), *whole]


def stated_widths(model: nn.Module, group: UnitGroup, found: tuple[Width, ...]) -> tuple[Width, ...]:
    """Return the attributes that follow a group: an adapter's where there is one, else those in the graph."""
    owner = find_owner(model, group.taps[0].module) if group.kind == "head" and group.taps else None
    if owner is None:
        return found
    name, adapter = owner
    values = {attribute: vars(model.get_submodule(name)).get(attribute) for attribute in adapter.heads}
    for attribute, value in values.items():
        if not isinstance(value, int) or value % group.size:
            raise ValueError(
                f"register_adapter({adapter.cls!r}, heads=widths({attribute!r})): in {name} it is {value!r}, and "
                f"{group.size} heads lie there. Name int attributes that are multiples of the number of heads."
            )
    said = (Width(name, attribute, None, value // group.size) for attribute, value in values.items())
    return tuple(dict.fromkeys([*said, *(width for width in found if width.module != name)]))


def in_mlp_role(model: nn.Module, makers: list[str], taps: list[str]) -> bool:
    """Return whether units are made and read by linear layers, or by equivalent 1x1 convolutions."""
    layers = [model.get_submodule(name) for name in makers + taps]
    return all(isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)) for m in layers)


def unit_places(ids: IdTable, labels: np.ndarray, groups: Sequence[UnitGroup]) -> dict[int, tuple[str, int]]:
    """Return group and index of each unit number that lies on an axis of a parameter."""
    along = {(axis.tensor, axis.dim): resolve(axis.ids, labels) for axis in ids.axes}
    places: dict[int, tuple[str, int]] = {}
    for group in groups:
        for part in group.slices:
            if (part.tensor, part.dim) in along:
                numbers = along[part.tensor, part.dim][part.index.numpy()]  # [U, width]
                for unit, row in enumerate(numbers.tolist()):
                    places.update((number, (group.name, unit)) for number in row)
    return places


class Cost:
    """A cost as a function of the units removed: a sum of terms, each of which depends on the widths of some groups."""

    def __init__(self, terms: Sequence[tuple[Any, Axes]], value: Callable[[Any, Axes, dict[str, int]], float]):
        """Store the terms, each a dense size and its axes, and the function of a term's value with units removed."""
        self._terms, self._value = list(terms), value
        self._of_group: dict[str, list[tuple[Any, Axes]]] = defaultdict(list)
        for term in terms:
            for group in {group for widths, _ in term[1] for group in widths}:
                self._of_group[group].append(term)

    def __call__(self, removed: dict[str, int], group: str | None = None) -> float:
        """Sum the terms, or only those that depend on one group, when `removed` units of each group are removed."""
        total = 0.0
        for size, axes in self._terms if group is None else self._of_group[group]:
            total += self._value(size, axes, removed)
        return total

    def add(self, size: float) -> None:
        """Add a term that does not depend on any plan."""
        self._terms.append((size, []))


class MacsModel:
    """MACs and parameters as functions of the units removed, exact and without running the network.

    Attributes:
        macs: MACs of one image.
        params: Parameters.
    """

    def __init__(self, ids: IdTable, groups: list[UnitGroup], model: nn.Module):
        labels = ids.classes()
        unit_group = {number: name for number, (name, _) in unit_places(ids, labels, groups).items()}
        sizes = {group.name: group.size for group in groups}
        by_axis: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
        for group in groups:
            for part in group.slices:
                by_axis[part.tensor, part.dim].append((group.name, part.index.shape[1]))

        def positions_on(axis: Tensor) -> tuple[dict[str, int], int]:
            positions: Counter[str] = Counter()
            for unit, count in zip(*np.unique(resolve(axis, labels), return_counts=True), strict=True):
                if unit in unit_group:
                    positions[unit_group[unit]] += int(count)
            return {name: count // sizes[name] for name, count in positions.items()}, int(axis.numel())

        self.macs = Cost([(term.macs, [positions_on(axis) for axis in term.axes]) for term in ids.macs], part_left)
        parameters = []
        for name, parameter in model.named_parameters():
            axes = [
                (dict(by_axis[name, dim]), parameter.shape[dim])
                for dim in range(parameter.ndim)
                if (name, dim) in by_axis
            ]
            parameters.append((parameter.numel(), axes))
        self.params = Cost(parameters, part_left)

    def complete(self, macs: int) -> None:
        """Add MACs that the rules do not see, such as a recurrent layer's, as a constant."""
        missing = macs - self.macs({})
        if missing > 0:
            self.macs.add(missing)


def part_left(size: float, axes: Axes, removed: dict[str, int]) -> float:
    """Return the remaining part of a size that is a product over some axes."""
    for widths, positions in axes:
        size = size * share_left(widths, positions, removed)
    return size


def share_left(widths: dict[str, int], positions: int, removed: dict[str, int]) -> float:
    """Return the remaining share of an axis."""
    return 1 - sum(width * removed.get(name, 0) for name, width in widths.items()) / positions
