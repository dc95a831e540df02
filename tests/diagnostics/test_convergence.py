"""R-hat, effective sample sizes and errors against chains of known autocorrelation."""

import math

import numpy as np
import pytest
import torch
from arviz_stats.base.array import array_stats
from scipy import signal, stats

from companion.diagnostics import (
    autocorrelation,
    ess_bulk,
    ess_tail,
    integrated_autocorrelation_time,
    mcse_mean,
    mcse_quantile,
    mcse_sd,
    rhat,
)

REPEATS = 200


def ar1(rho, num_draws, generator, num_chains=4, num_repeats=REPEATS):
    """Stationary chains `x_t = rho x_{t-1} + sqrt(1 - rho^2) e_t`: N(0, 1), autocorrelation rho^t.

    The repeats are coordinates, `(num_chains, num_draws, num_repeats)`.
    """
    shape = (num_chains, num_draws, num_repeats)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    noise[:, 1:] *= math.sqrt(1.0 - rho**2)
    return torch.from_numpy(signal.lfilter([1.0], [1.0, -rho], noise.numpy(), axis=1))


def variance_of_mean(rho, num_draws):
    """Exact, of one chain: `(1 + 2 sum_t (1 - t / n) rho^t) / n`."""
    t = np.arange(1, num_draws)
    return (1.0 + 2.0 * ((1.0 - t / num_draws) * rho**t).sum()) / num_draws


def spread_is_calibrated(z):
    """Whether the squares of 200 z-scores have the sum that those of N(0, 1) have.

    The interval is that of 1e-6; the errors that z is measured by are estimates, so that false
    alarms are more frequent than that (the sum's spread is up to a tenth larger), but below 1e-5.
    The means of z are not tested here: sd and quantiles of finite samples are biased.
    """
    low, high = stats.chi2.ppf([5e-7, 1.0 - 5e-7], len(z))
    return bool(low < z.square().sum() < high)


# ---------------------------------------------------------------- autocorrelation


def autocorrelation_by_definition(x, max_lag):
    y = x - x.mean(1, keepdim=True)
    n = x.shape[1]
    lags = [(y[:, : n - t] * y[:, t:]).sum(1) for t in range(max_lag + 1)]
    return torch.stack([lag / lags[0] for lag in lags], 1)


@pytest.mark.parametrize("num_draws", [4, 7, 64, 65])
def test_autocorrelation_is_its_definition(rng, device, num_draws):
    x = torch.randn(
        3, num_draws, 2, 2, dtype=torch.float64, device=device, generator=rng(0, device)
    )
    x = x.cumsum(1)
    result = autocorrelation(x)
    assert result.shape == (3, num_draws, 2, 2)
    torch.testing.assert_close(result, autocorrelation_by_definition(x, num_draws - 1))
    torch.testing.assert_close(autocorrelation(x, 2), result[:, :3])
    assert (result[:, 0] == 1.0).all()


def test_autocorrelation_of_an_alternating_chain_is_exact(ledger):
    """A transform without padding would wrap round, and give 1 instead of 1 - t / n."""
    x = (-1.0) ** torch.arange(100.0, dtype=torch.float64)[None]
    result = autocorrelation(x, 30)[0]
    ledger("autocorrelation at lag 29 of (-1)^i, 100 draws", exact=-0.71, estimate=result[29])
    ledger("autocorrelation at lag 30 of (-1)^i, 100 draws", exact=0.70, estimate=result[30])


def test_autocorrelation_of_an_autoregressive_chain(rng, ledger):
    """Its bias, (1 + 4 rho) / n at lag 1, is 2 % of the error of one chain."""
    each = autocorrelation(ar1(0.9, 100_000, rng(0), num_chains=50, num_repeats=1)[..., 0], 20)
    for lag in (1, 5, 20):
        ledger(
            f"autocorrelation of an autoregressive chain, rho = 0.9, at lag {lag}",
            exact=0.9**lag,
            estimate=each[:, lag].mean(),
            std_error=each[:, lag].std() / math.sqrt(50),
        )


