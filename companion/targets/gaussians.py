"""The normal law and mixtures of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from companion.targets.base import HALF_LOG_2PI, Target, check_parameters, cholesky

__all__ = ["Gaussian", "GaussianMixture"]


class Gaussian(Target):
    """The normal law: `log p~(x) = -(x - mu)^T Sigma^-1 (x - mu) / 2`.

    Args:
        mean: mu, `(d,)`.
        covariance: Sigma, `(d, d)`, symmetric and positive definite.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a covariance that is none.

    >>> target = Gaussian(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> target(torch.tensor([[2.0, 2.0], [2.0, 3.0]]))
    tensor([-0.3333, -0.3333])
    >>> round(target.log_z, 4)                                         # log(2 pi sqrt(3))
    2.3872
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        check_parameters(mean=(mean, 1), covariance=(covariance, 2))
        self.mean, self.covariance = mean, covariance
        factor = cholesky("covariance", covariance, len(mean))
        self._factor = factor.to(mean)
        self._precision = torch.cholesky_inverse(factor).to(mean).contiguous()
        self.log_z = float(_gaussian_log_z(factor))

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p~(x)`, `(..., d) -> (...)`."""
        centred = self._check(x) - self.mean
        if centred.ndim > 1 and centred.shape[-1] <= _NARROW:
            pull = (self._precision @ centred.mT).mT
        else:
            pull = centred @ self._precision
        return -0.5 * (pull * centred).sum(-1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log p~(x)`, `(...)`, and its gradient `-Sigma^-1 (x - mu)`, `(..., d)`."""
        missing = self.mean - self._check(x)
        grad = missing @ self._precision
        return -0.5 * (grad * missing).sum(-1), grad

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient alone, `(..., d)`."""
        return (self.mean - self._check(x)) @ self._precision

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws, `(n, d)`."""
        return self.mean + self._noise(n, generator) @ self._factor.T


class GaussianMixture(Target):
    """A mixture of normal laws: `log p~(x) = log sum_k w_k N(x; mu_k, Sigma_k)`.

    With unequal weights on well-separated modes it shows whether a sampler that reached every mode
    also visits each as often as it should. `log_z = log sum_k w_k`: the weights need not sum to 1.

    Args:
        weights: w_k, `(k,)`, positive.
        means: mu_k, `(k, d)`.
        covariances: Sigma_k, `(k, d, d)`, symmetric and positive definite.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a weight that is not positive, or a
            covariance that is none.

    >>> means = torch.tensor([[-4.0, 0.0], [4.0, 1.0]])
    >>> target = GaussianMixture(torch.tensor([1.0, 3.0]), means, torch.eye(2).expand(2, 2, 2))
    >>> target.mean, round(target.log_z, 4)
    (tensor([2.0000, 0.7500]), 1.3863)
    >>> target.mode_of(torch.tensor([[-3.0, 0.0], [3.0, 3.0]]))
    tensor([0, 1])
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        check_parameters(weights=(weights, 1), means=(means, 2), covariances=(covariances, 3))
        if not len(weights) == len(means) == len(covariances):
            raise ValueError(
                f"weights, means and covariances must have one entry a component, got "
                f"{len(weights)}, {len(means)} and {len(covariances)}"
            )
        if not (weights > 0).all():
            raise ValueError(f"weights must be positive, got {weights.tolist()}")
        self.weights, self.means, self.covariances = weights, means, covariances
        factors = cholesky("covariances", covariances, means.shape[1])
        self._factors = factors.to(means)
        self._precisions = torch.cholesky_inverse(factors).to(means)
        self._log_norms = (weights.double().log() - _gaussian_log_z(factors)).to(means)
        self.log_z = math.log(float(weights.double().sum()))
        share = (weights / weights.sum())[:, None]
        self.mean = (share * means).sum(0)
        spread = means - self.mean
        within = (share[:, :, None] * covariances).sum(0)
        self.covariance = within + (share * spread).T @ spread

    def _components(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log w_k N(x; mu_k, Sigma_k)`, `(k, n)`, and `Sigma_k^-1 (x - mu_k)`, `(k, n, d)`.

        n points in all, in one row; components come first, as one batch of products.
        """
        centred = self._check(x).reshape(-1, len(self.mean)) - self.means[:, None]
        pull = centred @ self._precisions
        return self._log_norms[:, None] - 0.5 * (pull * centred).sum(-1), pull

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p~(x)`, `(..., d) -> (...)`."""
        return _log_sum_exp(self._components(x)[0]).reshape(x.shape[:-1])

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log p~(x)`, `(...)`, and its gradient, `(..., d)`.

        Each component pulls with its posterior probability r_k:
        `grad = -sum_k r_k Sigma_k^-1 (x - mu_k)`.
        """
        log_parts, pull = self._components(x)
        value = _log_sum_exp(log_parts)
        share = (log_parts - value).clamp(min=_NEGLIGIBLE).exp()
        return value.reshape(x.shape[:-1]), -(share[..., None] * pull).sum(0).reshape(x.shape)

    def mode_of(self, x: Tensor) -> Tensor:
        """The component that most probably made each point, `(..., d) -> (...)`, integers."""
        return self._components(x)[0].argmax(0).reshape(x.shape[:-1])

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws, `(n, d)`."""
        noise = self._noise(n, generator)
        label = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[label] + (self._factors[label] @ noise[:, :, None])[:, :, 0]


_NARROW = 16
"""Up to this many dimensions a product with many points is two to four times as fast if the points
are its columns; beyond, what is gained there is lost in reading them across."""

_NEGLIGIBLE = -80.0
"""A logarithm below which a part of a sum of order 1 is lost to rounding. `exp` takes up to ten
times as long where it underflows, as the parts of far components do."""


def _log_sum_exp(log_parts: Tensor) -> Tensor:
    """`log_parts.logsumexp(0)` of finite numbers, fast where most of them are very small."""
    largest = log_parts.amax(0)
    return (log_parts - largest).clamp(min=_NEGLIGIBLE).exp().sum(0).log() + largest


def _gaussian_log_z(factor: Tensor) -> Tensor:
    """log of the integral of exp(-x^T Sigma^-1 x / 2), from the Cholesky factor, in float64."""
    diagonal = factor.double().diagonal(dim1=-2, dim2=-1)
    return diagonal.log().sum(-1) + factor.shape[-1] * HALF_LOG_2PI
