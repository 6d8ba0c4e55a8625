"""JSON that others have written, and that may be anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What the file holds; None where there is no regular file, or none that can be read as JSON.

    A pipe is not waited for, and what is nested too deeply for the parser counts as no JSON.
    """
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
