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
from lfrns_hub.bench import format_timings
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
from lfrns_hub.measure import Record, describe_setup, format_table
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


@app.command(epilog=examples("lfrns bench slim/", "lfrns bench slim/ --batches 1,8,64 --runs 100 --json"))
def bench(
    directory: Folder,
    dense: Annotated[str | None, typer.Option(metavar="MODEL", help="its dense model, where it cannot say")] = None,
    batches: Annotated[str, typer.Option(help="images a pass")] = "1,32",
    runs: Annotated[int, typer.Option(help="timed passes of each")] = 30,
    as_json: Json = False,
) -> None:
    """Time a slim model against its dense one, in turns: eager, and in ONNX Runtime (on the CPU) where it is installed.

    Medians, with first and third quartile; the ratio is that of passes side by side. Speed does not depend on weights:
    those of the dense model are random.
    """
    device = make_accelerator().device
    model = load_slim(directory, dense).to(device)
    base = (create_skeleton(dense) if dense else create_base(directory)).to(device)
    images = example_input(model)
    timings = time_models(model, base, images, batches=read_list(batches, "--batches", int), runs=runs)
    sizes = {
        "dense": sum(tensor.numel() * tensor.element_size() for tensor in base.state_dict().values()) / 1e6,
        "slim": sum(path.stat().st_size for path in Path(directory).glob("model*.safetensors")) / 1e6,
    }
    setup = describe_setup(model, images, device)
    machine = setup["machine"]
    where = f"{machine['cpu']}, {machine['device']}, {machine['threads']} threads, {setup['dtype']}"
    title = f"{directory}: {where}; median (quartiles)"
    found = {
        "timings": [asdict(one) for one in timings],
        "size_mb": sizes,
        "machine": machine,
        "dtype": setup["dtype"],
        "input_size": setup["input_size"],
        "versions": setup["versions"],
    }
    ratio = sizes["slim"] / sizes["dense"]
    on_disk = f"Weights on disk: dense {sizes['dense']:.2f} MB, slim {sizes['slim']:.2f} MB ({ratio:.3f})."
    onnx = "" if any(one.runtime != "eager" for one in timings) else "ONNX Runtime: pip install 'lfrns_hub[export]'."
    show(as_json, found, format_timings(timings, title), on_disk, *filter(None, [onnx]))
