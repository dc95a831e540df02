"""Variance reduction against closed forms; each error bar beside one that forgets the design."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from companion.monte_carlo import (
    antithetic,
    control_variates,
    estimate,
    quasi_monte_carlo,
    stratified,
)
from tests.calibration import z_score

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
REPETITIONS = 200


def calibrated(z: Tensor, degrees: int | None = None) -> bool:
    """Whether 200 errors, in standard errors, follow the normal law (or Student's, if degrees)."""
    assert len(z) == REPETITIONS
    if degrees is not None:
        z = torch.as_tensor(scipy.stats.norm.ppf(scipy.stats.t.cdf(z.numpy(), degrees)))
    low, high = scipy.stats.chi2.interval(1 - 1e-5, REPETITIONS)
    return low < float(z.square().sum()) < high and abs(float(z.mean())) < Z / REPETITIONS**0.5


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator)


# f(u) = e^u on (0, 1)
EXP_MEAN = math.e - 1
EXP_VARIANCE = (math.e**2 - 1) / 2 - EXP_MEAN**2
EXP_SLOPE = 12 * (1 - EXP_MEAN / 2)  # Cov(e^U, U) / Var U, since E[U e^U] = 1
EXP_LEFT = EXP_VARIANCE - EXP_SLOPE**2 / 12  # variance of the residual: (1 - rho^2) sigma^2


def cell_variances(n: int) -> Tensor:
    """The variance of u^2 in each of n equal parts of (0, 1)."""
    a = torch.arange(n, dtype=torch.float64) / n
    b = a + 1.0 / n
    moment = [(b ** (k + 1) - a ** (k + 1)) / (k + 1) * n for k in range(5)]
    return moment[4] - moment[2] ** 2


# ---------------------------------------------------------------- a project of five tasks
# Tasks 3 and 4 wait for task 1, task 5 for tasks 2 and 3; durations are exponential.

NEEDS: dict[int, set[int]] = {1: set(), 2: set(), 3: {1}, 4: {1}, 5: {2, 3}}


def mean_makespan(rates: dict[int, float], done: frozenset[int] = frozenset()) -> float:
    """The exact mean time to the end: the next task to finish is i with a chance of its rate."""
    running = [i for i in NEEDS if i not in done and NEEDS[i] <= done]
    if not running:
        return 0.0
    total = sum(rates[i] for i in running)
    rest = sum(rates[i] * mean_makespan(rates, done | {i}) for i in running)
    return (1.0 + rest) / total


UNIT_RATES = dict.fromkeys(NEEDS, 1.0)


def durations(u: Tensor, first_rate: float = 1.0) -> Tensor:
    rates = torch.tensor([first_rate, 1.0, 1.0, 1.0, 1.0], dtype=u.dtype, device=u.device)
    return -torch.log1p(-u) / rates


def makespan(x: Tensor) -> Tensor:
    x1, x2, x3, x4, x5 = x.unbind(-1)
    return torch.maximum(x1 + x4, torch.maximum(x2, x1 + x3) + x5)


def gap(x: Tensor) -> Tensor:
    """How much later than task 1 everything but task 4 is done."""
    x1, x2, x3, _, x5 = x.unbind(-1)
    return torch.maximum(x2, x1 + x3) + x5 - x1


def makespan_without_task_4(x: Tensor) -> Tensor:
    """E[makespan | all but task 4]: E[max(X, a)] = a + e^-a for an exponential X."""
    return x[..., 0] + gap(x) + torch.exp(-gap(x))


def test_first_step_analysis_gives_the_mean_makespan(rng, ledger):
    assert mean_makespan(UNIT_RATES) == pytest.approx(83 / 24, abs=1e-14)
    found = estimate(makespan(durations(uniform((200_000, 5), rng(0)))))
    ledger(
        "mean makespan of five tasks, plain Monte Carlo",
        exact=mean_makespan(UNIT_RATES),
        estimate=found.value,
        std_error=found.std_error,
    )


# ---------------------------------------------------------------- control variates


