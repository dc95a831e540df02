"""Gradient estimators against closed forms, enumeration and a slow definition; mutants fail."""

import math
import re

import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    OneHotCategoricalStraightThrough,
    Pareto,
    Poisson,
    RelaxedOneHotCategorical,
    Uniform,
    VonMises,
    Weibull,
    constraints,
)

from companion.gradients import (
    _sum_of_others,
    gumbel_softmax,
    pathwise_gradient,
    score_function_gradient,
)
from tests.calibration import z_score

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
FROM_OTHERS = ["leave_one_out", "optimal"]


def z_limit(comparisons: int) -> float:
    """The same false-alarm rate for the largest of several (Bonferroni)."""
    return float(scipy.stats.norm.isf(scipy.stats.norm.sf(Z) / comparisons))


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# ------------------------------------------------ E[(X + 1)^2] under N(mu, 1): all in closed form
#
# With x = mu + z and m = mu + 1 the integrand is f = (m + z)^2 and the score is z. The gradient is
# 2 m. One term of each estimator has a variance that follows from E[z^2, z^4, z^6] = 1, 3, 15:
#   score function, baseline b    E[z^2 (f - b)^2] - 4 m^2 = m^4 + 14 m^2 + 15 - 2 b (m^2 + 3) + b^2
#   least for b = E[z^2 f] = m^2 + 3, with variance 8 m^2 + 6; for b = E[f] = m^2 + 1: 8 m^2 + 10
#   pathwise, 2 (m + z)           4

MU = 0.5
M = MU + 1.0
EXACT = 2.0 * M


def square(x: Tensor) -> Tensor:
    return x**2 + 2 * x + 1


def unit_normal(theta: Tensor) -> Distribution:
    return Normal(theta, 1.0)


def score_variance(b: float) -> float:
    return M**4 + 14 * M**2 + 15 - 2 * b * (M**2 + 3) + b**2


