"""Scripts in benchmarks/ import their neighbours by name, as Python lets a script do."""

import sys

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