def intercept(f: np.ndarray, c: np.ndarray, mu: np.ndarray) -> tuple[float, float]:
    """The textbook route: regress f on 1 and c - mu; the intercept and its standard error."""
    x = np.column_stack([np.ones(len(f)), c - mu])
    coefficients, (rss,), *_ = np.linalg.lstsq(x, f, rcond=None)
    variance = rss / (len(f) - x.shape[1]) * np.linalg.inv(x.T @ x)[0, 0]
    return coefficients[0], math.sqrt(variance)


@pytest.mark.parametrize("k", [1, 3])
def test_control_variates_are_the_intercept_of_a_regression(rng, k):
    g = rng(1)
    c = torch.randn(30, 2, 3, k, dtype=torch.float64, generator=g)
    f = c.sum(-1) + torch.randn(30, 2, 3, dtype=torch.float64, generator=g)
    mu = torch.randn(2, 3, k, dtype=torch.float64, generator=g) / 10
    found = control_variates(f, c, mu)
    assert found.value.shape == found.std_error.shape == (2, 3)
    assert found.num_samples == 30
    for i, j in itertools.product(range(2), range(3)):
        expected = intercept(f[:, i, j].numpy(), c[:, i, j].numpy(), mu[i, j].numpy())
        assert (found.value[i, j], found.std_error[i, j]) == pytest.approx(expected, rel=1e-10)
    same = control_variates(f[:, 1, 2], c[:, 1, 2], mu[1, 2])
    torch.testing.assert_close(same.value, found.value[1, 2])


