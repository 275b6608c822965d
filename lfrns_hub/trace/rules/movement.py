"""Data movement, run on the ids themselves and so exact by construction."""

import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lfrns_hub.trace.divisions import note_division, note_split_axes
from lfrns_hub.trace.ids import NONE, as_rows, collapse, varies
from lfrns_hub.trace.rules.elementwise import tie_operands
from lfrns_hub.trace.rules.registry import register_op
from lfrns_hub.trace.widths import note_parts, note_sizes, note_slice

MOVES = (
    "permute transpose t squeeze unsqueeze select narrow unbind flip pixel_shuffle pixel_unshuffle "
    "repeat channel_shuffle movedim alias detach swapaxes expand_as view_as reshape_as tile unfold swapdims moveaxis "
    "rot90 repeat_interleave diagonal hstack vstack atleast_2d broadcast_to numpy_T mT column_stack"
)


@register_op(*(f"aten.{name}" for name in MOVES.split()))
def move(trace: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the operation on the ids."""
    return node.target(*args, **kwargs)


@register_op(*(f"aten.{name}" for name in "view reshape _unsafe_view expand flatten unflatten _reshape_alias".split()))
def resize(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Reshape the ids; the sizes of a view may state the number of units."""
    known = str(node.target).split(".")[1] in ("expand", "flatten", "unflatten")
    moved = node.target(ids, *args, **kwargs) if known else ids.reshape(args[0])  # ids have other strides than values
    note_sizes(trace, node, moved)
    note_split_axes(trace, ids, moved)
    return moved


@register_op("aten.roll")
def roll(trace: Any, node: Any, ids: Tensor, shifts: Any, dims: Any = (), **kwargs: Any) -> Tensor:
    """Roll the ids; a roll along units divides them at its shift."""
    for shift, dim in zip(*([v] if isinstance(v, int) else v for v in (shifts, dims)), strict=False):
        note_division(trace, ids, dim, [-shift])
    return node.target(ids, shifts, dims)


@register_op("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")
def split(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Split the ids; the sizes may state the number of units; equal parts stay equal."""
    parts = node.target(ids, *args, **kwargs)
    note_parts(trace, node, parts)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    note_division(trace, ids, dim, list(accumulate(part.shape[dim] for part in parts[:-1])))
    if isinstance(args[0], int):
        for part in parts[1:]:
            if part.shape == parts[0].shape:
                trace.ids.tie(*collapse(parts[0], part))
    return parts


@register_op("aten.cat", "aten.concat", "aten.concatenate")
def join(trace: Any, node: Any, parts: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenate ids; units on the other axes are tied; a parameter without elements has no ids."""
    joined = node.target(parts, dim)
    plain = next((part for part in parts if not varies(part, dim) and not trace.ids.of_tensors(part)), None)
    for part in parts if plain is not None else ():
        if part.ndim == plain.ndim and (not varies(part, dim) or trace.ids.of_tensors(part)):
            trace.ids.tie(plain.narrow(dim, 0, 1).expand_as(part), part)
    for part in node.args[0]:
        shape, source = part.meta["val"].shape, part
        while not trace.tensor_name(source) and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        name = trace.tensor_name(source)
        own = trace.shape_of(name)
        if shape.numel() or math.prod(own) or len(shape) != joined.ndim or shape[-len(own) :] != own[-len(shape) :]:
            continue
        for back in range(1, len(own) + 1):
            if own[-back] and joined.ndim - back != dim % joined.ndim and varies(joined, -back):
                trace.ids.axis(name, len(own) - back, trace.ids.tie_rows(as_rows(joined, [-back]))[0])
    return joined


@register_op("aten.stack")
def stack(trace: Any, node: Any, parts: list[Tensor], *args: Any) -> Tensor:
    """Stack ids; the parts have one size and are tied to keep it."""
    for part in parts[1:]:
        trace.ids.tie(*collapse(parts[0], part))
    return node.target(parts, *args)


@register_op("aten.slice")
def cut_out(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Slice the ids; the ends may state the number of units."""
    note_slice(trace, node, ids)
    dim, *ends = (*args, 0, 0)[:1] if not args else args[:3]
    note_division(trace, ids, dim, ends)
    return node.target(ids, *args, **kwargs)


@register_op(
    *(f"aten.{name}" for name in "contiguous clone to _to_copy type_as lift_fresh_copy float half bfloat16".split())
)
def same(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Keep the ids: a copy of the same values."""
    return ids


@register_op("aten._assert_tensor_metadata", "aten._assert_async", "aten.sym_size", "aten._assert_scalar")
def nothing(trace: Any, node: Any, *args: Any, **kwargs: Any) -> None:
    """Return nothing: a check that computes no value."""


@register_op("aten.pad", "aten.constant_pad_nd", "aten.reflection_pad2d", "aten.replication_pad2d")
def pad(trace: Any, node: Any, ids: Tensor, amounts: list[int], *args: Any, **kwargs: Any) -> Tensor:
    """Pad the ids: on an axis without units keep them, among units add positions of no unit."""
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


@register_op("aten.index", "aten._unsafe_index")
def index(trace: Any, node: Any, ids: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Index by a table of places: units on the indexed axes are frozen, units on others stay."""
    at = [d for d, where in enumerate(indices) if where is not None]
    first = any_of(trace, node, ids.movedim(at, list(range(len(at)))).flatten(0, len(at) - 1))
    shape = node.meta["val"].shape
    adjacent = at == list(range(at[0], at[-1] + 1))
    lead = at[0] if adjacent else 0
    width = len(shape) - (ids.ndim - len(at))
    view = [*first.shape[:lead], *[1] * width, *first.shape[lead:]]
    return first.reshape(view).expand(shape)


@register_op("aten.index_select", "aten.gather")
def pick(trace: Any, node: Any, ids: Tensor, dim: int, places: Tensor, **kwargs: Any) -> Tensor:
    """Pick places along one axis: units on it are frozen, units on others stay."""
    ids = any_of(trace, node, ids.movedim(dim, 0)).unsqueeze(dim)
    shape = node.meta["val"].shape
    for other, size in enumerate(shape):
        if size < ids.shape[other]:
            ids = ids.narrow(other, 0, size)
    return ids.expand(shape)


def any_of(trace: Any, node: Any, ids: Tensor) -> Tensor:
    """Return the ids of any one place along the first axis; tokens are tied, units of one producer frozen."""
    rows = torch.unique(ids.reshape(len(ids), -1), dim=0)
    if trace.ids.other_units(rows):
        trace.ids.freeze(rows, trace.reason(node, "its units are picked by a table of their places"))
    for row in rows[1:]:
        trace.ids.tie(rows[0], row)
    return rows.max(0).values.view(ids.shape[1:])


@register_op("aten.embedding")
def look_up(trace: Any, node: Any, table: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Look up a row of a table for each number: all rows have the same columns."""
    trace.ids.tie(table[:1].expand_as(table), table)
    return table[0].expand(node.meta["val"].shape)


@register_op("aten.slice_scatter", "aten.select_scatter")
def write(trace: Any, node: Any, ids: Tensor, part: Tensor, dim: int = 0, *args: Any, **kwargs: Any) -> Tensor:
    """Write to some positions of a tensor: if only positions are written, units stay in place."""
    last = dim % ids.ndim
    spread = part if part.ndim == ids.ndim else part.unsqueeze(last)
    if not varies(ids, last) and not varies(spread, last):
        return tie_operands(trace, ids.narrow(last, 0, 1), spread.narrow(last, 0, 1)).expand(ids.shape)
    return node.target(ids, part, dim, *args, **kwargs)


@register_op("aten.index_put")
def put(trace: Any, node: Any, ids: Tensor, indices: list[Tensor | None], values: Tensor, *args: Any) -> Tensor:
    """Write to picked positions: for a constant, by a mask or on axes without units, every unit stays in place."""
    masks = [n is not None and n.meta["val"].dtype == torch.bool for n in node.args[1]]
    picked = [d for d, where in enumerate(indices) if where is not None]
    if not bool((values != NONE).any()):
        if masks == [True]:
            mask = indices[0]
            return tie_operands(trace, ids, mask.view(*mask.shape, *[1] * (ids.ndim - mask.ndim)))
        if not any(masks) and not any(varies(ids, dim) for dim in picked):
            return ids
    for part in (ids, values):
        trace.ids.freeze(part.flatten(), trace.reason(node, "a table says where it is written"))
    return trace.none_like(node)


@register_op("aten.view_as_complex", "aten.view_as_complex_copy")
def paired(trace: Any, node: Any, ids: Tensor) -> Tensor:
    """Tie real and imaginary parts, which lie next to each other on the last axis."""
    trace.ids.tie(ids[..., 0], ids[..., 1])
    return ids[..., 0]


@register_op("aten.view_as_real", "aten.view_as_real_copy")
def parted(trace: Any, node: Any, ids: Tensor) -> Tensor:
    """Repeat the ids for real and imaginary parts on a new last axis."""
    return ids[..., None].expand(node.meta["val"].shape)


@register_op("aten.im2col")
def unfold(trace: Any, node: Any, ids: Tensor, kernel: list[int], *args: Any) -> Tensor:
    """Unfold an image into windows: each channel's values of a window are adjacent."""
    if varies(ids, -1) or varies(ids, -2):
        trace.ids.freeze(ids, trace.reason(node, "units lie along its spatial axes"))
        return trace.none_like(node)
    columns = ids[..., 0, 0].repeat_interleave(math.prod(kernel), -1)
    return columns[..., None].expand(node.meta["val"].shape)


@register_op("aten.col2im")
def fold(trace: Any, node: Any, ids: Tensor, size: list[int], kernel: list[int], *args: Any) -> Tensor:
    """Sum windows into an image: a channel's values of a window are tied."""
    if varies(ids, -1):
        trace.ids.freeze(ids, trace.reason(node, "units lie along its windows"))
        return trace.none_like(node)
    columns = ids[..., 0].unflatten(-1, (-1, math.prod(kernel)))
    trace.ids.tie(columns[..., :1].expand_as(columns), columns)
    return columns[..., :1, None].expand(node.meta["val"].shape)


@register_op("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def recurrent(trace: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
    """Freeze the inputs and outputs of a recurrent layer."""
    for ids in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(ids, Tensor):
            trace.ids.freeze(ids.flatten(), trace.reason(node, "a recurrent layer reads it"))
    return trace.none_like(node)


@register_op(
    *(f"aten.{name}" for name in (
        "arange full zeros ones scalar_tensor new_full new_zeros new_ones new_empty linspace logspace eye meshgrid "
        "empty rand randn randint randperm tensor tril_indices triu_indices hann_window empty_strided "
        "new_empty_strided empty_permuted one_hot"
    ).split())
)  # fmt: skip
def constant(trace: Any, node: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return ids of no unit for a constant of fixed size."""
    return trace.none_like(node)
