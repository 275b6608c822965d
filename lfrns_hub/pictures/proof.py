"""A fast way to prepare pictures, taken only where it makes the images that the model's own pipeline makes.

The own pipeline is a transformers image processor or timm's transform. What it does to colours is measured, what it
does to sizes is guessed from its settings, and both are proved together on pictures of many sizes and shapes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lfrns_hub.format.untrusted import short
from lfrns_hub.pictures.preparation import SMALL, OwnPreparation, Preparation

# Width and height of the probes besides the image's own: smaller than any image and larger, twenty times wider than
# high, with odd margins.
SIZES = (
    (9, 7),
    (37, 53),
    (96, 61),
    (257, 258),
    (300, 300),
    (300, 311),
    (361, 300),
    (333, 500),
    (500, 353),
    (640, 197),
    (1000, 50),
    (40, 600),
    (1500, 1100),
)
LARGEST = 1024  # pixels: images of a larger side go through the pipeline itself, for probes of them take seconds
MARGINS = ((0, 0), (1, 0), (0, 3), (6, 0), (0, 7), (9, 5))  # added to the image's own size: uneven crops of each kind


@dataclass(frozen=True)
class Geometry:
    """A guess of what a pipeline does to sizes: `Preparation`'s attributes of these names."""

    resize: tuple[int, int] | int | None
    interpolation: str
    as_tensor: bool
    floored: bool

    def is_large(self) -> bool:
        """Return whether probes would be resized to more than memory should hold: some are 20 times as long as wide."""
        return max(self.resize if isinstance(self.resize, tuple) else (self.resize or 0,)) > 2 * LARGEST


def prove(
    prepare: Callable[[Image.Image], Tensor],
    geometries: Iterable[Geometry],
    *,
    mode: str,
    what: str,
    stated: tuple[Any, Any] = (None, None),
) -> Preparation | OwnPreparation:
    """Return the fast preparation that equals a model's own pipeline on every probe, else the pipeline itself.

    Args:
        prepare: The pipeline: picture of `mode` -> float32 [C, H, W].
        geometries: Guesses, the likely ones first.
        mode: "L" or "RGB".
        what: Names the pipeline in errors.
        stated: Mean and std by its settings; where they are what was measured, they stand for it to the last digit.
    Returns:
        What prepares pictures to evaluate on; `for_training` makes of it what prepares those to train on.
    Raises:
        ValueError: The pipeline makes no image of a picture.
    """
    try:
        shape = prepare(_probe(mode, 224, 224, 0)).shape
        colours = fit_colours(prepare, mode)
        colours = colours and _as_stated(colours, *stated)
        size = (int(shape[1]), int(shape[2]))
        candidates = [_fast(guess, colours, mode, size) for guess in geometries if colours and not guess.is_large()]
        for probe in probes(mode, size) if candidates else ():
            image = prepare(probe)
            candidates = [fast for fast in candidates if image.shape == shape and equals(fast, probe, image)]
            if not candidates:
                break
    except Exception as error:  # every processor refuses in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{what} prepares no picture ({short(reason, 200)}). Mend its settings, or prepare the images by a "
            "transform of your own."
        ) from error
    return candidates[0] if candidates else OwnPreparation(prepare, mode, size, training=False, flip=False)


def for_training(preparation: Preparation | OwnPreparation, flip: bool) -> Preparation | OwnPreparation:
    """Return a preparation with crops at random, and perhaps mirrored pictures."""
    changed: dict[str, Any] = {"training": True, "flip": flip}
    if isinstance(preparation, Preparation):
        changed["resize"] = preparation.size if max(preparation.size) <= SMALL else None
    return replace(preparation, **changed)


def equals(fast: Preparation, probe: Image.Image, image: Tensor) -> bool:
    """Return whether a preparation makes of a picture the image [C, H, W], to one level of 255."""
    got, level = fast(probe), torch.tensor(fast.std).abs()[:, None, None].reciprocal() / 255
    return got.shape == image.shape and bool(((got - image).abs() <= 1.01 * level + 1e-5 * image.abs()).all())


def _fast(geometry: Geometry, colours: "Colours", mode: str, size: tuple[int, int]) -> Preparation:
    """Make the preparation of a guess."""
    return Preparation(
        mode=mode,
        size=size,
        resize=geometry.resize,
        training=False,
        flip=False,
        mean=colours.mean,
        std=colours.std,
        interpolation=geometry.interpolation,
        as_tensor=geometry.as_tensor,
        floored=geometry.floored,
        order=colours.order,
    )


