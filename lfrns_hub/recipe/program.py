"""Start and end of a recipe, with one line instead of a traceback for bad input."""

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

# Errors that a user can cause and correct; any other is a bug and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, SafetensorError)
_HELD = contextlib.ExitStack()


def run(main: Callable[[], None]) -> None:
    """Run a recipe; bad input ends it with one line and exit code 1 (`LFRNS_TRACEBACK=1` shows the traceback).

    SIGTERM ends it with one line and exit code 143: files saved before are complete. Where `retrain` and `slim` save
    checkpoints, they finish the step and save it first; the exit code is then 0, and the line says how to resume.
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
    """Check on the main process that a folder can be written to, and lock it against other processes until `run` ends.

    Raises:
        BlockingIOError: Another process is writing to the folder.
        OSError: The folder cannot be written to.
    """
    if accelerator.is_main_process:
        _HELD.enter_context(locked(directory, call))


def open_run(args: argparse.Namespace) -> tuple[Path, Any]:
    """Check that a run may write to its folder, and set the seed; nothing is written yet.

    If `--resume` finds the run finished, it is printed (and pushed) again and the program ends, exit code 0.

    Args:
        args: Options of the recipe.
    Returns:
        The output folder, which may not exist, and the Accelerate accelerator of the run.
    Raises:
        FileExistsError, ValueError: As for `check_output_dir` and `check_same_run`.
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
    """Save the checkpoint of a run with its figures and its record, then call `finish`.

    Args:
        args: Options of the recipe.
        accelerator: Accelerator of the run; the main process saves.
        directory: The output folder.
        dense, result, loader: As for `draw_clusters`.
        record: The measurements.
        saving: Options of `lfrns_hub.save`.
    """
    if accelerator.is_main_process:
        draw_clusters(dense, result, loader, directory)
        save(result.model, directory, record=record, **saving)
    finish(directory, accelerator, args.push_to_hub, with_images=args.with_images)


def finish(directory: Path, accelerator: Any, push_to_hub: str | None, *, with_images: bool = False) -> None:
    """End a run whose checkpoint is in its folder: tidy up, print the results, release all processes, push.

    Args:
        directory: The output folder.
        accelerator: Accelerator of the run; the main process does the work, the push last, so that no other waits for
            it.
        push_to_hub: Repo id, or None.
        with_images: Also push the figure of clusters, which shows some of the training images.
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
