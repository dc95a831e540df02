"""Targets whose every answer is known: exact draws, moments, normaliser and gradient.

Test a sampler on a target that can betray it. On a symmetric, uncorrelated one, sign errors and
wrong masses go unseen: each target here is asymmetric, correlated or both, save `Gaussian` with the
identity.

A target is a log-density (call it), unnormalised as written in its docstring. Its attributes and
methods:

- `log_prob(x)` = log p~(x), `(..., d) -> (...)`, and `value_and_grad(x)`, the same with its
  gradient `(..., d)`, written by hand (half the cost of autograd's); `Gaussian` and
  `LogisticRegression` have `gradient(x)` as well, for trajectories, which need no values;
- `sample(n, *, generator=None)`: n independent exact draws, `(n, d)` (`LogisticRegression` has
  none);
- `mean` `(d,)` and `covariance` `(d, d)`; `log_z`, the log of the integral of p~, a float.

Device and dtype are those of the tensors given to the constructor. The functions named after Ising
and Kaufman are the exact answers for the discrete model of `companion.models.ising`.
"""

from companion.targets.curved import Banana, Funnel, SkewedProduct
from companion.targets.gaussians import Gaussian, GaussianMixture
from companion.targets.ising import (
    CRITICAL_COUPLING,
    IsingMoments,
    ising_log_z,
    ising_magnetization,
    ising_moments,
    kaufman_log_z,
)
from companion.targets.posteriors import EightSchools, LogisticRegression

__all__ = [
    "CRITICAL_COUPLING",
    "Banana",
    "EightSchools",
    "Funnel",
    "Gaussian",
    "GaussianMixture",
    "IsingMoments",
    "LogisticRegression",
    "SkewedProduct",
    "ising_log_z",
    "ising_magnetization",
    "ising_moments",
    "kaufman_log_z",
]
