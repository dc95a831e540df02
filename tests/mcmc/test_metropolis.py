"""Metropolis-Hastings: exact starts stay exact, planted bugs don't; acceptance in closed form."""

import math

import pytest
import torch
from exact_targets import NAMES, TemperedSkew, p_value, plant, target
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from companion.core import Kernel, sample
from companion.mcmc import (
    ChainState,
    base,
    independence,
    metropolis,
    metropolis_hastings,
    random_walk,
)
from companion.targets import Gaussian
from companion.testing import discrete_invariance_test

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison


def drifting(x: Tensor, *, generator=None) -> Tensor:
    """Proposes `0.7 x + 0.4 + 0.9 z`: towards a point of its own, so not symmetric."""
    z = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return 0.7 * x + 0.4 + 0.9 * z


def log_drifting(y: Tensor, x: Tensor) -> Tensor:
    return -0.5 * ((y - 0.7 * x - 0.4) / 0.9).square().sum(-1)


def wide(law) -> MultivariateNormal:
    """A proposal for `independence`, wider than the target."""
    like = law.sample(2)
    return MultivariateNormal(like.new_tensor([0.3, 0.8]), 6.0 * torch.eye(2).to(like))


KERNELS = {
    "random walk": lambda law: random_walk(law, 1.2),
    "random walk, covariance": lambda law: random_walk(
        law, 0.8, covariance=law.sample(2).new_tensor([[1.0, -0.5], [-0.5, 2.0]])
    ),
    "random walk, variances": lambda law: random_walk(
        law, 0.8, covariance=law.sample(2).new_tensor([0.5, 2.0])
    ),
    "drifting": lambda law: metropolis_hastings(law, drifting, log_drifting),
    "independence": lambda law: independence(law, wide(law)),
}


# ---------------------------------------------------------------- invariance


@DTYPES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_exact_starts_stay_exact(rng, device, dtype, name, kernel):
    law = target(name, dtype, device)
    assert p_value(KERNELS[kernel](law), law, rng(0, device)) > 1e-5


@DTYPES
def test_step_sizes_may_differ_from_chain_to_chain(rng, device, dtype):
    law = target("skewed", dtype, device)
    sizes = torch.linspace(0.1, 3.0, 20_000, dtype=dtype, device=device)
    assert p_value(random_walk(law, sizes), law, rng(1, device)) > 1e-5
    x0 = law.sample(3 * 500, generator=rng(2, device)).reshape(3, 500, 2)
    rows = torch.tensor([[0.01], [1.0], [30.0]], dtype=dtype, device=device)
    rate = sample(random_walk(law, rows), x0, 20, generator=rng(3, device)).accept_prob.mean(1)
    assert rate[0] > 0.9 > rate[1] > 0.3 > 0.1 > rate[2]


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("random walk", "value - state.log_prob", "state.log_prob - value"),
        (
            "random walk",
            "select(info.accepted, ChainState(y, value), state)",
            "ChainState(y, value)",
        ),
        (
            "random walk",
            "select(info.accepted, ChainState(y, value), state)",
            "ChainState(select(info.accepted, ChainState(y, value), state).x, value)",
        ),
        (
            "random walk",
            "select(info.accepted, ChainState(y, value), state)",
            "ChainState(select(info.accepted, ChainState(y, value), state).x, state.log_prob)",
        ),
        ("drifting", "log_q(x, y) - log_q(y, x)", "0.0 * value"),
        ("drifting", "log_q(x, y) - log_q(y, x)", "log_q(y, x) - log_q(x, y)"),
        ("drifting", "log_q(x, y) - log_q(y, x)", "log_q(x, y)"),
        ("independence", "log_q(x, y) - log_q(y, x)", "0.0 * value"),
        ("independence", "log_q(x, y) - log_q(y, x)", "log_q(y, x) - log_q(x, y)"),
    ],
    ids=[
        "sign of the ratio",
        "never rejects",
        "keeps the proposal's log-density",
        "keeps the old log-density",
        "drops the Hastings correction",
        "flips the Hastings correction",
        "corrects one way only",
        "drops the proposal's density",
        "flips the proposal's density",
    ],
)
@DTYPES
def test_bugs_in_the_accept_step_are_found(rng, device, dtype, monkeypatch, kernel, old, new):
    plant(monkeypatch, metropolis.metropolis_hastings_step, old, new)
    law = target("skewed", dtype, device)
    assert p_value(KERNELS[kernel](law), law, rng(0, device), num_steps=8) < 1e-7


