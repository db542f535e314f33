"""How a tensor is cut."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton

# Constants not measured on a card are chosen by counting: bytes in flight and registers.
_TILE = 8192  # bytes of all tensors read: four independent 16-byte loads in each of 128 threads
_NARROW = 2048  # elements where loads are narrow, each with an address of its own: 16 in a thread
_PROGRAMS = 528  # of a reduction: 4 on each of 132 multiprocessors (H100, H200), all at one time
_REGISTERS = 128  # of a reduction's threads, 128 to the program: so 4 find place
_SPLITS = 512  # of a channel at most, so that one program can merge them
_FITS = 32768  # elements of a channel, 32 in each of 1024 threads, which have 64 registers each
_FITS_FUSED = 8192  # the same for two tensors, or narrow loads: 16 in 512 threads of 128 registers
_FITS_LAST = 16384  # of eight neighbouring channels, a load of 16 bytes or two: 32 in 512 threads
_FILLS = 64  # programs; fewer leave most of the chip idle, and splitting the channel is faster
_SMALL = 1 << 20  # elements; below, the launches cost more than an idle chip
_GRID = 65535  # CUDA's limit on the second dimension of a grid


class Plan(NamedTuple):
    """The cutting of a tensor: how a kernel is launched, and what it must know."""

    grid: tuple[int, int]
    sizes: tuple[int, ...]  # its last arguments: N, C, P, tiles of a channel, tiles of a program
    blocks: dict[str, int]  # its compile-time arguments: PU, CU, BN, BC, BP
    options: dict[str, int]  # for Triton


@functools.lru_cache(maxsize=4096)
def tiled(n: int, c: int, p: int, itemsize: int, reads: int, reduce: bool) -> Plan:
    """Cut into small tiles, for a reduction or an elementwise kernel that ``reads`` tensors."""
    tile = _TILE // itemsize
    if (c if p == 1 else p) % 4:
        tile = min(tile, _NARROW)
    tile //= reads
    bn, bc, bp = 1, 1, 1
    if p == 1:  # channels are contiguous: 64 of them are 128 bytes or more
        bc = min(max(power(c), 8), 64)
        bn = min(power(n), tile // bc)
    else:
        bp = min(_pixels(p), tile)
        bn = min(power(n), tile // bp)
        bc = min(power(c), tile // (bp * bn))
    while bn > 1 and bn * c * p >= 2**31:  # offsets inside a tile have 32 bits
        bn //= 2
    while bc > 1 and bc * p >= 2**31:
        bc //= 2
    channel_blocks = triton.cdiv(c, bc)
    tiles = triton.cdiv(n, bn) * triton.cdiv(p, bp)
    most, options = _GRID, {"num_warps": 4}
    if reduce:
        most = min(max(_PROGRAMS // channel_blocks, 1), _SPLITS)
        options["maxnreg"] = _REGISTERS
    per_program = triton.cdiv(tiles, min(tiles, most))
    grid = (channel_blocks, triton.cdiv(tiles, per_program))
    return Plan(grid, (n, c, p, tiles, per_program), _blocks(c, p, bn, bc, bp), options)


@functools.lru_cache(maxsize=4096)
def whole(n: int, c: int, p: int, itemsize: int, fused: bool) -> Plan | None:
    """Cut so that a program holds whole channels, or return None where that does not pay."""
    fits, each = _FITS_FUSED, 16
    if p == 1 and c % 8 == 0:
        fits, each = _FITS_LAST, 32
    elif p > 1 and p % 4 == 0 and not fused:
        fits, each = _FITS, 32
    bn, bc, bp = power(n), 8 if p == 1 else 1, 1 if p == 1 else max(power(p), 8)
    programs = triton.cdiv(c, bc)
    if bn * bc * bp > fits or (programs < _FILLS and n * c * p > _SMALL) or bn * c * p >= 2**31:
        return None
    options = {"num_warps": max(bn * bc * bp // (32 * each), 4)}
    return Plan((programs, 1), (n, c, p), _blocks(c, p, bn, bc, bp), options)


@functools.lru_cache(maxsize=4096)
def merging(rows: int, splits: int, channels: int) -> Plan:
    """Cut a reduction's results, tensor (rows, splits, channels): eight channels to a program."""
    grid, blocks = (triton.cdiv(channels, 8), 1), {"BS": power(splits), "BC": 8}
    return Plan(grid, (channels, splits), blocks, {"num_warps": 4})


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
    return max(power(p), 8)


def power(v: int) -> int:
    return 1 << max(v - 1, 0).bit_length()
