"""Untrusted text on the terminal: rich always prints it unchanged, without styles, links and escape codes."""

from typing import TYPE_CHECKING, Any

from lfrns_hub.format.untrusted import short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def plain_console(**options: Any) -> "Console":
    """Return a console without markup in square brackets or between colons: paths have both."""
    from rich.console import Console  # imported here: loading a model prints nothing

    return Console(markup=False, emoji=False, **options)


def cell(value: Any, length: int = 200, style: str = "") -> "Text":
    """Return a table cell that shows a value unchanged on any console, truncated to a length."""
    from rich.text import Text

    return Text(short(str(value), length), style)
