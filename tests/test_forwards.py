"""Forwards as people write them: what is free is cut exactly, what is not says why, the rest is refused."""

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lfrns_hub as lfrns
from lfrns_hub.method.fcr import learn_contributions
from lfrns_hub.model_io.batches import read_logits
from lfrns_hub.model_io.model import default_dtype, in_channels_last, same_draw
from lfrns_hub.self_check import waking
from lfrns_hub.surgery import cut
from lfrns_hub.trace import graph
from lfrns_hub.trace.forward import watch_forward
from lfrns_hub.trace.rules.registry import find_rule
from lfrns_hub.units import SlimPlan, UnitGroup


class Net(nn.Module):
    """Three convolutions and a head; between the second and the third the way that a case goes."""

    def __init__(self, way: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 1, 1), nn.Conv2d(16, 10, 3, 1, 1)
        self.head, self.way = nn.Linear(10, 5), way
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images: Tensor) -> Any:
        return self.tail(self.way(self, self.b(self.a(images).relu()).relu()))

    def tail(self, x: Tensor) -> Tensor:
        return self.head(self.c(x).relu().mean((2, 3)))


IMAGES = (3, 16, 16)
KERNEL = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])[None, None]


def write_rows(_: Net, x: Tensor) -> Tensor:
    x[:, :, 0] = 0
    x[..., -1] += 1.0
    x[:, :, torch.tensor([2, 4])] = 0.5
    return x


def write_quadrants(_: Net, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape, device=x.device)
    half = x.shape[2] // 2
    out[:, :, :half] = x[:, :, half:]
    out[:, :, half:] = 2 * x[:, :, :half]
    return out


def write_by_mask(_: Net, x: Tensor) -> Tensor:
    x[x < 0.1] = 0.0
    return torch.where(x > 0.5, x, torch.zeros_like(x)) + x.masked_fill(x > 1, 0.2)