def several(problems: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same problem many times: independent repetitions in one call."""
    return torch.full((problems,), MU, dtype=dtype)


def test_closed_forms_agree_with_quadrature():
    def moment(g):
        return scipy.integrate.quad(lambda z: g(z) * scipy.stats.norm.pdf(z), -30, 30)[0]

    f = lambda z: square(MU + z)  # noqa: E731
    assert moment(lambda z: z * f(z)) == pytest.approx(EXACT)
    for b in (0.0, 1.7, M**2 + 1, M**2 + 3):
        second = moment(lambda z, b=b: z**2 * (f(z) - b) ** 2)
        assert score_variance(b) == pytest.approx(second - EXACT**2)
    assert score_variance(M**2 + 3) == pytest.approx(8 * M**2 + 6)
    assert score_variance(M**2 + 1) == pytest.approx(8 * M**2 + 10)
    # The standard deviations at n = 10,000.
    assert round(math.sqrt(score_variance(0.0)) / 100, 4) == 0.0718
    assert round(math.sqrt(4.0) / 100, 4) == 0.0200


@pytest.mark.parametrize("baseline", [None, "leave_one_out", "optimal", M**2 + 3])
def test_score_function_agrees_with_the_exact_gradient(rng, ledger, baseline):
    found = score_function_gradient(
        square, unit_normal, double(MU)[0], 10_000, baseline=baseline, generator=rng(0)
    )
    ledger(
        f"d/dmu E[x^2 + 2x + 1] under N(mu, 1) by the score function, baseline {baseline}",
        exact=EXACT,
        estimate=found.value,
        std_error=found.std_error,
    )


def test_pathwise_agrees_with_the_exact_gradient(rng, ledger):
    found = pathwise_gradient(square, unit_normal, double(MU)[0], 10_000, generator=rng(0))
    ledger(
        "d/dmu E[x^2 + 2x + 1] under N(mu, 1), pathwise",
        exact=EXACT,
        estimate=found.value,
        std_error=found.std_error,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_score_function_has_the_variance_of_theory(rng, dtype):
    n, problems = 50, 10_000
    variances = {b: score_variance(b or 0.0) for b in (None, 1.0, M**2 + 1, M**2 + 3)}
    for baseline, exact in variances.items():
        found = score_function_gradient(
            square, unit_normal, several(problems, dtype), n, baseline=baseline, generator=rng(1)
        )
        assert found.num_samples == n
        assert found.value.dtype == found.std_error.dtype == torch.float64
        assert abs(z_score(found.value, EXACT)) < Z
        assert abs(z_score(n * (found.value - EXACT) ** 2, exact)) < Z
        squared = n * found.std_error**2  # unbiased: the terms are independent
        assert abs(z_score(squared, exact)) < Z
        for other in set(variances.values()) - {exact}:  # each baseline has a variance of its own
            assert abs(z_score(squared, other)) > Z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pathwise_has_the_variance_of_theory(rng, dtype):
    n, problems = 50, 10_000
    found = pathwise_gradient(square, unit_normal, several(problems, dtype), n, generator=rng(2))
    assert found.value.dtype == torch.float64
    assert abs(z_score(found.value, EXACT)) < Z
    assert abs(z_score(n * (found.value - EXACT) ** 2, 4.0)) < Z
    assert abs(z_score(n * found.std_error**2, 4.0)) < Z
    assert abs(z_score(n * found.std_error**2, 4.2)) > Z  # the test can tell 4 from 4.2


def test_leave_one_out_has_the_variance_of_a_sample_covariance(rng):
    n, problems = 5, 100_000
    found = score_function_gradient(
        square, unit_normal, several(problems), n, baseline="leave_one_out", generator=rng(3)
    )
    spread = n * (found.value - EXACT) ** 2
    # Var(sample covariance) = mu22/n - (n-2)/(n(n-1)) mu11^2 + mu20 mu02/(n(n-1)), for any law.
    mu22, mu11, mu02 = 12 * M**2 + 10, 2 * M, 4 * M**2 + 2
    exact = mu22 - (n - 2) / (n - 1) * mu11**2 + mu02 / (n - 1)
    assert abs(z_score(spread, exact)) < Z
    assert (
        abs(z_score(spread, score_variance(M**2 + 1))) > Z
    )  # that of the true mean is for large n


@pytest.mark.parametrize("baseline", FROM_OTHERS)
def test_baselines_from_the_other_draws_reach_the_variance_of_the_exact_ones(rng, baseline):
    n, problems = 10_000, 200
    found = score_function_gradient(
        square, unit_normal, several(problems), n, baseline=baseline, generator=rng(4)
    )
    mean_squared = n * found.std_error.square().mean()
    exact = {"leave_one_out": 8 * M**2 + 10, "optimal": 8 * M**2 + 6}
    # Statistical error 0.4 % (one standard error), bias 10/n = 0.1 %; the two differ by 15 %.
    assert mean_squared.item() == pytest.approx(exact[baseline], rel=0.03)


@pytest.mark.parametrize("baseline", [None, 7.0, *FROM_OTHERS])
@pytest.mark.parametrize("n", [2, 4])
def test_score_function_is_unbiased_for_few_samples(rng, baseline, n):
    found = score_function_gradient(
        square, unit_normal, several(200_000), n, baseline=baseline, generator=rng(5)
    )
    assert abs(z_score(found.value, EXACT)) < Z


def test_the_check_of_unbiasedness_rejects_the_usual_mistakes(rng):
    n = 4
    noise = torch.randn(n, 200_000, dtype=torch.float64, generator=rng(6))
    values, scores = square(MU + noise), noise
    assert abs(z_score((values * scores).mean(0), EXACT)) < Z
    assert abs(z_score(-(values * scores).mean(0), EXACT)) > Z  # the sign of a loss
    # The mean over all draws is not independent of any: the result is (n - 1) / n of the truth.
    plain_mean = ((values - values.mean(0)) * scores).mean(0)
    assert abs(z_score(plain_mean, EXACT)) > Z
    assert abs(z_score(plain_mean, EXACT * (n - 1) / n)) < Z
    weights = scores**2
    own_optimum = (weights * values).sum(0) / weights.sum(0)
    assert abs(z_score(((values - own_optimum) * scores).mean(0), EXACT)) > Z
    # Draws that are left attached: log p(mu + z; mu) does not depend on mu at all.
    theta = double(MU).requires_grad_()
    x = theta + noise[:, :1]
    (attached,) = torch.autograd.grad(
        (square(x).detach() * unit_normal(theta).log_prob(x)).sum(), theta
    )
    assert attached == 0.0


def test_draws_that_a_distribution_leaves_attached_are_detached(rng):
    class Attached(Normal):
        def sample(self, sample_shape=()):
            return self.rsample(sample_shape)

    found = score_function_gradient(
        square, lambda t: Attached(t, 1.0), double(MU), 10_000, generator=rng(45)
    )
    assert abs(float((found.value - EXACT) / found.std_error)) < Z


@pytest.mark.parametrize("method", ["pathwise", None, 5.25, *FROM_OTHERS])
def test_standard_error_is_calibrated(rng, method):
    n, repetitions = 2000, 200
    theta = several(repetitions)
    if method == "pathwise":
        found = pathwise_gradient(square, unit_normal, theta, n, generator=rng(7))
    else:
        found = score_function_gradient(
            square, unit_normal, theta, n, baseline=method, generator=rng(7)
        )
    z = (found.value - EXACT) / found.std_error
    low, high = scipy.stats.chi2.interval(1 - 1e-5, repetitions)
    assert low < float(z.square().sum()) < high
    assert abs(float(z.mean())) < Z / math.sqrt(repetitions)
    assert not low < float((2 * z).square().sum()) < high  # error bars half as long
    assert not low < float((z / 2).square().sum()) < high


# ---------------------------------------------------------------- by definition, a draw at a time


def slow_score_function(f, distribution, theta, x, baseline):
    """The definition for one problem: a loop over draws, components and the other draws."""
    n = len(x)
    values = [float(f(x_i[None])[0]) for x_i in x]
    scores = []
    for x_i in x:
        leaf = theta.clone().requires_grad_()
        scores.append(torch.autograd.grad(distribution(leaf).log_prob(x_i), leaf)[0].flatten())
    terms = torch.zeros(n, theta.numel(), dtype=torch.float64)
    for k in range(theta.numel()):
        for i in range(n):
            others = [j for j in range(n) if j != i]
            b = 0.0
            if baseline == "leave_one_out":
                b = sum(values[j] for j in others) / (n - 1)
            elif baseline == "optimal":
                squares = {j: float(scores[j][k]) ** 2 for j in others}
                b = sum(squares[j] * values[j] for j in others) / sum(squares.values())
            elif isinstance(baseline, Tensor):
                b = float(baseline.expand(theta.shape).flatten()[k])
            terms[i, k] = (values[i] - b) * scores[i][k]
    value, std_error = terms.mean(0), terms.std(0) / math.sqrt(n)
    return value.reshape(theta.shape), std_error.reshape(theta.shape)


def location_scale(theta: Tensor) -> Distribution:
    return Normal(theta[..., 0], theta[..., 1].exp())


def test_score_function_is_its_definition_problem_by_problem(rng):
    theta = torch.randn(3, 4, 2, dtype=torch.float64, generator=rng(8))
    theta_baseline = torch.randn(2, dtype=torch.float64, generator=rng(9))
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(x)
        return x.sin() + x**2

    for baseline in (None, theta_baseline, *FROM_OTHERS):
        seen.clear()
        found = score_function_gradient(
            f, location_scale, theta, 6, baseline=baseline, generator=rng(10)
        )
        (x,) = seen
        assert x.shape == (6, 3, 4)
        assert found.value.shape == found.std_error.shape == theta.shape
        for i in range(3):
            for j in range(4):
                expected = slow_score_function(f, location_scale, theta[i, j], x[:, i, j], baseline)
                torch.testing.assert_close(found.value[i, j], expected[0])
                torch.testing.assert_close(found.std_error[i, j], expected[1])


def test_pathwise_is_its_definition_problem_by_problem(rng):
    theta = torch.randn(3, 4, 2, dtype=torch.float64, generator=rng(11))
    found = pathwise_gradient(torch.sin, location_scale, theta, 6, generator=rng(12))
    noise = torch.empty(6, 3, 4, dtype=torch.float64).normal_(generator=rng(12))
    scale = theta[..., 1].exp()
    slope = (theta[..., 0] + scale * noise).cos()
    terms = torch.stack([slope, slope * scale * noise], -1)
    torch.testing.assert_close(found.value, terms.mean(0))
    torch.testing.assert_close(found.std_error, terms.std(0) / math.sqrt(6))


def test_parameters_may_have_any_number_of_dimensions(rng):
    # A linear map of two inputs to three logits: theta is a matrix, one problem.
    inputs = double(0.3, -1.2)

    def bits(weight: Tensor) -> Distribution:
        return Independent(Bernoulli(logits=weight @ inputs), 1)

    theta = torch.randn(3, 2, dtype=torch.float64, generator=rng(13), requires_grad=True)
    value = double(1.0, -2.0, 0.5)
    (exact,) = torch.autograd.grad((theta @ inputs).sigmoid() @ value, theta)
    for baseline in (None, *FROM_OTHERS):
        found = score_function_gradient(
            lambda x: x @ value, bits, theta, 20_000, baseline=baseline, generator=rng(14)
        )
        assert not found.value.requires_grad
        z = (found.value - exact) / found.std_error
        assert float(z.abs().max()) < z_limit(6)
        assert float(((found.value + exact) / found.std_error).abs().max()) > z_limit(6)


# ---------------------------------------------------------------- discrete: by enumeration


def test_categorical_gradients_agree_with_enumeration(rng, ledger):
    table = double(3.0, -1.0, 0.5, 10.0)
    logits = torch.randn(5, 4, dtype=torch.float64, generator=rng(15), requires_grad=True)
    (exact,) = torch.autograd.grad((logits.softmax(-1) @ table).sum(), logits)
    for baseline in (None, *FROM_OTHERS):
        found = score_function_gradient(
            lambda x: table[x],
            lambda t: Categorical(logits=t),
            logits,
            20_000,
            baseline=baseline,
            generator=rng(16),
        )
        z = (found.value - exact) / found.std_error
        assert float(z.abs().max()) < z_limit(20)
    ledger(
        "gradient of a categorical expectation by the score function",
        exact=exact[0, 0],
        estimate=found.value[0, 0],
        std_error=found.std_error[0, 0],
    )
    wrong = exact.flip(-1)  # the gradients of other components
    assert float(((found.value - wrong) / found.std_error).abs().max()) > z_limit(20)


def test_the_optimal_baseline_leaves_no_variance_for_one_bit(rng):
    # Two states: (f - b) s takes one value if b = (1 - p) f(1) + p f(0).
    p = double(0.3)
    theta = (p / (1 - p)).log()
    f1, f0 = (1 - 0.45) ** 2, 0.45**2
    found = score_function_gradient(
        lambda x: (x - 0.45) ** 2,
        lambda t: Bernoulli(logits=t),
        theta,
        100,
        baseline=float((1 - p) * f1 + p * f0),
        generator=rng(17),
    )
    assert found.value.item() == pytest.approx(float(p * (1 - p)) * 0.1, rel=1e-12)
    assert found.std_error.item() < 1e-15


def test_scores_of_zero_leave_a_baseline_undetermined_but_harmless(rng):
    # Logit 800: the score of the state that is always drawn is exactly 0.
    found = score_function_gradient(
        lambda x: x + 5.0,
        lambda t: Bernoulli(logits=t),
        double(800.0),
        10,
        baseline="optimal",
        generator=rng(18),
    )
    assert found.value.item() == found.std_error.item() == 0.0


def test_a_rare_state_does_not_cancel_the_other_weights():
    # Squared scores that differ by 1e20: subtracting the own term would lose the rest.
    x = double(1.0, 2e-20, 3e-20)
    torch.testing.assert_close(_sum_of_others(x), double(5e-20, 1.0, 1.0), rtol=1e-15, atol=0.0)
    assert float((x.sum() - x)[0]) == 0.0


# ---------------------------------------------------------------- many distributions, exactly


def gaussian_mixture(theta: Tensor) -> Distribution:
    """Weights softmax(theta), components N(-1, 1) and N(2, 1)."""
    means = theta.new_tensor([-1.0, 2.0]).expand(theta.shape)
    return MixtureSameFamily(Categorical(logits=theta), Normal(means, torch.ones_like(means)))


def sigmoid_slope(x: float) -> float:
    return float(scipy.special.expit(x) * scipy.special.expit(-x))


LAWS = {  # constructor, theta, f, exact gradient, which estimators apply
    "gamma": (lambda t: Gamma(t, 1.0), [1.7], torch.square, [4.4], "both"),
    "beta": (lambda t: Beta(t, 2.0), [1.5], lambda x: x, [2 / 3.5**2], "both"),
    "exponential": (Exponential, [0.8], lambda x: x, [-1 / 0.64], "both"),
    "laplace": (lambda t: Laplace(0.0, t), [0.7], torch.square, [4 * 0.7], "both"),
    "weibull": (lambda t: Weibull(t, 2.0), [1.5], torch.square, [3.0], "both"),
    "uniform": (lambda t: Uniform(0.0, t), [1.2], torch.square, [0.8], "pathwise"),
    "pareto": (lambda t: Pareto(t, 6.0), [1.3], lambda x: x, [1.2], "pathwise"),
    "poisson": (Poisson, [1.4], torch.square, [3.8], "score"),
    "mixture": (
        gaussian_mixture,
        [0.4, 0.0],
        lambda x: x,
        [-3 * sigmoid_slope(0.4), 3 * sigmoid_slope(0.4)],
        "score",
    ),
    "dirichlet": (  # E[x_0] = a_0 / sum(a)
        Dirichlet,
        [0.8, 1.5, 2.0],
        lambda x: x[..., 0],
        [3.5 / 4.3**2, -0.8 / 4.3**2, -0.8 / 4.3**2],
        "both",
    ),
    "several dimensions": (
        lambda t: Independent(Normal(t, 0.5), 1),
        [1.0, -2.0, 0.5],
        lambda x: x.square().sum(-1),
        [2.0, -4.0, 1.0],
        "both",
    ),
    "correlated": (
        lambda t: MultivariateNormal(t, scale_tril=t.new_tensor([[1.0, 0.0], [0.8, 0.5]])),
        [1.0, 3.0],
        lambda x: x.prod(-1),
        [3.0, 1.0],
        "both",
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_gradients_are_exact_for_many_distributions(rng, ledger, name):
    make, theta, f, exact, which = LAWS[name]
    theta, exact = double(*theta), double(*exact)
    found = {}
    if which != "pathwise":
        found["score function"] = score_function_gradient(
            f, make, theta, 50_000, baseline="leave_one_out", generator=rng(19)
        )
    if which != "score":
        found["pathwise"] = pathwise_gradient(f, make, theta, 50_000, generator=rng(19))
    for method, result in found.items():
        z = (result.value - exact) / result.std_error
        assert float(z.abs().max()) < z_limit(len(exact))
        assert float(((result.value + exact) / result.std_error).abs().min()) > Z  # the sign
        what = f"gradient of an expectation, {name} distribution, {method}"
        ledger(what, exact=exact[0], estimate=result.value[0], std_error=result.std_error[0])


def test_a_jump_is_lost_on_the_pathwise_gradient_but_not_on_the_score(rng):
    # P(X > 0) under N(mu, 1) has the gradient phi(mu).
    theta, exact = double(MU), scipy.stats.norm.pdf(MU)

    def indicator(x: Tensor) -> Tensor:
        return (x > 0).double()

    found = score_function_gradient(indicator, unit_normal, theta, 20_000, generator=rng(20))
    assert abs(float((found.value - exact) / found.std_error)) < Z
    with pytest.raises(ValueError, match=r"f\(x\) has no gradient.*use score_function_gradient"):
        pathwise_gradient(indicator, unit_normal, theta, 100, generator=rng(20))
    # Where autograd sees a slope on either side of the jump, nothing can warn.
    sawtooth = pathwise_gradient(torch.frac, unit_normal, theta, 100, generator=rng(20))
    assert sawtooth.value.item() == 1.0 and sawtooth.std_error.item() == 0.0


@pytest.mark.parametrize(
    "law", [lambda t: Uniform(0.0, t), lambda t: Independent(Uniform(-t, t), 1), LAWS["pareto"][0]]
)
def test_a_support_that_moves_is_refused_by_the_score_function(rng, law):
    # The score of U(0, theta) is -1/theta: it would make of dE[x]/dtheta = 1/2 a mean of -1/2.
    f = lambda x: x.sum(-1) if x.ndim > 2 else x  # noqa: E731
    with pytest.raises(ValueError, match="moves with theta.*use pathwise_gradient"):
        score_function_gradient(f, law, double(1.5), 10, generator=rng(21))


def test_a_distribution_without_support_is_not_refused(rng):
    class Unsupported(Normal):
        @property
        def support(self):
            raise NotImplementedError

    found = score_function_gradient(
        square,
        lambda t: Unsupported(t, 1.0, validate_args=False),
        double(MU),
        1000,
        generator=rng(22),
    )
    assert abs(float((found.value - EXACT) / found.std_error)) < Z


# ---------------------------------------------------------------- Gumbel-softmax


def test_the_largest_entry_has_the_categorical_law(rng):
    n = 100_000
    probs = double(0.1, 0.2, 0.3, 0.4)
    for temperature, hard in ((0.3, False), (0.3, True), (5.0, False)):
        y = gumbel_softmax(
            probs.log().expand(n, 4) + 7.0, temperature, hard=hard, generator=rng(23)
        )
        torch.testing.assert_close(y.sum(-1), torch.ones(n, dtype=torch.float64))
        counts = y.argmax(-1).bincount(minlength=4)
        assert scipy.stats.chisquare(counts, n * probs).pvalue > 1e-5
        assert scipy.stats.chisquare(counts, n * probs.flip(0)).pvalue < 1e-5
    # Normal noise instead of Gumbel noise is no exact sampler.
    normal = (probs.log() + torch.randn(n, 4, dtype=torch.float64, generator=rng(24))).argmax(-1)
    assert scipy.stats.chisquare(normal.bincount(minlength=4), n * probs).pvalue < 1e-5


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_two_states_have_the_binary_concrete_law(rng, temperature):
    # y_0 = sigmoid((l_0 - l_1 + logistic) / temperature)
    y = gumbel_softmax(double(0.7, -0.2).expand(20_000, 2), temperature, generator=rng(25))

    def cdf(y, temperature):
        return scipy.special.expit(temperature * scipy.special.logit(y) - 0.9)

    assert scipy.stats.kstest(y[:, 0], lambda y: cdf(y, temperature)).pvalue > 1e-5
    assert scipy.stats.kstest(y[:, 0], lambda y: cdf(y, 1.2 * temperature)).pvalue < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other(rng, dtype):
    logits = torch.randn(50, 3, dtype=dtype, generator=rng(26), requires_grad=True)
    weight = torch.randn(50, 3, dtype=dtype, generator=rng(27))
    soft = gumbel_softmax(logits, 0.7, generator=rng(28))
    hard = gumbel_softmax(logits, 0.7, hard=True, generator=rng(28))
    assert soft.dtype == hard.dtype == dtype
    assert torch.equal(hard, torch.nn.functional.one_hot(soft.argmax(-1), 3).to(dtype))
    through = [torch.autograd.grad((y * weight).sum(), logits)[0] for y in (soft, hard)]
    assert torch.equal(*through)
    assert float(through[0].abs().max()) > 0.01


def test_a_state_of_probability_zero_is_never_drawn(rng):
    logits = double(0.0, -math.inf, 1.0).requires_grad_()
    y = gumbel_softmax(logits.expand(1000, 3), 0.5, generator=rng(29))
    assert float(y.detach()[:, 1].max()) == 0.0
    (gradient,) = torch.autograd.grad(y[:, 0].sum(), logits)
    assert gradient.isfinite().all() and gradient[1] == 0.0


LOGIT, TARGET = 0.4, 0.45  # f(y) = (y_0 - 0.45)^2 of one bit with log-odds 0.4
BIT_GRADIENT = sigmoid_slope(LOGIT) * ((1 - TARGET) ** 2 - TARGET**2)


def relaxed_moment(temperature: float, hard: bool, power: int = 1) -> float:
    """E[(one term of the relaxed gradient)^power] by quadrature over the logistic noise."""

    def term(u: float) -> float:
        y = scipy.special.expit((LOGIT + scipy.special.logit(u)) / temperature)
        slope = y * (1 - y) / temperature
        return float((2 * ((y > 0.5 if hard else y) - TARGET) * slope) ** power)

    middle = scipy.special.expit(-LOGIT)
    return scipy.integrate.quad(term, 0, 1, points=[middle], limit=500)[0]


@pytest.mark.parametrize("hard", [False, True])
def test_the_relaxed_gradient_is_unbiased_for_its_own_problem_only(rng, ledger, hard):
    n = 500_000
    for temperature in (0.25, 0.5, 1.0):
        logits = double(LOGIT, 0.0).expand(n, 2).requires_grad_()
        y = gumbel_softmax(logits, temperature, hard=hard, generator=rng(30))
        (gradients,) = torch.autograd.grad((y[:, 0] - TARGET).square().sum(), logits)
        terms = gradients[:, 0]
        ledger(
            f"relaxed gradient at temperature {temperature}"
            + (", straight-through" if hard else ", Gumbel-softmax"),
            exact=relaxed_moment(temperature, hard),
            estimate=terms.mean(),
            std_error=terms.std() / math.sqrt(n),
        )
        assert abs(z_score(terms, BIT_GRADIENT)) > Z  # the gradient of the bit is another number
    # The score function has no such bias.
    found = score_function_gradient(
        lambda x: (x[..., 0] - TARGET) ** 2,
        lambda t: OneHotCategorical(logits=t),
        double(LOGIT, 0.0),
        n,
        generator=rng(31),
    )
    assert abs(float((found.value[0] - BIT_GRADIENT) / found.std_error[0])) < Z


def test_bias_vanishes_with_the_temperature_and_variance_explodes():
    # By quadrature: a halved temperature halves the bias and doubles the variance ...
    for hard in (False, True):
        bias = [relaxed_moment(t, hard) - BIT_GRADIENT for t in (0.1, 0.05, 0.025)]
        variance = [
            relaxed_moment(t, hard, 2) - relaxed_moment(t, hard) ** 2 for t in (0.1, 0.05, 0.025)
        ]
        for i in range(2):
            assert bias[i + 1] / bias[i] == pytest.approx(0.5, rel=0.1)
            assert variance[i + 1] / variance[i] == pytest.approx(2.0, rel=0.1)
    # ... but only there. Far from 0 the bias even changes sign: no rule of "colder is better".
    soft = [relaxed_moment(t, False) - BIT_GRADIENT for t in (2.0, 1.0, 0.5, 0.25)]
    assert soft[0] < 0 < soft[1] < soft[3] < soft[2]


def test_pytorchs_relaxed_and_straight_through_distributions_are_biased_as_predicted(rng):
    n, theta = 200_000, double(LOGIT, 0.0)
    f = lambda x: (x[..., 0] - TARGET) ** 2  # noqa: E731
    relaxed = pathwise_gradient(
        f,
        lambda t: RelaxedOneHotCategorical(t.new_tensor(0.5), logits=t),
        theta,
        n,
        generator=rng(32),
    )
    p = scipy.special.expit(LOGIT)
    through = pathwise_gradient(
        f, lambda t: OneHotCategoricalStraightThrough(logits=t), theta, n, generator=rng(33)
    )
    # E[f'(x)] p (1 - p) with x the bit: the slope at the ends instead of the rise between them.
    predicted = (p * 2 * (1 - TARGET) - (1 - p) * 2 * TARGET) * p * (1 - p)
    for found, exact in ((relaxed, relaxed_moment(0.5, False)), (through, predicted)):
        assert abs(float((found.value[0] - exact) / found.std_error[0])) < Z
        assert abs(float((found.value[0] - BIT_GRADIENT) / found.std_error[0])) > Z


# ---------------------------------------------------------------- randomness, devices, grad modes


def test_the_generator_alone_decides_the_result(rng):
    before = torch.get_rng_state()
    for estimator in (score_function_gradient, pathwise_gradient):
        first, again, other = (
            estimator(square, unit_normal, double(MU), 100, generator=rng(seed)).value
            for seed in (37, 37, 38)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)
    gumbel_softmax(torch.zeros(3), 1.0, generator=rng(37))
    assert torch.equal(before, torch.get_rng_state())
    assert pathwise_gradient(square, unit_normal, double(MU), 10).value.isfinite().all()


def test_the_surrounding_grad_mode_does_not_matter(rng):
    leaf = torch.nn.Parameter(double(MU))
    found = [
        estimator(square, unit_normal, leaf, 100, generator=rng(39)).value
        for estimator in (score_function_gradient, pathwise_gradient)
    ]
    with torch.no_grad():
        assert torch.equal(
            score_function_gradient(square, unit_normal, leaf, 100, generator=rng(39)).value,
            found[0],
        )
        assert torch.equal(
            pathwise_gradient(square, unit_normal, leaf, 100, generator=rng(39)).value, found[1]
        )
    assert leaf.grad is None


def test_the_score_function_does_not_differentiate_f(rng):
    def watched(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not x.requires_grad
        return square(x)

    score_function_gradient(watched, unit_normal, double(MU), 10, generator=rng(40))


def test_results_follow_the_device_of_theta(rng, device):
    theta = torch.tensor([[0.5, 0.1], [0.2, 0.3]], device=device)
    generator = rng(41, device)
    for baseline in (None, theta, *FROM_OTHERS):
        found = score_function_gradient(
            square, location_scale, theta, 10, baseline=baseline, generator=generator
        )
        assert found.value.device.type == device.type
    found = pathwise_gradient(square, location_scale, theta, 10, generator=generator)
    assert found.value.device.type == device.type
    for hard in (False, True):
        y = gumbel_softmax(theta, 1.0, hard=hard, generator=generator)
        assert y.device.type == device.type


def test_no_tensor_is_made_on_the_default_device(rng):
    theta, generator = torch.tensor([[0.5, 0.1], [0.2, 0.3]]), rng(42)
    with torch.device("meta"):
        for baseline in (None, 1.0, theta, *FROM_OTHERS):
            found = score_function_gradient(
                square, location_scale, theta, 10, baseline=baseline, generator=generator
            )
            assert found.value.isfinite().all() and found.std_error.isfinite().all()
        found = pathwise_gradient(square, location_scale, theta, 10, generator=generator)
        assert found.value.isfinite().all()
        for hard in (False, True):
            assert gumbel_softmax(theta, 1.0, hard=hard, generator=generator).sum().isfinite()


# ---------------------------------------------------------------- bad input


def test_a_distribution_without_paths_names_the_other_estimator():
    for make in (Poisson, lambda t: Bernoulli(logits=t), lambda t: VonMises(t, 1.0)):
        with pytest.raises(TypeError, match="use score_function_gradient"):
            pathwise_gradient(square, make, double(0.5), 10)


class Bare(Distribution):
    """A distribution whose draws forget its parameters."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(self, theta: Tensor) -> None:
        super().__init__(theta.shape, validate_args=False)

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return torch.zeros(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)


ONE = torch.tensor([0.5])
BOTH = {  # what: f, distribution, theta, n, error, message
    "no constructor": (square, Normal(0.0, 1.0), ONE, 10, TypeError, "makes a torch.*got Normal$"),
    "constructor of something else": (square, lambda t: t, ONE, 10, TypeError, "got Tensor$"),
    "number": (square, unit_normal, 0.5, 10, TypeError, "theta must be a floating.*got float"),
    "integers": (square, unit_normal, ONE.long(), 10, TypeError, "got dtype torch.int64"),
    "NaN": (square, unit_normal, ONE * math.nan, 10, ValueError, "theta has 1 NaN"),
    "one sample": (square, unit_normal, ONE, 1, ValueError, "num_samples must be at least 2"),
    "fractional samples": (square, unit_normal, ONE, 2.5, TypeError, "num_samples must be an int"),
    "batch that theta lacks": (
        square,
        lambda t: Normal(t[..., :1] + torch.zeros(3), 1.0),
        ONE,
        10,
        ValueError,
        r"batch shape of the distribution: that is \(3,\), theta has \(1,\)",
    ),
    "indexed from the front": (
        square,
        lambda t: Normal(t[0], t[1].exp()),
        torch.zeros(2),
        2,  # as many samples as parameters: the sizes fit by coincidence
        ValueError,
        r"3 by 3 of them.*gave \(3, 2\).*expected \(3, 3\).*theta\[..., 0\]",
    ),
    "column of the wrong dimension": (
        square,
        lambda t: Normal(t[:, 0], t[:, 1].exp()),
        torch.zeros(2, 2),
        10,
        ValueError,
        r"gave \(3, 2, 2\) as batch shape, expected \(3, 3, 2\)",
    ),
    "index out of range": (
        square,
        lambda t: Normal(t[2], 1.0),
        torch.zeros(3),
        10,
        ValueError,
        "gave an IndexError",
    ),
    "draws mixed": (
        lambda x: square(x).mean(),
        unit_normal,
        ONE,
        10,
        ValueError,
        r"for draws of shape \(10, 1\) it gave \(\), expected \(10, 1\)",
    ),
    "event taken for problems": (
        lambda x: x.sum(-1),
        unit_normal,
        torch.zeros(4),
        10,
        ValueError,
        r"gave \(10,\), expected \(10, 4\). Mend f, or join dimensions.*Independent",
    ),
    "f no tensor": (lambda x: 3.0, unit_normal, ONE, 10, TypeError, "f.x. must be a torch.Tensor"),
    "f NaN": (lambda x: x.log(), unit_normal, ONE - 5, 10, ValueError, r"f\(x\) has 10 NaN"),
    "theta cut off": (
        square,
        lambda t: Normal(t.detach(), 1.0),
        ONE,
        10,
        ValueError,
        "has no gradient with respect to theta",
    ),
    "theta ignored": (square, Bare, ONE, 10, ValueError, "has no gradient with respect to theta"),
}


@pytest.mark.parametrize("estimator", [score_function_gradient, pathwise_gradient])
@pytest.mark.parametrize("what", BOTH)
def test_bad_input_gets_a_sentence(estimator, what):
    f, make, theta, n, error, message = BOTH[what]
    with pytest.raises(error, match=message):
        estimator(f, make, theta, n)


@pytest.mark.parametrize(
    ("baseline", "error", "message"),
    [
        ("mean", ValueError, r"a number or one of \('leave_one_out', 'optimal'\), got 'mean'"),
        (math.inf, ValueError, "baseline must be a finite number"),
        ([1.0], TypeError, "baseline must be a number"),
        (double(1.0, math.nan), ValueError, "baseline has 1 NaN"),
        (torch.zeros(3), ValueError, r"baseline must broadcast to \(2,\), as theta; got \(3,\)"),
        (torch.zeros(10, 2), ValueError, r"broadcast to \(2,\), as theta; got \(10, 2\)"),
    ],
)
def test_a_bad_baseline_is_refused_before_f_is_called(baseline, error, message):
    def never(x: Tensor) -> Tensor:
        raise AssertionError("f was called")

    with pytest.raises(error, match=message):
        score_function_gradient(never, unit_normal, torch.zeros(2), 10, baseline=baseline)


def test_a_gradient_that_is_not_finite_is_refused(rng):
    with pytest.raises(ValueError, match=r"the gradient of f\(x\) has 10 NaN"):
        pathwise_gradient(
            # Autograd multiplies the slope of the branch not taken, which is NaN, by zero.
            lambda x: torch.where(x > 0, x.sqrt(), 0.0),
            unit_normal,
            double(-50.0),
            10,
            generator=rng(43),
        )


def test_gradients_of_something_else_do_not_count(rng):
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"f\(x\) has no gradient with respect to theta"):
        pathwise_gradient(lambda x: x.detach() + weight, unit_normal, ONE, 10, generator=rng(44))
    with pytest.raises(ValueError, match="log p_theta.x. has no gradient with respect to theta"):
        score_function_gradient(
            square, lambda t: Normal(weight + 0 * t.detach(), 1.0), ONE, 10, generator=rng(44)
        )


