"""The cost of every merge in loss: measured group by group where that is affordable, so that layers compare.

N images, D input channels of a consumer, K of them kept and R removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from lfrns_hub.method.fold import fold_matrix, fold_offset
from lfrns_hub.method.gates import Gate, answer_gated, answer_to
from lfrns_hub.method.redundancy import RIDGE, Merges
from lfrns_hub.method.responses import Moments, backward_share
from lfrns_hub.method.taps import channel_count, channels_last, kept_channels, watched
from lfrns_hub.model_io.answers import Answer, read_answer
from lfrns_hub.model_io.hooks import on_gradient
from lfrns_hub.model_io.model import device_of, differentiated
from lfrns_hub.runs.processes import ALONE, Processes
from lfrns_hub.units import UnitGroup

PROBED_SHARES = (0.25, 0.5, 0.75)
MOST_PROBES = 256
FEWEST_PROBES = 8  # with fewer, the measurement is worse than the estimate by gradients
FEWEST_GRADIENTS = 8
GRADIENTS_EVERY = 32  # images, one of which is differentiated


def measure_costs(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    merges: dict[str, Merges],
    images: Sequence[Tensor],
    calibration_images: int,
    moments: dict[str, Moments],
    *,
    seed: int,
    processes: Processes = ALONE,
) -> dict[str, Merges]:
    """Return every merge with its cost in loss: the divergence from the dense model, group by group.

    Each group by itself is cut to a few widths, with its stand-ins folded in, on a few images; between these widths the
    divergence is taken as linear in the cumulated cost of the merges. So costs of different layers compare. There are
    at most as many of these forward passes as of the calibration. Where that leaves fewer than FEWEST_PROBES images
    per width, as for deep networks and few images, the divergence is estimated to second order, for all groups by the
    same few backward passes.

    Args:
        model: The dense network in eval mode.
        groups: The groups that are cut.
        merges: Their hierarchies, with costs that compare within a group.
        images: Batches [N, C, H, W] to probe on, held out from the moments' fitting part.
        calibration_images: Number of calibration images.
        moments: Responses per consumer.
        seed: Seed of the labels drawn for the estimate.
        processes: Each takes its share of the groups, or of the images.
    Returns:
        The same orders, costs in nats per image (features: in shares of their variance), non-decreasing.
    Source: ours; DESIGN.md section 5 asks for a cost in terms of the loss.
    """
    counts = {}
    for group in groups:
        order = merges[group.name].order
        counts[group.name] = sorted({max(1, round(len(order) * share)) for share in PROBED_SHARES}) if order else []
    gone = [[merges[group.name].order[:count] for count in counts[group.name]] for group in groups]
    probes = calibration_images // max(1, sum(map(len, counts.values())))
    differentiable = images[0].is_floating_point()
    if probes >= FEWEST_PROBES or not differentiable:
        probed = first_images(images, min(max(probes, FEWEST_PROBES), MOST_PROBES))
        found = measured(model, groups, gone, probed, moments, processes)
    else:
        some = first_images(images, max(FEWEST_GRADIENTS, calibration_images // GRADIENTS_EVERY))
        probed = [piece for batch in some for piece in batch.split(backward_share(len(images[0])))]
        found = estimated(model, groups, gone, probed, moments, seed, processes)
    return {
        group.name: spread(merges[group.name], counts[group.name], row.tolist())
        for group, row in zip(groups, found, strict=True)
    }


def first_images(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the first `count` images, in batches."""
    chosen: list[Tensor] = []
    for batch in batches:
        chosen.append(batch[: count - sum(map(len, chosen))])
    return [batch for batch in chosen if len(batch)]


def measured(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    gone: Sequence[list[list[int]]],
    images: Sequence[Tensor],
    moments: dict[str, Moments],
    processes: Processes = ALONE,
) -> Tensor:
    """Run the network once per group and width; return the divergence per image, [groups, widths], float64.

    At each width of a group the units in `gone` are removed.
    """
    with torch.no_grad():
        dense = [answer_to(model, batch) for batch in images]
    found = torch.zeros(len(groups), len(PROBED_SHARES), dtype=torch.float64)
    for number in range(len(groups))[processes.share]:
        for place, units in enumerate(gone[number]):
            found[number, place] = divergence(model, groups[number], units, images, dense, moments)
    return processes.sum(found)


@dataclass
class Change:
    """Change of one consumer's input at one width of a group: x_R becomes x_K F + b.

    Attributes:
        group, place: Indices of the divergence that it is part of.
        keep, leave: Channels kept [K] and cut [R], int64.
        weight, offset: F [K, R] and b [R], float32.
    """

    group: int
    place: int
    keep: Tensor
    leave: Tensor
    weight: Tensor
    offset: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """Return the change of the removed channels for rows [..., D]: [..., R]."""
        estimate = rows[..., self.keep] @ self.weight.to(rows) + self.offset.to(rows)
        return estimate - rows[..., self.leave]


