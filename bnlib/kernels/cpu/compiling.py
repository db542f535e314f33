"""How the loops are compiled: in which mode, and where the result is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# No reordering: sums are taken as they are written.
COMPILED: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}
_OPTIONS = COMPILED | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

jit = numba.njit(**_OPTIONS)
# Compiled into each caller, for the constants it is called with.
inlined = numba.njit(forceinline=True, **_OPTIONS)


def cached(decorate: Callable[..., Any]) -> Any:
    try:
        return decorate(cache=True)
    except RuntimeError:  # no folder to cache in, on a read-only install without a home
        return decorate(cache=False)
