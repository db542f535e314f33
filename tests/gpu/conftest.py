"""`TRITON_INTERPRET=1 python -m pytest tests/gpu`: triton must be imported with it, and by every
other test without, so these tests have a process of their own.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
