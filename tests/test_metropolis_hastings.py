"""What the chapter on Metropolis-Hastings states and no module tests."""

import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from companion.core import sample
from companion.diagnostics import integrated_autocorrelation_time
from companion.mcmc import metropolis_hastings, random_walk
from companion.testing import (
    detailed_balance_error,
    spectral_gap,
    stationary_error,
    transition_matrix,
)

FLOAT64 = torch.float64


def random_matrix(num_states: int, generator: torch.Generator) -> Tensor:
    """A transition matrix without any symmetry, with some zeros."""
    matrix = torch.rand(num_states, num_states, generator=generator, dtype=FLOAT64)
    matrix = matrix * (torch.rand(num_states, num_states, generator=generator) < 0.5)
    matrix = matrix + 0.1 * torch.eye(num_states, dtype=FLOAT64).roll(1, 1)  # irreducible
    return matrix / matrix.sum(1, keepdim=True)


def invariant_law(matrix: Tensor) -> Tensor:
    """The solution of p P = p, sum p = 1."""
    m = len(matrix)
    system = torch.cat([matrix.T - torch.eye(m, dtype=FLOAT64), torch.ones(1, m, dtype=FLOAT64)])
    right = torch.zeros(m + 1, dtype=FLOAT64)
    right[-1] = 1.0
    return torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:, 0]


# ---------------------------------------------------------------- convergence


