"""Checkpoints that lie in a folder: loaded, measured next to their dense model, saved again with a new record."""

import sys
from pathlib import Path

from torch import nn

import lfrns_hub as lfrns
from lfrns_cli.options import Images
from lfrns_hub import recipe
from lfrns_hub.checkpoint import kind_of
from lfrns_hub.cli.dense_again import find_dense, remember_dense, size_beside
from lfrns_hub.format.untrusted import read_json, short
from lfrns_hub.hub.index import refresh_index
from lfrns_hub.hub.zoo_index import is_zoo, read_rows, write_zoo_index
from lfrns_hub.measure import COUNTED, Record, comparable_controls, comparable_dense, weights_id
from lfrns_hub.pictures import load_processor
from lfrns_hub.zoo import create_dense, create_skeleton


def is_slim(model: str | Path) -> bool:
    """Tell a folder that `lfrns_hub.save` wrote."""
    config = Path(model) / "config.json"
    return config.is_file() and "slim" in read_json(config, str(model))


def load_slim(directory: str, dense: str | None) -> nn.Module:
    """Load a checkpoint; of a class of one's own by way of the dense model's name.

    Raises:
        ValueError: The folder is no checkpoint, or one that needs the name.
    """
    config = Path(directory) / "config.json"
    stored = read_json(config, directory) if config.is_file() else {}
    if kind_of(stored) != "own":
        return lfrns.load(directory)
    if dense is None:
        kind = short((stored.get("slim") or {}).get("class"))
        raise ValueError(
            f"{directory}: it holds a {kind}, which neither timm nor transformers builds. Name what builds "
            "the dense model, package.module:function, by --dense (of retrain: --teacher)."
        )
    return lfrns.load(directory, model=create_skeleton(dense))


def dense_beside(
    directory: str, slim: nn.Module, dense: str | None, weights: str | None
) -> tuple[nn.Module | None, str]:
    """Return the dense model of a checkpoint, the one named or the one of its record; or None and why.

    Args:
        directory: The checkpoint.
        slim: It, loaded: the dense model is built for images of the same size.
        dense, weights: Arguments of the command.
    """
    setup = earlier_record(directory).setup
    if not dense:
        return find_dense(directory, setup, slim)
    model = create_dense(dense, weights=weights, img_size=size_beside(slim, dense))
    remember_dense(model, dense, weights)
    if setup.get("dense_id") not in (None, weights_id(model)):
        print(
            f"Warning: {dense}{f' with {weights}' if weights else ''} has other weights than the dense model that "
            f"{directory} was measured beside before.",
            file=sys.stderr,
        )
    return model, ""


def earlier_record(directory: str) -> Record:
    """Read the record that lies in a checkpoint, an empty one where there is none."""
    path = Path(directory) / "record.json"
    return Record.load(path) if path.is_file() else Record(None, {})


def refresh(
    directory: str,
    model: nn.Module,
    record: Record,
    images: Images,
    label_names: list[str],
    *,
    before: Record | None = None,
    missing: str = "",
) -> Record:
    """Save a checkpoint over itself with a new record, and bring an index over its folder up to date.

    Of the old record only what no moment changes stays: how the model was made, and the dense model's counts where they
    are of the same input size. What was measured then is not put beside what was measured now.

    Args:
        directory: The checkpoint.
        model: It, loaded, and perhaps trained since.
        record: What was measured.
        images: On these.
        label_names: Their classes, or the names of other outputs; none where nothing names these.
        before: The record of before it was trained, its epochs those of now; by default the one that lies there.
        missing: Why the dense model was not measured, if it was not.
    Returns:
        The record that was saved.
    """
    old = before or earlier_record(directory)
    if record.dense is None:
        counted = comparable_dense({"dense": old.dense, "slim": record.slim, "setup": record.setup})
        counts = {key: counted[key] for key in COUNTED if key in counted}
        record.dense = {**dict.fromkeys(("top1_pct", "images", "latency_ms")), **counts} if counts else None
        record.setup["dense_missing"] = missing
    # Of other budgets there are figures of then alone.
    kept = {key: value for key, value in old.setup.items() if key not in ("budgets", "controls", "dense_missing")}
    record.setup = {**kept, **record.setup}
    controls = {"controls": old.setup.get("controls"), "val_split": images.val_split}
    if controls := comparable_controls({"slim": record.slim, "setup": controls}):
        record.setup["controls"] = controls
    record.setup.update(
        recipe.describe_data(images.data),
        val_split=images.val_split,
        label_names=label_names or None,
        epochs=old.setup.get("epochs") or 0,
    )
    processor = load_processor(model)
    lfrns.save(model, directory, record=record, processor=processor, label_names=label_names or None, overwrite=True)
    above = Path(directory).resolve().parent
    try:
        refresh_indexes(above)
    except (OSError, ValueError) as error:
        print(f"Warning: the table over {above} is as it was: {error}", file=sys.stderr)
    return record


def refresh_indexes(above: Path) -> None:
    """Bring the index of a folder of checkpoints up to date, and that of the zoo it is in, where there are any.

    Raises:
        ValueError, OSError: As for `refresh_index` and `write_zoo_index`.
    """
    refresh_index(above)
    if is_zoo(above.parent):
        write_zoo_index(above.parent, read_rows(above.parent))
