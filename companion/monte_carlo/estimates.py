"""Monte Carlo estimates with error bars.

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

from companion.inputs import check_count, check_finite, check_real, draw

__all__ = [
    "Estimate",
    "as_float64",
    "estimate",
    "evaluate",
    "expectation",
    "proportion_interval",
    "samples_needed",
]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean of independent values, with its standard error.

    Attributes:
        value: the mean, a float64 tensor.
        std_error: its standard error, a float64 tensor of the same shape.
        num_samples: how many independent values were averaged.

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
    values = as_float64("values", values)
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
        x = draw(sampler, m, generator=generator)
        y = evaluate(f, x, f"f(x) of the block that starts at draw {done}")
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


def as_float64(name: str, values: Tensor) -> Tensor:
    """The tensor in float64 and without gradient, checked to hold finite real numbers."""
    check_finite(name, values)
    if values.is_complex():
        raise TypeError(f"{name}: complex; take the real and the imaginary part one at a time")
    return values.detach().double()


def evaluate(f: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
    """`f` at the draws `x` `(m, *event)`, in float64, checked to be finite and `(m, *batch)`."""
    m = len(x)
    y = as_float64(name, f(x))
    if y.shape[:1] != (m,):
        raise ValueError(
            f"f must give one value a draw: for {m} draws it gave shape {tuple(y.shape)}, "
            f"expected ({m}, ...)"
        )
    return y


def _check_two_samples(n: int) -> None:
    if n < 2:
        raise ValueError(f"a standard error needs at least 2 samples, got {n}")
