"""What the cut changed in a network's predictions, and the peak learning rate that recovers that much."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from lfrns_hub.model_io.answers import Outputs, probe, read_answer, settle_by_loader
from lfrns_hub.model_io.batches import split_batch
from lfrns_hub.model_io.meaning import Classes
from lfrns_hub.model_io.model import as_input, evaluating, laid_out, settle_layout
from lfrns_hub.runs.processes import Processes
from lfrns_hub.runs.progress import Phase
from lfrns_hub.runs.seeded import random_kept, start_random

SEEN = 512  # images, which know a share of a tenth to 1.3 points
# Read off five slim networks with 2 to 34 % of their predictions changed, docs/recovery.md; times the default rate.
LEAST, STEEPNESS, SHARE_AT_TWICE = 0.02, 3, 0.19
MOST = {"sgd": 5.0, "adamw": 1.0}


def rate_after_cut(
    model: nn.Module,
    teacher: nn.Module,
    loader: DataLoader,
    accelerator: Any,
    *,
    default: float,
    rule: str,
    seed: int,
    show: bool,
) -> float | None:
    """Return the peak learning rate that recovers what a cut changed, and tell it; None where no classes are predicted.

    Args:
        model, teacher, loader, accelerator, seed: As for `share_changed`.
        default: Learning rate of the optimizer.
        rule: "sgd" or "adamw".
        show: Whether the rate is shown, on the main process.
    """
    with Phase("changed by the cut", show=show and accelerator.is_main_process) as phase:
        changed = share_changed(model, teacher, loader, accelerator, seed)
        if changed is None:
            return None
        rate = default * rate_for(changed, rule)
        phase.note(f"{changed:.1%}: peak rate {rate:.2g}")
        return rate


def rate_for(changed: float, rule: str) -> float:
    """Return the peak learning rate as a multiple of the optimizer's default; our choice, the paper does not say.

    A rate above what recovers the damage adds damage of its own, and the less there is, the lower it lies.

    Args:
        changed: Share of the predictions that differ from the teacher's, in [0, 1].
        rule: "sgd" or "adamw".

    Example:
        >>> rate_for(0.19, "sgd"), rate_for(0.5, "sgd"), rate_for(0.5, "adamw"), rate_for(0.0, "sgd")
        (2.0, 5.0, 1.0, 0.02)
    """
    return min(MOST[rule], max(LEAST, 2 * (changed / SHARE_AT_TWICE) ** STEEPNESS))


def share_changed(
    model: nn.Module, teacher: nn.Module, loader: DataLoader, accelerator: Any, seed: int
) -> float | None:
    """Return the share of predicted classes, over all heads, that differ from the teacher's on 512 training images.

    The images come from all over the dataset, of a stream from its beginning, augmented as in training. Random numbers
    are as before at the end, and the loader is not touched.

    Args:
        model, teacher: The models; their modes and devices are restored.
        loader: Loader of the training images.
        accelerator: Of the run; every process looks, and takes the main one's answer.
        seed: Seed of the augmentation.
    Returns:
        A share in [0, 1]; None where the model predicts no classes.
    """

    def look() -> float | None:
        outputs: Outputs | None = None
        changed, images_seen = [], 0
        with random_kept(), evaluating(model, teacher, device=accelerator.device), torch.no_grad():
            start_random(seed, -1)
            for images, labels in _batches(loader):
                if outputs is None:
                    settle_layout(images, model, teacher)
                    first = probe(model, laid_out(as_input(images, model), model))
                    outputs = settle_by_loader([model, teacher], first, labels, loader, "retrain")
                answers = (
                    read_answer(one, one(laid_out(as_input(images, one), one)), outputs) for one in (model, teacher)
                )
                for (_, meaning, got), (_, _, target) in zip(*(answer.heads for answer in answers), strict=True):
                    if isinstance(meaning, Classes):
                        changed.append((got.argmax(1) != target.argmax(1)).cpu())
                images_seen += len(images)
                if images_seen >= SEEN:
                    break
        return float(torch.cat(changed).double().mean()) if changed else None

    return Processes(accelerator).gather(look())[0]


def _batches(loader: DataLoader) -> Iterator[tuple[torch.Tensor, Any]]:
    """Yield batches of the training images, loaded by this process alone."""
    data, size = loader.dataset, loader.batch_size or 32
    if loader.batch_sampler is None:  # the dataset itself makes batches
        size = None
    if not isinstance(data, IterableDataset):
        places = torch.linspace(0, len(data) - 1, min(SEEN, len(data))).long().tolist()
        data = Subset(data, places)
    return map(split_batch, DataLoader(data, size, collate_fn=loader.collate_fn))
