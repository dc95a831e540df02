"""The leapfrog integrator against linear algebra: reversible, volume-preserving, of order two."""

import math

import pytest
import torch
from torch import Tensor

from companion.hmc import integrator, leapfrog
from companion.hmc.integrator import Phase
from companion.mcmc.mass import make_mass
from companion.targets import Banana, Gaussian

F64 = {"dtype": torch.float64}
DENSE = torch.tensor([[2.0, 0.9], [0.9, 0.7]], **F64)
MASSES = {"identity": None, "diagonal": torch.tensor([3.0, 0.4], **F64), "dense": DENSE}


def energy(end: Phase, mass: Tensor | None = None) -> Tensor:
    """The Hamiltonian of `(c, 2)` points, by its definition."""
    matrix = torch.eye(2).to(end.p) if mass is None else mass if mass.ndim == 2 else mass.diag()
    return 0.5 * (end.p @ torch.linalg.inv(matrix.to(end.p)) * end.p).sum(-1) - end.log_prob


def banana(device="cpu", dtype=torch.float64) -> Banana:
    return Banana(torch.tensor([2.0, 1.0], device=device, dtype=dtype), bend=0.5)


def start(target, rng, n: int, dtype=torch.float64, device="cpu") -> Phase:
    """Exact draws, with standard normal momenta."""
    g = rng(0, device)
    x = target.sample(n, generator=g)
    p = torch.randn(x.shape, dtype=dtype, device=device, generator=g)
    value, grad = target.value_and_grad(x)
    return Phase(x, p, value, grad)


