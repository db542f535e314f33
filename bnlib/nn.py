"""Drop-in batch-norm modules for torch, and the function that swaps them into a model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.fx
from torch import Tensor

from bnlib import functional

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "convert_batch_norm",
    "restore_batch_norm",
]


def _forward(
    self: Any, input: Any, residual: Tensor | None, activation: str | None, process_group: Any
) -> Any:
    """What torch's modules do, with :func:`bnlib.functional.batch_norm` for the arithmetic."""
    if isinstance(input, torch.fx.Proxy):  # torch.fx takes torch.nn's modules for leaves, not ours
        tracer: Any = input.tracer
        fused = {"residual": residual, "activation": activation}
        kwargs = {key: value for key, value in fused.items() if value is not None}
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), kwargs)
    self._check_input_dim(input)
    tracks = self.training and self.track_running_stats
    momentum: Any = 0.0 if self.momentum is None else self.momentum
    if tracks and self.num_batches_tracked is not None:
        # Whether all ranks together have an empty batch turns out on the way.
        momentum = self._count_batch if process_group else self._count_batch(input.numel())
    # Statistics that are not tracked are neither read nor written in training.
    keep = tracks or not self.training
    return functional.batch_norm(
        input,
        self.running_mean if keep else None,
        self.running_var if keep else None,
        self.weight,
        self.bias,
        self.training or self.running_mean is None,
        momentum,
        self.eps,
        residual=residual,
        activation=activation,
        process_group=process_group,
    )


class _Layer:
    def _count_batch(self: Any, values: int) -> float:
        """Count a batch, unless it is empty and moves nothing, and return its weight."""
        if values:
            self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        # the plain average over all batches
        return 1.0 / float(self.num_batches_tracked) if values else 0.0

    def __prepare_scriptable__(self) -> Any:
        """Asked for by torch.jit.script, whose own error would be about comprehensions."""
        raise RuntimeError(
            f"torch.jit.script does not take {type(self).__module__}.{type(self).__name__}: call "
            "bnlib.nn.restore_batch_norm(model) before, or use torch.jit.trace or torch.export"
        )


