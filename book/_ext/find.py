"""Search that leads to the place: an index of the book's sections, terms, symbols and names.

Sphinx's own index knows pages alone and fetches each page that it quotes, menu and all, which a
page opened as a file may not do. Here every section is an entry, as is each term of the glossary,
each symbol of the notation and each name of the library: its address, its title and its text go
into one script, which `find.js` loads, searches and quotes once there is something to find.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from words import LETTERS

INDEX = "sections.js"
# What the page for searching loads of Sphinx's, and what in its place.
SCRIPTS = {
    "_static/searchtools.js": "_static/find.js",
    "_static/language_data.js": None,
    "searchindex.js": None,
}

_SIGNS = {
    "cdot": "·",
    "times": "×",
    "sum": "∑",
    "sqrt": "√",
    "partial": "∂",
    "infty": "∞",
    "le": "≤",
    "leq": "≤",
    "ge": "≥",
    "geq": "≥",
    "approx": "≈",
    "to": "→",
    "in": "∈",
    "ne": "≠",
    "ll": "≪",
    "gg": "≫",
    "pm": "±",
    "ldots": "…",
    "dots": "…",
    "cdots": "…",
    "odot": "⊙",
}
_NAMED = {"log", "exp", "max", "min", "tanh", "det"}
_NAME = re.compile(r"\w{2,}")
_WORDS = re.compile(r"\\(?:mathrm|mathbf|mathit|text|operatorname\*?|boldsymbol)\s*\{([^{}]*)\}")


def plain(latex: str) -> str:
    """A formula as a line of text: ``\\hat x = z/\\sqrt{\\sigma^2}`` is x̂ = z/√(σ^2)."""
    text = _WORDS.sub(r"\1", latex)
    text = re.sub(r"\\hat\s*\{?\s*(\\?[A-Za-z])\}?", "{}\\1\N{COMBINING CIRCUMFLEX ACCENT}", text)
    text = re.sub(r"\\t?d?frac\s*(\w|\{[^{}]*\})\s*(\w|\{[^{}]*\})", r"\1/\2", text)
    text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"√(\1)", text)

    def sign(match: re.Match[str]) -> str:
        name = match[1]
        return LETTERS.get(name.removeprefix("var"), _SIGNS.get(name, name * (name in _NAMED)))

    text = re.sub(r"\\([A-Za-z]+)\s?", sign, text)
    text = re.sub(r"\\[,;:!]|[\\{}&$]", "", text).replace("-", "\N{MINUS SIGN}")
    return re.sub(r"(?<=[(/]) ", "", " ".join(text.split()))


SILENT = (
    nodes.FixedTextElement,
    nodes.math_block,
    nodes.comment,
    nodes.raw,
    addnodes.desc,
    addnodes.glossary,
)


def words(node: nodes.Node) -> str:
    """The text of a part of a page; no code, displayed formula, or what is an entry of its own."""
    if isinstance(node, nodes.Text):
        return node.astext()
    if isinstance(node, nodes.math):
        return plain(node.astext())
    if isinstance(node, SILENT):
        return " "
    between = "" if isinstance(node, nodes.TextElement) else " "
    return between.join(map(words, node.children)) + ("" if between == "" else " ")


def entry(kind: str, anchor: str, title: str, text: str, code: str = "") -> list[str]:
    return [kind, anchor, *(" ".join(part.split()) for part in (title, text, code))]


def section(node: nodes.Element, kind: str, symbols: bool) -> list[str]:
    """An entry for a section without those inside it, nor its tables of symbols."""
    title = node.next_node(nodes.title)
    other = (nodes.section, nodes.title, *([nodes.table] if symbols else []))
    own = [child for child in node.children if not isinstance(child, other)]
    text = " ".join(map(words, own))
    code = {
        w for c in own for b in c.findall(nodes.literal_block) for w in _NAME.findall(b.astext())
    }
    code -= set(_NAME.findall(text))
    return entry(kind, node["ids"][0], words(title), text, " ".join(sorted(code)))


def entries(page: str, doctree: nodes.document) -> Iterator[list[str]]:
    """Kind, anchor, title, text and code of each place on a page that a search may lead to."""
    symbols = page.endswith("notation")
    for number, node in enumerate(doctree.findall(nodes.section)):
        if node["ids"] and isinstance(node.next_node(), nodes.title):
            yield section(node, "page" if number == 0 else "section", symbols)
    for item in doctree.findall(nodes.definition_list_item):
        terms = [t for t in item.children if isinstance(t, nodes.term) and t["ids"]]
        if terms and "glossary" in item.parent.get("classes", ()):
            title = ", ".join(map(words, terms))
            yield entry("term", terms[0]["ids"][0], title, words(item.children[-1]))
    for name in doctree.findall(addnodes.desc_signature):
        if name["ids"]:
            text = words(name.parent.next_node(addnodes.desc_content) or nodes.Text(""))
            yield entry("name", name["ids"][0], name["ids"][0].removeprefix("bnlib."), text)
    if symbols:
        for row in doctree.findall(nodes.row):
            if not isinstance(row.parent, nodes.thead):
                cells = [words(cell) for cell in row.children]
                place = row
                while not isinstance(place, nodes.section):
                    place = place.parent
                text = ", ".join(" ".join(c.split()) for c in cells[1:] if c.strip())
                yield entry("symbol", place["ids"][0], cells[0], text)


def collect(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    if app.builder.name == "html" and doctree is not None:
        title = html.unescape(re.sub(r"<[^>]+>", "", context["title"]))
        app.found_places[pagename] = [title, list(entries(pagename, doctree))]  # type: ignore[attr-defined]


def write(app: Sphinx, exception: Exception | None) -> None:
    """Put the index, and what searches it, in the place of Sphinx's own."""
    if exception is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    pages = {f"{p}.html": found for p, found in sorted(app.found_places.items())}  # type: ignore[attr-defined]
    index = json.dumps(pages, ensure_ascii=False, separators=(",", ":"))
    (out / "_static" / INDEX).write_text(f"const BOOK = {index};\n", encoding="utf-8")
    page = (out / "search.html").read_text(encoding="utf-8")
    for name, instead in SCRIPTS.items():
        new = f'<script src="{instead}"></script>' if instead else ""
        page, count = re.subn(rf'<script src="{re.escape(name)}[^>]*></script>', new, page)
        if count != 1:
            raise ValueError(f"expected {name} once in search.html, found it {count} times")
    (out / "search.html").write_text(page, encoding="utf-8")


def begin(app: Sphinx) -> None:
    app.found_places = {}  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict:
    app.connect("builder-inited", begin)
    app.connect("html-page-context", collect)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
