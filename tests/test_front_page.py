"""The code of the pages that are not notebooks prints what its comments say."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = [
    pytest.param(block, id=f"{name}-{i}")
    for name in ("intro.md", "short-answer.md")
    for i, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / "book" / name).read_text("utf-8"), re.M | re.S)
    )
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_its_comments(example):
    promised = re.findall(r"^print\(.*\)\n# (.*)$", example, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(example, "example", "exec"), {})
    assert promised and out.getvalue().splitlines() == promised


def test_there_are_examples():
    assert len(EXAMPLES) == 3


def test_the_book_is_drawn_by_its_tool():
    spec = importlib.util.spec_from_file_location("identity", ROOT / "tools" / "identity.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    hint = "run: python tools/identity.py"
    assert tool.MARK.read_text(encoding="utf-8") == tool.mark_svg(), hint
    for path, draw, size in (
        (tool.CARD, tool.draw_card, (1200, 630)),
        (tool.COVER, tool.draw_cover, (1200, 1600)),
    ):
        with Image.open(path) as stored:
            assert stored.size == size
            assert ImageChops.difference(stored, draw()).getbbox() is None, hint
        assert path.stat().st_size < 100_000
