"""Monte Carlo estimates with error bars, and exact draws by rejection.

An expectation `I = E[f(X)]` is estimated by the mean of n independent values, which is unbiased;
its standard error is `s / sqrt(n)` with `s^2` the sample variance (divisor n - 1, also unbiased).
All sums are formed, and all results returned, in float64: an error bar can be far smaller than the
spacing of float32 numbers around the mean (at 1e8 that spacing is 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from companion.core import LogProb, LogZ
from companion.inputs import Sampler, check_count, check_finite, check_generator, check_real, draw

__all__ = [
    "Estimate",
    "RejectionResult",
    "estimate",
    "expectation",
    "proportion_interval",
    "rejection_sampling",
    "samples_needed",
]


# ---------------------------------------------------------------- means and their error bars


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean of independent values, with its standard error.

    Attributes:
        value: the mean, a float64 tensor.
        std_error: its standard error, a float64 tensor of the same shape.
        num_samples: how many values were averaged.

    >>> Estimate(torch.tensor(2.0), torch.tensor(0.1), 100).interval()
    (tensor(1.8040), tensor(2.1960))
    """

    value: Tensor
    std_error: Tensor
    num_samples: int

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The normal confidence interval `value -/+ z std_error` of the given level.

        The central limit theorem gives it its coverage, so it is right only for many samples of
        finite variance; for the frequency of a rare event use `proportion_interval`.
        """
        half = _normal_quantile(level) * self.std_error
        return self.value - half, self.value + half


def estimate(values: Tensor, dim: int = 0) -> Estimate:
    """The mean of independent values, with its standard error.

    `value = (1/n) sum_i f_i` and `std_error^2 = sum_i (f_i - value)^2 / (n (n - 1))`.

    Args:
        values: f_i, the samples along dimension `dim`, `(n, *batch)` unless told otherwise; the
            other dimensions are a batch of separate problems. Booleans and integers count as
            numbers.
        dim: dimension of the samples.

    Returns:
        An `Estimate` of shape `(*batch)`, without gradient.

    Raises:
        TypeError: `values` is not a tensor of real numbers.
        ValueError: fewer than two samples (one value has no standard error), NaN or infinite
            values, or no such dimension.

    >>> estimate(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    Estimate(value=tensor(3., dtype=torch.float64), std_error=tensor(1.0801, dtype=torch.float64),
    num_samples=4)
    """
    values = _as_float64("values", values)
    if not -values.ndim <= dim < values.ndim:
        raise ValueError(f"values of shape {tuple(values.shape)} have no dimension {dim}")
    n = values.shape[dim]
    _check_two_samples(n)
    variance, mean = torch.var_mean(values, dim)  # two passes, divisor n - 1
    return Estimate(mean, (variance / n).sqrt(), n)


@torch.no_grad()
def expectation(
    f: Callable[[Tensor], Tensor],
    sampler: Any,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
    block_size: int = 65536,
) -> Estimate:
    """Estimate `E[f(X)]` from exact draws of X, in blocks so that memory stays bounded.

    Means and sums of squared deviations of the blocks are merged by the update of Chan, Golub and
    LeVeque, which cancels no digits: given the same draws, the block size changes only round-off.
    The draws themselves may change with it: each block is one call of the sampler, and a sampler
    that fills several tensors in turn (a mixture's noise and labels) then uses the generator's
    stream in another order.

    Args:
        f: the integrand, `(m, *event) -> (m, *batch)` for any m.
        sampler: a `torch.distributions` object, or one with `sample(m, *, generator)`.
        num_samples: n, at least 2.
        generator: source of randomness, on the device of the draws.
        block_size: the largest m.

    Returns:
        An `Estimate` of shape `(*batch)`, without gradient.

    Raises:
        ValueError: a count out of range, an `f` that loses the sample dimension or gives NaN or
            infinity.

    Reference: Chan, Golub and LeVeque (1983), *Algorithms for computing the sample variance:
    analysis and recommendations*.

    >>> uniform = torch.distributions.Uniform(0.0, 1.0)
    >>> g = torch.Generator().manual_seed(0)
    >>> third = expectation(torch.square, uniform, 10**5, generator=g)
    >>> print(f"{third.value:.4f} +/- {third.std_error:.4f}")
    0.3334 +/- 0.0009
    """
    _check_two_samples(check_count("num_samples", num_samples))
    check_count("block_size", block_size)
    done = 0
    mean: Any = 0.0
    squares: Any = 0.0
    while done < num_samples:
        m = min(block_size, num_samples - done)
        y = f(draw(sampler, m, generator=generator))
        y = _as_float64(f"f(x) of the block that starts at draw {done}", y)
        if y.shape[:1] != (m,):
            raise ValueError(
                f"f must give one value a draw: for {m} draws it gave shape {tuple(y.shape)}, "
                f"expected ({m}, ...)"
            )
        block_mean = y.mean(0)
        delta = block_mean - mean
        mean = mean + delta * (m / (done + m))
        squares = squares + (y - block_mean).square().sum(0)
        squares = squares + delta * (delta * (done * m / (done + m)))
        done += m
    return Estimate(mean, (squares / (done - 1) / done).sqrt(), done)


def samples_needed(std_dev: float, half_width: float, level: float = 0.95) -> int:
    """How many samples give a normal interval of the half-width wanted: `(z s / half_width)^2`.

    Args:
        std_dev: s, the standard deviation of one value f(X), from theory or from a pilot run.
        half_width: half the length of the interval wanted.
        level: confidence level, between 0 and 1.

    Returns:
        The number of samples, rounded up, at least 2.

    Raises:
        ValueError: an argument that is not positive and finite, or a level outside (0, 1).

    >>> samples_needed(4 * math.sqrt(math.pi / 4 * (1 - math.pi / 4)), 0.001)  # pi to 3 decimals
    10359517
    """
    check_real("std_dev", std_dev, minimum=0.0)
    check_real("half_width", half_width, minimum=0.0)
    return max(2, math.ceil((_normal_quantile(level) * std_dev / half_width) ** 2))


def proportion_interval(
    successes: Tensor | int, num_samples: int, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Wilson's confidence interval for a probability, given the number of successes.

    It holds all p with `|k/n - p| <= z sqrt(p (1 - p) / n)`. The normal interval has k/n for p
    under the root: for a rare event it is far too short, and of width 0 at k = 0.

    Args:
        successes: k, a number or a tensor of separate problems `(*batch)`.
        num_samples: n.
        level: confidence level, between 0 and 1.

    Returns:
        Lower and upper limits, float64, `(*batch)`.

    Raises:
        ValueError: successes below 0, above n, or not whole numbers.

    Reference: Wilson (1927), *Probable inference, the law of succession, and statistical
    inference*; Brown, Cai and DasGupta (2001), *Interval estimation for a binomial proportion*.

    >>> low, high = proportion_interval(0, 100)
    >>> print(f"{low:.4f} {high:.4f}")
    0.0000 0.0370
    """
    n = check_count("num_samples", num_samples)
    if not isinstance(successes, Tensor):
        successes = torch.tensor(check_count("successes", successes, minimum=0), device="cpu")
    k = check_finite("successes", successes).double()
    wrong = (k < 0) | (k > n) | (k != k.round())
    if wrong.any():
        raise ValueError(
            f"successes must be whole numbers from 0 to num_samples = {n}, got {k[wrong][0]:g}"
        )
    z = _normal_quantile(level)
    centre = (k + z * z / 2) / (n + z * z)
    half = z * (k * (n - k) / n + z * z / 4).sqrt() / (n + z * z)
    return (centre - half).clamp(min=0.0), (centre + half).clamp(max=1.0)


def _normal_quantile(level: float) -> float:
    """z with P(|N(0, 1)| <= z) = level."""
    check_real("level", level, minimum=0.0, maximum=1.0)
    return NormalDist().inv_cdf(0.5 + level / 2.0)


def _as_float64(name: str, values: Tensor) -> Tensor:
    check_finite(name, values)
    if values.is_complex():
        raise TypeError(f"{name}: complex; take the real and the imaginary part one at a time")
    return values.detach().double()


def _check_two_samples(n: int) -> None:
    if n < 2:
        raise ValueError(f"a standard error needs at least 2 samples, got {n}")


# ---------------------------------------------------------------- rejection sampling


@dataclass(frozen=True, eq=False)
class RejectionResult:
    """What `rejection_sampling` returns.

    Attributes:
        x: independent exact draws, `(num_samples, *event)`.
        log_z: estimate of the target's log normaliser, unbiased (a `LogZ`).
        accept_rate: accepted share of the proposals.
        num_proposals: proposals made up to the last draw kept.
    """

    x: Tensor
    log_z: LogZ
    accept_rate: float
    num_proposals: int


_BLOCK = 16384  # proposals at a time, at most
_HOPELESS = 1e-4  # give up below this acceptance rate ...
_PATIENCE = 10**6  # ... after this many proposals


@torch.no_grad()
def rejection_sampling(
    log_prob: LogProb,
    proposal: Sampler,
    log_bound: float,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
) -> RejectionResult:
    """Draw exactly from an unnormalised density p~ that lies below `M q` for a density q.

    A draw x of q is accepted with probability `p~(x) / (M q(x))`. The accepted ones are independent
    draws from p = p~ / Z, and the acceptance probability is `Z / M`. With N proposals up to the
    k-th acceptance, `log M + digamma(k) - digamma(N)` is an unbiased estimate of log Z, and
    `trigamma(k) - trigamma(N)` an unbiased estimate of its variance; `log M + log(k / N)` would be
    too high by about `(1 - Z/M) / (2k)`.

    Args:
        log_prob: `log p~`, `(m, *event) -> (m,)`; minus infinity where the density is zero.
        proposal: q, a `torch.distributions` object, or one with `sample(m, *, generator)` and
            `log_prob`. Its density must be normalised; where it has a number `.log_z` (as in
            `companion.targets`), that is subtracted.
        log_bound: log M, with `log p~(x) - log q(x) <= log M` for all x.
        num_samples: k, the number of draws wanted.
        generator: source of randomness, on the device of the draws.

    Returns:
        A `RejectionResult`.

    Raises:
        ValueError: a proposal where the bound is violated, or where a log-density is NaN;
            log-densities of another shape; fewer than one proposal in 10,000 accepted, after a
            million of them.

    Reference: von Neumann (1951), *Various techniques used in connection with random digits*; for
    log Z, DeGroot (1959), *Unbiased sequential estimation for binomial populations*.

    >>> half_normal = lambda x: torch.where(x > 0, -0.5 * x**2, -torch.inf)
    >>> q = torch.distributions.Exponential(1.0)              # p~ / q <= exp(1/2), at x = 1
    >>> g = torch.Generator().manual_seed(0)
    >>> r = rejection_sampling(half_normal, q, 0.5, 10_000, generator=g)
    >>> print(f"{r.log_z.value:.3f} +/- {r.log_z.std_error:.3f}")
    0.220 +/- 0.005
    >>> print(f"{math.log(math.pi / 2) / 2:.3f}")                                  # exact
    0.226
    """
    check_real("log_bound", log_bound)
    check_count("num_samples", num_samples)
    kept: list[Tensor] = []
    accepted = proposed = num_proposals = 0
    while accepted < num_samples:
        if proposed >= _PATIENCE and accepted < _HOPELESS * proposed:
            raise ValueError(
                f"only {accepted} of {proposed} proposals were accepted: find a proposal closer to "
                "the target, a smaller log_bound, or use a Markov chain"
            )
        needed = num_samples - accepted
        m = min(_BLOCK, math.ceil(needed * (proposed + 1) / (accepted + 1)))
        x = draw(proposal, m, generator=generator)
        check_generator(generator, x.device)
        log_accept = _log_accept(log_prob, proposal, log_bound, x)
        u = torch.rand(m, dtype=torch.float64, device=x.device, generator=generator)
        index = torch.nonzero(u.log() < log_accept).flatten()[:needed]
        kept.append(x[index])
        accepted += len(index)
        if accepted == num_samples:
            num_proposals = proposed + int(index[-1]) + 1
        proposed += m
    counts = torch.tensor([num_samples, num_proposals], dtype=torch.float64, device=x.device)
    digamma, trigamma = torch.polygamma(0, counts), torch.polygamma(1, counts)
    log_z = LogZ(log_bound + digamma[0] - digamma[1], (trigamma[0] - trigamma[1]).sqrt())
    return RejectionResult(torch.cat(kept), log_z, num_samples / num_proposals, num_proposals)


def _log_accept(log_prob: LogProb, proposal: Sampler, log_bound: float, x: Tensor) -> Tensor:
    """`log p~ - log q - log M` at the proposals `x`, `(m,)` in float64, checked to be at most 0."""
    log_p, log_q = log_prob(x), proposal.log_prob(x)
    for name, value in {"log_prob": log_p, "proposal.log_prob": log_q}.items():
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"{name} must give one number a draw: for x of shape {tuple(x.shape)} it gave "
                f"{tuple(value.shape)}, expected ({len(x)},). torch.distributions.Independent "
                "turns batch dimensions into an event"
            )
        if value.isnan().any():
            i = int(torch.nonzero(value.isnan())[0])
            raise ValueError(f"{name} is NaN at {int(value.isnan().sum())} draws, first {x[i]}")
    # The bound is often attained: round-off there (of the coarser dtype) is no violation.
    eps = max(torch.finfo(log_p.dtype).eps, torch.finfo(log_q.dtype).eps)
    slack = 16 * eps * (1.0 + log_p.abs() + log_q.abs())
    log_p, log_q = log_p.double(), log_q.double() - getattr(proposal, "log_z", 0.0)
    log_ratio = log_p - log_q
    violated = (log_ratio > log_bound + slack) | (log_ratio == math.inf)
    if violated.any():
        worst = int(torch.where(violated, log_ratio, -math.inf).argmax())
        raise ValueError(
            f"the bound does not hold: log_prob(x) - proposal.log_prob(x) = {log_ratio[worst]:.6g} "
            f"exceeds log_bound = {log_bound:.6g} at x = {x[worst].tolist()}; raise log_bound or "
            "use a proposal with heavier tails"
        )
    return log_ratio - log_bound
