"""Sites: layers whose weights can be fitted to the dense network's outputs, with their scales and residual sums."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

# Operations between a layer and its sum that leave every position and channel in place.
_STILL = ("dropout", "clone", "contiguous", "alias", "_to_copy", "to", "detach", "feature_dropout", "alpha_dropout")
_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass(frozen=True)
class Site:
    """One layer whose output can be compared with the dense network's.

    Attributes:
        module: Name of the layer, a linear or convolution that is called once.
        norm: Name of the BatchNorm that reads its output, or None.
        scales: Names of parameters that scale its output channel by channel (layer scales).
        other: (module, "input" or "output"): where the other summand of a residual sum can be observed before the layer
            runs; None where it cannot.
        other_first: Whether that summand has its channels on axis 1.
    """

    module: str
    norm: str | None = None
    scales: tuple[str, ...] = ()
    other: tuple[str, str] | None = None
    other_first: bool = False


def find_sites(trace: Any, nodes: list[Node]) -> list[Site]:
    """Find the layers whose weights can be fitted, in the order in which they run.

    Args:
        trace: The trace, for the names of modules and tensors.
        nodes: Its graph's nodes, in order.
    """
    place = {node: number for number, node in enumerate(nodes)}
    calls: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        if node.op == "call_function" and str(node.target).startswith(("aten.conv", "aten.linear")):
            # A computed weight cannot be set.
            name = trace.layer_of(node, node.args[1]) if trace.tensor_name(node.args[1]) else None
            if name is not None:
                calls[name].append(node)
    seen = _seen_at(trace, nodes)
    sites = []
    for name, called in calls.items():
        node = called[0]
        given, made = seen.get(node.args[0], ()), seen.get(node, ())
        if (
            len(called) == 1
            and any(module == name and kind == "input" for _, module, kind in given)
            and any(module == name and kind == "output" for _, module, kind in made)
        ):
            sites.append(_follow(trace, name, node, seen, place))
    return sites


def _follow(trace: Any, name: str, node: Node, seen: dict[Node, list], place: dict[Node, int]) -> Site:
    """Follow a layer's output to the sum that it is added to, if it gets there channel by channel."""
    norm, scales, at = None, [], node
    first = not isinstance(trace.model.get_submodule(name), nn.Linear)  # whether channels are on axis 1
    while len(at.users) == 1:
        user = next(iter(at.users))
        operation = _operation(user)
        axis = 1 if first else at.meta["val"].ndim - 1
        if operation == "batch_norm":
            reads = _plain_norm(trace, user) if axis == 1 and user.args[0] is at else None
            if reads is None or norm or scales:
                break
            norm = reads
        elif operation == "mul":
            scale = _scale(trace, next((a for a in user.args[:2] if a is not at), None), at, axis)
            if scale is None:
                break
            scales.append(scale)
        elif operation == "add" and not user.kwargs:
            other = next((a for a in user.args[:2] if a is not at), None)
            if isinstance(other, Node) and other.meta["val"].shape == at.meta["val"].shape:
                for since, module, kind in seen.get(other, ()):
                    if since < place[node]:
                        return Site(name, norm, tuple(scales), (module, kind), first)
            break
        elif operation == "permute" and list(user.args[1]) == (_TO_LAST if first else _TO_FIRST):
            first = not first
        elif operation not in _STILL:
            break
        at = user
    return Site(name, norm, tuple(scales))


def _plain_norm(trace: Any, node: Node) -> str | None:
    """Return the BatchNorm of a call, if it has running statistics and only this call."""
    name = trace.module_of(node)
    norm = trace.model.get_submodule(name) if name else None
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
        return None
    calls = [n for n in node.graph.nodes if _operation(n) == "batch_norm" and trace.module_of(n) == name]
    return name if len(calls) == 1 else None


def _scale(trace: Any, factor: Any, at: Node, axis: int) -> str | None:
    """Return the parameter of a factor, if it only scales the channels of a value."""
    if not isinstance(factor, Node) or not isinstance(factor.meta.get("val"), Tensor):
        return None
    ndim, shape = at.meta["val"].ndim, factor.meta["val"].shape
    wanted = [1] * ndim
    wanted[axis] = at.meta["val"].shape[axis]
    if [1] * (ndim - len(shape)) + list(shape) != wanted:
        return None
    while _operation(factor) in ("reshape", "view", "unsqueeze"):
        factor = factor.args[0]
    name = trace.tensor_name(factor)
    return name if name in dict(trace.model.named_parameters()) else None


def _operation(node: Node) -> str:
    """Return the name of an ATen operation without its overload."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else ""


def _seen_at(trace: Any, nodes: list[Node]) -> dict[Node, list[tuple[int, str, str]]]:
    """Find the values that are a module's single input or output tensor, and from which node on."""
    inputs: dict[str, dict[Node, None]] = defaultdict(dict)
    outputs: dict[str, dict[Node, None]] = defaultdict(dict)
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    within = {node: _modules_around(trace, node) for node in nodes}
    for number, node in enumerate(nodes):
        for module in within[node]:
            begins.setdefault(module, number)
            ends[module] = number
            for value in node.all_input_nodes:
                if module not in within[value] and not trace.tensor_name(value):
                    inputs[module][value] = None
            if any(module not in within[user] for user in node.users):
                outputs[module][node] = None
    seen: dict[Node, list[tuple[int, str, str]]] = defaultdict(list)
    for module in begins:
        if len(inputs[module]) == 1:
            seen[next(iter(inputs[module]))].append((begins[module], module, "input"))
        if len(outputs[module]) == 1:
            seen[next(iter(outputs[module]))].append((ends[module], module, "output"))
    for places in seen.values():
        places.sort()
    return dict(seen)


def _modules_around(trace: Any, node: Node) -> set[str]:
    """Return the names of the modules that a node was called in, except the model itself."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return {trace.module_names[name] for name, _ in stack if name and name in trace.module_names}
