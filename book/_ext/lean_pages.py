"""Make the built pages light, and mend what the stock theme gets wrong for some readers.

After the HTML is written, the dozen style sheets become one that holds only the rules that some
page can match; the scripts become one that does not block the page; the icon and KaTeX fonts keep
only the glyphs in use; pictures become WebP, are loaded when they come near, and have their size
in the page, so that nothing jumps; what the browser need not lay out at once waits (see
`far_blocks.py`). Nothing of what a reader sees changes. It serves the builder ``html`` alone.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import logging
import os
import re
import shutil
from pathlib import Path

from bs4 import BeautifulSoup
from far_blocks import put_off
from fontTools import subset
from PIL import Image
from sphinx.application import Sphinx

STYLES = (
    "basic.css",
    "styles/pydata-sphinx-theme.css",
    "pygments.css",
    "styles/sphinx-book-theme.css",
    "togglebutton.css",
    "copybutton.css",
    "mystnb.*.css",
    "exercise.css",
    "proof.css",
    "sphinx-design.min.css",
    "katex/katex.min.css",
    "katex-math.css",
    "book.css",
)
SCRIPTS = (
    "documentation_options.js",
    "doctools.js",
    "sphinx_highlight.js",
    "clipboard.min.js",
    "copybutton.js",
    "scripts/sphinx-book-theme.js",
    "togglebutton.js",
    "scripts/bootstrap.js",
    "scripts/pydata-sphinx-theme.js",
    "previews.js",
    "print.js",
)
# What the theme does as a page opens, and what is done in its place.
THEME_MODE = 'document.documentElement.dataset.theme = localStorage.getItem("theme") || "auto";'
MODE = """{
      const { mode } = document.documentElement.dataset;
      const dark = mode === "auto" && matchMedia("(prefers-color-scheme: dark)").matches;
      document.documentElement.dataset.theme = dark || mode === "dark" ? "dark" : "light";
    }"""
THEME_MEASURES = '"complete"===document.readyState?O():window.addEventListener("load",O)'
MEASURES = Path(__file__).with_name("scrollable.js")
# A fold is called what it says ("Show", by the style sheet's way of its hint) and what it opens.
FOLD_LABEL = 'aria-label="Toggle hidden content"'
FOLD_ADDED = 'title.insertAdjacentHTML("beforeend", collapseButton);'
FOLD_NAMED = """{
        const opens = document.createElement("span");
        opens.className = "visually-hidden";
        opens.textContent = title.textContent;
        title.insertAdjacentHTML("beforeend", collapseButton);
        title.lastElementChild.append(opens);
      }"""
# In the theme, and of no use here: icons as a megabyte of script, source maps, templates.
UNUSED = (
    "scripts/fontawesome.js*",
    "**/*.map",
    "**/*.LICENSE.txt",
    "**/*macros.html",
    "styles/theme.css",
    "design-tabs.js",
    "translations.js",
    "sbt-webpack-macros.html",
)

logging.getLogger("fontTools").setLevel(logging.ERROR)

# --- Style sheets ---------------------------------------------------------------------------------

_TOKEN = re.compile(
    r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|url\([^"\')]*\)|/\*.*?\*/|[{};]', re.DOTALL
)


def parse_css(css: str) -> list[tuple[str, str | None]]:
    """Split a style sheet into (selector or at-rule, body); the body of a statement is None."""
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    rules, depth, start, body = [], 0, 0, 0
    prelude = ""
    for token in _TOKEN.finditer(css):
        mark = token[0]
        if mark == "{":
            if depth == 0:
                prelude, body = css[start : token.start()].strip(), token.end()
            depth += 1
        elif mark == "}":
            depth -= 1
            if depth == 0:
                rules.append((prelude, css[body : token.start()].strip()))
                start = token.end()
        elif mark == ";" and depth == 0:
            rules.append((css[start : token.start()].strip(), None))
            start = token.end()
    return rules


def can_match(selector: str, words: set[str]) -> bool:
    """Whether every class and id of a selector occurs among the pages' words."""
    for _ in range(3):  # what a function's brackets hold need not be there
        selector = re.sub(r":(?:not|is|where|has|lang|nth[\w-]*)\([^()]*\)", "", selector)
    selector = re.sub(r"\[[^\]]*\]", "", selector)
    return all(name in words for name in re.findall(r"[.#](-?[_a-zA-Z][\w-]*)", selector))


