"""The likelihood of data under a machine whose log Z is known, or estimated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from companion.core import LogZ
from companion.monte_carlo import estimate

__all__ = ["LogLikelihood", "log_likelihood"]


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """The mean log-likelihood of a set of rows, and its two errors.

    They are kept apart, for they mean different things. The rows are a sample of what might have
    been the data: more rows make that error small. The error of log Z is the same in every row: it
    shifts them all together, no number of rows averages it out, and a log Z that is too low (as
    that of `ais`, on average) makes the likelihood too high.

    Attributes:
        value: mean of `rows`, `(*machines)`, float64.
        sampling_error: standard error of the mean, for rows drawn independently.
        log_z_error: standard error of log Z.
        rows: `log p(v) = log p~(v) - log Z`, `(*machines, n)`, float64.
    """

    value: Tensor
    sampling_error: Tensor
    log_z_error: Tensor
    rows: Tensor


@torch.no_grad()
def log_likelihood(self: Any, v: Tensor, log_z: LogZ) -> LogLikelihood:
    """The mean of `log p(v) = log p~(v) - log Z` over rows of data, with its errors.

    Args:
        v: data, `(n, D)`, at least two rows; for a batch of machines as in `log_prob`.
        log_z: log Z of this machine, one entry a machine: `rbm.log_z()`, or an estimate of it.

    Returns:
        A `LogLikelihood`, without gradient.

    Raises:
        ValueError: fewer than two rows, or a `log_z` of another shape than the batch of machines.

    >>> from companion.models.rbm import RBM
    >>> rbm = RBM(4, 3, dtype=torch.float64)
    >>> _ = rbm.W.data.zero_()
    >>> v = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    >>> found = rbm.log_likelihood(v, LogZ(rbm.log_z().value, 0.1))          # four fair coins
    >>> print(f"{found.value:.4f} +/- {found.sampling_error:.4f} +/- {found.log_z_error:.4f}")
    -2.7726 +/- 0.0000 +/- 0.1000
    """
    machines = tuple(getattr(self, "batch_shape", ()))
    if log_z.value.shape != machines:
        raise ValueError(
            f"log_z must have the shape of the batch of machines, {machines}, got "
            f"{tuple(log_z.value.shape)}"
        )
    rows = self.log_prob(v).double() - log_z.value[..., None]
    mean = estimate(rows, -1)
    return LogLikelihood(mean.value, mean.std_error, log_z.std_error, rows)
