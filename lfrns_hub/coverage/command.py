"""The command: which networks, the time limit, where the table is written, and which rows an earlier run has."""

import argparse
import contextlib
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lfrns_hub.coverage.cases import SECTIONS, list_cases, select_cases
from lfrns_hub.coverage.processes import run_cases
from lfrns_hub.coverage.table import Row, describe_row, print_tables, write_tables
from lfrns_hub.coverage.trial import OPTIONS, TARGET
from lfrns_hub.format.terminal import plain_console
from lfrns_hub.measure import cpu_name

Key = tuple[str, str, str, str]  # section, family, model, option
PACKAGES = ("lfrns_hub", "torch", "timm", "transformers", "torchvision")


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the networks that the command line names.

    Args:
        arguments: The command line; None for the process's own.
    Returns:
        0, or 1 if a network failed.
    Raises:
        ValueError: A pattern matches nothing, or an option does not fit.
    """
    options = parse(arguments)
    cases = select_cases(options.patterns, variants=options.variants, size=options.input_size)
    output = Path(options.output) if options.output else None if options.patterns else Path("docs/coverage.md")
    versions = {name: _version(name) for name in PACKAGES}
    chosen = {_key(vars(case) | {"model": case.title}): case for case in cases}
    rows: dict[Key, Row] = {}
    record = output.with_suffix(".jsonl") if output else None
    if record:
        record.parent.mkdir(parents=True, exist_ok=True)
        if options.resume and record.is_file():
            rows = read_rows(record, versions)
            rows = {
                key: row for key, row in rows.items() if not (options.again and row.get("reason") and key in chosen)
            }
        record.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
    todo = [case for key, case in chosen.items() if key not in rows]
    session, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    console = plain_console()
    console.print(f"{len(todo)} networks to try, {len(rows)} known, {options.workers} at a time.")
    for number, row in enumerate(run_cases(todo, workers=options.workers, time_limit=options.time_limit), 1):
        row |= {"session": session, "elapsed_s": time.monotonic() - began, "versions": versions, "options": OPTIONS}
        rows[_key(row)] = row
        console.print(f"{number}/{len(todo)} {describe_row(row)}", highlight=False, soft_wrap=True)
        if record:
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    ordered = in_order(rows)
    print_tables(ordered, console)
    if output:
        facts = {
            "command": f"`{command_of(options)}`",
            "machine": f"{cpu_name()}, {os.cpu_count()} cores, {options.workers} processes of one thread",
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        }
        before = json_lines(Path(options.before)) if options.before else []
        write_tables(ordered, facts, output, before)
        console.print(f"{output}", soft_wrap=True)
    return int(any(rows[key].get("reason") for key in chosen))


def in_order(rows: Mapping[Key, Row]) -> list[Row]:
    """Return rows in the order of the tables, whatever order they finished in; others follow, sorted by name."""
    listed = {_key(vars(case) | {"model": case.title}): place for place, case in enumerate(list_cases())}
    return sorted(
        rows.values(), key=lambda row: (SECTIONS.index(row["section"]), listed.get(_key(row), len(listed)), _key(row))
    )


def command_of(options: argparse.Namespace) -> str:
    """Return the command that makes the same table: no paths, and no patterns if they only selected rows to repeat."""
    words = ["lfrns", "coverage", *([] if options.resume else options.patterns)]
    words += [] if options.variants else ["--no-variants"]
    words += ["--input-size", str(options.input_size)] if options.input_size else []
    return shlex.join([*words, "--time-limit", f"{options.time_limit:g}", "--workers", str(options.workers)])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="lfrns coverage",
        description="Does it work on my model? Builds networks without weights, slims them to "
        f"{TARGET} of their MACs, self-checks, saves, loads and compares.",
    )
    add = parser.add_argument
    add(
        "patterns",
        nargs="*",
        help="families, models or sections as globs, timm models, or package.module:function; none: every family",
    )
    add("--time-limit", type=float, default=240.0, metavar="S", help="seconds for one network (default: %(default)g)")
    add("--workers", type=int, default=2, help="processes, one thread each (default: %(default)s)")
    add("--input-size", type=int, default=None, metavar="PX", help="of the images, in place of each network's own")
    add("--variants", action=argparse.BooleanOptionalAction, default=True, help="also option variants of six families")
    add(
        "--output",
        default=None,
        metavar="FILE",
        help="the table; rows go beside it as .jsonl (default: docs/coverage.md, nothing where patterns are given)",
    )
    add("--before", metavar="FILE", help="rows of an earlier table (.jsonl): what got worse since is listed")
    add("--resume", action="store_true", help="keep the rows that lie beside the table, try the rest")
    add("--again", action="store_true", help="--resume, and try once more what failed")
    options = parser.parse_args(arguments)
    for name in ("time_limit", "workers", "input_size"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"coverage(--{name.replace('_', '-')} {value:g}): must be above 0.")
    options.resume |= options.again
    return options


def read_rows(path: Path, versions: Mapping[str, str | None]) -> dict[Key, Row]:
    """Read the rows of an earlier run, without those of other versions or options."""
    rows = {}
    for row in json_lines(path):
        if row.get("versions") == versions and row.get("options") == OPTIONS:
            rows[_key(row)] = row
    return rows


def json_lines(path: Path) -> list[Row]:
    """Read rows, except for a line that an interrupted run was writing."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _key(row: Mapping[str, Any]) -> Key:
    """Return the key of a row's network."""
    return row["section"], row["family"], row["model"], row["option"]


def _version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
