"""What the API reference does with docstrings: links to chapters, and each field listed once.

"Derived in *Backward*" in a docstring becomes a link to the chapter of that title. The fields of a
named tuple or a data class are its arguments too: autodoc would list them again, with no words.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from docutils import nodes
from find import plain
from sphinx.application import Sphinx

_WHERE = re.compile(r"\b(?:Derived|Used) in(?:\s+(?:and\s+)?\*[^*]+\*,?)+")


def title_of(notebook: Path) -> str:
    """The title of a chapter as a line of text."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if found := re.search(r"^# (.+)$", "".join(cell["source"]), re.M):
            return re.sub(r"\$(.+?)\$", lambda m: plain(m[1]), found[1]).strip()
    return ""


def chapters(folder: Path, known: set[str]) -> dict[str, str]:
    """The chapters' names for Sphinx, by their titles."""
    found = {}
    for path in sorted(folder.glob("book/*/*.ipynb")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in known:
            found[title_of(path)] = f"/{name}"
    return found


def link(text: str, titles: dict[str, str]) -> str:
    """The docstring with links to the chapters that it says something is derived or used in."""

    def one(match: re.Match[str]) -> str:
        title = " ".join(match[1].split())
        return f":doc:`{title} <{titles[title]}>`" if title in titles else match[0]

    return _WHERE.sub(lambda match: re.sub(r"\*([^*]+)\*", one, match[0]), text)


def link_chapters(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    titles = chapters(Path(app.srcdir), app.env.found_docs)
    lines[:] = link("\n".join(lines), titles).split("\n")


def once(app: Sphinx, domain: str, kind: str, content: nodes.Element) -> None:
    """Take out the arguments that are fields already."""
    for fields in content.children:
        if not isinstance(fields, nodes.field_list):
            continue
        named = [(field, *field[0].astext().partition(" ")[::2]) for field in fields.children]
        own = {name for _, word, name in named if word in ("ivar", "var")}
        for field, word, name in named:
            if (
                word in ("param", "type")
                and name in own
                and not (word == "param" and field[1].astext().strip())
            ):
                fields.remove(field)


def setup(app: Sphinx) -> dict:
    app.connect("autodoc-process-docstring", link_chapters)
    app.connect("object-description-transform", once, priority=900)  # after autodoc's own
    return {"parallel_read_safe": True, "parallel_write_safe": True}
