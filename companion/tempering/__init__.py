"""Mixing between modes: annealing paths, schedules, and samplers that walk along them.

A Markov chain that makes small moves does not cross a region of low probability. At a small beta
the density `p~_beta` of an annealing path is flat enough to cross; what differs between the methods
is how they come back to beta = 1 without error.

- `parallel_tempering`: a chain at every beta, and neighbours swap their points;
- `simulated_tempering`: one chain that changes its beta, weighted so that it visits all of them;
- `tempered_transitions`: an ordinary kernel, whose proposal heats the point up and cools it down;
- `companion.annealing.smc`: a population that walks from 0 to 1 once, and is weighed on the way;
- `simulated_annealing`: optimisation, which is not sampling.
"""

from companion.tempering.cooling import Annealed, simulated_annealing
from companion.tempering.ladder import Ladder, tune_ladder
from companion.tempering.parallel import ParallelTempering, parallel_tempering, swap_step
from companion.tempering.paths import GeometricPath, likelihood_path
from companion.tempering.routes import advance, profile, reverse_step
from companion.tempering.schedules import (
    check_betas,
    geometric_schedule,
    linear_schedule,
    sigmoid_schedule,
)
from companion.tempering.simulated import SimulatedTempering, simulated_tempering
from companion.tempering.transitions import tempered_transitions

__all__ = [
    "Annealed",
    "GeometricPath",
    "Ladder",
    "ParallelTempering",
    "SimulatedTempering",
    "advance",
    "check_betas",
    "geometric_schedule",
    "likelihood_path",
    "linear_schedule",
    "parallel_tempering",
    "profile",
    "reverse_step",
    "sigmoid_schedule",
    "simulated_annealing",
    "simulated_tempering",
    "swap_step",
    "tempered_transitions",
    "tune_ladder",
]
