"""Clusters, contributions and a budget to a plan: merge below the budget, then restore what contributes most."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from lfrns_hub.method.redundancy import Merges
from lfrns_hub.trace import Trace
from lfrns_hub.trace.groups import Cost, MacsModel
from lfrns_hub.units import SlimPlan, UnitGroup


class SteppedCost(Protocol):
    """A cost that hardware pays in whole steps of a width, as it does latency.

    Attributes:
        smooth: Each unit has its share of a step.
        stepped: The same in whole steps.
        multiples: Units of each group that make a step.
    """

    smooth: Cost
    stepped: Cost
    multiples: dict[str, int]


@dataclass
class Ledger:
    """What the network costs at the present widths, and what one unit of a group more or less changes.

    Attributes:
        budgets: Fraction of the dense cost to keep, by "macs", "params" and "latency".
        removed: Units removed so far, by group.
        latency: What predicts it, where it is among the budgets.
        stepped: Whether latency goes in the hardware's whole steps, as in truth, or each unit has its share of one.
    """

    cost: MacsModel
    budgets: dict[str, float]
    removed: dict[str, int] = field(default_factory=dict)
    latency: SteppedCost | None = None
    stepped: bool = False

    def __post_init__(self) -> None:
        costs = {"macs": self.cost.macs, "params": self.cost.params}
        if self.latency:
            costs["latency"] = self.latency.stepped if self.stepped else self.latency.smooth
        self.costs = {name: costs[name] for name in self.budgets}
        self.dense = {name: cost({}) for name, cost in self.costs.items()}
        self.now = {name: cost(self.removed) for name, cost in self.costs.items()}

    def change(self, budget: str, group: str, units: int) -> float:
        """Return the change of one cost when `units` more of a group are removed (negative: restored)."""
        cost, after = self.costs[budget], {**self.removed, group: self.removed.get(group, 0) + units}
        return cost(after, group) - cost(self.removed, group)

    def excess(self, budget: str) -> float:
        """Return by how much a cost is above its budget, as a fraction of dense."""
        return self.now[budget] / self.dense[budget] - self.budgets[budget]

    def apply(self, group: str, units: int) -> None:
        """Remove units of a group (negative: restore)."""
        for budget in self.budgets:
            self.now[budget] += self.change(budget, group, units)
        self.removed[group] = self.removed.get(group, 0) + units

    def share(self, group: str, units: int, over: Sequence[str]) -> float:
        """Return the mean fraction of dense cost that `units` of a group stand for, over the named budgets."""
        return sum(abs(self.change(b, group, units)) / self.dense[b] for b in over) / max(1, len(over))

    def in_steps(self, latency: float) -> "Ledger":
        """Return a copy for a predicted latency, which then goes in the hardware's whole steps."""
        budgets = self.budgets | {"latency": latency}
        return replace(self, budgets=budgets, removed=dict(self.removed), stepped=True)

    def met(self) -> bool:
        """Whether every budget is met."""
        return all(self.excess(b) <= 1e-12 for b in self.budgets)


