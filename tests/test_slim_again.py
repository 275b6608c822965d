"""Slimming again, and saving what `slim` gives by each library's own call: widths and provenance come along."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import resume_checkpoint, save_for_hf
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from ways_in import logits

import lfrns_hub as lfrns
from lfrns_hub import checkpoint
from lfrns_hub.method.provenance import add_round


def dense_resnet() -> nn.Module:
    """Make a small timm ResNet."""
    return timm.create_model("test_resnet", num_classes=5)


def dense_vit() -> nn.Module:
    """Make a small transformers ViT, most of whose work is in units that may leave."""
    config = ViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=128, num_labels=5)  # fmt: skip
    return ViTForImageClassification(config)


DENSE = {"timm": (dense_resnet, 64), "vit": (dense_vit, 32)}


def slim_once(model: nn.Module, size: int, **budget: float) -> Any:
    """Slim on noise, in few steps."""
    images = torch.randn(8, 3, size, size)
    return lfrns.slim(model, [images[:4], images[4:]], fcr_steps=1, progress=False, **budget)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Any, Path]]:
    """Of each kind: the first result, its folder, the result of slimming what was loaded from there, and its folder."""
    found, root = {}, tmp_path_factory.mktemp("rounds")
    for kind, (build, size) in DENSE.items():
        torch.manual_seed(0)
        first = slim_once(build(), size, macs=0.8)
        folder = checkpoint.save(first.model, root / f"{kind}1")
        second = slim_once(checkpoint.load(folder), size, macs=0.8)
        found[kind] = first, folder, second, checkpoint.save(second.model, root / f"{kind}2")
    return found


@pytest.mark.parametrize("kind", DENSE)
def test_what_slim_gives_is_saved_by_its_own_library(kind: str, rounds: dict[str, Any], tmp_path: Path) -> None:
    images = torch.randn(2, 3, DENSE[kind][1], DENSE[kind][1])
    for result in rounds[kind][::2]:
        folder = tmp_path / str(id(result))
        loaded: list[nn.Module]
        if kind == "timm":
            save_for_hf(result.model, str(folder), safe_serialization=True)
            loaded = [timm.create_model(f"local-dir:{folder}", pretrained=True), checkpoint.load(folder)]
            assert loaded[0].lfrns_provenance == result.model.lfrns_provenance
        else:
            result.model.save_pretrained(folder)
            loaded = [AutoModelForImageClassification.from_pretrained(folder), checkpoint.load(folder)]
        assert loaded[1].lfrns_provenance == json.loads(json.dumps(result.model.lfrns_provenance))
        for model in loaded:
            torch.testing.assert_close(logits(model, images), logits(result.model, images))


def test_the_dense_model_and_its_config_stay_as_they_were() -> None:
    model = dense_vit()
    result = slim_once(model, 32, macs=0.8)
    assert isinstance(result.model, type(model)) and type(result.model).forward is type(model).forward
    assert (model.config.model_type, result.model.config.model_type) == ("vit", "lfrns_vit")
    assert not hasattr(model.config, "lfrns") and type(model).__name__ == "ViTForImageClassification"


@pytest.mark.parametrize("kind", DENSE)
def test_a_second_round_adds_up(kind: str, rounds: dict[str, Any]) -> None:
    first, _, second, folder = rounds[kind]
    dense = dict(DENSE[kind][0]().named_modules())
    told = json.loads((folder / "config.json").read_text())["slim"]
    once, again = first.model.lfrns_provenance, second.model.lfrns_provenance
    assert told["plan"] == again["plan"] and told["rounds"] == again["rounds"] and len(told["rounds"]) == 2
    assert 0.6 < told["budget"]["macs"] <= 0.64
    assert told["report"]["macs_fraction"] == pytest.approx(
        first.report.macs_fraction * second.report.macs_fraction, abs=1e-3
    )
    for name, kept in told["plan"].items():
        assert set(kept) <= set(once["plan"].get(name, kept))  # in terms of the first dense model
        assert told["widths"][name] == [len(kept), once["widths"].get(name, told["widths"][name])[1]]
        if told["kinds"][name] != "head":
            assert told["widths"][name][1] in tuple(dense[name].weight.shape)
    card = (folder / "README.md").read_text()
    assert f"{told['budget']['macs']:g} of the dense MACs" in card


def test_the_kept_units_of_two_rounds_are_those_of_the_dense_model(rounds: dict[str, Any]) -> None:
    plan = rounds["timm"][2].model.lfrns_provenance["plan"]
    names = {name: len(kept) for name, kept in plan.items()}
    widths = {name: module.out_channels for name, module in rounds["timm"][2].model.named_modules() if name in names}
    assert widths == names


def test_rounds_without_figures_add_up_too() -> None:
    first = {"plan": {"a": [1, 4]}, "widths": {"a": [2, 5]}, "kinds": {"a": "channel"}, "budget": {}}
    second = {"plan": {"a": [1], "b": [0]}, "widths": {"a": [1, 2], "b": [1, 3]}, "kinds": {}, "budget": {"macs": 0.5}}
    third = {"plan": {"b": [0]}, "widths": {"b": [1, 1]}, "kinds": {}, "budget": {"macs": 0.5}, "approximate": ["b"]}
    told = add_round(add_round(first, second), third)
    assert told["plan"] == {"a": [4], "b": [0]} and told["widths"] == {"a": [1, 5], "b": [1, 3]}
    assert told["budget"] == {"macs": 0.25} and len(told["rounds"]) == 3 and told["approximate"] == ["b"]
    assert add_round({}, first) is first


def test_a_checkpoint_of_timms_saver_loads_into_the_folder_s_model(rounds: dict[str, Any], tmp_path: Path) -> None:
    folder, images = rounds["timm"][1], torch.randn(2, 3, 64, 64)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(images).square().mean().backward()
    optimizer.step()
    CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)).save_checkpoint(0)
    path = str(tmp_path / "last.pth.tar")
    again = timm.create_model(f"local-dir:{folder}", checkpoint_path=path)
    torch.testing.assert_close(logits(again, images), logits(model, images))
    resumed: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    resume_checkpoint(resumed, path, torch.optim.SGD(resumed.parameters(), lr=0.01), log_info=False)
    expected: Tensor = logits(model, images)
    torch.testing.assert_close(logits(resumed, images), expected)
