"""The contestants of this library: the method, the method with one step switched off, and controls.

A control shares all but one thing with the method: `random units` has its widths and its fold, and units by lot.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from case import Case, contestant
from torch import Tensor, nn

import lfrns_hub as lfrns
from lfrns_hub.method import responses
from lfrns_hub.method.fcr import learn_contributions
from lfrns_hub.method.reconstruct import reconstruct
from lfrns_hub.method.report import SlimResult
from lfrns_hub.model_io.batches import read_logits
from lfrns_hub.recipe import random_plan
from lfrns_hub.surgery import cut
from lfrns_hub.trace import trace_model

FEW = 500

# The controls take the method's widths, which are found once for a dense network.
_plans: WeakKeyDictionary[nn.Module, dict[tuple, SlimResult]] = WeakKeyDictionary()


def slimmed(case: Case, **options: Any) -> SlimResult:
    """Run `slim` on a case, once for each of its settings."""
    options = {"fcr_steps": case.fcr_steps} | options
    key = (case.macs, case.params, case.seed, len(case.images), tuple(sorted(options.items())))
    plans = _plans.setdefault(case.dense, {})
    if key not in plans:
        plans[key] = lfrns.slim(
            case.dense, case.batches(), macs=case.macs, params=case.params, seed=case.seed, progress=False, **options
        )
    return plans[key]


def folded(case: Case, plan: lfrns.SlimPlan) -> nn.Module:
    """Cut by any plan, and fold as the method does."""
    trace = trace_model(case.dense, case.example())
    plain = cut(case.dense, trace.groups, plan)
    images = [images for images, _ in case.batches()]
    return reconstruct(case.dense, plain, trace.sites, trace.groups, plan, images, seed=case.seed)


@contestant("ours", "ours", features=True)
def ours(case: Case) -> nn.Module:
    """The method with its defaults; retrained towards the dense network's last feature map too."""
    return slimmed(case).model


@contestant("ours, images without labels", "ours")
def unlabelled(case: Case) -> nn.Module:
    """The method on bare images."""
    loader = [images for images, _ in case.batches()]
    return lfrns.slim(case.dense, loader, macs=case.macs, params=case.params, seed=case.seed, progress=False).model


@contestant(f"ours, {FEW} images", "ours")
def few_images(case: Case) -> nn.Module:
    """The method on a quarter of the images."""
    return slimmed(case.part(FEW)).model


@contestant("ours, moments of all positions", "ablation")
def all_positions(case: Case) -> nn.Module:
    """Of every consumer's input all positions of all images, instead of a sample of them."""
    with patch.object(responses, "MOMENTS_SHARE", 1e9):
        loader = case.batches()
        return lfrns.slim(case.dense, loader, macs=case.macs, params=case.params, seed=case.seed, progress=False).model


@contestant("ours, retrained as the peers are", "ablation")
def without_features(case: Case) -> nn.Module:
    """The method; what differs is the retraining, towards the dense network's logits but not its features."""
    return slimmed(case).model


@contestant("ours, without distillation", "ablation", distil=False)
def without_distillation(case: Case) -> nn.Module:
    """The method; what differs is the retraining, on the labels alone."""
    return slimmed(case).model


@contestant("ours, correlation distance", "ablation")
def correlation(case: Case) -> nn.Module:
    """Clusters by the responses' correlation instead of the functional distance."""
    return slimmed(case, distance="correlation").model


@contestant("ours, without FCR", "ablation")
def without_fcr(case: Case) -> nn.Module:
    """Restores by the cost of merging instead of the learned contribution."""
    return slimmed(case, fcr_steps=0).model


@contestant("ours, without restoring", "ablation")
def without_restoring(case: Case) -> nn.Module:
    """Clusters right down to the budget."""
    return slimmed(case, restore=False).model


@contestant("ours, without fold", "ablation")
def without_fold(case: Case) -> nn.Module:
    """Leaves the consumers' weights as they are."""
    return slimmed(case, fold=False).model


@contestant("ours, uniform widths", "ablation")
def uniform_widths(case: Case) -> nn.Module:
    """Takes the same share of each group."""
    return slimmed(case, widths="uniform").model


@contestant('preset="paper"', "ours")
def paper(case: Case) -> nn.Module:
    """The paper's abstract taken literally."""
    return slimmed(case, preset="paper").model


