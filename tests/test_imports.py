"""Who may import whom in bnlib, what importing it costs, and which names it promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnlib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bnlib"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each module may import from bnlib at its top level. `functional` imports the kernels and
# `distributed` inside its functions, because they need what may not be installed.
MAY_IMPORT = {
    "__init__": {"axes", "statistics", "reference"},
    "axes": set(),
    "statistics": {"axes"},
    "reference": {"axes", "statistics"},
    "functional": {"axes", "statistics", "reference", "kernels"},
    "nn": {"axes", "statistics", "reference", "functional"},
    "kernels.__init__": set(),
    "kernels.lanes": set(),
    "kernels.cpu": {"axes", "statistics", "kernels", "kernels.lanes"},
    "kernels.gpu": {"axes", "statistics", "kernels"},
    "distributed": {"axes", "statistics"},
    "fold.__init__": {"fold.methods", "fold.pair", "fold.traces"},
    "fold.pair": set(),
    "fold.methods": {"fold.pair"},
    "fold.traces": {"fold.methods", "fold.pair"},
    "book.datasets": set(),
    "book.__init__": set(),
    "book.colors": set(),
    "book.explorer": {"axes", "statistics", "book.colors"},
    "book.plotting": {"axes", "statistics", "book.colors"},
}
MAY_IMPORT_LATER = {
    "functional": {"kernels.cpu", "kernels.gpu", "distributed"},
    "nn": {"distributed"},
}
# Outside packages with a price, and the only modules that may import them.
ONLY_IN = {
    "triton": {"kernels.gpu"},
    "numba": {"kernels.cpu", "kernels.lanes"},
    "matplotlib": {"book.plotting"},
    "sklearn": {"book.datasets"},
    "skimage": {"book.datasets"},
    "PIL": {"book.datasets", "book.plotting"},
    "torch": {
        "functional",
        "nn",
        "kernels.__init__",
        "kernels.cpu",
        "kernels.gpu",
        "distributed",
        "fold.__init__",
        "fold.pair",
        "fold.methods",
        "fold.traces",
    },
}
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
    "update_running_stats",
}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(tree):
    """All (dotted name, at top level?) that a module imports, type checking included."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: write `from bnlib...`"
            names = [node.module]
            if node.module in ("bnlib", "bnlib.kernels"):
                folder = PACKAGE.parent / node.module.replace(".", "/")
                inside = [a.name for a in node.names if (folder / f"{a.name}.py").exists()]
                names = [f"{node.module}.{name}" for name in inside]
                if len(inside) < len(node.names):
                    names.append(node.module)
        else:
            continue
        for name in names:
            yield name, id(node) in top


def import_problems(source, name):
    if name not in MAY_IMPORT:
        return [f"bnlib.{name} is not in the table of this test: say what it may import"]
    problems = []
    for target, at_top in imported(ast.parse(source)):
        first, _, rest = target.partition(".")
        if first == "bnlib":
            allowed = MAY_IMPORT[name] | (set() if at_top else MAY_IMPORT_LATER.get(name, set()))
            if rest not in allowed:
                problems.append(f"bnlib.{name} may not import {target}")
        elif name not in ONLY_IN.get(first, {name}):
            problems.append(f"bnlib.{name} may not import {target}")
    return problems


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports(path):
    assert import_problems(path.read_text(), module_name(path)) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("axes", "from bnlib.statistics import merge"),
        ("axes", "from bnlib import statistics"),
        ("statistics", "import torch"),
        ("reference", "def f():\n    import torch"),
        ("reference", "import matplotlib.pyplot as plt"),
        ("fold.pair", "import bnlib.reference"),
        ("functional", "from bnlib.kernels import gpu"),
        ("functional", "from triton import language"),
        ("nn", "from bnlib.book.plotting import use_style"),
        ("newcomer", ""),
    ],
)
def test_import_rule_can_fail(name, source):
    assert import_problems(source, name)


def test_import_rule_allows_the_kernels_inside_a_function():
    assert import_problems("def f():\n    from bnlib.kernels import gpu", "functional") == []


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
