"""Does memory grow in a long run? Resident memory over 2,000 steps of retraining and of the FCR gates.

    python benchmarks/memory.py [STEPS]

Printed for each: resident memory after a quarter of the steps and at the end, and the slope of a line through what lies
between, in KiB a step. The first quarter is left out: allocators, caches and thread pools fill up there.
"""

import sys
import tempfile
from typing import Any

import numpy as np
import psutil
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

import lfrns_hub as lfrns
from lfrns_hub.method.fcr import learn_contributions

IMAGES, BATCH, CHECKPOINT_EVERY = 512, 16, 100


def make_model() -> torch.nn.Module:
    """Return a small network, and the same weights each time."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10).eval()


def make_loader() -> DataLoader:
    """Return pictures of noise with labels."""
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.randn(IMAGES, 3, 32, 32, generator=draw), torch.arange(IMAGES) % 10
    return DataLoader(TensorDataset(images, labels), BATCH, shuffle=True)


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    return psutil.Process().memory_info().rss / 2**20


def watch_retraining(steps: int, folder: str | None) -> list[float]:
    """Return the resident memory after each step of retraining with a teacher, with checkpoints or without."""
    seen: list[float] = []
    lfrns.retrain(
        make_model(),
        make_loader(),
        teacher=make_model(),
        epochs=-(-steps * BATCH // IMAGES),
        progress=False,
        tracker=lambda *_: seen.append(resident()),
        checkpoint_dir=folder,
        checkpoint_every=CHECKPOINT_EVERY,
    )
    return seen[:steps]


def watch_gates(steps: int) -> list[float]:
    """Return the resident memory after each step of the FCR gates."""
    seen: list[float] = []

    def learn(model: torch.nn.Module, groups: Any, keep: Any, batches: Any, moments: Any) -> dict[str, torch.Tensor]:
        options = {"steps": steps, "progress": lambda _: seen.append(resident())}
        return learn_contributions(model, groups, keep, batches, moments, **options)

    lfrns.slim(make_model(), make_loader(), macs=0.5, contribution=learn, progress=False)
    return seen


def main() -> None:
    """Watch all three and print."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    table = Table("what", "steps", "after a quarter, MiB", "at the end, MiB", "slope, KiB a step")
    with tempfile.TemporaryDirectory() as folder:
        for name, seen in (
            ("retrain", watch_retraining(steps, None)),
            (f"retrain, a checkpoint every {CHECKPOINT_EVERY} steps", watch_retraining(steps, folder)),
            ("FCR gates", watch_gates(steps)),
        ):
            late = seen[len(seen) // 4 :]
            slope = np.polyfit(np.arange(len(late)), late, 1)[0] * 1024
            table.add_row(name, str(len(seen)), f"{late[0]:.1f}", f"{late[-1]:.1f}", f"{slope:+.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
