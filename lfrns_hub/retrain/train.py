"""Retrain a slim model (or train a dense one): the options, checked and prepared for the run."""

import contextlib
import copy
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lfrns_hub.method.provenance import provenance_of
from lfrns_hub.model_io.model import laid_out_models
from lfrns_hub.retrain.choices import fill_defaults, make_optimizer, rate_at, ready_accelerator
from lfrns_hub.retrain.cuda_graph import refuse_capture
from lfrns_hub.retrain.damage import rate_after_cut
from lfrns_hub.retrain.loss import mixed_loss
from lfrns_hub.retrain.run import Epochs, Run
from lfrns_hub.runs.cache import digest
from lfrns_hub.runs.checkpoints import Checkpoints, describe_model
from lfrns_hub.units import SlimPlan

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    feature_weight: float = 0.0,
    gradient_accumulation_steps: int | None = None,
    mixed_precision: str | None = None,
    compile: Literal["auto", False] = "auto",
    accelerator: "Accelerator | None" = None,
    seed: int = 0,
    progress: bool = True,
    tracker: Callable[[dict[str, float], int], None] | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_every: int = 500,
) -> nn.Module:
    """Train a model in place, from its labels, from a teacher, or from both.

    The meaning of the outputs, and so the loss, is determined as for `slim`: cross-entropy for classes, binary
    cross-entropy for multi-label classes, squared error for quantities; the teacher's share alike, also for features.

    Args:
        model: Trained in place; at the end it is on the accelerator's device, in its original training mode and memory
            format. Convolutional networks are trained in channels_last.
        loader: A plain DataLoader with the batch size of one process; prepared here.
        epochs: Passes over the loader; 0 changes nothing.
        images_per_epoch: For a loader without a length (a stream): images per epoch over all processes. A process whose
            share has fewer starts it again.
        teacher: The dense model. With it, labels are optional.
        eval_loader: Evaluated after every epoch, only for the log: the weights of the last epoch are returned.
        optimizer: "sgd" has Nesterov momentum 0.9; "auto" chooses "sgd" for networks with BatchNorm and without
            attention or LayerNorm, "adamw" for all others.
        learning_rate: Peak, reached after the warm-up. Default without a teacher: 0.01 (sgd) or 1e-4 (adamw). With a
            teacher it follows what the cut changed, measured on 512 training images: of classes up to 0.05 (sgd) or
            1e-4 (adamw) where a quarter and more of the predictions changed, down to a fiftieth of the default where
            hardly any did (docs/recovery.md).
        weight_decay: For matrices and kernels, not for norms, biases and tokens. Default 5e-4 (sgd) or 0.05 (adamw).
        max_grad_norm: Gradients are clipped to this norm; math.inf never clips. Default inf (sgd) or 1.0 (adamw).
        warmup_fraction: Share of the steps in which the rate rises, in [0, 1); then it falls as a cosine.
        label_smoothing: In [0, 1): classes are smoothed towards uniform, multi-label classes towards 1/2; quantities
            are not smoothed.
        distill_weight: Share of the teacher in the loss, in [0, 1]; 1 where there are no labels.
        temperature: Softens both models' logits in the teacher's share, for classes and multi-label classes.
        feature_weight: Weight of the feature loss: the squared error of the last feature map over the square of the
            teacher's, at the channels that the model kept; the benchmarks use 100. Above 0 the teacher must be the
            dense model from which `slim` made the model. With sgd, layers without a norm may need less, because a
            squared error is not bounded.
        gradient_accumulation_steps: Batches per step. Default: the accelerator's, else 1.
        mixed_precision: "no", "fp16" or "bf16", for the accelerator built here. Default: as `make_accelerator`.
        compile: "auto" records a step as one CUDA graph where possible: on one GPU, one batch a step, in float32 or
            bf16; batches of another shape, and models that draw random numbers on the CPU, run plain steps. The weights
            are the same within rounding. False records nothing.
        accelerator: Default `make_accelerator`. Objects that it prepared earlier are released at the end.
        seed: The same seed gives the same weights on CPU.
        progress: Show a bar on the main process.
        tracker: Called on the main process with (values, step), like `Accelerator.log`.
        checkpoint_dir: A folder for this run only, visible to all processes. The same call, repeated after the program
            ended for any reason, resumes there and ends with the same weights on CPU; after the last step it does not
            train again. Augmentation is reproduced if it draws from python's, numpy's or torch's own random numbers.
            SIGTERM then finishes the step, saves and ends the program with exit code 0. Another model, plan, teacher,
            length, batch or setting is refused; the content of the images is not compared. None: nothing is written.
        checkpoint_every: Steps between two checkpoints; one more follows every epoch. The last two are kept.
    Returns:
        The same model.
    Raises:
        ValueError: A value is out of range, the loader is empty, labels are missing or do not fit the outputs, the
            teacher's outputs have another meaning, features cannot be compared, or the checkpoint belongs to another
            run.
        FloatingPointError: The loss or a weight is no longer finite; the message names the last good checkpoint.
        OSError: A checkpoint cannot be written or read; the earlier one is still there.

    Example:
        >>> images = torch.utils.data.TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 10)
        >>> loader = torch.utils.data.DataLoader(images, 16, shuffle=True)
        >>> model = timm.create_model("cifar_resnet20")
        >>> lfrns.retrain(model, loader, epochs=1, progress=False) is model
        True

    Source: Fang and Yin 2025 retrain without a teacher; the teacher's share is Hinton et al. 2015, section 2, that of
        its features after Romero et al. 2015; no regressor is needed, because a slim model keeps some of the channels.
    """
    _check_loader(loader, images_per_epoch)
    _check_arguments(
        model, epochs, teacher, warmup_fraction, label_smoothing, distill_weight, temperature, feature_weight
    )
    if compile not in ("auto", False):
        raise ValueError(f'retrain(compile={compile!r}): it must be "auto" or False. The default is "auto".')
    if checkpoint_every < 1:
        raise ValueError(
            f"retrain(checkpoint_every={checkpoint_every}): it must be 1 or more steps. For epochs' ends "
            "alone pass a number above the steps of one."
        )
    given_rate = learning_rate
    rule, learning_rate, weight_decay, max_grad_norm = fill_defaults(
        model, optimizer, learning_rate, weight_decay, max_grad_norm
    )
    plan = _plan_of(model)
    if feature_weight and (teacher is None or plan is None):
        lacking = (
            "there is no teacher" if teacher is None else "the model notes no plan of what was kept of the teacher"
        )
        raise ValueError(
            f"retrain(feature_weight={feature_weight:g}): {lacking}. Retrain what `slim` made, with the dense model as "
            "teacher, or pass feature_weight=0."
        )
    if epochs == 0:
        return model
    from accelerate.utils import DistributedType, set_seed

    accelerator = ready_accelerator(accelerator, gradient_accumulation_steps, mixed_precision, seed)
    no_graph = "compile=False" if compile is False else refuse_capture(accelerator)
    set_seed(seed, device_specific=True)
    with laid_out_models(model, teacher), _as_before(model, accelerator):
        data = Epochs(loader, accelerator, seed, images_per_epoch)
        eval_loader = eval_loader if eval_loader is None else accelerator.prepare_data_loader(eval_loader)
        # FSDP2 shards a model's weights in place: a copy is trained, and the caller's model gets its weights after each
        # epoch.
        whole = model.to(accelerator.device)
        followed = None
        if given_rate is None and teacher is not None:
            followed = rate_after_cut(
                whole, teacher, loader, accelerator, default=learning_rate, rule=rule, seed=seed, show=progress
            )
            learning_rate = followed or learning_rate
        model = copy.deepcopy(whole) if accelerator.distributed_type == DistributedType.FSDP else whole
        plain_optimizer = make_optimizer(model, rule, learning_rate, weight_decay)
        steps = epochs * math.ceil(data.batches / accelerator.gradient_accumulation_steps)
        # Not prepared: a prepared scheduler steps once per process.
        scheduler = LambdaLR(plain_optimizer, lambda step: rate_at(step, steps, warmup_fraction))
        settings = {
            "model": describe_model(model),
            "epochs": epochs,
            "images": data.images,
            "batches of an epoch": data.batches,
            "batch_size": data.batch_size,
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "teacher": None if teacher is None else digest(teacher),
            "plan": digest(provenance_of(whole).get("plan")),
            "optimizer": rule,
            # On a GPU the share may differ in the last digit when a run goes on; the checkpoint has the rate itself.
            "learning_rate": "by what the cut changed" if followed else learning_rate,
            "weight_decay": weight_decay,
            "max_grad_norm": str(max_grad_norm),
            "warmup_fraction": warmup_fraction,
            "label_smoothing": label_smoothing,
            "distill_weight": distill_weight,
            "temperature": temperature,
            "feature_weight": feature_weight,
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
                mixed_loss, label_smoothing=label_smoothing, distill_weight=distill_weight, temperature=temperature
            )
            run = Run(
                accelerator, data, whole, model, trained, teacher, prepared_optimizer, scheduler, mix,
                feature_weight, plan, steps, learning_rate, max_grad_norm, checkpoints,
                tracker, eval_loader, progress, no_graph,
            )  # fmt: skip
            run.train(epochs)
        finally:
            accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
            accelerator.free_memory()
    return whole


