"""Defaults of `retrain`: the accelerator and its precision, the optimizer, the learning rate of each step."""

import math
import os
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator

# Learning rate, weight decay, gradient norm limit. For models that are nearly right already, as slim models are:
# a tenth of the rates for training from scratch (He et al. 2016: 0.1; Dosovitskiy et al. 2021, table 3: 1e-3).
_DEFAULTS = {"sgd": (1e-2, 5e-4, math.inf), "adamw": (1e-4, 5e-2, 1.0)}


def make_accelerator(*, seed: int = 0, **kwargs: Any) -> "Accelerator":
    """Build the Accelerator of a run: on the GPU if there is one, with an image order that depends only on the seed.

    Args:
        seed: Seed of the order of the images, the same on every process.
        kwargs: Arguments of Accelerate: mixed_precision, gradient_accumulation_steps, log_with, project_dir, ...
            Without mixed_precision it is bf16 where the processor supports it and it is faster; the setting of
            `accelerate launch`, or of an accelerator built earlier in this program, has priority.
    Raises:
        ValueError: float16 is requested on a CPU, which does not support loss scaling.

    Example:
        >>> make_accelerator(seed=1).num_processes
        1
    """
    from accelerate import Accelerator  # a quarter of the import time of the rest of this package
    from accelerate.state import is_initialized
    from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs

    kwargs.setdefault("cpu", not torch.accelerator.is_available())
    asked = kwargs.get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if kwargs["cpu"] and asked == "fp16":
        raise ValueError(
            'mixed_precision="fp16": training in float16 needs a GPU, and this run is on the CPU. Pass "no" or "bf16".'
        )
    decided = is_initialized() or "ACCELERATE_MIXED_PRECISION" in os.environ  # by an earlier accelerator, or a launcher
    if kwargs.get("mixed_precision") is None and not decided:
        kwargs["mixed_precision"] = _best_precision(kwargs["cpu"])
    # Not dispatched: each process reads its own files of a stream, instead of one process reading for all.
    shared_out = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed, dispatch_batches=False)
    kwargs.setdefault("dataloader_config", shared_out)
    # Some models own parameters that a forward pass skips (DINOv2's mask token); plain DDP stops at the second step.
    kwargs.setdefault("kwargs_handlers", [DistributedDataParallelKwargs(find_unused_parameters=True)])
    return Accelerator(**kwargs)


def _best_precision(cpu: bool) -> str:
    """Return "bf16" where the processor multiplies it faster than float32, else "no"."""
    if cpu:
        # AVX512-bf16 alone is not faster: without AMX, steps of ResNets were slower than in float32.
        return "bf16" if torch.cpu._is_amx_tile_supported() else "no"
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def ready_accelerator(
    accelerator: "Accelerator | None", gradient_accumulation_steps: int | None, mixed_precision: str | None, seed: int
) -> "Accelerator":
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


def fill_defaults(
    model: nn.Module,
    optimizer: str,
    learning_rate: float | None,
    weight_decay: float | None,
    max_grad_norm: float | None,
) -> tuple[str, float, float, float]:
    """Return the optimizer's name, learning rate, weight decay and gradient norm limit, with defaults for None."""
    rule = choose_optimizer(model) if optimizer == "auto" else optimizer
    if rule not in _DEFAULTS:
        raise ValueError(f'retrain(optimizer="{optimizer}"): it must be "auto", "sgd" or "adamw".')
    given = (learning_rate, weight_decay, max_grad_norm)
    figures = [default if value is None else value for value, default in zip(given, _DEFAULTS[rule], strict=True)]
    for name, value in zip(("learning_rate", "weight_decay", "max_grad_norm"), figures, strict=True):
        if not (value > 0 or (value == 0 and name == "weight_decay")):
            raise ValueError(f"retrain({name}={value}): it must be above 0. None takes the default of {rule}.")
    return rule, *figures


def choose_optimizer(model: nn.Module) -> str:
    """Return "sgd" for BatchNorm networks without attention or LayerNorm, else "adamw"."""
    kinds = {type(module).__name__.lower() for module in model.modules()}
    normalised = any("batchnorm" in kind for kind in kinds)
    transforming = any("layernorm" in kind or "attention" in kind for kind in kinds)
    return "sgd" if normalised and not transforming else "adamw"


def make_optimizer(model: nn.Module, rule: str, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build the optimizer; norms, biases and parameters in the model's no_weight_decay (tokens) do not decay."""
    patterns = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    spared = {name for name, value in named if value.ndim <= 1 or any(fnmatchcase(name, one) for one in patterns)}
    groups = [
        {"params": [value for name, value in named if name not in spared]},
        {"params": [value for name, value in named if name in spared], "weight_decay": 0.0},
    ]
    fused = all(value.device.type in ("cpu", "cuda", "xpu") and value.is_floating_point() for _, value in named)
    if rule == "sgd":
        options: dict[str, Any] = {"momentum": 0.9, "nesterov": True}
        return torch.optim.SGD(groups, lr=learning_rate, weight_decay=weight_decay, fused=fused, **options)
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def rate_at(step: int, steps: int, warmup_fraction: float) -> float:
    """Return the fraction of the peak rate at a step: a linear rise, then half a cosine down, never quite zero."""
    warmup = int(steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
