"""Image preprocessing of a model: read from its own processor or configuration, changed, and saved with it."""

import json
import math
from typing import Any

import timm
import torch
from torch import nn

from lfrns_hub.format.untrusted import short
from lfrns_hub.pictures.model_input import input_size_of
from lfrns_hub.pictures.preparation import OwnPreparation, Preparation
from lfrns_hub.pictures.processor import (
    FILE,
    INTERPOLATIONS,
    ProcessorCall,
    changed_processor,
    check_settings,
    find_processor,
    guess_processor,
    is_of_transformers,
)
from lfrns_hub.pictures.proof import Geometry, for_training, guess_geometries, prove

# Proved preparations, by all settings of a pipeline: each model needs several, for training, test and more.
_PROVED: dict[str, Preparation | OwnPreparation] = {}


def make_transform(
    model: nn.Module,
    train: bool,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    flip: bool = True,
) -> Preparation | OwnPreparation:
    """Return the function from image to model input, for one image or, in `load_data`'s datasets, for batches.

    It follows the model's own settings: a transformers image processor of any class, with all of its settings, or
    timm's data configuration. This is run on probes of many sizes and shapes; a faster way is used only if it produces
    the same images for all of them, to one level of 255; else every image is prepared by the model's own pipeline.

    Args:
        model: Its image processor (transformers) or pretrained_cfg (timm) states the preprocessing.
        train: Add pad-and-crop by 4 where images are 32 pixels or less, random resized crops above.
        mean: Mean per channel, overrides the model's.
        std: Standard deviation per channel, overrides the model's.
        flip: Whether training mirrors half of the images; not for digits or letters.
    Returns:
        Callable: image of any mode and size -> float32 [C, H, W]. Random numbers come from torch's generator.
    Raises:
        ValueError: The model's own processor does not return images, or cannot state `mean` or `std`.
        ConnectionError: The Hub is needed for the settings, and cannot be reached.
    """
    if is_of_transformers(model):
        given = {key: value for key, value in {"mean": mean, "std": std}.items() if value is not None}
        processor = state_in_processor(model, given) if given else find_processor(model) or guess_processor(model)
        preparation = _prove_processor(processor, model)
    else:
        preparation = _prove_timm(model, mean, std)
    return for_training(preparation, flip) if train else preparation


def set_preprocessing(
    model: nn.Module,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    img_size: int | None = None,
) -> None:
    """Set a model's image preprocessing by timm's options; None leaves an option unchanged.

    The options are written to the model's pretrained_cfg, or to the settings of its transformers image processor:
    `make_transform` reads them there, and a checkpoint saves them.

    Args:
        model: A timm model, a transformers model with an image processor, or a custom class.
        mean, std: Of each channel, for pixels from 0 to 1.
        crop_pct: Share of the image's shorter side that the central crop covers, in (0, 1].
        interpolation: "nearest", "bilinear", "bicubic", "lanczos", "box" or "hamming".
        img_size: Height and width in pixels of the model's images; `create_dense` makes the network fit them.
    Raises:
        ValueError: A value is out of range, or the model's image processor has no settings for it.

    Example:
        >>> model = timm.create_model("cifar_resnet20")
        >>> set_preprocessing(model, crop_pct=0.9)
        >>> model.pretrained_cfg["crop_pct"]
        0.9
    """
    given = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": interpolation, "img_size": img_size}
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct}: the share of the shorter side must be in (0, 1]. ImageNet's is 0.875.")
    if std is not None and min(std) <= 0:
        raise ValueError(f"std={std}: each must be above 0. ImageNet's are 0.229, 0.224, 0.225.")
    if interpolation is not None and interpolation not in INTERPOLATIONS.values():
        raise ValueError(f"interpolation={interpolation!r}: it must be one of {', '.join(INTERPOLATIONS.values())}.")
    if is_of_transformers(model):
        if given.keys() != {"img_size"} or find_processor(model) is not None:  # the guess follows the model's size
            model.lfrns_processor = state_in_processor(model, given)
        return
    cfg = getattr(model, "pretrained_cfg", None) or {"input_size": input_size_of(model)}
    if img_size is not None:
        given["input_size"] = (input_size_of(model)[0], given.pop("img_size"), img_size)
    model.pretrained_cfg = model.default_cfg = {**cfg, **given}


def data_config_of(model: nn.Module) -> dict[str, Any]:
    """Return timm's data configuration of a model, with its own size and channels instead of the published ones.

    Raises:
        ValueError: Its pretrained_cfg has invalid settings.
    """
    channels, height, width = input_size_of(model)
    cfg = {**(getattr(model, "pretrained_cfg", None) or {}), "input_size": (channels, height, width)}
    stated = {"mean": cfg.pop("mean", None), "std": cfg.pop("std", None)}
    check_settings({**cfg, **stated}, f"{type(model).__name__}: its pretrained_cfg")
    try:
        config = timm.data.resolve_data_config(cfg, pretrained_cfg=stated)
        return config | {key: tuple(_per_channel(config[key], channels)) for key in ("mean", "std")}
    except Exception as error:  # timm asserts, and unpacks values unchecked
        reason = short(str(error) or type(error).__name__, 200)
        raise ValueError(
            f"{type(model).__name__}: its pretrained_cfg prepares no picture ({reason}). Mend it."
        ) from error


