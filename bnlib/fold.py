"""Folding: evaluation-mode batch norm written into the weights of the layer beside it."""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import gc
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

_Conv = TypeVar("_Conv", bound=_ConvNd)
_Linear = TypeVar("_Linear", bound=nn.Linear)
_Module = TypeVar("_Module", bound=nn.Module)
_AnyLayer = TypeVar("_AnyLayer", bound=_ConvNd | nn.Linear)
_LAYERS = (_ConvNd, nn.Linear)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

# The algebra is that of these modules' own forward; a subclass with another forward (a batch norm
# with a built-in ReLU, a weight-standardised convolution) computes something else.
_KNOWN_FORWARDS = {
    "torch.nn.modules.batchnorm",
    "torch.nn.modules.conv",
    "torch.nn.modules.linear",
    "bnlib.nn",
}
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
# Classes of torch that hold a model and run it their own way.
_WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FSDPModule",
    "FullyShardedDataParallel",
    "OptimizedModule",
    "ScriptModule",
}


class FoldReport(NamedTuple):
    """What :func:`fold_batch_norm` did to each batch norm of a model.

    Attributes:
        folded: name of the batch norm -> name of the layer that now does its work.
        kept: name of the batch norm -> why folding it would not be exact.
        unseen: what might use a folded layer alone and could not be followed: methods that
            forward does not run and that find modules by iterating or by a name made at run time,
            optional arguments whose other values could not be tried, hooks of the model itself.
    """

    folded: dict[str, str]
    kept: dict[str, str]
    unseen: tuple[str, ...] = ()


