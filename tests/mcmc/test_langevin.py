"""Langevin moves: MALA keeps its target, ULA the law that theory says, planted bugs neither."""

import math

import pytest
import torch
from exact_targets import NAMES, p_value, plant, target
from torch import Tensor
from torch.distributions import Normal

from companion.core import sample
from companion.mcmc import GradientState, langevin, mala, ula

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
MASSES = pytest.mark.parametrize("mass", ["identity", "diagonal", "dense"])
Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison


def mass_matrix(kind: str, like: Tensor) -> Tensor | None:
    if kind == "identity":
        return None
    matrix = like.new_tensor([[2.0, 0.6], [0.6, 0.5]])
    return matrix if kind == "dense" else matrix.diagonal().clone()


def bell(x: Tensor) -> Tensor:
    return -0.5 * x.square()


# ---------------------------------------------------------------- MALA


@DTYPES
@MASSES
@pytest.mark.parametrize("name", NAMES)
def test_exact_starts_stay_exact(rng, device, dtype, mass, name):
    law = target(name, dtype, device)
    kernel = mala(law, 0.8, mass_matrix(mass, law.sample(1)))
    assert p_value(kernel, law, rng(0, device)) > 1e-5


@DTYPES
def test_step_sizes_may_differ_from_chain_to_chain(rng, device, dtype):
    law = target("skewed", dtype, device)
    sizes = torch.linspace(0.1, 2.0, 20_000, dtype=dtype, device=device)
    assert p_value(mala(law, sizes), law, rng(1, device)) > 1e-5


def test_autograd_and_a_written_gradient_give_the_same_chain(rng):
    law = target("banana")
    x0 = law.sample(50, generator=rng(0))
    one, two = (sample(mala(f, 0.5), x0, 20, generator=rng(1)).x for f in (law, law.log_prob))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value - state.log_prob + correction", "value - state.log_prob"),
        ("value - state.log_prob + correction", "value - state.log_prob - correction"),
        ("value - state.log_prob + correction", "state.log_prob - value + correction"),
        ("value - state.log_prob + correction", "0.0 * value"),
        ("kicked = q + 0.5 * e * state.grad", "kicked = q - 0.5 * e * state.grad"),
        ("back = kicked + 0.5 * e * grad", "back = kicked - 0.5 * e * grad"),
        ("back = kicked + 0.5 * e * grad", "back = kicked"),
        ("q = momentum(mass, noise.normal)", "q = 1.2 * noise.normal"),
        ("momentum(mass, noise.normal)", "noise.normal * (mass.factor**2).diagonal()"),
        (
            "GradientState(y, value, grad), state)",
            "GradientState(y, value, grad), state)._replace(log_prob=value)",
        ),
        (
            "GradientState(y, value, grad), state)",
            "GradientState(y, value, grad), state)._replace(grad=grad)",
        ),
        (
            "GradientState(y, value, grad), state)",
            "GradientState(y, value, grad), state)._replace(grad=state.grad)",
        ),
    ],
    ids=[
        "drops the Hastings correction",
        "flips the Hastings correction",
        "sign of the ratio",
        "never rejects",
        "sign of the gradient in the proposal",
        "sign of the gradient on the way back",
        "no gradient on the way back",
        "noise too wide",
        "noise of standard deviation M",
        "keeps the proposal's log-density",
        "keeps the proposal's gradient",
        "keeps the old gradient",
    ],
)
@DTYPES
def test_bugs_in_the_step_are_found(rng, device, dtype, monkeypatch, old, new):
    plant(monkeypatch, langevin.mala_step, old, new)
    law = target("skewed", dtype, device)
    kernel = mala(law, 1.6, mass_matrix("dense", law.sample(1)))
    assert p_value(kernel, law, rng(0, device)) < 1e-7


@DTYPES
def test_tempering_the_correction_with_the_target_is_found(rng, device, dtype, monkeypatch):
    law = target("tempered", dtype, device)
    assert p_value(mala(law, 1.5), law, rng(0, device)) > 1e-5
    plant(monkeypatch, langevin.mala_step, "+ correction", f"+ {law.beta} * correction")
    assert p_value(mala(law, 1.5), law, rng(0, device)) < 1e-7


