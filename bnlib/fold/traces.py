"""What forward does with layers and batch norms, as symbolic runs of it show.

A trace runs a copy of the model with ``torch.fx``: symbols for values, each call recorded. It says
who feeds whom, and whether a folded layer's neighbour would be its only user. It also sees what no
graph shows: a module that is otherwise at its call than it was, an output stored for later, a
method that runs one of the two alone. What Python code asks of a module it cannot see; but then
two traces, of the model and of the folded one, differ.
"""

from __future__ import annotations

import gc
import inspect
import operator
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlib.fold.methods import methods
from bnlib.fold.pair import LAYERS, NotExact, copied, has_hooks, held

_FOLDABLE = (_BatchNorm, *LAYERS)
# Classes of torch that hold a model and run it their own way.
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel"}
_WRAPPERS |= {"OptimizedModule", "ScriptModule"}


def wraps(module: nn.Module) -> bool:
    classes = type(module).__mro__
    return any(c.__name__ in _WRAPPERS and c.__module__.startswith("torch.") for c in classes)


def traces_of(model: nn.Module) -> tuple[list[Trace], list[str]]:
    """Forward as called with its required arguments, a second time, and with each optional one that
    is a bool negated or that is None given; and which of these calls could not be traced."""
    if "forward" in vars(model):
        raise ValueError(
            f"the forward of this {type(model).__name__} was set on the instance, where "
            "torch.fx does not see it: set it on a subclass"
        )
    signature = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in signature if p.default is not p.empty}
    traces, failed = [Trace(model, defaults)], []

    def attempt(what: str, arguments: dict[str, Any], calls: int = 1) -> None:
        try:
            traces.append(Trace(model, arguments, calls))
        except ValueError:
            failed.append(what)

    attempt("a second call of forward", defaults, 2)
    for name, value in defaults.items():
        if value is None:  # a symbol for it
            given = {k: v for k, v in defaults.items() if k != name}
            attempt(f"forward with {name!r} given", given)
        elif isinstance(value, bool):
            attempt(f"forward with {name!r} given", defaults | {name: not value})
        else:
            failed.append(f"forward with another {name!r}")
    return traces, failed