@DTYPES
def test_tempering_the_proposal_with_the_target_is_found(rng, device, dtype):
    law = target("tempered", dtype, device)

    def tempered_too(y: Tensor, x: Tensor) -> Tensor:
        return law.beta * log_drifting(y, x)

    right, wrong = (metropolis_hastings(law, drifting, q) for q in (log_drifting, tempered_too))
    assert p_value(right, law, rng(0, device)) > 1e-5
    assert p_value(wrong, law, rng(0, device)) < 1e-7
    # At beta = 1 both are the same.
    law = TemperedSkew(law.base.matrix, 1.0)
    assert p_value(wrong, law, rng(0, device)) < 1e-7  # the density was that of beta = 0.4


@DTYPES
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_rejected_chain_stays_where_it_is(rng, device, dtype, kernel):
    law = target("skewed", dtype, device)
    move = KERNELS[kernel](law)
    generator = rng(0, device)
    state = move.init(law.sample(500, generator=generator))
    for _ in range(3):
        before = state
        state, info = move.step(state, generator=generator)
        assert info.accepted.any() and not info.accepted.all()
        assert torch.equal((state.x == before.x).all(-1), ~info.accepted)
        assert torch.equal(state.log_prob == before.log_prob, ~info.accepted)


@DTYPES
def test_a_rejection_that_jumps_back_to_the_start_is_found(rng, device, dtype):
    """By starts far away: exact starts hardly see it, for the start is a draw of the law, too."""
    law = target("skewed", dtype, device)
    right = random_walk(law, 2.0)
    start: list[ChainState] = []

    def far(x: Tensor) -> ChainState:
        start[:] = [right.init(torch.full_like(x, 6.0))]
        return start[0]

    def jump_back(state, *, generator=None):
        moved, info = right.step(state, generator=generator)
        return base.select(info.accepted, moved, start[0]), info

    run = {"num_chains": 2000, "num_steps": 150}
    assert p_value(Kernel(far, right.step), law, rng(0, device), **run) > 1e-5
    assert p_value(Kernel(far, jump_back), law, rng(0, device), **run) < 1e-9


# ---------------------------------------------------------------- discrete spaces

RING = 7


def ring_log_prob(x: Tensor) -> Tensor:
    levels = torch.tensor([0.0, 1.0, -0.5, 2.0, 0.3, -1.0, 0.8], dtype=torch.float64)
    return levels.to(x.device)[x]


def mostly_up(x: Tensor, *, generator=None) -> Tensor:
    up = torch.rand(x.shape, device=x.device, generator=generator) < 0.8
    return (x + up.long() - (~up).long()) % RING


def log_mostly_up(y: Tensor, x: Tensor) -> Tensor:
    p = torch.tensor([0.2, 0.8], dtype=torch.float64, device=x.device)
    return p.log()[((y - x) % RING == 1).long()]


def ring_p_value(log_q, generator, device) -> float:
    kernel = metropolis_hastings(ring_log_prob, mostly_up, log_q)
    states = torch.arange(RING, device=device)
    run = {"num_chains": 20_000, "num_steps": 5, "generator": generator}
    return discrete_invariance_test(kernel, ring_log_prob, states, **run).p_value


def test_discrete_proposals_need_their_correction_too(rng, device):
    assert ring_p_value(log_mostly_up, rng(0, device), device) > 1e-5
    assert ring_p_value(None, rng(0, device), device) < 1e-9
    assert ring_p_value(lambda y, x: log_mostly_up(x, y), rng(0, device), device) < 1e-9


# ---------------------------------------------------------------- acceptance rates


def mean_acceptance(kernel: Kernel, x0: Tensor, generator) -> tuple[Tensor, Tensor]:
    """Mean acceptance of one step from exact starts, and its standard error."""
    _, info = kernel.step(kernel.init(x0), generator=generator)
    p = info.accept_prob
    return p.mean(), p.std() / math.sqrt(len(p))


