"""Moments of a channel, and how those of parts merge into those of the whole."""

from __future__ import annotations

import itertools

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bnlib import Moments, merge, moments, reduction_axes

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
numbers = st.floats(-1e3, 1e3, allow_subnormal=False)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 3), st.integers(1, 4))
batches = arrays(np.float64, shapes, elements=numbers)
pieces = arrays(np.float64, st.tuples(st.integers(0, 5), st.just(2)), elements=numbers)


def assert_same(got: Moments, expected: Moments, size: float) -> None:
    """Equal to rounding, for values no larger than ``size``.

    A deviation carries an error of some units of float64's 1e-16 times ``size``, m2 that of a sum
    of ``count`` products of two deviations.
    """
    assert got.count == expected.count
    np.testing.assert_allclose(got.mean, expected.mean, rtol=0, atol=1e-14 * size)
    np.testing.assert_allclose(
        got.m2, expected.m2, rtol=0, atol=1e-14 * size**2 * max(expected.count, 1)
    )


def largest(*xs: np.ndarray) -> float:
    return max(float(np.abs(x).max(initial=1e-3)) for x in xs)


# --- moments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_axis", [0, 1, 2, -1])
def test_moments_are_those_of_numpy(channel_axis):
    x = np.random.default_rng(0).normal(3, 2, size=(5, 4, 7))
    by_channel = np.moveaxis(x, channel_axis, 0).reshape(x.shape[channel_axis], -1)
    got = moments(x, channel_axis)
    assert got.count == by_channel.shape[1]
    np.testing.assert_allclose(got.mean, by_channel.mean(1), rtol=1e-14)
    np.testing.assert_allclose(got.var(), by_channel.var(1), rtol=1e-13)
    np.testing.assert_allclose(got.var(correction=1), by_channel.var(1, ddof=1), rtol=1e-13)


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray, array_api_strict.asarray])
@pytest.mark.parametrize("axes", [0, -1, (1, 2), (2, 0), (0, 1, 2)], ids=str)
def test_moments_over_any_axes_are_those_of_numpy(axes, asarray):
    x = np.random.default_rng(0).normal(3, 2, size=(5, 4, 7))
    got = moments(asarray(x), axes=axes)
    mean, var = x.mean(axis=axes), x.var(axis=axes)
    assert got.count == x.size // mean.size
    np.testing.assert_allclose(np.asarray(got.mean), mean, rtol=1e-14, strict=True)
    np.testing.assert_allclose(np.asarray(got.var()), var, rtol=1e-13, strict=True)
    # Merged along an axis that was kept, they are those of both.
    if 0 not in np.atleast_1d(axes) and -1 in np.atleast_1d(axes):
        halves = moments(asarray(x[..., :3]), axes=-1), moments(asarray(x[..., 3:]), axes=-1)
        np.testing.assert_allclose(np.asarray(merge(*halves).var()), var, rtol=1e-13)


def test_axes_and_a_channel_axis_say_the_same():
    x = np.random.default_rng(0).normal(size=(5, 4, 7))
    for channel_axis in (0, 1, -1):
        axes = reduction_axes(3, channel_axis)
        for one, other in zip(moments(x, channel_axis), moments(x, axes=axes), strict=True):
            np.testing.assert_array_equal(one, other)
    assert moments(x[0, 0], axes=0).count == 7, "of a vector, too"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_statistics_have_at_least_32_bits(dtype, expected):
    got = moments(torch.ones(4, 3, dtype=dtype))
    assert got.mean.dtype == got.var().dtype == expected
    assert got.m2.dtype == torch.float64


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray])
@pytest.mark.parametrize("size", [1e17, 1e25, 1e37])
def test_sums_of_squares_beyond_float32(asarray, size):
    x = np.full((40000, 2), size, dtype=np.float32)
    x[::2] *= -1
    parts = [moments(asarray(x[:30001])), moments(asarray(x[30001:]))]
    for got in (moments(asarray(x)), merge(*parts)):
        np.testing.assert_allclose(got.m2, float(x[1, 0]) ** 2 * 40000, rtol=1e-6)
        assert (abs(got.mean) <= 1e-6 * size).all()
    if size == 1e17:
        np.testing.assert_allclose(moments(asarray(x)).var(), 1e34, rtol=1e-6)


def test_masked_arrays_are_refused():
    """The sums leave out what is masked, and the count would not."""
    x = np.ma.masked_equal(np.arange(12.0).reshape(6, 2), 3)
    with pytest.raises(TypeError, match="expected x without a mask, got a masked array"):
        moments(x)


def test_half_precision_does_not_overflow():
    x = torch.full((1000, 2), 1000.0, dtype=torch.float16)
    x[::2] += 8
    assert torch.isinf(x.sum(0, dtype=torch.float16)).all()
    got = moments(x)
    assert got.mean.tolist() == [1004, 1004]
    assert got.var().tolist() == [16, 16]


