"""Count, mean and sum of squared deviations of every channel, and how two sets of them merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from bnlib.axes import checked_axes, expand, reduction_axes


class Moments(NamedTuple):
    """Number of values, mean and sum of squared deviations from it, per channel (or group).

    ::

        count = m
        mean  = (1/m) Σ x
        m2    = Σ (x - mean)²

    These three, unlike a mean and a variance, are enough to merge the statistics of parts into
    those of the whole (:func:`merge`).

    Attributes:
        count: values per channel, an ``int``; 0 for an empty part, whose mean and m2 are 0.
        mean: shape (C,), or that of the axes that :func:`moments` kept; at least float32.
        m2: shape of ``mean``, >= 0, in the square of the input's unit; float64, where the library
            has it: a sum of squares leaves the range of float32 long before the variance does.

    Source: Chan, Golub & LeVeque (1983). Derived in *Forward, and what ε does*.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which no one misses here
    mean: Any
    m2: Any

    def var(self, correction: int = 0) -> Any:
        """Return the variance ``m2 / (count - correction)`` of every channel.

        Args:
            correction: 0 for the biased variance, with which batch norm normalises; 1 for the
                unbiased one, which PyTorch keeps in ``running_var``.

        Returns:
            Array of the shape and dtype of ``mean``.

        Raises:
            ValueError: ``count <= correction``, for which the variance is not defined.
        """
        if self.count <= correction:
            raise ValueError(
                f"expected more than {correction} values per channel for the variance with "
                f"correction={correction}, got count={self.count}"
            )
        var = self.m2 / int(self.count - correction)  # a NumPy integer would promote float32
        return array_namespace(var).astype(var, self.mean.dtype, copy=False)


def moments(x: Any, channel_axis: int = 1, *, axes: int | Sequence[int] | None = None) -> Moments:
    """Return count, mean and sum of squared deviations of every channel of ``x``, or over any axes.

    Two passes, never ``E[x²] - E[x]²``, which cancels where the mean is large. The deviations d
    from the rounded mean do not quite sum to 0; what is left corrects both results::

        d = x - mean(x);  mean = mean(x) + mean(d);  m2 = Σ (d - mean(d))²

    Args:
        x: array of rank >= 2 with a real floating dtype, any array-API library. NaN and infinity
            pass through to their channel's statistics.
        channel_axis: the axis that is kept; not read if ``axes`` are given.
        axes: the axis or axes to reduce instead, of a rank >= 1; those of the siblings are
            :func:`reduction_axes` with another ``norm``.

    Returns:
        :class:`Moments` of shape (C,), or of the lengths of the axes that are kept, in their order:
        the mean float64 for float64 input, else float32 (so for 16-bit input); m2 in the widest
        dtype of the library and the device.

    Raises:
        TypeError: ``x`` is not an array, its dtype is not real floating, or it is a NumPy masked
            array, whose channels would each need a count of their own; ``axes`` that are not
            integers.
        ValueError: rank < 2 or ``channel_axis`` out of range; ``axes`` that are none, out of range
            or not all different.

    Source: Chan, Golub & LeVeque (1983), equation 1.7 (corrected two-pass), with the correction
    inside the square, where rounding cannot make m2 negative. Derived in *Forward, and what ε
    does*.

    Examples:
        >>> import numpy as np
        >>> moments(np.arange(8.0).reshape(2, 2, 2))
        Moments(count=4, mean=array([2.5, 4.5]), m2=array([17., 17.]))
        >>> moments(np.arange(8.0).reshape(2, 2, 2), axes=(1, 2)).mean  # of every sample
        array([1.5, 5.5])
    """
    xp = floating_namespace(x=x)
    axes = reduction_axes(x.ndim, channel_axis) if axes is None else checked_axes(axes, x.ndim)
    count = math.prod(x.shape[axis] for axis in axes)
    x = at_least_float32(xp, x)
    wide = _widest(xp, x)
    if count == 0:
        return Moments(0, xp.sum(x, axis=axes), xp.sum(x, axis=axes, dtype=wide))

    def mean_of(v: Any) -> Any:
        # Libraries may add one by one: in float32 a constant would not be its own mean.
        return xp.astype(xp.sum(v, axis=axes, dtype=wide) / count, x.dtype, copy=False)

    mean = mean_of(x)
    d = x - expand(mean, axes)
    rest = mean_of(d)
    d = xp.astype(d - expand(rest, axes), wide, copy=False)
    return Moments(count, mean + rest, xp.sum(d * d, axis=axes))


