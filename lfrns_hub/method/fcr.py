"""The FCR unit: the training of the gates, and the contribution of each unit that it gives.

D input channels of a consumer, K kept and R cut of them; O its outputs; U units of a group.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.method.gates import answer_to, gated, make_gates
from lfrns_hub.method.pruning_set import merge_costs
from lfrns_hub.method.redundancy import Merges
from lfrns_hub.method.responses import Moments
from lfrns_hub.model_io.answers import Answer
from lfrns_hub.model_io.batches import Batches, split_batch
from lfrns_hub.model_io.model import differentiated, laid_out, same_draw
from lfrns_hub.runs.cache import Cache, Training
from lfrns_hub.runs.processes import ALONE, Processes
from lfrns_hub.units import UnitGroup

LEARNING_RATE = 0.02
STEP_IMAGES = 64  # at most


def learn_contributions(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    keep: dict[str, list[int]],
    batches: Sequence[Any],
    moments: dict[str, Moments],
    *,
    steps: int,
    processes: Processes = ALONE,
    progress: Callable[[int], None] | None = None,
    training: Training | None = None,
) -> dict[str, Tensor]:
    """Train the gates and return each unit's contribution.

    The network's weights are frozen. Gates of the pruning set start nearly closed with their stand-ins folded in, so a
    gate learns what its unit still adds when others stand in for it. The contribution is the decrease of the loss due
    to a gate's own moves, the sum over steps of -gradient x move: in units of the loss, comparable across groups, and
    large only for a gate that learned to open.

    Args:
        model: The dense network in eval mode, weights not requiring gradients.
        groups: The groups that are cut.
        keep: The representatives of each group; the other units are its pruning set.
        batches: Batches of the user's loader, cycled.
        moments: Responses per consumer; {} where nothing will be folded, so that there are no stand-ins.
        steps: Number of gate updates.
        processes: Each runs its share of every batch; gradients are averaged.
        progress: Called with 1 after each step.
        training: Storage of the training state, from which it resumes.
    Returns:
        Contribution of each unit, [U], float64, per group.
    Raises:
        FloatingPointError: The loss is not finite.
        ValueError: A label is not a class of the model.
    Source: Fang and Yin 2025, the FCR unit; the abstract states what it learns; the gate, its start and how the
        contribution is computed are ours (DESIGN.md section 6).
    """
    run = GateTraining(model, groups, keep, batches, moments, processes)
    state = training.load() if training else None
    if state is not None:
        run.take(state)
    if progress and run.done:
        progress(run.done)
    while run.done < steps:
        try:
            run.step()
        except FloatingPointError as error:
            raise FloatingPointError(f"fcr_steps={steps}: {error}") from None
        if progress:
            progress(1)
        if training:
            training.after(run.done, run.state, last=run.done == steps)
    return {group.name: total for group, total in zip(groups, run.contributions, strict=True)}


class GateTraining:
    """The training of the gates, step by step; its arguments are those of `learn_contributions`.

    Attributes:
        done: Number of steps done.
        contributions: Contribution of each group's units so far, [U], float64.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        keep: dict[str, list[int]],
        batches: Sequence[Any],
        moments: dict[str, Moments],
        processes: Processes = ALONE,
    ):
        self.model, self.processes, self.done = model, processes, 0
        gates, self.hooks = make_gates(model, groups, keep, moments)
        self.gates = list(gates.values())
        self.contributions = [torch.zeros(len(gate), dtype=torch.float64) for gate in self.gates]
        self._optimizer = torch.optim.Adam(self.gates, lr=LEARNING_RATE)
        self._parts = small_batches(batches)
        self._dense: dict[int, Answer] = {}

    def step(self) -> None:
        """Update every gate once.

        Raises:
            FloatingPointError: The loss is not finite.
            ValueError: A label is not a class of the model.
        """
        number = self.done % len(self._parts)
        images, labels = self._parts[number]
        share = self.processes.share
        ours = laid_out(images[share], self.model)
        if number not in self._dense:
            with torch.no_grad(), same_draw(number):
                self._dense[number] = answer_to(self.model, ours)

        def gradients_of_gates() -> list[Tensor]:
            with gated(self.model, self.hooks):
                with same_draw(number):
                    answer = answer_to(self.model, ours)
                loss = gate_loss(answer, self._dense[number], labels, share) / len(images)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss.item()} at step {self.done}. Check the images' scale.")
                if not loss.requires_grad:  # all gates lie before outputs that are not compared: auxiliary heads
                    return [torch.zeros_like(gate) for gate in self.gates]
                # Zero where no gradient passes through the forward, as after rounding.
                return list(torch.autograd.grad(loss, self.gates, materialize_grads=True))

        gradients = list(map(self.processes.sum, differentiated(gradients_of_gates)))
        before = [gate.detach().clone() for gate in self.gates]
        for gate, gradient in zip(self.gates, gradients, strict=True):
            gate.grad = gradient
        self._optimizer.step()
        for total, gate, old, gradient in zip(self.contributions, self.gates, before, gradients, strict=True):
            gate.data.clamp_(0, 1)
            total -= (gradient * (gate.detach() - old)).double().cpu()
        self.done += 1

    def state(self) -> dict[str, Any]:
        """Return the state from which the training resumes; it draws no random numbers."""
        adam = [dict(self._optimizer.state[gate]) for gate in self.gates]
        return {"step": self.done, "gates": list(self.gates), "adam": adam, "contributions": list(self.contributions)}

    def take(self, state: dict[str, Any]) -> None:
        """Resume from a state that `state` returned."""
        self.done = state["step"]
        for gate, total, value, adam, gained in zip(
            self.gates, self.contributions, state["gates"], state["adam"], state["contributions"], strict=True
        ):
            gate.data.copy_(value)
            total.copy_(gained)
            self._optimizer.state[gate] = {k: t if k == "step" else t.to(gate.device) for k, t in adam.items()}


