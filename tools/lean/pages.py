"""Pages and pictures: cures for what the stock theme gets wrong for some readers, and WebP."""

from __future__ import annotations

import copy
import re
from pathlib import Path

from bs4 import BeautifulSoup
from PIL import Image

# What the theme does as a page opens, and what is done in its place.
THEME_MODE = 'document.documentElement.dataset.theme = localStorage.getItem("theme") || "auto";'
MODE = """{
      const { mode } = document.documentElement.dataset;
      const dark = mode === "auto" && matchMedia("(prefers-color-scheme: dark)").matches;
      document.documentElement.dataset.theme = dark || mode === "dark" ? "dark" : "light";
    }"""


# --- Pages ----------------------------------------------------------------------------------------


def replace_all(text: str, old: str, new: str, where: str) -> str:
    """Like `str.replace`, and an error where a new version of the theme no longer has it."""
    if old not in text:
        raise ValueError(f"expected {old!r} in {where}")
    return text.replace(old, new)


def mend_page(html: str) -> str:
    """Cures for faults of the theme's HTML; see the style sheet for those of its CSS."""
    # The colours are there from the start: a change of theme styles every element again.
    if "dataset.theme" in html:  # a page that only forwards has none
        html = replace_all(html, THEME_MODE, MODE, "the head of the page")
        theme = 'data-theme="auto"', 'data-theme="light"'  # until a script says what it is
        html = replace_all(html, *theme, "the page")
        # What marks the section that is read is contents.js.
        html = replace_all(html, ' data-bs-spy="scroll"', "", "the body of the page")
    # Names and punctuation in code have the colour of text: they need no element each.
    html = re.sub(r'<span class="(?:n|nn|p|w)">([^<]*)</span>', r"\1", html)
    html = html.replace("<pre><span></span>", "<pre>")
    html = re.sub(r"<pre(?=>)", '<pre tabindex="0"', html)  # see scrollable.js
    html = re.sub(r'(<meta name="viewport"[^>]*>)(.*?)(?=</head>)', _one_viewport, html, flags=re.S)
    html = re.sub(r'\s*<meta name="docsearch:[^>]*>', "", html)
    html = re.sub(r'<div id="ethical-ad-placement".*?</div>', "", html, flags=re.S)
    # Paper has the page's own title, and no list of sections without their pages.
    html = re.sub(r'<div id="jb-print-docs-body".*?(?=<div id="searchbox")', "", html, flags=re.S)
    # A formula's source is no part of it, for whoever hears the page.
    html = html.replace("<annotation ", '<annotation aria-hidden="true" ')
    # Icons say nothing; the shortcut is not part of the button's name.
    html = re.sub(
        r'<(i|span) class="(fa[sbr]?[ -][^"]*|theme-switch [^"]*)"',
        r'<\1 aria-hidden="true" class="\2"',
        html,
    )
    html = html.replace(
        'class="search-button__kbd-shortcut"',
        'aria-hidden="true" class="search-button__kbd-shortcut"',
    )
    html = html.replace(
        '<div id="pst-primary-sidebar" class=',
        '<div id="pst-primary-sidebar" role="complementary" aria-label="The book" class=',
    )
    html = html.replace(
        'aria-label="Color mode" data-bs-title="Color mode"',
        'aria-label="Colour mode" data-bs-title="Colour mode"',
    )
    html = re.sub(r'alt="(?:Binder|Colab) logo"', 'alt=""', html)  # its name stands beside it
    # This button's name is the word that it shows.
    html = re.sub(r'(<button class="btn search-button-field[^>]*?) aria-label="[^"]*"', r"\1", html)
    # Hidden code is named by the words on its bar.
    html = html.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    html = _CHECK.sub(lambda m: group_answers(m[0]), html)
    html = _STOP.sub(r'<span style="white-space:nowrap">\1</span>', html)
    # A formula or a table that scrolls can be reached by keyboard.
    html = re.sub(
        r'<div class="((?:[\w-]+ )*math(?: [\w-]+)*)"',
        r'<div class="\1" tabindex="0" role="group" aria-label="Formula"',
        html,
    )
    html = html.replace(
        '<div class="pst-scrollable-table-container">',
        '<div class="pst-scrollable-table-container" tabindex="0" role="group" aria-label="Table">',
    )
    # An id stands once on a page, and a link starts at its first word.
    html = re.sub(r'<section id="(?:exercise|solution)-content">', "<section>", html)
    html = re.sub(r'(<p class="admonition-title">Solution to)(<a [^>]*>) ', r"\1 \2", html)
    # Roles that the accessibility standard has dropped, or that need what is not there.
    html = html.replace(' role="doc-biblioentry"', "").replace(
        ' role="list" class="citation-list"', ' class="citation-list"'
    )
    return re.sub(r'<th (?:class="head"|scope="col"[^>]*)>(?:<p></p>)?</th>', "<td></td>", html)


