"""docs/api.md is what the docstrings of the public names give; they name every parameter, and their examples run."""

import doctest
import importlib.util
import inspect
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from markdown_it import MarkdownIt

import lfrns_hub as lfrns
from lfrns_hub.trace import adapters
from lfrns_hub.trace.rules import registry

DOCS = Path(__file__).parents[1] / "docs"
WHERE = importlib.util.spec_from_file_location("render_api", DOCS / "render_api.py")
api = importlib.util.module_from_spec(WHERE)
WHERE.loader.exec_module(api)
NAMES = [name for names in api.SECTIONS.values() for name in names]


def parameters(target: Any) -> set[str]:
    """The parameters of a function or the fields of a dataclass."""
    return {field.name for field in fields(target)} if is_dataclass(target) else {*inspect.signature(target).parameters}


def test_the_page_is_what_the_docstrings_give() -> None:
    assert (DOCS / "api.md").read_text(encoding="utf-8") == api.render_page(), "run python docs/render_api.py"


def test_the_page_names_every_public_name_once() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert {f"lfrns_hub.{name}" for name in lfrns.__all__} <= set(NAMES)
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert text.count(f"\n### {name}\n") == 1 and f"](#{api.anchor(name)})" in text


def test_the_page_is_plain_markdown() -> None:
    tokens = MarkdownIt().parse((DOCS / "api.md").read_text(encoding="utf-8"))
    kinds = [child.type for token in tokens for child in (token.children or [token])]
    assert "html_inline" not in kinds and "html_block" not in kinds  # as <class> outside of code would be
    assert kinds.count("heading_open") >= len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_names_every_parameter_and_says_what_returns(name: str) -> None:
    target = api.find(name)
    parts = api.sections(inspect.getdoc(target))
    named = ", ".join(names for names, _ in api.items(parts.get("Args", parts.get("Attributes", "")))).split(", ")
    assert {*named} - {""} == parameters(target)
    assert all(text for heading in ("Args", "Attributes", "Raises") for _, text in api.items(parts.get(heading, "")))
    if not is_dataclass(target):
        gives = inspect.signature(target).return_annotation
        # A summary that says it, of a function without arguments, is enough.
        assert gives is None or name.endswith(("list_adapters", "masked")) or "Returns" in parts
    if name.removeprefix("lfrns_hub.") in lfrns.__all__ and not is_dataclass(target):
        assert "Example" in parts


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))
    monkeypatch.setattr(registry, "RULES", dict(registry.RULES))
    target = api.find(name)
    given = {**vars(sys.modules[target.__module__]), "lfrns": lfrns, "timm": timm, "torch": torch}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    for test in doctest.DocTestFinder(recurse=False).find(target, name, globs=given):
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
