"""Simulated tempering: beta is part of the state, and goes up and down at random.

The moves leave a joint law of point and beta invariant, and the points that a chain visits at
beta = 1 follow the target. A chain that has been stuck in one mode comes back from a small beta in
another. The levels' weights, which make it come back, are learned.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from companion.core import AnnealingPath, LogZ, Trace
from companion.inputs import check_count, check_finite
from companion.mcmc.base import expand
from companion.monte_carlo import Estimate
from companion.tempering.routes import advance, profile, start
from companion.tempering.schedules import check_betas

__all__ = ["SimulatedTempering", "level_step", "simulated_tempering"]


@dataclass(frozen=True, eq=False)
class SimulatedTempering:
    """What `simulated_tempering` found; all but the weights is of the iterations after the warm-up.

    Attributes:
        trace: all draws, at whatever level they were made. Its `log_prob` is the log-density at
            beta = 1; its `stats` are `level`, integers from 0 to K - 1, and `level_prob`, the
            probability of level K - 1 given the point; its `accept_prob` is the share of iterations
            that changed the level; its `num_nan` counts those with a NaN among the log-densities.
        betas: the levels, `(K,)`, float64.
        log_weights: w, the log weights of the levels, `(K,)`, float64, the first one 0.
        occupancy: share of the time at each level, `(K,)`, float64: the mean of the probabilities
            of the levels given the points. With `w_k = -log Z_k` all are 1 / K.
        log_z: log Z at beta = 1, a `LogZ`: the absolute one if the levels begin at 0, where Z is
            known, else relative to Z at the first of them. `converged` says whether any chain has
            made a round trip.
        round_trips: completed trips from level 0 to level K - 1 and back, `(chains,)`, integers.
    """

    trace: Trace
    betas: Tensor
    log_weights: Tensor
    occupancy: Tensor
    log_z: LogZ
    round_trips: Tensor

    @property
    def x(self) -> Tensor:
        """The points, `(chains, draws, *event)`."""
        return self.trace.x

    @property
    def level(self) -> Tensor:
        """The level of each, `(chains, draws)`, integers; `betas[level]` is its beta."""
        return self.trace.stats["level"]

    @property
    def level_prob(self) -> Tensor:
        """The probability of beta = 1 given each point, `(chains, draws)`, float64."""
        return self.trace.stats["level_prob"]

    def target_draws(self) -> Tensor:
        """The draws at beta = 1, of all chains one after the other, `(n, *event)`."""
        return self.x[self.level == len(self.betas) - 1]

    @torch.no_grad()
    def expectation(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimate `E[f(X)]` under the target from the draws of all levels.

        `sum_t u_t f(x_t) / sum_t u_t`, where u is `level_prob`. In the mean over the draws at
        beta = 1 a draw counts 1 or 0; here it counts with the probability of that (Rao-Blackwell),
        which as a rule varies less. The standard error is from the spread between the chains, by
        the delta method: give it ten or more. It is NaN for one chain.

        Args:
            f: the integrand, `(chains, draws, *event) -> (chains, draws, *shape)`. Its values at
                draws of weight zero are not used.

        Returns:
            An `Estimate` of shape `(*shape)`, whose samples are the chains.

        Raises:
            ValueError: f gives another shape, or NaN or infinity where the weight is positive.
        """
        y, weights = f(self.x), self.level_prob
        if not isinstance(y, Tensor) or y.shape[:2] != weights.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                "f must give one or several numbers a draw: expected a tensor of shape "
                f"({weights.shape[0]}, {weights.shape[1]}, ...), got {got}"
            )
        weights = expand(weights, y)
        y = check_finite("f(x) at draws of positive weight", y.double().where(weights > 0.0, 0.0))
        total = weights.sum(1).mean(0)
        value = (weights * y).sum(1).mean(0) / total
        influence = (weights * (y - value)).sum(1) / total
        return Estimate(value, _std_error(influence), len(y))


