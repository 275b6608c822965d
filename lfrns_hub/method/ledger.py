"""What the network costs at the present widths, against its budgets."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from lfrns_hub.trace.groups import Cost, MacsModel


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
