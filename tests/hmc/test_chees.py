"""ChEES against exact trajectory lengths, and jittered HMC as a kernel."""

import math
import warnings

import pytest
import scipy.optimize
import torch
from torch import Tensor

from companion.core import Kernel, sample
from companion.hmc import chees
from companion.hmc.chees import (
    Ascent,
    chees_warmup,
    criterion_gradient,
    jittered_hmc,
    jittered_steps,
    van_der_corput,
)
from companion.hmc.integrator import Phase, leapfrog
from companion.hmc.static import hmc
from companion.mcmc.mass import make_mass
from companion.targets import Banana, Gaussian, SkewedProduct
from companion.testing import assert_invariant, invariance_test

F64 = {"dtype": torch.float64}
DTYPES = [torch.float32, torch.float64]
SKEW = torch.tensor([[1.0, 0.0], [0.5, 2.0]], **F64)


def unit_gaussian(d: int, dtype=torch.float64, device="cpu") -> Gaussian:
    like = {"dtype": dtype, "device": device}
    return Gaussian(torch.zeros(d, **like), torch.eye(d, **like))


def no_mass(d: int):
    return make_mass(None, torch.Size([d]), torch.float64, torch.device("cpu"))


# ---------------------------------------------------------------- the jitter


def test_fractions_fill_the_unit_interval_evenly():
    fractions = [van_der_corput(i) for i in range(1023)]
    assert sorted(fractions) == [k / 1024 for k in range(1, 1024)]
    for n in range(1, 1023):  # the discrepancy of the first n is at most (log2 n + 2) / n
        below = sum(u < 0.3 for u in fractions[:n]) / n
        assert abs(below - 0.3) <= (math.log2(n) + 2) / n


def test_numbers_of_steps_follow_the_fractions():
    assert [jittered_steps(i, 0.25, 2.0) for i in range(7)] == [4, 2, 6, 1, 5, 3, 7]
    assert jittered_steps(0, 1.0, 0.01) == 1


def test_a_step_is_one_of_hmc_with_that_many_leapfrog_steps(rng, device):
    target = Banana(torch.tensor([2.0, 1.0], device=device, **F64), 0.5)
    mass = torch.tensor([0.3, 2.0], device=device, **F64)
    x = target.sample(6, generator=rng(0, device))
    kernel = jittered_hmc(target, 0.25, 2.0, mass)
    state = kernel.init(x)
    for i, num_steps in enumerate((4, 2, 6, 1)):
        plain = hmc(target, 0.25, num_steps, mass)
        expected, _ = plain.step(plain.init(state.x), generator=rng(i, device))
        state, info = kernel.step(state, generator=rng(i, device))
        assert torch.equal(state.x, expected.x)
        assert state.num_moves.tolist() == [i + 1] * 6 and info.accept_prob.shape == (6,)


# ---------------------------------------------------------------- invariance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["skewed", "banana", "tempered"])
def test_jittered_hmc_leaves_its_target_invariant(name, dtype, rng, device):
    if name == "banana":
        target = Banana(torch.tensor([2.0, 1.0], dtype=dtype, device=device), 0.5)
    else:
        target = SkewedProduct(SKEW.to(device, dtype))
    log_prob, exact = target, target
    if name == "tempered":  # the square of a normal density is one of half the variance
        matrix = SKEW.to(device, dtype) @ SKEW.to(device, dtype).T
        mean = torch.ones(2, dtype=dtype, device=device)
        hot, exact = Gaussian(mean, matrix), Gaussian(mean, matrix / 2)
        log_prob = lambda x: 2.0 * hot(x)  # noqa: E731
    mass = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=dtype, device=device)
    kernel = jittered_hmc(log_prob, 0.35, 2.0, mass)
    found = invariance_test(kernel, exact, num_chains=20_000, num_steps=7, generator=rng(0, device))
    assert_invariant(found)


