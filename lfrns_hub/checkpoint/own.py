"""Checkpoints of a custom class: sizes in config.json, weights in model.safetensors; users build the dense model."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lfrns_hub.checkpoint.files import match_dtype, read_tensors, write_config, write_weights
from lfrns_hub.checkpoint.kinds import OWN_NAME
from lfrns_hub.format.narrow import describe, is_narrower, narrow
from lfrns_hub.pictures import check_settings, data_config_of

DATA_CONFIG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def own_skeleton(base: Any, base_args: dict[str, Any] | None) -> nn.Module | None:
    """Build the dense model of a class that timm and transformers do not know, if the caller passed one."""
    if base is None or isinstance(base, nn.Module):
        return copy.deepcopy(base)  # loading narrows it in place; the caller's model stays dense
    return base(**(base_args or {}))


def write_own(model: nn.Module, draft: Path, skeleton: nn.Module | None, label_names: Sequence[str] | None) -> None:
    """Write sizes and weights of a class that load() gets as model=."""
    shapes, attrs = describe(model, skeleton)
    config = {"architecture": OWN_NAME, "model_args": {"shapes": shapes, "attrs": attrs}}
    if isinstance(getattr(model, "pretrained_cfg", None), dict):  # as stated by set_preprocessing
        config["pretrained_cfg"] = data_config_of(model)
    if label_names is not None:
        config["label_names"] = list(label_names)
    write_config(draft, config, model)
    write_weights(model, draft)


def narrow_as_stored(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Narrow the user's dense model by the stored sizes that differ from its own.

    A checkpoint saved without a base states all of them, including numbers that a forward writes to its modules (the
    shape of the last images, a counter). These are not from a cut: they keep the model's values.
    """
    sizes = (config["lfrns"] if "lfrns" in config else config.get("model_args")) or {}
    have_shapes, have_attrs = describe(model, None)
    stored_shapes, stored_attrs = sizes.get("shapes") or {}, sizes.get("attrs") or {}
    shapes = {n: s for n, s in stored_shapes.items() if have_shapes.get(n) != s}
    modules = dict(model.named_modules(remove_duplicate=False))

    def is_stated(name: str, key: str, value: Any) -> bool:
        have = have_attrs.get(name, {}).get(key)
        is_layer = name in modules and type(modules[name]).__module__.startswith("torch.nn.")  # does not write numbers
        return have != value and (is_layer or is_narrower(value, have) or not isinstance(value, (int, list)))

    attrs = {
        name: {key: value for key, value in values.items() if is_stated(name, key, value)}
        for name, values in stored_attrs.items()
    }
    return narrow(model, shapes, {name: values for name, values in attrs.items() if values})


def prepare_as_stored(model: nn.Module, config: dict[str, Any]) -> None:
    """Set the image preprocessing of the user's model to the checkpoint's."""
    stored = {key: value for key, value in (config.get("pretrained_cfg") or {}).items() if key in DATA_CONFIG}
    if stored:
        check_settings(stored, "config.json: pretrained_cfg")
        model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **stored}


def fill_own(model: nn.Module, folder: Path) -> nn.Module:
    """Load the weights into a narrowed model."""
    tensors = read_tensors(model.state_dict(), folder)
    model.load_state_dict(tensors, strict=True)
    return match_dtype(model, tensors)
