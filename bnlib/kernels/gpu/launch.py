"""The GPU tier as torch sees it: what is allocated, and which kernels run.

Where all values of a channel fit into one program (see :mod:`bnlib.kernels.gpu.plan`), a pass is
one kernel; elsewhere a primitive is one, with another that merges the splits of a reduction.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from bnlib.kernels.base import Kernels
from bnlib.kernels.gpu import kernels
from bnlib.kernels.gpu.plan import Plan, power, tiled, whole
from bnlib.kernels.tensors import channels_are_neighbours, dense
from bnlib.statistics import Moments


class GpuKernels(Kernels):
    name = "gpu"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    place = (
        "on a CUDA device (or on the CPU, where TRITON_INTERPRET=1 was set before triton was "
        "imported)"
    )

    def reaches(self, x: Tensor) -> bool:
        return x.is_cuda or (x.is_cpu and _interpreted())

    def _moments(self, x: Tensor) -> Moments:
        return _measure(dense(x), 1.0, None, None, 0.0)[0]

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
        x = dense(x)
        y, residual = torch.empty_like(x), _beside(residual, x)
        cut = tiled(*_shape(x), x.itemsize, reduce=False)
        vectors = _contiguous(mean, inv_std, weight, bias)
        tensors = (x, *vectors, residual, y, mask if relu else None)
        _launch(kernels.normalize_kernel, cut.grid, *tensors, *cut.sizes, RELU=relu, **cut.blocks)
        return y

    def _grad_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = dense(x)
        cut = tiled(*_shape(x), x.itemsize, reduce=True)
        partials = _partials(x, 2, cut)
        vectors = _contiguous(mean, inv_std)
        sum_dy, sum_dy_x_hat = _new(x, 2)
        tensors = (dense(dy, x), x, vectors[0], mask, partials)
        _launch(kernels.grad_sums_kernel, cut.grid, *tensors, *cut.sizes, **cut.blocks)
        _merge(kernels.add_sums_kernel, partials, vectors[1], sum_dy, sum_dy_x_hat)
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
        x = dense(x)
        dx = torch.empty_like(x)
        cut = tiled(*_shape(x), x.itemsize, reduce=False)
        vectors = _contiguous(mean, inv_std, weight, sum_dy, sum_dy_x_hat)
        tensors = (dense(dy, x), x, *vectors, mask, dx, dresidual)
        _launch(
            kernels.grad_input_kernel, cut.grid, *tensors, float(count), *cut.sizes, **cut.blocks
        )
        return dx

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
        x = dense(x)
        running = _contiguous(running_mean, running_var)
        cut = whole(*_shape(x), x.itemsize, residual is not None or mask is not None)
        if cut is None:
            batch, inv_std = _measure(x, eps, running[0], running[1], momentum)
            y = self._normalize(x, batch.mean, inv_std, weight, bias, residual, relu, mask)
        else:
            y, residual = torch.empty_like(x), _beside(residual, x)
            mean, m2, inv_std = _new_statistics(x)
            batch = Moments(_count(x), mean, m2)
            tensors = (x, *_contiguous(weight, bias), residual, y, mask if relu else None)
            numbers = (float(batch.count), float(eps), float(momentum), *cut.shape)
            _launch(
                kernels.forward_kernel, cut.grid, *tensors, mean, m2, inv_std, *running, *numbers,
                RELU=relu, warps=cut.warps, **cut.blocks,
            )  # fmt: skip
        _moved((running_mean, running_var), running)
        return y, batch, inv_std

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
        x = dense(x)
        cut = whole(*_shape(x), x.itemsize, fused=True)
        if cut is None:
            return super()._grad_sums_and_input(
                dy, x, mean, inv_std, weight, count, mask, dresidual
            )
        dx = torch.empty_like(x)
        sum_dy, sum_dy_x_hat = _new(x, 2)
        tensors = (dense(dy, x), x, *_contiguous(mean, inv_std, weight), mask, dx, dresidual)
        _launch(
            kernels.backward_kernel, cut.grid, *tensors, sum_dy, sum_dy_x_hat, float(count),
            *cut.shape, warps=cut.warps, **cut.blocks,
        )  # fmt: skip
        return dx, sum_dy, sum_dy_x_hat

    # A mask has bit k of byte j for element 8j + k along the innermost axis, so that a thread that
    # holds eight neighbours makes the byte without talking to others.

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        n, c, p = _shape(x)
        return (n, -(-c // 8), 1) if p == 1 else (n, c, -(-p // 8))

    def unpack_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        n, c, p = _shape(x)
        bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
        if p == 1:
            flat = bits.reshape(n, -1)[:, :c]
            return flat.reshape(x.shape[0], *x.shape[2:], c).movedim(-1, 1).bool()
        return bits.reshape(n, c, -1)[:, :, :p].reshape(x.shape).bool()


tier = GpuKernels()


def _interpreted() -> bool:
    return not isinstance(kernels.normalize_kernel, triton.runtime.JITFunction)


def _measure(
    x: Tensor,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> tuple[Moments, Tensor]:
    """Return the moments and inv_std of a dense tensor, and move the running statistics."""
    cut = tiled(*_shape(x), x.itemsize, reduce=True)
    partials = _partials(x, 4, cut)
    mean, m2, inv_std = _new_statistics(x)
    _launch(kernels.moments_kernel, cut.grid, x, partials, *cut.sizes, **cut.blocks)
    vectors = (mean, m2, inv_std, running_mean, running_var)
    batch = Moments(_count(x), mean, m2)
    numbers = (float(batch.count), float(eps), float(momentum))
    _merge(kernels.merge_moments_kernel, partials, *vectors, *numbers)
    return batch, inv_std


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _beside(residual: Tensor | None, x: Tensor) -> Tensor | None:
    return None if residual is None else dense(residual, x)


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Return (N, C, P) as the kernels see a dense tensor."""
    c = x.shape[1]
    values = x.numel() // c if c else 0
    if channels_are_neighbours(x):
        return values, c, 1
    return x.shape[0], c, values // max(x.shape[0], 1)


def _new(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Return several vectors of float32, one value per channel."""
    return torch.empty(rows, x.shape[1], dtype=torch.float32, device=x.device).unbind()


def _new_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, m2 and inv_std to be filled."""
    mean, inv_std = _new(x, 2)
    return mean, torch.empty(x.shape[1], dtype=torch.float64, device=x.device), inv_std


def _partials(x: Tensor, rows: int, cut: Plan) -> Tensor:
    shape = (rows, cut.grid[1], x.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _merge(kernel: Any, partials: Tensor, *args: Any) -> None:
    """Launch a kernel that merges the splits of eight channels."""
    _, splits, channels = partials.shape
    vectors = [a for a in args if not isinstance(a, float)]
    numbers = [a for a in args if isinstance(a, float)]
    sizes = {"BS": power(splits), "BC": 8}
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


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, **blocks: Any) -> None:
    with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
        kernel[grid](*args, **blocks, num_warps=warps)
