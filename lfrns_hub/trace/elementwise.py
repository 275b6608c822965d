"""Elementwise operations tie the ids of their operands; reductions and pooling keep those of the other axes."""

from typing import Any

import torch
from torch import Tensor

from lfrns_hub.trace.ids import NONE, as_rows, collapse
from lfrns_hub.trace.rules import register_op

UNARY = (
    "neg abs exp log sqrt rsqrt pow reciprocal clamp clamp_min clamp_max dropout feature_dropout native_dropout floor"
)
ACTIVATIONS = (
    "relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu mish softplus "
    "log_sigmoid erf"
)
BINARY = "add sub mul div maximum minimum rsub where addcmul ge gt le lt eq ne logical_and bitwise_and"


@register_op(*(f"aten.{name}" for name in UNARY.split()))
def unary(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """One tensor in, the same positions out."""
    return ids


@register_op(*(f"aten.{name}" for name in ACTIVATIONS.split()))
def activation(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A nonlinearity: what passes it may be a neuron."""
    trace.ids.activated.append(torch.unique(ids))
    return ids


@register_op(*(f"aten.{name}" for name in BINARY.split()))
def binary(trace: Any, node: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Operands of one position leave together."""
    operands = [a for a in args if isinstance(a, Tensor)]
    result = operands[0] if operands else trace.none_like(node)
    for other in operands[1:]:
        result = tie_operands(trace, result, other)
    return result.expand(node.meta["val"].shape)


def tie_operands(trace: Any, one: Tensor, other: Tensor) -> Tensor:
    """Tie two operands under broadcasting; one that is broadcast over other units is frozen instead."""
    shape = torch.broadcast_shapes(one.shape, other.shape)
    small_one, small_other = collapse(one, other)
    for small, full in ((small_one, small_other), (small_other, small_one)):
        spread = [d for d in range(small.ndim) if small.stride(d) == 0 and full.shape[d] > 1]
        if spread and (full != NONE).any():
            rest = [d for d in range(small.ndim) if d not in spread]
            rows = as_rows(full, rest) if rest else full.reshape(-1, 1).unique(dim=0)
            if len(rows) > 1 and not trace.ids.tie_rows(rows)[1]:
                trace.ids.freeze(small, "it is broadcast over the units of another layer")
                return full.expand(shape)
    tensors = [*trace.ids.from_tensor, False]  # the block of NONE, -1, reads the last
    if bool((small_one == NONE).all()) or all(tensors[b] for b in trace.ids.blocks(small_one).unique().tolist()):
        small_one, small_other = small_other, small_one
    fixed_size(trace, small_one, small_other)
    fixed_size(trace, small_other, small_one)
    trace.ids.tie(small_one, small_other)
    return torch.where(small_one != NONE, small_one, small_other).expand(shape)


def fixed_size(trace: Any, ids: Tensor, constant: Tensor) -> None:
    """Freeze units that meet a constant which has positions of its own for each of them."""
    hole = (constant == NONE) & (ids != NONE)
    if not hole.any():
        return
    for dim in range(ids.ndim):
        own_positions = constant.shape[dim] > 1 and constant.stride(dim) != 0
        if own_positions and bool((ids.narrow(dim, 0, 1) != ids).any()):
            trace.ids.freeze(ids[hole], "it meets a constant of fixed size (a channel padding or a literal)")
            return


@register_op("aten.mean", "aten.sum", "aten.amax", "aten.var", "aten.amin")
def reduce(trace: Any, node: Any, ids: Tensor, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    """A reduction keeps units of the other axes; one over several units freezes them."""
    dims = (
        list(range(ids.ndim))
        if dims is None or isinstance(dims, torch.dtype)
        else [dims]
        if isinstance(dims, int)
        else dims
    )
    dims = sorted((d % ids.ndim for d in dims), reverse=True)
    rows = as_rows(ids, dims)
    trace.ids.one_unit_per_row(rows, trace.reason(node, "it is reduced over"))
    for dim in dims:
        ids = ids.narrow(dim, 0, 1) if keepdim else ids.select(dim, 0)
    return ids


@register_op("aten.softmax", "aten._softmax", "aten.log_softmax")
def softmax(trace: Any, node: Any, ids: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
    """Softmax mixes one axis: units on it would change each other."""
    trace.ids.one_unit_per_row(as_rows(ids, [dim]), trace.reason(node, "it passes a softmax over units"))
    return ids


@register_op(
    "aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten.adaptive_max_pool2d",
    "aten.upsample_nearest2d", "aten.upsample_bilinear2d", "aten.upsample_bicubic2d",
)  # fmt: skip
def pool(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Pooling and resizing mix positions, never channels."""
    shape = node.meta["val"].shape
    lead = ids.shape[: ids.ndim - 2]
    spatial = as_rows(ids, [-2, -1])
    trace.ids.one_unit_per_row(spatial, trace.reason(node, "units lie along its spatial axes"))
    return ids[..., :1, :1].expand(*lead, *shape[-2:])
