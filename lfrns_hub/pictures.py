"""What a model looks at: its input size, transforms and data by name, and whether the two fit."""

import contextlib
import io
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset

from .batches import UNREADABLE, check_finite, iterate, read_logits, split_batch
from .preparation import Preparation
from .reach import CONNECT_TIMEOUT_S, cached, reach_hub
from .untrusted import read_json, short

# Files of a split on disk, in the order of preference.
SPLIT_FILES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "test"),
    "test": ("test", "validation", "valid", "val"),
}
IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image", "pixel_values"), ("label", "fine_label", "labels")
# By the numbers that pillow and transformers give them.
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Decoded pictures are kept up to this many bytes a dataset; CIFAR's 50,000 need 0.15 GB.
MAX_CACHE_BYTES = 1 << 30
GUARD_IMAGES = 2000
MAX_UNREADABLE = 50  # as many as timm's ImageDataset forgives
# No format that pillow hands to another program (EPS), and none of documents.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 64_000_000  # of a picture: 0.2 GB decoded, the size of a 64-megapixel camera's
MAX_CLASSES = 1 << 20

logger = logging.getLogger(__name__)


def num_classes_of(model: nn.Module) -> int:
    """Count the classes a model answers; 0 for a backbone without a head.

    Example:
        >>> num_classes_of(timm.create_model("cifar_resnet20"))
        10
    """
    if hasattr(model, "num_classes"):
        return int(model.num_classes)
    if hasattr(model, "config") and hasattr(model.config, "num_labels"):
        return int(model.config.num_labels)
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return heads[-1].out_features if heads else 0


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """Give channels, height and width of the images a model takes; 3, 224, 224 where nothing says.

    Example:
        >>> input_size_of(timm.create_model("cifar_resnet20", in_chans=1))
        (1, 32, 32)
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        return int(config.num_channels), int(height), int(width)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    # A model built with img_size= or in_chans= keeps the published cfg: its layers know better.
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size:
        height, width = size
    first = cfg.get("first_conv")
    first = next(iter(first), None) if isinstance(first, (tuple, list)) else first
    if first:
        with contextlib.suppress(AttributeError):
            layer = model.get_submodule(first)
            # Of a TResNet the first convolution sees blocks of pixels as channels.
            block = next((m.bs for m in model.modules() if isinstance(m, timm.layers.SpaceToDepth)), 1)
            channels = layer.in_channels // block**2 if isinstance(layer, nn.Conv2d) else channels
    return int(channels), int(height), int(width)


def example_input(model: nn.Module, batch: int = 1) -> Tensor:
    """Make random images a model takes: [batch, C, H, W], its dtype and device, the same at every call.

    Example:
        >>> example_input(timm.create_model("cifar_resnet20"), batch=2).shape
        torch.Size([2, 3, 32, 32])
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    shape = (batch, *input_size_of(model))
    if like.is_meta:
        return torch.empty(shape, dtype=like.dtype, device="meta")
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return images.to(device=like.device, dtype=like.dtype)


def make_transform(
    model: nn.Module,
    train: bool,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    flip: bool = True,
) -> Preparation:
    """Make what turns a picture into the model's input, one at a time or, in `load_data`'s datasets, by batches.

    Args:
        model: Its pretrained_cfg (timm) or image processor (transformers) says size, mean and std.
        train: Adds pad-and-crop by 4 where images are 32 pixels or less, random resized crops above.
        mean: Of each channel, in place of the model's.
        std: Likewise.
        flip: Whether training mirrors half of the pictures; not for digits or letters.
    Returns:
        Callable: picture of any mode and size -> float32 [C, H, W]. Randomness comes from torch's generator.
    """
    channels, height, width = input_size_of(model)
    prepare = _preprocessing(model)
    mean, std = (_per_channel(given, channels) for given in (mean or prepare["mean"], std or prepare["std"]))
    resize: tuple[int, int] | int | None = (height, width)
    if train and max(height, width) > 32:
        resize = None
    elif not train and prepare["crop_pct"] is not None:
        resize = int(min(height, width) / prepare["crop_pct"])
    return Preparation(
        mode="L" if channels == 1 else "RGB",
        size=(height, width),
        resize=resize,
        training=train,
        flip=flip,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=prepare["interpolation"],
    )