@pytest.mark.parametrize("estimator", [score_function_gradient, pathwise_gradient])
def test_a_generator_must_be_one_on_the_device_of_theta(estimator):
    with pytest.raises(TypeError, match="generator must be a torch.Generator"):
        estimator(square, unit_normal, ONE, 10, generator=3)


@pytest.mark.parametrize(
    ("logits", "temperature", "error", "message"),
    [
        (torch.zeros(3), 0.0, ValueError, "temperature must be a finite number above 0.0"),
        (torch.zeros(3), -1.0, ValueError, "temperature must be"),
        (torch.zeros(3), "cold", TypeError, "temperature must be a number"),
        (torch.tensor(1.0), 1.0, ValueError, re.escape("logits must have shape (..., k)")),
        ([0.0, 1.0], 1.0, TypeError, "logits must be a floating-point tensor, got list"),
        (torch.zeros(3).long(), 1.0, TypeError, "got dtype torch.int64"),
        (double(0.0, math.nan), 1.0, ValueError, "log-sum-exp of the logits has 1 NaN"),
        (double(0.0, math.inf), 1.0, ValueError, "log-sum-exp of the logits"),
        (double(-math.inf, -math.inf), 1.0, ValueError, "log-sum-exp of the logits"),
        (torch.zeros(2, 0), 1.0, ValueError, "log-sum-exp of the logits"),
    ],
)
def test_gumbel_softmax_refuses_what_has_no_law(logits, temperature, error, message):
    with pytest.raises(error, match=message):
        gumbel_softmax(logits, temperature)
