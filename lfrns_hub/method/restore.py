"""Restoring from the pruning set: the units that contribute most for their cost, within the budgets."""

import heapq
from collections.abc import Sequence

from torch import Tensor

from lfrns_hub.method.ledger import Ledger, SteppedCost
from lfrns_hub.units import SlimPlan, UnitGroup


def restored_plan(
    chosen: Sequence[UnitGroup],
    keep: dict[str, list[int]],
    pruning_set: dict[str, list[int]],
    contributions: dict[str, Tensor],
    ledger: Ledger,
    round_to: int | str,
) -> tuple[SlimPlan, dict[str, list[int]]]:
    """Return the plan after restoring from the pruning set, and the units restored, per group."""
    restored = restore(chosen, pruning_set, contributions, ledger, round_to)
    return SlimPlan({g.name: sorted(keep[g.name] + restored[g.name]) for g in chosen}), restored


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
    """Restore units of the pruning set, by contribution per cost, until the budgets are full.

    Args:
        groups: Groups that are cut.
        pruning_set: Units of each group that are merged into others.
        contributions: Contribution of each unit, [U], per group.
        ledger: At the clustered widths; changed to the final widths.
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
        # Units that add no cost fit any budget: the rest of a step that is already counted.
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
