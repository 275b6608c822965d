"""Every image classifier of transformers: cut, saved and loaded by every door, it gives the logits it gave."""

import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from lfrns_hub import checkpoint
from lfrns_hub.coverage.families import TRANSFORMERS_CONVNETS, TRANSFORMERS_VITS, VIT
from lfrns_hub.self_check import narrowing
from lfrns_hub.surgery import cut
from lfrns_hub.trace import trace_model
from lfrns_hub.units import SlimPlan

NAMES = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES  # of this release: an older one lacks some
CONFIGS = {name: known for name, known in (TRANSFORMERS_CONVNETS | TRANSFORMERS_VITS).items() if name in NAMES}
ONE_LAYER = {"num_hidden_layers": 1}
TWO_STAGES = {"depths": [1, 1]}
PYRAMID = {**TWO_STAGES, "num_encoder_blocks": 2, "hidden_sizes": [32, 48]}
# Fewer layers than in coverage's table: nearly all of a test's time is torch.export, layer by layer.
FEWER: dict[str, dict[str, Any]] = {
    "bit": {**TWO_STAGES, "hidden_sizes": [64, 96]},
    "convnext": {**TWO_STAGES, "num_stages": 2, "hidden_sizes": [32, 48]},
    "convnextv2": {**TWO_STAGES, "num_stages": 2, "hidden_sizes": [32, 48]},
    "efficientnet": {
        "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 40],
        "kernel_sizes": [3, 3, 5],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 1, 1],
        "expand_ratios": [1, 6, 6],
    },
    "focalnet": {**TWO_STAGES, "hidden_sizes": [48, 96]},
    "hgnet_v2": {"stage_numb_of_layers": [2, 1, 1, 1], "stage_num_blocks": [1, 1, 1, 1]},
    "poolformer": PYRAMID,
    "pp_lcnet": {
        "block_configs": [
            [[3, 16, 32, 1, False]],
            *([[3, 32, 32, 2, squeeze]] for squeeze in (False, False, False, True)),
        ],
    },
    "regnet": {**TWO_STAGES, "hidden_sizes": [32, 64]},
    "resnet": {**TWO_STAGES, "hidden_sizes": [64, 96]},
    "textnet": {
        "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
        "conv_layer_strides": [[2], [2], [2], [1]],
    },
    "beit": ONE_LAYER,
    "clip": {"vision_config": {**VIT, **ONE_LAYER}},
    "data2vec-vision": {**ONE_LAYER, "out_indices": [0]},
    "deit": ONE_LAYER,
    "dinov2": ONE_LAYER,
    "dinov2_with_registers": ONE_LAYER,
    "donut-swin": {**TWO_STAGES, "num_heads": [2, 4]},
    "hiera": {**TWO_STAGES, "num_heads": [2, 4], "num_query_pool": 1},
    "ijepa": ONE_LAYER,
    "levit": {"depths": [1, 1, 1]},
    "metaclip_2": {"vision_config": {**VIT, **ONE_LAYER}},
    "mobilevitv2": {"n_attn_blocks": [1, 1, 1]},
    "perceiver": {"num_self_attends_per_block": 1},
    "pvt": {"depths": [1, 1, 1, 1]},  # its forward counts on the last of four stages
    "pvt_v2": {**PYRAMID, "num_attention_heads": [2, 3], "mlp_ratios": [4, 3]},
    "segformer": {**PYRAMID, "num_attention_heads": [2, 3], "mlp_ratios": [4, 3]},
    "siglip": {"vision_config": {**VIT, **ONE_LAYER}},
    "swiftformer": {**TWO_STAGES, "embed_dims": [24, 32]},
    "swin": {**TWO_STAGES, "num_heads": [2, 4]},
    "swinv2": {**TWO_STAGES, "num_heads": [2, 4]},
    "vit": ONE_LAYER,
    "vit_msn": ONE_LAYER,
}


def classes_of(model_type: str) -> tuple[str, ...]:
    """The classes of a type: several for DeiT, LeViT and Perceiver."""
    names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type]
    return (names,) if isinstance(names, str) else tuple(names)


CLASSES = [(model_type, name) for model_type in CONFIGS for name in classes_of(model_type)]


