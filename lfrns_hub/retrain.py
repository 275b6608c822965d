"""Retrain a slim model (or train a dense one): an Accelerate loop with warm-up, cosine and distillation."""

import contextlib
import copy
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, DistributedType, set_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from lfrns_hub.batches import read_logits, split_batch
from lfrns_hub.cache import digest
from lfrns_hub.measure import check_labels, evaluate, evaluating
from lfrns_hub.resume import Checkpoints, Position, caught_sigterm, describe_model, told_anywhere
from lfrns_hub.running import laid_out, laid_out_models
from lfrns_hub.seeded import apart, random_kept, rounds, seeded_loader

# Learning rate, weight decay, gradient norm limit. For models that are nearly right already, as slim ones are:
# a tenth of what training from scratch takes (He et al. 2016: 0.1; Dosovitskiy et al. 2021, table 3: 1e-3).
_DEFAULTS = {"sgd": (1e-2, 5e-4, math.inf), "adamw": (1e-4, 5e-2, 1.0)}


def make_accelerator(*, seed: int = 0, **kwargs: Any) -> Accelerator:
    """Build the Accelerator of a run: on the GPU if there is one, image order set by the seed alone.

    Args:
        seed: Sets the order of the images on every process.
        kwargs: What Accelerator takes: mixed_precision, gradient_accumulation_steps, log_with, project_dir, ...
            Without mixed_precision it is bf16 where the processor has it and it pays; the setting of
            `accelerate launch`, or of an accelerator built earlier in this program, goes before.
    Example:
        >>> make_accelerator(seed=1).num_processes
        1
    """
    kwargs.setdefault("cpu", not torch.accelerator.is_available())
    decided = is_initialized() or "ACCELERATE_MIXED_PRECISION" in os.environ  # by an accelerator before, or a launcher
    if kwargs.get("mixed_precision") is None and not decided:
        kwargs["mixed_precision"] = _best_precision(kwargs["cpu"])
    # Not dispatched: of a stream each process reads files of its own, not one process all of them for the others.
    shared_out = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed, dispatch_batches=False)
    kwargs.setdefault("dataloader_config", shared_out)
    # Some models own parameters that a forward pass skips (DINOv2's mask token); plain DDP stops at the second step.
    kwargs.setdefault("kwargs_handlers", [DistributedDataParallelKwargs(find_unused_parameters=True)])
    return Accelerator(**kwargs)


