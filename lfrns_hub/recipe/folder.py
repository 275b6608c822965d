"""The output folder of a run: what may be written there, what `--resume` goes on from, what stays at the end."""

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

# What may differ between a run and its --resume: where it is told to write, and what comes after it.
_NOT_THE_RUN = {"output_dir", "overwrite", "resume", "push_to_hub", "with_images", "no_controls"}


def check_output_dir(
    directory: str | Path, *, resume: bool, overwrite: bool, option: str = "--output-dir", several: bool = False
) -> Path:
    """Return whether a run may write to a folder, before it does any work. Nothing is written or removed here.

    Args:
        directory: The output folder, there or not.
        resume: What lies there is gone on with.
        overwrite: A checkpoint or run of ours that lies there may be removed.
        option: What named it.
        several: It is to hold a folder for each of several checkpoints.
    Returns:
        The folder; of a link, what it leads to.
    Raises:
        FileExistsError: It holds something and neither was asked for, or what it holds is not ours.
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
        ways = "--overwrite to replace what we wrote there" if several else "--resume to go on, --overwrite to empty it"
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
    """Return whether a run has ended in this folder: a checkpoint that was put there whole has both of these."""
    return all((directory / name).is_file() for name in ("record.json", "config.json"))


def check_same_run(directory: Path, args: argparse.Namespace) -> None:
    """Refuse to go on with another run than the one that lies in a folder.

    Args:
        directory: The output folder, there or not.
        args: What the recipe was told.
    Raises:
        ValueError: An option that changes the result is not what it was, or the recipe was edited.
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
    """Note a run's options in its folder, just before it writes anything else there.

    `--overwrite` removes the checkpoint and the run of before first; what else lies there stays.

    Args:
        directory: The output folder, there or not.
        args: What the recipe was told.
        accelerator: Of the run; the main process writes.
    Returns:
        `work/` in the folder: each stage keeps in a folder of its own there what `--resume` goes on from.
    """
    if accelerator.is_main_process:
        directory = directory.resolve()
        if args.overwrite and not args.resume and directory.is_dir():
            with locked(directory, f"--output-dir {directory}"), draft_of(directory) as draft:
                put_in_place(draft, directory, is_own)  # nothing, in place of a whole checkpoint
            shutil.rmtree(directory / "work", ignore_errors=True)
        with written_aside(directory / "work" / "run.json") as partial:
            partial.write_text(json.dumps(_settings(args)))
    accelerator.wait_for_everyone()
    return directory / "work"


def tidy(directory: Path) -> None:
    """Remove what a finished run needs no more from `work/`: all but the dense weights and the run's options."""
    for path in (directory / "work").glob("*"):
        if path.is_dir():
            shutil.rmtree(path)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that change a run's result; paths in full."""
    settings = {name: value for name, value in vars(args).items() if name not in _NOT_THE_RUN}
    return {
        name: str(Path(value).resolve()) if name != CODE and isinstance(value, str) and Path(value).exists() else value
        for name, value in settings.items()
    }


def save_weights(model: nn.Module, path: Path, accelerator: Any) -> None:
    """Keep a model's weights for `--resume`, whole or not at all; the main process does, when all have come here."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with written_aside(path) as partial:
            safetensors.torch.save_model(model, str(partial))


def load_weights(model: nn.Module, path: Path) -> None:
    """Put weights that `save_weights` kept back into a model of the same shape, strictly.

    Raises:
        ValueError: They are damaged, or another model's.
    """
    try:
        safetensors.torch.load_model(model, str(path))
    except (SafetensorError, RuntimeError) as error:
        reason = short(" ".join(str(error).split()), 160)
        raise ValueError(f"{str(path)!r}: cannot be loaded ({reason}). Remove it, and it is made again.") from error


def save_trained(model: nn.Module, directory: Path, **options: Any) -> Path:
    """Save a model the moment it is trained; where that fails, among the temporary files, before the error goes on.

    Args:
        model: The model.
        directory, options: As `lfrns_hub.save` takes them.
    Returns:
        The folder.
    Raises:
        ValueError, OSError: As `lfrns_hub.save`.
    """
    try:
        return save(model, directory, **options)
    except Exception:
        rescue = None
        try:
            rescue = Path(tempfile.mkdtemp(prefix="lfrns-"))
            save(model, rescue, **{**options, "record": None})
            print(f"Warning: the trained model could only be saved in {rescue}.", file=sys.stderr)
        except Exception:  # there neither: the first error says what is wrong
            shutil.rmtree(rescue, ignore_errors=True) if rescue else None
        raise
