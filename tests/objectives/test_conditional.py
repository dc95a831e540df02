"""Objectives of conditional probabilities, against the normalised law of small machines."""

import math

import pytest
import torch

from companion.models.boltzmann import BoltzmannMachine
from companion.models.rbm import GaussianRBM, RatingRBM
from companion.objectives import (
    generalized_pseudolikelihood,
    pseudolikelihood,
    ratio_matching,
)
from companion.objectives.conditional import (
    _block_rows,
    _log_odds,
    _pseudolikelihood_rows,
    _ratio_rows,
)
from companion.testing import binary_states
from tests.minimum import minimise
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


@pytest.mark.parametrize("objective", [pseudolikelihood, ratio_matching])
def test_a_random_choice_of_units_is_unbiased(objective, rng):
    rbm = machine(rng)
    full = objective(rbm, DATA).detach()
    g = rng(5)
    with torch.no_grad():
        some = torch.stack([objective(rbm, DATA, num_units=2, generator=g) for _ in range(400)])
    assert largest_z(some[:, None], full[None]) < 4.5
    assert largest_z(some[:, None] * 2 / 3, full[None]) > 4.5  # without the factor D / m
    torch.testing.assert_close(objective(rbm, DATA, num_units=3, generator=g), full)


# ---------------------------------------------------------------- blocks

PAIRS = [torch.tensor([0, 2]), torch.tensor([1, 0])]


def test_blocks_of_one_unit_are_the_pseudolikelihood_and_one_of_all_is_the_likelihood(rng, ledger):
    rbm = machine(rng)
    ones = generalized_pseudolikelihood(rbm, DATA, torch.arange(3).split(1))
    torch.testing.assert_close(ones, pseudolikelihood(rbm, DATA))
    whole = generalized_pseudolikelihood(rbm, DATA, [torch.tensor([2, 0, 1])])
    exact = rbm.log_prob(binary_states(3, dtype=F64)).logsumexp(0) - rbm.log_prob(DATA).mean()
    ledger("one block of all units, 3 x 2", exact=exact.detach(), estimate=whole.detach())
    torch.testing.assert_close(flat_grad(whole, rbm), flat_grad(exact, rbm))


def test_overlapping_blocks_agree_with_the_conditionals_of_the_normalised_law(rng, ledger):
    rbm = machine(rng)
    table = rbm.log_prob(binary_states(3, dtype=F64)).log_softmax(0).view(2, 2, 2)
    a, b, c = DATA.T
    joint = table[a, b, c]
    pair_02 = joint - table.logsumexp((0, 2))[b]
    pair_10 = joint - table.logsumexp((0, 1))[c]
    exact = -(pair_02 + pair_10).mean()
    found = generalized_pseudolikelihood(rbm, DATA, PAIRS)
    ledger("two overlapping blocks, 3 x 2", exact=exact.detach(), estimate=found.detach())
    torch.testing.assert_close(flat_grad(found, rbm), flat_grad(exact, rbm))


def test_a_block_may_list_the_states_that_can_occur(rng):
    """Three one-hot units: the model is never asked for another state, and need not know it."""
    rbm = machine(rng)

    class OneHot:
        def log_prob(self, v):
            assert (v.sum(-1) == 1).all()
            return rbm.log_prob(v)

    v, block = torch.eye(3)[[0, 2, 2]].long(), torch.arange(3)
    found = generalized_pseudolikelihood(OneHot(), v, [(block, torch.eye(3))])
    exact = rbm.log_prob(torch.eye(3, dtype=F64)).log_softmax(0)[[0, 2, 2]].mean()
    torch.testing.assert_close(found, -exact)
    with pytest.raises(ValueError, match=r"row \(0,\) is in a state .* not list: \[1, 1, 0\]"):
        generalized_pseudolikelihood(rbm, DATA, [(block, torch.eye(3))])


@pytest.mark.parametrize("units", [(0, 1), (0, 1, 2), (2,), [1, 0]], ids=str)
def test_a_block_of_plain_numbers_is_that_of_a_tensor(units, rng):
    rbm = machine(rng)
    exact = generalized_pseudolikelihood(rbm, DATA, [torch.tensor(units)])
    torch.testing.assert_close(generalized_pseudolikelihood(rbm, DATA, [units]), exact)
    both = generalized_pseudolikelihood(rbm, DATA, [units, torch.tensor([2])])
    assert abs(both - exact) > 0.01


def test_states_of_a_block_may_be_plain_lists(rng):
    rbm = machine(rng)
    for units, states in (
        ((0, 1), [[1, 1], [0, 0], [0, 1]]),
        ((0, 1, 2), [[1, 1, 0], [1, 1, 1], [0, 0, 1]]),
        ((2,), [[0], [1]]),
    ):
        exact = generalized_pseudolikelihood(
            rbm, DATA, [(torch.tensor(units), torch.tensor(states))]
        )
        for pair in ((units, states), (list(units), states), (torch.tensor(units), states)):
            found = generalized_pseudolikelihood(rbm, DATA, [pair])
            torch.testing.assert_close(found, exact)
    with pytest.raises(ValueError, match=r"states must be \(m, 2\), got \(3, 1\)"):
        generalized_pseudolikelihood(rbm, DATA, [((0, 1), [[1], [0], [1]])])


