"""How the loops are compiled: in which mode, and where the result is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# No reordering: sums are taken as they are written.
COMPILED: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}
_OPTIONS = COMPILED | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def cached(decorate: Callable[..., Any]) -> Any:
    try:
        return decorate(cache=True)
    except RuntimeError:  # no folder to cache in, on a read-only install without a home
        return decorate(cache=False)


def jit(function: Callable[..., Any]) -> Any:
    return cached(lambda cache: numba.njit(cache=cache, **_OPTIONS)(function))


def inlined(function: Callable[..., Any]) -> Any:
    """Compiled into each caller, for the constants it is called with."""
    return cached(lambda cache: numba.njit(cache=cache, forceinline=True, **_OPTIONS)(function))