@torch.no_grad()
def simulated_tempering(
    path: AnnealingPath,
    betas: Tensor | Sequence[float],
    num_draws: int,
    *,
    warmup: int,
    num_chains: int = 1,
    thin: int = 1,
    log_weights: Tensor | Sequence[float] | None = None,
    x0: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SimulatedTempering:
    """Sample the target by chains that wander up and down a ladder of betas.

    The state is a point and a level, and their joint law

        p(x, k) is proportional to exp(w_k) p~_k(x),      k = 0, ..., K - 1.

    Given k, x follows the density at beta_k; level k has a share of the time in proportion to
    `exp(w_k) Z_k`. An iteration makes one `path.step` at each chain's own beta (at beta = 0 an
    exact, independent draw of the base instead), and then draws the level from its law given x,

        P(k | x) = exp(w_k) p~_k(x) / sum_j exp(w_j) p~_j(x),

    over all levels at once. Chains are independent but for what they learn together.

    All levels have equal shares if `w_k = -log Z_k`, which nobody knows. The warm-up learns it. A
    run that rises from the base gives a first guess; stochastic approximation corrects it: in
    iteration t, w_k is lowered by `g_t` times the mean of `P(k | x)` over the chains, with
    `g_t = min(1, K / t^0.8)` in the first half, up to t_0, and
    `g_t = min(1, K / (t - t_0 + t_0^0.8))` in the second. Then w is frozen, for a chain that adapts
    has no invariant law: no draw of the warm-up is kept.

    As shares tell of Z, `log Z_{K-1} / Z_0 = log(share_{K-1} / share_0) - w_{K-1} + w_0`, whatever
    the weights: their error is corrected. The standard error comes from the spread between the
    chains, by the delta method: give it ten or more chains. It is NaN for one chain. It knows
    nothing of modes that no chain has found.

    An iteration costs a `path.step`, a draw of the base if the levels begin at 0, and one
    evaluation of the path's densities (K for a path without `profile`); the first guess K of each.

    Args:
        path: any `AnnealingPath`.
        betas: the levels, K >= 2, ascending to 1 from 0 or from above.
        num_draws: draws kept of each chain, at all levels together.
        warmup: iterations made and thrown away first.
        num_chains: number of chains.
        thin: iterations a kept draw; `num_draws * thin` iterations follow the warm-up.
        log_weights: w, `(K,)`, kept as they are; None learns them.
        x0: where to start, `(chains, *event)`, by default at draws of the base. The first level is
            drawn from its law given the start.
        generator: source of randomness, on the path's device.
        progress: show a progress bar.

    Returns:
        A `SimulatedTempering`.

    Raises:
        ValueError: a count out of range, betas that do not ascend to 1, weights or an `x0` of
            another shape or not finite, a generator on another device, chains that are where no
            level has a positive density after the warm-up, or, without `log_weights`, a draw of the
            base where the log-density is NaN.
        TypeError: a path that is none, an `x0` of another dtype than the base's draws.

    Warns:
        UserWarning: log-densities that were NaN. Such a level is not gone to.

    Reference: Marinari and Parisi (1992), *Simulated tempering: a new Monte Carlo scheme*; Geyer
    and Thompson (1995), *Annealing Markov chain Monte Carlo with applications to ancestral
    inference*; Liang, Liu and Carroll (2007), *Stochastic approximation in Monte Carlo
    computation*; for the gains, Tan (2017), *Optimally adjusted mixture sampling and locally
    weighted histogram analysis*.

    >>> from companion.mcmc import random_walk
    >>> from companion.tempering import GeometricPath
    >>> def log_prob(x):                                    # two peaks, one at 0 and one at 10
    ...     return torch.logaddexp(-0.5 * x.square(), -0.5 * (x - 10.0).square())
    >>> base = torch.distributions.Normal(5.0, 6.0)
    >>> path = GeometricPath(base, log_prob, lambda density: random_walk(density, 3.0))
    >>> g = torch.Generator().manual_seed(0)
    >>> run = simulated_tempering(
    ...     path, [0, 0.05, 0.2, 0.6, 1], 200, num_chains=100, warmup=100, generator=g)
    >>> share = run.expectation(lambda x: x > 5)
    >>> print(f"{share.value:.2f} +/- {share.std_error:.2f}")
    0.50 +/- 0.01
    >>> print(f"{run.log_z.value:.2f} +/- {run.log_z.std_error:.2f}")  # log(2 sqrt(2 pi)) is 1.61
    1.60 +/- 0.02
    """
    from tqdm import tqdm

    check_count("num_draws", num_draws)
    check_count("warmup", warmup, minimum=0)
    check_count("num_chains", num_chains)
    check_count("thin", thin)
    rungs = check_betas(betas, torch.device("cpu")).tolist()
    num_levels = len(rungs)
    if num_levels < 2:
        raise ValueError("betas must have at least two levels to wander between, got 1")
    x = start(path, (num_chains,), x0, generator)
    like: dict[str, Any] = {"dtype": torch.float64, "device": x.device}
    learns = log_weights is None
    if log_weights is None:
        w = _first_guess(path, rungs, num_chains, generator)
    else:
        w = check_finite("log_weights", torch.as_tensor(log_weights, **like)).detach()
        if w.shape != (num_levels,):
            raise ValueError(f"log_weights must be ({num_levels},), got {tuple(w.shape)}")
    levels = torch.tensor(rungs, **like)

    noise = torch.rand(num_chains, generator=generator, **like)
    level, _ = level_step(profile(path, x)(levels[:, None]), w, noise)
    # How often each chain has reached the end that it was bound for, beginning with level 0.
    ends, num_moved, num_nan = level.new_zeros(3, num_chains)
    shares = torch.zeros(num_levels, num_chains, **like)
    draws = x.new_empty(num_draws, *x.shape)
    at_level = level.new_empty(num_draws, num_chains)
    log_prob, level_prob = torch.empty(2, num_draws, num_chains, **like)

    num_steps = num_draws * thin
    for i in tqdm(range(-warmup, num_steps), disable=not progress):
        x = path.step(x, levels[level], generator=generator)
        if rungs[0] == 0.0:
            base = path.sample_base(num_chains, generator=generator)
            x = torch.where(expand(level == 0, x), base, x)
        density = profile(path, x)(levels[:, None])
        before = level
        noise = torch.rand(num_chains, generator=generator, **like)
        level, prob = level_step(density, w, noise)
        if i == 0:
            _check_alive(density)
            ends -= 2 * _round_trips(ends)  # those of the warm-up do not count
        ends += level == (ends % 2) * (num_levels - 1)
        if i < 0:
            if learns:
                w = w - _gain(i + warmup + 1, warmup // 2, num_levels) * prob.mean(1)
            continue
        shares += prob
        num_moved += level != before
        num_nan += density.isnan().any(0)
        draw, remainder = divmod(i, thin)
        if remainder == thin - 1:
            draws[draw], at_level[draw] = x, level
            log_prob[draw], level_prob[draw] = density[-1], prob[-1]

    if num_nan.any():
        warnings.warn(
            f"at {int(num_nan.sum())} points a log-density was NaN; their chains did not go to "
            f"those levels (in {int((num_nan > 0).sum())} of {num_chains} chains)",
            stacklevel=3,  # seen from the caller of the decorated function
        )
    trace = Trace(
        x=draws.movedim(0, 1),
        log_prob=log_prob.T.to(x.dtype if x.is_floating_point() else torch.float64),
        accept_prob=num_moved.double() / num_steps,
        num_nan=num_nan,
        num_divergent=torch.zeros_like(num_nan),
        stats={"level": at_level.T, "level_prob": level_prob.T},
    )
    w = w - w[0]
    round_trips = _round_trips(ends)
    mean = shares.mean(1)
    relative = shares[[0, -1]] / mean[[0, -1], None]
    log_z = LogZ(
        (mean[-1] / mean[0]).log() - w[-1] + (path.base_log_z if rungs[0] == 0.0 else 0.0),
        _std_error(relative[1] - relative[0]),
        converged=bool(round_trips.any()),
    )
    return SimulatedTempering(trace, levels, w, mean / num_steps, log_z, round_trips)


def level_step(density: Tensor, log_weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the level given the point, a pure function of the log-densities and the noise.

    Args:
        density: log-density of the point at each level, `(K, *chains)`, float64; a NaN counts as
            density zero.
        log_weights: w, `(K,)`, float64.
        uniform: uniform on [0, 1), `(*chains)`, float64.

    Returns:
        The level, `(*chains)`, integers, and the probability of each level given the point,
        `(K, *chains)`, all equal where no level has a positive density.

    >>> density = torch.tensor([[0.5], [0.25], [0.125]], dtype=torch.float64).log()
    >>> w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).log()
    >>> level_step(density, w, torch.tensor([0.5], dtype=torch.float64))
    (tensor([1]), tensor([[0.3333], [0.3333], [0.3333]], dtype=torch.float64))
    """
    none = -1e300  # finite: a softmax of nothing but minus infinities is NaN
    logits = (density + expand(log_weights, density)).nan_to_num(none, posinf=none, neginf=none)
    prob = logits.softmax(0)
    up_to = prob.cumsum(0)
    # The last sum may have rounded to less than 1; divided by itself it is 1, and no level K drawn.
    return (uniform >= up_to / up_to[-1]).sum(0), prob


def _gain(t: int, half: int, num_levels: int) -> float:
    """How far the weights move in iteration t of the warm-up, from 1."""
    slow: float = t**0.8 if t <= half else t - half + half**0.8
    return min(1.0, num_levels / slow)


def _first_guess(
    path: AnnealingPath, betas: list[float], num_chains: int, generator: torch.Generator | None
) -> Tensor:
    """Minus log Z of each level by stepping stones, from chains that rise from the base once."""
    x = path.sample_base(num_chains, generator=generator)
    if betas[0] > 0.0:
        x = path.step(x, betas[0], generator=generator)
    w = [torch.zeros((), dtype=torch.float64, device=x.device)]
    for beta, next_beta in pairwise(betas):
        x, increment = advance(path, x, beta, next_beta, generator=generator)
        ratio = increment.logsumexp(0) - math.log(num_chains)
        w.append(w[-1] - ratio.nan_to_num(0.0, posinf=0.0, neginf=0.0))
    return torch.stack(w)


def _round_trips(ends: Tensor) -> Tensor:
    """The first end reached begins a trip; every two more complete one."""
    return (ends - 1).clamp(min=0) // 2


def _check_alive(density: Tensor) -> None:
    dead = ~density.isfinite().any(0)
    if dead.any():
        raise ValueError(
            f"{int(dead.sum())} of {dead.numel()} chains are at points where no level has a finite "
            f"log-density, first chain {int(dead.nonzero()[0])}; start elsewhere (x0) or warm up "
            "for longer"
        )


def _std_error(influence: Tensor) -> Tensor:
    """Of a mean over independent chains, the first dimension; NaN for a single one."""
    n = len(influence)
    return influence.std(0) / math.sqrt(n) if n > 1 else torch.full_like(influence[0], torch.nan)
