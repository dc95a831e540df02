"""Cycles and mixtures of kernels: exact starts stay exact, whatever the states of the kernels."""

import math
from contextlib import nullcontext

import pytest
import torch
from exact_targets import NAMES, p_value, target
from torch import Tensor

from companion.core import Kernel, sample
from companion.hmc import jittered_hmc
from companion.mcmc import (
    ChainState,
    CombinedInfo,
    GibbsState,
    GradientState,
    MoveInfo,
    combine,
    cycle,
    gibbs,
    init_chains,
    mala,
    mixture,
    random_walk,
    slice_sampler,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

COMBINED = {
    "cycle": lambda law: cycle(random_walk(law, 2.0), mala(law, 0.7), random_walk(law, 0.5)),
    "cycle, another kind last": lambda law: cycle(random_walk(law, 2.0), mala(law, 0.7)),
    "mixture": lambda law: mixture([random_walk(law, 2.0), random_walk(law, 0.3)], [1.0, 3.0]),
    "mixture of kinds": lambda law: mixture([random_walk(law, 2.0), mala(law, 0.7)], [0.5, 0.5]),
    "nested": lambda law: cycle(mixture([mala(law, 0.7), mala(law, 0.1)], [1, 1]), mala(law, 0.5)),
}


def wrong_walk(law) -> Kernel:
    """A random walk that drifts: it leaves nothing invariant."""
    right = random_walk(law, 1.0)

    def step(state: ChainState, *, generator=None):
        state, info = right.step(state, generator=generator)
        x = state.x + 0.1
        return ChainState(x, law(x)), info

    return Kernel(right.init, step)


# ---------------------------------------------------------------- invariance


@DTYPES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("combined", COMBINED)
def test_exact_starts_stay_exact(rng, device, dtype, name, combined):
    law = target(name, dtype, device)
    kernel = COMBINED[combined](law)
    assert p_value(kernel, law, rng(0, device), num_chains=10_000) > 1e-5


@pytest.mark.parametrize("combine", [cycle, lambda *kernels: mixture(kernels, [0.5, 0.5])])
def test_one_wrong_kernel_of_two_is_found(rng, device, combine):
    law = target("skewed", torch.float64, device)
    kernel = combine(random_walk(law, 1.0), wrong_walk(law))
    assert p_value(kernel, law, rng(0, device)) < 1e-7


def test_a_choice_that_depends_on_the_point_is_found(rng, device):
    """Mixing is right only with weights that are the same everywhere."""
    law = target("skewed", torch.float64, device)
    wide, narrow = random_walk(law, 4.0), random_walk(law, 0.2)

    def step(state: ChainState, *, generator=None):
        high = state.x[..., 0] > 0
        moves = [kernel.step(state, generator=generator) for kernel in (wide, narrow)]
        x = torch.where(high[..., None], moves[0][0].x, moves[1][0].x)
        return ChainState(x, law(x)), moves[0][1]

    assert p_value(Kernel(wide.init, step), law, rng(0, device)) < 1e-7


def test_a_state_handed_on_without_its_density_is_found(rng, device, monkeypatch):
    """What a Gibbs sampler changes, the next kernel has to evaluate again."""
    law = target("skewed", torch.float64, device)

    def redraw(x: Tensor, *, generator=None) -> Tensor:
        return law.sample(len(x), generator=generator)

    kernel = cycle(gibbs([redraw]), random_walk(law, 2.0))
    assert p_value(kernel, law, rng(0, device)) > 1e-5

    class Stale(combine._Entry):
        def __call__(self, i, state):
            if isinstance(state, ChainState):
                self.value = state.log_prob
            if i == 1:  # with the density from before the Gibbs step
                value = getattr(self, "value", None)
                return ChainState(state.x, law(state.x) if value is None else value)
            return super().__call__(i, state)

    monkeypatch.setattr(combine, "_Entry", Stale)
    kernel = cycle(gibbs([redraw]), random_walk(law, 2.0))
    assert p_value(kernel, law, rng(0, device)) < 1e-7


def test_metropolis_within_gibbs_keeps_a_joint_law(rng, device):
    """One block redrawn exactly, the other by a Metropolis step of its own."""
    law = target("banana", torch.float64, device)

    def second(x: Tensor, *, generator=None) -> Tensor:  # x_2 | x_1 is normal
        noise = torch.randn(x.shape[:-1], dtype=x.dtype, device=device, generator=generator)
        x[..., 1] = law.bend * x[..., 0].square() + law.scale[1] * noise
        return x

    shape = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64, device=device))
    kernel = cycle(gibbs([second]), random_walk(law, 1.0, covariance=shape))
    assert p_value(kernel, law, rng(1, device)) > 1e-5


