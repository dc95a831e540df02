"""Parallel tempering (replica exchange): one chain at every beta, and neighbours swap their points.

The replicas at betas `b_0 < ... < b_{R-1} = 1` move each by its own kernel, and between the moves
the points at two neighbouring betas change places with the probability

    min(1, p~_i(x_j) p~_j(x_i) / (p~_i(x_i) p~_j(x_j))),        j = i + 1,

which leaves the product of all R densities invariant. What crosses from mode to mode at a small
beta arrives at beta = 1 by swaps, without error: nothing is reweighted.

How well a ladder works is not told by its swap probabilities alone but by how often a replica goes
from the base to the target and back. With rejection probabilities `r_i`, and replicas that forget
their points from swap to swap, the replicas together make

    1 / (2 + 2 sum_i r_i / (1 - r_i))              round trips an iteration ("even_odd"), or
    1 / (2 (R - 1) + 2 sum_i r_i / (1 - r_i))                               ("random"):

with the pairs chosen by lot a replica diffuses, and more rungs only slow it down; with even and odd
pairs in turn it keeps going in one direction until a swap is rejected.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from companion.core import AnnealingPath, LogZ, Trace
from companion.inputs import check_count
from companion.mcmc.base import MoveInfo, expand, metropolis_accept
from companion.tempering.routes import profile, start
from companion.tempering.schedules import check_betas

__all__ = ["ParallelTempering", "move", "parallel_tempering", "stones", "swap_step", "to_next"]

Swaps = Literal["even_odd", "random"]


@dataclass(frozen=True, eq=False)
class ParallelTempering:
    """What `parallel_tempering` found; everything but `x` is of the iterations after the warm-up.

    Attributes:
        trace: the draws at beta = 1. Its `accept_prob` is the share of the iterations in which the
            point there changed, by a move or a swap; its `num_nan` counts the swaps, of all pairs
            as below, whose log-densities were NaN.
        betas: the ladder, `(R,)`, float64.
        swap_prob: mean probability of a swap between rungs i and i + 1, `(R - 1,)`, float64: the
            average over all chains and iterations, also those in which it was not this pair's turn.
        replica: which replica is at each rung when a draw is kept, `(chains, draws, R)`, integers
            from 0 (it began at the first rung) to R - 1. `replica.argsort(-1)` is the inverse: at
            which rung each replica is, to plot how they wander.
        round_trips: completed trips of all replicas from the first rung to the last and back,
            `(chains,)`, integers.
        round_trip_rate: these an iteration, `(chains,)`, float64.
        log_z: log Z of the target by stepping stones, a `LogZ` without log weights; None if the
            ladder does not begin at 0, where Z is known. Where no point of a rung has density at
            the next, it is minus infinity, its error infinite and `converged` false.
        x: where the replicas stood at the end, `(R, chains, *event)`: `x0` of a run that goes on.
    """

    trace: Trace
    betas: Tensor
    swap_prob: Tensor
    replica: Tensor
    round_trips: Tensor
    round_trip_rate: Tensor
    log_z: LogZ | None
    x: Tensor


@torch.no_grad()
def parallel_tempering(
    path: AnnealingPath,
    betas: Tensor | Sequence[float],
    num_draws: int,
    *,
    num_chains: int = 1,
    warmup: int = 0,
    thin: int = 1,
    swaps: Swaps = "even_odd",
    x0: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    callback: Callable[[int, Tensor], object] | None = None,
) -> ParallelTempering:
    """Sample the target by replicas at all betas of a ladder, which swap their points.

    An iteration makes one `path.step` of every replica (at beta = 0 an exact, independent draw of
    the base instead), and then proposes swaps between neighbouring rungs: of all even pairs or of
    all odd pairs, which do not touch one another. "even_odd" takes them in turn, so that the chain
    is not reversible; "random" tosses a coin, each chain its own. Chains are independent copies of
    the whole ladder, and one batch: `num_chains` times R points.

    As a by-product, `log Z_1 - log Z_0 = sum_i log E_i[p~_{i+1}(x) / p~_i(x)]` (stepping stones):
    each mean is over all chains and iterations. It is too low by about half its variance, and its
    standard error comes from the spread between the chains: give it ten or more. It is NaN for one
    chain, where nothing shows how much successive draws have in common.

    An iteration costs a `path.step` of R replicas, one less if the ladder begins at 0, and R
    evaluations of the path's densities for the swaps (three times R for a path without `profile`).

    Args:
        path: any `AnnealingPath`.
        betas: the ladder, at least two, ascending to 1 from 0 or from above (see `tune_ladder`).
        num_draws: draws kept of each chain.
        num_chains: number of chains.
        warmup: iterations made and thrown away first.
        thin: iterations a kept draw; `num_draws * thin` iterations follow the warm-up.
        swaps: which pairs to propose, "even_odd" or "random".
        x0: where to start, `(chains, *event)` for all replicas of a chain at one point, or
            `(R, chains, *event)`; by default every replica starts at a draw of its own of the base.
        generator: source of randomness, on the path's device.
        progress: show a progress bar.
        callback: `callback(i, x)` is called with the points of all rungs, `(R, chains, *event)`,
            when draw i (from 0) is kept. What it returns is ignored.

    Returns:
        A `ParallelTempering`; `trace.x` has shape `(chains, draws, *event)`.

    Raises:
        ValueError: a count out of range, betas that do not ascend to 1, an unknown `swaps`, an `x0`
            of another shape or with NaN, a generator on another device, a start (by default a draw
            of the base) where the log-density is NaN.
        TypeError: a path that is none, an `x0` of another dtype than the base's draws.

    Warns:
        UserWarning: swaps whose log-densities were NaN, which are rejected; points that had density
            zero at their own beta after the warm-up.

    Reference: Geyer (1991), *Markov chain Monte Carlo maximum likelihood*; Okabe, Kawata, Okamoto
    and Mikami (2001), *Replica-exchange Monte Carlo method for the isobaric-isothermal ensemble*,
    for even and odd pairs in turn; Syed, Bouchard-Côté, Deligiannidis and Doucet (2022),
    *Non-reversible parallel tempering: a scalable highly parallel MCMC scheme*.

    >>> from companion.mcmc import random_walk
    >>> from companion.tempering import GeometricPath
    >>> def log_prob(x):                                    # two peaks, one at 0 and one at 10
    ...     return torch.logaddexp(-0.5 * x.square(), -0.5 * (x - 10.0).square())
    >>> base = torch.distributions.Normal(5.0, 6.0)
    >>> path = GeometricPath(base, log_prob, lambda density: random_walk(density, 3.0))
    >>> g = torch.Generator().manual_seed(2)
    >>> run = parallel_tempering(
    ...     path, [0, 0.05, 0.2, 0.6, 1], 200, num_chains=100, warmup=100, generator=g)
    >>> print(f"{(run.trace.x > 5).double().mean():.2f}")
    0.50
    >>> print(f"{run.log_z.value:.2f} +/- {run.log_z.std_error:.2f}")  # log(2 sqrt(2 pi)) is 1.61
    1.60 +/- 0.01
    """
    from tqdm import tqdm

    check_count("num_draws", num_draws)
    check_count("num_chains", num_chains)
    check_count("warmup", warmup, minimum=0)
    check_count("thin", thin)
    if swaps not in get_args(Swaps):
        raise ValueError(f"swaps must be one of {', '.join(get_args(Swaps))}; got {swaps!r}")
    betas = check_betas(betas, torch.device("cpu"))
    num_rungs = len(betas)
    if num_rungs < 2:
        raise ValueError("betas must have at least two rungs to swap between, got 1")
    from_base = float(betas[0]) == 0.0
    x = start(path, (num_rungs, num_chains), x0, generator)
    betas = betas.to(x.device)
    rows = betas[:, None]
    # Of each rung the one below, itself and the one above (at the ends itself once more).
    nearby = torch.stack([torch.cat([rows[:1], rows[:-1]]), rows, torch.cat([rows[1:], rows[-1:]])])
    parity = torch.arange(num_rungs - 1, device=x.device)[:, None] % 2  # of each pair

    replica = torch.arange(num_rungs, device=x.device)[:, None].repeat(1, num_chains)
    # Each replica's trip: 0 before it has been at the base, 1 from there on, 2 from the target on.
    trip = torch.zeros_like(replica)
    trip[0] = 1
    like: dict[str, Any] = {"dtype": torch.float64, "device": x.device}
    swap_prob = torch.zeros(num_rungs - 1, num_chains, **like)
    log_ratio = torch.full_like(swap_prob, -torch.inf)
    round_trips, num_moved, num_nan, num_outside = replica.new_zeros(4, num_chains)
    draws = x.new_empty(num_draws, *x.shape[1:])
    log_prob = torch.empty(num_draws, num_chains, **like)
    replicas = replica.new_empty(num_draws, num_chains, num_rungs)

    num_steps = num_draws * thin
    for i in tqdm(range(-warmup, num_steps), disable=not progress):
        last = x[-1]
        x = move(path, x, rows, from_base, generator)
        levels = profile(path, x)(nearby)
        turn: Tensor | int = i % 2
        if swaps == "random":
            turn = torch.randint(2, (num_chains,), device=x.device, generator=generator)
        noise = torch.rand(swap_prob.shape, generator=generator, **like)
        order, info = swap_step(levels, parity == turn, noise)
        x = x.gather(0, expand(order, x).expand_as(x))
        replica, trip = replica.gather(0, order), trip.gather(0, order)
        returned = trip[0] == 2
        trip[0] = 1
        trip[-1] = 2 * trip[-1].sign()
        if i < 0:
            continue
        round_trips += returned
        num_moved += (x[-1] != last).reshape(num_chains, -1).any(1)
        num_nan += info.is_nan.sum(0)
        num_outside += (levels[1] == -torch.inf).sum(0)
        swap_prob += info.accept_prob
        log_ratio = torch.logaddexp(log_ratio, to_next(levels[1], levels[2]))
        draw, remainder = divmod(i, thin)
        if remainder == thin - 1:
            draws[draw], replicas[draw] = x[-1], replica.T
            # The point at the top is its own, or came from below with its density for the top.
            log_prob[draw] = torch.where(order[-1] == num_rungs - 1, levels[1, -1], levels[2, -2])
            if callback is not None:
                callback(draw, x)

    if num_nan.any():
        warnings.warn(
            f"{int(num_nan.sum())} swaps met a NaN log-density and were rejected "
            f"(in {int((num_nan > 0).sum())} of {num_chains} chains)",
            stacklevel=3,  # seen from the caller of the decorated function
        )
    if num_outside.any():
        warnings.warn(
            f"{int(num_outside.sum())} points had density zero at their own beta after the warm-up;"
            " they count as weight zero in log Z, and may be among the draws: warm up for longer",
            stacklevel=3,  # seen from the caller of the decorated function
        )
    trace = Trace(
        x=draws.movedim(0, 1),
        log_prob=log_prob.T.to(x.dtype if x.is_floating_point() else torch.float64),
        accept_prob=num_moved.double() / num_steps,
        num_nan=num_nan,
        num_divergent=torch.zeros_like(num_nan),
        stats={},
    )
    return ParallelTempering(
        trace,
        betas,
        swap_prob.mean(1) / num_steps,
        replicas.movedim(0, 1),
        round_trips,
        round_trips.double() / num_steps,
        stones(path, log_ratio - math.log(num_steps)) if from_base else None,
        x,
    )


def swap_step(levels: Tensor, active: Tensor, uniform: Tensor) -> tuple[Tensor, MoveInfo]:
    """Swap neighbours, a pure function of the log-densities and the noise.

    Args:
        levels: log-density of the point at each rung, for the rung below, its own and the rung
            above, `(3, R, *chains)`. The first row's below and the last row's above are not used.
        active: pairs (i, i + 1) that may swap, no two of which touch, boolean, broadcasts to
            `(R - 1, *chains)`.
        uniform: uniform on [0, 1), `(R - 1, *chains)`.

    Returns:
        Which rung's point comes to each rung, `(R, *chains)`, integers, for `gather` along the
        first dimension; and a `MoveInfo` of all pairs, each field `(R - 1, *chains)`: its
        `accept_prob` is that of every pair, `accepted` says which swapped.

    >>> levels = torch.tensor([[0.0, -2.0, -9.0], [0.0, 0.0, 0.0], [-1.0, -3.0, 0.0]])
    >>> order, info = swap_step(levels, torch.tensor([True, False]), torch.zeros(2))
    >>> order, info.accept_prob                                   # exp(-1 - 2) and exp(-3 - 9)
    (tensor([1, 0, 2]), tensor([4.9787e-02, 6.1442e-06]))
    """
    # A point of zero density at its own rung is no state of the product law: it may sink towards
    # the base, where points are drawn anew. The difference of two infinities would hold it fast.
    below, own, above = levels.clamp(min=0.25 * torch.finfo(levels.dtype).min)
    info = metropolis_accept(above[:-1] - own[:-1] + below[1:] - own[1:], uniform)
    accepted = info.accepted & active
    end = accepted.new_zeros((1, *accepted.shape[1:]), dtype=torch.long)
    shift = accepted.long().diff(dim=0, prepend=end, append=end)  # +1 from above, -1 from below
    rung = torch.arange(len(own), device=own.device)
    return expand(rung, shift) + shift, info._replace(accepted=accepted)


def move(
    path: AnnealingPath,
    x: Tensor,
    rows: Tensor,
    from_base: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Step the replicas `(R, chains, *event)` at their betas `(R, 1)`; `from_base` if the first
    beta is 0, where an exact draw replaces the step."""
    if not from_base:
        return path.step(x, rows, generator=generator)
    base = path.sample_base(x.shape[1], generator=generator)
    return torch.cat([base[None], path.step(x[1:], rows[1:], generator=generator)])


