"""Decoding of image files: only known formats and bounded sizes, one at a time."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lfrns_hub.format.untrusted import short

# No format that pillow passes to another program (EPS), and no document formats.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 64_000_000  # of an image: 0.2 GB decoded, the size of a 64-megapixel camera's
ROWS = 64  # of a 16-bit image, scaled at once
BITS_PER_SAMPLE = 258  # TIFF's tag


class PictureColumn:
    """The images of a table, decoded one at a time.

    Args:
        table: A datasets table, its `column` read as encoded files.
        column: Column of the images.
        root: The data: a folder or a Hub id.
    """

    def __init__(self, table: Any, column: str, root: str) -> None:
        self.table, self.column, self.root = table, column, root

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Image.Image:
        """Return a decoded image."""
        return decode_picture(self.table[index][self.column], self.root)

    def name(self, index: int) -> str:
        """Return the file name of an image, or its row."""
        return name_picture(self.table[index][self.column]) or f"row {index}"


def decode_picture(file: Any, root: str) -> Image.Image:
    """Decode an image here, not in datasets: of a known format, at most 64 megapixels, from the data's own files.

    Args:
        file: Its `bytes` or `path`, as returned by `datasets.Image(decode=False)`; or an array from 0 to 255,
            [H, W] or [H, W, C].
        root: The data: a folder or a Hub id.
    Raises:
        ValueError: It is too large, lies outside the data, or has numbers of unknown range. For a damaged file,
            pillow's errors are raised.
    """
    if not isinstance(file, dict):
        return _from_array(np.asarray(file))
    source: Any = None if file.get("bytes") is None else io.BytesIO(file["bytes"])
    if source is None:
        source = os.path.abspath(str(file.get("path")))
        if not any(Path(source).is_relative_to(folder) for folder in _roots(root)):
            raise ValueError(f"{short(os.path.basename(source))} lies outside of the data's folder")
        if not os.path.isfile(source):  # a pipe would block
            raise ValueError(f"{short(os.path.basename(source))} is no file")
    with Image.open(source, formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels, at most {MAX_PIXELS:,} are decoded")
        picture.load()
        return as_bytes(picture)


def as_bytes(picture: Image.Image) -> Image.Image:
    """Return an image upright and with at most 8 bits per channel: 16 bits are scaled by their range.

    pillow itself converts 16 bits by clipping them to 255: all pixels except the darkest become white.

    Args:
        picture: An image of any mode. Its EXIF orientation is applied.
    Raises:
        ValueError: It has 32-bit integers or floats, whose range is not stated.
    """
    largest = _largest_value(picture)  # first: the rotated image no longer has the file's tags
    picture = ImageOps.exif_transpose(picture)
    if largest is None:
        return picture
    wide = np.asarray(picture)
    levels = (np.arange(largest + 1) * (255 / largest)).round().astype(np.uint8)
    pixels = np.empty(wide.shape, np.uint8)
    for row in range(0, len(wide), ROWS):  # in parts: as indices numbers take 8 bytes
        pixels[row : row + ROWS] = levels[wide[row : row + ROWS].clip(0, largest)]
    return Image.fromarray(pixels)


def _largest_value(picture: Image.Image) -> int | None:
    """Return the value of white in an image of more than 8 bits, None for up to 8 bits."""
    if picture.mode.startswith("I;16"):
        bits = getattr(picture, "tag_v2", {}).get(BITS_PER_SAMPLE, 16)  # often 12 in the TIFF of a camera or scanner
        return (1 << min(bits[0] if isinstance(bits, tuple) else bits, 16)) - 1
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):
        return 65535  # both formats end at 16 bits
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"a picture of mode {picture.mode!r} holds {'floats' if picture.mode == 'F' else '32-bit integers'}, and "
            "nothing states which of them is white. Save it with 8 or 16 bits a channel."
        )
    return None


def name_picture(file: Any) -> str | None:
    """Return the file name of an image; None for bytes without a name, and for an array."""
    return short(os.path.basename(file["path"])) if isinstance(file, dict) and file.get("path") else None


def _from_array(pixels: np.ndarray) -> Image.Image:
    """Return an image from integers between 0 and 255."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise ValueError(f"an array of {list(pixels.shape)} is no picture: [H, W] or [H, W, 3] is needed")
    if pixels.size and not 0 <= pixels.min() <= pixels.max() <= 255:
        raise ValueError(f"an array from {pixels.min()} to {pixels.max()}: pixels are stored from 0 to 255")
    return Image.fromarray(pixels.astype(np.uint8))


def _roots(name: str) -> list[str]:
    """Return the folders that contain the files of some data: its own, or the caches of the Hub."""
    import datasets
    from huggingface_hub import constants

    if Path(name).is_dir():
        return [os.path.abspath(name)]
    return [os.path.abspath(str(path)) for path in (datasets.config.HF_CACHE_HOME, constants.HF_HUB_CACHE)]
