"""transformers' wrapper of a timm model: saved in timm's layout with a note that it was wrapped, and wrapped again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import filter_pretrained_cfg
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lfrns_hub.checkpoint.entrypoint import TIMM_NAME
from lfrns_hub.checkpoint.files import facts_of, read_config, write_config
from lfrns_hub.checkpoint.narrow_classes import TYPE_PREFIX
from lfrns_hub.checkpoint.timm import WRAPPER_MAP, WRAPPER_TYPE, load_timm, model_args, timm_base, write_timm
from lfrns_hub.checkpoint.transformers import is_transformers, refuse_outside, wrapper_classes
from lfrns_hub.format.untrusted import refuse_large, refusing


def is_wrapper(model: nn.Module) -> bool:
    """Return whether a model is transformers' wrapper of a timm model, with or without a head."""
    return is_transformers(model) and model.config.model_type.removeprefix(TYPE_PREFIX) == "timm_wrapper"


def _class_of(model: nn.Module) -> type:
    """Return the class in which a wrapper is saved."""
    return wrapper_classes()["Lfrns" + type(model).__name__.removeprefix("Lfrns")]


def base_of(model: nn.Module, base: Any) -> str:
    """Return the timm architecture of the model in a wrapper."""
    name = timm_base(model.timm_model, base)
    if name is None:
        raise ValueError(
            f"save({type(model).__name__}, base={base!r}): the model in it is none of timm's own. Give the name of the "
            "timm model that it was cut from."
        )
    return name


def carry_wrapper(model: nn.Module) -> None:
    """Set a slim wrapper's class and config type to those that save its widths."""
    arguments = model_args(model.timm_model, base_of(model, None), {})
    cfg = filter_pretrained_cfg(model.timm_model.pretrained_cfg, remove_source=True, remove_null=True)
    config = model.config
    model.__class__, config.__class__ = _class_of(model), CONFIG_MAPPING[WRAPPER_TYPE]
    config.architecture, config.model_args = TIMM_NAME, arguments
    config.pretrained_cfg = {key: value for key, value in cfg.items() if key != "num_classes"}
    config.auto_map, config.image_processor_type = WRAPPER_MAP, "TimmWrapperImageProcessor"
    config.slim = facts_of(model)


def write_wrapper(
    model: nn.Module, draft: Path, base: str, base_args: dict[str, Any] | None, label_names: Sequence[str] | None
) -> None:
    """Write the model in a wrapper as a timm model, with a note that it was wrapped."""
    names = model.config.id2label or {}
    if label_names is None and any(name != f"LABEL_{number}" for number, name in names.items()):
        label_names = [names[number] for number in sorted(names)]
    write_timm(model.timm_model, draft, base, base_args, label_names)
    write_config(draft, {**read_config(draft), "architectures": [_class_of(model).__name__]}, model)


def load_wrapper(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Load the timm model of a folder and wrap it again."""
    cls = next(cls for name, cls in wrapper_classes().items() if name in config["architectures"])
    call = f"load({str(folder)!r})"
    model = load_timm(folder, config, headless=not cls.__name__.endswith("ForImageClassification"))
    sizes = {key: value for key, value in config.items() if key not in ("slim", "model_args")}
    refuse_large(sizes, f"{call}: config.json")
    refuse_outside(sizes, call)
    with refusing(call), torch.device("meta"):
        wrapper = cls(CONFIG_MAPPING[WRAPPER_TYPE].from_dict({**config, "name_or_path": str(folder)}))
    wrapper.timm_model = model
    return wrapper
