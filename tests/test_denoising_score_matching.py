"""What the chapter on denoising score matching proves beyond the module's own tests."""

import math

import pytest
import torch

from companion.targets import GaussianMixture

F64 = torch.float64


def normal_rule(limit=9.0, num=181):
    """Points and weights of the trapezoidal rule for N(0, 1)."""
    e = torch.linspace(-limit, limit, num, dtype=F64)
    weights = (-e.square() / 2).exp() / math.sqrt(2 * math.pi) * (e[1] - e[0])
    return e, weights


def slope_gradient(v, e, sigma, a):
    """The gradient by a of 1/2 (s(x) + e / sigma)^2 with s(x) = -a x."""
    x = v + sigma * e
    return -x * (e / sigma - a * x)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_the_gradient_of_the_linear_model_has_variance_one_over_sigma2(sigma, ledger):
    e, w = normal_rule()
    weights = torch.outer(w, w)

    def moments(a):
        gradient = slope_gradient(e[:, None], e, sigma, a)
        mean = (weights * gradient).sum()
        return mean, (weights * gradient.square()).sum() - mean.square()

    mean, variance = moments(1 / (1 + sigma**2))
    assert abs(mean) < 1e-10
    ledger(
        f"denoising score matching, noise {sigma}: sigma^2 times the variance of the gradient",
        exact=1.0,
        estimate=variance * sigma**2,
    )
    assert abs(moments(1.0)[0]) > 1e-3  # the slope of the data's own score is no minimum


def test_the_estimated_slope_has_the_predicted_variance(rng, ledger):
    sigma, n, repeats = 0.5, 1000, 1000
    g = rng(0)
    v, e = torch.randn(2, repeats, n, dtype=F64, generator=g)
    x = v + sigma * e
    a = (x * e / sigma).sum(-1) / x.square().sum(-1)
    exact = 1 / (sigma**2 * (1 + sigma**2) ** 2)
    error = exact * math.sqrt(2 / repeats)
    ledger(
        "denoising score matching of N(0, 1): (n - 2) times the slope's variance",
        exact=exact,
        estimate=(n - 2) * a.var(),
        std_error=error,
    )
    assert abs((n - 2) * a.var() - 1 / sigma**2) > 4.5 * error  # the gradient's, not the slope's
    a_star = 1 / (1 + sigma**2)
    assert abs(a.mean() - a_star) < 4.5 * math.sqrt(exact / n / repeats)
    assert abs(a.mean() - 1) > 0.1  # the slope of the data's own score


def test_the_curvature_of_the_log_density_gives_the_posterior_variance(ledger):
    sigma = 0.7
    weights = torch.tensor([0.2, 0.8], dtype=F64)
    means = torch.tensor([[-3.0], [2.0]], dtype=F64)
    variances = torch.tensor([0.25, 0.64], dtype=F64)
    noisy = GaussianMixture(weights, means, (variances + sigma**2)[:, None, None])
    x = torch.linspace(-6, 6, 25, dtype=F64)[:, None].requires_grad_()
    (score,) = torch.autograd.grad(noisy.log_prob(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(score.sum(), x)
    found = sigma**2 * (1 + sigma**2 * curvature[:, 0])

    v = torch.linspace(-14, 14, 5601, dtype=F64)[:, None]
    prior = GaussianMixture(weights, means, variances[:, None, None]).log_prob(v)
    posterior = (prior - (x.detach() - v.T).square() / (2 * sigma**2)).softmax(1)
    mean = posterior @ v[:, 0]
    exact = posterior @ v[:, 0].square() - mean.square()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
    ledger(
        "posterior variance at -1/2 by the curvature of the log-density",
        exact=exact[11],
        estimate=found[11],
        tolerance=1e-9,
    )
    assert (found - sigma**2).abs().max() > 0.5  # it is not the variance of the noise