@pytest.mark.parametrize("step_size", [0.5, 1.0, 4.0])
def test_acceptance_of_a_normal_walk_on_a_normal_law(rng, ledger, step_size):
    n, sd = 100_000, math.sqrt(0.5)
    x0 = sd * torch.randn(n, dtype=torch.float64, generator=rng(0))
    rate, se = mean_acceptance(random_walk(lambda x: -x.square(), step_size), x0, rng(1))
    exact = 2 / math.pi * math.atan(2 * sd / step_size)
    ledger(
        f"acceptance of a random walk of step size {step_size} on N(0, 1/2)",
        exact=exact,
        estimate=rate,
        std_error=se,
    )
    # A step of twice the variance would be noticed.
    wrong = 2 / math.pi * math.atan(2 * sd / (step_size * math.sqrt(2)))
    assert abs(rate - wrong) > Z * se


def test_acceptance_of_a_uniform_walk_on_a_normal_law(rng, ledger):
    n, half = 100_000, 2.0

    def propose(x: Tensor, *, generator=None) -> Tensor:
        u = torch.rand(x.shape, dtype=x.dtype, generator=generator)
        return x + half * (2 * u - 1)

    x0 = torch.randn(n, dtype=torch.float64, generator=rng(2))
    kernel = metropolis_hastings(lambda x: -0.5 * x.square(), propose)
    rate, se = mean_acceptance(kernel, x0, rng(3))
    # The mean over the step t of 2 Phi(-|t| / 2).
    c, phi = torch.tensor(half / 2, dtype=torch.float64), Normal(0.0, 1.0)
    peak = 1 / math.sqrt(2 * math.pi)
    exact = 2 / c * (c * phi.cdf(-c) + peak - phi.log_prob(c).exp())
    ledger(
        "acceptance of a walk with steps uniform on (-2, 2) on N(0, 1)",
        exact=exact,
        estimate=rate,
        std_error=se,
    )
    same_variance = 2 / math.pi * math.atan(2 / (half / math.sqrt(3)))
    assert abs(rate - same_variance) > Z * se  # not the normal walk's


def test_acceptance_of_an_independence_sampler_of_two_normal_laws(rng, ledger):
    x0 = torch.randn(100_000, dtype=torch.float64, generator=rng(4))
    q = Normal(torch.zeros((), dtype=torch.float64), 2.0)
    rate, se = mean_acceptance(independence(lambda x: -0.5 * x.square(), q), x0, rng(5))
    # 2 P(|Y| < |X|): the density is accepted where the weight, which falls with |x|, is larger.
    ledger(
        "acceptance of the independence sampler, N(0, 1) from N(0, 4)",
        exact=4 / math.pi * math.atan(1 / 2),
        estimate=rate,
        std_error=se,
    )
    assert abs(rate - 0.5) > Z * se


def test_an_exact_proposal_is_always_accepted(rng):
    law = target("skewed")
    trace = sample(independence(law, law), law.sample(100, generator=rng(0)), 5, generator=rng(1))
    torch.testing.assert_close(trace.accept_prob, torch.ones(100, dtype=torch.float64))


def test_moments_of_a_skewed_law_by_a_long_run(rng, ledger):
    law = target("skewed")
    x0 = law.sample(1000, generator=rng(6))
    x = sample(random_walk(law, 1.5), x0, 300, generator=rng(7)).x
    second = (x[..., 0] - law.mean[0]) * (x[..., 1] - law.mean[1])
    exact = {"mean of x_1": law.mean[0], "covariance of x_1 and x_2": law.covariance[0, 1]}
    found = {"mean of x_1": x[..., 0].mean(1), "covariance of x_1 and x_2": second.mean(1)}
    for what, means in found.items():  # chains are independent, so their means tell the error
        ledger(
            f"{what} of a skewed law, by random-walk Metropolis",
            exact=exact[what],
            estimate=means.mean(),
            std_error=means.std() / math.sqrt(len(means)),
        )


# ---------------------------------------------------------------- what is not allowed


class Gamma3:
    """The gamma law of shape 3: NaN (or minus infinity) below zero."""

    def __init__(self, below: float) -> None:
        self.below = below
        self.law = torch.distributions.Gamma(torch.tensor(3.0, dtype=torch.float64), 1.0)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, 2 * x.clamp(min=1e-9).log() - x, self.below)

    def sample(self, n: int, *, generator=None) -> Tensor:
        from companion.inputs import draw

        return draw(self.law, n, generator=generator)


