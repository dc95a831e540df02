"""Simulated annealing: look for the highest point of a density by cooling a chain slowly.

It is not simulated tempering, in spite of the name. There beta goes up and down, a law is left
invariant, and draws of the target come out. Here beta only rises and no law is left invariant:
where a chain ends has a probability that depends on the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from companion.core import AnnealingPath
from companion.inputs import check_count
from companion.mcmc.base import expand
from companion.tempering.routes import start
from companion.tempering.schedules import check_betas

__all__ = ["Annealed", "simulated_annealing"]


class Annealed(NamedTuple):
    """What `simulated_annealing` found."""

    x: Tensor
    """The best point that each chain has seen, `(chains, *event)`."""
    log_prob: Tensor
    """The log-density at beta = 1 there, `(chains)`."""
    x_last: Tensor
    """Where each chain ended, `(chains, *event)`."""


@torch.no_grad()
def simulated_annealing(
    path: AnnealingPath,
    betas: Tensor | Sequence[float],
    num_chains: int,
    *,
    x0: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Annealed:
    """Look for the highest point of a density: one step at each beta, from hot to cold.

    To minimise an energy U, take a path from a flat base to the target `exp(-U / T)` at the final
    temperature T: then beta stands for the temperature `T / beta`.

    When does it find the minimum? Consider a Metropolis chain with symmetric proposals, by which
    every state can be reached, on finitely many states, at temperatures T_k that fall to 0. The
    depth of a local minimum that is not global is the least height above it that has to be climbed
    on the way to a lower state; let d be the largest of these depths. Then

        P(the chain is at a global minimum after k steps) -> 1   if and only if
        sum_k exp(-d / T_k) is infinite,

    and with `T_k = c / log(1 + k)` if and only if `c >= d` (Hajek). That is slow: to halve the
    temperature squares the number of steps. Every faster schedule, and so every one in use, leaves
    a chain stuck with positive probability, however long it runs. For the Gibbs sampler Geman and
    Geman showed that `c` as large as the number of sites times the range of U is enough.

    Where the chains end, `x_last`, is not a sample of the target: how many end in a mode is decided
    at the temperature at which they cease to cross, and by how fast it went, not by the mode's
    mass.

    An iteration costs a `path.step` and one evaluation of the density at beta = 1.

    Args:
        path: any `AnnealingPath`.
        betas: one for each step, ascending to 1.
        num_chains: number of chains, independent of one another.
        x0: where to start, `(chains, *event)`, by default at draws of the base.
        generator: source of randomness, on the path's device.
        progress: show a progress bar.

    Returns:
        An `Annealed`. The starts count among the points seen.

    Raises:
        ValueError: a count out of range, betas that do not ascend to 1, an `x0` of another shape or
            not finite, a generator on another device.
        TypeError: a path that is none, an `x0` of another dtype than the base's draws.

    Reference: Kirkpatrick, Gelatt and Vecchi (1983), *Optimization by simulated annealing*; Geman
    and Geman (1984), *Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of
    images*; Hajek (1988), *Cooling schedules for optimal annealing*.

    >>> from companion.mcmc import random_walk
    >>> from companion.tempering import GeometricPath
    >>> def energy(x):                                     # many minima; the lowest, 0, is at 0
    ...     return 10.0 - 10.0 * torch.cos(2.0 * torch.pi * x) + x.square()
    >>> path = GeometricPath(torch.distributions.Uniform(-5.0, 5.0), lambda x: -energy(x) / 0.1,
    ...                      lambda density: random_walk(density, 0.7))
    >>> g = torch.Generator().manual_seed(0)
    >>> betas = torch.linspace(0.0, 1.0, 501)[1:].square()
    >>> found = simulated_annealing(path, betas, 20, generator=g)
    >>> bool((found.x.abs() < 0.1).all())
    True
    """
    from tqdm import tqdm

    check_count("num_chains", num_chains)
    temperatures = check_betas(betas, torch.device("cpu")).tolist()
    x = start(path, (num_chains,), x0, generator)
    best, highest = x, _or_nothing(path.log_prob(x, 1.0))
    for beta in tqdm(temperatures, disable=not progress):
        x = path.step(x, beta, generator=generator)
        value = _or_nothing(path.log_prob(x, 1.0))
        better = value > highest
        best, highest = torch.where(expand(better, x), x, best), torch.maximum(value, highest)
    return Annealed(best, highest, x)


def _or_nothing(log_prob: Tensor) -> Tensor:
    """NaN is no height."""
    return torch.where(log_prob.isnan(), -torch.inf, log_prob)