def _best_precision(cpu: bool) -> str:
    """Give "bf16" where the processor multiplies it faster than float32, else "no"."""
    if cpu:
        # AVX512-bf16 alone does not pay: without AMX, steps of ResNets were slower than in float32.
        return "bf16" if torch.cpu._is_amx_tile_supported() else "no"
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def retrain(
    model: nn.Module,
    loader: DataLoader,
    *,
    epochs: int = 3,
    images_per_epoch: int | None = None,
    teacher: nn.Module | None = None,
    eval_loader: DataLoader | None = None,
    optimizer: Literal["auto", "sgd", "adamw"] = "auto",
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    max_grad_norm: float | None = None,
    warmup_fraction: float = 0.1,
    label_smoothing: float = 0.0,
    distill_weight: float = 0.9,
    temperature: float = 4.0,
    gradient_accumulation_steps: int | None = None,
    mixed_precision: str | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    progress: bool = True,
    tracker: Callable[[dict[str, float], int], None] | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_every: int = 500,
) -> nn.Module:
    """Train a model in place, from its labels, from a teacher, or from both.

    Args:
        model: Trained in place; it ends on the accelerator's device, in the training mode and the memory format in
            which it came. Convolutional networks are trained in channels_last.
        loader: A plain DataLoader with the batch size of one process; prepared here.
        epochs: Passes over the loader; 0 changes nothing.
        images_per_epoch: Of a loader without a length, a stream, over all processes. A process whose share has fewer
            begins it anew.
        teacher: The dense model. With it the images may come without labels.
        eval_loader: Scored after every epoch, for the reader only: the last epoch is what is returned.
        optimizer: "sgd" has Nesterov momentum 0.9; "auto" takes "sgd" for networks with BatchNorm and without
            attention or LayerNorm, "adamw" for all others.
        learning_rate: Peak, reached after the warm-up. Default 0.01 (sgd) or 1e-4 (adamw).
        weight_decay: On matrices and kernels, not on norms, biases and tokens. Default 5e-4 (sgd) or 0.05 (adamw).
        max_grad_norm: Gradients are clipped to it; math.inf never clips. Default inf (sgd) or 1.0 (adamw).
        warmup_fraction: Share of the steps in which the rate rises, in [0, 1); then it falls as a cosine.
        label_smoothing: In [0, 1).
        distill_weight: Share of the teacher in the loss, in [0, 1]; 1 where there are no labels.
        temperature: Softens both sides' logits for the teacher's share.
        gradient_accumulation_steps: Batches per step. Default: the accelerator's, else 1.
        mixed_precision: "no", "fp16" or "bf16", for the accelerator built here. Default: as `make_accelerator`.
        accelerator: Default `make_accelerator`. What it has prepared before is released at the end.
        seed: With the same one, the same weights on CPU.
        progress: Show a bar on the main process.
        tracker: Called on the main process with (values, step), as `Accelerator.log` takes them.
        checkpoint_dir: A folder for this run alone, seen by all processes. The same call, made again after the
            program ended anyhow, goes on there and ends with the same weights on CPU; after the last step it trains
            no more. Augmentation is had again where it draws from python's, numpy's or torch's own random numbers.
            SIGTERM then finishes the step, saves and ends the program with exit code 0. Another model, plan, teacher,
            length, batch or setting is refused; what the images show is not compared. None: nothing is written.
        checkpoint_every: Steps between two checkpoints; one more follows every epoch. The last two are kept.
    Returns:
        The model that came in.
    Raises:
        ValueError: A value is out of its range, the loader is empty, labels are missing or are no class of the model,
            or the checkpoint is of another run.
        FloatingPointError: The loss or a weight is no longer finite; the message names the last good checkpoint.
        OSError: A checkpoint cannot be written or read; what was there before is there still.
    Source: Fang and Yin 2025 retrain plainly; the teacher's share is Hinton et al. 2015, section 2.
    """
    _check_loader(loader, images_per_epoch)
    _check_arguments(model, epochs, teacher, warmup_fraction, label_smoothing, distill_weight, temperature)
    if checkpoint_every < 1:
        raise ValueError(
            f"retrain(checkpoint_every={checkpoint_every}): it must be 1 or more steps. For epochs' ends "
            "alone pass a number above the steps of one."
        )
    rule, learning_rate, weight_decay, max_grad_norm = _fill_defaults(
        model, optimizer, learning_rate, weight_decay, max_grad_norm
    )
    if epochs == 0:
        return model
    accelerator = _ready_accelerator(accelerator, gradient_accumulation_steps, mixed_precision, seed)
    set_seed(seed, device_specific=True)
    with laid_out_models(model, teacher), _as_before(model, accelerator):
        data = _Epochs(loader, accelerator, seed, images_per_epoch)
        eval_loader = eval_loader if eval_loader is None else accelerator.prepare_data_loader(eval_loader)
        # FSDP2 cuts a model's weights up where they are: a copy is trained, and what came in takes its weights each
        # epoch.
        whole = model.to(accelerator.device)
        model = copy.deepcopy(whole) if accelerator.distributed_type == DistributedType.FSDP else whole
        plain_optimizer = _make_optimizer(model, rule, learning_rate, weight_decay)
        steps = epochs * math.ceil(data.batches / accelerator.gradient_accumulation_steps)
        # Not prepared: a prepared scheduler steps once per process.
        scheduler = LambdaLR(plain_optimizer, lambda step: _rate(step, steps, warmup_fraction))
        settings = {
            "model": describe_model(model),
            "epochs": epochs,
            "images": data.images,
            "batches of an epoch": data.batches,
            "batch_size": data.batch_size,
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "teacher": None if teacher is None else digest(teacher),
            "plan": digest((getattr(whole, "lfrns_provenance", None) or {}).get("plan")),
            "optimizer": rule,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "max_grad_norm": str(max_grad_norm),
            "warmup_fraction": warmup_fraction,
            "label_smoothing": label_smoothing,
            "distill_weight": distill_weight,
            "temperature": temperature,
            "mixed_precision": accelerator.mixed_precision,
            "seed": seed,
            "data_seed": data.order_seed,
        }
        trained, prepared_optimizer = accelerator.prepare(model, plain_optimizer)
        try:
            checkpoints = None
            if checkpoint_dir is not None:
                checkpoints = Checkpoints(checkpoint_dir, accelerator, settings, checkpoint_every)
            mix = functools.partial(
                _loss, label_smoothing=label_smoothing, distill_weight=distill_weight, temperature=temperature
            )
            run = _Run(
                accelerator, data, whole, model, trained, teacher, prepared_optimizer, scheduler, mix, steps,
                learning_rate, max_grad_norm, checkpoints, tracker, eval_loader, progress,
            )  # fmt: skip
            run.train(epochs)
        finally:
            accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
            accelerator.free_memory()
    return whole


