"""The tests for samplers must pass what is right, reject what is wrong, and be calibrated."""

import math
from typing import NamedTuple

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Normal

from companion.core import Kernel
from companion.targets import Gaussian, SkewedProduct
from companion.testing import (
    InvarianceResult,
    assert_invariant,
    binary_states,
    discrete_invariance_test,
    exact_distribution,
    invariance,
    invariance_test,
)

# ---------------------------------------------------------------- kernels, right and wrong


class Chain(NamedTuple):
    """`y` is where the next step starts from: the same as `x` in every correct kernel."""

    x: Tensor
    log_prob: Tensor
    y: Tensor


class Move(NamedTuple):
    accept_prob: Tensor
    accepted: Tensor


def metropolis(log_prob, *, step: float = 0.8, drift: float = 0.0, bug: str = "") -> Kernel:
    """Random-walk Metropolis-Hastings with a drift in every proposal, and planted bugs."""

    def init(x: Tensor) -> Chain:
        return Chain(x, log_prob(x), x)

    def kernel_step(state: Chain, *, generator=None) -> tuple[Chain, Move]:
        here = state.y
        noise = torch.randn(here.shape, dtype=here.dtype, device=here.device, generator=generator)
        there = here + drift + step * noise
        log_prob_there = log_prob(there)
        log_ratio = log_prob_there - state.log_prob
        if bug == "sign":
            log_ratio = -log_ratio
        if bug != "hastings":  # log q(here | there) - log q(there | here)
            back = (here - there - drift).square() - (there - here - drift).square()
            log_ratio = log_ratio - 0.5 * back.sum(-1) / step**2
        u = torch.rand(log_ratio.shape, dtype=here.dtype, device=here.device, generator=generator)
        accepted = u.log() < log_ratio
        x = torch.where(accepted[..., None], there, here if bug != "restart" else state.x)
        new_log_prob = torch.where(accepted, log_prob_there, state.log_prob)
        if bug == "stale":  # after a rejection the density of the proposal is kept
            new_log_prob = log_prob_there
        y = there if bug == "restart" else x
        return Chain(x, new_log_prob, y), Move(log_ratio.exp().clamp(max=1), accepted)

    return Kernel(init, kernel_step)


def skewed(dtype=torch.float64, device="cpu") -> SkewedProduct:
    return SkewedProduct(torch.tensor([[1.0, 0.5], [-1.0, 2.0]], dtype=dtype, device=device))


# ---------------------------------------------------------------- invariance_test


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_a_correct_kernel_passes(rng, device, dtype, drift):
    target = skewed(dtype, device)
    result = invariance_test(
        metropolis(target, drift=drift),
        target,
        num_chains=10_000,
        num_steps=10,
        generator=rng(0, device),
    )
    assert_invariant(result)
    assert len(result.names) == len(result.p_values) == len(result.statistics) == 2 + 5 + 1
    assert result.names[0] == "coordinate 0"
    assert result.names[-1] == "log-density"


