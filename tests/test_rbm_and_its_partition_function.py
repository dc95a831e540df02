"""What the chapter on the RBM and its partition function states, beyond what the models' own tests
check: what pairs can and cannot represent, equal machines, hidden units placed by hand, Hessians.

Everything is an identity on enumerable machines, held against another way to compute it; each is
accompanied by a plausible mistake that it rejects.
"""

import copy
import math

import pytest
import torch
from torch import Tensor

from companion.data import bars_and_stripes
from companion.models.boltzmann import BoltzmannMachine
from companion.models.rbm import RBM
from companion.objectives import maximum_likelihood
from companion.testing import binary_states, exact_distribution

F64 = torch.float64


def divergence(p: Tensor, q: Tensor) -> float:
    return float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum())


def random_rbm(rng, seed=0, num_visible=4, num_hidden=3) -> RBM:
    g = rng(seed)
    rbm = RBM(num_visible, num_hidden, generator=g, dtype=F64)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=F64))
    return rbm


def log_law(rbm: RBM) -> Tensor:
    with torch.no_grad():
        return rbm.log_prob(binary_states(rbm.num_visible, dtype=F64)) - rbm.log_z().value


# ---------------------------------------------------------------- pairs


def pair_statistics(states: Tensor) -> Tensor:
    pairs = torch.combinations(torch.arange(states.shape[1]))
    return torch.cat([states[:, pairs[:, 0]] * states[:, pairs[:, 1]], states], 1)


@pytest.mark.parametrize("num_bits", [3, 4, 5])
def test_to_visible_machines_parity_is_noise(num_bits, rng, ledger):
    states = binary_states(num_bits, dtype=F64)
    even = states.sum(1) % 2 == 0
    p = even.double() / even.sum()
    statistics = pair_statistics(states)
    # the coins have the moments of the law, so they are where the concave likelihood is highest
    torch.testing.assert_close(p @ statistics, statistics.mean(0), rtol=0, atol=1e-14)
    coins = torch.full_like(p, 1 / len(p))
    ledger(
        f"KL of parity of {num_bits} bits to fair coins",
        exact=math.log(2),
        estimate=divergence(p, coins),
    )
    others = [
        exact_distribution(random_boltzmann(num_bits, rng, s).log_prob, num_bits, dtype=F64)
        for s in range(50)
    ]
    assert min(divergence(p, q) for q in others) > math.log(2)
    # a term for all bits together sees it
    sign = 1 - 2 * (states.sum(1) % 2)
    assert divergence(p, (20 * sign).softmax(0)) < 1e-8


def random_boltzmann(num_units, rng, seed):
    g = rng(seed)
    machine = BoltzmannMachine(num_units, generator=g, dtype=F64)
    with torch.no_grad():
        for parameter in machine.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=F64))
    return machine


def bars_machine(side, strength, repulsion=-1.0):
    line = torch.arange(side * side)
    row, column = line // side, line % side
    aligned = (row[:, None] == row) | (column[:, None] == column)
    machine = BoltzmannMachine(side * side, dtype=F64)
    with torch.no_grad():
        machine.J.copy_(4 * strength * torch.where(aligned, side - 1.0, repulsion).double())
        machine.b.copy_(-machine.couplings.sum(1) / 2)  # spins -1 and +1 are alike
    return machine


@pytest.mark.parametrize("side", [2, 3, 4])
def test_bars_and_stripes_are_the_ground_states_of_pairs(side):
    machine = bars_machine(side, 1.0)
    torch.testing.assert_close(
        machine.b.detach(), torch.full((side * side,), -2.0 * (side - 1) ** 2, dtype=F64)
    )
    states = binary_states(side * side, dtype=F64)
    with torch.no_grad():
        energy = machine.energy(states)
    lowest = states[energy < energy.min() + 1e-9]
    legal = bars_and_stripes(side, dtype=F64)
    assert {tuple(v) for v in lowest.tolist()} == {tuple(v) for v in legal.tolist()}
    if side > 2:  # without the repulsion only the two constant pictures are lowest
        with torch.no_grad():
            energy = bars_machine(side, 1.0, repulsion=0.0).energy(states)
        assert (energy < energy.min() + 1e-9).sum() == 2


