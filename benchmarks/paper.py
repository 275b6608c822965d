"""The paper's table, in one command sized for a short GPU lease: as much as the time allows, in order of value.

    python benchmarks/paper.py --minutes 9 --data-dir DIR --weights-dir DIR
    python benchmarks/paper.py --table                # what is kept, in Markdown; --render: docs/paper.md
    python benchmarks/paper.py --smoke --data-dir DIR --weights-dir DIR --only-tasks vgg16

Contestants, data and retraining are those of accuracy.py, at larger batches. VGG-16, ViT-S and ResNet-56 come with
weights; ResNet-110 and DenseNet-40, and all networks on data of other classes than the weights', are trained first.
All of the first seed goes before the second. Each cell is written as soon as it is there, and the same command goes on.

`--minutes` is of the whole command, from the start of the process: before each cell its seconds are predicted, from the
images a second that this network was trained at (a few steps tell, at first) or from what the cut took before. A cell
that would not fit is left out, and one that outlasts the time is given up; nothing half done is kept. The rates follow
the steps of a fixed number of epochs, not the clock, so a cell is the same however much time there was.
"""

import argparse
import copy
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import accuracy
import psutil
import torch
from accuracy import RESULTS, TASKS, Bench, Store, data_of, name_of
from case import Case, Contestant, NotSupported, contestants
from torch import nn

import lfrns_hub as lfrns
from lfrns_hub.measure.latency import describe_setup
from lfrns_hub.zoo import load_data

# Network, MACs and parameters to keep, in order of value.
BUDGETS = [
    ("vgg16", 0.5, 0.5),
    ("vit_small", 0.67, None),
    ("resnet56_scratch", 0.5, 0.5),
    ("vgg16", 0.33, 0.33),
    ("vit_small", 0.5, None),
    ("resnet56_scratch", 0.33, 0.33),
    ("resnet110", 0.5, 0.5),
    ("densenet40", 0.5, 0.5),
    ("resnet110", 0.33, 0.33),
    ("densenet40", 0.33, 0.33),
]
SEEDS = (0, 1, 2)
OURS = (
    "ours",
    "dense",
    "dense, without a teacher",
    "random units, our widths, our fold",
    "L1 units, our fold (our widths)",
    'preset="paper"',
)
# The two best after retraining in docs/results.md that take the network. kirigami traces no ViT of timm, and its OSSCAR
# traces the network anew for each layer, minutes of a ResNet-56.
PEERS = {"cnn": ("torch-kirigami, magnitude", "Torch-Pruning, L1")}
PEERS["vit_small"] = ("variance + mean shift (VBP)", "Torch-Pruning, Taylor")
# Of a peer's many settings those that won there.
VARIANTS = {
    "torch-kirigami, magnitude": [{"widths": "global"}, {"widths": "local"}],
    "Torch-Pruning, L1": [{"scope": "inner", "iterative_steps": 10, "global_pruning": True}],
    "Torch-Pruning, Taylor": [{"scope": "neurons", "iterative_steps": 10, "global_pruning": True}],
}
# Batch and peak rate of retraining; None: accuracy.py's rate. At 0.04 two epochs spoiled more than the cut had, and
# 0.01 still does where the cut lost little (docs/recovery.md).
BATCHES = {"cnn": (512, 0.01), "vit_small": (256, None)}
DOCUMENT = RESULTS.parents[1] / "docs" / "paper.md"
INTRODUCTION = """# The paper's networks

Written by `python benchmarks/paper.py --render` from benchmarks/results/paper.json, which that command fills as far as
its time allows. So far: seed 0, a few minutes of lent H100s. Retraining is towards the dense network's logits and last
feature map; each row has its batch and rate. **The rates of these rows were too high:** two epochs at a peak of 0.04
end below where the cut left the network. Which rates recover what a cut lost, and which lose more, depends on the
loss: [recovery.md](recovery.md). Dense accuracies are those of the given weights; CIFAR-10 is a lossy JPEG copy, and
`validation` 5,000 of its test images.

"""
CLASSES = 10  # of the weights
DENSE_EPOCHS = 30  # of a network that is trained first
SMOKE = {"limit": 96, "tuning_images": 16, "calibration_images": 16, "fcr_steps": 2}
SMOKE_BATCH = 16
TRIALS = {False: (2, 6), True: (20, 80)}  # steps that tell images a second, on a GPU the recorded ones
MARGIN = 1.15  # on a prediction
PATIENCE = 3  # predictions that a cell may take before it is given up
FIRST_SHARE = 0.1  # of all the time: the prediction of what was never done before
LEAST_SECONDS = 5  # with less no cell is begun


