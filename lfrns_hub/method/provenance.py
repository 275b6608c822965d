"""What a checkpoint and its card say of how a slim model was made, of several rounds too."""

from collections.abc import Sequence
from typing import Any

from lfrns_hub.method.report import SlimReport
from lfrns_hub.model_io.batches import split_batch
from lfrns_hub.units import SlimPlan, UnitGroup


def provenance(
    report: SlimReport,
    plan: SlimPlan,
    chosen: Sequence[UnitGroup],
    preset: str,
    seed: int,
    fcr_steps: int,
    batches: list[Any],
) -> dict[str, Any]:
    """Return what a checkpoint and a card say of how the slim model was made."""
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
    """Return what one round was asked for and gave, as fractions of the model that it began with."""
    fractions = {k: v for k, v in (made.get("report") or {}).items() if k.endswith("_fraction")}
    asked = ("budget", "preset", "seed", "fcr_steps", "calibration_images")
    return {k: made[k] for k in asked if k in made} | fractions
