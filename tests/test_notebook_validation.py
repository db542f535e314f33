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
PICTURE = """\
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(4, 3))
ax.plot([1, 2, 3], [1, 4, {height}], "o")
ax.set(xlim=(0, 4), ylim=(0, 12))
plt.show()"""


def tool(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def write_outputs(notebook: Path) -> None:
    done = tool(ROOT / "tools" / "run_notebooks.py", notebook, cwd=notebook.parent)
    assert done.returncode == 0, done.stderr


def validate(folder: Path) -> subprocess.CompletedProcess[str]:
    return tool("-m", "pytest", "--nbval", "-p", "no:cacheprovider", "-c", "/dev/null", cwd=folder)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the book's: the real conftest.py and one executed notebook."""
    folder = tmp_path_factory.mktemp("a book")
    shutil.copy(ROOT / "book" / "conftest.py", folder)
    cells = [nbformat.v4.new_code_cell(s) for s in (NUMBER, PICTURE.format(height=9))]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "chapter.ipynb")
    write_outputs(folder / "chapter.ipynb")
    return folder


@pytest.fixture
def book(executed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(executed, tmp_path / "copy"))


def test_unchanged_notebook_passes(book):
    done = validate(book)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_changed_digit_fails(book):
    path = book / "chapter.ipynb"
    nb = nbformat.read(path, as_version=4)
    assert nb.cells[0].outputs[0].text == "45\n"
    nb.cells[0].outputs[0].text = "46\n"
    nbformat.write(nb, path)
    done = validate(book)
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout


def redraw(cell: nbformat.NotebookNode) -> None:
    """Move one marker by less than its own width: what runs draws another picture."""
    assert "4, 9]" in cell.source
    cell.source = cell.source.replace("4, 9]", "4, 9.3]")


def crop(cell: nbformat.NotebookNode) -> None:
    stored = cell.outputs[0].data
    picture = Image.open(io.BytesIO(base64.b64decode(stored["image/png"])))
    buffer = io.BytesIO()
    picture.crop((0, 0, picture.width - 1, picture.height)).save(buffer, "png")
    stored["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def remove(cell: nbformat.NotebookNode) -> None:
    del cell.outputs[0].data["image/png"]


@pytest.mark.parametrize(
    ("doctor", "message"),
    [
        (redraw, "of the pixels differ by more than"),
        (crop, "the stored picture has (height, width)"),
        (remove, "0 pictures are stored, 1 were drawn"),
    ],
)
def test_changed_picture_fails(book, doctor, message):
    path = book / "chapter.ipynb"
    nb = nbformat.read(path, as_version=4)
    doctor(nb.cells[1])
    nbformat.write(nb, path)
    done = validate(book)
    assert done.returncode == 1, done.stdout
    assert message in done.stdout


def test_second_execution_is_byte_identical(book):
    path = book / "chapter.ipynb"
    before = path.read_bytes()
    write_outputs(path)
    assert path.read_bytes() == before


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


def test_without_triton_a_notebook_that_imports_it_is_skipped_and_the_rest_passes(book):
    sources = ["try:\n    import triton\nexcept ImportError:\n    pass", "1 / 0"]
    cells = [nbformat.v4.new_code_cell(source, execution_count=1) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), book / "kernels.ipynb")
    said = validate_without_triton("-c", "/dev/null", cwd=book)
    assert "2 passed, 2 skipped" in said
    assert "needs triton, which has no package for this platform" in said


def test_without_triton_the_gpu_chapter_is_skipped():
    said = validate_without_triton("book/scale/gpu.ipynb", cwd=ROOT)
    assert "needs triton" in said
    assert re.search(r"= \d+ skipped in", said), said
