"""The evidence from posterior draws against closed forms and quadrature; the harmonic mean."""

import math
import sys
import warnings

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import (
    Beta,
    Binomial,
    Dirichlet,
    Gamma,
    HalfNormal,
    InverseGamma,
    LKJCholesky,
    Multinomial,
    MultivariateNormal,
    Normal,
    Poisson,
    constraints,
)

from companion.core import sample
from companion.inputs import draw
from companion.logz import evidence, harmonic_mean
from companion.mcmc import random_walk
from companion.targets import LogisticRegression
from tests.mcmc.exact_targets import plant

F64 = torch.float64
Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
METHODS = pytest.mark.parametrize("method", ["normal", "warp"])
MODULE = sys.modules["companion.logz.marginal_likelihood"]


def chains_of(law, num_draws: int, generator, shape=()) -> Tensor:
    """Independent draws of a posterior that is known, as four chains."""
    return draw(law, 4 * num_draws, generator=generator).reshape(4, num_draws, *shape)


def t(*values: float, device="cpu") -> Tensor:
    return torch.tensor(values, dtype=F64, device=device)


# ---------------------------------------------------------------- closed forms


def regression(device):
    """`y ~ N(A x, s^2)`, `x ~ N(0, s^2 v)`, `s^2 ~ InverseGamma(a, b)`: log-density of (x, s^2),
    exact log evidence, and exact draws of the posterior."""
    grid = torch.linspace(-1.0, 1.0, 12, dtype=F64, device=device)
    features = torch.stack([torch.ones_like(grid), grid, grid.square()], 1)
    y = features @ t(1.0, -2.0, 0.5, device=device) + 0.4 * (7.0 * grid).sin()
    v, a, b = 4.0, 2.0, 1.0
    precision = torch.eye(3, dtype=F64, device=device) / v + features.T @ features
    covariance = precision.inverse()
    mean = covariance @ features.T @ y
    a_n = a + 0.5 * len(y)
    b_n = b + 0.5 * float(y @ y - mean @ precision @ mean)
    exact = (
        -0.5 * len(y) * math.log(2.0 * math.pi)
        - 0.5 * float(precision.logdet() + 3.0 * math.log(v))
        + a * math.log(b)
        - a_n * math.log(b_n)
        + math.lgamma(a_n)
        - math.lgamma(a)
    )

    def log_prob(x: Tensor) -> Tensor:
        coefficients, variance = x[..., :3], x[..., 3]
        sd = variance.sqrt()[..., None]
        prior = InverseGamma(*t(a, b, device=device)).log_prob(variance)
        prior = prior + Normal(0.0, math.sqrt(v) * sd).log_prob(coefficients).sum(-1)
        return prior + Normal(coefficients @ features.T, sd).log_prob(y).sum(-1)

    def posterior(n: int, generator) -> Tensor:
        shape, scale = t(a_n, device=device)[0], t(b_n, device=device)[0]
        variance = scale / draw(Gamma(shape, torch.ones_like(scale)), n, generator=generator)
        noise = torch.randn(n, 3, dtype=F64, device=device, generator=generator)
        noise = noise @ torch.linalg.cholesky(covariance).T
        return torch.cat([mean + variance.sqrt()[:, None] * noise, variance[:, None]], 1)

    support = constraints.stack([constraints.real] * 3 + [constraints.positive], -1)
    return log_prob, exact, posterior, support


@METHODS
def test_the_evidence_of_a_linear_regression_of_unknown_variance(rng, device, ledger, method):
    log_prob, exact, posterior, support = regression(device)
    g = rng(0, device)
    x = posterior(4000, g).reshape(4, 1000, 4)
    log_z = evidence(log_prob, x, support=support, method=method, generator=g)
    assert log_z.std_error < 0.02
    ledger(
        f"evidence of a linear regression, {method}",
        exact=exact,
        estimate=log_z.value,
        std_error=log_z.std_error,
    )

    # Its coordinates as they are, a variance among them, do as well, if not as closely.
    def bounded(x: Tensor) -> Tensor:
        inside = x[..., 3] > 0.0
        ones = torch.ones_like(x)
        return torch.where(inside, log_prob(torch.where(inside[..., None], x, ones)), -math.inf)

    plain = evidence(bounded, x, method=method, generator=g)
    assert abs(plain.value - exact) < Z * plain.std_error


