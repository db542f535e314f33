# mypy: disable-error-code="no-untyped-def"
"""How the work is cut, and what the threads draw."""

from __future__ import annotations

import functools
import math
import platform
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from bnlib.kernels.cpu.compiling import jit
from bnlib.kernels.cpu.lanes import settle
from bnlib.kernels.cpu.loops import (
    TILE,
    add_up,
    finish,
    gradient,
    gradient_sums,
    merge,
    normalize,
    panel_moments,
    rows_moments,
)
from bnlib.kernels.tensors import channels_are_neighbours

SLOTS = 28  # of a kernel's array, at most
_SERIAL_BELOW = 1 << 14  # elements; waking a thread costs more than it saves

# A kernel is a C function of one array of integers, for as many threads as like to run it: first
# numbers that the threads share, then what to do, lengths and addresses. The threads draw the tasks
# that measure, the one that has done the last of them merges what they found, and they draw the
# tasks that apply. Nobody waits for a thread that has not begun a task. Where one task measures all
# values of its channels, it applies at once what it found.

_MEASURED, _DONE, _MERGED, _APPLIED = range(4)  # tasks drawn, tasks done, whether merged, drawn
MEASURE, APPLY = 1, 2


@jit
def _takes_place(phase, measure, apply, splits):
    """Whether a phase is due; what is applied at once has no phase of its own."""
    return measure if phase == _MEASURED else apply and not (measure and splits == 1)


@jit
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


@jit
def _middle(r0, r1, thread, threads, at_once):
    """Where to begin to write rows r0 .. r1 that other threads write for other channels."""
    return r0 + (thread * (r1 - r0) // threads & ~7) if at_once else r0


def forward_kernel(stored, number, has_mask, has_residual):
    def kernel(p):
        a = numba.carray(p, SLOTS)
        measure, apply = a[4] & MEASURE != 0, a[4] & APPLY != 0
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
                        panel_moments(x, weight, channels, columns, c0, k1, r0, r1, out)
                    else:
                        rows_moments(x, weight, channels, size, c0, c1, r0, r1, out)
                    if splits == 1:
                        finish(c0, c1, count, out, *statistics)
                    elif _take(p, _DONE) == tasks - 1:
                        before = np.float64(_cut(0, splits, rows, unit)[1] * size)
                        first = partial[0]
                        for s in range(1, splits):
                            r0, r1 = _cut(s, splits, rows, unit)
                            part = np.float64((r1 - r0) * size)
                            merge(before, first[0], first[1], part, partial[s, 0], partial[s, 1])
                            before += part
                        finish(0, channels, count, first, *statistics)
                        _take(p, _MERGED)
                if phase == _APPLIED or at_once:
                    middle = _middle(r0, r1, thread, threads, at_once)
                    rest = (channels, size, weight, bias, mean, inv_std, floor, c0, c1, k1)
                    for n0, n1 in ((middle, r1), (r0, middle)):
                        if n0 < n1:
                            normalize(panel, x, residual, y, mask, *rest, n0, n1)
            settle()

    return kernel


def backward_kernel(stored, number, has_mask, has_masked_dy):
    def kernel(p):
        a = numba.carray(p, SLOTS)
        measure, apply = a[4] & MEASURE != 0, a[4] & APPLY != 0
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
                    gradient_sums(panel, dy, x, mask, *rest)
                    if splits == 1:
                        add_up(c0, c1, out, inv_std, sum_dy, sum_dy_x_hat)
                    elif _take(p, _DONE) == tasks - 1:
                        for i in range(1, splits):
                            for c in range(channels):
                                partial[0, 0, c] += partial[i, 0, c]
                                partial[0, 1, c] += partial[i, 1, c]
                        add_up(0, channels, partial[0], inv_std, sum_dy, sum_dy_x_hat)
                        _take(p, _MERGED)
                if phase == _APPLIED or at_once:
                    rest = (
                        channels, size, weight, mean, inv_std, sum_dy, sum_dy_x_hat, count,
                        c0, c1, k1,
                    )  # fmt: skip
                    middle = _middle(r0, r1, thread, threads, at_once)
                    for n0, n1 in ((middle, r1), (r0, middle)):
                        if n0 < n1:
                            gradient(panel, dy, x, dx, masked_dy, mask, *rest, n0, n1)
            settle()

    return kernel


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


@jit
def _cut(task, tasks, size, unit):
    """The part of 0 .. size that belongs to a task, in units of so many."""
    units = (size + unit - 1) // unit
    return task * units // tasks * unit, min((task + 1) * units // tasks * unit, size)


_WIDE = 2048


class Plan(NamedTuple):
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
def plan(shape: tuple[int, ...], strides: tuple[int, ...]) -> Plan:
    like = torch.empty_strided(shape, strides, device="meta")
    samples, channels = shape[:2]
    size = math.prod(shape[2:])
    if not channels_are_neighbours(like):
        # A task reads long stretches of memory, and only then as little as the cache may hold.
        blocks = channels if size >= TILE else max(16, channels * size >> 14)
        blocks = max(1, min(channels, blocks))
        splits = 1 if blocks >= 16 else min(samples, -(-16 // blocks))
        copy = not like.is_contiguous()
        tasks = 1 if samples * channels * size < _SERIAL_BELOW else blocks * splits
        return Plan(False, blocks, splits, samples, channels, size, copy, tasks)
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
    return Plan(True, blocks, splits, rows, channels, repeat, copy, tasks)
