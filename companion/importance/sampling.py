"""Importance sampling: log Z and expectations under a target from draws of a proposal.

Draws x_i of a proposal q carry weights `w_i = p~(x_i) / q(x_i)`, where `p = p~ / Z` is the target:

- `mean(w)` is an unbiased estimate of Z, and `mean(w f)` of the integral of `f p~`, which is
  `Z E[f]`;
- `sum(w f) / sum(w)` estimates `E[f]` without knowing Z. It is self-normalised and therefore
  biased, by O(1/n): by about `-Cov(w, w (f - E[f])) / (n Z^2)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.core import LogProb, LogZ
from companion.importance.weights import log_mean_weight, psis, warn_if_collapsed
from companion.inputs import Sampler, check_count, check_finite, draw
from companion.mcmc.base import expand
from companion.monte_carlo import Estimate, estimate

__all__ = ["ImportanceResult", "importance_sampling"]

_RANGE = 700.0  # float64 holds exp of log weights between these limits,
_SAFE = 300.0  # and of twice these


@dataclass(frozen=True, eq=False)
class ImportanceResult:
    """Weighted draws, and what they estimate.

    Attributes:
        x: draws of the proposal, `(n, *batch, *event)`.
        log_weights: `log p~(x) - log q(x)`, `(n, *batch)`, float64.
        log_z: estimate of log Z, the logarithm of the mean weight, `(*batch)`.
        pareto_k: k-hat, `(*batch)`, as in `psis`; NaN for fewer than 25 draws.
    """

    x: Tensor
    log_weights: Tensor
    log_z: LogZ
    pareto_k: Tensor

    @property
    def ess(self) -> Tensor:
        """Kish's effective sample size, `(*batch)`, float64."""
        assert self.log_z.ess is not None
        return self.log_z.ess

    def expectation(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """The self-normalised estimate of `E[f(X)]` under the target: `sum_i u_i f(x_i)`.

        `u_i = w_i / sum_j w_j`. The delta method gives
        `std_error^2 = n / (n - 1) sum_i u_i^2 (f(x_i) - value)^2`. The bias is O(1/n), small beside
        the standard error once n is large.

        Args:
            f: the integrand, `(n, *batch, *event) -> (n, *batch, *shape)`. Its values at draws of
                weight zero are not used.

        Returns:
            An `Estimate` of shape `(*batch, *shape)`.

        Raises:
            ValueError: f gives another shape, or NaN or infinity where the weight is positive.
        """
        share, y = self._align(self.log_weights.softmax(0), f)
        value = (share * y).sum(0)
        n = len(y)
        variance = (share * (y - value)).square().sum(0) * n / (n - 1)
        return Estimate(value, variance.sqrt(), n)

    def integral(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """The unbiased estimate of the integral of `f p~`: the mean of `w_i f(x_i)`.

        For a normalised log-density (Z = 1) this is `E[f(X)]`.

        Args:
            f: the integrand, as in `expectation`.

        Returns:
            An `Estimate` of shape `(*batch, *shape)`.

        Raises:
            ValueError: as in `expectation`; or weights, or a result, outside of float64's range.
        """
        largest = self.log_weights.amax(0)
        for wrong, what in ((largest > _RANGE, "over"), (largest < -_RANGE, "under")):
            if wrong.any():
                raise ValueError(
                    f"weights {what}flow: the largest is exp({float(largest[wrong][0]):.1f}), and "
                    f"float64 ends near exp({'-' if what == 'under' else ''}{_RANGE:.0f}). Add a "
                    "constant to log_prob, or use expectation(f) and log_z"
                )
        # Squares of such weights would under- or overflow: they are taken relative to the largest.
        shift = torch.where(largest.abs() > _SAFE, largest, 0.0)
        weights, y = self._align((self.log_weights - shift).exp(), f)
        found = estimate(weights * y)
        scale = expand(shift.exp(), found.value)
        value, std_error = found.value * scale, found.std_error * scale
        check_finite("the integral (use expectation(f) and log_z)", value)
        return Estimate(value, std_error, found.num_samples)

    @torch.no_grad()
    def _align(self, weights: Tensor, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Weights and values `(n, *batch, *shape)`, the values in float64 and checked."""
        y, lead = f(self.x), weights.shape
        if not isinstance(y, Tensor) or y.is_complex() or y.shape[: len(lead)] != lead:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"f must give real numbers, one or several a draw: expected a tensor of shape "
                f"({', '.join(map(str, lead))}, ...), got {got}"
            )
        extra = (1,) * (y.ndim - len(lead))
        weights, log_weights = weights.reshape(lead + extra), self.log_weights.reshape(lead + extra)
        y = torch.where(log_weights == -math.inf, 0.0, y.double())
        return weights, check_finite("f(x) at draws of positive weight", y)


@torch.no_grad()
def importance_sampling(
    log_prob: LogProb,
    proposal: Sampler,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
) -> ImportanceResult:
    """Estimate log Z and expectations under a target from draws of a proposal.

    The proposal must put mass wherever the target has some, and the weights should have a variance:
    tails at least as heavy as the target's. A warning says when they have collapsed, that is when
    one draw outweighs all others together or k-hat is above its limit (see `psis`).

    Args:
        log_prob: `log p~`, `(n, *batch, *event) -> (n, *batch)`, unnormalised allowed; minus
            infinity where the density is zero.
        proposal: q, a `torch.distributions` object (its batch dimensions are separate problems), or
            one with `sample(n, *, generator)` and `log_prob`. Its density must be normalised; where
            it has a number `log_z` (as in `companion.targets`), that is subtracted.
        num_samples: n, at least 2.
        generator: source of randomness, on the device of the draws.

    Returns:
        An `ImportanceResult`.

    Raises:
        ValueError: log-densities of different shapes, NaN or plus infinity from `log_prob`, a
            proposal whose log-density is not finite at its own draws, or every weight zero.

    Reference: Kahn and Marshall (1953), *Methods of reducing sample size in Monte Carlo
    computations*; Owen (2013), *Monte Carlo theory, methods and examples*, chapter 9.

    >>> q, g = torch.distributions.Normal(0.0, 1.0), torch.Generator().manual_seed(0)
    >>> result = importance_sampling(lambda x: -x.square(), q, 100_000, generator=g)
    >>> print(f"{result.log_z.value:.3f} +/- {result.log_z.std_error:.3f}")   # log(pi) / 2
    0.572 +/- 0.001
    >>> second = result.expectation(torch.square)                             # 1/2
    >>> print(f"{second.value:.3f} +/- {second.std_error:.3f}")
    0.502 +/- 0.002
    >>> print(f"{result.ess / 100_000:.3f}")                                  # sqrt(3) / 2
    0.866
    """
    check_count("num_samples", num_samples, minimum=2)
    x = draw(proposal, num_samples, generator=generator)
    log_weights = weigh(log_prob, proposal, x)
    log_z = log_mean_weight(log_weights)
    k = torch.full_like(log_z.value, math.nan)
    if num_samples >= 25:
        k = psis(log_weights)[1]
    warn_if_collapsed(log_weights, k, stacklevel=3)  # this frame, and that of no_grad
    return ImportanceResult(x, log_weights, log_z, k)


def weigh(log_prob: LogProb, proposal: Sampler, x: Tensor) -> Tensor:
    """`log p~(x) - log q(x)`, `(n, *batch)` in float64, checked (NaN and infinity included)."""
    log_p, log_q = log_prob(x), log_density(proposal, x)
    if log_p.shape != log_q.shape or log_p.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"for draws of shape {tuple(x.shape)} log_prob gave {tuple(log_p.shape)} and "
            f"proposal.log_prob {tuple(log_q.shape)}; expected the same, one number a draw. "
            "torch.distributions.Independent turns batch dimensions into an event"
        )
    for name, wrong in {
        "log_prob is NaN": log_p.isnan(),
        "log_prob is plus infinity": log_p == math.inf,
        "proposal.log_prob is not finite": ~log_q.isfinite(),
    }.items():
        if wrong.any():
            first = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"{name} at {int(wrong.sum())} of {wrong.numel()} draws, first at index {first}, "
                f"x = {x[first].tolist()}"
            )
    return log_p.double() - log_q


def log_density(q: Sampler, x: Tensor) -> Tensor:
    """The normalised log-density of `q`, in float64."""
    return q.log_prob(x).double() - getattr(q, "log_z", 0.0)
