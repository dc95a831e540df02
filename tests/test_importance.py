"""Importance sampling against closed forms; every statistical claim with a mutant that fails it."""

import functools
import inspect
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Cauchy, Independent, MultivariateNormal, Normal, StudentT, Uniform

from companion.importance import (
    adapt_proposal,
    defensive_mixture,
    effective_sample_size,
    importance_sampling,
    log_mean_weight,
    pareto_k,
    proposals,
    psis,
    resample,
    weights,
)
from companion.inputs import draw
from companion.monte_carlo import estimate
from companion.targets import Gaussian, GaussianMixture
from tests.calibration import is_calibrated, z_score

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
F64 = {"dtype": torch.float64}
LOG_ROOT_PI = 0.5 * math.log(math.pi)


def bell(x: Tensor) -> Tensor:
    """exp(-x^2): Z = sqrt(pi), variance 1/2."""
    return -x.square()


def normals(problems: int, variance: float = 1.0) -> Normal:
    """A batch of separate problems with the same proposal."""
    return Normal(torch.zeros(problems, **F64), math.sqrt(variance))


class Fixed:
    """A proposal whose draws are given."""

    def __init__(self, proposal, x: Tensor) -> None:
        self.log_prob, self.x = proposal.log_prob, x

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        assert n == len(self.x)
        return self.x


# ---------------------------------------------------------------- both estimators


def test_importance_sampling_agrees_with_the_exact_answers(rng, ledger):
    found = importance_sampling(bell, normals(1), 200_000, generator=rng(0))
    estimates = {
        "log of the integral of exp(-x^2), proposal N(0, 1)": (LOG_ROOT_PI, found.log_z),
        "E[X^2] under exp(-x^2), self-normalised": (0.5, found.expectation(torch.square)),
        "integral of x^2 exp(-x^2), unbiased": (
            math.sqrt(math.pi) / 2,
            found.integral(torch.square),
        ),
        "E[exp(-X^2)] under exp(-x^2), self-normalised": (
            math.sqrt(0.5),
            found.expectation(lambda x: (-x.square()).exp()),
        ),
    }
    for what, (exact, got) in estimates.items():
        ledger(what, exact=exact, estimate=got.value, std_error=got.std_error)
    # The variances: of w / Z, 2 / sqrt(3) - 1; of w (x^2 - 1/2) / Z, 1 / (2 sqrt(3)).
    n = 200_000
    assert found.log_z.std_error == pytest.approx(math.sqrt((2 / 3**0.5 - 1) / n), rel=0.02)
    assert found.expectation(torch.square).std_error == pytest.approx(
        math.sqrt(1 / (2 * 3**0.5) / n), rel=0.02
    )
    # Without weights the same draws give the proposal's answer, 1.
    assert abs(estimate(found.x.square()).value - 0.5) > 100 * estimate(found.x.square()).std_error


def test_effective_sample_size_of_the_bell_is_root_three_over_two(rng, ledger):
    found = importance_sampling(bell, normals(100), 10_000, generator=rng(1))
    share = estimate(found.ess / 10_000)
    ledger(
        "effective sample size a draw, exp(-x^2) from N(0, 1)",
        exact=math.sqrt(3) / 2,
        estimate=share.value,
        std_error=share.std_error,
    )
    assert abs(share.value - 3 / 4) > Z * share.std_error  # its square would be noticed


def test_mean_weight_and_integral_are_unbiased_even_for_three_draws(rng):
    with pytest.warns(UserWarning, match="collapsed"):
        found = importance_sampling(bell, normals(200_000), 3, generator=rng(2))
    root_pi = math.sqrt(math.pi)
    assert abs(z_score(found.log_z.value.exp(), root_pi)) < Z
    assert abs(z_score(found.integral(torch.square).value, root_pi / 2)) < Z
    squared_error = found.integral(torch.ones_like).std_error ** 2
    assert abs(z_score(squared_error, math.pi * (2 / 3**0.5 - 1) / 3)) < Z
    # The logarithm (Jensen) and the ratio are biased, and the check sees it.
    assert z_score(found.log_z.value, LOG_ROOT_PI) < -Z
    assert abs(z_score(found.expectation(torch.square).value, 0.5)) > Z


@functools.cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """`t`, `E[w f exp(-t w)]` and `E[exp(-t w)]` at every t, with w the weight."""
    x = torch.linspace(-14, 14, 2001, **F64)
    w = math.sqrt(2 * math.pi) * (-x.square() / 2).exp()
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    t = torch.linspace(-30, 60, 3001, **F64).exp()
    decay = (-t[:, None] * w).exp()
    first = torch.trapezoid(density * w * (-x.square()).exp() * decay, x)
    return t, first, torch.trapezoid(density * decay, x)


def exact_bias(n: int) -> float:
    """Bias of the self-normalised estimate of E[exp(-X^2)] from n draws of N(0, 1).

    As `1 / sum w = int exp(-t sum w) dt`, the estimate's mean is the integral over t of
    `n E[w f exp(-t w)] E[exp(-t w)]^(n - 1)`.
    """
    t, first, rest = transforms()
    integral = torch.trapezoid(n * first * rest ** (n - 1) * t, t.log())
    return float(integral) - math.sqrt(0.5)


def test_bias_of_the_self_normalised_estimate_falls_as_one_over_n(rng, ledger):
    assert exact_bias(1) == pytest.approx(1 / math.sqrt(3) - math.sqrt(0.5), abs=1e-7)  # plain mean
    for n, rounded in (2, -0.052), (5, -0.0174), (10, -0.0078):
        with warnings.catch_warnings():  # two draws: one outweighs the other
            warnings.simplefilter("ignore")
            found = importance_sampling(bell, normals(200_000), n, generator=rng(n))
        mean = estimate(found.expectation(lambda x: (-x.square()).exp()).value)
        bias = exact_bias(n)
        ledger(
            f"bias of the self-normalised E[exp(-X^2)] from {n} draws",
            exact=bias,
            estimate=mean.value - math.sqrt(0.5),
            std_error=mean.std_error,
        )
        assert bias == pytest.approx(rounded, abs=6e-4)
        assert abs(mean.value - math.sqrt(0.5)) > Z * mean.std_error
    # -Cov(w, w (f - I)) / (n Z^2), with E[w^2 f] / Z^2 = 2 / sqrt(5) and E[w^2] / Z^2 = 2 / sqrt(3)
    leading = -2 * (1 / math.sqrt(5) - math.sqrt(0.5 / 3))
    assert 1000 * exact_bias(1000) == pytest.approx(leading, rel=0.01)


