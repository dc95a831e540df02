"""Objectives of conditional probabilities, against the normalised law of small machines."""

import torch

from companion.objectives import pseudolikelihood
from companion.testing import binary_states
from tests.objectives.exact_gradients import DATA, F64, flat_grad, largest_z, machine


def reference_pseudolikelihood(model, v):
    """- mean_v sum_i log p(v_i | v_-i), one row and one unit at a time, from the normalised law."""
    states = binary_states(v.shape[1], dtype=F64)
    log_p = model.log_prob(states).log_softmax(0)
    total = 0.0
    for row in v:
        for i in range(v.shape[1]):
            rest = (states.long() == row).sum(1) - (states[:, i].long() == row[i]).long()
            same_rest = rest == v.shape[1] - 1
            same = (states.long() == row).all(1)
            total = total - (log_p[same].logsumexp(0) - log_p[same_rest].logsumexp(0))
    return total / len(v)


def test_pseudolikelihood_agrees_with_the_conditionals_of_the_normalised_law(rng, ledger):
    rbm = machine(rng)
    loss, slow = pseudolikelihood(rbm, DATA), reference_pseudolikelihood(rbm, DATA)
    ledger("negative log-pseudolikelihood, 3 x 2", exact=slow.detach(), estimate=loss.detach())
    torch.testing.assert_close(flat_grad(loss, rbm), flat_grad(slow, rbm))


def test_pseudolikelihood_of_independent_units_is_the_likelihood(rng):
    rbm = machine(rng)
    with torch.no_grad():
        rbm.W.zero_()
    likelihood = rbm.log_prob(DATA).mean() - rbm.log_z().value
    torch.testing.assert_close(pseudolikelihood(rbm, DATA), -likelihood)


def test_stochastic_pseudolikelihood_is_unbiased(rng):
    rbm = machine(rng)
    full = pseudolikelihood(rbm, DATA).detach()
    g = rng(5)
    with torch.no_grad():
        some = torch.stack(
            [pseudolikelihood(rbm, DATA, num_units=2, generator=g) for _ in range(2000)]
        )
    assert largest_z(some[:, None], full[None]) < 4.5
    assert largest_z(some[:, None] * 2 / 3, full[None]) > 4.5  # without the factor D / m
    torch.testing.assert_close(pseudolikelihood(rbm, DATA, num_units=3, generator=g), full)