@pytest.mark.parametrize("step_size", [0.8, 1.5])
def test_acceptance_of_mala_on_a_normal_law(rng, ledger, step_size):
    # By detailed balance it is 2 P(|Y| < |X|), for the normal pair that a step makes of N(0, 1).
    n = 100_000
    kernel = mala(bell, step_size)
    x0 = torch.randn(n, dtype=torch.float64, generator=rng(0))
    p = kernel.step(kernel.init(x0), generator=rng(1))[1].accept_prob
    se = p.std() / math.sqrt(n)
    ledger(
        f"acceptance of MALA of step size {step_size} on N(0, 1)",
        exact=2 / math.pi * math.atan(8 / step_size**3),
        estimate=p.mean(),
        std_error=se,
    )
    other_scale = math.sqrt(2) * step_size  # that of texts whose step is sqrt(2 h)
    assert abs(p.mean() - 2 / math.pi * math.atan(8 / other_scale**3)) > Z * se


@pytest.mark.parametrize("mass", ["diagonal", "dense"])
def test_mass_is_preconditioning_by_its_inverse(rng, mass):
    """A step of mass M is a step of unit mass in coordinates `M^1/2 x`."""
    law = target("skewed")
    m = mass_matrix(mass, law.sample(1))
    full = m if mass == "dense" else torch.diag(m)
    factor = torch.linalg.cholesky(full)  # x = L^-T z, so that M^-1 L = L^-T

    def in_z(z: Tensor) -> Tensor:
        return law.log_prob(z @ torch.linalg.inv(factor))

    x0 = law.sample(20, generator=rng(0))
    x = sample(mala(law, 0.7, m), x0, 10, generator=rng(1)).x
    z = sample(mala(in_z, 0.7), x0 @ factor, 10, generator=rng(1)).x
    torch.testing.assert_close(x, z @ torch.linalg.inv(factor))


# ---------------------------------------------------------------- ULA


@DTYPES
@pytest.mark.parametrize("step_size", [1.0, 1.5])
def test_ula_keeps_the_law_that_theory_says_and_not_its_target(rng, device, dtype, step_size):
    sd = 1.3  # of the target; e in its units is step_size / sd

    def log_prob(x: Tensor) -> Tensor:
        return -0.5 * (x / sd).square()

    biased = sd / math.sqrt(1 - step_size**2 / (4 * sd**2))
    kernel = ula(log_prob, step_size)
    zero = torch.zeros((), dtype=dtype, device=device)
    assert p_value(kernel, Normal(zero, zero + biased), rng(0, device)) > 1e-5
    run = {"num_chains": 100_000, "num_steps": 10}
    assert p_value(kernel, Normal(zero, zero + sd), rng(0, device), **run) < 1e-7
    per_chain = torch.full((20_000,), step_size, dtype=dtype, device=device)
    assert p_value(ula(log_prob, per_chain), Normal(zero, zero + biased), rng(1, device)) > 1e-5


def test_variance_and_autocorrelation_of_ula_on_a_normal_law(rng, ledger):
    e, n = 1.0, 4000
    x0 = math.sqrt(4 / 3) * torch.randn(n, dtype=torch.float64, generator=rng(0))
    x = sample(ula(bell, e), x0, 100, generator=rng(1)).x
    for what, exact, means in (
        ("variance of ULA of step size 1 on N(0, 1)", 4 / 3, x.square().mean(1)),
        ("lag-1 autocovariance of ULA of step size 1", 2 / 3, (x[:, 1:] * x[:, :-1]).mean(1)),
    ):
        se = means.std() / math.sqrt(n)
        ledger(what, exact=exact, estimate=means.mean(), std_error=se)
        assert abs(means.mean() - 1.0) > Z * se


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.5 * e * state.grad", "e * state.grad"),
        ("0.5 * e * state.grad", "-0.5 * e * state.grad"),
        ("(noise.normal +", "(1.1 * noise.normal +"),
        ("GradientState(y, value, grad)", "GradientState(y, value, state.grad)"),
    ],
    ids=["drift doubled", "sign of the gradient", "noise too wide", "old gradient"],
)
def test_bugs_in_the_unadjusted_step_are_found(rng, device, monkeypatch, old, new):
    plant(monkeypatch, langevin.ula_step, old, new)
    law = Normal(torch.zeros((), device=device), math.sqrt(4 / 3))
    assert p_value(ula(bell, 1.0), law, rng(0, device)) < 1e-7


# ---------------------------------------------------------------- what is not allowed


def half_line(below: float):
    """An exponential law, and what its log-density is below zero."""
    return lambda x: torch.where(x > 0, -x, below * torch.ones_like(x))