def length_by_position(log_prob, step_size: float, length: float) -> Kernel:
    """Wrong: chains where the density is steep make one step, the others the whole length."""

    def step(state, *, generator=None):
        short, long = (hmc(log_prob, step_size, n) for n in (1, math.ceil(length / step_size)))
        seed = generator.get_state()
        a, _ = short.step(state, generator=generator)
        generator.set_state(seed)
        b, info = long.step(state, generator=generator)
        steep = (state.grad.norm(dim=-1) > 0.7)[:, None]
        moved = torch.where(steep, a.x, b.x)
        return hmc(log_prob, step_size, 1).init(moved), info

    return Kernel(hmc(log_prob, step_size, 1).init, step)


def test_a_length_that_depends_on_where_a_chain_is_is_rejected(rng):
    target = SkewedProduct(SKEW)
    wrong = length_by_position(target, 0.35, 2.0)
    found = invariance_test(wrong, target, num_chains=20_000, num_steps=7, generator=rng(0))
    assert found.p_value < 1e-9


def test_a_fixed_length_resonates_and_a_jittered_one_does_not(rng):
    """After a whole period every chain is back where it was; jitter breaks the spell."""
    target, e = unit_gaussian(5), 2 * math.sin(math.pi / 40)  # 40 steps of that make a period
    start = target.sample(200, generator=rng(0))
    fixed = sample(hmc(target, e, 40), start, 20, generator=rng(1))
    assert (fixed.x[:, -1] - start).abs().max() < 1e-6
    jittered = sample(jittered_hmc(target, e, 40 * e), start, 20, generator=rng(1))
    assert (jittered.x[:, -1] - start).square().mean() > 1.5


# ---------------------------------------------------------------- the criterion


def exact_flow(x: Tensor, p: Tensor, time: Tensor) -> Phase:
    """Hamiltonian dynamics of N(0, I): a rotation of phase space."""
    moved, p = x * time.cos() + p * time.sin(), p * time.cos() - x * time.sin()
    return Phase(moved, p, moved, -moved)


@pytest.mark.parametrize("accept", ["all", "some"])
def test_the_gradient_of_the_criterion_is_that_of_autograd(accept, rng):
    """Differentiating the criterion itself, along the exact flow, with the mean of x' held."""
    x, p = torch.randn(2, 50, 3, generator=rng(0), **F64)
    a = torch.ones(50, **F64) if accept == "all" else torch.rand(50, generator=rng(1), **F64)
    time = torch.tensor(0.8, requires_grad=True, **F64)
    end = exact_flow(x, p, time)
    centre = ((a[:, None] * end.x).sum(0) / a.sum()).detach()
    start = (a[:, None] * x).sum(0) / a.sum()
    change = (end.x - centre).square().sum(-1) - (x - start).square().sum(-1)
    criterion = (a * change.square()).sum() / a.sum() / 4
    (expected,) = torch.autograd.grad(criterion, time)
    end = Phase(*(field.detach() for field in end))
    found = criterion_gradient(x, end, 0.8, a, no_mass(3))
    assert found == pytest.approx(0.8 * float(expected), rel=1e-10)
    for wrong in (
        criterion_gradient(x, end._replace(p=-end.p), 0.8, a, no_mass(3)),
        criterion_gradient(x, end._replace(x=end.p, p=end.x), 0.8, a, no_mass(3)),
        criterion_gradient(x, end, 1.0, a, no_mass(3)),
    ):
        assert wrong != pytest.approx(found, rel=1e-2)


def test_the_gradient_agrees_with_a_difference_of_leapfrog_trajectories(rng):
    """On a target without an exact flow: one step more and one step less of a short step."""
    target, e = Banana(torch.tensor([2.0, 1.0], **F64), 0.5), 1e-3
    x = target.sample(200, generator=rng(0))
    p = torch.randn(x.shape, generator=rng(1), **F64)
    grad, ones = target.value_and_grad(x)[1], torch.ones(200, **F64)
    less = leapfrog(target, x, p, grad, e, 999)
    end = leapfrog(target, less.x, less.p, less.grad, e, 1)
    more = leapfrog(target, end.x, end.p, end.grad, e, 1)

    def criterion(after: Phase) -> float:
        a = (after.x - end.x.mean(0)).square().sum(-1)  # the mean is held fixed
        return float(((a - (x - x.mean(0)).square().sum(-1)).square()).mean() / 4)

    difference = (criterion(more) - criterion(less)) / (2 * e)
    found = criterion_gradient(x, end, 1000 * e, ones, no_mass(2))
    assert found == pytest.approx(difference, rel=1e-4)


