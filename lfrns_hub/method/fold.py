"""Fold: least-squares estimates of cut channels from kept ones, and the share of a layer's output they explain.

D input channels of a consumer, K kept and R cut of them; O its outputs.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from lfrns_hub.method.responses import Moments

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Blocks(NamedTuple):
    """The blocks of a covariance or second moment: kept [K, K], kept with cut [K, cut], cut [cut, cut]."""

    kept: Tensor
    cross: Tensor
    removed: Tensor

    @classmethod
    def of(cls, second: Tensor, keep: Tensor, leave: Tensor) -> Self:
        """Gather the blocks once: for a wide layer this takes as long as solving."""
        rows = second[keep]
        return cls(rows[:, keep], rows[:, leave], second[leave][:, leave])

    def solved(self, ridge: float) -> Tensor:
        """Return the fold [cut, K]; see `fold_matrix`."""
        scale = self.kept.diagonal().clamp(min=1e-30)
        system = self.kept + torch.diag(ridge * scale + 1e-12 * scale.max())
        factor, failed = torch.linalg.cholesky_ex(system)
        return (torch.linalg.solve(system, self.cross) if failed else torch.cholesky_solve(self.cross, factor)).T

    def error(self, products: Tensor, fold: Tensor | None) -> float:
        """Return the squared error at the consumer's outputs; see `output_error`."""
        removed = self.removed
        if fold is not None:
            cross = fold @ self.cross
            removed = removed - cross - cross.T + fold @ self.kept @ fold.T
        return float((products * removed).sum())


def fold_matrix(second: Tensor, keep: Tensor, leave: Tensor, ridge: float) -> Tensor:
    """Return the least-squares estimate of cut channels from kept ones, [cut, K].

    Args:
        second: Covariance or second moment [D, D].
        keep, leave: Channels kept [K] and cut [cut].
        ridge: Relative to each kept channel's own variance.
    """
    return Blocks.of(second, keep, leave).solved(ridge)


def weight_products(weight_OD: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the products of a consumer's weights, summed over outputs and taps of the kernel, [D, D]."""
    flat = weight_OD.to(dtype)
    flat = flat.flatten(2).permute(0, 2, 1).flatten(0, 1) if flat.ndim > 2 else flat
    return flat.T @ flat


def output_error(second: Tensor, products: Tensor, keep: Tensor, leave: Tensor, fold: Tensor | None) -> float:
    """Return the squared error at a consumer's outputs when cut channels are estimated by `fold` from kept ones.

    Args:
        second: Covariance or second moment of all channels, [D, D].
        products: `weight_products` of the channels cut, [cut, cut].
        keep, leave: Channels kept [K] and cut [cut].
        fold: The estimate [cut, K], or None for an estimate of zero.
    """
    return Blocks.of(second, keep, leave).error(products, fold)


def best_fold(moments: Moments, weight: Tensor, keep: Tensor, leave: Tensor) -> Tensor | None:
    """Return the fold with the ridge chosen on the held-out images; None where no fold is best.

    Args:
        moments: Moments of the consumer's input.
        weight: The consumer's weight [O, D, ...].
        keep, leave: Channels kept [K] and cut [cut].
    Returns:
        The fold [cut, K] in the dtype of the moments' matrix, or None.
    """
    if len(leave) == 0:
        return None
    fit, held = (Blocks.of(moments.matrix(part), keep, leave) for part in (0, 1))
    products = weight_products(weight[:, leave.to(weight.device)].cpu(), held.kept.dtype)
    best, least = None, held.error(products, None)
    for ridge in RIDGES:
        fold = fit.solved(ridge)
        error = held.error(products, fold)
        if error < least:
            best, least = fold, error
    return best


def fold_offset(moments: Moments, keep: Tensor, leave: Tensor, fold: Tensor) -> Tensor:
    """Return the constant that completes a centred fold, [cut]."""
    mean = moments.mean()
    return mean[leave] - fold.double() @ mean[keep]


def integrity(moments: Moments, weight: Tensor, keep: Tensor, leave: Tensor) -> float:
    """Return the share of a consumer's output variance on held-out images that the kept channels explain, in [0, 1]."""
    fold = best_fold(moments, weight, keep, leave)
    held = moments.matrix(1)
    products = weight_products(weight.cpu(), held.dtype)
    every = torch.arange(moments.width)
    whole = output_error(held, products, every[:0], every, None)
    lost = output_error(held, products[leave][:, leave], keep, leave, fold)
    return max(0.0, 1.0 - lost / whole) if whole > 0 else 1.0


def fold(consumer: nn.Module, moments: Moments, keep: Tensor) -> None:
    """Add the cut channels, as far as the kept ones express them, to a consumer's weights, in place.

    Kept channels keep their own weights exactly. A padded convolution gets no offset: it would be wrong at the border.

    Args:
        consumer: A linear or convolution, still with its dense width D.
        moments: Its input's moments.
        keep: Channels that stay, [K], int64.
    """
    leaves = torch.ones(moments.width, dtype=torch.bool)
    leaves[keep] = False
    leave = leaves.nonzero().flatten()
    weights = best_fold(moments, consumer.weight.detach(), keep, leave)  # [cut, K]
    if weights is None:
        return
    with torch.no_grad():
        old = consumer.weight.detach().to(weights.dtype)
        added = torch.einsum("oc...,ck->ok...", old[:, leave], weights.to(old.device))
        new = old.clone()
        new[:, keep] += added
        if moments.centred and consumer.bias is not None:
            offset = fold_offset(moments, keep, leave, weights).to(old.device)  # [cut]
            per_output = old[:, leave].flatten(2).sum(2) if old.ndim > 2 else old[:, leave]
            consumer.bias += (per_output.double() @ offset).to(consumer.bias)
        consumer.weight.copy_(new)
