"""Refuse a picture without real alternative text, in text and in notebook outputs alike.

Without this check a missing alternative becomes the file's name, which automatic accessibility
checkers accept and a reader who cannot see the picture cannot use. It serves every builder.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

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


def check_doctree(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for image in doctree.findall(nodes.image):
        problem = alt_problem(image.get("alt"), image.get("uri", ""))
        if problem:
            logger.warning("an image %s", problem, location=image, type="alt_text")


def setup(app: Sphinx) -> dict:
    app.connect("doctree-resolved", check_doctree)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
