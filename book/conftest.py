"""What nbval leaves out: pictures are compared, and a chapter that cannot run here is skipped.

The pictures come from the same execution as the text. matplotlib ships its own rasteriser and
fonts, so an unchanged figure gives the same pixels up to a last-bit difference between two CPUs,
which moves the shade of a few pixels on an edge. A marker that moves changes more than that.

Triton has packages for Linux only. Without it the notebooks that import it are skipped.
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

SHADE = 8  # of 255: a smaller difference in a pixel is rounding
SHARE = 1e-4  # of all pixels may differ by more than SHADE: 30 pixels of a 640 x 480 figure
RASTER_TYPES = ("image/png", "image/jpeg")


def pictures(outputs: list) -> list[bytes]:
    """The pictures among the outputs of a cell, in order."""
    return [
        base64.b64decode(output["data"][kind])
        for output in outputs
        if "data" in output
        for kind in RASTER_TYPES
        if kind in output["data"]
    ]


def difference(stored: bytes, new: bytes) -> str | None:
    """How two pictures differ beyond the tolerance, or None."""
    a, b = (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), dtype=np.int16)
        for data in (stored, new)
    )
    if a.shape != b.shape:
        return f"the stored picture has (height, width) {a.shape[:2]}, the new one {b.shape[:2]}"
    share = float((np.abs(a - b).max(axis=-1) > SHADE).mean())
    if share > SHARE:
        return f"{share:.3%} of the pixels differ by more than {SHADE}/255, allowed is {SHARE:.3%}"
    return None


def compare_pictures(stored: list[bytes], new: list[bytes]) -> str | None:
    """How two lists of pictures differ, or None."""
    if len(stored) != len(new):
        return f"{len(stored)} pictures are stored, {len(new)} were drawn"
    return next((d for pair in zip(stored, new, strict=True) if (d := difference(*pair))), None)


# Of an output nbval compares all but this; the pictures come after it.
SKIP = ("output_type", "name", "execution_count", "metadata", "traceback", *RASTER_TYPES)
_compare_text = IPyNbCell.compare_outputs


def compare_outputs(self: IPyNbCell, test: list, ref: list, skip_compare=SKIP) -> bool:
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

    def format_output_compare(self, key: str, left: str, right: str) -> None:
        pass


def agree(stored: list, new: list) -> bool:
    """Whether the tests would accept `new` where `stored` is in the notebook."""
    ref, test = map(coalesce_streams, copy.deepcopy((stored, new)))
    return object.__new__(Outputs).compare_outputs(test, ref)


_IMPORTS_TRITON = re.compile(r"^\s*(import|from) triton\b", re.MULTILINE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("triton") is not None:
        return
    skip = pytest.mark.skip(reason="needs triton, which has no package for this platform")
    notebooks = {item.parent for item in items if isinstance(item, IPyNbCell)}
    for notebook in notebooks:
        code = [cell.source for cell in notebook.nb.cells if cell.cell_type == "code"]
        if any(map(_IMPORTS_TRITON.search, code)):
            notebook.add_marker(skip)
