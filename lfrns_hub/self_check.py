"""The self-check: slim equals dense with the removed units zeroed at their taps, or the group is frozen by name."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lfrns_hub.batches import read_logits
from lfrns_hub.narrow import meta_copy
from lfrns_hub.running import default_dtype, same_draw
from lfrns_hub.surgery import cut, masked
from lfrns_hub.units import SlimPlan, UnitGroup

TOLERANCE = 1e-8  # of the largest output, in float64
REMOVED_SHARE = 0.4


@dataclass
class CheckReport:
    """What the self-check found.

    Attributes:
        largest_error: Largest |slim - masked dense| over the largest output; at most 1e-8 by construction.
        moved: Largest change of an output by the masking, over the largest output.
        checked: Names of the groups that passed.
        frozen: Group name to the reason, for those that did not.
    """

    largest_error: float = 0.0
    moved: float = 0.0
    checked: list[str] = field(default_factory=list)
    frozen: dict[str, str] = field(default_factory=dict)


def randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Copy a model to float64 with norms, gates and layer scales randomised: fresh ones hide errors."""
    copied = copy.deepcopy(model).double().eval().requires_grad_(True)
    for name, tensor in list(copied.named_parameters()) + list(copied.named_buffers()):
        if not tensor.is_floating_point():
            continue
        positive = name.endswith(("running_var", "weight")) and tensor.ndim == 1
        if tensor.ndim <= 1 or "gamma" in name or "lambda" in name:
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(values + 0.5 if positive or "gamma" in name or "lambda" in name else values - 0.5)
        elif not bool(tensor.any()):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.1)
    return copied


