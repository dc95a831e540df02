"""The machine of data and labels against its definition: sums over all (x, y, h)."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from companion.core import Kernel
from companion.models.rbm import RBM, LabelRBM
from companion.objectives import (
    PersistentChains,
    contrastive_divergence,
    generalized_pseudolikelihood,
    maximum_likelihood,
    pseudolikelihood,
)
from companion.testing import (
    assert_invariant,
    binary_states,
    detailed_balance_error,
    discrete_invariance_test,
    stationary_error,
    transition_matrix,
)

F64 = torch.float64
PARAMETERS = ["W", "U", "b", "c", "d"]


def machine(num_visible, num_labels, num_hidden, rng, *, scale=1.0, dtype=F64, device="cpu"):
    """An asymmetric machine: weights and biases far from zero and of either sign."""
    g = rng(0)
    rbm = LabelRBM(num_visible, num_labels, num_hidden, dtype=F64, generator=g)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=F64, generator=g) + 0.2)
    return rbm.to(dtype=dtype, device=device)


def all_states(rbm):
    """Every x with every label: `x` (2^D K, D), `labels` (2^D K,), in this order."""
    xs = binary_states(rbm.num_visible, dtype=rbm.W.dtype, device=rbm.W.device)
    labels = torch.arange(rbm.num_labels, device=xs.device).repeat(len(xs))
    return xs.repeat_interleave(rbm.num_labels, 0), labels


def joint_energies(rbm):
    """E(x, y, h) by the definition, one product at a time, (2^D K, 2^H)."""
    (xs, labels), hs = all_states(rbm), binary_states(rbm.num_hidden, dtype=F64)
    table = -rbm.d[labels][:, None].repeat(1, len(hs))
    for j in range(rbm.num_hidden):
        table = table - (rbm.c[j] + rbm.U[labels, j])[:, None] * hs[:, j]
        for i in range(rbm.num_visible):
            table = table - rbm.W[i, j] * xs[:, i, None] * hs[:, j]
    for i in range(rbm.num_visible):
        table = table - rbm.b[i] * xs[:, i, None]
    return hs, table


# ---------------------------------------------------------------- densities


def test_join_and_split_are_inverse(rng):
    rbm = machine(3, 4, 2, rng)
    x, labels = all_states(rbm)
    v = rbm.join(x.bool().reshape(4, 8, 3), labels.int().reshape(4, 8))
    assert v.shape == (4, 8, 7) and v.dtype == F64
    back, names = rbm.split(v)
    assert torch.equal(back.reshape(-1, 3), x) and torch.equal(names.flatten(), labels)
    assert torch.equal(v[..., 3:].sum(-1), torch.ones(4, 8, dtype=F64))


def test_energy_and_free_energy_agree_with_their_definition(rng, ledger):
    rbm = machine(3, 4, 2, rng)
    v, (hs, table) = rbm.join(*all_states(rbm)), joint_energies(rbm)
    found = rbm.energy(v[:, None].expand(-1, 4, -1), hs)
    torch.testing.assert_close(found, table, rtol=0, atol=1e-12)
    by_hand = -(-table).logsumexp(1)
    torch.testing.assert_close(rbm.free_energy(v), by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(rbm.log_prob(v), -by_hand, rtol=0, atol=1e-12)
    ledger("label RBM free energy", exact=by_hand[3].item(), estimate=rbm.free_energy(v[3]).item())


@pytest.mark.parametrize("sizes", [(3, 4, 2), (1, 2, 1), (2, 3, 6)])
def test_log_z_agrees_with_summing_all_states(sizes, rng, ledger):
    rbm = machine(*sizes, rng)
    exact = (-joint_energies(rbm)[1]).logsumexp((0, 1)).detach()
    ledger(f"label RBM log Z, {sizes}", exact=exact, estimate=rbm.log_z().value)
    single = machine(*sizes, rng, dtype=torch.float32).log_z().value
    assert single.dtype == F64
    torch.testing.assert_close(single, exact, rtol=1e-5, atol=1e-5)


def test_log_z_in_blocks_agrees_with_the_sum_over_the_visible_states(rng, ledger):
    rbm = machine(6, 3, 14, rng, scale=0.5)
    exact = rbm.log_prob(rbm.join(*all_states(rbm))).logsumexp(0).item()
    ledger("label RBM log Z in blocks", exact=exact, estimate=rbm.log_z().value)
    with pytest.raises(ValueError, match="this machine has 26 there"):
        LabelRBM(2, 2, 26).log_z()


def test_class_probabilities_are_the_normalised_joint(rng, ledger):
    rbm = machine(3, 4, 2, rng)
    xs = binary_states(3)
    joint = (-joint_energies(rbm)[1]).logsumexp(1).reshape(8, 4)
    exact = joint.log_softmax(1)
    found = rbm.class_log_probs(xs.to(F64))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    ledger("label RBM: log p(y = 2 | x)", exact=exact[5, 2].item(), estimate=found[5, 2].item())
    # the label that mean hidden activities vote for is another rule, and not Bayes'
    h = torch.sigmoid(rbm.c + xs.to(F64) @ rbm.W)
    assert ((rbm.d + h @ rbm.U.T).log_softmax(1) - exact).abs().max() > 0.1


def test_it_is_a_binary_machine_confined_to_states_with_one_label(rng):
    rbm = machine(3, 4, 2, rng)
    plain = RBM(7, 2, dtype=F64)
    with torch.no_grad():
        plain.W.copy_(torch.cat([rbm.W, rbm.U]))
        plain.b.copy_(torch.cat([rbm.b, rbm.d]))
        plain.c.copy_(rbm.c)
    v = rbm.join(*all_states(rbm))
    torch.testing.assert_close(rbm.log_prob(v), plain.log_prob(v), rtol=0, atol=1e-12)
    torch.testing.assert_close(rbm.hidden_probs(v), plain.hidden_probs(v), rtol=0, atol=1e-12)
    assert plain.log_z().value > rbm.log_z().value + 0.1  # it has more states


# ---------------------------------------------------------------- gradients


def flat_grad(loss, rbm):
    grads = torch.autograd.grad(
        loss, [getattr(rbm, name) for name in PARAMETERS],
        retain_graph=True, materialize_grads=True,
    )  # fmt: skip
    return torch.cat([g.flatten() for g in grads])


def data(rbm):
    x = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]])
    return x, torch.tensor([3, 0, 1, 0])


def test_persistent_chains_in_equilibrium_give_the_exact_gradient(rng, ledger):
    rbm, n = machine(3, 4, 2, rng), 100_000
    v, states = rbm.join(*data(rbm)), rbm.join(*all_states(rbm))
    log_z = (-joint_energies(rbm)[1]).logsumexp((0, 1))  # differentiable
    exact = flat_grad(log_z - rbm.log_prob(v).mean(), rbm)
    pi = rbm.log_prob(states).detach().softmax(0)
    chains = PersistentChains(rbm, n, generator=rng(1))
    assert chains.x.shape == (n, 7)
    chains.x = states[torch.multinomial(pi, n, replacement=True, generator=rng(2))]
    found = flat_grad(chains.loss(v, 2), rbm)
    grads = torch.stack([flat_grad(rbm.log_prob(s), rbm) for s in states])
    exact_variance = pi @ (grads - pi @ grads).square()
    error = (exact_variance / n).sqrt()
    assert ((found - exact) / error).abs().max() < 5.2  # 23 components: below 1e-5 in all
    ledger("label RBM, persistent chains: gradient of U[0, 0]",
           exact=exact[6], estimate=found[6], std_error=error[6])  # fmt: skip
    no_negative_phase = flat_grad(-rbm.log_prob(v).mean(), rbm)
    assert ((no_negative_phase - exact) / error).abs().max() > 50


def test_the_cross_entropy_has_the_exact_discriminative_gradient(rng):
    """d log p(y | x) = d log p~(x, y) - E_{y | x}[d log p~(x, y)]."""
    rbm = machine(3, 4, 2, rng)
    x, labels = data(rbm)
    loss = torch.nn.functional.nll_loss(rbm.class_log_probs(x), labels)
    table = rbm.log_prob(rbm.join(x[:, None].expand(-1, 4, -1), torch.arange(4).expand(4, 4)))
    posterior = table.detach().softmax(1)
    clamped = table[torch.arange(4), labels]
    exact = flat_grad(((posterior * table).sum(1) - clamped).mean(), rbm)
    torch.testing.assert_close(flat_grad(loss, rbm), exact, rtol=0, atol=1e-12)
    generative = flat_grad(-clamped.mean(), rbm)
    assert (generative - exact).abs().max() > 0.1


def test_exact_maximum_likelihood_has_the_enumerated_gradient(rng):
    rbm = machine(3, 4, 2, rng)
    v = rbm.join(*data(rbm))
    exact = (-joint_energies(rbm)[1]).logsumexp((0, 1)) - rbm.log_prob(v).mean()
    found = maximum_likelihood(rbm, v)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(flat_grad(found, rbm), flat_grad(exact, rbm), rtol=0, atol=1e-12)


def test_the_label_as_a_block_of_the_pseudolikelihood_is_the_cross_entropy(rng):
    rbm = machine(3, 4, 2, rng)
    x, labels = data(rbm)
    block = (torch.arange(3, 7), torch.eye(4))
    found = generalized_pseudolikelihood(rbm, rbm.join(x, labels), [block])
    exact = torch.nn.functional.nll_loss(rbm.class_log_probs(x), labels)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_contrastive_divergence_takes_it_as_it_is(rng):
    rbm = machine(3, 4, 2, rng)
    v = rbm.join(*data(rbm))
    loss = contrastive_divergence(rbm, v, 2, generator=rng(1))
    particles = rbm.gibbs(v, 2, generator=rng(1))
    exact = flat_grad(rbm.log_prob(particles).mean() - rbm.log_prob(v).mean(), rbm)
    torch.testing.assert_close(flat_grad(loss, rbm), exact, rtol=0, atol=1e-14)


def test_flipping_single_units_of_the_label_is_refused(rng):
    rbm = machine(3, 4, 2, rng)
    with pytest.raises(ValueError, match=r"exactly one of them is on.*flips single units"):
        pseudolikelihood(rbm, rbm.join(*data(rbm)))


# ---------------------------------------------------------------- conditionals and sampling


def test_conditionals_are_those_of_the_joint(rng):
    rbm = machine(3, 4, 2, rng)
    v, (hs, table) = rbm.join(*all_states(rbm)), joint_energies(rbm)
    torch.testing.assert_close(rbm.hidden_probs(v), (-table).softmax(1) @ hs, rtol=0, atol=1e-12)
    p_v = (-table).softmax(0).T @ v
    torch.testing.assert_close(rbm.visible_probs(hs), p_v, rtol=0, atol=1e-12)


def kernel(gibbs):
    def step(state, *, generator):
        return SimpleNamespace(x=gibbs(state.x, generator=generator)), None

    return Kernel(lambda x: SimpleNamespace(x=x), step)


class SigmoidLabels(LabelRBM):
    """A plausible error: independent sigmoids for the labels, made to sum to 1 afterwards."""

    def _draw_visible(self, h, generator):
        x, _ = super()._draw_visible(h, generator)
        weights = torch.sigmoid(self.d + h @ self.U.T)
        return x, torch.multinomial(weights, 1, generator=generator)[:, 0]


def wrong_machine(rbm):
    wrong = SigmoidLabels(rbm.num_visible, rbm.num_labels, rbm.num_hidden)
    wrong.to(dtype=rbm.W.dtype, device=rbm.W.device).load_state_dict(rbm.state_dict())
    return wrong


def test_a_gibbs_sweep_is_reversible_and_leaves_the_model_invariant(rng, ledger):
    rbm = machine(2, 3, 2, rng)
    states = rbm.join(*all_states(rbm))
    pi = rbm.log_prob(states).detach().softmax(0)
    matrix = transition_matrix(kernel(rbm.gibbs), states)
    assert detailed_balance_error(matrix, pi) < 1e-12
    error = stationary_error(matrix, pi)
    ledger("label RBM Gibbs sweep: error of the stationary law", exact=0, estimate=error)
    wrong = transition_matrix(kernel(wrong_machine(rbm).gibbs), states)
    assert stationary_error(wrong, pi) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gibbs_started_from_the_model_stays_there(dtype, rng, device):
    rbm = machine(2, 3, 2, rng, dtype=dtype, device=device)
    states = rbm.join(*all_states(rbm))

    def test(model, seed):
        return discrete_invariance_test(
            kernel(lambda v, *, generator: model.gibbs(v, 2, generator=generator)),
            rbm.log_prob, states, num_chains=100_000, num_steps=1, generator=rng(seed, device),
        )  # fmt: skip

    assert_invariant(test(rbm, 3))
    assert test(wrong_machine(rbm), 4).p_value < 1e-5


def test_samples_for_a_label_follow_the_conditional_law(rng, device, ledger):
    rbm, n = machine(3, 3, 2, rng, scale=0.7, device=device), 20_000
    labels = torch.tensor([2, 0], device=device).expand(n, 2)
    x = rbm.sample_given_label(labels, 50, generator=rng(5, device))
    assert x.shape == (n, 2, 3) and x.dtype == F64
    xs = binary_states(3, dtype=F64, device=device)
    grid = rbm.join(xs[:, None].expand(8, 3, 3), torch.arange(3, device=device).expand(8, 3))
    exact = rbm.log_prob(grid).detach().softmax(0).cpu()  # p(x | y), (8, 3)
    counts = torch.stack([(x[:, i] @ x.new_tensor([4, 2, 1])).long().bincount(minlength=8)
                          for i in (0, 1)]).cpu()  # fmt: skip

    def p_value(i, label):
        return chisquare(counts[i].numpy(), (exact[:, label] * n).numpy()).pvalue

    assert p_value(0, 2) > 1e-5 and p_value(1, 0) > 1e-5
    assert p_value(0, 0) < 1e-5 and p_value(1, 2) < 1e-5  # the label of the other
    p = exact[5, 2]
    ledger("label RBM: p(x = 101 | y = 2)", exact=p, estimate=counts[0, 5].double() / n,
           std_error=(p * (1 - p) / n).sqrt())  # fmt: skip


def test_samples_for_a_label_start_from_the_biases_of_x(rng, device):
    """After one sweep of strong weights, against the exact law: the start is not forgotten yet."""
    rbm, n = machine(3, 3, 2, rng, scale=2.0, device=device), 50_000
    xs, hs = (binary_states(k, dtype=F64, device=device) for k in (3, 2))
    with torch.no_grad():
        to_h = torch.sigmoid(rbm.c + rbm.U[1] + xs @ rbm.W)
        to_x = torch.sigmoid(rbm.b + hs @ rbm.W.T)
        biases = torch.sigmoid(rbm.b)
    p_h = torch.where(hs[None].bool(), to_h[:, None], 1 - to_h[:, None]).prod(-1)
    p_x = torch.where(xs[None].bool(), to_x[:, None], 1 - to_x[:, None]).prod(-1)
    x = rbm.sample_given_label(xs.new_full((n,), 1).long(), 1, generator=rng(6, device))
    counts = (x @ x.new_tensor([4, 2, 1])).long().bincount(minlength=8).cpu()

    def p_value(probs):
        start = torch.where(xs.bool(), probs, 1 - probs).prod(-1)
        return chisquare(counts.numpy(), (n * start @ p_h @ p_x).cpu().numpy()).pvalue

    assert p_value(biases) > 1e-5  # the false-alarm rate
    for wrong in (biases.new_full((3,), 0.5), torch.zeros_like(biases), 1 - biases):
        assert p_value(wrong) < 1e-5


def test_sampled_layers_have_the_conditional_means(rng, device):
    rbm, n = machine(3, 4, 2, rng, device=device), 200_000
    h = torch.tensor([1, 0], device=device)
    v, p = rbm.sample_visible(h.expand(n, 2), generator=rng(1, device)), rbm.visible_probs(h)
    assert ((v.mean(0) - p) / (p * (1 - p) / n).sqrt()).abs().max() < 4.9  # seven components
    state = rbm.join(torch.tensor([1, 0, 1], device=device), torch.tensor(2, device=device))
    h, p = rbm.sample_hidden(state.expand(n, 7), generator=rng(2, device)), rbm.hidden_probs(state)
    assert ((h.mean(0) - p) / (p * (1 - p) / n).sqrt()).abs().max() < 4.9
    v = rbm.sample_base(n, generator=rng(3, device))
    p = torch.cat([torch.sigmoid(rbm.b), rbm.d.softmax(0)])
    assert ((v.mean(0) - p) / (p * (1 - p) / n).sqrt()).abs().max() < 4.9


def test_init_from_data_makes_the_model_of_independent_units(rng):
    rbm = LabelRBM(3, 5, 2, dtype=F64)
    v = rbm.join(*data(rbm))
    rbm.init_from_data(v)
    base = torch.cat([torch.sigmoid(rbm.b), rbm.d.softmax(0)])
    expected = torch.tensor([4 / 6, 3 / 6, 4 / 6, 3 / 9, 2 / 9, 1 / 9, 2 / 9, 1 / 9], dtype=F64)
    torch.testing.assert_close(base.detach(), expected)
    rbm.init_from_data(v, smoothing=1e-9)
    torch.testing.assert_close(rbm.d.softmax(0)[0].item(), 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2_100, 70_000])
def test_biases_of_a_sixteen_bit_machine_are_exact_but_for_rounding(dtype, n, device):
    """16 bits hold neither a count of so many rows nor a share so close to 1."""
    counts = torch.tensor([0, n, n // 3, 1], device=device)  # never, always, at times and once
    rows = torch.arange(n, device=device)
    labels = (rows > n // 3).long() * 2 + (rows == 0)
    rbm = LabelRBM(4, 4, 2, dtype=dtype, device=device)
    rbm.init_from_data(rbm.join(rows[:, None] < counts, labels))
    eps = torch.finfo(dtype).eps
    exact = torch.logit((counts.double() + 1) / (n + 2))
    torch.testing.assert_close(rbm.b.detach().double(), exact, rtol=eps, atol=0)
    exact = ((labels.bincount(minlength=4).double() + 1) / (n + 4)).log()
    torch.testing.assert_close(rbm.d.detach().double(), exact, rtol=eps, atol=0)


# ---------------------------------------------------------------- inputs


def test_bad_states_are_refused_with_a_sentence():
    rbm = LabelRBM(3, 2, 2, dtype=torch.float32)
    for v, error, message in [
        (torch.zeros(4, 3), ValueError, r"\(\.\.\., 5\), got \(4, 3\)"),
        (torch.tensor([[0, 1, 0, 1, 1]]), ValueError, r"at index \(0,\) there are 2"),
        (torch.tensor([[0, 1, 0, 0, 0]]), ValueError, r"at index \(0,\) there are 0"),
        (torch.tensor([[0, 1, 0, 0.5, 0.5]]), ValueError, r"at index \(0, 3\) it holds 0.5"),
        (torch.tensor([[0, math.nan, 0, 0, 1]]), ValueError, "NaN"),
        (torch.zeros(2, 5, dtype=F64), TypeError, "the machine is torch.float32"),
    ]:
        for method in (rbm.log_prob, rbm.hidden_probs, rbm.gibbs, rbm.split, rbm.init_from_data):
            with pytest.raises(error, match=message):
                method(v)


def test_bad_labels_are_refused_with_a_sentence():
    rbm, x = LabelRBM(3, 2, 2), torch.zeros(2, 3)
    for labels, error, message in [
        (torch.tensor([0, 2]), ValueError, r"from 0 to 1; at index \(1,\) it is 2"),
        (torch.tensor([0, -1]), ValueError, r"at index \(1,\) it is -1"),
        (torch.tensor([0.0, 1.0]), TypeError, "integers, got torch.float32"),
        (torch.tensor([0, 1, 0]), ValueError, r"shape \(2,\).*got \(3,\)"),
        ([0, 1], TypeError, "torch.Tensor, got list"),
    ]:
        with pytest.raises(error, match=message):
            rbm.join(x, labels)
    with pytest.raises(ValueError, match="from 0 to 1"):
        rbm.sample_given_label(torch.tensor([2]), 3)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        rbm.sample_given_label(torch.tensor([1]), 0)
    with pytest.raises(ValueError, match="num_labels must be at least 2"):
        LabelRBM(3, 1, 2)


def test_tensors_follow_their_inputs_and_the_global_generator_is_left_alone(rng, device):
    before = torch.get_rng_state()
    rbm = LabelRBM(3, 4, 2, generator=rng(0, device), device=device)
    labels = torch.tensor([3, 0], device=device)
    x = rbm.sample_given_label(labels, 2, generator=rng(1, device))
    with torch.device("meta"):  # a tensor made without following its inputs would land here
        v = rbm.join(x, labels)
        assert rbm.log_z().value.device.type == device.type
        one, two = (rbm.gibbs(v, 2, generator=rng(2, device)) for _ in range(2))
        assert torch.equal(one, two) and one.device.type == device.type
        assert rbm.sample_base(3, generator=rng(0, device)).device.type == device.type
        assert rbm.class_log_probs(x).shape == (2, 4)
        rbm.sample_visible(rbm.sample_hidden(v, generator=rng(3, device)), generator=rng(4, device))
        rbm.init_from_data(v)
    assert torch.equal(before, torch.get_rng_state())
    assert rbm.gibbs(v.expand(2, 5, 2, 7), generator=rng(5, device)).shape == (2, 5, 2, 7)
    assert "num_visible=3, num_labels=4, num_hidden=2" in repr(rbm)
