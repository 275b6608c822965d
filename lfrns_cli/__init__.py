"""The command line, `lfrns`: reads and checks arguments, then calls what a command does, lfrns_hub/cli.

It lies outside of lfrns_hub, which imports torch, timm and transformers: help and mistakes are answered at once.
"""

import os
import sys
from typing import NoReturn

from lfrns_cli import commands  # noqa: F401  (adds the commands to the app)
from lfrns_cli.app import app, command_error

__all__ = ["app", "main"]


def main() -> NoReturn:
    """Run the command line and exit: bad input is one line and exit code 1 (`LFRNS_TRACEBACK=1` shows where)."""
    arguments = sys.argv[1:]
    try:
        work = app(arguments or ["--help"], prog_name="lfrns", standalone_mode=False)
    except (command_error(), ValueError, OSError) as error:
        if os.environ.get("LFRNS_TRACEBACK"):
            raise
        if isinstance(error, command_error()):
            reason = error.format_message().rstrip(".")
            error = ValueError(f"lfrns {' '.join(arguments)}: {reason}. See --help.")
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    if not callable(work):  # help was shown
        sys.exit(work or 0)
    try:
        from lfrns_hub import recipe  # here: seconds to import
    except KeyboardInterrupt:
        sys.exit(130)
    recipe.run(lambda: sys.exit(work() or 0))
