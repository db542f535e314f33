"""Folding: evaluation-mode batch norm written into the weights of the layer beside it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from bnlib.axes import per_channel

_Conv = TypeVar("_Conv", bound=_ConvNd)
_Linear = TypeVar("_Linear", bound=nn.Linear)
_AnyLayer = TypeVar("_AnyLayer", bound=_ConvNd | nn.Linear)
_LAYERS = (_ConvNd, nn.Linear)

# The algebra is that of these modules' own forward; a subclass with another forward (a batch norm
# with a built-in ReLU, a weight-standardised convolution) computes something else.
_KNOWN_FORWARDS = {
    "torch.nn.modules.batchnorm",
    "torch.nn.modules.conv",
    "torch.nn.modules.linear",
    "bnlib.nn",
}


class FoldReport(NamedTuple):
    """What :func:`fold_batch_norm` did to each batch norm of a model.

    Attributes:
        folded: name of the batch norm -> name of the layer that now does its work.
        kept: name of the batch norm -> why folding it would not be exact.
    """

    folded: dict[str, str]
    kept: dict[str, str]


def fold_conv_bn(conv: _Conv, bn: _BatchNorm) -> _Conv:
    """Return one convolution that computes ``bn(conv(x))``, with ``bn`` in evaluation mode.

    ::

        s = γ / √(running_var + ε),    w' = s w,    b' = s (b - running_mean) + β

    where s multiplies the weights' *output* channel: axis 0 of a convolution's weight
    (C_out, C_in / groups, ...), axis 1 of a transposed one's (C_in, C_out / groups, ...), there
    group by group.

    Args:
        conv: convolution of 1 to 3 dimensions, plain or transposed, with any groups, stride,
            dilation and padding, with or without bias.
        bn: batch norm over its C_out channels, in evaluation mode, with running statistics.

    Returns:
        A copy of ``conv``, with a bias, on its device and in its dtypes. Both arguments are left
        as they were. The arithmetic is float64 and rounded once. ``requires_grad`` follows the
        convolution's weight and bias (its weight, where it had no bias).

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

        s = γ / √(running_var + ε),    w' = s w,    b' = s (b - running_mean) + β

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
    layer's output. Failing that it folds into the layer after it, ``layer(bn(x))``, when nothing
    else uses the batch norm's output, nothing that could write into its input runs between the two,
    and the layer does not pad with zeros (a padded zero is not a normalised zero) and is not
    transposed (whose border sees fewer weights). Everything else is kept: batch norms that share
    their input or output, are called twice, are in training mode, carry hooks.

    The model is traced with ``torch.fx`` only to learn who feeds whom; its own ``forward`` stays.
    It is followed as called with its required arguments alone: where an optional argument changes
    which layers meet, fold the pairs yourself. Batch norms that the model calls as a function
    (``torch.nn.functional.batch_norm``) are neither folded nor listed.

    Args:
        model: any traceable module, in evaluation mode. It is not changed.

    Returns:
        A deep copy of ``model`` with the folded layers in their places, ``torch.nn.Identity``
        where a batch norm was, and a :class:`FoldReport` in its attribute ``fold_report``. Where
        the batch norm accepts inputs of several ranks, the folded layer refuses, with a
        ``ValueError``, those whose axis 1 is not the axis folded.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is in training mode, or cannot be traced.

    Source: Jacob et al. (2018), section 3.2. Derived in *Folding*.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.ReLU()).eval()
        >>> fold_batch_norm(model).fold_report
        FoldReport(folded={'1': '0'}, kept={})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError(
            f"expected a model in evaluation mode, got {type(model).__name__} in training mode, "
            "where batch norm uses each batch's own statistics: call model.eval() first"
        )
    graph = _Graph(model)
    result = copy.deepcopy(model)
    folded: dict[str, str] = {}
    kept: dict[str, str] = {}
    to_guard: set[str] = set()
    for name, bn in model.named_modules():
        if not isinstance(bn, _BatchNorm):
            continue
        try:
            layer, new = _fold_one(graph, result, name, bn)
        except _NotExact as reason:
            kept[name] = str(reason)
            continue
        _replace(result, result.get_submodule(layer), new)
        _replace(result, result.get_submodule(name), nn.Identity().eval())
        folded[name] = layer
        if not isinstance(bn, nn.BatchNorm2d | nn.BatchNorm3d):  # those check the rank themselves
            to_guard.add(layer)
    for layer in to_guard:  # only now: a layer with hooks would take in no second batch norm
        module = result.get_submodule(layer)
        guard = functools.partial(_require_rank, _rank(module))
        module.register_forward_pre_hook(guard, with_kwargs=True)
    result.fold_report = FoldReport(folded, kept)  # type: ignore[assignment]
    return result


class _NotExact(ValueError):
    """Folding would change the output; the message says why."""


