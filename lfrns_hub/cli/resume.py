"""What an interrupted command leaves: a folder that `--resume` goes on from, with the options of then."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from lfrns_hub.format.untrusted import read_json, short
from lfrns_hub.runs import remove, written_aside

# Options that may differ from those of the interrupted run: where and how it runs, and what comes after it.
NOT_THE_RUN = {"out", "overwrite", "resume", "push_to_hub", "with_images", "device", "workers", "quiet", "as_json"}
RUN, FINISHED = "run.json", "finished"


class LeftOver:
    """A run of a command in its folder.

    Args:
        directory: The folder, there or not.
        call: Of the command, for errors.
        asked: Its options; bundles are flattened.

    Attributes:
        unfinished, finished: Whether a run was interrupted here, or has ended here.
    """

    def __init__(self, directory: Path, call: str, asked: dict[str, Any]):
        self.directory, self._call, self._path = directory, call, directory / RUN
        self._settings = _flat(asked)
        self._noted: dict[str, Any] = {}
        self.finished = (directory / FINISHED).is_file()
        self.unfinished = self._path.is_file() and not self.finished

    def check(self, *, resume: bool) -> None:
        """Refuse to go on with a run of other options.

        Raises:
            ValueError: An option that changes the result is not what it was, or the note of it is damaged.
        """
        if resume and self.finished and (self.directory / FINISHED).read_text(encoding="utf-8") != self._digest():
            raise ValueError(
                f"--resume: the run in {self.directory.parent} has ended, and had other options. Pass --overwrite to "
                "replace what it made, or name another folder."
            )
        if not (resume and self._path.is_file()):
            return
        before = read_json(self._path, f"--resume: {str(self._path)!r}")
        options = before.get("options")
        self._noted = before.get("noted") if isinstance(before.get("noted"), dict) else {}
        if not isinstance(options, dict):
            raise ValueError(f"--resume: {str(self._path)!r} is damaged. Remove {self.directory}, and start again.")
        for name in sorted(options.keys() | self._settings.keys()):
            if options.get(name) != self._settings.get(name):
                raise ValueError(
                    f"--resume: the run in {self.directory} has --{short(name.replace('_', '-'))} "
                    f"{short(options.get(name))}, this one {short(self._settings.get(name))}. Repeat the options of "
                    "then, or leave --resume out and start again."
                )

    def note(self, name: str, value: int) -> int:
        """Return what the interrupted run noted under a name; of a new one it is noted now."""
        kept = self._noted.get(name)
        self._noted[name] = kept if isinstance(kept, int) else value
        return self._noted[name]

    def begin(self, accelerator: Any, *, resume: bool) -> None:
        """Note the options, just before anything else is written to the folder; the main process does."""
        if accelerator.is_main_process:
            if not resume:
                shutil.rmtree(self.directory, ignore_errors=True)
            with written_aside(self._path) as partial:
                partial.write_text(json.dumps({"options": self._settings, "noted": self._noted}), encoding="utf-8")
        accelerator.wait_for_everyone()

    def finish(self, accelerator: Any) -> None:
        """Remove what a run that ended needs no more, its options too, which name folders; note that it has ended."""
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with written_aside(self.directory / FINISHED) as partial:
                partial.write_text(self._digest(), encoding="utf-8")
            for path in self.directory.iterdir():
                if path.name != FINISHED:
                    remove(path)

    def _digest(self) -> str:
        """Return a hash of the options."""
        return hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode()).hexdigest()

    def remove(self, accelerator: Any) -> None:
        """Remove the folder, and the one above it where nothing else lies there."""
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(self.directory, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.directory.parent.rmdir()


@contextlib.contextmanager
def kept_run(run: LeftOver, accelerator: Any, *, resume: bool) -> Iterator[Path]:
    """Begin or go on with a run in its folder; input that it refuses leaves nothing of a new one there.

    Yields:
        The folder, for the stages.
    """
    run.begin(accelerator, resume=resume)
    try:
        yield run.directory
    except ValueError:
        if not resume and not any(run.directory.glob("retrain*")):  # nothing was trained: an option does not fit
            run.remove(accelerator)
        raise


def _flat(asked: dict[str, Any]) -> dict[str, Any]:
    """Return options as JSON has them, paths in full, without those that may change."""
    flat: dict[str, Any] = {}
    for name, value in asked.items():
        if is_dataclass(value):
            flat |= _flat(vars(value))
        elif name not in NOT_THE_RUN:
            flat[name] = str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value
    return json.loads(json.dumps(flat))
