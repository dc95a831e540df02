"""The two posteriors against their definitions, autograd, quadrature and importance sampling."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Bernoulli, HalfCauchy, Normal, StudentT
from torch.nn.functional import logsigmoid

from companion.core import value_and_grad
from companion.importance import importance_sampling
from companion.monte_carlo import estimate
from companion.targets import EightSchools, LogisticRegression, posteriors

F64 = torch.float64
BOTH = pytest.mark.parametrize("parameterization", ["centered", "noncentered"])


def z_scores(values: Tensor, exact: Tensor) -> float:
    """The largest deviation, in units of what 1e-5 allows over all components (Bonferroni)."""
    found = estimate(values)
    limit = scipy.stats.norm.isf(0.5e-5 / exact.numel())
    return float(((found.value - exact) / found.std_error).abs().max()) / limit


def regression(rng, dim=2, rows=30, scale=2.0, seed=0) -> LogisticRegression:
    """Rows with an intercept, correlated columns, and labels of which two in three are 1."""
    g = rng(seed)
    features = torch.randn(rows, dim, dtype=F64, generator=g).cumsum(1)
    features[:, 0] = 1.0
    logits = features @ torch.linspace(1.0, -1.0, dim, dtype=F64)
    labels = torch.rand(rows, dtype=F64, generator=g) < torch.sigmoid(logits)
    return LogisticRegression(features, labels, scale)


# ---------------------------------------------------------------- logistic regression


@pytest.mark.parametrize("dim", [1, 3, 25])
def test_logistic_posterior_is_prior_times_likelihood(rng, dim):
    target = regression(rng, dim)
    x = 2 * torch.randn(4, 50, dim, dtype=F64, generator=rng(1))
    expected = Normal(0.0, x.new_tensor(target.prior_scale)).log_prob(x).sum(-1)
    logits = torch.einsum("nd,...d->...n", target.features, x)
    expected = expected + Bernoulli(logits=logits).log_prob(target.labels).sum(-1)
    torch.testing.assert_close(target(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(target(-x), expected)  # a flipped label would be seen


@pytest.mark.parametrize("dim", [1, 3, 25])
def test_logistic_gradient_agrees_with_autograd(rng, dim):
    target = regression(rng, dim)
    x = 2 * torch.randn(4, 50, dim, dtype=F64, generator=rng(2))
    value, grad = target.value_and_grad(x)
    expected_value, expected_grad = value_and_grad(lambda y: target(y), x)
    torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-11)
    assert torch.equal(target.gradient(x), grad)  # trajectories do not depend on who is asked


def test_logistic_posterior_does_not_overflow(rng):
    target = regression(rng)
    value, grad = target.value_and_grad(torch.full((2,), 1e4, dtype=F64))
    assert torch.equal(target.gradient(torch.full((2,), 1e4, dtype=F64)), grad)
    assert value.isfinite() and grad.isfinite().all() and value < -1e4


@pytest.mark.parametrize(("rows", "scale"), [(30, 2.0), (3, 10.0), (40, 100.0)])
def test_laplace_approximation_is_the_mode_and_the_curvature_there(rng, rows, scale):
    target = regression(rng, 3, rows, scale)
    mode, covariance = target.laplace()
    assert target.value_and_grad(mode)[1].abs().max() < 1e-10
    hessian = torch.autograd.functional.hessian(target.log_prob, mode)
    torch.testing.assert_close(-hessian @ covariance, torch.eye(3, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rows", "scale"), [(20, 2.0), (3, 1.0), (1, 10.0), (60, 30.0)])
def test_logistic_moments_of_one_coefficient_agree_with_adaptive_quadrature(
    rng, rows, scale, ledger
):
    target = regression(rng, dim=1, rows=rows, scale=scale)
    at = float(target.laplace()[0])
    top = float(target(torch.tensor([at], dtype=F64)))

    def moment(power: int) -> float:
        def integrand(x: float) -> float:
            return x**power * math.exp(float(target(torch.tensor([x], dtype=F64))) - top)

        halves = [(-12 * scale, at), (at, 12 * scale)]
        found = [scipy.integrate.quad(integrand, a, b, epsabs=1e-13, limit=500) for a, b in halves]
        return sum(value for value, _ in found)

    total, mean = moment(0), moment(1) / moment(0)
    name = f"logistic regression, {rows} rows, prior {scale:g}"
    tolerance = 1e-9
    ledger(
        f"{name}: log Z", exact=math.log(total) + top, estimate=target.log_z, tolerance=tolerance
    )
    ledger(f"{name}: mean", exact=mean, estimate=target.mean, tolerance=tolerance * scale)
    variance = moment(2) / total - mean**2
    assert float(target.covariance) == pytest.approx(variance, rel=1e-8)


@pytest.mark.parametrize("dim", [2, 3])
def test_logistic_moments_agree_with_importance_sampling(rng, dim, ledger):
    target = regression(rng, dim)
    mode, covariance = target.laplace()

    class Proposal:  # Student's t, wider than the Laplace approximation: bounded weights
        factor = 1.1 * torch.linalg.cholesky(covariance)
        t = StudentT(torch.tensor(8.0, dtype=F64))

        def sample(self, n, *, generator):
            normal = torch.randn(9, n, dim, dtype=F64, generator=generator)
            return mode + (normal[0] / (normal[1:].square().mean(0)).sqrt()) @ self.factor.T

        def log_prob(self, x):
            z = torch.linalg.solve(self.factor, (x - mode).T).T
            return self.t.log_prob(z).sum(-1) - self.factor.diagonal().log().sum()

    found = importance_sampling(target, Proposal(), 100_000, generator=rng(3))
    assert found.ess > 50_000
    name = f"logistic regression of {dim} coefficients"
    for what, exact, result in [
        ("log Z", target.log_z, found.log_z),
        ("posterior mean of the last", target.mean[-1], found.expectation(lambda x: x[:, -1])),
    ]:
        ledger(
            f"{name}: {what}, importance sampling",
            exact=exact,
            estimate=result.value,
            std_error=result.std_error,
        )
    spread = found.expectation(lambda x: (x[:, 0] - target.mean[0]) * (x[:, -1] - target.mean[-1]))
    assert abs(spread.value - target.covariance[0, -1]) < 4.5 * spread.std_error
    # The Laplace approximation, a plausible shortcut, is rejected.
    laplace = float(target(mode)) + 0.5 * torch.logdet(2 * math.pi * covariance)
    assert abs(laplace - found.log_z.value) > 4.5 * found.log_z.std_error


def test_logistic_moments_of_more_than_three_coefficients_are_refused(rng):
    target = regression(rng, 4)
    for name in ("log_z", "mean", "covariance"):
        with pytest.raises(ValueError, match="at most three coefficients; this regression has 4"):
            getattr(target, name)


def test_logistic_moments_that_the_grid_does_not_resolve_are_refused(rng, monkeypatch):
    monkeypatch.setattr(posteriors, "_MAX_POINTS", 40)
    with pytest.raises(RuntimeError, match="Use a narrower prior"):
        _ = regression(rng, dim=1).mean


# ---------------------------------------------------------------- eight schools


@BOTH
def test_eight_schools_is_prior_times_likelihood(rng, parameterization):
    target = EightSchools(parameterization, dtype=F64, device="cpu")
    x = torch.randn(4, 50, 10, dtype=F64, generator=rng(4)) * 2
    mu, tau, eta = x[..., 0], x[..., 1].exp(), x[..., 2:]
    theta = eta if parameterization == "centered" else mu[..., None] + tau[..., None] * eta
    five = x.new_tensor(5.0)
    expected = Normal(0.0, five).log_prob(mu) + HalfCauchy(five).log_prob(tau) + x[..., 1]
    if parameterization == "centered":
        expected += Normal(mu[..., None], tau[..., None]).log_prob(theta).sum(-1)
    else:
        expected += Normal(0.0, five / 5).log_prob(eta).sum(-1)
    expected += Normal(theta, target.errors).log_prob(target.effects).sum(-1)
    torch.testing.assert_close(target(x), expected, rtol=1e-12, atol=1e-10)
    parameters = torch.cat([mu[..., None], tau[..., None], theta], -1)
    torch.testing.assert_close(target.transform(x), parameters, rtol=1e-14, atol=0)


@BOTH
def test_eight_schools_gradient_agrees_with_autograd(rng, parameterization):
    target = EightSchools(parameterization, dtype=F64, device="cpu")
    x = torch.randn(4, 50, 10, dtype=F64, generator=rng(5)) * 2
    value, grad = target.value_and_grad(x)
    expected_value, expected_grad = value_and_grad(lambda y: target(y), x)
    torch.testing.assert_close(value, expected_value, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-10)


class _Heavy:
    """Student's t around the noncentered posterior's moments, save log tau, which is logistic of
    scale 1, as wide as its tails; the draws are mapped to `target`'s parameterisation."""

    def __init__(self, target: EightSchools) -> None:
        known = EightSchools("noncentered", dtype=F64, device="cpu")
        self.centre, self.scale = known.mean, known.covariance.diagonal().sqrt()
        self.scale[1] = 1.0
        self.centered = target.parameterization == "centered"

    def sample(self, n, *, generator):
        normal = torch.randn(9, n, 10, dtype=F64, generator=generator)
        z = normal[0] / normal[1:].square().mean(0).sqrt()
        z[:, 1] = torch.rand(n, dtype=F64, generator=generator).logit(1e-16)
        x = self.centre + self.scale * z
        if self.centered:
            x[:, 2:] = x[:, :1] + x[:, 1:2].exp() * x[:, 2:]
        return x

    def log_prob(self, x):
        mu, u, eta = x[:, :1], x[:, 1:2], x[:, 2:]
        jacobian = -8.0 * u[:, 0] if self.centered else 0.0
        eta = (eta - mu) / u.exp() if self.centered else eta
        z = (torch.cat([mu, u, eta], 1) - self.centre) / self.scale
        log_q = StudentT(torch.tensor(8.0, dtype=F64)).log_prob(z)
        log_q[:, 1] = logsigmoid(z[:, 1]) + logsigmoid(-z[:, 1])
        return log_q.sum(1) - self.scale.log().sum() + jacobian


