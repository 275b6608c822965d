"""Widths that a forward states itself: numbers in the graph, looked up among the attributes of the module."""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lfrns_hub.format.narrow import feature_entries
from lfrns_hub.trace.ids import NONE, Literal, as_rows, resolve, varies
from lfrns_hub.units import Width

# Layers whose widths are read from their tensors.
STOCK = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
SURE = 16  # a larger number counts as a width; small ones (kernel sizes, depths) only if their name says so
WIDTH_WORDS = (
    "head", "dim", "chan", "chs", "ch", "feature", "width", "hidden", "embed", "group", "planes", "size", "shape",
    "inp", "oup", "split", "filters", "cardinality", "radix",
)  # fmt: skip
NOT_WIDTHS = ("kernel", "stride", "pad", "window", "img", "image", "feat_size", "grid", "scale", "dilation")
FEATURES = ("num_features", "head_hidden_size", "embed_dim", "in_features", "hidden_size")
FACTORS = (2, 3, 4)  # a forward writes `2 * self.dim`
# Names of a block's own attributes, by the side of its layers that they state. A number of heads is not such a width.
SIDES = {"in": ("in", "inp", "input", "inplanes"), "out": ("out", "oup", "output", "outplanes"), "groups": ("groups",)}
NO_SIDE = ("head", "heads", "kernel", "branches", "blocks", "classes")


def stated(module: nn.Module, value: int, whole: tuple[int, ...]) -> list[tuple[str, int]]:
    """Find the attributes of a module that state a number: (name, factor), for value == factor * attribute."""
    found = [(k, 1) for k, v in vars(module).items() if whole and isinstance(v, (tuple, list)) and tuple(v) == whole]
    if found:
        return found
    named = {
        name: number
        for name, number in vars(module).items()
        if isinstance(number, int)
        and not isinstance(number, bool)
        and number > 0
        and (number > SURE or any(word in name for word in WIDTH_WORDS))
        and not any(word in name for word in NOT_WIDTHS)
    }
    for factor in (1, *FACTORS):
        found = [(name, factor) for name, number in named.items() if number * factor == value and number > 1]
        if found:
            return found
    return []


def note(trace: Any, node: Any, value: Any, ids: Tensor, dim: int, whole: Any = (), place: int = 0) -> None:
    """Record a literal if it is the length of an axis on which units lie, and the calling module states it."""
    if not isinstance(value, int) or value < 1 or ids.shape[dim] != value:
        return
    module = trace.module_of(node)
    if module is None or not varies(ids, dim):
        return
    whole = tuple(whole) if all(isinstance(v, int) for v in whole) else ()
    children = [
        f"{module}.{name}".lstrip(".")
        for name, child in trace.model.get_submodule(module).named_children()
        if not isinstance(child, STOCK)
    ]
    for owner in (module, *children):  # a child's method other than forward counts as the caller's
        if stated(trace.model.get_submodule(owner), value, whole):
            trace.ids.literals.append(Literal(owner, value, as_rows(ids, [dim]), whole, place))
            if owner == module and not whole:
                return


def note_sizes(trace: Any, node: Any, ids: Tensor) -> None:
    """Record the literals of a view, reshape or expand."""
    sizes = node.args[1] if len(node.args) > 1 else ()
    if isinstance(sizes, (list, tuple)) and len(sizes) == ids.ndim:
        for dim, value in enumerate(sizes):
            note(trace, node, value, ids, dim, sizes, dim)


def note_parts(trace: Any, node: Any, parts: Any) -> None:
    """Record the literals of a split: one for all parts, or one for each."""
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    sizes = node.args[1]
    for place, part in enumerate(parts):
        if isinstance(sizes, (list, tuple)):
            note(trace, node, sizes[place], part, dim, sizes, place)
        elif "chunk" not in str(node.target):
            note(trace, node, sizes, part, dim)


def note_slice(trace: Any, node: Any, ids: Tensor) -> None:
    """Record the start and end of a slice: they are the lengths of the parts before them."""
    _, dim, start, end = (*node.args, 0, 0, None)[:4] if len(node.args) < 4 else node.args[:4]
    length = ids.shape[dim]
    for value in (start, end):
        if isinstance(value, int) and 0 < value < length:
            note(trace, node, value, ids.narrow(dim, 0, value), dim)


def note_features(trace: Any, outputs: dict[str, Tensor]) -> None:
    """Record the widths that a timm model states for its features: `num_features`, `head_hidden_size`, each `num_chs`.

    Args:
        trace: The trace, all nodes run.
        outputs: Output ids of each module named in `feature_info`.
    """
    readers = trace.ids.consumers
    heads = ["", readers[-1].module.rpartition(".")[0]] if readers else []
    for module in dict.fromkeys(heads):
        for name in FEATURES:
            value = vars(trace.model.get_submodule(module)).get(name)
            found = [c.ids for c in readers if isinstance(value, int) and len(c.ids) == value]
            if found:
                trace.ids.literals.append(Literal(module, value, found[-1].view(1, -1), attribute=name))
    for place, entry in enumerate(feature_entries(trace.model)):
        ids = outputs.get(entry.get("module", ""))
        value = entry.get("num_chs")
        dims = [] if ids is None else [d for d in (1, ids.ndim - 1) if d < ids.ndim and ids.shape[d] == value]
        if dims:
            rows = as_rows(ids, [dims[0]])
            trace.ids.literals.append(Literal("", value, rows, place=place, attribute="feature_info"))