MUTANTS = {
    "sign": {"bug": "sign"},
    "hastings": {"bug": "hastings", "drift": 0.5},
    "restart": {"bug": "restart"},
    "stale": {"bug": "stale", "step": 2.0},
    "small": {"bug": "hastings", "drift": 0.1},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_kernel_is_rejected(rng, mutant):
    target = skewed()
    result = invariance_test(
        metropolis(target, **MUTANTS[mutant]),
        target,
        num_chains=10_000,
        num_steps=10,
        generator=rng(1),
    )
    assert result.p_value < 1e-12  # with a wide margin, so under any seed
    with pytest.raises(AssertionError, match="does not leave its target invariant"):
        assert_invariant(result)


def test_one_step_cannot_see_a_stale_density_but_several_can(rng):
    target = skewed()
    kernel = metropolis(target, step=2.0, bug="stale")
    one = invariance_test(kernel, target, num_chains=10_000, num_steps=1, generator=rng(2))
    ten = invariance_test(kernel, target, num_chains=10_000, num_steps=10, generator=rng(2))
    assert_invariant(one)
    assert ten.p_value < 1e-12


def test_only_correlations_betray_a_kernel_that_keeps_every_margin(rng):
    cov = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    target = Gaussian(torch.zeros(2, dtype=torch.float64), cov)

    def step(state: Chain, *, generator=None) -> tuple[Chain, Move]:
        x = torch.stack([state.x[:, 0], -state.x[:, 1]], 1)  # each coordinate keeps its law
        return state._replace(x=x), Move(torch.ones(()), torch.ones((), dtype=torch.bool))

    kernel = Kernel(lambda x: Chain(x, target(x), x), step)
    run = {"num_chains": 10_000, "num_steps": 1}
    margins = invariance_test(kernel, target, projections=lambda x: x, generator=rng(3), **run)
    assert_invariant(margins)
    assert margins.names == ("projection 0", "projection 1")
    assert invariance_test(kernel, target, generator=rng(3), **run).p_value < 1e-12


def test_plain_distributions_of_single_numbers_are_targets_too(rng):
    target = Normal(torch.tensor(2.0), torch.tensor(3.0))

    def exact(state: Chain, *, generator=None) -> tuple[Chain, Move]:
        x = 2 + 3 * torch.randn(state.x.shape, generator=generator)
        return state._replace(x=x), Move(torch.ones(()), torch.ones((), dtype=torch.bool))

    def double_mass(state: Chain, *, generator=None) -> tuple[Chain, Move]:
        x = 2 + math.sqrt(3) * torch.randn(state.x.shape, generator=generator)
        return state._replace(x=x), Move(torch.ones(()), torch.ones((), dtype=torch.bool))

    def run(step) -> InvarianceResult:
        kernel = Kernel(lambda x: Chain(x, x, x), step)
        return invariance_test(kernel, target, num_chains=3000, num_steps=2, generator=rng(4))

    assert run(exact).names == ("coordinate 0", "log-density")
    assert_invariant(run(exact))
    assert run(double_mass).p_value < 1e-12


@pytest.mark.parametrize("constant", [2.0, 0.1])  # the sum of 0.1s is rounded
def test_a_coordinate_that_is_constant_does_not_spoil_the_others(rng, constant):
    law = skewed()

    class WithConstant:
        def log_prob(self, x: Tensor) -> Tensor:
            return law.log_prob(x[:, :2])

        def sample(self, n: int, *, generator) -> Tensor:
            x = law.sample(n, generator=generator)
            return torch.cat([x, torch.full_like(x[:, :1], constant)], 1)

    def run(wrong: bool) -> InvarianceResult:
        def step(state: Chain, *, generator=None) -> tuple[Chain, Move]:
            x = WithConstant().sample(len(state.x), generator=generator)
            if wrong:  # only the correlation is
                x[:, 0] = x[:, 0].roll(1)
            return state._replace(x=x), Move(torch.ones(()), torch.ones((), dtype=torch.bool))

        kernel = Kernel(lambda x: Chain(x, x, x), step)
        return invariance_test(
            kernel, WithConstant(), num_chains=5000, num_steps=1, generator=rng(11)
        )

    found = run(False)
    assert_invariant(found)
    assert found.names[2] == "coordinate 2" and float(found.p_values[2]) == 1.0
    wrong = run(True)
    directions = [i for i, name in enumerate(wrong.names) if name.startswith("direction")]
    assert wrong.p_values[directions].min() < 1e-9


def test_p_values_are_uniform_for_a_correct_kernel(rng):
    target, generator = skewed(), rng(5)
    kernel = metropolis(target)

    def distance(p_values: Tensor) -> float:
        return scipy.stats.kstest(p_values, "uniform").pvalue

    results = [
        invariance_test(kernel, target, num_chains=400, num_steps=3, generator=generator)
        for _ in range(100)
    ]
    p_values = torch.stack([result.p_values for result in results])
    assert min(distance(column) for column in p_values.T) > 1e-5 / 8  # Bonferroni
    together = torch.tensor([result.p_value for result in results])
    assert scipy.stats.binomtest(int((together < 0.1).sum()), 100, 0.1, "greater").pvalue > 1e-5
    # Compared with their own starts, as if those were independent, the ends look far too alike.
    paired = []
    for _ in range(100):
        x = target.sample(400, generator=generator)
        state = kernel.init(x)
        for _ in range(3):
            state, _ = kernel.step(state, generator=generator)
        paired.append(scipy.stats.ks_2samp(x[:, 0], state.x[:, 0], method="asymp").pvalue)
    assert distance(torch.tensor(paired)) < 1e-5


def test_invariance_test_refuses_what_it_cannot_judge(rng):
    target = skewed()
    kernel = metropolis(target)
    run = {"num_chains": 100, "num_steps": 1}

    def then(change) -> Kernel:
        def step(state: Chain, *, generator=None) -> tuple[Chain, Move]:
            state, info = kernel.step(state, generator=generator)
            return state._replace(x=change(state.x)), info

        return Kernel(kernel.init, step)

    with pytest.raises(ValueError, match="chains' final states has 200 NaN"):
        invariance_test(then(lambda x: x * math.nan), target, **run)
    with pytest.raises(ValueError, match=r"shape \(100, 2\) into \(50, 2\)"):
        invariance_test(then(lambda x: x[:50]), target, **run)
    with pytest.raises(ValueError, match=r"projected final states has 100 NaN or infinite"):
        invariance_test(then(lambda x: x - 1e9), target, **run)
    with pytest.raises(ValueError, match=r"projections gave \(100,\), expected \(100, k\)"):
        invariance_test(kernel, target, projections=lambda x: x[:, 0], **run)
    with pytest.raises(ValueError, match="num_chains"):
        invariance_test(kernel, target, num_chains=1, num_steps=1)
    with pytest.raises(ValueError, match="num_steps"):
        invariance_test(kernel, target, num_chains=10, num_steps=0)


def test_assert_invariant_says_what_moved():
    p_values = torch.tensor([0.3, 1e-9, 1e-7], dtype=torch.float64)
    result = InvarianceResult(3e-9, p_values, torch.tensor([0.01, 0.2, 0.1]), ("a", "b", "c"))
    with pytest.raises(AssertionError, match=r"2 of 3 projections moved, most clearly b .*0\.2"):
        assert_invariant(result)
    assert_invariant(result, false_alarm=1e-9)
    with pytest.raises(ValueError, match="false_alarm"):
        assert_invariant(result, false_alarm=0.0)


# ---------------------------------------------------------------- discrete_invariance_test


def ising(x: Tensor) -> Tensor:
    """An asymmetric log-density on bits or spins, `(m, *event) -> (m,)`."""
    x = x.flatten(1)
    fields = torch.linspace(-0.5, 1.0, x.shape[1], dtype=x.dtype, device=x.device)
    return 0.8 * (x[:, 1:] * x[:, :-1]).sum(1) + x @ fields


def heat_bath(log_prob, values: tuple[float, float] = (0.0, 1.0), *, bug: str = "") -> Kernel:
    """Each site in turn is drawn from its conditional law."""

    def step(state: Chain, *, generator=None) -> tuple[Chain, Move]:
        old = x = state.x.flatten(1)
        for i in range(x.shape[1]):
            low, high = ((old if bug == "parallel" else x).clone() for _ in range(2))
            low[:, i], high[:, i] = values
            odds = log_prob(high.view_as(state.x)) - log_prob(low.view_as(state.x))
            p = torch.sigmoid(odds * (0.9 if bug == "temperature" else 1.0))
            u = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
            x = x.clone()
            x[:, i] = torch.where(u < p, high[:, i], low[:, i])
        x = x.view_as(state.x)
        return Chain(x, log_prob(x), x), Move(torch.ones(()), torch.ones((), dtype=torch.bool))

    return Kernel(lambda x: Chain(x, log_prob(x), x), step)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "bits"), (torch.float64, "spins")])
