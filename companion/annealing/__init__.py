"""Annealing: many particles walk an annealing path once, from the base to the target, and are
weighed on the way. The mean weight estimates Z.
"""

from companion.annealing.genealogy import lineage, num_ancestors
from companion.annealing.smc import SMCResult, adaptive_schedule, smc

__all__ = ["SMCResult", "adaptive_schedule", "lineage", "num_ancestors", "smc"]
