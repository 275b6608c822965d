"""Pictures and labels as a dataset: decoded once, kept while they fit, what is damaged left out and named."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lfrns_hub.format.untrusted import refuse_shortage, short
from lfrns_hub.model_io.batches import UNREADABLE
from lfrns_hub.pictures.decoding import as_bytes
from lfrns_hub.pictures.preparation import OwnPreparation, Preparation

# Decoded pictures are kept up to this many bytes a dataset; CIFAR's 50,000 need 0.15 GB.
MAX_CACHE_BYTES = 1 << 30
IN_PARTS = (Preparation, OwnPreparation)  # transforms that say what of a picture is the same every time
MAX_UNREADABLE = 50  # as many as timm's ImageDataset forgives
logger = logging.getLogger(__name__)


class ImageData(Dataset):
    """Pictures and labels of a split; decoded once and kept as uint8 while they fit.

    A picture that cannot be read is left out, as timm does: the next readable one stands in its place, with its own
    label to train on, with the label `unknown` to evaluate on, where it counts as neither right nor wrong.
    Without labels it stands in throughout. Workers share the list of what is unreadable.

    Args:
        pictures: A sequence of PIL pictures: anything with `[int]` and a length, and perhaps `name(int)`.
        labels: Of each picture, a class number or a tensor; None without labels.
        class_names: By label.
        transform: Picture to tensor.
        training: Whether the label of a picture that stands in is its own.
        max_unreadable: Of how many unreadable pictures more than this is an error.
        name: The data, for the error.
        unknown: The label of a picture that stands in, where that is not its own.
    """

    def __init__(
        self,
        pictures: Any,
        labels: list[Any] | None,
        *,
        class_names: list[str],
        transform: Callable[[Any], Tensor],
        training: bool = True,
        max_unreadable: int = MAX_UNREADABLE,
        name: str = "the data",
        unknown: Any = UNREADABLE,
    ) -> None:
        self.pictures, self.labels, self.class_names, self.transform = pictures, labels, class_names, transform
        self.training, self.max_unreadable, self.name, self.unknown = training, max_unreadable, name, unknown
        self._decoded: dict[int, Any] = {}
        self._bytes = 0
        self._unreadable = torch.zeros(len(pictures), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Any] | Tensor:
        """Return a picture's tensor and its label.

        Raises:
            ValueError: More than `max_unreadable` pictures cannot be read, or none can.
        """
        return self.finish([self.draw(index)])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Any] | Tensor]:
        """Return many at once, as a DataLoader asks for them."""
        return self.finish([self.draw(index) for index in indices])

    def draw(self, index: int) -> tuple[Tensor, Any, Any]:
        """Bring a picture to its size, with all that takes random numbers, and read its label; `finish` does the rest.

        A batch so holds no pictures of the size that they have on disk.
        """
        asked = index
        while (pixels := self._read(index)) is None:
            index = (index + 1) % len(self)
        label = None
        if self.labels is not None:
            label = self.labels[index] if index == asked or self.training else self.unknown
        if isinstance(self.transform, IN_PARTS):
            return *self.transform.draw(pixels), label
        return self.transform(Image.fromarray(pixels)), None, label

    def finish(self, drawn: list[tuple[Tensor, Any, Any]]) -> list[tuple[Tensor, Any] | Tensor]:
        """Return the samples of what `draw` gave."""
        images, draws, labels = zip(*drawn, strict=True)
        if isinstance(self.transform, IN_PARTS):
            images = self.transform.finish(images, draws).unbind()
        return list(images) if self.labels is None else list(zip(images, labels, strict=True))

    @property
    def unreadable(self) -> list[str]:
        """Names of the pictures that could not be read so far, by any worker of this process."""
        return [self._name(index) for index in self._unreadable.nonzero().flatten().tolist()]

    def describe_unreadable(self) -> str | None:
        """Say how many pictures could not be read so far and name the first; None where there are none."""
        names = self.unreadable
        if not names:
            return None
        first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return f"{len(names)} of {len(self):,} pictures of {self.name} could not be read and were left out: {first}."

    def _read(self, index: int) -> Any:
        """Decode a picture: what of it is the same every time, uint8; None for one that cannot be read, noted."""
        if self._unreadable[index]:
            return None
        pixels = self._decoded.get(index)
        if pixels is None:
            try:
                picture = self.pictures[index]
                if isinstance(self.transform, IN_PARTS):
                    pixels = self.transform.fix(picture)
                else:
                    picture = as_bytes(picture)
                    pixels = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
            except Exception as error:  # pillow raises a dozen types for a file that is damaged
                refuse_shortage(error, f"{self.name}: {self._name(index)}")
                self._note(index, error)
                return None
            if self._bytes + pixels.nbytes <= MAX_CACHE_BYTES:
                self._decoded[index] = pixels
                self._bytes += pixels.nbytes
        return pixels

    def _note(self, index: int, error: Exception) -> None:
        """Keep that a picture cannot be read, and say so; refuse when there are too many."""
        self._unreadable[index] = 1
        count, reason = int(self._unreadable.sum()), short(str(error) or type(error).__name__, 120)
        if count > self.max_unreadable or count == len(self):
            raise ValueError(
                f"{self.name}: {count} of {len(self):,} pictures cannot be read, at most {self.max_unreadable} are "
                f"left out: {', '.join(self.unreadable[:3])} ({reason}). Mend or remove them, or raise max_unreadable "
                "(lfrns: --max-unreadable)."
            ) from error
        logger.warning("%s: %s cannot be read (%s): it is left out.", self.name, self._name(index), reason)

    def _name(self, index: int) -> str:
        """Name a picture: by its file where it has one."""
        return self.pictures.name(index) if hasattr(self.pictures, "name") else f"picture {index}"
