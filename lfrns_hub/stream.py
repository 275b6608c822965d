"""Pictures read as they are needed: splits too large for memory or disk, each process with files of its own."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from .pictures import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    SPLIT_FILES,
    ImageData,
    as_pictures,
    find_column,
    parquet_files,
    read_table,
)

SHUFFLE_BUFFER = 2048  # encoded pictures that wait in memory, of each worker


@dataclass(frozen=True)
class ImageStream:
    """A split as a stream; what `retrain` needs to know of it, and the pictures at its front.

    Attributes:
        table: The rows, a `datasets.IterableDataset`.
        image_column, label_column: Where pictures and labels stand.
        class_names: By label; none where the data only numbers them.
        images: How many the split holds.
        transform: Picture to tensor.
        seed: Of the order.
    """

    table: Any
    image_column: str
    label_column: str
    class_names: list[str]
    images: int
    transform: Callable[[Image.Image], Tensor]
    seed: int

    def loader(self, batch_size: int, *, workers: int = 0) -> DataLoader:
        """Give shuffled batches {"pixel_values": [N, C, H, W], "labels": [N]}, another order each epoch.

        Accelerate gives every process its own files where there are as many as processes; with fewer files each
        process reads all and keeps its share.

        Args:
            batch_size: N, of one process.
            workers: Processes that decode, at most one a file of this process.
        """
        rows = self.table.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        rows = rows.map(self._prepare, remove_columns=self.table.column_names)
        return DataLoader(rows, batch_size, num_workers=workers, persistent_workers=False)

    def front(self, count: int, transform: Callable[[Image.Image], Tensor]) -> ImageData:
        """Keep the first pictures of the shuffled stream in memory, to calibrate on: the same ones on every process.

        Args:
            count: How many, at most.
            transform: Picture to tensor.
        """
        rows = list(self.table.shuffle(seed=self.seed, buffer_size=max(SHUFFLE_BUFFER, 2 * count)).take(count))
        pictures, labels = [row[self.image_column] for row in rows], [row[self.label_column] for row in rows]
        return ImageData(pictures, labels, class_names=self.class_names, transform=transform)

    def _prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Turn a row into what a model takes."""
        return {"pixel_values": self.transform(row[self.image_column]), "labels": row[self.label_column]}


def stream_data(
    name_or_dir: str | os.PathLike[str],
    split: str,
    *,
    transform: Callable[[Image.Image], Tensor],
    label_column: str | None = None,
    images: int | None = None,
    seed: int = 0,
) -> ImageStream:
    """Open a split of labelled pictures as a stream: nothing is fetched before it is read.

    Args:
        name_or_dir: As for `load_data`: a folder of parquet files or of pictures, or a Hub id.
        split: "train", "validation" or "test".
        transform: Picture to tensor, from `make_transform`.
        label_column: Where it has another name.
        images: How many pictures the split holds; None: as the files or the Hub say.
        seed: Of the order.
    Returns:
        The stream.
    Raises:
        ValueError: No such data, split or column, or nothing says how many pictures there are.
        ConnectionError: A Hub id, and the Hub cannot be reached.
    """
    name = str(name_or_dir)
    call = f"stream_data({name!r}, {split!r})"
    table = read_table(name, split, streaming=True)
    image_column = find_column(table, None, IMAGE_COLUMNS, call, required="pictures")
    label_column = find_column(table, label_column, LABEL_COLUMNS, call)
    if label_column is None:
        raise ValueError(f"{call}: no column of labels: {', '.join(LABEL_COLUMNS)}. Give label_column.")
    class_names = getattr(table.features[label_column], "names", None) or []
    if type(table.features[image_column]).__name__ != "Image":
        table = as_pictures(table, image_column)
    images = images or count_images(table, Path(name), split)
    if not images:
        raise ValueError(f"{call}: nothing says how many pictures there are. Pass images, their number.")
    return ImageStream(table, image_column, label_column, list(class_names), images, transform, seed)


def count_images(table: Any, folder: Path, split: str) -> int:
    """Count a split's pictures from what the Hub says, from the heads of parquet files or from a folder; 0: unknown."""
    import pyarrow.parquet

    files = parquet_files(folder, split)
    if files:
        return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    if folder.is_dir():
        found = next((folder / stem for stem in SPLIT_FILES[split] if (folder / stem).is_dir()), folder)
        return sum(path.is_file() for path in found.glob("*/*"))
    said = (table.info.splits or {}).get(table.split)
    return said.num_examples if said else 0
