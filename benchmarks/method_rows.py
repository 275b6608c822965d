"""Rows of benchmarks/speed.py: what the method costs, in time and memory."""

import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from networks import RESNET, VIT, model_and_images, network
from turns import EVERYWHERE, Turns, row, run_turns


def forward(model: Any, images: list[Any]) -> None:
    """Run bare forward passes."""
    import torch

    with torch.no_grad():
        for batch in images:
            model(batch)


def settled(options: Namespace) -> dict[str, Any]:
    """Return how turns are taken on a device: a GPU has kernels to choose and memory to get in the first."""
    return {"device": options.device, "warmup": int(options.device != "cpu")}


def steps_of(analysis: Any) -> float:
    """Return the seconds of responses and redundancy."""
    return analysis.seconds["responses"] + analysis.seconds["redundancy"]


def analysis_turns(name: str, options: Namespace) -> Turns:
    """Time responses and redundancy beside the forward passes over the same images, in both layouts of a convnet."""
    import torch

    import lfrns_hub as lfrns

    model, images = model_and_images(name, options)
    loader = [(batch, None) for batch in images]
    last = network(name, options).to(memory_format=torch.channels_last)
    calls = {
        "reference": lambda: forward(model, images),
        "reference, channels last": lambda: forward(last, images),
        "ours": lambda: steps_of(lfrns.analyse(model, loader, progress=False)),
    }
    if "vit" in name:
        del calls["reference, channels last"]  # one layer has a kernel
    return run_turns(calls, options.runs, **settled(options))


@row(
    "analysis-resnet50",
    "responses + redundancy, resnet50, 256 images / bare forward passes",
    "at most 1.5",
    devices=EVERYWHERE,
)
def analysis_resnet50(options: Namespace) -> Turns:
    """Of a convnet."""
    return analysis_turns(RESNET, options)


@row(
    "analysis-vit",
    "responses + redundancy, vit_base_patch16_224, 256 images / bare forward passes",
    "at most 1.5",
    devices=EVERYWHERE,
)
def analysis_vit(options: Namespace) -> Turns:
    """Of a transformer."""
    return analysis_turns(VIT, options)


def proof_turns(name: str, options: Namespace) -> Turns:
    """Time the proof of one plan of all exact groups beside the forward passes that the analysis needs anyway."""
    import torch

    from lfrns_hub.self_check import CheckReport, Proof, narrowing, random_plan, settled_trace

    model, images = model_and_images(name, options)
    example = images[0][:1]
    groups = narrowing(model, settled_trace(model, example).groups, example)
    free = [group for group in groups if group.exact and group.frozen_reason is None]
    plan = random_plan(free, torch.Generator().manual_seed(0))

    def prove() -> None:
        if refuted := Proof(model, groups, example).refuted(plan, CheckReport()):
            raise RuntimeError(f"the plan was refuted: {refuted}")

    return run_turns({"reference": lambda: forward(model, images), "ours": prove}, options.runs)


@row("proof-resnet50", "proof of the plan that is cut, resnet50 / bare forward passes of 256 images", "")
def proof_resnet50(options: Namespace) -> Turns:
    """Of a convnet."""
    return proof_turns(RESNET, options)


@row("proof-vit", "proof of the plan that is cut, vit_base_patch16_224 / bare forward passes of 256 images", "")
def proof_vit(options: Namespace) -> Turns:
    """Of a transformer."""
    return proof_turns(VIT, options)


def own_process(*words: str) -> float:
    """Run speed.py for one figure in a process of its own, and read what it prints last."""
    command = [sys.executable, str(Path(__file__).with_name("speed.py")), "--one", *words]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_of(side: str, name: str, options: Namespace) -> float:
    """Give bytes: this process's peak after the forward passes or the analysis, or the size of weights and moments."""
    import lfrns_hub as lfrns

    model, images = model_and_images(name, options)
    if side == "kept":
        moments = lfrns.analyse(model, [batch[:2] for batch in images[:5]], progress=False).moments
        squares = {m.square.data_ptr(): m.square.nbytes for m in moments.values()}  # readers of one tensor share them
        return float(sum(squares.values()) + sum(parameter.nbytes for parameter in model.parameters()))
    if side == "ours":
        lfrns.analyse(model, [(batch, None) for batch in images], progress=False)
    else:
        forward(model, images)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's peak
    return 1024 * float(status.partition("VmHWM:")[2].split()[0])


