"""A fast image preparation, used only if it produces the same images as the model's own pipeline.

The own pipeline is a transformers image processor or timm's transform. Its effect on colours is measured, its effect
on sizes is guessed from its settings, and both are proved together on images of many sizes and shapes.
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

# Width and height of the probes in addition to the input size: smaller than any image and larger, twenty times wider
# than high, with odd margins.
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
LARGEST = 1024  # pixels: images with a larger side always use the pipeline itself, because probes of them take seconds
MARGINS = ((0, 0), (1, 0), (0, 3), (6, 0), (0, 7), (9, 5))  # added to the image's own size: uneven crops of each kind


@dataclass(frozen=True)
class Geometry:
    """A guess of a pipeline's effect on sizes: `Preparation`'s attributes of these names."""

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
        prepare: The pipeline: image of `mode` -> float32 [C, H, W].
        geometries: Guesses, the likely ones first.
        mode: "L" or "RGB".
        what: Name of the pipeline in errors.
        stated: Mean and std in its settings; if they agree with the measured ones, they replace them exactly.
    Returns:
        The preparation for evaluation; `for_training` turns it into one for training.
    Raises:
        ValueError: The pipeline does not return an image.
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
    except Exception as error:  # each processor raises its own error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{what} prepares no picture ({short(reason, 200)}). Mend its settings, or prepare the images by a "
            "transform of your own."
        ) from error
    return candidates[0] if candidates else OwnPreparation(prepare, mode, size, training=False, flip=False)


def for_training(preparation: Preparation | OwnPreparation, flip: bool) -> Preparation | OwnPreparation:
    """Return a preparation with random crops, and optionally mirrored images."""
    changed: dict[str, Any] = {"training": True, "flip": flip}
    if isinstance(preparation, Preparation):
        changed["resize"] = preparation.size if max(preparation.size) <= SMALL else None
    return replace(preparation, **changed)


def equals(fast: Preparation, probe: Image.Image, image: Tensor) -> bool:
    """Return whether a preparation turns a probe into the image [C, H, W], to one level of 255."""
    got, level = fast(probe), torch.tensor(fast.std).abs()[:, None, None].reciprocal() / 255
    return got.shape == image.shape and bool(((got - image).abs() <= 1.01 * level + 1e-5 * image.abs()).all())


def _fast(geometry: Geometry, colours: "Colours", mode: str, size: tuple[int, int]) -> Preparation:
    """Return the preparation of a guess."""
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
    """Effect of a pipeline on colours: output channel c is (channel `order[c]` of the image - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: tuple[int, ...] | None


def fit_colours(prepare: Callable[[Image.Image], Tensor], mode: str) -> Colours | None:
    """Measure a pipeline's effect on colours, on images of one colour; None if it is not such a map.

    Args:
        prepare: The pipeline.
        mode: Mode of its images, "L" or "RGB".
    """
    channels = 1 if mode == "L" else 3

    def answer(*levels: int) -> Tensor:
        image = prepare(Image.new(mode, (64, 64), levels[0] if channels == 1 else levels))
        return image[:, image.shape[1] // 2, image.shape[2] // 2].double()

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
    """Return the statistics from the settings if they agree with the measured ones, else the measured ones."""
    measured = (colours.mean, colours.std)
    for values, own in zip((mean, std), measured, strict=True):
        if not isinstance(values, (tuple, list)) or not np.allclose(values, own, rtol=1e-5, atol=1e-6):
            return colours
    return replace(colours, mean=tuple(mean), std=tuple(std))


def probes(mode: str, size: Sequence[int]) -> Iterable[Image.Image]:
    """Draw the images on which a fast preparation is proved: the same at every call.

    Args:
        mode: "L" or "RGB".
        size: Height and width of the model's images; some probes have this size, or a slightly larger one.
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
    """Return guesses of a transformers image processor's effect on sizes, from its settings.

    Args:
        settings: The processor; `size`, `crop_pct` and `do_resize` are read.
        interpolation: torchvision's name.
        as_tensor: Whether it works on tensors.
    """
    size = {key: value for key, value in dict(getattr(settings, "size", None) or {}).items() if value}
    height, width, edge = (size.pop(key, None) for key in ("height", "width", "shortest_edge"))
    if size or max(height or 0, width or 0, edge or 0) > LARGEST:
        return []  # for example a longest edge, which shows only where images are wider than any probe
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
