"""Accuracy at the same MACs: this library, its parts switched off, controls, and every peer, side by side.

    python benchmarks/accuracy.py resnet20 --macs 0.5 --data-dir DIR --weights-dir DIR
    python benchmarks/accuracy.py resnet56 --macs 0.5 --params 0.5 --epochs 160 --only ours dense

Every contestant gets the same dense weights, the same calibration images, the same budget, the same retraining (towards
the dense network's logits, by the labels too; ours also towards its last feature map, and a row of ours does without)
and, where that is better on images split off the training set, BatchNorm statistics taken anew. Its settings are chosen
on those images as well; the test images are read for the table only. Finished cells are kept under benchmarks/results/:
the same command goes on where it stopped. `--list` names the contestants, benchmarks/table.py draws the tables.
"""

import argparse
import copy
import fcntl
import functools
import json
import shlex
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import kirigami_peers  # noqa: F401  (these register their contestants)
import numpy as np
import ours  # noqa: F401
import peers  # noqa: F401
import torch
import torch_pruning_peers  # noqa: F401
from case import Case, Contestant, NotInstalled, NotSupported, contestants
from explained import explained
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lfrns_hub as lfrns
from lfrns_hub.measure import count_macs, count_params, evaluate
from lfrns_hub.measure.latency import cpu_name, describe_setup, measure_latency
from lfrns_hub.method.recalibrate import recalibrate
from lfrns_hub.pictures import Preparation
from lfrns_hub.recipe import describe_run
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.trace import trace_model
from lfrns_hub.zoo import create_dense, load_data, make_transform

RESULTS = Path(__file__).parent / "results"
TUNING_IMAGES = 2000
CALIBRATION_IMAGES = 2000
BATCH = 128
PILLOW_ONE = 2**22  # its fixed point for bytes: 32 bits less 8 of a level and 2 of sums above it
# Name here: model, weights file or folder, epochs of fine-tuning before anything else, retraining settings.
TASKS: dict[str, dict[str, Any]] = {
    "resnet20": {"model": "cifar_resnet20", "weights": "resnet20_cifar10.safetensors"},
    "resnet56": {"model": "cifar_resnet56", "weights": "resnet56_cifar10_png.safetensors", "dense_epochs": 3},
    "resnet110": {"model": "cifar_resnet110", "dense_epochs": 160},
    "resnet56_scratch": {"model": "cifar_resnet56", "weights": "resnet56_cifar10.safetensors"},
    "vgg16": {"model": "cifar_vgg16_bn", "weights": "vgg16_bn_cifar10.safetensors"},
    "densenet40": {"model": "cifar_densenet40", "dense_epochs": 160},
    "vit": {"folder": "vit_cifar10", "retraining": "vit"},
    "vit_small": {"folder": "vit_small_cifar10", "retraining": "vit_small"},
}
RETRAINING = {
    "cnn": {"learning_rate": 0.02, "weight_decay": 5e-4},
    "vit": {"learning_rate": 5e-4, "weight_decay": 0.05},
    "vit_small": {"learning_rate": 2e-5, "weight_decay": 0.05},  # well trained already: a high rate undoes that
}
FEATURE_WEIGHT = 100  # of the dense network's last feature map, in our rows
FINE_TUNING = {"learning_rate": 0.02, "weight_decay": 5e-4}
FROM_SCRATCH = {"learning_rate": 0.1, "weight_decay": 1e-4}  # He et al. 2016, section 4.2


