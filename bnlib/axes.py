"""Which axes batch normalization reduces: the one definition that everything else calls."""

from __future__ import annotations

import operator
from typing import Any

from array_api_compat import array_namespace


def reduction_axes(ndim: int, channel_axis: int = 1) -> tuple[int, ...]:
    """Return the axes over which batch normalization takes its mean and variance.

    Every axis but the channel axis is reduced::

        reduction_axes(ndim, c) = (0, 1, ..., ndim - 1) without c

    Args:
        ndim: rank of the input, at least 2 (samples and channels).
        channel_axis: the axis that is kept, in ``-ndim .. ndim - 1``. 1 in PyTorch and ONNX
            (N, C, H, W), -1 in Keras and Flax (N, H, W, C).

    Returns:
        The reduced axes, ascending and non-negative.

    Raises:
        TypeError: ``ndim`` or ``channel_axis`` is not an integer.
        ValueError: ``ndim < 2``, or ``channel_axis`` is out of range.

    Source: Ioffe & Szegedy (2015), section 3.2. Derived in *Which axes?*

    Examples:
        >>> reduction_axes(4)          # N, C, H, W: over N, H and W
        (0, 2, 3)
        >>> reduction_axes(4, -1)      # N, H, W, C: over N, H and W
        (0, 1, 2)
        >>> reduction_axes(2)          # N, C: over N alone
        (0,)
    """
    ndim, channel_axis = _checked(ndim, channel_axis)
    return tuple(axis for axis in range(ndim) if axis != channel_axis)


def per_channel(v: Any, ndim: int, channel_axis: int = 1) -> Any:
    """Reshape one value per channel so that it broadcasts along the channel axis.

    A vector of length C becomes an array of ``ndim`` axes that are all 1 but the channel axis::

        (C,) -> (1, C, 1, ..., 1)

    Without this, broadcasting lines the vector up with the *last* axis: for an input
    (N, C, H, W) it is applied along W, silently if C = W or W = 1.

    Args:
        v: array of shape (C,), of any library and dtype.
        ndim: rank of the input that ``v`` is to be broadcast against.
        channel_axis: the input's channel axis.

    Returns:
        A view (where the library has views) of ``v`` with ``ndim`` axes.

    Raises:
        TypeError: ``v`` is not an array.
        ValueError: ``v`` is not one-dimensional, or see :func:`reduction_axes`.

    Derived in *Which axes?*

    Examples:
        >>> import numpy as np
        >>> per_channel(np.zeros(3), 4).shape
        (1, 3, 1, 1)
        >>> per_channel(np.zeros(3), 4, -1).shape
        (1, 1, 1, 3)
    """
    xp = array_namespace(v)
    ndim, channel_axis = _checked(ndim, channel_axis)
    if v.ndim != 1:
        raise ValueError(f"expected one value per channel, shape (C,), got shape {tuple(v.shape)}")
    shape = [1] * ndim
    shape[channel_axis] = v.shape[0]
    return xp.reshape(v, tuple(shape))


def _checked(ndim: int, channel_axis: int) -> tuple[int, int]:
    ndim, channel_axis = operator.index(ndim), operator.index(channel_axis)
    if ndim < 2:
        raise ValueError(f"expected ndim >= 2 (samples and channels), got ndim {ndim}")
    if not -ndim <= channel_axis < ndim:
        raise ValueError(
            f"expected channel_axis in {-ndim}..{ndim - 1} for ndim {ndim}, got {channel_axis}"
        )
    return ndim, channel_axis % ndim
