"""R-hat, effective sample size, Monte Carlo standard errors and autocorrelation of chains.

Draws are `(chains, draws, *event)`, or a `Trace`, whose chain dimensions are flattened into one;
results are float64 and `(*event)` unless told otherwise. The estimators are those of ArviZ,
guarded: a chain that never moved tells nothing of how far to trust it, so its coordinate has no
effective sample size (NaN, with a warning; ArviZ would give the number of draws).

Chains know only of where they have been: all of this is necessary, and none of it sufficient.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from companion.core import Trace
from companion.diagnostics.draws import (
    array_stats,
    checked_draws,
    columns_of,
    event_of,
    is_constant,
    is_stuck,
    stuck_note,
    warn,
)
from companion.inputs import check_count, check_real

__all__ = [
    "autocorrelation",
    "ess_bulk",
    "ess_tail",
    "integrated_autocorrelation_time",
    "mcse_mean",
    "mcse_quantile",
    "mcse_sd",
    "rhat",
]

# ---------------------------------------------------------------- autocorrelation


def autocorrelation(x: Tensor | Trace, max_lag: int | None = None) -> Tensor:
    """Autocorrelation of each chain: `r_t = c_t / c_0` with `c_t = sum_i y_i y_{i+t} / n`.

    y are the deviations from the chain's own mean, so r_t is too low by about the autocorrelation
    time over n, and at long lags it is noise. The sums are formed by a Fourier transform.

    Args:
        x: draws, `(chains, draws, *event)`, or a `Trace`.
        max_lag: the longest lag t, by default all there are.

    Returns:
        `(chains, max_lag + 1, *event)`, float64, 1 at lag 0. NaN, with a warning, for a chain that
        is constant.

    Raises:
        ValueError: NaN or infinite draws, fewer than 4 draws, or lags that they do not reach.

    >>> g = torch.Generator().manual_seed(0)
    >>> noise = torch.randn(2, 10_001, dtype=torch.float64, generator=g)
    >>> moving_average = noise[:, 1:] + noise[:, :-1]               # r_1 = 1/2, then 0
    >>> print(autocorrelation(moving_average, 2).mean(0).round(decimals=1))
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    draws = checked_draws(x)
    n = draws.shape[1]
    max_lag = n - 1 if max_lag is None else check_count("max_lag", max_lag, minimum=0)
    if max_lag >= n:
        raise ValueError(f"max_lag must be below the number of draws, {n}; got {max_lag}")
    warn(stuck_note(draws))
    y = draws - draws.mean(1, keepdim=True)
    size = 2 ** (n + max_lag).bit_length()  # padded by zeros, so that no lag wraps round
    power = torch.fft.rfft(y, size, dim=1).abs().square()
    covariance = torch.fft.irfft(power, size, dim=1)[:, : max_lag + 1]
    correlation = covariance / covariance[:, :1]
    return correlation.masked_fill(is_constant(draws).unsqueeze(1), torch.nan)


def integrated_autocorrelation_time(x: Tensor | Trace) -> Tensor:
    """How many draws count for one: `tau = 1 + 2 sum_t rho_t`, over all chains.

    The mean of n draws has variance `tau sigma^2 / n`, so `n / tau` draws are effective. It is 1
    for independent draws and below 1 for antithetic ones. The sum runs as far as Geyer's initial
    monotone sequence. Where chains disagree, their spread counts as autocorrelation. For chains of
    a few tau it is biased upwards, however many there are (by half for chains of 8 tau), since each
    is centred at its own mean: then use the spread of the chains' means.

    Args:
        x: draws, `(chains, draws, *event)`, or a `Trace`.

    Returns:
        `(*event)`, float64; NaN, with a warning, where a chain is constant.

    Raises:
        ValueError: NaN or infinite draws, or fewer than 4.

    Reference: Geyer (1992), *Practical Markov chain Monte Carlo*.

    >>> g = torch.Generator().manual_seed(0)
    >>> print(f"{integrated_autocorrelation_time(torch.randn(4, 5_000, generator=g)):.1f}")
    1.0
    """
    draws = checked_draws(x)
    warn(stuck_note(draws))
    return draws.shape[0] * draws.shape[1] / _ess_of_mean(draws, _scaled(draws)[0])


# ---------------------------------------------------------------- effective sample size