def set_preprocessing(
    model: nn.Module,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> None:
    """State, by timm's options, how a model's images are prepared; what is None stays as it is.

    It is written into the model's pretrained_cfg: `make_transform` reads it there, and a checkpoint carries it along.

    Args:
        model: Of timm, or a class of your own.
        mean, std: Of each channel, of pixels from 0 to 1.
        crop_pct: Share of the picture's shorter side that the central crop takes, in (0, 1].
        interpolation: "nearest", "bilinear", "bicubic", "lanczos", "box" or "hamming".
    Raises:
        ValueError: A value is out of its range, or the model is transformers', whose image processor says all this.

    Example:
        >>> model = timm.create_model("cifar_resnet20")
        >>> set_preprocessing(model, crop_pct=0.9)
        >>> model.pretrained_cfg["crop_pct"]
        0.9
    """
    given = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": interpolation}
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return
    if hasattr(getattr(model, "config", None), "model_type"):
        told = ", ".join(f"{key}={value}" for key, value in given.items())
        raise ValueError(
            f"{told}: a transformers model's images are prepared as its image processor says. Change "
            "preprocessor_config.json beside it."
        )
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct}: the share of the shorter side must be in (0, 1]. ImageNet's is 0.875.")
    if std is not None and min(std) <= 0:
        raise ValueError(f"std={std}: each must be above 0. ImageNet's are 0.229, 0.224, 0.225.")
    if interpolation is not None and interpolation not in INTERPOLATIONS.values():
        raise ValueError(f"interpolation={interpolation!r}: it must be one of {', '.join(INTERPOLATIONS.values())}.")
    cfg = getattr(model, "pretrained_cfg", None) or {"input_size": input_size_of(model)}
    model.pretrained_cfg = model.default_cfg = {**cfg, **given}


def load_processor(model: nn.Module) -> Any:
    """Load the image processor that a transformers model came with, to be saved beside its slim one.

    Returns:
        The processor; None for a timm model, whose own configuration says the same, and where there is none.
    """
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    if source:
        from transformers import AutoImageProcessor

        with contextlib.suppress(OSError, ValueError):  # what transformers raises for a folder without one
            return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    return None


class ImageData(Dataset):
    """Pictures and labels of a split; decoded once and kept as uint8 while they fit.

    A picture that cannot be read is left out, as timm does: the next readable one stands in its place, with its own
    label to train on, with the label UNREADABLE (-100) to evaluate on, where it counts as neither right nor wrong.
    Without labels it stands in throughout. Workers share the list of what is unreadable.

    Args:
        pictures: A sequence of PIL pictures: anything with `[int]` and a length, and perhaps `name(int)`.
        labels: Of each picture, None without labels.
        class_names: By label.
        transform: Picture to tensor.
        training: Whether the label of a picture that stands in is its own.
        max_unreadable: Of how many unreadable pictures more than this is an error.
        name: The data, for the error.
    """

    def __init__(
        self,
        pictures: Any,
        labels: list[int] | None,
        *,
        class_names: list[str],
        transform: Callable[[Any], Tensor],
        training: bool = True,
        max_unreadable: int = MAX_UNREADABLE,
        name: str = "the data",
    ) -> None:
        self.pictures, self.labels, self.class_names, self.transform = pictures, labels, class_names, transform
        self.training, self.max_unreadable, self.name = training, max_unreadable, name
        self._decoded: dict[int, Any] = {}
        self._bytes = 0
        self._unreadable = torch.zeros(len(pictures), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Tensor:
        """Give a picture's tensor and its label.

        Raises:
            ValueError: More than `max_unreadable` pictures cannot be read, or none can.
        """
        return self.finish([self.draw(index)])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int] | Tensor]:
        """Give many at once, as a DataLoader asks for them."""
        return self.finish([self.draw(index) for index in indices])

    def draw(self, index: int) -> tuple[Tensor, Any, int | None]:
        """Do with a picture all that takes random numbers, and read its label; `finish` does the rest by batches."""
        asked = index
        while (pixels := self._read(index)) is None:
            index = (index + 1) % len(self)
        label = None
        if self.labels is not None:
            label = self.labels[index] if index == asked or self.training else UNREADABLE
        if isinstance(self.transform, Preparation):
            return pixels, self.transform.draw(pixels), label
        return self.transform(Image.fromarray(pixels)), None, label

    def finish(self, drawn: list[tuple[Tensor, Any, int | None]]) -> list[tuple[Tensor, int] | Tensor]:
        """Give the samples of what `draw` gave."""
        images, draws, labels = zip(*drawn, strict=True)
        if isinstance(self.transform, Preparation):
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
                if isinstance(self.transform, Preparation):
                    pixels = self.transform.fix(picture)
                else:
                    pixels = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
            except Exception as error:  # pillow raises a dozen types for a file that is damaged
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


