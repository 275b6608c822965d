"""Commands that take a checkpoint elsewhere: push, export, run."""

import os
import runpy
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import lfrns_hub as lfrns
from lfrns_cli.commands import Export, Push, Run
from lfrns_hub.checkpoint import render_card_again
from lfrns_hub.cli.cards import note_pushed
from lfrns_hub.cli.checkpoints import load_slim
from lfrns_hub.cli.terminal import show
from lfrns_hub.runtimes.export import EXAMPLE_IMAGES
from lfrns_hub.runtimes.export import export as write_export
from lfrns_hub.zoo import example_input


def push(asked: Push) -> None:
    """Push a folder, link to it from its siblings, and print where the commit is."""
    folder, options = Path(asked.directory), {"private": asked.private, "with_images": asked.with_images}
    if asked.license:
        render_card_again(folder, license=asked.license)
    url = lfrns.push(
        asked.directory,
        asked.repo,
        revision=asked.revision,
        commit_message=asked.message,
        create_pr=asked.pull_request,
        **options,
    )
    lines = []
    if not (asked.pull_request or asked.revision):
        changed = note_pushed({folder: url})
        if folder.resolve() in changed:
            url = lfrns.push(folder, asked.repo, commit_message=asked.message or "Link the card", **options)
        if others := [path.name for path in changed if path != folder.resolve()]:
            lines = [f"The cards of {', '.join(others)} link there now: push them again where they were pushed."]
    show(asked.as_json, {"url": url}, url, *lines)


def export(asked: Export) -> None:
    """Write a slim model for another runtime and say how close its answers are."""
    model = load_slim(asked.directory, asked.dense)
    path = Path(asked.out) if asked.out else Path(asked.directory) / f"model.{asked.format}"
    done = write_export(model, path, example_input(model), format=asked.format)
    checked = (
        "not compared with PyTorch: pip install 'lfrns_hub[export]'"
        if done.largest_error is None
        else f"differs from PyTorch by {done.largest_error:.1e} of the largest output"
    )
    batch = "any batch size" if done.any_batch else f"batches of {EXAMPLE_IMAGES} alone"
    line = f"{done.path}: {done.size_mb:.2f} MB, {batch}, {checked}."
    show(asked.as_json, {**asdict(done), "path": str(done.path)}, line)


def run(asked: Run) -> int | None:
    """Run a script or a module as python does, with its own signals and traceback; slim models are registered."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = [asked.script, *(asked.arguments or [])]
    sys.path.insert(0, os.getcwd() if asked.module else str(Path(asked.script).resolve().parent))
    try:
        if asked.module:
            runpy.run_module(asked.script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(asked.script, run_name="__main__")
    except Exception:
        traceback.print_exc()
        return 1
    return None
