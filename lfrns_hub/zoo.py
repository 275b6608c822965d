"""Dense models by name and with their weights, and the pictures they take: the door to timm and transformers."""

import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from . import models  # noqa: F401  registers cifar_* with timm
from .format.memory import OverBudget, bounded, bytes_for
from .lineage import base_facts
from .pictures import (
    ImageData,
    check_images,
    example_input,
    guard_against_chance,
    input_size_of,
    load_data,
    make_transform,
    num_classes_of,
    set_preprocessing,
)
from .reach import CONNECT_TIMEOUT_S, cached, hub_errors, reach_hub
from .untrusted import AGAIN, is_shortage, read_headers, read_json, refuse_large, refusing, short, size_of

__all__ = [
    "ImageData",
    "check_images",
    "create_base",
    "create_dense",
    "create_skeleton",
    "example_input",
    "guard_against_chance",
    "input_size_of",
    "load_data",
    "make_transform",
    "num_classes_of",
    "read_weights",
    "set_preprocessing",
]

# Transformers ids whose shape is that of the type's default configuration: their units can be listed without a network.
DEFAULT_CONFIGS = {
    "google/vit-base-patch16-224-in21k": "vit",
    "google/vit-base-patch16-224": "vit",
    "facebook/deit-base-patch16-224": "deit",
    "facebook/dinov2-base": "dinov2",
    "facebook/convnext-tiny-224": "convnext",
    "microsoft/resnet-50": "resnet",
}


WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
MAX_TENSORS = 1 << 16  # of a dense model, whose weights may be of a kind whose header is not read


def create_dense(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    pretrained: bool | None = None,
) -> nn.Module:
    """Build a dense model by name, with its weights.

    Args:
        name: timm name ("resnet50", "hf-hub:...", "local-dir:..."), a Hub repo id, a folder with a config.json of timm
            or transformers, or "package.module:function".
        num_classes: Of the head; a head that does not fit is replaced by a fresh, random one. None: as the weights say,
            0 where they hold a backbone without a head.
        weights: Safetensors or .pth file that replaces the published weights; its keys must fit strictly.
        device: Where the model goes.
        pretrained: Whether published weights are fetched; None: where there are some and `weights` gives no others.
    Returns:
        The model, in eval mode. Its `lfrns_base` says where published weights came from, for the card (see
        `lineage.base_facts`); it is empty of weights from elsewhere.
    Raises:
        ValueError: Unknown name, or weights that do not fit.
        ConnectionError: The Hub is needed and cannot be reached.

    Example:
        >>> create_dense("cifar_resnet20", num_classes=7).linear.out_features
        7
    """
    state = read_weights(weights) if weights is not None else None
    fetch = state is None if pretrained is None else pretrained and state is None
    kind, source = _resolve(name)
    _refuse_oversized(kind, source, f"create_dense({name!r})")
    published = fetch and kind != "function" and (":" in source or kind != "timm" or timm.is_model_pretrained(source))
    if kind == "function":
        model = _call_builder(name, num_classes)
    elif kind == "transformers":
        model = _load_transformers(name, source, num_classes, state, fetch)
        state = None
    else:
        model = _load_timm(name, source, None if state is not None else num_classes, fetch, required=bool(pretrained))
    if state is not None:
        rebuild = _call_builder if kind == "function" else lambda name, n: _load_timm(name, source, n, False)
        model = _fit_head(model, lambda n: rebuild(name, n), state)
        _load_strictly(model, state, f"create_dense({name!r}, weights={str(weights)!r})")
    if num_classes is not None and num_classes != num_classes_of(model):
        if not hasattr(model, "reset_classifier"):
            raise ValueError(
                f"create_dense({name!r}, num_classes={num_classes}): it answers {num_classes_of(model)} classes. "
                "Let the function take num_classes."
            )
        model.reset_classifier(num_classes)
    model.lfrns_base = base_facts(name) if published else {}
    return model.to(device).eval()


