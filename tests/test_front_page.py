"""The front page shows the first chapter's picture, and its example prints what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_picture_is_the_one_stored_in_the_chapter():
    path = ROOT / "tools" / "front_picture.py"
    spec = importlib.util.spec_from_file_location("front_picture", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    stored = tool.stored_figure(tool.CHAPTER, "fig-axis-block")
    assert tool.PICTURE.read_bytes() == stored, "run: python tools/front_picture.py"
    with pytest.raises(ValueError, match="'fig-none'"):
        tool.stored_figure(tool.CHAPTER, "fig-none")


def test_the_example_prints_its_comments():
    text = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    (example,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if "import bnlib" in block
    ]
    promised = re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(example, "intro.md", "exec"), {})
    assert len(promised) >= 3
    assert out.getvalue().splitlines() == promised
