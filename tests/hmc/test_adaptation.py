"""Warm-up against exact acceptance rates and covariances, and what it must not do afterwards."""

import math
import warnings

import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from companion.core import Kernel, sample
from companion.hmc import adaptation
from companion.hmc.adaptation import DualAveraging, add_draws, mass_from, warmup, windows
from companion.hmc.nuts import nuts
from companion.hmc.static import hmc
from companion.mcmc import mala
from companion.targets import Funnel, Gaussian, SkewedProduct
from companion.testing import assert_invariant, invariance_test

F64 = {"dtype": torch.float64}
DTYPES = [torch.float32, torch.float64]
SKEW = torch.tensor([[1.0, 0.0], [0.5, 2.0]], **F64)


def exact_accept(step_size: float, d: int, num_steps: int = 1) -> float:
    """Mean acceptance probability of HMC on N(0, I_d) in equilibrium, a closed form.

    By reversibility `E min(1, e^-D) = 2 P(D < 0)` for the energy error D. The leapfrog map S of one
    coordinate and its momentum is linear with determinant 1, so `S^T S` has eigenvalues s and 1/s,
    and `2 D = (s - 1) A - (1 - 1/s) B` with independent chi-square A and B of d degrees of freedom:
    `P(D < 0) = P(A / B < 1 / s)` is a value of Fisher's distribution.
    """
    e = step_size
    step = [[1 - e**2 / 2, e], [-e * (1 - e**2 / 4), 1 - e**2 / 2]]
    matrix = torch.linalg.matrix_power(torch.tensor(step, **F64), num_steps)
    s = float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    return 2.0 * float(scipy.stats.f.cdf(1.0 / s, d, d))


def exact_step(accept: float, d: int) -> float:
    """The step size at which one leapfrog step on N(0, I_d) is accepted that often."""
    return scipy.optimize.brentq(lambda e: exact_accept(e, d) - accept, 1e-3, 2.0)


def unit_gaussian(d: int, dtype=torch.float64, device="cpu") -> Gaussian:
    like = {"dtype": dtype, "device": device}
    return Gaussian(torch.zeros(d, **like), torch.eye(d, **like))


def one_step(log_prob, step_size, mass) -> Kernel:
    return hmc(log_prob, step_size, 1, mass)