def test_the_gradient_has_its_exact_expectation_on_a_normal_target(rng, ledger):
    """On N(0, I_d) the criterion after time t is `d sin(t)^2`, so its slope is `t d sin(2 t)`."""
    d, chains = 10, 500
    for time in (0.5, 1.2, 2.0):
        t = torch.tensor(time, **F64)
        found = torch.empty(100, **F64)
        for i in range(100):
            x, p = torch.randn(2, chains, d, generator=rng(i), **F64)
            ones = torch.ones(chains, **F64)
            found[i] = criterion_gradient(x, exact_flow(x, p, t), time, ones, no_mass(d))
        ledger(
            f"slope of the ChEES criterion in log t, N(0, I) in 10 dimensions, t = {time}",
            exact=time * d * math.sin(2 * time),
            estimate=found.mean() * (chains / (chains - 1)) ** 2,  # means from the same draws
            std_error=found.std() / 10,
        )


def test_ends_that_are_never_accepted_do_not_count(rng):
    x, p = torch.randn(2, 20, 3, generator=rng(0), **F64)
    end = exact_flow(x, p, torch.tensor(0.8, **F64))
    a = torch.rand(20, generator=rng(1), **F64)
    a[3] = 0.0
    expected = criterion_gradient(x, end, 0.8, a, no_mass(3))
    end.x[3], end.p[3] = math.nan, math.inf
    assert criterion_gradient(x, end, 0.8, a, no_mass(3)) == expected
    assert criterion_gradient(x, end, 0.8, torch.zeros(20, **F64), no_mass(3)) == 0.0


# ---------------------------------------------------------------- what it learns


def best_length(step_size: float, d: int) -> float:
    """Where the expected gradient vanishes on N(0, I_d), leapfrog and rounding up included."""
    e = step_size
    step = torch.tensor([[1 - e**2 / 2, e], [-e * (1 - e**2 / 4), 1 - e**2 / 2]], **F64)

    def slope(n: int) -> float:
        (c, s), (minus_r, _) = torch.linalg.matrix_power(step, n).tolist()
        r = -minus_r  # x' = c x + s p and p' = c p - r x; E |x|^4 = d^2 + 2 d, E (x.p)^2 = d
        fourth, square = d**2 + 2 * d, d**2
        expected = (c**2 - 1) * (c * s * square - c * r * fourth)
        expected += s**2 * (c * s * fourth - c * r * square)
        return n * e * (expected + 2 * c * s * (c**2 - s * r) * d)

    def mean_slope(length: float) -> float:
        """Averaged over the fractions u: n steps for u in ((n - 1) e / T, n e / T]."""
        n = math.ceil(length / e)
        shares = [min(1.0, k * e / length) - (k - 1) * e / length for k in range(1, n + 1)]
        return sum(share * slope(k + 1) for k, share in enumerate(shares))

    return scipy.optimize.brentq(mean_slope, 1.2, 3.2)


def test_the_best_length_tends_to_that_of_exact_dynamics():
    """Averaged over fractions the criterion is `1/2 - sin(2 T) / (4 T)`: tan(2 T) = 2 T."""
    assert math.tan(2 * 2.2467047) == pytest.approx(2 * 2.2467047, abs=1e-4)
    assert best_length(0.001, 10) == pytest.approx(2.2467, abs=2e-3)


