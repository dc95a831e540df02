"""What the chapter on Langevin and Hamiltonian moves states beyond the modules' own tests."""

import math

import scipy.stats
import torch
from torch import Tensor

from companion.hmc import hmc, leapfrog
from companion.targets import Banana, Gaussian

F64 = {"dtype": torch.float64}
Z = 4.5  # standard errors: a two-sided false-alarm rate of 7e-6


def test_the_generator_of_the_langevin_diffusion_has_mean_zero(rng, ledger):
    """`E[grad log p . grad f + Laplacian f] / 2 = 0` under p, for smooth f that stay bounded."""
    target = Banana(torch.tensor([1.5, 1.0], **F64), bend=0.4)
    x = target.sample(200_000, generator=rng(0))
    score = target.value_and_grad(x)[1]
    for a, b in ((1.0, 0.3), (-0.4, 0.8)):
        # f = sin(a x_1 + b x_2 + 1/2)
        phase = a * x[:, 0] + b * x[:, 1] + 0.5
        slope = a * score[:, 0] + b * score[:, 1]
        laplacian = -(a * a + b * b) * phase.sin()
        values = 0.5 * (slope * phase.cos() + laplacian)
        error = values.std() / math.sqrt(len(values))
        ledger(
            f"Langevin generator of sin({a} x_1 + {b} x_2 + 1/2) on a banana",
            exact=0.0,
            estimate=values.mean(),
            std_error=error,
        )
        wrong = slope * phase.cos() + 0.5 * laplacian  # the whole gradient, as much noise
        assert abs(wrong.mean()) > 2 * Z * wrong.std() / math.sqrt(len(wrong))


def random_spd(d: int, generator: torch.Generator) -> Tensor:
    factor = torch.randn(d, d, generator=generator, **F64)
    return factor @ factor.T + 0.3 * torch.eye(d, **F64)


def test_the_flow_of_a_normal_law_has_its_three_properties(rng):
    """The flow is a matrix exponential: energy, reversal and volume to round-off."""
    g = rng(1)
    precision, mass = random_spd(3, g), random_spd(3, g)
    zero, eye = torch.zeros(3, 3, **F64), torch.eye(3, **F64)
    inverse = torch.linalg.inv(mass)
    field = torch.cat([torch.cat([zero, inverse], 1), torch.cat([-precision, zero], 1)])
    flow = torch.linalg.matrix_exp(1.7 * field)
    energy = torch.block_diag(precision, inverse)
    turn = torch.block_diag(eye, -eye)
    close = {"rtol": 0.0, "atol": 1e-9}
    torch.testing.assert_close(flow.T @ energy @ flow, energy, **close)
    torch.testing.assert_close(turn @ flow @ turn @ flow, torch.eye(6, **F64), **close)
    torch.testing.assert_close(torch.linalg.det(flow), torch.ones((), **F64), **close)
    euler = torch.eye(6, **F64) + 0.1 * field
    assert abs(torch.linalg.det(euler) - 1) > 1e-3
    assert (turn @ euler @ turn @ euler - torch.eye(6, **F64)).abs().max() > 1e-3
    # With friction, r' = -r / 2 as well, none of the three is left.
    damped = torch.linalg.matrix_exp(1.7 * (field - 0.5 * torch.block_diag(zero, eye)))
    assert abs(torch.linalg.det(damped) - 1) > 0.1
    assert (damped.T @ energy @ damped - energy).abs().max() > 0.1


def test_acceptance_at_a_quarter_of_a_period(rng, ledger):
    n = 40_000
    for num_steps, d in ((1, 1), (2, 10), (3, 100)):
        e = 2 * math.sin(math.pi / (4 * num_steps))  # num_steps turns of theta are pi / 2
        target = Gaussian(torch.zeros(d, **F64), torch.eye(d, **F64))
        kernel = hmc(target, e, num_steps)
        x = target.sample(n, generator=rng(2))
        rate = kernel.step(kernel.init(x), generator=rng(3))[1].accept_prob
        error = rate.std() / math.sqrt(n)
        ledger(
            f"acceptance of HMC at a quarter period, {num_steps} steps, d = {d}",
            exact=float(2 * scipy.stats.f.cdf(1 - e * e / 4, d, d)),
            estimate=rate.mean(),
            std_error=error,
        )
        other = float(2 * scipy.stats.f.cdf(1 - e * e / 2, d, d))  # a slip in the conserved energy
        assert abs(rate.mean() - other) > 2 * Z * error


def test_leapfrog_on_a_normal_law_of_any_frequency():
    """Its own energy, the angle of a step, and the error of the true energy, to round-off."""
    w, e = 2.5, 0.3
    x, r = torch.tensor([0.8, -1.1], **F64), torch.tensor([-0.4, 1.7], **F64)

    def log_prob(x: Tensor) -> Tensor:
        return -0.5 * w * w * x.square()

    def own(x: Tensor, r: Tensor) -> Tensor:
        return 0.5 * r.square() + 0.5 * w * w * (1 - (e * w) ** 2 / 4) * x.square()

    end = leapfrog(log_prob, x, r, -w * w * x, e, 37)
    torch.testing.assert_close(own(end.x, end.p), own(x, r))
    error = 0.5 * (end.p.square() - r.square()) + 0.5 * w * w * (end.x.square() - x.square())
    torch.testing.assert_close(error, e * e * w**4 / 8 * (end.x.square() - x.square()))
    assert (error - e * e * w * w / 8 * (end.x.square() - x.square())).abs().min() > 1e-3
    root = w * math.sqrt(1 - (e * w) ** 2 / 4)
    turn = 37 * math.acos(1 - (e * w) ** 2 / 2)
    torch.testing.assert_close(end.x, math.cos(turn) * x + math.sin(turn) / root * r)
    # At e = 2 / w an orbit grows steadily, beyond it like a power; only r = 0 stays at the limit.
    edge = leapfrog(log_prob, x, r, -w * w * x, 2 / w, 1000)
    torch.testing.assert_close(edge.x.abs(), (x - 1000 * 2 / w * r).abs())
    assert leapfrog(log_prob, x, r, -w * w * x, 2.1 / w, 200).x.abs().min() > 1e6
