"""Measure how fast batch norm is on a GPU; tests/gpu asks whether it is right.

One command, under eight minutes, no network, from a bare checkout:

    python benchmarks/gpu.py

It needs four packages that this Python can import: torch (with CUDA), triton, numpy and
array-api-compat; it says which are missing. It writes book/data/gpu.csv (``--out`` for another
file), one row per measurement, as they are made, and prints the rest: the copy and read bandwidths,
which kernels ran, peak memory, a summary against what is wanted of the kernels, every wish that is
not met, and the name of everything that there was no time to measure. What fails is named and left
out, and the rest is measured.

``--dry-run`` goes through all of it on the CPU with tiny shapes, the kernels in Triton's
interpreter; its times mean nothing, and it writes only where ``--out`` says.

How it measures. All implementations of one operation take turns, and every turn takes the next of
several sets of inputs; until a set comes round again, more than the L2 cache holds has been read,
so that nothing is found there by accident. The time is the GPU's own: a pause is queued first,
during which the host queues the calls, so that the host's overhead is not measured (it is printed
separately). The number is the median of the rounds.

The floor of an operation is the time to copy as many bytes as it must move, at the bandwidth of a
copy in the same run. A tensor that exceeds the L2 cache must be read once for the statistics and
once again to be normalised; one that fits must be read once.

torch.compile compiles for every shape anew, since code for all shapes is slower. That takes seconds
each: other processes do it in advance, and leave the result in a cache on the disk; what they
choose by timing is forgotten, and chosen again undisturbed.

The most wanted comes first: forward and backward of training, alone and with addition and ReLU, of
all implementations and shapes. Then the other operations, then more of the whole network.

Two kinds of rows are different: "bandwidth" is the time for 10⁹ bytes (copied: read plus written),
and "resnet50_step" is the wall time of a training step of the whole network, in float32 or under
autocast to bfloat16, the host's part included, with no floor.
"""

from __future__ import annotations

import argparse
import atexit
import csv
import datetime
import itertools
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COLUMNS = ("date", "machine", "gpu", "driver", "torch", "triton", "op", "layout", "dtype")
COLUMNS += ("n", "c", "h", "w", "impl", "median_us", "floor_us")
BATCHES = (256, 32)
LAYOUTS = ("NCHW", "channels_last")
OPS = (
    "train_fwd",
    "train_bwd",
    "train_fwd_bwd",
    "eval",
    "add_relu_fwd",
    "add_relu_bwd",
    "add_relu_fwd_bwd",
)
# Passes over the tensor that must be made if it is read twice, and if once; and over the mask.
PASSES = {
    "train_fwd": (3, 2, 0),
    "train_bwd": (5, 3, 0),
    "train_fwd_bwd": (8, 5, 0),
    "eval": (2, 2, 0),
    "add_relu_fwd": (4, 3, 1),
    "add_relu_bwd": (6, 4, 1),
    "add_relu_fwd_bwd": (10, 7, 2),
}
WANTED_OPS = ("train_fwd_bwd", "add_relu_fwd_bwd")
# The least geometric mean of (time of the other) / (time of bnlib).
WANTED = {("train_fwd_bwd", "eager"): 1.2, ("add_relu_fwd_bwd", "eager"): 1.5}
WANTED |= {("add_relu_fwd_bwd", "compile"): 1.0}
WANTED_FLOOR, LARGE = 0.8, 100e6  # the least share of the floor, for tensors of so many bytes
WANTED_ANYWHERE = 1 / 1.05  # the least ratio to eager, for any shape
EPS = 1e-5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the CSV file (default: book/data/gpu.csv)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--seconds", type=float, default=430, help="start nothing new after this")
    parser.add_argument(
        "--ahead-seconds",
        type=float,
        default=110,
        help="until when other processes compile ahead (0: they do not)",
    )
    parser.add_argument(
        "--compile-seconds",
        type=float,
        default=150,
        help="how long torch.compile may take in this process, besides",
    )
    parser.add_argument(
        "--serial",
        action="store_true",
        help="time the library's former loop too, as bnlib_serial (needs --out: the book has no "
        "place for it)",
    )
    parser.add_argument(
        "--machine",
        help="what to call the machine in the CSV (default: the GPU's name and the CPU's cores)",
    )
    arguments = parser.parse_args()
    if arguments.serial and arguments.out is None:
        parser.error("--serial needs --out")
    return arguments


