"""Latency meter of one model on one machine: times of its layers and of the whole model, equal on all processes."""

import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.format.narrow import model_copy
from lfrns_hub.latency.layer_times import LayerShape, LayerTable
from lfrns_hub.latency.machine import Machine
from lfrns_hub.latency.predict import LatencyModel, layer_costs, observe_shapes
from lfrns_hub.latency.setup import LatencySetup
from lfrns_hub.model_io.model import as_input
from lfrns_hub.runs.cache import digest
from lfrns_hub.runs.processes import ALONE, Processes
from lfrns_hub.surgery import cut
from lfrns_hub.units import SlimPlan, UnitGroup

LEAST_MS = 1e-6  # a difference of two times can be negative


class LatencyMeter:
    """Times a model and its narrower copies. Only the main process measures; the others receive its results.

    Attributes:
        setup: The setup, all fields resolved.
        predicted: The latency prediction for plans.
    """

    def __init__(
        self,
        dense: nn.Module,
        every: Sequence[UnitGroup],
        chosen: Sequence[UnitGroup],
        example: Tensor,
        setup: LatencySetup,
        *,
        channels_last: bool = False,
        processes: Processes = ALONE,
        directory: str | os.PathLike | None = None,
        machine: Any = None,
    ):
        """Measure everything that the cache does not have.

        Args:
            dense: The dense model, of any dtype; untouched.
            every, chosen: All groups, and those that may be cut.
            example: Images [N, C, H, W]; only the first is used.
            setup: The resolved setup.
            channels_last: Whether convolutions are timed in this memory format: that of the caller's model.
            processes: The processes of the run; the main process measures.
            directory: Folder of the cache; None: the user's.
            machine: Replacement for the timing on this machine.
        """
        self.setup, self.processes, self.every, self.plain = setup, processes, every, dense
        self.seen: dict[tuple[tuple[str, int], ...], dict[str, float]] = {}
        self.channels_last = channels_last
        self.machine = machine or Machine(setup, self.channels_last)
        self.images = example[:1].expand(setup.batch, *example.shape[1:]).contiguous().to(setup.device)
        self.dense = self._placed(model_copy(dense))
        shapes = observe_shapes(self.dense, lambda: self._pass(self.dense))
        family = {n: LayerShape.of(dense.get_submodule(n), calls[0][0]).family for n, calls in shapes.items()}
        half = {group.name: group.size // 2 for group in chosen}
        whole = f"model {digest(repr(dense), list(self.images.shape), half)}"
        inside, rests = {n: f"{whole} dense {n}" for n in shapes}, (f"{whole} dense ", f"{whole} half ")
        table = LayerTable(self.machine, directory)

        def measure() -> dict[str, float]:
            for name in sorted(set(family.values())):
                table.step(name)
            layer_costs(dense, chosen, shapes, table)
            if not table.known.keys() >= {*inside.values(), *rests}:
                smaller = self._cut(SlimPlan({g.name: list(range(g.size - half[g.name])) for g in chosen}))
                times = self.machine.time_inside({"dense": self.dense, "half": smaller}, self.images)
                found = ((f"{whole} {model} {layer}", ms) for model, by in times.items() for layer, ms in by.items())
                table.known |= {key: max(ms, LEAST_MS) for key, ms in found}
            table.keep()
            return table.known

        table.known = processes.on_main(measure)
        steps = {name: table.step(of) for name, of in family.items()}
        costs = layer_costs(dense, chosen, shapes, table)
        places = {name: table.known[key] for name, key in inside.items()}
        dense_rest, half_rest = (table.known[key] for key in rests)
        self.predicted = LatencyModel(costs, chosen, steps, places, (dense_rest, half_rest), half)

    def ratio(self, plan: SlimPlan) -> float:
        """Measure the fraction of the dense time that a plan's model needs: the median over turns of the two.

        Plans of equal widths are timed once.
        """
        return self._timed(plan)["fraction"]

    def tell(self, plan: SlimPlan, chosen: Sequence[UnitGroup]) -> dict[str, Any]:
        """Return the measured latency of a plan's model, and the predicted part of each layer."""
        removed = {group.name: len(plan.removed(group)) for group in chosen}
        timed = self._timed(plan)
        return {
            "setup": self.setup.describe(),
            "dense_ms": timed["dense_ms"],
            "slim_ms": timed["slim_ms"],
            "predicted_fraction": self.predicted.ms(removed) / self.predicted.ms({}),
            "multiples": {group.name: self.predicted.multiples[group.name] for group in chosen},
            "layers": self.predicted.by_layer(removed),
        }

    def _timed(self, plan: SlimPlan) -> dict[str, float]:
        """Time a plan's model together with the dense one."""
        widths = tuple(sorted((name, len(kept)) for name, kept in plan.keep.items()))

        def measure() -> dict[str, float]:
            times = self.machine.time_models({"dense": self.dense, "slim": self._cut(plan)}, self.images)
            ratios = [slim / dense for dense, slim in zip(times["dense"], times["slim"], strict=True)]
            found = {f"{name}_ms": statistics.median(ms) for name, ms in times.items()}
            return found | {"fraction": statistics.median(ratios)}

        if widths not in self.seen:
            self.seen[widths] = self.processes.on_main(measure)
        return self.seen[widths]

    def _cut(self, plan: SlimPlan) -> nn.Module:
        """Return a plan's model for timing; its weights do not matter."""
        return self._placed(cut(self.plain, self.every, plan))

    def _placed(self, model: nn.Module) -> nn.Module:
        """Move a copy to the setup's device, dtype and memory format."""
        model = model.to(device=self.setup.device, dtype=self.setup.dtype).eval()
        return model.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def _pass(self, model: nn.Module) -> None:
        """Run the images through a model once."""
        with self.setup.running():
            model(as_input(self.images, model))
