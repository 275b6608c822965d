"""The smallest job of a tool that other people's environments hold, beside ours in one process.

    python tests/beside.py modelopt | optimum_intel | llmcompressor

Each slims a tiny ViT of transformers, does the tool's job on it or on its like, and prints one line.
"""

import sys
import tempfile

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

import lfrns_hub as lfrns

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "num_labels": 3}  # fmt: skip
IMAGES = torch.randn(16, 3, 32, 32)


def dense() -> nn.Module:
    """Make a tiny ViT."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)).eval()


def slim(folder: str) -> nn.Module:
    """Make it slim, save it in a folder, and load it again: tools look there for an image processor."""
    result = lfrns.slim(dense(), DataLoader(IMAGES, 8), macs=0.6, fcr_steps=0, progress=False)
    lfrns.save(result.model, folder, processor=transformers.ViTImageProcessor(size=32))
    return lfrns.load(folder).eval()


def error(model: nn.Module, other: nn.Module) -> float:
    """Measure how far another model's logits lie from a model's, relative to their size."""
    with torch.no_grad():
        logits, others = model(IMAGES).logits, other(IMAGES).logits
    return float((logits - torch.as_tensor(others)).norm() / logits.norm())


def modelopt(folder: str) -> str:
    """Quantize the slim model to INT8, calibrated on images."""
    import copy

    import modelopt
    import modelopt.torch.quantization as mtq

    model = slim(f"{folder}/slim")
    quantized = mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, lambda one: one(IMAGES))
    return f"modelopt {modelopt.__version__}: INT8 of the slim model, logits {error(model, quantized):.3f} away"


def optimum_intel(folder: str) -> str:
    """Export the dense model to OpenVINO and run it there: its exporter knows types by name, and not ours."""
    from importlib.metadata import version

    from optimum.intel import OVModelForImageClassification

    slim(f"{folder}/slim")
    model = dense()
    model.save_pretrained(f"{folder}/dense")
    far = error(model, OVModelForImageClassification.from_pretrained(f"{folder}/dense", export=True))
    return f"optimum-intel {version('optimum-intel')}: the dense model in OpenVINO, logits {far:.3f} away"


def llmcompressor(folder: str) -> str:
    """Quantize the slim model's linear layers to W8A8, which needs no data and fits layers of any width."""
    import copy
    from importlib.metadata import version

    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = slim(f"{folder}/slim")
    recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["classifier"])
    quantized = oneshot(model=copy.deepcopy(model), recipe=recipe)
    return (
        f"llm-compressor {version('llmcompressor')}: W8A8 of the slim model, logits {error(model, quantized):.3f} away"
    )


JOBS = {job.__name__: job for job in (modelopt, optimum_intel, llmcompressor)}

if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        said = JOBS[sys.argv[1]](folder)
    away = float(said.split()[-2])
    if not away < 0.25:  # eight bits, random weights
        raise SystemExit(f"{said}: that is another model")
    print(said)