def mean_with_error(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over independent chains (first dimension) and its standard error."""
    return x.mean(0), x.std(0) / math.sqrt(len(x))


# ---------------------------------------------------------------- step size


def test_the_closed_form_of_the_acceptance_is_that_of_the_sampler(rng, ledger):
    for d, num_steps, step_size in ((1, 1, 1.2), (3, 1, 1.0), (10, 7, 0.5)):
        target = unit_gaussian(d)
        start = target.sample(40_000, generator=rng(d))
        trace = sample(hmc(target, step_size, num_steps), start, 1, generator=rng(d + 1))
        mean, error = mean_with_error(trace.accept_prob)
        what = f"acceptance of HMC, {num_steps} steps of {step_size}, N(0, I) in {d} dimensions"
        exact = exact_accept(step_size, d, num_steps)
        ledger(what, exact=exact, estimate=mean, std_error=error)
        assert abs(mean - exact_accept(1.1 * step_size, d, num_steps)) > 4.5 * error
    assert exact_accept(1.2, 1) == pytest.approx(4 / math.pi * math.atan(s_of(1.2) ** -0.5))


def s_of(e: float) -> float:
    """The larger root of `s + 1/s = 2 + e^6 / 16`, the trace of `S^T S` of one leapfrog step."""
    trace = 2 + e**6 / 16
    return (trace + math.sqrt(trace**2 - 4)) / 2


def run_dual_averaging(d: int, num_steps: int, sign: float = 1.0) -> float:
    averaging = DualAveraging.start(0.1)
    for _ in range(num_steps):
        step_size = min(math.exp(averaging.log_step), 50.0)
        averaging = averaging.update(sign * (0.8 - exact_accept(step_size, d)))
    return math.exp(averaging.log_average)


def test_dual_averaging_solves_for_a_step_size_that_is_known(monkeypatch):
    for d in (1, 10, 100):
        assert run_dual_averaging(d, 300) == pytest.approx(exact_step(0.8, d), rel=0.02)
    with pytest.raises(RuntimeError, match="the step size fell to"):
        run_dual_averaging(10, 500, sign=-1.0)  # a flipped sign runs away


@pytest.mark.parametrize("power", [-0.75, -0.25])
def test_step_t_counts_with_weight_t_to_the_minus_three_quarters(rng, power):
    averaging, log_steps = DualAveraging.start(0.1), []
    for error in torch.randn(30, generator=rng(0)).tolist():
        averaging = averaging.update(error)
        log_steps.append(averaging.log_step)
    weights = [t**power for t in range(1, 31)]
    # Step t keeps its weight as far as those that follow leave it.
    share = [w * math.prod(1 - v for v in weights[i + 1 :]) for i, w in enumerate(weights)]
    assert sum(share) == pytest.approx(1.0)
    mean = sum(s * log_step for s, log_step in zip(share, log_steps, strict=True))
    assert (averaging.log_average == pytest.approx(mean)) == (power == -0.75)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "make_kernel"), [(2, one_step), (10, mala), (100, mala)])
def test_warmup_reaches_the_target_acceptance(d, make_kernel, dtype, rng, device):
    # With 64 chains the acceptance at the final step size is off by about 0.01.
    target, g = unit_gaussian(d, dtype, device), rng(0, device)
    start = target.sample(64, generator=g)
    for target_accept in (0.6, 0.8):
        tuned = warmup(
            lambda log_prob, step_size, mass: make_kernel(log_prob, step_size, None),
            target,
            start,
            200,
            target_accept=target_accept,
            generator=g,
        )
        assert exact_accept(tuned.step_size, d) == pytest.approx(target_accept, abs=0.05)
        assert tuned.x.dtype == dtype and tuned.x.device.type == device.type


@pytest.mark.parametrize("bug", ["the target is ignored", "the search overshoots"])
def test_a_search_that_misses_its_target_is_noticed(bug, rng, monkeypatch):
    honest = DualAveraging.update
    if bug == "the target is ignored":
        monkeypatch.setattr(DualAveraging, "update", lambda self, error: honest(self, error + 0.2))
    else:  # the constants of the paper, which MALA turns into an oscillation
        monkeypatch.setattr(adaptation, "GAMMA", 0.05)
        monkeypatch.setattr(adaptation, "DELAY", 10.0)
        monkeypatch.setattr(adaptation, "CENTRE", 10.0)
    target, g = unit_gaussian(100), rng(0)
    tuned = warmup(
        lambda p, e, m: mala(p, e),
        target,
        target.sample(64, generator=g),
        200,
        target_accept=0.6,
        generator=g,
    )
    assert abs(exact_accept(tuned.step_size, 100) - 0.6) > 0.1


def test_the_last_steps_tell_what_the_frozen_kernel_accepts(rng, ledger):
    target = unit_gaussian(10)
    start = target.sample(400, generator=rng(0))
    tuned = warmup(lambda p, e, m: mala(p, e), target, start, 250, generator=rng(1))
    assert (tuned.history["step_size"][-25:] == tuned.step_size).all()
    fresh = target.sample(20_000, generator=rng(2))
    mean, error = mean_with_error(sample(tuned.kernel, fresh, 1, generator=rng(3)).accept_prob)
    ledger(
        "acceptance of MALA after warm-up, N(0, I) in 10 dimensions",
        exact=exact_accept(tuned.step_size, 10),
        estimate=mean,
        std_error=error,
    )
    assert tuned.history["accept_prob"][-25:].mean() == pytest.approx(float(mean), abs=0.02)


# ---------------------------------------------------------------- mass


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_agree_with_those_of_all_draws_at_once(dtype, offset, rng, device):
    x = torch.randn(50, 7, 3, dtype=dtype, device=device, generator=rng(0, device)) + offset
    for dense in (False, True):
        moments = None
        with torch.device("meta"):
            for draw in x:
                moments = add_draws(moments, draw, dense)
            mass = mass_from(moments, x, dense)
        covariance = torch.cov(x.reshape(-1, 3).double().T)
        expected = covariance * (350 / 355) + 1e-3 * 5 / 355 * torch.eye(3).to(covariance)
        if dense:
            torch.testing.assert_close(mass.double() @ expected, torch.eye(3).to(expected))
        else:
            torch.testing.assert_close(
                mass.double() * expected.diagonal(), torch.ones(3).to(expected)
            )
        assert mass.dtype == dtype and mass.device.type == device.type


def test_windows_are_those_of_stan_and_fit_short_runs():
    assert windows(1000) == [75, 100, 150, 250, 450, 950]
    assert windows(300) == [45, 70, 120, 250]
    for num_steps in range(40, 1500):
        ends = windows(num_steps)
        assert ends == sorted(set(ends)) and 0 < ends[0] < ends[-1] < num_steps


def recording(make_kernel, seen: list):
    """The same kernels, whose points after each step go to `seen`."""

    def make(log_prob, step_size, mass):
        kernel = make_kernel(log_prob, step_size, mass)

        def step(state, *, generator=None):
            state, info = kernel.step(state, generator=generator)
            seen.append(state.x)
            return state, info

        return Kernel(kernel.init, step)

    return make


def test_the_mass_is_the_inverse_of_the_exact_covariance(rng, ledger):
    covariance = torch.tensor([[4.0, 1.5, 0.0], [1.5, 1.0, 0.0], [0.0, 0.0, 0.01]], **F64)
    target = Gaussian(torch.tensor([5.0, 0.0, -1.0], **F64), covariance)
    start, seen = target.sample(400, generator=rng(0)), []
    make = recording(lambda p, e, m: hmc(p, e, 4, m), seen)
    tuned = warmup(make, target, start, 200, dense=True, generator=rng(1))
    first, last = windows(200 - 20)[-2:]
    draws = torch.stack(seen[first:last], 1)  # the draws of the last window
    n = draws.shape[0] * draws.shape[1]
    estimate = (tuned.mass.inverse() - 1e-3 * 5 / (n + 5) * torch.eye(3, **F64)) * ((n + 5) / n)
    torch.testing.assert_close(estimate, torch.cov(draws.reshape(-1, 3).T))
    centred = draws - target.mean
    of_chain = (centred[..., :, None] * centred[..., None, :]).mean(1)
    _, error = mean_with_error(of_chain)
    for i, j in ((0, 0), (0, 1), (1, 1), (2, 2), (0, 2)):
        ledger(
            f"covariance ({i}, {j}) of the draws of the last window of the warm-up",
            exact=covariance[i, j],
            estimate=estimate[i, j],
            std_error=error[i, j],
        )


def efficiency(kernel: Kernel, target: Gaussian, generator) -> Tensor:
    """`1 - r` of each coordinate, for the correlation r between a draw and the next one."""
    start = target.sample(20_000, generator=generator)
    jump = sample(kernel, start, 1, generator=generator).x[:, 0] - start
    return jump.square().mean(0) / (2 * target.covariance.diagonal())


def test_on_scales_of_1_to_1000_the_mass_gains_what_theory_says(rng):
    """Unit mass: the narrow coordinate alone limits the step. Tuned: both are like N(0, 1)."""
    scales = torch.tensor([1.0, 1000.0], **F64)
    target = Gaussian(torch.zeros(2, **F64), torch.diag(scales**2))
    start = target.sample(100, generator=rng(0))
    tuned = warmup(mala, target, start, 400, generator=rng(1))
    unit = warmup(lambda p, e, m: mala(p, e), target, start, 400, generator=rng(2))
    torch.testing.assert_close(tuned.mass * scales**2, torch.ones(2, **F64), atol=0.15, rtol=0)
    assert tuned.step_size == pytest.approx(exact_step(0.8, 2), rel=0.06)
    assert unit.step_size == pytest.approx(exact_step(0.8, 1), rel=0.06)
    # A gradient a step, so the gain in draws is that in gradients. With unit mass a jump of the
    # wide coordinate is e p whenever accepted, so 1 - r = a e^2 / (2 * 1000^2).
    lazy, quick = (efficiency(t.kernel, target, rng(3)) for t in (unit, tuned))
    e = unit.step_size
    assert lazy[1] == pytest.approx(exact_accept(e, 1) * e**2 / 2e6, rel=0.05)
    # Tuned, both coordinates jump like those of N(0, I_2).
    round_target = unit_gaussian(2)
    e = tuned.step_size
    torch.testing.assert_close(
        quick, efficiency(mala(round_target, e), round_target, rng(4)), rtol=0.12, atol=0
    )
    assert quick[1] / lazy[1] > 4e5


def test_trajectories_of_nuts_shorten_with_the_mass_and_keep_the_acceptance(rng):
    """With unit mass the wide coordinate asks for long trajectories of the narrow one's steps."""
    scales = torch.tensor([1.0, 15.0], **F64)
    target = Gaussian(torch.zeros(2, **F64), torch.diag(scales**2))
    start, fresh = target.sample(30, generator=rng(0)), target.sample(300, generator=rng(1))
    num_steps = []
    for make_kernel in (nuts, lambda p, e, m: nuts(p, e)):
        tuned = warmup(make_kernel, target, start, 60, generator=rng(2))
        trace = sample(tuned.kernel, fresh, 3, generator=rng(3))
        assert trace.accept_prob.mean() == pytest.approx(0.8, abs=0.1)
        num_steps.append(float(trace.stats["num_steps"].double().mean()))
    assert num_steps[0] < 4 < 8 < num_steps[1]


def test_a_mass_that_is_the_covariance_itself_is_noticed(rng, monkeypatch):
    """The classic bug. It leaves the target invariant, so only the speed and the step tell."""
    honest = mass_from
    monkeypatch.setattr(adaptation, "mass_from", lambda *args: honest(*args).reciprocal())
    scales = torch.tensor([1.0, 1000.0], **F64)
    target = Gaussian(torch.zeros(2, **F64), torch.diag(scales**2))
    wrong = warmup(mala, target, target.sample(100, generator=rng(0)), 400, generator=rng(1))
    assert abs(wrong.mass * scales**2 - 1).max() > 0.15
    assert wrong.step_size != pytest.approx(exact_step(0.8, 2), rel=0.06)
    assert efficiency(wrong.kernel, target, rng(3))[1] < 1e-9


# ---------------------------------------------------------------- afterwards


# The density falls as exp(-exp(-s)) on one side, where now and then a trajectory diverges.
MAY_DIVERGE = pytest.mark.filterwarnings("ignore:.*diverged")


@MAY_DIVERGE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [False, True])
def test_the_tuned_kernel_leaves_its_target_invariant(dtype, dense, rng, device):
    target, g = SkewedProduct(SKEW.to(device, dtype)), rng(0, device)
    start = target.sample(50, generator=g)
    make = lambda p, e, m: hmc(p, e, 3, m)  # noqa: E731
    kernel, _ = warmup(make, target, start, 200, dense=dense, generator=g)
    assert_invariant(invariance_test(kernel, target, num_chains=20_000, num_steps=5, generator=g))


