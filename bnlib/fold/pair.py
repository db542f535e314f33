"""One layer and one batch norm: the algebra of folding, and when it is exact.

Evaluation-mode batch norm is a x + b per channel. A linear map beside it takes that in: after the
layer in its output channels, before it in its input channels. ``check_bn`` and ``check_layer`` ask
whether two modules compute just that, and :class:`NotExact` says why not; how a model uses them is
another question (:mod:`bnlib.fold`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

_Conv = TypeVar("_Conv", bound=_ConvNd)
_Linear = TypeVar("_Linear", bound=nn.Linear)
_Module = TypeVar("_Module", bound=nn.Module)
_AnyLayer = TypeVar("_AnyLayer", bound=_ConvNd | nn.Linear)
LAYERS = (_ConvNd, nn.Linear)

# The algebra is that of these modules' own forward; a subclass with another forward (a batch norm
# with a built-in ReLU, a weight-standardised convolution) computes something else.
_KNOWN_FORWARDS = {
    "torch.nn.modules.batchnorm",
    "torch.nn.modules.conv",
    "torch.nn.modules.linear",
    "bnlib.nn",
}
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class NotExact(ValueError):
    """Folding would change the output; the message says why."""


def fold_conv_bn(conv: _Conv, bn: _BatchNorm) -> _Conv:
    """Return one convolution that computes ``bn(conv(x))``, with ``bn`` in evaluation mode.

    ::

        a = γ / √(running_var + ε),    w' = a w,    q' = a (q - running_mean) + β

    of weights w and bias q, where a multiplies the weights' *output* channel: axis 0 of a
    convolution's weight (C_out, C_in / groups, ...), axis 1 of a transposed one's
    (C_in, C_out / groups, ...), there group by group.

    Args:
        conv: convolution of 1 to 3 dimensions, plain or transposed, with any groups, stride,
            dilation and padding, with or without bias.
        bn: batch norm over its C_out channels, in evaluation mode, with running statistics.

    Returns:
        A copy of ``conv``, with a bias, on its device, in its dtypes and memory format. Both
        arguments are left as they were. The arithmetic is float64 and rounded once.
        ``requires_grad`` follows the convolution's weight and bias (its weight, where it had no
        bias).

    Raises:
        TypeError: not a convolution, or not a batch norm.
        ValueError: the pair cannot be folded exactly; the message says why.

    Source: Jacob et al. (2018), section 3.2. Derived in *Folding*.

    Examples:
        >>> conv, bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8).eval()
        >>> fold_conv_bn(conv, bn)
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    if not isinstance(conv, _ConvNd):
        raise TypeError(f"expected a convolution of torch.nn, got {type(conv).__name__}")
    return _fold_pair(conv, bn)


