"""Annealing paths of which everything is known exactly. Import as `tests.tempering.exact_paths`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from companion.core import Kernel
from companion.mcmc import GibbsState, MoveInfo
from companion.targets import Gaussian
from companion.tempering import GeometricPath

F64 = torch.float64


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


class ExactGaussians:
    """Between two normal laws with independent coordinates; unnormalised, both.

    A step is `x -> mu + rho (x - mu) + sqrt(1 - rho^2) sigma z` with the mean and the standard
    deviation at beta: an exact independent draw for `rho = 0`, a slow reversible kernel near 1.
    """

    def __init__(self, mean0, sd0, mean1, sd1, *, rho=0.0, dtype=F64, device="cpu"):
        ends = [torch.as_tensor(a, dtype=F64, device=device) for a in (mean0, sd0, mean1, sd1)]
        self.mean0, self.sd0, self.mean1, self.sd1 = ends
        self.rho, self.dtype, self.device = rho, dtype, torch.device(device)
        self.base_log_z = self.log_z(0.0)

    def moments(self, beta) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation at beta, `(*beta.shape, d)`."""
        beta = torch.as_tensor(beta, dtype=F64, device=self.device)[..., None]
        p0, p1 = (1.0 - beta) / self.sd0.square(), beta / self.sd1.square()
        return (p0 * self.mean0 + p1 * self.mean1) / (p0 + p1), (p0 + p1).rsqrt()

    def log_z(self, beta) -> Tensor:
        mean, sd = self.moments(beta)
        beta = torch.as_tensor(beta, dtype=F64, device=self.device)[..., None]
        squares = (1.0 - beta) * (self.mean0 / self.sd0).square()
        squares = squares + beta * (self.mean1 / self.sd1).square() - (mean / sd).square()
        return (sd.log() + 0.5 * math.log(2.0 * math.pi) - 0.5 * squares).sum(-1)

    def sample(self, n: int, beta, *, generator=None) -> Tensor:
        """Exact draws at beta, `(n, d)`; a tensor of betas has n entries."""
        mean, sd = self.moments(beta)
        like = {"dtype": F64, "device": self.device, "generator": generator}
        return (mean + sd * torch.randn(n, len(self.sd0), **like)).to(self.dtype)

    def sample_base(self, n: int, *, generator=None) -> Tensor:
        return self.sample(n, 0.0, generator=generator)

    def log_prob(self, x: Tensor, beta) -> Tensor:
        beta = torch.as_tensor(beta, dtype=F64, device=self.device)
        base = -0.5 * ((x - self.mean0) / self.sd0).square().sum(-1)
        target = -0.5 * ((x - self.mean1) / self.sd1).square().sum(-1)
        return ((1.0 - beta) * base + beta * target).to(x.dtype)

    def step(self, x: Tensor, beta, *, generator=None) -> Tensor:
        mean, sd = self.moments(beta)
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        moved = mean + self.rho * (x - mean) + math.sqrt(1.0 - self.rho**2) * sd * noise
        return moved.to(x.dtype)


class Ring:
    """A path on the states 0, ..., m - 1 of a ring, from one table of log-densities to another.

    A step goes forward with probability `min p / p(x)`, or stays: as much flows into every state
    as out of it. It is as far from reversible as can be; its reversal goes backward.
    """

    def __init__(self, base, target, *, device="cpu"):
        ends = [torch.as_tensor(table, dtype=F64, device=device) for table in (base, target)]
        self.base, self.target = ends
        self.base_log_z = self.base.logsumexp(0)

    def table(self, beta) -> Tensor:
        """Log-density of all states, `(*beta.shape, m)`."""
        beta = torch.as_tensor(beta, dtype=F64, device=self.base.device)[..., None]
        return (1.0 - beta) * self.base + beta * self.target

    def law(self, beta) -> Tensor:
        return self.table(beta).softmax(-1)

    def log_z(self, beta) -> Tensor:
        return self.table(beta).logsumexp(-1)

    def sample_base(self, n: int, *, generator=None) -> Tensor:
        return torch.multinomial(self.law(0.0), n, True, generator=generator)

    def log_prob(self, x: Tensor, beta) -> Tensor:
        beta = torch.as_tensor(beta, dtype=F64, device=self.base.device)
        return (1.0 - beta) * self.base[x] + beta * self.target[x]

    def _move(self, x: Tensor, beta, by: int, generator) -> Tensor:
        p = self.law(torch.as_tensor(beta, dtype=F64, device=x.device).expand(x.shape))
        moves = p.min(-1).values / p.gather(-1, x[..., None])[..., 0]
        u = torch.rand(x.shape, dtype=F64, device=x.device, generator=generator)
        return torch.where(u < moves, (x + by) % len(self.base), x)

    def step(self, x: Tensor, beta, *, generator=None) -> Tensor:
        return self._move(x, beta, 1, generator)

    def reverse_step(self, x: Tensor, beta, *, generator=None) -> Tensor:
        return self._move(x, beta, -1, generator)
