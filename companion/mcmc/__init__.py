"""Markov chain Monte Carlo: kernels that leave a density invariant, and their combinations."""

from companion.mcmc.base import (
    ChainState,
    GibbsState,
    GradientState,
    MoveInfo,
    expand,
    init_chains,
    init_gradient,
    metropolis_accept,
    select,
)

__all__ = [
    "ChainState",
    "GibbsState",
    "GradientState",
    "MoveInfo",
    "expand",
    "init_chains",
    "init_gradient",
    "metropolis_accept",
    "select",
]
