"""Style sheets and fonts with what the pages use alone: rules that can match, glyphs that occur."""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from fontTools import subset

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


_DARK = re.compile(r"html\[data-theme=[\"']?dark[\"']?\]")


def without_scripts(css: str) -> str:
    """Give the dark theme to a reader who asks for it and has no scripts, which would set it.

    Each rule of the theme gets a twin, right behind it and of the same weight.
    """
    kept = []
    for prelude, body in parse_css(css):
        if body is None:
            kept.append(f"{prelude};")
        elif prelude.startswith(("@media", "@supports", "@container", "@layer")):
            kept.append(f"{prelude}{{{without_scripts(body)}}}")
        else:
            kept.append(f"{prelude}{{{body}}}")
            twins = [
                _DARK.sub("html[data-theme]", selector)
                for selector in split_selectors(prelude)
                if _DARK.search(selector) and not prelude.startswith("@")
            ]
            if twins:
                asked = "@media (scripting:none) and (prefers-color-scheme:dark)"
                kept.append(f"{asked}{{{','.join(twins)}{{{body}}}}}")
    together = "".join(kept)
    return together.replace("}}@media (scripting:none) and (prefers-color-scheme:dark){", "}")


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


def subset_font(path: Path, characters: str, nameless: bool = False) -> bytes | None:
    """The font as WOFF2 with these characters alone; None if it has none of them.

    What is left of a font whose name its licence reserves keeps nothing but its copyright line.
    """
    options = subset.Options(
        flavor="woff2", desubroutinize=True, hinting=False, notdef_outline=True
    )
    if nameless:
        options.name_IDs = [0]
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


def katex_characters(pages: Iterable[str]) -> str:
    """Every character inside a formula of the book."""
    found: set[str] = set()
    for html in pages:
        for part in html.split('<span class="katex-html"')[1:]:
            end = re.search(r"<(?:math|p|li|td|h\d|div|section|article|footer)\b", part)
            text = part[: end.start()] if end else part
            found.update("".join(re.findall(r">([^<]+)<", text)))
    return "".join(sorted(found | set("0123456789")))
