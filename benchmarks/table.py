"""Render benchmarks/results/*-macs*.json: docs/results.md, the README's table and the curve of accuracy against MACs.

python benchmarks/table.py
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lfrns_hub.hub.zoo_index import Row, markdown_of

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
COLOURS = {"ours": "#0072B2", "ablation": "#56B4E9", "control": "#999999", "peer": "#D55E00"}

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
    """Draw accuracy right after the cut against MACs of every contestant that ran at two budgets and more."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    dense = None
    for setup, cells, _ in files:
        if setup["task"] == task and not setup["params"]:
            dense = setup["dense_top1_pct"]
            for family, name in rows_of(setup, cells):
                point = cells[name][0].get(0)
                if point and family != "reference":
                    lines[family, name].append((point["macs_fraction"], point["top1_pct"]))
    lines = {key: [*sorted(points), (1.0, dense)] for key, points in lines.items() if len(points) > 1}
    if len(lines) < 2:  # one alone compares nothing
        return False
    figure = Figure(figsize=(8.4, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(dense, color="#333333", linewidth=0.8, linestyle=":")
    axes.annotate("dense", (1, dense), (0, 3), textcoords="offset points", ha="right", fontsize=8, color="#333333")
    axes.set_xlim(0.2, 1)
    best = {max((points[0][1], name) for (group, name), points in lines.items() if group == kind)[1]
            for kind in {family for family, _ in lines} & {"ours", "peer"}}  # fmt: skip
    known = set()
    for (family, name), points in sorted(lines.items(), key=lambda item: item[0][1] == "ours"):
        label = "ours" if name == "ours" else TITLES[family] if family not in known and family != "ours" else None
        known.add(family)
        width, alpha = (2.6, 1.0) if name == "ours" else (1.0, 0.75)
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[family], linewidth=width, alpha=alpha,
                  markersize=2 + width, label=label)  # fmt: skip
        if name in best:
            axes.annotate(name, points[0], (2, -12), textcoords="offset points", fontsize=8, color=COLOURS[family])
    axes.set_xlabel("MACs kept, share of dense", fontsize=9)
    axes.set_ylabel("top-1 right after the cut, %", fontsize=9)
    axes.set_title(f"{task}: accuracy against MACs, before any retraining", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, format="png")
    return True


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
