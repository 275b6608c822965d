"""timm's layout: config.json and weights that `timm.create_model` loads, by the entrypoint `lfrns_slim`.

The stock model is built as its arguments say, then narrowed by the stored sizes; no forward is overridden.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import set_layer_config
from timm.models import get_model_args, get_pretrained_cfg, is_model, model_entrypoint
from timm.models._hub import save_config_for_hf
from torch import nn

import lfrns_hub.models  # the CIFAR networks, so that timm can build them as a base
from lfrns_hub.checkpoint.entrypoint import TIMM_NAME, lfrns_slim
from lfrns_hub.checkpoint.files import check_tensors, facts_of, match_dtype, write_config, write_weights
from lfrns_hub.checkpoint.remote_code import auto_map, write_code
from lfrns_hub.narrow import describe

NOT_BASE_ARGS = ("base", "shapes", "attrs", "slim", "num_classes", "pretrained_cfg", "pretrained", "cache_dir")
# The type under which transformers finds its wrapper of timm models, registered in transformers.py.
WRAPPER_TYPE = "lfrns_timm_wrapper"
WRAPPER_MAP = auto_map("TimmWrapperConfig", "TimmWrapperForImageClassification", "TimmWrapperModel")


def timm_base(model: nn.Module, base: Any) -> str | None:
    """Name the timm architecture of a model, None if it is not timm's."""
    if isinstance(base, str):
        if not is_model(base):
            raise ValueError(
                f"save(base={base!r}): no such timm model. For your own class pass the dense model itself."
            )
        return base
    cfg = getattr(model, "pretrained_cfg", None)
    if base is not None or not isinstance(cfg, dict):
        return None
    name = cfg.get("architecture")
    name = getattr(model, "_model_args", {}).get("base") if name == TIMM_NAME else name
    return name if name and is_model(name) else None


def write_timm(
    model: nn.Module, draft: Path, base: str, base_args: dict[str, Any] | None, label_names: Sequence[str] | None
) -> None:
    """Write timm's config.json and the weights."""
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        model.pretrained_cfg = {**get_pretrained_cfg(base).to_dict(), "architecture": base}
    save_config_for_hf(model, str(draft / "config.json"), model_config={})
    config = json.loads((draft / "config.json").read_text())
    write_code(draft, WRAPPER_MAP, own_source(base))
    config |= {
        "architecture": TIMM_NAME,
        "model_args": _model_args(model, base, base_args or {}),
        "model_type": WRAPPER_TYPE,
        "image_processor_type": "TimmWrapperImageProcessor",
        "auto_map": WRAPPER_MAP,
    }
    if label_names is not None:
        config["label_names"] = list(label_names)
    write_config(draft, config, model)
    write_weights(model, draft)


def carry_timm(model: nn.Module, base: str) -> None:
    """Let a slim model's own arguments state its widths, so that timm's save_for_hf writes what loads again."""
    model._model_args = {**_model_args(model, base, {}), "slim": facts_of(model)}
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": TIMM_NAME}


def _model_args(model: nn.Module, base: str, base_args: dict[str, Any]) -> dict[str, Any]:
    """Give the entrypoint's arguments for a model: base, what differs from it, and the base's own arguments."""
    args = {k: v for k, v in (get_model_args(model) | base_args).items() if k not in NOT_BASE_ARGS}
    with torch.device("meta"):
        cfg = {**model.pretrained_cfg, "num_classes": model.num_classes}
        skeleton = _create_slim({**args, "base": base, "num_classes": model.num_classes}, cfg)
    shapes, attrs = describe(model, skeleton)
    return {"base": base, "shapes": shapes, "attrs": attrs, **args}


def own_source(base: str | None) -> Path | None:
    """Name the source of a base that timm alone does not have."""
    is_ours = is_model(base or "") and model_entrypoint(base).__module__ == lfrns_hub.models.__name__
    return Path(lfrns_hub.models.__file__) if is_ours else None


def _create_slim(args: dict[str, Any], pretrained_cfg: dict[str, Any]) -> nn.Module:
    """Build by the entrypoint without weights, on the device of the context."""
    with set_layer_config():
        return lfrns_slim(pretrained=False, pretrained_cfg=pretrained_cfg, **args)


def load_timm(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Check names and shapes on the meta device, then let timm load."""
    cfg = {**config.get("pretrained_cfg", {}), "num_classes": config.get("num_classes")}
    with torch.device("meta"):
        check_tensors(_create_slim(config["model_args"], cfg).state_dict(), folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    model._model_args["slim"] = config["slim"]
    return match_dtype(model, folder)