def merge(*parts: Moments) -> Moments:
    """Return the moments of the union of several parts.

    ::

        n  = Σ nᵢ
        mean = mean₁ + Σ (nᵢ/n) (meanᵢ - mean₁)
        m2 = Σ [m2ᵢ + nᵢ (meanᵢ - mean)²]

    which for two parts is Chan's ``m2₁ + m2₂ + δ² n₁ n₂ / n``. The parts' variances are never
    averaged: that loses the spread between the parts' means.

    Args:
        *parts: at least one :class:`Moments`, all with means of the same shape (C,). Parts with
            count 0 are allowed and change nothing.

    Returns:
        :class:`Moments` of all values together, in the parts' dtypes.

    Raises:
        TypeError: something that is not :class:`Moments`, or parts from different array libraries.
        ValueError: no parts, or parts with different numbers of channels.

    Source: Chan, Golub & LeVeque (1983), equation 2.1. Derived in *Forward, and what ε does*.

    Examples:
        >>> import numpy as np
        >>> x = np.arange(12.0).reshape(6, 2)
        >>> merge(moments(x[:1]), moments(x[1:]))
        Moments(count=6, mean=array([5., 6.]), m2=array([70., 70.]))
    """
    if not parts:
        raise ValueError("expected at least one Moments to merge, got none")
    for part in parts:
        if not isinstance(part, Moments):
            raise TypeError(f"expected Moments, as in merge(a, b), got {type(part).__name__}")
    xp = floating_namespace(**{f"parts[{i}].mean": part.mean for i, part in enumerate(parts)})
    shapes = sorted({tuple(part.mean.shape) for part in parts})
    if len(shapes) > 1:
        raise ValueError(f"expected parts with the same channels, got means of shapes {shapes}")
    # int: the float64 of a NumPy integer's quotient would promote float32 means
    filled = [(int(part.count), part.mean, part.m2) for part in parts if part.count > 0]
    if not filled:
        return parts[0]
    count = sum(n for n, _, _ in filled)
    first = filled[0][1]
    mean = first + sum((n / count) * (part_mean - first) for n, part_mean, _ in filled)
    m2 = sum(
        part_m2 + n * xp.astype(part_mean - mean, part_m2.dtype) ** 2
        for n, part_mean, part_m2 in filled
    )
    return Moments(count, mean, m2)


def floating_namespace(**arrays: Any) -> Any:
    """Return the array-API namespace that the named arrays share; all but the first may be None.

    Raises:
        TypeError: not arrays, arrays of different libraries, or a dtype that is not real floating.
    """
    first = next(iter(arrays))
    given = {name: a for name, a in arrays.items() if name == first or a is not None}
    try:
        xp = array_namespace(*given.values())
        # array_namespace() lets None and Python's numbers pass, which have no dtype.
        dtypes = {name: array.dtype for name, array in given.items()}
    except (TypeError, AttributeError):
        kinds = ", ".join(
            f"{name}: {type(a).__module__}.{type(a).__qualname__}" for name, a in given.items()
        )
        raise TypeError(f"expected arrays of one array-API library, got {kinds}") from None
    for name, array in given.items():
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"expected {name} without a mask, got a masked array: its channels would have "
                "different counts of values"
            )
    for name, dtype in dtypes.items():
        if not xp.isdtype(dtype, "real floating"):
            raise TypeError(f"expected {name} with a real floating dtype, got {dtype}")
    return xp


def at_least_float32(xp: Any, x: Any) -> Any:
    """Return ``x``, or its float32 copy if its dtype has fewer than 32 bits."""
    return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x


def _widest(xp: Any, x: Any) -> Any:
    """Return float64, or the dtype of ``x`` where its library or its device has no such thing."""
    kinds = xp.__array_namespace_info__().dtypes(device=x.device, kind="real floating")
    return kinds.get("float64", x.dtype)
