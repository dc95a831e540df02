"""The machine of ratings against its definition: all states of each set of rated items."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from companion.core import Kernel
from companion.models.rbm import RatingRBM
from companion.objectives import PersistentChains, contrastive_divergence
from companion.testing import (
    assert_invariant,
    binary_states,
    detailed_balance_error,
    discrete_invariance_test,
    stationary_error,
    transition_matrix,
)

F64 = torch.float64
MASKS = binary_states(3, device="cpu").bool()  # all sets of rated items of three
DATA = torch.tensor([[2, 0, 1], [0, -1, 2], [1, -1, -1], [2, 2, -1]])


def machine(rng, *, items=3, ratings=3, hidden=2, scale=1.0, dtype=F64, device="cpu"):
    """An asymmetric machine: weights and biases far from zero and of either sign."""
    g = rng(0)
    rbm = RatingRBM(items, ratings, hidden, dtype=F64, generator=g)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=F64, generator=g) + 0.2)
    return rbm.to(dtype=dtype, device=device)


def all_states(mask, num_ratings=3):
    """Every combination of ratings of the rated items, -1 elsewhere, (m, items)."""
    values = [range(num_ratings) if rated else [-1] for rated in mask.tolist()]
    return torch.tensor(list(itertools.product(*values)), device=mask.device)


def energies(rbm, states):
    """E(v, h) of each state and all h by the definition, one rating at a time, (m, 2^H)."""
    hs, rows = binary_states(rbm.num_hidden, dtype=F64), []
    for state in states.tolist():
        row = -(hs @ rbm.c)
        for item, rating in enumerate(state):
            if rating >= 0:
                row = row - rbm.b[item, rating] - hs @ rbm.W[item, rating]
        rows.append(row)
    return hs, torch.stack(rows)


def exact_log_z(rbm, mask):
    """Differentiable."""
    return (-energies(rbm, all_states(mask))[1]).logsumexp((0, 1))


# ---------------------------------------------------------------- densities


def test_energy_and_free_energy_agree_with_their_definition_for_all_masks(rng, ledger):
    rbm = machine(rng)
    states = torch.cat([all_states(mask) for mask in MASKS])
    assert len(states) == 4**3  # each item has three ratings or none
    hs, table = energies(rbm, states)
    found = rbm.energy(states[:, None].expand(-1, 4, -1), hs)
    torch.testing.assert_close(found, table, rtol=0, atol=1e-12)
    by_hand = -(-table).logsumexp(1).detach()
    torch.testing.assert_close(rbm.free_energy(states).detach(), by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(rbm.log_prob(states).detach(), -by_hand, rtol=0, atol=1e-12)
    ledger("rating RBM free energy", exact=by_hand[30], estimate=rbm.free_energy(states[30]).item())
    nothing_rated = rbm.log_prob(states[0]) - torch.nn.functional.softplus(rbm.c).sum()
    assert nothing_rated.abs() < 1e-12
    # missing taken for the lowest rating is another energy
    assert (rbm.free_energy(states.clamp(min=0)) - by_hand).abs().max() > 0.1


def test_log_z_agrees_with_summing_all_states_of_every_mask(rng, ledger):
    rbm = machine(rng)
    found = rbm.log_z(MASKS)
    assert found.value.shape == (8,) and (found.std_error == 0).all()
    for i, mask in enumerate(MASKS):
        exact = exact_log_z(rbm, mask).item()
        rated = "".join("01"[int(x)] for x in mask)
        ledger(f"rating RBM log Z, rated {rated}", exact=exact, estimate=found.value[i])
        ledger(f"rating RBM log Z, alone, rated {rated}", exact=exact,
               estimate=rbm.log_z(mask).value)  # fmt: skip
    assert rbm.log_z(MASKS.reshape(2, 4, 3)).value.shape == (2, 4)
    single = machine(rng, dtype=torch.float32).log_z(MASKS).value
    assert single.dtype == F64
    torch.testing.assert_close(single, found.value, rtol=1e-5, atol=1e-5)


def test_log_z_in_blocks_agrees_with_the_sum_over_the_visible_states(rng, ledger):
    rbm = machine(rng, items=4, hidden=14, scale=0.5)
    mask = torch.tensor([True, True, False, True])
    exact = rbm.log_prob(all_states(mask)).logsumexp(0).item()
    ledger("rating RBM log Z in blocks", exact=exact, estimate=rbm.log_z(mask).value)
    with pytest.raises(ValueError, match="this machine has 26 there"):
        RatingRBM(2, 2, 26).log_z(torch.tensor([True, True]))


def test_log_z_of_many_items_keeps_to_its_blocks(rng, ledger):
    """So many items that blocks have fewer than 2^12 states; without weights Z is a product."""
    rbm = machine(rng, items=3000, ratings=4, hidden=10)
    with torch.no_grad():
        rbm.W.zero_()
        exact = rbm.b.logsumexp(1).sum() + torch.nn.functional.softplus(rbm.c).sum()
        found = rbm.log_z(torch.ones(3000, dtype=torch.bool)).value
    ledger("rating RBM log Z without weights, 3000 items", exact=exact, estimate=found,
           tolerance=1e-8)  # fmt: skip


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_log_z_of_many_sets_is_that_of_each_and_keeps_to_its_blocks(rng):
    """2048 sets of rated items, three users each: memory is that of 1000 sets."""
    rbm = machine(rng, items=11, ratings=2, hidden=12, scale=0.5)
    sets = binary_states(11, device="cpu").bool()
    which = torch.arange(3 * 2048)[torch.randperm(3 * 2048, generator=rng(1))] % 2048
    with LargestTensor() as largest:
        found = rbm.log_z(sets[which].view(2, -1, 11)).value
    assert found.shape == (2, 3 * 1024)
    assert largest.numbers <= 2**12 * 1000
    order = found.flatten()[which.argsort(stable=True)].view(2048, 3)
    assert torch.equal(order, order[:, :1].expand(-1, 3))
    assert len(order[:, 0].unique()) == 2048
    for i in range(0, 2048, 13):
        torch.testing.assert_close(order[i, 0], rbm.log_z(sets[i]).value, rtol=0, atol=1e-11)


# ---------------------------------------------------------------- prediction


def by_ratio(rbm, ratings, item):
    """p(v_item = k | the other ratings) as a ratio of sums over states, (3,)."""
    filled = ratings.repeat(3, 1)
    filled[:, item] = torch.arange(3)
    return (-energies(rbm, filled)[1]).logsumexp(1).softmax(0)


def test_predictions_are_ratios_of_exact_marginals(rng, ledger):
    rbm = machine(rng)
    states = torch.cat([all_states(mask) for mask in MASKS])
    exact = torch.stack([
        torch.stack([by_ratio(rbm, state, item) for item in range(3)]) for state in states
    ])  # fmt: skip
    found = rbm.predict(states)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(rbm.predict(states.reshape(4, 16, 3)).flatten(0, 1), found)
    ledger("rating RBM: p(v[1] = 2 | v[0], v[2])", exact=exact[40, 1, 2].item(),
           estimate=found[40, 1, 2].item())  # fmt: skip
    mean = exact @ torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    torch.testing.assert_close(rbm.expected_rating(states), mean, rtol=0, atol=1e-12)
    # negative controls: the rating itself not left out; one reconstruction by mean hidden units
    h = rbm.hidden_probs(states)
    mean_field = (rbm.b + torch.einsum("nj,qkj->nqk", h, rbm.W)).softmax(-1)
    assert (mean_field - exact).abs().max() > 0.05
    rated = states >= 0
    inputs = rbm.c + torch.einsum("nqk,qkj->nj", rbm._one_hot(states), rbm.W)
    kept = (rbm.b + torch.nn.functional.softplus(inputs[:, None, None] + rbm.W).sum(-1)).softmax(-1)
    torch.testing.assert_close(kept[~rated], exact[~rated], rtol=0, atol=1e-12)
    assert (kept - exact)[rated].abs().max() > 0.05


def test_predictions_of_a_rated_item_do_not_depend_on_its_rating(rng):
    rbm = machine(rng)
    ratings = torch.tensor([[0, 2, 1], [1, 2, 1], [2, 2, 1], [-1, 2, 1]])
    of_first = rbm.predict(ratings)[:, 0]
    torch.testing.assert_close(of_first, of_first[:1].expand(4, -1), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- gradients


def flat_grad(loss, rbm):
    parameters = [rbm.W, rbm.b, rbm.c]
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def test_the_likelihood_gradient_has_two_phases_for_each_user(rng, ledger):
    """grad (log Z(mask) - log p~(v)) = E[grad log p~ | mask] - grad log p~(v), enumerated."""
    rbm = machine(rng)
    for i, ratings in enumerate(DATA):
        states = all_states(ratings >= 0)
        exact = flat_grad(exact_log_z(rbm, ratings >= 0) - rbm.log_prob(ratings), rbm)
        log_probs = rbm.log_prob(states)
        phases = log_probs.detach().softmax(0) @ log_probs - rbm.log_prob(ratings)
        found = flat_grad(phases, rbm)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
        ledger(f"rating RBM: likelihood gradient of W[0, 0, 0], user {i}",
               exact=exact[0], estimate=found[0])  # fmt: skip


def test_long_contrastive_divergence_has_the_exact_gradient_of_all_users(rng, ledger):
    """CD-20 on a fast chain, users with different masks in one batch."""
    rbm, n, num_users = machine(rng, scale=0.3), 8_000, len(DATA)
    v = DATA.repeat(n, 1)
    found = flat_grad(contrastive_divergence(rbm, v, 20, generator=rng(1)), rbm)
    exact, variance, without_masks = 0.0, 0.0, 0.0
    complete = all_states(MASKS[-1])
    for ratings in DATA:
        states = all_states(ratings >= 0)
        grads = torch.stack([flat_grad(rbm.log_prob(s), rbm) for s in states])
        pi = rbm.log_prob(states).detach().softmax(0)
        positive = flat_grad(rbm.log_prob(ratings), rbm)
        exact += (pi @ grads - positive) / num_users
        variance += pi @ (grads - pi @ grads).square() / num_users**2
        log_probs = rbm.log_prob(complete)
        everything = flat_grad(log_probs.detach().softmax(0) @ log_probs, rbm)
        without_masks += (everything - positive) / num_users
    error = (variance / n).sqrt()
    moved = error > 0
    assert ((found - exact)[moved] / error[moved]).abs().max() < 5.3  # 29 components: below 1e-5
    assert ((found - exact)[~moved] == 0).all()
    ledger("rating RBM, CD-20: gradient of W[0, 0, 0]", exact=exact[0], estimate=found[0],
           std_error=error[0])  # fmt: skip
    # negative control: one negative phase for all, of complete users
    assert ((without_masks - exact)[moved] / error[moved]).abs().max() > 20


def test_missing_entries_get_no_gradient(rng):
    rbm = machine(rng)
    ratings = torch.tensor([[2, -1, 1], [0, -1, 2], [-1, -1, 0]])
    contrastive_divergence(rbm, ratings, 1, generator=rng(2)).backward()
    assert (rbm.W.grad[1] == 0).all() and (rbm.b.grad[1] == 0).all()
    assert (rbm.W.grad[[0, 2]] != 0).any() and (rbm.b.grad[[0, 2]] != 0).any()


def test_persistent_chains_are_refused_with_the_reason(rng):
    with pytest.raises(TypeError, match="each set of rated items is a machine of its own"):
        PersistentChains(machine(rng), 10)


# ---------------------------------------------------------------- conditionals and sampling


def test_conditionals_are_those_of_the_joint(rng):
    rbm = machine(rng)
    for mask in MASKS[[5, 7]]:
        states = all_states(mask)
        hs, table = energies(rbm, states)
        p_h = (-table).softmax(1) @ hs
        torch.testing.assert_close(rbm.hidden_probs(states), p_h, rtol=0, atol=1e-12)
        p_v = torch.einsum("sh,sqk->hqk", (-table).softmax(0), rbm._one_hot(states))
        found = rbm.visible_probs(hs)[:, mask]
        torch.testing.assert_close(found, p_v[:, mask], rtol=0, atol=1e-12)


def kernel(gibbs):
    def step(state, *, generator):
        return SimpleNamespace(x=gibbs(state.x, generator=generator)), None

    return Kernel(lambda x: SimpleNamespace(x=x), step)


class SeesMissing(RatingRBM):
    """A plausible error: a missing rating counts as the lowest one."""

    def _one_hot(self, ratings):
        return super()._one_hot(ratings.clamp(min=0))


def wrong_machine(rbm):
    wrong = SeesMissing(rbm.num_items, rbm.num_ratings, rbm.num_hidden)
    wrong.to(dtype=rbm.W.dtype, device=rbm.W.device).load_state_dict(rbm.state_dict())
    return wrong


def test_a_gibbs_sweep_is_reversible_and_leaves_every_users_law_invariant(rng, ledger):
    rbm = machine(rng)
    errors = []
    for mask in MASKS[[5, 7]]:
        states = all_states(mask)
        pi = rbm.log_prob(states).detach().softmax(0)
        matrix = transition_matrix(kernel(rbm.gibbs), states)
        assert detailed_balance_error(matrix, pi) < 1e-12
        errors.append(stationary_error(matrix, pi))
        if not mask.all():
            wrong = transition_matrix(kernel(wrong_machine(rbm).gibbs), states)
            assert stationary_error(wrong, pi) > 1e-3
    ledger("rating RBM Gibbs sweep: error of the stationary law", exact=0, estimate=max(errors))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gibbs_started_from_the_model_stays_there(dtype, rng, device):
    rbm = machine(rng, dtype=dtype, device=device)
    states = all_states(torch.tensor([True, False, True], device=device))

    def test(model, seed):
        return discrete_invariance_test(
            kernel(lambda v, *, generator: model.gibbs(v, 2, generator=generator)),
            rbm.log_prob, states, num_chains=100_000, num_steps=1, generator=rng(seed, device),
        )  # fmt: skip

    assert_invariant(test(rbm, 3))
    assert test(wrong_machine(rbm), 4).p_value < 1e-5


def test_gibbs_keeps_missing_entries_missing_and_the_dtype(rng):
    rbm = machine(rng)
    for dtype in (torch.int8, torch.int64):
        ratings = DATA.to(dtype).expand(50, 4, 3).clone()
        new = rbm.gibbs(ratings, 3, generator=rng(5))
        assert new.dtype == dtype and torch.equal(new >= 0, ratings >= 0) and (new < 3).all()
        assert (new != ratings).any() and torch.equal(ratings, DATA.to(dtype).expand(50, 4, 3))


def test_sampled_layers_have_the_conditional_frequencies(rng, device):
    rbm, n = machine(rng, device=device), 200_000
    h = torch.tensor([1, 0], device=device)
    v, p = rbm.sample_visible(h.expand(n, 2), generator=rng(1, device)), rbm.visible_probs(h)
    z = (rbm._one_hot(v).mean(0) - p) / (p * (1 - p) / n).sqrt()
    assert v.dtype == torch.int64 and z.abs().max() < 4.9  # nine components: below 1e-5
    ratings = torch.tensor([1, -1, 2], device=device)
    h = rbm.sample_hidden(ratings.expand(n, 3), generator=rng(2, device))
    p = rbm.hidden_probs(ratings)
    assert ((h.mean(0) - p) / (p * (1 - p) / n).sqrt()).abs().max() < 4.7
    v = rbm.sample_base((ratings >= 0).expand(n, 3), generator=rng(3, device))
    p = rbm.b.softmax(-1)[[0, 2]]
    z = (rbm._one_hot(v)[:, [0, 2]].mean(0) - p) / (p * (1 - p) / n).sqrt()
    assert (v[:, 1] == -1).all() and z.abs().max() < 4.9


def test_init_from_data_takes_the_frequencies_of_what_was_rated():
    rbm = RatingRBM(3, 3, 2, dtype=F64)
    rbm.init_from_data(DATA)
    expected = torch.tensor([[2, 2, 3], [2, 1, 2], [1, 2, 2]], dtype=F64)
    expected = (expected / expected.sum(1, keepdim=True)).log()
    torch.testing.assert_close(rbm.b.detach(), expected)


@pytest.mark.parametrize("smoothing", [1e-3, 0.5, 7.0])
def test_smoothing_adds_as_much_to_the_count_of_every_rating(smoothing):
    rbm = RatingRBM(3, 3, 2, dtype=F64)
    rbm.init_from_data(DATA, smoothing=smoothing)
    counts = torch.tensor([[1, 1, 2], [1, 0, 1], [0, 1, 1]], dtype=F64) + smoothing
    torch.testing.assert_close(rbm.b.detach(), (counts / counts.sum(1, keepdim=True)).log())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2_100, 70_000])
def test_biases_of_a_sixteen_bit_machine_are_exact_but_for_rounding(dtype, n, device):
    """16 bits hold neither a count of so many rows nor a share so close to 1."""
    users = torch.arange(n, device=device)
    always, at_times = torch.zeros_like(users), (users > n // 3).long() + 2 * (users == 0)
    ratings = torch.stack([always, at_times, torch.where(users == 7, 2, -1)], -1)
    rbm = RatingRBM(3, 3, 2, dtype=dtype, device=device)
    rbm.init_from_data(ratings)
    counts = torch.stack([(ratings == k).sum(0) for k in range(3)], -1).double() + 1
    exact = (counts / counts.sum(1, keepdim=True)).log()
    # the log of a share close to 1 is a small number of its own, and as precise
    rtol = torch.finfo(dtype).eps
    torch.testing.assert_close(rbm.b.detach().double(), exact, rtol=rtol, atol=1e-7)


# ---------------------------------------------------------------- inputs


def test_bad_ratings_are_refused_with_a_sentence():
    rbm = RatingRBM(3, 5, 2)
    for ratings, error, message in [
        (torch.tensor([[0, 5, 1]]), ValueError, r"from -1 to 4; at index \(0, 1\) it is 5"),
        (torch.tensor([[0, -2, 1]]), ValueError, r"at index \(0, 1\) it is -2"),
        (torch.tensor([[0.0, 1.0, math.nan]]), TypeError, "integers, got torch.float32"),
        (torch.tensor([[True, True, True]]), TypeError, "integers, got torch.bool"),
        (torch.zeros(2, 4).long(), ValueError, r"\(\.\.\., 3\), one entry for each item.*\(2, 4\)"),
        (torch.tensor(1), ValueError, r"got \(\)"),
        (torch.zeros(0, 3).long(), ValueError, "empty"),
        (torch.zeros(2, 3, device="meta").long(), ValueError, "on meta but the machine is on cpu"),
        ([[0, 1, 2]], TypeError, "torch.Tensor, got list"),
    ]:
        for method in (rbm.log_prob, rbm.hidden_probs, rbm.gibbs, rbm.predict, rbm.init_from_data):
            with pytest.raises(error, match=message):
                method(ratings)


def test_bad_masks_sizes_and_counts_are_refused():
    rbm = RatingRBM(3, 5, 2)
    for rated, error, message in [
        (torch.tensor([1, 0, 1]), TypeError, r"ratings >= 0\), got torch.int64"),
        (7, TypeError, "boolean tensor.*got int"),
        (torch.tensor([True]), ValueError, r"rated must have shape \(\.\.\., 3\)"),
        (torch.zeros(0, 3, dtype=torch.bool), ValueError, "empty"),
        (torch.zeros(3, dtype=torch.bool, device="meta"), ValueError, "on meta"),
    ]:
        for method in (rbm.log_z, rbm.sample_base):
            with pytest.raises(error, match=message):
                method(rated)
    with pytest.raises(ValueError, match="num_ratings must be at least 2, got 1"):
        RatingRBM(3, 1, 2)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        rbm.gibbs(torch.tensor([[0, 1, 2]]), 0)
    with pytest.raises(ValueError, match="smoothing"):
        rbm.init_from_data(torch.tensor([[0, 1, 2]]), smoothing=0.0)


def test_tensors_follow_their_inputs_and_the_global_generator_is_left_alone(rng, device):
    before = torch.get_rng_state()
    rbm = RatingRBM(3, 5, 2, generator=rng(0, device), device=device)
    ratings = torch.tensor([[4, -1, 0], [-1, 3, 2]], device=device)
    with torch.device("meta"):  # a tensor made without following its inputs would land here
        assert rbm.log_z(ratings >= 0).value.device.type == device.type
        one, two = (rbm.gibbs(ratings, 2, generator=rng(2, device)) for _ in range(2))
        assert torch.equal(one, two) and one.device.type == device.type
        start = rbm.sample_base(ratings >= 0, generator=rng(0, device))
        assert start.device.type == device.type and torch.equal(start >= 0, ratings >= 0)
        assert rbm.expected_rating(ratings).shape == (2, 3)
        h = rbm.sample_hidden(ratings, generator=rng(3, device))
        rbm.sample_visible(h, generator=rng(4, device))
        rbm.init_from_data(ratings)
    assert torch.equal(before, torch.get_rng_state())
    assert "num_items=3, num_ratings=5, num_hidden=2" in repr(rbm)