@contextlib.contextmanager
def _as_before(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Put a model's modes and an accelerator's way of accumulating back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    kept = accelerator.gradient_state.plugin_kwargs
    synced = accelerator.gradient_state.sync_with_dataloader
    try:
        yield
    finally:
        kept["sync_with_dataloader"] = synced
        for module, training in modes:
            module.training = training


class _Epochs:
    """The batches of a run, the same ones at the same places of the same epochs however often it is begun.

    Attributes:
        images, batches: Of an epoch: images over all processes, batches of this one.
        batch_size: Of one process.
        order_seed: Of the order.
    """

    def __init__(self, loader: DataLoader, accelerator: Accelerator, seed: int, images_per_epoch: int | None):
        self._accelerator, self._seed, self._streamed = accelerator, seed, images_per_epoch is not None
        self.images = images_per_epoch or len(loader.dataset)
        given = accelerator.dataloader_config.data_seed
        self.order_seed = seed if given is None else given
        loader = seeded_loader(loader, seed, self.order_seed)
        self.batch_size = getattr(loader.batch_sampler, "batch_size", None)
        self._order, self._loader = loader.batch_sampler, accelerator.prepare_data_loader(loader)
        if self._streamed:
            step_images = self.batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
            self.batches = accelerator.gradient_accumulation_steps * math.ceil(self.images / step_images)
            accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False  # the shares end at other times
        else:
            self.batches = len(self._loader)

    def open(self, at: Position) -> Iterator[tuple[Tensor, Any]]:
        """Give the batches that are left of an epoch."""
        self._loader.set_epoch(at.epoch)
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(at.epoch)
        if self._streamed:
            left = rounds(self._loader, self.batches, at.batch)
        else:
            left = self._accelerator.skip_first_batches(self._loader, at.batch) if at.batch else self._loader
        return map(split_batch, apart(left, self._seed, at.epoch))

    def ended(self, at: Position) -> bool:
        """Say whether the batch that was given last is the last one of its epoch."""
        return at.batch == self.batches if self._streamed else self._accelerator.gradient_state.end_of_dataloader


@dataclass
class _Run:
    """A run of `retrain`: `train` takes its epochs, and each of them its steps."""

    accelerator: Accelerator
    data: _Epochs
    whole: nn.Module  # what came in
    model: nn.Module  # the same, or its copy in shards
    trained: nn.Module  # as prepared
    teacher: nn.Module | None
    optimizer: Any
    scheduler: LambdaLR
    mix: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    steps: int
    learning_rate: float
    max_grad_norm: float
    checkpoints: Checkpoints | None
    tracker: Callable[[dict[str, float], int], None] | None
    eval_loader: Any
    progress: bool
    _rate: float = 0.0

    def train(self, epochs: int) -> None:
        """Take the epochs that are left."""
        at = self.checkpoints.load(self.scheduler) if self.checkpoints else Position()
        if at.step:
            self._gather_weights()
        show = self.progress and self.accelerator.is_main_process
        listening = caught_sigterm() if self.checkpoints else contextlib.nullcontext()
        bar = tqdm(total=self.steps, initial=at.step, desc="retrain", mininterval=0.5, disable=not show)
        with evaluating(self.teacher, device=self.accelerator.device), bar, listening as told:
            for epoch in range(at.epoch, epochs):
                self.trained.train()
                for images, labels in self.data.open(at):
                    value, rate = self.step(images, labels, at)
                    at.batch += 1
                    if not self.accelerator.sync_gradients:
                        continue
                    at.step += 1
                    if not self.accelerator.optimizer_step_was_skipped:
                        self.scheduler.step()
                    bar.update()
                    bar.set_postfix(epoch=epoch + 1, loss=f"{value:.3f}", lr=f"{rate:.2e}", refresh=False)
                    _track(self.tracker, self.accelerator, {"loss": value, "learning_rate": rate}, at.step)
                    if self.checkpoints and not self.data.ended(at):
                        self.keep(at, told)
                self._gather_weights()
                _average_buffers(self.whole, self.accelerator)
                self.check_weights(self.whole, at)
                at = Position(at.step, epoch + 1)
                if self.checkpoints:
                    self.keep(at, told, epoch_ended=True)
                if self.eval_loader is not None:
                    self.score(at, bar, epochs)

    def step(self, images: Tensor, labels: Any, at: Position) -> tuple[float, float]:
        """Learn from one batch, and give its loss and the rate."""
        with self.accelerator.accumulate(self.trained):
            images = laid_out(images, self.model)
            with self.accelerator.autocast():
                logits = read_logits(self.trained(images)).float()
                soft_targets = _ask(self.teacher, images)
            loss = self.mix(logits, labels, soft_targets)
            rate, value = self.scheduler.get_last_lr()[0], loss.item()
            self._check_finite(f"loss is {value}", math.isfinite(value), at.step + 1, rate)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.trained.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self._rate = rate
        return value, rate

    def keep(self, at: Position, told: Any, *, epoch_ended: bool = False) -> None:
        """Write a checkpoint where one is due, and end the program where SIGTERM has come."""
        stopping = not epoch_ended and told_anywhere(told, self.accelerator)
        if epoch_ended or stopping or self.checkpoints.due(at):
            if not epoch_ended:
                self.check_weights(self.model, at)
            self.checkpoints.save(at, self.scheduler)
        if stopping or (epoch_ended and told_anywhere(told, self.accelerator)):
            self.checkpoints.stop(at, self.steps)

    def score(self, at: Position, bar: tqdm, epochs: int) -> None:
        """Evaluate for the reader; the next epoch is the same, whether this has run or not."""
        with random_kept():
            scores = evaluate(self.whole, self.eval_loader, accelerator=self.accelerator, progress=self.progress)
        if not bar.disable:
            top1 = f"top-1 {scores['top1_pct']:.2f} % of {scores['images']} images"
            bar.write(f"epoch {at.epoch} of {epochs}: {top1}")
        values = {"eval_top1_pct": scores["top1_pct"], "eval_loss": scores["loss"]}
        _track(self.tracker, self.accelerator, values, at.step)

    def check_weights(self, model: nn.Module, at: Position) -> None:
        """Stop where a step has left a weight that is not finite, before it is saved or given back."""
        for name, weight in model.named_parameters():
            finite = bool(weight.detach().isfinite().all())
            self._check_finite(f"weight {name} is not finite", finite, at.step, self._rate)

    def _check_finite(self, what: str, finite: bool, step: int, rate: float) -> None:
        """Stop before a loss or weights that are not finite spoil the rest; say where to go on from."""
        if finite:
            return
        last = self.checkpoints.last() if self.checkpoints else None
        raise FloatingPointError(
            f"retrain(learning_rate={self.learning_rate:g}): the {what} at step {step} of {self.steps}, rate "
            f"{rate:.3g}. Try learning_rate={self.learning_rate / 10:g}, and look for images whose values are not "
            "finite." + (f" The last good checkpoint is {last}." if last else "")
        )

    def _gather_weights(self) -> None:
        """Put the weights of a model in shards together in the one that came in."""
        if self.model is not self.whole:
            _take_weights(self.whole, self.trained)


def _check_loader(loader: Any, images_per_epoch: int | None) -> None:
    """Refuse a loader that has no images, or whose epochs have no length."""
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"retrain(loader={type(loader).__name__}): a torch DataLoader is needed. Wrap the images in one."
        )
    if images_per_epoch is not None and images_per_epoch < 1:
        raise ValueError(f"retrain(images_per_epoch={images_per_epoch}): it must be 1 or more.")
    sized = hasattr(loader.dataset, "__len__")
    if sized and images_per_epoch is not None:
        raise ValueError(
            f"retrain(images_per_epoch={images_per_epoch}): the loader has {len(loader.dataset)} images and epochs of "
            "its own. Leave it out; for fewer images give a torch Subset."
        )
    if not sized and images_per_epoch is None:
        raise ValueError(
            "retrain(loader): the rate schedule needs the length of an epoch. Pass images_per_epoch, or use a dataset "
            "that has a length."
        )
    if sized and len(loader) == 0:
        raise ValueError(
            f"retrain(loader): the loader is empty ({len(loader.dataset)} images, batch_size={loader.batch_size}, "
            f"drop_last={loader.drop_last}). Check the folder and the split, or lower batch_size."
        )


