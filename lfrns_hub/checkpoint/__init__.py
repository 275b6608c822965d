"""Saving and loading of slim models: safetensors and config.json, in timm's or transformers' layout."""

from lfrns_hub.checkpoint.cards import render_card_again
from lfrns_hub.checkpoint.entrypoint import lfrns_slim
from lfrns_hub.checkpoint.files import FORMAT_VERSION, holds_ours, is_own, refuse_foreign
from lfrns_hub.checkpoint.kinds import kind_of
from lfrns_hub.checkpoint.save_load import carry_config, load, prepared, save

__all__ = [
    "FORMAT_VERSION",
    "carry_config",
    "holds_ours",
    "is_own",
    "kind_of",
    "lfrns_slim",
    "load",
    "prepared",
    "refuse_foreign",
    "render_card_again",
    "save",
]
