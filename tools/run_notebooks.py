"""Execute notebooks in place: the one way in which a stored output gets written.

    python tools/run_notebooks.py [NOTEBOOK ...]     # without arguments: every notebook of the book

A cell keeps its stored outputs where the tests accept the new ones in their place: another
processor's last bits in a picture change no file. A notebook in which a cell fails is not written
at all.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent

# Thread counts change the last bits of a sum, the hash seed the order of a set.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE_INFO = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}

CELL_METADATA_TO_DROP = ("execution", "ExecuteTime", "collapsed", "jp-MarkdownHeadingCollapsed")
SECONDS_PER_CELL = 120


def clean(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove from a notebook everything that may differ between two equal runs."""
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": LANGUAGE_INFO})
    taken: set[str] = set()
    for position, cell in enumerate(nb.cells):
        for key in CELL_METADATA_TO_DROP:
            cell.metadata.pop(key, None)
        cell.id = stable_id(cell.get("id"), position, taken)
        taken.add(cell.id)
        cell.source = "\n".join(line.rstrip() for line in cell.source.splitlines())
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
    return nb


def stable_id(old: str | None, position: int, taken: set[str]) -> str:
    """Keep an id that somebody chose; replace a random or repeated one by the cell's position."""
    random_looking = old is None or re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]{27})?", old)
    if not random_looking and old not in taken:
        return old
    number = position
    while (candidate := f"cell-{number:03d}") in taken:
        number += 1000
    return candidate


def merge_streams(outputs: list) -> list:
    """Join consecutive pieces of one stream: where the kernel cuts them is a matter of timing."""
    merged: list = []
    for output in outputs:
        last = merged[-1] if merged else None
        if (
            last is not None
            and output.output_type == "stream" == last.output_type
            and output.name == last.name
        ):
            last.text += output.text
        else:
            merged.append(output)
    return merged


class CellFailed(Exception):
    """A cell raised, ran too long or killed its kernel."""


def execute(path: Path) -> nbformat.NotebookNode:
    """Run one notebook in its own folder, in a fresh kernel; raise CellFailed if it breaks."""
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        nb,
        timeout=SECONDS_PER_CELL,
        kernel_name=KERNELSPEC["name"],
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # no remark about transport encryption
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise CellFailed(f"{path}: {failing_cell(nb)} failed:\n{error}") from error
    return nb


def failing_cell(nb: nbformat.NotebookNode) -> str:
    """Name the last code cell that was started."""
    started = [
        (position, cell)
        for position, cell in enumerate(nb.cells)
        if cell.cell_type == "code" and (cell.execution_count or cell.outputs)
    ]
    if not started:
        return "the first code cell"
    position, cell = started[-1]
    return f"cell {position} ({cell.get('id')}), In [{cell.execution_count}],"


def keep_what_agrees(nb: nbformat.NotebookNode, stored: nbformat.NotebookNode) -> None:
    """Put back the stored outputs of each cell for which the tests, too, see no difference."""
    spec = importlib.util.spec_from_file_location("comparison", ROOT / "book" / "conftest.py")
    comparison = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(comparison)
    for new, old in zip(nb.cells, stored.cells, strict=True):
        if new.cell_type == "code" and comparison.agree(old.outputs, new.outputs):
            new.outputs = old.outputs
            for output in new.outputs:
                if "execution_count" in output:
                    output.execution_count = new.execution_count


def run(path: Path, label: str) -> bool:
    """Execute one notebook and store its outputs if they changed; False if a cell failed."""
    print(f"{label} ", end="", flush=True)
    start = time.perf_counter()
    try:
        nb = execute(path)
    except CellFailed as error:
        print("FAILED, not written", flush=True)
        print(error, file=sys.stderr)
        return False
    seconds = time.perf_counter() - start
    before = path.read_text(encoding="utf-8")
    keep_what_agrees(clean(nb), nbformat.reads(before, as_version=4))
    text = nbformat.writes(nb) + "\n"
    changed = text != before
    if changed:
        path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{seconds:.1f} s, {'written' if changed else 'unchanged'}", flush=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all under book/")
    chosen = parser.parse_args(arguments).notebooks or sorted(
        path for path in (ROOT / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
    )
    for path in chosen:
        if path.suffix != ".ipynb" or not path.is_file():
            parser.error(f"expected a notebook (an existing .ipynb file), got {path}")

    os.environ.update(ENVIRONMENT)
    os.environ.pop("MPLBACKEND", None)  # the kernel then chooses the inline backend
    passed = [
        run(path.resolve(), f"[{number}/{len(chosen)}] {path.name}")
        for number, path in enumerate(chosen, 1)
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
