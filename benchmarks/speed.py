"""What the method costs and what it buys, each against its reference in the same run: the table in docs/speed.md.

    python benchmarks/speed.py [--only GLOB ...] [--runs 5] [--again] [--smoke]
    python benchmarks/speed.py --render

A row is a function that gives seconds (or bytes) of turns, reference and ours side by side; the figure is the median
of the turns' ratios. Rows that are there already are kept, so that a run that was cut off goes on. Weights are random
and images are noise: neither changes what has to be computed. FCR steps, retraining and latency budgets are timed by
benchmarks of their own (fcr_step.py, retraining.py, latency_budget.py), and are rendered here from their results.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "speed"
DOCUMENT = Path(__file__).parent.parent / "docs" / "speed.md"
BATCH = 32
Turns = dict[str, list[float]]
rows: dict[str, tuple[str, str, Callable[..., Turns]]] = {}


def row(name: str, what: str, wanted: str) -> Callable:
    """Add a row to the table: its name, what is compared with what, and which ratio is wanted."""

    def add(function: Callable[..., Turns]) -> Callable[..., Turns]:
        rows[name] = (what, wanted, function)
        return function

    return add


def turns(calls: dict[str, Callable[[], float | None]], runs: int) -> Turns:
    """Call several functions in turns, and take the seconds of each, or what it says itself."""
    times: Turns = {name: [] for name in calls}
    for number in range(runs):
        for name, call in calls.items():
            began = time.perf_counter()
            told = call()
            times[name].append(time.perf_counter() - began if told is None else told)
        if number + 1 < runs:
            after_turn(times)
    return times


def after_turn(times: Turns) -> None:
    """Tell what a row has so far, for a run that is cut off within it."""
    ratios = {name: ratio_of(values, times["reference"])[0] for name, values in times.items()
              if "reference" in times and name != "reference"}  # fmt: skip
    print(f"  {len(next(iter(times.values())))} turns: {ratios} {times}", file=sys.stderr, flush=True)


def model_and_images(name: str, smoke: bool) -> tuple[Any, list[Any]]:
    """Build a network with random weights, and 256 images in batches."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model({"resnet50": "test_resnet", "vit_base_patch16_224": "test_vit"}[name] if smoke else name)
    count, size = (64, 160) if smoke else (256, 224)
    images = [torch.randn(BATCH, 3, size, size) for _ in range(count // BATCH)]
    return model.eval(), images


def forward(model: Any, images: list[Any]) -> None:
    """Run bare forward passes."""
    import torch

    with torch.no_grad():
        for batch in images:
            model(batch)


def steps_of(analysis: Any) -> float:
    """Give the seconds of responses and redundancy."""
    return analysis.seconds["responses"] + analysis.seconds["redundancy"]


def analysis_turns(name: str, runs: int, smoke: bool) -> Turns:
    """Time responses and redundancy beside the forward passes over the same images, in both layouts of a convnet."""
    import torch

    import lfrns_hub as lfrns

    model, images = model_and_images(name, smoke)
    loader = [(batch, None) for batch in images]
    last = model_and_images(name, smoke)[0].to(memory_format=torch.channels_last)
    calls = {
        "reference": lambda: forward(model, images),
        "reference, channels last": lambda: forward(last, images),
        "ours": lambda: steps_of(lfrns.analyse(model, loader, progress=False)),
    }
    if "vit" in name:
        del calls["reference, channels last"]  # one layer has a kernel
    return turns(calls, runs)


@row("analysis-resnet50", "responses + redundancy, resnet50, 256 images / bare forward passes", "at most 1.5")
def analysis_resnet50(runs: int, smoke: bool) -> Turns:
    """Of a convnet."""
    return analysis_turns("resnet50", runs, smoke)


@row("analysis-vit", "responses + redundancy, vit_base_patch16_224, 256 images / bare forward passes", "at most 1.5")
def analysis_vit(runs: int, smoke: bool) -> Turns:
    """Of a transformer."""
    return analysis_turns("vit_base_patch16_224", runs, smoke)


def own_process(*words: str) -> float:
    """Run this file for one figure in a process of its own, and read what it prints last."""
    command = [sys.executable, __file__, "--one", *words]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_of(side: str, name: str, smoke: bool) -> float:
    """Give bytes: this process's peak after the forward passes or after the analysis, or the size of the moments."""
    import lfrns_hub as lfrns
    from lfrns_hub.taps import channel_count

    model, images = model_and_images(name, smoke)
    if side == "moments":
        groups = [g for g in lfrns.find_units(model, images[0][:1]) if g.exact and not g.frozen_reason]
        taps = {tap.module for group in groups for tap in group.taps}
        # Two parts of second moments in float64. Those that several consumers of one tensor share count for each here.
        return float(sum(16 * channel_count(model.get_submodule(tap)) ** 2 for tap in taps))
    if side == "ours":
        lfrns.analyse(model, [(batch, None) for batch in images], progress=False)
    else:
        forward(model, images)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's peak
    return 1024 * float(status.partition("VmHWM:")[2].split()[0])


def memory_turns(name: str, runs: int, smoke: bool) -> Turns:
    """Take the peak of both in processes of their own."""
    words = [name, *(["--smoke"] if smoke else [])]
    moments = own_process("peak", "moments", *words)
    calls = {
        "reference": lambda: own_process("peak", "reference", *words) + moments,
        "ours": lambda: own_process("peak", "ours", *words),
    }
    return turns(calls, min(runs, 2))  # bytes do not hang on how busy the machine is


@row("memory-resnet50", "peak memory of analyse, resnet50 / of the bare forward + weights + moments", "at most 1.15")
def memory_resnet50(runs: int, smoke: bool) -> Turns:
    """Of a convnet."""
    return memory_turns("resnet50", runs, smoke)


@row("memory-vit", "peak memory of analyse, vit_base / of the bare forward + weights + moments", "at most 1.15")
def memory_vit(runs: int, smoke: bool) -> Turns:
    """Of a transformer."""
    return memory_turns("vit_base_patch16_224", runs, smoke)


@row("slim-resnet50", "slim(fcr_steps=0), resnet50, 256 images / Torch-Pruning, Taylor, same images", "at most 1.0")
def slim_resnet50(runs: int, smoke: bool) -> Turns:
    """The whole call beside gradients over the same images, the dependency graph and one pruning at once."""
    import torch
    import torch.nn.functional as F
    import torch_pruning as tp

    import lfrns_hub as lfrns

    model, images = model_and_images("resnet50", smoke)
    labels = [torch.randint(model.num_classes, (len(batch),)) for batch in images]

    def taylor() -> None:
        pruned = model_and_images("resnet50", smoke)[0]
        for batch, label in zip(images, labels, strict=True):
            F.cross_entropy(pruned(batch), label).backward()
        pruner = tp.pruner.BasePruner(
            pruned, images[0][:1], tp.importance.GroupTaylorImportance(), pruning_ratio=0.3, global_pruning=True,
            ignored_layers=[pruned.get_classifier()],
        )  # fmt: skip
        pruner.step()

    def ours() -> None:
        lfrns.slim(model, list(zip(images, labels, strict=True)), macs=0.5, fcr_steps=0, progress=False)

    return turns({"reference": taylor, "ours": ours}, runs)


def slim_half(name: str, smoke: bool) -> tuple[Any, Any]:
    """Cut every group of a network to half, whatever the units are: what loads and runs does not hang on that."""
    import lfrns_hub as lfrns
    from lfrns_hub.surgery import cut

    model, images = model_and_images(name, smoke)
    groups = lfrns.find_units(model, images[0][:1])
    free = [group for group in groups if group.exact and not group.frozen_reason]
    return model, cut(model, groups, lfrns.SlimPlan({g.name: list(range(-(-g.size // 2))) for g in free}))


@row("load-resnet50", "loading a slim resnet50 / the dense one, from a folder", "at most 1.0")
def load_resnet50(runs: int, smoke: bool) -> Turns:
    """Timm's own loader for the dense one, and for the slim one as well."""
    import timm

    import lfrns_hub as lfrns

    dense, slim = slim_half("resnet50", smoke)
    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(dense, f"{folder}/dense")
        lfrns.save(slim, f"{folder}/slim", base="resnet50" if not smoke else "test_resnet")
        calls = {
            side: lambda side=side: timm.create_model(f"local-dir:{folder}/{side}", pretrained=True) and None
            for side in ("dense", "slim")
        }
        calls["ours"] = lambda: lfrns.load(f"{folder}/slim") and None
        found = turns(calls, runs + 1)
    return {
        "reference": found["dense"][1:],
        "ours": found["ours"][1:],
        "timm.create_model of it": found["slim"][1:],
    }


@row("import", "import lfrns_hub / import timm, transformers, in fresh processes", "at most 1.4")
def import_time(runs: int, smoke: bool) -> Turns:
    """The names that people import of transformers, which is lazy; registration included on our side."""
    code = {
        "reference": "import timm; from transformers import AutoConfig, AutoModelForImageClassification",
        "ours": "import lfrns_hub",
        "lfrns --help": "import sys; sys.argv = ['lfrns', '--help']; from lfrns_hub.cli import main; main()",
    }

    def start(text: str) -> None:
        subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)

    found = turns({name: lambda text=text: start(text) for name, text in code.items()}, runs + 1)
    return {name: values[1:] for name, values in found.items()}


def growth(runs: int, **twice: Any) -> Turns:
    """Time the analysis of a small convnet, and of one that is twice as large in one respect."""
    import torch
    from timm.models.resnet import BasicBlock, ResNet

    import lfrns_hub as lfrns

    def ours(images: int = 256, width: int = 64, depth: int = 3) -> float:
        torch.manual_seed(0)
        channels = (width, width, 2 * width, 2 * width)
        model = ResNet(BasicBlock, (depth,) * 4, num_classes=10, channels=channels, stem_width=width).eval()
        loader = [(torch.randn(32, 3, 64, 64), None) for _ in range(images // 32)]
        return steps_of(lfrns.analyse(model, loader, progress=False))

    ours()
    return turns({"reference": ours, "ours": lambda: ours(**twice)}, runs)


@row("growth-images", "responses + redundancy, images x2", "at most 2 (linear)")
def growth_images(runs: int, smoke: bool) -> Turns:
    """Twice the images."""
    return growth(runs, images=512)


@row("growth-width", "responses + redundancy, width x2 (MACs x4)", "at most 4 (quadratic)")
def growth_width(runs: int, smoke: bool) -> Turns:
    """Twice the width."""
    return growth(runs, width=128)


@row("growth-depth", "responses + redundancy, depth x2", "at most 2 (linear)")
def growth_depth(runs: int, smoke: bool) -> Turns:
    """Twice the depth."""
    return growth(runs, depth=6)


def ratio_of(values: list[float], reference: list[float]) -> list[float]:
    """Give the median of the turns' ratios, the lowest and the highest."""
    ratios = [one / other for one, other in zip(values, reference, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def measure(name: str, options: argparse.Namespace) -> None:
    """Measure one row, print it and keep it."""
    from lfrns_hub.measure.latency import _PACKAGES, _version, cpu_name

    what, wanted, function = rows[name]
    found = function(options.runs, options.smoke)
    ratios = {side: ratio_of(values, found["reference"]) for side, values in found.items() if side != "reference"}
    import torch

    content = {
        "what": what,
        "wanted": wanted,
        "turns": found,
        "ratios": ratios,
        "command": f"python benchmarks/speed.py --only {name} --runs {options.runs}",
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "versions": {package: _version(package) for package in (*_PACKAGES, "torch-pruning")},
        "smoke": options.smoke,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for side, ratio in ratios.items():
        print(f"{what} | {side}: {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f}), wanted {wanted}", flush=True)


def render(results: Path) -> str:
    """Lay all that was measured out as a page."""
    lines = [
        "# Speed",
        "",
        "Written by `python benchmarks/speed.py --render` from benchmarks/results/speed/*.json, which hold machine,",
        "versions, every turn and the command. Ratios of turns side by side in one run: median (lowest to highest).",
        'What was not run reads "not measured".',
        "",
        "| what / reference | ratio | wanted | median, reference | median, ours | turns | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (what, wanted, _) in rows.items():
        path = results / f"{name}.json"
        if not path.is_file():
            lines.append(f"| {what} | not measured | {wanted} | | | | |")
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        machine = f"{content['machine']['cpu']}, {content['machine']['threads']} threads"
        for side, (median, low, high) in content["ratios"].items():
            label = what + content.get("note", "") if side == "ours" else f"&nbsp;&nbsp;{side} / the same"
            reference, value = (statistics.median(content["turns"][s]) for s in ("reference", side))
            lines.append(
                f"| {label} | {median:.2f} ({low:.2f} to {high:.2f}) | {wanted if side == 'ours' else ''} | "
                f"{figure(reference)} | {figure(value)} | {len(content['turns'][side])} | {machine} |"
            )
    return "\n".join(lines + others(results)) + "\n"


def figure(value: float) -> str:
    """Write seconds, or bytes where they are many."""
    return f"{value / 2**20:.0f} MiB" if value > 1e6 else f"{value:.3g} s"


def others(results: Path) -> list[str]:
    """Add what the other benchmarks of speed have found."""
    found = {
        name: json.loads(path.read_text(encoding="utf-8")) if (path := results / f"{name}.json").is_file() else {}
        for name in ("fcr_step", "retraining", "latency_budget")
    }
    lines = ["", "## A step of the FCR gates / a plain training step (wanted: at most 1.10)", ""]
    lines += ["| model | batch | plain, ms | gates, ms | ratio | turns |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {o['model']} | {o['batch']} | {o['plain_ms']:.0f} | {o['gates_ms']:.0f} | {span(o['ratio'])} | "
        f"{o['runs']} |"
        for o in found["fcr_step"].values()
    ] or ["| not measured | | | | | |"]
    lines += ["", "## Retraining, images/s: ours / a plain fp32 Accelerate loop with PIL (wanted: at least 2.0)", ""]
    lines += ["| model | batch | ours | plain | ratio | turns |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {o['batch']} | {o['images_per_second']['ours']:.1f} | {o['images_per_second']['plain']:.1f} | "
        f"{span(o['ratio'])} | {o['runs']} |"
        for name, o in found["retraining"].get("cases", {}).items()
    ] or ["| not measured | | | | | |"]
    lines += ["", "## Speed-up, batch 1, timed again in a new process", ""]
    lines += ["Wanted: at `latency=0.5` 1.95x, within 3 % of the budget; at `macs=0.5` 1.75x.", ""]
    lines += ["| model | budget | dense, ms | slim, ms | slim / dense (quartiles) | speed-up | off the budget | MACs |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for one in found["latency_budget"] or []:
        again, (kind, asked) = one["again"], next(iter(one["budget"].items()))
        off = "" if one["error_pct"] is None else f"{one['error_pct']:+.1f} %"
        low, middle, high = again["quartiles"]
        lines.append(
            f"| {one['model']} | {kind} {asked:g}, round_to {one['round_to']} "
            f"| {again['dense_ms']:.1f} | {again['slim_ms']:.1f} | {middle:.3f} "
            f"({low:.3f} to {high:.3f}) | {one['speedup']:.2f}x | {off} | {one['macs_fraction']:.3f} |"
        )
    return lines


def span(ratio: list[float]) -> str:
    """Write a median with the lowest and the highest."""
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def main() -> None:
    """Measure what is wanted and not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", metavar="GLOB", default=["*"], help="rows by name (default: all)")
    add("--runs", type=int, default=5, help="turns of each row (default: %(default)s)")
    add("--again", action="store_true", help="also rows that are there")
    add("--smoke", action="store_true", help="tiny networks, one look at the path; figures mean nothing")
    add("--results", type=Path, default=RESULTS, help="where rows are kept (default: beside this file)")
    add("--render", action="store_true", help="write docs/speed.md from what is there and stop")
    add("--list", action="store_true", help="name the rows and stop")
    add("--one", nargs=3, metavar=("KIND", "SIDE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(peak_of(options.one[1], options.one[2], options.smoke))
    elif options.render:
        DOCUMENT.write_text(render(options.results), encoding="utf-8")
    elif options.list:
        print("\n".join(rows))
    else:
        for name in rows:
            if any(fnmatchcase(name, glob) for glob in options.only):
                if name == "slim-resnet50" and importlib.util.find_spec("torch_pruning") is None:
                    print(f"{name}: needs Torch-Pruning, pip install '.[bench]'", flush=True)
                elif options.again or not (options.results / f"{name}.json").is_file():
                    measure(name, options)


if __name__ == "__main__":
    main()
