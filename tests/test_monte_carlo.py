"""Every estimate against closed forms; every statistical claim with a mutant that must fail it."""

import math

import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Cauchy, Exponential, Independent, Normal, Uniform

from companion.monte_carlo import (
    Estimate,
    estimate,
    expectation,
    proportion_interval,
    rejection,
    rejection_sampling,
    samples_needed,
)
from tests.calibration import z_score

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison


# ---------------------------------------------------------------- estimate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_and_squared_standard_error_are_unbiased(rng, dtype):
    n, repetitions = 10, 20_000
    x = torch.empty(n, repetitions, dtype=dtype).exponential_(generator=rng(0))
    found = estimate(x)
    squared = found.std_error**2
    assert abs(z_score(found.value, 1.0)) < Z
    assert abs(z_score(squared, 1 / n)) < Z  # an exponential value has variance 1
    # The same check rejects a divisor of n, and a forgotten square root.
    assert abs(z_score(squared * (n - 1) / n, 1 / n)) > Z
    assert abs(z_score(squared**2, 1 / n)) > Z


def test_standard_error_is_calibrated(rng):
    n, repetitions = 500, 200
    found = estimate(
        torch.empty(n, repetitions, dtype=torch.float64).exponential_(generator=rng(1))
    )
    z = (found.value - 1.0) / found.std_error
    low, high = scipy.stats.chi2.interval(1 - 1e-5, repetitions)
    assert low < float(z.square().sum()) < high
    assert abs(float(z.mean())) < Z / math.sqrt(repetitions)
    assert not low < float((z / 2).square().sum()) < high  # error bars twice too long


def test_normal_interval_covers_as_often_as_theory_says(rng):
    n, repetitions, level = 20, 20_000, 0.9
    x = torch.randn(n, repetitions, dtype=torch.float64, generator=rng(2)) * 3.0 + 7.0
    low, high = estimate(x).interval(level)
    # Normal values: (mean - mu) / std_error has Student's law, so the coverage is known exactly,
    # and it is not quite 90 %.
    z = scipy.stats.norm.ppf(0.5 + level / 2)
    exact = 1 - 2 * scipy.stats.t.sf(z, n - 1)

    def p_value(covered: Tensor, coverage: float) -> float:
        return scipy.stats.binomtest(int(covered.sum()), repetitions, coverage).pvalue

    covered = (low < 7.0) & (high > 7.0)
    assert p_value(covered, exact) > 1e-5
    assert p_value(covered, level) < 1e-5  # 20 samples are too few for the normal law
    half = (high - low) / 2 * scipy.stats.norm.ppf(level) / z  # a one-sided quantile by mistake
    assert p_value((x.mean(0) - 7.0).abs() < half, exact) < 1e-5


def test_estimate_of_pi_agrees_with_pi(rng, ledger):
    x = torch.rand(100_000, 2, dtype=torch.float64, generator=rng(3))
    found = estimate(4.0 * (x.square().sum(1) < 1))
    ledger(
        "pi from uniform points in the square",
        exact=math.pi,
        estimate=found.value,
        std_error=found.std_error,
    )
    p = math.pi / 4
    assert found.std_error == pytest.approx(4 * math.sqrt(p * (1 - p) / 100_000), rel=0.01)


def test_no_digits_cancel_when_the_mean_is_huge(rng):
    noise = torch.randn(1000, dtype=torch.float64, generator=rng(4))
    x = 1e8 + noise
    found = estimate(x)
    assert found.std_error.item() == pytest.approx(estimate(noise).std_error.item(), rel=1e-7)
    assert found.value.item() == pytest.approx(1e8 + noise.mean().item(), rel=1e-14)
    naive = x.square().mean() - x.mean().square()  # the textbook formula loses everything
    assert abs(naive - 1) > 0.1
    stored = x.to(torch.float32)  # only multiples of 8 are left; their mean is none of them
    assert estimate(stored).value.item() == pytest.approx(stored.double().mean().item(), rel=1e-15)
    assert estimate(stored).value.dtype == estimate(stored).std_error.dtype == torch.float64


def test_constant_values_have_no_error():
    found = estimate(torch.full((5, 2), 0.1))
    assert found.std_error.tolist() == [0.0, 0.0]
    assert found.value.tolist() == [torch.tensor(0.1).double().item()] * 2


