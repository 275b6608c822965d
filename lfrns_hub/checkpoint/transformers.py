"""transformers' layout: `lfrns_<type>` for every image classifier, its stock classes narrowed by `config.lfrns`.

The configs are registered on import by name only, and created when transformers requests them. The classes, and
with them transformers' modeling files (a second and more to import), follow when the first config of their type is
created, which is before AutoModelForImageClassification looks for them.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from lfrns_hub.checkpoint.files import check_shapes, facts_of, match_dtype, read_config, read_tensors, write_config
from lfrns_hub.checkpoint.kinds import WRAPPERS
from lfrns_hub.checkpoint.narrow_classes import (
    CLASS_PREFIX,
    TYPE_PREFIX,
    narrow_base,
    narrow_class,
    narrow_config,
    wrapper_class,
)
from lfrns_hub.checkpoint.remote_code import auto_map, write_code
from lfrns_hub.checkpoint.timm import own_source
from lfrns_hub.format.compat import Classes
from lfrns_hub.format.memory import NoDraws, bounded, bytes_for
from lfrns_hub.format.narrow import describe, short
from lfrns_hub.format.untrusted import Header, read_headers, refuse_large, refusing, size_of
from lfrns_hub.model_io.meaning import problem_type_of

# Image classifiers that build a wrapped model by name, so that a subclass cannot narrow it; what to save instead.
NOT_SAVED = {
    "shieldgemma2": "It is a text generator: slim its image tower as a class of your own.",
}
# Config keys by which transformers would fetch or run something outside the checkpoint, with their harmless values.
OUTSIDE = {
    "attn_implementation": (None, "eager", "sdpa"),
    "_attn_implementation": (None, "eager", "sdpa"),
    "experts_implementation": (None, "eager"),
    "_experts_implementation": (None, "eager"),
    "quantization_config": (None,),
    "use_pretrained_backbone": (None, False),
    "use_timm_backbone": (None, False),
    "backbone": (None,),
}
# Each class has a row in the weights; its name takes a kilobyte in transformers' configuration.
MIN_LABELS, LABEL_BYTES = 1 << 16, 64
DTYPES = (None, "float32", "float16", "bfloat16", "float64")
WRAPPER = "timm_wrapper"  # saved in timm's layout, see timm_wrapper.py
TYPES = tuple(name for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES if name not in (*NOT_SAVED, WRAPPER))
CONFIGS = {CLASS_PREFIX + CONFIG_MAPPING_NAMES[name]: name for name in (*TYPES, WRAPPER)}


@cache
def _config_class(model_type: str) -> type[PreTrainedConfig]:
    """Create the config class of `lfrns_<type>`: the stock config with the sizes, or that of wrapped timm models."""

    def __new__(cls: type[PreTrainedConfig], *args: Any, **kwargs: Any) -> PreTrainedConfig:
        wrapper_classes() if model_type == WRAPPER else narrow_classes(model_type)
        return object.__new__(cls)

    if model_type == WRAPPER:  # the file has timm's own names, without the wrapper's prefix
        from transformers import conversion_mapping

        prefix = conversion_mapping.get_checkpoint_conversion_mapping(WRAPPER)
        conversion_mapping.register_checkpoint_conversion_mapping(TYPE_PREFIX + WRAPPER, prefix, overwrite=True)
    return _add(narrow_config(CONFIG_MAPPING[model_type], __name__, _write_code, __new__=__new__))


def _add(made: type) -> type:
    """Register a generated class under its name."""
    globals()[made.__name__] = made
    return made


def _write_code(config: PreTrainedConfig, folder: str | Path) -> None:
    """Write the modeling file next to a config that transformers saves."""
    base = (getattr(config, "model_args", None) or {}).get("base")
    write_code(Path(folder), getattr(config, "auto_map", None) or {}, own_source(base))


@cache
def wrapper_classes() -> "dict[str, type[transformers.PreTrainedModel]]":
    """Create and register the classes with which transformers opens folders in timm's layout; return them by name."""
    config_class = _config_class(WRAPPER)
    classes = {}
    for mapping, stock in (
        (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, transformers.TimmWrapperForImageClassification),
        (MODEL_MAPPING, transformers.TimmWrapperModel),
    ):
        made = _add(wrapper_class(stock, config_class, __name__))
        mapping.register(config_class, made, exist_ok=True)
        classes[made.__name__] = made
    return classes


