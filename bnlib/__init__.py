"""Batch normalization, axis by axis: one definition, for any array library.

Importing ``bnlib`` imports NumPy and nothing heavier; the PyTorch parts are submodules.
"""

from bnlib.axes import per_channel, reduction_axes, split_groups
from bnlib.reference import (
    Cache,
    Grads,
    batch_norm_backward,
    batch_norm_forward,
    standardize,
    update_running_stats,
)
from bnlib.statistics import Moments, merge, moments

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "Grads",
    "Moments",
    "batch_norm_backward",
    "batch_norm_forward",
    "merge",
    "moments",
    "per_channel",
    "reduction_axes",
    "split_groups",
    "standardize",
    "update_running_stats",
]
