"""How to train what was cut: recipes of retraining on the same slim networks, judged on images that no training saw.

    python benchmarks/recovery.py --tasks resnet20:0.25 vgg16:0.5:0.5 --epochs 2 --data-dir D --weights-dir D
    python benchmarks/recovery.py --table             # what is kept, in Markdown; --render: docs/recovery.md
    python benchmarks/recovery.py --best resnet20:0.25 --epochs 2   # the peak rate that won, as a number

A task is `network:MACs[:parameters]` of accuracy.py, cut once by the method at its defaults. First come peak rates, as
multiples of the default of `retrain`, then what else there is at the rate that won. They are judged on 5,000 images
split off `train`, turned and recoloured, since the dense weights have seen them as they are; `validation` is not read.
Cells are written as they come, and the same command goes on; `--minutes` is of the whole command.
"""

import argparse
import copy
import functools
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import accuracy
import psutil
import torch
import torch.nn.functional as F
from accuracy import BATCH, FEATURE_WEIGHT, RESULTS, TASKS, Pictures
from case import contestants
from paper import Clock, Section, Store, TimedBench, TimeIsUp
from torch import nn
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub.measure import evaluate
from lfrns_hub.retrain.choices import fill_defaults

DOCUMENT = RESULTS.parents[1] / "docs" / "recovery.md"
HELD_OUT = 5000
TURN_DEGREES = 15.0
COLOUR = 0.2
# Times the default peak rate of `retrain`, of networks that it trains by either optimiser.
RATES = {"sgd": (1.0, 0.2, 2.0, 0.05, 0.5, 5.0), "adamw": (1.0, 0.2, 0.05, 0.5, 2.0)}
AVERAGE_DECAY = 0.99
MIXED = 0.2  # both parameters of the Beta law, as Zhang et al. 2018 have it for ImageNet
INTRODUCTION = """# Retraining what was cut

Written by `python benchmarks/recovery.py --render` from benchmarks/results/recovery.json. In each section every recipe
retrains the same slim network, made by `slim` at its defaults (seed 0). Top-1 is on 5,000 images split off `train`,
each rotated by up to 15 degrees and recoloured, a form that no training here has seen. These figures choose a recipe
and are no result: expect others on `validation`. VGG-16 has memorised these images, so for it they favour low rates.

So far: **the less a cut lost, the lower the peak rate that recovers it**, and a rate above that loses more than the cut
did. With 34 and 19 % of its predictions changed (ResNet-20 at a quarter and at half of the MACs) a network needs a peak
of 0.05 with SGD; with 14 % (ResNet-56 at half) 0.005; with 4 % (VGG-16) 0.0005 or less; a ViT-S with 2 % loses three
points at 1e-4 with AdamW. So the default of `retrain` with a teacher follows the share $c$ of changed predictions on
512 training images: $2 (c / 0.19)^3$ times 0.01 (SGD) or 1e-4 (AdamW), at least a fiftieth of that, and at most five
times (SGD) or once (AdamW). The shares above are of the held-out images. The rows "rate ..x" are multiples of 0.01 and
1e-4. Five networks are few, and the rule itself has not been run yet: give `learning_rate` where you know better.

"""


def unfamiliar(pictures: Pictures) -> Pictures:
    """Return pictures turned and recoloured, each in its own way, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    count, device = len(pictures), pictures.pixels.device
    angle = (torch.rand(count, generator=generator) * 2 - 1) * TURN_DEGREES * torch.pi / 180
    turn = torch.stack([angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle], 1).view(-1, 2, 3)
    gain, shift = (1 + COLOUR * (torch.rand(2, count, 3, 1, 1, generator=generator) * 2 - 1)).to(device)
    parts = []
    for begin in range(0, count, 1000):
        part = slice(begin, begin + 1000)
        pixels = pictures.pixels[part].float()
        grid = F.affine_grid(turn[part].to(device), list(pixels.shape), align_corners=False)
        turned = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
        coloured = turned * gain[part] + 64 * (shift[part] - 1)
        parts.append(coloured.round().clamp(0, 255).to(torch.uint8))
    return Pictures(torch.cat(parts), pictures.labels, pictures.preparation, train=False)


class Averaged(Pictures):
    """Training pictures; at each batch that is drawn, an exponential average takes in a model's weights as they are."""

    average: nn.Module
    model: nn.Module

    def __getitems__(self, indices: list[int]) -> Any:
        with torch.no_grad():
            for mean, now in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(now.to(mean), 1 - AVERAGE_DECAY)
                else:
                    mean.copy_(now)
        return super().__getitems__(indices)


