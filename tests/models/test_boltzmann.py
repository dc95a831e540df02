"""The fully visible Boltzmann machine against its definition, by brute force on small machines."""

import math

import pytest
import torch
from scipy.stats import chisquare

from companion.models.boltzmann import BoltzmannMachine
from companion.testing import (
    binary_states,
    detailed_balance_error,
    stationary_error,
)

F64 = torch.float64


def machine(num_units, rng, *, scale=1.0, seed=0, dtype=F64, device="cpu"):
    """An asymmetric machine: what is stored in J is neither symmetric nor zero on its diagonal."""
    g = rng(seed)
    model = BoltzmannMachine(num_units, dtype=F64, generator=g)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=F64, generator=g) + 0.2)
    return model.to(dtype=dtype, device=device)


def log_probs(model):
    """log p~ of all states by the definition: a bias a unit and a coupling a pair, (2^D,)."""
    states, total = binary_states(model.num_units, dtype=F64), 0.0
    with torch.no_grad():
        for i in range(model.num_units):
            total = total + model.b[i] * states[:, i]
            for j in range(i):
                total = total + (model.J[i, j] + model.J[j, i]) / 2 * states[:, i] * states[:, j]
    return states, total


def test_log_prob_and_energy_agree_with_the_sum_over_pairs(rng):
    model = machine(5, rng)
    states, by_hand = log_probs(model)
    torch.testing.assert_close(model.log_prob(states), by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.energy(states), -by_hand, rtol=0, atol=1e-12)


def test_couplings_are_symmetric_without_a_diagonal_and_are_used_whatever_is_stored(rng):
    model = machine(4, rng)
    couplings = model.couplings.detach()
    assert torch.equal(couplings, couplings.T) and not couplings.diagonal().any()
    states = binary_states(4, dtype=F64)
    before = model.log_prob(states).detach()
    with torch.no_grad():
        model.J.copy_(couplings + torch.randn(4, 4, dtype=F64, generator=rng(1)).triu().tril())
        model.J[0, 1] += 0.7
        model.J[1, 0] -= 0.7
    torch.testing.assert_close(model.log_prob(states), before, rtol=0, atol=1e-12)


def test_gradients_are_half_the_product_of_both_units_and_keep_the_symmetry(rng):
    model = machine(4, rng)
    v = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=F64)
    by_j, by_b = torch.autograd.grad(model.log_prob(v), [model.J, model.b])
    torch.testing.assert_close(by_j, (v.outer(v) - v.diag()) / 2)
    torch.testing.assert_close(by_b, v)


