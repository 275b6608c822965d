"""Plots for the model card: matplotlib, without a display."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lfrns_hub.measure import main_figure
from lfrns_hub.runs import written_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: colour-blind readers can distinguish it too.
COLOURS = {"channel": "#0072B2", "head": "#D55E00", "neuron": "#009E73"}
DENSE = "#E3E3E3"
OTHER = "#666666"
MAX_ROWS = 60  # with more, names overlap at the size of a card


def plot_widths(source: Any, path: str | Path) -> Path:
    """Draw the kept width of every group of units, dense behind slim, as shares of the dense width.

    Args:
        source: A Record, its dict, a provenance with `widths`, or `{group: [kept, dense]}`.
        path: The PNG to write.
    Returns:
        The path.
    Raises:
        ValueError: There are no widths in the source.
    """
    from matplotlib.patches import Patch

    widths, kinds = _read_widths(source)
    if not widths:
        raise ValueError("plot_widths(): the source holds no widths. Give the record of a model that slim made.")
    names = list(widths)
    step = -(-len(names) // MAX_ROWS)
    rows = range(len(names))
    label_size = 8 if len(names) <= MAX_ROWS else 6
    figure = _figure((7.2, max(1.9, 1.1 + 0.2 * min(len(names), MAX_ROWS))))
    axes = figure.add_subplot()
    axes.barh(rows, [1.0] * len(names), color=DENSE, height=0.84)
    shares = [kept / dense if dense else 0.0 for kept, dense in widths.values()]
    axes.barh(rows, shares, color=[COLOURS.get(kinds.get(name), OTHER) for name in names], height=0.84)
    for row in rows[::step]:
        kept, dense = widths[names[row]]
        axes.text(1.01, row, f"{kept} of {dense}", va="center", fontsize=label_size, color="#333333")
    axes.set_yticks(rows[::step], [_short(names[row]) for row in rows[::step]], fontsize=label_size, parse_math=False)
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.16)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "dense"], fontsize=8)
    axes.set_xlabel("units kept", fontsize=9)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    present = [kind for kind in COLOURS if kind in {kinds.get(name) for name in names}]
    handles = [Patch(color=COLOURS[kind], label=f"{kind}s kept") for kind in present]
    if any(kinds.get(name) not in COLOURS for name in names):
        handles.append(Patch(color=OTHER, label="units kept"))
    handles.append(Patch(color=DENSE, label="removed"))
    axes.spines["bottom"].set_bounds(0, 1)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    with written_aside(Path(path)) as partial:
        figure.savefig(partial, format="png")
    return Path(path)


def mark_of(plan: dict[str, list[int]]) -> str:
    """Return the comment in a PNG that identifies its plan."""
    return "lfrns plan " + hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def shows_plan(path: str | Path, plan: dict[str, list[int]]) -> bool:
    """Return whether a figure exists and was drawn for this plan, so that no card shows another model's."""
    if not Path(path).is_file():
        return False
    try:
        with Image.open(path) as picture:
            return picture.info.get("Comment") == mark_of(plan)
    except OSError:  # pillow's error for a file that is not an image
        return False


def plot_ladder(points: Sequence[dict[str, Any]], dense: dict[str, Any], path: str | Path) -> Path:
    """Draw accuracy against MACs, and against latency where it was measured, of slim models and their dense one.

    Each slim model is labelled with the share of the dense MACs that it keeps.

    Args:
        points: For each slim model top1_pct (or the main figure of its outputs), macs_g, and perhaps latency_ms
            and occasion, as in the `slim` of a Record.
        dense: The same for the dense model.
        path: The PNG to write.
    Returns:
        The path.
    Raises:
        ValueError: There is no point, or one has no accuracy or belongs to another occasion.
    """
    shown = main_figure(dense)
    if not points or any(one.get(shown.key) is None for one in [*points, dense]):
        raise ValueError(
            f"plot_ladder(): each point and the dense model need a {shown.key}. Measure them on labelled images."
        )
    if len({one.get("occasion") for one in [*points, dense]}) > 1:
        raise ValueError(
            "plot_ladder(): the points were measured at different times, and such figures do not compare. Measure them "
            "and the dense model in one call of measure_each."
        )
    timed = all(one.get("latency_ms") is not None for one in [*points, dense])
    sides = [("macs_g", "GMACs"), ("latency_ms", "latency, ms, batch 1")][: 1 + timed]
    figure = _figure((4.2 * len(sides), 3.2))
    for axes, (key, label) in zip(figure.subplots(1, len(sides), squeeze=False, sharey=True)[0], sides, strict=True):
        line = sorted(points, key=lambda one: one[key])
        axes.axhline(dense[shown.key], color=OTHER, linewidth=0.8, linestyle=":")
        axes.plot(
            [p[key] for p in line], [p[shown.key] for p in line], marker="o", color=COLOURS["channel"], label="slim"
        )
        axes.plot([dense[key]], [dense[shown.key]], marker="s", linestyle="", color=OTHER, label="dense")
        for one in line:
            axes.annotate(
                f"{one['macs_g'] / dense['macs_g']:.0%}" if dense["macs_g"] else "",
                (one[key], one[shown.key]),
                textcoords="offset points",
                xytext=(6, -9),
                fontsize=7,
                color="#333333",
            )
        axes.set_xlabel(label, fontsize=9)
        axes.set_xlim(left=0)
        axes.margins(y=0.2)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(shown.label, fontsize=9)
    figure.axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    with written_aside(Path(path)) as partial:
        figure.savefig(partial, format="png")
    return Path(path)


