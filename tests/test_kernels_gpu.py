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

from bnlib import functional, reference
from bnlib.book.plotting import AXIS_COLORS, INK, use_style

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
    """The reference's, and for both kinds of kernels the same that is fused besides."""
    from bnlib.kernels import cpu, gpu

    expected, kernels = parameters(getattr(reference, name)), parameters(getattr(gpu, name))
    assert parameters(getattr(cpu, name)) == kernels
    assert kernels[: len(expected)] == expected
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, kind, _ in kernels[len(expected) :])


@needs_triton
def test_auto_takes_the_gpu_for_tensors_on_it(monkeypatch):
    from bnlib.kernels import gpu

    monkeypatch.setattr(gpu, "supports", lambda x: x.is_supported)
    for is_supported, expected in ((True, gpu), (False, reference)):
        on = types.SimpleNamespace(
            is_cpu=False, is_cuda=True, numel=lambda: 1, is_supported=is_supported
        )
        assert functional._kernels(on, "auto") is expected


# --- Compiled for a GPU ---------------------------------------------------------------------------

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}
# Layers of ResNet-50, (N, C, H = W), so that every kernel, way to cut and width of loads is met;
# whether channels are innermost; the bytes that a thread can load at once.
CASES = [
    ((256, 256, 56), torch.bfloat16, False, 16),
    ((256, 256, 56), torch.float32, True, 16),
    ((32, 2048, 7), torch.float16, True, 16),
    ((32, 512, 28), torch.float32, False, 16),
    ((32, 256, 14), torch.bfloat16, False, 8),  # rows of 196 elements: multiples of 4
    ((256, 512, 7), torch.bfloat16, False, 2),  # rows of 49
    ((32, 1023, 31), torch.bfloat16, True, 2),  # no layer of ResNet-50: an odd number of channels
]


def launches(monkeypatch, layer, dtype, channels_last):
    """Return every launch of one layer: forward plain and with all that is fused, and backward."""
    from bnlib.kernels import gpu

    calls = []
    monkeypatch.setattr(gpu, "supports", lambda x: True)
    monkeypatch.setattr(gpu, "_launch", lambda *args, **kwargs: calls.append((args, kwargs)))
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
    once = {(c[0][0].__name__, str(c[1]), g): c for c, g in zip(calls, given, strict=True)}
    return list(once.values())


def compiled(kernel, grid, *args, warps=4, **blocks):
    """Compile one launch for an H100 or H200, specialised as triton specialises it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, args, strict=False)) | blocks
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in blocks or value is None:
            signature[name], constants[(i,)] = "constexpr", value
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
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def machine_code(cubin, folder):
    """Return (registers, bytes of stack, disassembly), by the tool that triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    said = [
        subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    ]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said[0])
    return int(usage[1]), int(usage[2]), said[1]


