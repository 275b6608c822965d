"""Commands that make a slim checkpoint: demo, slim, retrain."""

import argparse
import contextlib
import json
import os
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn
from torch.utils.data import DataLoader
from typer import Option

import lfrns_hub as lfrns
from lfrns_hub import recipe
from lfrns_hub.checkpoint import prepared
from lfrns_hub.cli.dense_again import remember_dense
from lfrns_hub.cli.judge import dense_beside, earlier_record, refresh
from lfrns_hub.cli.terminal import (
    Batch,
    Calibration,
    Exclude,
    Flip,
    Folder,
    Json,
    Model,
    Pictures,
    Preprocessing,
    Preset,
    Weights,
    WithImages,
    analyse_pictures,
    app,
    bundled,
    examples,
    layer_table,
    load_slim,
    read_budgets,
    show,
)
from lfrns_hub.hub.index import checkpoint_name, write_index
from lfrns_hub.measure import Record, format_table, main_figure, measure_each
from lfrns_hub.pictures import load_processor
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.zoo import check_images, create_dense, set_preprocessing

Epochs = Annotated[int, Option(min=0, help="epochs of retraining with the dense model as teacher")]
Rate = Annotated[float | None, Option(help="peak learning rate (default: 0.01 with SGD, 1e-4 with AdamW)")]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def demo(context: typer.Context) -> None:
    """Slim a small ViT on handwritten digits: minutes, no network. Takes recipes/vit_digits.py's options and --json."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    own, rest = parser.parse_known_args(context.args)
    script = _digits_recipe()
    sys.argv = [str(script), *rest]
    try:
        with contextlib.redirect_stdout(sys.stderr) if own.json else contextlib.nullcontext():
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:  # a run that --resume finds finished, or that SIGTERM stopped
        if ended.code:
            raise
    parser.add_argument("--output-dir", default="out/vit_digits")
    record = Path(parser.parse_known_args(rest)[0].output_dir) / "record.json"
    if own.json and record.is_file():
        print(record.read_text(encoding="utf-8"), end="")


@app.command(
    epilog=examples(
        "lfrns slim resnet50 --weights my.pth --data DIR --val-split 0.1 --macs 0.5 --epochs 10 --out slim/",
        "lfrns slim resnet50.a1_in1k --data DIR --macs 0.75,0.5,0.35 --out zoo/",
        "lfrns slim resnet50.a1_in1k --data DIR --latency 0.5 --latency-threads 4 --out fast/",
        "accelerate launch -m lfrns_hub slim google/vit-base-patch16-224 --data DIR --macs 0.5 --out slim/",
    )
)
@bundled
def slim(
    *,
    model: Model,
    weights: Weights = None,
    macs: Annotated[
        str | None, Option(help="fraction of the MACs to keep, in (0, 1]; several make a folder of checkpoints")
    ] = None,
    params: Annotated[float | None, Option(help="fraction of the parameters to keep, in (0, 1]")] = None,
    latency: Annotated[
        float | None, Option(help="fraction of the time of a forward pass to keep, in (0, 1], measured here")
    ] = None,
    latency_batch: Annotated[int, Option(min=1, help="images in a timed pass")] = 1,
    latency_threads: Annotated[int | None, Option(min=1, help="CPU threads of a timed pass (default: all)")] = None,
    latency_compile: Annotated[bool, Option("--latency-compile", help="time the model under torch.compile")] = False,
    epochs: Epochs = 3,
    learning_rate: Rate = None,
    preset: Preset = "ours",
    calibration_images: Calibration = 2000,
    fcr_steps: Annotated[int, Option(help="training steps of the FCR gates")] = 200,
    exclude: Exclude = None,
    batch_size: Batch = 64,
    pictures: Pictures,
    preprocessing: Preprocessing,
    flip: Flip = True,
    seed: int = 0,
    out: Annotated[str, Option(metavar="DIR", help="output folder")],
    overwrite: Annotated[bool, Option("--overwrite", help="replace a checkpoint in the folder")] = False,
    push_to_hub: Annotated[
        str | None, Option(metavar="REPO", help="repository for the finished checkpoint; for several the user alone")
    ] = None,
    with_images: WithImages = False,
    as_json: Json = False,
) -> None:
    """Slim a trained model to a budget, retrain it, measure both, save it with its card.

    Several budgets share one analysis; each gets a folder of its own, named as on the Hub, under one README.
    """
    budgets: list[float | None] = read_budgets(macs) if macs is not None else [None]
    several = len(budgets) > 1
    directory = recipe.check_output_dir(out, resume=False, overwrite=overwrite, option="--out", several=several)
    if macs is None and params is None and latency is None:
        raise ValueError(
            "lfrns slim: --macs, --params or --latency must say how much to keep. For half of the MACs: --macs 0.5."
        )
    for option, value, what in (("--params", params, "parameters"), ("--latency", latency, "time of a forward pass")):
        if value is not None and not 0 < value <= 1:
            raise ValueError(
                f"{option} {value}: the fraction of the {what} to keep must be in (0, 1]. For 50 % pass 0.5."
            )
    if several and push_to_hub and "/" in push_to_hub:
        raise ValueError(
            f"--push-to-hub {push_to_hub}: {len(budgets)} budgets make as many repositories, named as their folders. "
            "Give the user or the organisation alone."
        )
    accelerator = make_accelerator(seed=seed)
    progress, main_process = not as_json, accelerator.is_main_process
    names = [checkpoint_name(model, pictures.data, budget) if several else "" for budget in budgets]
    folders = [directory / name for name in names]
    for folder in folders:
        recipe.hold(folder, f"--out {out}", accelerator)
    dense = create_dense(model, weights=weights)
    set_preprocessing(dense, **vars(preprocessing))
    train, test = pictures.load(dense, "train", augment=True, flip=flip), pictures.load(dense, "validation")
    test_loader = DataLoader(test, batch_size)
    train_loader = DataLoader(train, max(1, batch_size // accelerator.num_processes), shuffle=True)

    asked = {"preset": preset, "exclude": tuple(exclude or ()), "accelerator": accelerator, "progress": progress}
    calibration_loader, analysis = analyse_pictures(
        dense, pictures, limit=calibration_images, batch_size=batch_size, seed=seed, **asked
    )
    # All cuts come before any training: a budget out of reach is detected within minutes.
    timed: dict[str, Any] = {"latency": latency}
    if latency is not None:
        timed["latency_setup"] = lfrns.LatencySetup(
            batch=latency_batch, threads=latency_threads, compile=latency_compile
        )
    results = [analysis.cut(macs=budget, params=params, **timed, fcr_steps=fcr_steps) for budget in budgets]
    options = {"processor": load_processor(dense), "label_names": test.class_names or None, "overwrite": True}
    if main_process:
        remember_dense(dense, model, weights)
    training = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed, "progress": progress}
    training |= {"teacher": dense, "accelerator": accelerator}
    failed = train_each(
        {folder: result.model for folder, result in zip(folders, results, strict=True)},
        lambda narrow: lfrns.retrain(narrow, train_loader, **training),
        options,
        accelerator,
    )
    made = [(n, f, r) for n, f, r in zip(names, folders, results, strict=True) if f not in failed]
    names, folders, results = map(list, zip(*made, strict=True))

    again = [*pictures.arguments(), "--dense", model, *(["--weights", weights] if weights else [])]
    records: dict[str, Record] = {}
    index: list[str] = []
    with described_later(accelerator, folders, again):
        models = {name or "slim": result.model for name, result in zip(names, results, strict=True)}
        records = measure_each(models, test_loader, dense=dense, accelerator=accelerator, progress=progress)
        told = {
            **recipe.describe_data(pictures.data),
            "calibration_images": len(calibration_loader.dataset),
            "seed": seed,
            "epochs": epochs,
            "val_split": pictures.val_split,
            "label_names": test.class_names or None,
        }
        if several:
            told["budgets"] = [
                {
                    "macs_fraction": record.slim["macs_g"] / record.dense["macs_g"],
                    **{
                        key: record.slim.get(key)
                        for key in ("output", main_figure(record.slim).key, "latency_ms", "occasion")
                    },
                }
                for record in records.values()
            ]
        for folder, result, record in zip(folders, results, records.values(), strict=True):
            record.setup.update(told)
            if main_process:
                recipe.draw_clusters(dense, result, calibration_loader, folder)
                lfrns.save(result.model, folder, record=record, **options)
                if progress:
                    recipe.print_results(record, [], folder)
                    if result.report.latency:
                        show(False, None, layer_table(result))
        if several and main_process:
            index = [f"Compared in {write_index(directory, f'{Path(model).name}, at several budgets')}"]
    accelerator.wait_for_everyone()
    if main_process:
        urls = [
            lfrns.push(folder, f"{push_to_hub}/{folder.name}" if several else push_to_hub, with_images=with_images)
            for folder in folders
            if push_to_hub
        ]
        found = [{"directory": str(folder)} for folder in folders]
        for row, record in zip(found, records.values(), strict=False):
            row |= json.loads(record.to_json())
        for row, result in zip(found, results, strict=True):
            row |= {"latency": result.report.latency} if result.report.latency else {}
        left_out = filter(None, [train.describe_unreadable(), test.describe_unreadable()])
        told = {"checkpoints": found, "pushed": urls, "failed": {str(folder): why for folder, why in failed.items()}}
        show(as_json, told, *left_out, *index, *(f"Pushed: {url}" for url in urls))
    accelerator.end_training()
    if failed:
        raise typer.Exit(1)


def train_each(
    models: dict[Path, nn.Module], train: Callable[[nn.Module], Any], options: dict[str, Any], accelerator: Any
) -> dict[Path, str]:
    """Train models and save each right after its training; a failure of one does not affect the others.

    Before the first batch each model is saved next to its folder, which proves that it can be saved, and reserves the
    space on disk for its trained weights.

    Args:
        models: Models by their folders.
        train: Trains one in place.
        options: Options of `lfrns_hub.save`.
        accelerator: Accelerator of the run; the main process saves.
    Returns:
        The errors of some, by their folders; if all fail, or on several processes, the error is raised instead.
    """
    failed: dict[Path, str] = {}
    with contextlib.ExitStack() as rooms:
        room = {folder: rooms.enter_context(contextlib.ExitStack()) for folder in models}
        for folder, model in models.items() if accelerator.is_main_process else ():
            room[folder].enter_context(prepared(model, folder, **options))
        for folder, model in models.items():
            try:
                train(model)
                room[folder].close()
                if accelerator.is_main_process:  # the weights first; the description can follow later
                    recipe.save_trained(model, folder, **options)
            except Exception as error:
                failed[folder] = f"{type(error).__name__}: {error}"
                if len(failed) == len(models) or accelerator.num_processes > 1 or os.environ.get("LFRNS_TRACEBACK"):
                    raise
                print(f"Warning: {folder} was not made. {failed[folder]}", file=sys.stderr)
            accelerator.wait_for_everyone()
    return failed


@contextlib.contextmanager
def described_later(accelerator: Any, folders: Sequence[Path], again: list[str]) -> Iterator[None]:
    """Log a failure to measure or describe saved models as a warning that names the command to run.

    On several processes it is also raised: the others would wait for this one.

    Args:
        accelerator: Accelerator of the run.
        folders: Folders of the saved models.
        again: The options of `lfrns evaluate` that measure them.
    """
    try:
        yield
    except Exception as error:
        if accelerator.is_main_process:
            calls = "".join(f"\n  {shlex.join(['lfrns', 'evaluate', str(folder), *again])}" for folder in folders)
            print(
                f"Warning: {type(error).__name__}: {error}\nThe weights are saved in {', '.join(map(str, folders))}, "
                f"but not measured or described. For that:{calls}",
                file=sys.stderr,
            )
        if accelerator.num_processes > 1 or os.environ.get("LFRNS_TRACEBACK"):
            raise


@app.command(
    epilog=examples(
        "lfrns retrain slim/ --data DIR --teacher resnet50 --weights my.pth --epochs 10",
        "accelerate launch -m lfrns_hub retrain slim/ --data DIR",
    )
)
@bundled
def retrain(
    *,
    directory: Folder,
    teacher: Annotated[str | None, Option(metavar="MODEL", help="dense model to learn from")] = None,
    weights: Weights = None,
    epochs: Annotated[int, Option(min=1, help="passes over the training images")] = 3,
    learning_rate: Rate = None,
    batch_size: Batch = 64,
    pictures: Pictures,
    flip: Flip = True,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Train a slim model further, and bring its weights, record and card up to date.

    The weights are saved as soon as they are trained. The dense model is measured beside the slim one where it is the
    teacher, or found again by what the record says of its weights; it teaches only where it is named.
    """
    accelerator = make_accelerator(seed=seed)
    recipe.hold(Path(directory), f"lfrns retrain {directory}", accelerator)
    model = load_slim(directory, teacher)
    dense = create_dense(teacher, weights=weights) if teacher else None
    train, test = pictures.load(model, "train", augment=True, flip=flip), pictures.load(model, "validation")
    test_loader = DataLoader(test, batch_size)
    check_images(model, test_loader)
    options = {"accelerator": accelerator, "progress": not as_json}
    loader = DataLoader(train, max(1, batch_size // accelerator.num_processes), shuffle=True)
    saving = {"processor": load_processor(model), "label_names": test.class_names or None, "overwrite": True}
    beside, missing = (dense, "") if teacher else dense_beside(directory, None, None)
    before = earlier_record(directory)
    before.setup["epochs"] = (before.setup.get("epochs") or 0) + epochs
    for key in ("budgets", "controls"):  # those were trained as long as the earlier weights
        before.setup.pop(key, None)
    saving["record"] = Record(None, {}, before.setup)  # figures of the earlier weights are not valid for the new ones
    training = {"teacher": dense, "epochs": epochs, "learning_rate": learning_rate, "seed": seed, **options}
    train_each({Path(directory): model}, lambda slim: lfrns.retrain(slim, loader, **training), saving, accelerator)
    again = pictures.arguments()
    again += ["--dense", teacher, *(["--weights", weights] if weights else [])] if teacher else []
    with described_later(accelerator, [Path(directory)], again):
        record = lfrns.measure(model, test_loader, dense=beside, **options)
        if accelerator.is_main_process:
            record = refresh(directory, model, record, pictures, test.class_names, before=before, missing=missing)
            left_out = filter(None, [train.describe_unreadable(), test.describe_unreadable()])
            show(as_json, json.loads(record.to_json()), format_table(record), *left_out)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _digits_recipe() -> Path:
    """Return the path of the recipe: inside the wheel, or next to the package in a checkout."""
    package = Path(__file__).parent.parent
    inside, beside = package / "_recipes" / "vit_digits.py", package.parent / "recipes" / "vit_digits.py"
    return inside if inside.is_file() else beside