def test_a_constant_chain_has_no_autocorrelation_and_the_others_do(rng):
    x = torch.randn(3, 50, generator=rng(0))
    x[1] = 0.1
    with pytest.warns(UserWarning, match="the first is chain 1"):
        result = autocorrelation(x, 5)
    assert result.isnan().all(1).tolist() == [False, True, False]
    assert torch.equal(result[[0, 2]], autocorrelation(x[[0, 2]], 5))


def test_lags_that_the_draws_do_not_reach_are_refused():
    with pytest.raises(ValueError, match="max_lag must be below the number of draws, 10; got 10"):
        autocorrelation(torch.zeros(2, 10), 10)
    with pytest.raises(ValueError, match="max_lag must be at least 0"):
        autocorrelation(torch.zeros(2, 10), -1)


# ---------------------------------------------------------------- effective sample size


@pytest.mark.parametrize("rho", [0.9, 0.5, -0.5])
def test_autocorrelation_time_of_an_autoregressive_chain(rng, ledger, rho):
    """`(1 + rho) / (1 - rho)`. The error of one estimate is its spread over 99 others.

    Where the sum over the lags ends depends on the draws, which biases the estimate by about 1 %,
    upwards for positive rho: a tenth to a quarter of its error.
    """
    tau = integrated_autocorrelation_time(ar1(rho, 8000, rng(0), num_repeats=100))
    exact = (1.0 + rho) / (1.0 - rho)
    ledger(
        f"autocorrelation time of an autoregressive chain, rho = {rho}",
        exact=exact,
        estimate=tau[0],
        std_error=tau[1:].std(),
    )
    forgot_the_two = 1.0 + (tau[0] - 1.0) / 2.0
    assert abs(forgot_the_two - exact) > 4.5 * tau[1:].std()


@pytest.mark.parametrize("rho", [0.9, 0.5, -0.5])
def test_squared_error_of_the_mean_is_its_exact_variance(rng, ledger, rho):
    squared = mcse_mean(ar1(rho, 5000, rng(1), num_repeats=100)).square()
    exact = variance_of_mean(rho, 5000) / 4
    ledger(
        f"squared MCSE of the mean of 4 autoregressive chains, rho = {rho}, 5,000 draws each",
        exact=exact,
        estimate=squared[0],
        std_error=squared[1:].std(),
    )
    as_if_independent = 1.0 / 20_000
    assert abs(as_if_independent - exact) > 4.5 * squared[1:].std()


def test_independent_draws_are_all_effective(rng):
    x = ar1(0.0, 2000, rng(2), num_repeats=20)
    for ess in (ess_bulk(x), ess_tail(x), 8000 / integrated_autocorrelation_time(x)):
        assert 0.9 < ess.mean() / 8000 < 1.05
        assert 0.6 < ess.min() / 8000 < ess.max() / 8000 < 1.5


def test_antithetic_chains_have_more_effective_draws_than_draws(rng):
    """Up to a limit: `n log10(n)`, which chains with rho = -0.9 reach (19 n is the truth)."""
    ess = ess_bulk(ar1(-0.5, 2000, rng(3), num_repeats=20))
    assert 2.5 < ess.mean() / 8000 < 3.5
    limit = 8000 * math.log10(8000)
    torch.testing.assert_close(
        ess_bulk(ar1(-0.9, 2000, rng(3), num_repeats=2)),
        torch.full((2,), limit, dtype=torch.float64),
    )


def test_chains_that_disagree_have_few_effective_draws(rng):
    x = ar1(0.0, 1000, rng(4), num_repeats=1)
    x[2] += 5.0
    assert ess_bulk(x) < 10
    assert ess_bulk(x[:2]) > 1500


