"""What benchmarks/gpu.py has kept, as Markdown."""

from typing import Any

SMALL_SHARE = 0.03  # of a call: steps below it are summed up
INTRODUCTION = """# On a GPU

Written by `python benchmarks/gpu.py --render` from benchmarks/results/gpu.json and speed/gpu_retraining.json, which
hold every figure of `python benchmarks/gpu.py` and `python benchmarks/gpu_retraining.py`. Where a section says that
weights are random, it shows speed alone, and says nothing about the accuracy that a cut costs.

## A step of `retrain`, loader included, compared with the same step written by hand on tensors on the GPU

With a teacher, in bf16 and channels_last; the loader decodes, crops and mirrors images in workers.
"""


def page(cards: dict[str, Any], steps: dict[str, Any]) -> str:
    """Lay out all that was measured on GPUs: what gpu.py and gpu_retraining.py have kept."""
    lines = [INTRODUCTION]
    ways = list(next(iter(steps["cases"].values()))["milliseconds"]) if steps["cases"] else []
    head = ["", *(f"{way}, ms" for way in ways), "workers", "turns", "GPU"]
    lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name, case in steps["cases"].items():
        first = next(key for key in case if key.startswith("ratio to "))
        cells = [f"{case['milliseconds'][way]:.2f} ({case[first][way]:.2f}x)" for way in ways]
        cells += [str(case["workers"]), str(case["turns"]), case["machine"]["gpu"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if apart := steps.get("apart"):
        lines += [
            "",
            f"After 30 steps in float32, recorded steps differ from plain steps by {apart['recorded']:.1g} of the",
            f"distance travelled; the same plain steps, run again, by {apart['plain again']:.1g}.",
        ]
    return "\n".join([*lines, "", table(cards)])


def table(cards: dict[str, Any]) -> str:
    """Lay the results of all cards out."""
    lines: list[str] = []
    for card, entry in cards.items():
        setup = entry["setup"]
        versions = ", ".join(f"{name} {number}" for name, number in setup["versions"].items() if number)
        lines += [f"## {card}", "", f"Weights: {setup['weights']}. Forward passes: {setup['forward']}.", "", versions]
        for name, row in entry["parts"].items():
            lines += ["", f"### {name}", ""]
            lines += [f"Not finished: {row['error']}", ""] if "error" in row else []
            lines += [f"{label}: {error}\n" for label, error in row.get("failed", {}).items()]
            lines += [*step_lines(row), *forward_lines(row), *stair_lines(row)]
        left_out = ", ".join(entry["left_out"])
        lines += ["", f"Left out for lack of time: {left_out}.", ""] if left_out else [""]
    return "\n".join(lines)


def step_lines(row: dict[str, Any]) -> list[str]:
    """Lay out where the time of each call went."""
    lines: list[str] = []
    for call in ("analyse", "cut", "second cut", "latency 0.5", "latency 0.75"):
        if not row.get(call):
            continue
        whole = sum(one["own"] for one in row[call])
        shown = [one for one in row[call] if one["seconds"] >= SMALL_SHARE * whole]
        lines += [f"| {call} | s | own s | calls |", "| --- | --- | --- | --- |"]
        for one in shown:
            *above, name = one["step"].split(" > ")
            indent = "&nbsp;&nbsp;" * len(above)
            lines.append(f"| {indent}{name} | {one['seconds']:.2f} | {one['own']:.2f} | {one['calls']} |")
        lines += [f"| smaller steps | | {whole - sum(one['own'] for one in shown):.2f} | |", ""]
    if unwatched := row.get("unwatched"):
        lines += [f"Unwatched: analyse {unwatched['analyse']:.2f} s, cut {unwatched['cut']:.2f} s.", ""]
    if found := row.get("in_search"):
        ms = f"{found['dense_ms']:.2f} to {found['slim_ms']:.2f} ms"
        lines += [f"Measured in the search for {found['asked']}: {found['fraction']:.3f} of dense, {ms}.", ""]
    return lines


def forward_lines(row: dict[str, Any]) -> list[str]:
    """Lay out milliseconds of the modes, a line for each model."""
    modes = row.get("times", {})
    if not modes:
        return []
    head = ["model", "MACs", "bytes", "widths in 8s, 64s", *(f"{mode}, ms" for mode in modes)]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for label in dict.fromkeys(label for times in modes.values() for label in times):
        facts = row["models"][label]
        multiples = facts.get("multiples")
        cells = [label, f"{facts['macs']:.3f}", f"{facts['bytes']:.3f}"]
        cells.append(f"{multiples['8']}, {multiples['64']}" if multiples else "")
        for times in modes.values():
            one = times.get(label)
            cells.append(f"{one['ms']:.3f} ({one['times_faster'][0]:.2f}x)" if one else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def stair_lines(row: dict[str, Any]) -> list[str]:
    """Lay out what widths off the multiples of 64 cost."""
    layers = row.get("layers", {})
    if not layers:
        return []
    multiples = list(next(iter(layers.values()))["excess"])
    lines = ["Time over the line through the multiples of 64, by the largest power of two that divides a width:", ""]
    lines += [f"| layer, width | {' | '.join(map(str, multiples))} |", "|" + " --- |" * (1 + len(multiples))]
    lines += [f"| {name} | {' | '.join(f'{one:.2f}' for one in f['excess'].values())} |" for name, f in layers.items()]
    return [*lines, ""]
