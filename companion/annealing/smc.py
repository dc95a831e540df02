"""Sequential Monte Carlo: a population of weighted particles, resampled on its way to the target.

At each stage, from one beta to the next, the particles are

1. weighed: log weights grow by `log p~_next(x) - log p~_beta(x)`;
2. resampled in proportion to their weights, if these have become too uneven: each chosen particle
   then carries the mean weight;
3. moved by steps that leave `p~_next` invariant.

The mean weight at the end is an unbiased estimate of Z, whatever the number of particles, however
badly the moves mix, and also where the weights themselves decide when to resample. Its logarithm is
too low by about half its variance. Unbiasedness needs betas that do not depend on the particles:
`smc` finds a schedule with one population and freezes it for another.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from companion.annealing.population import Profile, conditional_ess_beta, stages
from companion.core import AnnealingPath, LogZ
from companion.importance import log_mean_weight
from companion.importance.weights import Scheme
from companion.inputs import check_count, check_generator, check_real
from companion.mcmc.base import expand
from companion.monte_carlo import Estimate
from companion.monte_carlo.estimates import evaluate
from companion.tempering.routes import check_single_path
from companion.tempering.schedules import check_betas

__all__ = ["SMCResult", "adaptive_schedule", "smc"]

_FEWEST_FAMILIES = 10.0


@dataclass(frozen=True, eq=False)
class SMCResult:
    """The particles at the end of a run, and what they estimate.

    N particles in each of M replicates; the replicates are independent. Flat dimensions hold
    replicate 0 first, then replicate 1, and so on.

    Attributes:
        log_z: estimate of log Z at beta = 1, the logarithm of the mean weight; its `ess` is the
            effective number of families (`1 / sum` of their squared shares of the weight), which
            tells how well log Z is known, as an effective sample size does. The particles
            themselves, moved since they were resampled, may be far less dependent.
        x: particles, `(M N, *event)`.
        log_weights: their log weights, `(M N,)`, float64. Their exponentials average to the
            estimate of Z, and their softmax over all replicates weighs expectations rightly.
        betas: the schedule, `(stages + 1,)`, float64.
        ess: Kish's effective sample size in each stage, after weighing, `(stages, M)`, float64.
        resampled: where that led to resampling, `(stages, M)`, boolean.
        replicate_log_z: each replicate's own estimate of log Z, `(M,)`, float64.
        eve: from which of the first draws each particle descends, `(M N,)`, int64: i + r N for
            draw i of replicate r. Particles of one `eve` are a family.
        ancestors: `(stages, N, M)`, int64, or None if not kept: after stage t particle i of
            replicate r descends from particle `ancestors[t, i, r]` before (see `lineage`).
    """

    log_z: LogZ
    x: Tensor
    log_weights: Tensor
    betas: Tensor
    ess: Tensor
    resampled: Tensor
    replicate_log_z: Tensor
    eve: Tensor
    ancestors: Tensor | None

    @torch.no_grad()
    def expectation(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """The estimate `sum_i u_i f(x_i)` of `E[f(X)]` under the target, u the normalised weights.

        With groups g of particles that know nothing of each other and G of them, the delta method
        gives `std_error^2 = G / (G - 1) sum_g (sum_{i in g} u_i (f(x_i) - value))^2`. The groups
        are the replicates, or the families (Chan and Lai 2013) if there is one replicate.

        Args:
            f: the integrand, `(m, *event) -> (m, *shape)`. It sees no particle of weight zero.

        Returns:
            An `Estimate` of shape `(*shape)`.

        Raises:
            ValueError: f gives another shape, or NaN or infinity.
        """
        alive = self.log_weights > -math.inf
        y = evaluate(f, self.x[alive], "f(x)")
        share = expand(self.log_weights[alive].softmax(0), y)
        value = (share * y).sum(0)
        group, num_groups = self.eve, len(self.x)
        if len(self.replicate_log_z) > 1:
            num_groups = len(self.replicate_log_z)
            group = group // (len(self.x) // num_groups)
        totals = y.new_zeros(num_groups, *y.shape[1:])
        totals.index_add_(0, group[alive], share * (y - value))
        variance = totals.square().sum(0) * num_groups / (num_groups - 1)
        return Estimate(value, variance.sqrt(), num_groups)


@torch.no_grad()
def smc(
    path: AnnealingPath,
    num_particles: int,
    *,
    betas: Tensor | Sequence[float] | None = None,
    target_ess: float = 0.5,
    ess_threshold: float = 0.5,
    scheme: Scheme = "systematic",
    num_replicates: int = 1,
    num_moves: int = 1,
    keep_history: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SMCResult:
    """Estimate log Z and expectations under the target by sequential Monte Carlo.

    Each stage costs `num_moves` steps of the path and one evaluation of its density a particle; in
    a `GeometricPath` with a Metropolis kernel of k steps, `num_moves (k + 1) + 1` evaluations of
    the target's density. Without `betas` a pilot run finds them first (`adaptive_schedule`, one
    population of `num_particles`): that doubles the cost of one replicate.

    The standard error of log Z comes

    - from the spread of the replicates, if there are several: twenty or more tell it to some 15 %;
    - from the families of one run, if there is one. With s_e the share of the weight that descends
      from first draw e, and R resamplings, the relative variance of the estimate of Z is estimated
      by `1 - (N / (N - 1))^(R + 1) (1 - sum_e s_e^2)` for multinomial resampling; times the square
      of the estimate, this is unbiased. For the other schemes it is `N / (N - 1) (sum_e s_e^2 -
      1 / N)`, the variance as if families were independent. They compete for their places, so this
      is cautious: where the moves forget everything the standard error is a tenth too large with
      systematic resampling and a third with residual; where they mix badly, about right. It also
      takes the place of the first estimate where that is negative, as it may be by chance.

    These factors hold where it is resampled at about half the effective sample size or less. With
    `ess_threshold=1` on a fine schedule families die out by resampling that hardly was needed, and
    the standard error of one replicate is too large without bound (2 to 21 times were measured):
    take replicates there.

    It never exceeds 1, however far off the estimate is. A warning says when all particles descend
    from effectively fewer than ten of the first draws: then it says nothing.

    Args:
        path: any `AnnealingPath`.
        num_particles: N, in each replicate, at least 2.
        betas: the schedule, from 0 to 1; None finds one.
        target_ess: for that, the conditional effective sample size, as a share of N, between 0
            and 1.
        ess_threshold: a replicate is resampled when its effective sample size is below this share
            of N. 1 resamples at every stage; 0 never does: this is annealed importance sampling.
        scheme: how, as in `companion.importance.resample`.
        num_replicates: M, independent runs in one batch.
        num_moves: steps of the path a stage, at least 0.
        keep_history: keep who descends from whom, `(stages, N, M)`.
        generator: source of randomness, on the device of the particles.
        progress: show a progress bar.

    Returns:
        An `SMCResult`. A replicate whose particles have all died estimates Z by 0.

    Raises:
        ValueError: an argument out of range, betas that do not ascend from 0 to 1, a log-density
            that is NaN or plus infinity at a particle, or no particle left whose weight is
            positive; both name beta.

    Reference: Del Moral, Doucet and Jasra (2006), *Sequential Monte Carlo samplers*; the errors,
    Chan and Lai (2013), *A general theory of particle filters in hidden Markov models and some
    applications*, and Lee and Whiteley (2018), *Variance estimation in the particle filter*.

    >>> from companion.mcmc import random_walk
    >>> from companion.tempering import GeometricPath
    >>> base = torch.distributions.Normal(0.0, 3.0)
    >>> path = GeometricPath(base, lambda x: -0.5 * (x - 5.0).square(),
    ...                      lambda density: random_walk(density, 2.0))
    >>> found = smc(path, 10_000, generator=torch.Generator().manual_seed(3))
    >>> print(f"{found.log_z.value:.2f} +/- {found.log_z.std_error:.2f}")   # log(2 pi) / 2 = 0.92
    0.91 +/- 0.02
    >>> mean = found.expectation(lambda x: x)
    >>> print(f"{mean.value:.2f} +/- {mean.std_error:.2f}")
    5.01 +/- 0.01
    """
    from tqdm import tqdm

    check_count("num_replicates", num_replicates)
    _check(path, num_particles, ess_threshold, scheme, num_moves, generator)
    if betas is None:
        betas = adaptive_schedule(
            path,
            num_particles,
            target_ess,
            ess_threshold=ess_threshold,
            scheme=scheme,
            num_moves=num_moves,
            generator=generator,
        )
    betas = check_betas(betas, torch.device("cpu"), from_zero=True)
    rest = iter(betas.tolist()[1:])
    n, m = num_particles, num_replicates
    run = stages(path, (n, m), lambda *_: next(rest), ess_threshold, scheme, num_moves, generator)
    ess, resampled, history = [], [], []
    founder: Tensor | None = None
    for stage in tqdm(run, total=len(betas) - 1, disable=not progress):
        ess.append(stage.ess)
        resampled.append(stage.resampled)
        if keep_history:
            history.append(stage.ancestors)
        founder = stage.ancestors if founder is None else founder.gather(0, stage.ancestors)
    assert founder is not None

    x, log_weights = stage.x, stage.log_weights
    replicate_log_z = log_weights.logsumexp(0) - math.log(n)
    eve = (founder + n * torch.arange(m, device=x.device)).T.reshape(-1)
    log_weights = log_weights.T.reshape(-1)
    share = torch.zeros_like(log_weights).index_add_(0, eve, log_weights.softmax(0))
    families = 1.0 / share.square().sum()
    if m > 1:
        pooled = log_mean_weight(replicate_log_z)
        value, std_error = pooled.value, pooled.std_error
    else:
        value = replicate_log_z[0]
        num_resamplings = int(torch.stack(resampled).sum()) if scheme == "multinomial" else 0
        std_error = _family_error(1.0 / families, n, num_resamplings)
    result = SMCResult(
        log_z=LogZ(value, std_error, log_weights, families),
        x=x.transpose(0, 1).reshape(n * m, *x.shape[2:]),
        log_weights=log_weights,
        betas=betas.to(x.device),
        ess=torch.stack(ess),
        resampled=torch.stack(resampled),
        replicate_log_z=replicate_log_z,
        eve=eve,
        ancestors=torch.stack(history) if keep_history else None,
    )
    if families < _FEWEST_FAMILIES:
        lowest, worst = result.ess.amin(1).min(0)
        warnings.warn(
            f"all {n * m} particles descend from effectively {float(families):.1f} of the first "
            f"draws; the effective sample size fell to {float(lowest):.1f} of {n} at beta = "
            f"{float(betas[worst + 1]):.3g}. log Z and its standard error may be far off: take "
            "more betas (a larger target_ess), more moves or more particles",
            stacklevel=3,  # this frame, and that of no_grad
        )
    return result


@torch.no_grad()
def adaptive_schedule(
    path: AnnealingPath,
    num_particles: int,
    target_ess: float = 0.5,
    *,
    ess_threshold: float = 0.5,
    scheme: Scheme = "systematic",
    num_moves: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Find betas between which the weights vary equally much, by one run of a population.

    With normalised weights W_i before a stage and increments w_i, the next beta makes

        conditional ESS / N = (sum_i W_i w_i)^2 / sum_i W_i w_i^2 = target_ess,

    its logarithm to within 0.1 %, or is 1 if that leaves more. Particles of density zero there are
    not counted. The relative variance of an increment is then about `1 / target_ess - 1`. In a path
    with a `profile`, as a `GeometricPath` has, the search needs no further evaluations of the
    density; otherwise about fifteen a stage.

    This run's own mean weight would be a biased estimate of Z, because its betas depend on its
    particles: hand the schedule to `smc`, which draws fresh ones.

    Args:
        path: any `AnnealingPath`.
        num_particles: N, at least 2.
        target_ess: between 0 and 1; 0.9 takes some 2.5 times the betas of 0.5.
        ess_threshold: as in `smc`; so are `scheme`, `num_moves` and `generator`.

    Returns:
        Betas from 0 to 1, `(stages + 1,)`, float64, on the device of the particles.

    Raises:
        ValueError: as in `smc`.

    Reference: Zhou, Johansen and Aston (2016), *Toward automatic model comparison: an adaptive
    sequential Monte Carlo approach*.

    >>> from companion.mcmc import random_walk
    >>> from companion.tempering import GeometricPath
    >>> base = torch.distributions.Normal(0.0, 3.0)
    >>> path = GeometricPath(base, lambda x: -50.0 * (x - 5.0).square(),
    ...                      lambda density, beta: random_walk(density, (0.1 + 100 * beta).rsqrt()))
    >>> betas = adaptive_schedule(path, 10_000, generator=torch.Generator().manual_seed(0))
    >>> print(len(betas), f"{betas[1]:.3f} {betas[-2]:.1f}")
    6 0.001 0.3
    """
    check_real("target_ess", target_ess, minimum=0.0, maximum=1.0)
    _check(path, num_particles, ess_threshold, scheme, num_moves, generator)

    def choose(at: Profile, beta: float, log_weights: Tensor) -> float:
        return conditional_ess_beta(at, beta, log_weights, target_ess)

    betas = [0.0]
    for stage in stages(
        path, (num_particles, 1), choose, ess_threshold, scheme, num_moves, generator
    ):
        betas.append(stage.beta)
    return torch.tensor(betas, dtype=torch.float64, device=stage.x.device)


# ---------------------------------------------------------------- inside


def _family_error(sum_of_squares: Tensor, n: int, num_resamplings: int) -> Tensor:
    """The standard error of log Z from the squared shares of the families, as told in `smc`."""
    as_if_independent = n / (n - 1) * (sum_of_squares - 1.0 / n)
    unbiased = 1.0 - (n / (n - 1)) ** (num_resamplings + 1) * (1.0 - sum_of_squares)
    # By chance it may be negative, which would be no error at all.
    return torch.where(unbiased > 0.0, unbiased, as_if_independent).clamp(min=0.0).sqrt()


def _check(
    path: AnnealingPath,
    num_particles: int,
    ess_threshold: float,
    scheme: Scheme,
    num_moves: int,
    generator: torch.Generator | None,
) -> None:
    check_single_path(path)
    check_count("num_particles", num_particles, minimum=2)
    check_count("num_moves", num_moves, minimum=0)
    if not 0.0 <= check_real("ess_threshold", ess_threshold) <= 1.0:
        raise ValueError(f"ess_threshold must be from 0 to 1, got {ess_threshold}")
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be one of {', '.join(get_args(Scheme))}; got {scheme!r}")
    check_generator(generator, getattr(generator, "device", torch.device("cpu")))
