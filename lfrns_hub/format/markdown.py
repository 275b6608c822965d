"""Text of others on a card or in an index: whatever it says, Markdown shows it as text of one line.

This is the one place that escapes. A template whose values pass through `finish` cannot forget it.
"""

import re
from typing import Any

from lfrns_hub.format.untrusted import short

MAX_TEXT = 1000  # characters of one value
LEFT_OUT = "(link left out)"
# What renderers make a link of without any markup, and what could run or fetch something where it became one.
LINKS = re.compile(
    r"\S*://\S*|\bwww\.\S*|(?:java|vb)script:\S*|\b(?:about|blob|data|file|mailto|tel|view-source):\S+",
    re.IGNORECASE,
)
ADDRESSES = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+")  # of mail
WEB = re.compile(r"https?://[a-z0-9][a-z0-9.-]*(:\d{1,5})?(/[\w./~%+=&,;@:?#-]*)?", re.IGNORECASE | re.ASCII)
# A backslash as an entity: behind one the Hub would read "(" as the beginning of a formula.
SPECIAL = str.maketrans({
    "\\": "&#92;", "&": "&amp;", "<": "&lt;", ">": "&gt;", **{mark: f"\\{mark}" for mark in "`*[]|~#$"},
})  # fmt: skip


class Markdown(str):
    """Markdown of our own, in which what others wrote is escaped already."""


def finish(value: Any) -> str:
    """Return what a template puts in the place of a value: Markdown as it is, all else as text."""
    return value if isinstance(value, Markdown) else escape(value)


def plain(value: Any, length: int = MAX_TEXT) -> str:
    """Return a value as printable text of one line, cut to a length, without links; not yet escaped."""
    return ADDRESSES.sub(LEFT_OUT, LINKS.sub(LEFT_OUT, short(value, length)))


def escape(value: Any) -> Markdown:
    r"""Return Markdown that shows a value as `plain` has it, at the beginning of a line and in a table as well.

    Example:
        >>> print(escape("a|b\n# c <b>, see [d](javascript:e) or https://f.example"))
        a\|b \# c &lt;b&gt;, see \[d\]((link left out) or (link left out)
    """
    text = plain(value).translate(SPECIAL)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it begins no emphasis
    return Markdown(re.sub(r"^(\d{0,9})([-+=.)])(?=[-+=\s]|$)", r"\1\\\2", text))  # a list, a line, a heading


def code(value: Any) -> Markdown:
    """Return Markdown that shows a value as code of one line, in a table as well."""
    text = LINKS.sub(LEFT_OUT, short(value, MAX_TEXT))
    return Markdown(f"`{text.translate(str.maketrans('`|', chr(39) + chr(166))) or '?'}`")


def web_link(address: Any) -> str | None:
    """Return an address that a card may link to, of http or https; None for any other.

    Example:
        >>> web_link("https://a.example/LICENSE"), web_link("javascript:alert(1)")
        ('https://a.example/LICENSE', None)
    """
    return address if isinstance(address, str) and len(address) <= MAX_TEXT and WEB.fullmatch(address) else None


def link(text: Any, address: Any) -> Markdown:
    """Return a text with a link, or without it where a card may not link there."""
    found = web_link(address)
    return Markdown(f"[{escape(text)}]({found})") if found else escape(text)
