"""Thermodynamic integration and stepping stones against exact answers."""

import itertools
import math
import sys
import warnings

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Cauchy, Independent, Normal

from companion.logz import sample_ladder, stepping_stone, thermodynamic_integration
from companion.logz.path_sampling import _derivatives, _discretization, _integrals
from companion.mcmc import random_walk
from companion.models.ising import Ising
from companion.models.rbm import RBM
from companion.targets import kaufman_log_z
from companion.tempering import GeometricPath, parallel, paths, profile
from companion.testing import binary_states
from tests.mcmc.exact_targets import plant
from tests.tempering.exact_paths import F64, ExactGaussians

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
BOTH = {"thermodynamic integration": thermodynamic_integration, "stepping stones": stepping_stone}
METHODS = pytest.mark.parametrize("method", BOTH)
SIX = [0.0, 0.04, 0.12, 0.3, 0.6, 1.0]
FINE = torch.linspace(0.0, 1.0, 17, dtype=F64) ** 3
MODULE = sys.modules["companion.logz.path_sampling"]


def wide(**like) -> ExactGaussians:
    """From N(0, 9) to N((1, -2), (1, 1/4)): two oscillators with other centres and stiffnesses."""
    return ExactGaussians([0.0, 0.0], [3.0, 3.0], [1.0, -2.0], [1.0, 0.5], **like)


def small_rbm(device="cpu", dtype=F64) -> RBM:
    rbm = RBM(6, 4, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(0))
    with torch.no_grad():
        rbm.W.mul_(100.0)
        rbm.b.add_(0.5)
    return rbm


# ---------------------------------------------------------------- exact answers


@METHODS
@pytest.mark.parametrize("swap", [True, False], ids=["swaps", "apart"])
def test_both_agree_with_the_exact_log_z_of_oscillators(rng, device, ledger, method, swap):
    path = wide(device=device, rho=0.5)
    betas = torch.linspace(0.0, 1.0, 21, dtype=F64) ** 3
    run = {"num_chains": 50, "warmup": 20, "swap": swap, "generator": rng(1, device)}
    log_z = BOTH[method](path, betas, 30, **run)
    assert log_z.std_error < 0.05
    ledger(
        f"log Z of two oscillators by {method}{'' if swap else ', no swaps'}",
        exact=path.log_z(1.0),
        estimate=log_z.value,
        std_error=log_z.std_error,
    )
    without_base = log_z.value - path.base_log_z - path.log_z(1.0)
    assert abs(without_base) > 2 * Z * log_z.std_error


@METHODS
@pytest.mark.parametrize("name", ["RBM", "Ising"])
def test_both_agree_with_enumeration_and_with_kaufmans_formula(rng, device, ledger, method, name):
    if name == "RBM":
        model = small_rbm(device)
        exact = model.log_z().value
    else:
        model = Ising(6, 6, coupling=0.44, dtype=F64, device=device)
        exact = kaufman_log_z(6, 6, 0.44)
    betas = torch.linspace(0.0, 1.0, 13)
    run = {"num_chains": 30, "warmup": 50, "generator": rng(0, device)}
    log_z = BOTH[method](model.annealing_path(), betas, 60, **run)
    assert log_z.std_error < 0.1
    ledger(
        f"log Z of the {name} by {method}",
        exact=exact,
        estimate=log_z.value,
        std_error=log_z.std_error,
    )


@METHODS
def test_float32_machines_give_float64_estimates(rng, device, method):
    rbm = small_rbm(device, torch.float32)
    log_z = BOTH[method](
        rbm.annealing_path(), FINE, 40, num_chains=20, warmup=20, generator=rng(0, device)
    )
    assert log_z.value.dtype == F64
    assert abs(log_z.value - rbm.log_z().value) < Z * log_z.std_error < 0.5