def test_nan_and_minus_infinity_are_rejected_and_nan_is_counted(rng):
    for below, warns in ((-math.inf, False), (math.nan, True)):
        law = Gamma3(below)
        kernel = random_walk(law.log_prob, 3.0)
        assert p_value(kernel, law, rng(8)) > 1e-5
        x0 = law.sample(100, generator=rng(9))
        if warns:
            with pytest.warns(UserWarning, match="NaN"):
                trace = sample(kernel, x0, 50, generator=rng(10))
        else:
            trace = sample(kernel, x0, 50, generator=rng(10))
        assert (trace.x > 0).all() and trace.log_prob.isfinite().all()
        assert (trace.num_nan.sum() > 500) == warns


def test_an_infinite_density_does_not_hold_chains_for_ever(rng):
    """A bell with a hole in which a formula overflows."""

    def log_prob(x: Tensor) -> Tensor:
        return torch.where((x - 1.5).abs() < 0.5, math.inf, -0.5 * x.square())

    x0 = torch.zeros(200, dtype=torch.float64)
    for kernel in (random_walk(log_prob, 1.0), independence(log_prob, Normal(0.0, 1.5))):
        with pytest.warns(UserWarning, match="NaN"):
            trace = sample(kernel, x0.float(), 50, generator=rng(0))
        assert trace.log_prob.isfinite().all() and trace.num_nan.sum() > 200
        assert trace.accept_prob.min() > 0.1


def test_a_proposal_may_change_the_points_in_place(rng):
    def in_place(x: Tensor, *, generator=None) -> Tensor:
        return x.add_(torch.randn(x.shape, dtype=x.dtype, generator=generator))

    def anew(x: Tensor, *, generator=None) -> Tensor:
        return in_place(x.clone(), generator=generator)

    def bell(x: Tensor) -> Tensor:
        return -0.5 * x.square()

    x0 = torch.zeros(20)
    one, two = (
        sample(metropolis_hastings(bell, propose), x0, 30, generator=rng(0))
        for propose in (in_place, anew)
    )
    assert torch.equal(one.x, two.x) and (x0 == 0).all()
    assert (one.accept_prob < 1).all()


def test_a_bad_start_is_named_by_chain():
    x = torch.tensor([1.0, 1.0, -1.0])
    for kernel in (
        random_walk(torch.log, 1.0),
        metropolis_hastings(torch.log, drifting),
        independence(torch.log, Normal(0.0, 1.0)),
    ):
        with pytest.raises(ValueError, match="nan at chain 2"):
            kernel.init(x)
    nowhere = independence(lambda x: -x.square(), Gamma3(-math.inf))
    with pytest.raises(ValueError, match="proposal's log-density .* -inf at chain 2"):
        nowhere.init(x)


def test_bad_arguments_are_refused(rng, device):
    def bowl(x):
        return -x.square().sum(-1)

    x = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="step_size"):
        random_walk(bowl, 0.0)
    with pytest.raises(TypeError, match=r"floating .* got torch.int64"):
        random_walk(bowl, 1.0).init(x.long())
    with pytest.raises(ValueError, match=r"shape \(3,\) does not broadcast to the chains, \(5,\)"):
        random_walk(bowl, torch.ones(3)).init(x)
    with pytest.raises(ValueError, match=r"covariance must have the shape .* \(2,\), or \(2, 2\)"):
        random_walk(bowl, 1.0, covariance=torch.ones(3)).init(x)
    with pytest.raises(ValueError, match="covariance must be symmetric and positive definite"):
        random_walk(bowl, 1.0, covariance=torch.ones(2, 2)).init(x)
    for wrong in (lambda x, *, generator: x[:2], lambda x, *, generator: x.double()):
        kernel = metropolis_hastings(bowl, wrong)
        with pytest.raises(ValueError, match="a proposal must be as the chains are"):
            kernel.step(kernel.init(x))
    kernel = metropolis_hastings(bowl, drifting, lambda y, x: (y - x).square())
    with pytest.raises(ValueError, match=r"log_q must give one number .* \(5,\); it gave \(5, 2\)"):
        kernel.step(kernel.init(x))
    batched = independence(bowl, Normal(torch.zeros(2), 1.0))
    with pytest.raises(ValueError, match=r"one log-density a chain, .* \(5,\); it gave \(5, 2\)"):
        batched.init(x)
    elsewhere = torch.Generator(device)
    for make in (
        lambda: random_walk(bowl, 1.0),
        lambda: metropolis_hastings(bowl, drifting),
        lambda: independence(bowl, Independent(Normal(torch.zeros(2), 1.0), 1)),
    ):
        state = ChainState(torch.zeros(5, 2, device="meta"), torch.zeros(5, device="meta"))
        with pytest.raises(ValueError, match=r"the generator is on .* but the tensors are on meta"):
            make().step(state, generator=elsewhere)


