"""Exact results for the Ising model: transfer matrix, Kaufman's formula and brute force agree."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from companion.targets import (
    CRITICAL_COUPLING,
    ising_log_z,
    ising_magnetization,
    ising_moments,
    kaufman_log_z,
)

F64 = torch.float64
COUPLINGS = [-0.6, 0.0, 0.2, CRITICAL_COUPLING, 1.5]
SIZES = [(1, 1), (1, 2), (1, 5), (2, 2), (3, 2), (2, 5), (3, 3), (3, 4), (4, 4)]


def lattices(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """All lattices; the sum over bonds and the sum of spins of each, one bond at a time."""
    x = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=height * width)), dtype=F64)
    x = x.reshape(-1, height, width)
    bonds = torch.zeros(len(x), dtype=F64)
    for r in range(height):
        for c in range(width):
            bonds += x[:, r, c] * x[:, r, (c + 1) % width]
            bonds += x[:, r, c] * x[:, (r + 1) % height, c]
    return x, bonds, x.sum((1, 2))


# ---------------------------------------------------------------- log Z


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("field", [0.0, 0.3])
def test_the_transfer_matrix_agrees_with_brute_force(size, field):
    _, bonds, spins = lattices(*size)
    for coupling in COUPLINGS:
        exact = (coupling * bonds + field * spins).logsumexp(0)
        torch.testing.assert_close(ising_log_z(*size, coupling, field), exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            ising_log_z(*size[::-1], coupling, field), exact, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kaufmans_formula_agrees_with_brute_force(size):
    _, bonds, _ = lattices(*size)
    even = size[0] % 2 == size[1] % 2 == 0
    for coupling in COUPLINGS if even else COUPLINGS[1:]:
        exact = (coupling * bonds).logsumexp(0)
        torch.testing.assert_close(kaufman_log_z(*size, coupling), exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(kaufman_log_z(*size[::-1], coupling), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 3), (4, 4)], ids=str)
def test_log_z_of_small_lattices_stands_in_the_ledger(size, ledger):
    exact = (CRITICAL_COUPLING * lattices(*size)[1]).logsumexp(0)
    name = f"Ising log Z, {size[0]} x {size[1]}, critical"
    ledger(f"{name}: transfer matrix", exact=exact, estimate=ising_log_z(*size, CRITICAL_COUPLING))
    ledger(f"{name}: Kaufman", exact=exact, estimate=kaufman_log_z(*size, CRITICAL_COUPLING))


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (40, 5)], ids=str)
def test_transfer_matrix_and_kaufman_agree_where_enumeration_ends(size, ledger):
    for coupling in (0.05, CRITICAL_COUPLING, 0.8, 3.0):
        ledger(
            f"Ising log Z, {size[0]} x {size[1]}, K = {coupling:.2f}: Kaufman, transfer matrix",
            exact=kaufman_log_z(*size, coupling),
            estimate=ising_log_z(*size, coupling),
            tolerance=1e-10,
        )


def test_kaufmans_formula_agrees_with_the_low_temperature_series(ledger):
    """Counts of the lowest energies of 32 x 32 spins, from Beale (1996), *Exact distribution of
    energies in the two-dimensional Ising model*: 2 exp(2 N K) (1 + ...), in powers of exp(-4 K)."""
    counts = [2, 0, 2048, 4096, 1057792, 4218880, 371621888, 2191790080, 100903637504]
    for coupling in (1.5, 2.0):
        powers = torch.arange(len(counts), dtype=F64)
        series = torch.tensor(counts, dtype=F64).log() - 4 * coupling * powers
        ledger(
            f"Ising log Z, 32 x 32, K = {coupling}: low-temperature series, Kaufman",
            exact=2 * 32**2 * coupling + series.logsumexp(0),
            estimate=kaufman_log_z(32, 32, coupling),
            tolerance=1e-9,
        )
        wrong = (series[:2].logsumexp(0) - series.logsumexp(0)).abs()
        assert wrong > 1e-9  # without the first excitation


def test_large_critical_lattices_have_onsagers_free_energy_and_its_correction(ledger):
    """log Z = N (log(2) / 2 + 2 G / pi) + log(2^(1/4) + 2^(-1/2)) + O(1 / N), with Catalan's G, on
    square lattices at the critical coupling: Onsager (1944); Ferdinand and Fisher (1969)."""
    catalan = 0.915965594177219015
    num_sites = 1000**2
    limit = num_sites * (0.5 * math.log(2.0) + 2.0 * catalan / math.pi)
    ledger(
        "Ising log Z - N f, 1000 x 1000, critical",
        exact=math.log(2.0**0.25 + 2.0**-0.5),
        estimate=kaufman_log_z(1000, 1000, CRITICAL_COUPLING) - limit,
        tolerance=1e-6,
    )


def test_parameters_batch_and_follow_their_device(device):
    coupling = torch.tensor([0.1, 0.5, -0.3], dtype=torch.float32, device=device)
    field = torch.tensor([[0.0], [0.2]], dtype=torch.float32, device=device)
    found = ising_log_z(4, 3, coupling, field)
    assert (found.shape, found.dtype, found.device.type) == ((2, 3), F64, device.type)
    for i, j in itertools.product(range(2), range(3)):
        alone = ising_log_z(4, 3, float(coupling[j]), float(field[i, 0]))
        torch.testing.assert_close(found[i, j].cpu(), alone, rtol=0, atol=1e-12)
    assert kaufman_log_z(4, 4, coupling).shape == (3,)


def test_no_tensor_is_made_on_the_default_device():
    coupling = torch.tensor(0.3, dtype=F64)
    with torch.device("meta"):
        found = (ising_log_z(3, 4, coupling, 0.1), kaufman_log_z(3, 4, coupling))
        found += (*ising_magnetization(2, 3, 0.3), *ising_moments(2, 3, 0.3, 0.1))
    assert {x.device.type for x in found} == {"cpu"}


def test_strong_couplings_neither_overflow_nor_vanish():
    for coupling in (30.0, 340.0):
        ground = 2 * 36 * coupling + math.log(2.0)
        for log_z in (ising_log_z, kaufman_log_z):
            assert float(log_z(6, 6, coupling)) == pytest.approx(ground, rel=1e-14)
    assert float(ising_log_z(6, 6, 30.0, 50.0)) == pytest.approx(36 * (60 + 50), rel=1e-14)


# ---------------------------------------------------------------- means


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 5), (3, 3), (3, 5), (4, 4)], ids=str)
@pytest.mark.parametrize("field", [0.0, 0.15])
def test_means_agree_with_brute_force(size, field):
    x, bonds, spins = lattices(*size)
    num_sites = x[0].numel()
    for coupling in COUPLINGS[:4]:
        p = (coupling * bonds + field * spins).softmax(0)
        found = ising_moments(*size, coupling, field)
        m = spins / num_sites
        expected = [p @ bonds / (2 * num_sites), p @ m, p @ m.abs(), p @ m.square()]
        torch.testing.assert_close(
            torch.stack(found[1:]), torch.stack(expected), rtol=0, atol=1e-12
        )
        values, probs = ising_magnetization(*size, coupling, field)
        by_value = torch.stack([p[(m - value).abs() < 1e-9].sum() for value in values])
        torch.testing.assert_close(probs, by_value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("log_z", [ising_log_z, kaufman_log_z])
def test_the_derivative_of_log_z_is_the_mean_over_bonds(log_z):
    """At the critical coupling, too, where one of Kaufman's products is zero."""
    for coupling in (0.3, CRITICAL_COUPLING, 0.7):
        k = torch.tensor(coupling, dtype=F64, requires_grad=True)
        (slope,) = torch.autograd.grad(log_z(8, 8, k), k)
        exact = 2 * 64 * ising_moments(8, 8, coupling).correlation
        torch.testing.assert_close(slope, exact, rtol=0, atol=1e-10)