def test_standard_errors_are_calibrated(rng):
    found = importance_sampling(bell, normals(200), 2000, generator=rng(3))
    second, root_pi = found.expectation(torch.square), math.sqrt(math.pi)
    integral = found.integral(torch.square)
    z = {
        "log Z": (found.log_z.value - LOG_ROOT_PI) / found.log_z.std_error,
        "expectation": (second.value - 0.5) / second.std_error,
        "integral": (integral.value - root_pi / 2) / integral.std_error,
    }
    for values in z.values():
        assert is_calibrated(values)
        assert not is_calibrated(values * 2)
        assert not is_calibrated(values / 2)
    # An error bar as if the draws were unweighted, and one without the ratio's derivative.
    unweighted = (second.value - 0.5) / (found.x.var(0) / 2000).sqrt()
    assert not is_calibrated(unweighted)
    share = found.log_weights.softmax(0)
    forgetful = (share * found.x.square()).std(0) * math.sqrt(2000)
    assert not is_calibrated((second.value - 0.5) / forgetful)


def test_intervals_cover_as_often_as_they_say(rng):
    repetitions, level = 2000, 0.9
    found = importance_sampling(bell, normals(repetitions), 300, generator=rng(4))

    def p_value(interval: tuple[Tensor, Tensor], exact: float) -> float:
        covered = (interval[0] < exact) & (exact < interval[1])
        return scipy.stats.binomtest(int(covered.sum()), repetitions, level).pvalue

    second = found.expectation(torch.square)
    assert p_value(found.log_z.interval(level), LOG_ROOT_PI) > 1e-5
    assert p_value(second.interval(level), 0.5) > 1e-5
    assert p_value(second.interval(0.8), 0.5) < 1e-5
    assert p_value(found.log_z.interval(0.8), LOG_ROOT_PI) < 1e-5


@pytest.mark.parametrize(
    ("mean", "variance", "dim"), [(0.5, 1.0, 1), (0.2, 0.7, 4), (0.3, 1.15, 2)]
)
def test_variance_between_normal_laws_is_the_closed_form(rng, mean, variance, dim):
    # E_q[w^2] for p = N(mean, variance) and q = N(0, 1), to the power of the dimension.
    a = 1 / variance - 0.5
    one = math.exp(mean**2 * (1 / (variance**2 * a) - 1 / variance)) / (variance * math.sqrt(2 * a))
    n, problems = 2000, 200
    q = Independent(Normal(torch.zeros(problems, dim, **F64), 1.0), 1)
    p = Independent(Normal(torch.full((problems, dim), mean, **F64), math.sqrt(variance)), 1)
    found = importance_sampling(p.log_prob, q, n, generator=rng(5))
    z = (found.log_z.value.exp() - 1) / math.sqrt((one**dim - 1) / n)
    assert is_calibrated(z)
    assert not is_calibrated(z * math.sqrt((one**dim - 1) / (one ** (3 * dim) - 1)))
    # n / ESS estimates the same second moment.
    ratio = estimate(n / found.ess)
    assert abs(ratio.value - one**dim) < Z * ratio.std_error + 10 * one**dim / n  # O(1/n) bias


def test_equal_weights_give_the_plain_estimate(rng):
    q = normals(3)
    found = importance_sampling(q.log_prob, q, 500, generator=rng(6))
    plain = estimate(found.x.cos())
    for got in found.expectation(torch.cos), found.integral(torch.cos):
        torch.testing.assert_close(got.value, plain.value, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(got.std_error, plain.std_error, rtol=1e-13, atol=1e-15)
        assert got.num_samples == 500
    torch.testing.assert_close(found.ess, torch.full((3,), 500.0, **F64))
    assert found.log_z.std_error.max() < 1e-12


def test_a_constant_in_log_prob_moves_log_z_alone(rng):
    one = importance_sampling(bell, normals(2), 1000, generator=rng(7))
    two = importance_sampling(lambda x: bell(x) + 5000.0, normals(2), 1000, generator=rng(7))
    torch.testing.assert_close(two.log_z.value, one.log_z.value + 5000.0)
    for a, b in (
        (one.log_z.std_error, two.log_z.std_error),
        (one.ess, two.ess),
        (one.pareto_k, two.pareto_k),
        (one.expectation(torch.square).value, two.expectation(torch.square).value),
    ):
        # Near 5000 a log weight keeps 12 digits, and the fit of k loses some more.
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match=r"weights overflow: the largest is exp\(500"):
        two.integral(torch.square)


@pytest.mark.parametrize("constant", [-690.0, -400.0, -200.0, 200.0, 360.0, 690.0])
def test_an_integral_scales_with_its_density_and_so_does_its_error(rng, constant):
    """Squares of weights would under- or overflow."""
    one = importance_sampling(bell, normals(2), 1000, generator=rng(7)).integral(torch.square)
    found = importance_sampling(lambda x: bell(x) + constant, normals(2), 1000, generator=rng(7))
    got = found.integral(torch.square)
    for a, b in (got.value, one.value), (got.std_error, one.std_error):
        torch.testing.assert_close(a.log(), b.log() + constant, rtol=1e-12, atol=1e-10)


def test_integrals_that_float64_cannot_hold_are_refused(rng):
    # One problem of two underflows: neither its value nor its error would be more than zero.
    low = torch.tensor([0.0, -800.0], **F64)
    found = importance_sampling(lambda x: bell(x) + low, normals(2), 100, generator=rng(7))
    with pytest.raises(ValueError, match=r"weights underflow: the largest is exp\(-79.*and log_z"):
        found.integral(torch.square)
    found = importance_sampling(lambda x: bell(x) + 690.0, normals(1), 100, generator=rng(7))
    with pytest.raises(ValueError, match="the integral"):
        found.integral(lambda x: 1e30 * torch.ones_like(x))


# ---------------------------------------------------------------- shapes, zero weights, bad input


