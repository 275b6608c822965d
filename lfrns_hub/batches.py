"""What loaders yield and models answer, in one form: timm's tuples, transformers' dicts, bare images, lists of maps.

N images, K classes, F features.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

# Label of a picture that could not be read: `F.cross_entropy` ignores it, and evaluation leaves the picture out.
UNREADABLE = -100
# Where the labels of a dict may stand: as transformers' collators, datasets and torch's own examples name them.
LABEL_KEYS = ("labels", "label", "label_ids", "targets", "target")


def split_batch(batch: Any) -> tuple[Tensor, Any]:
    """Split one batch of a loader into images and labels.

    Args:
        batch: `(images, labels)`, a dict with `pixel_values` and perhaps `labels`, or bare images [N, C, H, W].
    Returns:
        Images [N, C, H, W] and labels as the loader has them, None where the batch has none. Of a dict without any of
        LABEL_KEYS all else that it holds, by name: it may be of several heads.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        if "pixel_values" not in batch:
            raise ValueError(f"a batch has the keys {sorted(batch.keys())}: images must come as 'pixel_values'.")
        keys = [key for key in LABEL_KEYS if batch.get(key) is not None]
        others = {key: value for key, value in batch.items() if key != "pixel_values" and value is not None}
        return batch["pixel_values"], batch[keys[0]] if keys else others or None
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0], batch[1] if len(batch) > 1 else None
    raise ValueError(f"a batch is a {type(batch).__name__}: yield (images, labels), a dict, or bare images.")


def check_finite(images: Tensor, call: str) -> None:
    """Refuse images with values that are not finite: every figure taken from them would be noise."""
    if images.is_floating_point() and not (finite := images.isfinite()).all():
        bad = (~finite).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"{call}: {len(bad)} of {len(images)} images of a batch have values that are not finite (first: image "
            f"{bad[0]}). Look at what prepares them, a division by a standard deviation of 0 for one."
        )


def iterate(loader: Any) -> Iterator[tuple[Tensor, Any]]:
    """Yield (images, labels or None) for each batch of a loader.

    Raises:
        TypeError: It is nothing that yields batches.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"loader={type(loader).__name__}: what yields batches is needed, such as a DataLoader or a list of them."
        )
    for batch in loader:
        yield split_batch(batch)


def named_tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """Return every floating-point tensor of a model's output by its name, in its own order.

    Args:
        output: A tensor; a mapping, list, tuple or dataclass of such, nested as it may be; an object with `.logits`.
        name: Of the whole; of a part of it: its key, field or place, after its owner's name and a dot.

    Example:
        >>> list(named_tensors({"out": torch.zeros(2), "levels": [torch.zeros(3), None]}))
        ['out', 'levels.0']
    """
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() else {}
    if isinstance(output, Mapping):
        parts = dict(output)
    elif isinstance(output, (tuple, list)):
        parts = dict(enumerate(output))
    elif is_dataclass(output):
        parts = {field.name: getattr(output, field.name) for field in fields(output)}
    else:
        parts = {"logits": output.logits} if hasattr(output, "logits") else {}
    named: dict[str, Tensor] = {}
    for key, part in parts.items():
        named |= named_tensors(part, f"{name}.{key}" if name else str(key))
    return named


def read_tensors(output: Any) -> list[Tensor]:
    """Return every floating-point tensor of a model's output, in its own order."""
    return list(named_tensors(output).values())


def find_logits(output: Any) -> Tensor | None:
    """Give the logits [N, K] of a model's output, or None where it has none.

    Logits are what the output calls so (transformers), its only tensor if that is [N, K] (timm), or the first of a list
    or tuple whose tensors are all [N, K] alike: those of auxiliary heads come after it. Heads with names are several.
    Outputs [N] are one an image, [N, 1].
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    tensors = [named] if isinstance(named, Tensor) else read_tensors(output)
    alike = bool(tensors) and tensors[0].ndim in (1, 2) and all(t.shape == tensors[0].shape for t in tensors)
    if not alike or (len(tensors) > 1 and isinstance(output, Mapping)):
        return None
    return tensors[0] if tensors[0].ndim == 2 else tensors[0][:, None]


def read_rows(output: Any) -> dict[str, Tensor]:
    """Give every floating-point tensor of a model's output with a row an image, [N, f] each, by name.

    The first tensor says how many images; one that has not as many rows (anchors, a constant) stands beside each.

    Raises:
        ValueError: The output holds no floating-point tensor.
    """
    tensors = named_tensors(output)
    if not tensors:
        raise ValueError(
            f"the model answers with {type(output).__name__} without a floating-point tensor: answer with a tensor, "
            "or a list, tuple, dict or dataclass of tensors."
        )
    first = next(iter(tensors.values()))
    images = first.shape[0] if first.ndim else 1
    return {
        name: t.reshape(images, -1) if t.ndim and t.shape[0] == images else t.reshape(1, -1).expand(images, -1)
        for name, t in tensors.items()
    }


def flatten_output(output: Any) -> Tensor:
    """Give all that a model answers as one tensor [N, F], its tensors side by side.

    Example:
        >>> flatten_output([torch.zeros(2, 3), torch.zeros(2, 4, 5, 5)]).shape
        torch.Size([2, 103])
    """
    rows = list(read_rows(output).values())
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def read_logits(output: Any) -> Tensor:
    """Give the logits [N, K] of a model's output; of one that holds no logits, all that it answers, [N, F]."""
    logits = find_logits(output)
    return flatten_output(output) if logits is None else logits
