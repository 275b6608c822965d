"""Plots for the model card: matplotlib, without a display."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lfrns_hub.measure import main_figure
from lfrns_hub.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    ORANGE,
    VERMILLION,
    axis_range,
    label_points,
    name_machine,
    sheet,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"channel": BLUE, "head": VERMILLION, "neuron": GREEN}
DENSE = "#E3E3E3"
RUNTIMES = {"eager": "PyTorch, eager", "compiled": "torch.compile", "onnxruntime": "ONNX Runtime"}
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
    size = (7.2, max(1.9, 1.1 + 0.19 * min(len(names), MAX_ROWS)))
    with sheet(path, size, title="Units kept in each group") as figure:
        axes = figure.add_subplot()
        axes.barh(rows, [1.0] * len(names), color=DENSE, height=0.84)
        shares = [kept / dense if dense else 0.0 for kept, dense in widths.values()]
        axes.barh(rows, shares, color=[COLOURS.get(kinds.get(name), GREY) for name in names], height=0.84)
        for row in rows[::step]:
            kept, dense = widths[names[row]]
            axes.text(1.01, row, f"{kept} of {dense}", va="center", fontsize=label_size)
        axes.set_yticks(rows[::step], [_short(names[row]) for row in rows[::step]], fontsize=label_size)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.16)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "dense"])
        axes.set_xlabel("units kept, share of the dense width")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_bounds(0, 1)
        present = [kind for kind in COLOURS if kind in {kinds.get(name) for name in names}]
        handles = [Patch(color=COLOURS[kind], label=f"{kind}s kept") for kind in present]
        if any(kinds.get(name) not in COLOURS for name in names):
            handles.append(Patch(color=GREY, label="units kept"))
        handles.append(Patch(color=DENSE, label="removed"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
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


def plot_ladder(
    points: Sequence[dict[str, Any]],
    dense: dict[str, Any],
    path: str | Path,
    *,
    title: str = "",
    setup: dict[str, Any] | None = None,
) -> Path:
    """Draw accuracy against MACs, and against latency where it was measured, of slim models and their dense one.

    Each slim model is labelled with the share of the dense MACs that it keeps. Where the axis of accuracy does not
    start at 0, a note says so.

    Args:
        points: For each slim model top1_pct (or the main figure of its outputs), macs_g, and perhaps latency_ms
            and occasion, as in the `slim` of a Record.
        dense: The same for the dense model.
        path: The PNG to write.
        title: Title of the figure.
        setup: Setup of the measurement, as in a Record: its machine is named.
    Returns:
        The path.
    Raises:
        ValueError: There is no point, or one has no accuracy or belongs to another occasion.
    """
    shown = main_figure(dense)
    everything = [*points, dense]
    if not points or any(one.get(shown.key) is None for one in everything):
        raise ValueError(
            f"plot_ladder(): each point and the dense model need a {shown.key}. Measure them on labelled images."
        )
    if len({one.get("occasion") for one in everything}) > 1:
        raise ValueError(
            "plot_ladder(): the points were measured at different times, and such figures do not compare. Measure them "
            "and the dense model in one call of measure_each."
        )
    prefix, factor = ("G", 1) if dense["macs_g"] >= 0.1 else ("M", 1000)
    sides = [(f"MACs of one image, {prefix}", [factor * one["macs_g"] for one in everything])]
    if all(one.get("latency_ms") is not None for one in everything):
        sides.append(("latency of one image, ms", [one["latency_ms"] for one in everything]))
    accuracy = [one[shown.key] for one in everything]
    percent, slim = shown.unit == " %", "slim, with the share of the dense MACs that it keeps"
    low, high = axis_range(accuracy, 10 if percent else 0.1)
    notes = _occasion(dense, setup or {}, timed=len(sides) > 1)
    notes += [f"The vertical axis starts at {low:g}{shown.unit}, not at 0."] if low else []
    with sheet(path, (0.6 + 3.8 * len(sides), 3.4), title=title or "Accuracy of slim models", notes=notes) as figure:
        for axes, (label, costs) in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
            *line, last = zip(costs, accuracy, strict=True)
            axes.set_xlim(0, 1.12 * max(costs))
            axes.set_ylim(low, min(high, 101) if percent else high)
            axes.grid()
            axes.axhline(last[1], color=GREY, linewidth=0.9, linestyle=":")
            axes.plot(*zip(*sorted(line), strict=True), "-o", color=BLUE, linewidth=1.8, markersize=5, label=slim)
            axes.plot(*last, "s", color=INK, markersize=6, label="dense")
            axes.set_xlabel(label)
        names = {"top1_pct": "top-1 accuracy, %"}
        figure.axes[0].set_ylabel(names.get(shown.key, shown.label))
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=1 if len(sides) == 1 else 2
        )
        whole = dense["macs_g"]
        texts = [*(f"{100 * one['macs_g'] / whole:.0f} %" if whole else "" for one in points), ""]
        for axes, (_, costs) in zip(figure.axes, sides, strict=True):
            label_points(axes, list(zip(costs, accuracy, strict=True)), texts)
    return Path(path)


def _occasion(scores: dict[str, Any], setup: dict[str, Any], *, timed: bool) -> list[str]:
    """Return a line on what the figures were measured with."""
    images = scores.get("images")
    where = name_machine(setup) if timed else ""
    parts = [f"{images:,} test images" if isinstance(images, int) else "", f"latency on {where}" if where else ""]
    return ["; ".join(filter(None, parts))]


def plot_bench(
    timings: Sequence[dict[str, Any]],
    macs_ratio: float,
    path: str | Path,
    *,
    title: str = "",
    setup: dict[str, Any] | None = None,
) -> Path:
    """Draw the milliseconds of a dense model and its slim one as bars, a panel for each batch size.

    Whiskers show the first and third quartile. A mark on each slim bar shows the time that the dense model would take
    with the slim one's share of the MACs.

    Args:
        timings: Each with runtime, batch, and dense_ms, slim_ms and ratio as [median, first quartile, third quartile].
        macs_ratio: MACs of the slim model over those of the dense one.
        path: The PNG to write.
        title: Title of the figure.
        setup: Setup of the measurement, whose machine is named.
    Returns:
        The path.
    Raises:
        ValueError: There is no timing.
    """
    if not timings:
        raise ValueError(
            "plot_bench(timings=[]): there is nothing to draw. Give those of lfrns_hub.runtimes.bench.bench."
        )
    by_batch = {one["batch"]: [] for one in timings}
    for one in timings:
        by_batch[one["batch"]].append(one)
    rows = [len(own) for own in by_batch.values()]
    notes = [
        name_machine(setup or {}),
        "Medians of passes in turns, with quartiles; in brackets the median ratio of a turn.",
    ]
    size = (7.2, 0.75 * len(rows) + 0.62 * sum(rows))
    with sheet(path, size, title=title or "Time of a forward pass", notes=notes) as figure:
        figure.get_layout_engine().set(hspace=0.06)
        panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[count + 0.6 for count in rows])[:, 0]
        for axes, (batch, own) in zip(panels, by_batch.items(), strict=True):
            _draw_batch(axes, own, macs_ratio)
            axes.set_title(f"batch {batch}", loc="left", fontsize=9)
        panels[-1].set_xlabel("time of one pass, ms")
        share, *bars = panels[0].get_legend_handles_labels()[0]
        figure.legend(handles=[*bars, share], loc="outside lower center", ncols=3)
    return Path(path)


def _draw_batch(axes: "Axes", timings: Sequence[dict[str, Any]], macs_ratio: float) -> None:
    """Draw the bars of one batch size, a row for each runtime."""
    thick, rows = 0.38, range(len(timings))
    for key, name, colour, shift in (("dense_ms", "dense", LIGHT, -thick / 2), ("slim_ms", "slim", BLUE, thick / 2)):
        medians = [one[key][0] for one in timings]
        spread = [[one[key][0] - one[key][1] for one in timings], [one[key][2] - one[key][0] for one in timings]]
        places = [row + shift for row in rows]
        whiskers = {"elinewidth": 1, "capsize": 2.5, "ecolor": INK}
        axes.barh(places, medians, 0.94 * thick, xerr=spread, error_kw=whiskers, color=colour, label=name)
        for place, one in zip(places, timings, strict=True):
            text = f"{_digits(one[key][0])} ms" + (f" ({one['ratio'][0]:.2f} of dense)" if name == "slim" else "")
            axes.annotate(text, (one[key][2], place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    for row, one in enumerate(timings):
        at, label = macs_ratio * one["dense_ms"][0], f"{macs_ratio:.2f} of dense, the share of the MACs"
        axes.plot([at, at], [row, row + thick], "-", color=ORANGE, linewidth=2.4, label=None if row else label)
    axes.set_yticks(rows, [RUNTIMES.get(one["runtime"], one["runtime"]) for one in timings], fontsize=9)
    axes.set_ylim(len(timings) - 0.5, -0.5)
    axes.set_xlim(0, 1.36 * max(one[key][2] for one in timings for key in ("dense_ms", "slim_ms")))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _digits(ms: float) -> str:
    """Return milliseconds with three digits or more.

    Example:
        >>> [_digits(ms) for ms in (0.1234, 1.234, 12.34, 1234.5)]
        ['0.123', '1.23', '12.3', '1,234']
    """
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:#.3g}"


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
