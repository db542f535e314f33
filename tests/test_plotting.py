"""The palette is legible and safe for colour-blind readers; the style is the book's."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle

from bnlib import moments
from bnlib.book.colors import AXIS_COLORS, INK, MUTED, PAGE
from bnlib.book.plotting import draw_planes, use_style

CSS = Path(__file__).resolve().parent.parent / "book" / "_static" / "book.css"

# Machado, Oliveira & Fernandes (2009), severity 1, on linear RGB.
COLOR_BLIND = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Linear RGB to CIE XYZ, relative to the white point D65 (IEC 61966-2-1).
TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
) / np.array([[0.9505], [1.0], [1.0888]])


def linear(color: str) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2, 1 to 21."""
    darker, lighter = sorted(float(TO_XYZ[1] @ linear(color)) for color in (a, b))
    return (lighter + 0.05) / (darker + 0.05)


def distance(a: str, b: str, vision: str) -> float:
    """The CIE76 difference of two colours as seen by such an eye; 2 is just noticeable."""

    def lab(color):
        seen = np.clip(np.array(COLOR_BLIND[vision]) @ linear(color), 0, 1)
        f = TO_XYZ @ seen
        f = np.where(f > (6 / 29) ** 3, np.cbrt(f), f * (29 / 6) ** 2 / 3 + 4 / 29)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    return float(np.linalg.norm(lab(a) - lab(b)))


# --- the palette ----------------------------------------------------------------------------------


def test_contrast_and_distance_of_known_colours():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
    assert distance("#000000", "#ffffff", "normal") == pytest.approx(100, abs=0.01)
    red, green = "#b84a30", "#6a7a1a"
    assert distance(red, green, "normal") > 3 * distance(red, green, "deuteranopia")


def test_there_is_a_colour_for_every_axis():
    assert list(AXIS_COLORS) == ["N", "C", "H", "W"]


@pytest.mark.parametrize("color", [*AXIS_COLORS.values(), MUTED, INK])
def test_colours_are_legible(color):
    at_least = 10 if color == INK else 4.5  # WCAG AA for text is 4.5
    assert contrast(color.light, PAGE.light) >= at_least
    assert contrast(color.dark, PAGE.dark) >= at_least


@pytest.mark.parametrize("vision", COLOR_BLIND)
@pytest.mark.parametrize("shade", PAGE._fields)
@pytest.mark.parametrize("pair", list(itertools.combinations("NCHW", 2)), ids="".join)
def test_axes_differ_for_every_eye(pair, shade, vision):
    a, b = (getattr(AXIS_COLORS[axis], shade) for axis in pair)
    assert distance(a, b, vision) >= 10  # five times what is just noticeable


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("axis", AXIS_COLORS)
def test_the_style_sheet_has_the_same_colours(axis, theme):
    block = re.search(rf'data-theme="{theme}"\]\s*{{(.*?)}}', CSS.read_text(), re.DOTALL)[1]
    (color,) = re.findall(rf"--axis-{axis.lower()}:\s*(#\w+);", block)
    assert color == getattr(AXIS_COLORS[axis], theme)


# --- the style ------------------------------------------------------------------------------------


@pytest.fixture
def ax():
    with mpl.rc_context():
        use_style()
        fig, ax = plt.subplots()
        yield ax
        plt.close(fig)


def test_style_is_transparent_with_dark_ink(ax):
    assert ax.figure.get_facecolor()[3] == ax.get_facecolor()[3] == 0
    for part in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        assert to_hex(mpl.rcParams[part]) == INK.light


def test_lines_take_the_axis_colours_in_order(ax):
    cycle = [to_hex(entry["color"]) for entry in mpl.rcParams["axes.prop_cycle"]]
    assert cycle == [shades.light for shades in (*AXIS_COLORS.values(), MUTED)]


# --- draw_planes ----------------------------------------------------------------------------------

BLOCK = np.random.default_rng(0).normal(5, 2, size=(2, 3, 4, 5))


def texts(ax) -> str:
    return "\n".join(text.get_text() for text in ax.texts)


def test_planes_show_every_sample_of_every_channel(ax):
    assert draw_planes(ax, BLOCK) is ax
    shown = [np.asarray(image.get_array()) for image in ax.images]
    expected = [BLOCK[n, c] for c in range(3) for n in range(2)]
    np.testing.assert_array_equal(shown, expected)
    assert [line for line in texts(ax).splitlines() if " = " in line and line[0] in "NCHW"] == [
        "N = 2", "C = 3", "H = 4", "W = 5"
    ]  # fmt: skip


def test_planes_print_the_statistics_of_their_channel(ax):
    draw_planes(ax, BLOCK)
    stats = moments(BLOCK)
    for mean, var in zip(stats.mean, stats.var(), strict=True):
        assert f"{mean:.3f}" in texts(ax)
        assert f"{np.sqrt(var):.3f}" in texts(ax)
    assert f"{stats.count} values" in texts(ax)


def fills(ax) -> list[str]:
    return [to_hex(p.get_facecolor()) for p in ax.patches if isinstance(p, Rectangle)]


def test_planes_tint_the_cells_of_one_group_alike(ax):
    words = np.arange(BLOCK.size).reshape(BLOCK.shape)
    draw_planes(ax, BLOCK, groups=np.arange(5) % 2, texts=words)
    written = [t.get_text() for t in ax.texts if t.get_text().isdigit()]
    order = [int(word) for word in written]
    assert sorted(order) == list(range(BLOCK.size))
    by_cell = dict(zip(order, fills(ax), strict=True))
    assert len(set(by_cell.values())) == 2
    assert all(by_cell[cell] == by_cell[cell % 5 % 2] for cell in order)
    assert "mean" not in texts(ax)  # a channel is no group here


@pytest.mark.parametrize(("options", "samples"), [({}, 2), ({"composite": True}, 4)])
def test_words_beside_the_planes_find_room(options, samples):
    with mpl.rc_context():
        use_style()
        fig, ax = plt.subplots(figsize=(4.6, 6))
        draw_planes(ax, np.resize(BLOCK, (samples, 3, 32, 32)) / 10, **options)
        fig.canvas.draw()
        boxes = [text.get_window_extent() for text in ax.texts]
        # What stands out makes the layout shrink the planes below the inches they are drawn in.
        (x0, _), (x1, _) = ax.transData.transform([(0, 0), (1, 0)])
        assert 0.95 < (x1 - x0) / fig.dpi <= 1
        assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
        plt.close(fig)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones((2, 3, 4)), {}, r"shape \(N, C, H, W\), not empty, got shape \(2, 3, 4\)"),
        (BLOCK[:0], {}, r"not empty, got shape \(0, 3, 4, 5\)"),
        (BLOCK[:, :2], {"composite": True}, "expected 3 channels for composite=True"),
        (BLOCK, {"names": ["a"]}, "expected 3 names for shape .*, got 1"),
        (BLOCK, {"colors": ["red"]}, "expected 3 colors for shape .*, got 1"),
        (BLOCK, {"texts": BLOCK[0]}, r"expected texts of shape .*, got shape \(3, 4, 5\)"),
        (BLOCK, {"groups": np.zeros(4, int), "texts": BLOCK}, "expected groups that broadcast"),
        (BLOCK, {"groups": np.zeros(5), "texts": BLOCK}, "expected groups of integers >= 0"),
        (BLOCK, {"groups": np.zeros(5, int)}, "expected texts with groups"),
    ],
)
def test_planes_refuse_what_they_cannot_draw(ax, x, options, message):
    with pytest.raises(ValueError, match=message):
        draw_planes(ax, x, **options)
