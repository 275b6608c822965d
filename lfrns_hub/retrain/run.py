"""The run itself: epochs and steps under Accelerate, saved, scored, and stopped before non-finite weights are saved."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lfrns_hub.measure import evaluate, evaluating, main_figures
from lfrns_hub.model_io.answers import Answer, Outputs, read_answer, settle_by_loader
from lfrns_hub.model_io.batches import split_batch
from lfrns_hub.model_io.model import laid_out, settle_layout
from lfrns_hub.retrain.cuda_graph import CapturedSteps, Labels
from lfrns_hub.retrain.features import Features, watch_features
from lfrns_hub.retrain.late_losses import Losses
from lfrns_hub.retrain.loss import ask_teacher
from lfrns_hub.runs.checkpoints import Checkpoints, Position, caught_sigterm
from lfrns_hub.runs.processes import Processes
from lfrns_hub.runs.progress import Phase
from lfrns_hub.runs.seeded import apart, random_kept, rounds, seeded_loader
from lfrns_hub.units import SlimPlan

if TYPE_CHECKING:
    from accelerate import Accelerator


class Epochs:
    """The batches of a run, the same at the same positions of the same epochs, however often it is restarted.

    Attributes:
        given: The caller's loader.
        images, batches: Of an epoch: number of images over all processes, number of batches of this one.
        batch_size: Batch size of one process.
        order_seed: Seed of the order.
    """

    def __init__(self, loader: DataLoader, accelerator: "Accelerator", seed: int, images_per_epoch: int | None):
        self.given = loader
        self._accelerator, self._seed, self._streamed = accelerator, seed, images_per_epoch is not None
        self.images = images_per_epoch or len(loader.dataset)
        given = accelerator.dataloader_config.data_seed
        self.order_seed = seed if given is None else given
        on_gpu = accelerator.device.type == "cuda" and not accelerator.dataloader_config.dispatch_batches
        loader = seeded_loader(loader, seed, self.order_seed, pinned=on_gpu)
        self.batch_size = getattr(loader.batch_sampler, "batch_size", None)
        self._order = loader.batch_sampler
        # On a GPU each step moves its batch itself, after it has checked the labels: nothing waits for the device.
        self._loader = accelerator.prepare_data_loader(loader, device_placement=False if on_gpu else None)
        if self._streamed:
            step_images = self.batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
            self.batches = accelerator.gradient_accumulation_steps * math.ceil(self.images / step_images)
            accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False  # the shares end at other times
        else:
            self.batches = len(self._loader)

    def open(self, at: Position) -> Iterator[tuple[Tensor, Any]]:
        """Return the remaining batches of an epoch."""
        self._loader.set_epoch(at.epoch)
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(at.epoch)
        if self._streamed:
            left = rounds(self._loader, self.batches, at.batch)
        else:
            left = self._accelerator.skip_first_batches(self._loader, at.batch) if at.batch else self._loader
        return map(split_batch, apart(left, self._seed, at.epoch))

    def ended(self, at: Position) -> bool:
        """Return whether the last returned batch is the last of its epoch."""
        return at.batch == self.batches if self._streamed else self._accelerator.gradient_state.end_of_dataloader


@dataclass
class Run:
    """A run of `retrain`: `train` runs its epochs, and each of them its steps."""

    accelerator: "Accelerator"
    data: Epochs
    whole: nn.Module  # as passed by the caller
    model: nn.Module  # the same, or its sharded copy
    trained: nn.Module  # as prepared
    teacher: nn.Module | None
    optimizer: Any
    scheduler: LambdaLR
    mix: Callable[[Answer, dict[str, Tensor | None], Answer | None], Tensor]
    feature_weight: float
    plan: SlimPlan | None  # plan of the model, required by feature distillation
    steps: int
    learning_rate: float
    max_grad_norm: float
    checkpoints: Checkpoints | None
    tracker: Callable[[dict[str, float], int], None] | None
    eval_loader: Any
    progress: bool
    no_graph: str | None = "it is not asked for"  # why no step is recorded as a graph; None where it can be
    _next: int = 1  # next step
    _rate: float = 0.0
    _settled: bool = False
    _features: Features | None = None
    _outputs: Outputs | None = None

    def __post_init__(self) -> None:
        self._processes = Processes(self.accelerator)
        self._losses = Losses(self.accelerator.device)
        self._steps = CapturedSteps(self._learn, self.optimizer, self.no_graph)

    def train(self, epochs: int) -> None:
        """Run the remaining epochs."""
        at = self.checkpoints.load(self.scheduler) if self.checkpoints else Position()
        if at.step:
            self._gather_weights()
        show = self.progress and self._processes.is_main
        listening = caught_sigterm() if self.checkpoints else contextlib.nullcontext()
        teaching = evaluating(self.teacher, device=self.accelerator.device)
        phase = Phase("retrain" if self.plan else "train", self.steps, done=at.step, show=show)
        with phase, teaching, contextlib.closing(self), listening as told:
            for epoch in range(at.epoch, epochs):
                self.trained.train()
                for images, labels in self.data.open(at):
                    self.step(images, labels, at)
                    at.batch += 1
                    if not self.accelerator.sync_gradients:
                        continue
                    at.step += 1
                    if not self.accelerator.optimizer_step_was_skipped:
                        self.scheduler.step()
                    phase.advance()
                    self._tell(phase, epoch)
                    if self.checkpoints and not self.data.ended(at):
                        self.keep(at, told, phase)
                self._tell(phase, epoch, wait=True)
                self._gather_weights()
                _average_buffers(self.whole, self.accelerator)
                self.check_weights(self.whole, at)
                at = Position(at.step, epoch + 1)
                if self.checkpoints:
                    self.keep(at, told, phase, epoch_ended=True)
                if self.eval_loader is not None:
                    self.score(at, phase, epochs)

    def step(self, images: Tensor, labels: Any, at: Position) -> None:
        """Train on one batch, and record its loss and learning rate."""
        rate = self.scheduler.get_last_lr()[0]
        with self.accelerator.accumulate(self.trained):
            read = self._outputs.read_labels(labels, len(images), "retrain(loader)") if self._outputs else None
            images = images.to(self.accelerator.device, non_blocking=True)
            if not self._settled:
                settle_layout(images, self.model, self.teacher)
                self._settled = True
            images = laid_out(images, self.model)
            self._watch(images)
            self._next, self._rate = at.step + 1, rate
            if read is None:  # the first batch determines the meaning of the outputs
                loss = self._learn(images, labels)
            else:
                read = {name: v if v is None else v.to(images.device, non_blocking=True) for name, v in read.items()}
                loss = self._steps.step(images, read, rate)
            if self.accelerator.sync_gradients:
                self._losses.note(loss, at.step + 1, rate)

    def _learn(self, images: Tensor, labels: Labels | Any) -> Tensor:
        """Run one step and return the loss; labels are given by head, or at the first batch as loaded."""
        with self.accelerator.autocast():
            output = self.trained(images)
            if self._outputs is None:
                self._outputs = self._meaning(output, labels)
                labels = self._outputs.read_labels(labels, len(images), "retrain(loader)")
            answer = read_answer(self.model, output, self._outputs, every_feature=True)
            taught = ask_teacher(self.teacher, images, self._outputs)
        loss = self.mix(answer, labels, taught)
        if self._features:
            loss = loss + self.feature_weight * self._features.loss()
        if not self._losses.late:
            self._check_loss(loss.item(), self._next, self._rate)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients and math.isfinite(self.max_grad_norm):
            self.accelerator.clip_grad_norm_(self.trained.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _meaning(self, output: Any, labels: Any) -> Outputs:
        """Return the meaning of the outputs: the same after a resume, and on every process."""
        models = [self.whole, *filter(None, [self.teacher])]
        with random_kept():
            outputs = settle_by_loader(models, output, labels, self.data.given, "retrain", self._processes)
        if outputs.are_features and self.eval_loader is not None:
            raise ValueError(
                "retrain(eval_loader): the model answers with features, which no label scores. Leave it out, and "
                "pass the dense model to measure(model, loader, dense=dense)."
            )
        return outputs

    def _watch(self, images: Tensor) -> None:
        """Find the feature map for distillation, on the first images."""
        if not self.feature_weight or self._features:
            return
        with random_kept():
            self._features = watch_features(self.model, self.teacher, self.plan, images)
        if self._features is None:
            raise ValueError(
                f"retrain(feature_weight={self.feature_weight:g}): the model and the teacher have no feature map that "
                "the model's plan makes comparable. Teach with the dense model that it was cut from, or pass "
                "feature_weight=0."
            )
        if hasattr(self.trained, "_orig_mod"):
            torch.compiler.reset()  # code compiled for this class earlier ignores hooks

    def close(self) -> None:
        """Remove the hooks and release the recorded graph."""
        self._steps.close()
        if self._features:
            self._features.close()

    def keep(self, at: Position, told: Any, phase: Phase, *, epoch_ended: bool = False) -> None:
        """Write a checkpoint if one is due, and end the program after SIGTERM."""
        stopping = not epoch_ended and self._processes.any(told.is_set())
        if epoch_ended or stopping or self.checkpoints.due(at):
            if not epoch_ended:
                self._tell(phase, at.epoch, wait=True)
                self.check_weights(self.model, at)
            self.checkpoints.save(at, self.scheduler)
        if stopping or (epoch_ended and self._processes.any(told.is_set())):
            self.checkpoints.stop(at, self.steps)

    def score(self, at: Position, phase: Phase, epochs: int) -> None:
        """Evaluate for the log; the next epoch does not depend on whether this has run."""
        with random_kept():
            scores = evaluate(self.whole, self.eval_loader, accelerator=self.accelerator, progress=self.progress)
        figures = main_figures(scores)
        words = [f"{head} {f.label} {value:{f.form}}".strip() for head, f, value in figures]
        phase.say(f"epoch {at.epoch} of {epochs}: {', '.join(words)}; {scores['images']} images")
        values = {"_".join(filter(None, ["eval", head, f.key])): value for head, f, value in figures}
        values |= {"eval_loss": scores["loss"]} if "loss" in scores else {}
        self._track(values, at.step)

    def check_weights(self, model: nn.Module, at: Position) -> None:
        """Stop if a step has produced a weight that is not finite, before it is saved or returned."""
        weights = dict(model.named_parameters())
        finite = {name: weight.detach().isfinite().all() for name, weight in weights.items()}
        if finite and not all(torch.stack(list(finite.values())).tolist()):  # a single wait for the device
            name = next(name for name, value in finite.items() if not value)
            self._stop(f"weight {name} is not finite", at.step, self._rate)

    def _tell(self, phase: Phase, epoch: int, *, wait: bool = False) -> None:
        """Show the losses that have arrived, and pass them to the tracker; with `wait` those of all steps so far."""
        for loss in self._losses.read(wait=wait):
            self._check_loss(loss.value, loss.step, loss.rate)
            phase.note(f"epoch {epoch + 1}, loss {loss.value:.3f}")
            self._track({"loss": loss.value, "learning_rate": loss.rate}, loss.step)

    def _track(self, values: dict[str, float], step: int) -> None:
        """Pass metrics to the tracker on the main process."""
        if self.tracker is not None and self._processes.is_main:
            self.tracker(values, step)

    def _check_loss(self, value: float, step: int, rate: float) -> None:
        """Stop at a loss that is not finite, before it spoils later steps."""
        if not math.isfinite(value):
            self._stop(f"loss is {value}", step, rate)

    def _stop(self, what: str, step: int, rate: float) -> None:
        """Raise an error about a non-finite loss or weight that names the checkpoint to resume from."""
        last = self.checkpoints.last() if self.checkpoints else None
        raise FloatingPointError(
            f"retrain(learning_rate={self.learning_rate:g}): the {what} at step {step} of {self.steps}, rate "
            f"{rate:.3g}. Try learning_rate={self.learning_rate / 10:g}, and look for images whose values are not "
            "finite." + (f" The last good checkpoint is {last}." if last else "")
        )

    def _gather_weights(self) -> None:
        """Copy the weights of a sharded model to the caller's model."""
        if self.model is not self.whole:
            _take_weights(self.whole, self.trained)


def _take_weights(whole: nn.Module, trained: nn.Module) -> None:
    """Copy the full weights of a sharded model, on every process, into a plain model, in place."""
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in trained.state_dict().items()}
    whole.load_state_dict(state)


def _average_buffers(model: nn.Module, accelerator: "Accelerator") -> None:
    """Set BatchNorm statistics to their mean over all processes, each of which computed its own."""
    if accelerator.num_processes > 1:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(accelerator.reduce(module.running_mean, reduction="mean"))
                module.running_var.copy_(accelerator.reduce(module.running_var, reduction="mean"))
