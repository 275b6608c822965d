"""timm's layout: config.json and weights that `timm.create_model` loads, by the entrypoint `lfrns_slim`.

The stock model is built from its arguments, then narrowed by the stored sizes; no forward is overridden.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import set_layer_config
from timm.models import get_model_args, get_pretrained_cfg, is_model, model_entrypoint
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from torch import nn

import lfrns_hub.models  # the CIFAR networks, so that timm can build them as a base
from lfrns_hub.checkpoint.entrypoint import TIMM_NAME, lfrns_slim
from lfrns_hub.checkpoint.files import facts_of, match_dtype, only_dtype, read_tensors, write_config, write_weights
from lfrns_hub.checkpoint.remote_code import auto_map, write_code
from lfrns_hub.format.memory import NoDraws, bounded, bytes_for
from lfrns_hub.format.narrow import describe, short
from lfrns_hub.format.untrusted import read_headers, refuse_large, refusing, size_of
from lfrns_hub.model_io.meaning import problem_type_of
from lfrns_hub.pictures import check_settings, data_config_of

MAX_ARGUMENT = 1 << 16
NOT_BASE_ARGS = ("base", "shapes", "attrs", "slim", "num_classes", "pretrained_cfg", "pretrained", "cache_dir")
# The model type of the wrapper of timm models, registered in transformers.py.
WRAPPER_TYPE = "lfrns_timm_wrapper"
WRAPPER_MAP = auto_map("TimmWrapperConfig", "TimmWrapperForImageClassification", "TimmWrapperModel")


def timm_base(model: nn.Module, base: Any) -> str | None:
    """Return the timm architecture of a model, None if it is not a timm model."""
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
    if not hasattr(model, "num_classes"):
        raise ValueError(
            f"save({type(model).__name__}, base={base!r}): it gives feature maps and is no whole model. Save the slim "
            "model itself; timm opens it by features_only=True."
        )
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        model.pretrained_cfg = {**get_pretrained_cfg(base).to_dict(), "architecture": base}
    save_config_for_hf(model, str(draft / "config.json"), model_config={})
    config = json.loads((draft / "config.json").read_text())
    config["pretrained_cfg"] |= _shown(model)
    write_code(draft, WRAPPER_MAP, own_source(base))
    config |= {
        "architecture": TIMM_NAME,
        "model_args": model_args(model, base, base_args or {}),
        "model_type": WRAPPER_TYPE,
        "image_processor_type": "TimmWrapperImageProcessor",
        "auto_map": WRAPPER_MAP,
    }
    if label_names is not None:
        config["label_names"] = list(label_names)
    if problem := problem_type_of(model):
        config["problem_type"] = problem
    write_config(draft, config, model)
    write_weights(model, draft)


def carry_timm(model: nn.Module, base: str) -> None:
    """State a slim model's widths in its own arguments, so that timm's save_for_hf writes a folder that loads again."""
    model._model_args = {**model_args(model, base, {}), "slim": facts_of(model)}
    model.pretrained_cfg = {**model.pretrained_cfg, **_shown(model), "architecture": TIMM_NAME}


def _shown(model: nn.Module) -> dict[str, Any]:
    """Return the size and statistics of the image preprocessing: img_size and in_chans change the published ones."""
    config = data_config_of(model)
    return {key: config[key] for key in ("input_size", "mean", "std")}


def model_args(model: nn.Module, base: str, base_args: dict[str, Any]) -> dict[str, Any]:
    """Return the entrypoint's arguments for a model: base, differences from the base, and the base's own arguments."""
    args = {k: v for k, v in (get_model_args(model) | base_args).items() if k not in NOT_BASE_ARGS}
    with torch.device("meta"):
        cfg = {**model.pretrained_cfg, "num_classes": model.num_classes}
        try:
            skeleton = _create_slim({**args, "base": base, "num_classes": model.num_classes}, cfg)
        except Exception as error:  # each architecture raises its own errors
            raise ValueError(
                f"save(base={base!r}, base_args={short(args)}): they build no model ({short(str(error), 200)}). Give "
                "the base this model was cut from, and its arguments."
            ) from error
    shapes, attrs = describe(model, skeleton)
    return {"base": base, "shapes": shapes, "attrs": attrs, **args}


def own_source(base: str | None) -> Path | None:
    """Return the source of a base that timm itself does not have."""
    is_ours = is_model(base or "") and model_entrypoint(base).__module__ == lfrns_hub.models.__name__
    return Path(lfrns_hub.models.__file__) if is_ours else None


def _create_slim(args: dict[str, Any], pretrained_cfg: dict[str, Any]) -> nn.Module:
    """Build by the entrypoint without weights, on the device of the context."""
    with set_layer_config(), NoDraws():
        return lfrns_slim(pretrained=False, pretrained_cfg=pretrained_cfg, **args)


def read_timm(folder: Path, call: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the entrypoint's arguments and the pretrained_cfg of a folder, as timm does, and check their numbers."""
    with refusing(call):
        cfg, _, args = load_model_config_from_path(folder)
        own = {key: value for key, value in args.items() if key not in ("slim", "shapes", "attrs")}  # checked later
        refuse_large(own, "model_args", MAX_ARGUMENT)
        refuse_large(cfg.get("num_classes"), "num_classes")
        check_settings(cfg, "pretrained_cfg")
        return args, cfg


def load_timm(folder: Path, config: dict[str, Any], *, headless: bool = False) -> nn.Module:
    """Build the model without values, twice, and fill it from the file.

    The first is entirely on the meta device, to be compared with the file's header before anything is allocated. The
    second computes the buffers that no file has; its parameters have no memory until they have their final size.
    Neither follows paths to weights in the config. `headless` builds it without a classifier.
    """
    call = f"load({str(folder)!r})"
    headers = read_headers(folder, call)
    limits = (len(headers), bytes_for(size_of(headers)))
    args, cfg = read_timm(folder, call)
    if headless:
        cfg["num_classes"] = 0
    with refusing(call), bounded(*limits), torch.device("meta"):
        skeleton = _create_slim(args, dict(cfg))
    tensors = read_tensors(skeleton.state_dict(), folder)
    with refusing(call):
        with bounded(*limits, placeholders=True):
            model = _create_slim(args, dict(cfg))
        _give_memory(model, skeleton, only_dtype(tensors))
        model.load_state_dict(tensors, strict=True)
    model._model_args = {**args, "slim": config["slim"]}  # as set by timm's factory
    return match_dtype(model, tensors)


def _give_memory(model: nn.Module, skeleton: nn.Module, kind: torch.dtype | None) -> None:
    """Allocate the parameters of a model, those with fractions in the given dtype; what is tied shares its memory."""
    modules, made = dict(model.named_modules(remove_duplicate=False)), {}
    for name, like in skeleton.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        if id(like) not in made:
            dtype = kind if kind and like.is_floating_point() else like.dtype
            made[id(like)] = nn.Parameter(torch.empty(like.shape, dtype=dtype), like.requires_grad)
        modules[module]._parameters[leaf] = made[id(like)]
