"""How the time, memory and traffic of `slim` grow with processes, images and width; docs/scaling.md has the formulas.

    python benchmarks/scaling.py

Each row runs in fresh processes, one thread each, on pictures of noise: what they show changes neither time nor memory.
Printed: seconds of each step of `slim`, the peak resident memory of the first process, less what importing took, and
the bytes that this process hands to all-reduce. Processes that share cores do not run faster for being more.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

LARGE = ("resnet50", "vit_base_patch16_224", "vit_large_patch16_224")
BASE = {"processes": 1, "images": 512, "width": 192}
LADDERS = {"processes": (1, 2, 4), "images": (512, 1024, 2048), "width": (96, 192, 384)}
RESULTS = Path(__file__).parent / "results" / "scaling.json"
STEPS = ("responses", "redundancy", "FCR gates", "cut and fold")


def measure_one(images: int, width: int, out: Path) -> None:
    """Slim a ViT of 32x32 pictures on this process, or on as many as were launched, and write what it took."""
    import timm
    import torch
    from torch.utils.data import DataLoader

    import lfrns_hub as lfrns
    from lfrns_hub.measure import count_params
    from lfrns_hub.retrain import make_accelerator

    torch.set_num_threads(1)
    accelerator, sent = make_accelerator(cpu=True), 0
    plain_reduce = accelerator.reduce

    def counted(tensor: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        nonlocal sent
        sent += tensor.numel() * tensor.element_size()
        return plain_reduce(tensor, *args, **options)

    accelerator.reduce = counted
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=width, num_heads=width // 32, depth=6,
        num_classes=10,
    ).eval()  # fmt: skip
    loader = DataLoader(torch.randn(images, 3, 32, 32), 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = lfrns.slim(model, loader, macs=0.5, fcr_steps=20, accelerator=accelerator, progress=False)
    if accelerator.is_main_process:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = {
            "seconds": result.report.seconds,
            "memory_mib": (peak - before) / 1024,
            "reduced_mib": sent / 2**20 if accelerator.num_processes > 1 else 0.0,
            "params_m": count_params(model) / 1e6,
        }
        out.write_text(json.dumps(row))
    accelerator.end_training()


def launch(processes: int, images: int, width: int) -> dict[str, object]:
    """Measure in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--multi_gpu"] if processes > 1 else ["--cpu"]  # how accelerate 1.15 starts several on a CPU
        command += [__file__, "--one", "--images", str(images), "--width", str(width), "--out", str(out)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        return json.loads(out.read_text())


def size_up(name: str) -> dict[str, object]:
    """Count, on the meta device, what `slim` keeps and sends of a large model by the formulas of docs/scaling.md."""
    import timm
    import torch

    import lfrns_hub as lfrns
    from lfrns_hub.measure import count_macs, count_params
    from lfrns_hub.method.taps import channel_count

    with torch.device("meta"):
        model = timm.create_model(name).eval()
    example = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    groups = [g for g in lfrns.find_units(model, example) if g.frozen_reason is None and g.exact]
    widths = [channel_count(model.get_submodule(tap)) for tap in {tap.module for g in groups for tap in g.taps}]
    return {
        "model": name,
        "gmacs": count_macs(model, example) / 1e9,
        "params_m": count_params(model) / 1e6,
        "groups": len(groups),
        "units": sum(g.size for g in groups),
        "taps": len(widths),
        "moments_mib": sum(16 * (d * d + d + 1) for d in widths) / 2**20,
    }


def main() -> None:
    """Size the large models up, then climb each ladder, all else at the base."""
    from rich.console import Console
    from rich.table import Table

    large = Table("model", "GMACs", "params, M", "groups", "units", "taps", "moments, MiB")
    sizes = [size_up(name) for name in LARGE]
    for size in sizes:
        name, gmacs, params, *counts, moments = size.values()
        large.add_row(str(name), f"{gmacs:.1f}", f"{params:.1f}", *map(str, counts), f"{moments:.0f}")
    Console(width=120).print(large)
    table = Table("what grows", "to", *(f"{step}, s" for step in STEPS), "memory, MiB", "all-reduced, MiB", "params, M")
    rows = []
    for name, values in LADDERS.items():
        for value in values:
            row = launch(**BASE | {name: value})
            rows.append({"grows": name, "to": value, **row})
            seconds = [f"{row['seconds'].get(step, 0):.1f}" for step in STEPS]
            table.add_row(
                name,
                str(value),
                *seconds,
                f"{row['memory_mib']:.0f}",
                f"{row['reduced_mib']:.0f}",
                f"{row['params_m']:.2f}",
            )
    Console(width=120).print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"large": sizes, "ladders": rows}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        measure_one(asked.images, asked.width, asked.out)
    else:
        main()
