"""What the targets share: being called, noise, and the checks of their arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from companion.inputs import check_count, check_finite, check_generator

__all__ = ["HALF_LOG_2PI", "Target", "check_parameters", "cholesky"]

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Target:
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

    @property
    def _like(self) -> Tensor:
        """Some tensor of the shape, dtype and device of a point."""
        return self.mean

    def _check(self, x: Tensor) -> Tensor:
        like = self._like
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


def check_parameters(**parameters: tuple[Tensor, int]) -> None:
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


def cholesky(name: str, covariance: Tensor, dim: int) -> Tensor:
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
