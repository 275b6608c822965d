"""The one call: trace, responses, redundancy, contribution, select, surgery, in reading order."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.batches import read_logits, split_batch
from lfrns_hub.contribution import learn_contributions, measure_costs
from lfrns_hub.measure import count_macs, count_params
from lfrns_hub.redundancy import Merges, TapView, find_merges, weight_gram
from lfrns_hub.report import SlimReport, clocked, provenance, report_group
from lfrns_hub.responses import HELD_OUT_EVERY, Moments, collect
from lfrns_hub.select import Ledger, cluster_down, restore
from lfrns_hub.self_check import CheckReport, self_check
from lfrns_hub.surgery import cut, recalibrate
from lfrns_hub.trace import Trace, trace_model
from lfrns_hub.units import SlimPlan, UnitGroup

CLUSTER_TO = 0.8  # of the budget; what lies between it and the budget is restored by contribution
LOSS_IMAGES = 512
PROBE_IMAGES = 256
KINDS = ("channel", "head", "neuron")


@dataclass
class SlimResult:
    """The slim model, the plan that made it and the report."""

    model: nn.Module
    plan: SlimPlan
    report: SlimReport


def find_units(model: nn.Module, example_input: Tensor) -> list[UnitGroup]:
    """Find all groups of units of a model, frozen ones with the reason.

    Args:
        model: Any image network that torch.export runs; untouched, its weights are not read.
        example_input: Images [N, C, H, W]; only shape and dtype count.
    Returns:
        Groups in the order of the network.
    Raises:
        ValueError: The model cannot be exported on such images.
    """
    return trace_model(model, example_input).groups


def check(model: nn.Module, example_input: Tensor) -> CheckReport:
    """Run the self-check alone: cut two fifths of every exact group of a randomised copy, compare with masking.

    Args:
        model: Any image network; untouched.
        example_input: Images [N, C, H, W].
    Returns:
        Largest error over the largest output (float64), and the groups that failed.
    """
    return self_check(model, find_units(model, example_input), example_input)[1]


def slim(
    model: nn.Module,
    loader: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
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
) -> SlimResult:
    """Make a model physically narrower by low functional redundancy network slimming.

    Args:
        model: The dense network; untouched.
        loader: Calibration batches: `(images, labels)`, dicts, or bare images; it is read once and kept in memory.
        macs, params: Fraction of the dense cost to keep, in (0, 1]; given together both hold.
        latency: Not yet available.
        preset: "ours", or "paper": the abstract taken literally (correlation clusters, FCR, restore, no fold).
        kinds: Kinds of units to cut.
        groups, exclude: Names or globs of groups to cut, and not to.
        distance: "functional", "correlation", or a function of (tap views, units) giving distances [U, U].
        contribution: "fcr", or a function of (model, groups, keep, batches, moments) giving {group: [U]}.
        fcr_steps: Steps that the gates train; 0 skips them and ranks by the cost of merging.
        restore: Cluster below the budget and restore by contribution; False clusters right down to it.
        fold: Add what was cut to the consumers' weights, as far as the kept units express it.
        widths: "global", one threshold of cost per MAC for all groups, or "uniform", the same share of each.
        round_to: Multiple that widths prefer; "auto" is 8 for groups of 128 and more channels or neurons.
        min_keep: Units that every group keeps.
        approximate: Also cut groups whose removal crosses a LayerNorm; no self-check covers those.
        accelerator: An Accelerate accelerator; each process then takes its share of the images.
        seed: Same seed, same plan.
        device: Where to run; by default where the model is.
        progress: Show a bar on the main process.
    Returns:
        The slim model in eval mode, on the device of the run, its plan and the report.
    Raises:
        ValueError: A budget, name or option does not fit, the loader is empty, the budget is not reachable.
    Source: Fang and Yin 2025; each step's docstring says what is ours.
    """
    if preset == "paper":
        distance, fold, widths = "correlation", False, "distance"
    elif preset != "ours":
        raise ValueError(f"slim(preset={preset!r}): presets are 'ours' and 'paper'.")
    budgets = check_options(macs, params, latency, kinds, widths, min_keep)
    device = accelerator.device if accelerator else device or next(model.parameters()).device
    with clocked(progress and (accelerator is None or accelerator.is_main_process)) as clock:
        batches = read_loader(loader)
        dense = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        example = split_batch(batches[0])[0][:1]

        clock.step("trace")
        trace = trace_model(dense, example)
        clock.step("self-check")
        every, checked = self_check(dense, trace.groups, example, seed)
        chosen = choose_groups(every, kinds, groups, exclude, approximate, min_keep)

        clock.step("responses")
        taps = list(dict.fromkeys(tap.module for group in chosen for tap in group.taps))
        images_a_batch = len(split_batch(batches[0])[0])
        moments = collect(
            dense, taps, batches, loss_batches=-(-LOSS_IMAGES // images_a_batch), seed=seed, accelerator=accelerator
        )

        clock.step("redundancy")
        views = {
            group.name: [view(dense, tap.module, tap.index.flatten(), moments) for tap in group.taps]
            for group in chosen
        }
        merges = {g.name: find_merges(views[g.name], g.size, distance, min(min_keep, g.size)) for g in chosen}
        if distance == "functional" and widths == "global":
            held = [
                split_batch(batch)[0].to(device) for batch in batches[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or batches
            ]
            merges = measure_costs(dense, chosen, merges, held[: max(1, -(-PROBE_IMAGES // images_a_batch))], moments)
        keep, pruning_set, ledger = cluster(chosen, merges, trace, budgets, widths, CLUSTER_TO if restore else 1.0)

        clock.step("FCR gates", fcr_steps if restore and contribution == "fcr" else 1)
        contributions = contribute(
            contribution if fcr_steps or callable(contribution) else "cost",
            dense,
            chosen,
            keep,
            batches,
            moments,
            merges,
            fcr_steps if restore else 0,
            accelerator,
            clock.advance,
        )

        clock.step("restore")
        plan, restored = restored_plan(chosen, keep, pruning_set, contributions, ledger, round_to if restore else 1)

        clock.step("cut and fold")
        result = cut(dense, every, plan, moments if fold else None).requires_grad_(True)
        for name, parameter in result.named_parameters():
            parameter.requires_grad_(model.get_parameter(name).requires_grad)
        result, recalibrated = recalibrate_if_better(dense, result, batches)

        clock.step("report")
        report = SlimReport(
            [report_group(dense, g, plan, moments, views[g.name], len(restored[g.name]), chosen) for g in chosen],
            count_macs(result, example) / count_macs(dense, example),
            count_params(result) / count_params(dense),
            budgets,
            sum(len(r) for r in restored.values()),
            recalibrated,
            {g.name: g.frozen_reason for g in every if g.frozen_reason},
            {"largest_error": checked.largest_error, "moved": checked.moved},
        )
    report.seconds = clock.seconds
    result.lfrns_provenance = provenance(report, plan, chosen, preset, seed, fcr_steps, batches)
    return SlimResult(result.eval(), plan, report)


def check_options(macs: Any, params: Any, latency: Any, kinds: Any, widths: str, min_keep: int) -> dict[str, float]:
    """Give the budgets, or one clear error."""
    if latency is not None:
        raise ValueError(f"slim(latency={latency}): latency budgets are not available yet. Use macs= or params=.")
    budgets = {name: value for name, value in (("macs", macs), ("params", params)) if value is not None}
    if not budgets:
        raise ValueError(
            "slim() needs a budget: macs= or params=, the fraction of the dense model to keep, as macs=0.5."
        )
    for name, value in budgets.items():
        if not 0 < value <= 1:
            what = "MACs" if name == "macs" else "parameters"
            hint = f" For {value:g} % pass {value / 100:g}." if 1 < value <= 100 else ""
            raise ValueError(f"slim({name}={value}): the fraction of {what} to keep must be in (0, 1].{hint}")
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"slim(kinds={tuple(kinds)}): unknown {sorted(unknown)}; kinds are {', '.join(KINDS)}.")
    if widths not in ("global", "uniform", "distance"):
        raise ValueError(f"slim(widths={widths!r}): widths are 'global' or 'uniform'.")
    if min_keep < 1:
        raise ValueError(f"slim(min_keep={min_keep}): every group keeps at least one unit.")
    return budgets


def read_loader(loader: Any) -> list[Any]:
    """Read all calibration batches.

    Raises:
        ValueError: There is none.
    """
    batches = list(loader)
    if not batches or not len(split_batch(batches[0])[0]):
        raise ValueError("slim(loader): the loader is empty. Give at least a few hundred calibration images.")
    return batches


def choose_groups(
    every: Sequence[UnitGroup],
    kinds: Sequence[str],
    names: Sequence[str] | None,
    exclude: Sequence[str],
    approximate: bool,
    min_keep: int,
) -> list[UnitGroup]:
    """Give the groups that may be cut.

    Raises:
        ValueError: A pattern matches nothing, or nothing is left.
    """
    for pattern in [*(names or ()), *exclude]:
        if not any(fnmatchcase(group.name, pattern) for group in every):
            raise ValueError(
                f"the pattern {pattern!r} matches no group. The model has {', '.join(g.name for g in every[:8])} ..."
            )
    chosen = [
        group
        for group in every
        if group.frozen_reason is None
        and (group.exact or approximate)
        and group.kind in kinds
        and group.size > min_keep
        and (names is None or any(fnmatchcase(group.name, pattern) for pattern in names))
        and not any(fnmatchcase(group.name, pattern) for pattern in exclude)
    ]
    if not chosen:
        reasons = (
            "; ".join(f"{g.name}: {g.frozen_reason or 'not chosen'}" for g in every[:3]) or "it has no layer with units"
        )
        raise ValueError(f"the model has no prunable unit ({reasons}). See find_units(model, images) for every group.")
    return chosen


def view(model: nn.Module, module: str, channels: Tensor, moments: dict[str, Moments]) -> TapView:
    """Give what one consumer sees of a group."""
    second = moments[module].matrix()[channels][:, channels]
    return TapView(second, weight_gram(model.get_submodule(module).weight, channels, moments[module].loss_weight))


def cluster(
    chosen: Sequence[UnitGroup],
    merges: dict[str, Merges],
    trace: Trace,
    budgets: dict[str, float],
    widths: str,
    to: float,
) -> tuple[dict[str, list[int]], dict[str, list[int]], Ledger]:
    """Cluster below the budgets: representatives and pruning set of each group, and the ledger at those widths."""
    full = Ledger(trace.cost, budgets)
    full_taken = cluster_down(chosen, merges, full, widths)  # raises where the budget is out of reach
    ledger = Ledger(trace.cost, {name: value * to for name, value in budgets.items()})
    try:
        taken = cluster_down(chosen, merges, ledger, widths) if to < 1 else full_taken
        if to == 1:
            ledger = full
    except ValueError:  # reachable, though not with room to restore
        taken, ledger = full_taken, full
    ledger.budgets = budgets
    pruning_set = {g.name: merges[g.name].order[: taken[g.name]] for g in chosen}
    keep = {g.name: [u for u in range(g.size) if u not in set(pruning_set[g.name])] for g in chosen}
    return keep, pruning_set, ledger


def contribute(
    contribution: Any,
    dense: nn.Module,
    chosen: Sequence[UnitGroup],
    keep: dict[str, list[int]],
    batches: list[Any],
    moments: dict[str, Moments],
    merges: dict[str, Merges],
    steps: int,
    accelerator: Any,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """Give the contribution of each unit, by FCR, by a function, or by the cost of merging it."""
    if callable(contribution):
        return contribution(dense, chosen, keep, batches, moments)
    by_cost = {}
    for group in chosen:
        by_cost[group.name] = torch.full((group.size,), float("inf"), dtype=torch.float64)
        for unit, cost in zip(merges[group.name].order, merges[group.name].cost, strict=True):
            by_cost[group.name][unit] = cost
    if contribution == "cost" or steps == 0:
        return by_cost
    if contribution != "fcr":
        raise ValueError(f"slim(contribution={contribution!r}): pass 'fcr' or a function.")
    return learn_contributions(
        dense, chosen, keep, batches, moments, steps=steps, accelerator=accelerator, progress=advance
    )


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


def recalibrate_if_better(dense: nn.Module, slim_model: nn.Module, batches: list[Any]) -> tuple[nn.Module, bool]:
    """Recalibrate BatchNorm on four fifths of the images; keep it where the others say that it is nearer to dense."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in slim_model.modules()):
        return slim_model, False
    device = next(dense.parameters()).device
    images = [split_batch(batch)[0].to(device) for batch in batches]
    held = images[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or images
    fit = [batch for i, batch in enumerate(images) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    other = recalibrate(slim_model, fit)

    @torch.no_grad()
    def divergence(model: nn.Module) -> float:
        total = 0.0
        for batch in held:
            target = read_logits(dense(batch)).float().log_softmax(-1)
            got = read_logits(model(batch)).float().log_softmax(-1)
            total += float(nn.functional.kl_div(got, target, reduction="sum", log_target=True))
        return total

    return (other, True) if divergence(other) < divergence(slim_model.eval()) else (slim_model, False)
