"""Partition functions by enumeration: exact, for models of a few bits."""

from __future__ import annotations

import torch

from companion.core import LogProb, LogZ
from companion.testing.enumeration import check_allowed, log_prob_blocks

__all__ = ["enumeration"]


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
    blocks = log_prob_blocks(log_prob, num_bits, device=device, dtype=dtype)
    sums = torch.stack([block.logsumexp(0) for block in blocks])
    return LogZ(check_allowed(sums).logsumexp(0), 0.0)