def memory_turns(name: str, options: Namespace) -> Turns:
    """Take the peak of both in processes of their own; the analysis works on a copy of the weights."""
    words = [name, *(["--smoke"] if options.smoke else [])]
    kept = own_process("peak", "kept", *words)
    calls = {
        "reference": lambda: own_process("peak", "reference", *words) + kept,
        "ours": lambda: own_process("peak", "ours", *words),
    }
    return run_turns(calls, min(options.runs, 2))  # bytes do not hang on how busy the machine is


@row("memory-resnet50", "peak memory of analyse, resnet50 / of the bare forward + weights + moments", "at most 1.15")
def memory_resnet50(options: Namespace) -> Turns:
    """Of a convnet."""
    return memory_turns(RESNET, options)


@row("memory-vit", "peak memory of analyse, vit_base / of the bare forward + weights + moments", "at most 1.15")
def memory_vit(options: Namespace) -> Turns:
    """Of a transformer."""
    return memory_turns(VIT, options)


@row(
    "slim-resnet50",
    "slim(fcr_steps=0), resnet50, 256 images / Torch-Pruning, Taylor, same images",
    "at most 1.0",
    devices=EVERYWHERE,
)
def slim_resnet50(options: Namespace) -> Turns:
    """The whole call beside gradients over the same images, the dependency graph and one pruning at once."""
    import torch
    import torch.nn.functional as F
    import torch_pruning as tp

    import lfrns_hub as lfrns

    model, images = model_and_images(RESNET, options)
    labels = [torch.randint(model.num_classes, (len(batch),), device=options.device) for batch in images]

    def taylor() -> None:
        pruned = network(RESNET, options)
        for batch, label in zip(images, labels, strict=True):
            F.cross_entropy(pruned(batch), label).backward()
        pruner = tp.pruner.BasePruner(
            pruned, images[0][:1], tp.importance.GroupTaylorImportance(), pruning_ratio=0.3, global_pruning=True,
            ignored_layers=[pruned.get_classifier()],
        )  # fmt: skip
        pruner.step()

    def ours(fold: bool) -> None:
        lfrns.slim(model, list(zip(images, labels, strict=True)), macs=0.5, fcr_steps=0, fold=fold, progress=False)

    calls = {"reference": taylor, "ours": partial(ours, True), "without the fold": partial(ours, False)}
    return run_turns(calls, options.runs, **settled(options))


def growth(options: Namespace, *twice: str, images: int = 256) -> Turns:
    """Time the analysis of a small convnet, and of one that is twice as large in one respect."""
    import torch
    from timm.models.resnet import BasicBlock, ResNet

    import lfrns_hub as lfrns

    least = {"images": 32, "width": 8, "depth": 1} if options.smoke else {"images": images, "width": 64, "depth": 3}

    def ours(images: int, width: int, depth: int) -> float:
        torch.manual_seed(0)
        channels = (width, width, 2 * width, 2 * width)
        model = ResNet(BasicBlock, (depth,) * 4, num_classes=10, channels=channels, stem_width=width).eval()
        loader = [(torch.randn(32, 3, 64, 64), None) for _ in range(images // 32)]
        return steps_of(lfrns.analyse(model, loader, progress=False))

    larger = least | {key: 2 * least[key] for key in twice}
    return run_turns({"reference": lambda: ours(**least), "ours": lambda: ours(**larger)}, options.runs, warmup=1)


@row("growth-images", "responses + redundancy, images x2 (1,024 to 2,048)", "at most 2 (linear)")
def growth_images(options: Namespace) -> Turns:
    """Twice the images, costs measured with both."""
    return growth(options, "images", images=1024)


@row("growth-few-images", "the same, 256 to 512: costs measured, no longer estimated", "at most 2 (linear)")
def growth_few_images(options: Namespace) -> Turns:
    """Twice the images, where that changes how costs are found."""
    return growth(options, "images")


@row("growth-width", "responses + redundancy, width x2 (MACs x4)", "at most 4 (quadratic)")
def growth_width(options: Namespace) -> Turns:
    """Twice the width."""
    return growth(options, "width")


@row("growth-depth", "responses + redundancy, depth x2", "at most 2 (linear)")
def growth_depth(options: Namespace) -> Turns:
    """Twice the depth."""
    return growth(options, "depth")
