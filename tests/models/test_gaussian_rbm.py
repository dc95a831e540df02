"""The Gaussian machine against the mixture of 2^H normals that it is, and against quadrature."""

import math
from types import SimpleNamespace

import pytest
import torch

from companion.core import Kernel
from companion.models.rbm import GaussianRBM
from companion.objectives import (
    PersistentChains,
    contrastive_divergence,
    maximum_likelihood,
    score_matching,
)
from companion.testing import assert_invariant, binary_states, invariance_test

F64 = torch.float64


def machine(num_visible, num_hidden, rng, *, scale=1.0, seed=0, dtype=F64, device="cpu"):
    """Weights, biases and variances far from 0, of either sign and different for each unit."""
    g = rng(seed)
    rbm = GaussianRBM(num_visible, num_hidden, dtype=F64, generator=g)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=F64, generator=g) + 0.2)
    return rbm.to(dtype=dtype, device=device)


def points(n, num_visible, rng, seed=10):
    return 2.0 * torch.randn(n, num_visible, dtype=F64, generator=rng(seed))


def energies(rbm, v):
    """E(v, h) of each v and all h by the definition, one product at a time, (n, 2^H)."""
    hs = binary_states(rbm.num_hidden, dtype=F64)
    table = torch.zeros(len(v), len(hs), dtype=F64)
    variance = rbm.log_variance.exp()
    for i in range(rbm.num_visible):
        table = table + ((v[:, i] - rbm.b[i]) ** 2 / (2 * variance[i]))[:, None]
        for j in range(rbm.num_hidden):
            table = table - (v[:, i] / variance[i])[:, None] * rbm.W[i, j] * hs[:, j]
    for j in range(rbm.num_hidden):
        table = table - rbm.c[j] * hs[:, j]
    return hs, table


def mixture(rbm):
    """log Z, differentiable, and the mixture with a normal for each h, by completing the square."""
    hs = binary_states(rbm.num_hidden, device=rbm.W.device, dtype=rbm.W.dtype)
    means, variance = rbm.b + hs @ rbm.W.T, rbm.log_variance.exp()
    log_masses = hs @ rbm.c + ((means**2 - rbm.b**2) / (2 * variance)).sum(-1)
    log_masses = log_masses + 0.5 * (2 * math.pi * variance).log().sum()
    normals = torch.distributions.Independent(torch.distributions.Normal(means, variance.sqrt()), 1)
    choice = torch.distributions.Categorical(logits=log_masses)
    return log_masses.logsumexp(0), torch.distributions.MixtureSameFamily(choice, normals)


def detached_mixture(rbm):
    with torch.no_grad():
        return mixture(rbm)[1]


def grid(rbm, n=600):
    """Points that cover the density in one dimension or two, and the log of a cell's volume."""
    means = detached_mixture(rbm).component_distribution.mean
    sd = (0.5 * rbm.log_variance).exp().detach()
    low, high = means.amin(0) - 9 * sd, means.amax(0) + 9 * sd
    axes = [torch.linspace(a, b, n, dtype=F64) for a, b in zip(low, high, strict=True)]
    return torch.cartesian_prod(*axes).reshape(-1, len(axes)), ((high - low) / (n - 1)).log().sum()


# ---------------------------------------------------------------- densities


def test_energy_agrees_with_its_definition(rng):
    rbm, v = machine(3, 4, rng), points(5, 3, rng)
    hs, table = energies(rbm, v)
    torch.testing.assert_close(rbm.energy(v[:, None].expand(-1, 16, -1), hs), table)


def test_free_energy_sums_out_the_hidden_units(rng, ledger):
    rbm, v = machine(3, 4, rng), points(5, 3, rng)
    by_hand = -(-energies(rbm, v)[1]).logsumexp(1).detach()
    torch.testing.assert_close(rbm.free_energy(v), by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rbm.log_prob(v), -by_hand, rtol=1e-12, atol=1e-12)
    ledger("Gaussian RBM free energy", exact=by_hand[1], estimate=rbm.free_energy(v[1]).item())
    with torch.no_grad():
        rbm.log_variance.mul_(2)  # the standard deviation taken for the variance
    assert (rbm.free_energy(v) - by_hand).abs().max() > 0.1