class FoldedBatchNorm(nn.Module):
    """What stands where a batch norm was folded whose rank or arguments still matter.

    ::

        y = act(input + residual)

    Args:
        rank: of the inputs to take, 0 for any.

    ``forward(input, residual=None, activation=None)`` has the arguments of ``bnlib.nn``'s
    modules, and raises ``ValueError`` for inputs of another rank, whose axis 1 would not be the
    axis folded. ``torch.jit.script``, ``torch.fx``, ``torch.export`` and quantization take it.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def extra_repr(self) -> str:
        return f"rank={self.rank}"

    def forward(
        self, input: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        y = _of_rank(input, self.rank)
        if residual is not None:
            y = y + residual
        if activation is not None:
            if activation != "relu":
                raise ValueError(f"expected None or 'relu' as activation, got {activation}")
            y = torch.relu(y)
        return y


def _of_rank(x: Tensor, rank: int) -> Tensor:
    # Not x.dim(), which TorchScript does not ask for behind a convolution.
    if rank > 0 and len(x.shape) != rank:
        raise ValueError(
            f"expected a {rank}-D input, got shape {list(x.shape)}: the batch norm folded into "
            "the layer beside it would have normalised another axis"
        )
    return x


torch.fx.wrap("_of_rank")  # a traced model keeps the check


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

    ::

        a = γ / √(running_var + ε),    w' = a w,    q' = a (q - running_mean) + β

    Args:
        linear: weight (C_out, C_in), with or without bias. Its input must be (N, C_in): of an input
            (N, L, C_in) a linear layer's channels are the last axis, a batch norm's are axis 1.
        bn: batch norm over the C_out features, in evaluation mode, with running statistics.

    Returns:
        A copy of ``linear``, as for :func:`fold_conv_bn`.

    Raises:
        TypeError: not a linear layer, or not a batch norm.
        ValueError: the pair cannot be folded exactly; the message says why.

    Source: Jacob et al. (2018), section 3.2. Derived in *Folding*.

    Examples:
        >>> fold_linear_bn(nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2).eval())
        Linear(in_features=4, out_features=2, bias=True)
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"expected torch.nn.Linear, got {type(linear).__name__}")
    return _fold_pair(linear, bn)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which every batch norm that can be folded exactly is.

    A batch norm folds into the layer before it, ``bn(layer(x))``, when nothing else uses that
    layer's output; a residual and a ReLU that ``bnlib.nn`` fused into the call stay behind.
    Failing that it folds into the layer after it, ``layer(bn(x))``, when nothing else uses the
    batch norm's output, nothing that could write into its input runs between the two, and the
    layer does not pad with zeros (a padded zero is not a normalised zero) and is not transposed
    (whose border sees fewer weights). Everything else is kept, with the reason in the report:

    - a batch norm in training mode, without running statistics, or called more than once;
    - a layer or batch norm with hooks, with a ``forward`` of its own, with a computed weight
      (parametrized, pruned, under weight or spectral norm), or whose parameters or buffers share
      memory with another module's;
    - one that ``forward`` reads, changes or asks about (``bn.eps``, ``bn.train()``,
      ``isinstance(bn, ...)``), or whose output it stores;
    - one that another method of the model calls or reads alone, as far as its code names it;
    - weights that the layer's dtype cannot hold: not finite, or rounded more coarsely than its
      other weights are (float16 below 6e-5).

    The model is traced with ``torch.fx`` only to learn who feeds whom; its own ``forward`` stays.
    It is followed as called with its required arguments, a second time, and with each optional
    one that is a bool negated or that is None given. Not followed, so yours to know: code outside
    the model that uses a folded layer alone, what attributes switch on later, and what
    ``fold_report.unseen`` lists. Batch norms that the model calls as a function
    (``torch.nn.functional.batch_norm``) are neither folded nor listed.

    Args:
        model: any traceable module, in evaluation mode. It is not changed.

    Returns:
        A deep copy of ``model`` with the folded layers in their places, ``torch.nn.Identity`` or
        :class:`FoldedBatchNorm` where a batch norm was, and a :class:`FoldReport` in its attribute
        ``fold_report``, which goes on where that of an already folded model ends. It is for
        evaluation. Of attributes that cannot be copied, tensors with a history become detached
        copies, and other objects (process groups) are shared with ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is in training mode, is wrapped (DistributedDataParallel, FSDP,
            ``torch.compile``, TorchScript), or cannot be copied or traced.

    Source: Jacob et al. (2018), section 3.2. Derived in *Folding*.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.ReLU()).eval()
        >>> fold_batch_norm(model).fold_report
        FoldReport(folded={'1': '0'}, kept={}, unseen=())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if _wraps(model):
        raise ValueError(
            f"expected the model itself, got {type(model).__name__}, which wraps or compiles one: "
            "fold the model first, and wrap or compile the result"
        )
    if model.training:
        raise ValueError(
            f"expected a model in evaluation mode, got {type(model).__name__} in training mode, "
            "where batch norm uses each batch's own statistics: call model.eval() first"
        )
    norms = {n: bn for n, bn in model.named_modules() if isinstance(bn, _BatchNorm)}
    view = _View(model)
    plans: dict[str, _Plan] = {}
    kept: dict[str, str] = {}
    for name in norms:
        try:
            plans[name] = view.plan(name)
        except _NotExact as reason:
            kept[name] = str(reason)
    while plans and (wrong := _wrong(view, plans)):
        kept |= wrong
        plans = {name: plan for name, plan in plans.items() if name not in wrong}
    result, folded, refused = _apply(model, plans)
    kept |= refused
    report = FoldReport(folded, {name: kept[name] for name in norms if name in kept}, view.unseen())
    earlier = getattr(model, "fold_report", None)
    if isinstance(earlier, FoldReport):
        unseen = dict.fromkeys((*earlier.unseen, *report.unseen))
        report = FoldReport(earlier.folded | folded, report.kept, tuple(unseen))
    result.fold_report = report  # type: ignore[assignment]
    return result


# --- One pair -------------------------------------------------------------------------------------


class _NotExact(ValueError):
    """Folding would change the output; the message says why."""


def _fold_pair(layer: _AnyLayer, bn: _BatchNorm) -> _AnyLayer:
    if not isinstance(bn, _BatchNorm):
        raise TypeError(f"expected a batch norm of torch.nn or bnlib.nn, got {type(bn).__name__}")
    new = _copy(layer)
    try:
        _fold(new, bn, after=True)
    except _NotExact as reason:
        raise ValueError(
            f"cannot fold {type(bn).__name__} into {type(layer).__name__}: {reason}"
        ) from None
    return new


def _fold(layer: _ConvNd | nn.Linear, bn: _BatchNorm, *, after: bool) -> None:
    """Fold a batch norm that runs after the layer, or before it, into the layer's parameters.

    After, a (w·x + q) + b = (a w)·x + (a q + b). Before, w·(a x + b) + q = (w a)·x + (q + w·b),
    if every output sees all of w.
    """
    _check_bn(bn)
    _check_layer(layer, bn, after)
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
        raise _NotExact(f"the folded weight underflows {old.dtype}")
    if layer.bias is None:
        layer.bias = _rounded("bias", q, old.new_empty(q.shape), old.requires_grad)
    else:
        layer.bias = _rounded("bias", q, layer.bias)
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


def _rounded(name: str, value: Tensor, like: Tensor, grad: bool | None = None) -> nn.Parameter:
    """``value`` as a parameter with the dtype, device and memory format of ``like``."""
    new = torch.empty_like(like, requires_grad=False).copy_(value)
    if not new.isfinite().all():
        what = f"overflows {like.dtype}" if value.isfinite().all() else "is not finite"
        raise _NotExact(f"the folded {name} {what}")
    return nn.Parameter(new, like.requires_grad if grad is None else grad)


def _check_bn(bn: _BatchNorm) -> None:
    if bn.training:
        raise _NotExact("it is in training mode: call .eval() to use the running statistics")
    if bn.running_mean is None or bn.running_var is None:
        raise _NotExact("it has no running statistics (track_running_stats=False)")
    _check_module(bn)


def _check_module(module: nn.Module) -> None:
    """Raise unless the module computes what its weight and bias say."""
    what = type(module).__name__
    if any(is_lazy(t) for t in (*module.parameters(), *module.buffers())):
        raise _NotExact(f"{what} is lazy and has not seen an input yet")
    functions = [getattr(module, f) for f in ("forward", "_conv_forward") if hasattr(module, f)]
    if not all(getattr(f, "__module__", None) in _KNOWN_FORWARDS for f in functions) or (
        vars(module).keys() & {"forward", "_conv_forward"}
    ):
        raise _NotExact(f"{what} has a forward of its own")
    registered = module._parameters | module._buffers
    for name in ("weight", "bias", "running_mean", "running_var")[
        : 4 if isinstance(module, _BatchNorm) else 2
    ]:
        if name not in registered or getattr(module, name) is not registered[name]:
            raise _NotExact(f"{what}'s {name} is computed (a parametrization or pruning)")
    if _has_hooks(module):
        raise _NotExact(f"{what} has hooks, which would see other values or none")
    for t in registered.values():
        if t is not None and (t.is_meta or type(t.data) is not Tensor or t.layout != torch.strided):
            raise _NotExact(f"{what}'s tensors are {_kind(t)}")
        if t is not None and t.ndim and t.dtype not in _DTYPES:
            raise _NotExact(f"{what}'s tensors are {t.dtype}")


def _kind(t: Tensor) -> str:
    if t.is_meta:
        return "on the meta device, without values"
    return str(t.layout) if type(t.data) is Tensor else type(t.data).__name__


def _check_layer(layer: _ConvNd | nn.Linear, bn: _BatchNorm, after: bool) -> None:
    _check_module(layer)
    rank = _rank(layer)
    if rank not in _ranks(bn):
        raise _NotExact(f"{type(bn).__name__} does not take {rank}-D tensors")
    assert bn.running_mean is not None
    first, groups = _first_axis(layer, after), getattr(layer, "groups", 1)
    channels = layer.weight.shape[0] if first else layer.weight.shape[1] * groups
    if channels != len(bn.running_mean):
        raise _NotExact(
            f"the layer has {channels} {'output' if after else 'input'} channels, "
            f"the batch norm {len(bn.running_mean)} features"
        )
    if not after and isinstance(layer, _ConvTransposeNd):
        raise _NotExact("at the border of a transposed convolution fewer weights meet the β")
    if not after and isinstance(layer, _ConvNd) and _pads_with_zeros(layer):
        raise _NotExact("the zeros that the convolution pads with would have to be normalised")


def _first_axis(layer: nn.Module, after: bool) -> bool:
    """Whether the batch norm's channels are counted by the weight's first axis, or its second."""
    return after != isinstance(layer, _ConvTransposeNd)


def _rank(layer: nn.Module) -> int:
    """The rank of a batched input: (N, C) for a linear layer, (N, C, ...) for a convolution."""
    return len(layer.kernel_size) + 2 if isinstance(layer, _ConvNd) else 2


def _ranks(bn: nn.Module) -> tuple[int, ...]:
    if isinstance(bn, nn.BatchNorm1d):
        return (2, 3)
    if isinstance(bn, nn.BatchNorm2d):
        return (4,)
    if isinstance(bn, nn.BatchNorm3d):
        return (5,)
    return (2, 3, 4, 5)  # SyncBatchNorm


def _pads_with_zeros(conv: _ConvNd) -> bool:
    # Asks the attribute that forward reads, not what the constructor derived from it: networks are
    # dilated after they are built, by assigning to dilation and padding.
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        return False
    if conv.padding == "same":
        return any(length > 1 for length in conv.kernel_size)
    return bool(torch.as_tensor(conv.padding).any())


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


# --- One model ------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    options: list[tuple[str, bool]]  # the layer's name, and whether the batch norm runs after it
    fused: bool  # the batch norm is called with more than its input


def _apply(
    model: nn.Module, plans: dict[str, _Plan]
) -> tuple[nn.Module, dict[str, str], dict[str, str]]:
    """A copy of the model with these folds, where they went, and which the numbers forbid."""
    result = _copy(model)
    folded: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, (options, fused) in plans.items():
        bn, reasons = result.get_submodule(name), []
        for layer, after in options:
            module = result.get_submodule(layer)
            assert isinstance(bn, _BatchNorm) and isinstance(module, _LAYERS)
            try:
                _fold(module, bn, after=after)
            except _NotExact as reason:
                reasons.append(str(reason))
                continue
            rank = 0 if len(_ranks(bn)) == 1 else _rank(module)
            new = FoldedBatchNorm(rank) if rank or fused else nn.Identity()
            for parent in result.modules():
                for key, child in parent._modules.items():
                    if child is bn:  # a module can have several names
                        parent._modules[key] = new.eval()
            folded[name] = layer
            break
        else:
            refused[name] = "; ".join(reasons)
    return result, folded, refused


def _wrong(view: _View, plans: dict[str, _Plan]) -> dict[str, str]:
    """The folds after which forward records anything else than before, and what."""
    result, *_ = _apply(view.model, plans)
    try:
        if all(trace.same(_Trace(result, *trace.how)) for trace in view.traces):
            return {}
        difference = "forward records other calls"
    except ValueError as error:
        difference = f"forward fails ({error.__cause__ or error})"
    names = list(plans)
    if len(names) == 1:
        return {names[0]: f"{difference} when it is folded"}
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    left, right = (_wrong(view, {name: plans[name] for name in half}) for half in halves)
    return left | right or dict.fromkeys(names, f"{difference} when these are folded together")


def _copy(model: _Module) -> _Module:
    """A deep copy that shares, or detaches, what cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:
        memo: dict[int, Any] = {}
    modules = {id(m): m for m in model.modules()}
    for value in (value for m in modules.values() for value in _held(m)):
        try:
            copy.deepcopy(value, dict(modules))
        except Exception:
            memo[id(value)] = value.detach().clone() if isinstance(value, Tensor) else value
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied ({error})") from error


