"""Models at another size of images than the one they were trained at."""

import copy
import inspect
import sys
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn

from lfrns_hub.format.untrusted import short
from lfrns_hub.pictures import example_input, input_size_of, is_of_transformers


def resized(model: nn.Module, side: int, call: str) -> nn.Module:
    """Build a model for square images of another size.

    Weights that depend on the size are interpolated as the model's library does it: timm for models that take
    `img_size`, transformers for embeddings of positions. All other models keep their weights, and only state the size.

    Args:
        model: A dense model; it may be changed in place.
        side: Height and width of the images in pixels.
        call: The user's call, for errors.
    Returns:
        The model, or a new one with its weights; `input_size_of` returns the new size.
    Raises:
        ValueError: The weights cannot be interpolated, or the model does not run on such images.
    """
    native = input_size_of(model)
    if native[1:] == (side, side):
        return model
    way_out = f"Give another size, such as a multiple of its patches or windows, or leave it out for {native[1]}."
    try:
        if is_of_transformers(model):
            model = _resized_transformers(model, side)
        else:
            model = _resized_timm(model, side)
        with torch.no_grad():
            model.eval()(example_input(model))
    except Exception as error:  # each architecture raises its own error
        reason = short(" ".join(str(error).split()).rstrip(".") or type(error).__name__, 160)
        raise ValueError(
            f"{call}: {type(model).__name__} cannot be used at {side} x {side} pixels ({reason}). {way_out}"
        ) from error
    return model


def _resized_timm(model: nn.Module, side: int) -> nn.Module:
    """Resize a timm model in place or, if its class only takes the size, build it again; state the size."""
    channels, cfg = input_size_of(model)[0], getattr(model, "pretrained_cfg", None) or {}
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(side, side))
    elif timm.is_model(cfg.get("architecture") or "") and _takes_size(type(model)):
        twin = timm.create_model(cfg["architecture"], **{**get_model_args(model), "img_size": side})
        model = _filled(twin, model.state_dict())
    kept = {key: value for key, value in cfg.items() if key not in ("pool_size", "test_input_size", "test_crop_pct")}
    model.pretrained_cfg = model.default_cfg = {**kept, "input_size": (channels, side, side)}
    return model


def _takes_size(model_class: type) -> bool:
    """Return whether a class of timm, or one that it extends, is built for a size of images."""
    return any("img_size" in inspect.signature(one.__init__).parameters for one in model_class.__mro__)


def _filled(twin: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load weights of another size into a timm model, interpolated by its file's own filter of checkpoints."""
    own = twin.state_dict()
    if any(own[name].shape != value.shape for name, value in state.items()):
        interpolate = getattr(sys.modules[type(twin).__module__], "checkpoint_filter_fn", None)
        if interpolate is None:
            raise ValueError("timm does not interpolate its weights")
        state = interpolate(dict(state), twin)
    twin.load_state_dict(state, strict=True)
    return twin


def _resized_transformers(model: Any, side: int) -> nn.Module:
    """Build a transformers model with another `image_size` and the same weights."""
    if not hasattr(model.config, "image_size"):  # no layer depends on it
        model.config.image_size = side
        return model
    config = copy.deepcopy(model.config)
    config.image_size = side
    with torch.device(next(model.parameters()).device):
        twin = type(model)(config).eval()
    state = model.state_dict()
    for name, own in twin.state_dict().items():
        if own.shape != state[name].shape:
            state[name] = _interpolated(model, name, own, side)
    twin.load_state_dict(state, strict=True)
    return twin


def _interpolated(model: nn.Module, name: str, like: Tensor, side: int) -> Tensor:
    """Return embeddings of positions at another size, [1, tokens, width], as a model's own forward makes them."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf != "position_embeddings" or not hasattr(module, "interpolate_pos_encoding"):
        raise ValueError(f"transformers does not interpolate {name}")
    with torch.no_grad():
        return module.interpolate_pos_encoding(torch.empty(like.shape, device=like.device), side, side)
