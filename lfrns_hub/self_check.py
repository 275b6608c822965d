"""The self-check: slim equals dense with the removed units zeroed at their taps, or the group is frozen by name.

It runs twice. First every group is tested with a random plan, before any image is used. Then the plan that is cut is
proved: a forward that depends on the width itself, such as a shift of an eighth of the channels, may pass a random
plan by chance.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.format.narrow import meta_copy, model_copy
from lfrns_hub.model_io.batches import flatten_output, read_tensors
from lfrns_hub.model_io.hooks import hooked
from lfrns_hub.model_io.model import (
    as_input,
    in_double,
    refuse_meta,
    same_draw,
    unwrap,
)
from lfrns_hub.options import check_example
from lfrns_hub.surgery import cut, masked
from lfrns_hub.trace import Trace, trace_model
from lfrns_hub.trace.divisions import clusters, ways
from lfrns_hub.trace.programs import cpu_copy
from lfrns_hub.units import SlimPlan, UnitGroup, forget

TOLERANCE = 1e-8  # of the largest output, in float64
REMOVED_SHARES = (0.3, 0.7)  # of a group's units: drawn between them, separately for each group

Fault = Callable[[Sequence[UnitGroup]], str | None]


@dataclass
class CheckReport:
    """Results of the self-check.

    Attributes:
        largest_error: Largest |slim - masked dense| over the largest output; at most 1e-8 by construction.
        moved: Largest change of an output by the masking, over the largest output.
        checked: Names of the groups that passed.
        frozen: Group name to the reason, for the groups that failed.
    """

    largest_error: float = 0.0
    moved: float = 0.0
    checked: list[str] = field(default_factory=list)
    frozen: dict[str, str] = field(default_factory=dict)


class Proof:
    """A randomised float64 copy of a network on the CPU, on which plans are proved: the cut copy equals the masked one.

    Attributes:
        model: The copy, in eval mode.
        groups: All groups of the network.
        images: Noise, [2, C, H, W].
    """

    def __init__(self, model: nn.Module, groups: Sequence[UnitGroup], example_input: Tensor, seed: int = 0):
        """Copy a network.

        Args:
            model: The network; untouched.
            groups: All of its groups.
            example_input: Images [N, C, H, W]; only the shape is used, and whether the dtype is floating-point.
            seed: Seed of the random values.
        """
        self.generator = torch.Generator().manual_seed(seed)
        self.groups = list(groups)
        caches = [cache for group in groups for cache in group.caches]
        self.model = forget(randomised(model, self.generator), caches)
        shape = (2, *example_input.shape[1:])
        if example_input.is_floating_point():
            self.images = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        else:
            self.images = torch.randint(2, shape, generator=self.generator).to(example_input.dtype)
        with waking(self.model):
            self._answer(self.model)
        forget(self.model, caches)  # computed from the old weights
        self._dense: Tensor | None = None
        self._passed = 0.0, 0.0  # error and change of the plan that passed last

    def fault(self, plan: SlimPlan) -> str | None:
        """Return what is wrong with a plan, or None.

        Args:
            plan: What stays; it must not cut approximate groups.
        """
        try:
            error, moved = self._compare(plan)
        except Exception as failure:  # a forward that cannot narrow may fail in any way
            return f"its forward cannot narrow ({first_line(failure)})"
        if error <= TOLERANCE:
            self._passed = error, moved
            return None
        return f"slim differs from masked dense by {error:.1e} of the largest output"

    def refuted(self, plan: SlimPlan, report: CheckReport) -> dict[str, str]:
        """Return the exact groups that a plan cuts and must leave whole, each with the reason.

        Args:
            plan: What stays; approximate groups are tested uncut.
            report: Updated with the errors of the groups that passed.
        """
        cutting = [group for group in self.groups if group.exact and plan.removed(group)]

        def fault(some: Sequence[UnitGroup]) -> str | None:
            return self.fault(SlimPlan({group.name: plan.keep[group.name] for group in some})) if some else None

        refuted = culprits(cutting, fault)
        if len(refuted) < len(cutting):  # the plan that passed last has all remaining groups
            error, moved = self._passed
            report.largest_error, report.moved = max(report.largest_error, error), max(report.moved, moved)
        return {name: f"the self-check failed: {why}" for name, why in refuted.items()}

    def _compare(self, plan: SlimPlan) -> tuple[float, float]:
        """Return the error of the cut and the change by the masking, both divided by the largest output."""
        if self._dense is None:
            self._dense = self._answer(self.model)
        with masked(self.model, self.groups, plan):
            expected = self._answer(self.model)
        got = self._answer(cut(self.model, self.groups, plan))
        largest = float(expected.abs().max().clamp(min=1e-30))
        if got.shape != expected.shape or not bool(expected.isfinite().all()):
            return float("inf"), 0.0
        return float((got - expected).abs().max()) / largest, float((self._dense - expected).abs().max()) / largest

    @torch.no_grad()
    def _answer(self, model: nn.Module) -> Tensor:
        """Return all outputs of a network: same random draws at each call, tensors created and cast in float64."""
        with same_draw(), in_double():
            return flatten_output(model(self.images.clone()))  # a forward may write to its input


def culprits(groups: Sequence[UnitGroup], fault: Fault) -> dict[str, str]:
    """Find the groups that must be left out so that all others pass together.

    Groups are added to those that pass, more at each step, until a fault appears; then the last addition is
    bisected. This costs one trial where all pass, and a few for each group that fails.

    Args:
        groups: Groups to try.
        fault: Returns what is wrong with some groups taken together, or None; returns None for no groups.
    Returns:
        Group name to the fault that appeared when it was added.
    """
    found: dict[str, str] = {}
    passing: list[UnitGroup] = []
    left = list(groups)
    while left and (why := fault(passing + left)):
        low, high = 0, len(left)  # the first `low` pass, the first `high` do not
        step = 1
        while step < high:
            if now := fault(passing + left[:step]):
                high, why = step, now
            else:
                low, step = step, 2 * step
        while high - low > 1:
            middle = (low + high) // 2
            if now := fault(passing + left[:middle]):
                high, why = middle, now
            else:
                low = middle
        found[left[low].name] = why
        passing, left = passing + left[:low], left[high:]
    return found


def randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Copy a model to float64 on the CPU with norms, gates and layer scales randomised: fresh values hide errors."""
    copied = model_copy(cpu_copy(model)).double().eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())  # integers have no gradient
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


