"""The Hub: model cards and indexes of checkpoints, upload and download."""

from lfrns_hub.hub.push import fetch, push

__all__ = ["fetch", "push"]
