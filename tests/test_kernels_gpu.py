"""The Triton kernels without a GPU: compiled for one, and refused; tests/gpu runs them."""

from __future__ import annotations

import csv
import functools
import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnlib import functional, modes, reference
from bnlib.book.plotting import AXIS_COLORS, INK, use_style
from bnlib.book.tables import table
from bnlib.kernels import choose, load

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no wheel for this platform"
)


def python(*arguments, **environment):
    """Run Python in the repository's root; return its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


# --- One interface --------------------------------------------------------------------------------


def parameters(function):
    """Name, kind and default of each parameter."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@needs_triton
@pytest.mark.parametrize("name", ["moments", "normalize", "grad_sums", "grad_input"])
def test_the_primitives_have_one_signature(name):
    """The reference's but for the choice of axes, and for both the same that is fused besides."""
    expected = [p for p in parameters(getattr(reference, name)) if p[0] != "axes"]
    kernels = parameters(getattr(load("reference"), name))
    assert kernels[: len(expected)] == expected
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, kind, _ in kernels[len(expected) :])


@needs_triton
def test_auto_takes_the_gpu_for_tensors_on_it(monkeypatch):
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "supports", lambda x: x.is_supported)
    for is_supported, expected in ((True, gpu), (False, load("reference"))):
        on = types.SimpleNamespace(
            is_cpu=False, is_cuda=True, numel=lambda: 1, is_supported=is_supported
        )
        assert choose.choose(on, "auto", plain=True) is expected


# --- Compiled for a GPU ---------------------------------------------------------------------------

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}
# Layers of ResNet-50, (N, C, H = W), so that every kernel, way to cut and width of loads is met;
# whether channels are innermost.
CASES = [
    ((256, 256, 56), torch.bfloat16, False),
    ((256, 256, 56), torch.float32, True),
    ((32, 2048, 7), torch.float16, True),
    ((256, 512, 7), torch.bfloat16, False),  # rows of 49
]
# More of which the reductions are compiled; with the environment variable, all kernels of all.
MORE = [
    ((32, 1023, 31), torch.bfloat16, True),  # no layer of ResNet-50: an odd number of channels
    ((256, 64, 112), torch.float16, False),
    ((32, 256, 14), torch.bfloat16, False),  # rows of 196 elements: multiples of 4
    ((256, 2048, 7), torch.float32, False),
]
if os.environ.get("EVERY_KERNEL") == "1":
    layers = itertools.product((256, 32), ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7)))
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    every = itertools.product(((n, *layer) for n, layer in layers), dtypes, (False, True))
    CASES, MORE = [*CASES, *every], []


def launches(monkeypatch, layer, dtype, channels_last):
    """Return every launch of one layer: forward plain and with all that is fused, and backward."""
    from bnlib.kernels.gpu import launch

    gpu = load("gpu")

    calls = []
    monkeypatch.setattr(gpu, "supports", lambda x: True)
    monkeypatch.setattr(launch, "_launch", lambda *args, **kwargs: calls.append((args, kwargs)))
    n, c, h = layer
    x = torch.empty((n, c, h, h), dtype=dtype, device="meta")
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    v = torch.empty(c, device="meta")
    mask, dresidual = gpu.empty_mask(x), gpu.empty_like(x)
    running = {"running_mean": v, "running_var": v, "momentum": 0.1}
    gpu.moments_and_normalize(x, v, v, 1e-5, **running)
    gpu.moments_and_normalize(x, v, v, 1e-5, x, True, mask, **running)
    gpu.grad_sums_and_input(x, x, v, v, v, 2, mask=mask, dresidual=dresidual)
    given = [tuple(a is None for a in args) for args, _ in calls]
    once = {(c[0][0].__name__, str(c[0][1]), g): c for c, g in zip(calls, given, strict=True)}
    return [(*args[:2], args[2:], constants) for args, constants in once.values()]


