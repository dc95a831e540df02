"""What the chapter on bridge sampling states beyond the package's own tests."""

import math

import pytest
import scipy.stats
import torch

from companion.importance import log_mean_weight
from companion.logz import bar

F64 = torch.float64
GRID = torch.linspace(-14.0, 14.0, 14_001, dtype=F64)


def normal(x, mean):
    return torch.exp(-0.5 * (x - mean).square()) / math.sqrt(2 * math.pi)


def variance(alpha, p, q):
    """Of the logarithm of the ratio, times the number of draws of each."""
    shared = torch.trapezoid(alpha * p * q, GRID).square()
    return float(sum(torch.trapezoid(alpha**2 * p * q * f, GRID) / shared - 1.0 for f in (p, q)))


@pytest.mark.parametrize("delta", [0.5, 2.0, 4.0])
def test_the_variance_of_bridges_between_shifted_normal_laws(delta, rng):
    """By quadrature to nine digits, and by repetition within the 1e-5 chi-square interval."""
    p, q = normal(GRID, delta / 2), normal(GRID, -delta / 2)
    overlap = float(torch.trapezoid(2 * p * q / (p + q), GRID))
    from_one_end = math.exp(delta**2) - 1.0  # the draws of p have weight one: no variance
    geometric = 2.0 * (math.exp(delta**2 / 4) - 1.0)
    optimal = 2.0 * (1.0 / overlap - 1.0)
    assert variance(1.0 / q, p, q) == pytest.approx(from_one_end, rel=1e-9)
    assert variance((p * q).rsqrt(), p, q) == pytest.approx(geometric, rel=1e-9)
    assert variance(1.0 / (p + q), p, q) == pytest.approx(optimal, rel=1e-9)
    assert optimal <= min(geometric, from_one_end)

    n, repeats = 1000, 200
    noise = torch.randn(2, n, repeats, dtype=F64, generator=rng(0))
    w_q, w_p = (delta * x - delta**2 / 2 for x in (noise[0], noise[1] + delta))
    found = bar(w_q, w_p).value
    low, high = scipy.stats.chi2.interval(1 - 1e-5, repeats)
    assert low < found.square().sum() * n / optimal < high
    if delta > 1:  # importance sampling is told from it
        assert not low < log_mean_weight(w_q).value.square().sum() * n / optimal < high


def test_the_overlap_of_distant_normal_laws_falls_as_the_eighth_power():
    for delta in 6.0, 8.0:
        p, q = normal(GRID, delta / 2), normal(GRID, -delta / 2)
        overlap = float(torch.trapezoid(2 * p * q / (p + q), GRID))
        limit = math.sqrt(2 * math.pi) / delta * math.exp(-(delta**2) / 8)
        assert overlap == pytest.approx(limit, rel=2 * math.pi**2 / 2 / delta**2)
        wrong = math.exp(-(delta**2) / 4)  # that of the geometric bridge
        assert overlap > 3 * wrong


def test_neighbouring_bridges_that_share_draws_err_alike(rng):
    """On a fine ladder the variance of the sum is twice the sum of the variances."""
    num, n, repeats = 12, 100, 400
    means = torch.linspace(0.0, 3.0, num, dtype=F64)[:, None]
    x = means + torch.randn(n, num, repeats, dtype=F64, generator=rng(1))
    step = means[1:] - means[:-1]
    middle = 0.5 * (means[1:] + means[:-1])
    pairs = bar(step * (x[:, :-1] - middle), step * (x[:, 1:] - middle))
    added = pairs.std_error.square().sum(0)
    ratio = pairs.value.sum(0).square() / added
    error = ratio.std() / math.sqrt(repeats)
    assert abs(ratio.mean() - 2.0) < 4.5 * error + 2.0 / num  # each inner state is used twice
    assert ratio.mean() > 1.0 + 4.5 * error