def test_other_dimensions_are_separate_problems(rng):
    x = torch.randn(3, 50, 4, generator=rng(5))
    found = estimate(x, dim=1)
    assert found.value.shape == found.std_error.shape == (3, 4)
    assert found.num_samples == 50
    one = estimate(x[2, :, 3])
    torch.testing.assert_close(found.value[2, 3], one.value)
    torch.testing.assert_close(found.std_error[2, 3], one.std_error)
    torch.testing.assert_close(estimate(x, dim=-2).value, found.value)


def test_indicators_and_integers_count_as_numbers():
    assert estimate(torch.tensor([True, False, False, False])).value == 0.25
    assert estimate(torch.tensor([1, 2])).std_error == 0.5


def test_an_estimate_carries_no_gradient():
    x = torch.arange(4.0, requires_grad=True)
    assert not estimate(x).value.requires_grad
    assert not expectation(lambda y: y * x.sum(), Normal(0.0, 1.0), 10).value.requires_grad


def test_interval_is_symmetric_and_grows_with_the_level():
    found = Estimate(torch.tensor(1.0), torch.tensor(2.0), 10)
    low, high = found.interval(0.6826894921370859)  # one standard error
    assert (float(low), float(high)) == pytest.approx((-1.0, 3.0))
    assert found.interval(0.99)[1] > high


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([1.0]), "at least 2 samples, got 1"),
        (torch.tensor([]), "empty"),
        (torch.tensor(1.0), "no dimension 0"),
        (torch.tensor([1.0, math.nan, math.inf]), r"2 NaN or infinite entries of 3.*\(1,\)"),
    ],
)
def test_estimate_refuses_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        estimate(values)


def test_estimate_refuses_what_is_no_real_tensor():
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        estimate([1.0, 2.0])
    with pytest.raises(TypeError, match="complex"):
        estimate(torch.tensor([1j, 2j]))
    with pytest.raises(ValueError, match="no dimension 2"):
        estimate(torch.ones(3, 3), dim=2)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_levels_outside_0_and_1_are_refused(level):
    with pytest.raises(ValueError, match="level"):
        Estimate(torch.tensor(1.0), torch.tensor(2.0), 10).interval(level)
    with pytest.raises(ValueError, match="level"):
        samples_needed(1.0, 1.0, level)
    with pytest.raises(ValueError, match="level"):
        proportion_interval(1, 2, level)


# ---------------------------------------------------------------- expectation