@cache
def narrow_classes(model_type: str) -> "dict[type[transformers.PreTrainedModel], type[transformers.PreTrainedModel]]":
    """Create and register the classes of `lfrns_<type>`; return the narrow class by stock class."""
    config_class = _config_class(model_type)
    stock_classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[CONFIG_MAPPING[model_type]]
    stock_classes = stock_classes if isinstance(stock_classes, tuple) else (stock_classes,)
    classes = {stock: _add(narrow_class(stock, config_class, __name__)) for stock in stock_classes}
    # A tuple, as in transformers for DeiT: the config's `architectures` states which.
    value = Classes(classes.values()) if len(classes) > 1 else next(iter(classes.values()))
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.register(config_class, value, exist_ok=True)
    if (stock := _stock_base(model_type)) is not None:
        base = _add(narrow_base(stock, next(iter(classes.values())), __name__))
        MODEL_MAPPING.register(config_class, base, exist_ok=True)
    return classes


def _stock_base(model_type: str) -> "type[transformers.PreTrainedModel] | None":
    """Return the model without a head that AutoModel returns for a type."""
    found = MODEL_MAPPING.get(CONFIG_MAPPING[model_type], None)
    return found[0] if isinstance(found, tuple) else found


def __getattr__(name: str) -> Any:
    """Create the class that transformers, a pickled model or a worker process requests by name."""
    if name in CONFIGS:
        return _config_class(CONFIGS[name])
    if name in WRAPPERS:
        wrapper_classes()
        return globals()[name]
    for model_type in TYPES if name.startswith(CLASS_PREFIX) else ():
        for names in (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type], MODEL_MAPPING_NAMES.get(model_type)):
            if name.removeprefix(CLASS_PREFIX) in ((names,) if isinstance(names, str) else names or ()):
                narrow_classes(model_type)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_transformers(model: nn.Module) -> bool:
    """Return whether a model is a transformers model."""
    return isinstance(model, transformers.PreTrainedModel)


def has_narrow_class(model: nn.Module) -> bool:
    """Return whether transformers can build a model of this class from a narrow config."""
    model_type = model.config.model_type.removeprefix(TYPE_PREFIX)
    return model_type in TYPES and any(type(model) in pair for pair in narrow_classes(model_type).items())


def write_transformers(model: "transformers.PreTrainedModel", draft: Path, label_names: Sequence[str] | None) -> None:
    """Write transformers' config.json and weights, by its own save_pretrained."""
    if is_narrow_base(model):
        carry_base(model)
        with without_progress_bar():
            model.save_pretrained(draft)
        return write_config(draft, read_config(draft), model)
    config = _narrow_config_of(model)
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
    with torch.device("meta"):
        twin = _narrow_class_of(model)(config)
    twin.load_state_dict({k: v.contiguous().clone() for k, v in model.state_dict().items()}, assign=True, strict=True)
    with without_progress_bar():
        twin.save_pretrained(draft)
    write_config(draft, read_config(draft), model)


def carry_transformers(model: "transformers.PreTrainedModel") -> None:
    """Set a slim model's class and config type to those that save its widths."""
    generated, config = _narrow_class_of(model), _narrow_config_of(model)
    model.__class__, model.config.__class__ = generated, generated.config_class
    model.config.lfrns, model.config.auto_map, model.config.slim = config.lfrns, config.auto_map, facts_of(model)
    model.config.problem_type = config.problem_type


def is_narrow_base(model: "transformers.PreTrainedModel") -> bool:
    """Return whether a model is the base that AutoModel loads from a slim classifier."""
    return type(model) is MODEL_MAPPING.get(type(model.config), None) and type(model).__name__.startswith(CLASS_PREFIX)


