"""Datasets of images and labels: decoded once, cached while they fit, damaged images left out and reported."""

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

# Decoded images are cached up to this many bytes per dataset; CIFAR's 50,000 need 0.15 GB.
MAX_CACHE_BYTES = 1 << 30
IN_PARTS = (Preparation, OwnPreparation)  # transforms with a deterministic part that is cached
MAX_UNREADABLE = 50  # the limit of timm's ImageDataset
logger = logging.getLogger(__name__)


class ImageData(Dataset):
    """Images and labels of a split; decoded once and cached as uint8 while they fit.

    An image that cannot be read is left out, as in timm: the next readable one replaces it, for training with its own
    label, for evaluation with the label `unknown`, so that it counts as neither right nor wrong. Without labels it is
    replaced in both. Workers share the list of unreadable images.

    Args:
        pictures: A sequence of PIL images: any object with `[int]` and a length, and perhaps `name(int)`.
        labels: Label of each image, a class number or a tensor; None without labels.
        class_names: Names by label.
        transform: Function from image to tensor.
        training: Whether a replacement image has its own label.
        max_unreadable: More unreadable images than this are an error.
        name: The data, for the error.
        unknown: The label of a replacement image, where that is not its own.
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
        """Return an image's tensor and its label.

        Raises:
            ValueError: More than `max_unreadable` images cannot be read, or none can.
        """
        return self.finish([self.draw(index)])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Any] | Tensor]:
        """Return several samples, as requested by a DataLoader."""
        return self.finish([self.draw(index) for index in indices])

    def draw(self, index: int) -> tuple[Tensor, Any, Any]:
        """Resize an image, with all random draws, and read its label; `finish` does the rest.

        Thus a batch does not hold images in their size on disk.
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
        """Return the samples for results of `draw`."""
        images, draws, labels = zip(*drawn, strict=True)
        if isinstance(self.transform, IN_PARTS):
            images = self.transform.finish(images, draws).unbind()
        return list(images) if self.labels is None else list(zip(images, labels, strict=True))

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that could not be read so far, by any worker of this process."""
        return [self._name(index) for index in self._unreadable.nonzero().flatten().tolist()]

    def describe_unreadable(self) -> str | None:
        """Return how many images could not be read so far, and the first names; None where there are none."""
        names = self.unreadable
        if not names:
            return None
        first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return f"{len(names)} of {len(self):,} pictures of {self.name} could not be read and were left out: {first}."

    def _read(self, index: int) -> Any:
        """Return the deterministic part of an image, uint8; None, after recording it, for one that cannot be read."""
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
            except Exception as error:  # pillow raises a dozen error types for a damaged file
                refuse_shortage(error, f"{self.name}: {self._name(index)}")
                self._note(index, error)
                return None
            if self._bytes + pixels.nbytes <= MAX_CACHE_BYTES:
                self._decoded[index] = pixels
                self._bytes += pixels.nbytes
        return pixels

    def _note(self, index: int, error: Exception) -> None:
        """Record and log that an image cannot be read; raise an error when there are too many."""
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
        """Return the name of an image: its file if it has one."""
        return self.pictures.name(index) if hasattr(self.pictures, "name") else f"picture {index}"
