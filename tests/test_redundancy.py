"""The maths of merging and folding, against slow references and by hand."""

import pytest
import torch

from lfrns_hub.method.fold import best_fold, fold_matrix, integrity, output_error, weight_products
from lfrns_hub.method.redundancy import RIDGE, TapView, agglomerate, eliminate, stand_ins, unit_correlation, weight_rows
from lfrns_hub.method.responses import Moments


def moments_of(rows: torch.Tensor, outputs: int, centred: bool = True) -> Moments:
    halves = [rows[: len(rows) * 4 // 5].double(), rows[len(rows) * 4 // 5 :].double()]
    return Moments(
        centred,
        torch.tensor([len(h) for h in halves], dtype=torch.float64),
        torch.stack([h.sum(0) for h in halves]),
        torch.stack([h.T @ h for h in halves]),
        torch.zeros(rows.shape[1], dtype=torch.float64),
        torch.ones(outputs, dtype=torch.float64),
    )


def brute_force_cost(second: torch.Tensor, weight: torch.Tensor, gone: list[int]) -> float:
    """Squared output error when `gone` is estimated by least squares from the rest."""
    keep = torch.tensor([i for i in range(len(second)) if i not in gone])
    leave = torch.tensor(gone)
    return output_error(second, weight_products(weight[:, leave]), keep, leave, fold_matrix(second, keep, leave, 0.0))


def test_elimination_takes_the_cheapest_and_its_costs_add_up_to_the_joint_error():
    torch.manual_seed(0)
    rows = torch.randn(4000, 6) @ torch.randn(6, 6)
    second = rows.double().T @ rows.double() / len(rows)
    weight = torch.randn(5, 6, dtype=torch.float64)
    merges = eliminate([TapView(second, weight)], 6)
    first = min(range(6), key=lambda u: brute_force_cost(second, weight, [u]))
    assert merges.order[0] == first
    joint = brute_force_cost(second, weight, merges.order[:2])
    assert abs(2 * sum(merges.cost[:2]) / joint - 1) < 0.02  # the ridge is 1e-3


@pytest.mark.parametrize(("units", "widths"), [(300, [1]), (140, [1, 1]), (9, [16]), (40, [1, 3, 1])])
def test_rounds_take_units_in_the_order_of_one_by_one(units, widths):
    """Against the elimination that brings both matrices up to date after every unit, for all units.

    Taps may read a unit at widths of their own, as YOLO's C2f reads the halves of a split alone and together.
    """
    torch.manual_seed(0)
    views = []
    for width in widths:
        size = units * width
        rows = (torch.randn(3 * size, size) @ (torch.randn(size, size) * torch.logspace(0, -2, size))).relu().double()
        weight = torch.randn(size // 2, size, dtype=torch.float64)
        views.append(TapView(rows.T @ rows / len(rows), weight))
    order, cost = one_by_one(views, units)
    merges = eliminate(views, units)
    assert merges.order == order
    assert merges.cost == pytest.approx(cost, rel=1e-6)


def one_by_one(views: list[TapView], units: int) -> tuple[list[int], list[float]]:
    """The units in order and half of what each costs, by Hassibi and Stork's downdate of whole matrices."""
    widths = [len(view.gram) // units for view in views]
    own = [[slice(u * width, (u + 1) * width) for u in range(units)] for width in widths]
    precisions = [torch.linalg.inv(v.second + RIDGE * torch.diag(v.second.diagonal())) for v in views]
    grams = [v.gram.clone() for v in views]
    left, order, cost = list(range(units)), [], []
    while len(left) > 1:
        errors = {
            u: sum(
                float((torch.linalg.inv(p[at[u], at[u]]) * g[at[u], at[u]].T).sum())
                for p, g, at in zip(precisions, grams, own, strict=True)
            )
            for u in left
        }
        unit = min(errors, key=errors.get)
        for p, g, at in zip(precisions, grams, own, strict=True):
            out = at[unit]
            share = p[:, out] @ torch.linalg.inv(p[out, out])
            p -= share @ p[out]
            moved = share @ g[out]
            g += share @ g[out, out] @ share.T - moved - moved.T
        left.remove(unit)
        order.append(unit)
        cost.append(max([0.5 * errors[unit], *cost[-1:]]))
    return order, cost


@pytest.mark.parametrize("shape", [(3, 8), (20, 8), (5, 8, 3, 3)])
def test_weight_rows_are_at_most_as_many_as_channels_and_have_the_gram_matrix_of_all(shape):
    """Outputs count by what they cost; the kernel's positions count as outputs."""
    torch.manual_seed(0)
    weight, loss_weight = torch.randn(shape), torch.rand(shape[0])
    channels = torch.tensor([6, 1, 4])
    rows = weight_rows(weight, channels, loss_weight, torch.float64)
    flat = weight[:, channels].flatten(2) if len(shape) > 2 else weight[:, channels, None]
    gram = torch.einsum("ock,odk,o->cd", *(2 * [flat.double()]), loss_weight.double())
    assert len(rows) <= 3
    torch.testing.assert_close(TapView(gram, rows).gram, gram)


def test_wide_taps_are_eliminated_in_float32_to_the_same_cost():
    """Against float64: other orders among near equals, the same error in all."""
    torch.manual_seed(0)
    rows = (torch.randn(2400, 200) @ torch.randn(200, 600) + torch.randn(2400, 600)).relu().double()
    rows -= rows.mean(0)
    second, weight = rows.T @ rows / len(rows), torch.randn(100, 600, dtype=torch.float64)
    exact = eliminate([TapView(second, weight)], 600)
    wide = eliminate([TapView(second.float(), weight.float())], 600)
    assert sum(wide.cost[:300]) == pytest.approx(sum(exact.cost[:300]), rel=1e-3)
    assert len(set(wide.order[:300]) & set(exact.order[:300])) > 290


def test_moments_that_are_not_finite_are_one_error():
    """And no loop without an end."""
    second = torch.full((5, 5), float("nan"), dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="5 channels have no inverse"):
        eliminate([TapView(second, torch.eye(5, dtype=torch.float64))], 5)


def test_heads_are_eliminated_as_blocks():
    torch.manual_seed(0)
    rows = torch.randn(4000, 8)
    rows[:, 4:6] = rows[:, 0:2] @ torch.randn(2, 2)  # the third head repeats the first
    second = rows.double().T @ rows.double() / len(rows)
    gram = torch.eye(8, dtype=torch.float64)
    merges = eliminate([TapView(second, gram)], 4)
    assert merges.order[0] in (0, 2)
    assert merges.cost[0] < 0.01 < merges.cost[1]


def test_correlation_clusters_put_equal_units_together():
    torch.manual_seed(0)
    rows = torch.randn(2000, 4)
    rows[:, 3] = -2 * rows[:, 1]
    second = rows.double().T @ rows.double() / len(rows)
    view = TapView(second, torch.eye(4, dtype=torch.float64))
    distance = unit_correlation([view], 4)
    assert distance[1, 3] < 1e-6 < 0.5 < distance[0, 1]
    merges = agglomerate(distance, second.diagonal())
    assert merges.order[0] == 1, "the weaker of the pair leaves"


def test_fold_of_a_repeated_channel_is_exact_and_of_one_that_does_not_hold_out_is_refused():
    torch.manual_seed(0)
    rows = torch.randn(1000, 3) + 1
    rows[:, 2] = 3 * rows[:, 0]
    weight = torch.randn(4, 3)
    keep, leave = torch.tensor([0, 1]), torch.tensor([2])
    fold = best_fold(moments_of(rows, 4), weight, keep, leave)
    assert torch.allclose(fold, torch.tensor([[3.0, 0.0]], dtype=torch.float64), atol=1e-3)
    assert integrity(moments_of(rows, 4), weight, keep, leave) > 0.999
    fickle = rows.clone()
    fickle[800:, 2] *= -1  # on the held-out fifth the relation is reversed
    assert best_fold(moments_of(fickle, 4, centred=False), weight, keep, leave) is None
    names, r2 = stand_ins(moments_of(rows, 4).matrix(), keep, leave, 1)
    assert names[0][0] == 0 and r2[0] > 0.99


def test_a_channel_that_is_constant_up_to_rounding_counts_as_constant():
    """Its variance is a difference of large numbers, which float32 sums leave at anything, below zero too."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    about = torch.zeros(6, dtype=torch.float64)
    moments = Moments.empty(layer, about)
    rows = torch.randn(50, 6, dtype=torch.float64)
    rows[:, 2] = 1000.0
    moments.count += 50
    moments.total += rows.sum(0)
    moments.square += rows.T @ rows
    moments.square[:, 2, 2] -= 1e-2  # 1e-10 of it
    second = moments.matrix()
    assert second[2].abs().max() == second[:, 2].abs().max() == 0
    assert second[0, 0] == pytest.approx(float(rows[:, 0].var(correction=0)), rel=1e-6)
    merges = eliminate([TapView(second, layer.weight.double().detach())], 6)
    assert merges.order[0] == 2 and merges.cost[0] < 1e-9