def compiled(kernel, plan, args, constants, folder):
    """Return (registers, whether some were spilled, instructions) of one launch, for an H100 or
    H200, specialised as triton specialises it; by the tools that it ships.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = plan.blocks | constants
    values = dict(zip(kernel.arg_names, (*args, *plan.sizes), strict=False)) | fixed
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in fixed or value is None:
            signature[name], constexprs[(i,)] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        is_pointer = isinstance(value, torch.Tensor)
        signature[name] = POINTERS[value.dtype] if is_pointer else "i32"
        if is_pointer:  # torch's allocator aligns to more than 16 bytes
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            assert kernel.params[i].do_not_specialize
    source = ASTSource(kernel, signature, constexprs, attributes)
    target = GPUTarget("cuda", 90, 32)
    cubin = triton.compile(source, target=target, options=plan.options).asm["cubin"]
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", "-sass", path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?) ;", said)
    code = [(int(at, 16), instruction) for at, instruction in found]
    spills = stack > 0 or any(what.startswith(("LDL", "STL")) for _, what in code)
    return registers, spills, code


def loop(code):
    """Return the instructions of the loop that loads, from the target of its branch backwards."""
    for i, (at, what) in enumerate(code):
        target = re.match(r"BRA.*(0x[0-9a-f]+)", what)
        if target and int(target[1], 16) < at:
            body = [w for a, w in code[:i] if a >= int(target[1], 16)]
            if any(w.startswith("LDG") for w in body):
                return body
    return []


def groups(instructions):
    """Return how many loads are issued before the first use of any of them, again and again."""
    found, loaded = [0], set()
    for what in instructions:
        name, _, operands = what.partition(" ")
        target, _, sources = operands.partition(", ")
        if name.startswith("ST"):
            sources = operands
        read = set()
        for register, wide in re.findall(r"\bR(\d+)\b(\.64)?", sources):
            read |= {int(register), int(register) + bool(wide)}
        if read & loaded:
            found, loaded = [*found, 0], set()
        if name.startswith("LDG"):
            first = int(re.match(r"R(\d+)", target)[1])
            length = {"64": 2, "128": 4}.get(name.split(".")[-1], 1)
            loaded |= set(range(first, first + length))
            found[-1] += 1
    return [n for n in found if n]


def test_groups_of_loads():
    """What follows a load belongs to it until something reads what it brought."""
    load, add = "LDG.E.128 R8, desc[UR4][R2.64]", "FADD R4, R5, R10"
    more = "LDG.E R12, desc[UR4][R2.64+0x10]"
    assert groups([load, more, add, "FADD R1, R12, R1"]) == [2]
    assert groups([load, add, more, "STG.E desc[UR4][R6.64], R12", load]) == [1, 1, 1]
    assert groups(["LDG.E.64 R2, desc[UR4][R6.64]", more]) == [1, 1]  # its address is loaded
    code = list(enumerate(["BRA 0x9", load, more, add, "BRA 0x1", "EXIT", "BRA 0x6"]))
    assert loop(code) == [load, more, add]


WIDTHS = {1: ".U8", 2: ".U16", 4: "", 8: ".64", 16: ".128"}


def widest(layer, dtype, channels_last):
    """The bytes that a thread can load at once: those that rows, or channels, are multiples of."""
    inner = layer[1] if channels_last else layer[2] ** 2
    return min(16, (inner & -inner) * dtype.itemsize)


def check(kernel, plan, args, constants, wide, folder):
    """No register goes to memory, the loads are wide, and in flight together."""
    name = kernel.__name__
    registers, spills, code = compiled(kernel, plan, args, constants, folder)
    threads = 32 * plan.options["num_warps"]
    assert not spills, f"{name} spills"
    assert registers * threads <= 65536, "not even one program fits on a multiprocessor"
    if "BN" not in plan.blocks:
        return  # merges a few numbers per channel
    dtype, size = args[0].dtype, args[0].numel()
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    whole = [t for t in tensors if (t.dtype, t.numel()) == (dtype, size)]
    stores = 0 if name in REDUCTIONS else 1 + (len(whole) == 4)  # with dresidual
    tile = plan.blocks["BN"] * plan.blocks["BC"] * plan.blocks["BP"] * dtype.itemsize
    times = max(tile // (threads * wide), 1)
    loads = times * (len(whole) - stores)
    for kind, least in (("LDG", loads), ("STG", times * stores)):
        found = sum(w.split()[0] == f"{kind}.E{WIDTHS[wide]}" for _, w in code)
        assert found >= least, f"{name}: {found} {kind} of {wide} bytes"
    if name in REDUCTIONS:
        assert 4 * registers * threads <= 65536, f"{name}: not all programs run at one time"
        together = groups(loop(code))
        assert len(together) == 1 and together[0] >= loads, f"{name}: loads in groups {together}"


REDUCTIONS = ("moments_kernel", "grad_sums_kernel")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What two layers need is compiled once; what an older commit has left is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@needs_triton
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_compiles_without_spills_and_with_wide_loads_in_flight_together(
    monkeypatch, tmp_path, case
):
    for launch in launches(monkeypatch, *case):
        if case in CASES or launch[0].__name__ in REDUCTIONS:
            check(*launch, widest(*case), tmp_path)


@needs_triton
def test_a_loop_that_waits_for_each_load_is_found(monkeypatch, tmp_path):
    """The one that the benchmark keeps: it asks for a tile when it needs it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from serial import moments_kernel

    case = CASES[0]
    (launch,) = (x for x in launches(monkeypatch, *case) if x[0].__name__ == "moments_kernel")
    with pytest.raises(AssertionError, match=r"loads in groups \[\d+, \d+"):
        check(moments_kernel, *launch[1:], widest(*case), tmp_path)