@pytest.mark.filterwarnings("ignore:the discretisation error")  # nine draws know it badly
@METHODS
def test_draws_that_are_there_serve_as_those_of_a_run(rng, device, method):
    path = wide(device=device, rho=0.5)
    run = {"num_chains": 3, "warmup": 2, "thin": 2}
    draws = sample_ladder(path, FINE, 9, **run, generator=rng(0, device))
    assert draws.shape == (17, 3, 9, 2)
    of_draws = BOTH[method](path, FINE, draws)
    of_run = BOTH[method](path, FINE, 9, **run, generator=rng(0, device))
    torch.testing.assert_close(of_draws.value, of_run.value, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(of_draws.std_error, of_run.std_error, rtol=1e-9, atol=0.0)


def test_the_last_rung_of_a_ladder_with_swaps_is_parallel_tempering(rng, device):
    path, run = wide(device=device, rho=0.5), {"num_chains": 4, "warmup": 3, "thin": 2}
    draws = sample_ladder(path, SIX, 7, **run, generator=rng(0, device))
    trace = parallel.parallel_tempering(path, SIX, 7, **run, generator=rng(0, device)).trace
    assert torch.equal(draws[-1], trace.x)


def test_draws_of_a_ladder_follow_the_law_at_every_beta(rng, device):
    path = wide(device=device)
    for swap in (True, False):
        draws = sample_ladder(
            path, SIX, 10, num_chains=500, warmup=0, swap=swap, generator=rng(0, device)
        )
        mean, sd = path.moments(torch.tensor(SIX, device=device))
        # Swaps carry points on to the next draw, so count the chains alone.
        error = (draws.mean((1, 2)) - mean) / (sd / math.sqrt(500))
        assert error.abs().max() < Z + 1.0
        assert ((draws.flatten(1, 2).std(1) / sd - 1.0).abs() < 0.1).all()


# ---------------------------------------------------------------- the standard errors


@pytest.mark.filterwarnings("ignore:the discretisation error")
def test_the_standard_errors_are_calibrated(rng, device):
    """200 repetitions as one batch, of 32 chains each. The kernel is slow, so that draws in
    succession and, by swaps, neighbouring rungs have much in common."""
    path = wide(device=device, rho=0.9)
    betas = torch.linspace(0.0, 1.0, 7, dtype=F64) ** 3
    draws = sample_ladder(path, betas, 12, num_chains=6400, warmup=40, generator=rng(0, device))
    low, high = stats.chi2.ppf([0.5e-5, 1.0 - 0.5e-5], 200)
    for method in BOTH.values():
        parts = [method(path, betas, part) for part in draws.split(32, dim=1)]
        error = torch.stack([part.value for part in parts]) - path.log_z(1.0)
        if method is thermodynamic_integration:  # what the quadrature is off by, told apart
            error = error - quadrature(path, betas) + path.log_z(1.0)
        z = error / torch.stack([part.std_error for part in parts])
        assert low < z.square().sum() < high
        assert z.mean().abs() < Z / math.sqrt(200)
        # As if all draws were independent: one chain each.
        apart = draws[:, :320].reshape(len(betas), -1, 1, 2)
        independent = method(path, betas, apart).std_error * math.sqrt(10.0)
        assert not low < (error / independent).square().sum() < high


def exact_moments(path: ExactGaussians, betas: Tensor) -> tuple[Tensor, Tensor]:
    """`E_beta[U]` and its slope, by differentiating the closed form of log Z."""
    beta = betas.clone().requires_grad_()
    (m,) = torch.autograd.grad(path.log_z(beta).sum(), beta, create_graph=True)
    (s,) = torch.autograd.grad(m.sum(), beta)
    return m.detach(), s


def quadrature(path: ExactGaussians, betas: Tensor) -> Tensor:
    """Log Z by the rule, from exact means and variances."""
    return path.base_log_z + _integrals(betas, *exact_moments(path, betas)).sum()


# ---------------------------------------------------------------- the rule


def quadrature_error(path: ExactGaussians, num: int) -> float:
    betas = torch.linspace(0.0, 1.0, num, dtype=F64)
    return float(quadrature(path, betas) - path.log_z(1.0))


def test_the_rule_is_of_fourth_order_and_its_error_is_told(monkeypatch):
    path = ExactGaussians([0.0], [2.0], [1.0], [0.8])
    errors = [quadrature_error(path, num) for num in (17, 33, 65)]
    for coarse, fine in itertools.pairwise(errors):
        assert 13.0 < coarse / fine < 19.0
    for num in (2, 3, 4, 5, 9, 16, 17, 33, 64):
        betas = torch.linspace(0.0, 1.0, num, dtype=F64)
        told = float(_discretization(betas, *exact_moments(path, betas)))
        true = abs(quadrature_error(path, num))
        assert true < told < 12.0 * true, num
    # The slopes the wrong way round: no better than second order.
    plant(monkeypatch, _integrals, "slope[:-step] - slope[step:]", "slope[step:] - slope[:-step]")
    monkeypatch.setitem(globals(), "_integrals", MODULE._integrals)
    assert abs(quadrature_error(path, 65)) > 100.0 * abs(errors[2])


def test_rectangles_bound_log_z_and_differ_by_the_symmetrised_divergences():
    """`h (m_{i+1} - m_i) = KL(i || i+1) + KL(i+1 || i)`, along a geometric path."""
    path, betas = wide(), torch.tensor(SIX, dtype=F64)
    m, _ = exact_moments(path, betas)
    h = betas.diff()
    low, high = (path.base_log_z + (h * m[part]).sum() for part in (slice(-1), slice(1, None)))
    assert low < path.log_z(1.0) < high
    mean, sd = path.moments(betas)

    def divergence(i: int, j: int) -> Tensor:
        ratio = (sd[i] / sd[j]).square()
        moved = ((mean[i] - mean[j]) / sd[j]).square()
        return 0.5 * (ratio - 1.0 - ratio.log() + moved).sum()

    both = [divergence(i, i + 1) + divergence(i + 1, i) for i in range(5)]
    torch.testing.assert_close(h * m.diff(), torch.stack(both), rtol=1e-10, atol=0.0)


def test_the_slope_counts_a_path_that_is_not_geometric():
    """An RBM's path bends: d/dbeta E[U] is more than the variance of U."""
    rbm = small_rbm()
    path, states = rbm.annealing_path(), binary_states(6).to(F64)
    rows = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=F64)[:, None, None]
    at = profile(path, states.expand(4, 1, 64, 6))
    first, second = _derivatives(at, rows, torch.Size((4, 1, 64)))
    law = at(rows).softmax(-1)

    def mean(beta: Tensor) -> Tensor:
        u = _derivatives(at, beta, torch.Size((4, 1, 64)))[0]
        return (at(beta).softmax(-1) * u).sum(-1)

    numeric = (mean(rows + 1e-5) - mean(rows - 1e-5)) / 2e-5
    m = (law * first).sum(-1, keepdim=True)
    variance = (law * (first - m).square()).sum(-1)
    bend = (law * second).sum(-1)
    torch.testing.assert_close(variance + bend, numeric, rtol=1e-6, atol=1e-6)
    assert (bend.abs() > 1e-2).all()  # without it the slopes are wrong