def split_selectors(prelude: str) -> list[str]:
    """The selectors of a list, split at the commas that are not inside brackets."""
    parts, depth, current = [], 0, ""
    for sign in prelude:
        depth += (sign in "([") - (sign in ")]")
        if sign == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += sign
    return [*parts, current.strip()]


def purge(css: str, words: set[str]) -> str:
    """The rules of a style sheet that can match something."""
    kept = []
    for prelude, body in parse_css(css):
        if body is None:
            continue  # @charset, @import
        if prelude.startswith(("@media", "@supports", "@container", "@layer")):
            inner = purge(body, words)
            if inner:
                kept.append(f"{prelude}{{{inner}}}")
        elif prelude.startswith("@"):
            kept.append(f"{prelude}{{{body}}}")
        elif body:
            selectors = [s for s in split_selectors(prelude) if can_match(s, words)]
            if selectors:
                kept.append(f"{','.join(selectors)}{{{body}}}")
    return "".join(kept)


def drop_unused_variables(css: str, elsewhere: str) -> str:
    """Remove custom properties that nothing reads, until none is left."""
    while True:
        read = set(re.findall(r"var\(\s*(--[\w-]+)", css))
        read |= set(re.findall(r"--[\w-]+", elsewhere))
        read |= set(re.findall(r"@keyframes\s+([\w-]+)", css))
        unused = set(re.findall(r"[{;]\s*(--[\w-]+)\s*:", css)) - read
        if not unused:
            return css
        css = re.sub(
            r"([{;])\s*(--[\w-]+)\s*:(?:\"[^\"]*\"|'[^']*'|url\([^)]*\)|[^;{}\"'])*(?=[;}])",
            lambda m, unused=unused: m[1] if m[2] in unused else m[0],
            css,
        )
        css = re.sub(r"([{;]);+", r"\1", css)


def squeeze(css: str) -> str:
    """Drop white space that means nothing; what is quoted stays as it is."""
    parts = re.split(r"(\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|url\([^)]*\))", css)
    for i in range(0, len(parts), 2):
        part = re.sub(r"\s+", " ", parts[i])
        part = re.sub(r"(?<=[{};,]) | (?=[{};,])", "", part)
        parts[i] = part.replace(";}", "}")
    return "".join(parts)


# --- Fonts ----------------------------------------------------------------------------------------


def subset_font(path: Path, characters: str) -> bytes | None:
    """The font as WOFF2 with these characters alone; None if it has none of them."""
    options = subset.Options(
        flavor="woff2", desubroutinize=True, hinting=False, notdef_outline=True
    )
    font = subset.load_font(str(path), options)
    if not set(font.getBestCmap()) & set(map(ord, characters)):
        return None
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=characters)
    subsetter.subset(font)
    buffer = io.BytesIO()
    font.flavor = "woff2"
    font.save(buffer)
    return buffer.getvalue()


def icon_fonts(css: str, static: Path) -> str:
    """Replace the icon fonts by their few glyphs, inside the style sheet."""
    codes = {chr(int(code, 16)) for code in re.findall(r'["\']\\([ef][0-9a-f]{3})["\']', css)}
    codes |= set(re.findall("[\ue000-\uf8ff]", css))

    def embed(match: re.Match[str]) -> str:
        name = re.search(r"url\([\"']?[^)]*?(fa-[\w-]+)\.woff2", match[0])
        if name is None:
            return match[0]
        font = static / "vendor" / "fontawesome" / "webfonts" / f"{name[1]}.ttf"
        data = subset_font(font, "".join(sorted(codes)))
        if data is None:
            return ""
        source = f"url(data:font/woff2;base64,{base64.b64encode(data).decode()})"
        return re.sub(r"src:.*?(?=[;}]\s*$|;[\w-]+:|}$)", f'src:{source} format("woff2")', match[0])

    return re.sub(r"@font-face\s*\{[^}]*\}", embed, css)


