# mypy: disable-error-code="no-untyped-def"
"""The loops of the CPU tier, compiled by Numba: what a thread does with its part.

An input is looked at in one of two ways. *Rows*, (N, C, L): vectors run along the L neighbours of
one channel of one sample. *Panels*, (M, K): they run along neighbours that belong to different
channels, column k to channel k % C, each with sums of its own; so are channels_last and (N, C)
inputs.

Forward and backward are the same two steps. The first *sums* g and g d per channel, where d is the
distance of x from a value near its mean. Forward, g is d, and the sums become mean and m2; they are
taken in tiles, each near the mean of those before it, which :func:`bnlib.merge` joins. Backward, g
is dy behind the ReLU, and d the distance from the mean itself. The sums of a tile have the
precision that the input is computed with, and go on in float64; squares of a tile stay float32
numbers for float32 inputs up to 4e17. The second step *applies* p d + q + a g to every element,
with coefficients that follow from the sums. What is absent is None: Numba leaves it out of the
loops. Tensors are pointers: references to arrays would be counted in the loops.
"""

from __future__ import annotations

import numpy as np

from bnlib.kernels.cpu.compiling import inlined, jit
from bnlib.kernels.cpu.lanes import (
    as_stored,
    at_least,
    keep,
    lanes_in,
    load,
    load_int32,
    positive,
    spread,
    store,
    store_int32,
    stream,
    total,
)

# Neighbours in a row, and rows of a panel, whose sums may have the precision of the input.
TILE, _ROWS = 2048, 128


@jit
def _merged(count, mean, m2, other, other_mean, other_m2):
    """:func:`bnlib.merge` of ``count`` values and ``other`` ones: mean and m2 of them all."""
    share = other / (count + other)
    d = other_mean - mean
    return mean + d * share, m2 + (other_m2 + d * d * count * share)


@jit
def join(backward, count, out, other, part):
    """Add to ``out``, which stands for ``count`` values a channel, what ``other`` more said."""
    for c in range(out.shape[1]):
        if backward:
            out[0, c], out[1, c] = out[0, c] + part[0, c], out[1, c] + part[1, c]
        else:
            out[0, c], out[1, c] = _merged(
                count, out[0, c], out[1, c], other, part[0, c], part[1, c]
            )


@jit
def finish(
    out, c0, c1, count, eps, mean, m2, inv_std, moving, momentum, running_mean, running_var
):  # fmt: skip
    """Mean, m2 and inv_std of channels c0 .. c1, rounded; move the running statistics, if any."""
    for c in range(c0, c1):  # below 0 by rounding, in a channel of equal values
        mean[c], m2[c] = out[0, c], 0.0 if out[1, c] < 0 else out[1, c]
        inv_std[c] = 1 / np.sqrt(m2[c] / np.float64(count) + eps)
        if moving:
            running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean[c]
            new = m2[c] / np.float64(count - 1)
            running_var[c] = (1 - momentum) * running_var[c] + momentum * new


@jit
def finish_backward(out, c0, c1, inv_std, sum_dy, sum_dy_x_hat):
    for c in range(c0, c1):
        sum_dy[c], sum_dy_x_hat[c] = out[0, c], out[1, c] * inv_std[c]


# --- The bits of a mask: four bytes at once, +4 % of the geometric mean with add and ReLU ---------


@inlined
def _write_bits(mask, at, before, bits, end):
    """Bits from ``at`` on, after those before it in its byte; no byte from ``end`` on.

    Up to the fourth byte, what stands after them is lost: masks are written in ascending order.
    """
    byte = at >> 3
    bits = before | bits << (at & 7)
    if byte + 4 <= end:
        store_int32(mask, byte, bits)
    else:
        for k in range(min(end - byte, 3)):
            mask[byte + k] = bits >> 8 * k & 255


