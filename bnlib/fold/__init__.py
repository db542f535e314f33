"""Folding: evaluation-mode batch norm written into the weights of the layer beside it.

``pair`` has the algebra of one layer and one batch norm, and says when it is exact. ``model`` folds
all of a model that can be, where ``traces`` of its forward show the two to be neighbours, and where
``methods`` that forward does not run do not mention one of them alone.
"""

from bnlib.fold.model import FoldedBatchNorm, FoldReport, fold_batch_norm
from bnlib.fold.pair import fold_conv_bn, fold_linear_bn

__all__ = ["FoldReport", "FoldedBatchNorm", "fold_batch_norm", "fold_conv_bn", "fold_linear_bn"]
