"""Bridge sampling and BAR against exact ratios, with bugs planted that must be found."""

import math
import sys
import warnings

import pytest
import scipy.stats
import torch
from torch.distributions import Normal

from companion.annealing import ais, reverse_ais
from companion.diagnostics import integrated_autocorrelation_time
from companion.importance import log_mean_weight
from companion.logz import bar, bridge_sampling, enumeration
from companion.logz.bridge import bennett_terms, solve
from companion.models.rbm import RBM
from companion.targets import Gaussian
from companion.tempering import linear_schedule
from companion.testing import binary_states
from tests.calibration import is_calibrated
from tests.mcmc.exact_targets import plant
from tests.tempering.exact_paths import exact_path

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
F64 = torch.float64
MODULE = sys.modules["companion.logz.bridge"]
LOG_RATIO = math.log(0.5)  # of the densities p and q below


def log_p(x):
    """N(2, 1/4), without its constant."""
    return -2.0 * (x - 2.0).square()


def log_q(x):
    """N(0, 1), without its constant."""
    return -0.5 * x.square()


def draws(generator, n_p, n_q, *batch, dtype=F64):
    like = {"dtype": dtype, "device": generator.device, "generator": generator}
    return 2.0 + 0.5 * torch.randn(n_p, *batch, **like), torch.randn(n_q, *batch, **like)


def asymptotic_sd(alpha, n):
    """Of the estimate by the bridge `alpha(p, q)` from n draws each, by quadrature."""
    x = torch.linspace(-12, 12, 20_001, dtype=F64)
    p, q = Normal(2.0, 0.5).log_prob(x).exp(), Normal(0.0, 1.0).log_prob(x).exp()
    both = alpha(p, q)
    shared = torch.trapezoid(p * q * both, x)
    squares = (torch.trapezoid(f * f * g, x) / shared**2 for f, g in ((p * both, q), (q * both, p)))
    return math.sqrt(float(sum(s - 1.0 for s in squares)) / n)


# ---------------------------------------------------------------- agreement with exact answers


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("bridge", ["optimal", "geometric"])
def test_bridges_agree_with_the_ratio_of_two_normal_laws(bridge, dtype, rng, device, ledger):
    x_p, x_q = draws(rng(0, device), 30_000, 10_000, dtype=dtype)
    found = bridge_sampling(log_p, x_p, log_q, x_q, bridge=bridge)
    assert found.value.dtype == F64 and found.converged and found.value.device == x_p.device
    ledger(
        f"log Z ratio of N(2, 1/4) to N(0, 1), {bridge} bridge, {dtype}",
        exact=LOG_RATIO,
        estimate=found.value if dtype == F64 else found.value.float(),
        std_error=found.std_error,
    )


def test_bridge_sampling_agrees_with_enumeration(rng, ledger):
    rbm = RBM(8, 6, dtype=F64, generator=rng(0))
    rbm.W.data.mul_(100.0)
    states = binary_states(8, dtype=F64)
    exact = enumeration(rbm.log_prob, 8, dtype=F64).value
    share = rbm.log_prob(states).detach().softmax(0)
    x_p = states[torch.multinomial(share, 4000, replacement=True, generator=rng(1))]
    x_q = (torch.rand(2000, 8, dtype=F64, generator=rng(2)) < 0.5).double()
    found = bridge_sampling(rbm.log_prob, x_p, lambda x: torch.zeros_like(x[..., 0]), x_q)
    ledger(
        "log Z of a small RBM, bridged from fair coins",
        exact=exact,
        estimate=found.value + 8 * math.log(2.0),
        std_error=found.std_error,
    )
    assert abs(found.value - exact) > 20 * found.std_error  # the coins' own log Z left out


def test_densities_may_vanish_where_the_other_does_not(rng, ledger):
    def uniform(low, high):
        return lambda x: torch.where((x > low) & (x < high), 0.0, -math.inf)

    x_p = 2.0 * torch.rand(4000, dtype=F64, generator=rng(3))
    x_q = 1.0 + 3.0 * torch.rand(4000, dtype=F64, generator=rng(4))
    for bridge in "optimal", "geometric", "reciprocal":
        found = bridge_sampling(uniform(0, 2), x_p, uniform(1, 4), x_q, bridge=bridge)
        ledger(
            f"log Z ratio of uniform laws on (0, 2) and (1, 4), {bridge} bridge",
            exact=math.log(2 / 3),
            estimate=found.value,
            std_error=found.std_error,
        )
    assert abs(log_mean_weight(uniform(0, 2)(x_q)).value - math.log(2 / 3)) > 0.5  # only half of p


