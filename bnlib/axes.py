"""Which axes a normalization reduces: the one definition that everything else calls."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace


def reduction_axes(ndim: int, channel_axis: int = 1, norm: str = "batch") -> tuple[int, ...]:
    """Return the axes over which a normalization takes its mean and variance.

    Batch normalization keeps the channel axis, layer normalization the samples, axis 0, instance
    normalization both; every other axis is reduced::

        reduction_axes(ndim, c)             = (0, 1, ..., ndim - 1) without c
        reduction_axes(ndim, c, "layer")    = (1, ..., ndim - 1)
        reduction_axes(ndim, c, "instance") = (1, ..., ndim - 1) without c

    Group normalization is the instance normalization of :func:`split_groups`. The layer
    normalization of transformers takes its statistics over the channels alone: one axis, which
    needs no rule.

    Args:
        ndim: rank of the input, at least 2 (samples and channels); for ``"instance"`` 3.
        channel_axis: the input's channel axis, in ``-ndim .. ndim - 1``. 1 in PyTorch and ONNX
            (N, C, H, W), -1 in Keras and Flax (N, H, W, C).
        norm: ``"batch"``, ``"layer"`` (of Ba et al.: every number of a sample) or ``"instance"``.

    Returns:
        The reduced axes, ascending and non-negative.

    Raises:
        TypeError: ``ndim`` or ``channel_axis`` is not an integer.
        ValueError: ``ndim`` too small, ``channel_axis`` out of range, another ``norm``, or, but
            for ``"batch"``, channels on the axis of the samples.

    Source: Ioffe & Szegedy (2015), section 3.2; Ba, Kiros & Hinton (2016); Ulyanov, Vedaldi &
    Lempitsky (2016). Derived in *Which axes?* and *Siblings: layer, instance, group norm*

    Examples:
        >>> reduction_axes(4)          # N, C, H, W: over N, H and W
        (0, 2, 3)
        >>> reduction_axes(4, -1)      # N, H, W, C: over N, H and W
        (0, 1, 2)
        >>> reduction_axes(2)          # N, C: over N alone
        (0,)
        >>> reduction_axes(4, norm="layer"), reduction_axes(4, norm="instance")
        ((1, 2, 3), (2, 3))
    """
    ndim, channel_axis = _checked(ndim, channel_axis)
    kept = {"batch": (channel_axis,), "layer": (0,), "instance": (0, channel_axis)}
    if norm not in kept:
        raise ValueError(f"expected norm to be one of {tuple(kept)}, got {norm!r}")
    if norm != "batch" and channel_axis == 0:
        raise ValueError(f"expected samples on axis 0 for norm={norm!r}, got channel_axis 0")
    axes = tuple(axis for axis in range(ndim) if axis not in kept[norm])
    if not axes:
        raise ValueError(f"expected ndim >= 3 (samples, channels, positions), got ndim {ndim}")
    return axes


def split_groups(x: Any, groups: int, channel_axis: int = 1) -> Any:
    """Split the channel axis in two: the groups, and the channels of a group.

    A group is ``C / groups`` neighbouring channels::

        (N, C, H, W) -> (N, G, C/G, H, W)

    With the groups in the place of the channels, instance normalization of the result is group
    normalization of ``x``; reshape to ``x.shape`` afterwards.

    Args:
        x: array of rank >= 2, of any library and dtype.
        groups: G, a divisor of the number of channels.
        channel_axis: the input's channel axis; counted from the front it is the axis of the groups
            in the result.

    Returns:
        ``x`` with one axis more, a view where the library can give one.

    Raises:
        TypeError: ``x`` is not an array, or ``groups`` or ``channel_axis`` not an integer.
        ValueError: rank < 2, ``channel_axis`` out of range, or ``groups`` that do not divide C.

    Source: Wu & He (2018), figure 3. Derived in *Siblings: layer, instance, group norm*

    Examples:
        >>> import numpy as np
        >>> x = split_groups(np.zeros((2, 6, 4, 5)), 3)
        >>> x.shape, reduction_axes(x.ndim, norm="instance")
        ((2, 3, 2, 4, 5), (2, 3, 4))
        >>> x = split_groups(np.zeros((2, 4, 5, 6)), 3, channel_axis=-1)
        >>> x.shape, reduction_axes(x.ndim, 3, "instance")
        ((2, 4, 5, 3, 2), (1, 2, 4))
    """
    xp = array_namespace(x)
    groups, (_, channel_axis) = operator.index(groups), _checked(x.ndim, channel_axis)
    channels = x.shape[channel_axis]
    if groups < 1 or channels % groups:
        raise ValueError(f"expected groups that divide {channels} channels, got {groups}")
    split = (groups, channels // groups)
    return xp.reshape(x, (*x.shape[:channel_axis], *split, *x.shape[channel_axis + 1 :]))


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
    array_namespace(v)  # raises for what is not an array
    if v.ndim != 1:
        raise ValueError(f"expected one value per channel, shape (C,), got shape {tuple(v.shape)}")
    return expand(v, reduction_axes(ndim, channel_axis))


def expand(v: Any, axes: Sequence[int]) -> Any:
    """Return ``v`` with length 1 at the axes that were reduced, so that it broadcasts back.

    ``axes`` ascend and count in the result, as those of :func:`reduction_axes` do.
    """
    shape = list(v.shape)
    for axis in axes:
        shape.insert(axis, 1)
    return array_namespace(v).reshape(v, tuple(shape))


def checked_axes(axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return one axis or several as :func:`reduction_axes` gives them: ascending, non-negative.

    Raises:
        TypeError: neither an integer nor several.
        ValueError: no axis, one out of range, or one twice.
    """
    try:
        given: tuple[Any, ...] = (operator.index(axes),)  # type: ignore[arg-type]
    except TypeError:
        given = tuple(axes)  # type: ignore[arg-type]
    for axis in map(operator.index, given):
        if not -ndim <= axis < ndim:
            raise ValueError(f"expected axes in {-ndim}..{ndim - 1} for ndim {ndim}, got {axes}")
    found = {operator.index(axis) % ndim for axis in given}
    if not found or len(found) < len(given):
        raise ValueError(f"expected different axes, at least one, got {axes}")
    return tuple(sorted(found))


def _checked(ndim: int, channel_axis: int) -> tuple[int, int]:
    ndim, channel_axis = operator.index(ndim), operator.index(channel_axis)
    if ndim < 2:
        raise ValueError(f"expected ndim >= 2 (samples and channels), got ndim {ndim}")
    if not -ndim <= channel_axis < ndim:
        raise ValueError(
            f"expected channel_axis in {-ndim}..{ndim - 1} for ndim {ndim}, got {channel_axis}"
        )
    return ndim, channel_axis % ndim
