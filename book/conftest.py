"""What nbval leaves out: pictures are compared, and a chapter that cannot
run here is skipped.

A figure is SVG, which matplotlib writes with fonts of its own: unchanged,
it is the same file up to a last-bit difference between two CPUs.

Triton has packages for Linux only. Without it the notebooks that import
it are skipped.
"""

from __future__ import annotations

import base64
import copy
import importlib.util
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from nbval.plugin import IPyNbCell, coalesce_streams, nocolors
from PIL import Image

SVG = "image/svg+xml"
POINTS = 0.05  # by which a line or a word may move: rounding
SHADE = 8  # of 255: by which a pixel of a photograph may differ


def pictures(outputs: list) -> list[str]:
    """The pictures among the outputs of a cell, in order."""
    return [o["data"][SVG] for o in outputs if SVG in o.get("data", {})]


_RASTER = re.compile(r'"data:image/png;base64,\s*([^"]*)"')
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def parts(svg: str) -> tuple[list[str], list[float], list[np.ndarray]]:
    """A figure as words, numbers and photographs.

    Names are made from numbers: they are counted instead.
    """
    for i, name in enumerate(
        dict.fromkeys(re.findall(r'\bid="([^"]+)"', svg))
    ):
        svg = re.sub(
            rf'(\bid="|#){re.escape(name)}(?=["\)])',
            rf"\g<1>name{i}",
            svg,
        )
    photographs = [
        np.asarray(
            Image.open(io.BytesIO(base64.b64decode(data))).convert(
                "RGBA"
            ),
            dtype=np.int16,
        )
        for data in _RASTER.findall(svg)
    ]
    svg = _RASTER.sub("", svg)
    return (
        _NUMBER.split(svg),
        [float(n) for n in _NUMBER.findall(svg)],
        photographs,
    )


def difference(stored: str, new: str) -> str | None:
    """How two figures differ beyond the tolerance, or None."""
    (
        (words, numbers, photographs),
        (new_words, new_numbers, new_photographs),
    ) = (parts(svg) for svg in (stored, new))
    if words != new_words:
        return (
            "other elements, colours or words than in the stored figure"
        )
    moved = max(
        (abs(a - b) for a, b in zip(numbers, new_numbers, strict=True)),
        default=0,
    )
    if moved > POINTS:
        return (
            f"something moved by {moved:.3g} points, allowed is {POINTS}"
        )
    for a, b in zip(photographs, new_photographs, strict=True):
        if a.shape != b.shape:
            return f"a photograph of shape {b.shape}, stored is {a.shape}"
        if (apart := np.abs(a - b).max()) > SHADE:
            return f"a photograph differs by {apart} of 255, not {SHADE}"
    return None


def compare_pictures(stored: list[str], new: list[str]) -> str | None:
    """How two lists of figures differ, or None."""
    if len(stored) != len(new):
        return f"{len(stored)} pictures are stored, {len(new)} were drawn"
    return next(
        (
            d
            for pair in zip(stored, new, strict=True)
            if (d := difference(*pair))
        ),
        None,
    )


# Of an output nbval compares all but this; the pictures come after it.
SKIP = (
    "output_type",
    "name",
    "execution_count",
    "metadata",
    "traceback",
    SVG,
)
_compare_text = IPyNbCell.compare_outputs


def compare_outputs(
    self: IPyNbCell, test: list, ref: list, skip_compare=SKIP
) -> bool:
    if not _compare_text(self, test, ref, skip_compare):
        return False
    problem = compare_pictures(pictures(ref), pictures(test))
    if problem:
        self.comparison_traceback.append(problem)
    return problem is None


IPyNbCell.compare_outputs = compare_outputs


class Outputs(IPyNbCell):
    """What the comparison needs of a cell, where no test runs."""

    parent = SimpleNamespace(sanitize_patterns={})
    colors = nocolors

    def format_output_compare(
        self, key: str, left: str, right: str
    ) -> None:
        pass


def agree(stored: list, new: list) -> bool:
    """Whether the tests accept `new` in the place of `stored`."""
    ref, test = map(coalesce_streams, copy.deepcopy((stored, new)))
    return object.__new__(Outputs).compare_outputs(test, ref)


_IMPORTS_TRITON = re.compile(r"^\s*(import|from) triton\b", re.MULTILINE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("triton") is not None:
        return
    skip = pytest.mark.skip(
        reason="needs triton, which has no package for this platform"
    )
    notebooks = {
        item.parent for item in items if isinstance(item, IPyNbCell)
    }
    for notebook in notebooks:
        code = [
            cell.source
            for cell in notebook.nb.cells
            if cell.cell_type == "code"
        ]
        if any(map(_IMPORTS_TRITON.search, code)):
            notebook.add_marker(skip)