@pytest.mark.parametrize("seed", range(5))
def test_doeblins_constant_bounds_the_distance_from_equilibrium(rng, seed):
    matrix = random_matrix(6, rng(seed))
    p = invariant_law(matrix)
    assert stationary_error(matrix, p / p.sum()) < 1e-12
    for k in (4, 6):
        delta = float(torch.linalg.matrix_power(matrix, k).amin(0).sum())
        assert delta > 0
        power = torch.eye(6, dtype=FLOAT64)
        for t in range(60):
            distance = float(0.5 * (power - p).abs().sum(1).max())
            assert distance <= (1 - delta) ** (t // k) + 1e-12
            power = power @ matrix
    # The constant of a chain that falls into two parts is 0, and it does keep its distance.
    parts = torch.block_diag(*[torch.full((2, 2), 0.5, dtype=FLOAT64)] * 2)
    assert float(torch.linalg.matrix_power(parts, 50).amin(0).sum()) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_detailed_balance_implies_stationarity_and_not_conversely(rng, seed):
    flow = torch.rand(6, 6, generator=rng(seed), dtype=FLOAT64)
    flow = flow + flow.T + 1.0  # the same in both directions
    flow = flow / flow.sum()
    p = flow.sum(1)
    assert detailed_balance_error(flow / p[:, None], p) < 1e-15
    assert stationary_error(flow / p[:, None], p) < 1e-15
    # A current round the ring keeps p and breaks the balance; a leak in one direction loses p.
    round_trip = flow + 0.01 * torch.eye(6, dtype=FLOAT64).roll(1, 1)
    law = round_trip.sum(1) / round_trip.sum()
    matrix = round_trip / round_trip.sum(1, keepdim=True)
    assert detailed_balance_error(matrix, law) > 1e-3
    assert stationary_error(matrix, law) < 1e-15
    leak = flow.clone()
    leak[0, 1] += 0.01
    leak[0, 0] -= 0.01
    assert stationary_error(leak / p[:, None], p) > 1e-3


def test_any_proposal_is_brought_into_balance_exactly(rng, ledger):
    num_states = 5
    q = random_matrix(num_states, rng(0)) * 0.9 + 0.1 / num_states  # positive, not symmetric
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=FLOAT64)

    def propose(x: Tensor, *, generator: torch.Generator | None) -> Tensor:
        return torch.multinomial(q[x], 1, generator=generator)[:, 0]

    def log_q(y: Tensor, x: Tensor) -> Tensor:
        return q[x, y].log()

    states = torch.arange(num_states)
    right = transition_matrix(metropolis_hastings(lambda x: p[x].log(), propose, log_q), states)
    flow = p[:, None] * q
    expected = torch.minimum(flow, flow.T) / p[:, None]
    off_diagonal = ~torch.eye(num_states, dtype=torch.bool)
    torch.testing.assert_close(right[off_diagonal], expected[off_diagonal], rtol=1e-12, atol=1e-15)
    assert detailed_balance_error(right, p) < 1e-15
    ledger(
        "Metropolis-Hastings with an asymmetric proposal: largest net flow of probability",
        exact=0.0,
        estimate=detailed_balance_error(right, p),
        tolerance=1e-15,
    )
    # Without the correction, or with it upside down, another law is sampled.
    for wrong_q in (None, lambda y, x: -log_q(y, x)):
        wrong = transition_matrix(
            metropolis_hastings(lambda x: p[x].log(), propose, wrong_q), states
        )
        assert stationary_error(wrong, p) > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_gap_of_the_independence_sampler(rng, seed):
    g = rng(seed)
    p, q = (torch.rand(7, generator=g, dtype=FLOAT64) + 0.05 for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    weight = p / q
    matrix = q * torch.minimum(weight / weight[:, None], torch.ones((), dtype=FLOAT64))
    matrix.fill_diagonal_(0.0)
    matrix += torch.diag(1.0 - matrix.sum(1))
    largest = float(weight.max())
    assert spectral_gap(matrix, p) == pytest.approx(1.0 / largest, abs=1e-12)
    power = torch.eye(7, dtype=FLOAT64)
    for t in range(40):
        assert 0.5 * (power - p).abs().sum(1).max() <= (1.0 - 1.0 / largest) ** t + 1e-12
        power = power @ matrix
    # The bound is sharp from the state of the largest weight, so no smaller one could do.
    assert 0.5 * (power - p).abs().sum(1).max() > 0.5 * p.min() * (1 - 1 / largest) ** 40


# ---------------------------------------------------------------- the random walk


def exact_acceptance(dim: int, ratio: float) -> tuple[float, float]:
    """Acceptance rate, and squared jump over sigma^2, for steps of `ratio` standard deviations."""

    def average(f) -> float:
        return scipy.integrate.quad(
            lambda s: f(s) * 2 * scipy.stats.norm.cdf(-ratio * s / 2) * scipy.stats.chi.pdf(s, dim),
            0,
            math.inf,
        )[0]

    return average(lambda s: 1.0), average(lambda s: (ratio * s) ** 2)


@pytest.mark.parametrize(("dim", "ratio"), [(1, 2.4), (3, 1.5), (10, 0.8)])
def test_acceptance_and_jump_distance_of_a_random_walk(rng, ledger, dim, ratio):
    sigma, n, g = 0.7, 40_000, rng(dim)
    x = sigma * torch.randn(n, dim, dtype=FLOAT64, generator=g)
    kernel = random_walk(lambda x: -0.5 * (x / sigma).square().sum(-1), ratio * sigma)
    state, info = kernel.step(kernel.init(x), generator=g)
    accept, jump = exact_acceptance(dim, ratio)
    if dim == 1:
        assert accept == pytest.approx(2 / math.pi * math.atan(2 / ratio), abs=1e-9)
    found = {
        "acceptance rate": (info.accept_prob, accept),
        "mean squared jump": ((state.x - x).square().sum(1) / sigma**2, jump),
    }
    for name, (values, exact) in found.items():
        ledger(
            f"random walk on a normal law in {dim} dimensions: {name}",
            exact=exact,
            estimate=values.mean(),
            std_error=values.std() / math.sqrt(n),
        )
    # The formula of one dimension is wrong in three: the test would see it.
    if dim > 1:
        wrong = 2 / math.pi * math.atan(2 / ratio)
        error = info.accept_prob.std() / math.sqrt(n)
        assert abs(info.accept_prob.mean() - wrong) > 4.5 * error


def test_variance_of_the_mean_of_a_chain(rng, ledger):
    """AR(1) with known autocorrelations rho^k; the mean of n = 50 draws of 20,000 chains."""
    rho, n, g = 0.8, 50, rng(0)
    x = torch.randn(20_000, dtype=FLOAT64, generator=g)
    total = torch.zeros_like(x)
    for _ in range(n):
        total += x
        noise = torch.randn(x.shape, dtype=FLOAT64, generator=g)
        x = rho * x + math.sqrt(1 - rho**2) * noise
    lags = torch.arange(1, n, dtype=FLOAT64)
    exact = float(1 + 2 * ((1 - lags / n) * rho**lags).sum()) / n
    square = (total / n).square()
    ledger(
        "variance of the mean of 50 draws of an AR(1) chain",
        exact=exact,
        estimate=square.mean(),
        std_error=square.std() / math.sqrt(len(square)),
    )
    # Independent draws would have 1/n, and tau/n leaves out the ends: both are seen to be wrong.
    for wrong in (1 / n, (1 + rho) / (1 - rho) / n):
        assert abs(square.mean() - wrong) > 4.5 * square.std() / math.sqrt(len(square))


def test_tau_on_the_grid_is_the_tau_of_the_walk(rng, ledger):
    """The chapter's linear system against the scatter of the means of many chains."""
    grid = torch.linspace(-4.5, 4.5, 401, dtype=FLOAT64)
    q = torch.distributions.Normal(grid[:, None], 0.5).log_prob(grid).exp() * (grid[1] - grid[0])
    matrix = q * (grid[:, None].square() - grid.square()).clamp(max=0).exp()
    matrix.fill_diagonal_(0.0)
    matrix += torch.diag(1 - matrix.sum(1))
    p = (-grid.square()).softmax(0)
    solved = torch.linalg.solve(torch.eye(401, dtype=FLOAT64) - matrix + p, grid)
    tau = float(2 * p @ (grid * solved) / (p @ grid.square()) - 1)
    assert tau == pytest.approx(13.29, abs=0.01)
    n = 1000
    exact, lagged = 1.0, grid  # n times the variance of the mean of n draws, over that of a draw
    for k in range(1, n):
        lagged = matrix @ lagged
        exact += 2 * (1 - k / n) * float(p @ (grid * lagged) / (p @ grid.square()))
    start = math.sqrt(0.5) * torch.randn(1500, dtype=FLOAT64, generator=rng(1))
    trace = sample(random_walk(lambda x: -x.square(), 0.5), start, n, generator=rng(2))
    values = n * trace.x.mean(1).square() / 0.5
    ledger(
        "autocorrelation time of a random walk with steps of 0.5 on N(0, 1/2), from 1,000 draws",
        exact=exact,
        estimate=values.mean(),
        std_error=values.std() / math.sqrt(len(values)),
    )
    assert exact == pytest.approx(tau, rel=0.02)
    # The estimate from these 1.5 million draws scatters by one percent (a window of some 40 lags:
    # sqrt(2 * 81 / 1.5e6)), and falls short by two: it stops summing early.
    assert float(integrated_autocorrelation_time(trace.x)) == pytest.approx(tau, rel=0.1)
