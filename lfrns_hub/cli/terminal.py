"""What the commands share: the app, their common arguments, the pictures they read, how they print."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub.analysis import Analysis
from lfrns_hub.checkpoint import kind_of
from lfrns_hub.format.terminal import plain_console
from lfrns_hub.format.untrusted import read_json, short
from lfrns_hub.method.report import SlimResult
from lfrns_hub.pictures import MAX_UNREADABLE
from lfrns_hub.zoo import (
    ImageData,
    check_images,
    create_skeleton,
    guard_against_chance,
    load_data,
    make_transform,
)

app = typer.Typer(
    help="Slim vision models: find redundant units, remove them, retrain. Each command's --help shows examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Model = Annotated[str, typer.Argument(help="timm name, hf-hub:..., transformers repo id, folder, or package.module:fn")]
Folder = Annotated[str, typer.Argument(metavar="DIR", help="folder that lfrns slim wrote")]
Data = Annotated[str, typer.Option("--data", metavar="DIR", help="parquet or image folder, a Hub id, or digits")]
Weights = Annotated[str | None, typer.Option(metavar="FILE", help="of the dense model: safetensors or .pth")]
Batch = Annotated[int, typer.Option(min=1, help="images a step, all processes")]
Labels = Annotated[str | None, typer.Option(help="column of the parquet files (default: fine_label or label)")]
ValSplit = Annotated[float | None, typer.Option(metavar="SHARE", help="of the training pictures, held out to test on")]
ClassMap = Annotated[
    str | None, typer.Option(metavar="FILE", help="names the classes in the model's order, one a line")
]
Mean = Annotated[tuple[float, float, float] | None, typer.Option(help="of the pixels, in place of the model's")]
Std = Annotated[tuple[float, float, float] | None, typer.Option(help="likewise")]
CropPct = Annotated[float | None, typer.Option(help="share of the shorter side in the central crop, likewise")]
Interpolation = Annotated[str | None, typer.Option(help="bilinear, bicubic, ..., likewise")]
Flip = Annotated[bool, typer.Option("--flip/--no-flip", help="mirror half of the training pictures; not digits, signs")]
Unreadable = Annotated[int, typer.Option(min=0, help="damaged pictures of a split that are left out; more: an error")]
Exclude = Annotated[list[str] | None, typer.Option(help="groups to leave alone: a name or glob, repeatable")]
WithImages = Annotated[
    bool, typer.Option("--with-images", help="push clusters.png too, which shows some of your training images")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, and nothing else there")]


def examples(*lines: str) -> str:
    """Return the end of a command's help: lines to copy."""
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


def show(as_json: bool, data: Any, *parts: Any) -> None:
    """Print what a command found: tables and lines for people, or its data as JSON for scripts."""
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
        return
    console = plain_console()  # as wide as the terminal is now
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True)
        else:
            console.print(part)


def layer_table(result: SlimResult) -> Table:
    """Lay out what a latency budget removed from each layer and what that bought."""
    told, fraction = result.report.latency, result.report.latency_fraction
    title = f"{told['dense_ms']:.2f} ms to {told['slim_ms']:.2f} ms, {fraction:.3f} of dense; by layer:"
    table = Table("layer", "dense", "slim", title=title)
    for heading in ("dense, ms", "slim, ms", "bought, ms"):
        table.add_column(heading, justify="right")
    for row in told["layers"]:
        widths = [f"{row[name][0]} to {row[name][1]}" if row[name] else "" for name in ("dense", "slim")]
        ms = (row["dense_ms"], row["slim_ms"], row["dense_ms"] - row["slim_ms"])
        table.add_row(row["layer"], *widths, *(f"{value:.3f}" for value in ms))
    return table


@dataclass(frozen=True)
class Pictures:
    """The data that a command was given."""

    data: str
    label_column: str | None = None
    val_split: float | None = None
    class_map: str | None = None
    flip: bool = True
    max_unreadable: int = MAX_UNREADABLE

    def arguments(self) -> list[str]:
        """Return the options that say the same to another command."""
        given = {
            "--label-column": self.label_column,
            "--val-split": self.val_split,
            "--class-map": self.class_map,
            "--max-unreadable": self.max_unreadable if self.max_unreadable != MAX_UNREADABLE else None,
        }
        return [word for option, value in given.items() if value is not None for word in (option, str(value))]

    def load(
        self, model: nn.Module, split: str, *, augment: bool = False, limit: int | None = None, seed: int = 0
    ) -> ImageData:
        """Load a split, prepared as a model wants its images and labelled as it numbers its classes."""
        transform = make_transform(model, train=augment, flip=self.flip)
        options = {"label_column": self.label_column, "val_split": self.val_split, "class_map": self.class_map}
        options["max_unreadable"] = self.max_unreadable
        return load_data(self.data, split, transform=transform, model=model, limit=limit, seed=seed, **options)


def analyse_pictures(
    dense: nn.Module, pictures: Pictures, *, limit: int, batch_size: int, seed: int, **options: Any
) -> tuple[DataLoader, Analysis]:
    """Analyse a model on some of its training pictures, if they fit it and it does better than chance on them.

    Args:
        dense: The model.
        pictures: The data that the command was given.
        limit: Number of training pictures, drawn with the seed.
        batch_size: Images a batch.
        seed: Of the draw and of the analysis.
        options: For `lfrns_hub.analyse`.
    Returns:
        The calibration batches and the analysis.
    Raises:
        ValueError: The pictures do not fit the model, it answers at chance, or as `lfrns_hub.analyse`.
    """
    loader = DataLoader(pictures.load(dense, "train", limit=limit, seed=seed), batch_size)
    check_images(dense, loader)
    guard_against_chance(dense, loader, pictures.data)
    return loader, lfrns.analyse(dense, loader, seed=seed, **options)


def read_list(text: str, option: str, kind: type) -> list[Any]:
    """Read numbers with commas between them.

    Raises:
        ValueError: One is no number.

    Example:
        >>> read_list("0.75,0.5", "--macs", float)
        [0.75, 0.5]
    """
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(
            f"{option} {text}: numbers with commas between them are needed, as 1,32 or 0.75,0.5."
        ) from error


def read_budgets(text: str) -> list[float]:
    """Read fractions of the MACs to keep, the largest first.

    Raises:
        ValueError: One is no number, or outside (0, 1].
    """
    budgets = read_list(text, "--macs", float)
    for budget in budgets:
        if not 0 < budget <= 1:
            hint = f" For {budget:g} % pass {budget / 100:g}." if 1 < budget <= 100 else ""
            raise ValueError(f"--macs {text}: each fraction of the MACs to keep must be in (0, 1].{hint}")
    return sorted(budgets, reverse=True)


def is_slim(model: str) -> bool:
    """Tell a folder that `lfrns_hub.save` wrote."""
    config = Path(model) / "config.json"
    return config.is_file() and "slim" in read_json(config, model)


def load_slim(directory: str, dense: str | None) -> nn.Module:
    """Load a checkpoint; of a class of one's own by way of the dense model's name.

    Raises:
        ValueError: The folder is no checkpoint, or one that needs the name.
    """
    config = Path(directory) / "config.json"
    stored = read_json(config, directory) if config.is_file() else {}
    if kind_of(stored) != "own":
        return lfrns.load(directory)
    if dense is None:
        kind = short((stored.get("slim") or {}).get("class"))
        raise ValueError(
            f"{directory}: it holds a {kind}, which neither timm nor transformers builds. Name what builds "
            "the dense model, package.module:function, by --dense (of retrain: --teacher)."
        )
    return lfrns.load(directory, model=create_skeleton(dense))