def test_bar_of_work_agrees_with_the_difference_in_free_energy(rng, ledger):
    """Normal work in both directions, as Crooks' relation wants it: log w ~ N(c -/+ s^2/2, s^2)."""
    c, s = 3.7, 2.5
    noise = torch.randn(2, 5000, dtype=F64, generator=rng(5))
    forward, reverse = c - s**2 / 2 + s * noise[0], c + s**2 / 2 + s * noise[1, :2000]
    found = bar(forward, reverse)
    ledger("BAR of normal work", exact=c, estimate=found.value, std_error=found.std_error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = bar(forward, -reverse)  # the work done on the way back, with its own sign
    assert abs(wrong.value - c) > 1.0
    assert found.std_error < 0.7 * log_mean_weight(forward).std_error


def test_bar_takes_the_weights_of_annealing_as_they_are(rng, ledger):
    base = Gaussian(torch.zeros(2, dtype=F64), 4.0 * torch.eye(2, dtype=F64))
    covariance = torch.tensor([[1.0, -0.4], [-0.4, 0.5]], dtype=F64)
    target = Gaussian(torch.tensor([1.0, 3.0], dtype=F64), covariance)
    path, betas = exact_path(base, target), linear_schedule(40)
    x = target.sample(800, generator=rng(6))
    forward = ais(path, betas, 400, generator=rng(7))
    reverse = reverse_ais(path, betas, x, generator=rng(8))
    found = bar(forward.log_weights, reverse.log_weights)
    ledger(
        "log Z of a normal law, BAR of forward and reverse AIS",
        exact=target.log_z,
        estimate=found.value,
        std_error=found.std_error,
    )
    assert found.std_error < min(forward.std_error, reverse.std_error)


# ---------------------------------------------------------------- theory


def test_a_bridge_has_the_standard_deviation_that_theory_says(rng):
    """In 400 problems at once; the sample variance is within its 1e-5 chi-square interval, but
    for the geometric bridge, whose terms have heavy tails: within 4.5 of its own errors."""
    n, repeats = 2000, 400
    x_p, x_q = draws(rng(8), n, n, repeats)
    found = bridge_sampling(log_p, x_p, log_q, x_q).value - LOG_RATIO
    expected = asymptotic_sd(lambda p, q: 1.0 / (p + q), n)
    low, high = scipy.stats.chi2.interval(1 - 1e-5, repeats)
    assert low < (found / expected).square().sum() < high
    assert not low < (found / (0.8 * expected)).square().sum() < high
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        geometric = bridge_sampling(log_p, x_p, log_q, x_q, bridge="geometric").value - LOG_RATIO
    square = geometric.square()
    bound = asymptotic_sd(lambda p, q: (p * q + 1e-300).rsqrt(), n) ** 2
    assert expected**2 < square.mean() < bound + Z * square.std() / math.sqrt(repeats)
    one_sided = log_mean_weight(log_p(x_q) - log_q(x_q)).value - LOG_RATIO
    assert found.std() < geometric.std() < one_sided.std()


def test_the_equation_that_is_solved_is_that_of_meng_and_wong(rng):
    """A thousand sweeps of their iteration, as it is written, end where the solver does."""
    x_p, x_q = draws(rng(9), 40, 70, 6)
    w_p, w_q = ((log_p(x) - log_q(x)).exp() for x in (x_p, x_q))
    r = torch.ones(6, dtype=F64)
    for _ in range(1000):
        above = (w_q / (40 / 110 * w_q + 70 / 110 * r)).mean(0)
        r = above / (1.0 / (40 / 110 * w_p + 70 / 110 * r)).mean(0)
    c, found = solve(w_q.log(), -w_p.log())
    torch.testing.assert_close(c, r.log(), rtol=0, atol=1e-12)
    assert found.all()
    a, b = bennett_terms(w_q.log(), -w_p.log(), c)
    torch.testing.assert_close(a.exp().sum(0), b.exp().sum(0))


def test_the_ratio_changes_sign_with_the_order_and_follows_constants(rng):
    x_p, x_q = draws(rng(10), 300, 500)
    for bridge in "optimal", "geometric":
        found = bridge_sampling(log_p, x_p, log_q, x_q, bridge=bridge)
        swapped = bridge_sampling(log_q, x_q, log_p, x_p, bridge=bridge)
        torch.testing.assert_close(swapped.value, -found.value, rtol=0, atol=1e-12)
        torch.testing.assert_close(swapped.std_error, found.std_error)
        huge = bridge_sampling(
            lambda x: log_p(x) + 9000.0, x_p, lambda x: log_q(x) - 700.0, x_q, bridge=bridge
        )
        torch.testing.assert_close(huge.value, found.value + 9700.0, rtol=0, atol=1e-8)
        torch.testing.assert_close(huge.std_error, found.std_error, rtol=1e-8, atol=0)


def test_problems_in_a_batch_are_solved_apart(rng):
    x_p, x_q = draws(rng(11), 30, 50, 3, 2)
    x_p[:, 0] += 3.0  # one that is solved with difficulty
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = bridge_sampling(log_p, x_p, log_q, x_q)
        alone = bridge_sampling(log_p, x_p[:, 1, 1], log_q, x_q[:, 1, 1])
    torch.testing.assert_close(together.value[1, 1], alone.value, rtol=0, atol=1e-11)
    torch.testing.assert_close(together.std_error[1, 1], alone.std_error)


def test_equal_densities_have_ratio_one_and_no_error(rng):
    x_p, x_q = draws(rng(12), 5, 7)
    found = bridge_sampling(log_q, x_p, log_q, x_q)
    assert abs(found.value) < 1e-13 and found.std_error < 1e-7
    assert found.ess.item() == pytest.approx(5 * 7 / 12)


# ---------------------------------------------------------------- standard errors

PLANTED = {
    "the numbers of draws left out": ("m = math.log(len(reverse) / len(forward))", "m = 0.0"),
    "the numbers of draws swapped": ("len(reverse) / len(forward)", "len(forward) / len(reverse)"),
    "a factor in the equation left out": ("logsigmoid(reverse - m + c)", "logsigmoid(reverse - m)"),
}
PLANTED_ERRORS = {
    "the variance of one side alone": ("variance = variance + tau", "variance = tau"),
    "the spread of a draw, not of the mean": ("* n / (n - 1)", "* n**2 / (n - 1)"),
    "the draws of both sides taken as one sample": ("* n / (n - 1)", "* 0.5 * n / (n - 1)"),
}


def z_scores(generator, bridge="optimal"):
    """Of 200 problems at once, from 1,000 draws of the one and 250 of the other."""
    x_p, x_q = draws(generator, 1000, 250, 200)
    if bridge == "optimal":
        found = bridge_sampling(log_p, x_p, log_q, x_q)
        return (found.value - LOG_RATIO) / found.std_error
    # Laws of one width: with others the geometric bridge's terms have no fourth moment.
    x_p = 2.0 * x_p - 3.0
    found = bridge_sampling(lambda x: log_q(x - 1.0) + 3.0, x_p, log_q, x_q, bridge=bridge)
    return (found.value - 3.0) / found.std_error


@pytest.mark.parametrize("bridge", ["optimal", "geometric"])
def test_standard_errors_are_calibrated(bridge, rng):
    assert is_calibrated(z_scores(rng(13), bridge))


@pytest.mark.filterwarnings("ignore:the two densities hardly overlap")
@pytest.mark.parametrize("bug", PLANTED)
def test_a_wrong_equation_is_found(bug, rng, monkeypatch):
    plant(monkeypatch, bennett_terms, *PLANTED[bug])
    assert not is_calibrated(z_scores(rng(13)))


@pytest.mark.filterwarnings("ignore:the two densities hardly overlap")
@pytest.mark.parametrize("bug", PLANTED_ERRORS)
def test_a_wrong_standard_error_is_found(bug, rng, monkeypatch):
    plant(monkeypatch, MODULE._estimate, *PLANTED_ERRORS[bug])
    # Else the second variance, that of overlapping densities, would mend what the first lacks.
    monkeypatch.setattr(MODULE, "bennett_terms", bennett_terms)
    assert not is_calibrated(z_scores(rng(13), "geometric"))


def autoregressive(generator, chains, n, *batch, rho=0.8):
    """Stationary draws of N(0, 1) whose autocorrelation time is (1 + rho) / (1 - rho)."""
    noise = torch.randn(n, chains, *batch, dtype=F64, generator=generator)
    x = [noise[0]]
    for i in range(1, n):
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * noise[i])
    return torch.stack(x, 1)


