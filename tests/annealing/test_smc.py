"""Sequential Monte Carlo against exact answers; every statistical claim with mutants that fail."""

import itertools
import math
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, Uniform

from companion.annealing import adaptive_schedule, lineage, smc
from companion.annealing.population import conditional_ess_beta, stages
from companion.importance import effective_sample_size, importance_sampling, log_mean_weight
from companion.mcmc import metropolis_hastings, random_walk
from companion.models.rbm import RBM
from companion.monte_carlo import estimate
from companion.targets import Gaussian
from companion.tempering import GeometricPath, advance, likelihood_path
from companion.testing import binary_states
from tests.calibration import is_calibrated, z_score
from tests.mcmc.exact_targets import plant
from tests.tempering.exact_paths import exact_path, log_z_at, moments_at

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
F64 = torch.float64
SCHEMES = ("multinomial", "stratified", "systematic", "residual")
BETAS = [0.0, 0.1, 0.45, 1.0]
MODULE = sys.modules["companion.annealing.smc"]  # the package's attribute is the function


def laws(dtype=F64, device="cpu") -> tuple[Gaussian, Gaussian]:
    like = {"dtype": dtype, "device": device}
    target = torch.tensor([[1.0, -0.4], [-0.4, 0.5]], **like)
    wide = Gaussian(torch.tensor([0.5, -0.5], **like), 4.0 * torch.eye(2, **like))
    return wide, Gaussian(torch.tensor([1.0, 1.5], **like), target)


def path_of(kernel: str, dtype=F64, device="cpu") -> GeometricPath:
    """Moves that forget everything, that mix well, or that hardly move."""
    if kernel == "exact":
        return exact_path(*laws(dtype, device))
    size = 1.0 if kernel == "walk" else 0.05
    return GeometricPath(*laws(dtype, device), lambda log_prob: random_walk(log_prob, size))


LOG_Z = laws()[1].log_z


class Coin:
    """Two states of log-density 0 and a beta, with exact moves; no method that is not needed."""

    def __init__(self, a: float) -> None:
        self.a, self.base_log_z = a, math.log(2.0)

    def sample_base(self, n: int, *, generator=None) -> Tensor:
        return (torch.rand(n, dtype=F64, generator=generator) < 0.5).double()

    def log_prob(self, x: Tensor, beta) -> Tensor:
        return self.a * beta * x

    def step(self, x: Tensor, beta, *, generator=None) -> Tensor:
        up = 1 / (1 + math.exp(-self.a * beta))
        return (torch.rand(x.shape, dtype=F64, generator=generator) < up).double()


# Each replaces a line of `stages`: a run that weighs, resamples or moves wrongly.
WEIGH = "at = profile(path, x)\n        new = next_beta(at, beta, log_weights)"
RESET = "log_weights = torch.where(resampled, total - math.log(n), log_weights)"
MUTANTS = {
    "weighs at the point after the move": (
        WEIGH,
        "new = next_beta(None, beta, log_weights)\n"
        "        x = path.step(x, new, generator=generator)\n        at = profile(path, x)",
    ),
    "moves at the beta before": ("path.step(x, new", "path.step(x, beta"),
    "forgets the mean weight": (RESET, "log_weights = torch.where(resampled, 0.0, log_weights)"),
    "gives the sum, not the mean": (RESET, RESET.replace(" - math.log(n)", "")),
    "weighs the chosen again": (RESET, "log_weights = log_weights.gather(0, ancestors)"),
    "keeps the weights in place": (RESET, ""),
}


# ---------------------------------------------------------------- agreement with exact answers


def test_smc_agrees_with_the_exact_answers_of_a_normal_law(rng, ledger):
    found = smc(path_of("walk"), 10_000, num_moves=3, generator=rng(0))
    mean, covariance = moments_at(*laws(), 1.0)
    first = found.expectation(lambda x: x)
    cross = found.expectation(lambda x: (x[:, 0] - mean[0]) * (x[:, 1] - mean[1]))
    for what, exact, got in (
        ("log Z of a normal law by SMC, its own schedule", LOG_Z, found.log_z),
        ("covariance of a normal law by SMC", covariance[0, 1], cross),
    ):
        ledger(what, exact=exact, estimate=got.value, std_error=got.std_error)
    assert ((first.value - mean) / first.std_error).abs().max() < Z
    # As if the particles were equally weighted draws of the base.
    assert abs(found.x.mean(0) - laws()[0].mean).min() > 20 * first.std_error.max()