def create_skeleton(name: str, *, device: str | torch.device = "cpu") -> nn.Module:
    """Build a model with random weights and without a network, to look at its units.

    Args:
        name: As for `create_dense`; of Hub repo ids only those in the local cache or in DEFAULT_CONFIGS. Also a
            transformers model type ("vit", "dinov2") for its default configuration.
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
            return AutoModelForImageClassification.from_config(config).eval()
        kind, source = _resolve(name)
        if kind == "function":
            return _call_builder(name, None).eval()
        if kind == "transformers":
            return AutoModelForImageClassification.from_config(_read_config(source)).eval()
        return _load_timm(name, source, None, False).eval()


def create_base(directory: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> nn.Module:
    """Build the dense network that a checkpoint was cut from, with random weights: for its size and its speed.

    Args:
        directory: What `lfrns_hub.save` wrote of a timm or transformers model.
        device: Where it is built; "meta" without memory.
    Returns:
        The dense model, in eval mode.
    Raises:
        ValueError: The folder holds no such checkpoint, or a dense model of more than 0.5 GB and four times its size.
    """
    from transformers import AutoModelForImageClassification

    from .checkpoint import lfrns_slim
    from .checkpoint.timm import read_timm
    from .checkpoint.transformers import read_transformers

    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{str(directory)!r}: it has no config.json. Give a folder that lfrns slim wrote.")
    call = f"create_base({str(directory)!r})"
    config, headers = read_json(path, call), read_headers(Path(directory), call)
    if config.get("architecture") == "lfrns_slim":
        args, cfg = read_timm(Path(directory), call)
        dense_args = {key: value for key, value in args.items() if key not in ("shapes", "attrs")}
        build = partial(lfrns_slim, pretrained_cfg=cfg, **dense_args)
    elif str(config.get("model_type", "")).startswith("lfrns_"):
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


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state_dict: safetensors, or a .pth of tensors alone (never unpickled code).

    Args:
        path: The file. Of a training checkpoint the averaged (EMA) weights are taken before the plain ones.
    Returns:
        Tensors on the CPU, by name, without "module." and "_orig_mod." in front.
    Raises:
        ValueError: No file, or one that holds no state_dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights={str(path)!r}: there is no such file. Give a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = _load_pickled(path)
    except Exception as error:  # torch and safetensors raise a dozen types for a file that is not theirs
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if is_shortage(error):
            reason = "it states more than the memory holds"
        raise ValueError(
            f"weights={str(path)!r}: holds no plain tensors ({reason[:150]}). Save model.state_dict() as safetensors."
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not state:
        raise ValueError(f"weights={str(path)!r}: holds no state_dict. Save model.state_dict() as safetensors.")
    if larger := next((key for key, value in state.items() if not _lies_in_file(value)), None):
        raise ValueError(
            f"weights={str(path)!r}: {short(larger)} has shape {short(list(state[larger].shape))}, of which the file "
            "does not hold each element. Save model.state_dict() as safetensors."
        )
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def _load_pickled(path: Path) -> Any:
    """Load a pickle whose tensors take no more than the file: none is compressed, or stated to be larger than it is."""
    size, stated = path.stat().st_size, 0
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"{short(packed[0])} in it is compressed, as torch.save writes none")
        if (held := sum(part.file_size for part in parts)) > size:
            raise ValueError(f"its parts have {held:,} bytes, the file {size:,}")

    def count(storage: Any, location: str) -> Any:
        nonlocal stated
        stated += storage.nbytes()
        if stated > size:
            raise ValueError(f"it states tensors of {stated:,} bytes, the file has {size:,}")
        return storage

    return torch.load(path, map_location=count, weights_only=True)


def _lies_in_file(tensor: Tensor) -> bool:
    """Return whether each element of a tensor has a place of its own in its storage."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _read_config(source: str) -> Any:
    """Read a transformers config; code that comes with it is not run."""
    from transformers import AutoConfig

    with hub_errors(f"the model {source}"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _resolve(name: str) -> tuple[str, str]:
    """Say who builds a name ("timm", "transformers", "function") and from what: a timm name, a folder, a repo id."""
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise ValueError(f"model {name!r}: the folder has no config.json. Give a folder saved by timm.")
        return "timm", name
    if re.match(r"hf[-_]hub:", name):
        repo_id = name.split(":", 1)[1]
        _hub_config(repo_id)
        return "timm", f"hf-hub:{repo_id}"
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return "function", name
    if Path(name).is_dir():
        path = Path(name) / "config.json"
        if not path.is_file():
            raise ValueError(f"model {name!r}: the folder has no config.json. Give a folder of timm or transformers.")
        kind = _kind_of(read_json(path, f"model {name!r}"), name)
        return kind, f"local-dir:{name}" if kind == "timm" else name
    if timm.is_model(name):
        if "." in name:
            try:
                timm.get_pretrained_cfg(name, allow_unregistered=False)
            except RuntimeError as error:
                stem = name.split(".", 1)[0]
                tags = timm.list_pretrained(f"{stem}.*")
                near = _near(name, tags) or f"Give {', '.join(tags[:4]) or 'the name alone'}."
                raise ValueError(f"model {name!r}: {stem} has no such weights. {near}") from error
        return "timm", name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        kind = _kind_of(_hub_config(name), name)
        return kind, f"hf-hub:{name}" if kind == "timm" else name
    raise ValueError(
        f"model {name!r}: neither timm nor a folder here has it. {_near(name, timm.list_models())}"
        "Else give a Hub repo id (user/name), a folder, or package.module:function."
    )


def _near(name: str, names: list[str]) -> str:
    """Name what a misspelt name may have meant."""
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f"Near matches: {', '.join(near)}. " if near else ""


def _kind_of(config: dict[str, Any], name: str) -> str:
    """Say whose config.json it is."""
    if "architecture" in config:
        return "timm"
    if "model_type" in config:
        return "transformers"
    raise ValueError(f"model {name!r}: its config.json names neither an architecture (timm) nor a model_type.")


def _refuse_oversized(kind: str, source: str, call: str) -> None:
    """Refuse a dense model whose config, in a folder or in the Hub's cache, asks for what its weights do not hold.

    Where there are no weights yet, only what no weights would hold is counted: the caller named the model.
    """
    place = source.removeprefix("local-dir:").removeprefix("hf-hub:")
    path = Path(place) / "config.json" if Path(place).is_dir() else cached(place)
    if kind == "function" or path is None:
        return
    from transformers import AutoModelForImageClassification

    config = read_json(path, call)
    files = [file for ending in WEIGHTS for file in path.parent.glob(f"*{ending}")]
    size = sum(file.stat().st_size for file in files)
    labels = {key: config[key] for key in ("num_labels", "num_classes") if key in config}
    refuse_large(labels, f"{call}: config.json")
    try:
        with bounded(MAX_TENSORS, bytes_for(size, dense=bool(files)), dense=bool(files)), torch.device("meta"):
            if kind == "timm":
                timm.create_model(f"local-dir:{path.parent}", pretrained=False)
            else:
                AutoModelForImageClassification.from_config(_read_config(str(path.parent)))
    except OverBudget as error:
        raise ValueError(f"{call}: {error}") from error
    except Exception:  # what the library refuses here, it refuses again where it builds the model
        return


def _hub_config(repo_id: str) -> dict[str, Any]:
    """Read a Hub model's config.json, from the cache where it lies there."""
    repo_id, _, revision = repo_id.partition("@")
    path = None if revision else cached(repo_id)
    if path is None:
        from huggingface_hub import hf_hub_download

        reach_hub(f"the model {repo_id}")
        with hub_errors(f"the model {repo_id}"):
            options = {"revision": revision or None, "etag_timeout": CONNECT_TIMEOUT_S}
            path = Path(hf_hub_download(repo_id, "config.json", **options))
    return read_json(path, f"model {repo_id!r}")


def _call_builder(name: str, num_classes: int | None) -> nn.Module:
    """Call "package.module:function", with num_classes where it takes one."""
    module_name, function_name = name.split(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not see the working folder
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model {name!r}: cannot import it ({error}). Run where `import {module_name}` works."
        ) from error
    takes = inspect.signature(function).parameters
    accepts = "num_classes" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    options = {"num_classes": num_classes} if num_classes is not None and accepts else {}
    model = function(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r}: the call gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _load_timm(name: str, source: str, num_classes: int | None, fetch: bool, *, required: bool = False) -> nn.Module:
    """Build a model with timm, with published weights where `fetch` is set and there are some."""
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


def _load_transformers(
    name: str, source: str, num_classes: int | None, state: dict[str, Tensor] | None, fetch: bool
) -> nn.Module:
    """Build an image classifier with transformers; only the head may be missing from its weights."""
    from transformers import AutoModelForImageClassification

    config = _read_config(source)
    if state is None and not fetch:
        if num_classes is not None:
            config.num_labels = num_classes
        return AutoModelForImageClassification.from_config(config)

    def load(num_labels: int | None) -> tuple[nn.Module, dict[str, Any]]:
        options: dict[str, Any] = {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
            "trust_remote_code": False,
        }
        built = _read_config(source)
        if num_labels is not None and num_labels != built.num_labels:
            built.num_labels = num_labels
        if state is None:
            return AutoModelForImageClassification.from_pretrained(source, config=built, **options)
        # from_pretrained, not load_state_dict: names on disk are converted to the modules' by transformers.
        cls = type(AutoModelForImageClassification.from_config(built))
        return cls.from_pretrained(None, config=built, state_dict=dict(state), **options)

    if num_classes is None and state is not None:
        with torch.device("meta"):
            own = AutoModelForImageClassification.from_config(config).state_dict()
        num_classes = _rows_of(state, own, "classifier.weight") or _rows_of(state, own, "head.weight")
    with _quiet_transformers(), hub_errors(f"the weights of {name}"):
        model, info = load(num_classes)
        missing = sorted(info["missing_keys"])
        headless = bool(missing) and all(_is_head(key) for key in missing)
        if headless and num_classes is None:
            model, _ = load(0)
    mismatched = sorted(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])
    wrong = [key for key in missing + mismatched if not _is_head(key)]
    # A backbone brings its own pooler, which a classifier does not use.
    wrong += [key for key in sorted(info["unexpected_keys"]) if not headless]
    if wrong:
        raise ValueError(
            f"model {name!r}: the weights do not fit a {type(model).__name__}: {', '.join(wrong[:4])} "
            f"({len(wrong)} in all) are missing, unexpected or of another shape."
        )
    return model


