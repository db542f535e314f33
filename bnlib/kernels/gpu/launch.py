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
from bnlib.kernels.gpu.plan import Plan, merging, tiled, whole
from bnlib.kernels.tensors import channels_are_neighbours, dense
from bnlib.statistics import Moments

Shape = tuple[int, int, int]  # (N, C, P), see bnlib.kernels.gpu.kernels
Vectors = tuple[Tensor | None, ...]  # one value per channel


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
        x = dense(x)
        return _measure(x, _shape(x), 1.0, (None, None), 0.0)[0]

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
        return _apply(x, _shape(x), (mean, inv_std, None, weight, bias), 0.0, residual, relu, mask)

    def _inv_std_and_normalize(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        relu: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, (inv_std,) = dense(x), _new(x, 1)
        vectors = (mean, inv_std, var, weight, bias)
        return _apply(x, _shape(x), vectors, eps, residual, relu, mask), inv_std

    def _grad_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = dense(x)
        return _add(dense(dy, x), x, _shape(x), mean, inv_std, mask)

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
        vectors = (mean, inv_std, weight, sum_dy, sum_dy_x_hat)
        return _apply_gradient(dense(dy, x), x, _shape(x), vectors, count, mask, dresidual)

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
        shape = _shape(x)
        running = _contiguous(running_mean, running_var)
        plan = whole(*shape, x.itemsize, residual is not None or mask is not None)
        if plan is None:
            batch, inv_std = _measure(x, shape, eps, running, momentum)
            vectors = (batch.mean, inv_std, None, weight, bias)
            y = _apply(x, shape, vectors, 0.0, residual, relu, mask)
        else:
            y, residual = torch.empty_like(x), _beside(residual, x)
            batch, inv_std = _new_statistics(x)
            _launch(
                kernels.forward_kernel, plan, x, *_contiguous(weight, bias), residual, y,
                mask if relu else None, batch.mean, batch.m2, inv_std, *running,
                float(batch.count), float(eps), float(momentum), RELU=relu,
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
        dy, shape = dense(dy, x), _shape(x)
        plan = whole(*shape, x.itemsize, fused=True)
        if plan is None:
            sums = _add(dy, x, shape, mean, inv_std, mask)
            vectors = (mean, inv_std, weight, *sums)
            return _apply_gradient(dy, x, shape, vectors, count, mask, dresidual), *sums
        dx = torch.empty_like(x)
        sum_dy, sum_dy_x_hat = _new(x, 2)
        tensors = (dy, x, *_contiguous(mean, inv_std, weight), mask, dx, dresidual)
        _launch(kernels.backward_kernel, plan, *tensors, sum_dy, sum_dy_x_hat, float(count))
        return dx, sum_dy, sum_dy_x_hat

    # A mask has bit k of byte j for element 8j + k along the innermost axis, so that a thread that
    # holds eight neighbours makes the byte without talking to others.

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        n, c, p = _shape(x)
        return (n, -(-c // 8), 1) if p == 1 else (n, c, -(-p // 8))

    def unpack_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        _, c, p = _shape(x)
        bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
        if p == 1:
            flat = bits.flatten(1)[:, :c]
            return flat.reshape(x.shape[0], *x.shape[2:], c).movedim(-1, 1).bool()
        return bits.flatten(2)[:, :, :p].reshape(x.shape).bool()


# --- The steps of a pass that is several kernels; x and dy have no gaps ---------------------------


def _measure(
    x: Tensor, shape: Shape, eps: float, running: Vectors, momentum: float
) -> tuple[Moments, Tensor]:
    """Return the moments and inv_std, and move the running statistics."""
    plan = tiled(*shape, x.itemsize, reads=1, reduce=True)
    partials = _partials(4, plan, x)
    batch, inv_std = _new_statistics(x)
    vectors = (batch.mean, batch.m2, inv_std, *running)
    numbers = (float(batch.count), float(eps), float(momentum))
    _launch(kernels.moments_kernel, plan, x, partials)
    _launch(kernels.merge_moments_kernel, merging(*partials.shape), partials, *vectors, *numbers)
    return batch, inv_std


def _apply(
    x: Tensor,
    shape: Shape,
    vectors: Vectors,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    mask: Tensor | None,
) -> Tensor:
    """Return the output for mean, inv_std, var, weight and bias; a ``var`` fills ``inv_std``."""
    y, residual = torch.empty_like(x), _beside(residual, x)
    tensors = (x, *_contiguous(*vectors), residual, y, mask if relu else None)
    plan = tiled(*shape, x.itemsize, reads=1 if residual is None else 2, reduce=False)
    _launch(kernels.normalize_kernel, plan, *tensors, float(eps), RELU=relu)
    return y


def _add(
    dy: Tensor, x: Tensor, shape: Shape, mean: Tensor, inv_std: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the two sums of the backward pass."""
    plan = tiled(*shape, x.itemsize, reads=2, reduce=True)
    partials = _partials(2, plan, x)
    sum_dy, sum_dy_x_hat = _new(x, 2)
    vectors = (inv_std.contiguous(), sum_dy, sum_dy_x_hat)
    _launch(kernels.grad_sums_kernel, plan, dy, x, mean.contiguous(), mask, partials)
    _launch(kernels.add_sums_kernel, merging(*partials.shape), partials, *vectors)
    return sum_dy, sum_dy_x_hat


def _apply_gradient(
    dy: Tensor,
    x: Tensor,
    shape: Shape,
    vectors: Vectors,
    count: int,
    mask: Tensor | None,
    dresidual: Tensor | None,
) -> Tensor:
    """Return the gradient of the input for mean, inv_std, weight and the two sums."""
    dx = torch.empty_like(x)
    tensors = (dy, x, *_contiguous(*vectors), mask, dx, dresidual)
    plan = tiled(*shape, x.itemsize, reads=2, reduce=False)
    _launch(kernels.grad_input_kernel, plan, *tensors, float(count))
    return dx


def _launch(kernel: Any, plan: Plan, *args: Any, **constants: bool) -> None:
    with torch.cuda.device_of(args[0]):
        kernel[plan.grid](*args, *plan.sizes, **constants, **plan.blocks, **plan.options)


# --- Tensors --------------------------------------------------------------------------------------


def _shape(x: Tensor) -> Shape:
    """Return (N, C, P) as the kernels see a dense tensor."""
    c = x.shape[1]
    values = x.numel() // c if c else 0
    if channels_are_neighbours(x):
        return values, c, 1
    return x.shape[0], c, values // max(x.shape[0], 1)


def _beside(residual: Tensor | None, x: Tensor) -> Tensor | None:
    return None if residual is None else dense(residual, x)


def _new(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Return several vectors of float32, one value per channel."""
    return torch.empty(rows, x.shape[1], dtype=torch.float32, device=x.device).unbind()


def _new_statistics(x: Tensor) -> tuple[Moments, Tensor]:
    """Return moments and inv_std, to be filled."""
    mean, inv_std = _new(x, 2)
    m2 = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
    return Moments(x.numel() // x.shape[1], mean, m2), inv_std


def _partials(rows: int, plan: Plan, x: Tensor) -> Tensor:
    """Return the results of a reduction's splits, to be filled."""
    shape = (rows, plan.grid[1], x.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _contiguous(*vectors: Tensor | None) -> Vectors:
    return tuple(v if v is None else v.contiguous() for v in vectors)


def _moved(given: Vectors, used: Vectors) -> None:
    """Tell torch, which does not look into kernels, that running statistics have changed."""
    for to, at in zip(given, used, strict=True):
        if to is None or at is None:
            continue
        if to is not at:  # a copy, since the given one is not contiguous
            to.copy_(at)
        elif not to.is_inference():
            torch.autograd.graph.increment_version(to)


def _interpreted() -> bool:
    return not isinstance(kernels.normalize_kernel, triton.runtime.JITFunction)


tier = GpuKernels()
