"""Rows of benchmarks/speed.py: what a slim model, and the package, take to load, and what a slim model runs at."""

import functools
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from networks import BATCH, RESNET, VIT, network, noise
from turns import Turns, row, run_turns, wait


def slim_half(model: Any, image: Any) -> Any:
    """Cut every group of a network to half, whatever the units are: how it loads does not hang on that."""
    import lfrns_hub as lfrns
    from lfrns_hub.surgery import cut

    groups = lfrns.find_units(model, image)
    free = [group for group in groups if group.exact and not group.frozen_reason]
    return cut(model, groups, lfrns.SlimPlan({g.name: list(range(-(-g.size // 2))) for g in free}))


def load_turns(
    model: Any, image: Any, write: Callable[[Any, str], Any], library: str, read: Callable[[str], Any], runs: int
) -> Turns:
    """Time the library's own loader for the dense model, ours for the slim one, and the library's for the slim one."""
    import lfrns_hub as lfrns

    with tempfile.TemporaryDirectory() as folder:
        dense, slim = f"{folder}/dense", f"{folder}/slim"
        write(model, dense)
        lfrns.save(slim_half(model, image), slim)
        calls = {
            "reference": lambda: read(dense),
            "ours": lambda: lfrns.load(slim),
            f"{library} of it": lambda: read(slim),
        }
        return run_turns(calls, runs, warmup=1)


def timm_load_turns(name: str, options: Namespace) -> Turns:
    """Load a model of timm's from folders."""
    import timm

    def read(folder: str) -> Any:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)

    model, image = network(name, options), noise(options, 1)[0]
    return load_turns(model, image, timm.models.save_for_hf, "timm.create_model", read, options.runs)


@row("load-resnet50", "loading a slim resnet50 / the dense one, from a folder", "at most 1.0")
def load_resnet50(options: Namespace) -> Turns:
    """Of a convnet."""
    return timm_load_turns(RESNET, options)


@row("load-vit", "loading a slim vit_base_patch16_224 / the dense one, from a folder", "at most 1.0")
def load_vit(options: Namespace) -> Turns:
    """Of a transformer."""
    return timm_load_turns(VIT, options)


@row("load-transformers-vit", "loading a slim ViT-B of transformers / the dense one, from a folder", "at most 1.0")
def load_transformers_vit(options: Namespace) -> Turns:
    """Of transformers, whose own loader maps the file and reads nothing."""
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = ViTConfig(num_labels=1000, **({**small, "image_size": 160} if options.smoke else {}))
    model, image = ViTForImageClassification(config).eval(), noise(options, 1)[0]
    write, read = ViTForImageClassification.save_pretrained, AutoModelForImageClassification.from_pretrained
    return load_turns(model, image, write, "from_pretrained", read, options.runs)


def throughput_turns(name: str, batch: int, options: Namespace) -> Turns:
    """Time a forward pass of both in bfloat16 and the layout that suits them, many passes a turn."""
    import torch

    import lfrns_hub as lfrns
    from lfrns_hub.model_io.model import memory_format_of

    model, calibration = network(name, options), noise(options, BATCH)
    slim = lfrns.slim(model, calibration, macs=0.5, fcr_steps=0, fold=False, progress=False).model
    layout, passes = memory_format_of(model), 3 if options.smoke else 30
    images = torch.cat([calibration[0]] * -(-batch // BATCH))[:batch].to(torch.bfloat16, memory_format=layout)

    def call(side: Any) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            for _ in range(passes):
                side(images)
        wait(options.device)
        return (time.perf_counter() - began) / passes

    sides = {key: one.to(torch.bfloat16, memory_format=layout) for key, one in (("reference", model), ("ours", slim))}
    calls = {key: lambda side=side: call(side) for key, side in sides.items()}
    return run_turns(calls, options.runs, warmup=1, device=options.device)


for _name, _title in ((RESNET, "resnet50"), (VIT, "vit")):
    for _batch in (1, 256):
        row(
            f"throughput-{_title}-{_batch}",
            f"forward pass of {_name} slimmed by `macs=0.5` / dense, bfloat16, batch {_batch}",
            "printed",
            devices=("cuda",),
            batch=_batch,
        )(functools.partial(throughput_turns, _name, _batch))


@row("import", "import lfrns_hub / import timm, transformers, in fresh processes", "at most 1.4")
def import_time(options: Namespace) -> Turns:
    """The names that people import of transformers, which is lazy; registration included on our side."""
    code = {
        "reference": "import timm; from transformers import AutoConfig, AutoModelForImageClassification",
        "ours": "import lfrns_hub",
        "lfrns --help": "import sys; sys.argv = ['lfrns', '--help']; from lfrns_cli import main; main()",
    }

    def start(text: str) -> None:
        subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)

    calls = {name: lambda text=text: start(text) for name, text in code.items()}
    return run_turns(calls, options.runs, warmup=1)