def _plan_of(model: nn.Module) -> SlimPlan | None:
    """Return the plan in a model's provenance; None where there is none or, in a file, no valid one."""
    noted = provenance_of(model).get("plan")
    try:
        return SlimPlan.from_json(json.dumps({"keep": noted})) if noted else None
    except (TypeError, ValueError):
        return None


@contextlib.contextmanager
def _as_before(model: nn.Module, accelerator: "Accelerator") -> Iterator[None]:
    """Restore a model's modes and an accelerator's accumulation settings at the end.

    Under mixed precision Accelerate leaves the model's own `forward` in its `__dict__`, which a copy or a narrower
    model would carry along; it is removed if it was not there before.
    """
    modes = [(module, module.training) for module in model.modules()]
    own_forward = "forward" in vars(model)
    kept = accelerator.gradient_state.plugin_kwargs
    synced = accelerator.gradient_state.sync_with_dataloader
    try:
        yield
    finally:
        kept["sync_with_dataloader"] = synced
        if not own_forward:
            vars(model).pop("forward", None)
        for module, training in modes:
            module.training = training


def _check_loader(loader: Any, images_per_epoch: int | None) -> None:
    """Refuse a loader without images, or with epochs of unknown length."""
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
    feature_weight: float,
) -> None:
    """Refuse values out of range before anything is changed."""
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
    if not 0 <= feature_weight < math.inf:
        raise ValueError(
            f"retrain(feature_weight={feature_weight}): it must be 0 or more, and finite. 0 leaves features out."
        )
