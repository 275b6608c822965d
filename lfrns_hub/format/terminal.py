"""Text of others on the terminal: whatever it says, rich prints it as it is, without styles, links and escape codes."""

from typing import Any

from rich.console import Console
from rich.text import Text

from lfrns_hub.untrusted import short


def plain_console(**options: Any) -> Console:
    """Return a console for which nothing in square brackets or between colons means anything: paths have both."""
    return Console(markup=False, emoji=False, **options)


def cell(value: Any, length: int = 200, style: str = "") -> Text:
    """Return what a table shows as it is on any console, cut to a length."""
    return Text(short(str(value), length), style)