def _is_head(key: str) -> bool:
    return key.startswith(("classifier.", "head."))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the load report: what it says is checked, and raised where it matters."""
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


def _rows_of(state: dict[str, Tensor], own: dict[str, Tensor], key: str, width: int | None = None) -> int | None:
    """Count the classes of a head in some weights; None where it is not of the model's width, `own`'s or `width`."""
    widths = own[key].shape[1:] if key in own else (width,)
    return state[key].shape[0] if key in state and state[key].shape[1:] == widths else None


def _fit_head(model: nn.Module, rebuild: Callable[[int], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """Rebuild a model with as many classes as the head in its weights has."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    name = name[0] if isinstance(name, (tuple, list)) else name
    if not name:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        name = linears[-1] if linears else ""
    key, width = f"{name}.weight", getattr(model, "head_hidden_size", getattr(model, "num_features", None))
    if key in state and (rows := _rows_of(state, model.state_dict(), key, width)) is None:
        return model  # which says what does not fit
    return model if key in state and rows == num_classes_of(model) else rebuild(rows if key in state else 0)


def _load_strictly(model: nn.Module, state: dict[str, Tensor], call: str) -> None:
    """Load weights of which nothing is missing, left over or of another shape."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        own = model.state_dict()
        kinds = {
            "missing": [key for key in own if key not in state],
            "unexpected": [key for key in state if key not in own],
            "misshapen": [key for key in own if key in state and own[key].shape != state[key].shape],
        }
        found = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:2])})" for kind, keys in kinds.items() if keys)
        raise ValueError(
            f"{call}: the weights do not fit {type(model).__name__}: {found}. Give those of this model."
        ) from error