def euler(log_prob, x, p, grad, step_size, num_steps, mass=None) -> Phase:
    """The wrong integrator: both kicks and drifts from the old point."""
    value = None
    for _ in range(num_steps):
        x, p = x + step_size * p, p + step_size * grad
        value, grad = integrator.value_and_grad(log_prob, x)
    return Phase(x, p, value, grad)


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("mass", MASSES.values(), ids=MASSES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_leapfrog_runs_backwards_from_the_negated_momentum(rng, device, dtype, mass):
    target = banana(device, dtype)
    s = start(target, rng, 100, dtype, device)
    mass = None if mass is None else mass.to(s.x)
    step = torch.linspace(0.05, 0.2, 100, dtype=dtype, device=device)[:, None]  # each its own
    end = leapfrog(target, s.x, s.p, s.grad, step, 20, mass)
    back = leapfrog(target, end.x, -end.p, end.grad, step, 20, mass)
    negative = leapfrog(target, end.x, end.p, end.grad, -step, 20, mass)
    limit = 1e-10 if dtype == torch.float64 else 0.02  # round-off grows with the curvature
    assert (end.x - s.x).norm(dim=-1).median() > 0.5
    for x, p in ((back.x, -back.p), (negative.x, negative.p)):
        assert (x - s.x).abs().max() < limit and (p - s.p).abs().max() < limit
    if mass is None and dtype == torch.float64:  # Euler's rule does not come back
        end = euler(target, s.x, s.p, s.grad, 0.05, 20)
        back = euler(target, end.x, -end.p, end.grad, 0.05, 20)
        assert (back.x - s.x).abs().max() > 0.01


@pytest.mark.parametrize("mass", MASSES.values(), ids=MASSES.keys())
def test_leapfrog_preserves_volume(rng, monkeypatch, mass):
    def differentiable(_, x: Tensor) -> tuple[Tensor, Tensor]:  # the package's detaches
        return target.value_and_grad(x)

    def log_volume(step, x: Tensor, p: Tensor) -> Tensor:
        def flow(z: Tensor) -> Tensor:
            end = step(target, z[:2], z[2:], target.value_and_grad(z[:2])[1], 0.2, 7, mass)
            return torch.cat([end.x, end.p])

        jacobian = torch.autograd.functional.jacobian(flow, torch.cat([x, p]))
        return torch.linalg.slogdet(jacobian).logabsdet

    target = Smooth()
    monkeypatch.setattr(integrator, "value_and_grad", differentiable)
    monkeypatch.setattr(integrator, "gradient", lambda _, x: differentiable(_, x)[1])
    points = start(banana(), rng, 10)
    for x, p in zip(points.x, points.p, strict=True):
        assert log_volume(leapfrog, x, p).abs() < 1e-10
    assert log_volume(euler, x, p).abs() > 0.01


class Smooth:
    """The banana, with a gradient that autograd can differentiate (no writing in place)."""

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.unbind(-1)
        r = b - 0.5 * a.square()
        return -0.5 * (a.square() / 4 + r.square()), torch.stack([-a / 4 + a * r, -r], -1)


def test_mass_matrix_is_a_linear_change_of_coordinates(rng):
    target, factor = banana(), torch.linalg.cholesky(DENSE)
    s = start(target, rng, 50)
    # With y = L^T x and unit mass the momentum is L^-1 p.
    inverse = torch.linalg.inv(factor)

    def moved(y: Tensor) -> Tensor:
        return target(y @ inverse)

    end = leapfrog(target, s.x, s.p, s.grad, 0.1, 10, DENSE)
    unit = leapfrog(moved, s.x @ factor, s.p @ inverse.T, s.grad @ inverse.T, 0.1, 10)
    torch.testing.assert_close(unit.x @ inverse, end.x)
    torch.testing.assert_close(unit.p @ factor.T, end.p)
    diagonal = torch.tensor([3.0, 0.4], **F64)
    torch.testing.assert_close(
        leapfrog(target, s.x, s.p, s.grad, 0.1, 10, diagonal),
        leapfrog(target, s.x, s.p, s.grad, 0.1, 10, diagonal.diag()),
    )


# ---------------------------------------------------------------- energy


def test_leapfrog_conserves_its_own_energy_on_a_gaussian_and_blows_up_beyond_two(ledger):
    def bell(x: Tensor) -> Tensor:
        return -0.5 * x.square()

    def modified(x: Tensor, p: Tensor, e: float) -> Tensor:
        return p.square() + (1 - e * e / 4) * x.square()

    x, p = torch.tensor([1.2], **F64), torch.tensor([-0.7], **F64)
    for e in (0.1, 1.0, 1.9):
        end = leapfrog(bell, x, p, -x, e, 1000)
        ledger(
            f"p^2 + (1 - e^2/4) x^2 after 1,000 leapfrog steps of e = {e}",
            exact=modified(x, p, e)[0],
            estimate=modified(end.x, end.p, e)[0],
        )
        drift = abs(float(modified(end.x, end.p, 0.0) - modified(x, p, 0.0)))
        assert drift > 1e-4  # H itself is not conserved
    assert leapfrog(bell, x, p, -x, 2.01, 1000).x.abs() > 1e6


def gaussian_step(precision: Tensor, e: float) -> Tensor:
    """The matrix of one leapfrog step on `(x, p)` for unit mass."""
    eye, zero = torch.eye(2, **F64), torch.zeros(2, 2, **F64)
    kick = torch.cat([torch.cat([eye, zero], 1), torch.cat([-e / 2 * precision, eye], 1)])
    drift = torch.cat([torch.cat([eye, e * eye], 1), torch.cat([zero, eye], 1)])
    return kick @ drift @ kick


def test_energy_error_is_of_order_step_size_squared(rng, ledger):
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]], **F64)
    precision = torch.linalg.inv(covariance)
    target = Gaussian(torch.zeros(2, **F64), covariance)
    s = start(target, rng, 100_000)
    before, found = energy(s), []
    for num_steps in (8, 16, 32):
        # The error is z^T Q z / 2 for the Gaussian start z: E[D^2] = tr(QC)^2/4 + tr(QCQC)/2.
        flow = torch.linalg.matrix_power(gaussian_step(precision, 1 / num_steps), num_steps)
        both = torch.block_diag(precision, torch.eye(2, **F64))
        qc = (flow.T @ both @ flow - both) @ torch.block_diag(covariance, torch.eye(2, **F64))
        exact = qc.trace() ** 2 / 4 + (qc @ qc).trace() / 2
        end = leapfrog(target, s.x, s.p, s.grad, 1 / num_steps, num_steps)
        square = (energy(end) - before).square()
        ledger(
            f"mean squared energy error, length 1 in {num_steps} steps, Gaussian, correlation .95",
            exact=exact,
            estimate=square.mean(),
            std_error=square.std() / math.sqrt(len(square)),
        )
        found.append(float(exact.sqrt()))
    assert 4.0 < found[0] / found[1] < 4.3 and 4.0 < found[1] / found[2] < 4.1
    # Euler's rule is of order one and drifts: halving the step does not even halve its error.
    errors = [
        (energy(euler(target, s.x, s.p, s.grad, 1 / n, n)) - before).abs().mean() for n in (32, 64)
    ]
    assert errors[0] / errors[1] < 3.5 and errors[1] > 10 * found[2]


# ---------------------------------------------------------------- cost, hygiene