class Mixed(Pictures):
    """Training pictures, each mixed with another, without labels: the teacher answers what it sees."""

    def __getitems__(self, indices: list[int]) -> Any:
        images, _ = super().__getitems__(indices)
        share = torch.distributions.Beta(MIXED, MIXED).sample((len(images), 1, 1, 1)).to(images)
        return share * images + (1 - share) * images.roll(1, 0)


# Its name, options of `retrain`, and the kind of training pictures.
Recipe = tuple[str, dict[str, Any], type[Pictures]]


class Recipes(Section):
    """The cells of one task, a recipe each."""

    def key(self, contestant: str, *rest: Any) -> tuple[Any, ...]:
        """Return a cell's key in the file."""
        return (self.name, contestant, *rest)


class RecoveryBench(TimedBench):
    """A task whose held-out images are as no training saw them."""

    def __init__(self, options: argparse.Namespace, store: Store, clock: Clock):
        super().__init__(options, Recipes(store, options), clock, {})
        self.tuning = unfamiliar(self.tuning)
        self.seconds: dict[int, float] = {}
        self.dense_tuned = evaluate(self.dense, self.tuning.loader(), progress=False)["top1_pct"]

    @functools.cached_property
    def pruned(self) -> nn.Module:
        """The slim network of all recipes."""
        return self.prune(contestants["ours"], self.case(0))

    def rate_recipes(self) -> list[Recipe]:
        """Return what is tried first: the default, which follows what the cut changed, and fixed peak rates."""
        rule, rate, *_ = fill_defaults(self.dense, "auto", None, None, None)
        fixed = [(f"rate {times:g}x", {"learning_rate": times * rate}, Pictures) for times in RATES[rule]]
        return [("default of retrain", {}, Pictures), *fixed]

    def other_recipes(self, epochs: int) -> list[Recipe]:
        """Return what is tried at the rate that won, at the first where none was tried."""
        _, (_, default, _), *_ = self.rate_recipes()
        return recipes(best_rate(self.store.cells(), self.name, epochs) or default["learning_rate"])

    def retraining(self) -> dict[str, Any]:
        """Return no settings: those of a recipe alone."""
        return {}

    def judge(self, model: nn.Module) -> dict[str, Any]:
        """Score a network on the held-out images."""
        scores = evaluate(model, self.tuning.loader(), teacher=self.dense, progress=False)
        return {name: scores[name] for name in ("top1_pct", "agreement_pct", "divergence") if name in scores}

    def train_by(self, options: dict[str, Any], pictures: type[Pictures], epochs: int) -> nn.Module:
        """Retrain a copy by options of `retrain`, on pictures of a kind."""
        model = copy.deepcopy(self.pruned).to(memory_format=torch.channels_last).requires_grad_(True)
        data = pictures(self.train.pixels, self.train.labels, self.train.preparation, train=True)
        average = copy.deepcopy(model)
        if isinstance(data, Averaged):
            data.average, data.model = average, model
        loader = DataLoader(data, self.options.batch_size, shuffle=True, collate_fn=lambda batch: batch)
        teacher = None if options.get("distill_weight") == 0 else self.teacher
        options = {k: v for k, v in options.items() if teacher or k != "distill_weight"}
        trained = lfrns.retrain(
            model, loader, teacher=teacher, epochs=epochs, seed=0, progress=False, tracker=self.note_rate, **options
        )
        return average if isinstance(data, Averaged) else trained

    def note_rate(self, values: dict[str, float], step: int) -> None:
        """Note the largest learning rate of a run."""
        self.peak_rate = max(self.peak_rate, values.get("learning_rate", 0.0))

    def fill(self, name: str, options: dict[str, Any], pictures: type[Pictures], epochs: int) -> None:
        """Fill a recipe's cell, if it fits into the time."""
        self.clock.check(1.2 * self.seconds.get(epochs, 5.0))
        began, self.peak_rate = time.perf_counter(), 0.0
        model = self.train_by(options, pictures, epochs)
        cell = {**self.judge(model), "epochs": epochs, "options": options, "seconds": time.perf_counter() - began}
        cell["peak_rate"] = self.peak_rate
        cell |= {"dense_top1_pct": self.dense_tuned, "after_cut": self.after_cut, "batch_size": self.options.batch_size}
        self.seconds[epochs] = cell["seconds"]
        self.store.put(cell | self.how(), name, 0, epochs)
        print(f"{self.name} | {name} | epochs {epochs}: {cell['top1_pct']:.2f} %, {cell['seconds']:.0f} s", flush=True)

    @functools.cached_property
    def after_cut(self) -> dict[str, Any]:
        """What the cut left, on the held-out images."""
        return self.judge(self.pruned)

    def how(self) -> dict[str, Any]:
        """Tell how a cell was made."""
        budget = [f"{self.options.macs:g}"] + ([f"{self.options.params:g}"] if self.options.params else [])
        words = ["python", "benchmarks/recovery.py", "--tasks", ":".join([self.options.task, *budget])]
        return super().how() | {"command": " ".join(words)}


