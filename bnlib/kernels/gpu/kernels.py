"""The kernels of the GPU tier, compiled by Triton.

One way of looking at a tensor serves every layout: (N, C, P), that is P *pixels* of C channels of
N samples, contiguous in this order. torch's usual layout (N, C, H, W) is this with P = H·W.
``channels_last`` memory, in which the channels are innermost, is this with N·H·W samples of one
pixel. Any other strides are copied to one of the two.

A *tile* is a box of BN samples, BC channels and BP pixels: what one program (one group of threads)
holds in registers at a time. Batch norm is bound by memory, so the kernels below are counted in
*passes*, the number of times that all elements of a tensor travel between memory and chip:

- in general a reduction must see everything before the first output can be written: x is read
  twice. Splits of every channel are reduced at the same time (``moments_kernel``) and their
  partial results merged (``merge_moments_kernel``), then x is read again (``normalize_kernel``);
- where all samples and pixels of a channel fit into one tile, the program keeps them in registers
  in between (``forward_kernel``, ``backward_kernel``): x is read once.

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

import triton
import triton.language as tl

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
def _load(x, t, last, c0, N, C, P, BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Load what exists of tile ``t``; tile ``last`` and those behind it do not."""
    base, inside, exists = _tile(t, c0, N, C, P, BN, BC, BP)
    exists = exists & (t < last)
    return tl.load(x + base + inside, exists, other=0.0), exists


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
def _load_dy(dy, mask, t, last, c0, N, C, P, BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Load the gradient and what ``_store_mask`` stored, for ``_behind_relu``."""
    g, _ = _load(dy, t, last, c0, N, C, P, BN, BC, BP)
    if mask is None:
        return g, tl.zeros([1, 1, 1], tl.uint8)
    else:
        base, inside, exists = _mask_tile(t, c0, N, C, P, BN, BC, BP)
        return g, tl.load(mask + base + inside, exists & (t < last), other=0)


@triton.jit
def _behind_relu(g, byte, mask):
    """Return the gradient at the batch norm: 0 where a ReLU cut off, if there was one."""
    g = g.to(tl.float32)
    if mask is not None:
        bits = (byte.to(tl.int32)[:, :, :, None] >> tl.arange(0, 8)[None, None, None, :]) & 1
        g = tl.where(tl.reshape(bits, g.shape) != 0, g, 0.0)
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
# programs, which run at the same time, take neighbouring channels of the same samples. A reduction
# asks for the next tile before it uses one: the assembler places a load right before its use, and
# without this the loads of a tile would wait for each other.


@_jit
def moments_kernel(
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
    last = tl.minimum(first + per_program, tiles)
    v, exists = _load(x, first, last, c0, N, C, P, BN, BC, BP)
    v_next, exists_next = _load(x, first + 1, last, c0, N, C, P, BN, BC, BP)
    count = _count(first, N, P, BN, BP)
    shift = _sum(v.to(tl.float32)) / count
    d = tl.where(exists, v.to(tl.float32) - shift, 0.0)
    sum_d, sum_d2 = d, d * d
    for t in range(first + 1, last):
        v, exists = v_next, exists_next
        v_next, exists_next = _load(x, t + 1, last, c0, N, C, P, BN, BC, BP)
        d = tl.where(exists, v.to(tl.float32) - shift, 0.0)
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
def merge_moments_kernel(
    partials, mean, m2, inv_std, running_mean, running_var, count, eps, momentum, C, S,
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
def normalize_kernel(
    x, mean, inv_std, var, weight, bias, residual, y, mask, eps, N, C, P, tiles, per_program,
    RELU: tl.constexpr, PU: tl.constexpr, CU: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) γ inv_std + β, and what is fused; ``var``, if given, decides inv_std."""
    C, P = _sizes(C, P, CU, PU, BP)
    # Backwards: what the reduction read last is still in the cache.
    c0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BC
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * per_program
    c, c_exists = _channels(c0, C, BC)
    mu = _per_channel(mean, c, c_exists, 0.0)
    if var is None:
        r = _per_channel(inv_std, c, c_exists, 1.0)
    else:
        r = 1.0 / tl.sqrt_rn(_per_channel(var, c, c_exists, 1.0) + eps)
        tl.store(inv_std + c, r, c_exists)  # the same number from every program of a channel
    scale = r * _per_channel(weight, c, c_exists, 1.0)
    b = _per_channel(bias, c, c_exists, 0.0)
    for t in range(first, tl.minimum(first + per_program, tiles)):
        base, inside, exists = _tile(t, c0, N, C, P, BN, BC, BP)
        v = tl.load(x + base + inside, exists, other=0.0).to(tl.float32)
        _store_y(
            v - mu, y, residual, mask, scale, b, base, inside, exists, t, c0, N, C, P, RELU,
            BN, BC, BP,
        )  # fmt: skip


@_jit
def grad_sums_kernel(
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
    first = s * per_program
    last = tl.minimum(first + per_program, tiles)
    v_next, _ = _load(x, first, last, c0, N, C, P, BN, BC, BP)
    g_next, byte_next = _load_dy(dy, mask, first, last, c0, N, C, P, BN, BC, BP)
    for t in range(first, last):
        v, g, byte = v_next, g_next, byte_next
        v_next, _ = _load(x, t + 1, last, c0, N, C, P, BN, BC, BP)
        g_next, byte_next = _load_dy(dy, mask, t + 1, last, c0, N, C, P, BN, BC, BP)
        g = _behind_relu(g, byte, mask)
        sum_g += g
        sum_gd += g * (v.to(tl.float32) - mu)  # g is 0 where nothing exists
    at = partials + s * C + c
    tl.store(at, _sum(sum_g), c_exists)
    tl.store(at + tl.num_programs(1) * C, _sum(sum_gd), c_exists)


@_jit
def add_sums_kernel(
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
def grad_input_kernel(
    dy, x, mean, inv_std, weight, sum_dy, sum_dy_x_hat, mask, dx, dresidual, count,
    N, C, P, tiles, per_program, PU: tl.constexpr, CU: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """dx = a dy + b (x - mean) + k, with three numbers per channel."""
    C, P = _sizes(C, P, CU, PU, BP)
    c0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BC  # backwards, as in normalize_kernel
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
        g, byte = _load_dy(dy, mask, t, tiles, c0, N, C, P, BN, BC, BP)
        g = _behind_relu(g, byte, mask)
        if dresidual is not None:
            tl.store(dresidual + base + inside, g.to(dresidual.dtype.element_ty), exists)
        tl.store(dx + base + inside, (a * g + (b * (v - mu) + k)).to(dx.dtype.element_ty), exists)


# --- Kernels that take whole channels -------------------------------------------------------------


@_jit
def forward_kernel(
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
def backward_kernel(
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
    g, byte = _load_dy(dy, mask, t, 1, c0, N, C, P, BN, BC, BP)
    g = _behind_relu(g, byte, mask)
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
