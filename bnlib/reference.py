"""Batch normalization as formulas, for any array-API array: the primitives, the layer, siblings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bnlib.axes import checked_axes, expand, per_channel, reduction_axes
from bnlib.statistics import Moments, at_least_float32, floating_namespace
from bnlib.statistics import moments as moments  # the first primitive, re-exported with the others


class Cache(NamedTuple):
    """What :func:`batch_norm_forward` keeps for :func:`batch_norm_backward`.

    Attributes:
        x: the input itself, not a copy: do not write into it before the backward pass.
        mean: shape (C,), the mean that was subtracted.
        inv_std: shape (C,), 1/√(σ² + ε).
        weight: γ as given, shape (C,) or None.
        bias: β as given, shape (C,) or None.
        moments: the batch's :class:`~bnlib.Moments` in training, None in evaluation.
        channel_axis: the input's channel axis.
    """

    x: Any
    mean: Any
    inv_std: Any
    weight: Any
    bias: Any
    moments: Moments | None
    channel_axis: int


class Grads(NamedTuple):
    """Gradients of the loss.

    Attributes:
        dx: shape and dtype of x.
        dweight: shape (C,), dtype of weight; None if there is no weight.
        dbias: shape (C,), dtype of bias; None if there is no bias.
    """

    dx: Any
    dweight: Any
    dbias: Any


def normalize(
    x: Any, mean: Any, inv_std: Any, weight: Any = None, bias: Any = None, channel_axis: int = 1
) -> Any:
    """Return the input normalised, scaled and shifted per channel.

    ::

        y = γ (x - mean) inv_std + β

    Args:
        x: array of rank >= 2, real floating.
        mean: shape (C,), at least float32.
        inv_std: shape (C,), dtype of ``mean``.
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        channel_axis: the input's channel axis.

    Returns:
        Array of the shape and dtype of ``x``; computed in at least float32.

    Source: Ioffe & Szegedy (2015), algorithm 1. Derived in *Forward, and what ε does*.
    """
    xp = floating_namespace(x=x, mean=mean, inv_std=inv_std, weight=weight, bias=bias)
    y = _x_hat(xp, x, mean, inv_std, channel_axis)
    if weight is not None:
        y = y * _broadcast(xp, weight, y, channel_axis)
    if bias is not None:
        y = y + _broadcast(xp, bias, y, channel_axis)
    return xp.astype(y, x.dtype, copy=False)


def grad_sums(dy: Any, x: Any, mean: Any, inv_std: Any, channel_axis: int = 1) -> tuple[Any, Any]:
    """Return the two sums per channel from which every gradient follows.

    ::

        sum_dy       = Σ dy          (= dβ)
        sum_dy_x_hat = Σ dy x̂        (= dγ),   x̂ = (x - mean) inv_std

    Args:
        dy: gradient with respect to the output, shape of ``x``.
        x: the forward's input.
        mean: shape (C,).
        inv_std: shape (C,).
        channel_axis: the input's channel axis.

    Returns:
        ``(sum_dy, sum_dy_x_hat)``, each of shape (C,) and at least float32.

    Source: Ioffe & Szegedy (2015), section 3. Derived in *Backward*.
    """
    xp = floating_namespace(dy=dy, x=x, mean=mean, inv_std=inv_std)
    axes = reduction_axes(x.ndim, channel_axis)
    x_hat = _x_hat(xp, x, mean, inv_std, channel_axis)
    dy = at_least_float32(xp, dy)
    return xp.sum(dy, axis=axes), xp.sum(dy * x_hat, axis=axes)


def grad_input(
    dy: Any,
    x: Any,
    mean: Any,
    inv_std: Any,
    weight: Any,
    sum_dy: Any,
    sum_dy_x_hat: Any,
    count: int,
    channel_axis: int = 1,
) -> Any:
    """Return the gradient with respect to the input, in training.

    ::

        dx = γ inv_std (dy - sum_dy/m - x̂ sum_dy_x_hat/m),   m = count

    Args:
        dy: gradient with respect to the output, shape of ``x``.
        x: the forward's input.
        mean: shape (C,).
        inv_std: shape (C,).
        weight: γ, shape (C,), or None for 1.
        sum_dy: shape (C,), summed over the whole (synchronised) batch.
        sum_dy_x_hat: shape (C,), likewise.
        count: values per channel in the whole batch.
        channel_axis: the input's channel axis.

    Returns:
        Array of the shape and dtype of ``x``.

    Source: Ioffe & Szegedy (2015), section 3, collected. Derived in *Backward*.
    """
    vectors = {"mean": mean, "inv_std": inv_std, "weight": weight}
    sums = {"sum_dy": sum_dy, "sum_dy_x_hat": sum_dy_x_hat}
    xp = floating_namespace(dy=dy, x=x, **vectors, **sums)
    x_hat = _x_hat(xp, x, mean, inv_std, channel_axis)
    count = max(count, 1)  # an empty batch has nothing to correct, and nothing to divide
    dx = (
        at_least_float32(xp, dy)
        - per_channel(sum_dy / count, x.ndim, channel_axis)
        - x_hat * per_channel(sum_dy_x_hat / count, x.ndim, channel_axis)
    )
    return xp.astype(dx * _scale(xp, inv_std, weight, x.ndim, channel_axis), x.dtype, copy=False)


def batch_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    running_mean: Any = None,
    running_var: Any = None,
    training: bool = True,
    eps: float = 1e-5,
    channel_axis: int = 1,
) -> tuple[Any, Cache]:
    """Normalise every channel of ``x``, then scale by γ and shift by β.

    ::

        y = γ (x - μ) / √(σ² + ε) + β

    In training μ and σ² are the batch's mean and *biased* variance over every axis but the
    channel axis; in evaluation they are ``running_mean`` and ``running_var``.

    Args:
        x: array of rank >= 2, real floating, any array-API library; C is its length along
            ``channel_axis``. NaN and infinity pass through to all of their channel. An empty
            batch gives an empty output.
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        running_mean: shape (C,); needed in evaluation, not read in training.
        running_var: shape (C,), likewise.
        training: take the statistics of the batch (True) or the running ones (False).
        eps: ε, in the square of the input's unit; > 0 in training, >= 0 in evaluation.
        channel_axis: 1 as in PyTorch, -1 as in Keras and Flax.

    Returns:
        ``(y, cache)``: y with the shape and dtype of ``x``, statistics and arithmetic in at least
        float32; the :class:`Cache` is for :func:`batch_norm_backward`, and in training its
        ``moments`` are for :func:`update_running_stats`.

    Raises:
        TypeError: not arrays, mixed array libraries, or a dtype that is not real floating.
        ValueError: rank < 2; channel axis out of range; a parameter whose shape is not (C,); one
            value per channel in training; evaluation without running statistics; ``eps`` out of
            range.

    Source: Ioffe & Szegedy (2015), algorithms 1 and 2. Derived in *Forward, and what ε does*.

    Examples:
        >>> import numpy as np
        >>> y, cache = batch_norm_forward(np.array([[1.0, 10.0], [3.0, 30.0]]), eps=1e-12)
        >>> y
        array([[-1., -1.],
               [ 1.,  1.]])
    """
    xp = floating_namespace(
        x=x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    reduction_axes(x.ndim, channel_axis)  # raises for a rank or channel axis that makes no sense
    channels = x.shape[channel_axis]
    given = {"weight": weight, "bias": bias}
    given |= {"running_mean": running_mean, "running_var": running_var}
    for name, value in given.items():
        if value is not None and tuple(value.shape) != (channels,):
            raise ValueError(
                f"expected {name} of shape ({channels},) for input of shape {tuple(x.shape)} with "
                f"channel_axis={channel_axis}, got shape {tuple(value.shape)}"
            )
    if not (eps > 0 if training else eps >= 0):
        raise ValueError(f"expected eps {'> 0 in training' if training else '>= 0'}, got {eps}")

    batch = None
    if training:
        batch = moments(x, channel_axis)
        if batch.count == 1:
            raise ValueError(
                "expected more than 1 value per channel in training, "
                f"got input of shape {tuple(x.shape)}"
            )
        mean, var = batch.mean, batch.m2 / max(batch.count, 1)
    else:
        if running_mean is None or running_var is None:
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(f"expected running statistics in evaluation, got {missing}=None")
        mean, var = at_least_float32(xp, running_mean), at_least_float32(xp, running_var)
    # A NumPy float64 would promote float32; the variance of a float32 batch may be beyond float32.
    inv_std = xp.astype(1 / xp.sqrt(var + float(eps)), mean.dtype, copy=False)
    y = normalize(x, mean, inv_std, weight, bias, channel_axis)
    return y, Cache(x, mean, inv_std, weight, bias, batch, channel_axis)


def batch_norm_backward(dy: Any, cache: Cache) -> Grads:
    """Return the gradients of the loss with respect to x, γ and β.

    ::

        training:    dx = (γ inv_std / m) (m dy - dβ - x̂ dγ)
        evaluation:  dx = γ inv_std dy          (the statistics are constants)
        both:        dβ = Σ dy,  dγ = Σ dy x̂

    Args:
        dy: gradient with respect to the output, shape of the forward's input.
        cache: what :func:`batch_norm_forward` returned.

    Returns:
        :class:`Grads`; the sums are taken in at least float32.

    Raises:
        TypeError: ``dy`` is of another library or has a dtype that is not real floating.
        ValueError: ``dy`` has not the input's shape.

    Source: Ioffe & Szegedy (2015), section 3, collected. Derived in *Backward*.
    """
    x, mean, inv_std, weight, bias, batch, channel_axis = cache
    xp = floating_namespace(dy=dy, x=x)
    if dy.shape != x.shape:
        raise ValueError(f"expected dy of shape {tuple(x.shape)}, got {tuple(dy.shape)}")
    sum_dy, sum_dy_x_hat = grad_sums(dy, x, mean, inv_std, channel_axis)
    if batch is None:
        dx = at_least_float32(xp, dy) * _scale(xp, inv_std, weight, x.ndim, channel_axis)
        dx = xp.astype(dx, x.dtype, copy=False)
    else:
        sums = (sum_dy, sum_dy_x_hat, batch.count)
        dx = grad_input(dy, x, mean, inv_std, weight, *sums, channel_axis)
    return Grads(
        dx,
        None if weight is None else xp.astype(sum_dy_x_hat, weight.dtype, copy=False),
        None if bias is None else xp.astype(sum_dy, bias.dtype, copy=False),
    )


def update_running_stats(
    running_mean: Any, running_var: Any, moments: Moments, momentum: float
) -> tuple[Any, Any]:
    """Return the running statistics after one more batch, without changing the old ones.

    ::

        new = (1 - momentum) old + momentum batch

    with the batch's mean and its *unbiased* variance, as PyTorch does.

    Nothing is detached from an autograd graph: in PyTorch call this under ``torch.no_grad()``, or
    the running statistics keep every past batch in memory.

    Args:
        running_mean: shape (C,), real floating.
        running_var: shape (C,), likewise.
        moments: the batch's :class:`~bnlib.Moments`, of count 0 (then nothing changes) or >= 2.
        momentum: weight of the new batch, in 0..1 (PyTorch's convention; Keras and Flax give the
            weight of the old value).

    Returns:
        ``(new_mean, new_var)`` with the dtypes of the old ones, which are not written to.

    Raises:
        TypeError: mixed array libraries, or a dtype that is not real floating.
        ValueError: shapes differ, ``momentum`` is out of range, or the batch has 1 value per
            channel, which has no unbiased variance.

    Source: Ioffe & Szegedy (2015), algorithm 2. Derived in *Forward, and what ε does*.
    """
    xp = floating_namespace(running_mean=running_mean, running_var=running_var, mean=moments.mean)
    shapes = {tuple(v.shape) for v in (running_mean, running_var, moments.mean)}
    if len(shapes) > 1:
        raise ValueError(
            f"expected running_mean and running_var of shape {tuple(moments.mean.shape)}, "
            f"got {tuple(running_mean.shape)} and {tuple(running_var.shape)}"
        )
    if momentum is None or not 0 <= momentum <= 1:
        raise ValueError(f"expected momentum in 0..1, got {momentum}")
    if moments.count == 0:
        return xp.astype(running_mean, running_mean.dtype), xp.astype(
            running_var, running_var.dtype
        )

    def move(old: Any, new: Any) -> Any:
        mixed = (1 - momentum) * at_least_float32(xp, old) + momentum * new
        return xp.astype(mixed, old.dtype, copy=False)

    return move(running_mean, moments.mean), move(running_var, moments.var(correction=1))


def standardize(x: Any, axes: int | Sequence[int], eps: float = 1e-5, center: bool = True) -> Any:
    """Subtract the mean and divide by the standard deviation, both taken over any choice of axes.

    ::

        x_hat = (x - mean) / √(σ² + ε)          center=True
        x_hat = x / √(mean² + σ² + ε)           center=False; mean² + σ² is the mean of x²

    with the biased variance σ². One operator is all the siblings of batch normalization, before
    γ and β; see the examples.

    Args:
        x: array of rank >= 1, real floating, any array-API library. NaN and infinity pass through
            to all of their group. An empty array gives an empty one.
        axes: the axis or axes over which mean and variance are taken: for named norms those of
            :func:`reduction_axes`.
        eps: ε, in the square of the input's unit; > 0.
        center: False leaves the mean where it is, as RMSNorm does.

    Returns:
        Array of the shape and dtype of ``x``; statistics and arithmetic in at least float32. A
        group of one value becomes 0, or with ``center=False`` about its sign.

    Raises:
        TypeError: ``x`` is not an array, its dtype is not real floating, or ``axes`` are not
            integers.
        ValueError: ``axes`` that are none, out of range or not all different; ``eps`` <= 0.

    Source: Wu & He (2018), section 3; without the mean, Zhang & Sennrich (2019). Derived in
    *Siblings: layer, instance, group norm*

    Examples:
        >>> import numpy as np
        >>> from bnlib import reduction_axes, split_groups
        >>> x = np.arange(16.0).reshape(2, 4, 2)
        >>> batch = standardize(x, reduction_axes(3))
        >>> layer = standardize(x, reduction_axes(3, norm="layer"))
        >>> instance = standardize(x, reduction_axes(3, norm="instance"))
        >>> group = standardize(split_groups(x, 2), (2, 3)).reshape(x.shape)
        >>> rms = standardize(x, -1, center=False)
        >>> instance[0, 0].round(3), rms[0, 0].round(3)
        (array([-1.,  1.]), array([0.   , 1.414]))
    """
    xp = floating_namespace(x=x)
    if not eps > 0:
        raise ValueError(f"expected eps > 0, got {eps}")
    axes = checked_axes(axes, x.ndim)
    count, mean, m2 = moments(x, axes=axes)
    square = m2 / max(count, 1)
    y = at_least_float32(xp, x)
    if center:
        y = y - expand(mean, axes)
    else:
        square = square + xp.astype(mean, m2.dtype, copy=False) ** 2
    inv_std = xp.astype(1 / xp.sqrt(square + float(eps)), mean.dtype, copy=False)
    return xp.astype(y * expand(inv_std, axes), x.dtype, copy=False)


def _broadcast(xp: Any, v: Any, like: Any, channel_axis: int) -> Any:
    """One value per channel, in the dtype and rank of ``like``."""
    return per_channel(xp.astype(v, like.dtype, copy=False), like.ndim, channel_axis)


def _x_hat(xp: Any, x: Any, mean: Any, inv_std: Any, channel_axis: int) -> Any:
    x = at_least_float32(xp, x)
    return (x - _broadcast(xp, mean, x, channel_axis)) * _broadcast(xp, inv_std, x, channel_axis)


def _scale(xp: Any, inv_std: Any, weight: Any, ndim: int, channel_axis: int) -> Any:
    """γ inv_std, ready to broadcast."""
    if weight is not None:
        inv_std = inv_std * xp.astype(weight, inv_std.dtype, copy=False)
    return per_channel(inv_std, ndim, channel_axis)