def normal_problem(n: int, k: int, repetitions: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """f = 1 + sum of k standard normal controls + a residual of variance 4."""
    c = torch.randn(n, repetitions, k, dtype=torch.float64, generator=g)
    e = torch.randn(n, repetitions, dtype=torch.float64, generator=g)
    return 1.0 + c.sum(-1) + 2.0 * e, c


def test_estimated_coefficients_cost_what_lavenberg_and_welch_say(rng):
    n, k = 12, 3
    f, c = normal_problem(n, k, 20_000, rng(2))
    found = control_variates(f, c, torch.zeros(k, dtype=torch.float64))
    exact = (n - 2) / (n - k - 2) * 4.0 / n
    squares = (found.value - 1.0).square()
    assert abs(z_score(found.value, 1.0)) < Z
    assert abs(z_score(squares, exact)) < Z
    assert abs(z_score(found.std_error**2, exact)) < Z
    assert abs(z_score(squares, 4.0 / n)) > Z  # as if the coefficients were known
    # An error bar that leaves out the slopes' own error, and one that divides by n - 1.
    centred, off = (c - c.mean(0)).movedim(0, 1), c.mean(0)[..., None]
    leverage = (off.mT @ torch.linalg.solve(centred.mT @ centred, off)).flatten()
    assert abs(z_score(found.std_error**2 / (1 + n * leverage), exact)) > Z
    assert abs(z_score(found.std_error**2 * (n - 1 - k) / (n - 1), exact)) > Z


def test_students_interval_of_control_variates_is_exact_for_normal_values(rng):
    n, k, repetitions, level = 8, 3, 20_000, 0.9
    f, c = normal_problem(n, k, repetitions, rng(3))
    found = control_variates(f, c, torch.zeros(k, dtype=torch.float64))
    t = ((found.value - 1.0) / found.std_error).abs()

    def p_value(quantile: float) -> float:
        return scipy.stats.binomtest(int((t < quantile).sum()), repetitions, level).pvalue

    assert p_value(scipy.stats.t.ppf(0.5 + level / 2, n - 1 - k)) > 1e-5
    assert p_value(scipy.stats.t.ppf(0.5 + level / 2, n - 1)) < 1e-5  # the slopes counted as known
    assert p_value(scipy.stats.norm.ppf(0.5 + level / 2)) < 1e-5


def test_optimal_coefficients_leave_one_minus_r_squared_of_the_variance(rng, ledger):
    n, repetitions = 200, 5000
    u = uniform((n, repetitions), rng(4))
    found = control_variates(u.exp(), u[..., None], torch.tensor([0.5]))
    ledger(
        "integral of exp over (0, 1), control variate u",
        exact=EXP_MEAN,
        estimate=found.value[0],
        std_error=found.std_error[0],
    )
    squares = (found.value - EXP_MEAN).square()
    # The loss for estimating the slope is of the order 1/n: normal theory has 1 + 1/197.
    assert abs(z_score(squares, EXP_LEFT / n * (n - 2) / (n - 3))) < Z
    fixed = (u.exp() - (u - 0.5)).mean(0)  # coefficient 1: still unbiased
    assert abs(z_score(fixed, EXP_MEAN)) < Z
    assert abs(z_score((fixed - EXP_MEAN).square(), EXP_LEFT / n)) > Z
    assert abs(z_score((fixed - EXP_MEAN).square(), (EXP_LEFT + (EXP_SLOPE - 1) ** 2 / 12) / n)) < Z


def test_standard_error_of_control_variates_is_calibrated(rng):
    # Not linear in the controls, nor normal; by symmetry the bias is below the order 1/n.
    n, g = 400, rng(5)
    c = torch.randn(n, REPETITIONS, 2, dtype=torch.float64, generator=g)
    noise = -torch.log1p(-uniform((n, REPETITIONS), g))  # exponential, with mean 1
    f = c[..., 0] ** 3 + c[..., 0] * c[..., 1] + 3.0 * c[..., 1] + noise
    found = control_variates(f, c, torch.zeros(2))
    z = (found.value - 1.0) / found.std_error
    assert calibrated(z, n - 3)
    assert not calibrated(z / 2, n - 3)
    # The sample's own mean for the known one: the plain average, with the regression's error bar.
    assert not calibrated((f.mean(0) - 1.0) / found.std_error, n - 3)


def test_bias_of_control_variates_is_of_order_one_over_n(rng):
    # f = U^2, c = U: the residual is V^2 - 1/12 with V = U - 1/2, and E[V^4] - 1/144 = 1/180.
    n, repetitions = 40, 40_000
    u = uniform((n, repetitions), rng(6))
    found = estimate(
        -15 * n * (control_variates(u**2, u[..., None], torch.tensor([0.5])).value - 1 / 3)
    )
    tolerance = Z * found.std_error + 4 / n  # the next order, which is 2.7 / n
    assert abs(found.value - 1.0) < tolerance
    assert abs(found.value) > tolerance  # no bias
    assert abs(found.value + 1.0) > tolerance  # the opposite sign


def test_controls_that_explain_everything_leave_no_error(rng):
    c = uniform((50, 3), rng(7))
    found = control_variates(2.0 + c @ torch.tensor([1.0, -3.0, 0.5]).double(), c, torch.ones(3))
    assert found.value.item() == pytest.approx(0.5, abs=1e-12)
    assert found.std_error.item() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_controls_far_from_zero_lose_no_digits(rng, dtype):
    f, c = normal_problem(100, 2, 1, rng(8))
    c = (c + 1000.0).to(dtype)
    found = control_variates(f[:, 0], c[:, 0], torch.tensor([1000.0, 1000.0]))
    same = intercept(f[:, 0].numpy(), c[:, 0].double().numpy() - 1000.0, np.zeros(2))
    assert (found.value, found.std_error) == pytest.approx(same, rel=1e-9)
    assert found.value.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_controls_that_tell_nothing_new_are_named(rng, dtype):
    a, b = torch.rand(2, 20, 4, dtype=dtype, generator=rng(9))
    f, half = torch.rand(20, 4, generator=rng(10)), torch.full((3,), 0.5)
    singular = torch.stack([a, b, 0.3 * a - 0.7 * b], -1)
    with pytest.raises(ValueError, match=r"control 2 in problem \(0,\) is a linear combination"):
        control_variates(f, singular, half)
    one = torch.stack([a, b, a * b], -1)
    one[:, 3, 1] = 0.1
    with pytest.raises(ValueError, match=r"control 1 in problem \(3,\) is constant"):
        control_variates(f, one, half)
    with pytest.raises(ValueError, match="control 0 is constant"):
        control_variates(f[:, 0], torch.zeros(20, 1, dtype=dtype), torch.zeros(1))


@pytest.mark.parametrize(
    ("values", "controls", "means", "message"),
    [
        (torch.rand(9), torch.rand(9), torch.ones(1), r"controls\[\.\.\., None\]"),
        (torch.rand(9), torch.rand(8, 1), torch.ones(1), r"one more dimension.*got \(8, 1\)"),
        (torch.tensor(1.0), torch.rand(1), torch.ones(1), "one more dimension"),
        (torch.rand(9), torch.rand(9, 2), torch.ones(1), r"means must be \(2,\)"),
        (
            torch.rand(9, 3),
            torch.rand(9, 3, 2),
            torch.ones(3),
            r"\(2,\) or \(3, 2\), .* got \(3,\)",
        ),
        (torch.rand(3), torch.rand(3, 2), torch.ones(2), "2 controls need at least 4 draws, got 3"),
        (torch.full((9,), math.nan), torch.rand(9, 1), torch.ones(1), "values has 9 NaN"),
        (torch.rand(9), torch.rand(9, 1), torch.tensor([math.inf]), "means has 1 NaN or inf"),
    ],
)
def test_control_variates_refuse_bad_input(values, controls, means, message):
    with pytest.raises(ValueError, match=message):
        control_variates(values, controls, means)


def test_control_variates_refuse_what_is_no_real_tensor():
    with pytest.raises(TypeError, match=r"means must be a torch\.Tensor"):
        control_variates(torch.rand(9), torch.rand(9, 1), 0.5)
    with pytest.raises(TypeError, match="controls: complex"):
        control_variates(torch.rand(9), torch.rand(9, 1) + 1j, torch.ones(1))


# ---------------------------------------------------------------- antithetic pairs
# An integrand that acts on each coordinate by itself makes `dim` independent problems of one.


def test_antithetic_pairs_have_the_variance_of_their_means(rng, ledger):
    pairs, repetitions = 10, 20_000
    found = antithetic(torch.exp, repetitions, pairs, generator=rng(20))
    assert found.num_samples == pairs
    ledger(
        "integral of exp over (0, 1), ten antithetic pairs",
        exact=EXP_MEAN,
        estimate=found.value[0],
        std_error=found.std_error[0],
    )
    covariance = math.e - EXP_MEAN**2  # e^U e^(1 - U) is e
    exact = (EXP_VARIANCE + covariance) / 2 / pairs
    assert abs(z_score(found.value, EXP_MEAN)) < Z
    assert abs(z_score((found.value - EXP_MEAN).square(), exact)) < Z
    assert abs(z_score(found.std_error**2, exact)) < Z
    # As if the points of a pair were independent; as if the pairs were single points.
    assert abs(z_score(found.std_error**2, EXP_VARIANCE / (2 * pairs))) > Z
    assert abs(z_score(found.std_error**2 / 2, exact)) > Z


def test_an_even_integrand_makes_antithetic_pairs_twice_as_bad(rng):
    points, repetitions = 20, 20_000
    even = lambda u: (u - 0.5).square()  # noqa: E731
    found = antithetic(even, repetitions, points // 2, generator=rng(21))
    plain = estimate(even(uniform((points, repetitions), rng(22))))
    variance = 1 / 180
    assert abs(z_score((plain.value - 1 / 12).square(), variance / points)) < Z
    assert abs(z_score((found.value - 1 / 12).square(), 2 * variance / points)) < Z
    assert abs(z_score(found.std_error**2, 2 * variance / points)) < Z
    assert abs(z_score(found.std_error**2, variance / points)) > Z


def test_standard_error_of_antithetic_pairs_is_calibrated(rng):
    values = []

    def even(u: Tensor) -> Tensor:
        values.append((u - 0.5).square())
        return values[-1]

    found = antithetic(even, REPETITIONS, 300, generator=rng(23))
    z = (found.value - 1 / 12) / found.std_error
    assert calibrated(z, 299)
    naive = estimate(torch.cat(values))  # the two halves as if they were independent
    torch.testing.assert_close(naive.value, found.value)
    assert not calibrated((naive.value - 1 / 12) / naive.std_error, 599)


def random_monotone(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """A random function on a grid, increasing in each coordinate but for nothing else special."""
    f = uniform(shape, g) ** 8
    for dim in range(len(shape)):
        f = f.cumsum(dim)
    return f


@pytest.mark.parametrize("shape", [(9,), (5, 5), (3, 3, 3)])
def test_monotone_functions_are_correlated_as_chebyshev_says(rng, shape):
    g = rng(24)
    dims = tuple(range(len(shape)))

    def covariance(f: Tensor, h: Tensor) -> float:  # exact: over all points of the grid
        return float((f * h).mean() - f.mean() * h.mean())

    broken = 0
    for _ in range(300):
        f, h = random_monotone(shape, g), random_monotone(shape, g)
        assert covariance(f, h) >= 0  # common random numbers help
        assert covariance(f, f.flip(dims)) <= 0  # antithetic pairs help
        shuffled = f.flatten()[torch.randperm(f.numel(), generator=g)].reshape(shape)
        broken += covariance(shuffled, shuffled.flip(dims)) > 0
    assert broken > 50  # without the order there is no such law


def test_reflected_normal_draws_integrate_odd_functions_exactly(rng):
    found = antithetic(torch.special.ndtri, 2, 1000, generator=rng(25))
    assert found.value.abs().max() < 1e-12
    assert found.std_error.max() < 1e-12


# ---------------------------------------------------------------- strata


def test_each_stratum_gets_its_share_of_points():
    seen = []

    def f(u: Tensor) -> Tensor:
        seen.append(u)
        return u.sum(1)

    found = stratified(f, 3, 4, 5)
    u = torch.cat(seen)
    assert u.shape == (4**3 * 5, 3)
    assert found.num_samples == len(u)
    assert ((u > 0) & (u < 1)).all()
    cells = ((u * 4).long() * torch.tensor([16, 4, 1])).sum(1)
    assert torch.bincount(cells, minlength=64).tolist() == [5] * 64


def test_strata_leave_the_variance_within_them(rng, ledger):
    m, r, repetitions = 4, 3, 3000
    g = rng(30)
    runs = [stratified(lambda u: u[:, 0] ** 2, 1, m, r, generator=g) for _ in range(repetitions)]
    value = torch.stack([run.value for run in runs])
    squared = torch.stack([run.std_error**2 for run in runs])
    ledger(
        "integral of u^2 over (0, 1), three points in each of four strata",
        exact=1 / 3,
        estimate=runs[0].value,
        std_error=runs[0].std_error,
    )
    within = float(cell_variances(m).mean())
    exact = within / (m * r)
    assert abs(z_score(value, 1 / 3)) < Z
    assert abs(z_score((value - 1 / 3).square(), exact)) < Z
    assert abs(z_score(squared, exact)) < Z
    total = 4 / 45  # the variance of u^2; what is missing within is between the strata
    a = torch.arange(m + 1, dtype=torch.float64) / m
    means = (a[1:] ** 3 - a[:-1] ** 3) / 3 * m
    assert within + float(means.var(correction=0)) == pytest.approx(total, rel=1e-12)
    assert abs(z_score(squared, total / (m * r))) > Z  # s^2 / n over all points
    assert abs(z_score(squared * (r - 1) / r, exact)) > Z  # divisor r


def test_standard_error_of_strata_is_calibrated(rng):
    g, z, naive = rng(31), [], []

    def f(u: Tensor) -> Tensor:
        values.append(-torch.log1p(-u).sum(1))  # two exponential durations
        return values[-1]

    for _ in range(REPETITIONS):
        values: list[Tensor] = []
        found = stratified(f, 2, 8, 4, generator=g)
        z.append((found.value - 2.0) / found.std_error)
        naive.append((found.value - 2.0) / estimate(values[0]).std_error)
    assert calibrated(torch.stack(z), 8 * 8 * 3)
    assert not calibrated(torch.stack(naive))


def test_neymans_allocation_beats_every_other(rng):
    weight = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    n = 60
    shares = [(i, j, n - i - j) for i in range(1, n) for j in range(1, n - i)]
    variance = (weight * sigma).square() / torch.tensor(shares, dtype=torch.float64)
    best = variance.sum(1).min()
    bound = (weight * sigma).sum() ** 2 / n
    proportional = (weight * sigma**2).sum() / n
    assert bound <= best < 1.01 * bound  # but for whole numbers
    optimal = shares[int(variance.sum(1).argmin())]
    assert optimal == pytest.approx((n * weight * sigma / (weight * sigma).sum()).tolist(), abs=1)
    assert bound < 0.6 * proportional
    # Measured, with uniform values of these spreads, against both closed forms.
    g, means = rng(32), []
    for share, w, s in zip(optimal, weight, sigma, strict=True):
        spread = s * math.sqrt(12)
        means.append(w * spread * (uniform((share, 20_000), g) - 0.5).mean(0))
    squares = sum(means).square()
    assert abs(z_score(squares, float(best))) < Z
    assert abs(z_score(squares, float(proportional))) > Z


# ---------------------------------------------------------------- quasi-Monte Carlo


def points_of(n: int, dim: int, g: torch.Generator, engine: str = "sobol") -> list[Tensor]:
    seen = []

    def f(u: Tensor) -> Tensor:
        seen.append(u)
        return u.sum(1)

    quasi_monte_carlo(f, dim, n, engine=engine, num_replicates=3, generator=g)
    return seen


def is_net(u: Tensor) -> bool:
    """Whether each box of area 1/n with sides 2^-i, 2^-j holds one of the n points in the plane."""
    m = int(math.log2(len(u)))
    for i in range(m + 1):
        boxes = (u * torch.tensor([2**i, 2 ** (m - i)], dtype=u.dtype)).long()
        if len((boxes[:, 0] * 2 ** (m - i) + boxes[:, 1]).unique()) < 2**m:
            return False
    return True


def test_scrambled_sobol_points_are_nets_until_one_is_dropped(rng):
    sets = points_of(64, 2, rng(40))
    assert len(sets) == 3
    for u in sets:
        assert ((u > 0) & (u < 1)).all()
        assert is_net(u)
    assert not torch.equal(sets[0], sets[1])
    assert not is_net(torch.cat([sets[0][1:], sets[1][:1]]))  # first point dropped, another one in
    assert not is_net(uniform((64, 2), rng(41)))


@pytest.mark.parametrize("engine", ["sobol", "halton"])
def test_each_scrambled_point_is_uniform(rng, engine):
    first = torch.stack(
        [u for s in range(100) for u in points_of(8, 1, rng(1000 + s), engine)]
    )  # (300, 8, 1)
    for i in range(8):
        assert scipy.stats.kstest(first[:, i, 0], "uniform").pvalue > 1e-5
    van_der_corput = torch.tensor([0, 4, 2, 6, 1, 5, 3, 7]) / 8  # what scrambling starts from
    assert scipy.stats.kstest(van_der_corput.repeat(300)[::8], "uniform").pvalue < 1e-5


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_scrambled_net_on_the_line_has_the_variance_of_one_point_a_stratum(rng, n):
    problems = 3000  # coordinates are scrambled independently
    found = quasi_monte_carlo(torch.square, problems, n, num_replicates=2, generator=rng(42 + n))
    exact = float(cell_variances(n).mean()) / n / 2
    assert abs(z_score(found.value, 1 / 3)) < Z
    assert abs(z_score((found.value - 1 / 3).square(), exact)) < Z
    assert abs(z_score(found.std_error**2, exact)) < Z
    if n > 1:
        assert abs(z_score(found.std_error**2, 4 / 45 / n / 2)) > Z  # independent points
        assert abs(z_score(found.std_error**2, exact * n)) > Z  # a common shift of all points


@pytest.mark.parametrize("engine", ["sobol", "halton"])
def test_standard_error_of_replicated_nets_is_calibrated(rng, engine):
    g, replicates = rng(43), 10
    z, naive = [], []

    def f(u: Tensor) -> Tensor:
        values.append(u.amax(1))  # a kink; the mean is d / (d + 1)
        return values[-1]

    for _ in range(REPETITIONS):
        values: list[Tensor] = []
        found = quasi_monte_carlo(f, 3, 32, engine=engine, num_replicates=replicates, generator=g)
        assert found.num_samples == replicates
        z.append((found.value - 0.75) / found.std_error)
        one = estimate(values[0])  # one net, its points as if they were independent
        naive.append((one.value - 0.75) / one.std_error)
    assert calibrated(torch.stack(z), replicates - 1)
    assert not calibrated(torch.stack(naive))
    assert not calibrated(torch.stack(z) * replicates**0.5, replicates - 1)  # s, not s / sqrt(R)


def test_quasi_monte_carlo_beats_plain_monte_carlo_on_the_project(rng, ledger):
    for engine in ("sobol", "halton"):
        found = quasi_monte_carlo(
            lambda u: makespan_without_task_4(durations(u)),
            5,
            1024,
            engine=engine,
            generator=rng(44),
        )
        ledger(
            f"mean makespan of five tasks, sixteen scrambled {engine} sets",
            exact=83 / 24,
            estimate=found.value,
            std_error=found.std_error,
        )
        plain = estimate(makespan(durations(uniform((16 * 1024, 5), rng(45)))))
        assert found.std_error < plain.std_error / 5


def test_quasi_monte_carlo_draws_from_its_generator_alone(rng):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for engine in ("sobol", "halton"):
        run = lambda s, e=engine: quasi_monte_carlo(torch.exp, 2, 8, engine=e, generator=rng(s))  # noqa: E731
        assert torch.equal(run(46).value, run(46).value)
        assert not torch.equal(run(46).value, run(47).value)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_points": 1000}, "power of two for Sobol' points, got 1000; take 512 or 1024"),
        ({"num_points": 0}, "num_points must be at least 1"),
        ({"engine": "lattice"}, "engine must be one of sobol, halton; got 'lattice'"),
        ({"num_replicates": 1}, "num_replicates must be at least 2"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"f": lambda u: u.sum()}, r"for 8 draws it gave shape \(\)"),
        ({"f": lambda u: u[:, 0] * math.nan}, r"f\(u\) has 8 NaN"),
    ],
)
def test_quasi_monte_carlo_refuses_bad_input(options, message):
    arguments = {"f": torch.exp, "dim": 2, "num_points": 8} | options
    with pytest.raises(ValueError, match=message):
        quasi_monte_carlo(**arguments)


