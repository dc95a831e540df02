"""What the chapter on annealing and tempering states and no module's test covers.

Everything is exact: quadrature, small matrices, and a search over whole numbers.
"""

import math

import pytest
import torch

from companion.testing import spectral_gap

F64 = torch.float64


def log_normal(x, mean, sd):
    return -0.5 * ((x - mean) / sd).square() - math.log(sd) - 0.5 * math.log(2.0 * math.pi)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_a_power_of_a_normal_law(beta):
    """Its variance is 1 / beta of the old one; warm draws keep the share that the formula says."""
    x = torch.linspace(-60.0, 70.0, 200_001, dtype=F64)
    mean, sd = 5.0, 1.5
    power = (beta * log_normal(x, mean, sd)).softmax(0)
    expected = log_normal(x, mean, sd / math.sqrt(beta)).softmax(0)
    torch.testing.assert_close(power, expected, rtol=0, atol=1e-12)
    wrong = log_normal(x, mean, sd / beta).softmax(0)  # temperature as a scale
    assert float((power - wrong).abs().sum()) > 0.2
    if beta < 2.0:
        p = log_normal(x, mean, sd).softmax(0)
        share = 1.0 / float((p.square() / power).nan_to_num(0.0).sum())
        assert share == pytest.approx(math.sqrt(beta * (2.0 - beta)), rel=1e-8)


def moves_a_round_trip(num_pairs, barrier):
    """With the pairs in turn, equal rejections and a move on each rung."""
    r = barrier / num_pairs
    return (num_pairs + 1) * (2.0 + 2.0 * num_pairs * r / (1.0 - r))


@pytest.mark.parametrize("barrier", [1.0, 2.5, 10.0])
def test_the_best_ladder_accepts_half_of_its_swaps(rng, barrier):
    pairs = range(math.floor(barrier) + 1, 40 * math.ceil(barrier))
    best = min(pairs, key=lambda n: moves_a_round_trip(n, barrier))
    assert best == round(2.0 * barrier)
    for worse in (1.2 * barrier, 4.0 * barrier):
        assert moves_a_round_trip(worse, barrier) > moves_a_round_trip(best, barrier)
    # Unequal rejections of the same sum make fewer round trips.
    shares = torch.rand(200, best, dtype=F64, generator=rng(0))
    r = barrier * shares / shares.sum(1, keepdim=True)
    r = r[(r < 1.0).all(1)]
    assert len(r) > 20
    equal = best * 0.5 / 0.5
    assert ((r / (1.0 - r)).sum(1) >= equal - 1e-9).all()


def levels_and_modes(mass, passage):
    """Equal shares of the levels, two modes of masses a_k and 1 - a_k, Metropolis between levels,
    and a redraw of the mode at the levels where `passage` is true."""
    num = len(mass)
    law = torch.stack([mass, 1.0 - mass], 1) / num
    move = torch.zeros(num, 2, num, 2, dtype=F64)
    redraw = torch.zeros_like(move)
    for k in range(num):
        for mode in (0, 1):
            for j in (k - 1, k + 1):
                if 0 <= j < num:
                    move[k, mode, j, mode] = 0.5 * min(1.0, float(law[j, mode] / law[k, mode]))
            redraw[k, mode, k] = law[k] * num if passage[k] else torch.eye(2, dtype=F64)[mode]
    move, redraw = move.reshape(2 * num, -1), redraw.reshape(2 * num, -1)
    move = move + (1.0 - move.sum(1)).diag()
    return redraw @ move @ redraw, law.flatten()


def bound(mass, m):
    above = mass[m:].sum()
    return float(torch.minimum(mass[m - 1], mass[m]) / (above * (1.0 - above / len(mass))))


@pytest.mark.parametrize("seed", range(5))
def test_a_narrow_passage_bounds_the_gap(rng, seed):
    mass = torch.rand(8, dtype=F64, generator=rng(seed))
    mass[3:5] *= 1e-4
    for m in (1, 4):
        passage = torch.arange(8) < m
        matrix, law = levels_and_modes(mass, passage)
        gap = spectral_gap(matrix, law)
        assert 0.0 < gap <= bound(mass, m) + 1e-12
    assert gap < 1e-3
    # Negative control: a chain that does pass between the modes at the levels above m.
    matrix, law = levels_and_modes(mass, torch.ones(8, dtype=torch.bool))
    assert spectral_gap(matrix, law) > 10.0 * bound(mass, 4)


def walk(beta, x, hop):
    """A random walk between peaks of masses 4/5 and 1/5, 8 apart, on a base N(4, 5^2)."""
    left, right = math.log(0.8) + log_normal(x, 0.0, 1.0), math.log(0.2) + log_normal(x, 8.0, 1.0)
    log_p = (1.0 - beta) * log_normal(x, 4.0, 5.0) + beta * torch.logaddexp(left, right)
    matrix = hop * (log_p - log_p[:, None]).clamp(max=0.0).exp()
    matrix.fill_diagonal_(0.0)
    return matrix + (1.0 - matrix.sum(1)).diag(), log_p.softmax(0)


def test_where_annealed_chains_end_follows_from_gaps_and_masses():
    """`w += gap(beta) (mass(beta) - w)`, against the product of the matrices."""
    h = 0.5
    x = torch.arange(-12.0, 20.0 + h, h, dtype=F64)
    hop = log_normal(x[:, None] - x, 0.0, 1.0).exp() * h
    side = torch.where(x == 4.0, 0.5, (x > 4.0).double())
    law = walk(0.0, x, hop)[1]
    w = frozen = 0.5
    for beta in torch.linspace(0.0, 1.0, 401, dtype=F64)[1:].tolist():
        matrix, p = walk(beta, x, hop)
        law = law @ matrix
        w += spectral_gap(matrix, p) * (float(p @ side) - w)
        frozen = float(p @ side)
    exact = float(law @ side)
    assert exact == pytest.approx(w, abs=0.01)
    assert abs(exact - frozen) > 0.1  # far from the mass at beta = 1
