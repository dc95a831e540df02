"""Bridge sampling: the ratio of two partition functions from draws of both densities.

For any function alpha for which the two means are finite and not zero,

    Z_p / Z_q = E_q[alpha(x) p~(x)] / E_p[alpha(x) q~(x)],

so the ratio of two averages estimates it. The optimal alpha is `1 / (s_p p + s_q q)`, p and q
normalised and s their shares of the draws. It contains the ratio that is sought: the estimate
solves an equation, Bennett's acceptance ratio. The logarithm of a ratio of averages is biased, by
about half the difference of their squared relative errors; reversing p and q reverses its sign.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from companion.core import LogProb, LogZ
from companion.diagnostics import integrated_autocorrelation_time

__all__ = ["Bridge", "bar", "bridge_sampling"]

Bridge = Literal["optimal", "geometric", "reciprocal"]

_WORST = 0.1  # relative variance: as if ten draws told the ratio


@torch.no_grad()
def bridge_sampling(
    log_p: LogProb,
    x_p: Tensor,
    log_q: LogProb,
    x_q: Tensor,
    *,
    bridge: Bridge = "optimal",
    chains: bool = False,
) -> LogZ:
    """Estimate log Z_p - log Z_q from draws of both densities.

    The bridges, alpha above:

    - "optimal": `1 / (s_p p~ / Z_p + s_q q~ / Z_q)`, of all alpha the one of least variance for
      independent draws. It needs no more of the two than that they overlap.
    - "geometric": `1 / sqrt(p~ q~)`. It needs no equation solved, and its variance is finite
      whatever the tails.
    - "reciprocal": `1 / (p~ q~)` where both are positive. Its means are over the inverse of a
      density: on an unbounded space they do not exist. For comparison.

    If the draws of q, or q itself, were fitted to some draws of p, take other draws of p here: the
    same ones would look too much like q. The cost is one evaluation of both densities a draw.

    Args:
        log_p: unnormalised log-density, `(..., *event) -> (...)`; minus infinity is zero density.
        x_p: draws of p, `(n_p, *batch, *event)`, independent along the first dimension; `*batch`
            (the further dimensions of `log_p(x_p)`) are as many separate problems.
        log_q: the other one.
        x_q: draws of q, `(n_q, *batch, *event)`.
        bridge: one of the three names.
        chains: the draws are Markov chains, `(chains, draws, *batch, *event)` both (independent
            ones are one chain, `x[None]`); the standard error then counts their autocorrelation.

    Returns:
        A `LogZ` with entries `(*batch)`; see `bar`, whose fields and warnings are the same.

    Raises:
        ValueError: an unknown bridge, a log-density of the wrong shape, NaN, plus infinity, or a
            draw at which its own density is zero.

    Reference: Bennett (1976), *Efficient estimation of free energy differences from Monte Carlo
    data*; Meng and Wong (1996), *Simulating ratios of normalizing constants via a simple identity*;
    the standard error, Frühwirth-Schnatter (2004), *Estimating marginal likelihoods for mixture
    and Markov switching models using bridge sampling techniques*.

    >>> g = torch.Generator().manual_seed(0)
    >>> x_p, x_q = 0.5 * torch.randn(2000, generator=g), torch.randn(2000, generator=g)
    >>> log_z = bridge_sampling(lambda x: -2.0 * x**2, x_p, lambda x: -0.5 * x**2, x_q)
    >>> print(f"{log_z.value:.3f} +/- {log_z.std_error:.3f}")             # log(1/2) = -0.693
    -0.676 +/- 0.013
    """
    if bridge not in get_args(Bridge):
        raise ValueError(f"bridge must be one of {', '.join(get_args(Bridge))}; got {bridge!r}")
    p_at_p, p_at_q = (_densities("log_p", log_p, x, chains) for x in (x_p, x_q))
    q_at_p, q_at_q = (_densities("log_q", log_q, x, chains) for x in (x_p, x_q))
    for name, own in ("p", p_at_p), ("q", q_at_q):
        outside = own == -math.inf
        if outside.any():
            raise ValueError(
                f"{int(outside.sum())} of {own.numel()} draws x_{name} have density zero under "
                f"log_{name}, the first at index {tuple(outside.nonzero()[0].tolist())}: are they "
                "draws of it?"
            )
    forward, reverse = p_at_q - q_at_q, q_at_p - p_at_p
    terms = None
    if bridge == "geometric":
        terms = 0.5 * forward, 0.5 * reverse
    elif bridge == "reciprocal":
        terms = (
            torch.where(p_at_q > -math.inf, -q_at_q, -math.inf),
            torch.where(q_at_p > -math.inf, -p_at_p, -math.inf),
        )
    return _estimate(forward, reverse, terms, (len(x_q), len(x_p)) if chains else None)


@torch.no_grad()
def bar(log_w_forward: Tensor, log_w_reverse: Tensor, *, chains: bool = False) -> LogZ:
    """Bennett's acceptance ratio: log Z_1 - log Z_0 from log weights of both directions.

    It solves, for `c = log Z_1 - log Z_0`, with log weights u_i of draws from 0 and v_j of draws
    from 1, and `m = log(n_1 / n_0)`,

        sum_i sigmoid(u_i + m - c) = sum_j sigmoid(c - m - v_j).

    This is the optimal bridge. It needs the weights alone, so it takes those of `ais` and
    `reverse_ais` as well, as they are: their paths satisfy the same relation as points do. Of work
    W done from 0 to 1 the log weights are -W, and c is minus the difference in free energy.

    Args:
        log_w_forward: `log w = log p~_1(x) - log p~_0(x)` at n_0 draws from density 0, or along
            paths from there, `(n_0, *batch)`: w averages to `Z_1 / Z_0`.
        log_w_reverse: the same log w, with the same sign, at n_1 draws from density 1, or along
            paths from there, `(n_1, *batch)`: 1 / w averages to `Z_0 / Z_1`.
        chains: the weights are those of Markov chains, `(chains, draws, *batch)`; the standard
            error then counts autocorrelation.

    Returns:
        A `LogZ` with entries `(*batch)`. `ess` is the effective number of draws of one side that
        lie where the other has mass: at best, where the densities are the same, n_0 n_1 / (n_0 +
        n_1). A warning tells when the standard error exceeds a third (then nothing is known), and
        the overlap of the two densities, `int p q / (s_p p + s_q q)`, from 0 to 1 (they are the
        same). Where no draw of one side has positive density under the other, or where the terms
        of one chain are constant and not those of all, the standard error is infinite and
        `converged` false.

    Raises:
        ValueError: log weights that are NaN, plus infinity forward or minus infinity in reverse
            (a draw where its own density is zero), or fewer than two of a direction.

    Reference: Bennett (1976), *Efficient estimation of free energy differences from Monte Carlo
    data*; Shirts, Bair, Hooker and Pande (2003), *Equilibrium free energies from nonequilibrium
    measurements using maximum-likelihood methods*.

    >>> g = torch.Generator().manual_seed(0)
    >>> x_0, x_1 = torch.randn(2000, generator=g), 0.5 * torch.randn(2000, generator=g)
    >>> log_z = bar(-1.5 * x_0**2, -1.5 * x_1**2)
    >>> print(f"{log_z.value:.3f} +/- {log_z.std_error:.3f}")             # log(1/2) = -0.693
    -0.682 +/- 0.014
    """
    forward = _checked("log_w_forward", log_w_forward, chains)
    reverse = _checked("-log_w_reverse", -log_w_reverse, chains)
    if forward.shape[1:] != reverse.shape[1:]:
        raise ValueError(
            "the log weights of both directions must agree in all dimensions but those of the "
            f"draws, got {tuple(log_w_forward.shape)} and {tuple(log_w_reverse.shape)}"
        )
    num_chains = (len(log_w_forward), len(log_w_reverse)) if chains else None
    return _estimate(forward, reverse, None, num_chains)


# ---------------------------------------------------------------- inside


def solve(forward: Tensor, reverse: Tensor) -> tuple[Tensor, Tensor]:
    """Bennett's equation of log weights `(n_0, *batch)` and `(n_1, *batch)`: its root c, and
    whether it was found, `(*batch)`.

    As an equality of logarithms it stays well-conditioned where the densities hardly overlap. One
    side descends in c and the other ascends: bisection mends what Newton's steps spoil. Where all
    weights of a direction are zero the root is infinite, or NaN if those of both are.
    """
    ends = forward.logsumexp(0), reverse.logsumexp(0)
    solvable = (ends[0] > -math.inf) & (ends[1] > -math.inf)
    never = ends[0] - ends[1]
    forward, reverse = (torch.where(solvable, log_w, 0.0) for log_w in (forward, reverse))
    m = math.log(len(reverse) / len(forward))
    room = math.log(len(forward) + len(reverse)) + 1.0
    centres = torch.cat([forward + m, m - reverse])
    low = centres.nan_to_num(neginf=math.inf, posinf=math.inf).amin(0) - room
    high = centres.nan_to_num(neginf=-math.inf, posinf=-math.inf).amax(0) + room
    c = torch.where(solvable, 0.5 * never, 0.0)
    moved = torch.full_like(c, math.inf)
    for _ in range(200):
        terms = bennett_terms(forward, reverse, c)
        sums = [t.logsumexp(0) for t in terms]
        gap, slope = sums[0] - sums[1], torch.full_like(c, 2.0)  # minus the derivative of the gap
        for t, total in zip(terms, sums, strict=True):
            slope = slope - total.exp() * (t - total).exp().square().sum(0)
        low, high = torch.where(gap > 0.0, c, low), torch.where(gap < 0.0, c, high)
        step = gap / slope
        small = 1e-13 * (1.0 + c.abs())
        good = (c + step > low) & (c + step < high) & (step.abs() <= 0.5 * moved)
        good = good | (step.abs() <= small)
        new = torch.where(good, c + step, 0.5 * (low + high))
        moved, c = (new - c).abs(), new
        if (moved <= small).all():
            break
    return torch.where(solvable, c, never), solvable & (moved <= small)


def bennett_terms(forward: Tensor, reverse: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of both sides' terms in Bennett's equation."""
    m = math.log(len(reverse) / len(forward))
    return logsigmoid(forward + m - c), logsigmoid(reverse - m + c)


