"""What the capstone on measuring Z claims about all estimators at once."""

import math

import pytest
import torch
from scipy.stats import chi2

from companion.annealing import ais, reverse_ais
from companion.importance import log_mean_weight
from companion.logz import bar, stepping_stone, thermodynamic_integration
from companion.tempering import linear_schedule

F64 = torch.float64
M = 1.5  # the target's mean
STEPS, CHAINS, RUNS = 40, 10, 200


class Shift:
    """From N(0, 1) to N(M, 1), whose steps are independent draws: Var U = M^2 at every beta."""

    base_log_z = 0.5 * math.log(2.0 * math.pi)
    log_z = base_log_z + 0.5 * M**2

    def sample_base(self, n, *, generator=None):
        return torch.randn(n, dtype=F64, generator=generator)

    def log_prob(self, x, beta):
        return -0.5 * x.square() + beta * M * x

    def step(self, x, beta, *, generator=None):
        return torch.randn(x.shape, dtype=F64, generator=generator) + beta * M


def errors(method, g):
    """Errors of log Z of RUNS runs, each of CHAINS draws at every one of STEPS betas."""
    path, betas = Shift(), linear_schedule(STEPS + 1)
    if method == "ais":
        log_w = ais(path, betas, RUNS * CHAINS, generator=g).log_weights.view(RUNS, CHAINS)
        return log_mean_weight(log_w.T).value - path.log_z
    x = M * betas[:, None, None, None] + torch.randn(
        STEPS + 1, RUNS, CHAINS, 1, dtype=F64, generator=g
    )
    if method == "bar":
        h = 1.0 / STEPS
        up, down = h * M * x[:-1, ..., 0], h * M * x[1:, ..., 0]
        found = bar(up.permute(2, 0, 1), down.permute(2, 0, 1)).value.sum(0) + path.base_log_z
        return found - path.log_z
    rule = {"stones": stepping_stone, "integration": thermodynamic_integration}[method]
    values = torch.stack([rule(path, betas, x[:, run]).value for run in range(RUNS)])
    return values - path.log_z


@pytest.mark.filterwarnings("ignore:the discretisation error")  # there is none: U is the same
@pytest.mark.parametrize("method", ["ais", "stones", "integration", "bar"])
def test_with_perfect_mixing_all_four_cost_the_same(rng, method):
    error = errors(method, rng(0))
    scaled = STEPS * CHAINS * error.square().sum()
    limits = chi2.ppf([5e-6, 1 - 5e-6], RUNS)
    area = M**2  # both divergences; each of them alone is half of it
    assert limits[0] < scaled / area < limits[1]
    assert not limits[0] < scaled / (0.5 * area) < limits[1]


class Halves:
    """Four states of which steps never lead from {0, 1} to {2, 3} or back."""

    base_mass = torch.tensor([0.5, 0.5, 1e-30, 1e-30], dtype=F64)
    target_mass = torch.tensor([1.0, 3.0, 2.0, 10.0], dtype=F64)
    base_log_z = 0.0

    def sample_base(self, n, *, generator=None):
        return torch.multinomial(self.base_mass, n, True, generator=generator).to(F64)

    def log_prob(self, x, beta):
        x = x.long()
        return (1.0 - beta) * self.base_mass.log()[x] + beta * self.target_mass.log()[x]

    def step(self, x, beta, *, generator=None):
        side = 2.0 * (x >= 2.0)
        beta = torch.as_tensor(beta, dtype=F64)
        odds = self.log_prob(side + 1.0, beta) - self.log_prob(side, beta)
        noise = torch.rand(x.shape, dtype=F64, generator=generator)
        return side + (noise < odds.sigmoid()).double()


def test_a_part_that_no_start_is_in_is_missing_from_all_but_exact_draws(rng):
    path, betas = Halves(), linear_schedule(21)
    whole = path.target_mass.sum().log()
    part = path.target_mass[:2].sum().log()  # the mass of {0, 1}, where all of the base is
    own = torch.multinomial(path.target_mass[:2], 4000, True, generator=rng(1)).to(F64)
    every = torch.multinomial(path.target_mass, 4000, True, generator=rng(2)).to(F64)
    found = {
        "ais": ais(path, betas, 4000, generator=rng(3)),
        "stones": stepping_stone(path, betas, 200, num_chains=20, generator=rng(4)),
        "integration": thermodynamic_integration(path, betas, 200, num_chains=20, generator=rng(5)),
        "reverse, own": reverse_ais(path, betas, own, generator=rng(6)),
    }
    for name, z in found.items():
        assert abs(z.value - part) < 4.5 * z.std_error + 1e-4, name
        assert abs(z.value - whole) > 20.0 * z.std_error, name
    upper = reverse_ais(path, betas, every, generator=rng(7))
    assert abs(upper.value - whole) < 4.5 * upper.std_error
    assert upper.value - found["ais"].value > 20.0 * upper.std_error
