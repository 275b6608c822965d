"""Pure maths: moments to the order in which a group's units can be merged into others, and what every merge costs.

U units of width w, D = U x w channels at a tap, O outputs of its consumer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

RIDGE = 1e-3  # of each channel's own variance: what the moments of a few thousand rows can tell apart
MIN_R2 = 0.5  # from here on a removed unit counts as redundant, below as weak


@dataclass
class TapView:
    """What one consumer sees of a group: moments [D, D] and the Gram matrix of its weights [D, D], float64."""

    second: Tensor
    gram: Tensor


@dataclass
class Merges:
    """The hierarchy of one group.

    Attributes:
        order: Units in the order in which they are merged into others; what is not named is never merged.
        cost: Cost of each merge, non-decreasing.
    """

    order: list[int]
    cost: list[float]


def weight_gram(weight: Tensor, channels: Tensor, loss_weight: Tensor) -> Tensor:
    """Give the Gram matrix of a consumer's weights over input channels, outputs weighted by their loss, [D, D].

    Args:
        weight: [O, I] or [O, I, kernel...]; the kernel's positions count as outputs.
        channels: The group's input channels, [D], int64.
        loss_weight: What a squared error at each output costs, [O].
    """
    flat = (
        weight.detach().cpu().double()[:, channels].flatten(2)
        if weight.ndim > 2
        else weight.detach().cpu().double()[:, channels]
    )
    flat = flat * loss_weight.view(-1, *[1] * (flat.ndim - 1)).sqrt()
    return torch.einsum("ocp,odp->cd", flat, flat) if flat.ndim == 3 else flat.T @ flat


def eliminate(taps: Sequence[TapView], units: int, keep_at_least: int = 1) -> Merges:
    """Merge units one after the other into all that are left, always the cheapest.

    The functional distance of a unit to the rest of its group: the error at the consumers' outputs, in units of the
    loss, when the unit is replaced by its least-squares estimate from the units that are left, whose weights already
    carry the units merged before.

    Args:
        taps: What each consumer sees of the group, channels unit after unit.
        units: U.
        keep_at_least: Units never merged.
    Returns:
        The merges; the cost is half the weighted squared error, made non-decreasing.
    Source: DESIGN.md section 5; against the pairwise distance there, the estimate uses all units that are left. The
        downdate is that of Hassibi and Stork's optimal brain surgeon (1993), applied to activations.
    """
    views = [Elimination(tap, units) for tap in taps]
    alive = torch.ones(units, dtype=torch.bool)
    order, cost, so_far = [], [], 0.0
    for _ in range(units - keep_at_least):
        costs = sum(view.unit_costs() for view in views)
        costs[~alive] = float("inf")
        unit = int(costs.argmin())
        so_far = max(so_far, 0.5 * float(costs[unit]))
        order.append(unit)
        cost.append(so_far)
        alive[unit] = False
        for view in views:
            view.remove(unit)
    return Merges(order, cost)


class Elimination:
    """One tap's precision matrix and the Gram matrix of its consumer's weights while units leave.

    A removal is a downdate of rank w: with the unit's rows R of the precision and C of the Gram matrix, its blocks
    R_u and B on the diagonals and the share S = R^T R_u^-1 that each channel takes over, the precision loses S R and
    the Gram matrix S E + (S E)^T, E = C - B S^T / 2. Diagonal blocks are brought up to date at once, all else when some
    downdates have gathered: as one product of matrices, and without the channels that have left.

    Attributes:
        precision, gram: As of the last product, of the channels that were left then, [D, D], float64.
        shares: S of the downdates since, [D, k].
        rows, moved: Their R and E, [k, D].
        precision_blocks, gram_blocks: Diagonal blocks of all units, up to date, [U, w, w].
    """

    GATHERED = 64  # channels that leave between two products

    def __init__(self, tap: TapView, units: int):
        scale = tap.second.diagonal().clamp(min=0)
        floor = float(scale.max()) * 1e-9 + 1e-30
        self.width = len(scale) // units
        self.precision = torch.linalg.inv(tap.second + torch.diag(RIDGE * scale + floor))
        self.gram = tap.gram.clone()
        self.precision_blocks, self.gram_blocks = self.diagonal(self.precision), self.diagonal(self.gram)
        self.left = torch.arange(units)  # unit at each place of the matrices
        self.place = torch.arange(units)
        self.gone = torch.zeros(units, dtype=torch.bool)
        self.forget()

    def forget(self) -> None:
        """Start to gather anew."""
        size = self.precision.shape[0]
        self.shares, self.rows, self.moved = (self.precision.new_zeros(s) for s in ((size, 0), (0, size), (0, size)))

    def diagonal(self, matrix: Tensor) -> Tensor:
        """Give the diagonal blocks, [U, w, w]."""
        blocks = matrix.view(-1, self.width, matrix.shape[1] // self.width, self.width)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()

    def unit_costs(self) -> Tensor:
        """Give the error of removing each unit, [U]: trace of its Gram block times its conditional covariance."""
        if self.width == 1:
            return self.gram_blocks.flatten().clamp(min=0) / self.precision_blocks.flatten().clamp(min=1e-300)
        live = torch.eye(self.width, dtype=self.gram.dtype) * self.gone.view(-1, 1, 1)
        return (torch.linalg.inv(self.precision_blocks + live) * self.gram_blocks.mT).sum((1, 2)).clamp(min=0)

    def remove(self, unit: int) -> None:
        """Take a unit out and give its weights to the others."""
        own = slice(int(self.place[unit]) * self.width, (int(self.place[unit]) + 1) * self.width)
        rows = self.precision[own] - self.shares[own] @ self.rows
        share = rows.T @ torch.linalg.inv(self.precision_blocks[unit])
        moved = self.gram[own] - self.shares[own] @ self.moved - self.moved[:, own].T @ self.shares.T
        moved = moved - 0.5 * self.gram_blocks[unit] @ share.T

        shares = share.view(len(self.left), self.width, self.width)
        self.precision_blocks[self.left] -= shares @ self.by_unit(rows)
        change = shares @ self.by_unit(moved)
        self.gram_blocks[self.left] -= change + change.mT
        self.gone[unit] = True
        self.precision_blocks[unit] = self.gram_blocks[unit] = 0

        self.shares = torch.cat([self.shares, share], 1)
        self.rows, self.moved = torch.cat([self.rows, rows]), torch.cat([self.moved, moved])
        if self.shares.shape[1] >= self.GATHERED:
            self.multiply()

    def by_unit(self, rows: Tensor) -> Tensor:
        """Split rows [w, D] into units, [U, w, w]."""
        return rows.view(self.width, -1, self.width).transpose(0, 1)

    def multiply(self) -> None:
        """Bring both matrices up to date and drop the channels that have left."""
        stay = ~self.gone[self.left]
        channels = stay.repeat_interleave(self.width)
        shares, rows, moved = self.shares[channels], self.rows[:, channels], self.moved[:, channels]
        self.precision = self.precision[channels][:, channels] - shares @ rows
        change = shares @ moved
        self.gram = self.gram[channels][:, channels] - change - change.T
        self.left = self.left[stay]
        self.place[self.left] = torch.arange(len(self.left))
        self.forget()


def unit_correlation(taps: Sequence[TapView], units: int) -> Tensor:
    """Give 1 - |correlation| of the units' responses, [U, U], the mean over taps; heads by their block's norm."""
    total = torch.zeros(units, units, dtype=torch.float64)
    for tap in taps:
        scale = tap.second.diagonal().clamp(min=1e-30).sqrt()
        correlation = (tap.second / torch.outer(scale, scale)).view(units, -1, units, tap.second.shape[0] // units)
        norm = correlation.square().sum((1, 3)).sqrt()
        self_norm = norm.diagonal().clamp(min=1e-30).sqrt()
        total += 1 - (norm / torch.outer(self_norm, self_norm)).clamp(max=1)
    return total / len(taps)


def agglomerate(distance_UU: Tensor, strength_U: Tensor, keep_at_least: int = 1) -> Merges:
    """Cluster units by a distance; of two clusters that merge the representative of less strength leaves.

    Args:
        distance_UU: Distances, symmetric, zero diagonal.
        strength_U: Strength of each unit, the larger represents.
        keep_at_least: Units never merged.
    Returns:
        The merges, cost being the distance at which clusters merge (average linkage).
    """
    units = len(distance_UU)
    if units == 1:
        return Merges([], [])
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
        taps: What each consumer sees of the group.
        units: U.
        distance: "functional", "correlation", or `f(taps, units)` giving distances [U, U].
        keep_at_least: Units never merged.
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
    """Name the kept units that stand in for each removed one, and how much of its response they explain.

    Args:
        second: Moments [D, D] of a group's channels, unit after unit.
        keep, leave: Unit indices.
        width: Channels a unit.
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