def build(model_type: str, name: str, args: dict[str, Any] | None = None) -> PreTrainedModel:
    """Build a small model with random weights and statistics."""
    torch.manual_seed(0)
    args = CONFIGS[model_type][1] | FEWER.get(model_type, {}) if args is None else args
    model = getattr(transformers, name)(AutoConfig.for_model(model_type, num_labels=5, **args)).eval()
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def slim(model: PreTrainedModel, images: Tensor) -> PreTrainedModel:
    """Cut the last third of the units of every exact group; a model that has none stays dense."""
    groups = [group for group in trace_model(model, images).groups if group.exact and not group.frozen_reason]
    groups = [group for group in narrowing(model, groups, images) if not group.frozen_reason]
    return cut(model, groups, SlimPlan({g.name: list(range(g.size - g.size // 3)) for g in groups}))


def logits(model: PreTrainedModel, *inputs: Tensor) -> Tensor:
    """Run a model; the logits come first, under whatever name."""
    with torch.no_grad():
        return model(*inputs)[0]


@pytest.mark.parametrize(("model_type", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_a_slim_model_of_every_type_comes_back_equal(model_type, name, tmp_path):
    size = CONFIGS[model_type][0]
    images = torch.randn(1, 3, size, size)
    model = slim(build(model_type, name), images)
    folder = checkpoint.save(model, tmp_path / "slim")
    loaded = checkpoint.load(folder)
    assert [base.__name__ for base in type(loaded).__mro__[:2]] == [f"Lfrns{name}", name]
    assert loaded.config.model_type == f"lfrns_{model_type}"
    expected = logits(model, images)
    assert expected.isfinite().all()
    assert expected.std() > 0
    torch.testing.assert_close(logits(loaded, images), expected)


@pytest.mark.parametrize(
    ("model_type", "args", "inputs"),
    [
        ("imagegpt", {"vocab_size": 33, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}, "ids"),
        ("siglip2", {"vision_config": {**VIT, **ONE_LAYER, "num_patches": 16}}, "patches"),
    ],
)
def test_a_classifier_that_takes_no_images_comes_back_equal(model_type, args, inputs, tmp_path):
    patches = (torch.randn(1, 16, 3 * 8 * 8), torch.ones(1, 16, dtype=torch.int64), torch.tensor([[4, 4]]))
    inputs = {"ids": (torch.arange(16).view(1, 16),), "patches": patches}[inputs]
    model = build(model_type, classes_of(model_type)[0], args)
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "dense"))
    torch.testing.assert_close(logits(loaded, *inputs), logits(model, *inputs))


def test_no_type_of_transformers_is_left_out():
    tried = {*CONFIGS, "imagegpt", "siglip2"}
    not_built_here = {"dinat"}  # needs natten, a package for CUDA
    refused = {"shieldgemma2"}
    in_timms_layout = {"timm_wrapper"}  # see test_other_code.py
    assert tried | not_built_here | refused | in_timms_layout == set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def test_what_cannot_be_saved_says_so(tmp_path):
    backbone = transformers.ViTModel(transformers.ViTConfig(**VIT))
    with pytest.raises(ValueError, match=r"save\(ViTModel, model_type 'vit'\).*AutoModelForImageClassification"):
        checkpoint.save(backbone, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_names_on_disk_are_those_of_the_stock_checkpoint(tmp_path):
    model = build("segformer", "SegformerForImageClassification")
    checkpoint.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "stock")
    names = []
    for folder in ("ours", "stock"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1] != set(model.state_dict())
    own = checkpoint.load(tmp_path / "ours", model=build("segformer", "SegformerForImageClassification"))
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(logits(own, images), logits(model, images))
    checkpoint.load(tmp_path / "ours").save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == names[1]


@pytest.fixture
def refusing_loader(tmp_path, monkeypatch):
    """A saved ViT, and transformers' own loading of it, which raises."""
    folder = checkpoint.save(build("vit", "ViTForImageClassification"), tmp_path / "slim")
    narrow_class = type(checkpoint.load(folder))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("transformers was asked to load")

    monkeypatch.setattr(narrow_class, "from_pretrained", refuse)
    return folder


def test_weights_that_need_no_work_are_taken_as_they_lie_in_the_file(refusing_loader):
    loaded = checkpoint.load(refusing_loader)
    with safe_open(refusing_loader / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    assert all(tensor.requires_grad for tensor in loaded.parameters())
    torch.testing.assert_close(loaded.classifier.weight.detach(), stored["classifier.weight"], rtol=0, atol=0)
    assert len(stored) == len(loaded.state_dict())
    nn.init.zeros_(loaded.classifier.weight)  # in memory alone
    assert checkpoint.load(refusing_loader).classifier.weight.abs().sum() > 0


def test_buffers_that_no_file_holds_are_computed_and_no_weight_with_them(tmp_path):
    model = build("swin", "SwinForImageClassification")
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "slim"))
    computed = dict(model.named_non_persistent_buffers())
    assert any("relative_position_index" in name for name in computed)
    for name, buffer in computed.items():
        assert torch.equal(loaded.get_buffer(name), buffer)
    for name, weight in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight)


def test_weights_of_another_dtype_than_the_config_says_are_left_to_transformers(refusing_loader, monkeypatch):
    config = json.loads((refusing_loader / "config.json").read_text())
    (refusing_loader / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with pytest.raises(ValueError, match="transformers was asked to load"):
        checkpoint.load(refusing_loader)
    monkeypatch.undo()
    assert {tensor.dtype for tensor in checkpoint.load(refusing_loader).parameters()} == {torch.bfloat16}


def test_a_skeleton_on_the_meta_device_draws_no_numbers(tmp_path, monkeypatch):
    loaded = checkpoint.load(checkpoint.save(build("vit", "ViTForImageClassification"), tmp_path / "slim"))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a layer was initialised")

    monkeypatch.setattr(nn.init, "kaiming_uniform_", refuse)
    with torch.device("meta"):
        assert type(loaded)(loaded.config).classifier.weight.is_meta
    with pytest.raises(RuntimeError, match="a layer was initialised"):
        type(loaded)(loaded.config)


def test_a_config_shows_itself_without_its_long_tables(tmp_path):
    model = build("vit", "ViTForImageClassification")
    model.config.id2label = {number: f"class {number}" for number in range(5)}
    folder = checkpoint.save(slim(model, torch.randn(1, 3, 32, 32)), tmp_path / "slim")
    config = AutoConfig.from_pretrained(folder)
    assert '"lfrns": "..."' in repr(config) and '"4": "class 4"' in repr(config)
    config.id2label = dict.fromkeys(range(17), "one of many")
    assert '"id2label": "..."' in repr(config)
    assert config.lfrns["shapes"] and json.loads(config.to_json_string())["lfrns"] == config.lfrns


def test_layers_that_share_their_weight_come_back_equal(tmp_path):
    model = build("vit", "ViTForImageClassification", {**VIT, "num_hidden_layers": 2})
    first, second = (layer.mlp for layer in model.vit.layers)
    second.fc1.weight = first.fc1.weight
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "slim"))
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(logits(loaded, images), logits(model, images))


FRESH = """
import sys
import lfrns_hub
from transformers import AutoModelForImageClassification
read = [name for name in sys.modules if ".modeling_" in name and name.startswith("transformers.models.")]
print(sorted({name.split(".")[2] for name in read} - {"auto", "timm_wrapper"}))
print(type(AutoModelForImageClassification.from_pretrained(sys.argv[1])).__name__)
from lfrns_hub.checkpoint.transformers import LfrnsSwinForImageClassification as swin
print(swin.__mro__[1].__name__)
"""


def test_importing_the_package_reads_no_modeling_file_and_registers_all_the_same(tmp_path):
    folder = checkpoint.save(build("vit", "ViTForImageClassification"), tmp_path / "slim")
    run = [sys.executable, "-c", FRESH, str(folder)]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["[]", "LfrnsViTForImageClassification", "SwinForImageClassification"]


def test_a_loaded_model_can_be_pickled(tmp_path):
    loaded = checkpoint.load(checkpoint.save(build("vit", "ViTForImageClassification"), tmp_path / "slim"))
    again = pickle.loads(pickle.dumps(loaded))
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(logits(again, images), logits(loaded, images))
