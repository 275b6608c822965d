"""The command that makes a dense model for `lfrns slim`: train."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_cli.commands import Train
from lfrns_hub import recipe
from lfrns_hub.cli.checkpoints import is_slim
from lfrns_hub.cli.data import load_images, reading_of, shuffled, start_accelerator
from lfrns_hub.cli.logs import Logs, scored
from lfrns_hub.cli.resume import LeftOver, kept_run, record_of_ended
from lfrns_hub.cli.saving import described_later, train_each
from lfrns_hub.cli.terminal import show
from lfrns_hub.format.terminal import cell
from lfrns_hub.format.untrusted import short
from lfrns_hub.measure import Record, main_figures
from lfrns_hub.pictures import load_processor
from lfrns_hub.zoo import check_images, create_for_data, set_preprocessing

PACKAGE = Path(__file__).resolve().parent.parent
SIZES = (
    ("params, M", "params_m", ".3f"),
    ("MACs, G", "macs_g", ".4f"),
    ("latency of one image, ms", "latency_ms", ".2f"),
    ("size, MB", "size_mb", ".2f"),
)


def train(asked: Train) -> None:
    """Train a dense model, save it in its library's own layout, and measure it."""
    machine = asked.machine
    if is_slim(asked.model):
        raise ValueError(f"lfrns train {asked.model}: it is slim already. Train it further by lfrns retrain.")
    run = LeftOver(Path(asked.out).resolve() / "work", vars(asked), afresh="Pass --overwrite")
    resume = asked.resume and (run.unfinished or run.finished)
    directory = recipe.check_output_dir(asked.out, resume=resume, overwrite=asked.overwrite, option="--out")
    accelerator = start_accelerator(machine, asked.seed, log_with=asked.log_with, directory=directory)
    recipe.hold(directory, f"--out {asked.out}", accelerator)
    if resume:
        run.check()
        if run.finished:
            _show_again(asked, directory, accelerator)
            return
    dense = _build(asked, accelerator)
    train_set = load_images(asked.images, dense, "train", augment=True, flip=asked.flip)
    test_set = load_images(asked.images, dense, "validation")
    test_loader = DataLoader(test_set, asked.batch_size, num_workers=machine.workers)
    check_images(dense, test_loader)
    loader = shuffled(train_set, asked.batch_size, machine.workers, accelerator)
    saving: dict[str, Any] = {"label_names": test_set.class_names or None, "processor": load_processor(dense)}
    saving |= {"overwrite": True, "stock": True}
    training: dict[str, Any] = {"epochs": asked.epochs, "learning_rate": asked.learning_rate, "seed": asked.seed}
    training |= {"accelerator": accelerator, "progress": machine.progress, "eval_loader": scored(dense, test_loader)}

    run.refuse_other_data("training images", train_set)
    run.refuse_other_data("test images", test_set)
    logs = Logs(asked.log_with, directory, run, ["train"], resume=resume)
    with kept_run(run, accelerator, resume=resume) as work:

        def train_it(_: Path, model: nn.Module) -> None:
            with logs.of("train", model, test_loader, accelerator) as logging:
                lfrns.retrain(model, loader, checkpoint_dir=work / "train", **{**training, **logging})

        train_each({directory: dense}, train_it, saving, accelerator)
    again = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    with described_later(accelerator, [directory], [[*again, "--resume"]]):
        record = lfrns.measure(dense, test_loader, accelerator=accelerator, progress=machine.progress)
        record = Record(record.slim, {}, {**record.setup, **_setup(asked, saving["label_names"])})
        del record.setup["dense_missing"]
        if accelerator.is_main_process:
            lfrns.save(dense, directory, record=record, **saving)
            left_out = filter(None, [train_set.describe_unreadable(), test_set.describe_unreadable()])
            _show(asked, directory, record, *left_out)
        run.finish(accelerator)
    accelerator.end_training()


def _build(asked: Train, accelerator: Any) -> nn.Module:
    """Build the model, and tell of a new head."""
    torch.manual_seed(asked.seed)  # of a new head
    dense, names = create_for_data(
        asked.model, asked.images.data, weights=asked.weights, img_size=asked.img_size, **reading_of(asked.images)
    )
    set_preprocessing(dense, **vars(asked.preprocessing))
    if names and accelerator.is_main_process:
        told = f"A new head of {len(names)} classes ({short(', '.join(names), 200)}): {asked.model} has others."
        print(told, file=sys.stderr)
    return dense


def _setup(asked: Train, label_names: list[str] | None) -> dict[str, Any]:
    """Return how the model was made, for its record."""
    return {
        **recipe.describe_command("lfrns", PACKAGE / "__init__.py"),
        **recipe.describe_data(asked.images.data),
        "seed": asked.seed,
        "epochs": asked.epochs,
        "val_split": asked.images.val_split,
        "label_names": label_names,
    }


def _show_again(asked: Train, directory: Path, accelerator: Any) -> None:
    """Print the record of a run that has ended."""
    if accelerator.is_main_process:
        _show(asked, directory, record_of_ended(directory, asked.out))
    accelerator.end_training()


def _show(asked: Train, directory: Path, record: Record, *lines: str) -> None:
    """Print the figures of a trained model, where it is, and what to do next."""
    figures = record.dense
    table = Table(f"{figures['images']} images tested")
    table.add_column("dense", justify="right")
    for head, figure, value in main_figures(figures):
        table.add_row(cell(f"{head} {figure.label}".strip()), f"{value:{figure.form}}")
    for label, key, form in SIZES:
        table.add_row(label, format(figures[key], form))
    found = {"directory": str(directory), **json.loads(record.to_json())}
    show(asked.machine.as_json, found, table, *lines, f"Checkpoint: {directory}", f"Next: {_next(asked, directory)}")


def _next(asked: Train, directory: Path) -> str:
    """Return the command that slims the trained model; a custom class is built by its function."""
    words = ["lfrns", "slim", str(directory)]
    if not (directory / "config.json").is_file():
        size = ["--img-size", str(asked.img_size)] if asked.img_size else []
        words[2:] = [asked.model, "--weights", str(directory / "model.safetensors"), *size]
        words += asked.preprocessing.arguments()
    words += [*asked.images.arguments(), *([] if asked.flip else ["--no-flip"])]
    return shlex.join([*words, "--macs", "0.5", "--out", f"{directory}-slim"])
