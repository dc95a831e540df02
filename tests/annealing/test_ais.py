"""Annealed importance sampling against exact answers; every statistical claim with mutants."""

import math
import sys
import warnings

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Normal

from companion.annealing import ais, bidirectional, reverse_ais, smc
from companion.annealing.walks import warn_if_few_count
from companion.core import LogZ
from companion.importance import bootstrap_std_error, log_mean_weight, pareto_k
from companion.mcmc import random_walk
from companion.models.ising import Ising
from companion.models.rbm import RBM, GaussianRBM, LabelRBM
from companion.objectives import PersistentChains
from companion.targets import Gaussian
from companion.tempering import GeometricPath, likelihood_path, linear_schedule, sigmoid_schedule
from companion.testing import binary_states
from tests.calibration import is_calibrated, z_score
from tests.mcmc.exact_targets import plant
from tests.tempering.exact_paths import ExactGaussians, Ring, exact_path

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
F64 = torch.float64
MODULE = sys.modules["companion.annealing.ais"]  # the package's attribute is the function
BETAS = [0.0, 0.1, 0.3, 0.6, 1.0]


def slow_path(dtype=F64, device="cpu") -> ExactGaussians:
    """Between two laws in two dimensions, by steps that forget only a third."""
    ends = [0.0, 0.5], [2.0, 1.5], [1.0, -0.5], [0.8, 1.0]
    return ExactGaussians(*ends, rho=0.66, dtype=dtype, device=device)


def ring() -> Ring:
    """Five states of which one is left behind; steps only go forward."""
    return Ring([0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0, -1.0])


def machine(rng, dtype=F64, device="cpu") -> RBM:
    rbm = RBM(6, 5, generator=rng(3), dtype=F64)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng(4), dtype=F64))
    return rbm.to(dtype=dtype, device=device)


def exact_draws(rbm: RBM, n: int, generator) -> Tensor:
    states = binary_states(rbm.num_visible, device=rbm.W.device, dtype=rbm.W.dtype)
    law = rbm.log_prob(states).detach().double().softmax(0)
    return states[torch.multinomial(law, n, True, generator=generator)]


# ---------------------------------------------------------------- agreement with exact answers


def test_log_z_of_the_machines_agrees_with_enumeration(rng, ledger):
    g = rng(0)
    plain = machine(rng)
    label, gaussian = LabelRBM(5, 3, 4, dtype=F64), GaussianRBM(3, 4, dtype=F64)
    with torch.no_grad():
        for rbm in label, gaussian:
            for parameter in rbm.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=F64))
    bias = torch.randn(8, generator=g, dtype=F64)
    mean, variance = torch.randn(3, generator=g, dtype=F64), torch.tensor([2.0, 3.0, 6.0]).double()
    wide = gaussian.annealing_path(mean, variance)
    for name, path, exact in (
        ("an RBM", plain.annealing_path(), plain.log_z()),
        ("an RBM, from its own biases", plain.annealing_path(plain.b.detach()), plain.log_z()),
        ("an RBM with labels", label.annealing_path(), label.log_z()),
        ("an RBM with labels, from a bias", label.annealing_path(bias), label.log_z()),
        ("a Gaussian RBM", gaussian.annealing_path(), gaussian.log_z()),
        ("a Gaussian RBM, from another base", wide, gaussian.log_z()),
    ):
        found = ais(path, linear_schedule(60), 2000, generator=g)
        ledger(
            f"log Z of {name}, by AIS",
            exact=exact.value,
            estimate=found.value,
            std_error=found.std_error,
        )
        assert found.std_error < 0.1
        # The base is another law: without the walk the estimate would be far off.
        assert abs(float(torch.as_tensor(path.base_log_z) - exact.value)) > 6 * found.std_error


def test_log_z_of_an_ising_lattice_from_both_sides(rng, ledger):
    model = Ising(4, 4, coupling=0.3, field=0.1, dtype=F64)
    spins = 2.0 * binary_states(16, dtype=F64).reshape(-1, 4, 4) - 1.0
    log_law = model.log_prob(spins)
    exact = log_law.logsumexp(0)
    x = spins[torch.multinomial(log_law.softmax(0), 1000, True, generator=rng(1))]
    found = bidirectional(model.annealing_path(), linear_schedule(40), 1000, x, generator=rng(2))
    for side, part in (("AIS", found.lower), ("reverse AIS", found.upper)):
        ledger(
            f"log Z of a 4 x 4 Ising lattice in a field, by {side}",
            exact=exact,
            estimate=part.value,
            std_error=part.std_error,
        )
    assert found.gap == found.upper.value - found.lower.value


