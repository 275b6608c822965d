"""A card is text: whatever a record says, the rendered card has no element and no link but our own.

LFRNS_FUZZ_CASES hostile records are tried of each kind (CI: 40); SECURITY.md has the long run of 5,000.
"""

import copy
import os
import random
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from test_card import RECORD

from lfrns_hub.format.markdown import code, escape, plain, web_link
from lfrns_hub.hub.card import render_card
from lfrns_hub.hub.index import write_index
from lfrns_hub.measure import Record

CASES = int(os.environ.get("LFRNS_FUZZ_CASES", "40"))
HTML = {"html": True}
RENDERERS = {  # CommonMark with the tables of GitHub and the Hub; and with all that the library adds to it
    "commonmark": MarkdownIt("commonmark", HTML).enable("table"),
    "all rules": MarkdownIt("js-default", HTML),
}
OURS = set("h1 h2 p table thead tbody tr th td ul li strong code pre blockquote details summary img".split())
PICTURES = ("widths.png", "curve.png", "clusters.png")
FRAGMENTS = [
    "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "</details>", "</td></tr></table>", "<!--", "-->",
    "<a href='", "<svg/onload=alert(1)>", "<iframe src=//evil.example>", "<style>*{display:none}</style>", "<?php",
    "<![CDATA[", "<!X", "<b>", "# Fake", "## Use", "\n\n# Fake\n\n", "\n---\n", "\n\n---\n\n", "\n===\n",
    "\n- a\n- b", "\n1. a", "1. a", "1) a", "- a", "+ a", "---", "===", "> a", "\n> a", "    code", "\n\n    code\n",
    "\tcode", "```\n", "\n```python\nimport os\n```\n", "~~~", "`", "``", "[a](javascript:alert(1))",
    "![a](https://evil.example/x.png)", "[a]: https://evil.example", "[a][a]", "<javascript:alert(1)>",
    "<https://evil.example>", "https://evil.example/x", "http://evil.example", "www.evil.example", "me@evil.example",
    "](", ")", "![", "]", "javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\x00script:alert(1)",
    "data:text/html,<script>", "vbscript:x", "//evil.example", "|", "\\|", "\n|---|---|\n", "| a | b |", "\\", "\\\\",
    "\\`", "\\<b>", "*a*", "**a**", "_a_", "__a__", "a_b_c", "~~a~~", "***", "&lt;b&gt;", "&#60;b&#62;", "&", "&amp;",
    "$x$", "$$\\href{javascript:x}{y}$$", "\\(x\\)", "\\[x\\]", "{{ 7*7 }}", "{% raw %}", "\x1b[31m",
    "\x1b]8;;https://evil.example\x07a\x1b]8;;\x07", "\x00", "\r", "\r\n# Fake", "\u2028# Fake", "\u2029",
    "\x85# Fake", "\u202egpj", "\u200b", "\ufeff", "\ud800", "\U000e0041", "é", "日本", "C#", "a", "", " ", "x" * 50,
    "(", "!", ":", "-", "7",
]  # fmt: skip
LINKS = [
    "javascript:alert(1)", "javascript://x%0aalert(1)", " https://evil.example", "https://evil.example/)(x",
    "data:text/html,x", "https://user@evil.example", "https://evil.example/\n# x", "//evil.example",
    "https:evil.example", "file:///etc/passwd", "https://evil.example/<b>", "https://evil.example/[a]",
    "https://evil.example/`", "https://evil.example/\\", "../x", 7, ["https://a"], "https://évil.example",
    "ftp://evil.example", "https://evil.example/'\"", "https://" + "a" * 2000,
]  # fmt: skip


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, tuple(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}", ()))

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", (data,)))

    handle_decl = handle_pi = unknown_decl = handle_comment

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile(draw: random.Random) -> str:
    """Some text that tries to be more."""
    letters = "".join(
        chr(draw.choice([draw.randrange(32, 127), draw.randrange(0x110000)])) for _ in range(draw.randrange(4))
    )
    return draw.choice(["", " ", "\n", "\n\n"]).join([*draw.choices(FRAGMENTS, k=draw.randrange(1, 5)), letters])


