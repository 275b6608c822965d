"""The FCR unit: one learned gate per unit at its taps, and what training makes of it.

D input channels of a consumer, U units of a group.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.answers import Answer, check_labels, read_answer
from lfrns_hub.batches import split_batch
from lfrns_hub.cache import Training
from lfrns_hub.responses import Moments, best_fold, fold_offset
from lfrns_hub.running import device_of
from lfrns_hub.taps import channel_count, channels_back, channels_last, kept_channels, watched
from lfrns_hub.units import UnitGroup

NEARLY_CLOSED = 0.05
LEARNING_RATE = 0.02
STEP_IMAGES = 64  # at most


def stand_in(module: nn.Module, value: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Estimate channels from channels at a consumer's input: `weight` [D in, D out], `offset` [D out]."""
    if isinstance(module, nn.Conv2d):
        return nn.functional.conv2d(value, weight.T[:, :, None, None].to(value.dtype), offset.to(value.dtype))
    return channels_back(module, channels_last(module, value) @ weight.to(value.dtype) + offset)


def folded_channels(consumer: nn.Module, moments: Moments | None, keep: Tensor, leave: Tensor) -> tuple[Tensor, Tensor]:
    """Give the weight [D in, D out] and offset [D out] that estimate the cut channels; zero for kept ones."""
    width = channel_count(consumer)
    weight, offset = torch.zeros(width, width), torch.zeros(width)
    fold = None if moments is None else best_fold(moments, consumer.weight.detach(), keep, leave)
    if fold is not None:
        weight[keep[:, None], leave] = fold.T.float()
        if moments.centred:
            offset[leave] = fold_offset(moments, keep, leave, fold).float()
    return weight, offset


class Gate:
    """The FCR hook of one consumer: kept channels times their gate; cut ones between their stand-ins and themselves."""

    def __init__(self, consumer: nn.Module, moments: Moments | None, keep: Tensor, leave: Tensor, device: torch.device):
        weight, offset = folded_channels(consumer, moments, keep, leave)
        self.cut = torch.zeros(len(offset))
        self.cut[leave] = 1
        self.stand_in, self.offset, self.cut = weight.to(device), offset.to(device), self.cut.to(device)
        self.places: list[tuple[Tensor, Tensor]] = []  # gates [U] of a group, their channels [U, w]

    def __call__(self, module: nn.Module, value: Tensor) -> Tensor:
        """Gate a consumer's input."""
        gate = torch.ones_like(self.cut)
        for gates, index in self.places:
            gate = gate.index_put((index,), gates[:, None].expand(index.shape))
        standing = stand_in(module, value, self.stand_in, self.offset)
        shape = (-1, *[1] * (value.ndim - 2)) if not isinstance(module, nn.Linear) else (-1,)
        return value * gate.view(shape) + standing * ((1 - gate) * self.cut).view(shape)


def learn_contributions(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    keep: dict[str, list[int]],
    batches: Sequence[Any],
    moments: dict[str, Moments],
    *,
    steps: int,
    accelerator: Any = None,
    progress: Callable[[int], None] | None = None,
    training: Training | None = None,
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
        moments: Responses per consumer; {} where nothing will be folded, so that nothing stands in for a unit.
        steps: Gate updates.
        accelerator: Given, each process takes its share of every batch and gradients are averaged.
        progress: Called with 1 after each step.
        training: Where the state is kept, and gone on from.
    Returns:
        Contribution of each unit, [U], float64, per group.
    Raises:
        FloatingPointError: The loss is not finite.
        ValueError: A label is no class of the model.
    Source: Fang and Yin 2025, the FCR unit; the abstract says what it learns, the gate, the start and the reading are
        ours (DESIGN.md section 6).
    """
    gates, hooks = make_gates(model, groups, keep, moments)
    parameters = list(gates.values())
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    contributions = [torch.zeros(len(p), dtype=torch.float64) for p in parameters]
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    parts = small_batches(batches)
    dense: dict[int, Answer] = {}
    done = resume_gates(training, parameters, optimizer, contributions)
    if progress and done:
        progress(done)
    for step in range(done, steps):
        number = step % len(parts)
        images, labels = parts[number]
        if number not in dense:
            with torch.no_grad():
                dense[number] = answer_to(model, images[rank::ranks])
        with watched(model, hooks):
            answer = answer_to(model, images[rank::ranks])
        loss = gate_loss(answer, dense[number], labels, slice(rank, None, ranks)) / len(images)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"fcr_steps={steps}: the loss is {loss.item()} at step {step}. Check the images' scale."
            )
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
        if training:
            state = partial(gate_state, step + 1, parameters, optimizer, contributions)
            training.after(step + 1, state, last=step + 1 == steps)
    return {group.name: total for group, total in zip(groups, contributions, strict=True)}


def gate_state(
    step: int, parameters: list[Tensor], optimizer: torch.optim.Optimizer, contributions: list[Tensor]
) -> dict[str, Any]:
    """Give all that the gates' training goes on from; it draws no random numbers."""
    adam = [dict(optimizer.state[parameter]) for parameter in parameters]
    return {"step": step, "gates": list(parameters), "adam": adam, "contributions": list(contributions)}


def resume_gates(
    training: Training | None,
    parameters: list[Tensor],
    optimizer: torch.optim.Optimizer,
    contributions: list[Tensor],
) -> int:
    """Put a kept state into gates, optimizer and contributions, in place; give the steps done."""
    state = training.load() if training else None
    if state is None:
        return 0
    for number, parameter in enumerate(parameters):
        parameter.data.copy_(state["gates"][number])
        contributions[number].copy_(state["contributions"][number])
        kept = state["adam"][number]
        optimizer.state[parameter] = {key: t if key == "step" else t.to(parameter.device) for key, t in kept.items()}
    return state["step"]


def small_batches(batches: Sequence[Any]) -> list[tuple[Tensor, Any]]:
    """Cut the user's batches into those of one step, evenly: gates are few, and many short steps teach them most."""
    parts = []
    for batch in batches:
        images, labels = split_batch(batch)
        at = 0
        for some in images.chunk(-(-len(images) // STEP_IMAGES)):
            part = slice(at, at + len(some))
            parts.append((some, labels[part] if isinstance(labels, (Tensor, list, tuple)) else labels))
            at += len(some)
    return parts


def make_gates(
    model: nn.Module, groups: Sequence[UnitGroup], keep: dict[str, list[int]], moments: dict[str, Moments]
) -> tuple[dict[str, Tensor], dict[str, Gate]]:
    """Give the gates [U] of each group, nearly closed for its pruning set, and the hook of each consumer."""
    device = device_of(model)
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
        hooks[name] = Gate(model.get_submodule(name), moments.get(name), kept, cut, device)
    for group in groups:
        for tap in group.taps:
            hooks[tap.module].places.append((gates[group.name], tap.index.to(device)))
    return gates, hooks


def answer_to(model: nn.Module, images: Tensor) -> Answer:
    """Run images, wherever they are, and read the answer."""
    return read_answer(model, model(images.to(device_of(model))))


def gate_loss(answer: Answer, dense: Answer, labels: Any, share: slice) -> Tensor:
    """Give the divergence from the dense model, and for a classifier with labels the task's loss too, both summed."""
    loss = answer.divergence(dense)
    if labels is None or not answer.is_logits:
        return loss
    logits = answer.parts[0]
    labels = torch.as_tensor(labels)[share]
    check_labels(labels, logits.shape[1])
    return loss + nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
