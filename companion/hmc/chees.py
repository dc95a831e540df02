"""ChEES-HMC: many chains in one batch learn how long a trajectory should be.

NUTS lets each chain choose its own length, so that a batch waits for the slowest. Here all chains
make the same number of leapfrog steps, and the length is learned by gradient ascent on the *change
in the estimator of the expected square*, the criterion that gives the method its name:
`C = E[(|x' - E x|^2 - |x - E x|^2)^2] / 4`, for a chain at x and the end x' of its trajectory. It
is largest when squared distances from the mean, and not only the positions, have been forgotten.

A fixed length can resonate with the target: after a whole period x' is x again. So each step makes
only a fraction of the length, after the van der Corput sequence 1/2, 1/4, 3/4, 1/8, 5/8, ..., which
covers all fractions evenly. The fraction depends on nothing but the number of the step, so each
step is one of ordinary HMC and leaves the target invariant.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from companion.core import Kernel, LogProb
from companion.hmc.adaptation import DualAveraging, Tuned, check_steps, find_step_size, run_frozen
from companion.hmc.integrator import Phase, leapfrog
from companion.hmc.static import HmcInfo, hmc_step
from companion.inputs import check_count, check_finite, check_generator, check_real
from companion.mcmc.base import (
    GradientState,
    MoveInfo,
    init_gradient,
    metropolis_accept,
    move_noise,
    select,
)
from companion.mcmc.mass import Mass, kinetic_energy, mass_for, momentum

__all__ = ["JitteredState", "chees_warmup", "jittered_hmc"]


class JitteredState(NamedTuple):
    """Where the chains are, and which step comes next."""

    x: Tensor
    """The points, `(*chains, *event)`."""
    log_prob: Tensor
    """The log-density there, `(*chains)`."""
    grad: Tensor
    """Its gradient, `(*chains, *event)`."""
    num_moves: Tensor
    """Steps of the kernel so far, integers, `(*chains)`."""


def jittered_hmc(
    log_prob: LogProb, step_size: float, trajectory_length: float, mass: Tensor | None = None
) -> Kernel:
    """HMC whose trajectory length varies from step to step, the same for all chains.

    Step i makes `ceil(u_i T / e)` leapfrog steps of size e, where u_i is entry i of the van der
    Corput sequence and T the longest length: a step costs `T / (2 e)` gradients on average.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        step_size: e, a positive number.
        trajectory_length: T, positive, in the unit of `step_size`.
        mass: as for `hmc`.

    Returns:
        A `Kernel` with a `JitteredState` and an `HmcInfo`.

    Raises:
        ValueError: a step size or length that is not positive; else as `hmc`.

    Reference: Hoffman, Radul and Sountsov (2021), *An adaptive-MCMC scheme for setting trajectory
    lengths in Hamiltonian Monte Carlo*.

    >>> from companion.core import sample
    >>> from companion.targets import Gaussian
    >>> target = Gaussian(torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    >>> g = torch.Generator().manual_seed(0)
    >>> trace = sample(jittered_hmc(target, 0.3, 4.0), torch.zeros(100, 2), 100, generator=g)
    >>> print([f"{m:.1f}" for m in trace.x.mean((0, 1))])
    ['3.0', '1.0']
    """
    check_real("step_size", step_size, minimum=0.0)
    check_real("trajectory_length", trajectory_length, minimum=0.0)
    mass_of = mass_for(mass)

    def init(x: Tensor) -> JitteredState:
        state = init_gradient(log_prob, x)
        mass_of(state)
        return JitteredState(*state, torch.zeros_like(state.log_prob, dtype=torch.int64))

    @torch.no_grad()
    def step(
        state: JitteredState, *, generator: torch.Generator | None = None
    ) -> tuple[JitteredState, HmcInfo]:
        count = jittered_steps(int(state.num_moves.max()), step_size, trajectory_length)
        inner = GradientState(*state[:3])
        noise = move_noise(inner, generator)
        inner, info = hmc_step(log_prob, step_size, count, mass_of(inner), inner, noise)
        return JitteredState(*inner, state.num_moves + 1), info

    return Kernel(init, step)


def van_der_corput(i: int) -> float:
    """Entry i of the sequence that fills (0, 1) evenly: the bits of `i + 1` behind the point.

    >>> [van_der_corput(i) for i in range(5)]
    [0.5, 0.25, 0.75, 0.125, 0.625]
    """
    i += 1
    num_bits = i.bit_length()
    return int(f"{i:b}"[::-1], 2) / 2**num_bits


def jittered_steps(i: int, step_size: float, trajectory_length: float) -> int:
    """Leapfrog steps of step i, `ceil(u_i T / e)`."""
    return math.ceil(van_der_corput(i) * trajectory_length / step_size)


# ---------------------------------------------------------------- the criterion


def criterion_gradient(
    x: Tensor, end: Phase, time: float, accept_prob: Tensor, mass: Mass
) -> float:
    """How the criterion changes with the logarithm of the trajectory length t.

    With `a = x - E x` and `a' = x' - E x'`, and since x' moves at the velocity `M^-1 p'`,
    `dC / d log t = t E[(|a'|^2 - |a|^2) a'^T p']`, where `|a|^2 = a^T M a`. The expectation runs
    over the chains; each counts with the probability with which its end is accepted, in both means,
    too. (With a plain mean of x the two would differ by chance, by far more than a short trajectory
    moves where the target is wide.)

    Args:
        x: where the trajectories began, `(*chains, *event)`.
        end: where they ended.
        time: t, their length.
        accept_prob: of their ends, `(*chains)`.
        mass: M.
    """
    weight = accept_prob.double().reshape(-1, 1)
    ended = weight[:, 0] > 0.0  # an end that is never accepted may be NaN
    if not ended.any():
        return 0.0
    weight = weight[ended] / weight.sum()
    before, after, p = (a.reshape(len(ended), -1)[ended].double() for a in (x, end.x, end.p))
    before = before - (weight * before).sum(0)
    after = after - (weight * after).sum(0)
    change = _squared_norm(after, mass) - _squared_norm(before, mass)
    return time * float((weight[:, 0] * change * (after * p).sum(-1)).sum())


def _squared_norm(a: Tensor, mass: Mass) -> Tensor:
    """`a^T M a` of each row."""
    if mass.factor is not None:
        factor = mass.factor.double()
        a = a @ factor if mass.is_dense else a * factor.flatten()
    return a.square().sum(-1)


class Ascent(NamedTuple):
    """Where the ascent of the log of the trajectory length is (see `update`)."""

    log_length: float
    log_average: float
    mean_square: float = 0.0
    num_updates: int = 0

    def update(self, gradient: float, longest: float) -> Ascent:
        """A step of Adam without momentum, kept below the logarithm of `longest`.

        The gradient is divided by the root of its own running mean square, and multiplied by 0.025.
        The answer is the average of the logarithms in which step t has the weight `t^-0.5`.

        Reference: Kingma and Ba (2015), *Adam: a method for stochastic optimization*.
        """
        t = self.num_updates + 1
        mean_square = 0.95 * self.mean_square + 0.05 * gradient**2
        scale = math.sqrt(mean_square / (1.0 - 0.95**t)) or 1.0
        move = max(-0.35, min(0.35, 0.025 * gradient / scale))
        log_length = min(self.log_length + move, math.log(longest))
        weight = t**-0.5
        log_average = (1.0 - weight) * self.log_average + weight * log_length
        return Ascent(log_length, log_average, mean_square, t)


# ---------------------------------------------------------------- warm-up


@torch.no_grad()
def chees_warmup(
    log_prob: LogProb,
    x0: Tensor,
    num_steps: int,
    *,
    target_accept: float = 0.651,
    max_leapfrog: int = 1000,
    mass: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tuned:
    """Tune the step size and the trajectory length of `jittered_hmc` with many chains.

    Each step moves all chains, changes the logarithm of the length T along the gradient of the
    criterion, and changes the step size by dual averaging so that the *harmonic* mean of the
    chains' acceptance probabilities nears its target: a few chains that are stuck then count for
    more than the many that are not. The last 10 to 25 steps run the frozen kernel.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        x0: starting points, `(*chains, *event)`; two chains at least, better a hundred.
        num_steps: steps of the warm-up, at least 100. T changes by about 2.5 percent a step.
        target_accept: harmonic mean of the acceptance probabilities to reach; 0.651 is optimal in
            high dimension.
        max_leapfrog: the most leapfrog steps that a trajectory may have.
        mass: M, as for `hmc`, such as `warmup(...).mass`; the criterion measures in its metric. It
            is not adapted.
        generator: source of randomness, on the device of `x0`.

    Returns:
        A `Tuned`, which unpacks as `kernel, x`, and has `.step_size`, `.trajectory_length` and
        `.history`.

    Raises:
        ValueError: an argument out of range, a single chain, a generator on another device, or a
            start where the density is not finite.
        RuntimeError: the step size collapsed, or the log-density is flat.

    Warns:
        UserWarning: as `warmup`; or T still grew at the end, or came to the longest allowed.

    Reference: Hoffman, Radul and Sountsov (2021), *An adaptive-MCMC scheme for setting trajectory
    lengths in Hamiltonian Monte Carlo*; for 0.651, Beskos, Pillai, Roberts, Sanz-Serna and Stuart
    (2013), *Optimal tuning of the hybrid Monte Carlo algorithm*.

    >>> from companion.targets import Gaussian
    >>> target = Gaussian(torch.zeros(50), torch.eye(50))
    >>> g = torch.Generator().manual_seed(0)
    >>> kernel, x = tuned = chees_warmup(target, torch.zeros(100, 50), 300, generator=g)
    >>> 1.5 < tuned.trajectory_length < 3.5                  # a quarter period is pi / 2
    True
    """
    check_finite("x0", x0)
    check_generator(generator, x0.device)
    check_count("num_steps", num_steps, minimum=100)
    check_count("max_leapfrog", max_leapfrog)
    check_real("target_accept", target_accept, minimum=0.0, maximum=1.0)
    state, mass_of = init_gradient(log_prob, x0), mass_for(mass)
    if state.log_prob.numel() < 2:
        raise ValueError(
            "chees_warmup compares chains with one another and needs at least two, better a "
            "hundred; for one chain use warmup(nuts, ...)"
        )
    num_check = check_steps(num_steps)
    num_adapt = num_steps - num_check
    averaging = DualAveraging.start(find_step_size(log_prob, x0, mass, 1.0, generator))
    ascent = Ascent(averaging.log_step, averaging.log_step)
    history: dict[str, list[float]] = {"step_size": [], "accept_prob": [], "trajectory_length": []}
    for i in range(num_adapt):
        step_size, length = math.exp(averaging.log_step), math.exp(ascent.log_length)
        num_leapfrog = min(max_leapfrog, jittered_steps(i, step_size, length))
        end, move = propose(log_prob, step_size, num_leapfrog, mass_of(state), state, generator)
        gradient = criterion_gradient(
            state.x, end, step_size * num_leapfrog, move.accept_prob, mass_of(state)
        )
        state = select(move.accepted, GradientState(end.x, end.log_prob, end.grad), state)
        history["step_size"].append(step_size)
        history["accept_prob"].append(float(move.accept_prob.mean()))
        history["trajectory_length"].append(length)
        harmonic_mean = 1.0 / float(move.accept_prob.double().reciprocal().mean())
        averaging = averaging.update(target_accept - harmonic_mean)
        ascent = ascent.update(gradient, max_leapfrog * step_size)
    step_size, length = math.exp(averaging.log_average), math.exp(ascent.log_average)
    _warn_of_length(history["trajectory_length"], length, max_leapfrog * step_size)
    kernel = jittered_hmc(log_prob, step_size, length, mass)
    start = JitteredState(*state, torch.full_like(state.log_prob, num_adapt, dtype=torch.int64))
    last, accept_probs = run_frozen(kernel, start, num_check, target_accept, generator)
    history["step_size"] += [step_size] * num_check
    history["trajectory_length"] += [length] * num_check
    history["accept_prob"] += accept_probs
    return Tuned(kernel, last.x, step_size, mass, history, length)


def propose(
    log_prob: LogProb,
    step_size: float,
    num_leapfrog: int,
    mass: Mass,
    state: GradientState,
    generator: torch.Generator | None,
) -> tuple[Phase, MoveInfo]:
    """The proposal of a step of HMC with its momentum, and whether each chain accepts it."""
    noise = move_noise(state, generator)
    p = momentum(mass, noise.normal)
    end = leapfrog(log_prob, state.x, p, state.grad, step_size, num_leapfrog, mass)
    before = kinetic_energy(mass, p, state.log_prob) - state.log_prob
    after = kinetic_energy(mass, end.p, state.log_prob) - end.log_prob
    return end, metropolis_accept(before - after, noise.uniform)


def _warn_of_length(course: list[float], length: float, longest: float) -> None:
    if length > 0.7 * longest:
        problem = (
            "came to the longest that is allowed: precondition by mass=, or raise max_leapfrog"
        )
    elif course[-1] > 1.5 * course[int(0.8 * len(course))]:
        problem = "was still growing: warm up for longer, or precondition by mass="
    else:
        return
    warnings.warn(f"the trajectory length, now {length:.3g}, {problem}", stacklevel=4)
