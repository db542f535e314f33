"""The layer on whole steps, and what only a GPU can show: real sizes, graphs, the same bits."""

from __future__ import annotations

import os

import pytest
import torch
from test_kernels import LAYOUTS, draw, vectors

from bnlib import functional, reference

EPS = 1e-5
ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="the interpreter would take minutes, or cannot")
SMALL = (32, 64, 56, 56) if ON_GPU else (4, 3, 5, 7)
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# The shapes of ResNet-50's batch norms, and awkward ones.
RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14)]
RESNET50 += [(1024, 14), (512, 14), (512, 7), (2048, 7)]
REAL = [(32, c, h, h) for c, h in RESNET50] + [(256, 64, 56, 56), (256, 512, 7, 7)]
REAL += [(2, 3, 224, 224), (1, 17, 31, 31), (5, 1023, 1, 1), (64, 13, 2, 2), (2, 8, 1024, 1024)]


def near(got, expected, limit):
    """Relative to the norm: a ReLU may cut off one value more or less than in float64."""
    error = (got.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert got.shape == expected.shape and error <= limit, f"{error:.3g}, allowed {limit:.3g}"


class Layer(torch.nn.BatchNorm2d):
    """With addition of its input and ReLU, by the GPU kernels whatever the device."""

    group = None

    def forward(self, x):
        stats = (self.running_mean, self.running_var, self.weight, self.bias)
        fused = {"residual": x, "activation": "relu", "process_group": self.group}
        return functional.batch_norm(x, *stats, True, 0.1, EPS, **fused, backend="gpu")


def check_step(layer, call, dtype=torch.float32, layout="contiguous", shape=SMALL):
    """Forward, backward and running statistics of a fresh Layer, by ``call``, against float64."""
    x, dy = (draw(shape, dtype, layout, seed=seed) for seed in (0, 2))
    x.requires_grad_()
    y = call(x)
    y.backward(dy)
    xd, w, b = (t.detach().double() for t in (x, layer.weight, layer.bias))
    out, cache = reference.batch_norm_forward(xd, w, b, eps=EPS)
    cut = torch.where(y.detach() > 0, dy.double(), 0)
    grads = reference.batch_norm_backward(cut, cache)
    near(y.detach(), (out + xd).relu(), LIMITS[dtype])
    near(x.grad, grads.dx + cut, LIMITS[dtype])
    near(layer.weight.grad, grads.dweight, 1e-4 if dtype == torch.float32 else LIMITS[dtype])
    near(layer.bias.grad, grads.dbias, 1e-4 if dtype == torch.float32 else LIMITS[dtype])
    start = (torch.zeros_like(w), torch.ones_like(w))
    mean, var = reference.update_running_stats(*start, cache.moments, 0.1)
    near(layer.running_mean.double() + 1, mean + 1, 1e-5)
    near(layer.running_var, var, 1e-5)


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", REAL if ON_GPU else REAL[-1:], ids=str)
def test_real_sizes(shape, dtype, layout):
    layer = Layer(shape[1])
    check_step(layer, layer, dtype, layout, shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_running_statistics_after_1_2_and_10_steps(layout):
    running = [torch.zeros(SMALL[1]), torch.ones(SMALL[1])]
    expected = [v.double() for v in running]
    for step in range(1, 11):
        x = draw(SMALL, layout=layout, seed=step, offset=float(step))
        functional.batch_norm(x, *running, training=True, backend="gpu")
        expected = reference.update_running_stats(*expected, reference.moments(x.double()), 0.1)
        if step in (1, 2, 10):
            for one, other in zip(running, expected, strict=True):
                near(one, other, 1e-5)


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_compile(layout):
    """In the interpreter, test_gpu_operator.py asks more."""
    layer = Layer(SMALL[1])
    check_step(layer, torch.compile(layer, fullgraph=True, dynamic=False), layout=layout)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    """16 bits arrive from a convolution, statistics and gradients are float32."""
    conv, layer = torch.nn.Conv2d(SMALL[1], 4, 3, padding=1, bias=False), Layer(4)
    with torch.autocast(device, dtype):
        z = conv(draw(SMALL))
        y = layer(z)
    assert z.dtype == y.dtype == dtype
    zd = z.detach().double()
    out, cache = reference.batch_norm_forward(zd, eps=EPS)
    near(y.detach(), (out + zd).relu(), 1.6e-2)
    near(layer.running_mean.double() + 1, cache.moments.mean / 10 + 1, 1e-5)
    (y.float().sum() / 100).backward()
    assert conv.weight.grad.isfinite().all() and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("synchronised", [False, True])
def test_distributed_data_parallel(synchronised):
    """In a world of this process alone."""
    dist = torch.distributed
    backend = "nccl" if ON_GPU and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = Layer(SMALL[1])
        layer.group = dist.group.WORLD if synchronised else None
        check_step(layer, torch.nn.parallel.DistributedDataParallel(layer))
    finally:
        dist.destroy_process_group()


def step(x, residual, dy, w, b, running):
    """Return the output and all gradients of the fused layer."""
    leaves = [t.detach().requires_grad_() for t in (x, residual, w, b)]
    fused = {"residual": leaves[1], "activation": "relu", "backend": "gpu"}
    y = functional.batch_norm(leaves[0], *running, *leaves[2:], True, 0.1, EPS, **fused)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def inputs(layout, seed):
    x, residual, dy = (draw(SMALL, torch.bfloat16, layout, seed=seed + i) for i in range(3))
    running = [torch.zeros(SMALL[1]), torch.ones(SMALL[1])]
    return x, residual, dy, *vectors(SMALL[1], seed), running


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_every_time(layout):
    *tensors, _ = inputs(layout, 0)
    runs = [step(*tensors, [None, None]) for _ in range(5)]
    assert all(all(map(torch.equal, runs[0], run)) for run in runs[1:])


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cuda_graph_replays_on_other_data(layout):
    first, second = inputs(layout, 0), inputs(layout, 7)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*first)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(*first)
    for one, other in zip((*first[:-1], *first[-1]), (*second[:-1], *second[-1]), strict=True):
        one.copy_(other)
    for _ in range(3):
        graph.replay()
        expected = step(*second)
    assert all(map(torch.equal, (*got, *first[-1]), (*expected, *second[-1])))


@needs_gpu
@pytest.mark.parametrize("shape", [(5, 2**19, 1024), (2**20 + 3, 2100)], ids=str)
def test_more_than_32_bits_of_elements(shape):
    """Looked at in the first, the middle and the last channel."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of memory")
    x = torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
    y = functional.batch_norm(x, None, None, training=True, backend="gpu")
    (dx,) = torch.autograd.grad(y, x, x.detach())
    for channel in (0, shape[1] // 2, shape[1] - 1):
        one = x.detach()[:, channel : channel + 1].double()
        wanted, cache = reference.batch_norm_forward(one, eps=EPS)
        assert (y[:, channel : channel + 1] - wanted).abs().max() < 0.05
        wanted = reference.batch_norm_backward(one, cache).dx
        assert (dx[:, channel : channel + 1] - wanted).abs().max() < 0.05
