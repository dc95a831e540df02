"""Log weights: their mean, how few draws they leave, their tail, and resampling by them.

Draws lie along the first dimension, as in `torch.distributions`: log weights `(n, *batch)` are
`*batch` separate problems. A log weight of minus infinity is a weight of zero. Whatever the dtype
that comes, float64 leaves.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from companion.core import LogZ
from companion.inputs import check_count, check_generator

__all__ = [
    "bootstrap_std_error",
    "effective_sample_size",
    "log_mean_weight",
    "pareto_k",
    "pareto_limit",
    "psis",
    "resample",
    "warn_if_collapsed",
]


def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Kish's effective sample size, `(sum_i w_i)^2 / sum_i w_i^2`.

    n weighted draws estimate about as well as this many equally weighted ones would. It is 1 when
    one weight dominates and n when all are equal. It is itself an estimate, and too large where the
    draws have missed the region of the large weights: see `pareto_k`.

    Args:
        log_weights: `(n, *batch)` unless `dim` tells otherwise.
        dim: dimension of the draws.

    Returns:
        `(*batch)`, float64, from 1 to n.

    Raises:
        ValueError: NaN, plus infinity, or a problem in which every weight is zero.

    Reference: Kong (1992), *A note on importance sampling using standardized weights*.

    >>> effective_sample_size(torch.tensor([0.0, 0.0, 0.0, -1000.0]))
    tensor(3., dtype=torch.float64)
    """
    return 1.0 / _normalised(log_weights, dim).square().sum(dim)


def log_mean_weight(log_weights: Tensor) -> LogZ:
    """Estimate log Z by the logarithm of the mean weight: `log((1/n) sum_i w_i)`.

    The mean weight is an unbiased estimate of Z; its logarithm is too low by about half its own
    variance. With shares `u_i = w_i / sum_j w_j`, the delta method gives
    `std_error^2 = n / (n - 1) sum_i (u_i - 1/n)^2`. This never exceeds 1, however far off the
    estimate is: a standard error above some 0.3 says only that nothing is known.

    Args:
        log_weights: `(n, *batch)`, independent draws along the first dimension, n at least 2.

    Returns:
        A `LogZ` with entries `(*batch)`, the log weights and their effective sample size.

    Raises:
        ValueError: fewer than two weights, NaN, plus infinity, or every weight zero.

    >>> log_z = log_mean_weight(torch.tensor([1.0, 2.0, 3.0]).log())
    >>> print(f"{log_z.value:.4f} +/- {log_z.std_error:.4f}")         # log 2, and 1 / sqrt(3) / 2
    0.6931 +/- 0.2887
    """
    share = _normalised(log_weights)
    n = len(share)
    if n < 2:
        raise ValueError(f"a standard error needs at least 2 weights, got {n}")
    log_weights = log_weights.detach().double()
    return LogZ(
        log_weights.logsumexp(0) - math.log(n),
        ((share - 1.0 / n).square().sum(0) * n / (n - 1)).sqrt(),
        log_weights,
        1.0 / share.square().sum(0),
    )


_RESAMPLED = 2**22  # weights gathered at a time: 32 MiB