# ---------------------------------------------------------------- ratio matching


def test_ratio_matching_is_the_squared_distance_of_ratios_up_to_a_constant_of_the_data(rng, ledger):
    """Hyvärinen (2007): both terms of his definition, with the data's own ratios, by enumeration.

    For the pair of x and flip_i x, with probabilities p and q, the constant is pq / (p + q).
    """
    states = binary_states(3, dtype=F64)
    data = torch.rand(8, dtype=F64, generator=rng(1)).softmax(0)
    flips = torch.arange(8)[:, None] ^ torch.tensor([4, 2, 1])  # (state, unit)

    def g(u):
        return 1 / (1 + u)

    def definition(model):
        p = model.log_prob(states).softmax(0)
        here, there = p[:, None] / p[flips], p[flips] / p[:, None]
        of_data, back = data[:, None] / data[flips], data[flips] / data[:, None]
        terms = (g(of_data) - g(here)).square() + (g(back) - g(there)).square()
        return (data[:, None] * terms).sum() / 2

    pair = data[:, None] * data[flips] / (data[:, None] + data[flips])
    constant = pair.sum() / 2  # each pair was met twice
    for seed in range(3):
        rbm = machine(rng, seed)
        found, exact = data @ _ratio_rows(rbm, states), definition(rbm) + constant
        ledger(f"ratio matching, machine {seed}", exact=exact.detach(), estimate=found.detach())
        torch.testing.assert_close(flat_grad(found, rbm), flat_grad(exact, rbm))
    torch.testing.assert_close(
        ratio_matching(rbm, DATA), _ratio_rows(rbm, DATA).mean(), rtol=0, atol=0
    )


def test_ratio_matching_squares_the_conditional_probability_of_the_other_value(rng):
    model = BoltzmannMachine(3, dtype=F64)
    with torch.no_grad():
        model.J.copy_(torch.randn(3, 3, dtype=F64, generator=rng(0)))
        model.b.copy_(torch.randn(3, dtype=F64, generator=rng(1)))
    missed = (DATA - model.conditional_probs(DATA)).square().sum(-1).mean()
    torch.testing.assert_close(ratio_matching(model, DATA), missed)
    # the probability of the value itself would be maximised by it
    wrong = (1 - DATA - model.conditional_probs(DATA)).square().sum(-1).mean()
    assert abs(ratio_matching(model, DATA) - wrong) > 0.01


# ---------------------------------------------------------------- consistency


def true_machine(rng):
    model = BoltzmannMachine(5, dtype=F64)
    with torch.no_grad():
        model.J.copy_(torch.randn(5, 5, dtype=F64, generator=rng(2)))
        model.b.copy_(torch.randn(5, dtype=F64, generator=rng(3)) - 0.3)
    return model


def likelihood_rows(model, v):
    return _block_rows(model, v, [torch.arange(5)])


def pair_rows(model, v):
    return _block_rows(model, v, [*torch.combinations(torch.arange(5)), torch.arange(3)])


ROWS = {
    "likelihood": likelihood_rows,
    "pseudolikelihood": _pseudolikelihood_rows,
    "blocks": pair_rows,
    "ratio matching": _ratio_rows,
}


def population_loss(rows, model, truth):
    """The objective's mean over the exact law of `truth`: no sample, all states by their weight."""
    states = binary_states(5, dtype=F64)
    return truth.log_prob(states).detach().softmax(0) @ rows(model, states)


@pytest.mark.parametrize("name", ROWS)
def test_the_truth_is_the_minimum_of_the_population_objective(name, rng, ledger):
    truth, rows = true_machine(rng), ROWS[name]
    gradient = flat_grad(population_loss(rows, truth, truth), truth)
    ledger(f"{name}: largest gradient at the truth", exact=0, estimate=gradient.abs().max())
    model = BoltzmannMachine(5, dtype=F64, generator=rng(4))
    assert flat_grad(population_loss(rows, model, truth), model).abs().max() > 0.01
    minimise(lambda: population_loss(rows, model, truth), model.parameters())
    torch.testing.assert_close(model.couplings, truth.couplings, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.b, truth.b, rtol=0, atol=1e-9)


def test_scores_that_are_not_proper_miss_the_truth(rng):
    """Negative controls: ratio matching without its square, and log-odds without the sigmoid."""
    truth = true_machine(rng)
    states = binary_states(5, dtype=F64)
    weights = truth.log_prob(states).detach().softmax(0)
    for score in (lambda u: torch.sigmoid(-u), lambda u: -u):
        log_odds = _log_odds(truth, states, None, None)
        assert flat_grad(score(log_odds).sum(0) @ weights, truth).abs().max() > 0.01


# ---------------------------------------------------------------- shapes and bad input


