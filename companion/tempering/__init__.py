"""Mixing between modes: annealing paths, schedules, and samplers that walk along them.

A Markov chain that makes small moves does not cross a region of low probability. At a small beta
the density `p~_beta` of an annealing path is flat enough to cross; what differs between the methods
is how they come back to beta = 1 without error.
"""

from companion.tempering.paths import GeometricPath, advance, likelihood_path, profile, reverse_step
from companion.tempering.schedules import (
    check_betas,
    geometric_schedule,
    linear_schedule,
    sigmoid_schedule,
)

__all__ = [
    "GeometricPath",
    "advance",
    "check_betas",
    "geometric_schedule",
    "likelihood_path",
    "linear_schedule",
    "profile",
    "reverse_step",
    "sigmoid_schedule",
]