def plot_bench(timings: Sequence[dict[str, Any]], macs_ratio: float, path: str | Path) -> Path:
    """Draw the time of a slim model as a share of its dense one's, a group of bars for each batch size.

    Whiskers show the first and third quartile; one line marks 1.0, another the share of the MACs.

    Args:
        timings: Each with runtime, batch, and ratio as [median, first quartile, third quartile].
        macs_ratio: MACs of the slim model over those of the dense one.
        path: The PNG to write.
    Returns:
        The path.
    Raises:
        ValueError: There is no timing.
    """
    if not timings:
        raise ValueError(
            "plot_bench(timings=[]): there is nothing to draw. Give those of lfrns_hub.runtimes.bench.bench."
        )
    runtimes = list(dict.fromkeys(one["runtime"] for one in timings))
    batches = list(dict.fromkeys(one["batch"] for one in timings))
    width = 0.8 / len(runtimes)
    figure = _figure((max(4.8, 1.4 + 0.75 * len(runtimes) * len(batches)), 3.4))
    axes = figure.add_subplot()
    for place, (runtime, colour) in enumerate(zip(runtimes, COLOURS.values(), strict=False)):
        own = [one for one in timings if one["runtime"] == runtime]
        at = [batches.index(one["batch"]) + (place - (len(runtimes) - 1) / 2) * width for one in own]
        medians = [one["ratio"][0] for one in own]
        spread = [
            [one["ratio"][0] - one["ratio"][1] for one in own],
            [one["ratio"][2] - one["ratio"][0] for one in own],
        ]
        axes.bar(at, medians, 0.9 * width, yerr=spread, capsize=3, color=colour, ecolor="#333333", label=runtime)
        for x, one in zip(at, own, strict=True):
            axes.annotate(
                f"{one['ratio'][0]:.2f}",
                (x, one["ratio"][2]),
                textcoords="offset points",
                xytext=(0, 4),
                ha="center",
                fontsize=8,
                color="#333333",
            )
    axes.axhline(1.0, color=OTHER, linewidth=0.8, label="dense")
    axes.axhline(macs_ratio, color=OTHER, linewidth=1.0, linestyle="--", label=f"MACs, {macs_ratio:.2f}")
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches], fontsize=9)
    axes.set_xlim(-0.6, len(batches) - 0.4)
    axes.set_ylim(0, 1.12 * max(1.0, *(one["ratio"][2] for one in timings)))
    axes.set_ylabel("time, slim / dense", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(runtimes) + 2, fontsize=8, frameon=False)
    with written_aside(Path(path)) as partial:
        figure.savefig(partial, format="png")
    return Path(path)


def _figure(size: tuple[float, float]) -> "Figure":
    """Open a figure of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here: slow, and not needed by a checkpoint
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _read_widths(source: Any) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return widths and kinds from any accepted source."""
    if hasattr(source, "setup"):
        source = {"setup": source.setup}
    if "setup" in source:
        source = source["setup"].get("provenance") or {}
    if "widths" in source and isinstance(source["widths"], dict):
        return source["widths"], source.get("kinds") or {}
    pairs = all(isinstance(v, (list, tuple)) and len(v) == 2 for v in source.values())
    return (dict(source), {}) if source and pairs else ({}, {})


def _short(name: str) -> str:
    """Return the end of a long name, which distinguishes layers."""
    return name if len(name) <= 40 else "..." + name[-37:]