def _check_arguments(
    model: nn.Module,
    epochs: int,
    teacher: nn.Module | None,
    warmup_fraction: float,
    label_smoothing: float,
    distill_weight: float,
    temperature: float,
) -> None:
    """Refuse values out of range before anything is touched."""
    if not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"retrain(epochs={epochs}): epochs must be 0 or more. The default is 3.")
    if teacher is model:
        raise ValueError("retrain(teacher=model): a model cannot teach itself. Pass the dense model, or a deepcopy.")
    for name, value, closed in (
        ("warmup_fraction", warmup_fraction, False),
        ("label_smoothing", label_smoothing, False),
        ("distill_weight", distill_weight, True),
    ):
        if not (0 <= value < 1 or (closed and value == 1)):
            raise ValueError(
                f"retrain({name}={value}): it must lie in [0, 1{']' if closed else ')'}. For 10 % pass 0.1."
            )
    if not temperature > 0:
        raise ValueError(f"retrain(temperature={temperature}): it must be above 0. The default is 4.")


def _fill_defaults(
    model: nn.Module,
    optimizer: str,
    learning_rate: float | None,
    weight_decay: float | None,
    max_grad_norm: float | None,
) -> tuple[str, float, float, float]:
    """Give the optimizer's name and its three figures, defaults where None."""
    rule = _choose_optimizer(model) if optimizer == "auto" else optimizer
    if rule not in _DEFAULTS:
        raise ValueError(f'retrain(optimizer="{optimizer}"): it must be "auto", "sgd" or "adamw".')
    given = (learning_rate, weight_decay, max_grad_norm)
    figures = [default if value is None else value for value, default in zip(given, _DEFAULTS[rule], strict=True)]
    for name, value in zip(("learning_rate", "weight_decay", "max_grad_norm"), figures, strict=True):
        if not (value > 0 or (value == 0 and name == "weight_decay")):
            raise ValueError(f"retrain({name}={value}): it must be above 0. None takes the default of {rule}.")
    return rule, *figures


