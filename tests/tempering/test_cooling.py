"""Simulated annealing: Hajek's theorem by products of matrices, and what last points are not."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, Uniform

from companion.core import Kernel
from companion.mcmc import GibbsState, random_walk
from companion.tempering import GeometricPath, cooling
from companion.tempering.cooling import simulated_annealing
from companion.testing import transition_matrix
from tests.mcmc.exact_targets import plant
from tests.tempering.exact_paths import F64


class Line:
    """An energy on the states 0, ..., m - 1 of a line, from a flat base to `exp(-U / T)`.

    A step is Metropolis: to a neighbour, either with probability 1/2; beyond the ends is nothing.
    """

    base_log_z = 0.0

    def __init__(self, energy, temperature):
        self.target = -torch.tensor(energy, dtype=F64) / temperature

    def sample_base(self, n, *, generator=None):
        return torch.randint(len(self.target), (n,), device="cpu", generator=generator)

    def log_prob(self, x, beta):
        return beta * self.target[x]

    def step(self, x, beta, *, generator=None):
        like = {"dtype": F64, "device": "cpu", "generator": generator}
        y = x + torch.where(torch.rand(x.shape, **like) < 0.5, 1, -1)
        inside = (y >= 0) & (y < len(self.target))
        y = torch.where(inside, y, x)
        accept_prob = (beta * (self.target[y] - self.target[x])).clamp(max=0.0).exp()
        return torch.where(torch.rand(x.shape, **like) < accept_prob, y, x)


def metropolis(energy, temperatures):
    """The transition matrices at all temperatures, `(n, m, m)`."""
    energy = torch.tensor(energy, dtype=F64)
    m, rise = len(energy), energy[None] - energy[:, None]
    neighbours = (torch.arange(m)[:, None] - torch.arange(m)).abs() == 1
    moves = (-rise.clamp(min=0.0) / temperatures[:, None, None]).exp() * 0.5 * neighbours
    return moves + torch.diag_embed(1.0 - moves.sum(-1))


def product(matrices):
    """The matrices' product in order, by halves; an odd one at the end waits for the next round."""
    while len(matrices) > 1:
        pairs = len(matrices) // 2 * 2
        matrices = torch.cat([matrices[0:pairs:2] @ matrices[1:pairs:2], matrices[pairs:]])
    return matrices[0]


def chi_square(x, p):
    """The p-value of counts of states; 0 if one was seen that has hardly any probability."""
    from scipy.stats import chisquare

    counts, possible = x.bincount(minlength=len(p)), p > 1e-6
    if counts[~possible].any():
        return 0.0
    p = p[possible] / p[possible].sum()
    return chisquare(counts[possible].numpy(), (len(x) * p).numpy()).pvalue


# ---------------------------------------------------------------- the theorem

# The optimum is state 0; state 2 is a local minimum from which 1 has to be climbed.
LANDSCAPE, DEPTH = [0.0, 1.5, 0.5], 1.0
HORIZONS = 2 ** torch.arange(2, 19)


def failure(c):
    """P(not at the optimum after n steps), from the local minimum, at temperatures c / log(1 + k),
    for each horizon n."""
    k = torch.arange(1, int(HORIZONS[-1]) + 1, dtype=F64)
    matrices = metropolis(LANDSCAPE, c / (1.0 + k).log())
    return torch.stack([1.0 - product(matrices[:n])[2, 0] for n in HORIZONS.tolist()])


@pytest.mark.parametrize("c", [1.0 * DEPTH, 1.25 * DEPTH, 2.0 * DEPTH])
def test_cooling_as_slowly_as_the_theorem_asks_finds_the_optimum(c):
    """The probability of failure falls with the horizon, and like a power of it: no plateau."""
    missed = failure(c)
    assert (missed[4:].diff() < 0).all()
    powers = -missed.log().diff() / HORIZONS.log().diff()
    assert (powers[8:] > 0.1).all()
    assert missed[-1] < 0.1


@pytest.mark.parametrize("c", [0.5 * DEPTH, 0.7 * DEPTH])
def test_faster_cooling_stays_stuck_with_positive_probability(c):
    """At least with that of never leaving the local minimum: half of the proposals lead out of it,
    each accepted with `exp(-depth / T_k) = (1 + k)^(-depth / c)`, whose sum is finite."""
    missed, power = failure(c), DEPTH / c
    k = torch.arange(1, int(HORIZONS[-1]) + 1, dtype=F64)
    stays = (1.0 - 0.5 * (1.0 + k) ** -power).log().cumsum(0).exp()[HORIZONS - 1]
    rest = 0.5 * float(k[-1]) ** (1.0 - power) / (power - 1.0)  # of the sum, beyond the horizon
    assert (missed >= stays).all()
    assert stays[-1] * (1.0 - rest) > 0.2
    # The theorem's other half would fail this: there the same bound goes to 0.
    assert (1.0 - 0.5 / (1.0 + k)).log().sum().exp() < 0.01


