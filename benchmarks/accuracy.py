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
from case import Case, Contestant, NotSupported, contestants
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lfrns_hub as lfrns
from lfrns_hub.measure import count_macs, count_params, evaluate
from lfrns_hub.measure.latency import describe_setup, measure_latency
from lfrns_hub.recipe import describe_run
from lfrns_hub.reconstruct import explained
from lfrns_hub.surgery import recalibrate
from lfrns_hub.trace import trace_model
from lfrns_hub.zoo import create_dense, load_data, make_transform

RESULTS = Path(__file__).parent / "results"
TUNING_IMAGES = 2000
CALIBRATION_IMAGES = 2000
BATCH = 128
# Name here: model, weights file or folder, epochs of fine-tuning before anything else, retraining settings.
TASKS: dict[str, dict[str, Any]] = {
    "resnet20": {"model": "cifar_resnet20", "weights": "resnet20_cifar10.safetensors"},
    "resnet56": {"model": "cifar_resnet56", "weights": "resnet56_cifar10_png.safetensors", "dense_epochs": 3},
    "resnet110": {"model": "cifar_resnet110", "dense_epochs": 160},
    "vgg16": {"model": "cifar_vgg16_bn", "dense_epochs": 160},
    "densenet40": {"model": "cifar_densenet40", "dense_epochs": 160},
    "vit": {"folder": "vit_cifar10"},
}
RETRAINING = {
    "cnn": {"learning_rate": 0.02, "weight_decay": 5e-4},
    "vit": {"learning_rate": 5e-4, "weight_decay": 0.05},
}
FEATURE_WEIGHT = 100  # of the dense network's last feature map, in our rows
FINE_TUNING = {"learning_rate": 0.02, "weight_decay": 5e-4}
FROM_SCRATCH = {"learning_rate": 0.1, "weight_decay": 1e-4}  # He et al. 2016, section 4.2


class Pictures(Dataset):
    """All pictures of a split as bytes on the device; a batch is cropped, flipped and normalised at once.

    Attributes:
        pixels: [N, C, H, W], uint8.
        labels: [N], int64.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mean: Tensor, std: Tensor, *, train: bool):
        self.pixels, self.labels, self.mean, self.std, self.train = pixels, labels, mean, std, train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Give a batch: images [n, C, H, W] float32, normalised, and labels [n]."""
        index = torch.as_tensor(indices, device=self.pixels.device)
        pixels = self.pixels[index]
        return self.normalise(crop_and_flip(pixels) if self.train else pixels), self.labels[index]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Give the model's input of some pixels."""
        return (pixels.float() / 255 - self.mean) / self.std

    def part(self, chosen: Tensor, *, train: bool) -> "Pictures":
        """Give some of the pictures, [n] int64, with or without augmentation."""
        return Pictures(self.pixels[chosen], self.labels[chosen], self.mean, self.std, train=train)

    def loader(self, batch_size: int = 500, *, shuffle: bool = False) -> DataLoader:
        """Give the batches."""
        return DataLoader(self, batch_size, shuffle=shuffle, collate_fn=lambda batch: batch)


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


def read_pictures(data: str, split: str, model: nn.Module, device: torch.device) -> Pictures:
    """Decode a split once."""
    data_set = load_data(data, split, transform=lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    pixels, labels = zip(*(data_set[i] for i in range(len(data_set))), strict=True)
    normalise = make_transform(model, train=False)
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (normalise.mean, normalise.std))
    return Pictures(torch.stack(pixels).to(device), torch.tensor(labels, device=device), mean, std, train=False)


