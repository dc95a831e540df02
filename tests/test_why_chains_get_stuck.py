"""What the chapter on crossing between modes states: bounds, rates and their exact values.

Claims about finitely many states are checked to round-off on random chains, and each with a
plausible wrong version that has to fail. Statistical tests are at 4.5 standard errors.
"""

import functools
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2, ncx2, norm
from torch import Tensor

from companion.hmc import hmc
from companion.mcmc import random_walk
from companion.models.ising import Ising, checkerboard
from companion.models.rbm import RBM
from companion.targets import GaussianMixture
from companion.testing import (
    binary_states,
    detailed_balance_error,
    mixing_time,
    reversal,
    spectral_gap,
    stationary_error,
    transition_matrix,
)

FLOAT64 = torch.float64


def random_reversible(num_states: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A reversible chain with flows of very different size, and its law."""
    flow = torch.randn(num_states, num_states, generator=generator, dtype=FLOAT64).mul(2).exp()
    flow = flow + flow.T
    flow = flow / flow.sum()
    p = flow.sum(1)
    return flow / p[:, None], p


def double_well(height: float, num_points: int = 15) -> tuple[Tensor, Tensor]:
    """A Metropolis walk between neighbours on [-1.6, 1.6] in a well with such a barrier."""
    x = torch.linspace(-1.6, 1.6, num_points, dtype=FLOAT64)
    log_p = -height * (x.square() - 1).square()
    step = (0.5 * (log_p[1:] - log_p[:-1]).clamp(max=0).exp()).diag(1)
    step = step + (0.5 * (log_p[:-1] - log_p[1:]).clamp(max=0).exp()).diag(-1)
    return step + torch.diag(1 - step.sum(1)), log_p.softmax(0)


def escape(matrix: Tensor, p: Tensor, inside: Tensor) -> float:
    """Phi(A): the probability that a step leaves A, in equilibrium inside A."""
    return float((p[inside, None] * matrix[inside][:, ~inside]).sum() / p[inside].sum())


def conductance(matrix: Tensor, p: Tensor) -> tuple[float, Tensor]:
    """The smallest escape probability among all sets of at most half of the mass, and that set."""
    best, where = math.inf, p > 0
    for size in range(1, len(p)):
        for chosen in combinations(range(len(p)), size):
            inside = torch.zeros(len(p), dtype=torch.bool)
            inside[list(chosen)] = True
            if float(p[inside].sum()) <= 0.5 and escape(matrix, p, inside) < best:
                best, where = escape(matrix, p, inside), inside
    return best, where


def second_eigenvalue(matrix: Tensor, p: Tensor) -> float:
    root = p.sqrt()
    similar = root[:, None] * matrix / root
    return float(torch.linalg.eigvalsh((similar + similar.T) / 2)[-2])


# ---------------------------------------------------------------- bottlenecks


@pytest.mark.parametrize("seed", range(6))
def test_the_bottleneck_bounds_the_gap_from_both_sides(rng, seed):
    chains = [random_reversible(7, rng(seed)), double_well(1.0 + seed, 11)]
    for matrix, p in chains:
        assert detailed_balance_error(matrix, p) < 1e-14
        phi, inside = conductance(matrix, p)
        gap = 1 - second_eigenvalue(matrix, p)
        rates = phi + escape(matrix, p, ~inside)
        assert rates == pytest.approx(phi / float(p[~inside].sum()), rel=1e-12)
        assert phi**2 / 2 <= gap <= rates + 1e-12 <= 2 * phi + 2e-12
    # The lower bound needs the worst set: that of any other, say an end of the double well, fails.
    end = torch.arange(len(p)) == 0
    assert gap < escape(matrix, p, end) ** 2 / 2
    # The upper bound needs both rates: the smaller of the two alone is exceeded by this chain.
    coin = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=FLOAT64)
    half = torch.full((2,), 0.5, dtype=FLOAT64)
    assert 1 - second_eigenvalue(coin, half) > conductance(coin, half)[0] + 0.09


@pytest.mark.parametrize("seed", range(6))
def test_no_chain_mixes_faster_than_its_bottleneck_lets_it(rng, seed):
    """Also for chains without detailed balance: two reversible chains, one after the other."""
    first, p = double_well(2.0 + seed, 11)
    noise = random_reversible(11, rng(seed))[0]
    flow = torch.minimum(p[:, None] * noise, (p[:, None] * noise).T)  # reversible for p
    second = flow / p[:, None]
    second.fill_diagonal_(0.0)
    second = 0.01 * second
    second += torch.diag(1 - second.sum(1))
    matrix = first @ second
    assert stationary_error(matrix, p) < 1e-14 < detailed_balance_error(matrix, p)
    steps = mixing_time(matrix, p)
    phi = conductance(matrix, p)[0]
    assert steps >= 1 / (4 * phi)
    assert steps < 1 / (4 * phi) ** 2  # and so a bound with the square would be refuted


def test_a_wall_of_low_probability_bounds_the_escape():
    for height in (2.0, 5.0, 10.0):
        matrix, p = double_well(height, 15)
        inside = torch.arange(15) < 7
        gate = torch.tensor([6])  # the only state of A from which a step leaves it
        assert escape(matrix, p, inside) <= float(p[gate].sum() / p[inside].sum())
        assert mixing_time(matrix, p) >= float(p[inside].sum() / (4 * p[gate].sum()))
    # A walk that proposes any state at all steps over the gate, and the bound does not hold for it.
    anywhere = (p / p[:, None]).clamp(max=1) / 15
    anywhere.fill_diagonal_(0.0)
    anywhere += torch.diag(1 - anywhere.sum(1))
    assert detailed_balance_error(anywhere, p) < 1e-15
    assert escape(anywhere, p, inside) > float(p[gate].sum() / p[inside].sum())


# ---------------------------------------------------------------- two states


def mean_variance(matrix: Tensor, p: Tensor, f: Tensor, n: int) -> float:
    """The exact variance of the mean of f over n steps in equilibrium."""
    f = f - p @ f
    total, lagged = p @ f.square(), f
    for k in range(1, n):
        lagged = matrix @ lagged
        total = total + 2 * (1 - k / n) * (p @ (f * lagged))
    return float(total) / n


@pytest.mark.parametrize(("a", "b"), [(0.01, 0.03), (0.2, 0.1), (0.7, 0.6)])
def test_two_states_have_a_gap_that_is_the_sum_of_their_rates(a, b):
    matrix = torch.tensor([[1 - a, a], [b, 1 - b]], dtype=FLOAT64)
    p = torch.tensor([b, a], dtype=FLOAT64) / (a + b)
    assert stationary_error(matrix, p) < 1e-15
    assert 1 - second_eigenvalue(matrix, p) == pytest.approx(a + b, abs=1e-14)
    w, n = float(p[1]), 4000
    exact = mean_variance(matrix, p, torch.tensor([0.0, 1.0], dtype=FLOAT64), n)
    predicted = w * (1 - w) * (2 - a - b) / (a + b) / n
    assert exact == pytest.approx(predicted, rel=0.02)
    crossings = 2 * n * a * b / (a + b)
    by_crossings = 2 * w**2 * (1 - w) ** 2 * (2 - a - b) / crossings
    assert by_crossings == pytest.approx(predicted, rel=1e-12)
    # A binomial law with one trial a crossing has a smaller variance unless w = 1/2.
    if w != 0.5 and a + b < 0.1:
        assert abs(w * (1 - w) / crossings / exact - 1) > 0.1


# ---------------------------------------------------------------- two blocks


def random_joint(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    joint = torch.randn(shape, generator=generator, dtype=FLOAT64).mul(1.5).exp()
    return joint / joint.sum()


def two_block_gap(joint: Tensor) -> float:
    scaled = joint / joint.sum(1, keepdim=True).sqrt() / joint.sum(0).sqrt()
    return 1 - float(torch.linalg.svdvals(scaled)[1]) ** 2


@pytest.mark.parametrize("seed", range(5))
def test_two_blocks_have_the_gap_of_the_second_singular_value(rng, seed):
    joint = random_joint((6, 9), rng(seed))
    given_x = joint / joint.sum(1, keepdim=True)
    given_y = (joint / joint.sum(0)).T
    assert spectral_gap(given_x @ given_y, joint.sum(1)) == pytest.approx(
        two_block_gap(joint), abs=1e-12
    )
    # The gap of a redraw is not that of a sweep: without the square the number is another one.
    scaled = joint / joint.sum(1, keepdim=True).sqrt() / joint.sum(0).sqrt()
    wrong = 1 - float(torch.linalg.svdvals(scaled)[1])
    assert abs(wrong - two_block_gap(joint)) > 0.01


def test_gap_of_a_checkerboard_sweep_from_its_black_sites_alone(ledger):
    model = Ising(2, 2, torch.tensor(0.3, dtype=FLOAT64))
    spins = (2 * binary_states(4, dtype=FLOAT64) - 1).view(-1, 2, 2)
    p = model.log_prob(spins).softmax(0)
    sweep = transition_matrix(checkerboard(model), spins)
    black = (torch.arange(2)[:, None] + torch.arange(2)) % 2 == 0
    powers = 2.0 ** torch.arange(2, dtype=FLOAT64)
    rows = ((spins[:, black] > 0) * powers).sum(1).long()
    columns = ((spins[:, ~black] > 0) * powers).sum(1).long()
    joint = torch.zeros(4, 4, dtype=FLOAT64).index_put((rows, columns), p)
    ledger(
        "gap of a checkerboard sweep on 2 x 2 spins, from two blocks",
        exact=spectral_gap(sweep, p),
        estimate=two_block_gap(joint),
        tolerance=1e-9,
    )
    back = reversal(sweep, p)  # white first: another chain, the same gap
    assert spectral_gap(back, p) == pytest.approx(two_block_gap(joint), abs=1e-9)


def test_gap_of_a_small_machine_from_its_two_layers(rng, ledger):
    rbm = RBM(5, 3, generator=rng(0), dtype=FLOAT64)
    with torch.no_grad():
        rbm.W.mul_(200.0)
    v, h = binary_states(5, dtype=FLOAT64), binary_states(3, dtype=FLOAT64)
    joint = (-rbm.energy(v[:, None], h)).detach().flatten().softmax(0).view(32, 8)
    up, down = rbm.hidden_probs(v).detach(), rbm.visible_probs(h).detach()

    def all_patterns(probs: Tensor, bits: Tensor) -> Tensor:
        return torch.where(bits > 0, probs[:, None], 1 - probs[:, None]).prod(-1)

    sweep = all_patterns(up, h) @ all_patterns(down, v)
    ledger(
        "gap of block Gibbs sampling of an RBM with 5 + 3 units, from two layers",
        exact=spectral_gap(sweep, joint.sum(1)),
        estimate=two_block_gap(joint),
        tolerance=1e-9,
    )


# ---------------------------------------------------------------- energy, and jumps


def two_peaks(distance: float, dim: int) -> GaussianMixture:
    means = torch.zeros(2, dim, dtype=FLOAT64)
    means[0, 0], means[1, 0] = -distance / 2, distance / 2
    covariance = torch.eye(dim, dtype=FLOAT64).expand(2, dim, dim)
    return GaussianMixture(torch.ones(2, dtype=FLOAT64), means, covariance)


def density(x: float, distance: float) -> float:
    return 0.5 * (norm.pdf(x + distance / 2) + norm.pdf(x - distance / 2))


@functools.cache
def energetic_enough(distance: float, forget_potential: bool = False) -> float:
    """The probability of an energy above the barrier, in the coordinate of the two peaks."""
    top = math.log(density(0.0, distance))
    bottom = math.log(density(distance / 2, distance))

    def share(x: float) -> float:
        height = bottom - top if forget_potential else math.log(density(x, distance)) - top
        return density(x, distance) * float(chi2.sf(max(0.0, 2 * height), 1))

    return quad(share, -distance, distance, points=[0.0], limit=200)[0]


@pytest.mark.parametrize("dim", [1, 6])
def test_a_trajectory_crosses_only_with_energy_above_the_barrier(rng, dim):
    distance, n = 6.0, 25_000
    target = two_peaks(distance, dim)
    x = target.sample(n, generator=rng(dim))
    kernel = hmc(target, 0.1, 40)  # small steps: the energy error is below 0.01
    state, _ = kernel.step(kernel.init(x), generator=rng(10 + dim))
    crossed = ((state.x[:, 0] > 0) != (x[:, 0] > 0)).double()
    rate, error = float(crossed.mean()), float(crossed.std()) / math.sqrt(n)
    bound = energetic_enough(distance)
    assert 0.6 * bound < rate < bound + 4.5 * error
    # A trajectory that starts high up needs less momentum: the wrong bound is exceeded.
    assert rate > energetic_enough(distance, forget_potential=True) + 4.5 * error


def jump_rate(scale: float, distance: float, dim: int) -> float:
    """E[2 Phi(-|delta - m| / 2)] for delta ~ N(0, scale^2 I), a sum over |delta - m|."""
    r = np.linspace(1e-6, 40.0, 2000)  # Phi(-20) is nothing
    law = ncx2.pdf((r / scale) ** 2, dim, (distance / scale) ** 2) * 2 * r / scale**2
    return float(np.trapezoid(2 * norm.cdf(-r / 2) * law, r))


@pytest.mark.parametrize(("dim", "scale"), [(1, 6.0), (2, 5.0), (5, 3.0)])
def test_a_jump_from_peak_to_peak(rng, ledger, dim, scale):
    distance, n = 8.0, 400_000
    target = two_peaks(distance, dim)
    x = target.sample(n, generator=rng(dim))
    kernel = random_walk(target, scale)
    state, _ = kernel.step(kernel.init(x), generator=rng(20 + dim))
    jumped = ((state.x[:, 0] > 0) != (x[:, 0] > 0)).double()
    exact = jump_rate(scale, distance, dim)
    ledger(
        f"a random walk jumps between two peaks in {dim} dimensions",
        exact=exact,
        estimate=jumped.mean(),
        std_error=jumped.std() / math.sqrt(n),
    )
    bound = (4 / (4 + scale**2)) ** (dim / 2) * math.exp(-(distance**2) / (2 * (scale**2 + 4)))
    assert exact < bound
    # That a jump of the right length hits, whatever its direction, is wrong above one dimension.
    if dim > 1:
        wrong = jump_rate(scale, distance, 1)
        assert abs(float(jumped.mean()) - wrong) > 4.5 * float(jumped.std()) / math.sqrt(n)


@pytest.mark.parametrize("dim", [1, 3, 10, 20, 40])
def test_no_step_size_jumps_better_than_the_bound(dim):
    distance = 10.0
    bound = (
        (4 * dim / distance**2) ** (dim / 2) * math.exp(-dim / 2)
        if 4 * dim < distance**2
        else math.exp(-(distance**2) / 8)
    )
    scales = torch.logspace(-0.5, 1.5, 20).tolist()
    best = max(jump_rate(scale, distance, dim) for scale in scales)
    assert 0.03 * bound < best < bound
