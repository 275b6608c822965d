"""Dense models by name, with weights or as skeletons: the interface to timm and transformers."""

import contextlib
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from lfrns_hub import models  # noqa: F401  registers cifar_* with timm
from lfrns_hub.format.memory import bounded, bytes_for
from lfrns_hub.format.untrusted import AGAIN, read_headers, read_json, refusing, short, size_of
from lfrns_hub.hub.lineage import facts_of_base
from lfrns_hub.hub.reach import cached, hub_errors, reach_hub
from lfrns_hub.model_io.meaning import Classes, Features, said_meaning
from lfrns_hub.pictures import load_data, num_classes_of, set_preprocessing
from lfrns_hub.zoo.img_size import resized
from lfrns_hub.zoo.names import call_builder, read_config, refuse_oversized, resolve
from lfrns_hub.zoo.weights import fit_head, load_strictly, read_weights, rows_of, without_wrapper

# transformers ids whose shape is that of the type's default configuration: their units can be listed offline.
DEFAULT_CONFIGS = {
    "google/vit-base-patch16-224-in21k": "vit",
    "google/vit-base-patch16-224": "vit",
    "facebook/deit-base-patch16-224": "deit",
    "facebook/dinov2-base": "dinov2",
    "facebook/convnext-tiny-224": "convnext",
    "microsoft/resnet-50": "resnet",
}


def starts_random(name: str) -> bool:
    """Return whether a name stands for a network of timm without published weights.

    Example:
        >>> starts_random("cifar_resnet20"), starts_random("resnet50.a1_in1k")
        (True, False)
    """
    kind, source = resolve(name)
    return kind == "timm" and ":" not in source and not timm.is_model_pretrained(source)


def has_published(name: str) -> bool:
    """Return whether weights come with a name: a folder's, or published ones.

    Example:
        >>> has_published("resnet50.a1_in1k"), has_published("lfrns_hub.models:cifar_resnet20")
        (True, False)
    """
    return resolve(name)[0] != "function" and not starts_random(name)


def origin_of(name: str, *, weights: str | None = None, base_model: str | None = None) -> dict[str, str]:
    """Return the facts of the weights that `create_dense` would load, before any are; see `lineage.facts_of_base`.

    Args:
        name, weights: As for `create_dense`.
        base_model: Origin that is stated instead, as for `lfrns_hub.save`.
    Returns:
        The facts; none where the weights are random, of a function, or a file whose origin is not stated.
    """
    if base_model is not None:
        return facts_of_base(base_model)
    return facts_of_base(name) if weights is None and has_published(name) else {}


def create_dense(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    img_size: int | None = None,
    device: str | torch.device = "cpu",
    pretrained: bool | None = None,
) -> nn.Module:
    """Build a dense model by name, with its weights.

    Args:
        name: timm name ("resnet50", "hf-hub:...", "local-dir:..."), a Hub repo id, a folder with a config.json of timm
            or transformers, or "package.module:function".
        num_classes: Classes of the head; a head that does not fit is replaced by a new, random one. None: as in the
            weights, 0 if they are of a backbone without a head.
        weights: Safetensors or .pth file that replaces the published weights; its keys must fit strictly.
        img_size: Height and width in pixels of the images that the model is used on, see `img_size.resized`. None: as
            it states. The weights may be of the size that it states, or of this one.
        device: Device of the model.
        pretrained: Whether to fetch published weights; None: if there are some and `weights` gives no others.
    Returns:
        The model, in eval mode. Its `lfrns_base` states the origin of published weights, for the card (see
        `lineage.base_facts`); it is empty for other weights.
    Raises:
        ValueError: The name is unknown, the weights do not fit, or the model cannot be used at `img_size`.
        ConnectionError: The Hub is needed and cannot be reached.

    Example:
        >>> create_dense("cifar_resnet20", num_classes=7).linear.out_features
        7
    """
    call = f"create_dense({name!r}, img_size={img_size})"
    state = read_weights(weights) if weights is not None else None
    fetch = state is None if pretrained is None else pretrained and state is None
    kind, source = resolve(name)
    if state is not None and kind != "function":
        state = without_wrapper(state)
    refuse_oversized(kind, source, f"create_dense({name!r})")
    published = fetch and has_published(name)
    if kind == "function":
        model = call_builder(name, num_classes)
        if state is not None and not any(key.startswith("model.") for key in model.state_dict()):
            state = without_wrapper(state)
    elif kind == "transformers":
        model = _load_transformers(name, source, num_classes, state, fetch, img_size)
        state = None
    else:
        model = _load_timm(name, source, None if state is not None else num_classes, fetch, required=bool(pretrained))
    if state is not None:
        rebuild = call_builder if kind == "function" else lambda name, n: _load_timm(name, source, n, False)
        model = fit_head(model, lambda n: rebuild(name, n), state)
        if img_size is not None and not _has_shapes(model, state):  # the weights may be of that size
            model = resized(model, img_size, call)
        load_strictly(model, state, f"create_dense({name!r}, weights={str(weights)!r})")
    if num_classes is not None and num_classes != num_classes_of(model):
        if not hasattr(model, "reset_classifier"):
            raise ValueError(
                f"create_dense({name!r}, num_classes={num_classes}): it answers {num_classes_of(model)} classes. "
                "Let the function take num_classes."
            )
        model.reset_classifier(num_classes)
    if img_size is not None:
        model = resized(model, img_size, call)
        set_preprocessing(model, img_size=img_size)
    model.lfrns_base = facts_of_base(name) if published else {}
    return model.to(device).eval()


