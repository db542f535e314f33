"""The book's figures: one palette, one style, and helpers that draw tensors on an Axes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import FancyBboxPatch, Rectangle

from bnlib.axes import per_channel
from bnlib.book import colors
from bnlib.book.colors import PAGE
from bnlib.statistics import moments

# What figures are drawn in. The dark page swaps each of these for its other shade.
AXIS_COLORS = {axis: shades.light for axis, shades in colors.AXIS_COLORS.items()}
INK, MUTED = colors.INK.light, colors.MUTED.light


def use_style() -> None:
    """Draw from now on in the book's style (``book.mplstyle``); in a notebook, as SVG.

    The style is transparent, with dark ink. A figure of its width, 4.6 inches, has words of at
    least 11 pixels on a telephone.
    """
    with resources.as_file(resources.files("bnlib.book") / "book.mplstyle") as path:
        plt.style.use(path)
    ipython = sys.modules.get("IPython")
    if ipython and ipython.get_ipython():
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        # Without its date an unchanged figure is an unchanged file.
        set_matplotlib_formats("svg", metadata={"Date": None, "Creator": None})


# Tints for cells that share one mean: away from the four axis colours, and amber against violet is
# safe for colour-blind readers. Frames, words and hatching say the same without colour.
GROUP_COLORS = ("#e0b13c", "#8f83d8", "#6cc3d5", "#b0b0b0")
_HATCHES = ("", "/", ".", "x")
_DARK_TEXT = PAGE.dark  # on cells whose fill is opaque and pale, on either page

# Inches, which are the unit of what draw_planes draws.
_LEFT, _RIGHT, _GAP, _ROW_GAP, _EDGE = 0.62, 1.08, 0.07, 0.2, 0.05


def draw_planes(
    ax: Axes,
    x: Any,
    groups: Any = None,
    *,
    names: Sequence[str] | None = None,
    colors: Sequence[str] | None = None,
    texts: Any = None,
    composite: bool = False,
) -> Axes:
    """Draw a batch as a block of planes, and mark which cells share one mean and one variance.

    A column is a sample n, a row is a channel c, and each plane shows its H x W cells. By default
    a group is a channel, as in batch normalization: a frame runs across the samples, and beside it
    stand its mean and standard deviation, taken by :func:`bnlib.moments`.

    Args:
        ax: the Axes to draw on, as wide as its figure; its ticks and frame are removed.
        x: array of shape (N, C, H, W), real, at least one cell.
        groups: None, or integers from 0 that broadcast to the shape of ``x``, the number of the
            group that each cell belongs to. The cells are then tinted and hatched by group instead
            of framed; this needs ``texts``.
        names: a name for every channel; the default is ``c = 0``, ``c = 1`` and so on.
        colors: a colour for every channel, for its frame and for its planes, dark to full colour;
            by default the planes are grey and the frames are told apart by ``GROUP_COLORS``.
        texts: what to write into every cell instead of showing its brightness, shape of ``x``.
        composite: draw above the planes the colour picture that three channels in 0..1 make.

    Returns:
        ``ax``.

    Raises:
        ValueError: ``x`` is not of rank 4, is empty, or has not three channels for ``composite``;
            ``groups`` does not broadcast, holds anything but integers >= 0, or comes without
            ``texts``, which must have the shape of ``x``; there is not one name or colour for each
            channel.

    Used in *Which axes?*
    """
    x = np.asarray(x)
    if x.ndim != 4 or x.size == 0:
        raise ValueError(f"expected x of shape (N, C, H, W), not empty, got shape {x.shape}")
    samples, channels, height, width = x.shape
    if composite and channels != 3:
        raise ValueError(f"expected 3 channels for composite=True, got shape {x.shape}")
    if texts is not None and np.shape(texts) != x.shape:
        raise ValueError(f"expected texts of shape {x.shape}, got shape {np.shape(texts)}")
    by_cell = _checked_groups(groups, x, texts)
    for name, given in (("names", names), ("colors", colors)):
        if given is not None and len(given) != channels:
            raise ValueError(f"expected {channels} {name} for shape {x.shape}, got {len(given)}")

    figure = ax.get_figure(root=True)
    assert figure is not None
    page = figure.get_figwidth()
    plane_w = (page - _LEFT - _RIGHT - (samples - 1) * _GAP) / samples
    # A cell that holds words need not be square.
    plane_h = plane_w * height / width * (1 if texts is None else 0.62)
    lefts = [_LEFT + n * (plane_w + _GAP) for n in range(samples)]
    right = page - _RIGHT
    palette = colors or [GROUP_COLORS[c % len(GROUP_COLORS)] for c in range(channels)]
    low, high = float(x.min()), float(x.max())

    top = 0.36  # below the arrow along N
    _axis_arrow(ax, "N", samples, (_LEFT, 0.22), (right, 0.22))
    if composite:
        for n in range(samples):
            picture = np.moveaxis(x[n], 0, -1).clip(0, 1)
            _image(ax, lefts[n], top, plane_w, plane_h, picture)
        words = f"{samples} samples,\nsplit into\n{channels} channels"
        ax.text(right + 0.12, top + plane_h / 2, words, va="center", linespacing=1.3)
        top += plane_h + _ROW_GAP
    tops = [top + c * (plane_h + _ROW_GAP) for c in range(channels)]
    bottom = tops[-1] + plane_h
    for c, y in enumerate(tops):
        if groups is None:
            place = (_LEFT - _EDGE, y - _EDGE, right - _LEFT + 2 * _EDGE, plane_h + 2 * _EDGE)
            _frame(ax, *place, palette[c])
        name = names[c] if names else f"c = {c}"
        ax.text(
            right + 0.12,
            y + plane_h / 2,
            name if groups is not None else f"{name}\n{_statistics(x, c)}",
            va="center",
            linespacing=1.3,
        )
        for n in range(samples):
            place = (lefts[n], y, plane_w, plane_h)
            if texts is not None:
                fills = palette if groups is None else GROUP_COLORS
                _cells(ax, *place, np.asarray(texts)[n, c], by_cell[n, c], fills)
            else:
                shades = LinearSegmentedColormap.from_list(
                    "plane", ["black", colors[c] if colors else "white"]
                )
                _image(ax, *place, x[n, c], cmap=shades, vmin=low, vmax=high)

    _axis_arrow(ax, "C", channels, (0.19, top), (0.19, bottom))
    _axis_arrow(ax, "H", height, (_LEFT - 0.15, tops[-1]), (_LEFT - 0.15, bottom))
    _axis_arrow(ax, "W", width, (_LEFT, bottom + 0.14), (_LEFT + plane_w, bottom + 0.14))
    ax.set_xlim(0, page)
    ax.set_ylim(bottom + 0.42, 0)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return ax


def _checked_groups(groups: Any, x: np.ndarray, texts: Any) -> np.ndarray:
    """The group of every cell, in the shape of ``x``."""
    if groups is None:
        return np.broadcast_to(per_channel(np.arange(x.shape[1]), x.ndim), x.shape)
    groups = np.asarray(groups)
    if groups.dtype.kind not in "iu" or groups.min(initial=0) < 0:
        raise ValueError(f"expected groups of integers >= 0, got {groups!r}")
    if texts is None:
        raise ValueError("expected texts with groups: only cells with words are tinted singly")
    try:
        return np.broadcast_to(groups, x.shape)
    except ValueError:
        raise ValueError(
            f"expected groups that broadcast to shape {x.shape}, got shape {groups.shape}"
        ) from None


def _statistics(x: np.ndarray, channel: int) -> str:
    statistics = moments(x.astype(np.float64))
    std = np.sqrt(statistics.var()[channel])
    mean = statistics.mean[channel]
    return f"mean {mean:.3f}\nstd {std:.3f}\n{statistics.count} values"


def _image(
    ax: Axes, left: float, top: float, width: float, height: float, pixels: np.ndarray, **how: Any
) -> None:
    ax.imshow(pixels, extent=(left, left + width, top + height, top), **how)


def _pale(color: str) -> tuple[float, float, float]:
    """A lighter tint, on which dark text is legible."""
    red, green, blue = (0.45 + 0.55 * part for part in to_rgb(color))
    return red, green, blue


def _cells(
    ax: Axes,
    left: float,
    top: float,
    width: float,
    height: float,
    texts: np.ndarray,
    groups: np.ndarray,
    palette: Sequence[str],
) -> None:
    rows, columns = texts.shape
    size = (width / columns, height / rows)
    for (i, j), text in np.ndenumerate(texts):
        corner = (left + j * size[0], top + i * size[1])
        group = int(groups[i, j])
        fill = _pale(palette[group % len(palette)])
        hatch = _HATCHES[group % len(_HATCHES)]
        ax.add_patch(Rectangle(corner, *size, facecolor=fill, edgecolor="white", hatch=hatch))
        middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
        how: dict[str, Any] = {"ha": "center", "va": "center", "linespacing": 1.25}
        ax.text(*middle, str(text), color=_DARK_TEXT, **how)


def _frame(ax: Axes, left: float, top: float, width: float, height: float, color: str) -> None:
    for face, edge, alpha, zorder in ((color, "none", 0.22, -1), ("none", color, 1.0, 2)):
        ax.add_patch(
            FancyBboxPatch(
                (left, top),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.05",
                facecolor=face,
                edgecolor=edge,
                alpha=alpha,
                linewidth=2,
                zorder=zorder,
            )
        )


def _axis_arrow(
    ax: Axes, letter: str, length: int, tail: tuple[float, float], head: tuple[float, float]
) -> None:
    color = AXIS_COLORS[letter]
    ax.annotate(
        "",
        xy=head,
        xytext=tail,
        arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.5, "shrinkA": 0, "shrinkB": 0},
    )
    vertical = tail[0] == head[0]
    above = letter == "N"
    ax.text(
        tail[0] - 0.04 if vertical else (tail[0] + head[0]) / 2,
        (tail[1] + head[1]) / 2 if vertical else tail[1] + (-0.03 if above else 0.07),
        f"{letter} = {length}",
        color=color,
        fontweight="bold",
        rotation=90 if vertical else 0,
        ha="right" if vertical else "center",
        va="center" if vertical else ("bottom" if above else "top"),
    )
