"""Files that anybody may have written: read within bounds, or refused with one clear error.

What is trusted and what is not stands in SECURITY.md.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lfrns_hub.narrow import short

__all__ = [
    "AGAIN",
    "Header",
    "bounded",
    "parse_json",
    "read_headers",
    "read_json",
    "refuse_large",
    "refusing",
    "short",
    "without_code",
]

# A ViT-H plan is 3 MB of JSON, a header of 2,000 tensors 0.2 MB; parsed, JSON takes up to 30 times its size.
MAX_JSON_BYTES = 16 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_NUMBER = 1 << 20  # of a size in a config: the largest published vocabulary has 901,629 entries
# Parts of a network that hold no parameter (activations, dropouts, containers) for each that does.
MODULES_PER_TENSOR = 16
CODE_KEYS = ("auto_map", "custom_pipelines")  # by which transformers finds code beside a config
AGAIN = "The file is damaged or hostile: download it again, or save the model again."


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of one tensor.

    Attributes:
        shape: The shape.
        dtype: By safetensors' name, such as "F32".
        file: Where it lies.
    """

    shape: list[int]
    dtype: str
    file: Path


def read_json(path: str | os.PathLike[str], call: str) -> dict[str, Any]:
    """Read a JSON object of at most 16 MiB and 64 levels.

    Args:
        path: The file.
        call: What the user called, for the error.
    Raises:
        ValueError: It is no JSON object, too large, or too deep.
    """
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file() or size > MAX_JSON_BYTES:
        raise ValueError(f"{call}: {path.name} has {size:,} bytes, at most {MAX_JSON_BYTES:,} are read. {AGAIN}")
    return parse_json(path.read_bytes(), f"{call}: {path.name}")


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object of at most 16 MiB and 64 levels.

    Args:
        text: JSON, UTF-8 if it is bytes.
        what: Names it in the error.
    Raises:
        ValueError: It is no JSON object, too large, or too deep.
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
    """Read what a folder's weights hold, without reading the weights: model.safetensors, else its shards.

    Shards are found by their names. An index, which could name files elsewhere, is not followed.

    Raises:
        ValueError: There is no such file, or one is cut short, damaged or larger in its header than 16 MiB.
    """
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise ValueError(f"{call}: it has no model.safetensors. Pickled weights are not read: save the model again.")
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
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    found[name] = Header(list(part.get_shape()), str(part.get_dtype()), path)
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            raise ValueError(f"{call}: {path.name} cannot be read ({short(str(error), 120)}). {AGAIN}") from error
    return found


def without_code(fields: Any) -> Any:
    """Return what a config states, but for what names code to be run by `trust_remote_code`, at any depth."""
    if isinstance(fields, dict):
        return {key: without_code(value) for key, value in fields.items() if key not in CODE_KEYS}
    return [without_code(item) for item in fields] if isinstance(fields, list) else fields


def refuse_large(values: Any, what: str, most: int = MAX_NUMBER) -> None:
    """Refuse numbers in a config that would build what no machine holds.

    Args:
        values: A number, or lists and dicts with numbers in them.
        what: Names them in the error.
        most: The largest number.
    Raises:
        ValueError: One is larger, in absolute value, or no number at all (NaN).
    """
    if isinstance(values, (dict, list, tuple)):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            refuse_large(value, f"{what}[{short(key)}]", most)
    elif isinstance(values, (int, float)) and not -most <= values <= most:
        raise ValueError(f"{what} = {short(values)}: sizes must lie from -{most} to {most}. {AGAIN}")


@contextmanager
def bounded(tensors: int) -> Iterator[dict[str, int]]:
    """Stop a constructor that makes more parts than a file can fill.

    Args:
        tensors: How many the file holds. Twice as many parameters may be made: a constructor makes a head anew.
    Yields:
        What was made so far: parameters, modules, and elements, of all parameters together.
    Raises:
        ValueError: More parameters, or more than 16 modules for each, were made.
    """
    most = {"parameters": 2 * tensors + 64, "modules": MODULES_PER_TENSOR * tensors + 4096}
    made = {"parameters": 0, "modules": 0, "elements": 0}

    def count(kind: str) -> None:
        made[kind] += 1
        if made[kind] > most[kind]:
            raise ValueError(
                f"the config asks for more than {most[kind]:,} {kind}, the weights hold {tensors:,} tensors. {AGAIN}"
            )

    def on_parameter(module: nn.Module, name: str, parameter: Any) -> None:
        count("parameters")
        made["elements"] += parameter.numel()

    def on_module(module: nn.Module, name: str, part: Any) -> None:
        count("modules")

    hooks = [
        register_module_parameter_registration_hook(on_parameter),
        register_module_module_registration_hook(on_module),
    ]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def refusing(call: str) -> Iterator[None]:
    """Turn whatever a library raises over a config into one error: each architecture refuses in its own way."""
    try:
        yield
    except Exception as error:
        reason = short(str(error) or type(error).__name__, 400).removesuffix(AGAIN).rstrip(". ")
        raise ValueError(f"{call}: config.json builds no model ({reason}). {AGAIN}") from error