class Machines:
    """Several Boltzmann machines as one model with a leading dimension."""

    def __init__(self, machines):
        self.b = torch.stack([one.b.detach() for one in machines])[:, None].requires_grad_()
        self.J = torch.stack([one.couplings.detach() for one in machines]).requires_grad_()

    def log_prob(self, v):
        v = v.to(self.b.dtype)
        return (v * (self.b + v @ self.J / 2)).sum(-1)


@pytest.mark.parametrize(
    "objective",
    [pseudolikelihood, ratio_matching, lambda m, v: generalized_pseudolikelihood(m, v, PAIRS)],
)
def test_a_leading_dimension_gives_each_machine_its_own_gradient(objective, rng):
    machines = [BoltzmannMachine(3, dtype=F64, generator=rng(seed)) for seed in range(3)]
    data = torch.stack([DATA, 1 - DATA, DATA.flip(0)])
    together = Machines(machines)
    shared = objective(together, DATA), objective(together, DATA.expand(3, 4, 3))
    torch.testing.assert_close(*shared)  # three machines and as many units: none is mixed up
    objective(together, data).backward()
    for i in range(3):
        alone = Machines(machines[i : i + 1])
        objective(alone, data[i]).backward()
        torch.testing.assert_close(together.b.grad[i], alone.b.grad[0])
        torch.testing.assert_close(together.J.grad[i], alone.J.grad[0])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_objectives_follow_device_and_dtype_and_take_integer_data(dtype, rng, device):
    rbm = machine(rng, dtype=dtype, device=device)
    for data in (DATA.to(device), DATA.to(device).bool(), DATA.to(device, dtype)):
        with torch.device("meta"):
            losses = [
                pseudolikelihood(rbm, data, num_units=2, generator=rng(2, device)),
                ratio_matching(rbm, data, num_units=2, generator=rng(2, device)),
                generalized_pseudolikelihood(rbm, data, [block.to(device) for block in PAIRS]),
            ]
        for loss in losses:
            assert loss.shape == () and loss.dtype == dtype and loss.device.type == device.type
            loss.backward()


class Spins:
    """A user's model of spins -1 and +1, which does not look at what it is given."""

    def log_prob(self, v):
        return (v * v.roll(1, -1)).sum(-1).double()


@pytest.mark.parametrize(
    "objective",
    [pseudolikelihood, ratio_matching, lambda m, v: generalized_pseudolikelihood(m, v, PAIRS)],
)
def test_data_that_are_not_binary_are_refused_whatever_the_model_takes(objective, rng):
    """Its log-densities are finite, but a flip would lead to states that the data never have."""
    spins = 2 * DATA - 1
    ratings = RatingRBM(3, 2, 2, generator=rng(0), dtype=F64)
    gaussian = GaussianRBM(3, 2, generator=rng(0), dtype=F64)
    normal = torch.randn(4, 3, dtype=F64, generator=rng(1))
    for model, v, first in (
        (Spins(), spins, r"\(0, 2\) it holds -1"),
        (Spins(), spins.expand(5, 4, 3), r"\(0, 0, 2\) it holds -1"),
        (ratings, DATA.where(DATA.cumsum(0) < 2, -1), r"\(1, 0\) it holds -1"),
        (gaussian, normal, r"\(0, 0\) it holds "),
    ):
        assert model.log_prob(v).isfinite().all()
        with pytest.raises(ValueError, match=f"zeros and ones only.*at index {first}"):
            objective(model, v)
    assert objective(Spins(), DATA).isfinite() and objective(gaussian, DATA.double()).isfinite()


def test_bad_input_is_refused_with_a_sentence(rng):
    rbm = machine(rng)
    one = [torch.tensor([0])]
    for objective in (
        pseudolikelihood,
        ratio_matching,
        lambda m, v: generalized_pseudolikelihood(m, v, one),
    ):
        with pytest.raises(ValueError, match=r"v must be a matrix \(n, D\)"):
            objective(rbm, DATA[0])
        with pytest.raises(ValueError, match="v "):
            objective(rbm, DATA.double() * math.nan)
        with pytest.raises(ValueError, match="zeros and ones"):
            objective(rbm, DATA.double() * 0.5)
    for bad, message in {
        "is empty": [],
        "vector of unit numbers": [torch.tensor([])],
        "each once, got": [torch.tensor([0, 0])],
        "units 0 to 2": [torch.tensor([3])],
        "listed twice": [(torch.tensor([0]), torch.tensor([[1], [1], [0]]))],
        r"states must be \(m, 1\)": [(torch.tensor([0]), torch.eye(2))],
    }.items():
        with pytest.raises(ValueError, match=bad):
            generalized_pseudolikelihood(rbm, DATA, message)
    with pytest.raises(ValueError, match="12 at most, got 13"):
        generalized_pseudolikelihood(rbm, torch.zeros(2, 13), [torch.arange(13)])
    with pytest.raises(ValueError, match="num_units is 4 but v has only 3"):
        ratio_matching(rbm, DATA, num_units=4)