def test_the_evidence_of_a_conjugate_model(rng, ledger):
    y = torch.tensor([1.2, 0.3, 2.1, 0.8, 1.9, 1.4], dtype=F64)
    prior = Normal(torch.zeros((), dtype=F64), 2.0)

    def log_likelihood(theta: Tensor) -> Tensor:
        return Normal(theta[..., None], 1.0).log_prob(y).sum(-1)

    path = likelihood_path(prior, log_likelihood, lambda density: random_walk(density, 1.0))
    found = ais(path, sigmoid_schedule(60), 1000, generator=rng(1))
    n = len(y)
    covariance = torch.eye(n, dtype=F64) + 4.0
    exact = torch.distributions.MultivariateNormal(torch.zeros(n, dtype=F64), covariance)
    ledger(
        "log evidence of a normal mean with a normal prior, by AIS",
        exact=exact.log_prob(y),
        estimate=found.value,
        std_error=found.std_error,
    )


# ---------------------------------------------------------------- unbiased for Z, both ways

FORWARD = {
    "weighs at the point after the move": (
        "advance(path, x, beta, next_beta, generator=generator)",
        "(lambda y: (y, profile(path, y)(next_beta) - profile(path, y)(beta)))"
        "(path.step(x, next_beta, generator=generator))",
    ),
    "moves at the beta before": (
        "advance(path, x, beta, next_beta, generator=generator)",
        "(path.step(x, beta, generator=generator), profile(path, x)(next_beta) "
        "- profile(path, x)(beta))",
    ),
    "ends one beta early": ("schedule.tolist()", "schedule.tolist()[:-1]"),
    "leaves out the base's constant": (
        "log_weights + base_log_z(path, log_weights)",
        "log_weights",
    ),
}
REVERSE = {
    "leaves out the first factor": ("schedule.tolist()", "schedule.tolist()[1:]"),
    "leaves out the last factor": ("schedule.tolist()", "schedule.tolist()[:-1]"),
    "moves at the beta before": (
        "advance(path, x, beta, next_beta, generator=generator)",
        "(path.step(x, beta, generator=generator), profile(path, x)(next_beta) "
        "- profile(path, x)(beta))",
    ),
    "takes the mean weight for the harmonic mean": (
        "log_mean_weight(log_inverse)",
        "log_mean_weight(-log_inverse); inverse = LogZ(-inverse.value, 0.0, None, inverse.ess)",
    ),
}


def relative_weights(log_z, exact: float, sign: int) -> Tensor:
    return (sign * (log_z.log_weights - exact)).exp()


@pytest.mark.parametrize("mutant", [None, *FORWARD])
def test_the_mean_weight_is_z_however_badly_the_steps_mix(rng, monkeypatch, mutant):
    if mutant:
        plant(monkeypatch, ais, *FORWARD[mutant])
    path = slow_path()
    found = MODULE.ais(path, BETAS, 100_000, generator=rng(5))
    z = z_score(relative_weights(found, float(path.log_z(1.0)), 1), 1.0)
    assert abs(z) > 6 if mutant else abs(z) < Z


@pytest.mark.parametrize("mutant", [None, *REVERSE])
def test_the_mean_inverse_weight_is_one_over_z(rng, monkeypatch, mutant):
    if mutant:
        plant(monkeypatch, reverse_ais, *REVERSE[mutant])
    path = slow_path()
    exact = float(path.log_z(1.0))
    found = MODULE.reverse_ais(
        path, BETAS, path.sample(100_000, 1.0, generator=rng(6)), generator=rng(11)
    )
    if mutant and "harmonic" in mutant:  # the weights are right, what is made of them is not
        assert abs(float(found.value) - exact) > 0.1
        return
    z = z_score(relative_weights(found, exact, -1), 1.0)
    assert abs(z) > 6 if mutant else abs(z) < Z


