"""Chains that go on between updates: what they follow, and the gradients that they give."""

import math

import pytest
import torch

from companion.models.rbm import RBM, CentredRBM, GaussianRBM, RatingRBM
from companion.objectives import (
    FastPersistentChains,
    PersistentChains,
    TemperedChains,
    maximum_likelihood,
    pseudolikelihood,
)
from companion.objectives.contrastive import two_phases
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
BETAS = torch.tensor([0.0, 0.4, 0.7, 1.0], dtype=F64)


class Plain:
    """A machine that offers no more than the protocol: objectives take the general route."""

    def __init__(self, rbm):
        self.rbm = rbm
        self.log_prob, self.gibbs, self.sample_base = rbm.log_prob, rbm.gibbs, rbm.sample_base


def flat(rbm):
    return torch.nn.utils.parameters_to_vector(rbm.parameters()).detach()


def exact_draws(log_prob, n, rng, seed):
    states = binary_states(3, dtype=F64)
    pi = log_prob(states).detach().softmax(0)
    return states[torch.multinomial(pi, n, replacement=True, generator=rng(seed))]


# ---------------------------------------------------------------- exact likelihood


def test_maximum_likelihood_is_the_exact_loss_by_either_sum(rng, ledger):
    rbm = machine(rng)
    exact = rbm.log_z().value - rbm.log_prob(DATA).mean()
    for name, model in (("the machine's own sum", rbm), ("a sum over visible states", Plain(rbm))):
        loss = maximum_likelihood(model, DATA)
        ledger(f"negative log-likelihood by {name}", exact=exact.detach(), estimate=loss.detach())
        torch.testing.assert_close(flat_grad(loss, rbm), exact_gradient(rbm, DATA))


def test_maximum_likelihood_says_when_it_would_have_to_sum_too_much(rng):
    rbm = RBM(17, 17, generator=rng(0))
    v = torch.zeros(2, 17)
    with pytest.raises(ValueError, match="stops at n = 16; this machine has 17 there"):
        maximum_likelihood(rbm, v)
    with pytest.raises(ValueError, match="stops at n = 16, but v has 17 units"):
        maximum_likelihood(Plain(rbm), v)


class Spins:
    """A user's model of spins -1 and +1, which does not look at what it is given."""

    def log_prob(self, v):
        return (v * v.roll(1, -1)).sum(-1).double()


def test_maximum_likelihood_refuses_states_that_its_sum_would_leave_out(rng):
    gaussian = GaussianRBM(3, 2, generator=rng(0), dtype=F64)
    ratings = RatingRBM(3, 2, 2, generator=rng(0), dtype=F64)
    normal = torch.randn(4, 3, dtype=F64, generator=rng(1))
    for model, v in (
        (Spins(), 2 * DATA - 1),
        (ratings, DATA.where(DATA.cumsum(0) < 2, -1)),
        (Plain(gaussian), normal),
    ):
        assert model.log_prob(v).isfinite().all()
        with pytest.raises(ValueError, match="v must hold zeros and ones only"):
            maximum_likelihood(model, v)
    assert maximum_likelihood(Spins(), DATA).isfinite()
    assert maximum_likelihood(gaussian, normal).isfinite()  # by an integral of its own


# ---------------------------------------------------------------- persistent chains


def test_the_chains_of_the_fused_route_follow_the_law_of_the_general_one(rng):
    """From an exact start both leave the law alone; one that forgets a layer's bias does not."""
    rbm, n = machine(rng), 100_000
    pi = rbm.log_prob(binary_states(3, dtype=F64)).detach().softmax(0)
    chains = PersistentChains(rbm, n, generator=rng(1))
    chains.x = exact_draws(rbm.log_prob, n, rng, 2)
    for _ in range(3):
        loss = chains.loss(DATA)
    torch.testing.assert_close(loss, two_phases(rbm, DATA, chains.x))

    def chi_square(x):
        counts = torch.bincount(index(x), minlength=8)
        return ((counts - n * pi).square() / (n * pi)).sum().item()

    assert chi_square(chains.x) < 36.3  # 7 degrees of freedom: 1e-5 is at 35.3 or so
    chains.hidden_probs = torch.sigmoid(chains.x @ rbm.W.detach())
    chains.loss(DATA)
    assert chi_square(chains.x) > 100


