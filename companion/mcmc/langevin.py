"""Langevin moves: follow the gradient for a step of size e, and add noise.

The diffusion `dx = grad log p(x) / 2 dt + dW` leaves p invariant. In steps of `dt = e^2` it is

    y = x + e^2 / 2 M^-1 grad log p~(x) + e M^-1 q,    q ~ N(0, M).

`ula` takes every such step. It is biased: its invariant law is off by O(e^2), and on `N(0, s^2)`
its variance is `s^2 / (1 - e^2 / (4 s^2))`, too wide. `mala` corrects that by accepting or
rejecting. It is Hamiltonian Monte Carlo with one leapfrog step of size e, draw for draw.
"""

from __future__ import annotations

from torch import Tensor

from companion.core import Kernel, LogProb, value_and_grad
from companion.mcmc.base import (
    GradientState,
    MoveInfo,
    MoveNoise,
    check_step_size,
    init_gradient,
    metropolis_accept,
    move_kernel,
    per_chain,
    select,
)
from companion.mcmc.mass import Mass, kinetic_energy, mass_for, momentum, velocity

__all__ = ["mala", "mala_step", "ula", "ula_step"]


# ---------------------------------------------------------------- unadjusted


def ula_step(
    log_prob: LogProb, step_size: Tensor | float, state: GradientState, noise: MoveNoise
) -> tuple[GradientState, MoveInfo]:
    """One step of `ula`, a pure function of state and noise (the uniform numbers are not used)."""
    e = per_chain(step_size, state)
    y = state.x + e * (noise.normal + 0.5 * e * state.grad)
    value, grad = value_and_grad(log_prob, y)
    # Where the density is zero or not a number the gradient leads nowhere: such a step isn't taken.
    total = value + grad.reshape(*value.shape, -1).sum(-1)
    is_nan = total.isnan()
    accepted = total.isfinite()
    info = MoveInfo(accepted.to(value.dtype), accepted, is_nan)
    return select(accepted, GradientState(y, value, grad), state), info


def ula(log_prob: LogProb, step_size: Tensor | float, *, compile: bool = False) -> Kernel:
    """The unadjusted Langevin algorithm: `y = x + e^2 / 2 grad log p~(x) + e z`, always taken.

    Biased: chains converge to another law than the target, closer to it the smaller e is, the error
    being O(e^2). Steps to where the log-density or gradient is not finite are not taken.

    A step costs one gradient.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        step_size: e, positive: a number, or a tensor that broadcasts over the chains. (Where a text
            writes `y = x + h grad + sqrt(2 h) z`, `h = e^2 / 2`.)
        compile: compile the pure step with `torch.compile`.

    Returns:
        A `Kernel` with a `GradientState` and a `MoveInfo`.

    Raises:
        ValueError: a step size that is not positive; by `init`, a start where the log-density or
            its gradient is not finite.
        TypeError: by `init`, points that are not floating.

    Reference: Roberts and Tweedie (1996), *Exponential convergence of Langevin distributions and
    their discrete approximations*.

    >>> import torch
    >>> from companion.core import sample
    >>> g = torch.Generator().manual_seed(0)
    >>> kernel = ula(lambda x: -0.5 * x.square(), 1.0)            # N(0, 1)
    >>> f"{sample(kernel, torch.zeros(2000), 500, warmup=20, generator=g).x.var():.2f}"   # 4 / 3
    '1.33'
    """
    step_size = check_step_size("step_size", step_size)

    def pure(_: None, state: GradientState, noise: MoveNoise) -> tuple[GradientState, MoveInfo]:
        return ula_step(log_prob, step_size, state, noise)

    def init(x: Tensor) -> GradientState:
        state = init_gradient(log_prob, x)
        per_chain(step_size, state)
        return state

    return move_kernel(init, pure, lambda state: None, compile)


# ---------------------------------------------------------------- adjusted


def mala_step(
    log_prob: LogProb,
    step_size: Tensor | float,
    mass: Mass,
    state: GradientState,
    noise: MoveNoise,
) -> tuple[GradientState, MoveInfo]:
    """One step of `mala`, a pure function of state and noise.

    With `q ~ N(0, M)` the proposal is `y = x + e M^-1 (q + e/2 grad(x))`. The momentum that leads
    back from y to x is `-(q + e/2 grad(x) + e/2 grad(y))`, and the ratio of the proposal's
    densities is that of the two momenta's.
    """
    e = per_chain(step_size, state)
    q = momentum(mass, noise.normal)
    kicked = q + 0.5 * e * state.grad
    y = state.x + e * velocity(mass, kicked)
    value, grad = value_and_grad(log_prob, y)
    back = kicked + 0.5 * e * grad
    correction = kinetic_energy(mass, q, value) - kinetic_energy(mass, back, value)
    info = metropolis_accept(value - state.log_prob + correction, noise.uniform)
    return select(info.accepted, GradientState(y, value, grad), state), info


def mala(
    log_prob: LogProb,
    step_size: Tensor | float,
    mass: Tensor | None = None,
    *,
    compile: bool = False,
) -> Kernel:
    """The Metropolis-adjusted Langevin algorithm: a Langevin step, accepted or rejected.

    `y = x + e^2 / 2 M^-1 grad log p~(x) + e M^-1 q` with `q ~ N(0, M)`, accepted with probability
    `min(1, p~(y) q(x | y) / (p~(x) q(y | x)))`. In many dimensions 57 % accepted is best.

    A step costs one gradient.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        step_size: e, positive: a number, or a tensor that broadcasts over the chains. It is HMC's.
        mass: M, the covariance of the momentum q, as for `hmc`: None for the identity, a tensor of
            the event's shape for a diagonal, or `(d, d)` for events of shape `(d,)`. The noise has
            covariance `e^2 M^-1`.
        compile: compile the pure step with `torch.compile`.

    Returns:
        A `Kernel` with a `GradientState` and a `MoveInfo`.

    Raises:
        ValueError: a step size or mass that is not as said; by `init`, a start where the
            log-density or its gradient is not finite.
        TypeError: an argument of another type; by `init`, points that are not floating.

    Reference: Roberts and Tweedie (1996), as above; Roberts and Rosenthal (1998), *Optimal scaling
    of discrete approximations to Langevin diffusions*.

    >>> import torch
    >>> from companion.core import sample
    >>> g = torch.Generator().manual_seed(0)
    >>> kernel = mala(lambda x: -0.5 * x.square(), 1.0)           # N(0, 1)
    >>> f"{sample(kernel, torch.zeros(2000), 500, warmup=20, generator=g).x.var():.2f}"
    '1.00'
    """
    step_size = check_step_size("step_size", step_size)
    mass_of = mass_for(mass)

    def pure(mass: Mass, state: GradientState, noise: MoveNoise) -> tuple[GradientState, MoveInfo]:
        return mala_step(log_prob, step_size, mass, state, noise)

    def init(x: Tensor) -> GradientState:
        state = init_gradient(log_prob, x)
        mass_of(state), per_chain(step_size, state)  # speak up before the first step
        return state

    return move_kernel(init, pure, mass_of, compile)
