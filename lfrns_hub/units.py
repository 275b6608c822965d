"""Data only: what is removed together (`UnitGroup`) and what stays (`SlimPlan`)."""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lfrns_hub.format.untrusted import parse_json, short


@dataclass(frozen=True)
class Slice:
    """One axis of a parameter or buffer on which units of a group lie.

    Attributes:
        tensor: Name of the parameter or buffer, as in the state_dict or `named_buffers`.
        dim: The axis.
        index: Positions of each unit along the axis, [U, width], int64.
    """

    tensor: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Tap:
    """The input of a consumer where units are read.

    Attributes:
        module: Name of the consumer, an `nn.Linear` or a convolution.
        index: Positions of each unit in the consumer's input channels, [U, width], int64.
    """

    module: str
    index: Tensor


@dataclass(frozen=True)
class Width:
    """An int attribute of a module, or one entry of a tuple, that states a width and shrinks with the group.

    Attributes:
        module: Name of the module.
        attribute: Name of the attribute.
        entry: Which entry of a tuple or list, or None for an int.
        per_unit: By how much it shrinks for each removed unit.
    """

    module: str
    attribute: str
    entry: int | None
    per_unit: int


@dataclass(frozen=True)
class Cache:
    """An attribute in which a forward keeps what it computed, in addition to parameters and buffers.

    Attributes:
        module: Name of the module.
        attribute: Name of the attribute.
        value: Its value before the first forward.
        absent: Whether the attribute does not exist before the first forward.
    """

    module: str
    attribute: str
    value: Any = None
    absent: bool = False


@dataclass(frozen=True)
class UnitGroup:
    """All units of one place in the network, with every slice that must go with each of them.

    Attributes:
        name: Name of the module that makes the units.
        kind: "channel", "head" or "neuron".
        size: Number of units.
        exact: Whether removing a unit equals zeroing it at its taps (False across LayerNorm and the like).
        frozen_reason: Why it is never cut, or None.
        slices: The parameter slices of the units.
        taps: Where the units are read.
        widths: Attributes that state the number of units, in addition to those of the layers themselves.
        caches: Attributes that a narrower copy starts without; the model's forward fills them again.
    """

    name: str
    kind: str
    size: int
    exact: bool = True
    frozen_reason: str | None = None
    slices: tuple[Slice, ...] = ()
    taps: tuple[Tap, ...] = ()
    widths: tuple[Width, ...] = ()
    caches: tuple[Cache, ...] = ()


def forget(model: nn.Module, caches: Iterable[Cache]) -> nn.Module:
    """Reset, in place, the attributes that a model's forwards have filled, and return the model.

    A copy with other weights or fewer units would otherwise use values computed from the old ones.
    """
    for cache in {(cache.module, cache.attribute): cache for cache in caches}.values():
        held = vars(model.get_submodule(cache.module))
        if cache.absent:
            held.pop(cache.attribute, None)
        else:
            held[cache.attribute] = copy.deepcopy(cache.value)
    return model


@dataclass
class SlimPlan:
    """Units that stay.

    Attributes:
        keep: Group name to the ascending indices of the units that stay. A group that is not named keeps all.

    Example:
        >>> SlimPlan.from_json(SlimPlan({"fc1": [0, 2]}).to_json()).keep
        {'fc1': [0, 2]}
    """

    keep: dict[str, list[int]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps({"keep": self.keep})

    @classmethod
    def from_json(cls, text: str) -> "SlimPlan":
        """Read a plan from JSON text.

        Raises:
            ValueError: The text is not a plan.
        """
        call = f"SlimPlan.from_json({text[:60]!r})"
        keep = parse_json(text, call).get("keep")
        if not isinstance(keep, dict) or not all(
            isinstance(kept, list) and all(type(i) is int for i in kept) for kept in keep.values()
        ):
            raise ValueError(f'{call}: a plan reads {{"keep": {{group: [indices]}}}}. Write it by SlimPlan.to_json.')
        return cls(keep)

    def kept(self, group: UnitGroup) -> list[int]:
        """Return the ascending indices of a group's units that stay.

        Raises:
            ValueError: The plan's indices do not fit the group.
        """
        kept = self.keep.get(group.name)
        if kept is None:
            return list(range(group.size))
        if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= group.size:
            raise ValueError(
                f"SlimPlan.keep[{group.name!r}]={short(kept)}: indices must ascend within [0, {group.size}) and one "
                "must stay. List the groups by find_units."
            )
        return list(kept)

    def removed(self, group: UnitGroup) -> list[int]:
        """Return the ascending indices of a group's removed units."""
        kept = set(self.kept(group))
        return [i for i in range(group.size) if i not in kept]


def frozen_with(groups: Sequence[UnitGroup], reasons: dict[str, str]) -> list[UnitGroup]:
    """Return the groups, with those that have a reason here frozen."""
    return [replace(group, frozen_reason=reasons.get(group.name, group.frozen_reason)) for group in groups]
