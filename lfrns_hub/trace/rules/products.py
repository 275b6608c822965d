"""Products of activations: all forms of attention. Heads lie on leading axes, channels on the last two."""

import math
import string
from typing import Any

import torch
from torch import Tensor

from lfrns_hub.trace.ids import NONE, MacsTerm, as_rows, varies
from lfrns_hub.trace.rules.elementwise import tie_operands
from lfrns_hub.trace.rules.registry import register_op


@register_op("aten.scaled_dot_product_attention")
def attention(
    trace: Any, node: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Tie a head's query, key and value; heads are independent of each other."""
    shape = node.meta["val"].shape
    if query.ndim > 3 and key.shape[-3] != query.shape[-3]:  # grouped queries: each key serves several of them
        times = query.shape[-3] // key.shape[-3]
        key, value = (ids.repeat_interleave(times, -3) for ids in (key, value))
    operands = [query, key, value]
    macs = math.prod(shape) * key.shape[-2] + math.prod(query.shape) * key.shape[-2]
    if not has_heads(operands):
        rows, columns = (ids[..., :1, :].reshape(-1, ids.shape[-1])[:1] for ids in (query, key))
        trace.ids.tie(rows, columns)
        trace.ids.freeze(torch.cat([rows, columns]), trace.reason(node, "the attention's scale is that of its width"))
        trace.ids.macs.append(MacsTerm(macs, ()))
        return value[..., :1, :].expand(shape)
    if mask is not None and bool((mask != NONE).any()):
        operands.append(mask.expand(*query.shape[:-2], *mask.shape[-2:]))
    per_head = tie_heads(trace, node, operands)
    trace.ids.macs.append(MacsTerm(macs, (per_head.flatten(),)))
    return per_head[..., None, None].expand(shape)


@register_op("aten.matmul", "aten.bmm")
def matmul(trace: Any, node: Any, one: Tensor, other: Tensor) -> Tensor:
    """Multiply matrices: heads on leading axes stay separate, contracted channels are tied, others go to the result."""
    return product(trace, node, one, other, node.meta["val"].shape)


@register_op("aten.baddbmm")
def add_product(trace: Any, node: Any, base: Tensor, one: Tensor, other: Tensor, **kwargs: Any) -> Tensor:
    """Add to a matrix product."""
    return tie_operands(trace, base, product(trace, node, one, other, node.meta["val"].shape))


def product(trace: Any, node: Any, one: Tensor, other: Tensor, shape: Any) -> Tensor:
    """Return the ids of `one @ other`, for operands [..., N, K] and [..., K, M]."""
    if one.ndim < 2 or other.ndim < 2:
        return refuse(trace, node, one, other, "a product with a vector")
    lead = torch.broadcast_shapes(one.shape[:-2], other.shape[:-2])
    one, other = one.expand(*lead, *one.shape[-2:]), other.expand(*lead, *other.shape[-2:])
    macs = math.prod(shape) * one.shape[-1]
    if has_heads([one, other]):
        per_head = tie_heads(trace, node, [one, other])
        trace.ids.macs.append(MacsTerm(macs, (per_head.flatten(),)))
        return per_head[..., None, None].expand(shape)
    rows, left = varies(one, -2), varies(one, -1)
    right, columns = varies(other, -2), varies(other, -1)
    if (rows and left) or (right and columns) or (rows and columns):
        trace.ids.macs.append(MacsTerm(macs, ()))
        parameter = trace.ids.of_tensors(one) or trace.ids.of_tensors(other)
        why = (
            "a parameter of no layer contracts it" if parameter else "each of its units is multiplied with every other"
        )
        return refuse(trace, node, one, other, why)
    if left and right:
        tie_operands(trace, one[..., :1, :].transpose(-1, -2), other[..., :1])
    elif left or right:
        trace.ids.macs.append(MacsTerm(macs, ()))
        return refuse(trace, node, *((one,) if left else (other,)), "it is contracted with a constant of fixed size")
    result = one[..., :1] if rows else other[..., :1, :] if columns else torch.full((1,) * len(shape), NONE)
    width = shape[-2] if rows else shape[-1] if columns else 0
    trace.ids.macs.append(MacsTerm(macs, (result.reshape(-1)[:width],) if width else ()))
    return result.expand(shape)


def refuse(trace: Any, node: Any, *parts: Any) -> Tensor:
    """Freeze operands that a rule cannot follow."""
    *operands, why = parts
    trace.ids.freeze(torch.cat([ids.flatten() for ids in operands]), trace.reason(node, why))
    return trace.none_like(node)


def has_heads(operands: list[Tensor]) -> bool:
    """Return whether units lie on a leading axis."""
    return any(varies(ids, dim) for ids in operands for dim in range(ids.ndim - 2))


def tie_heads(trace: Any, node: Any, operands: list[Tensor]) -> Tensor:
    """Tie all ids of each leading index of operands [..., rows, columns].

    An operand that all heads share, such as keys and values of multi-query attention, is frozen.

    Returns:
        One id per leading index, [...].
    """
    own, shared = [], []
    for ids in operands:
        (own if any(varies(ids, dim) for dim in range(ids.ndim - 2)) else shared).append(ids)
    for ids in shared:
        trace.ids.freeze(ids.reshape(-1), trace.reason(node, "all heads share it"))
    lead = own[0].shape[:-2]
    still = [all(not varies(ids, dim) for ids in own) for dim in range(len(lead))]
    small = [ids[tuple(slice(0, 1) if s else slice(None) for s in still)] for ids in own]
    heads = torch.cat([as_batches(ids) for ids in small], 1)  # [heads, ids]
    for row in torch.unique(heads, dim=0):
        trace.ids.tie_all(row)
    trace.ids.heads.append(torch.unique(heads))
    per_head = heads.max(1).values
    return per_head.reshape([1 if s else n for s, n in zip(still, lead, strict=True)]).expand(lead)


def as_batches(ids: Tensor) -> Tensor:
    """Return the ids of each leading index, [product of leading axes, ids]; axes without units once."""
    for dim in (-2, -1):
        if not varies(ids, dim):
            ids = ids.narrow(dim, 0, 1)
    return ids.reshape(-1, ids.shape[-2] * ids.shape[-1])


@register_op("aten.einsum")
def einsum(trace: Any, node: Any, equation: str, operands: list[Tensor], **kwargs: Any) -> Tensor:
    """Run two operands as a matrix product of shared, own and contracted axes; one operand as sum and transposition."""
    shape = node.meta["val"].shape
    spelled = spell(equation, [ids.ndim for ids in operands])
    if spelled is None or len(operands) > 2:
        return refuse(trace, node, *operands, "an einsum of this form")
    (terms, result), operands = spelled, list(operands)
    size = {c: n for term, ids in zip(terms, operands, strict=True) for c, n in zip(term, ids.shape, strict=True)}
    for place, term in enumerate(terms):  # an axis of only one operand is summed first
        others = result + "".join(terms[:place] + terms[place + 1 :])
        for axis in [c for c in term if c not in others]:
            rows = as_rows(operands[place], [term.index(axis)])
            if bool((rows != rows[:, :1]).any()):
                return refuse(trace, node, *operands, "an einsum that sums the units of one operand")
            operands[place], term = operands[place].select(term.index(axis), 0), term.replace(axis, "")
            terms[place] = term
    if len(operands) == 1:
        return operands[0].permute([terms[0].index(c) for c in result]).expand(shape)
    one, other = terms
    batch = [c for c in result if c in one and c in other]
    inner = [c for c in one if c in other and c not in result]
    rows, columns = (
        [c for c in result if c in mine and c not in theirs] for mine, theirs in ((one, other), (other, one))
    )
    count = {name: math.prod(size[c] for c in axes) for name, axes in (("r", rows), ("k", inner), ("c", columns))}
    first = operands[0].permute([one.index(c) for c in batch + rows + inner])
    second = operands[1].permute([other.index(c) for c in batch + inner + columns])
    lead = [size[c] for c in batch]
    first = first.reshape(*lead, count["r"], count["k"])
    second = second.reshape(*lead, count["k"], count["c"])
    got = product(trace, node, first, second, (*lead, count["r"], count["c"]))
    order = batch + rows + columns
    return got.reshape([size[c] for c in order]).permute([order.index(c) for c in result]).expand(shape)


def spell(equation: str, ndims: list[int]) -> tuple[list[str], str] | None:
    """Return the axes of each operand and of the result, ellipses expanded; None for a form without a rule."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    widest = max(ndim - len(term.replace("...", "")) for term, ndim in zip(terms, ndims, strict=True))
    dots = "".join(free[:widest])
    spelled = []
    for term, ndim in zip(terms, ndims, strict=True):
        own = ndim - len(term.replace("...", ""))
        spelled.append(term.replace("...", dots[widest - own :]))
    if not arrow:
        every = "".join(spelled)
        result = dots + "".join(sorted(c for c in set(every) - set(dots) if every.count(c) == 1))
    result = result.replace("...", dots)
    alike = all(len(set(term)) == len(term) for term in spelled)
    return (spelled, result) if alike else None
