"""Hooks on forward passes: functions on the inputs and outputs of modules. Only this file registers hooks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

OnInput = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None]
OnOutput = Callable[[nn.Module, tuple[Any, ...], Any], Any]


def on_input(module: nn.Module, function: OnInput) -> RemovableHandle:
    """Call `f(module, args, kwargs)` before each forward; returned args replace the originals, None keeps them."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = function(module, args, kwargs)
        return None if changed is None else (changed, kwargs)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: nn.Module, function: OnOutput) -> RemovableHandle:
    """Call `f(module, args, output)` after each forward; a returned value replaces the output, None keeps it."""
    return module.register_forward_hook(function)


def on_gradient(value: Tensor, function: Callable[[Tensor], Any]) -> RemovableHandle:
    """Call `f(gradient)` when the gradient of a tensor is computed."""
    return value.register_hook(function)


@contextmanager
def hooked(
    *, inputs: Iterable[tuple[nn.Module, OnInput]] = (), outputs: Iterable[tuple[nn.Module, OnOutput]] = ()
) -> Iterator[None]:
    """Call functions at modules; all hooks are removed when the context ends, also after an error.

    Args:
        inputs: Modules, each with a function for `on_input`.
        outputs: Modules, each with a function for `on_output`.
    """
    handles: list[RemovableHandle] = []
    try:
        handles += [on_input(module, function) for module, function in inputs]
        handles += [on_output(module, function) for module, function in outputs]
        yield
    finally:
        for handle in handles:
            handle.remove()
