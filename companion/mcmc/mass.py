"""The mass matrix M of Hamiltonian and Langevin moves: the covariance of the momentum.

`p ~ N(0, M)`, so that `p = L z` with `M = L L^T` and standard normal z; the velocity is `M^-1 p`
and the kinetic energy `p^T M^-1 p / 2`. Where a coordinate of the target varies little, its mass
should be large: the ideal M is the inverse of the target's covariance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from companion.inputs import check_finite
from companion.mcmc.base import ChainState, GradientState

__all__ = [
    "Mass",
    "dot",
    "kinetic_energy",
    "make_mass",
    "mass_for",
    "momentum",
    "velocity",
    "whiten",
]


class Mass(NamedTuple):
    """A mass matrix, factorised once. The tensors are None for the identity."""

    factor: Tensor | None
    """L: the Cholesky factor `(d, d)`, or the square roots of a diagonal, of the event's shape."""
    inverse: Tensor | None
    """`M^-1`: `(d, d)`, or the reciprocals of a diagonal, of the event's shape."""
    inverse_factor: Tensor | None
    """`L^-1`, likewise."""
    is_dense: bool = False


def make_mass(
    mass: Tensor | None,
    event_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    *,
    name: str = "mass",
) -> Mass:
    """Check and factorise a mass matrix.

    Args:
        mass: M: None (the identity), a tensor of the event's shape (a diagonal), or `(d, d)` for an
            event of shape `(d,)`.
        event_shape: shape of a point.
        dtype: that of the points.
        device: that of the points.
        name: what the messages call it.

    Returns:
        A `Mass`.

    Raises:
        TypeError: not a tensor.
        ValueError: a shape, dtype or device that does not fit, entries of a diagonal that are not
            positive, or a matrix that is not symmetric and positive definite.

    >>> mass = make_mass(torch.tensor([4.0, 0.25]), torch.Size([2]), torch.float32,
    ...                  torch.device("cpu"))
    >>> mass.factor, mass.inverse
    (tensor([2.0000, 0.5000]), tensor([0.2500, 4.0000]))
    """
    if mass is None:
        return Mass(None, None, None)
    check_finite(name, mass)
    is_dense = len(event_shape) == 1 and mass.shape == event_shape * 2
    if not is_dense and mass.shape != event_shape:
        matrix = f", or {tuple(event_shape * 2)}" if len(event_shape) == 1 else ""
        raise ValueError(
            f"{name} must have the shape of a point, {tuple(event_shape)}{matrix}, got "
            f"{tuple(mass.shape)}"
        )
    if mass.dtype != dtype or mass.device != device:
        raise ValueError(
            f"{name} must be of {dtype} on {device} as the points are, got {mass.dtype} on "
            f"{mass.device}"
        )
    mass = mass.detach()
    if not is_dense:
        if not (mass > 0).all():
            raise ValueError(f"{name} must be positive, its smallest entry is {float(mass.min())}")
        return Mass(mass.sqrt(), mass.reciprocal(), mass.rsqrt())
    factor, info = torch.linalg.cholesky_ex(mass.double())  # once, so in full precision
    asymmetry = float((mass - mass.mT).abs().max())
    if info.any() or asymmetry > 1e-5 * float(mass.abs().max()):
        raise ValueError(
            f"{name} must be symmetric and positive definite; the largest difference from its "
            f"transpose is {asymmetry:.3g}, its smallest eigenvalue "
            f"{float(torch.linalg.eigvalsh(mass.double()).min()):.3g}"
        )
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse_factor = torch.linalg.solve_triangular(factor, eye, upper=False)
    inverse = inverse_factor.T @ inverse_factor
    return Mass(factor.to(dtype), inverse.to(dtype), inverse_factor.to(dtype), is_dense=True)


def mass_for(
    mass: Tensor | None, *, name: str = "mass"
) -> Callable[[ChainState | GradientState], Mass]:
    """`make_mass(mass, ...)` for the points of a state, done once for each kind of points.

    >>> state = GradientState(torch.zeros(5, 2), torch.zeros(5), torch.zeros(5, 2))
    >>> mass_for(torch.tensor([4.0, 0.25]))(state).factor
    tensor([2.0000, 0.5000])
    """
    if mass is not None and not isinstance(mass, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(mass).__name__}")
    make = functools.cache(functools.partial(make_mass, mass, name=name))

    def of(state: ChainState | GradientState) -> Mass:
        x = state.x
        return make(x.shape[state.log_prob.ndim :], x.dtype, x.device)

    return of


def momentum(mass: Mass, normal: Tensor) -> Tensor:
    """`L z`, which is `N(0, M)` for standard normal z, `(*chains, *event)`."""
    if mass.factor is None:
        return normal
    return normal @ mass.factor.T if mass.is_dense else normal * mass.factor


def velocity(mass: Mass, p: Tensor) -> Tensor:
    """`M^-1 p`, `(*chains, *event)`; p itself for the identity."""
    if mass.inverse is None:
        return p
    return p @ mass.inverse if mass.is_dense else p * mass.inverse


def whiten(mass: Mass, p: Tensor) -> Tensor:
    """`L^-1 p`, which is `N(0, I)` for `p ~ N(0, M)`: `p^T M^-1 q` is the dot product of two."""
    if mass.inverse_factor is None:
        return p
    return p @ mass.inverse_factor.T if mass.is_dense else p * mass.inverse_factor


def dot(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """The dot product of two points chain by chain, `(*chains)` as `like` is.

    >>> dot(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.ones(2, 2), torch.zeros(2))
    tensor([3., 1.])
    """
    if a.ndim != like.ndim + 1:
        a, b = a.reshape(*like.shape, -1), b.reshape(*like.shape, -1)
    return torch.linalg.vecdot(a, b)


def kinetic_energy(mass: Mass, p: Tensor, like: Tensor) -> Tensor:
    """`p^T M^-1 p / 2`, `(*chains)` as `like` is.

    >>> mass = make_mass(torch.tensor(4.0), torch.Size([]), torch.float32, torch.device("cpu"))
    >>> kinetic_energy(mass, torch.tensor([2.0, 4.0]), torch.zeros(2))
    tensor([0.5000, 2.0000])
    """
    return 0.5 * dot(p, velocity(mass, p), like)