def test_updates_in_place_are_losses_and_steps_of_gradient_descent(rng):
    rbm, other = machine(rng), machine(rng)
    chains, others = (PersistentChains(m, 20, generator=rng(1)) for m in (rbm, other))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.3)
    start = flat(rbm)
    for num_steps in (1, 2, 1):
        chains.update(DATA, 0.3, num_steps)
        optimizer.zero_grad()
        others.loss(DATA, num_steps).backward()
        optimizer.step()
        assert torch.equal(chains.x, others.x)
        torch.testing.assert_close(flat(rbm), flat(other), rtol=0, atol=1e-12)
    assert (flat(rbm) - start).norm() > 0.1
    torch.testing.assert_close(chains.state_dict()["hidden_probs"], others.hidden_probs)
    with pytest.raises(TypeError, match="Plain has no contrastive_update; take loss"):
        PersistentChains(Plain(rbm), 20, generator=rng(1)).update(DATA, 0.3)


def test_persistent_chains_go_on_under_sixteen_bit_products(rng, device):
    """The hidden units that the last call returned are then in 16 bits, and are taken."""
    rbm = machine(rng, dtype=torch.float32, device=device)
    chains = PersistentChains(rbm, 20, generator=rng(1, device))
    start = chains.x
    with torch.autocast(device.type, torch.bfloat16):
        for _ in range(2):
            chains.loss(DATA.to(device))
            assert chains.hidden_probs.dtype == torch.bfloat16
        chains.update(DATA.to(device), 0.1)
    assert chains.x.shape == (20, 3) and not torch.equal(chains.x.float(), start)


def test_the_chains_of_updates_in_single_precision_follow_the_law(rng):
    """Their coins are made of 16 bits; from an exact start the chains keep the model's law."""
    rbm, n = machine(rng).float(), 100_000
    pi = rbm.log_prob(binary_states(3, dtype=torch.float32)).detach().softmax(0)
    chains = PersistentChains(rbm, n, generator=rng(1))
    chains.x = exact_draws(lambda s: rbm.log_prob(s.float()), n, rng, 2).float()

    def chi_square_after_an_update():
        chains.update(DATA.float(), 1e-30)  # moves no parameter
        counts = torch.bincount(index(chains.x.double()), minlength=8)
        return ((counts - n * pi).square() / (n * pi)).sum()

    assert chi_square_after_an_update() < 36.3  # 7 degrees of freedom: 1e-5 is at 35.3 or so
    chains.hidden_probs = torch.sigmoid(chains.x @ rbm.W.detach())  # forgets a bias
    assert chi_square_after_an_update() > 100


# ---------------------------------------------------------------- fast weights


def test_fast_weights_learn_by_the_same_gradient_and_fade(rng):
    rbm = machine(rng)
    chains = FastPersistentChains(rbm, 20, fast_rate=0.3, decay=0.9, generator=rng(1))
    by_hand = torch.zeros(11, dtype=F64)
    for _ in range(3):
        gradient = flat_grad(chains.loss(DATA), rbm)
        torch.testing.assert_close(gradient, flat_grad(two_phases(rbm, DATA, chains.x), rbm))
        by_hand = 0.9 * by_hand - 0.3 * gradient
    torch.testing.assert_close(chains.fast, by_hand)
    assert chains.fast.norm() > 0.1


def test_the_chains_follow_slow_and_fast_weights_together(rng):
    """Under constant fast weights the chains' law is that of the machine with both added."""
    rbm, n = machine(rng), 100_000
    both = machine(rng)
    fast = 0.7 * torch.randn(11, generator=rng(5), dtype=F64)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(flat(both) + fast, both.parameters())
    chains = FastPersistentChains(rbm, n, fast_rate=1e-9, decay=0.0, generator=rng(1))
    chains.x = exact_draws(both.log_prob, n, rng, 2)
    chains.fast = fast
    chains.loss(DATA)
    states = binary_states(3, dtype=F64)
    counts = torch.bincount(index(chains.x), minlength=8)
    for model, follows in ((both, True), (rbm, False)):
        expected = n * model.log_prob(states).detach().softmax(0)
        chi_square = ((counts - expected).square() / expected).sum()
        assert (chi_square < 36.3) == follows, chi_square


def test_without_fast_weights_the_method_is_persistent_chains(rng):
    rbm = machine(rng)
    fast = FastPersistentChains(rbm, 20, fast_rate=1e-300, generator=rng(1))
    slow = PersistentChains(Plain(rbm), 20, generator=rng(1))
    for _ in range(3):
        torch.testing.assert_close(
            flat_grad(fast.loss(DATA), rbm), flat_grad(slow.loss(DATA), rbm), rtol=0, atol=1e-12
        )
        assert torch.equal(fast.x, slow.x)


