"""Provenance: how a slim model was made, in one or several rounds, for its checkpoint and card."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypedDict, get_origin, get_type_hints

from torch import nn

from lfrns_hub.format.untrusted import AGAIN, short
from lfrns_hub.method.report import SlimReport
from lfrns_hub.model_io.batches import split_batch
from lfrns_hub.units import SlimPlan, UnitGroup

MAX_GROUPS = 4096  # unit groups: the largest models of timm have a few hundred


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is_width(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and 0 <= n < 1 << 32 for n in pair)


def _are_indices(kept: Any) -> bool:
    return isinstance(kept, list) and all(type(index) is int for index in kept)


def _is_figure(figure: Any) -> bool:
    parts = figure.values() if isinstance(figure, dict) else [figure]
    return all(part is None or _is_number(part) for part in parts)


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda given: isinstance(given, dict) and len(given) <= MAX_GROUPS and all(map(fits, given.values()))


class Provenance(TypedDict, total=False):
    """How a slim model was made: its `lfrns_provenance`, and `slim` in its config.json.

    A plain dict in the order of the file; any field may be missing and there may be others. Fields that a card needs
    are annotated with the required type, in words and as a test.

    Attributes:
        widths, kinds, plan: Kept and dense units, kind, and indices of the kept units, by group.
        budget: Fraction of the dense model's cost asked for, by name.
        report: Fractions reached and numbers of units; the integrity of each group.
        approximate: Groups that are not exact.
        calibration_images, fcr_steps, preset, seed, latency_setup: Arguments of `slim`.
        rounds: Budget and result of each round, if there were several.
        output: Meaning of the model's outputs: a word, or one per head.
        base_model, license, license_name, license_link: Facts of the published weights (see `lineage.base_facts`).
    """

    widths: Annotated[dict[str, list[int]], "[kept, dense] by group", _each(_is_width)]
    kinds: Annotated[dict[str, str], "a kind by group", _each(lambda kind: isinstance(kind, str))]
    plan: Annotated[dict[str, list[int]], "indices by group", _each(_are_indices)]
    budget: Annotated[dict[str, float], "a number by name", _each(_is_number)]
    report: Annotated[dict[str, Any], "figures by name", _each(_is_figure)]
    approximate: Annotated[
        list[str], "a list of groups", lambda names: isinstance(names, list) and len(names) <= MAX_GROUPS
    ]
    calibration_images: Annotated[int, "a number", _is_number]
    fcr_steps: Annotated[int, "a number", _is_number]
    preset: str
    seed: int
    latency_setup: dict[str, Any]
    rounds: list[dict[str, Any]]
    output: str | dict[str, str]
    base_model: str
    license: str
    license_name: str
    license_link: str


def provenance_of(model: nn.Module) -> Provenance:
    """Return the provenance of a model; empty for a dense one."""
    return getattr(model, "lfrns_provenance", None) or {}


def check_provenance(facts: dict[str, Any], call: str) -> None:
    """Refuse a provenance from a file if the card could not be written from it.

    Args:
        facts: `slim` of a config.json, from an untrusted source.
        call: The user's call, for the error.
    Raises:
        ValueError: A field has another type than a card needs, or more groups than any model has.
    """
    for key, kind in get_type_hints(Provenance, include_extras=True).items():
        if get_origin(kind) is Annotated and facts.get(key) is not None:
            needed, fits = kind.__metadata__
            if not fits(facts[key]):
                raise ValueError(
                    f"{call}: config.json has slim.{key} = {short(facts[key])}: {needed} is needed, of {MAX_GROUPS} "
                    f"groups at most. {AGAIN}"
                )


def describe_round(
    report: SlimReport,
    plan: SlimPlan,
    chosen: Sequence[UnitGroup],
    preset: str,
    seed: int,
    fcr_steps: int,
    batches: list[Any],
) -> Provenance:
    """Return the provenance of one call of `slim`."""
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


def add_round(before: Provenance, made: Provenance) -> Provenance:
    """Merge the provenance of earlier rounds with that of this round.

    Plan, widths, budget and fractions are then relative to the first dense model; `rounds` has each round unchanged.

    Args:
        before: The provenance of the model that was slimmed, empty for a dense one.
        made: The provenance of this round.

    Example:
        >>> first = {"plan": {"a": [1, 3, 4]}, "widths": {"a": [3, 6]}, "budget": {"macs": 0.5}}
        >>> again = add_round(first, {"plan": {"a": [0, 2]}, "widths": {"a": [2, 3]}, "budget": {"params": 0.5}})
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
        if name != "latency" or "latency_fraction" in was:  # else the first model's latency is not known
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


def _round(made: Provenance) -> dict[str, Any]:
    """Return the options and results of one round, as fractions of the model that it started from."""
    fractions = {k: v for k, v in (made.get("report") or {}).items() if k.endswith("_fraction")}
    asked = ("budget", "preset", "seed", "fcr_steps", "calibration_images")
    return {k: made[k] for k in asked if k in made} | fractions
