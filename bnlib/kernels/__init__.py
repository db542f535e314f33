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
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_mask(x: Tensor) -> Tensor:
    """Return an uninitialised ReLU mask for ``x``: a bit per element, channels padded to bytes.

    ::

        R = ⌈m / 8⌉ bytes per channel;  element e = k R + j of a channel is bit k of byte j

    where the m elements of a channel are numbered in the order (N, ...). Neighbours in memory
    thus lie in neighbouring bytes, under the same bit: loops over them vectorise.

    Args:
        x: shape (N, C, ...).

    Returns:
        uint8 tensor of shape (C, R).
    """
    channels = x.shape[1]
    count = x.numel() // channels if channels else 0
    return torch.empty((channels, -(-count // 8)), dtype=torch.uint8, device=x.device)


def pack_mask(positive: Tensor) -> Tensor:
    """Return the mask (see :func:`empty_mask`) of a bool tensor of shape (N, C, ...)."""
    mask = empty_mask(positive)
    channels, size = mask.shape
    count = positive.numel() // max(channels, 1)
    flat = positive.transpose(0, 1).reshape(channels, count).to(torch.uint8)
    planes = torch.nn.functional.pad(flat, (0, 8 * size - count)).view(channels, 8, size)
    torch.sum(planes << _bits(positive), dim=1, dtype=torch.uint8, out=mask)
    return mask


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return the bool tensor of the shape of ``x`` that :func:`pack_mask` packed."""
    channels, size = mask.shape
    samples, rest = x.shape[0], x.shape[2:]
    planes = (mask.unsqueeze(1) >> _bits(mask)) & 1
    flat = planes.view(channels, 8 * size)[:, : x.numel() // max(channels, 1)]
    return flat.reshape(channels, samples, *rest).transpose(0, 1).bool()


def _bits(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device).view(1, 8, 1)
