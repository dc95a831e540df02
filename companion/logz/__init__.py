"""Partition functions: exact, and estimated from draws.

Every function returns a `LogZ`, so that exact sums and Monte Carlo estimates meet on one plot.
"""

from companion.logz.bridge import bar, bridge_sampling
from companion.logz.exact import enumeration
from companion.logz.ladder import sample_ladder
from companion.logz.marginal_likelihood import evidence, harmonic_mean
from companion.logz.multistate import mbar
from companion.logz.path_sampling import stepping_stone, thermodynamic_integration

__all__ = [
    "bar",
    "bridge_sampling",
    "enumeration",
    "evidence",
    "harmonic_mean",
    "mbar",
    "sample_ladder",
    "stepping_stone",
    "thermodynamic_integration",
]
