"""Annealing paths of which everything is known exactly. Import as `tests.tempering.exact_paths`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from companion.core import Kernel
from companion.mcmc import GibbsState, MoveInfo
from companion.targets import Gaussian
from companion.tempering import GeometricPath


def natural(base: Gaussian, target: Gaussian, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    """Precision `(..., d, d)` and precision times mean `(..., d)` of the normal law at beta."""
    beta = torch.as_tensor(beta, dtype=torch.float64, device=base.mean.device)[..., None]
    p0, p1 = (law.covariance.double().inverse() for law in (base, target))
    h0, h1 = p0 @ base.mean.double(), p1 @ target.mean.double()
    precision = (1.0 - beta[..., None]) * p0 + beta[..., None] * p1
    return precision, (1.0 - beta) * h0 + beta * h1


def moments_at(base: Gaussian, target: Gaussian, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean `(..., d)` and covariance `(..., d, d)` at beta, float64."""
    precision, shift = natural(base, target, beta)
    covariance = precision.inverse()
    return (covariance @ shift[..., None])[..., 0], covariance


def log_z_at(base: Gaussian, target: Gaussian, beta: Tensor | float) -> Tensor:
    """Log Z at beta `(...)`, float64; of the geometric path between the two as they are, so that
    `log Z` is `law.log_z` at both ends. Beta may leave [0, 1] while the precision is positive."""
    precision, shift = natural(base, target, beta)
    beta = torch.as_tensor(beta, dtype=torch.float64, device=shift.device)
    mean = moments_at(base, target, beta)[0]
    at_zero = [
        float(law.mean.double() @ law.covariance.double().inverse() @ law.mean.double())
        for law in (base, target)
    ]
    constant = (1.0 - beta) * at_zero[0] + beta * at_zero[1]
    d = shift.shape[-1]
    quadratic = (shift * mean).sum(-1) - constant
    return 0.5 * (d * math.log(2.0 * math.pi) - precision.logdet() + quadratic)


def exact_kernel(base: Gaussian, target: Gaussian):
    """`kernel(log_prob, beta)` for a `GeometricPath`: each step is an independent exact draw."""

    def make(log_prob, beta: Tensor) -> Kernel:
        mean, covariance = moments_at(base, target, beta)
        factor = torch.linalg.cholesky(covariance)

        def step(state: GibbsState, *, generator: torch.Generator | None = None):
            x = state.x
            noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            y = mean.to(x) + (factor.to(x) @ noise[..., None])[..., 0]
            one = torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device)
            return GibbsState(y), MoveInfo(one, one > 0, one < 0)

        return Kernel(GibbsState, step)

    return make


def exact_path(base: Gaussian, target: Gaussian) -> GeometricPath:
    """The path from one normal law to another whose steps are independent exact draws."""
    return GeometricPath(base, target, exact_kernel(base, target))
