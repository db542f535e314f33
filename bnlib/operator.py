"""The layer as an operator, ``bnlib::batch_norm``, for those who record operations.

torch.compile and export can put it into their graphs. An operator may not change its inputs if it
is to have a gradient, return nothing, or return two views of one tensor: so the running statistics
move outside, statistics per channel are one tensor, and an empty one stands for what is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnlib import passes
from bnlib.kernels import Kernels, load
from bnlib.kernels.base import move
from bnlib.kernels.choose import FAST
from bnlib.kernels.tensors import check_count, check_layer, check_like, dense


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    training: bool,
    momentum: float,
    eps: float,
    backend: str,
) -> Tensor:
    """The layer by the kernels of a backend, in a form that torch.compile and export can record."""
    leaves = (x, weight, bias, residual)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    tensors = (x, running_mean, running_var, weight, bias, residual)
    y, statistics, _ = forward(*tensors, training, eps, relu, relu and needs_grad, backend)
    if training:
        for running, new in ((running_mean, statistics[0]), (running_var, statistics[1])):
            if running is not None:
                move(running, new, momentum)
    return y


@torch.library.custom_op("bnlib::batch_norm", mutates_args=())
def forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    keep_mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the rows mean, unbiased variance and inv_std, and the mask.

    The running statistics stay as they are.
    """
    kernels = _kernels(backend)
    given = (x, running_mean, running_var, weight, bias)
    check_layer(*given, training, eps, residual, "relu" if relu else None)
    if training:
        check_count(x)
    x = dense(x)
    running = (None, None) if training else (running_mean, running_var)
    tensors = (x, *running, weight, bias, residual)
    y, mean, inv_std, mask, batch = passes.forward(
        kernels, *tensors, training, 0.0, eps, relu, keep_mask
    )
    var = batch.var(correction=1) if batch is not None and batch.count else torch.zeros_like(mean)
    statistics = torch.stack((mean, var, inv_std)).to(_widened(x))
    return dense(y, x), statistics, _nothing(x) if mask is None else mask


@forward.register_fake
def _(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    keep_mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    statistics = x.new_empty((3, x.shape[1]), dtype=_widened(x))
    mask = _kernels(backend).empty_mask(x) if keep_mask else _nothing(x)
    return torch.empty_like(x), statistics, mask


@torch.library.custom_op("bnlib::batch_norm_backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
    training: bool,
    need_x: bool,
    need_sums: bool,
    need_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, the rows sum_dy and sum_dy_x_hat, and dy behind the ReLU; empty if not needed."""
    if x.dim() < 2 or statistics.shape != (3, x.shape[1]):
        raise ValueError(
            "expected input of shape (N, C, ...) and statistics of shape (3, C), got shapes "
            f"{tuple(x.shape)} and {tuple(statistics.shape)}"
        )
    check_like(x, dy=dy)
    kernels, (mean, _, inv_std) = _kernels(backend), statistics
    x = dense(passes.as_masked(kernels, x, mask))
    saved = (x, weight, mean, inv_std, mask, x.numel() // max(x.shape[1], 1) if training else None)
    needs = (need_x, need_sums, need_residual)
    dx, sum_dy, sum_dy_x_hat, dresidual = passes.backward(kernels, dy, *saved, *needs)
    sums = _nothing(statistics)
    if need_sums and sum_dy is not None and sum_dy_x_hat is not None:
        sums = torch.stack((sum_dy, sum_dy_x_hat))
    return (
        _nothing(x) if dx is None else dense(dx, x),
        sums,
        _nothing(x) if dresidual is None else dense(dresidual, x),
    )


@backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
    training: bool,
    need_x: bool,
    need_sums: bool,
    need_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    return (
        torch.empty_like(x) if need_x else _nothing(x),
        torch.empty_like(statistics[:2]) if need_sums else _nothing(statistics),
        torch.empty_like(x) if need_residual else _nothing(x),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, weight, _, _, training, _, _, keep_mask, backend = inputs
    _, statistics, mask = output
    ctx.save_for_backward(x, weight, statistics, mask if keep_mask else None)
    ctx.training, ctx.backend = training, backend


def _differentiate(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Any, ...]:
    x, weight, statistics, mask = ctx.saved_tensors
    need_x, _, _, need_weight, need_bias, need_residual = ctx.needs_input_grad[:6]
    masked = need_residual and mask is not None
    needs = (need_x, need_weight or need_bias, masked)
    dx, sums, dresidual = backward(
        dy, x, weight, statistics, mask, ctx.training, *needs, ctx.backend
    )
    return (
        dx if need_x else None,
        *(None, None),
        sums[1] if need_weight else None,  # autograd casts it to the dtype of the weight
        sums[0] if need_bias else None,
        (dresidual if masked else dy) if need_residual else None,
        *(None,) * 5,
    )


forward.register_autograd(_differentiate, setup_context=_save)


def _kernels(backend: str) -> Kernels:
    if backend not in FAST:
        raise ValueError(f"expected a backend of {FAST}, got {backend!r}")
    return load(backend)


def _nothing(like: Tensor) -> Tensor:
    """The mask or gradient that is not needed."""
    return like.new_empty(0)


def _widened(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
