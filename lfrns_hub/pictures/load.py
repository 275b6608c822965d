"""Datasets by name: a split of a folder, of the Hub, or scikit-learn's digits."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lfrns_hub.pictures.classes import number_names
from lfrns_hub.pictures.decoding import PictureColumn
from lfrns_hub.pictures.image_data import MAX_UNREADABLE, ImageData
from lfrns_hub.pictures.labels import holds_classes, read_labels
from lfrns_hub.pictures.model_input import num_classes_of
from lfrns_hub.pictures.tables import (
    IMAGE_COLUMNS,
    SPLIT_FILES,
    as_files,
    find_column,
    find_labels,
    read_table,
)


def load_data(
    name_or_dir: str | os.PathLike[str],
    split: str,
    *,
    transform: Callable[[Image.Image], Tensor],
    model: nn.Module | None = None,
    label_column: str | None = None,
    val_split: float | None = None,
    class_map: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_unreadable: int = MAX_UNREADABLE,
) -> ImageData:
    """Load a split of labelled images.

    Args:
        name_or_dir: A folder of parquet files (`train-*.parquet`, `validation-*` or `test-*`; a column `img` or
            `image`, and `label` or `fine_label`), an image folder (`train/<class>/*.png`, or `<class>/*.png` with
            `val_split`), a Hub id such as "uoft-cs/cifar100", or "digits", scikit-learn's 8x8 handwritten ones (a
            fifth is held out).
        split: "train", "validation" or "test"; if one of the last two is missing, the other is used.
        transform: Function from image to tensor, from `make_transform`.
        model: The model for the data: labels are then numbered like its classes, by name where both have names, and
            data whose labels are not its classes, or that has none, is refused before an image is decoded. By its
            problem_type, lists are multi-label classes and numbers are quantities, see `read_labels`. None: the classes
            are the data's own, with the same numbers in all splits.
        label_column: Name of the label column, if it is not a usual one.
        val_split: Share of the training images used as validation split, in (0, 1): the same share of each class where
            an image has one, and the same images at every call and for every seed, so that no later call trains on
            them.
        class_map: Text file with the class names in the order of the model's logits, one per line, as in timm.
        limit: Largest number of images, drawn at random and in random order: files are often sorted by class.
        seed: Seed of that draw.
        max_unreadable: Number of damaged images that are left out, see `ImageData`. More are an error.
    Returns:
        Dataset of (image [C, H, W], label), or of images where there are no labels; `.class_names` by label.
        Multi-label classes are a row [K], quantities a number or [K], float32.
    Raises:
        ValueError: No such data, split or column, or labels that are not the model's classes.
        ConnectionError: The name is a Hub id, and the Hub cannot be reached.
    """
    if split not in SPLIT_FILES:
        raise ValueError(f"load_data(split={split!r}): the splits are {', '.join(SPLIT_FILES)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"load_data(limit={limit}): at least one picture is needed. For all of them pass None.")
    if max_unreadable < 0:
        raise ValueError(
            f"load_data(max_unreadable={max_unreadable}): it must be 0 or more. With 0 one damaged picture is an error."
        )
    if val_split is not None and not 0 < val_split < 1:
        hint = f" For {val_split:g} % pass {val_split / 100:g}." if 1 <= val_split < 100 else ""
        raise ValueError(f"load_data(val_split={val_split}): the share held out must be in (0, 1).{hint}")
    name = str(name_or_dir)
    if name == "digits" and not Path(name).exists():
        if val_split is not None or class_map is not None:
            raise ValueError(
                f"load_data('digits', val_split={val_split}, class_map={class_map}): the digits come divided and "
                "named. Leave both out."
            )
        pictures, labels, class_names = _read_digits(split)
        if model is not None:
            numbers, class_names = number_names(class_names, model, f"load_data({name!r}, {split!r})")
            labels = [numbers[label] for label in labels]
        chosen = _draw(len(labels), limit, seed)
        pictures, labels = [pictures[i] for i in chosen], [labels[i] for i in chosen]
        return ImageData(pictures, labels, class_names=class_names, transform=transform)

    table = read_table(name, "train" if val_split is not None else split, val_split is not None)
    image_column = find_column(table, None, IMAGE_COLUMNS, f"load_data({name!r})", required="pictures")
    required = model is not None and num_classes_of(model) > 0
    label_column = find_labels(table, label_column, f"load_data({name!r}, {split!r})", required=required)
    if len(table) == 0:
        raise ValueError(f"load_data({name!r}, {split!r}): the split holds no pictures.")
    reader = None
    if label_column:
        reader = read_labels(table, label_column, name, split, model=model, class_map=class_map)
    if val_split is not None:
        by_class = reader is not None and holds_classes(table.features[label_column], model)
        labels = list(table[label_column]) if by_class else [0] * len(table)
        train, held_out = _hold_out(labels, val_split, f"load_data({name!r}, val_split={val_split})")
        table = table.select(train if split == "train" else held_out)
    if limit is not None:
        table = table.select(_draw(len(table), limit, seed))
    labels, class_names = None, []
    reading: dict[str, Any] = {"training": split == "train", "max_unreadable": max_unreadable, "name": name}
    if reader is not None:
        labels, class_names, reading["unknown"] = reader.read(table[label_column]), reader.names, reader.unknown
    pictures = PictureColumn(as_files(table, image_column), image_column, name)
    return ImageData(pictures, labels, class_names=list(class_names), transform=transform, **reading)


def _draw(total: int, limit: int | None, seed: int) -> list[int]:
    """Return at most `limit` of `total` indices in random order, fixed by the seed; without a limit all, in order."""
    if limit is None:
        return list(range(total))
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].tolist()


def _hold_out(labels: list[int], share: float, call: str) -> tuple[list[int], list[int]]:
    """Split indices into training and held-out ones: the same share of each class, in any order."""
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    by_class = sorted(drawn, key=labels.__getitem__)  # stable: within a class as drawn
    held_out = sorted(i for n, i in enumerate(by_class) if int((n + 1) * share + 0.5) > int(n * share + 0.5))
    if not 0 < len(held_out) < len(labels):
        raise ValueError(f"{call}: holds out {len(held_out)} of {len(labels)} pictures. Give another share.")
    return sorted(set(drawn) - set(held_out)), held_out


def _read_digits(split: str) -> tuple[list[Image.Image], list[int], list[str]]:
    """Read scikit-learn's digits, 1,437 to train and 360 held out, as grey images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    halves = train_test_split(range(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
    chosen = halves[0] if split == "train" else halves[1]
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # pixel values are stated from 0 to 16
    return [Image.fromarray(pixels[i]) for i in chosen], [int(digits.target[i]) for i in chosen], list("0123456789")
