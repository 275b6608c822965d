"""Class folders of images: listed here, so that each is one class, whatever its name and its splits' content."""

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lfrns_hub.format.untrusted import short

logger = logging.getLogger(__name__)

SHARDS = 64  # of a stream: can be divided among as many processes as machines have
# Photos of phones and cameras: somebody who has them in a class folder means them.
UNOPENED = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf"}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # a table of labels, which datasets reads


def list_classes(folder: Path) -> dict[str, list[str]]:
    """List the images of each class folder, at any depth below it.

    An empty folder is a class too: of a split without an image of it. A folder with files but no image is not a class,
    nor is a hidden one.
    """
    classes, unopened = {}, []
    for path in _folders(folder):
        files = list(_files(path))
        pictures = _pictures(files)
        unopened += [file for file in files if Path(file).suffix.lower() in UNOPENED and file not in pictures]
        if pictures or not files:
            classes[path.name] = pictures
    if unopened:
        logger.warning(
            "%d images of kinds that pillow does not open are left out: %s. Convert them to JPEG or PNG.",
            len(unopened), short(", ".join(os.path.basename(file) for file in unopened), 120),
        )  # fmt: skip
    return classes


def in_order(names: Iterable[str]) -> list[str]:
    """Sort the names of class folders as timm numbers them: numbers in a name by value, case ignored.

    Example:
        >>> in_order(["10", "9", "banana", "Cherry"])
        ['9', '10', 'banana', 'Cherry']
    """

    def parts(name: str) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]

    return sorted(names, key=lambda name: (parts(name), name))


def list_loose(folder: Path) -> list[str]:
    """List the images that lie in a folder itself, in no class folder."""
    return _pictures(str(path) for path in folder.iterdir() if path.is_file())


def find_split(folder: Path, names: Sequence[str], splits: set[str], call: str) -> Path | None:
    """Find the folder of a split, but not a class with such a name.

    Args:
        folder: The data.
        names: Names of the split, the preferred one first; case is ignored.
        splits: All names of splits.
        call: Name of the call, for the error.
    Raises:
        ValueError: The folder could be a class as well.
    """
    folders = list(_folders(folder))
    others = [path for path in folders if path.name.casefold() not in splits]
    candidates = [path for name in names for path in folders if path.name.casefold() == name]
    for path in candidates:
        has_folders, classes = any(_folders(path)), [other.name for other in others if list_loose(other)]
        if has_folders and classes and len(others) == len(folders) - 1:
            raise ValueError(
                f"{call}: {path.name} holds folders, and {short(', '.join(classes))} beside it hold pictures: it can "
                f"be a split or a class. Give {str(path)!r} itself, or move what is not meant out of the data."
            )
        if has_folders or not any(map(_holds_pictures, others)):
            return path
    return None


def has_metadata(folder: Path, call: str) -> bool:
    """Return whether tables next to the images label them: one in the folder, or one in each of its folders.

    Raises:
        ValueError: Only some of the folders have one.
    """
    if any((folder / name).is_file() for name in METADATA):
        return True
    described: dict[bool, str] = {}
    for path in _folders(folder):
        files = list(_files(path))
        if _pictures(files):
            described[any(os.path.basename(file) in METADATA for file in files)] = path.name
    if len(described) == 2:
        raise ValueError(
            f"{call}: {short(described[True])} has a table of metadata and {short(described[False])} has none: the "
            "folders can be classes or not. Remove the table, or write one for all."
        )
    return True in described


def read_class_folders(folder: Path, names: list[str], call: str, *, streaming: bool = False) -> Any:
    """Return the images of class folders as a table of paths and labels, without class folders only of paths.

    Args:
        folder: Folder with a folder for each class, or with images.
        names: Names of all classes, in the order of their numbers; a split may lack some.
        call: Name of the call, for the error.
        streaming: Return a `datasets.IterableDataset`, whose rows have a fixed random order: a stream can be shuffled
            only within its buffer.
    Raises:
        ValueError: Images lie next to the class folders, in no class.
    """
    import datasets

    number, classes, loose = {name: index for index, name in enumerate(names)}, list_classes(folder), list_loose(folder)
    rows: list[tuple[str, int | None]]
    if loose and any(classes.values()):
        raise ValueError(
            f"{call}: {len(loose)} pictures in {short(folder.name)} ({short(os.path.basename(loose[0]))}) lie in no "
            "class folder. Move them into one, or out of the data."
        )
    rows = [(path, None) for path in loose] or [(path, number[name]) for name in classes for path in classes[name]]
    if streaming:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [rows[index] for index in drawn]
    features = {"image": datasets.Image(decode=False)}
    columns: dict[str, list[Any]] = {"image": [path for path, _ in rows]}
    if not loose:
        features["label"], columns["label"] = datasets.ClassLabel(names=names), [label for _, label in rows]
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return table.to_iterable_dataset(num_shards=max(1, min(SHARDS, len(rows)))) if streaming else table


def read_described(folder: Path, *, streaming: bool = False) -> Any:
    """Open images that a table next to them describes, with datasets: only those, and no archive."""
    import datasets

    # Each named: of a folder, datasets would make splits of every name like "test".
    endings = sorted({os.path.splitext(path)[1] for path in _pictures(_files(folder))})
    place = glob.escape(str(folder))
    files = [f"{place}/**/*{ending}" for ending in endings] + [f"{place}/**/{name}" for name in METADATA]
    found = [pattern for pattern in files if glob.glob(pattern, recursive=True)]
    table = datasets.load_dataset("imagefolder", data_files={"train": found}, split="train", streaming=streaming)
    if not streaming and len(table) < (there := len(_pictures(_files(folder)))):
        logger.warning("%s: the metadata names %d of %d pictures; the others are left out.", folder, len(table), there)
    return table


def _pictures(files: Iterable[str]) -> list[str]:
    """Return the images among files, by their extensions; hidden files are left out."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(
        file
        for file in files
        if os.path.splitext(file)[1].lower() in endings and not os.path.basename(file).startswith(".")
    )


def _holds_pictures(folder: Path) -> bool:
    """Return whether there are images in a folder, at any depth."""
    return bool(_pictures(_files(folder)))


def _files(folder: Path) -> Iterator[str]:
    """Yield the files at any depth below a folder; links back to a visited folder, or one above, are not followed."""
    seen = {_identity(path) for path in (folder, *folder.resolve().parents)}
    for place, folders, names in os.walk(folder, followlinks=True):
        yield from (os.path.join(place, name) for name in names)
        new = {key: name for name in folders if (key := _identity(os.path.join(place, name))) not in seen}
        seen |= new.keys()
        folders[:] = new.values()


def _identity(folder: str | Path) -> tuple[int, int]:
    """Return the identity of a folder, the same by every link to it."""
    state = os.stat(folder)
    return state.st_dev, state.st_ino


def _folders(folder: Path) -> Iterator[Path]:
    """Return the folders in a folder, by name; hidden ones are left out."""
    return (path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.is_dir())