class Pictures(Dataset):
    """All pictures of a split as bytes on the device; a batch is cropped, flipped, resized and normalised at once.

    Attributes:
        pixels: [N, C, H, W], uint8, of the pictures' own size.
        labels: [N], int64.
        preparation: How the model's images are made of pictures.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, preparation: Preparation, *, train: bool):
        self.pixels, self.labels, self.preparation, self.train = pixels, labels, preparation, train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: images [n, C, H, W] float32, normalised, and labels [n]."""
        index = torch.as_tensor(indices, device=self.pixels.device)
        pixels = self.pixels[index]
        return self.normalise(crop_and_flip(pixels) if self.train else pixels), self.labels[index]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return the model's input of some pixels."""
        if pixels.shape[-2:] != self.preparation.size:
            pixels = resize(pixels, self.preparation.size, self.preparation.interpolation)
        mean, std = (on_device(values, pixels.device) for values in (self.preparation.mean, self.preparation.std))
        return (pixels.float() / 255 - mean) / std

    def part(self, chosen: Tensor, *, train: bool) -> "Pictures":
        """Return some of the pictures, [n] int64, with or without augmentation."""
        return Pictures(self.pixels[chosen], self.labels[chosen], self.preparation, train=train)

    def loader(self, batch_size: int = 500, *, shuffle: bool = False) -> DataLoader:
        """Return the batches."""
        return DataLoader(self, batch_size, shuffle=shuffle, collate_fn=lambda batch: batch)


@functools.cache
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a number for each channel, [C, 1, 1]."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def resize(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize [N, C, H, W] levels of 255 as pillow does: along the rows, then the columns, whole levels between."""
    for new in reversed(size):
        weights = resize_weights(pixels.shape[-1], new, interpolation, pixels.device)
        levels = (pixels.double() @ weights).add_(PILLOW_ONE / 2).div_(PILLOW_ONE).floor_().clamp_(0, 255)
        pixels = levels.transpose(-1, -2)
    return pixels


@functools.cache
def resize_weights(old: int, new: int, interpolation: str, device: torch.device) -> Tensor:
    """Return the weights [old, new] of pillow's filter, times PILLOW_ONE: whole numbers, whose sums are exact."""
    options = {"mode": interpolation, "align_corners": False, "antialias": True}
    unit = torch.eye(old, dtype=torch.float64)[None, None]
    weights = torch.nn.functional.interpolate(unit, (old, new), **options)[0, 0]
    return (weights * PILLOW_ONE).round().to(device)


def crop_and_flip(pixels: Tensor) -> Tensor:
    """Shift each picture by up to an eighth of its width, zeros coming in, and mirror every other one."""
    count, _, height, width = pixels.shape
    pad = width // 8
    padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
    down, right, mirrored = (torch.randint(n, (count,)).to(pixels.device) for n in (2 * pad + 1, 2 * pad + 1, 2))
    rows = down[:, None] + torch.arange(height, device=pixels.device)
    columns = torch.arange(width, device=pixels.device).expand(count, -1)
    columns = right[:, None] + torch.where(mirrored[:, None] == 1, width - 1 - columns, columns)
    images = torch.arange(count, device=pixels.device)
    return padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@functools.cache