@inlined
def _read_bits(mask, at, end):
    """The bits from ``at`` on, 16 or more, of a mask of ``end`` bytes."""
    byte = at >> 3
    if byte + 4 <= end:
        return load_int32(mask, byte) >> (at & 7)
    bits = np.int64(0)
    for k in range(min(end - byte, 3)):
        bits |= np.int64(mask[byte + k]) << 8 * k
    return bits >> (at & 7)


# --- Sums -----------------------------------------------------------------------------------------


@inlined
def _one(dy, x, mask, mask_end, at, bit, left, near):
    """g and d of one vector; 0 beyond the end."""
    d = load(x, at, left, near) - near
    if dy is None:
        return d, d
    g = load(dy, at, left, spread(x, 0.0))
    if mask is not None:
        g = keep(_read_bits(mask, bit, mask_end), g)
    return g, d


@jit
def sum_rows(number, dy, x, mask, mask_end, mean, channels, size, c0, c1, n0, n1, out):
    """Sum channels c0 .. c1 of samples n0 .. n1, to ``out[:, c]``."""
    none, width = spread(x, 0.0), lanes_in(x)
    sums = np.empty((c1 - c0) * 2 * width, number)
    bits, per_tile, count = mask_end // channels * 8, max(1, TILE // size), 0
    for c in range(c0, c1):
        out[0, c] = out[1, c] = 0
        if dy is None:
            head = min(width, size)
            out[0, c] = total(load(x, (n0 * channels + c) * size, head, none)) / head
    for n in range(n0, n1, per_tile):
        n_end = min(n + per_tile, n1)
        for i0 in range(0, size, TILE):
            i1 = min(i0 + TILE, size)
            sums[:] = 0
            for m in range(n, n_end):  # in the order of memory
                for c in range(c0, c1):
                    near = spread(x, out[0, c] if dy is None else mean[c])
                    j = 2 * width * (c - c0)
                    s, q = load(sums, j, width, none), load(sums, j + width, width, none)
                    at, bit = (m * channels + c) * size, c * bits + m * size
                    for i in range(i0, i1, width):
                        g, d = _one(dy, x, mask, mask_end, at + i, bit + i, i1 - i, near)
                        s, q = s + g, q + g * d
                    store(sums, j, width, s)
                    store(sums, j + width, width, q)
            part = (n_end - n) * (i1 - i0)
            for c in range(c0, c1):
                j = 2 * width * (c - c0)
                first = total(load(sums, j, width, none))
                second = total(load(sums, j + width, width, none))
                if dy is None:  # from the mean as the vectors had it
                    middle = number(out[0, c]) + first / part
                    second -= first * first / part
                    out[0, c], out[1, c] = _merged(
                        count, out[0, c], out[1, c], part, middle, second
                    )
                else:
                    out[0, c], out[1, c] = out[0, c] + first, out[1, c] + second
            count += part


