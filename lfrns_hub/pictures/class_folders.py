"""Folders of pictures by class: listed here, so that each is one class, whatever its name and its splits hold."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SHARDS = 64  # of a stream: divisible among as many processes as machines have
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # a table of labels, which datasets reads


def list_classes(folder: Path) -> dict[str, list[str]]:
    """List the pictures of each class folder, at any depth below it.

    A folder that is empty is a class too: of a split that has no picture of it. One that holds files but no picture is
    none, nor is a hidden one.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    classes = {}
    for path in _folders(folder):
        files = [Path(place, name) for place, _, names in os.walk(path, followlinks=True) for name in names]
        pictures = sorted(str(file) for file in files if file.suffix.lower() in endings and file.name[0] != ".")
        if pictures or not files:
            classes[path.name] = pictures
    return classes


def is_split(folder: Path, splits: set[str]) -> bool:
    """Return whether a folder named as a split is one, and not a class that is called so.

    Args:
        folder: The folder, there or not.
        splits: All names of splits.
    """
    if not folder.is_dir():
        return False
    if any(_folders(folder)):
        return True
    return all(name in splits for name, pictures in list_classes(folder.parent).items() if pictures)


def has_metadata(folder: Path) -> bool:
    """Return whether a table beside the pictures says what they are."""
    return any(name in METADATA for _, _, names in os.walk(folder, followlinks=True) for name in names)


def read_class_folders(folder: Path, names: list[str], *, streaming: bool = False) -> Any:
    """Give the pictures of class folders as a table of paths and labels.

    Args:
        folder: Holds a folder for each class.
        names: Of all classes, in the order of their numbers; a split may lack some.
        streaming: As a `datasets.IterableDataset`, whose rows come in a random order that is always the same: a stream
            can be shuffled only within its buffer.
    """
    import datasets

    number = {name: index for index, name in enumerate(names)}
    rows = [(path, number[name]) for name, paths in list_classes(folder).items() for path in paths]
    if streaming:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [rows[index] for index in drawn]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    columns = {"image": [path for path, _ in rows], "label": [label for _, label in rows]}
    table = datasets.Dataset.from_dict(columns, features=features)
    return table.to_iterable_dataset(num_shards=max(1, min(SHARDS, len(rows)))) if streaming else table


def _folders(folder: Path) -> Iterator[Path]:
    """List the folders in a folder, by name; hidden ones and those of tools (__MACOSX) are none."""
    return (
        path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.name[:2] != "__" and path.is_dir()
    )
