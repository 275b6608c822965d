"""The output folder of a run: what may be written there, what `--resume` uses, what remains at the end."""

import argparse
import difflib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from lfrns_hub.checkpoint import holds_ours, is_own, refuse_foreign, save
from lfrns_hub.format.untrusted import read_json, short
from lfrns_hub.recipe.options import CODE
from lfrns_hub.runs import draft_of, entries, locked, put_in_place, written_aside

# Options that may differ between a run and its --resume: where to write, and what happens after the run.
_NOT_THE_RUN = {"output_dir", "overwrite", "resume", "push_to_hub", "with_images", "no_controls"}


def check_output_dir(
    directory: str | Path, *, resume: bool, overwrite: bool, option: str = "--output-dir", several: bool = False
) -> Path:
    """Return the folder if a run may write to it; called before any work. Nothing is written or removed here.

    Args:
        directory: The output folder, which may not exist.
        resume: An existing run is resumed.
        overwrite: An existing checkpoint or run of ours may be removed.
        option: The option that named it.
        several: Whether it will have a folder for each of several checkpoints.
    Returns:
        The folder; for a link, its target.
    Raises:
        FileExistsError: It is not empty and neither option was given, or its content is not ours.
    """
    directory = Path(directory)
    named = f"{option} {directory}"
    if directory.is_symlink():
        directory = directory.resolve()
        named += f", a link to {directory},"
    if os.path.lexists(directory) and not directory.is_dir():
        raise FileExistsError(f"{named}: is a file. Name a folder.")
    if not directory.is_dir() or not entries(directory):
        return directory
    if not (resume or overwrite):
        ways = "--resume to go on with an interrupted run, --overwrite to replace what we wrote there"
        raise FileExistsError(f"{named}: is not empty. Pass {ways}, or a new folder.")
    members = [path for path in directory.iterdir() if path.is_dir()] if several else []
    if not resume and not any(map(holds_ours, [directory, *members])):
        raise FileExistsError(
            f"{named}: holds no checkpoint or run of lfrns_hub, and nothing else is overwritten. Name another folder, "
            "or empty it yourself."
        )
    if not several:
        refuse_foreign(directory, named)
    return directory


def is_finished(directory: Path) -> bool:
    """Return whether a run has finished in this folder: only a complete checkpoint has both of these files."""
    return all((directory / name).is_file() for name in ("record.json", "config.json"))


def check_same_run(directory: Path, args: argparse.Namespace) -> None:
    """Refuse to resume a run with other options than those recorded in a folder.

    Args:
        directory: The output folder, which may not exist.
        args: Options of the recipe.
    Raises:
        ValueError: An option that changes the result is different, or the recipe was edited.
    """
    path = directory / "work" / "run.json"
    if not (args.resume and path.is_file()):
        return
    before, now = read_json(path, f"--resume: {str(path)!r}"), _settings(args)
    code, now_code = before.pop(CODE, None), now.pop(CODE, None)
    if isinstance(code, str) and code != now_code:
        edits = difflib.unified_diff(code.splitlines(), now_code.splitlines(), n=0, lineterm="")
        edits = [line for line in edits if not line.startswith(("---", "+++", "@@"))]
        raise ValueError(
            f"--resume: the recipe was edited since the run in {directory} began ({short(' '.join(edits[:2]), 160)}): "
            "what lies there must come of the same code, comments aside. Undo the edit, pass --overwrite, or name "
            "another --output-dir."
        )
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"--resume: the run in {directory} has --{short(name.replace('_', '-'))} {short(before.get(name))}, "
                f"this one {short(now.get(name))}. Repeat the options of then, pass --overwrite, or name another "
                "--output-dir."
            )


def begin_run(directory: Path, args: argparse.Namespace, accelerator: Any) -> Path:
    """Record a run's options in its folder, just before anything else is written there.

    `--overwrite` first removes the earlier checkpoint and run; other files are kept.

    Args:
        directory: The output folder, which may not exist.
        args: Options of the recipe.
        accelerator: Accelerator of the run; the main process writes.
    Returns:
        `work/` in the folder: each stage stores the state for `--resume` in its own folder there.
    """
    if accelerator.is_main_process:
        directory = directory.resolve()
        if args.overwrite and not args.resume and directory.is_dir():
            with locked(directory, f"--output-dir {directory}"), draft_of(directory) as draft:
                put_in_place(draft, directory, is_own)  # an empty draft replaces a whole checkpoint
            shutil.rmtree(directory / "work", ignore_errors=True)
        with written_aside(directory / "work" / "run.json") as partial:
            partial.write_text(json.dumps(_settings(args)))
    accelerator.wait_for_everyone()
    return directory / "work"


def tidy(directory: Path) -> None:
    """Remove files in `work/` that a finished run does not need: all except the dense weights and the run's options."""
    for path in (directory / "work").glob("*"):
        if path.is_dir() and path.name != "further":  # of `lfrns retrain`
            shutil.rmtree(path)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that change a run's result, with full paths."""
    settings = {name: value for name, value in vars(args).items() if name not in _NOT_THE_RUN}
    return {
        name: str(Path(value).resolve()) if name != CODE and isinstance(value, str) and Path(value).exists() else value
        for name, value in settings.items()
    }


def save_weights(model: nn.Module, path: Path, accelerator: Any) -> None:
    """Save a model's weights for `--resume`, completely or not at all; the main process writes after all arrived."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with written_aside(path) as partial:
            safetensors.torch.save_model(model, str(partial))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights from `save_weights` into a model of the same shape, strictly.

    Raises:
        ValueError: They are damaged, or belong to another model.
    """
    try:
        safetensors.torch.load_model(model, str(path))
    except (SafetensorError, RuntimeError) as error:
        reason = short(" ".join(str(error).split()), 160)
        raise ValueError(f"{str(path)!r}: cannot be loaded ({reason}). Remove it, and it is made again.") from error


def save_trained(model: nn.Module, directory: Path, **options: Any) -> Path:
    """Save a model right after training; if that fails, save it among the temporary files and raise the error.

    Args:
        model: The model.
        directory, options: As for `lfrns_hub.save`.
    Returns:
        The folder.
    Raises:
        ValueError, OSError: As for `lfrns_hub.save`.
    """
    try:
        return save(model, directory, **options)
    except Exception:
        rescue = None
        try:
            rescue = Path(tempfile.mkdtemp(prefix="lfrns-"))
            save(model, rescue, **{**options, "record": None})
            print(f"Warning: the trained model could only be saved in {rescue}.", file=sys.stderr)
        except Exception:  # failed there too: the first error states the cause
            shutil.rmtree(rescue, ignore_errors=True) if rescue else None
        raise
