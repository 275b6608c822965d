"""Gates in the weights give what gates on the inputs give, and learn alike."""

import copy
from contextlib import ExitStack

import pytest
import timm
import torch
from torch import Tensor, nn

import lfrns_hub as lfrns
from lfrns_hub.method.fcr import gate_loss, learn_contributions
from lfrns_hub.method.fold import best_fold, fold_offset
from lfrns_hub.method.gates import Gate, answer_gated, is_plain, make_gates
from lfrns_hub.method.responses import Moments, collect
from lfrns_hub.method.taps import channel_count, kept_channels
from lfrns_hub.model_io.answers import read_answer
from lfrns_hub.units import Tap, UnitGroup


class Odd(nn.Module):
    """Consumers with an offset and without a bias to put it in, of two kernels, and one whose forward is its own."""

    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, bias=False)
        self.own, self.narrow = self.Doubled(8, 8, 1), nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.wide(self.stem(x).relu()).relu()).relu()
        return self.head(self.narrow(x).relu().mean((2, 3)))


MODELS = {
    "convolutions": lambda: timm.create_model("test_resnet"),
    "heads and neurons": lambda: timm.create_model("test_vit"),
    "depthwise": lambda: timm.create_model("test_efficientnet"),
    "standardised": lambda: timm.create_model("test_nfnet"),
    "odd": Odd,
}


class Prepared:
    """A model with random norms, its groups, moments of a few images, and every other unit to be cut."""

    def __init__(self, kind: str):
        torch.manual_seed(0)
        self.model = MODELS[kind]().double().eval().requires_grad_(False)
        for parameter in self.model.parameters():
            if parameter.ndim <= 1:
                nn.init.uniform_(parameter, 0.5, 1.5)
        size = 12 if kind == "odd" else self.model.pretrained_cfg["input_size"][-1]
        self.batches = [(torch.randn(4, 3, size, size, dtype=torch.float64), torch.arange(4)) for _ in range(5)]
        found = lfrns.find_units(self.model, self.batches[0][0][:1])
        self.groups = [group for group in found if group.exact and not group.frozen_reason and group.size > 1]
        taps = list(dict.fromkeys(tap.module for group in self.groups for tap in group.taps))
        self.moments = collect(self.model, taps, self.batches, macs=1e9, seed=0)
        self.keep = {group.name: list(range(0, group.size, 2)) for group in self.groups}

    def gates(self) -> tuple[dict[str, Tensor], dict[str, Gate]]:
        """Return random gates, as leaves."""
        gates, hooks = make_gates(self.model, self.groups, self.keep, self.moments)
        draw = torch.Generator().manual_seed(1)
        for gate in gates.values():
            gate.data.copy_(torch.rand(gate.shape, generator=draw))
        return gates, hooks


def gate_slowly(
    model: nn.Module,
    groups: list[UnitGroup],
    keep: dict[str, list[int]],
    moments: dict[str, Moments],
    gates: dict[str, Tensor],
    images: Tensor,
) -> Tensor:
    """The formulas of docs/method.md, section 7, on whole inputs, channel by channel."""
    reads: dict[str, list[tuple[UnitGroup, Tap]]] = {}
    for group in groups:
        for tap in group.taps:
            reads.setdefault(tap.module, []).append((group, tap))
    with ExitStack() as stack:
        for name, pairs in reads.items():
            consumer = model.get_submodule(name)
            channel_gate, cut = [torch.ones((), dtype=torch.float64)] * channel_count(consumer), set()
            for group, tap in pairs:
                for unit, channels in enumerate(tap.index.tolist()):
                    for channel in channels:
                        channel_gate[channel] = gates[group.name][unit].double()
                        cut |= {channel} if unit not in keep[group.name] else set()
            leave = torch.tensor(sorted(cut), dtype=torch.int64)
            kept = kept_channels(model, name, [leave])
            fold = best_fold(moments[name], consumer.weight, kept, leave) if name in moments else None
            offset = fold_offset(moments[name], kept, leave, fold) if fold is not None else None

            def hook(module, inputs, gate=channel_gate, kept=kept, leave=leave, fold=fold, offset=offset):
                x = inputs[0] if isinstance(module, nn.Linear) else inputs[0].movedim(1, -1)
                parts = [x[..., c] * gate[c] for c in range(len(gate))]
                for row, c in enumerate(leave.tolist() if fold is not None else []):
                    standing = x[..., kept] @ fold[row]
                    if not isinstance(module, nn.Conv2d) or not any(module.padding):
                        standing = standing + float(offset[row])
                    parts[c] = parts[c] + (1 - gate[c]) * standing
                x = torch.stack(parts, -1)
                return x if isinstance(module, nn.Linear) else x.movedim(-1, 1)

            stack.callback(consumer.register_forward_pre_hook(hook).remove)
        return read_answer(model, model(images)).parts[0]


