"""From a picture to a model's input: one part the same every time and kept, one drawn anew, one of batches.

N images, C channels, H x W the size that the model takes, h x w that of what is kept.
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
# A crop of a training picture: top, left, height, width; and whether it is mirrored.
Drawn = tuple[int, int, int, int, bool]


@dataclass(frozen=True)
class Preparation:
    """How pictures are prepared for a model; called with one picture, it gives the tensor [C, H, W], float32.

    `fix`, then `draw` for each picture by torch's generator, then `finish` of a whole batch, is the same. After `draw`
    a picture has the size of the model's images, whatever its own.

    Attributes:
        mode: "L" or "RGB".
        size: H and W.
        resize: To what a picture is resized at first: [h, w], its shorter side alone, or None.
        training: Whether images are cropped at random: padded by 4 pixels where they have been resized, else of at
            least a third of the picture, resized to H x W as tensors: bicubic where torch has no `interpolation`.
        flip: Whether half of them are mirrored in training.
        mean, std: Of each channel that comes out, of pixels from 0 to 1.
        interpolation: By torchvision's name.
        as_tensor: Whether a picture is resized as a tensor, as transformers does it by torchvision, not by pillow: on
            noise the two differ by up to 11 of 255.
        floored: Whether a central crop whose margins are uneven begins at the smaller half, as transformers crops;
            torchvision rounds the half to even.
        order: Of the picture's channels in what comes out.
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
        """Prepare one picture."""
        pixels, drawn = self.draw(self.fix(picture))
        return self.finish([pixels], [drawn])[0]

    def fix(self, picture: Image.Image) -> Tensor:
        """Return what of a picture is the same every time, [C, h, w], uint8."""
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
        """Draw what becomes of a picture this time, None where nothing is drawn; one of any size is cropped at once."""
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
        """Return the images [N, C, H, W], float32, of what `draw` gave."""
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
        """Cut the centre out, with zeros around what is too small."""
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
    """Pictures prepared by what the model came with: its image processor, or its library's transform, one at a time.

    In training a picture is cropped and mirrored first, as `Preparation` does it, and then prepared.

    Attributes:
        prepare: Picture of `mode` -> float32 [C, H, W].
        mode: "L" or "RGB".
        size: H and W of an image.
        training: Whether pictures are cropped at random.
        flip: Whether half of them are mirrored in training.
    """

    prepare: Callable[[Image.Image], Tensor]
    mode: str
    size: tuple[int, int]
    training: bool
    flip: bool

    def __call__(self, picture: Image.Image) -> Tensor:
        """Prepare one picture."""
        pixels, drawn = self.draw(self.fix(picture))
        return self.finish([pixels], [drawn])[0]

    def fix(self, picture: Image.Image) -> Tensor:
        """Return what of a picture is the same every time: the image, or the picture to train on as uint8 [C, h, w]."""
        from torchvision.transforms.v2 import functional as F

        picture = in_mode(picture, self.mode)
        if not self.training:
            # A picture 20 times as long as wide has 74 million pixels on its way through Donut's own processor.
            refuse_long(picture, min(self.size), 2 * MAX_PIXELS)
            return self.prepare(picture)
        return F.pil_to_tensor(F.resize(picture, list(self.size)) if self._is_small() else picture)

    def draw(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Prepare a picture to train on, cropped and mirrored at random; any other is prepared already."""
        if not self.training:
            return pixels, None
        return self._augmented(pixels, draw_crop(pixels, self.size if self._is_small() else None, self.flip)), None

    def finish(self, pixels: Sequence[Tensor], drawn: Sequence[None]) -> Tensor:
        """Return the images [N, C, H, W], float32, of what `draw` gave.

        Raises:
            ValueError: They differ in size, as pictures do that are resized without a crop.
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
        """Crop and mirror a picture, then prepare it."""
        from torchvision.transforms.v2 import functional as F

        padded = F.pad(pixels, [PADDING] * 4) if self._is_small() else pixels
        crop = F.crop(padded, *drawn[:4])
        return self.prepare(F.to_pil_image(F.horizontal_flip(crop) if drawn[4] else crop, self.mode))


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """Return a picture upright, of 8 bits and of a mode; transparency is dropped, as transformers' pipeline does it."""
    picture = as_bytes(picture)
    return picture if picture.mode == mode else picture.convert(mode)


def refuse_long(picture: Image.Image, side: int, most: int = MAX_PIXELS) -> None:
    """Refuse a picture so much longer than wide that, resized by its shorter side, it is larger than any.

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
    """Draw a crop and a reflection by torch's generator.

    Args:
        pixels: The picture, [C, h, w].
        size: Of the crop, of a picture padded by 4 pixels; None: of at least a third of the picture.
        flip: Whether half are mirrored.
    """
    from torchvision.transforms import RandomResizedCrop

    if size is None:
        # Crops of at least a third: the 8 % of ImageNet training from scratch undoes a pretrained model.
        box = RandomResizedCrop.get_params(pixels, scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3))
    else:
        top, left = torch.randint(2 * PADDING + 1, (2,)).tolist()
        box = (top, left, *size)
    return (*box, bool(flip and torch.rand(()) < 0.5))
