"""The four primitives in compiled form, and the ReLU mask that they share.

``cpu`` (Numba) and ``gpu`` (Triton) offer the primitives of :mod:`bnlib.reference` under the same
names, for torch tensors, with three more keyword arguments for the fused layer
``relu(bn(x) + residual)``:

- ``normalize(..., residual=None, relu=False, mask=None)`` adds ``residual``, applies ReLU, and
  records in ``mask`` where the output is not cut off;
- ``grad_sums(..., mask=None)`` and ``grad_input(..., mask=None, dresidual=None)`` read ``dy``
  through the mask; ``grad_input`` writes the masked ``dy`` to ``dresidual``.

A module may also offer two primitives in one call, for data that is still in the cache:
``moments_and_normalize`` and ``grad_sums_and_input``. ``supports(x)`` says whether a module takes
a tensor. This file needs torch alone; the modules are imported when they are first used.

The layout of the mask is the business of whoever writes and reads it: ``gpu`` has an ``empty_mask``
and an ``unpack_mask`` of its own, for which neighbours in memory share a byte.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def channels_are_neighbours(x: Tensor) -> bool:
    """Return whether the channels of one position of ``x`` lie side by side in memory."""
    return (x.stride(1) == 1 and x.shape[1] > 1) or math.prod(x.shape[2:]) == 1


def empty_mask(x: Tensor) -> Tensor:
    """Return an uninitialised ReLU mask for ``x``, a bit per element.

    The eight bits of a byte belong to elements that are far apart, so that neighbours in memory
    lie in neighbouring bytes under the same bit, and loops over them vectorise::

        channels are neighbours:  (R, C),     bit r // R of byte (r % R, c),   R = ⌈N L / 8⌉
        N is divisible by 8:      (J, C, L),  bit n // J of byte (n % J, c, l),  J = N / 8
        otherwise:                (C, R),     bit r // R of byte (c, r % R),   R = ⌈N L / 8⌉

    where r = n L + l numbers the positions.

    The last byte of a channel may be padded; nothing else is.

    Args:
        x: shape (N, C, ...); L is the product of the lengths after C.

    Returns:
        uint8 tensor of the shape above.
    """
    samples, channels = x.shape[:2]
    size = math.prod(x.shape[2:])
    shape: tuple[int, ...] = (channels, -(-samples * size // 8))
    if channels_are_neighbours(x):
        shape = shape[::-1]
    elif samples % 8 == 0:
        shape = (samples // 8, channels, size)
    return torch.empty(shape, dtype=torch.uint8, device=x.device)


def pack_mask(positive: Tensor, x: Tensor) -> Tensor:
    """Return the mask (see :func:`empty_mask`) for ``x`` of a bool tensor of its shape."""
    mask = empty_mask(x)
    if channels_are_neighbours(x) or mask.dim() == 3:
        flat = positive.movedim(1, -1).flatten() if mask.dim() == 2 else positive.flatten()
        flat = torch.nn.functional.pad(flat, (0, 8 * mask.numel() - flat.numel()))
        planes = flat.view(8, *mask.shape)
    else:
        channels, size = mask.shape
        flat = positive.transpose(0, 1).reshape(channels, x.numel() // max(channels, 1))
        flat = torch.nn.functional.pad(flat, (0, 8 * size - flat.shape[1]))
        planes = flat.view(channels, 8, size).transpose(0, 1)
    return mask.copy_(torch.sum(planes << _bits(planes), dim=0, dtype=torch.uint8))


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return the bool tensor of the shape of ``x`` that :func:`pack_mask` packed."""
    planes = (mask.unsqueeze(0) >> _bits(mask.unsqueeze(0)) & 1).bool()
    if channels_are_neighbours(x):
        samples, channels, *rest = x.shape
        return planes.flatten()[: x.numel()].view(samples, *rest, channels).movedim(-1, 1)
    if mask.dim() == 3:
        return planes.view(x.shape)
    flat = planes.transpose(0, 1).flatten(1)[:, : x.numel() // max(x.shape[1], 1)]
    return flat.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def _bits(planes: Tensor) -> Tensor:
    bits = torch.arange(8, dtype=torch.uint8, device=planes.device)
    return bits.view(8, *(1,) * (planes.dim() - 1))