@contestant("contributions permuted inside groups", "control")
def permuted(case: Case) -> nn.Module:
    """What FCR learns, given to other units of the same group: what is left of it is a width per group."""

    def shuffled(model: nn.Module, groups: Any, keep: Any, batches: Any, moments: Any) -> dict[str, Tensor]:
        learned = learn_contributions(model, groups, keep, batches, moments, steps=200)
        generator = torch.Generator().manual_seed(case.seed)
        for group in groups:
            rest = torch.tensor(sorted(set(range(group.size)) - set(keep[group.name])), dtype=torch.int64)
            learned[group.name][rest] = learned[group.name][rest[torch.randperm(len(rest), generator=generator)]]
        return learned

    return lfrns.slim(
        case.dense,
        case.batches(),
        macs=case.macs,
        params=case.params,
        seed=case.seed,
        contribution=shuffled,
        progress=False,
    ).model


@contestant("random units, our widths, our fold", "control")
def random_units(case: Case) -> nn.Module:
    """Units by lot."""
    groups = trace_model(case.dense, case.example()).groups
    return folded(case, random_plan(slimmed(case).plan, groups, case.seed))


def by_score(case: Case, scores: dict[str, Tensor], widths: str) -> nn.Module:
    """Keep the units of highest score, at our widths or at the same share of each group, and fold."""
    if widths == "our":
        plan = slimmed(case).plan
    else:
        plan = lfrns.slim(
            case.dense, case.batches(), macs=case.macs, params=case.params, restore=False, widths="uniform",
            fold=False, seed=case.seed, progress=False,
        ).plan  # fmt: skip
    keep = {name: sorted(scores[name].topk(len(kept)).indices.tolist()) for name, kept in plan.keep.items()}
    return folded(case, lfrns.SlimPlan(keep))


def unit_scores(case: Case, of_tensor: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """Sum a score of every weight over all slices of each unit, [U] per group."""
    model = case.dense
    parameters = dict(model.named_parameters())
    scores = {}
    for group in trace_model(model, case.example()).groups:
        total = torch.zeros(group.size)
        for part in group.slices:
            if part.tensor in parameters:
                rows = of_tensor(parameters[part.tensor]).movedim(part.dim, 0)
                total += rows.reshape(len(rows), -1).sum(1).cpu()[part.index].sum(1)
        scores[group.name] = total
    return scores


def taylor_scores(case: Case) -> dict[str, Tensor]:
    """First-order Taylor importance, |weight x gradient| of the cross-entropy over the calibration images."""
    wanted = {name: parameter.requires_grad for name, parameter in case.dense.named_parameters()}
    gradients = {name: torch.zeros_like(p) for name, p in case.dense.named_parameters()}
    case.dense.requires_grad_(True)
    for images, labels in case.batches():
        loss = F.cross_entropy(read_logits(case.dense(images)), labels)
        found = torch.autograd.grad(loss, list(case.dense.parameters()), allow_unused=True)
        for name, gradient in zip(gradients, found, strict=True):
            gradients[name] += 0 if gradient is None else gradient
    by_id = {id(p): gradients[name] for name, p in case.dense.named_parameters()}
    for name, parameter in case.dense.named_parameters():
        parameter.requires_grad_(wanted[name])
    return unit_scores(case, lambda p: (p.detach() * by_id[id(p)]).abs())


@contestant("L1 units, our fold", "control", variants=[{"widths": "our"}, {"widths": "uniform"}], separate=True)
def l1_units(case: Case, widths: str) -> nn.Module:
    """Units of the largest L1 norm over all their slices."""
    return by_score(case, unit_scores(case, lambda p: p.detach().abs()), widths)


@contestant("Taylor units, our fold", "control", variants=[{"widths": "our"}, {"widths": "uniform"}], separate=True)
def taylor_units(case: Case, widths: str) -> nn.Module:
    """Units of the largest Taylor importance."""
    return by_score(case, taylor_scores(case), widths)


@contestant("dense", "reference")
def dense(case: Case) -> nn.Module:
    """The dense network itself; trained further for as long as the others."""
    return case.copy()


@contestant("dense, without a teacher", "reference", distil=False)
def dense_alone(case: Case) -> nn.Module:
    """The dense network itself; trained further on the labels alone."""
    return case.copy()
