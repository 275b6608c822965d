"""Batches of loaders and outputs of models in one form: timm's tuples, transformers' dicts, images only, lists of maps.

N images, K classes, F features.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batches = Sequence[tuple[Tensor, Any]]  # images in the dtype of the analysis, labels as loaded
# Label of an image that could not be read: `F.cross_entropy` ignores it, and evaluation leaves the image out.
UNREADABLE = -100
# Keys of labels in a dict: the names in transformers' collators, in datasets and in torch's own examples.
LABEL_KEYS = ("labels", "label", "label_ids", "targets", "target")


def split_batch(batch: Any) -> tuple[Tensor, Any]:
    """Split one batch of a loader into images and labels.

    Args:
        batch: `(images, labels)`, a dict with `pixel_values` and perhaps `labels`, or only images [N, C, H, W].
    Returns:
        Images [N, C, H, W] and labels as loaded, None where the batch has none. For a dict without any of LABEL_KEYS,
        all its other entries by name: there may be several heads.
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
    """Refuse images with values that are not finite: every figure computed from them would be noise."""
    if images.is_floating_point() and not (finite := images.isfinite()).all():
        bad = (~finite).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"{call}: {len(bad)} of {len(images)} images of a batch have values that are not finite (first: image "
            f"{bad[0]}). Look at what prepares them, a division by a standard deviation of 0 for one."
        )


def iterate(loader: Any) -> Iterator[tuple[Tensor, Any]]:
    """Yield (images, labels or None) for each batch of a loader.

    Raises:
        TypeError: The loader does not yield batches.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"loader={type(loader).__name__}: what yields batches is needed, such as a DataLoader or a list of them."
        )
    for batch in loader:
        yield split_batch(batch)


def shuffle_images(
    batches: list[tuple[Tensor, Any]], *, held_out_every: int, seed: int = 0
) -> list[tuple[Tensor, Any]]:
    """Deal the images of a loader into new batches, in an order that depends only on the images and the seed.

    Otherwise, with a loader that yields one class after another, the held-out batches would have other classes than
    the fitting ones. The choice of held-out images depends on neither the loader's order nor its batch size, and is the
    same on every process, even if each of them reads the loader in its own order.

    Args:
        batches: Images [N, C, H, W] and labels as loaded; the list is emptied, so that the images are not in memory
            twice.
        held_out_every: The last of this many consecutive batches is held out, with as large a share of the images.
        seed: Seed of the order.
    Returns:
        Batches of images of one size each, the most frequent size first, none larger than the loader's largest. If
        there are fewer images of a size than `held_out_every`, none of them is held out. Labels keep their form, each
        with its image.
    Raises:
        ValueError: Only some batches have labels.
    """
    labels, sizes = [labels for _, labels in batches], [len(batch) for batch, _ in batches]
    places = [(number, row) for number, size in enumerate(sizes) for row in range(size)]
    images: list[Tensor] = []
    for number in range(len(sizes)):
        images += map(Tensor.clone, batches[number][0])
        batches[number] = None  # only one batch at a time exists twice
    batches.clear()
    if 0 < sum(part is None for part in labels) < len(labels):
        raise ValueError("loader: some batches have labels and others have none. Give labels with all or with none.")
    keys = [_content_key(image, seed) for image in images]
    same_size = {(image.shape, image.dtype): [] for image in images}
    for index in sorted(range(len(images)), key=keys.__getitem__):
        same_size[images[index].shape, images[index].dtype].append(index)
    dealt, rest = [], []
    for indices in sorted(same_size.values(), key=len, reverse=True):
        rounds, left = _deal(indices, max(sizes), held_out_every)
        dealt += rounds
        rest += left

    def batch_of(indices: list[int]) -> tuple[Tensor, Any]:
        stacked = torch.stack([images[index] for index in indices])
        for index in indices:
            images[index] = None
        return stacked, take_labels(labels, sizes, [places[index] for index in indices])

    return [batch_of(indices) for indices in dealt + rest]


def _deal(indices: list[int], batch_size: int, every: int) -> tuple[list[list[int]], list[list[int]]]:
    """Deal indices into rounds of `every` batches, the last of each held out; also return batches of the rest."""
    held, fit = indices[: len(indices) // every], indices[len(indices) // every :]
    rounds = min(len(held), -(-len(fit) // ((every - 1) * batch_size)))
    inside = min(len(fit), rounds * (every - 1) * batch_size)
    held, fitted, left = _split_evenly(held, rounds), _split_evenly(fit[:inside], rounds * (every - 1)), fit[inside:]
    dealt = []
    for number, last in enumerate(held):
        dealt += [*fitted[number * (every - 1) : (number + 1) * (every - 1)], last]
    return dealt, [left[start : start + batch_size] for start in range(0, len(left), batch_size)]


def _split_evenly(indices: list[int], parts: int) -> list[list[int]]:
    """Split a list into parts whose lengths differ by at most one."""
    return [indices[len(indices) * n // parts : len(indices) * (n + 1) // parts] for n in range(parts)]


def _content_key(image: Tensor, seed: int) -> bytes:
    """Return a hash of an image's content and the seed."""
    values = image.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values, digest_size=8, salt=(seed % 2**64).to_bytes(8, "little")).digest()