def counts(device):
    """Poisson counts with a Gamma prior of the rate: the posterior is a Gamma law, too."""
    y, one = t(3.0, 1.0, 4.0, 1.0, 5.0, device=device), t(1.0, device=device)[0]

    def log_prob(rate: Tensor) -> Tensor:
        return Gamma(2.0 * one, one).log_prob(rate) + Poisson(rate[..., None]).log_prob(y).sum(-1)

    a, b = 2.0 + float(y.sum()), 1.0 + len(y)
    exact = math.lgamma(a) - a * math.log(b) - float(torch.lgamma(y + 1.0).sum())
    return log_prob, exact, Gamma(a * one, b * one)


def half_normal(device):
    """A half-normal prior of x, and one datum 0 of N(x, 1)."""
    one = t(1.0, device=device)[0]

    def log_prob(x: Tensor) -> Tensor:
        return HalfNormal(one).log_prob(x) + Normal(0.0 * one, one).log_prob(x)

    # 2 / (2 pi) int_0^inf exp(-x^2) dx, and the posterior is half-normal
    return log_prob, math.log(0.5 / math.sqrt(math.pi)), HalfNormal(one / math.sqrt(2.0))


def coin(device):
    """2 heads of 10 with a uniform prior: 1 / 11."""
    one = t(1.0, device=device)[0]

    def log_prob(p: Tensor) -> Tensor:
        return Beta(one, one).log_prob(p) + Binomial(10, p).log_prob(2.0 * one)

    return log_prob, -math.log(11.0), Beta(3.0 * one, 9.0 * one)


CASES = {
    "Poisson counts": (counts, constraints.positive),
    "half-normal prior": (half_normal, constraints.positive),
    "two heads of ten": (coin, constraints.unit_interval),
}


@METHODS
@pytest.mark.parametrize("name", CASES)
def test_constrained_parameters_with_closed_forms(rng, device, ledger, name, method):
    make, support = CASES[name]
    log_prob, exact, posterior = make(device)
    g = rng(0, device)
    x = chains_of(posterior, 1000, g)
    log_z = evidence(log_prob, x, support=support, method=method, generator=g)
    ledger(
        f"evidence: {name}, {method}",
        exact=exact,
        estimate=log_z.value,
        std_error=log_z.std_error,
    )
    assert 1e-5 < log_z.std_error < 0.03


def test_probabilities_that_sum_to_one_lose_a_coordinate(rng, device, ledger):
    """Dirichlet prior and multinomial counts."""
    prior, y = t(1.0, 2.0, 0.5, 1.5, device=device), t(4.0, 1.0, 7.0, 3.0, device=device)

    def log_prob(p: Tensor) -> Tensor:
        choices = Multinomial(15, probs=p, validate_args=False)
        return Dirichlet(prior).log_prob(p) + choices.log_prob(y.expand(p.shape))

    def log_beta(a: Tensor) -> float:
        return float(torch.lgamma(a).sum() - torch.lgamma(a.sum()))

    coefficient = math.lgamma(16.0) - float(torch.lgamma(y + 1.0).sum())
    g = rng(0, device)
    x = chains_of(Dirichlet(prior + y), 1000, g, (4,))
    log_z = evidence(log_prob, x, support=constraints.simplex, generator=g)
    ledger(
        "evidence of multinomial counts",
        exact=log_beta(prior + y) - log_beta(prior) + coefficient,
        estimate=log_z.value,
        std_error=log_z.std_error,
    )


