"""Each target against an independent definition, quadrature, autograd, and the law of its draws."""

import math
from collections.abc import Callable

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Gumbel,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from companion.core import LogZ, gradient, value_and_grad
from companion.inputs import draw
from companion.monte_carlo import estimate, rejection_sampling
from companion.targets import Banana, Funnel, Gaussian, GaussianMixture, SkewedProduct

NAMES = ["gaussian", "mixture", "skewed", "banana", "funnel"]


def make(name: str, dtype=torch.float64, device="cpu"):
    """A correlated or asymmetric example of each target, of three dimensions."""

    def tensor(x: list) -> Tensor:
        return torch.tensor(x, dtype=dtype, device=device)

    if name == "gaussian":
        factor = tensor([[1.0, 0.0, 0.0], [0.9, 0.5, 0.0], [-1.0, 0.3, 2.0]])
        return Gaussian(tensor([1.0, -2.0, 0.5]), factor @ factor.T)
    if name == "mixture":
        factors = tensor(
            [
                [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]],
                [[0.3, 0.0, 0.0], [-0.2, 1.0, 0.0], [0.4, 0.0, 0.7]],
            ]
        )
        means = tensor([[-3.0, 0.0, 1.0], [3.0, 1.0, -1.0]])
        return GaussianMixture(tensor([1.0, 3.0]), means, factors @ factors.mT)
    if name == "skewed":
        return SkewedProduct(tensor([[1.0, 0.5, 0.0], [-1.0, 2.0, 0.3], [0.0, 0.4, 0.5]]))
    if name == "banana":
        return Banana(tensor([1.5, 0.5, 2.0]), bend=0.7)
    return Funnel(tensor(0.8), num_leaves=2)


def reference(name: str, x: Tensor) -> Tensor:
    """The normalised log-density at `x`, `(n, 3)`, from PyTorch's own distributions."""
    target = make(name)
    if name == "gaussian":
        return MultivariateNormal(target.mean, target.covariance).log_prob(x)
    if name == "mixture":
        parts = MultivariateNormal(target.means, target.covariances)
        return MixtureSameFamily(Categorical(target.weights), parts).log_prob(x)
    if name == "skewed":
        s = torch.linalg.solve(target.matrix, x.T).T
        return Gumbel(x.new_zeros(3), 1.0).log_prob(s).sum(-1) - target.matrix.det().abs().log()
    if name == "banana":
        location = torch.stack([0 * x[:, 0], 0.7 * x[:, 0] ** 2, 0 * x[:, 0]], 1)
        return Normal(location, target.scale).log_prob(x).sum(-1)
    v, leaves = x[:, 0], x[:, 1:]
    width = (v / 2).exp()[:, None]
    return Normal(0.0, target.scale).log_prob(v) + Normal(0.0, width).log_prob(leaves).sum(-1)


def uniforms(name: str, x: Tensor) -> Tensor:
    """Maps draws of the target, `(n, 3)`, to numbers that are uniform on (0, 1), by known laws."""
    target = make(name)
    if name == "skewed":
        s = torch.linalg.solve(target.matrix, x.T).T
        return (-(-s).exp()).exp()
    if name == "mixture":
        sd = target.covariances.diagonal(dim1=1, dim2=2).sqrt()
        parts = Normal(0.0, 1.0).cdf((x[:, None] - target.means) / sd)
        return (target.weights[:, None] / target.weights.sum() * parts).sum(1)
    if name == "gaussian":
        z = torch.linalg.solve(torch.linalg.cholesky(target.covariance), (x - target.mean).T).T
    elif name == "banana":
        z = torch.stack([x[:, 0], x[:, 1] - 0.7 * x[:, 0] ** 2, x[:, 2]], 1) / target.scale
    else:
        z = torch.cat([x[:, :1] / target.scale, x[:, 1:] * (-x[:, :1] / 2).exp()], 1)
    return Normal(0.0, 1.0).cdf(z)


