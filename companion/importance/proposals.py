"""Proposals: defensive mixtures, and mixtures that adapt to the target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from companion.core import LogProb
from companion.importance.sampling import log_density, weigh
from companion.importance.weights import resample
from companion.inputs import Sampler, check_count, check_generator, check_real, draw

__all__ = ["adapt_proposal", "defensive_mixture"]


@dataclass(frozen=True, eq=False)
class _DefensiveMixture:
    proposal: Sampler
    safe: Sampler
    fraction: float

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        x = draw(self.proposal, n, generator=generator)
        y = draw(self.safe, n, generator=generator)
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(
                f"both parts must draw alike, but {n} draws of the proposal are "
                f"{tuple(x.shape)} of {x.dtype} and of the safe one {tuple(y.shape)} of {y.dtype}"
            )
        lead = log_density(self.proposal, x).shape  # separate problems choose separately
        check_generator(generator, x.device)
        u = torch.rand(lead, dtype=torch.float64, device=x.device, generator=generator)
        choose = (u < self.fraction).reshape(*lead, *(1,) * (x.ndim - len(lead)))
        return torch.where(choose, y, x)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logaddexp(
            log_density(self.proposal, x) + math.log1p(-self.fraction),
            log_density(self.safe, x) + math.log(self.fraction),
        )


def defensive_mixture(proposal: Sampler, safe: Sampler, fraction: float = 0.1) -> Sampler:
    """The mixture `(1 - a) q + a r` of a proposal with a safe density.

    Its weights are at most `p~ / (a r)`: bounded wherever r alone would bound them, and their mean
    square is at most `1/a` times that under r, however badly q fits. Where q fits well, the price
    is a factor of at most `1 / (1 - a)`.

    Args:
        proposal: q, a `torch.distributions` object, or one with `sample(m, *, generator)` and
            `log_prob`.
        safe: r, of the same kind, with draws of the same shape: heavy tails, or the prior.
        fraction: a, between 0 and 1.

    Returns:
        An object with `sample(n, *, generator)` and `log_prob(x)`, the latter in float64. Each
        part's density must be defined where the other draws (`validate_args=False` if need be).

    Raises:
        ValueError: a fraction outside (0, 1); when drawing, parts whose draws differ in shape.

    Reference: Hesterberg (1995), *Weighted average importance sampling and defensive mixture
    distributions*.

    >>> from companion.importance import importance_sampling
    >>> narrow, wide = torch.distributions.Normal(0.0, 0.3), torch.distributions.Cauchy(0.0, 1.0)
    >>> q, g = defensive_mixture(narrow, wide, 0.2), torch.Generator().manual_seed(0)
    >>> result = importance_sampling(lambda x: -x.square(), q, 10_000, generator=g)
    >>> bool(result.log_weights.max() < math.log(math.pi / 0.2))
    True
    """
    return _DefensiveMixture(
        proposal, safe, check_real("fraction", fraction, minimum=0.0, maximum=1.0)
    )


# ---------------------------------------------------------------- adaptive proposals


@torch.no_grad()
def adapt_proposal(
    log_prob: LogProb,
    proposal: Sampler,
    num_samples: int,
    *,
    num_components: int = 1,
    num_rounds: int = 10,
    fraction: float = 0.1,
    generator: torch.Generator | None = None,
) -> Sampler:
    """Fit a defensive mixture of normal laws to a target, by rounds of importance sampling.

    Each round draws from the latest mixture, weighs the draws by the target, and makes three
    weighted EM steps: they lower an estimate of the Kullback-Leibler divergence from the target to
    the mixture (population Monte Carlo). The largest weights of a round are clipped to one value,
    so that one lucky draw cannot take over. The first proposal stays in the mixture, as its safe
    part.

    Hand the result to `importance_sampling`: its draws are fresh, so that the mean weight is an
    unbiased estimate of Z for any outcome of the adaptation. Estimates from the rounds themselves
    would not be independent of the proposal.

    Args:
        log_prob: `log p~`, `(n, d) -> (n,)`; minus infinity where the density is zero.
        proposal: the first proposal, wide enough to reach all of the target, with draws `(n, d)`.
        num_samples: draws a round, at least `40 (d + 1) num_components`.
        num_components: number of normal laws, at least one a mode.
        num_rounds: number of rounds.
        fraction: weight of the first proposal in the mixture.
        generator: source of randomness, on the device of the draws.

    Returns:
        An object with `sample(n, *, generator)` and `log_prob(x)`.

    Raises:
        ValueError: too few draws a round, or too few of them, `4 (d + 1) num_components`, where
            the target has mass; draws that are not `(n, d)`, or what `importance_sampling` refuses.

    Reference: Cappé, Douc, Guillin, Marin and Robert (2008), *Adaptive importance sampling in
    general mixture classes*; the clipping, Koblents and Míguez (2015), *A population Monte Carlo
    scheme with transformed weights and its application to stochastic kinetic models*.

    >>> from companion.importance import importance_sampling
    >>> target = MultivariateNormal(torch.tensor([3.0, 2.0]), 0.5 * torch.eye(2))
    >>> wide, g = MultivariateNormal(torch.zeros(2), 9.0 * torch.eye(2)), torch.Generator()
    >>> q = adapt_proposal(target.log_prob, wide, 1000, generator=g.manual_seed(0))
    >>> for proposal in (wide, q):
    ...     result = importance_sampling(target.log_prob, proposal, 10_000, generator=g)
    ...     print(f"{result.ess / 10_000:.1f}")
    0.1
    0.9
    """
    check_count("num_samples", num_samples)
    check_count("num_components", num_components)
    check_count("num_rounds", num_rounds)
    check_real("fraction", fraction, minimum=0.0, maximum=1.0)
    current = proposal
    components: tuple[Tensor, Tensor, Tensor] | None = None
    for _ in range(num_rounds):
        x = draw(current, num_samples, generator=generator)
        if x.ndim != 2:
            raise ValueError(
                f"expected draws of shape (n, d), got {tuple(x.shape)}; "
                "torch.distributions.Independent turns batch dimensions into an event"
            )
        fewest = 4 * (x.shape[1] + 1) * num_components
        if num_samples < 10 * fewest:
            raise ValueError(
                f"{num_components} components in {x.shape[1]} dimensions need num_samples of at "
                f"least {10 * fewest}, got {num_samples}"
            )
        log_weights = weigh(log_prob, current, x)
        positive = int((log_weights > -math.inf).sum())
        if positive < fewest:
            raise ValueError(
                f"only {positive} of {num_samples} draws fell where the target has mass, and "
                f"{fewest} are needed to fit {num_components} components in {x.shape[1]} "
                "dimensions; widen the proposal, or take more draws"
            )
        clip = min(max(fewest, math.isqrt(num_samples)), positive)
        log_weights = log_weights.clamp(max=log_weights.topk(clip).values[-1])
        if components is None:
            components = _start(x.double(), log_weights, num_components, generator)
        for _ in range(3):
            components = _em_step(x.double(), log_weights.softmax(0), *components)
        probs, means, covariances = components
        factors = torch.linalg.cholesky(covariances)
        laws = MultivariateNormal(means.to(x), scale_tril=factors.to(x))
        fitted = MixtureSameFamily(Categorical(probs.to(x)), laws)
        current = defensive_mixture(fitted, proposal, fraction)
    return current


def _start(
    x: Tensor, log_weights: Tensor, k: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Equal weights, means at k resampled draws, and the covariance of them all."""
    means = x[resample(log_weights, "systematic", k, generator=generator)]
    covariance = x.T.cov(aweights=log_weights.softmax(0))
    return x.new_full((k,), 1.0 / k), means, covariance.expand(k, -1, -1)


def _em_step(
    x: Tensor, weights: Tensor, probs: Tensor, means: Tensor, covariances: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights, means and covariances of the components that fit the weighted draws better."""
    law: Sampler = MultivariateNormal(means, covariances)
    resp = (law.log_prob(x[:, None]) + probs.log()).softmax(1) * weights[:, None]  # (n, k)
    mass = resp.sum(0)
    part = resp / mass
    new_means = part.T @ x
    centred = x[:, None] - new_means
    new_covariances = torch.einsum("nk,nki,nkj->kij", part, centred, centred)
    # A component that few draws made keeps its place: they cannot tell its covariance.
    known = 1.0 / part.square().sum(0) > 2 * (x.shape[1] + 1)
    return (
        mass,
        torch.where(known[:, None], new_means, means),
        torch.where(known[:, None, None], new_covariances, covariances),
    )
