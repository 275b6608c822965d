"""Elementwise operations tie the ids of their operands; reductions and pooling keep those of the other axes."""

from typing import Any

import torch
from torch import Tensor

from lfrns_hub.trace.ids import NONE, as_rows, collapse, distinct, varies
from lfrns_hub.trace.rules.registry import register_op

UNARY = (
    "neg abs exp log sqrt rsqrt reciprocal clamp clamp_min clamp_max floor square sin cos round ceil sign log1p expm1 "
    "nan_to_num empty_like zeros_like ones_like full_like fill zero isnan isinf isfinite logical_not "
    "bitwise_not tan atan exp2 log2 log10 frac trunc real imag angle conj conj_physical resolve_conj resolve_neg "
    "logit erfinv sgn deg2rad rad2deg positive signbit cosh sinh asinh acosh asin acos heaviside"
)
DRAWS = (
    "dropout feature_dropout native_dropout alpha_dropout feature_alpha_dropout bernoulli rand_like randn_like "
    "randint_like uniform normal exponential"
)
ACTIVATIONS = (
    "relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu mish softplus "
    "log_sigmoid erf rrelu threshold softsign hardshrink softshrink"
)
BINARY = (
    "add sub mul div maximum minimum rsub where addcmul addcdiv ge gt le lt eq ne logical_and logical_or bitwise_and "
    "multiply divide true_divide lerp masked_fill fmod remainder pow copy atan2 bitwise_or bitwise_xor logical_xor "
    "xlogy floor_divide subtract hypot copysign fmax fmin complex polar greater less greater_equal less_equal not_equal"
)