def _held(module: nn.Module) -> list[Any]:
    """What a module's attributes hold, in lists, tuples and dicts too, but for its submodules."""
    return tree_leaves({k: v for k, v in vars(module).items() if k != "_modules"})


def _wraps(module: nn.Module) -> bool:
    classes = type(module).__mro__
    return any(c.__name__ in _WRAPPERS and c.__module__.startswith("torch.") for c in classes)


def _sharing(model: nn.Module) -> set[nn.Module]:
    """The modules that hold a tensor whose memory something else of the model holds too."""
    spans = []
    for module in model.modules():
        for t in _held(module):
            if isinstance(t, Tensor) and type(t.data) is Tensor and t.layout == torch.strided:
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                if t.numel() and not t.is_meta:
                    start = t.data_ptr()
                    spans.append((start, start + (last + 1) * t.element_size(), module))
    found: set[nn.Module] = set()
    end, holder = 0, model
    for start, stop, module in sorted(spans, key=lambda span: span[:2]):
        if start < end:
            found |= {holder, module}
        if stop > end:
            end, holder = stop, module
    return found


class _View:
    """What can be seen of how a model uses its layers and batch norms."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = dict(model.named_modules())
        self._paths: dict[nn.Module, list[list[str]]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            path = name.split(".") if name else []
            self._paths.setdefault(module, []).append(path)
            for key, value in vars(module).items():  # in a plain list, say
                for held in tree_leaves(value) if key != "_modules" else ():
                    held = getattr(held, "__self__", held)  # a bound method
                    if isinstance(held, nn.Module):
                        self._paths.setdefault(held, []).append([*path, key])
        self._sharing = _sharing(model)
        if "forward" in vars(model):
            raise ValueError(
                f"the forward of this {type(model).__name__} was set on the instance, where "
                "torch.fx does not see it: set it on a subclass"
            )
        signature = inspect.signature(model.forward).parameters.values()
        defaults = {p.name: p.default for p in signature if p.default is not p.empty}
        self.traces = [_Trace(model, defaults)]
        self._failed: list[str] = []
        try:
            self.traces.append(_Trace(model, defaults, calls=2))
        except ValueError:
            self._failed.append("a second call of forward")
        for name, value in defaults.items():
            others = {k: v for k, v in defaults.items() if k != name}
            try:
                if value is None:
                    self.traces.append(_Trace(model, others))
                elif isinstance(value, bool):
                    self.traces.append(_Trace(model, others | {name: not value}))
                else:
                    self._failed.append(f"forward with another {name!r}")
            except ValueError:
                self._failed.append(f"forward with {name!r} given")
        self._ran = {method for trace in self.traces for method in trace.ran}
        self._name = {module: name for name, module in self._modules.items()}

    def plan(self, name: str) -> _Plan:
        """Where a batch norm may be folded, as far as its use is concerned."""
        bn = self._modules[name]
        assert isinstance(bn, _BatchNorm)
        _check_bn(bn)
        self._check_shared(bn)
        options, reasons = [], []
        for after in (True, False):
            try:
                layer = self.traces[0].neighbour(name, after)
                module = self._modules[layer]
                assert isinstance(module, _LAYERS)  # a _Trace names no other
                _check_layer(module, bn, after)
                self._check_shared(module)
                for trace in self.traces[1:]:
                    if trace.uses(name, layer):
                        trace.check(name, layer, after)
                self._check_hidden(module, bn)
                self._check_hidden(bn, module)
                options.append((layer, after))
            except _NotExact as reason:
                reasons.append(str(reason))
        if not options:
            raise _NotExact("; ".join(dict.fromkeys(reasons)))
        return _Plan(options, any(trace.fused(name) for trace in self.traces))

    def unseen(self) -> tuple[str, ...]:
        found = dict.fromkeys(self._failed)
        if _has_hooks(self.model):
            found["hooks of the model"] = None
        for name, module in self._modules.items():
            for code, method in _methods(module).items():
                blind = (name, code) not in self._ran and _names(code) & _BY_NAME
                if blind and not _sets_up(module, code):
                    found[f"{type(module).__name__}.{method}"] = None
        return tuple(found)

    def _check_shared(self, module: nn.Module) -> None:
        if module in self._sharing:
            raise _NotExact(f"{type(module).__name__}'s tensors are held by another module too")

    def _check_hidden(self, module: nn.Module, partner: nn.Module) -> None:
        """Raise if a method that forward did not run uses the module without its partner."""
        for path in self._paths[module]:
            shared = max(_common(path, other) for other in self._paths[partner])
            chain = [self.model.get_submodule(".".join(path[:i])) for i in range(len(path))]
            for depth, owner in enumerate(chain):
                for code, method in _methods(owner).items():
                    ran = (self._name[owner], code) in self._ran
                    mentions = [] if ran else list(_mentions(code))
                    if mentions and _sets_up(owner, code):
                        # There conv.weight is set and conv put into a list; conv(x) is a use.
                        only_calls = "init" in _names(code)
                        mentions = [
                            m
                            for m in mentions
                            if m.called or not (only_calls or m.attribute or m.name == path[-1])
                        ]
                    if any(_reaches(m, path, chain, depth, shared) for m in mentions):
                        raise _NotExact(
                            f"the method {method!r} of {type(owner).__name__} uses "
                            f"{'.'.join(path)!r} too"
                        )


def _common(one: list[str], other: list[str]) -> int:
    """How many containers two paths share."""
    shared = 0
    for a, b in zip(one[:-1], other[:-1], strict=False):
        if a != b:
            break
        shared += 1
    return shared


class _Tracer(torch.fx.Tracer):
    """Records forward's calls of modules, and how each layer and batch norm was when called."""

    def __init__(self, originals: dict[nn.Module, nn.Module], methods: dict[CodeType, str]) -> None:
        super().__init__()
        self.originals, self.methods = originals, methods
        self.changed: set[nn.Module] = set()
        self.ran: set[tuple[int, CodeType]] = set()
        self.frames: dict[torch.fx.Node, list[FrameType]] = {}
        self.outputs: dict[torch.fx.Node, weakref.ref[torch.fx.Proxy]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or isinstance(m, (_BatchNorm, FoldedBatchNorm, *_LAYERS))
            # Hooks belong to real calls, not to the tracer's.
            or _has_hooks(m)
            or _wraps(m)
            # What holds neither may do what it likes inside.
            or not any(isinstance(part, (_BatchNorm, *_LAYERS)) for part in m.modules())
        )

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Proxy:
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        if kind == "call_module":
            module = self.root.get_submodule(target)
            if module in self.originals and not _unchanged(module, self.originals[module]):
                self.changed.add(module)
            self.outputs[proxy.node] = weakref.ref(proxy)
            frames = self.frames.setdefault(proxy.node, [])
            frame: FrameType | None = sys._getframe()
            while frame is not None and frame.f_code is not _Trace.__init__.__code__:
                code = frame.f_code
                if code in self.methods and code.co_argcount:
                    self.ran.add((id(frame.f_locals.get(code.co_varnames[0])), code))
                    if not self.methods[code].startswith("_"):
                        frames.append(frame)
                frame = frame.f_back
        return proxy


