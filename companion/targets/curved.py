"""Targets that no linear map makes normal: skewed, bent, and of a width that varies."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from companion.inputs import check_count, check_real
from companion.targets.base import HALF_LOG_2PI, Target, check_parameters

__all__ = ["Banana", "Funnel", "SkewedProduct"]


class SkewedProduct(Target):
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
        check_parameters(matrix=(matrix, 2))
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
        s = linear(self._check(x), self._inverse)
        return -(s + (-s).exp()).sum(-1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log p~(x)`, `(...)`, and its gradient `A^-T (exp(-s) - 1)`, `(..., d)`."""
        s = linear(self._check(x), self._inverse)
        fall = (-s).exp()
        return -(s + fall).sum(-1), (fall - 1.0) @ self._inverse

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws, `(n, d)`, by inversion: `s = -log(-log u)`."""
        # In float64 whatever the dtype: float32 uniforms are multiples of 2^-24, 0 among them.
        u = self._noise(n, generator, uniform=True).clamp(min=torch.finfo(torch.float64).tiny)
        return (-(-u.log()).log()).to(self.matrix) @ self.matrix.T


class Banana(Target):
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
        check_parameters(scale=(scale, 1))
        if len(scale) < 2 or not (scale > 0).all():
            raise ValueError(f"scale must hold at least two positive numbers, got {scale.tolist()}")
        self.scale, self.bend = scale, check_real("bend", bend)
        self.log_z = float(scale.double().log().sum()) + len(scale) * HALF_LOG_2PI
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


class Funnel(Target):
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
        check_parameters(scale=(scale, 0))
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {float(scale)}")
        self.scale, self.num_leaves = scale, check_count("num_leaves", num_leaves)
        self.log_z = float(scale.double().log()) + (num_leaves + 1) * HALF_LOG_2PI
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
