"""Data movement runs on the ids themselves, so it is exact by construction."""

from typing import Any

import torch
from torch import Tensor

from lfrns_hub.trace.ids import NONE
from lfrns_hub.trace.rules import register_op


@register_op(
    *(
        f"aten.{name}"
        for name in (
            "view reshape _unsafe_view permute transpose t flatten unflatten squeeze unsqueeze expand slice select "
            "narrow cat stack split split_with_sizes chunk unbind roll flip pixel_shuffle pixel_unshuffle repeat "
            "channel_shuffle movedim alias detach swapaxes expand_as view_as tile unfold"
        ).split()
    )
)
def move(trace: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the operation on the ids."""
    return node.target(*args, **kwargs)


@register_op("aten.contiguous", "aten.clone", "aten.to", "aten._to_copy", "aten.type_as", "aten.lift_fresh_copy")
def same(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A copy of the same values."""
    return ids


@register_op("aten.pad", "aten.constant_pad_nd")
def pad(trace: Any, node: Any, ids: Tensor, amounts: list[int], *args: Any, **kwargs: Any) -> Tensor:
    """Padding: on an axis without units it keeps the ids, among units it adds positions of no unit."""
    shape = node.meta["val"].shape
    for at in range(0, len(amounts), 2):
        dim, before, after = ids.ndim - 1 - at // 2, amounts[at], amounts[at + 1]
        if before == after == 0:
            continue
        first = ids.narrow(dim, 0, 1)
        if ids.stride(dim) == 0 or ids.shape[dim] == 1 or bool((ids == first).all()):
            sizes = list(ids.shape)
            sizes[dim] = shape[dim]
            ids = first.expand(sizes)
        else:
            shift = [0] * at + [before, after]
            ids = torch.nn.functional.pad(ids, shift, value=NONE)
    return ids


@register_op("aten.arange", "aten.full", "aten.zeros", "aten.ones", "aten.scalar_tensor", "aten.new_full")
def constant(trace: Any, node: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A constant of fixed size belongs to no unit."""
    return trace.none_like(node)
