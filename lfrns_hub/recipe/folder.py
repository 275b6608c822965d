"""The output folder of a run: what may be written there, what `--resume` goes on from, what stays at the end."""

import argparse
import difflib
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from lfrns_hub.recipe.options import CODE
from lfrns_hub.resume import written_aside
from lfrns_hub.untrusted import short

# What may differ between a run and its --resume: where it is told to write, and what comes after it.
_NOT_THE_RUN = {"output_dir", "overwrite", "resume", "push_to_hub", "with_images", "no_controls"}


def check_output_dir(directory: str | Path, *, resume: bool, overwrite: bool) -> Path:
    """Say whether a run may write to a folder, before it does any work. Nothing is written or removed here.

    Args:
        directory: The output folder, there or not.
        resume: What lies there is gone on with.
        overwrite: What lies there may be removed.
    Returns:
        The folder.
    Raises:
        FileExistsError: It holds something, and neither was asked for.
    """
    directory = Path(directory)
    if directory.is_file():
        raise FileExistsError(f"--output-dir {directory}: is a file. Name a folder.")
    if not (resume or overwrite) and directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(
            f"--output-dir {directory}: is not empty. Pass --resume to go on, --overwrite to empty it, or a new folder."
        )
    return directory


def is_finished(directory: Path) -> bool:
    """Say whether a run has ended in this folder: a checkpoint that was put there whole has both of these."""
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
    before, now = json.loads(path.read_text()), _settings(args)
    code, now_code = before.pop(CODE, None), now.pop(CODE, None)
    if code is not None and code != now_code:
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
                f"--resume: the run in {directory} has --{name.replace('_', '-')} {before.get(name)}, this one "
                f"{now.get(name)}. Repeat the options of then, pass --overwrite, or name another --output-dir."
            )


def begin_run(directory: Path, args: argparse.Namespace, accelerator: Any) -> Path:
    """Note a run's options in its folder, just before it writes anything else there; `--overwrite` empties it first.

    Args:
        directory: The output folder, there or not.
        args: What the recipe was told.
        accelerator: Of the run; the main process writes.
    Returns:
        `work/` in the folder: each stage keeps in a folder of its own there what `--resume` goes on from.
    """
    if accelerator.is_main_process:
        if args.overwrite and not args.resume and directory.is_dir():
            shutil.rmtree(directory)
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
    """Give the options that change a run's result; paths in full."""
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
    """Put weights that `save_weights` kept back into a model of the same shape, strictly."""
    safetensors.torch.load_model(model, str(path))
