"""The CIFAR networks: sizes as published, keys as published, a graph that the tracer can read."""

from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from lfrns_hub import models

SHARED = Path(__file__).parents[1].parent / "shared"
NAMES = ["cifar_resnet20", "cifar_resnet56", "cifar_resnet110", "cifar_vgg16_bn", "cifar_densenet40"]
KINDS = ["cifar_resnet20", "cifar_vgg16_bn", "cifar_densenet40"]
# What the tracer has rules for: nothing else may appear in these graphs.
SIMPLE = {"conv2d", "batch_norm", "relu", "add", "slice", "pad", "cat", "max_pool2d", "avg_pool2d"}
SIMPLE |= {"adaptive_avg_pool2d", "flatten", "linear"}

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not here")


def small_images(name: str, channels: int) -> torch.Tensor:
    """One image, as small as the network takes: VGG halves five times."""
    size = 32 if name == "cifar_vgg16_bn" else 8
    return torch.randn(1, channels, size, size)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_timm_lists_all_five() -> None:
    assert set(NAMES) <= set(timm.list_models("cifar_*"))


# ResNet-56 and 110 are ResNet-20 with more of the same blocks.
@pytest.mark.parametrize("name", KINDS)
def test_graph_is_simple(name: str) -> None:
    model = timm.create_model(name).eval()
    program = torch.export.export(model, (small_images(name, 3),), strict=False)
    called = {str(n.target).split(".")[1] for n in program.graph.nodes if n.op == "call_function"}
    assert called <= SIMPLE


@pytest.mark.parametrize(
    ("name", "params", "mmacs"),
    [  # He et al. 2016, table 6: 0.27, 0.85, 1.7 M; Li et al. 2017, table 1: 15 M, 313 M; Huang et al. 2017: 1.0 M
        ("cifar_resnet20", 0.27, 40.6),
        ("cifar_resnet56", 0.85, 125),
        ("cifar_resnet110", 1.73, 253),
        ("cifar_vgg16_bn", 14.99, 313),
        ("cifar_densenet40", 1.02, 265),
    ],
)
def test_sizes_are_the_published_ones(name: str, params: float, mmacs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32))
    assert count(model) / 1e6 == pytest.approx(params, abs=0.01)
    assert counter.get_total_flops() / 2e6 == pytest.approx(mmacs, rel=0.01)


@pytest.mark.parametrize("name", KINDS)
def test_timm_options_work(name: str) -> None:
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.1)
    images = small_images(name, 1)
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    features = model.forward_features(images)
    assert torch.equal(model.get_classifier()(model.forward_head(features, pre_logits=True)), model(images))
    model.reset_classifier(0)
    assert model(images).shape == (1, model.num_features)
    model.reset_classifier(3)
    assert model(images).shape == (1, 3)
    assert model.num_classes == 3


@pytest.mark.parametrize("name", KINDS)
def test_features_only_gives_every_stage(name: str) -> None:
    model = timm.create_model(name, features_only=True)
    images = small_images(name, 3)
    outputs = model(images)
    assert [o.shape[1] for o in outputs] == model.feature_info.channels()
    assert [images.shape[2] // o.shape[2] for o in outputs] == model.feature_info.reduction()


def test_configuration_is_the_cifar_one() -> None:
    cfg = timm.create_model("cifar_resnet20").pretrained_cfg
    assert cfg["input_size"] == (3, 32, 32)
    assert (cfg["mean"], cfg["std"]) == (models.CIFAR_MEAN, models.CIFAR_STD)
    assert (cfg["classifier"], cfg["first_conv"], cfg["architecture"]) == ("linear", "conv1", "cifar_resnet20")


def test_shortcut_pads_as_option_a_says() -> None:
    x = torch.randn(1, 2, 5, 5)
    y = models.PadShortcut(2, (1, 3))(x)
    assert y.shape == (1, 6, 3, 3)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, :1].any()
    assert not y[:, 3:].any()


@needs_shared
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar_resnet20", "resnet20_cifar10.safetensors"),
        ("cifar_resnet20", "resnet20_cifar10_png.safetensors"),
        ("cifar_resnet56", "resnet56_cifar10_png.safetensors"),
    ],
)
def test_published_weights_load_strictly(name: str, file: str) -> None:
    from safetensors.torch import load_file

    timm.create_model(name).load_state_dict(load_file(SHARED / "weights" / file), strict=True)
