"""Tables of images and labels: the splits of a folder or of the Hub, opened with datasets, and their columns."""

import contextlib
import glob
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfrns_hub.format.untrusted import short
from lfrns_hub.hub.reach import reach_hub
from lfrns_hub.pictures.class_folders import (
    find_split,
    has_metadata,
    in_order,
    list_classes,
    read_class_folders,
    read_described,
)

# Names of a split's files on disk, in the order of preference.
SPLIT_FILES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing"),
    "test": ("test", "testing", "validation", "valid", "val", "eval", "evaluation"),
}
ARRAYS = ("uint8", "int32", "int64")  # dtypes of images from 0 to 255; Python lists get these in a table
SPLIT_NAMES = {stem for stems in SPLIT_FILES.values() for stem in stems}
SHARD = re.compile(r"\d+-of-(\d+)")  # in the names of the files of one split
logger = logging.getLogger(__name__)
IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image", "pixel_values"), ("label", "fine_label", "labels")


def read_table(name: str, split: str, undivided: bool = False, streaming: bool = False) -> Any:
    """Open a split with datasets, from a folder or the Hub.

    Args:
        name: Folder or Hub id.
        split: "train", "validation" or "test".
        undivided: Use all of an image folder that has no splits.
        streaming: Return a `datasets.IterableDataset`, of which nothing is read or fetched yet.
    """
    import datasets

    folder, call = Path(name), f"load_data({name!r}, {split!r})"
    if folder.is_dir():
        files = parquet_files(folder, split)
        if files:
            _check_shards(files, call)
            given = {"data_files": [glob.escape(str(file)) for file in files], "split": "train"}
            with _reading(call):
                return datasets.load_dataset("parquet", **given, streaming=streaming)
        place = split_folder(folder, split)
        if place is not None:
            if has_metadata(place, call):
                with _reading(call):
                    return read_described(place, streaming=streaming)
            return read_class_folders(place, folder_classes(folder, split), call, streaming=streaming)
        if undivided and any((classes := list_classes(folder)).values()):
            return read_class_folders(folder, in_order(classes), call)
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{call}: found {found}. The folder must hold {SPLIT_FILES[split][0]}-*.parquet "
            f"or {SPLIT_FILES[split][0]}/<class>/<picture>; of one folder per class, --val-split 0.1 holds a tenth out."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"load_data({name!r}): there is no such folder. Give a folder, a Hub id (user/name) or 'digits'."
        )
    reach_hub(f"the data {name}")
    try:
        splits = datasets.get_dataset_split_names(name)
        wanted = next((s for s in SPLIT_FILES[split] if s in splits), None)
        if wanted is None:
            raise ValueError(f"{call}: it has the splits {', '.join(splits)}.")
        return datasets.load_dataset(name, split=wanted, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"load_data({name!r}): the Hub has no such data, or not for you. Check the name.") from error


def split_folder(folder: Path, split: str) -> Path | None:
    """Return the folder of a split."""
    return find_split(folder, SPLIT_FILES[split], SPLIT_NAMES, f"load_data({str(folder)!r}, {split!r})")


def folder_classes(folder: Path, split: str) -> list[str]:
    """Return the classes of an image folder, in timm's order: those of all splits, so that all use the same numbers."""
    places = {split_folder(folder, name) for name in ("train", "validation", split)} - {None}
    return in_order({name for place in places for name in list_classes(place)})


def parquet_files(folder: Path, split: str) -> list[Path]:
    """Return the parquet files of a split."""
    for stem in SPLIT_FILES[split]:
        files = sorted([*folder.glob(f"{stem}[-_.]*parquet"), *folder.glob(f"data/{stem}[-_.]*parquet")])
        if files:
            return files
    return []


@contextlib.contextmanager
def _reading(call: str) -> Iterator[None]:
    """Convert errors of datasets about damaged files into one error, without progress bars for local files."""
    import datasets

    bar = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0][:200]
        raise ValueError(
            f"{call}: cannot be read as pictures ({short(reason, 200)}). Write the files again, or give a folder of "
            "pictures."
        ) from error
    finally:
        if bar:
            datasets.enable_progress_bar()


def _check_shards(files: list[Path], call: str) -> None:
    """Refuse files of a split from two exports, which would contain every row twice; warn where some are missing."""
    totals = {int(found[1]) for file in files if (found := SHARD.search(file.stem))}
    if len(totals) > 1:
        raise ValueError(
            f"{call}: {files[0].name} and {files[-1].name} are of two writings of the split, in {min(totals)} files "
            f"and in {max(totals)}. Remove one of them."
        )
    if totals and len(files) != min(totals):
        logger.warning("%s: %d of %d files are there: the split is not whole.", files[0].parent, len(files), *totals)


def find_column(
    table: Any, given: str | None, usual: tuple[str, ...], call: str, *, required: str | None = None
) -> str | None:
    """Return a column by its name, or by the usual names."""
    columns = table.column_names
    if given is not None and given not in columns:
        raise ValueError(f"{call}: there is no column {given!r}. It has {', '.join(columns)}.")
    found = given or next((column for column in usual if column in columns), None)
    if found is None:
        kind = "Image" if required else "ClassLabel"
        found = next((column for column, f in table.features.items() if type(f).__name__ == kind), None)
    if found is None and required:
        raise ValueError(f"{call}: no column of {required}: {', '.join(usual)}. It has {', '.join(columns)}.")
    return found


def find_labels(table: Any, given: str | None, call: str, *, required: bool) -> str | None:
    """Return the column of labels.

    Raises:
        ValueError: There is none, although it was named or the model needs labels.
    """
    column = find_column(table, given, LABEL_COLUMNS, call)
    if column is None and required:
        raise ValueError(
            f"{call}: no column of labels: {', '.join(LABEL_COLUMNS)}. It has {', '.join(table.column_names)}: name "
            "the one that holds them by label_column (lfrns: --label-column), or give a folder of pictures per class."
        )
    return column


def as_files(table: Any, column: str) -> Any:
    """Read a column of images as encoded files, their bytes or paths; arrays of integers are unchanged."""
    import datasets

    kind = leaf = table.features[column]
    while hasattr(leaf, "feature"):
        leaf = leaf.feature
    if leaf is not kind or type(kind).__name__.startswith("Array"):  # datasets would lose the range of the numbers
        if getattr(leaf, "dtype", None) in ARRAYS:
            return table
        raise ValueError(
            f"the column {column!r} holds arrays of {short(str(getattr(leaf, 'dtype', leaf)))}, and nothing states "
            "which number is white. Store them as uint8, or encode them as PNG or JPEG."
        )
    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # arrow's errors depend on the content of the column
        raise ValueError(
            f"the column {column!r} holds {short(str(kind))}, no pictures. Encode them as PNG or JPEG."
        ) from error
