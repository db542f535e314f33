# mypy: disable-error-code="no-untyped-def"
"""The four primitives for CPU tensors, compiled by Numba.

An input is looked at in one of two ways. *Rows*, (N, C, L): loops run over the L neighbours of
one channel of one sample. *Panels*, (M, K): loops run over neighbours that belong to different
channels, each with sums of its own; so are channels_last and (N, C) inputs and short rows. Any
strides that are neither contiguous nor channels_last are copied first.

The work is cut into tasks by the shape alone, every task sums in a fixed order, and the partial
results are merged in a fixed order: the bits do not depend on the number of threads.

Statistics are those of small tiles, merged in float64 (:func:`bnlib.merge`). A tile of a row takes
float64 sums of d and d², where d is the distance from its first value; a tile of eight rows of a
panel stays in registers for two passes. That is not E[x²] - E[x]²: however large the mean, it drops
out before anything is squared.
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

# moments_and_normalize takes them as arguments and moves them.
MOVES_RUNNING_STATISTICS = True

# How Numba sees the elements: it has no 16-bit floats, so those travel as integers.
_STORED = {
    torch.float32: (numba.float32, numba.float32),
    torch.float64: (numba.float64, numba.float64),
    torch.bfloat16: (numba.uint16, numba.float32),
    torch.float16: (numba.int16, numba.float32),
}
_SERIAL_BELOW = 1 << 14  # elements; waking a thread costs more than it saves
_HUGE_FROM = 1 << 22  # bytes
_TILE = 1024  # neighbours in a row whose sums may have the precision of the input


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


def _jit_in_order(function: Callable[..., Any]) -> Any:
    """As _jit, with the additions as they are written."""
    options = _OPTIONS | {"fastmath": {"contract"}}
    return _cached(lambda cache: numba.njit(cache=cache, **options)(function))


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
def _real(typingctx, bits):
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
def _finish(c0, c1, count, out, eps, momentum, stats, running_mean, running_var):
    """Mean, m2 and inv_std of channels c0 .. c1, rounded; move the running statistics, if any."""
    for c in range(c0, c1):
        m2 = out[1, c]
        if m2 < 0:  # by rounding, in a channel of equal values
            m2 = 0.0
        stats[0, c], stats[1, c] = out[0, c], m2
        stats[2, c] = 1 / np.sqrt(m2 / count + eps)
        if running_mean.size:
            running_mean[c] += momentum * (stats[0, c] - running_mean[c])
            running_var[c] += momentum * (stats[1, c] / (count - 1) - running_var[c])


@_jit
def _merge(partial, rows, per_row, eps, momentum, stats, running_mean, running_var):
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
    _finish(0, channels, count, total, eps, momentum, stats, running_mean, running_var)


@_jit
def _add_up(c0, c1, out, inv_std, sums):
    for c in range(c0, c1):
        sums[0, c], sums[1, c] = out[0, c], out[1, c] * inv_std[c]


@_jit
def _add_up_all(partial, inv_std, sums):
    splits, _, channels = partial.shape
    total = np.zeros((2, channels))
    for s in range(splits):
        for i in range(2):
            for c in range(channels):
                total[i, c] += partial[s, i, c]
    _add_up(0, channels, total, inv_std, sums)


@_jit
def _coefficients(c, weight, inv_std, sums, count):
    """dx = a dy + b (x - mean) + c of one channel."""
    factor = np.float64(inv_std[c])
    a = weight[c] * factor
    return a, -a * factor * sums[1, c] / count, -a * sums[0, c] / count


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
def _set_mask(y, mask, bit):
    """Set this bit of the mask where y is not cut off, and clear those above."""
    keep = np.uint8((1 << bit) - 1)  # the bits below, which are there already
    one = np.uint8(1 << bit)
    zero = type(_up(y[0]))(0)
    for i in range(y.size):
        mask[i] = (mask[i] & keep) | (np.uint8(0) if _up(y[i]) <= zero else one)


@_jit
def _apply_mask(dy, mask, bit, g):
    one = np.uint8(1 << bit)
    zero = type(dy[0])(0)  # of 16-bit floats as of the integers that they are here
    for i in range(dy.size):
        g[i] = dy[i] if mask[i] & one else zero


@_jit
def _row_moments(x):
    """Mean and m2 of a tile, from float64 sums of the distances from its first value."""
    first = np.float64(_up(x[0]))
    s, q = 0.0, 0.0
    for i in range(x.size):
        d = np.float64(_up(x[i])) - first
        s += d
        q += d * d
    return first + s / x.size, q - s * s / x.size


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
def _row_gradient_sums(dy, x, mean):
    s, q = type(mean)(0), type(mean)(0)
    for i in range(x.size):
        g = _up(dy[i])
        s += g
        q += g * (_up(x[i]) - mean)
    return np.float64(s), np.float64(q)


@_jit
def _row_gradient(dy, x, dx, in_place, mean, a, b, c):
    if in_place:  # dy is dx, which a loop over two arrays would have to allow for
        for i in range(x.size):
            dx[i] = _down(dx, a * _up(dx[i]) + (b * (_up(x[i]) - mean) + c))
    else:
        for i in range(x.size):
            dx[i] = _down(dx, a * _up(dy[i]) + (b * (_up(x[i]) - mean) + c))


@_jit
def _rows_moments(x, c0, c1, n0, n1, out):
    """Mean and m2 of channels c0 .. c1 of samples n0 .. n1, to ``out[c]``."""
    size = x.shape[2]
    for n in range(n0, n1):
        for i in range(0, size, _TILE):
            k = min(i + _TILE, size)
            before = np.float64((n - n0) * size + i)
            share = (k - i) / (before + (k - i))
            for c in range(c0, c1):
                mean, m2 = _row_moments(x[n, c, i:k])
                if before == 0:
                    out[0, c], out[1, c] = mean, m2
                else:  # bnlib.merge
                    d = mean - out[0, c]
                    out[0, c] += d * share
                    out[1, c] += m2 + d * d * before * share


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
            _row_apply(x[n, c], res, y[n, c], mean, scale, b, floor)
            i = 0 if mask.size else size
            while i < size:
                bit, start, length = _mask_piece(n, c, i, x, mask)
                _set_mask(y[n, c, i : i + length], flat[start : start + length], bit)
                i += length


def _rows_forward(stored, number):
    def kernel(p):
        a = numba.carray(p, _ARGUMENTS)
        measure, apply, relu, eps, momentum = a[1], a[2], a[3] != 0, _real(a[4]), _real(a[20])
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
        running_mean = numba.carray(_pointer(a[21], number), channels if a[21] else 0)
        running_var = numba.carray(_pointer(a[22], number), channels if a[22] else 0)
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
                    count = shape[0] * shape[2]
                    _finish(c0, c1, count, out, eps, momentum, stats, running_mean, running_var)
            if apply:  # while these channels are in the cache, if all has been measured
                _rows_normalize(x, residual, y, mask, weight, bias, stats, relu, c0, c1, n0, n1)

    return kernel


@_jit
def _rows_gradient_sums(dy, x, g, mask, mean, c0, c1, n0, n1, out):
    """Also write the masked dy to g, which without a mask is dy."""
    size = x.shape[2]
    flat = mask.reshape(mask.size)
    out[0, c0:c1] = 0.0
    out[1, c0:c1] = 0.0
    for n in range(n0, n1):
        for c in range(c0, c1):
            i = 0
            while i < size:
                k = min(i + _TILE, size)
                if mask.size:
                    bit, start, length = _mask_piece(n, c, i, x, mask)
                    length = min(length, _TILE)
                    k = i + length
                    _apply_mask(dy[n, c, i:k], flat[start : start + length], bit, g[n, c, i:k])
                s, q = _row_gradient_sums(g[n, c, i:k], x[n, c, i:k], mean[c])
                out[0, c] += s
                out[1, c] += q
                i = k


@_jit
def _rows_gradient(dy, x, dx, in_place, weight, mean, inv_std, sums, count, c0, c1, n0, n1):
    number = type(mean[0])
    for n in range(n0, n1):
        for ch in range(c0, c1):
            a, b, c = _coefficients(ch, weight, inv_std, sums, count)
            _row_gradient(
                dy[n, ch], x[n, ch], dx[n, ch], in_place, mean[ch], number(a), number(b), number(c)
            )


def _rows_backward(stored, number):
    def kernel(p):
        a = numba.carray(p, _ARGUMENTS)
        measure, apply, count = a[1], a[2], a[4]
        blocks, splits, channels = a[5], a[6], a[7]
        shape, mask_shape = (a[8], channels, a[9]), (a[10], a[11])
        dy = numba.carray(_pointer(a[12], stored), shape)
        x = numba.carray(_pointer(a[13], stored), shape)
        dx = numba.carray(_pointer(a[14], stored), shape)
        g = numba.carray(_pointer(a[15], stored), shape)
        mask = numba.carray(_pointer(a[16], numba.uint8), mask_shape)
        weight = numba.carray(_pointer(a[17], number), channels)
        mean = numba.carray(_pointer(a[18], number), channels)
        inv_std = numba.carray(_pointer(a[19], number), channels)
        sums = numba.carray(_pointer(a[20], number), (2, channels))
        partial = numba.carray(_pointer(a[21], numba.float64), (splits, 2, channels))
        while True:
            task = _take(p)
            if task >= blocks * splits:
                break
            c0, c1 = _range(task // splits, blocks, channels)
            n0, n1 = _range(task % splits, splits, shape[0])
            out = partial[task % splits]
            if measure or mask.size:
                _rows_gradient_sums(dy, x, g, mask, mean, c0, c1, n0, n1, out)
            if measure and splits == 1:
                _add_up(c0, c1, out, inv_std, sums)
            if apply:
                in_place = a[14] == a[15]
                _rows_gradient(
                    g, x, dx, in_place, weight, mean, inv_std, sums, count, c0, c1, n0, n1
                )

    return kernel


# Panels: x is (M, K), loops run over K neighbours that belong to many channels. Column k is of
# channel k % C if there are ``repeat`` positions in a row (then size = 1), else of k // size.
# Sums take eight rows at a time, which stay in registers, and go on in float64.


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
            for i in range(k, k + size):
                out[i] = values[c]
            k += size


@_jit
def _collect(columns, repeat, size, c0, c1, out):
    """One value per column, summed to one per channel."""
    for c in range(c0, c1):
        out[c] = 0.0
    k = 0
    for _ in range(repeat):
        if size == 1:
            for c in range(c1 - c0):
                out[c0 + c] += columns[k + c]
            k += c1 - c0
            continue
        for c in range(c0, c1):
            total = 0.0
            for i in range(k, k + size):
                total += columns[i]
            out[c] += total
            k += size


@_jit_in_order
def _eight_moments(x, r, k0, tiles, mean, m2):
    """Merge rows r .. r + 8 into mean and m2 of 8 * tiles rows before them, column by column."""
    k1 = k0 + mean.size
    x0, x1, x2, x3 = x[r, k0:k1], x[r + 1, k0:k1], x[r + 2, k0:k1], x[r + 3, k0:k1]
    x4, x5, x6, x7 = x[r + 4, k0:k1], x[r + 5, k0:k1], x[r + 6, k0:k1], x[r + 7, k0:k1]
    eighth = type(_up(x[0, 0]))(0.125)
    share, part = 1.0 / (tiles + 1), 8.0 * tiles / (tiles + 1)
    for k in range(mean.size):
        a, b, c, d = _up(x0[k]), _up(x1[k]), _up(x2[k]), _up(x3[k])
        e, f, g, h = _up(x4[k]), _up(x5[k]), _up(x6[k]), _up(x7[k])
        # Distances from the first value give a mean, and those from it the rest.
        near = (((b - a) + (c - a)) + ((d - a) + (e - a))) + (((f - a) + (g - a)) + (h - a))
        near = a + near * eighth
        a, b, c, d = a - near, b - near, c - near, d - near
        e, f, g, h = e - near, f - near, g - near, h - near
        s = ((a + b) + (c + d)) + ((e + f) + (g + h))
        q = ((a * a + b * b) + (c * c + d * d)) + ((e * e + f * f) + (g * g + h * h))
        rest = s * eighth
        delta = (np.float64(near) - mean[k]) + np.float64(rest)
        mean[k] += delta * share
        m2[k] += np.float64(q - s * rest) + delta * delta * part


@_jit
def _panel_moments(x, repeat, size, r0, r1, c0, c1, out):
    k0, k1 = _panel_columns(x, repeat, size, c0, c1)
    width = k1 - k0
    mean, m2 = np.zeros(width), np.zeros(width)
    tiles = (r1 - r0) // 8
    for t in range(tiles):
        _eight_moments(x, r0 + 8 * t, k0, t, mean, m2)
    for r in range(r0 + 8 * tiles, r1):
        xr, share = x[r, k0:k1], 1.0 / (r - r0 + 1)
        for k in range(width):
            d = np.float64(_up(xr[k])) - mean[k]
            mean[k] += d * share
            m2[k] += d * d * (1.0 - share)
    # The columns of a channel have as many rows each.
    columns, middle = np.float64(repeat * size), np.empty(width)
    first = np.empty(c1)
    for c in range(c0, c1):
        first[c] = mean[(c - c0) * size]
    _spread(first, repeat, size, c0, c1, middle)
    for k in range(width):
        middle[k] = mean[k] - middle[k]
    _collect(middle, repeat, size, c0, c1, out[0])
    for c in range(c0, c1):
        out[0, c] = first[c] + out[0, c] / columns
    _spread(out[0], repeat, size, c0, c1, middle)
    for k in range(width):
        d = mean[k] - middle[k]
        m2[k] += d * d * (r1 - r0)
    _collect(m2, repeat, size, c0, c1, out[1])


@_jit
def _panel_normalize(x, residual, y, mask, weight, bias, stats, relu, repeat, size, r0, r1, c0, c1):
    k0, k1 = _panel_columns(x, repeat, size, c0, c1)
    mean, scale, shift = np.empty((3, k1 - k0), stats.dtype)
    factor = np.empty(c1, stats.dtype)
    for c in range(c0, c1):
        factor[c] = stats[2, c] * weight[c]
    _spread(stats[0], repeat, size, c0, c1, mean)
    _spread(factor, repeat, size, c0, c1, scale)
    _spread(bias, repeat, size, c0, c1, shift)
    floor = _floor(stats, relu)
    # With a mask r0 .. r1 are its rows, of which each stands for eight of x.
    rows, groups = x.shape[0], mask.shape[0]
    for bit in range(8 if mask.size else 1):
        for j in range(r0, min(r1, rows - bit * groups) if mask.size else r1):
            r = bit * groups + j
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
            if mask.size:
                _set_mask(yr, mask[j, k0:k1], bit)


def _panel_forward(stored, number):
    def kernel(p):
        a = numba.carray(p, _ARGUMENTS)
        measure, apply, relu, eps, momentum = a[1], a[2], a[3] != 0, _real(a[4]), _real(a[20])
        blocks, splits, channels = a[5], a[6], a[7]
        shape, mask_shape, repeat, size = (a[8], a[9]), (a[10], a[11]), a[23], a[24]
        none = (np.int64(1), np.int64(0))
        x = numba.carray(_pointer(a[12], stored), shape)
        residual = numba.carray(_pointer(a[13], stored), shape if a[13] else none)
        y = numba.carray(_pointer(a[14], stored), shape)
        mask = numba.carray(_pointer(a[15], numba.uint8), mask_shape)
        weight = numba.carray(_pointer(a[16], number), channels)
        bias = numba.carray(_pointer(a[17], number), channels)
        stats = numba.carray(_pointer(a[18], number), (3, channels))
        partial = numba.carray(_pointer(a[19], numba.float64), (splits, 2, channels))
        running_mean = numba.carray(_pointer(a[21], number), channels if a[21] else 0)
        running_var = numba.carray(_pointer(a[22], number), channels if a[22] else 0)
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
                    count = shape[0] * repeat * size
                    _finish(c0, c1, count, out, eps, momentum, stats, running_mean, running_var)
            if apply:
                r0, r1 = _range(task % splits, splits, mask_shape[0] if mask.size else shape[0])
                _panel_normalize(
                    x, residual, y, mask, weight, bias, stats, relu, repeat, size, r0, r1, c0, c1
                )

    return kernel


@_jit_in_order
def _eight_gradient_sums(dy, x, r, k0, mean, s, q):
    """Add rows r .. r + 8 to the sums of every column."""
    k1 = k0 + mean.size
    x0, x1, x2, x3 = x[r, k0:k1], x[r + 1, k0:k1], x[r + 2, k0:k1], x[r + 3, k0:k1]
    x4, x5, x6, x7 = x[r + 4, k0:k1], x[r + 5, k0:k1], x[r + 6, k0:k1], x[r + 7, k0:k1]
    g0, g1, g2, g3 = dy[r, k0:k1], dy[r + 1, k0:k1], dy[r + 2, k0:k1], dy[r + 3, k0:k1]
    g4, g5, g6, g7 = dy[r + 4, k0:k1], dy[r + 5, k0:k1], dy[r + 6, k0:k1], dy[r + 7, k0:k1]
    for k in range(mean.size):
        m = mean[k]
        a, b, c, d = _up(g0[k]), _up(g1[k]), _up(g2[k]), _up(g3[k])
        e, f, g, h = _up(g4[k]), _up(g5[k]), _up(g6[k]), _up(g7[k])
        s[k] += np.float64(((a + b) + (c + d)) + ((e + f) + (g + h)))
        first = (a * (_up(x0[k]) - m) + b * (_up(x1[k]) - m)) + (
            c * (_up(x2[k]) - m) + d * (_up(x3[k]) - m)
        )
        second = (e * (_up(x4[k]) - m) + f * (_up(x5[k]) - m)) + (
            g * (_up(x6[k]) - m) + h * (_up(x7[k]) - m)
        )
        q[k] += np.float64(first + second)


@_jit
def _panel_gradient_sums(dy, x, g, mask, mean, repeat, size, r0, r1, c0, c1, out):
    """Also write the masked dy to g, which without a mask is dy."""
    k0, k1 = _panel_columns(x, repeat, size, c0, c1)
    width = k1 - k0
    middle, s, q = np.empty(width, mean.dtype), np.zeros(width), np.zeros(width)
    _spread(mean, repeat, size, c0, c1, middle)
    groups = mask.shape[0]
    for r in range(r0, r1, 8):
        end = min(r + 8, r1)
        if mask.size:
            for i in range(r, end):
                bit, j = divmod(i, groups)
                _apply_mask(dy[i, k0:k1], mask[j, k0:k1], bit, g[i, k0:k1])
        if end - r == 8:
            _eight_gradient_sums(g, x, r, k0, middle, s, q)
            continue
        for i in range(r, end):
            gi, xi = g[i, k0:k1], x[i, k0:k1]
            for k in range(width):
                s[k] += np.float64(_up(gi[k]))
                q[k] += np.float64(_up(gi[k]) * (_up(xi[k]) - middle[k]))
    _collect(s, repeat, size, c0, c1, out[0])
    _collect(q, repeat, size, c0, c1, out[1])


@_jit
def _panel_gradient(
    dy, x, dx, in_place, weight, mean, inv_std, sums, count, repeat, size, r0, r1, c0, c1
):
    k0, k1 = _panel_columns(x, repeat, size, c0, c1)
    factors = np.empty((3, c1), mean.dtype)
    for ch in range(c0, c1):
        factors[0, ch], factors[1, ch], factors[2, ch] = _coefficients(
            ch, weight, inv_std, sums, count
        )
    a, b, c, middle = np.empty((4, k1 - k0), mean.dtype)
    _spread(factors[0], repeat, size, c0, c1, a)
    _spread(factors[1], repeat, size, c0, c1, b)
    _spread(factors[2], repeat, size, c0, c1, c)
    _spread(mean, repeat, size, c0, c1, middle)
    for r in range(r0, r1):
        xr, gr, dr = x[r, k0:k1], dy[r, k0:k1], dx[r, k0:k1]
        if in_place:  # as in _row_gradient
            for k in range(xr.size):
                dr[k] = _down(dx, a[k] * _up(dr[k]) + (b[k] * (_up(xr[k]) - middle[k]) + c[k]))
        else:
            for k in range(xr.size):
                dr[k] = _down(dx, a[k] * _up(gr[k]) + (b[k] * (_up(xr[k]) - middle[k]) + c[k]))


def _panel_backward(stored, number):
    def kernel(p):
        a = numba.carray(p, _ARGUMENTS)
        measure, apply, count = a[1], a[2], a[4]
        blocks, splits, channels = a[5], a[6], a[7]
        shape, mask_shape, repeat, size = (a[8], a[9]), (a[10], a[11]), a[23], a[24]
        dy = numba.carray(_pointer(a[12], stored), shape)
        x = numba.carray(_pointer(a[13], stored), shape)
        dx = numba.carray(_pointer(a[14], stored), shape)
        g = numba.carray(_pointer(a[15], stored), shape)
        mask = numba.carray(_pointer(a[16], numba.uint8), mask_shape)
        weight = numba.carray(_pointer(a[17], number), channels)
        mean = numba.carray(_pointer(a[18], number), channels)
        inv_std = numba.carray(_pointer(a[19], number), channels)
        sums = numba.carray(_pointer(a[20], number), (2, channels))
        partial = numba.carray(_pointer(a[21], numba.float64), (splits, 2, channels))
        while True:
            task = _take(p)
            if task >= blocks * splits:
                break
            c0, c1 = _range(task // splits, blocks, channels)
            r0, r1 = _range(task % splits, splits, shape[0])
            out = partial[task % splits]
            if measure or mask.size:
                _panel_gradient_sums(dy, x, g, mask, mean, repeat, size, r0, r1, c0, c1, out)
            if measure and splits == 1:
                _add_up(c0, c1, out, inv_std, sums)
            if apply:
                in_place = a[14] == a[15]
                _panel_gradient(
                    g, x, dx, in_place, weight, mean, inv_std, sums, count,
                    repeat, size, r0, r1, c0, c1,
                )  # fmt: skip

    return kernel


# --- threads --------------------------------------------------------------------------------------

# A kernel is a C function of one array of integers: the number of the next task, which every thread
# that runs the kernel draws from, then flags, lengths and addresses.
_ARGUMENTS = 25
_Arguments = ctypes.c_int64 * _ARGUMENTS
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

_SHORT = 100  # positions; rows shorter than this are better looked at as a panel
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
        while channels and 2 * repeat * channels <= _WIDE // 2 and rows % (16 * repeat) == 0:
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
        return torch.full(like.shape[-1:], default, dtype=like.dtype, device=like.device)
    if v.dtype == like.dtype and v.is_contiguous():
        return v
    return v.detach().to(like.dtype).contiguous()


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
    stats = torch.empty((3, x.shape[1]), dtype=_number_dtype(x), device=x.device)
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
    running: tuple[Tensor, ...] = (),
    momentum: float = 0.0,
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
    size = (plan.splits, 2, channels)
    partial = torch.empty(size, dtype=torch.float64, device=x.device) if measure else None
    whole = plan.splits == 1  # every task has all of its channels: measure and apply at once
    moved = [_address(r) for r in running] or (0, 0)
    arguments = _Arguments(
        0, measure, apply and (whole or not measure), relu, _bits_of(eps),
        plan.blocks, plan.splits, channels, *plan.shape, *((1, 0) if mask is None else plan.mask),
        x.data_ptr(), _address(residual), _address(y), _address(mask),
        weight.data_ptr(), bias.data_ptr(), stats.data_ptr(),
        _address(partial), _bits_of(momentum), *moved, plan.repeat, plan.size,
    )  # fmt: skip
    kernel = _panel_forward if plan.panel else _rows_forward
    _start(kernel, x, arguments)
    if partial is not None and not whole:
        rows = plan.shape[0]
        arrays = [r.numpy() for r in running] or [np.empty(0, stats.numpy().dtype)] * 2
        per_row = x.numel() // channels // rows
        _merge(partial.numpy(), rows, per_row, eps, momentum, stats.numpy(), *arrays)
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
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Moments, Tensor]:
    """Return ``(y, Moments, inv_std)``: both steps of a channel while it is in the cache.

    Running statistics, if given, are moved in place by ``momentum``.
    """
    stats = _stats(x)
    given = () if running_mean is None or running_var is None else (running_mean, running_var)
    used = tuple(_vector(r, 0, stats) for r in given)
    y = _forward(x, weight, bias, stats, eps, residual, relu, mask, True, True, used, momentum)
    assert y is not None
    for to, at in zip(given, used, strict=True):
        if to.data_ptr() != at.data_ptr():
            to.copy_(at)  # of another dtype, or not contiguous
        elif not to.is_inference():
            torch.autograd.graph.increment_version(to)
    mean, m2, inv_std = stats.unbind()
    return y, Moments(_count(x), mean, m2), inv_std


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
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
    mean, inv_std, weight = (_vector(v, 1, sums) for v in (mean, inv_std, weight))
    size = (plan.splits, 2, channels)
    partial = torch.empty(size, dtype=torch.float64, device=x.device)
    # The masked dy is written once, to where dx will be if nobody wants it.
    g = dy if mask is None else dresidual if dresidual is not None else dx
    g = empty_like(x) if g is None else g
    whole = plan.splits == 1
    arguments = _Arguments(
        0, measure, apply and (whole or not measure), 0, count,
        plan.blocks, plan.splits, channels, *plan.shape, *((1, 0) if mask is None else plan.mask),
        dy.data_ptr(), x.data_ptr(), _address(dx), g.data_ptr(), _address(mask), weight.data_ptr(),
        mean.data_ptr(), inv_std.data_ptr(), sums.data_ptr(),
        partial.data_ptr(), 0, plan.repeat, plan.size,
    )  # fmt: skip
    kernel = _panel_backward if plan.panel else _rows_backward
    _start(kernel, x, arguments)
    if measure and not whole:
        _add_up_all(partial.numpy(), inv_std.numpy(), sums.numpy())
        if apply:
            arguments[1], arguments[2], arguments[10], arguments[11] = False, True, 1, 0
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
    sums = torch.empty((2, x.shape[1]), dtype=_number_dtype(x), device=x.device)
    _backward(dy, x, None, mean, inv_std, sums, 1, mask, None, True, False)
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
    sums = torch.empty((2, x.shape[1]), dtype=_number_dtype(x), device=x.device)
    sums[0], sums[1] = sum_dy.detach(), sum_dy_x_hat.detach()
    count = max(count, 1)
    dx = _backward(dy, x, weight, mean, inv_std, sums, count, mask, dresidual, False, True)
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
    sums = torch.empty((2, x.shape[1]), dtype=_number_dtype(x), device=x.device)
    count = max(count, 1)
    dx = _backward(dy, x, weight, mean, inv_std, sums, count, mask, dresidual, True, True)
    assert dx is not None
    first, second = sums.unbind()
    return dx, first, second
