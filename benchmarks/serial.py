"""The reduction of the forward pass as it was: it asks for a tile when it needs it, and waits.

``benchmarks/gpu.py --serial`` measures what the library's loop, one tile ahead, gains over it.
"""

import triton.language as tl

from bnlib.kernels.gpu.kernels import _channels, _count, _jit, _load, _sizes, _sum


@_jit
def moments_kernel(
    x, partials, N, C, P, tiles, per_program, PU: tl.constexpr, CU: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Do what the library's kernel of this name does."""
    C, P = _sizes(C, P, CU, PU, BP)
    c0 = tl.program_id(0) * BC
    s = tl.program_id(1)
    first = s * per_program
    last = tl.minimum(first + per_program, tiles)
    v, exists = _load(x, first, last, c0, N, C, P, BN, BC, BP)
    count = _count(first, N, P, BN, BP)
    shift = _sum(v.to(tl.float32)) / count
    d = tl.where(exists, v.to(tl.float32) - shift, 0.0)
    sum_d, sum_d2 = d, d * d
    for t in range(first + 1, last):
        now, exists = _load(x, t, last, c0, N, C, P, BN, BC, BP)
        d = tl.where(exists, now.to(tl.float32) - shift, 0.0)
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
    tl.store(at + 3 * row, tl.where(var < 0.0, 0.0, var), c_exists)