@BOTH
def test_eight_schools_evidence_agrees_with_importance_sampling(rng, parameterization, ledger):
    target = EightSchools(parameterization, dtype=F64, device="cpu")
    found = importance_sampling(target, _Heavy(target), 100_000, generator=rng(6))
    assert found.ess > 20_000
    ledger(
        f"eight schools, {parameterization}: log evidence, importance sampling",
        exact=target.log_z,
        estimate=found.log_z.value,
        std_error=found.log_z.std_error,
    )
    tau = found.expectation(lambda x: x[:, 1].exp())
    ledger(
        f"eight schools, {parameterization}: mean of tau, importance sampling",
        exact=target.parameter_mean[1],
        estimate=tau.value,
        std_error=tau.std_error,
    )
    # With the Jacobian of log tau counted twice (without it there is no posterior) it fails.
    log_weights = found.log_weights + found.x[:, 1]
    assert abs(log_weights.exp().mean().log() - target.log_z) > 4.5 * found.log_z.std_error


def test_both_parameterisations_are_one_posterior(rng, ledger):
    centered, noncentered = (
        EightSchools(name, dtype=F64, device="cpu") for name in ("centered", "noncentered")
    )
    ledger(
        "eight schools: log evidence, centered and noncentered",
        exact=centered.log_z,
        estimate=noncentered.log_z,
    )
    assert torch.equal(centered.parameter_mean, noncentered.parameter_mean)
    x, y = centered.sample(1000, generator=rng(7)), noncentered.sample(1000, generator=rng(7))
    torch.testing.assert_close(centered.transform(x), noncentered.transform(y))
    difference = noncentered(y) - centered(x)
    torch.testing.assert_close(difference, 8.0 * x[:, 1])  # the Jacobian of theta by eta


