"""Running statistics repaired: the mean and the variance of all the given data, per layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bnlib.probe import batch_norms, hooked, is_frozen, run, undisturbed
from bnlib.statistics import Moments, merge, moments

__all__ = ["recalibrate"]

_CHUNK = 1 << 20  # values whose moments are taken at once, so that their float64 copies stay small


def recalibrate(model: nn.Module, batches: Any) -> dict[str, Moments]:
    """Replace the running statistics of a model's batch norms by those of all the given data.

    ::

        n = Σ n_B;   running_mean = μ = Σ (n_B/n) μ_B
        running_var = M₂/(n - 1)   with   M₂ = Σ [n_B σ²_B + n_B (μ_B - μ)²]

    by the law of total variance: the second term, the spread of the batch means, is what an average
    of the batches' variances leaves out, be it PyTorch's running one or that of
    ``torch.optim.swa_utils.update_bn``. As PyTorch, it keeps the unbiased variance; n is that of
    all batches, so that the division is of no account here.

    While the batches run, each layer normalises with the statistics of the batch, as in training;
    the rest of the model is in evaluation mode, so that dropout, for one, is off. Only at the end
    are ``running_mean`` and ``running_var`` written, and ``num_batches_tracked``, the number of
    batches as PyTorch counts it. Weights, modes, gradients and the generators of random numbers
    stay as they were; after an exception the buffers do too.

    A layer in evaluation mode inside a model in training mode is frozen: it normalises with its
    own running statistics and keeps them. In a model that is in evaluation mode every layer is
    repaired. Layers without running statistics, and InstanceNorm, are not touched.

    Args:
        model: a torch module with batch norms: torch's, those of ``bnlib.nn``, subclasses.
        batches: an iterable, such as a DataLoader, of tensors, of dicts (``model(**batch)``), or of
            tuples or lists, of which as many leading elements are taken as ``forward`` has
            positional arguments without a default: of (images, labels) the images. Or one tensor
            or dict, which is one batch. They are moved to the device of the model; of processes
            that share work each runs its own. Take batches as large as fit, larger than in
            training: merged small ones are exact for the first batch norm only, as those behind it
            are fed what was normalised with each small batch, unlike in evaluation.

    Returns:
        Name of the layer -> :class:`bnlib.Moments` of all that it was given, in the order of first
        use. A warning names layers that no batch reached; they keep their buffers.

    Raises:
        TypeError: ``model`` is not a torch module, or a batch is none of the above.
        ValueError: no batch norms with running statistics, lazy modules, no batches, a batch
            with one value per channel, whose variance is 0 whatever the data are, or statistics
            that are NaN, or beyond the buffers' dtype.

    Source: Wu & Johnson (2021), section 3, for the merged statistics (PreciseBN); Chan, Golub &
    LeVeque (1983) for the merge. Derived in *Running statistics*.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1)).eval()
        >>> x = torch.tensor([[0.0], [2.0], [6.0], [8.0]])
        >>> recalibrate(model, [x[:2], x[2:]])["0"].count
        4
        >>> model[0].running_mean, model[0].running_var  # within the batches, it would be 2
        (tensor([4.]), tensor([13.3333]))
    """
    tracked = {n: m for n, m in batch_norms(model).items() if m.running_mean is not None}
    layers = {m: name for name, m in tracked.items() if not is_frozen(model, m)}
    if not layers:
        raise ValueError(
            "expected batch norms whose running statistics are to be repaired, got "
            f"{len(tracked)} with running statistics, all frozen in evaluation mode"
        )
    found: dict[str, Moments] = {}
    calls = dict.fromkeys(layers.values(), 0)

    def measure(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        name = layers[layer]  # type: ignore[index]
        part = _moments(x)
        if part.count == 1:
            raise ValueError(
                f"expected more than one value per channel in {name!r}, got input of shape "
                f"{tuple(x.shape)}"
            )
        if part.count == 0:  # moves nothing, and is normalised to nothing
            return part.mean, part.mean + 1
        calls[name] += 1
        found[name] = merge(found[name], part) if name in found else part
        return part.mean, part.var()

    with undisturbed(model, batches), hooked(layers, measure):
        for _ in run(model, batches):
            pass
    new = {}
    for name, total in found.items():
        dtype = tracked[name].running_mean.dtype  # type: ignore[union-attr]  # a buffer may be None
        new[name] = total.mean.to(dtype), total.var(correction=1).to(dtype)
        if not all(bool(torch.isfinite(t).all()) for t in new[name]):
            raise ValueError(
                f"expected statistics that {dtype} holds, got NaN or infinity in {name!r}"
            )
    with torch.inference_mode():  # without which its tensors could not be written
        for name, (mean, var) in new.items():
            layer = tracked[name]
            layer.running_mean.copy_(mean)  # type: ignore[union-attr]
            layer.running_var.copy_(var)  # type: ignore[union-attr]
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(calls[name])
    if missed := [repr(name) for name in calls if name not in found]:
        warnings.warn(
            f"recalibrate leaves these as they are, which no batch reached: {', '.join(missed)}",
            stacklevel=2,
        )
    return found


def _moments(x: Tensor) -> Moments:
    if not x.shape[0]:
        return moments(x)
    samples = max(1, _CHUNK // max(1, x[0].numel()))
    return merge(*map(moments, x.split(samples)))
