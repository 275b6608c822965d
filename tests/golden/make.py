"""Write the golden checkpoints of the current format_version: once per version, and never again.

PYTHONPATH=.:tests python tests/golden/make.py
"""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from test_checkpoint import cut_norm, cut_pair
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from ways_in import logits

from lfrns_hub import checkpoint
from lfrns_hub.checkpoint.remote_code import MODELING_FILE

HERE = Path(__file__).parent


def timm_model() -> nn.Module:
    """Make a tiny timm ResNet, one convolution of it narrower."""
    model = timm.create_model("test_resnet", num_classes=3, channels=[8, 8, 8, 8], stem_width=4)
    block = model.layer2[0]
    cut_pair(block.conv1, block.conv2, [0, 2, 5])
    cut_norm(block.bn1, [0, 2, 5])
    model.lfrns_provenance = {"plan": {"layer2.0.conv1": [0, 2, 5]}, "widths": {"layer2.0.conv1": [3, 8]}}
    return model


def transformers_model() -> nn.Module:
    """Make a tiny transformers ViT, one MLP of it narrower."""
    config = ViTConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=24, num_labels=3)  # fmt: skip
    model = ViTForImageClassification(config)
    cut_pair(model.vit.layers[1].mlp.fc1, model.vit.layers[1].mlp.fc2, [1, 3, 20])
    model.lfrns_provenance = {"plan": {"vit.layers.1.mlp.fc1": [1, 3, 20]}, "widths": {"vit.layers.1.mlp.fc1": [3, 24]}}
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    for kind, build, size in (("timm", timm_model, 32), ("transformers", transformers_model, 16)):
        model = build()
        folder = HERE / f"v{checkpoint.FORMAT_VERSION}" / kind
        if folder.exists():
            raise FileExistsError(f"{folder.name} of version {checkpoint.FORMAT_VERSION} is there: it never changes.")
        checkpoint.save(model, folder)
        for name in ("README.md", "widths.png", MODELING_FILE):  # not of the format, or another library's to keep
            (folder / name).unlink(missing_ok=True)
        images = torch.randn(2, 3, size, size)
        save_file({"images": images, "logits": logits(model, images)}, folder / "answers.safetensors")
