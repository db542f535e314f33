# mypy: disable-error-code="no-untyped-def"
"""How the work of a call is cut, and what its threads do.

The shape alone cuts the work into tasks: *blocks* of channels times *splits* of the rows, which are
samples or the rows of a panel. A kernel is a C function that as many threads as like run at once,
with one :class:`Arguments`. The threads draw tasks that sum; the one that has done the last of them
joins what they found, in the order of the tasks, so that the bits do not depend on the threads; and
they draw tasks that apply. Nobody waits for a thread that has not begun a task. Where one task sums
all values of its channels, it applies at once what it found.
"""

from __future__ import annotations

import ctypes
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

from bnlib.kernels.cpu import loops
from bnlib.kernels.cpu.compiling import jit
from bnlib.kernels.cpu.lanes import settle
from bnlib.kernels.tensors import channels_are_neighbours

_SERIAL_BELOW = 1 << 14  # elements; waking a thread costs more than it saves
_WIDE = 2048  # columns of a panel, at most, in one task


class Arguments(ctypes.Structure):
    """What a kernel is told, and where its threads meet; addresses are 0 for what is absent."""

    _fields_ = [
        # Tasks drawn, tasks whose sums are done, whether they are joined; the steps to take.
        *((name, ctypes.c_int64) for name in ("drawn", "done", "joined", "sum", "apply")),
        *(
            (name, ctypes.c_int64)
            for name in ("threads", "panel", "blocks", "splits", "stream_from")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "channels", "size", "count")),
        # Addresses: the sums of every split, elements, and one value per channel.
        *((name, ctypes.c_int64) for name in ("partial", "x", "y", "dy", "residual", "masked_dy")),
        *((name, ctypes.c_int64) for name in ("mask", "mask_bytes", "weight", "bias", "mean")),
        *((name, ctypes.c_int64) for name in ("m2", "inv_std", "running_mean", "running_var")),
        *((name, ctypes.c_int64) for name in ("sum_dy", "sum_dy_x_hat")),
        *((name, ctypes.c_double) for name in ("eps", "momentum", "floor")),
    ]


SIGNATURE = types.void(types.CPointer(numba.from_dtype(np.dtype(Arguments))))


