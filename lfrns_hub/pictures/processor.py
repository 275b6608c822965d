"""A transformers image processor, the reference for a model's preprocessing: found, run, changed, saved."""

import contextlib
import copy
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from lfrns_hub.format.compat import vit_processor
from lfrns_hub.format.untrusted import CODE_KEYS, read_json, refuse_large, short, without_code
from lfrns_hub.hub.reach import CONNECT_TIMEOUT_S, cached, hub_errors, reach_hub
from lfrns_hub.pictures.model_input import input_size_of

logger = logging.getLogger(__name__)
FILE = "preprocessor_config.json"
FILES = ("processor_config.json", FILE)  # transformers reads an image processor from either
MAX_SIDE = 4096  # pixels, of a size in an untrusted file
# Numbers of an image in three channels: 8 million pixels. The largest known is Donut's, of 4.9 million.
MAX_NUMBERS = 3 << 23
MIN_CROP_PCT = 0.01  # a smaller share would enlarge images a hundredfold
# By the numbers of pillow and transformers.
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class ProcessorCall:
    """A processor as a function of one image, as in transformers' pipeline.

    Attributes:
        processor: A processor of any class and backend.
    """

    processor: Any

    def __call__(self, picture: Image.Image) -> Tensor:
        """Return the tensor [C, H, W], float32, of an image.

        Raises:
            ValueError: The processor returns something else: tokens, patches, several crops.
        """
        answer = dict(self.processor(images=picture, return_tensors="pt"))
        image = answer.get("pixel_values")
        if set(answer) != {"pixel_values"} or image.ndim != 4 or len(image) != 1:
            shapes = ", ".join(f"{key} {list(getattr(value, 'shape', []))}" for key, value in answer.items())
            raise ValueError(
                f"{type(self.processor).__name__} makes {shapes} of a picture, where images [1, C, H, W] are needed"
            )
        return image[0].float()


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether a model has a transformers configuration."""
    return hasattr(getattr(model, "config", None), "model_type")


def find_processor(model: nn.Module) -> Any:
    """Return the image processor of a transformers model, as loaded with it or changed by `set_preprocessing`.

    Args:
        model: Its config names the folder or the Hub id that it was loaded from.
    Returns:
        The processor, as opened by AutoImageProcessor; None for other models, and for a model without one.
    Raises:
        ValueError: There is one that cannot be opened: damaged, or with its own code, which is not run.
        ConnectionError: The Hub is needed to find it, and cannot be reached.
    """
    if not is_of_transformers(model):
        return None
    if (stated := getattr(model, "lfrns_processor", None)) is not None:
        return stated
    source = str(getattr(model.config, "_name_or_path", "") or "")
    folder = _folder_of(source, model.config) if source else None
    if folder is None:
        return None
    call = f"model {source!r}"
    from transformers import AutoImageProcessor

    named = _check_files(folder, call)
    try:
        # A configuration replaces a missing class name: it is passed only if the files name none.
        options = {} if named else {"config": _stock(model.config)}
        processor = AutoImageProcessor.from_pretrained(folder, **options, trust_remote_code=False)
    except Exception as error:  # a class of another version, its own code, a value that it refuses
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{call}: its image processor cannot be opened ({short(reason, 200)}). Save one of transformers' own "
            "beside it, or prepare the images by a transform of your own; code that a folder brings is not run."
        ) from error
    return _for_channels(processor, model)


def load_processor(model: nn.Module) -> Any:
    """Return the image processor of a transformers model, to be saved with its slim model.

    Args:
        model: Any model, of transformers or not.
    Returns:
        The processor: the model's own, or, if it has none, one that resizes to the size in its config and scales
        pixels to [-1, 1], like ViT's: a guess, with a warning. None for a timm model or a custom class, whose own
        configuration states the same, and where the processor cannot be opened.
    """
    with contextlib.suppress(ValueError):  # make_transform refuses it; a checkpoint is saved without it
        return find_processor(model) or guess_processor(model)
    return None


def guess_processor(model: nn.Module) -> Any:
    """Return a processor for a transformers model without one; None for other models."""
    if not is_of_transformers(model):
        return None
    channels, height, width = input_size_of(model)
    source = str(getattr(model.config, "_name_or_path", "") or "") or type(model).__name__
    logger.warning(
        "%s came without an image processor (%s): pictures are resized to %d x %d and scaled to [-1, 1], as for ViT. "
        "Save the processor it was trained with beside it.",
        source,
        FILE,
        height,
        width,
    )
    half = [0.5] * channels
    return vit_processor()(size={"height": height, "width": width}, image_mean=half, image_std=half)


def write_processor(processor: Any, folder: Path) -> None:
    """Write a processor to a folder, and check that it loads unchanged.

    Raises:
        ValueError: AutoImageProcessor would open one there that prepares images differently.
    """
    from transformers import AutoImageProcessor

    processor.save_pretrained(folder)
    for path in (folder / name for name in FILES if (folder / name).is_file()):
        settings = without_code(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not (folder / FILE).is_file():  # timm's wrapper states it in config.json
        return
    back = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    own, again = (json.loads(one.to_json_string()) for one in (processor, back))
    keys = sorted(key for key in {*own, *again} - {*CODE_KEYS} if own.get(key) != again.get(key))
    if keys:
        raise ValueError(
            f"save(processor={type(processor).__name__}): it comes back as {type(back).__name__} with other "
            f"{short(', '.join(keys))}. Pass one that AutoImageProcessor opens as it is."
        )


def check_settings(settings: dict[str, Any], where: str) -> None:
    """Refuse settings of an image processor, or of timm's pretrained_cfg, that are invalid or give a huge image.

    Args:
        settings: Settings by name, as in a file; only those that affect images are checked.
        where: Name of their source in the error.
    Raises:
        ValueError: A setting has the wrong type or is out of range.
    """
    rules: dict[str, Callable[[Any], bool]] = {
        "input_size": lambda size: isinstance(size, (list, tuple)) and len(size) == 3 and all(map(_is_side, size)),
        "crop_pct": lambda share: _is_number(share) and MIN_CROP_PCT <= share <= 1,
        "interpolation": lambda name: name in ("random", *INTERPOLATIONS.values()),
        "crop_mode": lambda name: name in ("center", "squash", "border"),
        **dict.fromkeys(("mean", "image_mean"), lambda values: _are_numbers(values, -1e6)),
        **dict.fromkeys(("std", "image_std"), lambda values: _are_numbers(values, 0)),
        **dict.fromkeys(("first_conv", "classifier"), _are_names),
    }
    for key, fits in rules.items():
        if settings.get(key) is not None and not fits(settings[key]):
            raise ValueError(f"{where} has {key} = {short(settings[key])}, which prepares no picture. Mend it.")
    most = 0.0
    for key, value in settings.items():
        if "size" in key or "edge" in key or "resize" in key:
            refuse_large(value, f"{where}: {key}", MAX_SIDE)
            sides = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            sides = list(filter(_is_number, sides))
            numbers = math.prod(sides) if len(sides) > 2 else 3 * math.prod(sides if len(sides) > 1 else 2 * sides)
            if numbers > MAX_NUMBERS:
                raise ValueError(
                    f"{where} has {key} = {short(value)}: images of {numbers:,} numbers, at most {MAX_NUMBERS:,} are "
                    "taken. Mend it."
                )
            most = max(most, numbers)
    if most / (settings.get("crop_pct") or 1) ** 2 > 4 * MAX_NUMBERS:
        raise ValueError(
            f"{where} has crop_pct = {settings['crop_pct']}, for which pictures are enlarged to more than "
            f"{4 * MAX_NUMBERS // 3:,} pixels. Mend it."
        )


def changed_processor(processor: Any, **settings: Any) -> Any:
    """Return a copy of a processor with other settings."""
    changed = copy.deepcopy(processor).to_dict() | settings
    changed.pop("image_processor_type", None)
    return type(processor)(**changed)


def _folder_of(source: str, config: Any) -> Path | None:
    """Return the folder of a model's processor: its own, or in the Hub's cache; None where there is none."""
    if Path(source).is_dir():
        names = (*FILES, "config.json") if config.model_type.endswith("timm_wrapper") else FILES
        return Path(source) if any((Path(source) / name).is_file() for name in names) else None
    for name in FILES[::-1]:
        if path := cached(source, name):
            return path.parent
    if not cached(source):
        return None
    from huggingface_hub import _CACHED_NO_EXIST, errors, hf_hub_download, try_to_load_from_cache

    if all(try_to_load_from_cache(source, name) is _CACHED_NO_EXIST for name in FILES):
        return None
    what = f"the image processor of {source}"
    reach_hub(what)
    for name in FILES[::-1]:
        with hub_errors(what):
            try:
                return Path(hf_hub_download(source, name, etag_timeout=CONNECT_TIMEOUT_S)).parent
            except errors.LocalEntryNotFoundError:
                raise
            except errors.EntryNotFoundError:
                continue
    return None


def _check_files(folder: Path, call: str) -> bool:
    """Check the settings of a processor in a folder's files, and return whether they name its class."""
    named = False
    for name in FILES:
        if (folder / name).is_file():
            settings = read_json(folder / name, call)
            inside = settings.get("image_processor")
            settings = inside if isinstance(inside, dict) else settings
            check_settings(settings, f"{call}: {name}")
            own = any(settings.get(key) for key in ("image_processor_type", "feature_extractor_type"))
            auto_map = settings.get("auto_map")
            if not own and isinstance(auto_map, dict) and "AutoImageProcessor" in auto_map:
                raise ValueError(
                    f"{call}: its image processor is {short(auto_map['AutoImageProcessor'])}; code that a folder "
                    "brings is not run. Save one of transformers' own beside it, or prepare the images by a transform "
                    "of your own."
                )
            named = named or own
    return named


