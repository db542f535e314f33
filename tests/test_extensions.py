"""The small Sphinx extensions of the book: coloured axis letters, pictures with descriptions."""

from __future__ import annotations

import re
from pathlib import Path

import katex_build
import pytest
import sphinxcontrib.katex as katex
from axes import color_comments, color_math
from bs4 import BeautifulSoup
from docstrings import link, title_of
from figures import SHADES, darken, size
from words import alt_problem

from bnlib.book.colors import AXIS_COLORS, INK
from tools.lean.styles import without_scripts

ROOT = Path(__file__).resolve().parent.parent
N, C, H, W = (rf"{{\htmlClass{{axis-{a.lower()}}}{{{a}}}}}" for a in "NCHW")


@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        ("N", N),
        ("m = N H W", f"m = {N} {H} {W}"),
        (r"N\cdot H", rf"{N}\cdot {H}"),
        ("x_N^2 + y_{C}", f"x_{N}^2 + y_{{{C}}}"),
        (r"\sum_{n=1}^N x", rf"\sum_{{n=1}}^{N} x"),
        (r"\frac{1}{N}", rf"\frac{{1}}{{{N}}}"),
        (r"\begin{aligned} C &= 3 \\ H &= 2 \end{aligned}",
         rf"\begin{{aligned}} {C} &= 3 \\ {H} &= 2 \end{{aligned}}"),
        (r"\\N", rf"\\{N}"),
    ],
)  # fmt: skip
def test_axis_letters_in_mathematics_are_colored(latex, expected):
    assert color_math(latex) == expected


@pytest.mark.parametrize(
    "latex",
    [
        r"\mathbf{W} x",
        r"\mathbf W x",
        r"\mathrm{NCHW}",
        r"\text{N samples}",
        r"\mathcal{N}(0, 1)",
        r"\operatorname{Cov}",
        r"\operatorname*{C}",
        "NHW",
        r"\Nabla",
        "x_i",
        r"\tag{N}",
        "",
    ],
)
def test_other_letters_in_mathematics_are_left_alone(latex):
    assert color_math(latex) == latex


def test_axis_letters_in_comments_are_colored():
    html = (
        '<span class="n">N</span> <span class="c1"># N, C, H and W; an NCHW array, W&#39;s</span>'
    )
    colored = color_comments(html)
    assert colored.startswith('<span class="n">N</span> ')
    for axis in "NCHW":
        assert colored.count(f'<span class="axis-{axis.lower()}">{axis}</span>') == (
            2 if axis == "W" else 1
        )
    assert "an NCHW array" in colored
    assert re.sub(r"</?span[^>]*>", "", colored) == re.sub(r"</?span[^>]*>", "", html)


@pytest.fixture
def server(monkeypatch):
    """KaTeX as the build runs it."""
    monkeypatch.setattr(katex, "NODEJS_BINARY", katex_build.node_binary())
    monkeypatch.setattr(
        katex, "KATEX_DEFAULT_OPTIONS", {"throwOnError": True, "strict": False, "trust": True}
    )
    monkeypatch.setattr(katex.KaTeXServer, "katex_path", "katex.min.js")
    start = classmethod(katex_build.start_server_process)
    monkeypatch.setattr(katex.KaTeXServer, "start_server_process", start)
    monkeypatch.setattr(katex, "STARTUP_TIMEOUT", 60.0)


