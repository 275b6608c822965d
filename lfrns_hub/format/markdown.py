"""Untrusted text on a card or in an index: Markdown always shows it as one line of plain text.

Only this file escapes. A template whose values pass through `finish` is always escaped.
"""

import re
from typing import Any

from lfrns_hub.format.untrusted import short

MAX_TEXT = 1000  # characters of one value
LEFT_OUT = "(link left out)"
# Text that renderers turn into a link without any markup, and schemes that could run or fetch something as a link.
LINKS = re.compile(
    r"\S*://\S*|\bwww\.\S*|(?:java|vb)script:\S*|\b(?:about|blob|data|file|mailto|tel|view-source):\S+",
    re.IGNORECASE,
)
ADDRESSES = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+")  # of mail
WEB = re.compile(r"https?://[a-z0-9][a-z0-9.-]*(:\d{1,5})?(/[\w./~%+=&,;@:?#-]*)?", re.IGNORECASE | re.ASCII)
# A backslash as an entity: after a plain one the Hub would read "(" as the start of a formula.
SPECIAL = str.maketrans({
    "\\": "&#92;", "&": "&amp;", "<": "&lt;", ">": "&gt;", **{mark: f"\\{mark}" for mark in "`*[]|~#$"},
})  # fmt: skip


class Markdown(str):
    """Our own Markdown, in which untrusted text is already escaped."""


def finish(value: Any) -> str:
    """Return the text that a template inserts for a value: Markdown unchanged, everything else escaped."""
    return value if isinstance(value, Markdown) else escape(value)


def plain(value: Any, length: int = MAX_TEXT) -> str:
    """Return a value as one line of printable text, cut to a length, without links; not yet escaped."""
    return ADDRESSES.sub(LEFT_OUT, LINKS.sub(LEFT_OUT, short(value, length)))


def escape(value: Any) -> Markdown:
    r"""Return Markdown that shows a value as `plain` returns it, also at the start of a line and in a table.

    Example:
        >>> print(escape("a|b\n# c <b>, see [d](javascript:e) or https://f.example"))
        a\|b \# c &lt;b&gt;, see \[d\]((link left out) or (link left out)
    """
    text = plain(value).translate(SPECIAL)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it does not start emphasis
    return Markdown(re.sub(r"^(\d{0,9})([-+=.)])(?=[-+=\s]|$)", r"\1\\\2", text))  # a list, a line, a heading


def code(value: Any) -> Markdown:
    """Return Markdown that shows a value as code in one line, also in a table."""
    text = LINKS.sub(LEFT_OUT, short(value, MAX_TEXT))
    return Markdown(f"`{text.translate(str.maketrans('`|', chr(39) + chr(166))) or '?'}`")


def web_link(address: Any) -> str | None:
    """Return an http or https address that a card may link to; None for any other.

    Example:
        >>> web_link("https://a.example/LICENSE"), web_link("javascript:alert(1)")
        ('https://a.example/LICENSE', None)
    """
    return address if isinstance(address, str) and len(address) <= MAX_TEXT and WEB.fullmatch(address) else None


def link(text: Any, address: Any) -> Markdown:
    """Return a text with a link, or without it if a card may not link there."""
    found = web_link(address)
    return Markdown(f"[{escape(text)}]({found})") if found else escape(text)