def naive_variance(x):
    """The formula that the library must never use."""
    return (x * x).mean(0) - x.mean(0) ** 2


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray])
@pytest.mark.parametrize("offset", [1e4, 1e5, 1e6])
def test_a_large_mean_costs_no_digits(asarray, offset):
    x = (np.random.default_rng(0).normal(size=(4096, 3)) + offset).astype(np.float32)
    truth = x.astype(np.float64).var(0)

    def error(variance):
        return np.abs(np.asarray(variance) / truth - 1).max()

    # The deviations are exact to a unit of float32 (6e-8) of themselves, their sum to a few more.
    assert error(moments(asarray(x)).var()) < 1e-5
    # E[x²] - E[x]² rounds at offset² x 6e-8, which is 6 at the least: every digit is lost.
    assert error(naive_variance(asarray(x))) > 1


@pytest.mark.parametrize("value", [8.349985e6, 962348.9, 29974.018, -1.1356972e7, 1e-3])
def test_a_constant_channel_has_no_negative_m2(value):
    x = np.full((2249, 2), value, dtype=np.float32)
    x[0, 0] = np.nextafter(x[0, 0], np.float32(np.inf))
    assert (moments(x).m2 >= 0).all()
    assert moments(x).mean[1] == x[1, 1]


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray])
@pytest.mark.parametrize("shape", [(100_003, 2), (1, 2, 97, 97)], ids=str)
def test_a_constant_is_its_own_mean(shape, asarray):
    """Channels last, NumPy adds the values one by one."""
    for value in (0.1, 3.3, 100.1, 7e6):
        x = asarray(
            np.moveaxis(np.full((*shape[:1], *shape[2:], shape[1]), value, np.float32), -1, 1)
        )
        got = moments(x)
        assert (got.mean == x[0, 0].flatten()[0]).all() and (got.m2 == 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (2, 3, 0), (0, 3, 0, 2)])
def test_empty_batch(shape):
    got = moments(np.ones(shape))
    assert got.count == 0
    assert got.mean.tolist() == got.m2.tolist() == [0, 0, 0]
    assert not np.shares_memory(got.mean, got.m2)


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, for inf - inf
def test_nan_and_infinity_stay_in_their_channel(asarray, bad):
    x = np.random.default_rng(0).normal(size=(6, 3, 2))
    clean = moments(x)
    x[2, 1, 0] = bad
    got = moments(asarray(x))
    assert np.isfinite(np.asarray(got.mean)).tolist() == [True, False, True]
    assert np.isnan(np.asarray(got.m2)).tolist() == [False, True, False]
    np.testing.assert_array_equal(np.asarray(got.m2)[[0, 2]], clean.m2[[0, 2]])


@PROPERTY
@given(x=batches, scale=st.floats(-10, 10, allow_subnormal=False), shift=numbers)
def test_scale_and_shift_laws(x, scale, shift):
    before, after = moments(x), moments(scale * x + shift)
    expected = Moments(before.count, scale * before.mean + shift, scale**2 * before.m2)
    assert_same(after, expected, size=10 * largest(x) + abs(shift))


@PROPERTY
@given(x=batches, data=st.data())
def test_the_order_of_samples_does_not_matter(x, data):
    order = data.draw(st.permutations(range(len(x))))
    assert_same(moments(x[order]), moments(x), size=largest(x))


def test_numpy_integers_as_count_keep_float32():
    part = moments(np.ones((4, 3), np.float32))._replace(count=np.int64(4))
    assert part.var(1).dtype == merge(part, part).mean.dtype == np.float32


# --- merge ----------------------------------------------------------------------------------------


@PROPERTY
@given(x=batches, data=st.data())
def test_any_split_equals_the_whole(x, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=6)))
    parts = [moments(part) for part in np.split(x, cuts)]  # equal cuts leave empty parts
    assert_same(merge(*parts), moments(x), size=largest(x))


@PROPERTY
@given(parts=st.lists(pieces, min_size=3, max_size=3))
def test_merge_is_associative_and_free_of_order(parts):
    a, b, c = map(moments, parts)
    size = largest(*parts)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)), size)
    for order in itertools.permutations((a, b, c)):
        assert_same(merge(*order), merge(a, b, c), size)


def test_merge_of_one_part_is_that_part():
    part = moments(np.random.default_rng(0).normal(1e6, 1, size=(5, 3)))
    for merged in (merge(part), merge(part, moments(np.ones((0, 3))))):
        assert merged.count == 5
        np.testing.assert_array_equal(merged.mean, part.mean)
        np.testing.assert_array_equal(merged.m2, part.m2)


def test_merge_of_empty_parts_is_empty():
    empty = moments(np.ones((0, 3)))
    assert merge(empty, empty).count == 0
    assert merge(empty, empty).mean.tolist() == [0, 0, 0]