@pytest.mark.parametrize("kind", MODELS)
def test_gates_in_the_weights_equal_gates_on_the_inputs_in_value_and_gradient(kind: str) -> None:
    case = Prepared(kind)
    gates, hooks = case.gates()
    before = copy.deepcopy(case.model.state_dict())
    images = case.batches[0][0][:2]
    got = answer_gated(case.model, hooks, images).parts[0]
    expected = gate_slowly(case.model, case.groups, case.keep, case.moments, gates, images)
    plain = case.model(images)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()  # the gates do something
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.detach().abs().max()))
    direction = torch.randn(got.shape, dtype=got.dtype)
    ours = torch.autograd.grad((got * direction).sum(), list(gates.values()))
    theirs = torch.autograd.grad((expected * direction).sum(), list(gates.values()))
    for name, one, other in zip(gates, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), msg=name)
    after = case.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in case.model.modules())


def test_every_way_to_gate_is_taken_by_the_models_above() -> None:
    case = Prepared("odd")
    _, hooks = case.gates()
    plain = {name: is_plain(case.model.get_submodule(name)) for name in hooks}
    assert plain == {"wide": True, "own": False, "narrow": True, "head": True}
    assert {name for name, gate in hooks.items() if gate.offset is not None} >= {"wide", "narrow", "head"}
    assert case.model.wide.bias is None and case.model.head.bias is None
    model = timm.create_model("test_nfnet")
    assert {is_plain(m) for m in model.modules() if isinstance(m, timm.layers.ScaledStdConv2d)} == {False}


def test_what_reads_more_than_a_weight_by_its_name_is_gated_at_its_input() -> None:
    assert is_plain(nn.Conv2d(4, 4, 3)) and is_plain(nn.Linear(4, 4))
    assert not is_plain(nn.Conv2d(4, 4, 3, groups=2)) and not is_plain(nn.ConvTranspose2d(4, 4, 3))
    assert not is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    assert not is_plain(patched)


def test_without_moments_nothing_stands_in_and_a_shared_weight_is_gated_for_its_own_layer_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    model[0].weight = model[1].weight
    group = UnitGroup("0", "neuron", 3, taps=(Tap("1", torch.arange(3)[:, None]),))
    gates, hooks = make_gates(model, [group], {"0": [0, 2]}, {})
    images = torch.randn(5, 3)
    expected = model[1](model[0](images) * gates["0"])
    torch.testing.assert_close(answer_gated(model, hooks, images).parts[0], expected)


def test_the_contribution_is_what_each_gates_moves_gained() -> None:
    case = Prepared("odd")
    gates, _ = make_gates(case.model, case.groups, case.keep, case.moments)
    values, adam = list(gates.values()), torch.optim.Adam(gates.values(), lr=0.02)
    gained = [torch.zeros(len(value), dtype=torch.float64) for value in values]
    for images, labels in case.batches[:3]:
        target = read_answer(case.model, case.model(images))
        answer = gate_slowly(case.model, case.groups, case.keep, case.moments, gates, images)
        loss = gate_loss(read_answer(case.model, answer), target, labels, slice(None)) / len(images)
        gradients = torch.autograd.grad(loss, values)
        old = [value.detach().clone() for value in values]
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        adam.step()
        for number, value in enumerate(values):
            value.data.clamp_(0, 1)
            gained[number] -= (gradients[number] * (value.detach() - old[number])).double()
    got = learn_contributions(case.model, case.groups, case.keep, case.batches, case.moments, steps=3)
    for expected, name in zip(gained, got, strict=True):
        torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_not_finite_names_the_steps_asked_for() -> None:
    case = Prepared("odd")
    images = torch.full_like(case.batches[0][0], float("inf"))
    with pytest.raises(FloatingPointError, match=r"fcr_steps=7: the loss is nan at step 0\. Check the images' scale"):
        learn_contributions(case.model, case.groups, case.keep, [(images, None)], case.moments, steps=7)