def note_unread(trace: Any, reads: dict[str, set[str]]) -> None:
    """Record widths that a block states and its forward does not read, but other methods do, such as fusing branches.

    The axis of such an attribute is found by its name and value: the input of the block's first layer, the output of
    its last one, or an axis of its layers, where all axes of that length have the same units.

    Args:
        trace: The trace, all nodes run.
        reads: Attributes that a forward reads, by the name of the module: the graph shows those.
    """
    consumed = {consumer.module: consumer.ids for consumer in trace.ids.consumers}
    sides: dict[str, list[_Side]] = defaultdict(list)  # per module, all layers inside, in the order in which they run
    for tensor, dim in trace.ids.by_axis:
        layer = tensor.removesuffix(".weight")
        if dim == 0 and layer != tensor and isinstance(trace.model.get_submodule(layer), STOCK):
            found = _sides_of(trace, layer, consumed.get(layer))
            while layer:
                layer = layer.rpartition(".")[0]
                sides[layer] += found
    for name, module in trace.model.named_modules():
        if isinstance(module, STOCK) or type(module).__module__.startswith("torch.nn."):
            continue
        for attribute, value in vars(module).items():
            is_unread = attribute not in reads.get(name, ()) and attribute not in FEATURES
            if type(value) is int and value > 1 and is_unread and (which := _side_named(attribute)):
                alike = [side for side in sides[name] if side.stated == value]
                same = [side for side in alike if side.which == which] if which != "any" else []
                if which in ("any", "groups") and not same:
                    same = [side for side in alike if side.which != "groups"]
                same = same[:1] if which == "in" else same[-1:] if which == "out" else same
                if len({(len(side.ids), side.factor) for side in same}) == 1:
                    rows = torch.stack([side.ids for side in same])
                    factor = same[0].factor
                    trace.ids.literals.append(Literal(name, value, rows, attribute=attribute, factor=factor, all=True))


class _Side(NamedTuple):
    """An axis of a layer and the number that states it: `factor` of its ids per counted one."""

    which: str
    stated: int
    ids: Tensor
    factor: int = 1


def _sides_of(trace: Any, name: str, read: Tensor | None) -> list[_Side]:
    """Return the stated axes of a layer: inputs (ids `read` unless it is grouped), outputs, groups."""
    layer, made = trace.model.get_submodule(name), trace.ids.by_axis[f"{name}.weight", 0]
    groups = getattr(layer, "groups", 1)
    if groups > 1:  # inputs and outputs of a conv group are one unit
        read = made.view(groups, -1)[:, 0].repeat_interleave(layer.weight.shape[1])
    elif not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        read = made
    sides = [_Side("groups", groups, made, len(made) // groups)] if groups > 1 else []
    sides += [_Side("in", len(read), read)] if read is not None else []
    return [*sides, _Side("out", len(made), made)]


def _side_named(attribute: str) -> str | None:
    """Return the side of a block's layers that an attribute's name states: in, out, groups, any, or None."""
    words = attribute.lower().split("_")
    if any(word in NO_SIDE for word in words) or any(word in attribute for word in NOT_WIDTHS):
        return None
    named = [side for side, names in SIDES.items() if any(word in names for word in words)]
    return named[0] if named else "any" if any(word in attribute for word in WIDTH_WORDS) else None


def group_widths(
    literals: list[Literal], labels: np.ndarray, unit_group: dict[int, int], model: nn.Module
) -> dict[int, tuple[Width, ...]]:
    """Return the attributes that must follow each group.

    Args:
        literals: Literals recorded while tracing.
        labels: Unit of each id.
        unit_group: Group number of each unit.
        model: The traced model.
    """
    found: dict[int, dict[tuple[str, str, int | None], int]] = defaultdict(dict)
    for literal in literals:
        units = resolve(literal.rows, labels).reshape(literal.rows.shape)
        if literal.all and not (units == units[:1]).all():
            continue
        own = units[0][(units == units[:1]).all(0) & (units[0] != NONE)]
        per_group: dict[int, set[int]] = defaultdict(set)
        for unit, count in Counter(own.tolist()).items():
            if unit in unit_group:
                per_group[unit_group[unit]].add(count)
        module = model.get_submodule(literal.module)
        names = (
            [(literal.attribute, literal.factor)] if literal.attribute else stated(module, literal.value, literal.whole)
        )
        for name, factor in names:
            entry = None if isinstance(getattr(module, name), int) else literal.place
            for group, counts in per_group.items():
                if len(counts) == 1 and (count := counts.pop()) % factor == 0:
                    found[group].setdefault((literal.module, name, entry), count // factor)
                    counts.add(count)
    return {group: tuple(Width(*key, count) for key, count in widths.items()) for group, widths in found.items()}
