"""Where the time goes on a GPU: the method by step, what its models run at, and which widths the card likes.

    python benchmarks/gpu.py [--minutes 6] [--only GLOB ...] [--results FILE]
    python benchmarks/gpu.py --smoke [--device cuda]
    python benchmarks/gpu.py --table                  # what is kept, in Markdown; --render: docs/gpu.md

Random weights of seed 0, images of noise on the device: speed only, nothing is learned of accuracy; gates train for few
steps but in "resnet50 steps". Forward passes have weights and images in bfloat16, convnets in channels_last, the time
by CUDA events, models in turns. Parts come in the order of what they are worth; what does not fit into the minutes is
left out and named. Results are kept by card as the run goes; a part that fails is kept with what it got and its error.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from gpu_forward import bytes_moved, placed, time_forward, time_graphs
from gpu_page import page, table
from gpu_stairs import staircases
from gpu_steps import rows_sum, watching
from torch import nn

import lfrns_hub as lfrns
from lfrns_hub.measure import count_macs
from lfrns_hub.measure.latency import _PACKAGES, _version, cpu_name
from lfrns_hub.model_io.model import memory_format_of
from lfrns_hub.surgery import cut

RESULTS = Path(__file__).parent / "results" / "gpu.json"
STEPS = RESULTS.parent / "speed" / "gpu_retraining.json"
DOCUMENT = RESULTS.parents[2] / "docs" / "gpu.md"
# And what stands in for each in a smoke test, with the pixels that it takes.
NETWORKS = {
    "resnet50": ("test_resnet", 64),
    "vit_base_patch16_224": ("test_vit", 160),
    "mobilenetv3_large_100": ("test_efficientnet", 64),
    "convnext_tiny": ("test_convnext", 64),
    "vit_small_patch16_224": ("test_vit", 160),
}
FIRST = "resnet50"
SMOKED = (FIRST, "vit_base_patch16_224", "mobilenetv3_large_100")  # the others go the same ways
DENSE, HALF, HALF_64, UNIFORM_64 = "dense", "macs 0.5", "macs 0.5, round_to 64", "macs 0.5, uniform, round_to 64"
UNIFORM_SHARE = 0.7  # of every width: about half of the MACs
UNIFORM_WIDTHS = f"uniform {UNIFORM_SHARE}, by hand"
CUTS: dict[str, dict[str, Any]] = {
    HALF: {"macs": 0.5},
    HALF_64: {"macs": 0.5, "round_to": 64},
    "macs 0.5, round_to 32": {"macs": 0.5, "round_to": 32},
    UNIFORM_64: {"macs": 0.5, "round_to": 64},
}
LATENCIES = (0.5, 0.75)  # the second where the first is out of reach
FEW_STEPS = 20  # of the gates, where only the widths' speed counts
LONGEST = 100.0  # seconds of one part
GROUP_MULTIPLES = (8, 16, 32, 64)


class CutOff(BaseException):
    """The time of a part is over; no `except Exception` on its way takes it for a failure of a model."""


class Subject:
    """A network under measurement: dense, its analysis, and what was cut from it, each made when it is first wanted.

    Attributes:
        name: As timm has it; in a smoke test a small one stands in.
        models: By label, as `lfrns` gives them.
        facts: What there is to say of each, by label.
    """

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.options, device = name, options, options.device
        stand_in, pixels = NETWORKS[name]
        torch.manual_seed(0)
        dense = timm.create_model(stand_in if options.smoke else name).eval().to(device)
        self.layout = memory_format_of(dense)
        self.dense, self.pixels = dense.to(memory_format=self.layout), pixels if options.smoke else 224
        count, batch = (16, 4) if options.smoke else (256, 32)
        self.batches = [one.to(device) for one in torch.randn(count, 3, self.pixels, self.pixels).split(batch)]
        self.models: dict[str, nn.Module] = {DENSE: self.dense}
        self.macs = count_macs(self.dense, self.batches[0][:1])
        self.facts: dict[str, dict[str, Any]] = {DENSE: {"macs": 1.0, "macs_g": round(self.macs / 1e9, 4)}}
        self.gates = 2 if options.smoke else FEW_STEPS
        self._analysis: Any = None
        self._ready: dict[str, nn.Module] = {}
        self._bytes = 1

    def analyse(self) -> Any:
        """Analyse the network anew."""
        self._analysis = lfrns.analyse(self.dense, self.batches, progress=False)
        return self._analysis

    @property
    def analysis(self) -> Any:
        """Return the last analysis."""
        return self._analysis or self.analyse()

    def make(self, label: str) -> None:
        """Cut a model, if it is not there."""
        if label in self.models:
            return
        if label == UNIFORM_WIDTHS:
            plan = self.first_units()
            self.add(label, cut(self.analysis.dense, self.analysis.every, plan), plan)
            return
        # Of uniform widths the order of the merges is the same, and their cost is not read.
        analysis = dataclasses.replace(self.analysis, widths="uniform") if label == UNIFORM_64 else self.analysis
        result = analysis.cut(**CUTS[label], fcr_steps=self.gates)
        self.add(label, result.model, result.plan)

    def first_units(self) -> lfrns.SlimPlan:
        """Keep the first units of every group, the same share of each, in whole eights: no method at all."""
        keep = {}
        for group in self.analysis.chosen:
            eights = 8 if group.size >= 64 else 1
            kept = max(1, round(UNIFORM_SHARE * group.size / eights) * eights)
            keep[group.name] = list(range(min(group.size, kept)))
        return lfrns.SlimPlan(keep)

    def add(self, label: str, model: nn.Module, plan: lfrns.SlimPlan) -> None:
        """Take a model in, with its cost and widths."""
        macs = count_macs(model, self.batches[0][:1])
        groups = [(g.name, len(plan.kept(g)), g.size) for g in self.analysis.chosen]
        wide = [kept for _, kept, size in groups if size >= 64]
        self.models[label] = model
        self._ready.pop(label, None)
        self.facts[label] = {
            "macs": round(macs / self.macs, 4),
            "macs_g": round(macs / 1e9, 4),
            # Of the groups of 64 units and more, how many are left with a width that is a multiple.
            "multiples": {str(n): f"{sum(k % n == 0 for k in wide)} of {len(wide)}" for n in GROUP_MULTIPLES},
            "widths": ", ".join(f"{name} {kept}/{size}" for name, kept, size in groups),
        }

    def images(self, batch: int) -> torch.Tensor:
        """Return noise as the timed models take it."""
        size = (batch, 3, self.pixels, self.pixels)
        images = torch.randn(size, device=self.options.device, dtype=self.options.dtype)
        return images.contiguous(memory_format=self.layout)

    def ready(self, labels: list[str]) -> dict[str, nn.Module]:
        """Give models as they are timed, the dense one first; the facts take in what each moves at the large batch."""
        for label in labels:
            if label not in self._ready:
                self._ready[label] = placed(self.models[label], self.options.dtype, self.layout)
                moved = bytes_moved(self._ready[label], self.images(self.options.batch))
                self._bytes = moved if label == DENSE else self._bytes
                self.facts[label] |= {"bytes": round(moved / self._bytes, 4), "gb": round(moved / 1e9, 4)}
        return {label: self._ready[label] for label in labels}


def steps(subject: Subject, row: dict[str, Any]) -> None:
    """Analyse and cut by step; a second cut of the same analysis for the first network."""
    first, options = subject.name == FIRST, subject.options
    gates = 200 if first and not options.smoke else subject.gates
    row |= {"fcr_steps": gates, "images": sum(map(len, subject.batches))}
    for title in ("first", "again"):
        with watching(options.device) as watch:
            if title == "first":
                with watch.step("analyse"):
                    subject.analyse()
                row["analyse"] = watch.rows()
                show("analyse", row["analyse"])
            with watch.step("cut"):
                result = subject.analysis.cut(macs=0.5, fcr_steps=gates)
        key = "cut" if title == "first" else "second cut"
        row[key] = [one for one in watch.rows() if one["step"].startswith("cut")]
        show(key, row[key])
        subject.add(HALF, result.model, result.plan)
        if not first:
            break
    row["clock"] = result.report.seconds


def steps_again(subject: Subject, row: dict[str, Any]) -> None:
    """Analyse and cut once more in the warm process: by step, then without watching, which costs nothing."""
    gates = 2 if subject.options.smoke else 200
    row["fcr_steps"] = gates
    with watching(subject.options.device) as watch:
        with watch.step("analyse"):
            analysis = subject.analyse()
        with watch.step("cut"):
            analysis.cut(macs=0.5, fcr_steps=gates)
    for key in ("analyse", "cut"):
        row[key] = [one for one in watch.rows() if one["step"].split(" > ")[0] == key]
        show(key, row[key])
    began = time.perf_counter()
    analysis = subject.analyse()
    middle = time.perf_counter()
    analysis.cut(macs=0.5, fcr_steps=gates)
    row["unwatched"] = {"analyse": middle - began, "cut": time.perf_counter() - middle}
    print(f"  unwatched: {row['unwatched']}", flush=True)


def show(key: str, rows: list[dict[str, Any]]) -> None:
    """Print where a call's time went."""
    print("\n".join([f"  {key}:", *rows_sum(rows)]), flush=True)


