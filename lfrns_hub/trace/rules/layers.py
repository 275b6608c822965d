"""Layers with weights make and consume ids: convolutions, linear layers, norms."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.trace.ids import NONE, Consumer, MacsTerm, as_rows, varies
from lfrns_hub.trace.rules.registry import register_op
from lfrns_hub.trace.widths import note

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def make(trace: Any, node: Any, name: str, count: int, bias: Any) -> Tensor:
    """Return the ids of a layer's outputs, those of an earlier call where the layer is shared, and tie its bias."""
    out_ids = trace.ids.by_axis.get((f"{name}.weight", 0))
    if out_ids is None:
        out_ids = trace.ids.fresh(count)
    trace.ids.axis(f"{name}.weight", 0, out_ids, makes=True)
    if node not in trace.observed:
        trace.ids.unobserved.append(out_ids)
    bias_node = node.args[2] if len(node.args) > 2 else None
    if bias_name := trace.tensor_name(bias_node):
        trace.ids.axis(bias_name, 0, out_ids)
    elif isinstance(bias, Tensor):  # composed in the forward, such as beit's query and value biases
        trace.ids.tie(bias, out_ids)
    weight = trace.weight_of(node.args[1])
    for gain in weight.gains if weight else ():
        if math.prod(trace.shape_of(gain)) == count:
            trace.ids.axis(gain, 0, out_ids)
    return out_ids


def consume(trace: Any, node: Any, name: str, in_ids: Tensor) -> None:
    """Record that a layer contracts ids; with a standardised weight every input changes the weights of all others."""
    trace.ids.axis(f"{name}.weight", 1, in_ids)
    if node not in trace.observed:
        trace.ids.unobserved.append(in_ids)
    elif all(consumer.module != name for consumer in trace.ids.consumers):
        trace.ids.consumers.append(Consumer(name, in_ids))
    if trace.weight_of(node.args[1]).standardised:
        trace.ids.one_unit_per_row(in_ids.view(1, -1), None)


def unmade(trace: Any, node: Any, count: int, why: str) -> None:
    """Record a layer whose outputs get no ids, so that it is reported as frozen."""
    name = trace.module_of(node)
    if name is not None and isinstance(trace.model.get_submodule(name), (nn.Linear, nn.modules.conv._ConvNd)):
        trace.ids.unmade.setdefault(name, (count, trace.reason(node, why)))


@register_op("aten.conv2d", "aten.conv1d", "aten.conv3d")
def conv(
    trace: Any, node: Any, ids: Tensor, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Contract the input channels; in a grouped convolution, tie each conv group's inputs and outputs."""
    shape = node.meta["val"].shape
    weight_shape = node.args[1].meta["val"].shape
    name = trace.layer_of(node, node.args[1])
    rows = as_rows(ids, [1])
    mixed = len(rows) > 1 and trace.ids.other_units(rows)
    if name is None and not mixed and weight_shape[1] == 1 and shape[1] == groups and per_channel(trace, node, rows):
        note(trace, node, groups, ids, 1)
        first = ids[(slice(None), slice(None), *[slice(0, 1)] * (ids.ndim - 2))]
        trace.ids.macs.append(
            MacsTerm(math.prod(shape[2:]) * shape[0] * math.prod(weight_shape), (first[0].flatten(),))
        )
        return first.expand(shape)
    if name is None or mixed:
        slides = any(varies(ids, dim) for dim in range(2, ids.ndim))
        why = "it slides over the axis on which units lie" if slides else trace.why_no_layer(node)
        trace.ids.freeze(ids, trace.reason(node, why))
        unmade(trace, node, shape[1], why)
        trace.ids.macs.append(MacsTerm(math.prod(shape[2:]) * shape[0] * math.prod(weight_shape), ()))
        return trace.none_like(node)
    in_ids, _ = trace.ids.tie_rows(rows)
    out_ids = make(trace, node, name, shape[1], bias)
    macs = math.prod(shape[2:]) * shape[0] * math.prod(weight_shape)
    if groups == 1:
        consume(trace, node, name, in_ids)
        trace.ids.macs.append(MacsTerm(macs, (in_ids, out_ids)))
    else:
        per_group = torch.cat([in_ids.view(groups, -1), out_ids.view(groups, -1)], 1)  # [groups, in + out]
        if weight_shape[1] == 1 and shape[1] == groups:
            trace.ids.tie(in_ids, out_ids)
        else:
            for row in per_group:
                trace.ids.tie_all(row)
        if (in_ids == NONE).any():
            trace.ids.freeze(out_ids, trace.reason(node, "a grouped convolution reads channels of fixed number"))
        trace.ids.macs.append(MacsTerm(macs, (out_ids,)))
    return out_ids.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)


def per_channel(trace: Any, node: Any, rows: Tensor) -> bool:
    """Tie weight and bias of a functional depthwise convolution to its channels; return whether that is possible."""
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    names = [(part, trace.tensor_name(part)) for part in (weight, bias) if part is not None]
    if not all(name.removesuffix(".weight") not in trace.shared if name else repeated(part) for part, name in names):
        return False
    channel_ids, whole = trace.ids.tie_rows(rows)
    for _, name in names if whole else ():
        if name:
            trace.ids.axis(name, 0, channel_ids)
    return whole


def repeated(node: Any) -> bool:
    """Return whether all channels of a computed weight are one kernel, repeated for each channel."""
    while str(node.target).split(".")[1:2] in (["to"], ["_to_copy"], ["contiguous"], ["clone"]):
        node = node.args[0]
    return str(node.target) in ("aten.expand.default", "aten.repeat.default") and node.args[0].meta["val"].shape[0] == 1


