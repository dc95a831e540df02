"""Objectives against the exact gradient of small machines, by enumeration."""

import math
from itertools import pairwise

import pytest
import torch

from companion.objectives import PersistentChains, contrastive_divergence, pseudolikelihood
from companion.testing import binary_states
from tests.objectives.exact_gradients import (
    DATA,
    F64,
    exact_gradient,
    flat_grad,
    index,
    largest_z,
    machine,
    state_grads,
)

LIMIT = 5.1  # 11 components: Bonferroni keeps the false-alarm rate below 1e-5


def test_the_oracle_agrees_with_finite_differences_of_the_exact_likelihood(rng):
    rbm = machine(rng)
    exact, step, found = exact_gradient(rbm, DATA), 1e-6, []
    with torch.no_grad():
        for parameter in rbm.parameters():
            for i in range(parameter.numel()):
                values = []
                for sign in (1, -1):
                    parameter.view(-1)[i] += sign * step
                    values.append(rbm.log_z().value - rbm.log_prob(DATA).mean())
                    parameter.view(-1)[i] -= sign * step
                found.append((values[0] - values[1]) / (2 * step))
    torch.testing.assert_close(torch.stack(found), exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_persistent_chains_in_equilibrium_give_the_exact_gradient(num_steps, rng, ledger):
    rbm = machine(rng)
    states = binary_states(3, dtype=F64)
    pi = rbm.log_prob(states).detach().softmax(0)
    n = 200_000
    chains = PersistentChains(rbm, n, generator=rng(1))
    chains.x = states[torch.multinomial(pi, n, replacement=True, generator=rng(2))]
    gradient = flat_grad(chains.loss(DATA, num_steps), rbm)
    # the loss is a mean over chains: its gradient is the mean of the chains' own
    grads = state_grads(rbm)
    per_chain = grads[index(chains.x)] - grads[index(DATA)].mean(0)
    torch.testing.assert_close(per_chain.mean(0), gradient, rtol=0, atol=1e-10)  # round-off of n
    exact = exact_gradient(rbm, DATA)
    assert largest_z(per_chain, exact) < LIMIT
    ledger(
        f"persistent chains in equilibrium: gradient of W[0, 0], {num_steps} steps",
        exact=exact[0],
        estimate=gradient[0],
        std_error=per_chain[:, 0].std() / math.sqrt(n),
    )
    # negative controls: no negative phase; phases exchanged
    assert largest_z(per_chain - grads[index(chains.x)], exact) > 100
    assert largest_z(-per_chain, exact) > 100


def expected_cd_gradient(rbm, data, num_steps):
    """E[CD-k gradient], by the exact matrix of a Gibbs sweep."""
    vs, hs = binary_states(3, dtype=F64), binary_states(2, dtype=F64)
    with torch.no_grad():
        to_h, to_v = rbm.hidden_probs(vs), rbm.visible_probs(hs)
    p_h = torch.where(hs[None].bool(), to_h[:, None], 1 - to_h[:, None]).prod(-1)
    p_v = torch.where(vs[None].bool(), to_v[:, None], 1 - to_v[:, None]).prod(-1)
    start = torch.bincount(index(data), minlength=8).double() / len(data)
    end = start @ torch.linalg.matrix_power(p_h @ p_v, num_steps)
    return (end - start) @ state_grads(rbm)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_contrastive_divergence_has_its_own_expectation_and_not_the_exact_gradient(
    num_steps, rng, ledger
):
    rbm = machine(rng)
    n = 100_000
    v = DATA.repeat(n // 4, 1)
    gradient = flat_grad(contrastive_divergence(rbm, v, num_steps, generator=rng(3)), rbm)
    negative = rbm.gibbs(v, num_steps, generator=rng(3))
    grads = state_grads(rbm)
    per_row = grads[index(negative)] - grads[index(v)]
    torch.testing.assert_close(per_row.mean(0), gradient, rtol=0, atol=1e-10)
    expected = expected_cd_gradient(rbm, DATA, num_steps)
    # four groups of rows, each with its own start: the variance is that within the groups
    groups = grads[index(negative)].view(-1, 4, 11)
    error = (groups.var(0).mean(0) / n).sqrt()
    assert ((gradient - expected) / error).abs().max() < LIMIT
    ledger(
        f"CD-{num_steps}: gradient of W[0, 0]",
        exact=expected[0],
        estimate=gradient[0],
        std_error=error[0],
    )
    assert ((gradient - exact_gradient(rbm, DATA)) / error).abs().max() > LIMIT  # CD is biased


def test_the_bias_of_contrastive_divergence_falls_with_the_number_of_steps(rng):
    rbm = machine(rng)
    exact = exact_gradient(rbm, DATA)
    bias = [(expected_cd_gradient(rbm, DATA, k) - exact).norm().item() for k in (1, 2, 4, 8, 200)]
    assert all(later < sooner for sooner, later in pairwise(bias))
    assert bias[0] > 0.01 and bias[-1] < 1e-8


def test_no_derivative_passes_through_the_sampling(rng):
    """The gradient is that of the two phases with the particles held fixed."""
    rbm = machine(rng)
    v = DATA.double()
    gradient = flat_grad(contrastive_divergence(rbm, v, generator=rng(4)), rbm)
    particles = rbm.gibbs(v, generator=rng(4))
    grads = state_grads(rbm)
    by_hand = grads[index(particles)].mean(0) - grads[index(v)].mean(0)
    torch.testing.assert_close(gradient, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_objectives_follow_device_and_dtype_and_take_integer_data(dtype, rng, device):
    rbm = machine(rng, dtype=dtype, device=device)
    data = DATA.to(device)
    chains = PersistentChains(rbm, 5, generator=rng(0, device))
    losses = [
        contrastive_divergence(rbm, data.bool(), generator=rng(1, device)),
        chains.loss(data),
        pseudolikelihood(rbm, data, num_units=2, generator=rng(2, device)),
    ]
    for loss in losses:
        assert loss.shape == () and loss.dtype == dtype and loss.device.type == device.type
        loss.backward()


def test_no_tensor_strays_from_its_inputs_device(rng):
    rbm = machine(rng)
    with torch.device("meta"):
        chains = PersistentChains(rbm, 5, generator=rng(0))
        for loss in (
            contrastive_divergence(rbm, DATA, generator=rng(1)),
            chains.loss(DATA),
            pseudolikelihood(rbm, DATA),
        ):
            assert loss.device.type == "cpu"


def test_persistent_chains_go_on_where_a_saved_state_left_off(rng):
    rbm = machine(rng)
    first = PersistentChains(rbm, 6, generator=rng(1))
    first.loss(DATA)
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    first.loss(DATA)
    second = PersistentChains(rbm, 6, generator=rng(99))
    second.load_state_dict(saved)
    second.loss(DATA)
    assert torch.equal(first.x, second.x)
    with pytest.raises(ValueError, match=r"saved chains are \(6, 3\).*these are \(5, 3\)"):
        PersistentChains(rbm, 5).load_state_dict(saved)


def test_a_vector_is_refused_before_any_chain_moves(rng):
    """It would pass for a mean over no rows."""
    rbm, g = machine(rng), rng(0)
    chains = PersistentChains(rbm, 5, generator=g)
    before = [x.clone() for x in (chains.x, chains.hidden_probs, g.get_state(), *rbm.parameters())]
    for learn in (
        lambda v: rbm.contrastive_step(v, generator=g),
        lambda v: contrastive_divergence(rbm, v, generator=g),
        lambda v: rbm.contrastive_update(v, 0.1, generator=g),
        chains.loss,
        lambda v: chains.update(v, 0.1),
    ):
        with pytest.raises(ValueError, match=r"v must be a matrix \(n, 3\), got \(3,\)"):
            learn(DATA[0])
        after = chains.x, chains.hidden_probs, g.get_state(), *rbm.parameters()
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_bad_input_is_refused_before_any_chain_moves(rng):
    rbm = machine(rng)
    chains = PersistentChains(rbm, 5, generator=rng(0))
    before = chains.x
    for bad in (DATA[:, :2], DATA.double() * 0.5, DATA[:0], DATA.double() * math.nan):
        for loss in (lambda v: contrastive_divergence(rbm, v), chains.loss):
            with pytest.raises(ValueError, match="v "):
                loss(bad)
        with pytest.raises(ValueError, match="v "):
            pseudolikelihood(rbm, bad)
    assert torch.equal(chains.x, before)
    with pytest.raises(ValueError, match="num_chains must be at least 1, got 0"):
        PersistentChains(rbm, 0)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        contrastive_divergence(rbm, DATA, 0)
    with pytest.raises(ValueError, match="num_units is 4 but v has only 3"):
        pseudolikelihood(rbm, DATA, num_units=4)
    with pytest.raises(ValueError, match="matrix"):
        pseudolikelihood(rbm, DATA[0])
    with pytest.raises(TypeError, match="generator must be"):
        contrastive_divergence(rbm, DATA, generator=3)