def test_halton_points_come_in_any_number(rng):
    found = quasi_monte_carlo(lambda u: u.sum(1), 3, 1000, engine="halton", generator=rng(48))
    assert abs(found.value - 1.5) < Z * found.std_error


# ---------------------------------------------------------------- laws that the book states


def test_conditioning_removes_the_conditional_variance(rng, ledger):
    x = durations(uniform((100_000, 5), rng(50)))
    f, g, a = makespan(x), makespan_without_task_4(x), gap(x)
    found = estimate(g)
    ledger(
        "mean makespan of five tasks, one task integrated out",
        exact=83 / 24,
        estimate=found.value,
        std_error=found.std_error,
    )
    # For an exponential X: E[max(X, a)^2] = a^2 + 2 e^-a (1 + a).
    removed = a**2 + 2 * torch.exp(-a) * (1 + a) - (a + torch.exp(-a)) ** 2
    assert removed.min() > 0
    assert abs(z_score(f**2 - g**2 - removed, 0.0)) < Z  # Var f = Var g + E[Var(f | ...)]
    assert abs(z_score(f**2 - g**2, 0.0)) > Z
    assert abs(z_score(x[:, 0] + a - torch.exp(-a), 83 / 24)) > Z  # a sign error


def test_common_random_numbers_make_a_difference_precise(rng, ledger):
    exact = mean_makespan(UNIT_RATES | {1: 1.25}) - mean_makespan(UNIT_RATES)
    u, v = uniform((2, 50_000, 5), rng(51))
    common = makespan(durations(u, 1.25)) - makespan(durations(u))
    separate = makespan(durations(u, 1.25)) - makespan(durations(v))
    against = makespan(durations(u, 1.25)) - makespan(durations(1.0 - u))
    found = estimate(common)
    ledger(
        "what a faster first task saves, common random numbers",
        exact=exact,
        estimate=found.value,
        std_error=found.std_error,
    )
    assert abs(z_score(separate, exact)) < Z
    assert abs(z_score(against, exact)) < Z
    assert common.var() < separate.var() / 20
    assert against.var() > 1.2 * separate.var()  # the same numbers, used the other way round


