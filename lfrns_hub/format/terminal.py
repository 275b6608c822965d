"""Text of others on the terminal: whatever it says, rich prints it as it is, without styles, links and escape codes."""

from typing import TYPE_CHECKING, Any

from lfrns_hub.format.untrusted import short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def plain_console(**options: Any) -> "Console":
    """Return a console for which nothing in square brackets or between colons means anything: paths have both."""
    from rich.console import Console  # here: who loads a model prints nothing

    return Console(markup=False, emoji=False, **options)


def cell(value: Any, length: int = 200, style: str = "") -> "Text":
    """Return what a table shows as it is on any console, cut to a length."""
    from rich.text import Text

    return Text(short(str(value), length), style)
