"""What an interrupted command leaves: a folder that `--resume` goes on from, with the options of then."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from lfrns_hub.format.untrusted import read_json, short
from lfrns_hub.measure import Record
from lfrns_hub.runs import remove, written_aside

# Options that may differ from those of the interrupted run: where and how it runs, and what comes after it.
NOT_THE_RUN = {
    "out", "overwrite", "resume", "push_to_hub", "with_images", "device", "workers", "quiet", "as_json",
    "max_unreadable", "ladder", "log_with",
}  # fmt: skip
PATHS = {"data", "weights", "class_map"}
RUN, FINISHED, BEFORE = "run.json", "finished", "before"
STAGES = ("slim", "train", "retrain", "retrain-*")  # folders of a run, next to its files


class LeftOver:
    """A run of a command in its folder.

    Only the files and folders of runs are ever removed, and a link is not followed.

    Args:
        directory: The folder, there or not.
        asked: The command's options; bundles are flattened.
        afresh: How to start again instead, for errors.

    Attributes:
        unfinished, finished: Whether a run was interrupted here, or has ended here.
        ended_so: Whether it has ended, with these options.

    Raises:
        ValueError: The folder is a link.
    """

    def __init__(self, directory: Path, asked: dict[str, Any], *, afresh: str):
        self.directory, self._path, self._afresh = directory, directory / RUN, afresh
        if directory.is_symlink():
            raise ValueError(f"{directory}: is a link, and runs go on in a folder of their own. Remove it.")
        self._settings = _flat(asked)
        self._noted: dict[str, Any] = {}
        self._is_new = not self._path.is_file()
        self.finished = (directory / FINISHED).is_file()
        self.ended_so = self.finished and (directory / FINISHED).read_text(encoding="utf-8").strip() == self._digest()
        self.unfinished = is_unfinished(directory)

    def check(self) -> None:
        """Refuse to go on with a run of other options.

        Raises:
            ValueError: An option that changes the result is not what it was, or the note of it is damaged.
        """
        if self.finished and not self.ended_so:
            raise ValueError(
                f"--resume: the run in {self.directory} has ended, and had other options. {self._afresh}, or name "
                "another folder."
            )
        if self._is_new:
            return
        before = read_json(self._path, f"--resume: {str(self._path)!r}")
        options, noted = before.get("options"), before.get("noted")
        if not (isinstance(options, dict) and isinstance(noted, dict)):
            raise ValueError(f"--resume: {str(self._path)!r} is no note of such a run. {self._afresh}.")
        self._noted = noted
        for name in sorted(options.keys() | self._settings.keys()):
            if options.get(name) != self._settings.get(name):
                raise ValueError(
                    f"--resume: the run in {self.directory} has --{short(name.replace('_', '-'))} "
                    f"{short(options.get(name))}, this one {short(self._settings.get(name))}. Repeat the options of "
                    f"then, or start again: {self._afresh}."
                )

    def note(self, name: str, value: Any) -> Any:
        """Return what the interrupted run noted under a name, of the same type; of a new one it is noted now."""
        kept = self._noted.get(name)
        self._noted[name] = kept if isinstance(kept, type(value)) else value
        return self._noted[name]

    def refuse_other_data(self, name: str, images: Any) -> None:
        """Refuse to go on with other images than the run began with: their number, names and labels are compared.

        Raises:
            ValueError: They differ.
        """
        asked = range(0, len(images), 1 + len(images) // 10_000)
        names = [images.pictures.name(i) for i in asked] if hasattr(images.pictures, "name") else []
        labels = images.labels if images.labels is not None else []
        told = json.dumps([len(images), names, [str(label) for label in labels], images.class_names])
        digest = hashlib.sha256(told.encode()).hexdigest()
        if self.note(name, digest) != digest:
            raise ValueError(
                f"--resume: the {name} are not those that the run in {self.directory} began with. Give the same data, "
                f"or start again: {self._afresh}."
            )

    def begin(self, accelerator: Any, *, resume: bool) -> None:
        """Note the options, just before anything else is written to the folder; the main process does.

        An earlier run is set aside until `drop_before`, or until `take_back`.
        """
        if accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not resume:
                remove(self.directory / BEFORE)
                earlier = self._own()
                for path in earlier:
                    (self.directory / BEFORE).mkdir(exist_ok=True)
                    path.rename(self.directory / BEFORE / path.name)
            with written_aside(self._path) as partial:
                partial.write_text(json.dumps({"options": self._settings, "noted": self._noted}), encoding="utf-8")
        accelerator.wait_for_everyone()

    def drop_before(self, accelerator: Any) -> None:
        """Remove the run that was there before; the main process does."""
        if accelerator.is_main_process:
            remove(self.directory / BEFORE)

    def take_back(self) -> None:
        """Remove what a new run has written, put back the one before it, and leave no empty folder."""
        if not self._is_new and not (self.directory / BEFORE).is_dir():
            return
        for path in self._own():
            remove(path)
        if (self.directory / BEFORE).is_dir():
            for path in (self.directory / BEFORE).iterdir():
                path.rename(self.directory / path.name)
            (self.directory / BEFORE).rmdir()
        with contextlib.suppress(OSError):  # something else lies there
            self.directory.rmdir()
            self.directory.parent.rmdir()

    def finish(self, accelerator: Any) -> None:
        """Remove what a run that ended needs no more, its options too, which name folders; note that it has ended."""
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with written_aside(self.directory / FINISHED) as partial:
                partial.write_text(self._digest(), encoding="utf-8")
            for path in [*self._own(), self.directory / BEFORE]:
                if path.name != FINISHED:
                    remove(path)

    def _own(self) -> list[Path]:
        """Return the files and folders of a run, first the note that makes it one."""
        named = [self.directory / RUN, self.directory / FINISHED]
        found = [path for path in named if path.is_file()]
        return found + [path for pattern in STAGES for path in sorted(self.directory.glob(pattern))]

    def _digest(self) -> str:
        """Return a hash of the options."""
        return hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode()).hexdigest()


def is_unfinished(directory: Path) -> bool:
    """Return whether a command's run was interrupted in a folder; those of recipes note other things."""
    path = directory / RUN
    if not path.is_file() or (directory / FINISHED).is_file():
        return False
    try:
        return "options" in read_json(path, str(path))
    except ValueError:  # somebody's own file of that name
        return False


