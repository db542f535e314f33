"""Batches run through a torch model to look at its batch norms, which leaves nothing behind."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

Statistics = tuple[Tensor, Tensor]


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms of a model by their dotted names: torch's, bnlib's, subclasses.

    Raises:
        TypeError: ``model`` is not a torch module.
        ValueError: it has no batch norm, or lazy modules that have not met a batch yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"expected a model whose tensors have shapes, got the lazy {name!r}")
    found = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not found:
        raise ValueError(f"expected a model with batch norms, got {type(model).__name__} with none")
    return found


def core(model: nn.Module) -> nn.Module:
    """Return what is to be run: the wrapper would wait for other ranks, or run copies of layers."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
    return model.module if isinstance(model, wrappers) else model


def is_frozen(model: nn.Module, layer: nn.Module) -> bool:
    """Return whether a layer is held in evaluation mode inside a model that trains."""
    return core(model).training and not layer.training


@contextmanager
def undisturbed(model: nn.Module, batches: Any) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients, and afterwards back to what it was.

    Modes, buffers (the tensors and what is in them) and the states of the generators of random
    numbers (torch's, NumPy's, Python's, a DataLoader's own) come back, also after an exception.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # has no dict of its own
    ]
    contents = [(t, t.detach().clone()) for t in model.buffers()]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # the global one is at stake
    shuffler = getattr(batches, "generator", None)
    shuffler = shuffler if isinstance(shuffler, torch.Generator) else torch.Generator()
    order = shuffler.get_state()
    devices = sorted({t.device.index or 0 for t in _tensors(model) if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), _eager():
            for module, _ in modes:
                module.training = False  # not eval(), which a class may have made its own
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        shuffler.set_state(order)
        for module, training in modes:
            module.training = training
        for module, entries in buffers:
            module._buffers.clear()
            module._buffers.update(entries)
        with torch.inference_mode():  # without which its tensors could not be written
            for tensor, content in contents:
                # torch's batch norm counts no version when it writes; nor does this, so that a
                # backward pass that waits for an untouched buffer goes through
                tensor.data.copy_(content)


@contextmanager
def hooked(
    layers: Iterable[nn.Module], measure: Callable[[Any, Tensor], Statistics | None]
) -> Iterator[None]:
    """Have layers normalise with what ``measure(layer, x)`` returns: mean and variance.

    The layers must be in evaluation mode, and in :func:`undisturbed`, which puts the buffers back
    that are lent to them here. None leaves a layer those that it has.
    """

    def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        own = [t for t in (layer.running_mean, layer.weight) if t is not None]
        if x.dim() < 2 or any(len(t) != x.shape[1] for t in own):
            return  # the layer itself will say so
        statistics = measure(layer, x)
        if statistics is not None:
            like = own[0] if own else statistics[0]
            for name, value in zip(("running_mean", "running_var"), statistics, strict=True):
                layer._buffers[name] = value.to(like.dtype)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, batches: Any) -> Iterator[int]:
    """Feed a model with batches, and give the number of each one after it has run.

    Raises:
        TypeError: ``batches`` is not iterable, or a batch is no tensor, mapping, tuple or list.
        ValueError: no batches, or a tuple with fewer tensors than ``model.forward`` needs.
    """
    if isinstance(batches, Tensor | Mapping):
        batches = [batches]  # one batch; to iterate over it would take it apart
    if not isinstance(batches, Iterable):
        raise TypeError(f"expected an iterable of batches, got {type(batches).__name__}")
    model = core(model)
    device = next((t.device for t in _tensors(model)), torch.device("cpu"))
    needed = _required(model)
    count = 0
    for batch in batches:
        if isinstance(batch, Tensor):
            model(_to(device, batch))
        elif isinstance(batch, Mapping):
            model(**{key: _to(device, value) for key, value in batch.items()})
        elif isinstance(batch, tuple | list):
            if len(batch) < needed:
                raise ValueError(
                    f"expected batches with at least {needed} elements, which "
                    f"{type(model).__name__}.forward needs, got one with {len(batch)}"
                )
            model(*(_to(device, value) for value in batch[:needed]))
        else:
            raise TypeError(
                f"expected batches that are tensors, dicts, tuples or lists, got "
                f"{type(batch).__module__}.{type(batch).__qualname__}"
            )
        count += 1
        yield count
    if not count:
        raise ValueError("expected at least one batch, got none (is the iterator used up?)")


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _to(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(device, item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to(device, item) for item in value)
    return value


def _required(model: nn.Module) -> int:
    """How many positional arguments forward needs: at least one, and those without a default."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    if isinstance(inner, nn.Module) and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return _required(inner)  # what is wrapped for averaging, or compiled, takes any arguments
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in kinds and p.default is p.empty for p in parameters))


@contextmanager
def _eager() -> Iterator[None]:
    """Have compiled models run their own code: what was compiled before does not call our hooks."""
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
