"""Partition functions: exact, by enumeration.

Every estimator of a partition function returns a `LogZ`, so that exact sums and Monte Carlo
estimates meet on one plot.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from companion.core import LogProb, LogZ
from companion.inputs import check_count
from companion.testing import binary_states

__all__ = ["enumeration"]

_LOW_BITS = 14  # states evaluated in one call of the log-density


@torch.no_grad()
def enumeration(
    log_prob: LogProb,
    num_bits: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LogZ:
    """The exact log partition function of a density on binary vectors, by summing all 2^n states.

        log Z = log sum_{x in {0,1}^n} exp(log p~(x))

    The states are evaluated in blocks of at most 2^14, so memory stays bounded.

    Args:
        log_prob: unnormalised log-density, `(..., n) -> (...)`; minus infinity forbids a state.
        num_bits: n, at most 25 (33 million states).
        device: where the states are made.
        dtype: dtype of the states, by default PyTorch's default.

    Returns:
        a `LogZ` with standard error 0.

    Raises:
        ValueError: n out of range, a log-density of the wrong shape, NaN, plus infinity, or no
            state allowed at all.

    >>> fair_coins = lambda x: torch.zeros(x.shape[:-1])
    >>> f"{enumeration(fair_coins, 10).value:.6f}"           # 10 log 2
    '6.931472'
    """
    check_count("num_bits", num_bits)
    if num_bits > 25:
        raise ValueError(
            f"enumeration sums over 2^num_bits states and stops at 25 bits, got {num_bits}; "
            "estimate log Z by annealed importance sampling (AIS) instead"
        )
    num_low = min(_LOW_BITS, num_bits)
    low = binary_states(num_low, device=device, dtype=dtype)
    high_bits = num_bits - num_low
    high = binary_states(high_bits, device=device, dtype=dtype) if high_bits else low[:1, :0]
    total = torch.tensor(-math.inf, dtype=torch.float64, device=low.device)
    for row in high:
        states = torch.cat([row.expand(len(low), -1), low], dim=-1)
        values = _checked(log_prob(states), states)
        total = torch.logaddexp(total, values.double().logsumexp(0))
    if total == -math.inf:
        raise ValueError("log_prob is minus infinity at every state: there is nothing to normalise")
    return LogZ(total, 0.0)


def _checked(values: Tensor, states: Tensor) -> Tensor:
    if values.shape != states.shape[:-1]:
        raise ValueError(
            f"log_prob must map (..., n) to (...): for states of shape {tuple(states.shape)} it "
            f"gave {tuple(values.shape)} instead of {tuple(states.shape[:-1])}"
        )
    bad = torch.isnan(values) | (values == math.inf)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"log_prob is {float(values[first])} at the state {states[first].tolist()}; it must be "
            "finite or minus infinity"
        )
    return values
