"""What a recipe tells of its run: controls, the setup of its record, pictures, the tables it ends with."""

import copy
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from lfrns_hub.format.terminal import cell, plain_console
from lfrns_hub.measure import Record, evaluate, format_table
from lfrns_hub.retrain import retrain
from lfrns_hub.surgery import cut
from lfrns_hub.units import SlimPlan, UnitGroup

HOMES = ("home", "users")  # the folders above those that have a person's name


def random_plan(plan: SlimPlan, groups: list[UnitGroup], seed: int) -> SlimPlan:
    """Keep as many units of every group as a plan does, but any: the control that a criterion has to beat."""
    draw = random.Random(seed)
    sizes = {group.name: group.size for group in groups}
    return SlimPlan({name: sorted(draw.sample(range(sizes[name]), len(keep))) for name, keep in plan.keep.items()})


def random_cut(dense: nn.Module, plan: SlimPlan, groups: list[UnitGroup], seed: int) -> nn.Module:
    """Cut a dense model by `random_plan`; `retrain` can read from it which of the dense model's channels it has."""
    drawn = random_plan(plan, groups, seed)
    model = cut(dense, groups, drawn)
    model.lfrns_provenance = {"plan": drawn.keep}
    return model


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
    drawn = random_cut(dense, plan, groups, seed)
    return {"random plan, same widths, equally retrained": drawn, "dense, retrained as long": copy.deepcopy(dense)}


def control_row(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a record's table of controls: what `evaluate` says of a model, by its name."""
    return {"name": name, "top1_pct": scores["top1_pct"], "images": scores["images"], "images_id": scores["images_id"]}


def run_controls(
    dense: nn.Module,
    plan: SlimPlan,
    groups: list[UnitGroup],
    train_loader: Iterable[Any],
    test_loader: Iterable[Any],
    work: Path,
    **retraining: Any,
) -> list[dict[str, Any]]:
    """Retrain the controls as the slim model was, and measure them.

    Args:
        dense, plan, groups: As for `make_controls`; its seed is that of the retraining.
        train_loader, test_loader: Images to retrain and to measure on.
        work: Each keeps in a folder of its own there what `--resume` goes on from.
        retraining: As `lfrns_hub.retrain` takes it.
    Returns:
        A row of the record's table for each.
    """
    rows = []
    for name, model in make_controls(dense, plan, groups, retraining["seed"]).items():
        retrain(model, train_loader, checkpoint_dir=work / f"control, {name.partition(',')[0]}", **retraining)
        rows.append(control_row(name, evaluate(model, test_loader, accelerator=retraining["accelerator"])))
    return rows


def describe_run(recipe: str) -> dict[str, str | None]:
    """Tell how a run was started, for its record.

    Args:
        recipe: The recipe's `__file__`.
    Returns:
        `command`, as typed after `accelerate launch`, but of absolute paths the last part alone, as a card is public;
        and `commit` of the checkout, None outside of one.
    """
    path = Path(recipe)
    return describe_command(f"accelerate launch recipes/{path.name}", path)


def describe_command(program: str, path: Path) -> dict[str, str | None]:
    """Return the command that this process was started with, and the commit of its code, for a record.

    Args:
        program: What was typed before the arguments.
        path: A file of the code.
    Returns:
        `command`, of paths the last part alone; `commit`, None where git does not track the file.
    """
    git = ["git", "-C", str(path.parent)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 10}
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", path.name], **options)
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"command": shlex.join([*program.split(), *map(without_folders, sys.argv[1:])]), "commit": commit}


def without_folders(word: str) -> str:
    """Return a word of a command line as others may see it: of a path, in whatever form, the last part alone.

    A Hub id stays, unless a folder here has that name; a home folder is ~; a token of the Hub is left out.

    Example:
        >>> without_folders("--data-dir=C:\\\\Users\\\\me\\\\photos"), without_folders("local-dir:../me/net")
        ('--data-dir=photos', 'net')
        >>> without_folders("hf-hub:user/name"), without_folders("~me"), without_folders("--macs=0.5")
        ('hf-hub:user/name', '~', '--macs=0.5')
    """
    option, value = re.fullmatch(r"(--?[\w-]+=)?(.*)", word, re.DOTALL).groups(default="")
    hub_id = re.fullmatch(r"(?:hf[-_]hub:)?(\w[\w.-]*/\w[\w.-]*)(?:@[\w.-]+)?", value)
    if not (hub_id and not Path(hub_id[1]).exists()):
        path = re.sub(r"[?#].*|(?<=//)[^/]*@", "", value, flags=re.DOTALL) if "://" in value else value
        *above, last = ["", *filter(None, re.split(r"[/\\]|%2f|%5c", path, flags=re.IGNORECASE))]
        is_home = last.startswith("~") or (above and above[-1].lower() in HOMES)
        value = "~" if is_home else last if last.strip(".") or not value else "."
    return option + re.sub(r"hf_\w{16,}", "hf_...", value)


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


def draw_clusters(dense: nn.Module, result: Any, loader: Any, directory: Path) -> None:
    """Draw the cluster gallery where the checkpoint will lie, for its card; where there is none to draw, say why.

    It shows images of the user's: that is said, and `push` leaves it where it is unless it is asked for.

    Args:
        dense: The dense model.
        result: What `slim` made of it.
        loader: One image of each class is shown.
        directory: The output folder, there or not.
    """
    from lfrns_hub.plots.clusters import choose_images, plot_clusters  # here: matplotlib is slow to import

    directory.mkdir(parents=True, exist_ok=True)
    images = choose_images(loader)
    try:
        plot_clusters(dense, result, images, directory / "clusters.png")
        print("clusters.png shows some of your images; a push leaves it out, but for --with-images.", file=sys.stderr)
    except ValueError as error:  # a picture less is no reason to lose a trained model
        print(f"No clusters.png. {error}", file=sys.stderr)


def print_results(record: Record, rows: list[dict[str, Any]], where: Path) -> None:
    """Print what a finished run measured, dense against slim and the controls, and where the checkpoint lies."""
    console = plain_console()
    console.print(format_table(record))
    if rows:
        controls = Table("beside it", "top-1 %", "images", title="Controls")
        for row in rows:
            controls.add_row(cell(row["name"]), f"{row['top1_pct']:.2f}", str(row["images"]))
        console.print(controls)
    console.print(f"Checkpoint: {where}", soft_wrap=True, markup=False)
