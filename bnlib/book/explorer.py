"""The figure of which cells share one mean and one variance, to be touched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources

import numpy as np

from bnlib.axes import reduction_axes
from bnlib.book.colors import AXIS_COLORS
from bnlib.statistics import moments

_NORMS = ("batch", "layer", "instance", "group", "pixel", "broadcast")


class AxisExplorer:
    """The interactive figure that :func:`axis_explorer` makes.

    A notebook shows it through ``_repr_html_``: one piece of HTML that asks no server and no kernel
    for anything. Without JavaScript a table says what batch normalization groups together.

    Attributes:
        fragment: the state, as a link to a page with an explorer carries it.
        esm: the JavaScript module, whose default export has the ``render`` that anywidget calls.
        css: its style sheet.
    """

    def __init__(self, fragment: str) -> None:
        self.fragment = fragment
        folder = resources.files("bnlib.book")
        self.esm = (folder / "explorer.js").read_text(encoding="utf-8")
        shades = {
            theme: ";".join(
                f"--ax-{axis.lower()}:{template.format(axis.lower(), getattr(color, theme))}"
                for axis, color in AXIS_COLORS.items()
            )
            for theme, template in (("light", "var(--axis-{},{})"), ("dark", "{1}"))
        }
        # The book's own style sheet sets --axis-n and so on; elsewhere JupyterLab's theme decides.
        self.css = (
            f".axis-explorer{{{shades['light']}}}"
            f"[data-jp-theme-light=false] .axis-explorer{{{shades['dark']}}}"
        ) + (folder / "explorer.css").read_text(encoding="utf-8")

    def __repr__(self) -> str:
        return f"AxisExplorer({self.fragment!r})"

    def _repr_html_(self) -> str:
        css = re.sub(r"(?<=[{};,:]) |;? (?=[{}])", "", re.sub(r"\s+", " ", self.css))
        lines = (line.strip() for line in self.esm.splitlines())
        script = "\n".join(line for line in lines if line and not line.startswith("//"))
        # Space around punctuation goes, but not inside strings.
        script = re.sub(
            r"""("[^"\n]*"|`[^`]*`)|\s*([=(){},;:?+*<>&|-])\s*""",
            lambda found: found[1] or found[2],
            script,
        )
        # A classic script, because browsers refuse to import modules from file://.
        script = script.replace("export default", "const widget=")
        return (
            f'<div class="axis-explorer" data-start="{self.fragment}">'
            f"{_fallback()}</div>"
            f"<style>{css}</style>"
            f"<script>(()=>{{{script}\n"
            'for (const el of document.querySelectorAll(".axis-explorer:not([data-ready])"))\n'
            "widget.render({el})})()</script>"
        )


def axis_explorer(
    norm: str = "batch",
    shape: Sequence[int] = (2, 4, 2, 4),
    *,
    groups: int | None = None,
    at: Sequence[int] | None = None,
    photo: bool = False,
    after: bool = False,
) -> AxisExplorer:
    """Return an interactive figure of which cells share one mean and one variance.

    Every set of cells that shares one mean has its colour. A cell that the reader touches brings
    its group forward, with mean, variance and output; the norm, the four lengths, the values before
    and after, and two photographs are to be chosen. End a cell with the call to show it.

    Args:
        norm: ``batch``, ``layer``, ``instance`` or ``group``; or one of two mistakes, ``pixel``
            (a mean over N alone) and ``broadcast`` (``x - mean``, which lines up with W).
        shape: the lengths (N, C, H, W), at most (4, 6, 4, 4).
        groups: the number of groups of group norm, a divisor of C; None for two, where C is even,
            else for C.
        at: the cell (n, c, h, w) to begin with; None for no cell, and all groups in colour.
        photo: begin with two photographs of 7 x 7 pixels, shape (2, 3, 7, 7), instead of numbers;
            ``shape`` is then not used.
        after: begin with the values after the norm.

    Returns:
        An :class:`AxisExplorer`.

    Raises:
        ValueError: an unknown ``norm``, a length out of range, ``groups`` that do not divide C, or
            a cell outside the tensor.

    Source: the drawing of Wu & He (2018), figure 2, made to be touched. Used in *Which axes?*

    Examples:
        >>> axis_explorer("group", (2, 4, 2, 2), at=(1, 3, 0, 0)).fragment
        '#explore-group-N2-C4-H2-W2-G2-n1-c3-h0-w0'
    """
    lengths = (2, 3, 7, 7) if photo else tuple(shape)
    limits = (4, 6, 4, 4)
    if norm not in _NORMS:
        raise ValueError(f"expected norm to be one of {_NORMS}, got {norm!r}")
    if not photo and (
        len(lengths) != 4
        or any(not 1 <= d <= most for d, most in zip(lengths, limits, strict=True))
    ):
        raise ValueError(f"expected shape (N, C, H, W) from 1 to {limits}, got {shape}")
    channels = lengths[1]
    if groups is None:
        groups = channels if channels % 2 else 2
    if groups < 1 or channels % groups:
        raise ValueError(f"expected groups that divide C = {channels}, got {groups}")
    words = ["#explore", norm, *(["photo"] if photo else []), *(["after"] if after else [])]
    words += [f"{axis}{d}" for axis, d in zip("NCHW", lengths, strict=True)] + [f"G{groups}"]
    if at is not None:
        if len(at) != 4 or any(not 0 <= i < d for i, d in zip(at, lengths, strict=True)):
            raise ValueError(f"expected at to be a cell of shape {lengths}, got {tuple(at)}")
        words += [f"{axis}{i}" for axis, i in zip("nchw", at, strict=True)]
    return AxisExplorer("-".join(words))


def _fallback() -> str:
    """The question's tensor as a table, for a reader without JavaScript and for an EPUB."""
    x = np.stack([np.eye(2, 4).reshape(2, 2, 2), np.arange(8.0).reshape(2, 2, 2)])
    statistics = moments(x)
    rows = "".join(
        f"<tr><th scope='row'>c = {c}</th>"
        + "".join(
            "<td>" + "<br>".join(" ".join(f"{v:g}" for v in row) for row in x[n, c]) + "</td>"
            for n in range(len(x))
        )
        + f"<td>{statistics.mean[c]:.3f}</td><td>{statistics.var()[c]:.3f}</td></tr>"
        for c in range(x.shape[1])
    )
    head = "".join(f"<th scope='col'>n = {n}</th>" for n in range(len(x)))
    return (
        f"<table><caption>The cells of one row share one mean and one variance, over the axes "
        f"{reduction_axes(x.ndim)}: {statistics.count} values, from every sample.</caption>"
        f"<thead><tr><th scope='col'>channel</th>{head}<th scope='col'>mean</th>"
        f"<th scope='col'>variance</th></tr></thead><tbody>{rows}</tbody></table>"
    )
