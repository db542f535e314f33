"""The tier that needs torch alone: the reference, on whatever torch calls a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from bnlib import reference
from bnlib.kernels.base import Kernels
from bnlib.kernels.tensors import pack_mask
from bnlib.statistics import Moments


class PlainKernels(Kernels):
    name = "reference"
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    place = "on any device"

    def reaches(self, x: Tensor) -> bool:
        return True

    def supports(self, x: Tensor) -> bool:
        return True

    def _moments(self, x: Tensor) -> Moments:
        return reference.moments(x)

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
        y = reference.normalize(x, mean, inv_std, weight, bias)
        if residual is not None:
            y = y + residual
        if mask is not None:
            mask.copy_(pack_mask(~(y <= 0), x))  # NaN counts as positive, as in torch
        return torch.relu(y) if relu else y

    def _grad_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return reference.grad_sums(self.behind_relu(dy, mask, x), x, mean, inv_std)

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
        dy = self.behind_relu(dy, mask, x)
        if dresidual is not None:
            dresidual.copy_(dy)
        return reference.grad_input(dy, x, mean, inv_std, weight, sum_dy, sum_dy_x_hat, count)


tier = PlainKernels()