def _choose_optimizer(model: nn.Module) -> str:
    """Give "sgd" for BatchNorm networks without attention or LayerNorm, else "adamw"."""
    kinds = {type(module).__name__.lower() for module in model.modules()}
    normalised = any("batchnorm" in kind for kind in kinds)
    transforming = any("layernorm" in kind or "attention" in kind for kind in kinds)
    return "sgd" if normalised and not transforming else "adamw"


def _make_optimizer(model: nn.Module, rule: str, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build the optimizer; norms, biases and what the model names in no_weight_decay (tokens) do not decay."""
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    groups = [
        {"params": [value for name, value in named if value.ndim > 1 and name not in spared]},
        {"params": [value for name, value in named if value.ndim <= 1 or name in spared], "weight_decay": 0.0},
    ]
    fused = all(value.device.type in ("cpu", "cuda", "xpu") and value.is_floating_point() for _, value in named)
    if rule == "sgd":
        options: dict[str, Any] = {"momentum": 0.9, "nesterov": True}
        return torch.optim.SGD(groups, lr=learning_rate, weight_decay=weight_decay, fused=fused, **options)
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def _ready_accelerator(
    accelerator: Accelerator | None, gradient_accumulation_steps: int | None, mixed_precision: str | None, seed: int
) -> Accelerator:
    """Build an accelerator, or set a given one as asked."""
    if gradient_accumulation_steps is not None and gradient_accumulation_steps < 1:
        raise ValueError(
            f"retrain(gradient_accumulation_steps={gradient_accumulation_steps}): it must be 1 or more. "
            "The default is 1."
        )
    if accelerator is None:
        accelerator = make_accelerator(seed=seed, mixed_precision=mixed_precision)
    elif mixed_precision not in (None, accelerator.mixed_precision):
        raise ValueError(
            f'retrain(mixed_precision="{mixed_precision}"): the accelerator given has "{accelerator.mixed_precision}". '
            "Set it where the accelerator is built, and leave it out here."
        )
    if gradient_accumulation_steps is not None:
        accelerator.gradient_accumulation_steps = gradient_accumulation_steps
    return accelerator


def _rate(step: int, steps: int, warmup_fraction: float) -> float:
    """Give the share of the peak rate at a step: a line up, then half a cosine down, never quite zero."""
    warmup = int(steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _ask(teacher: nn.Module | None, images: Tensor) -> Tensor | None:
    """Give the teacher's logits [N, classes], without gradient."""
    if teacher is None:
        return None
    with torch.no_grad():
        return read_logits(teacher(images)).float()


def _loss(
    logits: Tensor,
    labels: Tensor | None,
    soft_targets: Tensor | None,
    label_smoothing: float,
    distill_weight: float,
    temperature: float,
) -> Tensor:
    """Mix cross-entropy to the labels with the divergence from the teacher's softened classes."""
    if labels is None and soft_targets is None:
        raise ValueError(
            "retrain(loader, teacher=None) got a batch without labels. Yield (images, labels), or pass the dense model "
            "as teacher."
        )
    if soft_targets is not None and soft_targets.shape != logits.shape:
        raise ValueError(
            f"retrain(teacher): it has {soft_targets.shape[1]} classes, the model has {logits.shape[1]}. Teach with "
            "the model that the slim one came from."
        )
    if labels is not None:
        check_labels(labels, logits.shape[1])
        hard = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if soft_targets is None:
            return hard
    student = F.log_softmax(logits / temperature, dim=1)
    target = F.log_softmax(soft_targets / temperature, dim=1)
    # The gradients of softened logits shrink with the temperature squared.
    soft = temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)
    return soft if labels is None else (1 - distill_weight) * hard + distill_weight * soft


def _take_weights(whole: nn.Module, trained: nn.Module) -> None:
    """Put the weights of a model in shards together, on every process, into a plain one of its shape, in place."""
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in trained.state_dict().items()}
    whole.load_state_dict(state)


def _average_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the mean of their BatchNorm statistics, which each took from its own images."""
    if accelerator.num_processes > 1:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(accelerator.reduce(module.running_mean, reduction="mean"))
                module.running_var.copy_(accelerator.reduce(module.running_var, reduction="mean"))


def _track(tracker: Callable | None, accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """Hand figures to the tracker on the main process."""
    if tracker is not None and accelerator.is_main_process:
        tracker(values, step)
