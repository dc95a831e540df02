"""MBAR against exact ratios, BAR and pymbar's numbers, with bugs planted that must be found."""

import json
import math
import sys
from pathlib import Path

import pytest
import scipy.stats
import torch

from companion.logz import bridge_sampling, enumeration, mbar
from companion.models.rbm import RBM
from companion.targets import Gaussian
from companion.tempering import linear_schedule, profile
from companion.testing import binary_states
from tests.mcmc.exact_targets import plant
from tests.tempering.exact_paths import exact_path, log_z_at, moments_at

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
F64 = torch.float64
MODULE = sys.modules["companion.logz.multistate"]

# Harmonic oscillators, log p~_k(x) = -stiffness_k (x - centre_k)^2 / 2: log Z has a closed form.
STIFFNESS = torch.tensor([1.0, 2.0, 5.0, 9.0, 16.0], dtype=F64)
CENTRES = torch.tensor([0.0, 0.5, 1.2, 1.5, 2.2], dtype=F64)
COUNTS = (80, 120, 60, 0, 150)
EXACT = -0.5 * (STIFFNESS / STIFFNESS[0]).log()


def oscillators(x):
    """All log-densities at once, `(n,) -> (5, n)`."""
    centres, stiffness = CENTRES.to(x)[:, None], STIFFNESS.to(x)[:, None]
    return -0.5 * stiffness * (x - centres).square()


def of_state(k):
    return lambda x: oscillators(x)[k]


def draws(generator, counts=COUNTS, dtype=F64):
    like = {"dtype": dtype, "device": generator.device}
    centres, scales = CENTRES.to(**like), STIFFNESS.to(**like).rsqrt()
    return [
        centre + scale * torch.randn(n, generator=generator, **like)
        for n, centre, scale in zip(counts, centres, scales, strict=True)
    ]


def is_calibrated(repetitions):
    """Whether the errors agree with the covariances: sum e' C^-1 e is chi-square, at 1e-5."""
    total, degrees = 0.0, 0
    for found in repetitions:
        error = (found.value - EXACT)[1:]
        total += float(error @ torch.linalg.solve(found.covariance[1:, 1:], error))
        degrees += len(error)
    low, high = scipy.stats.chi2.interval(1 - 1e-5, degrees)
    return low < total < high


# ---------------------------------------------------------------- agreement with exact answers


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_mbar_agrees_with_harmonic_oscillators(dtype, rng, device, ledger):
    x = draws(rng(0, device), [50 * n for n in COUNTS], dtype)
    found = mbar([of_state(k) for k in range(5)], x)
    assert found.value.device.type == device.type and found.value.dtype == F64 and found.converged
    assert found.value[0] == 0 and found.std_error[0] == 0
    for k in range(1, 5):
        ledger(
            f"log Z of oscillator {k} to the first, MBAR{', no draw of it' * (k == 3)}, {dtype}",
            exact=EXACT[k],
            estimate=found.value[k].to(dtype),
            std_error=found.std_error[k],
        )


def test_mbar_over_a_path_agrees_with_its_log_z(rng, ledger):
    """From a wide normal law to a narrow one far off; the draws at every beta are exact."""
    base = Gaussian(torch.zeros(3, dtype=F64), 9.0 * torch.eye(3, dtype=F64))
    target = Gaussian(torch.full((3,), 4.0, dtype=F64), 0.02 * torch.eye(3, dtype=F64))
    path, betas = exact_path(base, target), linear_schedule(20) ** 3
    mean, covariance = moments_at(base, target, betas)
    noise = torch.randn(200, 20, 3, dtype=F64, generator=rng(1))
    x = mean + noise * covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    found = mbar(lambda x: profile(path, x)(betas[:, None]), list(x.unbind(1)))
    exact = log_z_at(base, target, betas)
    ledger(
        "log Z of a normal law, MBAR over 20 betas",
        exact=exact[-1] - exact[0],
        estimate=found.value[-1],
        std_error=found.std_error[-1],
    )
    assert ((found.value - exact + exact[0])[1:] / found.std_error[1:]).abs().max() < Z
    one_by_one = mbar(
        [lambda x, b=b: path.log_prob(x, b) for b in betas.tolist()], list(x.mT.mT.unbind(1))
    )
    torch.testing.assert_close(one_by_one.value, found.value)


