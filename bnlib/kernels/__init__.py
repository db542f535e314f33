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

    The bits stand in the order of ``numpy.packbits(..., bitorder="little")``: where the channels
    are neighbours, those of all elements as they lie in memory; otherwise a row for each channel,
    in which the samples follow each other. A row is padded to a whole byte.

    Args:
        x: shape (N, C, ...); L is the product of the lengths after C.

    Returns:
        uint8 tensor of shape (1, ⌈N L C / 8⌉) or (C, ⌈N L / 8⌉).
    """
    rows = 1 if channels_are_neighbours(x) else x.shape[1]
    columns = -(-x.numel() // (8 * max(rows, 1)))
    return torch.empty((rows, columns), dtype=torch.uint8, device=x.device)


def pack_mask(positive: Tensor, x: Tensor) -> Tensor:
    """Return the mask (see :func:`empty_mask`) for ``x`` of a bool tensor of its shape."""
    mask = empty_mask(x)
    order = positive.movedim(1, -1) if channels_are_neighbours(x) else positive.transpose(0, 1)
    rows = order.reshape(mask.shape[0], x.numel() // max(mask.shape[0], 1))
    rows = torch.nn.functional.pad(rows, (0, 8 * mask.shape[1] - rows.shape[1]))
    return mask.copy_((rows.unflatten(1, (-1, 8)) << _bits(x)).sum(2, dtype=torch.uint8))


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
