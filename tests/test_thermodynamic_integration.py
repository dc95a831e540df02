"""What the chapter on thermodynamic integration states: slopes, lengths, and where betas belong."""

import math

import torch
from scipy import stats
from torch import Tensor

from companion.models.rbm import RBM
from companion.tempering import profile
from companion.testing import binary_states
from tests.tempering.exact_paths import F64, ExactGaussians


def test_the_slope_of_log_z_is_a_mean():
    """By enumeration, on a path that is not geometric; the mean at a neighbouring beta is wrong."""
    rbm = RBM(5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rbm.W.mul_(150.0)
    at = profile(rbm.annealing_path(), binary_states(5).to(F64))
    for value in (0.0, 0.3, 0.8, 1.0):
        beta = torch.full((32,), value, dtype=F64).requires_grad_()
        (u,) = torch.autograd.grad(at(beta).sum(), beta)
        mean = (at(value).softmax(0) * u).sum()
        shift = 1e-5
        slope = (at(value + shift).logsumexp(0) - at(value - shift).logsumexp(0)) / (2 * shift)
        torch.testing.assert_close(mean, slope, rtol=1e-7, atol=1e-7)
        elsewhere = (at(value + 0.05).softmax(0) * u).sum()
        assert abs(elsewhere - slope) > 1e-3


def standard_deviation(path: ExactGaussians, betas: Tensor) -> Tensor:
    """Of U at each beta, for `oscillators`: `(p1 - p0) / p sqrt(d / 2)` with precisions p."""
    p0, p1 = path.sd0[0] ** -2, path.sd1[0] ** -2
    return (p1 - p0) / (p0 + betas * (p1 - p0)) * math.sqrt(len(path.sd0) / 2)


def test_betas_in_proportion_to_the_standard_deviation_of_u_are_best(rng):
    """With n draws in all, the variance is `int v / rho / n`: `Lambda^2 / n` for rho ~ sqrt(v)."""
    d, ratio, num_rungs, num_draws, repetitions = 4, 20.0, 101, 8, 2000
    path = ExactGaussians([0.0] * d, [ratio] * d, [0.0] * d, [1.0] * d)
    length = math.sqrt(d / 2) * math.log(ratio**2)
    grid = torch.linspace(0.0, 1.0, 200_001, dtype=F64)
    sd = standard_deviation(path, grid)
    numeric = torch.trapezoid(sd, grid)
    assert abs(float(numeric) - length) < 1e-3 * length

    p0 = ratio**-2
    unit = torch.linspace(0.0, 1.0, num_rungs, dtype=F64)
    ladders = {"equal lengths": (p0 ** (1.0 - unit) - p0) / (1.0 - p0), "equal steps": unit}
    lowest, highest = (stats.chi2.ppf(p, repetitions - 1) for p in (0.5e-5, 1 - 0.5e-5))
    measured = {}
    for name, betas in ladders.items():
        h = betas.diff()
        weight = 0.5 * (torch.cat([h, h[:1] * 0]) + torch.cat([h[:1] * 0, h]))
        mean_sd = path.moments(betas)[1]
        noise = torch.randn(num_rungs, repetitions, num_draws, d, dtype=F64, generator=rng(0))
        x = mean_sd[:, None, None] * noise
        u = -0.5 * (1.0 - p0) * x.square().sum(-1)
        estimates = (weight[:, None] * u.mean(-1)).sum(0)
        measured[name] = float(estimates.var())
        exact = float((weight.square() * standard_deviation(path, betas).square()).sum())
        statistic = (repetitions - 1) * measured[name] * num_draws / exact
        # U has heavier tails than a normal law, their mean over rungs and draws hardly so
        assert lowest < statistic < highest
    best = length**2 / (num_rungs * num_draws)
    assert abs(measured["equal lengths"] / best - 1.0) < 0.15
    assert measured["equal steps"] > 3.0 * best