def mutant(name: str) -> object:
    """A target that is wrong in one plausible way."""
    target = make(name)
    if name == "gaussian":  # the transpose of the Cholesky factor
        factor = torch.linalg.cholesky(target.covariance)
        return Gaussian(target.mean, factor.T @ factor)
    if name == "mixture":  # every mode as often as the others
        return GaussianMixture(torch.ones(2).double(), target.means, target.covariances)
    if name == "skewed":  # reflected
        return SkewedProduct(-target.matrix)
    if name == "banana":  # bent the other way
        return Banana(target.scale, -0.7)
    return Funnel(target.scale * 1.1, 2)


def kolmogorov_smirnov(u: Tensor) -> float:
    """p-value of uniformity of the columns of `u`, together (Bonferroni)."""
    return u.shape[1] * min(scipy.stats.kstest(column, "uniform").pvalue for column in u.T)


# ---------------------------------------------------------------- densities


@pytest.mark.parametrize("name", NAMES)
def test_density_and_normaliser_agree_with_an_independent_definition(rng, name):
    x = 3 * torch.randn(200, 3, dtype=torch.float64, generator=rng(0))
    target = make(name)
    assert isinstance(target.log_z, float)
    torch.testing.assert_close(target(x) - target.log_z, reference(name, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(target(x), target.log_prob(x))


@pytest.mark.parametrize(
    ("target", "half_widths"),
    [
        (lambda t: Gaussian(t([1.0, -2.0]), t([[2.0, 1.0], [1.0, 1.0]])), (15, 12)),
        (
            lambda t: GaussianMixture(
                t([0.5, 1.5]), t([[-2.0, 0.0], [2.0, 1.0]]), t([[[1.0, 0.5], [0.5, 1.0]]] * 2)
            ),
            (13, 12),
        ),
        (lambda t: SkewedProduct(t([[1.0, 0.5], [-1.0, 2.0]])), (60, 90)),
        (lambda t: Banana(t([1.0, 0.5]), bend=0.7), (9, 60)),
        (lambda t: Funnel(t(0.5), num_leaves=1), (4.5, 40)),
    ],
    ids=NAMES,
)
def test_normaliser_agrees_with_quadrature(target, half_widths):
    target = target(lambda x: torch.tensor(x, dtype=torch.float64))
    found = scipy.integrate.cubature(
        lambda x: target(torch.as_tensor(x)).exp().numpy(),
        [-h for h in half_widths],
        half_widths,
        rtol=1e-9,
        atol=0,
    )
    assert found.status == "converged"
    assert math.log(found.estimate) == pytest.approx(target.log_z, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_hand_written_gradient_agrees_with_autograd(rng, name):
    target = make(name)
    x = 2 * torch.randn(4, 50, 3, dtype=torch.float64, generator=rng(1))
    value, grad = target.value_and_grad(x)
    expected_value, expected_grad = value_and_grad(lambda y: target(y), x)
    torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)
    assert value.shape == (4, 50)
    used, _ = value_and_grad(target, x)  # what samplers call
    assert torch.equal(used, value)
    assert torch.equal(gradient(target, x), grad)  # what trajectories call


@pytest.mark.parametrize("dim", [1, 16, 17])  # the product is taken in two ways
def test_a_normal_density_is_the_same_in_every_dimension_and_shape(rng, dim):
    g = rng(0)
    factor = torch.randn(dim, dim, dtype=torch.float64, generator=g)
    mean = torch.randn(dim, dtype=torch.float64, generator=g)
    covariance = factor @ factor.T + torch.eye(dim, dtype=torch.float64)
    target = Gaussian(mean, covariance)
    x = torch.randn(2, 3, dim, dtype=torch.float64, generator=g)
    exact = MultivariateNormal(mean, covariance).log_prob(x) + target.log_z
    for at, value in ((x, exact), (x[0], exact[0]), (x[0, 0], exact[0, 0])):
        torch.testing.assert_close(target.log_prob(at), value)
        torch.testing.assert_close(target.value_and_grad(at)[0], value)


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(rng, device, name):
    x = torch.randn(100, 3, dtype=torch.float64, generator=rng(2))
    exact = make(name).value_and_grad(x)
    target = make(name, torch.float32, device)
    found = target.value_and_grad(x.to(device, torch.float32))
    for a, b in zip(found, exact, strict=True):
        assert (a.dtype, a.device.type) == (torch.float32, device.type)
        scale = float(b.abs().max())
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-5 * scale)
    assert target.log_z == pytest.approx(make(name).log_z, abs=1e-5)


def test_far_away_the_density_is_zero_and_not_nan():
    target = make("skewed", torch.float32)
    assert target(torch.tensor([-500.0, -500.0, -500.0])) == -torch.inf
    assert make("mixture", torch.float32)(torch.full((3,), 1e10)) < -1e18


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_the_law(rng, device, name, dtype):
    x = make(name, dtype, device).sample(20_000, generator=rng(3, device))
    assert (x.shape, x.dtype, x.device.type) == ((20_000, 3), dtype, device.type)
    assert kolmogorov_smirnov(uniforms(name, x.cpu().double())) > 1e-5
    wrong = mutant(name).sample(20_000, generator=rng(3))
    assert kolmogorov_smirnov(uniforms(name, wrong)) < 1e-5


def z_scores(values: Tensor, exact: Tensor) -> float:
    """The largest deviation, in units of what 1e-5 allows over all components (Bonferroni)."""
    found = estimate(values)
    limit = scipy.stats.norm.isf(0.5e-5 / exact.numel())
    z = (found.value - exact) / found.std_error
    return float(z[found.std_error > 0].abs().max()) / limit


@pytest.mark.parametrize("name", NAMES)
def test_mean_and_covariance_agree_with_the_draws(rng, name):
    target = make(name)

    def deviations(x: Tensor) -> tuple[float, float]:
        centred = x - target.mean
        products = centred[:, :, None] * centred[:, None, :]
        return z_scores(x, target.mean), z_scores(products, target.covariance)

    assert max(deviations(target.sample(100_000, generator=rng(4)))) < 1
    assert max(deviations(mutant(name).sample(100_000, generator=rng(4)))) > 1


@pytest.mark.parametrize("name", NAMES)
def test_draws_and_gradient_belong_together(rng, name):
    """Integration by parts: E[x_i d log p / d x_j] = -1 if i = j, else 0, and E[gradient] = 0."""
    target = make(name)
    x = target.sample(100_000, generator=rng(5))

    def deviation(grad: Tensor) -> float:
        with_one = torch.cat([torch.ones_like(x[:, :1]), x], 1)
        exact = -torch.eye(4, dtype=x.dtype)[:, 1:]
        return z_scores(with_one[:, :, None] * grad[:, None, :], exact)

    grad = target.value_and_grad(x)[1]
    assert deviation(grad) < 1
    wrong = mutant(name).value_and_grad(x)[1]
    if name == "mixture":  # gradients hardly see the weights of separated modes: swap their shapes
        assert deviation(wrong) < 1
        swapped = GaussianMixture(target.weights, target.means, target.covariances.flip(0))
        wrong = swapped.value_and_grad(x)[1]
    if name == "skewed":  # A^-1 where A^-T belongs
        wrong = grad @ target.matrix @ torch.linalg.inv(target.matrix).T
    assert deviation(wrong) > 1


@pytest.mark.parametrize("name", NAMES)
def test_draws_come_from_the_generator_alone(rng, name):
    before = torch.get_rng_state()
    first = make(name).sample(10, generator=rng(6))
    assert torch.equal(first, draw(make(name), 10, generator=rng(6)))
    assert torch.equal(before, torch.get_rng_state())
    make(name).sample(10)  # without one, PyTorch's global generator
    assert not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)


