"""Layers with weights: convolutions, linear layers, norms and attention make, consume and tie ids."""

import math
from typing import Any

import torch
from torch import Tensor

from lfrns_hub.trace.ids import NONE, Axis, Consumer, MacsTerm, as_rows
from lfrns_hub.trace.rules import register_op


@register_op("aten.conv2d", "aten.conv1d", "aten.conv3d")
def conv(
    trace: Any, node: Any, ids: Tensor, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """A convolution contracts its input channels; a grouped one ties each conv group's inputs and outputs."""
    out_shape = node.meta["val"].shape
    weight_shape = node.args[1].meta["val"].shape
    rows = as_rows(ids, [1])
    in_ids, whole = trace.ids.tie_rows(rows)
    name = trace.layer_of(node, node.args[1])
    if name is None or not whole:
        trace.ids.freeze(ids, trace.reason(node, "its weight is not a plain layer's"))
        return trace.none_like(node)
    out_ids = trace.ids.fresh(out_shape[1])
    bias_name = trace.tensor_name(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
    kernel = math.prod(weight_shape[2:])
    macs = math.prod(out_shape[2:]) * out_shape[0] * kernel * weight_shape[1] * weight_shape[0]
    if groups == 1:
        trace.ids.axes.append(Axis(f"{name}.weight", 1, in_ids, False))
        trace.ids.consumers.append(Consumer(name, in_ids))
        trace.ids.macs.append(MacsTerm(macs, (in_ids, out_ids)))
    else:
        per_group = torch.cat([in_ids.view(groups, -1), out_ids.view(groups, -1)], 1)  # [groups, in + out]
        if weight_shape[1] == 1 and out_shape[1] == groups:
            trace.ids.tie(in_ids, out_ids)
        else:
            for row in per_group:
                trace.ids.tie_all(row)
        if (in_ids == NONE).any():
            trace.ids.freeze(out_ids, trace.reason(node, "a grouped convolution reads channels of fixed number"))
        trace.ids.macs.append(MacsTerm(macs, (out_ids,)))
    trace.ids.axes.append(Axis(f"{name}.weight", 0, out_ids, True))
    if bias_name:
        trace.ids.axes.append(Axis(bias_name, 0, out_ids, False))
    return out_ids.view(1, -1, *[1] * (len(out_shape) - 2)).expand(out_shape)


@register_op("aten.linear")
def linear(trace: Any, node: Any, ids: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """A linear layer contracts its last axis; one shared by heads leaves each of them whole."""
    out_shape = node.meta["val"].shape
    rows = as_rows(ids, [-1])
    in_ids, whole = trace.ids.tie_rows(rows)
    name = trace.layer_of(node, node.args[1])
    rows_count = math.prod(out_shape[:-1])
    if name is None:
        trace.ids.freeze(ids, trace.reason(node, "its weight is not a plain layer's"))
        return trace.none_like(node)
    if not whole:
        return ids[..., :1].expand(out_shape)
    out_ids = trace.ids.fresh(out_shape[-1])
    trace.ids.axes.append(Axis(f"{name}.weight", 1, in_ids, False))
    trace.ids.axes.append(Axis(f"{name}.weight", 0, out_ids, True))
    if bias is not None:
        trace.ids.axes.append(Axis(trace.tensor_name(node.args[2]), 0, out_ids, False))
    trace.ids.consumers.append(Consumer(name, in_ids))
    trace.ids.macs.append(MacsTerm(rows_count * len(in_ids) * len(out_ids), (in_ids, out_ids)))
    return out_ids.expand(out_shape)


def norm_axes(trace: Any, nodes: Any, ids: Tensor) -> None:
    """Tie a norm's parameters and buffers to the channels that they scale."""
    for node in nodes:
        if node is not None:
            trace.ids.axes.append(Axis(trace.tensor_name(node), 0, ids, False))


@register_op("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.instance_norm")
def batch_norm(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Each channel by itself."""
    channel_ids, whole = trace.ids.tie_rows(as_rows(ids, [1]))
    if whole:
        norm_axes(trace, node.args[1:5], channel_ids)
        trace.ids.normed.append(channel_ids)
    return ids


@register_op("aten.layer_norm")
def layer_norm(
    trace: Any, node: Any, ids: Tensor, normalized_shape: list[int], weight: Any = None, bias: Any = None, *args: Any
) -> Tensor:
    """Channels share their mean and variance: more than one unit in a row is approximate."""
    rows = as_rows(ids, list(range(ids.ndim - len(normalized_shape), ids.ndim)))
    channel_ids, whole = trace.ids.tie_rows(rows)
    trace.ids.one_unit_per_row(rows, None)
    if whole and len(normalized_shape) == 1:
        norm_axes(trace, node.args[2:4], channel_ids)
    elif whole:
        trace.ids.freeze(rows, trace.reason(node, "it is normalised over several axes"))
    return ids


@register_op("aten.group_norm")
def group_norm(trace: Any, node: Any, ids: Tensor, groups: int, *args: Any, **kwargs: Any) -> Tensor:
    """A norm group leaves as a whole; a single group over all channels is approximate."""
    channel_ids, whole = trace.ids.tie_rows(as_rows(ids, [1]))
    if whole:
        norm_axes(trace, node.args[2:4], channel_ids)
    if groups == 1:
        trace.ids.one_unit_per_row(channel_ids.view(1, -1), None)
    else:
        for row in channel_ids.view(groups, -1):
            trace.ids.tie_all(row)
    return ids


@register_op("aten.scaled_dot_product_attention")
def attention(
    trace: Any,
    node: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """A head's query, key and value leave together; other heads do not see them."""
    shape = node.meta["val"].shape
    if query.shape[:-2] != key.shape[:-2] or query.shape[:-2] != value.shape[:-2]:
        trace.ids.freeze(
            torch.cat([query.flatten(), key.flatten(), value.flatten()]), trace.reason(node, "heads are shared")
        )
        return trace.none_like(node)
    operands = [query, key, value]
    if mask is not None and bool((mask != NONE).any()):
        operands.append(mask.expand(*query.shape[:-2], *mask.shape[-2:]))
    per_head = tie_batches(trace, *operands)
    macs = 2 * math.prod(shape) * key.shape[-2]
    trace.ids.macs.append(MacsTerm(macs, (per_head,)))
    return value[..., :1, :].expand(shape)


@register_op("aten.matmul", "aten.bmm")
def matmul(trace: Any, node: Any, one: Tensor, other: Tensor) -> Tensor:
    """A matrix product ties its contracted axes, batch by batch: for attention, head by head."""
    shape = node.meta["val"].shape
    if one.ndim < 3 or other.ndim < 3 or one.shape[:-2] != other.shape[:-2]:
        trace.ids.freeze(
            torch.cat([one.flatten(), other.flatten()]), trace.reason(node, "a product of two activations")
        )
        return trace.none_like(node)
    per_head = tie_batches(trace, one, other)
    trace.ids.macs.append(MacsTerm(math.prod(shape) * one.shape[-1], (per_head,)))
    known = other if bool((other != NONE).any()) else one.transpose(-1, -2)
    return known[..., :1, :1].expand(shape) if known is not other else other[..., :1, :].expand(shape)


def tie_batches(trace: Any, *operands: Tensor) -> Tensor:
    """Tie all ids of each leading index of operands [..., rows, columns]; gives one id of each, [heads]."""
    flat = [as_batches(ids) for ids in operands]
    merged = torch.cat(flat, 1)  # [batch x heads, ids]
    rows = torch.unique(merged, dim=0)
    for row in rows:
        trace.ids.tie_all(row)
    trace.ids.heads.append(torch.unique(merged))
    return merged.max(1).values


def as_batches(ids: Tensor) -> Tensor:
    """Give the ids of each leading index, [product of leading axes, ids]; axes without units once."""
    for dim in (-2, -1):
        if ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    return ids.reshape(-1, ids.shape[-2] * ids.shape[-1])
