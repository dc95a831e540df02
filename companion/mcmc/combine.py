"""Kernels from kernels: if each leaves the target invariant, so do one after the other, and a lot.

A cycle applies its kernels in order: a Gibbs sweep with a Metropolis step for the block that has no
conditional, a few local moves and then a global one. A mixture lets each chain draw which kernel it
applies; a mixture of reversible kernels is reversible, a cycle in general is not.

All kernels must be made from the same log-density, its constant included, for states are handed
from one to the next. Where the next kernel keeps another kind of state (with the gradient, say), it
makes one, for one more evaluation. So a state may hold nothing but what follows from x: a kernel
that counts its steps, such as `jittered_hmc`, would begin to count anew each time, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.core import Kernel
from companion.inputs import check_finite, check_generator
from companion.mcmc.base import ChainState, select

__all__ = ["CombinedInfo", "cycle", "mixture"]

_FOLLOWS_FROM_X = ("x", "log_prob", "grad")


class CombinedInfo(NamedTuple):
    """What a step of several kernels did to each chain; every field is `(*chains)`."""

    accept_prob: Tensor
    """Acceptance probability, for a cycle the mean over its kernels."""
    accepted: Tensor
    """Whether the chain accepted a proposal (for a cycle: any)."""
    is_nan: Tensor
    """Whether a proposal was NaN."""
    is_divergent: Tensor
    """Whether a trajectory diverged."""


def cycle(*kernels: Kernel) -> Kernel:
    """One kernel after the other, in order: a step is a step of each.

    Args:
        kernels: made from the same log-density; their states hold x, its log-density and gradient
            at most.

    Returns:
        A `Kernel` whose state is that of the last kernel, and whose info is a `CombinedInfo`.

    Raises:
        ValueError: no kernel; by `init`, kernels whose log-densities at x differ, one whose state
            holds more (`jittered_hmc`), or what theirs raise.

    Reference: Tierney (1994), *Markov chains for exploring posterior distributions*.

    >>> from companion.core import sample
    >>> from companion.mcmc import mala, random_walk
    >>> def log_prob(x):
    ...     return -0.5 * x.square()
    >>> kernel = cycle(random_walk(log_prob, 5.0), mala(log_prob, 1.0))
    >>> g = torch.Generator().manual_seed(0)
    >>> x = sample(kernel, torch.zeros(1000), 200, warmup=10, generator=g).x
    >>> f"{x.var():.2f}"
    '1.00'
    """
    entry = _Entry(kernels)

    def step(state: Any, *, generator: torch.Generator | None = None) -> tuple[Any, CombinedInfo]:
        infos = []
        for i, kernel in enumerate(kernels):
            state, info = kernel.step(entry(i, state), generator=generator)
            infos.append(_summary(info))
        accept_prob, *flags = (torch.stack(field) for field in zip(*infos, strict=True))
        return state, CombinedInfo(accept_prob.mean(0), *(flag.any(0) for flag in flags))

    return Kernel(lambda x: entry.states(x)[-1], step)


def mixture(kernels: Sequence[Kernel], weights: Sequence[float] | Tensor) -> Kernel:
    """Each chain draws, at each step and by itself, which of the kernels it applies.

    One choice for all chains would cost less, but make them dependent: error bars that are taken
    from the spread of the chains would be too small or too large. So every kernel that some chain
    chose runs on all chains, and a step of many chains costs as much as a `cycle`. A single chain
    pays for its own choice alone.

    Args:
        kernels: made from the same log-density; their states hold it (give `gibbs` a `log_prob`),
            and besides it x and the gradient at most.
        weights: probability of each kernel, positive, up to a factor; the same at every point.

    Returns:
        A `Kernel` with the state of its kernels, or a `ChainState` if these are of several kinds,
        and a `CombinedInfo`.

    Raises:
        ValueError: no kernel, weights that do not fit or are not positive; by `init`, kernels whose
            log-densities at x differ or are None, one whose state holds more (`jittered_hmc`), or
            what theirs raise.

    Reference: Tierney (1994), *Markov chains for exploring posterior distributions*.

    >>> from companion.core import sample
    >>> from companion.mcmc import random_walk
    >>> def log_prob(x):
    ...     return -0.5 * x.square()
    >>> kernel = mixture([random_walk(log_prob, 0.1), random_walk(log_prob, 5.0)], [1.0, 3.0])
    >>> g = torch.Generator().manual_seed(0)
    >>> x = sample(kernel, torch.zeros(2000), 500, warmup=20, generator=g).x
    >>> f"{x.var():.2f}"
    '1.00'
    """
    kernels = tuple(kernels)
    entry = _Entry(kernels)
    p = check_finite("weights", torch.as_tensor(weights, dtype=torch.float64, device="cpu"))
    if p.shape != (len(kernels),) or not (p > 0).all():
        raise ValueError(
            f"weights must be {len(kernels)} positive numbers, one a kernel, got {p.tolist()}"
        )

    def init(x: Tensor) -> Any:
        states = entry.states(x)
        if any(state.log_prob is None for state in states):
            raise ValueError("a mixture needs states with a log-density: give gibbs its log_prob")
        alike = len({type(state) for state in states}) == 1
        return states[0] if alike else ChainState(states[0].x, states[0].log_prob)

    @torch.no_grad()
    def step(state: Any, *, generator: torch.Generator | None = None) -> tuple[Any, CombinedInfo]:
        chains, device = state.log_prob.shape, state.x.device
        check_generator(generator, device)
        choice = torch.multinomial(p.to(device), chains.numel(), True, generator=generator)
        choice = choice.reshape(chains)
        kept: Any = None
        for i, kernel in enumerate(kernels):
            mine = choice == i
            if not mine.any():
                continue
            moved, info = kernel.step(entry(i, state), generator=generator)
            if type(moved) is not type(state):
                moved = ChainState(moved.x, moved.log_prob)
            both = (moved, _summary(info))
            kept = both if kept is None else tuple(map(select, (mine, mine), both, kept))
        return kept

    return Kernel(init, step)


class _Entry:
    """Gives each kernel the kind of state that it keeps."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        if not kernels:
            raise ValueError("give at least one kernel")
        self.kernels = kernels
        self.kinds: dict[int, type] = {}

    def __call__(self, i: int, state: Any) -> Any:
        if self.kinds.get(i) is not type(state):
            state = self.init(i, state.x)
            self.kinds[i] = type(state)
        return state

    def init(self, i: int, x: Tensor) -> Any:
        """The state of a kernel at x, checked: all that it holds must follow from x."""
        state = self.kernels[i].init(x)
        more = [name for name in getattr(state, "_fields", ()) if name not in _FOLLOWS_FROM_X]
        if more:
            raise ValueError(
                f"kernel {i} keeps {', '.join(more)} from step to step, which would be lost where "
                "kernels take turns. Run it by itself; in place of jittered_hmc combine hmc of "
                "several lengths"
            )
        return state

    def states(self, x: Tensor) -> list[Any]:
        """The state of each kernel at x, checked: all must have the same log-density."""
        states = [self.init(i, x) for i in range(len(self.kernels))]
        self.kinds = {i: type(state) for i, state in enumerate(states)}
        known = [
            (i, state.log_prob) for i, state in enumerate(states) if state.log_prob is not None
        ]
        for i, value in known[1:]:
            first = known[0][1]
            eps = torch.finfo(first.dtype).eps
            # What changes an acceptance probability is the difference itself, not its share.
            if not torch.allclose(value, first, rtol=min(1e3 * eps, eps**0.5), atol=eps**0.5):
                gap = float((value - first).abs().max())
                raise ValueError(
                    "all kernels must be made from the same log-density, its constant included: "
                    f"kernels {known[0][0]} and {i} differ by up to {gap:.3g} at the start"
                )
        return states


def _summary(info: Any) -> CombinedInfo:
    no = torch.zeros_like(info.accepted)
    is_nan, is_divergent = (getattr(info, name, no) for name in ("is_nan", "is_divergent"))
    return CombinedInfo(info.accept_prob, info.accepted, is_nan, is_divergent)
