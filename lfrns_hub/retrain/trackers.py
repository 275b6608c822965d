"""Logs of a training by Accelerate's trackers, in a folder; CSV files are ours.

Imported only where a run is logged: accelerate takes long to import.
"""

import contextlib
import csv
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType, ProjectConfiguration

from lfrns_hub.runs import written_aside


class CsvTracker(GeneralTracker):
    """A tracker that writes a CSV file for each training: a row each time, a column a figure, empty without one.

    Args:
        folder: Folder of the files, which may not exist.
    """

    name = "csv"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, folder: Path):
        super().__init__()
        self._folder, self._path = folder, folder
        self._columns: list[str] = []
        self._is_open = False

    @property
    def tracker(self) -> Path:
        """The file."""
        return self._path

    def open(self, name: str) -> None:
        """Start the file of a training, or go on with the one of that name."""
        self._path, self._columns, self._is_open = self._folder / f"{name}.csv", [], False

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Add a row; those of the same step and later, which an interrupted training added, are removed first."""
        added = not self._is_open or values.keys() - set(self._columns)
        if added:
            rows = [row for row in self._read() if self._is_open or int(row["step"]) < step]
            self._columns = list(dict.fromkeys(["step", *(rows[0] if rows else ()), *self._columns, *values]))
            self._write(rows)
            self._is_open = True
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow({"step": step, **values})

    def _read(self) -> list[dict[str, str]]:
        """Return the rows of the file."""
        if not self._path.is_file():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]

    def _write(self, rows: list[dict[str, str]]) -> None:
        """Write the file anew, with all columns."""
        with written_aside(self._path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)


def tracking(name: str, folder: Path) -> dict[str, Any]:
    """Return the arguments by which `make_accelerator` builds an accelerator that logs to a folder.

    Args:
        name: tensorboard, trackio or csv.
        folder: Folder of the logs, which may not exist. Of trackio, TRACKIO_DIR has priority.
    Raises:
        ValueError: This accelerate does not know the tracker.
    """
    if name == CsvTracker.name:
        return {"log_with": CsvTracker(folder)}
    if name not in LoggerType.list():
        raise ValueError(
            f"--log-with {name}: accelerate {accelerate.__version__} does not know it. pip install --upgrade "
            "accelerate, or pass --log-with csv."
        )
    if name == "trackio":
        os.environ.setdefault("TRACKIO_DIR", str(folder.resolve()))
    return {"log_with": name, "project_config": ProjectConfiguration(str(folder.parent), logging_dir=str(folder))}


def free_name(folder: Path, name: str) -> str:
    """Return the name of a new log: the given one, or with a number that no log in the folder has.

    Example:
        >>> free_name(Path("nowhere"), "retrain")
        'retrain'
    """
    taken = {path.name.removesuffix(".csv") for path in folder.iterdir()} if folder.is_dir() else set()
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


@contextlib.contextmanager
def logged(accelerator: Any, project: str, name: str, *, resume: bool) -> Iterator[Callable[..., None]]:
    """Log a training by an accelerator's trackers.

    Args:
        accelerator: Built with `tracking`.
        project: Name of the run, for trackers that show several.
        name: Name of the training in it.
        resume: Whether it goes on with the log of this name.
    Yields:
        What `retrain(tracker=)` takes.
    """
    is_trackio = "trackio" in map(str, accelerator.log_with)
    for tracker in accelerator.log_with:
        if isinstance(tracker, CsvTracker):
            tracker.open(name)
    options = {"trackio": {"name": name, "resume": "allow" if resume else "never"}}
    with contextlib.redirect_stdout(sys.stderr):  # trackio greets, and stdout may be JSON alone
        accelerator.init_trackers(project if is_trackio else name, init_kwargs=options)
    try:
        yield accelerator.log
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            for tracker in accelerator.trackers:
                tracker.finish()
        accelerator.trackers = []
