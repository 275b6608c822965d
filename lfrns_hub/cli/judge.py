"""Commands that measure a checkpoint: evaluate, bench."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from torch import nn
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub import recipe
from lfrns_hub.bench import bench as time_models
from lfrns_hub.bench import format_timings, peak_memory, size_on_disk
from lfrns_hub.cli.terminal import (
    MAX_UNREADABLE,
    Batch,
    ClassMap,
    Data,
    Folder,
    Json,
    Labels,
    Pictures,
    Unreadable,
    ValSplit,
    Weights,
    app,
    examples,
    load_slim,
    read_list,
    show,
)
from lfrns_hub.index import refresh_index
from lfrns_hub.measure import Record, count_macs, describe_setup, format_table
from lfrns_hub.pictures import load_processor
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.zoo import check_images, create_base, create_dense, create_skeleton, example_input


@app.command(
    epilog=examples(
        "lfrns evaluate slim/ --data DIR --val-split 0.1",
        "lfrns evaluate slim/ --data DIR --dense resnet50 --weights my.pth --json",
    )
)
def evaluate(
    directory: Folder,
    data: Data,
    dense: Annotated[str | None, typer.Option(metavar="MODEL", help="measure this dense model beside it")] = None,
    weights: Weights = None,
    batch_size: Batch = 64,
    label_column: Labels = None,
    val_split: ValSplit = None,
    class_map: ClassMap = None,
    max_unreadable: Unreadable = MAX_UNREADABLE,
    as_json: Json = False,
) -> None:
    """Measure a slim model again, and bring its record and card up to date."""
    model = load_slim(directory, dense)
    teacher = create_dense(dense, weights=weights) if dense else None
    pictures = Pictures(data, label_column, val_split, class_map, max_unreadable=max_unreadable)
    images = pictures.load(model, "validation")
    loader = DataLoader(images, batch_size)
    check_images(model, loader)
    accelerator = make_accelerator()
    record = lfrns.measure(model, loader, dense=teacher, accelerator=accelerator, progress=not as_json)
    if accelerator.is_main_process:
        record = refresh(directory, model, record, pictures, images.class_names)
        left_out = filter(None, [images.describe_unreadable()])
        show(as_json, json.loads(record.to_json()), format_table(record), *left_out)


def refresh(
    directory: str, model: nn.Module, record: Record, pictures: Pictures, label_names: list[str], *, epochs: int = 0
) -> Record:
    """Save a checkpoint over itself with a new record, and bring an index over its folder up to date.

    What was not measured again stays as it was.

    Args:
        directory: The checkpoint.
        model: It, loaded, and perhaps trained since.
        record: What was measured.
        pictures: On these.
        label_names: Their classes.
        epochs: That it was trained since.
    Returns:
        The record that was saved.
    """
    earlier = Path(directory) / "record.json"
    if earlier.is_file():
        old = Record.load(earlier)
        record.dense = record.dense or old.dense
        record.setup = {**old.setup, **record.setup}
    if epochs:
        record.setup.pop("budgets", None)  # the accuracy of this one among them is that of before
    record.setup.update(
        dataset=recipe.describe_data(pictures.data)["dataset"],
        val_split=pictures.val_split,
        label_names=label_names,
        epochs=(record.setup.get("epochs") or 0) + epochs,
    )
    processor = load_processor(model)
    lfrns.save(model, directory, record=record, processor=processor, label_names=label_names, overwrite=True)
    refresh_index(Path(directory).resolve().parent)
    return record


@app.command(
    epilog=examples("lfrns bench slim/", "lfrns bench slim/ --batches 1,8,64 --runs 100 --json --plot speed.png")
)
def bench(
    directory: Folder,
    dense: Annotated[str | None, typer.Option(metavar="MODEL", help="its dense model, where it cannot say")] = None,
    batches: Annotated[str, typer.Option(help="images a pass")] = "1,32",
    runs: Annotated[int, typer.Option(help="timed passes of each, at most")] = 30,
    seconds: Annotated[float, typer.Option(min=0, help="of passes for each runtime and batch; five at least")] = 5.0,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="try torch.compile, which takes long")] = True,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="the picture (default: bench.png in DIR)")] = None,
    as_json: Json = False,
) -> None:
    """Time a slim model against its dense one, in turns: eager, compiled, and in ONNX Runtime (on the CPU, if there).

    Medians, with first and third quartile; the ratio is that of passes side by side. Memory is the peak of a forward
    pass, weights included, in a fresh process. Speed does not depend on weights: those of the dense model are random.
    """
    from lfrns_hub.plots import plot_bench  # here: matplotlib is slow to import

    device, sizes = make_accelerator().device, read_list(batches, "--batches", int)
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
    picture = plot_bench([asdict(one) for one in found.timings], ratio, plot or Path(directory) / "bench.png")
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
    """Write a size in MB of both models and their ratio."""
    return f"{what}: dense {dense:.2f} MB, slim {slim:.2f} MB ({slim / dense:.3f})."