@needs_triton
def test_every_kernel_is_compiled(monkeypatch):
    from bnlib.kernels.gpu import kernels as device

    kernels = {name for name in vars(device) if name.endswith("_kernel")}
    met = {launch[0].__name__ for case in CASES for launch in launches(monkeypatch, *case)}
    assert met == kernels and len(kernels) == 8


# --- What torch sees of them ----------------------------------------------------------------------


class Record(TorchDispatchMode):
    """The operators that torch runs, and the devices of what they return."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.seen.append((str(function), {t.device.type for t in tensors}))
        return out


@needs_triton
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("shape", [(32, 64, 7, 7), (256, 3, 64, 64)], ids=["whole", "split"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_no_number_travels_and_nothing_is_copied(monkeypatch, layout, shape, activation, training):
    """A CUDA graph forbids the one: everything stays on the device of the input, and unread.

    The other would be a pass that nobody has counted.
    """
    from bnlib.kernels.gpu import launch

    gpu = load("gpu")

    launched = []
    monkeypatch.setattr(gpu, "supports", lambda x: True)
    monkeypatch.setattr(launch, "_launch", lambda kernel, *args, **kwargs: launched.append(kernel))
    monkeypatch.setattr(modes, "is_recorded", lambda: False)  # the test itself records
    x, residual = (torch.empty(shape, device="meta", memory_format=layout) for _ in range(2))
    x.requires_grad_(), residual.requires_grad_()
    w, b = (torch.empty(shape[1], device="meta", requires_grad=True) for _ in range(2))
    running = torch.empty(2, shape[1], device="meta").unbind()
    with Record() as record:
        y = functional.batch_norm(
            x, *running, w, b, training, residual=residual, activation=activation, backend="gpu"
        )
        torch.autograd.grad(y, (x, w, b, residual), torch.empty_like(y))
    assert len(launched) >= 2
    assert all(devices <= {"meta"} for _, devices in record.seen), record.seen
    forbidden = ["_local_scalar_dense", "nonzero"]
    if training:  # in evaluation torch's operations unpack the mask
        forbidden += ["copy", "clone", "contiguous"]
    assert not any(word in name for word in forbidden for name, _ in record.seen), record.seen


# --- How tensors are cut --------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("reads", [1, 2])
def test_a_plan_covers_every_tile_once(reads, reduce):
    from bnlib.kernels.gpu.plan import tiled

    shapes = [(1, 1, 1), (32, 64, 3136), (2, 3, 50_000_000), (10**9, 3, 1), (7, 10**6, 1)]
    for n, c, p in [*shapes, (1, 4, 2**30)]:
        for itemsize in (2, 4):
            plan = tiled(n, c, p, itemsize, reads, reduce)
            *shape, tiles, per_program = plan.sizes
            assert shape == [n, c, p]
            bn, bc, bp = (plan.blocks[name] for name in ("BN", "BC", "BP"))
            assert tiles == -(-n // bn) * -(-p // bp)
            assert plan.grid[0] * bc >= c > (plan.grid[0] - 1) * bc
            used = plan.grid[1] * per_program
            assert used >= tiles > used - per_program  # no program without a tile
            assert plan.grid[1] <= (512 if reduce else 65535)
            assert not reduce or plan.grid[0] * plan.grid[1] <= max(528, plan.grid[0])
            assert (bn - 1) * c * p + bc * p + bp < 2**31  # offsets inside a tile


@needs_triton
def test_single_read_serves_most_of_resnet50():
    """At batch 32, 41 of the 53 forwards in torch's usual layout: H = W = 28, 14 and 7."""
    from bnlib.kernels.gpu.plan import whole

    counts = {(64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 56): 1, (128, 28): 7, (512, 28): 5}
    counts |= {(256, 28): 1, (256, 14): 11, (1024, 14): 7, (512, 14): 1, (512, 7): 5, (2048, 7): 4}
    assert sum(counts.values()) == 53
    fits = [k for (c, h), k in counts.items() if whole(32, c, h * h, 2, fused=False)]
    assert sum(fits) == 41


