# mypy: disable-error-code="no-untyped-def"
"""The loops of the CPU tier, compiled by Numba: what a thread does with its part.

An input is looked at in one of two ways. *Rows*, (N, C, L): vectors run along the L neighbours of
one channel of one sample. *Panels*, (M, K): they run along neighbours that belong to different
channels, each with sums of its own; so are channels_last and (N, C) inputs. Any strides that are
neither contiguous nor channels_last are copied first. The vectors are those of
:mod:`bnlib.kernels.lanes`.
"""

from __future__ import annotations

import numpy as np

from bnlib.kernels.cpu.compiling import inlined, jit
from bnlib.kernels.cpu.lanes import (
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
    spread,
    store,
    store_int32,
    stream,
    total,
)

# Neighbours in a row, and rows of a panel, whose sums may have the precision of the input.
TILE, _ROWS = 2048, 128
# Columns of a panel of which four rows fit into the first-level cache, twice.
_NARROW = 512
# Between arrays of one loop: a load that agrees with the store before it in the last twelve bits of
# the address waits for it.
_APART = 80
_STREAM_FROM = 1 << 23  # bytes; more than a cache keeps for the next layer


@jit
def _merged(count, mean, m2, other, other_mean, other_m2):
    """:func:`bnlib.merge` of ``count`` values and ``other`` ones: mean and m2 of them all."""
    share = other / (count + other)
    d = other_mean - mean
    return mean + d * share, m2 + (other_m2 + d * d * count * share)


@jit
def merge(count, mean, m2, other, other_mean, other_m2):
    """The same for all channels, in place."""
    for c in range(mean.size):
        mean[c], m2[c] = _merged(count, mean[c], m2[c], other, other_mean[c], other_m2[c])


@jit
def finish(c0, c1, count, out, eps, momentum, mean, m2, inv_std, running_mean, running_var):
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


@jit
def add_up(c0, c1, out, inv_std, sum_dy, sum_dy_x_hat):
    first, second, scale = out[0, c0:c1], out[1, c0:c1], inv_std[c0:c1]
    sum_dy, sum_dy_x_hat = sum_dy[c0:c1], sum_dy_x_hat[c0:c1]
    for c in range(scale.size):
        sum_dy[c], sum_dy_x_hat[c] = first[c], second[c] * scale[c]


@jit
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


@jit
def _bits_before(mask, at):
    """The bits of the byte of bit ``at`` that stand before it."""
    return np.int64(mask[at >> 3]) & ((1 << (at & 7)) - 1)


@jit
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


@jit
def _read_bits(mask, at):
    """The bits from ``at`` on, 16 or more."""
    byte, last = at >> 3, mask.size - 1
    if byte + 3 <= last:
        return load_int32(mask, byte) >> (at & 7)
    low, high = np.int64(mask[min(byte + 1, last)]) << 8, np.int64(mask[min(byte + 2, last)]) << 16
    return (np.int64(mask[byte]) | low | high) >> (at & 7)


@jit
def _streams(y, size):
    """Whether rows of an output go past the caches: it is large, and they are whole cache lines.

    Such a line need not be read before it is written, and pushes nothing else out of the caches.
    """
    row = size * y.itemsize
    return y.size * y.itemsize >= _STREAM_FROM and (y.ctypes.data | row) % 64 == 0


# Rows: x is (N, C, L), vectors run along the L neighbours of one channel.


@jit
def rows_moments(x, like, channels, size, c0, c1, n0, n1, out):
    """Mean and m2 of channels c0 .. c1 of samples n0 .. n1, to ``out[:, c]``."""
    none, width = spread(x, 0.0), lanes_in(x)
    lanes = np.empty((c1 - c0) * 2 * width, like.dtype)
    per_tile = max(1, TILE // size)
    count = 0
    for c in range(c0, c1):
        head = min(width, size)
        first = total(load(x, (n0 * channels + c) * size, head, none))
        out[0, c], out[1, c] = first / head, 0.0
    for n in range(n0, n1, per_tile):
        n_end = min(n + per_tile, n1)
        for i0 in range(0, size, TILE):
            i1 = min(i0 + TILE, size)
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


@jit
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


@jit
def _rows_gradient_sums(dy, x, mask, channels, size, mean, c0, c1, n0, n1, out):
    none, width = spread(x, 0.0), lanes_in(x)
    lanes = np.empty((c1 - c0) * 2 * width, mean.dtype)
    bits = 0 if mask is None else mask.size // channels * 8
    per_tile = max(1, TILE // size)
    out[:, c0:c1] = 0
    for n in range(n0, n1, per_tile):
        for i0 in range(0, size, TILE):
            i1 = min(i0 + TILE, size)
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


@jit
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


@jit
def _per_column(values, columns):
    """One value per channel to one per column."""
    out = np.empty(columns, values.dtype)
    for j in range(0, columns, values.size):  # once for every position in a row
        for c in range(min(values.size, columns - j)):
            out[j + c] = values[c]
    return out


@inlined
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


@jit
def panel_moments(x, like, channels, columns, k0, k1, r0, r1, out):
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
        merge(before, first, second, np.float64(r1 - r0), mean[j:], m2[j:])


@inlined
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


@jit
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


@inlined
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


@jit
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


@inlined
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


@jit
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


@jit
def normalize(
    panel, x, residual, y, mask, channels, size, weight, bias, mean, inv_std, floor,
    c0, c1, k1, r0, r1,
):  # fmt: skip
    rest = (weight, bias, mean, inv_std, floor, c0)
    if panel:
        _panel_normalize(x, residual, y, mask, channels * size, *rest, k1, r0, r1)
    else:
        _rows_normalize(x, residual, y, mask, channels, size, *rest, c1, r0, r1)


@jit
def gradient_sums(panel, dy, x, mask, channels, size, mean, c0, c1, k1, r0, r1, out):
    if panel:
        _panel_gradient_sums(dy, x, mask, mean, channels, channels * size, c0, k1, r0, r1, out)
    else:
        _rows_gradient_sums(dy, x, mask, channels, size, mean, c0, c1, r0, r1, out)


@jit
def gradient(
    panel, dy, x, dx, masked_dy, mask, channels, size, weight, mean, inv_std, sum_dy, sum_dy_x_hat,
    count, c0, c1, k1, r0, r1,
):  # fmt: skip
    rest = (weight, mean, inv_std, sum_dy, sum_dy_x_hat, count, c0)
    if panel:
        _panel_gradient(dy, x, dx, masked_dy, mask, channels * size, *rest, k1, r0, r1)
    else:
        _rows_gradient(dy, x, dx, masked_dy, mask, channels, size, *rest, c1, r0, r1)
