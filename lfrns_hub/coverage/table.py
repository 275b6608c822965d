"""Output of the trials: a line as a network finishes, tables on the terminal, docs/coverage.md."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lfrns_hub.coverage.cases import SECTIONS
from lfrns_hub.coverage.families import NOT_IMAGES
from lfrns_hub.format.terminal import print_table

Row = dict[str, Any]
SLOW = 180  # seconds; longer rows are listed
COLUMNS = (
    "family", "model", "params (M)", "input", "exact", "approximate", "frozen", "smallest MACs", "slimmed", "MACs",
    "self-check", "reloaded", "s",
)  # fmt: skip
ON_TERMINAL = ("family", "model", "smallest MACs", "slimmed", "MACs", "self-check", "reloaded", "s")
LEGEND = """\
Each network is built with random weights, traced, self-checked, slimmed to 0.75 of its MACs, saved, loaded, compared,
and trained for a step. A row that is not named beneath its table has passed all of this. Units are chosen at the
defaults of `slim`, from 32 images of noise and with two steps of the gates: this tests whether it works, not how well.

- **exact, approximate, frozen**: groups / units of each kind. Exact groups are cut and self-checked; approximate ones
  (their width crosses a LayerNorm or the like) are cut with `approximate=True` only; frozen ones never. The classes
  are not counted. `lfrns units MODEL` names each group, and the reason for each frozen one.
- **smallest MACs**: fraction of the dense MACs with one unit left in every exact group; after the slash, in every
  approximate one as well.
- **slimmed**: by exact groups alone, or with approximate ones where exact ones do not reach 0.75; **MACs** is the
  fraction kept.
- **self-check**: of the plan that was cut, largest error over the largest output, float64, norms and gates randomised;
  1e-8 is allowed.
- **reloaded**: largest difference of the outputs after saving and loading, over the largest output, float32; 1e-5 is
  allowed.
- **s**: seconds of processor time, one thread, all steps; wall-clock time for a network that was stopped.

We sort timm modules into convnets, ViTs and hybrids: a hybrid has attention and stages of convolutions; networks
without attention count as ViTs where they work on a grid of patches, as convnets where they have a convnet's stages.
Where a family's smallest model has more than 60 M parameters it is built with fewer blocks or narrower, as the
arguments in its row say."""


def describe_row(row: Row) -> str:
    """Return the result of a network in one line."""
    name = f"{row['section']}: {row['model']}" + (f" ({row['option']})" if row["option"] else "")
    if reason := why_not(row):
        return f"{name}: {reason}, {row['seconds']:.0f} s"
    cells = dict(zip(COLUMNS, cells_of(row), strict=True))
    return (
        f"{name}: {cells['slimmed']}, MACs {cells['MACs']} (smallest {cells['smallest MACs']}), "
        f"self-check {cells['self-check']}, reloaded {cells['reloaded']}, {cells['s']} s"
    )


def why_not(row: Row) -> str | None:
    """Return the reason why a network does not work, and at which step; None if it works."""
    return f"{row['reason']} (at: {row.get('step', 'start')})" if row.get("reason") else None


def cells_of(row: Row) -> list[str]:
    """Return a row's cells, in the order of COLUMNS."""
    groups, reach, size = row.get("groups", {}), row.get("reach"), row.get("input_size")
    states = [
        ", ".join(f"{kind} {count}/{units}" for kind, (count, units) in groups.get(state, {}).items())
        for state in ("exact", "approximate", "frozen")
    ]
    model = row["model"] + (f": {row['option']}" if row["option"] else "")
    side = "" if not size else f"{size[1]}" if size[1] == size[2] else f"{size[1]}x{size[2]}"
    smallest = "" if not reach else f"{reach['exact']:.2f}"
    if reach and groups.get("approximate"):
        smallest += f" / {reach['approximate']:.2f}"
    no_exact_group = row.get("slimmed") and row.get("check_error") is None
    return [
        row["family"],
        model,
        _number(row.get("params_m"), ".1f"),
        side,
        *states,
        smallest,
        "no" if why_not(row) else row.get("slimmed", ""),
        _number(row.get("macs_fraction"), ".3f"),
        "no exact group" if no_exact_group else _number(row.get("check_error"), ".0e"),
        _number(row.get("reload_difference"), ".0e").replace("0e+00", "0"),
        f"{row['seconds']:.0f}",
    ]


