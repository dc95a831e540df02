"""Exact partition functions."""

import math

import pytest
import torch

from companion.logz import enumeration

F64 = torch.float64


def test_enumeration_of_independent_bits_has_a_closed_form(ledger):
    bias = torch.linspace(-2, 3, 16, dtype=F64)  # 16 bits: four blocks of states
    log_z = enumeration(lambda x: x @ bias, 16, dtype=F64)
    exact = torch.nn.functional.softplus(bias).sum()
    ledger("enumeration of 16 independent bits", exact=exact, estimate=log_z.value)
    assert log_z.std_error == 0 and log_z.converged and log_z.value.dtype == F64


def test_enumeration_agrees_with_a_transfer_matrix(ledger):
    """A ring of n spins with field: log Z = log trace T^n."""
    coupling, field, n = 0.7, 0.3, 15

    def log_prob(x):
        s = 2 * x - 1
        return (coupling * s * s.roll(1, -1) + field * s).sum(-1)

    s = torch.tensor([-1.0, 1.0], dtype=F64)
    transfer = torch.exp(coupling * s[:, None] * s + field * (s[:, None] + s) / 2)
    exact = torch.linalg.matrix_power(transfer, n).trace().log()
    log_z = enumeration(log_prob, n, dtype=F64)
    ledger("enumeration of an Ising ring of 15 spins", exact=exact, estimate=log_z.value)


def test_forbidden_states_have_weight_zero():
    def log_prob(x):
        return torch.where(x.sum(-1) == 1, 0.0, -math.inf)

    assert enumeration(log_prob, 5).value.item() == pytest.approx(math.log(5), abs=1e-7)


def test_the_density_may_be_huge_or_tiny():
    for shift in (-5000.0, 5000.0):
        value = enumeration(lambda x, s=shift: x.sum(-1) + s, 4, dtype=F64).value
        assert value.item() == pytest.approx(shift + 4 * math.log(1 + math.e), rel=1e-13)


def test_bad_input_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="stops at 25 bits, got 26"):
        enumeration(lambda x: x.sum(-1), 26)
    with pytest.raises(ValueError, match="at least 1"):
        enumeration(lambda x: x.sum(-1), 0)
    with pytest.raises(ValueError, match=r"gave \(8, 3\) instead of \(8,\)"):
        enumeration(lambda x: x, 3)
    with pytest.raises(ValueError, match=r"nan at the state \[1\.0, 1\.0\]"):
        enumeration(lambda x: torch.where(x.sum(-1) > 1, math.nan, 0.0), 2)
    with pytest.raises(ValueError, match="inf at the state"):
        enumeration(lambda x: torch.where(x.sum(-1) > 1, math.inf, 0.0), 2)
    with pytest.raises(ValueError, match="nothing to normalise"):
        enumeration(lambda x: torch.full(x.shape[:-1], -math.inf), 2)


def test_no_gradient_is_kept():
    bias = torch.ones(3, requires_grad=True)
    assert not enumeration(lambda x: x @ bias, 3).value.requires_grad