@pytest.mark.parametrize("wrong", [False, True])
def test_ways_there_and_back_are_one_law_seen_from_two_sides(rng, monkeypatch, wrong):
    """`E_back[f(w)] = E_there[f(w) w] / Z`, for f(w) = w here: `bar` builds on it.

    It needs the reversal of a step that is not reversible; that the mean of 1 / w is 1 / Z does
    not, and holds for the wrong way back as well.
    """
    path = ring()
    exact = float(path.log_z(1.0))
    there = relative_weights(ais(path, BETAS, 100_000, generator=rng(9)), exact, 1)
    if wrong:
        monkeypatch.setattr(path, "reverse_step", path.step)
    x = torch.multinomial(path.law(1.0), 100_000, True, generator=rng(7))
    found = reverse_ais(path, BETAS, x, generator=rng(8))
    back = relative_weights(found, exact, 1)
    error = math.sqrt(float(there.square().var() + back.var()) / 100_000)
    z = float(there.square().mean() - back.mean()) / error
    assert abs(z) > 8 if wrong else abs(z) < Z
    assert abs(z_score(there, 1.0)) < Z and abs(z_score(1.0 / back, 1.0)) < Z


def test_base_draws_that_the_target_forbids_have_weight_zero(rng, ledger):
    """A normal law cut off at 1: a third of its mass is not there."""

    def log_prob(x: Tensor) -> Tensor:
        return torch.where(x < 1.0, -0.5 * (x - 0.5).square(), -torch.inf)

    base = Normal(torch.zeros((), dtype=F64), 1.5)
    path = GeometricPath(base, log_prob, lambda density: random_walk(density, 1.0))
    found = ais(path, linear_schedule(20), 20_000, generator=rng(10))
    exact = 0.5 * math.log(2 * math.pi) + math.log(scipy.stats.norm.cdf(0.5))
    ledger(
        "log Z of a normal law cut off at one side, by AIS",
        exact=exact,
        estimate=found.value,
        std_error=found.std_error,
    )
    assert (found.log_weights == -math.inf).double().mean() > 0.2


# ---------------------------------------------------------------- biases of the logarithm


def divergences(path: ExactGaussians, betas: Tensor) -> tuple[float, float]:
    """`sum_k KL(p_k || p_{k+1})` and the same with the two exchanged, in closed form."""
    mean, sd = path.moments(betas)
    total = []
    for a, b in ((slice(None, -1), slice(1, None)), (slice(1, None), slice(None, -1))):
        ratio = (sd[a] / sd[b]).square()
        apart = ((mean[a] - mean[b]) / sd[b]).square()
        total.append(float(0.5 * (ratio + apart - 1.0 - ratio.log()).sum()))
    return total[0], total[1]


def test_a_single_log_weight_is_too_low_by_the_divergences_and_one_over_k(rng, ledger):
    """Perfect steps: `log Z - E[log w] = sum_k KL(p_k || p_{k+1})`, which halves as K doubles."""
    path = ExactGaussians([0.0, 1.0], [1.5, 1.0], [2.0, 0.0], [0.7, 1.2])
    exact = float(path.log_z(1.0))
    jeffreys = sum(divergences(path, linear_schedule(2)))  # both divergences between the ends
    shortfalls = {}
    for k in (16, 32, 64):
        betas = linear_schedule(k + 1)
        low, high = divergences(path, betas)
        # E[U] at the target less E[U] at the base, U the slope of the log-density in beta
        assert low + high == pytest.approx(jeffreys / k, rel=1e-10)
        assert low == pytest.approx(jeffreys / (2 * k), rel=2.0 / k)
        shortfalls[k] = low
        n = 10_000
        forward = ais(path, betas, n, generator=rng(k))
        back = reverse_ais(path, betas, path.sample(n, 1.0, generator=rng(k + 1)), generator=rng(k))
        for side, log_w, divergence in (
            ("below", exact - forward.log_weights, low),
            ("above", back.log_weights - exact, high),
        ):
            ledger(
                f"how far a log weight lies {side} log Z on average, {k} steps",
                exact=divergence,
                estimate=log_w.mean(),
                std_error=log_w.std() / math.sqrt(n),
            )
        assert low > 6 * forward.log_weights.std() / math.sqrt(n)  # it is seen
    for k in (16, 32):
        assert shortfalls[k] / shortfalls[2 * k] == pytest.approx(2.0, rel=0.06)