# ---------------------------------------------------------------- the sampler is that chain

ENERGY = [0.0, 0.9, 0.3, 1.4, 0.7, 0.2]
BETAS = torch.linspace(0.0, 1.0, 31, dtype=F64)[1:]
TEMPERATURE = 0.15


def test_the_step_is_the_matrix():
    path, states = Line(ENERGY, TEMPERATURE), torch.arange(6)
    for beta in (0.1, 1.0):

        def step(state, *, generator=None, beta=beta):
            return GibbsState(path.step(state.x, beta, generator=generator)), None

        matrix = transition_matrix(Kernel(GibbsState, step), states)
        expected = metropolis(ENERGY, torch.tensor([TEMPERATURE / beta], dtype=F64))[0]
        torch.testing.assert_close(matrix, expected, atol=1e-12, rtol=0)


def run_and_p_values(generator):
    """A run, the p-values of its last and of its best points, and the exact law of the last."""
    run = cooling.simulated_annealing(Line(ENERGY, TEMPERATURE), BETAS, 20_000, generator=generator)
    matrices = metropolis(ENERGY, TEMPERATURE / BETAS)
    last = product(matrices).mean(0)
    # Seen at least as good as the r-th best state: hit the set of these, which is made absorbing.
    order, hit = torch.tensor(ENERGY).argsort(), [torch.zeros((), dtype=F64)]
    for good in (order[: r + 1] for r in range(6)):
        absorbing = matrices.clone()
        absorbing[:, good] = torch.eye(6, dtype=F64)[good]
        hit.append(product(absorbing)[:, good].sum(1).mean())
    best = torch.zeros(6, dtype=F64)
    best[order] = torch.stack(hit).diff()
    return run, chi_square(run.x_last, last), chi_square(run.x, best), last


def test_last_and_best_points_follow_the_product_of_the_matrices(rng):
    run, p_last, p_best, last = run_and_p_values(rng(0))
    assert p_last > 1e-5 and p_best > 1e-5
    assert torch.equal(run.log_prob, -torch.tensor(ENERGY, dtype=F64)[run.x] / TEMPERATURE)
    # Negative controls: other schedules, and the best taken for the last.
    matrices = metropolis(ENERGY, TEMPERATURE / BETAS)
    assert chi_square(run.x_last, product(matrices.flip(0)).mean(0)) < 1e-9
    assert chi_square(run.x_last, product(matrices[:-8]).mean(0)) < 1e-9
    assert chi_square(run.x, last) < 1e-9


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value > highest", "value < highest"),
        ("path.step(x, beta,", "path.step(x, 1.0,"),
        ("torch.maximum(value, highest)", "value"),
    ],
)
def test_planted_bugs_are_found(rng, old, new, monkeypatch):
    plant(monkeypatch, cooling.simulated_annealing, old, new)
    _, p_last, p_best, _ = run_and_p_values(rng(0))
    assert min(p_last, p_best) < 1e-9


# ---------------------------------------------------------------- not a sample


