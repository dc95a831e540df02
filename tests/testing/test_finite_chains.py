"""What transition matrices do, against closed forms and slow definitions."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from companion.testing import (
    detailed_balance_error,
    mixing_time,
    reversal,
    spectral_gap,
    stationary_error,
)

F64 = {"dtype": torch.float64}


def two_states(a: float, b: float, **like) -> tuple[Tensor, Tensor]:
    """Eigenvalues 1 and 1 - a - b."""
    like = F64 | like
    matrix = torch.tensor([[1 - a, a], [b, 1 - b]], **like)
    return matrix, torch.tensor([b, a], **like) / (a + b)


def ring(m: int, up: float, down: float) -> tuple[Tensor, Tensor]:
    eye = torch.eye(m, **F64)
    matrix = up * eye.roll(1, 1) + down * eye.roll(-1, 1) + (1 - up - down) * eye
    return matrix, torch.full((m,), 1 / m, **F64)


def metropolis(rng, m: int = 6) -> tuple[Tensor, Tensor]:
    """A random reversible chain: symmetric proposals, accepted by Metropolis's rule."""
    p = torch.rand(m, generator=rng(0), **F64).softmax(0)
    proposal = torch.rand(m, m, generator=rng(1), **F64)
    proposal = (proposal + proposal.T) / (4 * m)
    matrix = proposal * (p / p[:, None]).clamp(max=1)
    return matrix + torch.diag(1 - matrix.sum(1)), p


def distance(matrix: Tensor, p: Tensor, t: int) -> float:
    power = torch.linalg.matrix_power(matrix, t)
    return float((power - p).abs().sum(1).max()) / 2


# ---------------------------------------------------------------- errors of balance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_errors_are_round_off_for_a_reversible_chain(device, dtype):
    matrix, p = two_states(0.3, 0.1, device=device, dtype=dtype)
    limit = 1e-15 if dtype == torch.float64 else 1e-7
    assert stationary_error(matrix, p) < limit
    assert detailed_balance_error(matrix, p) < limit
    assert stationary_error(matrix, p.flip(0)) == pytest.approx(0.2, abs=1e-7)


def test_a_walk_round_a_ring_is_invariant_without_detailed_balance():
    matrix, p = ring(5, 0.6, 0.1)
    assert stationary_error(matrix, p) < 1e-16
    assert detailed_balance_error(matrix, p) == pytest.approx(0.5 / 5, abs=1e-16)


# ---------------------------------------------------------------- the chain run backwards


def test_run_backwards_a_ring_turns_the_other_way():
    matrix, p = ring(5, 0.6, 0.1)
    torch.testing.assert_close(reversal(matrix, p), ring(5, 0.1, 0.6)[0])


def test_a_reversible_chain_is_its_own_reversal(rng):
    matrix, p = metropolis(rng)
    torch.testing.assert_close(reversal(matrix, p), matrix, rtol=0, atol=1e-15)


def test_the_reversal_of_a_product_is_the_product_of_reversals_the_other_way_round(rng):
    """So a sweep's reverse visits the sites in the opposite order."""
    a, p = metropolis(rng)
    b = a @ a + 0.3 * (torch.eye(6, **F64) - a)  # another chain with the same law
    b = b / b.sum(1, keepdim=True)
    product = a @ b
    torch.testing.assert_close(reversal(product, p), b @ a, rtol=0, atol=1e-15)
    torch.testing.assert_close(reversal(reversal(product, p), p), product, rtol=0, atol=1e-15)


# ---------------------------------------------------------------- speed


def test_spectral_gaps_agree_with_closed_forms(device, ledger):
    matrix, p = two_states(0.3, 0.1, device=device)
    ledger("spectral gap of a chain of two states", exact=0.4, estimate=spectral_gap(matrix, p))
    m = 12
    lazy = (1 - math.cos(2 * math.pi / m)) / 2
    ledger(
        "spectral gap of the lazy walk round a ring of twelve",
        exact=lazy,
        estimate=spectral_gap(*ring(m, 0.25, 0.25)),
    )
    up, down, turn = 0.4, 0.1, cmath.exp(2j * math.pi / m)
    turned = abs(0.5 + up * turn + down / turn)  # the modulus of a complex eigenvalue
    ledger(
        "spectral gap of a walk with a drift",
        exact=1 - turned,
        estimate=spectral_gap(*ring(m, up, down)),
    )


