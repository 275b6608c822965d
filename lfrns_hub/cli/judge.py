"""Commands that measure a checkpoint: evaluate, bench."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from torch import nn
from torch.utils.data import DataLoader
from typer import Option

import lfrns_hub as lfrns
from lfrns_hub import recipe
from lfrns_hub.cli.dense_again import find_dense, remember_dense
from lfrns_hub.cli.terminal import (
    Batch,
    Dense,
    Folder,
    Json,
    Pictures,
    Weights,
    app,
    bundled,
    examples,
    load_slim,
    read_list,
    show,
)
from lfrns_hub.hub.index import refresh_index
from lfrns_hub.measure import (
    COUNTED,
    Record,
    comparable_controls,
    comparable_dense,
    count_macs,
    describe_setup,
    format_table,
    weights_id,
)
from lfrns_hub.pictures import load_processor
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.runtimes.bench import bench as time_models
from lfrns_hub.runtimes.bench import format_timings, peak_memory, size_on_disk
from lfrns_hub.zoo import check_images, create_base, create_dense, create_skeleton, example_input


@app.command(
    epilog=examples(
        "lfrns evaluate slim/ --data DIR --val-split 0.1",
        "lfrns evaluate slim/ --data DIR --dense resnet50 --weights my.pth --json",
    )
)
@bundled
def evaluate(
    *,
    directory: Folder,
    dense: Annotated[str | None, Option(metavar="MODEL", help="dense model to measure next to it")] = None,
    weights: Weights = None,
    batch_size: Batch = 64,
    pictures: Pictures,
    as_json: Json = False,
) -> None:
    """Measure a slim model again, and bring its record and card up to date.

    Its dense model is measured beside it where it is named, or found again by what the record says of its weights.
    """
    accelerator = make_accelerator()
    recipe.hold(Path(directory), f"lfrns evaluate {directory}", accelerator)
    model = load_slim(directory, dense)
    images = pictures.load(model, "validation")
    loader = DataLoader(images, batch_size)
    check_images(model, loader)
    beside, missing = dense_beside(directory, dense, weights)
    record = lfrns.measure(model, loader, dense=beside, accelerator=accelerator, progress=not as_json)
    if accelerator.is_main_process:
        record = refresh(directory, model, record, pictures, images.class_names, missing=missing)
        left_out = filter(None, [images.describe_unreadable()])
        show(as_json, json.loads(record.to_json()), format_table(record), *left_out)


def dense_beside(directory: str, dense: str | None, weights: str | None) -> tuple[nn.Module | None, str]:
    """Return the dense model to compare a checkpoint with, the named one or the original, or None and the reason."""
    setup = earlier_record(directory).setup
    if not dense:
        return find_dense(directory, setup)
    model = create_dense(dense, weights=weights)
    remember_dense(model, dense, weights)
    if setup.get("dense_id") not in (None, weights_id(model)):
        print(
            f"Warning: {dense}{f' with {weights}' if weights else ''} has other weights than the dense model that "
            f"{directory} was measured beside before.",
            file=sys.stderr,
        )
    return model, ""


def earlier_record(directory: str) -> Record:
    """Return the record of a checkpoint, an empty one if there is none."""
    path = Path(directory) / "record.json"
    return Record.load(path) if path.is_file() else Record(None, {})


def refresh(
    directory: str,
    model: nn.Module,
    record: Record,
    pictures: Pictures,
    label_names: list[str],
    *,
    before: Record | None = None,
    missing: str = "",
) -> Record:
    """Save a checkpoint over itself with a new record, and update an index of its folder.

    From the old record only facts that stay true are kept: how the model was made, and the dense model's counts if they
    are for the same input size. Old measurements are not combined with new ones.

    Args:
        directory: The checkpoint.
        model: Its model, loaded, and perhaps trained since.
        record: The new measurements.
        pictures: The data of the measurements.
        label_names: Names of their classes, or of other outputs; empty if they have no names.
        before: The record from before the training, with its epochs updated; default: the record in the folder.
        missing: Why the dense model was not measured, if it was not.
    Returns:
        The record that was saved.
    """
    old = before or earlier_record(directory)
    if record.dense is None:
        counted = comparable_dense({"dense": old.dense, "slim": record.slim, "setup": record.setup})
        counts = {key: counted[key] for key in COUNTED if key in counted}
        record.dense = {**dict.fromkeys(("top1_pct", "images", "latency_ms")), **counts} if counts else None
        record.setup["dense_missing"] = missing
    # For other budgets there are only old measurements.
    kept = {key: value for key, value in old.setup.items() if key not in ("budgets", "controls", "dense_missing")}
    record.setup = {**kept, **record.setup}
    controls = {"controls": old.setup.get("controls"), "val_split": pictures.val_split}
    if controls := comparable_controls({"slim": record.slim, "setup": controls}):
        record.setup["controls"] = controls
    record.setup.update(
        recipe.describe_data(pictures.data),
        val_split=pictures.val_split,
        label_names=label_names or None,
        epochs=old.setup.get("epochs") or 0,
    )
    processor = load_processor(model)
    lfrns.save(model, directory, record=record, processor=processor, label_names=label_names or None, overwrite=True)
    above = Path(directory).resolve().parent
    try:
        refresh_index(above)
    except (OSError, ValueError) as error:
        print(f"Warning: the table in {above} is as it was: {error}", file=sys.stderr)
    return record


@app.command(
    epilog=examples("lfrns bench slim/", "lfrns bench slim/ --batches 1,8,64 --runs 100 --json --plot speed.png")
)
def bench(
    directory: Folder,
    dense: Dense = None,
    batches: Annotated[str, Option(help="images per pass")] = "1,32",
    runs: Annotated[int, Option(help="timed passes of each runtime and batch, at most")] = 30,
    seconds: Annotated[
        float, Option(min=0, help="seconds of passes for each runtime and batch; at least five passes")
    ] = 5.0,
    compile: Annotated[bool, Option("--compile/--no-compile", help="try torch.compile, which takes long")] = True,
    plot: Annotated[str | None, Option(metavar="FILE", help="chart to write (default: bench.png in DIR)")] = None,
    as_json: Json = False,
) -> None:
    """Time a slim model against its dense one, in turns: eager, compiled, and in ONNX Runtime (on the CPU, if there).

    Medians, with first and third quartile; the ratio is that of passes side by side. Memory is the peak of a forward
    pass, weights included, in a fresh process. Speed does not depend on weights: those of the dense model are random.
    """
    from lfrns_hub.plots import plot_bench  # imported here: matplotlib is slow

    accelerator, sizes = make_accelerator(), read_list(batches, "--batches", int)
    drawn = Path(plot) if plot else Path(directory) / "bench.png"
    recipe.hold(drawn, f"lfrns bench {directory}: {drawn.name}", accelerator)
    device = accelerator.device
    model = load_slim(directory, dense).to(device)
    images = example_input(model)
    base = (create_skeleton(dense) if dense else create_base(directory)).to(device, images.dtype)
    found = time_models(model, base, images, batches=sizes, runs=runs, seconds=seconds, compile=compile)
    ratio = count_macs(model, images) / count_macs(base, images)
    on_disk = {"dense": size_on_disk(base), "slim": size_on_disk(model)}
    builders: dict[str, tuple[str, list[str | None]]] = {
        "dense": ("lfrns_hub.zoo:create_skeleton", [dense]) if dense else ("lfrns_hub.zoo:create_base", [directory]),
        "slim": ("lfrns_hub.cli.terminal:load_slim", [directory, dense]),
    }
    setup = describe_setup(model, images, device)
    where = {"device": str(device), "dtype": setup["dtype"]}
    peaks = {name: peak_memory(*build, images.shape[1:], sizes, **where) for name, build in builders.items()}
    picture = plot_bench([asdict(one) for one in found.timings], ratio, drawn)
    machine = setup["machine"]
    told = f"{machine['cpu']}, {machine['device']}, {machine['threads']} threads, {setup['dtype']}"
    facts = {
        **asdict(found),
        "macs_ratio": ratio,
        "size_mb": on_disk,
        "peak_memory_mb": peaks,
        "picture": str(picture),
        "machine": machine,
        "dtype": setup["dtype"],
        "input_size": setup["input_size"],
        "versions": setup["versions"],
    }
    lines = [f"Left out: {what}: {why}" for what, why in found.left_out.items()]
    lines.append(_beside("Weights on disk", on_disk["dense"], on_disk["slim"]))
    if (high := peaks["dense"]) and (low := peaks["slim"]):
        lines += [_beside(f"Peak memory, batch {batch}", high[batch], low[batch]) for batch in high]
    lines += [f"MACs: {ratio:.3f} of dense.", f"Picture: {picture}"]
    show(as_json, facts, format_timings(found.timings, f"{directory}: {told}; median (quartiles)"), *lines)


def _beside(what: str, dense: float, slim: float) -> str:
    """Format a size in MB of both models and their ratio."""
    return f"{what}: dense {dense:.2f} MB, slim {slim:.2f} MB ({slim / dense:.3f})."
