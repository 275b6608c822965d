"""Untrusted text on the terminal: rich always prints it unchanged, without styles, links and escape codes."""

import os
from typing import TYPE_CHECKING, Any

from lfrns_hub.format.untrusted import short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def plain_console(**options: Any) -> "Console":
    """Return a console without markup in square brackets or between colons: paths have both."""
    from rich.console import Console  # imported here: loading a model prints nothing

    return Console(markup=False, emoji=False, **options)


def print_table(table: "Table", console: "Console") -> None:
    """Print a table whose cells are never cut short: folded on a terminal, on one line each in a pipe or a log."""
    from rich.measure import Measurement

    for column in table.columns:
        column.overflow = "fold"
    if not console.is_terminal and "COLUMNS" not in os.environ:
        wide = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        console.width = max(console.width, wide)
    console.print(table)


def cell(value: Any, length: int = 200, style: str = "") -> "Text":
    """Return a table cell that shows a value unchanged on any console, truncated to a length."""
    from rich.text import Text

    return Text(short(str(value), length), style)
