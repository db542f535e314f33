"""The CPU tier: allocates what a call needs, and starts its kernel on torch's own threads.

Numba compiles a kernel (schedule.py) once for a dtype, a direction and what is fused into it, and
keeps it in its cache. It is told what to do in one structure of numbers and addresses. Tensors
whose strides are neither contiguous nor channels_last are copied first.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import math
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

from bnlib.kernels.base import Kernels
from bnlib.kernels.cpu.compiling import COMPILED, cached
from bnlib.kernels.cpu.schedule import SIGNATURE, Arguments, Plan, make_kernel, plan
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
_STREAM_FROM = 1 << 23  # bytes; more than a cache keeps for the next layer
# A kernel is made of all files here, but Numba's cache looks at the one that defines it.
_SOURCES = zlib.crc32(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))))

# --- threads --------------------------------------------------------------------------------------

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _compiled(dtype: torch.dtype, backward: bool, has_mask: bool, has_extra: bool) -> Any:
    """The kernel for a dtype, compiled or from Numba's cache: address, and callable from Python."""
    function = make_kernel(*_STORED[dtype], backward, has_mask, has_extra, _SOURCES)
    kernel = cached(lambda cache: numba.cfunc(SIGNATURE, cache=cache, **COMPILED)(function))
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


def _run(
    arguments: Arguments, cut: Plan, x: Tensor, backward: bool, has_mask: bool, has_extra: bool
) -> None:
    """Run a kernel with as many threads as torch uses."""
    _, address, call = _compiled(x.dtype, backward, has_mask, has_extra)
    a, tasks = arguments, cut.tasks
    a.panel, a.blocks, a.splits, a.rows, a.channels, a.size = cut[:6]
    partial = torch.empty(2 * cut.splits * cut.channels, dtype=torch.float64, device="cpu")
    a.partial = partial.data_ptr()
    a.threads = threads = 1 if tasks == 1 or _after_fork else min(torch.get_num_threads(), tasks)
    a.stream_from = _STREAM_FROM
    pointer = ctypes.addressof(a)
    if threads == 1:
        call(pointer)
    elif _openmp is not None:
        _openmp(address, pointer, threads, 0)
    else:
        others = [_own_threads().submit(call, pointer) for _ in range(threads - 1)]
        call(pointer)
        for other in others:
            other.result()


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
    fault for every 4 KiB of a large output. +18 % of the geometric mean, as PyTorch ships.
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
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, m2: Tensor | None,
    inv_std: Tensor, residual: Tensor | None = None, relu: bool = False,
    mask: Tensor | None = None, *, apply: bool = True, eps: float = 0.0,
    running: tuple[Tensor, ...] = (), momentum: float = 0.0,
) -> Tensor:  # fmt: skip
    """Fill mean, m2 and inv_std if there is an m2, and normalise unless told otherwise."""
    cut = plan(x.shape, x.stride())
    if cut.copy:
        x = dense(x)
    y = _empty_like(x) if apply else x
    residual = None if residual is None else _beside(residual, x)
    weight, bias = _vector(weight, 1, x), _vector(bias, 0, x)
    a = Arguments()
    a.sum, a.apply, a.count = m2 is not None, apply, _count(x)
    a.x, a.y, a.residual = x.data_ptr() or _freed(), _address(y), _address(residual)
    a.weight, a.bias = _address(weight), _address(bias)
    a.mean, a.m2, a.inv_std = _address(mean), _address(m2), _address(inv_std)
    if mask is not None:
        a.mask, a.mask_bytes = _address(mask), mask.numel()
    if running:
        a.running_mean, a.running_var = map(_address, running)
    a.eps, a.momentum, a.floor = eps, momentum, 0.0 if relu else -math.inf
    _run(a, cut, x, False, mask is not None, residual is not None)
    return y


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _backward(
    dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, weight: Tensor | None,
    sums: tuple[Tensor, ...], count: int, mask: Tensor | None, dresidual: Tensor | None, *,
    sum: bool = True, apply: bool = True,
) -> Tensor:  # fmt: skip
    """Fill the two sums, or take them as they are, and dx."""
    cut = plan(x.shape, x.stride())
    if cut.copy:
        x = dense(x)
    dy = _beside(dy, x)
    dx = _empty_like(x) if apply else x
    mean, inv_std, weight = _vector(mean, 0, x), _vector(inv_std, 1, x), _vector(weight, 1, x)
    a = Arguments()
    a.sum, a.apply, a.count = sum, apply, count
    a.x, a.dy, a.y = x.data_ptr() or _freed(), _address(dy), _address(dx)
    a.masked_dy = _address(dresidual)
    a.mean, a.inv_std, a.weight = _address(mean), _address(inv_std), _address(weight)
    a.sum_dy, a.sum_dy_x_hat = map(_address, sums)
    if mask is not None:
        a.mask, a.mask_bytes = _address(mask), mask.numel()
    _run(a, cut, x, True, mask is not None, dresidual is not None)
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
        _forward(x, None, None, mean, m2, inv_std, apply=False, eps=1.0)
        return Moments(_count(x), mean, m2)

    def _normalize(
        self, x: Tensor, mean: Tensor, inv_std: Tensor, weight: Tensor | None,
        bias: Tensor | None, residual: Tensor | None, relu: bool, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        mean, inv_std = _vector(mean, 0, x), _vector(inv_std, 1, x)
        return _forward(x, weight, bias, mean, None, inv_std, residual, relu, mask)

    def _moments_and_normalize(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        residual: Tensor | None, relu: bool, mask: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, momentum: float,
    ) -> tuple[Tensor, Moments, Tensor]:  # fmt: skip
        mean, m2, inv_std = _empty_statistics(x)
        given: tuple[Tensor, ...] = ()
        if running_mean is not None and running_var is not None:
            given = running_mean, running_var
        used = tuple(_vector(v, 0, x) for v in given)
        y = _forward(
            x, weight, bias, mean, m2, inv_std, residual, relu, mask,
            eps=eps, running=used, momentum=momentum,
        )  # fmt: skip
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
        _backward(dy, x, mean, inv_std, None, sums, 1, mask, None, apply=False)
        return sum_dy, sum_dy_x_hat

    def _grad_input(
        self, dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, weight: Tensor | None,
        sum_dy: Tensor, sum_dy_x_hat: Tensor, count: int, mask: Tensor | None,
        dresidual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        sums = _vector(sum_dy, 0, x), _vector(sum_dy_x_hat, 0, x)
        return _backward(dy, x, mean, inv_std, weight, sums, count, mask, dresidual, sum=False)

    def _grad_sums_and_input(
        self, dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, weight: Tensor | None,
        count: int, mask: Tensor | None, dresidual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        sums = _empty_vectors(x)
        return _backward(dy, x, mean, inv_std, weight, sums, count, mask, dresidual), *sums


tier = CpuKernels()
