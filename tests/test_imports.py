"""Who may import whom in bnlib, what importing it costs, and which names it promises."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest

import bnlib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bnlib"
MODULES = sorted(PACKAGE.rglob("*.py"))

PUBLIC = {
    "Cache",
    "Grads",
    "Moments",
    "batch_norm_backward",
    "batch_norm_forward",
    "merge",
    "moments",
    "per_channel",
    "reduction_axes",
    "split_groups",
    "standardize",
    "update_running_stats",
}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


# --- Who may import whom: pyproject.toml says it, import-linter and ruff check it -----------------


def floors(folder):
    """What import-linter says of the package in a folder, and whether it passes."""
    program = "from importlinter.cli import lint_imports_command as main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    return done.returncode == 0, done.stdout + done.stderr


def test_every_module_knows_only_those_below_it(tmp_path):
    assert floors(ROOT) == (True, ANY)
    shutil.copytree(PACKAGE, tmp_path / "bnlib")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module, line in (
        ("axes", "from bnlib.statistics import merge"),
        ("reference", "def f():\n    import torch"),
        ("functional", "from bnlib.book.plotting import use_style"),
        ("kernels/base", "from bnlib.kernels import cpu"),
    ):
        path = tmp_path / "bnlib" / f"{module}.py"
        source = path.read_text()
        path.write_text(f"{source}\n{line}\n")
        passes, said = floors(tmp_path)
        path.write_text(source)
        assert not passes and "BROKEN" in said, said
    (tmp_path / "bnlib" / "kernels" / "newcomer.py").touch()
    assert "newcomer" in floors(tmp_path)[1]


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("bnlib/functional.py", "from triton import language", False),
        ("bnlib/kernels/cpu/launch.py", "import numba", True),
        ("bnlib/nn.py", "def f():\n    import matplotlib.pyplot", False),
        ("bnlib/axes.py", "from .statistics import merge", False),
        ("tests/test_axes.py", "import numba", True),
    ],
)
def test_dear_packages_have_one_place(module, line, allowed):
    arguments = ["check", "--select", "TID", "--stdin-filename", module, "-"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments], cwd=ROOT, input=f"{line}\n", text=True
    )
    assert (done.returncode == 0) is allowed


# --- Only axes.py writes axes or broadcasting shapes by hand --------------------------------------


def unquoted(source):
    """A module's code without its docstrings and comments, which may show examples."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                value.value = ""
    return ast.unparse(tree)


BY_HAND = re.compile(
    r"\(0, 2, 3\)|\[0, 2, 3\]|\[None, :, None"
    r"|(view|reshape)\(\(?1, -1, 1|(view|reshape)\([\w.]+, \(1, -1, 1"
)


def by_hand(source):
    return [match[0] for match in BY_HAND.finditer(unquoted(source))]


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "axes"], ids=module_name)
def test_axes_are_written_in_one_place(path):
    assert by_hand(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "m = x.mean((0,2,3))",
        "m = x.mean(dim=[0, 2, 3])",
        "y = v[None, :, None, None]",
        "y = v.view(1, -1, 1, 1)",
        "y = v.reshape((1, -1, 1))",
        "y = xp.reshape(v, (1, -1, 1, 1))",
    ],
)
def test_axes_by_hand_are_found(source):
    assert by_hand(source)
    assert by_hand(f'def f():\n    """{source}"""\n    # {source}\n') == []


def test_no_module_is_hidden_by_a_function_of_its_name():
    program = (
        "import bnlib, importlib, pkgutil, sys\n"
        "for found in pkgutil.walk_packages(bnlib.__path__, 'bnlib.'):\n"
        "    try:\n"
        "        module = importlib.import_module(found.name)\n"
        "    except ImportError:  # no Triton for this platform\n"
        "        continue\n"
        "    folder, _, name = found.name.rpartition('.')\n"
        "    assert getattr(sys.modules[folder], name) is module, found.name\n"
        "print(found.name)"
    )
    assert python(program) == "bnlib.statistics"  # the last of them


# --- The public names -----------------------------------------------------------------------------


def test_public_names():
    assert set(bnlib.__all__) == PUBLIC
    assert all(hasattr(bnlib, name) for name in PUBLIC)
    assert list(bnlib.__all__) == sorted(bnlib.__all__)


def test_public_functions_are_documented():
    """One sentence, then what goes in, what comes out, where it is from."""
    for name in PUBLIC:
        item = getattr(bnlib, name)
        assert item.__doc__, name
        assert not item.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"
        if not isinstance(item, type):
            for part in ("Args:", "Returns:", "Raises:"):
                assert part in item.__doc__, f"{name} lacks {part}"


# --- What `import bnlib` costs --------------------------------------------------------------------


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


HEAVY = ("torch", "matplotlib", "numba", "triton", "sklearn", "skimage", "scipy", "jax", "PIL")
LOADED = f"; import sys; print([m for m in {HEAVY} if m in sys.modules])"


def test_import_loads_nothing_heavy():
    assert python("import bnlib" + LOADED) == "[]"
    assert python("import numpy, PIL" + LOADED) == "['PIL']"  # the check can fail


SECONDS = "import time, numpy; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def test_import_takes_a_third_of_a_second_at_most():
    """Beyond NumPy; the least of three, since a busy machine only adds."""
    assert min(float(python(SECONDS.format("import bnlib"))) for _ in range(3)) < 0.3
    assert float(python(SECONDS.format("time.sleep(0.31)"))) > 0.3  # the check can fail
