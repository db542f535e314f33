"""Folding: evaluation-mode batch norm written into the weights of the layer beside it.

``pair`` has the algebra of one layer and one batch norm. Here are models: each batch norm gets a
plan, the layers that it may go into by all that ``traces`` of forward, other ``methods`` and shared
memory show. The plans are carried out in a copy, and the copy is traced in turn: where it records
anything else than the model did, the folds that are to blame are taken back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlib.fold.methods import HiddenMethods
from bnlib.fold.pair import (
    LAYERS,
    NotExact,
    check_bn,
    check_layer,
    copied,
    fold,
    fold_conv_bn,
    fold_linear_bn,
    has_hooks,
    held,
    oddity,
    rank_of,
    ranks_of,
)
from bnlib.fold.traces import Trace, traces_of, wraps

__all__ = ["FoldReport", "FoldedBatchNorm", "fold_batch_norm", "fold_conv_bn", "fold_linear_bn"]


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
    if wraps(model):
        raise ValueError(
            f"expected the model itself, got {type(model).__name__}, which wraps or compiles one: "
            "fold the model first, and wrap or compile the result"
        )
    if model.training:
        raise ValueError(
            f"expected a model in evaluation mode, got {type(model).__name__} in training mode, "
            "where batch norm uses each batch's own statistics: call model.eval() first"
        )
    view = _View(model)
    plans: dict[str, _Plan] = {}
    kept = {name: "" for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for name in kept:
        try:
            plans[name] = view.plan(name)
        except NotExact as reason:
            kept[name] = str(reason)
    while plans and (wrong := _wrong(view, plans)):
        kept |= wrong
        plans = {name: plan for name, plan in plans.items() if name not in wrong}
    result, folded, refused = _apply(model, plans)
    kept = {name: why for name, why in (kept | refused).items() if name not in folded}
    unseen = view.unseen
    earlier = getattr(model, "fold_report", None)
    if isinstance(earlier, FoldReport):
        folded, unseen = earlier.folded | folded, [*earlier.unseen, *unseen]
    report = FoldReport(folded, kept, tuple(dict.fromkeys(unseen)))
    result.fold_report = report  # type: ignore[assignment]
    return result


_Plan = list[tuple[str, bool]]  # layers it may go into, and whether the batch norm runs after them


class _View:
    """What can be seen of how a model uses its layers and batch norms."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.traces, self.unseen = traces_of(model)
        if has_hooks(model):
            self.unseen.append("hooks of the model")
        self._hidden = HiddenMethods(model, {method for t in self.traces for method in t.ran})
        self.unseen += self._hidden.unseen()
        self._sharing = _sharing(model)

    def plan(self, name: str) -> _Plan:
        """Where a batch norm may be folded, as far as its use is concerned."""
        bn = self.model.get_submodule(name)
        assert isinstance(bn, _BatchNorm)
        check_bn(bn)
        self._check_shared(bn)
        plan, reasons = [], []
        for after in (True, False):
            try:
                layer = self.traces[0].neighbour(name, after)
                module = self.model.get_submodule(layer)
                assert isinstance(module, LAYERS)  # a Trace names no other
                check_layer(module, bn, after)
                self._check_shared(module)
                for trace in self.traces[1:]:
                    trace.check(name, layer, after)
                self._hidden.check(module, bn)
                self._hidden.check(bn, module)
                plan.append((layer, after))
            except NotExact as reason:
                reasons.append(str(reason))
        if not plan:
            raise NotExact("; ".join(dict.fromkeys(reasons)))
        return plan

    def _check_shared(self, module: nn.Module) -> None:
        if module in self._sharing:
            raise NotExact(f"{type(module).__name__}'s tensors are held by another module too")


def _sharing(model: nn.Module) -> set[nn.Module]:
    """The modules that hold a tensor whose memory something else of the model holds too."""
    spans = []
    for module in model.modules():
        for _, t in held(module):
            if isinstance(t, Tensor) and not (is_lazy(t) or oddity(t)) and t.numel():
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), module))
    found: set[nn.Module] = set()
    end, holder = 0, model
    for start, stop, module in sorted(spans, key=lambda span: span[:2]):
        if start < end:
            found |= {holder, module}
        if stop > end:
            end, holder = stop, module
    return found


def _apply(
    model: nn.Module, plans: dict[str, _Plan]
) -> tuple[nn.Module, dict[str, str], dict[str, str]]:
    """A copy of the model with these folds, where they went, and which the numbers forbid."""
    result = copied(model)
    folded: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, plan in plans.items():
        bn, reasons = result.get_submodule(name), []
        for layer, after in plan:
            module = result.get_submodule(layer)
            assert isinstance(bn, _BatchNorm) and isinstance(module, LAYERS)
            try:
                fold(module, bn, after=after)
            except NotExact as reason:
                reasons.append(str(reason))
                continue
            rank = 0 if len(ranks_of(bn)) == 1 else rank_of(module)
            fused = bn.forward.__module__ == "bnlib.nn"  # takes a residual and an activation
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
        if all(trace.same(Trace(result, *trace.how)) for trace in view.traces):
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
