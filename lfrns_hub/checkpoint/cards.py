"""Cards written anew: the record says what stands in them, so that no weights are loaded."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lfrns_hub.checkpoint.files import is_own, read_config, write_card
from lfrns_hub.checkpoint.kinds import kind_of
from lfrns_hub.hub.lineage import KEYS
from lfrns_hub.measure import Record
from lfrns_hub.runs import draft_of, locked, put_in_place, settle

# Files of a checkpoint that a card is written from, and those that are written with it.
SOURCES = ("config.json", "preprocessor_config.json")
WRITTEN = ("README.md", "record.json", "widths.png", "curve.png", "clusters.png")


def render_card_again(directory: str | Path, *, record: Record | None = None, license: str | None = None) -> Path:
    """Write a checkpoint's card and pictures anew from its record; sections and front matter of people stay.

    Args:
        directory: The checkpoint.
        record: The record that replaces the one there. None: the one there; without one the card says "not measured".
        license: Licence of the model, by the Hub's identifier, that is stated from now on.
    Returns:
        Path of the card.
    Raises:
        ValueError: It is no checkpoint, or no card can be written of its record. The folder is unchanged.
        BlockingIOError: Another process is writing to it.
        OSError: It cannot be written; the folder is unchanged.
    """
    call = f"render_card_again({str(directory)!r})"
    named, folder = Path(directory), Path(os.path.realpath(directory))
    with locked(folder, call), draft_of(folder) as draft:
        settle(folder, is_own)  # a killed save may not have done its last step
        config = read_config(folder)
        source = _source_of(config, call)
        if record is None and (folder / "record.json").is_file():
            record = Record.load(folder / "record.json")
        for name in SOURCES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, draft / name)
        if license is not None and record is not None:
            record.setup["license"] = license
        elif license is not None:
            facts = {key: value for key, value in config["slim"].items() if key not in KEYS or key == "base_model"}
            config["slim"] = facts | {"license": license}
            (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_card(draft, record, folder, name=named.name or folder.name, **source)
        put_in_place(draft, folder, _is_written, exchanged=False)
    return named / "README.md"


def _is_written(name: str) -> bool:
    """Return whether a file of this name is replaced."""
    return name in (*SOURCES, *WRITTEN)


def _source_of(config: dict[str, Any], call: str) -> dict[str, str]:
    """Return the dense architecture and the library of a checkpoint, as `save` tells them to its card."""
    kind, facts = kind_of(config), config["slim"]
    if kind in ("timm", "timm_wrapper"):
        return {"base": str((config.get("model_args") or {}).get("base")), "library": "timm"}
    if not facts:
        raise ValueError(f"{call}: its config.json is none that lfrns_hub.save wrote. Name a checkpoint's folder.")
    if kind == "own":
        return {"base": str(facts.get("class")), "library": "pytorch"}
    return {"base": str(facts.get("class")).removeprefix("Lfrns"), "library": "transformers"}