def test_modes_are_told_apart_and_visited_by_weight(rng):
    target = make("mixture")
    found = estimate(target.mode_of(target.sample(50_000, generator=rng(7))))
    # The modes overlap by less than 1e-3 of their mass.
    assert found.value == pytest.approx(0.75, abs=1e-3 + 4.5 * float(found.std_error))
    assert target.mode_of(target.means).tolist() == [0, 1]
    assert target.mode_of(target.means.expand(5, 2, 3)).shape == (5, 2)


def test_a_target_can_be_the_proposal_of_another(rng, ledger):
    """Its own `log_z` is taken into account, so that the measured ratio is of normalisers."""
    wide = Gaussian(torch.zeros(2).double(), 4 * torch.eye(2).double())
    target = Gaussian(torch.zeros(2).double(), torch.tensor([[1.0, 0.6], [0.6, 1.0]]).double())
    # log p~ - log q is largest at 0, where both exponents vanish.
    found: LogZ = rejection_sampling(target, wide, wide.log_z, 20_000, generator=rng(8)).log_z
    ledger(
        "log Z of a correlated normal density by rejection",
        exact=target.log_z,
        estimate=found.value,
        std_error=found.std_error,
    )


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Gaussian(torch.zeros(2), torch.eye(3)), r"\(2, 2\), got \(3, 3\)"),
        (lambda: Gaussian(torch.zeros(2), torch.eye(2).double()), "share dtype and device"),
        (lambda: Gaussian(torch.zeros(2), -torch.eye(2)), "smallest eigenvalue -1"),
        (lambda: Gaussian(torch.zeros(2), torch.ones(2, 2).triu()), "transpose is 1"),
        (lambda: Gaussian(torch.zeros(2, 1), torch.eye(2)), "1 dimensions"),
        (lambda: Gaussian(torch.zeros(2).long(), torch.eye(2)), "floating-point"),
        (lambda: Gaussian(torch.full((2,), math.nan), torch.eye(2)), "mean has 2 NaN"),
        (
            lambda: GaussianMixture(torch.ones(3), torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2)),
            "one entry a component, got 3, 2 and 2",
        ),
        (
            lambda: GaussianMixture(
                torch.tensor([1.0, 0.0]), torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2)
            ),
            "weights must be positive",
        ),
        (lambda: SkewedProduct(torch.ones(2, 2)), "singular"),
        (lambda: SkewedProduct(torch.ones(2, 3)), "square"),
        (lambda: Banana(torch.ones(1), 1.0), "at least two positive"),
        (lambda: Banana(torch.tensor([1.0, -1.0]), 1.0), "at least two positive"),
        (lambda: Banana(torch.ones(2), math.inf), "bend"),
        (lambda: Funnel(torch.tensor(0.0), 9), "scale must be positive"),
        (lambda: Funnel(torch.ones(2), 9), "0 dimensions"),
        (lambda: Funnel(torch.tensor(1.0), 0), "num_leaves"),
    ],
)
def test_targets_that_do_not_exist_are_refused(construct: Callable, message):
    with pytest.raises(ValueError, match=message):
        construct()


@pytest.mark.parametrize("name", NAMES)
def test_points_and_counts_that_do_not_fit_are_refused(name):
    target = make(name)
    for x in (torch.zeros(5, 2).double(), torch.zeros(5, 3), torch.zeros(()).double()):
        with pytest.raises(
            ValueError, match=r"x must be \(\.\.\., 3\) of torch.float64 on cpu, got"
        ):
            target(x)
        for call in (value_and_grad, gradient):
            with pytest.raises(ValueError, match="x must be"):
                call(target, x)
    with pytest.raises(ValueError, match="n must be at least 1"):
        target.sample(0)
    with pytest.raises(TypeError, match=r"torch\.Generator"):
        target.sample(1, generator=1)


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_is_made_on_the_default_device(rng, name):
    generator = rng(9)
    with torch.device("meta"):
        target = make(name)
        x = target.sample(5, generator=generator)
        value, grad = target.value_and_grad(x)
        tensors = (x, value, grad, target(x), target.mean, target.covariance)
        assert {t.device.type for t in tensors} == {"cpu"}
