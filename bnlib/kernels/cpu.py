# mypy: disable-error-code="no-untyped-def"
"""The four primitives for CPU tensors, compiled by Numba.

An input is looked at in one of two ways. *Rows*, (N, C, L): loops run over the L neighbours of
one channel of one sample. *Panels*, (M, K): loops run over neighbours that belong to different
channels, each with sums of its own; so are channels_last and (N, C) inputs and short rows. Any
strides that are neither contiguous nor channels_last are copied first.

The work is cut into tasks by the shape alone, every task sums in a fixed order, and the partial
results are merged in a fixed order: the bits do not depend on the number of threads.

Statistics are float64 sums of d and d², where d = x - x₀ is the distance from the task's first
value of the channel. That is not E[x²] - E[x]²: x₀ is one of the n values, so (x₀ - mean)² <= n σ²,
and the relative error of the variance is at most n times that of a float64 sum, however large the
mean.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import math
import os
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from bnlib.kernels import channels_are_neighbours
from bnlib.moments import Moments

# How Numba sees the elements: it has no 16-bit floats, so those travel as integers.
_STORED = {
    torch.float32: (numba.float32, numba.float32),
    torch.float64: (numba.float64, numba.float64),
    torch.bfloat16: (numba.uint16, numba.float32),
    torch.float16: (numba.int16, numba.float32),
}
_SERIAL_BELOW = 1 << 14  # elements; waking a thread costs more than it saves
_HUGE_FROM = 1 << 22  # bytes


def supports(x: Tensor) -> bool:
    """Return whether these kernels take ``x``: a plain CPU tensor of one of four dtypes."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in _STORED
        and x.layout == torch.strided
    )


# --- what runs on a thread ------------------------------------------------------------------------

# Sums may be reordered and multiply-adds fused; NaN and infinity stay what they are.
_FAST = {"reassoc", "contract", "nsz"}


_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}


def _cached(decorate: Callable[..., Any]) -> Any:
    try:
        return decorate(cache=True)
    except RuntimeError:  # no folder to cache in, on a read-only install without a home
        return decorate(cache=False)


def _jit(function: Callable[..., Any]) -> Any:
    return _cached(lambda cache: numba.njit(cache=cache, **_OPTIONS)(function))


@intrinsic
def _take(typingctx, pointer):
    """Add 1 to the number at ``pointer``, all threads in turn, and return what it was."""

    def add(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "monotonic")

    return types.int64(pointer), add


@intrinsic
def _pointer(typingctx, address, element):
    """The address as a pointer to elements of a type."""
    pointer = types.CPointer(element.dtype)

    def convert(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, element), convert


@intrinsic
def _as_float(typingctx, bits):
    """The 64 bits of an integer as a float64."""
    return types.float64(bits), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.DoubleType()
    )


@intrinsic
def _up(typingctx, v):
    """An element as a number to compute with: 16-bit floats (see _STORED) as float32."""
    if isinstance(v, types.Float):
        return v(v), lambda context, builder, signature, args: args[0]

    def convert(context, builder, signature, args):
        if v == types.uint16:
            wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.IntType(32)(16))
            return builder.bitcast(wide, ir.FloatType())
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(v), convert


@intrinsic
def _down(typingctx, array, v):
    """A number as an element of ``array``, rounded to nearest even."""
    stored = array.dtype
    if isinstance(stored, types.Float):
        return stored(array, v), lambda context, builder, signature, args: context.cast(
            builder, args[1], v, stored
        )

    def convert(context, builder, signature, args):
        value = context.cast(builder, args[1], v, types.float32)
        if stored == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        bits = builder.bitcast(value, ir.IntType(32))
        odd = builder.and_(builder.lshr(bits, ir.IntType(32)(16)), ir.IntType(32)(1))
        rounded = builder.add(bits, builder.add(odd, ir.IntType(32)(0x7FFF)))
        high = builder.trunc(builder.lshr(rounded, ir.IntType(32)(16)), ir.IntType(16))
        nan = builder.fcmp_unordered("uno", value, value)
        return builder.select(nan, ir.IntType(16)(0x7FC0), high)

    return stored(array, v), convert


# Rows: x is (N, C, L), loops run over the L neighbours of one channel.


@_jit
def _range(task, tasks, size):
    """The part of 0 .. size that belongs to a task."""
    return task * size // tasks, (task + 1) * size // tasks


@_jit
def _finish(c0, c1, count, out, eps, stats):
    """Mean, m2 and inv_std of channels c0 .. c1, rounded to the dtype of ``stats``."""
    for c in range(c0, c1):
        m2 = out[1, c]
        if m2 < 0:  # by rounding, in a channel of equal values
            m2 = 0.0
        stats[0, c], stats[1, c] = out[0, c], m2
        stats[2, c] = 1 / np.sqrt(m2 / count + eps)