@pytest.mark.parametrize("make", [mala, ula])
def test_nan_and_minus_infinity_are_not_entered_and_nan_is_counted(rng, make):
    x0 = -torch.rand(200, dtype=torch.float64, generator=rng(0)).log()
    trace = sample(make(half_line(-math.inf), 1.0), x0, 50, generator=rng(1))
    assert (trace.x > 0).all() and trace.num_nan.sum() == 0
    with pytest.warns(UserWarning, match="NaN"):
        trace = sample(make(half_line(math.nan), 1.0), x0, 50, generator=rng(1))
    assert (trace.x > 0).all() and trace.num_nan.sum() > 500

    def broken(x: Tensor) -> Tensor:  # a fair log-density whose gradient is NaN above 1
        return -x + torch.where(x > 1, (1 - x).sqrt() * 0.0, 0.0).nan_to_num(0.0)

    with pytest.warns(UserWarning, match="NaN"):
        trace = sample(make(broken, 1.0), 0.5 * torch.ones(50), 20, generator=rng(1))
    assert trace.x.isfinite().all() and (trace.x <= 1).all()


def test_an_infinite_density_does_not_hold_chains_for_ever(rng):
    def log_prob(x):
        return torch.where((x - 1.5).abs() < 0.5, math.inf, -0.5 * x.square())

    with pytest.warns(UserWarning, match="NaN"):
        trace = sample(mala(log_prob, 1.0), torch.zeros(200), 50, generator=rng(0))
    assert trace.log_prob.isfinite().all() and trace.num_nan.sum() > 200
    assert trace.accept_prob.min() > 0.1


def test_mala_keeps_a_law_with_a_wall(rng):
    law = torch.distributions.Exponential(torch.ones((), dtype=torch.float64))
    assert p_value(mala(half_line(-math.inf), 0.8), law, rng(2)) > 1e-5


@pytest.mark.parametrize("make", [mala, ula])
def test_bad_starts_and_arguments_are_refused(device, make):
    with pytest.raises(ValueError, match="nan at chain 1"):
        make(torch.log, 1.0).init(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="the gradient is not finite .* chain 1"):
        make(torch.sqrt, 1.0).init(torch.tensor([1.0, 0.0]))
    with pytest.raises(TypeError, match="floating"):
        make(bell, 1.0).init(torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="step_size"):
        make(bell, -1.0)
    with pytest.raises(ValueError, match="does not broadcast to the chains"):
        make(bell, torch.ones(3)).init(torch.ones(5))
    blank = torch.zeros(5, device="meta")
    with pytest.raises(ValueError, match=r"the generator is on .* but the tensors are on meta"):
        make(bell, 1.0).step(GradientState(blank, blank, blank), generator=torch.Generator(device))


def test_a_mass_that_does_not_fit_is_refused():
    law = target("skewed", torch.float32)
    with pytest.raises(ValueError, match="mass must have the shape"):
        mala(law, 1.0, torch.ones(3)).init(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="mass must be positive"):
        mala(law, 1.0, torch.tensor([1.0, 0.0])).init(torch.zeros(4, 2))
    with pytest.raises(TypeError, match="mass must be a torch.Tensor or None, got float"):
        mala(law, 1.0, 2.0)


@DTYPES
@pytest.mark.parametrize("make", [mala, ula])
def test_everything_follows_the_chains(rng, device, dtype, make):
    law = target("skewed", dtype, device)
    kernel = make(law, torch.tensor([[0.3], [0.6], [0.9]], dtype=dtype, device=device))
    x = law.sample(12, generator=rng(0, device)).reshape(3, 4, 2)
    with torch.device("meta"):
        state = kernel.init(x)
        for _ in range(3):
            state, info = kernel.step(state, generator=rng(1, device))
    assert state.x.shape == state.grad.shape == (3, 4, 2)
    assert state.log_prob.shape == info.accepted.shape == info.accept_prob.shape == (3, 4)
    assert (state.x.dtype, state.x.device.type) == (dtype, device.type)
    value, grad = law.value_and_grad(state.x)
    torch.testing.assert_close(state.log_prob, value)
    torch.testing.assert_close(state.grad, grad)


@pytest.mark.parametrize("make", [mala, ula])
def test_a_step_costs_one_gradient(rng, make):
    law, calls = target("skewed"), []

    class Counted:
        def __call__(self, x: Tensor) -> Tensor:
            raise AssertionError("the log-density alone is not needed")

        def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
            calls.append(len(x))
            return law.value_and_grad(x)

    sample(make(Counted(), 0.5), law.sample(7, generator=rng(0)), 10, generator=rng(1))
    assert calls == [7] * 11  # one of them for the start