@pytest.mark.parametrize("num_visible", [1, 2])
def test_log_z_agrees_with_quadrature(num_visible, rng, ledger):
    rbm = machine(num_visible, 3, rng)
    v, log_cell = grid(rbm)
    by_quadrature = rbm.log_prob(v).detach().logsumexp(0) + log_cell
    ledger(f"Gaussian RBM log Z by quadrature, D = {num_visible}",
           exact=by_quadrature, estimate=rbm.log_z().value)  # fmt: skip
    assert rbm.log_z().std_error == 0


@pytest.mark.parametrize("sizes", [(1, 1), (4, 3), (2, 6)])
def test_the_machine_is_a_mixture_of_normals(sizes, rng, ledger):
    rbm, v = machine(*sizes, rng), points(20, sizes[0], rng)
    log_z, exact = mixture(rbm)
    ledger(
        f"Gaussian RBM log Z, {sizes[0]} x {sizes[1]}",
        exact=log_z.item(),
        estimate=rbm.log_z().value,
    )
    found = rbm.log_prob(v) - rbm.log_z().value
    torch.testing.assert_close(found, exact.log_prob(v), rtol=1e-11, atol=1e-11)


def test_log_z_over_several_blocks_agrees_with_one_sum(rng, ledger):
    rbm = machine(3, 15, rng, scale=0.4)
    ledger("Gaussian RBM log Z in blocks", exact=mixture(rbm)[0].item(), estimate=rbm.log_z().value)


def test_log_z_of_independent_normals_has_a_closed_form(rng, ledger):
    rbm = machine(50, 12, rng)
    with torch.no_grad():
        rbm.W.zero_()
        exact = torch.nn.functional.softplus(rbm.c).sum()
        exact += 0.5 * (2 * math.pi * rbm.log_variance.exp()).log().sum()
    ledger("Gaussian RBM log Z without weights", exact=exact, estimate=rbm.log_z().value)


def test_log_z_of_a_float32_machine_is_summed_in_float64(rng):
    single = machine(6, 7, rng, dtype=torch.float32)
    assert single.log_z().value.dtype == F64
    torch.testing.assert_close(
        single.log_z().value, machine(6, 7, rng).log_z().value, rtol=1e-5, atol=0
    )


def test_log_z_refuses_what_it_cannot_enumerate():
    with pytest.raises(ValueError, match=r"stops at n = 25; this machine has 26 there"):
        GaussianRBM(2, 26).log_z()
    large = GaussianRBM(2, 17)
    assert torch.isfinite(large.log_z().value)
    with pytest.raises(ValueError, match=r"stops at n = 16; this machine has 17.*log_z"):
        large.log_normalizer()


# ---------------------------------------------------------------- derivatives


def test_the_score_and_its_divergence_are_those_of_the_mixture(rng):
    """What score matching differentiates: twice in v, and then once more in the parameters."""
    rbm, v = machine(2, 3, rng), points(6, 2, rng).requires_grad_()

    def derivatives(log_prob):
        (score,) = torch.autograd.grad(log_prob(v).sum(), v, create_graph=True)
        second = [torch.autograd.grad(score[:, i].sum(), v, create_graph=True)[0] for i in (0, 1)]
        divergence = second[0][:, 0] + second[1][:, 1]
        loss = (0.5 * score.square().sum(-1) + divergence).mean()
        return score, divergence, loss, flat(torch.autograd.grad(loss, list(rbm.parameters())))

    found, exact = derivatives(rbm.log_prob), derivatives(mixture(rbm)[1].log_prob)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    variance = rbm.log_variance.exp()
    by_hand = (rbm.b - v + rbm.hidden_probs(v) @ rbm.W.T) / variance
    torch.testing.assert_close(found[0], by_hand, rtol=0, atol=1e-12)
    assert (found[3] != 0).all()
    own = score_matching(rbm, v.detach())
    torch.testing.assert_close(own, found[2], rtol=1e-10, atol=0)


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


