"""Figures drawn by a notebook, for the light and for the dark page.

A chapter stores a figure once, as SVG in the shades for the light page (`bnlib.book.colors`). Next
to each one the page gets a copy in the shades for the dark page; the style sheet shows one of the
two, and a browser loads the other only if the reader changes the theme. Photographs in a figure
stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

from bnlib.book.colors import AXIS_COLORS, INK, MUTED

SHADES = {s.light: s.dark for s in (*AXIS_COLORS.values(), INK, MUTED)}
LARGER = 1.25  # how much a wide screen enlarges what was drawn for a telephone
_IMAGE = re.compile(r'<img\b[^>]*\bsrc="([^":]*_images/[^"]+\.svg)"[^>]*>')


def darken(svg: str) -> str:
    """The figure in the shades for the dark page."""
    return re.sub("|".join(SHADES), lambda shade: SHADES[shade[0].lower()], svg, flags=re.I)


def size(svg: str) -> tuple[int, int]:
    """Width and height of a figure on a wide screen, in CSS pixels."""
    head = svg[: svg.index(">", svg.index("<svg")) + 1]
    width, height = (
        float(re.search(rf'\b{side}="([\d.]+)(?:pt)?"', head)[1]) for side in ("width", "height")
    )
    return round(width * 4 / 3 * LARGER), round(height * 4 / 3 * LARGER)


def pair(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    if app.builder.name != "html" or "body" not in context:
        return
    folder = Path(app.outdir) / "_images"

    def both(match: re.Match[str]) -> str:
        name = match[1].rsplit("/", 1)[1]
        # Sphinx copies the pictures when all pages are written.
        source = next(s for s, written in app.builder.images.items() if written == name)
        svg = (Path(app.srcdir) / source).read_text(encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        dark = f"{Path(name).stem}-dark.svg"
        (folder / dark).write_text(darken(svg), encoding="utf-8")
        width, height = size(svg)
        more = f'width="{width}" height="{height}" loading="lazy" decoding="async"'
        light = re.sub(r'\s(?:class|style)="[^"]*"|\s*/?>$', "", match[0])
        return (
            f'{light} class="on-light" {more} />'
            f'{light.replace(name, dark)} class="on-dark" {more} />'
        )

    context["body"] = _IMAGE.sub(both, context["body"])


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", pair)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