def still_adapting(log_prob, step_size: float, mass) -> Kernel:
    """Wrong: each chain shortens its steps where the density is steep, step by step."""

    def step(state, *, generator=None):
        local = step_size / (1.0 + state.grad.abs().amax(-1))
        return hmc(log_prob, local, 3, mass).step(state, generator=generator)

    return Kernel(hmc(log_prob, step_size, 3, mass).init, step)


@MAY_DIVERGE
def test_a_kernel_that_goes_on_adapting_is_rejected(rng):
    target = SkewedProduct(SKEW)
    start = target.sample(50, generator=rng(0))
    tuned = warmup(lambda p, e, m: hmc(p, e, 3, m), target, start, 200, generator=rng(1))
    wrong = still_adapting(target, tuned.step_size, tuned.mass)
    found = invariance_test(wrong, target, num_chains=20_000, num_steps=5, generator=rng(2))
    assert found.p_value < 1e-9


def test_what_is_frozen_stays_frozen(rng):
    target = SkewedProduct(SKEW)
    tuned = warmup(mala, target, target.sample(20, generator=rng(0)), 100, generator=rng(1))
    kernel, x = tuned
    assert kernel is tuned.kernel and x is tuned.x and len(tuned) == 2
    state = kernel.init(x)
    once, _ = kernel.step(state, generator=rng(2))
    sample(kernel, x, 50, generator=rng(3))
    again, _ = kernel.step(state, generator=rng(2))
    same, _ = mala(target, tuned.step_size, tuned.mass).step(state, generator=rng(2))
    assert torch.equal(once.x, again.x) and torch.equal(once.x, same.x)


