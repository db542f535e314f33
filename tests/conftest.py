"""Let the tests import the book's Sphinx extensions."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "book" / "_ext"))