def forward(subject: Subject, row: dict[str, Any]) -> None:
    """Time the dense network and all that is cut from it to half of the MACs."""
    labels = [HALF, HALF_64]
    if subject.name == FIRST:
        labels = [*CUTS, UNIFORM_WIDTHS]
    row["models"] = subject.facts
    for label in labels:
        try:
            subject.make(label)
        except Exception as error:  # one that cannot be made leaves the others
            row.setdefault("failed", {})[label] = sentence(error)
            print(f"  {label}: {sentence(error)}", flush=True)
    run_modes(subject, row, [DENSE, *(label for label in labels if label in subject.models)])


def run_modes(subject: Subject, row: dict[str, Any], labels: list[str]) -> None:
    """Time models at both batches, eager, and at batch 1 by a CUDA graph."""
    options, times = subject.options, row.setdefault("times", {})
    models = subject.ready(labels)
    for batch in (options.batch, 1):
        times[f"eager, batch {batch}"] = told = time_forward(models, subject.images(batch), options.seconds)
        tell(subject, f"eager, batch {batch}", told)
    if options.device == "cuda":
        times["CUDA graph, batch 1"] = told = time_graphs(models, subject.images(1), options.seconds)
        tell(subject, "CUDA graph, batch 1", told)


def tell(subject: Subject, mode: str, times: dict[str, dict[str, Any]]) -> None:
    """Print a mode's times; at the large batch also at what rates, and what would bound each if one thing ruled."""
    batch = subject.options.batch
    for label, one in times.items():
        facts, more = subject.facts[label], ""
        if mode.endswith(f"batch {batch}"):
            rates = f"{2 * facts['macs_g'] * batch / one['ms']:.0f} TFLOP/s, {1000 * facts['gb'] / one['ms']:.0f} GB/s"
            more = f"; {rates}; bound {1 / facts['macs']:.2f}x by MACs, {1 / facts['bytes']:.2f}x by bytes"
        print(f"  {mode}: {label} {one['ms']:.3f} ms, {one['times_faster'][0]:.3f}x{more}", flush=True)