# --- The benchmark --------------------------------------------------------------------------------

CSV_HEADER = "date,machine,gpu,driver,torch,triton,op,layout,dtype,n,c,h,w,impl,median_us,floor_us"


@needs_triton
def test_benchmark_dry_run(tmp_path):
    """All of the benchmark but the GPU: it times, judges and writes the CSV."""
    out = tmp_path / "gpu.csv"
    code, said = python("benchmarks/gpu.py", "--dry-run", "--serial", "--out", str(out))
    assert code == 0, said
    assert "not measured: resnet50_step" not in said, said
    assert re.search(r"host, train_fwd_bwd, bnlib, compiled: \d+ us", said), said
    # The interpreter's times say nothing, but the verdicts are about the numbers beside them.
    verdicts = re.findall(r"(met|UNMET): .* at least ([\d.]+) x .* float32: ([\d.]+) over 1", said)
    assert len(verdicts) == 6
    assert all((v == "met") == (float(found) >= float(least)) for v, least, found in verdicts)
    slower = re.findall(r"UNMET: slower than eager by more than 5 %: .*: by (\d+) %", said)
    assert all(int(percent) >= 5 for percent in slower)
    assert f"slower than eager by more than 5 %: {len(slower)} of 14" in said
    assert "not measured: add_relu_fwd_bwd at least 1.0 x compile, NCHW bfloat16" in said
    text = out.read_text()
    assert text.splitlines()[0] == CSV_HEADER
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["machine"] for row in rows} == {"dry run"}
    found = {(row["op"], row["layout"], row["impl"]) for row in rows if row["h"] == "3"}
    ops = [a + b for a in ("train", "add_relu") for b in ("_fwd", "_bwd", "_fwd_bwd")] + ["eval"]
    layouts = ("NCHW", "channels_last")
    impls = ("bnlib", "bnlib_serial", "eager", "eager_nocudnn", "compile", "copy")
    assert found == set(itertools.product(ops, layouts, impls))
    assert {row["op"] for row in rows} == {*ops, "bandwidth", "resnet50_step"}
    assert all(float(row["median_us"]) > 0 for row in rows)


PIECES = f"""
import importlib.util, os, sys, time
os.environ["TRITON_INTERPRET"] = "1"
sys.argv = ["gpu.py", "--dry-run"]
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
path = {str(ROOT / "benchmarks" / "gpu.py")!r}
spec = importlib.util.spec_from_file_location("benchmark", path)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
import torch
"""

ROTATION = (
    PIECES
    + """
class Event:
    def __init__(self, enable_timing):
        assert enable_timing
    def record(self):
        self.at = time.perf_counter()
    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)

pauses, order = [], []
torch.cuda.Event, torch.cuda._sleep = Event, pauses.append
torch.cuda.synchronize = lambda: None
benchmark.ROUNDS = 8
for device in ("cpu", "cuda"):
    benchmark.DEVICE = device
    order.clear()
    def buffer(name, i):
        def function():
            order.append(i)
            time.sleep(0.004 if name == "slow" else 0)
        return function
    calls = {name: [buffer(name, i) for i in range(4)] for name in ("bnlib", "slow", "copy")}
    medians = benchmark.time_in_turns(calls)
    assert medians["slow"] > 4000 > medians["bnlib"], medians
    assert len(order) == 8 * 3
    for k in range(len(order) - 3):
        assert len(set(order[k : k + 4])) == 4, order
assert len(pauses) == 8 and pauses[0] < 3e9 * 0.004 < pauses[1] <= pauses[-1], pauses
"""
)

