"""Distillation of features: the right channels of the right map, learned, and no hook left behind."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lfrns_hub as lfrns
from lfrns_hub.retrain.features import find_last_map, watch_features
from lfrns_hub.surgery import cut, masked
from lfrns_hub.units import SlimPlan
from lfrns_hub.zoo import create_dense


class Flattened(nn.Module):
    """A classifier that reads every position of the last map."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(5 * 4 * 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv2(self.conv1(images).relu()).relu().flatten(1))


def dense_models() -> dict[str, nn.Module]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return {
        "resnet": create_dense("cifar_resnet20", num_classes=3),
        "densenet": timm.create_model("densenet121", block_config=(2, 2, 2, 2), num_classes=3),
        "mobilenet": timm.create_model("mobilenetv3_small_050", num_classes=3),
        "vit": timm.create_model("test_vit", img_size=32, num_classes=3),
        "flattened": Flattened(),
    }


def half_of(model: nn.Module, images: torch.Tensor) -> tuple[list, SlimPlan]:
    """Keep units by turns, so that any shift of channels shows."""
    groups = lfrns.find_units(model, images)
    return groups, SlimPlan({g.name: list(range(0, g.size, 2)) for g in groups if g.exact and not g.frozen_reason})


@pytest.mark.parametrize("kind", ["resnet", "densenet", "mobilenet", "vit", "flattened"])
def test_the_last_map_of_a_cut_network_is_that_of_the_masked_one(kind):
    dense = dense_models()[kind].eval()
    images = torch.randn(4, 3, *((8, 8) if kind == "flattened" else (32, 32)))
    groups, plan = half_of(dense, images)
    slim = cut(dense, groups, plan)
    features = watch_features(slim, dense, plan, images)
    with torch.no_grad():
        slim(images)
        dense(images)
        apart = features.loss()
        with masked(dense, groups, plan):
            dense(images)
        slim(images)
        assert features.loss() < 1e-8 < 1e-4 < apart
    features.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in (slim, dense) for m in n.modules())


def test_the_last_map_is_a_stage_or_the_last_norm():
    models = dense_models()
    names = {kind: find_last_map(models[kind], torch.randn(2, 3, 32, 32)).module for kind in ("resnet", "vit")}
    assert names == {"resnet": "layer3", "vit": "norm"}
    assert find_last_map(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)), torch.randn(2, 3, 8, 8)) is None


def test_features_that_cannot_be_compared_are_left_out():
    dense, images = create_dense("cifar_resnet20", num_classes=3), torch.randn(2, 3, 32, 32)
    groups, plan = half_of(dense, images)
    slim = cut(dense, groups, plan)
    assert watch_features(slim, dense, SlimPlan(), images) is None
    assert watch_features(slim, dense, SlimPlan({"another": [0]}), images) is None
    assert watch_features(slim, nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)), plan, images) is None
    shorter = {name: kept[:-1] for name, kept in plan.keep.items()}
    assert watch_features(slim, dense, SlimPlan(shorter), images) is None


def test_retraining_brings_the_features_nearer_and_leaves_no_hook():
    torch.manual_seed(0)
    dense, images = Flattened().eval(), torch.randn(48, 3, 8, 8)
    loader = DataLoader(TensorDataset(images, torch.arange(48) % 3), batch_size=16, shuffle=True)
    groups, plan = half_of(dense, images)
    errors = {}
    for weight in (0.0, 100.0):
        slim = cut(dense, groups, plan)
        slim.lfrns_provenance = {"plan": plan.keep}
        lfrns.retrain(slim, loader, teacher=dense, epochs=10, learning_rate=0.01, feature_weight=weight, progress=False)
        assert not any(m._forward_hooks or m._forward_pre_hooks for n in (slim, dense) for m in n.modules())
        features = watch_features(slim, dense, plan, images)
        with torch.no_grad():
            slim.eval()(images)
            dense(images)
            errors[weight] = features.loss().item()
        features.close()
    assert errors[100.0] < 0.8 * errors[0.0]


def test_a_compiled_run_learns_them_too():
    torch.manual_seed(0)
    dense, images = Flattened().eval(), torch.randn(16, 3, 8, 8)
    loader = DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=8)
    groups, plan = half_of(dense, images)

    def retrained(weight: float, accelerator: Accelerator | None) -> torch.Tensor:
        slim = cut(dense, groups, plan)
        slim.lfrns_provenance = {"plan": plan.keep}
        lfrns.retrain(
            slim, loader, teacher=dense, epochs=1, feature_weight=weight, accelerator=accelerator, progress=False
        )
        return slim.conv1.weight

    plain = retrained(100.0, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        compiling = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="eager"))
        assert hasattr(compiling.prepare_model(nn.Linear(2, 2)), "_orig_mod")
        without = retrained(0.0, compiling)  # compiled without hooks, and once more with them
        torch.testing.assert_close(retrained(100.0, compiling), plain)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not torch.equal(without, plain)


def test_what_slim_made_learns_the_features_of_the_model_it_came_from():
    torch.manual_seed(0)
    dense = create_dense("cifar_resnet20", num_classes=3).eval()
    images = torch.randn(32, 3, 32, 32)
    result = lfrns.slim(dense, [images], macs=0.5, fcr_steps=0, progress=False)
    loader = DataLoader(TensorDataset(images, torch.arange(32) % 3), batch_size=16)
    with_features, without = copy.deepcopy(result.model), copy.deepcopy(result.model)
    lfrns.retrain(with_features, loader, teacher=dense, epochs=1, feature_weight=100, progress=False)
    lfrns.retrain(without, loader, teacher=dense, epochs=1, progress=False)
    assert not torch.equal(with_features.conv1.weight, without.conv1.weight)


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match=r"feature_weight=.*0 or more"):
        lfrns.retrain(Flattened(), DataLoader(torch.randn(2, 3, 8, 8)), feature_weight=weight)


@pytest.mark.parametrize("plan", ["all", {"conv1": "x"}, {"conv1": [0.5]}, {"conv1": [9, 3]}, {"conv1": []}, 7, None])
def test_a_model_without_a_plan_of_the_teacher_is_refused_untouched(plan):
    dense, loader = Flattened().eval(), DataLoader(torch.randn(4, 3, 8, 8), 4)
    model = copy.deepcopy(dense)
    model.lfrns_provenance = {"plan": plan}
    with pytest.raises(ValueError, match=r"retrain\(feature_weight=100\): .* plan .*pass feature_weight=0"):
        lfrns.retrain(model, loader, teacher=dense, feature_weight=100, progress=False)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in (model, dense) for m in n.modules())


def test_features_need_a_teacher():
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4) % 3), 4)
    with pytest.raises(ValueError, match=r"feature_weight=100\): there is no teacher"):
        lfrns.retrain(Flattened(), loader, feature_weight=100, progress=False)
