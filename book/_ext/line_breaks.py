"""Keep together what the end of a line must not part.

A browser may break before the comma that follows a formula, because it takes the formula for a
picture; and it breaks at any space of 3 × 3, 53 % and γ = 1. It serves the builders ``html`` and
``epub``, whose style sheets know the class.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

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


def setup(app: Sphinx) -> dict:
    app.add_post_transform(KeepTogether)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
