# mypy: disable-error-code="no-untyped-def"
"""The four primitives for CPU tensors, compiled by Numba.

An input is looked at in one of two ways. *Rows*, (N, C, L): vectors run along the L neighbours of
one channel of one sample. *Panels*, (M, K): they run along neighbours that belong to different
channels, each with sums of its own; so are channels_last and (N, C) inputs. Any strides that are
neither contiguous nor channels_last are copied first. The vectors are those of
:mod:`bnlib.kernels.lanes`.

The work is cut into tasks by the shape alone, every task sums in a fixed order, and the partial
results are merged in a fixed order: the bits do not depend on the number of threads. A task of rows
reads a sample's channels one after the other, as they lie in memory, and has a vector of sums for
each; small enough, it finds them in the cache when it reads them again. Large outputs are written
past the caches.

Sums are taken in tiles, in the precision that the input is computed with, and go on in float64. For
the statistics they are sums of d and d², where d is the distance from the mean of what came before,
so that the mean drops out before anything is squared; :func:`bnlib.merge` joins the tiles. The
squares of a tile stay float32 numbers for float32 inputs up to 4e17.
"""

from __future__ import annotations

import array
import concurrent.futures
import ctypes
import functools
import math
import os
import platform
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from bnlib.kernels import (
    channels_are_neighbours,
    check_layout,
    check_like,
    check_mask,
    check_plain,
    check_vectors,
    dense,
    is_plain,
    mask_shape,
)
from bnlib.kernels.lanes import (
    as_stored,
    at_least,
    fetch,
    fetch_far,
    keep,
    lanes_in,
    load,
    load_int32,
    positive,
    rounded,
    settle,
    spread,
    store,
    store_int32,
    stream,
    total,
)
from bnlib.statistics import Moments

# How Numba sees the elements: it has no 16-bit floats, so those travel as integers.
_STORED = {
    torch.float32: (numba.float32, numba.float32),
    torch.float64: (numba.float64, numba.float64),
    torch.bfloat16: (numba.uint16, numba.float32),
    torch.float16: (numba.int16, numba.float32),
}
_SERIAL_BELOW = 1 << 14  # elements; waking a thread costs more than it saves
_HUGE_FROM = 1 << 22  # bytes
# Neighbours in a row, and rows of a panel, whose sums may have the precision of the input.
_TILE, _ROWS = 2048, 128
# Columns of a panel of which four rows fit into the first-level cache, twice.
_NARROW = 512
# Between arrays of one loop: a load that agrees with the store before it in the last twelve bits of
# the address waits for it.
_APART = 80
_STREAM_FROM = 1 << 23  # bytes; more than a cache keeps for the next layer


def supports(x: Tensor) -> bool:
    """Return whether these kernels take ``x``: a plain CPU tensor of one of four dtypes."""
    return is_plain(x) and x.is_cpu and x.dtype in _STORED


# --- what runs on a thread ------------------------------------------------------------------------

# No reordering: sums are taken as they are written.
_COMPILED: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}
_OPTIONS = _COMPILED | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _cached(decorate: Callable[..., Any]) -> Any:
    try:
        return decorate(cache=True)
    except RuntimeError:  # no folder to cache in, on a read-only install without a home
        return decorate(cache=False)


def _jit(function: Callable[..., Any]) -> Any:
    return _cached(lambda cache: numba.njit(cache=cache, **_OPTIONS)(function))


def _inlined(function: Callable[..., Any]) -> Any:
    """Compiled into each caller, for the constants it is called with."""
    return _cached(lambda cache: numba.njit(cache=cache, forceinline=True, **_OPTIONS)(function))


@intrinsic
def _take(typingctx, pointer, i):
    """Add 1 to pointer[i], all threads in turn, and return what it was."""

    def add(context, builder, signature, args):
        at = builder.gep(args[0], [args[1]])
        return builder.atomic_rmw("add", at, ir.IntType(64)(1), "acq_rel")

    return types.int64(pointer, types.int64), add