# ---------------------------------------------------------------- the gradient


def test_the_gradient_is_a_difference_of_two_correlations(rng):
    rbm, states = random_rbm(rng), binary_states(4, dtype=F64)
    data = states[[1, 5, 6, 15, 15]]
    maximum_likelihood(rbm, data).backward()
    p = log_law(rbm).exp()
    with torch.no_grad():
        on_data, on_all = rbm.hidden_probs(data), rbm.hidden_probs(states)
    positive = (data.T @ on_data / len(data), data.mean(0), on_data.mean(0))
    negative = (states.T @ (p[:, None] * on_all), p @ states, p @ on_all)
    for parameter, up, down in zip((rbm.W, rbm.b, rbm.c), positive, negative, strict=True):
        torch.testing.assert_close(-parameter.grad, up - down, rtol=0, atol=1e-12)
        assert (-parameter.grad - up).abs().max() > 0.05  # log Z is not a constant


# ---------------------------------------------------------------- hidden units


def placed(p: Tensor, log_m: float, steepness: float) -> RBM:
    """The machine of the theorem, for a law over the states of its visible units."""
    num_bits = int(math.log2(len(p)))
    states = binary_states(num_bits, dtype=F64)[p > 0]
    rbm = RBM(num_bits, len(states), dtype=F64)
    lift = (math.exp(log_m) * p[p > 0] - 1).log()
    with torch.no_grad():
        rbm.W.copy_(steepness * (states - 0.5).T)
        rbm.c.copy_(lift - (rbm.W.T * states).sum(1))
    return rbm


@pytest.mark.parametrize("log_m", [4.0, 8.0, 14.0])
def test_hidden_units_can_be_placed_on_any_law(log_m, rng, ledger):
    index = torch.randperm(16, generator=rng(0))[:5]
    p = torch.zeros(16, dtype=F64)
    p[index] = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=F64)
    exact = math.log1p((16 - 5) * math.exp(-log_m))
    found = divergence(p, log_law(placed(p, log_m, 400.0)).exp())
    name = f"KL of five hidden units placed by hand, log M = {log_m:.0f}"
    ledger(name, exact=exact, estimate=found, tolerance=1e-8)
    # not steep enough: the lift of a state spills over to its neighbours
    assert divergence(p, log_law(placed(p, log_m, 2.0)).exp()) > exact + 0.1


def test_permuted_and_flipped_hidden_units_give_the_same_law(rng):
    rbm = random_rbm(rng)
    law, log_z = log_law(rbm), rbm.log_z().value
    order = torch.tensor([2, 0, 1])
    which = torch.tensor([True, False, True])
    sign = torch.where(which, -1.0, 1.0).double()
    twin, forgot = RBM(4, 3, dtype=F64), RBM(4, 3, dtype=F64)
    with torch.no_grad():
        for other in (twin, forgot):
            other.W.copy_((rbm.W * sign)[:, order])
            other.c.copy_((rbm.c * sign)[order])
            other.b.copy_(rbm.b)
        twin.b += rbm.W[:, which].sum(1)
    torch.testing.assert_close(log_law(twin), law, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_z - twin.log_z().value, rbm.c[which].sum().detach())
    assert (log_law(forgot) - law).abs().max() > 0.1


def test_equal_hidden_units_have_equal_gradients_and_none_at_zero_weights(rng):
    data = binary_states(4, dtype=F64)[[1, 5, 6, 15]]
    rbm = random_rbm(rng)
    with torch.no_grad():
        rbm.W.copy_(rbm.W[:, :1].expand(-1, 3))
        rbm.c.fill_(0.3)
    maximum_likelihood(rbm, data).backward()
    torch.testing.assert_close(rbm.W.grad, rbm.W.grad[:, :1].expand(-1, 3), rtol=0, atol=1e-14)
    assert rbm.W.grad.abs().max() > 0.01
    rbm.zero_grad()
    with torch.no_grad():
        rbm.W.zero_()
    with torch.no_grad():
        rbm.b.copy_(torch.logit(data.mean(0).clamp(1e-3, 1 - 1e-3)))
    maximum_likelihood(rbm, data).backward()
    assert rbm.W.grad.abs().max() < 1e-14


