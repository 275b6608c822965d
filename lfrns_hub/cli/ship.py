"""Commands that publish or export a checkpoint: push, export."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import lfrns_hub as lfrns
from lfrns_hub.cli.terminal import Dense, Folder, Json, WithImages, app, examples, load_slim, show
from lfrns_hub.runtimes.export import EXAMPLE_IMAGES, FORMATS
from lfrns_hub.runtimes.export import export as write_export
from lfrns_hub.zoo import example_input


@app.command(epilog=examples("lfrns push slim/ user/resnet50.lfrns50", "lfrns push slim/ user/name --private --pr"))
def push(
    directory: Folder,
    repo: Annotated[str, Argument(help="repository on the Hub, user/name")],
    private: Annotated[bool, Option("--private", help="create the repository as private")] = False,
    revision: Annotated[str | None, Option(help="branch to push to, created if it does not exist")] = None,
    message: Annotated[str | None, Option(help="commit message")] = None,
    pull_request: Annotated[bool, Option("--pr", help="open a pull request instead of committing")] = False,
    with_images: WithImages = False,
    as_json: Json = False,
) -> None:
    """Push a folder to the Hub, as one commit: the checkpoint's own files; what else lies there stays and is named."""
    options = {"private": private, "revision": revision, "commit_message": message, "create_pr": pull_request}
    options["with_images"] = with_images
    url = lfrns.push(directory, repo, **options)
    show(as_json, {"url": url}, url)


@app.command(
    epilog=examples("lfrns export slim/ --format onnx", "lfrns export slim/ --format pt2 --out model.pt2 --json")
)
def export(
    directory: Folder,
    format: Annotated[str, Option(help=" or ".join(FORMATS))] = "onnx",
    out: Annotated[str | None, Option(metavar="FILE", help="file to write (default: model.FORMAT in DIR)")] = None,
    dense: Dense = None,
    as_json: Json = False,
) -> None:
    """Write a slim model as ONNX or as a torch.export archive, checked against PyTorch before it is put in place."""
    model = load_slim(directory, dense)
    path = Path(out) if out else Path(directory) / f"model.{format}"
    done = write_export(model, path, example_input(model), format=format)
    checked = (
        "not compared with PyTorch: pip install 'lfrns_hub[export]'"
        if done.largest_error is None
        else f"differs from PyTorch by {done.largest_error:.1e} of the largest output"
    )
    batch = "any batch size" if done.any_batch else f"batches of {EXAMPLE_IMAGES} alone"
    line = f"{done.path}: {done.size_mb:.2f} MB, {batch}, {checked}."
    show(as_json, {**asdict(done), "path": str(done.path)}, line)
