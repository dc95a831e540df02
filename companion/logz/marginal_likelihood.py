"""The evidence of a model, `Z = int prior(x) likelihood(x) dx`, from draws of its posterior.

`evidence` bridges from the posterior to a normal law that was fitted to it. `harmonic_mean` is here
because it is met everywhere, and fails.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from companion.core import LogProb, LogZ, Trace
from companion.diagnostics.draws import checked_draws
from companion.importance import log_mean_weight, pareto_k
from companion.logz.bridge import bridge_sampling

__all__ = ["Method", "evidence", "harmonic_mean"]

Method = Literal["normal", "warp"]

_FEWEST = 8  # draws a chain: four in each half


@torch.no_grad()
def evidence(
    log_prob: LogProb,
    draws: Tensor | Trace,
    *,
    support: Constraint | None = None,
    method: Method = "normal",
    generator: torch.Generator | None = None,
) -> LogZ:
    """Estimate the log evidence (marginal likelihood) from MCMC draws of the posterior.

    The first half of every chain fits a normal law, by its mean and covariance; the second half and
    as many draws of that law meet in `bridge_sampling`, by the optimal bridge. To fit and to bridge
    with the same draws would find the two too much alike. The standard error counts the
    autocorrelation of the second half, and the spread between the chains; of the fit it knows
    nothing, nor of modes that no chain has found.

    "warp" makes the posterior symmetric first: with the fitted mean m and Cholesky factor L, the
    density `(p(m + L z) + p(m - L z)) |L| / 2` has the same Z and is closer to a normal law if p is
    skewed. It costs two evaluations of the density a draw where "normal" costs one.

    Args:
        log_prob: log of prior times likelihood, `(..., *event) -> (...)`, *with every constant of
            both*: what is left out of `log_prob` is missing in the result.
        draws: of the posterior, `(chains, draws, *event)`, or a `Trace`; 8 draws a chain or more.
        support: where the density is positive, a constraint of `torch.distributions` for the whole
            event (`constraints.positive`, or `constraints.stack([real, positive], -1)` of
            coordinates). Fit and bridge are made in the unbounded coordinates of
            `biject_to(support)`, with the Jacobian. None is unbounded.
        method: "normal" or "warp" (Warp-III).
        generator: source of randomness, on the device of the draws.

    Returns:
        A `LogZ` with the fields and warnings of `bar`: the overlap of posterior and normal law is
        poor where the standard error exceeds a third.

    Raises:
        ValueError: an unknown method, too few draws or such as are not finite, draws outside of the
            support or on its boundary, or in so few directions that no normal law fits.

    Reference: Meng and Schilling (2002), *Warp bridge sampling*; Gronau and others (2017), *A
    tutorial on bridge sampling*, for the split; Gronau, Singmann and Wagenmakers (2020),
    *bridgesampling: an R package for estimating normalizing constants*.

    >>> from torch.distributions import Gamma, Poisson, constraints
    >>> prior, y = Gamma(2.0, 1.0), torch.tensor([3.0, 1.0, 4.0])
    >>> def log_prob(rate):
    ...     return prior.log_prob(rate) + Poisson(rate[..., None]).log_prob(y).sum(-1)
    >>> from companion.inputs import draw                          # the posterior is Gamma(10, 4)
    >>> g = torch.Generator().manual_seed(0)
    >>> x = draw(Gamma(10.0, 4.0), 4000, generator=g).reshape(4, 1000)
    >>> log_z = evidence(log_prob, x, support=constraints.positive, generator=g)
    >>> print(f"{log_z.value:.3f} +/- {log_z.std_error:.3f}")       # 9! / 4^10 / (3! 1! 4!)
    -6.030 +/- 0.003
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}")
    raw = draws.x if isinstance(draws, Trace) else draws
    x = checked_draws(draws)
    if x.shape[1] < _FEWEST:
        raise ValueError(f"evidence needs {_FEWEST} draws a chain or more, got {x.shape[1]}")
    y = x if support is None else _unbounded(x, support)
    event = y.shape[2:]
    first, second = y.reshape(*y.shape[:2], -1).tensor_split([y.shape[1] // 2], 1)
    mean, factor = _fit(first.flatten(0, 1))

    def posterior(z: Tensor) -> Tensor:
        y = (mean + z @ factor.T).reshape(*z.shape[:-1], *event)
        jacobian = factor.diagonal().log().sum()
        at = y
        if support is not None:
            transform = biject_to(support)
            at = transform(y)
            change = transform.log_abs_det_jacobian(y, at)
            jacobian = jacobian + change.reshape(*z.shape[:-1], -1).sum(-1)
        value = log_prob(at.to(raw.dtype)).double()
        if value.shape != z.shape[:-1]:
            raise ValueError(
                f"log_prob must give one number a point: for points {tuple(at.shape)} it gave "
                f"{tuple(value.shape)}, expected {tuple(z.shape[:-1])}"
            )
        return value + jacobian

    def symmetric(z: Tensor) -> Tensor:
        return torch.logaddexp(posterior(z), posterior(-z)) - math.log(2.0)

    def normal(z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2.0 * math.pi)

    z = torch.linalg.solve_triangular(factor, (second - mean).mT, upper=False).mT
    shape = (1, z.shape[0] * z.shape[1], z.shape[2])  # independent draws are one chain
    z_normal = torch.randn(shape, dtype=z.dtype, device=z.device, generator=generator)
    target = posterior if method == "normal" else symmetric
    return bridge_sampling(target, z, normal, z_normal, chains=True)


def _unbounded(x: Tensor, support: Constraint) -> Tensor:
    """The draws in unbounded coordinates."""
    transform = biject_to(support)
    inside: Tensor = support.check(x)  # type: ignore[no-untyped-call]
    y = transform.inv(x)
    if not inside.all() or not y.isfinite().all():
        outside = int((~inside).sum()) or int((~y.isfinite()).sum())
        raise ValueError(
            f"{outside} draws are outside of the support {support} or on its boundary, where they "
            "have no unbounded coordinates: is it the support of this density?"
        )
    return y


def _fit(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of the covariance of `(n, d)`."""
    n, d = y.shape
    mean = y.mean(0)
    covariance = (y - mean).T @ (y - mean) / (n - 1)
    scale = covariance.diagonal().sqrt()
    scaled = covariance / scale / scale[:, None]
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if n <= d or failed or not scaled.isfinite().all() or factor.diagonal().min() < 1e-7:
        raise ValueError(
            f"no normal law in {d} dimensions fits the {n} draws of the chains' first halves: they "
            "span fewer directions. Take more draws, or leave out coordinates that are functions "
            "of others"
        )
    return mean, scale[:, None] * factor


def harmonic_mean(log_likelihood: Tensor) -> LogZ:
    """The harmonic mean of the likelihood over draws of the posterior. Don't: see below.

        Z = 1 / E_posterior[1 / likelihood(x)]

    is true, and its sample version is as a rule useless. The mean is ruled by draws of tiny
    likelihood, where the prior is and the posterior hardly goes. The weights `1 / likelihood` have
    a variance only if the integral of `prior / likelihood` is finite: for normal laws, if the prior
    is narrower than the likelihood. Else the estimate is too high in nearly every run, by more the
    vaguer the prior, and its standard error says nothing: draws of the posterior hardly depend on
    the width of the prior, but Z does. Use `evidence`.

    Args:
        log_likelihood: at draws of the posterior, `(n, *batch)`, independent along the first
            dimension, n at least 25.

    Returns:
        A `LogZ`; the standard error is the delta method's, for what it's worth.

    Raises:
        ValueError: too few draws, NaN or infinite values.

    Warns:
        UserWarning: unless the weights' tail (k-hat, see `psis`) shows a finite variance.

    Reference: Newton and Raftery (1994), *Approximate Bayesian inference with the weighted
    likelihood bootstrap*, and Neal's comment in its discussion.

    >>> g = torch.Generator().manual_seed(0)
    >>> x = 1.25**-0.5 * torch.randn(10_000, generator=g)     # prior N(0, 1), a datum 0 of N(x, 4)
    >>> log_z = harmonic_mean(torch.distributions.Normal(x, 2.0).log_prob(torch.tensor(0.0)))
    >>> print(f"{log_z.value:.3f} +/- {log_z.std_error:.3f}")             # -log(10 pi) / 2 = -1.724
    -1.725 +/- 0.002
    """
    k = pareto_k(-log_likelihood)
    if not (k <= 0.5).all():
        largest = float(k.nan_to_num(math.inf).max())
        warnings.warn(
            "the harmonic mean of the likelihood has an infinite variance, or nothing shows that "
            f"it does not (k-hat is up to {largest:.2f}, the limit 0.5): the estimate is probably "
            "far too high. Use companion.logz.evidence",
            stacklevel=2,
        )
    found = log_mean_weight(-log_likelihood)
    return LogZ(-found.value, found.std_error, found.log_weights, found.ess)