def test_the_bias_of_log_z_is_half_its_variance(rng):
    """Equal variances and perfect steps: log w is normal, of variance D^2 / K.

    The next term of the expansion in 1 / N is taken into account.
    """
    d, k, num_chains, repetitions = 1.5, 5, 20, 20_000
    path = ExactGaussians([0.0], [1.0], [d], [1.0])
    variance = d * d / k
    n = num_chains * repetitions
    exact = float(path.log_z(1.0))
    x = path.sample(n, 1.0, generator=rng(20))
    forward = ais(path, linear_schedule(k + 1), n, generator=rng(21)).log_weights - exact
    back = reverse_ais(path, linear_schedule(k + 1), x, generator=rng(22)).log_weights - exact
    assert abs(z_score(forward, -variance / 2)) < Z
    square = math.expm1(variance)  # relative variance and third moment of a log-normal weight
    third = square**2 * (math.exp(variance) + 2.0)
    first = -square / (2 * num_chains)
    predicted = first + third / (3 * num_chains**2) - 0.75 * square**2 / num_chains**2
    for log_w, sign in ((forward, 1.0), (back, -1.0)):
        grouped = (sign * log_w).reshape(num_chains, repetitions)
        bias = grouped.logsumexp(0) - math.log(num_chains)
        assert abs(z_score(bias, predicted)) < Z
        assert abs(z_score(bias, 0.0)) > 8  # without the bias
        assert abs(z_score(bias, -variance / 2)) > 10  # that of a single chain
        # half the variance of log Z itself, to first order
        assert abs(float(bias.var()) / 2 / -first - 1.0) < 0.1


# ---------------------------------------------------------------- standard errors


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_standard_errors_are_calibrated_both_ways(rng, device, dtype):
    rbm = machine(rng, dtype, device)
    exact = float(rbm.double().log_z().value)
    rbm = machine(rng, dtype, device)
    path, n, repetitions = rbm.annealing_path(), 150, 200
    betas, g = linear_schedule(21), rng(30, device)
    forward = ais(path, betas, n * repetitions, generator=g)
    x = exact_draws(rbm, n * repetitions, g)
    back = reverse_ais(path, betas, x, generator=g)
    for log_w in (forward.log_weights, -back.log_weights):
        grouped = log_w.reshape(n, repetitions)
        exact_here = exact if log_w is forward.log_weights else -exact
        found = log_mean_weight(grouped)
        error = found.value - exact_here
        assert is_calibrated(error / found.std_error)
        assert not is_calibrated(error / (0.7 * found.std_error))
        # dividing by another N: a weight's own deviation, and one chain less
        assert not is_calibrated(error / (found.std_error * math.sqrt(n)))
        bootstrap = bootstrap_std_error(grouped, 200, generator=g)
        assert is_calibrated(error / bootstrap)
        assert ((bootstrap / found.std_error).mean() - 1).abs() < 0.05


def test_the_bootstrap_is_the_spread_of_resampled_estimates(rng):
    log_weights = 2.0 * torch.randn(40, 3, dtype=F64, generator=rng(31))
    found = bootstrap_std_error(log_weights, 4000, generator=rng(32))
    chosen = torch.randint(40, (4000, 40), generator=rng(33))
    slow = torch.stack([log_weights[:, i][chosen].exp().mean(1).log().std() for i in range(3)])
    torch.testing.assert_close(found, slow, rtol=0.1, atol=0)  # 4.5 sqrt(2) / sqrt(2 4000) is 0.07
    assert torch.equal(found, bootstrap_std_error(log_weights, 4000, generator=rng(32)))
    dead = torch.tensor([0.0, -math.inf, -math.inf])
    assert bootstrap_std_error(dead, 100, generator=rng(34)) == math.inf
    far = bootstrap_std_error(log_weights - 2000.0, 4000, generator=rng(32))  # no underflow
    torch.testing.assert_close(far, found)
    with pytest.raises(ValueError, match="at least 2 weights"):
        bootstrap_std_error(torch.zeros(1))
    with pytest.raises(ValueError, match="num_resamples"):
        bootstrap_std_error(torch.zeros(3), 1)


# ---------------------------------------------------------------- what cannot be trusted


def trained_machine(rng) -> tuple[RBM, Tensor]:
    """A small machine that has learned five noisy patterns, and the biases of independent units."""
    g = rng(40)
    patterns = (torch.rand(5, 40, generator=g, dtype=F64) < 0.25).double()
    flips = (torch.rand(1000, 40, generator=g, dtype=F64) < 0.05).double()
    data = (patterns[torch.randint(5, (1000,), generator=g)] - flips).abs()
    rbm = RBM(40, 8, generator=g, dtype=F64)
    rbm.init_visible_bias(data)
    base = rbm.b.detach().clone()
    chains = PersistentChains(rbm, 100, generator=g)
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.3)
    for rows in data.split(100) * 20:
        optimizer.zero_grad()
        chains.loss(rows).backward()
        optimizer.step()
    return rbm, base