@needs_triton
@pytest.mark.parametrize(("layer", "dtype", "channels_last", "wide"), CASES, ids=str)
def test_compiles_without_spills_and_with_wide_loads(
    monkeypatch, tmp_path, layer, dtype, channels_last, wide
):
    """For sm_90: no registers spilled to memory, loads and stores as wide as the layout allows."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    suffix = {2: ".U16", 4: "", 8: ".64", 16: ".128"}[wide]
    for args, blocks in launches(monkeypatch, layer, dtype, channels_last):
        kernel, _, *tensors = args
        binary = compiled(*args, **blocks)
        registers, stack, code = machine_code(binary.asm["cubin"], tmp_path)
        assert stack == 0 and not re.search(r"\b(LDL|STL)\b", code), f"{kernel.__name__} spills"
        threads = 32 * blocks.get("warps", 4)
        assert registers * threads <= 65536, "not even one program fits on a multiprocessor"
        if "BN" not in blocks:
            continue  # merges a few numbers per channel
        tile = blocks["BN"] * blocks["BC"] * blocks["BP"] * dtype.itemsize
        times = max(tile // (threads * wide), 1)
        whole = [t for t in tensors if isinstance(t, torch.Tensor) and t.dim() == 4]
        whole = [t for t in whole if t.dtype == dtype]
        stores = {"_moments_kernel": 0, "_grad_sums_kernel": 0}.get(kernel.__name__, 1)
        stores += kernel.__name__ in ("_grad_input_kernel", "_backward_kernel") and len(whole) == 4
        loads = len(whole) - stores
        found = len(re.findall(rf"\bLDG\.E{re.escape(suffix)}(?![.\w])", code))
        assert found >= times * loads, f"{kernel.__name__}: {found} loads of {wide} bytes"
        found = len(re.findall(rf"\bSTG\.E{re.escape(suffix)}(?![.\w])", code))
        assert found >= times * stores, f"{kernel.__name__}: {found} stores of {wide} bytes"


@needs_triton
def test_every_kernel_is_compiled(monkeypatch):
    from bnlib.kernels import gpu

    kernels = {name for name in vars(gpu) if name.endswith("_kernel")}
    met = set()
    for layer, dtype, channels_last, _ in CASES:
        met |= {args[0].__name__ for args, _ in launches(monkeypatch, layer, dtype, channels_last)}
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
    from bnlib.kernels import gpu

    launched = []
    monkeypatch.setattr(gpu, "supports", lambda x: True)
    monkeypatch.setattr(gpu, "_launch", lambda kernel, *args, **kwargs: launched.append(kernel))
    monkeypatch.setattr(functional, "_is_traced", lambda: False)  # the test itself records
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
def test_a_plan_covers_every_tile_once(reduce):
    from bnlib.kernels import gpu

    shapes = [(1, 1, 1), (32, 64, 3136), (2, 3, 50_000_000), (10**9, 3, 1), (7, 10**6, 1)]
    for n, c, p in [*shapes, (1, 4, 2**30)]:
        for itemsize in (2, 4):
            plan = gpu._plan(n, c, p, itemsize, reduce)
            bn, bc, bp = (plan.blocks[name] for name in ("BN", "BC", "BP"))
            assert plan.tiles == -(-n // bn) * -(-p // bp)
            assert plan.grid[0] * bc >= c > (plan.grid[0] - 1) * bc
            used = plan.grid[1] * plan.per_program
            assert used >= plan.tiles > used - plan.per_program  # no program without a tile
            assert plan.grid[1] <= (512 if reduce else 65535)
            assert (bn - 1) * c * p + bc * p + bp < 2**31  # offsets inside a tile


@needs_triton
def test_single_read_serves_most_of_resnet50():
    """At batch 32, 41 of the 53 forwards in torch's usual layout: H = W = 28, 14 and 7."""
    from bnlib.kernels import gpu

    counts = {(64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 56): 1, (128, 28): 7, (512, 28): 5}
    counts |= {(256, 28): 1, (256, 14): 11, (1024, 14): 7, (512, 14): 1, (512, 7): 5, (2048, 7): 4}
    assert sum(counts.values()) == 53
    fits = [k for (c, h), k in counts.items() if gpu._whole(32, c, h * h, 2, fused=False)]
    assert sum(fits) == 41


# --- The benchmark --------------------------------------------------------------------------------

CSV_HEADER = "date,machine,gpu,driver,torch,triton,op,layout,dtype,n,c,h,w,impl,median_us,floor_us"


