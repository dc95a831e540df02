"""Tempered transitions: detailed balance to round-off, exact acceptance, and crossing of modes."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, Uniform

from companion.core import Kernel, sample
from companion.mcmc import GibbsState, MoveInfo, random_walk
from companion.targets import GaussianMixture
from companion.tempering import GeometricPath, transitions
from companion.tempering.transitions import tempered_transitions
from companion.testing import (
    assert_invariant,
    binary_states,
    detailed_balance_error,
    invariance_test,
    stationary_error,
    transition_matrix,
)
from tests.mcmc.exact_targets import plant
from tests.tempering.exact_paths import F64, ExactGaussians, Ring

# ---------------------------------------------------------------- detailed balance, to round-off

BASE, TARGET = [0.3, -0.2, 0.1, 0.0, -0.5], [0.0, -1.5, 1.0, -0.8, 0.4]


def ring():
    return Ring(BASE, TARGET)


class Coins:
    """The base of a binary model: independent bits, exact draws by `torch.rand(...) < p`."""

    def __init__(self, p):
        self.p = torch.as_tensor(p, dtype=F64)

    def log_prob(self, x):
        return (x * self.p.log() + (1.0 - x) * (-self.p).log1p()).sum(-1)

    def sample(self, n, *, generator=None):
        u = torch.rand(n, len(self.p), dtype=F64, device=self.p.device, generator=generator)
        return (u < self.p).to(F64)


def coupled(x):
    """Bits with unequal fields and couplings."""
    fields = torch.tensor([0.4, -0.7, 0.3], dtype=F64)[: x.shape[-1]]
    chain = torch.tensor([2.0, -1.5], dtype=F64)[: x.shape[-1] - 1]
    return (x * fields).sum(-1) + (x[..., 1:] * x[..., :-1] * chain).sum(-1)


def sweep(log_prob, order):
    """Heat-bath updates of the bits in a fixed order; its reversal is the order backwards."""

    def step(state, *, generator=None):
        x = state.x
        for bit in order:
            on, off = x.clone(), x.clone()
            on[..., bit], off[..., bit] = 1.0, 0.0
            p = (log_prob(on) - log_prob(off)).sigmoid()
            u = torch.rand(p.shape, dtype=p.dtype, generator=generator)
            x = torch.where((u < p)[..., None], on, off)
        one = torch.ones(x.shape[:-1], dtype=F64)
        return GibbsState(x), MoveInfo(one, one > 0, one < 0)

    return Kernel(GibbsState, step)


def bits(num_bits, order, reverse):
    return GeometricPath(
        Coins([0.3, 0.6, 0.45][:num_bits]),
        coupled,
        lambda density: sweep(density, order),
        reverse_kernel=lambda density: sweep(density, reverse),
    )


def ring_matrix(path, betas, make=tempered_transitions, **kwargs):
    states = torch.arange(len(BASE))
    return transition_matrix(make(path, betas, **kwargs), states), path.law(1.0)


def bits_matrix(num_bits, betas, order, reverse):
    states = binary_states(num_bits, dtype=F64, device="cpu")
    kernel = tempered_transitions(bits(num_bits, order, reverse), betas)
    return transition_matrix(kernel, states), coupled(states).softmax(0)


@pytest.mark.parametrize(
    ("betas", "num_steps"),
    [
        ([0.4, 1.0], 1),
        ([0.4, 1.0], 2),
        ([0.1, 0.5, 1.0], 1),
        ([0.0, 1.0], 1),
        ([0.0, 0.5, 1.0], 1),
    ],
)
def test_detailed_balance_holds_with_a_kernel_that_only_goes_round(betas, num_steps):
    matrix, p = ring_matrix(ring(), betas, num_steps=num_steps)
    assert detailed_balance_error(matrix, p) < 1e-12
    assert stationary_error(matrix, p) < 1e-12
    one_level = transition_matrix(Kernel(*as_kernel(ring(), 0.4)), torch.arange(len(BASE)))
    assert detailed_balance_error(one_level, ring().law(0.4)) > 1e-2


def as_kernel(path, beta):
    def step(state, *, generator=None):
        return GibbsState(path.step(state.x, beta, generator=generator)), None

    return GibbsState, step


@pytest.mark.parametrize(
    ("betas", "order"),
    [([0.4, 1.0], [0, 1]), ([0.4, 1.0], [1, 0, 1]), ([0.0, 1.0], [0, 2, 1])],
)
def test_detailed_balance_holds_with_systematic_sweeps(betas, order):
    """Palindromic or not, with the sweep backwards on the way down."""
    matrix, p = bits_matrix(max(order) + 1, betas, order, order[::-1])
    assert detailed_balance_error(matrix, p) < 1e-12
    assert stationary_error(matrix, p) < 1e-12


def test_the_same_kernel_on_the_way_down_breaks_the_balance_and_the_law():
    """Nothing in the acceptance ratio tells that the way down must be the reversal."""

    class OneWay(Ring):
        reverse_step = Ring.step

    for matrix, p in (
        ring_matrix(OneWay(BASE, TARGET), [0.1, 0.5, 1.0]),
        bits_matrix(2, [0.4, 1.0], [0, 1], [0, 1]),
    ):
        assert detailed_balance_error(matrix, p) > 1e-4
        assert stationary_error(matrix, p) > 1e-4


MUTANTS = {
    "the ratio of the way up alone": ("log_ratio = log_ratio + gain(density(hotter), value)", ""),
    "the ratio of the way down alone": (
        "log_ratio = log_ratio + gain(density(colder), density(hotter))",
        "density(colder)",
    ),
    "the ratio upside down": ("metropolis_accept(log_ratio,", "metropolis_accept(-log_ratio,"),
    "plain Metropolis between the ends": (
        "metropolis_accept(log_ratio,",
        "metropolis_accept(value - state.log_prob,",
    ),
    "always accepted": ("metropolis_accept(log_ratio,", "metropolis_accept(0.0 * log_ratio,"),
    "cooled in the order of heating": ("in reversed(ladder)", "in ladder"),
    "weighed before the move down": (
        "            if hotter > 0.0:\n"
        "                x = move(back, usable(x), hotter, generator)\n"
        "            density = profile(path, x)\n",
        "            density = profile(path, x)\n"
        "            x = move(back, usable(x), hotter, generator)\n",
    ),
    "one move at the top": (
        "                x = move(back, usable(x), hotter, generator)",
        "                x = move(back, usable(x), hotter, generator) if hotter > levels[0] else x",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_ratio_or_way_breaks_the_balance(mutant, monkeypatch):
    plant(monkeypatch, transitions.tempered_transitions, *MUTANTS[mutant])
    matrix, p = ring_matrix(ring(), [0.1, 0.5, 1.0], transitions.tempered_transitions)
    assert detailed_balance_error(matrix, p) > 1e-3


# ---------------------------------------------------------------- continuous


def mixture_path(device, dtype, **kwargs):
    like = {"dtype": dtype, "device": device}
    means = torch.tensor([[-2.0, 0.0], [1.5, 1.0]], **like)
    covariances = torch.tensor([[[1.0, 0.5], [0.5, 1.0]], [[0.5, -0.2], [-0.2, 0.3]]], **like)
    target = GaussianMixture(torch.tensor([0.3, 0.7], **like), means, covariances)
    base = Independent(Normal(torch.zeros(2, **like), 3.0 * torch.ones(2, **like)), 1)
    path = GeometricPath(
        base, target, lambda density, beta: random_walk(density, 1.0 + 1.0 / (0.5 + beta))
    )
    return path, target


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("first", [0.0, 0.1])
def test_exact_starts_stay_exact(rng, device, dtype, first):
    path, target = mixture_path(device, dtype)
    kernel = tempered_transitions(path, [first, 0.3, 0.6, 1.0])
    g = rng(0, device)
    assert_invariant(invariance_test(kernel, target, num_chains=10_000, num_steps=3, generator=g))


@pytest.mark.parametrize("mutant", ["the ratio of the way up alone", "always accepted"])
def test_wrong_ratios_are_found_from_exact_starts(rng, device, mutant, monkeypatch):
    plant(monkeypatch, transitions.tempered_transitions, *MUTANTS[mutant])
    path, target = mixture_path(device, F64)
    kernel = transitions.tempered_transitions(path, [0.1, 0.3, 0.6, 1.0])
    g = rng(0, device)
    result = invariance_test(kernel, target, num_chains=10_000, num_steps=3, generator=g)
    assert result.p_value < 1e-7


def exact_acceptance(path, betas):
    """`2 P(log r > 0)`: by detailed balance the ways with r < 1 bring as much as those with r > 1.

    With independent exact draws on centred normal laws, log r is a weighted sum of chi-squares; its
    distribution function comes from the characteristic function by Gil-Pelaez's formula.
    """
    from scipy.integrate import quad

    tau = path.moments(torch.tensor(betas, dtype=F64))[1].pow(-2)
    half = 0.5 * tau.diff(dim=0)
    weights = torch.cat([half / tau[1:], -half / tau[:-1]]).flatten().to(torch.complex128)

    def integrand(t):
        phi = (1.0 - 2.0j * t * weights).pow(-0.5).prod()
        return float(phi.imag) / t

    area, error = quad(integrand, 0.0, math.inf, limit=500)
    assert error < 1e-6
    return 2.0 * (0.5 + area / math.pi)


SCALES = ([0.0, 0.0, 0.0], [3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.5])


def test_acceptance_between_normal_laws_is_exact(rng, ledger):
    path = ExactGaussians(*SCALES)
    betas = [0.1, 0.2, 0.4, 0.7, 1.0]
    kernel = tempered_transitions(path, betas)
    g, n = rng(0), 100_000
    _, info = kernel.step(kernel.init(path.sample(n, 1.0, generator=g)), generator=g)
    ledger(
        "acceptance of tempered transitions between normal laws",
        exact=exact_acceptance(path, betas),
        estimate=info.accept_prob.mean(),
        std_error=info.accept_prob.std() / math.sqrt(n),
    )
    wrong = exact_acceptance(path, [0.1, 0.2, 0.4, 1.0])  # a level less
    assert abs(info.accept_prob.mean() - wrong) > 10 * info.accept_prob.std() / math.sqrt(n)


def test_acceptance_follows_from_the_sum_of_divergences():
    """`2 Phi(-sqrt(S / 2))` with S the symmetrised divergences between neighbours: exactly so in
    the limit of many levels; and S falls as one over their number."""
    path = ExactGaussians(*SCALES)
    sums = []
    for num in (33, 65):
        betas = torch.linspace(0.1, 1.0, num, dtype=F64)
        tau = path.moments(betas)[1].pow(-2)
        ratio = tau[1:] / tau[:-1]
        s = float((0.5 * (ratio + 1.0 / ratio) - 1.0).sum())
        expected = math.erfc(math.sqrt(s) / 2.0)  # 2 Phi(-z) = erfc(z / sqrt 2)
        assert exact_acceptance(path, betas.tolist()) == pytest.approx(expected, abs=2e-3)
        sums.append(s)
    assert sums[0] / sums[1] == pytest.approx(2.0, rel=0.02)


def test_modes_are_crossed_that_the_base_kernel_never_crosses(rng, ledger):
    means = torch.tensor([[-8.0], [8.0]], dtype=F64)
    target = GaussianMixture(
        torch.tensor([0.75, 0.25], dtype=F64), means, torch.ones(2, 1, 1, dtype=F64)
    )
    base = Independent(Normal(torch.zeros(1, dtype=F64), torch.full((1,), 8.0, dtype=F64)), 1)

    def walk(density, beta):  # at beta = 1 with steps of one standard deviation
        return random_walk(density, 5.0 - 4.0 * beta)

    path = GeometricPath(base, target, walk)
    x0 = torch.full((500, 1), -8.0, dtype=F64)
    stuck = sample(walk(target, 1.0), x0, 500, generator=rng(0)).x
    assert (stuck < 0).all()  # after a quarter of a million steps

    betas = torch.linspace(0.0, 1.0, 7, dtype=F64).square()
    trace = sample(tempered_transitions(path, betas), x0, 20, warmup=40, generator=rng(1))
    share = (trace.x[..., 0] > 0).double().mean(1)
    ledger(
        "mass of the second mode by tempered transitions",
        exact=0.25,
        estimate=share.mean(),
        std_error=share.std() / math.sqrt(len(share)),
    )
    assert trace.accept_prob.mean() > 0.1


# ---------------------------------------------------------------- what a step is


def test_num_steps_and_the_exact_draw_count(rng):
    """2 (K - 1) moves and as many points evaluated; with an exact base, the moves at the top go."""

    class Counting(ExactGaussians):
        steps = points = 0

        def step(self, x, beta, *, generator=None):
            self.steps += 1
            return super().step(x, beta, generator=generator)

        def profile(self, x):
            self.points += 1
            return lambda beta: self.log_prob(x, beta).double()

    for betas, num_steps, moves in (([0.1, 0.5, 1.0], 3, 12), ([0.0, 0.5, 1.0], 3, 6)):
        path = Counting(*SCALES)
        kernel = tempered_transitions(path, betas, num_steps=num_steps)
        kernel.step(kernel.init(path.sample_base(10, generator=rng(0))), generator=rng(1))
        assert (path.steps, path.points) == (moves, 4)


@pytest.mark.parametrize("chains", [(), (5,), (2, 3)])
def test_chains_are_the_leading_dimensions(rng, chains):
    path, _ = mixture_path("cpu", F64)
    kernel = tempered_transitions(path, [0.0, 0.5, 1.0])
    state, info = kernel.step(kernel.init(torch.zeros(*chains, 2, dtype=F64)), generator=rng(0))
    assert state.x.shape == (*chains, 2)
    assert state.log_prob.shape == chains and info.accepted.shape == chains
    torch.testing.assert_close(state.log_prob, path.log_prob(state.x, 1.0))


def test_one_seed_one_result_whatever_the_default_device(rng):
    path, target = mixture_path("cpu", torch.float32)
    kernel = tempered_transitions(path, [0.0, 0.5, 1.0])
    x0 = target.sample(20, generator=rng(0))
    first = sample(kernel, x0, 5, generator=rng(1)).x
    with torch.device("meta"):
        assert torch.equal(first, sample(kernel, x0, 5, generator=rng(1)).x)
    assert first.dtype == torch.float32
    assert not torch.equal(first, sample(kernel, x0, 5, generator=rng(2)).x)


def test_a_way_through_density_zero_is_rejected_and_one_with_nan_is_flagged(rng):
    box = Independent(Uniform(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)), 1)

    def outside(x):  # a target wider than the base: from outside no way leads up
        return -x.square().sum(-1)

    kernel = tempered_transitions(
        GeometricPath(box, outside, lambda density: random_walk(density, 0.5)), [0.0, 0.5, 1.0]
    )
    x = torch.tensor([[0.5], [2.0]], dtype=F64).repeat(100, 1)
    state, info = kernel.step(kernel.init(x), generator=rng(0))
    assert info.accepted[::2].any() and not info.accepted[1::2].any()
    assert not info.is_nan.any() and torch.equal(state.x[1::2], x[1::2])

    def broken(x):
        return torch.where(x[..., 0] > 0.3, torch.nan, 0.0)

    path = GeometricPath(box, broken, lambda density: random_walk(density, 0.5))
    x = torch.full((200, 1), 0.1, dtype=F64)
    for betas in ([0.0, 1.0], [0.0, 0.3, 0.6, 1.0]):  # no kernel starts at a NaN on the way
        kernel = tempered_transitions(path, betas)
        state, info = kernel.step(kernel.init(x), generator=rng(0))
        assert info.is_nan.any() and info.accepted.any() and (state.x <= 0.3).all()
        # About 0.7 of the draws of the base: five standard errors.
        assert abs(info.is_nan.double().mean() - 0.7) < 5 * math.sqrt(0.21 / 200)


def test_bad_input_is_explained():
    path, _ = mixture_path("cpu", F64)
    with pytest.raises(ValueError, match="at least two levels"):
        tempered_transitions(path, [1.0])
    with pytest.raises(ValueError, match="must ascend"):
        tempered_transitions(path, [1.0, 0.5])
    with pytest.raises(ValueError, match="num_steps"):
        tempered_transitions(path, [0.5, 1.0], num_steps=0)
    kernel = tempered_transitions(path, [0.5, 1.0])
    with pytest.raises(ValueError, match="not finite at the start of 1 of 2 chains"):
        kernel.init(torch.tensor([[0.0, 0.0], [math.inf, 0.0]], dtype=F64))
    with pytest.raises(TypeError, match="generator"):
        kernel.step(kernel.init(torch.zeros(2, 2, dtype=F64)), generator=1)
