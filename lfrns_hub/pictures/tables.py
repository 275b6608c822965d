"""Where pictures and labels stand: the splits of a folder or of the Hub, opened with datasets, and their columns."""

import re
from pathlib import Path
from typing import Any

from lfrns_hub.pictures.class_folders import has_metadata, is_split, list_classes, read_class_folders
from lfrns_hub.reach import reach_hub
from lfrns_hub.untrusted import short

# Files of a split on disk, in the order of preference.
SPLIT_FILES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "test"),
    "test": ("test", "validation", "valid", "val"),
}
ARRAYS = ("uint8", "int32", "int64")  # of pictures from 0 to 255; as lists of Python come into a table
SPLIT_NAMES = {stem for stems in SPLIT_FILES.values() for stem in stems}
IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image", "pixel_values"), ("label", "fine_label", "labels")


def read_table(name: str, split: str, undivided: bool = False, streaming: bool = False) -> Any:
    """Open a split with datasets, from a folder or the Hub.

    Args:
        name: Folder or Hub id.
        split: "train", "validation" or "test".
        undivided: Take all of a folder of pictures that has no splits.
        streaming: Give a `datasets.IterableDataset`, of which nothing is read or fetched yet.
    """
    import datasets

    bar = datasets.is_progress_bar_enabled()
    folder = Path(name)
    if folder.is_dir():
        datasets.disable_progress_bar()
        try:
            files = parquet_files(folder, split)
            if files:
                files = [str(file) for file in files]
                return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
            place = split_folder(folder, split)
            if place is not None:
                if any(list_classes(place).values()) and not has_metadata(place):
                    return read_class_folders(place, folder_classes(folder, split), streaming=streaming)
                given = {"data_dir": str(place), "split": "train", "streaming": streaming}
                return datasets.load_dataset("imagefolder", **given)
            if undivided and any((classes := list_classes(folder)).values()):
                return read_class_folders(folder, list(classes))
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            reason = str(error.__cause__ or error).splitlines()[0][:200]
            raise ValueError(
                f"load_data({name!r}, {split!r}): cannot be read as pictures ({short(reason, 200)}). Write the files "
                "again, or give a folder of pictures."
            ) from error
        finally:
            if bar:
                datasets.enable_progress_bar()
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"load_data({name!r}, {split!r}): found {found}. The folder must hold {SPLIT_FILES[split][0]}-*.parquet "
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
            raise ValueError(f"load_data({name!r}, {split!r}): it has the splits {', '.join(splits)}.")
        return datasets.load_dataset(name, split=wanted, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"load_data({name!r}): the Hub has no such data, or not for you. Check the name.") from error


def split_folder(folder: Path, split: str) -> Path | None:
    """Find the folder of a split."""
    return next((folder / stem for stem in SPLIT_FILES[split] if is_split(folder / stem, SPLIT_NAMES)), None)


def folder_classes(folder: Path, split: str) -> list[str]:
    """Name the classes of a folder of pictures, ascending: those of all splits, which so number them alike."""
    places = {split_folder(folder, name) for name in ("train", "validation", split)} - {None}
    return sorted({name for place in places for name in list_classes(place)})


def parquet_files(folder: Path, split: str) -> list[Path]:
    """Find the parquet files of a split."""
    for stem in SPLIT_FILES[split]:
        files = sorted([*folder.glob(f"{stem}[-_.]*parquet"), *folder.glob(f"data/{stem}[-_.]*parquet")])
        if files:
            return files
    return []


def find_column(
    table: Any, given: str | None, usual: tuple[str, ...], call: str, *, required: str | None = None
) -> str | None:
    """Find a column by its name, or by the usual ones."""
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
    """Find the column of labels.

    Raises:
        ValueError: There is none, and it was named, or the model needs labels.
    """
    column = find_column(table, given, LABEL_COLUMNS, call)
    if column is None and required:
        raise ValueError(
            f"{call}: no column of labels: {', '.join(LABEL_COLUMNS)}. It has {', '.join(table.column_names)}: name "
            "the one that holds them by label_column (lfrns: --label-column), or give a folder of pictures per class."
        )
    return column


def as_files(table: Any, column: str) -> Any:
    """Read a column of pictures as encoded files, their bytes or paths; arrays of whole numbers stay as they are."""
    import datasets

    kind = leaf = table.features[column]
    while hasattr(leaf, "feature"):
        leaf = leaf.feature
    if leaf is not kind or type(kind).__name__.startswith("Array"):  # datasets would lose what the numbers' range is
        if getattr(leaf, "dtype", None) in ARRAYS:
            return table
        raise ValueError(
            f"the column {column!r} holds arrays of {short(str(getattr(leaf, 'dtype', leaf)))}, and nothing states "
            "which number is white. Store them as uint8, or encode them as PNG or JPEG."
        )
    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # what arrow raises depends on what the column holds
        raise ValueError(
            f"the column {column!r} holds {short(str(kind))}, no pictures. Encode them as PNG or JPEG."
        ) from error
