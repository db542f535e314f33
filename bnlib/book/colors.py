"""The colours of the book, each for the light and for the dark page."""

from __future__ import annotations

from typing import NamedTuple


class Shades(NamedTuple):
    """One colour as ``#rrggbb``, with a contrast to its page of at least 4.5 to 1.

    A figure is drawn in the shades for the light page; the book's pages show a copy in the shades
    for the dark page where that is the reader's.
    """

    light: str
    dark: str


# Kin of Okabe and Ito's blue, vermillion, bluish green and reddish purple, which colour-blind
# readers can tell apart. book/_static/book.css repeats them.
AXIS_COLORS = {
    "N": Shades("#0059b3", "#58a6ff"),
    "C": Shades("#a84300", "#ff8f3f"),
    "H": Shades("#007a5e", "#34d0a5"),
    "W": Shades("#b0307f", "#f59fd0"),
}
INK = Shades("#1f242b", "#d8dee6")  # words, axes, the one curve that matters
MUTED = Shades("#5b6470", "#98a3b0")  # what stands beside it
PAGE = Shades("#ffffff", "#14181e")
