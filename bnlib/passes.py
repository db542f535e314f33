"""Forward and backward of the layer by any tier: in training or evaluation, alone or over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bnlib.kernels.base import Kernels, inverse_std, move_running
from bnlib.kernels.tensors import channels_are_neighbours
from bnlib.statistics import Moments


class Forward(NamedTuple):
    """What comes out of the forward pass.

    Attributes:
        y: the output.
        mean: shape (C,), what was subtracted.
        inv_std: shape (C,), 1/√(σ² + ε).
        mask: of the ReLU, if it was to be kept.
        batch: the batch's moments in training, None in evaluation.
    """

    y: Tensor
    mean: Tensor
    inv_std: Tensor
    mask: Tensor | None
    batch: Moments | None


def forward(
    kernels: Kernels,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | Callable[[int], float],
    eps: float,
    relu: bool,
    keep_mask: bool,
    group: torch.distributed.ProcessGroup | None = None,
    *,
    trusted: bool = False,
) -> Forward:
    """Normalise; in training the running statistics move.

    Where ranks share their statistics, ``momentum`` may be a function of the count of them all.
    """
    mask = kernels.empty_mask(x) if keep_mask else None
    fused = (residual, relu, mask)
    if not training:
        assert running_mean is not None and running_var is not None  # the caller has seen to it
        mean, var = _widen(running_mean), _widen(running_var)
        y, inv_std = kernels.inv_std_and_normalize(
            x, mean, var, weight, bias, eps, *fused, trusted=trusted
        )
        return Forward(y, mean, inv_std, mask, None)
    if group is None:
        assert not callable(momentum)
        y, batch, inv_std = kernels.moments_and_normalize(
            x, weight, bias, eps, *fused,
            running_mean=running_mean, running_var=running_var, momentum=momentum, trusted=trusted,
        )  # fmt: skip
        return Forward(y, batch.mean, inv_std, mask, batch)
    from bnlib.distributed import sync_moments

    batch = sync_moments(kernels.moments(x, trusted=trusted), group)
    if batch.count == 1:
        raise ValueError("expected more than 1 value per channel over all ranks in training, got 1")
    inv_std = inverse_std(batch, eps)
    y = kernels.normalize(
        x, batch.mean, inv_std, weight, bias,
        residual=residual, relu=relu, mask=mask, trusted=trusted,
    )  # fmt: skip
    weight_of_batch = momentum(batch.count) if callable(momentum) else momentum
    move_running(running_mean, running_var, batch, weight_of_batch)
    return Forward(y, batch.mean, inv_std, mask, batch)


def as_masked(kernels: Kernels, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` in the layout that it had when its mask was filled, whatever it has now."""
    if mask is None or mask.shape == kernels.mask_shape(x):
        return x
    if channels_are_neighbours(x):
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def backward(
    kernels: Kernels,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    mask: Tensor | None,
    count: int | None,
    need_x: bool,
    need_sums: bool,
    need_residual: bool,
    group: torch.distributed.ProcessGroup | None = None,
    *,
    trusted: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, sum_dy, sum_dy_x_hat and dresidual, those that are needed.

    ``count`` is None where the statistics are constants: in evaluation.
    """
    if mask is not None and (count is None or not need_x):
        dy, mask = kernels.behind_relu(dy, mask, x), None
    dresidual = None
    if need_residual:
        dresidual = dy if mask is None else kernels.empty_like(x)
    filled = None if mask is None else dresidual
    if need_x and count is not None and group is None:
        out = kernels.grad_sums_and_input(
            dy, x, mean, inv_std, weight, count, mask=mask, dresidual=filled, trusted=trusted
        )
        return *out, dresidual
    sum_dy = sum_dy_x_hat = dx = None
    if need_sums or (need_x and count is not None):
        sum_dy, sum_dy_x_hat = kernels.grad_sums(dy, x, mean, inv_std, mask=mask, trusted=trusted)
        if need_x and count is not None:
            from bnlib.distributed import sync_sum

            total_dy, total_dy_x_hat = sum_dy, sum_dy_x_hat
            if group is not None:
                total_dy, total_dy_x_hat = sync_sum(torch.stack((sum_dy, sum_dy_x_hat)), group)
            dx = kernels.grad_input(
                dy, x, mean, inv_std, weight, total_dy, total_dy_x_hat, count,
                mask=mask, dresidual=filled, trusted=trusted,
            )  # fmt: skip
    if need_x and count is None:
        dx = kernels.normalize(dy, torch.zeros_like(mean), inv_std, weight, trusted=trusted)
    return dx, sum_dy, sum_dy_x_hat, dresidual


def _widen(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
