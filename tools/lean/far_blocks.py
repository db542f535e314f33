"""Let a browser put off what is far below the first screen: long code, and formulas.

A chapter has up to thirty thousand elements, most of them in formulas and code. Laying them all
out before the page answers a touch takes a telephone seconds. Here each block with many elements
gets its estimated size as ``style="--lines: ...; --chars: ..."``, and the style sheet says
``content-visibility: auto`` for it: a browser lays it out when it comes near the window, when it is
searched or linked to, and for a screen reader. The estimate keeps the scroll bar still.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import accumulate

FIRST = 60  # lines that are laid out at once, whatever they hold: more than any window shows
# What an element adds to the height of the text in it: margins, borders and unfinished lines.
LINES = {"p": 0.4, "li": 0.4, "tr": 0.7, "pre": 1.7, "summary": 1.6}
MANY = 30  # elements that make a block worth putting off

_VOID = frozenset(("br", "hr", "img", "input", "link", "meta", "source", "wbr"))
_BLOCKS = frozenset(("p", "ol", "ul", "dl", "div", "blockquote"))
_STRUT = re.compile(r"height:([\d.]+)em")


class _Block:
    """What the size of one child of a section is estimated from."""

    def __init__(self, at: int, attributes: dict[str, str | None]) -> None:
        kind = (attributes.get("class") or "").split()
        self.at = at
        self.formula = "math" in kind
        # A folded solution is not laid out before it is opened, and a picture has its own size.
        self.whole = "dropdown" in kind or "style" in attributes
        self.elements, self.chars, self.lines = 0, 0, 0.0

    def height(self) -> float:
        """Lines on a wide screen."""
        return self.lines + self.chars / 68


class _Reader(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.blocks: list[_Block] = []
        self.block: _Block | None = None
        self.open: list[tuple[str, str]] = []
        self.starts = [0, *accumulate(len(line) for line in html.splitlines(keepends=True))]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        kind = attributes.get("class") or ""
        parent = self.open[-1][0] if self.open else ""
        if parent == "section" and tag in _BLOCKS:
            line, column = self.getpos()
            self.block = _Block(self.starts[line - 1] + column + len(tag) + 1, attributes)
            self.blocks.append(self.block)
            self.depth = len(self.open)
        if self.block:
            self._count(self.block, tag, kind, attributes, self.folded() and tag != "summary")
        if tag not in _VOID:
            self.open.append((tag, kind))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.block:
            self._count(self.block, tag, "", dict(attrs), self.folded())

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        while self.open and self.open.pop()[0] != tag:
            pass
        if self.block and len(self.open) <= self.depth:
            self.block = None

    def folded(self) -> bool:
        """Whether the reader is inside what a `details` shows only when it is opened."""
        tags = [tag for tag, _ in self.open]
        return "details" in tags and "summary" not in tags

    def handle_data(self, data: str) -> None:
        if not self.block or self.folded() or any("katex-mathml" in k for _, k in self.open):
            return
        if any(tag == "pre" for tag, _ in self.open):
            self.block.lines += 0.75 * data.count("\n")
        elif not self.block.formula:
            self.block.chars += len(data.strip())

    @staticmethod
    def _count(
        block: _Block, tag: str, kind: str, attributes: dict[str, str | None], folded: bool
    ) -> None:
        block.elements += 1
        if tag in ("img", "script", "canvas", "iframe"):
            block.whole = True
        elif block.formula and kind == "strut":
            found = _STRUT.search(attributes.get("style") or "")
            block.lines = max(block.lines, float(found[1]) * 0.75 + 1.1 if found else 0)
        elif not folded:
            block.lines += LINES.get(tag, 0)


def put_off(html: str) -> str:
    """The page with an estimated size on every block that is far down and has many elements."""
    above, parts, end = 0.0, [], 0
    for block in _Reader(html).blocks:
        if above > FIRST and block.elements >= MANY and not block.whole:
            size = f' style="--lines:{block.lines:.1f};--chars:{block.chars}"'
            parts += [html[end : block.at], size]
            end = block.at
        above += block.height()
    return "".join([*parts, html[end:]])
