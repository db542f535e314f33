"""Measure batch norm on the CPU: bnlib, PyTorch eager, torch.compile and a bare copy.

    python benchmarks/cpu.py                 # all of it; writes book/data/cpu.csv
    python benchmarks/cpu.py --no-compile    # without torch.compile: 6 minutes on 2 cores
    python benchmarks/cpu.py --quick         # a few shapes; prints only
    python benchmarks/cpu.py --summary       # measures nothing; prints what the file says

Every combination of threads and page size runs in a process of its own, because PyTorch reads
THP_MEM_ALLOC_ENABLE when it starts. Within it the contestants take turns in one loop, in an order
that is reversed every time, and the row keeps the median of each. A ratio above 1 says how many
times longer the other one took than bnlib. torch.compile takes longer to compile than to measure:
it takes part at batch 32 and the largest number of threads.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# ResNet-50's batch norms, (channels, height = width), and shapes of no particular network.
RESNET = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28),
    (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
]  # fmt: skip
ODD = [(3, 224), (48, 23), (100, 33), (720, 5), (1000, 1)]
QUICK = [(64, 56), (512, 28), (256, 14), (512, 7)]
SECONDS = 0.1  # for each contestant and operation, and at least three repetitions
OUT = Path(__file__).parents[1] / "book" / "data" / "cpu.csv"
COLUMNS = [
    "date", "machine", "cores", "python", "torch", "numba", "bnlib", "huge_pages", "threads",
    "layout", "batch", "channels", "size", "operation", "bnlib_ms", "eager_ms", "compile_ms",
    "clone_ms", "eager_ratio", "compile_ratio", "bnlib_peak_mb", "eager_peak_mb", "compile_peak_mb",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few shapes, print and write nothing")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--summary", action="store_true", help="summarise the rows of --out")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        run_child(**args.child)
        return
    if args.summary:
        with args.out.open(newline="") as file:
            rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
        summarise(rows)
        return
    most = min(2, os.cpu_count() or 1)
    settings: list[tuple[int, dict]] = []
    for huge in (0, 1):
        for threads in sorted({1, most}):
            with_compile = threads == most and not args.no_compile and not (args.quick and huge)
            setting = {"threads": threads, "quick": args.quick, "with_compile": with_compile}
            settings.append((huge, setting))
    rows, start = [], time.perf_counter()
    for i, (huge, setting) in enumerate(settings):
        rows += run_process(huge, setting, start, i / len(settings), 1 / len(settings))
    print(file=sys.stderr)
    summarise(rows)
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"wrote {len(rows)} rows to {args.out}")


def run_process(
    huge_pages: int, settings: dict, start: float, before: float, share: float
) -> list[dict]:
    """The rows of one setting, measured in a fresh process, with a progress bar meanwhile."""
    threads = str(settings["threads"])
    environment = os.environ | {
        "THP_MEM_ALLOC_ENABLE": str(huge_pages),
        "OMP_NUM_THREADS": threads,
    }
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    rows = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            record = json.loads(line)
            rows.append(record["row"] | {"huge_pages": huge_pages})
            done, elapsed = before + share * record["done"], time.perf_counter() - start
            left = elapsed / done - elapsed
            print(
                f"\r[{'#' * int(30 * done):30}] {100 * done:3.0f} %, "
                f"{left // 60:.0f} min {left % 60:02.0f} s left ",
                end="", file=sys.stderr, flush=True,
            )  # fmt: skip
    if process.returncode:
        raise SystemExit(f"the measuring process ended with code {process.returncode}")
    return rows


def run_child(threads: int, quick: bool, with_compile: bool) -> None:
    import numba
    import torch

    import bnlib

    torch.set_num_threads(threads)
    setting = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "bnlib": bnlib.__version__,
        "threads": threads,
    }
    shapes = [(8, *s) for s in QUICK] if quick else [(n, *s) for n in (32, 8) for s in RESNET]
    shapes += [] if quick else [(16, *s) for s in ODD]
    cases = [(layout, *shape) for layout in ("contiguous", "channels_last") for shape in shapes]
    # In units of the time that a case takes whatever its size; the last is the training step.
    work = [1 + n * c * h * h / 4e6 for _, n, c, h in cases] + [4]
    for i, case in enumerate(cases):
        compiles = with_compile and (case[1] == 32 or (quick and case[2] == 512))
        for row in measure_shape(*case, quick, compiles):
            done = sum(work[: i + 1]) / sum(work)
            print(json.dumps({"row": setting | row, "done": done}), flush=True)
    for row in measure_training(quick):
        print(json.dumps({"row": setting | row, "done": 1}), flush=True)


def measure_shape(layout: str, n: int, c: int, h: int, quick: bool, with_compile: bool) -> list:
    import torch

    from bnlib.functional import batch_norm

    torch._dynamo.reset()
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    torch.manual_seed(0)
    x = torch.randn(n, c, h, h).contiguous(memory_format=memory_format)
    residual, dy = x.flip(0), x.flip(0, 1)
    assert dy.stride() == x.stride()
    weight, bias = torch.rand(c), torch.rand(c)
    buffers = torch.zeros(c), torch.ones(c)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def eager(x, residual, training):
        y = torch.nn.functional.batch_norm(x, *buffers, weight, bias, training)
        return y if residual is None else torch.relu(y + residual)

    def ours(x, residual, training):
        activation = None if residual is None else "relu"
        return batch_norm(
            x, *buffers, weight, bias, training, residual=residual, activation=activation
        )

    contestants = {"bnlib": ours, "eager": eager}
    if with_compile:
        contestants["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    contestants["clone"] = None

    def train(function, with_residual=False):
        inputs = leaves if with_residual else leaves[:3]
        start = time.perf_counter()
        y = function(x, residual if with_residual else None, True)
        middle = time.perf_counter()
        torch.autograd.grad(y, inputs, dy)
        end = time.perf_counter()
        if with_residual:
            return {"forward+backward, add, ReLU": end - start}
        return {
            "forward": middle - start,
            "backward": end - middle,
            "forward+backward": end - start,
        }

    def evaluate(function):
        with torch.no_grad():
            start = time.perf_counter()
            function(x, None, False)
            return {"evaluation": time.perf_counter() - start}

    def clone(function):
        start = time.perf_counter()
        x.detach().clone()
        return {"clone": time.perf_counter() - start}

    everyone = [name for name in contestants if name != "clone"]
    jobs = [
        (train, everyone),
        (functools.partial(train, with_residual=True), everyone),
        (evaluate, ["bnlib", "eager"]),
        (clone, ["clone"]),
    ]
    times: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, dict[str, float]] = {}
    for job, names in jobs:
        end, repetition = math.inf, -2  # the first two warm up
        while repetition < 3 or time.perf_counter() < end:
            if repetition == 0:
                end = time.perf_counter() + SECONDS * len(names)
            for name in names if repetition % 2 else reversed(names):
                before = reset_peak() if repetition == 0 else None
                for operation, seconds in job(contestants[name]).items():
                    if repetition >= 0:
                        times.setdefault(operation, {}).setdefault(name, []).append(seconds)
                    if before is not None:
                        peaks.setdefault(operation, {})[name] = (peak() - before) / 2**20
            repetition += 1
    clone_ms = milliseconds(times.pop("clone")["clone"])
    shape = {"layout": layout, "batch": n, "channels": c, "size": h, "clone_ms": clone_ms}
    return [
        shape | compare(operation, measured, peaks.get(operation, {}))
        for operation, measured in times.items()
    ]


def training_models(bottleneck: bool, layout: str) -> tuple[dict, Callable[[str], None], dict]:
    """A residual network with torch's batch norm, with ours, and fused; what trains one; its input.

    The data are photo patches; a step is one of 128 of them.
    """
    import torch

    import bnlib.nn
    from bnlib.book.datasets import photo_patches

    class Block(torch.nn.Module):
        """A residual block of ResNet-18 (two convolutions) or of ResNet-50 (a bottleneck)."""

        def __init__(self, before, after, stride, bottleneck, fused):
            super().__init__()
            narrow = after // 4
            shapes = [(before, after, 3, stride), (after, after, 3, 1)]
            if bottleneck:
                shapes = [
                    (before, narrow, 1, 1),
                    (narrow, narrow, 3, stride),
                    (narrow, after, 1, 1),
                ]
            convs = [torch.nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in shapes]
            self.convs = torch.nn.ModuleList(convs)
            self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(b) for _, b, _, _ in shapes)
            self.short = torch.nn.Conv2d(before, after, 1, stride, bias=False)
            self.fused = fused

        def forward(self, x):
            short = self.short(x)
            for conv, norm in zip(self.convs, self.norms, strict=True):
                residual = short if norm is self.norms[-1] else None
                x = conv(x)
                if self.fused:
                    x = norm(x, residual=residual, activation="relu")
                else:
                    x = norm(x)
                    x = torch.relu(x if residual is None else x + residual)
            return x

    def network(bottleneck, fused=False):
        torch.manual_seed(0)
        widths = [32, 32, 64, 64, 128, 128]
        if bottleneck:
            widths = [32, *(4 * w for w in widths[1:])]
        blocks = [
            Block(a, b, 2 if i in (1, 3) else 1, bottleneck, fused)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        ]
        stem = torch.nn.Conv2d(3, 32, 3, 1, 1, bias=False)
        head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(widths[-1], 8)]
        return torch.nn.Sequential(stem, torch.nn.BatchNorm2d(32), *blocks, *head)

    data = photo_patches()
    images = torch.as_tensor(data.train_x[:128], dtype=torch.float32)
    labels = torch.as_tensor(data.train_y[:128]).long()
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    images = images.contiguous(memory_format=memory)
    models = {
        "eager": network(bottleneck),
        "bnlib": bnlib.nn.convert_batch_norm(network(bottleneck)),
        "fused": bnlib.nn.convert_batch_norm(network(bottleneck, fused=True)),
    }
    models = {name: model.to(memory_format=memory) for name, model in models.items()}
    optimizers = {k: torch.optim.SGD(m.parameters(), lr=0.05) for k, m in models.items()}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        torch.nn.functional.cross_entropy(models[name](images), labels).backward()
        optimizers[name].step()

    batch, channels, size, _ = images.shape
    return models, step, {"layout": layout, "batch": batch, "channels": channels, "size": size}


def measure_training(quick: bool) -> list[dict]:
    rows = []
    for bottleneck, layout in itertools.product((False, True), ("contiguous", "channels_last")):
        models, step, shape = training_models(bottleneck, layout)
        times: dict[str, list[float]] = {name: [] for name in models}
        for repetition in range(-2, 5 if quick else 21):
            for name in models if repetition % 2 else reversed(models):
                start = time.perf_counter()
                step(name)
                if repetition >= 0:
                    times[name].append(time.perf_counter() - start)
        eager = times["eager"]
        kind = "training step, bottlenecks" if bottleneck else "training step"
        pairs = {kind: times["bnlib"], f"{kind}, fused": times["fused"]}
        rows += [shape | compare(op, {"bnlib": t, "eager": eager}, {}) for op, t in pairs.items()]
    return rows


def compare(operation: str, times: dict[str, list[float]], peaks: dict[str, float]) -> dict:
    """Medians of the contestants, and how many times longer than bnlib they took."""
    row: dict[str, object] = {"operation": operation}
    for name, seconds in times.items():
        row[f"{name}_ms"] = milliseconds(seconds)
        if name != "bnlib":
            ratio = statistics.median(seconds) / statistics.median(times["bnlib"])
            row[f"{name}_ratio"] = round(ratio, 3)
    return row | {f"{name}_peak_mb": round(value, 1) for name, value in peaks.items()}


def milliseconds(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 4)


def summarise(rows: list[dict]) -> None:
    """Print geometric means of the ratios, and the shapes with the least gain over eager."""
    keys = ("huge_pages", "threads", "layout", "operation")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    print(f"{'pages':>5} threads {'layout':13} {'operation':28} eager compile  worst over eager")
    for group, members in sorted(groups.items()):
        means = [geometric_mean(members, key) for key in ("eager_ratio", "compile_ratio")]
        worst = sorted(members, key=lambda r: float(r["eager_ratio"]))[:3]
        shapes = [f"{r['batch']}x{r['channels']}x{r['size']} ({r['eager_ratio']})" for r in worst]
        huge, threads, layout, operation = group
        print(
            f"{'huge' if int(huge) else '4K':>5} {threads:>7} {layout:13} {operation:28} "
            f"{means[0]:>5} {means[1]:>7}  {', '.join(shapes)}"
        )


def geometric_mean(rows: list[dict], key: str) -> str:
    values = [float(row[key]) for row in rows if key in row]
    return f"{math.exp(statistics.fmean(map(math.log, values))):.2f}" if values else "-"


def machine() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def reset_peak() -> float:
    """Bytes in use now, from where the peak is counted on; Linux only, else not a number."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    return memory("VmRSS")


def peak() -> float:
    return memory("VmHWM")


def memory(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024.0
    return math.nan


if __name__ == "__main__":
    main()
