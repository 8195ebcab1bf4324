"""The scripts of `benchmarks/` import each other by their bare names: let the tests do so as well."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
