"""The four axes of a batch of images: N, C, H, W in their colours, and the figure to touch.

In mathematics a standing-alone letter becomes ``{\\htmlClass{axis-n}{N}}``; in the comments of
Python code it becomes ``<span class="axis-n">N</span>``. The colours are in `book.css`, and in
`epub.css`. The directive ``axis-explorer`` puts the figure of `bnlib.book.explorer` into a Markdown
page; `epub.py` drops its script, which leaves the table inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from pygments.formatters import HtmlFormatter
from sphinx.application import Sphinx
from sphinx.highlighting import PygmentsBridge
from sphinx.util.docutils import SphinxDirective

from bnlib.book.explorer import axis_explorer

AXES = "NCHW"

# What to leave alone in a formula, tried first: words, sized or bold letters, references and
# environment names, then every other command.
_SKIP = (
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathcal|mathbb|mathsf|mathit|boldsymbol|bm"
    r"|operatorname\*?|tag|label|ref|eqref|begin|end|htmlClass\{[^{}]*\})\s*\{[^{}]*\}"
    r"|\\(?:mathrm|mathbf|mathcal|mathbb|mathsf)\s+[A-Za-z]"
    r"|\\[A-Za-z]+|\\."
)
_MATH = re.compile(rf"(?P<skip>{_SKIP})|(?P<axis>(?<![A-Za-z])[{AXES}](?![A-Za-z]))", re.DOTALL)

_COMMENT_SPAN = re.compile(r'(<span class="c1">)(.*?)(</span>)', re.DOTALL)
# A letter next to another letter, a digit, an underscore or an apostrophe is part of a word.
_WORD = rf"(?<![\w&'])([{AXES}])(?![\w'])"


def color_math(latex: str) -> str:
    """Wrap every standing-alone axis letter of a formula in KaTeX's ``\\htmlClass``."""

    def wrap(match: re.Match[str]) -> str:
        letter = match["axis"]
        return (
            match[0] if letter is None else rf"{{\htmlClass{{axis-{letter.lower()}}}{{{letter}}}}}"
        )

    return _MATH.sub(wrap, latex)


def color_comments(html: str) -> str:
    """Wrap every standing-alone axis letter inside the comments of highlighted code."""

    def wrap(match: re.Match[str]) -> str:
        colored = re.sub(
            _WORD, lambda m: f'<span class="axis-{m[1].lower()}">{m[1]}</span>', match[2]
        )
        return match[1] + colored + match[3]

    return _COMMENT_SPAN.sub(wrap, html)


class ColoredComments(HtmlFormatter):
    def wrap(self, source: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        return super().wrap((kind, color_comments(line)) for kind, line in source)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


class ExplorerDirective(SphinxDirective):
    """The options are the arguments of :func:`bnlib.book.explorer.axis_explorer`."""

    option_spec: ClassVar = {
        "norm": directives.unchanged,
        "shape": _numbers,
        "groups": int,
        "at": _numbers,
        "photo": directives.flag,
        "after": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        # A flag that is there has no value.
        options = {k: True if v is None else v for k, v in self.options.items()}
        try:
            html = axis_explorer(**options)._repr_html_()
        except ValueError as problem:
            raise self.error(str(problem)) from problem
        return [nodes.raw("", html, format="html")]


def setup(app: Sphinx) -> dict:
    PygmentsBridge.html_formatter = ColoredComments
    app.add_directive("axis-explorer", ExplorerDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
