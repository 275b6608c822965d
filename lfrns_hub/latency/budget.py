"""A latency budget of one cut: the predicted fraction at which the measured latency of the whole model fits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lfrns_hub.latency.meter import LatencyMeter
from lfrns_hub.latency.search import search
from lfrns_hub.method.ledger import Ledger
from lfrns_hub.method.redundancy import Merges
from lfrns_hub.method.restore import restored_plan
from lfrns_hub.runs.cache import Cache
from lfrns_hub.units import SlimPlan, UnitGroup


class LatencyBudget:
    """Search, with a cache, for predicted fractions of the dense latency at which the measured one meets the budget."""

    def __init__(self, meter: LatencyMeter, target: float, cache: Cache, content: Sequence[Any]):
        """Set up the search for one cut.

        Args:
            meter: Meter of the dense model.
            target: Fraction of the dense latency to keep, measured.
            cache: Cache of the analysis.
            content: Everything else that the plans depend on.
        """
        self.meter, self.target, self.cache = meter, target, cache
        self._content = (*content, meter.setup.describe())

    def first(
        self,
        budgets: dict[str, float],
        clustered: Callable[[dict[str, float]], tuple[dict[str, list[int]], dict[str, list[int]], Ledger]],
        contributions: dict[str, Tensor],
        chosen: Sequence[UnitGroup],
        merges: dict[str, Merges],
        round_to: int | str,
    ) -> float:
        """Find the fraction before any training: units are ranked by the cost of merging them.

        Args:
            budgets: All budgets, as fractions.
            clustered: Returns representatives, pruning sets and ledger at some budgets.
            contributions: The costs, [U] per group.
            chosen: Groups that may be cut.
            merges: Their hierarchies.
            round_to: As for `slim`.
        """

        def plan_at(fraction: float) -> SlimPlan:
            keep, gone, ledger = clustered(budgets | {"latency": fraction})
            return restored_plan(chosen, keep, gone, contributions, ledger.in_steps(fraction), round_to)[0]

        every = {group.name: len(merges[group.name].order) for group in chosen}
        least = self.meter.predicted.fraction(every) + 1e-9  # a ledger adds up in another order
        return self._met(plan_at, self.target, least)

    def refined(
        self,
        budgets: dict[str, float],
        ledger: Ledger,
        restored_by: Callable[..., tuple[SlimPlan, dict[str, list[int]]]],
        *content: Any,
    ) -> Ledger:
        """Return the ledger at the right fraction when contributions are known.

        Args:
            budgets: The budgets of `first`, with the fraction that it found.
            ledger: At the clustered widths.
            restored_by: Returns the plan of a ledger.
            content: Everything that the plan depends on.
        """
        plan_at = lambda fraction: restored_by(ledger=ledger.in_steps(fraction))[0]  # noqa: E731
        return ledger.in_steps(self._met(plan_at, budgets["latency"], 0.0, budgets, *content))

    def _met(self, plan_at: Callable[[float], SlimPlan], start: float, least: float, *content: Any) -> float:
        """Search from a start, or return the cached result."""
        find = partial(search, plan_at, self.meter.ratio, self.target, start=start, least=least)
        return self.cache.keep("latency", find, *self._content, *content)
