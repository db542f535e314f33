"""Copy the axis block from the first chapter to the front page's picture.

    python tools/front_picture.py

The picture is the stored output of the cell whose figure is named ``fig-axis-block``; a test
compares the two files' bytes.
"""

from __future__ import annotations

import base64
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "book" / "axes" / "which-axes.ipynb"
PICTURE = ROOT / "book" / "_static" / "axis-block.png"


def stored_figure(notebook: Path, name: str) -> bytes:
    """The PNG that the notebook stores for the figure with this name."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == name:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output["data"]["image/png"])
    raise ValueError(f"expected a figure named {name!r} with a stored picture in {notebook.name}")


if __name__ == "__main__":
    PICTURE.write_bytes(stored_figure(CHAPTER, "fig-axis-block"))
    print(f"wrote {PICTURE.relative_to(ROOT)}")