def keep_random_positions(net: Net, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    order = torch.rand(tokens.shape[:2]).argsort(1)
    kept = torch.gather(tokens, 1, order[:, :16, None].expand(-1, -1, tokens.shape[2]))
    return net.mix(kept).transpose(1, 2).unflatten(2, (4, 4))


def add_tokens(net: Net, x: Tensor) -> Tensor:
    tokens = torch.cat([net.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    return tokens[:, net.token.shape[1] :].transpose(1, 2).unflatten(2, (8, 8))


def view_after_copy(_: Net, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).contiguous().view(n, height * width, channels)
    return rows.transpose(1, 2).clone(memory_format=torch.contiguous_format).view(n, channels, height, width)


def windows(_: Net, x: Tensor) -> Tensor:
    columns = F.unfold(x, 3, padding=1)
    return F.fold(columns, x.shape[2:], 3, padding=1) + columns.view(*x.shape[:2], 9, *x.shape[2:]).mean(2)


def spread_attention(net: Net, x: Tensor) -> Tensor:
    weight = torch.einsum("bchw,bcij->bhwij", net.q(x), net.k(x)).flatten(3).softmax(-1).view(len(x), 8, 8, 8, 8)
    return torch.einsum("bhwij,bcij->bchw", weight, x)


def sum_by_einsum(_: Net, x: Tensor) -> Tensor:
    return x + torch.einsum("nchw->nc", x)[..., None, None] / 64 + torch.einsum("...h,...h->...", x, x)[..., None] / 8


def sort_positions(_: Net, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return (flat.sort(2).values + flat.topk(4).values.mean(2, keepdim=True)).view(x.shape)


def repeat_a_kernel(_: Net, x: Tensor) -> Tensor:
    return F.conv2d(x, KERNEL.to(x).repeat(x.shape[1], 1, 1, 1), padding=1, groups=x.shape[1])


def weigh_frequencies(net: Net, x: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(net.weights))


def a(channels: int, out: int) -> nn.Module:
    return nn.Conv2d(channels, out, 1)


# The way, what it takes, and why the units that it reads are frozen ("" where they are free).
WAYS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], str]] = {
    "rows are written": (write_rows, {}, ""),
    "a new tensor is written": (write_quadrants, {}, ""),
    "picked values are written": (write_by_mask, {}, ""),
    "a literal is a tensor": (lambda _, x: x * torch.tensor([2.0]) + torch.tensor(0.5), {}, ""),
    "random positions stay": (keep_random_positions, {"mix": nn.Linear(16, 16)}, ""),
    "noise is of an image": (lambda _, x: x * torch.rand(len(x), 1, 1, 1), {}, ""),
    "noise is of a unit": (lambda _, x: x + torch.randn_like(x), {}, "draws a random number for each unit"),
    "dropout is always on": (lambda _, x: F.dropout(x, 0.2), {}, "draws a random number for each unit"),
    "no tokens": (add_tokens, {"token": nn.Parameter(torch.zeros(1, 0, 16))}, ""),
    "two tokens": (add_tokens, {"token": nn.Parameter(torch.zeros(1, 2, 16))}, ""),
    "views after copies": (view_after_copy, {}, ""),
    "windows of positions": (windows, {}, ""),
    "an einsum of attention": (spread_attention, {"q": a(16, 4), "k": a(16, 4)}, ""),
    "an einsum that sums": (sum_by_einsum, {}, ""),
    "positions in order": (sort_positions, {}, ""),
    "channels in order": (lambda _, x: x.sort(1).values, {}, "its place among others"),
    "channels by a table": (lambda _, x: x[:, torch.arange(15, -1, -1)], {}, "picked by a table"),
    "Fourier": (weigh_frequencies, {"weights": nn.Parameter(torch.randn(16, 8, 5, 2))}, ""),
    "Fourier of channels": (lambda _, x: torch.fft.fft(x, dim=1).real, {}, "Fourier transform runs over"),
    "one kernel for all": (repeat_a_kernel, {}, ""),
    "a kernel that is no layer's": (
        lambda net, x: F.conv2d(x, net.kernel, padding=1, groups=x.shape[1]),
        {"kernel": nn.Parameter(torch.randn(16, 1, 3, 3))},
        "",
    ),
    "a weight that is no layer's": (
        lambda net, x: F.conv2d(x, net.kernel, padding=1),
        {"kernel": nn.Parameter(torch.randn(16, 16, 3, 3))},
        "used outside its layer",
    ),
    "a kernel along channels": (
        lambda net, x: x * net.eca(x.mean((2, 3))[:, None])[:, 0, :, None, None],
        {"eca": nn.Conv1d(1, 1, 3, padding=1)},
        "slides over the axis on which units lie",
    ),
    "channels times channels": (
        lambda _, x: x * (x.flatten(2) @ x.flatten(2).transpose(1, 2)).mean((1, 2))[:, None, None, None],
        {},
        "multiplied with every other",
    ),
    "a parameter as a matrix": (
        lambda net, x: (x.flatten(2).transpose(1, 2) @ net.matrix).transpose(1, 2).unflatten(2, (8, 8)),
        {"matrix": nn.Parameter(torch.randn(16, 16))},
        "a parameter of no layer contracts it",
    ),
    "a recurrent layer": (
        lambda net, x: x + net.lstm(x.flatten(2).transpose(1, 2), (torch.zeros(1, len(x), 16),) * 2)[0].mean((1, 2))[0],
        {"lstm": nn.LSTM(16, 16, batch_first=True)},
        "a recurrent layer reads it",
    ),
}  # fmt: skip


def zeroed(model: nn.Module, groups: list[UnitGroup], plan: SlimPlan) -> nn.Module:
    """The dense model with the columns of removed units zeroed in every consumer: no hook of the library's own."""
    model = copy.deepcopy(model)
    for group in groups:
        for tap in group.taps:
            model.get_submodule(tap.module).weight.data[:, tap.index[plan.removed(group)].flatten()] = 0
    return model


def thinned(groups: list[UnitGroup], seed: int = 0) -> SlimPlan:
    """A random plan that takes one to half of the units of every free group."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in groups:
        if group.frozen_reason is None and group.exact:
            gone = int(torch.randint(1, group.size // 2 + 1, (), generator=generator))
            keep[group.name] = sorted(torch.randperm(group.size, generator=generator)[gone:].tolist())
    return SlimPlan(keep)


def cut_error(model: nn.Module, groups: list[UnitGroup], training: bool = False) -> float:
    """The error of the cut over the largest output, after a look that the cut changes something."""
    model, images = model.double().train(training), torch.randn(2, *IMAGES, dtype=torch.float64)
    plan = thinned(groups)
    with torch.no_grad(), default_dtype(torch.float64):
        dense, want, got = (
            read_outputs(m, images) for m in (model, zeroed(model, groups, plan), cut(model, groups, plan))
        )
    assert not torch.allclose(dense, want, rtol=1e-4)
    return float((got - want).abs().max() / want.abs().max())


def read_outputs(model: nn.Module, images: Tensor) -> Tensor:
    with same_draw():
        return read_logits(model(images.clone()))


def reasons(groups: list[UnitGroup]) -> dict[str, str]:
    frozen = {group.name: group.frozen_reason for group in groups if group.frozen_reason}
    return {name: reason for name, reason in frozen.items() if reason != "it is the network's output"}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_forward_does_with_units_is_followed_or_frozen_with_the_true_reason(way):
    torch.manual_seed(0)
    forward, layers, why = WAYS[way]
    model = Net(forward, **layers).eval()
    groups = lfrns.find_units(model, torch.zeros(1, *IMAGES))
    by_name = {group.name: group for group in groups}
    if why:
        assert why in by_name["b"].frozen_reason
    else:
        assert by_name["b"].frozen_reason is None
        assert by_name["b"].size == 16
    assert by_name["a"].frozen_reason is None
    assert cut_error(model, groups) < 1e-9


def test_what_a_transposed_convolution_makes_is_cut_with_what_it_is_added_to():
    class Decoder(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x: net.up(net.down(x).relu()) + x)
            self.down, self.up = nn.Conv2d(16, 20, 3, 2, 1), nn.ConvTranspose2d(20, 16, 2, 2)

    model, images = Decoder().eval(), torch.zeros(1, *IMAGES)
    groups = lfrns.find_units(model, images)
    assert list(reasons(groups)) == ["down"]
    assert "a transposed convolution reads it" in reasons(groups)["down"]
    plan = thinned(groups)
    slim = cut(model, groups, plan)
    assert slim.up.out_channels == slim.up.weight.shape[1] == len(plan.keep["b"]) < 16
    assert cut_error(model, groups) < 1e-9


def test_positions_by_a_table_are_added_and_narrowed():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.table = nn.Conv2d(3, 16, 4, 4), nn.Embedding(16, 16)
            self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patches(images).flatten(2).transpose(1, 2) + self.table(torch.arange(16))
            return self.head((tokens + self.down(self.up(tokens).relu())).mean(1))

    model = Positions().eval()
    groups = lfrns.find_units(model, torch.zeros(1, *IMAGES))
    assert not reasons(groups)
    assert cut_error(model, groups) < 1e-9


def test_coordinates_made_in_forward_reach_the_first_layer():
    class Coordinates(Net):
        def __init__(self) -> None:
            super().__init__(lambda _, x: x)
            self.a = nn.Conv2d(5, 12, 3, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            rows, columns = torch.meshgrid(torch.linspace(-1, 1, 16), torch.arange(16) / 16, indexing="ij")
            grid = torch.stack([rows, columns]).repeat(len(images), 1, 1, 1)
            return super().forward(torch.cat([images, grid], 1))

    model, images = Coordinates().eval(), torch.randn(1, *IMAGES)
    names = {group.name: group.slices for group in lfrns.find_units(model, images)}
    assert {group.name for group in lfrns.find_units(model.to("meta"), images)} == set(names) == {"a", "b", "c", "head"}
    model = Coordinates().eval()
    assert cut_error(model, lfrns.find_units(model, images)) < 1e-9


# --- outputs that nobody reads, and layers that only training runs


class Unread(Net):
    """Computes features that its answer does not depend on, as the pooling head of a vision tower does."""

    def __init__(self) -> None:
        super().__init__(lambda _, x: x)
        self.pool, self.project = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.b(self.a(images).relu()).relu()
        self.project(self.pool(x).relu().mean((2, 3)))
        return self.tail(x)


def test_an_output_that_nobody_reads_is_narrowed_but_its_own_units_stay():
    torch.manual_seed(0)
    model, images = Unread().eval(), torch.randn(16, *IMAGES)
    groups = lfrns.find_units(model, images)
    assert reasons(groups) == dict.fromkeys(("pool", "project"), "no output of the network in eval mode depends on it")
    b = next(group for group in groups if group.name == "b")
    assert [tap.module for tap in b.taps] == ["c"]  # nothing of it can be seen at the other
    result = lfrns.slim(model, [images], macs=0.6, fcr_steps=2, progress=False)
    assert result.model.pool.in_channels == len(result.plan.keep["b"]) < 16


class Auxiliary(Net):
    """Has a second head in training."""

    def __init__(self, forward: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__(lambda _, x: x)
        self.reduce, self.norm, self.second = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.Linear(8 * 16, 5)
        self.between, self.dropout = forward, nn.Dropout()

    def forward(self, images: Tensor) -> Any:
        x = self.b(self.a(images).relu()).relu()
        if not self.training:
            return self.tail(x)
        y = self.norm(self.reduce(F.adaptive_avg_pool2d(self.between(x), 4))).relu()
        return self.tail(x), self.second(self.dropout(y.flatten(1)))


def test_a_head_that_only_training_has_is_narrowed_with_what_it_reads():
    torch.manual_seed(0)
    model, images = Auxiliary().eval(), torch.randn(16, *IMAGES)
    groups = lfrns.find_units(model, images)
    assert reasons(groups).keys() == {"reduce", "second"}
    assert reasons(groups)["second"].startswith("it is the network's output in training")
    b = next(group for group in groups if group.name == "b")
    assert {part.tensor for part in b.slices} == {"b.weight", "b.bias", "c.weight", "reduce.weight"}
    result = lfrns.slim(model, [images], macs=0.6, fcr_steps=2, progress=False)
    main, second = result.model.train()(images)
    (main.sum() + second.sum()).backward()
    assert result.model.reduce.weight.grad.shape[1] == len(result.plan.keep["b"]) < 16
    assert all(parameter.grad is not None for parameter in result.model.parameters())


def test_macs_of_layers_that_only_training_runs_do_not_count():
    model, images = Auxiliary().eval(), torch.zeros(1, *IMAGES)
    plain = Net(lambda _, x: x).eval()
    macs = [lfrns.trace.trace_model(m, images).cost.macs({}) for m in (model, plain)]
    assert macs[0] == macs[1]


def test_a_training_branch_that_cannot_be_traced_freezes_what_it_reads_by_name():
    def by_values(x: Tensor) -> Tensor:
        return 2 * x if x.mean() > 0 else x

    torch.manual_seed(0)
    model, images = Auxiliary(by_values).eval(), torch.randn(16, *IMAGES)
    result = lfrns.slim(model, [images], macs=0.65, fcr_steps=0, progress=False)
    assert "in training mode cannot narrow" in result.report.frozen["b"]
    assert len(result.plan.keep["a"]) < 12
    result.model.train()(images)


def test_features_that_only_training_gives_keep_their_width():
    class Features(Net):
        def forward(self, images: Tensor) -> Any:
            x = self.b(self.a(images).relu()).relu()
            return (self.tail(x), x.mean((2, 3))) if self.training else self.tail(x)

    groups = lfrns.find_units(Features(lambda _, x: x).eval(), torch.zeros(1, *IMAGES))
    assert reasons(groups) == {"b": "it is the network's output in training"}


def test_a_forward_that_the_dense_model_cannot_train_either_is_not_blamed_on_the_cut():
    class Targets(Net):
        def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("targets are needed")
            return super().forward(images)

    model = Targets(lambda _, x: x).eval()
    assert not lfrns.check(model, torch.zeros(1, *IMAGES)).frozen


# --- gates and gradients


def test_a_group_that_no_gradient_reaches_has_gates_that_learn_nothing():
    torch.manual_seed(0)
    model = Net(lambda net, x: x * (net.score(net.hidden(x).relu()) > 0), hidden=a(16, 12), score=a(12, 1)).eval()
    images = torch.randn(16, *IMAGES)
    result = lfrns.slim(model, [images], macs=0.6, fcr_steps=2, progress=False)
    assert result.report.macs_fraction <= 0.6


def test_units_behind_an_auxiliary_output_alone_have_gates_that_learn_nothing():
    """The first of several outputs alike is the one that is compared; and the smallest budget named is reachable."""

    class Exits(nn.Module):
        def __init__(self):
            super().__init__()
            self.early = nn.Linear(48, 5)
            self.late = nn.Sequential(nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 5))

        def forward(self, x):
            return [self.early(x.flatten(1)), self.late(x.flatten(1))]

    torch.manual_seed(0)
    model, images = Exits().eval(), torch.randn(20, 3, 4, 4)
    with pytest.raises(ValueError, match="the smallest is macs=") as refused:
        lfrns.slim(model, [images], macs=0.1, fcr_steps=2, progress=False)
    smallest = float(re.search(r"macs=([\d.]+)\. Ask", str(refused.value))[1])
    assert 0.1 < smallest < 0.5
    result = lfrns.slim(model, [images], macs=smallest, fcr_steps=2, progress=False)
    assert len(result.plan.keep["late.0"]) == 1 and result.report.macs_fraction <= smallest


def test_a_forward_that_writes_to_what_an_activation_made_is_slimmed():
    torch.manual_seed(0)
    model, images = Net(write_rows).eval(), torch.randn(16, *IMAGES)
    with pytest.raises(RuntimeError, match="inplace"):
        model(images).sum().backward()
    result = lfrns.slim(model, [images], macs=0.6, fcr_steps=2, progress=False)
    assert len(result.plan.keep["b"]) < 16


def test_gates_are_still_there_when_the_backward_pass_runs_a_part_again():
    torch.manual_seed(0)
    images = torch.randn(16, *IMAGES)

    def contributions(way: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(1)
        model = Net(way, again=nn.Conv2d(16, 16, 3, 1, 1)).eval().requires_grad_(False)
        groups = [group for group in lfrns.find_units(model, images) if not group.frozen_reason]
        keep = {group.name: list(range(group.size // 2)) for group in groups}
        return torch.cat([*learn_contributions(model, groups, keep, [images], {}, steps=2).values()])

    plain = contributions(lambda net, x: net.again(x).relu())
    again = contributions(lambda net, x: checkpoint(lambda y: net.again(y).relu(), x, use_reentrant=False))
    torch.testing.assert_close(again, plain)
    assert bool(plain.any())


def test_a_forward_without_gradients_is_refused():
    class Frozen(Net):
        @torch.no_grad()
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)

    with pytest.raises(ValueError, match=r"slim\(Frozen\): no gradient passes through its forward .*requires_grad_"):
        lfrns.slim(Frozen(lambda _, x: x), [torch.randn(4, *IMAGES)], macs=0.6, progress=False)


# --- layouts


class Rows(nn.Module):
    """Views its last map as a row, as many first networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.c, self.head = nn.Linear(256, 24), nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.b(self.a(images).relu()).relu()
        return self.head(self.c(x.view(len(x), -1)).relu())


def test_a_map_that_is_viewed_as_a_row_is_slimmed_and_retrained_in_its_own_layout():
    torch.manual_seed(0)
    model, images = Rows().eval(), torch.randn(16, *IMAGES)
    result = lfrns.slim(model, [images], macs=0.6, fcr_steps=2, progress=False)
    loader = DataLoader(TensorDataset(images, torch.zeros(16, dtype=torch.int64)), 8)
    lfrns.retrain(result.model, loader, teacher=model, epochs=1, progress=False)
    assert not in_channels_last(result.model)
    assert not in_channels_last(model)


# --- draws


def test_the_same_draw_is_had_from_torch_numpy_and_python_and_nothing_is_used_up():
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = draw()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    with same_draw():
        first = draw()
    with same_draw():
        assert draw() == first
    with same_draw(1):
        assert draw() != first
    assert draw() == expected


def test_a_forward_that_masks_at_random_passes_the_check_and_is_slimmed():
    torch.manual_seed(0)
    model, images = Net(keep_random_positions, mix=nn.Linear(16, 16)).eval(), torch.randn(16, *IMAGES)
    report = lfrns.check(model, images)
    assert not report.frozen
    assert 0 < report.largest_error < 1e-8 or report.largest_error == 0
    assert lfrns.slim(model, [images], macs=0.6, fcr_steps=2, progress=False).report.macs_fraction <= 0.6


# --- layers, numbers and images of other kinds


class WithBias(nn.Linear):
    """A layer that answers with a tuple, as those of tensor-parallel libraries do."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(rows), self.bias


class Small(nn.Module):
    """A convolution and two linear layers on what it pools."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3, 2, 1), nn.Linear(12, 10), nn.Linear(10, 5)
        self.way = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images: Tensor) -> Tensor:
        return self.way(self, images)


