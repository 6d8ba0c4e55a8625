"""What tests of several files ask for."""

from __future__ import annotations

import os

import pytest

# Before anything imports torch: two test processes on two cores, whose threads would wait for each
# other at full speed.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The landscape is evaluated, but report.html is empty: to draw it takes longer than a merge.

    A report that cannot be drawn is no error of the merge, so other tests have to look at it.
    """
    import twa_merge.pipeline

    monkeypatch.setattr(twa_merge.pipeline, "html_report", lambda document, plane: "")
