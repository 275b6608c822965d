"""timm's entrypoint of every slim model, `lfrns_slim`: the stock model, narrowed by the stored sizes.

Checkpoints contain a copy of this file (see remote_code.py): from the package it may import only narrow.py.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import is_model, load_pretrained, model_entrypoint, register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from lfrns_hub.format.narrow import FORMAT_VERSION, Attrs, Shapes, carry_facts, narrow, short

TIMM_NAME = "lfrns_slim"  # timm prints this name to people without the package


@register_model
def lfrns_slim(
    pretrained: bool = False,
    *,
    base: str | None = None,
    shapes: Shapes | None = None,
    attrs: Attrs | None = None,
    slim: dict[str, Any] | None = None,
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
        slim: How the model was made, in a folder that timm's own save_for_hf wrote: it keeps no other key.
        pretrained_cfg: timm's, from config.json.
        pretrained_cfg_overlay: timm's.
        pretrained_model_args: timm's record of the arguments at saving.
        cache_dir: timm's.
        num_classes: If it differs from the checkpoint's, the model gets a new head after loading.
        in_chans: If it differs from the checkpoint's, timm adapts the first convolution.
        features_only: Wrap as a backbone of feature maps.
        out_indices: Indices of the maps; by default those of the base.
        kwargs: Further arguments of the base.
    """
    if not isinstance(base, str) or base == TIMM_NAME or not is_model(base):
        raise ValueError(f"{TIMM_NAME}(base={short(base)}): not a model of this timm ({timm.__version__}). Load a "
                         "folder saved by lfrns_hub, or upgrade timm.")  # fmt: skip
    build = model_entrypoint(base)
    # Our weights are safetensors with the model's own names: loaders of other formats must not be called on them.
    cfg = {key: value for key, value in pretrained_cfg.items() if key != "custom_load"} if pretrained_cfg else None
    stored_classes = cfg.get("num_classes", num_classes) if cfg else num_classes
    stored_chans = (cfg.get("input_size") or (3,))[0] if cfg else in_chans
    own = {"num_classes": stored_classes, "in_chans": in_chans if in_chans is not None else stored_chans}
    own = _without_none(own)
    overlay = {"pretrained_cfg_overlay": pretrained_cfg_overlay} if pretrained_cfg_overlay else {}
    wanted_size, stored_size = kwargs.get("img_size"), (pretrained_model_args or {}).get("img_size")
    resize = pretrained and wanted_size is not None and _as_size(wanted_size) != _as_size(stored_size)
    if resize:
        kwargs["img_size"] = stored_size  # the weights have that size: resized after loading
    model = build(pretrained=False, pretrained_cfg=cfg, **overlay, **own, **_without_none(kwargs))
    shapes, attrs = _fit_classifier(model, shapes or {}, attrs or {})
    if own.get("in_chans") != stored_chans:
        for conv in _as_tuple(model.pretrained_cfg.get("first_conv")):
            if (weight := f"{conv}.weight") in shapes:
                shapes[weight] = [shapes[weight][0], own["in_chans"], *shapes[weight][2:]]
    narrow(model, shapes, attrs)
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
    model.pretrained_cfg["architecture"] = TIMM_NAME  # so that timm's save_for_hf writes a folder that loads again
    model._model_args = {**vars(model).get("_model_args", {}), "slim": slim or {"format_version": FORMAT_VERSION}}
    carry_facts(model, slim)
    if features_only:
        return _as_backbone(model, build, out_indices)
    return model


def _fit_classifier(model: nn.Module, shapes: Shapes, attrs: Attrs) -> tuple[Shapes, Attrs]:
    """Set the classifier's stated sizes to the requested number of classes; without classes drop them."""
    heads = _as_tuple(model.pretrained_cfg.get("classifier"))
    if not model.num_classes:
        shapes = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] not in heads}
        attrs = {name: widths for name, widths in attrs.items() if name not in heads}
        return shapes, attrs
    resized = {f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")} & shapes.keys()
    return shapes | {name: [model.num_classes, *shapes[name][1:]] for name in resized}, attrs


def _as_backbone(model: nn.Module, build: Callable[..., nn.Module], out_indices: Any) -> nn.Module:
    """Wrap a slim model as timm does for features_only, by its forward_intermediates."""
    if out_indices is None:
        with torch.device("meta"):
            out_indices = build(pretrained=False, features_only=True, feature_cls="getter").out_indices
    cfg = model.pretrained_cfg
    backbone = FeatureGetterNet(model, out_indices=out_indices)
    backbone.pretrained_cfg = backbone.default_cfg = cfg
    return backbone


def _as_size(value: Any) -> tuple[int, int] | None:
    """Return timm's int or pair as a pair."""
    return None if value is None else (value, value) if isinstance(value, int) else tuple(value)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Return the items that are not None."""
    return {key: value for key, value in values.items() if value is not None}


def _as_tuple(value: Any) -> tuple[str, ...]:
    """Return timm's None, name or tuple of names as a tuple."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