def test_a_correct_discrete_kernel_passes_and_mutants_do_not(rng, device, dtype, kind):
    states = binary_states(6, device=device, dtype=dtype)
    states = states[torch.randperm(64, generator=rng(10))]  # in any order
    values = (0.0, 1.0)
    if kind == "spins":  # a lattice of 2 x 3 spins
        states, values = (2 * states - 1).reshape(-1, 2, 3), (-1.0, 1.0)

    def run(bug: str) -> InvarianceResult:
        return discrete_invariance_test(
            heat_bath(ising, values, bug=bug),
            ising,
            states,
            num_chains=40_000,
            num_steps=3,
            generator=rng(6, device),
        )

    assert_invariant(run(""))
    assert run("parallel").p_value < 1e-12
    assert run("temperature").p_value < 1e-5


def test_discrete_p_values_are_uniform_for_a_correct_kernel(rng):
    generator, states = rng(7), binary_states(4, dtype=torch.float64)

    def p_value(bug: str) -> float:
        return discrete_invariance_test(
            heat_bath(ising, bug=bug),
            ising,
            states,
            num_chains=1000,
            num_steps=2,
            generator=generator,
        ).p_value

    assert scipy.stats.kstest([p_value("") for _ in range(100)], "uniform").pvalue > 1e-5
    assert scipy.stats.kstest([p_value("parallel") for _ in range(20)], "uniform").pvalue < 1e-5


def test_rare_states_are_pooled(rng):
    """Most of the 2^10 states expect less than a hundred chains."""
    states = binary_states(10, dtype=torch.float64)
    result = discrete_invariance_test(
        heat_bath(ising), ising, states, num_chains=40_000, num_steps=1, generator=rng(8)
    )
    assert_invariant(result)
    expected = 40_000 * exact_distribution(ising, 10, dtype=torch.float64)
    cells = int((expected >= 100).sum()) + 1
    assert 20 < cells < 200
    # A chi-square variable of cells - 1 degrees of freedom, within its 1e-5 interval.
    low, high = scipy.stats.chi2.interval(1 - 1e-5, cells - 1)
    assert low < float(result.statistics[0]) < high
    assert result.p_value == pytest.approx(
        scipy.stats.chi2.sf(float(result.statistics[0]), cells - 1)
    )


