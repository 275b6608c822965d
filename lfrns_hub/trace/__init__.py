"""From model to unit groups: export the graph, propagate channel ids through it, read the groups from them."""

from lfrns_hub.trace.graph import Trace, trace_model
from lfrns_hub.trace.rules.registry import register_op

__all__ = ["Trace", "register_op", "trace_model"]