def load_data(
    name_or_dir: str | os.PathLike[str],
    split: str,
    *,
    transform: Callable[[Image.Image], Tensor],
    label_column: str | None = None,
    val_split: float | None = None,
    class_map: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_unreadable: int = MAX_UNREADABLE,
) -> ImageData:
    """Load a split of labelled pictures.

    Args:
        name_or_dir: A folder of parquet files (`train-*.parquet`, `validation-*` or `test-*`; a column `img` or
            `image`, and `label` or `fine_label`), an image folder (`train/<class>/*.png`, or `<class>/*.png` with
            `val_split`), a Hub id such as "uoft-cs/cifar100", or "digits", scikit-learn's 8x8 handwritten ones (a
            fifth is held out).
        split: "train", "validation" or "test"; where one of the last two is missing the other stands in.
        transform: Picture to tensor, from `make_transform`.
        label_column: Where it has another name.
        val_split: Share of the training pictures that stands in for the validation split, in (0, 1): as many of each
            class, the same ones at every call and for every seed, so that no later call trains on them.
        class_map: Text file that names the classes in the order of the model's logits, one a line, as timm's.
        limit: At most so many pictures, drawn at random: files are often sorted by class.
        seed: Of that draw.
        max_unreadable: So many pictures may be damaged: they are left out, see `ImageData`. More are an error.
    Returns:
        Dataset of (image [C, H, W], label), or of images where there are no labels; `.class_names` by label.
    Raises:
        ValueError: No such data, split or column.
        ConnectionError: A Hub id, and the Hub cannot be reached.
    """
    if split not in SPLIT_FILES:
        raise ValueError(f"load_data(split={split!r}): the splits are {', '.join(SPLIT_FILES)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"load_data(limit={limit}): at least one picture is needed. For all of them pass None.")
    if max_unreadable < 0:
        raise ValueError(
            f"load_data(max_unreadable={max_unreadable}): it must be 0 or more. With 0 one damaged picture is an error."
        )
    if val_split is not None and not 0 < val_split < 1:
        hint = f" For {val_split:g} % pass {val_split / 100:g}." if 1 <= val_split < 100 else ""
        raise ValueError(f"load_data(val_split={val_split}): the share held out must be in (0, 1).{hint}")
    name = str(name_or_dir)
    if name == "digits" and not Path(name).exists():
        if val_split is not None or class_map is not None:
            raise ValueError(
                f"load_data('digits', val_split={val_split}, class_map={class_map}): the digits come divided and "
                "named. Leave both out."
            )
        pictures, labels, class_names = _read_digits(split)
        chosen = _draw(len(labels), limit, seed)
        pictures, labels = [pictures[i] for i in chosen], [labels[i] for i in chosen]
        return ImageData(pictures, labels, class_names=class_names, transform=transform)

    table = read_table(name, "train" if val_split is not None else split, val_split is not None)
    image_column = find_column(table, None, IMAGE_COLUMNS, f"load_data({name!r})", required="pictures")
    label_column = find_column(table, label_column, LABEL_COLUMNS, f"load_data({name!r})")
    if len(table) == 0:
        raise ValueError(f"load_data({name!r}, {split!r}): the split holds no pictures.")
    if val_split is not None:
        labels = list(table[label_column]) if label_column else [0] * len(table)
        train, held_out = _hold_out(labels, val_split, f"load_data({name!r}, val_split={val_split})")
        table = table.select(train if split == "train" else held_out)
    if limit is not None and limit < len(table):
        table = table.select(_draw(len(table), limit, seed))
    labels, class_names = None, []
    if label_column:
        labels = list(table[label_column])
        class_names = getattr(table.features[label_column], "names", None) or []
        if any(not isinstance(label, int) or label < 0 for label in labels):
            raise ValueError(
                f"load_data({name!r}, {split!r}): the column {label_column!r} holds labels that are no class numbers "
                f"(such as {next(v for v in labels if not isinstance(v, int) or v < 0)!r}). Use a labelled split."
            )
        most = len(class_names) or MAX_CLASSES
        if max(labels) >= most:
            raise ValueError(
                f"load_data({name!r}, {split!r}): the column {label_column!r} holds label {max(labels)}, a label must "
                f"lie in [0, {most}). Number the classes from 0, without gaps."
            )
        class_names = class_names or [str(i) for i in range(max(labels) + 1)]
        if class_map is not None:
            labels, class_names = _map_classes(labels, class_names, Path(class_map))
    reading = {"training": split == "train", "max_unreadable": max_unreadable, "name": name}
    pictures = _Column(table, image_column, name)
    return ImageData(pictures, labels, class_names=list(class_names), transform=transform, **reading)


def check_images(model: nn.Module, loader: Any) -> None:
    """Refuse images that a model cannot take, before any work is done on them.

    Args:
        model: Dense model; one image runs through it where the size is not its own.
        loader: Its first batch is looked at.
    Raises:
        ValueError: More classes in the data than the model answers, no batch, no image tensor, another number of
            channels, values that are not finite, or a size the model refuses.
    """
    first = next(iter(loader), None)
    if first is None:
        raise ValueError("check_images(loader): the loader is empty. Give it at least one batch.")
    images, _ = split_batch(first)
    classes, names = num_classes_of(model), getattr(getattr(loader, "dataset", None), "class_names", None) or []
    if 0 < classes < len(names):
        raise ValueError(
            f"{type(model).__name__} answers {classes} classes, the data has {len(names)} ({short(', '.join(names))}): "
            "the head does not fit the data. Fine-tune it first (--dense-epochs)."
        )
    channels, height, width = input_size_of(model)
    wanted = f"{type(model).__name__} takes [N, {channels}, {height}, {width}]"
    way_out = "Make them with make_transform(model, train=False)."
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {list(images.shape)}: {wanted} of float32. {way_out}")
    check_finite(images, "check_images(loader)")
    if images.shape[1] != channels:
        raise ValueError(f"images are {list(images.shape)}, {images.shape[1]} channels: {wanted}. {way_out}")
    if tuple(images.shape[2:]) != (height, width):
        try:
            _answer(model, images[:1])
        except Exception as error:  # every architecture refuses a size in its own way
            raise ValueError(f"images are {list(images.shape)}: {wanted}. {way_out}") from error


def guard_against_chance(model: nn.Module, loader: Any, where: str | os.PathLike[str]) -> float | None:
    """Refuse a model that knows nothing about the data: its units would be ranked by noise.

    Args:
        model: Dense model.
        loader: Of labelled images, at most 2,000 are run.
        where: The data, for the message.
    Returns:
        Top-1 in percent; None where there are no labels.
    Raises:
        ValueError: Labels beyond the head, or top-1 at most 1.5 times chance (with few classes: a tenth above it).
    """
    classes, hits, total = num_classes_of(model), 0, 0
    for images, labels in iterate(loader):
        if labels is None:
            return None
        if int(labels.max()) >= classes:
            raise ValueError(
                f"{type(model).__name__} answers {classes} classes, {where} holds label {int(labels.max())}: "
                "the head does not fit the data. Fine-tune it first (--dense-epochs)."
            )
        hits += int((_answer(model, images).argmax(1).cpu() == labels.cpu()).sum())
        total += int((labels != UNREADABLE).sum())
        if total >= GUARD_IMAGES:
            break
    if not total:
        raise ValueError(f"guard_against_chance({str(where)!r}): the loader is empty. Give it at least one batch.")
    top1_pct, chance_pct = 100 * hits / total, 100 / max(classes, 1)
    if classes > 1 and top1_pct <= min(1.5 * chance_pct, chance_pct + 0.1 * (100 - chance_pct)):
        raise ValueError(
            f"{type(model).__name__} scores {top1_pct:.1f} % on {where}, chance {chance_pct:.1f} %: class order or "
            f"preprocessing differs ({total} images). Mend it, or fine-tune the dense model first (--dense-epochs)."
        )
    return top1_pct


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    """Run a model in eval mode on images, and put its mode back."""
    like = next(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return read_logits(model(images.to(device=like.device, dtype=like.dtype)))
    finally:
        for module, mode in modes:
            module.training = mode


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    """Read mean, std, interpolation and crop_pct (None: no crop) from a model's configuration."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "model_type"):
        return _processor_settings(getattr(config, "_name_or_path", ""), input_size_of(model)[1])
    cfg = timm.data.resolve_data_config(getattr(model, "pretrained_cfg", None) or {"input_size": input_size_of(model)})
    return {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")}


def _processor_settings(source: str, size: int) -> dict[str, Any]:
    """Read a transformers image processor's settings; ViT's own where a model has none."""
    folder = Path(source) / "preprocessor_config.json" if source else None
    path = folder if folder and folder.is_file() else cached(source, "preprocessor_config.json")
    settings: dict[str, Any] = {}
    if path is None and source and not Path(source).is_dir() and cached(source):
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(Exception):  # a model without a processor is no error
            path = Path(hf_hub_download(source, "preprocessor_config.json", etag_timeout=CONNECT_TIMEOUT_S))
    if path is not None:
        settings = read_json(path, f"model {source!r}")
    _check_settings(settings, f"model {source!r}: preprocessor_config.json")
    resize = settings.get("size")
    shortest = resize.get("shortest_edge") if isinstance(resize, dict) else None
    crop_pct = settings.get("crop_pct")
    if crop_pct is None and shortest and settings.get("do_center_crop"):
        crop_pct = size / shortest
    return {
        "mean": tuple(settings.get("image_mean") or (0.5, 0.5, 0.5)),
        "std": tuple(settings.get("image_std") or (0.5, 0.5, 0.5)),
        "interpolation": INTERPOLATIONS[2 if settings.get("resample") is None else settings["resample"]],
        "crop_pct": crop_pct,
    }


def _check_settings(settings: dict[str, Any], where: str) -> None:
    """Refuse what of an image processor's settings cannot prepare a picture."""

    def are_numbers(values: Any, above: float) -> bool:
        return isinstance(values, list) and 0 < len(values) <= 64 and all(_is_number(v) and v > above for v in values)

    rules = {
        "image_mean": lambda value: are_numbers(value, -1e6),
        "image_std": lambda value: are_numbers(value, 0),
        "resample": lambda value: type(value) is int and value in INTERPOLATIONS,
        "crop_pct": lambda value: _is_number(value) and 0.01 <= value <= 1,
        "size": lambda value: (
            not isinstance(value, dict)
            or value.get("shortest_edge") is None
            or (_is_number(value["shortest_edge"]) and 1 <= value["shortest_edge"] <= 4096)
        ),
    }
    for key, fits in rules.items():
        if settings.get(key) is not None and not fits(settings[key]):
            raise ValueError(f"{where} has {key} = {short(settings[key])}, which prepares no picture. Mend it.")


def _is_number(value: Any) -> bool:
    """Say whether a value of JSON is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    """Spread statistics of three channels over however many a model takes."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


class _Column:
    """The pictures of a table, decoded one at a time."""

    def __init__(self, table: Any, column: str, root: str) -> None:
        self.table, self.column, self.root = as_files(table, column), column, root

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Image.Image:
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


def _draw(total: int, limit: int | None, seed: int) -> list[int]:
    """Draw at most `limit` of `total` indices, ascending, the same for a seed."""
    if limit is None or limit >= total:
        return list(range(total))
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def _hold_out(labels: list[int], share: float, call: str) -> tuple[list[int], list[int]]:
    """Split indices into those to train on and those held out: of each class the same share, whatever the order."""
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    by_class = sorted(drawn, key=labels.__getitem__)  # stable: within a class as drawn
    held_out = sorted(i for n, i in enumerate(by_class) if int((n + 1) * share + 0.5) > int(n * share + 0.5))
    if not 0 < len(held_out) < len(labels):
        raise ValueError(f"{call}: holds out {len(held_out)} of {len(labels)} pictures. Give another share.")
    return sorted(set(drawn) - set(held_out)), held_out


def _map_classes(labels: list[int], class_names: list[str], path: Path) -> tuple[list[int], list[str]]:
    """Number the classes in the order in which a file names them."""
    if not path.is_file():
        raise ValueError(f"class_map={str(path)!r}: there is no such file. Give one that names a class on each line.")
    order = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    number = {name: index for index, name in enumerate(order)}
    missing = [name for name in class_names if name not in number]
    if missing or len(number) < len(order):
        what = f"does not name {', '.join(map(repr, missing[:3]))}" if missing else "names a class twice"
        raise ValueError(f"class_map={str(path)!r}: {what}. Each class of the data stands on one line, once.")
    return [number[class_names[label]] for label in labels], order


def _read_digits(split: str) -> tuple[list[Image.Image], list[int], list[str]]:
    """Read scikit-learn's digits, 1,437 to train and 360 held out, as grey pictures."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    halves = train_test_split(range(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
    chosen = halves[0] if split == "train" else halves[1]
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # ink is stated from 0 to 16
    return [Image.fromarray(pixels[i]) for i in chosen], [int(digits.target[i]) for i in chosen], list("0123456789")


def parquet_files(folder: Path, split: str) -> list[Path]:
    """Find the parquet files of a split."""
    for stem in SPLIT_FILES[split]:
        files = sorted([*folder.glob(f"{stem}[-_.]*parquet"), *folder.glob(f"data/{stem}[-_.]*parquet")])
        if files:
            return files
    return []


def read_table(name: str, split: str, undivided: bool = False, streaming: bool = False) -> Any:
    """Open a split with datasets, from a folder or the Hub.

    Args:
        name: Folder or Hub id.
        split: "train", "validation" or "test".
        undivided: Take all of a folder of pictures that has no splits.
        streaming: Give a `datasets.IterableDataset`, of which nothing is read or fetched yet.
    """
    import datasets

    bar = datasets.is_progress_bar_enabled()
    folder = Path(name)
    if folder.is_dir():
        datasets.disable_progress_bar()
        try:
            files = parquet_files(folder, split)
            if files:
                files = [str(file) for file in files]
                return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
            for stem in SPLIT_FILES[split]:
                if (folder / stem).is_dir():
                    given = {"data_dir": str(folder / stem), "split": "train", "streaming": streaming}
                    return datasets.load_dataset("imagefolder", **given)
            if undivided and any(path.is_dir() for path in folder.iterdir()):
                return datasets.load_dataset("imagefolder", data_files=f"{folder}/*/*", split="train")
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            reason = str(error.__cause__ or error).splitlines()[0][:200]
            raise ValueError(
                f"load_data({name!r}, {split!r}): cannot be read as pictures ({short(reason, 200)}). Write the files "
                "again, or give a folder of pictures."
            ) from error
        finally:
            if bar:
                datasets.enable_progress_bar()
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"load_data({name!r}, {split!r}): found {found}. The folder must hold {SPLIT_FILES[split][0]}-*.parquet "
            f"or {SPLIT_FILES[split][0]}/<class>/<picture>; of one folder per class, --val-split 0.1 holds a tenth out."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"load_data({name!r}): there is no such folder. Give a folder, a Hub id (user/name) or 'digits'."
        )
    reach_hub(f"the data {name}")
    try:
        splits = datasets.get_dataset_split_names(name)
        wanted = next((s for s in SPLIT_FILES[split] if s in splits), None)
        if wanted is None:
            raise ValueError(f"load_data({name!r}, {split!r}): it has the splits {', '.join(splits)}.")
        return datasets.load_dataset(name, split=wanted, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"load_data({name!r}): the Hub has no such data, or not for you. Check the name.") from error


def as_files(table: Any, column: str) -> Any:
    """Read a column of pictures as encoded files: their bytes, or their paths."""
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # what arrow raises depends on what the column holds
        raise ValueError(
            f"the column {column!r} holds {short(str(table.features[column]))}, no pictures. Encode them as PNG or "
            "JPEG."
        ) from error


def find_column(
    table: Any, given: str | None, usual: tuple[str, ...], call: str, *, required: str | None = None
) -> str | None:
    """Find a column by its name, or by the usual ones."""
    columns = table.column_names
    if given is not None and given not in columns:
        raise ValueError(f"{call}: there is no column {given!r}. It has {', '.join(columns)}.")
    found = given or next((column for column in usual if column in columns), None)
    if found is None:
        kind = "Image" if required else "ClassLabel"
        found = next((column for column, f in table.features.items() if type(f).__name__ == kind), None)
    if found is None and required:
        raise ValueError(f"{call}: no column of {required}: {', '.join(usual)}. It has {', '.join(columns)}.")
    return found