@dataclass(frozen=True)
class Colours:
    """What a pipeline does to colours: channel c that comes out is (channel `order[c]` of the picture - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: tuple[int, ...] | None


def fit_colours(prepare: Callable[[Image.Image], Tensor], mode: str) -> Colours | None:
    """Measure what a pipeline does to colours, on pictures of one colour; None where it is no such map.

    Args:
        prepare: The pipeline.
        mode: Of its pictures, "L" or "RGB".
    """
    channels = 1 if mode == "L" else 3

    def answer(*levels: int) -> Tensor:
        image = prepare(Image.new(mode, (64, 64), levels[0] if channels == 1 else levels)).double()
        return image[:, image.shape[1] // 2, image.shape[2] // 2]

    offset = answer(*[0] * channels)
    columns = [answer(*[255 * (other == one) for other in range(channels)]) - offset for one in range(channels)]
    slopes = torch.stack(columns, 1)  # [out, in]
    order = slopes.abs().argmax(1)
    scale = slopes.gather(1, order[:, None])[:, 0]
    others = slopes.scatter(1, order[:, None], 0.0).abs().amax(1)
    if len(scale) != channels or not bool((scale.abs() > 1e-9).all()) or bool((others > 1e-6 * scale.abs()).any()):
        return None
    std, mean = 1 / scale, -offset / scale
    same = order.tolist() == list(range(channels))
    return Colours(tuple(mean.tolist()), tuple(std.tolist()), None if same else tuple(order.tolist()))


def _as_stated(colours: Colours, mean: Any, std: Any) -> Colours:
    """Return measured statistics as settings state them, where they are those."""
    measured = (colours.mean, colours.std)
    for values, own in zip((mean, std), measured, strict=True):
        if not isinstance(values, (tuple, list)) or not np.allclose(values, own, rtol=1e-5, atol=1e-6):
            return colours
    return replace(colours, mean=tuple(mean), std=tuple(std))


def probes(mode: str, size: Sequence[int]) -> Iterable[Image.Image]:
    """Draw the pictures that a fast preparation is proved on: the same ones at every call.

    Args:
        mode: "L" or "RGB".
        size: Height and width of the model's images; some probes are of this size, or little larger.
    """
    height, width = size
    near = [(width + right, height + down) for right, down in MARGINS]
    for number, (columns, rows) in enumerate([*SIZES, *near]):
        yield _probe(mode, columns, rows, number)


def _probe(mode: str, columns: int, rows: int, number: int) -> Image.Image:
    """Draw one probe: noise over a ramp in three colours, which shows every pixel that a crop or a filter moves."""
    draw = np.random.default_rng(number)
    across, down = np.linspace(0, 1, columns)[None, :], np.linspace(0, 1, rows)[:, None]
    ramp = np.stack([across + 0 * down, 0 * across + 0.6 * down + 0.3, 0.9 - 0.8 * across * down], -1)
    reach = (6, 120)[number % 2]
    pixels = 255 * ramp + draw.integers(-reach, reach + 1, ramp.shape, dtype=np.int16)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).convert(mode)


def guess_geometries(settings: Any, interpolation: str, as_tensor: bool) -> list[Geometry]:
    """Guess what a transformers image processor does to sizes from what its settings may mean.

    Args:
        settings: The processor; `size`, `crop_pct` and `do_resize` are looked at.
        interpolation: By torchvision's name.
        as_tensor: Whether it works on tensors.
    """
    size = {key: value for key, value in dict(getattr(settings, "size", None) or {}).items() if value}
    height, width, edge = (size.pop(key, None) for key in ("height", "width", "shortest_edge"))
    if size or max(height or 0, width or 0, edge or 0) > LARGEST:
        return []  # a longest edge, say, which shows only where pictures are wider than any probe
    share = getattr(settings, "crop_pct", None)
    resizes: list[Any] = []
    if height and width:
        resizes.append((height, width))
    if edge and share:
        resizes += [int(edge / share), (edge, edge)]
    if edge:
        resizes.append(edge)
    if not getattr(settings, "do_resize", True):
        resizes = [None]
    return [Geometry(resize, interpolation, as_tensor, floored=True) for resize in resizes]