class TimeIsUp(BaseException):
    """A cell outlasts its time; no error, so that nothing on the way takes it for one of its own."""


class GivenUp(TimeIsUp):
    """It had begun, and took far longer than predicted."""


class Clock:
    """The time of the whole command, from the start of the process."""

    def __init__(self, minutes: float, began: float):
        self.seconds, self.end = 60 * minutes, began + 60 * minutes

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.time()

    def check(self, predicted: float) -> None:
        """Raise TimeIsUp where something would not fit."""
        if predicted > self.left():
            raise TimeIsUp(f"left out, about {predicted:.0f} s of the {max(self.left(), 0):.0f} s left")

    @contextmanager
    def limit(self, predicted: float, patience: float = PATIENCE) -> Iterator[None]:
        """Run something under an alarm that raises TimeIsUp: at the end, or when it takes far longer than predicted.

        Raises:
            TimeIsUp: It outlasts its time, or it would not fit and has not begun.
        """
        self.check(predicted)
        seconds = min(self.left(), patience * predicted + LEAST_SECONDS)

        def stop(*_: Any) -> None:
            raise GivenUp(f"given up after {seconds:.0f} s; {predicted:.0f} s were predicted")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again every second, should one be swallowed by a destructor
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Section:
    """The cells of one task and budget in the one file of all; the dense network's are of the task alone."""

    def __init__(self, store: Store, options: argparse.Namespace):
        self.store, self.name, self.setup = store, name_of(options), {}
        budget = f"-macs{options.macs:g}" + (f"-params{options.params:g}" if options.params else "")
        self.dense_name = self.name.replace(budget, "")

    def describe(self, setup: dict[str, Any]) -> None:
        """Note what the cells stand on; it goes into each."""
        self.setup = setup

    def key(self, contestant: str, *rest: Any) -> tuple[Any, ...]:
        """Return a cell's key in the file."""
        is_dense = contestants[contestant].family == "reference"
        return (self.dense_name if is_dense else self.name, contestant, *rest)

    def get(self, *key: Any) -> dict[str, Any] | None:
        """Return a cell, or None where it is not measured."""
        return self.store.get(*self.key(*key))

    def cells(self) -> dict[str, dict[str, Any]]:
        """Return the cells of all tasks and budgets."""
        return self.store.content["cells"]

    def put(self, cell: dict[str, Any], *key: Any) -> None:
        """Keep a cell, whole or not at all."""
        self.store.put(cell | {"setup": self.setup}, *self.key(*key))