def fastest(subject: Subject, row: dict[str, Any]) -> None:
    """Cut to a share of the time at the large batch; what is not reached is a result as well."""
    options, analysis = subject.options, subject.analysis
    setup = lfrns.LatencySetup(batch=options.batch, dtype=options.dtype, device=options.device)
    row |= {"setup": setup.describe(), "models": subject.facts, "failed": {}}
    for share in LATENCIES[options.smoke :]:
        label = f"latency {share}"
        with watching(options.device) as watch:
            try:
                with watch.step(label):
                    result = analysis.cut(latency=share, latency_setup=setup, fcr_steps=subject.gates)
            except ValueError as error:
                row["failed"][label] = sentence(error)
                print(f"  {label}: {row['failed'][label]}", flush=True)
                continue
            finally:
                row[label] = watch.rows()
                show(label, row[label])
        told = {key: result.report.latency[key] for key in ("dense_ms", "slim_ms", "predicted_fraction")}
        row["in_search"] = {"asked": share, "fraction": result.report.latency_fraction, **told}
        print(f"  in the search: {row['in_search']}", flush=True)
        subject.add(label, result.model, result.plan)
        run_modes(subject, row, [one for one in (DENSE, HALF, label) if one in subject.models])
        break


def compiled(subject: Subject, row: dict[str, Any]) -> None:
    """Time the dense network and its halves under torch.compile, at the large batch."""
    options = subject.options
    torch.compiler.reset()
    backend = "eager" if options.smoke and options.device == "cpu" else "inductor"
    for label in (HALF, HALF_64):
        subject.make(label)
    row |= {"models": subject.facts, "backend": backend, "compile_seconds": {}}
    images, models = subject.images(options.batch), subject.ready([DENSE, HALF, HALF_64])
    for label, model in models.items():
        began = time.perf_counter()
        models[label] = torch.compile(model, dynamic=False, backend=backend)
        with torch.no_grad():
            models[label](images)
        row["compile_seconds"][label] = round(time.perf_counter() - began, 1)
        print(f"  {label} compiled in {row['compile_seconds'][label]} s", flush=True)
        if label != DENSE:  # of each as it is there: the next compilation may be cut off
            some = {key: models[key] for key in models if key in row["compile_seconds"]}
            told = time_forward(some, images, options.seconds)
            row["times"] = {f"compiled, batch {options.batch}": told}
    tell(subject, f"compiled, batch {options.batch}", told)


