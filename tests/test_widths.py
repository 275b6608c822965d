"""Widths that follow a cut: splits, shared modules, tables, gains; each in a module of ten lines, checked by value."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import lfrns_hub as lfrns
from lfrns_hub.surgery import cut
from lfrns_hub.trace import adapters, trace_model
from lfrns_hub.units import UnitGroup


class Images(nn.Module):
    """A first layer, a `body` of the subclass, and a classifier over the mean of its map."""

    def __init__(self, made: int, read: int):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, made, 3, 2), nn.Conv2d(read, 6, 1)

    def forward(self, images):
        return self.last(self.body(self.first(images))).mean((2, 3))


class Tokens(nn.Module):
    """Patches of width 16, a `body` of the subclass beside them, and a classifier over their mean."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 6)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        return self.head((x + self.body(x)).mean(1))


class StatedSplit(Images):
    def __init__(self, parts):
        super().__init__(24, 24)
        self.dims = parts
        self.one, self.two = nn.Conv2d(parts[0], 24, 1), nn.Conv2d(parts[1], 24, 1)

    def body(self, x):
        one, two = x.split(self.dims, 1)
        return (self.one(one) + self.two(two)).relu()


class EqualSplit(Images):
    def __init__(self):
        super().__init__(24, 8)
        self.hidden_dim = 12
        self.one, self.two = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 1)

    def body(self, x):
        one, two = x.split(self.hidden_dim, 1)
        return self.one(one.relu()) + self.two(two)


class Halves(Images):
    def __init__(self):
        super().__init__(16, 8)
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def body(self, x):
        one, two = x.chunk(2, 1)
        return self.one(one.relu()) + self.two(two)


class Stacked(Images):
    def __init__(self):
        super().__init__(8, 12)
        self.one, self.two = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)

    def body(self, x):
        return torch.stack([self.one(x), self.two(x)], 1).flatten(1, 2)


