"""What the chapter on diagnostics states and no module tests."""

import math

import pytest
import scipy.stats
import torch

from companion.core import sample
from companion.diagnostics import autocorrelation
from companion.mcmc import random_walk

FLOAT64 = torch.float64


def test_a_second_mode_changes_no_bit_of_a_chain_that_does_not_reach_it(rng):
    def one_mode(x):
        return -0.5 * (x - 10).square()

    def two_modes(x):
        return torch.logaddexp(one_mode(x), math.log(99) - 0.5 * (x + 10).square())

    def near_modes(x):
        return torch.logaddexp(one_mode(x), math.log(99) - 0.5 * (x - 2).square())

    start = torch.full((4,), 10.0, dtype=FLOAT64)
    runs = [
        sample(random_walk(f, 1.5), start, 2000, generator=rng(3)).x
        for f in (one_mode, two_modes, near_modes)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])  # one that the chain gets to see does change it


def test_all_sample_autocorrelations_add_up_to_minus_one_half(rng, ledger):
    steps = torch.randn(3, 500, 2, dtype=FLOAT64, generator=rng(0))
    for x in (steps, steps.cumsum(1), steps.exp()):
        total = autocorrelation(x)[:, 1:].sum(1)
        torch.testing.assert_close(total, torch.full_like(total, -0.5), rtol=0, atol=1e-10)
    ledger(
        "sum of all sample autocorrelations of a random walk",
        exact=-0.5,
        estimate=autocorrelation(steps.cumsum(1))[0, 1:, 0].sum(),
        tolerance=1e-10,
    )
    # Deviations from the true mean instead of the chain's own do not have that property.
    y = steps[0, :, 0]
    lagged = torch.nn.functional.conv1d(
        torch.nn.functional.pad(y, (0, 499))[None, None], y[None, None]
    )[0, 0]
    assert abs(float(lagged[1:].sum() / lagged[0]) + 0.5) > 1e-3


def score_means(draws_from, log_density, grid: torch.Tensor) -> tuple[float, float]:
    """E[s] and E[x s] under one law, with the score of another log-density, by quadrature."""
    x = grid.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_density(x).sum(), x)
    weight = draws_from(grid).softmax(0)  # equal steps, no mass at the ends: accurate to rounding
    return float(weight @ score), float(weight @ (grid * score))


def test_the_score_has_mean_zero_and_x_times_the_score_minus_one():
    grid = torch.linspace(-40, 40, 80_001, dtype=FLOAT64)

    def normal(x):
        return -0.5 * x.square()

    def gumbel(x):  # of no symmetry: the logarithm of a gamma variable, without its constant
        return 2 * x - x.exp()

    def uneven(x):
        return torch.logaddexp(normal((x - 1) / 0.5), math.log(3) + normal(x + 2))

    def far_modes(x):
        return torch.logaddexp(normal(x - 10), math.log(99) + normal(x + 10))

    for p in (normal, gumbel, uneven, far_modes):
        assert score_means(p, p, grid) == pytest.approx((0, -1), abs=1e-10)
    # In one of two modes that lie far apart both hold: a missed mode does not show.
    assert score_means(lambda x: normal(x - 10), far_modes, grid) == pytest.approx(
        (0, -1), abs=1e-10
    )
    # A wrong law shows: shifted, too narrow, the square root of the density.
    assert score_means(lambda x: normal(x - 0.5), normal, grid)[0] == pytest.approx(-0.5)
    assert score_means(lambda x: normal(x / 0.8), normal, grid)[1] == pytest.approx(-0.64)
    assert score_means(lambda x: 0.5 * gumbel(x), gumbel, grid)[1] < -1.5
    # The density has to vanish at the ends: the exponential law's does not at zero.
    half_line = torch.linspace(0, 40, 40_001, dtype=FLOAT64)
    assert score_means(torch.neg, torch.neg, half_line)[0] == pytest.approx(-1)


def ranks(rng, seed: int, *, scale: float) -> torch.Tensor:
    """Ranks of theta ~ N(0, 1) among 9 draws of its posterior given y ~ N(theta, 1)."""
    g = rng(seed)
    theta = torch.randn(20_000, 1, dtype=FLOAT64, generator=g)
    y = theta + torch.randn(20_000, 1, dtype=FLOAT64, generator=g)
    noise = torch.randn(20_000, 9, dtype=FLOAT64, generator=g)
    draws = 0.5 * y + scale * math.sqrt(0.5) * noise
    return (draws < theta).sum(1)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_of_the_truth_among_posterior_draws_are_uniform(rng, seed):
    counts = ranks(rng, seed, scale=1.0).bincount(minlength=10)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-5
    too_narrow = ranks(rng, seed, scale=0.8).bincount(minlength=10)
    assert scipy.stats.chisquare(too_narrow.numpy()).pvalue < 1e-9
