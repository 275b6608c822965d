"""Save a slim model and load it again: safetensors and config.json, in timm's layout or in transformers'."""

from lfrns_hub.checkpoint.files import FORMAT_VERSION
from lfrns_hub.checkpoint.save_load import load, save
from lfrns_hub.checkpoint.timm import lfrns_slim

__all__ = ["FORMAT_VERSION", "lfrns_slim", "load", "save"]
