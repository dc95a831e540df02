"""Hamiltonian Monte Carlo: leapfrog steps, fixed and self-chosen trajectory lengths."""

from companion.hmc.integrator import Phase, leapfrog
from companion.hmc.static import HmcInfo, hmc, hmc_step

__all__ = [
    "HmcInfo",
    "Phase",
    "hmc",
    "hmc_step",
    "leapfrog",
]
