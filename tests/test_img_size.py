"""Models at another size of images: interpolated as their library does it, saved with it, or refused in a sentence."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import (
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import lfrns_hub as lfrns
from lfrns_hub.zoo import create_dense, create_skeleton, input_size_of, make_transform
from lfrns_hub.zoo.img_size import resized

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class Fixed(nn.Module):
    """A class of one's own that takes one size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 4)
        self.pretrained_cfg = {"input_size": (3, 8, 8)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=4, **SMALL)).eval()
    nn.init.normal_(model.vit.embeddings.position_embeddings)
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def logits(model: nn.Module, images: torch.Tensor, **options: bool) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(images, **options)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize(("name", "side"), [("test_vit", 96), ("test_resnet", 96), ("test_convnext", 64)])
def test_a_timm_model_answers_as_timm_builds_it_for_the_size_and_is_saved_so(
    name: str, side: int, tmp_path: Path
) -> None:
    dense = timm.create_model(name, num_classes=4).eval()
    torch.save(dense.state_dict(), tmp_path / "w.pth")
    model = create_dense(name, weights=tmp_path / "w.pth", img_size=side)
    images = torch.randn(2, 3, side, side)
    if hasattr(dense, "set_input_size"):
        dense.set_input_size(img_size=(side, side))
    torch.testing.assert_close(logits(model, images), logits(dense, images))
    assert input_size_of(model) == (3, side, side) and "test_input_size" not in model.pretrained_cfg
    if name == "test_vit":
        model = lfrns.slim(model, [images], macs=0.8, fcr_steps=0, progress=False).model
    lfrns.save(model, tmp_path / "out")
    again = lfrns.load(tmp_path / "out")
    assert input_size_of(again) == (3, side, side)
    assert make_transform(again, train=False).size == (side, side)
    torch.testing.assert_close(logits(again, images), logits(model, images))


@pytest.mark.parametrize("at", [160, 96])
def test_weights_may_be_of_either_size(at: int, tmp_path: Path) -> None:
    trained = timm.create_model("test_vit", num_classes=4, img_size=at)
    nn.init.normal_(trained.pos_embed)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    model = create_dense("test_vit", weights=tmp_path / "w.pth", img_size=96)
    assert model.patch_embed.img_size == (96, 96) and model.num_classes == 4
    assert torch.equal(model.pos_embed, trained.pos_embed) == (at == 96)
    assert torch.equal(model.head.weight, trained.head.weight)


@pytest.mark.parametrize("name", ["tnt_s_legacy_patch16_224", "xcit_nano_12_p16_224"])
def test_a_class_that_only_takes_the_size_is_built_again(name: str) -> None:
    dense = timm.create_model(name, num_classes=4)
    assert not hasattr(dense, "set_input_size")
    model = resized(dense, 96, "call")
    assert model is not dense and input_size_of(model) == (3, 96, 96)
    own, other = model.state_dict(), dense.state_dict()
    differing = [key for key in own if own[key].shape != other[key].shape]
    assert differing == (["patch_pos"] if name.startswith("tnt") else [])
    assert all(torch.equal(own[key], other[key]) for key in own.keys() - set(differing))


def test_a_transformers_model_is_interpolated_as_its_forward_does_it(vit: Path, tmp_path: Path) -> None:
    model, dense = create_dense(str(vit), img_size=32), create_dense(str(vit))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(logits(model, images), logits(dense, images, interpolate_pos_encoding=True))
    assert model.config.image_size == 32 and dense.config.image_size == 16
    lfrns.save(model, tmp_path / "out")
    again = lfrns.load(tmp_path / "out")
    assert again.config.image_size == 32 and make_transform(again, train=False).size == (32, 32)
    model.save_pretrained(tmp_path / "larger")
    weights = tmp_path / "larger" / "model.safetensors"
    torch.testing.assert_close(
        logits(create_dense(str(vit), weights=weights, img_size=32), images), logits(again, images)
    )
    with pytest.raises(ValueError, match=r"do not fit a ViTForImageClassification: vit.embeddings.position_embeddings"):
        create_dense(str(vit), weights=weights)


def test_every_form_of_a_processor_is_scaled(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")
    for number, processor in enumerate((
        ViTImageProcessor(size={"shortest_edge": 256}, do_center_crop=True, crop_size={"height": 224, "width": 224}),
        ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        ResNetForImageClassification(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        model = create_dense(str(folder), img_size=96)
        assert input_size_of(model) == (3, 96, 96) and make_transform(model, train=False).size == (96, 96)
        lfrns.save(model, folder / "out")
        assert input_size_of(lfrns.load(folder / "out")) == (3, 96, 96)


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("test_vit", 97, r"create_skeleton\('test_vit', img_size=97\): VisionTransformer cannot be used at 97 x 97"),
        ("mixer_s32_224", 96, "MlpMixer cannot be used at 96 x 96 pixels .*leave it out for 224"),
        (f"{__name__}:Fixed", 16, "Fixed cannot be used at 16 x 16 pixels .*leave it out for 8"),
    ],
)
def test_a_size_that_a_model_cannot_take_is_one_sentence(name: str, side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_skeleton(name, img_size=side)


def test_a_skeleton_without_memory_has_the_size() -> None:
    assert input_size_of(create_skeleton("test_vit", img_size=64, device="meta")) == (3, 64, 64)
