"""The dense model of a checkpoint, found again by its weights for a comparison, or why it cannot be found."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lfrns_hub.format.untrusted import read_json
from lfrns_hub.latency import cache_directory
from lfrns_hub.measure import weights_id
from lfrns_hub.recipe import load_weights
from lfrns_hub.runs import written_aside
from lfrns_hub.zoo import create_base, create_dense, create_skeleton, input_size_of
from lfrns_hub.zoo.names import resolve

NOT_FOUND = (
    "the dense model was not found again on this machine. Name it by --dense MODEL, with --weights FILE if need be"
)


def remember_dense(dense: nn.Module, name: str, weights: str | None) -> None:
    """Record the origin of a dense model in the user's cache, not in the checkpoint, because paths are private.

    Args:
        dense: The model built from the two.
        name, weights: Arguments of the command.
    """
    source = {
        "model": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "weights": None if weights is None else str(Path(weights).resolve()),
    }
    try:
        with written_aside(_note_of(weights_id(dense))) as partial:
            partial.write_text(json.dumps(source), encoding="utf-8")
    except OSError:  # a home that cannot be written to: the model will not be found again
        pass


def size_beside(slim: nn.Module, dense: str) -> int | None:
    """Return the `img_size` by which a dense model takes the images of its slim model; None where it does anyway.

    Args:
        slim: The slim model.
        dense: Name of the dense model.
    """
    _, height, width = input_size_of(slim)
    if height != width or resolve(dense)[0] == "function":
        return None
    own = input_size_of(create_skeleton(dense, device="meta"))
    return None if own[1:] == (height, width) else height


def find_dense(directory: str, setup: dict[str, Any], slim: nn.Module) -> tuple[nn.Module | None, str]:
    """Build the dense model of a checkpoint again, if the original weights can be found.

    Args:
        directory: The checkpoint.
        setup: Setup of its record: `dense_id` identifies the weights.
        slim: It, loaded.
    Returns:
        The model, or None and the reason.
    """
    wanted = setup.get("dense_id")
    if wanted is None or not re.fullmatch(r"[0-9a-f]{1,64}", wanted):
        return None, "the record does not say which weights the dense model had. Name it by --dense MODEL"
    for build in _ways(Path(directory), wanted, setup, slim):
        try:
            dense = build()
        except (ValueError, OSError, ImportError, RuntimeError, KeyError):  # missing, damaged, or of another network
            continue
        if weights_id(dense) == wanted:
            return dense, ""
    return None, NOT_FOUND


def _ways(directory: Path, wanted: str, setup: dict[str, Any], slim: nn.Module) -> Iterator[Callable[[], nn.Module]]:
    """Yield functions that may build the dense model: from the command's arguments, the run's or published weights."""
    note = _note_of(wanted)
    if note.is_file():

        def as_noted() -> nn.Module:
            source = read_json(note, str(note))
            size = size_beside(slim, source["model"])
            return create_dense(source["model"], weights=source["weights"], img_size=size)

        yield as_noted
    kept = directory / "work" / "dense.safetensors"
    if kept.is_file():

        def trained_here() -> nn.Module:
            dense = create_base(directory)
            load_weights(dense, kept)
            return dense

        yield trained_here
    published = setup.get("base_model") or (setup.get("provenance") or {}).get("base_model")
    # The record is untrusted: no folder, and no function that would be imported and run.
    if (
        isinstance(published, str)
        and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", published)
        and not Path(published).exists()
    ):
        yield lambda: create_dense(published, img_size=size_beside(slim, published))


def _note_of(identity: str) -> Path:
    """Return the file that records the origin of weights."""
    return cache_directory() / "dense" / f"{Path(identity).name}.json"