# ---------------------------------------------------------------- what a step is


def test_a_mixture_chooses_for_each_chain_and_by_its_weights(rng):
    def shift(by: float) -> Kernel:
        def step(state: ChainState, *, generator=None):
            one = torch.ones_like(state.log_prob)
            info = MoveInfo(0.5 * one, one > 0, one < 0)
            return ChainState(state.x + by, state.log_prob), info

        return Kernel(lambda x: init_chains(torch.zeros_like, x), step)

    n = 100_000
    kernel = mixture([shift(1.0), shift(10.0), shift(100.0)], torch.tensor([1.0, 2.0, 7.0]))
    state, info = kernel.step(kernel.init(torch.zeros(n)), generator=rng(0))
    for value, p in ((1.0, 0.1), (10.0, 0.2), (100.0, 0.7)):
        share = (state.x == value).double().mean()
        assert abs(share - p) < 4.7 * math.sqrt(p * (1 - p) / n)
    # Chains choose on their own: neighbours agree as often as chance has it.
    agree = (state.x[::2] == state.x[1::2]).double().mean()
    p = 0.1**2 + 0.2**2 + 0.7**2
    assert abs(agree - p) < 4.7 * math.sqrt(p * (1 - p) / (n / 2))
    assert (info.accept_prob == 0.5).all()


def test_a_single_chain_pays_for_its_own_choice_alone(rng):
    calls = []

    def counted(i: int) -> Kernel:
        def log_prob(x: Tensor) -> Tensor:
            calls.append(i)
            return -0.5 * x.square()

        return random_walk(log_prob, 1.0)

    kernel = mixture([counted(0), counted(1)], [1.0, 1.0])
    state = kernel.init(torch.zeros(()))
    calls.clear()
    generator = rng(0)
    for _ in range(20):
        state, _ = kernel.step(state, generator=generator)
    assert len(calls) == 20 and set(calls) == {0, 1}


def test_kinds_of_states():
    law, x = target("skewed"), torch.zeros(3, 2).double()

    def own(x: Tensor, *, generator=None) -> Tensor:
        return x

    walk, drift, plain = random_walk(law, 1.0), mala(law, 1.0), gibbs([own])
    for kernel, kind in (
        (cycle(walk, drift), GradientState),
        (cycle(drift, walk), ChainState),
        (cycle(walk, plain), GibbsState),
        (mixture([drift, drift], [1, 1]), GradientState),
        (mixture([walk, slice_sampler(law, 1.0)], [1, 1]), ChainState),
        (mixture([drift, gibbs([own], log_prob=law)], [1, 1]), ChainState),
    ):
        state = kernel.init(x)
        assert type(state) is kind
        moved, info = kernel.step(state, generator=torch.Generator().manual_seed(0))
        assert type(moved) is kind and type(info) is CombinedInfo


def test_infos_are_averages_and_alarms_of_the_kernels(rng):
    class Info(MoveInfo):
        is_divergent = torch.tensor([True, False, False])

    def fake(p: float, nan: bool, info=MoveInfo) -> Kernel:
        def step(state, *, generator=None):
            return state, info(
                torch.full((3,), p), torch.tensor([p > 0.5] * 3), torch.tensor([nan] * 3)
            )

        return Kernel(lambda x: init_chains(torch.zeros_like, x), step)

    kernel = cycle(fake(0.2, True), fake(0.8, False, Info))
    _, info = kernel.step(kernel.init(torch.zeros(3)), generator=rng(0))
    torch.testing.assert_close(info.accept_prob, torch.full((3,), 0.5))
    assert info.accepted.all() and info.is_nan.all()
    assert info.is_divergent.tolist() == [True, False, False]