def _unchanged(module: nn.Module, original: nn.Module) -> bool:
    """Whether a copy is still as its original is."""

    def settings(m: nn.Module) -> dict[str, str]:
        kinds = (bool, int, float, str, tuple, type(None))
        return {name: repr(v) for name, v in vars(m).items() if isinstance(v, kinds)}

    ours, theirs = ({**m._parameters, **m._buffers} for m in (module, original))
    return (
        type(module) is type(original)
        and settings(module) == settings(original)
        and _has_hooks(module) == _has_hooks(original)
        and ours.keys() == theirs.keys()
        and all(_equal(ours[name], theirs[name]) for name in ours)
    )


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    try:
        same = torch.equal(one, other) or torch.isclose(one, other, 0, 0, equal_nan=True).all()
        return bool(same)
    except RuntimeError:  # sparse, float8, meta: no tensors of a layer that folds
        return True


class _Trace:
    """One symbolic run of a model's forward: who feeds whom."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any], calls: int = 1) -> None:
        # Tracing runs the model's own code, which may write attributes and weights: on a copy.
        twin = _copy(model)
        self.how = arguments, calls
        originals: dict[nn.Module, nn.Module] = {}
        for ours, theirs in zip(twin.modules(), model.modules(), strict=True):
            with contextlib.suppress(_NotExact):  # what cannot be folded need not be watched
                if isinstance(ours, (_BatchNorm, *_LAYERS)):
                    _check_module(ours)
                    originals[ours] = theirs
        methods = {c: name for module in twin.modules() for c, name in _methods(module).items()}
        try:
            # What forward draws at random must not differ between two runs.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                for _ in range(calls):
                    tracer = _Tracer(originals, methods)
                    graph = tracer.trace(twin, concrete_args=arguments)
        except Exception as error:
            raise ValueError(
                f"torch.fx cannot trace {type(model).__name__} ({error}). Fold a traceable part "
                "of it, or single pairs with fold_conv_bn and fold_linear_bn"
            ) from error
        # The calls of public methods under way at each call of a module. All frames were held until
        # here, so their ids are unique.
        self._methods = {n: {id(f) for f in frames} for n, frames in tracer.frames.items()}
        tracer.frames.clear()
        self._outputs = tracer.outputs
        # One module can have several names: go by the module, and call it by its first name.
        first = {module: name for name, module in twin.named_modules()}
        self.ran = {(n, c) for m, n in first.items() for i, c in tracer.ran if i == id(m)}
        self._modules = dict(twin.named_modules(remove_duplicate=False))
        self._name: dict[torch.fx.Node, str] = {}
        self._node: dict[str, torch.fx.Node] = {}
        self._read: set[str] = set()
        self._record: list[Any] = []
        self._constants: list[Any] = []
        untraced: set[nn.Module] = set()
        for node in graph.nodes:
            self._record.append((node.op, node.target, str(node.args), str(node.kwargs)))
            if node.op == "call_module":
                module = self._modules[str(node.target)]
                self._name[node], self._node[first[module]] = first[module], node
                held = [part for m in module.modules() for part in _held(m)]
                inside = [m for m in (module, *held) if isinstance(m, nn.Module)]
                untraced |= {part for m in inside for part in m.modules()} - {module}
            elif node.op == "get_attr":
                path, _, attribute = str(node.target).rpartition(".")
                owner = twin.get_submodule(path)
                value = getattr(owner, attribute)
                if not node.users or not all(map(_asks_for_form, node.users)):
                    self._read.add(first[owner])
                    self._constants.append(value)
        self._calls = Counter(self._name.values())
        self._untraced = {first[module] for module in untraced if module in first}
        tracer.changed |= {m for m, o in originals.items() if not _unchanged(m, o)}
        self._changed = {first[module] for module in tracer.changed}

    def same(self, other: _Trace) -> bool:
        """Whether two runs recorded the same calls, of the same constants."""
        return (
            self._record == other._record
            and len(self._constants) == len(other._constants)
            and all(map(_equal, self._constants, other._constants))
        )

    def uses(self, *names: str) -> bool:
        return any(self._calls[name] or name in self._untraced for name in names)

    def fused(self, bn: str) -> bool:
        return bn in self._node and len(self._arguments(bn)) > 1

    def neighbour(self, bn: str, after: bool) -> str:
        """The layer that this batch norm runs after, or before, and that does so for it alone."""
        self._check_call(bn)
        layer = self._before(bn) if after else self._after(bn)
        if self._methods[self._node[layer]] != self._methods[self._node[bn]]:
            raise _NotExact(f"a method that forward runs calls only one of it and {layer!r}")
        return layer

    def check(self, bn: str, layer: str, after: bool) -> None:
        """Raise unless they are neighbours in this run too."""
        try:
            if (found := self.neighbour(bn, after)) != layer:
                raise _NotExact(f"its neighbour is {found!r}")
        except _NotExact as reason:
            raise _NotExact(f"in another call of forward {reason}") from None

    def _arguments(self, bn: str) -> dict[str, Any]:
        node = self._node[bn]
        names = ("input", "residual", "activation")
        return {**dict(zip(names, node.args, strict=False)), **node.kwargs}

    def _check_call(self, bn: str) -> None:
        """Raise unless the model calls this batch norm once, with one tensor to normalise."""
        if bn in self._untraced or not self._calls[bn]:
            raise _NotExact("it is inside a module that is not traced (hooks), or not used")
        if self._calls[bn] > 1:
            raise _NotExact(f"it is called {self._calls[bn]} times")
        if bn in self._read:
            raise _NotExact("its parameters are also read directly")
        if bn in self._changed:
            raise _NotExact("forward changes it")
        x, residual, activation = map(self._arguments(bn).get, ("input", "residual", "activation"))
        if (
            not isinstance(x, torch.fx.Node)
            or residual is x
            or not (residual is None or isinstance(residual, torch.fx.Node))
            or activation not in (None, "relu")
            or len(self._node[bn].args) > 3
        ):
            raise _NotExact(f"it is called with {self._node[bn].args}, {self._node[bn].kwargs}")

    def _before(self, bn: str) -> str:
        """The layer whose output is this batch norm's input, and nothing else's."""
        source = self._arguments(bn)["input"]
        name = self._layer(source, "its input comes from")
        users = [node for node in source.users if not _asks_for_form(node)]
        if len(users) > 1:
            raise _NotExact(f"the output of {name!r} has {len(users)} users")
        if self._is_stored(source):
            raise _NotExact(f"forward stores the output of {name!r}")
        return name

    def _after(self, bn: str) -> str:
        """The layer whose input is this batch norm's output, used by nothing else."""
        start = self._node[bn]
        users = list(start.users)
        if len(users) != 1:
            raise _NotExact(f"its output has {len(users)} users")
        layer = self._layer(users[0], "its output goes to")
        if len(self._arguments(bn)) > 1:
            raise _NotExact(f"a residual or an activation comes between it and {layer!r}")
        if self._is_stored(start):
            raise _NotExact("forward stores its output")
        # Folded, the layer reads the batch norm's input, and reads it later.
        node = start.next
        while node is not users[0]:
            if not self._only_reads(node):
                what = _describe(node, self._name.get(node))
                raise _NotExact(f"before {layer!r} runs, {what} may write into its input")
            node = node.next
        return layer

    def _is_stored(self, node: torch.fx.Node) -> bool:
        # A stand-in that outlives the run is held by something in which forward stored it.
        if self._outputs[node]() is not None:
            gc.collect()
        return self._outputs[node]() is not None

    def _only_reads(self, node: torch.fx.Node) -> bool:
        if node.op != "call_module":
            return node.op in ("placeholder", "get_attr")
        module = self._modules[self._name[node]]
        return isinstance(module, (_BatchNorm, *_LAYERS)) and not _has_hooks(module)

    def _layer(self, node: torch.fx.Node, relation: str) -> str:
        name = self._name.get(node)
        if name is None or not isinstance(self._modules[name], _LAYERS):
            raise _NotExact(f"{relation} {_describe(node, name)}")
        if self._calls[name] > 1:
            raise _NotExact(f"{relation} {name!r}, which is called {self._calls[name]} times")
        if name in self._read or name in self._untraced:
            raise _NotExact(f"{relation} {name!r}, which is also used elsewhere")
        if name in self._changed:
            raise _NotExact(f"{relation} {name!r}, which forward changes")
        return name


