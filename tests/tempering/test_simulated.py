"""Simulated tempering: its joint law to round-off, what its weights learn, and log Z."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Independent, Normal, Uniform

from companion.core import Kernel
from companion.mcmc import GibbsState, random_walk
from companion.tempering import GeometricPath, simulated
from companion.tempering.simulated import SimulatedTempering, level_step, simulated_tempering
from companion.testing import stationary_error, transition_matrix
from tests.calibration import is_calibrated
from tests.mcmc.exact_targets import plant
from tests.tempering.exact_paths import F64, ExactGaussians, Ring

BASE, TARGET = [0.3, -0.2, 0.1, 0.0], [0.0, -1.5, 1.0, 0.4]
WEIGHTS = torch.tensor([0.0, 0.7, -0.4], dtype=F64)  # not minus log Z, of anything


def gaussians(**kwargs):
    return ExactGaussians([0.0, 1.0], [3.0, 2.0], [2.0, 0.0], [1.0, 0.5], **kwargs)


def chi_square(counts, expected):
    from scipy.stats import chisquare

    return float(chisquare(counts.cpu().numpy(), expected.cpu().numpy()).pvalue)


# ---------------------------------------------------------------- the joint law


def joint_error(betas):
    """How far an iteration moves the joint law of point and level, exactly, by all its outcomes.

    The state is `K x + k`; the run begins by drawing k given x, which leaves the law as it is.
    """
    path, num_levels = Ring(BASE[:3], TARGET[:3]), len(betas)
    w = WEIGHTS[:num_levels]

    def step(state, *, generator=None):
        x, n = state.x // num_levels, len(state.x)
        run = simulated.simulated_tempering(
            path, betas, 1, warmup=0, num_chains=n, log_weights=w, x0=x
        )
        return GibbsState(run.x[:, 0] * num_levels + run.level[:, 0]), None

    matrix = transition_matrix(Kernel(GibbsState, step), torch.arange(3 * num_levels))
    joint = (w + path.table(torch.tensor(betas, dtype=F64)).T).flatten().softmax(0)
    return stationary_error(matrix, joint)


@pytest.mark.parametrize("betas", [[0.2, 0.6, 1.0], [0.0, 1.0]])
def test_the_joint_law_of_point_and_level_is_invariant(betas):
    assert joint_error(betas) < 1e-12


MUTANTS = {
    "weights of the wrong sign": ("level_step", "(density + expand", "(density - expand"),
    "weights forgotten": ("level_step", "(log_weights, density)", "(0.0 * log_weights, density)"),
    "level drawn without the densities": (
        "level_step",
        "(density + expand",
        "(0 * density + expand",
    ),
    "likeliest level taken": ("level_step", "uniform >=", "torch.full_like(prob[0], 0.5) >="),
    "moved at the target's beta": ("simulated_tempering", "levels[level]", "levels[-1]"),
    "moved at the next level's beta": (
        "simulated_tempering",
        "levels[level]",
        "levels[(level + 1) % num_levels]",
    ),
    "everyone redrawn from the base": ("simulated_tempering", "level == 0, x)", "level >= 0, x)"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_moves_and_weights_do_not_leave_it(mutant, monkeypatch):
    name, old, new = MUTANTS[mutant]
    plant(monkeypatch, getattr(simulated, name), old, new)
    betas = [0.0, 1.0] if "base" in mutant else [0.3, 1.0]
    assert joint_error(betas) > 1e-3


def exact_starts(path, betas, weights, n, generator):
    """Points of the joint law's marginal, and the shares of the levels."""
    betas = torch.tensor(betas, dtype=F64, device=path.device)
    shares = (weights.to(betas) + path.log_z(betas)).softmax(0)
    level = torch.multinomial(shares, n, True, generator=generator)
    return path.sample(n, betas[level], generator=generator), shares


def law_p_value(path, betas, device, generator):
    """Of the levels' shares and, within each, of the standardised points, after five iterations."""
    from scipy.stats import kstest

    n = 10_000
    x0, shares = exact_starts(path, betas, WEIGHTS, n, generator)
    run = simulated.simulated_tempering(
        path, betas, 5, warmup=0, num_chains=n, log_weights=WEIGHTS, x0=x0, generator=generator
    )
    level, x = run.level[:, -1], run.x[:, -1]
    p_values = [chi_square(level.bincount(minlength=3), n * shares)]
    mean, sd = path.moments(torch.tensor(betas, dtype=F64, device=device))
    for k in range(3):
        z = (x[level == k].double() - mean[k]) / sd[k]
        p_values += [kstest(column.cpu().numpy(), "norm").pvalue for column in z.T]
    return min(1.0, len(p_values) * min(p_values))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("betas", [[0.1, 0.4, 1.0], [0.0, 0.3, 1.0]])
