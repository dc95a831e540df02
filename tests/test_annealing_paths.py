"""The paths of the RBM and the Ising model: exact kernels at every beta, by enumeration."""

import math

import pytest
import torch

from companion.core import AnnealingPath, Kernel
from companion.mcmc.base import GibbsState
from companion.models.ising import Ising
from companion.models.rbm import RBM
from companion.tempering import advance, profile
from companion.testing import (
    binary_states,
    detailed_balance_error,
    reversal,
    stationary_error,
    transition_matrix,
)

F64 = torch.float64
BETAS = [0.0, 0.3, 1.0]


def machine(rng, device="cpu", dtype=F64):
    """An asymmetric machine of 4 + 3 units, and a base bias that is not its own."""
    g = rng(0)
    rbm = RBM(4, 3, dtype=F64)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=F64, generator=g) + 0.2)
    bias = torch.randn(4, dtype=F64, generator=g)
    return rbm.to(dtype=dtype, device=device), bias.to(dtype=dtype, device=device)


def spins(height, width, device="cpu", dtype=F64):
    states = 2.0 * binary_states(height * width, device=device, dtype=dtype) - 1.0
    return states.reshape(-1, height, width)


def path_and_states(name, rng, device="cpu", dtype=F64):
    if "ising" in name:
        width = 2 if name == "small ising" else 4
        model = Ising(2, width, coupling=0.4, field=0.15, device=device, dtype=dtype)
        return model.annealing_path(), spins(2, width, device, dtype)
    rbm, bias = machine(rng, device, dtype)
    path = rbm.annealing_path(bias if name == "rbm from a bias" else None)
    return path, binary_states(4, device=device, dtype=dtype)


def as_kernel(step, beta):
    return Kernel(
        lambda x: GibbsState(x),
        lambda state, *, generator: (GibbsState(step(state.x, beta, generator=generator)), None),
    )


NAMES = ["rbm", "rbm from a bias", "ising"]


@pytest.mark.parametrize("name", NAMES)
def test_paths_lead_from_their_base_to_the_model(rng, device, name, ledger):
    path, states = path_and_states(name, rng, device)
    assert isinstance(path, AnnealingPath)
    target = path.model if name == "ising" else path.rbm
    torch.testing.assert_close(path.log_prob(states, 1.0), target.log_prob(states).detach())
    base = path.log_prob(states, 0.0).logsumexp(0)
    ledger(f"log Z of the base, {name}", exact=base, estimate=path.base_log_z)
    assert path.base_log_z.dtype == F64
    # independent units: the law at beta = 0 is the product of its marginals
    probs = path.log_prob(states, 0.0).softmax(0)
    up = (states > 0).to(F64).flatten(1)
    marginals = probs @ up
    product = (up * marginals + (1 - up) * (1 - marginals)).prod(1)
    torch.testing.assert_close(probs, product)


@pytest.mark.parametrize("beta", BETAS)
def test_a_machine_without_a_base_bias_has_its_energy_tempered(rng, device, beta):
    path, states = path_and_states("rbm", rng, device)
    hidden = binary_states(3, device=device, dtype=F64)
    pairs = states[:, None].expand(-1, len(hidden), -1), hidden.expand(len(states), -1, -1)
    exact = (-beta * path.rbm.energy(*pairs)).logsumexp(1).detach()
    torch.testing.assert_close(path.log_prob(states, beta), exact)
    if beta == 0.3:  # beta times the free energy is another law
        assert (beta * path.rbm.log_prob(states) - exact).detach().std() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_base_draws_follow_the_base(rng, device, name):
    path, states = path_and_states(name, rng, device)
    n = 20_000
    x = path.sample_base(n, generator=rng(1, device))
    assert x.shape == (n, *states.shape[1:]) and x.dtype == states.dtype
    probs = path.log_prob(states, 0.0).softmax(0)
    up = (states > 0).to(F64).flatten(1)
    p = probs @ up
    z = ((x > 0).to(F64).flatten(1).mean(0) - p) / (p * (1 - p) / n).sqrt()
    assert z.abs().max() < 5.0  # Bonferroni over at most 8 sites: below 5e-6
    at_target = path.log_prob(states, 1.0).softmax(0) @ up  # the model's own units would be seen
    assert ((at_target - p).abs() / (p * (1 - p) / n).sqrt()).max() > 10.0


INVARIANT = [("rbm from a bias", beta) for beta in BETAS]
INVARIANT += [("rbm", 0.3), ("ising", 0.3)]  # both are dear, and nothing of theirs depends on beta
INVARIANT += [("small ising", beta) for beta in BETAS]


