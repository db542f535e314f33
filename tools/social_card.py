"""Draw the picture that a link to the book shows on other sites.

    python tools/social_card.py

The title comes from CITATION.cff, the picture is the lower half of the axis block; a test draws the
card again and compares the pixels.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import yaml
from PIL import Image, ImageDraw, ImageFont

from bnlib.book.colors import AXIS_COLORS, PAGE

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "book" / "_static" / "axis-block.png"
CARD = ROOT / "book" / "_static" / "social-card.png"
SIZE = (1200, 630)
LOWER_HALF = (0, 222, 800, 770)
QUESTION = "Over which axes are its\nmean and variance taken?"


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def draw() -> Image.Image:
    """The card, in at most 256 colours."""
    with Image.open(PICTURE) as picture:
        block = picture.convert("RGBA").crop(LOWER_HALF)
    card = Image.new("RGBA", SIZE, PAGE.light)
    card.alpha_composite(block, (SIZE[0] - block.width, (SIZE[1] - block.height) // 2))
    pen = ImageDraw.Draw(card)
    for i, shades in enumerate(AXIS_COLORS.values()):
        pen.rectangle((48 + 22 * i, 118, 63 + 22 * i, 178), fill=shades.light)
    title = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["title"]
    words = title.replace(" ", "\n", 2)
    pen.multiline_text((48, 206), words, PAGE.dark, font("DejaVuSans-Bold.ttf", 38), spacing=12)
    pen.multiline_text((48, 386), QUESTION, "#4d5663", font("DejaVuSans.ttf", 23), spacing=10)
    return card.convert("RGB").quantize(256, dither=Image.Dither.NONE)


if __name__ == "__main__":
    draw().save(CARD, optimize=True)
    print(f"wrote {CARD.relative_to(ROOT)}, {CARD.stat().st_size / 1024:.0f} KB")