def state_in_processor(model: nn.Module, given: dict[str, Any]) -> Any:
    """State timm's options as settings of a model's image processor, and prove that it follows them.

    Args:
        model: A transformers model.
        given: Some of mean, std, crop_pct, interpolation and img_size.
    Returns:
        A changed copy of the processor.
    Raises:
        ValueError: The model has no processor, or one without such settings.
    """
    processor = find_processor(model)
    told = ", ".join(f"{key}={value}" for key, value in given.items())
    if processor is None:
        raise ValueError(
            f"{told}: a transformers model's images are prepared as its image processor says, and this one came with "
            f"none. Save one beside it, as {FILE}."
        )
    settings: dict[str, Any] = {}
    if "mean" in given or "std" in given:
        settings |= {"do_normalize": True}
        settings |= {f"image_{key}": [float(v) for v in given[key]] for key in ("mean", "std") if key in given}
    if "interpolation" in given:
        settings["resample"] = next(number for number, name in INTERPOLATIONS.items() if name == given["interpolation"])
    ways: list[dict[str, Any]] = [{}]
    if given.keys() & {"crop_pct", "img_size"}:
        height, width = _prove_processor(processor, model).size
    if (side := given.get("img_size")) is not None:
        settings |= _scaled_sizes(processor, (height, width), side)
        height = width = side
    if "crop_pct" in given:
        edge = {"shortest_edge": int(min(height, width) / given["crop_pct"])}
        crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
        ways = [{"crop_pct": given["crop_pct"]}, {"size": edge, **crop}]
    for way in ways:
        try:
            changed = changed_processor(processor, **{**settings, **way})
            proved = _prove_processor(changed, model)
        except (TypeError, ValueError):  # a setting that this class does not accept
            continue
        if _does(proved, given, way and (edge["shortest_edge"], (height, width))):
            return changed
    raise ValueError(
        f"{told}: the model's {type(processor).__name__} has no settings that prepare images so. Leave the option out, "
        f"or save another processor as {FILE} beside the model."
    )


def _scaled_sizes(processor: Any, size: tuple[int, int], side: int) -> dict[str, dict[str, int]]:
    """Return a processor's settings of sizes, for square images instead of those of a size [H, W]."""
    shares = {"height": side / size[0], "width": side / size[1]}
    stated = {key: dict(getattr(processor, key, None) or {}) for key in ("size", "crop_size")}
    return {
        key: {name: round(value * shares.get(name, side / min(size))) for name, value in sides.items() if value}
        for key, sides in stated.items()
        if sides
    }


def _does(proved: Preparation | OwnPreparation, given: dict[str, Any], crop: Any) -> bool:
    """Return whether a proved preparation follows the options."""
    if "img_size" in given and proved.size != (given["img_size"],) * 2:
        return False
    if given.keys() == {"img_size"}:
        return True
    if not isinstance(proved, Preparation):
        return False
    for key in ("mean", "std"):
        if key in given:
            wanted, stated = torch.tensor(given[key]), torch.tensor(getattr(proved, key))
            if wanted.shape != stated.shape or not torch.allclose(wanted, stated, rtol=1e-3, atol=1e-4):
                return False
    if "interpolation" in given and proved.interpolation != given["interpolation"]:
        return False
    return not crop or (proved.resize, proved.size) == crop


def _prove_processor(processor: Any, model: nn.Module) -> Preparation | OwnPreparation:
    """Find the preparation that equals a transformers image processor."""
    mode = _mode_of(model)
    key = f"{type(processor)} {mode} {json.dumps(processor.to_dict(), default=str, sort_keys=True)}"
    if key not in _PROVED:
        resample = getattr(processor, "resample", None)
        name = INTERPOLATIONS.get(2 if resample is None else resample, "bilinear")
        as_tensor = getattr(processor, "backend", None) == "torchvision"
        geometries = guess_geometries(processor, name, as_tensor)
        what = f"model {str(getattr(model.config, '_name_or_path', '') or '')!r}: its {type(processor).__name__}"
        stated = (getattr(processor, "image_mean", None), getattr(processor, "image_std", None))
        _PROVED[key] = prove(ProcessorCall(processor), geometries, mode=mode, what=what, stated=stated)
    return _PROVED[key]


def _prove_timm(
    model: nn.Module, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Preparation | OwnPreparation:
    """Find the preparation that equals timm's transform for a model; for a custom class with timm's defaults."""
    config = data_config_of(model)
    channels, height, width = config["input_size"]
    given = {"mean": mean or config["mean"], "std": std or config["std"]}
    config |= {key: tuple(_per_channel(values, channels)) for key, values in given.items()}
    mode = _mode_of(model)
    key = f"timm {mode} {sorted(config.items())}"
    if key not in _PROVED:
        square = math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"])
        resizes: list[Any] = [square] if config["crop_mode"] == "squash" else [min(square)]
        geometries = [Geometry(resize, config["interpolation"], as_tensor=False, floored=False) for resize in resizes]
        what = f"{type(model).__name__}: timm's transform"
        try:
            own = timm.data.create_transform(**config)
        except Exception as error:  # timm's errors: an interpolation without a name is a KeyError
            raise ValueError(f"{what} cannot be made of {config} ({error}). Mend pretrained_cfg.") from error
        _PROVED[key] = prove(own, geometries, mode=mode, what=what, stated=(config["mean"], config["std"]))
    return _PROVED[key]


def _mode_of(model: nn.Module) -> str:
    """Return the mode of a model's images.

    Raises:
        ValueError: It has neither one nor three channels.
    """
    channels = input_size_of(model)[0]
    if channels not in (1, 3):
        raise ValueError(
            f"make_transform({type(model).__name__}): it takes {channels} channels, a picture has 1 or 3. Prepare its "
            "images by a transform of your own."
        )
    return "L" if channels == 1 else "RGB"


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    """Spread statistics of three channels over a model's number of channels."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
