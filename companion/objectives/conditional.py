"""Objectives from conditional probabilities, in which the partition function cancels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from companion.inputs import check_count, check_finite, check_generator

__all__ = ["pseudolikelihood"]


def pseudolikelihood(
    model: Any, v: Tensor, *, num_units: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Negative log-pseudolikelihood of binary data (Besag 1975), without the partition function.

        - mean_v sum_i log p(v_i | v_-i),    p(v_i | v_-i) = sigmoid(log p~(v) - log p~(flip_i v))

    The *sum* over units and the *mean* over rows. It is consistent for the parameters but it is
    not the likelihood: as a monitor it can improve while the likelihood falls.

    Args:
        model: anything with `log_prob`, `(..., D) -> (...)`, of binary states.
        v: data, `(n, D)`, zeros and ones.
        num_units: with a number m < D, m units chosen at random without replacement, the same for
            all rows, stand for all, scaled by D / m: unbiased, and m / D of the cost.
        generator: source of randomness for that choice.

    Returns:
        scalar loss; for all D units it costs D + 1 log-densities a row.

    Raises:
        ValueError: `v` is not a matrix, is empty or not finite, or `num_units` is out of range.

    >>> from companion.models.rbm import RBM
    >>> rbm = RBM(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> _ = rbm.W.data.zero_()                       # three fair coins: 3 log 2 nats
    >>> f"{pseudolikelihood(rbm, torch.tensor([[1, 0, 1]])).item():.4f}"
    '2.0794'
    """
    if not isinstance(v, Tensor) or v.ndim != 2:
        raise ValueError(f"v must be a matrix (n, D), got {getattr(v, 'shape', type(v).__name__)}")
    check_finite("v", v)
    check_generator(generator, v.device)
    num_visible = v.shape[-1]
    units = torch.arange(num_visible, device=v.device)
    if num_units is not None:
        if check_count("num_units", num_units) > num_visible:
            raise ValueError(f"num_units is {num_units} but v has only {num_visible} units")
        units = torch.randperm(num_visible, generator=generator, device=v.device)[:num_units]
    flip = torch.zeros(len(units), 1, num_visible, dtype=torch.bool, device=v.device)
    flip.scatter_(2, units[:, None, None], True)
    log_prob = model.log_prob(v)  # also checks that v is binary
    flipped = torch.where(flip, v == 0, v != 0).to(v.dtype)
    log_odds = log_prob - model.log_prob(flipped)  # (units, n)
    scale = num_visible / len(units)
    return -scale * torch.nn.functional.logsigmoid(log_odds).sum(0).mean()