def test_constants_that_are_dropped_are_missing(rng):
    """As in R's bridgesampling, issue 23: `y ~ binomial(n, p)` of Stan leaves out what does not
    depend on p, and 1/11 becomes 1/11/45."""
    log_prob, exact, posterior = coin("cpu")

    def dropped(p: Tensor) -> Tensor:
        return 2.0 * p.log() + 8.0 * (1.0 - p).log()

    x = chains_of(posterior, 500, rng(0))
    right, wrong = (
        evidence(f, x, support=constraints.unit_interval, generator=rng(1))
        for f in (log_prob, dropped)
    )
    assert abs(right.value - exact) < Z * right.std_error
    torch.testing.assert_close(right.value - wrong.value, t(math.log(45.0))[0])


@METHODS
def test_a_jacobian_that_is_dropped_is_seen(rng, monkeypatch, method):
    log_prob, exact, posterior = counts("cpu")
    plant(monkeypatch, evidence.__wrapped__, "jacobian = jacobian + change", "jacobian + change")
    wrong = torch.no_grad()(MODULE.evidence)
    x = chains_of(posterior, 500, rng(0))
    log_z = wrong(log_prob, x, support=constraints.positive, method=method, generator=rng(1))
    assert abs(log_z.value - exact) > 3 * Z * log_z.std_error


# ---------------------------------------------------------------- Markov chains


def test_a_logistic_regression_by_quadrature(rng, device, ledger):
    like = {"dtype": F64, "device": device}
    grid = torch.linspace(-2.0, 2.0, 15, **like)
    features = torch.stack([torch.ones_like(grid), grid], 1)
    target = LogisticRegression(features, (grid > -0.3).double(), prior_scale=3.0)
    g = rng(0, device)
    x0 = torch.randn(16, 2, generator=g, **like)
    trace = sample(random_walk(target, 2.0), x0, 500, warmup=200, generator=g)
    for method in ("normal", "warp"):
        log_z = evidence(target, trace, method=method, generator=g)
        ledger(
            f"evidence of a logistic regression, {method}",
            exact=target.log_z,
            estimate=log_z.value,
            std_error=log_z.std_error,
        )


class Skewed:
    """Lognormal coordinates over all of space, so that no constraint is needed; Z = 1."""

    def __init__(self, dim: int, sd: float):
        self.dim, self.sd = dim, sd

    def __call__(self, x: Tensor) -> Tensor:
        inside = (x > 0.0).all(-1)
        log = torch.where(x > 0.0, x, 1.0).log()
        value = (-0.5 * (log / self.sd).square() - log).sum(-1)
        constant = self.dim * math.log(self.sd * math.sqrt(2.0 * math.pi))
        return torch.where(inside, value - constant, -math.inf)

    def chains(self, num_chains: int, num_draws: int, rho: float, generator) -> Tensor:
        """Of an autoregression of the logarithms, started in equilibrium."""
        noise = torch.randn(num_draws, num_chains, self.dim, dtype=F64, generator=generator)
        x = [noise[0]]
        for e in noise[1:]:
            x.append(rho * x[-1] + math.sqrt(1.0 - rho**2) * e)
        return (self.sd * torch.stack(x, 1)).exp()


def test_the_standard_error_counts_autocorrelation(rng, monkeypatch):
    target, g = Skewed(2, 0.4), rng(0)
    x = target.chains(800, 200, 0.9, g).split(4)
    low, high = stats.chi2.ppf([0.5e-5, 1.0 - 0.5e-5], 200)

    def z_scores(estimate, num: int) -> Tensor:
        found = [estimate(target, chains, generator=g) for chains in x[:num]]
        return torch.stack([log_z.value / log_z.std_error for log_z in found])

    z = z_scores(evidence, 200)
    assert low < z.square().sum() < high
    assert z.mean().abs() < Z / math.sqrt(200)
    # As if draws were independent.
    independent = "flatten(0, 1), normal, z_normal[0])"
    plant(
        monkeypatch,
        evidence.__wrapped__,
        "bridge_sampling(target, z, normal, z_normal, chains=True)",
        f"bridge_sampling(target, z.{independent}",
    )
    wrong = z_scores(torch.no_grad()(MODULE.evidence), 60).square().sum()
    assert wrong > stats.chi2.ppf(1.0 - 0.5e-5, 60)