def test_the_standard_error_counts_autocorrelation_where_it_is_told_of_chains(rng):
    x_p = 2.0 + 0.5 * autoregressive(rng(14), 4, 300, 200)
    x_q = torch.randn(4, 300, 200, dtype=F64, generator=rng(15))
    found = bridge_sampling(log_p, x_p, log_q, x_q, chains=True)
    assert is_calibrated((found.value - LOG_RATIO) / found.std_error)
    as_one = bridge_sampling(log_p, x_p.flatten(0, 1), log_q, x_q.flatten(0, 1))
    torch.testing.assert_close(as_one.value, found.value)
    assert not is_calibrated((as_one.value - LOG_RATIO) / as_one.std_error)
    w_q, w_p = (log_p(x) - log_q(x) for x in (x_q[..., 0], x_p[..., 0]))
    torch.testing.assert_close(bar(w_q, w_p, chains=True).std_error, found.std_error[0])


# ---------------------------------------------------------------- loud where it fails


def test_densities_far_apart_are_told_and_their_error_is_large(rng):
    """The draws' own spread says 0.2; the ratio is off by more than that by far."""
    x_p, x_q = draws(rng(16), 500, 500)
    with pytest.warns(UserWarning, match="hardly overlap in 1 of 1.*effectively 0.0 draws"):
        found = bridge_sampling(lambda x: log_p(x - 9.0), x_p + 9.0, log_q, x_q)
    terms = bennett_terms(log_p(x_q - 9.0) - log_q(x_q), log_q(x_p + 9.0) - log_p(x_p), found.value)
    spread = [float((t.softmax(0) - 1 / 500).square().sum().sqrt()) for t in terms]
    assert max(spread) < 1.0 < found.std_error
    assert abs(found.value - LOG_RATIO) < Z * found.std_error