# A formula that is never broken itself, and the full stop or comma that must not part from it.
_STOP = re.compile(
    r'(<span class="math">(?:(?!<span class="(?:base|math)">).)*<span class="base">'
    r'(?:(?!<span class="(?:base|math)">).)*?(?:</span>){4}[.,;:?!)]+)',
    re.S,
)
_CHECK = re.compile(r'<section id="check-yourself">.*?</section>', re.S)


def spoken(latex: str) -> str:
    """A short formula as text that can be read aloud."""
    text = re.sub(r"\\(?:mathrm|text)\{(.*?)\}", r"\1", latex)
    text = re.sub(r"\\[,;!]", " ", text).translate(str.maketrans("{}", "()", "\\"))
    return " ".join(text.split())


def group_answers(html: str) -> str:
    """Make the answers to each question a group that has the question for its name.

    A name is made of text, of which MathML has none: formulas in it are told in words.
    """
    section = BeautifulSoup(html, "html.parser")
    for item in section.select("li:has(> details)"):
        answers = item.find_all("details", recursive=False)
        for formula in item.select(":scope > details > summary .katex-mathml"):
            formula.string = spoken(formula.annotation.text)
        question = copy.copy(item.p)
        for formula in question.select(".katex"):
            formula.replace_with(spoken(formula.annotation.text))
        name = " ".join(question.text.split())
        group = section.new_tag("div", attrs={"role": "group", "aria-label": name})
        answers[0].insert_before(group)
        group.extend(answers)
    return str(section)


def _one_viewport(match: re.Match[str]) -> str:
    return match[1] + re.sub(r'<meta name="viewport"[^>]*>', "", match[2])


# --- Pictures -------------------------------------------------------------------------------------


def to_webp(path: Path) -> Path:
    """The picture as WebP, pixel for pixel the same, if that is smaller."""
    target = path.with_suffix(".webp")
    if not target.exists():
        with Image.open(path) as image:
            image.save(target, "webp", lossless=True, quality=100, method=4)
    if target.stat().st_size < path.stat().st_size:
        return target
    target.unlink()
    return path


def mend_pictures(html: str, page: Path, eager: bool) -> str:
    first = eager

    def mend(match: re.Match[str]) -> str:
        nonlocal first
        tag = match[0]
        source = re.search(r'\bsrc="([^":]+\.png)"', tag)
        if not source:
            return tag
        path = (page.parent / source[1]).resolve()
        if not path.is_file() or path.parent.name != "_images":
            return tag
        with Image.open(path) as image:
            size = image.size
        smaller = to_webp(path)
        tag = tag.replace(source[1], source[1].rsplit("/", 1)[0] + "/" + smaller.name)
        extra = f' width="{size[0]}" height="{size[1]}"' if "width=" not in tag else ""
        extra += ' fetchpriority="high"' if first else ' loading="lazy" decoding="async"'
        first = False
        return tag.replace("<img", "<img" + extra, 1)

    return re.sub(r"<img\b[^>]*>", mend, html)