@pytest.mark.parametrize(("dtype", "accept"), [(torch.float32, 0.651), (torch.float64, 0.9)])
def test_the_length_learned_on_a_normal_target_is_the_best_one(dtype, accept, rng, device):
    # From run to run the length varies by two percent (standard deviation), hence the limit.
    target, g = unit_gaussian(50, dtype, device), rng(0, device)
    start = target.sample(100, generator=g)
    tuned = chees_warmup(target, start, 400, target_accept=accept, generator=g)
    expected = best_length(tuned.step_size, 50)
    assert tuned.trajectory_length == pytest.approx(expected, rel=0.1)
    assert tuned.x.dtype == dtype and tuned.x.device.type == device.type


def test_an_ascent_that_goes_down_is_noticed(rng, monkeypatch):
    honest = Ascent.update
    monkeypatch.setattr(Ascent, "update", lambda self, grad, longest: honest(self, -grad, longest))
    target = unit_gaussian(10)
    start = target.sample(100, generator=rng(0))
    tuned = chees_warmup(target, start, 400, target_accept=0.9, generator=rng(1))
    assert abs(tuned.trajectory_length / best_length(tuned.step_size, 10) - 1) > 0.5


def plain_mean(x: Tensor, end: Phase, time: float, accept_prob: Tensor, mass) -> float:
    """Wrong where chains are few and the target is wide: the two means differ by chance."""
    weight = accept_prob / accept_prob.sum()
    before = x - x.mean(0)
    after = end.x - (weight[:, None] * end.x).sum(0)
    change = after.square().sum(-1) - before.square().sum(-1)
    return time * float((weight * change * (after * end.p).sum(-1)).sum())


