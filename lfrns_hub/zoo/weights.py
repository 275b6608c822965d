"""Weights from a file: read without running any code, and loaded into a model that they fit."""

import mmap
import os
import re
import sys
import textwrap
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lfrns_hub.format.untrusted import is_shortage, read_json, short
from lfrns_hub.pictures import num_classes_of

# Of Python's own modules, those whose objects training programs keep next to the weights; they are not read.
NOTED = {"argparse", "collections", "copyreg", "datetime", "enum", "functools", "pathlib", "types", "typing", "uuid"}
BUILTINS = {f"builtins.{name}" for name in ("complex", "frozenset", "object", "range", "set", "slice")}


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict: safetensors, in shards too, or what `torch.save` wrote (never unpickled code).

    Args:
        path: A file, an index of shards, or the folder of either. Of a training checkpoint (timm's train.py, Lightning,
            and others) the averaged (EMA) weights are taken before the plain ones.
    Returns:
        Tensors on the CPU, by name, without "module." and "_orig_mod." in front.
    Raises:
        ValueError: No file, or one that holds no state dict.
    """
    path = Path(path)
    call = f"weights={str(path)!r}"
    files = _files_of(path, call)
    try:
        state: Any = {}
        for file in files:
            state |= load_file(file) if file.suffix == ".safetensors" else _load_pickled(file)
    except Exception as error:  # torch and safetensors raise a dozen types for a file that is not theirs
        reason = "it states more than the memory holds" if is_shortage(error) else _plain(error)
        raise ValueError(
            f"{call}: holds no plain tensors ({reason}). Save model.state_dict() as safetensors."
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state.get(key), dict) and any(isinstance(value, Tensor) for value in state[key].values()):
            state = state[key]
            break
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    if not state:
        raise ValueError(f"{call}: holds no state_dict. Save model.state_dict() as safetensors.")
    if larger := next((key for key, value in state.items() if not _lies_in_file(value)), None):
        raise ValueError(
            f"{call}: {short(larger)} has shape {short(list(state[larger].shape))}, of which the file does not hold "
            "each element. Save model.state_dict() as safetensors."
        )
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def without_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the "model." that a Lightning module puts in front of each name."""
    if not all(key.startswith("model.") for key in state):
        return state
    return {re.sub(r"^model\.(_orig_mod\.)?", "", key): value for key, value in state.items()}


def _files_of(path: Path, call: str) -> list[Path]:
    """Return the files that hold the weights: one, or the shards of an index, which lie next to it.

    Raises:
        ValueError: There is none, or a shard is missing.
    """
    if path.is_dir():
        for name in ("model.safetensors", "model.safetensors.index.json"):
            if (path / name).is_file():
                return _files_of(path / name, call)
        raise ValueError(f"{call}: the folder holds no model.safetensors and no index of shards. Give the file itself.")
    if not path.is_file():
        raise ValueError(f"{call}: there is no such file. Give a .safetensors, .pth or .ckpt file.")
    if not path.name.endswith(".index.json"):
        return [path]
    stated = read_json(path, call).get("weight_map")
    names = sorted({str(name) for name in stated.values()}) if isinstance(stated, dict) else []
    files = [path.parent / name for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if name != file.name or not file.is_file()]
    if missing or not files:
        raise ValueError(f"{call}: the index names {short(missing or stated)}, no file next to it. Download it again.")
    return files


def _plain(error: Exception) -> str:
    """Return the first line of an error, without escape codes, cut between words."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).partition("\n")[0]
    return short(textwrap.shorten(line, 150, placeholder=" ...") or type(error).__name__, 160)


class _Unread:
    """Stands for an object that is not read: nothing is imported, called or kept of it."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def _take(self, *_: Any) -> None:
        pass

    __setstate__ = append = extend = _take


class _UnreadDict(OrderedDict):
    """Stands for a dict of options: torch puts items into no class of one's own."""

    def __new__(cls, *_: Any, **__: Any) -> OrderedDict:
        return OrderedDict()


def _stand_ins(names: list[str], dicts: bool) -> list[tuple[type, str]]:
    """Return stand-ins for the classes that a pickle names besides tensors: options and notes of a training run.

    Raises:
        ValueError: One is no class that a training run has a reason to note.
    """
    made = []
    for name in names:
        module = name.partition(".")[0]
        known = module in sys.stdlib_module_names
        if known and module not in NOTED and name not in BUILTINS:
            raise ValueError(f"it would call {short(name)}")
        made.append((_UnreadDict if dicts and not known and module != "numpy" else _Unread, name))
    return made


def _load_pickled(path: Path) -> dict[str, Any]:
    """Load a pickle whose tensors are no larger than the file: none is compressed, or states a larger size."""
    size, stated, named = path.stat().st_size, 0, []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"{short(packed[0])} in it is compressed, as torch.save writes none")
        if (held := sum(part.file_size for part in parts)) > size:
            raise ValueError(f"its parts have {held:,} bytes, the file {size:,}")
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # torch itself calls these, and they allocate what a number says; weights are kept without them.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if calls := re.search(
            rb"c(builtins|__builtin__|torch\.storage)\n(bytearray|UntypedStorage|TypedStorage)\n", content
        ):
            raise ValueError(f"it would call {calls[2].decode()}")

    def count(storage: Any, location: str) -> Any:
        nonlocal stated
        stated += storage.nbytes()
        if stated > size:
            raise ValueError(f"it states tensors of {stated:,} bytes, the file has {size:,}")
        return storage

    def load(dicts: bool) -> Any:
        nonlocal stated
        stated = 0
        with torch.serialization.safe_globals(_stand_ins(named, dicts)):
            return torch.load(path, map_location=count, weights_only=True)

    try:
        loaded = load(dicts=True)
    except Exception:  # torch's own, of a module that is not imported here
        if not named:
            raise
        loaded = load(dicts=False)
    return loaded if isinstance(loaded, dict) else {}


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
        found = "; ".join(f"{len(keys)} {kind} ({short(', '.join(keys[:2]))})" for kind, keys in kinds.items() if keys)
        raise ValueError(
            f"{call}: the weights do not fit {type(model).__name__}: {found}. Give those of this model."
        ) from error