@jit
def sum_panel(number, dy, x, mask, mask_end, mean, channels, columns, k0, k1, r0, r1, out):
    """Sum the channels of columns k0 .. k1 of rows r0 .. r1, to ``out[:, c]``."""
    none, width, size = spread(x, 0.0), lanes_in(x), k1 - k0
    near, s, q = np.zeros((3, size), number)
    sums = np.zeros((2, size))
    if dy is None:
        few = min(r0 + 8, r1)
        for i in range(r0, few):
            for k in range(0, size, width):
                v = load(x, i * columns + k0 + k, size - k, none) * spread(x, 1 / (few - r0))
                store(near, k, size - k, load(near, k, size - k, none) + v)
    else:
        for k in range(size):
            near[k] = mean[(k0 + k) % channels]
    r, end = r0, min(r0 + 32, r1)
    while r < r1:
        s[:], q[:] = 0, 0
        for i in range(r, end):
            for k in range(0, size, width):
                at, left = i * columns + k0 + k, size - k
                g, d = _one(dy, x, mask, mask_end, at, at, left, load(near, k, left, none))
                store(s, k, left, load(s, k, left, none) + g)
                store(q, k, left, load(q, k, left, none) + g * d)
        before, part = np.float64(r - r0), np.float64(end - r)
        for k in range(size):
            if dy is None:
                rest = s[k] / part
                sums[0, k], sums[1, k] = _merged(
                    before, sums[0, k], sums[1, k], part, near[k] + rest, q[k] - s[k] * rest
                )
                near[k] = sums[0, k]
            else:
                sums[0, k], sums[1, k] = sums[0, k] + s[k], sums[1, k] + q[k]
        r, end = end, min(end + min(3 * (end - r0), _ROWS), r1)
    for c in range(k0, min(k1, channels)):
        out[0, c], out[1, c] = sums[0, c - k0], sums[1, c - k0]
    for j in range(channels, size, channels):  # further positions in a row
        before = np.float64(j // channels * (r1 - r0))
        join(dy is not None, before, out, np.float64(r1 - r0), sums[:, j:])


# --- Coefficients, and what is done with them -----------------------------------------------------


@jit
def coefficients(
    backward, number, weight, bias, mean, inv_std, sum_dy, sum_dy_x_hat, count, c0, c1, columns
):  # fmt: skip
    """p, q, a and the mean of channels c0 .. c1, again for every position in a row of columns."""
    out, channels, share = np.empty((4, columns), number), c1 - c0, 1 / np.float64(count)
    for k in range(channels):
        c, factor = c0 + k, np.float64(inv_std[c0 + k])
        a = weight[c] * factor
        out[2, k], out[3, k] = a, mean[c]
        if backward:
            out[0, k], out[1, k] = -a * factor * sum_dy_x_hat[c] * share, -a * sum_dy[c] * share
        else:
            out[0, k], out[1, k] = a, bias[c]
    for i in range(4):
        for k in range(channels, columns):
            out[i, k] = out[i, k - channels]
    return out


@inlined
def _put(to, at, left, v, past):
    """to[at : at + left] = v, past the caches where that is allowed."""
    if past:
        stream(to, at, v)
    else:
        store(to, at, left, v)


@inlined
def apply(
    panel, dy, x, residual, y, masked_dy, mask, mask_end, floor, past, f, channels, size,
    c0, c1, k1, r0, r1,
):  # fmt: skip
    """Write the outputs of channels c0 .. c1, in a panel columns c0 .. k1, of rows r0 .. r1."""
    none, width, columns, before = spread(x, 0.0), lanes_in(x), f.shape[1], np.int64(0)
    floor, bits, length = spread(x, floor), mask_end // channels * 8, k1 - c0 if panel else size
    for r in range(r0, r1):
        for c in range(c0, c0 + 1 if panel else c1):
            if panel:
                at = bit = r * channels * size + c0
                end = (at + length + 7) >> 3
            else:
                at, bit = (r * channels + c) * size, c * bits + r * size
                end = (c * bits + r1 * size + 7) >> 3
            if dy is None and mask is not None:
                before = np.int64(mask[bit >> 3]) & ((1 << (bit & 7)) - 1)
            p, q = spread(x, f[0, c - c0]), spread(x, f[1, c - c0])
            a, middle = spread(x, f[2, c - c0]), spread(x, f[3, c - c0])
            for k in range(0, length, width):
                left = length - k
                if panel:
                    p, q = load(f, k, left, none), load(f, columns + k, left, none)
                    middle = load(f, 3 * columns + k, left, none)
                    if dy is not None:
                        a = load(f, 2 * columns + k, left, none)
                v = p * (load(x, at + k, left, none) - middle) + q
                if dy is not None:
                    g = load(dy, at + k, left, none)
                    if mask is not None:
                        g = keep(_read_bits(mask, bit + k, mask_end), g)
                    if masked_dy is not None:
                        _put(masked_dy, at + k, left, g, past)
                    _put(y, at + k, left, a * g + v, past)
                else:
                    if residual is not None:
                        v = v + load(residual, at + k, left, none)
                    v = as_stored(y, at_least(v, floor))
                    _put(y, at + k, left, v, past)
                    if mask is not None:
                        last = positive(v)
                        _write_bits(mask, bit + k, before, last, end)
                        before = last >> (width - (bit & 7))