def test_tails_of_discrete_draws_count_where_there_are_any(rng):
    """ArviZ counts every draw of an indicator that is constant."""
    u = torch.rand(4, 1000, generator=rng(5))
    half, rarely_one = (u < 0.5).long(), (u < 0.02).long()
    assert 3000 < ess_tail(half) < 5000
    assert 3000 < ess_tail(rarely_one) < 5000
    with pytest.warns(UserWarning, match="are the largest draw in 1 of 1 coordinates"):
        assert ess_tail(1 - rarely_one).isnan()
    assert mcse_quantile(1 - rarely_one, 0.5).isnan()


# ---------------------------------------------------------------- errors


def mean_z(x):
    return x.mean((0, 1)) / mcse_mean(x)


def sd_z(x):
    return (x.std((0, 1)) - 1.0) / mcse_sd(x)


def quantile_z(x, prob):
    value = torch.from_numpy(np.quantile(x.flatten(0, 1).numpy(), prob, axis=0))
    return (value - stats.norm.ppf(prob)) / mcse_quantile(x, prob)


@pytest.mark.parametrize("rho", [0.5, -0.5])
def test_errors_of_mean_sd_and_quantiles_are_calibrated(rng, rho):
    x = ar1(rho, 2500, rng(6))
    of_mean = mean_z(x)
    assert spread_is_calibrated(of_mean)
    assert abs(of_mean.mean()) < 4.5 / math.sqrt(REPEATS)
    assert spread_is_calibrated(sd_z(x))
    assert spread_is_calibrated(quantile_z(x, 0.5))
    assert spread_is_calibrated(quantile_z(x, 0.75))

    as_if_independent = x.mean((0, 1)) / (x.std((0, 1)) / 100.0)
    assert not spread_is_calibrated(as_if_independent)


def test_an_error_of_the_sd_by_the_effective_size_of_the_draws_is_far_off(rng):
    """What arviz-stats 0.8 does: the squares of antithetic draws are not antithetic."""
    x = ar1(-0.5, 2500, rng(6))
    fourth, second = x.pow(4).mean((0, 1)), x.square().mean((0, 1))
    ess = 10_000 / integrated_autocorrelation_time(x)
    wrong = ((fourth - second**2) / ess).sqrt() / (2.0 * second.sqrt())
    assert not spread_is_calibrated((x.std((0, 1)) - 1.0) / wrong)


def test_quantiles_of_impossible_levels_are_refused():
    for prob in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(ValueError, match="prob must be a finite number above 0.0 and below 1"):
            mcse_quantile(torch.zeros(2, 10), prob)


# ---------------------------------------------------------------- R-hat


def plain_rhat(half_chains):
    """Of `(m, n)` numbers, by its definition."""
    n = half_chains.shape[1]
    within = half_chains.var(1).mean()
    between = n * half_chains.mean(1).var()
    return ((within * (n - 1) / n + between / n) / within).sqrt()


def rhat_by_definition(x):
    """Of `(chains, draws)`: the larger one of the normal scores' and the folded draws' scores'."""

    def scores(y):
        ranks = torch.from_numpy(stats.rankdata(y.numpy()).reshape(y.shape))
        return torch.from_numpy(stats.norm.ppf((ranks - 0.375) / (y.numel() + 0.25)))

    half = x.shape[1] // 2
    split = torch.cat([x[:, :half], x[:, -half:]])
    folded = (split - split.quantile(0.5)).abs()
    return torch.maximum(plain_rhat(scores(split)), plain_rhat(scores(folded)))


@pytest.mark.parametrize("num_draws", [100, 101])
def test_rhat_is_its_definition(rng, ledger, num_draws):
    x = ar1(0.7, num_draws, rng(7), num_repeats=3)
    x[1, :, 1] += 1.0  # another mean
    x[1, :, 2] *= 3.0  # another spread
    for i, kind in enumerate(["alike", "one mean shifted by 1", "one spread three times as large"]):
        ledger(
            f"R-hat of 4 chains of {num_draws} draws, {kind}",
            exact=rhat_by_definition(x[..., i]),
            estimate=rhat(x)[i],
        )