def test_the_law_of_the_magnetisation_of_8_x_8_spins_is_consistent(ledger):
    m, probs = ising_magnetization(8, 8, CRITICAL_COUPLING, 0.01)
    assert len(m) == 65 and probs.min() > 0
    ledger("Ising 8 x 8: sum of the law of the magnetisation", exact=1, estimate=probs.sum())
    h = torch.tensor(0.01, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(ising_log_z(8, 8, CRITICAL_COUPLING, h), h, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, h)
    name = "Ising 8 x 8, critical, h = 0.01"
    mean, square = probs @ m, probs @ m.square()
    ledger(f"{name}: E[m] as d log Z / dh", exact=slope.detach() / 64, estimate=mean)
    ledger(
        f"{name}: var m as the second derivative",
        exact=curvature / 64**2,
        estimate=square - mean**2,
    )


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ising_log_z(13, 13, 0.4), "shorter side of 12, got 13"),
        (lambda: ising_log_z(0, 3, 0.4), "height must be at least 1"),
        (lambda: ising_log_z(3, 3, math.nan), "coupling has 1 NaN"),
        (lambda: ising_log_z(3, 3, 0.1, math.inf), "field has 1 NaN or infinite"),
        (lambda: kaufman_log_z(3, 4, -0.1), "both sides are even; got -0.1"),
        (lambda: kaufman_log_z(3, 4, 400.0), "at most 350 in size"),
        (lambda: kaufman_log_z(3, 0, 0.1), "width must be at least 1"),
        (lambda: ising_magnetization(3, 3, math.inf), "coupling must be a finite"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
