"""The words of the book: pictures in words, what stays together, time to read, Greek letters."""

from __future__ import annotations

import re
from html.entities import name2codepoint
from pathlib import PurePosixPath

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)

# --- Pictures in words ----------------------------------------------------------------------------
# Without this check a missing alternative text becomes the file's name, which automatic checkers of
# accessibility accept and a reader who cannot see the picture cannot use.

SHORTEST = 20
_HASH = re.compile(r"[0-9a-f]{16,}")


def alt_problem(alt: str | None, uri: str = "") -> str | None:
    """What is wrong with an alternative text, or None."""
    text = (alt or "").strip()
    if not text:
        return "has no alternative text"
    name = PurePosixPath(uri).name
    if _HASH.search(text) or (name and name in text) or re.search(r"\.(png|svg|jpe?g)$", text):
        return f"has a file name for alternative text: {text!r}"
    if len(text) < SHORTEST or " " not in text:
        return f"has an alternative text that says too little: {text!r}"
    return None


def check_pictures(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for image in doctree.findall(nodes.image):
        problem = alt_problem(image.get("alt"), image.get("uri", ""))
        if problem:
            logger.warning("an image %s", problem, location=image, type="alt_text")


# --- What the end of a line must not part ---------------------------------------------------------
# A browser may break before the comma that follows a formula, because it takes the formula for a
# picture; and it breaks at any space of 3 × 3, 53 % and γ = 1.

OPENING = re.compile(r"[(\[“\u2018]+$")
CLOSING = re.compile(r"^[)\]”\u2019.,;:!?]+")
_GLUED = re.compile(r"(?<=\w) (×) (?=\w)|(?<=\d) (%)|(?<=\b[^\W\d_]) (=) (?=[\w−])")


def glued(text: str) -> str:
    """The text with no-break spaces in products, percentages and the values of one letter."""

    def glue(match: re.Match[str]) -> str:
        return match[0].replace(" ", "\N{NO-BREAK SPACE}")

    return _GLUED.sub(glue, text)


class KeepTogether(SphinxPostTransform):
    default_priority = 900
    formats = ("html",)

    def run(self, **kwargs) -> None:
        for formula in list(self.document.findall(nodes.math)):
            self.with_its_punctuation(formula)
        for text in list(self.document.findall(nodes.Text)):
            if isinstance(text.parent, nodes.FixedTextElement | nodes.literal | nodes.math):
                continue
            if (new := glued(text)) != text:
                text.parent.replace(text, nodes.Text(new))

    def with_its_punctuation(self, formula: nodes.math) -> None:
        parent = formula.parent
        together = [formula]
        at = parent.index(formula)
        for place, edge in ((at + 1, CLOSING), (at - 1, OPENING)):
            beside = parent[place] if 0 <= place < len(parent) else None
            if isinstance(beside, nodes.Text) and (mark := edge.search(beside)):
                parent[place] = nodes.Text(edge.sub("", beside))
                together.insert(len(together) * (place > at), nodes.Text(mark[0]))
        if len(together) > 1:
            parent.replace(formula, nodes.inline("", "", *together, classes=["unbroken"]))


class NoLabels(SphinxPostTransform):
    """The text cites by author and year, so a label such as "[CGL83]" would lead nowhere."""

    default_priority = 6  # after sphinxcontrib-bibtex has written the list

    def run(self, **kwargs) -> None:
        for label in list(self.document.findall(nodes.label)):
            if isinstance(label.parent, nodes.citation):
                label.parent.remove(label)


# --- Time to read ---------------------------------------------------------------------------------
# The words are those that myst-parser counts in the prose; a line of code and a displayed formula
# take their time too. Reference pages have no such line: nobody reads them from end to end.

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


# --- Greek letters --------------------------------------------------------------------------------

LETTERS = {name: chr(code) for name, code in name2codepoint.items() if 0x3B1 <= code <= 0x3C9}


def setup(app: Sphinx) -> dict:
    app.connect("doctree-resolved", check_pictures)
    app.add_post_transform(KeepTogether)
    app.add_post_transform(NoLabels)
    app.connect("html-page-context", add_time)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
