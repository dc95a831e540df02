"""Metropolis-Hastings: propose a point, and accept it with the probability that keeps the balance.

From x a point y is proposed with density `q(y | x)`, and accepted with probability
`min(1, p~(y) q(x | y) / (p~(x) q(y | x)))`; else the chain stays at x, which then counts once more.
As much probability flows from x to y as from y to x (detailed balance), so p is left invariant. The
factor `q(x | y) / q(y | x)`, the Hastings correction, is 1 for a symmetric proposal only.

If the density is tempered, `beta log_prob`, the correction is not: it belongs to the proposal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from companion.core import Kernel, LogProb
from companion.inputs import Sampler, check_generator, draw
from companion.mcmc.base import (
    ChainState,
    MoveInfo,
    MoveNoise,
    check_floating,
    check_start,
    check_step_size,
    compile_step,
    init_chains,
    metropolis_accept,
    move_kernel,
    per_chain,
    select,
    uniform_noise,
)
from companion.mcmc.mass import Mass, mass_for, momentum

__all__ = [
    "ProposalNoise",
    "independence",
    "metropolis_hastings",
    "metropolis_hastings_step",
    "random_walk",
    "random_walk_step",
]


class ProposalNoise(NamedTuple):
    """The random part of a step whose proposal is drawn by the user."""

    y: Tensor
    """The proposal, `(*chains, *event)`."""
    uniform: Tensor
    """Uniform on [0, 1), `(*chains)`."""


# ---------------------------------------------------------------- any proposal


def metropolis_hastings_step(
    log_prob: LogProb,
    log_q: Callable[[Tensor, Tensor], Tensor] | None,
    state: ChainState,
    noise: ProposalNoise,
) -> tuple[ChainState, MoveInfo]:
    """One step, a pure function of state and noise; see `metropolis_hastings`."""
    x, y = state.x, noise.y
    value = log_prob(y)
    if value.shape != state.log_prob.shape:
        raise _not_one_number_a_chain("log_prob", value, state)
    log_ratio = value - state.log_prob
    if log_q is not None:
        correction = log_q(x, y) - log_q(y, x)
        if correction.shape != value.shape:
            raise _not_one_number_a_chain("log_q", correction, state)
        log_ratio = log_ratio + correction
    info = metropolis_accept(log_ratio, noise.uniform)
    return select(info.accepted, ChainState(y, value), state), info


def metropolis_hastings(
    log_prob: LogProb,
    propose: Callable[..., Tensor],
    log_q: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    compile: bool = False,
) -> Kernel:
    """Metropolis-Hastings with a proposal of your own, continuous or discrete.

    `accept_prob = min(1, p~(y) q(x | y) / (p~(x) q(y | x)))`.

    A step costs one log-density, and two of the proposal's where `log_q` is given.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        propose: `propose(x, *, generator) -> y`, a tensor of the shape and dtype of x, each chain
            on its own. It gets a copy of its own, which it may change in place.
        log_q: `log_q(y, x)`, the log-density (or log-probability) of proposing y from x,
            `(*chains)`; a constant may be missing. None says that the proposal is symmetric,
            `q(y | x) = q(x | y)`: if that is not so, the chain samples another distribution.
        compile: compile the pure step (the density and `log_q`) with `torch.compile`.

    Returns:
        A `Kernel` with a `ChainState` and a `MoveInfo`.

    Raises:
        ValueError: by `init`, a start where the log-density is not finite; by a step, a proposal or
            densities of the wrong shape or dtype.

    Reference: Metropolis, Rosenbluth, Rosenbluth, Teller and Teller (1953), *Equation of state
    calculations by fast computing machines*; Hastings (1970), *Monte Carlo sampling methods using
    Markov chains and their applications*.

    >>> from companion.core import sample
    >>> def propose(x, *, generator):                 # a step of a ring of five, mostly upwards
    ...     up = torch.rand(x.shape, generator=generator) < 0.8
    ...     return (x + torch.where(up, 1, -1)) % 5
    >>> def log_q(y, x):
    ...     return torch.where((y - x) % 5 == 1, 0.8, 0.2).log()
    >>> kernel = metropolis_hastings(lambda x: x.double(), propose, log_q)   # p(x) = e^x / Z
    >>> x0, g = torch.zeros(1000, dtype=torch.long), torch.Generator().manual_seed(0)
    >>> x = sample(kernel, x0, 200, warmup=50, generator=g).x
    >>> print([f"{p:.3f}" for p in x.flatten().bincount() / x.numel()])
    ['0.012', '0.033', '0.087', '0.234', '0.634']
    >>> print([f"{p:.3f}" for p in torch.arange(5.0).softmax(0)])
    ['0.012', '0.032', '0.086', '0.234', '0.636']
    """

    def pure(state: ChainState, noise: ProposalNoise) -> tuple[ChainState, MoveInfo]:
        return metropolis_hastings_step(log_prob, log_q, state, noise)

    pure = compile_step(pure, compile)

    @torch.no_grad()
    def step(
        state: ChainState, *, generator: torch.Generator | None = None
    ) -> tuple[ChainState, MoveInfo]:
        x = state.x
        check_generator(generator, x.device)
        y = _check_proposal(propose(x.clone(), generator=generator), x)
        return pure(state, ProposalNoise(y, uniform_noise(state.log_prob, generator)))

    return Kernel(lambda x: init_chains(log_prob, x), step)


# ---------------------------------------------------------------- random walk


def random_walk_step(
    log_prob: LogProb,
    step_size: Tensor | float,
    shape: Mass,
    state: ChainState,
    noise: MoveNoise,
) -> tuple[ChainState, MoveInfo]:
    """One step, a pure function of state and noise; see `random_walk`.

    `shape` is the proposal's covariance, factorised (`companion.mcmc.mass`).
    """
    # Not add(x, z, alpha=...): the compiler of PyTorch 2.13 loses alpha if z is a matrix product.
    y = state.x + per_chain(step_size, state) * momentum(shape, noise.normal)
    return metropolis_hastings_step(log_prob, None, state, ProposalNoise(y, noise.uniform))


def random_walk(
    log_prob: LogProb,
    step_size: Tensor | float,
    *,
    covariance: Tensor | None = None,
    compile: bool = False,
) -> Kernel:
    """Random-walk Metropolis: propose `y = x + e L z` with normal z, which is symmetric.

    `y ~ N(x, e^2 C)` with `C = L L^T`. On a Gaussian target of many dimensions d the best step size
    is about `2.38 / sqrt(d)` with C the target's covariance, and accepts 23 %.

    A step costs one log-density.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        step_size: e, positive: a number, or a tensor that broadcasts over the chains.
        covariance: C: None for the identity, a tensor of the event's shape for a diagonal (of
            variances), or `(d, d)` for events of shape `(d,)`.
        compile: compile the pure step, and blocks of steps for `sample`, with `torch.compile`. That
            takes some seconds at the first step, and halves the time of those that follow.

    Returns:
        A `Kernel` with a `ChainState` and a `MoveInfo`.

    Raises:
        ValueError: a step size or covariance that is not as said; by `init`, a start where the
            log-density is not finite.
        TypeError: an argument of another type; by `init`, points that are not floating.

    Reference: Metropolis et al. (1953), as above; Roberts, Gelman and Gilks (1997), *Weak
    convergence and optimal scaling of random walk Metropolis algorithms*.

    >>> from companion.core import sample
    >>> def log_prob(x):                                        # N(3, 1)
    ...     return -0.5 * (x - 3.0).square()
    >>> g = torch.Generator().manual_seed(0)
    >>> trace = sample(random_walk(log_prob, 2.4), torch.zeros(2000), 500, warmup=50, generator=g)
    >>> f"{trace.x.mean():.2f} {trace.x.var():.2f} {trace.accept_prob.mean():.2f}"
    '3.00 1.00 0.44'
    """
    step_size = check_step_size("step_size", step_size)
    shape_of = mass_for(covariance, name="covariance")

    def pure(shape: Mass, state: ChainState, noise: MoveNoise) -> tuple[ChainState, MoveInfo]:
        return random_walk_step(log_prob, step_size, shape, state, noise)

    def init(x: Tensor) -> ChainState:
        state = init_chains(log_prob, check_floating(x))
        shape_of(state), per_chain(step_size, state)  # speak up before the first step
        return state

    return move_kernel(init, pure, shape_of, compile)


# ---------------------------------------------------------------- independence


def independence(log_prob: LogProb, proposal: Sampler, *, compile: bool = False) -> Kernel:
    """The independence sampler: propose exact draws of a fixed density q, wherever the chain is.

    `accept_prob = min(1, w(y) / w(x))` with the importance weight `w = p~ / q`. It is as good as q
    is close to the target; where q has too little mass (w unbounded) chains get stuck for long.

    A step costs one log-density, and two of q's.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        proposal: q, a `torch.distributions` object without batch dimensions (`Independent` makes
            events of them), or one with `sample(n, *, generator)` and `log_prob`; unnormalised
            allowed.
        compile: compile the pure step with `torch.compile`.

    Returns:
        A `Kernel` with a `ChainState` and a `MoveInfo`.

    Raises:
        ValueError: by `init`, a start where one of both log-densities is not finite, or a proposal
            of other dimensions.

    Reference: Tierney (1994), *Markov chains for exploring posterior distributions*.

    >>> from companion.core import sample
    >>> q = torch.distributions.Normal(0.0, 2.0)
    >>> def log_prob(x):                                        # N(1, 1)
    ...     return -0.5 * (x - 1.0).square()
    >>> g = torch.Generator().manual_seed(0)
    >>> trace = sample(independence(log_prob, q), torch.zeros(2000), 500, warmup=20, generator=g)
    >>> f"{trace.x.mean():.2f} {trace.x.var():.2f}"
    '1.00 1.00'
    """

    def log_q(y: Tensor, x: Tensor) -> Tensor:
        return proposal.log_prob(y)

    def pure(state: ChainState, noise: ProposalNoise) -> tuple[ChainState, MoveInfo]:
        return metropolis_hastings_step(log_prob, log_q, state, noise)

    pure = compile_step(pure, compile)

    def init(x: Tensor) -> ChainState:
        # A chain where q has no mass would never leave.
        log_q = check_start("proposal's log-density", proposal.log_prob(x), x)
        state = init_chains(log_prob, x)
        if log_q.shape != state.log_prob.shape:
            raise ValueError(
                f"the proposal must give one log-density a chain, shape "
                f"{tuple(state.log_prob.shape)}; it gave {tuple(log_q.shape)}. Batch dimensions of "
                "a torch.distributions object become event dimensions by Independent"
            )
        return state

    @torch.no_grad()
    def step(
        state: ChainState, *, generator: torch.Generator | None = None
    ) -> tuple[ChainState, MoveInfo]:
        x, chains = state.x, state.log_prob.shape
        check_generator(generator, x.device)
        y = draw(proposal, chains.numel(), generator=generator)
        y = _check_proposal(y.reshape(chains + y.shape[1:]), x)
        return pure(state, ProposalNoise(y, uniform_noise(state.log_prob, generator)))

    return Kernel(init, step)


def _check_proposal(y: Tensor, x: Tensor) -> Tensor:
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"a proposal must be as the chains are, {tuple(x.shape)} of {x.dtype} on {x.device}; "
            f"got {tuple(y.shape)} of {y.dtype} on {y.device}"
        )
    return y


def _not_one_number_a_chain(name: str, value: Tensor, state: ChainState) -> ValueError:
    return ValueError(
        f"{name} must give one number a chain, shape {tuple(state.log_prob.shape)}; it gave "
        f"{tuple(value.shape)}"
    )
