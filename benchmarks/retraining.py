"""Throughput of `lfrns.retrain` as a user gets it, beside a plain Accelerate loop with per-image PIL augmentation.

    python benchmarks/retraining.py [CASE ...] [--data-dir DIR] [--teacher] [--runs 5] [--steps 20]

Ours is `load_data`, `make_transform`, a DataLoader and `retrain`, all by default. The plain loop is float32 and
contiguous, with SGD (AdamW for transformers) and torchvision's transforms on PIL pictures. Both keep decoded pictures,
in favour of the plain one. They run in turns; each run's first steps and the first turn are not counted.
Without --data-dir the pictures are noise, which changes no time.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as T

import lfrns_hub as lfrns
from lfrns_hub.pictures import Preparation, load_data, make_transform

RESULTS = Path(__file__).parent / "results" / "speed" / "retraining.json"
WARMUP = 3  # steps


@dataclass(frozen=True)
class Case:
    """One model and its batch; pictures of noise are `side` pixels wide and high."""

    model: str
    batch: int
    side: int
    transformer: bool = False


CASES = {
    "cifar_resnet20": Case("cifar_resnet20", 128, 32),
    "resnet50": Case("resnet50", 16, 256),
    "vit_small": Case("vit_small_patch16_224", 16, 256, transformer=True),
    "vit_base": Case("vit_base_patch16_224", 16, 256, transformer=True),
}


def write_noise(folder: Path, side: int, count: int) -> None:
    """Write pictures of noise with ten labels as parquet, encoded as PNG."""
    draw = np.random.default_rng(0)
    pictures = [Pictures.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
    features = Features({"img": Image(), "label": Value("int64")})
    table = {"img": pictures, "label": [number % 10 for number in range(count)]}
    Dataset.from_dict(table, features=features).to_parquet(str(folder / "train-0.parquet"))


def plain_transform(ours: Preparation) -> T.Compose:
    """Return torchvision's transforms on PIL pictures that do what ours do."""
    if max(ours.size) <= 32:
        steps: list[Any] = [T.Resize(ours.size), T.RandomCrop(ours.size, padding=4)]
    else:
        kind = T.InterpolationMode(ours.interpolation)
        steps = [T.RandomResizedCrop(ours.size, scale=(0.35, 1.0), interpolation=kind)]
    return T.Compose([*steps, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(ours.mean, ours.std)])


def train_plainly(model: nn.Module, loader: DataLoader, teacher: nn.Module | None, transformer: bool) -> list[float]:
    """Train as Accelerate's documentation does it; give the time of each step's end."""
    accelerator = Accelerator(mixed_precision="no")
    if transformer:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    ends = []
    for images, labels in loader:
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        if teacher is not None:
            with torch.no_grad():
                target = teacher(images).log_softmax(1)
            loss = loss + nn.functional.kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(time.perf_counter())
    accelerator.free_memory()
    return ends


def train_with_ours(model: nn.Module, loader: DataLoader, teacher: nn.Module | None) -> list[float]:
    """Train by `retrain`; give the time of each step's end."""
    ends: list[float] = []
    track = lambda *_: ends.append(time.perf_counter())  # noqa: E731
    lfrns.retrain(model, loader, epochs=1, teacher=teacher, progress=False, tracker=track)
    return ends


def time_case(case: Case, data_dir: str | None, with_teacher: bool, runs: int, steps: int) -> dict[str, Any]:
    """Time both in turns: images a second of each run, and the ratio of each turn."""
    count = case.batch * (steps + WARMUP)
    with tempfile.TemporaryDirectory() as folder:
        if data_dir is None:
            write_noise(Path(folder), case.side, count)
        torch.manual_seed(0)
        model, teacher = (timm.create_model(case.model, num_classes=10) for _ in range(2))
        teacher = teacher.eval() if with_teacher else None
        ours = make_transform(model, train=True)
        loaders = {}
        for name, transform in (("ours", ours), ("plain", plain_transform(ours))):
            data = load_data(data_dir or folder, "train", transform=transform, limit=count)
            loaders[name] = DataLoader(data, case.batch, shuffle=True, drop_last=True)
        ways: dict[str, Callable[[], list[float]]] = {
            "ours": lambda: train_with_ours(model, loaders["ours"], teacher),
            "plain": lambda: train_plainly(model, loaders["plain"], teacher, case.transformer),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(runs + 1):
            for name, way in ways.items():
                AcceleratorState._reset_state(True)  # each begins as in a program of its own, with its own precision
                ends = way()
                if turn:
                    speeds[name].append(case.batch * (len(ends) - WARMUP) / (ends[-1] - ends[WARMUP - 1]))
    ratios = [mine / other for mine, other in zip(speeds["ours"], speeds["plain"], strict=True)]
    return {
        "model": case.model,
        "batch": case.batch,
        "teacher": with_teacher,
        "images_per_second": {name: statistics.median(found) for name, found in speeds.items()},
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
    }


def machine() -> dict[str, Any]:
    """Say on what it was measured."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "accelerate")},
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--data-dir", help="CIFAR-10 as parquet, for instance")
    parser.add_argument("--teacher", action="store_true", help="with a teacher of the same architecture, in both")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="counted of each run")
    options = parser.parse_args()
    content: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": {}}
    for name in options.cases:
        found = time_case(CASES[name], options.data_dir, options.teacher, options.runs, options.steps)
        speed, (ratio, lowest, highest) = found["images_per_second"], found["ratio"]
        row = f"{name}{' with a teacher' if options.teacher else ''}"
        speeds = f"ours {speed['ours']:.1f} images/s, plain {speed['plain']:.1f}"
        print(f"{row}: {speeds}, ratio {ratio:.2f} ({lowest:.2f} to {highest:.2f})", flush=True)
        content["cases"][row] = found | {"machine": machine(), "runs": options.runs, "steps": options.steps}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
