"""What a stage of the fit ended with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .optimize import FitResult
from .ridge import RidgePath
from .subspace import Chart


@dataclass
class Fitted:
    """Coefficients that a stage ended with.

    Attributes:
        alphas: (B, n) float64.
        ridge: of the last fit.
        result: of the last fit, over the whole sample.
        path: what the ridge of the first fit was chosen by; None where it was not.
        evaluations: of loss and gradient, in units of all examples that the fit may use.
        examples: that the last fit used.
    """

    name: str
    chart: Chart
    alphas: Tensor
    ridge: float
    result: FitResult
    path: RidgePath | None = None
    evaluations: float = 0.0
    examples: int = 0

    def without(self, fold: int, before: Fitted | None = None) -> Tensor:
        """Coefficients (B, n) that the stage came to without a fold of its cross-validation.

        Args:
            before: the stage whose solution the chart's base is.
        """
        assert self.path is not None
        chart = self.chart if before is None else self.chart.around(before.without(fold))
        return chart.alphas(self.path.ends[self.path.choice()][fold])

    @property
    def scores(self) -> dict[float, float]:
        """Ridge → mean loss on examples that its fits did not see; inf is the chart's base."""
        return self.path.scores() if self.path else {}