def test_leapfrog_costs_one_gradient_a_step(rng):
    calls = []

    class Counting(Smooth):
        def value_and_grad(self, x):
            calls.append(x)
            return super().value_and_grad(x)

    s = start(banana(), rng, 3)
    leapfrog(Counting(), s.x, s.p, s.grad, 0.1, 9)
    assert len(calls) == 9


def test_leapfrog_asks_for_the_value_at_the_end_only(rng):
    calls = []

    class Both(Smooth):
        sign = 1.0

        def value_and_grad(self, x):
            calls.append("value and gradient")
            return super().value_and_grad(x)

        def gradient(self, x):
            calls.append("gradient")
            return self.sign * super().value_and_grad(x)[1]

    class Wrong(Both):
        sign = -1.0

    s = start(banana(), rng, 3)
    end = leapfrog(Both(), s.x, s.p, s.grad, 0.1, 9)
    assert calls == ["gradient"] * 8 + ["value and gradient"]
    for a, b in zip(end, leapfrog(Smooth(), s.x, s.p, s.grad, 0.1, 9), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(leapfrog(Wrong(), s.x, s.p, s.grad, 0.1, 9).x, end.x)


def test_leapfrog_takes_scalars_and_matrices(rng):
    x, p = torch.randn(2, 4, 3, 2, generator=rng(0), **F64)
    mass = torch.rand(3, 2, generator=rng(1), **F64) + 0.5

    def log_prob(x: Tensor) -> Tensor:
        return -0.25 * x.pow(4).sum((-2, -1))

    prepared = make_mass(mass, x.shape[1:], x.dtype, x.device)
    end = leapfrog(log_prob, x, p, -x.pow(3), 0.1, 5, prepared)
    flat = leapfrog(
        lambda x: -0.25 * x.pow(4).sum(-1),
        x.reshape(4, 6),
        p.reshape(4, 6),
        -x.reshape(4, 6).pow(3),
        0.1,
        5,
        mass.reshape(6),
    )
    torch.testing.assert_close(end.x.reshape(4, 6), flat.x)
    one = leapfrog(lambda x: -0.25 * x.pow(4), x[0, 0, 0], p[0, 0, 0], -x[0, 0, 0].pow(3), 0.1, 5)
    assert one.x.shape == ()


def test_a_mass_tensor_that_could_mean_two_things_is_refused(rng):
    def log_prob(x: Tensor) -> Tensor:
        return -0.5 * x.square().sum((-2, -1))

    x, p = torch.randn(2, 5, 3, 2, generator=rng(0), **F64)
    mass = torch.rand(3, 2, generator=rng(1), **F64) + 0.5  # not square, so it is a diagonal
    prepared = make_mass(mass, x.shape[1:], x.dtype, x.device)
    found, expected = (leapfrog(log_prob, x, p, -x, 0.1, 5, m) for m in (mass, prepared))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    x, p = torch.randn(2, 5, 2, 2, generator=rng(0), **F64)
    message = r"for events of 1 dimensions, but those of log_prob have the shape \(2, 2\): .*Mass"
    for mass in (DENSE, DENSE[0]):  # positive, so that DENSE could be a diagonal as well
        with pytest.raises(ValueError, match=message):
            leapfrog(log_prob, x, p, -x, 0.1, 5, mass)
    prepared = make_mass(DENSE, x.shape[1:], x.dtype, x.device)
    end = leapfrog(log_prob, x, p, -x, 0.1, 1, prepared)
    torch.testing.assert_close(end.x, x + 0.1 * (p - 0.05 * x) / DENSE)
    # As many chains as coordinates are vectors all the same.
    s = start(banana(), rng, 2)
    two = leapfrog(banana(), s.x, s.p, s.grad, 0.1, 5, DENSE)
    one = leapfrog(banana(), s.x[:1], s.p[:1], s.grad[:1], 0.1, 5, DENSE)
    torch.testing.assert_close(two.x[:1], one.x)


def test_leapfrog_follows_its_inputs_device(rng):
    target = banana()
    s = start(target, rng, 5)
    torch.set_default_device("meta")
    try:
        end = leapfrog(target, s.x, s.p, s.grad, 0.1, 3, DENSE)
    finally:
        torch.set_default_device(None)
    assert end.x.device.type == "cpu"


def test_leapfrog_refuses_bad_arguments(rng):
    target = banana()
    s = start(target, rng, 5)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        leapfrog(target, s.x, s.p, s.grad, 0.1, 0)
    with pytest.raises(ValueError, match="mass must have the shape of a point"):
        leapfrog(target, s.x, s.p, s.grad, 0.1, 1, torch.ones(3, **F64))
