"""Where the time of a call goes: seconds of chosen functions inside it, each waited for on the GPU.

The functions are wrapped where their callers look them up, while a watch is on. Of a function inside another one's time
is counted once: `own` is what a step took without the steps in it, so that all `own` add up to the whole.
"""

import functools
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from turns import wait

# Where each is looked up, and what it is called here.
WATCHED = {
    "slim:analysis_copy": "copy of the model",
    "slim:read_loader": "reading the images",
    "slim:settle_layout": "settling the layout",
    "slim:settled_trace": "trace",
    "trace.graph:watch_forward": "watching a forward",
    "trace.graph:export": "export",
    "trace.graph:export_training": "export, training mode",
    "trace.graph:read_groups": "reading groups",
    "slim:count_macs": "counting MACs",
    "slim:check_differentiable": "is it differentiable",
    "slim:understand": "what the outputs mean",
    "slim:self_check": "self-check (CPU)",
    "self_check:narrowing": "narrowing on meta",
    "self_check:Proof.__init__": "randomised float64 copy",
    "self_check:Proof.refuted": "cut against masked, float64",
    "self_check:untrainable": "training mode",
    "slim:choose_groups": "choosing groups",
    "slim:observe": "responses, forward passes",
    "method.responses:first_readers": "first readers",
    "method.responses:accumulate": "moments",
    "method.responses:add_products": "products, to the CPU",
    "method.responses:add_loss_weights": "loss weights, backward",
    "method.responses:mirror": "mirror",
    "slim:views": "what consumers see",
    "slim:find_merges": "merges, per group",
    "slim:measure_costs": "costs of merges",
    "analysis:LatencyMeter.__init__": "latency: meter",
    "latency.machine:Machine.time_layers": "timing layers",
    "latency.machine:Machine.time_inside": "timing inside",
    "latency.machine:Machine.time_models": "timing models",
    "analysis:cluster": "clusters",
    "analysis:contribute": "gates",
    "method.fcr:GateTraining.__init__": "setting up, folds",
    "method.fcr:GateTraining.step": "steps",
    "analysis:restored_plan": "restoring",
    "analysis:cut": "cut",
    "surgery:fold": "fold of one layer",
    "analysis:Analysis.finish": "fold and reconstruct",
    "method.recalibrate:Judge.__init__": "judge, dense answers",
    "method.recalibrate:Judge.divergence": "judge, one model",
    "analysis:reconstruct": "layer fits, forward passes",
    "method.reconstruct:Layer.take": "taking outputs",
    "method.reconstruct:Layer.fit": "fit of one layer",
    "method.reconstruct:patches": "patches",
    "method.reconstruct:add_products": "products of one layer",
    "method.reconstruct:solve": "solving one layer",
    "analysis:recalibrated": "recalibration",
    "analysis:measure_integrity": "report: integrity",
    "analysis:report_group": "report: stand-ins",
    "analysis:count_params": "counting parameters",
    "analysis:describe_round": "provenance",
    "analysis:typed_as": "types of the tensors",
    "analysis:carry_config": "configuration",
}


@dataclass
class Step:
    """What one place in the tree of steps took.

    Attributes:
        seconds: In all its calls.
        inner: Of these, those of the steps in it.
        calls: How often it was entered.
    """

    seconds: float = 0.0
    inner: float = 0.0
    calls: int = 0


class Watch:
    """The steps of what runs while it is on, by their path."""

    def __init__(self, device: str):
        self.device = device
        self.steps: dict[tuple[str, ...], Step] = {}
        self._path: tuple[str, ...] = ()
        self._thread = threading.get_ident()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take the time of a step, the GPU's work in it included."""
        outside, path = self._path, (*self._path, name)
        entry = self.steps.setdefault(path, Step())
        wait(self.device)
        self._path, began = path, time.perf_counter()
        try:
            yield
            wait(self.device)
        finally:
            seconds = time.perf_counter() - began
            self._path = outside
            entry.seconds, entry.calls = entry.seconds + seconds, entry.calls + 1
            if outside:
                self.steps[outside].inner += seconds

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return a function that is a step inside a step; outside of all, and in other threads, it is what it was."""

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            if not self._path or threading.get_ident() != self._thread:
                return function(*args, **options)
            with self.step(name):
                return function(*args, **options)

        return timed

    def rows(self) -> list[dict[str, Any]]:
        """Return the steps as plain data, in the order in which they were first entered."""
        return [
            {
                "step": " > ".join(path),
                "seconds": round(step.seconds, 4),
                "own": round(step.seconds - step.inner, 4),
                "calls": step.calls,
            }
            for path, step in self.steps.items()
        ]


@contextmanager
def watching(device: str) -> Iterator[Watch]:
    """Wrap the watched functions; on leaving, each is its own again.

    Raises:
        AttributeError: A function of WATCHED is no longer where it was.
    """
    watch, before = Watch(device), []
    try:
        for place, name in WATCHED.items():
            owner, attribute = place_of(place)
            function = getattr(owner, attribute)
            before.append((owner, attribute, function))
            setattr(owner, attribute, watch.wrapped(function, name))
        yield watch
    finally:
        for owner, attribute, function in reversed(before):
            setattr(owner, attribute, function)


def place_of(place: str) -> tuple[Any, str]:
    """Return the module or class where a function is looked up, and its name there."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(f"lfrns_hub.{module}")
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, attribute


def rows_sum(rows: list[dict[str, Any]]) -> list[str]:
    """Write each step that took a hundredth of the whole, indented by its depth, and the sum of what is left out."""
    whole = sum(row["own"] for row in rows)
    lines, shown = [], 0.0
    for row in rows:
        *above, name = row["step"].split(" > ")
        if row["seconds"] >= 0.01 * whole:
            shown += row["own"]
            lines.append(f"  {'  ' * len(above)}{name}: {row['seconds']:.2f} s, own {row['own']:.2f}, {row['calls']}x")
    return [*lines, f"  smaller steps: {whole - shown:.2f} s; all: {whole:.2f} s"]