def false_alarms(num_chains: int, p: float, level: float) -> float:
    """How often exact draws of two states, of which one has probability p, get a p-value below
    `level`, by the binomial law of their count; as a multiple of `level`."""
    counts = torch.arange(num_chains + 1, dtype=torch.float64)
    square = (counts - num_chains * p).square() / (num_chains * p * (1 - p))
    law = torch.from_numpy(scipy.stats.binom.pmf(counts.numpy(), num_chains, p))
    return (
        float(law[torch.from_numpy(scipy.stats.chi2.sf(square.numpy(), 1)) < level].sum()) / level
    )


def test_cells_of_a_hundred_chains_have_the_p_values_that_they_claim(rng):
    smallest = invariance.MIN_EXPECTED
    shares = (0.5, 0.3, 0.1, 0.01, 0.001)
    for level in (1e-3, 1e-5):
        rates = [false_alarms(int(smallest / p), p, level) for p in shares]
        assert max(rates) < 2.1 and min(rates) > 0.4
    assert max(false_alarms(int(5 / p), p, 1e-5) for p in shares) > 20  # with five
    # That is what the test does with two states.
    for num_chains, fits in ((10_001, True), (9_000, False)):

        def run(num_chains: int = num_chains) -> InvarianceResult:
            kernel = Kernel(lambda x: Chain(x, x, x), lambda state, generator=None: (state, None))
            return discrete_invariance_test(
                kernel,
                lambda x: torch.where(x[:, 0] == 1, math.log(0.01), math.log(0.99)),
                binary_states(1, dtype=torch.float64),
                num_chains=num_chains,
                num_steps=1,
                generator=rng(12),
            )

        if fits:
            assert_invariant(run())
        else:
            with pytest.raises(ValueError, match="one cell that expects 100"):
                run()


def jump_to(row: list[float]) -> Kernel:
    def step(state: Chain, *, generator=None) -> tuple[Chain, Move]:
        x = state.x.clone()
        x[0] = torch.tensor(row)
        return state._replace(x=x), Move(torch.ones(()), torch.ones((), dtype=torch.bool))

    return Kernel(lambda x: Chain(x, x, x), step)


def test_a_single_chain_in_a_forbidden_state_is_enough():
    def log_prob(x: Tensor) -> Tensor:
        return torch.where(x.sum(1) == 2, -torch.inf, 0.0)

    run = {"num_chains": 1000, "num_steps": 1}
    result = discrete_invariance_test(jump_to([1.0, 1.0]), log_prob, binary_states(2), **run)
    assert result.p_value == 0
    with pytest.raises(AssertionError, match="counts of the states"):
        assert_invariant(result)
    result = discrete_invariance_test(jump_to([1.0, 0.0]), log_prob, binary_states(2), **run)
    assert_invariant(result)


def test_discrete_invariance_test_refuses_what_it_cannot_judge():
    states = binary_states(2)
    run = {"num_chains": 100, "num_steps": 1}
    with pytest.raises(ValueError, match=r"1 chains ended outside the states.*\[0.5, 1.0\]"):
        discrete_invariance_test(jump_to([0.5, 1.0]), ising, states, **run)
    with pytest.raises(ValueError, match="listed twice"):
        discrete_invariance_test(jump_to([0.0, 1.0]), ising, states[[0, 1, 1]], **run)
    with pytest.raises(ValueError, match="5 chains are too few for 4 states"):
        discrete_invariance_test(jump_to([0.0, 1.0]), ising, states, num_chains=5, num_steps=1)
    with pytest.raises(ValueError, match="NaN"):
        discrete_invariance_test(jump_to([0.0, 1.0]), ising, states * math.nan, **run)
    with pytest.raises(TypeError, match="generator"):
        discrete_invariance_test(jump_to([0.0, 1.0]), ising, states, generator=3, **run)


def test_no_tensor_is_made_on_the_default_device(rng):
    target, generator, states = skewed(), rng(9), binary_states(3)
    with torch.device("meta"):
        run = {"num_chains": 2000, "num_steps": 1, "generator": generator}
        result = invariance_test(metropolis(target), target, **run)
        assert result.p_values.device.type == "cpu"
        kernel = Kernel(lambda x: Chain(x, x, x), lambda state, generator=None: (state, None))
        result = discrete_invariance_test(kernel, lambda x: x.sum(1), states, **run)
        assert result.p_values.device.type == "cpu"
        assert exact_distribution(lambda x: x.sum(1), 3, device="cpu").device.type == "cpu"