def _asks_for_form(node: torch.fx.Node) -> bool:
    """Whether a node reads of a tensor only what folding leaves as it is."""
    if node.target is getattr:
        return node.args[1] in ("dtype", "device", "shape", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim")


def _describe(node: torch.fx.Node, name: str | None) -> str:
    if name is not None:
        return repr(name)
    if node.op == "placeholder":
        return "the model's input"
    if node.op == "output":
        return "the model's output"
    target: str | Callable[..., Any] = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


# --- Methods that forward does not run ------------------------------------------------------------

# What finds modules in ways that their code does not name.
_BY_NAME = {"getattr", "get_submodule", "_modules", "modules", "named_modules"}
_BY_NAME |= {"children", "named_children"}
# What a method may do with a layer that leaves its evaluation as it is.
_HARMLESS = {"eval", "requires_grad_", "parameters", "named_parameters", "zero_grad"}


class _Mention(NamedTuple):
    """A place in a method's code that loads an attribute, or self alone (the name "")."""

    name: str
    attribute: str | None  # what is loaded from it next
    called: bool


def _functions(module: nn.Module) -> Iterator[tuple[str, CodeType]]:
    """The functions of a module that are not torch's or bnlib's."""
    spaces: list[Mapping[str, Any]] = [vars(module)]
    for cls in type(module).__mro__:
        if cls is not object and not cls.__module__.startswith(("torch.", "bnlib.")):
            spaces.append(vars(cls))
    for name, value in ((n, v) for space in spaces for n, v in space.items()):
        for f in (value, *(getattr(value, k, None) for k in ("fget", "func", "__func__"))):
            code = getattr(inspect.unwrap(f) if callable(f) else None, "__code__", None)
            if isinstance(code, CodeType):
                yield name, code


def _methods(module: nn.Module) -> dict[CodeType, str]:
    """Those among them that torch knows nothing of, and so never calls."""
    return {
        code: name
        for name, code in _functions(module)
        if name == "__call__" or not (hasattr(nn.Module, name) or name.startswith("__"))
    }


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)


