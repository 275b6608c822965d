"""What tracing cannot see, as tables: which attributes state a width, which forwards cannot narrow."""

from lfrns_hub.adapters import timm, transformers  # noqa: F401  (they register their rows)
from lfrns_hub.adapters.registry import list_adapters, register_adapter, widths

__all__ = ["list_adapters", "register_adapter", "widths"]
