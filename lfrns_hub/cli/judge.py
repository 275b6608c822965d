"""Commands that measure a checkpoint, or ask it: evaluate, predict, bench."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_cli.commands import Bench, Evaluate, Predict
from lfrns_hub import recipe
from lfrns_hub.cli.checkpoints import dense_beside, load_slim, refresh
from lfrns_hub.cli.data import load_images, start_accelerator
from lfrns_hub.cli.terminal import show
from lfrns_hub.format.terminal import cell
from lfrns_hub.format.untrusted import short
from lfrns_hub.measure import count_macs, describe_setup, format_table
from lfrns_hub.model_io.answers import probe, read_answer, settle
from lfrns_hub.model_io.meaning import Classes, Features, Meaning, Quantities
from lfrns_hub.pictures.class_folders import list_loose
from lfrns_hub.pictures.decoding import decode_picture
from lfrns_hub.pictures.model_input import class_names_of
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.runtimes.bench import RUNTIMES, format_timings, peak_memory, size_on_disk
from lfrns_hub.runtimes.bench import bench as time_models
from lfrns_hub.zoo import check_images, create_base, create_skeleton, example_input, make_transform


def evaluate(asked: Evaluate) -> None:
    """Measure a checkpoint again and save it with the new record."""
    directory, machine = asked.directory, asked.machine
    accelerator = start_accelerator(machine)
    recipe.hold(Path(directory), f"lfrns evaluate {directory}", accelerator)
    model = load_slim(directory, asked.dense)
    images = load_images(asked.images, model, "validation")
    loader = DataLoader(images, asked.batch_size, num_workers=machine.workers)
    check_images(model, loader)
    dense, missing = dense_beside(directory, model, asked.dense, asked.weights)
    record = lfrns.measure(model, loader, dense=dense, accelerator=accelerator, progress=machine.progress)
    if accelerator.is_main_process:
        record = refresh(directory, model, record, asked.images, images.class_names, missing=missing)
        left_out = filter(None, [images.describe_unreadable()])
        show(machine.as_json, json.loads(record.to_json()), format_table(record), *left_out)


def predict(asked: Predict) -> None:
    """Print each photo's most probable classes; of quantities, their values; of features, their length."""
    model = load_slim(asked.directory, asked.dense).eval()
    transform, names = make_transform(model, train=False), class_names_of(model)
    like, outputs = next(model.parameters()), None
    rows, table = [], Table("photo", "answer", title=cell(asked.directory))
    table.add_column("", justify="right")
    for photo in _photos(asked.photos):
        try:
            image = transform(decode_picture({"path": str(photo)}, str(photo.parent)))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"lfrns predict: {photo}: cannot be read as an image ({short(str(error), 120)}). Leave it out."
            ) from error
        pair = torch.stack([image, image]).to(device=like.device, dtype=like.dtype)  # of one, squeeze() leaves no row
        if outputs is None:
            outputs = settle([model], probe(model, pair), [], "lfrns predict")  # with gradients: a softmax is seen
        with torch.no_grad():
            answer = read_answer(model, model(pair), outputs)
        answers = [one for head in answer.heads for one in _words(*head, names, asked.top)]
        rows.append({"photo": str(photo), "answers": [{"name": name, "value": value} for name, value in answers]})
        for place, (name, value) in enumerate(answers):
            table.add_row("" if place else cell(photo), cell(name), f"{value:.4g}")
    show(asked.as_json, {"model": asked.directory, "photos": rows}, table)


def _photos(given: list[str]) -> list[Path]:
    """Return files as named, and those of folders that look like images, sorted."""
    found = []
    for path in map(Path, given):
        inside = sorted(map(Path, list_loose(path))) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"lfrns predict: {path}: the folder holds no image. Name one that does.")
        found += inside
    return found


def _words(
    head: str, meaning: Meaning, values: torch.Tensor, names: list[str] | None, top: int
) -> list[tuple[str, float]]:
    """Return what one head says of one image: names with probabilities, or numbers."""
    values, prefix = values[0], f"{head}: " if head else ""
    if isinstance(meaning, Features):
        return [(f"{prefix}{values.numel()} features of length", float(values.norm()))]
    if isinstance(meaning, Quantities):
        return [(f"{prefix}quantity {place}", float(value)) for place, value in enumerate(values)]
    shares = values.softmax(0) if isinstance(meaning, Classes) else values.sigmoid()
    best = shares.topk(min(top, len(shares)))
    named = names if names is not None and len(names) == len(shares) else [f"class {i}" for i in range(len(shares))]
    return [
        (prefix + named[place], share) for share, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def bench(asked: Bench) -> None:
    """Time a checkpoint against its dense model in each runtime, draw the chart and print the table."""
    from lfrns_hub.plots import plot_bench  # here: matplotlib is slow to import

    directory, dense, sizes = asked.directory, asked.dense, asked.sizes
    accelerator = make_accelerator()
    drawn = Path(asked.plot) if asked.plot else Path(directory) / "bench.png"
    recipe.hold(drawn, f"lfrns bench {directory}: {drawn.name}", accelerator)
    device = accelerator.device
    model = load_slim(directory, dense).to(device)
    images = example_input(model)
    base = (create_skeleton(dense) if dense else create_base(directory)).to(device, images.dtype)
    runtimes = [name for name in RUNTIMES if asked.compile or name != "compiled"]
    found = time_models(model, base, images, batches=sizes, runs=asked.runs, seconds=asked.seconds, runtimes=runtimes)
    ratio = count_macs(model, images) / count_macs(base, images)
    on_disk = {"dense": size_on_disk(base), "slim": size_on_disk(model)}
    builders: dict[str, tuple[str, list[str | None]]] = {
        "dense": ("lfrns_hub.zoo:create_skeleton", [dense]) if dense else ("lfrns_hub.zoo:create_base", [directory]),
        "slim": ("lfrns_hub.cli.checkpoints:load_slim", [directory, dense]),
    }
    setup = describe_setup(model, images, device)
    where = {"device": str(device), "dtype": setup["dtype"]}
    peaks = {name: peak_memory(*build, images.shape[1:], sizes, **where) for name, build in builders.items()}
    name = f"{Path(directory).resolve().name}: time of a forward pass"
    picture = plot_bench([asdict(one) for one in found.timings], ratio, drawn, title=name, setup=setup)
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
    lines.append(_ratio("Weights on disk", on_disk["dense"], on_disk["slim"]))
    if (high := peaks["dense"]) and (low := peaks["slim"]):
        lines += [_ratio(f"Peak memory, batch {batch}", high[batch], low[batch]) for batch in high]
    lines += [f"MACs: {ratio:.3f} of dense.", f"Picture: {picture}"]
    show(asked.as_json, facts, format_timings(found.timings, f"{directory}: {told}; median (quartiles)"), *lines)


def _ratio(what: str, dense: float, slim: float) -> str:
    """Write a size in MB of both models and their ratio."""
    return f"{what}: dense {dense:.2f} MB, slim {slim:.2f} MB ({slim / dense:.3f})."