def test_warmup_reads_no_global_randomness_and_repeats_itself(rng):
    target, before = SkewedProduct(SKEW), torch.get_rng_state()
    start = target.sample(5, generator=rng(0))
    a, b = (warmup(mala, target, start, 50, generator=rng(1)) for _ in range(2))
    assert torch.equal(a.x, b.x) and a.step_size == b.step_size
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- shapes and devices


@pytest.mark.parametrize("dtype", DTYPES)
def test_chains_and_events_may_have_any_shape(dtype, rng, device):
    like = {"dtype": dtype, "device": device}
    cases = [((), (2,)), ((1,), (2,)), ((3, 4), (2, 3)), ((5,), ())]
    for chains, event in cases:
        start = torch.zeros(*chains, *event, **like)

        def log_prob(x, event=event):
            return (
                -0.5 * x.square().sum(tuple(range(x.ndim - len(event), x.ndim)))
                if event
                else (-0.5 * x.square())
            )

        with torch.device("meta"):
            tuned = warmup(mala, log_prob, start, 60, generator=rng(1, device))
        assert tuned.x.shape == start.shape and tuned.mass.shape == event
        assert tuned.mass.dtype == dtype and tuned.x.device.type == device.type
        assert {len(course) for course in tuned.history.values()} == {60}


