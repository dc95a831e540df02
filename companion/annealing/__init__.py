"""Annealing: many particles walk an annealing path once, from the base to the target, and are
weighed on the way. The mean weight estimates Z.
"""

from companion.annealing.ais import Sandwich, ais, bidirectional, reverse_ais
from companion.annealing.genealogy import lineage, num_ancestors
from companion.annealing.smc import SMCResult, adaptive_schedule, smc

__all__ = [
    "SMCResult",
    "Sandwich",
    "adaptive_schedule",
    "ais",
    "bidirectional",
    "lineage",
    "num_ancestors",
    "reverse_ais",
    "smc",
]
