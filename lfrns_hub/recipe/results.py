"""Results of a recipe's run: controls, the setup of its record, figures, the tables printed at its end."""

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

from lfrns_hub.format.terminal import cell, plain_console, print_table
from lfrns_hub.measure import Record, evaluate, format_table
from lfrns_hub.method.provenance import provenance_of
from lfrns_hub.plots.clusters import plot_clusters
from lfrns_hub.retrain import retrain
from lfrns_hub.runs.progress import about
from lfrns_hub.surgery import cut
from lfrns_hub.units import SlimPlan, UnitGroup

HOMES = ("home", "users")  # parent folders of home folders


def random_plan(plan: SlimPlan, groups: list[UnitGroup], seed: int) -> SlimPlan:
    """Return a plan with the same widths and units drawn at random: the control that a criterion has to beat."""
    draw = random.Random(seed)
    sizes = {group.name: group.size for group in groups}
    return SlimPlan({name: sorted(draw.sample(range(sizes[name]), len(keep))) for name, keep in plan.keep.items()})


def random_cut(dense: nn.Module, plan: SlimPlan, groups: list[UnitGroup], seed: int) -> nn.Module:
    """Cut a dense model by `random_plan`; `retrain` can read its plan from the provenance."""
    drawn = random_plan(plan, groups, seed)
    model = cut(dense, groups, drawn)
    model.lfrns_provenance = {"plan": drawn.keep}
    return model


def make_controls(dense: nn.Module, plan: SlimPlan, groups: list[UnitGroup], seed: int) -> dict[str, nn.Module]:
    """Return the controls of a slim model, to be retrained like it: units drawn at random, and the dense model.

    Args:
        dense: The dense model.
        plan: Plan of the slim model.
        groups: All groups of the dense model.
        seed: Seed of the draw.
    Returns:
        Models by their names in the record.
    """
    drawn = random_cut(dense, plan, groups, seed)
    return {"random plan, same widths, equally retrained": drawn, "dense, retrained as long": copy.deepcopy(dense)}


def control_row(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a record's table of controls from a model's scores by `evaluate`."""
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
    """Retrain the controls like the slim model, and measure them.

    Args:
        dense, plan, groups: As for `make_controls`; its seed is that of the retraining.
        train_loader, test_loader: Images for retraining and for the measurement.
        work: Each control stores the state for `--resume` in its own folder there.
        retraining: Options of `lfrns_hub.retrain`.
    Returns:
        A row of the record's table for each.
    """
    rows = []
    for name, model in make_controls(dense, plan, groups, retraining["seed"]).items():
        short_name = name.partition(",")[0]
        with about(short_name):
            retrain(model, train_loader, checkpoint_dir=work / f"control, {short_name}", **retraining)
            rows.append(control_row(name, evaluate(model, test_loader, accelerator=retraining["accelerator"])))
    return rows


def describe_run(recipe: str) -> dict[str, str | None]:
    """Return how a run was started, for its record.

    Args:
        recipe: The recipe's `__file__`.
    Returns:
        `command`, as typed after `accelerate launch`, with only the last part of absolute paths, because a card is
        public; and `commit` of the checkout, None outside of one.
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
    """Return a word of a command line for the public: of any form of path, only the last part.

    A Hub id is kept, unless a folder here has that name; a home folder becomes ~; a token of the Hub is left out.

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
    """Return the name of a checkpoint's data for its record; a folder's path means nothing to others.

    Args:
        data: A Hub id, or a folder.
    Returns:
        `dataset` (the Hub id, or the folder's own name) and `dataset_id` (the Hub id, None for a folder).
    """
    return {
        "dataset": Path(data).resolve().name if Path(data).exists() else data,
        "dataset_id": None if Path(data).exists() else data,
    }


def draw_clusters(dense: nn.Module, result: Any, loader: Any, directory: Path) -> None:
    """Draw the cluster figure in the checkpoint's folder, for its card; if there is nothing to draw, log why.

    It shows the user's images: this is logged, and `push` sends it only on request.

    Args:
        dense: The dense model.
        result: The result of `slim`.
        loader: The calibration images, which are run once; some of them are shown.
        directory: The output folder, which may not exist.
    """
    directory.mkdir(parents=True, exist_ok=True)
    seed = provenance_of(result.model).get("seed", 0)
    try:
        plot_clusters(dense, result.plan, loader, directory / "clusters.png", seed=seed)
        print("clusters.png shows some of your images; a push leaves it out, but for --with-images.", file=sys.stderr)
    except ValueError as error:  # a missing figure is no reason to lose a trained model
        print(f"No clusters.png. {error}", file=sys.stderr)


def print_results(record: Record, rows: list[dict[str, Any]], where: Path) -> None:
    """Print the results of a finished run, dense against slim and the controls, and the checkpoint's folder."""
    console = plain_console()
    print_table(format_table(record), console)
    if rows:
        controls = Table("beside it", "top-1 %", "images", title="Controls")
        for row in rows:
            controls.add_row(cell(row["name"]), f"{row['top1_pct']:.2f}", str(row["images"]))
        print_table(controls, console)
    console.print(f"Checkpoint: {where}", soft_wrap=True, markup=False)
