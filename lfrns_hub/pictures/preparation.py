"""From image file to model input in three stages: a deterministic part that is cached, a random draw, a batched finish.

N images, C channels, H x W the model's input size, h x w the size of the cached part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lfrns_hub.pictures.decoding import MAX_PIXELS, as_bytes

PADDING = 4  # pixels, of He et al. 2016 for CIFAR
SMALL = 32  # pixels: images up to this size are padded and cropped in training, larger ones cropped and resized
# A crop of a training image: top, left, height, width; and whether it is mirrored.
Drawn = tuple[int, int, int, int, bool]


@dataclass(frozen=True)
class Preparation:
    """Preparation of images for a model; called with one image, it returns the tensor [C, H, W], float32.

    `fix`, then `draw` for each image by torch's generator, then `finish` of a whole batch, gives the same result. After
    `draw` an image has the model's input size, whatever its original size.

    Attributes:
        mode: "L" or "RGB".
        size: H and W.
        resize: First resize of an image: to [h, w], or of its shorter side only, or None.
        training: Whether images are cropped at random: padded by 4 pixels if they have been resized, else of at
            least a third of the image, resized to H x W as tensors: bicubic if torch does not have `interpolation`.
        flip: Whether half of them are mirrored in training.
        mean, std: Of each output channel, for pixels from 0 to 1.
        interpolation: torchvision's name.
        as_tensor: Whether an image is resized as a tensor, as transformers does by torchvision, instead of by pillow:
            on noise the two differ by up to 11 of 255.
        floored: Whether a central crop with uneven margins starts at the smaller half, as in transformers;
            torchvision rounds the half to even.
        order: Index of the input channel for each output channel.
    """

    mode: str
    size: tuple[int, int]
    resize: tuple[int, int] | int | None
    training: bool
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    as_tensor: bool = False
    floored: bool = False
    order: tuple[int, ...] | None = None

    def __call__(self, picture: Image.Image) -> Tensor:
        """Prepare one image."""
        pixels, drawn = self.draw(self.fix(picture))
        return self.finish([pixels], [drawn])[0]

    def fix(self, picture: Image.Image) -> Tensor:
        """Return the deterministic part of an image, [C, h, w], uint8."""
        from torchvision.transforms.v2 import functional as F

        picture = in_mode(picture, self.mode)
        image: Any = F.pil_to_tensor(picture) if self.as_tensor else picture
        if self.resize is not None:
            if isinstance(self.resize, int):
                refuse_long(picture, self.resize)
            wanted = [self.resize] if isinstance(self.resize, int) else list(self.resize)
            if len(wanted) == 1 or wanted != [picture.height, picture.width]:
                image = F.resize(image, wanted, self._interpolation())
        if not self.training:
            image = self._crop(image)
        return image if self.as_tensor else F.pil_to_tensor(image)

    def draw(self, pixels: Tensor) -> tuple[Tensor, Drawn | None]:
        """Draw the random crop of an image, None without one; an image of variable size is cropped at once."""
        from torchvision.transforms.functional import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        if not self.training:
            return pixels, None
        drawn = draw_crop(pixels, self.size if self.resize is not None else None, self.flip)
        if self.resize is None:
            known = self.interpolation in ("nearest", "bilinear", "bicubic")
            interpolation = self._interpolation() if known else InterpolationMode.BICUBIC
            options = {"size": list(self.size), "interpolation": interpolation, "antialias": True}
            pixels = F.resized_crop(pixels, *drawn[:4], **options)
        return pixels, drawn

    def finish(self, pixels: Sequence[Tensor], drawn: Sequence[Drawn | None]) -> Tensor:
        """Return the images [N, C, H, W], float32, for results of `draw`."""
        from torchvision.transforms.v2 import functional as F

        images = torch.stack(list(pixels))
        if self.training and self.resize is not None:
            padded = F.pad(images, [PADDING] * 4)
            images = torch.stack([F.crop(p, *d[:4]) for p, d in zip(padded, drawn, strict=True)])
        mirrored = [number for number, d in enumerate(drawn) if d is not None and d[4]]
        if mirrored:
            images[mirrored] = F.horizontal_flip(images[mirrored])
        if self.order is not None:
            images = images[:, list(self.order)]
        return F.normalize(F.to_dtype(images, torch.float32, scale=True), list(self.mean), list(self.std), inplace=True)

    def _crop(self, image: Any) -> Any:
        """Crop the centre, with zeros around images that are too small."""
        from torchvision.transforms.v2 import functional as F

        height, width = self.size
        if not self.floored:
            return F.center_crop(image, [height, width])
        rows, columns = F.get_size(image)
        down, right = max(0, height - rows), max(0, width - columns)
        if down or right:
            image = F.pad(image, [right // 2, down // 2, (right + 1) // 2, (down + 1) // 2])
        return F.crop(image, (rows + down - height) // 2, (columns + right - width) // 2, height, width)

    def _interpolation(self) -> Any:
        """Return torchvision's constant."""
        from torchvision.transforms.functional import InterpolationMode

        return InterpolationMode(self.interpolation)