def test_the_likelihood_gradient_has_two_phases(rng, ledger):
    """grad log Z = E[grad log p~], the expectation by quadrature and log Z by enumeration."""
    rbm = machine(2, 2, rng, scale=0.7)
    parameters = list(rbm.parameters())
    exact = flat(torch.autograd.grad(mixture(rbm)[0], parameters))
    v, _ = grid(rbm, 300)
    log_prob = rbm.log_prob(v)
    weights = log_prob.detach().softmax(0)
    found = flat(torch.autograd.grad(weights @ log_prob, parameters))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)
    ledger("Gaussian RBM: d log Z / d W[0, 0]", exact=exact[0].item(), estimate=found[0].item())


def test_exact_maximum_likelihood_differentiates_the_mixture(rng):
    rbm, v = machine(2, 3, rng), points(6, 2, rng)
    parameters = list(rbm.parameters())
    loss, exact = maximum_likelihood(rbm, v), -mixture(rbm)[1].log_prob(v).mean()
    torch.testing.assert_close(loss, exact, rtol=1e-11, atol=0)
    found = flat(torch.autograd.grad(loss, parameters))
    by_hand = flat(torch.autograd.grad(exact, parameters))
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-10)


def test_persistent_chains_in_equilibrium_give_the_exact_gradient(rng, ledger):
    rbm = machine(2, 2, rng, scale=0.7)
    parameters, n = list(rbm.parameters()), 100_000
    data = points(7, 2, rng)
    exact = flat(torch.autograd.grad(mixture(rbm)[0] - rbm.log_prob(data).mean(), parameters))
    chains = PersistentChains(rbm, n, generator=rng(1))
    chains.x = exact_draws(rbm, n, rng(2))
    found = flat(torch.autograd.grad(chains.loss(data, 2), parameters))
    per_chain = state_gradients(rbm, chains.x)
    error = per_chain.std(0) / math.sqrt(n)
    assert ((found - exact) / error).abs().max() < 5.1  # 10 components: below 1e-5 in all
    ledger("Gaussian RBM, persistent chains: gradient of W[0, 0]",
           exact=exact[0], estimate=found[0], std_error=error[0])  # fmt: skip
    without_negative_phase = flat(torch.autograd.grad(-rbm.log_prob(data).mean(), parameters))
    assert ((without_negative_phase - exact) / error).abs().max() > 50


def state_gradients(rbm, v):
    """d log p~(v) / d(W, b, c, log s^2) for each row, by hand."""
    with torch.no_grad():
        precision, h = torch.exp(-rbm.log_variance), rbm.hidden_probs(v)
        to_w = ((v * precision)[:, :, None] * h[:, None, :]).flatten(1)
        to_b = (v - rbm.b) * precision
        to_s = 0.5 * (v - rbm.b) ** 2 * precision - v * precision * (h @ rbm.W.T)
    return torch.cat([to_w, to_b, h, to_s], 1)


def exact_draws(rbm, n, generator):
    exact = detached_mixture(rbm)
    probs = exact.mixture_distribution.probs
    which = torch.multinomial(probs, n, replacement=True, generator=generator)
    mean = exact.component_distribution.mean[which]
    sd = exact.component_distribution.stddev[which]
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + sd * noise


# ---------------------------------------------------------------- conditionals and sampling


def test_conditionals_are_those_of_the_joint(rng):
    rbm, v = machine(3, 4, rng), points(6, 3, rng)
    hs, table = energies(rbm, v)
    p_h = (-table).softmax(1) @ hs
    torch.testing.assert_close(rbm.hidden_probs(v), p_h, rtol=0, atol=1e-12)
    # in v the energy is a parabola with its bottom at the mean and curvature 1 / s^2
    mean = rbm.visible_mean(hs)
    rise = ((v[:, None] - mean) ** 2 / (2 * rbm.log_variance.exp())).sum(-1)
    lowest = torch.stack([energies(rbm, m[None])[1][0, i] for i, m in enumerate(mean)])
    torch.testing.assert_close(table - lowest, rise, rtol=1e-10, atol=1e-10)