@_jit
def _merge(partial, rows, per_row, eps, stats):
    """:func:`bnlib.merge` over the tasks that shared ``rows``; then as _finish."""
    splits, _, channels = partial.shape
    count = rows * per_row
    total = np.zeros((2, channels))
    for s in range(splits):
        r0, r1 = _range(s, splits, rows)
        share = (r1 - r0) / rows
        for c in range(channels):
            total[0, c] += share * (partial[s, 0, c] - partial[0, 0, c])
    for c in range(channels):
        total[0, c] += partial[0, 0, c]
    for s in range(splits):
        r0, r1 = _range(s, splits, rows)
        part = (r1 - r0) * per_row
        for c in range(channels):
            d = partial[s, 0, c] - total[0, c]
            total[1, c] += partial[s, 1, c] + part * d * d
    _finish(0, channels, count, total, eps, stats)


@_jit
def _add_up(c0, c1, out, stats, sums):
    for c in range(c0, c1):
        sums[0, c], sums[1, c] = out[0, c], out[1, c] * stats[2, c]


@_jit
def _add_up_all(partial, stats, sums):
    splits, _, channels = partial.shape
    total = np.zeros((2, channels))
    for s in range(splits):
        for i in range(2):
            for c in range(channels):
                total[i, c] += partial[s, i, c]
    _add_up(0, channels, total, stats, sums)


@_jit
def _coefficients(c, weight, stats, sums, count):
    """dx = a dy + b (x - mean) + c of one channel."""
    inv_std = np.float64(stats[2, c])
    a = weight[c] * inv_std
    return a, -a * inv_std * sums[1, c] / count, -a * sums[0, c] / count


@_jit
def _mask_piece(n, c, i, x, mask):
    """Where the mask bits of x[n, c, i:] begin: bit, place in the flat mask, and for how long."""
    samples, channels, size = x.shape
    if samples % 8 == 0:  # (J, C, L)
        groups = samples // 8
        return n // groups, (n % groups * channels + c) * size + i, size - i
    width = mask.shape[1]  # (C, R)
    bit, j = divmod(n * size + i, width)
    return bit, c * width + j, min(size - i, width - j)


@_jit
def _row_sums(x, shift):
    s, q = 0.0, 0.0
    for i in range(x.size):
        d = np.float64(_up(x[i])) - shift
        s += d
        q += d * d
    return s, q


@_jit
def _row_apply(x, residual, y, mean, scale, bias, floor):
    if residual.size:
        for i in range(x.size):
            v = (_up(x[i]) - mean) * scale + bias + _up(residual[i])
            y[i] = _down(y, floor if v < floor else v)
    else:
        for i in range(x.size):
            v = (_up(x[i]) - mean) * scale + bias
            y[i] = _down(y, floor if v < floor else v)


@_jit
def _row_apply_masked(x, residual, y, mask, bit, mean, scale, bias):
    """As _row_apply with ReLU; also set this bit of the mask where y is not cut off."""
    zero = type(mean)(0)
    keep = np.uint8((1 << bit) - 1)  # the bits below, which are there already
    one = np.uint8(1 << bit)
    if residual.size:
        for i in range(x.size):
            v = (_up(x[i]) - mean) * scale + bias + _up(residual[i])
            cut = v <= zero
            y[i] = _down(y, zero if cut else v)
            mask[i] = (mask[i] & keep) | (np.uint8(0) if cut else one)
    else:
        for i in range(x.size):
            v = (_up(x[i]) - mean) * scale + bias
            cut = v <= zero
            y[i] = _down(y, zero if cut else v)
            mask[i] = (mask[i] & keep) | (np.uint8(0) if cut else one)


@_jit
def _row_gradient_sums(dy, x, mean):
    s, q = 0.0, 0.0
    for i in range(x.size):
        g = np.float64(_up(dy[i]))
        s += g
        q += g * (np.float64(_up(x[i])) - mean)
    return s, q


@_jit
def _row_gradient_sums_masked(dy, x, mask, bit, mean):
    s, q = 0.0, 0.0
    one = np.uint8(1 << bit)
    for i in range(x.size):
        g = np.float64(_up(dy[i])) if mask[i] & one else 0.0
        s += g
        q += g * (np.float64(_up(x[i])) - mean)
    return s, q


@_jit
def _row_gradient(dy, x, dx, mean, a, b, c):
    for i in range(x.size):
        dx[i] = _down(dx, a * _up(dy[i]) + (b * (_up(x[i]) - mean) + c))


@_jit
def _row_gradient_masked(dy, x, dx, dresidual, mask, bit, mean, a, b, c):
    zero = type(mean)(0)
    one = np.uint8(1 << bit)
    if dresidual.size:
        for i in range(x.size):
            g = _up(dy[i]) if mask[i] & one else zero
            dresidual[i] = _down(dresidual, g)
            dx[i] = _down(dx, a * g + (b * (_up(x[i]) - mean) + c))
    else:
        for i in range(x.size):
            g = _up(dy[i]) if mask[i] & one else zero
            dx[i] = _down(dx, a * g + (b * (_up(x[i]) - mean) + c))


@_jit
def _rows_moments(x, c0, c1, n0, n1, out):
    """Mean and m2 of channels c0 .. c1 of samples n0 .. n1, to ``out[c]``."""
    for c in range(c0, c1):
        out[0, c] = out[1, c] = 0.0
    for n in range(n0, n1):
        for c in range(c0, c1):
            s, q = _row_sums(x[n, c], np.float64(_up(x[n0, c, 0])))
            out[0, c] += s
            out[1, c] += q
    count = (n1 - n0) * x.shape[2]
    for c in range(c0, c1):
        out[0, c], out[1, c] = _from_shifted(x[n0, c, 0], count, out[0, c], out[1, c])


