"""What tests of several files ask for."""

from __future__ import annotations

import pytest


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The landscape is evaluated, but report.html is empty: to draw it takes longer than a merge.

    A report that cannot be drawn is no error of the merge, so other tests have to look at it.
    """
    import twa_merge.pipeline

    monkeypatch.setattr(twa_merge.pipeline, "html_report", lambda document, plane: "")
