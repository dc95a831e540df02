"""Hamiltonian Monte Carlo with a fixed number of leapfrog steps.

Draw a momentum `p ~ N(0, M)`, follow the dynamics of `H(x, p) = -log p~(x) + p^T M^-1 p / 2` for a
while, and accept where it leads with probability `min(1, exp(H(x, p) - H(x', p')))`. The leapfrog
steps preserve volume and are their own inverse once p is negated, so no other factor appears. The
negation itself can be left out: H is even in p, and the next step draws p anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from companion.core import Kernel, LogProb
from companion.hmc.integrator import leapfrog
from companion.inputs import check_count
from companion.mcmc.base import (
    GradientState,
    MoveNoise,
    check_step_size,
    init_gradient,
    metropolis_accept,
    move_kernel,
    per_chain,
    select,
)
from companion.mcmc.mass import Mass, kinetic_energy, mass_for, momentum

__all__ = ["HmcInfo", "hmc", "hmc_step"]

MAX_ENERGY_ERROR = 1000.0  # beyond it a trajectory has left the path that it should follow


class HmcInfo(NamedTuple):
    """What a step did to each chain; every field is `(*chains)`."""

    accept_prob: Tensor
    """The probability with which the end of the trajectory was accepted."""
    accepted: Tensor
    """Whether it was, boolean."""
    is_nan: Tensor
    """Whether its energy was NaN or minus infinity (it is then rejected), boolean."""
    is_divergent: Tensor
    """Whether it was, or more than 1000 above that of the start, boolean."""
    energy: Tensor
    """H of the point that was kept, with the momentum that it had in this step."""


def hmc_step(
    log_prob: LogProb,
    step_size: Tensor | float,
    num_steps: int,
    mass: Mass,
    state: GradientState,
    noise: MoveNoise,
) -> tuple[GradientState, HmcInfo]:
    """One step of HMC, a pure function of state and noise; the arguments are those of `hmc`."""
    p = momentum(mass, noise.normal)
    step_size = per_chain(step_size, state)
    end = leapfrog(log_prob, state.x, p, state.grad, step_size, num_steps, mass)
    before = kinetic_energy(mass, p, state.log_prob) - state.log_prob
    after = kinetic_energy(mass, end.p, state.log_prob) - end.log_prob
    move = metropolis_accept(before - after, noise.uniform)
    diverged = ~(after - before <= MAX_ENERGY_ERROR) | move.is_nan
    energy = torch.where(move.accepted, after, before)
    proposal = GradientState(end.x, end.log_prob, end.grad)
    return select(move.accepted, proposal, state), HmcInfo(*move, diverged, energy)


def hmc(
    log_prob: LogProb,
    step_size: Tensor | float,
    num_steps: int,
    mass: Tensor | None = None,
    *,
    compile: bool = False,
) -> Kernel:
    """Hamiltonian Monte Carlo: Metropolis proposals at the end of `num_steps` leapfrog steps.

    A step costs `num_steps` gradients. With one it is `companion.mcmc.mala`.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`; its own `value_and_grad`, if it
            has one, halves the cost of autograd or better, and its own `gradient` spares what the
            value costs on the way: a tenth for a normal law, half for a logistic regression.
        step_size: e, positive: a number, or a tensor that broadcasts over the chains.
        num_steps: leapfrog steps a trajectory, at least 1.
        mass: M, the covariance of the momentum (not its standard deviation): None for the identity,
            a tensor of the event's shape for a diagonal, or `(d, d)` for events of shape `(d,)`.
        compile: compile the pure step, the whole trajectory included, and blocks of steps for
            `sample`, with `torch.compile`. That takes some three seconds a leapfrog step at first,
            and saves the more the fewer the chains are: one chain is four to six times as fast.

    Returns:
        A `Kernel` with a `GradientState` and an `HmcInfo`.

    Raises:
        ValueError: a step size, number of steps or mass that is not as said; by `init`, a start
            where the log-density or its gradient is not finite.
        TypeError: an argument of another type; by `init`, points that are not floating.

    Reference: Duane, Kennedy, Pendleton and Roweth (1987), *Hybrid Monte Carlo*; Neal (2011), *MCMC
    using Hamiltonian dynamics*.

    >>> from companion.core import sample
    >>> from companion.targets import Gaussian
    >>> target = Gaussian(torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    >>> g = torch.Generator().manual_seed(0)
    >>> trace = sample(hmc(target, 0.3, 10), torch.zeros(100, 2), 100, warmup=20, generator=g)
    >>> print([f"{m:.1f}" for m in trace.x.mean((0, 1))], f"{trace.accept_prob.mean():.2f}")
    ['3.0', '1.0'] 0.96
    """
    step_size = check_step_size("step_size", step_size)
    check_count("num_steps", num_steps)
    mass_of = mass_for(mass)

    def pure(mass: Mass, state: GradientState, noise: MoveNoise) -> tuple[GradientState, HmcInfo]:
        return hmc_step(log_prob, step_size, num_steps, mass, state, noise)

    def init(x: Tensor) -> GradientState:
        state = init_gradient(log_prob, x)
        mass_of(state)
        per_chain(step_size, state)
        return state

    return move_kernel(init, pure, mass_of, compile)
