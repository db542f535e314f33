"""The files around the book: workflows, citation, README, requirements."""

from __future__ import annotations

import ast
import csv
import doctest
import itertools
import math
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bnlib.nn

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def conforms(path, schema):
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)],
        capture_output=True,
        text=True,
    )
    return done.returncode == 0, done.stdout


# --- Workflows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_conforms_to_the_schema(path):
    assert conforms(path, "vendor.github-workflows") == (True, "ok -- validation done\n")


def test_workflow_schema_can_fail(tmp_path):
    text = WORKFLOWS[0].read_text()
    assert "runs-on" in text
    (tmp_path / "w.yml").write_text(text.replace("runs-on", "run-on"))
    assert not conforms(tmp_path / "w.yml", "vendor.github-workflows")[0]


def workflow_problems(text):
    """Actions not pinned by commit, and permissions beyond reading that are not for Pages."""
    workflow, problems = yaml.safe_load(text), []
    for action in re.findall(r"uses: *(.+)", text):
        if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", action.strip()):
            problems.append(f"{action} is not pinned by commit, with its version as a comment")
    if workflow.get("permissions") != {"contents": "read"}:
        problems.append(f"the workflow's permissions are {workflow.get('permissions')}")
    for name, job in workflow["jobs"].items():
        allowed = {"pages": "write", "id-token": "write"} if name == "deploy" else {}
        if job.get("permissions", {}) != allowed:
            problems.append(f"job {name} has the permissions {job.get('permissions')}")
        if "timeout-minutes" not in job:
            problems.append(f"job {name} has no time limit")
    return problems


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_is_pinned_and_may_do_little(path):
    assert workflow_problems(path.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"@[0-9a-f]{40} # v\S+", "@v4"),
        (r" # v5\S+", ""),
        (r"contents: read", "contents: write"),
        (r"permissions:\n  contents: read\n", ""),
        (r"pages: write", "contents: write"),
        (r" +timeout-minutes: \d+\n", ""),
    ],
)
def test_workflow_rule_can_fail(old, new):
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text()
    spoilt = re.sub(old, new, text)
    assert spoilt != text
    assert workflow_problems(spoilt)


def test_ci_runs_the_two_commands():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (\w+)$", script, re.MULTILINE) == ["test", "book"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0


# --- Citation, licences ---------------------------------------------------------------------------