def small_batches(batches: Sequence[Any]) -> list[tuple[Tensor, Any]]:
    """Split the user's batches evenly into those of one step: gates are few and learn most from many small steps."""
    parts = []
    for batch in batches:
        images, labels = split_batch(batch)
        at = 0
        for some in images.chunk(-(-len(images) // STEP_IMAGES)):
            parts.append((some, _part(labels, slice(at, at + len(some)))))
            at += len(some)
    return parts


def gate_loss(answer: Answer, dense: Answer, labels: Any, share: slice) -> Tensor:
    """Return the divergence from the dense model minus the log-likelihood of the labels, summed over the images.

    Args:
        answer, dense: Answers of the gated and the dense model.
        labels: Labels of the whole batch; None without labels.
        share: The images that were run.
    """
    loss = answer.divergence(dense)
    if labels is None or answer.outputs.are_features:
        return loss
    images = len(answer.parts[0])
    read = answer.outputs.read_labels(_part(labels, share), images, "slim(loader)")
    for name, meaning, part in answer.heads:
        if read[name] is not None:
            loss = loss + meaning.surprise(part, read[name])
    return loss


def _part(labels: Any, part: slice) -> Any:
    """Return the labels of some images; with several heads, by name."""
    if isinstance(labels, Mapping):
        return {name: _part(value, part) for name, value in labels.items()}
    return labels[part] if isinstance(labels, (Tensor, list, tuple)) else labels


def contribute(
    contribution: Any,
    dense: nn.Module,
    chosen: Sequence[UnitGroup],
    keep: dict[str, list[int]],
    batches: Batches,
    moments: dict[str, Moments],
    merges: dict[str, Merges],
    steps: int,
    fold: bool,
    processes: Processes,
    advance: Callable[[int], None],
    cache: Cache,
) -> dict[str, Tensor]:
    """Return the contribution of each unit, by FCR, by a function, or by the cost of merging it."""
    if callable(contribution):
        return contribution(dense, chosen, keep, batches, moments)
    if contribution == "cost" or steps == 0:
        return merge_costs(chosen, merges)
    standing = moments if fold else {}
    with cache.training("gates", keep, [labels for _, labels in batches], steps, fold) as training:
        return learn_contributions(
            dense, chosen, keep, batches, standing, steps=steps, processes=processes, progress=advance,
            training=training,
        )  # fmt: skip