@pytest.mark.parametrize("num_units", [1, 2, 6, 15])
def test_log_z_agrees_with_summing_all_states(num_units, rng, ledger):
    model = machine(num_units, rng)
    exact = log_probs(model)[1].logsumexp(0)
    log_z = model.log_z()
    ledger(f"Boltzmann machine log Z, {num_units} units", exact=exact, estimate=log_z.value)
    assert log_z.std_error == 0
    single = machine(num_units, rng, dtype=torch.float32).log_z().value
    assert single.dtype == F64
    torch.testing.assert_close(single, exact, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_the_likelihood_is_half_the_difference_of_second_moments(rng):
    model = machine(4, rng)
    states, by_hand = log_probs(model)
    data = states[[3, 9, 9, 15]]
    log_p = model.log_prob(states)
    loss = log_p.logsumexp(0) - model.log_prob(data).mean()
    by_j, by_b = torch.autograd.grad(loss, [model.J, model.b])
    pi = by_hand.softmax(0)
    moments = torch.einsum("s,si,sj->ij", pi, states, states) - data.T @ data / 4
    torch.testing.assert_close(by_j, (moments - moments.diagonal().diag()) / 2)
    torch.testing.assert_close(by_b, moments.diagonal())


def test_conditionals_are_those_of_the_joint(rng):
    model = machine(4, rng)
    states, by_hand = log_probs(model)
    found = model.conditional_probs(states)
    index = torch.arange(16)
    for i in range(4):
        bit = 1 << (3 - i)
        odds = by_hand[index | bit] - by_hand[index & ~bit]
        torch.testing.assert_close(found[:, i], odds.sigmoid(), rtol=0, atol=1e-12)


def sweep_matrix(model, order):
    """The exact matrix of a sweep: the product of the units' own matrices, in order."""
    num_units = model.num_units
    states, matrix = binary_states(num_units, dtype=F64), torch.eye(2**num_units, dtype=F64)
    index = torch.arange(len(states))
    with torch.no_grad():
        p = model.conditional_probs(states)
    for i in order:
        bit = 1 << (num_units - 1 - i)
        one = torch.zeros_like(matrix)
        one[index, index | bit] += p[:, i]
        one[index, index & ~bit] += 1 - p[:, i]
        matrix = matrix @ one
    return matrix


def test_a_gibbs_sweep_visits_the_units_in_order_and_leaves_the_model_invariant(rng, ledger):
    model = machine(3, rng)
    states, by_hand = log_probs(model)
    pi, exact = by_hand.softmax(0), sweep_matrix(model, range(3))
    ledger("Boltzmann machine, Gibbs sweep", exact=0, estimate=stationary_error(exact, pi))
    assert detailed_balance_error(exact, pi) > 1e-3
    n = 20_000  # from each state
    ends = model.gibbs(states.repeat_interleave(n, 0), generator=rng(3))
    counts = (ends @ ends.new_tensor([4, 2, 1])).long().view(8, n)
    counts = torch.stack([row.bincount(minlength=8) for row in counts])

    def p_value(matrix):  # 8 tests: Bonferroni
        return 8 * min(
            chisquare(row.numpy(), (n * p).numpy(), sum_check=False).pvalue
            for row, p in zip(counts, matrix, strict=True)
        )

    assert p_value(exact) > 1e-5
    assert p_value(sweep_matrix(model, reversed(range(3)))) < 1e-5  # the other way round


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gibbs_and_exact_draws_follow_the_model(dtype, rng, device):
    model = machine(4, rng, dtype=dtype, device=device)
    pi = log_probs(machine(4, rng))[1].softmax(0)
    n = 100_000

    def p_value(v):
        counts = torch.bincount((v @ v.new_tensor([8, 4, 2, 1])).long(), minlength=16)
        return chisquare(counts.cpu().numpy(), (n * pi).numpy(), sum_check=False).pvalue

    exact = model.sample_exact(n, generator=rng(1, device))
    assert exact.shape == (n, 4) and exact.dtype == dtype
    assert p_value(exact) > 1e-5
    assert p_value(model.gibbs(exact, 2, generator=rng(2, device))) > 1e-5
    assert p_value(exact.flip(-1)) < 1e-5  # bits read from the wrong end
    with torch.no_grad():
        model.J.mul_(2)  # couplings counted twice
    assert p_value(model.gibbs(exact, 2, generator=rng(2, device))) < 1e-5


def test_sample_base_and_init_biases_are_those_of_independent_units(rng, device):
    model = machine(3, rng, device=device)
    v = model.sample_base(100_000, generator=rng(4, device))
    p = torch.sigmoid(model.b.detach())
    assert v.shape == (100_000, 3) and v.dtype == F64
    z = (v.mean(0) - p) / (p * (1 - p) / len(v)).sqrt()
    assert z.abs().max() < 4.9  # 4.5 standard errors for one unit, Bonferroni over three
    data = torch.tensor([[1, 1, 0], [1, 0, 0]], device=device)
    model.init_biases(data)
    torch.testing.assert_close(model.b.sigmoid(), model.b.new_tensor([3 / 4, 1 / 2, 1 / 4]))


@pytest.mark.parametrize("smoothing", [1e-3, 0.5, 7.0])
def test_smoothing_adds_so_many_ones_and_zeros(smoothing):
    model = BoltzmannMachine(3, dtype=F64)
    model.init_biases(torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0]]), smoothing=smoothing)
    on = torch.tensor([3.0, 1.0, 0.0], dtype=F64) + smoothing
    torch.testing.assert_close(model.b.detach(), (on / (3 + 2 * smoothing - on)).log())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2_100, 70_000])