def recipes(best: float) -> list[Recipe]:
    """Return what is tried at the rate that won."""
    rate = {"learning_rate": best}
    return [
        ("features", {**rate, "feature_weight": FEATURE_WEIGHT}, Pictures),
        ("labels alone", {**rate, "distill_weight": 0.0}, Pictures),
        ("teacher alone", {**rate, "distill_weight": 1.0}, Pictures),
        ("temperature 2", {**rate, "temperature": 2.0}, Pictures),
        ("temperature 1", {**rate, "temperature": 1.0}, Pictures),
        ("mixed images, teacher alone", {**rate, "distill_weight": 1.0}, Mixed),
        ("average of late weights", rate, Averaged),
        ("features, twice the rate", {"learning_rate": 2 * best, "feature_weight": FEATURE_WEIGHT}, Pictures),
        ("features, weight 10", {**rate, "feature_weight": FEATURE_WEIGHT / 10}, Pictures),
        ("half the teacher", {**rate, "distill_weight": 0.5}, Pictures),
        ("no warm-up", {**rate, "warmup_fraction": 0.0}, Pictures),
    ]


def best_rate(cells: dict[str, Any], task: str, epochs: int) -> float | None:
    """Return the peak rate that won among the rates tried."""
    found = []
    for key, cell in cells.items():
        name, recipe, _, length = key.split(" | ")
        if name == task and recipe.startswith("rate ") and int(length) == epochs:
            found.append((cell["top1_pct"], cell["options"]["learning_rate"]))
    return max(found)[1] if found else None


def settings(options: argparse.Namespace, task: str) -> argparse.Namespace:
    """Return the options of accuracy.py of a task."""
    name, macs, *params = task.split(":")
    if name not in TASKS:
        raise SystemExit(f"--tasks {task}: no network {name}. They are {', '.join(TASKS)}.")
    mine = {"task": name, "macs": float(macs), "params": float(params[0]) if params else None}
    mine |= {"tuning_images": 16 if options.smoke else HELD_OUT}
    mine |= {"progress": False, "learning_rate": None, "classes": 10}
    return argparse.Namespace(**{**vars(accuracy.parse([])), **vars(options), **mine})