def record_of(shape: int, word: Callable[[], Any], address: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """A record, and the names of its card, with `word` wherever a stranger can put text."""
    record = copy.deepcopy(RECORD)
    sides, setup = (record["dense"], record["slim"]), record["setup"]
    made = setup["provenance"]
    if shape % 2:
        for side in sides:
            figures = {
                "output": "classes",
                "top1_pct": 90.0,
                "worst_class": {"class": 0, "dense_pct": 9.0, "slim_pct": 8.0},
            }
            side["heads"] = {f"{word()}{n}": dict(figures) for n in range(2)}
    if shape % 3 == 0:
        for side in sides:
            side["occasion"] = str(side is sides[0])
        setup["dense_missing"] = word()
    setup.update(
        license="other", license_name=word(), license_link=address, base_model=word(), dataset=word(),
        dataset_id=word(), label_names=[word() for _ in range(14)], commit=word(), command=word(), dtype=word(),
        input_size=[word()], machine={"cpu": word(), "device": word(), "threads": word()},
        versions={f"{word()}{n}": word() for n in range(3)},
        controls=[{"name": word(), "top1_pct": 1.0}], seed=word(),
        budgets=[
            {"macs_fraction": 0.5, "top1_pct": 9.0, "occasion": "one", "name": word(), "pushed": address} for _ in "ab"
        ],
    )  # fmt: skip
    names = [f"{word()}{n}" for n in range(3)]
    made.update(
        widths={name: [1, 2] for name in names}, kinds={name: word() for name in names}, preset=word(),
        budget={word(): 0.5}, approximate=names[:1],
    )  # fmt: skip
    return record, {"model_name": f"{word()}n", "base": f"{word()}n"}


def rendered(record: Any, renderer: MarkdownIt, **names: Any) -> tuple[Elements, str]:
    """A card as a browser gets it, and as it is."""
    options = {"plot": "widths.png", "gallery": "clusters.png", "curve": "curve.png", "remote_code": True}
    card = render_card(record, **names, library="pytorch", **options)
    card.encode()
    assert all(letter.isprintable() or letter == "\n" for letter in card)
    body = card.partition("\n---\n")[2]
    assert body.strip() == ModelCard(card).text.strip()
    return Elements(renderer.render(body)), card


def check_elements(elements: Elements) -> None:
    """Refuse an element, an attribute or an address that a card of ours never has."""
    for tag, attributes in elements.found:
        assert tag.removeprefix("/") in OURS, tag
        for name, value in attributes:
            assert (name, value) in {("style", "text-align:right"), ("style", "text-align:left")} or (
                (tag, name) in {("img", "src"), ("img", "alt"), ("code", "class")} and "://" not in value
            ), (tag, name, value)
            assert name != "src" or value in PICTURES
    assert "://" not in elements.text and "javascript:" not in elements.text.lower()


@pytest.mark.parametrize("renderer", RENDERERS.values(), ids=RENDERERS)
def test_text_of_others_is_shown_as_it_is(renderer: MarkdownIt) -> None:
    draw = random.Random(0)
    for _ in range(5 * CASES):
        text = hostile(draw)
        for before in ("", "x "):
            page = Elements(renderer.render(before + escape(text)))
            assert page.text.strip() == (before + plain(text)).strip()
            assert page.found in ([("p", ()), ("/p", ())], []), text
        row = Elements(renderer.render(f"| a | b |\n|---|---|\n| {escape(text)} | {code(text)} |\n"))
        assert [tag for tag, _ in row.found].count("td") == 2 and [tag for tag, _ in row.found].count("code") == 1, text
        assert plain(text) in row.text


@pytest.mark.parametrize("renderer", RENDERERS.values(), ids=RENDERERS)
def test_hostile_records_make_the_same_elements_as_plain_ones(renderer: MarkdownIt) -> None:
    draw, expected = random.Random(1), {}
    for case in range(CASES):
        record, names = record_of(case, lambda: hostile(draw), draw.choice(LINKS))
        found, card = rendered(record, renderer, **names)
        check_elements(found)
        if (shape := case % 6) not in expected:
            plain_record, plain_names = record_of(shape, lambda: "word", None)
            expected[shape] = rendered(plain_record, renderer, **plain_names)[0].found
        assert found.found == expected[shape], card
        assert (name := plain(names["model_name"])) in found.text or len(name) > 200
        front = ModelCard(card).data.to_dict()
        assert "license_link" not in front
        assert all(value.isprintable() for value in front.values() if isinstance(value, str))


@pytest.mark.parametrize("renderer", RENDERERS.values(), ids=RENDERERS)
def test_a_record_of_any_values_makes_no_element_but_ours_or_no_card(renderer: MarkdownIt) -> None:
    draw, cards = random.Random(2), 0

    def anything() -> Any:
        text = hostile(draw)
        return draw.choice([text, text, [text], {text: text}, draw.choice([None, True, 0, -1, 2.5, 10**30, [], {}])])

    for case in range(CASES):
        record, names = record_of(case, lambda: hostile(draw), draw.choice(LINKS))
        for _ in range(draw.randrange(1, 4)):
            place = draw.choice([record["setup"], record["slim"], record["setup"]["provenance"], record["dense"]])
            place[draw.choice(list(place))] = anything()
        try:
            found, _ = rendered(record, renderer, **names)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            continue  # what `save` turns into one message
        cards += 1
        check_elements(found)
    assert cards > CASES // 8


def test_the_licences_link_is_the_only_one_and_goes_to_the_web() -> None:
    for address in LINKS:
        assert web_link(address) is None, address
    record, names = record_of(0, lambda: "word", "https://owl.example/LICENSE.md?a=b#c")
    found, card = rendered(record, RENDERERS["commonmark"], **names)
    assert [attributes for tag, attributes in found.found if tag == "a"] == [
        (("href", record["setup"]["license_link"]),)
    ]
    assert ModelCard(card).data.to_dict()["license_link"] == record["setup"]["license_link"]


def test_a_long_text_is_cut() -> None:
    record, names = record_of(1, lambda: "word " * 100_000, None)
    assert len(rendered(record, RENDERERS["commonmark"], **names)[1]) < 50_000


def test_ids_that_the_hub_would_link_are_ids() -> None:
    record, names = record_of(0, lambda: "../../evil?x=<b>", None)
    front = ModelCard(rendered(record, RENDERERS["commonmark"], **names)[1]).data.to_dict()
    assert "base_model" not in front and "datasets" not in front
    assert front["license"] == "other"


@pytest.mark.parametrize("renderer", RENDERERS.values(), ids=RENDERERS)
def test_an_index_over_hostile_folders_and_records_has_no_element_but_ours(renderer: MarkdownIt, tmp_path) -> None:
    draw = random.Random(3)
    for case in range(3):
        root = tmp_path / str(case)
        for _ in range(4):
            text = "".join(
                letter for letter in hostile(draw) if letter not in "\0/" and not "\ud800" <= letter < "\ue000"
            )
            folder = root / (text.encode()[:80].decode(errors="ignore").strip(".") or "x")
            folder.mkdir(parents=True, exist_ok=True)
            Record(**record_of(draw.randrange(6), lambda: hostile(draw), None)[0]).save(folder / "record.json")
        text = write_index(root, hostile(draw)).read_text(encoding="utf-8")
        text = text.replace("<!-- lfrns_hub writes this table; what stands above and below it stays -->", "")
        found = Elements(renderer.render(text.replace("<!-- end of the table -->", "")))
        for tag, attributes in found.found:
            assert tag.removeprefix("/") in {*OURS, "a"}, text
            assert all(name != "href" or ":" not in value for name, value in attributes)
        assert sys.getsizeof(text) < 100_000