def katex_characters(pages: dict[Path, str]) -> str:
    """Every character inside a formula of the book."""
    found: set[str] = set()
    for html in pages.values():
        for part in html.split('<span class="katex-html"')[1:]:
            end = re.search(r"<(?:math|p|li|td|h\d|div|section|article|footer)\b", part)
            text = part[: end.start()] if end else part
            found.update("".join(re.findall(r">([^<]+)<", text)))
    return "".join(sorted(found | set("0123456789")))


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
    # Names and punctuation in code have the colour of text: they need no element each.
    html = re.sub(r'<span class="(?:n|nn|p|w)">([^<]*)</span>', r"\1", html)
    html = html.replace("<pre><span></span>", "<pre>")
    html = re.sub(r"<pre(?=>)", '<pre tabindex="0"', html)  # see scrollable.js
    html = re.sub(r'(<meta name="viewport"[^>]*>)(.*?)(?=</head>)', _one_viewport, html, flags=re.S)
    html = re.sub(r'\s*<meta name="docsearch:[^>]*>', "", html)
    html = re.sub(r'<div id="ethical-ad-placement".*?</div>', "", html, flags=re.S)
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
    return re.sub(r'<th class="head">(?:<p></p>)?</th>', "<td></td>", html)


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


def relink(html: str, prefix: str, style: str, script: str) -> str:
    """Put the one style sheet and the one script in the place of all others."""
    stale = re.escape(prefix) + "_static/"
    html = re.sub(
        rf'\s*<link\b(?=[^>]*rel="(?:stylesheet|preload)")[^>]*href="{stale}[^>]*>', "", html
    )
    names = "|".join(
        re.escape(n)
        for n in (*SCRIPTS, "scripts/fontawesome.js", "translations.js", "design-tabs.js")
    )
    html = re.sub(rf'\s*<script\b[^>]*src="{stale}(?:{names})[^>]*></script>', "", html)
    html = re.sub(r"\s*<script>DOCUMENTATION_OPTIONS\.pagename[^<]*</script>", "", html)
    html = re.sub(r"<script src=", "<script defer src=", html)
    # Four bars, one for each axis; without an icon a browser asks for one that is not there.
    bars = "".join(
        f"%3Crect x='{4 * i}' width='3' height='16' fill='%23{color}'/%3E"
        for i, color in enumerate(("0072b2", "d55e00", "009e73", "cc79a7"))
    )
    picture = f"%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 15 16'%3E{bars}%3C/svg%3E"
    # Asked for at once, these two are there before the text is laid out, which they would move.
    fonts = (
        'if (location.protocol !== "file:") for (const name of ["Main-Regular", "Math-Italic"])'
        ' document.head.append(Object.assign(document.createElement("link"), {'
        ' rel: "preload", as: "font", type: "font/woff2", crossOrigin: "",'
        f" href: `{prefix}_static/katex/fonts/KaTeX_${{name}}.woff2` }}));"
    )
    head = (
        (f"<script>{fonts}</script>\n" if 'class="katex"' in html else "")
        + f'<link rel="icon" href="data:image/svg+xml,{picture}" />\n'
        f'<link rel="stylesheet" href="{prefix}_static/{style}" />\n'
        f'<script defer src="{prefix}_static/{script}"></script>\n'
    )
    return html.replace("<!-- Loaded before other Sphinx assets -->", head, 1)


