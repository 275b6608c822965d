"""Pairs of a removed unit and the kept one most like it, and the removed one's estimate from all kept ones.

U units of a group, w channels of each, D channels that the group's first consumer reads, K of them kept, R removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from lfrns_hub.method.fold import Blocks, best_fold, fold_offset
from lfrns_hub.method.responses import Moments
from lfrns_hub.method.taps import kept_channels
from lfrns_hub.units import SlimPlan, UnitGroup


@dataclass(frozen=True)
class Pair:
    """A removed unit, and the kept one most like it.

    Attributes:
        removed, kept: The units.
        r: Correlation of the two on held-out images.
        r2: 1 - squared error / squared values of the removed unit's estimate from all kept ones, on the same images;
            about the mean where the consumer has no padding, as in the fold.
    """

    removed: int
    kept: int
    r: float
    r2: float


@dataclass(frozen=True)
class Estimate:
    """The fold of a consumer's removed channels, and how its units are read from channels.

    Attributes:
        index: Channels of each unit, [U, w].
        directions: Weights of a unit's channels, [U, w], of length 1: its first principal component on held-out images,
            1 for a unit of one channel.
        keep, leave: Channels kept [K] and removed [R], of all groups that the consumer reads.
        fold, offset: Estimate of the removed channels from the kept ones, [R, K] and [R].
    """

    index: Tensor
    directions: Tensor
    keep: Tensor
    leave: Tensor
    fold: Tensor
    offset: Tensor

    @classmethod
    def of(cls, dense: nn.Module, group: UnitGroup, gone: Sequence[Tensor], moments: Moments) -> Self:
        """Fit the fold as `lfrns_hub.method.fold` does.

        Args:
            dense: The dense model.
            group: A group that loses units.
            gone: Channels that the group's first consumer loses, by group.
            moments: Moments of the consumer's input.
        """
        tap = group.taps[0]
        keep, leave = kept_channels(dense, tap.module, list(gone)), torch.cat([one.flatten() for one in gone]).unique()
        fold = best_fold(moments, dense.get_submodule(tap.module).weight.detach(), keep, leave)
        if fold is None:  # zero is the best estimate
            fold = torch.zeros(len(leave), len(keep), dtype=torch.float64)
        offset = fold_offset(moments, keep, leave, fold) if moments.centred else torch.zeros(len(leave))
        directions = main_directions(covariance(moments), tap.index)
        return cls(tap.index, directions, keep, leave, fold.float(), offset.float())

    def unit(self, value: Tensor, unit: int) -> Tensor:
        """Return a unit's values from its consumer's input [..., D]."""
        return value[..., self.index[unit]] @ self.directions[unit]

    def estimated(self, value: Tensor, unit: int) -> Tensor:
        """Return a removed unit's values as estimated from the kept channels of its consumer's input [..., D]."""
        rows = torch.searchsorted(self.leave, self.index[unit])
        return (value[..., self.keep] @ self.fold[rows].T + self.offset[rows]) @ self.directions[unit]

    def find_pairs(self, group: UnitGroup, plan: SlimPlan, moments: Moments) -> list[Pair]:
        """Return a pair for each removed unit that varies, those of the largest correlation first."""
        kept, removed = torch.tensor(plan.kept(group)), torch.tensor(plan.removed(group))
        between = self.by_unit(covariance(moments), torch.arange(len(self.index)))
        spread = between.diagonal().clamp(min=0).sqrt()
        r = between[removed][:, kept] / (spread[removed, None] * spread[kept]).clamp(min=1e-30)
        second = moments.matrix(1)
        blocks = Blocks.of(second, self.keep, self.leave)
        cross = self.fold.to(second.dtype) @ blocks.cross
        error = (
            blocks.removed - cross - cross.T + self.fold.to(second.dtype) @ blocks.kept @ self.fold.to(second.dtype).T
        )
        whole = second.new_zeros(second.shape)
        whole[self.leave[:, None], self.leave] = error
        lost, power = (self.by_unit(m, removed).diagonal() for m in (whole, second))
        r2 = 1 - lost / power.clamp(min=1e-30)
        best = r.abs().argmax(1)
        pairs = [
            Pair(int(unit), int(kept[near]), float(r[row, near]), float(r2[row]))
            for row, (unit, near) in enumerate(zip(removed, best, strict=True))
            if spread[unit] > 0
        ]
        return sorted(pairs, key=lambda pair: (-abs(pair.r), pair.removed))

    def by_unit(self, matrix: Tensor, units: Tensor) -> Tensor:
        """Return a matrix over channels [D, D] as one over units [U, U]."""
        channels, width = self.index[units].flatten(), self.index.shape[1]
        own, directions = matrix[channels][:, channels], self.directions[units].to(matrix)
        return torch.einsum("uavb,ua,vb->uv", own.view(len(units), width, len(units), width), directions, directions)


def covariance(moments: Moments) -> Tensor:
    """Return the covariance of a consumer's input channels on held-out images, [D, D], padded or not."""
    return replace(moments, centred=True).matrix(1)


def main_directions(covariance_DD: Tensor, index: Tensor) -> Tensor:
    """Return the first principal component of each unit's channels, [U, w]; its largest entry is positive.

    Example:
        >>> main_directions(torch.diag(torch.tensor([1.0, 4.0, 9.0])), torch.tensor([[0, 1], [1, 2]])).tolist()
        [[0.0, 1.0], [0.0, 1.0]]
    """
    own = covariance_DD[index[:, :, None], index[:, None, :]]
    first = torch.linalg.eigh(own.double()).eigenvectors[..., -1]
    largest = first.gather(1, first.abs().argmax(1, keepdim=True))
    return (first * largest.sign()).float()
