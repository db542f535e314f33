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
import struct
import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from torch import Tensor

from bnlib.kernels.base import Kernels
from bnlib.kernels.cpu.compiling import COMPILED, cached
from bnlib.kernels.cpu.schedule import APPLY, MEASURE, Plan, backward_kernel, forward_kernel, plan
from bnlib.kernels.tensors import dense
from bnlib.statistics import Moments

# How Numba sees the elements: it has no 16-bit floats, so those travel as integers.
_STORED = {
    torch.float32: (numba.float32, numba.float32),
    torch.float64: (numba.float64, numba.float64),
    torch.bfloat16: (numba.uint16, numba.float32),
    torch.float16: (numba.int16, numba.float32),
}
_HUGE_FROM = 1 << 22  # bytes

# --- threads --------------------------------------------------------------------------------------

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _compiled(make: Callable[..., Any], dtype: torch.dtype, *present: bool) -> Any:
    """The kernel for a dtype, compiled or from Numba's cache: address, and callable from Python."""
    signature = types.void(types.CPointer(types.int64))
    function = make(*_STORED[dtype], *present)
    kernel = cached(lambda cache: numba.cfunc(signature, cache=cache, **COMPILED)(function))
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
    cut: Plan,
    steps: int,
    arguments: tuple[int, ...],
) -> None:
    """Run a kernel with as many threads as torch uses."""
    _, address, call = kernel
    memory = _borrow(2 * cut.splits * cut.channels)
    tasks = cut.tasks
    threads = 1 if tasks == 1 or _after_fork else min(torch.get_num_threads(), tasks)
    numbers = array.array("q", (0, 0, 0, 0, steps, threads, *cut[:6], memory[1], *arguments))
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


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the layout of ``x``."""
    return t if t.stride() == x.stride() else dense(t, x)


@functools.lru_cache(maxsize=256)
def _constant(value: float, channels: int, dtype: torch.dtype) -> Tensor:
    """One value for every channel; not to be written to."""
    t = torch.full((channels,), value, dtype=dtype, device="cpu")
    if type(t) is not Tensor:  # it would serve later calls too
        raise TypeError(f"expected no mode in which a new tensor is a {type(t).__name__}")
    return t


def _empty_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    like = _constant(1, x.shape[1], _number_dtype(x))
    return torch.empty_like(like), torch.empty_like(like)


def _empty_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, m2 and inv_std to be filled; m2 may be beyond float32 where the variance is not."""
    mean, inv_std = _empty_vectors(x)
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


def _empty_like(x: Tensor) -> Tensor:
    """An uninitialised tensor like a laid out ``x``, on huge pages if it is large.

    Linux by default hands out huge pages to those who ask; PyTorch does not, and takes a page
    fault for every 4 KiB of a large output.
    """
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
    cut = plan(x.shape, x.stride())
    if cut.copy:
        x = dense(x)
    y = _empty_like(x) if steps & APPLY else None
    mean, m2, inv_std = statistics
    residual = None if residual is None else _beside(residual, x)
    weight, bias = _vector(weight, 1, x), _vector(bias, 0, x)
    arguments = (
        x.data_ptr() or _freed(), *_mask_of(mask), weight.data_ptr() or _freed(),
        _address(mean), _address(inv_std),
        _address(y), _address(residual), bias.data_ptr() or _freed(), _address(m2),
        *([_address(r) for r in running] or (0, 0)),
        _bits_of(float(eps)), _bits_of(float(momentum)), _bits_of(0.0 if relu else -math.inf),
    )  # fmt: skip
    kernel = _compiled(forward_kernel, x.dtype, mask is not None, residual is not None)
    _run(kernel, cut, steps, arguments)
    return y


def _mask_of(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.data_ptr() or _freed(), mask.numel())


@functools.lru_cache(maxsize=256)
def _bits_of(value: float) -> int:
    return int.from_bytes(struct.pack("=d", value), sys.byteorder, signed=True)


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1]


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
    cut = plan(x.shape, x.stride())
    if cut.copy:
        x = dense(x)
    dy = _beside(dy, x)
    dx = _empty_like(x) if steps & APPLY else None
    mean, inv_std, weight = (_vector(v, 1, x) for v in (mean, inv_std, weight))
    arguments = (
        x.data_ptr() or _freed(), *_mask_of(mask), *(_address(v) for v in (weight, mean, inv_std)),
        _address(dx), dy.data_ptr() or _freed(), _address(dresidual), *map(_address, sums), count,
    )  # fmt: skip
    kernel = _compiled(backward_kernel, x.dtype, mask is not None, dresidual is not None)
    _run(kernel, cut, steps, arguments)
    return dx


_changed = torch.autograd.graph.increment_version


class CpuKernels(Kernels):
    name = "cpu"
    dtypes = tuple(_STORED)
    place = "on the CPU"

    def reaches(self, x: Tensor) -> bool:
        return x.is_cpu

    def empty_like(self, x: Tensor) -> Tensor:
        return _empty_like(dense(x) if plan(x.shape, x.stride()).copy else x)

    def _moments(self, x: Tensor) -> Moments:
        mean, m2, inv_std = _empty_statistics(x)
        _forward(x, None, None, (mean, m2, inv_std), 1.0, None, False, None, MEASURE)
        return Moments(_count(x), mean, m2)

    def _normalize(
        self,
        x: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        mask: Tensor | None,
    ) -> Tensor:
        statistics = (_vector(mean, 0, x), None, _vector(inv_std, 1, x))
        y = _forward(x, weight, bias, statistics, 0.0, residual, relu, mask, APPLY)
        assert y is not None
        return y

    def _moments_and_normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        relu: bool,
        mask: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
    ) -> tuple[Tensor, Moments, Tensor]:
        mean, m2, inv_std = _empty_statistics(x)
        given: tuple[Tensor, ...] = ()
        if running_mean is not None and running_var is not None:
            given = running_mean, running_var
        used = tuple(_vector(v, 0, x) for v in given)
        y = _forward(
            x, weight, bias, (mean, m2, inv_std), eps, residual, relu, mask, MEASURE | APPLY,
            used, momentum,
        )  # fmt: skip
        assert y is not None
        for to, at in zip(given, used, strict=True):
            if to is not at:
                to.copy_(at)  # of another dtype, or not contiguous
            else:
                _changed(to)
        return y, Moments(_count(x), mean, m2), inv_std

    def _grad_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sum_dy, sum_dy_x_hat = sums = _empty_vectors(x)
        _backward(dy, x, None, mean, inv_std, sums, 1, mask, None, MEASURE)
        return sum_dy, sum_dy_x_hat

    def _grad_input(
        self,
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
        sums = _vector(sum_dy, 0, x), _vector(sum_dy_x_hat, 0, x)
        dx = _backward(dy, x, weight, mean, inv_std, sums, count, mask, dresidual, APPLY)
        assert dx is not None
        return dx

    def _grad_sums_and_input(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        weight: Tensor | None,
        count: int,
        mask: Tensor | None,
        dresidual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = _empty_vectors(x)
        dx = _backward(dy, x, weight, mean, inv_std, sums, count, mask, dresidual, MEASURE | APPLY)
        assert dx is not None
        return dx, *sums


tier = CpuKernels()
