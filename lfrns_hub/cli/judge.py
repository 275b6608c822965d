"""Commands that measure a checkpoint: evaluate, bench."""

import json
from dataclasses import asdict
from pathlib import Path

from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_cli.commands import Bench, Evaluate
from lfrns_hub import recipe
from lfrns_hub.cli.checkpoints import dense_beside, load_slim, refresh
from lfrns_hub.cli.data import load_images, start_accelerator
from lfrns_hub.cli.terminal import show
from lfrns_hub.measure import count_macs, describe_setup, format_table
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.runtimes.bench import bench as time_models
from lfrns_hub.runtimes.bench import format_timings, peak_memory, size_on_disk
from lfrns_hub.zoo import check_images, create_base, create_skeleton, example_input


def evaluate(asked: Evaluate) -> None:
    """Measure a checkpoint again and save it with the new record."""
    directory, machine = asked.directory, asked.machine
    accelerator = start_accelerator(machine)
    recipe.hold(Path(directory), f"lfrns evaluate {directory}", accelerator)
    model = load_slim(directory, asked.dense)
    images = load_images(asked.images, model, "validation")
    loader = DataLoader(images, asked.batch_size, num_workers=machine.workers)
    check_images(model, loader)
    dense, missing = dense_beside(directory, asked.dense, asked.weights)
    record = lfrns.measure(model, loader, dense=dense, accelerator=accelerator, progress=machine.progress)
    if accelerator.is_main_process:
        record = refresh(directory, model, record, asked.images, images.class_names, missing=missing)
        left_out = filter(None, [images.describe_unreadable()])
        show(machine.as_json, json.loads(record.to_json()), format_table(record), *left_out)


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
    found = time_models(
        model, base, images, batches=sizes, runs=asked.runs, seconds=asked.seconds, compile=asked.compile
    )
    ratio = count_macs(model, images) / count_macs(base, images)
    on_disk = {"dense": size_on_disk(base), "slim": size_on_disk(model)}
    builders: dict[str, tuple[str, list[str | None]]] = {
        "dense": ("lfrns_hub.zoo:create_skeleton", [dense]) if dense else ("lfrns_hub.zoo:create_base", [directory]),
        "slim": ("lfrns_hub.cli.checkpoints:load_slim", [directory, dense]),
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
    lines.append(_ratio("Weights on disk", on_disk["dense"], on_disk["slim"]))
    if (high := peaks["dense"]) and (low := peaks["slim"]):
        lines += [_ratio(f"Peak memory, batch {batch}", high[batch], low[batch]) for batch in high]
    lines += [f"MACs: {ratio:.3f} of dense.", f"Picture: {picture}"]
    show(asked.as_json, facts, format_timings(found.timings, f"{directory}: {told}; median (quartiles)"), *lines)


def _ratio(what: str, dense: float, slim: float) -> str:
    """Write a size in MB of both models and their ratio."""
    return f"{what}: dense {dense:.2f} MB, slim {slim:.2f} MB ({slim / dense:.3f})."