def cluster_down(groups: Sequence[UnitGroup], merges: dict[str, Merges], ledger: Ledger, widths: str) -> dict[str, int]:
    """Merge the cheapest units of all groups until the budgets are met; returns how many merges of each group.

    Args:
        groups: Groups that may be cut.
        merges: Their hierarchies.
        ledger: At dense widths; at the clustered ones when this returns.
        widths: "global": one threshold of cost per MAC for all groups; "uniform": the same share of each group;
            "distance": one threshold of cost, whatever it saves.
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
            shares = {b: math.ceil(1000 * ledger.now[b] / ledger.dense[b]) / 1000 for b in ledger.budgets}  # these hold
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


def rounding(group: UnitGroup, round_to: int | str, latency: SteppedCost | None = None) -> int:
    """Return the multiple that a group's width prefers: the hardware's step where it was measured."""
    if round_to == "auto" and latency and group.kind != "head" and latency.multiples[group.name] > 1:
        return latency.multiples[group.name]
    if round_to == "auto":
        return 8 if group.size >= 128 and group.kind in ("channel", "neuron") else 1
    return int(round_to) if group.kind != "head" else 1


def restore(
    groups: Sequence[UnitGroup],
    pruning_set: dict[str, list[int]],
    contributions: dict[str, Tensor],
    ledger: Ledger,
    round_to: int | str,
) -> dict[str, list[int]]:
    """Return units of the pruning set back, by contribution per cost, until the budgets are full.

    Args:
        groups: Groups that are cut.
        pruning_set: Units of each group that are merged into others.
        contributions: Contribution of each unit, [U], per group.
        ledger: At the clustered widths; at the final ones when this returns.
        round_to: "auto" or a multiple that widths prefer; the budget outranks it.
    Returns:
        Units restored, per group.
    """
    waiting = {
        g.name: sorted(pruning_set[g.name], key=lambda u, n=g.name: (-float(contributions[n][u]), u)) for g in groups
    }
    restored: dict[str, list[int]] = {g.name: [] for g in groups}
    kept = {g.name: g.size - len(pruning_set[g.name]) for g in groups}
    multiple = {g.name: rounding(g, round_to, ledger.latency) for g in groups}

    def package(name: str, size: int) -> int:
        width = kept[name] + len(restored[name])
        return min(len(waiting[name]), size - width % size)

    def give_back(name: str, count: int) -> bool:
        added = {b: ledger.change(b, name, -count) / ledger.dense[b] for b in ledger.budgets}
        # What adds nothing fits any budget: the rest of a step that is paid for already.
        if count <= 0 or any(more > 1e-12 and ledger.excess(b) + more > 1e-12 for b, more in added.items()):
            return False
        ledger.apply(name, -count)
        restored[name] += waiting[name][:count]
        waiting[name] = waiting[name][count:]
        return True

    def fill(sizes: dict[str, int]) -> None:
        def score(name: str) -> float:
            count = package(name, sizes[name])
            gain = sum(float(contributions[name][u]) for u in waiting[name][:count])
            return -gain / max(ledger.share(name, -count, list(ledger.budgets)), 1e-30)

        heap = [(score(g.name), i, g.name) for i, g in enumerate(groups) if waiting[g.name]]
        heapq.heapify(heap)
        while heap:
            _, i, name = heapq.heappop(heap)
            if give_back(name, package(name, sizes[name])) and waiting[name]:
                heapq.heappush(heap, (score(name), i, name))

    for group in groups:
        if multiple[group.name] > 1 and (kept[group.name] % multiple[group.name]):
            give_back(group.name, package(group.name, multiple[group.name]))
    fill(multiple)
    if any(size > 1 for size in multiple.values()) and min(-ledger.excess(b) for b in ledger.budgets) > 0.01 * min(
        ledger.budgets.values()
    ):
        fill(dict.fromkeys(multiple, 1))
    return restored


CLUSTER_TO = 0.8  # of the budget; what lies between it and the budget is restored by contribution


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
    """Cluster below the budgets: representatives and pruning set of each group, and the ledger at those widths.

    Raises:
        ValueError: The budgets are out of reach; of the groups `refuted` it says why they stay whole.
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


def merge_costs(chosen: Sequence[UnitGroup], merges: dict[str, Merges]) -> dict[str, Tensor]:
    """Return what merging each unit costs, [U] per group, infinite where it is never merged."""
    by_cost = {}
    for group in chosen:
        by_cost[group.name] = torch.full((group.size,), float("inf"), dtype=torch.float64)
        for unit, cost in zip(merges[group.name].order, merges[group.name].cost, strict=True):
            by_cost[group.name][unit] = cost
    return by_cost


def restored_plan(
    chosen: Sequence[UnitGroup],
    keep: dict[str, list[int]],
    pruning_set: dict[str, list[int]],
    contributions: dict[str, Tensor],
    ledger: Ledger,
    round_to: int | str,
) -> tuple[SlimPlan, dict[str, list[int]]]:
    """Restore from the pruning set and give the plan."""
    restored = restore(chosen, pruning_set, contributions, ledger, round_to)
    return SlimPlan({g.name: sorted(keep[g.name] + restored[g.name]) for g in chosen}), restored
