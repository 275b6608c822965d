"""Data movement runs on the ids themselves, so it is exact by construction."""

from typing import Any

import torch
from torch import Tensor

from lfrns_hub.trace.ids import NONE, collapse
from lfrns_hub.trace.rules import register_op
from lfrns_hub.trace.widths import note_parts, note_sizes, note_slice

MOVES = (
    "permute transpose t squeeze unsqueeze select narrow cat unbind roll flip pixel_shuffle pixel_unshuffle "
    "repeat channel_shuffle movedim alias detach swapaxes expand_as view_as reshape_as tile unfold swapdims moveaxis "
    "rot90 repeat_interleave diagonal hstack vstack atleast_2d broadcast_to numpy_T mT column_stack concat concatenate"
)


@register_op(*(f"aten.{name}" for name in MOVES.split()))
def move(trace: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the operation on the ids."""
    return node.target(*args, **kwargs)


@register_op(*(f"aten.{name}" for name in "view reshape _unsafe_view expand flatten unflatten _reshape_alias".split()))
def resize(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A view: its sizes may state how many units there are."""
    known = str(node.target).split(".")[1] in ("expand", "flatten", "unflatten")
    moved = node.target(ids, *args, **kwargs) if known else ids.reshape(args[0])  # ids lie otherwise than values
    note_sizes(trace, node, moved)
    return moved


@register_op("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")
def split(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A split: its sizes may state how many units there are; equal parts stay equal."""
    parts = node.target(ids, *args, **kwargs)
    note_parts(trace, node, parts)
    if isinstance(args[0], int):
        for part in parts[1:]:
            if part.shape == parts[0].shape:
                trace.ids.tie(*collapse(parts[0], part))
    return parts


@register_op("aten.stack")
def stack(trace: Any, node: Any, parts: list[Tensor], *args: Any) -> Tensor:
    """A stack: its parts are of one size, and stay so."""
    for part in parts[1:]:
        trace.ids.tie(*collapse(parts[0], part))
    return node.target(parts, *args)


@register_op("aten.slice")
def cut_out(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A slice: its ends may state how many units there are."""
    note_slice(trace, node, ids)
    return node.target(ids, *args, **kwargs)


@register_op(
    *(f"aten.{name}" for name in "contiguous clone to _to_copy type_as lift_fresh_copy float half bfloat16".split())
)
def same(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A copy of the same values."""
    return ids


@register_op("aten._assert_tensor_metadata", "aten._assert_async", "aten.sym_size", "aten._assert_scalar")
def nothing(trace: Any, node: Any, *args: Any, **kwargs: Any) -> None:
    """A check that computes nothing."""


@register_op("aten.pad", "aten.constant_pad_nd", "aten.reflection_pad2d", "aten.replication_pad2d")
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


@register_op("aten.index")
def index(trace: Any, node: Any, ids: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Indexing by a table of positions: units on the indexed axes are tied or frozen, those on others stay."""
    at = [d for d, where in enumerate(indices) if where is not None]
    indexed = (
        torch.unique(
            ids.movedim(at, list(range(len(at)))).reshape(-1, *[ids.shape[d] for d in range(ids.ndim) if d not in at]),
            dim=0,
        )
        if len(at) < ids.ndim
        else ids.reshape(-1)
    )
    first = indexed[0]
    for other in indexed[1:]:
        trace.ids.tie(first, other)
    shape = node.meta["val"].shape
    adjacent = at == list(range(at[0], at[-1] + 1))
    lead = at[0] if adjacent else 0
    width = len(shape) - (ids.ndim - len(at))
    view = [*first.shape[:lead], *[1] * width, *first.shape[lead:]]
    return first.reshape(view).expand(shape)


@register_op(
    *(f"aten.{name}" for name in (
        "arange full zeros ones scalar_tensor new_full new_zeros new_ones linspace eye meshgrid zeros_like ones_like "
        "full_like empty rand randn tensor"
    ).split())
)  # fmt: skip
def constant(trace: Any, node: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A constant of fixed size belongs to no unit."""
    return trace.none_like(node)
