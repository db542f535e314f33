"""How a tensor is cut."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton

# Constants not measured on a card are chosen by counting: bytes in flight and registers.
_TILE = 8192  # bytes: four independent 16-byte loads in each of 128 threads
_PROGRAMS = 1024  # of a reduction: 8 for each of an H200's 132 multiprocessors, 7 for an H100's
_SPLITS = 512  # of a channel at most, so that one program can merge them
_FITS = 32768  # elements of a channel, 32 in each of 1024 threads, which have 64 registers each
_FITS_FUSED = 8192  # the same for two tensors, or narrow loads: 16 in 512 threads of 128 registers
_FILLS = 64  # programs; fewer leave most of the chip idle, and splitting the channel is faster
_SMALL = 1 << 18  # elements; below, the launches cost more than an idle chip
_GRID = 65535  # CUDA's limit on the second dimension of a grid


class Plan(NamedTuple):
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
def tiled(n: int, c: int, p: int, itemsize: int, reduce: bool) -> Plan:
    """Cut into small tiles, for a reduction or for an elementwise kernel."""
    tile = _TILE // itemsize
    bn, bc, bp = 1, 1, 1
    if p == 1:  # channels are contiguous: 64 of them are 128 bytes or more
        if c % 4:  # narrow loads, each with an address of its own: 16 fit into a thread's registers
            tile = min(tile, 2048)
        bc = min(max(power(c), 8), 64)
        bn = min(power(n), tile // bc)
    else:
        bp = _pixels(p)
        bn = min(power(n), tile // bp)
        bc = min(power(c), tile // (bp * bn))
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
    return Plan((n, c, p), _blocks(c, p, bn, bc, bp), tiles, per_program, grid)


@functools.lru_cache(maxsize=4096)
def whole(n: int, c: int, p: int, itemsize: int, fused: bool) -> Plan | None:
    """Cut so that a program holds whole channels, or return None where that does not pay."""
    wide = p % 4 == 0 and not fused
    fits, each = (_FITS, 32) if wide else (_FITS_FUSED, 16)
    # One channel; where channels are contiguous, 32 bytes of them, the least that memory delivers.
    bc = 1 if p > 1 else 32 // itemsize
    bn, bp = power(n), 1 if p == 1 else max(power(p), 8)
    programs = triton.cdiv(c, bc)
    if bn * bc * bp > fits or (programs < _FILLS and n * c * p > _SMALL) or bn * c * p >= 2**31:
        return None
    warps = max(bn * bc * bp // (32 * each), 4)
    return Plan((n, c, p), _blocks(c, p, bn, bc, bp), 1, 1, (programs, 1), warps)


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
