"""What the chapter on noise-contrastive estimation adds to the tests of its objective."""

import math

import torch
from torch.nn.functional import softplus

from companion.models.boltzmann import BoltzmannMachine
from companion.testing import binary_states
from tests.minimum import minimise

F64 = torch.float64


def test_log_z_of_a_fixed_model_is_the_optimal_bridge_estimate(rng, ledger):
    """Meng and Wong's fixed point and the minimum of the loss over log_z, on the same draws."""
    model = BoltzmannMachine(4, dtype=F64)
    with torch.no_grad():
        model.J.copy_(torch.randn(4, 4, dtype=F64, generator=rng(0)))
    n, ratio = 200, 3
    v = model.sample_exact(n, generator=rng(1))
    u = (torch.rand(ratio * n, 4, dtype=F64, generator=rng(2)) < 0.5).to(F64)
    log_ratio_v, log_ratio_u = (model.log_prob(x).detach() + 4 * math.log(2) for x in (v, u))

    def bridge(share):
        """The fixed point with the weight `share` of the model's draws."""
        z = torch.ones((), dtype=F64)
        for _ in range(200):
            of_v, of_u = (share * r.exp() + (1 - share) * z for r in (log_ratio_v, log_ratio_u))
            z = (log_ratio_u.exp() / of_u).mean() / (1 / of_v).mean()
        return z.log()

    log_z = torch.zeros((), dtype=F64, requires_grad=True)

    def loss():
        g_v, g_u = (r - log_z - math.log(ratio) for r in (log_ratio_v, log_ratio_u))
        return softplus(-g_v).mean() + ratio * softplus(g_u).mean()

    minimise(loss, [log_z])
    ledger(
        "noise-contrastive log Z of a fixed machine, against the optimal bridge",
        exact=bridge(1 / (1 + ratio)),
        estimate=log_z.detach(),
        tolerance=1e-9,
    )
    assert abs(bridge(0.5) - log_z.detach()) > 1e-4  # another bridge is another estimate


def chi_square_grid(dim):
    """A grid of squared radii with the weights of the chi-square law of `dim` degrees."""
    r = (torch.arange(20_000, dtype=F64) + 0.5) * 1e-3  # the radius, midpoints of cells
    log_density = (dim - 1) * r.log() - r.square() / 2
    log_density = log_density - math.lgamma(dim / 2) - (dim / 2 - 1) * math.log(2)
    return r.square(), log_density.exp() * 1e-3


def test_the_information_on_log_z_falls_with_the_overlap():
    """Data N(0, I), noise N(0, 4 I): E[P(noise | x)] is at most sqrt(nu) / 2 times the overlap."""
    s, shares = 2.0, []
    overlap = 2 * s / (1 + s**2)  # the square of the integral of sqrt(p q), per dimension
    for dim in range(1, 21):
        r2, weight = chi_square_grid(dim)
        assert abs(float(weight.sum()) - 1) < 1e-6
        for ratio in (1, 10):
            log_odds = dim * math.log(s) - r2 / 2 * (1 - s**-2) - math.log(ratio)
            share = float(weight @ torch.sigmoid(-log_odds))
            bound = math.sqrt(ratio) / 2 * overlap ** (dim / 2)
            assert 0 < share <= bound
            assert share > bound / 8  # and the bound is not idle
        shares.append(share)
    assert shares[19] / shares[9] < overlap**4


def test_negative_sampling_learns_shifted_pointwise_mutual_information(rng):
    joint = torch.rand(4, 5, dtype=F64, generator=rng(0)).square()
    joint = joint / joint.sum()
    product = joint.sum(1, keepdim=True) * joint.sum(0)
    pmi, k = (joint / product).log(), 5
    score = torch.zeros(4, 5, dtype=F64, requires_grad=True)
    minimise(lambda: (joint * softplus(-score) + k * product * softplus(score)).sum(), [score])
    torch.testing.assert_close(score.detach(), pmi - math.log(k), rtol=0, atol=1e-9)
    assert (score.detach() - pmi).abs().min() > 1  # it is not the PMI itself


def test_the_gradient_is_the_likelihoods_weighted_by_p_of_noise(rng):
    """The loss's gradient is the sum of (p_theta - p) P(noise | v) times that of log p~."""
    truth = BoltzmannMachine(4, dtype=F64, generator=rng(0))
    with torch.no_grad():
        truth.b.copy_(torch.randn(4, dtype=F64, generator=rng(1)))
    model = BoltzmannMachine(4, dtype=F64, generator=rng(2))
    v = binary_states(4, dtype=F64)
    p = truth.log_prob(v).detach().softmax(0)
    q, ratio = torch.full((16,), 1 / 16, dtype=F64), 3
    log_odds = model.log_prob(v) - model.log_z().value - (ratio * q).log()
    loss = p @ softplus(-log_odds) + ratio * (q @ softplus(log_odds))
    p_model = model.log_prob(v).detach().softmax(0)
    of_noise = torch.sigmoid(-log_odds.detach())
    weighted = ((p_model - p) * of_noise) @ model.log_prob(v)
    plain = (p_model - p) @ model.log_prob(v)
    a, b, c = (torch.autograd.grad(x, model.b)[0] for x in (loss, weighted, plain))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert (a - c).abs().max() > 1e-2