def carry_base(model: "transformers.PreTrainedModel") -> None:
    """State the present widths of a model without a head in its config; those of the head are kept."""
    generated = next(iter(narrow_classes(model.config.model_type.removeprefix(TYPE_PREFIX)).values()))
    body, stated = generated.base_model_prefix, model.config.lfrns
    _, skeleton = _dense_skeleton(model, generated)
    shapes, attrs = describe(model, getattr(skeleton, body))

    def merged(stated: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
        heads = {name: value for name, value in stated.items() if name != body and not name.startswith(body + ".")}
        return heads | {f"{body}.{name}".removesuffix("."): value for name, value in now.items()}

    facts = {"shapes": merged(stated["shapes"], shapes), "attrs": merged(stated["attrs"], attrs)}
    model.config.lfrns, model.config.slim = stated | facts, facts_of(model)


def _dense_skeleton(model: "transformers.PreTrainedModel", generated: type) -> tuple[PreTrainedConfig, nn.Module]:
    """Return the config of a model without its widths, and the dense model of that config on the meta device."""
    fields = model.config.to_dict()
    for key in ("model_type", "lfrns", "slim", "architectures", "transformers_version"):
        fields.pop(key, None)
    config = generated.config_class(**fields)
    with torch.device("meta"):
        return config, generated(config)


def _narrow_config_of(model: "transformers.PreTrainedModel") -> PreTrainedConfig:
    """Return the config that states a model's widths and its code."""
    generated = _narrow_class_of(model)
    config, skeleton = _dense_skeleton(model, generated)
    shapes, attrs = describe(model, skeleton)
    config.lfrns = {"shapes": shapes, "attrs": attrs, "num_labels": config.num_labels}
    config.problem_type = config.problem_type or problem_type_of(model)
    stock = generated.config_class.__base__.__name__, generated.__base__.__name__
    config.auto_map = auto_map(*stock, _exported_base(model))
    return config


def _exported_base(model: "transformers.PreTrainedModel") -> str | None:
    """Return the name of the model in a classifier, if AutoModel loads its class and transformers exports it."""
    stock = _stock_base(model.config.model_type.removeprefix(TYPE_PREFIX))
    inside = getattr(model, model.base_model_prefix, None)
    return stock.__name__ if type(inside) is stock and hasattr(transformers, stock.__name__) else None


def _narrow_class_of(model: "transformers.PreTrainedModel") -> "type[transformers.PreTrainedModel]":
    """Return the generated class in which a model is saved."""
    model_type = model.config.model_type.removeprefix(TYPE_PREFIX)
    if model_type in TYPES:
        for stock, generated in narrow_classes(model_type).items():
            if type(model) in (stock, generated):
                return generated
    call = f"save({type(model).__name__}, model_type {model_type!r})"
    if model_type in NOT_SAVED:
        raise ValueError(
            f"{call}: its forward or its files leave no place for narrower layers. {NOT_SAVED[model_type]}"
        )
    raise ValueError(f"{call}: of transformers, the classes of AutoModelForImageClassification are saved. "
                     "For another class pass the dense model as base=, and to load as model=.")  # fmt: skip


def read_transformers(folder: Path, call: str, headers: dict[str, Header]) -> PreTrainedConfig:
    """Read the config of a folder, and check that numbers are bounded and nothing refers to outside the folder."""
    fields = read_config(folder)
    model_type = str(fields.get("model_type"))
    if model_type.removeprefix(TYPE_PREFIX) not in TYPES:
        raise ValueError(
            f"{call}: model_type {short(model_type)!r} is none of transformers {transformers.__version__}. "
            "Upgrade transformers; code that the folder brings is not run."
        )
    sizes = {key: value for key, value in fields.items() if key not in ("slim", "lfrns")}
    refuse_large(sizes, f"{call}: config.json", labels=max(MIN_LABELS, size_of(headers) // LABEL_BYTES))
    refuse_outside(sizes, call)
    with refusing(call):
        return CONFIG_MAPPING[model_type].from_dict({**fields, "name_or_path": str(folder)})


def load_transformers(folder: Path) -> nn.Module:
    """Check names and shapes on the meta device, then fill the model from tensors that we read ourselves.

    transformers gets neither the folder nor a name: it follows no index of shards, no adapter and no `auto_map`.
    """
    call = f"load({str(folder)!r})"
    headers = read_headers(folder, call)
    limits = (len(headers), bytes_for(size_of(headers)))
    config = read_transformers(folder, call, headers)
    with refusing(call):
        base = MODEL_MAPPING.get(type(config), None)
        is_base = getattr(base, "__name__", None) in (config.architectures or ())  # saved without a head
        auto = AutoModel if is_base else AutoModelForImageClassification
        with bounded(*limits), torch.device("meta"), NoDraws():
            model = auto.from_config(config, trust_remote_code=False)
        from transformers.core_model_loading import revert_weight_conversion  # imported here: slow

        # names on disk are transformers' own, older ones
        expected = revert_weight_conversion(model, model.state_dict(keep_vars=True))
    tensors = read_tensors(expected, folder)
    with refusing(call), bounded(*limits), without_progress_bar():
        info: dict[str, Any] = {}
        if not _assign(model, expected, tensors):
            model, info = type(model).from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    if bad := {k: sorted(map(str, v)) for k, v in info.items() if v}:
        raise ValueError(f"{call}: transformers reports {short(bad, 300)}. The file is damaged, or of another model.")
    model.name_or_path = model.config.name_or_path = str(folder)
    return model


def _assign(
    model: "transformers.PreTrainedModel", expected: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> bool:
    """Assign a file's tensors to a model on the meta device, which takes half the time of copying.

    Args:
        model: All on the meta device.
        expected: The model's own tensors by their names on disk, or what transformers converted them to.
        tensors: The file's tensors, by the same names.
    Returns:
        False, with nothing done, if transformers has to do more than rename: split, cast or tie the stored weights.
    """
    computed = dict(model.named_non_persistent_buffers())
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    held = [(name, own) for name, own in named if name not in computed]
    stored = {id(own): tensors[name] for name, own in expected.items()}
    if not len(held) == len(expected) == len(stored) or {id(own) for _, own in held} != stored.keys():
        return False
    if any(stored[id(own)].dtype != own.dtype for _, own in held):
        return False
    model.load_state_dict({name: stored[id(own)] for name, own in held}, strict=True, assign=True)
    if computed:  # no file has them: transformers computes them, and skips those that are marked
        for tensor in model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        for name, buffer in computed.items():
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        model.initialize_weights()
    return True


def refuse_outside(fields: dict[str, Any], call: str) -> None:
    """Refuse config entries by which transformers would fetch or run something, at any depth."""
    for key, value in fields.items():
        if key in OUTSIDE and value not in OUTSIDE[key]:
            raise ValueError(
                f"{call}: config.json has {key} = {short(value)}, which reaches outside of the checkpoint. Take it out."
            )
        if key in ("dtype", "torch_dtype") and value not in DTYPES:
            raise ValueError(f"{call}: config.json has {key} = {short(value)}: it must be one of {DTYPES[1:]}.")
        if isinstance(value, dict):
            refuse_outside(value, call)


def fill_transformers(model: nn.Module, folder: Path) -> nn.Module:
    """Load the weights into the user's own model, which has been narrowed."""
    state = load_transformers(folder).state_dict()
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(expected, {name: list(tensor.shape) for name, tensor in state.items()}, folder)
    model.load_state_dict(state, strict=True)
    if (folder / "preprocessor_config.json").is_file():  # its preprocessing replaces the dense model's
        model.name_or_path = model.config.name_or_path = str(folder)
    return match_dtype(model, state)


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Disable transformers' progress bars, for operations that take an instant."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


for _name, _type in CONFIGS.items():  # as transformers stores its own: a name, and the module that provides it
    CONFIG_MAPPING._mapping[TYPE_PREFIX + _type] = _name
    CONFIG_MAPPING._modules[model_type_to_module_name(TYPE_PREFIX + _type)] = sys.modules[__name__]
