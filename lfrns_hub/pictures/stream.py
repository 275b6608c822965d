"""Streams of images, read as needed: for splits too large for memory or disk, each process with its own files."""

import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lfrns_hub.format.untrusted import refuse_shortage, short
from lfrns_hub.pictures import (
    IMAGE_COLUMNS,
    MAX_UNREADABLE,
    ImageData,
    PictureColumn,
    as_files,
    decode_picture,
    find_column,
    find_labels,
    list_classes,
    name_picture,
    parquet_files,
    read_labels,
    read_table,
    split_folder,
)
from lfrns_hub.runs.seeded import OwnGroup

logger = logging.getLogger(__name__)
FRONT_SHARDS = 32  # read in turn for the front
SHUFFLE_BUFFER = 2048  # encoded images waiting in memory, per worker


@dataclass(frozen=True)
class ImageStream:
    """A split as a stream, with the facts that `retrain` needs and the images at its front.

    An image that cannot be read is left out and logged: the stream is shorter by it. The number of damaged images in a
    stream is unknown in advance, so, as in timm, the limit applies to consecutive ones.

    Attributes:
        table: The rows, a `datasets.IterableDataset`.
        image_column, label_column: Columns of images and labels.
        class_names: Names by label; empty if neither the data nor the model has names.
        images: Number of images of the split.
        transform: Function from image to tensor.
        seed: Seed of the order.
        name: The data: a folder or a Hub id.
        max_unreadable: More consecutive unreadable images than this are an error.
        number: Function from a label in the data to its class, or, for labels other than a single class, to a tensor.
    """

    table: Any
    image_column: str
    label_column: str
    class_names: list[str]
    images: int
    transform: Callable[[Image.Image], Tensor]
    seed: int
    name: str
    max_unreadable: int = MAX_UNREADABLE
    number: Callable[[Any], Any] = int
    _errors: list[str] = field(default_factory=list, repr=False)  # of this process, since the last readable image

    def loader(self, batch_size: int, *, workers: int = 0) -> DataLoader:
        """Return shuffled batches {"pixel_values": [N, C, H, W], "labels": [N]}, in another order each epoch.

        Accelerate assigns every process its own files if there are enough; with fewer files than processes each process
        reads all and keeps its share.

        Args:
            batch_size: Batch size of one process, N.
            workers: Decoder processes, at most one per file of this process.
        """
        rows = self.table.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        # A batch of one row may become empty: this is how an image is left out.
        rows = rows.map(self._prepare, batched=True, batch_size=1, remove_columns=self.table.column_names)
        return DataLoader(rows, batch_size, num_workers=workers, worker_init_fn=OwnGroup(None))

    def front(self, count: int, transform: Callable[[Image.Image], Tensor]) -> ImageData:
        """Return the first images of the shuffled stream, in memory, for calibration: the same on every process.

        They come from many files in turn, because files may be sorted by class. If they have few classes nevertheless,
        a warning is logged: within a file a stream is shuffled only within its buffer.

        Args:
            count: Largest number of images.
            transform: Function from image to tensor.
        Raises:
            ValueError: No image can be read, or more than `max_unreadable` consecutive ones cannot be.
        """
        shards = min(self.table.num_shards, FRONT_SHARDS)
        buffer = max(SHUFFLE_BUFFER, 2 * count) // shards + 1
        parts = (self.table.shard(shards, number) for number in range(shards))
        turns = itertools.zip_longest(*(part.shuffle(seed=self.seed, buffer_size=buffer) for part in parts))
        rows = (row for turn in turns for row in turn if row is not None)
        self._errors.clear()
        # As files, because a decoded image may have any size; only those that can be decoded.
        readable = (
            ({self.image_column: row[self.image_column]}, found[1]) for row in rows if (found := self._read(row))
        )
        found = list(itertools.islice(readable, count))
        if not found:
            why = f", {len(self._errors)} that cannot be read: {self._errors[0]}" if self._errors else ""
            raise ValueError(f"{self.name}: the stream holds no pictures{why}. Check the folder and the split.")
        files, labels = zip(*found, strict=True)
        seen, classes = len(set(labels)), len(self.class_names)
        if 2 * seen < min(classes, len(labels)):
            logger.warning(
                "%s: the %d pictures that calibrate show %d of %d classes: the files are sorted by class. Write them "
                "in random order, or draw the pictures by load_data(limit=%d).",
                self.name, len(labels), seen, classes, count,
            )  # fmt: skip
        pictures = PictureColumn(files, self.image_column, self.name)
        return ImageData(pictures, list(labels), class_names=self.class_names, transform=transform)

    def _prepare(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Turn a batch of one row into model input, or into an empty batch."""
        found = self._read({name: values[0] for name, values in rows.items()})
        if found is None:
            return {"pixel_values": [], "labels": []}
        return {"pixel_values": [self.transform(found[0])], "labels": [found[1]]}

    def _read(self, row: dict[str, Any]) -> tuple[Image.Image, Any] | None:
        """Return a row's decoded image with its label; None, after recording it, for an image that cannot be read."""
        file = row[self.image_column]
        try:
            picture = decode_picture(file, self.name)
        except Exception as error:  # pillow raises a dozen error types for a damaged file
            refuse_shortage(error, f"{self.name}: {name_picture(file) or 'a picture'}")
            which, reason = name_picture(file) or "a picture", short(str(error) or type(error).__name__, 120)
            self._errors.append(f"{which} ({reason})")
            if len(self._errors) > self.max_unreadable:
                raise ValueError(
                    f"{self.name}: {len(self._errors)} pictures in a row cannot be read, at most {self.max_unreadable} "
                    f"are left out: {self._errors[-1]}. Mend or remove them, or raise max_unreadable."
                ) from error
            logger.warning("%s: %s cannot be read (%s): it is left out.", self.name, which, reason)
            return None
        self._errors.clear()
        return picture, self.number(row[self.label_column])


def stream_data(
    name_or_dir: str | os.PathLike[str],
    split: str,
    *,
    transform: Callable[[Image.Image], Tensor],
    model: nn.Module | None = None,
    label_column: str | None = None,
    images: int | None = None,
    seed: int = 0,
    max_unreadable: int = MAX_UNREADABLE,
) -> ImageStream:
    """Open a split of labelled images as a stream: nothing is fetched before it is read.

    Args:
        name_or_dir: As for `load_data`: a folder of parquet files or of images, or a Hub id.
        split: "train", "validation" or "test".
        transform: Function from image to tensor, from `make_transform`.
        model: The model for the data, as for `load_data`.
        label_column: Name of the label column, if it is not a usual one.
        images: Number of images of the split; None: as stated by the files or the Hub.
        seed: Seed of the order.
        max_unreadable: Number of consecutive damaged images that are left out. More are an error.
    Returns:
        The stream.
    Raises:
        ValueError: There is no such data, split or column, or the number of images is unknown.
        ConnectionError: The name is a Hub id, and the Hub cannot be reached.
    """
    name = str(name_or_dir)
    call = f"stream_data({name!r}, {split!r})"
    table = read_table(name, split, streaming=True)
    image_column = find_column(table, None, IMAGE_COLUMNS, call, required="pictures")
    label_column = find_labels(table, label_column, call, required=True)
    labels = read_labels(table, label_column, name, split, model=model, class_map=None, streaming=True)
    if labels is None:
        raise ValueError(
            f"{call}: the model answers with features, of which {label_column!r} says nothing. Leave the model out."
        )
    table = as_files(table, image_column)
    images = images or count_images(table, Path(name), split)
    if not images:
        raise ValueError(f"{call}: nothing says how many pictures there are. Pass images, their number.")
    return ImageStream(
        table, image_column, label_column, labels.names, images, transform, seed, name, max_unreadable, labels.number
    )


def count_images(table: Any, folder: Path, split: str) -> int:
    """Return the number of a split's images from the Hub, the parquet files' metadata or a folder; 0: unknown."""
    import pyarrow.parquet

    files = parquet_files(folder, split)
    if files:
        return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    if folder.is_dir():
        return sum(map(len, list_classes(split_folder(folder, split) or folder).values()))
    said = (table.info.splits or {}).get(table.split)
    return said.num_examples if said else 0
