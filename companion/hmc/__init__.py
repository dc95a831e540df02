"""Hamiltonian Monte Carlo: leapfrog steps, fixed, self-chosen and learnt trajectory lengths."""

from companion.hmc.adaptation import Tuned, warmup
from companion.hmc.chees import chees_warmup, jittered_hmc
from companion.hmc.integrator import Phase, leapfrog
from companion.hmc.nuts import NutsInfo, nuts, nuts_step
from companion.hmc.static import HmcInfo, hmc, hmc_step

__all__ = [
    "HmcInfo",
    "NutsInfo",
    "Phase",
    "Tuned",
    "chees_warmup",
    "hmc",
    "hmc_step",
    "jittered_hmc",
    "leapfrog",
    "nuts",
    "nuts_step",
    "warmup",
]