def decode(data: str, split: str, device: torch.device, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Decode a split once for all models: pixels [N, C, H, W], uint8, and labels [N]."""
    options = {"transform": lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1), "limit": limit}
    data_set = load_data(data, split, **options)
    pixels, labels = zip(*(data_set[i] for i in range(len(data_set))), strict=True)
    return torch.stack(pixels).to(device), torch.tensor(labels, device=device)


def read_pictures(data: str, split: str, model: nn.Module, device: torch.device, limit: int | None = None) -> Pictures:
    """Return a split as a model is shown it."""
    pixels, labels = decode(data, split, device, limit)
    preparation = make_transform(model, train=False)
    height, width = pixels.shape[-2:]
    if (height, width) != preparation.size and (
        height != width or preparation.resize not in (preparation.size[0], preparation.size)
    ):
        raise ValueError(f"{data}: {type(model).__name__} takes a part of pictures of {height}x{width}, not all of it.")
    return Pictures(pixels, labels, preparation, train=False)


class Store:
    """The finished cells of one task and budget, one JSON file; each cell is written as soon as it is there."""

    def __init__(self, name: str, folder: Path = RESULTS):
        self.path = folder / f"{name}.json"
        self.content = json.loads(self.path.read_text()) if self.path.is_file() else {"cells": {}}

    def describe(self, setup: dict[str, Any]) -> None:
        """Note what the cells stand on; written with the next cell."""
        self.content["setup"] = setup

    def get(self, *key: Any) -> dict[str, Any] | None:
        """Return a cell, or None where it is not measured."""
        return self.content["cells"].get(" | ".join(map(str, key)))

    def put(self, cell: dict[str, Any], *key: Any) -> None:
        """Keep a cell, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:  # several runs may fill one table
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.is_file():
                self.content["cells"] = json.loads(self.path.read_text(encoding="utf-8"))["cells"]
            self.content["cells"][" | ".join(map(str, key))] = cell
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            partial.replace(self.path)


class Bench:
    """One task at one budget: its data, its dense network, and what becomes of each contestant."""

    def __init__(self, options: argparse.Namespace, store: Store | None = None):
        self.options, self.task = options, TASKS[options.task]
        self.device = torch.device(options.device)
        self.name = name_of(options)
        self.store = store or Store(self.name)
        self.cache = Path(options.cache) / self.name
        self.cache.mkdir(parents=True, exist_ok=True)
        model = self.build()
        train = read_pictures(options.data_dir, "train", model, self.device, options.limit)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(123)).to(self.device)
        self.train = train.part(order[options.tuning_images :], train=True)
        self.tuning = train.part(order[: options.tuning_images], train=False)
        self.test = read_pictures(options.data_dir, "validation", model, self.device, options.limit)
        self.dense = self.train_dense(model)
        self.teacher = copy.deepcopy(self.dense).to(memory_format=torch.channels_last)
        self.example = self.test.normalise(self.test.pixels[:1])
        self.sites = trace_model(self.dense, self.example).sites
        self.dense_scores = evaluate(self.dense, self.test.loader(), progress=False)
        setup = {
            "task": options.task,
            "data": Path(options.data_dir).name,
            "macs": options.macs,
            "params": options.params,
            "dense_top1_pct": self.dense_scores["top1_pct"],
            "dense_macs_m": count_macs(self.dense, self.example) / 1e6,
            "dense_params_m": count_params(self.dense) / 1e6,
            "calibration_images": options.calibration_images,
            "retraining": self.retraining(),
            **describe_setup(self.dense, self.example, self.device),
        }
        self.store.describe(setup)

    def build(self) -> nn.Module:
        """Build the dense network, with the weights that are given."""
        weights = self.weights()
        if "folder" in self.task:
            return create_dense(str(weights)).float().to(self.device)
        classes = None if weights else self.options.classes
        return create_dense(self.task["model"], num_classes=classes, weights=weights).to(self.device)

    def weights(self) -> Path | None:
        """Return the file or folder of the weights, None where the network is trained from scratch."""
        name = self.task.get("folder") or self.task.get("weights")
        return Path(self.options.weights_dir) / name if name else None

    def train_dense(self, model: nn.Module) -> nn.Module:
        """Train or fine-tune the dense network first where the task says so; once for all budgets."""
        epochs = self.options.dense_epochs
        epochs = self.task.get("dense_epochs", 0) if epochs is None else epochs
        if epochs:
            path = self.cache.parent / f"{self.options.task}-{data_of(self.options)}-dense-{epochs}.pt"
            if path.is_file():
                model.load_state_dict(torch.load(path, weights_only=True, map_location=self.device))
            else:
                settings = FINE_TUNING if self.weights() else FROM_SCRATCH
                print(f"{self.options.task}: {epochs} epochs of the dense network", flush=True)
                loader = self.train.loader(self.options.batch_size, shuffle=True)
                lfrns.retrain(model, loader, epochs=epochs, progress=self.options.progress, **settings)
                torch.save(model.state_dict(), path)
        return model.float().eval()

    def retraining(self) -> dict[str, float]:
        """Return the settings of all retraining here."""
        rate = self.options.learning_rate
        return RETRAINING[self.task.get("retraining", "cnn")] | ({"learning_rate": rate} if rate else {})

    def case(self, seed: int) -> Case:
        """Return what a contestant gets: calibration images that training has seen and tuning has not."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        drawn = order[: self.options.calibration_images].to(self.device)
        images = self.train.normalise(self.train.pixels[drawn])
        options = {"params": self.options.params, "fcr_steps": self.options.fcr_steps}
        return Case(self.dense, images, self.train.labels[drawn], self.options.macs, seed, **options)

    def prune(self, contestant: Contestant, case: Case) -> nn.Module:
        """Run a contestant in all its settings, keep the best on the tuning images, and measure it.

        Raises:
            NotSupported: It cannot, in no setting.
        """
        path = self.cache / f"{contestant.name.replace('/', '-')}-{case.seed}.pt"
        cell = self.store.get(contestant.name, case.seed, 0)
        if cell and "reason" in cell:
            raise NotSupported(cell["reason"])
        if cell and path.is_file():
            return torch.load(path, weights_only=False, map_location=self.device)
        best, chosen, reasons = None, {}, []
        first = self.store.get(contestant.name, 0, 0)  # settings are chosen at the first seed
        for variant in [first["variant"]] if first else contestant.variants:
            began = time.perf_counter()
            try:
                model = contestant.function(case, **variant)
            except NotInstalled:
                raise
            except NotSupported as error:
                reasons.append(str(error))
                continue
            seconds = time.perf_counter() - began
            images = [images for images, _ in case.batches()]
            for recalibrated in (False, True):
                candidate = recalibrate(model, images) if recalibrated else model
                tuned = evaluate(candidate, self.tuning.loader(), progress=False)["top1_pct"]
                if best is None or tuned > chosen["tuning_top1_pct"]:
                    best = candidate
                    chosen = {
                        "tuning_top1_pct": tuned, "variant": variant, "recalibrated": recalibrated, "seconds": seconds,
                    }  # fmt: skip
                if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
                    break
        if best is None:
            reason = "; ".join(dict.fromkeys(reasons))
            self.store.put({"reason": reason}, contestant.name, case.seed, 0)
            raise NotSupported(reason)
        torch.save(best, path)
        fresh = {"family": contestant.family, **chosen, **self.score(best), **self.compare(best, case)}
        self.store.put(fresh | self.how(), contestant.name, case.seed, 0)
        return best

    def compare(self, model: nn.Module, case: Case) -> dict[str, Any]:
        """Compare a pruned model's cost with the dense one's, and what its layers still express."""
        latency = measure_latency({"dense": self.dense, "slim": model}, self.example)
        return self.cost(model, case) | {
            "latency_ratio": latency["slim"] / latency["dense"],
            "variance_kept": explained(self.dense, model, self.sites, [b for b, _ in case.batches()]),
        }

    def cost(self, model: nn.Module, case: Case) -> dict[str, float]:
        """Return the fractions of the dense cost that a model keeps."""
        params = count_params(model) / count_params(self.dense)
        return {"macs_fraction": case.kept_macs(model), "params_fraction": params}

    def score(self, model: nn.Module) -> dict[str, Any]:
        """Score a model on the test images, against the labels and against the dense network."""
        scores = evaluate(model, self.test.loader(), teacher=self.dense, progress=False)
        return {
            "top1_pct": scores["top1_pct"],
            "agreement_pct": scores["agreement_pct"],
            "worst_class": scores["worst_class"],
            "images": scores["images"],
        }

    def retrain(self, contestant: Contestant, pruned: nn.Module, seed: int, epochs: int) -> None:
        """Retrain a copy of a pruned network and measure its last epoch."""
        model, began = copy.deepcopy(pruned).to(memory_format=torch.channels_last), time.perf_counter()
        lfrns.retrain(
            model.requires_grad_(True),
            self.train.loader(self.options.batch_size, shuffle=True),
            teacher=self.teacher if contestant.distil else None,
            feature_weight=FEATURE_WEIGHT if contestant.features else 0,
            epochs=epochs,
            seed=seed,
            progress=self.options.progress,
            **self.retraining(),
        )
        trained = time.perf_counter() - began
        figures = {
            "epochs": epochs,
            "images_per_second": epochs * len(self.train) / trained,
            "batch_size": self.options.batch_size,
            "learning_rate": self.retraining()["learning_rate"],
            "mixed_precision": make_accelerator(seed=seed).mixed_precision,
        }
        cell = {**self.score(model), "seconds": time.perf_counter() - began, **figures}
        self.store.put(cell | self.how(), contestant.name, seed, epochs)

    def how(self) -> dict[str, Any]:
        """Tell how a cell was made."""
        words = ["python", "benchmarks/accuracy.py", self.options.task, "--macs", f"{self.options.macs:g}"]
        words += ["--params", f"{self.options.params:g}"] if self.options.params else []
        words += ["--batch-size", str(self.options.batch_size)] if self.options.batch_size != BATCH else []
        words += ["--learning-rate", f"{self.options.learning_rate:g}"] if self.options.learning_rate else []
        return {
            "command": shlex.join([*words, "--data-dir", Path(self.options.data_dir).name]),
            "commit": describe_run(__file__)["commit"],
            "machine": cpu_name() if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
        }

    def run(self) -> None:
        """Fill all the cells that were asked for and are not there."""
        chosen = [
            c for c in contestants.values() if any(fnmatchcase(c.name, pattern) for pattern in self.options.only or "*")
        ]
        for seed in range(self.options.seeds):
            case = self.case(seed)
            for contestant in chosen:
                wanted = [e for e in self.options.epochs if not self.store.get(contestant.name, seed, e)]
                if not wanted:
                    continue
                try:
                    pruned = self.prune(contestant, case)
                except NotSupported as error:
                    print(f"{contestant.name}: {error}", flush=True)
                    continue
                for epochs in wanted:
                    if epochs:
                        self.retrain(contestant, pruned, seed, epochs)
                    self.tell(contestant, seed, epochs)

    def tell(self, contestant: Contestant, seed: int, epochs: int) -> None:
        """Print a cell."""
        cell = self.store.get(contestant.name, seed, epochs)
        note = f"{cell['top1_pct']:.2f} % in {cell['seconds']:.0f} s"
        print(f"{self.name} | {contestant.name} | seed {seed} | epochs {epochs}: {note}", flush=True)


def data_of(options: argparse.Namespace) -> str:
    """Name the data."""
    return Path(options.data_dir).name.split(".")[0]


def name_of(options: argparse.Namespace) -> str:
    """Name a task at a budget, and whatever of the retraining was asked to be otherwise."""
    words = [options.task, data_of(options), f"macs{options.macs:g}"]
    words += [f"params{options.params:g}"] if options.params else []
    words += [f"batch{options.batch_size}"] if options.batch_size != BATCH else []
    words += [f"lr{options.learning_rate:g}"] if options.learning_rate else []
    return "-".join(words)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    parser.set_defaults(limit=None, tuning_images=TUNING_IMAGES, calibration_images=CALIBRATION_IMAGES, fcr_steps=200)
    add("task", choices=TASKS, nargs="?", default="resnet20")
    add("--macs", type=float, default=0.5, help="fraction of the MACs to keep (default: %(default)s)")
    add("--params", type=float, default=None, help="fraction of the parameters to keep as well; our rows alone")
    add("--epochs", type=int, nargs="+", default=[0], help="retraining; 0 is right after the cut (default: 0)")
    add("--seeds", type=int, default=1, help="how many, from 0 (default: %(default)s)")
    add("--only", nargs="+", metavar="GLOB", default=None, help="contestants by name (default: all)")
    add("--batch-size", type=int, default=BATCH, help="of retraining (default: %(default)s)")
    add("--learning-rate", type=float, default=None, help="peak of retraining; default: as the task has it")
    add("--data-dir", default="uoft-cs/cifar10", help="folder of parquet, or a Hub id (default: %(default)s)")
    add("--weights-dir", default="weights", help="where the dense weights lie (default: %(default)s)")
    add("--dense-epochs", type=int, default=None, help="of the dense network before; default: as the task says")
    add("--classes", type=int, default=10, help="of a network without weights (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--cache", default="out/accuracy", help="where pruned networks are kept (default: %(default)s)")
    add("--progress", action="store_true", help="show a bar while retraining")
    add("--list", action="store_true", help="name the contestants and stop")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    asked = parse(sys.argv[1:])
    if asked.list:
        for one in contestants.values():
            print(f"{one.family:10} {one.name}")
    else:
        Bench(asked).run()
