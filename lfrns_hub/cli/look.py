"""Commands that inspect a model before anything is changed: units, curve, coverage."""

import time
from pathlib import Path
from typing import Any

from rich.table import Table
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_cli.commands import Curve, Units
from lfrns_cli.options import read_budgets
from lfrns_hub import recipe
from lfrns_hub.cli.checkpoints import is_slim
from lfrns_hub.cli.data import analyse_images, load_images, start_accelerator
from lfrns_hub.cli.terminal import show
from lfrns_hub.format.terminal import cell
from lfrns_hub.hub.index import cells, columns
from lfrns_hub.measure import measure_each
from lfrns_hub.runs.progress import about
from lfrns_hub.self_check import survey, uniform_sizes
from lfrns_hub.units import UnitGroup
from lfrns_hub.zoo import create_dense, create_skeleton, example_input, set_preprocessing, starts_random


def units(asked: Units) -> None:
    """List the groups of a model, their share of its MACs, and why some are frozen."""
    model = asked.model
    if asked.img_size is not None and is_slim(model):
        raise ValueError(f"--img-size {asked.img_size}: {model} is slim, and of the size that it states. Leave it out.")
    network = lfrns.load(model) if is_slim(model) else create_skeleton(model, img_size=asked.img_size)
    groups, shares = survey(network, example_input(network))
    sizes, left = ({}, {}) if asked.macs is None else uniform_sizes(network, example_input(network), asked.macs)
    table = Table("group", "kind", "units", *(["kept"] if sizes else []), "exact", "MACs", "read by", title=cell(model))
    frozen = any(group.frozen_reason for group in groups)
    if frozen:
        table.add_column("frozen because", overflow="fold")
    for group in groups:
        kept = [str(sizes.get(group.name, group.size))] if sizes else []
        row = [group.name, group.kind, str(group.size), *kept, "yes" if group.exact else "no"]
        reason = [group.frozen_reason or ""] if frozen else []
        table.add_row(*row, f"{shares[group.name]:.1%}", _taps(group), *reason)
    free = [group for group in groups if not group.frozen_reason and group.exact]
    approximate = [group for group in groups if not group.frozen_reason and not group.exact]
    rows = [
        {
            "name": group.name,
            "kind": group.kind,
            "size": group.size,
            "exact": group.exact,
            "macs_share": shares[group.name],
            "taps": [tap.module for tap in group.taps],
            "frozen_reason": group.frozen_reason,
            **({"kept": sizes.get(group.name, group.size)} if sizes else {}),
        }
        for group in groups
    ]
    total = (
        f"{sum(group.size for group in free)} units in {len(free)} groups can go; {len(approximate)} groups are "
        f"approximate, cut only on request; {len(groups) - len(free) - len(approximate)} are frozen."
    )
    at = [f"Kept: {left['macs']:.3f} of the MACs, {left['params']:.3f} of the parameters."] if sizes else []
    show(asked.as_json, {"model": model, "groups": rows, "left": left}, table, total, *at)


def _taps(group: UnitGroup) -> str:
    """Return the first layer that reads a group, and the number of others."""
    others = f" +{len(group.taps) - 1}" if len(group.taps) > 1 else ""
    return f"{group.taps[0].module}{others}" if group.taps else ""


def curve(asked: Curve) -> None:
    """Cut a model at each budget, measure, draw the curve and print the table."""
    started, budgets = time.perf_counter(), read_budgets(asked.macs)
    model, picture, seed, machine = asked.model, asked.picture, asked.seed, asked.machine
    accelerator = start_accelerator(machine, seed)
    recipe.hold(Path(picture), f"--picture {picture}", accelerator)
    dense = create_dense(model, weights=asked.weights, img_size=asked.img_size)
    set_preprocessing(dense, **vars(asked.preprocessing))
    test_set = load_images(asked.images, dense, "validation", limit=asked.test_images, seed=seed)
    test = DataLoader(test_set, asked.batch_size, num_workers=machine.workers)
    options = {"accelerator": accelerator, "progress": machine.progress}
    choices = {"preset": asked.preset, "exclude": tuple(asked.exclude or ()), "workers": machine.workers, **options}
    choices["untrained"] = asked.weights is None and starts_random(model)
    _, analysis = analyse_images(
        dense, asked.images, limit=asked.calibration_images, batch_size=asked.batch_size, seed=seed, **choices
    )
    least = analysis.smallest()["macs"]
    reached = [budget for budget in budgets if budget >= least]
    if not reached:
        raise ValueError(
            f"--macs {asked.macs}: the smallest that this model can be cut to is {least:.3f}. Ask for more."
        )
    slim = {}
    for budget in reached:
        with about(f"{budget:g} of the MACs"):
            slim[f"{budget:g}"] = analysis.cut(macs=budget, fcr_steps=asked.fcr_steps).model
    records = measure_each(slim, test, dense=dense, **options)
    if not accelerator.is_main_process:
        return
    from lfrns_hub.plots import plot_ladder  # imported here: matplotlib is slow

    first = next(iter(records.values()))
    name = f"{model}: cut to several budgets, not retrained"
    plot_ladder([record.slim for record in records.values()], first.dense, picture, title=name, setup=first.setup)
    points = [{"macs": float(name), **record.slim} for name, record in records.items()]
    left_out = [budget for budget in budgets if budget < least]
    found: dict[str, Any] = {"model": model, "dense": first.dense, "points": points, "out_of_reach": left_out}
    found |= {"smallest_macs": least, "picture": picture, "setup": first.setup}
    lines = [f"No {budget:g}: the smallest that this model can be cut to is {least:.3f}." for budget in left_out]
    title = f"{model}, not retrained, {first.slim['images']} images tested; latency: batch 1"
    lines.append(f"Picture: {picture} ({time.perf_counter() - started:.0f} s in all)")
    show(machine.as_json, found, _ladder(title, first.dense, points), *lines)


def _ladder(title: str, dense: dict[str, Any], points: list[dict[str, Any]]) -> Table:
    """Format one row for the dense model and one for each budget."""
    table = Table(title=cell(title))
    for heading in ("budget", *columns(dense)):
        table.add_column(heading, justify="right")
    table.add_row("dense", *cells(dense, dense))
    for point in points:
        table.add_row(f"{point['macs']:g}", *cells(point, dense))
    return table


def coverage(arguments: list[str]) -> int:
    """Try networks, as `lfrns_hub.coverage` reads its command line; returns its exit code."""
    from lfrns_hub.coverage import main as try_networks

    return try_networks(arguments)
