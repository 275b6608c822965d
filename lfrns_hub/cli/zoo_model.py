"""One model of `lfrns zoo`, in a process of its own: its checkpoints are made, then timed.

What the process finds out it notes next to its job, so that the parent reads it whatever becomes of the process.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lfrns_cli.commands import Slim
from lfrns_cli.options import Budget, Machine
from lfrns_cli.zoo_file import Run, read
from lfrns_hub import recipe
from lfrns_hub.checkpoint import kind_of
from lfrns_hub.cli.checkpoints import load_slim
from lfrns_hub.cli.data import start_accelerator
from lfrns_hub.cli.make import folders_of, make
from lfrns_hub.cli.resume import LeftOver
from lfrns_hub.format.untrusted import read_json
from lfrns_hub.hub.index import checkpoint_name
from lfrns_hub.measure.occasion import new_occasion
from lfrns_hub.runs import written_aside
from lfrns_hub.runtimes.bench import bench, peak_resident
from lfrns_hub.zoo import create_base, create_skeleton, example_input

JOB, LOG, ATTEMPTS, OVER = "job.json", "log.txt", "attempts.json", "failed.json"


@dataclass(frozen=True, kw_only=True)
class Ladder(Slim):
    """The options of a model's run: those of `lfrns slim`, at any budgets; the file's reader has checked them.

    Attributes:
        called: What the checkpoints' names begin with.
        ladder: The budgets of this run.
    """

    called: str
    ladder: list[Budget]

    def __post_init__(self) -> None: ...

    @property
    def budgets(self) -> list[Budget]:
        """The budgets."""
        return self.ladder

    @property
    def several(self) -> bool:
        """Each has a folder of its own, even one alone."""
        return True

    @property
    def arch(self) -> str:
        """What the checkpoints' names begin with."""
        return self.called


@dataclass(frozen=True)
class Place:
    """Where a model's checkpoints lie, and what is noted of them.

    Attributes:
        out: The zoo's folder.
        run: The model's run.
    """

    out: Path
    run: Run

    @property
    def directory(self) -> Path:
        """The folder with the model's checkpoints."""
        return self.out / self.run.name

    @property
    def work(self) -> Path:
        """The folder of the notes."""
        return self.out / "work" / self.run.name

    def names(self) -> list[str]:
        """Return the names of the checkpoints, in the budgets' order."""
        run = self.run
        return [checkpoint_name(run.name, run.data.path, **asdict(budget)) for budget in run.budgets]

    def note(self, name: str, part: str) -> dict[str, Any] | None:
        """Return what is noted of a checkpoint; None where nothing is.

        Args:
            name: The checkpoint.
            part: "made", of the process that made it; "timed", its times; "never", why no further try would make it.
        """
        path = self.work / f"{name}.{part}.json"
        return read_json(path, str(path)) if path.is_file() else None

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a note."""
        with written_aside(self.work / name) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def is_made(self, name: str) -> bool:
        """Return whether a checkpoint is there, whole, and measured."""
        folder = self.directory / name
        whole = recipe.is_finished(folder) and (folder / "model.safetensors").is_file()
        return whole and self.note(name, "made") is not None

    def is_timed(self, name: str, runtimes: list[str]) -> bool:
        """Return whether a checkpoint was timed in some runtimes, or it is known why not."""
        noted = self.note(name, "timed") or {}
        return all(runtime in {*noted.get("ms", {}), *noted.get("left_out", {})} for runtime in runtimes)

    def is_done(self, runtimes: list[str]) -> bool:
        """Return whether nothing is left to do."""
        return all(
            self.note(name, "never") or (self.is_made(name) and self.is_timed(name, runtimes)) for name in self.names()
        )


def options_of(place: Place, budgets: list[Budget]) -> Ladder:
    """Return the options of `lfrns slim` that make the checkpoints of some budgets."""
    run = place.run
    return Ladder(
        model=run.model,
        weights=run.weights,
        out=str(place.directory),
        images=run.data.images,
        preprocessing=run.preprocessing,
        machine=Machine(**asdict(run.machine), quiet=True),
        exclude=run.exclude,
        base_model=run.base_model,
        seed=run.seed,
        **asdict(run.training),
        **asdict(run.pruning),
        **{f"latency_{name}": value for name, value in asdict(run.latency).items()},
        called=run.name,
        ladder=budgets,
    )


def main(job: str) -> None:
    """Do a job of `lfrns zoo`: the process that it starts.

    Args:
        job: Path of the file that says which; the process ends when its standard input does, which is its parent.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    content = read_json(job, job)
    sys.argv = ["lfrns", *content["command"]]  # as it stands on the cards
    place = Place(Path(content["out"]), read(Run, content["run"], "run"))
    recipe.run(lambda: sys.exit(run_model(place, content["runtimes"])))


