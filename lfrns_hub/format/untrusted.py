"""Untrusted files: read within limits, or refused with one clear error.

SECURITY.md states what is trusted.
"""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lfrns_hub.format.narrow import short

__all__ = [
    "AGAIN",
    "Header",
    "is_shortage",
    "memory_of_machine",
    "parse_json",
    "read_headers",
    "read_json",
    "read_weights",
    "refuse_large",
    "refuse_shortage",
    "refusing",
    "short",
    "size_of",
    "without_code",
]

# A ViT-H plan is 3 MB of JSON, a header of 2,000 tensors 0.2 MB; parsed, JSON takes up to 30 times its size.
MAX_JSON_BYTES = 16 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_NUMBER = 1 << 20  # of a size in a config: the largest published vocabulary has 901,629 entries
# Messages of torch, in a RuntimeError.
NO_MEMORY = re.compile(r"DefaultCPUAllocator|CUDA out of memory|std::bad_alloc|Cannot allocate memory")
# By key: sizes from which constructors build lists of all places, in python, and tables of all pairs of places.
SIDES = {re.compile(r"(img|image|input)_?size"): 4096, re.compile(r"window|resol|grid|patch_?size"): 1024}
LABELS = ("num_labels", "num_classes", "id2label", "label2id")
CODE_KEYS = ("auto_map", "custom_pipelines")  # by which transformers finds code next to a config
AGAIN = "The file is damaged or hostile: download it again, or save the model again."


@dataclass(frozen=True)
class Header:
    """Header entry of one tensor in a safetensors file.

    Attributes:
        shape: The shape.
        dtype: safetensors' name, such as "F32".
        file: Path of the file.
    """

    shape: list[int]
    dtype: str
    file: Path


def size_of(headers: dict[str, Header]) -> int:
    """Return the total bytes of the files of some weights."""
    return sum(file.stat().st_size for file in {header.file for header in headers.values()})


def read_json(path: str | os.PathLike[str], call: str) -> dict[str, Any]:
    """Read a JSON object of at most 16 MiB and 64 levels.

    Args:
        path: The file.
        call: The user's call, for the error.
    Raises:
        ValueError: It is not a JSON object, too large, or too deep.
    """
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"{call}: {path.name} is no file. {AGAIN}")
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{call}: {path.name} has {size:,} bytes, at most {MAX_JSON_BYTES:,} are read. {AGAIN}")
    return parse_json(path.read_bytes(), f"{call}: {path.name}")


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object of at most 16 MiB and 64 levels.

    Args:
        text: JSON, UTF-8 if it is bytes.
        what: Name of the text in the error.
    Raises:
        ValueError: It is not a JSON object, too large, or too deep.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{what} has {len(text):,} bytes, at most {MAX_JSON_BYTES:,} are read. {AGAIN}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{what} is no JSON ({short(str(error), 120)}). {AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds {short(value)}, an object of keys and values is needed. {AGAIN}")
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{what} is nested deeper than {MAX_DEPTH} levels. {AGAIN}")
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, (dict, list))]
    return value


def read_headers(folder: Path, call: str) -> dict[str, Header]:
    """Read the tensor headers of a folder, without the weights: model.safetensors, else its shards.

    Shards are found by their names. An index, which could name files outside the folder, is not followed.

    Raises:
        ValueError: There is no such file, or it is cut short, damaged, larger than the memory of this machine or has a
            header larger than 16 MiB.
    """
    whole = folder / "model.safetensors"
    shards = (path for path in folder.glob("model-*-of-*.safetensors") if path.is_file())  # a pipe would never end
    files = [whole] if whole.is_file() else sorted(shards)
    if not files:
        raise ValueError(f"{call}: it has no model.safetensors. Pickled weights are not read: save the model again.")
    whole_size = sum(path.stat().st_size for path in files)
    if whole_size > memory_of_machine():
        named = files[0].name if len(files) == 1 else f"{files[0].name} to {files[-1].name}"
        raise ValueError(
            f"{call}: {named} has {whole_size / 1e9:,.1f} GB, this machine has {memory_of_machine() / 1e9:,.1f} GB of "
            "memory. Open it on a larger one; if it should be smaller, it is damaged or hostile."
        )
    found: dict[str, Header] = {}
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{call}: {path.name} has {size:,} bytes and announces a header of {length:,}; it is cut short or "
                f"larger than {MAX_HEADER_BYTES:,}. {AGAIN}"
            )
        with _reading(path, call), safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                found[name] = Header(list(part.get_shape()), str(part.get_dtype()), path)
    return found