@pytest.mark.parametrize("frozen", ["W", "b", "c"])
def test_fast_weights_leave_a_frozen_parameter_alone(frozen, rng):
    rbm, free = machine(rng), machine(rng)
    getattr(rbm, frozen).requires_grad_(False)
    chains, others = (
        FastPersistentChains(model, 20, fast_rate=0.3, decay=0.9, generator=rng(1))
        for model in (rbm, free)
    )
    of_frozen = torch.cat(
        [torch.full((p.numel(),), name == frozen) for name, p in rbm.named_parameters()]
    )
    loss = chains.loss(DATA)
    torch.testing.assert_close(loss, others.loss(DATA))
    assert torch.equal(chains.x, others.x)
    assert not chains.fast[of_frozen].any() and others.fast[of_frozen].any()
    torch.testing.assert_close(chains.fast[~of_frozen], others.fast[~of_frozen])
    for _ in range(2):  # from here the free machine's chains are pushed elsewhere
        rbm.zero_grad()
        loss.backward()
        free.zero_grad()
        two_phases(free, DATA, chains.x).backward()
        for (name, p), q in zip(rbm.named_parameters(), free.parameters(), strict=True):
            if name == frozen:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, q.grad)
        loss = chains.loss(DATA)
        assert not chains.fast[of_frozen].any() and chains.fast[~of_frozen].all()


def test_the_chains_follow_a_centred_machine_when_its_offsets_move(rng):
    """Recentring keeps the law; parameters without their offsets are another machine."""
    rbm = CentredRBM(3, 2, dtype=F64)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(2 * torch.randn(parameter.shape, generator=rng(0), dtype=F64) + 0.3)
    chains = FastPersistentChains(rbm, 1000, fast_rate=0.1, generator=rng(1))
    start = chains.x
    rbm.recentre(DATA, rate=1.0)
    chains.loss(DATA, generator=rng(2))  # there are no fast weights as yet
    assert torch.equal(chains.x, rbm.gibbs(start, generator=rng(2)))


# ---------------------------------------------------------------- a ladder of machines


def test_tempered_chains_in_equilibrium_give_the_exact_gradient(rng, ledger, monkeypatch):
    rbm, n = machine(rng), 50_000
    path, grads, exact = rbm.annealing_path(), state_grads(rbm), exact_gradient(rbm, DATA)

    def per_chain(num_steps):
        chains = TemperedChains(rbm, n, BETAS, generator=rng(1))
        chains.replicas = torch.stack(
            [
                exact_draws(lambda v, beta=beta: path.log_prob(v, beta), n, rng, 10 + i)
                for i, beta in enumerate(BETAS.tolist())
            ]
        )
        loss = chains.loss(DATA, num_steps)
        torch.testing.assert_close(loss, two_phases(rbm, DATA, chains.x))
        swap_prob.append(chains.swap_prob)
        return grads[index(chains.x)] - grads[index(DATA)].mean(0)

    swap_prob = []
    found = per_chain(3)
    assert ((swap_prob[0] > 0.03) & (swap_prob[0] < 0.97)).all()
    assert largest_z(found, exact) < LIMIT
    ledger(
        "tempered chains in equilibrium: gradient of W[0, 0]",
        exact=exact[0],
        estimate=found[:, 0].mean(),
        std_error=found[:, 0].std() / math.sqrt(n),
    )
    # negative control: every swap accepted
    from companion.objectives import persistent

    monkeypatch.setattr(
        persistent, "swap_step", lambda levels, active, u: swap_always(levels, active, u)
    )
    assert largest_z(per_chain(3), exact) > 20


def swap_always(levels, active, uniform):
    from companion.tempering import swap_step

    return swap_step(levels * 1e-3, active, uniform)


def test_tempered_chains_cross_where_plain_ones_do_not(rng):
    """Two modes of weights 3 : 1: untempered chains stay where they are, on either side."""
    rbm = RBM(8, 2, dtype=F64)
    with torch.no_grad():
        rbm.W[:, 0], rbm.b[:], rbm.c[:] = 8.0, -4.0, 0.0
        rbm.c[0] = -8.0 * 4 + math.log(3.0)  # all on is three times as likely as all off
        rbm.W[:, 1] = 0.0
    v = torch.ones(1, 8, dtype=F64)
    ones = torch.ones(400, 8, dtype=F64)
    plain = PersistentChains(rbm, 400, generator=rng(1))
    plain.x = ones
    betas = torch.linspace(0, 1, 12)
    tempered = TemperedChains(rbm, 400, betas, generator=rng(2))
    tempered.replicas = ones.expand(12, -1, -1)
    plain.loss(v, 300)
    tempered.loss(v, 300)
    exact = rbm.log_prob(binary_states(8, dtype=F64)).detach().softmax(0)
    on = exact[binary_states(8).mean(1) > 0.5].sum().item()
    assert plain.x.mean() > 0.95  # never left the mode they began in
    share = (tempered.x.mean(1) > 0.5).double().mean().item()
    assert abs(share - on) < 4.5 * math.sqrt(on * (1 - on) / 400), (share, on)
    assert on < 0.9


