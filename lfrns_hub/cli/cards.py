"""Cards and indexes brought up to date: `lfrns card`, and the links between checkpoints that were pushed."""

import sys
from pathlib import Path
from typing import Any

import lfrns_hub as lfrns
from lfrns_cli.commands import Card
from lfrns_hub.checkpoint import render_card_again
from lfrns_hub.cli.checkpoints import is_slim, refresh_indexes
from lfrns_hub.cli.terminal import show
from lfrns_hub.hub.index import around, refresh_index
from lfrns_hub.hub.reach import repository_of
from lfrns_hub.hub.zoo_index import is_zoo, read_rows, write_zoo_index
from lfrns_hub.measure import Record


def card(asked: Card) -> int:
    """Write the cards of checkpoints anew, and the indexes over them; returns 1 where one could not be written."""
    found = [work for name in asked.directories for work in _below(Path(name))]
    written, failed = [], {}
    for path, write in dict(found).items():
        try:
            write(path)
            written.append(str(path / "README.md"))
        except (ValueError, OSError) as error:
            failed[str(path)] = f"{type(error).__name__}: {error}"
    lines = [f"Written: {path}" for path in written] + [f"Left as it is: {path}: {why}" for path, why in failed.items()]
    show(asked.as_json, {"written": written, "failed": failed}, *lines)
    return 1 if failed else 0


def _below(directory: Path) -> list[tuple[Path, Any]]:
    """Return the folders whose README is written from a folder, and what writes it: cards, then the index over them.

    Raises:
        ValueError: It is neither a checkpoint nor has it an index of ours.
    """
    if is_slim(str(directory)):
        return [(directory, render_card_again)]
    members = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if is_zoo(directory):
        models = [path for path in members if around(path / "README.md") is not None]
        inside = [work for path in models for work in _below(path)]
        return [*inside, (directory, lambda path: write_zoo_index(path, read_rows(path)))]
    if around(directory / "README.md") is not None:
        return [*((path, render_card_again) for path in members if is_slim(str(path))), (directory, refresh_index)]
    raise ValueError(
        f"lfrns card {directory}: is neither a checkpoint nor a folder with an index of them. Name one that lfrns slim "
        "or lfrns zoo wrote."
    )


def push_each(
    repositories: dict[Path, str], *, with_images: bool = False, private: bool = False
) -> tuple[dict[Path, str], dict[Path, Exception]]:
    """Push checkpoints, each to its repository, then once more those whose cards link to others of them.

    Args:
        repositories: By the checkpoints' folders.
        with_images, private: As for `lfrns_hub.push`.
    Returns:
        Addresses of the commits, and the errors of those that were not pushed, by their folders.
    """
    options: dict[str, Any] = {"with_images": with_images, "private": private}
    urls: dict[Path, str] = {}
    failed: dict[Path, Exception] = {}
    for folder, repo in repositories.items():
        try:
            urls[folder] = str(lfrns.push(folder, repo, **options))
        except (ValueError, OSError) as error:
            failed[folder] = error
    changed = note_pushed(urls)
    for folder in [folder for folder in urls if folder.resolve() in changed]:
        try:
            urls[folder] = str(lfrns.push(folder, repositories[folder], commit_message="Link the card", **options))
        except (ValueError, OSError) as error:
            failed[folder] = error
    return urls, failed


def note_pushed(urls: dict[Path, str]) -> list[Path]:
    """State on record where checkpoints were pushed; cards of their siblings, and the indexes over them, link there.

    A checkpoint without an index over it is left as it is.

    Args:
        urls: Addresses of the commits, by folder.
    Returns:
        Full paths of the checkpoints whose cards are not what they were.
    """
    changed: list[Path] = []
    pushed = {folder.resolve(): repository_of(url) for folder, url in urls.items()}
    for above in dict.fromkeys(folder.parent for folder in pushed):
        try:
            if around(above / "README.md") is not None:
                changed += _link_members(above, pushed)
                refresh_indexes(above)
        except (OSError, ValueError) as error:
            print(f"Warning: not all in {above} links to what was pushed: {error}", file=sys.stderr)
    return changed


def _link_members(above: Path, pushed: dict[Path, str | None]) -> list[Path]:
    """Write the records and cards of a folder's checkpoints that know less of each other's repositories than there is.

    Args:
        above: The folder.
        pushed: New repositories, by checkpoint.
    Returns:
        The checkpoints that were written.
    """
    records = {path.parent: Record.load(path) for path in sorted(above.glob("*/record.json")) if is_slim(path.parent)}
    changed = []
    for folder, record in records.items():
        if pushed.get(folder) and record.setup.get("pushed") != pushed[folder]:
            record.setup["pushed"] = pushed[folder]
            changed.append(folder)
    repositories = {folder.name: record.setup.get("pushed") for folder, record in records.items()}
    for folder, record in records.items():
        for row in record.setup.get("budgets") or []:
            repo = repositories.get(str(row.get("name")))
            if repo and row.get("pushed") != repo:
                row["pushed"] = repo
                changed.append(folder)
    for folder in dict.fromkeys(changed):
        render_card_again(folder, record=records[folder])
    return list(dict.fromkeys(changed))