def test_gap_of_chains_that_never_mix_is_zero():
    assert spectral_gap(*ring(6, 0.5, 0.5)) < 1e-14  # of period two
    assert spectral_gap(torch.eye(3), torch.full((3,), 1 / 3)) < 1e-6  # three parts
    assert spectral_gap(torch.full((3, 3), 1 / 3), torch.full((3,), 1 / 3)) > 1 - 1e-6  # at once


def test_states_of_probability_zero_do_not_count():
    matrix = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.9, 0.0], [0.0, 0.001, 0.999]], **F64)
    p = torch.tensor([0.25, 0.75, 0.0], **F64)
    assert spectral_gap(matrix, p) == pytest.approx(0.4, abs=1e-12)


def test_the_gap_is_the_rate_at_which_the_distance_falls(rng):
    matrix, p = metropolis(rng)
    late = [distance(matrix, p, t) for t in (60, 61)]
    assert 1 - late[1] / late[0] == pytest.approx(spectral_gap(matrix, p), rel=1e-3)


@pytest.mark.parametrize("epsilon", [0.5, 0.25, 0.1, 0.01, 1e-6])
def test_mixing_time_is_the_first_time_that_is_near_enough(rng, epsilon):
    for matrix, p in [metropolis(rng), ring(5, 0.6, 0.1), ring(9, 0.25, 0.25), two_states(0.9, 1)]:
        t = mixing_time(matrix, p, epsilon)
        assert distance(matrix, p, t) <= epsilon
        assert distance(matrix, p, t - 1) > epsilon


def test_mixing_time_of_two_states_has_a_closed_form(device, ledger):
    """The distance is `max(p) |1 - a - b|^t`."""
    for a, b in [(0.3, 0.1), (1e-3, 2e-3), (1e-6, 1e-6)]:
        matrix, p = two_states(a, b, device=device)
        exact = math.ceil(math.log(0.25 / float(p.max())) / math.log1p(-a - b))
        ledger(
            f"mixing time of a chain of two states that leaves them with probability {a:g}, {b:g}",
            exact=exact,
            estimate=mixing_time(matrix, p),
            tolerance=0.5,
        )


def test_mixing_time_of_what_is_mixed_already_is_zero():
    assert mixing_time(torch.ones(1, 1), torch.ones(1)) == 0
    assert mixing_time(torch.eye(2), torch.full((2,), 0.5), 0.6) == 0
    assert mixing_time(torch.full((2, 2), 0.5), torch.full((2,), 0.5)) == 1


# ---------------------------------------------------------------- refusals


def test_what_is_no_chain_is_refused_with_a_sentence():
    eye, half = torch.eye(2), torch.full((2,), 0.5)
    swap = eye.flip(0)
    for f in (stationary_error, detailed_balance_error, reversal, spectral_gap, mixing_time):
        with pytest.raises(ValueError, match=r"got \(2, 2\) and \(3,\)"):
            f(eye, torch.full((3,), 1 / 3))
        with pytest.raises(ValueError, match=r"each row of the matrix .* a sum is off by 0.1"):
            f(eye * 1.1, half)
        with pytest.raises(ValueError, match=r"p must hold .* smallest entry is -0.5"):
            f(eye, torch.tensor([1.5, -0.5]))
        with pytest.raises(ValueError, match="matrix has 4 NaN"):
            f(eye * math.nan, half)
    for f in (reversal, spectral_gap):
        with pytest.raises(ValueError, match="one step moves it by 0.5"):
            f(swap, torch.tensor([0.25, 0.75]))
    with pytest.raises(ValueError, match="it is 0 at state 1"):
        reversal(eye, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="not within 0.25 of p after 2\\^30 steps"):
        mixing_time(swap, half)
    with pytest.raises(ValueError, match="epsilon"):
        mixing_time(swap, half, 0.0)


def test_no_tensor_is_made_on_the_default_device():
    matrix, p = ring(5, 0.6, 0.1)
    with torch.device("meta"):
        assert stationary_error(matrix, p) < 1e-16
        assert detailed_balance_error(matrix, p) > 0.09
        assert reversal(matrix, p).device.type == "cpu"
        assert spectral_gap(matrix, p) > 0.1
        assert mixing_time(matrix, p) > 1
