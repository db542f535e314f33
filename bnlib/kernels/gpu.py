"""The four primitives for GPU tensors, compiled by Triton.

One way of looking at a tensor serves every layout: (N, C, P), that is P *pixels* of C channels of
N samples, contiguous in this order. torch's usual layout (N, C, H, W) is this with P = H·W.
``channels_last`` memory, in which the channels are innermost, is this with N·H·W samples of one
pixel. Any other strides are copied to one of the two.

A *tile* is a box of BN samples, BC channels and BP pixels: what one program (one group of threads)
holds in registers at a time. Batch norm is bound by memory, so the kernels below are counted in
*passes*, the number of times that all elements of a tensor travel between memory and chip:

- in general a reduction must see everything before the first output can be written: x is read
  twice. Splits of every channel are reduced at the same time (``_moments_kernel``) and their
  partial results merged (``_merge_moments_kernel``), then x is read again (``_normalize_kernel``);
- where all samples and pixels of a channel fit into one tile, the program keeps them in registers
  in between (``_forward_kernel``, ``_backward_kernel``): x is read once.

How a tensor is cut is a function of its shape alone, and every sum has a fixed order: the same
input gives the same bits, on every run and whatever the number of multiprocessors. There is no
autotuning and no atomic addition, which would break this.

With ``TRITON_INTERPRET=1`` in the environment before triton is imported, the same kernels run on
CPU tensors, slowly, one program after the other.
"""

# Triton's functions have no types to write down: mypy checks what calls them.
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disable-error-code="annotation-unchecked"

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
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
)
from bnlib.statistics import Moments

try:
    import triton
    import triton.language as tl
except Exception as error:  # a triton that does not fit the machine raises what it likes
    raise ImportError(
        "the GPU kernels need triton, which has packages for Linux only (it comes with torch's "
        "CUDA builds); backend='cpu' or 'reference' does without. Importing it: "
        f"{type(error).__name__}: {error}",
        name="triton",
    ) from error

# Constants not measured on a card are chosen by counting: bytes in flight and registers.
_TILE = 8192  # bytes: four independent 16-byte loads in each of 128 threads
_PROGRAMS = 1024  # of a reduction: 8 for each of an H200's 132 multiprocessors, 7 for an H100's
_SPLITS = 512  # of a channel at most, so that one program can merge them
_FITS = 32768  # elements of a channel, 32 in each of 1024 threads, which have 64 registers each
_FITS_FUSED = 8192  # the same for two tensors, or narrow loads: 16 in 512 threads of 128 registers
_FILLS = 64  # programs; fewer leave most of the chip idle, and splitting the channel is faster
_SMALL = 1 << 18  # elements; below, the launches cost more than an idle chip
_GRID = 65535  # CUDA's limit on the second dimension of a grid
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton would compile a kernel anew for sizes that are 1 or divisible by 16, so for other batches.
_jit = functools.partial(triton.jit, do_not_specialize=["N", "C", "P", "S", "tiles", "per_program"])


# --- Pieces of kernels ----------------------------------------------------------------------------


@triton.jit
def _sizes(C, P, CU: tl.constexpr, PU: tl.constexpr, BP: tl.constexpr):
    """Return C and P, which this does not change: CU divides C, and PU divides P.

    The compiler needs to be told, or it would not dare to load several elements at a time.
    """
    C = C // CU * CU
    P = 1 if BP == 1 else P // PU * PU
    return C, P


