"""What torch is doing around a call: recording operations, transforming them, keeping tensors.

torch has public questions for some of this and private ones for the rest. All private handles of
the library stand here, since a new torch may move them: each with the reason why the public way
does not do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Public, but found by three steps each; where the caches are cold, every step of a call costs.
is_compiling = torch.compiler.is_compiling
is_tracing = torch.jit.is_tracing  # type: ignore[attr-defined]  # public, but not exported

# torch.utils._python_dispatch tells the length of its stack only by building a list.
_dispatch_modes = torch._C._len_torch_dispatch_stack
# The transforms of torch.func, and the tensors they wrap, have no public question at all; nor has
# the older batching of ``torch.autograd.grad(..., is_grads_batched=True)``.
_transforms_are_active = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor
# Whether hooks keep what is saved for the backward pass; an older torch does not say, and then
# False is not None: hooks may be at work.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", bool)
# Zeros that have no memory, which autograd makes for tangents that are absent.
is_zero = Tensor._is_zerotensor
# The level of forward mode; asking every tensor for a tangent takes longer.
_forward_mode = forward_ad


def is_recorded() -> bool:
    """Return whether operations are being recorded, by torch.compile, export or a dispatch mode."""
    return is_compiling() or _dispatch_modes() > 0


def is_transformed(*tensors: Tensor | None) -> bool:
    """Return whether torch.func or forward mode is at work, or has left a wrapper behind.

    Neither sees inside our kernels.
    """
    if _transforms_are_active():
        return True
    is_dual_level = _forward_mode._current_level >= 0
    is_eager = not is_compiling()
    for t in tensors:
        if t is None:
            continue
        if is_eager and _is_wrapped(t):
            return True
        if is_dual_level and forward_ad.unpack_dual(t).tangent is not None:
            return True
    return False


def is_batched(dy: Tensor) -> bool:
    """Return whether a gradient is more than one: a batch of them, or one with a tangent."""
    return is_transformed(dy) or _is_legacy_batch(dy)


def saved_tensors_are_hooked() -> bool:
    """Return whether hooks decide what becomes of the tensors that a backward pass needs."""
    return _saved_tensors_hooks(False) is not None
