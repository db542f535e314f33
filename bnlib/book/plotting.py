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
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

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
# safe for colour-blind readers. Brackets, labels and hatching say the same without colour.
GROUP_COLORS = ("#e0b13c", "#8f83d8", "#6cc3d5", "#b0b0b0")
_HATCHES = ("", "///", "...", "xx")
_DARK_TEXT = PAGE.dark  # on cells whose fill is opaque and pale, on either page


def draw_planes(
    ax: Axes,
    x: Any,
    groups: Any = None,
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    colors: Sequence[str] | None = None,
    numbers: bool = False,
    composite: bool = False,
) -> Axes:
    """Draw a batch as a block of planes, and mark which cells share one mean and one variance.

    A column is a sample n, a row is a channel c, and each plane shows its H x W cells. By default
    a group is a channel, as in batch normalization: its row is framed, and a bracket gives its
    mean and standard deviation, taken by :func:`bnlib.moments`.

    Args:
        ax: the Axes to draw on; its ticks and frame are removed.
        x: array of shape (N, C, H, W), real, at least one cell.
        groups: None, or non-negative integers that broadcast to the shape of ``x``, the number of
            the group that each cell belongs to. The cells are then tinted by group and hatched,
            and a legend explains the groups; this needs ``numbers=True``.
        names: a name for every channel; the default is ``c = 0``, ``c = 1`` and so on.
        labels: a text for every group, in place of its statistics.
        colors: a colour for every group. Given colours also tint the planes, dark to full colour;
            by default the planes are grey and the groups are told apart by ``GROUP_COLORS``.
        numbers: write every cell's value into it instead of showing its brightness.
        composite: draw above the planes the colour picture that three channels in 0..1 make.

    Returns:
        ``ax``.

    Raises:
        ValueError: ``x`` is not of rank 4, is empty, or has not three channels for ``composite``;
            ``groups`` does not broadcast, holds anything but integers >= 0, or comes without
            ``numbers``; a list of texts or colours has the wrong length.

    Used in *Which axes?*
    """
    x = np.asarray(x)
    if x.ndim != 4 or x.size == 0:
        raise ValueError(f"expected x of shape (N, C, H, W), not empty, got shape {x.shape}")
    samples, channels, height, width = x.shape
    if composite and channels != 3:
        raise ValueError(f"expected 3 channels for composite=True, got shape {x.shape}")
    by_cell = _checked_groups(groups, x, numbers)
    count = int(by_cell.max()) + 1
    for name, given, length in (
        ("names", names, channels),
        ("labels", labels, count),
        ("colors", colors, count),
    ):
        if given is not None and len(given) != length:
            raise ValueError(f"expected {length} {name} for shape {x.shape}, got {len(given)}")

    side = max(height, width)
    plane_w, plane_h = width / side, height / side
    step_x, step_y = plane_w + 0.12, plane_h + 0.36
    right = (samples - 1) * step_x + plane_w
    palette = colors or [GROUP_COLORS[g % len(GROUP_COLORS)] for g in range(count)]
    low, high = float(x.min()), float(x.max())

    top = 0.0
    if composite:
        top = step_y
        for n in range(samples):
            _image(ax, n * step_x, 0, plane_w, plane_h, np.moveaxis(x[n], 0, -1).clip(0, 1))
        ax.text(-0.66, plane_h / 2, "the samples", ha="right", va="center")
    for c in range(channels):
        y = top + c * step_y
        if groups is None:
            _frame(ax, -0.1, y - 0.1, right + 0.2, plane_h + 0.2, palette[c])
            text = labels[c] if labels else _statistics(x, c)
            _bracket(ax, right + 0.22, y - 0.1, y + plane_h + 0.1, text)
        name = names[c] if names else f"$c$ = {c}"
        ax.text(-0.66, y + plane_h / 2, name, ha="right", va="center")
        for n in range(samples):
            place = (n * step_x, y, plane_w, plane_h)
            if numbers:
                _cells(ax, *place, x[n, c], by_cell[n, c], palette)
            else:
                shades = LinearSegmentedColormap.from_list(
                    "plane", ["black", colors[c] if colors else "white"]
                )
                _image(ax, *place, x[n, c], cmap=shades, vmin=low, vmax=high)

    bottom = top + (channels - 1) * step_y + plane_h
    _axis_arrow(ax, "N", samples, (0, -0.24), (right, -0.24))
    _axis_arrow(ax, "C", channels, (-1.8, top), (-1.8, bottom))
    _axis_arrow(ax, "H", height, (-0.2, bottom - plane_h), (-0.2, bottom))
    _axis_arrow(ax, "W", width, (0, bottom + 0.2), (plane_w, bottom + 0.2))
    if groups is not None:
        ax.legend(
            handles=[
                Patch(
                    facecolor=_pale(palette[g]),
                    edgecolor="white",
                    hatch=_HATCHES[g % len(_HATCHES)],
                    label=labels[g] if labels else f"group {g}",
                )
                for g in range(count)
            ],
            loc="center left",
            bbox_to_anchor=(right + 0.22, (top + bottom) / 2),
            bbox_transform=ax.transData,
            handleheight=1.8,
            labelspacing=1.2,
        )
    ax.set_xlim(-2.15, right + 2.6)
    ax.set_ylim(bottom + 0.52, -0.52)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return ax


