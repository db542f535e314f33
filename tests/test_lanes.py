"""bnlib.kernels.cpu.lanes: every operation against NumPy, at and beyond the end of an array."""

import platform

import numba
import numpy as np
import pytest
import torch

from bnlib.kernels.cpu.lanes import (
    as_stored,
    at_least,
    keep,
    lanes_in,
    load,
    load_int32,
    positive,
    settle,
    spread,
    store,
    store_int32,
    stream,
    total,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@numba.njit
def clamp(x, y, start, n, floor, fill):
    """y = max(2 (x - 1) + x, floor) by one vector; the sum and the bits of what was loaded."""
    v = load(x, start, n, spread(x, fill))
    result = at_least(spread(x, 2.0) * (v - spread(x, 1.0)) + v, spread(x, floor))
    store(y, start, n, result)
    return total(v), positive(v), total(keep(positive(v), v)), total(as_stored(y, result))


@numba.njit
def count_lanes(x):
    return lanes_in(x)


def array(t):
    """The memory of a tensor, as the kernels see it."""
    integers = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    return t.view(integers.get(t.dtype, t.dtype)).numpy()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_vector(dtype, n):
    x = torch.sin(10 * torch.arange(41, dtype=torch.float64)).to(dtype) * 3
    y = torch.full((41,), 7, dtype=dtype)
    start, fill = 1, -0.25
    lanes = count_lanes(array(x))
    assert lanes == (8 if dtype == torch.float64 else 16)
    count = min(n, lanes)
    wide = x[start : start + count].to(torch.float64 if dtype == torch.float64 else torch.float32)
    sums = clamp(array(x), array(y), start, n, -4.0, fill)
    result = torch.clamp(3 * wide - 2, min=-4)
    expected = torch.full((41,), 7, dtype=dtype)
    expected[start : start + count] = result.to(dtype)
    torch.testing.assert_close(y, expected)  # nothing else has been written
    filled = torch.cat([wide.double(), torch.full((lanes - count,), fill, dtype=torch.float64)])
    assert sums[0] == pytest.approx(float(filled.sum()), abs=1e-12)
    assert sums[1] == sum(1 << i for i, v in enumerate(filled.tolist()) if v > 0)
    assert sums[2] == pytest.approx(float(filled.clamp(min=0).sum()), abs=1e-12)
    rest = max(3 * fill - 2, -4.0) * (lanes - count)
    # A multiply-add rounds once where torch rounds twice.
    assert sums[3] == pytest.approx(float(result.to(dtype).double().sum()) + rest, abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_stays(dtype):
    x = torch.ones(16, dtype=dtype)
    x[0], x[1] = float("nan"), float("inf")
    y = torch.empty_like(x)
    _, bits, *_ = clamp(array(x), array(y), 0, 16, 0.0, 0.0)
    assert y[0].isnan() and y[1].isinf() and y[2] == 1
    assert bits & 1  # NaN counts as positive, as in torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_short_float_survives_and_ties_go_to_even(dtype):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    y = torch.empty_like(x)
    copy(array(x), array(y))
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()].view(torch.int16), x[~x.isnan()].view(torch.int16))
    wide = torch.randn(1 << 12, generator=torch.Generator().manual_seed(0)) * 10
    middle = (
        wide.to(dtype).float() + torch.nextafter(wide.to(dtype), x.new_tensor(9e4)).float()
    ) / 2
    for values in (wide, middle):
        narrow = torch.empty(values.shape, dtype=dtype)
        copy(values.numpy(), array(narrow))
        assert torch.equal(narrow, values.to(dtype))


@numba.njit
def copy(x, y):
    for i in range(0, x.size, lanes_in(x)):
        store(y, i, x.size - i, load(x, i, x.size - i, spread(x, 0.0)))


@numba.njit
def stream_all(x, y):
    for i in range(0, x.size, lanes_in(x)):
        stream(y, i, load(x, i, x.size - i, spread(x, 0.0)))
    settle()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_streamed_is_what_is_stored(dtype):
    x = torch.sin(torch.arange(640, dtype=torch.float64)).to(dtype)
    y, stored = torch.zeros_like(x), torch.zeros_like(x)
    assert y.data_ptr() % 64 == 0
    stream_all(array(x), array(y))
    copy(array(x), array(stored))
    assert torch.equal(y, x) and torch.equal(stored, x)
    # float16 is narrowed by an instruction that also stores it, which knows no such hint.
    if platform.machine().lower() in ("x86_64", "amd64") and dtype != torch.float16:
        assert "movnt" in stream_all.inspect_asm(stream_all.signatures[-1])


@numba.njit
def swap(data, i, j):
    bits = load_int32(data, i)
    store_int32(data, j, bits)
    return bits


def test_four_bytes_at_any_address():
    data = np.arange(250, 262, dtype=np.uint8)  # 250 .. 255, 0 .. 5
    expected = data.copy()
    expected[6:10] = data[3:7]
    assert swap(data, 3, 6) == int.from_bytes(bytes([253, 254, 255, 0]), "little")
    assert (data == expected).all()
