"""Batch normalization for torch tensors: autograd around the four primitives."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bnlib import reference
from bnlib.kernels import (
    channels_are_neighbours,
    check_beside,
    check_like,
    check_per_channel,
    check_plain,
    dense,
    empty_mask,
    in_memory,
    is_plain,
    pack_mask,
    unpack_mask,
)
from bnlib.statistics import Moments

BACKENDS = ("auto", "reference", "cpu", "gpu")
_TAKEN = {
    "cpu": "a plain tensor of 16, 32 or 64 bits on the CPU",
    "gpu": "a plain tensor of float32, float16 or bfloat16 on a CUDA device (or on the CPU, where "
    "TRITON_INTERPRET=1 was set before triton was imported)",
}


# Asked in every call, and so by the shortest way: where the caches are cold, each step of it costs.
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_modes = torch._C._len_torch_dispatch_stack
_transforms_are_active = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor
# An older torch does not say whether hooks are at work: then its answer is False, not None.
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", bool)


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
    process_group: Any = None,
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
        TypeError: a tensor that is not real floating; for backend "cpu" or "gpu" a parameter or
            residual of a subclass or layout that kernels cannot read.
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
    if not _is_compiling() and _is_tracing():  # shapes are tensors now, which no check can look at
        y = torch.nn.functional.batch_norm(*tensors, training, momentum, eps)
        return _activate(y, residual, activation)
    _check(
        input, running_mean, running_var, weight, bias, training, eps, residual, activation, backend
    )
    group = process_group if training else None
    if training and group is None:
        _check_count(input)
    if residual is not None and (residual.shape, residual.dtype) != (input.shape, input.dtype):
        where = {"process_group": process_group, "backend": backend}
        y = batch_norm(*tensors, training, momentum, eps, **where)
        return _activate(y, residual, activation)  # by torch's rules for unlike tensors
    if (
        running_mean is not None
        and running_var is not None
        and (running_mean.requires_grad or running_var.requires_grad)
        and torch.is_grad_enabled()
    ):
        if training:
            raise ValueError("expected running statistics that require no gradient in training")
        return _activate(_differentiable(*tensors, training, momentum, eps), residual, activation)
    if group is None and _is_traced():
        forced = backend in ("cpu", "gpu") and input.numel() > 0
        if forced and not _is_transformed(input, weight, bias, residual):
            fused = (residual, activation == "relu")
            return _recorded(*tensors, *fused, training, momentum, eps, backend)
        y = torch.nn.functional.batch_norm(*tensors, training, momentum, eps)
        return _activate(y, residual, activation)
    if not training and backend == "auto" and _torch_is_as_good(*tensors, residual, activation):
        return torch.nn.functional.batch_norm(*tensors, training, momentum, eps)
    if _is_transformed(input, weight, bias, residual):
        if group is not None:
            raise RuntimeError("synchronised batch norm has first derivatives in reverse mode only")
        return _activate(_differentiable(*tensors, training, momentum, eps), residual, activation)
    apply = _apply
    if _is_compiling():  # and synchronised: this call stays out of the graph
        apply = torch.compiler.disable(_BatchNorm.apply)
    plain = is_plain(*tensors, residual)
    if not plain:
        input, weight, bias, residual = map(in_memory, (input, weight, bias, residual))
        if backend in ("cpu", "gpu"):
            check_plain(running_mean=running_mean, running_var=running_var)
            check_plain(weight=weight, bias=bias, residual=residual)
        plain = is_plain(input, running_mean, running_var, weight, bias, residual)
    relu, kernels = activation == "relu", _kernels(input, backend, plain)
    how = (training, momentum, eps, relu, group, kernels, torch.is_grad_enabled())
    return apply(input, weight, bias, residual, (running_mean, running_var, *how))


class _BatchNorm(torch.autograd.Function):
    """The layer as one node; it keeps x, statistics per channel, and a bit per element."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: tuple[Any, ...],  # in one piece: every argument takes time
    ) -> Tensor:
        running_mean, running_var, training, momentum, eps, relu, group, kernels, enabled = options
        needs_grad = enabled and any(ctx.needs_input_grad)  # in here no gradient is ever enabled
        tensors = (x, running_mean, running_var, weight, bias, residual)
        how = (training, momentum, eps, relu, relu and needs_grad, group)
        y, mean, inv_std, mask, batch = _forward(kernels, *tensors, *how, trusted=True)
        if needs_grad:
            ctx.save_for_backward(x, weight, mean, inv_std, mask)
            count = None if batch is None else batch.count
            ctx.options = (eps, group, kernels, count, _hooks(False) is not None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, inv_std, mask = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
        eps, group, kernels, count, hooked = ctx.options
        is_first = not (torch.is_grad_enabled() or _is_batched(dy))
        plain = is_plain(dy)
        if hooked:  # and so saved tensors are what a hook has made of them
            x, weight, mean, inv_std = map(in_memory, (x, weight, mean, inv_std))
            mask = None if mask is None else mask.contiguous()
            x = _as_masked(kernels, x, mask)
            plain = plain and is_plain(x, weight, mean, inv_std, mask)
        if not (is_first and plain):
            dy, mask = _behind_relu(kernels, dy, mask, x), None
            kernels = reference
        if not is_first:
            # The gradient is to be differentiated again, or dy is a batch of them: by torch
            # operations, with statistics that depend on x, or else a third derivative would take
            # them for constants.
            if group is not None:
                raise RuntimeError("synchronised batch norm has one first derivative at a time")
            if count is not None:
                batch = reference.moments(x)
                mean, inv_std = batch.mean, _inv_std(batch, eps)
        saved = (x, weight, mean, inv_std, mask, count)
        needs = (need_x, need_weight or need_bias, need_residual)
        dx, sum_dy, sum_dy_x_hat, dresidual = _backward(
            kernels, dy, *saved, *needs, group, trusted=not hooked
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


def _forward(
    kernels: Any,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    keep_mask: bool,
    group: Any,
    *,
    trusted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Moments | None]:
    """Return y, mean, inv_std, the mask if it is to be kept, and the batch's moments in training.

    In training the running statistics move. What is ``trusted`` has been checked for the kernels.
    """
    mask = getattr(kernels, "empty_mask", empty_mask)(x) if keep_mask else None
    fused = (residual, relu, mask)
    if not training:
        assert running_mean is not None and running_var is not None  # _check has seen to it
        mean, inv_std = _widen(running_mean), torch.rsqrt(_widen(running_var) + eps)
        y = _normalize(kernels, x, mean, inv_std, weight, bias, *fused)
        return y, mean, inv_std, mask, None
    if group is None and kernels is not reference:
        running = {"running_mean": running_mean, "running_var": running_var, "momentum": momentum}
        y, batch, inv_std = kernels.moments_and_normalize(
            x, weight, bias, eps, *fused, **running, trusted=trusted
        )
    else:
        batch = kernels.moments(x)
        if group is not None:
            batch = _distributed().sync_moments(batch, group)
            if batch.count == 1:
                raise ValueError(
                    "expected more than 1 value per channel over all ranks in training, got 1"
                )
            if callable(momentum):
                momentum = momentum(batch.count)
        inv_std = _inv_std(batch, eps)
        y = _normalize(kernels, x, batch.mean, inv_std, weight, bias, *fused)
        _update(running_mean, running_var, batch, momentum)
    return y, batch.mean, inv_std, mask, batch


def _backward(
    kernels: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    mask: Tensor | None,
    count: int | None,
    need_x: bool,
    need_sums: bool,
    need_residual: bool,
    group: Any,
    *,
    trusted: bool,
) -> tuple[Any, Any, Any, Any]:
    """Return dx, sum_dy, sum_dy_x_hat and dresidual, those that are needed.

    ``count`` is None where the statistics are constants: in evaluation.
    """
    if mask is not None and (kernels is reference or count is None or not need_x):
        dy, mask = _behind_relu(kernels, dy, mask, x), None
    dresidual = None
    if need_residual:
        dresidual = dy if mask is None else kernels.empty_like(x)
    fused = {} if mask is None else {"mask": mask, "dresidual": dresidual}
    if need_x and count is not None and group is None and kernels is not reference:
        out = kernels.grad_sums_and_input(
            dy, x, mean, inv_std, weight, count, **fused, trusted=trusted
        )
        return *out, dresidual
    dx: Any = None
    sums: Any = (None, None)
    if need_sums or (need_x and count is not None):
        masked = {} if mask is None else {"mask": mask}
        sums = kernels.grad_sums(dy, x, mean, inv_std, **masked)
    if need_x and count is None:
        dx = kernels.normalize(dy, torch.zeros_like(mean), inv_std, weight)
    elif need_x:
        total = sums
        if group is not None:
            total = _distributed().sync_sum(torch.stack(total), group).unbind()
        dx = kernels.grad_input(dy, x, mean, inv_std, weight, *total, count, **fused)
    return dx, *sums, dresidual


def _inv_std(batch: Moments, eps: float) -> Tensor:
    return torch.rsqrt(batch.m2 / max(batch.count, 1) + eps).to(batch.mean.dtype)


def _behind_relu(kernels: Any, dy: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
    """Return the gradient at the input of the ReLU that filled ``mask``, or of none."""
    if mask is None:
        return dy
    return torch.where(getattr(kernels, "unpack_mask", unpack_mask)(mask, x), dy, 0)


def _as_masked(kernels: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` in the layout that it had when its mask was filled, whatever it has now."""
    make = getattr(kernels, "empty_mask", empty_mask)
    if mask is None or mask.shape == make(x).shape:
        return x
    if channels_are_neighbours(x):
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


# --- The layer as an operator, for those who record operations ------------------------------------
# An operator may not change its inputs if it is to have a gradient, return nothing, or return two
# views of one tensor: so the running statistics move outside, statistics per channel are one
# tensor, and an empty one stands for what is not needed.


def _recorded(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    training: bool,
    momentum: float,
    eps: float,
    backend: str,
) -> Tensor:
    """The layer by the kernels of a backend, in a form that torch.compile and export can record."""
    leaves = (x, weight, bias, residual)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    tensors = (x, running_mean, running_var, weight, bias, residual)
    y, statistics, _ = _operator(*tensors, training, eps, relu, relu and needs_grad, backend)
    if training:
        _move(running_mean, statistics[0], momentum)
        _move(running_var, statistics[1], momentum)
    return y


@torch.library.custom_op("bnlib::batch_norm", mutates_args=())
def _operator(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    keep_mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the rows mean, unbiased variance and inv_std, and the mask.

    The running statistics stay as they are.
    """
    given = (x, running_mean, running_var, weight, bias)
    _check(*given, training, eps, residual, "relu" if relu else None, _forced(backend))
    if training:
        _check_count(x)
    x = dense(x)
    running = (None, None) if training else (running_mean, running_var)
    options = (training, 0.0, eps, relu, keep_mask, None)
    tensors = (x, *running, weight, bias, residual)
    kernels = _kernels(x, backend)
    y, mean, inv_std, mask, batch = _forward(kernels, *tensors, *options, trusted=False)
    var = batch.var(correction=1) if batch is not None and batch.count else torch.zeros_like(mean)
    statistics = torch.stack((mean, var, inv_std)).to(_widened(x))
    return dense(y, x), statistics, _nothing(x) if mask is None else mask


@_operator.register_fake
def _(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    keep_mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    statistics = x.new_empty((3, x.shape[1]), dtype=_widened(x))
    make = getattr(_module(_forced(backend)), "empty_mask", empty_mask) if keep_mask else _nothing
    return torch.empty_like(x), statistics, make(x)


@torch.library.custom_op("bnlib::batch_norm_backward", mutates_args=())
def _operator_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
    training: bool,
    need_x: bool,
    need_sums: bool,
    need_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, the rows sum_dy and sum_dy_x_hat, and dy behind the ReLU; empty if not needed."""
    if x.dim() < 2 or statistics.shape != (3, x.shape[1]):
        raise ValueError(
            "expected input of shape (N, C, ...) and statistics of shape (3, C), got shapes "
            f"{tuple(x.shape)} and {tuple(statistics.shape)}"
        )
    check_like(x, dy=dy)
    kernels, (mean, _, inv_std) = _kernels(x, _forced(backend)), statistics
    x = dense(_as_masked(kernels, x, mask))
    saved = (x, weight, mean, inv_std, mask, x.numel() // max(x.shape[1], 1) if training else None)
    needs = (need_x, need_sums, need_residual)
    dx, *sums, dresidual = _backward(kernels, dy, *saved, *needs, None, trusted=False)
    return (
        dense(dx, x) if need_x else _nothing(x),
        torch.stack(sums) if need_sums else _nothing(statistics),
        dense(dresidual, x) if need_residual else _nothing(x),
    )


@_operator_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
    training: bool,
    need_x: bool,
    need_sums: bool,
    need_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    return (
        torch.empty_like(x) if need_x else _nothing(x),
        torch.empty_like(statistics[:2]) if need_sums else _nothing(statistics),
        torch.empty_like(x) if need_residual else _nothing(x),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, weight, _, _, training, _, _, keep_mask, backend = inputs
    _, statistics, mask = output
    ctx.save_for_backward(x, weight, statistics, mask if keep_mask else None)
    ctx.training, ctx.backend = training, backend


def _differentiate(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Any, ...]:
    x, weight, statistics, mask = ctx.saved_tensors
    need_x, _, _, need_weight, need_bias, need_residual = ctx.needs_input_grad[:6]
    masked = need_residual and mask is not None
    needs = (need_x, need_weight or need_bias, masked)
    dx, sums, dresidual = _operator_backward(
        dy, x, weight, statistics, mask, ctx.training, *needs, ctx.backend
    )
    return (
        dx if need_x else None,
        *(None, None),
        sums[1] if need_weight else None,  # autograd casts it to the dtype of the weight
        sums[0] if need_bias else None,
        (dresidual if masked else dy) if need_residual else None,
        *(None,) * 5,
    )


_operator.register_autograd(_differentiate, setup_context=_save)


def _forced(backend: str) -> str:
    if backend not in ("cpu", "gpu"):
        raise ValueError(f"expected backend 'cpu' or 'gpu', got {backend!r}")
    return backend


def _nothing(like: Tensor) -> Tensor:
    """The mask or gradient that is not needed."""
    return like.new_empty(0)


def _widened(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    backend: str,
) -> None:
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
    if backend not in BACKENDS:
        raise ValueError(f"expected backend in {BACKENDS}, got {backend!r}")


def _check_count(input: Tensor) -> None:
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


def _is_traced() -> bool:
    """Whether the operations are being recorded, by torch.compile, export or a dispatch mode."""
    return _is_compiling() or _modes() > 0


def _is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward mode is at work, which do not see inside our kernels, or has
    left a wrapper behind.
    """
    if _transforms_are_active():
        return True
    is_dual_level = forward_ad._current_level >= 0  # asking every tensor takes longer
    is_eager = not _is_compiling()
    for t in tensors:
        if t is None:
            continue
        if is_eager and _is_wrapped(t):
            return True
        if is_dual_level and forward_ad.unpack_dual(t).tangent is not None:
            return True
    return False


def _is_batched(dy: Tensor) -> bool:
    """Whether a gradient is more than one: a batch of them, by torch.func or the older vmap of
    ``is_grads_batched``, or one with a tangent, for which our kernels are linear maps too.
    """
    return _is_transformed(dy) or _is_legacy_batch(dy)


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
            _update(running_mean, running_var, cache.moments, momentum)
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


def _update(
    running_mean: Tensor | None, running_var: Tensor | None, batch: Moments, momentum: float
) -> None:
    """Move the running statistics, in place, towards those of a batch."""
    if running_mean is None or running_var is None or batch.count == 0:
        return
    _move(running_mean, batch.mean, momentum)
    _move(running_var, batch.var(correction=1), momentum)


@torch.no_grad()
def _move(running: Tensor | None, new: Tensor, momentum: float) -> None:
    if running is None:
        return
    wide = torch.promote_types(running.dtype, new.dtype)
    running.copy_((1 - momentum) * running.to(wide) + momentum * new.detach())


def _normalize(
    kernels: ModuleType,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    mask: Tensor | None,
) -> Tensor:
    """The second primitive with residual and ReLU, by any backend."""
    if kernels is not reference:
        fused = {"residual": residual, "relu": relu, "mask": mask}
        return kernels.normalize(x, mean, inv_std, weight, bias, **fused)
    y = reference.normalize(x, mean, inv_std, weight, bias)
    if residual is not None:
        y = y + residual
    if mask is not None:
        mask.copy_(pack_mask(~(y <= 0), x))  # NaN counts as positive, as in torch
    return torch.relu(y) if relu else y


def _kernels(x: Tensor, backend: str, plain: bool = True) -> ModuleType:
    """The module whose primitives serve ``x``, beside other tensors that are plain or not."""
    if backend == "reference" or x.numel() == 0:
        return reference
    if backend == "auto":
        name = "cpu" if x.is_cpu else "gpu" if x.is_cuda else None
        kernels = None if name is None else _load(name)
        return kernels if kernels is not None and plain and kernels.supports(x) else reference
    kernels = _module(backend)
    if not kernels.supports(x):
        raise ValueError(
            f"expected input that backend={backend!r} takes, {_TAKEN[backend]}, got "
            f"{type(x).__name__} of {x.dtype} on {x.device}"
        )
    return kernels


@functools.cache
def _load(name: str) -> ModuleType | None:
    try:
        return _module(name)
    except Exception as error:  # what is installed but broken raises what it likes
        if isinstance(error, ImportError) and error.name == f"bnlib.kernels.{name}":
            return None  # this installation has no such kernels at all
        warnings.warn(
            f"bnlib computes batch norm with its reference, which is slower: {error} "
            f"(install the extra: pip install 'bnlib[{name}]')",
            stacklevel=4,
        )
        return None


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"bnlib.kernels.{name}")


def _widen(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _distributed() -> ModuleType:
    return importlib.import_module("bnlib.distributed")
