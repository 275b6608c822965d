"""Feature distillation: the teacher's last feature map, at the channels that the slim model kept.

The last feature map is the output of the module that ends last, among those that return one tensor with more than one
position: the last stage of a convolutional network, the last norm of a transformer.

N images, C channels of the teacher there, K of them in the slim model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.method.taps import channel_count, kept_channels
from lfrns_hub.model_io.hooks import hooked, on_output
from lfrns_hub.model_io.model import evaluating
from lfrns_hub.self_check import settled_trace
from lfrns_hub.surgery import removed_at_taps
from lfrns_hub.units import SlimPlan, UnitGroup


class Features:
    """The last feature map of a model and of its teacher, recorded at every forward pass of both until `close`."""

    def __init__(self, model: nn.Module, teacher: nn.Module, module: str, axis: int, kept: Tensor | None):
        """Hook one module in both networks.

        Args:
            model, teacher: Networks that both have the module.
            module: Name of the module.
            axis: Channel axis of its output.
            kept: The teacher's channels that the model has, [K], int64; None: all.
        """
        self.module, self.axis, self.kept = module, axis, kept
        self._seen: dict[str, Tensor] = {}
        self._handles = [
            on_output(network.get_submodule(module), self._note(whose))
            for whose, network in (("model", model), ("teacher", teacher))
        ]

    def _note(self, whose: str) -> Callable[[nn.Module, Any, Tensor], None]:
        """Return the hook of a network."""

        def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._seen[whose] = output

        return note

    def loss(self) -> Tensor:
        """Return the squared error of the model's map in this step, divided by the square of the teacher's."""
        wanted = self._seen.pop("teacher")
        if self.kept is not None:
            wanted = wanted.index_select(self.axis, self.kept)
        wanted = wanted.float()
        error = (self._seen.pop("model").float() - wanted).square().mean()
        return error / wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


@dataclass
class LastMap:
    """Place of a network's last feature map.

    Attributes:
        module: Name of the module that returns it.
        shape: Shape of the map.
        later: Names of the modules that start after it, in order.
    """

    module: str
    shape: torch.Size
    later: list[str]


def watch_features(model: nn.Module, teacher: nn.Module, plan: SlimPlan, images: Tensor) -> Features | None:
    """Find the last feature map that a model and its teacher share, and record it in both.

    Args:
        model: The slim model.
        teacher: The dense one, on the same device.
        plan: Units of the teacher that the model kept.
        images: Images [N, C, H, W], on that device too.
    Returns:
        None where the two cannot be compared: there is no feature map, the teacher has another architecture, or the
        plan does not show which of the teacher's channels the model has.
    """
    few = images[:2]
    ours, theirs = find_last_map(model, few), find_last_map(teacher, few)
    if ours is None or theirs is None or ours.module != theirs.module or len(ours.shape) != len(theirs.shape):
        return None
    try:
        groups = settled_trace(teacher, few).groups
        removed = removed_at_taps(groups, plan)
    except ValueError:  # the plan belongs to another network, or this network cannot be traced
        return None
    differing = [a for a, sizes in enumerate(zip(ours.shape, theirs.shape, strict=True)) if len(set(sizes)) > 1]
    if not differing:
        return Features(model, teacher, ours.module, 1, None)
    [axis, *more] = differing
    kept = kept_there(teacher, theirs.later, theirs.shape[axis], groups, plan, removed)
    if more or kept is None or len(kept) != ours.shape[axis]:
        return None
    return Features(model, teacher, ours.module, axis, kept.to(images.device))


def find_last_map(model: nn.Module, images: Tensor) -> LastMap | None:
    """Run images through a model in eval mode and return its last feature map; None if it has none."""
    found: list[LastMap] = []

    names = {module: name for name, module in model.named_modules()}

    def started(module: nn.Module, *_: Any) -> None:
        if found:
            found[0].later.append(names[module])

    def ended(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and sum(size > 1 for size in output.shape[1:]) > 1:
            found[:] = [LastMap(names[module], output.shape, [])]

    with (
        hooked(inputs=[(module, started) for module in names], outputs=[(module, ended) for module in names]),
        torch.no_grad(),
        evaluating(model),
    ):
        model(images)
    return found[0] if found else None


def kept_there(
    teacher: nn.Module,
    later: list[str],
    channels: int,
    groups: Sequence[UnitGroup],
    plan: SlimPlan,
    removed: dict[str, list[Tensor]],
) -> Tensor | None:
    """Return the kept channels of the teacher's map, [K], int64: those of the layer that reads it next."""
    for name in later:
        if name in removed and channel_count(teacher.get_submodule(name)) == channels:
            return kept_channels(teacher, name, removed[name])
    # With a flatten in between, a unit is several inputs of that layer, but one channel here.
    for group in groups:
        if group.size == channels and any(tap.module in later for tap in group.taps):
            return torch.tensor(plan.kept(group))
    return None
