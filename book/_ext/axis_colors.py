"""Colour the letters N, C, H, W wherever they mean the four axes of a batch of images.

In mathematics a standing-alone letter becomes ``{\\htmlClass{axis-n}{N}}``; in the comments of
Python code it becomes ``<span class="axis-n">N</span>``. The colours are in `book.css`, and in
`epub.css`: it serves the builders ``html`` and ``epub``.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx
from sphinx.highlighting import PygmentsBridge

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


def setup(app: Sphinx) -> dict:
    original = PygmentsBridge.highlight_block

    def highlight_block(self, source, lang, *args, **kwargs):
        html = original(self, source, lang, *args, **kwargs)
        return color_comments(html) if self.dest == "html" else html

    highlight_block.colors_axes = True  # type: ignore[attr-defined]
    if not getattr(original, "colors_axes", False):
        PygmentsBridge.highlight_block = highlight_block  # type: ignore[method-assign]
    return {"parallel_read_safe": True, "parallel_write_safe": True}
