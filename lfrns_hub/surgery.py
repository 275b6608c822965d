"""Cut: make the layers physically narrower by a plan.

The only file that narrows. The result consists of the stock module classes; no forward is overridden.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lfrns_hub.format.narrow import model_copy, read_widths, set_width
from lfrns_hub.method.fold import fold
from lfrns_hub.method.responses import Moments
from lfrns_hub.method.taps import channel_count, kept_channels, multiplier, watched
from lfrns_hub.units import SlimPlan, UnitGroup, forget


def check_plan(groups: Sequence[UnitGroup], plan: SlimPlan) -> list[UnitGroup]:
    """Return the groups that lose units.

    Raises:
        ValueError: The plan names an unknown or frozen group, or indices that do not fit.
    """
    by_name = {group.name: group for group in groups}
    for name in plan.keep:
        if name not in by_name:
            raise ValueError(
                f"plan names the group {name!r}: the model has none of this name. List them by find_units."
            )
    shrinking = [group for group in groups if plan.removed(group)]
    for group in shrinking:
        if group.frozen_reason:
            raise ValueError(
                f"plan cuts {group.name!r}, which is frozen: {group.frozen_reason}. Leave it out of the plan."
            )
    return shrinking


def removed_at_taps(groups: Sequence[UnitGroup], plan: SlimPlan) -> dict[str, list[Tensor]]:
    """Return the removed input channels of each consumer that loses some."""
    removed: dict[str, list[Tensor]] = defaultdict(list)
    for group in check_plan(groups, plan):
        for tap in group.taps:
            removed[tap.module].append(tap.index[plan.removed(group)])
    return removed


@contextmanager
def masked(model: nn.Module, groups: Sequence[UnitGroup], plan: SlimPlan) -> Iterator[None]:
    """Run the dense model with the removed units zeroed at their taps.

    Args:
        model: The dense network; unchanged when the context ends.
        groups: Its groups, from `find_units`.
        plan: What stays.
    Raises:
        ValueError: The plan does not fit the groups.

    Example:
        >>> model, images = timm.create_model("cifar_resnet20").eval(), torch.randn(2, 3, 32, 32)
        >>> groups, plan = lfrns.find_units(model, images), lfrns.SlimPlan({"layer1.0.conv1": [0, 2, 3]})
        >>> with masked(model, groups, plan):
        ...     zeroed = model(images)
        >>> torch.allclose(zeroed, cut(model, groups, plan)(images), atol=1e-5)
        True
    """
    hooks = {}
    for module, removed in removed_at_taps(groups, plan).items():
        factor = torch.ones(channel_count(model.get_submodule(module)))
        for index in removed:
            factor[index.flatten()] = 0
        hooks[module] = multiplier(factor)
    with watched(model, hooks):
        yield


FOLDED = ("weight", "bias")  # parameters that `fold` changes


def cut(
    model: nn.Module, groups: Sequence[UnitGroup], plan: SlimPlan, moments: dict[str, Moments] | None = None
) -> nn.Module:
    """Return a narrower copy of a model.

    Args:
        model: The dense network; untouched.
        groups: Its groups, from `find_units`.
        plan: What stays.
        moments: Responses per consumer; if given, the cut units are folded into the kept units' weights.
    Returns:
        A new model of the same classes, in the same mode.
    Raises:
        ValueError: The plan does not fit the groups.

    Example:
        >>> model = timm.create_model("cifar_resnet20").eval()
        >>> groups = lfrns.find_units(model, torch.zeros(1, 3, 32, 32))
        >>> cut(model, groups, lfrns.SlimPlan({"layer1.0.conv1": [0, 2, 3]})).layer1[0].conv1
        Conv2d(16, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    shrinking = check_plan(groups, plan)
    folding = removed_at_taps(groups, plan) if moments is not None else {}
    leaving: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for group in shrinking:
        for part in group.slices:
            leaving[part.tensor, part.dim].append(part.index[plan.removed(group)].flatten())
    # Narrowed tensors are new anyway, so they are not copied: two whole models are never in memory at once.
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    owners = Counter(id(tensor) for _, tensor in tensors)
    copied = {f"{module}.{part}" for module in folding for part in FOLDED}
    narrowed = {name for name, _ in leaving} - copied
    slim = model_copy(model, {id(t): t for name, t in tensors if name in narrowed and owners[id(t)] == 1})
    forget(slim, [cache for group in groups for cache in group.caches])
    for module, removed in folding.items():
        fold(slim.get_submodule(module), moments[module], kept_channels(model, module, removed))
    for (name, dim), indices in leaving.items():
        narrow_axis(slim, name, dim, torch.cat(indices))
    for name in {tensor.rpartition(".")[0] for tensor, _ in leaving}:
        sync_widths(slim.get_submodule(name), model.get_submodule(name))
    sync_stated(slim, model, shrinking, plan)
    return slim


def narrow_axis(model: nn.Module, name: str, dim: int, leaving: Tensor) -> None:
    """Remove positions of one axis of a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    stays = torch.ones(old.shape[dim], dtype=torch.bool)
    stays[leaving] = False
    new = old.detach().index_select(dim, stays.nonzero().flatten().to(old.device)).contiguous()
    if old.ndim == 4 and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        setattr(module, leaf, nn.Parameter(new, old.requires_grad))
    else:
        module._buffers[leaf] = new
        # No class can recompute the narrowed buffer, so it is saved in the state dict with the weights.
        module._non_persistent_buffers_set.discard(leaf)


def sync_widths(slim: nn.Module, dense: nn.Module) -> None:
    """Set a stock layer's attributes to the widths of its new tensors."""
    if isinstance(slim, nn.Linear):
        slim.out_features, slim.in_features = slim.weight.shape
    elif isinstance(slim, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if dense.groups > 1:
            slim.groups = dense.groups * slim.weight.shape[0] // dense.out_channels
        slim.out_channels, slim.in_channels = slim.weight.shape[0], slim.weight.shape[1] * slim.groups
    elif isinstance(slim, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        slim.in_channels, slim.out_channels = slim.weight.shape[0], slim.weight.shape[1] * slim.groups
    elif isinstance(slim, nn.modules.batchnorm._NormBase):
        slim.num_features = len(slim.running_mean if slim.running_mean is not None else slim.weight)
    elif isinstance(slim, nn.GroupNorm):
        if dense.num_groups > 1:
            slim.num_groups = dense.num_groups * len(slim.weight) // len(dense.weight)
        slim.num_channels = len(slim.weight)
    elif isinstance(slim, nn.LayerNorm):
        slim.normalized_shape = tuple(slim.weight.shape)


def sync_stated(slim: nn.Module, dense: nn.Module, shrinking: Sequence[UnitGroup], plan: SlimPlan) -> None:
    """Update the attributes that state the groups' widths."""
    gone: dict[tuple[str, str, int | None], int] = defaultdict(int)
    for group in shrinking:
        for width in group.widths:
            gone[width.module, width.attribute, width.entry] += len(plan.removed(group)) * width.per_unit
    for (name, attribute, entry), less in gone.items():
        module = slim.get_submodule(name)
        dense_value = read_widths(dense.get_submodule(name))[attribute]
        if entry is None:
            set_width(module, attribute, dense_value - less)
        else:
            entries = list(read_widths(module)[attribute])
            entries[entry] = dense_value[entry] - less
            set_width(module, attribute, entries)
