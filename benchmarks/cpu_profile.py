"""Show what a layer's time on the CPU is made of, next to PyTorch's.

    python benchmarks/cpu_profile.py            # with one thread; prints four tables, 2 minutes
    OMP_NUM_THREADS=2 python benchmarks/cpu_profile.py

1. The floor of a call: a layer on a few numbers, with what it needs still in the processor's
   caches, after 4 MB of other work, which leave it in the last of them, and after 128 MB, which do
   not. A ``torch.autograd.Function`` that does nothing says how much of it is the price of being
   written in Python.
2. The kernels alone, in units of one copy of the same tensor into memory that is already there.
3. The operators of a training step, of the networks that benchmarks/cpu.py measures: the share of
   batch norm, addition and ReLU is all that a faster layer can win.
4. The first call of a new installation, which compiles, and that of a later process.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from cpu import machine, training_models

from bnlib.functional import batch_norm
from bnlib.kernels import load
from bnlib.kernels.cpu import launch

kernels = load("cpu")
REPEATS = 300
LARGE = [(32, 64, 112), (32, 256, 56), (32, 512, 28)]
SMALL = [(32, 1024, 14), (32, 512, 7), (8, 256, 14)]


class Nothing(torch.autograd.Function):
    """As many inputs, outputs and saved tensors as the layer, and no arithmetic."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        _, weight, bias = ctx.saved_tensors
        return dy, weight, bias


def main() -> None:
    print(f"{machine()}, torch {torch.__version__}, threads {torch.get_num_threads()}")
    calls()
    passes()
    steps()
    first_calls()


def median(function, before=lambda: None) -> float:
    times = []
    for _ in range(REPEATS):
        before()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def calls() -> None:
    x = torch.randn(16, 64, 1, 1, requires_grad=True)
    weight, bias = (torch.rand(64, requires_grad=True) for _ in range(2))
    running = torch.zeros(64), torch.ones(64)
    dy = torch.ones_like(x)
    little, much = np.zeros(1 << 19), np.zeros(1 << 24)
    work = {
        "warm": lambda: None,
        "after 4 MB": lambda: np.add(little, 1.0, out=little),
        "after 128 MB": lambda: np.add(much, 1.0, out=much),
    }
    layers = {
        "bnlib": lambda: batch_norm(x, *running, weight, bias, True),
        "PyTorch": lambda: torch.nn.functional.batch_norm(x, *running, weight, bias, True),
        "an empty autograd.Function": lambda: Nothing.apply(x, weight, bias),
    }
    print(f"\nmicroseconds of a call on {tuple(x.shape)}: forward + backward")
    print(f"{'':28}" + "".join(f"{name:>16}" for name in work))
    for name, layer in layers.items():
        cells = []
        for before in work.values():
            forward = median(layer, before)
            # A new graph for every backward: PyTorch's refuses statistics that have moved on.
            graphs = iter([layer() for _ in range(REPEATS)])
            if name == "PyTorch":
                graphs = itertools.repeat(
                    torch.nn.functional.batch_norm(x, None, None, weight, bias, True)
                )
            inputs = (x, weight, bias)
            backward = median(
                lambda g=graphs, i=inputs: torch.autograd.grad(next(g), i, dy, retain_graph=True),
                before,
            )
            cells.append(f"{forward * 1e6:.0f} + {backward * 1e6:.0f}")
        print(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))


def passes() -> None:
    """A copy reads and writes; the layer's forward reads twice and writes, backward 4 and 1."""
    print("\ntime of the kernels, outputs in memory already there, in copies of the same tensor")
    print(f"{'N x C x H':16}{'layout':16}{'MB':>6}{'copy, ms':>10}{'forward':>9}{'backward':>10}")
    allocate = launch._empty_like
    for shape in LARGE + SMALL:
        for layout in (torch.contiguous_format, torch.channels_last):
            n, c, h = shape
            x = torch.randn(n, c, h, h).contiguous(memory_format=layout)
            dy, out = x.flip(0).contiguous(memory_format=layout), torch.empty_like(x)
            weight = torch.rand(c)
            launch._empty_like = lambda _, out=out: out
            try:
                _, m, inv_std = kernels.moments_and_normalize(x, weight, None, 1e-5)
                given = (dy, x, m.mean, inv_std, weight, m.count)
                jobs = {
                    "copy": lambda x=x, out=out: out.copy_(x),
                    "forward": lambda x=x, w=weight: kernels.moments_and_normalize(
                        x, w, None, 1e-5
                    ),
                    "backward": lambda given=given: kernels.grad_sums_and_input(*given),
                }
                times = {name: [] for name in jobs}
                for _ in range(max(5, int(2e9 / x.nbytes / 20))):
                    for name, job in jobs.items():
                        start = time.perf_counter()
                        job()
                        times[name].append(time.perf_counter() - start)
            finally:
                launch._empty_like = allocate
            copy, forward, backward = (statistics.median(t) for t in times.values())
            name = "channels_last" if layout == torch.channels_last else "NCHW"
            print(
                f"{f'{n} x {c} x {h}':16}{name:16}{x.nbytes / 1e6:6.1f}{copy * 1e3:10.3f}"
                f"{forward / copy:9.2f}{backward / copy:10.2f}"
            )


def steps() -> None:
    for bottleneck, layout in itertools.product((False, True), ("contiguous", "channels_last")):
        models, step, _ = training_models(bottleneck, layout)
        print(f"\n{'bottlenecks' if bottleneck else 'pairs of 3 x 3'}, {layout}: ms of a step")
        for name in models:
            step(name)
            with torch.profiler.profile() as profiler:
                for _ in range(5):
                    step(name)
            times = {e.key: e.self_cpu_time_total / 5e3 for e in profiler.key_averages()}
            ours = sum(t for key, t in times.items() if any(p in key.lower() for p in LAYER))
            ours += times.get("aten::add", 0.0)
            rest = sum(times.values()) - ours
            share = ours / (ours + rest)
            print(
                f"  {name:8} batch norm, addition, ReLU {ours:7.2f} ({share:.0%}), rest {rest:8.2f}"
            )


FIRST_CALLS = """
import time
import torch
from bnlib.functional import batch_norm

x = torch.randn(8, 16, 5, 5, requires_grad=True)
for fused in ({}, {"residual": x, "activation": "relu"}):
    start = time.perf_counter()
    y = batch_norm(x, None, None, training=True, **fused)
    middle = time.perf_counter()
    y.sum().backward()
    print(f"{middle - start:9.1f} + {time.perf_counter() - middle:.1f}", end="")
"""


def first_calls() -> None:
    print(
        "\nseconds of the first call in float32: forward + backward, and the same with ReLU fused"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        for name in ("new installation", "later process"):
            command = [sys.executable, "-c", FIRST_CALLS]
            said = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            print(f"{name:16}{said}")


# In the names of the profiler: the layer and ReLU; "aten::add" is the residual's addition.
LAYER = ("batch_norm", "batchnorm", "clamp_min", "threshold_backward", "aten::relu")


if __name__ == "__main__":
    main()
