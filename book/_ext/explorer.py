"""The directive ``axis-explorer``: the figure of `bnlib.book.explorer`, in a Markdown page.

The builder ``html`` shows the figure. `epub.py` drops its script, which leaves the table inside.
"""

from __future__ import annotations

from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bnlib.book.explorer import axis_explorer


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
    }

    def run(self) -> list[nodes.Node]:
        options = dict(self.options)
        if "photo" in options:
            options["photo"] = True
        try:
            html = axis_explorer(**options)._repr_html_()
        except ValueError as problem:
            raise self.error(str(problem)) from problem
        return [nodes.raw("", html, format="html")]


def setup(app: Sphinx) -> dict:
    app.add_directive("axis-explorer", ExplorerDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
