"""A step of `retrain` on a GPU, loader included, beside the same step captured by hand on tensors that lie there.

    python benchmarks/gpu_retraining.py [--data-dir DIR] [--model cifar_resnet56] [--batch 128 512] [--workers 12]

All with a teacher, in bf16 and channels_last, by SGD with Nesterov momentum, fused: (a) the step by hand, captured as a
CUDA graph and replayed on one batch of noise; (b) the same step by hand, launched kernel by kernel; (c) `retrain` with
`load_data`, `make_transform` and a DataLoader; (d) the same with compile=False; (e) as (c), and the teacher's last
feature map is learned too. They run in turns in one program. Without --data-dir the pictures are noise.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from retraining import machine, write_noise
from torch import nn
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub.pictures import load_data, make_transform
from lfrns_hub.trace import trace_model

RESULTS = Path(__file__).parent / "results" / "speed" / "gpu_retraining.json"
WARM_UP = 20  # steps


def by_hand(model: nn.Module, teacher: nn.Module, batch: int, steps: int, *, capture: bool) -> float:
    """Return the seconds of a step on one batch of noise that lies on the GPU."""
    model = copy.deepcopy(model).cuda().to(memory_format=torch.channels_last).train()
    teacher = copy.deepcopy(teacher).cuda().to(memory_format=torch.channels_last).eval()
    images = torch.randn(batch, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device="cuda") % 10
    rate = torch.tensor(1e-3, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(images).float()
            with torch.no_grad():
                taught = teacher(images).float()
        student, target = F.log_softmax(logits / 4, 1), F.log_softmax(taught / 4, 1)
        soft = F.kl_div(student, target, reduction="batchmean", log_target=True)
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * 16 * soft
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    run: Callable[[], Any] = step
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def by_retrain(model: nn.Module, teacher: nn.Module, loader: DataLoader, **options: Any) -> float:
    """Return the seconds of a step of `retrain`; the first steps are not counted."""
    AcceleratorState._reset_state(True)
    ends: list[float] = []
    lfrns.retrain(
        copy.deepcopy(model), loader, epochs=1, teacher=teacher, optimizer="sgd", learning_rate=1e-3, progress=False,
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
        tracker=lambda *_: ends.append(time.perf_counter()), **options,
    )  # fmt: skip
    return (ends[-1] - ends[WARM_UP - 1]) / (len(ends) - WARM_UP)


def measure(name: str, batch: int, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Time all ways in turns: the median seconds of a step of each, and the ratio of each turn to the captured one."""
    torch.manual_seed(0)
    teacher = timm.create_model(name, num_classes=10).eval()
    model = copy.deepcopy(teacher)
    groups = trace_model(teacher, torch.zeros(1, 3, 32, 32)).groups
    model.lfrns_provenance = {"plan": {group.name: list(range(group.size)) for group in groups}}  # nothing is cut
    count = batch * (options.steps + WARM_UP)
    data = load_data(folder, "train", transform=make_transform(teacher, train=True), limit=count)
    data = torch.utils.data.Subset(data, [index % len(data) for index in range(count)])
    loader = DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=options.workers)
    ways: dict[str, Callable[[], float]] = {
        "by hand, captured": lambda: by_hand(teacher, teacher, batch, options.steps, capture=True),
        "by hand": lambda: by_hand(teacher, teacher, batch, options.steps, capture=False),
        "retrain": lambda: by_retrain(model, teacher, loader),
        "retrain, compile=False": lambda: by_retrain(model, teacher, loader, compile=False),
        "retrain, features too": lambda: by_retrain(model, teacher, loader, feature_weight=1.0),
    }
    if not torch.cuda.is_available():  # the script can be tried here
        ways = {way: take for way, take in ways.items() if way.startswith("retrain")}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.turns):
        for way, take in ways.items():
            seconds[way].append(take())
            print(f"{name}, batch {batch}, {way}: {seconds[way][-1] * 1e3:.2f} ms", flush=True)
    first = next(iter(ways))
    return {
        "milliseconds": {way: statistics.median(found) * 1e3 for way, found in seconds.items()},
        f"ratio to {first}": {
            way: statistics.median(a / b for a, b in zip(found, seconds[first], strict=True))
            for way, found in seconds.items()
        },
        "workers": options.workers,
        "turns": options.turns,
        "steps": options.steps,
        "machine": machine(),
    }


def closeness(name: str, folder: str, steps: int = 30) -> dict[str, float]:
    """Return how far recorded steps end from plain ones in float32, over the distance travelled; plain ones beside."""
    torch.manual_seed(0)
    start = timm.create_model(name, num_classes=10)
    teacher = copy.deepcopy(start).eval()
    data = load_data(folder, "train", transform=make_transform(start, train=True), limit=128 * steps)
    loader = DataLoader(data, 128, shuffle=True, drop_last=True)
    ends = []
    for compile in (False, False, "auto"):
        AcceleratorState._reset_state(True)
        model = copy.deepcopy(start)
        lfrns.retrain(
            model, loader, epochs=1, teacher=teacher, compile=compile, mixed_precision="no", learning_rate=1e-3,
            progress=False,
        )  # fmt: skip
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach().cpu())
    moved = (ends[0] - nn.utils.parameters_to_vector(start.parameters()).detach()).norm()
    apart = {"plain again": ends[1], "recorded": ends[2]}
    return {what: float((end - ends[0]).norm() / moved) for what, end in apart.items()}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="CIFAR-10 as parquet, for instance")
    parser.add_argument("--model", default="cifar_resnet56")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--workers", type=int, default=12, help="of the loader (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help="counted of each turn")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"cases": {}}
    with tempfile.TemporaryDirectory() as noise:
        folder = options.data_dir or noise
        if options.data_dir is None:
            write_noise(Path(noise), 32, 1024)
        for batch in options.batch:
            content["cases"][f"{options.model}, batch {batch}"] = measure(options.model, batch, options, folder)
            options.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        content["apart"] = closeness(options.model, folder)
        options.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