def write_named(folder: Path, stem: str, suffix: str, data: str) -> str:
    """Write a file whose name changes with its content, so that a browser may keep it for ever."""
    name = f"{stem}.{hashlib.sha256(data.encode()).hexdigest()[:10]}.{suffix}"
    (folder / name).write_text(data, encoding="utf-8")
    return name


def lean(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    static = out / "_static"
    pages = {
        p: p.read_text(encoding="utf-8") for p in out.rglob("*.html") if static not in p.parents
    }

    missing = [s for s in SCRIPTS if not (static / s).is_file()]
    if missing:
        raise ValueError(f"expected {missing} in {static}: remove the old build, then build anew")
    scripts = ";\n".join((static / s).read_text(encoding="utf-8") for s in SCRIPTS)
    scripts = re.sub(r"^//# sourceMappingURL=.*$", "", scripts, flags=re.M)
    scripts = replace_all(scripts, THEME_MEASURES, "0", "the theme's script")
    scripts = replace_all(scripts, FOLD_LABEL, "", "the folds' script")
    scripts = replace_all(scripts, FOLD_ADDED, FOLD_NAMED, "the folds' script")
    scripts += MEASURES.read_text(encoding="utf-8")
    other = (static / "searchtools.js").read_text(encoding="utf-8")
    everything = "".join(pages.values())
    words = set(re.findall(r"[\w-]+", scripts + other))
    for code in re.findall(r"<script>(.*?)</script>", everything, re.S):
        words.update(re.findall(r"[\w-]+", code))
    for names in re.findall(r'\b(?:class|id)="([^"]*)"', everything):
        words.update(names.split())

    sheets = []
    for pattern in STYLES:
        for path in sorted(static.glob(pattern)):
            css = path.read_text(encoding="utf-8")
            folder = os.path.relpath(path.parent, static)
            if folder != ".":
                css = re.sub(r"url\((?!data:|[\"'])", f"url({folder}/", css)
            sheets.append(purge(css, words))
    css = squeeze("".join(sheets))
    css = icon_fonts(css, static)
    css = re.sub(r',\s*url\([^)]*\.(?:ttf|woff)\)\s*format\("[a-z]+"\)', "", css)
    css = drop_unused_variables(css, everything + scripts)

    characters = katex_characters(pages)
    for font in sorted((static / "katex" / "fonts").glob("*.woff2")):
        data = subset_font(font, characters)
        if data is not None:
            font.write_bytes(data)

    style = write_named(static, "book", "css", css)
    script = write_named(static, "book", "js", scripts)
    root = f"{app.config.root_doc}.html"
    for path, html in pages.items():
        prefix = os.path.relpath(out, path.parent).replace(os.sep, "/")
        prefix = "" if prefix == "." else prefix + "/"
        html = relink(html, prefix, style, script)
        html = put_off(mend_page(html))
        html = mend_pictures(html, path, eager=path == out / root)
        path.write_text(html, encoding="utf-8")

    # A page opened as a file may not fetch others, which search does for the results' summaries.
    search = static / "searchtools.js"
    flag = "DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY"
    text = search.read_text(encoding="utf-8")
    text = replace_all(text, flag, f'{flag} && location.protocol !== "file:"', search.name)
    # In a summary a formula is said once, not as MathML, as LaTeX and as it is drawn.
    once = '[".katex-html", "annotation", ".headerlink",'
    text = replace_all(text, '[".headerlink",', once, search.name)
    search.write_text(text, encoding="utf-8")

    for pattern in (*STYLES, *SCRIPTS, *UNUSED):
        for path in static.glob(pattern):
            if path.name not in (style, script):
                path.unlink()
    for folder in ("vendor", "locales", "scripts", "styles"):
        shutil.rmtree(static / folder, ignore_errors=True)
    for picture in (out / "_images").glob("*.webp"):
        picture.with_suffix(".png").unlink()


def setup(app: Sphinx) -> dict:
    app.connect("build-finished", lean, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
