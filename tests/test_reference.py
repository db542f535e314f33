"""The reference against PyTorch, against finite differences and against what the theory says."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import NamedTuple

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bnlib import (
    Grads,
    batch_norm_backward,
    batch_norm_forward,
    merge,
    moments,
    reduction_axes,
    reference,
    split_groups,
    standardize,
    update_running_stats,
)

F = torch.nn.functional
EPS = 1e-5
# Sizes 1, primes and 1023, ranks 2 to 5, at least two values per channel; C is axis 1 here.
SHAPES = [
    (2, 1),
    (7, 3),
    (1023, 5),
    (1, 3, 2),
    (2, 1, 1023),
    (2, 3, 5, 7),
    (1, 4, 1, 2),
    (5, 2, 1, 1),
    (13, 17, 3, 3),
    (1, 1, 31, 33),
    (2, 3, 2, 3, 5),
]
LAYOUTS = [(s, a) for s in SHAPES for a in (1, -1, 0, 2) if a < len(s)]


class Case(NamedTuple):
    """Random input, gradient, parameters and running statistics; the channels are axis 1."""

    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def running(self) -> dict[str, torch.Tensor]:
        return {"running_mean": self.running_mean, "running_var": self.running_var}


def make(shape, affine=True, dtype=torch.float64, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    c = shape[1]
    weight, bias = (draw(c), draw(c)) if affine else (None, None)
    return Case(2 * draw(*shape) + 1, draw(*shape), weight, bias, draw(c), draw(c).square() + 0.5)


def torch_forward(x, case, training, running=None):
    mean, var = running or (case.running_mean.clone(), case.running_var.clone())
    return F.batch_norm(x, mean, var, case.weight, case.bias, training, momentum=0.1, eps=EPS)


def torch_all(case: Case, training: bool) -> tuple[torch.Tensor, Grads]:
    """PyTorch's output and gradients."""
    given = [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]
    x, weight, bias = given if case.weight is not None else (*given, None, None)
    y = torch_forward(x, case._replace(weight=weight, bias=bias), training)
    grads = torch.autograd.grad(y, given, case.dy)
    return y.detach(), Grads(*grads) if case.weight is not None else Grads(*grads, None, None)


def assert_close(got, expected, rtol=1e-12, atol=1e-12):
    """``None`` where None is expected; else the same dtype and shape, and close values."""
    if expected is None:
        assert got is None
    else:
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


# --- parity with PyTorch --------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(("shape", "channel_axis"), LAYOUTS)
def test_output_and_gradients_in_float64(shape, channel_axis, affine, training):
    case = make(shape, affine)
    expected, grads = torch_all(case, training)
    y, cache = batch_norm_forward(
        case.x.movedim(1, channel_axis),
        case.weight,
        case.bias,
        **case.running(),
        training=training,
        channel_axis=channel_axis,
    )
    got = batch_norm_backward(case.dy.movedim(1, channel_axis), cache)
    assert_close(y.movedim(channel_axis, 1), expected)
    assert_close(got.dx.movedim(channel_axis, 1), grads.dx)
    assert_close(got.dweight, grads.dweight)
    assert_close(got.dbias, grads.dbias)


def test_one_value_per_channel_is_fine_in_evaluation():
    case = make((1, 3))
    y, _ = batch_norm_forward(case.x, case.weight, case.bias, **case.running(), training=False)
    assert_close(y, torch_forward(case.x, case, training=False))


@pytest.mark.parametrize("given", ["weight", "bias"])
def test_weight_and_bias_are_independent(given):
    case = make((7, 3, 2))
    case = case._replace(**{"weight": None, "bias": None, given: getattr(case, given)})
    y, cache = batch_norm_forward(case.x, case.weight, case.bias)
    grads = batch_norm_backward(case.dy, cache)
    assert_close(y, torch_forward(case.x, case, training=True))
    assert (grads.dweight is None) == (given == "bias")
    assert (grads.dbias is None) == (given == "weight")


