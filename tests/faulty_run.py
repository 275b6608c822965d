"""Small runs for the tests that stop them; a module, as the processes that run them import it."""

import os
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset

from lfrns_hub.retrain import make_accelerator, retrain

EPOCHS, IMAGES, BATCH = 3, 30, 4
STEPS = EPOCHS * 8  # the last batch of an epoch has two images


class Pictures(Dataset):
    """Images whose augmentation draws from python's, numpy's and torch's random numbers."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.full((3, 6, 6), index / IMAGES)
        image = image + 0.3 * torch.randn(3, 6, 6) + random.random() + float(np.random.rand())
        return image, index % 3


def mix(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Mix each image with another one, at random."""
    images = torch.stack([image for image, _ in samples])
    share = 0.1 * random.random()
    images = (1 - share) * images + share * images[torch.randperm(len(images))]
    return images, torch.tensor([label for _, label in samples])


def make_model(width: int = 8) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(width * 16, 3),
    )  # fmt: skip


def train(
    checkpoint_dir: Path | None,
    *,
    workers: int = 0,
    width: int = 8,
    batch_size: int = BATCH,
    tracker: Callable | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Train, and give the weights."""
    options = {"epochs": EPOCHS, "learning_rate": 0.02, "checkpoint_every": 3, **options}
    if workers:
        options["accelerator"] = make_accelerator(gradient_accumulation_steps=2)
    loader = DataLoader(
        Pictures(), batch_size, shuffle=True, collate_fn=mix, num_workers=workers, persistent_workers=workers > 0
    )
    model = make_model(width)
    retrain(
        model, loader, eval_loader=DataLoader(Pictures(), 16), checkpoint_dir=checkpoint_dir, tracker=tracker,
        progress=False, **options,
    )  # fmt: skip
    return {name: value.clone() for name, value in model.state_dict().items()}


def run_recipe(recipe: str, arguments: list[str], steps_file: str) -> None:
    """Run a recipe as the command line does; each step of an optimizer adds a byte to a file."""
    file = os.open(steps_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    register_optimizer_step_post_hook(lambda *_: os.write(file, b"."))
    sys.argv = [recipe, *arguments]
    runpy.run_path(recipe, run_name="__main__")
