from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from bnlib.book.colors import AXIS_COLORS
from tools.lean.far_blocks import put_off
from tools.lean.pages import mend_page, mend_pictures, replace_all
from tools.lean.styles import (
    drop_unused_variables,
    icon_fonts,
    katex_characters,
    purge,
    squeeze,
    subset_font,
    without_scripts,
)

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
    "clipboard.min.js",
    "copybutton.js",
    "scripts/sphinx-book-theme.js",
    "togglebutton.js",
    "scripts/bootstrap.js",
    "scripts/pydata-sphinx-theme.js",
    "previews.js",
    "contents.js",
    "enlarge.js",
    "print.js",
)
EARLY = ("fonts/source-serif-4-latin-400-normal", "fonts/source-serif-4-latin-600-normal")
EARLY_FORMULAS = ("katex/fonts/KaTeX_Main-Regular", "katex/fonts/KaTeX_Math-Italic")
# What the theme does as a page opens, and what is done in its place.
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
# In the theme, and of no use here: icons as a megabyte of script, words in other languages.
UNUSED = (
    "scripts/fontawesome.js",
    "translations.js",
    "design-tabs.js",
    "sphinx_highlight.js",
    # In the place of these are those of `_ext/find.py`.
    "searchtools.js",
    "language_data.js",
)


def icon() -> str:
    """Four bars, one for each axis; without an icon a browser asks for one that is not there."""
    bars = "".join(
        f"%3Crect x='{4 * i}' width='3' height='16' fill='%23{shades.light[1:]}'/%3E"
        for i, shades in enumerate(AXIS_COLORS.values())
    )
    picture = f"%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 15 16'%3E{bars}%3C/svg%3E"
    return f'<link rel="icon" href="data:image/svg+xml,{picture}" />'


def relink(html: str, style: str, script: str) -> str:
    """Put the one style sheet and the one script in the place of all others."""
    linked = re.search(r'href="([^"]*)_static/pygments\.css', html)
    if linked is None:  # a page that only forwards has no style
        return re.sub(r"(?i)(<meta\b|<title>)", lambda m: f"{icon()}\n{m[1]}", html, count=1)
    prefix = linked[1]
    stale = re.escape(prefix) + "_static/"
    html = re.sub(
        rf'\s*<link\b(?=[^>]*rel="(?:stylesheet|preload)")[^>]*href="{stale}[^>]*>', "", html
    )
    names = "|".join(map(re.escape, (*SCRIPTS, *UNUSED)))
    html = re.sub(rf'\s*<script\b[^>]*src="{stale}(?:{names})[^>]*></script>', "", html)
    html = re.sub(r"\s*<script>DOCUMENTATION_OPTIONS\.pagename[^<]*</script>", "", html)
    html = re.sub(r"<script src=", "<script defer src=", html)
    # Asked for at once, these are there before the text is laid out, which they would move.
    early = [*EARLY, *(EARLY_FORMULAS if 'class="katex"' in html else ())]
    fonts = (
        f'if (location.protocol !== "file:") for (const name of {json.dumps(early)})'
        ' document.head.append(Object.assign(document.createElement("link"), {'
        ' rel: "preload", as: "font", type: "font/woff2", crossOrigin: "",'
        f" href: `{prefix}_static/${{name}}.woff2` }}));"
    )
    head = (
        f"<script>{fonts}</script>\n"
        f"{icon()}\n"
        f'<link rel="stylesheet" href="{prefix}_static/{style}" />\n'
        f'<script defer src="{prefix}_static/{script}"></script>\n'
    )
    return html.replace("<!-- Loaded before other Sphinx assets -->", head, 1)


def write_named(folder: Path, stem: str, suffix: str, data: str) -> str:
    """Write a file whose name changes with its content, so that a browser may keep it for ever."""
    name = f"{stem}.{hashlib.sha256(data.encode()).hexdigest()[:10]}.{suffix}"
    (folder / name).write_text(data, encoding="utf-8")
    return name


def lean(folder: Path) -> None:
    """Make the pages that Sphinx has written into a folder light."""
    static = folder / "_static"
    missing = [s for s in SCRIPTS if not (static / s).is_file()]
    if missing:
        raise ValueError(
            f"expected pages as Sphinx writes them, with {missing[0]} in {static}: "
            "what is light already cannot be made light again, so build the book anew"
        )
    pages = {
        p: p.read_text(encoding="utf-8") for p in folder.rglob("*.html") if static not in p.parents
    }
    forward = re.search(r'url=([^"]+)"', pages[folder / "index.html"])
    front = folder / forward[1] if forward else folder / "index.html"

    scripts = ";\n".join((static / s).read_text(encoding="utf-8") for s in SCRIPTS)
    scripts = re.sub(r"^//# sourceMappingURL=.*$", "", scripts, flags=re.M)
    scripts = replace_all(scripts, THEME_MEASURES, "0", "the theme's script")
    scripts = replace_all(scripts, FOLD_LABEL, "", "the folds' script")
    scripts = replace_all(scripts, FOLD_ADDED, FOLD_NAMED, "the folds' script")
    scripts += MEASURES.read_text(encoding="utf-8")
    other = (static / "find.js").read_text(encoding="utf-8")
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
            beside = os.path.relpath(path.parent, static)
            if beside != ".":
                css = re.sub(r"url\((?!data:|[\"'])", f"url({beside}/", css)
            sheets.append(purge(css, words))
    css = squeeze(without_scripts("".join(sheets)))
    css = icon_fonts(css, static)
    css = re.sub(r',\s*url\([^)]*\.(?:ttf|woff)\)\s*format\("[a-z]+"\)', "", css)
    css = drop_unused_variables(css, everything + scripts)

    characters = katex_characters(pages.values())
    for font in sorted((static / "katex" / "fonts").glob("*.woff2")):
        data = subset_font(font, characters)
        if data is not None:
            font.write_bytes(data)
    letters = "".join(sorted(set(everything) | set(map(chr, range(32, 127)))))
    for font in sorted((static / "fonts").glob("*.woff2")):
        font.write_bytes(subset_font(font, letters, nameless=True) or font.read_bytes())

    style = write_named(static, "book", "css", css)
    script = write_named(static, "book", "js", scripts)
    for path, html in pages.items():
        html = put_off(mend_page(relink(html, style, script)))
        path.write_text(mend_pictures(html, path, eager=path == front), encoding="utf-8")

    for pattern in (*STYLES, *SCRIPTS, *UNUSED, "*macros.html"):
        for path in static.glob(pattern):
            if path.name not in (style, script):
                path.unlink()
    (folder / "searchindex.js").unlink()
    for unused in ("vendor", "locales", "scripts", "styles"):
        shutil.rmtree(static / unused, ignore_errors=True)
    for picture in (folder / "_images").glob("*.webp"):
        picture.with_suffix(".png").unlink()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.lean FOLDER")
    try:
        lean(Path(sys.argv[1]))
    except ValueError as problem:
        sys.exit(str(problem))
