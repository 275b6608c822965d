"""The card of a dense model that was trained here: its origin and licence, which its slim models state in turn."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment

from lfrns_hub.format.markdown import Markdown, code, finish, plain
from lfrns_hub.hub.card import HUB_ID, MAX_NAME, MAX_NAMES, NOT_MEASURED, UNKNOWN
from lfrns_hub.measure import KINDS, heads_of, main_figures, word_of


def render_dense_card(
    record: dict[str, Any], origin: dict[str, str], *, model_name: str, base: str, library: str
) -> str:
    """Return the card of a dense model.

    Args:
        record: The dict of a Record: its dense side is the model's, or the other if there is none. Empty if nothing
            was measured.
        origin: As `lineage.base_facts` returns it.
        model_name: Heading, and the name in the usage lines.
        base: Architecture.
        library: The library that loads it: timm, transformers or pytorch.
    Returns:
        Markdown with the Hub's YAML header, all text in it shown as one line of plain text.
    """
    setup, dense = record.get("setup") or {}, record.get("dense") or record.get("slim") or {}
    known = {key: plain(value, MAX_NAME) for key, value in origin.items() if value}
    dataset, dataset_id = setup.get("dataset"), setup.get("dataset_id") or ""
    tasks = {KINDS[word_of(of_head)].task for of_head in heads_of(dense).values()}
    measured = [
        f"{f'{head}: ' if head else ''}{figure.title} {value:{figure.form}}{figure.unit}"
        for head, figure, value in main_figures(dense)
    ]
    names = [plain(name, MAX_NAME) for name in setup.get("label_names") or []]
    size = "x".join(map(str, dense.get("input_size") or ()))
    facts = {
        "Base model": known.get("base_model"),
        "Licence of the base": known.get("license_name") or known.get("license"),
        "Data": dataset,
        "Classes": f"{len(names):,}: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}"
        if names
        else None,
        "Size of images": size or None,
        "Epochs": setup.get("epochs"),
        "Seed": setup.get("seed"),
        "Versions": ", ".join(f"{name} {version}" for name, version in (setup.get("versions") or {}).items()) or None,
        "Commit": setup.get("commit"),
        "Command": code(setup["command"]) if setup.get("command") else None,
    }
    tested = f" of {dense['images']:,} images" if measured and dense.get("images") else ""
    data = ModelCardData(
        model_name=plain(model_name, MAX_NAME),
        library_name=library,
        pipeline_tag=tasks.pop() if len(tasks) == 1 else None,
        license=known.get("license", UNKNOWN),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        base_model=known["base_model"] if HUB_ID.fullmatch(known.get("base_model", "")) else None,
        base_model_relation="finetune" if known.get("base_model") else None,
        datasets=[dataset_id] if HUB_ID.fullmatch(dataset_id) else None,
        ignore_metadata_errors=False,
    )
    template = Path(__file__).with_name("dense_card.md").read_text(encoding="utf-8")
    card = Environment(finalize=finish).from_string(template)
    return str(
        ModelCard(
            card.render(
                card_data=Markdown(data.to_yaml()),
                model_name=model_name,
                summary=f"{base}, trained{f' on {dataset}' if dataset else ''}: "
                f"{', '.join(measured) or f'accuracy {NOT_MEASURED}'}{tested}.",
                repo=Markdown(f"user/{re.sub(r'[^A-Za-z0-9_.-]+', '-', model_name).strip('-.')[:96] or 'name'}"),
                library=library,
                facts=[(name, UNKNOWN if value is None else value) for name, value in facts.items()],
            )
        )
    )