def pooled(model: Small, images: Tensor) -> Tensor:
    return model.a(images).relu().mean((2, 3))


def through(cast: Callable[[Tensor], Tensor]) -> Small:
    return Small(lambda net, x: net.head(cast(net.b(cast(pooled(net, x))).relu())))


def with_constant() -> Small:
    net = Small(lambda net, x: net.head(net.b(F.conv2d(net.a(x).relu(), net.kernel.expand(net.a.out_channels, 1, 2, 2),
                                              groups=net.a.out_channels).mean((2, 3))).relu()))  # fmt: skip
    net.kernel = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]])
    return net


OTHER_KINDS = {
    "an integer parameter": lambda: Small(
        lambda net, x: net.head(net.b(pooled(net, x[:, net.order])).relu()),
        order=nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False),
    ),
    "a tuple": lambda: Small(lambda net, x: net.head(net.b(pooled(net, x))[0].relu()), b=WithBias(12, 10)),
    "float()": lambda: through(Tensor.float),
    "half()": lambda: through(lambda x: x.half().float()),
    "to(float32)": lambda: through(lambda x: x.to(torch.float32)),
    "to(device, float32)": lambda: through(lambda x: x.to(x.device, torch.float32)),
    "float32 by name": lambda: through(lambda x: x.type("torch.FloatTensor")),
    "a constant": lambda: Small(
        lambda net, x: net.head(net.b(pooled(net, x)).relu()) @ torch.eye(5, dtype=torch.float32)
    ),
    "an array": lambda: Small(
        lambda net, x: net.head(net.b(pooled(net, x)).relu()) @ torch.from_numpy(np.eye(5, dtype=np.float32))
    ),
    "a tensor that is no buffer": with_constant,
    "to(dtype=float32)": lambda: through(lambda x: x.to(dtype=torch.float32)),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_integer_parameters_tuples_and_casts_do_not_hinder_the_check_or_the_cut(kind: str):
    torch.manual_seed(0)
    model, images = OTHER_KINDS[kind]().eval(), torch.randn(16, *IMAGES)
    report = lfrns.check(model, images)
    assert {"a", "b"} <= {*report.checked} and not report.frozen and report.moved > 0.1
    assert lfrns.slim(model, [images], macs=0.7, fcr_steps=2, progress=False).report.macs_fraction <= 0.7