# ---------------------------------------------------------------- what all of them share

SAMPLERS = {
    "antithetic": lambda f, g: antithetic(f, 2, 50, generator=g),
    "stratified": lambda f, g: stratified(f, 2, 5, generator=g),
    "sobol": lambda f, g: quasi_monte_carlo(f, 2, 32, generator=g),
    "halton": lambda f, g: quasi_monte_carlo(f, 2, 32, engine="halton", generator=g),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_keep_their_shape_and_results_are_float64(rng, device, name, dtype):
    def f(u: Tensor) -> Tensor:
        assert (u.dtype, u.device.type) == (torch.float64, device.type)
        u = u.to(dtype).requires_grad_()
        return torch.stack([u, u**2, u.exp()], -1)  # (m, 2, 3)

    found = SAMPLERS[name](f, rng(60, device))
    assert found.value.shape == found.std_error.shape == (2, 3)
    assert found.value.dtype == found.std_error.dtype == torch.float64
    assert found.value.device.type == device.type
    assert not found.value.requires_grad
    exact = torch.tensor([0.5, 1 / 3, EXP_MEAN], dtype=torch.float64, device=device)
    torch.testing.assert_close(found.value, exact.expand(2, 3), atol=0.1, rtol=0)  # the right order


@pytest.mark.parametrize("name", SAMPLERS)
def test_points_stay_inside_the_open_cube(name, monkeypatch):
    # The generator's extreme numbers, which no test would ever draw.
    for extreme in (0.0, 1.0 - 2.0**-53):
        monkeypatch.setattr(
            "companion.monte_carlo.variance_reduction._uniform",
            lambda shape, g, x=extreme: torch.full(shape, x, dtype=torch.float64),
        )
        found = SAMPLERS[name](torch.special.ndtri, None)  # raises on infinities
        assert found.value.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_generator_must_be_one(name):
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator"):
        SAMPLERS[name](torch.exp, 0)


def test_counts_are_checked_before_any_work():
    def never(u: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match="num_pairs must be at least 2"):
        antithetic(never, 1, 1)
    with pytest.raises(TypeError, match="dim must be an integer"):
        antithetic(never, 1.0, 10)
    with pytest.raises(ValueError, match="per_stratum must be at least 2"):
        stratified(never, 1, 10, 1)
    with pytest.raises(ValueError, match=r"10\^30 strata of 2 points are too many"):
        stratified(never, 30, 10)
    with pytest.raises(ValueError, match=r"for 50 draws it gave shape \(\)"):
        antithetic(torch.sum, 1, 50)
    factors = iter([1.0, math.nan])
    with pytest.raises(ValueError, match=r"f\(1 - u\) has 50 NaN"):
        antithetic(lambda u: u * next(factors), 1, 50)


def test_no_tensor_is_made_on_the_default_device(rng):
    g = rng(61)
    c = uniform((20, 3, 2), g)
    f, mu = c.sum(-1) ** 2, torch.full((2,), 0.5)
    with torch.device("meta"):
        found = [sampler(torch.exp, g) for sampler in SAMPLERS.values()]
        found.append(control_variates(f, c, mu))
    for estimated in found:
        assert estimated.value.device.type == estimated.std_error.device.type == "cpu"
        assert estimated.std_error.isfinite().all()