def _estimate(
    forward: Tensor,
    reverse: Tensor,
    terms: tuple[Tensor, Tensor] | None,
    num_chains: tuple[int, int] | None,
) -> LogZ:
    """log mean a - log mean b, of the logarithms of the terms (n, *batch); None is Bennett's."""
    if terms is None:
        value, found = solve(forward, reverse)
        terms = bennett = bennett_terms(forward, reverse, value)
    else:
        means = [t.logsumexp(0) - math.log(len(t)) for t in terms]
        value = means[0] - means[1]
        found, bennett = value.isfinite(), bennett_terms(forward, reverse, value)
    shared = torch.minimum(*(t.exp().sum(0) for t in bennett))
    variance, ess = torch.zeros_like(value), torch.full_like(value, math.inf)
    for side, t in enumerate(terms):
        n, share = len(t), t.softmax(0).nan_to_num(0.0)  # NaN where no term of a problem is left
        tau: Tensor | float = 1.0
        if num_chains is not None:
            tau = _time(share.reshape(num_chains[side], -1, *share.shape[1:]))
        variance = variance + tau * (share - 1.0 / n).square().sum(0) * n / (n - 1)
        ess = torch.minimum(ess, torch.minimum(1.0 / share.square().sum(0), shared) / tau)
    harmonic = sum(1.0 / len(t) for t in terms)
    if terms is bennett:
        # Terms of a tail that neither side has reached are missing in their spread but not in their
        # sum; where the densities overlap, this is the optimal bridge's variance, too.
        variance = torch.maximum(variance, 1.0 / shared - harmonic)
    known = value.isfinite() & (shared > 0.0) & (variance < math.inf)
    ess = torch.where(known, ess, 0.0)
    poor = ~(variance <= _WORST) | ~known
    if poor.any():
        warnings.warn(
            f"the two densities hardly overlap in {int(poor.sum())} of {poor.numel()} "
            f"problems: effectively {float(ess.min()):.1f} draws of one lie where the other has "
            f"mass, and the overlap is {float((shared * harmonic).nan_to_num(0.0).min()):.2g} (1 "
            "if they are the same). The estimate and its standard error may be far off: bring them "
            "closer, or put densities between them",
            stacklevel=4,  # this frame, that of the public function and that of no_grad
        )
    std_error = torch.where(known, variance.sqrt(), math.inf)
    return LogZ(value, std_error, ess=ess, converged=bool((found & known).all()))