def test_a_forward_that_takes_images_one_by_one_is_checked_and_not_cut_wrongly():
    alone = Small(lambda net, x: net.head(torch.stack([net.b(net.a(one).relu().mean((1, 2))).relu() for one in x])))
    report = lfrns.check(alone.eval(), torch.randn(2, *IMAGES))
    assert report.largest_error < 1e-8
    assert all("self-check failed" in why for why in report.frozen.values())


def test_a_layer_that_no_row_reaches_is_no_hindrance():
    torch.manual_seed(0)
    routed = Small(lambda net, x: net.head(net.b(pooled(net, x)).relu()) + net.head(net.b(pooled(net, x)[:0])).sum(0))
    assert {*lfrns.check(routed.eval(), torch.randn(2, *IMAGES)).checked} == {"a", "b"}


def test_what_a_single_token_makes_is_seen_by_the_check():
    token = Small(
        lambda net, x: x.mean((1, 2, 3))[:, None] * net.head(net.b(net.token).relu()),
        token=nn.Parameter(torch.randn(1, 12)),
    )
    report = lfrns.check(token.eval(), torch.randn(2, *IMAGES))
    assert "b" in report.checked and report.moved > 0.01


def test_units_are_told_apart_by_two_rows():
    layer, rows = nn.Linear(4, 6).double(), torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad(), waking(layer):
        woken = layer(rows)
    assert torch.allclose(layer(rows), woken)
    assert len(woken.abs().mul(1e6).round().unique()) == woken.numel()  # of mean 0 and spread 1 all are 1
    assert (woken.amax(0) > 0).all()  # none is dead behind a ReLU