def read_weights(path: Path, call: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, on the CPU, by name.

    Raises:
        ValueError: It is damaged, or the system does not map as much memory.
    """
    with _reading(path, call):
        return load_file(path)


@contextmanager
def _reading(path: Path, call: str) -> Iterator[None]:
    """Convert any error of reading a safetensors file, which is mapped into memory, into one sentence."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError, MemoryError) as error:
        if is_shortage(error):
            raise ValueError(
                f"{call}: {path.name} has {path.stat().st_size / 1e9:,.1f} GB, for which the free memory does not "
                "suffice. End other programs, or open it on a larger machine."
            ) from error
        raise ValueError(f"{call}: {path.name} cannot be read ({short(str(error), 120)}). {AGAIN}") from error


def memory_of_machine() -> float:
    """Return the bytes of memory of this machine; infinite where the system does not say."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if hasattr(os, "sysconf") else float("inf")


def without_code(fields: Any) -> Any:
    """Return the fields of a config without those that name code for `trust_remote_code`, at any depth."""
    if isinstance(fields, dict):
        return {key: without_code(value) for key, value in fields.items() if key not in CODE_KEYS}
    return [without_code(item) for item in fields] if isinstance(fields, list) else fields


def refuse_large(values: Any, what: str, most: int = MAX_NUMBER, labels: int = MAX_NUMBER) -> None:
    """Refuse numbers in a config that would build a model too large for any machine.

    Args:
        values: A number, or lists and dicts with numbers in them.
        what: Name of the values in the error.
        most: The largest number allowed; for pixels of a side 4,096, for patches and windows 1,024.
        labels: The largest number of classes, each of which has a name.
    Raises:
        ValueError: A number is larger, in absolute value, or not a number (NaN).
    """
    if isinstance(values, dict):
        for key, value in values.items():
            inside = f"{what}[{short(key)}]"
            if key in LABELS:
                refuse_large(len(value) if isinstance(value, (dict, list)) else value, inside, labels)
            side = next((side for part, side in SIDES.items() if part.search(str(key))), most)
            refuse_large(value, inside, min(most, side), labels)
    elif isinstance(values, (list, tuple)):
        for place, value in enumerate(values):
            refuse_large(value, f"{what}[{place}]", most, labels)
    elif isinstance(values, (int, float)) and not -most <= values <= most:
        raise ValueError(f"{what} = {short(values)}: sizes must lie from -{most} to {most}. {AGAIN}")


def is_shortage(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, as python, pillow, torch or the system report it."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


def refuse_shortage(error: BaseException, what: str) -> None:
    """Raise an error of its own if memory or open files ran out, rather than a file being damaged.

    Args:
        error: The error of reading a file.
        what: Name of the file in the error.
    Raises:
        MemoryError: Memory ran out.
        OSError: No file could be opened.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise error
    if is_shortage(error):
        raise MemoryError(f"{what}: the memory does not suffice. Use smaller batches or fewer workers.") from error


@contextmanager
def refusing(call: str, way_out: str = AGAIN) -> Iterator[None]:
    """Convert any error of a library about a config into one: each architecture raises its own."""
    try:
        yield
    except Exception as error:
        reason = "it takes more than the memory holds" if is_shortage(error) else str(error) or type(error).__name__
        reason = short(reason, 400).removesuffix(AGAIN).rstrip(". ")
        raise ValueError(f"{call}: config.json builds no model ({reason}). {way_out}") from error