def make_kernel(stored, number, backward, has_mask, has_extra, sources):
    """The kernel of a direction; extra is the residual, or the gradient behind the ReLU."""
    forward, itemsize = not backward, stored.bitwidth // 8
    has_residual, has_masked_dy = has_extra and forward, has_extra and backward

    def kernel(p):
        t = numba.carray(p, 1)[0]
        panel, blocks, splits, threads = t.panel != 0, t.blocks, t.splits, t.threads
        rows, channels, size, count = t.rows, t.channels, t.size, t.count
        x, y = _pointer(t.x, stored), _pointer(t.y, stored)
        dy = _pointer(t.dy, stored) if backward else None
        residual = _pointer(t.residual, stored) if has_residual else None
        masked_dy = _pointer(t.masked_dy, stored) if has_masked_dy else None
        mask, mask_end = _pointer(t.mask, numba.uint8) if has_mask else None, t.mask_bytes
        weight, bias = _pointer(t.weight, number), _pointer(t.bias, number)
        mean, m2 = _pointer(t.mean, number), _pointer(t.m2, numba.float64)
        inv_std, sum_dy = _pointer(t.inv_std, number), _pointer(t.sum_dy, number)
        sum_dy_x_hat = _pointer(t.sum_dy_x_hat, number)
        running = _pointer(t.running_mean, number), _pointer(t.running_var, number)
        sums = numba.carray(_pointer(t.partial, numba.float64), (splits, 2, channels))
        # Large outputs whose rows are whole cache lines go past the caches: such a line need not be
        # read before it is written, and pushes nothing else out. +5 % of the geometric mean.
        row = (channels * size if panel else size) * itemsize
        past = rows * channels * size * itemsize >= t.stream_from
        past = past and (t.y | t.masked_dy | row) % 64 == 0
        # What was just read is in the cache: +7 % of the geometric mean, +16 % in NCHW.
        tasks, at_once = blocks * splits, t.sum != 0 and t.apply != 0 and splits == 1
        wide, high = (16, 8) if panel else (1, 1)  # whole vectors, and whole bytes of a mask
        skipped = 0 if t.sum else tasks
        end = 2 * tasks if t.apply and not at_once else tasks
        while True:
            draw = skipped + _take(t, "drawn")
            if draw >= end:
                break
            task = _turn(draw % tasks, threads, tasks)
            if draw >= tasks:
                if t.sum:
                    _wait_for(t, "joined")
                if has_mask and forward:
                    high = 8  # so that no two tasks share a byte
            c0, c1 = _cut(task // splits, blocks, channels, wide)
            r0, r1 = _cut(task % splits, splits, rows, high)
            k1 = channels * size if blocks == 1 else c1
            if draw < tasks:
                out = sums[task % splits]
                what = number, dy, x, mask, mask_end, mean, channels
                if panel:
                    loops.sum_panel(*what, channels * size, c0, k1, r0, r1, out)
                else:
                    loops.sum_rows(*what, size, c0, c1, r0, r1, out)
                last = splits == 1 or _take(t, "done") == tasks - 1
                if last and splits > 1:
                    before, out = np.float64(_cut(0, splits, rows, high)[1] * size), sums[0]
                    for s in range(1, splits):
                        s0, s1 = _cut(s, splits, rows, high)
                        part = np.float64((s1 - s0) * size)
                        loops.join(backward, before, out, part, sums[s])
                        before += part
                if last:
                    which = (c0, c1) if splits == 1 else (0, channels)
                    if backward:
                        loops.finish_backward(out, *which, inv_std, sum_dy, sum_dy_x_hat)
                    else:
                        moved = t.running_mean != 0, t.momentum, *running
                        loops.finish(out, *which, count, t.eps, mean, m2, inv_std, *moved)
                    _take(t, "joined")
            if draw >= tasks or at_once:
                columns = k1 - c0 if panel else c1 - c0
                given = number, weight, bias, mean, inv_std, sum_dy, sum_dy_x_hat, count
                f = loops.coefficients(backward, *given, c0, c1, columns)
                rest = dy, x, residual, y, masked_dy, mask, mask_end, t.floor, past, f
                if panel:
                    loops.apply(True, *rest, channels, size, c0, c1, k1, r0, r1)
                else:
                    loops.apply(False, *rest, channels, size, c0, c1, k1, r0, r1)
        if sources >= 0:  # in the key of Numba's cache, with all else that a kernel closes over
            settle()

    return kernel


@jit
def _turn(draw, threads, tasks):
    """The task of a draw: each thread has a stretch of its own.

    Two threads that write to the same fresh huge page would both clear it. (No figure: it takes
    two quiet cores to measure.)
    """
    thread = draw % threads
    return thread * (tasks // threads) + min(thread, tasks % threads) + draw // threads


@jit
def _cut(task, tasks, size, unit):
    """The part of 0 .. size that belongs to a task, in units of so many."""
    units = (size + unit - 1) // unit
    return task * units // tasks * unit, min((task + 1) * units // tasks * unit, size)


@intrinsic
def _pointer(typingctx, address, element):
    """The address as a pointer to elements of a type."""
    pointer = types.CPointer(element.dtype)

    def convert(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, element), convert


def _place(builder, record, value, name):
    """Where an integer of a record is."""
    at = builder.bitcast(value, ir.IntType(8).as_pointer())
    at = builder.gep(at, [ir.IntType(64)(record.offset(name.literal_value))])
    return builder.bitcast(at, ir.IntType(64).as_pointer())


@intrinsic(prefer_literal=True)
def _take(typingctx, record, name):
    """Add 1 to a field, all threads in turn, and return what it was."""

    def add(context, builder, signature, args):
        at = _place(builder, record, args[0], name)
        return builder.atomic_rmw("add", at, ir.IntType(64)(1), "acq_rel")

    return types.int64(record, name), add


@intrinsic(prefer_literal=True)
def _wait_for(typingctx, record, name):
    """Wait until another thread has made a field something else than 0."""

    def wait(context, builder, signature, args):
        at = _place(builder, record, args[0], name)
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

    return types.void(record, name), wait


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
        blocks = channels if size >= loops.TILE else max(16, channels * size >> 14)
        blocks = max(1, min(channels, blocks))
        splits = 1 if blocks >= 16 else min(samples, -(-16 // blocks))
        copy = not like.is_contiguous()
        tasks = 1 if samples * channels * size < _SERIAL_BELOW else blocks * splits
        return Plan(False, blocks, splits, samples, channels, size, copy, tasks)
    copy = not like.movedim(1, -1).is_contiguous()
    # Several positions in a row: +8 % of the geometric mean; 3 channels would take 8 times as long.
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
