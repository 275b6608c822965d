"""Trial of one network: trace, slim to three quarters of the MACs, self-check, save, load, compare, train a step."""

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lfrns_hub.checkpoint import load, save
from lfrns_hub.coverage.cases import Case, build
from lfrns_hub.measure import count_macs
from lfrns_hub.method.report import SlimResult
from lfrns_hub.self_check import check, settled_trace
from lfrns_hub.slim import slim
from lfrns_hub.trace import Trace
from lfrns_hub.units import UnitGroup

TARGET = 0.75  # of the MACs
BATCHES, BATCH = 4, 8  # 32 images in total
OPTIONS = {"fcr_steps": 2}  # all others are the defaults
SAME = 1e-5  # of the largest output, float32: the difference allowed after loading
OUTPUT_REASON = "network's output"  # classes are never cut; they are not counted as frozen

Tell = Callable[..., None]


def measure(case: Case, tell: Tell) -> None:
    """Try one network, and report each fact as soon as it is known, so that a process that dies leaves a record.

    Args:
        case: The network.
        tell: Called with facts by name, as in a row.
    Raises:
        ValueError: The network cannot be cut to TARGET, or does not load unchanged.
    """
    tell(step="build")
    torch.manual_seed(0)
    dense, shape = build(case)
    enliven(dense)
    tell(params_m=sum(p.numel() for p in dense.parameters()) / 1e6, input_size=list(shape), step="trace")
    batches = [torch.randn(BATCH, *shape) for _ in range(BATCHES)]
    trace = settled_trace(dense, batches[0][:1])
    trace.cost.complete(count_macs(dense, batches[0][:1]))
    known = describe_groups(trace, trace.groups)
    tell(**known, step="slim")
    try:
        result, approximate = slim_to_target(dense, batches, known["reach"])
    except ValueError:
        if known["reach"]["approximate"] <= TARGET:  # then the self-check froze groups that were counted on
            failed = check(dense, batches[0][:1]).frozen
            tell(**describe_groups(trace, frozen_by_check(trace.groups, failed)))
        raise
    groups = frozen_by_check(trace.groups, result.report.frozen)
    tell(
        **describe_groups(trace, groups),
        slimmed="approximate" if approximate else "exact",
        macs_fraction=result.report.macs_fraction,
        check_error=result.report.check["largest_error"] if any(is_free(g) and g.exact for g in groups) else None,
        step="save and load",
    )
    difference = reload_difference(case, dense, result.model, batches[0])
    tell(reload_difference=difference, step="train")
    if not difference <= SAME:
        raise ValueError(f"after loading the output differs by {difference:.1e} of the largest; at most {SAME:g} may.")
    train_once(result.model, batches[0])
    tell(step="done")


def enliven(model: nn.Module) -> None:
    """Randomise parameters and norm statistics with constant values: zeros and ones hide errors."""
    statistics = {name: b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    with torch.no_grad():
        for tensor in (dict(model.named_parameters()) | statistics).values():
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                noise = torch.rand_like(tensor)
                tensor.copy_(tensor * (noise + 0.5) if bool(tensor.flatten()[0]) else (noise - 0.5) * 0.2)


def is_free(group: UnitGroup) -> bool:
    """Return whether a group has units that may be removed."""
    return group.frozen_reason is None and group.size > 1


def frozen_by_check(groups: Sequence[UnitGroup], frozen: dict[str, str]) -> list[UnitGroup]:
    """Return the groups with those that the self-check froze."""
    return [replace(g, frozen_reason=g.frozen_reason or frozen.get(g.name)) for g in groups]


def describe_groups(trace: Trace, groups: Sequence[UnitGroup]) -> dict[str, Any]:
    """Return counts of groups and units by state and kind, the smallest reachable MACs, and the main frozen reasons."""
    counts: dict[str, dict[str, list[int]]] = {"exact": {}, "approximate": {}, "frozen": {}}
    reasons: dict[str, dict[str, Any]] = {}
    for group in groups:
        if OUTPUT_REASON in (group.frozen_reason or ""):
            continue
        state = "frozen" if not is_free(group) else "exact" if group.exact else "approximate"
        count = counts[state].setdefault(group.kind, [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + group.size
        if state == "frozen":
            why = group.frozen_reason or "only one unit"
            same = reasons.setdefault(
                re.sub(r"\d+", "*", f"{group.kind}: {why}"),
                {"kind": group.kind, "reason": shorten(why), "first": group.name, "groups": 0, "units": 0},
            )
            same["groups"], same["units"] = same["groups"] + 1, same["units"] + group.size
    dense = trace.cost.macs({})

    def smallest(free: Sequence[UnitGroup]) -> float:
        return trace.cost.macs({g.name: g.size - 1 for g in free}) / dense if dense else 1.0

    free = [g for g in groups if is_free(g)]
    return {
        "groups": counts,
        "reach": {"exact": smallest([g for g in free if g.exact]), "approximate": smallest(free)},
        "frozen": sorted(reasons.values(), key=lambda r: -r["units"])[:5],
    }


def slim_to_target(dense: nn.Module, batches: list[Tensor], reach: dict[str, float]) -> tuple[SlimResult, bool]:
    """Slim only by exact groups if they suffice, else with approximate ones too; return which."""
    ways = [approximate for approximate, key in ((False, "exact"), (True, "approximate")) if reach[key] <= TARGET]
    if not ways:
        raise ValueError(
            f"cannot be cut to {TARGET} of its MACs: without its frozen units it keeps {reach['approximate']:.2f}."
        )
    for approximate in ways:
        try:
            return slim(dense, batches, macs=TARGET, approximate=approximate, progress=False, **OPTIONS), approximate
        except ValueError as error:  # the self-check may have frozen groups that the trace counted on
            last = error
    raise last


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return every floating-point tensor of a model's output in any form."""
    tensors = [t for t in tree_leaves(model(images)) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors or not all(bool(t.isfinite().all()) for t in tensors):
        raise ValueError("the slim model's answer holds no numbers, or infinite ones.")
    return tensors


def reload_difference(case: Case, dense: nn.Module, slim_model: nn.Module, images: Tensor) -> float:
    """Save and load; return the largest difference of the outputs, over the largest output."""
    own = case.kind == "function"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slim"
        save(slim_model, path, base=dense if own else None, base_args=case.args if case.kind == "timm" else None)
        loaded = load(path, model=build(case)[0] if own else None)
    with torch.no_grad():
        pairs = list(zip(outputs(slim_model.eval(), images), outputs(loaded, images), strict=True))
    largest = max(float(one.abs().max()) for one, _ in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs) / max(largest, 1e-30)


def train_once(model: nn.Module, images: Tensor) -> None:
    """Run a training-mode forward and backward pass of the slim model."""
    model.train().requires_grad_(True)
    sum(tensor.square().mean() for tensor in outputs(model, images)).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads or not all(bool(grad.isfinite().all()) for grad in grads):
        raise ValueError("the slim model does not train: no gradients, or infinite ones.")


def shorten(text: str, limit: int = 300) -> str:
    """Return a message in one line without the folders of this machine."""
    text = re.sub(r"[^\s`'\"(]*/(?=(site-packages|lfrns_hub)/)", "", " ".join(text.split())).replace(
        "site-packages/", ""
    )
    return text if len(text) <= limit else text[: limit - 3] + "..."
