"""The gates of units at the layers that read them, with the stand-ins of closed units.

D input channels of a consumer, K kept and R cut of them; O its outputs; U units of a group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lfrns_hub.method.fold import best_fold, fold_offset
from lfrns_hub.method.responses import Moments
from lfrns_hub.method.taps import channel_count, channels_back, channels_last, kept_channels, watched
from lfrns_hub.model_io.answers import Answer, read_answer
from lfrns_hub.model_io.model import device_of
from lfrns_hub.units import UnitGroup

NEARLY_CLOSED = 0.05
# Stock forwards that read only `weight` and `bias`, by name. A subclass may read more, so it does not qualify.
PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class Gate:
    """The FCR unit of one consumer: kept channels times their gate; cut ones blended with their stand-ins.

    Gates and stand-ins are linear in the consumer's input, as the consumer is: a plain consumer has them folded into
    its weights, at a cost that does not depend on the number of images. Any other has them as a hook on its input.

    Attributes:
        places: The gates [U] and channels [U, w] of each group read here.
    """

    def __init__(self, consumer: nn.Module, moments: Moments | None, keep: Tensor, leave: Tensor, device: torch.device):
        """Fit the stand-ins of channels `leave` [R] from channels `keep` [K]; without moments there are none."""
        fold = None if moments is None else best_fold(moments, consumer.weight.detach(), keep, leave)
        self.fold = self.offset = None
        if fold is not None:
            self.fold = fold.float().to(device)  # [R, K]
            self.offset = fold_offset(moments, keep, leave, fold).float().to(device) if moments.centred else None
        self.width, self.keep, self.leave = channel_count(consumer), keep.to(device), leave.to(device)
        self.places: list[tuple[Tensor, Tensor]] = []
        self._rows: tuple[Tensor, Tensor] | None = None

    def factors(self) -> Tensor:
        """Return the gate of each channel, [D]."""
        gate = torch.ones(self.width, device=self.keep.device)
        for gates, index in self.places:
            gate = gate.index_put((index,), gates[:, None].expand(index.shape))
        return gate

    def __call__(self, module: nn.Module, value: Tensor) -> Tensor:
        """Gate a consumer's input."""
        gate, rows = self.factors().to(value), channels_last(module, value)
        gated = rows * gate
        if self.fold is not None:
            standing = rows[..., self.keep] @ self.fold.T.to(value)
            standing = standing if self.offset is None else standing + self.offset.to(value)
            gated = gated.index_add(-1, self.leave, standing * (1 - gate[self.leave]))
        return channels_back(module, gated)

    def weights(self, consumer: nn.Module) -> dict[str, Tensor]:
        """Return the gated weight, and the bias where it changes, of a plain consumer."""
        if self._rows is None:  # rearranged and gathered once, not at every step
            rows = consumer.weight.movedim(1, -1).contiguous()
            self._rows = rows, rows[..., self.leave]
        (rows, cut_rows), gate = self._rows, self.factors().to(consumer.weight)  # [O, ..., D] and [O, ..., R]; [D]
        gated, changed = rows * gate, {}
        if self.fold is not None:
            standing = cut_rows * (1 - gate[self.leave])
            gated = gated.index_add(-1, self.keep, standing @ self.fold.to(rows))
            if self.offset is not None:  # no padding: every position of the kernel reads it
                added = (standing @ self.offset.to(rows)).reshape(len(rows), -1).sum(1)
                changed["bias"] = added if consumer.bias is None else consumer.bias + added
        weight = gated.movedim(-1, 1)
        if consumer.weight.is_contiguous():  # its output has the weights' memory layout, and a forward may view it
            weight = weight.contiguous()
        return changed | {"weight": weight}


def is_plain(consumer: nn.Module) -> bool:
    """Return whether a consumer's output depends only on its input, weight and bias, with all channels mixed."""
    stock = type(consumer).forward in PLAIN_FORWARDS and "forward" not in vars(consumer)
    return stock and consumer._parameters.get("weight") is not None and getattr(consumer, "groups", 1) == 1


@contextmanager
def gated(model: nn.Module, hooks: dict[str, Gate]) -> Iterator[None]:
    """Run a model with its consumers gated; a backward pass inside may run parts of the forward again.

    For a weight that two layers share, only this layer's use is gated.
    """
    others, before = {}, []
    for name, gate in hooks.items():
        consumer = model.get_submodule(name)
        if is_plain(consumer):
            for part, tensor in gate.weights(consumer).items():
                before.append((consumer, part, consumer._parameters[part]))
                consumer._parameters[part] = tensor
        else:
            others[name] = gate
    try:
        with watched(model, others):
            yield
    finally:
        for consumer, part, tensor in reversed(before):
            consumer._parameters[part] = tensor


def answer_gated(model: nn.Module, hooks: dict[str, Gate], images: Tensor) -> Answer:
    """Run images through a model whose consumers are gated and return the answer; the model is unchanged."""
    with gated(model, hooks):
        return answer_to(model, images)


def make_gates(
    model: nn.Module, groups: Sequence[UnitGroup], keep: dict[str, list[int]], moments: dict[str, Moments]
) -> tuple[dict[str, Tensor], dict[str, Gate]]:
    """Return the gates [U] of each group, nearly closed for its pruning set, and the hook of each consumer."""
    device = device_of(model)
    gates = {g.name: torch.ones(g.size, device=device) for g in groups}
    leaving: dict[str, list[Tensor]] = {}
    for group in groups:
        gone = torch.tensor(sorted(set(range(group.size)).difference(keep[group.name])), dtype=torch.int64)
        gates[group.name][gone] = NEARLY_CLOSED
        gates[group.name].requires_grad_()
        for tap in group.taps:
            leaving.setdefault(tap.module, []).append(tap.index[gone])
    hooks = {}
    for name, removed in leaving.items():
        kept = kept_channels(model, name, removed)
        cut = torch.cat([index.flatten() for index in removed]).sort().values
        hooks[name] = Gate(model.get_submodule(name), moments.get(name), kept, cut, device)
    for group in groups:
        for tap in group.taps:
            hooks[tap.module].places.append((gates[group.name], tap.index.to(device)))
    return gates, hooks


def answer_to(model: nn.Module, images: Tensor) -> Answer:
    """Run images, moved to the model's device, and return the answer."""
    return read_answer(model, model(images.to(device_of(model))))
