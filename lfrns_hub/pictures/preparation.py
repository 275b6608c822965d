"""From a picture to a model's input: one part the same every time and kept as uint8, one drawn anew, one of batches.

N images, C channels, H x W the size that the model takes, h x w that of what is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

PADDING = 4  # pixels, of He et al. 2016 for CIFAR
# A crop of a training picture: top, left, height, width; and whether it is mirrored.
Drawn = tuple[int, int, int, int, bool]


@dataclass(frozen=True)
class Preparation:
    """How pictures are prepared for a model; called with one picture, it gives the tensor [C, H, W], float32.

    `fix`, then `draw` for each picture by torch's generator, then `finish` of a whole batch, is the same.

    Attributes:
        mode: "L" or "RGB".
        size: H and W.
        resize: To what a picture is resized at first: [h, w], its shorter side alone, or None.
        training: Whether images are cropped at random: padded by 4 pixels where they have been resized, else of at
            least a third of the picture, resized to H x W as tensors: bicubic where torch has no `interpolation`.
        flip: Whether half of them are mirrored in training.
        mean, std: Of each channel.
        interpolation: By torchvision's name.
    """

    mode: str
    size: tuple[int, int]
    resize: tuple[int, int] | int | None
    training: bool
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def __call__(self, picture: Image.Image) -> Tensor:
        """Prepare one picture."""
        pixels = self.fix(picture)
        return self.finish([pixels], [self.draw(pixels)])[0]

    def fix(self, picture: Image.Image) -> Tensor:
        """Give what of a picture is the same every time, [C, h, w], uint8."""
        from torchvision.transforms.v2 import functional as F

        picture = picture if picture.mode == self.mode else picture.convert(self.mode)
        if self.resize is not None:
            wanted = [self.resize] if isinstance(self.resize, int) else list(self.resize)
            if len(wanted) == 1 or wanted != [picture.height, picture.width]:
                picture = F.resize(picture, wanted, self._interpolation())
        if not self.training:
            picture = F.center_crop(picture, list(self.size))
        return F.pil_to_tensor(picture)

    def draw(self, pixels: Tensor) -> Drawn | None:
        """Draw what becomes of a picture this time; None where nothing is drawn."""
        if not self.training:
            return None
        from torchvision.transforms import RandomResizedCrop

        height, width = self.size
        if self.resize is None:
            # Crops of at least a third: the 8 % of ImageNet training from scratch undoes a pretrained model.
            box = RandomResizedCrop.get_params(pixels, scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3))
        else:
            top, left = torch.randint(2 * PADDING + 1, (2,)).tolist()
            box = (top, left, height, width)
        return (*box, bool(self.flip and torch.rand(()) < 0.5))

    def finish(self, pixels: Sequence[Tensor], drawn: Sequence[Drawn | None]) -> Tensor:
        """Give the images [N, C, H, W], float32, of what `fix` and `draw` gave."""
        from torchvision.transforms.functional import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        if not self.training:
            images = torch.stack(list(pixels))
        elif self.resize is None:
            known = self.interpolation in ("nearest", "bilinear", "bicubic")
            interpolation = self._interpolation() if known else InterpolationMode.BICUBIC
            options = {"size": list(self.size), "interpolation": interpolation, "antialias": True}
            images = torch.stack([F.resized_crop(p, *d[:4], **options) for p, d in zip(pixels, drawn, strict=True)])
        else:
            padded = F.pad(torch.stack(list(pixels)), [PADDING] * 4)
            images = torch.stack([F.crop(p, *d[:4]) for p, d in zip(padded, drawn, strict=True)])
        mirrored = [number for number, d in enumerate(drawn) if d is not None and d[4]]
        if mirrored:
            images[mirrored] = F.horizontal_flip(images[mirrored])
        return F.normalize(F.to_dtype(images, torch.float32, scale=True), list(self.mean), list(self.std), inplace=True)

    def _interpolation(self) -> Any:
        """Give torchvision's constant."""
        from torchvision.transforms.functional import InterpolationMode

        return InterpolationMode(self.interpolation)
