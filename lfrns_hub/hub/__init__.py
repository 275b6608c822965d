"""What people see of a checkpoint on the Hub, and the way there and back."""

from lfrns_hub.hub.push import fetch, push

__all__ = ["fetch", "push"]