# ---------------------------------------------------------------- Hessians


def covariance(weights: Tensor, statistics: Tensor) -> Tensor:
    mean = weights @ statistics
    return (statistics.T * weights) @ statistics - torch.outer(mean, mean)


def test_the_hessian_is_minus_the_covariance_without_hidden_units(rng):
    states = binary_states(4, dtype=F64)
    statistics = pair_statistics(states)
    data = statistics[[1, 5, 6, 15, 15]]
    eta = torch.randn(10, generator=rng(0), dtype=F64)

    def log_likelihood(eta):
        return (data @ eta).mean() - (statistics @ eta).logsumexp(0)

    hessian = torch.autograd.functional.hessian(log_likelihood, eta)
    exact = covariance((statistics @ eta).softmax(0), statistics)
    torch.testing.assert_close(hessian, -exact, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(hessian).max() < 0  # strictly: no two parameters do the same
    second_moment = (statistics.T * (statistics @ eta).softmax(0)) @ statistics
    assert (hessian + second_moment).abs().max() > 0.05  # the means have to be subtracted


def test_the_hessian_with_hidden_units_is_a_difference_of_covariances(rng):
    v, h = binary_states(3, dtype=F64), binary_states(2, dtype=F64)
    v_all, h_all = v.repeat_interleave(4, 0), h.repeat(8, 1)
    products = (v_all[:, :, None] * h_all[:, None, :]).flatten(1)
    s = torch.cat([products, v_all, h_all], 1)  # (8 * 4, 11)
    eta = torch.randn(11, generator=rng(1), dtype=F64)
    rows = torch.tensor([1, 6, 6, 7])

    def log_likelihood(eta):
        joint = (s @ eta).view(8, 4)
        return joint.logsumexp(1)[rows].mean() - joint.flatten().logsumexp(0)

    hessian = torch.autograd.functional.hessian(log_likelihood, eta)
    joint = (s @ eta).view(8, 4)
    given = sum(covariance(joint[i].softmax(0), s.view(8, 4, 11)[i]) for i in rows.tolist()) / 4
    exact = given - covariance(joint.flatten().softmax(0), s)
    torch.testing.assert_close(hessian, exact, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(hessian).max() > 0.01  # not concave
    # the gradient field is the machine's own: the companion's loss agrees at this point
    rbm = RBM(3, 2, dtype=F64)
    with torch.no_grad():
        rbm.W.copy_(eta[:6].view(3, 2))
        rbm.b.copy_(eta[6:9])
        rbm.c.copy_(eta[9:])
    torch.testing.assert_close(maximum_likelihood(rbm, v[rows]), -log_likelihood(eta))


@pytest.mark.parametrize("num_hidden", [1, 3])
def test_halfway_between_a_machine_and_its_flipped_twin_the_likelihood_is_lower(rng, num_hidden):
    data = torch.tensor([[0, 0, 0], [1, 1, 1]])
    machine = RBM(3, num_hidden, generator=rng(2), dtype=F64)
    with torch.no_grad():  # the first unit joins the pixels, the others do little
        machine.W[:, 0], machine.c[0], machine.b[:] = 6.0, -9.0, -3.0
    twin, middle = copy.deepcopy(machine), RBM(3, num_hidden, dtype=F64)
    with torch.no_grad():
        twin.W.neg_()
        twin.c.neg_()
        twin.b += machine.W.sum(1)
        for half, one, other in zip(
            *(m.parameters() for m in (middle, machine, twin)), strict=True
        ):
            half.copy_((one + other) / 2)
        at, of_twin, halfway = (-maximum_likelihood(m, data) for m in (machine, twin, middle))
    assert of_twin.item() == pytest.approx(at.item(), abs=1e-12)
    assert at > -math.log(2) - 0.2
    assert middle.W.abs().max() == middle.c.abs().max() == 0  # so its units are independent
    assert halfway <= independent(data) + 1e-12


def independent(data: Tensor) -> float:
    """The mean log-likelihood of the best law of independent units, here of fair coins."""
    share = data.double().mean(0)
    return float((torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)).sum())