@pytest.mark.filterwarnings("ignore:the discretisation error")
def test_on_a_path_that_is_not_geometric_the_integral_takes_the_whole_slope(rng, monkeypatch):
    rbm = small_rbm()
    path, states = rbm.annealing_path(), binary_states(6).to(F64)
    betas = torch.linspace(0.0, 1.0, 5, dtype=F64)
    law = profile(path, states)(betas[:, None]).softmax(-1)
    x = states[torch.multinomial(law, 200_000, True, generator=rng(0))].reshape(5, 100, 2000, 6)

    def error() -> float:
        found = thermodynamic_integration(path, betas, x)
        return float((found.value - rbm.log_z().value) / found.std_error)

    assert abs(error()) < Z
    whole, variance = ".square() + second)", ".square())"
    plant(monkeypatch, thermodynamic_integration, whole, variance, where=sys.modules[__name__])
    assert abs(error()) > 2 * Z  # with the variance of U alone


def test_a_coarse_ladder_warns_and_a_fine_one_does_not(rng, device):
    path = wide(device=device)
    run = {"num_chains": 100, "warmup": 0}
    with pytest.warns(UserWarning, match="the discretisation error, about .* exceeds") as caught:
        coarse = thermodynamic_integration(
            path, [0.0, 0.5, 1.0], 50, **run, generator=rng(0, device)
        )
    assert caught[0].filename == __file__
    assert abs(coarse.value - path.log_z(1.0)) > Z * coarse.std_error
    assert coarse.discretization > 0.3 * abs(coarse.value - path.log_z(1.0))
    fine = torch.linspace(0.0, 1.0, 25, dtype=F64) ** 3
    log_z = thermodynamic_integration(path, fine, 50, **run, generator=rng(0, device))
    assert log_z.discretization < 0.7 * log_z.std_error


# ---------------------------------------------------------------- what is refused, what is told

PLANTS = {
    "weights for the rung below": (
        parallel.to_next,
        "above[:-1] - own[:-1]",
        "own[:-1] - above[:-1]",
    ),
    "draws of the rung above": (parallel.to_next, "above[:-1] - own[:-1]", "(above - own)[1:]"),
}


@pytest.mark.filterwarnings("ignore:.* steps of the ladder are too long")
@pytest.mark.parametrize("name", PLANTS)
def test_wrong_stepping_stones_are_rejected(rng, device, monkeypatch, name):
    plant(monkeypatch, *PLANTS[name], where=MODULE)
    path = wide(device=device)
    log_z = stepping_stone(path, SIX, 20, num_chains=50, warmup=0, generator=rng(0, device))
    assert abs(log_z.value - path.log_z(1.0)) > 2 * Z * log_z.std_error


