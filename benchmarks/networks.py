"""Networks with random weights and images of noise, for what does not hang on either: time and memory."""

from argparse import Namespace
from typing import Any

BATCH = 32
RESNET, VIT = "resnet50", "vit_base_patch16_224"
SMALL = {RESNET: "test_resnet", VIT: "test_vit"}


def network(name: str, options: Namespace) -> Any:
    """Build a network with random weights, where it is to run."""
    import timm
    import torch

    torch.manual_seed(0)
    return timm.create_model(SMALL[name] if options.smoke else name).eval().to(options.device)


def noise(options: Namespace, count: int = 256) -> list[Any]:
    """Make images in batches, where they are wanted."""
    import torch

    count, size = (min(count, 64), 160) if options.smoke else (count, 224)
    return [batch.to(options.device) for batch in torch.randn(count, 3, size, size).split(BATCH)]


def model_and_images(name: str, options: Namespace) -> tuple[Any, list[Any]]:
    """Build a network and 256 images in batches."""
    return network(name, options), noise(options)
