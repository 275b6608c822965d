"""Narrow classes of transformers' models: the stock classes, narrowed by `config.lfrns` and loaded strictly.

Checkpoints contain a copy of this file (see remote_code.py): from the package it may import only narrow.py and
compat.py. Classes of models are quoted: transformers needs a second to import them, and `import lfrns_hub` runs this.
"""

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from lfrns_hub.format.compat import names_here
from lfrns_hub.format.narrow import Shapes, carry_facts, narrow

TYPE_PREFIX = "lfrns_"
CLASS_PREFIX = "Lfrns"
SIZES = ("lfrns", "model_args", "slim")  # keys of a config with an entry for each layer
MAX_SHOWN = 16  # entries of another table of a config
MODELING = "modeling_lfrns"  # module name of the file in a checkpoint


def own_names(names: Any) -> dict[str, str]:
    """Return the entries of an `auto_map` that name our file; from the Hub they read "user/name--file.Class"."""
    named = names.items() if isinstance(names, dict) else ()
    local = {auto: name.rpartition("--")[2] for auto, name in named if isinstance(name, str)}
    return {auto: name for auto, name in local.items() if name.startswith(f"{MODELING}.{CLASS_PREFIX}")}


def narrow_config(
    stock: type[PreTrainedConfig], module: str, write: Callable[[Any, Any], None] | None = None, **body: Any
) -> type[PreTrainedConfig]:
    """Return a subclass of a stock config: its type is `lfrns_<type>`, and it saves its code next to itself.

    Args:
        stock: The config class of transformers.
        module: Module in which the class will be found.
        write: Writes the code, called with the config and the folder; transformers itself copies the code of a class
            loaded by trust_remote_code.
        body: Further attributes of the class.
    """

    def save_pretrained(self: PreTrainedConfig, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        vars(self).pop("custom_pipelines", None)  # foreign code is not saved
        if ours := own_names(vars(self).pop("auto_map", None)):
            self.auto_map = ours
        if write is not None:
            write(self, save_directory)
        stock.save_pretrained(self, save_directory, *args, **kwargs)

    def __repr__(self: PreTrainedConfig) -> str:
        """Return a text without long tables: transformers writes it to its log whenever it reads a config."""
        shown = copy.copy(self)
        tables = {key: value for key, value in vars(self).items() if isinstance(value, dict)}
        vars(shown).update({key: "..." for key, value in tables.items() if key in SIZES or len(value) > MAX_SHOWN})
        return stock.__repr__(shown)

    fields = {"model_type": TYPE_PREFIX + stock.model_type, "save_pretrained": save_pretrained, "__repr__": __repr__}
    return _subclass(stock, module, {**fields, **body})


def narrow_class(
    stock: "type[transformers.PreTrainedModel]", config_class: type[PreTrainedConfig], module: str
) -> "type[transformers.PreTrainedModel]":
    """Return a subclass of a stock classifier, narrowed by config.lfrns, `{"shapes": ..., "attrs": ...}`."""

    def __init__(self: "transformers.PreTrainedModel", config: Any, *args: Any, **kwargs: Any) -> None:
        on_meta = torch.get_default_device().type == "meta"
        with no_init_weights() if on_meta else nullcontext():  # even without values, drawing them takes half the time
            stock.__init__(self, config, *args, **kwargs)
        sizes = getattr(config, "lfrns", None) or {}
        stated = _fit_head(self, config, sizes.get("shapes", {})), sizes.get("attrs", {})
        narrow(self, *names_here(self, config, *stated))
        for part in self.modules():  # the narrowed tensors have no values yet: initialise again
            part.__dict__.pop("_is_hf_initialized", None)
        self.init_weights()
        carry_facts(self, getattr(config, "slim", None))

    body = {"__init__": __init__, "config_class": config_class, "save_pretrained": _telling(stock)}
    return _subclass(stock, module, {**body, "from_pretrained": _strictly(stock)})


def narrow_base(
    stock: "type[transformers.PreTrainedModel]", classifier: "type[transformers.PreTrainedModel]", module: str
) -> "type[transformers.PreTrainedModel]":
    """Return a subclass of a stock model without a head, for AutoModel: the base of a narrow classifier."""

    def taken(
        cls: "type[transformers.PreTrainedModel]", whole: "transformers.PreTrainedModel"
    ) -> "transformers.PreTrainedModel":
        """Return the base of a classifier as this class."""
        base = getattr(whole, whole.base_model_prefix, None)
        if not isinstance(base, stock):
            raise ValueError(
                f"{cls.__name__}: the classifier {type(whole).__name__} holds no {stock.__name__} to give. Load it by "
                "AutoModelForImageClassification."
            )
        base.__class__ = cls
        base.config.architectures = [cls.__name__]
        carry_facts(base, getattr(base.config, "slim", None))
        return base

    @classmethod
    def from_pretrained(
        cls: "type[transformers.PreTrainedModel]", *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        whole, info = classifier.__base__.from_pretrained.__func__(
            classifier, *args, output_loading_info=True, **kwargs
        )
        prefix = classifier.base_model_prefix + "."
        # A folder that this class wrote has no head, and needs none.
        _refuse({**info, "missing_keys": {k for k in info["missing_keys"] if k.startswith(prefix)}}, cls, args)
        model = taken(cls, whole)
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(
        cls: "type[transformers.PreTrainedModel]", config: Any, **kwargs: Any
    ) -> "transformers.PreTrainedModel":
        return taken(cls, classifier._from_config(config, **kwargs))

    body = {"config_class": classifier.config_class, "from_pretrained": from_pretrained, "_from_config": _from_config}
    return _subclass(stock, module, {**body, "save_pretrained": _telling(stock)})


def wrapper_class(
    stock: "type[transformers.PreTrainedModel]", config_class: type[PreTrainedConfig], module: str
) -> "type[transformers.PreTrainedModel]":
    """Return a subclass of transformers' wrapper of timm models, narrowed by `lfrns_slim` and loaded strictly."""

    def __init__(self: "transformers.PreTrainedModel", config: Any) -> None:
        stock.__init__(self, config)
        if not self.timm_model.num_classes:  # AutoModel: the file has a classifier, the model does not
            heads = config.pretrained_cfg.get("classifier") or ()
            heads = [heads] if isinstance(heads, str) else heads
            ignored = [rf"^(timm_model\.)?{re.escape(head)}\." for head in heads]
            known = self._keys_to_ignore_on_load_unexpected  # a list in transformers 5.0, which may be None; now a set
            kind = list if known is None else type(known)
            self._keys_to_ignore_on_load_unexpected = kind([*(known or ()), *ignored])
        carry_facts(self, getattr(config, "slim", None))

    tell = _telling(stock)

    def save_pretrained(
        self: "transformers.PreTrainedModel", *args: Any, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """Save the tensors with timm's own names, so that timm can open the folder too."""
        state = self.state_dict() if state_dict is None else state_dict
        state = {name.removeprefix(f"{self.base_model_prefix}."): tensor for name, tensor in state.items()}
        tell(self, *args, state_dict=state, **kwargs)

    body = {"__init__": __init__, "config_class": config_class, "save_pretrained": save_pretrained}
    return _subclass(stock, module, {**body, "from_pretrained": _strictly(stock)})


def _subclass(stock: type, module: str, body: dict[str, Any]) -> type:
    """Return a class Lfrns<Stock> that belongs to `module`."""
    return type(CLASS_PREFIX + stock.__name__, (stock,), {**body, "__module__": module, "__doc__": stock.__doc__})


def _telling(stock: "type[transformers.PreTrainedModel]") -> Callable[..., None]:
    """Return a save_pretrained that updates the config's provenance first, for example after retraining."""

    def save_pretrained(self: "transformers.PreTrainedModel", *args: Any, **kwargs: Any) -> None:
        if facts := vars(self).get("lfrns_provenance"):
            self.config.slim = {**(getattr(self.config, "slim", None) or {}), **facts}
        stock.save_pretrained(self, *args, **kwargs)

    return save_pretrained


def _strictly(stock: "type[transformers.PreTrainedModel]") -> classmethod:
    """Return a from_pretrained that raises an error where transformers only reports."""

    @classmethod
    def from_pretrained(
        cls: "type[transformers.PreTrainedModel]", *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        model, info = stock.from_pretrained.__func__(cls, *args, output_loading_info=True, **kwargs)
        # A folder with only the base says so in its config: its new head is initialised by transformers.
        new = _head(model) if _is_base(model) else set()
        _refuse({**info, "missing_keys": set(info["missing_keys"]) - new}, cls, args)
        return (model, info) if output_loading_info else model

    return from_pretrained


def _is_base(model: "transformers.PreTrainedModel") -> bool:
    """Return whether the config of a loaded classifier belongs to a base without a head."""
    inside = type(getattr(model, model.base_model_prefix, None)).__name__
    names = {CLASS_PREFIX + inside, type(model).__name__.replace("ForImageClassification", "Model")}
    return bool(names & set(getattr(model.config, "architectures", None) or ()))


def _head(model: "transformers.PreTrainedModel") -> set[str]:
    """Return the names of a classifier's head tensors; for a wrapped timm model, those in its pretrained_cfg."""
    names, body = model.state_dict().keys(), model.base_model_prefix + "."
    cfg = getattr(getattr(model, "timm_model", None), "pretrained_cfg", None)
    if cfg is None:
        return {name for name in names if not name.startswith(body)}
    heads = cfg.get("classifier") or ()
    heads = tuple(f"{body}{head}." for head in ([heads] if isinstance(heads, str) else heads))
    return {name for name in names if name.startswith(heads)}


def _refuse(info: dict[str, Any], cls: type, args: tuple[Any, ...]) -> None:
    """Refuse tensors that are missing or unexpected; misshapen ones are allowed only by ignore_mismatched_sizes."""
    misshapen = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    problems = [f"{name} is missing" for name in sorted(set(info["missing_keys"]) - misshapen)]
    problems += [f"{name} is unexpected" for name in sorted(info["unexpected_keys"])]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        source = repr(str(args[0])) if args else ""
        raise ValueError(
            f"{cls.__name__}.from_pretrained({source}): {'; '.join(problems[:4])}{more}. The file is damaged, or of "
            "another model: save it again."
        )


def _fit_head(model: nn.Module, config: Any, shapes: Shapes) -> Shapes:
    """Set the head's stated sizes to the requested number of classes (num_labels=), where the stored one differs."""
    stored = (getattr(config, "lfrns", None) or {}).get("num_labels", config.num_labels)
    body = model.base_model_prefix + "."
    if stored == config.num_labels:
        return shapes
    heads = {name for name, shape in shapes.items() if not name.startswith(body) and list(shape)[:1] == [stored]}
    return shapes | {name: [config.num_labels, *shapes[name][1:]] for name in heads}