@pytest.mark.parametrize(("name", "beta"), INVARIANT)
def test_steps_leave_every_density_of_the_path_invariant(rng, device, name, beta):
    path, states = path_and_states(name, rng, device)
    pi = path.log_prob(states, beta).softmax(0)
    there = transition_matrix(as_kernel(path.step, beta), states)
    assert stationary_error(there, pi) < 1e-12
    other = path.log_prob(states, beta + (0.3 if beta < 1 else -0.3)).softmax(0)
    assert stationary_error(there, other) > 1e-3  # the density at another beta is not
    back = there
    if "ising" in name:
        back = transition_matrix(as_kernel(path.reverse_step, beta), states)
    torch.testing.assert_close(back, reversal(there, pi), rtol=0, atol=1e-12)


def test_a_checkerboard_sweep_is_not_its_own_reversal(rng):
    path, states = path_and_states("small ising", rng)
    pi = path.log_prob(states, 1.0).softmax(0)
    assert detailed_balance_error(transition_matrix(as_kernel(path.step, 1.0), states), pi) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_betas_gives_every_replica_its_own(rng, device, name):
    path, states = path_and_states(name, rng, device)
    betas = torch.tensor([0.0, 0.25, 0.7, 1.0], dtype=F64, device=device)
    rows = torch.stack([path.log_prob(states, float(beta)) for beta in betas])
    torch.testing.assert_close(path.log_prob(states, betas[:, None]), rows)
    torch.testing.assert_close(profile(path, states)(betas[:, None]), rows)
    x = states[:5].expand(4, -1, *states.shape[1:])
    moved = path.step(x, betas[:, None], generator=rng(2, device))
    # the same uniform numbers, read at one beta after the other
    for i, beta in enumerate(betas):
        alone = path.step(x, float(beta), generator=rng(2, device))
        assert torch.equal(moved[i], alone[i])


def test_advance_of_the_rbm_is_weigh_and_step(rng, device):
    path, states = path_and_states("rbm from a bias", rng, device)
    x, increment = path.advance(states, 0.3, 0.5, generator=rng(3, device))
    at = profile(path, states)
    torch.testing.assert_close(increment, at(0.5) - at(0.3), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, path.step(states, 0.5, generator=rng(3, device)))
    through, weights = advance(path, states, 0.3, 0.5, generator=rng(3, device))
    assert torch.equal(through, x) and torch.equal(weights, increment)
    exact = path.log_prob(states, 0.5) - path.log_prob(states, 0.3)
    torch.testing.assert_close(increment, exact)
    assert (increment - (path.log_prob(x, 0.5) - path.log_prob(x, 0.3))).abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_float32_states_have_float64_weights(rng, device, name):
    path, states = path_and_states(name, rng, device, torch.float32)
    exact, _ = path_and_states(name, rng, device)
    at = profile(path, states)(0.5)
    assert at.dtype == F64 and path.log_prob(states, 0.5).dtype == torch.float32
    assert path.step(states, 0.5, generator=rng(4, device)).dtype == torch.float32
    torch.testing.assert_close(at, exact.log_prob(states.double(), 0.5), rtol=1e-5, atol=1e-5)


def test_paths_follow_their_model(rng):
    rbm, _ = machine(rng)
    path = rbm.annealing_path()
    before = path.log_prob(binary_states(4, dtype=F64), 1.0)
    with torch.no_grad():
        rbm.W.mul_(2.0)
    assert not torch.equal(before, path.log_prob(binary_states(4, dtype=F64), 1.0))
    assert not path.base_log_z.requires_grad and not before.requires_grad


def test_what_cannot_be_a_path_is_refused(rng):
    rbm, bias = machine(rng)
    with pytest.raises(ValueError, match=r"base_bias must be \(4,\)"):
        rbm.annealing_path(bias[:3])
    with pytest.raises(ValueError, match="float32"):
        rbm.annealing_path(bias.float())
    with pytest.raises(ValueError, match="NaN"):
        rbm.annealing_path(bias * math.nan)
    with pytest.raises(ValueError, match="even sides"):
        Ising(3, 4, 0.1).annealing_path()
    with pytest.raises(ValueError, match="a path leads to one model"):
        Ising(4, 4, torch.tensor([0.1, 0.2])).annealing_path()
    with pytest.raises(ValueError, match="shape"):
        rbm.annealing_path().step(torch.zeros(2, 5, dtype=F64), 0.5)
    with pytest.raises(ValueError, match="spins"):
        Ising(2, 2, 0.1).annealing_path().step(torch.zeros(1, 2, 2), 0.5)
    with pytest.raises(TypeError, match="generator"):
        rbm.annealing_path().step(torch.zeros(2, 4, dtype=F64), 0.5, generator=3)


@pytest.mark.parametrize("name", NAMES)
def test_paths_follow_the_device_of_their_model(rng, name):
    path, states = path_and_states(name, rng)
    with torch.device("meta"):
        x = path.sample_base(3, generator=rng(5))
        assert path.step(x, 0.5, generator=rng(5)).device.type == "cpu"
        assert profile(path, states)(torch.tensor([[0.5]], device="cpu")).device.type == "cpu"
        assert path.base_log_z.device.type == "cpu"
