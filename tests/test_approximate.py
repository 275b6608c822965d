"""Approximate groups: the residual width goes, and everything that states it follows, saved and loaded too."""

import copy
import json

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import lfrns_hub as lfrns

MODELS = {
    "test_vit": {"img_size": 32, "dynamic_img_size": False},  # resampling by the forward freezes the table of positions
    "test_convnext": {},
}
RESIDUAL = {"test_vit": "patch_embed.proj", "test_convnext": "stages.3.downsample.1"}


@pytest.fixture(scope="module", params=MODELS)
def slimmed(request):
    """A model and what slim made of it, to half its MACs with approximate groups."""
    torch.manual_seed(0)
    dense = timm.create_model(request.param, num_classes=10, **MODELS[request.param])
    images = [torch.randn(16, 3, 32, 32) for _ in range(5)]
    options = {"macs": 0.5, "fcr_steps": 0, "widths": "uniform", "progress": False}
    return request.param, dense, lfrns.slim(dense, images, approximate=True, **options)


def test_the_residual_width_is_cut_and_all_that_states_it_follows(slimmed):
    name, dense, result = slimmed
    model, width = result.model, len(result.plan.keep[RESIDUAL[name]])
    assert width < dense.num_features
    made = model.get_submodule(RESIDUAL[name])
    assert made.out_channels == len(made.weight) == width
    assert model.num_features == model.head_hidden_size == width
    assert model.feature_info[-1]["num_chs"] == width
    assert model.get_classifier().in_features == width
    assert 0.45 < result.report.macs_fraction <= 0.5
    assert dense.num_features == dense.feature_info[-1]["num_chs"] == 64


def test_features_come_in_the_stated_width_and_the_head_can_be_changed(slimmed):
    model = copy.deepcopy(slimmed[2].model)
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert model.num_features in (features.shape[1], features.shape[-1])
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)


def test_it_loads_again_with_equal_answers_and_as_a_backbone(slimmed, tmp_path):
    name, _, result = slimmed
    images = torch.randn(2, 3, 32, 32)
    lfrns.save(result.model, tmp_path)
    with torch.no_grad():
        expected = result.model.eval()(images)
        assert torch.equal(lfrns.load(tmp_path).eval()(images), expected)
    backbone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    maps = backbone(images)
    assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
    assert maps[-1].shape[1] == len(result.plan.keep[RESIDUAL[name]])


def test_one_step_of_retraining_moves_every_weight(slimmed):
    model = copy.deepcopy(slimmed[2].model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))
    lfrns.retrain(model, DataLoader(data, 8), teacher=slimmed[1], epochs=1, progress=False)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.9 * len(before)


def test_approximate_groups_are_labelled_so_in_report_provenance_and_card(slimmed, tmp_path):
    name, _, result = slimmed
    made = result.model.lfrns_provenance
    assert RESIDUAL[name] in made["approximate"]
    lfrns.save(result.model, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["slim"]
    assert made["approximate"] == stored["approximate"]
    card = (tmp_path / "README.md").read_text()
    rows = {line.split(" | ")[0].strip("| `"): line for line in card.splitlines() if line.startswith("| ")}
    assert stored["kinds"][RESIDUAL[name]] == "channel"
    for group in result.report.groups:
        assert group.exact == (group.name not in made["approximate"])
        assert ("approximate" in rows[group.name]) == (group.name in made["approximate"]), group.name