@pytest.mark.filterwarnings("ignore:the discretisation error")
def test_a_derivative_that_vanishes_at_the_ends_is_rejected(rng, device, monkeypatch):
    """A density that is switched at beta = 0 and 1 has the right values and the wrong slope."""
    like = {"dtype": F64, "device": device}
    base = Independent(Normal(torch.zeros(2, **like), 2.0, validate_args=False), 1)

    def density(x: Tensor) -> Tensor:
        return -0.5 * (x - 1.0).square().sum(-1)

    def walk(log_prob):
        return random_walk(log_prob, 1.5)

    def error() -> float:
        path = GeometricPath(base, density, walk)
        run = {"num_chains": 100, "warmup": 30, "generator": rng(0, device)}
        log_z = thermodynamic_integration(path, FINE, 30, **run)
        return float((log_z.value - math.log(2.0 * math.pi)).abs() / log_z.std_error)

    assert error() < Z
    plant(monkeypatch, paths._mix, "mixed.isnan()", "(beta == 0.0) | (beta == 1.0)")
    assert error() > 2 * Z


class Bare:
    """A path without a profile; `frozen` hides its dependence on beta from autograd."""

    def __init__(self, path: ExactGaussians, frozen: bool):
        self.base_log_z, self.sample_base, self.step = path.base_log_z, path.sample_base, path.step
        self.log_prob = torch.no_grad()(path.log_prob) if frozen else path.log_prob


def test_a_path_needs_a_derivative_in_beta(rng):
    path = wide()
    run = {"num_chains": 4, "warmup": 0}
    of_bare = thermodynamic_integration(Bare(path, False), FINE, 5, **run, generator=rng(0))
    torch.testing.assert_close(
        of_bare.value, thermodynamic_integration(path, FINE, 5, **run, generator=rng(0)).value
    )
    with pytest.raises(ValueError, match=r"no derivative in beta.*torch\.no_grad"):
        thermodynamic_integration(Bare(path, True), FINE, 5, **run, generator=rng(0))
    stepping_stone(Bare(path, True), FINE, 5, **run, generator=rng(0))  # needs none


def test_a_target_that_is_zero_at_draws_of_the_base(rng, device, ledger):
    like = {"dtype": F64, "device": device}
    base = Normal(torch.zeros((), **like), 1.0)

    def half(x: Tensor) -> Tensor:
        return torch.where(x > 0.0, base.log_prob(x), -math.inf)

    path = GeometricPath(base, half, lambda log_prob: random_walk(log_prob, 1.0))
    run = {"num_chains": 50, "warmup": 20}
    with pytest.raises(ValueError, match=r"not finite at \d+ of 1000 draws at beta = 0: the base"):
        thermodynamic_integration(path, [0, 0.5, 1], 20, **run, generator=rng(0, device))
    log_z = stepping_stone(path, [0, 0.5, 1], 20, **run, generator=rng(0, device))
    ledger(
        "half of a normal law by stepping stones",
        exact=-math.log(2.0),
        estimate=log_z.value,
        std_error=log_z.std_error,
    )


