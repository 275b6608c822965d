"""Save a slim model and load it again: safetensors and config.json, in timm's layout or in transformers'.

Neither layout overrides a forward: the stock model is built as its config says, then narrowed by the stored sizes.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import set_layer_config
from timm.models import get_pretrained_cfg, is_model, load_pretrained, model_entrypoint, register_model
from timm.models._features import FeatureGetterNet
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import logging as transformers_logging

import lfrns_hub.models  # noqa: F401  the CIFAR networks, so that timm can build them as a base
from lfrns_hub.card import read_record, render_card
from lfrns_hub.hub import fetch
from lfrns_hub.narrow import Attrs, Shapes, describe, narrow
from lfrns_hub.plots import plot_widths

__all__ = ["FORMAT_VERSION", "lfrns_slim", "load", "save"]

FORMAT_VERSION = 1
TIMM_NAME = "lfrns_slim"  # what timm prints to people who lack the package
OWN_NAME = "lfrns_own_class"
TYPE_PREFIX = "lfrns_"
TRANSFORMERS_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "convnext", "resnet")
# Written last to first: a folder that is being overwritten has its new config only when the weights are there.
FILES = ("config.json", "README.md", "record.json", "widths.png", "preprocessor_config.json", "model.safetensors")
NOT_BASE_ARGS = ("base", "shapes", "attrs", "num_classes", "pretrained_cfg", "pretrained", "cache_dir")


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    record: Any = None,
    base: str | nn.Module | Callable[..., nn.Module] | None = None,
    base_args: dict[str, Any] | None = None,
    processor: Any = None,
    label_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as a folder that loads again: config.json, model.safetensors, README.md, a picture.

    Everything is written beside the folder, loaded from there and compared tensor by tensor, and only then moved.

    Args:
        model: A slim (or dense) model: timm's, a transformers image classifier, or a class of your own.
        directory: Where to; other files in it stay as they are.
        record: The Record (or its dict) for the card and record.json. None: the card says "not measured".
        base: The dense architecture, where the model does not say: a timm name, or for your own class the dense
            model or a function that builds it.
        base_args: Arguments of the base that differ from its defaults.
        processor: A transformers image processor, saved beside the model.
        label_names: Name of each class, in the order of the logits.
        overwrite: Replace a checkpoint that is there.
    Returns:
        The folder.
    Raises:
        FileExistsError: The folder is not empty and overwrite is False.
        ValueError: The model cannot be told from its base, or does not come back equal.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise FileExistsError(
            f"save({str(directory)!r}): it exists and is not empty. Pass overwrite=True or a new name."
        )
    if label_names is not None and len(label_names) != (classes := _num_classes(model)) and classes:
        raise ValueError(f"save(label_names of {len(label_names)}): the model has {classes} classes. Name each one.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent.resolve()))
    draft.chmod(0o755)  # mkdtemp's 0o700 would stay with the published folder
    try:
        skeleton = None
        if _is_transformers(model):
            _write_transformers(model, draft, label_names)
        elif (name := _timm_base(model, base)) is not None:
            _write_timm(model, draft, name, base_args, label_names)
        else:
            skeleton = _own_skeleton(base, base_args)
            _write_own(model, draft, skeleton, label_names)
        if processor is not None:
            processor.save_pretrained(draft)
        if skeleton is not None or not _is_own(draft):
            _compare(model, load(draft, model=skeleton), draft)
        _write_card(model, draft, record, directory.name)
        _publish(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def load(source: str | Path, *, model: nn.Module | None = None, revision: str | None = None) -> nn.Module:
    """Load a checkpoint that `save` wrote, strictly: a missing, unexpected or misshapen tensor is an error.

    Args:
        source: A folder, or a Hub id, "user/name".
        model: Your own dense model, narrowed in place and filled; needed for a class that timm and transformers
            do not know, allowed for all.
        revision: Branch, tag or commit on the Hub.
    Returns:
        The model in eval mode, on the CPU, with `lfrns_provenance`: plan, budget, seed.
    Raises:
        ValueError: The folder is none of ours, damaged, or does not fit `model`.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = fetch(str(source), revision=revision)
    config = _read_config(folder)
    facts = config.get("slim") or {}
    if facts.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"load({str(source)!r}): format_version {facts.get('format_version')!r}, this package reads "
            f"{FORMAT_VERSION}. Not a folder written by lfrns_hub.save, or one of a newer version: upgrade lfrns_hub."
        )
    sizes = config["lfrns"] if "lfrns" in config else config.get("model_args", {})
    if model is not None:
        loaded = _fill(narrow(model, *_differences(model, sizes)), folder, config)
    elif config.get("architecture") == TIMM_NAME:
        loaded = _load_timm(folder, config)
    elif str(config.get("model_type", "")).startswith(TYPE_PREFIX):
        loaded = _load_transformers(folder)
    elif config.get("architecture") == OWN_NAME:
        raise ValueError(f"load({str(source)!r}): it holds a {facts.get('class')}, which neither timm nor transformers "
                         "builds. Pass the dense model: load(..., model=MyNet()).")  # fmt: skip
    else:
        raise ValueError(f"load({str(source)!r}): config.json names neither {TIMM_NAME} nor a {TYPE_PREFIX}* model.")
    loaded.lfrns_provenance = {k: v for k, v in facts.items() if k not in ("format_version", "class")}
    return loaded.eval()


