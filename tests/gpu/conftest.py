"""Where the GPU kernels are tested: on a GPU, else in Triton's interpreter, else not at all.

For its interpreter Triton must be imported with a variable set, and for all other tests without:

    TRITON_INTERPRET=1 python -m pytest tests/gpu
"""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def device():
    """The device of the kernels, where tensors are made unless they say otherwise."""
    name = "cpu" if INTERPRETED else "cuda"
    with torch.device(name):
        yield name
