"""Differences of a slim model from its dense skeleton, as plain numbers, and narrowing of a skeleton by them.

Checkpoints contain a copy of this file, so it imports nothing of the package.
"""

import copy
import reprlib
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

Shapes = dict[str, list[int]]
Attrs = dict[str, dict[str, Any]]

FORMAT_VERSION = 1  # of the form in which a checkpoint states shapes and attrs


def short(value: Any, length: int = 60) -> str:
    """Return an untrusted value as short text: a string in one line, anything else by its repr, both truncated.

    Example:
        >>> short([1, 2, 3])
        '[1, 2, 3]'
    """
    if isinstance(value, str):
        text = " ".join(value[: 2 * length].split())
    else:
        shown = reprlib.Repr()
        shown.maxlevel, shown.maxstring, shown.maxlong, shown.maxother = 3, length, length, length
        text = shown.repr(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= length else text[: length - 3] + "..."


def loose_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an attribute of a module: itself, or those in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in loose_tensors(part)]


def kept_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors in attributes of a model's modules: parameters, buffers, and other constants."""
    return [tensor for module in model.modules() for value in vars(module).values() for tensor in loose_tensors(value)]


def model_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model as `copy.deepcopy` does, even where a forward or a hook left a computed tensor on a module.

    Args:
        model: Any module, such as one with `torch.nn.utils.weight_norm`, whose weight torch refuses to copy.
        memo: Replacements of objects in the copy, by id.
    """
    memo = {} if memo is None else memo
    for tensor in kept_tensors(model):
        if not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(model, memo)


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model's structure to the meta device without copying a weight."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return model_copy(model, memo)


def carry_facts(model: nn.Module, slim: Any) -> None:
    """Set the provenance of a model that a library built from its config, as `lfrns_hub.load` does.

    Args:
        model: The model; unchanged without provenance.
        slim: The config's entry of that name.
    """
    if isinstance(slim, dict) and slim:
        model.lfrns_provenance = {k: v for k, v in slim.items() if k not in ("format_version", "class")}


def feature_entries(model: nn.Module) -> list[dict[str, Any]]:
    """Return a timm model's entries for its feature maps: num_chs, reduction and module of each; [] for others."""
    info = vars(model).get("feature_info") or []
    entries = getattr(info, "info", info)
    return entries if isinstance(entries, list) and all(isinstance(e, dict) and "num_chs" in e for e in entries) else []


def set_width(module: nn.Module, attribute: str, value: Any) -> None:
    """Set an attribute that states widths: an int, a tuple or list of ints, or the channels of feature maps."""
    if attribute == "feature_info":
        for entry, channels in zip(feature_entries(module), value, strict=True):
            entry["num_chs"] = channels
    else:
        old = vars(module)[attribute]
        vars(module)[attribute] = tuple(value) if isinstance(old, tuple) else value


def describe(model: nn.Module, base: nn.Module | None) -> tuple[Shapes, Attrs]:
    """Return the shapes and width attributes in which a narrow model differs from its skeleton.

    Args:
        model: The slim model.
        base: The dense skeleton, on any device including meta. None states every shape and attribute, for a class
            without a skeleton.
    Returns:
        Shape by parameter or buffer name; int or list of ints by module name and attribute.
    Raises:
        ValueError: A tensor or module is in only one of the two.

    Example:
        >>> describe(nn.Linear(4, 2), nn.Linear(4, 3))
        ({'weight': [2, 4], 'bias': [2]}, {'': {'out_features': 2}})
    """
    tensors, skeleton = _tensors(model), _tensors(base) if base is not None else {}
    modules, base_modules = _modules(model), _modules(base) if base is not None else {}
    if base is not None:
        strangers = sorted(name for name in tensors.keys() - skeleton.keys() if not _may_create(base, name))
        strangers += sorted(skeleton.keys() - tensors.keys()) + sorted(modules.keys() ^ base_modules.keys())
        if strangers:
            raise ValueError(
                f"describe({type(model).__name__}): {_few(strangers)} not in both the model and its base "
                f"{type(base).__name__}. Give the base this model was cut from."
            )
    computed = computed_buffers(model)  # not from a cut: cut buffers are stored (see `surgery.cut`)
    shapes = {
        n: list(t.shape)
        for n, t in tensors.items()
        if n not in computed and (n not in skeleton or t.shape != skeleton[n].shape)
    }
    attrs: Attrs = {}
    for name, module in modules.items():
        dense = read_widths(base_modules[name]) if base is not None else {}
        here = read_widths(module)
        if base is not None:  # a number larger than in the base is not a width: the forward wrote it
            here = {k: v for k, v in here.items() if k in dense and v != dense[k] and is_narrower(v, dense[k])}
        if here:
            attrs[name] = here
    return shapes, attrs


def computed_buffers(model: nn.Module) -> set[str]:
    """Return the names of buffers that no file has: a forward computes them for its images."""
    modules = _modules(model).items()
    return {f"{name}.{leaf}".lstrip(".") for name, module in modules for leaf in module._non_persistent_buffers_set}