def _fold_pair(layer: _AnyLayer, bn: _BatchNorm) -> _AnyLayer:
    if not isinstance(bn, _BatchNorm):
        raise TypeError(f"expected a batch norm of torch.nn or bnlib.nn, got {type(bn).__name__}")
    try:
        _check_bn(bn)
        return _fold_after(layer, bn)
    except _NotExact as reason:
        raise ValueError(
            f"cannot fold {type(bn).__name__} into {type(layer).__name__}: {reason}"
        ) from None


def _fold_one(graph: _Graph, model: nn.Module, name: str, bn: _BatchNorm) -> tuple[str, nn.Module]:
    """Fold the batch norm of this name into the layer before it, else into the one after it."""
    _check_bn(bn)
    graph.check_call(name)
    reasons = []
    for neighbour, fold in ((graph.before, _fold_after), (graph.after, _fold_before)):
        try:
            layer = neighbour(name)
            module = model.get_submodule(layer)
            assert isinstance(module, _LAYERS)  # _Graph names no other
            return layer, fold(module, bn)
        except _NotExact as reason:
            reasons.append(str(reason))
    raise _NotExact("; ".join(reasons))


def _fold_after(layer: _AnyLayer, bn: _BatchNorm) -> _AnyLayer:
    """bn(layer(x)): s (w·x + b) + t = (s w)·x + (s b + t)."""
    _check_layer(layer, bn, out=True)
    scale, shift = _scale_and_shift(bn)
    weight, bias = _weight_and_bias(layer)
    if isinstance(layer, _ConvTransposeNd):
        weight = _scale_axis_1(weight, scale, layer.groups)
    else:
        weight = weight * per_channel(scale, weight.ndim, 0)
    return _with(layer, weight, scale * bias + shift)


def _fold_before(layer: _AnyLayer, bn: _BatchNorm) -> _AnyLayer:
    """layer(bn(x)): w·(s x + t) + b = (w s)·x + (b + w·t), if every output sees all of w."""
    _check_layer(layer, bn, out=False)
    groups = 1
    if isinstance(layer, _ConvNd):
        groups = layer.groups
        if isinstance(layer, _ConvTransposeNd):
            raise _NotExact("at the border of a transposed convolution fewer weights meet the β")
        if _pads_with_zeros(layer):
            raise _NotExact("the zeros that the convolution pads with would have to be normalised")
    scale, shift = _scale_and_shift(bn)
    weight, bias = _weight_and_bias(layer)
    from_shift = _scale_axis_1(weight, shift, groups).flatten(1).sum(1)
    return _with(layer, _scale_axis_1(weight, scale, groups), bias + from_shift)


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
    functions = [module.forward, getattr(module, "_conv_forward", module.forward)]
    if not all(getattr(f, "__module__", None) in _KNOWN_FORWARDS for f in functions):
        raise _NotExact(f"{what} has a forward of its own")
    if not module._parameters.keys() >= {"weight", "bias"}:
        raise _NotExact(f"{what}'s weight or bias is computed (a parametrization or pruning)")
    if _has_hooks(module):
        raise _NotExact(f"{what} has hooks, which would see other values or none")


def _check_layer(layer: _ConvNd | nn.Linear, bn: _BatchNorm, *, out: bool) -> None:
    _check_module(layer)
    rank = _rank(layer)
    if rank not in _ranks(bn):
        raise _NotExact(f"{type(bn).__name__} does not take {rank}-D tensors")
    if isinstance(layer, _ConvNd):
        channels = layer.out_channels if out else layer.in_channels
    else:
        channels = layer.out_features if out else layer.in_features
    if channels != bn.num_features:
        raise _NotExact(
            f"the layer has {channels} {'output' if out else 'input'} channels, "
            f"the batch norm {bn.num_features} features"
        )


def _rank(layer: nn.Module) -> int:
    """The rank of a batched input: (N, C) for a linear layer, (N, C, ...) for a convolution."""
    return len(layer.kernel_size) + 2 if isinstance(layer, _ConvNd) else 2


def _ranks(bn: _BatchNorm) -> tuple[int, ...]:
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


def _float64(t: Tensor) -> Tensor:
    # On the CPU, since not every device has float64; the result is rounded once, in _with.
    return t.detach().to("cpu", torch.float64)


