"""What the recipes share: their options, the output folder, and one line instead of a traceback for bad input."""

import argparse
import ast
import copy
import difflib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lfrns_hub.batches import iterate
from lfrns_hub.hub import push
from lfrns_hub.measure import Record, format_table
from lfrns_hub.resume import written_aside
from lfrns_hub.retrain import make_accelerator, set_seed
from lfrns_hub.surgery import cut
from lfrns_hub.units import SlimPlan, UnitGroup
from lfrns_hub.untrusted import short

# What a user can cause and mend; anything else is a bug and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
# What may differ between a run and its --resume: where it is told to write, and what comes after it.
_CODE = "code_of_the_recipe"  # among a run's options, though no one types it
_NOT_THE_RUN = {"output_dir", "overwrite", "resume", "push_to_hub", "no_controls"}


def kept_fraction(text: str) -> float:
    """Read a budget from the command line.

    Args:
        text: What stands after `--macs` or `--params`.
    Returns:
        The fraction of the dense model's to keep, in (0, 1].
    Raises:
        argparse.ArgumentTypeError: No number, or outside (0, 1].

    Example:
        >>> kept_fraction("0.5")
        0.5
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: the fraction to keep must be in (0, 1]. For 50 % pass 0.5.")
    return value


def whole_number(least: int, example: str) -> Callable[[str], int]:
    """Make what reads a count from the command line.

    Args:
        least: The smallest count allowed.
        example: What to pass instead, as the error's last sentence.
    Returns:
        Function of the text that gives the count, or raises argparse.ArgumentTypeError.

    Example:
        >>> whole_number(0, "0 skips it.")("3")
        3
    """

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: a whole number, {least} or more, is needed. {example}")
        return int(text)

    return read


def recipe_parser(
    description: str,
    *,
    path: str | os.PathLike,
    model: str | None,
    macs: float,
    epochs: int,
    batch_size: int,
    dense_epochs: int | None,
) -> argparse.ArgumentParser:
    """Build the command line that all recipes have; a recipe adds what is its own.

    Args:
        description: The recipe's docstring.
        path: The recipe's `__file__`; the default output folder is `out/<its name>`. What stands there is an option of
            the run: `--resume` refuses a recipe that was edited meanwhile.
        model: Default of `--model`; None where the recipe builds its own.
        macs: Default of `--macs`, the fraction kept.
        epochs: Default of `--epochs`, retraining after slimming.
        batch_size: Default of `--batch-size`, images per step over all processes.
        dense_epochs: Default of `--dense-epochs`; None where the model decides.
    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", default=None, help="folder of parquet with the Hub's columns, or an image folder")
    add("--model", default=model, help=f"name, repo id or folder of the dense model (default: {model or 'its own'})")
    add("--macs", type=kept_fraction, default=macs, help="fraction of the MACs to keep (default: %(default)s)")
    add(
        "--epochs",
        type=whole_number(0, "0 skips it."),
        default=epochs,
        help="retraining after slimming (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=whole_number(1, "64 is usual."),
        default=batch_size,
        help="images a step, all processes (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add(
        "--dense-epochs",
        type=whole_number(0, "0 skips it."),
        default=dense_epochs,
        help="training of the dense model (default: %(default)s)",
    )
    add("--output-dir", default=f"out/{Path(path).stem}", help="(default: %(default)s)")
    add("--overwrite", action="store_true", help="empty the output folder first")
    add("--resume", action="store_true", help="go on where a run stopped; nothing to do where all is done")
    add("--push-to-hub", default=None, metavar="REPO", help="push the finished checkpoint, e.g. user/name")
    add("--smoke", action="store_true", help="the whole way in under a minute, on a slice; figures mean nothing")
    parser.set_defaults(**{_CODE: _code_of(Path(path))})
    return parser


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
    code, now_code = before.pop(_CODE, None), now.pop(_CODE, None)
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
    directory = check_output_dir(args.output_dir, resume=args.resume, overwrite=args.overwrite)
    accelerator = make_accelerator(seed=args.seed)
    check_same_run(directory, args)
    if args.resume and is_finished(directory):
        finish(directory, accelerator, args.push_to_hub)
        raise SystemExit(0)
    set_seed(args.seed)
    return directory, accelerator


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
        name: str(Path(value).resolve()) if name != _CODE and isinstance(value, str) and Path(value).exists() else value
        for name, value in settings.items()
    }


def _code_of(path: Path) -> str:
    """Give what a file does: its code without comments, layout and the docstring on top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.unparse(tree)


def save_weights(model: nn.Module, path: Path, accelerator: Any) -> None:
    """Keep a model's weights for `--resume`, whole or not at all; the main process does, when all have come here."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with written_aside(path) as partial:
            safetensors.torch.save_model(model, str(partial))


def load_weights(model: nn.Module, path: Path) -> None:
    """Put weights that `save_weights` kept back into a model of the same shape, strictly."""
    safetensors.torch.load_model(model, str(path))


