"""How the commands print: tables and lines for people, JSON for scripts."""

import json
from typing import Any

from rich.table import Table

from lfrns_hub.format.terminal import plain_console, print_table
from lfrns_hub.method.report import SlimResult


def show(as_json: bool, data: Any, *parts: Any) -> None:
    """Print what a command found: tables and lines for people, or its data as JSON for scripts."""
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
        return
    console = plain_console()  # as wide as the terminal is now
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True)
        else:
            print_table(part, console)


def layer_table(result: SlimResult) -> Table:
    """Lay out what a latency budget removed from each layer and what that bought."""
    told, fraction = result.report.latency, result.report.latency_fraction
    title = f"{told['dense_ms']:.2f} ms to {told['slim_ms']:.2f} ms, {fraction:.3f} of dense; by layer:"
    table = Table("layer", "dense", "slim", title=title)
    for heading in ("dense, ms", "slim, ms", "bought, ms"):
        table.add_column(heading, justify="right")
    for row in told["layers"]:
        widths = [f"{row[name][0]} to {row[name][1]}" if row[name] else "" for name in ("dense", "slim")]
        ms = (row["dense_ms"], row["slim_ms"], row["dense_ms"] - row["slim_ms"])
        table.add_row(row["layer"], *widths, *(f"{value:.3f}" for value in ms))
    return table
