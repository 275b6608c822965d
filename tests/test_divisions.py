"""A forward that divides its channels itself: the parts keep their proportion, or what is counted stays whole."""

import sys

import pytest
import random_networks
import torch
import torch.nn.functional as F
from torch import nn

import lfrns_hub as lfrns
from lfrns_hub.self_check import CheckReport

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Divided(nn.Module):
    """Two convolutions, and between them what `move` does to the map."""

    def __init__(self, move):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 24, 3, 1, 1), nn.Conv2d(24, 16, 1), nn.Linear(16, 5)
        self.move = [move]  # in a list: no module, no attribute that states a width

    def forward(self, x):
        return self.head(F.relu(self.b(self.move[0](F.relu(self.a(x))))).mean((2, 3)))


def by_share(x):
    count = x.shape[1] // 4
    return torch.cat([x[:, :count] * 2, x[:, count:]], 1)


def by_number(x):
    return torch.cat([x[:, :5] * 2, x[:, 5:]], 1)


def from_the_end(x):
    return torch.cat([x[:, :-5] * 2, x[:, -5:]], 1)


def rolled_by_half(x):
    return x.roll(x.shape[1] // 2, 1)


def rolled_by_three(x):
    return x.roll(3, 1)


def shuffled(x):
    count, width, *sides = x.shape
    return x.view(count, 4, width // 4, *sides).transpose(1, 2).reshape(count, width, *sides)


def halves_of_halves(x):
    one, two = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    half = two.shape[1] // 2
    return torch.cat([one * 2, two[:, :half] * 3, two[:, half:]], 1)


def split_by_share(x):
    first = x.shape[1] // 3
    one, two = x.split([first, x.shape[1] - first], 1)
    return torch.cat([two, one * 2], 1)


def moved_by_its_width(x):
    return x * (x.shape[1] / 24)


@pytest.mark.parametrize(
    ("move", "free", "width", "held"),
    [
        (by_share, 6, 4, 0),
        (by_number, 19, 1, 5),
        (from_the_end, 19, 1, 5),
        (rolled_by_half, 12, 2, 0),
        (rolled_by_three, 21, 1, 3),
        (shuffled, 6, 4, 0),
        (halves_of_halves, 6, 4, 0),
        (split_by_share, 8, 3, 0),
    ],
)
def test_what_may_leave_follows_how_the_forward_divides(move, free, width, held):
    model = Divided(move).eval()
    groups = {group.name: group for group in lfrns.find_units(model, IMAGES)}
    assert (groups["a"].size, groups["a"].taps[0].index.shape[1], groups["a"].frozen_reason) == (free, width, None)
    assert sum(g.size for name, g in groups.items() if name == "a#held") == held
    for seed in (0, 1):
        compare(model, macs=0.55, seed=seed)


def compare(model, macs, seed):
    analysis = lfrns.analyse(model, [IMAGES], seed=seed, progress=False)
    result = analysis.cut(macs=macs, fold=False, fcr_steps=2)
    groups = lfrns.find_units(model, IMAGES)
    with torch.no_grad():
        want = random_networks.masked_dense(model, groups, result.plan.keep)(IMAGES)
        torch.testing.assert_close(result.model(IMAGES), want, rtol=1e-4, atol=1e-5)
    assert macs - 0.2 < result.report.macs_fraction <= macs
    removed = {g.name: len(result.plan.removed(g)) for g in groups}
    predicted = analysis.trace.cost.macs(removed) / analysis.trace.cost.macs({})
    assert predicted == pytest.approx(result.report.macs_fraction, rel=1e-6)
    return result


def test_a_plan_that_is_refuted_freezes_its_group_and_the_selection_runs_again():
    """Nothing in the graph tells of a product with the width; only a proof sees it."""
    model = Divided(moved_by_its_width).eval()
    result = compare(model, macs=0.9, seed=0)
    assert "differs from masked dense" in result.report.frozen["a"]
    assert result.report.check["largest_error"] < 1e-8
    with pytest.raises(ValueError, match="is not reachable"):
        lfrns.slim(model, [IMAGES], macs=0.2, progress=False)


def test_the_plan_that_is_cut_is_proved_and_not_only_the_random_one(monkeypatch):
    """With the self-check of random plans taken away, the proof of the plan itself still holds the group whole."""
    model = Divided(moved_by_its_width).eval()
    monkeypatch.setattr(sys.modules["lfrns_hub.slim"], "self_check", lambda _, groups, *__: (groups, CheckReport()))
    result = compare(model, macs=0.9, seed=0)
    assert "differs from masked dense" in result.report.frozen["a"] and "a" not in result.plan.keep
    with pytest.raises(ValueError, match=r"is not reachable.*a stays whole: the self-check failed"):
        lfrns.slim(model, [IMAGES], macs=0.2, progress=False)
