"""The chapters keep their promises of form, and the pages ask no other host for anything.

Each rule is a function from a notebook (or a page) to a list of problems. It is applied to the real
book, and to an example that was spoilt on purpose, where it must find a problem.
"""

from __future__ import annotations

import copy
import re
from html.entities import name2codepoint
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from words import LETTERS, alt_problem

from bnlib.book.colors import AXIS_COLORS

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
CHAPTERS = sorted(p for p in BOOK.glob("*/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SVG = "image/svg+xml"
LARGEST = 1_500_000  # bytes of one notebook: a page must stay readable on a slow connection

# --- What a chapter must be -----------------------------------------------------------------------


def cells(nb, kind):
    return [cell for cell in nb.cells if cell.cell_type == kind]


def prose(nb):
    """The text of the chapter without its code blocks and directives' fences."""
    return "\n\n".join(cell.source for cell in cells(nb, "markdown"))


def headings(nb, level):
    return re.findall(rf"^{'#' * level} +(.+?) *$", prose(nb), re.MULTILINE)


def exercises(nb):
    text, problems = prose(nb), []
    asked = dict(
        (label, title)
        for title, label in re.findall(
            r"^```\{exercise-start\} *(.*?) *\n:label: *(\S+)", text, re.MULTILINE
        )
    )
    solved = dict(re.findall(r"^```\{solution-start\} *(\S+) *\n((?::.*\n)*)", text, re.MULTILINE))
    if len(asked) < 3:
        problems.append(f"expected at least 3 exercises, got {len(asked)}")
    if not any("find the bug" in title.lower() for title in asked.values()):
        problems.append(f"expected an exercise titled 'find the bug', got {list(asked.values())}")
    for label in asked:
        if label not in solved:
            problems.append(f"exercise {label} has no solution")
        elif not re.search(r"^:class:.*\bdropdown\b", solved[label], re.MULTILINE):
            problems.append(f"the solution of {label} is not hidden (':class: dropdown')")
    for kind in ("exercise", "solution"):
        starts, ends = text.count(f"{{{kind}-start}}"), text.count(f"{{{kind}-end}}")
        if starts != ends:
            problems.append(f"{starts} times {kind}-start but {ends} times {kind}-end")
    return problems


def summary(nb):
    match = re.search(r"^## Summary *$(.*?)(?=^## |\Z)", prose(nb), re.MULTILINE | re.DOTALL)
    items = re.findall(r"^\d+\. ", match[1], re.MULTILINE) if match else []
    return [] if len(items) == 5 else [f"expected 5 numbered lines of summary, got {len(items)}"]


def executed(nb):
    """nbval never compares a cell without an execution count: an empty one would always pass."""
    counts = [cell.execution_count for cell in cells(nb, "code") if cell.source.strip()]
    if counts == list(range(1, len(counts) + 1)):
        return []
    return [f"expected the code cells to be executed as 1, 2, 3, ..., got {counts}"]


def no_errors(nb):
    return [
        f"{cell.id} stores an error or a warning"
        for cell in cells(nb, "code")
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


# A cell that measures on the reader's own GPU cannot be compared; what is stored must say so.
NOTHING_MEASURED = "no CUDA device: nothing measured\n"


def every_cell_compared(nb):
    marks = re.compile(r"NBVAL_|nbval-|raises-exception|PYTEST_VALIDATE")

    def measures(cell):
        stored = [output.get("text") for output in cell.outputs]
        return stored == [NOTHING_MEASURED] and cell.metadata.tags == ["nbval-ignore-output"]

    return [
        f"{cell.id} asks not to be compared"
        for cell in cells(nb, "code")
        if (marks.search(cell.source) or any(map(marks.search, cell.metadata.get("tags", []))))
        and not measures(cell)
    ]


def draws(cell):
    return any(SVG in o.get("data", {}) for o in cell.get("outputs", []))


def described(nb):
    problems = []
    for cell in cells(nb, "code"):
        if draws(cell):
            meta = cell.metadata.get("mystnb", {})
            if problem := alt_problem(meta.get("image", {}).get("alt")):
                problems.append(f"the figure of {cell.id} {problem}")
            if not meta.get("figure", {}).get("caption"):
                problems.append(f"the figure of {cell.id} has no caption")
    return problems


def gives_numbers(cell):
    if re.search(r"\bassert\b|\bassert_|print\(", cell.source):
        return True
    return any(
        o.output_type == "stream" or not o.get("data", {}).get("text/plain", "<Fig").startswith("<")
        for o in cell.outputs
    )


def figures_have_numbers(nb):
    code = cells(nb, "code")
    return [
        f"no number of the figure of {cell.id} is printed or asserted in it or beside it"
        for i, cell in enumerate(code)
        if draws(cell) and not any(map(gives_numbers, code[max(0, i - 1) : i + 2]))
    ]


def outputs_of_any_machine(nb):
    local = re.compile(
        r"/(home|root|Users|tmp|work|usr|var)/|site-packages|\b0x[0-9a-f]{6,}|[A-Z]:\\"
    )
    problems = []
    for cell in cells(nb, "code"):
        for output in cell.outputs:
            text = [output.get("text", ""), *output.get("data", {}).values()]
            for found in (m for t in text if isinstance(t, str) and (m := local.search(t))):
                if SVG not in output.get("data", {}):
                    problems.append(f"{cell.id} prints {found[0]!r}, which is this machine's")
    return problems


def size(nb):
    n = len(nbformat.writes(nb).encode())
    return [] if n <= LARGEST else [f"expected at most {LARGEST} bytes, got {n}"]


OUTSIDE = re.compile(
    r"""(?:src|srcset|poster)\s*=\s*["']?\s*(?:https?:)?//[^\s"'>]+"""
    r"""|!\[[^\]]*\]\(\s*(?:https?:)?//[^)]+\)"""
    r"""|\{(?:image|figure|iframe)\}`*\s*(?:https?:)?//\S+"""
    r"""|url\(\s*["']?(?:https?:)?//[^)]+\)"""
    r"""|@import\s+["'](?:https?:)?//[^"']+["']"""
    r"""|<link[^>]+rel=["']?stylesheet[^>]+(?:https?:)?//[^>]+>"""
)


def outside_assets(text):
    """Assets that a text (Markdown, HTML or CSS) would fetch from another host."""
    return [f"asks another host: {match[0]}" for match in OUTSIDE.finditer(text)]


def self_contained(nb):
    texts = [cell.source for cell in cells(nb, "markdown")]
    for cell in cells(nb, "code"):
        texts += [o.get("data", {}).get("text/html", "") for o in cell.outputs]
    return [problem for text in texts for problem in outside_assets(text)]


RULES = [
    exercises,
    summary,
    executed,
    no_errors,
    every_cell_compared,
    described,
    figures_have_numbers,
    outputs_of_any_machine,
    size,
    self_contained,
]


def test_the_page_that_is_no_chapter_runs_as_one():
    nb = nbformat.read(BOOK / "sick-model.ipynb", as_version=4)
    for rule in RULES:
        if rule not in (exercises, summary):
            assert rule(nb) == [], rule.__name__


def test_there_are_chapters():
    assert CHAPTERS


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_chapter(rule, path):
    assert rule(nbformat.read(path, as_version=4)) == []


# --- Each of these rules can fail -----------------------------------------------------------------


def example():
    """The smallest notebook that keeps every rule."""
    nb = new_notebook()
    text, code = new_markdown_cell, new_code_cell
    picture = new_output("display_data", {SVG: "", "text/plain": "<Figure size 9x9>"})
    nb.cells.append(text("# Title"))
    for title in ("In one picture", "Exercises", "Summary"):
        nb.cells.append(text(f"## {title}"))
        if title == "In one picture":
            meta = {"image": {"alt": "Two bars, the left one twice as high as the right one."}}
            meta["figure"] = {"name": "fig-bars", "caption": "Two bars."}
            nb.cells.append(code("plot()", outputs=[picture], metadata={"mystnb": meta}))
            nb.cells.append(code("print(2)", outputs=[new_output("stream", text="2\n")]))
        if title == "Exercises":
            for i, name in enumerate(["One", "Two", "Find the bug"]):
                nb.cells += [
                    text(f"```{{exercise-start}} {name}\n:label: ex-{i}\n```"),
                    text("```{exercise-end}\n```"),
                    text(f"```{{solution-start}} ex-{i}\n:class: dropdown\n```"),
                    text("```{solution-end}\n```"),
                ]
        if title == "Summary":
            nb.cells.append(text("\n".join(f"{i}. point" for i in range(1, 6))))
    for count, cell in enumerate(cells(nb, "code"), 1):
        cell.execution_count = count
    return nb


def replace(old, new):
    def spoil(nb):
        assert any(old in cell.source for cell in nb.cells)
        for cell in nb.cells:
            cell.source = cell.source.replace(old, new)

    return spoil


def strip_counts(nb):
    cells(nb, "code")[0].execution_count = None


def rerun_one(nb):
    cells(nb, "code")[1].execution_count = 7


def add_output(output):
    return lambda nb: cells(nb, "code")[1].outputs.append(output)


def tag(nb):
    cells(nb, "code")[1].metadata["tags"] = ["nbval-skip"]


def alt(text):
    def spoil(nb):
        cells(nb, "code")[0].metadata["mystnb"]["image"]["alt"] = text

    return spoil


def no_caption(nb):
    del cells(nb, "code")[0].metadata["mystnb"]["figure"]


def no_numbers(nb):
    nb.cells.remove(cells(nb, "code")[1])


def add_text(source):
    return lambda nb: nb.cells.append(new_markdown_cell(source))


def stdout(text):
    return add_output(new_output("stream", name="stdout", text=text))


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        (exercises, replace("{exercise-start} One", "{note} One")),
        (exercises, replace("Find the bug", "Three")),
        (exercises, replace("{solution-start} ex-1", "{solution-start} ex-9")),
        (exercises, replace(":class: dropdown", ":hidden:")),
        (exercises, replace("{exercise-end}", "{note}")),
        (summary, replace("\n5. point", "")),
        (summary, replace("\n5. point", "\n5. point\n6. point")),
        (executed, strip_counts),
        (executed, rerun_one),
        (no_errors, add_output(new_output("error", ename="ValueError", evalue="", traceback=[]))),
        (no_errors, add_output(new_output("stream", name="stderr", text="Warning\n"))),
        (every_cell_compared, replace("print(2)", "# NBVAL_SKIP\nprint(2)")),
        (every_cell_compared, tag),
        (described, alt(None)),
        (described, alt("fig-bars.png")),
        (described, alt("ea6796430cb0d479eb6d32119d88a813ce4ac8dccba03ee58681c5d6a473ac9a")),
        (described, alt("Two bars.")),
        (described, no_caption),
        (figures_have_numbers, no_numbers),
        (outputs_of_any_machine, stdout("/home/somebody/book\n")),
        (outputs_of_any_machine, stdout("<object at 0x7f3a2c1b5d30>\n")),
        (size, stdout("x" * LARGEST)),
        (self_contained, add_text("![a picture](https://example.org/a.png)")),
        (self_contained, add_text("```{figure} https://example.org/a.png\n```")),
        (
            self_contained,
            add_output(new_output("display_data", {"text/html": "<img src='//a.b/c'>"})),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_rule_finds_a_spoilt_chapter(rule, spoil):
    nb = example()
    assert rule(nb) == []
    spoilt = copy.deepcopy(nb)
    spoil(spoilt)
    assert rule(spoilt)


# --- Notation: one symbol, one meaning ------------------------------------------------------------

GREEK = {name for name in name2codepoint if name.lower() in LETTERS}
_NESTED = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_NOT_SYMBOLS = [
    r"\\\\(\[[^\]]*\])?",
    rf"_\s*(?:{_NESTED}|\\[A-Za-z]+(?:\{{[^{{}}]*\}})?|.)",  # subscripts: indices, names
    r"\\(?:mathrm|mathsf|mathbb|text|operatorname\*?|begin|end)(?![A-Za-z])\s*(?:\{[^{}]*\}|\w)",
]
_SYMBOL = re.compile(r"(?:\\(hat|bar|tilde|mathbf|boldsymbol)\b[\s{]*)?\\?([A-Za-z]+)")


def symbols(text):
    """The symbols in a text's formulas, such as "x" or "hat x", without their subscripts."""
    text = re.sub(r"(?<!`)`(?!`)[^`\n]+`(?!`)", "", text)  # code, which may hold dollars
    found = set()
    for display, inline in re.findall(r"\$\$(.*?)\$\$|\$([^$\n]+)\$", text, re.DOTALL):
        formula = display or inline
        for pattern in _NOT_SYMBOLS:
            formula = re.sub(pattern, " ", formula)
        formula = re.sub(r"(?<![A-Za-z\\])[A-Za-z]{2,}", lambda m: " ".join(m[0]), formula)
        for accent, letter in _SYMBOL.findall(formula):
            if len(letter) == 1 or letter == "ell" or letter.removeprefix("var") in GREEK:
                found.add(f"{accent} {letter}".lstrip())
    return found


def notation(page):
    """What the notation lists: symbols for every page, and (symbol, chapter) for one alone."""
    whole, _, alone = page.partition("## In one chapter only")
    alone, _, rest = alone.partition("\n## ")
    everywhere = {
        symbol
        for cell in re.findall(r"^\| ?(.*?) ?\|", whole + rest, re.MULTILINE)
        for symbol in symbols(cell)
    }
    single = {
        (symbol, chapter)
        for cell, where in re.findall(r"^\| ?(.*?) ?\| ?(.*?) ?\|", alone, re.MULTILINE)
        for symbol in symbols(cell)
        for chapter in re.findall(r"\(([\w/-]+)\.ipynb\)", where)
    }
    return everywhere, single


NOTATION = (BOOK / "notation.md").read_text(encoding="utf-8")
PROSE = {
    p.relative_to(BOOK).with_suffix("").as_posix(): (
        p.read_text(encoding="utf-8") if p.suffix == ".md" else prose(nbformat.read(p, 4))
    )
    for p in [*sorted(BOOK.glob("*.md")), *CHAPTERS]
}


@pytest.mark.parametrize("name", sorted(PROSE.keys() - {"notation"}))
def test_every_symbol_is_listed(name):
    everywhere, single = notation(NOTATION)
    here = {symbol for symbol, chapter in single if chapter == name}
    used = symbols(PROSE[name])
    assert used <= everywhere | here, f"not in notation.md: {sorted(used - everywhere - here)}"
    assert here <= used, f"notation.md lists for this chapter, in vain: {sorted(here - used)}"


def test_symbols_are_found():
    text = (
        r"$\hat x_{nchw}$, $\mathrm{d}v \in \mathbb{R}^m$ and `$e$`"
        r" $$\begin{aligned} rP &= \frac{\gamma}{2} \\ \sigma^2_\mathrm{run} &\textstyle\sum_{k}"
        r"\operatorname{Var} \mathbf{U} ax \end{aligned}$$"
    )
    wanted = {"hat x", "v", "m", "r", "P", "gamma", "sigma", "mathbf U", "a", "x"}
    assert symbols(text) == wanted


# --- The bibliography -----------------------------------------------------------------------------

_BY_HAND = re.compile(
    r"\((?:1[89]\d\d|20[0-3]\d)[a-z]?\)|\bet al\.|\barXiv\b|(?<![\d.])\d{4}\.\d{5}(?!\d)"
)


def works_cited_by_hand(text):
    """Years in brackets and arXiv numbers, outside code and citations."""
    text = re.sub(r"(?<!`)`(?!`)[^`\n]+`(?!`)", "", text)
    return [text[max(0, m.start() - 40) : m.end()] for m in _BY_HAND.finditer(text)]


def bibliography_problems(bib, texts):
    entries = re.findall(r"^@\w+\{(\S+),$", bib, re.MULTILINE)
    waiting = re.findall(r"^%   (\w+): \w", bib, re.MULTILINE)
    roles = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", "\n".join(texts))
    cited = {key.strip() for keys in roles for key in keys.split(",")}
    problems = [f"{key} is there twice" for key in set(entries) if entries.count(key) > 1]
    problems += [f"{key} is cited, but there is no entry" for key in cited - set(entries)]
    problems += [f"{key} waits, but there is no entry" for key in set(waiting) - set(entries)]
    problems += [f"{key} is cited, but said to wait" for key in cited & set(waiting)]
    uncited = set(entries) - cited - set(waiting)
    problems += [f"nothing cites {key}, and it waits for no chapter" for key in uncited]
    return sorted(problems)


def test_every_work_is_cited_through_the_bibliography():
    bib = (BOOK / "references.bib").read_text(encoding="utf-8")
    assert bibliography_problems(bib, PROSE.values()) == []
    assert {name: w for name, text in PROSE.items() if (w := works_cited_by_hand(text))} == {}


def test_bibliography_rules_can_fail():
    bib = "%   b: Traps\n@misc{a,\n}\n@book{b,\n}\n"
    assert bibliography_problems(bib, ["{cite:t}`a`"]) == []
    for wrong, text in [
        (bib + bib, "{cite}`a`"),
        (bib, "{cite:p}`a, c`"),
        (bib, "{cite:p}`a,b`"),
        (bib, ""),
        (bib.replace("   b", "   c"), "{cite:p}`a,b`"),
    ]:
        assert bibliography_problems(wrong, [text])
    for text in ("Huang (2018)", "Huang et al. did", "arXiv", "1804.08450"):
        assert works_cited_by_hand(text)
    assert works_cited_by_hand("m (2048) of 10.24432 and `arXiv` {cite:t}`he2016`") == []


# --- The table of contents ------------------------------------------------------------------------


def contents_problems(toc, files):
    """Compare the table of contents with the pages (paths without suffix) that exist."""
    listed = [toc["root"]] + [c["file"] for part in toc["parts"] for c in part["chapters"]]
    problems = [f"{name} is listed twice" for name in sorted(set(listed)) if listed.count(name) > 1]
    problems += [f"{name} is listed, but there is no such file" for name in set(listed) - files]
    problems += [f"{name} is not in the table of contents" for name in files - set(listed)]
    return problems


def pages():
    return {
        p.relative_to(ROOT).with_suffix("").as_posix()
        for p in BOOK.rglob("*")
        if p.suffix in (".md", ".ipynb") and not {".ipynb_checkpoints", "_static"} & set(p.parts)
    }


def test_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    assert contents_problems(toc, pages() - {"book/template"}) == []


@pytest.mark.parametrize("files", [{"a"}, {"a", "b", "c"}, {"a", "x"}])
def test_contents_can_fail(files):
    toc = {"root": "a", "parts": [{"chapters": [{"file": "b"}]}]}
    assert contents_problems(toc, {"a", "b"}) == []
    assert contents_problems(toc, files)


# --- The pages as built ---------------------------------------------------------------------------

FETCHED = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
}
LINKS_THAT_FETCH = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch"}


def page_problems(html):
    """Assets that a page would fetch from another host, and pictures without a description."""
    soup, problems = BeautifulSoup(html, "html.parser"), []
    for name, attributes in FETCHED.items():
        for element in soup.find_all(name):
            if name == "link" and not LINKS_THAT_FETCH & set(element.get("rel", [])):
                continue
            problems += [
                f"<{name}> asks another host: {element[a]}"
                for a in attributes
                if re.match(r"\s*(https?:)?//", element.get(a, ""))
            ]
    for image in soup.select("article img"):
        if problem := alt_problem(image.get("alt")):
            problems.append(f"the picture {image.get('src', '')[-30:]} {problem}")
    for style in [s.text for s in soup.find_all("style")] + [
        e["style"] for e in soup.select("[style]")
    ]:
        problems += outside_assets(style)
    return problems


@pytest.mark.parametrize(
    "html",
    [
        "<script src='https://cdn.example.org/mathjax.js'></script>",
        "<link rel='stylesheet' href='//cdn.example.org/font.css'>",
        "<link rel='preconnect' href='https://fonts.example.org'>",
        "<article><img alt='A picture that is described well.' src='https://a.example.org/b'></article>",
        "<article><img alt='' src='b.png'></article>",
        "<style>@font-face { src: url(https://a.example.org/f.woff2) }</style>",
        "<p style='background: url(//a.example.org/b)'></p>",
    ],
)
def test_page_rule_finds_a_spoilt_page(html):
    fine = "<link rel='canonical' href='https://a.org'><a href='//a.org'>x</a>"
    assert page_problems(fine) == []
    assert page_problems(fine + html)


def test_built_pages(site):
    built = sorted(site.rglob("*.html"))
    assert len(built) > len(pages())
    found = {p.name: problems for p in built if (problems := page_problems(p.read_text()))}
    assert found == {}


def test_built_style_sheets(site):
    found = {p.name: bad for p in site.rglob("*.css") if (bad := outside_assets(p.read_text()))}
    assert found == {}


def test_mathematics_is_rendered_at_build_time(site):
    """No formula is left as TeX for a script to render, and no script would render it."""
    for page in site.rglob("*.html"):
        soup = BeautifulSoup(page.read_text(), "html.parser")
        assert not [s["src"] for s in soup.select("script[src]") if "mathjax" in s["src"].lower()]
        for formula in soup.select("article .math"):
            assert formula.select_one(".katex"), formula.text


# --- One palette ----------------------------------------------------------------------------------


def palette_problems(css, colors):
    problems = []
    for theme in ("light", "dark"):
        block = re.search(rf'html\[data-theme="{theme}"\] \{{(.*?)\}}', css, re.DOTALL)[1]
        found = dict(re.findall(r"--axis-([nchw]): (#[0-9a-f]{6});", block))
        wanted = {axis.lower(): getattr(shades, theme) for axis, shades in colors.items()}
        if found != wanted:
            problems.append(
                f"{theme}: the style sheet has {found}, bnlib.book.plotting has {wanted}"
            )
    return problems


def test_style_sheet_has_the_palette_of_plotting():
    css = (BOOK / "_static" / "book.css").read_text()
    assert palette_problems(css, AXIS_COLORS) == []
    assert palette_problems(css.replace(AXIS_COLORS["N"].dark, "#123456"), AXIS_COLORS)
