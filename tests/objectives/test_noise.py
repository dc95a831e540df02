"""Noise-contrastive estimation against exact normalisers, by enumeration and by quadrature."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal
from torch.nn.functional import softplus

from companion.inputs import draw
from companion.models.boltzmann import BoltzmannMachine
from companion.models.rbm import RBM
from companion.objectives import noise_contrastive
from companion.objectives.noise import _log_odds
from companion.testing import binary_states
from tests.minimum import minimise
from tests.objectives.exact_gradients import DATA, F64, flat_grad, machine


class Quadratic:
    """`log p~(x) = h x - a x^2 / 2` on the line; h and a `(...)`."""

    def __init__(self, h, a):
        self.h, self.a = (torch.as_tensor(x, dtype=F64).requires_grad_() for x in (h, a))

    def log_prob(self, x):
        return self.h[..., None] * x[..., 0] - self.a[..., None] * x[..., 0].square() / 2


def population_loss(model, log_z, noise, states, weights, ratio):
    """The loss with the exact laws of data and noise: weights on the states for each of them."""
    log_odds = _log_odds(model, states, noise, log_z, ratio, F64)
    of_data, of_noise = weights
    return of_data @ softplus(-log_odds) + ratio * (of_noise @ softplus(log_odds))


def true_machine(rng):
    """A machine of four units, noise of independent coins, and both laws on all states."""
    truth = BoltzmannMachine(4, dtype=F64)
    with torch.no_grad():
        truth.J.copy_(torch.randn(4, 4, dtype=F64, generator=rng(2)))
        truth.b.copy_(torch.randn(4, dtype=F64, generator=rng(3)) - 0.3)
    noise = Independent(Bernoulli(torch.tensor([0.3, 0.5, 0.6, 0.4], dtype=F64)), 1)
    states = binary_states(4, dtype=F64)
    weights = truth.log_prob(states).detach().softmax(0), noise.log_prob(states).exp()
    return truth, noise, states, weights


@pytest.mark.parametrize("ratio", [1, 10])
def test_the_minimum_of_binary_data_is_the_machine_and_its_log_z(ratio, rng, ledger):
    truth, noise, states, weights = true_machine(rng)
    model = BoltzmannMachine(4, dtype=F64, generator=rng(4))
    log_z = torch.zeros((), dtype=F64, requires_grad=True)
    minimise(
        lambda: population_loss(model, log_z, noise, states, weights, ratio),
        [*model.parameters(), log_z],
    )
    torch.testing.assert_close(model.couplings, truth.couplings, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.b, truth.b, rtol=0, atol=1e-9)
    ledger(
        f"noise-contrastive log Z of four binary units, nu = {ratio}",
        exact=truth.log_z().value,
        estimate=log_z.detach(),
        tolerance=1e-6,
    )


def test_the_gradient_approaches_that_of_the_likelihood_as_one_over_the_noise_ratio(rng):
    _, noise, states, weights = true_machine(rng)
    model = BoltzmannMachine(4, dtype=F64, generator=rng(4))
    likelihood = model.log_prob(states).logsumexp(0) - weights[0] @ model.log_prob(states)
    exact, log_z = flat_grad(likelihood, model), model.log_z().value
    errors = []
    for ratio in (100, 1000, 10_000):
        loss = population_loss(model, log_z, noise, states, weights, ratio)
        errors.append(float((flat_grad(loss, model) - exact).norm()))
    assert errors[0] < 0.05
    assert 9 < errors[0] / errors[1] < 11 and 9 < errors[1] / errors[2] < 11


def line(mean=0.0, scale=1.0, noise_scale=2.0):
    """A grid on the line with the weights of N(mean, scale^2) and of the noise N(0, 2^2)."""
    x = torch.linspace(-24, 24, 4801, dtype=F64)[:, None]
    noise = Independent(Normal(torch.zeros(1, dtype=F64), noise_scale), 1)
    data = Normal(torch.tensor(mean, dtype=F64), scale).log_prob(x[:, 0]).exp()
    return x, noise, (data * 0.01, noise.log_prob(x).exp() * 0.01)


def test_the_minimum_of_continuous_data_is_the_density_and_its_log_z(ledger):
    x, noise, weights = line(mean=0.5, scale=0.8)
    model, log_z = Quadratic(0.0, 1.0), torch.zeros((), dtype=F64, requires_grad=True)
    minimise(lambda: population_loss(model, log_z, noise, x, weights, 2), [model.h, model.a, log_z])
    precision = 1 / 0.64
    exact = 0.5 * math.log(2 * math.pi / precision) + 0.25 * precision / 2
    torch.testing.assert_close(float(model.a.detach()), precision, rtol=0, atol=1e-9)
    torch.testing.assert_close(float(model.h.detach()), 0.5 * precision, rtol=0, atol=1e-9)
    ledger(
        "noise-contrastive log Z of a normal law",
        exact=exact,
        estimate=log_z.detach(),
        tolerance=1e-6,
    )


def test_a_classifier_without_the_densities_learns_the_ratio_and_not_the_density(ledger):
    """Data N(0, 1), noise N(0, 4): the log-odds alone are no log-density."""
    x, noise, (of_data, of_noise) = line()
    model, offset = Quadratic(0.0, 1.0), torch.zeros((), dtype=F64, requires_grad=True)

    def plain():
        logit = model.log_prob(x) + offset
        return of_data @ softplus(-logit) + of_noise @ softplus(logit)

    minimise(plain, [model.h, model.a, offset])
    logit = (model.log_prob(x) + offset).detach()
    torch.testing.assert_close(float(-model.a.detach() / 2), -0.375, rtol=0, atol=1e-9)
    torch.testing.assert_close(float(offset.detach()), math.log(2), rtol=0, atol=1e-9)
    mass = logit.exp().sum() * 0.01
    ledger(
        "integral of a plain classifier's exp(logit)",
        exact=2 * math.sqrt(math.pi / 0.375),  # 5.79, where a density has 1
        estimate=mass,
        tolerance=1e-4,
    )
    # the noise's density is what is missing
    assert abs(float((logit + noise.log_prob(x)).exp().sum()) * 0.01 - 1) < 1e-6


def features(x):
    return torch.stack([x, -x.square() / 2, -torch.ones_like(x)], -1)  # of h, a and log_z


@pytest.mark.parametrize("ratio", [1, 8])
def test_the_error_of_log_z_is_the_asymptotic_one_and_falls_with_the_noise(ratio, rng, ledger):
    """300 estimates, each from 500 draws of N(0, 1), as one model with a leading dimension.

    Theory (Gutmann and Hyvärinen 2012): n times the covariance approaches
    `I^-1 - (1 + 1/nu) I^-1 m m^T I^-1`, over data x with `I = E[P(noise | x) g g^T]` and
    `m = E[P(noise | x) g]`. As g holds a constant for log Z, `I^-1 m` is the unit vector of log Z.
    """
    runs, n = 300, 500
    v = torch.randn(runs, n, 1, dtype=F64, generator=rng(6))
    x, noise, (of_data, _) = line()
    u = draw(noise, runs * ratio * n, generator=rng(7)).view(runs, -1, 1)
    both = torch.cat([v, u], 1)
    g = features(both[..., 0])
    offset = noise.log_prob(both) + math.log(ratio)
    is_data = (torch.arange(both.shape[1]) < n).to(F64)
    theta = torch.tensor([0.0, 1.0, 0.5 * math.log(2 * math.pi)], dtype=F64).repeat(runs, 1)
    truth = theta[0]
    for _ in range(8):  # logistic regression by Newton steps, from the truth
        p = torch.sigmoid((g * theta[:, None]).sum(-1) - offset)
        slope = ((p - is_data)[..., None] * g).sum(1)
        hessian = (g * (p * (1 - p))[..., None]).mT @ g
        theta = theta - torch.linalg.solve(hessian, slope)
    model, log_z = Quadratic(theta[:, 0], theta[:, 1]), theta[:, 2].clone().requires_grad_()
    loss = noise_contrastive(model, v, noise, log_z=log_z, noise_ratio=ratio, generator=rng(7))
    gradients = torch.autograd.grad(loss, [model.h, model.a, log_z])
    assert max(float(g.abs().max()) for g in gradients) < 1e-10  # it is the loss's minimum

    def theory(nu):
        g = features(x[:, 0])
        noise_share = torch.sigmoid(math.log(nu) + noise.log_prob(x) - g @ truth)
        inverse = torch.linalg.inv((g * (of_data * noise_share)[:, None]).T @ g)
        return (inverse[2, 2] - (1 + 1 / nu)) / n

    variance = log_z.detach().var()
    std_error = variance * math.sqrt(2 / (runs - 1))  # of a nearly normal variable
    ledger(
        f"variance of noise-contrastive log Z, nu = {ratio}",
        exact=theory(ratio),
        estimate=variance,
        std_error=std_error,
    )
    other = theory(9 - ratio)
    assert abs(variance - other) > 4.5 * std_error and (other < theory(ratio)) == (ratio == 1)


def test_the_loss_is_an_unbiased_estimate_of_the_population_loss(rng, ledger):
    truth, noise, states, weights = true_machine(rng)
    model, log_z = BoltzmannMachine(4, dtype=F64, generator=rng(4)), 2.0
    n, ratio = 50_000, 3
    v = truth.sample_exact(n, generator=rng(5))
    loss = noise_contrastive(model, v, noise, log_z=log_z, noise_ratio=ratio, generator=rng(6))
    exact = population_loss(model, log_z, noise, states, weights, ratio).detach()
    log_odds = _log_odds(model, states, noise, log_z, ratio, F64).detach()

    def variance(p, value):
        return p @ value.square() - (p @ value).square()

    of_data = variance(weights[0], softplus(-log_odds)) / n
    of_noise = ratio**2 * variance(weights[1], softplus(log_odds)) / (ratio * n)
    std_error = (of_data + of_noise).sqrt()
    ledger("noise-contrastive loss", exact=exact, estimate=loss.detach(), std_error=std_error)
    without_ratio = population_loss(model, log_z + math.log(ratio), noise, states, weights, 1)
    assert abs(loss.detach() - without_ratio.detach()) > 4.5 * std_error


# ---------------------------------------------------------------- models and input


def test_a_learned_normaliser_and_a_number_give_the_same_loss_and_noise_is_constant(rng):
    rbm = machine(rng)
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    noise, log_z = Independent(Bernoulli(logits=logits), 1), torch.tensor(1.5, dtype=F64)
    a = noise_contrastive(rbm, DATA, noise, log_z=log_z.requires_grad_(), generator=rng(1))
    b = noise_contrastive(rbm, DATA.bool(), noise, log_z=1.5, generator=rng(1))
    assert torch.equal(a, b)
    a.backward()
    assert logits.grad is None and log_z.grad is not None


def test_an_object_of_ones_own_may_be_the_noise(rng):
    class Coins:
        def sample(self, n, *, generator=None):
            return (torch.rand(n, 3, dtype=F64, generator=generator) < 0.5).to(F64)

        def log_prob(self, x):
            return x.new_full(x.shape[:-1], -3 * math.log(2))

    loss = noise_contrastive(machine(rng), DATA, Coins(), log_z=3 * math.log(2), generator=rng(0))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_loss_follows_device_and_dtype(dtype, rng, device):
    rbm = machine(rng, dtype=dtype, device=device)
    noise = Independent(Bernoulli(torch.full((3,), 0.5, dtype=dtype, device=device)), 1)
    before = torch.get_rng_state()
    with torch.device("meta"):
        loss = noise_contrastive(
            rbm, DATA.to(device), noise, log_z=1.0, noise_ratio=2, generator=rng(0, device)
        )
    assert loss.shape == () and loss.dtype == dtype and loss.device.type == device.type
    assert torch.equal(before, torch.get_rng_state())
    loss.backward()


def test_bad_input_is_refused_with_a_sentence(rng):
    rbm, half = machine(rng), torch.full((3,), 0.5, dtype=F64)
    noise = Independent(Bernoulli(half), 1)

    def loss(v=DATA, noise=noise, **options):
        return noise_contrastive(rbm, v, noise, **({"log_z": 0.0} | options))

    with pytest.raises(ValueError, match="v must be a matrix"):
        loss(DATA[0])
    with pytest.raises(ValueError, match=r"rows of 3 entries, got shape \(4,\)"):
        loss(noise=Independent(Bernoulli(torch.full((4,), 0.5)), 1))
    with pytest.raises(ValueError, match=r"a number a row, \(4,\), got \(4, 3\).*Independent"):
        loss(noise=Bernoulli(half))

    class Ones:
        def sample(self, n, *, generator=None):
            return torch.ones(n, 3, dtype=F64)

        def log_prob(self, x):
            return x.prod(-1).log()

    with pytest.raises(ValueError, match="possible wherever the data are"):
        loss(noise=Ones())
    with pytest.raises(ValueError, match=r"a number a row, \(4,\), got \(2, 4\).*leading"):
        noise_contrastive(RBM(3, 2, batch_shape=(2,), dtype=F64), DATA, noise, log_z=0.0)
    with pytest.raises(ValueError, match="noise_ratio must be at least 1"):
        loss(noise_ratio=0)
    with pytest.raises(ValueError, match=r"leading dimensions \(\) of v, got \(2,\)"):
        loss(log_z=torch.zeros(2))
    with pytest.raises(ValueError, match="log_z must be a finite number"):
        loss(log_z=math.inf)
    with pytest.raises(TypeError, match="generator must be"):
        loss(generator=3)
    with pytest.raises(TypeError, match="zeros and ones|sample"):
        loss(noise=object())
    with pytest.raises(ValueError, match="zeros and ones"):
        loss(noise=MultivariateNormal(half, torch.eye(3, dtype=F64)))