@intrinsic
def _wait_for(typingctx, pointer, i):
    """Wait until another thread has made pointer[i] something else than 0."""

    def wait(context, builder, signature, args):
        at = builder.gep(args[0], [args[1]])
        loop, after = builder.append_basic_block("wait"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            pause = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")
            builder.call(pause, [])
        value = builder.load_atomic(at, "acquire", 8)
        builder.cbranch(builder.icmp_signed("==", value, ir.IntType(64)(0)), loop, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(pointer, types.int64), wait


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


@_jit
def _cut(task, tasks, size, unit):
    """The part of 0 .. size that belongs to a task, in units of so many."""
    units = (size + unit - 1) // unit
    return task * units // tasks * unit, min((task + 1) * units // tasks * unit, size)


@_jit
def _merged(count, mean, m2, other, other_mean, other_m2):
    """:func:`bnlib.merge` of ``count`` values and ``other`` ones: mean and m2 of them all."""
    share = other / (count + other)
    d = other_mean - mean
    return mean + d * share, m2 + (other_m2 + d * d * count * share)


@_jit
def _merge(count, mean, m2, other, other_mean, other_m2):
    """The same for all channels, in place."""
    for c in range(mean.size):
        mean[c], m2[c] = _merged(count, mean[c], m2[c], other, other_mean[c], other_m2[c])


@_jit
def _finish(c0, c1, count, out, eps, momentum, mean, m2, inv_std, running_mean, running_var):
    """Mean, m2 and inv_std of channels c0 .. c1, rounded; move the running statistics, if any."""
    mean, m2, inv_std = mean[c0:c1], m2[c0:c1], inv_std[c0:c1]
    first, second = out[0, c0:c1], out[1, c0:c1]
    for c in range(mean.size):  # below 0 by rounding, in a channel of equal values
        mean[c], m2[c] = first[c], 0.0 if second[c] < 0 else second[c]
    for c in range(mean.size):
        inv_std[c] = 1 / np.sqrt(m2[c] / np.float64(count) + eps)
    if running_mean.size:
        average, variance = running_mean[c0:c1], running_var[c0:c1]
        for c in range(mean.size):
            average[c] = (1 - momentum) * average[c] + momentum * mean[c]
            new = m2[c] / np.float64(count - 1)
            variance[c] = (1 - momentum) * variance[c] + momentum * new


@_jit
def _add_up(c0, c1, out, inv_std, sum_dy, sum_dy_x_hat):
    first, second, scale = out[0, c0:c1], out[1, c0:c1], inv_std[c0:c1]
    sum_dy, sum_dy_x_hat = sum_dy[c0:c1], sum_dy_x_hat[c0:c1]
    for c in range(scale.size):
        sum_dy[c], sum_dy_x_hat[c] = first[c], second[c] * scale[c]


@_jit
def _coefficients(weight, inv_std, sum_dy, sum_dy_x_hat, count, c0, c1):
    """dx = a dy + b (x - mean) + c of channels c0 .. c1."""
    out, share = np.empty((3, c1 - c0), weight.dtype), 1 / np.float64(count)
    weight, inv_std = weight[c0:c1], inv_std[c0:c1]
    sum_dy, sum_dy_x_hat = sum_dy[c0:c1], sum_dy_x_hat[c0:c1]
    for c in range(c1 - c0):
        factor = np.float64(inv_std[c])
        a = weight[c] * factor
        out[0, c] = a
        out[1, c] = -a * factor * sum_dy_x_hat[c] * share
        out[2, c] = -a * sum_dy[c] * share
    return out


@_jit
def _bits_before(mask, at):
    """The bits of the byte of bit ``at`` that stand before it."""
    return np.int64(mask[at >> 3]) & ((1 << (at & 7)) - 1)


@_jit
def _write_bits(mask, at, before, bits, end):
    """Bits from ``at`` on, after those before it in its byte; no byte from ``end`` on.

    Up to the fourth byte, what stands after them is lost: masks are written in ascending order.
    """
    byte = at >> 3
    bits = before | bits << (at & 7)
    if byte + 4 <= end:
        store_int32(mask, byte, bits)
        return
    mask[byte] = bits & 255
    if byte + 1 < end:
        mask[byte + 1] = bits >> 8 & 255
    if byte + 2 < end:
        mask[byte + 2] = bits >> 16


@_jit
def _read_bits(mask, at):
    """The bits from ``at`` on, 16 or more."""
    byte, last = at >> 3, mask.size - 1
    if byte + 3 <= last:
        return load_int32(mask, byte) >> (at & 7)
    low, high = np.int64(mask[min(byte + 1, last)]) << 8, np.int64(mask[min(byte + 2, last)]) << 16
    return (np.int64(mask[byte]) | low | high) >> (at & 7)


@_jit
def _streams(y, size):
    """Whether rows of an output go past the caches: it is large, and they are whole cache lines.

    Such a line need not be read before it is written, and pushes nothing else out of the caches.
    """
    row = size * y.itemsize
    return y.size * y.itemsize >= _STREAM_FROM and (y.ctypes.data | row) % 64 == 0


# Rows: x is (N, C, L), vectors run along the L neighbours of one channel.


@_jit
def _rows_moments(x, like, channels, size, c0, c1, n0, n1, out):
    """Mean and m2 of channels c0 .. c1 of samples n0 .. n1, to ``out[:, c]``."""
    none, width = spread(x, 0.0), lanes_in(x)
    lanes = np.empty((c1 - c0) * 2 * width, like.dtype)
    per_tile = max(1, _TILE // size)
    count = 0
    for c in range(c0, c1):
        head = min(width, size)
        first = total(load(x, (n0 * channels + c) * size, head, none))
        out[0, c], out[1, c] = first / head, 0.0
    for n in range(n0, n1, per_tile):
        n_end = min(n + per_tile, n1)
        for i0 in range(0, size, _TILE):
            i1 = min(i0 + _TILE, size)
            lanes[:] = 0
            for m in range(n, n_end):  # in the order of memory
                for c in range(c0, c1):
                    j, near = 2 * width * (c - c0), spread(x, out[0, c])
                    s, q = load(lanes, j, width, none), load(lanes, j + width, width, none)
                    at = (m * channels + c) * size
                    for i in range(i0, i1, width):
                        d = load(x, at + i, i1 - i, near) - near
                        s = s + d
                        q = q + d * d
                    store(lanes, j, width, s)
                    store(lanes, j + width, width, q)
            part = (n_end - n) * (i1 - i0)
            for c in range(c0, c1):
                j, near = 2 * width * (c - c0), rounded(x, out[0, c])
                rest = total(load(lanes, j, width, none))
                m2 = total(load(lanes, j + width, width, none)) - rest * rest / part
                out[0, c], out[1, c] = _merged(
                    count, out[0, c], out[1, c], part, near + rest / part, m2
                )
            count += part


@_jit
def _rows_normalize(
    x, residual, y, mask, channels, size, weight, bias, mean, inv_std, floor, c0, c1, n0, n1
):
    none, width = spread(x, 0.0), lanes_in(x)
    floor = spread(x, floor)
    bits = 0 if mask is None else mask.size // channels * 8
    past = _streams(y, size)
    for n in range(n0, n1):
        for c in range(c0, c1):
            middle, shift = spread(x, mean[c]), spread(x, bias[c])
            scale = spread(x, inv_std[c] * weight[c])
            at = (n * channels + c) * size
            if mask is not None:
                bit, end = c * bits + n * size, (c * bits + n1 * size + 7) >> 3
                before = _bits_before(mask, bit)
            for i in range(0, size, width):
                v = (load(x, at + i, size - i, none) - middle) * scale + shift
                if residual is not None:
                    v = v + load(residual, at + i, size - i, none)
                v = as_stored(y, at_least(v, floor))
                if past:
                    stream(y, at + i, v)
                else:
                    store(y, at + i, size - i, v)
                if mask is not None:
                    last = positive(v)
                    _write_bits(mask, bit + i, before, last, end)
                    before = last >> (width - (bit & 7))


@_jit
def _rows_gradient_sums(dy, x, mask, channels, size, mean, c0, c1, n0, n1, out):
    none, width = spread(x, 0.0), lanes_in(x)
    lanes = np.empty((c1 - c0) * 2 * width, mean.dtype)
    bits = 0 if mask is None else mask.size // channels * 8
    per_tile = max(1, _TILE // size)
    out[:, c0:c1] = 0
    for n in range(n0, n1, per_tile):
        for i0 in range(0, size, _TILE):
            i1 = min(i0 + _TILE, size)
            lanes[:] = 0
            for m in range(n, min(n + per_tile, n1)):
                for c in range(c0, c1):
                    j, middle = 2 * width * (c - c0), spread(x, mean[c])
                    s, q = load(lanes, j, width, none), load(lanes, j + width, width, none)
                    at = (m * channels + c) * size
                    for i in range(i0, i1, width):
                        g = load(dy, at + i, i1 - i, none)
                        if mask is not None:
                            g = keep(_read_bits(mask, c * bits + m * size + i), g)
                        s = s + g
                        q = q + g * (load(x, at + i, i1 - i, none) - middle)
                    store(lanes, j, width, s)
                    store(lanes, j + width, width, q)
            for c in range(c0, c1):
                j = 2 * width * (c - c0)
                out[0, c] += total(load(lanes, j, width, none))
                out[1, c] += total(load(lanes, j + width, width, none))


@_jit
def _rows_gradient(
    dy, x, dx, masked_dy, mask, channels, size, weight, mean, inv_std, sum_dy, sum_dy_x_hat, count,
    c0, c1, n0, n1,
):  # fmt: skip
    none, width = spread(x, 0.0), lanes_in(x)
    bits = 0 if mask is None else mask.size // channels * 8
    past = _streams(dx, size) and (masked_dy is None or _streams(masked_dy, size))
    factors = _coefficients(weight, inv_std, sum_dy, sum_dy_x_hat, count, c0, c1)
    for n in range(n0, n1):
        for ch in range(c0, c1):
            a, b = spread(x, factors[0, ch - c0]), spread(x, factors[1, ch - c0])
            c, middle = spread(x, factors[2, ch - c0]), spread(x, mean[ch])
            at = (n * channels + ch) * size
            for i in range(0, size, width):
                g = load(dy, at + i, size - i, none)
                if mask is not None:
                    g = keep(_read_bits(mask, ch * bits + n * size + i), g)
                if masked_dy is not None:
                    if past:
                        stream(masked_dy, at + i, g)
                    else:
                        store(masked_dy, at + i, size - i, g)
                v = load(x, at + i, size - i, none) - middle
                v = a * g + (b * v + c)
                if past:
                    stream(dx, at + i, v)
                else:
                    store(dx, at + i, size - i, v)


# Panels: x is (M, K), vectors run along K neighbours, column k of channel k % C.


@_jit
def _per_column(values, columns):
    """One value per channel to one per column."""
    out = np.empty(columns, values.dtype)
    for j in range(0, columns, values.size):  # once for every position in a row
        for c in range(min(values.size, columns - j)):
            out[j + c] = values[c]
    return out


@_inlined
def _panel_rows(x, near, s, q, at, columns, size, rows):
    """Add d and d² of some rows to the sums of their columns, and ask for the rows that follow.

    Those are asked for in the order of memory: what fetches ahead of itself in a processor follows
    one stream much better than several.
    """
    none, width = spread(x, 0.0), lanes_in(x)
    for k in range(0, size, width):
        left = size - k
        middle = load(near, k, left, none)
        sum_d, sum_d2 = load(s, k, left, none), load(q, k, left, none)
        for j in range(rows):
            ahead = at + rows * (columns + k) + j * width
            if rows == 4:
                fetch(x, ahead)
            elif rows == 8:
                fetch_far(x, ahead)
            d = load(x, at + j * columns + k, left, none) - middle
            sum_d, sum_d2 = sum_d + d, sum_d2 + d * d
        store(s, k, left, sum_d)
        store(q, k, left, sum_d2)


@_jit
def _panel_moments(x, like, channels, columns, k0, k1, r0, r1, out):
    """Mean and m2 of the channels of columns k0 .. k1 of rows r0 .. r1, to ``out[:, c]``."""
    none, width, size = spread(x, 0.0), lanes_in(x), k1 - k0
    near, s, q = np.empty((3, size + _APART), like.dtype)
    mean, m2 = np.zeros((2, size))
    first = min(r0 + 8, r1)
    part = spread(x, 1 / (first - r0))
    for k in range(0, size, width):
        v = none
        for i in range(r0, first):
            v = v + load(x, i * columns + k0 + k, size - k, none) * part
        store(near, k, size - k, v)
    r, end = r0, min(r0 + 32, r1)
    while r < r1:
        s[:], q[:] = 0, 0
        i = r
        if size <= _NARROW:
            while i + 4 <= end:
                _panel_rows(x, near, s, q, i * columns + k0, columns, size, 4)
                i += 4
        else:
            while i + 8 <= end:
                _panel_rows(x, near, s, q, i * columns + k0, columns, size, 8)
                i += 8
        while i < end:
            _panel_rows(x, near, s, q, i * columns + k0, columns, size, 1)
            i += 1
        part = np.float64(end - r)
        before, share = np.float64(r - r0), 1 / part
        for k in range(size):
            rest = s[k] * share
            mean[k], m2[k] = _merged(
                before, mean[k], m2[k], part, near[k] + rest, q[k] - s[k] * rest
            )
        for k in range(size):
            near[k] = mean[k]
        r, end = end, min(end + min(3 * (end - r0), _ROWS), r1)
    first, second = out[0, k0 : min(k1, channels)], out[1, k0 : min(k1, channels)]
    for c in range(first.size):
        first[c], second[c] = mean[c], m2[c]
    for j in range(channels, size, channels):  # further positions in a row
        before = np.float64(j // channels * (r1 - r0))
        _merge(before, first, second, np.float64(r1 - r0), mean[j:], m2[j:])


@_inlined
def _panel_normalize_piece(
    x, residual, y, mask, columns, middles, shifts, scales, floor, past, at, size, further
):
    """Normalise so many columns of one row, and ask for what stands some rows further on."""
    none, width, end = spread(x, 0.0), lanes_in(x), (at + size + 7) >> 3
    if mask is not None:
        before = _bits_before(mask, at)
    for k in range(0, size, width):
        if further:
            fetch_far(x, at + k + further * columns)
        middle, shift = load(middles, k, size - k, none), load(shifts, k, size - k, none)
        scale = load(scales, k, size - k, none)
        v = (load(x, at + k, size - k, none) - middle) * scale + shift
        if residual is not None:
            v = v + load(residual, at + k, size - k, none)
        v = as_stored(y, at_least(v, floor))
        if past:
            stream(y, at + k, v)
        else:
            store(y, at + k, size - k, v)
        if mask is not None:
            last = positive(v)
            _write_bits(mask, at + k, before, last, end)
            before = last >> (width - (at & 7))


@_jit
def _panel_normalize(
    x, residual, y, mask, columns, weight, bias, mean, inv_std, floor, k0, k1, r0, r1
):
    size, floor, past = k1 - k0, spread(x, floor), _streams(y, columns)
    middles, shifts = _per_column(mean[k0:], size), _per_column(bias[k0:], size)
    scales, weights = _per_column(inv_std[k0:], size), _per_column(weight[k0:], size)
    for k in range(size):
        scales[k] *= weights[k]
    if size <= 2 * _NARROW or columns % 8:
        for r in range(r0, r1):
            _panel_normalize_piece(
                x, residual, y, mask, columns, middles, shifts, scales, floor, past,
                r * columns + k0, size, 0,
            )  # fmt: skip
        return
    # Coefficients of so many columns do not stay in the first-level cache from row to row.
    for first in range(r0, r1, 4):
        for k in range(0, size, _NARROW):
            for r in range(first, min(first + 4, r1)):
                _panel_normalize_piece(
                    x, residual, y, mask, columns, middles[k:], shifts[k:], scales[k:], floor, past,
                    r * columns + k0 + k, min(size - k, _NARROW), 4,
                )  # fmt: skip


@_inlined
def _panel_gradient_rows(dy, x, mask, middles, s, q, at, columns, size, rows):
    """The same for sums of dy and of dy (x - mean)."""
    none, width = spread(x, 0.0), lanes_in(x)
    for k in range(0, size, width):
        left = size - k
        middle = load(middles, k, left, none)
        sum_g, sum_gd = load(s, k, left, none), load(q, k, left, none)
        for j in range(rows):
            ahead = at + rows * (columns + k) + j * width
            if rows == 4:
                fetch(dy, ahead)
                fetch(x, ahead)
            elif rows == 8:
                fetch_far(dy, ahead)
                fetch_far(x, ahead)
            i = at + j * columns + k
            g = load(dy, i, left, none)
            if mask is not None:
                g = keep(_read_bits(mask, i), g)
            sum_g = sum_g + g
            sum_gd = sum_gd + g * (load(x, i, left, none) - middle)
        store(s, k, left, sum_g)
        store(q, k, left, sum_gd)


@_jit
def _panel_gradient_sums(dy, x, mask, mean, channels, columns, k0, k1, r0, r1, out):
    size = k1 - k0
    middles = _per_column(mean[k0:], size)
    s, q = np.empty((2, size + _APART), mean.dtype)
    first, second = out[0, k0 : min(k1, channels)], out[1, k0 : min(k1, channels)]
    first[:], second[:] = 0, 0
    in_cache = size <= _NARROW // 2 and x.size * x.itemsize < 2 * _STREAM_FROM
    for r in range(r0, r1, _ROWS):
        s[:], q[:] = 0, 0
        i, end = r, min(r + _ROWS, r1)
        if size > _NARROW:
            while i + 8 <= end:
                at = i * columns + k0
                _panel_gradient_rows(dy, x, mask, middles, s, q, at, columns, size, 8)
                i += 8
        elif in_cache:
            while i + 4 <= end:
                at = i * columns + k0
                _panel_gradient_rows(dy, x, mask, middles, s, q, at, columns, size, 4)
                i += 4
        while i < end:
            at = i * columns + k0
            _panel_gradient_rows(dy, x, mask, middles, s, q, at, columns, size, 1)
            i += 1
        for j in range(0, size, channels):
            for c in range(first.size):
                first[c] += s[j + c]
                second[c] += q[j + c]


@_inlined
def _panel_gradient_piece(
    dy, x, dx, masked_dy, mask, columns, all_a, all_b, all_c, middles, past, at, size, further
):
    none, width = spread(x, 0.0), lanes_in(x)
    for k in range(0, size, width):
        if further:
            fetch_far(dy, at + k + further * columns)
            fetch_far(x, at + k + further * columns)
        a, b = load(all_a, k, size - k, none), load(all_b, k, size - k, none)
        c, middle = load(all_c, k, size - k, none), load(middles, k, size - k, none)
        g = load(dy, at + k, size - k, none)
        if mask is not None:
            g = keep(_read_bits(mask, at + k), g)
        if masked_dy is not None:
            if past:
                stream(masked_dy, at + k, g)
            else:
                store(masked_dy, at + k, size - k, g)
        v = a * g + (b * (load(x, at + k, size - k, none) - middle) + c)
        if past:
            stream(dx, at + k, v)
        else:
            store(dx, at + k, size - k, v)


@_jit
def _panel_gradient(
    dy, x, dx, masked_dy, mask, columns, weight, mean, inv_std, sum_dy, sum_dy_x_hat, count,
    k0, k1, r0, r1,
):  # fmt: skip
    size, c1 = k1 - k0, min(k1, mean.size)
    factors = _coefficients(weight, inv_std, sum_dy, sum_dy_x_hat, count, k0, c1)
    all_a, all_b = _per_column(factors[0], size), _per_column(factors[1], size)
    all_c, middles = _per_column(factors[2], size), _per_column(mean[k0:], size)
    past = _streams(dx, columns) and (masked_dy is None or _streams(masked_dy, columns))
    if size <= 2 * _NARROW or columns % 8:
        for r in range(r0, r1):
            _panel_gradient_piece(
                dy, x, dx, masked_dy, mask, columns, all_a, all_b, all_c, middles, past,
                r * columns + k0, size, 0,
            )  # fmt: skip
        return
    for first in range(r0, r1, 4):
        for k in range(0, size, _NARROW):
            for r in range(first, min(first + 4, r1)):
                _panel_gradient_piece(
                    dy, x, dx, masked_dy, mask, columns, all_a[k:], all_b[k:], all_c[k:],
                    middles[k:], past, r * columns + k0 + k, min(size - k, _NARROW), 4,
                )  # fmt: skip


# What is absent is None: Numba compiles loops which do not ask for it.


@_jit
def _normalize(
    panel, x, residual, y, mask, channels, size, weight, bias, mean, inv_std, floor,
    c0, c1, k1, r0, r1,
):  # fmt: skip
    rest = (weight, bias, mean, inv_std, floor, c0)
    if panel:
        _panel_normalize(x, residual, y, mask, channels * size, *rest, k1, r0, r1)
    else:
        _rows_normalize(x, residual, y, mask, channels, size, *rest, c1, r0, r1)


@_jit
def _gradient_sums(panel, dy, x, mask, channels, size, mean, c0, c1, k1, r0, r1, out):
    if panel:
        _panel_gradient_sums(dy, x, mask, mean, channels, channels * size, c0, k1, r0, r1, out)
    else:
        _rows_gradient_sums(dy, x, mask, channels, size, mean, c0, c1, r0, r1, out)


@_jit
def _gradient(
    panel, dy, x, dx, masked_dy, mask, channels, size, weight, mean, inv_std, sum_dy, sum_dy_x_hat,
    count, c0, c1, k1, r0, r1,
):  # fmt: skip
    rest = (weight, mean, inv_std, sum_dy, sum_dy_x_hat, count, c0)
    if panel:
        _panel_gradient(dy, x, dx, masked_dy, mask, channels * size, *rest, k1, r0, r1)
    else:
        _rows_gradient(dy, x, dx, masked_dy, mask, channels, size, *rest, c1, r0, r1)


# A kernel is a C function of one array of integers, for as many threads as like to run it: first
# numbers that the threads share, then what to do, lengths and addresses. The threads draw the tasks
# that measure, the one that has done the last of them merges what they found, and they draw the
# tasks that apply. Nobody waits for a thread that has not begun a task. Where one task measures all
# values of its channels, it applies at once what it found.

_MEASURED, _DONE, _MERGED, _APPLIED = range(4)  # tasks drawn, tasks done, whether merged, drawn
_MEASURE, _APPLY = 1, 2


@_jit
def _takes_place(phase, measure, apply, splits):
    """Whether a phase is due; what is applied at once has no phase of its own."""
    return measure if phase == _MEASURED else apply and not (measure and splits == 1)


@_jit
def _next(p, phase, threads, tasks):
    """Draw a task: whose turn it is, -1 after the last, and its number.

    Each thread has a stretch of its own, so that those which start together do not write to the
    same fresh huge page: Linux would let each of them clear one.
    """
    each = (tasks + threads - 1) // threads
    while True:
        draw = _take(p, phase)
        thread, task = draw % threads, draw // threads
        if task >= each:
            return -1, 0
        task += thread * each
        if task < tasks:  # what was read last may still be in the cache, and is applied first
            return thread, tasks - 1 - task if phase == _APPLIED else task


@_jit
def _middle(r0, r1, thread, threads, at_once):
    """Where to begin to write rows r0 .. r1 that other threads write for other channels."""
    return r0 + (thread * (r1 - r0) // threads & ~7) if at_once else r0


def _forward_kernel(stored, number, has_mask, has_residual):
    def kernel(p):
        a = numba.carray(p, _ARGUMENTS)
        measure, apply = a[4] & _MEASURE != 0, a[4] & _APPLY != 0
        threads, panel, blocks, splits = a[5], a[6] != 0, a[7], a[8]
        rows, channels, size = a[9], a[10], a[11]
        elements, count, columns = rows * channels * size, rows * size, channels * size
        partial = numba.carray(_pointer(a[12], numba.float64), (splits, 2, channels))
        x = numba.carray(_pointer(a[13], stored), elements)
        mask = numba.carray(_pointer(a[14], numba.uint8), a[15]) if has_mask else None
        weight = numba.carray(_pointer(a[16], number), channels)
        mean = numba.carray(_pointer(a[17], number), channels)
        inv_std = numba.carray(_pointer(a[18], number), channels)
        y = numba.carray(_pointer(a[19], stored), elements)
        residual = numba.carray(_pointer(a[20], stored), elements) if has_residual else None
        bias = numba.carray(_pointer(a[21], number), channels)
        m2 = numba.carray(_pointer(a[22], numba.float64), channels)
        running_mean = numba.carray(_pointer(a[23], number), channels if a[23] else 0)
        running_var = numba.carray(_pointer(a[24], number), channels if a[24] else 0)
        eps, momentum, floor = _real(a[25]), _real(a[26]), _real(a[27])
        statistics = (eps, momentum, mean, m2, inv_std, running_mean, running_var)
        tasks, at_once = blocks * splits, measure and apply and splits == 1
        wide, unit = (16, 8) if panel else (1, 1)
        for phase in (_MEASURED, _APPLIED):
            if not _takes_place(phase, measure, apply, splits):
                continue
            if phase == _APPLIED and measure:
                _wait_for(p, _MERGED)
            if phase == _APPLIED and mask is not None:
                unit = 8  # so that no two tasks share a byte
            while True:
                thread, task = _next(p, phase, threads, tasks)
                if thread < 0:
                    break
                c0, c1 = _cut(task // splits, blocks, channels, wide)
                r0, r1 = _cut(task % splits, splits, rows, unit)
                k1 = columns if blocks == 1 else c1
                if phase == _MEASURED:
                    out = partial[task % splits]
                    if panel:
                        _panel_moments(x, weight, channels, columns, c0, k1, r0, r1, out)
                    else:
                        _rows_moments(x, weight, channels, size, c0, c1, r0, r1, out)
                    if splits == 1:
                        _finish(c0, c1, count, out, *statistics)
                    elif _take(p, _DONE) == tasks - 1:
                        before = np.float64(_cut(0, splits, rows, unit)[1] * size)
                        first = partial[0]
                        for s in range(1, splits):
                            r0, r1 = _cut(s, splits, rows, unit)
                            part = np.float64((r1 - r0) * size)
                            _merge(before, first[0], first[1], part, partial[s, 0], partial[s, 1])
                            before += part
                        _finish(0, channels, count, first, *statistics)
                        _take(p, _MERGED)
                if phase == _APPLIED or at_once:
                    middle = _middle(r0, r1, thread, threads, at_once)
                    rest = (channels, size, weight, bias, mean, inv_std, floor, c0, c1, k1)
                    for n0, n1 in ((middle, r1), (r0, middle)):
                        if n0 < n1:
                            _normalize(panel, x, residual, y, mask, *rest, n0, n1)
            settle()

    return kernel


def _backward_kernel(stored, number, has_mask, has_masked_dy):
    def kernel(p):
        a = numba.carray(p, _ARGUMENTS)
        measure, apply = a[4] & _MEASURE != 0, a[4] & _APPLY != 0
        threads, panel, blocks, splits = a[5], a[6] != 0, a[7], a[8]
        rows, channels, size = a[9], a[10], a[11]
        elements, columns = rows * channels * size, channels * size
        partial = numba.carray(_pointer(a[12], numba.float64), (splits, 2, channels))
        x = numba.carray(_pointer(a[13], stored), elements)
        mask = numba.carray(_pointer(a[14], numba.uint8), a[15]) if has_mask else None
        weight = numba.carray(_pointer(a[16], number), channels)
        mean = numba.carray(_pointer(a[17], number), channels)
        inv_std = numba.carray(_pointer(a[18], number), channels)
        dx = numba.carray(_pointer(a[19], stored), elements)
        dy = numba.carray(_pointer(a[20], stored), elements)
        masked_dy = numba.carray(_pointer(a[21], stored), elements) if has_masked_dy else None
        sum_dy = numba.carray(_pointer(a[22], number), channels)
        sum_dy_x_hat = numba.carray(_pointer(a[23], number), channels)
        count = a[24]
        tasks, at_once = blocks * splits, measure and apply and splits == 1
        wide, unit = (16, 8) if panel else (1, 1)
        for phase in (_MEASURED, _APPLIED):
            if not _takes_place(phase, measure, apply, splits):
                continue
            if phase == _APPLIED and measure:
                _wait_for(p, _MERGED)
            while True:
                thread, task = _next(p, phase, threads, tasks)
                if thread < 0:
                    break
                c0, c1 = _cut(task // splits, blocks, channels, wide)
                r0, r1 = _cut(task % splits, splits, rows, unit)
                k1 = columns if blocks == 1 else c1
                if phase == _MEASURED:
                    out = partial[task % splits]
                    rest = (channels, size, mean, c0, c1, k1, r0, r1, out)
                    _gradient_sums(panel, dy, x, mask, *rest)
                    if splits == 1:
                        _add_up(c0, c1, out, inv_std, sum_dy, sum_dy_x_hat)
                    elif _take(p, _DONE) == tasks - 1:
                        for i in range(1, splits):
                            for c in range(channels):
                                partial[0, 0, c] += partial[i, 0, c]
                                partial[0, 1, c] += partial[i, 1, c]
                        _add_up(0, channels, partial[0], inv_std, sum_dy, sum_dy_x_hat)
                        _take(p, _MERGED)
                if phase == _APPLIED or at_once:
                    rest = (
                        channels, size, weight, mean, inv_std, sum_dy, sum_dy_x_hat, count,
                        c0, c1, k1,
                    )  # fmt: skip
                    middle = _middle(r0, r1, thread, threads, at_once)
                    for n0, n1 in ((middle, r1), (r0, middle)):
                        if n0 < n1:
                            _gradient(panel, dy, x, dx, masked_dy, mask, *rest, n0, n1)
            settle()

    return kernel


# --- threads --------------------------------------------------------------------------------------

_ARGUMENTS = 28  # at most
_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _compiled(make: Callable[..., Any], dtype: torch.dtype, *present: bool) -> Any:
    """The kernel for a dtype, compiled or from Numba's cache: address, and callable from Python."""
    signature = types.void(types.CPointer(types.int64))
    function = make(*_STORED[dtype], *present)
    kernel = _cached(lambda cache: numba.cfunc(signature, cache=cache, **_COMPILED)(function))
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


# Memory in which the tasks of one call meet: its size, its address, and what keeps it.
_spare: list[tuple[int, int, np.ndarray[Any, Any]]] = []


def _borrow(size: int) -> tuple[int, int, np.ndarray[Any, Any]]:
    """``size`` float64 numbers or more, to go back to ``_spare``."""
    try:
        memory = _spare.pop()
        if memory[0] >= size:
            return memory
    except IndexError:  # the first call, or other threads have them all
        pass
    numbers = np.empty(size)
    return size, numbers.ctypes.data, numbers


def _run(
    kernel: tuple[Any, int, Callable[[int], None]],
    plan: _Plan,
    steps: int,
    arguments: tuple[int, ...],
) -> None:
    """Run a kernel with as many threads as torch uses."""
    _, address, call = kernel
    memory = _borrow(2 * plan.splits * plan.channels)
    tasks = plan.tasks
    threads = 1 if tasks == 1 or _after_fork else min(torch.get_num_threads(), tasks)
    numbers = array.array("q", (0, 0, 0, 0, steps, threads, *plan[:6], memory[1], *arguments))
    pointer = numbers.buffer_info()[0]
    if threads == 1:
        call(pointer)
    elif _openmp is not None:
        _openmp(address, pointer, threads, 0)
    else:
        others = [_own_threads().submit(call, pointer) for _ in range(threads - 1)]
        call(pointer)
        for other in others:
            other.result()
    _spare.append(memory)


# --- what torch sees ------------------------------------------------------------------------------

_WIDE = 2048


class _Plan(NamedTuple):
    """How an input is looked at, and how its work is cut: a function of shape and strides alone."""

    panel: bool  # the channels are neighbours
    blocks: int  # cuts of the channels
    splits: int  # cuts of the rows
    rows: int  # samples, or rows of the panel
    channels: int
    size: int  # neighbours of one channel, or positions in one row of the panel
    copy: bool  # must be laid out first
    tasks: int  # for at most so many threads


@functools.lru_cache(maxsize=4096)
def _plan(shape: tuple[int, ...], strides: tuple[int, ...]) -> _Plan:
    like = torch.empty_strided(shape, strides, device="meta")
    samples, channels = shape[:2]
    size = math.prod(shape[2:])
    if not channels_are_neighbours(like):
        # A task reads long stretches of memory, and only then as little as the cache may hold.
        blocks = channels if size >= _TILE else max(16, channels * size >> 14)
        blocks = max(1, min(channels, blocks))
        splits = 1 if blocks >= 16 else min(samples, -(-16 // blocks))
        copy = not like.is_contiguous()
        tasks = 1 if samples * channels * size < _SERIAL_BELOW else blocks * splits
        return _Plan(False, blocks, splits, samples, channels, size, copy, tasks)
    copy = not like.movedim(1, -1).is_contiguous()
    rows, repeat = samples * size, 1
    while channels and 2 * repeat * channels <= 256 and rows % (16 * repeat) == 0:
        repeat *= 2
    rows //= repeat
    # A block's bits begin with a byte.
    blocks = max(1, -(-channels // _WIDE)) if channels % 8 == 0 else 1
    elements = rows * (channels * repeat // blocks)
    splits = min(rows >> 6, max(min(8, elements >> 15), min(64, elements >> 17)))
    splits = 1 << max(splits.bit_length() - 1, 0)  # evenly among two threads, or four
    tasks = 1 if rows * channels * repeat < _SERIAL_BELOW else blocks * splits
    return _Plan(True, blocks, splits, rows, channels, repeat, copy, tasks)


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the layout of ``x``."""
    return t if t.stride() == x.stride() else dense(t, x)


def _checked(
    x: Tensor, channel_axis: int, mask: Tensor | None = None, **vectors: Tensor | None
) -> Tensor:
    """Return ``x`` with its channels on axis 1."""
    if not supports(x) or x.dim() < 2:
        check_plain(x=x)
        what = f"{x.dtype} {tuple(x.shape)} on {x.device}"
        raise TypeError(f"expected x to be a floating-point CPU tensor of rank >= 2, got {what}")
    x = x.movedim(channel_axis, 1)
    check_vectors(x, **vectors)
    check_mask(x, mask, mask_shape(x))
    return x


@functools.lru_cache(maxsize=256)
def _constant(value: float, channels: int, dtype: torch.dtype) -> Tensor:
    """One value for every channel; not to be written to."""
    t = torch.full((channels,), value, dtype=dtype, device="cpu")
    if type(t) is not Tensor:  # it would serve later calls too
        raise TypeError(f"expected no mode in which a new tensor is a {type(t).__name__}")
    return t


def _empty_vectors(count: int, x: Tensor) -> list[Tensor]:
    like = _constant(1, x.shape[1], _number_dtype(x))
    return [torch.empty_like(like) for _ in range(count)]


def _empty_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, m2 and inv_std to be filled; m2 may be beyond float32 where the variance is not."""
    mean, inv_std = _empty_vectors(2, x)
    return mean, torch.empty_like(_constant(1, x.shape[1], torch.float64)), inv_std


def _vector(v: Tensor | None, default: float, x: Tensor) -> Tensor:
    """One value per channel, contiguous, of the precision in which ``x`` is computed with."""
    dtype = _number_dtype(x)
    if v is None:
        return _constant(default, x.shape[1], dtype)
    if v.dtype == dtype and v.is_contiguous():
        return v
    return v.detach().to(dtype).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr() or _freed()


def _freed() -> int:
    raise RuntimeError("expected tensors with memory, got one whose storage has been freed")


def _number_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised tensor like ``x``, laid out for the kernels, on huge pages if large.

    Linux by default hands out huge pages to those who ask; PyTorch does not, and takes a page
    fault for every 4 KiB of a large output.
    """
    return _empty_like(dense(x) if _plan(x.shape, x.stride()).copy else x)


def _empty_like(x: Tensor) -> Tensor:
    """The same for a tensor that is laid out for the kernels."""
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


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor | None, ...],
    eps: float,
    residual: Tensor | None,
    relu: bool,
    mask: Tensor | None,
    steps: int,
    running: tuple[Tensor, ...] = (),
    momentum: float = 0.0,
) -> Tensor | None:
    """Fill mean, m2 and inv_std, or normalise with what is there, or both."""
    plan = _plan(x.shape, x.stride())
    if plan.copy:
        x = dense(x)
    y = _empty_like(x) if steps & _APPLY else None
    mean, m2, inv_std = statistics
    if x.numel() == 0:
        if mean is not None and m2 is not None:
            mean.zero_()
            m2.zero_()
        return y
    residual = None if residual is None else _beside(residual, x)
    weight, bias = _vector(weight, 1, x), _vector(bias, 0, x)
    arguments = (
        x.data_ptr() or _freed(), *_mask_of(mask), weight.data_ptr() or _freed(),
        _address(mean), _address(inv_std),
        _address(y), _address(residual), bias.data_ptr() or _freed(), _address(m2),
        *([_address(r) for r in running] or (0, 0)),
        _bits_of(float(eps)), _bits_of(float(momentum)), _bits_of(0.0 if relu else -math.inf),
    )  # fmt: skip
    kernel = _compiled(_forward_kernel, x.dtype, mask is not None, residual is not None)
    _run(kernel, plan, steps, arguments)
    return y


def _mask_of(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.data_ptr() or _freed(), mask.numel())


@functools.lru_cache(maxsize=256)
def _bits_of(value: float) -> int:
    return int.from_bytes(struct.pack("=d", value), sys.byteorder, signed=True)


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1] if x.shape[1] else x.shape[0] * math.prod(x.shape[2:])


def moments(x: Tensor, channel_axis: int = 1) -> Moments:
    """Return count, mean and sum of squared deviations per channel: :func:`bnlib.moments`."""
    x = _checked(x, channel_axis)
    mean, m2, inv_std = _empty_statistics(x)
    _forward(x, None, None, (mean, m2, inv_std), 1.0, None, False, None, _MEASURE)
    return Moments(_count(x), mean, m2)


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
    vectors = {"mean": mean, "inv_std": inv_std, "weight": weight, "bias": bias}
    given, x = x, _checked(x, channel_axis, mask, **vectors)
    check_like(given, residual=residual)
    residual = None if residual is None else residual.movedim(channel_axis, 1)
    statistics = (_vector(mean, 0, x), None, _vector(inv_std, 1, x))
    y = _forward(x, weight, bias, statistics, 0.0, residual, relu, mask, _APPLY)
    assert y is not None
    return y.movedim(1, channel_axis)


_changed = torch.autograd.graph.increment_version


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
    trusted: bool = False,
) -> tuple[Tensor, Moments, Tensor]:
    """Return ``(y, Moments, inv_std)``: both steps of a channel while it is in the cache.

    Running statistics, if given, are moved in place by ``momentum``. ``trusted`` says that the
    caller has checked all tensors.
    """
    if not trusted:
        x = _checked(x, 1, mask, weight=weight, bias=bias)
        check_vectors(x, running_mean=running_mean, running_var=running_var)
        check_like(x, residual=residual)
    mean, m2, inv_std = _empty_statistics(x)
    given: tuple[Tensor, ...] = ()
    if running_mean is not None and running_var is not None:
        given = running_mean, running_var
    used = tuple(_vector(v, 0, x) for v in given)
    y = _forward(
        x, weight, bias, (mean, m2, inv_std), eps, residual, relu, mask, _MEASURE | _APPLY, used,
        momentum,
    )  # fmt: skip
    assert y is not None
    for to, at in zip(given, used, strict=True):
        if to is not at:
            to.copy_(at)  # of another dtype, or not contiguous
        else:
            _changed(to)
    return y, Moments(_count(x), mean, m2), inv_std


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    sums: tuple[Tensor, ...],
    count: int,
    mask: Tensor | None,
    dresidual: Tensor | None,
    steps: int,
) -> Tensor | None:
    plan = _plan(x.shape, x.stride())
    if plan.copy:
        x = dense(x)
    dy = _beside(dy, x)
    dx = _empty_like(x) if steps & _APPLY else None
    if x.numel() == 0:
        if steps & _MEASURE:
            for s in sums:
                s.zero_()
        return dx
    mean, inv_std, weight = (_vector(v, 1, x) for v in (mean, inv_std, weight))
    arguments = (
        x.data_ptr() or _freed(), *_mask_of(mask), *(_address(v) for v in (weight, mean, inv_std)),
        _address(dx), dy.data_ptr() or _freed(), _address(dresidual), *map(_address, sums), count,
    )  # fmt: skip
    kernel = _compiled(_backward_kernel, x.dtype, mask is not None, dresidual is not None)
    _run(kernel, plan, steps, arguments)
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
    given, x = x, _checked(x, channel_axis, mask, mean=mean, inv_std=inv_std)
    check_like(given, dy=dy)
    dy = dy.movedim(channel_axis, 1)
    sum_dy, sum_dy_x_hat = sums = tuple(_empty_vectors(2, x))
    _backward(dy, x, None, mean, inv_std, sums, 1, mask, None, _MEASURE)
    return sum_dy, sum_dy_x_hat


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
    vectors = {"weight": weight, "sum_dy": sum_dy, "sum_dy_x_hat": sum_dy_x_hat}
    given, x = x, _checked(x, channel_axis, mask, mean=mean, inv_std=inv_std, **vectors)
    check_like(given, dy=dy, dresidual=dresidual)
    dy = dy.movedim(channel_axis, 1)
    if dresidual is not None:
        dresidual = dresidual.movedim(channel_axis, 1)
        check_layout(x, dresidual)
    sums = _vector(sum_dy, 0, x), _vector(sum_dy_x_hat, 0, x)
    dx = _backward(dy, x, weight, mean, inv_std, sums, max(count, 1), mask, dresidual, _APPLY)
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
    trusted: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dx, sum_dy, sum_dy_x_hat)``: both steps of a channel while it is in the cache.

    ``trusted`` says that the caller has checked all tensors.
    """
    if not trusted:
        x = _checked(x, 1, mask, mean=mean, inv_std=inv_std, weight=weight)
        check_like(x, dy=dy, dresidual=dresidual)
        check_layout(x, dresidual)
    sum_dy, sum_dy_x_hat = sums = tuple(_empty_vectors(2, x))
    steps = _MEASURE | _APPLY
    dx = _backward(dy, x, weight, mean, inv_std, sums, max(count, 1), mask, dresidual, steps)
    assert dx is not None
    return dx, sum_dy, sum_dy_x_hat
