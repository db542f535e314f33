"""Batch normalization for torch tensors: autograd around the four primitives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnlib import modes, operator, passes, reference
from bnlib.kernels import Kernels, load
from bnlib.kernels.base import inverse_std, move_running
from bnlib.kernels.choose import BACKENDS, FAST, choose
from bnlib.kernels.tensors import check_count, check_layer, check_plain, in_memory, is_plain


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalise every channel of a tensor, and add a residual and apply ReLU in the same pass.

    ::

        y = act(γ (x - μ) / √(σ² + ε) + β + residual)

    In training μ and σ² are the mean and the biased variance of the batch, and the running
    statistics move towards its mean and unbiased variance; in evaluation μ and σ² are the running
    statistics. The arguments up to ``eps`` are those of ``torch.nn.functional.batch_norm``.

    Derivatives of every order are right: under ``create_graph=True``, in forward mode and inside
    ``torch.func`` the layer is computed by differentiable torch operations.

    While torch compiles, exports or records operations, ``backend="auto"`` (and "reference") is
    torch's own operator: the compiler fuses it with its neighbours, which it cannot do with kernels
    that it does not know, and neither way has been measured against the other on a GPU.
    ``backend="gpu"`` or "cpu" forces our kernels into the graph, with what is fused, as the
    operator ``bnlib::batch_norm``, which has first derivatives in reverse mode; whoever loads an
    exported program with it imports ``bnlib.functional`` first. ``torch.jit.trace`` and the
    transforms of ``torch.func`` inside a graph always get torch's operator.

    Args:
        input: x, shape (N, C, ...), real floating, any strides; 16-bit is computed in float32. In
            float32 the variance is inf, and y 0 or NaN, where values lie further than about 10¹⁷
            from their mean (10³⁷ with "reference"): sums of their squares leave its range.
        running_mean: shape (C,); needed in evaluation, updated in place in training unless None.
        running_var: shape (C,), likewise.
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        training: take the statistics of the batch (True) or the running ones (False).
        momentum: weight of the new batch in the running statistics.
        eps: ε; > 0 in training, >= 0 in evaluation.
        residual: added before the activation. One with the shape and dtype of ``input`` is added in
            the same pass, any other (a float32 one beside 16 bits under autocast, or one that
            broadcasts) afterwards, by torch and its rules for both.
        activation: None or "relu". For the backward pass one bit per element is kept, not the
            output.
        process_group: a torch.distributed group whose ranks share the batch's statistics (in
            training), or None for this process alone.
        backend: "reference", "cpu" (Numba), "gpu" (Triton), or "auto" for the fastest one that
            takes the input and can be imported.

    Returns:
        Tensor with the shape, dtype and memory format of ``input``, or with those that torch gives
        its sum with an unlike residual. For an empty batch it is empty, and the running statistics
        stay as they are.

    Raises:
        TypeError: a tensor that is not real floating; for backend "cpu" or "gpu" a dtype, subclass
            or layout that the kernels cannot read.
        ValueError: a shape, a device, ``eps``, ``activation`` or ``backend`` that makes no sense;
            one value per channel, or running statistics that require a gradient, in training;
            evaluation without running statistics; a backend that does not take the input.
        ImportError: a backend whose package (Numba, Triton) is missing.
        RuntimeError: a second or batched derivative with a ``process_group``; running statistics
            in training that a transform such as ``vmap`` cannot update; for the CPU kernels a
            tensor whose storage has been freed.

    Source: Ioffe & Szegedy (2015), algorithms 1 and 2. Derived in *Forward, and what ε does* and
    *Backward*.

    Examples:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> batch_norm(x, None, None, training=True)
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
    """
    tensors = (input, running_mean, running_var, weight, bias)
    how = (training, momentum, eps)
    if not modes.is_compiling() and modes.is_tracing():  # no check can look at shapes now
        y = torch.nn.functional.batch_norm(*tensors, *how)
        return _activate(y, residual, activation)
    check_layer(*tensors, training, eps, residual, activation)
    if backend not in BACKENDS:
        raise ValueError(f"expected backend in {BACKENDS}, got {backend!r}")
    group = process_group if training else None
    if training and group is None:
        check_count(input)
    if residual is not None and (residual.shape, residual.dtype) != (input.shape, input.dtype):
        y = batch_norm(*tensors, *how, process_group=process_group, backend=backend)
        return _activate(y, residual, activation)  # by torch's rules for unlike tensors
    unfused: Callable[..., Tensor] | None = None
    if _require_grad(running_mean, running_var):
        if training:
            raise ValueError("expected running statistics that require no gradient in training")
        unfused = _differentiable
    elif group is None and modes.is_recorded():
        forced = backend in FAST and input.numel() > 0
        if forced and not modes.is_transformed(input, weight, bias, residual):
            return operator.batch_norm(*tensors, residual, activation == "relu", *how, backend)
        unfused = torch.nn.functional.batch_norm
    elif not training and backend == "auto" and _torch_is_as_good(*tensors, residual, activation):
        unfused = torch.nn.functional.batch_norm
    elif modes.is_transformed(input, weight, bias, residual):
        if group is not None:
            raise RuntimeError("synchronised batch norm has first derivatives in reverse mode only")
        unfused = _differentiable
    if unfused is not None:
        return _activate(unfused(*tensors, *how), residual, activation)
    plain = is_plain(*tensors, residual)
    if not plain:
        input, weight, bias, residual = map(in_memory, (input, weight, bias, residual))
        if backend in FAST:
            check_plain(running_mean=running_mean, running_var=running_var)
            check_plain(weight=weight, bias=bias, residual=residual)
        plain = is_plain(input, running_mean, running_var, weight, bias, residual)
    relu, kernels = activation == "relu", choose(input, backend, plain)
    apply = _apply
    if modes.is_compiling():  # and synchronised: this call stays out of the graph
        apply = torch.compiler.disable(_BatchNorm.apply)
    options = (running_mean, running_var, *how, relu, group, kernels, torch.is_grad_enabled())
    return apply(input, weight, bias, residual, options)


