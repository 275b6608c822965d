"""What `slim` did, for people and for the card: per group, in all, and how long each step took."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lfrns_hub.method.redundancy import MIN_R2, stand_ins
from lfrns_hub.method.responses import Moments, integrity
from lfrns_hub.method.taps import kept_channels
from lfrns_hub.model_io.batches import split_batch
from lfrns_hub.units import SlimPlan, UnitGroup

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass
class GroupReport:
    """What became of one group.

    Attributes:
        name, kind, dense_units, kept_units: The group.
        redundant: Removed units that others stand in for: {"unit", "stand_ins", "r2"}.
        weak: Removed units that no other stands in for, the same keys: they hardly reach any consumer.
        restored: Units of the pruning set that their contribution brought back.
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
    """What `slim` did: per group, in all, and how long it took.

    `folded` and `recalibrated` say what was kept of either, as the held-out images decided. `latency_fraction` is
    measured, under a budget of latency alone; `latency` has the setup, the milliseconds and a row for each layer: its
    widths, and what it takes, dense and slim, by the table.
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
        """Give the report as plain data for JSON."""
        return {**vars(self), "groups": [vars(group) for group in self.groups]}


def measure_integrity(
    dense: nn.Module, chosen: Sequence[UnitGroup], plan: SlimPlan, moments: dict[str, Moments]
) -> dict[str, float]:
    """Give, for every consumer that lost channels, the share of its output variance that is still explained."""
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
    """Say of a group what left as redundant and as weak, and how whole its function is."""
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


def provenance(
    report: SlimReport,
    plan: SlimPlan,
    chosen: Sequence[UnitGroup],
    preset: str,
    seed: int,
    fcr_steps: int,
    batches: list[Any],
) -> dict[str, Any]:
    """Give what a checkpoint and a card say of how the slim model was made."""
    return {
        "plan": plan.keep,
        "widths": {group.name: [group.kept_units, group.dense_units] for group in report.groups},
        "kinds": {group.name: group.kind for group in chosen},
        "approximate": [group.name for group in chosen if not group.exact],
        "budget": report.budget,
        "preset": preset,
        "seed": seed,
        "fcr_steps": fcr_steps,
        "calibration_images": sum(len(split_batch(batch)[0]) for batch in batches),
        "report": {
            "macs_fraction": round(report.macs_fraction, 4),
            "params_fraction": round(report.params_fraction, 4),
            "restored": report.restored,
            "redundant": sum(len(group.redundant) for group in report.groups),
            "weak": sum(len(group.weak) for group in report.groups),
            "integrity": {group.name: group.integrity for group in report.groups},
            "folded": report.folded,
            "recalibrated": report.recalibrated,
        }
        | ({} if report.latency is None else {"latency_fraction": round(report.latency_fraction, 4)}),
    } | ({} if report.latency is None else {"latency_setup": report.latency["setup"]})


def added_up(before: dict[str, Any] | None, made: dict[str, Any]) -> dict[str, Any]:
    """Put what was known of a model's making before this round together with this round.

    Plan, widths, budget and fractions are then those of the first dense model; `rounds` has each round as it was.

    Args:
        before: The provenance of the model that was slimmed, None of a dense one.
        made: This round's.

    Example:
        >>> first = {"plan": {"a": [1, 3, 4]}, "widths": {"a": [3, 6]}, "budget": {"macs": 0.5}}
        >>> again = added_up(first, {"plan": {"a": [0, 2]}, "widths": {"a": [2, 3]}, "budget": {"params": 0.5}})
        >>> again["plan"], again["widths"], again["budget"]
        ({'a': [1, 4]}, {'a': [2, 6]}, {'macs': 0.5, 'params': 0.5})
    """
    if not before:
        return made
    plan, widths = dict(before.get("plan") or {}), dict(before.get("widths") or {})
    for name, kept in made["plan"].items():
        plan[name] = [plan[name][i] for i in kept] if name in plan else list(kept)
    for name, (kept, dense) in made["widths"].items():
        widths[name] = [kept, widths[name][1] if name in widths else dense]
    was, now = dict(before.get("report") or {}), dict(made.get("report") or {})
    budget = dict(before.get("budget") or {})
    for name, fraction in made["budget"].items():
        if name != "latency" or "latency_fraction" in was:  # else the first model's time is not known
            budget[name] = round(fraction * was.get(f"{name}_fraction", budget.get(name, 1.0)), 4)
    for name in ("macs_fraction", "params_fraction", "latency_fraction"):
        if name in was and name in now:
            now[name] = round(was[name] * now[name], 4)
    if "latency_fraction" in now and "latency_fraction" not in was:
        del now["latency_fraction"]
    for name in ("restored", "redundant", "weak"):
        if name in was and name in now:
            now[name] += was[name]
    if "integrity" in now:
        now["integrity"] = {**(was.get("integrity") or {}), **now["integrity"]}
    rounds = before.get("rounds") or [_round(before)]
    together = {
        "plan": plan,
        "widths": widths,
        "kinds": {**(before.get("kinds") or {}), **(made.get("kinds") or {})},
        "approximate": sorted({*(before.get("approximate") or []), *(made.get("approximate") or [])}),
        "budget": budget,
        "rounds": [*rounds, _round(made)],
    }
    return {**before, **made, **together, **({"report": now} if now else {})}


def _round(made: dict[str, Any]) -> dict[str, Any]:
    """Give what one round was asked for and gave, as fractions of the model that it began with."""
    fractions = {k: v for k, v in (made.get("report") or {}).items() if k.endswith("_fraction")}
    asked = ("budget", "preset", "seed", "fcr_steps", "calibration_images")
    return {k: made[k] for k in asked if k in made} | fractions


class Clock:
    """Seconds of each step, and its line on the terminal."""

    def __init__(self, bars: "Progress | None"):
        self.bars, self.task = bars, None
        self.seconds: dict[str, float] = {}
        self.name, self.started = "", time.perf_counter()

    def step(self, name: str, total: int = 1) -> None:
        """Close the running step and begin another."""
        now = time.perf_counter()
        if self.name:
            self.seconds[self.name] = round(self.seconds.get(self.name, 0.0) + now - self.started, 2)
        self.name, self.started = name, now
        if self.bars:
            if self.task is not None:
                self.bars.update(self.task, completed=self.bars.tasks[self.task].total)
            self.task = self.bars.add_task(name, total=total) if name else None

    def advance(self, count: int) -> None:
        """Move the running step's bar."""
        if self.bars and self.task is not None:
            self.bars.advance(self.task, count)


@contextmanager
def clocked(show: bool) -> Iterator[Clock]:
    """Time the steps, with bars where `show`."""
    bars = None
    if show:
        from rich.console import Console  # here: no bars, no rich
        from rich.progress import Progress

        bars = Progress(console=Console(stderr=True))
        bars.start()
    clock = Clock(bars)
    try:
        yield clock
        clock.step("")
    finally:
        if bars:
            bars.stop()