def test_no_overlap_gives_no_number_that_could_be_taken_for_one(rng):
    x = torch.rand(2, 50, dtype=F64, generator=rng(17))

    def uniform(low):
        return lambda x: torch.where((x >= low) & (x < low + 1), 0.0, -math.inf)

    for bridge in "optimal", "geometric", "reciprocal":
        with pytest.warns(UserWarning, match="the overlap is 0 "):
            found = bridge_sampling(uniform(0), x[0], uniform(2), x[1] + 2, bridge=bridge)
        assert not found.converged and not found.value.isfinite()
        assert found.std_error == math.inf and found.ess == 0
    with pytest.warns(UserWarning, match="hardly overlap in 1 of 2"):  # beside one that overlaps
        both = bar(
            torch.tensor([[0.0, -math.inf], [0.1, -math.inf], [0.2, -math.inf]]),
            torch.tensor([[0.1, 0.0], [0.3, 0.0], [0.2, 1.0]]),
        )
    assert both.value[0].isfinite() and both.value[1] == -math.inf
    assert both.std_error[0] < 1 and both.std_error[1] == math.inf and not both.converged


def test_a_reciprocal_bridge_over_an_unbounded_space_is_told(rng):
    """Its means do not exist: 200 problems have standard errors that mean nothing."""
    x_p, x_q = draws(rng(18), 1000, 1000, 200)
    with pytest.warns(UserWarning, match="hardly overlap"):
        found = bridge_sampling(log_p, x_p, log_q, x_q, bridge="reciprocal")
    assert not is_calibrated((found.value - LOG_RATIO) / found.std_error)


# ---------------------------------------------------------------- input


@pytest.mark.filterwarnings("error")
def test_inputs_decide_the_device_and_no_graph_is_kept(rng):
    x_p, x_q = draws(rng(19), 300, 200)
    scale = torch.ones((), dtype=F64, requires_grad=True)
    torch.set_default_device("meta")
    try:
        found = bridge_sampling(lambda x: scale * log_p(x), x_p, log_q, x_q)
        chains = bar(x_q[None] - 1.0, x_p[None], chains=True)
    finally:
        torch.set_default_device("cpu")
    assert found.value.device.type == "cpu" and not found.value.requires_grad
    assert chains.value.device.type == "cpu"