def test_mbar_over_temperatures_agrees_with_enumeration(rng, ledger):
    rbm = RBM(8, 6, dtype=F64, generator=rng(2))
    rbm.W.data.mul_(150.0)
    path, betas = rbm.annealing_path(), linear_schedule(5)
    states = binary_states(8, dtype=F64)
    x = []
    for beta in betas.tolist():
        share = path.log_prob(states, beta).softmax(0)
        x.append(states[torch.multinomial(share, 500, replacement=True, generator=rng(3))])
    found = mbar(lambda x: profile(path, x)(betas[:, None]), x)
    ledger(
        "log Z of a small RBM, MBAR over 5 temperatures",
        exact=enumeration(rbm.log_prob, 8, dtype=F64).value,
        estimate=found.value[-1] + path.base_log_z,
        std_error=found.std_error[-1],
    )


def test_weights_give_expectations_under_every_state(rng):
    found = mbar(oscillators, x := draws(rng(4), [50 * n for n in COUNTS]))
    weights = found.log_weights.exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=F64))
    mean = weights @ torch.cat(x)
    # Rough errors: the states are some 3,000 draws each or more by `ess`.
    assert ((mean - CENTRES) * (STIFFNESS * found.ess).sqrt()).abs().max() < Z
    assert (found.ess > torch.tensor(COUNTS) * 50).all() and (found.ess < sum(COUNTS) * 50).all()


# ---------------------------------------------------------------- agreement with other methods


def test_two_states_are_a_bridge(rng):
    x = draws(rng(5), (300, 100, 0, 0, 0))[:2]
    found = mbar([of_state(0), of_state(1)], x)
    bridge = bridge_sampling(of_state(1), x[1], of_state(0), x[0])
    torch.testing.assert_close(found.value[1], bridge.value, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.std_error[1], bridge.std_error, rtol=0.03, atol=0)


def test_the_equations_hold_as_they_are_written(rng):
    x = draws(rng(6))
    q, n = oscillators(torch.cat(x)), torch.tensor(COUNTS, dtype=F64)
    c = torch.zeros(5, dtype=F64)
    for _ in range(500):  # their fixed point by repeated substitution
        c = (q - ((n.log() - c)[:, None] + q).logsumexp(0)).logsumexp(1)
    torch.testing.assert_close(mbar(oscillators, x).value, c - c[0], rtol=0, atol=1e-10)


def test_mbar_agrees_with_pymbar():
    """The numbers are by `benchmarks/multistate.py --reference`, of fixed quantiles as draws."""
    reference = json.loads(Path(__file__).with_name("pymbar_reference.json").read_text())
    x = [torch.tensor(points, dtype=F64) for points in reference["draws"]]
    found = mbar(oscillators, x)
    minus_f, error = (torch.tensor(reference[k], dtype=F64) for k in ("minus_f", "error"))
    torch.testing.assert_close(found.value, minus_f, rtol=0, atol=1e-9)
    # Of every pair of states, as pymbar has them.
    c = found.covariance
    pairs = (c.diagonal()[:, None] + c.diagonal() - 2.0 * c).clamp(min=0.0).sqrt()
    torch.testing.assert_close(pairs, error, rtol=0, atol=1e-8)
    ess = torch.tensor(reference["effective_sample_number"], dtype=F64)
    torch.testing.assert_close(found.ess, ess, rtol=1e-8, atol=0)
    neglected = (c.diagonal()[:, None] + c.diagonal()).sqrt()  # the covariances of the states
    assert ((neglected - error).abs() > 0.01).any()