class Store:
    """The finished cells of one task and budget, one JSON file; each cell is written as soon as it is there."""

    def __init__(self, name: str):
        self.path = RESULTS / f"{name}.json"
        self.content = json.loads(self.path.read_text()) if self.path.is_file() else {"cells": {}}

    def get(self, *key: Any) -> dict[str, Any] | None:
        """Give a cell, or None where it is not measured."""
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

    def __init__(self, options: argparse.Namespace):
        self.options, self.task = options, TASKS[options.task]
        self.device = torch.device(options.device)
        budget = f"macs{options.macs:g}" + (f"-params{options.params:g}" if options.params else "")
        self.name = f"{options.task}-{Path(options.data_dir).name.split('.')[0]}-{budget}"
        self.store = Store(self.name)
        self.cache = Path(options.cache) / self.name
        self.cache.mkdir(parents=True, exist_ok=True)
        model = self.build()
        train = read_pictures(options.data_dir, "train", model, self.device)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(123)).to(self.device)
        self.train = train.part(order[TUNING_IMAGES:], train=True)
        self.tuning = train.part(order[:TUNING_IMAGES], train=False)
        self.test = read_pictures(options.data_dir, "validation", model, self.device)
        self.dense = self.train_dense(model)
        self.teacher = copy.deepcopy(self.dense).to(memory_format=torch.channels_last)
        self.example = self.test.normalise(self.test.pixels[:1])
        self.sites = trace_model(self.dense, self.example).sites
        self.dense_scores = evaluate(self.dense, self.test.loader(), progress=False)
        self.store.content["setup"] = {
            "task": options.task,
            "data": Path(options.data_dir).name,
            "macs": options.macs,
            "params": options.params,
            "dense_top1_pct": self.dense_scores["top1_pct"],
            "dense_macs_m": count_macs(self.dense, self.example) / 1e6,
            "dense_params_m": count_params(self.dense) / 1e6,
            "calibration_images": CALIBRATION_IMAGES,
            "retraining": self.retraining(),
            **describe_setup(self.dense, self.example, self.device),
        }

    def build(self) -> nn.Module:
        """Build the dense network, with the weights that are given."""
        folder = Path(self.options.weights_dir)
        if "folder" in self.task:
            return create_dense(str(folder / self.task["folder"])).to(self.device)
        weights = folder / self.task["weights"] if self.task.get("weights") else None
        classes = None if weights else self.options.classes
        return create_dense(self.task["model"], num_classes=classes, weights=weights).to(self.device)

    def train_dense(self, model: nn.Module) -> nn.Module:
        """Train or fine-tune the dense network first where the task says so; once for all budgets."""
        epochs = self.options.dense_epochs
        epochs = self.task.get("dense_epochs", 0) if epochs is None else epochs
        if epochs:
            path = self.cache.parent / f"{self.options.task}-dense-{epochs}.pt"
            if path.is_file():
                model.load_state_dict(torch.load(path, weights_only=True))
            else:
                settings = FINE_TUNING if self.task.get("weights") else FROM_SCRATCH
                print(f"{self.options.task}: {epochs} epochs of the dense network", flush=True)
                lfrns.retrain(model, self.train.loader(BATCH, shuffle=True), epochs=epochs, **settings)
                torch.save(model.state_dict(), path)
        return model.float().eval()

    def retraining(self) -> dict[str, float]:
        """Give the settings of all retraining here."""
        return RETRAINING["vit" if "folder" in self.task else "cnn"]

    def case(self, seed: int) -> Case:
        """Give what a contestant gets: calibration images that training has seen and tuning has not."""
        drawn = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_IMAGES]
        images = self.train.pixels[drawn.to(self.device)]
        labels = self.train.labels[drawn.to(self.device)]
        return Case(self.dense, self.train.normalise(images), labels, self.options.macs, seed, self.options.params)

    def prune(self, contestant: Contestant, case: Case) -> nn.Module | None:
        """Run a contestant in all its settings, keep the best on the tuning images, and measure it; None: it cannot."""
        path = self.cache / f"{contestant.name.replace('/', '-')}-{case.seed}.pt"
        cell = self.store.get(contestant.name, case.seed, 0)
        if cell and "reason" in cell:
            return None
        if cell and path.is_file():
            return torch.load(path, weights_only=False, map_location=self.device)
        best, chosen, reasons = None, {}, []
        first = self.store.get(contestant.name, 0, 0)  # settings are chosen at the first seed
        for variant in [first["variant"]] if first else contestant.variants:
            began = time.perf_counter()
            try:
                model = contestant.function(case, **variant)
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
            self.store.put({"reason": "; ".join(dict.fromkeys(reasons))}, contestant.name, case.seed, 0)
            return None
        torch.save(best, path)
        latency = measure_latency({"dense": self.dense, "slim": best}, self.example)
        fresh = {
            "family": contestant.family,
            **chosen,
            **self.score(best),
            "macs_fraction": case.kept_macs(best),
            "params_fraction": count_params(best) / count_params(self.dense),
            "latency_ratio": latency["slim"] / latency["dense"],
            "variance_kept": explained(self.dense, best, self.sites, [b for b, _ in case.batches()]),
        }
        self.store.put(fresh | self.how(), contestant.name, case.seed, 0)
        return best

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
            self.train.loader(BATCH, shuffle=True),
            teacher=self.teacher if contestant.distil else None,
            feature_weight=FEATURE_WEIGHT if contestant.features else 0,
            epochs=epochs,
            seed=seed,
            progress=self.options.progress,
            **self.retraining(),
        )
        cell = {**self.score(model), "seconds": time.perf_counter() - began}
        self.store.put(cell | self.how(), contestant.name, seed, epochs)

    def how(self) -> dict[str, Any]:
        """Tell how a cell was made."""
        words = ["python", "benchmarks/accuracy.py", self.options.task, "--macs", f"{self.options.macs:g}"]
        words += ["--params", f"{self.options.params:g}"] if self.options.params else []
        return {
            "command": shlex.join([*words, "--data-dir", Path(self.options.data_dir).name]),
            "commit": describe_run(__file__)["commit"],
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
                pruned = self.prune(contestant, case)
                if pruned is None:
                    print(f"{contestant.name}: {self.store.get(contestant.name, seed, 0)['reason']}", flush=True)
                    continue
                for epochs in wanted:
                    if epochs:
                        self.retrain(contestant, pruned, seed, epochs)
                    cell = self.store.get(contestant.name, seed, epochs)
                    note = f"{cell['top1_pct']:.2f} % in {cell['seconds']:.0f} s"
                    print(f"{self.name} | {contestant.name} | seed {seed} | epochs {epochs}: {note}", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=TASKS, nargs="?", default="resnet20")
    add("--macs", type=float, default=0.5, help="fraction of the MACs to keep (default: %(default)s)")
    add("--params", type=float, default=None, help="fraction of the parameters to keep as well; our rows alone")
    add("--epochs", type=int, nargs="+", default=[0], help="retraining; 0 is right after the cut (default: 0)")
    add("--seeds", type=int, default=1, help="how many, from 0 (default: %(default)s)")
    add("--only", nargs="+", metavar="GLOB", default=None, help="contestants by name (default: all)")
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