def count_rows(rows: Sequence[Row]) -> str:
    """Return a count of what works: "43 of 44, 3 of them with approximate groups"."""
    works = [row for row in rows if not why_not(row)]
    inexact = sum(row["slimmed"] == "approximate" for row in works)
    return f"{len(works)} of {len(rows)}" + (f", {inexact} of them with approximate groups" if inexact else "")


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """Print one table per section, the reasons below it, and the counts."""
    for section in SECTIONS:
        here = [row for row in rows if row["section"] == section]
        if not here:
            continue
        table = Table(*ON_TERMINAL, title=f"{section}: {count_rows(here)}")
        for row in here:
            cells = dict(zip(COLUMNS, cells_of(row), strict=True))
            table.add_row(*(cells[name] for name in ON_TERMINAL), style="red" if why_not(row) else None)
        print_table(table, console)
        for row in here:
            for line in _reasons(row):
                console.print(line, highlight=False, soft_wrap=True)


def write_tables(rows: Sequence[Row], facts: Mapping[str, str], path: Path, before: Sequence[Row] = ()) -> None:
    """Write the tables as Markdown.

    Args:
        rows: Rows in the order of the table.
        facts: Setup of the run, by name: "command", "machine", "versions".
        path: The file.
        before: Rows of an earlier table; networks that got worse since are listed.
    """
    lines = ["# Coverage: which networks were tried, with what result", ""]
    lines += ["Generated; do not edit.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(text)} |" for name, text in facts.items()]
    lines += [
        f"| time | {count_minutes(rows):.0f} minutes |",
        "",
        "| networks | slim to 0.75 of their MACs |",
        "|---|---|",
    ]
    sections = {section: [row for row in rows if row["section"] == section] for section in SECTIONS}
    sections = {section: here for section, here in sections.items() if here}
    lines += [f"| {section} | {count_rows(here)} |" for section, here in sections.items()]
    lines += ["", LEGEND]
    if slow := [f"- {_title(row)}: {row['seconds']:.0f} s" for row in rows if row["seconds"] > SLOW]:
        lines += ["", f"Longer than {SLOW // 60} minutes:", "", *slow]
    if before:
        lines += ["", "Worse than in the table before this one:", "", *(worse_than(before, rows) or ["- nothing"])]
    for section, here in sections.items():
        lines += ["", f"## {section}: {count_rows(here)}", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(_cell(text) for text in cells_of(row)) + " |" for row in here]
        reasons = [line for row in here for line in _reasons(row)]
        lines += ["", "Does not work:", "", *map(_plain, reasons)] if reasons else []
        if section == "transformers ViTs":
            lines += ["", "Types of the same registry that were not tried:", ""]
            lines += [f"- {name}: {why}" for name, why in NOT_IMAGES.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def worse_than(before: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Return the networks that worked before and do not now, or whose MACs can be reduced less."""
    earlier = {(row["section"], _title(row)): row for row in before}
    worse = []
    for row in rows:
        was = earlier.get((row["section"], _title(row)))
        if was is None:
            continue
        if why_not(row) and not why_not(was):
            worse.append(f"- {_title(row)}: slimmed before; now {_plain(why_not(row))}")
        elif row.get("reach") and was.get("reach"):
            now, then = row["reach"]["approximate"], was["reach"]["approximate"]
            if now > then + 0.005:
                worse.append(f"- {_title(row)}: smallest MACs {then:.2f} before, {now:.2f} now")
    return worse


def _title(row: Row) -> str:
    """Return the name of a network."""
    return f"{row['family']}, {row['model']}{': ' + row['option'] if row['option'] else ''}"


def count_minutes(rows: Sequence[Row]) -> float:
    """Return the total elapsed minutes of all sessions that made the rows (an interrupted run has several)."""
    sessions: dict[str, float] = {}
    for row in rows:
        session = row.get("session", "")
        sessions[session] = max(sessions.get(session, 0.0), row.get("elapsed_s", 0.0))
    return sum(sessions.values()) / 60


def _reasons(row: Row) -> list[str]:
    """Return why a network does not work, and the reasons for most of its frozen units."""
    if not (reason := why_not(row)):
        return []
    lines = [f"- {_title(row)}: {reason}"]
    for frozen in row.get("frozen", ())[:3]:
        lines.append(
            f"  - {frozen['units']} {frozen['kind']}s in {frozen['groups']} groups ({frozen['first']} ...): "
            f"{frozen['reason']}"
        )
    return lines


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _plain(text: str) -> str:
    """Escape characters of a message that Markdown would interpret."""
    return re.sub(r"([\\*_<>\[\]])", r"\\\1", text)


def _cell(text: str) -> str:
    """Escape characters of a text that would split a table cell."""
    return re.sub(r"([|*<>])", r"\\\1", text)
