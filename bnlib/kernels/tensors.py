"""Which tensors kernels can read: layouts, checks, and the ReLU mask that tiers share.

A kernel trusts what it is told, and would read past the end of a tensor that is smaller, or where
there is none: the checks here stand before every one of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnlib.modes import is_zero

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether each is None or has its numbers in memory, where kernels can read them.

    That is a strided tensor of no subclass, and neither a view that torch negates by a flag nor its
    zeros without memory.
    """
    for t in tensors:
        if type(t) not in _PLAIN:
            return False
        if t is not None and (t.layout != torch.strided or t.is_neg() or is_zero(t)):
            return False
    return True


def in_memory(t: Any) -> Any:
    """Return ``t``, or its copy if it is a negative view or torch's zeros without memory."""
    return t.clone() if t is not None and (t.is_neg() or is_zero(t)) else t


def channels_are_neighbours(x: Tensor) -> bool:
    """Return whether the channels of one position of ``x`` lie side by side in memory."""
    return (x.stride(1) == 1 and x.shape[1] > 1) or math.prod(x.shape[2:]) == 1


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return ``x``, copied if need be, without gaps: contiguous, or with the channels innermost.

    Args:
        x: shape (N, C, ...), any strides.
        like: whose layout decides between the two; None for that of ``x``.

    Returns:
        ``x`` itself where it lies so already.
    """
    if channels_are_neighbours(x if like is None else like):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def check_plain(**tensors: Tensor | None) -> None:
    """Raise unless each tensor is one that kernels can read.

    Args:
        tensors: by the names that the error shall give them.

    Raises:
        TypeError: a subclass of torch.Tensor, another layout than torch.strided, a negative view,
            or zeros without memory.
    """
    if is_plain(*tensors.values()):
        return
    for name, value in tensors.items():
        if value is None or is_plain(value):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"expected {name} to be a torch.Tensor, got {type(value).__name__}")
        raise TypeError(
            f"expected {name} to be a plain strided torch.Tensor with its numbers in memory, "
            f"got {type(value).__name__} of {value.layout}"
            f"{', a negative view' if value.is_neg() else ''}"
            f"{', zeros without memory' if is_zero(value) else ''}"
        )


def check_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    """Raise as :func:`check_plain` and :func:`check_per_channel` do."""
    check_plain(**vectors)
    check_per_channel(x, **vectors)


def check_per_channel(x: Tensor, **vectors: Tensor | None) -> None:
    """Raise unless each vector is None or has one floating-point value per channel of ``x``.

    Args:
        x: shape (N, C, ...).
        vectors: by the names that the error shall give them.

    Raises:
        TypeError: no tensor, or one that is not real floating.
        ValueError: another shape than (C,), or another device than that of ``x``.
    """
    expected, device = x.shape[1:2], x.device
    for name, value in vectors.items():
        if value is None:
            continue
        check_beside(name, value, device)
        if value.shape != expected:
            raise ValueError(
                f"expected {name} of shape ({x.shape[1]},) for input of shape {tuple(x.shape)}, "
                f"got shape {tuple(value.shape)}"
            )


def check_like(x: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless each tensor is None, or plain with the shape, dtype and device of ``x``.

    Args:
        x: any tensor.
        tensors: by the names that the error shall give them.

    Raises:
        TypeError, ValueError: as :func:`check_plain` and :func:`check_vectors`.
    """
    for name, value in tensors.items():
        if value is None:
            continue
        check_plain(**{name: value})
        check_beside(name, value, x.device)
        if value.shape != x.shape or value.dtype != x.dtype:
            raise ValueError(
                f"expected {name} of shape {tuple(x.shape)} and {x.dtype}, "
                f"got {tuple(value.shape)} and {value.dtype}"
            )