@pytest.mark.parametrize("combined", COMBINED)
@DTYPES
def test_everything_follows_the_chains(rng, device, dtype, combined):
    law = target("skewed", dtype, device)
    kernel = COMBINED[combined](law)
    x = law.sample(12, generator=rng(0, device)).reshape(3, 4, 2)
    with torch.device("meta"):
        state = kernel.init(x)
        for _ in range(3):
            state, info = kernel.step(state, generator=rng(1, device))
    assert (state.x.shape, state.x.dtype, state.x.device.type) == (x.shape, dtype, device.type)
    assert {field.shape for field in info} == {(3, 4)}
    torch.testing.assert_close(state.log_prob, law(state.x))


def test_a_state_that_was_made_elsewhere_is_taken_up(rng):
    """As after a resume: the kernel has never seen a start."""
    law = target("skewed")
    x0 = law.sample(20, generator=rng(0))
    for make in COMBINED.values():
        started, fresh = make(law), make(law)
        state = started.init(x0)
        one, _ = started.step(state, generator=rng(1))
        two, _ = fresh.step(state, generator=rng(1))
        torch.testing.assert_close(one.x, two.x)


# ---------------------------------------------------------------- what is refused


def test_bad_combinations_are_refused(device):
    law, x = target("skewed", torch.float32), torch.zeros(3, 2)

    def shifted(x: Tensor) -> Tensor:
        return law(x) + 0.5

    walk = random_walk(law, 1.0)
    for make in (cycle, lambda *k: mixture(k, [1.0] * len(k))):
        with pytest.raises(ValueError, match="at least one kernel"):
            make()
        with pytest.raises(ValueError, match=r"kernels 0 and 1 differ by up to 0\.5"):
            make(walk, random_walk(shifted, 1.0)).init(x)
        with pytest.raises(ValueError, match="inf at chain 2"):
            make(walk).init(torch.cat([x[:2], x[2:] - 1e30]))
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [[1.0, 1.0]]):
        with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
            mixture([walk, walk], weights)
    with pytest.raises(ValueError, match="weights has 1 NaN"):
        mixture([walk, walk], [1.0, math.nan])
    with pytest.raises(ValueError, match="give gibbs its log_prob"):
        mixture([walk, gibbs([lambda x, *, generator: x])], [1, 1]).init(x)
    blank = ChainState(torch.zeros(5, 2, device="meta"), torch.zeros(5, device="meta"))
    with pytest.raises(ValueError, match=r"the generator is on .* but the tensors are on meta"):
        mixture([walk, walk], [1, 1]).step(blank, generator=torch.Generator(device))


@pytest.mark.parametrize("make", [cycle, lambda *kernels: mixture(kernels, [0.5, 0.5])])
def test_a_kernel_that_counts_its_steps_is_refused(rng, make):
    law, x = target("skewed"), torch.zeros(50, 2).double()
    counting, walk = jittered_hmc(law, 0.3, 3.0), random_walk(law, 1.0)
    for kernels, place in (((walk, counting), 1), ((counting, walk), 0), ((counting,) * 2, 0)):
        kernel = make(*kernels)
        with pytest.raises(ValueError, match=rf"kernel {place} keeps num_moves .* combine hmc"):
            kernel.init(x)
    kernel = make(walk, counting)  # as after a resume
    with pytest.raises(ValueError, match="kernel 1 keeps num_moves"):
        kernel.step(walk.init(x), generator=rng(0))


@DTYPES
def test_a_gap_of_log_densities_that_round_off_does_not_explain_is_refused(dtype):
    def far(x: Tensor) -> Tensor:
        return -0.5 * x.square().sum(-1) - 3000.0

    x, eps = torch.ones(5, 2, dtype=dtype), torch.finfo(dtype).eps
    for gap, is_refused in ((2000 * eps**0.5, True), (100 * 3000 * eps, False)):
        kernel = cycle(random_walk(far, 1.0), random_walk(lambda x, gap=gap: far(x) + gap, 1.0))
        with pytest.raises(ValueError, match="differ by") if is_refused else nullcontext():
            kernel.init(x)


def test_a_long_run_of_a_cycle_of_kinds_is_a_trace(rng):
    law = target("mixture")
    kernel = cycle(slice_sampler(law, 2.0), mala(law, 0.5))
    trace = sample(kernel, law.sample(50, generator=rng(0)), 10, generator=rng(1))
    assert trace.x.shape == (50, 10, 2) and trace.num_nan.sum() == 0
    torch.testing.assert_close(trace.log_prob, law(trace.x))