def test_exact_starts_stay_exact(rng, device, dtype, betas):
    path = gaussians(rho=0.7, dtype=dtype, device=device)
    assert law_p_value(path, betas, device, rng(0, device)) > 1e-5


@pytest.mark.parametrize("mutant", ["weights forgotten", "moved at the target's beta"])
def test_wrong_moves_and_weights_are_found_from_exact_starts(rng, device, mutant, monkeypatch):
    name, old, new = MUTANTS[mutant]
    plant(monkeypatch, getattr(simulated, name), old, new)
    path = gaussians(rho=0.7, device=device)
    assert law_p_value(path, [0.1, 0.4, 1.0], device, rng(0, device)) < 1e-7


# ---------------------------------------------------------------- weights and shares


def test_levels_have_equal_shares_with_minus_log_z_and_not_without(rng, ledger):
    path, betas = gaussians(rho=0.5), torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=F64)
    ideal = -path.log_z(betas)
    run = simulated_tempering(
        path, betas, 100, warmup=50, num_chains=500, log_weights=ideal, generator=rng(0)
    )
    at = (run.level[..., None] == torch.arange(4)).double().mean(1)
    std_error = at.std(0) / math.sqrt(len(at))
    for k in range(4):
        ledger(
            f"share of level {k} of simulated tempering with weights -log Z",
            exact=0.25,
            estimate=at[:, k].mean(),
            std_error=std_error[k],
        )
    # Conditioned on the points the shares vary less.
    assert ((run.occupancy - 0.25).abs() < 4.5 * std_error).all()
    run = simulated_tempering(
        path, betas, 100, warmup=50, num_chains=500, log_weights=0 * ideal, generator=rng(0)
    )
    assert (run.occupancy - path.log_z(betas).softmax(0)).abs().max() < 0.02
    assert (run.occupancy - 0.25).abs().max() > 0.1


