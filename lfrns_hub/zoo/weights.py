"""Weights from a file: read without running any code, and loaded into a model that they fit."""

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.format.untrusted import is_shortage, short
from lfrns_hub.pictures import num_classes_of


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a .pth with only tensors (never unpickled code).

    Args:
        path: The file. In a training checkpoint the averaged (EMA) weights are preferred to the plain ones.
    Returns:
        Tensors on the CPU, by name, without the prefixes "module." and "_orig_mod.".
    Raises:
        ValueError: There is no file, or it has no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights={str(path)!r}: there is no such file. Give a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = _load_pickled(path)
    except Exception as error:  # torch and safetensors raise a dozen error types for a foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if is_shortage(error):
            reason = "it states more than the memory holds"
        raise ValueError(
            f"weights={str(path)!r}: holds no plain tensors ({reason[:150]}). Save model.state_dict() as safetensors."
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not state:
        raise ValueError(f"weights={str(path)!r}: holds no state_dict. Save model.state_dict() as safetensors.")
    if larger := next((key for key, value in state.items() if not _lies_in_file(value)), None):
        raise ValueError(
            f"weights={str(path)!r}: {short(larger)} has shape {short(list(state[larger].shape))}, of which the file "
            "does not hold each element. Save model.state_dict() as safetensors."
        )
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def _load_pickled(path: Path) -> Any:
    """Load a pickle whose tensors are no larger than the file: none is compressed, or states a larger size."""
    size, stated = path.stat().st_size, 0
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"{short(packed[0])} in it is compressed, as torch.save writes none")
        if (held := sum(part.file_size for part in parts)) > size:
            raise ValueError(f"its parts have {held:,} bytes, the file {size:,}")

    def count(storage: Any, location: str) -> Any:
        nonlocal stated
        stated += storage.nbytes()
        if stated > size:
            raise ValueError(f"it states tensors of {stated:,} bytes, the file has {size:,}")
        return storage

    return torch.load(path, map_location=count, weights_only=True)


def _lies_in_file(tensor: Tensor) -> bool:
    """Return whether each element of a tensor has its own place in its storage."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def rows_of(state: dict[str, Tensor], own: dict[str, Tensor], key: str, width: int | None = None) -> int | None:
    """Return the number of classes of a head in some weights; None if its width is not that of `own`, or `width`."""
    widths = own[key].shape[1:] if key in own else (width,)
    return state[key].shape[0] if key in state and state[key].shape[1:] == widths else None


def fit_head(model: nn.Module, rebuild: Callable[[int], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """Rebuild a model with the number of classes of the head in its weights."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    name = name[0] if isinstance(name, (tuple, list)) else name
    if not name:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        name = linears[-1] if linears else ""
    key, width = f"{name}.weight", getattr(model, "head_hidden_size", getattr(model, "num_features", None))
    if key in state and (rows := rows_of(state, model.state_dict(), key, width)) is None:
        return model  # the model's own error then explains what does not fit
    return model if key in state and rows == num_classes_of(model) else rebuild(rows if key in state else 0)


def load_strictly(model: nn.Module, state: dict[str, Tensor], call: str) -> None:
    """Load weights strictly: none may be missing, left over or of another shape."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        own = model.state_dict()
        kinds = {
            "missing": [key for key in own if key not in state],
            "unexpected": [key for key in state if key not in own],
            "misshapen": [key for key in own if key in state and own[key].shape != state[key].shape],
        }
        found = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:2])})" for kind, keys in kinds.items() if keys)
        raise ValueError(
            f"{call}: the weights do not fit {type(model).__name__}: {found}. Give those of this model."
        ) from error
