"""What any annealing path can be asked for, whether it offers a shorter way or not.

A path has `log_prob`, `step` and `sample_base`. It may have a `profile`, a `reverse_step` or a
fused `advance` as well; the functions here take those, or else the generic route.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from companion.core import AnnealingPath
from companion.inputs import check_finite, check_generator

__all__ = [
    "advance",
    "check_path",
    "check_single_path",
    "gain",
    "profile",
    "reverse_step",
    "start",
]


# ---------------------------------------------------------------- what a path may leave out


def profile(path: AnnealingPath, x: Tensor) -> Callable[[Tensor | float], Tensor]:
    """The log-density at `x` as a function of beta, in float64.

    Where the same points are needed at several betas, a path with a method `profile(x)` evaluates
    what does not depend on beta once. Float64, because differences between close betas are what
    matters.

    Args:
        path: any `AnnealingPath`.
        x: points, `(*chains, *event)`.

    Returns:
        A function of beta, a number or a tensor that broadcasts over the chains.
    """
    own = getattr(path, "profile", None)
    if own is not None:
        return cast(Callable[[Tensor | float], Tensor], own(x))
    return lambda beta: path.log_prob(x, beta).double()


def reverse_step(
    path: AnnealingPath,
    x: Tensor,
    beta: Tensor | float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The reversal of `path.step`: its own `reverse_step`, or `step` where it has none."""
    own = getattr(path, "reverse_step", path.step)
    return cast(Tensor, own(x, beta, generator=generator))


def advance(
    path: AnnealingPath,
    x: Tensor,
    beta: Tensor | float,
    next_beta: Tensor | float,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Go from one beta to the next: weigh the points, then move them.

    Args:
        path: any `AnnealingPath`; its own `advance` is used if it has one.
        x: points that follow the density at `beta`, `(*chains, *event)`.
        beta: where they are.
        next_beta: where they go.
        generator: source of randomness.

    Returns:
        The points after a step at `next_beta`, and the increment of their log weights,
        `log p~_next(x) - log p~_beta(x)` at the points that came, `(*chains)`, float64. A point of
        density zero at `beta` has no weight to lose: its increment is minus infinity.
    """
    own = getattr(path, "advance", None)
    if own is not None:
        return cast(tuple[Tensor, Tensor], own(x, beta, next_beta, generator=generator))
    at = profile(path, x)
    increment = gain(at(beta), at(next_beta))
    return path.step(x, next_beta, generator=generator), increment


def gain(before: Tensor, after: Tensor) -> Tensor:
    """By how much a log-density changes; from zero there is no way, whatever comes after."""
    return torch.where(before == -torch.inf, before, after - before)


# ---------------------------------------------------------------- how a run begins


def check_path(path: AnnealingPath) -> None:
    """Raise unless `path` has what an `AnnealingPath` must have."""
    if not isinstance(path, AnnealingPath):
        raise TypeError(f"path must be an AnnealingPath, got {type(path).__name__}")


def check_single_path(path: AnnealingPath) -> None:
    """`check_path`, and raise if the path is that of a batch of machines."""
    check_path(path)
    batch = tuple(torch.as_tensor(path.base_log_z).shape)
    if batch:
        raise ValueError(
            f"expected a path of one model, got that of a batch of machines {batch}: unbind the "
            "machines and take the path of each"
        )


def start(
    path: AnnealingPath,
    shape: tuple[int, ...],
    x0: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The first points, `(*shape, *event)`: draws of the base, or `x0`, checked.

    The last entry of `shape` is the number of chains; `x0` may be `(chains, *event)` for all.
    """
    check_single_path(path)
    if x0 is None:
        x = path.sample_base(math.prod(shape), generator=generator)
        return x.reshape(*shape, *x.shape[1:])
    check_finite("x0", x0)
    check_generator(generator, x0.device)
    base = path.sample_base(1, generator=generator)
    chains, full = ((*dims, *base.shape[1:]) for dims in (shape[-1:], shape))
    if x0.shape not in (chains, full):
        replicas = f", or (R, chains, *event), {full}" if len(shape) > 1 else ""
        raise ValueError(f"x0 must be (chains, *event), {chains}{replicas}; got {tuple(x0.shape)}")
    if x0.dtype != base.dtype:
        raise TypeError(f"x0 must be {base.dtype} as the draws of the base, got {x0.dtype}")
    return x0.detach().expand(full)
