"""Say under a chapter's title about how long it takes to read.

The words are those that myst-parser counts in the prose; a line of code and a displayed formula
take their time too. Reference pages have no such line: nobody reads them from end to end.
It serves the builder ``html`` alone.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx

WORDS, LINES, FORMULAS = 200, 30, 4  # that are read in a minute


def minutes(words: int, lines: int, formulas: int) -> int:
    """The time to read so much, to the nearest five minutes."""
    return max(5, 5 * round((words / WORDS + lines / LINES + formulas / FORMULAS) / 5))


def add_time(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    if doctree is None or context.get("page_source_suffix") != ".ipynb":
        return
    code = [b for b in doctree.findall(nodes.literal_block) if b.get("language") == "python"]
    time = minutes(
        app.env.metadata[pagename]["wordcount"]["words"],
        sum(len(block.astext().splitlines()) for block in code),
        sum(1 for _ in doctree.findall(nodes.math_block)),
    )
    line = f'</h1>\n<p class="reading-time">About {time} minutes to read</p>'
    context["body"] = context["body"].replace("</h1>", line, 1)


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", add_time)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
