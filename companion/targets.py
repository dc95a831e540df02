"""Targets whose every answer is known: exact draws, moments, normaliser and gradient.

Test a sampler on a target that can betray it. On a symmetric, uncorrelated one, sign errors and
wrong masses go unseen: each target here is asymmetric, correlated or both, save `Gaussian` with the
identity.

A target is a log-density (call it), unnormalised as written in its docstring. Its attributes and
methods:

- `log_prob(x)` = log p~(x), `(..., d) -> (...)`, and `value_and_grad(x)`, the same with its
  gradient `(..., d)`, written by hand (half the cost of autograd's);
- `sample(n, *, generator=None)`: n independent exact draws, `(n, d)`;
- `mean` `(d,)` and `covariance` `(d, d)`; `log_z`, the log of the integral of p~, a float.

Device and dtype are those of the tensors given to the constructor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from companion.inputs import check_count, check_finite, check_generator, check_real

__all__ = ["Banana", "Funnel", "Gaussian", "GaussianMixture", "SkewedProduct"]


class _Target:
    """What the targets share: being called, and the checks of their arguments."""

    mean: Tensor
    covariance: Tensor
    log_z: float

    def __call__(self, x: Tensor) -> Tensor:
        """`log_prob(x)`."""
        return self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """The unnormalised log-density at `x`, `(..., d) -> (...)`."""
        raise NotImplementedError

    def _check(self, x: Tensor) -> Tensor:
        like = self.mean
        if x.shape[-1:] != like.shape or x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"x must be (..., {len(like)}) of {like.dtype} on {like.device}, got "
                f"{tuple(x.shape)} of {x.dtype} on {x.device}"
            )
        return x

    def _noise(self, n: int, generator: torch.Generator | None, *, uniform: bool = False) -> Tensor:
        """Standard normal (or uniform, then float64) numbers, `(n, d)`."""
        check_count("n", n)
        check_generator(generator, self.mean.device)
        make, dtype = (torch.rand, torch.float64) if uniform else (torch.randn, self.mean.dtype)
        shape = (n, len(self.mean))
        return make(shape, dtype=dtype, device=self.mean.device, generator=generator)


class Gaussian(_Target):
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
        _check_parameters(mean=(mean, 1), covariance=(covariance, 2))
        self.mean, self.covariance = mean, covariance
        factor = _cholesky("covariance", covariance, len(mean))
        self._factor = factor.to(mean)
        self._precision = torch.cholesky_inverse(factor).to(mean)
        self.log_z = float(_gaussian_log_z(factor))

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p~(x)`, `(..., d) -> (...)`."""
        centred = self._check(x) - self.mean
        return -0.5 * (centred @ self._precision * centred).sum(-1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log p~(x)`, `(...)`, and its gradient `-Sigma^-1 (x - mu)`, `(..., d)`."""
        centred = self._check(x) - self.mean
        grad = -(centred @ self._precision)
        return 0.5 * (grad * centred).sum(-1), grad

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws, `(n, d)`."""
        return self.mean + self._noise(n, generator) @ self._factor.T


class GaussianMixture(_Target):
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
        _check_parameters(weights=(weights, 1), means=(means, 2), covariances=(covariances, 3))
        if not len(weights) == len(means) == len(covariances):
            raise ValueError(
                f"weights, means and covariances must have one entry a component, got "
                f"{len(weights)}, {len(means)} and {len(covariances)}"
            )
        if not (weights > 0).all():
            raise ValueError(f"weights must be positive, got {weights.tolist()}")
        self.weights, self.means, self.covariances = weights, means, covariances
        factors = _cholesky("covariances", covariances, means.shape[1])
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
        """`log w_k N(x; mu_k, Sigma_k)`, `(..., k)`, and `Sigma_k^-1 (x - mu_k)`, `(..., k, d)`."""
        centred = self._check(x)[..., None, :] - self.means
        pull = torch.einsum("...ki,kij->...kj", centred, self._precisions)
        return self._log_norms - 0.5 * (pull * centred).sum(-1), pull

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p~(x)`, `(..., d) -> (...)`."""
        return self._components(x)[0].logsumexp(-1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log p~(x)`, `(...)`, and its gradient, `(..., d)`.

        Each component pulls with its posterior probability r_k:
        `grad = -sum_k r_k Sigma_k^-1 (x - mu_k)`.
        """
        log_parts, pull = self._components(x)
        return log_parts.logsumexp(-1), -(log_parts.softmax(-1)[..., None] * pull).sum(-2)

    def mode_of(self, x: Tensor) -> Tensor:
        """The component that most probably made each point, `(..., d) -> (...)`, integers."""
        return self._components(x)[0].argmax(-1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws, `(n, d)`."""
        noise = self._noise(n, generator)
        label = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[label] + (self._factors[label] @ noise[:, :, None])[:, :, 0]


class SkewedProduct(_Target):
    """Skewed and correlated in any dimension: `x = A s` with independent Gumbel variables s_i.

    `log p~(x) = -sum_i (s_i + exp(-s_i))` with `s = A^-1 x`, and `log_z = log |det A|`. A Gumbel
    variable has mean 0.5772 (Euler's constant), variance pi^2 / 6 and skewness 1.14: its density
    falls as `exp(-s)` on one side and as `exp(-exp(-s))` on the other, so that no reflection leaves
    it as it was.

    Args:
        matrix: A, `(d, d)`, invertible.

    Raises:
        ValueError: not a square matrix of finite numbers, or a singular one.

    >>> target = SkewedProduct(torch.tensor([[1.0, 0.0], [0.5, 2.0]]))
    >>> target(torch.zeros(3, 2)), round(target.log_z, 4)
    (tensor([-2., -2., -2.]), 0.6931)
    """

    _EULER = 0.5772156649015329

    def __init__(self, matrix: Tensor) -> None:
        _check_parameters(matrix=(matrix, 2))
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got {tuple(matrix.shape)}")
        sign, log_det = torch.linalg.slogdet(matrix.double())
        if sign == 0:
            raise ValueError("matrix is singular: its image has no density")
        self.matrix = matrix
        self._inverse = torch.linalg.inv(matrix.double()).to(matrix)
        self.log_z = float(log_det)
        self.mean = self._EULER * matrix.sum(1)
        self.covariance = math.pi**2 / 6 * matrix @ matrix.T

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p~(x)`, `(..., d) -> (...)`."""
        s = self._check(x) @ self._inverse.T
        return -(s + (-s).exp()).sum(-1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log p~(x)`, `(...)`, and its gradient `A^-T (exp(-s) - 1)`, `(..., d)`."""
        s = self._check(x) @ self._inverse.T
        fall = (-s).exp()
        return -(s + fall).sum(-1), (fall - 1.0) @ self._inverse

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws, `(n, d)`, by inversion: `s = -log(-log u)`."""
        # In float64 whatever the dtype: float32 uniforms are multiples of 2^-24, 0 among them.
        u = self._noise(n, generator, uniform=True).clamp(min=torch.finfo(torch.float64).tiny)
        return (-(-u.log()).log()).to(self.matrix) @ self.matrix.T


class Banana(_Target):
    """A bent normal law: `x_2` has its mean on the parabola `b x_1^2`.

    `log p~(x) = -(x_1^2 / s_1^2 + (x_2 - b x_1^2)^2 / s_2^2 + sum_{i>2} x_i^2 / s_i^2) / 2`: a
    ridge whose direction changes along the way, so that no one step size and no one mass matrix
    suits all of it.

    Args:
        scale: s_i, `(d,)`, positive; d at least 2.
        bend: b.

    Raises:
        ValueError: fewer than two scales, or one that is not positive.

    Reference: Haario, Saksman and Tamminen (1999), *Adaptive proposal distribution for random walk
    Metropolis algorithm* (theirs has `s = (10, 1, 1, ...)`, bends down and is centred).

    >>> target = Banana(torch.tensor([2.0, 1.0]), bend=0.5)
    >>> target.mean, target.covariance
    (tensor([0., 2.]), tensor([[4., 0.],
            [0., 9.]]))
    """

    def __init__(self, scale: Tensor, bend: float) -> None:
        _check_parameters(scale=(scale, 1))
        if len(scale) < 2 or not (scale > 0).all():
            raise ValueError(f"scale must hold at least two positive numbers, got {scale.tolist()}")
        self.scale, self.bend = scale, check_real("bend", bend)
        self.log_z = float(scale.double().log().sum()) + len(scale) * _HALF_LOG_2PI
        variance = scale.square()
        second = torch.zeros_like(scale)
        second[1] = 1.0
        self.mean = second * bend * variance[0]
        self.covariance = torch.diag(variance + second * 2.0 * (bend * variance[0]) ** 2)

    def _straighten(self, x: Tensor) -> Tensor:
        """The independent standard normal variables behind `x`."""
        first, second, rest = self._check(x).tensor_split((1, 2), -1)
        return torch.cat([first, second - self.bend * first.square(), rest], -1) / self.scale

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p~(x)`, `(..., d) -> (...)`."""
        return -0.5 * self._straighten(x).square().sum(-1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log p~(x)`, `(...)`, and its gradient, `(..., d)`."""
        z = self._straighten(x)
        grad = -z / self.scale
        grad[..., 0] -= 2.0 * self.bend * x[..., 0] * grad[..., 1]  # x_1 also moves the parabola
        return -0.5 * z.square().sum(-1), grad

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws, `(n, d)`."""
        x = self._noise(n, generator) * self.scale
        x[:, 1] += self.bend * x[:, 0].square()
        return x


class Funnel(_Target):
    """Neal's funnel: `v = x_0` is normal, and given v the other x_i are, with variance `exp(v)`.

    `log p~(x) = -v^2 / (2 s^2) - (m v + exp(-v) sum_{i>=1} x_i^2) / 2`, for m leaves. Their width
    varies by orders of magnitude: a step size that suits the mouth is far too long for the neck,
    where chains get stuck or never arrive. Look at v, whose law is known.

    Args:
        scale: s, the standard deviation of v, a tensor of shape `()`; 3 in the original.
        num_leaves: m, so that `d = m + 1`; 9 in the original.

    Raises:
        ValueError: a scale that is not one positive number, or no leaf.

    Reference: Neal (2003), *Slice sampling*, section 8.

    >>> target = Funnel(torch.tensor(3.0), num_leaves=9)
    >>> target(torch.zeros(10)), round(target.log_z, 4)
    (tensor(-0.), 10.288)
    """

    def __init__(self, scale: Tensor, num_leaves: int) -> None:
        _check_parameters(scale=(scale, 0))
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {float(scale)}")
        self.scale, self.num_leaves = scale, check_count("num_leaves", num_leaves)
        self.log_z = float(scale.double().log()) + (num_leaves + 1) * _HALF_LOG_2PI
        self.mean = scale.new_zeros(num_leaves + 1)
        variance = (scale.square() / 2.0).exp().repeat(num_leaves + 1)  # of a leaf: E[exp(v)]
        variance[0] = scale.square()
        self.covariance = torch.diag(variance)

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p~(x)`, `(..., d) -> (...)`."""
        v, leaves = self._check(x)[..., 0], x[..., 1:]
        squares = leaves.square().sum(-1)
        return -0.5 * ((v / self.scale).square() + self.num_leaves * v + (-v).exp() * squares)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log p~(x)`, `(...)`, and its gradient, `(..., d)`."""
        v, leaves = self._check(x)[..., :1], x[..., 1:]
        pull = (-v).exp() * leaves
        energy = (pull * leaves).sum(-1, keepdim=True)  # exp(-v) sum x_i^2
        grad_v = 0.5 * (energy - self.num_leaves) - v / self.scale.square()
        value = -0.5 * ((v / self.scale).square() + self.num_leaves * v + energy)
        return value[..., 0], torch.cat([grad_v, -pull], -1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws, `(n, d)`."""
        x = self._noise(n, generator)
        x[:, 0] *= self.scale
        x[:, 1:] *= (0.5 * x[:, :1]).exp()
        return x


# ---------------------------------------------------------------- helpers

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def _gaussian_log_z(factor: Tensor) -> Tensor:
    """log of the integral of exp(-x^T Sigma^-1 x / 2), from the Cholesky factor, in float64."""
    diagonal = factor.double().diagonal(dim1=-2, dim2=-1)
    return diagonal.log().sum(-1) + factor.shape[-1] * _HALF_LOG_2PI


def _check_parameters(**parameters: tuple[Tensor, int]) -> None:
    """Raise unless all are finite floating tensors of the given `ndim`, one dtype and device."""
    first = next(iter(parameters.values()))[0]
    for name, (value, ndim) in parameters.items():
        check_finite(name, value)
        if value.ndim != ndim or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor of {ndim} dimensions, got shape "
                f"{tuple(value.shape)} of {value.dtype}"
            )
        if (value.dtype, value.device) != (first.dtype, first.device):
            raise ValueError(
                f"{' and '.join(parameters)} must share dtype and device; {name} has {value.dtype} "
                f"on {value.device}, expected {first.dtype} on {first.device}"
            )


def _cholesky(name: str, covariance: Tensor, dim: int) -> Tensor:
    """The Cholesky factors of covariances, `(..., d, d)`, in float64; raises if there are none."""
    if covariance.shape[-2:] != (dim, dim):
        raise ValueError(
            f"{name} must end in dimensions ({dim}, {dim}), got {tuple(covariance.shape)}"
        )
    factor, info = torch.linalg.cholesky_ex(covariance.double())
    asymmetry = float((covariance - covariance.mT).abs().max())
    if info.any() or asymmetry > 1e-5 * float(covariance.abs().max()):
        smallest = float(torch.linalg.eigvalsh(covariance.double()).min())
        raise ValueError(
            f"{name} must be symmetric and positive definite; the largest difference from its "
            f"transpose is {asymmetry:.3g}, its smallest eigenvalue {smallest:.3g}"
        )
    return factor
