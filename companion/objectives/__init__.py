"""Learning an unnormalised model without its partition function.

Each objective returns a scalar whose gradient (by `backward()`) is the method's update direction
for *descent*; the value itself is a likelihood only where its docstring says so. An objective asks
the model for `log_prob` and, where it needs chains, for `gibbs`; it never looks inside.
"""

from companion.objectives.conditional import (
    generalized_pseudolikelihood,
    pseudolikelihood,
    ratio_matching,
)
from companion.objectives.contrastive import (
    GibbsModel,
    contrastive_divergence,
    maximum_likelihood,
)
from companion.objectives.denoising import (
    annealed_langevin,
    denoising_score_matching,
    tweedie,
)
from companion.objectives.noise import noise_contrastive
from companion.objectives.persistent import FastPersistentChains, PersistentChains, TemperedChains
from companion.objectives.score import score_matching, sliced_score_matching

__all__ = [
    "FastPersistentChains",
    "GibbsModel",
    "PersistentChains",
    "TemperedChains",
    "annealed_langevin",
    "contrastive_divergence",
    "denoising_score_matching",
    "generalized_pseudolikelihood",
    "maximum_likelihood",
    "noise_contrastive",
    "pseudolikelihood",
    "ratio_matching",
    "score_matching",
    "sliced_score_matching",
    "tweedie",
]