def _sets_up(module: nn.Module, code: CodeType) -> bool:
    """Whether a method belongs to the module's construction, which is over."""
    if "init" in _names(code):  # torch.nn.init
        return True
    methods = _methods(module)
    todo = [c for n, c in _functions(module) if n == "__init__"]
    seen: set[CodeType] = set()
    while todo:
        one = todo.pop()
        seen.add(one)
        todo += [c for c, n in methods.items() if n in _names(one) and c not in seen]
    return code in seen


@functools.cache
def _mentions(code: CodeType, self_name: str | None = None) -> tuple[_Mention, ...]:
    self_name = self_name or next(iter(code.co_varnames[: code.co_argcount]), "self")
    found = []
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("PUSH_NULL", "NOP")]
    for k, step in enumerate(steps):
        follower = steps[k + 1] if k + 1 < len(steps) else step
        attribute = follower.argval if "ATTR" in follower.opname else None
        attribute = follower.argval if follower.opname == "LOAD_METHOD" else attribute
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            called = step.opname == "LOAD_METHOD"
            if sys.version_info >= (3, 12):
                called = bool((step.arg or 0) & 1)
            if k < 2 or steps[k - 2].argval != "len":
                found.append(_Mention(step.argval, attribute, called))
        elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            alone = loaded[:-1] if attribute else loaded
            if self_name in alone and steps[k - 1].argval != "len":
                found.append(_Mention("", None, False))
    for const in code.co_consts:
        if isinstance(const, CodeType):
            found += _mentions(const, self_name)
        elif isinstance(const, str) and _names(code) & _BY_NAME:
            found += [_Mention(part, None, False) for part in const.split(".")]
    return tuple(found)


def _reaches(
    mention: _Mention, path: list[str], chain: list[nn.Module], depth: int, shared: int
) -> bool:
    """Whether a mention in a method of chain[depth] means the module at the path without another,
    that is in the path's first ``shared`` containers with it."""
    name, attribute, called = mention
    for i in range(depth - 1, len(path)):
        if name != (path[i] if i >= depth else ""):
            continue
        if i == len(path) - 1:
            return attribute not in _HARMLESS
        if attribute is not None:
            continue  # a mention of its own
        if i >= shared:
            return True
        if not called and all(isinstance(m, _CONTAINERS) for m in chain[i + 1 :]):
            return True  # iterated, sliced, indexed
    return False
