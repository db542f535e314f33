"""Draw the book's pictures of itself: the mark, the card for links and the README, the cover.

    python tools/identity.py

The mark is the axis explorer at rest: two samples, four channels, one colour for the cells that
share a mean. A test draws all of it again and compares.
"""

from __future__ import annotations

import io
from pathlib import Path

import yaml
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from bnlib.book.colors import AXIS_COLORS, INK, MUTED, PAGE

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "book" / "_static"
LETTERS = STATIC / "fonts" / "source-serif-4-latin-600-normal.woff2"
CARD, COVER, MARK = (STATIC / name for name in ("card.png", "cover.png", "mark.svg"))
QUESTION = "Over which axes are the mean\nand the variance taken?"
# The hues of the explorer's first four groups, darker.
TINTS = ("#5ba9e0", "#e5954a", "#55b97d", "#d983b8")
# Cells of the mark: (column, row, channel); a gap stands between samples and between channels.
CELLS = [
    (4 * n + w + 0.35 * n, 2 * c + h + 0.35 * c, c)
    for n in range(2)
    for c in range(4)
    for h in range(2)
    for w in range(4)
]
WIDE, HIGH = 8.35, 9.05
TWICE = 4  # drawn larger, then made small: smooth edges


def mark_svg() -> str:
    """The mark as SVG, 32 units high, for the page's icon and its logo."""
    unit = 32 / HIGH
    left = (32 - WIDE * unit) / 2
    cells = "".join(
        f'<rect x="{left + x * unit:.2f}" y="{y * unit:.2f}" width="{0.86 * unit:.2f}" '
        f'height="{0.86 * unit:.2f}" rx=".6" fill="{TINTS[c]}"/>'
        for x, y, c in CELLS
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{cells}</svg>\n'


def draw_mark(height: int) -> Image.Image:
    unit = TWICE * height / HIGH
    image = Image.new("RGBA", (round(WIDE * unit), TWICE * height), PAGE.light + "00")
    pen = ImageDraw.Draw(image)
    for x, y, c in CELLS:
        corner = (x * unit, y * unit)
        box = [*corner, corner[0] + 0.92 * unit, corner[1] + 0.92 * unit]
        pen.rounded_rectangle(box, 0.12 * unit, fill=TINTS[c])
    return image.resize((image.width // TWICE, height), Image.Resampling.LANCZOS)


def font(size: int) -> ImageFont.FreeTypeFont:
    """The book's own letters, unpacked."""
    letters = TTFont(LETTERS)
    letters.flavor = None
    data = io.BytesIO()
    letters.save(data)
    data.seek(0)
    return ImageFont.truetype(data, size, layout_engine=ImageFont.Layout.BASIC)


def title() -> tuple[str, str]:
    """The two halves of the title, of which CITATION.cff knows."""
    whole = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    first, second = whole["title"].split(", ")
    return first, second


def draw_axes(pen: ImageDraw.ImageDraw, left: int, top: int, size: int) -> None:
    for i, (axis, shades) in enumerate(AXIS_COLORS.items()):
        pen.text((left + 1.25 * size * i, top), axis, shades.light, font(size))


def draw_card() -> Image.Image:
    """The picture of a link to the book, and of the README: 1200 x 630."""
    card = Image.new("RGBA", (1200, 630), PAGE.light)
    mark = draw_mark(470)
    card.alpha_composite(mark, (1200 - mark.width - 70, 80))
    pen = ImageDraw.Draw(card)
    first, second = title()
    pen.multiline_text((70, 90), first.replace(" ", "\n"), INK.light, font(76), spacing=10)
    pen.text((70, 290), second, MUTED.light, font(60))
    pen.multiline_text((70, 400), QUESTION, INK.light, font(34), spacing=10)
    draw_axes(pen, 70, 510, 40)
    return card.convert("RGB")


def draw_cover() -> Image.Image:
    """The cover of the EPUB: 1200 x 1600."""
    cover = Image.new("RGBA", (1200, 1600), PAGE.light)
    pen = ImageDraw.Draw(cover)
    first, second = title()
    pen.multiline_text((110, 100), first.replace(" ", "\n"), INK.light, font(130), spacing=10)
    pen.text((110, 440), second, MUTED.light, font(92))
    mark = draw_mark(760)
    cover.alpha_composite(mark, (110, 620))
    draw_axes(pen, 110, 1425, 56)
    author = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["authors"][0]
    pen.text((1090, 1445), author["name"], MUTED.light, font(40), anchor="ra")
    return cover.convert("RGB")


if __name__ == "__main__":
    MARK.write_text(mark_svg(), encoding="utf-8")
    draw_card().save(CARD, optimize=True)
    draw_cover().save(COVER, optimize=True)
    for path in (MARK, CARD, COVER):
        print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size / 1024:.0f} KB")
