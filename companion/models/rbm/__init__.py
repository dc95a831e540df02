"""The restricted Boltzmann machine with binary units.

    E(v, h) = - b.v - c.h - v.W.h          p(v, h) = exp(-E(v, h)) / Z

Visible units are independent given the hidden ones and the other way round, so whole layers are
drawn at once. Summing out the hidden units gives the free energy
`F(v) = - b.v - sum_j softplus(c_j + (v.W)_j)`, and `log_prob(v) = -F(v)` up to `log Z`.
"""

from companion.models.rbm.annealing import RBMPath
from companion.models.rbm.centred import CentredRBM
from companion.models.rbm.model import MAX_ENUMERATED, RBM

__all__ = ["MAX_ENUMERATED", "RBM", "CentredRBM", "RBMPath"]
