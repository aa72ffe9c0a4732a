"""Imported by the comparisons that need AdapterHub's `adapters`: a Python without it continues in the one that
PEFT_ADAPTERS_PYTHON names, or skips the comparison (exit status 77)."""

import importlib.util
import os
import sys

if importlib.util.find_spec("adapters") is None:
    other = os.environ.get("PEFT_ADAPTERS_PYTHON")
    if not other or os.environ.get("PEFT_ADAPTERS_RUNS"):
        print("skipped: no module named 'adapters' (PEFT_ADAPTERS_PYTHON names no Python with it)")
        sys.exit(77)
    os.environ["PEFT_ADAPTERS_RUNS"] = "1"
    os.execv(other, [other, *sys.argv])