def stairs(subject: Subject, row: dict[str, Any]) -> None:
    """Time layers over their widths; no network is needed."""
    options = subject.options
    staircases(row, options.batch, options.device, options.dtype, options.smoke)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        network: Whose it is.
        what: Its name after the network's.
        seconds: What it is expected to take on an H100; it is left out where less is left.
        run: Measures into a row.
    """

    network: str
    what: str
    seconds: float
    run: Callable[[Subject, dict[str, Any]], None]

    @property
    def name(self) -> str:
        """Return the name that `--only` and the results know it by."""
        return f"{self.network} {self.what}"


PARTS = [
    Part(FIRST, "steps", 25, steps),
    Part(FIRST, "forward", 30, forward),
    Part(FIRST, "latency", 40, fastest),
    Part(FIRST, "staircase", 15, stairs),
    *(
        Part(network, what, seconds, run)
        for network, lasts in (("vit_base_patch16_224", (15, 20)), ("mobilenetv3_large_100", (12, 10)))
        for what, seconds, run in (("steps", lasts[0], steps), ("forward", lasts[1], forward))
    ),
    Part(FIRST, "steps again", 30, steps_again),
    Part(FIRST, "compiled", 60, compiled),
    *(
        Part(network, what, seconds, run)
        for network in ("convnext_tiny", "vit_small_patch16_224")
        for what, seconds, run in (("steps", 12, steps), ("forward", 15, forward))
    ),
    Part("vit_base_patch16_224", "compiled", 40, compiled),
]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise CutOff in what still runs after so many seconds, where signals can be had."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise CutOff(f"cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sentence(error: BaseException) -> str:
    """Return an error's class and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:400]}"


def run_parts(parts: list[Part], options: argparse.Namespace, until: float, keep: Callable[..., None]) -> None:
    """Run the parts in order, each as far as it gets; what does not fit is named."""
    subjects: dict[str, Subject] = {}
    left_out: list[str] = []
    for part in parts:
        left = until - time.perf_counter()
        if left < part.seconds * (0.1 if options.smoke else 1):
            left_out.append(part.name)
            print(f"{part.name}: left out, {left:.0f} s are left of the minutes", flush=True)
            keep(left_out=left_out)
            continue
        print(f"{part.name}: {left:.0f} s left", flush=True)
        row: dict[str, Any] = {}
        began = time.perf_counter()
        try:
            with limited(min(left, LONGEST)):
                if part.network not in subjects:
                    subjects[part.network] = Subject(part.network, options)
                part.run(subjects[part.network], row)
        except (Exception, CutOff) as error:
            row["error"] = sentence(error)
            print(f"  {row['error']}", flush=True)
        row["part_seconds"] = round(time.perf_counter() - began, 1)
        print(f"  {row['part_seconds']} s in all", flush=True)
        keep(part.name, row)