def test_smc_finds_the_evidence_of_a_conjugate_model(rng, ledger):
    y = torch.tensor([1.2, 0.3, 2.1, 0.8, 1.9, 1.4], dtype=F64)
    prior = Normal(torch.zeros((), dtype=F64), 2.0)

    def log_likelihood(theta: Tensor) -> Tensor:
        return Normal(theta[..., None], 1.0).log_prob(y).sum(-1)

    path = likelihood_path(prior, log_likelihood, lambda density: random_walk(density, 1.0))
    found = smc(path, 500, num_replicates=20, generator=rng(1))
    n = len(y)
    marginal = MultivariateNormal(torch.zeros(n, dtype=F64), torch.eye(n, dtype=F64) + 4.0)
    mean = found.expectation(lambda theta: theta)
    ledger(
        "log evidence of a normal mean with a normal prior, by SMC",
        exact=marginal.log_prob(y),
        estimate=found.log_z.value,
        std_error=found.log_z.std_error,
    )
    ledger(
        "posterior mean of a normal mean with a normal prior, by SMC",
        exact=y.sum() / (n + 0.25),
        estimate=mean.value,
        std_error=mean.std_error,
    )
    unnormalised_prior = 0.5 * math.log(2 * math.pi * 4)  # the constant most often dropped
    assert abs(found.log_z.value + unnormalised_prior - marginal.log_prob(y)) > 0.5


def test_smc_weighs_two_separate_modes_rightly(rng, ledger):
    def log_prob(x: Tensor) -> Tensor:
        return torch.logaddexp(
            math.log(0.3) - 2.0 * (x + 4).square(), math.log(0.7) - 2.0 * (x - 4).square()
        )

    base = Normal(torch.zeros((), dtype=F64), 4.0)
    path = GeometricPath(base, log_prob, lambda density: random_walk(density, 0.7))
    found = smc(path, 2000, num_replicates=20, generator=rng(2))
    share = found.expectation(lambda x: x > 0)
    ledger(
        "share of the right one of two modes, by SMC",
        exact=0.7,
        estimate=share.value,
        std_error=share.std_error,
    )
    ledger(
        "log Z of two separate modes, by SMC",
        exact=0.5 * math.log(math.pi / 2),
        estimate=found.log_z.value,
        std_error=found.log_z.std_error,
    )
    assert share.std_error < 0.02 and abs(share.value - 0.5) > Z * share.std_error


# ---------------------------------------------------------------- unbiasedness