def test_a_batch_equals_the_loop_over_its_problems(rng):
    x = torch.randn(200, 2, 3, 4, generator=rng(8), **F64)  # a 2 x 3 batch of vectors
    scale = torch.linspace(0.8, 1.2, 6, **F64).reshape(2, 3)

    def log_prob(x: Tensor, scale: Tensor = scale) -> Tensor:
        return -0.5 * (x.square().sum(-1) / scale)

    def f(x: Tensor) -> Tensor:
        return x[..., :2].cumsum(-1).square()

    q = Independent(Normal(torch.zeros(2, 3, 4, **F64), 1.0), 1)
    batch = importance_sampling(log_prob, Fixed(q, x), 200)
    assert batch.x.shape == (200, 2, 3, 4)
    assert batch.log_weights.shape == (200, 2, 3)
    assert batch.log_z.value.shape == batch.ess.shape == batch.pareto_k.shape == (2, 3)
    assert batch.expectation(f).value.shape == (2, 3, 2)
    smoothed = psis(batch.log_weights)[0]
    single = Independent(Normal(torch.zeros(4, **F64), 1.0), 1)
    for i, j in np.ndindex(2, 3):
        one = importance_sampling(
            lambda x, s=scale[i, j]: log_prob(x, s), Fixed(single, x[:, i, j]), 200
        )
        pairs = [
            (batch.log_weights[:, i, j], one.log_weights),
            (batch.log_z.value[i, j], one.log_z.value),
            (batch.log_z.std_error[i, j], one.log_z.std_error),
            (batch.ess[i, j], one.ess),
            (batch.pareto_k[i, j], one.pareto_k),
            (smoothed[:, i, j], psis(one.log_weights)[0]),
        ]
        for name in ("value", "std_error"):
            pairs += [
                (getattr(batch.expectation(f), name)[i, j], getattr(one.expectation(f), name)),
                (getattr(batch.integral(f), name)[i, j], getattr(one.integral(f), name)),
            ]
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_draws_outside_the_support_weigh_nothing(rng, ledger):
    def half_bell(x: Tensor) -> Tensor:
        return torch.where(x > 0, bell(x), -torch.inf)

    found = importance_sampling(half_bell, normals(1), 100_000, generator=rng(9))
    mean = found.expectation(lambda x: x.sqrt().square())  # NaN where x < 0
    ledger(
        "log of the integral of exp(-x^2) over x > 0",
        exact=LOG_ROOT_PI - math.log(2),
        estimate=found.log_z.value,
        std_error=found.log_z.std_error,
    )
    ledger(
        "E[X] under exp(-x^2) on x > 0",
        exact=1 / math.sqrt(math.pi),
        estimate=mean.value,
        std_error=mean.std_error,
    )
    assert found.pareto_k.isfinite().all()


def test_unnormalised_proposals_with_a_known_log_z_are_normalised(rng, ledger):
    target = Gaussian(torch.tensor([0.5, 0.0], **F64), torch.eye(2, **F64) * 0.8)
    wide = Gaussian(torch.zeros(2, **F64), torch.tensor([[1.5, 0.3], [0.3, 1.0]], **F64))
    found = importance_sampling(target.log_prob, wide, 50_000, generator=rng(10))
    ledger(
        "log Z of a normal law from another normal law",
        exact=target.log_z,
        estimate=found.log_z.value,
        std_error=found.log_z.std_error,
    )
    assert found.expectation(lambda x: x).value.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_float64_on_the_device_of_the_draws(rng, device, dtype):
    q = Normal(torch.zeros(2, dtype=dtype, device=device), 1.0)
    found = importance_sampling(bell, q, 1000, generator=rng(11, device))
    assert (found.x.dtype, found.x.device.type) == (dtype, device.type)
    second = found.expectation(torch.square)
    log_z = found.log_z
    difference = bell(found.x).double() - q.log_prob(found.x).double()  # no digit lost
    assert torch.equal(found.log_weights, difference)
    for got in (found.log_weights, log_z.value, log_z.std_error, found.ess, found.pareto_k):
        assert (got.dtype, got.device.type) == (torch.float64, device.type)
    assert (second.value.dtype, second.value.device.type) == (torch.float64, device.type)
    assert ((log_z.value - LOG_ROOT_PI) / log_z.std_error).abs().max() < Z
    chosen = resample(found.log_weights, "residual", generator=rng(12, device))
    assert (chosen.dtype, chosen.device.type) == (torch.int64, device.type)


def test_importance_sampling_draws_from_its_generator_alone_and_carries_no_gradient(rng):
    before = torch.get_rng_state()
    scale = torch.ones((), **F64, requires_grad=True)
    q = Normal(torch.zeros((), **F64), scale)
    one = importance_sampling(lambda x: bell(x) * scale, q, 100, generator=rng(13))
    two = importance_sampling(lambda x: bell(x) * scale, q, 100, generator=rng(13))
    assert torch.equal(one.x, two.x)
    assert torch.equal(before, torch.get_rng_state())
    second = one.expectation(lambda x: x.square() * scale)
    assert not (one.log_z.value.requires_grad or second.value.requires_grad)
    assert not one.integral(lambda x: x * scale).std_error.requires_grad


def test_importance_sampling_refuses_bad_densities():
    q = normals(1)
    with pytest.raises(ValueError, match=r"log_prob is NaN at [1-9]\d* of 100 draws.*x = "):
        importance_sampling(lambda x: x.sqrt(), q, 100)
    with pytest.raises(ValueError, match="log_prob is plus infinity at 100 of 100 draws"):
        importance_sampling(lambda x: torch.full_like(x, torch.inf), q, 100)
    with pytest.raises(ValueError, match="every weight is zero in 1 of 1 problems"):
        importance_sampling(lambda x: torch.full_like(x, -torch.inf), q, 100)
    with pytest.raises(ValueError, match=r"proposal.log_prob \(10, 2\).*Independent"):
        importance_sampling(lambda x: bell(x).sum(-1), normals(2), 10)
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        importance_sampling(bell, q, 1)
    with pytest.raises(TypeError, match="num_samples must be an integer"):
        importance_sampling(bell, q, 1e3)
    liar = Fixed(Uniform(torch.zeros((), **F64), 1.0, validate_args=False), torch.tensor([0.5, 3]))
    with pytest.raises(ValueError, match="proposal.log_prob is not finite at 1 of 2 draws"):
        importance_sampling(bell, liar, 2)


def test_estimators_refuse_bad_integrands(rng):
    found = importance_sampling(bell, normals(2), 100, generator=rng(14))
    for method in found.expectation, found.integral:
        with pytest.raises(ValueError, match=r"expected a tensor of shape \(100, 2, \.\.\.\), got"):
            method(lambda x: x.sum(-1))
        with pytest.raises(ValueError, match="got float"):
            method(lambda x: 1.0)
        with pytest.raises(ValueError, match="f must give real numbers"):
            method(lambda x: x * 1j)
        with pytest.raises(ValueError, match="draws of positive weight has .* NaN"):
            method(torch.sqrt)