FAILURES = (
    PIECES
    + """
def no_eval(x, w, b, stats, training, residual):
    if not training:
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
    return right(x, w, b, stats, training, residual)

class Inputs(benchmark.Inputs):
    def __init__(self, n, c, *rest):
        if c == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(c)
        super().__init__(n, c, *rest)

right, rows, made = benchmark.LAYERS["eager"], [], []
benchmark.LAYERS["eager"] = no_eval
benchmark.Inputs = Inputs
benchmark.ARGS.compile_seconds = -1
benchmark.l2_bytes = lambda: 10 * 2 * 4 * 3 * 3 * 4 - 1  # bytes: just less than ten inputs
benchmark.cases = lambda: [((c, 3), "float32", "NCHW", 2) for c in (4, 5, 6)]
benchmark.measure_layers(lambda *row: rows.append(row), 1.0, ("eval", "train_fwd"))
found = {(row[0], row[4], row[-3]) for row in rows}
others = {"bnlib", "eager_nocudnn", "copy"}
assert found == {(op, c, i) for op in ("eval", "train_fwd") for c in (4, 6) for i in others} | {
    ("train_fwd", c, "eager") for c in (4, 6)
}, found
assert made.count(4) == 11, made  # while one rests, ten others are read
"""
)


@needs_triton
def test_benchmark_never_finds_its_input_in_the_cache(tmp_path):
    """Not what the implementation before it has read, either; and the GPU waits for the host."""
    (tmp_path / "run.py").write_text(ROTATION)
    code, said = python(str(tmp_path / "run.py"))
    assert code == 0, said


@needs_triton
def test_benchmark_goes_on_when_something_fails(tmp_path):
    """One implementation of one operation, or one shape: the rest is measured."""
    (tmp_path / "run.py").write_text(FAILURES)
    code, said = python(str(tmp_path / "run.py"))
    assert code == 0, said
    assert "eager failed: eval (2, 4, 3, 3) float32 NCHW: RuntimeError: CUDNN_STATUS" in said
    assert "not measured: (2, 5, 3, 3) float32 NCHW: OutOfMemoryError: CUDA out" in said
    assert "not measured, eval, train_fwd: float32 NCHW: 2x5x3x3" in said


