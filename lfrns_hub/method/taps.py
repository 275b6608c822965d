"""The inputs of consumers: where units are observed, gated and masked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.model_io.hooks import OnInput, hooked


def channels_last(module: nn.Module, value: Tensor) -> Tensor:
    """View a consumer's input with its channels on the last axis, [..., D]."""
    return value if isinstance(module, nn.Linear) else value.movedim(1, -1)


def channels_back(module: nn.Module, value: Tensor) -> Tensor:
    """Undo `channels_last`."""
    return value if isinstance(module, nn.Linear) else value.movedim(-1, 1)


def channel_count(module: nn.Module) -> int:
    """Return the number of input channels of a consumer."""
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


@contextmanager
def watched(model: nn.Module, hooks: dict[str, Callable[[nn.Module, Tensor], Tensor | None]]) -> Iterator[None]:
    """Call a function on the input of each named consumer.

    Args:
        model: The network; it is unchanged when the context ends, also after an error.
        hooks: Consumer name to `f(module, input)`, which returns the input to use instead, or None.
    """

    def first(function: Callable[[nn.Module, Tensor], Tensor | None]) -> OnInput:
        def on_first(module: nn.Module, inputs: tuple[Any, ...], _others: dict[str, Any]) -> tuple[Any, ...] | None:
            changed = function(module, inputs[0])
            return None if changed is None else (changed, *inputs[1:])

        return on_first

    with hooked(inputs=[(model.get_submodule(name), first(function)) for name, function in hooks.items()]):
        yield


def multiplier(factor: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return a hook that multiplies a consumer's input channels by `factor` [D]."""

    def multiply(module: nn.Module, value: Tensor) -> Tensor:
        return channels_back(module, channels_last(module, value) * factor.to(value))

    return multiply


def kept_channels(model: nn.Module, module: str, removed: list[Tensor]) -> Tensor:
    """Return the ascending input channels of a consumer that stay, [K], int64."""
    stays = torch.ones(channel_count(model.get_submodule(module)), dtype=torch.bool)
    for index in removed:
        stays[index.flatten()] = False
    return stays.nonzero().flatten()
