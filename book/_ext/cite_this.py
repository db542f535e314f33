"""The directive ``cite-this``: how to cite the book, from CITATION.cff alone.

Every page's foot leads to it. The address is named only where it is known (see `repository.py`).
The directive serves every builder, the link ``html`` alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FILE = "CITATION.cff"
ANCHOR = "cite-this"


def author_name(author: dict) -> str:
    """A person as ``Family, Given``; a group in braces, which keep BibTeX from splitting it."""
    if "name" in author:
        return f"{{{author['name']}}}"
    return f"{author['family-names']}, {author['given-names']}"


def bibtex(citation: dict, year: str, address: str = "") -> str:
    """The BibTeX entry of a citation file; `year` is used where it has no date of release."""
    fields = {
        "author": " and ".join(map(author_name, citation["authors"])),
        "title": f"{{{citation['title']}}}",
        "year": str(citation.get("date-released", year))[:4],
        "note": f"Version {citation['version']}",
    }
    if doi := citation.get("doi"):
        fields["doi"] = doi
    if address:
        fields["url"] = address
    key = re.sub(r"\W+", "-", citation["title"].lower()).strip("-")
    lines = "".join(f"  {name:<6} = {{{value}}},\n" for name, value in fields.items())
    return f"@misc{{{key},\n{lines}}}"


class CiteThis(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / FILE
        self.env.note_dependency(str(path))
        citation = yaml.safe_load(path.read_text(encoding="utf-8"))
        entry = bibtex(citation, self.config.copyright, self.config.html_baseurl)
        block = nodes.literal_block(entry, entry, language="bibtex", ids=[ANCHOR])
        return [block]


def add_link(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    target = app.builder.get_relative_uri(pagename, app.config.root_doc)
    context["theme_extra_footer"] = f'<a href="{target}#{ANCHOR}">Cite this book</a>'


def setup(app: Sphinx) -> dict:
    app.add_directive("cite-this", CiteThis)
    app.connect("html-page-context", add_link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
