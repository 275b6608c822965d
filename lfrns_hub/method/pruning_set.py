"""The pruning set: the cheapest merges of all groups, until the network is below its budgets."""

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lfrns_hub.method.ledger import Ledger, SteppedCost
from lfrns_hub.method.redundancy import Merges
from lfrns_hub.trace import Trace
from lfrns_hub.units import UnitGroup

CLUSTER_TO = 0.8  # of the budget; the remaining part of the budget is restored by contribution


def cluster(
    chosen: Sequence[UnitGroup],
    merges: dict[str, Merges],
    trace: Trace,
    budgets: dict[str, float],
    widths: str,
    to: float,
    latency: SteppedCost | None = None,
    refuted: dict[str, str] | None = None,
) -> tuple[dict[str, list[int]], dict[str, list[int]], Ledger]:
    """Cluster below the budgets; return representatives and pruning set of each group, and the ledger at those widths.

    Raises:
        ValueError: The budgets are out of reach; the message explains why the `refuted` groups are not cut.
    """
    full = Ledger(trace.cost, budgets, latency=latency)
    try:
        full_taken = cluster_down(chosen, merges, full, widths)
    except ValueError as error:
        whole = "; ".join(f"{name} stays whole: {why}" for name, why in list((refuted or {}).items())[:3])
        raise ValueError(f"{error}{f' {whole}.' if whole else ''}") from None
    ledger = Ledger(trace.cost, {name: value * to for name, value in budgets.items()}, latency=latency)
    try:
        taken = cluster_down(chosen, merges, ledger, widths) if to < 1 else full_taken
        if to == 1:
            ledger = full
    except ValueError:  # reachable, though not with room to restore
        taken, ledger = full_taken, full
    ledger.budgets = budgets
    pruning_set = {g.name: merges[g.name].order[: taken[g.name]] for g in chosen}
    keep = {g.name: sorted(set(range(g.size)).difference(pruning_set[g.name])) for g in chosen}
    return keep, pruning_set, ledger


def cluster_down(groups: Sequence[UnitGroup], merges: dict[str, Merges], ledger: Ledger, widths: str) -> dict[str, int]:
    """Merge the cheapest units of all groups until the budgets are met; return the number of merges per group.

    Args:
        groups: Groups that may be cut.
        merges: Their hierarchies.
        ledger: At dense widths; changed to the clustered widths.
        widths: "global": one threshold of cost per MAC for all groups; "uniform": the same share of each group;
            "distance": one threshold of cost, regardless of the savings.
    Raises:
        ValueError: All merges together do not meet the budgets.
    """
    taken = {group.name: 0 for group in groups}
    sizes = {group.name: group.size for group in groups}

    def score(name: str) -> float:
        if widths == "uniform":
            return (taken[name] + 1) / sizes[name]
        cost = merges[name].cost[taken[name]]
        if widths == "distance":
            return cost
        over = [b for b in ledger.budgets if ledger.excess(b) > 0] or list(ledger.budgets)
        return cost / max(ledger.share(name, 1, over), 1e-30)

    heap = [(score(g.name), i, g.name) for i, g in enumerate(groups) if merges[g.name].order]
    heapq.heapify(heap)
    while not ledger.met():
        if not heap:
            shares = {b: math.ceil(1000 * ledger.now[b] / ledger.dense[b]) / 1000 for b in ledger.budgets}  # reachable
            least = ", ".join(f"{b}={share:g}" for b, share in shares.items())
            asked = ", ".join(f"{b}={v:g}" for b, v in ledger.budgets.items())
            raise ValueError(
                f"the budget {asked} is not reachable: the smallest is {least}. Ask for more, or open more groups "
                "(kinds=, exclude=, min_keep=)."
            )
        _, i, name = heapq.heappop(heap)
        now = score(name)
        if heap and now > heap[0][0]:
            heapq.heappush(heap, (now, i, name))  # savings have shrunk since it was scored
            continue
        ledger.apply(name, 1)
        taken[name] += 1
        if taken[name] < len(merges[name].order):
            heapq.heappush(heap, (score(name), i, name))
    return taken


def merge_costs(chosen: Sequence[UnitGroup], merges: dict[str, Merges]) -> dict[str, Tensor]:
    """Return the cost of merging each unit, [U] per group, infinite where it is never merged."""
    by_cost = {}
    for group in chosen:
        by_cost[group.name] = torch.full((group.size,), float("inf"), dtype=torch.float64)
        for unit, cost in zip(merges[group.name].order, merges[group.name].cost, strict=True):
            by_cost[group.name][unit] = cost
    return by_cost
