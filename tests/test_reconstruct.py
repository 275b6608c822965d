"""The fold, layer after layer: what a layer reads, the fit, and what it makes of a cut network."""

import copy

import pytest
import timm
import torch
from torch import nn

import lfrns_hub as lfrns
from lfrns_hub.method.reconstruct import count_places, kept_outputs, patches, reconstruct, solve
from lfrns_hub.surgery import cut
from lfrns_hub.trace import trace_model


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), (7, 5)),
        (nn.Conv2d(6, 8, (3, 1), stride=2, padding=(2, 0)), (9, 6)),
        (nn.Conv2d(6, 9, 3, padding=2, dilation=2, groups=3), (8, 8)),
        (nn.Conv2d(6, 6, 5, groups=6), (8, 7)),
        (nn.Conv1d(6, 4, 3, padding=1), (11,)),
        (nn.Conv3d(6, 4, 2), (4, 3, 5)),
    ],
)
def test_patches_are_what_a_convolution_reads(conv, size):
    """Gathered entries times the weight give the convolution's own outputs, at every position."""
    images = torch.randn(3, 6, *size)
    expected = conv(images).flatten(2).mT  # [N, places, O]
    positions = torch.stack([torch.randperm(expected.shape[1]) for _ in images])
    rows = patches(conv, images, positions)  # [N places, G, P]
    weight = conv.weight.view(conv.groups, conv.out_channels // conv.groups, -1)
    got = torch.einsum("rgp,gop->rgo", rows, weight).flatten(1) + conv.bias
    wanted = expected.gather(1, positions[..., None].expand_as(expected)).flatten(0, 1)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_solve_gives_the_least_squares_weight_and_is_drawn_to_its_start():
    """Without a ridge it is lstsq; under a heavy one it stays where it started."""
    rows, true = torch.randn(50, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    inner, cross, start = (rows.T @ rows)[None], (true @ rows.T @ rows)[None], torch.ones(1, 3, 4, dtype=torch.float64)
    pull = torch.ones(1, 4, dtype=torch.float64)
    torch.testing.assert_close(solve(inner, cross, start, 0 * pull)[0], true, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(solve(inner, cross, start, 1e12 * pull), start, atol=1e-6, rtol=1e-6)


def test_sites_know_what_is_added_to_a_layer():
    """Residual sums of a BatchNorm net, a ViT and a net that permutes: the summand that is there before the layer."""
    resnet = trace_model(timm.create_model("cifar_resnet20"), torch.zeros(1, 3, 32, 32))
    sites = {site.module: site for site in resnet.sites}
    assert len(sites) == 20
    assert sites["layer2.0.conv2"].norm == "layer2.0.bn2"
    assert sites["layer2.0.conv2"].other == ("layer2.0.shortcut", "output")
    assert sites["layer2.0.conv1"].other is None
    vit = {s.module: s for s in trace_model(timm.create_model("test_vit"), torch.zeros(1, 3, 160, 160)).sites}
    assert vit["blocks.1.mlp.fc2"].other is not None
    assert not vit["blocks.1.mlp.fc2"].other_first
    model = timm.create_model("convnext_atto", ls_init_value=0.1, conv_mlp=False)
    convnext = {s.module: s for s in trace_model(model, torch.zeros(1, 3, 64, 64)).sites}
    last = next(s for name, s in convnext.items() if name.endswith("mlp.fc2"))
    assert last.other is not None
    assert last.other_first
    assert len(last.scales) == 1


def planted() -> nn.Module:
    """A residual net whose inner channels 4 to 7 are those of 0 to 3, shifted, doubled or mixed."""
    model = timm.create_model("cifar_resnet20").eval()
    for block in (model.layer1[0], model.layer1[2]):
        with torch.no_grad():
            for norm in (block.bn1, block.bn2):
                norm.running_mean.normal_(0, 0.2)
            block.conv1.weight[4:8] = block.conv1.weight[:4]
            for tensor in (block.bn1.running_mean, block.bn1.running_var, block.bn1.weight, block.bn1.bias):
                tensor[4:8] = tensor[:4]
    return model


def test_what_others_can_express_is_folded_without_loss():
    """Units that are copies of others leave, and the network answers as before."""
    model, images = planted(), [torch.randn(8, 3, 32, 32) for _ in range(5)]
    trace = trace_model(model, images[0])
    keep = [0, 1, 2, 3, *range(8, 16)]
    plan = lfrns.SlimPlan({"layer1.0.conv1": keep, "layer1.2.conv1": keep})
    plain = cut(model, trace.groups, plan)
    folded = reconstruct(model, plain, trace.sites, trace.groups, plan, images)
    fresh = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        lost = (plain(fresh) - model(fresh)).abs().max()
        left = (folded(fresh) - model(fresh)).abs().max()
    assert left < 0.02 * lost


def windowed(_name: object = None) -> nn.Module:
    """A Swin of two stages, whose attention sees windows of all images in one axis."""
    return timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=10
    )


class PositionsFirst(nn.Module):
    """Tokens before images, as old transformers have them: rows of different batches do not pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2 = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        """Return logits [N, 5]."""
        x = self.stem(x).flatten(2).permute(2, 0, 1)  # [T, N, C]
        return self.head(self.fc2(self.fc1(x).relu()).mean(0))


def test_rows_that_do_not_pair_are_left_alone():
    """The layers between keep their weights; those before and after are fitted."""
    model, images = PositionsFirst().eval(), [torch.randn(6, 3, 16, 16) for _ in range(5)]
    trace = trace_model(model, images[0])
    assert set(count_places(model, trace.sites, images[0][:2])) == {"stem", "head"}
    plan = lfrns.SlimPlan({"fc1": list(range(8))})
    plain = cut(model, trace.groups, plan)
    fitted = reconstruct(model, plain, trace.sites, trace.groups, plan, images)
    assert torch.equal(fitted.fc2.weight, plain.fc2.weight)
    assert not torch.equal(fitted.head.weight, plain.head.weight)


def test_windows_of_all_images_pair():
    """In a Swin's attention too, where the leading axis is images x windows."""
    model, images = windowed().eval(), torch.randn(2, 3, 32, 32)
    sites = trace_model(model, images).sites
    places = count_places(model, sites, images)
    assert places["layers.0.blocks.1.attn.qkv"] == 16 * 16
    assert len(places) == len(sites)


@pytest.mark.parametrize(
    ("name", "size"), [("cifar_resnet20", 32), ("test_vit", 160), ("convnext_atto", 64), (windowed, 32)]
)
def test_a_cut_network_comes_nearer_and_nothing_else_changes(name, size):
    """On fresh images too; what came in is as it was, without hooks; the same seed gives the same weights."""
    torch.manual_seed(0)
    model = (windowed if name is windowed else timm.create_model)(name).eval()
    for parameter in model.parameters():  # a fresh head answers with 1e-14
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    images = [torch.randn(12, 3, size, size) for _ in range(5)]
    trace = trace_model(model, images[0])
    free = [g for g in trace.groups if g.frozen_reason is None and g.exact]
    plan = lfrns.SlimPlan({g.name: list(range(-(-g.size // 2))) for g in free})
    plain = cut(model, trace.groups, plan)
    before = copy.deepcopy(plain.state_dict()), copy.deepcopy(model.state_dict())
    fitted = reconstruct(model, plain, trace.sites, trace.groups, plan, images, seed=3)
    again = reconstruct(model, plain, trace.sites, trace.groups, plan, images, seed=3)
    for old, network in zip(before, (plain, model), strict=True):
        assert all(torch.equal(old[key], value) for key, value in network.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fitted.modules())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in fitted.state_dict().items())
    fresh = torch.randn(24, 3, size, size)
    with torch.no_grad():
        lost = (plain(fresh) - model(fresh)).square().mean()
        left = (fitted(fresh) - model(fresh)).square().mean()
    assert left < 0.7 * lost


def test_kept_outputs_follow_the_plan():
    """The outputs of a layer that a plan leaves."""
    model = timm.create_model("cifar_resnet20").eval()
    trace = trace_model(model, torch.zeros(1, 3, 32, 32))
    plan = lfrns.SlimPlan({"layer1.0.conv1": [1, 5]})
    assert kept_outputs(model, "layer1.0.conv1", trace.groups, plan).tolist() == [1, 5]
    assert len(kept_outputs(model, "layer1.0.conv2", trace.groups, plan)) == 16


class TokenMixer(nn.Module):
    """A network one layer of which mixes positions: what it runs over are the units of the layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(16, 16)
        self.shrink, self.head = nn.Linear(24, 8), nn.Linear(8, 5)

    def forward(self, x):
        """Return logits [N, 5]."""
        x = self.grow(self.stem(x).flatten(2).mT).relu()  # [N, T, 24]
        return self.head(self.shrink(self.mix(x.mT).mT).mean(1))


def test_a_layer_whose_positions_are_units_is_not_fitted():
    model, images = TokenMixer().eval(), [torch.randn(6, 3, 16, 16) for _ in range(5)]
    trace = trace_model(model, images[0])
    group = next(group for group in trace.groups if group.name == "grow")
    plan = lfrns.SlimPlan({"grow": list(range(3, group.size))})
    plain = cut(model, trace.groups, plan)
    fitted = reconstruct(model, plain, trace.sites, trace.groups, plan, images)
    assert torch.equal(fitted.mix.weight, plain.mix.weight)
    assert not torch.equal(fitted.shrink.weight, plain.shrink.weight)
