"""The colours of the four axes and of the page, each for light and dark."""

from __future__ import annotations

from typing import NamedTuple


class Shades(NamedTuple):
    """One colour in three shades, each as ``#rrggbb``.

    Attributes:
        light: for text on a white page (contrast at least 4.5 to 1).
        dark: for text on the dark page.
        figure: for figures, at least 3 to 1 on both pages.
    """

    light: str
    dark: str
    figure: str


# The figure shades are Okabe and Ito's blue, vermillion, bluish green and reddish purple, chosen by
# them to be told apart by colour-blind readers. book/_static/book.css repeats all three shades.
AXIS_COLORS = {
    "N": Shades("#0059b3", "#58a6ff", "#0072b2"),
    "C": Shades("#a84300", "#ff8f3f", "#d55e00"),
    "H": Shades("#007a5e", "#34d0a5", "#009e73"),
    "W": Shades("#b0307f", "#f59fd0", "#cc79a7"),
}
PAGE = Shades("#ffffff", "#14181e", "none")