def test_last_points_do_not_follow_the_masses_of_the_modes(rng, ledger):
    """Two modes of equal height: one of a single state at the foot of a long slope, one of five
    states with steep sides. The target gives the wide one five times the mass of the narrow one;
    annealing ends in the narrow one more often, exactly as often as the matrices say."""
    slope = [0.25 * i for i in range(12)]  # 0 at state 0, then uphill
    energy = [*slope, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    path = Line(energy, 0.1)
    betas = torch.linspace(0.0, 1.0, 201, dtype=F64)[1:]
    n = 20_000
    run = simulated_annealing(path, betas, n, generator=rng(0))
    end = product(metropolis(energy, 0.1 / betas)).mean(0)
    target = path.target.softmax(0)
    narrow = float(end[:12].sum())
    assert target[:12].sum() < 0.2 and narrow > 0.5
    share = (run.x_last < 12).double()
    ledger(
        "share of annealed chains that end in the narrow mode",
        exact=narrow,
        estimate=share.mean(),
        std_error=share.std() / math.sqrt(n),
    )
    masses = torch.stack([target[:12].sum(), target[12:].sum()])
    assert chi_square((run.x_last >= 12).long(), masses) < 1e-9
    # A hundred times as slow is not slow enough: chains cease to cross long before the end.
    slower = torch.linspace(0.0, 1.0, 20_001, dtype=F64)[1:]
    end = product(metropolis(energy, 0.1 / slower)).mean(0)
    assert end[:12].sum() - target[:12].sum() > 0.2


# ---------------------------------------------------------------- what a run is


def rastrigin(x):
    return (10.0 - 10.0 * torch.cos(2.0 * torch.pi * x) + x.square()).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_annealing_finds_what_descent_does_not(rng, device, dtype):
    like = {"dtype": dtype, "device": device}
    box = Independent(Uniform(torch.full((1,), -5.0, **like), torch.full((1,), 5.0, **like)), 1)
    path = GeometricPath(
        box, lambda x: -rastrigin(x) / 0.1, lambda density: random_walk(density, 0.7)
    )
    betas = torch.linspace(0.0, 1.0, 201, dtype=F64)[1:]
    run = simulated_annealing(path, betas, 100, generator=rng(0, device))
    assert run.x.dtype == dtype and run.x.shape == (100, 1) and run.log_prob.shape == (100,)
    torch.testing.assert_close(run.log_prob, path.log_prob(run.x, 1.0))
    assert (run.log_prob >= path.log_prob(run.x_last, 1.0)).all()
    assert (rastrigin(run.x) < 0.9).double().mean() > 0.8  # the next minimum is at 0.995
    downhill = GeometricPath(box, path.target, lambda density: random_walk(density, 0.1))
    cold = torch.linspace(0.99, 1.0, 200, dtype=F64)
    run = simulated_annealing(downhill, cold, 100, generator=rng(1, device))
    assert (rastrigin(run.x) < 0.9).double().mean() < 0.3


def test_starts_count_and_are_kept_as_they_were(rng):
    path = GeometricPath(
        Independent(Normal(torch.zeros(1, dtype=F64), 3.0), 1),
        lambda x: -50.0 * x.square().sum(-1),
        lambda density: random_walk(density, 0.5),
    )
    x0 = torch.zeros(5, 1, dtype=F64)
    run = simulated_annealing(path, [0.1, 1.0], 5, x0=x0, generator=rng(0))
    assert (run.x == 0.0).all() and (run.x_last != 0.0).any() and (x0 == 0.0).all()


def test_zero_density_and_nan_are_no_height(rng):
    box = Independent(Uniform(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)), 1)

    def log_prob(x):
        value = torch.where(x[..., 0] < 0.5, -torch.inf, x[..., 0])
        return torch.where(x[..., 0] > 0.9, torch.nan, value)

    path = GeometricPath(box, log_prob, lambda density: random_walk(density, 0.2))
    x0 = torch.full((50, 1), 0.1, dtype=F64)  # zero density at the start
    betas = torch.linspace(0.1, 1.0, 200, dtype=F64)
    run = simulated_annealing(path, betas, 50, x0=x0, generator=rng(0))
    lost = run.log_prob == -torch.inf  # they have wandered off where nothing is
    assert lost.double().mean() < 0.5
    x = run.x[~lost, 0]
    assert (x > 0.5).all() and (x <= 0.9).all() and torch.equal(run.log_prob[~lost], x)
    assert (run.x[lost] == 0.1).all()


def test_one_seed_one_result_whatever_the_default_device(rng):
    path = Line(ENERGY, TEMPERATURE)

    def found(seed):
        return torch.stack(
            [f.double() for f in simulated_annealing(path, BETAS, 50, generator=rng(seed))]
        )

    first = found(1)
    with torch.device("meta"):
        assert torch.equal(first, found(1))
    assert not torch.equal(first, found(2))


def test_bad_input_is_explained(rng):
    path = Line(ENERGY, TEMPERATURE)
    for betas, num_chains, x0, message in [
        ([0.5, 0.2, 1.0], 3, None, "must ascend"),
        ([0.0, 0.5], 3, None, "must ascend from 0 or above to 1"),
        ([1.0], 0, None, "num_chains"),
        ([1.0], 3, torch.zeros(2, dtype=torch.long), r"x0 must be \(chains, \*event\), \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            simulated_annealing(path, betas, num_chains, x0=x0, generator=rng(0))
    with pytest.raises(TypeError, match="x0 must be torch.int64"):
        simulated_annealing(path, [1.0], 3, x0=torch.zeros(3), generator=rng(0))
