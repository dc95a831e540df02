"""A population of weighted particles on an annealing path: weighed, resampled, moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from companion.core import AnnealingPath
from companion.importance import resample
from companion.importance.weights import Scheme
from companion.inputs import check_generator
from companion.tempering.routes import gain, profile

__all__ = ["Profile", "Stage", "conditional_ess_beta", "stages"]

Profile: TypeAlias = Callable[[Tensor | float], Tensor]


class Stage(NamedTuple):
    """A population after one stage; `ess`, `resampled` and `ancestors` tell what happened."""

    beta: float
    x: Tensor
    log_weights: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor


def stages(
    path: AnnealingPath,
    shape: tuple[int, int],
    next_beta: Callable[[Profile, float, Tensor], float],
    ess_threshold: float,
    scheme: Scheme,
    num_moves: int,
    generator: torch.Generator | None,
) -> Iterator[Stage]:
    """Weigh, resample and move `shape = (N, M)` particles until `next_beta` has come to 1."""
    n, m = shape
    x = path.sample_base(n * m, generator=generator)
    check_generator(generator, x.device)
    x = x.reshape(n, m, *x.shape[1:])
    base_log_z = torch.as_tensor(path.base_log_z, dtype=torch.float64, device=x.device)
    log_weights = base_log_z.expand(n, m)
    replicate = torch.arange(m, device=x.device)
    unmoved = torch.arange(n, device=x.device)[:, None].expand(n, m)
    beta = 0.0
    while beta < 1.0:
        at = profile(path, x)
        new = next_beta(at, beta, log_weights)
        log_weights = log_weights + gain(at(beta), at(new))
        total = log_weights.logsumexp(0)
        if not -math.inf < float(total.max()) < math.inf:
            raise ValueError(_what_is_wrong(log_weights, new))
        dead = total == -math.inf
        ess = torch.where(dead, 0.0, 1.0 / (log_weights - total).exp().square().sum(0))
        resampled = ((ess < ess_threshold * n) | (ess_threshold == 1.0)) & ~dead
        ancestors = unmoved
        if resampled.any():
            weighed = torch.where(resampled, log_weights, 0.0)
            chosen = resample(weighed, scheme, generator=generator)
            ancestors = torch.where(resampled, chosen, unmoved)
            x = x[ancestors, replicate]
            log_weights = torch.where(resampled, total - math.log(n), log_weights)
        for _ in range(num_moves):
            x = path.step(x, new, generator=generator)
        yield Stage(new, x, log_weights, ess, resampled, ancestors)
        beta = new


def _what_is_wrong(log_weights: Tensor, beta: float) -> str:
    """Why a population cannot go on."""
    bad = ~(log_weights < math.inf)
    if bad.any():
        kind = "NaN" if log_weights.isnan().any() else "plus infinity"
        return (
            f"the weights of {int(bad.sum())} of {bad.numel()} particles are {kind} at beta = "
            f"{beta:.3g}: the log-density must be finite, or minus infinity where it is zero"
        )
    return (
        f"all particles have weight zero at beta = {beta:.3g}: none of them is where the target "
        "has mass; take a base that covers it, or more particles"
    )


def conditional_ess_beta(at: Profile, beta: float, log_weights: Tensor, target: float) -> float:
    """By bisection, the beta of the given conditional effective sample size, as a share, or 1."""
    before = at(beta)

    def log_share(new: float) -> float:
        increment = gain(before, at(new))
        mean = (log_weights + increment).logsumexp(0)
        square = (log_weights + 2.0 * increment).logsumexp(0)
        alive = log_weights.where(increment > -math.inf, -math.inf).logsumexp(0)
        return float(2.0 * mean - square - alive)

    goal = math.log(target)
    low, high, new = beta, 1.0, 1.0
    while high - low > 1e-15:
        found = log_share(new)
        if abs(found - goal) < -1e-3 * goal or (new == 1.0 and found > goal):
            return new
        low, high = (new, high) if found > goal else (low, new)
        new = 0.5 * (low + high)
    return high