def test_eight_schools_moments_agree_with_posteriordb(ledger):
    """Means and their Monte Carlo standard errors of 10,000 draws by Stan, from posteriordb
    (Magnusson et al., 2025), summary statistics of eight_schools-eight_schools_noncentered."""
    means = [4.41051833695493, 3.60205952364059, 6.15050229334425, 4.9395811407422]
    means += [3.90590609001582, 4.79601675138494, 3.6144363246799, 4.0511475789675]
    means += [6.31716975886893, 4.88399694353288]
    errors = [0.0330374705950917, 0.0318615135640706, 0.0557375282295219, 0.0462293788624847]
    errors += [0.0542313705632124, 0.0474935816762281, 0.0461450610244603, 0.0485195392528031]
    errors += [0.0498766794075794, 0.0542511606560972]
    target = EightSchools(dtype=F64, device="cpu")
    names = ["mu", "tau", *(f"theta {i}" for i in range(1, 9))]
    for name, exact, mean, error in zip(names, target.parameter_mean, means, errors, strict=True):
        what = f"eight schools: mean of {name}, 10,000 draws by Stan (posteriordb)"
        ledger(what, exact=exact, estimate=mean, std_error=error)
    # Their errors are sd / sqrt(10,000) of nearly independent draws.
    ratio = target.parameter_std / 100 / torch.tensor(errors, dtype=F64)
    assert (ratio - 1).abs().max() < 0.05