def test_citation_file(tmp_path):
    path = ROOT / "CITATION.cff"
    assert conforms(path, "vendor.citation-file-format")[0]
    citation = yaml.safe_load(path.read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project
    spoilt = tmp_path / "CITATION.cff"
    spoilt.write_text(path.read_text().replace("authors:", "writers:"))
    assert not conforms(spoilt, "vendor.citation-file-format")[0]


def test_citation_file_offers_no_choice_of_licences():
    """In CFF a list of licences means any one of them: the text would be under BSD too."""
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert yaml.safe_load(text)["license"] == project["license"] == "BSD-3-Clause"
    assert "CC BY 4.0" in text and "LICENSE-CONTENT" in text


def test_licences():
    assert (ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License")
    assert "Creative Commons Attribution 4.0" in (ROOT / "LICENSE-CONTENT").read_text()


# --- README ---------------------------------------------------------------------------------------


def targets(makefile):
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_commands_of_the_readme_exist():
    named = set(re.findall(r"\bmake ([a-z]+)", (ROOT / "README.md").read_text())) - {"and"}
    assert {"book", "test"} <= named
    assert named <= targets((ROOT / "Makefile").read_text())
    assert not {"nonsense"} <= targets((ROOT / "Makefile").read_text())


def test_help_lists_every_target():
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make (\w+)", out.stdout, re.MULTILINE)) == targets(
        (ROOT / "Makefile").read_text()
    )


def run_examples(markdown):
    """Run a text's Python sessions; how many lines were tried, and how many failed."""
    runner = doctest.DocTestRunner(verbose=False)
    for block in re.findall(r"```python\n(.*?)```", markdown, re.DOTALL):
        test = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
        runner.run(test, out=lambda text: None)
    return runner.summarize(verbose=False)


def test_example_of_the_readme_prints_what_it_says():
    readme = (ROOT / "README.md").read_text()
    result = run_examples(readme)
    assert result.attempted >= 5
    assert result.failed == 0
    assert run_examples(readme.replace("11.5", "11.6")).failed == 1


def gradient_across_modes(layer):
    """dx of a forward in evaluation, with a training step before its backward."""
    x = torch.linspace(-1, 1, 24).reshape(4, 3, 2).requires_grad_()
    y = layer.eval()(x)
    layer.train()(3 * x.detach() + 2)
    y.backward(torch.ones_like(y))
    return x.grad


def test_what_the_readme_says_of_a_training_step_between_evaluation_and_its_backward():
    right = 1 / math.sqrt(1 + 1e-5)
    assert (gradient_across_modes(torch.nn.BatchNorm1d(3)) - right).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient_across_modes(bnlib.nn.convert_batch_norm(torch.nn.BatchNorm1d(3)))


def test_files_named_in_the_readme_exist():
    for name in re.findall(
        r"`([\w./-]+\.(?:md|py|cff|txt|toml))`", (ROOT / "README.md").read_text()
    ):
        assert (ROOT / name).is_file(), name


# --- The API page ---------------------------------------------------------------------------------


def public(path):
    """The functions and classes of a module without a leading underscore."""
    return [
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


def unlisted(page):
    """Public names of bnlib that the API page neither documents nor names as left out."""
    documented = set(re.findall(r":: (bnlib[\w.]*)", page))
    left_out = set(re.findall(r"`(bnlib[\w.]*)`", page.partition("## Left out")[2]))
    missing = []
    for path in sorted((ROOT / "bnlib").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        packages = ("bnlib.kernels.", "bnlib.fold.", "bnlib.diagnosis.")
        inside = module.startswith(packages)  # re-exported, if public
        if inside or module in left_out or re.search(rf":: {module}\n +:members:", page):
            continue
        for name in public(path):
            full = {f"{module}.{name}"} | ({f"bnlib.{name}"} if name in bnlib.__all__ else set())
            if not full & (documented | left_out):
                missing.append(f"{module}.{name}")
    return missing


def test_api_page_lists_every_public_name_or_says_that_it_does_not():
    page = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    assert unlisted(page) == []
    spoilt = page.replace(".. autofunction:: bnlib.merge\n", "").replace("at_least_float32", "x")
    assert unlisted(spoilt) == ["bnlib.statistics.merge", "bnlib.statistics.at_least_float32"]


# --- Requirements ---------------------------------------------------------------------------------


def requirement_problems(text):
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    exact = re.compile(r'[A-Za-z0-9._-]+==[A-Za-z0-9.]+(; platform_system [!=]= "\w+")?')
    problems = [f"{line!r} is not an exact pin" for line in lines if not exact.fullmatch(line)]
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines]
    return problems + [f"{n} is pinned twice" for n in sorted(set(names)) if names.count(n) > 1]


def test_requirements_are_exact():
    assert requirement_problems((ROOT / "requirements.txt").read_text()) == []


@pytest.mark.parametrize(
    "line", ["numpy>=2", "numpy", "torch==2.13.0+cpu", "-f somewhere", "a==1\nA==2"]
)
def test_requirement_rule_can_fail(line):
    assert requirement_problems(line)


def unpinned(pinned, requires):
    """What the pinned packages need and is itself not pinned; `requires` maps a name to lines."""
    missing = set()
    for name in pinned:
        for requirement in map(Requirement, requires(name)):
            needed = canonicalize_name(requirement.name)
            # torch's build for CUDA names the exact versions of the libraries that it needs
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and needed not in pinned and not needed.startswith(("nvidia-", "cuda-")):
                missing.add(f"{needed}, for {name}")
    return sorted(missing)


def installed_requires(name):
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # pinned for another platform
        return []


def test_everything_that_is_needed_is_pinned():
    """A package that is needed but not pinned may change between two builds."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {canonicalize_name(x.split("==")[0]) for x in lines if x and not x.startswith("#")}
    assert unpinned(pinned, installed_requires) == []
    assert unpinned(pinned - {"markupsafe"}, installed_requires) == ["markupsafe, for jinja2"]


def measured(rows, key, **where):
    """The ratios ``key`` of the rows in which the columns have these values."""
    found = [row for row in rows if all(row[column] == value for column, value in where.items())]
    return [float(row[key]) for row in found if row[key]]


def mean(ratios):
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def quoted():
    """What the README's section "Measured" must print, from what was measured."""
    with (ROOT / "book" / "data" / "cpu.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    operations = ["forward+backward", "forward+backward, add, ReLU"]
    against_compile = []
    for name, layout in (("NCHW", "contiguous"), ("channels_last", "channels_last")):
        for batch, threads in itertools.product(("32", "8"), "12"):
            cells = []
            for pages, operation in itertools.product("01", operations):
                where = {"layout": layout, "batch": batch, "operation": operation}
                where |= {"threads": threads, "huge_pages": pages}
                found = measured(rows, "eager_ratio", **where)
                assert len(found) == 12
                cells.append(f"{mean(found):.2f} ({min(found):.2f})")
            yield " | ".join([f"| {name}", batch, threads, *cells]) + " |"
        where = {"layout": layout, "batch": "32", "operation": "forward+backward"}
        for pages in "01":
            found = measured(rows, "compile_ratio", threads="2", huge_pages=pages, **where)
            against_compile.append(f"{mean(found):.2f}")
    yield "{} and {} for NCHW, {} and {} for channels_last".format(*against_compile)
    tiny = {"channels": "1000", "size": "1", "operation": "forward+backward", "threads": "1"}
    yield f"take {1 / mean(measured(rows, 'eager_ratio', **tiny)):.1f} times PyTorch's"
    for kind in ("training step", "training step, bottlenecks"):
        steps = [
            ratio
            for operation in (kind, f"{kind}, fused")
            for ratio in measured(rows, "eager_ratio", operation=operation)
        ]
        yield f"{min(steps):.2f} to {max(steps):.2f}"
    record = " ".join((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split())
    step = record.partition("pairs of 3 x 3, channels_last: ms of a step")[2]
    eager, ours, fused = re.findall(r"ReLU (\d+\.\d+) \(", step)[:3]
    yield f"take {ours} ms and PyTorch's {eager}; fused into one pass they take {fused}"
    pattern = r"took (\S+) \+ (\S+) s, with residual and ReLU (\S+) \+ (\S+) s more, and (\S+) s"
    *first, later = map(float, re.search(pattern, record).groups())
    yield f"{sum(first[:2]):.0f} seconds for the layer"
    yield f"{sum(first[2:]):.0f} more"
    assert later < 1
    yield "in less than a second"


def unquoted(readme, quotes):
    """Numbers under "Measured" that no quote gives, and quotes that are missing."""
    section = " ".join(readme.partition("## Measured")[2].partition("\n## ")[0].split())
    problems = [f"{quote!r} is missing" for quote in quotes if quote not in section]
    for quote in quotes:
        section = section.replace(quote, "")
    settings = "float32|ENABLE=1|ResNet-50|12 shapes|Below 1|batch 32|3 x 3|(16, 1000, 1, 1)"
    for setting in settings.split("|"):
        section = section.replace(setting, "")
    return problems + re.findall(r"\d[\d.]*", section)


def test_readme_quotes_what_was_measured_and_no_other_number():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quotes = list(quoted())
    assert unquoted(readme, quotes) == []
    assert unquoted(readme.replace("20.55", "20.54"), quotes)
    assert unquoted(readme.replace("seconds for", "seconds (9 at best) for"), quotes)