def test_bad_input_is_refused_with_a_sentence(rng):
    x_p, x_q = draws(rng(20), 30, 40)
    with pytest.raises(ValueError, match="one of optimal, geometric, reciprocal; got 'best'"):
        bridge_sampling(log_p, x_p, log_q, x_q, bridge="best")
    with pytest.raises(ValueError, match=r"log_p of draws of shape \(30, 1\) has shape \(1,\)"):
        bridge_sampling(lambda x: log_p(x).sum(0), x_p[:, None], log_q, x_q[:, None])
    with pytest.raises(ValueError, match=r"values of log_q are NaN or plus infinity.* \(0,\)"):
        bridge_sampling(log_p, x_p, lambda x: x * math.nan, x_q)
    with pytest.raises(ValueError, match="draws x_p have density zero under log_p.*draws of it"):
        bridge_sampling(lambda x: torch.where(x > 2, 0.0, -math.inf), x_p, log_q, x_q)
    with pytest.raises(ValueError, match=r"at least 2 draws, got shape \(1,\)"):
        bar(torch.zeros(1), torch.zeros(3))
    with pytest.raises(ValueError, match="log_w_reverse are NaN or plus infinity"):
        bar(torch.zeros(3), torch.tensor([0.0, -math.inf]))
    with pytest.raises(ValueError, match=r"but those of the draws, got \(3, 2\) and \(3, 4\)"):
        bar(torch.zeros(3, 2), torch.zeros(3, 4))


def test_effective_draws_count_autocorrelation(rng):
    """Some nine draws count for one on the side that has both the fewer and the slower draws."""
    x_p = 2.0 + 0.5 * autoregressive(rng(21), 4, 1000, 20)
    x_q = torch.randn(4, 4000, 20, dtype=F64, generator=rng(22))
    found = bridge_sampling(log_p, x_p, log_q, x_q, chains=True)
    as_one = bridge_sampling(log_p, x_p.flatten(0, 1), log_q, x_q.flatten(0, 1))
    w = -(log_p(x_p) - log_q(x_p))
    side = (log_p(x_q) - log_q(x_q)).flatten(0, 1), w.flatten(0, 1)
    share = bennett_terms(*side, found.value)[1].softmax(0).reshape(4, 1000, 20)
    tau = integrated_autocorrelation_time(share)
    assert tau.min() > 2
    torch.testing.assert_close(found.ess, as_one.ess / tau)


def chains_of(rng_, problems):
    x_p = 2.0 + 0.5 * autoregressive(rng_, 3, 200, problems)
    x_q = torch.randn(3, 200, problems, dtype=F64, generator=rng_)
    return log_p(x_q) - log_q(x_q), log_p(x_p) - log_q(x_p)


def test_each_problem_of_chains_has_a_time_of_its_own(rng):
    """A dead one, one of equal ratios and one with a constant chain, beside two good ones."""
    forward, reverse = chains_of(rng(23), 5)
    good = [bar(forward[..., i], reverse[..., i], chains=True) for i in (0, 4)]
    forward[..., 1] = -math.inf
    forward[..., 2] = reverse[..., 2] = 0.3
    forward[1, :, 3] = forward[1, 0, 3]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = bar(forward, reverse, chains=True)
    assert len(caught) == 1 and "hardly overlap in 2 of 5 problems" in str(caught[0].message)
    for i, one in zip((0, 4), good, strict=True):
        torch.testing.assert_close(found.value[i], one.value)
        torch.testing.assert_close(found.std_error[i], one.std_error)
        torch.testing.assert_close(found.ess[i], one.ess)
    assert found.std_error[1] == math.inf and found.ess[1] == 0.0
    assert abs(found.value[2] - 0.3) < 1e-12 and found.std_error[2] < 1e-7
    assert found.ess[2] == pytest.approx(300)
    assert found.value[3].isfinite() and found.std_error[3] == math.inf and found.ess[3] == 0.0
    assert not found.converged


@pytest.mark.parametrize("chain", [0, 2])
def test_a_chain_that_never_moved_has_no_standard_error(rng, chain):
    forward, reverse = (w[..., 0] for w in chains_of(rng(24), 1))
    reverse[chain] = reverse[chain, 0]
    with pytest.warns(UserWarning, match="hardly overlap in 1 of 1 problems"):
        found = bar(forward, reverse, chains=True)
    assert found.std_error == math.inf and not found.converged and found.ess == 0.0
    # All constant, but not at one place: nor has this.
    reverse[:] = reverse[:, :1]
    with pytest.warns(UserWarning, match="hardly overlap in 1 of 1 problems"):
        assert bar(forward, reverse, chains=True).std_error == math.inf
    equal = bar(torch.full((3, 9), 0.3), torch.full((3, 9), 0.3), chains=True)
    assert equal.converged and equal.std_error < 1e-7
