"""The one call: trace, self-check, and the steps of `method/`, in reading order."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.checkpoint import carry_config
from lfrns_hub.format.narrow import model_copy
from lfrns_hub.latency import LatencyMeter, LatencySetup, search
from lfrns_hub.measure import count_macs, count_params
from lfrns_hub.method.costs import measure_costs
from lfrns_hub.method.fcr import contribute
from lfrns_hub.method.provenance import added_up, provenance
from lfrns_hub.method.recalibrate import Judge, recalibrated
from lfrns_hub.method.reconstruct import reconstruct
from lfrns_hub.method.redundancy import Merges, find_merges, views
from lfrns_hub.method.report import SlimReport, SlimResult, measure_integrity, report_group
from lfrns_hub.method.responses import Moments, collect, held_out
from lfrns_hub.method.select import CLUSTER_TO, cluster, merge_costs, restored_plan
from lfrns_hub.model_io.answers import check_differentiable, understand
from lfrns_hub.model_io.batches import Batches
from lfrns_hub.model_io.model import (
    as_input,
    device_of,
    dtype_of,
    in_channels_last,
    memory_format_of,
    refuse_meta,
    return_memory,
    settle_layout,
    unwrap,
)
from lfrns_hub.options import KINDS, check_budgets, check_cut, check_options, choose_groups, read_loader
from lfrns_hub.runs.cache import Cache
from lfrns_hub.runs.progress import clocked
from lfrns_hub.self_check import CheckReport, Proof, self_check, settled_trace
from lfrns_hub.surgery import cut
from lfrns_hub.trace import Trace
from lfrns_hub.units import SlimPlan, UnitGroup, forget


def slim(
    model: nn.Module,
    loader: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    latency_setup: LatencySetup | None = None,
    preset: str = "ours",
    kinds: Sequence[str] = KINDS,
    groups: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    distance: Any = "functional",
    contribution: Any = "fcr",
    fcr_steps: int = 200,
    restore: bool = True,
    fold: bool = True,
    widths: str = "global",
    round_to: int | str = "auto",
    min_keep: int = 1,
    approximate: bool = False,
    accelerator: Any = None,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike | None = None,
) -> SlimResult:
    """Make a model physically narrower by low functional redundancy network slimming.

    Args:
        model: The dense network, any that torch.export runs: a classifier, or a network that answers with features
            (lists, dicts, dataclasses of tensors too). Untouched, on any device but meta, of any floating-point type:
            half precision is analysed in float32. Wrappers of torch.compile and DDP come off.
        loader: Calibration batches: `(images, labels)`, dicts, or bare images; it is read once, shuffled and kept in
            memory. Its order does not matter. Labels are class numbers [N], rows [N, K] of labels that hold together,
            or quantities; of several heads they come by name or in order; those of features are not read. What the
            outputs mean is said by `model.problem_type` (transformers' words), by the model's configuration or by the
            labels, else by shape.
        macs, params: Fraction of the dense cost to keep, in (0, 1]; what is given together holds together.
        latency: Fraction of the dense model's time of a forward pass to keep, in (0, 1], measured here and now. What
            layers take by width is measured once and kept in LFRNS_CACHE, else in the user's cache.
        latency_setup: Batch, dtype, device, threads, and whether compiled; by default one image, run as the model is.
        preset: "ours", or "paper": the abstract taken literally (correlation clusters, FCR, restore, no fold).
        kinds: Kinds of units to cut.
        groups, exclude: Names or globs of groups to cut, and not to.
        distance: "functional", "correlation", or a function of (tap views, units) giving distances [U, U].
        contribution: "fcr", or a function of (model, groups, keep, batches, moments) giving {group: [U]}.
        fcr_steps: Steps that the gates train; 0 skips them and ranks by the cost of merging.
        restore: Cluster below the budget and restore by contribution; False clusters right down to it.
        fold: Add what was cut to the consumers' weights, as far as the kept units express it.
        widths: "global", one threshold of cost per MAC for all groups, or "uniform", the same share of each.
        round_to: Multiple that widths prefer; "auto" is 8 for groups of 128 and more channels or neurons, and under
            latency= the multiple at which this machine gets slower, where it shows one.
        min_keep: Units that every group keeps.
        approximate: Also cut groups whose removal crosses a LayerNorm; no self-check covers those.
        accelerator: An Accelerate accelerator; each process then takes its share of the images.
        seed: Same seed, same plan; under latency= as far as the machine takes the same time.
        device: Where to run; by default where the model is.
        progress: Show a bar on the main process.
        checkpoint_dir: A folder, seen by all processes, where moments, merges, the gates' training and the finished
            weights are kept by the content of all they hang on: the same call takes up what is there, and ends with
            the same result, bit by bit on CPU. Moments take 16 bytes x width^2 per consumer, above 512 channels half of
            that. What was kept of a model and its images stays, at all budgets, until two others have been analysed
            there. SIGTERM while the gates train saves and ends the program with exit code 0. None: nothing is written.
    Returns:
        The slim model, the plain module in eval mode, on the device of the run, each weight in its own dtype and
        trainable if it was; its plan and the report. What transformers' save_pretrained or timm's save_for_hf write
        of it loads again; a slim model may be slimmed further, and its provenance then tells of both rounds.
    Raises:
        TypeError: The model is no module.
        ValueError: A budget, name or option does not fit, the loader is empty, labels are none of such outputs, the
            budget is not reachable.
        OSError: checkpoint_dir cannot be written to.
    Source: Fang and Yin 2025; each step's docstring says what is ours.
    """
    budgets = check_budgets(macs, params, latency, contribution, call="slim")
    check_cut(fcr_steps, round_to, latency, latency_setup, call="slim")
    analysis = analyse(
        model,
        loader,
        preset=preset,
        kinds=kinds,
        groups=groups,
        exclude=exclude,
        distance=distance,
        widths=widths,
        min_keep=min_keep,
        approximate=approximate,
        accelerator=accelerator,
        seed=seed,
        device=device,
        progress=progress,
        checkpoint_dir=checkpoint_dir,
        _call="slim",
    )
    return analysis.cut(
        **budgets,
        latency_setup=latency_setup,
        contribution=contribution,
        fcr_steps=fcr_steps,
        restore=restore,
        fold=fold,
        round_to=round_to,
    )


def analyse(
    model: nn.Module,
    loader: Any,
    *,
    preset: str = "ours",
    kinds: Sequence[str] = KINDS,
    groups: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    distance: Any = "functional",
    widths: str = "global",
    min_keep: int = 1,
    approximate: bool = False,
    accelerator: Any = None,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike | None = None,
    _call: str = "analyse",
) -> "Analysis":
    """Do the part of `slim` that no budget changes: trace, self-check, responses, the cost of every merge.

    Args:
        model, loader, preset, kinds, groups, exclude, distance, widths, min_keep, approximate, accelerator, seed,
            device, progress, checkpoint_dir: As for `slim`.
    Returns:
        What `.cut(macs=0.5)` makes a slim model of, at as many budgets as are wanted, each as `slim` would give it.
    Raises:
        TypeError: The model is no module.
        ValueError: A name or option does not fit, or the loader is empty.
    """
    if preset == "paper":
        distance, widths = "correlation", "distance"
    check_options(preset, kinds, widths, min_keep, call=_call)
    model = unwrap(model, _call)
    refuse_meta(model, _call)
    with clocked(progress and (accelerator is None or accelerator.is_main_process)) as clock:
        dense = analysis_copy(model, accelerator.device if accelerator else device or device_of(model))
        batches = read_loader(loader, dense, seed, call=_call)
        example = batches[0][0][:1]
        settle_layout(example, dense)

        clock.step("trace")
        trace = settled_trace(dense, example)
        trace.cost.complete(count_macs(dense, example))
        check_differentiable(dense, as_input(example, dense), _call)
        batches = understand(dense, batches, _call)
        clock.step("self-check")
        every, checked = self_check(dense, trace.groups, example, seed)
        return_memory()
        chosen = choose_groups(every, kinds, groups, exclude, approximate, min_keep, call=_call)

        clock.step("responses")
        images, names = [images for images, _ in batches], [group.name for group in chosen]
        cache = Cache(checkpoint_dir, accelerator, dense, images, [names, repr(dense.lfrns_outputs)], seed, call=_call)
        macs = trace.cost.macs({})
        kept = cache.keep("moments", lambda: as_data(observe(dense, chosen, batches, macs, seed, accelerator)))
        moments = {name: Moments(**fields) for name, fields in kept.items()}

        clock.step("redundancy")
        return_memory()

        def find() -> dict[str, Merges]:
            merges = {
                g.name: find_merges(views(dense, g, moments), g.size, distance, min(min_keep, g.size)) for g in chosen
            }
            if distance == "functional" and widths == "global":
                held, count = held_out(images), sum(map(len, images))
                return measure_costs(dense, chosen, merges, held, count, moments, seed=seed, accelerator=accelerator)
            return merges

        kept = cache.keep("merges", lambda: as_data(find()), distance, widths, min_keep)
        merges = {name: Merges(**fields) for name, fields in kept.items()}
    return Analysis(
        model, dense, batches, trace, every, checked, chosen, moments, merges,
        preset, widths, accelerator, seed, progress, cache, clock.seconds,
    )  # fmt: skip


def as_data(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Give dataclasses by name as plain data that a cache keeps."""
    return {name: dict(vars(result)) for name, result in results.items()}


@dataclass(frozen=True)
class Analysis:
    """What is known of a model before a budget is named; `cut` is the rest of `slim`.

    Attributes:
        model: The dense model, as it came.
        dense: Its copy for the analysis, never changed by a cut.
        batches: The calibration images and labels.
        trace: Every group's place in the graph, MACs and parameters as functions of widths.
        every, chosen: All groups, and those that are cut.
        checked: What the self-check found.
        moments, merges: Responses at each tap, by consumer, and the cost of each merge, by group.
        preset, widths, accelerator, seed, progress: As `analyse` was told.
        cache: Where results are kept.
        seconds: What each step took.
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
    preset: str
    widths: str
    accelerator: Any
    seed: int
    progress: bool
    cache: Cache
    seconds: dict[str, float]

    def smallest(self) -> dict[str, float]:
        """Give the fraction of the dense MACs and parameters that is left when all units go that may."""
        cost, removed = self.trace.cost, {name: len(merges.order) for name, merges in self.merges.items()}
        return {"macs": cost.macs(removed) / cost.macs({}), "params": cost.params(removed) / cost.params({})}

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
        """Cluster, train the gates, restore, cut and fold at one budget; the analysis serves the next as well.

        Args:
            macs, params, latency, latency_setup, contribution, fcr_steps, restore, fold, round_to: As for `slim`.
        Returns:
            As `slim`, and equal to what it gives.
        Raises:
            ValueError: A budget or option does not fit, or the budget is not reachable.
        """
        budgets = check_budgets(macs, params, latency, contribution, call="Analysis.cut")
        check_cut(fcr_steps, round_to, latency, latency_setup, call="Analysis.cut")
        dense, moments, batches = self.dense, self.moments, self.batches
        example, accelerator = batches[0][0][:1], self.accelerator
        steps, fold = fcr_steps if restore else 0, fold and self.preset != "paper"
        to, multiple = (CLUSTER_TO, round_to) if restore else (1.0, 1)
        meter, at = None, budgets  # at: as predicted; the measured latency is met by another than the one asked for
        proof, checked, every, chosen = None, CheckReport(), self.every, self.chosen
        contributions: dict[str, Tensor] | None = None
        with clocked(self.progress and (accelerator is None or accelerator.is_main_process)) as clock:
            if latency is not None:
                clock.step("latency")
                setup = (latency_setup or LatencySetup()).resolved(self.model, device_of(dense))
                meter = LatencyMeter(
                    dense,
                    self.every,
                    chosen,
                    example,
                    setup,
                    channels_last=in_channels_last(self.model),
                    accelerator=accelerator,
                )
            while True:  # until the plan is proved; a group that refutes it is frozen, and the units are chosen again
                timed = (budgets, to, multiple, meter and meter.setup.describe(), sorted(checked.frozen))
                if meter:
                    clock.step("latency")
                    first = functools.partial(self.meet_latency, meter, chosen, budgets, to, multiple)
                    at = budgets | {"latency": self.cache.keep("latency", first, *timed)}

                clock.step("clusters")
                model = meter.predicted if meter else None
                keep, pruning_set, clustered = cluster(
                    chosen, self.merges, self.trace, at, self.widths, to, model, checked.frozen
                )

                if contributions is None:
                    clock.step("FCR gates", steps if steps and contribution == "fcr" else 1)
                    contributions = contribute(
                        contribution, dense, chosen, keep, batches, moments, self.merges, steps, fold, accelerator,
                        clock.advance, self.cache,
                    )  # fmt: skip

                clock.step("restore")
                ledger = clustered
                restored_by = functools.partial(
                    restored_plan, chosen, keep, pruning_set, contributions, round_to=multiple
                )
                if meter:
                    predicted = functools.partial(
                        search,
                        lambda fraction, by=restored_by, of=clustered: by(ledger=of.in_steps(fraction))[0],
                        meter.ratio,
                        latency,
                        start=at["latency"],
                    )
                    fraction = self.cache.keep("latency", predicted, *timed, at, keep, contributions)
                    ledger = clustered.in_steps(fraction)
                plan, restored = restored_by(ledger=ledger)

                clock.step("proof")
                proof = proof or Proof(dense, self.every, example, self.seed)
                refuted = proof.refuted(plan, checked)
                if not refuted:
                    break
                checked.frozen |= refuted
                every, chosen = (frozen_with(groups, refuted) for groups in (every, chosen))
                chosen = [group for group in chosen if group.frozen_reason is None]
            del proof

            clock.step("cut and fold")
            result = cut(dense, every, plan)
            finished = self.cache.keep("weights", lambda: self.finish(result, plan, fold), plan.keep, fold)
            forget(result, [cache for group in self.every for cache in group.caches]).load_state_dict(finished["state"])

            clock.step("report")
            whole = measure_integrity(dense, chosen, plan, moments)
            report = SlimReport(
                [report_group(g, plan, moments, len(restored[g.name]), whole) for g in chosen],
                count_macs(result, example) / count_macs(dense, example),
                count_params(result) / count_params(dense),
                budgets,
                sum(len(r) for r in restored.values()),
                finished["folded"],
                finished["recalibrated"],
                {g.name: g.frozen_reason for g in every if g.frozen_reason},
                {"largest_error": checked.largest_error, "moved": checked.moved},
            )
            if meter:
                report.latency_fraction, report.latency = meter.ratio(plan), meter.tell(plan, chosen)
        report.seconds = self.seconds | clock.seconds
        result = typed_as(result, self.model).eval()
        outputs = result.__dict__.pop("lfrns_outputs")
        made = provenance(report, plan, chosen, self.preset, self.seed, fcr_steps, batches)
        made |= getattr(self.model, "lfrns_base", {}) | ({"output": outputs.word} if outputs.sure else {})
        result.lfrns_provenance = added_up(getattr(self.model, "lfrns_provenance", None), made)
        return SlimResult(carry_config(result), plan, report)

    def meet_latency(
        self,
        meter: LatencyMeter,
        chosen: Sequence[UnitGroup],
        budgets: dict[str, float],
        to: float,
        multiple: int | str,
    ) -> float:
        """Find the predicted fraction of latency at which the measured one is met, units ranked by cost meanwhile."""
        contributions = merge_costs(chosen, self.merges)

        def plan_at(fraction: float) -> SlimPlan:
            at = budgets | {"latency": fraction}
            keep, gone, ledger = cluster(chosen, self.merges, self.trace, at, self.widths, to, meter.predicted)
            ledger = ledger.in_steps(fraction)
            return restored_plan(chosen, keep, gone, contributions, ledger, multiple)[0]

        every = {group.name: len(self.merges[group.name].order) for group in chosen}
        least = meter.predicted.fraction(every) + 1e-9  # a ledger adds up in another order
        return search(plan_at, meter.ratio, budgets["latency"], start=budgets["latency"], least=least)

    def finish(self, plain: nn.Module, plan: SlimPlan, fold: bool) -> dict[str, Any]:
        """Fold and recalibrate a cut model, each where it is better: its state, and whether each was."""
        images, how = [images for images, _ in self.batches], {"seed": self.seed, "accelerator": self.accelerator}
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


def frozen_with(groups: Sequence[UnitGroup], reasons: dict[str, str]) -> list[UnitGroup]:
    """Return the groups, those that have a reason here frozen."""
    return [replace(group, frozen_reason=reasons.get(group.name, group.frozen_reason)) for group in groups]


def analysis_copy(model: nn.Module, device: Any) -> nn.Module:
    """Copy a model for the analysis: on the device, in eval mode, float32 or better, no weight trainable.

    A convnet's kernels have their channels last, in which convolutions run up to thrice as fast.
    """
    dense = model_copy(model).to(device=device, dtype=torch.promote_types(dtype_of(model), torch.float32))
    dense.to(memory_format=memory_format_of(dense)).zero_grad(set_to_none=True)
    return dense.eval().requires_grad_(False)


def typed_as(result: nn.Module, model: nn.Module) -> nn.Module:
    """Give each tensor of a slim model its dense dtype and layout, and each parameter its requires_grad, in place."""
    dense = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in [*result.named_parameters(), *result.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dense[name].dtype if name in dense else dtype_of(model))
        if name not in dense or dense[name].is_contiguous():
            # Of one channel every layout counts as contiguous, and kernels are chosen by the strides.
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(dense[name].requires_grad if name in dense else True)
    return result


def observe(
    dense: nn.Module, chosen: Sequence[UnitGroup], batches: Batches, macs: float, seed: int, accelerator: Any
) -> dict[str, Moments]:
    """Run the images and keep the moments at every tap of the chosen groups."""
    taps = list(dict.fromkeys(tap.module for group in chosen for tap in group.taps))
    return collect(dense, taps, batches, macs=macs, seed=seed, accelerator=accelerator)
