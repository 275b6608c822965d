"""Render benchmarks/results/*-macs*.json: docs/results.md, the README's table and the curve of accuracy against MACs.

python benchmarks/table.py
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from lfrns_hub.hub.zoo_index import Row, markdown_of
from lfrns_hub.plots.style import BLUE, GREY, INK, PURPLE, VERMILLION, axis_range, sheet

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- accuracy: written by benchmarks/table.py -->", "<!-- end of accuracy -->"
ZOO = [
    "## A zoo: models by budgets, without retraining",
    "",
    "What `lfrns zoo` makes of [benchmarks/zoo.yaml](../benchmarks/zoo.yaml), by `python benchmarks/zoo.py`; written",
    "from its record, benchmarks/results/zoo.json.",
]
FAMILIES = ("reference", "ours", "ablation", "control", "peer")
TITLES = {"reference": "dense", "ours": "ours", "ablation": "one step off", "control": "controls", "peer": "peers"}
LIBRARIES = {"torch-kirigami": (VERMILLION, "-"), "Torch-Pruning": (PURPLE, "--")}  # colour and line
MARKERS = {"L1": "v", "L2": "^", "magnitude": "^", "Taylor": "p", "FPGM": "P", "random": "X", "isomorphic": "<",
           "BatchNorm scale": ">", "OSSCAR": "*"}  # fmt: skip

Cells = dict[str, dict[int, dict[int, dict[str, Any]]]]  # contestant -> epochs -> seed -> cell


def read(path: Path) -> tuple[dict[str, Any], Cells, dict[str, str]]:
    """Read one file: its setup, its measured cells, and why some contestants could not run."""
    content = json.loads(path.read_text(encoding="utf-8"))
    cells: Cells = defaultdict(lambda: defaultdict(dict))
    reasons = {}
    for key, cell in content["cells"].items():
        name, seed, epochs = key.split(" | ")
        if "reason" in cell:
            reasons[name] = cell["reason"]
        else:
            cells[name][int(epochs)][int(seed)] = cell
    return content["setup"], cells, reasons


def mean_of(cells: dict[int, dict[str, Any]], key: str, form: str = ".2f") -> str:
    """Return the mean of a figure over the seeds, with its standard deviation where there are several."""
    values = [cell[key] for cell in cells.values()]
    if not values:
        return "not measured"
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def rows_of(setup: dict[str, Any], cells: Cells) -> list[tuple[str, str]]:
    """Sort the contestants: by family, then by their accuracy right after the cut."""
    names = [(cell_family(cells[name]), name) for name in cells]

    def place(item: tuple[str, str]) -> tuple[int, float]:
        family, name = item
        return FAMILIES.index(family), -statistics.fmean(c["top1_pct"] for c in cells[name][0].values())

    return sorted(names, key=place)


def cell_family(by_epochs: dict[int, dict[int, dict[str, Any]]]) -> str:
    """Return a contestant's family."""
    return next(iter(by_epochs[0].values()))["family"]