def test_a_uniform_start_warns_on_a_trained_machine_and_the_data_s_own_rates_do_not(rng, ledger):
    rbm, base = trained_machine(rng)
    betas, n = linear_schedule(21), 100
    exact = rbm.log_z().value
    with pytest.warns(UserWarning, match="log Z may be too low by far more") as caught:
        uniform = ais(rbm.annealing_path(), betas, n, generator=rng(43))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ais(rbm.annealing_path(base), betas, n, generator=rng(43))
    ledger(
        "log Z of an RBM that has learned, by AIS from the data's rates",
        exact=exact,
        estimate=found.value,
        std_error=found.std_error,
    )
    assert uniform.ess < 0.2 * n < found.ess


class TwoWells:
    """Four states in a row between two wells; steps never cross from one half to the other."""

    base_log_z = math.log(4.0)

    def __init__(self, depth: float) -> None:
        self.table = torch.tensor([0.0, 0.5, 0.0, depth], dtype=F64)

    def sample_base(self, n: int, *, generator=None) -> Tensor:
        return torch.randint(4, (n,), generator=generator)

    def log_prob(self, x: Tensor, beta) -> Tensor:
        return beta * self.table[x]

    def step(self, x: Tensor, beta, *, generator=None) -> Tensor:
        law = (beta * self.table).exp()
        first = law[::2] / (law[::2] + law[1::2])
        half = x // 2
        u = torch.rand(x.shape, dtype=F64, generator=generator)
        return 2 * half + (u >= first[half])


def test_the_gap_tells_what_the_effective_sample_size_does_not(rng):
    path, n, betas = TwoWells(4.0), 2000, linear_schedule(40)
    exact = float(path.table.logsumexp(0))
    all_draws = torch.multinomial(path.table.softmax(0), n, True, generator=rng(50))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = bidirectional(path, betas, n, all_draws, generator=rng(51))
    # of the draws of the wrong well alone neither half knows anything
    one_well = torch.randint(2, (n,), generator=rng(52))
    with pytest.warns(UserWarning, match="do not stand for the target") as caught:
        bad = bidirectional(path, betas, n, one_well, generator=rng(51))
    assert caught[0].filename == __file__
    assert good.lower.value < exact + 0.1 and good.upper.value > exact - 0.1
    assert bad.upper.std_error < 0.05 and bad.gap < -1
    # a reverse run that is cut short by a poor schedule: too high, and far above the lower one
    wide = ExactGaussians([0.0], [10.0], [0.0], [0.1], rho=0.99)
    x = wide.sample(n, 1.0, generator=rng(53))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bidirectional(wide, linear_schedule(5), n, x, generator=rng(54))
    assert any("the gap between the upper and the lower" in str(w.message) for w in caught)


def heavy_tailed(rng, seed: int):
    """The 1 / w of a wide base, a narrow target and short steps have no variance."""
    base = Normal(torch.zeros((), dtype=F64), 3.0)
    path = GeometricPath(
        base, lambda x: -0.5 * (x - 2.0).square(), lambda density: random_walk(density, 2.0)
    )
    x = 2.0 + torch.randn(2000, dtype=F64, generator=rng(seed))
    return MODULE.reverse_ais(path, linear_schedule(6).square(), x, generator=rng(seed + 1))