@torch.no_grad()
def bootstrap_std_error(
    log_weights: Tensor, num_resamples: int = 1000, *, generator: torch.Generator | None = None
) -> Tensor:
    """The standard error of the log of the mean weight, by the bootstrap.

    Draws are resampled n out of n with replacement, again and again; the standard deviation of the
    logs of their mean weights is the answer. Unlike that of `log_mean_weight`, by the delta method,
    it knows that the logarithm is curved, and may exceed 1; for well-behaved weights they agree.
    Neither knows of large weights that no draw has found.

    Args:
        log_weights: `(n, *batch)`, independent draws along the first dimension, n at least 2; of
            `reverse_ais`, take minus its log weights.
        num_resamples: how often, at least 2; 1,000 give it to within 2 %.
        generator: source of randomness, on the device of `log_weights`.

    Returns:
        `(*batch)`, float64; infinity where a resample had weights of zero alone.

    Raises:
        ValueError: as in `log_mean_weight`, or a count out of range.

    Reference: Efron (1979), *Bootstrap methods: another look at the jackknife*.

    >>> log_weights = 0.5 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    >>> other = bootstrap_std_error(log_weights, generator=torch.Generator().manual_seed(1))
    >>> print(f"{log_mean_weight(log_weights).std_error:.3f}, bootstrap {other:.3f}")
    0.019, bootstrap 0.019
    """
    _normalised(log_weights)  # for its checks
    check_count("num_resamples", num_resamples, minimum=2)
    check_generator(generator, log_weights.device)
    log_weights = log_weights.detach().double()
    n = len(log_weights)
    if n < 2:
        raise ValueError(f"a standard error needs at least 2 weights, got {n}")
    means = []
    size = max(1, _RESAMPLED // log_weights.numel())
    for first in range(0, num_resamples, size):
        shape = (min(size, num_resamples - first), n)
        chosen = torch.randint(n, shape, generator=generator, device=log_weights.device)
        means.append(log_weights[chosen].logsumexp(1))
    log_means = torch.cat(means)
    dead = (log_means == -math.inf).any(0)
    return torch.where(dead, math.inf, log_means.std(0))


_FEWEST = 25  # weights for a tail of five, the shortest that arviz-stats fits


def psis(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed importance sampling: normalised log weights with a regular tail, and k-hat.

    A generalised Pareto law is fitted to the largest `min(n / 5, 3 sqrt(n))` weights, and its
    quantiles replace them: less variance, for a little bias. Its shape k says how heavy the tail
    is: weights have moments of order below 1/k, so for `k > 1/2` their variance is infinite and no
    standard error means anything, and for `k > 1` they have no mean. An estimate is taken for
    reliable below `min(1 - 1 / log10(n), 0.7)`.

    Args:
        log_weights: `(n, *batch)`, independent draws along the first dimension, n at least 25.

    Returns:
        Smoothed log weights, `(n, *batch)`, whose exponentials sum to 1, and k-hat, `(*batch)`,
        both float64. Zero weights stay zero and are left out of the fit. Where there is nothing to
        fit, the weights stay as they were and k-hat is minus infinity if the largest weights are
        all equal (no tail), infinity if they span more than double precision holds, and NaN if
        fewer than 25 weights are positive or many are tied, as for discrete draws.

    Raises:
        ValueError: fewer than 25 weights, NaN, plus infinity, or every weight zero.

    Reference: Vehtari, Simpson, Gelman, Yao and Gabry (2024), *Pareto smoothed importance
    sampling*.

    >>> u = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    >>> _, k = psis(-0.3 * u.log())                                   # w = u^-0.3 is Pareto's law
    >>> print(f"{k:.1f}")
    0.3
    """
    _normalised(log_weights)  # for its checks
    n = len(log_weights)
    if n < _FEWEST:
        raise ValueError(f"a tail can be fitted to at least {_FEWEST} weights, got {n}")
    columns = log_weights.detach().double().reshape(n, -1).T.clone()
    k = columns.new_empty(len(columns))
    for i, column in enumerate(columns):  # as the library does: it fits one tail at a time
        positive = column > -math.inf
        smoothed, k[i] = _psis(column[positive])
        column[positive] = smoothed
    smoothed = columns.log_softmax(1).T.reshape(log_weights.shape)
    return smoothed, k.reshape(log_weights.shape[1:])


def _psis(log_weights: Tensor) -> tuple[Tensor, float]:
    """`psis` of one problem, with the cases that arviz-stats cannot fit (or fits in silence)."""
    n = len(log_weights)
    if n < _FEWEST:
        return log_weights, math.nan
    m = min(n // 5, int(3 * math.sqrt(n)))
    top = (log_weights - log_weights.max()).topk(m + 1).values  # the last one is the threshold
    quarter = top[m - int(m / 4 + 0.5)]  # the fit divides by this quantile's excess
    if top[m - 1] == 0.0:
        return log_weights, -math.inf
    if quarter < -600.0:
        return log_weights, math.inf
    if quarter.exp() == top[m].exp():
        return log_weights, math.nan
    from arviz_stats.base.array import array_stats  # slow to import

    psislw: Any = array_stats.psislw
    smoothed, k = psislw(-log_weights.cpu().numpy())
    return torch.as_tensor(smoothed, device=log_weights.device), float(k)


def pareto_k(log_weights: Tensor) -> Tensor:
    """The shape k of the weights' tail; arguments, errors and reference are those of `psis`.

    Returns:
        k-hat, `(*batch)`, float64.

    >>> u = torch.rand(10**6, generator=torch.Generator().manual_seed(0))
    >>> print(f"{pareto_k(-0.8 * u.log()):.1f}")                      # w = u^-0.8 has no variance
    0.8
    """
    return psis(log_weights)[1]


def pareto_limit(n: int) -> float:
    """The k-hat of n draws, at least 2, above which an estimate is not taken for reliable.

    >>> f"{pareto_limit(100):.2f} {pareto_limit(10_000):.2f}"
    '0.50 0.70'
    """
    return min(1.0 - 1.0 / math.log10(n), 0.7)


def warn_if_collapsed(log_weights: Tensor, k: Tensor | None = None, *, stacklevel: int = 2) -> None:
    """Warn of problems in which one draw outweighs all others together, or k-hat is too large.

    Args:
        log_weights: `(n, *batch)`.
        k: k-hat, `(*batch)`; it counts from 100 draws on, where it says something.
        stacklevel: as in `warnings.warn`, seen from the caller.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn_if_collapsed(torch.tensor([0.0, 0.0, 9.0]))
    >>> str(caught[0].message)[:64]
    'the importance weights have collapsed in 1 of 1 problems: one of'
    """
    n = len(log_weights)
    largest = _normalised(log_weights).amax(0)
    suspect = largest > 0.5
    found = f"one of {n} draws has up to {float(largest.max()):.0%} of the weight"
    if k is not None and n >= 100:
        limit = pareto_limit(n)
        suspect = suspect | (k > limit)
        if (k > limit).any():
            found += f", and k-hat is up to {float(k[k > limit].max()):.2f} (limit {limit:.2f})"
    if suspect.any():
        warnings.warn(
            f"the importance weights have collapsed in {int(suspect.sum())} of "
            f"{suspect.numel()} problems: {found}. Estimates and their standard errors may "
            "be far off; use a proposal closer to the target, with heavier tails",
            stacklevel=stacklevel + 1,
        )


# ---------------------------------------------------------------- resampling

Scheme = Literal["multinomial", "stratified", "systematic", "residual"]


@torch.no_grad()
def resample(
    log_weights: Tensor,
    scheme: Scheme,
    num: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose draws in proportion to their weights, so that the chosen ones count equally.

    With every scheme draw i is chosen `num u_i` times on average, where `u_i = w_i / sum_j w_j`.
    Points in [0, 1) are looked up in the cumulative sums of the shares u_i:

    - "multinomial": independent uniform points;
    - "stratified": one uniform point in each interval `[j / num, (j + 1) / num)`;
    - "systematic": the points `(j + U) / num` with one uniform U;
    - "residual": `floor(num u_i)` copies of each draw, the rest multinomial by what remains.

    For every integrand, "stratified" and "residual" have at most the variance of "multinomial".
    "systematic" chooses a draw either `floor(num u_i)` or `ceil(num u_i)` times and usually varies
    least, but its points are dependent: an order of the draws that falls in with their spacing can
    make it far worse.

    Args:
        log_weights: `(n, *batch)`.
        scheme: one of the four names.
        num: number of draws to choose, by default n.
        generator: source of randomness, on the device of `log_weights`.

    Returns:
        Indices along the first dimension, `(num, *batch)`, int64. For one problem the new draws are
        `x[indices]`. A draw of weight zero is never chosen.

    Raises:
        ValueError: an unknown scheme, NaN, plus infinity, or every weight zero.

    Reference: Douc, Cappé and Moulines (2005), *Comparison of resampling schemes for particle
    filtering*.

    >>> log_weights = torch.tensor([0.5, 0.25, 0.0, 0.25]).log()
    >>> resample(log_weights, "systematic", 8, generator=torch.Generator().manual_seed(0))
    tensor([0, 0, 0, 0, 1, 1, 3, 3])
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be one of {', '.join(get_args(Scheme))}; got {scheme!r}")
    share = _normalised(log_weights).movedim(0, -1)
    num = check_count("num", share.shape[-1] if num is None else num)
    check_generator(generator, share.device)
    shape = (*share.shape[:-1], 1 if scheme == "systematic" else num)
    u = torch.rand(shape, dtype=share.dtype, device=share.device, generator=generator)
    slot = torch.arange(num, dtype=share.dtype, device=share.device)
    if scheme == "residual":
        # The slack keeps a share of 1/num, rounded down, from losing its copy.
        copies = (num * share * (1.0 + 1e-12)).floor()
        index = _look_up((num * share - copies).clamp(min=0.0), u)
        given = copies.cumsum(-1)
        kept = torch.searchsorted(given, slot.expand(shape).contiguous(), right=True)
        index = torch.where(slot < given[..., -1:], kept, index)
    else:
        # The sum may round up to 1, where no draw is.
        points = u if scheme == "multinomial" else ((slot + u) / num).clamp(max=1.0 - 2.0**-53)
        index = _look_up(share, points)
    return index.movedim(-1, 0)


def _look_up(weights: Tensor, points: Tensor) -> Tensor:
    """The index i with `c_{i-1} <= points < c_i`, c the cumulative sums of `weights` over all."""
    c = weights.cumsum(-1)
    # Divided by the last sum, and not by one that rounded otherwise: the last c is 1 exactly, above
    # every point, and `right=True` passes over draws that add nothing.
    return torch.searchsorted(c / c[..., -1:], points.contiguous(), right=True)


def _normalised(log_weights: Any, dim: int = 0) -> Tensor:
    """The shares `w_i / sum_j w_j` in float64, once the log weights have been checked."""
    if not isinstance(log_weights, Tensor) or log_weights.is_complex():
        got = log_weights.dtype if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise TypeError(f"log_weights must be a tensor of real numbers, got {got}")
    if not -log_weights.ndim <= dim < log_weights.ndim or log_weights.numel() == 0:
        raise ValueError(
            f"log_weights must hold draws along dimension {dim}, got {tuple(log_weights.shape)}"
        )
    log_weights = log_weights.detach().double()
    for wrong, name in (log_weights.isnan(), "NaN"), (log_weights == math.inf, "plus infinity"):
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} of {wrong.numel()} log weights are {name}, the first at index "
                f"{tuple(wrong.nonzero()[0].tolist())}: look at log_prob there"
            )
    dead = (log_weights == -math.inf).all(dim)
    if dead.any():
        raise ValueError(
            f"every weight is zero in {int(dead.sum())} of {dead.numel()} problems: no "
            "draw fell where the target has mass; use a proposal that covers it"
        )
    return log_weights.softmax(dim)