def estimated(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    gone: Sequence[list[list[int]]],
    images: Sequence[Tensor],
    moments: dict[str, Moments],
    seed: int,
    processes: Processes = ALONE,
) -> Tensor:
    """Estimate the same divergence to second order, [groups, widths], float64.

    With g the gradient, at the consumers' inputs, of the loss for a label drawn from the model's own output, and d the
    change of the inputs, it is half the mean over the images of (sum of g d)^2, the sum over positions, channels and
    consumers: d^T F d / 2 with the Fisher information F. Errors of one sign at all positions, which a global pool
    adds up, are counted as such.
    """
    device = device_of(model)
    changes: dict[str, list[Change]] = {}
    for number, group in enumerate(groups):
        for tap in group.taps:
            of_tap = moments[tap.module]
            second = of_tap.matrix()
            for place, units in enumerate(gone[number]):
                removed = tap.index[units]
                keep, leave = kept_channels(model, tap.module, [removed]), removed.flatten().sort().values
                fold = fold_matrix(second, keep, leave, RIDGE)
                offset = fold_offset(of_tap, keep, leave, fold) if of_tap.centred else torch.zeros(len(leave))
                figures = (keep, leave, fold.T.float().contiguous(), offset.float())
                changes.setdefault(tap.module, []).append(Change(number, place, *(f.to(device) for f in figures)))
    found = torch.zeros(len(groups), len(PROBED_SHARES), dtype=torch.float64)

    def sloped(slopes: Tensor, of_tap: list[Change], module: nn.Module, value: Tensor) -> Tensor:
        value = value.clone()  # so that its gradient is only this consumer's
        if value.requires_grad:
            on_gradient(value, partial(add_slopes, slopes, of_tap, module, value.detach()))
        return value

    def slopes_of(number: int, piece: Tensor) -> Tensor:
        slopes = torch.zeros(*found.shape, len(piece), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        hooks = {name: partial(sloped, slopes, of_tap) for name, of_tap in changes.items()}
        with watched(model, hooks), torch.enable_grad():
            loss = read_answer(model, model(piece)).drawn_loss(generator)
            torch.autograd.grad(loss, piece, allow_unused=True)
        return slopes

    for number in range(len(images))[processes.share]:
        piece = images[number].to(device).detach().requires_grad_()
        found += 0.5 * differentiated(partial(slopes_of, number, piece)).square().sum(2)
    return (processes.sum(found) / sum(map(len, images))).cummax(1).values


def add_slopes(slopes: Tensor, changes: Sequence[Change], module: nn.Module, value: Tensor, gradient: Tensor) -> None:
    """Add, in place, the first-order change of each image's loss by each change of a consumer's input.

    Args:
        slopes: [groups, widths, N], float64, on the CPU.
        changes: Changes of this consumer's input.
        module: The consumer.
        value, gradient: Its input and the gradient of the loss there.
    """
    rows, slope = (
        channels_last(module, t).reshape(slopes.shape[2], -1, channel_count(module)) for t in (value, gradient)
    )
    for change in changes:
        product = slope[..., change.leave] * change.of(rows)
        slopes[change.group, change.place] += product.sum((1, 2)).double().cpu()


def spread(merges: Merges, counts: list[int], measured: list[float]) -> Merges:
    """Return merges with costs in the same proportions whose sums after some of them equal the measured ones."""
    if not counts:
        return merges
    cost = torch.tensor(merges.cost, dtype=torch.float64)
    total = [0.0, *(float(cost[:count].sum()) for count in counts)]
    points = zip([0, *counts], total, [0.0, *measured], strict=False)
    costs: list[float] = []
    for (start, before, low), (stop, after, high) in pairwise(points):
        slope = max(high - low, 1e-9) / max(after - before, 1e-30)
        costs += [slope * float(c) for c in cost[start:stop]]
    costs += [slope * float(c) for c in cost[len(costs) :]]
    return Merges(merges.order, torch.tensor(costs).cummax(0).values.tolist())


@torch.no_grad()
def divergence(
    model: nn.Module,
    group: UnitGroup,
    gone: list[int],
    images: Sequence[Tensor],
    dense: Sequence[Answer],
    moments: dict[str, Moments],
) -> float:
    """Return the divergence per image from the dense model when one group loses units to its stand-ins."""
    device = device_of(model)
    hooks = {}
    for tap in group.taps:
        removed = tap.index[gone]
        hooks[tap.module] = Gate(
            model.get_submodule(tap.module),
            moments[tap.module],
            kept_channels(model, tap.module, [removed]),
            removed.flatten().sort().values,
            device,
        )
        hooks[tap.module].places.append((torch.zeros(len(gone), device=device), removed.to(device)))
    total = count = 0
    for batch, target in zip(images, dense, strict=True):
        total += float(answer_gated(model, hooks, batch).divergence(target))
        count += len(batch)
    return total / count