def test_no_tensor_is_made_on_the_default_device(rng):
    generator, q, wide = rng(15), normals(2), Normal(torch.zeros(2, **F64), 2.0)
    flat = Independent(q, 1)
    with torch.device("meta"):
        found = importance_sampling(bell, defensive_mixture(q, wide), 300, generator=generator)
        assert found.log_z.interval()[0].device.type == "cpu"
        assert found.expectation(torch.square).value.device.type == "cpu"
        assert found.integral(torch.square).value.device.type == "cpu"
        assert psis(found.log_weights)[0].device.type == "cpu"
        for scheme in SCHEMES:
            assert resample(found.log_weights, scheme, generator=generator).device.type == "cpu"
        fitted = adapt_proposal(
            lambda x: bell(x).sum(-1), flat, 1000, num_components=2, generator=generator
        )
        assert fitted.sample(3, generator=generator).device.type == "cpu"


# ---------------------------------------------------------------- weights


def test_effective_sample_size_of_known_weights():
    w = torch.tensor([[1.0, 1.0, 5.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 2.0, 0.0]], **F64)
    expected = torch.tensor([4.0, 16 / 6, 1.0], **F64)
    torch.testing.assert_close(effective_sample_size(w.log()), expected)
    torch.testing.assert_close(effective_sample_size(w.log().T, dim=1), expected)
    for shift in (-1e6, 1e6):  # where the weights themselves under- or overflow
        found = effective_sample_size(w.log() + shift)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert effective_sample_size(w.float().log()).dtype == torch.float64
    assert effective_sample_size(torch.tensor([0, -2000, -3000])) == 1.0
    assert effective_sample_size(torch.zeros(1)) == 1.0


def test_log_mean_weight_is_the_logarithm_of_the_mean(rng):
    w = torch.rand(50, 4, generator=rng(16), **F64)
    plain = estimate(w)
    for shift in (0.0, 1e4, -1e4):
        found = log_mean_weight(w.log() + shift)
        rtol = 1e-11
        torch.testing.assert_close(found.value, plain.value.log() + shift, rtol=rtol, atol=rtol)
        torch.testing.assert_close(
            found.std_error, plain.std_error / plain.value, rtol=1e-9, atol=0
        )
        torch.testing.assert_close(found.ess, effective_sample_size(w.log()), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="at least 2 weights, got 1"):
        log_mean_weight(torch.zeros(1))


@pytest.mark.parametrize("function", [effective_sample_size, log_mean_weight, pareto_k])
def test_bad_weights_are_refused(function):
    lw = torch.zeros(30, 2)
    lw[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"1 of 60 log weights are NaN, .* at index \(3, 1\)"):
        function(lw)
    lw[3, 1] = math.inf
    with pytest.raises(ValueError, match="1 of 60 log weights are plus infinity"):
        function(lw)
    lw[:, 1] = -math.inf
    with pytest.raises(ValueError, match="every weight is zero in 1 of 2 problems"):
        function(lw)
    for empty in torch.zeros(0), torch.tensor(1.0):
        with pytest.raises(ValueError, match="draws along dimension 0"):
            function(empty)
    with pytest.raises(TypeError, match="got list"):
        function([0.0, 1.0])
    with pytest.raises(TypeError, match="complex"):
        function(torch.zeros(30, dtype=torch.complex64))


# ---------------------------------------------------------------- the tail


@pytest.mark.parametrize("k", [0.3, 0.7])
def test_pareto_k_measures_the_exponent_of_a_power_law(rng, k):
    n, problems = 10_000, 100
    u = 1 - torch.rand(n, problems, generator=rng(17), **F64)
    found = pareto_k(-k * u.log())
    assert abs(z_score(found, k)) < Z
    assert abs(z_score(found, k + 0.1)) > Z
    # With m weights in the tail, the maximum likelihood estimate has this standard deviation.
    m = 3 * math.sqrt(n)
    assert found.std() == pytest.approx((1 + k) / math.sqrt(m), rel=0.35)
    torch.testing.assert_close(pareto_k(-k * u.log() + 900.0), found, rtol=1e-7, atol=1e-7)


