"""The RBM against its definition: every quantity summed out by brute force on small machines."""

import math
import warnings

import pytest
import torch
from scipy.stats import chisquare, kstest, norm

from companion.logz import enumeration
from companion.models.boltzmann import BoltzmannMachine
from companion.models.rbm import RBM, CentredRBM, GaussianRBM, LabelRBM, RatingRBM
from companion.testing import binary_states

F64 = torch.float64


def machine(num_visible, num_hidden, rng, *, scale=1.0, seed=0, dtype=F64, device="cpu"):
    """An asymmetric machine: weights and biases far from zero and of either sign."""
    g = rng(seed)
    rbm = RBM(num_visible, num_hidden, dtype=F64, generator=g)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=F64, generator=g) + 0.2)
    return rbm.to(dtype=dtype, device=device)


def joint_energies(rbm):
    """E(v, h) of all pairs of states by the definition, one product at a time, (2^D, 2^H)."""
    vs, hs = binary_states(rbm.num_visible, dtype=F64), binary_states(rbm.num_hidden, dtype=F64)
    table = torch.zeros(len(vs), len(hs), dtype=F64)
    with torch.no_grad():
        for i in range(rbm.num_visible):
            table -= rbm.b[i] * vs[:, i, None]
            for j in range(rbm.num_hidden):
                table -= rbm.W[i, j] * vs[:, i, None] * hs[None, :, j]
        for j in range(rbm.num_hidden):
            table -= rbm.c[j] * hs[None, :, j]
    return vs, hs, table


def test_energy_agrees_with_its_definition(rng):
    rbm = machine(3, 4, rng)
    vs, hs, table = joint_energies(rbm)
    torch.testing.assert_close(rbm.energy(vs[:, None].expand(-1, 16, -1), hs), table)


