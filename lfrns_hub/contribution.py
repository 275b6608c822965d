"""The FCR unit: one learned gate per unit at its taps, and what training makes of it.

D input channels of a consumer, U units of a group.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.batches import read_logits, split_batch
from lfrns_hub.responses import Moments, best_fold, fold_offset
from lfrns_hub.taps import channel_count, channels_back, channels_last, kept_channels, watched
from lfrns_hub.units import UnitGroup

NEARLY_CLOSED = 0.05
LEARNING_RATE = 0.02


class Gate:
    """The FCR hook of one consumer: kept channels times their gate; cut ones between their stand-ins and themselves."""

    def __init__(self, consumer: nn.Module, moments: Moments, keep: Tensor, leave: Tensor, device: torch.device):
        width = channel_count(consumer)
        self.stand_in = torch.zeros(width, width)  # [D in, D out]
        self.offset = torch.zeros(width)
        self.cut = torch.zeros(width)
        self.cut[leave] = 1
        fold = best_fold(moments, consumer.weight.detach(), keep, leave)
        if fold is not None:
            self.stand_in[keep[:, None], leave] = fold.T.float()
            if moments.centred:
                self.offset[leave] = fold_offset(moments, keep, leave, fold).float()
        self.stand_in, self.offset, self.cut = (t.to(device) for t in (self.stand_in, self.offset, self.cut))
        self.places: list[tuple[Tensor, Tensor]] = []  # gates [U] of a group, their channels [U, w]

    def __call__(self, module: nn.Module, value: Tensor) -> Tensor:
        """Gate a consumer's input."""
        gate = torch.ones_like(self.cut)
        for gates, index in self.places:
            gate = gate.index_put((index,), gates[:, None].expand(index.shape))
        rows = channels_last(module, value)
        standing = rows @ self.stand_in.to(rows.dtype) + self.offset
        return channels_back(module, rows * gate + standing * ((1 - gate) * self.cut))


def learn_contributions(
    model: nn.Module, groups: Sequence[UnitGroup], keep: dict[str, list[int]], batches: Sequence[Any],
    moments: dict[str, Moments], *, steps: int, accelerator: Any = None, progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Train the gates and read each unit's contribution.

    The network's weights are frozen. Gates of the pruning set start nearly closed with their stand-ins folded in, so a
    gate learns what its unit still adds once others stand in for it. The contribution is the part of the loss's fall
    that a gate's own moves account for, the sum over steps of -gradient x move: units of the loss, comparable across
    groups, and only large for a gate that learned to open.

    Args:
        model: The dense network in eval mode, weights not requiring gradients.
        groups: The groups that are cut.
        keep: The representatives of each group; the other units are its pruning set.
        batches: Batches of the user's loader, cycled.
        moments: Responses per consumer.
        steps: Gate updates.
        accelerator: Given, each process takes its share of every batch and gradients are averaged.
        progress: Called with 1 after each step.
    Returns:
        Contribution of each unit, [U], float64, per group.
    Raises:
        FloatingPointError: The loss is not finite.
    Source: Fang and Yin 2025, the FCR unit; the abstract says what it learns, the gate, the start and the reading are
        ours (DESIGN.md section 6).
    """
    device = next(model.parameters()).device
    gates = {g.name: torch.ones(g.size, device=device) for g in groups}
    leaving: dict[str, list[Tensor]] = {}
    for group in groups:
        gone = torch.tensor([u for u in range(group.size) if u not in set(keep[group.name])], dtype=torch.int64)
        gates[group.name][gone] = NEARLY_CLOSED
        gates[group.name].requires_grad_()
        for tap in group.taps:
            leaving.setdefault(tap.module, []).append(tap.index[gone])
    hooks = {}
    for name, removed in leaving.items():
        kept = kept_channels(model, name, removed)
        cut = torch.cat([index.flatten() for index in removed]).sort().values
        hooks[name] = Gate(model.get_submodule(name), moments[name], kept, cut, device)
    for group in groups:
        for tap in group.taps:
            hooks[tap.module].places.append((gates[group.name], tap.index.to(device)))
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    parameters = list(gates.values())
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    contributions = [torch.zeros(len(p), dtype=torch.float64) for p in parameters]
    targets: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            targets.append(read_logits(model(split_batch(batch)[0][rank::ranks].to(device))).float())
    for step in range(steps):
        images, labels = split_batch(batches[step % len(batches)])
        whole = len(images)
        images, target = images[rank::ranks].to(device), targets[step % len(batches)]
        with watched(model, hooks):
            logits = read_logits(model(images)).float()
        loss = nn.functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
        if labels is not None:
            loss = loss + nn.functional.cross_entropy(logits, labels[rank::ranks].to(device), reduction="sum")
        loss = loss / whole
        if not torch.isfinite(loss):
            raise FloatingPointError(f"fcr_steps={steps}: the loss is {loss.item()} at step {step}. Check the images' scale.")
        gradients = torch.autograd.grad(loss, parameters)
        if ranks > 1:
            gradients = [accelerator.reduce(g, "sum") for g in gradients]
        before = [p.detach().clone() for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for total, parameter, old, gradient in zip(contributions, parameters, before, gradients, strict=True):
            parameter.data.clamp_(0, 1)
            total -= (gradient * (parameter.detach() - old)).double().cpu()
        if progress:
            progress(1)
    return {group.name: total for group, total in zip(groups, contributions, strict=True)}
