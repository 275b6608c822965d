"""The FCR unit: one learned gate per unit at its taps, and what training makes of it.

D input channels of a consumer, K kept and R cut of them; O its outputs; U units of a group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.method.responses import Moments, best_fold, fold_offset
from lfrns_hub.method.taps import channel_count, channels_back, channels_last, kept_channels, watched
from lfrns_hub.model_io.answers import Answer, read_answer
from lfrns_hub.model_io.batches import split_batch
from lfrns_hub.model_io.model import device_of, differentiated, laid_out, same_draw
from lfrns_hub.runs.cache import Training
from lfrns_hub.units import UnitGroup

NEARLY_CLOSED = 0.05
LEARNING_RATE = 0.02
STEP_IMAGES = 64  # at most


# Whose forward pass reads nothing but weight and bias, each by its name: a subclass may read what it likes.
PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class Gate:
    """The FCR unit of one consumer: kept channels times their gate; cut ones between their stand-ins and themselves.

    Gates and stand-ins are linear in the consumer's input, as the consumer is: a plain one takes them into its weights
    at a cost that no image adds to. Any other takes them as a hook on its input.

    Attributes:
        places: The gates [U] of a group and their channels [U, w], of each group read here.
    """

    def __init__(self, consumer: nn.Module, moments: Moments | None, keep: Tensor, leave: Tensor, device: torch.device):
        """Fit the stand-ins of channels `leave` [R] from channels `keep` [K]; without moments nothing stands in."""
        fold = None if moments is None else best_fold(moments, consumer.weight.detach(), keep, leave)
        self.fold = self.offset = None
        if fold is not None:
            self.fold = fold.float().to(device)  # [R, K]
            self.offset = fold_offset(moments, keep, leave, fold).float().to(device) if moments.centred else None
        self.width, self.keep, self.leave = channel_count(consumer), keep.to(device), leave.to(device)
        self.places: list[tuple[Tensor, Tensor]] = []
        self._rows: tuple[Tensor, Tensor] | None = None

    def factors(self) -> Tensor:
        """Give the gate of each channel, [D]."""
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
        """Give the weight, and the bias where it changes, by which a plain consumer gates its input itself."""
        if self._rows is None:  # laid out and gathered once, not at every step
            rows = consumer.weight.movedim(1, -1).contiguous()
            self._rows = rows, rows[..., self.leave]
        (rows, cut_rows), gate = self._rows, self.factors().to(consumer.weight)  # [O, ..., D] and [O, ..., R]; [D]
        gated, changed = rows * gate, {}
        if self.fold is not None:
            standing = cut_rows * (1 - gate[self.leave])
            gated = gated.index_add(-1, self.keep, standing @ self.fold.to(rows))
            if self.offset is not None:  # nothing is padded: every position of the kernel sees it
                added = (standing @ self.offset.to(rows)).reshape(len(rows), -1).sum(1)
                changed["bias"] = added if consumer.bias is None else consumer.bias + added
        weight = gated.movedim(-1, 1)
        if consumer.weight.is_contiguous():  # its outputs lie as its weights do, and a forward may view them
            weight = weight.contiguous()
        return changed | {"weight": weight}


def is_plain(consumer: nn.Module) -> bool:
    """Whether a consumer's output is a function of its input, weight and bias alone, with all channels mixed."""
    stock = type(consumer).forward in PLAIN_FORWARDS and "forward" not in vars(consumer)
    return stock and consumer._parameters.get("weight") is not None and getattr(consumer, "groups", 1) == 1


@contextmanager
def gated(model: nn.Module, hooks: dict[str, Gate]) -> Iterator[None]:
    """Run a model with its consumers gated; a backward pass inside may run parts of the forward again.

    Of a weight that two layers share only this one's reading is gated.
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
    """Run images through a model whose consumers are gated, and read the answer; the model stays as it is."""
    with gated(model, hooks):
        return answer_to(model, images)


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
    run = GateTraining(model, groups, keep, batches, moments, accelerator)
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
        done: Steps taken.
        contributions: What each group's units have gained so far, [U], float64.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        keep: dict[str, list[int]],
        batches: Sequence[Any],
        moments: dict[str, Moments],
        accelerator: Any = None,
    ):
        self.model, self.accelerator, self.done = model, accelerator, 0
        gates, self.hooks = make_gates(model, groups, keep, moments)
        self.gates = list(gates.values())
        self.contributions = [torch.zeros(len(gate), dtype=torch.float64) for gate in self.gates]
        self._optimizer = torch.optim.Adam(self.gates, lr=LEARNING_RATE)
        self._parts = small_batches(batches)
        self._dense: dict[int, Answer] = {}

    def step(self) -> None:
        """Move every gate once.

        Raises:
            FloatingPointError: The loss is not finite.
            ValueError: A label is no class of the model.
        """
        rank, ranks = (self.accelerator.process_index, self.accelerator.num_processes) if self.accelerator else (0, 1)
        number = self.done % len(self._parts)
        images, labels = self._parts[number]
        share = slice(rank, None, ranks)
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
                if not loss.requires_grad:  # all of them lie behind outputs that are not compared: auxiliary heads
                    return [torch.zeros_like(gate) for gate in self.gates]
                # Zero where the forward lets no gradient through, as by rounding.
                return list(torch.autograd.grad(loss, self.gates, materialize_grads=True))

        gradients = differentiated(gradients_of_gates)
        if ranks > 1:
            gradients = [self.accelerator.reduce(gradient, "sum") for gradient in gradients]
        before = [gate.detach().clone() for gate in self.gates]
        for gate, gradient in zip(self.gates, gradients, strict=True):
            gate.grad = gradient
        self._optimizer.step()
        for total, gate, old, gradient in zip(self.contributions, self.gates, before, gradients, strict=True):
            gate.data.clamp_(0, 1)
            total -= (gradient * (gate.detach() - old)).double().cpu()
        self.done += 1

    def state(self) -> dict[str, Any]:
        """Give all that the training goes on from; it draws no random numbers."""
        adam = [dict(self._optimizer.state[gate]) for gate in self.gates]
        return {"step": self.done, "gates": list(self.gates), "adam": adam, "contributions": list(self.contributions)}

    def take(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.done = state["step"]
        for gate, total, value, adam, gained in zip(
            self.gates, self.contributions, state["gates"], state["adam"], state["contributions"], strict=True
        ):
            gate.data.copy_(value)
            total.copy_(gained)
            self._optimizer.state[gate] = {k: t if k == "step" else t.to(gate.device) for k, t in adam.items()}


def small_batches(batches: Sequence[Any]) -> list[tuple[Tensor, Any]]:
    """Cut the user's batches into those of one step, evenly: gates are few, and many short steps teach them most."""
    parts = []
    for batch in batches:
        images, labels = split_batch(batch)
        at = 0
        for some in images.chunk(-(-len(images) // STEP_IMAGES)):
            parts.append((some, _part(labels, slice(at, at + len(some)))))
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
    """Run images, wherever they are, and read the answer."""
    return read_answer(model, model(images.to(device_of(model))))


def gate_loss(answer: Answer, dense: Answer, labels: Any, share: slice) -> Tensor:
    """Return the divergence from the dense model, plus minus the log-likelihood of labels, summed over the images.

    Args:
        answer, dense: Of the gated and the dense model.
        labels: Of the whole batch; None without labels.
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
    """Return the labels of some images; several heads have theirs by name."""
    if isinstance(labels, Mapping):
        return {name: _part(value, part) for name, value in labels.items()}
    return labels[part] if isinstance(labels, (Tensor, list, tuple)) else labels
