"""The command line, `lfrns`: reads arguments, calls the public functions, prints tables or JSON.

One file per theme: `look` (inspect a model), `make` (a slim checkpoint), `judge` (measure a checkpoint), `ship`.
"""

import sys

from lfrns_hub import recipe
from lfrns_hub.cli import judge, look, make, ship  # noqa: F401  (they add their commands to the app)
from lfrns_hub.cli.terminal import app
from lfrns_hub.format.compat import command_error

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; bad input is one line and exit code 1."""
    recipe.run(_run)


def _run() -> None:
    """Run a command; arguments that typer refuses end it like any other bad input."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="lfrns", standalone_mode=False) or 0)
    except command_error() as error:
        said = error.format_message().rstrip(".")
        raise ValueError(f"lfrns {' '.join(sys.argv[1:])}: {said}. See --help.") from error
