"""Measured speed-up of models slimmed to a latency and to a MACs budget, timed again in a new process.

    python benchmarks/latency_budget.py resnet50 vit_base_patch16_224 mobilenetv3_large_100 --latency 0.5 --images 32

Weights are random, for time does not depend on them; so nothing is learned here of accuracy. Units are ranked by
the cost of merging, without gates and fold. Writes results/speed/latency_budget.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import lfrns_hub as lfrns
from lfrns_hub.measure import describe_setup, forward_passes, take_turns

OUT = Path(__file__).parent / "results" / "speed" / "latency_budget.json"


def random_model(name: str) -> nn.Module:
    """Build the dense model, the same in every process."""
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def time_again(name: str, folder: str, setup: lfrns.LatencySetup, runs: int) -> dict[str, Any]:
    """Time a checkpoint against its dense model: quartiles of the ratio of each turn, and median milliseconds."""
    models = {"dense": random_model(name), "slim": lfrns.load(folder).eval()}
    images = torch.randn(setup.batch, 3, 224, 224)
    describe = describe_setup(models["dense"], images, torch.device("cpu"))
    if setup.dtype:
        models, images = {key: model.to(setup.dtype) for key, model in models.items()}, images.to(setup.dtype)
    if setup.compile:
        models = {key: torch.compile(model, dynamic=False) for key, model in models.items()}
    with setup.running():
        times = take_turns(forward_passes(models, images), runs=runs, warmup=5)
    ratios = [slim / dense for dense, slim in zip(times["dense"], times["slim"], strict=True)]
    return {
        "fraction": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4),
        "dense_ms": statistics.median(times["dense"]),
        "slim_ms": statistics.median(times["slim"]),
        "setup": describe,
    }


def slim_and_time(analysis: Any, name: str, budget: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Cut to one budget, save, time in a new process."""
    setup, started = setup_of(args), time.perf_counter()
    latency = {"latency_setup": setup} if "latency" in budget else {}
    result = analysis.cut(**budget, **latency, fcr_steps=0, fold=False, round_to=args.round_to)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        lfrns.save(result.model, folder)
        command = [sys.executable, __file__, name, "--again", folder, *same_setup(args)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    again = json.loads(done.stdout.splitlines()[-1])
    report, (kind, asked) = result.report, next(iter(budget.items()))
    return {
        "model": name,
        "budget": budget,
        "round_to": args.round_to,
        "macs_fraction": report.macs_fraction,
        "latency_fraction_in_search": report.latency_fraction,
        "again": again,
        "speedup": 1 / again["fraction"],
        "error_pct": 100 * (again["fraction"] / asked - 1) if kind == "latency" else None,
        "cut_seconds": seconds,
        "widths": {group.name: [group.kept_units, group.dense_units] for group in report.groups},
        "layers": report.latency and report.latency["layers"],
    }


def setup_of(args: argparse.Namespace) -> lfrns.LatencySetup:
    """Read the setup off the command line."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return lfrns.LatencySetup(batch=args.batch, dtype=dtype, threads=args.threads, compile=args.compile)


def same_setup(args: argparse.Namespace) -> list[str]:
    """Return the options that let another process time alike."""
    options = ["--batch", str(args.batch), "--runs", str(args.runs)]
    options += ["--threads", str(args.threads)] if args.threads else []
    options += ["--dtype", args.dtype] if args.dtype else []
    return [*options, "--compile"] if args.compile else options


def print_row(row: dict[str, Any]) -> None:
    """Print what one model and budget gave."""
    again = row["again"]
    low, middle, high = again["quartiles"]
    error = "" if row["error_pct"] is None else f", {row['error_pct']:+.1f} % off the budget"
    print(f"{row['model']} {row['budget']}, round_to={row['round_to']}")
    print(f"  {again['dense_ms']:.1f} ms to {again['slim_ms']:.1f} ms; MACs kept {row['macs_fraction']:.3f}")
    print(f"  ratio {middle:.4f} ({low:.4f} to {high:.4f}), {row['speedup']:.3f}x{error}")
    print("  widths:", ", ".join(f"{n} {kept}/{size}" for n, (kept, size) in row["widths"].items()), flush=True)


def keep(row: dict[str, Any]) -> None:
    """Keep a row, in place of an earlier one of the same model and budget."""
    rows = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else []
    same = ("model", "budget", "round_to")
    rows = [one for one in rows if any(one[key] != row[key] for key in same)]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Slim each model to each budget and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--latency", type=float, help="budget of latency")
    parser.add_argument("--macs", type=float, help="budget of MACs, a row of its own")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--round-to", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--runs", type=int, default=60, help="timed passes of each model in the new process")
    parser.add_argument("--again", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.again:
        print(json.dumps(time_again(args.models[0], args.again, setup_of(args), args.runs)))
        return
    for name in args.models:
        dense = random_model(name)
        batches = list(torch.randn(args.images, 3, 224, 224).split(8))
        analysis = lfrns.analyse(dense, batches, progress=False)
        for budget in ({"latency": args.latency}, {"macs": args.macs}):
            if None in budget.values():
                continue
            row = slim_and_time(analysis, name, budget, args)
            print_row(row)
            keep(row)


if __name__ == "__main__":
    main()