@pytest.mark.parametrize("kernel", ["exact", "walk", "poor"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_estimate_of_z_is_unbiased_however_badly_the_moves_mix(rng, kernel, scheme):
    for threshold in (0.5, 1.0):
        found = smc(
            path_of(kernel),
            6,
            betas=BETAS,
            scheme=scheme,
            ess_threshold=threshold,
            num_replicates=10_000,
            generator=rng(3),
        )
        assert abs(z_score((found.replicate_log_z - LOG_Z).exp(), 1.0)) < Z
        # The logarithm is biased (Jensen), and the check sees it.
        assert z_score(found.replicate_log_z, LOG_Z) < -Z


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_runs_are_biased(rng, monkeypatch, mutant):
    plant(monkeypatch, stages, *MUTANTS[mutant], where=MODULE)
    run = {"betas": BETAS, "num_replicates": 10_000, "generator": rng(3)}
    found = smc(path_of("walk"), 6, **run)
    assert abs(z_score((found.replicate_log_z - LOG_Z).exp(), 1.0)) > Z


STATES = binary_states(3, dtype=F64)
TABLE = torch.tensor([0.5, -torch.inf, 1.0, 2.0, -1.0, 0.0, 2.5, -2.0], dtype=F64)


def discrete_path(table: Tensor = TABLE) -> GeometricPath:
    """Eight states, one of them forbidden by the target; a flip of one bit in turn of three."""

    class Fair:
        def sample(self, n: int, *, generator=None) -> Tensor:
            return STATES[torch.randint(8, (n,), generator=generator)]

        def log_prob(self, x: Tensor) -> Tensor:
            return x.new_full(x.shape[:-1], -3.0 * math.log(2.0))

    def log_prob(x: Tensor) -> Tensor:
        return table[(x @ torch.tensor([4.0, 2.0, 1.0], dtype=F64)).long()]

    def flip(x: Tensor, *, generator=None) -> Tensor:
        which = torch.randint(3, x.shape[:-1], generator=generator)
        return (x - torch.eye(3, dtype=F64)[which]).abs()

    return GeometricPath(Fair(), log_prob, lambda density: metropolis_hastings(density, flip))


def worst_state(found) -> float:
    """The largest z-score of the unbiased estimates of `p~(s)`, the mean weight in state s."""
    m = len(found.replicate_log_z)
    index = (found.x @ torch.tensor([4.0, 2.0, 1.0], dtype=F64)).long().reshape(m, -1)
    weights = found.log_weights.exp().reshape(m, -1)
    mass = torch.zeros(m, 8, dtype=F64).scatter_add_(1, index, weights) / index.shape[1]
    alive = TABLE.isfinite()
    if mass[:, ~alive].any():
        return math.inf
    got = estimate(mass[:, alive])
    return float(((got.value - TABLE[alive].exp()) / got.std_error).abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_mean_weight_in_each_state_is_unbiased(rng, scheme, ledger):
    assert torch.equal(
        STATES @ torch.tensor([4.0, 2.0, 1.0], dtype=F64), torch.arange(8.0).double()
    )
    found = smc(
        discrete_path(), 5, betas=BETAS, scheme=scheme, num_replicates=20_000, generator=rng(4)
    )
    assert worst_state(found) < 4.9  # 1e-5 over the seven states
    if scheme == "systematic":
        ledger(
            "log Z of eight states, by SMC of five particles",
            exact=TABLE.logsumexp(0),
            estimate=found.log_z.value,
            std_error=found.log_z.std_error,
        )
        probability = found.expectation(lambda x: x[:, 0])
        ledger(
            "probability of the first bit, by SMC of five particles",
            exact=TABLE.softmax(0)[4:].sum(),
            estimate=probability.value,
            std_error=probability.std_error,
        )


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_runs_are_biased_in_some_state(rng, monkeypatch, mutant):
    plant(monkeypatch, stages, *MUTANTS[mutant], where=MODULE)
    run = {"betas": BETAS, "num_replicates": 20_000, "generator": rng(4)}
    assert worst_state(smc(discrete_path(), 5, **run)) > 4.9


# ---------------------------------------------------------------- the exact variance


def chi_squares() -> Tensor:
    """Variance of each stage's increment under exact draws, relative to its squared mean.

    `E[w^2] / E[w]^2 = Z(2 b' - b) Z(b) / Z(b')^2`: the path goes on beyond b'.
    """
    betas = torch.tensor(BETAS, dtype=F64)
    before, after = betas[:-1], betas[1:]
    ahead, at, to = (log_z_at(*laws(), b) for b in (2 * after - before, before, after))
    return (ahead + at - 2 * to).expm1()


def test_variance_with_exact_moves_is_the_closed_form(rng):
    n, c = 100, chi_squares()
    assert (c > 0.2).all() and c.max() < 3.0
    # Resampled at every stage, all stages are independent means of n; never resampled, all weights
    # are independent products.
    exact = {1.0: (c / n).log1p().sum().expm1(), 0.0: c.log1p().sum().expm1() / n}
    assert exact[1.0] == pytest.approx(float(c.sum()) / n, rel=0.01)
    z = {}
    for threshold, scheme in (1.0, "multinomial"), (1.0, "systematic"), (0.0, "systematic"):
        run = {"betas": BETAS, "ess_threshold": threshold, "scheme": scheme}
        found = smc(path_of("exact"), n, num_replicates=1000, generator=rng(5), **run)
        z[threshold] = (found.replicate_log_z - LOG_Z).expm1() / exact[threshold].sqrt()
        assert is_calibrated(z[threshold])
    for right, wrong in (0.0, 1.0), (1.0, 0.0):
        assert not is_calibrated(z[right] * (exact[right] / exact[wrong]).sqrt())


# ---------------------------------------------------------------- standard errors


def test_standard_errors_from_replicates_are_calibrated(rng):
    path, g, z, of_mean, forgetful = path_of("walk"), rng(6), [], [], []
    mean = float(moments_at(*laws(), 1.0)[0][1])
    for _ in range(200):
        found = smc(path, 60, betas=BETAS, num_replicates=30, generator=g)
        z.append((found.log_z.value - LOG_Z) / found.log_z.std_error)
        second = found.expectation(lambda x: x[:, 1])
        of_mean.append((second.value - mean) / second.std_error)
        # As if all particles were independent.
        share = found.log_weights.softmax(0)
        error = (share * (found.x[:, 1] - second.value)).square().sum().sqrt()
        forgetful.append((second.value - mean) / error)
    assert is_calibrated(torch.stack(z))
    assert is_calibrated(torch.stack(of_mean))
    assert not is_calibrated(torch.stack(z) / math.sqrt(30))  # the spread, not that of the mean
    assert not is_calibrated(torch.stack(forgetful))


@pytest.mark.parametrize(("kernel", "threshold"), [("exact", 1.0), ("poor", 0.5)])
def test_standard_errors_from_the_families_of_one_run_are_calibrated(rng, kernel, threshold):
    path, g, n, z = path_of(kernel), rng(7), 1000, []
    mean = float(moments_at(*laws(), 1.0)[0][1])
    for _ in range(200):
        run = {"betas": BETAS, "scheme": "multinomial", "ess_threshold": threshold}
        found = smc(path, n, generator=g, **run)
        second = found.expectation(lambda x: x[:, 1])
        error = found.log_z.value - LOG_Z
        among_families = n / (n - 1) * (squared_shares(found)[0] - 1 / n)
        last_weights = log_mean_weight(found.log_weights).std_error
        forgetful = (found.x[:, 1] - second.value).square().mean().sqrt() / math.sqrt(n)
        z.append(
            torch.stack(
                [
                    error / found.log_z.std_error,
                    (second.value - mean) / second.std_error,
                    error / among_families.sqrt(),
                    error / (last_weights + 1e-9),
                    (second.value - mean) / forgetful,
                ]
            )
        )
    log_z, of_mean, among_families, last_weights, forgetful = torch.stack(z, 1)
    assert is_calibrated(log_z)
    assert is_calibrated(of_mean)
    assert not is_calibrated(last_weights)
    if kernel == "exact":  # where resampling at every stage shows most
        assert not is_calibrated(among_families)
    else:
        assert not is_calibrated(forgetful)


@pytest.mark.parametrize("scheme", ["stratified", "systematic", "residual"])
def test_standard_errors_of_one_run_are_cautious_for_the_other_schemes(rng, scheme):
    # Exact moves are the worst case: the truth is smallest beside what resampling adds.
    n, m, run = 200, 1000, {"betas": BETAS, "scheme": scheme, "ess_threshold": 1.0}
    exact = (chi_squares() / n).log1p().sum().expm1()
    found = smc(path_of("exact"), n, num_replicates=m, generator=rng(8), **run)
    variance = n / (n - 1) * (squared_shares(found) - 1 / n)
    assert z_score(variance, float(exact)) > Z
    assert variance.mean() / exact < 2.0  # 1.2 (systematic), 1.4, 1.8 (residual)
    # The correction for multinomial resampling would not be cautious here.
    assert z_score(1 - (n / (n - 1)) ** 4 * (1 - squared_shares(found)), float(exact)) < -Z
    one = smc(path_of("exact"), n, generator=rng(8), **run)
    torch.testing.assert_close(
        one.log_z.std_error, (n / (n - 1) * (squared_shares(one)[0] - 1 / n)).sqrt()
    )


def squared_shares(found) -> Tensor:
    """Of each replicate, the sum over families of their squared shares of its weight."""
    m = len(found.replicate_log_z)
    share = found.log_weights.reshape(m, -1).softmax(1).reshape(-1)
    families = torch.zeros_like(share).index_add_(0, found.eve, share)
    return families.reshape(m, -1).square().sum(1)


def test_the_variance_from_families_is_unbiased_also_for_few_particles(rng):
    n, m = 12, 10_000
    for kernel, threshold in ("exact", 1.0), ("walk", 0.5), ("poor", 0.0):
        run = {"betas": BETAS, "scheme": "multinomial", "ess_threshold": threshold}
        found = smc(path_of(kernel), n, num_replicates=m, generator=rng(9), **run)
        relative = (found.replicate_log_z - LOG_Z).exp()
        squares, power = squared_shares(found), found.resampled.sum(0) + 1
        variance = 1 - (n / (n - 1)) ** power * (1 - squares)
        error = (relative - 1).square()
        assert abs(z_score(relative.square() * variance - error, 0.0)) < Z
        if threshold > 0:  # one factor too few
            wrong = 1 - (n / (n - 1)) ** (power - 1) * (1 - squares)
            assert abs(z_score(relative.square() * wrong - error, 0.0)) > Z
    one = smc(path_of("walk"), 200, betas=BETAS, scheme="multinomial", generator=rng(10))
    power = int(one.resampled.sum()) + 1
    assert power > 1
    variance = 1 - (200 / 199) ** power * (1 - squared_shares(one)[0])
    torch.testing.assert_close(one.log_z.std_error, variance.sqrt())


# ---------------------------------------------------------------- the adaptive schedule


def conditional_ess(log_prob: Tensor, delta: float, log_weights: Tensor) -> float:
    """By its definition, of particles whose log-density is `beta log_prob`."""
    w, share = (delta * log_prob).exp(), log_weights.softmax(0)
    return float((share * w).sum() ** 2 / (share * w.square()).sum())


@pytest.mark.parametrize("target", [0.05, 0.5, 0.9, 0.999])
def test_the_next_beta_has_the_conditional_effective_sample_size_asked_for(rng, target):
    log_weights = torch.randn(2000, 1, generator=rng(11), dtype=F64)
    for scale in (3.0, 300.0, 3e7):
        log_prob = scale * torch.randn(2000, 1, generator=rng(12), dtype=F64).exp()
        calls = []

        def at(beta, log_prob=log_prob, calls=calls):
            calls.append(beta)
            return beta * log_prob

        found = conditional_ess_beta(at, 0.3, log_weights, target)
        assert 0.3 < found < 1.0 and len(calls) < 100
        got = conditional_ess(log_prob - log_prob.max(), found - 0.3, log_weights)
        # The definition cancels more digits than the logarithms do.
        assert math.log(got) == pytest.approx(math.log(target), rel=1e-3 if scale < 1e6 else 0.02)
    # The effective sample size of the weights that result is something else.
    both = effective_sample_size(log_weights + (found - 0.3) * log_prob) / 2000
    assert abs(both - target) > 0.01 * target
    assert (
        conditional_ess_beta(lambda beta: 1e-4 * beta * log_prob / scale, 0.3, log_weights, 0.5)
        == 1
    )


def test_particles_that_the_target_forbids_do_not_hold_the_schedule_up(rng):
    log_prob = torch.randn(1000, 1, generator=rng(13), dtype=F64)
    log_weights = torch.zeros(1000, 1, dtype=F64)
    alone = conditional_ess_beta(lambda beta: beta * 9 * log_prob[::4], 0.0, log_weights[::4], 0.6)
    log_prob[torch.arange(1000) % 4 != 0] = -torch.inf

    def at(beta):
        return torch.zeros_like(log_prob) if beta == 0 else beta * 9 * log_prob

    assert conditional_ess_beta(at, 0.0, log_weights, 0.6) == pytest.approx(alone, rel=1e-12)
    inside = Uniform(torch.tensor(-5.0, dtype=F64), 5.0)
    path = GeometricPath(
        inside,
        lambda x: torch.where(x > 3, -20.0 * (x - 3), -torch.inf),
        lambda density: random_walk(density, 0.3),
    )
    assert 3 < len(adaptive_schedule(path, 1000, generator=rng(14))) < 10


def test_the_schedule_is_that_of_the_exact_divergences(rng):
    betas = adaptive_schedule(path_of("exact"), 50_000, 0.7, ess_threshold=1.0, generator=rng(15))
    assert betas[0] == 0 and betas[-1] == 1 and len(betas) > 4
    before, after = betas[:-2], betas[1:-1]
    ahead, at, to = (log_z_at(*laws(), b) for b in (2 * after - before, before, after))
    shares = (2 * to - ahead - at).exp()
    torch.testing.assert_close(shares, torch.full_like(shares, 0.7), atol=0.015, rtol=0)
    with_less = adaptive_schedule(path_of("exact"), 5000, 0.4, generator=rng(16))
    assert len(with_less) < len(betas)


def test_the_search_evaluates_no_density_and_a_stage_costs_what_is_said(rng):
    calls = 0

    def log_prob(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return laws()[1].log_prob(x)

    path = GeometricPath(
        laws()[0], log_prob, lambda density: random_walk(density, 1.0), num_steps=4
    )
    calls = 0
    betas = adaptive_schedule(path, 100, num_moves=2, generator=rng(17))
    assert calls == (len(betas) - 1) * (2 * (4 + 1) + 1)
    calls = 0
    smc(path, 100, betas=betas, num_moves=2, generator=rng(17))
    assert calls == (len(betas) - 1) * (2 * (4 + 1) + 1)


def test_betas_that_depend_on_their_particles_bias_the_estimate_and_frozen_ones_do_not(rng):
    # The expected estimate of three particles with exact moves, resampled at each stage, by
    # enumerating how many of them are in the upper state.
    n, path, equal = 3, Coin(6.0), torch.zeros(3, 1, dtype=F64)

    def expected(beta: float, betas=None) -> float:
        """Of the remaining factors."""
        if beta == 1.0:
            return 1.0
        up, total = 1 / (1 + math.exp(-path.a * beta)), 0.0
        for k in range(n + 1):
            x = (torch.arange(n) < k).double()[:, None]
            if betas is None:
                new = conditional_ess_beta(lambda b, x=x: path.log_prob(x, b), beta, equal, 0.8)
            else:
                new = min(b for b in betas if b > beta)
            factor = (k * math.exp(path.a * (new - beta)) + n - k) / n
            total += math.comb(n, k) * up**k * (1 - up) ** (n - k) * factor * expected(new, betas)
        return total

    exact = math.log1p(math.exp(path.a))
    assert 2 * expected(0.0, [0.2, 0.7, 1.0]) == pytest.approx(math.exp(exact), rel=1e-12)
    assert 2 * expected(0.0) > 1.05 * math.exp(exact)

    g, means = rng(18), []
    for _ in range(100):
        found = smc(path, n, target_ess=0.8, ess_threshold=1.0, num_replicates=400, generator=g)
        means.append((found.replicate_log_z - exact).exp().mean())
    assert abs(z_score(torch.stack(means), 1.0)) < Z
    assert z_score(torch.stack(means), 1.05) < -Z  # it would see the bias of the other


def test_any_path_will_do_and_the_schedule_does_not_depend_on_a_profile(rng):
    class Bare:
        """A path with the four things that a path has to have."""

        def __init__(self, path: GeometricPath) -> None:
            self.base_log_z, self.sample_base = path.base_log_z, path.sample_base
            self.log_prob, self.step = path.log_prob, path.step

    path = path_of("walk")
    one = smc(path, 200, generator=rng(19))
    two = smc(Bare(path), 200, generator=rng(19))
    torch.testing.assert_close(one.betas, two.betas, rtol=1e-9, atol=0)
    torch.testing.assert_close(one.log_weights, two.log_weights, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- equivalences


def test_one_stage_without_moves_is_importance_sampling_bit_for_bit(rng):
    base = Independent(Normal(torch.zeros(2, dtype=F64), 2.0), 1)
    target = laws()[1]
    path = GeometricPath(base, target, lambda density: random_walk(density, 1.0))
    run = {"betas": [0.0, 1.0], "num_moves": 0, "ess_threshold": 0.0, "generator": rng(20)}
    found = smc(path, 500, **run)
    plain = importance_sampling(target.log_prob, base, 500, generator=rng(20))
    assert torch.equal(found.x, plain.x)
    assert torch.equal(found.log_weights, plain.log_weights)
    torch.testing.assert_close(found.log_z.value, plain.log_z.value, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.log_z.std_error, plain.log_z.std_error, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.log_z.ess, plain.ess, rtol=1e-12, atol=0)
    mine, theirs = found.expectation(torch.sin), plain.expectation(torch.sin)
    torch.testing.assert_close(mine.value, theirs.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine.std_error, theirs.std_error, rtol=1e-12, atol=0)
    assert not torch.equal(smc(path, 500, **run | {"generator": rng(21)}).x, plain.x)


def test_never_resampled_it_is_annealed_importance_sampling_bit_for_bit(rng):
    path, g = path_of("walk"), rng(22)
    found = smc(path, 300, betas=BETAS, ess_threshold=0.0, generator=rng(22))
    x = path.sample_base(300, generator=g)[:, None]
    log_weights = path.base_log_z.expand(300, 1)
    for beta, new in itertools.pairwise(BETAS):
        x, increment = advance(path, x, beta, new, generator=g)
        log_weights = log_weights + increment
    assert torch.equal(found.x, x[:, 0]) and torch.equal(found.log_weights, log_weights[:, 0])
    assert not found.resampled.any()
    assert torch.equal(found.eve, torch.arange(300))


# ---------------------------------------------------------------- what comes back


def test_the_parts_of_a_result_fit_each_other(rng):
    n, m = 60, 7
    found = smc(
        path_of("walk"),
        n,
        betas=BETAS,
        ess_threshold=0.7,
        num_replicates=m,
        keep_history=True,
        generator=rng(23),
    )
    assert found.x.shape == (n * m, 2) and found.log_weights.shape == found.eve.shape == (n * m,)
    assert found.ess.shape == found.resampled.shape == (3, m)
    assert found.ancestors.shape == (3, n, m)
    assert torch.equal(found.betas, torch.tensor(BETAS, dtype=F64))
    # Each replicate's particles carry its own estimate, and all of them together the pooled one.
    own = found.log_weights.reshape(m, n).logsumexp(1) - math.log(n)
    torch.testing.assert_close(own, found.replicate_log_z, rtol=1e-13, atol=0)
    pooled = found.log_weights.logsumexp(0) - math.log(n * m)
    torch.testing.assert_close(pooled, found.log_z.value, rtol=1e-13, atol=0)
    # Who was resampled.
    assert torch.equal(found.resampled, found.ess < 0.7 * n)
    assert found.resampled.any() and not found.resampled.all()
    stayed = (found.ancestors == torch.arange(n)[:, None]).all(1)
    assert torch.equal(stayed, ~found.resampled)
    even = found.log_weights.reshape(m, n).diff(dim=1).eq(0).all(1)
    assert torch.equal(even, found.resampled[-1])
    # Families.
    founders = lineage(found.ancestors)[0]
    assert torch.equal(found.eve.reshape(m, n).T, founders + n * torch.arange(m))
    swapped = found.ancestors[0].gather(0, founders)
    assert not torch.equal(found.eve.reshape(m, n).T, swapped + n * torch.arange(m))
    shares = torch.zeros(n * m, dtype=F64).index_add_(0, found.eve, found.log_weights.softmax(0))
    torch.testing.assert_close(found.log_z.ess, 1 / shares.square().sum())
    assert smc(path_of("walk"), 500, betas=BETAS, generator=rng(23)).ancestors is None


def test_the_effective_sample_sizes_are_those_of_the_weights(rng):
    run = {"betas": BETAS, "ess_threshold": 0.0, "num_replicates": 3, "generator": rng(24)}
    ran = smc(path_of("walk"), 300, **run)
    own = effective_sample_size(ran.log_weights.reshape(3, 300), dim=1)
    torch.testing.assert_close(ran.ess[-1], own)
    assert (ran.ess[0] > ran.ess[-1]).all()


def test_thresholds_0_and_1_never_and_always_resample(rng):
    flat = GeometricPath(
        laws()[0], laws()[0], lambda density: random_walk(density, 1.0)
    )  # weights never differ
    for threshold in (0.0, 1.0):
        run = {"betas": BETAS, "ess_threshold": threshold, "num_replicates": 2}
        found = smc(flat, 50, generator=rng(25), **run)
        assert (found.resampled == (threshold == 1.0)).all()
        torch.testing.assert_close(found.ess, torch.full((3, 2), 50.0, dtype=F64))
        torch.testing.assert_close(found.log_z.value, torch.tensor(laws()[0].log_z, dtype=F64))


def test_a_replicate_that_dies_out_estimates_z_by_0(rng):
    def log_prob(x: Tensor) -> Tensor:
        return torch.where((x > 0.8) & (x < 1), 0.0, -torch.inf)

    box = Uniform(torch.zeros((), dtype=F64), 1.0)
    path = GeometricPath(box, log_prob, lambda density: random_walk(density, 0.2))
    run = {"betas": [0.0, 0.5, 1.0], "num_replicates": 20_000, "generator": rng(26)}
    found = smc(path, 4, **run)
    dead = found.replicate_log_z == -torch.inf
    assert abs(z_score(dead.double(), 0.8**4)) < Z
    assert abs(z_score(found.replicate_log_z.exp(), 0.2)) < Z
    assert abs(z_score(found.replicate_log_z[~dead].exp(), 0.2)) > Z  # survivors alone
    assert (found.ess[:, dead] == 0).all() and not found.resampled[:, dead].any()
    mean = found.expectation(lambda x: (x - 0.8).sqrt())  # NaN where the dead are
    assert abs(mean.value - 2 / 3 * math.sqrt(0.2)) < Z * mean.std_error


def test_expectations_take_several_values_and_refuse_nonsense(rng):
    found = smc(path_of("walk"), 100, betas=BETAS, num_replicates=3, generator=rng(27))
    both = found.expectation(lambda x: torch.stack([x, x.square()], 1))
    assert both.value.shape == both.std_error.shape == (2, 2)
    one = found.expectation(lambda x: x[:, 1].square())
    torch.testing.assert_close(one.value, both.value[1, 1])
    torch.testing.assert_close(one.std_error, both.std_error[1, 1])
    assert found.expectation(lambda x: x[:, 0] > 0).value.dtype == F64
    assert found.expectation(lambda x: torch.ones(len(x), dtype=F64)).std_error < 1e-12
    with pytest.raises(ValueError, match="one value a draw"):
        found.expectation(lambda x: x.sum())
    with pytest.raises(ValueError, match="NaN or infinite"):
        found.expectation(lambda x: (x[:, 0] - 100).log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_follow_the_particles_device_and_dtype(rng, device, dtype):
    path = path_of("walk", dtype, device)
    found = smc(path, 2000, num_replicates=20, generator=rng(28, device))
    assert (found.x.dtype, found.x.device.type) == (dtype, device.type)
    for got in (found.log_weights, found.betas, found.ess, found.replicate_log_z):
        assert (got.dtype, got.device.type) == (F64, device.type)
    for got in (found.eve, found.resampled, found.log_z.value, found.log_z.std_error):
        assert got.device.type == device.type
    assert abs(found.log_z.value - LOG_Z) < Z * found.log_z.std_error
    mean = found.expectation(lambda x: x)
    assert (mean.value.dtype, mean.value.device.type) == (F64, device.type)
    exact = moments_at(*laws(dtype, device), 1.0)[0]
    assert ((mean.value - exact) / mean.std_error).abs().max() < Z


def test_one_seed_gives_one_result_and_no_gradient(rng):
    before = torch.get_rng_state()
    scale = torch.ones((), dtype=F64, requires_grad=True)
    path = GeometricPath(
        laws()[0],
        lambda x: -scale * x.square().sum(-1),
        lambda density: random_walk(density, 1.0),
    )
    one, two = (smc(path, 50, num_replicates=4, generator=rng(29)) for _ in range(2))
    assert torch.equal(one.x, two.x) and torch.equal(one.log_weights, two.log_weights)
    assert torch.equal(one.betas, two.betas) and one.log_z.value == two.log_z.value
    assert torch.equal(before, torch.get_rng_state())
    assert not one.log_z.value.requires_grad and not one.x.requires_grad
    assert not one.expectation(lambda x: x * scale).value.requires_grad


def test_no_tensor_is_made_on_the_default_device(rng):
    path, g = path_of("walk"), rng(30)
    with torch.device("meta"):
        for run in {"betas": BETAS, "num_replicates": 2}, {"keep_history": True}:
            found = smc(path, 300, generator=g, **run)
            assert found.log_z.interval()[0].device.type == "cpu"
            assert found.expectation(lambda x: x).value.device.type == "cpu"


def test_a_progress_bar_counts_the_stages(rng, capsys):
    smc(path_of("walk"), 20, betas=BETAS, num_replicates=20, generator=rng(31), progress=True)
    assert "3/3" in capsys.readouterr().err


# ---------------------------------------------------------------- trouble


def test_a_coalesced_population_warns(rng):
    path = GeometricPath(
        Gaussian(torch.zeros(20, dtype=F64), 25.0 * torch.eye(20, dtype=F64)),
        Gaussian(torch.ones(20, dtype=F64), 0.1 * torch.eye(20, dtype=F64)),
        lambda density: random_walk(density, 0.01),
    )
    with pytest.warns(UserWarning, match=r"effectively [1-9]\.\d of the first draws") as caught:
        found = smc(path, 100, betas=BETAS, generator=rng(32))
    assert caught[0].filename == __file__
    assert found.log_z.ess < 10 and found.log_z.std_error > 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smc(path_of("walk"), 500, generator=rng(33))


def test_a_dead_population_is_an_error_that_names_beta(rng):
    def dies(x: Tensor) -> Tensor:
        return torch.where(x[..., 0] > 100.0, 0.0, -torch.inf).double()

    kernel = lambda density: random_walk(density, 1.0)  # noqa: E731
    path = GeometricPath(laws()[0], dies, kernel)
    with pytest.raises(ValueError, match=r"all particles have weight zero at beta = 0\.1: none"):
        smc(path, 50, betas=BETAS, num_replicates=2, generator=rng(34))
    with pytest.raises(ValueError, match="all particles have weight zero at beta"):
        smc(path, 50, generator=rng(34))
    path = GeometricPath(laws()[0], lambda x: x[..., 0].sqrt(), kernel)
    with pytest.raises(ValueError, match=r"weights of \d+ of 50 particles are NaN at beta = 0\.1"):
        smc(path, 50, betas=BETAS, generator=rng(34))
    with pytest.raises(ValueError, match="are NaN at beta"):
        adaptive_schedule(path, 50, generator=rng(34))
    path = GeometricPath(laws()[0], lambda x: torch.full_like(x[..., 0], torch.inf), kernel)
    with pytest.raises(ValueError, match="weights of 50 of 50 particles are plus infinity"):
        smc(path, 50, betas=BETAS, generator=rng(34))


def test_bad_arguments_are_refused_before_any_work():
    class Untouched(Coin):
        def sample_base(self, n: int, *, generator=None) -> Tensor:
            raise AssertionError("work was done")

    path = Untouched(1.0)
    for wrong, message in (
        ({"num_particles": 1}, "num_particles must be at least 2"),
        ({"num_replicates": 0}, "num_replicates must be at least 1"),
        ({"num_moves": -1}, "num_moves must be at least 0"),
        ({"target_ess": 1.0}, "target_ess must be a finite number above 0.0 and below 1.0"),
        ({"ess_threshold": 1.5}, "ess_threshold must be from 0 to 1, got 1.5"),
        ({"scheme": "roulette"}, "scheme must be one of multinomial, .* got 'roulette'"),
        ({"betas": [0.0, 0.5]}, "betas must ascend from 0 to 1, got 0 to 0.5"),
        ({"betas": [0.1, 1.0]}, "betas must ascend from 0 to 1, got 0.1 to 1"),
        ({"betas": [0.0, 0.6, 0.5, 1.0]}, "betas 1 and 2 are 0.6 and 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            smc(path, **{"num_particles": 10} | wrong)
    with pytest.raises(TypeError, match="path must be an AnnealingPath, got Gaussian"):
        smc(laws()[1], 10)
    with pytest.raises(TypeError, match="num_particles must be an integer"):
        adaptive_schedule(path, 1e3)
    with pytest.raises(ValueError, match="target_ess"):
        adaptive_schedule(path, 10, 0.0)
    with pytest.raises(TypeError, match="generator must be a torch.Generator or None, got int"):
        smc(path, 10, generator=3)


def test_a_batch_of_machines_is_refused():
    path = RBM(4, 3, batch_shape=(3,)).annealing_path()
    for run in (lambda: smc(path, 10), lambda: adaptive_schedule(path, 10)):
        with pytest.raises(ValueError, match=r"a batch of machines \(3,\): unbind the machines"):
            run()
