"""The Triton kernels against float64, run by Triton's interpreter on the CPU.

Run by test_kernels_gpu.py in a process of its own, since triton must be imported with
TRITON_INTERPRET=1, and every other test without.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from bnlib import functional, reference
from bnlib.kernels import gpu
from bnlib.statistics import Moments, merge

# 2-D to 5-D; one sample, one channel, one pixel; primes; 17; 7 x 7; 1023; enough for several tiles.
SHAPES = [
    (5, 1),
    (2, 17),
    (1023, 3),
    (3, 5, 17),
    (1, 3, 1023),
    (4, 16, 7, 7),
    (2, 3, 13, 11),
    (9, 1, 5, 3),
    (2, 8, 16, 16),
    (3, 2, 3, 5, 4),
    (6, 4, 1, 1),
]
LAYOUTS = ["contiguous", "channels_last"]
# Relative to the largest value. float32: a few roundings. The 16-bit outputs are rounded once, to
# 11 or 8 bits; Triton's interpreter truncates bfloat16 instead, which doubles the error.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
EPS = 1e-5

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_kernels_gpu.py, which runs this file"


@pytest.fixture(params=["whole", "tiles", "small tiles"])
def cut(request, monkeypatch):
    """How tensors are cut: whole channels, tiles, or small tiles with several for a program."""
    if request.param != "whole":
        monkeypatch.setattr(gpu, "_whole", lambda *args, **kwargs: None)
    if request.param == "small tiles":
        monkeypatch.setattr(gpu, "_TILE", 1024)
        monkeypatch.setattr(gpu, "_pixels", lambda p: 32)
        monkeypatch.setattr(gpu, "_PROGRAMS", 6)
        monkeypatch.setattr(gpu, "_GRID", 3)
    gpu._plan.cache_clear()
    yield request.param
    gpu._plan.cache_clear()


def lay_out(x, layout):
    return x if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def draw(shape, dtype=torch.float32, layout="contiguous", offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * (1 + torch.rand(shape[1], generator=g)).view(
        [-1] + [1] * (len(shape) - 2)
    )
    return lay_out((x + offset).to(dtype), layout)


def vectors(channels, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(channels, generator=g), torch.randn(channels, generator=g)


def doubles(*tensors):
    return [None if t is None else t.double() for t in tensors]


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    scale = max(expected.abs().max().item(), 1e-3) if actual.numel() else 1.0
    assert error <= tolerance * scale, f"error {error:.3g}, allowed {tolerance * scale:.3g}"


def assert_moments_close(got, expected):
    """Mean and variance to a few roundings, of the mean also where it is near 0."""
    std = (expected.m2 / max(expected.count, 1)).sqrt()
    assert ((got.mean - expected.mean).abs() <= 1e-6 * std + 2e-7 * expected.mean.abs()).all()
    assert ((got.m2 - expected.m2).abs() <= 2e-6 * expected.m2 + 1e-12).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 7), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1000.0), (torch.float16, 0.0)])
@pytest.mark.parametrize("cut", ["tiles", "small tiles"], indirect=True)
def test_moments(cut, shape, layout, dtype, offset):
    x = draw(shape, dtype, layout, offset)
    got, expected = gpu.moments(x), reference.moments(x.double())
    assert got.count == expected.count
    assert got.mean.dtype == torch.float32
    assert_moments_close(got, expected)


@pytest.mark.parametrize("shape", [(40, 2, 30, 30), (4, 3, 10, 10)], ids=str)  # in splits, whole
def test_sums_of_squares_beyond_float32(shape):
    x = torch.full(shape, 1e17)
    x[::2] *= -1
    running = [torch.zeros(shape[1]) for _ in range(2)]
    y, batch, _ = gpu.moments_and_normalize(
        x, None, None, EPS, running_mean=running[0], running_var=running[1], momentum=1.0
    )
    torch.testing.assert_close(y, x.sign())
    unbiased = 1e34 * batch.count / (batch.count - 1)
    torch.testing.assert_close(running[1], torch.full_like(running[1], unbiased))
    m2 = torch.full_like(batch.m2, 1e34 * batch.count)
    torch.testing.assert_close(gpu.moments(x).m2, m2, rtol=1e-6, atol=0)


FUSED = [(False, False), (True, True), (True, False), (False, True)]


def forward(x, w, b, residual, relu, running=None):
    """y and the mask of the kernels under test, with residual and ReLU as asked for."""
    mask = gpu.empty_mask(x).fill_(0xAA) if relu else None
    options = (
        {} if running is None else dict(zip(("running_mean", "running_var"), running, strict=True))
    )
    if options:
        options["momentum"] = 0.25
    return *gpu.moments_and_normalize(x, w, b, EPS, residual, relu, mask, **options), mask


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "dtype", "offset"),
    [(shape, torch.float32, 0.0) for shape in SHAPES]
    + [(s, d, 0.0) for s in SHAPES[3:7] for d in (torch.float16, torch.bfloat16)]
    + [(s, torch.float32, 1000.0) for s in SHAPES[3:6]],
    ids=str,
)
def test_training(cut, shape, dtype, offset, layout):
    """Forward and backward of one layer; each case takes the next of the fused variants."""
    with_residual, relu = FUSED[(len(shape) + shape[0] + shape[1]) % 4]
    x, dy = draw(shape, dtype, layout, offset), draw(shape, dtype, layout, seed=2)
    residual = draw(shape, dtype, layout, seed=3) if with_residual else None
    w, b = vectors(shape[1])
    running = [torch.full_like(w, 0.5), torch.full_like(w, 2.0)]
    expected_running = reference.update_running_stats(
        *doubles(*running), reference.moments(x.double()), 0.25
    )
    y, batch, inv_std, mask = forward(x, w, b, residual, relu, running)

    xd, wd, bd, rd, dyd = doubles(x, w, b, residual, dy)
    yd, cache = reference.batch_norm_forward(xd, wd, bd, eps=EPS)
    if residual is not None:
        yd = yd + rd
    if relu:
        positive = gpu.unpack_mask(mask, x)
        assert torch.equal(positive, y > 0)
        yd, dyd = yd.relu(), torch.where(positive, dyd, 0)
    # A mean of 1000 in float32 is off by up to 3e-5 standard deviations.
    loose = TOLERANCE[dtype] if offset == 0 else 1e-4
    assert y.dtype == dtype and y.stride() == x.stride()
    assert_close(y, yd, loose)
    assert batch.count == cache.moments.count
    assert_moments_close(batch, cache.moments)
    assert_close(inv_std, cache.inv_std, 2e-6)
    for got, expected in zip(running, expected_running, strict=True):
        assert_close(got, expected, 1e-6)

    dresidual = gpu.empty_like(x).fill_(torch.nan) if residual is not None and relu else None
    dx, sum_dy, sum_dy_x_hat = gpu.grad_sums_and_input(
        dy, x, batch.mean, inv_std, w, batch.count, mask=mask, dresidual=dresidual
    )
    grads = reference.batch_norm_backward(dyd, cache)
    assert dx.dtype == dtype and dx.stride() == x.stride()
    # Of two values per channel next to nothing is left of dy: what is rounded is dy before that.
    before = (dyd.abs().amax() * (wd * cache.inv_std).abs().amax()).item()
    assert (dx - grads.dx).abs().max() <= 2 * loose * before
    size = batch.count**0.5  # the sums' size; they may happen to be near 0
    assert_close(sum_dy / size, grads.dbias / size, 1e-5)
    assert ((sum_dy_x_hat - grads.dweight).abs() <= 1e-5 * batch.count + 1e-4 * size).all()
    if dresidual is not None:
        assert torch.equal(dresidual.double(), dyd)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("with_residual", "relu"), FUSED)
def test_the_four_primitives(layout, with_residual, relu):
    """One by one, with statistics of others, as in evaluation and between synchronised ranks."""
    shape, count = (3, 11, 5, 7), 1000
    x, dy = draw(shape, layout=layout), draw(shape, layout=layout, seed=2)
    residual = draw(shape, layout=layout, seed=3) if with_residual else None
    (w, b), (mean, sums) = vectors(11), vectors(11, seed=4)
    inv_std = w.abs() + 0.5
    mask = gpu.empty_mask(x) if relu else None
    y = gpu.normalize(x, mean, inv_std, w, b, residual=residual, relu=relu, mask=mask)
    xd, dyd, md, rd, wd, bd, sd = doubles(x, dy, mean, inv_std, w, b, sums)
    expected = reference.normalize(xd, md, rd, wd, bd)
    if residual is not None:
        expected = expected + residual.double()
    if relu:
        expected, dyd = expected.relu(), torch.where(expected > 0, dyd, 0)
        assert torch.equal(gpu.unpack_mask(mask, x), expected > 0)
    assert_close(y, expected, 2e-6)
    expected = reference.grad_sums(dyd, xd, md, rd)
    for got, wanted in zip(gpu.grad_sums(dy, x, mean, inv_std, mask=mask), expected, strict=True):
        assert_close(got, wanted, 1e-5)
    dresidual = gpu.empty_like(x)
    arguments = (mean, inv_std, w, sums, mean, count)
    dx = gpu.grad_input(dy, x, *arguments, mask=mask, dresidual=dresidual)
    expected = reference.grad_input(dyd, xd, md, rd, wd, sd, md, count)
    assert_close(dx, expected, 2e-6)
    assert torch.equal(dresidual.double(), dyd)


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(cut, given):
    x = draw((3, 5, 17))
    w, b = (v if is_given else None for v, is_given in zip(vectors(5), given, strict=True))
    y, batch, inv_std, _ = forward(x, w, b, None, False)
    expected, cache = reference.batch_norm_forward(x.double(), *doubles(w, b), eps=EPS)
    assert_close(y, expected, 2e-6)
    dx, *_ = gpu.grad_sums_and_input(x.flip(0), x, batch.mean, inv_std, w, batch.count)
    assert_close(dx, reference.batch_norm_backward(x.flip(0).double(), cache).dx, 4e-6)


def test_half_parameters_and_running_statistics():
    x, (w, b) = draw((8, 3, 17), torch.bfloat16), (v.bfloat16() for v in vectors(3))
    running = [torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)]
    expected = reference.update_running_stats(
        *doubles(*running), reference.moments(x.double()), 0.25
    )
    y, *_ = forward(x, w, b, None, False, running)
    assert_close(y, reference.batch_norm_forward(*doubles(x, w, b), eps=EPS)[0], 2**-7)
    for got, wanted in zip(running, expected, strict=True):
        assert_close(got, wanted, 2**-7)


def test_channel_axis():
    x = draw((3, 5, 6, 4))  # channels are the last axis: N, H, W, C
    (w, b), (mean, inv_std) = vectors(4), vectors(4, seed=4)
    like = (mean, inv_std)
    assert_close(gpu.moments(x, -1).m2, reference.moments(x.double(), -1).m2, 2e-6)
    y = gpu.normalize(x, *like, w, b, -1, residual=x)
    assert y.is_contiguous()
    assert_close(y, reference.normalize(*doubles(x, *like, w, b), -1) + x, 2e-6)
    sums = gpu.grad_sums(x, x, *like, -1)
    assert_close(sums[1], reference.grad_sums(*doubles(x, x, *like), -1)[1], 1e-5)
    dx = gpu.grad_input(x, x, *like, w, *sums, 90, -1)
    expected = reference.grad_input(*doubles(x, x, *like, w, *sums), 90, -1)
    assert_close(dx, expected, 2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    """Inputs that are no dense tensors, and a gradient in the other layout than the input."""
    x = draw((4, 6, 8, 5), layout=layout)[::2, :, 1::2]
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    dy, residual = draw(x.shape, layout=other, seed=2), draw(x.shape, layout=other, seed=3)
    y, batch, inv_std, mask = forward(x, None, None, residual, True)
    expected, cache = reference.batch_norm_forward(x.double(), eps=EPS)
    expected = expected + residual
    assert_close(y, expected.relu(), 2e-6)
    assert torch.equal(gpu.unpack_mask(mask, x), expected > 0)
    assert y.stride() == lay_out(y.contiguous(), layout).stride()
    dx, *_ = gpu.grad_sums_and_input(dy, x, batch.mean, inv_std, None, batch.count, mask=mask)
    masked = torch.where(expected > 0, dy.double(), 0)
    assert_close(dx, reference.batch_norm_backward(masked, cache).dx, 4e-6)


def test_an_outlier_in_front_and_a_large_mean():
    """Shifting by the first element would fail here, and E[x²] - E[x]² in both."""
    x = draw((64, 1, 64))
    x[0, 0, 0] = 1e4
    expected = reference.moments(x.double())
    assert_close(gpu.moments(x).m2, expected.m2, 1e-5)
    x = draw((64, 1, 64), offset=1e4)
    expected = reference.moments(x.double())
    assert_close(gpu.moments(x).m2, expected.m2, 1e-5)
    naive = (x * x).sum() - x.sum() ** 2 / x.numel()
    assert (naive - expected.m2).abs() > 1e-2 * expected.m2


def test_a_constant_channel_has_no_variance(cut):
    x = draw((6, 3, 17))
    x[:, 1] = 1000.1
    y, batch, inv_std, _ = forward(x, None, torch.tensor([0.0, 2.0, 0.0]), None, False)
    assert batch.m2[1] == 0 and batch.m2[0] > 0
    assert_close(y[:, 1], torch.full((6, 17), 2.0), 1e-6)
    assert_close(inv_std[1:2], torch.tensor([EPS**-0.5]), 1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of inf - inf
def test_nan_and_infinity_stay_in_their_channel(cut, bad):
    x = draw((4, 3, 40))
    x[2, 1, 5] = bad
    mask = gpu.empty_mask(x)
    y, batch, _ = gpu.moments_and_normalize(x, None, None, EPS, relu=True, mask=mask)
    assert y[:, 1].isnan().all() and y[:, ::2].isfinite().all()
    assert batch.m2[1].isnan() and batch.m2[::2].isfinite().all()
    assert gpu.unpack_mask(mask, x)[:, 1].all()  # as torch: ReLU lets NaN pass


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4)])
def test_empty(shape):
    x, v = torch.empty(shape), torch.ones(shape[1])
    mask = gpu.empty_mask(x)
    y, batch, inv_std = gpu.moments_and_normalize(x, v, v, EPS, x, True, mask)
    assert y.shape == x.shape and batch.count == 0
    assert not batch.mean.any() and not batch.m2.any() and inv_std.shape == v.shape
    assert gpu.unpack_mask(mask, x).shape == x.shape
    dx, *sums = gpu.grad_sums_and_input(x, x, v, v, v, 0, mask=mask, dresidual=x)
    assert dx.shape == x.shape and not any(s.any() for s in sums)


@pytest.mark.parametrize(
    ("shape", "stride_of_samples"),
    [((3, 2**20, 1024), 2**30), ((640, 2**22), 2**22)],
    ids=["rows", "channels innermost"],
)
def test_offsets_beyond_32_bits(monkeypatch, shape, stride_of_samples):
    """The first channels of a tensor of 5 GB, of which no page but theirs is ever touched."""
    launch = gpu._launch
    monkeypatch.setattr(
        gpu, "_launch", lambda kernel, grid, *a, **k: launch(kernel, (1, *grid[1:]), *a, **k)
    )
    assert stride_of_samples * (shape[0] - 1) >= 2**31 - 2**22
    x = torch.empty(shape, dtype=torch.float16)
    some = draw((shape[0], 1, *shape[2:]), torch.float16)[:, 0]
    x[:, 0] = some
    batch = gpu.moments(x)
    expected = reference.moments(some.unsqueeze(1).double())
    assert_moments_close(Moments(batch.count, batch.mean[:1], batch.m2[:1]), expected)
    inv_std = torch.ones(shape[1])
    mask = gpu.empty_mask(x)
    y = gpu.normalize(x, batch.mean, inv_std, relu=True, mask=mask)
    wanted = (some.double() - expected.mean).relu()
    assert_close(y[:, 0], wanted, 2**-11)
    sums = gpu.grad_sums(x, x, batch.mean, inv_std, mask=mask)
    dy = torch.where(y[:, 0] > 0, some, 0).double()
    assert_close(sums[0][:1], dy.sum().view(1), 1e-5)
    dx = gpu.grad_input(x, x, batch.mean, inv_std, None, *sums, 1000, mask=mask, dresidual=y)
    d = some.double() - expected.mean
    assert_close(dx[:, 0], dy - (dy.sum() + d * (dy * d).sum()) / 1000, 2**-10)
    assert torch.equal(y[:, 0].double(), dy)


def test_supports():
    x = torch.zeros(2, 3)
    assert all(gpu.supports(x.to(dtype)) for dtype in TOLERANCE)
    assert not gpu.supports(x.double()) and not gpu.supports(x.to("meta"))


def test_errors_name_what_arrived():
    with pytest.raises(ValueError, match=r"rank >= 2 .*got shape \(3,\)"):
        gpu.moments(torch.zeros(3))
    with pytest.raises(TypeError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        gpu.moments(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="expected x on a GPU, got Tensor on meta"):
        gpu.moments(torch.zeros(2, 3, device="meta"))
    with pytest.raises(TypeError, match=r"torch\.Tensor, got list"):
        gpu.moments([1.0])


X = torch.zeros(4, 3, 5, 7)
V = torch.ones(3)
MASK = gpu.empty_mask(X)
LAST = X.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"mean of shape \(3,\).*got shape \(2,\)", lambda: gpu.normalize(X, V[:2], V)),
        (ValueError, r"inv_std of shape", lambda: gpu.normalize(X, V, X)),
        (ValueError, r"weight of shape", lambda: gpu.normalize(X, V, V, V[:0])),
        (ValueError, r"bias of shape", lambda: gpu.normalize(X, V, V, V, V[:1])),
        (TypeError, "mean to be a torch.Tensor, got float", lambda: gpu.normalize(X, 1.0, V)),
        (TypeError, "bias with a real .*int64", lambda: gpu.normalize(X, V, V, V, V.long())),
        (ValueError, "mean on cpu.* on meta", lambda: gpu.normalize(X, V.to("meta"), V)),
        (
            ValueError,
            r"residual of shape \(4, 3, 5, 7\).*got \(4, 3, 5\)",
            lambda: gpu.normalize(X, V, V, residual=X[..., 0]),
        ),
        (
            ValueError,
            r"residual of .*torch.float32, got .*torch.float16",
            lambda: gpu.normalize(X, V, V, residual=X.half()),
        ),
        (
            ValueError,
            r"mask of shape \(4, 3, 5\).*got \(4, 3, 4\)",
            lambda: gpu.normalize(X, V, V, relu=True, mask=MASK[..., :4].contiguous()),
        ),
        (ValueError, "mask .*torch.int8", lambda: gpu.normalize(X, V, V, mask=MASK.char())),
        (
            ValueError,
            "contiguous mask",
            lambda: gpu.grad_sums(X, X, V, V, mask=MASK.movedim(0, 1).contiguous().movedim(0, 1)),
        ),
        (ValueError, "mask on cpu", lambda: gpu.grad_sums(X, X, V, V, mask=MASK.to("meta"))),
        (TypeError, "mask to be a", lambda: gpu.grad_sums(X, X, V, V, mask=[1])),
        (ValueError, "weight", lambda: gpu.moments_and_normalize(X, V[:2], V, EPS)),
        (ValueError, "residual", lambda: gpu.moments_and_normalize(X, V, V, EPS, X[:2])),
        (ValueError, "mask", lambda: gpu.moments_and_normalize(X, V, V, EPS, X, True, MASK[:2])),
        (
            ValueError,
            "running_var",
            lambda: gpu.moments_and_normalize(X, V, V, EPS, running_mean=V, running_var=V[:1]),
        ),
        (ValueError, "dy of shape", lambda: gpu.grad_sums(X[:1], X, V, V)),
        (ValueError, "mean", lambda: gpu.grad_sums(X, X, V[1:], V)),
        (ValueError, "dy .*float64", lambda: gpu.grad_input(X.double(), X, V, V, V, V, V, 140)),
        (ValueError, "sum_dy of", lambda: gpu.grad_input(X, X, V, V, V, V[1:], V, 140)),
        (ValueError, "sum_dy_x_hat of", lambda: gpu.grad_input(X, X, V, V, V, V, V[1:], 140)),
        (
            ValueError,
            "dresidual of empty_like",
            lambda: gpu.grad_input(X, X, V, V, V, V, V, 140, dresidual=LAST),
        ),
        (ValueError, "dy of", lambda: gpu.grad_sums_and_input(X[..., 1:], X, V, V, V, 140)),
        (ValueError, "weight", lambda: gpu.grad_sums_and_input(X, X, V, V, V[1:], 140)),
        (
            ValueError,
            "dresidual of shape",
            lambda: gpu.grad_sums_and_input(X, X, V, V, V, 140, dresidual=X[:1]),
        ),
    ],
)
def test_what_does_not_fit_the_input_is_refused(monkeypatch, error, message, call):
    """A kernel would read, or write, past its end."""
    monkeypatch.setattr(gpu, "_launch", None)
    with pytest.raises(error, match=message):
        call()


# --- The layer, by backend="gpu" ------------------------------------------------------------------


def layer(x, residual, w, b, running, training, relu, backend):
    """The output, and the gradients of everything that is given, for a fixed dy."""
    tensors = {"x": x, "residual": residual, "w": w, "b": b}
    leaves = {name: t.detach().clone() for name, t in tensors.items() if t is not None}
    for leaf in leaves.values():
        leaf.requires_grad_()
    x, residual, w, b = (leaves.get(name) for name in tensors)
    if backend == "torch":
        y = torch.nn.functional.batch_norm(x, *running, w, b, training, 0.25, EPS)
        y = y if residual is None else y + residual
        y = y.relu() if relu else y
    else:
        fused = {"residual": residual, "activation": "relu" if relu else None}
        y = functional.batch_norm(x, *running, w, b, training, 0.25, EPS, **fused, backend=backend)
    dy = draw(y.shape, seed=5).to(y.dtype)
    return y, *torch.autograd.grad(y, list(leaves.values()), dy)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("with_residual", "relu"), FUSED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_functional(layout, with_residual, relu, training, cut):
    x = draw((4, 6, 7, 7), layout=layout, offset=1.0)
    residual = draw(x.shape, layout=layout, seed=3) if with_residual else None
    w, b = vectors(6)
    running = [torch.full((6,), 0.5), torch.full((12,), 2.0)[::2]]  # one is not contiguous
    running_double = doubles(*running)
    got = layer(x, residual, w, b, running, training, relu, "gpu")
    expected = layer(*doubles(x, residual, w, b), running_double, training, relu, "torch")
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, 1e-5)
    assert got[0].stride() == x.stride()
    for one, other in zip(running, running_double, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("shape", [(1, 7), (1, 3, 1, 1)], ids=str)
def test_one_value_per_channel(shape):
    """Enough in evaluation; in training the variance would be 0, which torch refuses too."""
    x, (w, b) = draw(shape), vectors(shape[1])
    running = [torch.full_like(w, 0.5), torch.full_like(w, 2.0)]
    got = layer(x, x, w, b, running, False, True, "gpu")
    expected = layer(*doubles(x, x, w, b), doubles(*running), False, True, "torch")
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, 1e-5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x, x, w, b, running, True, True, "gpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_synchronised(monkeypatch, layout):
    """Three shards, uneven and one of them empty; all but the first stand for other ranks."""
    x, dy = draw((9, 5, 3, 7), layout=layout), draw((9, 5, 3, 7), layout=layout, seed=2)
    (w, b), parts = vectors(5), [slice(0, 2), slice(2, 2), slice(2, 9)]
    xd, dyd, wd, bd = doubles(x, dy, w, b)
    yd, cache = reference.batch_norm_forward(xd, wd, bd, eps=EPS)
    grads = reference.batch_norm_backward(torch.where(yd > 0, dyd, 0), cache)
    others = merge(*(reference.moments(xd[part]) for part in parts[1:]))
    others = Moments(others.count, others.mean.float(), others.m2.float())
    total = torch.stack((grads.dbias, grads.dweight)).float()
    sync = SimpleNamespace(
        sync_moments=lambda local, group: merge(local, others), sync_sum=lambda sums, group: total
    )
    monkeypatch.setattr(functional, "_distributed", lambda: sync)
    leaf = x[parts[0]].detach().requires_grad_()
    options = {"activation": "relu", "process_group": "three", "backend": "gpu"}
    y = functional.batch_norm(leaf, None, None, w, b, True, **options)
    (dx,) = torch.autograd.grad(y, leaf, dy[parts[0]])
    assert_close(y, yd.relu()[parts[0]], 2e-6)
    assert_close(dx, grads.dx[parts[0]], 4e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_the_programs_does_not_count(monkeypatch, cut, layout):
    """A GPU runs them as it likes: backwards, every bit is the same."""
    from triton.runtime.interpreter import interpreter_builder as builder

    x, (w, b) = draw((3, 9, 5, 7), layout=layout), vectors(9)

    def run():
        running = [torch.full_like(w, 0.5), torch.full_like(w, 2.0)]
        y, batch, inv_std, mask = forward(x, w, b, x, True, running)
        dresidual = gpu.empty_like(x)
        grads = gpu.grad_sums_and_input(
            x, x, batch.mean, inv_std, w, batch.count, mask=mask, dresidual=dresidual
        )
        return [y, batch.mean, batch.m2, inv_std, mask, *running, *grads, dresidual]

    forwards, place, order = run(), builder.set_grid_idx, []

    def backwards(*index):
        order.append([n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True)])
        place(*order[-1])

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    assert all(map(torch.equal, forwards, run()))
    assert len(order) > 2 and order != sorted(order)


def test_functional_second_derivative_and_parts():
    """Where the kernels are not used for all: a second derivative, a gradient of γ alone."""
    x, (w, b) = draw((3, 4, 5)), vectors(4)
    for backend in ("gpu", "reference"):
        x_, w_ = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = functional.batch_norm(
            x_, None, None, w_, b, True, activation="relu", residual=x, backend=backend
        )
        (dx,) = torch.autograd.grad((y * y).sum(), x_, create_graph=True)
        second = torch.autograd.grad((dx * dx).sum(), (x_, w_))
        y = functional.batch_norm(
            x, None, None, w_, b, True, activation="relu", residual=x, backend=backend
        )
        (dw,) = torch.autograd.grad((y * y).sum(), w_)
        if backend == "gpu":
            found = (*second, dw)
        else:
            for one, other in zip(found, (*second, dw), strict=True):
                assert_close(one, other, 1e-5)


def test_running_statistics_have_a_new_version():
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    gpu.moments_and_normalize(
        draw((8, 3)), None, None, EPS, running_mean=running_mean, running_var=running_var
    )
    assert running_mean._version == running_var._version == 1