def _end_with_parent() -> None:
    """Wait for the end of standard input, and end at once: what is kept is kept whole at any moment."""
    while os.read(0, 1024):
        pass
    os._exit(1)


def run_model(place: Place, runtimes: list[str]) -> int:
    """Make and time the checkpoints of a model that are missing; returns 1 where one could not be made."""
    names = place.names()
    missing = [
        budget
        for budget, name in zip(place.run.budgets, names, strict=True)
        if not (place.is_made(name) or place.note(name, "never"))
    ]
    failed = _make(place, missing) if missing else {}
    for name in names:
        if place.is_made(name) and not place.is_timed(name, runtimes):
            place.write(f"{name}.timed.json", _time(place, name, runtimes))
    return 1 if failed else 0


def _make(place: Place, budgets: list[Budget]) -> dict[str, str]:
    """Make the checkpoints of some budgets, and note what it took; returns why others were not made, by name."""
    began, asked = time.monotonic(), options_of(place, budgets)
    run = LeftOver(place.directory / "work", vars(asked), afresh=f"Remove {place.directory}")
    attempts, path = 1, place.work / ATTEMPTS
    if run.unfinished:
        run.check()
        attempts += read_json(path, str(path))["attempts"] if path.is_file() else 0
    place.write(ATTEMPTS, {"attempts": attempts})
    directory = recipe.check_output_dir(
        place.directory, resume=run.unfinished, overwrite=not run.unfinished, option="models", several=True
    )
    accelerator = start_accelerator(asked.machine, asked.seed)
    for folder in [directory, *folders_of(asked, directory)]:
        recipe.hold(folder, f"lfrns zoo: {folder}", accelerator)
    made = make(asked, directory, run, accelerator, resume=run.unfinished, tolerant=True)
    took = {"id": new_occasion(), "seconds": time.monotonic() - began, "attempts": attempts}
    took |= {"resident_mib": peak_resident() / 2**20}
    if accelerator.device.type == "cuda":
        took["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    failed = {folder.name: why for folder, why in made.failed.items()}
    place.write(OVER, failed)
    for folder, why in made.out_of_reach.items():
        place.write(f"{folder.name}.never.json", {"why": why})
    for folder in made.results:
        if recipe.is_finished(folder):  # measured too
            place.write(f"{folder.name}.made.json", took)
    accelerator.end_training()
    return failed


def _time(place: Place, name: str, runtimes: list[str]) -> dict[str, Any]:
    """Time a checkpoint beside its dense model, one image a pass."""
    directory = str(place.directory / name)
    path = place.directory / name / "config.json"
    named = place.run.model if kind_of(read_json(path, str(path))) == "own" else None
    device = start_accelerator(Machine(**asdict(place.run.machine))).device
    model = load_slim(directory, named).to(device)
    images = example_input(model)
    dense = (create_skeleton(named) if named else create_base(directory)).to(device, images.dtype)
    found = bench(model, dense, images, batches=[1], runtimes=runtimes)
    ms = {timing.runtime: [timing.dense_ms[0], timing.slim_ms[0]] for timing in found.timings}
    left_out = {what.partition(",")[0]: why for what, why in found.left_out.items()}
    return {"ms": ms, "left_out": left_out}