def test_benchmark_says_what_is_missing(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError")
    code, said = python("benchmarks/gpu.py", PYTHONPATH=str(tmp_path))
    assert code == 1 and re.search(r"missing in .*: triton$", said, re.MULTILINE)
    assert "Traceback" not in said


def test_recorded_measurements_have_the_columns():
    assert (ROOT / "book/data/gpu.csv").read_text().splitlines()[0] == CSV_HEADER


@pytest.fixture
def measured_cells(monkeypatch, tmp_path, capsys):
    """Run the cells of the chapter that show the measurements, with other rows; a function that
    returns what they print and the figures that they show.
    """
    nb = nbformat.read(ROOT / "book" / "scale" / "memory.ipynb", as_version=4)
    sources = [c.source for c in nb.cells if c.cell_type == "code"]
    (ratios,) = [source for source in sources if "gpu.csv" in source]
    (plot,) = [source for source in sources if "def draw_measured" in source]
    (tmp_path / "data").mkdir()
    (tmp_path / "scale").mkdir()
    monkeypatch.chdir(tmp_path / "scale")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))

    def run(rows):
        with (tmp_path / "data" / "gpu.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_HEADER.split(","))
            writer.writeheader()
            writer.writerows(rows)
        names = {"csv": csv, "np": np, "plt": plt, "Path": Path, "defaultdict": defaultdict}
        names |= {"AXIS_COLORS": AXIS_COLORS, "INK": INK, "table": table, "display": print}
        capsys.readouterr()
        with plt.rc_context():
            use_style()
            for source in (ratios, plot):
                exec(source, names)
            for figure in shown:
                figure.canvas.draw()
        return capsys.readouterr().out, shown

    yield run
    plt.close("all")


def measurement(op, impl, median, floor="", gpu="Card A", c=64, layout="NCHW", dtype="float32"):
    values = ("2026-01-01", "m", gpu, "1", "2", "3", op, layout, dtype, 32, c, 8, 8, impl)
    return dict(zip(CSV_HEADER.split(","), (*values, median, floor), strict=True))


def test_the_chapter_says_that_nothing_is_measured(measured_cells):
    step = measurement("resnet50_step", "bnlib", 1e5)  # as when a run was cut off
    for rows, times in (([], 2), ([step], 1)):
        said, figures = measured_cells(rows)
        assert said.count("not yet measured") == times and not figures


def test_the_chapter_draws_what_is_measured(measured_cells):
    rows = [
        measurement("bandwidth", "copy", 250.0, 250.0),
        measurement("train_fwd_bwd", "bnlib", 10.0, 8.0),
        measurement("train_fwd_bwd", "eager", 20.0, 8.0),
        measurement("train_fwd_bwd", "copy", 2.0, 2.0),
        measurement("train_fwd_bwd", "bnlib", 20.0, 8.0, c=128, dtype="bfloat16"),
        measurement("train_fwd_bwd", "bnlib", 20.0, 15.0, c=128),
        measurement("train_fwd_bwd", "eager", 160.0, 15.0, c=128),
        measurement("train_fwd_bwd", "compile", 10.0, 15.0, c=128),
        measurement("train_fwd_bwd", "bnlib", 10.0, 9.0, gpu="Card B", layout="channels_last"),
        measurement("resnet50_step", "bnlib", 100.0, dtype="bfloat16"),
        measurement("resnet50_step", "eager", 125.0, dtype="bfloat16"),
    ]
    said, (figure,) = measured_cells(rows)
    assert "not yet measured" not in said
    for card in ("Card A", "Card B"):
        assert f"{card}, driver 1, torch 2, triton 3, 2026-01-01" in said
    assert "copy: 4.00 TB/s" in said
    lines = [line.split() for line in said.splitlines()]
    # eager: the root of 160/20 x 20/10; compile on one shape only.
    at = lines.index(["NCHW,", "float32"])
    assert lines[at + 3] == ["train_fwd_bwd", "4.00", "(2)", "–", "0.50", "(1)"]
    at = lines.index(["NCHW,", "bfloat16"])
    assert lines[at + 3] == ["resnet50_step", "1.25", "(1)", "–", "–"]
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert panels.keys() == {"Card A\nNCHW", "Card B\nchannels_last"}
    for title, impl, points in (
        ("Card A\nNCHW", "bnlib", [(0.524288, 0.8), (0.524288, 0.4), (1.048576, 0.75)]),
        ("Card A\nNCHW", "compile", [(1.048576, 1.5)]),
        ("Card B\nchannels_last", "bnlib", [(0.524288, 0.9)]),
        ("Card B\nchannels_last", "eager", []),
    ):
        (line,) = [line for line in panels[title].lines if line.get_label() == impl]
        found = [(round(float(mb), 6), round(float(share), 6)) for mb, share in line.get_xydata()]
        assert sorted(found) == sorted(points)
    assert {text.get_text() for text in figure.legends[0].texts} == {
        "bnlib", "compile", "eager", "eager_nocudnn",
    }  # fmt: skip


# --- Refused --------------------------------------------------------------------------------------


def test_without_triton_the_error_says_so():
    code, said = python("-c", "import sys; sys.modules['triton'] = None; import bnlib.kernels.gpu")
    assert code == 1
    assert "ImportError: the GPU kernels need triton" in said


BROKEN = """
import sys, types, warnings
import torch
from bnlib import functional
from bnlib.kernels import load
from bnlib.kernels.choose import choose

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise OSError("libcuda.so.1: cannot open shared object file")

sys.meta_path.insert(0, Broken())
on_a_gpu = types.SimpleNamespace(is_cpu=False, is_cuda=True, numel=lambda: 1)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert choose(on_a_gpu, "auto", True) is load("reference")
    assert choose(on_a_gpu, "auto", True) is load("reference")
assert len(seen) == 1, seen
print(seen[0].message)
functional.batch_norm(torch.ones(2, 3), None, None, training=True, backend="gpu")
"""


def test_with_a_broken_triton_the_reference_serves_and_says_so_once():
    """A tensor on a GPU, but a triton that cannot be imported, as where it finds no driver."""
    code, said = python("-c", BROKEN)
    assert code == 1
    assert "bnlib computes batch norm with its reference" in said
    assert "\nImportError: the GPU kernels need triton" in said  # where they were asked for
    assert said.count("OSError: libcuda.so.1: cannot open shared object file") >= 2


@needs_triton
def test_on_the_cpu_the_error_says_what_is_missing():
    x = torch.zeros(2, 3)
    assert not load("gpu").supports(x)
    with pytest.raises(ValueError, match=r"x of .*a CUDA device .*TRITON_INTERPRET=1.* on cpu"):
        load("gpu").moments(x)
    layer = functools.partial(functional.batch_norm, training=True, backend="gpu")
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with pytest.raises(ValueError, match=r"a CUDA device .*TRITON_INTERPRET=1.* on cpu"):
            call(x, None, None)