class _Tracer(torch.fx.Tracer):
    """Records, beside the calls of modules, what surrounds each."""

    def __init__(self, model: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        # One module can have several names: go by the module, and call it by its first name.
        self.names = {module: name for name, module in twin.named_modules()}
        self.originals = dict(zip(self.names, model.modules(), strict=True))
        self.methods = {code: name for m in self.names for code, name in methods(m).items()}
        self.changed: set[str] = set()
        self.outputs: dict[torch.fx.Node, weakref.ref[torch.fx.Proxy]] = {}
        # The methods that ran, and the calls of public ones under way at the call of a module.
        self.ran: set[tuple[str, CodeType]] = set()
        self.within: dict[torch.fx.Node, list[FrameType]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or isinstance(m, _FOLDABLE)
            # Hooks belong to real calls, not to the tracer's.
            or has_hooks(m)
            or wraps(m)
            # What holds neither may do what it likes inside.
            or not any(isinstance(part, _FOLDABLE) for part in m.modules())
        )

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Proxy:
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        if kind == "call_module":
            self.compare(self.root.get_submodule(target))
            self.outputs[proxy.node] = weakref.ref(proxy)
            within = self.within[proxy.node] = []
            frame: FrameType | None = sys._getframe()
            while frame is not None and frame.f_code is not Trace.__init__.__code__:
                code = frame.f_code
                if code in self.methods:
                    owner = frame.f_locals.get("".join(code.co_varnames[:1]))
                    if isinstance(owner, nn.Module) and owner in self.names:
                        self.ran.add((self.names[owner], code))
                    if not self.methods[code].startswith("_"):
                        within.append(frame)
                frame = frame.f_back
        return proxy

    def compare(self, module: nn.Module) -> None:
        if isinstance(module, _FOLDABLE) and not _unchanged(module, self.originals[module]):
            self.changed.add(self.names[module])


class Trace:
    """One symbolic run of a model's forward; of several calls in a row, the last."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any], calls: int = 1) -> None:
        # Tracing runs the model's own code, which may write attributes and weights: on a copy.
        twin = copied(model)
        self.how = arguments, calls
        tracer = _Tracer(model, twin)
        try:
            # What forward draws at random must not differ between two runs.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                for _ in range(calls):
                    graph = tracer.trace(twin, concrete_args=arguments)
        except Exception as error:
            raise ValueError(
                f"torch.fx cannot trace {type(model).__name__} ({error}). Fold a traceable part "
                "of it, or single pairs with fold_conv_bn and fold_linear_bn"
            ) from error
        for module in tracer.names:
            tracer.compare(module)
        self._changed, self.ran, self._outputs = tracer.changed, tracer.ran, tracer.outputs
        # By their ids, which are unique as long as all are held. They hold the outputs.
        self._within = {node: set(map(id, frames)) for node, frames in tracer.within.items()}
        tracer.within.clear()

        first = tracer.names
        self._modules = dict(twin.named_modules(remove_duplicate=False))
        self._record = str(graph)
        self._constants: list[Any] = []
        self._uses: Counter[str] = Counter()
        self._name: dict[torch.fx.Node, str] = {}
        self._node: dict[str, torch.fx.Node] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                module = self._modules[str(node.target)]
                self._name[node], self._node[first[module]] = first[module], node
                values = (value for part in module.modules() for _, value in held(part))
                inside = (module, *(v for v in values if isinstance(v, nn.Module)))
                self._uses.update({first[m] for i in inside for m in i.modules() if m in first})
            elif node.op == "get_attr" and not (node.users and all(map(_form, node.users))):
                self._constants.append(operator.attrgetter(str(node.target))(twin))

    def same(self, other: Trace) -> bool:
        """Whether two runs recorded the same calls, of the same constants."""
        return (
            self._record == other._record
            and len(self._constants) == len(other._constants)
            and all(map(_equal, self._constants, other._constants))
        )

    def neighbour(self, bn: str, after: bool) -> str:
        """The layer that this batch norm runs after, or before, and that does so for it alone."""
        self._check_call(bn)
        layer = self._before(bn) if after else self._after(bn)
        if self._within[self._node[layer]] != self._within[self._node[bn]]:
            raise NotExact(f"a method that forward runs calls only one of it and {layer!r}")
        return layer

    def check(self, bn: str, layer: str, after: bool) -> None:
        """Raise unless they are neighbours in this run too, if it uses them."""
        if not self._uses[bn] and not self._uses[layer]:
            return
        try:
            if (found := self.neighbour(bn, after)) != layer:
                raise NotExact(f"its neighbour is {found!r}")
        except NotExact as reason:
            raise NotExact(f"in another call of forward {reason}") from None

    def _arguments(self, bn: str) -> dict[str, Any]:
        node = self._node[bn]
        names = ("input", "residual", "activation")
        return {**dict(zip(names, node.args, strict=False)), **node.kwargs}

    def _check_call(self, bn: str) -> None:
        """Raise unless the model calls this batch norm once, with one tensor to normalise."""
        if bn not in self._node:
            raise NotExact("it is inside a module that is not traced (hooks), or not used")
        self._check_use(bn, "it")
        x, residual = map(self._arguments(bn).get, ("input", "residual"))
        if not isinstance(x, torch.fx.Node) or residual is x:
            raise NotExact(f"it is called with {self._node[bn].args}, {self._node[bn].kwargs}")

    def _check_use(self, name: str, what: str) -> None:
        if self._uses[name] > 1:
            raise NotExact(f"{what} is used {self._uses[name]} times")
        if name in self._changed:
            raise NotExact(f"{what} is changed by forward")

    def _before(self, bn: str) -> str:
        """The layer whose output is this batch norm's input, and nothing else's."""
        source = self._arguments(bn)["input"]
        name = self._layer(source, "its input comes from")
        users = [node for node in source.users if not _form(node)]
        if len(users) > 1:
            raise NotExact(f"the output of {name!r} has {len(users)} users")
        if self._is_stored(source):
            raise NotExact(f"forward stores the output of {name!r}")
        return name

    def _after(self, bn: str) -> str:
        """The layer whose input is this batch norm's output, used by nothing else."""
        start = self._node[bn]
        users = list(start.users)
        if len(users) != 1:
            raise NotExact(f"its output has {len(users)} users")
        layer = self._layer(users[0], "its output goes to")
        if len(self._arguments(bn)) > 1:
            raise NotExact(f"a residual or an activation comes between it and {layer!r}")
        if self._is_stored(start):
            raise NotExact("forward stores its output")
        # Folded, the layer reads the batch norm's input, and reads it later.
        node = start.next
        while node is not users[0]:
            if not self._only_reads(node):
                what = _describe(node, self._name.get(node))
                raise NotExact(f"before {layer!r} runs, {what} may write into its input")
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
        return isinstance(module, _FOLDABLE) and not has_hooks(module)

    def _layer(self, node: torch.fx.Node, relation: str) -> str:
        name = self._name.get(node)
        if name is None or not isinstance(self._modules[name], LAYERS):
            raise NotExact(f"{relation} {_describe(node, name)}")
        self._check_use(name, f"{relation} {name!r}, which")
        return name


def _form(node: torch.fx.Node) -> bool:
    """Whether a node reads of a tensor only what folding leaves as it is."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in ("dtype", "device", "shape", "ndim")


def _describe(node: torch.fx.Node, name: str | None) -> str:
    if name is not None:
        return repr(name)
    if node.op in ("placeholder", "output"):
        return f"the model's {'input' if node.op == 'placeholder' else 'output'}"
    target: str | Callable[..., Any] = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _unchanged(module: nn.Module, original: nn.Module) -> bool:
    """Whether a copy is still as its original is."""

    def settings(m: nn.Module) -> tuple[Any, ...]:
        kinds = (bool, int, float, str, tuple, type(None))
        plain = {name: value for name, value in vars(m).items() if isinstance(value, kinds)}
        return type(m), has_hooks(m), plain

    ours, theirs = ({**m._parameters, **m._buffers} for m in (module, original))
    return (
        settings(module) == settings(original)
        and ours.keys() == theirs.keys()
        and all(_equal(ours[name], theirs[name]) for name in ours)
    )


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    try:
        if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return False
        return torch.equal(one, other) or torch.allclose(one, other, 0, 0, equal_nan=True)
    except (
        RuntimeError,
        TypeError,
    ):  # lazy, sparse, float8, meta: no tensors of a layer that folds
        return True