class _BatchNorm(_Layer):
    def forward(
        self, input: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        return _forward(self, input, residual, activation, None)


_DOC = """Batch normalization of {shape} input: ``torch.nn.{name}`` with bnlib's arithmetic.

    ::

        y = act(γ (x - μ) / √(σ² + ε) + β + residual)

    Constructor, parameters, buffers, ``state_dict``, ``repr`` and train/eval behaviour are those
    of ``torch.nn.{name}``, of which this is a subclass. ``forward`` takes two more arguments, with
    which a residual connection and ReLU need no passes of their own.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in torch.

    ``forward(input, residual=None, activation=None)`` takes input of shape {shape}, and the other
    two as :func:`bnlib.functional.batch_norm` does.

    Source: Ioffe & Szegedy (2015). Derived in *Forward, and what ε does* and *Backward*.
    """


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    __doc__ = _DOC.format(name="BatchNorm1d", shape="(N, C) or (N, C, L)")


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    __doc__ = _DOC.format(name="BatchNorm2d", shape="(N, C, H, W)")


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    __doc__ = _DOC.format(name="BatchNorm3d", shape="(N, C, D, H, W)")


class SyncBatchNorm(_Layer, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization with the statistics of all ranks of a process group together.

    ::

        (n, μ, M₂) = merge of the ranks' moments;   y = act(γ (x - μ) / √(M₂/n + ε) + β + residual)

    Constructor, ``state_dict`` and ``repr`` are those of ``torch.nn.SyncBatchNorm``. Unlike that
    one it takes CPU tensors too; like it, shards that are uneven or empty. It is no subclass of it,
    because DistributedDataParallel refuses those on the CPU. In evaluation, and without an
    initialised process group, it does what BatchNorm does. ``torch.compile`` leaves the
    synchronised step out of its graphs, and so refuses ``fullgraph=True`` for it. Every rank must
    run every layer as often: a rank that has run out of data goes on with empty batches, since
    ``DistributedDataParallel.join`` stands in for the gradients' collectives alone.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype: as
            in torch. The default process group is the whole world.

    ``forward(input, residual=None, activation=None)`` takes input of shape (N, C, ...).

    Source: Peng et al. (2018). Derived in *When the batch outgrows one device*.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,  # what a newer torch adds, such as bias
    ) -> None:
        options |= {"device": device, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any rank from 2 on, which the functional checks

    def forward(
        self, input: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        group = None
        dist = torch.distributed
        if self.training and dist.is_available() and dist.is_initialized():
            group = self.process_group or dist.group.WORLD
            if dist.get_world_size(group) == 1:
                group = None
        return _forward(self, input, residual, activation, group)


_OURS: dict[type, type] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
    torch.nn.SyncBatchNorm: SyncBatchNorm,
}
_TORCHS = {ours: theirs for theirs, ours in _OURS.items()}
_BEFORE = "_before_sync"  # where a module that was made synchronised keeps the class that it had


def convert_batch_norm(
    model: torch.nn.Module, sync: bool = False, process_group: Any = None
) -> torch.nn.Module:
    """Turn every batch norm of a torch model into bnlib's, in place.

    The modules stay the objects they are and only change their class: parameters, buffers, hooks,
    flags, names and every reference to them stay valid, so an optimizer that already holds the
    parameters goes on working, and a module used in two places is still one.
    :func:`restore_batch_norm` is the inverse.

    ``torch.export`` and ``torch.jit.trace`` take the new classes, ``torch.jit.script`` raises.
    Tools that look for exactly torch's classes do not see them: ``fuse_modules`` of ``torch.ao``
    raises, and its ``fuse_fx``, ``prepare_fx`` and ``prepare_qat_fx`` fuse nothing. Fuse or fold
    before, or convert back.

    Two things differ in training. A layer that is checkpointed by ``torch.utils.checkpoint`` runs
    twice and moves its running statistics twice, as torch's does. After an evaluation forward whose
    gradient is still due, a training forward of the same layer moves the statistics that the
    gradient needs: this raises, where torch's layer silently uses the moved ones.
    ``torch.compile(fullgraph=True)`` refuses ``momentum=None``, whose weight is read from a tensor.

    Args:
        model: any module, itself possibly a batch norm. Modules of exactly the classes
            ``torch.nn.BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm`` change. Subclasses, which
            may have a ``forward`` of their own, parametrized modules, and lazy ones before their
            first batch do not; one warning names them.
        sync: make them all :class:`SyncBatchNorm`; converts bnlib's own BatchNorm modules too.
        process_group: whose ranks share statistics, with ``sync``. None leaves a SyncBatchNorm the
            group it has, and gives the others the default group.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: ``model`` is not a torch module.
        ValueError: a ``process_group`` without ``sync``.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> convert_batch_norm(model)[1].__class__.__module__
        'bnlib.nn'
    """
    _check_model(model)
    if process_group is not None and not sync:
        raise ValueError("expected sync=True with a process_group, got sync=False")
    left = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in _OURS and kind not in _TORCHS:
            theirs = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
            if theirs and not isinstance(module, _Layer):
                left.append(f"{name!r} ({kind.__name__})" if name else kind.__name__)
            continue
        if sync and kind not in (SyncBatchNorm, torch.nn.SyncBatchNorm):
            module.__dict__[_BEFORE] = _TORCHS.get(kind, kind)
            module.__dict__["process_group"] = None
        module.__class__ = SyncBatchNorm if sync else _OURS.get(kind, kind)
        if process_group is not None:
            module.__dict__["process_group"] = process_group
    if left:
        warnings.warn(
            "convert_batch_norm leaves these as they are, which are not of torch's exact classes "
            f"(subclasses, parametrized or lazy modules): {', '.join(left)}",
            stacklevel=2,
        )
    return model


def restore_batch_norm(model: torch.nn.Module) -> torch.nn.Module:
    """Turn every batch norm of bnlib back into torch's, in place: undo :func:`convert_batch_norm`.

    Args:
        model: any module, itself possibly a batch norm. A :class:`SyncBatchNorm` becomes again what
            it was before ``convert_batch_norm(model, sync=True)``, and ``torch.nn.SyncBatchNorm``
            if it was nothing else.

    Returns:
        ``model``, the same object, for scripting, ``torch.ao`` and whoever looks for torch's exact
        classes. What calls a layer with ``residual`` or ``activation`` needs bnlib's.

    Raises:
        TypeError: ``model`` is not a torch module.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> type(restore_batch_norm(convert_batch_norm(model, sync=True))[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    _check_model(model)
    for module in model.modules():
        if type(module) in _TORCHS:
            before = module.__dict__.pop(_BEFORE, None)
            module.__class__ = before or _TORCHS[type(module)]
            if before is not None:
                del module.__dict__["process_group"]
    return model


def _check_model(model: torch.nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
