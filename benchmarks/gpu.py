"""Measure batch norm on a GPU: first that the kernels are right, then how fast they are.

One command, under eight minutes, no network, from a bare checkout:

    python benchmarks/gpu.py

It needs torch with CUDA, triton, NumPy and array-api-compat, and prints what is missing. It writes
book/data/gpu.csv (``--out`` for another file), one row per measurement, and prints the rest: the
copy and read bandwidths, determinism, which kernels ran, peak memory, and a summary.

``--dry-run`` goes through all of it on the CPU with tiny shapes, the kernels in Triton's
interpreter; its times mean nothing, and it writes only where ``--out`` says.

How it measures. All implementations of one operation take turns; the inputs rotate among several
sets that together exceed the L2 cache, so that nothing is found there by accident. The time is the
GPU's own: a pause is queued first, during which the host queues the calls, so that the host's
overhead is not measured (it is printed separately). The number is the median of the rounds.

The floor of an operation is the time to copy as many bytes as it must move, at the bandwidth of a
copy in the same run. A tensor that exceeds the L2 cache must be read once for the statistics and
once again to be normalised; one that fits must be read once.

Two kinds of rows are different: "bandwidth" is the time for 10⁹ bytes (copied: read plus written),
and "resnet50_step" is the wall time of a training step of the whole network under autocast, the
host's part included, with no floor.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COLUMNS = ("date", "machine", "gpu", "driver", "torch", "triton", "op", "layout", "dtype")
COLUMNS += ("n", "c", "h", "w", "impl", "median_us", "floor_us")
# The shapes of ResNet-50's 53 batch norms: (C, H = W), and how many layers have it.
RESNET50 = {(64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 56): 1, (128, 28): 7, (512, 28): 5}
RESNET50 |= {(256, 28): 1, (256, 14): 11, (1024, 14): 7, (512, 14): 1, (512, 7): 5, (2048, 7): 4}
BATCHES = (256, 32)
LAYOUTS = ("contiguous", "channels_last")
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
ROUNDS = 9
EPS = 1e-5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the CSV file (default: book/data/gpu.csv)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--seconds", type=float, default=420, help="start nothing new after this")
    parser.add_argument(
        "--compile-seconds", type=float, default=120, help="the part of it for torch.compile"
    )
    parser.add_argument("--machine", default="", help="what to call the machine in the CSV")
    return parser.parse_args()


def import_or_explain(dry_run: bool) -> None:
    """Import what is needed, or exit with the list of what is missing."""
    missing = []
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    for module, package in (
        ("numpy", "numpy"),
        ("array_api_compat", "array-api-compat"),
        ("torch", "torch, with CUDA"),
        ("triton", "triton"),
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


ARGS = parse()
import_or_explain(ARGS.dry_run)

import torch  # noqa: E402
import triton  # noqa: E402

import bnlib.nn  # noqa: E402
from bnlib import functional, reference  # noqa: E402

DEVICE = "cpu" if ARGS.dry_run else "cuda"
START = time.perf_counter()
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def elapsed() -> float:
    return time.perf_counter() - START


def say(text: str) -> None:
    print(f"[{elapsed():5.0f} s] {text}", flush=True)


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# --- The operations -------------------------------------------------------------------------------


def layer_bnlib(x, w, b, stats, training, residual):
    activation = None if residual is None else "relu"
    fused = {"residual": residual, "activation": activation, "backend": "gpu"}
    return functional.batch_norm(x, *stats, w, b, training, 0.1, EPS, **fused)


def layer_eager(x, w, b, stats, training, residual):
    y = torch.nn.functional.batch_norm(x, *stats, w, b, training, 0.1, EPS)
    return y if residual is None else torch.relu(y + residual)


def layer_eager_nocudnn(*arguments):
    with torch.backends.cudnn.flags(enabled=False):
        return layer_eager(*arguments)


def layer_copy(x, w, b, stats, training, residual):
    return x.detach().clone()


LAYERS = {"bnlib": layer_bnlib, "eager": layer_eager, "copy": layer_copy}
if not ARGS.dry_run:
    LAYERS["eager_nocudnn"] = layer_eager_nocudnn
    LAYERS["compile"] = layer_eager  # compiled for every configuration, see compiled_layer


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

    def forward(self, layer, op):
        training = op != "eval"
        residual = self.residual if op.startswith("add") else None
        if op == "eval":
            with torch.no_grad():
                return layer(self.x, self.w, self.b, self.stats, training, residual)
        return layer(self.x, self.w, self.b, self.stats, training, residual)

    def backward(self, y, op, retain=False):
        leaves = [self.x, self.w, self.b] + [self.residual] * op.startswith("add")
        return torch.autograd.grad(y, leaves, self.dy, retain_graph=retain)


def call(name, layer, inputs, op):
    """Return a function that does ``op`` once; what it need not do has been done before."""
    if name == "copy" or op == "eval" or op.endswith("_fwd"):
        return lambda: inputs.forward(layer, op)
    if op.endswith("fwd_bwd"):
        return lambda: inputs.backward(inputs.forward(layer, op), op)
    y = inputs.forward(layer, op)
    return lambda: inputs.backward(y, op, retain=True)


# --- Timing ---------------------------------------------------------------------------------------


def time_in_turns(calls):
    """Return the median time in µs of every named list of functions, taking turns."""
    for functions in calls.values():
        for function in functions[:1] + functions:  # the first compiles
            function()
    sync()
    times = {name: [] for name in calls}
    for turn in range(1 if ARGS.dry_run else ROUNDS):
        if DEVICE == "cpu":
            for name, functions in calls.items():
                start = time.perf_counter()
                functions[turn % len(functions)]()
                times[name].append(1e6 * (time.perf_counter() - start))
            continue
        events = {}
        torch.cuda._sleep(8_000_000)  # cycles: 4 ms or more, for the host to queue what follows
        for name, functions in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            functions[turn % len(functions)]()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            times[name].append(1e3 * begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def bandwidths():
    """Return (copy, read) in bytes per µs, for tensors far beyond the L2 cache."""
    size = 1 << (16 if ARGS.dry_run else 30)
    x, y = (torch.ones(size // 4, device=DEVICE) for _ in range(2))
    x.normal_()
    times = time_in_turns({"copy": [lambda: y.copy_(x)], "read": [lambda: x.sum()]})
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


def compiled_layer():
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward is timed again and again
    return torch.compile(layer_eager, fullgraph=True, dynamic=False)


# --- Are they right? ------------------------------------------------------------------------------


def check():
    """Compare all kernels on the device with float64; exit if one is wrong."""
    shapes = [(4, 6, 7), (3, 5, 9)]
    if not ARGS.dry_run:
        shapes = [(32, c, h) for c, h in RESNET50] + [(256, 64, 56), (2, 3, 224), (1, 17, 31)]
        shapes += [(5, 1023, 1), (64, 13, 2), (256, 512, 7), (2, 8, 1024)]
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    worst = dict.fromkeys(DTYPES, 0.0)
    count = 0
    for (n, c, h), (name, dtype), layout, offset in itertools.product(
        shapes, DTYPES.items(), LAYOUTS, (0.0, 1000.0)
    ):
        if offset and dtype != torch.float32:
            continue
        inputs = Inputs(n, c, h, dtype, layout, seed=n + c + h)
        with torch.no_grad():
            inputs.x += offset
        for op in ("train_fwd_bwd", "add_relu_fwd_bwd", "eval"):
            for stats in inputs.stats:
                stats.fill_(1.0)
            y = inputs.forward(layer_bnlib, op)
            got = [y] if op == "eval" else [y, *inputs.backward(y, op)]
            expected = expect(inputs, op, y)
            for one, other in zip(got, expected, strict=True):
                error = ((one.double() - other).norm() / other.norm()).item()
                limit = tolerance[dtype] * (20 if offset else 1)
                if not error <= limit:
                    sys.exit(f"WRONG: {op} {(n, c, h)} {name} {layout} +{offset}: {error:.3g}")
                worst[name] = max(worst[name], error if not offset else 0.0)
                count += 1
    say(f"{count} results agree with float64; worst relative errors " + str(worst))


def expect(inputs, op, y):
    """Output and gradients in float64; where ReLU cuts off is taken from ``y``."""
    x, residual, dy = inputs.x.double(), inputs.residual.double(), inputs.dy.double()
    w, b = inputs.w.double(), inputs.b.double()
    if op == "eval":
        ones = torch.ones_like(w)
        running = {"running_mean": ones, "running_var": ones, "training": False}
        return [reference.batch_norm_forward(x, w, b, **running, eps=EPS)[0]]
    out, cache = reference.batch_norm_forward(x, w, b, eps=EPS)
    if not op.startswith("add"):
        return [out, *reference.batch_norm_backward(dy, cache)]
    dy = torch.where(y > 0, dy, 0)
    return [(out + residual).relu(), *reference.batch_norm_backward(dy, cache), dy]


def check_large():
    """A tensor of more than 2³¹ elements, looked at in its first, middle and last channel."""
    if ARGS.dry_run or torch.cuda.mem_get_info()[0] < 40 << 30:
        say("more than 2**31 elements: not checked, for lack of 40 GB of memory")
        return
    for shape in ((5, 2**19, 1024), (2**20 + 3, 2100)):
        x = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
        y = functional.batch_norm(x, None, None, training=True, backend="gpu")
        (dx,) = torch.autograd.grad(y, x, x.detach())
        for channel in (0, shape[1] // 2, shape[1] - 1):
            one = x.detach()[:, channel : channel + 1].double()
            wanted, cache = reference.batch_norm_forward(one, eps=EPS)
            dwanted = reference.batch_norm_backward(one, cache).dx
            error = (y[:, channel : channel + 1] - wanted).abs().max().item()
            derror = (dx[:, channel : channel + 1] - dwanted).abs().max().item()
            if not max(error, derror) < 0.05:
                sys.exit(f"WRONG: {shape}, channel {channel}: {error:.3g}, {derror:.3g}")
        del x, y, dx
    torch.cuda.empty_cache()
    say("tensors of more than 2**31 elements agree with float64")


def check_determinism():
    for layout in LAYOUTS:
        shape = (2, 3, 5) if ARGS.dry_run else (64, 256, 56)
        inputs = Inputs(*shape, torch.bfloat16, layout, seed=0)
        runs = []
        for _ in range(2 if ARGS.dry_run else 5):
            y = inputs.forward(layer_bnlib, "add_relu_fwd_bwd")
            runs.append([y, *inputs.backward(y, "add_relu_fwd_bwd")])
        for run in runs[1:]:
            if not all(map(torch.equal, runs[0], run)):
                sys.exit(f"WRONG: two runs differ ({layout})")
    say("the same input gives the same bits, every time")


def check_graph():
    """The layer inside a CUDA graph, replayed with other data."""
    if DEVICE == "cpu":
        return
    n, c, h = 32, 64, 56
    first, second = (Inputs(n, c, h, torch.bfloat16, "contiguous", seed) for seed in (0, 1))
    with torch.no_grad():
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            first.forward(layer_bnlib, "add_relu_fwd")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = first.forward(layer_bnlib, "add_relu_fwd")
        first.x.copy_(second.x)
        first.residual.copy_(second.residual)
        first.w.copy_(second.w)
        first.b.copy_(second.b)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(y, second.forward(layer_bnlib, "add_relu_fwd")):
            sys.exit("WRONG: a CUDA graph's replay differs from a call")
    say("a CUDA graph's replay gives what a call gives")


# --- What is measured -----------------------------------------------------------------------------


def measure_layers(write, copy_rate):
    """All operations, shapes, layouts and dtypes; torch.compile as far as its time goes."""
    shapes = list(RESNET50) if not ARGS.dry_run else [(6, 7)]
    batches = BATCHES if not ARGS.dry_run else (4,)
    dtypes = list(DTYPES) if not ARGS.dry_run else ["float32"]
    compile_left = ARGS.compile_seconds
    skipped = without_compile = 0
    # torch.compile's time goes to the shapes that differ most; they come first.
    first = [(256, 56), (2048, 7), (64, 112), (512, 28), (1024, 14)]
    shapes.sort(key=lambda shape: first.index(shape) if shape in first else len(first))
    for (c, h), dtype, layout, n in itertools.product(shapes, dtypes, LAYOUTS, batches):
        if elapsed() > ARGS.seconds:
            skipped += 1
            continue
        layers = dict(LAYERS)
        if not (n == BATCHES[0] and dtype != "float16" and compile_left > 0):
            layers.pop("compile", None)
        without_compile += "compile" not in layers
        try:
            compile_left -= measure_configuration(write, copy_rate, layers, n, c, h, dtype, layout)
        except torch.OutOfMemoryError:
            say(f"not measured, for lack of memory: {(n, c, h, h)} {dtype} {layout}")
    if skipped:
        say(f"{skipped} configurations not measured: --seconds {ARGS.seconds:.0f} were over")
    say(f"{without_compile} configurations measured without torch.compile")


def measure_configuration(write, copy_rate, layers, n, c, h, dtype, layout):
    """All operations on one kind of tensor; returns the seconds that torch.compile took."""
    numel, itemsize = n * c * h * h, DTYPES[dtype].itemsize
    sets = max(2, min(8, math.ceil(2 * l2_bytes() / (3 * numel * itemsize))))
    inputs = [Inputs(n, c, h, DTYPES[dtype], layout, seed) for seed in range(sets)]
    seconds = 0.0
    if "compile" in layers:
        layers["compile"] = compiled_layer()
    for op in OPS:
        calls = {}
        for name, layer in layers.items():
            begin = time.perf_counter()
            calls[name] = [call(name, layer, one, op) for one in inputs]
            if name == "compile":
                calls[name][0]()
                seconds += time.perf_counter() - begin
        floor = floor_us(op, numel, itemsize, copy_rate)
        for name, median in time_in_turns(calls).items():
            bound = 2 * numel * itemsize / copy_rate if name == "copy" else floor
            write(op, layout, dtype, n, c, h, h, name, median, bound)
    return seconds


class Bottleneck(torch.nn.Module):
    """Three convolutions with batch norm, and a shortcut (He et al., 2016)."""

    def __init__(self, inside, width, stride):
        super().__init__()
        outside = 4 * width
        self.conv1 = torch.nn.Conv2d(inside, width, 1, bias=False)
        self.conv2 = torch.nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = torch.nn.Conv2d(width, outside, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = map(torch.nn.BatchNorm2d, (width, width, outside))
        self.down = None
        if stride > 1 or inside != outside:
            conv = torch.nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.down = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(outside))

    def forward(self, x):
        shortcut = x if self.down is None else self.down(x)
        y = norm_relu(self.bn1, self.conv1(x))
        y = norm_relu(self.bn2, self.conv2(y))
        return norm_relu(self.bn3, self.conv3(y), shortcut)


def norm_relu(bn, x, residual=None):
    """Fused where the module can, else one after the other, as torchvision does."""
    if isinstance(bn, bnlib.nn.BatchNorm2d):
        return bn(x, residual, "relu")
    y = bn(x)
    return torch.nn.functional.relu(y if residual is None else y.add_(residual), inplace=True)


class ResNet50(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn = torch.nn.BatchNorm2d(64)
        blocks, inside = [], 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(count):
                blocks.append(Bottleneck(inside, width, stride if i == 0 else 1))
                inside = 4 * width
        self.blocks = torch.nn.Sequential(*blocks)
        self.fc = torch.nn.Linear(2048, 1000)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(norm_relu(self.bn, self.conv(x)), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))


def measure_resnet50(write):
    """A training step of the whole network under bfloat16 autocast; its peak memory is printed."""
    n, side = (2, 32) if ARGS.dry_run else (128, 224)
    torch.backends.cudnn.benchmark = True
    for layout in LAYOUTS:
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        calls, peaks, hosts = {}, {}, {}
        for name in ("bnlib", "eager"):
            torch.manual_seed(0)
            model = ResNet50().to(DEVICE, memory_format=memory)
            norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
            assert norms == sum(RESNET50.values())
            if name == "bnlib":
                model = bnlib.nn.convert_batch_norm(model)
                assert sum(isinstance(m, bnlib.nn.BatchNorm2d) for m in model.modules()) == norms
            optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9)
            images = torch.randn(n, 3, side, side, device=DEVICE)
            images = images.contiguous(memory_format=memory)
            labels = torch.randint(1000, (n,), device=DEVICE)

            def step(model=model, optimiser=optimiser, images=images, labels=labels):
                optimiser.zero_grad(set_to_none=True)
                with torch.autocast(DEVICE, torch.bfloat16):
                    loss = torch.nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimiser.step()

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
        if DEVICE == "cpu":  # the interpreter would take minutes: one step, to see that it runs
            calls["bnlib"] = []
        for name, median in time_wall(calls).items():
            write("resnet50_step", layout, "bfloat16", n, 3, side, side, name, median, math.nan)
        for name, peak in peaks.items():
            say(
                f"ResNet-50 {layout} {name}: {peak / 2**30:.2f} GiB above the model at the peak, "
                f"{1e3 * hosts[name]:.1f} ms for the host to queue one step"
            )


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
    shape = (2, 3, 5) if ARGS.dry_run else (32, 512, 7)
    inputs = Inputs(*shape, torch.bfloat16, "contiguous", seed=0)
    for name in ("bnlib", "eager"):
        function = call(name, LAYERS[name], inputs, "train_fwd_bwd")
        times = []
        for _ in range(3 if ARGS.dry_run else 50):
            sync()
            start = time.perf_counter()
            function()
            times.append(1e6 * (time.perf_counter() - start))
        sync()
        say(f"host, train_fwd_bwd, {name}: {statistics.median(times):.0f} us a call")


def print_kernels():
    """Which kernels ran, from the profiler."""
    if DEVICE == "cpu":
        return
    from torch.profiler import ProfilerActivity, profile

    for layout, dtype in itertools.product(LAYOUTS, ("bfloat16", "float32")):
        inputs = Inputs(32, 256, 56, DTYPES[dtype], layout, seed=0)
        for name in ("bnlib", "eager", "eager_nocudnn"):
            function = call(name, LAYERS[name], inputs, "train_fwd_bwd")
            function()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                function()
                torch.cuda.synchronize()
            names = [event.key[:60] for event in trace.key_averages()]
            say(f"kernels, {layout} {dtype} {name}: {', '.join(names)}")


def print_summary(rows):
    """Geometric means of eager's and compile's time over ours, the worst, and the floor's share."""
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
        for other in ("eager", "eager_nocudnn", "compile"):
            ratios = [v[other][0] / v["bnlib"][0] for v in cells.values() if other in v]
            if ratios:
                parts.append(f"{other} {statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f})")
        large = [
            v["bnlib"][1] / v["bnlib"][0]
            for (*_, n, c, h), v in cells.items()
            if n * c * h * h * DTYPES[dtype].itemsize > 100e6
        ]
        if large:
            parts.append(f"floor {100 * min(large):.0f} %")
        print(f"  {op:17} {layout:13} {dtype:9} " + "  ".join(parts))


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
    constants = {
        "date": datetime.date.today().isoformat(),
        "machine": "dry run" if ARGS.dry_run else ARGS.machine,
        "gpu": "none" if DEVICE == "cpu" else torch.cuda.get_device_name(),
        "driver": "none" if DEVICE == "cpu" else driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    say(", ".join(f"{key} {value}" for key, value in constants.items()))
    rows = []

    def write(op, layout, dtype, n, c, h, w, impl, median, floor):
        values = (op, layout, dtype, n, c, h, w, impl, median, floor)
        rows.append(constants | dict(zip(COLUMNS[6:], values, strict=True)))

    check()
    check_determinism()
    check_graph()
    check_large()
    copy_rate, read_rate = bandwidths()
    for impl, rate in (("copy", copy_rate), ("read", read_rate)):
        # A bandwidth as the other rows are, a time: that of 10⁹ bytes.
        write("bandwidth", "contiguous", "float32", 1, 1, 1, 1, impl, 1e9 / rate, 1e9 / rate)
    print_kernels()
    print_host_overhead()
    measure_resnet50(write)
    say("the layers")
    try:
        measure_layers(write, copy_rate)
    finally:  # what has been measured is kept, whatever happens to the rest
        if out is not None:
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                for row in rows:
                    numbers = {key: f"{row[key]:.2f}" for key in ("median_us", "floor_us")}
                    if math.isnan(row["floor_us"]):
                        numbers["floor_us"] = ""
                    writer.writerow(row | numbers)
            say(f"{len(rows)} rows written to {out}")
    print_summary(rows)
    say("done")


if __name__ == "__main__":
    main()