def test_inverse_weights_without_a_variance_are_told(rng):
    """Their effective sample size mostly looks well, and their standard errors are too small."""
    told = misses = 0
    for seed in range(100, 140, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = heavy_tailed(rng, seed)
        assert len(caught) <= 1
        if caught:
            assert "too high by far more" in str(caught[0].message)
            assert caught[0].filename == __file__
            told += "k-hat is up to" in str(caught[0].message)
        misses += bool(abs(found.value - 0.5 * math.log(2 * math.pi)) > 2 * found.std_error)
    assert told >= 8  # of 20; 14 are expected, and no more than 2 without k-hat
    assert misses >= 5  # one is expected of 20 that are calibrated


@pytest.mark.parametrize("mutant", ["sign * log_z", "ess < 0.5 * n)", "where, it counts"])
def test_a_warning_by_the_wrong_tail_is_found(rng, monkeypatch, mutant):
    if mutant == "sign * log_z":
        plant(monkeypatch, warn_if_few_count, mutant, "log_z", where=MODULE)
    elif mutant == "ess < 0.5 * n)":
        plant(monkeypatch, warn_if_few_count, mutant, "ess < 0.0)", where=MODULE)
    told = 0
    for seed in range(100, 140, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            heavy_tailed(rng, seed)
        told += any("k-hat" in str(w.message) for w in caught)
    assert told >= 8 if mutant == "where, it counts" else told < 4


def test_log_normal_weights_are_rarely_taken_for_heavy_tailed(rng):
    """At a variance of 0.3^2 never, since their effective sample size is above a half."""
    told = dict.fromkeys((0.3, 1.0), 0)
    for sd in told:
        for seed in range(200):
            log_z = log_mean_weight(sd * torch.randn(500, dtype=F64, generator=rng(seed)))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                warn_if_few_count(log_z, 1, stacklevel=2)
            told[sd] += len(caught)
    # Nor are those of which the heavy tail is too small to matter.
    tail = torch.rand(500, dtype=F64, generator=rng(0)) ** -0.9
    log_z = log_mean_weight((1e-3 * tail).log1p())
    assert pareto_k(log_z.log_weights) > 0.7 and log_z.ess > 400
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_few_count(log_z, 1, stacklevel=2)
    assert told[0.3] == 0 and told[1.0] < 9  # one is expected, P(9 or more) < 1e-5


def test_a_poor_schedule_backwards_is_told_and_a_good_one_is_not(rng, monkeypatch):
    path = ExactGaussians([0.0], [1.0], [4.0], [1.0])  # of one step: log-normal, with variance 16
    x = path.sample(500, 1.0, generator=rng(55))
    with pytest.warns(UserWarning, match="too high by far more") as caught:
        reverse_ais(path, linear_schedule(2), x, generator=rng(56))
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = reverse_ais(path, linear_schedule(60), x, generator=rng(56))
    assert abs(found.value - path.log_z(1.0)) < Z * found.std_error
    # told of the weights the wrong way round
    plant(monkeypatch, reverse_ais, "warn_if_few_count(log_z, -1", "warn_if_few_count(log_z, 1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MODULE.reverse_ais(path, linear_schedule(2), x, generator=rng(56))
    assert all("too high" not in str(w.message) for w in caught)


def test_more_chains_than_quantiles_can_be_taken_of(rng):
    n = 2**24 + 1
    log_z = LogZ(0.0, 0.0, torch.zeros(1, dtype=F64).expand(n), torch.tensor(0.1 * n))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_few_count(log_z, 1, stacklevel=2)


# ---------------------------------------------------------------- long runs


def test_tens_of_thousands_of_betas(rng, capsys):
    path = TwoWells(2.0)
    path.step = lambda x, beta, *, generator: x  # the weights telescope
    found = ais(path, linear_schedule(10_001), 100, generator=rng(60), progress=True)
    assert found.log_weights.shape == (100,)
    assert abs(found.value - path.table.logsumexp(0)) < Z * found.std_error < 0.5
    at_once = path.table + path.base_log_z
    assert (found.log_weights[:, None] - at_once).abs().amin(1).max() < 1e-10
    assert "10000/10000" in capsys.readouterr().err


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_bit_for_bit(rng, tmp_path, monkeypatch):
    rbm = machine(rng, torch.float32)
    path, betas, file = rbm.annealing_path(), linear_schedule(301), tmp_path / "run"

    def run(**more):
        return ais(path, betas, 7, generator=rng(61), **more)

    whole = run()
    counted, right = [], path.advance

    def counting(*args, **kwargs):
        counted.append(args[1])
        if len(counted) == 160:
            raise Killed
        return right(*args, **kwargs)

    monkeypatch.setattr(path, "advance", counting)
    with pytest.raises(Killed):
        run(checkpoint=file, save_every=50)
    resumed = run(checkpoint=file, save_every=50)
    assert torch.equal(resumed.log_weights, whole.log_weights)
    assert len(counted) == 160 + 150 and counted[160] == float(betas[150])
    again = run(checkpoint=file, save_every=50)  # a finished run does nothing more
    assert torch.equal(again.log_weights, whole.log_weights) and len(counted) == 310
    other = machine(rng, torch.float32)
    with torch.no_grad():
        other.W.add_(0.01)
    for wrong, what in (
        (lambda: ais(path, betas, 8, generator=rng(61), checkpoint=file), "num_chains"),
        (lambda: ais(path, betas[::2], 7, generator=rng(61), checkpoint=file), "betas"),
        (lambda: ais(path, betas, 7, generator=rng(62), checkpoint=file), "generator"),
        (lambda: ais(other.annealing_path(), betas, 7, generator=rng(61), checkpoint=file), "path"),
    ):
        with pytest.raises(ValueError, match=f"other arguments: .*{what}"):
            wrong()
    with pytest.raises(TypeError, match="needs a generator"):
        ais(path, betas, 7, checkpoint=file)


# ---------------------------------------------------------------- equivalences, inputs


def test_it_is_a_population_that_is_never_resampled(rng):
    base, target = (
        Gaussian(torch.zeros(2, dtype=F64), 4 * torch.eye(2, dtype=F64)),
        Gaussian(torch.ones(2, dtype=F64), torch.eye(2, dtype=F64)),
    )
    path = exact_path(base, target)
    found = ais(path, BETAS, 50, generator=rng(70))
    never = smc(path, 50, betas=BETAS, ess_threshold=0.0, generator=rng(70))
    torch.testing.assert_close(found.log_weights, never.log_weights, rtol=0, atol=1e-12)


def test_a_batch_of_machines_has_a_log_z_each(rng):
    batch = RBM(6, 5, batch_shape=(3,), generator=rng(71), dtype=F64)
    with torch.no_grad():
        batch.W.mul_(80.0)
    exact = batch.log_z().value
    x = batch.gibbs(batch.sample_base(400, generator=rng(72)), 100, generator=rng(72))
    found = bidirectional(batch.annealing_path(), linear_schedule(50), 400, x, generator=rng(73))
    for part in (found.lower, found.upper):
        assert part.value.shape == (3,) and part.log_weights.shape == (400, 3)
        assert ((part.value - exact).abs() < Z * part.std_error).all()
    assert exact.diff().abs().min() > 10 * found.lower.std_error.max()


def test_results_follow_the_path(rng, device):
    rbm = machine(rng, torch.float32, device)
    found = ais(rbm.annealing_path(), linear_schedule(20), 50, generator=rng(74, device))
    again = ais(rbm.annealing_path(), linear_schedule(20), 50, generator=rng(74, device))
    assert torch.equal(found.log_weights, again.log_weights)
    assert found.value.dtype == F64 and found.log_weights.device.type == device.type
    assert not found.value.requires_grad
    path = machine(rng, torch.float32).annealing_path()
    betas = linear_schedule(20)
    with torch.device("meta"):
        x = path.sample_base(50, generator=rng(75))
        assert reverse_ais(path, betas, x, generator=rng(75)).value.device.type == "cpu"
        found = ais(path, betas, 50, generator=rng(75))
        assert bootstrap_std_error(found.log_weights, 9, generator=rng(75)).device.type == "cpu"


def test_bad_arguments_are_refused_before_any_work(rng):
    path = slow_path()
    x = path.sample(5, 1.0, generator=rng(80))
    with pytest.raises(TypeError, match="path must be an AnnealingPath"):
        ais(machine(rng), BETAS, 10)
    with pytest.raises(ValueError, match="num_chains must be at least 2"):
        ais(path, BETAS, 1)
    for run in (lambda betas: ais(path, betas, 10), lambda betas: reverse_ais(path, betas, x)):
        for betas in ([0.1, 1.0], [0.0, 0.5], [0.0, 0.5, 0.5, 1.0], [1.0, 0.0]):
            with pytest.raises(ValueError, match="betas must"):
                run(betas)
    with pytest.raises(ValueError, match=r"x must be at least two draws.*\('n', 2\); got \(5, 3\)"):
        reverse_ais(path, BETAS, torch.zeros(5, 3, dtype=F64))
    with pytest.raises(ValueError, match="at least two draws"):
        reverse_ais(path, BETAS, x[:1])
    with pytest.raises(TypeError, match="x must be torch.float64"):
        reverse_ais(path, BETAS, x.float())
    with pytest.raises(ValueError, match="NaN"):
        reverse_ais(path, BETAS, x * math.nan)
    path.mean1 = path.mean1 * math.nan
    with pytest.raises(ValueError, match="log weights are NaN"):
        ais(path, BETAS, 10)
