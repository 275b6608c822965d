"""Inputs and classes of a model: its number of classes, their names, its input size, an example."""

import contextlib

import timm
import torch
from torch import Tensor, nn

from lfrns_hub.format.untrusted import short

MAX_NUMBERS = 1 << 26  # of an image: four channels of 4,096 x 4,096 pixels


def num_classes_of(model: nn.Module) -> int:
    """Return the number of a model's classes; 0 for a backbone without a head.

    Example:
        >>> num_classes_of(timm.create_model("cifar_resnet20"))
        10
    """
    if hasattr(model, "num_classes"):
        return int(model.num_classes)
    if hasattr(model, "config") and hasattr(model.config, "num_labels"):
        return int(model.config.num_labels)
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return heads[-1].out_features if heads else 0


def class_names_of(model: nn.Module) -> list[str] | None:
    """Return a model's names for its classes, in the order of its logits; None where it only numbers them.

    They are in a transformers config, in timm's pretrained_cfg, or in `label_names`, where `lfrns_hub.load` sets
    those of a custom class.
    """
    names = getattr(model, "label_names", None) or (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    by_number = getattr(getattr(model, "config", None), "id2label", None)
    if not names and isinstance(by_number, dict):
        names = [by_number.get(number) for number in range(len(by_number))]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    return None if unnamed or len(names) != num_classes_of(model) else list(names)


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of a model's images; 3, 224, 224 where nothing states them.

    Raises:
        ValueError: Its configuration states an invalid size, or one of more than 2^26 numbers.

    Example:
        >>> input_size_of(timm.create_model("cifar_resnet20", in_chans=1))
        (1, 32, 32)
    """
    try:
        channels, height, width = _stated_size(model)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__}: its configuration states no size of images ({short(str(error), 120)}). Mend it."
        ) from error
    if min(channels, height, width) < 1 or channels * height * width > MAX_NUMBERS:
        raise ValueError(
            f"{type(model).__name__}: its configuration states images of {channels} x {height} x {width}: each must be "
            f"1 or more, and their product at most {MAX_NUMBERS:,}. Mend it."
        )
    return channels, height, width


def _stated_size(model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width as stated by a model or its configuration."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        return int(config.num_channels), int(height), int(width)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    # A model built with img_size= or in_chans= keeps the published cfg, so its layers have priority.
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size:
        height, width = size
    first = cfg.get("first_conv")
    first = next(iter(first), None) if isinstance(first, (tuple, list)) else first
    if first:
        with contextlib.suppress(AttributeError):
            layer = model.get_submodule(first)
            # In a TResNet the first convolution reads blocks of pixels as channels.
            block = next((m.bs for m in model.modules() if isinstance(m, timm.layers.SpaceToDepth)), 1)
            channels = layer.in_channels // block**2 if isinstance(layer, nn.Conv2d) else channels
    return int(channels), int(height), int(width)


def example_input(model: nn.Module, batch: int = 1) -> Tensor:
    """Return random images for a model, the same at every call.

    Args:
        model: Its configuration and layers state the size.
        batch: Number of images.
    Returns:
        Images [batch, C, H, W], normally distributed, of the model's dtype and on its device.
    Raises:
        ValueError: As for `input_size_of`: the size that it states is not valid.

    Example:
        >>> example_input(timm.create_model("cifar_resnet20"), batch=2).shape
        torch.Size([2, 3, 32, 32])
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    shape = (batch, *input_size_of(model))
    if like.is_meta:
        return torch.empty(shape, dtype=like.dtype, device="meta")
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return images.to(device=like.device, dtype=like.dtype)