def test_a_dense_mass_is_estimated_in_float32_where_draws_are_few(rng):
    target = unit_gaussian(20, torch.float32)  # 24 steps of one chain, 20 dimensions
    start = target.sample(1, generator=rng(0))
    tuned = warmup(mala, target, start, 50, dense=True, generator=rng(1))
    assert torch.linalg.eigvalsh(tuned.mass).min() > 0


# ---------------------------------------------------------------- loud failure


def test_bad_arguments_are_refused_with_a_sentence(rng):
    target, start = unit_gaussian(2), torch.zeros(4, 2, **F64)
    bad_start = torch.tensor([[1.0], [-1.0], [2.0]])

    def positive(x: Tensor) -> Tensor:
        return x.log().sum(-1) - x.sum(-1)

    with pytest.raises(
        ValueError, match=r"log-density is not finite .* 1 of 3 chains: nan at chain 1"
    ):
        warmup(mala, positive, bad_start, 100)
    with pytest.raises(ValueError, match="num_steps must be at least 50, got 5"):
        warmup(mala, target, start, 5)
    for accept in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="target_accept must be"):
            warmup(mala, target, start, 100, target_accept=accept)
    with pytest.raises(ValueError, match="x0 has 1 NaN"):
        warmup(mala, target, torch.tensor([[0.0, math.nan]]), 100)
    with pytest.raises(
        ValueError, match=r"a dense mass needs events of one dimension, got \(2, 2\)"
    ):
        warmup(mala, lambda x: -x.square().sum((-1, -2)), torch.zeros(3, 2, 2), 100, dense=True)
    with pytest.raises(TypeError, match="generator must be"):
        warmup(mala, target, start, 100, generator=0)


def test_a_density_that_allows_no_move_fails_loudly(rng):
    def only_here(x: Tensor) -> Tensor:
        return torch.where(x.abs().sum(-1) == 0, 0.0 * x.sum(-1), -math.inf)

    with pytest.raises(RuntimeError, match="the step size fell to .* gradient"):
        warmup(mala, only_here, torch.zeros(4, 2), 100, generator=rng(0))


def test_a_flat_density_fails_loudly(rng):
    with pytest.raises(RuntimeError, match="seems to be flat"):
        warmup(mala, lambda x: 0.0 * x.sum(-1), torch.zeros(4, 2), 100, generator=rng(0))


def test_a_funnel_warns_of_divergences(rng):
    funnel = Funnel(torch.tensor(3.0, **F64), 9)
    start = funnel.sample(50, generator=rng(0))
    with pytest.warns(UserWarning, match=r"\d+ of 1000 trajectories diverged: parts of the target"):
        warmup(lambda p, e, m: hmc(p, e, 10, m), funnel, start, 200, generator=rng(1))


def test_chains_that_are_stuck_are_named(rng):
    """Two chains sit in a spike 1e5 times narrower than the bell where the others are."""

    def log_prob(x: Tensor) -> Tensor:
        bell, spike = -0.5 * x.square(), -0.5 * ((x - 50.0) * 1e5).square()
        return torch.logaddexp(bell, spike).sum(-1)

    start = torch.zeros(50, 1, **F64)
    start[[7, 30]] = 50.0
    with pytest.warns(UserWarning, match=r"2 of 50 chains hardly moved, the first \[7, 30\]"):
        warmup(lambda p, e, m: mala(p, e), log_prob, start, 100, generator=rng(0))


def test_a_good_warmup_says_nothing(rng):
    target = SkewedProduct(SKEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for chains, num_steps in ((1, 50), (1, 100), (4, 50), (100, 100)):
            start = target.sample(chains, generator=rng(chains))
            warmup(mala, target, start, num_steps, generator=rng(num_steps))