def test_biases_of_a_sixteen_bit_machine_are_exact_but_for_rounding(dtype, n, device):
    """16 bits hold neither a count of so many rows nor a share so close to 1."""
    counts = torch.tensor([0, n, n // 3, 1], device=device)  # never, always, at times and once
    model = BoltzmannMachine(4, dtype=dtype, device=device)
    model.init_biases(torch.arange(n, device=device)[:, None] < counts)
    exact = torch.logit((counts.double() + 1) / (n + 2))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model.b.detach().double(), exact, rtol=eps, atol=0)


BAD_STATES = {
    "shape": (torch.zeros(2, 4), ValueError, r"shape \(\.\.\., 3\), got \(2, 4\)"),
    "scalar": (torch.tensor(1.0), ValueError, "shape"),
    "empty": (torch.zeros(0, 3), ValueError, "empty"),
    "dtype": (torch.zeros(2, 3, dtype=F64), TypeError, "float64 but the machine is torch.float32"),
    "complex": (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "real"),
    "NaN": (torch.tensor([[0.0, math.nan, 1.0]]), ValueError, r"first is at index \(0, 1\)"),
    "grey": (torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.5, 1.0]]), ValueError, r"\(1, 1\).* 0\.5"),
    "minus one": (torch.tensor([[-1, 1, 1]]), ValueError, r"\(0, 0\)"),
    "device": (torch.zeros(2, 3, device="meta"), ValueError, "on meta but the machine is on cpu"),
    "list": ([[0.0, 1.0, 1.0]], TypeError, "torch.Tensor, got list"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_states_are_refused_with_a_sentence(name):
    v, error, message = BAD_STATES[name]
    model = BoltzmannMachine(3, dtype=torch.float32)
    for method in (model.log_prob, model.conditional_probs, model.gibbs, model.init_biases):
        with pytest.raises(error, match=message):
            method(v)


def test_bad_sizes_counts_and_generators_are_refused():
    with pytest.raises(ValueError, match="num_units must be at least 1, got 0"):
        BoltzmannMachine(0)
    with pytest.raises(TypeError, match="floating"):
        BoltzmannMachine(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="at 25 bits, got 26"):
        BoltzmannMachine(26).log_z()
    with pytest.raises(ValueError, match="D = 20; this machine has 21"):
        BoltzmannMachine(21).sample_exact(1)
    model = BoltzmannMachine(3)
    for call in (model.sample_exact, model.sample_base):
        with pytest.raises(ValueError, match="n must be at least 1"):
            call(0)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        model.gibbs(torch.zeros(1, 3), 0)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator"):
        model.gibbs(torch.zeros(1, 3), generator=7)
    with pytest.raises(ValueError, match="smoothing"):
        model.init_biases(torch.zeros(1, 3), smoothing=-1.0)


def test_every_tensor_follows_its_inputs_device_and_states_keep_their_shape(rng):
    model, v = machine(3, rng), torch.tensor([[1, 0, 1], [0, 0, 1]])
    before = torch.get_rng_state()
    with torch.device("meta"):  # a tensor made without following its inputs would land here
        assert model.log_z().value.device.type == "cpu"
        assert model.gibbs(v, 2, generator=rng(0)).device.type == "cpu"
        assert model.sample_base(3, generator=rng(0)).device.type == "cpu"
        assert model.sample_exact(3, generator=rng(0)).device.type == "cpu"
        assert model.log_prob(v).device.type == "cpu"
    assert torch.equal(before, torch.get_rng_state())
    deep = v.expand(5, 4, 2, 3)
    assert model.log_prob(deep).shape == (5, 4, 2)
    assert model.gibbs(deep, generator=rng(0)).shape == deep.shape
    assert torch.equal(v, torch.tensor([[1, 0, 1], [0, 0, 1]]))
    assert "num_units=3" in repr(model)
