"""Whether estimates lie where their standard errors say."""

import math

import scipy.stats
from torch import Tensor

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison


def z_score(x: Tensor, exact: float) -> float:
    """Distance of the mean of independent values from `exact`, in standard errors."""
    x = x.double()
    return float((x.mean() - exact) / (x.std() / math.sqrt(len(x))))


def is_calibrated(z: Tensor) -> bool:
    """Whether z-scores have mean 0 and mean square 1, at false-alarm rates of 1e-5."""
    assert len(z) >= 200
    low, high = scipy.stats.chi2.interval(1 - 1e-5, len(z))
    return low < z.square().sum() < high and abs(float(z.mean())) < Z / math.sqrt(len(z))
