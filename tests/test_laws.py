"""The laws of DESIGN.md: slim equals masked dense, and slimming touches nothing that it should not."""

import copy

import pytest
import timm
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import lfrns_hub as lfrns
from lfrns_hub import self_check
from lfrns_hub.self_check import REMOVED_SHARES, culprits, random_plan, randomised
from lfrns_hub.surgery import cut, masked

TRANSFORMER = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 10,
}
ARCHITECTURES = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=10),
    "resnet18": lambda: timm.create_model("resnet18", num_classes=10),
    "vgg": lambda: timm.create_model("cifar_vgg16_bn"),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_035", num_classes=10),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=10),
    "densenet": lambda: timm.create_model("cifar_densenet40"),
    "regnetx": lambda: timm.create_model("regnetx_002", num_classes=10),
    "regnety": lambda: timm.create_model("regnety_002", num_classes=10),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=10),
    "vision_transformer": lambda: timm.create_model("test_vit", num_classes=10, img_size=32),
    "cifar_resnet20": lambda: timm.create_model("cifar_resnet20"),
    "transformers ViT": lambda: ViTForImageClassification(ViTConfig(intermediate_size=96, **TRANSFORMER)),
    "transformers DeiT": lambda: DeiTForImageClassification(DeiTConfig(intermediate_size=96, **TRANSFORMER)),
    "transformers DINOv2": lambda: Dinov2ForImageClassification(Dinov2Config(**TRANSFORMER)),
    "transformers ConvNeXt": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_labels=10)
    ),
    "transformers ResNet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], num_labels=10)
    ),
}
CONVNETS = set(ARCHITECTURES) - {
    "convnext",
    "vision_transformer",
    "transformers ViT",
    "transformers DeiT",
    "transformers DINOv2",
    "transformers ConvNeXt",
}


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_slim_equals_masked_dense_and_most_units_are_free(name):
    model = ARCHITECTURES[name]()
    example = torch.randn(2, 3, 32, 32)
    groups = lfrns.find_units(model, example)
    free = [g for g in groups if g.frozen_reason is None and g.exact]
    generator = torch.Generator().manual_seed(0)
    dense = randomised(model, generator)
    plan = random_plan(free, generator)
    for group in free:
        assert len(plan.removed(group)) >= 0.3 * group.size or len(plan.kept(group)) == 1
    images = example.double()
    with torch.no_grad():
        before = logits(dense, images)
        with masked(dense, groups, plan):
            expected = logits(dense, images)
        got = logits(cut(dense, groups, plan), images)
    largest = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-8 * largest
    assert (before - expected).abs().max() > 1e-3 * largest
    assert torch.equal(logits(dense, images), before), "masking must leave no trace"
    made = {
        part.tensor.removesuffix(".weight"): 0 for g in groups for part in g.slices if part.tensor.endswith(".weight")
    }
    for group in free:
        for part in group.slices:
            if part.dim == 0 and part.tensor.removesuffix(".weight") in made:
                made[part.tensor.removesuffix(".weight")] += part.index.numel()
    modules = dict(model.named_modules())
    if name in CONVNETS and not name.startswith("cifar_resnet"):
        convs = {n: m.out_channels for n, m in modules.items() if isinstance(m, nn.Conv2d)}
        assert sum(made.get(n, 0) for n in convs) >= 0.8 * sum(convs.values())
    hidden = [n for n in modules if n.endswith(("mlp.fc1", "pointwise_conv1", "pwconv1"))]
    if hidden:
        total = sum(len(modules[n].weight) for n in hidden)
        assert sum(made.get(n, 0) for n in hidden) >= 0.9 * total


def test_the_self_check_removes_enough_to_mean_something_and_another_share_of_each_group():
    assert REMOVED_SHARES[0] >= 0.3
    groups = [lfrns.UnitGroup(f"g{n}", "channel", 100) for n in range(8)]
    plan = random_plan(groups, torch.Generator().manual_seed(0))
    assert len({len(plan.removed(group)) for group in groups}) > 4


@pytest.mark.parametrize("bad", [[], [0], [9], [2, 3, 7], list(range(10)), [(1, 8)], [(1, 8), 4]])
def test_culprits_are_found_one_by_one_and_as_pairs_that_pass_alone(bad):
    groups = [lfrns.UnitGroup(str(n), "channel", 2) for n in range(10)]
    trials = []

    def fault(some):
        names = {int(group.name) for group in some}
        trials.append(names)
        return next((f"{one}" for one in bad if ({one} if isinstance(one, int) else set(one)) <= names), None)

    found = culprits(groups, fault)
    assert fault([group for group in groups if group.name not in found]) is None
    assert len(found) == len(bad) and all(
        any(int(name) in (one if isinstance(one, tuple) else [one]) for one in bad) for name in found
    )
    assert len(trials) <= 2 + 6 * len(bad)


