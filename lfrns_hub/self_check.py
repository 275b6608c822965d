"""The self-check: slim equals dense with the removed units zeroed at their taps, or the group is frozen by name."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lfrns_hub.batches import read_logits
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


def compare(model: nn.Module, groups: Sequence[UnitGroup], plan: SlimPlan, images: Tensor) -> tuple[float, float]:
    """Give the error of the cut and the change by the masking, both over the largest output."""
    with torch.no_grad():
        dense = read_logits(model(images))
        with masked(model, groups, plan):
            expected = read_logits(model(images))
        slim = cut(model, groups, plan)
        got = read_logits(slim(images))
    largest = float(expected.abs().max().clamp(min=1e-30))
    error = float((got - expected).abs().max()) / largest if got.shape == expected.shape else float("inf")
    return error, float((dense - expected).abs().max()) / largest


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
    copied = randomised(model, generator).cpu()
    images = torch.randn(2, *example_input.shape[1:], generator=generator, dtype=torch.float64)
    report = CheckReport()
    open_groups = [g for g in groups if g.frozen_reason is None and g.exact]

    def verify(some: list[UnitGroup]) -> None:
        plan = random_plan(some, generator)
        try:
            error, moved = compare(copied, groups, plan, images)
            why = f"slim differs from masked dense by {error:.1e} of the largest output"
        except Exception as failure:  # a forward that cannot narrow may fail in any way
            error, moved, why = float("inf"), 0.0, f"its forward cannot narrow ({str(failure).splitlines()[0][:120]})"
        if error <= TOLERANCE:
            report.largest_error = max(report.largest_error, error)
            report.moved = max(report.moved, moved)
            report.checked.extend(g.name for g in some)
        elif len(some) == 1:
            report.frozen[some[0].name] = f"the self-check failed: {why}"
        else:
            verify(some[: len(some) // 2])
            verify(some[len(some) // 2 :])

    if open_groups:
        verify(open_groups)
    passed = [replace(g, frozen_reason=report.frozen[g.name]) if g.name in report.frozen else g for g in groups]
    alive = [g for g in passed if g.frozen_reason is None and g.exact]
    if alive:
        train_once(copied, alive, generator, images)
    return passed, report


def train_once(model: nn.Module, groups: Sequence[UnitGroup], generator: torch.Generator, images: Tensor) -> None:
    """Run a training-mode forward and backward of the cut copy: training-only branches are not in the graph."""
    slim = cut(model, groups, random_plan(groups, generator)).train()
    with torch.enable_grad():
        read_logits(slim(torch.cat([images, images.flip(0)]))).square().mean().backward()
