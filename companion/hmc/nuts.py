"""The No-U-Turn Sampler: Hamiltonian Monte Carlo that finds the length of each trajectory itself.

A trajectory grows by doubling, each time in a random direction of time, until it starts to turn
back on itself; then one of its points is drawn with probability proportional to `exp(-H)`. Stopping
at the first U-turn would not be reversible. What makes it so is that every balanced part of the
trajectory, down to pairs of points, has to be free of U-turns as well: then each of its points
would have grown the same trajectory, with the same probability.

*All chains move in one batch.* Chains that are still going have made the same number of doublings,
and a doubling either completes or ends its chain. So the place in the tree is the same for all, an
ordinary integer; chains differ in the direction of time and in whether they are going. A step costs
as many gradients as its longest trajectory has points, and a chain that has ended waits for the
others: `NutsInfo.num_steps`, its mean over its largest value, is the share that was of use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.core import Kernel, LogProb
from companion.hmc.integrator import Phase, leapfrog
from companion.hmc.static import MAX_ENERGY_ERROR
from companion.inputs import check_count, check_generator
from companion.mcmc.base import (
    GradientState,
    check_step_size,
    expand,
    init_gradient,
    per_chain,
    select,
)
from companion.mcmc.mass import Mass, dot, mass_for, momentum, whiten

__all__ = ["NutsInfo", "nuts", "nuts_step"]


class NutsInfo(NamedTuple):
    """What a step did to each chain; every field is `(*chains)`."""

    accept_prob: Tensor
    """Mean of `min(1, exp(H_0 - H))` over the points reached, H_0 being H of the start."""
    accepted: Tensor
    """Whether another point than the start was drawn, boolean."""
    is_nan: Tensor
    """Whether the energy was NaN or minus infinity at a point (the trajectory ends there)."""
    is_divergent: Tensor
    """Whether it was, or more than 1000 above that of the start, boolean."""
    energy: Tensor
    """H of the point that was drawn."""
    num_steps: Tensor
    """Leapfrog steps of this chain, an integer."""
    tree_depth: Tensor
    """Doublings completed, an integer; at `max_depth` the trajectory may have been cut short."""


class Stretch(NamedTuple):
    """What the U-turn criterion asks of consecutive points: momenta, whitened, `(*chains, *event)`.

    Whitened by `L^-1` with `M = L L^T`, the product of two is that of a momentum and a velocity.
    """

    first: Tensor
    last: Tensor
    total: Tensor


class Candidate(NamedTuple):
    """A point of the trajectory that may become the next state of its chain."""

    x: Tensor
    log_prob: Tensor
    grad: Tensor
    energy: Tensor


class Branch(NamedTuple):
    """A trajectory that is growing from its last point."""

    point: Phase
    """The last point."""
    candidate: Candidate
    log_weight: Tensor
    """log of the sum of `exp(H_0 - H)` over the points that the candidate was drawn from."""
    going: Tensor
    """Chains that have neither turned back nor diverged, boolean."""


# ---------------------------------------------------------------- pure parts


def add_point(
    log_prob: LogProb, mass: Mass, step_size: Tensor, energy_0: Tensor, uniform: Tensor, b: Branch
) -> tuple[Branch, Tensor, Tensor]:
    """Make a leapfrog step, and let the new point replace the candidate with its share of weight.

    Returns the longer branch, and of its new point the whitened momentum and `H_0 - H`. Chains that
    have ended stand still.
    """
    step = torch.where(b.going, step_size, 0.0)
    x, p, _, grad = b.point
    point = leapfrog(log_prob, x, p, grad, expand(step, x), 1, mass)
    white = whiten(mass, point.p)
    energy = 0.5 * dot(white, white, energy_0) - point.log_prob
    log_weight = energy_0 - energy
    # A point of infinite density would never be left: it is one of none, as a NaN is.
    weighed = log_weight.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    total = torch.logaddexp(b.log_weight, weighed)
    taken = b.going & (uniform < (weighed - total).exp())
    new = Candidate(point.x, point.log_prob, point.grad, energy)
    going = b.going & (weighed >= -MAX_ENERGY_ERROR)
    return Branch(point, select(taken, new, b.candidate), total, going), white, log_weight


def join(a: Stretch, b: Stretch, going: Tensor, are_points: bool) -> tuple[Stretch, Tensor]:
    """Two stretches end to end, and which chains are going and do not turn back within the whole.

    A stretch is straight while the velocities at both of its ends point along the sum of its
    momenta, which is its displacement, seen through M. Two halves can be straight, and the whole
    seem so, yet it has gone a full circle: its ends then point the same way. Therefore each half
    together with the nearest point of the other has to be straight, too. (For halves that are
    `are_points`, that is the whole.) The criterion is Stan's.
    """
    whole = Stretch(a.first, b.last, a.total + b.total)
    going = going & _is_straight(*whole, going)
    if not are_points:
        going = going & _is_straight(a.first, b.first, a.total + b.first, going)
        going = going & _is_straight(a.last, b.last, a.last + b.total, going)
    return whole, going


def _is_straight(first: Tensor, last: Tensor, total: Tensor, like: Tensor) -> Tensor:
    return (dot(first, total, like) > 0) & (dot(last, total, like) > 0)


# ---------------------------------------------------------------- the step


def nuts_step(
    log_prob: LogProb,
    step_size: Tensor | float,
    max_depth: int,
    mass: Mass,
    state: GradientState,
    normal: Tensor,
    uniform: Callable[[int], Tensor],
) -> tuple[GradientState, NutsInfo]:
    """One step of NUTS, as a function of state and noise; the other arguments are those of `nuts`.

    `normal` is `(*chains, *event)`. The number of uniform random numbers depends on the length of
    the trajectories, so they are asked for a doubling at a time: `uniform(n)` gives `(n, *chains)`.
    """
    p = momentum(mass, normal)
    energy_0 = 0.5 * dot(normal, normal, state.log_prob) - state.log_prob
    going = torch.ones_like(energy_0, dtype=torch.bool)
    step_size = step_size * torch.ones_like(energy_0)
    log_weight = torch.zeros_like(energy_0)
    candidate = Candidate(*state, energy_0)
    far = near = Phase(state.x, p, state.log_prob, state.grad)  # the ends of the trajectory
    total = normal  # the sum of its whitened momenta
    moved, tree_depth = ~going, torch.zeros_like(going, dtype=torch.long)
    record = []  # of each point H_0 - H, and the chains that went there
    for depth in range(max_depth):
        length = 2**depth  # of the trajectory, and of the branch that shall double it
        noise = uniform(length + 2)
        flip = noise[0] < 0.5  # grow from the other end
        step_size = torch.where(flip, -step_size, step_size)
        if depth > 0:
            far, near = select(flip, near, far), select(flip, far, near)
        branch = Branch(near, candidate, torch.full_like(log_weight, -torch.inf), going)
        waiting: list[Stretch] = []  # stretches that wait for their other half
        for i in range(length):
            went = going
            branch, white, gain = add_point(
                log_prob, mass, step_size, energy_0, noise[i + 2], branch
            )
            record.append((gain, went))
            stretch, going, size = Stretch(white, white, white), branch.going, 1
            while i // size % 2:  # it is a second half: of a pair, and perhaps of more
                stretch, going = join(waiting.pop(), stretch, going, size == 1)
                size *= 2
            waiting.append(stretch)
            branch = branch._replace(going=going)
            if not going.any():
                break
        tree_depth = tree_depth + going  # the chains whose branch is complete
        taken = going & (noise[1] < (branch.log_weight - log_weight).exp())
        candidate, moved = select(taken, branch.candidate, candidate), moved | taken
        if not going.any():
            break
        log_weight = torch.logaddexp(log_weight, branch.log_weight)
        trajectory = Stretch(whiten(mass, far.p), whiten(mass, near.p), total)
        trajectory, going = join(trajectory, stretch, going, depth == 0)
        total, near = trajectory.total, branch.point
        if not going.any():
            break
    gains, visits = (torch.stack(rows) for rows in zip(*record, strict=True))
    num_steps = visits.sum(0)
    is_nan = ~(gains < torch.inf)
    accept_prob = gains.masked_fill(is_nan, -torch.inf).clamp(max=0.0).exp()
    info = NutsInfo(
        accept_prob=(visits * accept_prob).sum(0) / num_steps,
        accepted=moved,
        is_nan=(visits & is_nan).any(0),
        is_divergent=(visits & (is_nan | ~(gains >= -MAX_ENERGY_ERROR))).any(0),
        energy=candidate.energy,
        num_steps=num_steps,
        tree_depth=tree_depth,
    )
    return GradientState(candidate.x, candidate.log_prob, candidate.grad), info


def nuts(
    log_prob: LogProb,
    step_size: Tensor | float,
    mass: Tensor | None = None,
    max_depth: int = 10,
) -> Kernel:
    """The No-U-Turn Sampler, with multinomial weights, for a batch of chains.

    The trajectory is doubled as long as it is straight: a new branch of as many points as there are
    grows from one of its ends, chosen at random. Within a branch every point is drawn with its
    share of the weight `exp(-H)`. The branch's point then replaces the trajectory's with
    probability `min(1, W_branch / W_trajectory)`, which favours points far from the start. A branch
    that turns back on itself or diverges is thrown away.

    A step costs as many gradients as the longest trajectory of the batch has leapfrog steps, at
    most `2^max_depth - 1`. (All chains are evaluated every time, as a density may treat each of
    them differently, at a temperature of its own, say.) One chain costs nearly as much time as a
    hundred: what takes time is the bookkeeping.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`; its own `value_and_grad`, if it
            has one, halves the cost of autograd or better.
        step_size: e, positive: a number, or a tensor that broadcasts over the chains.
        mass: M, the covariance of the momentum (not its standard deviation): None for the identity,
            a tensor of the event's shape for a diagonal, or `(d, d)` for events of shape `(d,)`.
        max_depth: doublings at most.

    Returns:
        A `Kernel` with a `GradientState` and a `NutsInfo`.

    Raises:
        ValueError: a step size, mass or depth that is not as said; by `init`, a start where the
            log-density or its gradient is not finite.
        TypeError: an argument of another type; by `init`, points that are not floating.

    Reference: Hoffman and Gelman (2014), *The No-U-Turn sampler: adaptively setting path lengths in
    Hamiltonian Monte Carlo*; Betancourt (2017), *A conceptual introduction to Hamiltonian Monte
    Carlo*, appendix A (weights and criterion); Phan, Pradhan and Jankowiak (2019), *Composable
    effects for flexible and accelerated probabilistic programming in NumPyro* (without recursion).

    >>> from companion.core import sample
    >>> from companion.targets import Gaussian
    >>> target = Gaussian(torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    >>> g = torch.Generator().manual_seed(0)
    >>> trace = sample(nuts(target, 0.3), torch.zeros(100, 2), 100, warmup=20, generator=g)
    >>> print([f"{m:.1f}" for m in trace.x.mean((0, 1))], f"{trace.accept_prob.mean():.2f}")
    ['3.0', '1.0'] 0.94
    """
    step_size = check_step_size("step_size", step_size)
    check_count("max_depth", max_depth)
    mass_of = mass_for(mass)

    def init(x: Tensor) -> GradientState:
        state = init_gradient(log_prob, x)
        mass_of(state)
        per_chain(step_size, state)
        return state

    @torch.no_grad()
    def step(
        state: GradientState, *, generator: torch.Generator | None = None
    ) -> tuple[GradientState, NutsInfo]:
        x, like = state.x, state.log_prob
        check_generator(generator, x.device)
        make: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "generator": generator}

        def uniform(n: int) -> Tensor:
            return torch.rand((n, *like.shape), **make)

        normal = torch.randn(x.shape, **make)
        return nuts_step(log_prob, step_size, max_depth, mass_of(state), state, normal, uniform)

    return Kernel(init, step)