def run(main: Callable[[], None]) -> None:
    """Run a recipe; bad input ends it with one line and exit code 1 (`LFRNS_TRACEBACK=1` shows where).

    SIGTERM ends it with one line and exit code 0: what was kept in files is whole. While a model trains, `retrain` and
    `slim` finish the step and keep it first.
    """

    def stop(*_: Any) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("SIGTERM: stopped. What was kept before is there still.", file=sys.stderr, flush=True)
        sys.exit(0)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except _USER_ERRORS as error:
        if os.environ.get("LFRNS_TRACEBACK"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def describe_run(recipe: str) -> dict[str, str | None]:
    """Tell how a run was started, for its record.

    Args:
        recipe: The recipe's `__file__`.
    Returns:
        `command`, as typed after `accelerate launch`, but of absolute paths the last part alone, as a card is public;
        and `commit` of the checkout, None outside of one.
    """
    path = Path(recipe)
    git = ["git", "-C", str(path.parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    typed = [re.sub(r"^(--[\w-]+=)?/(?:.*/)?([^/]+)/*$", r"\1\2", word) for word in sys.argv[1:]]
    return {"command": shlex.join(["accelerate", "launch", f"recipes/{path.name}", *typed]), "commit": commit}


def random_plan(plan: SlimPlan, groups: list[UnitGroup], seed: int) -> SlimPlan:
    """Keep as many units of every group as a plan does, but any: the control that a criterion has to beat."""
    draw = random.Random(seed)
    sizes = {group.name: group.size for group in groups}
    return SlimPlan({name: sorted(draw.sample(range(sizes[name]), len(keep))) for name, keep in plan.keep.items()})


def make_controls(dense: nn.Module, plan: SlimPlan, groups: list[UnitGroup], seed: int) -> dict[str, nn.Module]:
    """Make what a slim model has to beat, each to be retrained as it was: units drawn at random, and the dense model.

    Args:
        dense: The dense model.
        plan: That of the slim one.
        groups: All of the dense model's.
        seed: Of the draw.
    Returns:
        Models by the names under which a record tells of them.
    """
    drawn = cut(dense, groups, random_plan(plan, groups, seed))
    return {"random plan, same widths, equally retrained": drawn, "dense, retrained as long": copy.deepcopy(dense)}


def control_row(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """Give the row of a record's table of controls: what `evaluate` says of a model, by its name."""
    return {"name": name, "top1_pct": scores["top1_pct"], "images": scores["images"]}


def draw_clusters(dense: nn.Module, result: Any, loader: Any, directory: Path) -> None:
    """Draw the cluster gallery where the checkpoint will lie, for its card; where there is none to draw, say why.

    Args:
        dense: The dense model.
        result: What `slim` made of it.
        loader: Images of its first batch are shown.
        directory: The output folder, there or not.
    """
    from lfrns_hub.gallery import plot_clusters  # here: matplotlib is slow to import

    directory.mkdir(parents=True, exist_ok=True)
    images, _ = next(iterate(loader))
    (directory / "clusters.png").unlink(missing_ok=True)  # it may be a link to elsewhere
    try:
        plot_clusters(dense, result, images, directory / "clusters.png")
    except ValueError as error:  # a picture less is no reason to lose a trained model
        print(f"No clusters.png. {error}", file=sys.stderr)


def finish(directory: Path, accelerator: Any, push_to_hub: str | None) -> None:
    """End a run whose checkpoint lies in its folder: tidy up, print what was measured, let all processes go, push.

    Args:
        directory: The output folder.
        accelerator: Of the run; the main process does it, the push last, for which no other has to wait.
        push_to_hub: Repo id, or None.
    """
    main_process = accelerator.is_main_process
    if main_process:
        tidy(directory)
        record = Record.load(directory / "record.json")
        print_results(record, record.setup["controls"], directory)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if main_process and push_to_hub:
        print(push(directory, push_to_hub))


def print_results(record: Record, rows: list[dict[str, Any]], where: Path) -> None:
    """Print what a finished run measured, dense against slim and the controls, and where the checkpoint lies."""
    console = Console()
    console.print(format_table(record))
    if rows:
        controls = Table("beside it", "top-1 %", "images", title="Controls")
        for row in rows:
            controls.add_row(row["name"], f"{row['top1_pct']:.2f}", str(row["images"]))
        console.print(controls)
    console.print(f"Checkpoint: {where}", soft_wrap=True)


def describe_data(data: str) -> dict[str, str | None]:
    """Name the data of a checkpoint, for its record; the path of a folder says nothing to others.

    Args:
        data: A Hub id, or a folder.
    Returns:
        `dataset` (the Hub id, or the folder's own name) and `dataset_id` (the Hub id, None of a folder).
    """
    return {
        "dataset": Path(data).resolve().name if Path(data).exists() else data,
        "dataset_id": None if Path(data).exists() else data,
    }
