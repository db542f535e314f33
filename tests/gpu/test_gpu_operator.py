"""The operator under torch.compile with the GPU kernels, in the interpreter.

The tests are the CPU's, those that ask something of the kernels behind the operator.
"""

import os

import pytest
import test_compile
from test_compile import (  # noqa: F401
    forget,
    own_cache,
    test_the_kernels_run_and_the_graph_has_one_operator,
    test_the_operators_gradient_reads_the_mask_in_the_layout_it_was_filled_in,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="its tensors are on the CPU")


def test_opcheck():
    test_compile.test_opcheck(training=True, with_grad=True, relu=True, channels_last=True)