def test_a_ladder_of_one_rung_is_persistent_chains(rng):
    rbm = machine(rng)
    tempered = TemperedChains(rbm, 20, [1.0], generator=rng(1))
    slow = PersistentChains(Plain(rbm), 20, generator=rng(2))
    slow.x, slow.generator = tempered.x, rng(3)
    tempered.generator = rng(3)
    for _ in range(2):
        torch.testing.assert_close(tempered.loss(DATA, 2), slow.loss(DATA, 2))


# ---------------------------------------------------------------- all of them


def every_method(model, device, rng):
    return [
        PersistentChains(model, 6, generator=rng(1, device)),
        FastPersistentChains(model, 6, fast_rate=0.1, generator=rng(1, device)),
        TemperedChains(model, 6, BETAS.tolist(), generator=rng(1, device)),
    ]


def test_a_generator_takes_the_place_of_the_chains_own(rng):
    rbm, others = machine(rng), every_method(machine(rng), "cpu", rng)
    for chains, other in zip(every_method(rbm, "cpu", rng), others, strict=True):
        state, other.generator = chains.generator.get_state(), rng(5)
        chains.loss(DATA, 3, generator=rng(5))
        other.loss(DATA, 3)
        assert torch.equal(chains.x, other.x)
        assert torch.equal(chains.generator.get_state(), state)
    chains, other = every_method(rbm, "cpu", rng)[0], others[0]
    state, chains.x, other.generator = chains.generator.get_state(), other.x, rng(6)
    chains.update(DATA, 0.1, 3, generator=rng(6))
    other.update(DATA, 0.1, 3)
    assert torch.equal(chains.x, other.x) and torch.equal(flat(rbm), flat(other.model))
    assert torch.equal(chains.generator.get_state(), state)


def test_chains_go_on_where_a_saved_state_left_off(rng):
    rbm = machine(rng)
    for first, second in zip(
        every_method(rbm, "cpu", rng), every_method(rbm, "cpu", rng), strict=True
    ):
        first.loss(DATA)
        saved = {name: value.clone() for name, value in first.state_dict().items()}
        expected = first.loss(DATA)
        second.generator.manual_seed(99)
        second.load_state_dict(saved)
        torch.testing.assert_close(second.loss(DATA), expected, rtol=0, atol=0)
        assert torch.equal(first.x, second.x)
        with pytest.raises(ValueError, match="saved chains are"):
            type(first).load_state_dict(
                every_method(RBM(4, 2, dtype=F64), "cpu", rng)[0]
                if isinstance(first, PersistentChains)
                else second,
                {**saved, second._saved[0]: saved[second._saved[0]][..., :2]},
            )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_all_methods_follow_device_and_dtype_and_train_batches_of_machines(dtype, rng, device):
    batch = RBM(3, 2, batch_shape=(4,), generator=rng(0, device), dtype=dtype, device=device)
    for model in (machine(rng, dtype=dtype, device=device), batch):
        for chains in every_method(model, device, rng):
            with torch.device("meta") if device.type == "cpu" else device:
                loss = chains.loss(DATA.to(device), 2)
            assert loss.shape == () and loss.dtype == dtype and loss.device.type == device.type
            loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            assert chains.x.shape == (*model.batch_shape, 6, 3)


def test_bad_input_is_refused_before_any_chain_moves(rng):
    rbm = machine(rng)
    for chains in every_method(rbm, "cpu", rng):
        before = chains.x.clone()
        for bad in (DATA[:, :2], DATA.double() * 0.5, DATA[:0], DATA.double() * math.nan):
            with pytest.raises(ValueError, match="v "):
                chains.loss(bad)
        with pytest.raises(ValueError, match="num_steps must be at least 1"):
            chains.loss(DATA, 0)
        assert torch.equal(chains.x, before)
    with pytest.raises(ValueError, match="fast_rate"):
        FastPersistentChains(rbm, 6, fast_rate=-0.1)
    with pytest.raises(ValueError, match="decay"):
        FastPersistentChains(rbm, 6, fast_rate=0.1, decay=1.0)
    with pytest.raises(ValueError, match="betas must ascend"):
        TemperedChains(rbm, 6, [0.5, 0.2, 1.0])
    with pytest.raises(ValueError, match="num_chains must be at least 1"):
        TemperedChains(rbm, 0, [0.0, 1.0])
    assert pseudolikelihood(rbm, DATA).isfinite()