def test_neither_the_order_of_the_states_nor_constants_matter(rng):
    x, order = draws(rng(7)), [4, 0, 3, 1, 2]
    found = mbar(oscillators, x)
    shift = torch.tensor([0.0, 800.0, -5000.0, 40.0, 2e4], dtype=F64)
    other = mbar(lambda x: (oscillators(x) + shift[:, None])[order], [x[k] for k in order])
    assert other.converged
    expected = (found.value + shift)[order]
    torch.testing.assert_close(other.value, expected - expected[0], rtol=0, atol=1e-7)
    back = torch.tensor(order).argsort()
    c = other.covariance[back][:, back]  # relative to state 4; of the others to state 0:
    c = c - c[0] - c[:, :1] + c[0, 0]
    torch.testing.assert_close(c, found.covariance, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- standard errors

PLANTED = {
    "the weights' own covariance alone": (
        "covariance = gram + overlap @ inverse @ overlap.T",
        "covariance = gram",
    ),
    "states as if independent": (
        "covariance = covariance - covariance[0]",
        "covariance = covariance.diagonal().diag()\n    covariance = covariance - covariance[0]",
    ),
    "states weighed as if all had the same number": (
        "n = counts[sampled].double()",
        "n = (counts[sampled] / counts[sampled] * counts.sum() / len(sampled)).double()",
    ),
}


def repeat(generator, num):
    return [mbar(oscillators, draws(generator)) for _ in range(num)]


def test_covariances_are_calibrated(rng):
    found = repeat(rng(8), 200)
    assert is_calibrated(found)
    z = torch.stack([(log_z.value - EXACT)[1:] / log_z.std_error[1:] for log_z in found])
    assert z.mean(0).abs().max() < Z / math.sqrt(200)


@pytest.mark.filterwarnings("ignore:MBAR did not converge", "ignore:the states")
@pytest.mark.parametrize("bug", PLANTED)
def test_a_wrong_covariance_or_equation_is_found(bug, rng, monkeypatch):
    plant(monkeypatch, mbar, *PLANTED[bug], where=sys.modules[__name__])
    assert not is_calibrated(repeat(rng(8), 120))


def test_the_spread_of_chains_counts_autocorrelation(rng):
    """Chains that wander over all states, as in parallel tempering: 40 of them, 30 draws each."""
    noise = torch.randn(31, 40, 4, 200, dtype=F64, generator=rng(9))
    x = [noise[0]]
    for step in noise[1:]:
        x.append(0.9 * x[-1] + math.sqrt(1.0 - 0.9**2) * step)
        x[-1] = x[-1].roll(1, 1)  # the states exchange what they have
    x = torch.stack(x, 1) / STIFFNESS[:4].sqrt()[:, None] + CENTRES[:4, None]
    z = {True: [], False: []}
    for i in range(200):
        parts = [x[:, :, k, i] for k in range(4)]
        for chains in z if i < 40 else [True]:
            given = parts if chains else [part.flatten() for part in parts]
            found = mbar(lambda x: oscillators(x)[:4], given, chains=chains)
            z[chains].append((found.value[3] - EXACT[3]) / found.std_error[3])
    z = {chains: torch.stack(values) for chains, values in z.items()}
    scaled = z[True] * math.sqrt(37 / 39)  # Student's law of 39 degrees of freedom
    low, high = scipy.stats.chi2.interval(1 - 1e-5, 200)
    assert low < scaled.square().sum() < high and abs(z[True].mean()) < Z / math.sqrt(200)
    assert z[False].square().sum() > scipy.stats.chi2.isf(1e-5, 40)


# ---------------------------------------------------------------- loud where it fails


def test_states_that_hardly_overlap_are_named(rng):
    x = draws(rng(10), (200, 200, 200, 0, 0))[:3]
    far = 12.0  # the third oscillator, and a fourth beside it, are moved away
    x[2] = x[2] + far
    x.append(torch.randn(100, dtype=F64, generator=rng(11)) / 3.0 + CENTRES[3] + far)

    def log_probs(x):
        return torch.cat([oscillators(x)[:2], oscillators(x - far)[2:4]])

    with pytest.warns(UserWarning, match=r"the states \[2, 3\] are connected with the 2 other"):
        found = mbar(log_probs, x)
    assert found.std_error[1] < 0.2 and found.std_error[2:].min() > 3.0
    assert (found.value[3] - found.value[2] - EXACT[3] + EXACT[2]).abs() < 0.5


def test_states_that_share_no_draw_have_no_ratio():
    def log_probs(x):
        inside = (x > torch.tensor([[0.0], [0.5], [9.0]])) & (x < torch.tensor([[1], [1.5], [10]]))
        return torch.where(inside, 0.0, -math.inf)

    at = torch.linspace(0.01, 0.99, 50)
    with pytest.warns(UserWarning, match=r"the states \[2\] are connected .* effectively 0 draws"):
        found = mbar(log_probs, [at, at + 0.5, at + 9.0])
    assert not found.converged and found.std_error.isinf().tolist() == [False, False, True]
    with pytest.warns(UserWarning, match="represent state 2"):
        absent = mbar(log_probs, [at, at + 0.5, at[:0]])
    assert absent.value[2] == -math.inf and absent.std_error[1] < 0.3


def test_links_lead_both_ways_or_nothing_has_converged():
    # Uniform laws on (0, 1), (0, 2) and (1, 3). If all draws of the second lie in the third, no
    # link leads back to the first: log Z runs off, and the equations hold better and better.
    def log_probs(x):
        low, high = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[1.0], [2.0], [3.0]])
        return torch.where((x > low) & (x < high), 0.0, -math.inf)

    at = torch.linspace(0.01, 0.99, 50)
    found = mbar(log_probs, [at, 2.0 * at, 1.0 + 2.0 * at])
    assert found.converged and found.value[1:].exp().sub(2.0).abs().max() < 0.1
    with pytest.warns(UserWarning, match=r"the states \[0\] are connected"):
        found = mbar(log_probs, [at, 1.0 + at, 1.0 + 2.0 * at])
    assert not found.converged and found.std_error[1:].isinf().all()


