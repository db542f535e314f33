"""nbval, as the book uses it, fails when a stored number or a stored picture is not what runs."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NUMBER = "total = sum(range(10))\nprint(total)"
VALIDATE = ("--nbval", "-p", "no:cacheprovider", "-c", "/dev/null")
PICTURE = """\
import matplotlib.pyplot as plt
from bnlib.book.plotting import use_style
use_style()
fig, (ax, photograph) = plt.subplots(1, 2, figsize=(4, 3))
photograph.imshow([[0, 1]], interpolation="none")
ax.plot([1, 2, 3], [1, 4, 9], "o")
ax.set(xlim=(0, 4), ylim=(0, 12))
plt.show()"""


def tool(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def write_outputs(notebook: Path) -> None:
    done = tool(ROOT / "tools" / "run_notebooks.py", notebook, cwd=notebook.parent)
    assert done.returncode == 0, done.stderr


def redraw(cell: nbformat.NotebookNode) -> None:
    """Move one marker by less than its own width: what runs draws another picture."""
    assert "4, 9]" in cell.source
    cell.source = cell.source.replace("4, 9]", "4, 9.3]")


def change(cell: nbformat.NotebookNode, old: str, new: str) -> None:
    stored = cell.outputs[0].data
    assert re.search(old, stored["image/svg+xml"])
    stored["image/svg+xml"] = re.sub(old, new, stored["image/svg+xml"])


def recolour(cell: nbformat.NotebookNode) -> None:
    change(cell, "#0059b3", "#0059c3")


def nudge(cell: nbformat.NotebookNode) -> None:
    """A last bit more, and other names, as on another processor."""
    change(cell, r'(?<=<use xlink:href="#)m(\w+" x="\d+\.\d+)', r"n\g<1>1")
    change(cell, r'(?<=<path id=")m(?=\w)', "n")


def repaint(cell: nbformat.NotebookNode) -> None:
    def darker(found: re.Match[str]) -> str:
        buffer = io.BytesIO()
        Image.new("RGBA", Image.open(io.BytesIO(base64.b64decode(found[1]))).size).save(
            buffer, "png"
        )
        return f'"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"'

    change(cell, r'"data:image/png;base64,\s*([^"]*)"', darker)


def remove(cell: nbformat.NotebookNode) -> None:
    del cell.outputs[0].data["image/svg+xml"]


def miscount(cell: nbformat.NotebookNode) -> None:
    assert cell.outputs[0].text == "45\n"
    cell.outputs[0].text = "46\n"


DOCTORS = [
    (NUMBER, None, None),
    (PICTURE, None, None),
    (PICTURE, nudge, None),
    (NUMBER, miscount, "46"),
    (PICTURE, redraw, "something moved by"),
    (PICTURE, recolour, "other elements, colours or words"),
    (PICTURE, repaint, "a photograph differs by"),
    (PICTURE, remove, "0 pictures are stored, 1 were drawn"),
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the book's: the real conftest.py and one executed notebook."""
    folder = tmp_path_factory.mktemp("a book")
    shutil.copy(ROOT / "book" / "conftest.py", folder)
    cells = [nbformat.v4.new_code_cell(source) for source, _, _ in DOCTORS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "chapter.ipynb")
    write_outputs(folder / "chapter.ipynb")
    return folder


@pytest.fixture(scope="module")
def doctored(executed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, where some cells no longer hold what runs."""
    book = Path(shutil.copytree(executed, tmp_path_factory.mktemp("doctored") / "copy"))
    nb = nbformat.read(book / "chapter.ipynb", as_version=4)
    for cell, (_, doctor, _) in zip(nb.cells, DOCTORS, strict=True):
        if doctor:
            doctor(cell)
    nbformat.write(nb, book / "chapter.ipynb")
    return book


def test_what_changed_fails_and_says_why(doctored):
    done = tool("-m", "pytest", "-vv", *VALIDATE, cwd=doctored)
    assert done.returncode == 1
    for number, (_, _, message) in enumerate(DOCTORS):
        verdict = "PASSED" if message is None else "FAILED"
        assert f"ipynb::Cell {number} {verdict}" in done.stdout
        assert message is None or message in done.stdout


def test_execution_writes_what_the_tests_do_not_accept_and_nothing_else(executed, doctored):
    before, path = executed / "chapter.ipynb", doctored / "chapter.ipynb"
    expected, found = (nbformat.read(file, as_version=4) for file in (before, path))
    kept = [2, 4]  # the last bits; the redrawn figure, whose source is another
    for number in kept:
        expected.cells[number] = found.cells[number]
    write_outputs(path)
    found = nbformat.read(path, as_version=4)
    assert found.cells[4].outputs != expected.cells[4].outputs
    found.cells[4] = expected.cells[4]
    assert found == expected
    again = path.read_bytes()
    write_outputs(path)
    assert path.read_bytes() == again


def test_failing_notebook_is_named_and_not_written(tmp_path):
    path = tmp_path / "broken.ipynb"
    cells = [nbformat.v4.new_code_cell(s) for s in ("print(1)", "1 / 0", "print(2)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    done = tool(ROOT / "tools" / "run_notebooks.py", path, cwd=tmp_path)
    assert done.returncode == 1
    assert "broken.ipynb" in done.stderr
    assert "cell 1" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert path.read_bytes() == before


# --- A machine without Triton ---------------------------------------------------------------------


def validate_without_triton(*arguments: str, cwd: Path) -> str:
    options = ["--nbval", "-rs", "-p", "no:cacheprovider", *arguments]
    program = "import pytest, sys; sys.modules['triton'] = None; sys.exit(pytest.main({}))"
    done = tool("-c", program.format(options), cwd=cwd)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_without_triton_a_notebook_that_imports_it_is_skipped_and_the_rest_passes(
    executed, tmp_path
):
    book = Path(shutil.copytree(executed, tmp_path / "copy"))
    sources = ["try:\n    import triton\nexcept ImportError:\n    pass", "1 / 0"]
    cells = [nbformat.v4.new_code_cell(source, execution_count=1) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), book / "kernels.ipynb")
    said = validate_without_triton("-c", "/dev/null", cwd=book)
    assert f"{len(DOCTORS)} passed, 2 skipped" in said
    assert "needs triton, which has no package for this platform" in said


def test_without_triton_the_chapter_on_its_kernels_is_skipped():
    said = validate_without_triton("book/scale/kernels.ipynb", cwd=ROOT)
    assert "needs triton" in said
    assert re.search(r"= \d+ skipped in", said), said
