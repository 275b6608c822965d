"""Every way into a checkpoint, as a program for a fresh process: how far the logits of each lie from the saved ones.

    python tests/ways_in.py JOBS.json

JOBS.json holds `{"package": bool, "jobs": [{"source", "revision", "answers", "library"}]}`: with `package` false
lfrns_hub cannot be imported. `answers` is a safetensors file of images and logits. Prints one JSON object.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Run a model in eval mode."""
    with torch.no_grad():
        output = model.eval()(images)
    return output if isinstance(output, Tensor) else output.logits


def ways(source: str, revision: str | None, library: str, package: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name every way into one checkpoint, with a call that gives the model, or a pipeline around it."""
    from transformers import AutoModelForImageClassification, pipeline

    if package:
        import timm

        import lfrns_hub  # before transformers opens anything: it registers our types
    at = {"revision": revision} if revision else {}
    trust = {} if package else {"trust_remote_code": True}
    yield (
        "AutoModelForImageClassification",
        lambda: AutoModelForImageClassification.from_pretrained(source, **at, **trust),
    )
    yield "pipeline", lambda: pipeline("image-classification", model=source, **at, **trust)
    if package:
        yield "lfrns_hub.load", lambda: lfrns_hub.load(source, revision=revision)
        if library == "timm":
            name = f"local-dir:{source}" if os.path.isdir(source) else f"hf-hub:{source}"
            name += f"@{revision}" if revision else ""
            yield "timm.create_model", lambda: timm.create_model(name, pretrained=True)


def distance(found: Any, saved: dict[str, Tensor]) -> float:
    """Return the largest difference of the logits; a pipeline must also answer as its model does."""
    if not isinstance(found, nn.Module):
        picture = Image.effect_noise((40, 40), 60).convert("RGB")
        inputs = found.image_processor(picture, return_tensors="pt")
        best = logits(found.model, inputs["pixel_values"]).softmax(-1).max()
        told = found(picture, top_k=1)[0]["score"]
        if abs(told - float(best)) > 1e-5:
            raise AssertionError(f"the pipeline says {told}, its model {float(best)}")
        found = found.model
    return float((logits(found, saved["images"]) - saved["logits"]).abs().max())


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    if not task["package"]:
        sys.modules["lfrns_hub"] = None  # importing it raises ImportError
    torch.set_num_threads(1)
    print(json.dumps({
        f"{job['source']}@{job['revision'] or ''} {name}": distance(call(), load_file(job["answers"]))
        for job in task["jobs"]
        for name, call in ways(job["source"], job["revision"], job["library"], task["package"])
    }))  # fmt: skip
