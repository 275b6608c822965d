"""timm's layout: config.json and weights that `timm.create_model` loads, by the entrypoint `lfrns_slim`.

The stock model is built as its arguments say, then narrowed by the stored sizes; no forward is overridden.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import set_layer_config
from timm.models import get_pretrained_cfg, is_model, load_pretrained, model_entrypoint, register_model
from timm.models._features import FeatureGetterNet
from timm.models._hub import save_config_for_hf
from torch import nn

import lfrns_hub.models  # noqa: F401  the CIFAR networks, so that timm can build them as a base
from lfrns_hub.checkpoint.files import check_tensors, match_dtype, write_config, write_weights
from lfrns_hub.narrow import Attrs, Shapes, describe, narrow

TIMM_NAME = "lfrns_slim"  # what timm prints to people who lack the package
NOT_BASE_ARGS = ("base", "shapes", "attrs", "num_classes", "pretrained_cfg", "pretrained", "cache_dir")


@register_model
def lfrns_slim(
    pretrained: bool = False,
    *,
    base: str | None = None,
    shapes: Shapes | None = None,
    attrs: Attrs | None = None,
    pretrained_cfg: dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    out_indices: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the stock timm model `base`, narrow it, and load weights: timm's entrypoint of every slim model.

    Args:
        pretrained: Load the weights that pretrained_cfg names.
        base: A timm architecture.
        shapes: Tensors that differ from the base's.
        attrs: Width attributes that differ from the base's.
        pretrained_cfg: timm's, from config.json.
        pretrained_cfg_overlay: timm's.
        pretrained_model_args: timm's record of what the file was saved with.
        cache_dir: timm's.
        num_classes: Other than the checkpoint's: a new head after loading.
        in_chans: Other than the checkpoint's: timm adapts the first convolution.
        features_only: Wrap as a backbone of feature maps.
        out_indices: Which maps; the base's own choice by default.
        kwargs: For the base.
    """
    if base is None or base == TIMM_NAME or not is_model(base):
        raise ValueError(f"{TIMM_NAME}(base={base!r}): not a model of this timm ({timm.__version__}). Load a folder "
                         "saved by lfrns_hub, or upgrade timm.")  # fmt: skip
    build = model_entrypoint(base)
    cfg = dict(pretrained_cfg) if pretrained_cfg else None
    stored_classes = cfg.get("num_classes", num_classes) if cfg else num_classes
    stored_chans = (cfg.get("input_size") or (3,))[0] if cfg else in_chans
    own = {"num_classes": stored_classes, "in_chans": in_chans if in_chans is not None else stored_chans}
    own = _without_none(own)
    overlay = {"pretrained_cfg_overlay": pretrained_cfg_overlay} if pretrained_cfg_overlay else {}
    wanted_size, stored_size = kwargs.get("img_size"), (pretrained_model_args or {}).get("img_size")
    resize = pretrained and wanted_size is not None and _as_size(wanted_size) != _as_size(stored_size)
    if resize:
        kwargs["img_size"] = stored_size  # the weights are of that size: resized once they are in
    model = build(pretrained=False, pretrained_cfg=cfg, **overlay, **own, **_without_none(kwargs))
    shapes = dict(shapes or {})
    if own.get("in_chans") != stored_chans:
        for conv in _as_tuple(model.pretrained_cfg.get("first_conv")):
            if (weight := f"{conv}.weight") in shapes:
                shapes[weight] = [shapes[weight][0], own["in_chans"], *shapes[weight][2:]]
    narrow(model, shapes, attrs or {})
    if pretrained:
        load_pretrained(
            model,
            pretrained_cfg=model.pretrained_cfg,
            num_classes=stored_classes if stored_classes is not None else model.num_classes,
            in_chans=own.get("in_chans", 3),
            strict=True,
            cache_dir=cache_dir,
        )
    if resize:
        model.set_input_size(img_size=wanted_size)
    if num_classes is not None and num_classes != stored_classes:
        model.reset_classifier(num_classes)
    model.pretrained_cfg["architecture"] = TIMM_NAME  # so that timm's save_for_hf writes what loads again
    if features_only:
        return _as_backbone(model, build, out_indices)
    return model


def _as_backbone(model: nn.Module, build: Callable[..., nn.Module], out_indices: Any) -> nn.Module:
    """Wrap a slim model as timm does for features_only, by its forward_intermediates."""
    if out_indices is None:
        with torch.device("meta"):
            out_indices = build(pretrained=False, features_only=True, feature_cls="getter").out_indices
    cfg = model.pretrained_cfg
    backbone = FeatureGetterNet(model, out_indices=out_indices)
    backbone.pretrained_cfg = backbone.default_cfg = cfg
    return backbone


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
    args = config.get("model_args", {}) | (base_args or {})
    args = {k: v for k, v in args.items() if k not in NOT_BASE_ARGS}
    with torch.device("meta"):
        skeleton = _create_slim({**args, "base": base, "num_classes": config["num_classes"]}, config["pretrained_cfg"])
    shapes, attrs = describe(model, skeleton)
    config |= {"architecture": TIMM_NAME, "model_args": {"base": base, "shapes": shapes, "attrs": attrs, **args}}
    if label_names is not None:
        config["label_names"] = list(label_names)
    write_config(draft, config, model)
    write_weights(model, draft)


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
    return match_dtype(model, folder)


def _as_size(value: Any) -> tuple[int, int] | None:
    """Give timm's int or pair as a pair."""
    return None if value is None else (value, value) if isinstance(value, int) else tuple(value)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not given."""
    return {key: value for key, value in values.items() if value is not None}


def _as_tuple(value: Any) -> tuple[str, ...]:
    """Give timm's None, name or tuple of names as a tuple."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
