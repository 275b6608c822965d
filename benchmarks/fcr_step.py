"""What a step of the FCR gates costs beside a plain training step of the same model on the same batch.

    python benchmarks/fcr_step.py [MODEL ...] [--batch 16] [--runs 7]

Both run in turns, in float32 and in the memory format of the model. The plain step is a forward pass in training mode,
cross-entropy, the backward pass to all weights and SGD with momentum. The gates' step is that of `slim`: half of each
group is its pruning set, with stand-ins, and the dense model's answers are known, as they are after the first round.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from lfrns_hub.measure import describe_setup, take_turns
from lfrns_hub.method.fcr import GateTraining
from lfrns_hub.method.responses import collect
from lfrns_hub.model_io.model import analysis_copy, memory_format_of
from lfrns_hub.trace import trace_model

RESULTS = Path(__file__).parent / "results" / "speed" / "fcr_step.json"
MODELS = ("resnet50", "vit_base_patch16_224")
WARMUP = 2


def time_fcr_step(name: str, batch: int = 16, runs: int = 7) -> dict[str, Any]:
    """Time both steps in turns.

    Args:
        name: Of timm, with random weights.
        batch: Images a step.
        runs: Timed turns.
    Returns:
        Medians in milliseconds, and the ratio gates' step over plain step of each turn as [median, lowest, highest].
    """
    torch.manual_seed(0)
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    images, labels = torch.randn(batch, *size), torch.randint(model.num_classes, (batch,))

    dense = analysis_copy(model, "cpu")
    groups = [g for g in trace_model(dense, images[:1]).groups if g.exact and not g.frozen_reason and g.size > 1]
    taps = list(dict.fromkeys(tap.module for group in groups for tap in group.taps))
    moments = collect(dense, taps, [(images, labels)], macs=1e9, seed=0)
    keep = {group.name: list(range(0, group.size, 2)) for group in groups}
    gates = GateTraining(dense, groups, keep, [(images, labels)], moments)

    layout = memory_format_of(model)
    images = images.contiguous(memory_format=layout)
    model.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def plain() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    times = take_turns({"plain": plain, "gates": gates.step}, runs=runs, warmup=WARMUP)
    ratios = [gated / bare for gated, bare in zip(times["gates"], times["plain"], strict=True)]
    return {
        "model": name,
        "batch": batch,
        "plain_ms": statistics.median(times["plain"]),
        "gates_ms": statistics.median(times["gates"]),
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "runs": runs,
        "setup": describe_setup(model, images, torch.device("cpu")),
    }


def main() -> None:
    """Time, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    for name in options.models:
        timing = time_fcr_step(name, options.batch, options.runs)
        steps = f"plain step {timing['plain_ms']:.0f} ms, FCR step {timing['gates_ms']:.0f} ms"
        ratio, lowest, highest = timing["ratio"]
        print(f"{name}, batch {options.batch}: {steps}, ratio {ratio:.2f} ({lowest:.2f} to {highest:.2f})", flush=True)
        content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(content | {name: timing}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
