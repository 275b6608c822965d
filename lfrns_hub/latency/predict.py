"""Predicted latency of a forward pass at given widths: the layers' measured times and the rest of the model."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lfrns_hub.latency.layer_times import LAYERS, LayerShape, LayerTable, LayerTimes
from lfrns_hub.model_io.batches import read_tensors
from lfrns_hub.model_io.hooks import hooked
from lfrns_hub.model_io.model import evaluating
from lfrns_hub.trace.groups import Axes, Cost, share_left
from lfrns_hub.units import UnitGroup


@dataclass(frozen=True)
class LayerCost:
    """One call of one layer.

    Attributes:
        name: Name of the module.
        times: Its times over the variable widths.
        axes: Dependence of those widths on the groups, in the order of the times' axes.
        widths: Dense input and output channels.
        made, read: Dependence of its output and input channels on the groups.
        outputs: Size of its output, dense.
    """

    name: str
    times: LayerTimes
    axes: Axes
    widths: tuple[int, int]
    made: dict[str, int]
    read: dict[str, int]
    outputs: int


def observe_shapes(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[tuple[tuple[int, ...], int]]]:
    """Return the input's shape and the output's size of every call of every stock layer while `run` runs the model."""
    shapes: dict[str, list[tuple[tuple[int, ...], int]]] = defaultdict(list)

    def note(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        answers = read_tensors(output)  # a custom class may return several
        if inputs and answers:  # a hook does not see keyword arguments
            shapes[name].append((tuple(inputs[0].shape), answers[0].numel()))

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    noting = [(module, lambda _, inputs, output, name=name: note(name, inputs, output)) for name, module in layers]
    with hooked(outputs=noting), evaluating(model):
        run()
    return shapes


def layer_costs(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    shapes: dict[str, list[tuple[tuple[int, ...], int]]],
    table: LayerTable,
) -> list[LayerCost]:
    """Look up every call of every layer in the table, which measures missing entries.

    Args:
        model: The dense network.
        groups: Groups that may be cut; no other widths change.
        shapes: As returned by `observe_shapes`.
        table: Table of this machine.
    """
    owners: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    for group in groups:
        for part in group.slices:
            owners[part.tensor, part.dim][group.name] = part.index.shape[1]
    costs = []
    for name, calls in shapes.items():
        layer = model.get_submodule(name)
        out, read = layer.weight.shape[:2]
        made, taken = owners.get((f"{name}.weight", 0), {}), owners.get((f"{name}.weight", 1), {})
        if getattr(layer, "groups", 1) > 1:
            taken, read = made, layer.in_channels
            axes = [(made, out)]
        else:
            axes = [(made, out), (taken, read)]
        for shape, outputs in calls:
            times = table.times(LayerShape.of(layer, shape), [(width, bool(units)) for units, width in axes])
            costs.append(LayerCost(name, times, axes, (read, out), made, taken, outputs))
    return costs


class LatencyModel:
    """Predicted milliseconds as a function of the units removed.

    The sum of the layers and the rest: norms, activations, additions, softmax, the interpreter. A layer's time is that
    inside the dense model, and falls with its widths as in the table. The rest has a fixed part and a part proportional
    to the layers' output sizes.

    Attributes:
        smooth: Milliseconds, linear between the measured widths, so that each unit counts.
        stepped: The same with widths in whole steps of the hardware, as will be measured.
        multiples: Units of each group that make a whole step.
        rest: Milliseconds of the rest, dense: fixed, and following the widths.
    """

    def __init__(
        self,
        layers: Sequence[LayerCost],
        groups: Sequence[UnitGroup],
        steps: dict[str, int],
        inside: dict[str, float],
        rests: tuple[float, float],
        half: dict[str, int],
    ):
        """Combine the measurements.

        Args:
            layers: Every call of a layer, as returned by `layer_costs`.
            groups: Groups that may be cut.
            steps: Multiple at which each layer gets slower, by name of the module.
            inside: Time of each layer in the dense model, all its calls, ms.
            rests: Time of the rest of the dense model, and of a model with the units of `half` removed, ms.
            half: Units removed in the latter.
        """
        alone: dict[str, float] = defaultdict(float)
        for layer in layers:
            alone[layer.name] += layer.times.ms[-1]
        self.layers = [
            replace(layer, times=layer.times.scaled(inside[layer.name] / alone[layer.name], steps[layer.name]))
            for layer in layers
        ]
        total = sum(layer.outputs for layer in layers)
        left = sum(layer.outputs * share_left(layer.made, layer.widths[1], half) for layer in layers)
        share = left / total if total else 1.0
        rest, rest_at_half = rests
        follows = min(max(0.0, (rest - rest_at_half) / (1 - share)), rest) if share < 1 else 0.0
        self.rest = (rest - follows, follows)
        parts = [(layer.times, layer.axes) for layer in self.layers]
        for layer in self.layers:
            size, ms = layer.widths[1], follows * layer.outputs / total
            # In steps like the layer: filling up a step costs the rest almost nothing either.
            times = LayerTimes(((0, size),), (0.0, ms), layer.times.step) if layer.made else ms
            parts.append((times, [(layer.made, size)] if layer.made else []))
        parts.append((self.rest[0], []))
        smooth = [(ms.scaled(1.0, 1) if isinstance(ms, LayerTimes) else ms, axes) for ms, axes in parts]
        self.stepped, self.smooth = Cost(parts, ms_left), Cost(smooth, ms_left)
        self.multiples = {group.name: self._multiple(group, steps) for group in groups}

    def ms(self, removed: dict[str, int]) -> float:
        """Return the predicted milliseconds of one pass when `removed` units of each group are removed."""
        return self.stepped(removed)

    def fraction(self, removed: dict[str, int]) -> float:
        """Return the predicted fraction of the dense time, with an equal share of a step for each unit."""
        return self.smooth(removed) / self.smooth({})

    def by_layer(self, removed: dict[str, int]) -> list[dict[str, Any]]:
        """Return for each layer its widths and predicted times; the last row is the rest of the model.

        Returns:
            Rows of "layer", "dense" and "slim" [input, output channels], "dense_ms", "slim_ms", predicted. A layer
            that is called several times is one row.
        """
        rows: dict[str, dict[str, Any]] = {}
        for layer in self.layers:
            read, out = layer.widths
            slim = [
                round(read * share_left(layer.read, read, removed)),
                round(out * share_left(layer.made, out, removed)),
            ]
            row = {"layer": layer.name, "dense": [read, out], "slim": slim, "dense_ms": 0.0, "slim_ms": 0.0}
            row = rows.setdefault(layer.name, row)
            row["dense_ms"] += ms_left(layer.times, layer.axes, {})
            row["slim_ms"] += ms_left(layer.times, layer.axes, removed)
        others = {"layer": "everything else", "dense": None, "slim": None, "dense_ms": sum(self.rest)}
        others["slim_ms"] = self.ms(removed) - sum(row["slim_ms"] for row in rows.values())
        return [*rows.values(), others]

    def _multiple(self, group: UnitGroup, steps: dict[str, int]) -> int:
        """Return the units of a group that make a whole step of every layer that makes or reads them."""
        found = 1
        for layer in self.layers:
            for units in (layer.made, layer.read):
                if group.name in units:
                    step = steps[layer.name]
                    found = max(found, step // math.gcd(step, units[group.name]))
        return found


def ms_left(ms: float | LayerTimes, axes: Axes, removed: dict[str, int]) -> float:
    """Return the milliseconds of a term when `removed` units of each group are removed."""
    kept = (size - sum(width * removed.get(name, 0) for name, width in units.items()) for units, size in axes)
    return ms.at(*kept) if isinstance(ms, LayerTimes) else ms