def test_sampled_layers_have_the_conditional_moments(rng, device, ledger):
    rbm, n = machine(3, 2, rng, device=device), 200_000
    v = torch.tensor([0.5, -1.0, 2.0], dtype=F64, device=device).expand(n, 3)
    h, p = rbm.sample_hidden(v, generator=rng(1, device)), rbm.hidden_probs(v[0])
    assert ((h.mean(0) - p) / (p * (1 - p) / n).sqrt()).abs().max() < 4.7
    state = torch.tensor([1, 0], device=device)
    v = rbm.sample_visible(state.expand(n, 2), generator=rng(2, device))
    variance = rbm.log_variance.exp()
    z_mean = (v.mean(0) - rbm.visible_mean(state)) / (variance / n).sqrt()
    z_variance = (v.var(0) / variance - 1) / math.sqrt(2 / n)
    assert z_mean.abs().max() < 4.7 and z_variance.abs().max() < 4.7  # three components each
    assert ((v.var(0) / variance.sqrt() - 1) / math.sqrt(2 / n)).abs().max() > 4.7  # s for s^2
    mean = rbm.visible_mean(state)[0].item()
    ledger("Gaussian RBM: mean of v[0] given h", exact=mean, estimate=v[:, 0].mean(),
           std_error=v[:, 0].std() / math.sqrt(n))  # fmt: skip


def kernel(gibbs):
    def step(state, *, generator):
        return SimpleNamespace(x=gibbs(state.x, generator=generator)), None

    return Kernel(lambda x: SimpleNamespace(x=x), step)


def forgets_the_variance(rbm):
    """The error of versions for unit variance: the hidden units see v instead of v / s^2."""

    def gibbs(v, *, generator):
        p = torch.sigmoid(rbm.c + v @ rbm.W)
        h = (torch.rand(p.shape, generator=generator, device=v.device, dtype=v.dtype) < p) * 1
        return rbm.sample_visible(h, generator=generator)

    return gibbs


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gibbs_started_from_the_mixture_stays_there(dtype, rng, device):
    rbm = machine(3, 2, rng, scale=0.8, dtype=dtype, device=device)
    target = SimpleNamespace(
        log_prob=lambda x: rbm.log_prob(x).detach(),
        sample=lambda n, *, generator: exact_draws(rbm, n, generator),
    )

    def no_noise(v, *, generator):
        return rbm.visible_mean(rbm.sample_hidden(v, generator=generator)).detach()

    def test(gibbs, seed):
        return invariance_test(
            kernel(gibbs), target, num_chains=20_000, num_steps=3, generator=rng(seed, device)
        )

    assert_invariant(test(rbm.gibbs, 3))
    assert test(forgets_the_variance(rbm), 4).p_value < 1e-5
    assert test(no_noise, 5).p_value < 1e-5


def test_moments_of_long_chains_are_those_of_the_mixture(rng, ledger):
    rbm, n = machine(2, 3, rng, scale=0.4), 50_000
    v = rbm.gibbs(rbm.sample_base(n, generator=rng(6)), 100, generator=rng(7))
    exact = detached_mixture(rbm)
    for i in range(2):
        ledger(f"Gaussian RBM: mean of v[{i}]", exact=exact.mean[i], estimate=v[:, i].mean(),
               std_error=v[:, i].std() / math.sqrt(n))  # fmt: skip
        square = (v[:, i] - exact.mean[i]) ** 2
        ledger(f"Gaussian RBM: variance of v[{i}]", exact=exact.variance[i],
               estimate=square.mean(), std_error=square.std() / math.sqrt(n))  # fmt: skip
    start = rbm.sample_base(n, generator=rng(6))  # the chains have left their start
    assert ((start - exact.mean).mean(0) / (start.std(0) / math.sqrt(n))).abs().max() > 4.7


def test_sample_base_draws_independent_normals(rng, device):
    rbm, n = machine(3, 4, rng, device=device), 100_000
    v = rbm.sample_base(n, generator=rng(4, device))
    variance = rbm.log_variance.exp()
    assert v.shape == (n, 3) and v.dtype == F64 and not v.requires_grad
    assert ((v.mean(0) - rbm.b) / (variance / n).sqrt()).abs().max() < 4.7
    assert ((v.var(0) / variance - 1) / math.sqrt(2 / n)).abs().max() < 4.7


