"""Batch norm on torch tensors at three speeds, behind one face.

``load(name)`` returns the :class:`~bnlib.kernels.base.Kernels` of a tier: ``"reference"`` (torch
operations), ``"cpu"`` (Numba) or ``"gpu"`` (Triton).
"""

from bnlib.kernels.base import Kernels
from bnlib.kernels.choose import load

__all__ = ["Kernels", "load"]