def _stock(config: Any) -> Any:
    """Return a configuration of the type for which transformers has a processor; ours are subclasses of it."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    stock = next((kind for kind in type(config).__mro__ if kind in IMAGE_PROCESSOR_MAPPING), None)
    return config if stock is None or type(config) is stock else stock()


def _for_channels(processor: Any, model: nn.Module) -> Any:
    """Return a processor with statistics for the model's number of channels, if it states them for colours."""
    channels = input_size_of(model)[0]
    stated = [getattr(processor, key, None) for key in ("image_mean", "image_std")]
    if channels != 1 or not all(isinstance(values, (list, tuple)) and len(values) == 3 for values in stated):
        return processor
    mean, std = ([sum(values) / 3] for values in stated)
    return changed_processor(processor, image_mean=mean, image_std=std)


def _is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    """Return whether a value is the side of an image."""
    return type(value) is int and 0 < value <= MAX_SIDE


def _are_numbers(values: Any, above: float) -> bool:
    """Return whether a value is one or several finite numbers above a bound."""
    values = [values] if _is_number(values) else values
    is_list = isinstance(values, (list, tuple)) and 0 < len(values) <= 64
    return is_list and all(_is_number(value) and above < value < 1e6 for value in values)


def _are_names(value: Any) -> bool:
    """Return whether a value is one or several names."""
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value))