def test_a_state_of_few_draws_among_close_ones_is_no_cause_for_alarm(rng):
    found = mbar(oscillators, draws(rng(12), (500, 3, 500, 1, 500)))
    assert found.std_error.max() < 0.2


def test_a_state_that_the_draws_do_not_represent_is_named(rng):
    with pytest.warns(UserWarning, match="effectively .* represent state 4"):
        mbar(oscillators, draws(rng(13), (150, 0, 0, 0, 0)))


# ---------------------------------------------------------------- input


def test_inputs_decide_the_device_and_no_graph_is_kept(rng):
    x = draws(rng(14))
    scale = torch.ones((), dtype=F64, requires_grad=True)
    torch.set_default_device("meta")
    try:
        found = mbar(lambda x: scale * oscillators(x), x)
        chains = mbar(oscillators, [part.reshape(10, -1) for part in x], chains=True)
    finally:
        torch.set_default_device("cpu")
    assert not found.value.requires_grad
    torch.testing.assert_close(found.value, chains.value)


def test_bad_input_is_refused_with_a_sentence(rng):
    x = draws(rng(15))
    with pytest.raises(ValueError, match=r"from 5 states must be \(5, 410\).*got \(4, 410\)"):
        mbar(lambda x: oscillators(x)[:4], x)
    with pytest.raises(ValueError, match=r"plus infinity, the first at \(state, draw\) = \(1, 0\)"):
        mbar([of_state(0), lambda x: x * math.nan], x[:2])
    with pytest.raises(ValueError, match="density zero in their own state.*state 1: are they in"):
        mbar([of_state(0), lambda x: torch.where(x > 3, 0.0, -math.inf)], x[:2])
    with pytest.raises(ValueError, match="at least 2 draws are needed in all, got 1"):
        mbar([of_state(0), of_state(1)], [x[0][:1], x[1][:0]])
    with pytest.raises(ValueError, match=r"same two or more chains; got \[5, 6\] chains"):
        mbar([of_state(0), of_state(1)], [torch.zeros(5, 2), torch.zeros(6, 2)], chains=True)


def test_states_without_draws_and_no_states_at_all():
    def densities(x):
        return -0.5 * (x * torch.tensor([[1.0], [1.5], [2.0]], dtype=F64)).square()

    g = torch.Generator().manual_seed(0)
    x = [s * torch.randn(4, 50, dtype=F64, generator=g) for s in (1.0, 0.5)]
    empty = torch.zeros(0, dtype=F64)
    found = mbar(densities, [x[0], empty, x[1]], chains=True)
    other = mbar(densities, [x[0], empty.reshape(4, 0), x[1]], chains=True)
    assert torch.equal(found.value, other.value) and found.value.isfinite().all()
    with pytest.raises(ValueError, match=r"must be \(chains, draws, \*event\), got \(200,\)"):
        mbar(densities, [x[0], empty, x[1].flatten()], chains=True)
    for chains in False, True:
        with pytest.raises(ValueError, match="at least one state, got none"):
            mbar([], [], chains=chains)
