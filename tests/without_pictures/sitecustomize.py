"""Processes that find this folder in PYTHONPATH draw no pictures."""

import sys

sys.modules["matplotlib"] = None  # type: ignore[assignment]
