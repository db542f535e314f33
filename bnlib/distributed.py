"""The one step between the primitives: merge moments over ranks, sum gradients over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bnlib.statistics import Moments, merge


def sync_moments(local: Moments, group: dist.ProcessGroup | None = None) -> Moments:
    """Return the moments of all ranks' values together, the same on every rank to the last bit.

    One all-gather of (mean, σ², count), 2C + 2 numbers a rank, then :func:`bnlib.merge`::

        n = Σ nᵣ,  mean = Σ nᵣ meanᵣ / n,  m2 = Σ [m2ᵣ + nᵣ (meanᵣ - mean)²]

    Args:
        local: this rank's :class:`~bnlib.Moments`, with tensors of shape (C,), a mean of float32 or
            float64, on a device of the group's backend. Shards may be uneven, and empty (count 0).
        group: the process group; None is the default group.

    Returns:
        :class:`~bnlib.Moments` of the whole batch; ``count`` is exact, and reading it waits for
        the device.

    Raises:
        RuntimeError: torch.distributed is not initialised, this process is not in ``group``, or
            another rank did not take part within the group's timeout.

    Source: Chan, Golub & LeVeque (1983); Peng et al. (2018). Derived in *When the batch outgrows
    one device*.
    """
    ranks = _ranks(group)
    if ranks == 1:
        return local
    mean, channels = local.mean, local.mean.shape[0]
    # What is sent has the dtype of the mean, which the sum of squares may be too large for.
    var = (local.m2 / max(local.count, 1)).to(mean.dtype)
    # The count travels as the bits of an int64: as a float it would be rounded above 2^24.
    count = torch.tensor([local.count], dtype=torch.int64, device=mean.device).view(mean.dtype)
    mine = torch.cat([mean, var, count]).detach()
    rows = mine.new_empty(ranks, mine.shape[0])
    _collective("all_gather", group, dist.all_gather, list(rows.unbind()), mine)
    counts = rows[:, 2 * channels :].contiguous().view(torch.int64).flatten().tolist()
    parts = [
        Moments(n, row[:channels], row[channels : 2 * channels].to(local.m2.dtype) * n)
        for n, row in zip(counts, rows, strict=True)
    ]
    return merge(*parts)


def sync_sum(t: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the sum of a tensor over all ranks; the argument keeps its value.

    ::

        total = Σ tᵣ

    Args:
        t: any shape, the same on every rank; float32 or float64 in batch norm's backward, where it
            holds sum_dy and sum_dy_x_hat, 2C numbers.
        group: the process group; None is the default group.

    Returns:
        New tensor of the shape and dtype of ``t``; ``t`` itself in a group of one rank.

    Raises:
        RuntimeError: as :func:`sync_moments`.

    Source: Ioffe & Szegedy (2015), section 3, summed over ranks. Derived in *When the batch
    outgrows one device*.
    """
    if _ranks(group) == 1:
        return t
    total = t.detach().clone(memory_format=torch.contiguous_format)
    _collective("all_reduce", group, dist.all_reduce, total)
    return total


def _ranks(group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "synchronised batch norm needs torch.distributed: call init_process_group first, "
            "or use BatchNorm in a single process"
        )
    if dist.get_rank(group) < 0:
        raise RuntimeError(
            f"expected a process group of rank {dist.get_rank()}, got one without it"
        )
    return dist.get_world_size(group)


def _collective(
    name: str, group: dist.ProcessGroup | None, call: Callable[..., Any], *tensors: Any
) -> None:
    try:
        call(*tensors, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"synchronised batch norm: {name} failed on rank {dist.get_rank(group)} of "
            f"{dist.get_world_size(group)}: another rank has died, is late (the first call of a "
            "new installation compiles for seconds: give init_process_group a longer timeout), or "
            "runs a different number of batch norms"
        ) from error
