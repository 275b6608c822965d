"""Analysis of a model that no budget changes, and the cut at one budget."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from lfrns_hub.checkpoint import carry_config
from lfrns_hub.format.door import public
from lfrns_hub.latency import LatencyBudget, LatencyMeter, LatencySetup
from lfrns_hub.measure import count_macs, count_params
from lfrns_hub.method.fcr import contribute
from lfrns_hub.method.provenance import add_round, describe_round, provenance_of
from lfrns_hub.method.pruning_set import CLUSTER_TO, cluster, merge_costs
from lfrns_hub.method.recalibrate import Judge, recalibrated
from lfrns_hub.method.reconstruct import reconstruct
from lfrns_hub.method.redundancy import Merges
from lfrns_hub.method.report import SlimReport, SlimResult, measure_integrity, report_group
from lfrns_hub.method.responses import Moments
from lfrns_hub.method.restore import restored_plan
from lfrns_hub.model_io.batches import Batches
from lfrns_hub.model_io.model import (
    device_of,
    in_channels_last,
    typed_as,
)
from lfrns_hub.options import CutOptions, FindOptions, RunOptions
from lfrns_hub.runs.cache import Cache
from lfrns_hub.runs.progress import Clock, clocked
from lfrns_hub.self_check import CheckReport, Proof
from lfrns_hub.surgery import cut
from lfrns_hub.trace import Trace
from lfrns_hub.units import SlimPlan, UnitGroup, forget, frozen_with


@dataclass(frozen=True)
class Choice:
    """Units chosen at one budget, after the proof.

    Attributes:
        plan: What stays.
        every, chosen: All groups and those that are cut; groups that the proof refuted are frozen.
        restored: Units of the pruning set that stay, by group.
        checked: Results of the proof.
    """

    plan: SlimPlan
    every: list[UnitGroup]
    chosen: list[UnitGroup]
    restored: dict[str, list[int]]
    checked: CheckReport


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Analysis of a model that no budget changes; `cut` is the rest of `slim`.

    Attributes:
        model: The caller's dense model.
        dense: Its copy for the analysis, never changed by a cut.
        batches: The calibration images and labels.
        trace: Every group's place in the graph, MACs and parameters as functions of widths.
        every, chosen: All groups, and those that are cut.
        checked: Results of the self-check.
        moments, merges: Responses at each tap, by consumer, and the cost of each merge, by group.
        find, run: Options of `analyse`.
        cache: Cache of the results.
        seconds: Time of each step.
    """

    model: nn.Module
    dense: nn.Module
    batches: Batches
    trace: Trace
    every: list[UnitGroup]
    checked: CheckReport
    chosen: list[UnitGroup]
    moments: dict[str, Moments]
    merges: dict[str, Merges]
    find: FindOptions
    run: RunOptions
    cache: Cache
    seconds: dict[str, float]

    def smallest(self) -> dict[str, float]:
        """Return the fraction of the dense MACs and parameters left when every unit that may be removed is removed."""
        cost, removed = self.trace.cost, {name: len(merges.order) for name, merges in self.merges.items()}
        return {"macs": cost.macs(removed) / cost.macs({}), "params": cost.params(removed) / cost.params({})}

    @public
    def cut(
        self,
        *,
        macs: float | None = None,
        params: float | None = None,
        latency: float | None = None,
        latency_setup: LatencySetup | None = None,
        contribution: Any = "fcr",
        fcr_steps: int = 200,
        restore: bool = True,
        fold: bool = True,
        round_to: int | str = "auto",
    ) -> SlimResult:
        """Cluster, train the gates, restore, cut and fold at one budget; the analysis can be reused for others.

        Args:
            macs, params, latency, latency_setup, contribution, fcr_steps, restore, fold, round_to: As for `slim`.
        Returns:
            The same result as `slim`.
        Raises:
            ValueError: A budget or option does not fit, or the budget is not reachable.
        """
        return self.cut_by(CutOptions.of(locals()))

    def cut_by(self, how: CutOptions) -> SlimResult:
        """Cut by checked options; see `cut`."""
        how = how.under(self.find.preset)
        with clocked(self.run.shows_progress) as clock:
            meter = self._meter(how, clock)
            choice = self._choose(how, meter, clock)

            clock.step("cut and fold")
            result, finished = self._narrow(choice, how.fold)

            clock.step("report")
            report = self._report(result, choice, how.budgets, finished)
            if meter:
                report.latency_fraction = meter.ratio(choice.plan)
                report.latency = meter.tell(choice.plan, choice.chosen)
        report.seconds = self.seconds | clock.seconds
        result = typed_as(result, self.model).eval()
        outputs = result.__dict__.pop("lfrns_outputs")
        made = describe_round(
            report, choice.plan, choice.chosen, self.find.preset, self.run.seed, how.fcr_steps, self.batches
        )
        made |= getattr(self.model, "lfrns_base", {}) | ({"output": outputs.word} if outputs.sure else {})
        result.lfrns_provenance = add_round(provenance_of(self.model), made)
        return SlimResult(carry_config(result), choice.plan, report)

    def _meter(self, how: CutOptions, clock: Clock) -> LatencyMeter | None:
        """Return the latency meter, or None without a latency budget."""
        if how.latency is None:
            return None
        clock.step("latency")
        setup = (how.latency_setup or LatencySetup()).resolved(self.model, device_of(self.dense))
        return LatencyMeter(
            self.dense,
            self.every,
            self.chosen,
            self.batches[0][0][:1],
            setup,
            channels_last=in_channels_last(self.model),
            processes=self.run.processes,
        )

    def _choose(self, how: CutOptions, meter: LatencyMeter | None, clock: Clock) -> Choice:
        """Choose the units that stay; a group that refutes the plan is frozen, and the units are chosen again."""
        to, multiple = (CLUSTER_TO, how.round_to) if how.restore else (1.0, 1)
        every, chosen, checked = self.every, self.chosen, CheckReport()
        proof = contributions = None

        def clustered(at: dict[str, float], refuted: dict[str, str] | None = None) -> Any:
            predicted = meter.predicted if meter else None
            return cluster(chosen, self.merges, self.trace, at, self.find.widths, to, predicted, refuted)

        while True:
            at = how.budgets  # as predicted; the target is then shifted so that the measured latency fits
            if meter:
                clock.step("latency")
                timed = (how.budgets, to, multiple, sorted(checked.frozen))
                latency = LatencyBudget(meter, how.latency, self.cache, timed)
                costs = merge_costs(chosen, self.merges)
                at = at | {"latency": latency.first(at, clustered, costs, chosen, self.merges, multiple)}

            clock.step("clusters")
            keep, pruning_set, ledger = clustered(at, checked.frozen)

            if contributions is None:
                clock.step("FCR gates", how.steps if how.steps and how.contribution == "fcr" else None)
                contributions = contribute(
                    how.contribution, self.dense, chosen, keep, self.batches, self.moments, self.merges, how.steps,
                    how.fold, self.run.processes, clock.advance, self.cache,
                )  # fmt: skip

            clock.step("restore")
            restored_by = partial(restored_plan, chosen, keep, pruning_set, contributions, round_to=multiple)
            if meter:
                ledger = latency.refined(at, ledger, restored_by, keep, contributions)
            plan, restored = restored_by(ledger=ledger)

            clock.step("proof")
            proof = proof or Proof(self.dense, self.every, self.batches[0][0][:1], self.run.seed)
            refuted = proof.refuted(plan, checked)
            if not refuted:
                return Choice(plan, every, chosen, restored, checked)
            checked.frozen |= refuted
            every, chosen = (frozen_with(groups, refuted) for groups in (every, chosen))
            chosen = [group for group in chosen if group.frozen_reason is None]

    def _narrow(self, choice: Choice, fold: bool) -> tuple[nn.Module, dict[str, Any]]:
        """Return the narrow model with its final weights, and the result of `finish`."""
        result = cut(self.dense, choice.every, choice.plan)
        finished = self.cache.keep("weights", lambda: self.finish(result, choice.plan, fold), choice.plan.keep, fold)
        forget(result, [cache for group in self.every for cache in group.caches]).load_state_dict(finished["state"])
        return result, finished

    def finish(self, plain: nn.Module, plan: SlimPlan, fold: bool) -> dict[str, Any]:
        """Fold and recalibrate a cut model where either helps; return its state dict and whether each was used."""
        images = [images for images, _ in self.batches]
        how = {"seed": self.run.seed, "processes": self.run.processes}
        judge, candidates = Judge(self.dense, images), [plain]
        if fold:  # channel by channel, then layer after layer from there
            by_channel = cut(self.dense, self.every, plan, self.moments)
            by_layer = reconstruct(self.dense, by_channel, self.trace.sites, self.every, plan, images, **how)
            candidates = [by_layer, by_channel, plain]
        result = judge.nearest(candidates)
        final = judge.nearest([result, *recalibrated(result, images)])
        return {
            "state": dict(final.state_dict()), "folded": result is not plain, "recalibrated": final is not result,
        }  # fmt: skip

    def _report(
        self, result: nn.Module, choice: Choice, budgets: dict[str, float], finished: dict[str, Any]
    ) -> SlimReport:
        """Return the report of the units kept and removed, their cost and the self-check."""
        example, chosen, restored = self.batches[0][0][:1], choice.chosen, choice.restored
        whole = measure_integrity(self.dense, chosen, choice.plan, self.moments)
        return SlimReport(
            groups=[report_group(g, choice.plan, self.moments, len(restored[g.name]), whole) for g in chosen],
            macs_fraction=count_macs(result, example) / count_macs(self.dense, example),
            params_fraction=count_params(result) / count_params(self.dense),
            budget=budgets,
            restored=sum(len(r) for r in restored.values()),
            folded=finished["folded"],
            recalibrated=finished["recalibrated"],
            frozen={g.name: g.frozen_reason for g in choice.every if g.frozen_reason},
            check={"largest_error": choice.checked.largest_error, "moved": choice.checked.moved},
        )