@triton.jit
def _tile(t, c0, N, C, P, BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Return tile ``t`` of the channels from ``c0`` on: base, offsets from it, which ones exist.

    The base is a 64-bit number: tensors have more than 2³¹ elements. Inside a tile 32 bits are
    enough (see ``_plan``) and cost half the registers. The division is one of scalars: flattening
    samples and pixels would divide every offset, and the compiler could not see any more that
    neighbours are contiguous and fetch them by 16 bytes.
    """
    blocks = tl.cdiv(P, BP)
    n0 = (t // blocks).to(tl.int64) * BN
    p0 = (t % blocks) * BP
    n = tl.arange(0, BN)[:, None, None]
    c = tl.expand_dims(tl.arange(0, BC), (0, 2))
    p = tl.arange(0, BP)[None, None, :]
    samples = tl.minimum(N - n0, BN).to(tl.int32)
    exists = (n < samples) & (c < C - c0) & (p < P - p0)
    return (n0 * C + c0) * P + p0, (n * C + c) * P + p, exists


@triton.jit
def _count(t, N, P, BN: tl.constexpr, BP: tl.constexpr):
    """Return how many values per channel exist in tile ``t``."""
    blocks = tl.cdiv(P, BP)
    samples = tl.minimum(N - (t // blocks).to(tl.int64) * BN, BN)
    return (samples * tl.minimum(P - (t % blocks) * BP, BP)).to(tl.float32)


@triton.jit
def _sum(v):
    """Sum a tile over samples and pixels, in the order of a fixed tree."""
    BN: tl.constexpr = v.shape[0]
    BC: tl.constexpr = v.shape[1]
    BP: tl.constexpr = v.shape[2]
    sums = tl.sum(tl.reshape(tl.permute(v, 1, 0, 2), [BC, BN * BP]), axis=1)
    return tl.expand_dims(sums, (0, 2))


@triton.jit
def _channels(c0, C, BC: tl.constexpr):
    """Return the channels of a tile, ready to broadcast, and which of them exist."""
    c = c0 + tl.expand_dims(tl.arange(0, BC), (0, 2))
    return c, c < C


@triton.jit
def _per_channel(v, c, exists, missing: tl.constexpr):
    """Load one value per channel; ``missing`` stands for a vector that was not given."""
    if v is None:
        return tl.full(c.shape, missing, tl.float32)
    return tl.load(v + c, exists, other=0.0).to(tl.float32)


@triton.jit
def _mask_tile(t, c0, N, C, P, BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Return what ``_tile`` does, for the mask's bytes: eight pixels each, or eight channels."""
    if BP >= 8:
        return _tile(t, c0, N, C, tl.cdiv(P, 8), BN, BC, BP // 8)
    else:
        return _tile(t, c0 // 8, N, tl.cdiv(C, 8), 1, BN, BC // 8, 1)


@triton.jit
def _store_mask(
    mask, positive, t, c0, N, C, P, BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr
):
    """Store a tile of truth values, eight to the byte."""
    base, inside, exists = _mask_tile(t, c0, N, C, P, BN, BC, BP)
    bits = tl.reshape(positive.to(tl.int32), [BN, inside.shape[1], inside.shape[2], 8])
    bits = bits << tl.arange(0, 8)[None, None, None, :]
    tl.store(mask + base + inside, tl.sum(bits, axis=3).to(tl.uint8), exists)


@triton.jit
def _load_mask(mask, t, c0, N, C, P, BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Load what ``_store_mask`` stored."""
    base, inside, exists = _mask_tile(t, c0, N, C, P, BN, BC, BP)
    byte = tl.load(mask + base + inside, exists, other=0).to(tl.int32)
    bits = (byte[:, :, :, None] >> tl.arange(0, 8)[None, None, None, :]) & 1
    return tl.reshape(bits, [BN, BC, BP]) != 0


@triton.jit
def _load_dy(
    dy, mask, base, inside, exists, t, c0, N, C, P,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Load the gradient that arrives at the batch norm: behind a ReLU, 0 where that cut off."""
    g = tl.load(dy + base + inside, exists, other=0.0).to(tl.float32)
    if mask is not None:
        g = tl.where(_load_mask(mask, t, c0, N, C, P, BN, BC, BP), g, 0.0)
    return g


@triton.jit
def _store_y(
    d, y, residual, mask, scale, b, base, inside, exists, t, c0, N, C, P, RELU: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Store the output for the deviations ``d`` from the mean."""
    v = d * scale + b
    if residual is not None:
        v += tl.load(residual + base + inside, exists, other=0.0).to(tl.float32)
    if RELU:
        positive = (v <= 0.0) == 0  # not `v > 0`: NaN passes a ReLU
        v = tl.where(positive, v, 0.0)
        if mask is not None:
            _store_mask(mask, positive & exists, t, c0, N, C, P, BN, BC, BP)
    tl.store(y + base + inside, v.to(y.dtype.element_ty), exists)


@triton.jit
def _store_statistics(
    mu, var, mean, m2, inv_std, running_mean, running_var, c, exists, count, eps, momentum
):
    """Store the moments of the batch and 1/√(σ² + ε); move the running statistics, if given."""
    tl.store(mean + c, mu, exists)
    tl.store(m2 + c, var.to(tl.float64) * count, exists)  # beyond float32 where σ² is not
    tl.store(inv_std + c, 1.0 / tl.sqrt_rn(var + eps), exists)
    if running_mean is not None:
        old = tl.load(running_mean + c, exists, other=0.0).to(tl.float32)
        new = (1.0 - momentum) * old + momentum * mu
        tl.store(running_mean + c, new.to(running_mean.dtype.element_ty), exists)
        old = tl.load(running_var + c, exists, other=0.0).to(tl.float32)
        new = (1.0 - momentum) * old + momentum * (var * (count / (count - 1.0)))
        tl.store(running_var + c, new.to(running_var.dtype.element_ty), exists)


# --- Kernels that take a split of some channels ---------------------------------------------------
# Program (i, s) takes the tiles s·per_program, ... of the i-th block of channels. Neighbouring
# programs, which run at the same time, take neighbouring channels of the same samples.


@_jit
def _moments_kernel(
    x, partials, N, C, P, tiles, per_program, PU: tl.constexpr, CU: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Store count, mean and σ² of every channel of one split in ``partials``, shape (4, S, C).

    The sums are taken of x minus the mean of the program's first tile. That mean is close to the
    true one, so nothing cancels in Σd²/n - (Σd/n)²; it is also known after one tile instead of one
    pass. Each of the tile's elements has its own accumulator: short sums lose little. The mean is
    stored as two numbers, shift and what is left, since their sum would be rounded.
    """
    C, P = _sizes(C, P, CU, PU, BP)
    c0 = tl.program_id(0) * BC
    s = tl.program_id(1)
    first = s * per_program
    base, inside, exists = _tile(first, c0, N, C, P, BN, BC, BP)
    v = tl.load(x + base + inside, exists, other=0.0).to(tl.float32)
    count = _count(first, N, P, BN, BP)
    shift = _sum(v) / count
    d = tl.where(exists, v - shift, 0.0)
    sum_d, sum_d2 = d, d * d
    for t in range(first + 1, tl.minimum(first + per_program, tiles)):
        base, inside, exists = _tile(t, c0, N, C, P, BN, BC, BP)
        v = tl.load(x + base + inside, exists, other=0.0).to(tl.float32)
        d = tl.where(exists, v - shift, 0.0)
        sum_d += d
        sum_d2 += d * d
        count += _count(t, N, P, BN, BP)
    rest = _sum(sum_d) / count
    var = _sum(sum_d2 * (1.0 / count)) - rest * rest
    c, c_exists = _channels(c0, C, BC)
    row = tl.num_programs(1) * C
    at = partials + s * C + c
    tl.store(at, tl.zeros_like(var) + count, c_exists)
    tl.store(at + row, shift, c_exists)
    tl.store(at + 2 * row, rest, c_exists)
    tl.store(at + 3 * row, tl.where(var < 0.0, 0.0, var), c_exists)  # NaN stays NaN


@_jit
def _merge_moments_kernel(
    partials, mean, m2, inv_std, running_mean, running_var, C, S, count, eps, momentum,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Merge the splits of some channels: the formula of :func:`bnlib.merge`, in its order."""
    s = tl.arange(0, BS)[:, None]
    c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    exists = (s < S) & (c < C)
    n = tl.load(partials + s * C + c, exists, other=0.0)
    shift = tl.load(partials + (S + s) * C + c, exists, other=0.0)
    rest = tl.load(partials + (2 * S + s) * C + c, exists, other=0.0)
    var = tl.load(partials + (3 * S + s) * C + c, exists, other=0.0)
    start = tl.load(partials + S * C + c, c < C, other=0.0)
    d = (shift - start) + rest  # of the split's mean from the first shift: exact to the last bits
    mu = tl.sum(n * d, axis=0)[None, :] / count
    d -= mu
    var = tl.sum((n / count) * (var + d * d), axis=0)[None, :]
    mu += start
    _store_statistics(
        mu, var, mean, m2, inv_std, running_mean, running_var, c, c < C, count, eps, momentum
    )


@_jit
def _normalize_kernel(
    x, mean, inv_std, weight, bias, residual, y, mask, N, C, P, tiles, per_program,
    RELU: tl.constexpr, PU: tl.constexpr, CU: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) γ inv_std + β, and what is fused."""
    C, P = _sizes(C, P, CU, PU, BP)
    # Backwards: what the reduction read last is still in the cache.
    c0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BC
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * per_program
    c, c_exists = _channels(c0, C, BC)
    mu = _per_channel(mean, c, c_exists, 0.0)
    scale = _per_channel(inv_std, c, c_exists, 1.0) * _per_channel(weight, c, c_exists, 1.0)
    b = _per_channel(bias, c, c_exists, 0.0)
    for t in range(first, tl.minimum(first + per_program, tiles)):
        base, inside, exists = _tile(t, c0, N, C, P, BN, BC, BP)
        v = tl.load(x + base + inside, exists, other=0.0).to(tl.float32)
        _store_y(
            v - mu, y, residual, mask, scale, b, base, inside, exists, t, c0, N, C, P, RELU,
            BN, BC, BP,
        )  # fmt: skip


@_jit
def _grad_sums_kernel(
    dy, x, mean, mask, partials, N, C, P, tiles, per_program, PU: tl.constexpr, CU: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Store Σdy and Σdy·(x - mean) of one split in ``partials``, shape (2, S, C)."""
    C, P = _sizes(C, P, CU, PU, BP)
    c0 = tl.program_id(0) * BC
    s = tl.program_id(1)
    c, c_exists = _channels(c0, C, BC)
    mu = _per_channel(mean, c, c_exists, 0.0)
    sum_g = tl.zeros([BN, BC, BP], tl.float32)
    sum_gd = tl.zeros([BN, BC, BP], tl.float32)
    for t in range(s * per_program, tl.minimum((s + 1) * per_program, tiles)):
        base, inside, exists = _tile(t, c0, N, C, P, BN, BC, BP)
        v = tl.load(x + base + inside, exists, other=0.0).to(tl.float32)
        g = _load_dy(dy, mask, base, inside, exists, t, c0, N, C, P, BN, BC, BP)
        sum_g += g
        sum_gd += g * (v - mu)  # g is 0 where nothing exists
    at = partials + s * C + c
    tl.store(at, _sum(sum_g), c_exists)
    tl.store(at + tl.num_programs(1) * C, _sum(sum_gd), c_exists)


@_jit
def _add_sums_kernel(
    partials, inv_std, sum_dy, sum_dy_x_hat, C, S, BS: tl.constexpr, BC: tl.constexpr
):
    """Add the splits of some channels, and turn x - mean into x̂."""
    s = tl.arange(0, BS)[:, None]
    c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    exists = (s < S) & (c < C)
    g = tl.load(partials + s * C + c, exists, other=0.0)
    gd = tl.load(partials + (S + s) * C + c, exists, other=0.0)
    r = tl.load(inv_std + c, c < C, other=0.0)
    tl.store(sum_dy + c, tl.sum(g, axis=0)[None, :], c < C)
    tl.store(sum_dy_x_hat + c, tl.sum(gd, axis=0)[None, :] * r, c < C)


@_jit
def _grad_input_kernel(
    dy, x, mean, inv_std, weight, sum_dy, sum_dy_x_hat, mask, dx, dresidual, count,
    N, C, P, tiles, per_program, PU: tl.constexpr, CU: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """dx = a dy + b (x - mean) + k, with three numbers per channel."""
    C, P = _sizes(C, P, CU, PU, BP)
    c0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BC  # backwards, as in _normalize_kernel
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * per_program
    c, c_exists = _channels(c0, C, BC)
    mu = _per_channel(mean, c, c_exists, 0.0)
    r = _per_channel(inv_std, c, c_exists, 1.0)
    a = r * _per_channel(weight, c, c_exists, 1.0)
    b = -a * r * _per_channel(sum_dy_x_hat, c, c_exists, 0.0) / count
    k = -a * _per_channel(sum_dy, c, c_exists, 0.0) / count
    for t in range(first, tl.minimum(first + per_program, tiles)):
        base, inside, exists = _tile(t, c0, N, C, P, BN, BC, BP)
        v = tl.load(x + base + inside, exists, other=0.0).to(tl.float32)
        g = _load_dy(dy, mask, base, inside, exists, t, c0, N, C, P, BN, BC, BP)
        if dresidual is not None:
            tl.store(dresidual + base + inside, g.to(dresidual.dtype.element_ty), exists)
        tl.store(dx + base + inside, (a * g + (b * (v - mu) + k)).to(dx.dtype.element_ty), exists)


# --- Kernels that take whole channels -------------------------------------------------------------


@_jit
def _forward_kernel(
    x, weight, bias, residual, y, mask, mean, m2, inv_std, running_mean, running_var,
    count, eps, momentum, N, C, P, RELU: tl.constexpr, PU: tl.constexpr, CU: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The whole forward in one read: two-pass moments of registers, as :func:`bnlib.moments`."""
    C, P = _sizes(C, P, CU, PU, BP)
    c0 = tl.program_id(0) * BC
    t = tl.program_id(1)  # 0: there is one tile
    base, inside, exists = _tile(t, c0, N, C, P, BN, BC, BP)
    v = tl.load(x + base + inside, exists, other=0.0).to(tl.float32)
    mu = _sum(v) / count
    d = tl.where(exists, v - mu, 0.0)
    rest = _sum(d) / count
    var = _sum(d * d * (1.0 / count)) - rest * rest
    var = tl.where(var < 0.0, 0.0, var)
    c, c_exists = _channels(c0, C, BC)
    _store_statistics(
        mu + rest, var, mean, m2, inv_std, running_mean, running_var, c, c_exists,
        count, eps, momentum,
    )  # fmt: skip
    scale = _per_channel(weight, c, c_exists, 1.0) / tl.sqrt_rn(var + eps)
    b = _per_channel(bias, c, c_exists, 0.0)
    _store_y(
        d - rest, y, residual, mask, scale, b, base, inside, exists, t, c0, N, C, P, RELU,
        BN, BC, BP,
    )  # fmt: skip


@_jit
def _backward_kernel(
    dy, x, mean, inv_std, weight, mask, dx, dresidual, sum_dy, sum_dy_x_hat, count, N, C, P,
    PU: tl.constexpr, CU: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The whole backward in one read of dy and x."""
    C, P = _sizes(C, P, CU, PU, BP)
    c0 = tl.program_id(0) * BC
    c, c_exists = _channels(c0, C, BC)
    r = _per_channel(inv_std, c, c_exists, 1.0)
    t = tl.program_id(1)  # 0: there is one tile
    base, inside, exists = _tile(t, c0, N, C, P, BN, BC, BP)
    v = tl.load(x + base + inside, exists, other=0.0).to(tl.float32)
    g = _load_dy(dy, mask, base, inside, exists, t, c0, N, C, P, BN, BC, BP)
    x_hat = (v - _per_channel(mean, c, c_exists, 0.0)) * r
    sum_g = _sum(g)
    sum_gx = _sum(g * x_hat)
    tl.store(sum_dy + c, sum_g, c_exists)
    tl.store(sum_dy_x_hat + c, sum_gx, c_exists)
    if dresidual is not None:
        tl.store(dresidual + base + inside, g.to(dresidual.dtype.element_ty), exists)
    a = r * _per_channel(weight, c, c_exists, 1.0)
    v = a * (g - (sum_g / count + x_hat * (sum_gx / count)))
    tl.store(dx + base + inside, v.to(dx.dtype.element_ty), exists)


# --- How a tensor is cut --------------------------------------------------------------------------


class _Plan(NamedTuple):
    """The cutting of a tensor (N, C, P): sizes for a kernel, and how many programs there are."""

    shape: tuple[int, int, int]
    blocks: dict[str, int]  # the compile-time arguments PU, CU, BN, BC, BP
    tiles: int  # of one block of channels
    per_program: int
    grid: tuple[int, int]
    warps: int = 4

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*self.shape, self.tiles, self.per_program)


@functools.lru_cache(maxsize=4096)
def _plan(n: int, c: int, p: int, itemsize: int, reduce: bool) -> _Plan:
    """Cut into small tiles, for a reduction or for an elementwise kernel."""
    tile = _TILE // itemsize
    bn, bc, bp = 1, 1, 1
    if p == 1:  # channels are contiguous: 64 of them are 128 bytes or more
        if c % 4:  # narrow loads, each with an address of its own: 16 fit into a thread's registers
            tile = min(tile, 2048)
        bc = min(max(_power(c), 8), 64)
        bn = min(_power(n), tile // bc)
    else:
        bp = _pixels(p)
        bn = min(_power(n), tile // bp)
        bc = min(_power(c), tile // (bp * bn))
    while bn > 1 and bn * c * p >= 2**31:  # offsets inside a tile have 32 bits
        bn //= 2
    while bc > 1 and bc * p >= 2**31:
        bc //= 2
    channel_blocks = triton.cdiv(c, bc)
    tiles = triton.cdiv(n, bn) * triton.cdiv(p, bp)
    splits = min(tiles, _GRID)
    if reduce:
        splits = min(tiles, triton.cdiv(_PROGRAMS, channel_blocks), _SPLITS)
    per_program = triton.cdiv(tiles, splits)
    grid = (channel_blocks, triton.cdiv(tiles, per_program))
    return _Plan((n, c, p), _blocks(c, p, bn, bc, bp), tiles, per_program, grid)


@functools.lru_cache(maxsize=4096)
def _whole(n: int, c: int, p: int, itemsize: int, fused: bool) -> _Plan | None:
    """Cut so that a program holds whole channels, or return None where that does not pay."""
    wide = p % 4 == 0 and not fused
    fits, each = (_FITS, 32) if wide else (_FITS_FUSED, 16)
    # One channel; where channels are contiguous, 32 bytes of them, the least that memory delivers.
    bc = 1 if p > 1 else 32 // itemsize
    bn, bp = _power(n), 1 if p == 1 else max(_power(p), 8)
    programs = triton.cdiv(c, bc)
    if bn * bc * bp > fits or (programs < _FILLS and n * c * p > _SMALL) or bn * c * p >= 2**31:
        return None
    warps = max(bn * bc * bp // (32 * each), 4)
    return _Plan((n, c, p), _blocks(c, p, bn, bc, bp), 1, 1, (programs, 1), warps)


def _blocks(c: int, p: int, bn: int, bc: int, bp: int) -> dict[str, int]:
    def unit(v: int) -> int:
        """The largest power of two up to 16 that divides v."""
        return min(v & -v, 16)

    return {"PU": unit(p), "CU": unit(c), "BN": bn, "BC": bc, "BP": bp}


def _pixels(p: int) -> int:
    """The longest run of pixels that leaves at most 15 % of the tiles' elements empty."""
    for bp in (1024, 512, 256, 128, 64):
        if triton.cdiv(p, bp) * bp <= 1.15 * p:
            return bp
    return max(_power(p), 8)


def _power(v: int) -> int:
    return 1 << max(v - 1, 0).bit_length()


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, **blocks: Any) -> None:
    with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
        kernel[grid](*args, **blocks, num_warps=warps)


# --- Tensors --------------------------------------------------------------------------------------


def supports(x: Tensor) -> bool:
    """Return whether these kernels take ``x``: float32, float16 or bfloat16, on a GPU."""
    return (
        is_plain(x)
        and x.dtype in _DTYPES
        and (x.is_cuda or (x.device.type == "cpu" and _interpreted()))
    )


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised tensor like ``x``, in a layout that the kernels take."""
    return torch.empty_like(dense(x))


def empty_mask(x: Tensor) -> Tensor:
    """Return an uninitialised ReLU mask for ``x``: one bit per element.

    Bit k of byte j is element 8j + k along the innermost axis, so that a thread that holds eight
    neighbours makes the byte without talking to others.

    Args:
        x: shape (N, C, ...).

    Returns:
        uint8 tensor of shape (N, C, ⌈P/8⌉), or (N, ⌈C/8⌉, 1) where channels are innermost.
    """
    return torch.empty(_mask_shape(x), dtype=torch.uint8, device=x.device)


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return the bool tensor of the shape of ``x`` that a mask stands for."""
    n, c, p = _shape(x)
    if x.numel() == 0:
        return torch.empty_like(x, dtype=torch.bool)
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    if p == 1:
        flat = bits.reshape(n, -1)[:, :c]
        return flat.reshape(x.shape[0], *x.shape[2:], c).movedim(-1, 1).bool()
    return bits.reshape(n, c, -1)[:, :, :p].reshape(x.shape).bool()


def _interpreted() -> bool:
    return not isinstance(_normalize_kernel, triton.runtime.JITFunction)


def _checked(x: Tensor, channel_axis: int = 1) -> Tensor:
    """Return ``x`` with its channels on axis 1 and in a layout of the kernels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x to be a torch.Tensor, got {type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"expected x of rank >= 2 (N, C, ...), got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"expected x of float32, float16 or bfloat16, got {x.dtype}")
    if not supports(x):
        check_plain(x=x)
        missing = "" if torch.cuda.is_available() else "; torch finds no CUDA device here"
        raise RuntimeError(f"expected x on a GPU, got {type(x).__name__} on {x.device}{missing}")
    return dense(x.movedim(channel_axis, 1))


def _checked_backward(
    x: Tensor,
    dy: Tensor,
    channel_axis: int,
    mask: Tensor | None,
    dresidual: Tensor | None,
    **vectors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x, dy and dresidual with their channels on axis 1 and in the same layout."""
    given, x = x, _checked(x, channel_axis)
    check_like(given, dy=dy, dresidual=dresidual)
    check_vectors(x, **vectors)
    check_mask(x, mask, _mask_shape(x))
    if dresidual is not None:
        dresidual = dresidual.movedim(channel_axis, 1)
        check_layout(x, dresidual)
    return x, dense(dy.movedim(channel_axis, 1), x), dresidual


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Return (N, C, P) as the kernels see a dense tensor."""
    c = x.shape[1]
    values = x.numel() // c if c else 0
    if channels_are_neighbours(x):
        return values, c, 1
    return x.shape[0], c, values // max(x.shape[0], 1)


def _mask_shape(x: Tensor) -> tuple[int, int, int]:
    n, c, p = _shape(x)
    return (n, -(-c // 8), 1) if p == 1 else (n, c, -(-p // 8))


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)


def _new(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Return several vectors of float32, one value per channel."""
    return torch.empty(rows, x.shape[1], dtype=torch.float32, device=x.device).unbind()


def _new_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, m2 and inv_std to be filled."""
    mean, inv_std = _new(x, 2)
    return mean, torch.empty(x.shape[1], dtype=torch.float64, device=x.device), inv_std


# --- The primitives -------------------------------------------------------------------------------


def moments(x: Tensor, channel_axis: int = 1) -> Moments:
    """Return count, mean and sum of squared deviations per channel: :func:`bnlib.moments`.

    Args:
        x: rank >= 2, float32, float16 or bfloat16; any strides.
        channel_axis: the axis that is kept.

    Returns:
        :class:`~bnlib.Moments`, float32, and m2 float64. NaN and infinity pass through.

    Raises:
        ValueError, TypeError, RuntimeError: a shape, a dtype, a device that does not fit; so for
            every tensor that is given to the functions below.
    """
    x = _checked(x, channel_axis)
    return _moments(x, 1.0, None, None, 0.0)[0]


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
        mask: from :func:`empty_mask`, filled if ``relu`` with the bits of y > 0 (or NaN).

    Returns:
        Tensor of the shape, dtype and memory format of ``x``; computed in float32.
    """
    given, x = x, _checked(x, channel_axis)
    check_like(given, residual=residual)
    check_vectors(x, mean=mean, inv_std=inv_std, weight=weight, bias=bias)
    check_mask(x, mask, _mask_shape(x))
    residual = None if residual is None else residual.movedim(channel_axis, 1)
    return _normalize(x, mean, inv_std, weight, bias, residual, relu, mask).movedim(1, channel_axis)


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
    """Return what the forward of training needs: :func:`moments`, then :func:`normalize`.

    Args:
        x, weight, bias, residual, relu, mask: as there.
        eps: ε > 0.
        running_mean, running_var: shape (C,), moved in place by ``momentum`` towards the mean and
            the unbiased variance of the batch, or None.
        momentum: weight of this batch in the running statistics.
        trusted: whether the caller has checked all of them.

    Returns:
        ``(y, moments, inv_std)`` with inv_std = 1/√(m2/count + ε), shape (C,), float32.
    """
    if trusted:
        x = dense(x)
    else:
        x = _checked(x)
        check_vectors(x, weight=weight, bias=bias)
        check_vectors(x, running_mean=running_mean, running_var=running_var)
        check_like(x, residual=residual)
        check_mask(x, mask, _mask_shape(x))
    running = _contiguous(running_mean, running_var)
    fused = residual is not None or mask is not None
    plan = _whole(*_shape(x), x.itemsize, fused) if x.numel() else None
    if plan is None:
        batch, inv_std = _moments(x, eps, running[0], running[1], momentum)
        _moved((running_mean, running_var), running)
        vectors = (batch.mean, inv_std, weight, bias)
        return _normalize(x, *vectors, residual, relu, mask), batch, inv_std
    y = torch.empty_like(x)
    residual = None if residual is None else dense(residual, x)
    count = x.numel() // x.shape[1]
    mean, m2, inv_std = _new_statistics(x)
    tensors = (x, *_contiguous(weight, bias), residual, y, mask if relu else None)
    numbers = (float(count), float(eps), float(momentum), *plan.shape)
    _launch(
        _forward_kernel, plan.grid, *tensors, mean, m2, inv_std, *running, *numbers,
        RELU=relu, warps=plan.warps, **plan.blocks,
    )  # fmt: skip
    _moved((running_mean, running_var), running)
    return y, Moments(count, mean, m2), inv_std


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
        ``(sum_dy, sum_dy_x_hat)``, each of shape (C,), float32.
    """
    x, dy, _ = _checked_backward(x, dy, channel_axis, mask, None, mean=mean, inv_std=inv_std)
    return _grad_sums(dy, x, mean, inv_std, mask)


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
        dresidual: from :func:`empty_like`, filled with the masked ``dy``.

    Returns:
        Tensor of the shape, dtype and memory format of ``x``.
    """
    x, dy, dresidual = _checked_backward(
        x, dy, channel_axis, mask, dresidual, mean=mean, inv_std=inv_std, weight=weight,
        sum_dy=sum_dy, sum_dy_x_hat=sum_dy_x_hat,
    )  # fmt: skip
    vectors = (mean, inv_std, weight, sum_dy, sum_dy_x_hat)
    return _grad_input(dy, x, *vectors, count, mask, dresidual).movedim(1, channel_axis)


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
    """Return dx, sum_dy, sum_dy_x_hat: :func:`grad_sums`, then :func:`grad_input`.

    ``trusted`` says that the caller has checked all tensors.
    """
    if trusted:
        x = dense(x)
        dy = dense(dy, x)
    else:
        x, dy, dresidual = _checked_backward(
            x, dy, 1, mask, dresidual, mean=mean, inv_std=inv_std, weight=weight
        )
    plan = _whole(*_shape(x), x.itemsize, fused=True) if x.numel() else None
    if plan is None:
        sums = _grad_sums(dy, x, mean, inv_std, mask)
        dx = _grad_input(dy, x, mean, inv_std, weight, *sums, count, mask, dresidual)
        return dx, *sums
    dx = torch.empty_like(x)
    sum_dy, sum_dy_x_hat = _new(x, 2)
    tensors = (dy, x, *_contiguous(mean, inv_std, weight), mask, dx, dresidual)
    _launch(
        _backward_kernel, plan.grid, *tensors, sum_dy, sum_dy_x_hat, float(count), *plan.shape,
        warps=plan.warps, **plan.blocks,
    )  # fmt: skip
    return dx, sum_dy, sum_dy_x_hat


# --- The same for tensors that have been checked: dense, channels on axis 1 -----------------------


def _moments(
    x: Tensor,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> tuple[Moments, Tensor]:
    """Return the moments and inv_std of a dense tensor, and move the running statistics."""
    if x.numel() == 0:
        return Moments(0, _zeros(x), _zeros(x).double()), _zeros(x) + eps**-0.5
    count = x.numel() // x.shape[1]
    plan = _plan(*_shape(x), x.itemsize, reduce=True)
    partials = _partials(x, 4, plan)
    mean, m2, inv_std = _new_statistics(x)
    _launch(_moments_kernel, plan.grid, x, partials, *plan.sizes, **plan.blocks)
    vectors = (mean, m2, inv_std, running_mean, running_var)
    _merge(_merge_moments_kernel, partials, *vectors, float(count), float(eps), float(momentum))
    return Moments(count, mean, m2), inv_std


def _normalize(
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    mask: Tensor | None,
) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    residual = None if residual is None else dense(residual, x)
    plan = _plan(*_shape(x), x.itemsize, reduce=False)
    vectors = _contiguous(mean, inv_std, weight, bias)
    tensors = (x, *vectors, residual, y, mask if relu else None)
    _launch(_normalize_kernel, plan.grid, *tensors, *plan.sizes, RELU=relu, **plan.blocks)
    return y


def _grad_sums(
    dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return _zeros(x), _zeros(x)
    plan = _plan(*_shape(x), x.itemsize, reduce=True)
    partials = _partials(x, 2, plan)
    vectors = _contiguous(mean, inv_std)
    sums = _new(x, 2)
    _launch(
        _grad_sums_kernel, plan.grid, dy, x, vectors[0], mask, partials, *plan.sizes, **plan.blocks
    )  # fmt: skip
    _merge(_add_sums_kernel, partials, vectors[1], *sums)
    return sums[0], sums[1]


def _grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_x_hat: Tensor,
    count: int,
    mask: Tensor | None,
    dresidual: Tensor | None,
) -> Tensor:
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    plan = _plan(*_shape(x), x.itemsize, reduce=False)
    vectors = _contiguous(mean, inv_std, weight, sum_dy, sum_dy_x_hat)
    tensors = (dy, x, *vectors, mask, dx, dresidual)
    _launch(
        _grad_input_kernel, plan.grid, *tensors, float(max(count, 1)), *plan.sizes, **plan.blocks
    )  # fmt: skip
    return dx


def _partials(x: Tensor, rows: int, plan: _Plan) -> Tensor:
    shape = (rows, plan.grid[1], x.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _merge(kernel: Any, partials: Tensor, *args: Any) -> None:
    """Launch a kernel that merges the splits of eight channels."""
    _, splits, channels = partials.shape
    vectors = [a for a in args if not isinstance(a, float)]
    numbers = [a for a in args if isinstance(a, float)]
    sizes = {"BS": _power(splits), "BC": 8}
    grid = (triton.cdiv(channels, 8),)
    _launch(kernel, grid, partials, *vectors, channels, splits, *numbers, **sizes)


def _contiguous(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(v if v is None else v.contiguous() for v in vectors)


def _moved(given: tuple[Tensor | None, ...], used: tuple[Tensor | None, ...]) -> None:
    """Tell torch, which does not look into kernels, that running statistics have changed."""
    for to, at in zip(given, used, strict=True):
        if to is None or at is None:
            continue
        if to is not at:  # a copy, since the given one is not contiguous
            to.copy_(at)
        elif not to.is_inference():
            torch.autograd.graph.increment_version(to)