# Running statistics, training, momentum, ε, ReLU, group, kernels, and whether grad is enabled.
_Options = tuple[
    Tensor | None, Tensor | None, bool, float, float, bool,
    "torch.distributed.ProcessGroup | None", Kernels, bool,
]  # fmt: skip


class _BatchNorm(torch.autograd.Function):
    """The layer as one node; it keeps x, statistics per channel, and a bit per element."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: _Options,  # in one piece: every argument takes time
    ) -> Tensor:
        running_mean, running_var, training, momentum, eps, relu, group, kernels, enabled = options
        needs_grad = enabled and any(ctx.needs_input_grad)  # in here no gradient is ever enabled
        tensors = (x, running_mean, running_var, weight, bias, residual)
        how = (training, momentum, eps, relu, relu and needs_grad, group)
        y, mean, inv_std, mask, batch = passes.forward(kernels, *tensors, *how, trusted=True)
        if needs_grad:
            ctx.save_for_backward(x, weight, mean, inv_std, mask)
            count = None if batch is None else batch.count
            ctx.options = (eps, group, kernels, count, modes.saved_tensors_are_hooked())
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, inv_std, mask = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
        kernels: Kernels
        eps, group, kernels, count, hooked = ctx.options
        is_first = not (torch.is_grad_enabled() or modes.is_batched(dy))
        plain, trusted = is_plain(dy), not hooked
        if hooked:  # and so saved tensors are what a hook has made of them
            x, weight, mean, inv_std = map(in_memory, (x, weight, mean, inv_std))
            mask = None if mask is None else mask.contiguous()
            x = passes.as_masked(kernels, x, mask)
            plain = plain and is_plain(x, weight, mean, inv_std, mask)
        if not (is_first and plain):
            dy, mask = kernels.behind_relu(dy, mask, x), None
            kernels, trusted = load("reference"), True
        if not is_first:
            # The gradient is to be differentiated again, or dy is a batch of them: by torch
            # operations, with statistics that depend on x, or else a third derivative would take
            # them for constants.
            if group is not None:
                raise RuntimeError("synchronised batch norm has one first derivative at a time")
            if count is not None:
                batch = reference.moments(x)
                mean, inv_std = batch.mean, inverse_std(batch, eps)
        saved = (x, weight, mean, inv_std, mask, count)
        needs = (need_x, need_weight or need_bias, need_residual)
        dx, sum_dy, sum_dy_x_hat, dresidual = passes.backward(
            kernels, dy, *saved, *needs, group, trusted=trusted
        )
        # Autograd casts them to the dtypes of the weight and the bias.
        return (
            dx,
            sum_dy_x_hat if need_weight else None,
            sum_dy if need_bias else None,
            dresidual,
            None,
        )


# Function.apply sees to torch.func first, of which nothing arrives here.
_apply = super(torch.autograd.Function, _BatchNorm).apply


def _require_grad(running_mean: Tensor | None, running_var: Tensor | None) -> bool:
    if running_mean is None or running_var is None or not torch.is_grad_enabled():
        return False
    return running_mean.requires_grad or running_var.requires_grad


def _torch_is_as_good(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> bool:
    """Whether to leave an evaluation to torch, whose derivatives are right where nothing depends
    on the batch: it is one pass there too, and starts sooner. Outputs of 32 MB and more go faster
    on the huge pages of our kernels (book/data/cpu.csv).
    """
    small = not x.is_cpu or x.nbytes < 1 << 25
    return (
        small
        and residual is None
        and activation is None
        and all(t is None or t.dtype == x.dtype for t in (running_mean, running_var, weight, bias))
    )


def _differentiable(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """The layer as plain torch operations, which every transform of torch understands."""
    y, cache = reference.batch_norm_forward(
        x,
        weight,
        bias,
        running_mean=running_mean,
        running_var=running_var,
        training=training,
        eps=eps,
    )
    if cache.moments is not None:
        try:
            move_running(running_mean, running_var, cache.moments, momentum)
        except RuntimeError as error:
            raise RuntimeError(
                "this transform cannot update running statistics in place: pass None for both, or "
                f"pass them to the transformed function as arguments ({error})"
            ) from error
    return y


def _activate(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    if residual is not None:
        y = y + residual
    return y if activation is None else torch.relu(y)