def test_rhat_of_separated_chains_has_its_limit(rng):
    """Scores above and below 0: means -+sqrt(2 / pi), variance 1 - 2 / pi in each half-chain."""
    x = ar1(0.0, 20_000, rng(8), num_chains=2, num_repeats=1)
    x[1] += 100.0
    limit = math.sqrt(1.0 + 4.0 / 3.0 * (2.0 / math.pi) / (1.0 - 2.0 / math.pi))
    assert float(rhat(x)) == pytest.approx(limit, abs=1e-3)


def test_only_folding_sees_another_spread(rng):
    x = ar1(0.0, 1000, rng(9), num_repeats=1)[..., 0]
    x[3] *= 3.0
    assert rhat(x) > 1.1
    assert array_stats.rhat(x.numpy(), method="z_scale") < 1.01
    assert rhat(x[:3]) < 1.01


def test_only_splitting_sees_a_common_trend(rng):
    x = ar1(0.0, 1000, rng(10), num_repeats=1)[..., 0] + torch.linspace(-1, 1, 1000)
    assert rhat(x) > 1.1
    assert array_stats.rhat(x.numpy(), method="identity") < 1.01


def test_only_ranks_see_another_location_without_a_mean(rng):
    x = ar1(0.0, 1000, rng(11), num_repeats=1)[..., 0]
    x = torch.tan(math.pi * (torch.special.ndtr(x) - 0.5))  # Cauchy
    x[3] += 5.0
    assert rhat(x) > 1.1
    assert array_stats.rhat(x.numpy(), method="split") < 1.05


def test_rhat_of_one_chain_compares_its_halves_and_says_so(ledger):
    """The ramp 0, 1, ..., 199: variance within a half 100 * 101 / 12, means 100 apart."""
    with pytest.warns(UserWarning, match="one chain: R-hat compares its two halves only") as caught:
        value = rhat(torch.arange(200.0, dtype=torch.float64)[None])
    assert caught[0].filename == __file__
    ledger(
        "split R-hat of one chain, the ramp of 200 draws",
        exact=math.sqrt(0.99 + 600.0 / 101.0),
        estimate=value,
    )


def test_rhat_of_chains_stuck_at_different_places_is_infinite():
    assert rhat(torch.arange(4.0)[:, None].expand(4, 100)) == math.inf


# ---------------------------------------------------------------- ArviZ


def test_the_estimates_agree_with_those_of_arviz(rng):
    """Every coordinate with its own, whatever their order in memory."""
    rho = torch.tensor([[0.0, 0.5, 0.9], [-0.3, 0.2, 0.7]])
    x = torch.stack([ar1(float(r), 300, rng(12), num_repeats=1)[..., 0] for r in rho.flatten()], -1)
    x = (x.unflatten(-1, (2, 3)) + torch.arange(3.0)).exp()
    axes = {"chain_axis": 0, "draw_axis": 1}
    ours = {
        "bulk": ess_bulk(x),
        "tail": ess_tail(x),
        "rank": rhat(x),
        "mean": mcse_mean(x),
        "quantile": mcse_quantile(x, 0.9),
    }
    array = x.numpy()
    theirs = {
        "bulk": array_stats.ess(array, method="bulk", **axes),
        "tail": array_stats.ess(array, method="tail", prob=(0.05, 0.95), **axes),
        "rank": array_stats.rhat(array, method="rank", **axes),
        "mean": array_stats.mcse(array, method="mean", **axes),
        "quantile": array_stats.mcse(array, method="quantile", prob=0.9, **axes),
    }
    for name, value in ours.items():
        expected = torch.from_numpy(np.asarray(theirs[name]))
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=0.0, msg=name)
    together = integrated_autocorrelation_time(x)
    ess = torch.from_numpy(array_stats.ess(array, method="mean", **axes))
    torch.testing.assert_close(1200 / together, ess)