def ess_bulk(x: Tensor | Trace) -> Tensor:
    """Effective sample size of the bulk: of the draws' normal scores, over split chains.

    It says how well the location of the distribution is known, whether or not it has a mean. More
    than the number of draws is real for antithetic chains (at most `log10` of that number times as
    many are reported). It is an estimate, to be trusted from some 100 a chain on.

    Args:
        x: draws, `(chains, draws, *event)`, or a `Trace`.

    Returns:
        `(*event)`, float64; NaN, with a warning, where a chain is constant.

    Raises:
        ValueError: NaN or infinite draws, or fewer than 4.

    Reference: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), *Rank-normalization, folding,
    and localization: an improved R-hat for assessing convergence of MCMC*.

    >>> x = torch.randn(4, 1_000, generator=torch.Generator().manual_seed(0))
    >>> print(f"{ess_bulk(x):.0f} of 4000, {ess_bulk(x.repeat_interleave(10, 1)):.0f} of 40000")
    3960 of 4000, 4022 of 40000
    """
    draws = checked_draws(x)
    warn(stuck_note(draws))
    ess = event_of(array_stats().ess(columns_of(draws), method="bulk"), draws)
    return ess.masked_fill(is_stuck(draws), torch.nan)


def ess_tail(x: Tensor | Trace) -> Tensor:
    """Effective sample size of the tails: the smaller of those of the 5 % and the 95 % quantile.

    That of a quantile q is the effective sample size of the indicator `x <= q`. Where more than
    95 % of the draws equal the largest one (a binary variable that is rarely 0), both indicators
    are constant: then there is none.

    Args:
        x: draws, `(chains, draws, *event)`, or a `Trace`.

    Returns:
        `(*event)`, float64; NaN, with a warning, where a chain is constant or there is no tail.

    Raises:
        ValueError: NaN or infinite draws, or fewer than 4.

    Reference: Vehtari and others (2021), as for `ess_bulk`.

    >>> x = torch.randn(4, 1_000, generator=torch.Generator().manual_seed(0))
    >>> print(f"{ess_tail(x):.0f} of 4000")
    3611 of 4000
    """
    draws = checked_draws(x)
    low, high = (_ess_of_quantile(draws, prob) for prob in (0.05, 0.95))
    tail = torch.fmin(low, high)  # NaN only if both are
    no_tail = tail.isnan() & ~is_stuck(draws)
    warn(stuck_note(draws))
    if no_tail.any():
        warn(
            f"the 5 % and the 95 % quantile are the largest draw in {int(no_tail.sum())} of "
            f"{no_tail.numel()} coordinates: they have no tails, and no effective sample size there"
        )
    return tail


def _ess_of_mean(draws: Tensor, values: Tensor) -> Tensor:
    """Of the mean of `values`, one for each draw; NaN where a chain of `draws` is constant."""
    ess = event_of(array_stats().ess(columns_of(values), method="mean"), draws)
    return ess.masked_fill(is_stuck(draws), torch.nan)


def _scaled(draws: Tensor) -> tuple[Tensor, Tensor]:
    """The deviations from the mean over all chains, scaled to at most 1, and their scale.

    ArviZ takes values within 1e-15 of one another for constant, and powers of large ones overflow.
    """
    y = draws - draws.mean((0, 1))
    scale = y.abs().amax((0, 1)).clamp(min=torch.finfo(y.dtype).tiny)
    return y / scale, scale


def _ess_of_quantile(draws: Tensor, prob: float) -> Tensor:
    ess = array_stats().ess(columns_of(draws), method="quantile", prob=prob)
    return event_of(ess, draws).masked_fill(_tells_nothing(draws, prob), torch.nan)


def _tells_nothing(draws: Tensor, prob: float) -> Tensor:
    """Where `x <= quantile` never varies, and ArviZ counts all draws; or some chain is constant."""
    flat = draws.flatten(0, 1).cpu().numpy()
    largest = np.quantile(flat, prob, axis=0) >= flat.max(0)
    return event_of(largest, draws).bool() | is_stuck(draws)


# ---------------------------------------------------------------- Monte Carlo standard errors


def mcse_mean(x: Tensor | Trace) -> Tensor:
    """Monte Carlo standard error of the mean of all draws: `s / sqrt(ESS)`.

    Args:
        x: draws, `(chains, draws, *event)`, or a `Trace`.

    Returns:
        `(*event)`, float64; NaN, with a warning, where a chain is constant.

    Raises:
        ValueError: NaN or infinite draws, or fewer than 4.

    Reference: Geyer (1992), *Practical Markov chain Monte Carlo*.

    >>> x = torch.randn(4, 2_500, generator=torch.Generator().manual_seed(0))
    >>> print(f"{mcse_mean(x):.3f}, independent draws: {x.std() / 100:.3f}")
    0.010, independent draws: 0.010
    """
    draws = checked_draws(x)
    warn(stuck_note(draws))
    y, scale = _scaled(draws)
    return scale * y.std((0, 1)) / _ess_of_mean(draws, y).sqrt()