@dataclass(frozen=True)
class OwnPreparation:
    """Images prepared by the model's own image processor or its library's transform, one at a time.

    In training an image is first cropped and mirrored, as in `Preparation`, and then prepared.

    Attributes:
        prepare: Image of `mode` -> float32 [C, H, W].
        mode: "L" or "RGB".
        size: H and W of an image.
        training: Whether images are cropped at random.
        flip: Whether half of them are mirrored in training.
    """

    prepare: Callable[[Image.Image], Tensor]
    mode: str
    size: tuple[int, int]
    training: bool
    flip: bool

    def __call__(self, picture: Image.Image) -> Tensor:
        """Prepare one image."""
        pixels, drawn = self.draw(self.fix(picture))
        return self.finish([pixels], [drawn])[0]

    def fix(self, picture: Image.Image) -> Tensor:
        """Return the deterministic part: the prepared image, or for training the image as uint8 [C, h, w]."""
        from torchvision.transforms.v2 import functional as F

        picture = in_mode(picture, self.mode)
        if not self.training:
            # An image 20 times as long as wide has 74 million pixels inside Donut's own processor.
            refuse_long(picture, min(self.size), 2 * MAX_PIXELS)
            return self.prepare(picture)
        return F.pil_to_tensor(F.resize(picture, list(self.size)) if self._is_small() else picture)

    def draw(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Prepare a training image, cropped and mirrored at random; any other is prepared already."""
        if not self.training:
            return pixels, None
        return self._augmented(pixels, draw_crop(pixels, self.size if self._is_small() else None, self.flip)), None

    def finish(self, pixels: Sequence[Tensor], drawn: Sequence[None]) -> Tensor:
        """Return the images [N, C, H, W], float32, for results of `draw`.

        Raises:
            ValueError: They differ in size, for example if images are resized without a crop.
        """
        sizes = {tuple(image.shape) for image in pixels}
        if len(sizes) > 1:
            raise ValueError(
                f"the model's own processor makes images of {' and '.join(map(str, sorted(sizes)[:2]))} of these "
                "pictures: a batch has one size. Use batches of one picture, or crop the pictures alike."
            )
        return torch.stack(list(pixels))

    def _is_small(self) -> bool:
        """Return whether images are of CIFAR's size."""
        return max(self.size) <= SMALL

    def _augmented(self, pixels: Tensor, drawn: Drawn) -> Tensor:
        """Crop and mirror an image, then prepare it."""
        from torchvision.transforms.v2 import functional as F

        padded = F.pad(pixels, [PADDING] * 4) if self._is_small() else pixels
        crop = F.crop(padded, *drawn[:4])
        return self.prepare(F.to_pil_image(F.horizontal_flip(crop) if drawn[4] else crop, self.mode))


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """Return an image upright, with 8 bits and a given mode; transparency is dropped, as in transformers' pipeline."""
    picture = as_bytes(picture)
    return picture if picture.mode == mode else picture.convert(mode)


def refuse_long(picture: Image.Image, side: int, most: int = MAX_PIXELS) -> None:
    """Refuse an image so elongated that, resized by its shorter side, it is too large.

    Raises:
        ValueError: It would have more than `most` pixels, 64 million of them by default.
    """
    pixels = picture.width * picture.height * (side / max(min(picture.size), 1)) ** 2
    if pixels > most:
        raise ValueError(
            f"{picture.width} x {picture.height} pixels, which is {pixels:,.0f} where its shorter side has {side}: at "
            f"most {most:,} are prepared"
        )


def draw_crop(pixels: Tensor, size: tuple[int, int] | None, flip: bool) -> Drawn:
    """Draw a random crop and reflection by torch's generator.

    Args:
        pixels: The image, [C, h, w].
        size: Size of the crop, from an image padded by 4 pixels; None: a crop of at least a third of the image.
        flip: Whether half of them are mirrored.
    """
    from torchvision.transforms import RandomResizedCrop

    if size is None:
        # Crops of at least a third: the 8 % of ImageNet training from scratch harms a pretrained model.
        box = RandomResizedCrop.get_params(pixels, scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3))
    else:
        top, left = torch.randint(2 * PADDING + 1, (2,)).tolist()
        box = (top, left, *size)
    return (*box, bool(flip and torch.rand(()) < 0.5))