def fold_linear_bn(linear: _Linear, bn: _BatchNorm) -> _Linear:
    """Return one linear layer that computes ``bn(linear(x))``, with ``bn`` in evaluation mode.

    The twin of :func:`fold_conv_bn`, by the same two lines.

    Args:
        linear: weight (C_out, C_in), with or without bias. Its input must be (N, C_in): of an input
            (N, L, C_in) a linear layer's channels are the last axis, a batch norm's are axis 1.
        bn: batch norm over the C_out features, in evaluation mode, with running statistics.

    Returns:
        A copy of ``linear``, as there.

    Raises:
        TypeError: not a linear layer, or not a batch norm.
        ValueError: the pair cannot be folded exactly; the message says why.

    Examples:
        >>> fold_linear_bn(nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2).eval())
        Linear(in_features=4, out_features=2, bias=True)
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"expected torch.nn.Linear, got {type(linear).__name__}")
    return _fold_pair(linear, bn)


def _fold_pair(layer: _AnyLayer, bn: _BatchNorm) -> _AnyLayer:
    if not isinstance(bn, _BatchNorm):
        raise TypeError(f"expected a batch norm of torch.nn or bnlib.nn, got {type(bn).__name__}")
    new = copied(layer)
    try:
        fold(new, bn, after=True)
    except NotExact as reason:
        raise ValueError(
            f"cannot fold {type(bn).__name__} into {type(layer).__name__}: {reason}"
        ) from None
    return new


def fold(layer: _ConvNd | nn.Linear, bn: _BatchNorm, *, after: bool) -> None:
    """Fold a batch norm that runs after the layer, or before it, into the layer's parameters.

    After, a (w·x + q) + b = (a w)·x + (a q + b). Before, w·(a x + b) + q = (w a)·x + (q + w·b),
    if every output sees all of w.
    """
    check_bn(bn)
    check_layer(layer, bn, after)
    a, b = _slope_and_intercept(bn)
    # The layouts (C_out, C_in / groups, ...) and, transposed, (C_in, C_out / groups, ...) both
    # hold one group after another along axis 0: w has the axes group, first, second, offset.
    groups, old = getattr(layer, "groups", 1), layer.weight
    w = _float64(old).reshape(groups, old.shape[0] // groups, old.shape[1], -1)
    first = _first_axis(layer, after)
    of_channel = (groups, -1, 1, 1) if first else (groups, 1, -1, 1)
    q = torch.zeros(1, dtype=torch.float64) if layer.bias is None else _float64(layer.bias)
    q = a * q + b if after else q + (w * b.reshape(of_channel)).sum((2, 3)).flatten()
    w = w * a.reshape(of_channel)
    # Both before either is set: the fold that is refused leaves the layer as it was.
    weight = _rounded("weight", w.reshape(old.shape), old)
    # A rounding of normal numbers moves each channel's weights by at most eps / 2 of their norm.
    # Past eps, subnormal numbers have cost bits that the layer's own weights have. (Below float32's
    # normal numbers the slope a of batch norm itself has lost them: dead channels.) The bias needs
    # no such check: it is rounded to the grid to which the output is rounded anyway.
    axes = (2 if first else 1, 3)
    lost, size = (_float64(weight).reshape(w.shape) - w).norm(dim=axes), w.norm(dim=axes)
    if (lost > torch.finfo(old.dtype).eps * size + torch.finfo(torch.float32).tiny).any():
        raise NotExact(f"the folded weight underflows {old.dtype}")
    bias = old.new_empty(q.shape, requires_grad=old.requires_grad)
    layer.bias = _rounded("bias", q, bias if layer.bias is None else layer.bias)
    layer.weight = weight


def _float64(t: Tensor) -> Tensor:
    # On the CPU, since not every device has float64; the result is rounded once, in _rounded.
    return t.detach().to("cpu", torch.float64)


def _slope_and_intercept(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """a and b of y = a x + b, float64, shape (C,)."""
    assert bn.running_mean is not None and bn.running_var is not None
    a = torch.rsqrt(_float64(bn.running_var) + bn.eps)
    if bn.weight is not None:
        a = a * _float64(bn.weight)
    b = -a * _float64(bn.running_mean)
    if bn.bias is not None:
        b = b + _float64(bn.bias)
    return a, b


def _rounded(name: str, value: Tensor, like: Tensor) -> nn.Parameter:
    """``value`` as a parameter with ``like``'s dtype, device, memory format and requires_grad."""
    new = torch.empty_like(like, requires_grad=False).copy_(value)
    if not new.isfinite().all():
        what = f"overflows {like.dtype}" if value.isfinite().all() else "is not finite"
        raise NotExact(f"the folded {name} {what}")
    return nn.Parameter(new, like.requires_grad)


def check_bn(bn: _BatchNorm) -> None:
    if bn.training:
        raise NotExact("it is in training mode: call .eval() to use the running statistics")
    if bn.running_mean is None or bn.running_var is None:
        raise NotExact("it has no running statistics (track_running_stats=False)")
    _check_module(bn)


