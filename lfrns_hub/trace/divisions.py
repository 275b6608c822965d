"""Divisions: where a forward divides the channels itself, by a number in the graph that no attribute states.

The number may be a share of the width, as in `x[:, : x.shape[1] // 2]`: then the parts keep their proportion, and units
are removed together, some of each part. It may be fixed: then the part that it counts keeps its size, and the rest
may be cut. The graph does not show which; `self_check.settle` tests it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfrns_hub.trace.ids import as_rows, resolve, varies
from lfrns_hub.units import Slice, Tap, UnitGroup, Width

Unit = tuple[str, int]  # group name and place in the group
HELD = "its forward counts these channels itself, by a number that follows no width"


def note_division(trace: Any, ids: Tensor, dim: int, bounds: Sequence[Any]) -> None:
    """Record that a forward divides an axis of ids at some places; negative places count from the end."""
    length = ids.shape[dim]
    inside = {b + length if b < 0 else b for b in bounds if isinstance(b, int)}
    inside = sorted(b for b in inside if 0 < b < length)
    if inside and varies(ids, dim):
        row = as_rows(ids, [dim])[0]
        trace.ids.divisions.append([row[start:stop] for start, stop in pairwise([0, *inside, length])])


def note_split_axes(trace: Any, before: Tensor, after: Tensor) -> None:
    """Record the divisions of a view: an axis that becomes several is divided by all of them except the last."""
    old, new = 0, 0
    while old < before.ndim and new < after.ndim:
        first_old, first_new = old, new
        one, other = before.shape[old], after.shape[new]
        while one != other:
            if one < other:
                old += 1
                if old == before.ndim:
                    return
                one *= before.shape[old]
            else:
                new += 1
                if new == after.ndim:
                    return
                other *= after.shape[new]
        if old == first_old and new > first_new:
            length, count = before.shape[old], after.shape[first_new]
            note_division(trace, before, old, range(length // max(1, count), length, max(1, length // max(1, count))))
        old, new = old + 1, new + 1


def read_divisions(divisions: Sequence[Sequence[Tensor]], labels: np.ndarray, units: dict[int, Unit]) -> list[list]:
    """Return the divisions that separate units: the units of each part, in their order.

    Args:
        divisions: Ids of each part of each division.
        labels: Unit number of each id.
        units: Group and place of each unit number.
    """
    found: dict[tuple, None] = {}
    for parts in divisions:
        numbers = [dict.fromkeys(resolve(part, labels).tolist()) for part in parts]
        members = [tuple(units[number] for number in part if number in units) for part in numbers]
        members = [part for part in members if part]
        every = [unit for part in members for unit in part]
        if len(members) > 1 and len(set(every)) == len(every) and len(every) > len(members):
            found[tuple(members)] = None
    return [list(members) for members in found]


def clusters(groups: Sequence[UnitGroup], divisions: Sequence[list]) -> Iterator[list[list[Unit]]]:
    """Yield, for all groups linked by divisions, the units that every division puts into the same part.

    Clusters with a frozen or approximate group are left out: they cannot be tested.
    """
    by_name = {group.name: group for group in groups}
    links: list[tuple[set[str], list[list]]] = []
    for division in divisions:
        names, linked = {name for part in division for name, _ in part}, [division]
        for other in [link for link in links if link[0] & names]:
            links.remove(other)
            names, linked = names | other[0], other[1] + linked
        links.append((names, linked))
    for names, linked in links:
        some = [group for group in groups if group.name in names]
        if any(by_name[name].frozen_reason or not by_name[name].exact for name in names):
            continue
        places: dict[Unit, list[int]] = {(g.name, unit): [] for g in some for unit in range(g.size)}
        for division in linked:
            part_of = {unit: number for number, part in enumerate(division) for unit in part}
            for unit, place in places.items():
                place.append(part_of.get(unit, -1))
        parts: dict[tuple[int, ...], list[Unit]] = {}
        for unit, place in places.items():
            parts.setdefault(tuple(place), []).append(unit)
        yield list(parts.values())


def ways(groups: Sequence[UnitGroup], parts: Sequence[Sequence[Unit]]) -> Iterator[list[UnitGroup]]:
    """Yield alternatives to the groups of a cluster: parts in proportion; or one part free, the others fixed."""
    count = math.gcd(*(len(part) for part in parts))
    if count > 1:
        shares = [len(part) // count for part in parts]
        together = [
            [u for part, n in zip(parts, shares, strict=True) for u in part[i * n : i * n + n]] for i in range(count)
        ]
        alike = {tuple(sorted(name for name, _ in unit)) for unit in together}
        if len(alike) == 1 and len(together[0]) > 1:
            yield [regrouped(groups, together, groups[0].name)]
    for free in sorted(parts, key=len, reverse=True):
        if len(free) == 1:
            continue
        rest = []
        for group in groups:
            held = [[(group.name, unit)] for unit in range(group.size) if (group.name, unit) not in set(free)]
            name = group.name if len(held) == group.size else f"{group.name}#held"
            rest += [replace(regrouped([group], held, name), frozen_reason=HELD)] if held else []
        names = {name for name, _ in free}
        mine = [group for group in groups if group.name in names]
        if len(mine) == 1:
            yield [regrouped(mine, [[unit] for unit in free], mine[0].name), *rest]


def regrouped(groups: Sequence[UnitGroup], members: Sequence[Sequence[Unit]], name: str) -> UnitGroup:
    """Return a group whose units each consist of units of some groups, the same number of each in every unit."""
    slices: dict[tuple[str, int], list[Tensor]] = {}
    taps: dict[str, list[Tensor]] = {}
    stated: dict[tuple[str, str, int | None], int] = {}
    for group in groups:
        units = torch.tensor([[unit for of, unit in member if of == group.name] for member in members])  # [U, some]
        if not units.numel():
            continue
        for part in group.slices:
            slices.setdefault((part.tensor, part.dim), []).append(part.index[units].flatten(1))
        for tap in group.taps:
            taps.setdefault(tap.module, []).append(tap.index[units].flatten(1))
        for width in group.widths:
            key = width.module, width.attribute, width.entry
            stated[key] = stated.get(key, 0) + width.per_unit * units.shape[1]
    kinds = {group.kind for group in groups}
    return UnitGroup(
        name,
        kinds.pop() if len(kinds) == 1 else "channel",
        len(members),
        slices=tuple(Slice(*key, torch.cat(index, 1)) for key, index in slices.items()),
        taps=tuple(Tap(module, torch.cat(index, 1)) for module, index in taps.items()),
        widths=tuple(Width(*key, per_unit) for key, per_unit in stated.items()),
        caches=groups[0].caches,
    )
