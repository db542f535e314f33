"""The face of every tier: seven entries, documented, checked and composed once.

The four primitives are those of :mod:`bnlib.reference`, for torch tensors and with what a layer
``relu(bn(x) + residual)`` fuses. The three passes do two steps in one call, while the data is still
in the cache. A tier brings the loops, the methods that begin with an underscore: they get tensors
that have been checked, with the channels on axis 1, and none that is empty.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from bnlib import reference
from bnlib.kernels import tensors
from bnlib.kernels.tensors import check_layout, check_like, check_mask, check_plain, check_vectors
from bnlib.statistics import Moments


class Kernels(abc.ABC):
    """The entries of one tier.

    In all of them x has shape (N, C, ...) or its channels on ``channel_axis``, any strides, and
    one of the tier's ``dtypes``; 16-bit is computed in float32. What has one value per channel has
    shape (C,) and any real floating dtype.

    - ``residual``: added before the activation; shape and dtype of x.
    - ``relu``: apply ReLU.
    - ``mask``: from :meth:`empty_mask`. :meth:`normalize` fills it with the bits of y > 0 (or NaN);
      for the backward pass ``dy`` counts as 0 where it is 0. It needs ``relu``.
    - ``dresidual``: from :meth:`empty_like`, filled with the masked ``dy``; it needs ``mask``.
    - ``trusted``: the caller has checked all tensors, and the channels are on axis 1. Kernels read
      past the end of a tensor that is smaller than they are told.

    Every entry raises TypeError for what is no tensor, a dtype, or a subclass or layout that has
    its numbers elsewhere, and ValueError for a shape, a device or strides that do not fit.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    place: str  # where the tensors are, in the words of an error

    # --- The four primitives ----------------------------------------------------------------------

    def moments(self, x: Tensor, channel_axis: int = 1, *, trusted: bool = False) -> Moments:
        """Return count, mean and sum of squared deviations per channel: :func:`bnlib.moments`.

        Returns:
            :class:`~bnlib.Moments`, the mean of at least float32, m2 float64 where the device has
            it. NaN and infinity pass through.
        """
        if not trusted:
            self._check(x)
            x = _front(x, channel_axis)
        return self._moments(x) if x.numel() else reference.moments(x)

    def normalize(
        self,
        x: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        channel_axis: int = 1,
        *,
        residual: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
        trusted: bool = False,
    ) -> Tensor:
        """Return γ (x - mean) inv_std + β: :func:`bnlib.reference.normalize`, and what is fused.

        Returns:
            Tensor of the shape, dtype and memory format of ``x``.
        """
        if not trusted:
            self._check(x, residual=residual)
            x, residual = _front(x, channel_axis), _front(residual, channel_axis)
            self._check_channels(x, mask, mean=mean, inv_std=inv_std, weight=weight, bias=bias)
        if not x.numel():
            y = reference.normalize(x, mean, inv_std, weight, bias)
        else:
            y = self._normalize(x, mean, inv_std, weight, bias, residual, relu, mask)
        return _back(y, channel_axis)

    def grad_sums(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        channel_axis: int = 1,
        *,
        mask: Tensor | None = None,
        trusted: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return Σ dy and Σ dy x̂ per channel: :func:`bnlib.reference.grad_sums`.

        Returns:
            ``(sum_dy, sum_dy_x_hat)``, each of shape (C,) and at least float32.
        """
        if not trusted:
            self._check(x, dy=dy)
            x, dy = _front(x, channel_axis), _front(dy, channel_axis)
            self._check_channels(x, mask, mean=mean, inv_std=inv_std)
        if not x.numel():
            return reference.grad_sums(dy, x, mean, inv_std)
        return self._grad_sums(dy, x, mean, inv_std, mask)

    def grad_input(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        weight: Tensor | None,
        sum_dy: Tensor,
        sum_dy_x_hat: Tensor,
        count: int,
        channel_axis: int = 1,
        *,
        mask: Tensor | None = None,
        dresidual: Tensor | None = None,
        trusted: bool = False,
    ) -> Tensor:
        """Return the gradient with respect to the input: :func:`bnlib.reference.grad_input`.

        Returns:
            Tensor of the shape, dtype and memory format of ``x``.
        """
        if not trusted:
            self._check(x, dy=dy, dresidual=dresidual)
            x, dy = _front(x, channel_axis), _front(dy, channel_axis)
            dresidual = _front(dresidual, channel_axis)
            check_layout(x, dresidual)
            vectors = {"sum_dy": sum_dy, "sum_dy_x_hat": sum_dy_x_hat}
            self._check_channels(x, mask, mean=mean, inv_std=inv_std, weight=weight, **vectors)
        sums = (sum_dy, sum_dy_x_hat)
        if not x.numel():
            dx = reference.grad_input(dy, x, mean, inv_std, weight, *sums, count)
        else:
            dx = self._grad_input(
                dy, x, mean, inv_std, weight, *sums, max(count, 1), mask, dresidual
            )
        return _back(dx, channel_axis)

    # --- The passes: forward in training, forward in evaluation, backward -------------------------

    def moments_and_normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
        *,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        momentum: float = 0.0,
        trusted: bool = False,
    ) -> tuple[Tensor, Moments, Tensor]:
        """Return what the forward of training needs: :meth:`moments`, then :meth:`normalize`.

        Args:
            x, weight, bias, residual, relu, mask: as there; the channels on axis 1.
            eps: ε > 0.
            running_mean, running_var: moved in place by ``momentum`` towards the mean and the
                unbiased variance of the batch, or None.
            momentum: weight of this batch in the running statistics.

        Returns:
            ``(y, moments, inv_std)`` with inv_std = 1/√(m2/count + ε), shape (C,).
        """
        if not trusted:
            self._check(x, residual=residual)
            running = {"running_mean": running_mean, "running_var": running_var}
            self._check_channels(x, mask, weight=weight, bias=bias, **running)
        fused = self._moments_and_normalize if x.numel() else self._composed_forward
        return fused(
            x, weight, bias, eps, residual, relu, mask, running_mean, running_var, momentum
        )

    def inv_std_and_normalize(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
        relu: bool = False,
        mask: Tensor | None = None,
        *,
        trusted: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return what the forward of evaluation needs: :meth:`normalize` by a given variance.

        Args:
            x, mean, weight, bias, residual, relu, mask: as there; the channels on axis 1.
            var: σ², shape (C,).
            eps: ε >= 0.

        Returns:
            ``(y, inv_std)`` with inv_std = 1/√(σ² + ε), shape (C,).
        """
        if not trusted:
            self._check(x, residual=residual)
            self._check_channels(x, mask, mean=mean, var=var, weight=weight, bias=bias)
        fused = self._inv_std_and_normalize if x.numel() else self._composed_evaluation
        return fused(x, mean, var, weight, bias, eps, residual, relu, mask)

    def grad_sums_and_input(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        weight: Tensor | None,
        count: int,
        *,
        mask: Tensor | None = None,
        dresidual: Tensor | None = None,
        trusted: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx, sum_dy, sum_dy_x_hat: :meth:`grad_sums`, then :meth:`grad_input`."""
        if not trusted:
            self._check(x, dy=dy, dresidual=dresidual)
            check_layout(x, dresidual)
            self._check_channels(x, mask, mean=mean, inv_std=inv_std, weight=weight)
        fused = self._grad_sums_and_input if x.numel() else self._composed_backward
        return fused(dy, x, mean, inv_std, weight, max(count, 1), mask, dresidual)

    # --- What a tier brings -----------------------------------------------------------------------

    @abc.abstractmethod
    def reaches(self, x: Tensor) -> bool:
        """Return whether ``x`` is on the tier's device."""

    @abc.abstractmethod
    def _moments(self, x: Tensor) -> Moments: ...

    @abc.abstractmethod
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
    ) -> Tensor: ...

    @abc.abstractmethod
    def _grad_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    @abc.abstractmethod
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
    ) -> Tensor: ...

    # --- What a tier may bring: passes that it fuses, memory that it knows how to ask for ---------

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
        batch = self.moments(x, trusted=True)
        inv_std = inverse_std(batch, eps)
        y = self.normalize(
            x, batch.mean, inv_std, weight, bias,
            residual=residual, relu=relu, mask=mask, trusted=True,
        )  # fmt: skip
        move_running(running_mean, running_var, batch, momentum)
        return y, batch, inv_std

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
        inv_std = torch.rsqrt(var + eps)
        y = self.normalize(
            x, mean, inv_std, weight, bias, residual=residual, relu=relu, mask=mask, trusted=True
        )
        return y, inv_std

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
        sums = self.grad_sums(dy, x, mean, inv_std, mask=mask, trusted=True)
        dx = self.grad_input(
            dy, x, mean, inv_std, weight, *sums, count,
            mask=mask, dresidual=dresidual, trusted=True,
        )  # fmt: skip
        return dx, *sums

    _composed_forward = _moments_and_normalize
    _composed_evaluation = _inv_std_and_normalize
    _composed_backward = _grad_sums_and_input

    def empty_like(self, x: Tensor) -> Tensor:
        """Return an uninitialised tensor like ``x``, in the layout that the tier writes."""
        return torch.empty_like(tensors.dense(x))

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of :meth:`empty_mask`."""
        return tensors.mask_shape(x)

    def empty_mask(self, x: Tensor) -> Tensor:
        """Return an uninitialised ReLU mask for ``x``, uint8: a bit per element.

        Its layout is the tier's own business; :meth:`unpack_mask` knows it.
        """
        return torch.empty(self.mask_shape(x), dtype=torch.uint8, device=x.device)

    def unpack_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """Return the bool tensor of the shape of ``x`` that a mask stands for."""
        return tensors.unpack_mask(mask, x)

    def behind_relu(self, dy: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
        """Return the gradient at the input of the ReLU that filled ``mask``, or of none."""
        return dy if mask is None else torch.where(self.unpack_mask(mask, x), dy, 0)

    # --- Checks -----------------------------------------------------------------------------------

    def supports(self, x: Tensor) -> bool:
        """Return whether the tier takes ``x``."""
        return tensors.is_plain(x) and x.dtype in self.dtypes and self.reaches(x)

    def check_input(self, name: str, x: Any) -> None:
        """Raise unless the tier takes ``x``, giving it a name in the error."""
        if self.supports(x):
            return
        check_plain(**{name: x})
        *most, last = (str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        raise (ValueError if x.dtype in self.dtypes else TypeError)(
            f"expected {name} of {', '.join(most)} or {last} {self.place} for "
            f"backend={self.name!r}, got {x.dtype} on {x.device}"
        )

    def _check(self, x: Tensor, **like: Tensor | None) -> None:
        self.check_input("x", x)
        if x.dim() < 2:
            raise ValueError(f"expected x of rank >= 2 (N, C, ...), got shape {tuple(x.shape)}")
        check_like(x, **like)

    def _check_channels(self, x: Tensor, mask: Tensor | None, **vectors: Tensor | None) -> None:
        check_vectors(x, **vectors)
        check_mask(x, mask, self.mask_shape(x))


def _front(t: Any, channel_axis: int) -> Any:
    return t if channel_axis == 1 or t is None else t.movedim(channel_axis, 1)


def _back(t: Tensor, channel_axis: int) -> Tensor:
    return t if channel_axis == 1 else t.movedim(1, channel_axis)


def inverse_std(batch: Moments, eps: float) -> Tensor:
    """Return 1/√(σ² + ε) per channel, in the dtype of the mean."""
    return torch.rsqrt(batch.m2 / max(batch.count, 1) + eps).to(batch.mean.dtype)


def move_running(
    running_mean: Tensor | None, running_var: Tensor | None, batch: Moments, momentum: float
) -> None:
    """Move the running statistics, if there are any, in place towards those of a batch."""
    if running_mean is None or running_var is None or batch.count == 0:
        return
    move(running_mean, batch.mean, momentum)
    move(running_var, batch.var(correction=1), momentum)


@torch.no_grad()
def move(running: Tensor, new: Tensor, momentum: float) -> None:
    """Set ``running`` to (1 - momentum) running + momentum new, computed in the wider dtype."""
    wide = torch.promote_types(running.dtype, new.dtype)
    running.copy_((1 - momentum) * running.to(wide) + momentum * new.detach())
