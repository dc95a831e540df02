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
    PersistentChains,
    contrastive_divergence,
)

__all__ = [
    "GibbsModel",
    "PersistentChains",
    "contrastive_divergence",
    "generalized_pseudolikelihood",
    "pseudolikelihood",
    "ratio_matching",
]
