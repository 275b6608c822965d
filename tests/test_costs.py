"""What merges cost in loss: the estimate against the divergence itself, and against a slow reference."""

import pytest
import timm
import torch
from torch import nn

import lfrns_hub as lfrns
from lfrns_hub.method import responses
from lfrns_hub.method.costs import estimated, first_images, measure_costs, measured, spread
from lfrns_hub.method.fold import fold_matrix, fold_offset
from lfrns_hub.method.redundancy import RIDGE, Merges, eliminate, views
from lfrns_hub.method.responses import collect
from lfrns_hub.model_io.answers import read_answer
from lfrns_hub.model_io.model import analysis_copy
from lfrns_hub.trace import trace_model


class Net(nn.Module):
    """Two blocks that share a residual width, one of them padded, and a classifier behind a pool."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 12, 1)
        self.down = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.num_classes = 5

    def forward(self, images):
        x = self.stem(images).relu()
        x = x + self.down(self.up(x).relu())
        return self.head(x.relu().mean((2, 3)))


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    dense = analysis_copy(Net(), "cpu")
    batches = [(torch.randn(16, 3, 8, 8), None) for _ in range(6)]
    trace = trace_model(dense, batches[0][0][:1])
    groups = [group for group in trace.groups if group.frozen_reason is None]
    taps = list(dict.fromkeys(tap.module for group in groups for tap in group.taps))
    moments = collect(dense, taps, batches, macs=trace.cost.macs({}), seed=0)
    merges = {group.name: eliminate(views(dense, group, moments), group.size) for group in groups}
    gone = [[one.order[:1], one.order[: len(one.order) // 2]] for one in merges.values()]
    return dense, groups, merges, gone, [images for images, _ in batches], moments


def test_the_estimate_is_half_the_mean_square_of_gradients_times_changes(case):
    """Against a loop over single images; a residual group is read by several consumers, whose parts add up."""
    dense, groups, _, gone, images, moments = case
    assert any(len(group.taps) > 1 for group in groups)
    found = estimated(dense, groups, gone, images[0].split(2), moments, seed=3)
    expected = torch.zeros(len(groups), 3, dtype=torch.float64)
    for number, piece in enumerate(images[0].split(2)):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + number)
        drawn = torch.multinomial(dense(piece).softmax(-1), 1, generator=generator).flatten()
        for image, label in zip(piece, drawn, strict=True):
            for row, group in enumerate(groups):
                for place, units in enumerate(gone[row]):
                    slope = sum(slope_of(dense, tap, units, moments, image, label) for tap in group.taps)
                    expected[row, place] += 0.5 * slope**2 / len(images[0])
    torch.testing.assert_close(found[:, :2], expected.cummax(1).values[:, :2], rtol=1e-3, atol=1e-9)


def slope_of(dense, tap, gone, moments, image, label):
    """Change of one image's loss, to first order, when one consumer reads stand-ins in place of units."""
    removed = tap.index[gone].flatten().sort().values
    kept = torch.tensor([c for c in range(moments[tap.module].width) if c not in removed.tolist()])
    fold = fold_matrix(moments[tap.module].matrix(), kept, removed, RIDGE).float()
    read = []
    module = dense.get_submodule(tap.module)
    handle = module.register_forward_pre_hook(lambda _, args: (read.append(args[0] + 0) or read[-1],))
    with torch.enable_grad():
        logits = dense(image[None].clone().requires_grad_())
        loss = nn.functional.cross_entropy(logits, label[None])
        gradient = torch.autograd.grad(loss, read[0])[0]
    handle.remove()
    value, gradient = (t if isinstance(module, nn.Linear) else t.movedim(1, -1) for t in (read[0].detach(), gradient))
    stands = value[..., kept] @ fold.T
    if moments[tap.module].centred:
        stands = stands + fold_offset(moments[tap.module], kept, removed, fold.double()).float()
    return float((gradient[..., removed] * (stands - value[..., removed])).sum())