@register_op("aten.conv_transpose2d", "aten.conv_transpose1d", "aten.conv_transpose3d")
def transposed(trace: Any, node: Any, ids: Tensor, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """Make units; the inputs of a transposed convolution are not cut."""
    value, shape = node.args[1].meta["val"], node.meta["val"].shape
    images = node.args[0].meta["val"]
    trace.ids.freeze(ids, trace.reason(node, "a transposed convolution reads it"))
    name = trace.tensor_name(node.args[1])
    module = trace.model.get_submodule(name.removesuffix(".weight")) if name.endswith(".weight") else None
    plain = isinstance(module, TRANSPOSED) and module.groups == 1 and name.removesuffix(".weight") not in trace.shared
    out_ids = None
    if plain:
        out_ids = trace.ids.by_axis.get((name, 1))
        out_ids = trace.ids.fresh(shape[1]) if out_ids is None else out_ids
        trace.ids.axis(name, 1, out_ids, makes=True)
        if bias_name := trace.tensor_name(node.args[2] if len(node.args) > 2 else None):
            trace.ids.axis(bias_name, 0, out_ids)
        if node not in trace.observed:
            trace.ids.unobserved.append(out_ids)
    if not plain:
        unmade(trace, node, shape[1], "a transposed convolution makes it")
    macs = math.prod(images.shape[2:]) * images.shape[0] * value.numel()
    trace.ids.macs.append(MacsTerm(macs, (out_ids,) if plain else ()))
    return out_ids.view(1, -1, *[1] * (len(shape) - 2)).expand(shape) if plain else trace.none_like(node)


@register_op("aten.linear", "aten.addmm")
def linear(trace: Any, node: Any, ids: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """Contract the last axis; a linear layer shared by heads ties each head into one unit."""
    shape = node.meta["val"].shape
    rows = as_rows(ids, [-1])
    name = trace.layer_of(node, node.args[1])
    if name is None:
        trace.ids.freeze(ids, trace.reason(node, trace.why_no_layer(node)))
        tensor = trace.tensor_name(node.args[1])
        name = tensor.removesuffix(".weight")
        known = name != tensor and name not in trace.shared
        out_ids = make(trace, node, name, shape[-1], bias) if known else None
        if out_ids is None:
            unmade(trace, node, shape[-1], trace.why_no_layer(node))
        trace.ids.macs.append(MacsTerm(math.prod(shape) * ids.shape[-1], () if out_ids is None else (out_ids,)))
        return trace.none_like(node) if out_ids is None else out_ids.expand(shape)
    in_ids, whole = trace.ids.tie_rows(rows)
    if not whole:
        trace.ids.macs.append(MacsTerm(math.prod(shape) * ids.shape[-1], (ids[..., 0].reshape(-1),)))
        return ids[..., :1].expand(shape)
    out_ids = make(trace, node, name, shape[-1], bias)
    consume(trace, node, name, in_ids)
    trace.ids.macs.append(MacsTerm(math.prod(shape[:-1]) * len(in_ids) * len(out_ids), (in_ids, out_ids)))
    return out_ids.expand(shape)


def norm_axes(trace: Any, nodes: Any, ids: Tensor) -> None:
    """Tie a norm's parameters and buffers to the channels that they scale."""
    for node in nodes:
        if name := trace.tensor_name(node):
            trace.ids.axis(name, 0, ids)


@register_op("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.instance_norm", "aten.prelu")
def batch_norm(trace: Any, node: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Normalise each channel by itself."""
    weight_shape = trace.shape_of(trace.tensor_name(node.args[1]))
    if weight_shape == (1,):
        return ids
    channel_ids, whole = trace.ids.tie_rows(as_rows(ids, [1]))
    if whole:
        norm_axes(trace, node.args[1:5], channel_ids)
        if "norm" in str(node.target):
            trace.ids.normed.append(channel_ids)
        else:
            trace.ids.activated.append(channel_ids)
    return ids


@register_op("aten.layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def layer_norm(
    trace: Any, node: Any, ids: Tensor, normalized_shape: list[int], weight: Any = None, bias: Any = None, *args: Any
) -> Tensor:
    """Normalise over channels, which share mean and variance: more than one unit in a row is approximate."""
    rows = as_rows(ids, list(range(ids.ndim - len(normalized_shape), ids.ndim)))
    channel_ids, whole = trace.ids.tie_rows(rows)
    trace.ids.one_unit_per_row(rows, None)
    if whole and len(normalized_shape) == 1:
        note(trace, node, normalized_shape[0], ids, -1, tuple(normalized_shape))
        norm_axes(trace, node.args[2:4], channel_ids)
    elif whole:
        trace.ids.freeze(rows, trace.reason(node, "it is normalised over several axes"))
    return ids


@register_op("aten.group_norm")
def group_norm(trace: Any, node: Any, ids: Tensor, groups: int, *args: Any, **kwargs: Any) -> Tensor:
    """Tie each norm group, which is removed as a whole; a single group over all channels is approximate."""
    channel_ids, whole = trace.ids.tie_rows(as_rows(ids, [1]))
    if whole:
        norm_axes(trace, node.args[2:4], channel_ids)
    if groups == 1:
        trace.ids.one_unit_per_row(channel_ids.view(1, -1), None)
    else:
        for row in channel_ids.view(groups, -1):
            trace.ids.tie_all(row)
    return ids
