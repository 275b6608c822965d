"""Read the groups off resolved ids, and how MACs and parameters depend on their widths."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfrns_hub.adapters.registry import find_adapter
from lfrns_hub.trace.ids import NONE, Axis, IdTable
from lfrns_hub.units import Slice, Tap, UnitGroup


def resolve(ids: Tensor, labels: np.ndarray) -> np.ndarray:
    """Give the unit of each id, NONE for none."""
    flat = ids.reshape(-1).numpy()
    return np.where(flat == NONE, NONE, labels[np.maximum(flat, 0)])


def element_axes(ids: IdTable, labels: np.ndarray) -> list[Axis]:
    """Find the axis of each elementwise parameter on which units lie; where there is none its units are frozen."""
    axes = []
    for name, element_ids in ids.tensors.items():
        units = resolve(element_ids, labels).reshape(element_ids.shape)
        for dim in range(units.ndim):
            along = np.moveaxis(units, dim, 0).reshape(units.shape[dim], -1)
            if (along == along[:, :1]).all() and len(np.unique(along[:, 0])) == along.shape[0]:
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
    """Give the units that are frozen (with the reason), approximate, heads, activated."""
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


def read_groups(ids: IdTable, model: nn.Module) -> list[UnitGroup]:
    """Put units that lie on the same axes into one group.

    Args:
        ids: A finished id table.
        model: The traced model, for names and adapters.
    Returns:
        All groups, in the order of the axes that make them.
    """
    labels = ids.classes()
    axes = ids.axes + element_axes(ids, labels)
    axes = [axis for axis in axes if axis.tensor]
    frozen, approximate, heads, activated = marks(ids, labels)
    normed = {int(u) for n in ids.normed for u in np.unique(resolve(n, labels))}
    places: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for number, axis in enumerate(axes):
        units = resolve(axis.ids, labels)
        order = np.argsort(units, kind="stable")
        values, starts = np.unique(units[order], return_index=True)
        for unit, positions in zip(values.tolist(), np.split(order, starts[1:]), strict=True):
            if unit != NONE:
                places[unit].append((number, positions.tolist()))
    consumed: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for number, consumer in enumerate(ids.consumers):
        units = resolve(consumer.ids, labels)
        for unit in np.unique(units[units != NONE]).tolist():
            consumed[unit].append((number, np.flatnonzero(units == unit).tolist()))
    families: dict[Any, list[int]] = defaultdict(list)
    for unit, where in places.items():
        if not any(axes[number].makes for number, _ in where):
            continue
        signature = tuple((number, len(positions)) for number, positions in where)
        taps = tuple((number, len(positions)) for number, positions in consumed[unit])
        families[signature, taps, frozen.get(unit), unit in approximate, unit in heads].append(unit)
    groups, names = [], set()
    for (signature, taps, reason, inexact, is_head), units in families.items():
        makers = [axes[number].tensor.removesuffix(".weight") for number, _ in signature if axes[number].makes]
        units.sort(key=lambda unit: places[unit][[n for n, _ in places[unit]].index(signature[0][0])][1][0])
        tap_names = [ids.consumers[number].module for number, _ in taps]
        kind = "channel"
        if is_head:
            kind = "head"
        elif (
            all(u in activated and u not in normed for u in units)
            and not inexact
            and in_mlp_role(model, makers, tap_names)
        ):
            kind = "neuron"
        name = makers[0].rpartition(".")[0] if kind == "head" and "." in makers[0] else makers[0]
        while name in names:
            stem, _, number = name.partition("#")
            name = f"{stem}#{int(number or 1) + 1}"
        names.add(name)
        reason = reason or ("only one unit" if len(units) == 1 else None)
        reason = reason or ("no layer reads it" if not taps else None)
        if kind == "head" and reason is None:
            adapter = find_adapter(model, tap_names[0])
            reason = adapter.frozen_heads if adapter else None
        groups.append(
            UnitGroup(
                name, kind, len(units), not inexact, reason,
                tuple(
                    Slice(axes[number].tensor, axes[number].dim, torch.tensor([dict(places[u])[number] for u in units]))
                    for number, _ in signature
                ),
                tuple(
                    Tap(ids.consumers[number].module, torch.tensor([dict(consumed[u])[number] for u in units]))
                    for number, _ in taps
                ),
            )
        )  # fmt: skip
    return groups


def in_mlp_role(model: nn.Module, makers: list[str], taps: list[str]) -> bool:
    """Whether units are made and read by linear layers, or by 1x1 convolutions that stand for them."""
    layers = [model.get_submodule(name) for name in makers + taps]
    return all(isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)) for m in layers)


@dataclass
class MacsModel:
    """MACs and parameters as functions of the units kept, exact and without running the network.

    Attributes:
        macs_terms: Per operation its MACs and, per axis it depends on, {group: positions a unit} and all positions.
        params_terms: The same for parameters.
    """

    macs_terms: list[tuple[int, list[tuple[dict[str, int], int]]]]
    params_terms: list[tuple[int, list[tuple[dict[str, int], int]]]]

    def __init__(self, ids: IdTable, groups: list[UnitGroup], model: nn.Module):
        labels = ids.classes()
        unit_group: dict[int, str] = {}
        by_axis: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
        for group in groups:
            for part in group.slices:
                by_axis[part.tensor, part.dim].append((group.name, part.index.shape[1]))
        axis_units = {(a.tensor, a.dim): resolve(a.ids, labels) for a in ids.axes if a.tensor}
        for group in groups:
            for part in group.slices:
                units = axis_units.get((part.tensor, part.dim))
                if units is not None:
                    for unit in np.unique(units[part.index.numpy()]).tolist():
                        unit_group[unit] = group.name

        def share(axis: Tensor) -> tuple[dict[str, int], int]:
            units, counts = np.unique(resolve(axis, labels), return_counts=True)
            widths = {
                unit_group[u]: int(c) for u, c in zip(units.tolist(), counts.tolist(), strict=True) if u in unit_group
            }
            return widths, int(axis.numel())

        self.macs_terms = [(term.macs, [share(axis) for axis in term.axes]) for term in ids.macs]
        self.params_terms = []
        for name, parameter in model.named_parameters():
            axes = [
                (dict(by_axis[name, dim]), parameter.shape[dim])
                for dim in range(parameter.ndim)
                if (name, dim) in by_axis
            ]
            self.params_terms.append((parameter.numel(), axes))

    @staticmethod
    def evaluate(terms: list[tuple[int, list[tuple[dict[str, int], int]]]], removed: dict[str, int]) -> float:
        """Sum the terms when `removed` units of each group are gone."""
        total = 0.0
        for size, axes in terms:
            for widths, positions in axes:
                size = size * (1 - sum(width * removed.get(name, 0) for name, width in widths.items()) / positions)
            total += size
        return total

    def macs(self, removed: dict[str, int]) -> float:
        """MACs of one image when `removed` units of each group are gone."""
        return self.evaluate(self.macs_terms, removed)

    def params(self, removed: dict[str, int]) -> float:
        """Parameters when `removed` units of each group are gone."""
        return self.evaluate(self.params_terms, removed)
