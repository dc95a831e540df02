"""Enumeration visits every state once, in order, and gives the exact law."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli

from companion.testing import binary_states, enumerate_log_probs, exact_distribution


@pytest.mark.parametrize("num_bits", [1, 2, 5])
def test_binary_states_are_all_states_in_order(num_bits):
    expected = torch.tensor(list(itertools.product([0.0, 1.0], repeat=num_bits)))
    assert torch.equal(binary_states(num_bits), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_binary_states_follow_dtype_and_device(device, dtype):
    states = binary_states(3, device=device, dtype=dtype)
    assert (states.dtype, states.device.type) == (dtype, device.type)
    assert states.sum() == 12


def test_blocks_of_an_enumeration_join_without_a_seam():
    weights = torch.arange(1.0, 17.0, dtype=torch.float64)  # 16 bits: four blocks
    calls = []

    def log_prob(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x @ weights

    found = enumerate_log_probs(log_prob, 16, dtype=torch.float64)
    assert calls == [2**14] * 4
    assert torch.equal(found, binary_states(16, dtype=torch.float64) @ weights)


def test_exact_distribution_agrees_with_independent_coins(ledger):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    p = exact_distribution(lambda x: x @ logits + 1000.0, 4, dtype=torch.float64)
    states = binary_states(4, dtype=torch.float64)
    expected = Bernoulli(logits=logits).log_prob(states).sum(1).exp()
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=0)
    ledger(
        "probability of one state of four independent coins, by enumeration",
        exact=expected[5],
        estimate=p[5],
        tolerance=1e-14,
    )


def test_forbidden_states_have_probability_zero():
    p = exact_distribution(lambda x: torch.where(x.sum(1) == 1, 0.0, -torch.inf), 3)
    assert p.sum() == 1
    assert p.count_nonzero() == 3
    assert p.dtype == torch.float64


@pytest.mark.parametrize(
    ("log_prob", "num_bits", "message"),
    [
        (lambda x: x.sum(1), 26, "stops at 25 bits"),
        (lambda x: x.sum(1), 0, "at least 1"),
        (lambda x: x, 3, r"\(8, 3\) instead of \(8,\)"),
        (lambda x: x.sum(1) * math.nan, 3, r"nan at the state \[0.0, 0.0, 0.0\]"),
        (lambda x: torch.where(x.sum(1) > 1, torch.inf, 0.0), 2, r"inf at the state \[1.0, 1.0\]"),
        (lambda x: torch.full((len(x),), -torch.inf), 2, "none is allowed"),
    ],
)
def test_bad_enumerations_are_refused(log_prob, num_bits, message):
    with pytest.raises(ValueError, match=message):
        exact_distribution(log_prob, num_bits)
