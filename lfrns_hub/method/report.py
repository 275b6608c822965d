"""The report of `slim`, for people and for the card: per group and in total."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.method.fold import integrity
from lfrns_hub.method.redundancy import MIN_R2, stand_ins
from lfrns_hub.method.responses import Moments
from lfrns_hub.method.taps import kept_channels
from lfrns_hub.units import SlimPlan, UnitGroup


@dataclass
class GroupReport:
    """Report of one group.

    Attributes:
        name, kind, dense_units, kept_units: The group.
        redundant: Removed units that others stand in for: {"unit", "stand_ins", "r2"}.
        weak: Removed units without stand-ins, the same keys: they hardly affect any consumer.
        restored: Number of units of the pruning set restored by their contribution.
        integrity: Share of the consumers' output variance that the kept units explain on held-out images.
        exact: Whether removing a unit equals zeroing it; False for approximate groups.
    """

    name: str
    kind: str
    dense_units: int
    kept_units: int
    redundant: list[dict[str, Any]]
    weak: list[dict[str, Any]]
    restored: int
    integrity: float
    exact: bool = True


@dataclass
class SlimReport:
    """Report of `slim`: per group, in total, and the time of each step.

    Attributes:
        groups: A report for each group that was cut.
        macs_fraction, params_fraction: What is left of the dense model's MACs and parameters, in (0, 1].
        budget: The budgets, by name.
        restored: Number of units of the pruning set restored by their contribution.
        folded, recalibrated: Whether the fold and the BatchNorm statistics were used, by the held-out images.
        frozen: Group name to the reason, for the groups that are never cut.
        check: Errors of the self-check; see `CheckReport`.
        seconds: Time of each step.
        latency_fraction: What is left of the dense model's time, in (0, 1]; measured only under a latency budget.
        latency: Its setup, the milliseconds and a row for each layer: its widths and its time, dense and slim.
    """

    groups: list[GroupReport] = field(default_factory=list)
    macs_fraction: float = 1.0
    params_fraction: float = 1.0
    budget: dict[str, float] = field(default_factory=dict)
    restored: int = 0
    folded: bool = False
    recalibrated: bool = False
    frozen: dict[str, str] = field(default_factory=dict)
    check: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    latency_fraction: float | None = None
    latency: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {**vars(self), "groups": [vars(group) for group in self.groups]}


def measure_integrity(
    dense: nn.Module, chosen: Sequence[UnitGroup], plan: SlimPlan, moments: dict[str, Moments]
) -> dict[str, float]:
    """Return, for every consumer that lost channels, the share of its output variance that is still explained."""
    gone: dict[str, list[Tensor]] = {}
    for group in chosen:
        for tap in group.taps:
            if plan.removed(group):
                gone.setdefault(tap.module, []).append(tap.index[plan.removed(group)].flatten())
    return {
        module: integrity(
            moments[module],
            dense.get_submodule(module).weight.detach(),
            kept_channels(dense, module, removed),
            torch.cat(removed).unique(),
        )
        for module, removed in gone.items()
    }


def report_group(
    group: UnitGroup, plan: SlimPlan, moments: dict[str, Moments], restored: int, whole: dict[str, float]
) -> GroupReport:
    """Return the report of a group: redundant and weak removed units, restored units and integrity."""
    kept, removed = plan.kept(group), plan.removed(group)
    redundant, weak = [], []
    if removed:
        first = group.taps[0]
        second = moments[first.module].matrix(channels=first.index.flatten())
        names, scores = stand_ins(second, torch.tensor(kept), torch.tensor(removed), first.index.shape[1])
        for unit, others, r2 in zip(removed, names, scores, strict=True):
            row = {"unit": unit, "stand_ins": others, "r2": round(r2, 4)}
            (redundant if r2 >= MIN_R2 else weak).append(row)
    shares = [whole[tap.module] for tap in group.taps if removed]
    integrity_share = min(shares) if shares else 1.0
    return GroupReport(
        group.name, group.kind, group.size, len(kept), redundant, weak, restored, round(integrity_share, 4), group.exact
    )


@dataclass
class SlimResult:
    """The slim model, the plan that made it and the report.

    Attributes:
        model: The slim model, of the dense model's class.
        plan: Units that stay.
        report: What was removed and restored, and what is left.
    """

    model: nn.Module
    plan: SlimPlan
    report: SlimReport