def run(options: argparse.Namespace) -> None:
    """Fill what is not there: the rates of all tasks in turn, then the other recipes."""
    clock = Clock(options.minutes, psutil.Process().create_time())
    store = Store("recovery", Path(options.results))
    benches = [RecoveryBench(settings(options, task), store, clock) for task in options.tasks]
    for epochs in options.epochs:
        fill_in_turn([(bench, bench.rate_recipes()) for bench in benches], epochs)
        fill_in_turn([(bench, bench.other_recipes(epochs)) for bench in benches], epochs)


def fill_in_turn(wanted: list[tuple[RecoveryBench, list[Recipe]]], epochs: int) -> None:
    """Fill the first recipe of each task, then the second, and so on; what does not fit or diverges is told."""
    for place in range(max(len(tried) for _, tried in wanted)):
        for bench, (name, *how) in [(bench, tried[place]) for bench, tried in wanted if place < len(tried)]:
            if bench.store.get(name, 0, epochs):
                continue
            try:
                bench.fill(name, *how, epochs)
            except (TimeIsUp, FloatingPointError) as reason:
                print(f"{bench.name} | {name} | epochs {epochs}: {reason}", flush=True)


def table(cells: dict[str, Any]) -> list[str]:
    """Return the kept cells as lines of Markdown, best first for each task and length."""
    rows = defaultdict(list)
    for key, cell in cells.items():
        name, recipe, _, epochs = key.split(" | ")
        if int(epochs):
            rows[name, int(epochs)].append((recipe, cell))
    lines = []
    for (name, epochs), found in sorted(rows.items()):
        one = found[0][1]
        lines += [f"## {name}, {epochs} epoch{'s' if epochs > 1 else ''}", ""]
        lines.append(
            f"Dense {one['dense_top1_pct']:.2f}, right after the cut {one['after_cut']['top1_pct']:.2f}; batch "
            f"{one['batch_size']}, {one['device']}."
        )
        lines += ["", "| recipe | peak rate | top-1 | agreement with dense | s |", "|---|---|---|---|---|"]
        for recipe, cell in sorted(found, key=lambda pair: -pair[1]["top1_pct"]):
            rate, agreed = cell["options"].get("learning_rate") or cell["peak_rate"], cell["agreement_pct"]
            lines.append(f"| {recipe} | {rate:g} | {cell['top1_pct']:.2f} | {agreed:.2f} | {cell['seconds']:.0f} |")
        lines.append("")
    return lines


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="TASK", default=["resnet20:0.25"], help="network:MACs[:parameters]")
    add("--epochs", type=int, nargs="+", default=[2], help="of retraining (default: 2)")
    add("--minutes", type=float, default=60, help="for the whole command (default: %(default)s)")
    add("--batch-size", type=int, default=BATCH, help="(default: %(default)s)")
    add("--data-dir", default="uoft-cs/cifar10", help="folder of parquet, or a Hub id (default: %(default)s)")
    add("--weights-dir", default="weights", help="where the dense weights lie (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--results", default=str(RESULTS), help="folder of recovery.json (default: benchmarks/results)")
    add("--cache", default="out/recovery", help="where slim networks are kept (default: %(default)s)")
    add("--smoke", action="store_true", help="few images and steps: whether it runs, and no result")
    add("--best", metavar="TASK", help="print the peak rate that won, and stop")
    add("--table", action="store_true", help="print what is kept, and stop")
    add("--render", action="store_true", help="write docs/recovery.md, and stop")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Run the command line."""
    options = parse(arguments)
    cells = Store("recovery", Path(options.results)).content["cells"]
    if options.smoke:
        vars(options).update({"limit": 96, "calibration_images": 16, "fcr_steps": 2})
    if options.best:
        task = accuracy.name_of(settings(options, options.best))
        best = best_rate(cells, task, options.epochs[0])
        print("" if best is None else f"{best:g}")
    elif options.table:
        print("\n".join(table(cells)))
    elif options.render:
        DOCUMENT.write_text(INTRODUCTION + "\n".join(table(cells)) + "\n", encoding="utf-8")
    else:
        run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