class Twice(Images):
    def __init__(self):
        super().__init__(8, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def body(self, x):
        return self.conv(self.conv(x).relu())


class Shuffled(Images):
    """ShuffleNet's unit: half of the channels pass, half are worked on, and the two take turns."""

    def __init__(self):
        super().__init__(16, 16)
        self.conv = nn.Conv2d(8, 8, 1)

    def body(self, x):
        kept, worked = x.chunk(2, 1)
        return torch.stack([kept, self.conv(worked).relu()], 2).flatten(1, 2)


class StandardConv(nn.Conv2d):
    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Standardised(Images):
    def __init__(self):
        super().__init__(12, 8)
        self.conv = StandardConv(12, 8, 3)

    def body(self, x):
        return self.conv(x.relu()).relu()


class GatedByMean(Images):
    """ConvNeXt V2's global response norm."""

    def __init__(self):
        super().__init__(12, 12)
        self.gain = nn.Parameter(torch.randn(1, 12, 1, 1))

    def body(self, x):
        strength = x.norm(dim=(2, 3), keepdim=True)
        return x + self.gain * (x * strength / (strength.mean(1, keepdim=True) + 1e-6))


class SwiGLU(Tokens):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(24, 16)

    def body(self, x):
        gate, value = self.fc1(self.norm(x)).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class Attention(Tokens):
    """Four heads of width 8 with a bias from a table of relative positions; rotary, or with one key for all."""

    def __init__(self, rotary=False, key_heads=4):
        super().__init__()
        self.num_heads, self.key_heads, self.rotary = 4, key_heads, rotary
        self.q, self.kv, self.proj = nn.Linear(16, 32), nn.Linear(16, 16 * key_heads), nn.Linear(32, 16)
        self.table = nn.Parameter(torch.randn(7, 4))
        self.register_buffer("index", torch.randint(0, 7, (16, 16)))
        self.register_buffer("angle", torch.randn(16, 8))

    def turn(self, x):
        return x * self.angle.cos() + torch.cat([-x[..., 4:], x[..., :4]], -1) * self.angle.sin()

    def body(self, x):
        b, n, _ = x.shape
        q = self.q(x).reshape(b, n, -1, 8).transpose(1, 2)
        k, v = self.kv(x).reshape(b, n, 2, -1, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotary:
            q, k = self.turn(q), self.turn(k)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        x = (q @ k.mT * 8**-0.5 + bias).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


def read(model: nn.Module) -> dict[str, UnitGroup]:
    """Find the groups of a model and check it: no exact group fails, by value in float64."""
    images = torch.randn(1, 3, 16, 16)
    groups = {g.name: g for g in lfrns.find_units(model, images)}
    report = lfrns.check(model, images)
    assert report.frozen == {}
    assert report.largest_error <= 1e-8 and (report.moved > 1e-3 or not report.checked)
    assert sorted(report.checked) == sorted(n for n, g in groups.items() if g.exact and g.frozen_reason is None)
    return groups


def stated(group: UnitGroup) -> list[tuple]:
    """List the attributes of the model itself that follow a group."""
    return [(w.module, w.attribute, w.entry, w.per_unit) for w in group.widths if not w.module]


def lines(group: UnitGroup, tensor: str, dim: int = 0) -> list[list[int]]:
    """Return the positions of each unit along an axis of a tensor."""
    return next(s.index.tolist() for s in group.slices if (s.tensor, s.dim) == (tensor, dim))


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_split_by_a_stated_list_follows_each_of_its_parts(kind):
    model = StatedSplit(kind([16, 8]))
    groups = read(model)
    one, two = groups["first"], groups["first#2"]
    assert (one.size, one.exact, stated(one)) == (16, True, [("", "dims", 0, 1)])
    assert (two.size, two.exact, stated(two)) == (8, True, [("", "dims", 1, 1)])
    slim = cut(model, list(groups.values()), lfrns.SlimPlan({"first": [0, 5, 9], "first#2": [1]}))
    assert slim.dims == kind([3, 1]) and model.dims == kind([16, 8])
    assert slim(torch.randn(1, 3, 16, 16)).shape == (1, 6)


def test_a_split_by_a_stated_number_keeps_its_parts_equal():
    group = read(EqualSplit())["first"]
    assert (group.size, group.kind, group.exact) == (12, "channel", True)
    assert stated(group) == [("", "hidden_dim", None, 1)]
    assert lines(group, "first.weight") == [[i, i + 12] for i in range(12)]


def test_the_parts_of_a_chunk_stay_equal():
    group = read(Halves())["first"]
    assert (group.size, group.kind, group.exact) == (8, "channel", True)
    assert lines(group, "first.weight") == [[i, i + 8] for i in range(8)]


def test_what_is_stacked_stays_equal():
    group = read(Stacked())["one"]
    assert (group.size, group.exact, group.frozen_reason) == (6, True, None)
    assert lines(group, "one.weight") == lines(group, "two.weight") == [[i] for i in range(6)]
    assert lines(group, "last.weight", 1) == [[i, i + 6] for i in range(6)]


def test_a_module_called_twice_keeps_its_two_sides_equal():
    group = read(Twice())["first"]
    assert (group.size, group.exact, group.frozen_reason) == (8, True, None)
    assert lines(group, "conv.weight", 0) == lines(group, "conv.weight", 1) == [[i] for i in range(8)]


def test_a_channel_shuffle_takes_channels_in_pairs():
    group = read(Shuffled())["first"]
    assert (group.size, group.exact, group.frozen_reason) == (8, True, None)
    assert lines(group, "last.weight", 1) == [[2 * i, 2 * i + 1] for i in range(8)]


def test_inputs_of_a_standardised_weight_are_approximate_and_its_outputs_exact():
    model = Standardised()
    groups = read(model)
    assert (groups["first"].size, groups["first"].exact, groups["first"].frozen_reason) == (12, False, None)
    assert (groups["conv"].size, groups["conv"].exact, groups["conv"].frozen_reason) == (8, True, None)
    images = [torch.randn(8, 3, 16, 16) for _ in range(5)]
    options = {"macs": 0.5, "fcr_steps": 0, "widths": "uniform", "progress": False}
    assert lfrns.slim(model, images, **options).model.conv.in_channels == 12
    slim = lfrns.slim(model, images, approximate=True, **options).model
    assert slim.conv.in_channels == slim.first.out_channels < 12 and slim.conv.out_channels < 8
    assert slim(images[0]).shape == (8, 6)


def test_a_response_norm_over_channels_makes_them_approximate():
    group = read(GatedByMean())["first"]
    assert (group.size, group.exact, group.frozen_reason) == (12, False, None)
    assert lines(group, "gain", 1) == [[i] for i in range(12)]


def test_a_fused_gate_and_value_leave_together_and_the_normed_residual_is_approximate():
    groups = read(SwiGLU())
    hidden, residual = groups["fc1"], groups["patches"]
    assert (hidden.kind, hidden.size, hidden.exact, hidden.frozen_reason) == ("neuron", 24, True, None)
    assert lines(hidden, "fc1.weight") == [[i, i + 24] for i in range(24)]
    assert (residual.kind, residual.size, residual.exact, residual.frozen_reason) == ("channel", 16, False, None)
    assert ("norm", "normalized_shape", 0, 1) in [(w.module, w.attribute, w.entry, w.per_unit) for w in residual.widths]


@pytest.mark.parametrize("rotary", [False, True])
def test_heads_take_their_column_of_a_table_of_relative_positions(rotary):
    groups = read(Attention(rotary))
    heads = next(g for g in groups.values() if g.kind == "head")
    assert (heads.size, heads.exact, heads.frozen_reason) == (4, True, None)
    assert lines(heads, "table", 1) == [[0], [1], [2], [3]]
    assert lines(heads, "q.weight") == lines(heads, "proj.weight", 1) == torch.arange(32).view(4, 8).tolist()
    assert lines(heads, "kv.weight")[1] == [*range(8, 16), *range(40, 48)]
    assert {s.tensor for s in heads.slices}.isdisjoint({"index", "angle"})


@pytest.mark.parametrize("rotary", [False, True])
def test_heads_leave_the_one_key_and_value_of_multi_query_attention_whole(rotary):
    groups = read(Attention(rotary, key_heads=1))
    heads = next(g for g in groups.values() if g.kind == "head")
    assert (heads.size, heads.exact, heads.frozen_reason) == (4, True, None)
    assert "kv.weight" not in {s.tensor for s in heads.slices if s.dim == 0}
    shared = [g for n, g in groups.items() if n.startswith("kv")]
    assert sum(g.size for g in shared) <= 16 and all(g.frozen_reason for g in shared)
    assert any("all heads share it" in g.frozen_reason for g in shared)


def test_linear_layers_state_the_shape_of_their_weight_after_heads_left():
    model = timm.create_model("test_vit", num_classes=5, img_size=32, depth=1, dynamic_img_size=False)
    groups = lfrns.find_units(model, torch.randn(1, 3, 32, 32))
    slim = cut(model, groups, lfrns.SlimPlan({"blocks.0.attn": [1]}))
    for name, layer in slim.named_modules():
        if isinstance(layer, nn.Linear):
            assert (layer.out_features, layer.in_features) == layer.weight.shape, name


def test_a_table_of_positions_that_the_forward_resizes_freezes_no_channel():
    model = timm.create_model("test_vit", num_classes=5, img_size=32, depth=1, dynamic_img_size=True)
    groups = {g.name: g for g in lfrns.find_units(model, torch.randn(1, 3, 32, 32))}
    assert groups["patch_embed.proj"].frozen_reason is None


def test_parameters_of_a_module_called_twice_are_counted_once():
    model, images = Twice(), torch.randn(1, 3, 32, 32)
    trace = trace_model(model, images)
    group = next(g for g in trace.groups if g.frozen_reason is None)
    slim = cut(model, trace.groups, lfrns.SlimPlan({group.name: list(range(group.size // 2))}))
    assert trace.cost.params({group.name: group.size // 2}) == sum(p.numel() for p in slim.parameters())


def test_an_adapter_that_names_no_width_of_its_class_is_refused(monkeypatch):
    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))
    lfrns.register_adapter("timm.layers.attention.Attention", heads=lfrns.widths("num_hedas"))
    with pytest.raises(
        ValueError, match=r"widths\('num_hedas'\)\): in blocks.0.attn it is None, and 2 heads lie there"
    ):
        lfrns.find_units(timm.create_model("test_vit", img_size=32), torch.randn(1, 3, 32, 32))


def test_a_number_that_counts_units_freezes_them():
    class Counts(Images):
        def body(self, x):
            return x * x.argmax(1, keepdim=True).float()

    reasons = [g.frozen_reason for g in lfrns.find_units(Counts(8, 8), torch.randn(1, 3, 32, 32)) if g.name == "first"]
    assert reasons and "aten.argmax" in reasons[0]