# ---------------------------------------------------------------- hygiene


@DTYPES
@pytest.mark.parametrize("kernel", KERNELS)
def test_everything_follows_the_chains(rng, device, dtype, kernel):
    law = target("skewed", dtype, device)
    with torch.device(device):
        move = KERNELS[kernel](law)
    x = law.sample(12, generator=rng(0, device)).reshape(3, 4, 2)
    with torch.device("meta"):
        state = move.init(x)
        for _ in range(3):
            state, info = move.step(state, generator=rng(1, device))
    assert state.x.shape == (3, 4, 2) and state.log_prob.shape == info.accepted.shape == (3, 4)
    assert (state.x.dtype, state.x.device.type) == (dtype, device.type)
    torch.testing.assert_close(state.log_prob, law(state.x))
    single, _ = move.step(move.init(x[0, 0]), generator=rng(1, device))
    assert single.x.shape == (2,) and single.log_prob.shape == ()


def test_steps_keep_no_graph_and_leave_the_given_points_alone(rng):
    weight = torch.nn.Parameter(torch.ones(2))
    x = torch.zeros(4, 2)
    kernel = random_walk(lambda x: -(weight * x).square().sum(-1), 1.0)
    state, _ = kernel.step(kernel.init(x), generator=rng(0))
    assert not state.x.requires_grad and not state.log_prob.requires_grad
    assert (x == 0).all()


def test_the_global_generator_is_left_alone(rng):
    before = torch.get_rng_state()
    for make in KERNELS.values():
        law = Gaussian(torch.zeros(2), torch.eye(2))
        state = torch.get_rng_state()
        kernel = make(law)
        torch.set_rng_state(state)  # the proposals' shapes were drawn to build the kernel
        kernel.step(kernel.init(torch.zeros(5, 2)), generator=rng(0))
        assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


COVARIANCE = torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=torch.float64)
compiler = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when it loads it


@compiler
def test_compiled_steps_one_by_one_and_in_blocks_are_those_of_the_eager_kernel(rng):
    law = target("skewed")
    x0 = law.sample(50, generator=rng(0))
    eager, compiled = (
        random_walk(law, 0.8, covariance=COVARIANCE, compile=compile) for compile in (False, True)
    )
    one = sample(eager, x0, 20, generator=(g := rng(1)))
    two = sample(compiled, x0, 20, generator=(h := rng(1)))  # sixteen in one call, and four
    assert torch.equal(g.get_state(), h.get_state())
    torch.testing.assert_close(one.x, two.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.log_prob, two.log_prob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.accept_prob, two.accept_prob, rtol=1e-8, atol=1e-8)
    state, g = compiled.init(x0), rng(1)
    for i in range(18):  # bit for bit: a run that is resumed may cut its blocks elsewhere
        state, _ = compiled.step(state, generator=g)
        assert torch.equal(state.x, two.x[:, i])


@compiler
def test_a_density_that_cannot_be_compiled_in_blocks_is_sampled_step_by_step(rng):
    def log_prob(x):
        torch._dynamo.graph_break()
        return -0.5 * x.square().sum(-1)

    x0 = torch.randn(5, 2, generator=rng(0), dtype=torch.float64)
    one, two = (
        sample(random_walk(log_prob, 0.8, compile=compile), x0, 20, generator=rng(1))
        for compile in (False, True)
    )
    torch.testing.assert_close(one.x, two.x, rtol=1e-12, atol=1e-12)


@compiler
def test_every_kernel_keeps_its_own_compiled_code(rng):
    """By default all share eight places, here one, and those that come later run uncompiled."""
    calls = []

    def log_prob(x):
        if not torch.compiler.is_compiling():
            calls.append(x)
        return -0.5 * x.square().sum(-1)

    state = random_walk(log_prob, 1.0).init(torch.zeros(3, 1))
    calls.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        for i in range(2):
            random_walk(log_prob, 0.5 + i, compile=True).step(state, generator=rng(i))
    assert calls == []
