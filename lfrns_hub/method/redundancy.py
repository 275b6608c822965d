"""Pure maths: from moments to the order in which a group's units can be merged into others, and each merge's cost.

U units, at each tap of a width w of its own, D = U x w channels there, O outputs of its consumer.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lfrns_hub.method.responses import Moments
from lfrns_hub.units import UnitGroup

RIDGE = 1e-3  # of each channel's own variance: the resolution of the moments of a few thousand rows
MIN_R2 = 0.5  # from here on a removed unit is reported as redundant, below as weak
CANDIDATES = 64  # candidate channels of a round
MIN_ROUND = 8  # fewest channels removed in a round


@dataclass
class TapView:
    """One consumer's view of a group, channels unit after unit.

    Attributes:
        second: Moments [D, D]; float64, for wide taps float32 (`Moments.matrix`).
        weight: Its weights, [r, D] in the same dtype: one row per output and kernel position, scaled by the root of the
            loss per squared error there, or fewer rows with the same Gram matrix.
    """

    second: Tensor
    weight: Tensor

    @property
    def gram(self) -> Tensor:
        """The Gram matrix of the weights, [D, D]."""
        return self.weight.T @ self.weight


@dataclass
class Merges:
    """The hierarchy of one group.

    Attributes:
        order: Units in the order in which they are merged into others; a unit not listed is never merged.
        cost: Cost of each merge, non-decreasing.
    """

    order: list[int]
    cost: list[float]


def weight_rows(weight: Tensor, channels: Tensor, loss_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a consumer's weights over a group's input channels, scaled by loss weight, [r, D], r at most D.

    Args:
        weight: [O, I] or [O, I, kernel...]; the kernel's positions count as outputs.
        channels: The group's input channels, [D], int64.
        loss_weight: Loss per squared error at each output, [O].
        dtype: Dtype of the result.
    """
    chosen = weight.detach().cpu()[:, channels].to(dtype)
    scaled = chosen * loss_weight.to(dtype).view(-1, *[1] * (chosen.ndim - 1)).sqrt()
    rows = scaled.movedim(1, -1).reshape(-1, len(channels))
    return torch.linalg.qr(rows, mode="r").R if len(rows) > len(channels) else rows