# ---------------------------------------------------------------- stepping stones


def to_next(own: Tensor, above: Tensor) -> Tensor:
    """Log importance weights of the points for the rung above, `(R - 1, ...)`, float64.

    A point without density at its own rung (a start outside of the support), or with a NaN, counts
    as one of weight zero.

    Args:
        own: log-density of the points at their own rung, `(R, ...)`.
        above: at the rung above, of the same shape; the last row is not used.
    """
    weights = above[:-1] - own[:-1]
    return torch.where(weights < torch.inf, weights, -torch.inf)


def stones(path: AnnealingPath, log_ratios: Tensor) -> LogZ:
    """Log Z by stepping stones from each chain's log mean weights, `(R - 1, chains)`.

    The delta method for a function of means over independent chains: a chain's influence is the sum
    over the rungs of its relative deviation, so that correlations between the rungs count.
    """
    num_chains = log_ratios.shape[1]
    log_ratio = log_ratios.logsumexp(1) - math.log(num_chains)
    value = log_ratio.sum() + torch.as_tensor(path.base_log_z, device="cpu").double().to(log_ratio)
    if value == -math.inf:  # from some rung no point reached the next
        return LogZ(value, math.inf, converged=False)
    if num_chains == 1:
        return LogZ(value, torch.nan)
    influence = (log_ratios - log_ratio[:, None]).expm1().sum(0)
    return LogZ(value, influence.std() / math.sqrt(num_chains))