def _time(share: Tensor) -> Tensor:
    """The autocorrelation time of shares `(chains, draws, *batch)`, each problem's own.

    1 where all shares are equal: they vary neither in a chain nor between the chains. Infinity
    where one chain is constant and another is not: nothing tells for how long it would stay.
    """
    constant = (share == share[:, :1]).all(1)
    moving = ~constant.any(0)
    if moving.all():
        return integrated_autocorrelation_time(share)
    equal = constant.all(0) & (share[:, 0] == share[0, 0]).all(0)
    tau = torch.where(equal, 1.0, math.inf).to(share)
    if moving.any():
        tau[moving] = integrated_autocorrelation_time(share[:, :, moving])
    return tau


def _densities(name: str, log_prob: LogProb, x: Tensor, chains: bool) -> Tensor:
    """The log-density at draws in float64, its draws along one dimension, checked."""
    value = log_prob(x)
    if value.ndim > x.ndim or value.shape != x.shape[: value.ndim] or value.ndim < 1 + chains:
        raise ValueError(
            f"{name} of draws of shape {tuple(x.shape)} has shape {tuple(value.shape)}; it must "
            f"have their leading dimensions, from {'(chains, draws)' if chains else '(draws,)'} on"
        )
    return _checked(name, value, chains)


def _checked(name: str, value: Tensor, chains: bool) -> Tensor:
    """Logarithms in float64, `(n, *batch)`, or a sentence."""
    value = value.detach().double()
    if value.ndim < 1 + chains or value.shape[: 1 + chains].numel() < 2:
        raise ValueError(f"{name} needs at least 2 draws, got shape {tuple(value.shape)}")
    wrong = value.isnan() | (value == math.inf)
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} of {wrong.numel()} values of {name} are NaN or plus infinity, the "
            f"first at index {tuple(wrong.nonzero()[0].tolist())}"
        )
    return value.flatten(0, 1) if chains else value
