"""Where the rungs of a ladder should be: equally many swaps rejected between all neighbours.

The rejections from the base to beta add up to the same, `Lambda(beta)`, whatever the rungs, as long
as they are close: `Lambda(1)` is the communication barrier of the path. With n steps of the ladder,
`sum_i r_i / (1 - r_i)` is smallest, and round trips are most frequent, if all `r_i = Lambda / n`.
So measure the rejections, interpolate Lambda, and cut it into equal parts. Round trips cannot
become more frequent than `1 / (2 + 2 Lambda)` an iteration, however many rungs there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.core import AnnealingPath
from companion.inputs import check_count, check_real
from companion.tempering.parallel import parallel_tempering
from companion.tempering.schedules import check_betas

__all__ = ["Ladder", "tune_ladder"]


@dataclass(frozen=True, eq=False)
class Ladder:
    """What `tune_ladder` found.

    Attributes:
        betas: the ladder, `(R,)`, float64, ascending to 1.
        rejection: mean rejection probability of the swaps between neighbours, `(R - 1,)`, float64,
            as measured in the last round; of a good ladder they are about equal.
        barrier: their sum, the communication barrier, a float64 tensor. Coarse ladders show too
            little of it: no pair rejects more than always.
    """

    betas: Tensor
    rejection: Tensor
    barrier: Tensor


def tune_ladder(
    path: AnnealingPath,
    betas: Tensor | Sequence[float],
    *,
    acceptance: float | None = None,
    num_chains: int = 16,
    num_steps: int = 25,
    num_rounds: int = 6,
    generator: torch.Generator | None = None,
) -> Ladder:
    """A ladder for parallel tempering whose swaps are all rejected with the same probability.

    In each round parallel tempering runs on the ladder, going on from where the last round ended
    and twice as long; then the ladder is cut anew. The last round only measures. The first and the
    last beta stay where they are.

    The cost is `(2^num_rounds - 1) num_steps` iterations of `parallel_tempering`.

    Args:
        path: any `AnnealingPath`.
        betas: the ladder to begin with, at least two, ascending to 1. If its neighbours hardly ever
            swap it says little about where to cut: begin with more rungs, or give `acceptance`.
        acceptance: mean swap probability to aim at, between 0 and 1, by the number of rungs; None
            keeps their number.
        num_chains: number of chains.
        num_steps: iterations of the first round.
        num_rounds: number of rounds.
        generator: source of randomness, on the path's device.

    Returns:
        A `Ladder`.

    Raises:
        ValueError: counts or an acceptance out of range, betas that do not ascend to 1.

    Reference: Syed, Bouchard-Côté, Deligiannidis and Doucet (2022), *Non-reversible parallel
    tempering: a scalable highly parallel MCMC scheme*.

    >>> from companion.mcmc import random_walk
    >>> from companion.tempering import GeometricPath, linear_schedule
    >>> base = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 10.0)
    >>> path = GeometricPath(base, lambda x: -0.5 * x.square(),
    ...                      lambda density, beta: random_walk(density, 2.0 / beta.sqrt()))
    >>> g = torch.Generator().manual_seed(0)
    >>> ladder = tune_ladder(path, linear_schedule(5), num_rounds=4, generator=g)
    >>> print([f"{beta:.2f}" for beta in ladder.betas])         # 0.01 + 0.99 beta is geometric
    ['0.00', '0.02', '0.09', '0.30', '1.00']
    """
    from scipy.interpolate import PchipInterpolator  # slow to import

    check_count("num_steps", num_steps)
    check_count("num_rounds", num_rounds)
    if acceptance is not None:
        check_real("acceptance", acceptance, minimum=0.0, maximum=1.0)
    betas = check_betas(betas, torch.device("cpu"))
    x = None
    for i in range(num_rounds):
        with warnings.catch_warnings():
            if i < num_rounds - 1:  # these rounds are the warm-up of the last
                warnings.filterwarnings("ignore", "[0-9]+ points had density zero")
            run = parallel_tempering(
                path, betas, num_steps * 2**i, num_chains=num_chains, x0=x, generator=generator
            )
        rejection = 1.0 - run.swap_prob
        if i == num_rounds - 1:
            break
        # A little is rejected everywhere, so that the barrier ascends and can be inverted.
        barrier = torch.cat([rejection.new_zeros(1), rejection.clamp(min=1e-6).cumsum(0)]).cpu()
        num = len(betas) - 1
        if acceptance is not None:
            num = max(1, round(float(barrier[-1]) / (1.0 - acceptance)))
        parts = torch.linspace(0.0, float(barrier[-1]), num + 1, dtype=torch.float64, device="cpu")
        cut = torch.from_numpy(PchipInterpolator(barrier.numpy(), betas.numpy())(parts.numpy()))
        # Each rung goes on with the points of the old rung as far up the ladder.
        origin = torch.linspace(0, len(betas) - 1, num + 1, device=run.x.device).round().long()
        x = run.x[origin]
        betas = torch.cat([betas[:1], cut[1:-1], betas[-1:]])
    return Ladder(run.betas, rejection, rejection.sum())