def test_the_estimate_is_the_divergence_where_little_is_cut(case):
    """Over many draws of labels it comes near what a forward pass of the cut network measures."""
    dense, groups, merges, _, images, moments = case
    few = [[one.order[: len(one.order) // 3]] for one in merges.values()]
    truth = measured(dense, groups, few, images, moments)[:, 0]
    draws = [estimated(dense, groups, few, images, moments, seed)[:, 0] for seed in range(30)]
    # A hundredth of the largest is what float32 rounds and the two choices of the ridge differ by, on some processors.
    assert torch.stack(draws).mean(0) == pytest.approx(truth, rel=0.35, abs=0.01 * float(truth.max()))
    assert float(truth.max()) > 1e-6


def test_costs_add_up_to_what_was_found_and_keep_the_order(case):
    dense, groups, merges, _, images, moments = case
    found = measure_costs(dense, groups, merges, images, 96, moments, seed=0)
    for name, one in found.items():
        assert one.order == merges[name].order
        assert one.cost == sorted(one.cost) and len(one.cost) == len(one.order)
    line = spread(Merges([4, 2, 1, 0], [1.0, 1.0, 2.0, 2.0]), [2], [0.5])
    assert line.cost == pytest.approx([0.25, 0.25, 0.5, 0.5])


def test_moments_too_large_for_memory_lie_in_files_and_are_the_same(case, tmp_path, monkeypatch):
    """The files have no name any more once the moments are there."""
    dense, _, _, _, images, moments = case
    monkeypatch.setattr(responses, "MAX_MOMENT_BYTES", 0)
    monkeypatch.setattr(responses.tempfile, "tempdir", str(tmp_path))
    mapped = []
    monkeypatch.setattr(
        responses.torch, "from_file", lambda *a, _from=torch.from_file, **k: mapped.append(a) or _from(*a, **k)
    )
    macs = trace_model(dense, images[0][:1]).cost.macs({})
    again = collect(dense, list(moments), images, macs=macs, seed=0)
    assert len(mapped) == len(moments)
    assert not list(tmp_path.iterdir())
    for name, one in moments.items():
        assert torch.equal(one.square, again[name].square), name
        assert torch.equal(one.total, again[name].total), name


def test_first_images_are_no_more_than_asked_for():
    batches = [torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)]
    assert [len(batch) for batch in first_images(batches, 6)] == [4, 2]
    assert [len(batch) for batch in first_images(batches, 99)] == [4, 4]


def test_features_have_an_estimate_too():
    torch.manual_seed(0)
    net = Net()
    net.head, net.num_classes = nn.Identity(), 0
    dense = analysis_copy(net, "cpu")
    images = torch.randn(8, 3, 8, 8)
    trace = trace_model(dense, images[:1])
    groups = [group for group in trace.groups if group.frozen_reason is None]
    assert read_answer(dense, dense(images)).outputs.word == "features"
    taps = list(dict.fromkeys(tap.module for group in groups for tap in group.taps))
    moments = collect(dense, taps, [images], macs=trace.cost.macs({}), seed=0)
    merges = {group.name: eliminate(views(dense, group, moments), group.size) for group in groups}
    gone = [[one.order[: len(one.order) // 2]] for one in merges.values()]
    found = estimated(dense, groups, gone, [images], moments, 0)
    assert (found[:, 0] > 0).all()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_model_comes_back_in_the_layout_in_which_it_came(layout, tmp_path):
    """Whatever the analysis runs in; and it is saved and loaded as any other."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20").eval().to(memory_format=layout)
    images = [torch.randn(4, 3, 32, 32) for _ in range(5)]
    result = lfrns.slim(model, images, macs=0.5, fcr_steps=1, progress=False)
    kernels = [p for p in result.model.parameters() if p.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)
    lfrns.save(result.model, tmp_path / "slim")
    again = lfrns.load(tmp_path / "slim").eval()
    torch.testing.assert_close(again(images[0]), result.model(images[0]), atol=1e-5, rtol=1e-5)
