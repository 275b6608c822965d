"""Dense models in the layout of their own library, which opens without this package: what `lfrns train` leaves."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models._hub import save_config_for_hf
from torch import nn
from transformers import AutoModelForImageClassification

from lfrns_hub.checkpoint.files import compare, earlier_card, read_config, write_weights
from lfrns_hub.checkpoint.timm import timm_base
from lfrns_hub.checkpoint.transformers import is_transformers, without_progress_bar
from lfrns_hub.hub.card import read_record
from lfrns_hub.hub.dense_card import render_dense_card
from lfrns_hub.hub.handwritten import merge_cards
from lfrns_hub.method.provenance import provenance_of
from lfrns_hub.pictures import data_config_of


def write_stock(model: nn.Module, draft: Path, label_names: Sequence[str] | None) -> dict[str, str]:
    """Write a dense model as its library does, and compare it with what that opens; of a custom class the weights.

    Args:
        model: The model.
        draft: The folder to write to.
        label_names: Name of each class.
    Returns:
        The name of its architecture, and its library: timm, transformers or pytorch.
    Raises:
        ValueError: It is a slim model, whose widths such a layout does not state, or it does not load equal.
    """
    if provenance_of(model).get("plan"):
        raise ValueError(
            f"save({type(model).__name__}, stock=True): it was cut, and the layout of its library states no widths. "
            "Leave stock out."
        )
    if is_transformers(model):
        if label_names is not None:
            model.config.id2label = dict(enumerate(label_names))
            model.config.label2id = {name: number for number, name in enumerate(label_names)}
        with without_progress_bar():
            model.save_pretrained(draft)
            compare(model, AutoModelForImageClassification.from_pretrained(draft, trust_remote_code=False))
        return {"base": type(model).__name__, "library": "transformers"}
    write_weights(model, draft)
    if (name := timm_base(model, None)) is None:
        return {"base": type(model).__name__, "library": "pytorch"}
    named = {"label_names": list(label_names)} if label_names is not None else {}
    save_config_for_hf(model, str(draft / "config.json"), model_config=named, data_config=data_config_of(model))
    config = read_config(draft)
    del config["model_args"]["num_classes"], config["slim"]  # transformers' wrapper of timm models states the number
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    compare(model, timm.create_model(f"local-dir:{draft}", pretrained=True))
    return {"base": name, "library": "timm"}


def write_stock_card(
    draft: Path, record: Any, directory: Path, model: nn.Module, *, name: str, base: str, library: str
) -> None:
    """Write README.md and record.json of a dense model.

    Args:
        draft: The folder to write to.
        record: The Record, its dict, or None.
        directory: Destination of the draft: the sections that people wrote in its card are kept.
        model: The model; its `lfrns_base` states the origin of its weights.
        name, base, library: As for `files.write_card`.
    """
    record, origin = read_record(record), getattr(model, "lfrns_base", {})
    if record is not None:
        (draft / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    card = render_dense_card(record or {}, origin, model_name=name, base=base, library=library)
    card = merge_cards(card, earlier_card(directory), local=True)
    (draft / "README.md").write_text(card, encoding="utf-8", errors="surrogateescape")