def narrow(model: nn.Module, shapes: Shapes, attrs: Attrs) -> nn.Module:
    """Set the named tensors to the stated shapes, uninitialised, and the modules to the stated widths, in place.

    Every size is checked against the model's own before anything is allocated or changed: shapes and attrs come from a
    config.json, which is untrusted.

    Args:
        model: The dense skeleton, on any device including meta.
        shapes: Shape by parameter or buffer name; each size from 1 to the skeleton's.
        attrs: By module name and attribute, an int or a list of ints, each from 0 to the skeleton's.
    Returns:
        The same model.
    Raises:
        ValueError: The model lacks a name, or a size is larger than the model's own.
    """
    for what, given in (("shapes", shapes), ("attrs", attrs)):
        if not isinstance(given, dict):
            raise ValueError(
                f"narrow({what}={short(given)}): a dict by name is needed. The file is damaged or hostile."
            )
    tensors, modules = _tensors(model), _modules(model)
    for name, shape in shapes.items():
        _check_shape(model, name, shape, tensors.get(name))
    for name, values in attrs.items():
        if name not in modules:
            raise ValueError(f"narrow(attrs: {short(name)}): {type(model).__name__} has no such module.")
        if not isinstance(values, dict):
            raise ValueError(f"narrow(attrs: {short(name)} = {short(values)}): widths by attribute are needed.")
        for key, value in values.items():
            _check_width(f"{name}.{key}", value, read_widths(modules[name]).get(key))
    made: dict[int, Tensor] = {}  # tied tensors stay tied
    for name, shape in shapes.items():
        owner, leaf = modules[name.rpartition(".")[0]], name.rpartition(".")[2]
        old = tensors[name] if name in tensors else owner.weight
        new = made.get(id(old)) if name in tensors else None
        if new is None:
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            if leaf in owner._parameters:
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            if name in tensors:
                made[id(old)] = new
        (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = new
        owner._non_persistent_buffers_set.discard(leaf)  # as in `surgery.cut`: the file has a cut buffer's values
    for name, values in attrs.items():
        for key, value in values.items():
            set_width(modules[name], key, value)
    return model


def _check_shape(model: nn.Module, name: str, shape: Any, old: Tensor | None) -> None:
    """Refuse a tensor that the model does not have or that would be larger than the model's own."""

    def call() -> str:  # only for errors: formatting it took most of the time of narrowing
        return f"narrow(shapes: {short(name)} = {short(shape)})"

    if not _are_sizes(shape):
        raise ValueError(f"{call()}: a shape is a list of whole numbers.")
    if old is None:
        if not _may_create(model, name):
            raise ValueError(f"{call()}: {type(model).__name__} has no such parameter or buffer.")
        limit = [len(_modules(model)[name.rpartition(".")[0]].weight)]  # a bias that the base does not have
    else:
        limit = list(old.shape)
    within = len(shape) == len(limit) and all(1 <= s <= most or s == most for s, most in zip(shape, limit, strict=True))
    if not within or prod(shape) > prod(limit):
        raise ValueError(f"{call()}: sizes must lie from 1 to the base's own {limit}. The file is damaged or hostile.")


def is_narrower(value: Any, old: Any) -> bool:
    """Return whether a width, an int or list of ints, can result from a cut of another.

    Example:
        >>> is_narrower(3, 4), is_narrower([2, 9], [4, 8]), is_narrower(3, None)
        (True, False, False)
    """
    new, most = ([value], [old]) if isinstance(old, int) else (value, old)
    return (
        old is not None
        and _are_sizes(new)
        and len(new) == len(most)
        and all(v == m or 0 <= v <= m for v, m in zip(new, most, strict=True))
    )


def _check_width(name: str, value: Any, old: Any) -> None:
    """Refuse an attribute that the module does not have, or a width larger than the module's own."""

    def call() -> str:
        return f"narrow(attrs: {short(name)} = {short(value)})"

    if old is None:
        raise ValueError(f"{call()}: no such width, an int or tuple of ints, in the base model.")
    if not is_narrower(value, old):
        raise ValueError(f"{call()}: widths must lie from 0 to the base's own {old}. The file is damaged or hostile.")


def _are_sizes(value: Any) -> bool:
    """Return whether a value is a list of ints (bools are not)."""
    return isinstance(value, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, tied ones by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules, shared ones by each of their names."""
    return dict(model.named_modules(remove_duplicate=False))


def _may_create(model: nn.Module, name: str) -> bool:
    """Return whether a tensor is a bias that the base registers as None (folding sets an offset there)."""
    owner = _modules(model).get(name.rpartition(".")[0])
    has_weight = owner is not None and owner._parameters.get("weight") is not None
    return has_weight and name.rpartition(".")[2] == "bias" and owner._parameters.get("bias", 0) is None


def read_widths(module: nn.Module) -> dict[str, int | list[int]]:
    """Return the attributes of one module that are ints or tuples of ints."""
    found: dict[str, int | list[int]] = {}
    for key, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool):
            found[key] = value
        elif isinstance(value, (tuple, list)) and value and _are_sizes(value):
            found[key] = list(value)
    if entries := feature_entries(module):
        found["feature_info"] = [entry["num_chs"] for entry in entries]
    return found


def _few(names: list[str]) -> str:
    """Return the first few of many names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