def random_plan(groups: Sequence[UnitGroup], generator: torch.Generator) -> SlimPlan:
    """Remove at least two fifths of every group, always at least one unit and never all."""
    keep = {}
    for group in groups:
        gone = min(group.size - 1, max(1, -int(-group.size * REMOVED_SHARE // 1)))
        order = torch.randperm(group.size, generator=generator)[gone:]
        keep[group.name] = sorted(order.tolist())
    return SlimPlan(keep)


def answer(model: nn.Module, images: Tensor) -> Tensor:
    """Run a float64 model; what it draws is the same each time, and what it makes in forward is float64 too."""
    with same_draw(), default_dtype(torch.float64):
        return read_logits(model(images.clone()))  # a forward may write to its input


def compare(
    model: nn.Module, groups: Sequence[UnitGroup], plan: SlimPlan, images: Tensor, dense: Tensor
) -> tuple[float, float]:
    """Give the error of the cut and the change by the masking, both over the largest output."""
    slim = cut(model, groups, plan)
    with torch.no_grad():
        with masked(model, groups, plan):
            expected = answer(model, images)
        got = answer(slim, images)
    largest = float(expected.abs().max().clamp(min=1e-30))
    error = float((got - expected).abs().max()) / largest if got.shape == expected.shape else float("inf")
    return error, float((dense - expected).abs().max()) / largest


def runs(model: nn.Module, groups: Sequence[UnitGroup], some: Sequence[UnitGroup], images: Tensor) -> str | None:
    """Run the cut copy of a model on the meta device: why its forward cannot narrow, or None."""
    keep = {group.name: list(range(group.size - max(1, group.size // 3))) for group in some}
    try:
        with torch.no_grad():
            read_logits(cut(model, groups, SlimPlan(keep))(images))
    except Exception as failure:  # a forward that cannot narrow may fail in any way
        return f"its forward cannot narrow ({(str(failure).splitlines() or [type(failure).__name__])[0][:160]})"
    return None


def variants(group: UnitGroup) -> list[UnitGroup]:
    """Give a group with fewer of the attributes that follow it: one of equal value may be a coincidence."""
    fewer = [replace(group, widths=tuple(w for w in group.widths if w is not one)) for one in group.widths]
    single = [replace(group, widths=(one,)) for one in group.widths] if len(group.widths) > 2 else []
    return [*fewer, *single, replace(group, widths=())] if group.widths else []


def narrowing(model: nn.Module, groups: Sequence[UnitGroup], example_input: Tensor) -> list[UnitGroup]:
    """Freeze the groups whose units the forward cannot lose, by running cut copies on the meta device.

    Args:
        model: The network, or its copy on the meta device; untouched.
        groups: Its groups, approximate ones too.
        example_input: Images [N, C, H, W]; only the shape is used.
    Returns:
        The groups, some frozen with the reason, some with fewer attributes to follow.
    """
    network = meta_copy(model).eval()
    images = torch.empty(2, *example_input.shape[1:], device="meta", dtype=example_input.dtype)
    found = {group.name: group for group in groups}
    if runs(network, groups, [], images) is not None:  # its forward reads values, which the meta device has none of
        if any(parameter.is_meta for parameter in model.parameters()):
            return list(groups)
        network, images = copy.deepcopy(model).cpu().eval(), torch.zeros(images.shape, dtype=images.dtype)

    def try_one(group: UnitGroup) -> UnitGroup:
        why = runs(network, groups, [group], images)
        if why is None:
            return group
        for variant in variants(group):
            if runs(network, [variant if g.name == variant.name else g for g in groups], [variant], images) is None:
                return variant
        return replace(group, frozen_reason=why)

    def settle(some: list[UnitGroup]) -> None:
        if not some or runs(network, groups, some, images) is None:
            return
        first, last = try_one(some[0]), try_one(some[-1])
        found.update({first.name: first, last.name: last})
        reasons = {without_numbers(group.frozen_reason) for group in (first, last)}
        rest = some[1:-1]
        if len(reasons) == 1 and None not in reasons:  # one class, one reason: its forward is to blame
            found.update((group.name, replace(group, frozen_reason=first.frozen_reason)) for group in rest)
        elif reasons == {None}:
            for group in rest:
                found[group.name] = try_one(group)
        else:
            settle(rest[: len(rest) // 2])
            settle(rest[len(rest) // 2 :])

    free = [group for group in groups if group.frozen_reason is None]
    for alike in by_class(network, free):
        settle(alike)
    settled = [found[group.name] for group in groups]
    alive = [group for group in settled if group.frozen_reason is None]
    if alive and (why := runs(network, settled, alive, images)):  # each passes alone, together they do not
        exact = [group for group in alive if group.exact]
        mixed = {g.name for g in alive if not g.exact}
        if runs(network, settled, exact, images) is None:
            settled = [replace(g, frozen_reason=why) if g.name in mixed else g for g in settled]
    return settled


def by_class(model: nn.Module, groups: Sequence[UnitGroup]) -> list[list[UnitGroup]]:
    """Put groups of one kind whose consumers belong to modules of one class together."""
    classes: dict[tuple[str, ...], list[UnitGroup]] = {}
    for group in groups:
        owner = group.taps[0].module.rpartition(".")[0]
        maker = group.slices[0].tensor.rpartition(".")[0].rpartition(".")[0]
        key = (group.kind, *(type(model.get_submodule(name)).__qualname__ for name in (maker, owner)))
        classes.setdefault(key, []).append(group)
    return list(classes.values())


def without_numbers(reason: str | None) -> str | None:
    """Give a reason without its sizes."""
    return re.sub(r"\d+", "#", reason) if reason else None


def self_check(
    model: nn.Module, groups: Sequence[UnitGroup], example_input: Tensor, seed: int = 0
) -> tuple[list[UnitGroup], CheckReport]:
    """Cut two fifths of every exact group of a randomised float64 copy and compare with masking.

    Args:
        model: The network; untouched.
        groups: Its groups.
        example_input: Images [N, C, H, W]; only the shape is used.
        seed: Of the random values.
    Returns:
        The groups, those that failed frozen with the reason, and the report.
    """
    generator = torch.Generator().manual_seed(seed)
    report = CheckReport()
    narrow = narrowing(model, groups, example_input)
    for before, after in zip(groups, narrow, strict=True):
        if after.frozen_reason != before.frozen_reason:
            report.frozen[after.name] = after.frozen_reason
    copied = randomised(model, generator).cpu()
    images = torch.randn(2, *example_input.shape[1:], generator=generator, dtype=torch.float64)
    open_groups = [g for g in narrow if g.frozen_reason is None and g.exact]
    with torch.no_grad():
        dense = answer(copied, images) if open_groups else None

    pending = [open_groups] if open_groups else []
    while pending:
        some = pending.pop()
        plan = random_plan(some, generator)
        try:
            error, moved = compare(copied, narrow, plan, images, dense)
            why = f"slim differs from masked dense by {error:.1e} of the largest output"
        except Exception as failure:  # a forward that cannot narrow may fail in any way
            error, moved = float("inf"), 0.0
            why = f"its forward cannot narrow ({(str(failure).splitlines() or [type(failure).__name__])[0][:160]})"
        if error <= TOLERANCE:
            report.largest_error = max(report.largest_error, error)
            report.moved = max(report.moved, moved)
            report.checked.extend(g.name for g in some)
        elif len(some) == 1:
            report.frozen[some[0].name] = f"the self-check failed: {why}"
        else:
            pending += [some[len(some) // 2 :], some[: len(some) // 2]]
    passed = [replace(g, frozen_reason=report.frozen[g.name]) if g.name in report.frozen else g for g in narrow]
    alive = [g for g in passed if g.frozen_reason is None and g.exact]
    untrainable = training_faults(model, alive, images.to(example_input.dtype), generator)
    report.frozen.update(untrainable)
    report.checked = [name for name in report.checked if name not in untrainable]
    passed = [replace(g, frozen_reason=untrainable.get(g.name, g.frozen_reason)) for g in passed]
    return passed, report


def training_faults(
    model: nn.Module, groups: Sequence[UnitGroup], images: Tensor, generator: torch.Generator
) -> dict[str, str]:
    """Run cut copies forward and backward in training mode, where the dense model itself can be: the groups at fault.

    Args:
        model: The network; untouched.
        groups: Those that may be cut.
        images: [2, C, H, W].
        generator: Of the random plans.
    Returns:
        Group name to the reason, of those whose units a branch of training reads at their full number.
    """
    if not groups or not images.is_floating_point():
        return {}
    network, images = meta_copy(model).requires_grad_(True), images.to("meta")  # without memory
    if why_no_training(network, [], SlimPlan(), images):  # a forward that reads values
        network = copy.deepcopy(model).cpu().requires_grad_(True)
        images = torch.rand(images.shape, generator=generator).to(images.dtype)
        if why_no_training(network, [], SlimPlan(), images):
            return {}
    faults, pending = {}, [list(groups)]
    while pending:
        some = pending.pop()
        failure = why_no_training(network, groups, random_plan(some, generator), images)
        if failure and len(some) == 1:
            faults[some[0].name] = f"its forward in training mode cannot narrow ({failure})"
        elif failure:
            pending += [some[len(some) // 2 :], some[: len(some) // 2]]
    return faults


def why_no_training(model: nn.Module, groups: Sequence[UnitGroup], plan: SlimPlan, images: Tensor) -> str | None:
    """Run a training-mode forward and backward of a cut copy: why it fails, or None."""
    try:
        slim = cut(model, groups, plan).train()
        with torch.enable_grad(), same_draw():
            read_logits(slim(torch.cat([images, images.flip(0)]))).square().mean().backward()
    except Exception as failure:  # a forward that cannot narrow may fail in any way
        return (str(failure).splitlines() or [type(failure).__name__])[0][:160]
    return None
