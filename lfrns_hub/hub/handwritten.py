"""Sections that people wrote into a card, which survive the next save and the next push.

Both mark the sections that the card's template writes, including the title. In an existing card a marked section is
ours and is replaced; an unmarked one was written by a person and stays after the section that it followed.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, RepoCard

MARK_START = "<!-- lfrns_hub writes this section"  # identifies the mark; the rest is for the reader
MARK = f"{MARK_START} again at every save and push; write under a heading of your own, which stays -->"
GENERATED = ("model-index", "model_name")  # of the earlier weights; `model_name` where there were no results
UNKNOWN = "unknown"  # "unknown" in a card is not a statement, so a person's statement is kept


@dataclass(frozen=True)
class Section:
    """A heading and the text down to the next heading."""

    heading: str
    text: str
    ours: bool

    @property
    def name(self) -> str:
        """A name that is stable between pushes; our title changes with the model's name."""
        return "title" if self.ours and self.heading.startswith("# ") else self.heading


def merge_cards(new: str, old: str | None, *, local: bool = False) -> str:
    """Merge a person's sections and front matter of the old card into the new one.

    Args:
        new: The card to be saved or pushed.
        old: The existing card, None if there is none.
        local: Whether it is from a checkpoint's folder: if nothing in it is marked, an earlier version saved it, and
            text under headings of the template is ours.
    Returns:
        The new card, its generated sections marked; merging `new` again does not change it. From the old front matter
        it has the keys that `new` does not state, and the tags; results of weights that a push replaced are removed.
    Raises:
        ValueError: The front matter of a card cannot be read.
    """
    stated, plain = _read(new, "the card to be pushed")
    facts, before = _read(old, "the card that is there") if old else ({}, [])
    if local and not any(section.ours for section in before):
        before = _mark(before)
    sections = _mark(plain)
    same = {section.text: marked.name for section, marked in zip(plain, sections, strict=True)}
    ours = {section.name: section.ours for section in sections}
    after: dict[str | None, list[Section]] = {}  # a person's sections, by the section before them
    place = None
    for section in before:
        if section.text in same:  # word for word: it came by another way than a push
            place = same[section.text]
        elif section.name in ours and section.ours == ours[section.name]:
            place = section.name
        elif not section.ours:
            after.setdefault(place, []).append(section)
    merged = after.pop(None, [])
    for section in sections:
        merged += [section, *after.pop(section.name, [])]
    if any(section.ours for section in before):
        facts = {key: value for key, value in facts.items() if key not in GENERATED}
    front = CardData(**_merge_facts(stated, facts)).to_yaml()
    return "\n\n".join([f"---\n{front}\n---", *(section.text for section in merged)]) + "\n"


def _merge_facts(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Return the new front matter with all tags and the other keys of the old one."""
    if new.get("license") not in (None, UNKNOWN):  # the name and link of an old licence do not belong to a new one
        old = {key: value for key, value in old.items() if not key.startswith("license_")}
    merged = new | {key: value for key, value in old.items() if new.get(key) in (None, UNKNOWN)}
    tags = [tag for facts in (new, old) for tag in _as_list(facts.get("tags"))]
    return merged | ({"tags": list(dict.fromkeys(tags))} if tags else {})


def _as_list(value: Any) -> list[Any]:
    """Return a list for a YAML value that is empty, single or a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _read(card: str, which: str) -> tuple[dict[str, Any], list[Section]]:
    """Split a card into its front matter and its sections."""
    try:
        parsed = RepoCard(card if card.lstrip().startswith("---") else f"---\n\n---\n{card}")
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"README.md, {which}: front matter that cannot be read ({problem}). Mend it first.") from error
    blocks, fence = [[""]], ""
    lines = parsed.text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if fence and following.startswith(MARK_START):  # a fence that a person left open: our text below is not code
            blocks[-1].append(fence)
            fence = ""
        mark = re.match(r" {0,3}(`{3,}(?!.*`)|~{3,})(.*)", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not mark[2].strip():
            fence = ""
        underlined = line.strip() and re.fullmatch(r" {0,3}(=+|-+)\s*", following) and not line.startswith("|")
        if not fence and (re.match(r" {0,3}#{1,6}(\s|$)", line) or underlined):
            blocks.append([line.rstrip()])
        else:
            blocks[-1].append(line)
    if fence:
        blocks[-1].append(fence)
    sections = [
        Section(block[0], "\n".join(block).strip(), any(line.startswith(MARK_START) for line in block))
        for block in blocks
    ]
    return parsed.data.to_dict(), [section for section in sections if section.text]


def _mark(sections: list[Section]) -> list[Section]:
    """Insert the mark below the title and each heading of the card's template, once."""
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    generated = set(re.findall(r"^##+ .*\S", template, re.MULTILINE))
    generated |= {next((section.heading for section in sections if section.heading.startswith("# ")), "")}
    marked = []
    for section in sections:
        if section.heading in generated - {""} and not section.ours:
            body = section.text.removeprefix(section.heading).strip()
            section = Section(section.heading, f"{section.heading}\n{MARK}\n\n{body}".strip(), ours=True)
        marked.append(section)
    return marked
