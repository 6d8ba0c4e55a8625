"""Long names shortened so that those of one picture stay apart."""

from __future__ import annotations

import pytest

from twa_merge.short_names import shortened

ENDS = ("attention.output.dense.weight", "attention.self.query.weight")
LAYERS = [f"encoder.layer.{k}.{end}" for k in range(12) for end in ENDS]


@pytest.mark.parametrize("dots", ["…", "..."])
def test_names_that_differ_in_their_middle_stay_apart(dots: str) -> None:
    found = shortened(LAYERS, (28, 36), dots)
    assert len(set(found)) == len(LAYERS)
    for name, short in zip(LAYERS, found, strict=True):
        head, _, end = short.partition(dots)
        assert len(short) <= 36
        assert name.startswith(head)
        assert name.endswith(end)


def test_what_fits_stays_and_of_the_rest_the_end() -> None:
    assert shortened(["short", "a/long/path/to/step-100"], (12,)) == ["short", "…to/step-100"]
    assert shortened(["x" * 40 + "a" + "x" * 40, "x" * 81], (12,)) == ["…" + "x" * 11] * 2