def test_a_forward_of_whole_numbers_is_watched():
    words = nn.Sequential(nn.Embedding(256, 4), nn.Flatten(), nn.Linear(4 * 3 * 4, 5))
    images = torch.randint(256, (1, 3, 2, 2))
    assert watch_forward(words, images).reads is not None


def test_a_rule_that_fails_in_any_way_freezes_what_it_was_given(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(graph, "find_rule", lambda target: fail if "relu" in str(target) else find_rule(target))
    groups = lfrns.find_units(Net(lambda _, x: x), torch.randn(1, *IMAGES))
    assert "the rule of aten.relu.default failed (AssertionError)" in reasons(groups)["a"]


# --- refusals


def of_images(forward: Callable[..., Any]) -> nn.Module:
    return type("Given", (Net,), {"forward": forward})(lambda _, x: x).eval()


def subtract(self: Net, images: Tensor) -> Tensor:
    images -= 0.5
    return Net.forward(self, images)


def write_first(self: Net, images: Tensor) -> Tensor:
    images[:, 0] = 0
    return Net.forward(self, images)


def by_mean(self: Net, images: Tensor) -> Tensor:
    return Net.forward(self, images * 2 if images.mean() > 0 else images)


REFUSALS = {
    "a second input": (
        lambda self, images, times: None,
        r"Given\.forward\(images, times\): it must run on images alone",
    ),
    "a keyword": (lambda self, images, *, size: None, r"forward\(images, size\): it must run on images alone"),
    "a dict": (lambda self, batch: Net.forward(self, batch["image"]), r"itself raises IndexError.* takes \(batch\)"),
    "other channels": (lambda self, images: Net.forward(self, images[:, :2]), r"\[1, 3, 16, 16\].*to have 3 channels"),
    "an if on values": (by_mean, r"depends on the values of a tensor.*torch\.where"),
    "images are written": (subtract, r"Given: its forward writes to the images .*x = x - mean"),
    "a part of the images is written": (write_first, r"Given: its forward writes to the images"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_forward_that_cannot_be_helped_is_refused_with_its_cause(case):
    forward, said = REFUSALS[case]
    with pytest.raises(ValueError, match=said):
        lfrns.find_units(of_images(forward), torch.zeros(1, *IMAGES))


def test_a_forward_with_defaults_runs_on_images_alone():
    model = of_images(lambda self, images, scale=2.0, mask=None, **others: Net.forward(self, scale * images))
    assert cut_error(model, lfrns.find_units(model, torch.zeros(1, *IMAGES))) < 1e-9
