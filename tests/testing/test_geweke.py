"""Geweke's test passes right posterior samplers and finds wrong models, wherever the error sits."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import scipy.stats
import torch
from torch import Tensor

from companion.core import Kernel
from companion.mcmc import random_walk
from companion.testing import InvarianceResult, assert_invariant, geweke_test

NUM_DATA = 4
RUN = {"num_chains": 10_000, "num_steps": 30}


class State(NamedTuple):
    x: Tensor


# ---------------------------------------------------------------- a normal law's mean and log-scale


def sample_prior(n: int, *, generator, dtype=torch.float64, sd: float = 0.5) -> Tensor:
    """mu ~ N(1, sd^2) and log s ~ N(-0.5, 0.5^2), `(n, 2)`."""
    z = torch.randn(n, 2, dtype=dtype, device=generator.device, generator=generator)
    return z * z.new_tensor([sd, 0.5]) + z.new_tensor([1.0, -0.5])


def sample_data(theta: Tensor, *, generator, exponent: float = 1.0) -> Tensor:
    """Four draws of N(mu, s^2), `(n, 4)`."""
    shape = (len(theta), NUM_DATA)
    z = torch.randn(shape, dtype=theta.dtype, device=theta.device, generator=generator)
    return theta[:, :1] + (exponent * theta[:, 1:]).exp() * z


def walk(
    *, prior_sd: float = 0.5, constant: float = 1.0, exponent: float = 1.0
) -> Callable[[Tensor], Kernel]:
    """Random-walk Metropolis for the posterior; each argument plants an error of the model."""

    def make_kernel(y: Tensor) -> Kernel:
        def log_prob(theta: Tensor) -> Tensor:
            mean, log_scale = theta.unbind(-1)
            prior = -0.5 * ((mean - 1) / prior_sd).square() - 0.5 * ((log_scale + 0.5) / 0.5) ** 2
            log_scale = exponent * log_scale
            z = (y - mean[:, None]) * (-log_scale).exp()[:, None]
            return prior - 0.5 * z.square().sum(-1) - constant * NUM_DATA * log_scale

        return random_walk(log_prob, 0.4)

    return make_kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_correct_sampler_of_the_right_model_passes(rng, device, dtype):
    def prior(n: int, *, generator) -> Tensor:
        return sample_prior(n, generator=generator, dtype=dtype)

    result = geweke_test(prior, sample_data, walk(), generator=rng(0, device), **RUN)
    assert_invariant(result)
    assert result.names[:3] == ("parameter 0", "parameter 1", "datum 0")
    assert len(result.names) == len(result.p_values) == 2 + NUM_DATA + 5


WRONG_MODELS = {
    "the likelihood's constant, -n log s, is left out": {"constant": 0.0},
    "one of its factors is left out": {"constant": 1 - 1 / NUM_DATA},
    "the prior's standard deviation is taken for its variance": {"prior_sd": math.sqrt(0.5)},
    "s is taken for the variance": {"exponent": 0.5},
}


@pytest.mark.parametrize("wrong", WRONG_MODELS)
def test_a_wrong_log_density_is_rejected(rng, wrong):
    make_kernel = walk(**WRONG_MODELS[wrong])
    result = geweke_test(sample_prior, sample_data, make_kernel, generator=rng(1), **RUN)
    assert result.p_value < 1e-12
    with pytest.raises(AssertionError, match="does not leave its target invariant"):
        assert_invariant(result)


def test_a_wrong_prior_that_the_data_outweigh_takes_many_steps_to_show(rng):
    def vague(n: int, *, generator) -> Tensor:
        return sample_prior(n, generator=generator, sd=2.0)

    def p_value(num_steps: int) -> float:
        run = {"num_chains": 5000, "num_steps": num_steps, "generator": rng(10)}
        return geweke_test(vague, sample_data, walk(prior_sd=math.sqrt(2)), **run).p_value

    assert p_value(5) > 1e-5
    assert p_value(200) < 1e-9


def test_a_right_density_in_a_wrong_kernel_is_rejected(rng):
    def make_kernel(y: Tensor) -> Kernel:
        kernel = walk()(y)

        def step(state, *, generator=None):
            moved, info = kernel.step(state, generator=generator)
            return moved._replace(x=torch.where(info.accepted[:, None], moved.x, -moved.x)), info

        return Kernel(kernel.init, step)

    result = geweke_test(sample_prior, sample_data, make_kernel, generator=rng(2), **RUN)
    assert result.p_value < 1e-12


def test_the_same_mistake_on_both_sides_goes_unseen(rng):
    """Simulator and density agree on a model that is not the one that was meant."""

    def wrong_data(theta: Tensor, *, generator) -> Tensor:
        return sample_data(theta, generator=generator, exponent=0.5)

    make_kernel = walk(exponent=0.5)
    assert_invariant(geweke_test(sample_prior, wrong_data, make_kernel, generator=rng(3), **RUN))


# ---------------------------------------------------------------- one number, closed forms


def conjugate(prior_var: float = 4.0, *, sign: float = 1.0) -> Callable[[Tensor], Kernel]:
    """Exact draws of the posterior of `theta ~ N(0, 4)`, `y ~ N(theta, 1)`."""
    share = prior_var / (prior_var + 1)

    def make_kernel(y: Tensor) -> Kernel:
        def step(state: State, *, generator=None) -> tuple[State, None]:
            z = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
            return State(sign * share * y + math.sqrt(share) * z), None

        return Kernel(State, step)

    return make_kernel


def conjugate_test(
    make_kernel, generator, n: int = 3000, steps: int = 5, **more
) -> InvarianceResult:
    def prior(n: int, *, generator) -> Tensor:
        return 2 * torch.randn(n, dtype=torch.float64, generator=generator)

    def data(theta: Tensor, *, generator) -> Tensor:
        return theta + torch.randn(theta.shape, dtype=torch.float64, generator=generator)

    run = {"num_chains": n, "num_steps": steps, "generator": generator}
    return geweke_test(prior, data, make_kernel, **run, **more)


def test_only_the_joint_law_betrays_a_flipped_sign(rng):
    """Parameter and data keep their laws; how they go together does not."""
    flipped = conjugate(sign=-1.0)

    def separate(theta: Tensor, y: Tensor) -> Tensor:
        return torch.stack([theta, y], 1)

    def even(theta: Tensor, y: Tensor) -> Tensor:
        return torch.stack([theta.square(), y.square(), (theta * y).abs()], 1)

    assert_invariant(conjugate_test(conjugate(), rng(4)))
    assert_invariant(conjugate_test(flipped, rng(4), functions=separate))
    assert_invariant(conjugate_test(flipped, rng(4), functions=even))
    assert conjugate_test(flipped, rng(4)).p_value < 1e-12


def test_a_kernel_that_never_moves_passes(rng):
    """Invariance is tested, not that the chain gets anywhere."""

    def stay(y: Tensor) -> Kernel:
        return Kernel(State, lambda state, *, generator=None: (state, None))

    assert_invariant(conjugate_test(stay, rng(5)))


def test_p_values_are_uniform_for_a_correct_sampler(rng):
    generator = rng(6)

    def distance(make_kernel, num_tests: int) -> float:
        results = [conjugate_test(make_kernel, generator, 300, 3) for _ in range(num_tests)]
        p_values = torch.stack([result.p_values for result in results])
        return min(scipy.stats.kstest(column, "uniform").pvalue for column in p_values.T)

    assert distance(conjugate(), 100) > 1e-5 / 7  # Bonferroni
    assert distance(conjugate(2.0), 30) < 1e-5 / 7


def test_geweke_test_agrees_with_the_exact_distance(rng, ledger):
    """After one step the parameter is normal, with a known wrong variance."""
    n, wrong = 100_000, 1.0
    share = wrong / (wrong + 1)
    sd = math.sqrt(share**2 * 5 + share)  # the law of y has variance 5
    found = conjugate_test(conjugate(wrong), rng(7), n, 1).statistics[0]
    # Two centred normal laws are furthest apart where their densities cross.
    x = math.sqrt(2 * math.log(2 / sd) / (1 / sd**2 - 1 / 4))
    normal = scipy.stats.norm
    ledger(
        "Kolmogorov-Smirnov distance of a posterior with a wrong prior",
        exact=normal.cdf(x / sd) - normal.cdf(x / 2),
        estimate=found,
        std_error=math.sqrt(0.5 / n),  # at most, of a difference of two frequencies
    )


def test_a_datum_that_is_always_the_same_does_not_spoil_the_test(rng):
    def with_constant(theta: Tensor, *, generator) -> Tensor:
        y = sample_data(theta, generator=generator)
        return torch.cat([y, torch.full_like(y[:, :1], 0.1)], 1)

    def test(**wrong) -> InvarianceResult:
        def make_kernel(y: Tensor) -> Kernel:
            return walk(**wrong)(y[:, :NUM_DATA])

        return geweke_test(sample_prior, with_constant, make_kernel, generator=rng(0), **RUN)

    found = test()
    assert_invariant(found)
    assert float(found.p_values[found.names.index("datum 4")]) == 1.0
    assert test(constant=0.8).p_value < 1e-9


def test_geweke_test_refuses_what_it_cannot_judge(rng):
    def test(make_kernel=conjugate(), **change):  # noqa: B008
        functions = {"sample_prior": sample_prior, "sample_data": sample_data} | change
        run = {"num_chains": 50, "num_steps": 2, "generator": rng(8)}
        return geweke_test(make_kernel=make_kernel, **{**run, **functions})

    with pytest.raises(ValueError, match="num_chains"):
        test(num_chains=1)
    with pytest.raises(ValueError, match="num_steps"):
        test(num_steps=0)
    with pytest.raises(ValueError, match=r"sample_prior gave \(3, 2\), expected \(50, ...\)"):
        test(sample_prior=lambda n, *, generator: sample_prior(3, generator=generator))
    with pytest.raises(ValueError, match=r"sample_data gave \(\), expected \(50, ...\)"):
        test(sample_data=lambda theta, *, generator: theta.sum())
    with pytest.raises(ValueError, match=r"turned shape \(50, 2\) into \(50, 4\)"):
        test()
    with pytest.raises(ValueError, match=r"projections gave \(50,\), expected \(50, k\)"):
        test(walk(), functions=lambda theta, y: theta[:, 0])


def test_no_tensor_is_made_on_the_default_device(rng):
    generator = rng(9)
    with torch.device("meta"):

        def prior(n: int, *, generator) -> Tensor:
            return torch.randn(n, 2, dtype=torch.float64, device="cpu", generator=generator)

        run = {"num_chains": 200, "num_steps": 2, "generator": generator}
        assert geweke_test(prior, sample_data, walk(), **run).p_values.device.type == "cpu"
