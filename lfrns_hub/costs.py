"""What every merge costs in loss: measured group by group, so that layers compare."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.answers import Answer
from lfrns_hub.contribution import Gate, answer_to
from lfrns_hub.redundancy import Merges
from lfrns_hub.responses import Moments
from lfrns_hub.running import device_of
from lfrns_hub.taps import kept_channels, watched
from lfrns_hub.units import UnitGroup

PROBED_SHARES = (0.25, 0.5, 0.75)


def measure_costs(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    merges: dict[str, Merges],
    images: Sequence[Tensor],
    moments: dict[str, Moments],
    accelerator: Any = None,
) -> dict[str, Merges]:
    """Give every merge its cost in loss: the divergence from the dense model, measured group by group.

    Each group alone is cut to a few widths, its stand-ins folded in, on a few images; between the measured widths the
    divergence is taken as linear in the cumulated cost of the merges. So costs of different layers compare.

    Args:
        model: The dense network in eval mode.
        groups: The groups that are cut.
        merges: Their hierarchies, with costs that compare within a group.
        images: Batches [N, C, H, W].
        moments: Responses per consumer.
        accelerator: Given, each process takes its share of the groups.
    Returns:
        The same orders, costs in nats an image (of features: in shares of their variance), non-decreasing.
    Source: ours; DESIGN.md section 5 asks for a cost in terms of the loss.
    """
    with torch.no_grad():
        dense = [answer_to(model, batch) for batch in images]
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    counts = {}
    for group in groups:
        order = merges[group.name].order
        counts[group.name] = sorted({max(1, round(len(order) * share)) for share in PROBED_SHARES}) if order else []
    found = torch.zeros(len(groups), len(PROBED_SHARES), dtype=torch.float64)
    for number in range(rank, len(groups), ranks):
        group = groups[number]
        for place, count in enumerate(counts[group.name]):
            gone = merges[group.name].order[:count]
            found[number, place] = divergence(model, group, gone, images, dense, moments)
    if ranks > 1:
        found = accelerator.reduce(found.to(accelerator.device), "sum").cpu()
    return {
        group.name: spread(merges[group.name], counts[group.name], row.tolist())
        for group, row in zip(groups, found, strict=True)
    }


def spread(merges: Merges, counts: list[int], measured: list[float]) -> Merges:
    """Give merges whose costs add up to what was measured after some of them, in the proportions that they had."""
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
    """Give the divergence from the dense model per image, when one group alone loses units to its stand-ins."""
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
        with watched(model, hooks):
            total += float(answer_to(model, batch).divergence(target))
        count += len(batch)
    return total / count