def test_a_base_with_heavier_tails_than_the_target_is_loud(rng, device):
    base = Cauchy(torch.zeros((), dtype=F64, device=device), 1.0)
    path = GeometricPath(base, lambda x: -0.5 * x.square(), lambda p: random_walk(p, 1.0))
    betas = torch.linspace(0, 1, 6) ** 4
    run = {"num_chains": 50, "warmup": 10, "generator": rng(0, device)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thermodynamic_integration(path, betas, 20, **run)
    assert any("of the variance of the derivative" in str(w.message) for w in caught)


def test_a_ladder_with_too_long_steps_is_loud(rng, device):
    path = ExactGaussians([0.0] * 8, [20.0] * 8, [0.0] * 8, [1.0] * 8, device=device)
    run = {"num_chains": 20, "warmup": 0, "generator": rng(0, device)}
    with pytest.warns(UserWarning, match=r"1 of 1 steps of the ladder are too long: of the 400"):
        log_z = stepping_stone(path, [0.0, 1.0], 20, **run)
    assert log_z.ess < 10.0
    fine = stepping_stone(path, torch.linspace(0, 1, 30) ** 6, 20, **run)
    assert fine.ess > 10.0


@METHODS
def test_one_chain_has_no_standard_error(rng, method):
    log_z = BOTH[method](wide(), FINE, 20, num_chains=1, warmup=0, generator=rng(0))
    assert log_z.value.isfinite() and log_z.std_error.isnan()


@METHODS
def test_bad_input_gets_a_sentence(rng, method):
    path = wide()
    with pytest.raises(ValueError, match="ascend from 0 to 1"):
        BOTH[method](path, [0.1, 1.0], 5)
    with pytest.raises(ValueError, match=r"R = 6 as there are betas; got \(5, 2, 3, 2\)"):
        BOTH[method](path, SIX, torch.zeros(5, 2, 3, 2))
    with pytest.raises(ValueError, match="num_chains"):
        BOTH[method](path, SIX, 5, num_chains=0)
    with pytest.raises(TypeError, match="AnnealingPath"):
        BOTH[method](lambda x: x, SIX, 5)
    with pytest.raises(TypeError, match="AnnealingPath"):
        BOTH[method](lambda x: x, SIX, torch.zeros(6, 2, 3, 2))


@pytest.mark.filterwarnings("ignore:the discretisation error")
@METHODS
def test_all_tensors_follow_the_path(rng, method):
    path, model = wide(), Ising(4, 4, coupling=0.3, dtype=F64, device="cpu")
    torch.set_default_device("meta")
    try:
        for one in (path, model.annealing_path()):
            for swap in (True, False):
                log_z = BOTH[method](
                    one, FINE, 3, num_chains=3, warmup=1, swap=swap, generator=rng(0)
                )
                assert log_z.value.device.type == "cpu"
    finally:
        torch.set_default_device("cpu")


def over_a_half(rng_) -> tuple[GeometricPath, Tensor]:
    """A target that is zero below 0, and draws of its ladder."""
    base = Normal(torch.zeros((), dtype=F64), 1.0)

    def half(x: Tensor) -> Tensor:
        return torch.where(x > 0.0, base.log_prob(x), -math.inf)

    path = GeometricPath(base, half, lambda log_prob: random_walk(log_prob, 1.0))
    x = torch.randn(3, 10, 20, dtype=F64, generator=rng_)
    x[1:] = x[1:].abs()
    return path, x


def test_stepping_stones_refuse_draws_that_are_none(rng):
    path, x = over_a_half(rng(1))
    betas, zero = [0.0, 0.5, 1.0], torch.zeros((), dtype=F64)
    log_z = stepping_stone(path, betas, x)  # zero density at the next beta is no fault
    assert abs(log_z.value + math.log(2.0)) < Z * log_z.std_error
    wrong = x.clone()
    wrong[1, 3, 7] = -1.0
    with pytest.raises(ValueError, match=r"1 of 400 draws have density zero .* = \(1, 3, 7\)"):
        stepping_stone(path, betas, wrong)
    with pytest.raises(ValueError, match="in the order of betas"):
        stepping_stone(path, betas, x[[1, 0, 2]])
    for value in math.nan, math.inf:

        def broken(x: Tensor, value: float = value) -> Tensor:
            return torch.where(x > 2.0, value, -x.abs())

        path = GeometricPath(Normal(zero, 1.0), broken, lambda log_prob: random_walk(log_prob, 1.0))
        with pytest.raises(ValueError, match="NaN or plus infinity"):
            stepping_stone(path, betas, x)
        only_above = x.clamp(max=1.5)
        only_above[0, 0, 5] = 3.0  # its density at its own beta is the base's
        with pytest.raises(ValueError, match=r"1 of 400 draws .* = \(0, 0, 5\), beta = 0:"):
            stepping_stone(path, betas, only_above)


def test_the_base_is_blamed_only_where_the_target_is_zero(rng):
    path, x = over_a_half(rng(1))
    with pytest.raises(ValueError, match="at beta = 0: the base puts mass"):
        thermodynamic_integration(path, [0.0, 0.5, 1.0], x)
    base = Normal(torch.zeros((), dtype=F64), 1.0)
    path = GeometricPath(
        base, lambda x: torch.where(x > 0.0, -x, math.nan), lambda p: random_walk(p, 1.0)
    )
    with pytest.raises(ValueError, match="at beta = 0: look at the log-density there"):
        thermodynamic_integration(path, [0.0, 0.5, 1.0], x)


@METHODS
def test_a_batch_of_machines_is_refused(rng, method):
    path = RBM(4, 3, batch_shape=(3,)).annealing_path()
    with pytest.raises(ValueError, match=r"a batch of machines \(3,\): unbind"):
        BOTH[method](path, SIX, 5, generator=rng(0))
    with pytest.raises(ValueError, match=r"a batch of machines \(3,\): unbind"):
        BOTH[method](path, SIX, torch.zeros(6, 2, 3, 4))