def check_mask(x: Tensor, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless ``mask`` is None or what ``empty_mask(x)`` returns.

    Args:
        x: the input that the mask belongs to.
        mask: of the module that asks.
        shape: that of a mask for ``x``, in the layout of that module.

    Raises:
        TypeError: no tensor.
        ValueError: another shape or dtype, gaps in memory, or another device than that of ``x``.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"expected mask to be a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != shape or mask.dtype != torch.uint8 or not mask.is_contiguous():
        raise ValueError(
            f"expected a contiguous mask of shape {tuple(shape)} and torch.uint8, which empty_mask "
            f"makes for input of shape {tuple(x.shape)}, got {tuple(mask.shape)} and {mask.dtype} "
            f"with strides {mask.stride()}"
        )
    if mask.device != x.device:
        raise ValueError(f"expected mask on {x.device}, where the input is, got {mask.device}")
    check_plain(mask=mask)


def check_layout(x: Tensor, dresidual: Tensor | None) -> None:
    """Raise unless ``dresidual`` is None or lies in memory as ``x`` does, ready to be filled.

    Args:
        x: shape (N, C, ...), in the layout of the kernels.
        dresidual: shape and dtype of ``x``.

    Raises:
        ValueError: another layout.
    """
    if dresidual is not None and dense(dresidual, x).data_ptr() != dresidual.data_ptr():
        raise ValueError(
            "expected dresidual of empty_like(x), in the layout of x, got strides "
            f"{dresidual.stride()} where x has {x.stride()} (channels on axis 1)"
        )


def check_beside(name: str, value: Tensor, device: torch.device) -> None:
    """Raise unless a kernel that runs on a device can read ``value``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a torch.Tensor, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"expected {name} with a real floating dtype, got {value.dtype}")
    if value.device != device:
        raise ValueError(
            f"expected {name} on {device}, where the input is, got it on {value.device}"
        )


def check_layer(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> None:
    """Raise unless the arguments of a layer make sense together, on any tier."""
    if not isinstance(input, Tensor):
        raise TypeError(f"expected input to be a torch.Tensor, got {type(input).__name__}")
    if not input.dtype.is_floating_point:
        raise TypeError(f"expected input with a real floating dtype, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"expected input of rank >= 2 (N, C, ...), got shape {tuple(input.shape)}")
    check_per_channel(
        input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    if (running_mean is None) != (running_var is None) or (not training and running_mean is None):
        raise ValueError(
            "expected both running statistics, or none of them in training, got running_mean"
            f"{'=None' if running_mean is None else ''}, running_var"
            f"{'=None' if running_var is None else ''} with training={training}"
        )
    if not (eps > 0 if training else eps >= 0):
        raise ValueError(f"expected eps {'> 0 in training' if training else '>= 0'}, got {eps}")
    if residual is not None:
        _check_residual(input, residual)
    if activation not in (None, "relu"):
        raise ValueError(f"expected activation None or 'relu', got {activation!r}")


def check_count(input: Tensor) -> None:
    """Raise if every channel has one value alone, which has no variance."""
    if input.numel() == input.shape[1] > 0:
        raise ValueError(
            "expected more than 1 value per channel in training, "
            f"got input of shape {tuple(input.shape)}"
        )


def _check_residual(input: Tensor, residual: Tensor) -> None:
    check_beside("residual", residual, input.device)
    if residual.shape != input.shape:
        try:
            torch.broadcast_shapes(residual.shape, input.shape)
        except RuntimeError:
            raise ValueError(
                f"expected residual of a shape that broadcasts with {tuple(input.shape)}, "
                f"got {tuple(residual.shape)}"
            ) from None


def mask_shape(x: Tensor) -> tuple[int, int]:
    """Return the shape of a ReLU mask for ``x``, see :func:`empty_mask`."""
    rows = 1 if channels_are_neighbours(x) else x.shape[1]
    return rows, -(-x.numel() // (8 * max(rows, 1)))


def empty_mask(x: Tensor) -> Tensor:
    """Return an uninitialised ReLU mask for ``x``, a bit per element.

    The bits stand in the order of ``numpy.packbits(..., bitorder="little")``: where the channels
    are neighbours, those of all elements as they lie in memory; otherwise a row for each channel,
    in which the samples follow each other. A row is padded to a whole byte.

    Args:
        x: shape (N, C, ...); L is the product of the lengths after C.

    Returns:
        uint8 tensor of shape (1, ⌈N L C / 8⌉) or (C, ⌈N L / 8⌉).
    """
    return torch.empty(mask_shape(x), dtype=torch.uint8, device=x.device)


def pack_mask(positive: Tensor, x: Tensor) -> Tensor:
    """Return the mask (see :func:`empty_mask`) for ``x`` of a bool tensor of its shape."""
    mask = empty_mask(x)
    order = positive.movedim(1, -1) if channels_are_neighbours(x) else positive.transpose(0, 1)
    rows = order.reshape(mask.shape[0], x.numel() // max(mask.shape[0], 1))
    rows = torch.nn.functional.pad(rows, (0, 8 * mask.shape[1] - rows.shape[1]))
    bits = rows.to(torch.uint8).unflatten(1, (-1, 8)) << _bits(x)
    return mask.copy_(bits.sum(2, dtype=torch.uint8))


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return the bool tensor of the shape of ``x`` that :func:`pack_mask` packed."""
    bits = (mask.unsqueeze(2) >> _bits(x) & 1).bool().flatten(1)
    bits = bits[:, : x.numel() // max(mask.shape[0], 1)]
    samples, channels, *rest = x.shape
    if channels_are_neighbours(x):
        return bits.reshape(samples, *rest, channels).movedim(-1, 1)
    return bits.reshape(channels, samples, *rest).transpose(0, 1)


def _bits(x: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=x.device)