def create_for_data(
    name: str,
    data: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    img_size: int | None = None,
    **reading: Any,
) -> tuple[nn.Module, list[str]]:
    """Build a dense model to be trained on some data: with a new, random head where its number of classes is another.

    Args:
        name, weights, img_size: As for `create_dense`.
        data: As for `load_data`.
        reading: Options of `load_data`.
    Returns:
        The model, and the names of the classes that its new head has; none where it keeps its own. A model whose
        problem_type is not that of one class per image keeps it.
    Raises:
        ValueError, ConnectionError: As for `create_dense` and `load_data`.
    """
    dense = create_dense(name, weights=weights, img_size=img_size)
    if not isinstance(said_meaning(dense), Classes | Features | None):
        return dense, []
    names = load_data(data, "train", transform=pil_to_tensor, **reading).class_names
    if len(names) in (0, num_classes_of(dense)):
        return dense, []
    return create_dense(name, num_classes=len(names), weights=weights, img_size=img_size), names


def create_skeleton(name: str, *, img_size: int | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Build a model with random weights, offline, to list its units.

    Args:
        name: As for `create_dense`; Hub repo ids only if they are in the local cache or in DEFAULT_CONFIGS. Also a
            transformers model type ("vit", "dinov2") for its default configuration.
        img_size: As for `create_dense`.
        device: "meta" builds it without memory.
    Returns:
        The model, in eval mode.

    Example:
        >>> create_skeleton("resnet50", device="meta").fc.out_features
        1000
    """
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as TYPES

    published = re.fullmatch(r"(?:hf[-_]hub:)?timm/([\w.-]+)", name)
    if published and timm.is_model(published[1]):
        name = published[1]
    model_type = DEFAULT_CONFIGS.get(name, name)
    with torch.device(device):
        if model_type in TYPES and not Path(name).is_dir() and not cached(name):
            config = AutoConfig.for_model(model_type)
            model = AutoModelForImageClassification.from_config(config)
        else:
            kind, source = resolve(name)
            if kind == "function":
                model = call_builder(name, None)
            elif kind == "transformers":
                model = AutoModelForImageClassification.from_config(read_config(source))
            else:
                model = _load_timm(name, source, None, False)
        if img_size is not None:
            model = resized(model, img_size, f"create_skeleton({name!r}, img_size={img_size})")
    return model.eval()


def create_base(directory: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> nn.Module:
    """Build the dense network that a checkpoint was cut from, with random weights: for its size and its speed.

    Args:
        directory: Checkpoint of a timm or transformers model, from `lfrns_hub.save`.
        device: Device of the model; "meta" uses no memory.
    Returns:
        The dense model, in eval mode.
    Raises:
        ValueError: The folder has no such checkpoint, or its dense model exceeds 0.5 GB plus four times its size.
    """
    from transformers import AutoModelForImageClassification

    from lfrns_hub.checkpoint import kind_of, lfrns_slim
    from lfrns_hub.checkpoint.timm import read_timm
    from lfrns_hub.checkpoint.transformers import read_transformers

    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{str(directory)!r}: it has no config.json. Give a folder that lfrns slim wrote.")
    call = f"create_base({str(directory)!r})"
    config, headers = read_json(path, call), read_headers(Path(directory), call)
    kind = kind_of(config)
    if kind in ("timm", "timm_wrapper"):
        args, cfg = read_timm(Path(directory), call)
        dense_args = {key: value for key, value in args.items() if key not in ("shapes", "attrs")}
        build = partial(lfrns_slim, pretrained_cfg=cfg, **dense_args)
    elif kind == "transformers":
        dense = read_transformers(Path(directory), call, headers)
        dense.lfrns = {}
        build = partial(AutoModelForImageClassification.from_config, dense, trust_remote_code=False)
    else:
        raise ValueError(
            f"{str(directory)!r}: its config.json does not say which dense model it was cut from. Name it by --dense."
        )
    takes_memory = torch.device(device).type != "meta"
    with refusing(call, f"{AGAIN} If you know its dense model, name that (lfrns: --dense)."):
        most = bytes_for(size_of(headers), dense=takes_memory)
        with bounded(len(headers), most, dense=takes_memory), torch.device("meta"):
            model = build()
        if takes_memory:
            with torch.device(device):
                model = build()
    return model.eval()


def _load_timm(name: str, source: str, num_classes: int | None, fetch: bool, *, required: bool = False) -> nn.Module:
    """Build a model with timm, with published weights if `fetch` is set and there are some."""
    options = {} if num_classes is None else {"num_classes": num_classes}
    if source.startswith(("local-dir:", "hf-hub:")):
        with hub_errors(f"the weights of {name}") if source.startswith("hf-hub:") else contextlib.nullcontext():
            return timm.create_model(source, pretrained=fetch, **options)
    published = timm.is_model_pretrained(source)
    if required and not published:
        raise ValueError(f"create_dense({name!r}, pretrained=True): timm has no weights of it. Give weights=FILE.")
    if not (fetch and published):
        return timm.create_model(source, pretrained=False, **options)
    cfg = timm.get_pretrained_cfg(source)
    if not (cfg.hf_hub_id and cached(cfg.hf_hub_id, "model.safetensors")):
        reach_hub(f"the weights of {name}")
    with hub_errors(f"the weights of {name}"):
        return timm.create_model(source, pretrained=True, **options)


def _has_shapes(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Return whether a model's tensors have the shapes of those of the same name in some weights."""
    return all(own.shape == state[name].shape for name, own in model.state_dict().items() if name in state)


def _load_transformers(
    name: str,
    source: str,
    num_classes: int | None,
    state: dict[str, Tensor] | None,
    fetch: bool,
    img_size: int | None = None,
) -> nn.Module:
    """Build an image classifier with transformers; only the head may be missing from its weights.

    Weights from a file may be of the size of images that the configuration states, or of `img_size`.
    """
    from transformers import AutoModelForImageClassification

    config = read_config(source)
    if state is None and not fetch:
        if num_classes is not None:
            config.num_labels = num_classes
        return AutoModelForImageClassification.from_config(config)

    def load(num_labels: int | None, side: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
        options: dict[str, Any] = {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
            "trust_remote_code": False,
        }
        built = read_config(source)
        if num_labels is not None and num_labels != built.num_labels:
            built.num_labels = num_labels
        if side is not None:
            built.image_size = side
        if state is None:
            return AutoModelForImageClassification.from_pretrained(source, config=built, **options)
        # from_pretrained, not load_state_dict: transformers converts names on disk to the modules' names.
        cls = type(AutoModelForImageClassification.from_config(built))
        return cls.from_pretrained(None, config=built, state_dict=dict(state), **options)

    if num_classes is None and state is not None:
        with torch.device("meta"):
            own = AutoModelForImageClassification.from_config(config).state_dict()
        num_classes = rows_of(state, own, "classifier.weight") or rows_of(state, own, "head.weight")
    with _quiet_transformers(), hub_errors(f"the weights of {name}"):
        model, info = load(num_classes)
        if state is not None and img_size is not None and not all(map(_is_head, _mismatched(info))):
            model, info = load(num_classes, img_size)
        missing = sorted(info["missing_keys"])
        headless = bool(missing) and all(_is_head(key) for key in missing)
        if headless and num_classes is None:
            model, _ = load(0)
    wrong = [key for key in missing + _mismatched(info) if not _is_head(key)]
    # A backbone has its own pooler, which a classifier does not use.
    wrong += [key for key in sorted(info["unexpected_keys"]) if not headless]
    if wrong:
        raise ValueError(
            f"model {name!r}: the weights do not fit a {type(model).__name__}: {short(', '.join(wrong[:4]), 160)} "
            f"({len(wrong)} in all) are missing, unexpected or of another shape."
        )
    return model


def _mismatched(info: dict[str, Any]) -> list[str]:
    """Return the tensors of another shape, by transformers' report of what it loaded."""
    return sorted(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])


def _is_head(key: str) -> bool:
    return key.startswith(("classifier.", "head."))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the load report: its content is checked, and raised as an error where it matters."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