@contextmanager
def waking(model: nn.Module) -> Iterator[None]:
    """Scale each channel of a layer's output to its own mean and spread, by the layer's own weight and bias.

    A unit that is zero on all images, as every fifth unit is after a ReLU with random weights, hides its errors. So do
    units with similar outputs: if two rows are normalised to one mean and spread, as after a global pool, only signs
    differ.
    """
    generator = torch.Generator().manual_seed(0)
    seen: set[nn.Module] = set()

    def wake(layer: nn.Module, _inputs: Any, output: Any) -> Tensor | None:
        weight = layer._parameters.get("weight")
        if layer in seen or not isinstance(weight, nn.Parameter):  # a computed one stays
            return None
        axis = 1 - weight.ndim  # with or without an axis of images
        if not isinstance(output, Tensor) or output.ndim < -axis or output.shape[axis] != len(weight):
            return None  # a custom class may return something else
        rows = output.movedim(axis, -1).reshape(-1, len(weight))
        if not len(rows):
            return None
        seen.add(layer)
        spread, offset = torch.rand(2, len(weight), generator=generator, dtype=torch.float64).to(rows)
        std, mean = torch.std_mean(rows, 0, correction=0)
        scale = torch.where(std > 1e-9 * rows.abs().amax(0), (0.5 + spread) / std, 1)
        shift = 0.5 * offset - mean * scale if layer.bias is not None else torch.zeros_like(mean)
        weight.mul_(scale.view(-1, *[1] * (weight.ndim - 1)))
        if layer.bias is not None:
            layer.bias.mul_(scale).add_(shift)
        return (output.movedim(axis, -1) * scale + shift).movedim(-1, axis)

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    with hooked(outputs=[(module, wake) for module in model.modules() if isinstance(module, layers)]):
        yield


