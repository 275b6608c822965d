"""The registry of op rules. A rule gets the trace, the node and its arguments, tensors replaced by ids."""

from collections.abc import Callable
from typing import Any

RULES: dict[str, Callable[..., Any]] = {}


def register_op(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the rule of one or more ATen operations.

    Args:
        names: Names in the exported graph, "aten.relu" for all overloads or "aten.mean.dim" for one.
    Returns:
        A decorator for `rule(trace, node, *args, **kwargs) -> ids`, where tensors arrive as their channel ids
        (int64, shape of the tensor, NONE where there is no unit) and the result has the output's shape.

    Example:
        >>> @lfrns.register_op("aten.sinc")
        ... def sinc(trace, node, ids):
        ...     return ids
    """

    def add(rule: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = rule
        return rule

    return add


def find_rule(target: Any) -> Callable[..., Any] | None:
    """Find the rule of a graph node's target, by overload, then by operation."""
    name = str(target)
    packet = name.rsplit(".", 1)[0]
    in_place = packet[:-1] if packet.endswith("_") else packet
    return RULES.get(name) or RULES.get(packet) or RULES.get(in_place)