def test_no_sum_may_have_a_mask():
    x, sums = np.ones((4, 2)), [np.ones(2), np.ma.masked_equal([1.0, 2.0], 2)]
    for sum_dy, sum_dy_x_hat in (sums, sums[::-1]):
        with pytest.raises(TypeError, match="without a mask"):
            reference.grad_input(x, x, x[0], x[0], None, sum_dy, sum_dy_x_hat, 4)


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_running_statistics(shape, steps):
    case = make(shape)
    ours = (case.running_mean, case.running_var)
    theirs = (case.running_mean.clone(), case.running_var.clone())
    for step in range(steps):
        x = make(shape, seed=step).x
        torch_forward(x, case, True, theirs)
        ours = update_running_stats(*ours, batch_norm_forward(x)[1].moments, momentum=0.1)
    for got, expected in zip(ours, theirs, strict=True):
        assert_close(got, expected)


def test_training_then_evaluation():
    case = make((7, 3, 5))
    bn = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    for seed in range(3):
        x = make((7, 3, 5), seed=seed).x
        bn(x)
        mean, var = update_running_stats(mean, var, moments(x), bn.momentum)
    y, _ = batch_norm_forward(
        case.x, bn.weight, bn.bias, running_mean=mean, running_var=var, training=False
    )
    assert_close(y, bn.eval()(case.x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_in_float32(shape, training):
    case = make(shape, dtype=torch.float32)
    truth, true_grads = torch_all(Case(*(t.double() for t in case)), training)
    y, cache = batch_norm_forward(
        case.x, case.weight, case.bias, **case.running(), training=training
    )
    grads = batch_norm_backward(case.dy, cache)
    # A value is a sum of a few terms, each some roundings (6e-8) off; the largest terms are
    # |x̂| inv_std |dy|, up to about 100 in these data where m = 2, and sums of m such terms.
    for got, expected in zip((y, *grads), (truth, *true_grads), strict=True):
        assert got.dtype == torch.float32
        scale = max(1.0, float(expected.abs().max()))
        assert_close(got.double(), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input_is_the_float32_result_rounded_once(dtype, training):
    case = make((13, 3, 7), dtype=dtype)
    stats = {name: t.float() for name, t in case.running().items()}
    parameters = (case.weight.float(), case.bias.float())
    y, cache = batch_norm_forward(case.x, *parameters, **stats, training=training)
    grads = batch_norm_backward(case.dy, cache)
    wide, wide_cache = batch_norm_forward(case.x.float(), *parameters, **stats, training=training)
    wide_grads = batch_norm_backward(case.dy.float(), wide_cache)
    assert cache.mean.dtype == cache.inv_std.dtype == torch.float32
    assert torch.equal(y, wide.to(dtype))
    assert torch.equal(grads.dx, wide_grads.dx.to(dtype))
    assert torch.equal(grads.dweight, wide_grads.dweight)
    assert torch.equal(grads.dbias, wide_grads.dbias)
    # PyTorch rounds to 16 bits too, from a float32 result that may differ in its last bits.
    expected = F.batch_norm(case.x, *stats.values(), *parameters, training=training)
    assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_16_bit_parameters_get_16_bit_gradients():
    case = make((13, 3, 7), dtype=torch.bfloat16)
    y, cache = batch_norm_forward(case.x, case.weight, case.bias)
    assert {t.dtype for t in (y, *batch_norm_backward(case.dy, cache))} == {torch.bfloat16}
    assert cache.mean.dtype == torch.float32


@pytest.mark.parametrize(
    "relayout",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.movedim(0, 3).contiguous().movedim(3, 0),
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
        lambda t: t.flip(2).contiguous().flip(2),
    ],
    ids=["channels_last", "transposed", "strided", "flipped"],
)
def test_memory_layout_does_not_matter(relayout):
    case = make((4, 3, 5, 6))
    expected, grads = torch_all(case, training=True)
    y, cache = batch_norm_forward(relayout(case.x), case.weight, case.bias)
    assert_close(y, expected)
    assert_close(batch_norm_backward(relayout(case.dy), cache).dx, grads.dx)


def test_numpy_views_with_negative_strides():
    x = make((4, 3, 5)).x.numpy()[::-1, ::-1, ::2]
    y, _ = batch_norm_forward(x)
    np.testing.assert_array_equal(y, batch_norm_forward(np.ascontiguousarray(x))[0])


# --- one code, every array library ----------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("library", [np, array_api_strict])
def test_every_library_computes_the_same(library, training):
    def everything(asarray):
        x, dy, weight, bias, mean, var = (asarray(t.numpy()) for t in make((5, 3, 2, 4)))
        running = {"running_mean": mean, "running_var": var}
        y, cache = batch_norm_forward(x, weight, bias, **running, training=training)
        merged = merge(moments(x[:2, ...]), moments(x[2:, ...]))
        after = update_running_stats(mean, var, merged, 0.1)
        return [y, *batch_norm_backward(dy, cache), merged.mean, merged.m2, *after]

    for got, expected in zip(everything(library.asarray), everything(torch.asarray), strict=True):
        assert isinstance(got, type(library.asarray(0.0)))
        np.testing.assert_allclose(np.from_dlpack(got), expected, rtol=1e-12, atol=1e-12)


def test_numpy_is_enough():
    code = """
import sys
for name in "torch", "jax", "scipy", "matplotlib", "sklearn", "skimage", "PIL":
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
import bnlib
y, cache = bnlib.batch_norm_forward(np.array([[1.0, 10.0], [3.0, 30.0]]), np.ones(2), np.zeros(2))
print(np.round(y, 4).tolist(), bnlib.batch_norm_backward(y, cache).dbias.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "[[-1.0, -1.0], [1.0, 1.0]] [0.0, 0.0]\n"


def test_a_normal_batch_takes_no_absurd_time():
    case = make((32, 64, 56, 56), dtype=torch.float32)
    start = time.perf_counter()
    _, cache = batch_norm_forward(case.x, case.weight, case.bias)
    batch_norm_backward(case.dy, cache)
    assert time.perf_counter() - start < 5  # 0.2 s on one quiet core


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autograd_through_the_forward_formula(training):
    case = make((4, 3, 5))
    _, grads = torch_all(case, training)
    given = [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias)]
    y, _ = batch_norm_forward(*given, **case.running(), training=training)
    for got, want in zip(torch.autograd.grad(y, given, case.dy), grads, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_first_and_second_derivatives(check, training):
    case = make((3, 2, 3))

    def forward(x, weight, bias):
        return batch_norm_forward(x, weight, bias, **case.running(), training=training)[0]

    assert check(forward, [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias)])


def test_the_backward_formula_can_be_differentiated_again():
    case = make((4, 3, 5))
    v = make((4, 3, 5), seed=1).x

    def second(first_order):
        x = case.x.clone().requires_grad_()
        return torch.autograd.grad((first_order(x) * v).sum(), x)[0]

    def by_torch(x):
        y = torch_forward(x, case, training=True)
        return torch.autograd.grad(y, x, case.dy, create_graph=True)[0]

    def by_formula(x):
        return batch_norm_backward(case.dy, batch_norm_forward(x, case.weight, case.bias)[1]).dx

    assert_close(second(by_formula), second(by_torch), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("wrt", [0, 1, 2], ids=["x", "weight", "bias"])
def test_finite_differences_in_numpy(wrt, training):
    x, dy, weight, bias, mean, var = (t.numpy() for t in make((3, 2, 2, 2)))
    given = [x, weight, bias]

    def forward(changed):
        arguments = [*given[:wrt], changed, *given[wrt + 1 :]]
        return batch_norm_forward(*arguments, running_mean=mean, running_var=var, training=training)

    got = batch_norm_backward(dy, forward(given[wrt])[1])[wrt]
    h = 1e-5  # truncation h², rounding 1e-16/h: both far under the tolerance
    for index in np.ndindex(got.shape):
        step = np.zeros_like(got)
        step[index] = h
        up, down = forward(given[wrt] + step)[0], forward(given[wrt] - step)[0]
        assert np.sum(dy * (up - down)) / (2 * h) == pytest.approx(got[index], rel=0, abs=1e-7)


# --- what the theory says -------------------------------------------------------------------------

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60, report_multiple_bugs=False)
numbers = st.floats(-100, 100, allow_subnormal=False)
shapes = st.tuples(st.integers(2, 8), st.integers(1, 3), st.integers(1, 4))
batches = arrays(np.float64, shapes, elements=numbers)
seeds = st.integers(0, 2**32 - 1)


def expected_variance(x):
    var = moments(x).var()
    return var / (var + EPS)


@PROPERTY
@given(x=batches)
def test_output_has_mean_0_and_variance_a_little_under_1(x):
    y, _ = batch_norm_forward(x)
    got = moments(y)
    # Both are exact but for the rounding of x - mean, at most 100 x 1e-16, times 1/√ε = 316.
    np.testing.assert_allclose(got.mean, 0, atol=1e-10)
    np.testing.assert_allclose(got.var(), expected_variance(x), atol=1e-10)


@PROPERTY
@given(x=batches)
def test_no_output_exceeds_samuelsons_bound(x):
    y, cache = batch_norm_forward(x)
    assert np.abs(y).max() <= np.sqrt(cache.moments.count - 1) + 1e-10


@pytest.mark.parametrize("m", [2, 3, 100])
def test_a_lone_outlier_reaches_samuelsons_bound(m):
    x = np.zeros((m, 1))
    x[0] = 1
    y, _ = batch_norm_forward(x, eps=1e-15)
    assert y.max() == pytest.approx(np.sqrt(m - 1), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1e-3, 29974.018, 8.349985e6])
def test_a_constant_channel_becomes_the_bias(value):
    x = np.full((2249, 1), value, dtype=np.float32)
    y, _ = batch_norm_forward(x, np.full(1, 3, np.float32), np.full(1, 7, np.float32))
    assert np.unique(y).tolist() == [7]


@PROPERTY
@given(x=batches, scale=st.floats(0.1, 10), sign=st.sampled_from([-1, 1]), shift=numbers)
def test_affine_changes_of_a_channel_cancel_but_for_epsilon(x, scale, sign, shift):
    y, _ = batch_norm_forward(sign * scale * x + shift, eps=1e-3)
    expected, _ = batch_norm_forward(x, eps=1e-3 / scale**2)
    np.testing.assert_allclose(y, sign * expected, rtol=0, atol=1e-9)


@PROPERTY
@given(x=batches, data=st.data())
def test_permuting_samples_permutes_outputs(x, data):
    order = data.draw(st.permutations(range(len(x))))
    y, _ = batch_norm_forward(x)
    np.testing.assert_allclose(batch_norm_forward(x[order])[0], y[order], rtol=0, atol=1e-10)


@PROPERTY
@given(x=batches, seed=seeds)
def test_channels_do_not_see_each_other(x, seed):
    other = x.copy()
    other[:, 1:] = np.random.default_rng(seed).normal(size=other[:, 1:].shape)
    y, _ = batch_norm_forward(x)
    np.testing.assert_allclose(batch_norm_forward(other)[0][:, 0], y[:, 0], rtol=0, atol=1e-10)


@PROPERTY
@given(seed=seeds, spread=st.floats(1e-4, 10), eps=st.floats(1e-8, 1))
def test_what_the_input_gradient_is_orthogonal_to(seed, spread, eps):
    rng = np.random.default_rng(seed)
    x, dy, weight = rng.normal(0, spread, (6, 3, 2)), rng.normal(size=(6, 3, 2)), rng.normal(size=3)
    _, cache = batch_norm_forward(x, weight, np.zeros(3), eps=eps)
    dx, dweight, _ = batch_norm_backward(dy, cache)
    x_hat = batch_norm_forward(x, eps=eps)[0]
    var, r = cache.moments.var(), cache.inv_std
    atol = 1e-12 * r.max()
    np.testing.assert_allclose(dx.sum((0, 2)), 0, atol=atol)
    along_x_hat = weight * r * dweight * eps / (var + eps)  # 0 only where ε is
    np.testing.assert_allclose((dx * x_hat).sum((0, 2)), along_x_hat, rtol=1e-9, atol=atol)


# --- the trap: C = W ------------------------------------------------------------------------------


def per_channel_layer(x):
    return batch_norm_forward(x)[0]


def trap(x):
    """The right statistics, applied along W: it runs because C = W."""
    stats = moments(x)
    return (x - stats.mean) / np.sqrt(stats.var() + EPS)


def assert_normalizes_every_channel(normalize):
    @PROPERTY
    @given(n=st.integers(2, 4), c=st.integers(2, 4), h=st.integers(1, 4), seed=seeds)
    def holds(n, c, h, seed):
        x = np.random.default_rng(seed).normal(size=(n, c, h, c))
        got = moments(normalize(x))
        np.testing.assert_allclose(got.mean, 0, atol=1e-10)
        np.testing.assert_allclose(got.var(), expected_variance(x), atol=1e-10)

    holds()


def test_the_library_normalizes_every_channel():
    assert_normalizes_every_channel(per_channel_layer)


def test_broadcasting_along_the_width_is_caught():
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_normalizes_every_channel(trap)


def test_the_trap_is_silent_for_c_equal_to_w_and_loud_otherwise():
    x = np.random.default_rng(0).normal(size=(4, 3, 5, 3))
    assert np.abs(trap(x) - per_channel_layer(x)).max() > 0.1
    with pytest.raises(ValueError, match="broadcast"):
        trap(x[..., :2])


# --- empty, NaN, extreme --------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (2, 3, 0), (2, 3, 0, 4)])
def test_empty_batch(shape, asarray, training):
    x, dy, weight, bias, mean, var = (asarray(t.numpy()) for t in make(shape))
    y, cache = batch_norm_forward(
        x, weight, bias, running_mean=mean, running_var=var, training=training
    )
    dx, dweight, dbias = batch_norm_backward(dy, cache)
    assert y.shape == dx.shape == shape
    assert dweight.tolist() == dbias.tolist() == [0, 0, 0]


def test_an_empty_batch_leaves_the_running_statistics():
    old = (np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    new = update_running_stats(*old, moments(np.ones((0, 2))), 0.1)
    assert [v.tolist() for v in new] == [[1, 2], [3, 4]]
    assert not any(np.shares_memory(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, for inf - inf
def test_nan_and_infinity_stay_in_their_channel(bad):
    case = make((6, 3, 2))
    x = case.x.numpy()
    clean, _ = batch_norm_forward(x)
    x[2, 1, 0] = bad
    y, cache = batch_norm_forward(x)
    dx, _, _ = batch_norm_backward(case.dy.numpy(), cache)
    for got in (y, dx):
        assert np.isnan(got[:, 1]).all()
        assert np.isfinite(got[:, [0, 2]]).all()
    np.testing.assert_array_equal(y[:, [0, 2]], clean[:, [0, 2]])


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray])
@pytest.mark.parametrize("offset", [1e4, 1e5, 1e6])
def test_a_large_mean_in_float32(asarray, offset):
    x = (np.random.default_rng(0).normal(size=(256, 3, 16)) + offset).astype(np.float32)
    truth, _ = batch_norm_forward(x.astype(np.float64))
    y, _ = batch_norm_forward(asarray(x))
    # The mean is a float32: half an ulp of it is what every output may be off.
    np.testing.assert_allclose(y, truth, rtol=1e-5, atol=np.spacing(np.float32(offset)))


# --- what is kept and what is not touched ---------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_is_written_to(training):
    arrays_ = [t.numpy() for t in make((5, 3, 2))]
    for a in arrays_:
        a.flags.writeable = False
    x, dy, weight, bias, mean, var = arrays_
    y, cache = batch_norm_forward(
        x, weight, bias, running_mean=mean, running_var=var, training=training
    )
    grads = batch_norm_backward(dy, cache)
    new = update_running_stats(mean, var, moments(x), 0.1)
    for made in (y, *grads, *new):
        assert not any(np.shares_memory(made, a) for a in arrays_)


@pytest.mark.parametrize("momentum", [0, 0.25, 1, np.float64(0.25)])
def test_momentum_is_the_weight_of_the_new_batch(momentum):
    batch = moments(np.array([[1.0], [3.0]]))
    old = (np.zeros(1, np.float32), np.ones(1, np.float32))
    mean, var = update_running_stats(*old, batch, momentum)
    assert mean.dtype == var.dtype == np.float32
    assert (mean[0], var[0]) == (2 * momentum, 1 - momentum + 2 * momentum)  # unbiased: 2, not 1
    assert not np.shares_memory(mean, old[0])


def test_a_parameter_can_be_given_and_the_running_statistics_detached():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(3))
    y, cache = batch_norm_forward(x, weight)
    y.square().sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        new = update_running_stats(torch.zeros(3), torch.ones(3), cache.moments, 0.1)
    assert not any(v.requires_grad for v in new)


def test_a_numpy_epsilon_changes_nothing():
    x = make((5, 3), dtype=torch.float32).x.numpy()
    y, cache = batch_norm_forward(x, eps=np.float64(1e-5))
    assert cache.inv_std.dtype == np.float32
    np.testing.assert_array_equal(y, batch_norm_forward(x, eps=1e-5)[0])


# --- errors ---------------------------------------------------------------------------------------

X = np.ones((4, 3, 2))
V = np.ones(3)
EVAL = {"training": False, "running_mean": V, "running_var": V}


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.object_, np.complex128])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "running_mean", "running_var"])
def test_dtypes_must_be_real_floating(name, dtype):
    given = {"x": X, "weight": V, "bias": V, "running_mean": V, "running_var": V}
    given[name] = given[name].astype(dtype)
    with pytest.raises(TypeError) as caught:
        batch_norm_forward(**given)
    assert str(caught.value) == (
        f"expected {name} with a real floating dtype, got {np.dtype(dtype)}"
    )


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        (([[1.0]],), "x: builtins.list"),
        ((X, [1.0, 1.0, 1.0]), "x: numpy.ndarray, weight: builtins.list"),
        ((X, 1.0), "x: numpy.ndarray, weight: builtins.float"),
        ((X, None, 0), "x: numpy.ndarray, bias: builtins.int"),
        ((None, V), "x: builtins.NoneType, weight: numpy.ndarray"),
        ((X, torch.ones(3)), "x: numpy.ndarray, weight: torch.Tensor"),
        ((torch.ones(4, 3), V), "x: torch.Tensor, weight: numpy.ndarray"),
    ],
)
def test_arrays_must_be_of_one_library(arguments, kinds):
    with pytest.raises(TypeError) as caught:
        batch_norm_forward(*arguments)
    assert str(caught.value) == f"expected arrays of one array-API library, got {kinds}"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize(
    ("shape", "channel_axis", "channels"),
    [((2,), 1, 3), ((1,), 1, 3), ((), 1, 3), ((1, 3, 1), 1, 3), ((3,), -1, 2)],
)
def test_parameters_must_have_one_value_per_channel(name, shape, channel_axis, channels, training):
    right = np.ones(channels)
    given = {"running_mean": right, "running_var": right, name: np.ones(shape)}
    with pytest.raises(ValueError) as caught:
        batch_norm_forward(X, **given, training=training, channel_axis=channel_axis)
    assert str(caught.value) == (
        f"expected {name} of shape ({channels},) for input of shape (4, 3, 2) with "
        f"channel_axis={channel_axis}, got shape {shape}"
    )


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones(5), {}, "expected ndim >= 2 (samples and channels), got ndim 1"),
        (X, {"channel_axis": 3}, "expected channel_axis in -3..2 for ndim 3, got 3"),
        (
            np.ones((1, 3)),
            {},
            "expected more than 1 value per channel in training, got input of shape (1, 3)",
        ),
        (
            X,
            {"training": False},
            "expected running statistics in evaluation, got running_mean=None",
        ),
        (
            X,
            EVAL | {"running_var": None},
            "expected running statistics in evaluation, got running_var=None",
        ),
        (X, {"eps": 0}, "expected eps > 0 in training, got 0"),
        (X, {"eps": -1e-5}, "expected eps > 0 in training, got -1e-05"),
        (X, {"eps": float("nan")}, "expected eps > 0 in training, got nan"),
        (X, EVAL | {"eps": -1}, "expected eps >= 0, got -1"),
    ],
)
def test_values_that_make_no_sense(x, options, message):
    with pytest.raises(ValueError) as caught:
        batch_norm_forward(x, **options)
    assert str(caught.value) == message


def test_epsilon_0_is_allowed_in_evaluation():
    y, _ = batch_norm_forward(X, **EVAL | {"eps": 0})
    assert np.unique(y).tolist() == [0]


@pytest.mark.parametrize(
    ("dy", "error", "message"),
    [
        (np.ones((4, 3)), ValueError, "expected dy of shape (4, 3, 2), got (4, 3)"),
        (torch.ones(4, 3, 2), TypeError, "got dy: torch.Tensor, x: numpy.ndarray"),
        (np.ones((4, 3, 2), int), TypeError, "expected dy with a real floating dtype, got int64"),
        (None, TypeError, "got dy: builtins.NoneType, x: numpy.ndarray"),
    ],
)
def test_backward_names_what_arrived_and_what_was_expected(dy, error, message):
    _, cache = batch_norm_forward(X)
    with pytest.raises(error) as caught:
        batch_norm_backward(dy, cache)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "x", "momentum", "error", "message"),
    [
        ((V, V), X, 1.5, ValueError, "expected momentum in 0..1, got 1.5"),
        ((V, V), X, -0.1, ValueError, "expected momentum in 0..1, got -0.1"),
        ((V, V), X, None, ValueError, "expected momentum in 0..1, got None"),
        ((np.ones(2), V), X, 0.1, ValueError, "of shape (3,), got (2,) and (3,)"),
        ((torch.ones(3), torch.ones(3)), X, 0.1, TypeError, "running_mean: torch.Tensor"),
        ((V, np.ones(3, int)), X, 0.1, TypeError, "expected running_var with a real floating"),
        ((V, V), np.ones((1, 3)), 0.1, ValueError, "more than 1 values per channel"),
    ],
)
def test_update_names_what_arrived_and_what_was_expected(old, x, momentum, error, message):
    with pytest.raises(error) as caught:
        update_running_stats(*old, moments(x), momentum)
    assert message in str(caught.value)


# --- the siblings ---------------------------------------------------------------------------------


def grouped(x, groups, channel_axis=1):
    """Group norm as the instance norm of the split tensor."""
    split = split_groups(x, groups, channel_axis)
    axes = reduction_axes(split.ndim, channel_axis % x.ndim, "instance")
    return standardize(split, axes, EPS).reshape(x.shape)


SIBLINGS = {
    "batch": (
        lambda x: standardize(x, reduction_axes(x.ndim), EPS),
        lambda x: F.batch_norm(x, None, None, training=True, eps=EPS),
    ),
    "layer": (
        lambda x: standardize(x, reduction_axes(x.ndim, norm="layer"), EPS),
        lambda x: F.layer_norm(x, x.shape[1:], eps=EPS),
    ),
    "instance": (
        lambda x: standardize(x, reduction_axes(x.ndim, norm="instance"), EPS),
        lambda x: F.instance_norm(x, eps=EPS),
    ),
    "transformer": (lambda x: standardize(x, -1, EPS), lambda x: F.layer_norm(x, x.shape[-1:])),
    "one group": (lambda x: grouped(x, 1), lambda x: F.group_norm(x, 1, eps=EPS)),
    "a group each": (
        lambda x: grouped(x, x.shape[1]),
        lambda x: F.group_norm(x, x.shape[1], eps=EPS),
    ),
    "rms": (
        lambda x: standardize(x, -1, EPS, center=False),
        lambda x: F.rms_norm(x, x.shape[-1:], eps=EPS),
    ),
    "rms of a sample": (
        lambda x: standardize(x, reduction_axes(x.ndim, norm="layer"), EPS, center=False),
        lambda x: F.rms_norm(x, x.shape[1:], eps=EPS),
    ),
}
PAIRS = [(name, *pair) for name, pair in SIBLINGS.items()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS, ids=SIBLINGS)
def test_siblings_in_float64(name, ours, theirs, shape):
    x = make(shape).x
    try:
        expected = theirs(x)
    except ValueError as error:  # a single value, or no position: PyTorch refuses
        assert "more than 1" in str(error)
        assert name in ("instance", "a group each") and x[0, 0].numel() == 1
        return
    assert_close(ours(x), expected)
    gradient = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for data in (x, x.movedim(0, -1).contiguous().movedim(-1, 0)):  # and not contiguous
        one, other = data.clone().requires_grad_(), data.clone().requires_grad_()
        ours(one).backward(gradient)
        theirs(other).backward(gradient)
        assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(2, 6), (1, 6, 5), (3, 6, 7, 1), (2, 6, 3, 5), (0, 6, 2, 3)])
@pytest.mark.parametrize("last", [False, True], ids=["C first", "C last"])
def test_group_norm_in_float64(shape, groups, last):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if x[:1].numel() == groups:
        with pytest.raises(ValueError, match="more than 1 value"):
            F.group_norm(x[:1], groups)
        assert (grouped(x, groups) == 0).all()
        return
    expected = F.group_norm(x, groups, eps=EPS)
    got = grouped(x.movedim(1, -1), groups, -1).movedim(-1, 1) if last else grouped(x, groups)
    assert_close(got, expected)


def test_batch_norm_is_one_of_the_siblings():
    case = make((7, 3, 5))
    assert_close(standardize(case.x, (0, 2), EPS), batch_norm_forward(case.x)[0], 0, 0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3, 0), (0, 3, 5)])
@pytest.mark.parametrize("center", [True, False])
def test_nothing_to_standardize(shape, center):
    for axes in (0, 1, (0, 1)):
        assert standardize(np.ones(shape), axes, center=center).shape == shape


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray, array_api_strict.asarray])
@pytest.mark.parametrize("center", [True, False])
def test_siblings_of_any_library(asarray, center):
    x = np.random.default_rng(0).normal(1, 2, size=(3, 4, 5))
    for axes in (0, -1, (1, 2), (0, 1, 2)):
        mean = x.mean(axis=axes, keepdims=True) if center else 0
        expected = x - mean
        expected = expected / np.sqrt((expected**2).mean(axis=axes, keepdims=True) + 1e-5)
        got = standardize(asarray(x), axes, center=center)
        assert type(got) is type(asarray(x))
        np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_siblings_are_computed_in_32_bits_at_least(dtype, center):
    x = (100 * torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))).to(dtype)
    y = standardize(x, 1, center=center)
    assert y.dtype == dtype
    expected = standardize(x.double(), 1, center=center)
    bound = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert (y - expected).abs().max() <= bound
    squares = (x.to(torch.float16) ** 2).mean(1)
    assert torch.isinf(squares).any() or dtype != torch.float16, "the naive way overflows"


@pytest.mark.parametrize("center", [True, False])
def test_a_large_mean_does_not_cost_the_siblings_their_digits(center):
    x = (np.random.default_rng(0).normal(size=(4, 4096)) + 1e5).astype(np.float32)
    expected = standardize(x.astype(np.float64), 1, center=center)
    # The mean is rounded to float32, where it is half a step of 0.0078 off at most.
    np.testing.assert_allclose(standardize(x, 1, center=center), expected, rtol=1e-5, atol=4e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, for inf - inf
def test_nan_and_infinity_stay_in_their_group(bad, center):
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    clean = standardize(x, (1, 2), center=center)
    x[1, 2, 3] = bad
    y = standardize(x, (1, 2), center=center)
    np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])
    assert not np.isfinite(y[1, 2, 3])


def test_a_group_of_one_value():
    x = np.array([[-3.0, 1e-3, 2.0]]).T
    assert standardize(x, 1).tolist() == [[0], [0], [0]]
    expected = x / np.sqrt(x**2 + 1e-5)
    np.testing.assert_allclose(standardize(x, 1, center=False), expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((2, 3)), 1, 0.0), ValueError, "expected eps > 0, got 0.0"),
        ((np.ones((2, 3)), 1, float("nan")), ValueError, "expected eps > 0, got nan"),
        ((np.ones((2, 3)), ()), ValueError, r"at least one, got \(\)"),
        ((np.ones((2, 3)), 2), ValueError, "expected axes in -2..1 for ndim 2, got 2"),
        ((np.ones((2, 3)), (0, 0)), ValueError, r"different axes, at least one, got \(0, 0\)"),
        ((np.ones((2, 3)), None), TypeError, "'NoneType' object is not iterable"),
        ((np.ones((2, 3), int), 1), TypeError, "real floating dtype, got int64"),
        (([[1.0]], 1), TypeError, "expected arrays of one array-API library, got x: builtins.list"),
    ],
)
def test_siblings_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        standardize(*arguments)
