"""How a model's pictures are prepared: read from its own configuration, stated, carried along."""

import contextlib
from pathlib import Path
from typing import Any

import timm
from torch import nn

from lfrns_hub.pictures.model_input import input_size_of
from lfrns_hub.pictures.preparation import Preparation
from lfrns_hub.reach import CONNECT_TIMEOUT_S, cached
from lfrns_hub.untrusted import read_json, short

# By the numbers that pillow and transformers give them.
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def make_transform(
    model: nn.Module,
    train: bool,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    flip: bool = True,
) -> Preparation:
    """Make what turns a picture into the model's input, one at a time or, in `load_data`'s datasets, by batches.

    Args:
        model: Its pretrained_cfg (timm) or image processor (transformers) says size, mean and std.
        train: Adds pad-and-crop by 4 where images are 32 pixels or less, random resized crops above.
        mean: Of each channel, in place of the model's.
        std: Likewise.
        flip: Whether training mirrors half of the pictures; not for digits or letters.
    Returns:
        Callable: picture of any mode and size -> float32 [C, H, W]. Randomness comes from torch's generator.
    """
    channels, height, width = input_size_of(model)
    prepare = _preprocessing(model)
    mean, std = (_per_channel(given, channels) for given in (mean or prepare["mean"], std or prepare["std"]))
    resize: tuple[int, int] | int | None = (height, width)
    if train and max(height, width) > 32:
        resize = None
    elif not train and prepare["crop_pct"] is not None:
        resize = int(min(height, width) / prepare["crop_pct"])
    return Preparation(
        mode="L" if channels == 1 else "RGB",
        size=(height, width),
        resize=resize,
        training=train,
        flip=flip,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=prepare["interpolation"],
    )


def set_preprocessing(
    model: nn.Module,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> None:
    """State, by timm's options, how a model's images are prepared; what is None stays as it is.

    It is written into the model's pretrained_cfg: `make_transform` reads it there, and a checkpoint carries it along.

    Args:
        model: Of timm, or a class of your own.
        mean, std: Of each channel, of pixels from 0 to 1.
        crop_pct: Share of the picture's shorter side that the central crop takes, in (0, 1].
        interpolation: "nearest", "bilinear", "bicubic", "lanczos", "box" or "hamming".
    Raises:
        ValueError: A value is out of its range, or the model is transformers', whose image processor says all this.

    Example:
        >>> model = timm.create_model("cifar_resnet20")
        >>> set_preprocessing(model, crop_pct=0.9)
        >>> model.pretrained_cfg["crop_pct"]
        0.9
    """
    given = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": interpolation}
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return
    if hasattr(getattr(model, "config", None), "model_type"):
        told = ", ".join(f"{key}={value}" for key, value in given.items())
        raise ValueError(
            f"{told}: a transformers model's images are prepared as its image processor says. Change "
            "preprocessor_config.json beside it."
        )
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct}: the share of the shorter side must be in (0, 1]. ImageNet's is 0.875.")
    if std is not None and min(std) <= 0:
        raise ValueError(f"std={std}: each must be above 0. ImageNet's are 0.229, 0.224, 0.225.")
    if interpolation is not None and interpolation not in INTERPOLATIONS.values():
        raise ValueError(f"interpolation={interpolation!r}: it must be one of {', '.join(INTERPOLATIONS.values())}.")
    cfg = getattr(model, "pretrained_cfg", None) or {"input_size": input_size_of(model)}
    model.pretrained_cfg = model.default_cfg = {**cfg, **given}


def load_processor(model: nn.Module) -> Any:
    """Load the image processor that a transformers model came with, to be saved beside its slim one.

    Returns:
        The processor; None for a timm model, whose own configuration says the same, and where there is none.
    """
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    if source:
        from transformers import AutoImageProcessor

        with contextlib.suppress(OSError, ValueError):  # what transformers raises for a folder without one
            return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    return None


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    """Read mean, std, interpolation and crop_pct (None: no crop) from a model's configuration."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "model_type"):
        return _processor_settings(getattr(config, "_name_or_path", ""), input_size_of(model)[1])
    cfg = timm.data.resolve_data_config(getattr(model, "pretrained_cfg", None) or {"input_size": input_size_of(model)})
    return {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")}


def _processor_settings(source: str, size: int) -> dict[str, Any]:
    """Read a transformers image processor's settings; ViT's own where a model has none."""
    folder = Path(source) / "preprocessor_config.json" if source else None
    path = folder if folder and folder.is_file() else cached(source, "preprocessor_config.json")
    settings: dict[str, Any] = {}
    if path is None and source and not Path(source).is_dir() and cached(source):
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(Exception):  # a model without a processor is no error
            path = Path(hf_hub_download(source, "preprocessor_config.json", etag_timeout=CONNECT_TIMEOUT_S))
    if path is not None:
        settings = read_json(path, f"model {source!r}")
    _check_settings(settings, f"model {source!r}: preprocessor_config.json")
    resize = settings.get("size")
    shortest = resize.get("shortest_edge") if isinstance(resize, dict) else None
    crop_pct = settings.get("crop_pct")
    if crop_pct is None and shortest and settings.get("do_center_crop"):
        crop_pct = size / shortest
    return {
        "mean": tuple(settings.get("image_mean") or (0.5, 0.5, 0.5)),
        "std": tuple(settings.get("image_std") or (0.5, 0.5, 0.5)),
        "interpolation": INTERPOLATIONS[2 if settings.get("resample") is None else settings["resample"]],
        "crop_pct": crop_pct,
    }


def _check_settings(settings: dict[str, Any], where: str) -> None:
    """Refuse what of an image processor's settings cannot prepare a picture."""

    def are_numbers(values: Any, above: float) -> bool:
        return isinstance(values, list) and 0 < len(values) <= 64 and all(_is_number(v) and v > above for v in values)

    rules = {
        "image_mean": lambda value: are_numbers(value, -1e6),
        "image_std": lambda value: are_numbers(value, 0),
        "resample": lambda value: type(value) is int and value in INTERPOLATIONS,
        "crop_pct": lambda value: _is_number(value) and 0.01 <= value <= 1,
        "size": lambda value: (
            not isinstance(value, dict)
            or value.get("shortest_edge") is None
            or (_is_number(value["shortest_edge"]) and 1 <= value["shortest_edge"] <= 4096)
        ),
    }
    for key, fits in rules.items():
        if settings.get(key) is not None and not fits(settings[key]):
            raise ValueError(f"{where} has {key} = {short(settings[key])}, which prepares no picture. Mend it.")


def _is_number(value: Any) -> bool:
    """Say whether a value of JSON is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    """Spread statistics of three channels over however many a model takes."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