def test_init_from_data_makes_the_best_independent_normals(rng, ledger):
    v = points(50, 3, rng) * torch.tensor([1.0, 0.1, 30.0]) + torch.tensor([0.0, 5.0, -7.0])
    rbm = GaussianRBM(3, 2, dtype=F64)
    rbm.init_from_data(v)
    with torch.no_grad():
        rbm.W.zero_()
    best = torch.distributions.Normal(v.mean(0), v.std(0, correction=0)).log_prob(v).sum(-1).mean()
    found = rbm.log_prob(v).mean() - rbm.log_z().value
    ledger("Gaussian RBM without weights: log-likelihood", exact=best, estimate=found.item())
    with pytest.raises(ValueError, match="visible unit 1 is constant"):
        rbm.init_from_data(torch.tensor([[1.0, 0.1, 2.0], [2.0, 0.1, 1.0]], dtype=F64))


def test_contrastive_divergence_takes_it_as_it_is(rng):
    rbm = machine(3, 2, rng)
    contrastive_divergence(rbm, points(8, 3, rng), 2, generator=rng(1)).backward()
    assert all((p.grad != 0).any() and p.grad.isfinite().all() for p in rbm.parameters())


# ---------------------------------------------------------------- inputs

BAD_STATES = {
    "width": (torch.zeros(4, 5), ValueError, r"\(\.\.\., 3\), got \(4, 5\)"),
    "scalar": (torch.tensor(1.0), ValueError, r"\(\.\.\., 3\), got \(\)"),
    "empty": (torch.zeros(0, 3), ValueError, "empty"),
    "dtype": (torch.zeros(2, 3, dtype=F64), TypeError, "torch.float64 but the machine is"),
    "device": (torch.zeros(2, 3, device="meta"), ValueError, "on meta but the machine is on cpu"),
    "list": ([[0.0, 1.0, 1.0]], TypeError, "torch.Tensor, got list"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_states_are_refused_with_a_sentence(name):
    x, error, message = BAD_STATES[name]
    rbm = GaussianRBM(3, 2, dtype=torch.float32)
    for method in (rbm.log_prob, rbm.hidden_probs):
        with pytest.raises(error, match=message):
            method(x)


def test_a_density_passes_nan_on_and_a_sampler_refuses_it():
    rbm, v = GaussianRBM(3, 2), torch.tensor([[0.0, math.nan, 0.0], [0.0, 0.0, 0.0]])
    assert rbm.log_prob(v).isnan().tolist() == [True, False]
    for method in (rbm.gibbs, rbm.sample_hidden, rbm.init_from_data):
        with pytest.raises(ValueError, match=r"NaN or infinite.*\(0, 1\)"):
            method(v)
    with pytest.raises(ValueError, match="h must hold zeros and ones"):
        rbm.visible_mean(torch.tensor([[0.5, 0.0]]))


def test_bad_sizes_counts_and_generators_are_refused():
    with pytest.raises(ValueError, match="num_visible must be at least 1, got 0"):
        GaussianRBM(0, 2)
    with pytest.raises(TypeError, match="floating"):
        GaussianRBM(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        GaussianRBM(3, 2).gibbs(torch.zeros(1, 3), 0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        GaussianRBM(3, 2).sample_base(0)
    with pytest.raises(TypeError, match="generator must be a torch.Generator"):
        GaussianRBM(3, 2).gibbs(torch.zeros(1, 3), generator=7)


def test_tensors_follow_their_inputs_and_the_global_generator_is_left_alone(rng, device):
    before = torch.get_rng_state()
    rbm = GaussianRBM(3, 2, generator=rng(0, device), device=device)
    v = torch.randn(4, 3, generator=rng(1, device), device=device)
    with torch.device("meta"):  # a tensor made without following its inputs would land here
        assert rbm.log_z().value.device.type == device.type
        one, two = (rbm.gibbs(v, 2, generator=rng(2, device)) for _ in range(2))
        assert torch.equal(one, two) and one.device.type == device.type
        assert rbm.sample_base(3, generator=rng(0, device)).device.type == device.type
        rbm.sample_visible(rbm.sample_hidden(v, generator=rng(3, device)), generator=rng(4, device))
        rbm.init_from_data(v)
    assert torch.equal(before, torch.get_rng_state())
    assert rbm.gibbs(v.expand(2, 5, 4, 3), generator=rng(5, device)).shape == (2, 5, 4, 3)
    assert "num_visible=3, num_hidden=2" in repr(rbm)
