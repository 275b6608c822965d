"""The cost of the network at the present widths, against its budgets."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from lfrns_hub.trace.groups import Cost, MacsModel


class SteppedCost(Protocol):
    """A cost that changes only in whole steps of a width, as latency does on hardware.

    Attributes:
        smooth: The cost with an equal share of a step for each unit.
        stepped: The cost in whole steps.
        multiples: Units per step, by group.
    """

    smooth: Cost
    stepped: Cost
    multiples: dict[str, int]


@dataclass
class Ledger:
    """The cost of the network at the present widths, and the change when units of a group are removed or restored.

    Attributes:
        budgets: Fraction of the dense cost to keep, by "macs", "params" and "latency".
        removed: Units removed so far, by group.
        latency: The latency prediction, where latency is among the budgets.
        stepped: Whether latency changes in the hardware's whole steps, as measured, or by an equal share for each unit.
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
        """Return by how much a cost exceeds its budget, as a fraction of dense."""
        return self.now[budget] / self.dense[budget] - self.budgets[budget]

    def apply(self, group: str, units: int) -> None:
        """Remove units of a group (negative: restore)."""
        for budget in self.budgets:
            self.now[budget] += self.change(budget, group, units)
        self.removed[group] = self.removed.get(group, 0) + units

    def share(self, group: str, units: int, over: Sequence[str]) -> float:
        """Return the mean fraction of the dense cost of `units` of a group, over the named budgets."""
        return sum(abs(self.change(b, group, units)) / self.dense[b] for b in over) / max(1, len(over))

    def in_steps(self, latency: float) -> "Ledger":
        """Return a copy with a budget for the predicted latency, which then changes in the hardware's whole steps."""
        budgets = self.budgets | {"latency": latency}
        return replace(self, budgets=budgets, removed=dict(self.removed), stepped=True)

    def met(self) -> bool:
        """Return whether every budget is met."""
        return all(self.excess(b) <= 1e-12 for b in self.budgets)
