"""Attributes that one forward reads on its modules, and those it fills in addition to parameters and buffers."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.format.narrow import loose_tensors, meta_copy, model_copy
from lfrns_hub.model_io.batches import read_tensors
from lfrns_hub.model_io.model import as_input, same_draw
from lfrns_hub.units import Cache, forget

TORCHS = frozenset(vars(nn.Module()))  # attributes of torch itself on a module: parameters, hooks, the mode
CLOSE = 1e-5  # of the largest output: the same values, summed in another order
MAX_KEYS = 16  # attributes next to a cache that are tested as its key, each by one forward


@dataclass(frozen=True)
class Forward:
    """Effect of one forward in eval mode on the modules of a model.

    Attributes:
        reads: Attributes that it reads, by the name of the module; None where it could not be watched.
        caches: Attributes in which it keeps what it computed, and which it fills again when they are emptied.
    """

    reads: dict[str, set[str]] | None
    caches: tuple[Cache, ...] = ()


def watch_forward(model: nn.Module, example: Tensor) -> Forward:
    """Run a copy of a model once, on the meta device if possible, and return what it read and cached.

    Args:
        model: Any network; untouched.
        example: Images [N, C, H, W]; only the shape is used, and whether the dtype is floating-point.
    """
    for twin in _copies(model):
        before = {name: _own(module) for name, module in twin.named_modules()}
        with _watched(twin) as (reads, writes):
            if _answers(twin, example) is None:
                continue
        left = {
            (name, attribute)
            for name, module in twin.named_modules()
            for attribute, value in _own(module).items()
            if _holds(value) and not type(module).__module__.startswith("torch.nn.")  # attributes of hooks
        }
        new = [place for place in left if not _holds(before[place[0]].get(place[1]))]
        # A key that states the cache's input is written together with it.
        with_keys = {*new, *((name, attribute) for name, _ in new for attribute in writes[name])}
        caches = [_as_it_was(before[name], name, attribute) for name, attribute in sorted(with_keys)]
        return Forward(reads, (*caches, *_refilled(model, example, left - with_keys)))
    return Forward(None)


def _copies(model: nn.Module) -> Iterator[nn.Module]:
    """Yield copies to run until one can: for a model without values only a copy without values."""
    yield meta_copy(model).eval()
    if not any(tensor.is_meta for tensor in model.parameters()):
        yield model_copy(model).eval()


def _answers(model: nn.Module, example: Tensor) -> list[Tensor] | None:
    """Run a model on random images, the same every time; return its outputs, None where it cannot run."""
    shape, generator = (1, *example.shape[1:]), torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator)
    if not example.is_floating_point():
        images = torch.randint(2, shape, generator=generator).to(example.dtype)
    try:
        with torch.no_grad(), same_draw():
            return list(read_tensors(model(as_input(images, model))))
    except Exception:  # tracing reports a forward that cannot run
        return None


def _own(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes, each container copied: the forward may fill it."""
    own = {name: value for name, value in vars(module).items() if name not in TORCHS}
    return {name: copy.copy(value) if isinstance(value, (dict, list)) else value for name, value in own.items()}


def _holds(value: Any) -> bool:
    """Return whether an attribute holds values of a tensor."""
    return any(tensor.numel() for tensor in loose_tensors(value))


def _as_it_was(before: dict[str, Any], name: str, attribute: str) -> Cache:
    """Return the state of an attribute before the forward."""
    return Cache(name, attribute, before.get(attribute), attribute not in before)


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[dict[str, set[str]], dict[str, set[str]]]]:
    """Record which attributes of its modules a model reads and writes, by subclasses that record access."""
    names = {id(module): name for name, module in model.named_modules()}
    reads: dict[str, set[str]] = defaultdict(set)
    writes: dict[str, set[str]] = defaultdict(set)
    telling: dict[type, type] = {}

    def tell(cls: type) -> type:
        def __getattribute__(self: nn.Module, attribute: str) -> Any:
            reads[names.get(id(self), "")].add(attribute)
            return cls.__getattribute__(self, attribute)

        def __setattr__(self: nn.Module, attribute: str, value: Any) -> None:
            if attribute not in TORCHS:
                writes[names.get(id(self), "")].add(attribute)
            cls.__setattr__(self, attribute, value)

        body = {"__getattribute__": __getattribute__, "__setattr__": __setattr__}
        same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        return type(cls.__name__, (cls,), {**body, **same})

    modules = [(module, type(module)) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    for module, cls in modules:
        module.__class__ = telling.setdefault(cls, tell(cls))
    try:
        yield reads, writes
    finally:
        for module, cls in modules:
            object.__setattr__(module, "__class__", cls)  # the module's own __setattr__ would be recorded as a write


def _refilled(model: nn.Module, example: Tensor, places: set[tuple[str, str]]) -> list[Cache]:
    """Find the attributes with tensors that the forward fills again with the same values.

    A constant is not filled again; a memory of earlier images is filled with other values.
    """
    by_class: dict[tuple[type, str], list[str]] = defaultdict(list)
    for name, attribute in sorted(places):
        by_class[type(model.get_submodule(name)), attribute].append(name)
    has_values = not any(tensor.is_meta for tensor in model.parameters())
    reference = _answers(model_copy(model).eval(), example) if by_class and has_values else None
    found: list[Cache] = []
    for (_, attribute), names in by_class.items():
        for caches in _ways(model, names, attribute):
            twin = forget(model_copy(model) if has_values else meta_copy(model), caches).eval()
            outputs = _answers(twin, example)
            filled = all(_holds(vars(twin.get_submodule(name)).get(attribute)) for name in names)
            if outputs is not None and filled and (reference is None or _equal(outputs, reference)):
                found += caches
                break
    return found


def _ways(model: nn.Module, names: Sequence[str], attribute: str) -> Iterator[list[Cache]]:
    """Yield the states that an attribute of some modules of one class may have had before any forward."""
    held = {name: _own(model.get_submodule(name)) for name in names}
    emptied = [Cache(name, attribute, _empty(held[name].get(attribute))) for name in names]
    absent = [Cache(name, attribute, absent=True) for name in names]
    yield emptied
    yield absent
    keys = [key for key, value in held[names[0]].items() if key != attribute and not isinstance(value, (bool, dict))]
    for key in keys[-MAX_KEYS:]:  # attributes added by a forward come last
        yield [*emptied, *(Cache(name, key) for name in names)]


def _empty(value: Any) -> Any:
    """Return an empty container of the same type, None for a tensor."""
    if not isinstance(value, (dict, list)):
        return None
    empty = copy.copy(value)
    empty.clear()
    return empty


def _equal(outputs: list[Tensor], reference: list[Tensor]) -> bool:
    """Return whether outputs are equal, up to the order of sums."""
    return len(outputs) == len(reference) and all(
        one.shape == other.shape and bool((one - other).abs().max() <= CLOSE * other.abs().max())
        for one, other in zip(outputs, reference, strict=True)
        if one.is_floating_point() and one.numel()
    )
