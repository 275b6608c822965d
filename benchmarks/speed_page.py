"""The page docs/speed.md, laid out from what benchmarks/speed.py and its companions have kept."""

import json
import statistics
from pathlib import Path
from typing import Any

from turns import Row, span

HEAD = """# Speed

Written by `python benchmarks/speed.py --render` from benchmarks/results/speed/, whose files hold machine,
versions, every turn and the command. Ratios are of turns side by side in one run: median (lowest to highest).
"Not measured" means not run.
"""
COLUMNS = ["what / reference", "ratio", "wanted", "median, reference", "median, ours", "turns", "machine"]
NOT_MEASURED = "not measured"


def render(rows: dict[str, Row], results: Path) -> str:
    """Lay all that was measured out as a page.

    Args:
        rows: All there are, by name.
        results: Folder of the CPU's rows, with one folder for each GPU's.
    Returns:
        The page, in Markdown.
    """
    on_cpu, on_gpu = ({n: r for n, r in rows.items() if device in r.devices} for device in ("cpu", "cuda"))
    lines = [*HEAD.splitlines(), "", *table_of(on_cpu, results)]
    for title, fill in (
        ("A step of the FCR gates / a plain training step (wanted: at most 1.10)", gate_steps),
        ("Retraining, images/s: ours / a plain fp32 Accelerate loop with PIL (wanted: at least 2.0)", retraining),
        ("Speed-up, batch 1, timed again in a new process", speed_ups),
    ):
        lines += ["", f"## {title}", "", *fill(results)]
    folders = sorted(path for path in results.glob("*") if path.is_dir())
    for folder in folders:
        lines += ["", f"## On a GPU: {folder.name}", "", *table_of(on_gpu, folder)]
    if not folders:
        lines += [
            "",
            "## On a GPU",
            "",
            "By `python benchmarks/speed.py --device cuda`.",
            "",
            *table_of(on_gpu, results / "none"),
        ]
    return "\n".join(lines) + "\n"


def table_of(rows: dict[str, Row], folder: Path) -> list[str]:
    """Lay out the rows of one device, those that were not measured too."""
    lines = head(COLUMNS)
    for name, row in rows.items():
        if not (content := read(folder, name)):
            lines.append(f"| {row.what} | {NOT_MEASURED} | {row.wanted} | | | | |")
            continue
        machine = content["machine"]
        where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
        for side, ratio in sorted(content["ratios"].items(), key=lambda item: item[0] != "ours"):
            label = row.what if side == "ours" else f"&nbsp;&nbsp;{side} / the same"
            reference, value = (figure(statistics.median(content["turns"][s]), row.batch) for s in ("reference", side))
            wanted, turns = row.wanted if side == "ours" else "", len(content["turns"][side])
            lines.append(f"| {label} | {span(ratio)} | {wanted} | {reference} | {value} | {turns} | {where} |")
    return lines


def gate_steps(results: Path) -> list[str]:
    """Lay out what fcr_step.py found."""
    lines = head(["model", "batch", "plain, ms", "gates, ms", "ratio", "turns"])
    for one in (found := read(results, "fcr_step")).values():
        times = f"{one['plain_ms']:.0f} | {one['gates_ms']:.0f}"
        lines.append(f"| {one['model']} | {one['batch']} | {times} | {span(one['ratio'])} | {one['runs']} |")
    return lines if found else [*lines, f"| {NOT_MEASURED} | | | | | |"]


def retraining(results: Path) -> list[str]:
    """Lay out what retraining.py found."""
    lines = head(["model", "batch", "ours", "plain", "ratio", "turns"])
    for name, one in (found := read(results, "retraining").get("cases", {})).items():
        speed = one["images_per_second"]
        lines.append(
            f"| {name} | {one['batch']} | {speed['ours']:.1f} | {speed['plain']:.1f} | {span(one['ratio'])} | "
            f"{one['runs']} |"
        )
    return lines if found else [*lines, f"| {NOT_MEASURED} | | | | | |"]


def speed_ups(results: Path) -> list[str]:
    """Lay out what latency_budget.py found."""
    lines = ["Wanted: at `latency=0.5` 1.95x, within 3 % of the budget; at `macs=0.5` 1.75x.", ""]
    lines += head(
        ["model", "budget", "dense, ms", "slim, ms", "slim / dense (quartiles)", "speed-up", "off the budget", "MACs"]
    )
    for one in (found := read(results, "latency_budget") or []):
        again, (kind, asked) = one["again"], next(iter(one["budget"].items()))
        off = "" if one["error_pct"] is None else f"{one['error_pct']:+.1f} %"
        low, middle, high = again["quartiles"]
        lines.append(
            f"| {one['model']} | {kind} {asked:g}, round_to {one['round_to']} "
            f"| {again['dense_ms']:.1f} | {again['slim_ms']:.1f} | {middle:.3f} "
            f"({low:.3f} to {high:.3f}) | {one['speedup']:.2f}x | {off} | {one['macs_fraction']:.3f} |"
        )
    return lines if found else [*lines, f"| {NOT_MEASURED} | | | | | | | |"]


def read(folder: Path, name: str) -> Any:
    """Read what was kept under a name; an empty dict where nothing was."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def head(columns: list[str]) -> list[str]:
    """Begin a table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def figure(value: float, batch: int = 0) -> str:
    """Write seconds, or bytes where they are many, and images a second of a batch."""
    if value > 1e6:
        return f"{value / 2**20:.0f} MiB"
    text = f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"
    return f"{text}, {batch / value:.0f} images/s" if batch else text