def table(setup: dict[str, Any], cells: Cells, reasons: dict[str, str]) -> list[str]:
    """Return one task's table, every column, as lines of Markdown."""
    epochs = sorted({e for by_epochs in cells.values() for e in by_epochs} | {2})
    after = [f"after {e} epochs" for e in epochs if e]
    head = ["contestant", "right after the cut", *after, "agrees", "worst class", "variance kept", "MACs", "params",
            "latency", "seconds", "seeds", "machine"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    family = None
    for group, name in rows_of(setup, cells):
        if group != family:
            lines.append(f"| *{TITLES[group]}* |" + " |" * (len(head) - 1))
            family = group
        first = cells[name][0]
        worst = statistics.fmean(cell["worst_class"]["drop_points"] for cell in first.values())
        kept = statistics.fmean(statistics.fmean(cell["variance_kept"].values()) for cell in first.values())
        lines.append(
            f"| {name} | {mean_of(first, 'top1_pct')} | "
            + " | ".join(mean_of(cells[name].get(e, {}), "top1_pct") for e in epochs if e)
            + f" | {mean_of(first, 'agreement_pct', '.1f')} | {-worst:+.1f} | {kept:.3f} | "
            + f"{mean_of(first, 'macs_fraction', '.3f')} | {mean_of(first, 'params_fraction', '.3f')} | "
            + f"{mean_of(first, 'latency_ratio')} | {mean_of(first, 'seconds', '.0f')} | {len(first)} | "
            + f"{', '.join(sorted({cell['machine'] for cell in first.values()}))} |"
        )
    for name, reason in sorted(reasons.items()):
        lines.append(f"| {name} | cannot: {reason} |" + " |" * (len(head) - 2))
    return lines


def describe(setup: dict[str, Any]) -> str:
    """Say in a line what the figures of a table stand on."""
    budget = f"{setup['macs']:g} of the MACs" + (
        f" and {setup['params']:g} of the parameters" if setup["params"] else ""
    )
    return (
        f"{budget}; dense {setup['dense_top1_pct']:.2f} % top-1, {setup['dense_macs_m']:.1f} M MACs, "
        f"{setup['dense_params_m']:.2f} M parameters; {setup['calibration_images']} calibration images; "
        f"{setup['machine']['threads']} thread, torch {setup['versions']['torch']}"
    )


def best_of(family: str, cells: Cells, epochs: int) -> str:
    """Name the contestant of a family that has the highest mean accuracy, with it."""
    means = {
        name: statistics.fmean(c["top1_pct"] for c in by_epochs[epochs].values())
        for name, by_epochs in cells.items()
        if cell_family(by_epochs) == family and by_epochs.get(epochs)
    }
    best = max(means, key=means.get, default=None)
    return f"{means[best]:.2f} ({best})" if best else "not measured"


def summary(files: list[tuple[dict[str, Any], Cells, dict[str, str]]]) -> list[str]:
    """Return the README's table: ours, dense trained as long, and the best peer of every task and budget."""
    lines = [
        "| model | dense | budget | ours, right after the cut | best control there | best peer there | ours, 2 epochs "
        "| best peer, 2 epochs | dense, 2 epochs more |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for setup, cells, _ in files:
        if "ours" not in cells:
            continue
        budget = f"MACs {setup['macs']:g}" + (f", params {setup['params']:g}" if setup["params"] else "")
        longer = mean_of(cells.get("dense", {}).get(2, {}), "top1_pct")
        lines.append(
            f"| {setup['task']} | {setup['dense_top1_pct']:.2f} | {budget} | {mean_of(cells['ours'][0], 'top1_pct')} | "
            f"{best_of('control', cells, 0)} | {best_of('peer', cells, 0)} | "
            f"{mean_of(cells['ours'].get(2, {}), 'top1_pct')} | {best_of('peer', cells, 2)} | {longer} |"
        )
    return lines


def plot_curve(files: list[tuple[dict[str, Any], Cells, dict[str, str]]], task: str, path: Path) -> bool:
    """Draw accuracy right after the cut against MACs, means over the seeds.

    A line for each contestant of ours and each peer that ran at two budgets or more, by library and criterion; controls
    are single marks.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    dense = None
    for setup, cells, _ in files:
        if setup["task"] == task and not setup["params"]:
            dense = setup["dense_top1_pct"]
            for family, name in rows_of(setup, cells):
                seeds = cells[name][0].values()
                macs, top1 = (statistics.fmean(cell[key] for cell in seeds) for key in ("macs_fraction", "top1_pct"))
                found[family, name].append((100 * macs, top1))
    lines = {
        key: sorted(points)
        for key, points in found.items()
        if key[0] == "peer" or key == ("ours", "ours")
        if len(points) > 1
    }
    if len(lines) < 2:  # one alone compares nothing
        return False
    controls = [point for (family, _), points in found.items() if family == "control" for point in points]
    title = f"{task} on CIFAR-10: accuracy right after the cut, before any retraining"
    low, high = axis_range([dense, *(y for points in lines.values() for _, y in points)], 10)
    notes = ["Means over the seeds; the legend is in the order of the mean accuracy of a line."]
    notes += [f"The vertical axis starts at {low:g} %, not at 0."] if low else []
    with sheet(path, (7.6, 4.3), title=title, notes=notes) as figure:
        axes = figure.add_subplot()
        axes.set_xlim(20, 103)
        axes.set_ylim(low, min(high, 100))
        axes.grid()
        axes.axhline(dense, color=INK, linewidth=0.9, linestyle=":")
        best_first = sorted(lines, key=lambda key: (key[0] != "ours", -statistics.fmean(y for _, y in lines[key])))
        for family, name in best_first:
            axes.plot(*zip(*lines[family, name], (100, dense), strict=True), label=name, **look_of(family, name))
        if controls:
            style = {"color": "none", "markeredgecolor": INK, "markeredgewidth": 1.1, "markersize": 5, "zorder": 6}
            axes.plot(*zip(*controls, strict=True), "D", label="controls: other units\nor widths", **style)
        axes.plot(100, dense, "s", color=INK, markersize=7, label=f"dense, {dense:.2f} %", zorder=5)
        axes.set_xlabel("MACs kept, % of dense")
        axes.set_ylabel("top-1 accuracy, %")
        figure.legend(loc="outside right center", labelspacing=0.7, handlelength=3)
    return True


def look_of(family: str, name: str) -> dict[str, Any]:
    """Return colour, line and marker of a contestant: the line tells the library, the marker the criterion."""
    if family == "ours":
        return {"color": BLUE, "linewidth": 3, "marker": "o", "markersize": 7, "zorder": 5}
    library, _, criterion = name.partition(", ")
    colour, line = LIBRARIES.get(library, (GREY, ":"))
    marker = MARKERS.get(criterion, "x")
    return {"color": colour, "linestyle": line, "linewidth": 1.1, "marker": marker, "markersize": 5.5, "alpha": 0.9}


def main() -> None:
    """Write the page, the README's table and the picture."""
    files = [read(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*-macs*.json"))]
    page = [
        "# Results",
        "",
        "Every contestant has the same dense weights, calibration images, budget and retraining",
        "(benchmarks/accuracy.py says how). Written by `python benchmarks/table.py` from benchmarks/results/*.json,",
        "which hold machine, versions, command and commit. Top-1 in % on CIFAR-10's held-out images (a JPEG copy).",
        "",
        "*Agrees*: share of images on which the dense network predicts the same. *Worst class*: change of the class",
        "that lost most, in points. *Variance kept*: the share of a dense layer's output variance that the slim",
        "layer's inputs still express on held-out images, mean over the layers. All three are measured right after",
        "the cut. Mean ± standard deviation over the seeds. Latency is a ratio to dense, measured in turns on the",
        "row's machine; seconds of different machines, or next to other jobs as most were, do not compare.",
    ]
    for setup, cells, reasons in files:
        page += ["", f"## {setup['task']}, {describe(setup)}", "", *table(setup, cells, reasons)]
    for task in sorted({setup["task"] for setup, _, _ in files}):
        picture = ROOT / "docs" / f"curve_{task}.png"
        if plot_curve(files, task, picture):
            page += ["", f"![accuracy against MACs of {task}]({picture.name})"]
    zoo = ROOT / "benchmarks" / "results" / "zoo.json"
    if zoo.is_file():
        rows = [Row(**row) for row in json.loads(zoo.read_text(encoding="utf-8"))["rows"]]
        page += ["", *ZOO, "", *markdown_of(rows, folders=False)]
    (ROOT / "docs" / "results.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n\n" + "\n".join(summary(files)) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