def _check_module(module: nn.Module) -> None:
    """Raise unless the module computes what its weight and bias say."""
    what, registered = type(module).__name__, module._parameters | module._buffers
    tensors = [t for t in registered.values() if t is not None]
    if any(map(is_lazy, tensors)):
        raise NotExact(f"{what} is lazy and has not seen an input yet")
    for name in ("forward", "_conv_forward"):
        function = getattr(module, name, module.forward)
        if function.__module__ not in _KNOWN_FORWARDS or name in vars(module):
            raise NotExact(f"{what} has a forward of its own")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, name, None) is not registered.get(name):
            raise NotExact(f"{what}'s {name} is computed (a parametrization or pruning)")
    if has_hooks(module):
        raise NotExact(f"{what} has hooks, which would see other values or none")
    for t in tensors:
        if (odd := oddity(t)) or (t.ndim and t.dtype not in _DTYPES):
            raise NotExact(f"{what}'s tensors are {odd or t.dtype}")


def oddity(t: Tensor) -> str | None:
    """What makes this tensor another thing than numbers in memory, if anything."""
    if t.is_meta:
        return "on the meta device, without values"
    if type(t.data) is not Tensor:
        return type(t.data).__name__
    return None if t.layout == torch.strided else str(t.layout)


def check_layer(layer: _ConvNd | nn.Linear, bn: _BatchNorm, after: bool) -> None:
    _check_module(layer)
    rank = rank_of(layer)
    if rank not in ranks_of(bn):
        raise NotExact(f"{type(bn).__name__} does not take {rank}-D tensors")
    assert bn.running_mean is not None
    first, groups = _first_axis(layer, after), getattr(layer, "groups", 1)
    channels = layer.weight.shape[0] if first else layer.weight.shape[1] * groups
    if channels != len(bn.running_mean):
        raise NotExact(
            f"the layer has {channels} {'output' if after else 'input'} channels, "
            f"the batch norm {len(bn.running_mean)} features"
        )
    if not after and isinstance(layer, _ConvTransposeNd):
        raise NotExact("at the border of a transposed convolution fewer weights meet the β")
    if not after and isinstance(layer, _ConvNd) and _pads_with_zeros(layer):
        raise NotExact("the zeros that the convolution pads with would have to be normalised")


def _first_axis(layer: nn.Module, after: bool) -> bool:
    """Whether the batch norm's channels are counted by the weight's first axis, or its second."""
    return after != isinstance(layer, _ConvTransposeNd)


def rank_of(layer: nn.Module) -> int:
    """The rank of a batched input: (N, C) for a linear layer, (N, C, ...) for a convolution."""
    return len(layer.kernel_size) + 2 if isinstance(layer, _ConvNd) else 2


def ranks_of(bn: nn.Module) -> tuple[int, ...]:
    known = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
    return next((r for cls, r in known.items() if isinstance(bn, cls)), (2, 3, 4, 5))  # SyncBN


def _pads_with_zeros(conv: _ConvNd) -> bool:
    # Asks the attribute that forward reads, not what the constructor derived from it: networks are
    # dilated after they are built, by assigning to dilation and padding.
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        return False
    if conv.padding == "same":
        return any(length > 1 for length in conv.kernel_size)
    return bool(torch.as_tensor(conv.padding).any())


def has_hooks(module: nn.Module) -> bool:
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for kind in kinds)


def copied(model: _Module) -> _Module:
    """A deep copy that shares, or detaches, what cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:
        memo: dict[int, Any] = {}
    modules = {id(m): m for m in model.modules()}
    for _, value in (item for m in modules.values() for item in held(m)):
        try:
            copy.deepcopy(value, dict(modules))
        except Exception:
            memo[id(value)] = value.detach().clone() if isinstance(value, Tensor) else value
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied ({error})") from error


def held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module's attributes hold, in lists, tuples and dicts too, but for its submodules."""
    for name, value in vars(module).items():
        if name != "_modules" and value is not None and not isinstance(value, (bool, int, str)):
            yield from ((name, leaf) for leaf in tree_leaves(value))
