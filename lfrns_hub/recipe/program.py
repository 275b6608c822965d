"""How a recipe begins and ends, and one line instead of a traceback for bad input."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from lfrns_hub.checkpoint import save
from lfrns_hub.format.untrusted import short
from lfrns_hub.hub import push
from lfrns_hub.measure import Record, comparable_controls
from lfrns_hub.method.report import SlimResult
from lfrns_hub.recipe.folder import check_output_dir, check_same_run, is_finished, tidy
from lfrns_hub.recipe.results import draw_clusters, print_results
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.runs import locked
from lfrns_hub.runs.checkpoints import Stopped

# What a user can cause and mend; anything else is a bug and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, SafetensorError)
_HELD = contextlib.ExitStack()


def run(main: Callable[[], None]) -> None:
    """Run a recipe; bad input ends it with one line and exit code 1 (`LFRNS_TRACEBACK=1` shows where).

    SIGTERM ends it with one line and exit code 143: what was kept in files is whole. Where `retrain` and `slim` keep
    checkpoints, they finish the step and keep it first; the exit code is then 0, and the line says how to go on.
    Ctrl-C does the same, with exit code 130; a second one ends the program at once.
    """

    def tell(line: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(line, file=sys.stderr, flush=True)

    def stop(*_: Any) -> None:
        tell("SIGTERM: stopped. What was kept before is there still; what was being done is not.")
        sys.exit(128 + signal.SIGTERM)

    interrupted = []

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupted.append(True)
        tell("Interrupted: what can be kept is being kept. Once more stops at once.")
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    before_interrupt = signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except Stopped:
        tell("The same command with --resume goes on from there.")
        if interrupted:
            sys.exit(128 + signal.SIGINT)
        raise
    except SystemExit as ended:
        if interrupted and ended.code == 128 + signal.SIGTERM:
            sys.exit(128 + signal.SIGINT)
        raise
    except KeyboardInterrupt:
        tell("Stopped at once. What was kept before is there still; what was being done is not.")
        sys.exit(128 + signal.SIGINT)
    except _USER_ERRORS as error:
        if os.environ.get("LFRNS_TRACEBACK"):
            raise
        tell(f"{type(error).__name__}: {error}")
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_interrupt)
        _HELD.close()


def hold(directory: Path, call: str, accelerator: Any) -> None:
    """See that a folder can be written to, and keep other processes from it until `run` ends; the main process does.

    Raises:
        BlockingIOError: Another process is writing to it.
        OSError: It cannot be written to.
    """
    if accelerator.is_main_process:
        _HELD.enter_context(locked(directory, call))


def open_run(args: argparse.Namespace) -> tuple[Path, Any]:
    """See that a run may write where it is told to, and set the seed; nothing is written yet.

    Where `--resume` finds the run finished, it is printed (and pushed) once more and the program ends, exit code 0.

    Args:
        args: What the recipe was told.
    Returns:
        The output folder, there or not, and the Accelerate accelerator of the run.
    Raises:
        FileExistsError, ValueError: As `check_output_dir` and `check_same_run`.
    """
    from accelerate.utils import set_seed

    directory = check_output_dir(args.output_dir, resume=args.resume, overwrite=args.overwrite)
    accelerator = make_accelerator(seed=args.seed)
    hold(directory, f"--output-dir {args.output_dir}", accelerator)
    check_same_run(directory, args)
    if args.resume and is_finished(directory):
        finish(directory, accelerator, args.push_to_hub, with_images=args.with_images)
        raise SystemExit(0)
    set_seed(args.seed)
    return directory, accelerator


def publish(
    args: argparse.Namespace,
    accelerator: Any,
    directory: Path,
    dense: nn.Module,
    result: SlimResult,
    loader: Any,
    record: Record,
    saving: dict[str, Any],
) -> None:
    """Save the checkpoint of a run with its pictures and its record, then `finish`.

    Args:
        args: What the recipe was told.
        accelerator: Of the run; the main process saves.
        directory: The output folder.
        dense, result, loader: As `draw_clusters` takes them.
        record: What was measured.
        saving: For `lfrns_hub.save`.
    """
    if accelerator.is_main_process:
        draw_clusters(dense, result, loader, directory)
        save(result.model, directory, record=record, **saving)
    finish(directory, accelerator, args.push_to_hub, with_images=args.with_images)


def finish(directory: Path, accelerator: Any, push_to_hub: str | None, *, with_images: bool = False) -> None:
    """End a run whose checkpoint lies in its folder: tidy up, print what was measured, let all processes go, push.

    Args:
        directory: The output folder.
        accelerator: Of the run; the main process does it, the push last, for which no other has to wait.
        push_to_hub: Repo id, or None.
        with_images: Push the picture of clusters as well, which shows some of the training images.
    """
    main_process = accelerator.is_main_process
    if main_process:
        path = directory / "record.json"
        record = Record.load(path)
        try:
            print_results(record, comparable_controls(asdict(record)), directory)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = short(f"{type(error).__name__}: {error}", 120)
            raise ValueError(
                f"{str(path)!r} is damaged ({reason}). Remove it, and the run is measured again."
            ) from error
        tidy(directory)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if main_process and push_to_hub:
        print(push(directory, push_to_hub, with_images=with_images))
