"""Model to unit groups: export the graph, run channel ids through it, read the groups off."""

from lfrns_hub.trace.graph import Trace, trace_model
from lfrns_hub.trace.rules.registry import register_op

__all__ = ["Trace", "register_op", "trace_model"]