def random_plan(groups: Sequence[UnitGroup], generator: torch.Generator) -> SlimPlan:
    """Remove a random share of the units of every group, at least one unit and never all."""
    keep = {}
    least, most = REMOVED_SHARES
    for group in groups:
        share = least + (most - least) * float(torch.rand((), generator=generator))
        gone = min(group.size - 1, max(1, -int(-group.size * share // 1)))
        order = torch.randperm(group.size, generator=generator)[gone:]
        keep[group.name] = sorted(order.tolist())
    return SlimPlan(keep)


def first_line(failure: Exception) -> str:
    """Return the first line of an error message, truncated, or the error's class where the message is empty."""
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:160]


def settled_trace(model: nn.Module, example_input: Tensor) -> Trace:
    """Trace a model and settle how groups whose channels the forward divides itself may lose units.

    Args:
        model: The network; untouched.
        example_input: Images [N, C, H, W]; only the shape is used.
    """
    trace = trace_model(model, example_input)
    groups = settle(model, trace.groups, trace.divisions, example_input)
    if groups is not trace.groups:
        trace.regroup(groups)
    return trace


def settle(
    model: nn.Module, groups: list[UnitGroup], divisions: Sequence[list], example_input: Tensor
) -> list[UnitGroup]:
    """Test which units the groups that a forward divides may lose: any; some of every part; those of one part only.

    Args:
        model: The network; nothing is tested where its weights have no values.
        groups: Its groups.
        divisions: The divisions that the trace found.
        example_input: Images [N, C, H, W]; only the shape is used.
    Returns:
        The groups; unchanged where no way passes, and the self-check then freezes them.
    """
    linked = list(clusters(groups, divisions))
    if not linked or any(tensor.is_meta for tensor in model.parameters()):
        return groups
    proof = Proof(model, groups, example_input)

    def right(some: Sequence[UnitGroup], plans: Sequence[SlimPlan]) -> bool:
        names = {name for part in parts for name, _ in part}
        proof.groups = [group for group in groups if group.name not in names] + list(some)
        return all(proof.fault(plan) is None for plan in plans)

    for parts in linked:
        names = {name for part in parts for name, _ in part}
        own = [group for group in groups if group.name in names]
        if right(own, [lopsided(own, part) for part in (parts[0], parts[-1])]):
            continue
        for way in ways(own, parts):
            free = [group for group in way if group.frozen_reason is None]
            least = SlimPlan({group.name: list(range(1, group.size)) for group in free})
            if right(way, [least, random_plan(free, proof.generator), random_plan(free, proof.generator)]):
                place = groups.index(own[0])
                groups = [group for group in groups if group.name not in names]
                groups[place:place] = way
                break
    return groups


def lopsided(groups: Sequence[UnitGroup], part: Sequence[tuple[str, int]]) -> SlimPlan:
    """Remove half of the units of one part, at least one, and none of the others; every group keeps one."""
    gone = set(part[: max(1, len(part) // 2)])
    keep = {group.name: [u for u in range(group.size) if (group.name, u) not in gone] or [0] for group in groups}
    return SlimPlan(keep)


def runs(model: nn.Module, groups: Sequence[UnitGroup], some: Sequence[UnitGroup], images: Tensor) -> str | None:
    """Run the cut copy of a model on the meta device; return why its forward cannot narrow, or None."""
    keep = {group.name: list(range(group.size - max(1, group.size // 3))) for group in some}
    try:
        with torch.no_grad():
            flatten_output(cut(model, groups, SlimPlan(keep))(images))
    except Exception as failure:  # a forward that cannot narrow may fail in any way
        return f"its forward cannot narrow ({first_line(failure)})"
    return None


def variants(group: UnitGroup) -> list[UnitGroup]:
    """Return a group with fewer of the attributes that follow its width: an equal value may be a coincidence."""
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
    if runs(network, groups, [], images) is not None:  # its forward reads values, which the meta device does not have
        if any(parameter.is_meta for parameter in model.parameters()):
            return list(groups)
        network, images = cpu_copy(model).eval(), torch.zeros(images.shape, dtype=images.dtype)

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
        if len(reasons) == 1 and None not in reasons:  # one class, one reason: its forward is the cause
            found.update((group.name, replace(group, frozen_reason=first.frozen_reason)) for group in rest)
        else:
            settle(rest[: len(rest) // 2])
            settle(rest[len(rest) // 2 :])

    free = [group for group in groups if group.frozen_reason is None]
    if runs(network, groups, free, images) is None:
        return list(groups)
    for alike in by_class(network, free):
        settle(alike)
    settled = [found[group.name] for group in groups]
    alive = [group for group in settled if group.frozen_reason is None]
    if alive and (why := runs(network, settled, alive, images)):  # each passes by itself, together they fail
        exact = [group for group in alive if group.exact]
        mixed = {g.name for g in alive if not g.exact}
        if runs(network, settled, exact, images) is None:
            settled = [replace(g, frozen_reason=why) if g.name in mixed else g for g in settled]
    return settled


def by_class(model: nn.Module, groups: Sequence[UnitGroup]) -> list[list[UnitGroup]]:
    """Group together the groups of one kind whose consumers belong to modules of one class."""
    classes: dict[tuple[str, ...], list[UnitGroup]] = {}
    for group in groups:
        owner = group.taps[0].module.rpartition(".")[0]
        maker = group.slices[0].tensor.rpartition(".")[0].rpartition(".")[0]
        key = (group.kind, *(type(model.get_submodule(name)).__qualname__ for name in (maker, owner)))
        classes.setdefault(key, []).append(group)
    return list(classes.values())


def without_numbers(reason: str | None) -> str | None:
    """Return a reason without its sizes."""
    return re.sub(r"\d+", "#", reason) if reason else None


def self_check(
    model: nn.Module, groups: Sequence[UnitGroup], example_input: Tensor, seed: int = 0
) -> tuple[list[UnitGroup], CheckReport]:
    """Cut a random plan from a randomised float64 copy, compare with masking, then run one training step.

    Args:
        model: The network; untouched.
        groups: Its groups.
        example_input: Images [N, C, H, W]; only the shape is used.
        seed: Seed of the random values.
    Returns:
        The groups, with those that failed frozen with the reason, and the report.
    """
    report = CheckReport()
    narrow = narrowing(model, groups, example_input)
    for before, after in zip(groups, narrow, strict=True):
        if after.frozen_reason != before.frozen_reason:
            report.frozen[after.name] = after.frozen_reason
    alive = [g for g in narrow if g.frozen_reason is None and g.exact and g.size > 1]
    if alive:
        proof = Proof(model, narrow, example_input, seed)
        plan = random_plan(alive, proof.generator)
        report.frozen |= proof.refuted(plan, report)
        alive = [group for group in alive if group.name not in report.frozen]
        report.frozen |= untrainable(proof, alive, plan, example_input)
        report.checked = [group.name for group in alive if group.name not in report.frozen]
    return [replace(g, frozen_reason=report.frozen.get(g.name, g.frozen_reason)) for g in narrow], report


def untrainable(proof: Proof, groups: Sequence[UnitGroup], plan: SlimPlan, example_input: Tensor) -> dict[str, str]:
    """Find the groups to leave out so that a training-mode forward and backward runs: some branches are in no graph.

    No group is blamed where the dense network itself fails in training mode.
    """

    def fault(network: nn.Module, images: Tensor, some: Sequence[UnitGroup]) -> str | None:
        try:
            kept = SlimPlan({group.name: plan.keep[group.name] for group in some})
            train_once(cut(network, groups, kept), images)
        except Exception as failure:  # as above
            return f"its forward in training mode cannot narrow ({first_line(failure)})"
        return None

    # On the meta device first, which needs no memory, where the forward reads no values.
    on_meta = meta_copy(proof.model), proof.images.to("meta")
    for network, images in (on_meta, (proof.model, proof.images)):
        if fault(network, images, []) is None:
            return culprits(groups, lambda some, network=network, images=images: fault(network, images, some))
    return {}


def train_once(model: nn.Module, images: Tensor) -> None:
    """Run a training-mode forward and backward pass; the model is changed."""
    model.train()
    with torch.enable_grad(), same_draw(), in_double():
        answers = read_tensors(model(torch.cat([images, images.flip(0)])))
        sum(answer.square().mean() for answer in answers).backward()


def find_units(model: nn.Module, example_input: Tensor) -> list[UnitGroup]:
    """Find all groups of units of a model, frozen ones with the reason.

    Args:
        model: Any image network that torch.export runs, with any outputs; untouched. Its weights may be on the meta
            device; values are used to find how a forward that divides channels itself may narrow.
            Wrappers of torch.compile and DDP are removed.
        example_input: Images [N, C, H, W]; only the shape is used, and whether the dtype is floating-point.
    Returns:
        Groups in the order of the network, named as in the plain module.
    Raises:
        TypeError: `model` is not a module.
        ValueError: The model cannot be exported on such images.

    Example:
        >>> groups = lfrns.find_units(timm.create_model("test_vit"), torch.zeros(1, 3, 160, 160))
        >>> [(group.name, group.kind, group.size) for group in groups[1:3]]
        [('blocks.0.attn', 'head', 2), ('blocks.0.mlp.fc1', 'neuron', 192)]
    """
    return survey(model, example_input)[0]


def survey(model: nn.Module, example_input: Tensor) -> tuple[list[UnitGroup], dict[str, float]]:
    """Find all groups, as `find_units` does, and the share of the model's MACs in layers that make or read each group.

    Args:
        model, example_input: As for `find_units`.
    Returns:
        The groups, and by name the fraction of MACs in layers that make or read a group's units. Shares overlap: most
        layers read one group and make another.
    """
    model = unwrap(model, "find_units")
    example = as_input(check_example(example_input, "find_units"), model)
    trace = settled_trace(model, example)
    dense = trace.cost.macs({})
    shares = {g.name: 1 - trace.cost.macs({g.name: g.size}) / dense if dense else 0.0 for g in trace.groups}
    return narrowing(model, trace.groups, example), shares


def uniform_sizes(model: nn.Module, example_input: Tensor, macs: float) -> tuple[dict[str, int], dict[str, float]]:
    """Return the sizes at which every exact group keeps the same share of its units and the MACs meet a budget.

    Args:
        model, example_input: As for `find_units`.
        macs: The fraction of the MACs to keep, in (0, 1].
    Returns:
        Units that stay of each group that may be cut, by name, and the fractions of "macs" and "params" that are left.
    Raises:
        ValueError: The budget is out of reach.
    """
    model = unwrap(model, "find_units")
    example = as_input(check_example(example_input, "find_units"), model)
    cost = settled_trace(model, example).cost
    groups = [g for g in find_units(model, example_input) if g.exact and not g.frozen_reason]

    def removed(share: float) -> dict[str, int]:
        return {g.name: g.size - max(1, round(share * g.size)) for g in groups}

    shares = torch.linspace(0, 1, 1001).tolist()
    fractions = [cost.macs(removed(share)) / cost.macs({}) for share in shares]
    if fractions[0] > macs:
        raise ValueError(
            f"find_units(macs={macs:g}): the smallest that this model can be cut to is {fractions[0]:.3f}. Ask for "
            "more."
        )
    best = removed(max(share for share, fraction in zip(shares, fractions, strict=True) if fraction <= macs))
    left = {"macs": cost.macs(best) / cost.macs({}), "params": cost.params(best) / cost.params({})}
    return {g.name: g.size - best[g.name] for g in groups}, left


def check(model: nn.Module, example_input: Tensor) -> CheckReport:
    """Run only the self-check: cut every exact group of a randomised copy at random and compare with masking.

    Args:
        model: Any image network, as for `find_units`, but with weights; untouched. The copy is in float64 on the CPU.
        example_input: Images [N, C, H, W].
    Returns:
        Largest error over the largest output (float64), and the groups that failed.
    Raises:
        TypeError: `model` is not a module.
        ValueError: The model is on the meta device, or as for `find_units`.

    Example:
        >>> report = lfrns.check(timm.create_model("cifar_resnet20"), torch.zeros(1, 3, 32, 32))
        >>> report.frozen, report.largest_error < 1e-8
        ({}, True)
    """
    model = unwrap(model, "check")
    refuse_meta(model, "check")
    example = as_input(check_example(example_input, "check"), model)
    return self_check(model, settled_trace(model, example).groups, example)[1]