@pytest.mark.parametrize("name", ["resnet", "vision_transformer", "mobilenetv3"])
def test_keeping_all_units_changes_no_output(name):
    model = ARCHITECTURES[name]().eval()
    images = torch.randn(2, 3, 32, 32)
    groups = lfrns.find_units(model, images)
    plan = lfrns.SlimPlan({g.name: list(range(g.size)) for g in groups})
    assert torch.equal(logits(cut(model, groups, plan), images), logits(model, images))


def test_unknown_operations_freeze_with_the_line_of_user_code():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            x = self.first(x).cumsum(1)
            return self.last(self.second(x).mean((2, 3)))

    groups = {g.name: g for g in lfrns.find_units(Odd(), torch.randn(1, 3, 16, 16))}
    assert "aten.cumsum" in groups["first"].frozen_reason
    assert "self.first(x).cumsum(1)" in groups["first"].frozen_reason
    assert groups["second"].frozen_reason is None


class Attention(nn.Module):
    """Attention whose head width is what remains, so that a wrong number of heads still has fitting shapes."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = 4, 8**-0.5
        self.patches, self.qkv = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 96)
        self.proj, self.head = nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = (q * self.scale @ k.mT).softmax(-1) @ v
        return self.head(self.proj(x.transpose(1, 2).flatten(2)).mean(1))


def forget_consumer(slim: nn.Module, dense: nn.Module) -> None:
    slim.mlp.fc2 = copy.deepcopy(dense.mlp.fc2)


def lose_weight(slim: nn.Module, dense: nn.Module) -> None:
    slim.mlp.fc2.weight.data[:, 0] = 0


def swap_order(slim: nn.Module, dense: nn.Module) -> None:
    weight = slim.mlp.fc2.weight
    weight.data = weight.data[:, [1, 0, *range(2, weight.shape[1])]]


def swap_query_and_key(slim: nn.Module, dense: nn.Module) -> None:
    for tensor in (slim.qkv.weight, slim.qkv.bias):
        query, key, value = tensor.data.chunk(3)
        tensor.data = torch.cat([key, query, value])


def leave_heads_stale(slim: nn.Module, dense: nn.Module) -> None:
    slim.num_heads = dense.num_heads


def change_scale(slim: nn.Module, dense: nn.Module) -> None:
    slim.scale = 2 * dense.scale


WRONG, SHAPES = "slim differs from masked dense", "its forward cannot narrow"
# Fault: the module it is planted in, the layer whose narrower input brings it, the group to blame, how it shows.
FAULTS = {
    "a forgotten consumer": (forget_consumer, "blocks.0", "mlp.fc2", "blocks.0.mlp.fc1", SHAPES),
    "a lost weight": (lose_weight, "blocks.0", "mlp.fc2", "blocks.0.mlp.fc1", WRONG),
    "a swapped order": (swap_order, "blocks.1", "mlp.fc2", "blocks.1.mlp.fc1", WRONG),
    "a swapped query and key": (swap_query_and_key, "blocks.0.attn", "proj", "blocks.0.attn", WRONG),
    "stale heads": (leave_heads_stale, "blocks.1.attn", "proj", "blocks.1.attn", SHAPES),
    "a changed scale": (change_scale, "blocks.0.attn", "proj", "blocks.0.attn", WRONG),
    "a swapped query and key, plain": (swap_query_and_key, "", "proj", "qkv", WRONG),
    "stale heads that fit": (leave_heads_stale, "", "proj", "qkv", WRONG),
    "a changed scale, plain": (change_scale, "", "proj", "qkv", WRONG),
}


def plain_vit() -> nn.Module:
    """A small ViT whose attention reads its `scale`, as the fused one does not."""
    model = timm.create_model("test_vit", num_classes=10, img_size=32, depth=2)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_check_catches_planted_faults(fault, monkeypatch):
    plant, place, trigger, blamed, sign = FAULTS[fault]
    honest = self_check.cut

    def faulty(dense, groups, plan, moments=None):
        slim = honest(dense, groups, plan, moments)
        ours, theirs = slim.get_submodule(place), dense.get_submodule(place)
        if ours.get_submodule(trigger).weight.shape[1] != theirs.get_submodule(trigger).weight.shape[1]:
            plant(ours, theirs)
        return slim

    model = plain_vit() if place else Attention()
    clean = lfrns.check(model, torch.randn(1, 3, 32, 32))
    assert clean.frozen == {} and blamed in clean.checked
    monkeypatch.setattr(self_check, "cut", faulty)
    found = lfrns.check(model, torch.randn(1, 3, 32, 32))
    assert list(found.frozen) == [blamed]
    assert sign in found.frozen[blamed]
    assert sorted(found.checked) == sorted(set(clean.checked) - {blamed})


def bare_images(count: int = 6, size: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, size, size, generator=generator) for _ in range(count)]


def snapshot(model: nn.Module) -> dict:
    plain = {
        name: {k: v for k, v in module.__dict__.items() if isinstance(v, (int, str, float, tuple, bool))}
        for name, module in model.named_modules()
    }
    hooks = [len(d) for m in model.modules() for d in (m._forward_pre_hooks, m._forward_hooks, m._backward_hooks)]
    return {"attributes": plain, "hooks": hooks, "grad": [p.requires_grad for p in model.parameters()]}


@pytest.mark.parametrize("name", ["resnet", "transformers ViT"])
def test_slim_leaves_the_dense_model_alone_and_repeats_itself(name):
    torch.manual_seed(3)
    model = ARCHITECTURES[name]().train()
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    one = lfrns.slim(model, bare_images(), macs=0.6, fcr_steps=3, progress=False)
    assert snapshot(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    other = lfrns.slim(model, bare_images(), macs=0.6, fcr_steps=3, progress=False)
    assert one.plan == other.plan
    again = other.model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in one.model.state_dict().items())
    assert 0.5 < one.report.macs_fraction <= 0.6


@pytest.mark.parametrize("folding", [False, True])
def test_a_cut_copy_shares_no_memory_with_the_dense_network(folding):
    """What is narrowed is not copied before: neither a fold nor later training may write to the dense weights."""
    torch.manual_seed(0)
    model, images = ARCHITECTURES["cifar_resnet20"](), torch.randn(8, 3, 32, 32)
    analysis = lfrns.analyse(model, [images], progress=False)
    dense, groups = analysis.dense, analysis.every
    before = copy.deepcopy(dense.state_dict())
    plan = random_plan([group for group in groups if group.frozen_reason is None], torch.Generator().manual_seed(0))
    slim = cut(dense, groups, plan, analysis.moments if folding else None)
    theirs = {tensor.data_ptr() for tensor in [*dense.parameters(), *dense.buffers()]}
    assert not theirs & {tensor.data_ptr() for tensor in [*slim.parameters(), *slim.buffers()]}
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in before.items())


def test_without_fold_every_weight_is_an_element_of_the_dense_one():
    torch.manual_seed(3)
    model = ARCHITECTURES["vision_transformer"]()
    slim = lfrns.slim(model, bare_images(), macs=0.6, fold=False, fcr_steps=2, progress=False).model
    dense = dict(model.named_parameters())
    for name, parameter in slim.named_parameters():
        assert torch.isin(parameter.detach(), dense[name].detach()).all(), name


def test_both_budgets_hold_together_from_below():
    torch.manual_seed(3)
    report = lfrns.slim(
        timm.create_model("cifar_resnet20"), bare_images(), macs=0.6, params=0.55, fcr_steps=2, progress=False
    ).report
    assert report.macs_fraction <= 0.6 and report.params_fraction <= 0.55
    assert report.macs_fraction > 0.594 or report.params_fraction > 0.5445


def test_the_paper_preset_and_a_researchers_functions_work():
    torch.manual_seed(3)
    model = ARCHITECTURES["resnet"]()
    paper = lfrns.slim(model, bare_images(), macs=0.6, preset="paper", fcr_steps=2, progress=False)
    own = lfrns.slim(
        model,
        bare_images(),
        macs=0.6,
        distance=lambda taps, units: 1 - torch.eye(units, dtype=torch.float64),
        contribution=lambda dense, groups, keep, batches, moments: {g.name: torch.arange(g.size) for g in groups},
        progress=False,
    )
    for result in (paper, own):
        assert 0.5 < result.report.macs_fraction <= 0.6
        assert sum(len(g.redundant) + len(g.weak) for g in result.report.groups) == sum(
            g.dense_units - g.kept_units for g in result.report.groups
        )


def test_an_empty_loader_and_wrong_images_are_refused():
    model = ARCHITECTURES["transformers ViT"]()
    with pytest.raises(ValueError, match="loader is empty"):
        lfrns.slim(model, [], macs=0.5, progress=False)
    with pytest.raises(ValueError, match=r"images \[1, 3, 48, 48\] failed"):
        lfrns.slim(model, bare_images(1, size=48), macs=0.5, progress=False)
    with pytest.raises(ValueError, match=r"images \[1, 1, 32, 32\] failed"):
        lfrns.slim(model, [torch.randn(4, 1, 32, 32)], macs=0.5, progress=False)


def test_a_plan_that_does_not_fit_is_refused():
    model = timm.create_model("cifar_resnet20")
    groups = lfrns.find_units(model, torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="'nowhere'"):
        cut(model, groups, lfrns.SlimPlan({"nowhere": [0]}))
    with pytest.raises(ValueError, match="frozen"):
        cut(model, groups, lfrns.SlimPlan({"linear": [0]}))
    with pytest.raises(ValueError, match=r"within \[0, 16\)"):
        cut(model, groups, lfrns.SlimPlan({"layer1.0.conv1": [3, 16]}))
