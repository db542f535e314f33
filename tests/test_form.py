"""The form of a chapter: book/template.ipynb shows it, and every chapter has it.

Each rule is a function from a notebook to a list of problems. It finds none in the template, and
some in a copy of the template that was spoilt on purpose.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from test_book import SVG, draws, prose, replace

BOOK = Path(__file__).resolve().parent.parent / "book"
TEMPLATE = nbformat.read(BOOK / "template.ipynb", as_version=4)
CHAPTERS = [
    path for path in sorted(BOOK.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts
]
EXAMPLES = {"sick-model"}  # pages that run as a chapter does, and show without proving
SECTIONS = [
    "The question",
    "In one picture",
    "Derivation",
    "Code",
    "The check against PyTorch",
    "The experiment",
    "Check yourself",
    "Exercises",
    "Summary",
    "Further reading",
]
OPTIONAL = {"The experiment"}  # where nothing empirical is claimed
BOX = ["**The question:**", "**You will be able to**", "**You need**"]
LONGEST = 74  # characters in a line of code: what fits beside the contents list
SCRATCH = 20  # lines
# A page of 375 pixels shows a figure of 4.6 inches with words of 10 points at 11 pixels and more.
WIDEST, SMALLEST = 72 * 4.75, 9.5  # points
LARGEST = 160_000  # bytes of one figure


def box(nb):
    """The title, and under it one box: the question, what it is good for, what it needs."""
    head = nb.cells[0].source
    inside = re.search(r":::\{admonition\}[^\n]*\n:class: chapter-box\n(.*?)\n:::", head, re.DOTALL)
    if not re.match(r"# \S", head) or inside is None:
        return ["expected the title and a box of the class chapter-box in the first cell"]
    found = [part for part in BOX if part in inside[1]]
    titles = re.findall(r"^# .+", prose(nb), re.MULTILINE)
    problems = [] if found == BOX else [f"expected {BOX} in the box, got {found}"]
    return problems if len(titles) == 1 else [*problems, f"expected one title, got {titles}"]


def sections(nb):
    found = [h for h in re.findall(r"^## +(.+?) *$", prose(nb), re.MULTILINE)]
    wanted = [s for s in SECTIONS if s in found or s not in OPTIONAL]
    return [] if found == wanted else [f"expected the sections {wanted}, got {found}"]


def early_picture(nb):
    """The first figure, or figure to touch, comes within the first fifth of what is read."""
    folded = [cell for cell in nb.cells if "hide-input" in cell.metadata.get("tags", [])]
    total = sum(len(cell.source) for cell in nb.cells if cell not in folded)
    read = 0
    for cell in nb.cells:
        if draws(cell) or (cell.cell_type == "code" and "axis_explorer(" in cell.source):
            return [] if read <= total / 5 else [f"the first picture comes at {read / total:.0%}"]
        read += 0 if cell in folded else len(cell.source)
    return ["expected a picture, got none"]


def folded_drawings(nb):
    return [
        f"{cell.id} draws, and its code is not folded (the tag hide-input)"
        for cell in nb.cells
        if draws(cell) and "hide-input" not in cell.metadata.get("tags", [])
    ]


def short_lines(nb):
    return [
        f"{cell.id}: expected lines of at most {LONGEST} characters, got {len(line)}: {line}"
        for cell in nb.cells
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
        if len(line) > LONGEST
    ]


def from_scratch(nb):
    """The first code of the section Code is short enough to be read at a glance."""
    section = None
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            section = (re.findall(r"^## +(.+?) *$", cell.source, re.MULTILINE) or [section])[-1]
        elif section == "Code":
            lines = [line for line in cell.source.splitlines() if line.strip()]
            return [] if len(lines) <= SCRATCH else [f"{cell.id} has {len(lines)} lines"]
    return ["expected code in the section Code, got none"]


def figures_for_a_phone(nb):
    problems = []
    for cell in filter(draws, nb.cells):
        for svg in (output.data[SVG] for output in cell.outputs if SVG in output.get("data", {})):
            width = float(re.search(r'<svg\b[^>]*?\bwidth="([\d.]+)pt"', svg)[1])
            words = [100 * float(scale) for scale in re.findall(r"\bscale\(([\d.]+) -", svg)]
            found = [
                (width <= WIDEST, f"{width / 72:.2f} inches wide"),
                (min(words, default=SMALLEST) >= SMALLEST, f"{min(words, default=0):.1f} points"),
                (len(svg) <= LARGEST, f"{len(svg)} bytes"),
            ]
            problems += [f"the figure of {cell.id}: {what}" for right, what in found if not right]
    return problems


RULES = [
    box,
    sections,
    early_picture,
    folded_drawings,
    short_lines,
    from_scratch,
    figures_for_a_phone,
]


OF_A_CHAPTER = (box, sections, early_picture, from_scratch)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_chapter(rule, path):
    if path.stem not in EXAMPLES or rule not in OF_A_CHAPTER:
        assert rule(nbformat.read(path, as_version=4)) == []


def swap_sections(nb):
    at = [i for i, cell in enumerate(nb.cells) if cell.source.startswith("## ")]
    nb.cells[at[0]], nb.cells[at[2]] = nb.cells[at[2]], nb.cells[at[0]]


def long_preface(nb):
    nb.cells[1].source += "words " * 1000


def unfold(nb):
    for cell in nb.cells:
        cell.metadata.pop("tags", None)


def change_figure(old, new):
    def spoil(nb):
        (cell,) = filter(draws, nb.cells)
        (data,) = (output.data for output in cell.outputs if SVG in output.get("data", {}))
        assert re.search(old, data[SVG])
        data[SVG] = re.sub(old, new, data[SVG])

    return spoil


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        (box, replace("# The title", "The title")),
        (box, replace(":class: chapter-box", ":class: note")),
        (box, replace("**You need**", "**Needed:**")),
        (box, replace("## Summary", "# Summary")),
        (sections, swap_sections),
        (sections, replace("## Derivation", "## Proof")),
        (sections, replace("## Code", "## Code\n\n## More code")),
        (early_picture, long_preface),
        (early_picture, lambda nb: [cell.pop("outputs", None) for cell in nb.cells]),
        (folded_drawings, unfold),
        (short_lines, replace("print(", "print(" + "'a long line of numbers'" * 3 + ", ")),
        (from_scratch, replace("batch = images[:64]", "x = 1\n" * 20)),
        (from_scratch, replace("## Code", "### Code")),
        (figures_for_a_phone, change_figure(r'width="[\d.]+pt"', 'width="500pt"')),
        (figures_for_a_phone, change_figure(r"scale\(0\.1 -0\.1\)", "scale(0.08 -0.08)")),
        (figures_for_a_phone, change_figure("</svg>", " " * LARGEST)),
    ],
)
def test_rule_finds_a_spoilt_chapter(rule, spoil):
    spoilt = copy.deepcopy(TEMPLATE)
    spoil(spoilt)
    assert rule(spoilt)


def test_the_experiment_may_be_absent():
    nb = copy.deepcopy(TEMPLATE)
    replace("## The experiment\n", "")(nb)
    assert sections(nb) == []