def test_eight_schools_moments_do_not_depend_on_the_grid(monkeypatch):
    fine = EightSchools(dtype=F64, device="cpu")
    monkeypatch.setattr(posteriors, "_SPACING", 1.0 / 8.0)
    coarse = EightSchools(dtype=F64, device="cpu")
    assert coarse.log_z == pytest.approx(fine.log_z, abs=1e-12)
    for name in ("mean", "covariance", "parameter_mean", "parameter_std"):
        torch.testing.assert_close(
            getattr(coarse, name), getattr(fine, name), rtol=1e-10, atol=1e-11
        )


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_eight_schools_draws_have_its_moments(rng, device, parameterization, dtype):
    target = EightSchools(parameterization, dtype=dtype, device=device)
    x = target.sample(40_000, generator=rng(8, device))
    assert (x.dtype, x.device.type) == (dtype, device.type)
    mean, covariance = target.mean.double(), target.covariance.double()

    def deviations(x: Tensor) -> list[float]:
        centred = x - mean
        products = centred[:, :, None] * centred[:, None, :]
        return [z_scores(x, mean), z_scores(products.flatten(1), covariance.flatten())]

    assert max(deviations(x.double())) < 1
    parameters = target.transform(x).double()
    assert z_scores(parameters, target.parameter_mean.double()) < 1
    spread = (parameters - target.parameter_mean.double()).square()
    assert z_scores(spread, target.parameter_std.double().square()) < 1
    # The means are right, and mu's spread is 5 % too small.
    wrong = x.double().clone()
    wrong[:, 0] = mean[0] + 0.95 * (wrong[:, 0] - mean[0])
    assert max(deviations(wrong)) > 1


@BOTH
def test_eight_schools_draws_and_gradient_belong_together(rng, parameterization):
    """Integration by parts: E[x_i d log p / d x_j] = -1 if i = j, else 0, and E[gradient] = 0.

    The centered gradient by theta and mu is of size 1 / tau, and its variance infinite: there only
    that by log tau is looked at."""
    target = EightSchools(parameterization, dtype=F64, device="cpu")
    x = target.sample(40_000, generator=rng(9))
    with_one = torch.cat([torch.ones_like(x[:, :1]), x], 1)
    exact = -torch.eye(11, dtype=F64)[:, 1:]
    use = [1] if parameterization == "centered" else list(range(10))

    def deviation(grad: Tensor) -> float:
        return z_scores(
            (with_one[:, :, None] * grad[:, None, use]).flatten(1), exact[:, use].flatten()
        )

    grad = target.value_and_grad(x)[1]
    assert deviation(grad) < 1
    slip = grad.clone()
    slip[:, 1] -= 1.0  # the Jacobian of log tau forgotten
    assert deviation(slip) > 1