def _checked_groups(groups: Any, x: np.ndarray, numbers: bool) -> np.ndarray:
    """The group of every cell, in the shape of ``x``."""
    if groups is None:
        return np.broadcast_to(per_channel(np.arange(x.shape[1]), x.ndim), x.shape)
    groups = np.asarray(groups)
    if groups.dtype.kind not in "iu" or groups.min(initial=0) < 0:
        raise ValueError(f"expected groups of integers >= 0, got {groups!r}")
    if not numbers:
        raise ValueError("expected numbers=True with groups: only numbered cells are tinted singly")
    try:
        return np.broadcast_to(groups, x.shape)
    except ValueError:
        raise ValueError(
            f"expected groups that broadcast to shape {x.shape}, got shape {groups.shape}"
        ) from None


def _statistics(x: np.ndarray, channel: int) -> str:
    statistics = moments(x.astype(np.float64))
    std = np.sqrt(statistics.var()[channel])
    return (
        f"one mean $\\mu$ = {statistics.mean[channel]:.3f}\n"
        f"one std $\\sigma$ = {std:.3f}\n"
        f"of N·H·W = {statistics.count} values"
    )


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
    values: np.ndarray,
    groups: np.ndarray,
    palette: Sequence[str],
) -> None:
    rows, columns = values.shape
    size = (width / columns, height / rows)
    for (i, j), value in np.ndenumerate(values):
        corner = (left + j * size[0], top + i * size[1])
        group = int(groups[i, j])
        fill = _pale(palette[group])
        hatch = _HATCHES[group % len(_HATCHES)]
        ax.add_patch(Rectangle(corner, *size, facecolor=fill, edgecolor="white", hatch=hatch))
        middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
        box = {"boxstyle": "round,pad=0.12", "facecolor": fill, "edgecolor": "none"}
        ax.text(
            *middle, f"{value:.3g}", ha="center", va="center_baseline", color=_DARK_TEXT, bbox=box
        )


def _frame(ax: Axes, left: float, top: float, width: float, height: float, color: str) -> None:
    for face, edge, alpha, zorder in ((color, "none", 0.22, -1), ("none", color, 1.0, 2)):
        ax.add_patch(
            FancyBboxPatch(
                (left, top),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=face,
                edgecolor=edge,
                alpha=alpha,
                linewidth=2,
                zorder=zorder,
            )
        )


def _bracket(ax: Axes, left: float, top: float, bottom: float, text: str) -> None:
    ax.plot([left, left + 0.08, left + 0.08, left], [top, top, bottom, bottom], color=INK, lw=1.5)
    ax.text(left + 0.18, (top + bottom) / 2, text, va="center", linespacing=1.35)


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
        tail[0] - 0.05 if vertical else (tail[0] + head[0]) / 2,
        (tail[1] + head[1]) / 2 if vertical else tail[1] + (-0.06 if above else 0.09),
        f"{letter} = {length}",
        color=color,
        fontweight="bold",
        rotation=90 if vertical else 0,
        ha="right" if vertical else "center",
        va="center" if vertical else ("bottom" if above else "top"),
    )
