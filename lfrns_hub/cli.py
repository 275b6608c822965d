"""The command line, `lfrns`: reads arguments, calls the public functions, prints tables."""

import json
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub import recipe
from lfrns_hub.measure import Record, format_table
from lfrns_hub.pictures import load_processor
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.zoo import (
    check_images,
    create_dense,
    create_skeleton,
    example_input,
    guard_against_chance,
    load_data,
    make_transform,
)

app = typer.Typer(
    help="Slim vision models: find redundant units, remove them, retrain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Model = Annotated[str, typer.Argument(help="timm name, hf-hub:..., transformers repo id, folder, or package.module:fn")]
Data = Annotated[str, typer.Option("--data", help="folder of parquet or image folder, or a Hub id")]
Batch = Annotated[int, typer.Option(help="images a step, all processes")]
Labels = Annotated[str | None, typer.Option(help="column of the parquet files (default: fine_label or label)")]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def demo(context: typer.Context) -> None:
    """Slim a small ViT on handwritten digits: minutes, no network. Takes the options of recipes/vit_digits.py."""
    script = _digits_recipe()
    sys.argv = [str(script), *context.args]
    runpy.run_path(str(script), run_name="__main__")


@app.command()
def units(model: Model) -> None:
    """List what can be removed from a model, and what cannot and why. Needs no weights."""
    network = lfrns.load(model) if _is_slim(model) else create_skeleton(model)
    groups = lfrns.find_units(network, example_input(network))
    table = Table("group", "kind", "units", "exact", "frozen because", title=model)
    for group in groups:
        exact = "yes" if group.exact else "approximate"
        table.add_row(group.name, group.kind, str(group.size), exact, group.frozen_reason or "")
    console.print(table)
    free = [group for group in groups if not group.frozen_reason and group.exact]
    approximate = [group for group in groups if not group.frozen_reason and not group.exact]
    console.print(
        f"{sum(group.size for group in free)} units in {len(free)} groups can go; {len(approximate)} groups are "
        f"approximate, cut only on request; {len(groups) - len(free) - len(approximate)} are frozen."
    )


@app.command()
def slim(
    model: Model,
    data: Data,
    out: Annotated[str, typer.Option(help="output folder")],
    weights: Annotated[str | None, typer.Option(help="of the dense model: safetensors or .pth")] = None,
    macs: Annotated[float | None, typer.Option(help="fraction of the MACs to keep, in (0, 1]")] = None,
    params: Annotated[float | None, typer.Option(help="fraction of the parameters to keep, in (0, 1]")] = None,
    epochs: Annotated[int, typer.Option(help="retraining, with the dense model as teacher")] = 3,
    preset: Annotated[str, typer.Option(help="ours, or paper for the abstract taken literally")] = "ours",
    calibration_images: Annotated[int, typer.Option(help="training images that units are ranked by")] = 2000,
    fcr_steps: Annotated[int, typer.Option(help="training steps of the FCR gates")] = 200,
    exclude: Annotated[list[str] | None, typer.Option(help="groups to leave alone: a name or glob, repeatable")] = None,
    batch_size: Batch = 64,
    label_column: Labels = None,
    seed: int = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a checkpoint in the folder")] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="push the finished checkpoint")] = None,
) -> None:
    """Slim a trained model to a budget, retrain it, measure both, save it with its card."""
    directory = recipe.check_output_dir(out, resume=False, overwrite=overwrite)
    accelerator = make_accelerator(seed=seed)
    dense = create_dense(model, weights=weights)
    calibration, train, test = (
        load_data(
            data,
            split,
            transform=make_transform(dense, train=augment),
            label_column=label_column,
            limit=limit,
            seed=seed,
        )
        for split, augment, limit in (
            ("train", False, calibration_images),
            ("train", True, None),
            ("validation", False, None),
        )
    )
    calibration_loader, test_loader = DataLoader(calibration, batch_size), DataLoader(test, batch_size)
    train_loader = DataLoader(train, max(1, batch_size // accelerator.num_processes), shuffle=True)
    check_images(dense, calibration_loader)
    guard_against_chance(dense, calibration_loader, data)
    result = lfrns.slim(
        dense,
        calibration_loader,
        macs=macs,
        params=params,
        preset=preset,
        fcr_steps=fcr_steps,
        exclude=tuple(exclude or ()),
        accelerator=accelerator,
        seed=seed,
    )
    lfrns.retrain(result.model, train_loader, teacher=dense, epochs=epochs, accelerator=accelerator, seed=seed)
    record = lfrns.measure(result.model, test_loader, dense=dense, accelerator=accelerator)
    record.setup.update(
        recipe.describe_source(data, model),
        calibration_images=len(calibration),
        seed=seed,
        epochs=epochs,
        label_names=test.class_names,
    )
    if accelerator.is_main_process:
        names, processor = test.class_names, load_processor(dense)
        recipe.draw_clusters(dense, result, calibration_loader, directory)
        # The folder was empty, or may be overwritten: that was checked before there was a picture in it.
        lfrns.save(result.model, directory, record=record, processor=processor, label_names=names, overwrite=True)
        recipe.print_results(record, [], directory)
        if push_to_hub:
            console.print(lfrns.push(directory, push_to_hub))
    accelerator.wait_for_everyone()
    accelerator.end_training()


@app.command()
def evaluate(
    directory: Annotated[str, typer.Argument(help="folder that slim wrote")],
    data: Data,
    dense: Annotated[str | None, typer.Option(help="measure this dense model beside it")] = None,
    weights: Annotated[str | None, typer.Option(help="of the dense model")] = None,
    batch_size: Batch = 64,
    label_column: Labels = None,
) -> None:
    """Measure a slim model again, and bring its record and card up to date."""
    model = lfrns.load(directory)
    teacher = create_dense(dense, weights=weights) if dense else None
    images = load_data(data, "validation", transform=make_transform(model, train=False), label_column=label_column)
    loader = DataLoader(images, batch_size)
    check_images(model, loader)
    accelerator = make_accelerator()
    record = lfrns.measure(model, loader, dense=teacher, accelerator=accelerator)
    earlier = Path(directory) / "record.json"
    if earlier.is_file():
        old = Record.load(earlier)
        record.dense = record.dense or old.dense
        record.setup = {**old.setup, **record.setup}
    record.setup.update(dataset=recipe.describe_source(data)["dataset"], label_names=images.class_names)
    if accelerator.is_main_process:
        names, processor = images.class_names, load_processor(model)
        lfrns.save(model, directory, record=record, processor=processor, label_names=names, overwrite=True)
        console.print(format_table(record))


@app.command()
def push(
    directory: Annotated[str, typer.Argument(help="folder that slim wrote")],
    repo: Annotated[str, typer.Argument(help="user/name")],
    private: Annotated[bool, typer.Option("--private", help="create the repository as private")] = False,
) -> None:
    """Push a folder to the Hub, as one commit."""
    console.print(lfrns.push(directory, repo, private=private))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def coverage(context: typer.Context) -> None:
    """Try networks: build, slim, self-check, save, load, compare. Every family, or those named (--help: options)."""
    from lfrns_hub.coverage import main as try_networks

    raise typer.Exit(try_networks(context.args))


def main() -> None:
    """Run the command line; bad input is one line and exit code 1."""
    recipe.run(app)


def _digits_recipe() -> Path:
    """Find the recipe: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    inside, beside = package / "_recipes" / "vit_digits.py", package.parent / "recipes" / "vit_digits.py"
    return inside if inside.is_file() else beside


def _is_slim(model: str) -> bool:
    """Tell a folder that `lfrns_hub.save` wrote."""
    config = Path(model) / "config.json"
    return config.is_file() and "slim" in json.loads(config.read_text(encoding="utf-8"))