class Stream:
    """Gives out the rows of a fixed tensor in order, whatever the block size."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        head, self.x = self.x[:n], self.x[n:]
        return head


@pytest.mark.parametrize("block_size", [1, 2, 7, 999, 1000, 10**6])
@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_block_size_changes_only_round_off(rng, block_size, offset):
    x = offset + torch.randn(1000, 3, dtype=torch.float64, generator=rng(6))
    whole = estimate(x)
    found = expectation(lambda y: y, Stream(x), 1000, block_size=block_size)
    assert found.num_samples == 1000
    torch.testing.assert_close(found.value, whole.value, rtol=1e-14, atol=1e-14)
    # A mean of kappa standard deviations costs a stable method kappa * eps, the textbook formula
    # kappa^2 * eps, that is every digit at 1e8.
    torch.testing.assert_close(
        found.std_error, whole.std_error, rtol=1e-15 * max(1e3, offset), atol=0
    )


def test_expectation_agrees_with_the_exact_answer(rng, ledger):
    found = expectation(torch.cos, Normal(0.0, 1.0), 200_000, generator=rng(7))
    exact = math.exp(-0.5)
    ledger(
        "E[cos X] for X standard normal",
        exact=exact,
        estimate=found.value,
        std_error=found.std_error,
    )
    sd = math.sqrt((1 + math.exp(-2)) / 2 - exact**2)
    assert found.std_error == pytest.approx(sd / math.sqrt(200_000), rel=0.02)


def test_expectation_draws_from_its_generator_alone(rng):
    before = torch.get_rng_state()
    first = expectation(torch.exp, Normal(0.0, 1.0), 100, generator=rng(8))
    again = expectation(torch.exp, Normal(0.0, 1.0), 100, generator=rng(8))
    assert torch.equal(first.value, again.value)
    assert torch.equal(before, torch.get_rng_state())


def test_vector_integrands_keep_their_shape(rng):
    normal = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    found = expectation(lambda x: x[:, :, None] * x[:, None, :], normal, 50_000, generator=rng(9))
    assert found.value.shape == (2, 2)
    z = (found.value - torch.eye(2)) / found.std_error
    assert z.abs().max() < Z + 0.3  # Bonferroni over 3 distinct components


def test_expectation_refuses_bad_integrands_and_counts():
    normal = Normal(0.0, 1.0)
    with pytest.raises(ValueError, match=r"for 10 draws it gave shape \(\)"):
        expectation(torch.sum, normal, 10)
    stream = Stream(torch.arange(10.0))
    with pytest.raises(ValueError, match=r"f\(x\) of the block that starts at draw 4 has 4 NaN"):
        expectation(lambda x: torch.where(x > 3, math.nan, x), stream, 10, block_size=4)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        expectation(lambda x: 1.0, normal, 10)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        expectation(torch.cos, normal, 1)
    with pytest.raises(ValueError, match="block_size"):
        expectation(torch.cos, normal, 10, block_size=0)
    with pytest.raises(TypeError, match="num_samples must be an integer"):
        expectation(torch.cos, normal, 1e4)


# ---------------------------------------------------------------- sample sizes and proportions


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("std_dev", "half_width"), [(1.0, 0.1), (1.642, 0.001), (30.0, 2.0)])
def test_samples_needed_is_the_smallest_number_that_suffices(std_dev, half_width, level):
    n = samples_needed(std_dev, half_width, level)

    def half(n: int) -> float:
        low, high = Estimate(torch.tensor(0.0), torch.tensor(std_dev / math.sqrt(n)), n).interval(
            level
        )
        return float(high - low) / 2

    assert half(n) <= half_width * (1 + 1e-6)
    assert half(n - 1) > half_width * (1 - 1e-6)


def test_samples_needed_refuses_nonsense():
    assert samples_needed(1.0, 100.0) == 2  # no standard error with fewer
    with pytest.raises(ValueError, match="std_dev"):
        samples_needed(-1.0, 0.1)
    with pytest.raises(ValueError, match="half_width"):
        samples_needed(1.0, 0.0)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_interval_agrees_with_scipy(level):
    n = 17
    low, high = proportion_interval(torch.arange(n + 1), n, level)
    for k in range(n + 1):
        ci = scipy.stats.binomtest(k, n).proportion_ci(level, method="wilson")
        assert (low[k].item(), high[k].item()) == pytest.approx((ci.low, ci.high), abs=1e-12)
        assert torch.stack(proportion_interval(k, n, level)).tolist() == [low[k], high[k]]
    assert low[0] == 0
    assert high[-1] == 1


def test_wilson_interval_covers_rare_events_where_the_normal_interval_does_not():
    n, p = 100, 0.01
    k = torch.arange(n + 1, dtype=torch.float64)
    weight = torch.as_tensor(scipy.stats.binom.pmf(k.numpy(), n, p))
    low, high = proportion_interval(k, n)
    wilson = float(weight[(low <= p) & (p <= high)].sum())  # exact: a sum over all outcomes
    half = 1.959964 * (k / n * (1 - k / n) / n).sqrt()
    normal = float(weight[(k / n - half <= p) & (p <= k / n + half)].sum())
    assert 0.9 < wilson < 0.99
    assert normal < 0.65


@pytest.mark.parametrize(
    ("successes", "message"),
    [
        (torch.tensor([1.0, 11.0]), "from 0 to num_samples = 10, got 11"),
        (torch.tensor([0.5]), "got 0.5"),
        (torch.tensor([-1]), "got -1"),
        (-1, "at least 0"),
        (11, "got 11"),
        (torch.tensor([math.nan]), "NaN"),
    ],
)
def test_impossible_numbers_of_successes_are_refused(successes, message):
    with pytest.raises(ValueError, match=message):
        proportion_interval(successes, 10)


# ---------------------------------------------------------------- laws that the book states


def test_chebyshev_and_hoeffding_intervals_cover_for_every_probability():
    n, alpha = 50, 0.05
    k = torch.arange(n + 1, dtype=torch.float64)
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)[:, None]
    weight = torch.as_tensor(scipy.stats.binom.pmf(k.numpy(), n, p.numpy()))
    std_error = (p * (1 - p) / n).sqrt()

    def coverage(half: Tensor | float) -> Tensor:
        # Exact: a sum over all outcomes. The slack keeps round-off from deciding ties.
        return (weight * ((k / n - p).abs() <= half + 1e-12)).sum(1)

    chebyshev = std_error / math.sqrt(alpha)
    hoeffding = math.sqrt(math.log(2 / alpha) / (2 * n))
    assert coverage(chebyshev).min() >= 1 - alpha
    assert coverage(hoeffding).min() >= 1 - alpha
    # The central limit theorem promises nothing at n = 50; and Hoeffding needs its factor 2.
    assert coverage(scipy.stats.norm.ppf(1 - alpha / 2) * std_error).min() < 0.93
    assert coverage(hoeffding / math.sqrt(2)).min() < 1 - alpha


def test_logarithm_of_a_mean_is_biased_as_the_delta_method_says(rng, ledger):
    # The mean of n exponential values is Gamma(n, n): the mean of its logarithm is known exactly.
    n, repetitions = 10, 20_000
    x = torch.empty(n, repetitions, dtype=torch.float64).exponential_(generator=rng(40))
    exact = scipy.special.digamma(n) - math.log(n)
    found = estimate(x.mean(0).log())
    ledger(
        "E[log of the mean of 10 exponential values]",
        exact=exact,
        estimate=found.value,
        std_error=found.std_error,
    )
    assert found.value + Z * found.std_error < 0  # Jensen: log E = 0 is higher
    assert abs(z_score(x.log().mean(0), exact)) > Z  # the mean of the logarithms is another thing
    for n in (10, 100, 1000):  # g'' sigma^2 / (2 n) with g'' = -1, and the next term is O(1/n^2)
        bias = scipy.special.digamma(n) - math.log(n)
        assert abs(bias + 1 / (2 * n)) < 0.1 / n**2


def test_standard_error_of_the_delta_method_is_calibrated(rng):
    n, repetitions = 2000, 200
    x = torch.empty(n, repetitions, dtype=torch.float64).exponential_(generator=rng(41))
    found = estimate(x + 1.0)  # mean 2: the slope of the logarithm there, 1/2, matters
    z = (found.value.log() - math.log(2)) / (found.std_error / found.value)
    low, high = scipy.stats.chi2.interval(1 - 1e-5, repetitions)
    assert low < float(z.square().sum()) < high
    assert abs(float(z.mean())) < Z / math.sqrt(repetitions)
    assert not low < float((z / 2).square().sum()) < high  # the slope left out


def test_the_mean_of_cauchy_draws_has_the_law_of_one_draw(rng):
    x = torch.empty(100, 5000, dtype=torch.float64).cauchy_(generator=rng(42))

    def p_value(values: Tensor) -> float:
        return scipy.stats.kstest(values, scipy.stats.cauchy.cdf).pvalue

    assert p_value(x.mean(0)) > 1e-5
    assert p_value(x.mean(0) / 10) < 1e-5  # a mean whose error falls like 1/sqrt(n)
    assert p_value(x.median(0).values) < 1e-5  # the median does settle


def test_without_a_variance_the_error_keeps_the_size_of_the_largest_draw(rng):
    a, repetitions = 0.75, 2000  # U^-a has the mean 4 and no variance
    g = rng(43)
    scaled, roots, covered = [], [], []
    for n in (200, 6400):
        x = (1 - torch.rand(n, repetitions, dtype=torch.float64, generator=g)) ** -a
        largest = x.max(0).values / n**a  # what it adds to the mean, in units of n^(a - 1)
        exact = lambda t, n=n: (1 - t ** (-1 / a) / n).clip(0) ** n  # noqa: E731
        assert scipy.stats.kstest(largest, exact).pvalue > 1e-5
        assert scipy.stats.kstest(2 * largest, exact).pvalue < 1e-5
        found = estimate(x)
        scaled.append(n ** (1 - a) * (found.value - 4.0))
        roots.append(n**0.5 * (found.value - 4.0))
        low, high = found.interval()
        covered.append(int(((low < 4.0) & (high > 4.0)).sum()))
    assert scipy.stats.ks_2samp(*scaled).pvalue > 1e-5
    assert scipy.stats.ks_2samp(*roots).pvalue < 1e-5
    # Thirty-two times the draws do not bring the normal interval anywhere near its 95 %.
    assert scipy.stats.binomtest(covered[1], repetitions, 0.75, alternative="less").pvalue < 1e-5


# ---------------------------------------------------------------- rejection sampling


def half_normal(x: Tensor) -> Tensor:
    return torch.where(x > 0, -0.5 * x.square(), -torch.inf)


def exponential(dtype: torch.dtype = torch.float64, device: str = "cpu") -> Exponential:
    return Exponential(torch.ones((), dtype=dtype, device=device))


HALF_NORMAL_LOG_Z = 0.5 * math.log(math.pi / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rejection_draws_follow_the_target(rng, device, dtype, monkeypatch):
    def p_value() -> float:
        found = rejection_sampling(
            half_normal, exponential(dtype, device), 0.5, 20_000, generator=rng(10, device)
        )
        assert found.x.shape == (20_000,)
        assert (found.x.dtype, found.x.device.type) == (dtype, torch.device(device).type)
        return scipy.stats.kstest(found.x.cpu(), scipy.stats.halfnorm.cdf).pvalue

    assert p_value() > 1e-5
    # Forgetting the proposal's density, and accepting with the square root, must both be noticed.
    correct = rejection._log_accept
    monkeypatch.setattr(rejection, "_log_accept", lambda p, q, m, x: p(x).double())
    assert p_value() < 1e-5
    monkeypatch.setattr(rejection, "_log_accept", lambda *args: correct(*args) / 2)
    assert p_value() < 1e-5


def test_rejection_sampling_measures_the_normaliser(rng, ledger):
    found = rejection_sampling(half_normal, exponential(), 0.5, 20_000, generator=rng(11))
    ledger(
        "log Z of the half-normal density from the acceptance rate",
        exact=HALF_NORMAL_LOG_Z,
        estimate=found.log_z.value,
        std_error=found.log_z.std_error,
    )
    accept = math.exp(HALF_NORMAL_LOG_Z - 0.5)
    assert found.log_z.std_error == pytest.approx(math.sqrt((1 - accept) / 20_000), rel=0.02)
    assert found.accept_rate == 20_000 / found.num_proposals


def below(limit: float):
    return lambda x: torch.where(x < limit, 0.0, -torch.inf)


def uniform() -> Uniform:
    return Uniform(torch.zeros((), dtype=torch.float64), 1.0)


def test_log_z_and_its_variance_are_unbiased_even_for_few_draws(rng):
    generator = rng(12)
    k, accept = 3, 0.25
    runs = [
        rejection_sampling(below(accept), uniform(), 0.0, k, generator=generator)
        for _ in range(1000)
    ]
    log_z = torch.stack([run.log_z.value for run in runs])
    variance = torch.stack([run.log_z.std_error**2 for run in runs])
    proposals = torch.tensor([run.num_proposals for run in runs], dtype=torch.float64)
    assert abs(z_score(proposals, k / accept)) < Z  # negative binomial: no proposal uncounted
    assert abs(z_score(log_z, math.log(accept))) < Z
    assert abs(z_score((log_z - math.log(accept)) ** 2 - variance, 0.0)) < Z
    assert abs(z_score((k / proposals).log(), math.log(accept))) > Z  # the plain logarithm
    assert abs(z_score((log_z - math.log(accept)) ** 2 - variance / 2, 0.0)) > Z


def test_standard_error_of_log_z_is_calibrated(rng):
    generator = rng(13)
    runs = [
        rejection_sampling(below(0.25), uniform(), 0.0, 300, generator=generator).log_z
        for _ in range(200)
    ]
    z = torch.stack([(run.value - math.log(0.25)) / run.std_error for run in runs])
    low, high = scipy.stats.chi2.interval(1 - 1e-5, 200)
    assert low < float(z.square().sum()) < high
    assert abs(float(z.mean())) < Z / math.sqrt(200)


def test_a_loose_bound_costs_proposals_but_not_correctness(rng):
    tight = rejection_sampling(half_normal, exponential(), 0.5, 5000, generator=rng(14))
    loose = rejection_sampling(half_normal, exponential(), 3.0, 5000, generator=rng(14))
    assert loose.num_proposals > 8 * tight.num_proposals
    difference = tight.log_z.value - loose.log_z.value
    error = torch.hypot(tight.log_z.std_error, loose.log_z.std_error)
    assert abs(difference) < Z * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_off_at_an_attained_bound_is_no_violation(rng, dtype):
    q = Normal(torch.tensor(1e3, dtype=dtype), torch.tensor(0.3, dtype=dtype))

    def same(x: Tensor) -> Tensor:  # the proposal's own density, computed another way
        return -0.5 * ((x - 1e3) / 0.3) ** 2

    log_bound = 0.5 * math.log(2 * math.pi) + math.log(0.3)
    found = rejection_sampling(same, q, log_bound, 5000, generator=rng(15))
    assert found.accept_rate > 0.999


def test_a_violated_bound_is_reported_with_its_place(rng):
    with pytest.raises(
        ValueError, match=r"bound does not hold.*exceeds log_bound = 0.4 at x = (0\.99|1\.0)"
    ):
        rejection_sampling(half_normal, exponential(), 0.4, 1000, generator=rng(16))
    with pytest.raises(ValueError, match="bound does not hold"):
        rejection_sampling(lambda x: torch.full_like(x, torch.inf), exponential(), 0.4, 10)


def test_hopeless_acceptance_is_an_error_and_not_an_endless_loop(rng):
    with pytest.raises(ValueError, match=r"only 0 of \d+ proposals were accepted"):
        rejection_sampling(below(0.0), uniform(), 0.0, 10, generator=rng(17))
    with pytest.raises(ValueError, match=r"only \d+ of \d+ proposals were accepted"):
        rejection_sampling(below(0.25), uniform(), 12.0, 10**5, generator=rng(17))


def test_rejection_sampling_refuses_bad_densities(rng):
    with pytest.raises(ValueError, match="log_prob is NaN at 10 draws"):
        rejection_sampling(lambda x: x * math.nan, exponential(), 0.0, 10)
    batch = Cauchy(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"proposal.log_prob .* \(10, 2\), expected \(10,\)"):
        rejection_sampling(lambda x: -x.square().sum(1), batch, 9.0, 10)
    with pytest.raises(ValueError, match="log_bound"):
        rejection_sampling(half_normal, exponential(), math.inf, 10)
    with pytest.raises(ValueError, match="num_samples"):
        rejection_sampling(half_normal, exponential(), 1.0, 0)


def test_rejection_sampling_works_on_events_of_several_dimensions(rng):
    q = Independent(Uniform(-torch.ones(3, dtype=torch.float64), torch.ones(3)), 1)

    def in_ball(x: Tensor) -> Tensor:
        return torch.where(x.square().sum(-1) < 1, 0.0, -torch.inf).to(x)

    found = rejection_sampling(in_ball, q, math.log(8), 5000, generator=rng(18))
    assert found.x.shape == (5000, 3)
    z = (found.log_z.value - math.log(4 * math.pi / 3)) / found.log_z.std_error
    assert abs(z) < Z
    radius = found.x.norm(dim=1)
    assert scipy.stats.kstest(radius**3, "uniform").pvalue > 1e-5


def test_no_tensor_is_made_on_the_default_device(rng):
    generator = rng(19)
    values, q = torch.arange(4.0), exponential()
    with torch.device("meta"):
        assert estimate(values).interval()[0].device.type == "cpu"
        found = expectation(lambda x: x, q, 100, generator=generator, block_size=30)
        assert found.value.device.type == "cpu"
        assert proportion_interval(values.long(), 10)[0].device.type == "cpu"
        assert proportion_interval(3, 10)[0].device.type == "cpu"
        result = rejection_sampling(half_normal, q, 0.5, 100, generator=generator)
        assert result.x.device.type == result.log_z.value.device.type == "cpu"
        assert math.isfinite(result.log_z.std_error)


def test_a_log_density_of_whole_numbers_is_one(rng):
    q = torch.distributions.Uniform(0.0, 1.0)
    found = rejection_sampling(lambda x: torch.zeros(len(x), dtype=torch.int64), q, 0.0, 100)
    assert found.accept_rate == 1.0 and found.x.shape == (100,)