@register_op(*(f"aten.{name}" for name in UNARY.split()))
def unary(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Keep the ids: one tensor in, the same positions out."""
    return ids


@register_op(*(f"aten.{name}" for name in DRAWS.split()))
def draw(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Keep the ids; freeze units with random numbers: in eval mode a narrower network draws other ones."""
    off = argument(node, (ids, *args), kwargs, "train") is False
    if not trace.training and not off and any(varies(ids, dim) for dim in range(ids.ndim)):
        trace.ids.freeze(ids, trace.reason(node, "its forward draws a random number for each unit"))
    return ids


@register_op(*(f"aten.{name}" for name in ACTIVATIONS.split()))
def activation(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Keep the ids and mark them as activated: units after a nonlinearity may be neurons."""
    trace.ids.activated.append(distinct(ids))
    return ids


@register_op(*(f"aten.{name}" for name in BINARY.split()))
def binary(trace: Any, node: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Tie the operands: units at one position are removed together."""
    operands = [a for a in args if isinstance(a, Tensor)]
    result = operands[0] if operands else trace.none_like(node)
    for other in operands[1:]:
        result = tie_operands(trace, result, other)
    return result.expand(node.meta["val"].shape)


def tie_operands(trace: Any, one: Tensor, other: Tensor) -> Tensor:
    """Tie two operands under broadcasting; an operand broadcast over the units of the other is frozen instead."""
    shape = torch.broadcast_shapes(one.shape, other.shape)
    small_one, small_other = collapse(one, other)
    for small, full in ((small_one, small_other), (small_other, small_one)):
        spread = [d for d in range(small.ndim) if small.stride(d) == 0 and varies(full, d)]
        rest = [d for d in range(small.ndim) if d not in spread and varies(small, d)]
        per_unit = rest and all(varies(full, d) for d in rest)
        shared = trace.ids.of_tensors(small) and rest and max(spread, default=0) < min(rest)  # rotary embeddings
        if not spread or (per_unit and not shared):
            continue  # the same axes, or one value for all channels of a unit, such as a temperature of heads
        rows = as_rows(full, [d for d in range(full.ndim) if d not in spread])
        if not trace.ids.other_units(rows):
            continue  # copies of one axis, such as the parts of a channel
        trace.ids.freeze(small, "it is broadcast over the units of another layer")
        return full.expand(shape)
    if trace.ids.of_tensors(small_one):
        small_one, small_other = small_other, small_one
    fixed_size(trace, small_one, small_other)
    fixed_size(trace, small_other, small_one)
    trace.ids.tie(small_one, small_other)
    return torch.where(small_one != NONE, small_one, small_other).expand(shape)


def fixed_size(trace: Any, ids: Tensor, constant: Tensor) -> None:
    """Freeze units that are combined with a constant that has different values along their axis."""
    hole = (constant == NONE) & (ids != NONE)
    if not hole.any():
        return
    for dim in range(ids.ndim):
        own_positions = constant.shape[dim] > 1 and constant.stride(dim) != 0
        if own_positions and bool((ids.narrow(dim, 0, 1) != ids).any()):
            trace.ids.freeze(ids[hole], "it meets a constant of fixed size (a channel padding or a literal)")
            return


def argument(node: Any, args: Any, kwargs: Any, name: str, default: Any = None) -> Any:
    """Return an argument by its name in the operation's schema."""
    for place, known in enumerate(node.target._schema.arguments):
        if known.name == name:
            return args[place] if place < len(args) else kwargs.get(name, default)
    return default


@register_op(
    *(f"aten.{name}" for name in (
        "mean sum amax amin var std linalg_vector_norm norm max min argmax argmin logsumexp prod var_mean std_mean any "
        "all count_nonzero median"
    ).split())
)  # fmt: skip
def reduce(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Keep the units of the other axes; a reduction over several units is approximate, like a norm's mean."""
    if args and isinstance(args[0], Tensor):
        return binary(trace, node, ids, *args)  # max(x, y)
    dims = argument(node, (ids, *args), kwargs, "dim")
    dims = list(range(ids.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = sorted((d % ids.ndim for d in dims), reverse=True)
    rows = as_rows(ids, dims)
    picks = "arg" in str(node.target)  # an index among units changes when some are removed
    trace.ids.one_unit_per_row(rows, trace.reason(node, "its place among others is asked for") if picks else None)
    mixed = bool((rows != rows[:, :1]).any())
    for dim in dims:
        ids = ids.narrow(dim, 0, 1)
    value = node.meta["val"]
    many = isinstance(value, (tuple, list))
    shape = (value[0] if many else value).shape
    if mixed and not any(varies(ids, dim) for dim in range(ids.ndim)):
        ids = torch.full((), NONE).expand(ids.shape)  # a statistic of all units belongs to none of them
    if len(shape) != ids.ndim:
        for dim in dims:
            ids = ids.select(dim, 0)
    ids = ids.expand(shape)
    return [ids] * len(value) if many else ids


@register_op("aten.softmax", "aten._softmax", "aten.log_softmax", "aten.renorm")
def softmax(trace: Any, node: Any, ids: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
    """Keep the ids; several units on the softmax axis change each other, as in a norm."""
    trace.ids.one_unit_per_row(as_rows(ids, [dim]), None)
    return ids


@register_op("aten.sort", "aten.argsort", "aten.topk", "aten.kthvalue", "aten.msort", "aten.mode")
def order(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Keep units while positions are sorted; freeze units that are sorted: their places depend on each other."""
    dim = argument(node, (ids, *args), kwargs, "dim", 0 if "msort" in str(node.target) else -1)
    if varies(ids, dim):
        trace.ids.freeze(ids, trace.reason(node, "its place among others is asked for"))
        return trace.none_like(node)
    value = node.meta["val"]
    many = isinstance(value, (tuple, list))
    shape = (value[0] if many else value).shape
    first = ids.narrow(dim, 0, 1) if len(shape) == ids.ndim else ids.select(dim, 0)
    return [first.expand(shape)] * len(value) if many else first.expand(shape)


@register_op(
    *(f"aten.fft_{name}" for name in (
        "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn fftshift ifftshift hfft ihfft"
    ).split())
)  # fmt: skip
def transform(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Mix positions by a Fourier transform: units on other axes stay separate."""
    name = str(node.target).split(".")[1]
    dims = argument(node, (ids, *args), kwargs, "dim", [-2, -1] if name.endswith("2") else None)
    if dims is None:
        dims = range(ids.ndim) if name.endswith(("n", "shift")) else [-1]
    for dim in [dims] if isinstance(dims, int) else dims:
        if varies(ids, dim):
            trace.ids.freeze(ids, trace.reason(node, "a Fourier transform runs over its units"))
            return trace.none_like(node)
        ids = ids.narrow(dim, 0, 1)
    return ids.expand(node.meta["val"].shape)


@register_op("aten.glu")
def gated(trace: Any, node: Any, ids: Tensor, dim: int = -1) -> Tensor:
    """Gate the first half by the sigmoid of the second."""
    one, other = ids.chunk(2, dim)
    trace.ids.activated.append(distinct(other))
    return tie_operands(trace, one, other)


@register_op("aten.cumsum", "aten.cumprod")
def cumulate(trace: Any, node: Any, ids: Tensor, dim: int, **kwargs: Any) -> Tensor:
    """Keep units in a cumulative operation along positions; freeze them along units: each adds to the next."""
    if varies(ids, dim):
        trace.ids.freeze(ids, trace.reason(node, "each unit adds to the next"))
        return trace.none_like(node)
    return ids


@register_op(
    *(f"aten.{name}" for name in (
        "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d "
        "upsample_bicubic2d avg_pool1d max_pool1d adaptive_avg_pool1d avg_pool3d max_pool3d adaptive_avg_pool3d "
        "upsample_linear1d upsample_trilinear3d grid_sampler _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "upsample_nearest1d max_pool2d_with_indices lp_pool2d"
    ).split())
)  # fmt: skip
def pool(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Mix positions, never channels, by pooling or resizing."""
    value = node.meta["val"]
    many = isinstance(value, (tuple, list))
    shape = (value[0] if many else value).shape
    axes = 1 if "1d" in str(node.target) else 3 if "3d" in str(node.target) else 2
    first = ids[(..., *[slice(0, 1)] * axes)]
    if trace.ids.of_tensors(ids):
        trace.ids.tie(first.expand_as(ids), ids)  # a table of positions: each channel is one unit
    elif any(varies(ids, -1 - at) for at in range(axes)):
        trace.ids.freeze(ids, trace.reason(node, "units lie along its spatial axes"))
        return trace.none_like(node)
    ids = first.expand(shape)
    return [ids] * len(value) if many else ids