def import_or_explain(dry_run: bool) -> None:
    """Import what is needed, or exit with the list of what is missing."""
    missing = []
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    for module, package in (
        ("numpy", "numpy"),
        ("torch", "torch, with CUDA"),
        ("triton", "triton"),
        ("array_api_compat", "array-api-compat"),
    ):
        try:
            __import__(module)
        except ImportError:
            missing.append(package)
    if missing:
        sys.exit(f"benchmarks/gpu.py: missing in {sys.executable}: {'; '.join(missing)}")
    import torch

    if not dry_run and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch finds no CUDA device (--dry-run does without)")


def own_caches() -> None:
    """Let this run and the processes that compile ahead share empty caches of compiled code."""
    if __name__ == "__mp_main__":  # one of those processes
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        return
    folder = tempfile.mkdtemp(prefix="bnlib-gpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")


ARGS = parse()
own_caches()
import_or_explain(ARGS.dry_run)

import serial  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from resnet50 import SHAPES, ResNet50  # noqa: E402

import bnlib.nn  # noqa: E402
from bnlib import functional  # noqa: E402
from bnlib.kernels.gpu import kernels  # noqa: E402

DEVICE = "cpu" if ARGS.dry_run else "cuda"
ROUNDS = 1 if ARGS.dry_run else 9
START = time.perf_counter()
RESNET50_BATCH = (2, 32) if ARGS.dry_run else (128, 224)  # images, height and width
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def elapsed() -> float:
    return time.perf_counter() - START


def say(text: str) -> None:
    print(f"[{elapsed():5.0f} s] {text}", flush=True)


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# --- The operations -------------------------------------------------------------------------------


def layer_bnlib(x, w, b, stats, training, residual):
    activation = None if residual is None else "relu"
    fused = {"residual": residual, "activation": activation, "backend": "gpu"}
    return functional.batch_norm(x, *stats, w, b, training, 0.1, EPS, **fused)


def layer_serial(*arguments):
    """The layer with the reduction that asks for a tile when it needs it, see serial.py."""
    ours, kernels.moments_kernel = kernels.moments_kernel, serial.moments_kernel
    try:
        return layer_bnlib(*arguments)
    finally:
        kernels.moments_kernel = ours


def layer_eager(x, w, b, stats, training, residual):
    y = torch.nn.functional.batch_norm(x, *stats, w, b, training, 0.1, EPS)
    return y if residual is None else torch.relu(y + residual)


def layer_eager_nocudnn(*arguments):
    with torch.backends.cudnn.flags(enabled=False):
        return layer_eager(*arguments)


def layer_copy(x, w, b, stats, training, residual):
    return x.detach().clone()


LAYERS = {"bnlib": layer_bnlib, "eager": layer_eager, "eager_nocudnn": layer_eager_nocudnn}
LAYERS |= {"compile": layer_eager, "copy": layer_copy}  # compiled for every kind of tensor
if ARGS.serial:
    LAYERS["bnlib_serial"] = layer_serial


class Inputs:
    """One set of tensors for a layer; gradients are taken of all that eager takes them of."""

    def __init__(self, n, c, h, dtype, layout, seed):
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def draw():
            t = torch.empty((n, c, h, h), dtype=dtype, device=DEVICE, memory_format=memory)
            return t.normal_(generator=generator)

        self.x, self.residual = draw().requires_grad_(), draw().requires_grad_()
        self.dy = draw()
        self.w = torch.rand(c, device=DEVICE, generator=generator).requires_grad_()
        self.b = torch.rand(c, device=DEVICE, generator=generator).requires_grad_()
        self.stats = [torch.zeros(c, device=DEVICE), torch.ones(c, device=DEVICE)]

    def forward(self, layer, op, stats=None):
        stats = self.stats if stats is None else stats
        training = op != "eval"
        residual = self.residual if op.startswith("add") else None
        if op == "eval":
            with torch.no_grad():
                return layer(self.x, self.w, self.b, stats, training, residual)
        return layer(self.x, self.w, self.b, stats, training, residual)

    def backward(self, y, op, retain=False):
        leaves = [self.x, self.w, self.b] + [self.residual] * op.startswith("add")
        return torch.autograd.grad(y, leaves, self.dy, retain_graph=retain)


