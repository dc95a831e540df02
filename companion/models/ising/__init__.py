"""The Ising model on a periodic square lattice; samplers of single sites and of clusters.

    log p~(x) = K sum_<ij> x_i x_j + h sum_i x_i,     x_i = -1 or +1

`checkerboard` draws half of the sites at a time from their exact conditionals: cheap, but near the
critical coupling the lattice forms domains of all sizes, and single sites take about L^2 sweeps to
move those of size L. `swendsen_wang` and `wolff` turn whole clusters over. All three are batched
over chains without a loop over sites. The exact answers are in `companion.targets` (`ising_log_z`
and its neighbours), which also says what a bond is where a side is 1 or 2.
"""

from companion.models.ising.annealing import IsingPath
from companion.models.ising.clusters import (
    ClusterInfo,
    ClusterNoise,
    WolffNoise,
    swendsen_wang,
    swendsen_wang_step,
    wolff,
    wolff_step,
)
from companion.models.ising.model import Ising, checkerboard, checkerboard_step

__all__ = [
    "ClusterInfo",
    "ClusterNoise",
    "Ising",
    "IsingPath",
    "WolffNoise",
    "checkerboard",
    "checkerboard_step",
    "swendsen_wang",
    "swendsen_wang_step",
    "wolff",
    "wolff_step",
]