def test_katex_renders_with_the_node_that_pip_installed(server, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no other node can be found
    html = katex_build.render_latex(r"\frac{x_N}{\sqrt{N^2}} = \mathbf{W}")
    assert html.count('class="enclosing axis-n') == 2
    assert r"<annotation encoding=" in html
    assert r"\frac{x_N}{\sqrt{N^2}} = \mathbf{W}" in html  # what a reader copies is the source
    assert "axis-w" not in html


def test_formula_that_katex_cannot_parse_is_a_warning(server, monkeypatch):
    messages = []
    monkeypatch.setattr(katex_build.logger, "warning", lambda *a, **k: messages.append(a))
    katex_build.render_latex(r"\frac{1}{")
    assert len(messages) == 1


def test_style_sheet_is_of_the_katex_that_renders():
    css = (ROOT / "book" / "_static" / "katex" / "katex.min.css").read_text()
    assert f'content:"{katex.katex_version}"' in css
    fonts = set(re.findall(r"url\(([^)]+)\)", css))
    assert fonts
    assert all((ROOT / "book" / "_static" / "katex" / font).is_file() for font in fonts)


@pytest.mark.parametrize(
    ("alt", "uri"),
    [
        (None, ""),
        ("  ", ""),
        ("A plot.", ""),
        ("figure-with-a-long-name-but-no-words", ""),
        ("_build/jupyter_execute/ea6796430cb0d479eb6d32119d88a813.png", ""),
        ("The picture of the axes is axes.png, as you see", "images/axes.png"),
    ],
)
def test_missing_description_is_found(alt, uri):
    assert alt_problem(alt, uri)


def test_real_description_passes():
    assert alt_problem("A block of cells; those of one channel are lit.", "images/axes.png") is None


# --- Figures --------------------------------------------------------------------------------------

SVG = """<svg width="331.2pt" height="216pt" viewBox="0 0 331 216">
<path style="stroke: {light}; fill: {upper}"/>
<image href="data:image/png;base64,{inside}"/></svg>"""


def test_figure_for_the_dark_page_swaps_the_shades_and_nothing_else():
    light, ink = AXIS_COLORS["C"], INK
    svg = SVG.format(light=light.light, upper=ink.light.upper(), inside="AAAA")
    assert darken(svg) == SVG.format(light=light.dark, upper=ink.dark, inside="AAAA")
    assert darken(darken(svg)) == darken(svg)
    assert not set(SHADES) & set(SHADES.values())


def test_figure_is_enlarged_on_a_wide_screen():
    assert size(SVG) == (552, 360)


# --- Docstrings -----------------------------------------------------------------------------------

TITLES = {"Forward, and what ε does": "/book/layer/forward", "Backward": "/book/layer/backward"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Derived in *Backward*.", "Derived in :doc:`Backward </book/layer/backward>`."),
        (
            "x. Used in *Forward, and what ε\n    does* and *Backward*; see *this*.",
            "x. Used in :doc:`Forward, and what ε does </book/layer/forward>` and "
            ":doc:`Backward </book/layer/backward>`; see *this*.",
        ),
        ("Derived in *A chapter to come*.", "Derived in *A chapter to come*."),
        ("The *Backward* of it.", "The *Backward* of it."),
    ],
)
def test_chapter_named_in_a_docstring_is_a_link(text, expected):
    assert link(text, TITLES) == expected


def test_title_of_a_chapter_is_text(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text(
        '{"cells": [{"source": ["(x)=\\n", "# What $\\\\varepsilon$ does\\n", "More"]}]}'
    )
    assert title_of(path) == "What ε does"


def test_fields_of_a_class_are_listed_once(site):
    page = BeautifulSoup((site / "book" / "api.html").read_text(encoding="utf-8"), "html.parser")
    fields = page.find(id="bnlib.Moments").find_next("dl")
    assert [dt.text for dt in fields.select(":scope > dt")] == ["Variables:"]
    assert "values per channel" in fields.text
    links = [a["href"] for a in page.select("p > a") if a.parent.text.find("Derived in") >= 0]
    assert "layer/forward.html" in links and "axes/which-axes.html" in links
    assert "Derived in *" not in page.text


# --- The theme without scripts --------------------------------------------------------------------


def test_dark_rules_have_a_twin_for_readers_without_scripts():
    css = """html[data-theme="dark"] p, b { color: red } i { top: 0 }
      @media screen { html[data-theme="dark"] .x { left: 0 } }
      html[data-theme="light"] p { top: 1px }"""
    asked = "@media (scripting:none) and (prefers-color-scheme:dark)"
    found = without_scripts(css)
    assert f"{asked}{{html[data-theme] p{{color: red}}}}" in found
    assert f"{asked}{{html[data-theme] .x{{left: 0}}}}}}" in found
    assert found.count(asked) == 2 and found.index("color: red") < found.index(asked)