def call(name, layer, inputs, op):
    """Return a function that does ``op`` once; what it need not do has been done before."""
    if name == "copy" or op == "eval" or op.endswith("_fwd"):
        return lambda: inputs.forward(layer, op)
    if op.endswith("fwd_bwd"):
        return lambda: inputs.backward(inputs.forward(layer, op), op)
    # Running statistics of its own: torch's backward refuses those that another forward has moved.
    y = inputs.forward(layer, op, [v.clone() for v in inputs.stats])
    return lambda: inputs.backward(y, op, retain=True)


# --- Timing ---------------------------------------------------------------------------------------


def warm_up(functions):
    """Call what will be timed, and wait: the first call compiles, and an error shows here."""
    for function in functions[:1] if ARGS.dry_run else functions[:1] + functions[:2]:
        function()
    sync()


def time_in_turns(calls):
    """Return the median time in µs of every named list of functions, taking turns.

    Every turn takes the next function of a list, each of which has buffers of its own: on the same
    buffers, the second implementation would find in the cache what the first has read.
    """
    times = {name: [] for name in calls}
    turn = itertools.count()
    cycles = 5_000_000  # of a pause: 2.5 ms or more
    for _ in range(ROUNDS):
        if DEVICE == "cpu":
            for name, functions in calls.items():
                start = time.perf_counter()
                functions[next(turn) % len(functions)]()
                times[name].append(1e6 * (time.perf_counter() - start))
            continue
        events = {}
        torch.cuda._sleep(cycles)  # for the host to queue what follows
        start = time.perf_counter()
        for name, functions in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            functions[next(turn) % len(functions)]()
            end.record()
            events[name] = begin, end
        # A slow host gets a longer pause: 3e9 cycles a second are more than GPUs have.
        cycles = max(cycles, int(3e9 * (time.perf_counter() - start)))
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            times[name].append(1e3 * begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def bandwidths():
    """Return (copy, read) in bytes per µs, for tensors far beyond the L2 cache."""
    size = 1 << (16 if ARGS.dry_run else 30)
    x, y = (torch.ones(size // 4, device=DEVICE) for _ in range(2))
    x.normal_()
    calls = {"copy": [lambda: y.copy_(x)], "read": [lambda: x.sum()]}
    for functions in calls.values():
        warm_up(functions)
    times = time_in_turns(calls)
    say(
        f"copy {2 * size / times['copy'] / 1e6:.3f} TB/s (read + written), "
        f"read {size / times['read'] / 1e6:.3f} TB/s (torch.sum)"
    )
    return 2 * size / times["copy"], size / times["read"]


def l2_bytes():
    return 0 if DEVICE == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size


def floor_us(op, numel, itemsize, bytes_per_us):
    twice, once, mask = PASSES[op]
    size = numel * itemsize
    passes = twice if size > l2_bytes() else once
    if op.startswith("add") and op != "add_relu_fwd" and size > l2_bytes():
        mask += 1  # the backward's second read needs the mask again
    return (passes * size + mask * numel / 8) / bytes_per_us


def compiled(function, **options):
    """torch.compile, for one shape and dtype; what was compiled before is forgotten."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward is timed again and again
    backend = "aot_eager" if ARGS.dry_run else "inductor"
    return torch.compile(function, dynamic=False, backend=backend, **options)


# --- Compiling ahead, in other processes ----------------------------------------------------------


def compile_ahead():
    """Do it, until the end or until the time is over."""
    if ARGS.dry_run or ARGS.ahead_seconds <= 0:
        return
    memory = torch.cuda.get_device_properties(0).total_memory
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 3, memory // (12 << 30)))
    try:
        pool = multiprocessing.get_context("spawn").Pool(workers)
    except OSError as error:  # a machine without shared memory, say
        say(f"nothing is compiled ahead: {brief(error)}")
        return
    jobs = [(step_ahead, (layout,)) for layout in LAYOUTS]
    jobs += [(layer_ahead, (case, WANTED_OPS)) for case in cases()]
    jobs += [(layer_ahead, (case, ("eval",))) for case in cases()]
    results = [pool.apply_async(*job) for job in jobs]

    while elapsed() < ARGS.ahead_seconds and not all(r.ready() for r in results):
        time.sleep(0.2)
    done = [r for r in results if r.ready()]
    errors = [error for error in (r.get() for r in done if r.successful()) if error]
    errors += ["did not run" for r in done if not r.successful()]
    pool.terminate()
    pool.join()
    # What was chosen by timing while others used the GPU is not to be trusted.
    for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
        path.unlink(missing_ok=True)
    say(
        f"{workers} processes compiled ahead: {len(done) - len(errors)} of {len(jobs)} jobs"
        + "".join(f"\n  failed: {error}" for error in sorted(set(errors))[:5])
    )


def layer_ahead(case, ops):
    """Leave in the cache what one kind of tensor needs; return None, or what went wrong."""
    torch.set_num_threads(1)
    try:
        (c, h), dtype, layout, n = case
        inputs = Inputs(n, c, h, DTYPES[dtype], layout, seed=0)
        compiled_layer = compiled(layer_eager, fullgraph=True)
        for op in ops:
            for layer in (compiled_layer, layer_bnlib):
                call("", layer, inputs, op)()
        return None
    except Exception as error:
        return brief(error)
    finally:
        inputs = None
        torch.cuda.empty_cache()


def step_ahead(layout):
    torch.set_num_threads(1)
    try:
        resnet50_step("compile", layout, "bfloat16")()
        return None
    except Exception as error:
        return brief(error)
    finally:
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def cases():
    """((C, H), dtype, layout, N) of every kind of tensor; shapes that differ most come first."""
    if ARGS.dry_run:
        return list(itertools.product([(2, 3)], ["float32"], LAYOUTS, [2]))
    first = [(256, 56), (2048, 7), (64, 112), (512, 28), (1024, 14)]
    shapes = first + [shape for shape in SHAPES if shape not in first]
    return list(itertools.product(shapes, DTYPES, LAYOUTS, BATCHES))


def attempt(checks):
    """Run what the measurements can do without; return the errors."""
    errors = []
    for one in checks:
        try:
            one()
        except Exception as error:
            errors.append(f"{one.__name__}: {brief(error)}")
            say(f"FAILED: {errors[-1]}")
    return errors


# --- What is measured -----------------------------------------------------------------------------


class Compiling:
    """How long torch.compile has taken in this process."""

    seconds = 0.0


def measure_layers(write, copy_rate, ops):
    """Some operations, for all kinds of tensors; what is not measured is reported by name."""
    missed, without = [], []
    for case in cases():
        (c, h), dtype, layout, n = case
        if elapsed() > ARGS.seconds:
            missed.append(case)
            continue
        layers = dict(LAYERS)
        if Compiling.seconds > ARGS.compile_seconds:
            layers.pop("compile", None)
        try:
            measured = measure_configuration(write, copy_rate, layers, n, c, h, dtype, layout, ops)
            if not measured:
                without.append(case)
        except Exception as error:  # lack of memory, or a bug: the other cases are measured
            say(f"not measured: {(n, c, h, h)} {dtype} {layout}: {brief(error)}")
            missed.append(case)
            sync()  # fails if the device itself is lost: then nothing more can be measured
            torch.cuda.empty_cache()
    print_missed(f"not measured, {', '.join(ops)}", missed)
    print_missed(f"measured without torch.compile, {', '.join(ops)}", without)


def print_missed(what, missed):
    groups = {}
    for (c, h), dtype, layout, n in missed:
        groups.setdefault((dtype, layout), []).append(f"{n}x{c}x{h}x{h}")
    for (dtype, layout), shapes in groups.items():
        say(f"{what}: {dtype} {layout}: {', '.join(shapes)}")


def measure_configuration(write, copy_rate, layers, n, c, h, dtype, layout, ops):
    """Some operations on one kind of tensor; returns whether torch.compile was among them."""
    numel, itemsize = n * c * h * h, DTYPES[dtype].itemsize
    # Until a set's turn comes again, the inputs of all others have been read.
    sets = max(2, 1 + math.ceil(l2_bytes() / (numel * itemsize)))
    inputs = [Inputs(n, c, h, DTYPES[dtype], layout, seed) for seed in range(sets)]
    if "compile" in layers:
        layers["compile"] = compiled(layer_eager, fullgraph=True)
    for op in ops:
        calls = {}
        for name, layer in list(layers.items()):
            begin = time.perf_counter()
            try:
                functions = [call(name, layer, one, op) for one in inputs]
                warm_up(functions)
                calls[name] = functions
            except Exception as error:  # of one implementation: the others are measured
                say(f"{name} failed: {op} {(n, c, h, h)} {dtype} {layout}: {brief(error)}")
                sync()  # fails if the device itself is lost
                if name == "compile":  # and would fail again, slowly
                    del layers[name]
            if name == "compile":
                Compiling.seconds += time.perf_counter() - begin
        floor = floor_us(op, numel, itemsize, copy_rate)
        for name, median in time_in_turns(calls).items():
            bound = 2 * numel * itemsize / copy_rate if name == "copy" else floor
            write(op, layout, dtype, n, c, h, h, name, median, bound)
    return "compile" in layers


def resnet50_step(name, layout, dtype):
    """Return a function that does a training step of the whole network."""
    n, side = RESNET50_BATCH
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = ResNet50(width=4 if ARGS.dry_run else 64).to(DEVICE, memory_format=memory)
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert norms == sum(SHAPES.values())
    if name == "bnlib":
        model = bnlib.nn.convert_batch_norm(model)
        assert sum(isinstance(m, bnlib.nn.BatchNorm2d) for m in model.modules()) == norms
    optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    if name == "compile":
        model = compiled(model)
    images = torch.randn(n, 3, side, side, device=DEVICE).contiguous(memory_format=memory)
    labels = torch.randint(1000, (n,), device=DEVICE)

    def step():
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()

    return step


def measure_resnet50(write, names, dtype, needed=0.0):
    """A training step of the whole network; its peak memory is printed."""
    n, side = RESNET50_BATCH
    for layout in LAYOUTS:
        if elapsed() + needed > ARGS.seconds:
            say(f"not measured: resnet50_step, {dtype} {layout}, {', '.join(names)}")
            continue
        calls, peaks, hosts = {}, {}, {}
        try:
            for name in names:
                step = resnet50_step(name, layout, dtype)
                if DEVICE == "cuda":
                    step()
                    step()
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    begin = time.perf_counter()
                    step()
                    hosts[name] = time.perf_counter() - begin
                    torch.cuda.synchronize()
                    peaks[name] = torch.cuda.max_memory_allocated() - before
                calls[name] = [step]
            if DEVICE == "cpu":  # the interpreter would take minutes: eager, to see that it runs
                calls["bnlib"] = []
            for name, median in time_wall(calls).items():
                write("resnet50_step", layout, dtype, n, 3, side, side, name, median, math.nan)
        except Exception as error:  # lack of memory, or torch.compile's: the rest is measured
            say(f"not measured: resnet50_step, {dtype} {layout}: {brief(error)}")
        for name, peak in peaks.items():
            say(
                f"ResNet-50 {dtype} {layout} {name}: {peak / 2**30:.2f} GiB above the model at the "
                f"peak, {1e3 * hosts[name]:.1f} ms for the host to queue one step"
            )
        del calls
        sync()


def time_wall(calls):
    """Return the median wall time in µs of whole steps, in turns, the host's part included."""
    times = {name: [] for name, functions in calls.items() if functions}
    for _ in range(1 if ARGS.dry_run else 7):
        for name, values in times.items():
            sync()
            start = time.perf_counter()
            for _ in range(1 if ARGS.dry_run else 4):
                calls[name][0]()
            sync()
            values.append(1e6 * (time.perf_counter() - start) / (1 if ARGS.dry_run else 4))
    return {name: statistics.median(values) for name, values in times.items()}


def print_host_overhead():
    """How long the host needs to queue one call: what a small layer costs without a CUDA graph."""
    shape = (2, 2, 3) if ARGS.dry_run else (32, 512, 7)
    inputs = Inputs(*shape, torch.bfloat16, "NCHW", seed=0)
    layers = {"bnlib": layer_bnlib, "eager": layer_eager}
    layers["bnlib, compiled"] = compiled(layer_bnlib, fullgraph=True)
    for name, layer in layers.items():
        try:
            function = call(name, layer, inputs, "train_fwd_bwd")
            function()
            times = []
            for _ in range(1 if ARGS.dry_run else 50):
                sync()
                start = time.perf_counter()
                function()
                times.append(1e6 * (time.perf_counter() - start))
            sync()
            said = f"{statistics.median(times):.0f} us a call"
        except Exception as error:  # whatever torch.compile cannot do, the rest is measured
            said = f"unknown, {brief(error)}"
        say(f"host, train_fwd_bwd, {name}: {said}")


def print_kernels():
    """Which kernels ran, from the profiler."""
    if DEVICE == "cpu":
        return
    from torch.profiler import ProfilerActivity, profile

    for layout, dtype in itertools.product(LAYOUTS, ("bfloat16", "float32")):
        inputs = Inputs(32, 256, 56, DTYPES[dtype], layout, seed=0)
        layers = LAYERS | {"compile": compiled(layer_eager, fullgraph=True)}
        for op, name in itertools.product(
            WANTED_OPS, ("bnlib", "eager", "eager_nocudnn", "compile")
        ):
            try:
                function = call(name, layers[name], inputs, op)
                function()
                torch.cuda.synchronize()
                with profile(activities=[ProfilerActivity.CUDA]) as trace:
                    function()
                    torch.cuda.synchronize()
                names = [event.key[:60] for event in trace.key_averages()]
                say(f"kernels, {op} {layout} {dtype} {name}: {', '.join(names)}")
            except Exception as error:  # a profiler that is not allowed, or torch.compile
                say(f"kernels, {op} {layout} {dtype} {name}: unknown, {brief(error)}")


def print_summary(rows):
    """Geometric means of eager's and compile's time over ours, the worst, and the floor's share;
    then what is wanted, and every wish that is not met.
    """
    table = {}
    for row in rows:
        key = tuple(row[column] for column in ("op", "layout", "dtype", "n", "c", "h"))
        table.setdefault(key, {})[row["impl"]] = (row["median_us"], row["floor_us"])
    say("times over ours: geometric mean (least); share of the floor: least, tensors over 100 MB")
    for op, layout, dtype in itertools.product(OPS, LAYOUTS, DTYPES):
        cells = {k: v for k, v in table.items() if k[:3] == (op, layout, dtype) and "bnlib" in v}
        if not cells:
            continue
        parts = []
        for other in ("eager", "eager_nocudnn", "compile", "bnlib_serial"):
            ratios = [v[other][0] / v["bnlib"][0] for v in cells.values() if other in v]
            if ratios:
                parts.append(f"{other} {statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f})")
        large = [
            v["bnlib"][1] / v["bnlib"][0]
            for (*_, n, c, h), v in cells.items()
            if n * c * h * h * DTYPES[dtype].itemsize > LARGE
        ]
        if large:
            parts.append(f"floor {100 * min(large):.0f} %")
        print(f"  {op:17} {layout:13} {dtype:9} " + "  ".join(parts))
    print_wishes(table)


def print_wishes(table):
    """What is wanted of the kernels, line by line; ``table`` is print_summary's."""
    say("what is wanted")
    for (op, other), least in WANTED.items():
        for layout, dtype in itertools.product(LAYOUTS, DTYPES):
            ratios = [
                v[other][0] / v["bnlib"][0]
                for k, v in table.items()
                if k[:3] == (op, layout, dtype) and "bnlib" in v and other in v
            ]
            what = f"{op} at least {least:.1f} x {other}, {layout} {dtype}"
            if not ratios:
                print(f"  not measured: {what}")
                continue
            mean = statistics.geometric_mean(ratios)
            verdict = "met" if mean >= least else "UNMET"
            print(f"  {verdict}: {what}: {mean:.2f} over {len(ratios)} shapes")
    slower = share = compared = large = 0
    for (op, layout, dtype, n, c, h), times in sorted(table.items()):
        if op not in OPS or "bnlib" not in times:
            continue
        ours, floor = times["bnlib"]
        what = f"{op} {n}x{c}x{h}x{h} {layout} {dtype}"
        if "eager" in times:
            compared += 1
            if times["eager"][0] / ours < WANTED_ANYWHERE:
                slower += 1
                more = 100 * (ours / times["eager"][0] - 1)
                print(f"  UNMET: slower than eager by more than 5 %: {what}: by {more:.0f} %")
        if n * c * h * h * DTYPES[dtype].itemsize > LARGE:
            large += 1
            if floor / ours < WANTED_FLOOR:
                share += 1
                print(f"  UNMET: below 80 % of the floor: {what}: {100 * floor / ours:.0f} %")
    print(f"  slower than eager by more than 5 %: {slower} of {compared}")
    print(f"  below 80 % of the floor, of tensors above 100 MB: {share} of {large}")


def driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    except OSError:
        return ""


def main():
    out = ARGS.out
    if out is None and not ARGS.dry_run:
        out = ROOT / "book" / "data" / "gpu.csv"
    name = "none" if DEVICE == "cpu" else torch.cuda.get_device_name()
    machine = ARGS.machine or f"{name}, {len(os.sched_getaffinity(0))} CPU cores"
    constants = {
        "date": datetime.date.today().isoformat(),
        "machine": "dry run" if ARGS.dry_run else machine,
        "gpu": name,
        "driver": "none" if DEVICE == "cpu" else driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    say(", ".join(f"{key} {value}" for key, value in constants.items()))
    rows = []

    def write(*values):
        """Keep a row, and append it to the file: it stays, whatever happens to the rest."""
        row = constants | dict(zip(COLUMNS[6:], values, strict=True))
        rows.append(row)
        if out is None:
            return
        numbers = {key: f"{row[key]:.2f}" for key in ("median_us", "floor_us")}
        if math.isnan(row["floor_us"]):
            numbers["floor_us"] = ""
        with out.open("w" if len(rows) == 1 else "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if len(rows) == 1:
                writer.writeheader()
            writer.writerow(row | numbers)

    compile_ahead()
    copy_rate, read_rate = bandwidths()
    for impl, rate in (("copy", copy_rate), ("read", read_rate)):
        # A bandwidth as the other rows are, a time: that of 10⁹ bytes.
        write("bandwidth", "NCHW", "float32", 1, 1, 1, 1, impl, 1e9 / rate, 1e9 / rate)
    errors = attempt([print_host_overhead])
    try:
        measure_resnet50(write, ("bnlib", "eager"), "bfloat16")
        say(f"the layers: {', '.join(WANTED_OPS)}")
        measure_layers(write, copy_rate, WANTED_OPS)
        errors += attempt([print_kernels])  # the profiler may slow down what follows
        others = tuple(op for op in OPS if op not in WANTED_OPS)
        say(f"the layers: {', '.join(others)}")
        measure_layers(write, copy_rate, others)
        say("more of the whole network")
        measure_resnet50(write, ("bnlib", "eager"), "float32")
        if not ARGS.dry_run:  # a minute each, if it has not been compiled ahead
            measure_resnet50(write, ("compile",), "bfloat16", needed=40)
            measure_resnet50(write, ("compile",), "float32", needed=90)
    finally:
        say(f"{len(rows)} rows" + ("" if out is None else f" written to {out}"))
        print_summary(rows)
    say(f"done; torch.compile took {Compiling.seconds:.0f} s in this process")
    if errors:
        sys.exit("Could not be done: " + "; ".join(errors))


if __name__ == "__main__":
    main()