def test_warping_helps_where_the_posterior_is_skewed(rng):
    target, g = Skewed(4, 0.5), rng(0)
    x = target.chains(320, 80, 0.0, g).split(4)
    error = {
        method: torch.stack([evidence(target, c, method=method, generator=g).value for c in x])
        for method in ("normal", "warp")
    }
    variance = {method: float(e.square().mean()) for method, e in error.items()}
    assert variance["warp"] < 0.7 * variance["normal"]


def test_fitting_and_bridging_with_the_same_draws_is_biased(rng, monkeypatch):
    """Why the draws are split: a law fitted to few draws looks like these, not like others."""
    d, g = 8, rng(0)
    exact = 0.5 * d * math.log(2.0 * math.pi)

    def mean_error(estimate) -> Tensor:
        x = torch.randn(80, 2, 20, d, dtype=F64, generator=g)
        values = [
            estimate(lambda x: -0.5 * x.square().sum(-1), chains, generator=g).value for chains in x
        ]
        error = torch.stack(values) - exact
        return error.mean() / error.std() * math.sqrt(80)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = mean_error(evidence)
        plant(monkeypatch, evidence.__wrapped__, "(second - mean)", "(first - mean)")
        wrong = mean_error(torch.no_grad()(MODULE.evidence))
    assert abs(right) < Z
    assert abs(wrong) > 2 * Z


# ---------------------------------------------------------------- shapes, devices, refusals


