"""Let the search find a Greek letter by its name, and its name by the letter.

Prose has ε where a formula has ``\\varepsilon`` and a reader may type "epsilon"; all three find the
same pages. It serves the builder ``html`` alone.
"""

from __future__ import annotations

from html.entities import name2codepoint

from sphinx.application import Sphinx

LETTERS = {name: chr(code) for name, code in name2codepoint.items() if 0x3B1 <= code <= 0x3C9}


def join(index: dict[str, set[str]]) -> None:
    """Give a letter and its name the pages of both, and of the letter's other form."""
    for name, letter in LETTERS.items():
        pages = set().union(*(index.get(word, ()) for word in (letter, name, f"var{name}")))
        if pages:
            index[letter] = index[name] = pages


def join_index(app: Sphinx) -> list:
    indexer = getattr(app.builder, "indexer", None)
    if indexer is not None:
        for index in (indexer._mapping, indexer._title_mapping):
            join(index)
    return []


def setup(app: Sphinx) -> dict:
    app.connect("html-collect-pages", join_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
