"""The theorems of the chapter on stochastic gradients that no module has a test for."""

import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from companion.gradients import pathwise_gradient, score_function_gradient
from tests.calibration import z_score

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison


# ---------------------------------------------------------------- differences of noisy values


@pytest.mark.parametrize("noise", [1e-3, 1e-1])
def test_a_central_difference_has_the_stated_bias_and_spread(rng, noise):
    # f = exp at 0: all derivatives are 1, and the third is at most e^h on [-h, h].
    best = (3 * noise) ** (1 / 3)
    errors = {}
    for h in (best / 3, best, 3 * best):
        read = noise * torch.randn(2, 200_000, dtype=torch.float64, generator=rng(0))
        found = (math.exp(h) + read[0] - math.exp(-h) - read[1]) / (2 * h)
        bias = math.sinh(h) / h - 1
        assert h**2 / 6 <= bias <= h**2 / 6 * math.exp(h)
        assert abs(z_score(found, 1 + bias)) < Z
        assert abs(z_score((found - 1 - bias) ** 2, noise**2 / (2 * h**2))) < Z
        assert abs(z_score((found - 1 - bias) ** 2, noise**2 / h**2)) > Z  # a one-sided difference
        errors[h] = float((found - 1).square().mean().sqrt())
    assert errors[best] < min(errors[best / 3], errors[3 * best])
    # With the third derivative taken for constant, the least root mean square error.
    assert errors[best] == pytest.approx(best**2 / math.sqrt(12), rel=0.1)


# ---------------------------------------------------------------- a jump of f


def test_a_jump_adds_its_height_times_the_density(rng, ledger):
    mu, height, place = torch.tensor(0.5, dtype=torch.float64), 3.0, 1.0
    density = float(scipy.stats.norm.pdf(place - mu))

    def f(x: Tensor) -> Tensor:
        return torch.where(x > place, x**2 + height, x**2)

    def mean(mu: float) -> float:
        def weighted(x: float) -> float:
            return (x**2 + height * (x > place)) * scipy.stats.norm.pdf(x, mu)

        return scipy.integrate.quad(weighted, -12, 12, points=[place], epsabs=1e-12)[0]

    exact = 2 * float(mu) + height * density
    assert (mean(0.5 + 1e-4) - mean(0.5 - 1e-4)) / 2e-4 == pytest.approx(exact, abs=1e-6)

    def law(t: Tensor) -> Normal:
        return Normal(t, 1.0)

    path = pathwise_gradient(f, law, mu, 50_000, generator=rng(1))
    ledger(
        "d/dmu E[x^2 + 3 [x > 1]]: pathwise gradient plus the jump's term",
        exact=exact,
        estimate=path.value + height * density,
        std_error=path.std_error,
    )
    assert abs(float((path.value - exact) / path.std_error)) > Z  # the jump is lost
    score = score_function_gradient(f, law, mu, 50_000, generator=rng(2))
    ledger(
        "d/dmu E[x^2 + 3 [x > 1]] by the score function",
        exact=exact,
        estimate=score.value,
        std_error=score.std_error,
    )


# ---------------------------------------------------------------- many dimensions


@pytest.mark.parametrize("d", [1, 2, 5, 20])
def test_the_variance_of_the_score_function_grows_with_the_dimension(rng, d):
    # f = sum_i (x_i + 1)^2 under N(mu, I): the variance of one term, for the first component.
    m = 1.5
    rest_mean, rest_variance = (d - 1) * (m**2 + 1), (d - 1) * (4 * m**2 + 2)
    plain = m**4 + 18 * m**2 + 15 + 2 * (m**2 + 3) * rest_mean + rest_mean**2
    exact = {
        None: plain + rest_variance - 4 * m**2,
        d * (m**2 + 1): 8 * m**2 + 10 + rest_variance,
        "pathwise": 4.0,
    }
    n, problems = 50, 4000
    theta = torch.full((problems, d), m - 1, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (x + 1).square().sum(-1)

    def law(t: Tensor) -> Independent:
        return Independent(Normal(t, 1.0), 1)

    for baseline, variance in exact.items():
        if baseline == "pathwise":
            found = pathwise_gradient(f, law, theta, n, generator=rng(3))
        else:
            found = score_function_gradient(f, law, theta, n, baseline=baseline, generator=rng(3))
        first, squared = found.value[:, 0], n * found.std_error[:, 0] ** 2
        assert abs(z_score(first, 2 * m)) < Z
        assert abs(z_score(squared, variance)) < Z
        for other in set(exact.values()) - {variance}:
            assert abs(z_score(squared, other)) > Z


@pytest.mark.parametrize("k", [0.5, 1.0, 3.0])
def test_a_wave_has_the_stated_variances(rng, k):
    # f = sin(k x) under N(0, 1): the gradient is k e^{-k^2/2}.
    exact = k * math.exp(-(k**2) / 2)
    path = k**2 * (1 + math.exp(-2 * k**2)) / 2 - exact**2
    score = (1 - (1 - 4 * k**2) * math.exp(-2 * k**2)) / 2 - exact**2
    z = torch.randn(400_000, dtype=torch.float64, generator=rng(4))
    along, scored = k * (k * z).cos(), (k * z).sin() * z
    for terms, variance, other in ((along, path, score), (scored, score, path)):
        assert abs(z_score(terms, exact)) < Z
        assert abs(z_score((terms - exact) ** 2, variance)) < Z
        assert abs(z_score((terms - exact) ** 2, other)) > Z