def test_events_of_any_shape_and_float32(rng, device):
    like = {"device": device}
    law = MultivariateNormal(torch.zeros(4, **like), 0.5 * torch.eye(4, **like) + 0.5)

    def log_prob(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return law.log_prob(x.flatten(-2))

    x = chains_of(law, 200, rng(0, device), (2, 2))
    log_z = evidence(log_prob, x, generator=rng(1, device))
    assert log_z.value.dtype == F64
    assert abs(log_z.value) < max(Z * float(log_z.std_error), 1e-5)
    flat = evidence(law.log_prob, x.flatten(2), generator=rng(1, device))
    torch.testing.assert_close(log_z.value, flat.value)


def test_correlation_matrices_are_events(rng, device, ledger):
    """By their Cholesky factors, 3 by 3, which have three unbounded coordinates. Drawn by partial
    correlations (Lewandowski and others 2009): not all of those of `LKJCholesky.sample` of PyTorch
    2.13 follow its own density."""
    one = t(1.0, device=device)[0]
    law, g = LKJCholesky(3, 2.0 * one, validate_args=False), rng(0, device)
    r = [2.0 * chains_of(Beta(a * one, a * one), 500, g) - 1.0 for a in (2.5, 2.5, 2.0)]
    s = [(1.0 - a.square()).sqrt() for a in r]
    zero = torch.zeros_like(r[0])
    entries = [zero + 1.0, zero, zero, r[0], s[0], zero, r[1], s[1] * r[2], s[1] * s[2]]
    x = torch.stack(entries, -1).reshape(4, 500, 3, 3)
    log_z = evidence(law.log_prob, x, support=constraints.corr_cholesky, generator=g)
    ledger(
        "a law of correlation matrices", exact=0.0, estimate=log_z.value, std_error=log_z.std_error
    )
    assert 1e-3 < log_z.std_error < 0.03


def test_a_posterior_that_no_normal_law_resembles_is_loud(rng):
    target = Skewed(60, 0.9)
    with pytest.warns(UserWarning, match="hardly overlap"):
        log_z = evidence(target, target.chains(4, 200, 0.0, rng(0)), generator=rng(1))
    assert log_z.std_error > 0.3


def test_bad_input_gets_a_sentence(rng):
    x = torch.rand(4, 100, 2, generator=rng(0), dtype=F64)

    def density(x: Tensor) -> Tensor:
        return -x.square().sum(-1)

    with pytest.raises(ValueError, match="method must be one of normal, warp; got 'wrap'"):
        evidence(density, x, method="wrap")
    with pytest.raises(ValueError, match="8 draws a chain or more, got 7"):
        evidence(density, x[:, :7])
    with pytest.raises(ValueError, match=r"shape \(chains, draws, \*event\)"):
        evidence(density, x[0, :, 0])
    with pytest.raises(ValueError, match="no normal law in 2 dimensions fits"):
        evidence(density, x[..., :1].expand(4, 100, 2))
    with pytest.raises(ValueError, match="draws are outside of the support"):
        evidence(density, x - 0.5, support=constraints.positive)
    with pytest.raises(ValueError, match=r"one number a point: .* it gave \(4, 50, 2\)"):
        evidence(lambda x: -x.square(), x)
    with pytest.raises(TypeError, match="tensor"):
        evidence(density, [1.0])


def test_all_tensors_follow_the_draws(rng):
    log_prob, _, posterior = counts("cpu")
    x = chains_of(posterior, 50, rng(0))
    torch.set_default_device("meta")
    try:
        log_z = evidence(log_prob, x, support=constraints.positive, generator=rng(0))
        assert log_z.value.device.type == "cpu"
    finally:
        torch.set_default_device("cpu")


# ---------------------------------------------------------------- the harmonic mean


def normal_model(prior_sd: float, n: int, batch: int, generator) -> tuple[Tensor, float]:
    """One datum 0 of N(x, 1), `x ~ N(0, prior_sd^2)`: log-likelihoods at exact posterior draws,
    `(n, batch)`, and the log evidence."""
    sd = (1.0 + prior_sd**-2) ** -0.5
    x = sd * torch.randn(n, batch, dtype=F64, generator=generator)
    exact = -0.5 * math.log(2.0 * math.pi * (1.0 + prior_sd**2))
    return Normal(x, 1.0).log_prob(torch.zeros((), dtype=F64)), exact


def test_the_harmonic_mean_is_right_where_the_prior_is_narrow(rng, ledger):
    log_likelihood, exact = normal_model(0.5, 20_000, 1, rng(0))
    log_z = harmonic_mean(log_likelihood[:, 0])
    ledger(
        "harmonic mean under a narrow prior",
        exact=exact,
        estimate=log_z.value,
        std_error=log_z.std_error,
    )


def test_the_harmonic_mean_is_wrong_where_the_prior_is_wide(rng):
    log_likelihood, exact = normal_model(20.0, 10_000, 20, rng(0))
    with pytest.warns(UserWarning, match=r"infinite variance.*k-hat is up to [01]\.") as caught:
        log_z = harmonic_mean(log_likelihood)
    assert caught[0].filename == __file__
    error = log_z.value - exact
    assert (error > 1.0).double().mean() > 0.8  # too high in nearly every run, and in most
    assert (error > Z * log_z.std_error).double().mean() > 0.5  # by far more than they say
    # Twice as wide a prior halves Z. The estimate does not notice.
    with pytest.warns(UserWarning, match="infinite variance"):
        wider = harmonic_mean(normal_model(40.0, 10_000, 20, rng(1))[0])
    change = float(wider.value.median() - log_z.value.median())
    assert abs(change) < 0.3 < abs(-math.log(2.0))


def test_the_harmonic_mean_refuses_what_says_nothing():
    with pytest.raises(ValueError, match="at least 25"):
        harmonic_mean(torch.zeros(10))
    with pytest.raises(ValueError, match="NaN"):
        harmonic_mean(torch.full((100,), math.nan))
