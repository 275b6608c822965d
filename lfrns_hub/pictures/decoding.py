"""From an encoded file to a picture: decoded here, of known formats and bounded size, one at a time."""

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from lfrns_hub.untrusted import short

# No format that pillow hands to another program (EPS), and none of documents.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 64_000_000  # of a picture: 0.2 GB decoded, the size of a 64-megapixel camera's


class PictureColumn:
    """The pictures of a table, decoded one at a time.

    Args:
        table: Of datasets, its `column` read as encoded files.
        column: Where they stand.
        root: The data: a folder or a Hub id.
    """

    def __init__(self, table: Any, column: str, root: str) -> None:
        self.table, self.column, self.root = table, column, root

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Image.Image:
        """Decode a picture."""
        return decode_picture(self.table[index][self.column], self.root)

    def name(self, index: int) -> str:
        """Name the file of a picture, or its row."""
        return name_picture(self.table[index][self.column]) or f"row {index}"


def decode_picture(file: dict[str, Any], root: str) -> Image.Image:
    """Decode a picture here, not by datasets: of a known format, of at most 64 megapixels, from the data's own files.

    Args:
        file: Its `bytes`, or its `path`, as `datasets.Image(decode=False)` gives them.
        root: The data: a folder or a Hub id.
    Raises:
        ValueError: It is too large, or lies elsewhere. What pillow raises for a file that is damaged.
    """
    source: Any = None if file.get("bytes") is None else io.BytesIO(file["bytes"])
    if source is None:
        source = os.path.abspath(str(file.get("path")))
        if not any(Path(source).is_relative_to(folder) for folder in _roots(root)):
            raise ValueError(f"{short(os.path.basename(source))} lies outside of the data's folder")
    with Image.open(source, formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels, at most {MAX_PIXELS:,} are decoded")
        picture.load()
        return ImageOps.exif_transpose(picture)


def name_picture(file: dict[str, Any]) -> str | None:
    """Name the file of a picture; None for bytes without a name."""
    return short(os.path.basename(file["path"])) if file.get("path") else None


def _roots(name: str) -> list[str]:
    """Name the folders in which the files of some data lie: its own, or the caches of the Hub."""
    import datasets
    from huggingface_hub import constants

    if Path(name).is_dir():
        return [os.path.abspath(name)]
    return [os.path.abspath(str(path)) for path in (datasets.config.HF_CACHE_HOME, constants.HF_HUB_CACHE)]
