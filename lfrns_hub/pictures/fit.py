"""Checks that model and data fit: the shape of images, the number of classes, an accuracy above chance."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.format.untrusted import short
from lfrns_hub.model_io.batches import UNREADABLE, check_finite, iterate, read_logits, split_batch
from lfrns_hub.model_io.meaning import Classes, said_meaning
from lfrns_hub.pictures.model_input import input_size_of, num_classes_of

GUARD_IMAGES = 2000


def check_images(model: nn.Module, loader: Any) -> None:
    """Refuse images that a model cannot run, before any work is done on them.

    Args:
        model: Dense model; one image is run where the size differs from the model's own.
        loader: Its first batch is checked.
    Raises:
        ValueError: There are more classes in the data than the model has, no batch, no image tensor, another number of
            channels, values that are not finite, or a size that the model refuses.
    """
    first = next(iter(loader), None)
    if first is None:
        raise ValueError("check_images(loader): the loader is empty. Give it at least one batch.")
    images, _ = split_batch(first)
    classes, names = num_classes_of(model), getattr(getattr(loader, "dataset", None), "class_names", None) or []
    if 0 < classes < len(names) and not (classes == 1 and len(names) == 2):  # one logit is a yes or no
        raise ValueError(
            f"{type(model).__name__} answers {classes} classes, the data has {len(names)} ({short(', '.join(names))}): "
            "the head does not fit the data. Fine-tune it first (lfrns train; of a recipe --dense-epochs)."
        )
    channels, height, width = input_size_of(model)
    wanted = f"{type(model).__name__} takes [N, {channels}, {height}, {width}]"
    way_out = "Make them with make_transform(model, train=False)."
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {list(images.shape)}: {wanted} of float32. {way_out}")
    check_finite(images, "check_images(loader)")
    if images.shape[1] != channels:
        raise ValueError(f"images are {list(images.shape)}, {images.shape[1]} channels: {wanted}. {way_out}")
    if tuple(images.shape[2:]) != (height, width):
        try:
            _answer(model, images[:1])
        except Exception as error:  # each architecture raises its own error
            raise ValueError(f"images are {list(images.shape)}: {wanted}. {way_out}") from error


def guard_against_chance(
    model: nn.Module, loader: Any, where: str | os.PathLike[str], *, untrained: bool = False
) -> float | None:
    """Refuse a model with an accuracy near chance on the data: its units would be ranked by noise.

    Args:
        model: Dense model.
        loader: Loader of labelled images; at most 2,000 are run.
        where: The data, for the message.
        untrained: The weights are random, as none were given and none are published: the message says so.
    Returns:
        Top-1 in percent; None where there are no class numbers, or the outputs have another meaning.
    Raises:
        ValueError: Labels beyond the head, or top-1 at most 1.5 times chance (with few classes: a tenth above it).
    """
    classes, hits, total = num_classes_of(model), 0, 0
    said = said_meaning(model)
    if classes == 1 or not isinstance(said, Classes | None):
        return None
    for images, labels in iterate(loader):
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            return None
        if int(labels.max()) >= classes:
            raise ValueError(
                f"{type(model).__name__} answers {classes} classes, {where} holds label {int(labels.max())}: "
                "the head does not fit the data. Fine-tune it first (lfrns train; of a recipe --dense-epochs)."
            )
        hits += int((_answer(model, images).argmax(1).cpu() == labels.cpu()).sum())
        total += int((labels != UNREADABLE).sum())
        if total >= GUARD_IMAGES:
            break
    if not total:
        raise ValueError(f"guard_against_chance({str(where)!r}): the loader is empty. Give it at least one batch.")
    top1_pct, chance_pct = 100 * hits / total, 100 / max(classes, 1)
    if classes > 1 and top1_pct <= min(1.5 * chance_pct, chance_pct + 0.1 * (100 - chance_pct)):
        cause = (
            "class order or preprocessing differs. Mend it (lfrns: --class-map and --mean to --interpolation), or "
            "fine-tune the dense model first (lfrns train; of a recipe --dense-epochs)."
            if not untrained
            else "its weights are random, for none are published under this name. Give trained ones: --weights FILE."
        )
        raise ValueError(
            f"{type(model).__name__} scores {top1_pct:.1f} % on {where}, chance {chance_pct:.1f} % ({total} images): "
            f"{cause}"
        )
    return top1_pct


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    """Run a model in eval mode on images, and restore its mode."""
    like = next(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return read_logits(model(images.to(device=like.device, dtype=like.dtype)))
    finally:
        for module, mode in modes:
            module.training = mode