def test_infinite_variance_is_seen_and_its_error_bars_are_wrong(rng):
    # A proposal N(0, s^2) gives w = exp(-x^2 (1 - 1/(2 s^2))): the tail's k is 1 - 2 s^2, so the
    # variance is finite if and only if s^2 > 1/4.
    n, seen = 10_000, {}
    for variance in (0.1, 0.4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = importance_sampling(bell, normals(200, variance), n, generator=rng(18))
        z = (found.log_z.value - LOG_ROOT_PI) / found.log_z.std_error
        seen[variance] = (float(found.pareto_k.mean()), is_calibrated(z), bool(caught))
        if caught:
            assert "k-hat is up to" in str(caught[0].message)
    k, calibrated, warned = seen[0.1]
    assert 0.65 < k < 0.8 and not calibrated and warned  # approaches 0.8 from below
    k, calibrated, warned = seen[0.4]
    assert abs(k - 0.2) < 0.05 and calibrated and not warned


@pytest.mark.parametrize("variance", [0.1, 0.2, 0.26, 0.4, 0.9])
def test_second_moment_of_the_weights_is_finite_above_a_quarter(variance):
    def second_moment(limit: float) -> float:
        x = torch.linspace(-limit, limit, 200_001, **F64)
        q = Normal(torch.zeros((), **F64), math.sqrt(variance))
        return float(torch.trapezoid((2 * bell(x) - q.log_prob(x)).exp(), x) / math.pi)

    if variance > 0.25:
        exact = math.sqrt(2 * variance / (2 - 1 / (2 * variance)))
        assert second_moment(60) == pytest.approx(exact, rel=1e-6)
    else:
        assert second_moment(20) > 1e6 * second_moment(10)


def test_smoothing_changes_the_tail_alone_and_steadies_the_estimate(rng):
    n, k = 1000, 0.6
    u = 1 - torch.rand(n, 200, generator=rng(19), **F64)
    log_weights = -k * u.log()
    smoothed, _ = psis(log_weights)
    torch.testing.assert_close(smoothed.exp().sum(0), torch.ones(200, **F64))
    body = log_weights.argsort(0)[: n - int(3 * math.sqrt(n))]
    shift = (smoothed - log_weights).gather(0, body)
    assert (shift - shift[:1]).abs().max() < 1e-9
    # Integrating u itself: E[u] under the weights is (1 - k) / (2 - k).
    error = ((smoothed.exp() * u).sum(0) - (1 - k) / (2 - k)).square().mean()
    raw_error = ((log_weights.softmax(0) * u).sum(0) - (1 - k) / (2 - k)).square().mean()
    assert error < raw_error


def test_smoothing_agrees_with_arviz_column_by_column(rng):
    from arviz_stats.base.array import array_stats

    log_weights = torch.randn(230, 3, generator=rng(20), **F64)
    smoothed, k = psis(log_weights)
    for i in range(3):
        theirs, theirs_k = array_stats.psislw(-log_weights[:, i].numpy())
        np.testing.assert_allclose(smoothed[:, i], theirs)
        assert k[i] == theirs_k


def test_weights_without_a_tail_to_fit_are_left_as_they_are(rng):
    g = rng(21)
    noise = torch.randn(1000, generator=g, **F64)
    few = torch.full((1000,), -math.inf, **F64)
    few[:24] = noise[:24]
    cases = {
        "equal": (torch.zeros(1000, **F64), -math.inf),
        "largest equal": (noise.clamp(max=0.0), -math.inf),
        "beyond double precision": (1e4 * noise, math.inf),
        "one alone": (800.0 * (torch.arange(1000) == 7).double(), math.inf),
        "tied": (torch.where(noise > 2, 1.0, 0.0).double(), math.nan),
        "fewer than 25 positive": (few, math.nan),
    }
    for log_weights, k in cases.values():
        smoothed, found = psis(log_weights)
        assert float(found) == pytest.approx(k, nan_ok=True)
        torch.testing.assert_close(smoothed, log_weights.log_softmax(0))
    with pytest.raises(ValueError, match="at least 25 weights, got 24"):
        psis(noise[:24])
    # Zero weights say nothing about the tail of the others.
    padded, k = psis(torch.cat([noise, torch.full((500,), -math.inf, **F64)]))
    plain, expected = psis(noise)
    torch.testing.assert_close(padded[:1000], plain)
    assert (padded[1000:] == -math.inf).all() and k == expected


def test_collapsed_weights_warn_where_they_were_asked_for(rng):
    q = Normal(torch.full((), 9.0, **F64), 1.0)
    with pytest.warns(UserWarning, match=r"in 1 of 1 problems: one of 1000 draws has up to") as w:
        importance_sampling(bell, q, 1000, generator=rng(22))
    assert w[0].filename == __file__
    line = inspect.currentframe().f_lineno
    assert line - 4 <= w[0].lineno <= line
    # One of two draws always outweighs the other, unless they are equal.
    with pytest.warns(UserWarning, match="one of 2 draws"):
        weights.warn_if_collapsed(torch.tensor([0.0, 1.0]))
    weights.warn_if_collapsed(torch.tensor([0.0, 0.0]))
    weights.warn_if_collapsed(torch.zeros(100), torch.tensor(0.49))
    weights.warn_if_collapsed(torch.zeros(99), torch.tensor(0.9))  # too few draws to tell
    weights.warn_if_collapsed(torch.tensor([0.49, 0.27, 0.24]).log())
    with pytest.warns(UserWarning, match="up to 51% of the weight"):
        weights.warn_if_collapsed(torch.tensor([0.51, 0.25, 0.24]).log())
    with pytest.warns(UserWarning, match=r"k-hat is up to 0.51 \(limit 0.50\)"):
        weights.warn_if_collapsed(torch.zeros(100, 2), torch.tensor([0.51, math.nan]))


# ---------------------------------------------------------------- resampling

SCHEMES = ["multinomial", "stratified", "systematic", "residual"]
SHARE = torch.tensor([0.30, 0.02, 0.11, 0.0, 0.17, 0.26, 0.14], **F64)
VALUES = torch.tensor([1.0, -2.0, 0.5, 99.0, 3.0, 0.0, -1.0], **F64)
NUM = 10


def offspring(scheme: str, generator: torch.Generator, num: int = NUM) -> Tensor:
    """How often each of 20,000 runs chose each draw, `(runs, n)`."""
    log_weights = SHARE.log()[:, None].expand(-1, 20_000) + 7.0
    index = resample(log_weights, scheme, num, generator=generator)
    assert index.shape == (num, 20_000)
    return (index[:, :, None] == torch.arange(len(SHARE))).sum(0).double()


def is_unbiased(counts: Tensor) -> bool:
    """No count further than 5 standard errors from `num u_i`: false-alarm rate 4e-6 for seven."""
    off = (counts.mean(0) - NUM * SHARE).abs()
    return bool((off <= 5 * counts.std(0) / math.sqrt(len(counts)) + 1e-12).all())


def exact_moments(scheme: str, share: Tensor, values: Tensor, num: int) -> tuple[Tensor, float]:
    """Variances of the counts, and of the mean of the chosen values."""

    def spread(p: Tensor) -> float:  # of one value drawn with probabilities p
        return float((p * values.square()).sum() - (p * values).sum() ** 2)

    if scheme == "multinomial":
        return num * share * (1 - share), spread(share) / num
    if scheme == "residual":
        copies = (num * share + 1e-9).floor()
        rest = num - copies.sum()
        p = (num * share - copies) / rest
        return rest * p * (1 - p), float(rest) * spread(p) / num**2
    edges = torch.cat([share.new_zeros(1), num * share.cumsum(0)])
    if scheme == "stratified":
        low = torch.arange(num, **F64)[:, None]
        upper, lower = edges[1:].minimum(low + 1), edges[:-1].maximum(low)
        p = (upper - lower).clamp(min=0.0)  # of each draw in each stratum
        return (p * (1 - p)).sum(0), sum(spread(row) for row in p) / num**2
    # Systematic: between two fractional parts of the edges, U makes no difference.
    breaks = torch.cat([edges.frac(), torch.ones(1, **F64)]).sort().values
    middle, length = (breaks[1:] + breaks[:-1]) / 2, breaks.diff()
    counts = torch.stack([((edges - u).ceil().diff()) for u in middle])
    mean = (length[:, None] * counts).sum(0)
    torch.testing.assert_close(mean, num * share)
    variance = (length[:, None] * (counts - mean).square()).sum(0)
    sums = counts @ values / num
    return variance, float((length * (sums - (length * sums).sum()).square()).sum())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_chooses_in_proportion_to_the_weights(rng, monkeypatch, scheme):
    assert is_unbiased(offspring(scheme, rng(30)))
    correct = weights._look_up
    monkeypatch.setattr(weights, "_look_up", lambda w, points: correct(w.sqrt(), points))
    assert not is_unbiased(offspring(scheme, rng(30)))
    # An index one too high, where the sums are compared the wrong way round.
    wrong = lambda w, points: (correct(w, points) + 1).clamp(max=len(SHARE) - 1)  # noqa: E731
    monkeypatch.setattr(weights, "_look_up", wrong)
    assert not is_unbiased(offspring(scheme, rng(30)))


def test_drawing_the_residual_part_by_the_whole_weights_would_be_noticed(rng):
    # A mistake often met: copies first, then the rest by w instead of by what remains of it.
    copies = (NUM * SHARE + 1e-9).floor()
    rest = int(NUM - copies.sum())
    index = torch.multinomial(SHARE.expand(20_000, -1), rest, replacement=True, generator=rng(31))
    counts = copies + (index[:, :, None] == torch.arange(len(SHARE))).sum(1)
    assert not is_unbiased(counts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_variances_of_resampling_are_the_closed_forms(rng, ledger, scheme):
    counts = offspring(scheme, rng(32))
    variances, of_mean = exact_moments(scheme, SHARE, VALUES, NUM)
    squares = (counts - NUM * SHARE).square()
    z = (squares.mean(0) - variances) / (squares.std(0) / math.sqrt(len(squares)))
    assert z[variances > 1e-9].abs().max() < 5
    assert squares[:, variances <= 1e-9].max() < 1e-18
    means = counts @ VALUES / NUM
    got = estimate((means - float((SHARE * VALUES).sum())).square())
    ledger(
        f"variance of a mean after {scheme} resampling",
        exact=of_mean,
        estimate=got.value,
        std_error=got.std_error,
    )
    for other in set(SCHEMES) - {scheme}:
        wrong = exact_moments(other, SHARE, VALUES, NUM)[1]
        assert abs(got.value - wrong) > Z * got.std_error


def test_multinomial_resampling_has_the_largest_variance_of_the_independent_schemes(rng):
    generator = rng(33)
    for _ in range(50):  # any weights, any values: exact variances
        share = torch.randn(12, generator=generator, **F64).mul(2).softmax(0)
        values = torch.randn(12, generator=generator, **F64)
        _, worst = exact_moments("multinomial", share, values, 20)
        for scheme in ("stratified", "residual"):
            assert exact_moments(scheme, share, values, 20)[1] <= worst * (1 + 1e-9)
    # Systematic has no such guarantee: its points can fall in with the order of the draws.
    m = 6
    log_weights = torch.zeros(2 * m, 20_000)
    alternating = torch.tensor([1.0, -1.0], **F64).repeat(m)
    variance = {
        scheme: alternating[resample(log_weights, scheme, m, generator=generator)].mean(0).var()
        for scheme in ("multinomial", "systematic")
    }
    assert variance["multinomial"] == pytest.approx(1 / m, rel=0.1)
    assert variance["systematic"] == pytest.approx(1.0, rel=0.01)


def test_systematic_and_residual_keep_what_is_due(rng):
    low, high = (NUM * SHARE + 1e-9).floor(), (NUM * SHARE - 1e-9).ceil()
    counts = offspring("systematic", rng(34))
    assert ((counts >= low) & (counts <= high)).all()
    assert (offspring("residual", rng(35)) >= low).all()
    assert (offspring("residual", rng(35)) > high).any()
    stratified = offspring("stratified", rng(36))
    assert ((stratified < low) | (stratified > high)).any()
    assert ((stratified >= low - 1) & (stratified <= high + 1)).all()


@pytest.mark.parametrize("n", [1, 3, 49, 1000])
@pytest.mark.parametrize("scheme", ["stratified", "systematic", "residual"])
def test_equal_weights_leave_every_draw_once(rng, n, scheme):
    index = resample(torch.full((n, 5), -3.3), scheme, generator=rng(37))
    assert (index == torch.arange(n)[:, None]).all()


def test_problems_of_a_batch_are_resampled_by_their_own_weights(rng):
    due = torch.tensor([[2, 0, 1, 1], [0, 4, 0, 0], [1, 1, 1, 1]])  # times 1/4
    log_weights = (due.double() / 4).log().T.reshape(4, 3, 1).expand(4, 3, 2)
    for scheme in ("stratified", "systematic", "residual"):
        index = resample(log_weights, scheme, 8, generator=rng(38))
        assert index.shape == (8, 3, 2)
        counts = (index[..., None] == torch.arange(4)).sum(0)
        assert (counts == 2 * due[:, None]).all()
    index = resample(log_weights.float(), "multinomial", 400, generator=rng(39))
    counts = (index[..., None] == torch.arange(4)).sum(0)
    assert (counts[due[:, None].expand(3, 2, 4) == 0] == 0).all()
    assert not torch.equal(index[:, :, 0], index[:, :, 1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resampling_never_leaves_the_draws_nor_takes_one_of_weight_zero(rng, monkeypatch, scheme):
    log_weights = 30 * torch.randn(100_000, generator=rng(40))
    log_weights[0] = log_weights[-3:] = -math.inf
    index = resample(log_weights, scheme, 30_001, generator=rng(41))
    assert (log_weights[index] > -math.inf).all()
    for u in (0.0, 1.0 - 2.0**-53):  # the extremes of torch.rand
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **kwargs: torch.full(shape, u, **F64))
        for row in (torch.zeros(3), torch.tensor([0.0, 0.0, -math.inf]), log_weights):
            index = resample(row, scheme, 7)
            assert index.min() >= 0 and index.max() < len(row)
            assert (row[index] > -math.inf).all()


def test_resample_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="scheme must be one of multinomial, .*; got 'bootstrap'"):
        resample(torch.zeros(3), "bootstrap")
    with pytest.raises(ValueError, match="num must be at least 1"):
        resample(torch.zeros(3), "systematic", 0)
    with pytest.raises(ValueError, match="every weight is zero"):
        resample(torch.full((3,), -math.inf), "systematic")
    with pytest.raises(TypeError, match="generator must be"):
        resample(torch.zeros(3), "systematic", generator=0)


# ---------------------------------------------------------------- mixtures that defend and adapt


def test_defensive_mixture_draws_from_its_own_density(rng):
    one = torch.ones((), **F64)
    q = defensive_mixture(Normal(0 * one, 0.5), Cauchy(one, 1.0), 0.3)
    x = q.sample(50_000, generator=rng(50))

    def cdf(fraction: float):
        return lambda x: (
            (1 - fraction) * scipy.stats.norm.cdf(x, scale=0.5)
            + fraction * scipy.stats.cauchy.cdf(x, loc=1)
        )

    assert scipy.stats.kstest(x, cdf(0.3)).pvalue > 1e-5
    assert scipy.stats.kstest(x, cdf(0.27)).pvalue < 1e-5
    grid = torch.linspace(-30, 30, 7, **F64)
    expected = torch.as_tensor(
        0.7 * scipy.stats.norm.pdf(grid, scale=0.5) + 0.3 * scipy.stats.cauchy.pdf(grid, loc=1)
    )
    torch.testing.assert_close(q.log_prob(grid).exp(), expected)


def test_a_defensive_part_makes_a_finite_variance(rng):
    narrow = normals(200, 0.1)
    q = defensive_mixture(narrow, StudentT(torch.full((200,), 3.0, **F64)), 0.2)
    found = importance_sampling(bell, q, 2000, generator=rng(51))
    assert is_calibrated((found.log_z.value - LOG_ROOT_PI) / found.log_z.std_error)
    with pytest.warns(UserWarning, match="collapsed"):
        alone = importance_sampling(bell, narrow, 2000, generator=rng(51))
    assert not is_calibrated((alone.log_z.value - LOG_ROOT_PI) / alone.log_z.std_error)
    # Separate problems choose their part separately.
    chosen = (found.x.abs() > 1.5).double()
    assert abs(float(torch.corrcoef(chosen[:, :2].T)[0, 1])) < Z / math.sqrt(2000)


def test_defensive_mixture_normalises_its_parts_and_refuses_what_does_not_fit(rng):
    part = Gaussian(torch.zeros(2, **F64), torch.eye(2, **F64))
    q = defensive_mixture(part, Gaussian(torch.ones(2, **F64), 3 * torch.eye(2, **F64)), 0.5)
    found = importance_sampling(part.log_prob, q, 20_000, generator=rng(52))
    assert abs(found.log_z.value - part.log_z) < Z * found.log_z.std_error
    assert abs(found.log_z.value) > Z * found.log_z.std_error
    for fraction in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            defensive_mixture(part, part, fraction)
    with pytest.raises(ValueError, match=r"draw alike.*\(5, 2\).*\(5,\)"):
        defensive_mixture(part, Normal(torch.zeros((), **F64), 1.0)).sample(5)


def two_modes() -> GaussianMixture:
    means = torch.tensor([[-4.0, 0.0], [4.0, 1.0]], **F64)
    covariances = torch.tensor([[[0.5, 0.0], [0.0, 0.5]], [[1.0, 0.8], [0.8, 1.0]]], **F64)
    return GaussianMixture(torch.tensor([1.0, 3.0], **F64), means, covariances)


def wide_normal(dim: int = 2, dtype: torch.dtype = torch.float64) -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(dim, dtype=dtype), 25 * torch.eye(dim, dtype=dtype))


def test_an_em_step_fits_the_weighted_draws_better(rng):
    x = torch.randn(500, 2, generator=rng(58), **F64).cumsum(1)
    share = torch.rand(500, generator=rng(59), **F64)
    share /= share.sum()
    eye = torch.eye(2, **F64)

    def log_likelihood(probs: Tensor, means: Tensor, covariances: Tensor) -> float:
        parts = MultivariateNormal(means, covariances).log_prob(x[:, None]) + probs.log()
        return float(share @ parts.logsumexp(1))

    one = proposals._em_step(x, share, torch.ones(1, **F64), x[:1], eye[None])
    torch.testing.assert_close(one[1][0], share @ x)
    torch.testing.assert_close(one[2][0], x.T.cov(aweights=share, correction=0))
    three = (torch.full((3,), 1 / 3, **F64), x[:3], eye.expand(3, 2, 2))
    for _ in range(20):
        before, three = log_likelihood(*three), proposals._em_step(x, share, *three)
        assert log_likelihood(*three) > before
    # A component that no draw came from stays where it is, and harms nothing.
    far = (torch.tensor([0.5, 0.5], **F64), torch.tensor([[0.0], [1e6]], **F64) + x[:1])
    probs, means, covariances = proposals._em_step(x, share, *far, eye.expand(2, 2, 2))
    assert probs[1] == 0 and float(probs[0]) == pytest.approx(1.0, abs=1e-15)
    assert torch.equal(means[1], far[1][1]) and torch.equal(covariances[1], eye)
    torch.testing.assert_close(means[0], share @ x)


def test_an_adapted_proposal_finds_both_modes(rng, ledger):
    target, g = two_modes(), rng(53)
    q = adapt_proposal(
        target.log_prob, wide_normal(), 1000, num_components=2, num_rounds=15, generator=g
    )
    before = importance_sampling(target.log_prob, wide_normal(), 20_000, generator=g)
    after = importance_sampling(target.log_prob, q, 20_000, generator=g)
    assert before.ess < 0.2 * 20_000
    assert after.ess > 0.85 * 20_000  # at most 0.9 and a little: a tenth of the draws defends
    ledger(
        "log Z of a mixture of two normal laws, adapted proposal",
        exact=target.log_z,
        estimate=after.log_z.value,
        std_error=after.log_z.std_error,
    )
    mean = after.expectation(lambda x: x)
    assert ((mean.value - target.mean) / mean.std_error).abs().max() < Z


def test_ten_dimensions_out_of_reach_of_the_first_proposal_are_reached_by_adapting(rng):
    target = MultivariateNormal(torch.full((10,), 2.0, **F64), 0.2 * torch.eye(10, **F64) + 0.2)
    g = rng(54)
    q = adapt_proposal(target.log_prob, wide_normal(10), 2000, num_rounds=15, generator=g)
    with pytest.warns(UserWarning, match="collapsed"):
        before = importance_sampling(target.log_prob, wide_normal(10), 10_000, generator=g)
    after = importance_sampling(target.log_prob, q, 10_000, generator=g)
    assert before.ess < 10
    assert after.ess > 7000
    assert abs(after.log_z.value) < Z * after.log_z.std_error


def test_the_mean_weight_is_unbiased_whatever_the_adaptation_did(rng):
    # Half-adapted on purpose, and few final draws: the expectation of the mean weight is still Z.
    target, g = two_modes(), rng(55)
    means, errors = [], []
    for _ in range(100):
        q = adapt_proposal(target.log_prob, wide_normal(), 300, num_rounds=2, generator=g)
        x = q.sample(2000, generator=g)
        log_weights = (target.log_prob(x) - q.log_prob(x)).reshape(20, 100)
        means.append((log_weights.logsumexp(0) - math.log(20)).exp())
        errors.append(log_mean_weight(log_weights).value)
    z = torch.stack(means).mean(1)
    exact = math.exp(target.log_z)
    assert abs(z_score(z, exact)) < Z
    assert abs(z_score(torch.stack(errors).mean(1), target.log_z)) > Z  # its logarithm is not


def test_float32_targets_are_adapted_to_in_float32(rng):
    target = MultivariateNormal(torch.ones(3), torch.eye(3))
    q = adapt_proposal(target.log_prob, wide_normal(3, torch.float32), 1000, generator=rng(56))
    found = importance_sampling(target.log_prob, q, 5000, generator=rng(57))
    assert found.x.dtype == torch.float32
    assert found.ess > 4000
    assert abs(found.log_z.value) < Z * found.log_z.std_error


def test_adapt_proposal_refuses_what_it_cannot_fit(rng):
    target = two_modes()
    with pytest.raises(ValueError, match=r"2 components in 2 dimensions .* at least 240, got 239"):
        adapt_proposal(target.log_prob, wide_normal(), 239, num_components=2)
    with pytest.raises(ValueError, match=r"shape \(n, d\), got \(200,\)"):
        adapt_proposal(bell, Normal(0.0, 1.0), 200)
    with pytest.raises(ValueError, match="num_rounds"):
        adapt_proposal(target.log_prob, wide_normal(), 500, num_rounds=0)
    with pytest.raises(ValueError, match="fraction"):
        adapt_proposal(target.log_prob, wide_normal(), 500, fraction=1.0)
    with pytest.raises(ValueError, match="only 0 of 500 draws fell where .* 12 are needed"):
        adapt_proposal(lambda x: torch.full_like(x[:, 0], -math.inf), wide_normal(), 500)


def test_a_component_that_few_draws_made_keeps_its_place(rng):
    x = torch.randn(500, 2, generator=rng(62), **F64)
    law = torch.tensor([0.5, 0.5], **F64), torch.tensor([[0.0, 0.0], [1e3, 0.0]], **F64)
    eye = torch.eye(2, **F64).expand(2, 2, 2)
    share = torch.full((500,), 1 / 500, **F64)
    for few, moves in (2, False), (6, False), (9, True):
        y = x.clone()
        y[:few, 0] += 1e3
        _, means, covariances = proposals._em_step(y, share, *law, eye)
        assert torch.equal(means[1], law[1][1]) != moves
        assert torch.equal(covariances[1], eye[1]) != moves
        torch.testing.assert_close(means[0], y[few:].mean(0))


def test_a_target_of_bounded_support_is_adapted_to(rng):
    """Fewer draws than are clipped have positive weight in the first round."""

    def log_prob(x: Tensor) -> Tensor:
        return torch.where((x - 3.0).abs().amax(-1) < 1.1, 0.0, -math.inf)

    first = draw(wide_normal(), 1000, generator=rng(60))
    assert 12 <= (log_prob(first) > -math.inf).sum() < math.isqrt(1000)
    g = rng(60)
    q = adapt_proposal(log_prob, wide_normal(), 1000, generator=g)
    found = importance_sampling(log_prob, q, 10_000, generator=g)
    assert found.ess > 3000
    assert abs(found.log_z.value - 2 * math.log(2.2)) < Z * found.log_z.std_error
    tiny = lambda x: log_prob(3.0 + 4.0 * (x - 3.0))  # noqa: E731
    with pytest.raises(ValueError, match=r"only \d of 1000 draws .* 12 are .* widen .*more draws"):
        adapt_proposal(tiny, wide_normal(), 1000, generator=g)


def test_no_proposal_beats_the_one_proportional_to_the_integrand(rng, ledger):
    generator = rng(60)
    p = torch.rand(8, generator=generator, **F64) * 3.0  # unnormalised
    for f in torch.randn(8, generator=generator, **F64), torch.rand(8, generator=generator, **F64):
        total = (f * p).sum()

        def variance(q: Tensor, f: Tensor = f, total: Tensor = total) -> Tensor:
            return ((f * p).square() / q).sum(-1) - total**2

        best = (f.abs() * p) / (f.abs() * p).sum()
        least = (f.abs() * p).sum() ** 2 - total**2
        assert variance(best) == pytest.approx(float(least), abs=1e-12)
        noise = torch.randn(1000, 8, generator=generator, **F64)
        for size in (0.01, 0.1, 1.0):
            others = best * (size * noise).exp()
            assert (variance(others / others.sum(1, keepdim=True)) > least).all()
        for wrong in p, f.square() * p:  # the target itself, and the square of the integrand
            assert variance(wrong / wrong.sum()) > least + 0.01
    # The last f is positive: every draw of the best proposal gives the integral itself.
    q = torch.distributions.Categorical(best)
    found = importance_sampling(lambda x: p[x].log(), q, 30, generator=generator)
    integral = found.integral(lambda x: f[x])
    assert integral.std_error < 1e-14
    ledger("sum of f p~ from the optimal proposal", exact=float(total), estimate=integral.value)


def test_tilting_a_normal_law_reaches_its_tail_with_the_closed_form_variance(rng, ledger):
    t, n = 5.0, 2000
    exact = scipy.stats.norm.sf(t)
    law = Normal(torch.zeros(200, **F64), 1.0)
    tilted = Normal(torch.full((200,), t, **F64), 1.0)
    with pytest.warns(UserWarning, match="collapsed"):  # for Z, of which the tail has no need
        found = importance_sampling(law.log_prob, tilted, n, generator=rng(61))
    tail = found.integral(lambda x: (x > t).double())
    variance = math.exp(t**2) * scipy.stats.norm.sf(2 * t) - exact**2
    z = (tail.value - exact) / math.sqrt(variance / n)
    assert is_calibrated(z)
    assert not is_calibrated(z * math.sqrt(variance / (exact * (1 - exact))))  # as if untilted
    mean = estimate(tail.value)
    ledger(
        "P(X > 5) for a standard normal X, from draws of N(5, 1)",
        exact=exact,
        estimate=mean.value,
        std_error=mean.std_error,
    )


def test_weights_of_a_defensive_mixture_and_their_mean_square_are_bounded():
    x = torch.linspace(-40, 40, 400_001, **F64)
    safe = StudentT(torch.tensor(3.0, **F64))

    def mean_square(q) -> float:
        logs = 2 * bell(x) - math.log(math.pi) - q.log_prob(x)
        return float(torch.trapezoid(logs.exp(), x))

    under_safe = mean_square(safe)
    for a in (0.05, 0.2, 0.5):
        for variance in (0.05, 0.5, 4.0):  # infinite mean square alone, a perfect fit, too wide
            q = Normal(torch.zeros((), **F64), math.sqrt(variance))
            mixed = defensive_mixture(q, safe, a)
            excess = safe.log_prob(x) + math.log(a) - mixed.log_prob(x)
            assert (excess <= 1e-12).all()  # of log w over log p~ / (a r)
            assert mean_square(mixed) <= under_safe / a
            if variance > 0.25:
                assert mean_square(mixed) <= mean_square(q) / (1 - a) * (1 + 1e-12)
    # Neither bound holds without its factor: the defence has its price.
    narrow = Normal(torch.zeros((), **F64), math.sqrt(0.05))
    assert mean_square(defensive_mixture(narrow, safe, 0.2)) > under_safe
    fit = Normal(torch.zeros((), **F64), math.sqrt(0.5))
    assert mean_square(defensive_mixture(fit, safe, 0.2)) > mean_square(fit)