def eliminate(taps: Sequence[TapView], units: int, keep_at_least: int = 1) -> Merges:
    """Merge units one after the other into all remaining ones, always the cheapest.

    The functional distance of a unit to the rest of its group: the error at the consumers' outputs, in units of the
    loss, when the unit is replaced by its least-squares estimate from the remaining units, whose weights already
    include the units merged before.

    Units are removed in rounds: the cheapest of a round are its candidates, and every removal among them counts at
    once. Its effect on the other units is applied after the round, as matrix products: a downdate of the precision, a
    fold of the weights.

    Args:
        taps: Each consumer's view of the group, channels unit after unit.
        units: U.
        keep_at_least: Number of units never merged.
    Returns:
        The merges; the cost is half the weighted squared error, made non-decreasing.
    Source: DESIGN.md section 5; unlike the pairwise distance there, the estimate uses all remaining units. The
        downdate is that of Hassibi and Stork's optimal brain surgeon (1993), applied to activations.
    """
    views = [Elimination(tap, units) for tap in taps]
    widest, places = max(view.width for view in views), torch.arange(units)  # the unit at each place of the matrices
    alive = torch.ones(units, dtype=torch.bool)
    order: list[int] = []
    cost: list[float] = []
    while len(order) < units - keep_at_least:
        costs = torch.stack([view.unit_costs() for view in views]).sum(0).masked_fill(~alive, float("inf"))
        left = units - len(order)
        least = max(MIN_ROUND // widest, left // 32, 1)
        near = costs.argsort(stable=True)[: min(left, max(CANDIDATES // widest, 3 * least // 2))]
        others = float(costs.index_fill(0, near, float("inf")).min())
        most = min(left - keep_at_least, len(near))
        gone, paid = remove_candidates([v.block(near) for v in views], len(near), others, min(least, most), most)
        gone = near[gone]
        order += places[gone].tolist()
        cost += paid
        for view in views:
            view.remove(gone)
        alive[gone] = False
        if alive.sum() < 0.75 * len(alive):
            places = places[alive]
            for view in views:
                view.compact(alive)
            alive = torch.ones(len(places), dtype=torch.bool)
    return Merges(order, (0.5 * torch.tensor(cost, dtype=torch.float64)).cummax(0).values.tolist() if cost else [])


def remove_candidates(
    blocks: Sequence[tuple[Tensor, Tensor]], count: int, others: float, least: int, most: int
) -> tuple[list[int], list[float]]:
    """Remove units among a few candidates one after the other, until a unit outside them is cheaper.

    A removal is a downdate: with the unit's rows R of the precision, its block R_u and the share S = R^T R_u^-1 that
    each channel takes over, the precision loses S R and the Gram matrix S E + (S E)^T, E = C - B S^T / 2, C being the
    unit's rows of the Gram matrix and B its block.

    Args:
        blocks: For each tap, precision and Gram matrix of the candidates, [c w, c w].
        count: Number of candidates, c.
        others: Cost of the cheapest unit that is not a candidate.
        least, most: Bounds on the number of removed units.
    Returns:
        Places of the removed units, in order, and the cost of each: twice the error.
    """
    by_width: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for block in blocks:
        by_width.setdefault(len(block[0]) // count, []).append(block)
    stacks = [Downdates(alike, count, most) for alike in by_width.values()]
    alive = np.ones(count, dtype=bool)
    gone: list[int] = []
    paid: list[float] = []
    while len(gone) < most:
        costs = sum(removal_costs(*stack.own) for stack in stacks)
        costs[~alive] = np.inf
        unit = int(costs.argmin())
        if len(gone) >= least and costs[unit] > others:
            break
        for stack in stacks:
            stack.remove(unit)
        gone.append(unit)
        paid.append(float(costs[unit]))
        alive[unit] = False
    return gone, paid


# Not by BLAS, whose threads take longer to synchronise than such small products take.
_product = functools.partial(np.einsum, "tkw,tkc->twc")


class Downdates:
    """Precision and Gram matrices of one round's candidates, at the T taps that read a unit at the same width w.

    Only the units' own blocks of the matrices are kept up to date; rows are computed when they are needed.

    Attributes:
        own: Each unit's own blocks of precision and Gram matrix, [c, T, w, w].
    """

    def __init__(self, blocks: Sequence[tuple[Tensor, Tensor]], count: int, most: int):
        self._count, self._width, self._gone = count, len(blocks[0][0]) // count, 0
        self._precision, self._gram = (np.stack([b[i].double().numpy() for b in blocks]) for i in (0, 1))
        shape = (len(blocks), count, self._width, count, self._width)
        diagonal = np.arange(count)
        self.own = [m.reshape(shape)[:, diagonal, :, diagonal] for m in (self._precision, self._gram)]
        self._shares, self._rows, self._moved = np.empty((3, len(blocks), most * self._width, count * self._width))

    def remove(self, unit: int) -> None:
        """Remove one candidate."""
        width, taps = self._width, len(self._gram)
        done, out = slice(self._gone * width), slice(unit * width, (unit + 1) * width)
        taken, given = self._shares[:, done, out], self._moved[:, done, out]
        rows = self._precision[:, out] - _product(taken, self._rows[:, done])
        moved = self._gram[:, out] - _product(taken, self._moved[:, done]) - _product(given, self._shares[:, done])
        share = (1 / rows[..., out] if width == 1 else np.linalg.inv(rows[..., out])) @ rows  # [T, w, c w]
        moved -= 0.5 * moved[..., out] @ share
        here = slice(done.stop, done.stop + width)
        self._shares[:, here], self._rows[:, here], self._moved[:, here] = share, rows, moved
        share, rows, moved = (m.reshape(taps, width, self._count, width) for m in (share, rows, moved))
        self.own[0] -= np.einsum("tacx,tacy->ctxy", share, rows)
        change = np.einsum("tacx,tacy->ctxy", share, moved)
        self.own[1] -= change + change.swapaxes(2, 3)
        self.own[0][unit] = np.eye(width)  # removed: nothing invertible is left of it
        self._gone += 1


def removal_costs(precision: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Return the error of removing each unit, [c], from its own blocks, [c, T, w, w]."""
    if precision.shape[-1] == 1:
        return (gram.clip(min=0) / precision.clip(min=1e-300)).sum((1, 2, 3))
    return (np.linalg.inv(precision) * gram.swapaxes(2, 3)).sum((2, 3)).clip(min=0).sum(1)


class Elimination:
    """One tap's precision matrix and its consumer's weights while units are removed.

    Both are for channels of unit variance. Entries of removed channels are zero until they are dropped.

    Attributes:
        width: Channels per unit, w.
        precision, weight: [D, D] and [r, D], in the dtype of the tap's moments.
    """

    def __init__(self, tap: TapView, units: int):
        variance = tap.second.diagonal().clamp(min=0)
        scale = (variance + float(variance.max()) * 1e-9 + 1e-30).sqrt()
        self.width = len(scale) // units
        correlation = tap.second / scale
        correlation /= scale[:, None]
        ridge, failed = RIDGE, True
        while failed:  # moments of fewer rows than channels may be off by more than the ridge
            correlation.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(correlation)
            ridge *= 10
            if failed and ridge > 10 * len(scale):  # correlations are at most 1 each, so a ridge of D always works
                raise FloatingPointError(
                    f"the moments of {len(scale)} channels have no inverse: they are not finite, or of no network's "
                    "answers. Check the images' scale and the weights."
                )
        self.precision = torch.cholesky_inverse(factor)
        self.weight = tap.weight * scale

    def blocks(self, matrix: Tensor) -> Tensor:
        """View a matrix's columns unit by unit, [..., U, w]."""
        return matrix.unflatten(-1, (-1, self.width))

    def unit_costs(self) -> Tensor:
        """Return the error of removing each unit, [U]: its conditional covariance, weighted by its weights."""
        if self.width == 1:
            return (self.weight.square().sum(0) / self.precision.diagonal()).double()
        own = self.blocks(self.precision).unflatten(0, (-1, self.width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        weights = self.blocks(self.weight).movedim(1, 0)  # [U, r, w]
        return (torch.linalg.inv(own) * (weights.mT @ weights)).sum((1, 2)).clamp(min=0).double()

    def block(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return precision and Gram matrix of the weights of some units, [c w, c w]."""
        channels = self.channels(chosen)
        weights = self.weight[:, channels]
        return self.precision[channels][:, channels], weights.T @ weights

    def channels(self, chosen: Tensor) -> Tensor:
        """Return the channels of some units."""
        return (chosen[:, None] * self.width + torch.arange(self.width)).flatten()

    def remove(self, gone: Tensor) -> None:
        """Remove units, [b], and fold their weights into the others."""
        out = self.channels(gone)
        rows = self.precision[out]
        share = torch.linalg.inv(rows[:, out]) @ rows  # share of each channel in the estimate, [b, D]
        self.weight.addmm_(self.weight[:, out], share, alpha=-1)
        self.precision.addmm_(share.T, rows, alpha=-1)
        self.precision[out, out] = 1.0  # their other entries are zero now, up to rounding
        self.weight[:, out] = 0.0

    def compact(self, stay: Tensor) -> None:
        """Drop the removed units; `stay` is [U], bool."""
        kept = self.channels(stay.nonzero().flatten())
        self.precision = self.precision.index_select(0, kept).index_select(1, kept)
        self.weight = self.weight.index_select(1, kept)


def unit_correlation(taps: Sequence[TapView], units: int) -> Tensor:
    """Return 1 - |correlation| of responses, [U, U], mean over taps; for heads, by the norm of their block."""
    total = torch.zeros(units, units, dtype=torch.float64)
    for tap in taps:
        scale = tap.second.diagonal().clamp(min=1e-30).sqrt()
        correlation = (tap.second / torch.outer(scale, scale)).view(units, -1, units, tap.second.shape[0] // units)
        norm = correlation.square().sum((1, 3)).sqrt()
        self_norm = norm.diagonal().clamp(min=1e-30).sqrt()
        total += 1 - (norm / torch.outer(self_norm, self_norm)).clamp(max=1)
    return total / len(taps)


def agglomerate(distance_UU: Tensor, strength_U: Tensor, keep_at_least: int = 1) -> Merges:
    """Cluster units by a distance; of two merged clusters the weaker representative is removed.

    Args:
        distance_UU: Distances, symmetric, zero diagonal.
        strength_U: Strength of each unit; the stronger unit represents.
        keep_at_least: Number of units never merged.
    Returns:
        The merges, cost being the distance at which clusters merge (average linkage).
    """
    units = len(distance_UU)
    if units == 1:
        return Merges([], [])
    from sklearn.cluster import AgglomerativeClustering  # imported here: it takes as long to import as timm

    model = AgglomerativeClustering(
        n_clusters=None, distance_threshold=0, metric="precomputed", linkage="average", compute_distances=True
    )
    symmetric = (distance_UU + distance_UU.T) / 2
    model.fit(symmetric.fill_diagonal_(0).numpy())
    representative = dict(enumerate(range(units)))
    order, cost = [], []
    for step, ((one, other), distance) in enumerate(
        zip(model.children_.tolist(), model.distances_.tolist(), strict=True)
    ):
        first, second = representative[one], representative[other]
        stays, leaves = (first, second) if strength_U[first] >= strength_U[second] else (second, first)
        representative[units + step] = stays
        order.append(leaves)
        cost.append(float(distance))
    most = units - keep_at_least
    return Merges(order[:most], cost[:most])


def find_merges(
    taps: Sequence[TapView],
    units: int,
    distance: str | Callable[[Sequence[TapView], int], Tensor],
    keep_at_least: int = 1,
) -> Merges:
    """Find the merges of one group.

    Args:
        taps: Each consumer's view of the group.
        units: U.
        distance: "functional", "correlation", or `f(taps, units)` giving distances [U, U].
        keep_at_least: Number of units never merged.
    Raises:
        ValueError: The distance is none of these.
    """
    if distance == "functional":
        return eliminate(taps, units, keep_at_least)
    if distance == "correlation":
        distance = unit_correlation
    if not callable(distance):
        raise ValueError(f"distance={distance!r}: pass 'functional', 'correlation' or a function of (taps, units).")
    strength = sum(tap.second.diagonal().view(units, -1).sum(1) for tap in taps)
    return agglomerate(torch.as_tensor(distance(taps, units)).double(), strength, keep_at_least)


def stand_ins(second: Tensor, keep: Tensor, leave: Tensor, width: int) -> tuple[list[list[int]], list[float]]:
    """Return the kept units that stand in for each removed one, and the share of its response that they explain.

    Args:
        second: Moments [D, D] of a group's channels, unit after unit.
        keep, leave: Unit indices.
        width: Channels per unit.
    Returns:
        Up to three stand-ins for each removed unit, the strongest first, and its R^2 in [0, 1].
    """
    offsets = torch.arange(width)
    kept = (keep[:, None] * width + offsets).flatten()
    gone = (leave[:, None] * width + offsets).flatten()
    scale = second.diagonal().clamp(min=0)
    system = second[kept][:, kept] + torch.diag(RIDGE * scale[kept] + float(scale.max()) * 1e-9 + 1e-30)
    cross = second[kept][:, gone]
    fold = torch.linalg.solve(system, cross)  # [kept channels, gone channels]
    explained = (fold * cross).sum(0).view(-1, width).sum(1)
    r2 = (explained / scale[gone].view(-1, width).sum(1).clamp(min=1e-30)).clamp(0, 1)
    strength = (fold.square() * scale[kept][:, None]).view(len(keep), width, len(leave), width).sum((1, 3))  # [K, cut]
    names = [keep[strength[:, i].topk(min(3, len(keep))).indices].tolist() for i in range(len(leave))]
    return names, r2.tolist()


def views(model: nn.Module, group: UnitGroup, moments: dict[str, Moments]) -> list[TapView]:
    """Return each consumer's view of a group."""
    seen = []
    for tap in group.taps:
        weight, of_tap, channels = model.get_submodule(tap.module).weight, moments[tap.module], tap.index.flatten()
        second = of_tap.matrix(channels=channels)
        seen.append(TapView(second, weight_rows(weight, channels, of_tap.loss_weight, second.dtype)))
    return seen