def record_of_ended(folder: Path, out: str, *more: str) -> Record:
    """Return the record of a checkpoint whose run has ended.

    Args:
        folder: The checkpoint.
        out: The output folder, as it was given.
        more: Files that it must hold next to its record and weights.
    Raises:
        ValueError: It is not whole any more.
    """
    if not all((folder / name).is_file() for name in ("record.json", "model.safetensors", *more)):
        raise ValueError(
            f"--resume: the run in {out} has ended, but {folder} holds no whole checkpoint any more. Pass --overwrite "
            "to make it again."
        )
    return Record.load(folder / "record.json")


@contextlib.contextmanager
def kept_run(run: LeftOver, accelerator: Any, *, resume: bool) -> Iterator[Path]:
    """Begin or go on with a run in its folder; of a new one that is refused before it trains, nothing stays there.

    Yields:
        The folder, for the stages.
    """
    run.begin(accelerator, resume=resume)
    try:
        yield run.directory
    except ValueError:
        # No process waits here: others may be elsewhere.
        if accelerator.is_main_process and not any(run.directory.glob("*train*")):
            run.take_back()
        raise


def _flat(asked: dict[str, Any]) -> dict[str, Any]:
    """Return options as JSON has them, paths in full, without those that may change."""
    flat: dict[str, Any] = {}
    for name, value in asked.items():
        if is_dataclass(value):
            flat |= _flat(vars(value))
        elif name not in NOT_THE_RUN:
            flat[name] = str(Path(value).resolve()) if name in PATHS and value and Path(value).exists() else value
    return json.loads(json.dumps(flat))