class TimedBench(Bench):
    """A task at a budget whose cells say how long they took, and which tells how long the next will."""

    def __init__(self, options: argparse.Namespace, section: Section, clock: Clock, rates: dict[Any, float]):
        self.clock, self.rates = clock, rates
        self.has_plan: set[int] = set()  # seeds whose widths the controls need not find anew
        super().__init__(options, section)

    def weights(self) -> Path | None:
        """Return the weights where there are some for data of so many classes."""
        path = super().weights()
        return path if path and path.exists() and self.options.classes == CLASSES else None

    def compare(self, model: nn.Module, case: Case) -> dict[str, Any]:
        """Return the cost alone: what the layers express takes long."""
        return self.cost(model, case)

    def prune(self, contestant: Contestant, case: Case) -> nn.Module:
        """Cut, and note what the cell took in all its settings, scored."""
        began = time.perf_counter()
        is_cut = self.is_cut(contestant, case.seed)
        model = super().prune(contestant, case)
        self.has_plan |= {case.seed} if contestant.name == "ours" and not is_cut else set()
        cell = self.store.get(contestant.name, case.seed, 0)
        if "epochs" not in cell:
            whole = {"epochs": 0, "cell_seconds": time.perf_counter() - began}
            self.store.put(cell | whole, contestant.name, case.seed, 0)
        return model

    def is_cut(self, contestant: Contestant, seed: int) -> bool:
        """Return whether a pruned network is kept, so that none has to be made."""
        cached = self.cache / f"{contestant.name.replace('/', '-')}-{seed}.pt"
        return cached.is_file() and self.store.get(contestant.name, seed, 0) is not None

    def retrain(self, contestant: Contestant, pruned: nn.Module, seed: int, epochs: int) -> None:
        """Retrain, and note the images a second."""
        super().retrain(contestant, pruned, seed, epochs)
        cell = self.store.get(contestant.name, seed, epochs)
        self.rates[self.rate_key(contestant)] = cell["images_per_second"]

    def rate_key(self, contestant: Contestant) -> tuple[Any, ...]:
        """Name what is as fast: the dense network, or what is left of it at this budget."""
        is_dense = contestant.family == "reference"
        return (self.options.task if is_dense else self.name, contestant.distil)

    def training_seconds(self, contestant: Contestant, model: nn.Module, epochs: int) -> float:
        """Predict the seconds of retraining, by a few steps where this network has not been trained yet."""
        key = self.rate_key(contestant)
        if key not in self.rates:
            self.rates[key] = self.try_steps(model, teacher=self.teacher if contestant.distil else None)
        return epochs * len(self.train) / self.rates[key] * MARGIN

    def try_steps(self, model: nn.Module, **options: Any) -> float:
        """Train a copy for a few steps and another for more: images a second of what the second has more."""
        taken: dict[int, float] = {}
        for steps in TRIALS[self.device.type == "cuda"]:
            images = min(steps * self.options.batch_size, len(self.train))
            few = self.train.part(torch.arange(images, device=self.device), train=True)
            copied, began = copy.deepcopy(model).to(memory_format=torch.channels_last), time.perf_counter()
            loader = few.loader(self.options.batch_size, shuffle=True)
            lfrns.retrain(copied.requires_grad_(True), loader, epochs=1, progress=False, **options, **self.retraining())
            taken[images] = time.perf_counter() - began
        (fewer, short), *more = sorted(taken.items())
        images, long = more[0] if more else (fewer, short)
        return (images - fewer) / (long - short) if more and long > short else images / long

    def cut_seconds(self, contestant: Contestant, seed: int) -> float:
        """Predict the seconds of a cut, by what it took of this network before, at any budget and seed."""
        seconds, device = defaultdict(list), self.how()["device"]
        for key, cell in self.store.cells().items():
            if "cell_seconds" in cell and (cell["setup"]["task"], cell["device"]) == (self.options.task, device):
                seconds[key.split(" | ")[1]].append(cell["cell_seconds"])
        if contestant.name not in seconds:
            least = FIRST_SHARE * self.clock.seconds / (PATIENCE if seconds else 1)
            return max(least, *map(max, seconds.values())) if seconds else least
        widths = seconds["ours"] if contestant.family == "control" and seed not in self.has_plan else []
        return (max(seconds[contestant.name]) + max(widths, default=0)) * MARGIN

    def train_dense(self, model: nn.Module) -> nn.Module:
        """Train the dense network first where no weights are given, if that fits."""
        self.options.dense_epochs = 0 if self.weights() else self.options.dense_epochs
        if self.options.dense_epochs:
            seconds = self.options.dense_epochs * len(self.train) / self.try_steps(model) * MARGIN
            self.clock.check(seconds)
        return super().train_dense(model)

    def how(self) -> dict[str, Any]:
        """Tell how a cell was made."""
        words = [
            "python",
            "benchmarks/paper.py",
            "--only-tasks",
            self.options.task,
            "--data-dir",
            data_of(self.options),
        ]
        setup = describe_setup(self.dense, self.example, self.device)
        figures = {"device": setup["machine"]["device"], "versions": setup["versions"], "smoke": self.options.smoke}
        return super().how() | {"command": " ".join(words)} | figures


