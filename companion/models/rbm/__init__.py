"""The restricted Boltzmann machine with binary units, and its relatives.

    E(v, h) = - b.v - c.h - v.W.h          p(v, h) = exp(-E(v, h)) / Z

Visible units are independent given the hidden ones and the other way round, so whole layers are
drawn at once. Summing out the hidden units gives the free energy
`F(v) = - b.v - sum_j softplus(c_j + (v.W)_j)`, and `log_prob(v) = -F(v)` up to `log Z`.

The relatives have the same methods and other visible units: real numbers (`GaussianRBM`), binary
units and a label (`LabelRBM`), ratings of which most are missing (`RatingRBM`).
"""

from companion.models.rbm.annealing import RBMPath
from companion.models.rbm.centred import CentredRBM
from companion.models.rbm.gaussian import GaussianRBM
from companion.models.rbm.labels import LabelRBM
from companion.models.rbm.likelihood import LogLikelihood
from companion.models.rbm.model import RBM
from companion.models.rbm.ratings import RatingRBM
from companion.models.rbm.relatives import GaussianRBMPath, LabelRBMPath
from companion.models.rbm.sums import MAX_ENUMERATED

__all__ = [
    "MAX_ENUMERATED",
    "RBM",
    "CentredRBM",
    "GaussianRBM",
    "GaussianRBMPath",
    "LabelRBM",
    "LabelRBMPath",
    "LogLikelihood",
    "RBMPath",
    "RatingRBM",
]
