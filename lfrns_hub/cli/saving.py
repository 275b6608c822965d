"""Trained models, saved the moment they are trained; what is said of them can be said later."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lfrns_hub import recipe
from lfrns_hub.checkpoint import prepared
from lfrns_hub.runs.progress import about


def train_each(
    models: dict[Path, nn.Module], train: Callable[[Path, nn.Module], Any], options: dict[str, Any], accelerator: Any
) -> dict[Path, str]:
    """Train models and save each the moment it is trained; that one fails takes none of the others.

    Before the first batch every one is saved next to its folder, which proves that it can be, and keeps the room on the
    disk until its own weights take it.

    Args:
        models: By their folders.
        train: Trains the model of a folder in place.
        options: For `lfrns_hub.save`.
        accelerator: Of the run; the main process saves.
    Returns:
        Why some failed, by their folders; not of all, and of none on several processes, which have to go on together.
    """
    failed: dict[Path, str] = {}
    with contextlib.ExitStack() as rooms:
        room = {folder: rooms.enter_context(contextlib.ExitStack()) for folder in models}
        for folder, model in models.items() if accelerator.is_main_process else ():
            room[folder].enter_context(prepared(model, folder, **options))
        for folder, model in models.items():
            try:
                with about(folder.name) if len(models) > 1 else contextlib.nullcontext():
                    train(folder, model)
                room[folder].close()
                if accelerator.is_main_process:  # the weights first; what is said of them can be said later
                    recipe.save_trained(model, folder, **options)
            except Exception as error:
                failed[folder] = f"{type(error).__name__}: {error}"
                if len(failed) == len(models) or accelerator.num_processes > 1 or os.environ.get("LFRNS_TRACEBACK"):
                    raise
                print(f"Warning: {folder} was not made. {failed[folder]}", file=sys.stderr)
            accelerator.wait_for_everyone()
    return failed


@contextlib.contextmanager
def described_later(accelerator: Any, folders: Sequence[Path], again: Sequence[list[str]]) -> Iterator[None]:
    """Turn the failure to measure or describe trained models, which are saved, into a warning that says what to call.

    On several processes it stays an error as well: the others wait for what this one does not do any more.

    Args:
        accelerator: Of the run.
        folders: Where the models are saved.
        again: The commands that measure them.
    """
    try:
        yield
    except Exception as error:
        if accelerator.is_main_process:
            calls = "".join(f"\n  {shlex.join(['lfrns', *words])}" for words in again)
            print(
                f"Warning: {type(error).__name__}: {error}\nThe weights are saved in {', '.join(map(str, folders))}, "
                f"but not measured or described. For that:{calls}",
                file=sys.stderr,
            )
        if accelerator.num_processes > 1 or os.environ.get("LFRNS_TRACEBACK"):
            raise