@_jit
def _from_shifted(first, count, s, q):
    """Mean and m2 from the sums of d and d squared, d = x - first."""
    return np.float64(_up(first)) + s / count, q - s * s / count


@_jit
def _floor(stats, relu):
    """What values are cut off below, so that loops need not ask whether there is a ReLU."""
    number = type(stats[0, 0])
    return number(0) if relu else number(-np.inf)


@_jit
def _rows_normalize(x, residual, y, mask, weight, bias, stats, relu, c0, c1, n0, n1):
    size = x.shape[2]
    floor = _floor(stats, relu)
    flat = mask.reshape(mask.size)
    for n in range(n0, n1):
        for c in range(c0, c1):
            mean, scale, b = stats[0, c], stats[2, c] * weight[c], bias[c]
            res = residual[n, c] if residual.size else residual[0, 0]
            if mask.size == 0:
                _row_apply(x[n, c], res, y[n, c], mean, scale, b, floor)
                continue
            i = 0
            while i < size:
                bit, start, length = _mask_piece(n, c, i, x, mask)
                k = i + length
                part = res[i:k] if residual.size else res
                m = flat[start : start + length]
                _row_apply_masked(x[n, c, i:k], part, y[n, c, i:k], m, bit, mean, scale, b)
                i = k


def _rows_forward(stored, number):
    def kernel(p):
        a = numba.carray(p, _ARGUMENTS)
        measure, apply, relu, eps = a[1], a[2], a[3] != 0, _as_float(a[4])
        blocks, splits, channels = a[5], a[6], a[7]
        shape, mask_shape = (a[8], channels, a[9]), (a[10], a[11])
        none = (np.int64(1), np.int64(1), np.int64(0))
        x = numba.carray(_pointer(a[12], stored), shape)
        residual = numba.carray(_pointer(a[13], stored), shape if a[13] else none)
        y = numba.carray(_pointer(a[14], stored), shape)
        mask = numba.carray(_pointer(a[15], numba.uint8), mask_shape)
        weight = numba.carray(_pointer(a[16], number), channels)
        bias = numba.carray(_pointer(a[17], number), channels)
        stats = numba.carray(_pointer(a[18], number), (3, channels))
        partial = numba.carray(_pointer(a[19], numba.float64), (splits, 2, channels))
        # The samples of one channel share bytes of the mask.
        cuts = np.int64(1) if apply and mask.size else splits
        while True:
            task = _take(p)
            if task >= blocks * cuts:
                break
            c0, c1 = _range(task // cuts, blocks, channels)
            n0, n1 = _range(task % cuts, cuts, shape[0])
            if measure:
                out = partial[task % cuts]
                _rows_moments(x, c0, c1, n0, n1, out)
                if splits == 1:
                    _finish(c0, c1, shape[0] * shape[2], out, eps, stats)
            if apply:  # while these channels are in the cache, if all has been measured
                _rows_normalize(x, residual, y, mask, weight, bias, stats, relu, c0, c1, n0, n1)

    return kernel


@_jit
def _rows_gradient_sums(dy, x, mask, stats, c0, c1, n0, n1, out):
    size = x.shape[2]
    flat = mask.reshape(mask.size)
    for c in range(c0, c1):
        out[0, c] = out[1, c] = 0.0
    for n in range(n0, n1):
        for c in range(c0, c1):
            mean = np.float64(stats[0, c])
            if mask.size == 0:
                s, q = _row_gradient_sums(dy[n, c], x[n, c], mean)
                out[0, c] += s
                out[1, c] += q
                continue
            i = 0
            while i < size:
                bit, start, length = _mask_piece(n, c, i, x, mask)
                k = i + length
                m = flat[start : start + length]
                s, q = _row_gradient_sums_masked(dy[n, c, i:k], x[n, c, i:k], m, bit, mean)
                out[0, c] += s
                out[1, c] += q
                i = k


@_jit
def _rows_gradient(dy, x, dx, dresidual, mask, weight, stats, sums, count, c0, c1, n0, n1):
    size = x.shape[2]
    flat = mask.reshape(mask.size)
    for n in range(n0, n1):
        for ch in range(c0, c1):
            mean = stats[0, ch]
            a64, b64, c64 = _coefficients(ch, weight, stats, sums, count)
            a, b, c = type(mean)(a64), type(mean)(b64), type(mean)(c64)
            if mask.size == 0:
                _row_gradient(dy[n, ch], x[n, ch], dx[n, ch], mean, a, b, c)
                continue
            dres = dresidual[n, ch] if dresidual.size else dresidual[0, 0]
            i = 0
            while i < size:
                bit, start, length = _mask_piece(n, ch, i, x, mask)
                k = i + length
                part = dres[i:k] if dresidual.size else dres
                m = flat[start : start + length]
                _row_gradient_masked(
                    dy[n, ch, i:k], x[n, ch, i:k], dx[n, ch, i:k], part, m, bit, mean, a, b, c
                )
                i = k


def _rows_backward(stored, number):
    def kernel(p):
        a = numba.carray(p, _ARGUMENTS)
        measure, apply, count = a[1], a[2], a[4]
        blocks, splits, channels = a[5], a[6], a[7]
        shape, mask_shape = (a[8], channels, a[9]), (a[10], a[11])
        none = (np.int64(1), np.int64(1), np.int64(0))
        dy = numba.carray(_pointer(a[12], stored), shape)
        x = numba.carray(_pointer(a[13], stored), shape)
        dx = numba.carray(_pointer(a[14], stored), shape)
        dresidual = numba.carray(_pointer(a[15], stored), shape if a[15] else none)
        mask = numba.carray(_pointer(a[16], numba.uint8), mask_shape)
        weight = numba.carray(_pointer(a[17], number), channels)
        stats = numba.carray(_pointer(a[18], number), (3, channels))
        sums = numba.carray(_pointer(a[19], number), (2, channels))
        partial = numba.carray(_pointer(a[20], numba.float64), (splits, 2, channels))
        while True:
            task = _take(p)
            if task >= blocks * splits:
                break
            c0, c1 = _range(task // splits, blocks, channels)
            n0, n1 = _range(task % splits, splits, shape[0])
            if measure:
                out = partial[task % splits]
                _rows_gradient_sums(dy, x, mask, stats, c0, c1, n0, n1, out)
                if splits == 1:
                    _add_up(c0, c1, out, stats, sums)
            if apply:
                _rows_gradient(
                    dy, x, dx, dresidual, mask, weight, stats, sums, count, c0, c1, n0, n1
                )

    return kernel


# Panels: x is (M, K), loops run over K neighbours that belong to many channels. Column k is of
# channel k % C if there are ``repeat`` positions in a row (then size = 1), else of k // size.


@_jit
def _panel_columns(x, repeat, size, c0, c1):
    return (0, x.shape[1]) if repeat > 1 else (c0 * size, c1 * size)


@_jit
def _spread(values, repeat, size, c0, c1, out):
    """One value per channel to one per column."""
    k = 0
    for _ in range(repeat):
        if size == 1:
            for c in range(c1 - c0):
                out[k + c] = values[c0 + c]
            k += c1 - c0
            continue
        for c in range(c0, c1):
            out[k : k + size] = values[c]
            k += size


@_jit
def _collect(columns, repeat, size, c0, c1, out):
    """One value per column, summed to one per channel."""
    out[c0:c1] = 0.0
    k = 0
    for _ in range(repeat):
        if size == 1:
            for c in range(c1 - c0):
                out[c0 + c] += columns[k + c]
            k += c1 - c0
            continue
        for c in range(c0, c1):
            total = 0.0
            for i in range(size):
                total += columns[k + i]
            out[c] += total
            k += size


@_jit
def _panel_moments(x, repeat, size, r0, r1, c0, c1, out):
    k0, k1 = _panel_columns(x, repeat, size, c0, c1)
    width = k1 - k0
    first = np.empty(c1)
    for c in range(c0, c1):
        first[c] = _up(x[r0, c * size])
    shift, s, q = np.empty(width), np.zeros(width), np.zeros(width)
    _spread(first, repeat, size, c0, c1, shift)
    quads = (r1 - r0) // 4 * 4
    for r in range(r0, r0 + quads, 4):  # four rows at a time, to touch s and q less often
        xa, xb, xc, xd = x[r, k0:k1], x[r + 1, k0:k1], x[r + 2, k0:k1], x[r + 3, k0:k1]
        for k in range(width):
            a = np.float64(_up(xa[k])) - shift[k]
            b = np.float64(_up(xb[k])) - shift[k]
            c = np.float64(_up(xc[k])) - shift[k]
            d = np.float64(_up(xd[k])) - shift[k]
            s[k] += (a + b) + (c + d)
            q[k] += (a * a + b * b) + (c * c + d * d)
    for r in range(r0 + quads, r1):
        for k in range(width):
            a = np.float64(_up(x[r, k0 + k])) - shift[k]
            s[k] += a
            q[k] += a * a
    _collect(s, repeat, size, c0, c1, out[0])
    _collect(q, repeat, size, c0, c1, out[1])
    count = (r1 - r0) * repeat * size
    for c in range(c0, c1):
        out[0, c], out[1, c] = _from_shifted(x[r0, c * size], count, out[0, c], out[1, c])


@_jit
def _panel_normalize(x, residual, y, mask, weight, bias, stats, relu, repeat, size, r0, r1, c0, c1):
    k0, k1 = _panel_columns(x, repeat, size, c0, c1)
    mean, scale, shift = np.empty((3, k1 - k0), stats.dtype)
    _spread(stats[0], repeat, size, c0, c1, mean)
    _spread(stats[2], repeat, size, c0, c1, scale)
    _spread(weight, repeat, size, c0, c1, shift)
    scale *= shift
    _spread(bias, repeat, size, c0, c1, shift)
    zero = type(stats[0, 0])(0)
    if mask.size == 0:
        floor = _floor(stats, relu)
        for r in range(r0, r1):
            xr, yr = x[r, k0:k1], y[r, k0:k1]
            if residual.size:
                res = residual[r, k0:k1]
                for k in range(xr.size):
                    v = (_up(xr[k]) - mean[k]) * scale[k] + shift[k] + _up(res[k])
                    yr[k] = _down(y, floor if v < floor else v)
            else:
                for k in range(xr.size):
                    v = (_up(xr[k]) - mean[k]) * scale[k] + shift[k]
                    yr[k] = _down(y, floor if v < floor else v)
        return
    rows, groups = x.shape[0], mask.shape[0]
    for j in range(r0, r1):  # here r0 .. r1 are rows of the mask
        m = mask[j, k0:k1]
        for bit in range(8):
            r = bit * groups + j
            if r >= rows:
                break
            one, keep = np.uint8(1 << bit), np.uint8((1 << bit) - 1)
            xr, yr = x[r, k0:k1], y[r, k0:k1]
            if residual.size:
                res = residual[r, k0:k1]
                for k in range(xr.size):
                    v = (_up(xr[k]) - mean[k]) * scale[k] + shift[k] + _up(res[k])
                    cut = v <= zero
                    yr[k] = _down(y, zero if cut else v)
                    m[k] = (m[k] & keep) | (np.uint8(0) if cut else one)
            else:
                for k in range(xr.size):
                    v = (_up(xr[k]) - mean[k]) * scale[k] + shift[k]
                    cut = v <= zero
                    yr[k] = _down(y, zero if cut else v)
                    m[k] = (m[k] & keep) | (np.uint8(0) if cut else one)


def _panel_forward(stored, number):
    def kernel(p):
        a = numba.carray(p, _ARGUMENTS)
        measure, apply, relu, eps = a[1], a[2], a[3] != 0, _as_float(a[4])
        blocks, splits, channels = a[5], a[6], a[7]
        shape, mask_shape, repeat, size = (a[8], a[9]), (a[10], a[11]), a[22], a[23]
        none = (np.int64(1), np.int64(0))
        x = numba.carray(_pointer(a[12], stored), shape)
        residual = numba.carray(_pointer(a[13], stored), shape if a[13] else none)
        y = numba.carray(_pointer(a[14], stored), shape)
        mask = numba.carray(_pointer(a[15], numba.uint8), mask_shape)
        weight = numba.carray(_pointer(a[16], number), channels)
        bias = numba.carray(_pointer(a[17], number), channels)
        stats = numba.carray(_pointer(a[18], number), (3, channels))
        partial = numba.carray(_pointer(a[19], numba.float64), (splits, 2, channels))
        while True:
            task = _take(p)
            if task >= blocks * splits:
                break
            c0, c1 = _range(task // splits, blocks, channels)
            if measure:
                r0, r1 = _range(task % splits, splits, shape[0])
                out = partial[task % splits]
                _panel_moments(x, repeat, size, r0, r1, c0, c1, out)
                if splits == 1:
                    _finish(c0, c1, shape[0] * repeat * size, out, eps, stats)
            if apply:
                r0, r1 = _range(task % splits, splits, mask_shape[0] if mask.size else shape[0])
                _panel_normalize(
                    x, residual, y, mask, weight, bias, stats, relu, repeat, size, r0, r1, c0, c1
                )

    return kernel


@_jit
def _panel_gradient_sums(dy, x, mask, stats, repeat, size, r0, r1, c0, c1, out):
    k0, k1 = _panel_columns(x, repeat, size, c0, c1)
    width = k1 - k0
    mean, s, q = np.empty(width), np.zeros(width), np.zeros(width)
    _spread(stats[0], repeat, size, c0, c1, mean)
    if mask.size == 0:
        for r in range(r0, r1):
            xr, gr = x[r, k0:k1], dy[r, k0:k1]
            for k in range(width):
                g = np.float64(_up(gr[k]))
                s[k] += g
                q[k] += g * (np.float64(_up(xr[k])) - mean[k])
    else:
        rows, groups = x.shape[0], mask.shape[0]
        for j in range(r0, r1):
            m = mask[j, k0:k1]
            for bit in range(8):
                r = bit * groups + j
                if r >= rows:
                    break
                one = np.uint8(1 << bit)
                xr, gr = x[r, k0:k1], dy[r, k0:k1]
                for k in range(width):
                    g = np.float64(_up(gr[k])) if m[k] & one else 0.0
                    s[k] += g
                    q[k] += g * (np.float64(_up(xr[k])) - mean[k])
    _collect(s, repeat, size, c0, c1, out[0])
    _collect(q, repeat, size, c0, c1, out[1])


@_jit
def _panel_gradient(
    dy, x, dx, dresidual, mask, weight, stats, sums, count, repeat, size, r0, r1, c0, c1
):
    k0, k1 = _panel_columns(x, repeat, size, c0, c1)
    factors = np.empty((3, weight.size), stats.dtype)
    for ch in range(c0, c1):
        factors[0, ch], factors[1, ch], factors[2, ch] = _coefficients(
            ch, weight, stats, sums, count
        )
    a, b, c, mean = np.empty((4, k1 - k0), stats.dtype)
    _spread(factors[0], repeat, size, c0, c1, a)
    _spread(factors[1], repeat, size, c0, c1, b)
    _spread(factors[2], repeat, size, c0, c1, c)
    _spread(stats[0], repeat, size, c0, c1, mean)
    zero = type(stats[0, 0])(0)
    if mask.size == 0:
        for r in range(r0, r1):
            xr, gr, dr = x[r, k0:k1], dy[r, k0:k1], dx[r, k0:k1]
            for k in range(xr.size):
                dr[k] = _down(dx, a[k] * _up(gr[k]) + (b[k] * (_up(xr[k]) - mean[k]) + c[k]))
        return
    rows, groups = x.shape[0], mask.shape[0]
    for j in range(r0, r1):
        m = mask[j, k0:k1]
        for bit in range(8):
            r = bit * groups + j
            if r >= rows:
                break
            one = np.uint8(1 << bit)
            xr, gr, dr = x[r, k0:k1], dy[r, k0:k1], dx[r, k0:k1]
            if dresidual.size:
                res = dresidual[r, k0:k1]
                for k in range(xr.size):
                    g = _up(gr[k]) if m[k] & one else zero
                    res[k] = _down(dx, g)
                    dr[k] = _down(dx, a[k] * g + (b[k] * (_up(xr[k]) - mean[k]) + c[k]))
            else:
                for k in range(xr.size):
                    g = _up(gr[k]) if m[k] & one else zero
                    dr[k] = _down(dx, a[k] * g + (b[k] * (_up(xr[k]) - mean[k]) + c[k]))


def _panel_backward(stored, number):
    def kernel(p):
        a = numba.carray(p, _ARGUMENTS)
        measure, apply, count = a[1], a[2], a[4]
        blocks, splits, channels = a[5], a[6], a[7]
        shape, mask_shape, repeat, size = (a[8], a[9]), (a[10], a[11]), a[22], a[23]
        none = (np.int64(1), np.int64(0))
        dy = numba.carray(_pointer(a[12], stored), shape)
        x = numba.carray(_pointer(a[13], stored), shape)
        dx = numba.carray(_pointer(a[14], stored), shape)
        dresidual = numba.carray(_pointer(a[15], stored), shape if a[15] else none)
        mask = numba.carray(_pointer(a[16], numba.uint8), mask_shape)
        weight = numba.carray(_pointer(a[17], number), channels)
        stats = numba.carray(_pointer(a[18], number), (3, channels))
        sums = numba.carray(_pointer(a[19], number), (2, channels))
        partial = numba.carray(_pointer(a[20], numba.float64), (splits, 2, channels))
        while True:
            task = _take(p)
            if task >= blocks * splits:
                break
            c0, c1 = _range(task // splits, blocks, channels)
            r0, r1 = _range(task % splits, splits, mask_shape[0] if mask.size else shape[0])
            if measure:
                out = partial[task % splits]
                _panel_gradient_sums(dy, x, mask, stats, repeat, size, r0, r1, c0, c1, out)
                if splits == 1:
                    _add_up(c0, c1, out, stats, sums)
            if apply:
                _panel_gradient(
                    dy, x, dx, dresidual, mask, weight, stats, sums, count,
                    repeat, size, r0, r1, c0, c1,
                )  # fmt: skip

    return kernel


# --- threads --------------------------------------------------------------------------------------

# A kernel is a C function of one array of integers: the number of the next task, which every thread
# that runs the kernel draws from, then flags, lengths and addresses.
_ARGUMENTS = 24
_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _compiled(make: Callable[..., Any], dtype: torch.dtype) -> Any:
    """The kernel for a dtype, compiled or from Numba's cache: address, and callable from Python."""
    stored, number = _STORED[dtype]
    signature = types.void(types.CPointer(types.int64))
    kernel = _cached(
        lambda cache: numba.cfunc(signature, cache=cache, fastmath=_FAST, error_model="numpy")(
            make(stored, number)
        )
    )
    return kernel, kernel.address, _KERNEL(kernel.address)


_after_fork = False  # the threads of torch's pool do not live on in a forked child


def _forked() -> None:
    global _after_fork
    _after_fork = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _find_openmp() -> Any:
    """The function with which torch's own OpenMP library starts a team of threads, or None.

    A pool of our own would find the cores taken: the threads of torch's wait for the next
    operation without sleeping. Several callers at once are fine, each has a team.
    """
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


_openmp = _find_openmp()


@functools.cache
def _own_threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "bnlib")


def _start(make: Callable[..., Any], x: Tensor, arguments: Any) -> None:
    """Run all tasks of a kernel, on as many threads as torch uses."""
    _, address, call = _compiled(make, x.dtype)
    threads = 1 if _after_fork or x.numel() < _SERIAL_BELOW else torch.get_num_threads()
    threads = min(threads, arguments[5] * arguments[6])
    arguments[0] = 0
    if threads == 1:
        call(arguments)
    elif _openmp is not None:
        _openmp(address, arguments, threads, 0)
    else:
        others = [_own_threads().submit(call, arguments) for _ in range(threads - 1)]
        call(arguments)
        for other in others:
            other.result()


# --- what torch sees ------------------------------------------------------------------------------

_SHORT = 256  # positions; rows shorter than this are better looked at as a panel
_WIDE = 1024  # columns, of which a panel's vectors fit into the L1 cache


class _Plan(NamedTuple):
    """How an input is looked at, and how its work is cut: a function of shape and layout alone."""

    lanes: bool  # the channels are neighbours
    panel: bool
    blocks: int  # cuts of the channels
    splits: int  # cuts of the samples
    shape: tuple[int, int]  # of the kernel's view: (N, L) of (N, C, L), or the panel's (M, K)
    mask: tuple[int, int]
    repeat: int = 1
    size: int = 1


@functools.lru_cache(maxsize=4096)
def _cut(lanes: bool, samples: int, channels: int, size: int) -> _Plan:
    if lanes:
        rows, repeat = samples * size, 1
        while 2 * repeat * channels <= _WIDE // 2 and rows % (16 * repeat) == 0:
            repeat *= 2
        rows //= repeat
        blocks = -(-channels // _WIDE)
        splits = max(1, min(rows, 64, rows * (channels * repeat // blocks) >> 16))
        shape = (rows, channels * repeat)
        return _Plan(True, True, blocks, splits, shape, (-(-rows // 8), shape[1]), repeat)
    eighths = samples % 8 == 0
    if size < _SHORT and eighths:
        blocks = max(min(channels, 16), -(-channels * size // _WIDE))
        splits = 1 if blocks >= 16 else max(1, min(samples // 8, -(-16 // blocks)))
        shape = (samples, channels * size)
        return _Plan(False, True, blocks, splits, shape, (samples // 8, shape[1]), 1, size)
    # A block reads at least 1024 neighbours at a time and, if it can, fits into the L2 cache.
    blocks = min(channels, max(16, channels * size >> 10, samples * channels * size >> 17))
    splits = 1 if blocks >= 16 else min(samples, -(-16 // blocks))
    mask = (1, samples // 8 * channels * size) if eighths else (channels, -(-samples * size // 8))
    return _Plan(False, False, blocks, splits, (samples, size), mask)


def _plan(x: Tensor) -> _Plan:
    size = math.prod(x.shape[2:])
    return _cut(channels_are_neighbours(x), x.shape[0], x.shape[1], size)


def _lay_out(t: Tensor, plan: _Plan) -> Tensor:
    """``t`` itself if it already lies in memory as the plan has it, else a copy that does."""
    if not plan.lanes:
        return t.contiguous()
    if t.dim() == 2:
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _vector(v: Tensor | None, default: float, like: Tensor) -> Tensor:
    """One value per channel, contiguous, of the dtype of ``like``."""
    if v is None:
        return torch.full(like.shape[-1:], default, dtype=like.dtype)
    v = v.detach()
    return v if v.dtype == like.dtype and v.is_contiguous() else v.to(like.dtype).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _number_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised tensor like ``x``, on huge pages if it is large.

    Linux by default hands out huge pages to those who ask; PyTorch does not, and takes a page
    fault for every 4 KiB of a large output.
    """
    t = torch.empty_like(x)
    if _madvise is not None and t.nbytes >= _HUGE_FROM:
        start = -(-t.data_ptr() // 4096) * 4096
        _madvise(start, t.data_ptr() + t.nbytes - start, 14)  # MADV_HUGEPAGE
    return t


def _find_madvise() -> Any:
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


_madvise = _find_madvise()


def _stats(x: Tensor, mean: Tensor | None = None, inv_std: Tensor | None = None) -> Tensor:
    """Rows mean, m2 and inv_std."""
    stats = torch.empty((3, x.shape[1]), dtype=_number_dtype(x))
    if mean is not None and inv_std is not None:
        stats[0], stats[2] = mean.detach(), inv_std.detach()
    return stats


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    mask: Tensor | None,
    measure: bool,
    apply: bool,
) -> Tensor | None:
    plan = _plan(x)
    x = _lay_out(x, plan)
    y = empty_like(x) if apply else None
    if x.numel() == 0:
        stats[:2] = 0
        return y
    residual = None if residual is None else _lay_out(residual, plan)
    channels = x.shape[1]
    weight, bias = _vector(weight, 1, stats), _vector(bias, 0, stats)
    partial = torch.empty((plan.splits, 2, channels), dtype=torch.float64) if measure else None
    whole = plan.splits == 1  # every task has all of its channels: measure and apply at once
    arguments = (ctypes.c_int64 * _ARGUMENTS)(
        0, measure, apply and (whole or not measure), relu, _bits_of(eps),
        plan.blocks, plan.splits, channels, *plan.shape, *((1, 0) if mask is None else plan.mask),
        x.data_ptr(), _address(residual), _address(y), _address(mask),
        weight.data_ptr(), bias.data_ptr(), stats.data_ptr(),
        _address(partial), 0, 0, plan.repeat, plan.size,
    )  # fmt: skip
    kernel = _panel_forward if plan.panel else _rows_forward
    _start(kernel, x, arguments)
    if partial is not None and not whole:
        rows = plan.shape[0]
        _merge(partial.numpy(), rows, x.numel() // channels // rows, eps, stats.numpy())
        if apply:
            arguments[1], arguments[2] = False, True
            _start(kernel, x, arguments)
    return y


def _bits_of(value: float) -> int:
    return int.from_bytes(struct.pack("=d", value), sys.byteorder, signed=True)


def _count(x: Tensor) -> int:
    return x.numel() // max(x.shape[1], 1)


def moments(x: Tensor, channel_axis: int = 1) -> Moments:
    """Return count, mean and sum of squared deviations per channel: :func:`bnlib.moments`."""
    x = x.movedim(channel_axis, 1)
    stats = _stats(x)
    _forward(x, None, None, stats, 1.0, None, False, None, True, False)
    return Moments(_count(x), stats[0], stats[1])


def normalize(
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    channel_axis: int = 1,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Return γ (x - mean) inv_std + β, see :func:`bnlib.reference.normalize`, and what is fused.

    Args:
        x, mean, inv_std, weight, bias, channel_axis: as in the reference.
        residual: added before the activation; shape and dtype of ``x``.
        relu: apply ReLU.
        mask: from ``empty_mask``, filled with the bits of y > 0 (or NaN); needs ``relu``.

    Returns:
        Tensor of the shape, dtype and memory format of ``x``.
    """
    x = x.movedim(channel_axis, 1)
    residual = None if residual is None else residual.movedim(channel_axis, 1)
    stats = _stats(x, mean, inv_std)
    y = _forward(x, weight, bias, stats, 0.0, residual, relu, mask, False, True)
    assert y is not None
    return y.movedim(1, channel_axis)


def moments_and_normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments, Tensor]:
    """Return ``(y, Moments, inv_std)``: both steps of a channel while it is in the cache."""
    stats = _stats(x)
    y = _forward(x, weight, bias, stats, eps, residual, relu, mask, True, True)
    assert y is not None
    mean, m2, inv_std = stats.unbind()
    return y, Moments(_count(x), mean, m2), inv_std


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    sums: Tensor,
    count: int,
    mask: Tensor | None,
    dresidual: Tensor | None,
    measure: bool,
    apply: bool,
) -> Tensor | None:
    plan = _plan(x)
    x, dy = _lay_out(x, plan), _lay_out(dy, plan)
    dx = empty_like(x) if apply else None
    if x.numel() == 0:
        if measure:
            sums.zero_()
        return dx
    channels = x.shape[1]
    weight = _vector(weight, 1, stats)
    partial = torch.empty((plan.splits, 2, channels), dtype=torch.float64) if measure else None
    whole = plan.splits == 1
    arguments = (ctypes.c_int64 * _ARGUMENTS)(
        0, measure, apply and (whole or not measure), 0, count,
        plan.blocks, plan.splits, channels, *plan.shape, *((1, 0) if mask is None else plan.mask),
        dy.data_ptr(), x.data_ptr(), _address(dx), _address(dresidual), _address(mask),
        weight.data_ptr(), stats.data_ptr(), sums.data_ptr(),
        _address(partial), 0, plan.repeat, plan.size,
    )  # fmt: skip
    kernel = _panel_backward if plan.panel else _rows_backward
    _start(kernel, x, arguments)
    if partial is not None and not whole:
        _add_up_all(partial.numpy(), stats.numpy(), sums.numpy())
        if apply:
            arguments[1], arguments[2] = False, True
            _start(kernel, x, arguments)
    return dx


def grad_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    channel_axis: int = 1,
    *,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return Σ dy and Σ dy x̂ per channel, see :func:`bnlib.reference.grad_sums`.

    Args:
        dy, x, mean, inv_std, channel_axis: as in the reference.
        mask: where it is 0, ``dy`` counts as 0.

    Returns:
        ``(sum_dy, sum_dy_x_hat)``, each of shape (C,).
    """
    x, dy = x.movedim(channel_axis, 1), dy.movedim(channel_axis, 1)
    sums = torch.empty((2, x.shape[1]), dtype=_number_dtype(x))
    _backward(dy, x, None, _stats(x, mean, inv_std), sums, 1, mask, None, True, False)
    first, second = sums.unbind()
    return first, second


def grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_x_hat: Tensor,
    count: int,
    channel_axis: int = 1,
    *,
    mask: Tensor | None = None,
    dresidual: Tensor | None = None,
) -> Tensor:
    """Return the gradient with respect to the input, see :func:`bnlib.reference.grad_input`.

    Args:
        dy, x, mean, inv_std, weight, sum_dy, sum_dy_x_hat, count, channel_axis: as there.
        mask: where it is 0, ``dy`` counts as 0.
        dresidual: from ``empty_like(x)``, filled with the masked ``dy``; needs ``mask``.

    Returns:
        Tensor of the shape, dtype and memory format of ``x``.
    """
    x, dy = x.movedim(channel_axis, 1), dy.movedim(channel_axis, 1)
    sums = torch.empty((2, x.shape[1]), dtype=_number_dtype(x))
    sums[0], sums[1] = sum_dy.detach(), sum_dy_x_hat.detach()
    stats = _stats(x, mean, inv_std)
    dx = _backward(dy, x, weight, stats, sums, max(count, 1), mask, dresidual, False, True)
    assert dx is not None
    return dx.movedim(1, channel_axis)


def grad_sums_and_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    count: int,
    *,
    mask: Tensor | None = None,
    dresidual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dx, sum_dy, sum_dy_x_hat)``: both steps of a channel while it is in the cache."""
    sums = torch.empty((2, x.shape[1]), dtype=_number_dtype(x))
    stats = _stats(x, mean, inv_std)
    dx = _backward(dy, x, weight, stats, sums, max(count, 1), mask, dresidual, True, True)
    assert dx is not None
    first, second = sums.unbind()
    return dx, first, second