def learned_covariance(path, betas, warmup, num_chains):
    """Of the learned weights (less the first) around minus log Z, to leading order in the gain.

    The weights follow `e <- (1 - g / K) e - g xi`, with xi the deviation of the mean of `P(k | x)`
    from 1 / K. Its long-run covariance is exact: it is a function on a Markov chain of few states.
    """
    betas = torch.tensor(betas, dtype=F64)
    num_levels, m = len(betas), len(path.base)
    table = path.table(betas)  # (levels, states)
    prob = (table - path.log_z(betas)[:, None]).softmax(0)  # P(k | x) with the ideal weights
    moves = torch.zeros(num_levels, m, m, dtype=F64)
    for k, beta in enumerate(betas.tolist()):
        p = path.law(beta)
        forward = torch.diag(p.min() / p)
        stay = torch.eye(m, dtype=F64)
        moves[k] = stay - forward + forward.roll(1, 1)
    chain = torch.einsum("kxy,jy->kxjy", moves, prob)  # (k, x) -> (j, y)
    chain = chain.reshape(num_levels * m, num_levels * m)
    pi = path.law(betas).flatten() / num_levels
    g = prob.T.repeat(num_levels, 1) - 1.0 / num_levels  # of state (k, x)
    fundamental = torch.linalg.inv(torch.eye(len(pi), dtype=F64) - chain + pi)
    weighted = pi[:, None] * g
    cross = weighted.T @ fundamental @ g
    long_run = cross + cross.T - weighted.T @ g
    contrast = torch.eye(num_levels, dtype=F64)[1:] - torch.eye(num_levels, dtype=F64)[:1]
    v = num_levels**2 / num_chains * contrast @ long_run @ contrast.T
    first = (warmup // 2) ** 0.8
    second = warmup - warmup // 2
    return v * (second + 0.5 * first) / (second + first) ** 2


def squared_errors(rng, path, betas, warmup, num_chains, repetitions):
    """Of the learned weights, in units of their covariance; chi-square with K - 1 degrees each."""
    ideal = -(path.log_z(torch.tensor(betas, dtype=F64)) - path.log_z(betas[0]))[1:]
    inverse = learned_covariance(path, betas, warmup, num_chains).inverse()
    total = 0.0
    for seed in range(repetitions):
        run = simulated.simulated_tempering(
            path, betas, 1, warmup=warmup, num_chains=num_chains, generator=rng(seed)
        )
        error = run.log_weights[1:] - ideal
        total += float(error @ inverse @ error)
    return total


def chi_square_interval(dof, false_alarm=1e-5):
    from scipy.stats import chi2

    return chi2.ppf(false_alarm / 2, dof), chi2.ppf(1 - false_alarm / 2, dof)


def test_learned_weights_are_minus_log_z_with_the_error_of_theory(rng, monkeypatch):
    setting = (Ring(BASE, TARGET), [0.1, 0.5, 1.0], 200, 100)
    low, high = chi_square_interval(10 * 2)
    assert low < squared_errors(rng, *setting, 10) < high
    # Negative controls: a gain that does not fall, and weights that move the wrong way.
    monkeypatch.setattr(simulated, "_gain", lambda t, half, num_levels: 0.5)
    assert squared_errors(rng, *setting, 2) > chi_square_interval(2 * 2)[1]
    monkeypatch.undo()
    plant(monkeypatch, simulated_tempering, "w = w - _gain(", "w = w + _gain(")
    assert squared_errors(rng, *setting, 2) > chi_square_interval(2 * 2)[1]


def test_a_first_guess_along_the_ladder_comes_near_where_z_changes_much(rng, monkeypatch):
    """By a factor of e^125 here, which small corrections from zero would not reach in time."""
    d = 60
    path = ExactGaussians(torch.zeros(d), 8.0 * torch.ones(d), torch.zeros(d), torch.ones(d))
    betas = torch.cat([torch.zeros(1), torch.logspace(-2.5, 0, 24)]).double()
    assert path.log_z(0.0) - path.log_z(1.0) > 120

    def largest_error():
        run = simulated_tempering(path, betas, 1, warmup=100, num_chains=50, generator=rng(0))
        return float((run.log_weights - path.log_z(0.0) + path.log_z(betas)).abs().max())

    assert largest_error() < 5.0
    monkeypatch.setattr(simulated, "_first_guess", lambda *args: torch.zeros(25, dtype=F64))
    assert largest_error() > 50.0


# ---------------------------------------------------------------- expectations and log Z


def test_expectations_at_beta_1_agree_with_enumeration(rng, ledger):
    path = Ring(BASE, TARGET)
    betas = [0.0, 0.3, 0.6, 1.0]
    run = simulated_tempering(
        path, betas, 100, warmup=100, num_chains=200, thin=2, generator=rng(0)
    )
    p = path.law(1.0)
    share = run.expectation(lambda x: x[..., None] == torch.arange(4))
    assert share.value.shape == (4,)
    for state in range(4):
        ledger(
            f"probability of state {state} of a ring by simulated tempering",
            exact=p[state],
            estimate=share.value[state],
            std_error=share.std_error[state],
        )
    # The draws at beta = 1 say the same with more noise, and those of all levels something else.
    draws = run.target_draws()
    assert len(draws) == (run.level == 3).sum()
    at_target = (run.level == 3)[..., None]
    hits = ((run.x[..., None] == torch.arange(4)) & at_target).double().sum(1)
    value = hits.sum(0) / at_target.sum()
    torch.testing.assert_close(draws.bincount() / len(draws), value.float(), atol=1e-6, rtol=0)
    influence = (hits - value * at_target.double().sum(1)) / at_target.double().sum(1).mean(0)
    std_error = influence.std(0) / math.sqrt(200)
    assert ((value - p).abs() < 4.7 * std_error).all()
    assert (std_error > share.std_error).all()
    everything = (run.x[..., None] == torch.arange(4)).double().mean((0, 1))
    assert ((everything - p).abs() > 4.7 * std_error).any()


def z_scores(rng, repetitions):
    """Of log Z by short runs from exact starts, with weights that are off."""
    path, betas, n = gaussians(rho=0.5), [0.0, 0.15, 0.4, 1.0], 200
    weights = torch.tensor([0.0, 0.3, 0.0, -0.5], dtype=F64)
    weights = weights - path.log_z(torch.tensor(betas, dtype=F64)) + path.log_z(0.0)
    z = []
    for seed in range(repetitions):
        g = rng(seed)
        run = simulated.simulated_tempering(
            path, betas, 15, warmup=0, num_chains=n, log_weights=weights,
            x0=exact_starts(path, betas, weights, n, g)[0], generator=g,
        )  # fmt: skip
        z.append((run.log_z.value - path.log_z(1.0)) / run.log_z.std_error)
    return torch.stack(z)


def test_log_z_is_unbiased_and_its_standard_error_calibrated(rng, monkeypatch):
    z = z_scores(rng, 100)
    low, high = chi_square_interval(100)
    assert low < float(z.square().sum()) < high
    assert abs(float(z.mean())) < 4.5 / math.sqrt(100)
    # Negative controls: iterations taken for independent draws; the weights' sign.
    plant(
        monkeypatch,
        simulated_tempering,
        "_std_error(relative[1] - relative[0])",
        "_std_error(relative[1] - relative[0]) / math.sqrt(num_steps)",
    )
    assert float(z_scores(rng, 10).square().sum()) > chi_square_interval(10)[1]
    plant(monkeypatch, simulated_tempering, "- w[-1] +", "+ w[-1] +", where=simulated)
    assert abs(float(z_scores(rng, 5).mean())) > 10


def test_log_z_with_learned_weights_agrees_with_the_exact_one(rng, ledger):
    path, betas = gaussians(rho=0.5), [0.0, 0.05, 0.15, 0.4, 1.0]
    run = simulated_tempering(path, betas, 100, warmup=100, num_chains=200, generator=rng(0))
    ledger(
        "log Z of a normal law by simulated tempering",
        exact=path.log_z(1.0),
        estimate=run.log_z.value,
        std_error=run.log_z.std_error,
    )
    assert run.log_z.converged and run.log_z.std_error < 0.05
    # Without the base it is relative to the first level.
    run = simulated_tempering(path, betas[1:], 100, warmup=100, num_chains=200, generator=rng(1))
    ledger(
        "ratio of two Z by simulated tempering",
        exact=path.log_z(1.0) - path.log_z(betas[1]),
        estimate=run.log_z.value,
        std_error=run.log_z.std_error,
    )


def test_round_trips_come_at_the_rate_of_the_level_chain(rng, ledger):
    """With exact draws the level alone is a Markov chain: from its transition matrix the mean time
    up and down, whose inverse is the rate."""
    path = ExactGaussians([0.0], [4.0], [0.0], [1.0])
    betas = torch.tensor([0.0, 0.1, 0.35, 1.0], dtype=F64)
    x = torch.linspace(-40.0, 40.0, 20_001, dtype=F64)[:, None]
    density = path.log_prob(x, betas[:, None]) - path.log_z(betas)[:, None]
    prob = density.softmax(0)
    matrix = density.exp() @ prob.T * (x[1, 0] - x[0, 0])  # E_j[P(k | x)]
    torch.testing.assert_close(matrix.sum(1), torch.ones(4, dtype=F64))

    def hitting_time(start, end):
        others = [k for k in range(4) if k != end]
        inside = torch.eye(3, dtype=F64) - matrix[others][:, others]
        return torch.linalg.solve(inside, torch.ones(3, dtype=F64))[others.index(start)]

    run = simulated_tempering(
        path, betas, 200, warmup=100, num_chains=1000, log_weights=-path.log_z(betas),
        generator=rng(0),
    )  # fmt: skip
    rate = run.round_trips.double() / 200
    ledger(
        "round trips an iteration of simulated tempering with exact draws",
        exact=1.0 / (hitting_time(0, 3) + hitting_time(3, 0)),
        estimate=rate.mean(),
        std_error=rate.std() / math.sqrt(1000),
    )
    moved = 1.0 - matrix.diagonal().mean()
    std_error = run.trace.accept_prob.std() / math.sqrt(1000)
    assert abs(run.trace.accept_prob.mean() - moved) < 4.5 * std_error


def test_two_far_peaks_get_their_masses(rng, ledger):
    """Peaks of masses 0.9 and 0.1 at a distance of 20 standard deviations, all starts in one."""
    log_mass = torch.tensor([0.9, 0.1], dtype=F64).log()

    def log_prob(x):
        return torch.logaddexp(
            log_mass[0] - 0.5 * (x + 10.0).square(), log_mass[1] - 0.5 * (x - 10.0).square()
        )

    base = Normal(torch.tensor(0.0, dtype=F64), 10.0)
    path = GeometricPath(
        base, log_prob, lambda density, beta: random_walk(density, 8.0 - 7.0 * beta)
    )
    x0 = torch.full((200,), -10.0, dtype=F64)
    betas = torch.linspace(0.0, 1.0, 6, dtype=F64).square()
    run = simulated_tempering(path, betas, 300, warmup=200, num_chains=200, x0=x0, generator=rng(0))
    mass = run.expectation(lambda x: x > 0.0)
    ledger(
        "mass of the lighter of two far peaks by simulated tempering",
        exact=0.1,
        estimate=mass.value,
        std_error=mass.std_error,
    )
    assert run.round_trips.double().mean() > 1


# ---------------------------------------------------------------- what a run is


def test_what_a_run_keeps(rng):
    path = gaussians(dtype=torch.float32)
    run = simulated_tempering(path, [0.0, 0.4, 1.0], 7, warmup=4, num_chains=5, generator=rng(0))
    assert run.x.shape == (5, 7, 2) and run.x.dtype == torch.float32
    assert run.level.shape == run.level_prob.shape == run.trace.log_prob.shape == (5, 7)
    assert run.trace.log_prob.dtype == torch.float32 and run.level_prob.dtype == F64
    torch.testing.assert_close(run.trace.log_prob, path.log_prob(run.x, 1.0))
    table = torch.stack([path.log_prob(run.x, beta).double() for beta in (0.0, 0.4, 1.0)], -1)
    prob = (table + run.log_weights).softmax(-1)
    torch.testing.assert_close(run.level_prob, prob[..., 2])
    torch.testing.assert_close(run.occupancy, prob.mean((0, 1)))
    assert run.log_weights[0] == 0.0
    assert run.trace.stats.keys() == {"level", "level_prob"}


def test_a_single_chain_has_no_standard_error(rng):
    run = simulated_tempering(gaussians(), [0.0, 0.4, 1.0], 50, warmup=50, generator=rng(0))
    assert run.x.shape == (1, 50, 2)
    assert run.log_z.std_error.isnan() and run.log_z.value.isfinite()
    estimate = run.expectation(lambda x: x)
    assert estimate.std_error.isnan().all() and estimate.value.isfinite().all()


def test_chains_that_never_come_round_say_so(rng):
    path = ExactGaussians([0.0], [1.0], [50.0], [1.0])  # two levels without overlap
    run = simulated_tempering(path, [0.0, 1.0], 10, warmup=0, num_chains=5, generator=rng(0))
    assert not run.log_z.converged


def test_one_seed_one_result_whatever_the_default_device(rng):
    path = gaussians(rho=0.5)

    def draws(seed):
        return simulated_tempering(
            path, [0.0, 0.4, 1.0], 10, warmup=10, num_chains=4, generator=rng(seed)
        ).x

    first = draws(1)
    with torch.device("meta"):
        assert torch.equal(first, draws(1))
        fixed = simulated_tempering(
            path, [0.1, 1.0], 3, warmup=1, num_chains=4, log_weights=[0.0, 1.0], generator=rng(0)
        )
        assert fixed.expectation(lambda x: x).value.device.type == "cpu"
        assert fixed.target_draws().device.type == "cpu"
    assert not torch.equal(first, draws(2))
    assert fixed.log_weights.tolist() == [0.0, 1.0]


def test_densities_that_are_zero_or_nan(rng):
    box = Independent(Uniform(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)), 1)

    def half(x):  # nothing below a half
        return torch.where((x[..., 0] > 0.5) & (x[..., 0] < 1.0), 0.0, -torch.inf)

    path = GeometricPath(box, half, lambda density: random_walk(density, 0.3))
    run = simulated_tempering(path, [0.0, 1.0], 50, warmup=50, num_chains=50, generator=rng(0))
    assert (run.target_draws() > 0.5).all() and (run.x < 0.5).any()
    assert abs(run.log_z.value - math.log(0.5)) < 4.5 * run.log_z.std_error
    dead = torch.full((3, 1), 7.0, dtype=F64)
    with pytest.raises(ValueError, match="3 of 3 chains are at points where no level"):
        simulated_tempering(path, [0.5, 1.0], 1, warmup=0, num_chains=3, x0=dead, generator=rng(0))

    def broken(x):
        return torch.where(x[..., 0] > 0.5, 0.0, torch.nan)

    path = GeometricPath(box, broken, lambda density: random_walk(density, 0.3))
    with pytest.raises(ValueError, match="not finite at the start"):  # the first guess rises there
        simulated_tempering(path, [0.0, 1.0], 1, warmup=0, num_chains=50, generator=rng(0))
    with pytest.warns(UserWarning, match="a log-density was NaN"):
        run = simulated_tempering(
            path, [0.0, 1.0], 50, warmup=50, num_chains=50, log_weights=[0.0, 0.0], generator=rng(0)
        )
    assert (run.target_draws() > 0.5).all() and run.trace.num_nan.sum() > 0


