"""Batches of machines, the fused contrastive step, and the centred machine."""

import copy
import math

import pytest
import torch

from companion.models.rbm import RBM, CentredRBM
from companion.objectives import contrastive_divergence, maximum_likelihood
from companion.objectives.contrastive import two_phases
from companion.testing import binary_states

F64 = torch.float64


def randomize(rbm, rng, seed=0):
    g = rng(seed, rbm.W.device)
    with torch.no_grad():
        for p in rbm.parameters():
            noise = torch.randn(p.shape, generator=g, device=p.device, dtype=torch.float64)
            p.copy_(noise + 0.2)
    return rbm


def grads(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


class Plain:
    """A machine that offers no more than the protocol."""

    def __init__(self, rbm):
        self.log_prob, self.gibbs, self.sample_base = rbm.log_prob, rbm.gibbs, rbm.sample_base


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("kind", [RBM, CentredRBM])
@pytest.mark.parametrize("sizes", [(5, 3), (3, 5)])
def test_a_batch_is_its_machines_side_by_side(kind, sizes, rng, ledger):
    batch = randomize(kind(*sizes, batch_shape=(2, 3), dtype=F64), rng)
    machines = batch.unbind()
    v = torch.randint(2, (2, 3, 7, sizes[0]), generator=rng(1))
    h = torch.randint(2, (2, 3, 7, sizes[1]), generator=rng(2))
    flat_v, flat_h = v.flatten(0, 1), h.flatten(0, 1)
    for method, given in (
        ("log_prob", (flat_v,)),
        ("free_energy", (flat_v,)),
        ("hidden_probs", (flat_v,)),
        ("visible_probs", (flat_h,)),
        ("energy", (flat_v, flat_h)),
    ):
        together = getattr(batch, method)(*(x.unflatten(0, (2, 3)) for x in given))
        apart = [getattr(m, method)(*(x[i] for x in given)) for i, m in enumerate(machines)]
        torch.testing.assert_close(together.flatten(0, 1), torch.stack(apart))
    exact = torch.stack([m.log_z().value for m in machines]).view(2, 3)
    torch.testing.assert_close(batch.log_z().value, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(batch.log_normalizer(), exact, rtol=0, atol=1e-12)
    ledger(
        f"log Z of a batch of machines, {kind.__name__} {sizes}",
        exact=exact[1, 2],
        estimate=batch.log_z().value[1, 2],
    )
    # the same rows for all machines
    torch.testing.assert_close(batch.log_prob(v[1, 2])[1, 2], batch.log_prob(v)[1, 2])


def test_each_machine_of_a_batch_gets_its_own_gradient(rng):
    batch = randomize(RBM(5, 3, batch_shape=(4,), dtype=F64), rng)
    v = torch.randint(2, (4, 6, 5), generator=rng(1))
    x = torch.randint(2, (4, 9, 5), generator=rng(2))
    for loss in (
        lambda model, v, x: maximum_likelihood(model, v),
        lambda model, v, x: two_phases(model, v, x),
    ):
        together = grads(loss(batch, v, x), batch)
        for i, member in enumerate(batch.unbind()):
            apart = grads(loss(member, v[i], x[i]), member)
            for a, b in zip(together, apart, strict=True):
                torch.testing.assert_close(a[i], b)


def test_a_batch_keeps_its_laws_under_gibbs_sampling_and_along_its_path(rng):
    batch = randomize(RBM(3, 2, batch_shape=(2,), dtype=F64), rng)
    states, n = binary_states(3, dtype=F64), 50_000
    weights = torch.tensor([4.0, 2.0, 1.0], dtype=F64)
    path = batch.annealing_path()
    assert path.base_log_z.shape == (2,) and path.sample_base(5).shape == (2, 5, 3)
    laws = {
        "gibbs": (lambda s: batch.log_prob(s), lambda x, g: batch.gibbs(x, 2, generator=g)),
        "path": (lambda s: path.log_prob(s, 0.6), lambda x, g: path.step(x, 0.6, generator=g)),
    }
    for log_prob, move in laws.values():
        pi = log_prob(states).detach().softmax(-1)
        start = states[torch.multinomial(pi, n, replacement=True, generator=rng(3))]
        end = (move(start, rng(4)) @ weights).long()
        counts = torch.stack([torch.bincount(row, minlength=8) for row in end])
        chi_square = ((counts - n * pi).square() / (n * pi)).sum(1)
        assert (chi_square < 36.3).all()  # 7 degrees of freedom: below 1e-5 for both
        swapped = ((counts.flip(0) - n * pi).square() / (n * pi)).sum(1)
        assert (swapped > 100).all()  # the other machine's law is told apart
    x = states.expand(2, -1, -1)
    torch.testing.assert_close(path.log_prob(x, 1.0), batch.log_prob(x))
    torch.testing.assert_close(path.profile(x)(0.3), path.log_prob(x, 0.3))


def test_a_batch_says_which_shapes_it_takes(rng):
    batch = RBM(5, 3, batch_shape=(4,), generator=rng(0))
    for bad in (torch.zeros(5), torch.zeros(3, 7, 5), torch.zeros(4, 1, 7, 5)):
        with pytest.raises(ValueError, match="for a batch of machines of shape"):
            batch.log_prob(bad)
    with pytest.raises(ValueError, match="batch_shape must be at least 1"):
        RBM(5, 3, batch_shape=(0,))
    assert "batch_shape=(4,)" in repr(batch)
    assert batch.unbind()[0].batch_shape == ()


def test_visible_biases_of_a_batch_come_from_the_data_of_each(rng):
    batch = RBM(5, 3, batch_shape=(4,), dtype=F64)
    v = torch.randint(2, (4, 50, 5), generator=rng(1))
    batch.init_visible_bias(v)
    single = RBM(5, 3, dtype=F64)
    single.init_visible_bias(v[2])
    torch.testing.assert_close(batch.b[2], single.b)
    batch.init_visible_bias(v[2])
    torch.testing.assert_close(batch.b, single.b.expand(4, -1))


@pytest.mark.parametrize("kind", [RBM, CentredRBM])
@pytest.mark.parametrize("batch_shape", [(3,), (2, 3)])
def test_visible_biases_pool_the_rows_of_further_dimensions(kind, batch_shape, rng):
    batch = randomize(kind(5, 3, batch_shape=batch_shape, dtype=F64), rng)
    v = torch.randint(2, (4, 2, *batch_shape, 50, 5), generator=rng(1))
    for data, n in ((v, 400), (v[1], 100)):
        rows = (-2, *range(data.ndim - 2 - len(batch_shape)))
        batch.init_visible_bias(data)
        exact = torch.logit((data.sum(rows).double() + 1) / (n + 2))
        torch.testing.assert_close(batch.b.detach(), exact)
    single = kind(5, 3, dtype=F64)
    single.init_visible_bias(v)
    exact = torch.logit((v.double().flatten(0, -2).sum(0) + 1) / (v.numel() / 5 + 2))
    torch.testing.assert_close(single.b.detach(), exact)


@pytest.mark.parametrize("kind", [RBM, CentredRBM])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2_100, 70_000])
def test_visible_biases_of_a_sixteen_bit_machine_are_exact_but_for_rounding(kind, dtype, n, device):
    """16 bits hold neither a count of so many rows nor a share so close to 1."""
    counts = torch.tensor([0, n, n // 3, 1], device=device)  # never, always, at times and once
    v = torch.arange(n, device=device)[:, None] < counts
    rbm = kind(4, 3, dtype=dtype, device=device)
    rbm.init_visible_bias(v)
    exact = torch.logit((counts.double() + 1) / (n + 2))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(rbm.b.detach().double(), exact, rtol=1.5 * eps, atol=0)


@pytest.mark.parametrize("kind", [RBM, CentredRBM])
@pytest.mark.parametrize("batch_shape", [(), (2, 3)])
def test_taking_a_batch_apart_leaves_the_global_generator_alone(kind, batch_shape, device):
    batch = kind(5, 3, batch_shape=batch_shape, device=device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.rand(3, device=device)
        torch.manual_seed(0)
        batch.unbind()
        assert torch.equal(torch.rand(3, device=device), expected)


# ---------------------------------------------------------------- the fused step


@pytest.mark.parametrize("kind", [RBM, CentredRBM])
@pytest.mark.parametrize("batch_shape", [(), (3,)])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_fused_step_is_the_general_route(kind, batch_shape, num_steps, rng, device):
    rbm = randomize(kind(6, 4, batch_shape=batch_shape, dtype=F64, device=device), rng)
    for shape in ((8, 6), (*batch_shape, 8, 6), (2, *batch_shape, 8, 6)):
        v = torch.randint(2, shape, generator=rng(1)).to(device)
        fused = contrastive_divergence(rbm, v, num_steps, generator=rng(2, device))
        general = contrastive_divergence(Plain(rbm), v, num_steps, generator=rng(2, device))
        if len(shape) == 2 and batch_shape:  # the general route draws the same noise for all rows
            x = rbm.contrastive_step(v, num_steps, generator=rng(2, device))[1]
            general = two_phases(rbm, v, x)
        torch.testing.assert_close(fused, general)
        for a, b in zip(grads(-3.0 * fused, rbm), grads(-3.0 * general, rbm), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_shape", [(), (3,)])
def test_the_fused_step_goes_on_from_the_hidden_units_it_returned(batch_shape, rng):
    rbm = randomize(RBM(6, 4, batch_shape=batch_shape, dtype=F64), rng)
    v = torch.randint(2, (8, 6), generator=rng(1))
    _, x, probs = rbm.contrastive_step(v, generator=rng(2))
    torch.testing.assert_close(probs, rbm.hidden_probs(x).detach())
    loss, after, _ = rbm.contrastive_step(v[:3], 1, probs, generator=rng(3))
    torch.testing.assert_close(after, rbm.gibbs(x, generator=rng(3)))
    # three rows and eight chains: each phase is divided by its own number
    general = two_phases(rbm, v[:3], after)
    torch.testing.assert_close(loss, general)
    for a, b in zip(grads(loss, rbm), grads(general, rbm), strict=True):
        torch.testing.assert_close(a, b)
    assert not after.requires_grad and not probs.requires_grad


def test_the_fused_step_notices_particles_that_were_changed_before_backward(rng):
    rbm = randomize(RBM(6, 4, dtype=F64), rng)
    v = torch.randint(2, (8, 6), generator=rng(1)).double()
    for changed in range(2):
        loss, x, _ = rbm.contrastive_step(v, generator=rng(2))
        (x, v)[changed].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("kind", [RBM, CentredRBM])
@pytest.mark.parametrize("batch_shape", [(), (3,)])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_update_is_the_loss_and_a_step_of_gradient_descent(
    kind, batch_shape, num_steps, rng, device
):
    """Twice in a row, the second time from the hidden units that the first returned."""
    rbm, other = (
        randomize(kind(6, 4, batch_shape=batch_shape, dtype=F64, device=device), rng)
        for _ in range(2)
    )
    optimizer = torch.optim.SGD(other.parameters(), lr=0.3)
    for shape in ((8, 6), (*batch_shape, 8, 6), (2, *batch_shape, 8, 6)):
        v = torch.randint(2, shape, generator=rng(1)).to(device)
        probs = None
        for rows in (v, v[..., :3, :]):  # then three rows and eight chains
            x, next_probs = rbm.contrastive_update(
                rows, 0.3, num_steps, probs, generator=rng(2, device)
            )
            loss, same_x, same_probs = other.contrastive_step(
                rows, num_steps, probs, generator=rng(2, device)
            )
            before = [p.detach().clone() for p in other.parameters()]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert torch.equal(x, same_x)
            torch.testing.assert_close(next_probs, same_probs)
            for p, q, start in zip(rbm.parameters(), other.parameters(), before, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
                assert (p - start).abs().max() > 1e-3
                assert p.grad is None
            probs = next_probs


@pytest.mark.parametrize(
    ("num_visible", "num_hidden", "n"), [(90, 80, 80), (784, 4, 10_000), (6, 4, 2_000)]
)
def test_an_update_in_single_precision_rounds_a_few_times(num_visible, num_hidden, n, rng, device):
    """Not once for each row, as rows do that are added to a weight or a bias one by one."""
    rbm = randomize(RBM(num_visible, num_hidden, device=device), rng)
    v = torch.randint(2, (n, num_visible), generator=rng(1)).to(device)
    exact, by_loss = copy.deepcopy(rbm).double(), copy.deepcopy(rbm)
    x, _ = rbm.contrastive_update(v, 0.3, generator=rng(2, device))
    two_phases(exact, v, x.double()).backward()
    for p, q in zip(rbm.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q - 0.3 * q.grad, rtol=0, atol=2e-6)
    exact.zero_grad()
    loss, x, _ = by_loss.contrastive_step(v, generator=rng(2, device))
    loss.backward()
    two_phases(exact, v, x.double()).backward()
    for p, q in zip(by_loss.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(0.3 * p.grad.double(), 0.3 * q.grad, rtol=0, atol=2e-6)


def assert_nothing_changes(rbm, g, error, message, **arguments):
    before, state = copy.deepcopy(rbm.state_dict()), g.get_state()
    with pytest.raises(error, match=message):
        rbm.contrastive_update(**arguments, generator=g)
    assert torch.equal(g.get_state(), state)
    for name, x in rbm.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)


def test_an_update_that_cannot_be_made_changes_nothing(rng):
    rbm, g = randomize(RBM(6, 4), rng), rng(1)
    v = torch.randint(2, (8, 6), generator=g)
    for bad, message in (
        ({"rate": 0.0}, "rate must be a finite number above 0"),
        ({"rate": math.inf}, "rate must be a finite number above 0"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"v": v[:, :5]}, "v must have shape"),
        ({"v": 2 * v}, "zeros and ones only"),
        ({"v": v[0]}, r"v must be a matrix \(n, 6\), got \(6,\)"),
    ):
        arguments = {"v": v, "rate": 0.1} | bad
        assert_nothing_changes(rbm, g, ValueError, message, **arguments)


@pytest.mark.parametrize("kind", [RBM, CentredRBM])
@pytest.mark.parametrize("batch_shape", [(), (2,)])
def test_an_update_of_a_broken_machine_changes_nothing(kind, batch_shape, rng):
    """Whichever number is broken, even where the data's hidden units are on for certain."""
    rbm, g = randomize(kind(4, 3, batch_shape=batch_shape), rng), rng(1)
    on = copy.deepcopy(rbm)
    with torch.no_grad():
        list(on.parameters())[2].fill_(1e4)
    some, ones = torch.randint(2, (8, 4), generator=g), torch.ones(8, 4)
    assert (on.hidden_probs(ones) == 1).all()
    for machine, v in ((rbm, some), (on, ones)):
        for parameter in machine.parameters():
            entries = parameter.data.view(-1)
            for i in range(len(entries)):
                for value in (math.nan, math.inf, -math.inf):
                    good, entries[i] = entries[i].item(), value
                    what = FloatingPointError, "no update was made"
                    assert_nothing_changes(machine, g, *what, v=v, rate=0.1)
                    entries[i] = good
        machine.contrastive_update(v, 0.1, generator=g)  # mended


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_hidden_units_that_no_call_returned_are_refused(dtype, rng):
    rbm, g, state = RBM(6, 4, dtype=dtype), rng(1), rng(1).get_state()
    v = torch.randint(2, (8, 6), generator=rng(2))
    other = F64 if dtype == torch.float32 else torch.float32
    for probs, got in (
        (torch.full((4,), 0.5, dtype=dtype), r"got \(4,\)"),
        (torch.full((8, 3), 0.5, dtype=dtype), r"got \(8, 3\)"),
        (torch.full((8, 4), 0.5, dtype=other), f"got .* of {other}"),
        (torch.ones(8, 4, dtype=torch.int64), "of torch.int64"),
    ):
        arguments = {"v": v, "num_steps": 1, "hidden_probs": probs}
        message = rf"hidden_probs must be \(\.\.\., m, 4\) of {dtype}.*{got}"
        assert_nothing_changes(rbm, g, ValueError, message, rate=0.1, **arguments)
        with pytest.raises(ValueError, match=message):
            rbm.contrastive_step(**arguments, generator=g)
        assert torch.equal(g.get_state(), state)


@pytest.mark.parametrize("batch_shape", [(), (3,)])
def test_an_update_by_sixteen_bit_products_is_the_loss_and_a_step(batch_shape, rng):
    rbm, other = (randomize(RBM(60, 40, batch_shape=batch_shape), rng) for _ in range(2))
    v = torch.randint(2, (500, 60), generator=rng(1))
    with torch.autocast("cpu", torch.bfloat16):
        x, _ = rbm.contrastive_update(v, 0.5, generator=rng(2))
        loss, same, _ = other.contrastive_step(v, generator=rng(2))
    loss.backward()
    assert torch.equal(x, same)
    for p, q in zip(rbm.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.5 * q.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_shape", [(), (3,)])
def test_sixteen_bit_products_change_the_gradient_by_rounding_only(batch_shape, rng):
    """Under autocast the products are in bfloat16; noise and parameters stay in float32."""
    rbm = randomize(RBM(60, 40, batch_shape=batch_shape), rng)
    with torch.no_grad():
        rbm.W.mul_(0.2)
    v = torch.randint(2, (500, 60), generator=rng(1))
    with torch.autocast("cpu", torch.bfloat16):
        loss, x, _ = rbm.contrastive_step(v, generator=rng(2))
    loss.backward()
    assert rbm.W.grad.dtype == torch.float32
    exact = grads(two_phases(rbm, v, x.float()), rbm)
    for p, g in zip(rbm.parameters(), exact, strict=True):
        assert (p.grad - g).abs().max() < 0.01
    assert set(x.unique().tolist()) == {0.0, 1.0}


def test_rare_units_of_a_sixteen_bit_machine_are_as_rare_as_they_should_be(rng):
    rbm = RBM(20, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        rbm.b.fill_(math.log(0.0005 / 0.9995))
    n = 50_000 * 20
    share = rbm.sample_base(50_000, generator=rng(0)).double().mean().item()
    p = torch.sigmoid(rbm.b)[0].item()
    assert abs(share - p) < 4.5 * math.sqrt(p / n)
    # negative control: uniform numbers of 16 bits are multiples of 1/256
    coarse = (torch.rand(50_000, 20, generator=rng(0), dtype=torch.bfloat16) < p).double().mean()
    assert abs(coarse.item() - p) > 20 * math.sqrt(p / n)


# ---------------------------------------------------------------- centring


def test_a_centred_machine_is_the_plain_machine_with_other_biases(rng, ledger):
    centred = randomize(CentredRBM(4, 3, dtype=F64), rng)
    with torch.no_grad():
        centred.visible_offset.copy_(torch.tensor([0.1, 0.9, 0.4, 0.6]))
        centred.hidden_offset.copy_(torch.tensor([0.2, 0.7, 0.5]))
    vs, hs = binary_states(4, dtype=F64), binary_states(3, dtype=F64)
    mu, lam = centred.visible_offset, centred.hidden_offset
    minus_energy = (
        ((vs - mu) @ centred.centred_b)[:, None]
        + ((hs - lam) @ centred.centred_c)[None]
        + (vs - mu) @ centred.W @ (hs - lam).T
    ).detach()
    joint = minus_energy.flatten().softmax(0).view(16, 8)
    law = (centred.log_prob(vs) - centred.log_z().value).exp().detach()
    torch.testing.assert_close(joint.sum(1), law)
    ledger("centred RBM: probability of one state", exact=joint.sum(1)[5], estimate=law[5])


def test_recentring_moves_the_offsets_and_not_the_law(rng):
    centred = randomize(CentredRBM(4, 3, batch_shape=(2,), dtype=F64), rng)
    vs = binary_states(4, dtype=F64)
    before = centred.log_prob(vs) - centred.log_z().value[:, None]
    v = torch.randint(2, (2, 30, 4), generator=rng(1))
    centred.recentre(v, rate=1.0)
    torch.testing.assert_close(centred.visible_offset, v.double().mean(1))
    torch.testing.assert_close(centred.hidden_offset, centred.hidden_probs(v).mean(1).detach())
    torch.testing.assert_close(centred.log_prob(vs) - centred.log_z().value[:, None], before)
    with pytest.raises(ValueError, match="rate"):
        centred.recentre(v, rate=0.0)


def test_recentring_on_a_vector_is_refused_and_moves_nothing(rng):
    centred = randomize(CentredRBM(4, 3, dtype=F64), rng)
    before = copy.deepcopy(centred.state_dict())
    with pytest.raises(ValueError, match=r"v must be a matrix \(n, 4\), got \(4,\)"):
        centred.recentre(torch.tensor([1, 0, 1, 1]))
    assert all(torch.equal(x, before[name]) for name, x in centred.state_dict().items())


@pytest.mark.parametrize("batch_shape", [(), (2,)])
def test_visible_biases_from_data_are_those_of_the_plain_machine(batch_shape, rng):
    """Whatever the weights and the hidden units' offsets: b, and not b', is the log-odds."""
    centred = randomize(CentredRBM(4, 3, batch_shape=batch_shape, dtype=F64), rng)
    with torch.no_grad():
        centred.hidden_offset.copy_(torch.tensor([0.2, 0.9, 0.4]))
    v = torch.randint(2, (30, 4), generator=rng(1))
    centred.init_visible_bias(v, smoothing=0.5)
    p = (v.double().sum(0) + 0.5) / 31
    torch.testing.assert_close(centred.b.detach(), p.logit().expand_as(centred.b))
    torch.testing.assert_close(centred.visible_offset, p.expand_as(centred.b))
    assert (centred.centred_b - p.logit()).abs().min() > 0.01


def test_the_centred_gradient_of_the_weights_is_a_difference_of_covariances(rng, ledger):
    centred = randomize(CentredRBM(4, 3, dtype=F64), rng)
    v = torch.randint(2, (30, 4), generator=rng(1))
    centred.recentre(v, rate=1.0)
    g_weights, g_b, _ = grads(maximum_likelihood(centred, v), centred)
    vs, mu, lam = binary_states(4, dtype=F64), centred.visible_offset, centred.hidden_offset
    pi = (centred.log_prob(vs) - centred.log_z().value).exp().detach()
    data = v.double()

    def moment(weights, x):
        hidden = centred.hidden_probs(x).detach()
        return torch.einsum("n,ni,nj->ij", weights, x - mu, hidden - lam)

    share = data.new_full((30,), 1 / 30)
    exact = moment(pi, vs) - moment(share, data)
    torch.testing.assert_close(g_weights, exact)
    ledger("centred RBM: gradient of W[0, 0]", exact=exact[0, 0], estimate=g_weights[0, 0])
    torch.testing.assert_close(g_b, pi @ vs - data.mean(0))
    plain = RBM(4, 3, dtype=F64)
    with torch.no_grad():
        for name in ("W", "b", "c"):
            getattr(plain, name).copy_(getattr(centred, name))
    assert (grads(maximum_likelihood(plain, v), plain)[0] - exact).abs().max() > 0.01


def test_centred_learning_does_not_see_which_state_is_called_one(rng):
    """A gradient step on data and on their complement leads to complementary laws."""

    def after_a_step(kind, v, flip):
        rbm = randomize(kind(4, 3, dtype=F64), rng)
        plain = [x.detach().clone() for x in (rbm.W, rbm.b, rbm.c)]
        if flip:  # the machine of 1 - v: W -> -W, b -> -b, c -> c + sum_i W_i
            plain = [-plain[0], -plain[1], plain[2] + plain[0].sum(0)]
        with torch.no_grad():
            rbm.W.copy_(plain[0])
            if kind is CentredRBM:
                rbm.visible_offset.copy_(v.double().mean(0))
                rbm.hidden_offset.fill_(0.3)
                rbm.centred_b.copy_(plain[1] + plain[0] @ rbm.hidden_offset)
                rbm.centred_c.copy_(plain[2] + rbm.visible_offset @ plain[0])
            else:
                rbm.b.copy_(plain[1])
                rbm.c.copy_(plain[2])
        for p, g in zip(rbm.parameters(), grads(maximum_likelihood(rbm, v), rbm), strict=True):
            p.data.sub_(0.5 * g)
        states = binary_states(4, dtype=F64)
        return (rbm.log_prob(states) - rbm.log_z().value).exp().detach()

    v = torch.randint(2, (30, 4), generator=rng(1))
    for kind, same in ((CentredRBM, True), (RBM, False)):
        law, flipped = after_a_step(kind, v, False), after_a_step(kind, 1 - v, True)
        assert torch.allclose(law, flipped.flip(0), atol=1e-10) == same


def test_an_update_takes_large_weights_in_sixteen_bits(rng):
    rbm = RBM(784, 500, dtype=torch.float16, generator=rng(0))
    with torch.no_grad():
        rbm.W.fill_(0.2)  # their sum is above the largest float16
    v = torch.randint(2, (3, 784), generator=rng(1))
    x, _ = rbm.contrastive_update(v, 0.1, generator=rng(2))
    assert x.shape == v.shape and bool(rbm.W.isfinite().all())