@BOTH
def test_eight_schools_draws_of_tau_follow_its_law(rng, parameterization):
    """Against adaptive quadrature over tau, with the other parameters integrated out at once."""
    target = EightSchools(parameterization, dtype=F64, device="cpu")
    y, sigma = target.effects.numpy(), target.errors.numpy()

    def density(tau: float) -> float:
        covariance = np.diag(sigma**2 + tau**2) + 25.0  # mu integrated out
        log_likelihood = scipy.stats.multivariate_normal.logpdf(y, cov=covariance)
        return math.exp(log_likelihood + scipy.stats.halfcauchy.logpdf(tau, 0, 5) - target.log_z)

    edges = [0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 6.0, 10.0, 15.0, math.inf]
    masses = [scipy.integrate.quad(density, a, b)[0] for a, b in pairwise(edges)]
    assert sum(masses) == pytest.approx(1.0, abs=1e-7)
    expected = torch.tensor(masses, dtype=F64) * 100_000 / sum(masses)
    tau = target.transform(target.sample(100_000, generator=rng(10)))[:, 1].contiguous()

    def p_value(tau: Tensor) -> float:
        cell = torch.bucketize(tau, torch.tensor(edges[1:-1], dtype=F64))
        return scipy.stats.chisquare(cell.bincount(minlength=9), expected.numpy()).pvalue

    assert p_value(tau) > 1e-5
    assert p_value(tau * 1.03) < 1e-5


# ---------------------------------------------------------------- arguments and dtypes


@pytest.mark.parametrize(
    ("make", "scale"),
    [
        (lambda rng, like: regression(rng), 1.0),
        (lambda rng, like: EightSchools("centered", **like), 1.0),
        (lambda rng, like: EightSchools("noncentered", **like), 1.0),
    ],
    ids=["logistic", "centered", "noncentered"],
)
def test_float32_agrees_with_float64(rng, device, make, scale):
    exact = make(rng, {"dtype": F64, "device": "cpu"})
    found = make(rng, {"dtype": torch.float32, "device": device})
    if isinstance(exact, LogisticRegression):
        features = exact.features.to(device, torch.float32)
        found = LogisticRegression(features, exact.labels.to(device), exact.prior_scale)
    x = exact.mean + scale * torch.randn(100, len(exact.mean), dtype=F64, generator=rng(11))
    single = found.value_and_grad(x.to(device, torch.float32))
    pairs = [*zip(single, exact.value_and_grad(x), strict=True)]
    pairs += [(found.mean, exact.mean), (found.covariance, exact.covariance)]
    for a, b in pairs:
        assert (a.dtype, a.device.type) == (torch.float32, device.type)
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert found.log_z == pytest.approx(exact.log_z, abs=1e-5)


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: LogisticRegression(torch.ones(3), torch.ones(3), 1.0), "2 dimensions"),
        (lambda: LogisticRegression(torch.ones(3, 2), torch.ones(2), 1.0), r"\(3,\), got \(2,\)"),
        (lambda: LogisticRegression(torch.ones(3, 2), 2 * torch.ones(3), 1.0), "zeros and ones"),
        (lambda: LogisticRegression(torch.ones(3, 2), torch.ones(3), 0.0), "prior_scale"),
        (lambda: EightSchools("central"), "'centered' or 'noncentered', got 'central'"),
    ],
)
def test_posteriors_that_do_not_exist_are_refused(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()


def test_points_that_do_not_fit_are_refused(rng):
    for target, dim in ((regression(rng), 2), (EightSchools(dtype=F64, device="cpu"), 10)):
        for x in (torch.zeros(5, 4).double(), torch.zeros(dim), torch.zeros(()).double()):
            for call in (target, target.value_and_grad):
                with pytest.raises(
                    ValueError, match=rf"x must be \(\.\.\., {dim}\) of torch.float64"
                ):
                    call(x)


def test_no_tensor_is_made_on_the_default_device(rng):
    generator = rng(12)
    data = regression(rng)
    with torch.device("meta"):
        logistic = LogisticRegression(data.features, data.labels, 2.0)
        schools = EightSchools("noncentered", dtype=F64, device="cpu")
        x = schools.sample(5, generator=generator)
        tensors = (*logistic.value_and_grad(x[:, :2]), *logistic.laplace(), logistic.mean)
        tensors += (*schools.value_and_grad(x), schools.transform(x), schools.parameter_std)
    assert {t.device.type for t in tensors} == {"cpu"}