def test_a_level_of_probability_zero_is_never_drawn():
    density = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0], [-torch.inf, torch.nan]]).double()
    for u in (0.0, 0.3, 1.0 - 2.0**-53):
        level, prob = level_step(density, torch.zeros(3, dtype=F64), torch.full((2,), u, dtype=F64))
        assert level.tolist() == [0, 1]
        assert prob.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


def test_bad_input_is_explained(rng):
    path = gaussians()

    def run(betas=(0.0, 1.0), num_draws=2, **kwargs):
        kwargs = {"warmup": 0, "num_chains": 3, "generator": rng(0)} | kwargs
        return simulated_tempering(path, betas, num_draws, **kwargs)

    for kwargs, message in [
        ({"betas": [1.0]}, "at least two levels"),
        ({"betas": [0.5, 0.2, 1.0]}, "must ascend"),
        ({"num_draws": 0}, "num_draws"),
        ({"warmup": -1}, "warmup"),
        ({"thin": 0}, "thin"),
        ({"num_chains": 0}, "num_chains"),
        ({"log_weights": torch.zeros(3)}, r"log_weights must be \(2,\)"),
        ({"log_weights": torch.tensor([0.0, math.nan])}, "log_weights has 1 NaN"),
        ({"x0": torch.zeros(2, 2, dtype=F64)}, r"x0 must be \(chains, \*event\), \(3, 2\)"),
        ({"x0": torch.full((3, 2), math.nan, dtype=F64)}, "x0 has 6 NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(**kwargs)
    with pytest.raises(TypeError, match=r"x0 must be torch.float64"):
        run(x0=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="f must give one or several numbers a draw"):
        run().expectation(lambda x: x.sum())
    with pytest.raises(ValueError, match="f\\(x\\) at draws of positive weight"):
        run().expectation(lambda x: x * math.nan)


@pytest.mark.parametrize(
    "mutant",
    [
        None,
        ("weights * (y - value)", "weights * y"),
        ("_std_error(influence)", "2.0 * _std_error(influence)"),
        ("_std_error(influence)", "0.5 * _std_error(influence)"),
    ],
)
def test_standard_errors_of_expectations_are_calibrated(rng, monkeypatch, mutant):
    """200 runs of 200 chains each, as one batch: the weights are given, so chains are apart."""
    path, betas = gaussians(rho=0.5), [0.0, 0.4, 1.0]
    w = -path.log_z(torch.tensor(betas, dtype=F64))
    whole = simulated_tempering(
        path, betas, 6, warmup=10, num_chains=40_000, log_weights=w, generator=rng(6)
    )
    expectation, home = SimulatedTempering.expectation, SimpleNamespace(expectation=None)
    if mutant:
        plant(monkeypatch, expectation, *mutant, where=home)
        expectation = home.expectation
    exact = float(path.moments(torch.tensor(1.0))[0][0]) + 5.0
    z = []
    for i in range(200):
        part = slice(200 * i, 200 * (i + 1))
        trace = replace(
            whole.trace,
            x=whole.x[part],
            stats={name: value[part] for name, value in whole.trace.stats.items()},
        )
        found = expectation(replace(whole, trace=trace), lambda x: x[..., 0] + 5.0)
        z.append((found.value - exact) / found.std_error)
    assert is_calibrated(torch.stack(z)) == (mutant is None)