def test_free_energy_sums_out_the_hidden_units(rng, ledger):
    rbm = machine(4, 5, rng)
    vs, _, table = joint_energies(rbm)
    by_hand = -(-table).logsumexp(1)
    torch.testing.assert_close(rbm.free_energy(vs), by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(rbm.log_prob(vs), -by_hand, rtol=0, atol=1e-12)
    found = rbm.free_energy(vs[5]).item()
    ledger("RBM free energy of one state (4 x 5)", exact=by_hand[5], estimate=found)
    # a flipped sign of either term would be seen
    assert (rbm.free_energy(vs) + by_hand).abs().max() > 0.1
    assert (rbm.free_energy(vs) + 2 * (vs @ rbm.b) - by_hand).abs().max() > 0.1


@pytest.mark.parametrize("inputs", [20.5, 25.0, 30.0])
def test_free_energies_keep_what_a_large_input_adds(inputs):
    """PyTorch's softplus takes log(1 + exp(x)) for x where x is above 20: 2e-9 is lost."""
    rbm = RBM(3, 1, dtype=F64)
    with torch.no_grad():
        rbm.c.fill_(inputs)
        found = rbm.log_prob(torch.zeros(3, dtype=F64)).item()
    exact = inputs + math.log1p(math.exp(-inputs))
    assert math.isclose(found, exact, rel_tol=4e-16) and not math.isclose(
        inputs, exact, rel_tol=1e-15
    )


@pytest.mark.parametrize("sizes", [(4, 3), (3, 4), (1, 1), (5, 5), (13, 2), (2, 13)])
def test_log_z_agrees_with_summing_all_pairs_of_states(sizes, rng, ledger):
    rbm = machine(*sizes, rng)
    log_z = rbm.log_z()
    exact = (-joint_energies(rbm)[2]).logsumexp((0, 1))
    ledger(f"RBM log Z, {sizes[0]} x {sizes[1]}", exact=exact, estimate=log_z.value)
    assert log_z.std_error == 0 and log_z.value.dtype == F64


def test_log_z_over_several_blocks_agrees_from_both_sides(rng, ledger):
    rbm = machine(15, 16, rng, scale=0.5)
    over_hidden = RBM(16, 15, dtype=F64)  # the same machine with its layers exchanged
    with torch.no_grad():
        over_hidden.W.copy_(rbm.W.T)
        over_hidden.b.copy_(rbm.c)
        over_hidden.c.copy_(rbm.b)
    by_states = enumeration(rbm.log_prob, 15, dtype=F64).value
    ledger("RBM log Z in blocks, 15 x 16", exact=by_states, estimate=rbm.log_z().value)
    ledger("RBM log Z, layers exchanged", exact=by_states, estimate=over_hidden.log_z().value)


def test_log_z_of_independent_units_has_a_closed_form(rng, ledger):
    rbm = machine(20, 30, rng)
    with torch.no_grad():
        rbm.W.zero_()
        exact = torch.nn.functional.softplus(torch.cat([rbm.b, rbm.c])).sum()
    ledger("RBM log Z without weights, 20 x 30", exact=exact, estimate=rbm.log_z().value)


def test_log_z_of_a_float32_machine_is_summed_in_float64(rng):
    rbm = machine(6, 7, rng, scale=3.0)
    single = machine(6, 7, rng, scale=3.0, dtype=torch.float32)
    assert single.log_z().value.dtype == F64
    torch.testing.assert_close(single.log_z().value, rbm.log_z().value, rtol=1e-6, atol=0)


def test_log_z_survives_huge_weights(rng):
    rbm = machine(4, 3, rng, scale=400.0)
    exact = (-joint_energies(rbm)[2]).logsumexp((0, 1))
    assert torch.isfinite(exact)
    torch.testing.assert_close(rbm.log_z().value, exact, rtol=1e-13, atol=0)


def test_log_z_refuses_what_it_cannot_enumerate():
    with pytest.raises(
        ValueError, match=r"this machine has 26 there.*annealed importance sampling"
    ):
        RBM(26, 26).log_z()
    assert torch.isfinite(RBM(784, 3).log_z().value)


def test_conditionals_are_those_of_the_joint(rng):
    rbm = machine(3, 4, rng)
    vs, hs, table = joint_energies(rbm)
    joint = (-table).exp()
    p_h = (joint @ hs) / joint.sum(1, keepdim=True)
    p_v = (joint.T @ vs) / joint.sum(0)[:, None]
    torch.testing.assert_close(rbm.hidden_probs(vs), p_h, rtol=0, atol=1e-12)
    torch.testing.assert_close(rbm.visible_probs(hs), p_v, rtol=0, atol=1e-12)


def test_sampled_layers_have_the_conditional_means(rng, device):
    rbm = machine(3, 4, rng, device=device)
    n = 200_000
    v = torch.tensor([1, 0, 1], device=device).expand(n, 3)
    h = rbm.sample_hidden(v, generator=rng(1, device))
    p = rbm.hidden_probs(v[0])
    z = (h.mean(0) - p) / (p * (1 - p) / n).sqrt()
    assert z.abs().max() < 4.9  # 4.5 standard errors for one unit; 4.9 for four (2e-6 in all)
    assert ((h.mean(0) - (1 - p)) / (p * (1 - p) / n).sqrt()).abs().min() > 4.9  # a flipped sign


def transition_matrix(rbm, visible_bias=None):
    """The exact matrix of one sweep on the visible states, from the conditionals."""
    vs, hs = binary_states(rbm.num_visible, dtype=F64), binary_states(rbm.num_hidden, dtype=F64)
    with torch.no_grad():
        to_h, bias = rbm.hidden_probs(vs), rbm.b if visible_bias is None else visible_bias
        to_v = torch.sigmoid(bias + hs @ rbm.W.T)
        p_h = torch.where(hs[None].bool(), to_h[:, None], 1 - to_h[:, None]).prod(-1)
        p_v = torch.where(vs[None].bool(), to_v[:, None], 1 - to_v[:, None]).prod(-1)
    return p_h @ p_v


def test_a_gibbs_sweep_is_reversible_and_leaves_the_model_invariant(rng, ledger):
    rbm = machine(3, 4, rng)
    log_probs = rbm.log_prob(binary_states(3, dtype=F64)).detach()
    pi, matrix = log_probs.softmax(0), transition_matrix(rbm)
    flow = pi[:, None] * matrix
    shift = (pi @ matrix - pi).abs().max()
    ledger("RBM Gibbs sweep: largest entry of |pi P - pi|", exact=0, estimate=shift)
    assert (flow - flow.T).abs().max() < 1e-12
    wrong = transition_matrix(rbm, visible_bias=torch.zeros(3, dtype=F64))  # forgets b
    assert (pi @ wrong - pi).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_gibbs_started_from_the_model_stays_there(dtype, num_steps, device, rng):
    rbm = machine(3, 4, rng, dtype=dtype, device=device)
    states = binary_states(3, dtype=dtype, device=device)
    pi = rbm.log_prob(states).detach().double().softmax(0).cpu()
    n = 100_000
    index = torch.multinomial(pi, n, replacement=True, generator=rng(2)).to(device)

    def p_value(model):
        v = model.gibbs(states[index], num_steps, generator=rng(3, device))
        counts = torch.bincount((v @ v.new_tensor([4, 2, 1])).long(), minlength=8)
        return chisquare(counts.cpu().numpy(), (pi * n).numpy(), sum_check=False).pvalue

    assert p_value(rbm) > 1e-5
    with torch.no_grad():  # a machine that forgets its visible bias must be caught
        rbm.b.zero_()
    assert p_value(rbm) < 1e-5


def test_sample_base_draws_from_the_visible_biases(rng, device):
    rbm = machine(3, 4, rng, device=device)
    n = 100_000
    v = rbm.sample_base(n, generator=rng(4, device))
    p = torch.sigmoid(rbm.b.detach())
    assert v.shape == (n, 3) and v.dtype == F64
    assert ((v.mean(0) - p) / (p * (1 - p) / n).sqrt()).abs().max() < 4.9


def test_init_visible_bias_makes_the_independent_unit_model(rng, ledger):
    g = rng(5)
    v = (torch.rand(50, 4, generator=g) < torch.tensor([0.1, 0.5, 0.8, 0.0])).long()
    rbm = RBM(4, 3, dtype=F64)
    with torch.no_grad():
        rbm.W.zero_()
    rbm.init_visible_bias(v)
    p = (v.double().sum(0) + 1.0) / 52.0
    exact = torch.where(v.bool(), p.log(), (1 - p).log()).sum(1).mean()
    found = (rbm.log_prob(v).mean() - rbm.log_z().value).item()
    ledger("RBM: likelihood of independent units", exact=exact, estimate=found)
    assert torch.isfinite(rbm.b).all()  # the unit that is never on keeps a finite bias


@pytest.mark.parametrize("smoothing", [1e-3, 0.5, 7.0])
def test_smoothing_adds_so_many_ones_and_zeros(smoothing):
    rbm = RBM(3, 2, dtype=F64)
    rbm.init_visible_bias(torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0]]), smoothing=smoothing)
    on = torch.tensor([3.0, 1.0, 0.0], dtype=F64) + smoothing
    torch.testing.assert_close(rbm.b.detach(), (on / (3 + 2 * smoothing - on)).log())


