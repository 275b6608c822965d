"""Hooks on the inputs of consumers: where units are observed, gated and masked. Gone when the caller is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def channels_last(module: nn.Module, value: Tensor) -> Tensor:
    """View a consumer's input with its channels on the last axis, [..., D]."""
    return value if isinstance(module, nn.Linear) else value.movedim(1, -1)


def channels_back(module: nn.Module, value: Tensor) -> Tensor:
    """Undo `channels_last`."""
    return value if isinstance(module, nn.Linear) else value.movedim(-1, 1)


def channel_count(module: nn.Module) -> int:
    """Give the number of input channels of a consumer."""
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


@contextmanager
def watched(model: nn.Module, hooks: dict[str, Callable[[nn.Module, Tensor], Tensor | None]]) -> Iterator[None]:
    """Call a function on the input of each named consumer.

    Args:
        model: The network; it is as before when the context ends, also by an error.
        hooks: Consumer name to `f(module, input)`, which returns the input to use instead, or None.
    """
    handles = []
    try:
        for name, function in hooks.items():

            def hook(module: nn.Module, inputs: tuple[Tensor, ...], function: Callable = function) -> object:
                changed = function(module, inputs[0])
                return None if changed is None else (changed, *inputs[1:])

            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def multiplier(factor: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    """Give a hook that multiplies a consumer's input channels by `factor` [D]."""

    def multiply(module: nn.Module, value: Tensor) -> Tensor:
        return channels_back(module, channels_last(module, value) * factor.to(value))

    return multiply


def kept_channels(model: nn.Module, module: str, removed: list[Tensor]) -> Tensor:
    """Give the ascending input channels of a consumer that stay, [K], int64."""
    stays = torch.ones(channel_count(model.get_submodule(module)), dtype=torch.bool)
    for index in removed:
        stays[index.flatten()] = False
    return stays.nonzero().flatten()
