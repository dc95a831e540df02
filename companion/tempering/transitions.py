"""Tempered transitions: one step that heats a point, cools it again, and accepts where it ends.

A path from the target up to the base and back down again is itself a proposal. What it may end in
is another mode; what it costs is that the way down must undo the way up, so that the acceptance
ratio is known: the kernels of the way down are the reversals of those of the way up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from companion.core import AnnealingPath, Kernel
from companion.inputs import check_count, check_generator
from companion.mcmc.base import (
    ChainState,
    MoveInfo,
    expand,
    init_chains,
    metropolis_accept,
    select,
    uniform_noise,
)
from companion.tempering.routes import check_single_path, gain, profile, reverse_step
from companion.tempering.schedules import check_betas

__all__ = ["tempered_transitions"]


def tempered_transitions(
    path: AnnealingPath, betas: Tensor | Sequence[float], *, num_steps: int = 1
) -> Kernel:
    """Tempered transitions along an annealing path: a kernel that crosses from mode to mode.

    With the levels `beta_1 < ... < beta_K = 1`, a step goes up by `T_{K-1}, ..., T_1`, where `T_k`
    leaves the density at beta_k invariant, and down by the reversals `T_1*, ..., T_{K-1}*`:

        x = u_K -> u_{K-1} -> ... -> u_1 = d_1 -> d_2 -> ... -> d_{K-1} -> d_K = y

    `u_k` is what `T_k` made of `u_{k+1}`, `d_1` is `u_1`, and `d_{k+1}` is what `T_k*` made of
    `d_k`. The whole is accepted with probability `min(1, r)`, where

        log r = sum_{k<K} [log p~_k(u_{k+1}) - log p~_{k+1}(u_{k+1})]
              + sum_{k<K} [log p~_{k+1}(d_{k+1}) - log p~_k(d_{k+1})],

    else the chain stays at x. No normalising constant is needed: each level's stands once above and
    once below the fraction line. Why it is right: let F be the probability of the way from x to y,
    and B that of going the same way backwards, from y to x. As each `T_k*` is the reversal of
    `T_k`, `p~(y) B = p~(x) F r`: detailed balance holds way by way, and so for their sum.

    If `beta_1 = 0`, the two moves at the top, `T_1` and `T_1*`, are one exact draw from the base.

    How many levels? Let S be the sum over neighbouring levels of their divergences,
    `KL(p_k, p_{k+1}) + KL(p_{k+1}, p_k)`. If each move forgets where it came from and the levels
    are close, log r is normal with mean -S and variance 2 S, and `2 Phi(-sqrt(S / 2))` of the
    proposals are accepted. S falls as 1 / K only: K must grow with the square of the number of
    levels at which neighbours overlap, which is what simulated and parallel tempering need.

    A step makes `2 (K - 1) num_steps` steps of the path (`2 (K - 2) num_steps` if `beta_1 = 0`),
    and evaluates the densities at `2 (K - 1)` points besides.

    Args:
        path: an `AnnealingPath`; it needs a `reverse_step` unless its `step` is reversible.
        betas: the levels, ascending to 1, at least two.
        num_steps: steps of the path at each level.

    Returns:
        A `Kernel` for the density at beta = 1, with a `ChainState` and a `MoveInfo`. A way through
        a point of density zero is rejected; one with a NaN is rejected and flagged.

    Raises:
        TypeError, ValueError: a path, betas or a number of steps that are none; by `init`, a start
            where the log-density at beta = 1 is not finite.

    Reference: Neal (1996), *Sampling from multimodal distributions using tempered transitions*.

    >>> from companion.core import sample
    >>> from companion.mcmc import random_walk
    >>> from companion.tempering import GeometricPath
    >>> def log_prob(x):                                  # N(-8, 1) and N(8, 1), 3 to 1
    ...     return torch.logaddexp(1.0986 - 0.5 * (x + 8).square(), -0.5 * (x - 8).square())
    >>> path = GeometricPath(torch.distributions.Normal(0.0, 8.0), log_prob,
    ...                      lambda density: random_walk(density, 2.0))
    >>> kernel = tempered_transitions(path, torch.linspace(0, 1, 6).square())
    >>> g = torch.Generator().manual_seed(0)
    >>> x = sample(kernel, torch.full((1000,), -8.0), 50, warmup=20, generator=g).x
    >>> f"{(x > 0).double().mean():.2f}"
    '0.25'
    """
    check_single_path(path)
    levels: list[float] = check_betas(betas, torch.device("cpu")).tolist()
    if len(levels) < 2:
        raise ValueError("betas must hold at least two levels: 1, and one below it to heat up to")
    check_count("num_steps", num_steps)
    ladder = list(pairwise(reversed(levels)))  # (colder, hotter), from the target upwards

    back = partial(reverse_step, path)

    def move(
        one: Callable[..., Tensor], x: Tensor, beta: float, generator: torch.Generator | None
    ) -> Tensor:
        for _ in range(num_steps):
            x = one(x, beta, generator=generator)
        return x

    @torch.no_grad()
    def step(
        state: ChainState, *, generator: torch.Generator | None = None
    ) -> tuple[ChainState, MoveInfo]:
        x = state.x
        check_generator(generator, x.device)
        log_ratio = torch.zeros_like(state.log_prob, dtype=torch.float64)

        def usable(x: Tensor) -> Tensor:
            """A way with a NaN is lost: it goes on from the start, as no kernel starts at a NaN."""
            return torch.where(expand(log_ratio.isnan(), x), state.x, x)

        for colder, hotter in ladder:
            density = profile(path, x)
            log_ratio = log_ratio + gain(density(colder), density(hotter))
            if hotter > 0.0:
                x = move(path.step, usable(x), hotter, generator)
            else:  # the moves at the top, up and down
                x = path.sample_base(log_ratio.numel(), generator=generator).reshape(x.shape).to(x)
        for colder, hotter in reversed(ladder):
            if hotter > 0.0:
                x = move(back, usable(x), hotter, generator)
            density = profile(path, x)
            value = density(colder)
            log_ratio = log_ratio + gain(density(hotter), value)
        proposal = ChainState(x, value.to(state.log_prob))
        info = metropolis_accept(log_ratio, uniform_noise(log_ratio, generator))
        return select(info.accepted, proposal, state), info

    return Kernel(lambda x: init_chains(lambda y: path.log_prob(y, 1.0), x), step)