def test_merge_of_1000_uneven_parts():
    rng = np.random.default_rng(0)
    x = rng.normal(1e3, 1, size=(20_000, 2))
    parts = np.split(x, np.sort(rng.integers(0, len(x), 999)))
    merged = merge(*map(moments, parts))
    assert len(parts) == 1000
    assert merged.count == 20_000
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.var(), x.var(0), rtol=1e-11)


def test_variances_of_parts_must_not_be_averaged():
    parts = [moments(np.array([[0.0], [2.0]])), moments(np.array([[10.0], [12.0]]))]
    assert [part.var()[0] for part in parts] == [1, 1]
    assert merge(*parts).var() == 26


def test_merge_in_float32_keeps_the_digits_of_a_large_mean():
    x = (np.random.default_rng(0).normal(size=(4096, 2)) + 1e4).astype(np.float32)
    merged = merge(*map(moments, np.split(x, 16)))
    assert merged.mean.dtype == merged.var().dtype == np.float32
    # Each part's mean is rounded to an ulp of 1e4, 1e-3; in the variance that counts squared.
    np.testing.assert_allclose(merged.var(), x.astype(np.float64).var(0), rtol=1e-4)


@pytest.mark.parametrize("asarray", [torch.asarray, array_api_strict.asarray])
def test_merge_runs_on_any_library(asarray):
    x = np.random.default_rng(0).normal(size=(7, 3))
    merged = merge(*(moments(asarray(part)) for part in np.split(x, [2, 2])))
    assert type(merged.mean) is type(asarray(x))
    assert_same(Moments(merged.count, *map(np.from_dlpack, merged[1:])), moments(x), largest(x))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        np.ones((2, 3), int),
        np.ones((2, 3), bool),
        np.ones((2, 3), object),
        np.ones((2, 3), complex),
        torch.ones(2, 3, dtype=torch.int8),
        array_api_strict.ones((2, 3), dtype=array_api_strict.uint8),
    ],
    ids=lambda x: str(x.dtype),
)
def test_dtype_must_be_real_floating(x):
    with pytest.raises(TypeError) as caught:
        moments(x)
    assert str(caught.value) == f"expected x with a real floating dtype, got {x.dtype}"


@pytest.mark.parametrize("x", [[[1.0, 2.0]], None, 1.0, "ab"])
def test_only_arrays(x):
    with pytest.raises(TypeError) as caught:
        moments(x)
    kind = type(x).__name__
    assert str(caught.value) == f"expected arrays of one array-API library, got x: builtins.{kind}"


@pytest.mark.parametrize(
    ("x", "channel_axis", "message"),
    [
        (np.ones(5), 1, "expected ndim >= 2 (samples and channels), got ndim 1"),
        (np.ones((2, 3)), 2, "expected channel_axis in -2..1 for ndim 2, got 2"),
    ],
)
def test_axes_that_make_no_sense(x, channel_axis, message):
    with pytest.raises(ValueError) as caught:
        moments(x, channel_axis)
    assert str(caught.value) == message


@pytest.mark.parametrize("axes", [(), (0, 0), 2, (0, -3)])
def test_axes_that_are_none_or_twice_or_missing(axes):
    with pytest.raises(ValueError, match="axes") as caught:
        moments(np.ones((2, 3)), axes=axes)
    assert str(caught.value).endswith(f"got {axes}")


@pytest.mark.parametrize(("count", "correction"), [(0, 0), (1, 1), (4, 4), (4, 5)])
def test_variance_of_too_few_values(count, correction):
    with pytest.raises(ValueError) as caught:
        moments(np.ones((count, 3))).var(correction)
    assert str(caught.value) == (
        f"expected more than {correction} values per channel for the variance with "
        f"correction={correction}, got count={count}"
    )


PART = moments(np.ones((4, 3)))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((), ValueError, "expected at least one Moments to merge, got none"),
        (([PART, PART],), TypeError, "expected Moments, as in merge(a, b), got list"),
        (
            (PART, moments(np.ones((4, 2)))),
            ValueError,
            "expected parts with the same channels, got means of shapes [(2,), (3,)]",
        ),
        (
            (PART, moments(torch.ones(4, 3))),
            TypeError,
            "expected arrays of one array-API library, got parts[0].mean: numpy.ndarray, "
            "parts[1].mean: torch.Tensor",
        ),
    ],
)
def test_parts_that_do_not_merge(parts, error, message):
    with pytest.raises(error) as caught:
        merge(*parts)
    assert str(caught.value) == message


def test_nothing_is_written_to():
    x = np.random.default_rng(0).normal(size=(6, 3))
    x.flags.writeable = False
    parts = [moments(x), moments(x[:2]), moments(x[:0])]
    for part in parts:
        part.mean.flags.writeable = part.m2.flags.writeable = False
    assert merge(*parts).count == 8
