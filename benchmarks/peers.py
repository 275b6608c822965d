"""What the peers share (search for the MACs, gradients, moments), and variance with mean shift as a control.

The peers themselves are in torch_pruning_peers.py and kirigami_peers.py.
"""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from case import Case, NotSupported, contestant
from torch import Tensor, nn

import lfrns_hub as lfrns
from lfrns_hub.model_io.batches import read_logits
from lfrns_hub.surgery import cut

NEAR = 0.002  # of the dense MACs: nearer below the budget is not worth another try
HALVINGS = 12


def search(case: Case, prune: Callable[[float, float, int], nn.Module], layers: int = 0) -> tuple[nn.Module, float]:
    """Find the pruned model nearest below the budget of MACs.

    One ratio for all layers takes a unit of several layers at once, which leaves a gap below the budget: the first
    `count` layers then stay at the next smaller ratio.

    Args:
        prune: `prune(ratio, smaller, count)` giving a new model: the first `count` layers pruned by `smaller`, the
            others by `ratio`.
        layers: How many layers have a ratio of their own; 0 where all are ranked together.
    Returns:
        The model, and the ratio that gave it.
    Raises:
        NotSupported: No ratio tried reaches the budget.
    """
    best, best_kept, best_ratio = None, 0.0, 0.0
    low, high = 0.0, 1.0

    def fits(ratio: float, smaller: float, count: int) -> bool:
        nonlocal best, best_kept, best_ratio
        model = prune(ratio, smaller, count)
        kept = case.kept_macs(model)
        if best_kept < kept <= case.macs:
            best, best_kept, best_ratio = model, kept, ratio
        return kept <= case.macs

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle, middle, 0) else (middle, high)
        if best_kept > case.macs - NEAR:
            break
    first, last = 0, layers
    while 0 < best_kept < case.macs - NEAR and last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if fits(high, low, middle) else (first, middle)
    if best is None:
        raise NotSupported(f"no pruning ratio brings it to {case.macs} of the MACs")
    return best, best_ratio


def trainable(model: nn.Module) -> nn.Module:
    """Copy a model with every parameter trainable, and with the gradients that it has."""
    copied = copy.deepcopy(model).requires_grad_(True)
    for new, old in zip(copied.parameters(), model.parameters(), strict=True):
        new.grad = old.grad
    return copied


def as_dense(model: nn.Module, dense: nn.Module) -> nn.Module:
    """Return each parameter the dense one's requires_grad, and no gradient, in place."""
    wanted = {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name]).grad = None
    return model


def accumulate_gradients(model: nn.Module, case: Case) -> nn.Module:
    """Put the gradient of the cross entropy of all calibration images on the parameters, in place."""
    model.zero_grad(set_to_none=True)
    for images, labels in case.batches():
        loss = F.cross_entropy(read_logits(model(images)), labels, reduction="sum") / len(case.labels)
        loss.backward()
    return model


@torch.no_grad()
def input_moments(model: nn.Module, consumers: Iterable[str], case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure mean and sample variance of each channel of linear layers' inputs, over images and tokens: [I] each."""
    sums: dict[str, list[Tensor]] = {name: [] for name in consumers}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            sums[name].append(torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)]))

        return keep

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in sums]
    try:
        for images, _ in case.batches():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    moments = {}
    for name, parts in sums.items():
        count, total, square = torch.stack(parts).sum(0)
        mean = total / count
        moments[name] = mean, (square - count * mean.square()).clamp(min=0) / (count - 1)
    return moments


@torch.no_grad()
def shift_bias(consumer: nn.Linear, dense: nn.Linear, mean: Tensor, removed: Iterable[int]) -> None:
    """Add what the removed inputs contribute on average to a linear layer's bias, in place."""
    removed = list(removed)
    consumer.bias += (dense.weight[:, removed].double() @ mean[removed]).to(consumer.bias)


@contestant("variance + mean shift (VBP)", "control", [{"widths": w} for w in ("global", "normalised", "uniform")])
def variance_mean_shift(case: Case, widths: str = "global") -> nn.Module:
    """Cut the MLP neurons whose activations vary least, their mean into the next layer's bias.

    Args:
        widths: "global" ranks the variances of all layers together, "normalised" over the mean of their layer,
            "uniform" takes the same share of each layer.
    Source: Berisha et al. 2025, variance-based pruning: "global", by the raw variance. Where neurons do not suffice,
        attention heads go too, by the mean variance of their outputs; the others are ours.
    """
    groups = lfrns.find_units(case.dense, case.example())
    chosen = [g for g in groups if g.kind == "neuron" and g.frozen_reason is None and len(g.taps) == 1]
    heads = [g for g in groups if g.kind == "head" and g.frozen_reason is None and len(g.taps) == 1]
    try:
        return _cut_least_varying(case, groups, chosen, widths)
    except NotSupported:
        if not heads:
            raise
    return _cut_least_varying(case, groups, chosen + heads, widths)


def _cut_least_varying(case: Case, groups: list, chosen: list, widths: str) -> nn.Module:
    """Rank the units of the chosen groups by variance, search the MACs, cut and shift."""
    moments = input_moments(case.dense, {group.taps[0].module for group in chosen}, case)
    scores = [moments[g.taps[0].module][1][g.taps[0].index].mean(1).cpu() for g in chosen]
    if widths == "normalised":
        scores = [score / score.mean() for score in scores]

    def prune(ratio: float, smaller: float, count: int) -> nn.Module:
        removed = lowest(scores, ratio, smaller, count, together=widths != "uniform")
        keep = {g.name: sorted(set(range(g.size)) - set(r)) for g, r in zip(chosen, removed, strict=True)}
        slim = cut(case.dense, groups, lfrns.SlimPlan(keep))
        for group, indices in zip(chosen, removed, strict=True):
            tap = group.taps[0]
            dense, leaving = case.dense.get_submodule(tap.module), tap.index[indices].flatten().tolist()
            shift_bias(slim.get_submodule(tap.module), dense, moments[tap.module][0], leaving)
        return slim

    return search(case, prune, 0 if widths != "uniform" else len(chosen))[0]


def lowest(scores: list[Tensor], ratio: float, smaller: float, count: int, *, together: bool) -> list[list[int]]:
    """Pick the units of lowest score, of all layers together or of each; every layer keeps one.

    Args:
        scores: One tensor [U] a layer.
        ratio, smaller, count: As `search` has them; together, `ratio` is of all units.
    Returns:
        Ascending indices of the units that leave, for each layer.
    """
    if not together:
        shares = [smaller if layer < count else ratio for layer in range(len(scores))]
        taken = [min(int(len(s) * share), len(s) - 1) for s, share in zip(scores, shares, strict=True)]
        return [sorted(s.argsort(stable=True)[:n].tolist()) for s, n in zip(scores, taken, strict=True)]
    owner = torch.cat([torch.full((len(s),), layer) for layer, s in enumerate(scores)])
    unit = torch.cat([torch.arange(len(s)) for s in scores])
    removed: list[list[int]] = [[] for _ in scores]
    left = int(len(owner) * ratio)
    for place in torch.cat(scores).argsort(stable=True).tolist():
        layer = int(owner[place])
        if left and len(removed[layer]) < len(scores[layer]) - 1:
            removed[layer].append(int(unit[place]))
            left -= 1
    return [sorted(r) for r in removed]
