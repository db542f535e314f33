"""bnlib.modes: what torch says of itself, by handles that a new torch may move."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from bnlib import modes


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_nothing_is_going_on():
    x = torch.ones(3, requires_grad=True)
    assert not modes.is_compiling() and not modes.is_tracing()
    assert not modes.is_recorded() and not modes.saved_tensors_are_hooked()
    assert not modes.is_transformed(x, None) and not modes.is_batched(x) and not modes.is_zero(x)


def test_what_records_operations():
    with Mode():
        assert modes.is_recorded()
    seen = []
    with pytest.warns(DeprecationWarning):
        torch.jit.trace(lambda x: (seen.append(modes.is_tracing()), x + 1)[1], torch.ones(2))
    assert seen[0]

    def compiled(x):
        return x + modes.is_recorded()

    assert torch.compile(compiled, backend="eager")(torch.zeros(1)).item() == 1


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_transforms_tensors():
    x, seen, left = torch.ones(3), [], []

    def watch(t):
        seen.append(modes.is_transformed(t))
        left.append(t)
        return t.sum()

    torch.func.grad(watch)(x)
    torch.func.vmap(watch)(x)
    torch.func.jvp(watch, (x,), (x,))
    assert seen == [True, True, True]
    assert modes.is_transformed(left[0])  # the wrapper of a transform that is over
    with forward_ad.dual_level():
        assert modes.is_transformed(forward_ad.make_dual(x, x))
        assert not modes.is_transformed(x)


def test_gradients_that_are_several():
    x, seen = torch.ones(3, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda dy: seen.append(modes.is_batched(dy)))
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3))
    assert seen == [True, False]


def test_hooks_on_saved_tensors():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert modes.saved_tensors_are_hooked()


def test_zeros_without_memory():
    assert modes.is_zero(torch._efficientzerotensor((2,)))
