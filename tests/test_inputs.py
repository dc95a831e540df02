"""The shared input checks, and `draw` over every distribution of PyTorch."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as td
from torch import Tensor

from companion.inputs import Sampler, check_count, check_finite, check_generator, check_real, draw

# PyTorch 2.13's Wishart warns of its regular samples, by a sign error of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")

# ---------------------------------------------------------------- checks


def test_counts_are_returned_as_python_integers():
    assert check_count("n", 3) == 3
    assert check_count("n", 0, minimum=0) == 0
    assert type(check_count("n", np.int64(3))) is int


@pytest.mark.parametrize("value", [1.0, "1", True, None, np.float64(2), torch.tensor(2)])
def test_a_count_must_be_an_integer(value):
    with pytest.raises(TypeError, match="n must be an integer, got"):
        check_count("n", value)


def test_a_count_below_its_minimum_is_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        check_count("n", 0)
    with pytest.raises(ValueError, match="n must be at least 2, got -5"):
        check_count("n", -5, minimum=2)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2)])
def test_real_numbers_are_returned_as_floats(value):
    found = check_real("s", value, minimum=0.0)
    assert (type(found), found) == (float, 2.0)


def test_a_real_number_must_be_a_number():
    for value in ("1", True, None, 1j, torch.tensor(2.0)):
        with pytest.raises(TypeError, match="s must be a number, got"):
            check_real("s", value)


@pytest.mark.parametrize("value", [0.0, 1.0, -3, math.nan, math.inf, -math.inf])
def test_a_real_number_must_lie_strictly_between_its_limits(value):
    with pytest.raises(ValueError, match=r"s must be a finite number above 0.0 and below 1.0, got"):
        check_real("s", value, minimum=0.0, maximum=1.0)


def test_finite_tensors_of_any_dtype_pass():
    for x in (torch.zeros(2, 3), torch.tensor([True]), torch.tensor(1), torch.tensor(1j)):
        assert check_finite("x", x) is x


def test_non_finite_tensors_are_counted_and_located():
    x = torch.zeros(2, 3)
    x[1, 0], x[1, 2] = math.nan, -math.inf
    with pytest.raises(ValueError, match=r"x has 2 NaN or infinite entries of 6.*index \(1, 0\)"):
        check_finite("x", x)
    with pytest.raises(ValueError, match=r"1 NaN or infinite entries of 1.*index \(\)"):
        check_finite("x", torch.tensor(math.nan))
    with pytest.raises(ValueError, match=r"x is empty: its shape is \(3, 0\)"):
        check_finite("x", torch.zeros(3, 0))
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        check_finite("x", [1.0])


def test_generators_must_be_on_the_device_of_the_tensors(device):
    check_generator(None, device)
    check_generator(torch.Generator(device), device)
    with pytest.raises(TypeError, match="must be a torch.Generator or None, got int"):
        check_generator(3, device)
    with pytest.raises(ValueError, match="the generator is on .* but the tensors are on meta"):
        check_generator(torch.Generator(device), torch.device("meta"))


# ---------------------------------------------------------------- draw


def every_distribution(device: torch.device | str = "cpu") -> dict[str, td.Distribution]:
    """One of each class of `torch.distributions`."""

    def t(*x: float) -> Tensor:
        return torch.tensor(x if len(x) > 1 else x[0], dtype=torch.float64, device=device)

    normal, eye = td.Normal(t(0, 1), t(1, 2)), torch.eye(2, dtype=torch.float64, device=device)
    examples = [
        td.Bernoulli(t(0.3)),
        td.Beta(t(2), t(3)),
        td.Binomial(10, t(0.3)),
        td.Categorical(t(0.2, 0.8)),
        td.Cauchy(t(0), t(1)),
        td.Chi2(t(3)),
        td.ContinuousBernoulli(t(0.3)),
        td.Dirichlet(t(1, 2)),
        td.Exponential(t(1)),
        td.FisherSnedecor(t(3), t(4)),
        td.Gamma(t(2), t(1)),
        td.Geometric(t(0.3)),
        td.Gumbel(t(0), t(1)),
        td.HalfCauchy(t(1)),
        td.HalfNormal(t(1)),
        td.Independent(normal, 1),
        td.InverseGamma(t(2), t(1)),
        td.Kumaraswamy(t(2), t(3)),
        td.LKJCholesky(3, t(1)),
        td.Laplace(t(0), t(1)),
        td.LogNormal(t(0), t(1)),
        td.LogisticNormal(t(0, 0), t(1, 1)),
        td.LowRankMultivariateNormal(t(0, 0), eye, t(1, 1)),
        td.MixtureSameFamily(td.Categorical(t(0.2, 0.8)), normal),
        td.Multinomial(5, t(0.2, 0.8)),
        td.MultivariateNormal(t(0, 0), eye),
        td.NegativeBinomial(t(5), t(0.3)),
        normal,
        td.OneHotCategorical(t(0.2, 0.8)),
        td.OneHotCategoricalStraightThrough(t(0.2, 0.8)),
        td.Pareto(t(1), t(2)),
        td.Poisson(t(3)),
        td.RelaxedBernoulli(t(0.5), t(0.3)),
        td.RelaxedOneHotCategorical(t(0.5), t(0.2, 0.8)),
        td.StudentT(t(3)),
        td.TransformedDistribution(normal, [td.ExpTransform()]),
        td.Uniform(t(0), t(1)),
        td.VonMises(t(0), t(1)),
        td.Weibull(t(1), t(2)),
        td.Wishart(t(5), eye),
    ]
    if hasattr(td, "GeneralizedPareto"):
        examples.append(td.GeneralizedPareto(t(0), t(1), t(0.1)))
    return {type(example).__name__: example for example in examples}


def test_every_distribution_of_pytorch_is_in_the_list():
    """So that a distribution that PyTorch adds is tried here, too."""
    classes = {
        name
        for name in td.__all__
        if isinstance(getattr(td, name), type) and issubclass(getattr(td, name), td.Distribution)
    }
    assert classes - {"Distribution", "ExponentialFamily"} == set(every_distribution())


@pytest.mark.parametrize("name", every_distribution())
def test_every_distribution_draws_from_the_given_generator(rng, device, name):
    distribution = every_distribution(device)[name]
    before = torch.get_rng_state()
    first = draw(distribution, 50, generator=rng(1, device))
    assert first.shape == (50, *distribution.batch_shape, *distribution.event_shape)
    assert torch.equal(first, draw(distribution, 50, generator=rng(1, device)))
    assert not torch.equal(first, draw(distribution, 50, generator=rng(2, device)))
    assert torch.equal(before, torch.get_rng_state())
    assert not first.requires_grad


@pytest.mark.parametrize("name", every_distribution())
def test_successive_draws_from_one_generator_differ(rng, name):
    generator = rng(3)
    first, second = (draw(every_distribution()[name], 50, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)


def test_draws_follow_the_distribution(rng):
    """The generator changes where the numbers come from, not their law."""
    known = {
        "Normal": lambda x: scipy.stats.norm.cdf(x[:, 1], 1, 2),
        "Gamma": lambda x: scipy.stats.gamma.cdf(x, 2),
        "Exponential": scipy.stats.expon.cdf,
        "Cauchy": scipy.stats.cauchy.cdf,
        "Beta": lambda x: scipy.stats.beta.cdf(x, 2, 3),
        "StudentT": lambda x: scipy.stats.t.cdf(x, 3),
        "VonMises": lambda x: scipy.stats.vonmises.cdf(x, 1),
        "Uniform": lambda x: x,
    }
    everything = every_distribution()
    for name, cdf in known.items():
        u = cdf(draw(everything[name], 10_000, generator=rng(4)).numpy())
        assert scipy.stats.kstest(u, "uniform").pvalue > 1e-5 / len(known), name


def test_without_a_generator_the_global_one_is_used():
    before = torch.get_rng_state()
    draw(td.Normal(0.0, 1.0), 3)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert not torch.equal(before, after)


class Stubborn(td.Normal):
    """Draws by a function that cannot be given a generator."""

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.empty(
            sample_shape, device=self.loc.device
        ).normal_().bernoulli_() + torch.tensor(
            np.random.default_rng(0).normal()
        ) * torch.rand_like(self.loc.expand(sample_shape))


def test_a_distribution_that_uses_the_global_generator_all_the_same_is_an_error(rng, device):
    stubborn = Stubborn(torch.zeros((), device=device), 1.0)
    before = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state() if device.type == "cuda" else before
    with pytest.raises(TypeError, match="Stubborn draws from the global generator"):
        draw(stubborn, 3, generator=rng(5, device))
    assert torch.equal(before, torch.get_rng_state())  # and it was put back
    if device.type == "cuda":
        assert torch.equal(on_device, torch.cuda.get_rng_state())


class Own:
    """A sampler with parameters, as a reader would write it."""

    def __init__(self) -> None:
        self.scale = torch.ones(2, requires_grad=True)

    def log_prob(self, x: Tensor) -> Tensor:
        return -(x / self.scale).square().sum(-1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.scale * torch.randn(n, 2, generator=generator)

    rsample = sample


def test_any_object_with_sample_can_be_drawn_from(rng):
    assert isinstance(Own(), Sampler)
    assert isinstance(td.Normal(0.0, 1.0), Sampler)
    x = draw(Own(), 5, generator=rng(6))
    assert x.shape == (5, 2)
    assert not x.requires_grad
    assert torch.equal(x, Own().sample(5, generator=rng(6)))


@pytest.mark.parametrize("name", [n for n, d in every_distribution().items() if d.has_rsample])
def test_reparameterised_draws_are_the_same_draws(rng, name):
    distribution = every_distribution()[name]
    plain = draw(distribution, 20, generator=rng(7))
    if name == "OneHotCategoricalStraightThrough":
        return  # its draws are p + (draw - p): equal up to round-off
    assert torch.equal(plain, draw(distribution, 20, generator=rng(7), reparameterized=True))


def test_reparameterised_draws_carry_a_gradient(rng):
    scale = torch.tensor(2.0, requires_grad=True)
    normal = td.Normal(torch.tensor(0.0), scale)
    assert draw(normal, 3, generator=rng(8), reparameterized=True).requires_grad
    assert not draw(normal, 3, generator=rng(8)).requires_grad
    assert draw(Own(), 3, generator=rng(8), reparameterized=True).requires_grad
    with pytest.raises(TypeError, match="Bernoulli has no reparameterised draws"):
        draw(td.Bernoulli(0.5), 3, reparameterized=True)


def test_what_cannot_be_drawn_from_is_refused(rng):
    with pytest.raises(TypeError, match=r"one with sample\(n, generator=\), got int"):
        draw(3, 3)
    with pytest.raises(TypeError, match=r"one with rsample\(n, generator=\), got"):
        draw(object(), 3, reparameterized=True)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        draw(td.Normal(0.0, 1.0), 0)
    with pytest.raises(TypeError, match="n must be an integer"):
        draw(td.Normal(0.0, 1.0), (3,))


def test_draws_do_not_move_to_the_default_device(rng):
    generator, normal = rng(9), every_distribution()["MultivariateNormal"]
    with torch.device("meta"):
        assert draw(normal, 3, generator=generator).device.type == "cpu"
        assert draw(normal, 3).device.type == "cpu"