def take_labels(labels: Sequence[Any], sizes: Sequence[int], places: Sequence[tuple[int, int]]) -> Any:
    """Collect the labels of some images into one batch, in the loader's form.

    Args:
        labels: Labels of each batch: a tensor or array [N, ...], a list or tuple of N, a dict or tuple of these, or
            None.
        sizes: N of each batch.
        places: Batch and row of each image.
    Returns:
        Labels in the form of one batch of the loader, lists as lists; also a list where tensors of several shapes are
        combined, or where a batch has one label for all of its images.

    Example:
        >>> take_labels([{"a": torch.tensor([1, 2])}, {"a": torch.tensor([3])}], [2, 1], [(1, 0), (0, 1)])
        {'a': tensor([3, 2])}
    """
    first = labels[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {name: take_labels([part[name] for part in labels], sizes, places) for name in first}
    if all(_has_rows(part, size) for part, size in zip(labels, sizes, strict=True)):
        rows = [labels[batch][row] for batch, row in places]
        if isinstance(first, Tensor):
            return torch.stack(rows) if len({(row.shape, row.dtype) for row in rows}) == 1 else rows
        return np.stack(rows) if isinstance(first, np.ndarray) else rows
    if isinstance(first, (list, tuple)):  # one entry per task, each with one row per image
        return tuple(take_labels([part[task] for part in labels], sizes, places) for task in range(len(first)))
    return [labels[batch] for batch, _ in places]


def _has_rows(labels: Any, size: int) -> bool:
    """Return whether a batch's labels have one row per image."""
    if isinstance(labels, (Tensor, np.ndarray)):
        return labels.ndim > 0 and len(labels) == size
    return isinstance(labels, (list, tuple)) and len(labels) == size


def named_tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """Return every floating-point tensor of a model's output by its name, in its own order.

    Args:
        output: A tensor; a mapping, list, tuple or dataclass of these, also nested; an object with `.logits`.
        name: Name of the whole; a part is named by its key, field or position, after its owner's name and a dot.

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
    """Return the logits [N, K] of a model's output, or None where it has none.

    Logits are the output's `logits` (transformers), its only tensor if that is [N, K] (timm), or the first of a list
    or tuple whose tensors all have one shape [N, K]: auxiliary heads come after it. Named heads count as several.
    Outputs [N] are one per image, [N, 1].
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    tensors = [named] if isinstance(named, Tensor) else read_tensors(output)
    alike = bool(tensors) and tensors[0].ndim in (1, 2) and all(t.shape == tensors[0].shape for t in tensors)
    if not alike or (len(tensors) > 1 and isinstance(output, Mapping)):
        return None
    return tensors[0] if tensors[0].ndim == 2 else tensors[0][:, None]


def read_rows(output: Any) -> dict[str, Tensor]:
    """Return every floating-point tensor of a model's output with one row per image, [N, f] each, by name.

    The first tensor sets the number of images; a tensor with another number of rows (anchors, a constant) is repeated.

    Raises:
        ValueError: The output has no floating-point tensor.
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
    """Return all outputs of a model as one tensor [N, F], its tensors concatenated.

    Example:
        >>> flatten_output([torch.zeros(2, 3), torch.zeros(2, 4, 5, 5)]).shape
        torch.Size([2, 103])
    """
    rows = list(read_rows(output).values())
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def read_logits(output: Any) -> Tensor:
    """Return the logits [N, K] of a model's output; without logits, all its outputs, [N, F]."""
    logits = find_logits(output)
    return flatten_output(output) if logits is None else logits
