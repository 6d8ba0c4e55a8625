"""The blend: all candidates averaged, each by how likely it is as good as the best.

The least of several noisy means is often not the least in truth. Where the evidence cannot tell
candidates apart their mean loses less than a choice among them does (averaging over what a
selection might have picked: Buckland, Burnham and Augustin, Biometrics 53, 1997), and because the
loss is nearly convex between them it is often better than each. Where one candidate is certainly
the best, the blend is that candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .sampling import standard_error

# Times what the least costs are and differ by.
_OUT_OF_THE_QUESTION = 10.0


def likelihoods(costs: Tensor, groups: Tensor | None = None) -> Tensor:
    """Weights (C,) of C candidates, Σ = 1, from what each costs on the same examples.

    In proportion to Φ(−d/s): d is the mean of the paired differences to the least candidate, s its
    standard error. A smooth function of the costs: rounding errors do not turn it over.

    Args:
        costs: (C, N) float64; a candidate of a cost that is not finite gets no weight, nor one that
            is worse by more than ten times what the costs of the least are and differ by: one
            enormous cost has a standard error as large as the mean.
        groups: label of each example, (N,) int64; those of one group are alike.
    """
    means = costs.mean(1).nan_to_num(torch.inf)
    best = costs[means.argmin()]
    differences = costs - best
    gaps = differences.mean(1)
    error = standard_error(differences, groups)
    z = torch.where(differences.eq(0.0).all(1), 0.0, gaps / error)
    weights = torch.special.ndtr(-z).nan_to_num(0.0)
    size = best.mean().abs() + (best.std() if len(best) > 1 else 0.0)
    weights = torch.where(gaps > _OUT_OF_THE_QUESTION * size, 0.0, weights)
    return weights / weights.sum()


def distinct(alphas: Sequence[Tensor]) -> list[int]:
    """Positions of coefficients, (1, n) or (B, n) each, that none before them equals."""
    aligned = _aligned(alphas)
    found: list[int] = []
    for i, alpha in enumerate(aligned):
        if not any(torch.allclose(alpha, aligned[k], rtol=0.0, atol=1e-12) for k in found):
            found.append(i)
    return found


def blended(weights: Tensor, alphas: Sequence[Tensor]) -> Tensor:
    """Σ_c weight_c α_c over coefficients (1, n) or (B, n)."""
    return torch.einsum("c,cbn->bn", weights, _aligned(alphas))


def _aligned(alphas: Sequence[Tensor]) -> Tensor:
    """(C, B, n): one set of coefficients is that of every block, missing directions are zero."""
    rows, width = (max(a.shape[i] for a in alphas) for i in (0, 1))
    return torch.stack([pad(a, (0, width - a.shape[1])).expand(rows, -1) for a in alphas])
