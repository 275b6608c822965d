"""Retrain a slim model (or train a dense one): an Accelerate loop with warm-up, cosine and distillation."""

import contextlib
import copy
import math
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
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
from lfrns_hub.seeded import apart, random_kept, rounds, seeded_loader

# Learning rate, weight decay, gradient norm limit. For models that are nearly right already, as slim ones are:
# a tenth of what training from scratch takes (He et al. 2016: 0.1; Dosovitskiy et al. 2021, table 3: 1e-3).
_DEFAULTS = {"sgd": (1e-2, 5e-4, math.inf), "adamw": (1e-4, 5e-2, 1.0)}


def make_accelerator(*, seed: int = 0, **kwargs: Any) -> Accelerator:
    """Build the Accelerator of a run: on the GPU if there is one, image order set by the seed alone.

    Args:
        seed: Sets the order of the images on every process.
        kwargs: What Accelerator takes: mixed_precision, gradient_accumulation_steps, log_with, project_dir, ...
    Example:
        >>> make_accelerator(seed=1).num_processes
        1
    """
    kwargs.setdefault("cpu", not torch.accelerator.is_available())
    # Not dispatched: of a stream each process reads files of its own, not one process all of them for the others.
    shared_out = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed, dispatch_batches=False)
    kwargs.setdefault("dataloader_config", shared_out)
    # Some models own parameters that a forward pass skips (DINOv2's mask token); plain DDP stops at the second step.
    kwargs.setdefault("kwargs_handlers", [DistributedDataParallelKwargs(find_unused_parameters=True)])
    return Accelerator(**kwargs)


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
        model: Trained in place; it ends on the accelerator's device, in the training mode in which it came.
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
        mixed_precision: "no", "fp16" or "bf16", for the accelerator built here.
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

    modes = [(module, module.training) for module in model.modules()]
    synced = accelerator.gradient_state.sync_with_dataloader
    images = images_per_epoch or len(loader.dataset)
    data_seed = accelerator.dataloader_config.data_seed
    loader = seeded_loader(loader, seed, seed if data_seed is None else data_seed)
    batch_size = getattr(loader.batch_sampler, "batch_size", None)
    order, loader = loader.batch_sampler, accelerator.prepare_data_loader(loader)
    eval_loader = eval_loader if eval_loader is None else accelerator.prepare_data_loader(eval_loader)
    if images_per_epoch:
        step_images = batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
        batches = accelerator.gradient_accumulation_steps * math.ceil(images / step_images)
        accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False  # the shares end at different times
    else:
        batches = len(loader)
    # FSDP2 cuts a model's weights up where they are: a copy is trained, and what came in takes its weights each epoch.
    sharded = accelerator.distributed_type == DistributedType.FSDP
    whole, model = model, copy.deepcopy(model) if sharded else model
    whole.to(accelerator.device)
    plain_optimizer = _make_optimizer(model, rule, learning_rate, weight_decay)
    steps = epochs * math.ceil(batches / accelerator.gradient_accumulation_steps)
    # Not prepared: a prepared scheduler steps once per process.
    scheduler = LambdaLR(plain_optimizer, lambda step: _rate(step, steps, warmup_fraction))
    run = {
        "model": describe_model(model),
        "epochs": epochs,
        "images": images,
        "batches of an epoch": batches,
        "batch_size": batch_size,
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
        "data_seed": data_seed,
    }
    trained, prepared_optimizer = accelerator.prepare(model, plain_optimizer)
    try:
        checkpoints, at = None, Position()
        if checkpoint_dir is not None:
            checkpoints = Checkpoints(checkpoint_dir, accelerator, run, checkpoint_every)
            at = checkpoints.load(scheduler)
            if sharded and at.step:
                _take_weights(whole, trained)
        show = progress and accelerator.is_main_process
        bar = tqdm(total=steps, initial=at.step, desc="retrain", mininterval=0.5, disable=not show)
        listening = caught_sigterm() if checkpoints else contextlib.nullcontext()
        with evaluating(teacher, device=accelerator.device), bar, listening as told:
            for epoch in range(at.epoch, epochs):
                loader.set_epoch(epoch)
                if hasattr(order, "set_epoch"):
                    order.set_epoch(epoch)
                trained.train()
                if images_per_epoch:
                    left = rounds(loader, batches, at.batch)
                else:
                    left = accelerator.skip_first_batches(loader, at.batch) if at.batch else loader
                for images, labels in map(split_batch, apart(left, seed, epoch)):
                    with accelerator.accumulate(trained):
                        with accelerator.autocast():
                            logits = read_logits(trained(images)).float()
                            soft_targets = _ask(teacher, images)
                        loss = _loss(logits, labels, soft_targets, label_smoothing, distill_weight, temperature)
                        rate = scheduler.get_last_lr()[0]
                        where = f"step {at.step + 1} of {steps}, rate {rate:.3g}"
                        _check_finite(f"loss is {loss.item()}", loss, learning_rate, where, checkpoints)
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(trained.parameters(), max_grad_norm)
                        prepared_optimizer.step()
                        prepared_optimizer.zero_grad()
                    at.batch += 1
                    if not accelerator.sync_gradients:
                        continue
                    at.step += 1
                    if not accelerator.optimizer_step_was_skipped:
                        scheduler.step()
                    bar.update()
                    bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}", lr=f"{rate:.2e}", refresh=False)
                    _track(tracker, accelerator, {"loss": loss.item(), "learning_rate": rate}, at.step)
                    ended = at.batch == batches if images_per_epoch else accelerator.gradient_state.end_of_dataloader
                    if checkpoints and not ended:
                        stopping = told_anywhere(told, accelerator)
                        if stopping or checkpoints.due(at):
                            _check_weights(model, learning_rate, where, checkpoints)
                            checkpoints.save(at, scheduler)
                        if stopping:
                            checkpoints.stop(at, steps)
                if sharded:
                    _take_weights(whole, trained)
                _average_buffers(whole, accelerator)
                _check_weights(whole, learning_rate, where, checkpoints)
                at = Position(at.step, epoch + 1)
                if checkpoints:
                    checkpoints.save(at, scheduler)
                    if told_anywhere(told, accelerator):
                        checkpoints.stop(at, steps)
                if eval_loader is not None:
                    with random_kept():  # the next epoch is the same, whether this has run or not
                        scores = evaluate(whole, eval_loader, accelerator=accelerator, progress=progress)
                    if not bar.disable:
                        top1 = f"top-1 {scores['top1_pct']:.2f} % of {scores['images']} images"
                        bar.write(f"epoch {epoch + 1} of {epochs}: {top1}")
                    values = {"eval_top1_pct": scores["top1_pct"], "eval_loss": scores["loss"]}
                    _track(tracker, accelerator, values, at.step)
    finally:
        accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
        accelerator.free_memory()
        accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = synced
        for module, training in modes:
            module.training = training
    return whole


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
    if rule == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, weight_decay=weight_decay, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)


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


def _check_finite(
    what: str, value: Tensor, learning_rate: float, where: str, checkpoints: Checkpoints | None = None
) -> None:
    """Stop before a loss or weights that are not finite spoil the rest; say where to go on from."""
    if bool(value.isfinite().all()):
        return
    last = checkpoints.last() if checkpoints else None
    raise FloatingPointError(
        f"retrain(learning_rate={learning_rate:g}): the {what} at {where}. Try "
        f"learning_rate={learning_rate / 10:g}, and look for images whose values are not finite."
        + (f" The last good checkpoint is {last}." if last else "")
    )


def _check_weights(model: nn.Module, learning_rate: float, where: str, checkpoints: Checkpoints | None) -> None:
    """Stop where a step has left a weight that is not finite, before it is saved or given back."""
    for name, weight in model.named_parameters():
        _check_finite(f"weight {name} is not finite", weight.detach(), learning_rate, where, checkpoints)


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