@needs_triton
def test_benchmark_dry_run(tmp_path):
    """All of the benchmark but the GPU: it checks the kernels, times, and writes the CSV.

    As on a machine that has torch, triton and NumPy only.
    """
    (tmp_path / "array_api_compat.py").write_text("raise ImportError")
    arguments = ("benchmarks/gpu.py", "--dry-run", "--out", str(tmp_path / "gpu.csv"))
    code, said = python(*arguments, PYTHONPATH=str(tmp_path))
    assert code == 0, said
    for checked in (
        "results agree with float64",
        "each of the four primitives alone, and the mask, agree with float64",
        "running statistics after 1, 2 and 10 steps agree with float64",
        "torch.compile(fullgraph=True) agrees with float64",
        "autocast agrees with float64",
        "DDP, gloo, a world of one, with and without synchronising: agrees with float64",
    ):
        assert checked in said
    assert re.search(r"host, train_fwd_bwd, bnlib, compiled: \d+ us", said), said
    # The interpreter's times say nothing, but the verdicts are about the numbers beside them.
    verdicts = re.findall(r"(met|UNMET): .* at least ([\d.]+) x .* float32: ([\d.]+) over 1", said)
    assert len(verdicts) == 6
    assert all((v == "met") == (float(found) >= float(least)) for v, least, found in verdicts)
    slower = re.findall(r"UNMET: slower than eager by more than 5 %: .*: by (\d+) %", said)
    assert all(int(percent) >= 5 for percent in slower)
    assert f"slower than eager by more than 5 %: {len(slower)} of 14" in said
    assert "not measured: add_relu_fwd_bwd at least 1.0 x compile, NCHW bfloat16" in said
    text = (tmp_path / "gpu.csv").read_text()
    assert text.splitlines()[0] == CSV_HEADER
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["machine"] for row in rows} == {"dry run"}
    found = {(row["op"], row["layout"], row["impl"]) for row in rows if row["h"] == "7"}
    ops = [a + b for a in ("train", "add_relu") for b in ("_fwd", "_bwd", "_fwd_bwd")] + ["eval"]
    layouts = ("NCHW", "channels_last")
    impls = ("bnlib", "eager", "eager_nocudnn", "compile", "copy")
    assert found == set(itertools.product(ops, layouts, impls))
    assert {row["op"] for row in rows} == {*ops, "bandwidth", "resnet50_step"}
    assert all(float(row["median_us"]) > 0 for row in rows)


@needs_triton
def test_benchmark_finds_a_wrong_kernel(tmp_path):
    """Its correctness pass can fail: here, of kernels that do not see γ."""
    (tmp_path / "run.py").write_text(
        "import runpy, sys, os\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from bnlib.kernels import gpu\n"
        "right = gpu.moments_and_normalize\n"
        "gpu.moments_and_normalize = lambda x, w, *a, **k: right(x, None, *a, **k)\n"
        "sys.argv = ['gpu.py', '--dry-run']\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'gpu.py')!r}, run_name='__main__')\n"
    )
    code, said = python(str(tmp_path / "run.py"))
    assert code == 1 and "WRONG: train_fwd_bwd" in said, said


PIECES = f"""
import importlib.util, os, sys, time
os.environ["TRITON_INTERPRET"] = "1"
sys.argv = ["gpu.py", "--dry-run"]
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
    nb = nbformat.read(ROOT / "book" / "scale" / "gpu.ipynb", as_version=4)
    sources = [c.source for c in nb.cells if c.cell_type == "code"]
    (table,) = [source for source in sources if "gpu.csv" in source]
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
        names |= {"AXIS_COLORS": AXIS_COLORS, "INK": INK}
        capsys.readouterr()
        with plt.rc_context():
            use_style()
            for source in (table, plot):
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
    assert ["train_fwd_bwd", "NCHW", "float32", "4.00", "(2)", "0.50", "(1)"] in lines
    assert ["resnet50_step", "NCHW", "bfloat16", "1.25", "(1)", "–"] in lines
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert len(panels) == 4
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
from bnlib import functional, reference

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise OSError("libcuda.so.1: cannot open shared object file")

sys.meta_path.insert(0, Broken())
on_a_gpu = types.SimpleNamespace(is_cpu=False, is_cuda=True, numel=lambda: 1)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert functional._kernels(on_a_gpu, "auto") is reference
    assert functional._kernels(on_a_gpu, "auto") is reference
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
    from bnlib.kernels import gpu

    x = torch.zeros(2, 3)
    assert not gpu.supports(x)
    with pytest.raises(RuntimeError, match="expected x on a GPU, got Tensor on cpu"):
        gpu.moments(x)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
            gpu.moments(x)
    layer = functools.partial(functional.batch_norm, training=True, backend="gpu")
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with pytest.raises(ValueError, match=r"a CUDA device .*TRITON_INTERPRET=1.* on cpu"):
            call(x, None, None)
