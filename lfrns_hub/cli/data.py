"""The images and the accelerator of a command, from its options."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_cli.options import Images, Machine
from lfrns_hub.analysis import Analysis
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.zoo import ImageData, check_images, guard_against_chance, load_data, make_transform

LOGS = "logs"  # folder of the logs in an output folder


def start_accelerator(
    machine: Machine, seed: int = 0, *, log_with: str | None = None, directory: Path | None = None
) -> Any:
    """Build the Accelerate accelerator that a command runs on.

    Args:
        machine: Where the command runs.
        seed: Of the order of the images.
        log_with: The tracker that logs its training, if one does.
        directory: Its output folder, which gets the logs.
    Raises:
        ValueError: The device is not there, or cannot train in the numbers asked for.
    """
    here = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if machine.device not in ("auto", "cpu", here):
        raise ValueError(f"--device {machine.device}: this machine has {here}. Leave it out for that.")
    options: dict[str, Any] = {"cpu": True} if machine.device == "cpu" else {}
    if log_with:
        from lfrns_hub.retrain.trackers import tracking  # imported here: accelerate is slow

        options |= tracking(log_with, directory / LOGS)
    return make_accelerator(seed=seed, mixed_precision=machine.mixed_precision, **options)


def shuffled(images: ImageData, batch_size: int, workers: int, accelerator: Any) -> DataLoader:
    """Return the training batches of one process: `batch_size` is that of all processes together."""
    share = max(1, batch_size // accelerator.num_processes)
    return DataLoader(images, share, shuffle=True, num_workers=workers)


def load_images(
    images: Images,
    model: nn.Module,
    split: str,
    *,
    augment: bool = False,
    flip: bool = True,
    limit: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Load a split, prepared as a model wants its images and labelled as it numbers its classes."""
    transform = make_transform(model, train=augment, flip=flip)
    return load_data(images.data, split, transform=transform, model=model, limit=limit, seed=seed, **reading_of(images))


def reading_of(images: Images) -> dict[str, Any]:
    """Return the options of `load_data` by which a command's data are read."""
    return {name: value for name, value in vars(images).items() if value is not None and name != "data"}


def analyse_images(
    dense: nn.Module,
    images: Images,
    *,
    limit: int,
    batch_size: int,
    seed: int,
    workers: int = 0,
    untrained: bool = False,
    **options: Any,
) -> tuple[DataLoader, Analysis]:
    """Analyse a model on some of its training images, if they fit it and it does better than chance on them.

    Args:
        dense: The model.
        images: The data of the command.
        limit: Number of training images, drawn with the seed.
        batch_size: Images a batch.
        seed: Of the draw and of the analysis.
        workers: Processes that read images.
        untrained: The weights are random: where the model answers at chance, that is named as the cause.
        options: For `lfrns_hub.analyse`.
    Returns:
        The calibration batches and the analysis.
    Raises:
        ValueError: The images do not fit the model, it answers at chance, or as `lfrns_hub.analyse`.
    """
    loader = DataLoader(load_images(images, dense, "train", limit=limit, seed=seed), batch_size, num_workers=workers)
    check_images(dense, loader)
    guard_against_chance(dense, loader, images.data, untrained=untrained)
    return loader, lfrns.analyse(dense, loader, seed=seed, **options)
