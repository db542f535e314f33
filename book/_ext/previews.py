"""Let a link show what it leads to, so that a reader need not leave the line.

A term's link gets the definition for its title, as a citation's link has the reference. A formula
of another page is put into a template of this one, because a page opened as a file may not fetch
another. `previews.js` shows both, and copies the formulas and figures of the same page.
The titles serve every builder, the templates ``html`` alone.
"""

from __future__ import annotations

import html

from docutils import nodes
from katex_build import render_latex
from sphinx.application import Sphinx
from sphinxcontrib.katex import get_latex


def definitions(app: Sphinx) -> dict[str, str]:
    """What the glossary says of each term, by the term's id."""
    found = {}
    objects = app.env.domains["std"].objects  # type: ignore[attr-defined]
    for page in {page for (kind, _), (page, _) in objects.items() if kind == "term"}:
        for item in app.env.get_doctree(page).findall(nodes.definition_list_item):
            (*terms, definition) = item.children
            for term in terms:
                found.update(dict.fromkeys(term["ids"], definition.astext()))  # type: ignore[attr-defined]
    return found


def define_terms(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    defined = definitions(app)
    for link in doctree.findall(nodes.reference):
        anchor = link.get("refuri", "").rpartition("#")[2]
        if anchor in defined:
            link["reftitle"] = defined[anchor]


def add_formulas(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    """Append a template for each formula of another page that this page mentions."""
    if doctree is None:
        return
    labels = app.env.domains["math"].equations  # type: ignore[attr-defined]
    pages = {nodes.make_id(f"equation-{label}"): page for label, (page, _) in labels.items()}
    mentioned = {link.get("refuri", "") for link in doctree.findall(nodes.reference)}
    for address in sorted(mentioned):
        file, _, anchor = address.partition("#")
        if file and anchor in pages:
            for block in app.env.get_doctree(pages[anchor]).findall(nodes.math_block):
                if anchor in block["ids"]:
                    formula = render_latex(get_latex(block), {"displayMode": True})
                    context["body"] += (
                        f'<template data-preview="{html.escape(address)}">{formula}</template>\n'
                    )


def setup(app: Sphinx) -> dict:
    app.connect("doctree-resolved", define_terms)
    app.connect("html-page-context", add_formulas)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