class Paper:
    """All that the command has asked for, in order of value."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.clock = Clock(options.minutes, psutil.Process().create_time() if options.began is None else options.began)
        self.store = Store("paper", Path(options.results))
        self.benches: dict[tuple[Any, ...], TimedBench | None] = {}
        self.cases: dict[Any, Case] = {}
        self.rates: dict[Any, float] = {}
        self.setup_seconds: dict[str, float] = {}
        self.refused: set[tuple[Any, ...]] = set()  # what cannot be done, or not in time: not tried again in this run
        self.classes = len(load_data(options.data_dir, "train", transform=lambda picture: picture).class_names)

    def order(self) -> Iterator[tuple[int, int, str, float, float | None]]:
        """Yield seed, epochs, network, MACs and parameters of what is wanted, in order of value."""
        chosen = [b for b in BUDGETS if b[0] in self.options.only_tasks and not self.is_missing(b[0])]
        chosen = [b for b in chosen if not self.options.macs or b[1] in self.options.macs]
        given = [budget for budget in chosen if self.has_weights(budget[0])]
        for seed in range(self.options.seeds):
            parts = [given, [budget for budget in chosen if budget not in given]] if seed == 0 else [chosen]
            for budgets in parts:
                for epochs in self.options.epochs:
                    yield from ((seed, epochs, *budget) for budget in budgets)

    def has_weights(self, task: str) -> bool:
        """Return whether a network comes with weights for this data, so that it is not trained first."""
        name = TASKS[task].get("folder") or TASKS[task].get("weights")
        return bool(name) and self.classes == CLASSES and (Path(self.options.weights_dir) / name).exists()

    def is_missing(self, task: str) -> bool:
        """Return whether a network is only to be had with its weights, and they are not there."""
        return "folder" in TASKS[task] and not self.has_weights(task)

    def settings(self, task: str, macs: float, params: float | None) -> argparse.Namespace:
        """Return the options of accuracy.py of one task and budget."""
        batch, rate = BATCHES.get(task, BATCHES["cnn"])
        mine = {
            "task": task,
            "macs": macs,
            "params": params,
            "classes": self.classes,
            "batch_size": self.options.batch_size or (SMOKE_BATCH if self.options.smoke else batch),
            "learning_rate": self.options.learning_rate or rate,
            "progress": False,
        }
        return argparse.Namespace(**{**vars(accuracy.parse([])), **vars(self.options), **mine})

    def bench(self, task: str, macs: float, params: float | None) -> TimedBench | None:
        """Return a task at a budget, made once; None, with a line, where it does not fit."""
        if (task, macs, params) not in self.benches:
            options = self.settings(task, macs, params)
            began, bench = time.perf_counter(), None
            try:
                patience = PATIENCE if self.has_weights(task) else float("inf")  # it is trained in there
                with self.clock.limit(self.setup_seconds.get(task, FIRST_SHARE * self.clock.seconds), patience):
                    bench = TimedBench(options, Section(self.store, options), self.clock, self.rates)
                self.setup_seconds.setdefault(task, time.perf_counter() - began)
            except TimeIsUp as reason:
                print(f"{name_of(options)}: {reason}", flush=True)
            self.benches[task, macs, params] = bench
        return self.benches[task, macs, params]

    def case(self, bench: TimedBench, seed: int) -> Case:
        """Return what contestants get, made once and kept for the seed that is run."""
        if (bench.name, seed) not in self.cases:
            self.cases = {key: case for key, case in self.cases.items() if key[1] == seed}
            self.cases[bench.name, seed] = bench.case(seed)
        return self.cases[bench.name, seed]

    def contestants(self, task: str) -> list[Contestant]:
        """Return the contestants of a network, each in few settings; or those that were asked for by name."""
        names = [*OURS, *PEERS.get(task, PEERS["cnn"])]
        if self.options.contestants:
            names = [n for n in contestants if any(fnmatchcase(n, glob) for glob in self.options.contestants)]
        return [replace(contestants[n], variants=VARIANTS.get(n, contestants[n].variants)) for n in names]

    def run(self) -> None:
        """Fill the cells that are not there, as far as the time goes."""
        for task in {budget[0] for budget in BUDGETS if budget[0] in self.options.only_tasks}:
            if self.is_missing(task):
                print(f"{task}: left out, it has no weights in --weights-dir for {self.classes} classes", flush=True)
        for seed, epochs, *budget in self.order():
            if self.clock.left() < LEAST_SECONDS:
                print("the time is over: what is left was not begun", flush=True)
                return
            section = Section(self.store, self.settings(*budget))
            wanted = [
                c
                for c in self.contestants(budget[0])
                if not {(section.name, c.name, seed), (budget[0], c.name)} & self.refused
                and "reason" not in (section.get(c.name, seed, 0) or {})
                and not (section.get(c.name, seed, 0) and (section.get(c.name, seed, epochs)))
            ]
            bench = self.bench(*budget) if wanted else None
            for contestant in wanted if bench else ():
                try:
                    self.fill(bench, contestant, seed, epochs)
                except TimeIsUp as reason:
                    at = epochs if bench.store.get(contestant.name, seed, 0) else 0
                    if isinstance(reason, GivenUp) and not at:  # it would take as long at another budget
                        self.refused.add((budget[0], contestant.name))
                    print(f"{bench.name} | {contestant.name} | seed {seed} | epochs {at}: {reason}", flush=True)
                except NotSupported as reason:
                    self.refused.add((section.name, contestant.name, seed))
                    print(f"{bench.name} | {contestant.name}: {reason}", flush=True)

    def fill(self, bench: TimedBench, contestant: Contestant, seed: int, epochs: int) -> None:
        """Fill a cell, and that of right after the cut where it is not there."""
        if bench.store.get(contestant.name, seed, 0) is None or not bench.is_cut(contestant, seed):
            with self.clock.limit(bench.cut_seconds(contestant, seed)):
                pruned = bench.prune(contestant, self.case(bench, seed))
            bench.tell(contestant, seed, 0)
        else:
            pruned = bench.prune(contestant, self.case(bench, seed))
        if epochs and not bench.store.get(contestant.name, seed, epochs):
            with self.clock.limit(self.clock.left() / PATIENCE):
                seconds = bench.training_seconds(contestant, pruned, epochs)
            with self.clock.limit(seconds):
                bench.retrain(contestant, pruned, seed, epochs)
            bench.tell(contestant, seed, epochs)


def table(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Return the kept cells as lines of Markdown, a row for each contestant and length of training."""
    rows: dict[tuple[str, str], dict[int, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for key, cell in cells.items():
        name, contestant, seed, epochs = key.split(" | ")
        if "reason" not in cell:
            rows[name, contestant][int(epochs)][int(seed)] = cell
    head = ["network", "kept", "contestant", "dense", "after the cut", "epochs", "after them", "MACs", "params",
            "cut, s", "training, s", "images/s", "batch", "rate", "precision", "seeds", "device"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (_, contestant), by_epochs in sorted(rows.items(), key=lambda row: place(row[0], row[1])):
        cuts = by_epochs.get(0, {})
        for epochs, trained in sorted(by_epochs.items()):
            if epochs or len(by_epochs) == 1:
                lines.append(f"| {' | '.join(row(contestant, epochs, cuts, trained))} |")
    return lines


def place(key: tuple[str, str], by_epochs: dict[int, dict[int, dict[str, Any]]]) -> tuple[Any, ...]:
    """Return where a row stands: by network, the dense one first, then by budget and contestant."""
    setup = first_of(by_epochs)["setup"]
    tasks = list(dict.fromkeys(budget[0] for budget in BUDGETS))
    names = [*OURS, *PEERS["cnn"], *PEERS["vit_small"]]
    is_dense = contestants[key[1]].family == "reference"
    where = names.index(key[1]) if key[1] in names else len(names)
    return tasks.index(setup["task"]), setup["data"], not is_dense, 0 if is_dense else -setup["macs"], key[0], where


def first_of(by_epochs: dict[int, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Return one of a row's cells."""
    return next(iter(next(iter(by_epochs.values())).values()))


def row(contestant: str, epochs: int, cuts: dict[int, Any], trained: dict[int, Any]) -> list[str]:
    """Return the fields of a row."""
    one = next(iter(trained.values()))
    setup, after = one["setup"], trained if epochs else {}
    budget = f"MACs {setup['macs']:g}" + (f", params {setup['params']:g}" if setup["params"] else "")
    is_dense = contestants[contestant].family == "reference"
    devices = sorted({cell["device"] for cell in trained.values()})
    network = f"{setup['task']}, {setup['data'].split('.')[0]}" + (" (smoke)" if one["smoke"] else "")
    return [
        network,
        "all" if is_dense else budget,
        contestant,
        f"{setup['dense_top1_pct']:.2f}",
        mean_of(cuts, "top1_pct", ".2f"),
        str(epochs),
        mean_of(after, "top1_pct", ".2f"),
        mean_of(cuts, "macs_fraction", ".3f"),
        mean_of(cuts, "params_fraction", ".3f"),
        mean_of(cuts, "cell_seconds", ".0f"),
        mean_of(after, "seconds", ".0f"),
        mean_of(after, "images_per_second", ".0f"),
        str(one.get("batch_size", "")),
        str(one.get("learning_rate", "")),
        str(one.get("mixed_precision", "")),
        str(len(trained)),
        ", ".join(devices),
    ]


def mean_of(cells: dict[int, dict[str, Any]], key: str, form: str) -> str:
    """Return the mean of a figure over the seeds, of accuracies with their standard deviation; empty where none is."""
    values = [cell[key] for cell in cells.values() if key in cell]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 and key == "top1_pct" else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def render() -> str:
    """Return docs/paper.md."""
    return INTRODUCTION + "\n".join(table(Store("paper").content["cells"])) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, tasks = parser.add_argument, list(dict.fromkeys(budget[0] for budget in BUDGETS))
    add("--minutes", type=float, default=9, help="for the whole command (default: %(default)s)")
    add("--data-dir", default="uoft-cs/cifar10", help="folder of parquet, or a Hub id (default: %(default)s)")
    add("--weights-dir", default="weights", help="where the dense weights lie (default: %(default)s)")
    add("--only-tasks", nargs="+", choices=tasks, default=tasks, metavar="TASK", help=f"of {', '.join(tasks)}")
    add("--macs", type=float, nargs="+", default=None, help="budgets of these MACs alone (default: all)")
    add("--contestants", nargs="+", metavar="GLOB", default=None, help="of `accuracy.py --list` (default: the paper's)")
    add("--epochs", type=int, nargs="+", default=None, help="of retraining, one length after the other (default: 2 10)")
    add("--seeds", type=int, default=len(SEEDS), help="how many, from 0 (default: %(default)s)")
    add("--batch-size", type=int, default=None, help="default: 512, of ViT-S 256")
    add("--learning-rate", type=float, default=None, help="peak of retraining; default: 0.01, of ViT-S 2e-5")
    add("--dense-epochs", type=int, default=None, help=f"of a network without weights (default: {DENSE_EPOCHS})")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add(
        "--results", default=None, help="folder of paper.json (default: benchmarks/results, out/paper-smoke of --smoke)"
    )
    add("--cache", default=None, help="where pruned networks are kept (default: out/paper, or out/paper-smoke)")
    add("--smoke", action="store_true", help="few images and steps: whether it runs, and no result")
    add("--render", action="store_true", help="write docs/paper.md from what is kept, and stop")
    add("--table", action="store_true", help="print what is kept, and stop")
    options = parser.parse_args(arguments)
    vars(options).update(SMOKE if options.smoke else {})
    options.began = None
    options.epochs = options.epochs or ([1] if options.smoke else [2, 10])
    options.dense_epochs = options.dense_epochs or (1 if options.smoke else DENSE_EPOCHS)
    options.cache = options.cache or ("out/paper-smoke" if options.smoke else "out/paper")
    options.results = options.results or ("out/paper-smoke" if options.smoke else str(RESULTS))
    return options


def main(arguments: list[str], began: float | None = None) -> None:
    """Run the command line; `began` is when the time began, by default with the process."""
    options = parse(arguments)
    options.began = began
    if options.render:
        DOCUMENT.write_text(render(), encoding="utf-8")
    elif options.table:
        print("\n".join(table(Store("paper", Path(options.results)).content["cells"])))
    else:
        Paper(options).run()


if __name__ == "__main__":
    main(sys.argv[1:])