# ---- timm


@register_model
def lfrns_slim(
    pretrained: bool = False,
    *,
    base: str | None = None,
    shapes: Shapes | None = None,
    attrs: Attrs | None = None,
    pretrained_cfg: dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    out_indices: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the stock timm model `base`, narrow it, and load weights: timm's entrypoint of every slim model.

    Args:
        pretrained: Load the weights that pretrained_cfg names.
        base: A timm architecture.
        shapes: Tensors that differ from the base's.
        attrs: Width attributes that differ from the base's.
        pretrained_cfg: timm's, from config.json.
        pretrained_cfg_overlay: timm's.
        pretrained_model_args: timm's record of what the file was saved with.
        cache_dir: timm's.
        num_classes: Other than the checkpoint's: a new head after loading.
        in_chans: Other than the checkpoint's: timm adapts the first convolution.
        features_only: Wrap as a backbone of feature maps.
        out_indices: Which maps; the base's own choice by default.
        kwargs: For the base.
    """
    if base is None or base == TIMM_NAME or not is_model(base):
        raise ValueError(f"{TIMM_NAME}(base={base!r}): not a model of this timm ({timm.__version__}). Load a folder "
                         "saved by lfrns_hub, or upgrade timm.")  # fmt: skip
    build = model_entrypoint(base)
    cfg = dict(pretrained_cfg) if pretrained_cfg else None
    stored_classes = cfg.get("num_classes", num_classes) if cfg else num_classes
    stored_chans = (cfg.get("input_size") or (3,))[0] if cfg else in_chans
    own = {"num_classes": stored_classes, "in_chans": in_chans if in_chans is not None else stored_chans}
    own = _without_none(own)
    overlay = {"pretrained_cfg_overlay": pretrained_cfg_overlay} if pretrained_cfg_overlay else {}
    wanted_size, stored_size = kwargs.get("img_size"), (pretrained_model_args or {}).get("img_size")
    resize = pretrained and wanted_size is not None and _as_size(wanted_size) != _as_size(stored_size)
    if resize:
        kwargs["img_size"] = stored_size  # the weights are of that size: resized once they are in
    model = build(pretrained=False, pretrained_cfg=cfg, **overlay, **own, **_without_none(kwargs))
    shapes = dict(shapes or {})
    if own.get("in_chans") != stored_chans:
        for conv in _as_tuple(model.pretrained_cfg.get("first_conv")):
            if (weight := f"{conv}.weight") in shapes:
                shapes[weight] = [shapes[weight][0], own["in_chans"], *shapes[weight][2:]]
    narrow(model, shapes, attrs or {})
    if pretrained:
        load_pretrained(
            model,
            pretrained_cfg=model.pretrained_cfg,
            num_classes=stored_classes if stored_classes is not None else model.num_classes,
            in_chans=own.get("in_chans", 3),
            strict=True,
            cache_dir=cache_dir,
        )
    if resize:
        model.set_input_size(img_size=wanted_size)
    if num_classes is not None and num_classes != stored_classes:
        model.reset_classifier(num_classes)
    model.pretrained_cfg["architecture"] = TIMM_NAME  # so that timm's save_for_hf writes what loads again
    if features_only:
        return _as_backbone(model, build, out_indices)
    return model


def _as_backbone(model: nn.Module, build: Callable[..., nn.Module], out_indices: Any) -> nn.Module:
    """Wrap a slim model as timm does for features_only, by its forward_intermediates."""
    if out_indices is None:
        with torch.device("meta"):
            out_indices = build(pretrained=False, features_only=True, feature_cls="getter").out_indices
    cfg = model.pretrained_cfg
    backbone = FeatureGetterNet(model, out_indices=out_indices)
    backbone.pretrained_cfg = backbone.default_cfg = cfg
    return backbone


def _timm_base(model: nn.Module, base: Any) -> str | None:
    """Name the timm architecture of a model, None if it is not timm's."""
    if isinstance(base, str):
        if not is_model(base):
            raise ValueError(
                f"save(base={base!r}): no such timm model. For your own class pass the dense model itself."
            )
        return base
    cfg = getattr(model, "pretrained_cfg", None)
    if base is not None or not isinstance(cfg, dict):
        return None
    name = cfg.get("architecture")
    name = getattr(model, "_model_args", {}).get("base") if name == TIMM_NAME else name
    return name if name and is_model(name) else None


def _write_timm(
    model: nn.Module, draft: Path, base: str, base_args: dict[str, Any] | None, label_names: Sequence[str] | None
) -> None:
    """Write timm's config.json and the weights."""
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        model.pretrained_cfg = {**get_pretrained_cfg(base).to_dict(), "architecture": base}
    save_config_for_hf(model, str(draft / "config.json"), model_config={})
    config = json.loads((draft / "config.json").read_text())
    args = config.get("model_args", {}) | (base_args or {})
    args = {k: v for k, v in args.items() if k not in NOT_BASE_ARGS}
    with torch.device("meta"):
        skeleton = _create_slim({**args, "base": base, "num_classes": config["num_classes"]}, config["pretrained_cfg"])
    shapes, attrs = describe(model, skeleton)
    config |= {"architecture": TIMM_NAME, "model_args": {"base": base, "shapes": shapes, "attrs": attrs, **args}}
    if label_names is not None:
        config["label_names"] = list(label_names)
    _write_config(draft, config, model)
    _write_weights(model, draft)


def _create_slim(args: dict[str, Any], pretrained_cfg: dict[str, Any]) -> nn.Module:
    """Build by the entrypoint without weights, on the device of the context."""
    with set_layer_config():
        return lfrns_slim(pretrained=False, pretrained_cfg=pretrained_cfg, **args)


def _load_timm(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Check names and shapes on the meta device, then let timm load."""
    cfg = {**config.get("pretrained_cfg", {}), "num_classes": config.get("num_classes")}
    with torch.device("meta"):
        _check_tensors(_create_slim(config["model_args"], cfg), folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return _match_dtype(model, folder)


# ---- transformers


def _register(model_type: str) -> None:
    """Generate and register `lfrns_<type>`: the stock config with the sizes, the stock classes narrowed by them."""
    stock_config = CONFIG_MAPPING[model_type]
    config_class = type(
        f"Lfrns{stock_config.__name__}",
        (stock_config,),
        {"model_type": TYPE_PREFIX + model_type, "__module__": __name__, "__doc__": stock_config.__doc__},
    )
    stock_classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[stock_config]
    stock_classes = stock_classes if isinstance(stock_classes, tuple) else (stock_classes,)
    classes = tuple(_narrow_class(stock, config_class) for stock in stock_classes)
    globals()[config_class.__name__] = config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    # A tuple, as transformers has it for DeiT: the config's `architectures` says which.
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.register(
        config_class, classes if len(classes) > 1 else classes[0], exist_ok=True
    )


def _narrow_class(stock: type[PreTrainedModel], config_class: type) -> type[PreTrainedModel]:
    """Subclass a stock transformers model: the same, then narrowed by config.lfrns."""

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        sizes = getattr(config, "lfrns", None) or {}
        narrow(self, sizes.get("shapes", {}), sizes.get("attrs", {}))
        for module in self.modules():  # the narrowed tensors hold no values yet: initialise once more
            module.__dict__.pop("_is_hf_initialized", None)
        self.init_weights()

    name = f"Lfrns{stock.__name__}"
    body = {"__init__": __init__, "config_class": config_class, "__module__": __name__, "__doc__": stock.__doc__}
    globals()[name] = type(name, (stock,), body)
    return globals()[name]


def _is_transformers(model: nn.Module) -> bool:
    """Say whether a model is one of transformers'."""
    return isinstance(model, PreTrainedModel)


def _write_transformers(model: PreTrainedModel, draft: Path, label_names: Sequence[str] | None) -> None:
    """Write transformers' config.json and weights, by its own save_pretrained."""
    model_type = model.config.model_type.removeprefix(TYPE_PREFIX)
    name = type(model).__name__
    narrow_class = globals().get(name if name.startswith("Lfrns") else f"Lfrns{name}")
    if model_type not in TRANSFORMERS_TYPES or narrow_class is None:
        raise ValueError(
            f"save({name}, model_type {model_type!r}): of transformers, image classifiers of the types "
            f"{', '.join(TRANSFORMERS_TYPES)} are saved. Use one of them, or the same architecture from timm."
        )
    fields = model.config.to_dict()
    for key in ("model_type", "lfrns", "slim", "architectures", "transformers_version"):
        fields.pop(key, None)
    if label_names is not None:
        fields["id2label"] = dict(enumerate(label_names))
        fields["label2id"] = {name: i for i, name in enumerate(label_names)}
    config = narrow_class.config_class(**fields)
    with torch.device("meta"):
        skeleton = narrow_class(config)
    shapes, attrs = describe(model, skeleton)
    config.lfrns = {"shapes": shapes, "attrs": attrs}
    with torch.device("meta"):
        twin = narrow_class(config)
    twin.load_state_dict({k: v.contiguous() for k, v in model.state_dict().items()}, assign=True, strict=True)
    with _no_progress_bar():
        twin.save_pretrained(draft)
    _write_config(draft, _read_config(draft), model)


def _load_transformers(folder: Path) -> nn.Module:
    """Check names and shapes on the meta device, then let transformers load, and read its report."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        _check_tensors(AutoModelForImageClassification.from_config(config), folder)
    with _no_progress_bar():
        model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    if bad := {k: sorted(map(str, v)) for k, v in info.items() if v}:
        raise ValueError(
            f"load({str(folder)!r}): transformers reports {bad}. The file is damaged, or of another model."
        )
    return model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing bars for what takes an instant."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# ---- a class of one's own


def _own_skeleton(base: Any, base_args: dict[str, Any] | None) -> nn.Module | None:
    """Build the dense model of a class that timm and transformers do not know, if the caller gave one."""
    if base is None or isinstance(base, nn.Module):
        return copy.deepcopy(base)  # loading narrows it in place; the caller's stays dense
    return base(**(base_args or {}))


def _write_own(model: nn.Module, draft: Path, skeleton: nn.Module | None, label_names: Sequence[str] | None) -> None:
    """Write sizes and weights of a class that load() gets as model=."""
    shapes, attrs = describe(model, skeleton)
    config = {"architecture": OWN_NAME, "model_args": {"shapes": shapes, "attrs": attrs}}
    if label_names is not None:
        config["label_names"] = list(label_names)
    _write_config(draft, config, model)
    _write_weights(model, draft)


def _is_own(folder: Path) -> bool:
    """Say whether a folder holds a class that only its user can build."""
    return _read_config(folder).get("architecture") == OWN_NAME


def _differences(model: nn.Module, sizes: dict[str, Any]) -> tuple[Shapes, Attrs]:
    """Leave out sizes that the model has already (a checkpoint saved without a base states all)."""
    shapes, attrs = sizes.get("shapes", {}), sizes.get("attrs", {})
    have_shapes, have_attrs = describe(model, None)
    attrs = {n: {k: v for k, v in a.items() if have_attrs.get(n, {}).get(k) != v} for n, a in attrs.items()}
    return {n: s for n, s in shapes.items() if have_shapes.get(n) != s}, {n: a for n, a in attrs.items() if a}


def _fill(model: nn.Module, folder: Path, config: dict[str, Any]) -> nn.Module:
    """Load the weights into a model that has been narrowed."""
    _check_tensors(model, folder)
    if str(config.get("model_type", "")).startswith(TYPE_PREFIX):
        state = _load_transformers(folder).state_dict()
    else:
        state = load_file(folder / "model.safetensors")
    model.load_state_dict(state, strict=True)
    return _match_dtype(model, folder)


# ---- files


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"load({str(folder)!r}): it has no config.json. Give a folder that lfrns_hub.save wrote.")
    return json.loads(path.read_text(encoding="utf-8"))


def _write_config(draft: Path, config: dict[str, Any], model: nn.Module) -> None:
    """Write config.json with what is known of the model's making."""
    provenance = getattr(model, "lfrns_provenance", None) or {}
    config["slim"] = {**provenance, "format_version": FORMAT_VERSION, "class": type(model).__name__}
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_weights(model: nn.Module, draft: Path) -> None:
    """Write model.safetensors under the module's own names, each tensor by itself."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})


def _write_card(model: nn.Module, draft: Path, record: Any, name: str) -> None:
    """Write README.md, record.json and the picture of widths."""
    facts = _read_config(draft)["slim"]
    record = read_record(record)
    if record is not None:
        (draft / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    has_plot = bool(facts.get("widths"))
    if has_plot:
        plot_widths(facts, draft / "widths.png")
    library = "transformers" if _is_transformers(model) else "timm"
    architecture = type(model).__name__ if library == "transformers" else _timm_base(model, None)
    card = render_card(
        record,
        model_name=((record or {}).get("setup") or {}).get("model_name") or name,
        base=architecture or type(model).__name__,
        provenance=facts,
        library=library if architecture else "pytorch",
        plot="widths.png" if has_plot else None,
    )
    (draft / "README.md").write_text(card, encoding="utf-8")


def _publish(draft: Path, directory: Path) -> None:
    """Move a finished draft into place; files in the folder that are not a checkpoint's stay."""
    if not directory.exists() or not any(directory.iterdir()):
        draft.replace(directory)
        return
    new = {path.name for path in draft.iterdir()}
    for name in [*FILES, "model.safetensors.index.json"]:
        if name not in new:
            (directory / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda n: FILES.index(n) if n in FILES else len(FILES), reverse=True):
        (draft / name).replace(directory / name)


def _check_tensors(model: nn.Module, folder: Path) -> None:
    """Compare names and shapes of a skeleton with those in the file's header, before anything is allocated."""
    state = model.state_dict()
    if _is_transformers(model):  # names on disk are transformers' own, older ones
        state = revert_weight_conversion(model, state)
    expected = {name: list(tensor.shape) for name, tensor in state.items()}
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    if not found:
        raise ValueError(f"load({str(folder)!r}): it has no model.safetensors. Pickled weights are not read.")
    problems = [f"{n} is missing" for n in sorted(expected.keys() - found.keys())]
    problems += [f"{n} is unexpected" for n in sorted(found.keys() - expected.keys())]
    problems += [
        f"{n} has shape {found[n]}, the config says {expected[n]}"
        for n in sorted(expected.keys() & found.keys())
        if found[n] != expected[n]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"load({str(folder)!r}): {'; '.join(problems[:4])}{more}. Save the model again.")


def _compare(model: nn.Module, loaded: nn.Module, draft: Path) -> None:
    """Refuse a checkpoint that does not come back as it was, buffers outside the file included."""
    state, again = model.state_dict(), loaded.state_dict()
    state |= {n: b for n, b in model.named_buffers() if n not in state}
    again |= {n: b for n, b in loaded.named_buffers() if n not in again}
    for name, tensor in state.items():
        other = again.get(name)
        if other is None or not torch.equal(_plain(tensor), _plain(other)):
            raise ValueError(
                f"save({type(model).__name__}): {name} does not come back as it was. Give the architecture it was cut "
                "from by base= and base_args=."
            )


def _plain(tensor: Tensor) -> Tensor:
    """Bring a tensor to where any two can be compared, NaN equal to NaN."""
    tensor = tensor.detach().cpu()
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor


def _match_dtype(model: nn.Module, folder: Path) -> nn.Module:
    """Give the model the file's floating-point type, where it has one for all."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()} - {"I64", "I32", "BOOL", "U8"}
    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    return model.to(types[kind]) if len(kinds) == 1 and (kind := kinds.pop()) in types else model


def _num_classes(model: nn.Module) -> int | None:
    """Read how many classes a model answers with."""
    return getattr(getattr(model, "config", None), "num_labels", None) or getattr(model, "num_classes", None)


def _as_size(value: Any) -> tuple[int, int] | None:
    """Give timm's int or pair as a pair."""
    return None if value is None else (value, value) if isinstance(value, int) else tuple(value)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not given."""
    return {key: value for key, value in values.items() if value is not None}


def _as_tuple(value: Any) -> tuple[str, ...]:
    """Give timm's None, name or tuple of names as a tuple."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


for _type in TRANSFORMERS_TYPES:
    _register(_type)