def mcse_sd(x: Tensor | Trace) -> Tensor:
    """Monte Carlo standard error of the standard deviation of all draws.

    With `m_k` the k-th central moment, `sqrt((m_4 - m_2^2) / ESS) / (2 sqrt(m_2))`, where ESS is
    that of the squared deviations. (That of the draws themselves, which arviz-stats 0.8 takes,
    makes the error too small by far for antithetic chains: their squares are not antithetic.)

    Args:
        x: draws, `(chains, draws, *event)`, or a `Trace`.

    Returns:
        `(*event)`, float64; NaN, with a warning, where a chain is constant.

    Raises:
        ValueError: NaN or infinite draws, or fewer than 4.

    Reference: Kenney and Keeping (1951), *Mathematics of Statistics, Part Two*, p. 141.

    >>> x = torch.randn(4, 2_500, generator=torch.Generator().manual_seed(0))
    >>> print(f"{mcse_sd(x):.4f}, independent normal draws: {0.01 / 2**0.5:.4f}")
    0.0073, independent normal draws: 0.0071
    """
    draws = checked_draws(x)
    warn(stuck_note(draws))
    y, scale = _scaled(draws)
    square = y.square()
    variance = square.mean((0, 1))
    of_variance = (square.square().mean((0, 1)) - variance.square()) / _ess_of_mean(draws, square)
    return scale * of_variance.clamp(min=0.0).sqrt() / (2.0 * variance.sqrt())


def mcse_quantile(x: Tensor | Trace, prob: float) -> Tensor:
    """Monte Carlo standard error of a quantile of all draws.

    Half the distance of two quantiles of the draws: those whose levels bound the middle 68 % of the
    Beta law that `prob` has after as many independent draws as are effective.

    Args:
        x: draws, `(chains, draws, *event)`, or a `Trace`.
        prob: level of the quantile, between 0 and 1.

    Returns:
        `(*event)`, float64; NaN, with a warning, where a chain is constant; NaN where the quantile
        is the largest draw.

    Raises:
        ValueError: NaN or infinite draws, fewer than 4, or a level outside (0, 1).

    Reference: Vehtari and others (2021), as for `ess_bulk`.

    >>> x = torch.rand(4, 2_500, generator=torch.Generator().manual_seed(0))
    >>> print(f"{mcse_quantile(x, 0.5):.4f}, independent uniform draws: {0.5 / 100:.4f}")
    0.0045, independent uniform draws: 0.0050
    """
    check_real("prob", prob, minimum=0.0, maximum=1.0)
    draws = checked_draws(x)
    warn(stuck_note(draws))
    error = array_stats().mcse(columns_of(draws), method="quantile", prob=prob)
    return event_of(error, draws).masked_fill(_tells_nothing(draws, prob), torch.nan)


# ---------------------------------------------------------------- R-hat


def rhat(x: Tensor | Trace) -> Tensor:
    """R-hat of rank-normalised split chains: do the chains, and their halves, agree?

    `R-hat = sqrt((W (n - 1) / n + B / n) / W)` with W the mean variance within the half-chains, of
    n draws each, and `B / n` the variance between their means. It is computed from the draws'
    normal scores (which sees other locations, also without a mean), and from those of their
    distances to the median (which sees other scales); the larger one counts. It tends to 1 as
    the chains forget their starts; above 1.01 they have not. Start them far apart: chains that all
    miss the same mode agree perfectly.

    Of one chain only the halves can be compared: then it is their plain R-hat, with a warning.

    Args:
        x: draws, `(chains, draws, *event)`, or a `Trace`.

    Returns:
        `(*event)`, float64. Where every chain is constant, infinity if they differ, and NaN with a
        warning if they are all the same.

    Raises:
        ValueError: NaN or infinite draws, or fewer than 4.

    Reference: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), *Rank-normalization, folding,
    and localization: an improved R-hat for assessing convergence of MCMC*.

    >>> x = torch.randn(4, 1_000, generator=torch.Generator().manual_seed(0))
    >>> shifted = x + torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    >>> print(f"{rhat(x):.3f} {rhat(shifted):.3f}")
    1.000 1.098
    """
    draws = checked_draws(x)
    columns, method = columns_of(draws), "rank"
    if len(draws) == 1:
        warn(
            "one chain: R-hat compares its two halves only; run several chains from starts that "
            "lie far apart"
        )
        half = draws.shape[1] // 2
        columns, method = np.concatenate([columns[..., :half], columns[..., -half:]], 1), "identity"
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing varies within: set below
        value = event_of(array_stats().rhat(columns, method=method), draws)
    none_moved = is_constant(draws).all(0)
    same = none_moved & (draws.amax((0, 1)) == draws.amin((0, 1)))
    warn(stuck_note(draws) if same.any() else None)
    return value.masked_fill(none_moved, torch.inf).masked_fill(same, torch.nan)
