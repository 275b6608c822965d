"""Checkpoints from which a stopped run resumes: written elsewhere and renamed, so that each is complete or missing."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lfrns_hub.runs.atomic import PARTIAL, remove, rename_synced, written_aside
from lfrns_hub.runs.processes import Processes

FORMAT = 1
KEPT = 2  # checkpoints: the last, and the one before
_STATE = "state.json"
_SENTINEL = 0x5EED0F2B2E57A7E  # an unlikely seed


class Stopped(SystemExit):
    """End of a program after a SIGTERM, exit code 0, when everything is saved and the run can be resumed."""


@dataclass
class Position:
    """Position of a training run: total steps done, the epoch (from 0) and its batches done by each process."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


class Checkpoints:
    """The checkpoints of one training run, in one folder that all processes see.

    Args:
        directory: The folder, which may not exist.
        accelerator: Its `save_state` writes model, optimizer, scaler and each process's random states. It has
            prepared the model and the optimizer.
        run: Facts that must be equal for a checkpoint to belong to this run: names to JSON values.
        every: Steps between two checkpoints.
    Raises:
        OSError: The folder cannot be written to.
    """

    def __init__(self, directory: str | os.PathLike, accelerator: Any, run: dict[str, Any], every: int):
        self.directory, self.accelerator, self.every = Path(directory), accelerator, every
        self.processes = Processes(accelerator)
        self.run = json.loads(json.dumps({"format": FORMAT, "processes": self.processes.count, **run}))
        self._call = f"retrain(checkpoint_dir={str(directory)!r})"
        if accelerator.project_configuration.automatic_checkpoint_naming:
            raise ValueError(
                f"{self._call}: the accelerator has automatic_checkpoint_naming and would write elsewhere. "
                "Build it without."
            )
        self._together(self._clear, "the folder cannot be written to", "Name another one.", main_only=True)

    def last(self) -> Path | None:
        """Return the newest complete checkpoint, None if there is none."""
        return max(self._all(), default=None)

    def load(self, scheduler: Any) -> Position:
        """Load the newest checkpoint, in place: model, optimizer, scaler, random states, and a scheduler.

        Returns:
            The position to resume from; the start if there is no checkpoint.
        Raises:
            ValueError: It belongs to another run, or not all processes see it.
            OSError: It cannot be read.
        """
        path = self.last()
        steps = self.processes.gather(int(path.name[5:]) if path else -1)
        if len(set(steps)) > 1:
            raise ValueError(
                f"{self._call}: the processes see different checkpoints there (steps {steps}). Name a folder that all "
                "machines share."
            )
        if path is None:
            return Position()
        saved: dict[str, Any] = {}

        def read() -> None:
            saved.update(json.loads((path / _STATE).read_text()))
            self._refuse_another_run(saved["run"], path)
            if not (path / f"random_states_{self.processes.rank}.pkl").is_file():
                raise FileNotFoundError(f"the random states of process {self.processes.rank} are missing")
            before = torch.default_generator.manual_seed(_SENTINEL).get_state()
            self.accelerator.load_state(str(path))  # by safetensors, and by torch with weights_only
            if torch.equal(torch.get_rng_state(), before):  # Accelerate does not report this
                raise OSError("the random states are no longer what was written")
            scheduler.load_state_dict(saved["scheduler"])

        way_out = f"Remove {path} to go on from the one before it, or the whole folder to start afresh."
        self._together(read, f"{path.name} there cannot be read", way_out)
        return Position(**saved["position"])

    def due(self, position: Position) -> bool:
        """Return whether a checkpoint should be written after this step."""
        return position.step % self.every == 0

    def save(self, position: Position, scheduler: Any) -> None:
        """Write a checkpoint and remove old ones; called by all processes.

        Raises:
            OSError: It could not be written; the previous one is still there.
        """
        path = self.directory / f"step_{position.step:09d}"
        partial = path.with_name(path.name + PARTIAL)
        last = self.last()
        kept = f"The last good one is {last}" if last else "There was none before"
        what = f"the checkpoint of step {position.step} could not be written"
        way_out = f"{kept}. Make room, or name another folder and start afresh."

        def write() -> None:
            self.accelerator.save_state(str(partial))
            if self.processes.is_main:
                state = {"run": self.run, "position": asdict(position), "scheduler": scheduler.state_dict()}
                (partial / _STATE).write_text(json.dumps(state))

        try:
            self._together(partial.mkdir, what, way_out, main_only=True)
            self._together(write, what, way_out)
            self._together(lambda: rename_synced(partial, path), what, way_out, main_only=True)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.processes.is_main:
            for old in self._all()[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)

    def stop(self, position: Position, steps: int) -> None:
        """End the program after a SIGTERM, with exit code 0 and a message; the checkpoint has been written."""
        if self.processes.is_main:
            print(
                f"SIGTERM: stopped after step {position.step} of {steps}, saved in {self.last()}. The same call goes "
                "on from there.",
                file=sys.stderr,
                flush=True,
            )
        raise Stopped(0)

    def _all(self) -> list[Path]:
        """Return the complete checkpoints, the oldest first."""
        return sorted(p for p in self.directory.glob("step_*") if p.suffix != PARTIAL and (p / _STATE).is_file())

    def _clear(self) -> None:
        """Create the folder, check that it can be written to, and remove half-written files."""
        with written_aside(self.directory / "writable") as probe:
            probe.write_text("yes")
        (self.directory / "writable").unlink()
        for path in self.directory.glob(f"*{PARTIAL}"):
            remove(path)

    def _refuse_another_run(self, saved: dict[str, Any], path: Path) -> None:
        """Raise an error if a checkpoint belongs to another run, naming the first difference."""
        for name in sorted(self.run.keys() | saved.keys()):
            ours, theirs = self.run.get(name), saved.get(name)
            if ours == theirs:
                continue
            if isinstance(ours, dict) and isinstance(theirs, dict):
                part = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
                name, ours, theirs = f"{name} {part}", ours.get(part), theirs.get(part)
            raise ValueError(
                f"{self._call}: {path.name} there is of another run: {name} is {theirs} in it, and {ours} now. Go on "
                "with the settings of then, name another folder, or remove this one to start afresh."
            )

    def _together(self, work: Callable[[], None], what: str, way_out: str, *, main_only: bool = False) -> None:
        """Do something on every process, and raise on every one if one has failed, so that none waits forever."""
        # Exception: each library reports a full disk or a damaged file by its own type.
        failed, error = self.processes.attempt(work, Exception, main_only=main_only)
        if not failed:
            return
        if isinstance(error, ValueError) and str(error).startswith(self._call):
            raise error
        reason = str(error).partition("\n")[0] if error else "on another process"
        raise OSError(f"{self._call}: {what} ({reason}). {way_out}") from error


def describe_model(model: nn.Module) -> dict[str, str]:
    """Return the dtype and shape of every parameter and buffer that is saved, by name."""
    return {name: f"{str(t.dtype)[6:]}{list(t.shape)}" for name, t in model.state_dict().items()}


@contextlib.contextmanager
def caught_sigterm() -> Iterator[threading.Event]:
    """Yield an event that is set on SIGTERM, which then does not end the program; only in the main thread."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
    if told.is_set():  # it came after the last check
        signal.raise_signal(signal.SIGTERM)