def _scale_and_shift(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """s and t of y = s x + t, float64, shape (C,)."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = torch.rsqrt(_float64(bn.running_var) + bn.eps)
    if bn.weight is not None:
        scale = scale * _float64(bn.weight)
    shift = -scale * _float64(bn.running_mean)
    if bn.bias is not None:
        shift = shift + _float64(bn.bias)
    return scale, shift


def _weight_and_bias(layer: _ConvNd | nn.Linear) -> tuple[Tensor, Tensor]:
    weight = _float64(layer.weight)
    if layer.bias is not None:
        return weight, _float64(layer.bias)
    outputs = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
    return weight, weight.new_zeros(outputs)


def _scale_axis_1(weight: Tensor, v: Tensor, groups: int) -> Tensor:
    """Multiply axis 1 by v, whose channels are laid out group by group along axis 0.

    Both weights of this form, (C_out, C_in / groups, ...) seen from the input and the transposed
    (C_in, C_out / groups, ...) seen from the output, hold one group after another along axis 0;
    their axis 1 numbers the channels inside one group.
    """
    parts = zip(weight.chunk(groups), v.chunk(groups), strict=True)
    return torch.cat([w * per_channel(part, w.ndim, 1) for w, part in parts])


def _with(layer: _AnyLayer, weight: Tensor, bias: Tensor) -> _AnyLayer:
    """A copy of the layer with these parameters, in the layer's own dtypes and on its device."""
    new = copy.deepcopy(layer)
    for name, value in (("weight", weight), ("bias", bias)):
        old = getattr(layer, name)
        like = layer.weight if old is None else old
        cast = value.to(like.device, like.dtype)
        if value.isfinite().all() and not cast.isfinite().all():
            raise _NotExact(f"the folded {name} overflows {like.dtype}")
        setattr(new, name, nn.Parameter(cast, requires_grad=like.requires_grad))
    return new


def _require_rank(rank: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    x = (*args, *kwargs.values())[0]
    if x.ndim != rank:
        raise ValueError(
            f"expected a {rank}-D input, got shape {tuple(x.shape)}: the batch norm folded into "
            f"this {type(layer).__name__} would have normalised another axis"
        )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered: a module can have several names."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or isinstance(m, (_BatchNorm, *_LAYERS))
            # Hooks belong to real calls, not to the tracer's.
            or _has_hooks(m)
            # What holds neither may do what it likes inside.
            or not any(isinstance(part, (_BatchNorm, *_LAYERS)) for part in m.modules())
        )


class _Graph:
    """Who feeds whom in a model's forward."""

    def __init__(self, model: nn.Module) -> None:
        # Tracing runs the model's own code, which may write attributes: on a copy, then, that
        # shares the parameters.
        twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        signature = inspect.signature(twin.forward).parameters.values()
        defaults = {p.name: p.default for p in signature if p.default is not p.empty}
        try:
            graph = _Tracer().trace(twin, concrete_args=defaults)
        except Exception as error:
            raise ValueError(
                f"torch.fx cannot trace {type(model).__name__} ({error}). Fold a traceable part "
                "of it, or single pairs with fold_conv_bn and fold_linear_bn"
            ) from error
        # One module can have several names: go by the module, and call it by its first name.
        first = {module: name for name, module in twin.named_modules()}
        self._modules = dict(twin.named_modules(remove_duplicate=False))
        self._name: dict[torch.fx.Node, str] = {}
        self._node: dict[str, torch.fx.Node] = {}
        read: list[str] = []
        untraced: set[nn.Module] = set()
        for node in graph.nodes:
            if node.op == "call_module":
                name = first[self._modules[str(node.target)]]
                self._name[node], self._node[name] = name, node
                untraced |= set(self._modules[name].modules()) - {self._modules[name]}
            elif node.op == "get_attr":
                read.append(str(node.target).rpartition(".")[0])
        self._calls = Counter(self._name.values())
        self._read = {first[self._modules[owner]] for owner in read if owner in self._modules}
        self._untraced = {first[module] for module in untraced}

    def check_call(self, bn: str) -> None:
        """Raise unless the model calls this batch norm once, with one tensor."""
        if bn in self._untraced or not self._calls[bn]:
            raise _NotExact("it is inside a module that is not traced (hooks), or not used")
        if self._calls[bn] > 1:
            raise _NotExact(f"it is called {self._calls[bn]} times")
        if bn in self._read:
            raise _NotExact("its parameters are also read directly")
        node = self._node[bn]
        inputs = (*node.args, *node.kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], torch.fx.Node):
            raise _NotExact("it is called with more than its input")

    def before(self, bn: str) -> str:
        """The layer whose output is this batch norm's input, and nothing else's."""
        node = self._node[bn]
        source = (*node.args, *node.kwargs.values())[0]
        assert isinstance(source, torch.fx.Node)
        name = self._layer(source, "its input comes from")
        if len(source.users) > 1:
            raise _NotExact(f"the output of {name!r} has {len(source.users)} users")
        return name

    def after(self, bn: str) -> str:
        """The layer whose input is this batch norm's output, used by nothing else."""
        users = list(self._node[bn].users)
        if len(users) != 1:
            raise _NotExact(f"its output has {len(users)} users")
        layer = self._layer(users[0], "its output goes to")
        # Folded, the layer reads the batch norm's input, and reads it later.
        node = self._node[bn].next
        while node is not users[0]:
            if not self._only_reads(node):
                what = _describe(node, self._name.get(node))
                raise _NotExact(f"before {layer!r} runs, {what} may write into its input")
            node = node.next
        return layer

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
        return name


def _describe(node: torch.fx.Node, name: str | None) -> str:
    if name is not None:
        return repr(name)
    if node.op == "placeholder":
        return "the model's input"
    if node.op == "output":
        return "the model's output"
    target: str | Callable[..., Any] = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
