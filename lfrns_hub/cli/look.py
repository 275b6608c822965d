"""Commands that inspect a model before anything is changed: units, curve, coverage."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader
from typer import Option

import lfrns_hub as lfrns
from lfrns_hub import recipe
from lfrns_hub.cli.terminal import (
    Batch,
    Calibration,
    Exclude,
    Json,
    Model,
    Pictures,
    Preprocessing,
    Preset,
    Weights,
    analyse_pictures,
    app,
    bundled,
    examples,
    is_slim,
    read_budgets,
    show,
)
from lfrns_hub.hub.index import cells, columns
from lfrns_hub.measure import measure_each
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.self_check import survey
from lfrns_hub.units import UnitGroup
from lfrns_hub.zoo import create_dense, create_skeleton, example_input, set_preprocessing


@app.command(epilog=examples("lfrns units resnet50", "lfrns units my_package.module:build --json"))
def units(model: Model, as_json: Json = False) -> None:
    """List what can be removed from a model, and what cannot and why. Needs no weights and no network.

    MACs are the share of the model's in layers that make or read the units; a layer between two groups counts for both.
    Groups that are not exact are approximate: removing a unit changes a norm, so they are cut only on request.
    """
    network = lfrns.load(model) if is_slim(model) else create_skeleton(model)
    groups, shares = survey(network, example_input(network))
    table = Table("group", "kind", "units", "exact", "MACs", "read by", title=escape(model))
    table.add_column("frozen because", overflow="fold")
    for group in groups:
        row = [group.name, group.kind, str(group.size), "yes" if group.exact else "no", f"{shares[group.name]:.1%}"]
        table.add_row(*row, _taps(group), group.frozen_reason or "")
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
        }
        for group in groups
    ]
    total = (
        f"{sum(group.size for group in free)} units in {len(free)} groups can go; {len(approximate)} groups are "
        f"approximate, cut only on request; {len(groups) - len(free) - len(approximate)} are frozen."
    )
    show(as_json, {"model": model, "groups": rows}, table, total)


def _taps(group: UnitGroup) -> str:
    """Return the first layer that reads a group, and the number of others."""
    others = f" +{len(group.taps) - 1}" if len(group.taps) > 1 else ""
    return f"{group.taps[0].module}{others}" if group.taps else ""


@app.command(
    epilog=examples(
        "lfrns curve resnet50 --weights my.pth --data DIR --val-split 0.1",
        "lfrns curve resnet50.a1_in1k --data DIR --macs 0.9,0.7,0.5 --picture curve.png",
    )
)
@bundled
def curve(
    *,
    model: Model,
    weights: Weights = None,
    macs: Annotated[str, Option(help="fractions of the MACs to keep")] = "0.9,0.75,0.6,0.5,0.35,0.25",
    preset: Preset = "ours",
    calibration_images: Calibration = 1000,
    test_images: Annotated[int, Option(help="images that accuracy is measured on, at most")] = 2000,
    fcr_steps: Annotated[int, Option(help="training steps of the gates at each budget; 0 ranks by cost")] = 0,
    exclude: Exclude = None,
    picture: Annotated[str, Option(metavar="FILE", help="the PNG to write")] = "curve.png",
    batch_size: Batch = 64,
    pictures: Pictures,
    preprocessing: Preprocessing,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Show accuracy against MACs and latency at a ladder of budgets, without training, before one is chosen.

    Accuracies are those right after the cut; retraining brings much of the loss back.
    """
    started, budgets = time.perf_counter(), read_budgets(macs)
    accelerator = make_accelerator(seed=seed)
    recipe.hold(Path(picture), f"--picture {picture}", accelerator)
    dense = create_dense(model, weights=weights)
    set_preprocessing(dense, **vars(preprocessing))
    test = DataLoader(pictures.load(dense, "validation", limit=test_images, seed=seed), batch_size)
    options = {"accelerator": accelerator, "progress": not as_json}
    asked = {"preset": preset, "exclude": tuple(exclude or ()), **options}
    _, analysis = analyse_pictures(dense, pictures, limit=calibration_images, batch_size=batch_size, seed=seed, **asked)
    least = analysis.smallest()["macs"]
    reached = [budget for budget in budgets if budget >= least]
    if not reached:
        raise ValueError(f"--macs {macs}: the smallest that this model can be cut to is {least:.3f}. Ask for more.")
    slim = {f"{budget:g}": analysis.cut(macs=budget, fcr_steps=fcr_steps).model for budget in reached}
    records = measure_each(slim, test, dense=dense, **options)
    if not accelerator.is_main_process:
        return
    from lfrns_hub.plots import plot_ladder  # imported here: matplotlib is slow

    first = next(iter(records.values()))
    plot_ladder([record.slim for record in records.values()], first.dense, picture)
    points = [{"macs": float(name), **record.slim} for name, record in records.items()]
    left_out = [budget for budget in budgets if budget < least]
    found: dict[str, Any] = {"model": model, "dense": first.dense, "points": points, "out_of_reach": left_out}
    found |= {"smallest_macs": least, "picture": picture, "setup": first.setup}
    lines = [f"No {budget:g}: the smallest that this model can be cut to is {least:.3f}." for budget in left_out]
    title = f"{model}, not retrained, {first.slim['images']} images tested; latency: batch 1"
    seconds = time.perf_counter() - started
    show(as_json, found, _ladder(title, first.dense, points), *lines, f"Picture: {picture} ({seconds:.0f} s in all)")


def _ladder(title: str, dense: dict[str, Any], points: list[dict[str, Any]]) -> Table:
    """Format one row for the dense model and one for each budget."""
    table = Table(title=escape(title))
    for heading in ("budget", *columns(dense)):
        table.add_column(heading, justify="right")
    table.add_row("dense", *cells(dense, dense))
    for point in points:
        table.add_row(f"{point['macs']:g}", *cells(point, dense))
    return table


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def coverage(context: typer.Context) -> None:
    """Try networks: build, slim, self-check, save, load, compare. Every family, or those named (--help: options)."""
    from lfrns_hub.coverage import main as try_networks

    raise typer.Exit(try_networks(context.args))