def write_into(path: Path, card: str, setup: dict[str, Any]) -> Callable[..., None]:
    """Return a function that keeps a part of a card's results; those of another setup give way."""

    def keep(name: str | None = None, row: dict[str, Any] | None = None, left_out: list[str] | None = None) -> None:
        cards = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        entry = cards.get(card, {})
        if entry.get("setup") != setup:
            entry = {"setup": setup, "left_out": [], "parts": {}}
        if name is not None:
            entry["parts"][name] = row
        entry["left_out"] = [one for one in left_out or entry["left_out"] if one not in entry["parts"]]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(compact(cards | {card: entry}) + "\n", encoding="utf-8")
        partial.replace(path)

    return keep


def compact(content: dict[str, Any]) -> str:
    """Write JSON with a line for each step, and for each row of numbers."""
    text = json.dumps(content, indent=1)
    innermost = r"\{\s+\"step\"[^{}]*\}|\[[-\d.,\s]*\]"
    return re.sub(innermost, lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)


def describe(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Name the card, and say what everything was taken on."""
    card = cpu_name() if options.device == "cpu" else torch.cuda.get_device_name()
    versions = {package: _version(package) for package in _PACKAGES} | {"python": platform.python_version()}
    setup = {
        "weights": "random, seed 0: speed only",
        "forward": f"weights and images in {str(options.dtype).removeprefix('torch.')}, convnets in channels_last",
        "batch": options.batch,
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "versions": versions | {"lfrns_hub": lfrns.__version__, "cuda": torch.version.cuda},
        "smoke": options.smoke,
    }
    return card + " (smoke)" * options.smoke, setup


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Keep tables of layers' times in a folder of this run's, so that they are measured and timed."""
    before = os.environ.get("LFRNS_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LFRNS_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("LFRNS_CACHE")
            os.environ.update({"LFRNS_CACHE": before} if before is not None else {})


def render() -> str:
    """Return docs/gpu.md."""
    return page(*(json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS, STEPS)))


def main(arguments: list[str] | None = None) -> None:
    """Measure what fits into the minutes, or print what was measured."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=6.0, help="for all of it (default: %(default)s)")
    add("--only", nargs="+", metavar="GLOB", help="parts by name (default: all, of a smoke test one of each kind)")
    add("--results", type=Path, help="where results are kept (default: beside this file; of a smoke test: nowhere)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda, of a smoke test cpu")
    add("--smoke", action="store_true", help="tiny networks, one look at every path; figures mean nothing")
    add("--render", action="store_true", help="write docs/gpu.md from what is kept and stop")
    add("--table", action="store_true", help="print what is there in Markdown and stop")
    add("--list", action="store_true", help="name the parts and stop")
    options = parser.parse_args(arguments)
    globs = options.only or [f"{name} *" for name in (SMOKED if options.smoke else NETWORKS)]
    parts = [part for part in PARTS if any(fnmatchcase(part.name, glob) for glob in globs)]
    if options.render or options.table:
        path = options.results or RESULTS
        DOCUMENT.write_text(render(), "utf-8") if options.render else print(table(json.loads(path.read_text("utf-8"))))
        return
    if options.list or not parts:
        names = [part.name for part in PARTS]
        print("\n".join(names)) if options.list else parser.error(f"--only: no such part. They are {', '.join(names)}.")
        return
    options.device = options.device or ("cpu" if options.smoke else "cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here. --smoke runs every path on the CPU.")
    # bfloat16 convolutions of a CPU may be a hundred times slower.
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    options.batch, options.seconds = (4, 0.2) if options.smoke else (256, 5.0)
    card, setup = describe(options)
    print(f"{card}: {json.dumps(setup)}", flush=True)
    with tempfile.TemporaryDirectory() as nowhere, fresh_cache():
        path = options.results or (Path(nowhere) / "gpu.json" if options.smoke else RESULTS)
        run_parts(parts, options, began + 60 * options.minutes, write_into(path, card, setup))
    print(f"{time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
