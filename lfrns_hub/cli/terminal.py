"""Code shared by the commands: the app, their common arguments, their image data, their output."""

import json
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader
from typer import Argument, Option

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

Model = Annotated[str, Argument(help="timm name, hf-hub:..., transformers repo id, folder, or package.module:fn")]
Folder = Annotated[str, Argument(metavar="DIR", help="folder that lfrns slim wrote")]
Dense = Annotated[str | None, Option(metavar="MODEL", help="its dense model, where its files do not name one")]
Weights = Annotated[str | None, Option(metavar="FILE", help="weights of the dense model: safetensors or .pth")]
Batch = Annotated[int, Option(min=1, help="images per step over all processes")]
Flip = Annotated[bool, Option("--flip/--no-flip", help="mirror half of the training images; not for digits or signs")]
Preset = Annotated[Literal["ours", "paper"], Option(help="ours, or paper for the paper's abstract taken literally")]
Calibration = Annotated[int, Option(help="training images that units are ranked by")]
Exclude = Annotated[list[str] | None, Option(help="groups to leave alone: a name or glob, repeatable")]
WithImages = Annotated[
    bool, Option("--with-images", help="push clusters.png too, which shows some of your training images")
]
Json = Annotated[bool, Option("--json", help="one JSON document on stdout, and nothing else there")]
Channels = tuple[float, float, float] | None


def examples(*lines: str) -> str:
    """Return the end of a command's help: lines to copy."""
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


def show(as_json: bool, data: Any, *parts: Any) -> None:
    """Print a command's result: tables and lines for people, or its data as JSON for scripts."""
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
    """Format the removed widths and saved time of each layer under a latency budget."""
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


def bundled(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command in which each parameter that is a dataclass is replaced by one option per field.

    Required options come first in its help; otherwise the order is that of the signature.

    Example:
        >>> def command(*, seed: int = 0, preprocessing: Preprocessing, out: str) -> None: ...
        >>> list(signature(bundled(command)).parameters)
        ['out', 'seed', 'mean', 'std', 'crop_pct', 'interpolation']
    """
    own = signature(command).parameters
    bundles = {name: one.annotation for name, one in own.items() if is_dataclass(one.annotation)}
    fields = {name: signature(bundle).parameters for name, bundle in bundles.items()}
    options = [option for name, one in own.items() for option in fields.get(name, {name: one}).values()]

    @wraps(command)
    def called(**given: Any) -> None:
        made = {name: bundle(**{field: given.pop(field) for field in fields[name]}) for name, bundle in bundles.items()}
        command(**given, **made)

    required_first = sorted(options, key=lambda option: option.default is not Parameter.empty)
    called.__signature__ = Signature([option.replace(kind=Parameter.KEYWORD_ONLY) for option in required_first])
    return called


@dataclass(frozen=True)
class Preprocessing:
    """Pixel options of a command, which override the model's."""

    mean: Annotated[Channels, Option(help="pixel mean per channel, overrides the model's")] = None
    std: Annotated[Channels, Option(help="pixel standard deviation per channel, overrides the model's")] = None
    crop_pct: Annotated[
        float | None, Option(help="share of the shorter side in the central crop, overrides the model's")
    ] = None
    interpolation: Annotated[str | None, Option(help="bilinear, bicubic, ..., overrides the model's")] = None


@dataclass(frozen=True)
class Pictures:
    """Data options of a command."""

    data: Annotated[str, Option("--data", metavar="DIR", help="parquet or image folder, a Hub id, or digits")]
    label_column: Annotated[str | None, Option(help="column in parquet files (default: fine_label or label)")] = None
    val_split: Annotated[float | None, Option(metavar="SHARE", help="share of the training images to test on")] = None
    class_map: Annotated[str | None, Option(metavar="FILE", help="class names in the model's order, one a line")] = None
    max_unreadable: Annotated[
        int, Option(min=0, help="damaged images that may be left out of a split; more are an error")
    ] = MAX_UNREADABLE

    def arguments(self) -> list[str]:
        """Return the same options as arguments of another command."""
        given = {
            "--data": self.data,
            "--label-column": self.label_column,
            "--val-split": self.val_split,
            "--class-map": self.class_map,
            "--max-unreadable": self.max_unreadable if self.max_unreadable != MAX_UNREADABLE else None,
        }
        return [word for option, value in given.items() if value is not None for word in (option, str(value))]

    def load(
        self,
        model: nn.Module,
        split: str,
        *,
        augment: bool = False,
        flip: bool = True,
        limit: int | None = None,
        seed: int = 0,
    ) -> ImageData:
        """Load a split, with the model's image preprocessing and class numbers."""
        options = vars(self) | {"transform": make_transform(model, train=augment, flip=flip), "model": model}
        return load_data(options.pop("data"), split, limit=limit, seed=seed, **options)


def analyse_pictures(
    dense: nn.Module, pictures: Pictures, *, limit: int, batch_size: int, seed: int, **options: Any
) -> tuple[DataLoader, Analysis]:
    """Analyse a model on some of its training images, if they fit it and its accuracy on them is above chance.

    Args:
        dense: The model.
        pictures: The data options of the command.
        limit: Number of training images, drawn with the seed.
        batch_size: Images per batch.
        seed: Seed of the draw and of the analysis.
        options: Options of `lfrns_hub.analyse`.
    Returns:
        The calibration batches and the analysis.
    Raises:
        ValueError: The images do not fit the model, its accuracy is at chance level, or as for `lfrns_hub.analyse`.
    """
    loader = DataLoader(pictures.load(dense, "train", limit=limit, seed=seed), batch_size)
    check_images(dense, loader)
    guard_against_chance(dense, loader, pictures.data)
    return loader, lfrns.analyse(dense, loader, seed=seed, **options)


def read_list(text: str, option: str, kind: type) -> list[Any]:
    """Read numbers separated by commas.

    Raises:
        ValueError: A part is not a number.

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
        ValueError: A part is not a number, or lies outside (0, 1].
    """
    budgets = read_list(text, "--macs", float)
    for budget in budgets:
        if not 0 < budget <= 1:
            hint = f" For {budget:g} % pass {budget / 100:g}." if 1 < budget <= 100 else ""
            raise ValueError(f"--macs {text}: each fraction of the MACs to keep must be in (0, 1].{hint}")
    return sorted(budgets, reverse=True)


def is_slim(model: str) -> bool:
    """Return whether a folder is a checkpoint that `lfrns_hub.save` wrote."""
    config = Path(model) / "config.json"
    return config.is_file() and "slim" in read_json(config, model)


def load_slim(directory: str, dense: str | None) -> nn.Module:
    """Load a checkpoint; a custom class is built by the dense model's name.

    Raises:
        ValueError: The folder is not a checkpoint, or it needs the name.
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
