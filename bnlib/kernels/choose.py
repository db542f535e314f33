"""Which tier serves a tensor: the one asked for, or the fastest that takes it."""

from __future__ import annotations

import functools
import importlib
import warnings

from torch import Tensor

from bnlib.kernels.base import Kernels

FAST = ("cpu", "gpu")  # each a folder with a `launch.py`, in which `tier` is
BACKENDS = ("auto", "reference", *FAST)


@functools.cache
def load(name: str) -> Kernels:
    """Return the kernels of a tier.

    Args:
        name: ``"reference"``, ``"cpu"`` or ``"gpu"``.

    Returns:
        The same :class:`~bnlib.kernels.Kernels` at every call.

    Raises:
        ImportError: Numba or Triton is missing.
        ValueError: another name.
    """
    if name not in BACKENDS[1:]:
        raise ValueError(f"expected a tier of {BACKENDS[1:]}, got {name!r}")
    module = f"{name}.launch" if name in FAST else "plain"
    kernels: Kernels = importlib.import_module(f"bnlib.kernels.{module}").tier
    return kernels


def choose(input: Tensor, backend: str, plain: bool) -> Kernels:
    """Return the kernels for an input; without ``plain``, other tensors beside it need torch's."""
    if backend == "auto":
        name = "cpu" if input.is_cpu else "gpu" if input.is_cuda else None
        fast = None if name is None else _installed(name)
        return fast if fast is not None and plain and fast.supports(input) else load("reference")
    kernels = load(backend)
    kernels.check_input("input", input)
    return kernels


@functools.cache
def _installed(name: str) -> Kernels | None:
    try:
        return load(name)
    except Exception as error:  # what is installed but broken raises what it likes
        if isinstance(error, ImportError) and error.name == f"bnlib.kernels.{name}":
            return None  # this installation has no such kernels at all
        warnings.warn(
            f"bnlib computes batch norm with its reference, which is slower: {error} "
            f"(install the extra: pip install 'bnlib[{name}]')",
            stacklevel=4,
        )
        return None
