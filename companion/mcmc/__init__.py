"""Markov chain Monte Carlo: kernels that leave a density invariant, and their combinations."""

from companion.mcmc.base import (
    ChainState,
    GibbsState,
    GradientState,
    MoveInfo,
    MoveNoise,
    expand,
    init_chains,
    init_gradient,
    metropolis_accept,
    select,
)
from companion.mcmc.combine import CombinedInfo, cycle, mixture
from companion.mcmc.gibbs import gibbs
from companion.mcmc.langevin import mala, mala_step, ula, ula_step
from companion.mcmc.mass import Mass, make_mass
from companion.mcmc.metropolis import (
    ProposalNoise,
    independence,
    metropolis_hastings,
    metropolis_hastings_step,
    random_walk,
    random_walk_step,
)
from companion.mcmc.slice import SliceInfo, slice_sampler, slice_update

__all__ = [
    "ChainState",
    "CombinedInfo",
    "GibbsState",
    "GradientState",
    "Mass",
    "MoveInfo",
    "MoveNoise",
    "ProposalNoise",
    "SliceInfo",
    "cycle",
    "expand",
    "gibbs",
    "independence",
    "init_chains",
    "init_gradient",
    "make_mass",
    "mala",
    "mala_step",
    "metropolis_accept",
    "metropolis_hastings",
    "metropolis_hastings_step",
    "mixture",
    "random_walk",
    "random_walk_step",
    "select",
    "slice_sampler",
    "slice_update",
    "ula",
    "ula_step",
]