WEIGHTS = {
    "RBM": lambda g: RBM(300, 400, generator=g).W,
    "batch": lambda g: RBM(30, 40, batch_shape=(100,), generator=g).W,
    "centred": lambda g: CentredRBM(300, 400, generator=g).W,
    "Gaussian": lambda g: GaussianRBM(300, 400, generator=g).W,
    "label": lambda g: LabelRBM(300, 2, 400, generator=g).W,
    "label's own": lambda g: LabelRBM(2, 300, 400, generator=g).U,
    "ratings": lambda g: RatingRBM(60, 5, 400, generator=g).W,
    "Boltzmann": lambda g: BoltzmannMachine(350, generator=g).J,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_start_as_normal_draws_of_standard_deviation_one_hundredth(name, rng):
    """Kolmogorov-Smirnov: a false-alarm rate of 1e-6 each, 8e-6 for the eight."""
    weights = WEIGHTS[name](rng(6)).detach().double().flatten().numpy()
    assert len(weights) >= 120_000
    assert kstest(weights, norm(0.0, 0.01).cdf).pvalue > 1e-6
    for wrong in (norm(0.0, 0.0105), norm(0.0, 0.0095), norm(0.0003, 0.01)):
        assert kstest(weights, wrong.cdf).pvalue < 1e-6


def test_integer_and_boolean_states_are_cast_and_batches_may_have_any_shape(rng):
    rbm = machine(3, 2, rng)
    v = torch.tensor([[1, 0, 1], [0, 0, 1]])
    for states in (v.bool(), v, v.to(torch.uint8)):
        torch.testing.assert_close(rbm.log_prob(states), rbm.log_prob(v.double()))
    deep = v.expand(5, 4, 2, 3)
    assert rbm.log_prob(deep).shape == (5, 4, 2)
    assert rbm.hidden_probs(v[0]).shape == (2,)
    assert rbm.gibbs(deep, generator=rng(0)).shape == deep.shape


BAD_STATES = {
    "shape": (torch.zeros(2, 4), ValueError, r"shape \(\.\.\., 3\), got \(2, 4\)"),
    "scalar": (torch.tensor(1.0), ValueError, "shape"),
    "empty batch": (torch.zeros(0, 3), ValueError, "empty"),
    "dtype": (torch.zeros(2, 3, dtype=F64), TypeError, "float64 but the machine is torch.float32"),
    "complex": (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "real"),
    "NaN": (torch.tensor([[0.0, math.nan, 1.0]]), ValueError, r"first is at index \(0, 1\)"),
    "infinity": (torch.tensor([[0.0, math.inf, 1.0]]), ValueError, r"index \(0, 1\)"),
    "grey": (torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.5, 1.0]]), ValueError, r"\(1, 1\).* 0\.5"),
    "minus one": (torch.tensor([[-1, 1, 1]]), ValueError, r"\(0, 0\)"),
    "device": (torch.zeros(2, 3, device="meta"), ValueError, "on meta but the machine is on cpu"),
    "list": ([[0.0, 1.0, 1.0]], TypeError, "torch.Tensor, got list"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_states_are_refused_with_a_sentence(name):
    x, error, message = BAD_STATES[name]
    rbm = RBM(3, 2, dtype=torch.float32)
    for method in (rbm.log_prob, rbm.free_energy, rbm.hidden_probs, rbm.gibbs, rbm.sample_hidden):
        with pytest.raises(error, match=message):
            method(x)


def test_bad_sizes_counts_and_generators_are_refused():
    with pytest.raises(ValueError, match="num_visible must be at least 1, got -3"):
        RBM(-3, 2)
    with pytest.raises(TypeError, match="num_hidden must be an integer"):
        RBM(3, 2.0)
    with pytest.raises(TypeError, match="floating"):
        RBM(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="the generator is on cpu but the tensors are on meta"):
        RBM(3, 2, device="meta", generator=torch.Generator())
    rbm = RBM(3, 2)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        rbm.gibbs(torch.zeros(1, 3), 0)
    with pytest.raises(TypeError, match="generator must be a torch.Generator"):
        rbm.gibbs(torch.zeros(1, 3), generator=7)
    with pytest.raises(ValueError, match="n must be at least 1"):
        rbm.sample_base(0)
    with pytest.raises(ValueError, match="smoothing"):
        rbm.init_visible_bias(torch.zeros(1, 3), smoothing=-1.0)


def test_every_tensor_follows_its_inputs_device(rng):
    rbm = machine(3, 4, rng, dtype=torch.float32)
    v = torch.tensor([[1.0, 0.0, 1.0]])
    with torch.device("meta"):  # a tensor made without following its inputs would land here
        assert rbm.log_z().value.device.type == "cpu"
        assert rbm.gibbs(v, 2, generator=rng(0)).device.type == "cpu"
        assert rbm.sample_base(3, generator=rng(0)).device.type == "cpu"
        assert rbm.sample_visible(rbm.sample_hidden(v)).device.type == "cpu"
        rbm.init_visible_bias(v)


def test_the_same_generator_gives_the_same_machine_and_the_global_one_is_left_alone(rng, device):
    before = torch.get_rng_state()
    one = RBM(5, 4, generator=rng(1, device), device=device)
    two = RBM(5, 4, generator=rng(1, device), device=device)
    v = one.sample_base(7, generator=rng(2, device))
    assert torch.equal(one.W, two.W)
    assert torch.equal(
        one.gibbs(v, 3, generator=rng(3, device)), two.gibbs(v, 3, generator=rng(3, device))
    )
    assert torch.equal(before, torch.get_rng_state())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "num_visible=5, num_hidden=4" in repr(one)


def test_no_machine_beats_the_entropy_bound(rng, ledger):
    data = torch.tensor([[1, 1, 1]] * 3 + [[0, 0, 0]] * 3)  # two patterns, half each
    bound = -math.log(2)
    with torch.no_grad():
        machines = [machine(3, 2, rng, seed=seed, scale=3.0) for seed in range(100)]
        unnormalised = torch.stack([rbm.log_prob(data).mean() for rbm in machines])
        likelihood = unnormalised - torch.stack([rbm.log_z().value for rbm in machines])
        assert (likelihood < bound).all()
        assert (unnormalised > bound).any()  # without log Z the bound is soon broken
        memory = RBM(3, 1, dtype=F64)  # the hidden unit chooses one of the two patterns
        memory.W.fill_(100.0)
        memory.b.fill_(-50.0)
        memory.c.fill_(-150.0)
        found = memory.log_prob(data).mean() - memory.log_z().value
    ledger("RBM that has memorised two patterns", exact=bound, estimate=found)