def test_the_length_grows_at_once_where_the_target_is_wide(rng, monkeypatch):
    """A thousand times wider one way: for 200 steps the length grows by its 2.5 percent each."""
    scales = torch.tensor([1.0, 1000.0], **F64)
    target = Gaussian(torch.zeros(2, **F64), torch.diag(scales**2))
    start = target.sample(50, generator=rng(0))
    with pytest.warns(UserWarning, match="was still growing: warm up for longer"):
        tuned = chees_warmup(target, start, 200, generator=rng(1))
    assert tuned.trajectory_length > 100
    monkeypatch.setattr(chees, "criterion_gradient", plain_mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = chees_warmup(target, start, 200, generator=rng(1))
    assert wrong.trajectory_length < 20


def test_the_harmonic_mean_of_the_acceptance_reaches_its_target(rng):
    target = unit_gaussian(50)
    start = target.sample(100, generator=rng(0))
    for accept in (0.651, 0.85):
        tuned = chees_warmup(target, start, 400, target_accept=accept, generator=rng(1))
        fresh = target.sample(500, generator=rng(2))
        state, harmonic = tuned.kernel.init(fresh), []
        for i in range(16):  # a period of the fractions
            state, info = tuned.kernel.step(state, generator=rng(3 + i))
            harmonic.append(1 / float(info.accept_prob.reciprocal().mean()))
        assert sum(harmonic) / 16 == pytest.approx(accept, abs=0.05)


def test_a_mass_measures_as_if_the_target_were_rescaled(rng):
    """With mass M on N(0, M^-1) every number is that of the identity on N(0, I)."""
    factor = torch.tensor([[2.0, 0.0], [0.7, 0.3]], **F64)  # M = L L^T
    start = torch.randn(50, 2, generator=rng(0), **F64)  # x = L^-T z for the rescaled z
    plain = chees_warmup(unit_gaussian(2), start, 150, generator=rng(1))
    for mass, scale in ((factor @ factor.T, factor), (torch.tensor([4.0, 0.01], **F64), None)):
        matrix = torch.diag(mass.sqrt()) if scale is None else scale
        target = Gaussian(torch.zeros(2, **F64), torch.linalg.inv(matrix @ matrix.T))
        scaled = torch.linalg.solve(matrix.T, start.T).T
        found = chees_warmup(target, scaled, 150, mass=mass, generator=rng(1))
        assert found.trajectory_length == pytest.approx(plain.trajectory_length, rel=1e-6)
        assert found.step_size == pytest.approx(plain.step_size, rel=1e-6)
        torch.testing.assert_close(found.x @ matrix, plain.x, rtol=1e-5, atol=1e-5)


def test_the_learned_kernel_is_frozen_and_leaves_the_target_invariant(rng):
    target = SkewedProduct(SKEW)
    tuned = chees_warmup(target, target.sample(100, generator=rng(0)), 300, generator=rng(1))
    kernel, x = tuned
    assert kernel is tuned.kernel and x is tuned.x and len(tuned) == 2
    once = sample(kernel, x, 10, generator=rng(2)).x
    same = jittered_hmc(target, tuned.step_size, tuned.trajectory_length)
    assert torch.equal(once, sample(kernel, x, 10, generator=rng(2)).x)
    assert torch.equal(once, sample(same, x, 10, generator=rng(2)).x)
    assert {len(course) for course in tuned.history.values()} == {300}
    found = invariance_test(kernel, target, num_chains=20_000, num_steps=7, generator=rng(3))
    assert_invariant(found)


# ---------------------------------------------------------------- shapes, devices, failure


@pytest.mark.parametrize("dtype", DTYPES)
def test_chains_and_events_may_have_any_shape(dtype, rng, device):
    like = {"dtype": dtype, "device": device}
    for chains, event in (((2, 10), (2, 3)), ((20,), ())):
        start = torch.randn(*chains, *event, generator=rng(0, device), **like)

        def log_prob(x, ndim=len(event)):  # noqa: B008
            return -0.5 * x.square().reshape(*x.shape[: x.ndim - ndim], -1).sum(-1)

        with torch.device("meta"):
            tuned = chees_warmup(log_prob, start, 100, generator=rng(1, device))
            trace = sample(tuned.kernel, tuned.x, 3, generator=rng(2, device))
        assert trace.x.shape == (*chains, 3, *event) and trace.x.dtype == dtype


def test_the_state_survives_a_checkpoint(rng, tmp_path):
    """A run that is cut off goes on with the fraction that is due."""
    target = SkewedProduct(SKEW)
    kernel, start = jittered_hmc(target, 0.3, 2.0), target.sample(5, generator=rng(0))
    whole = sample(kernel, start, 12, generator=rng(1)).x
    path = tmp_path / "run"
    sample(kernel, start, 5, generator=rng(1), checkpoint=path, save_every=5)
    resumed = sample(kernel, start, 12, generator=rng(1), checkpoint=path, save_every=5).x
    assert torch.equal(resumed, whole)


def test_bad_arguments_are_refused_with_a_sentence(rng):
    target, start = unit_gaussian(2), torch.zeros(4, 2, **F64)
    with pytest.raises(
        ValueError, match="at least two, better a hundred; for one chain use warmup"
    ):
        chees_warmup(target, start[:1], 100)
    with pytest.raises(ValueError, match="num_steps must be at least 100, got 20"):
        chees_warmup(target, start, 20)
    with pytest.raises(ValueError, match="target_accept must be"):
        chees_warmup(target, start, 100, target_accept=1.5)
    with pytest.raises(ValueError, match="x0 has 1 NaN"):
        chees_warmup(target, torch.tensor([[0.0, math.nan]]), 100)
    with pytest.raises(ValueError, match="not finite at the start of 2 of 2 chains"):
        chees_warmup(lambda x: x.log().sum(-1), -torch.ones(2, 2), 100)
    for step_size, length in ((0.0, 1.0), (1.0, -1.0), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="must be a finite number above"):
            jittered_hmc(target, step_size, length)


def test_a_length_at_its_limit_warns(rng):
    scales = torch.tensor([1.0, 1000.0], **F64)
    target = Gaussian(torch.zeros(2, **F64), torch.diag(scales**2))
    start = target.sample(50, generator=rng(0))
    with pytest.warns(UserWarning, match="came to the longest that is allowed"):
        chees_warmup(target, start, 200, max_leapfrog=8, generator=rng(1))
