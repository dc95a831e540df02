"""What the chapter on pseudolikelihood proves, on machines whose states can be counted."""

from itertools import combinations

import pytest
import torch

from companion.models.boltzmann import BoltzmannMachine
from companion.objectives import generalized_pseudolikelihood, maximum_likelihood, pseudolikelihood
from companion.testing import binary_states
from tests.minimum import minimise
from tests.objectives.exact_gradients import flat_grad, machine

F64 = torch.float64


def features(num_units):
    """The functions of the state that a Boltzmann machine's parameters multiply."""
    v = binary_states(num_units, dtype=F64)
    i, j = torch.triu_indices(num_units, num_units, 1)
    return torch.cat([v, v[:, i] * v[:, j]], 1)


def conditional_mean(p, block):
    """The matrix of E[. | units outside the block], for a law on all states."""
    v = binary_states(p.shape[0].bit_length() - 1, dtype=F64)
    rest = torch.ones(v.shape[1], dtype=F64)
    rest[list(block)] = 0
    given = (torch.cdist(v * rest, v * rest, 1) == 0) * p
    return given / given.sum(1, keepdim=True)


def conditionals(p):
    """p(v_i | v_-i) for all states and units, with NaN where v_-i cannot occur."""
    num_units = p.shape[0].bit_length() - 1
    flips = torch.arange(len(p))[:, None] ^ (1 << torch.arange(num_units))
    return p[:, None] / (p[:, None] + p[flips])


# ---------------------------------------------------------------- consistency


def test_conditionals_determine_a_positive_law_and_no_other(rng):
    p = torch.rand(16, generator=rng(0), dtype=F64) + 0.1
    p = p / p.sum()
    ratios = conditionals(p)
    rebuilt = torch.ones(16, dtype=F64)
    for state in range(1, 16):  # from the state with its lowest unit off, by one flip
        unit = (state & -state).bit_length() - 1
        lower = state ^ (1 << unit)
        rebuilt[state] = rebuilt[lower] * ratios[state, unit] / ratios[lower, unit]
    torch.testing.assert_close(rebuilt / rebuilt.sum(), p)

    far_apart = torch.zeros(3, 16, dtype=F64)  # only 0000, 0011 and 1111 can occur
    far_apart[:, [0, 3, 15]] = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.5, 0.5, 0]]).to(
        F64
    )
    one, other, fewer = (conditionals(q)[[0, 3]] for q in far_apart)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, fewer)


# ---------------------------------------------------------------- one maximum


def test_the_loss_is_convex_and_untied_it_is_logistic_regression(rng):
    from sklearn.linear_model import LogisticRegression

    v = (torch.rand(400, 3, generator=rng(1)) < 0.5).to(F64)
    v[:, 2] = torch.where(torch.rand(400, generator=rng(2)) < 0.5, v[:, 0], v[:, 2])
    f, states = features(3), binary_states(3, dtype=F64)
    index = (v @ torch.tensor([4.0, 2.0, 1.0], dtype=F64)).long()
    flips = torch.arange(8)[:, None] ^ (1 << torch.arange(3))

    def loss(theta):
        log_p = f @ theta
        return torch.nn.functional.softplus(log_p[flips] - log_p[:, None]).sum(1)[index].mean()

    for seed in range(5):
        theta = 3 * torch.randn(6, generator=rng(seed), dtype=F64)
        hessian = torch.autograd.functional.hessian(loss, theta)
        assert torch.linalg.eigvalsh(hessian).min() > -1e-12
        boltzmann = BoltzmannMachine(3, dtype=F64)
        with torch.no_grad():
            boltzmann.b.copy_(theta[:3])
            for (i, j), coupling in zip(combinations(range(3), 2), theta[3:], strict=True):
                boltzmann.J[i, j] = boltzmann.J[j, i] = coupling
        torch.testing.assert_close(pseudolikelihood(boltzmann, v), loss(theta))
    assert len(states) == 8

    # Untied: unit i's terms have their minimum at the weights of its logistic regression.
    for i in range(3):
        others = [j for j in range(3) if j != i]
        fit = LogisticRegression(C=float("inf"), tol=1e-10, max_iter=1000)
        fit.fit(v[:, others].numpy(), v[:, i].numpy())
        weights = torch.tensor([*fit.coef_[0], fit.intercept_[0]], requires_grad=True)
        logits = v[:, others] @ weights[:2] + weights[2]
        terms = torch.nn.functional.softplus((1 - 2 * v[:, i]) * logits).mean()
        (gradient,) = torch.autograd.grad(terms, weights)
        assert gradient.abs().max() < 1e-6


def test_blocks_that_leave_out_two_units_are_maximal_where_the_likelihood_is(rng):
    v = (torch.rand(60, 4, generator=rng(3)) < 0.5).to(F64)
    v[:, 0] = torch.where(torch.rand(60, generator=rng(4)) < 0.6, v[:, 1] * v[:, 2], v[:, 0])
    fitted = BoltzmannMachine(4, dtype=F64)
    minimise(lambda: maximum_likelihood(fitted, v), fitted.parameters())
    for size in (2, 3, 4):
        blocks = [torch.tensor(block) for block in combinations(range(4), size)]
        gradient = flat_grad(generalized_pseudolikelihood(fitted, v, blocks), fitted)
        assert gradient.abs().max() < 1e-11
    assert flat_grad(pseudolikelihood(fitted, v), fitted).abs().max() > 1e-4  # three left out


# ---------------------------------------------------------------- what the gradient compares


def test_the_gradient_is_that_of_contrastive_divergence_with_one_unit(rng):
    rbm = machine(rng)
    states = binary_states(3, dtype=F64)
    grads = torch.stack([flat_grad(rbm.log_prob(v), rbm) for v in states])
    p = rbm.log_prob(states).detach().softmax(0)
    redrawn = sum(conditional_mean(p, [i]) @ grads for i in range(3)) / 3  # E[grad at v']
    for v, here, there in zip(states, grads, redrawn, strict=True):
        found = -flat_grad(pseudolikelihood(rbm, v[None]), rbm) / 3
        torch.testing.assert_close(found, here - there)
        not_redrawn = here - grads.mean(0)
        assert (found - not_redrawn).abs().max() > 1e-3


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_the_sandwich_is_never_below_the_fisher_bound(strength, rng):
    f = features(4)
    theta = torch.randn(10, generator=rng(5), dtype=F64)
    theta[4:] *= strength
    p = (f @ theta).softmax(0)
    centred = f - p @ f
    fisher = centred.T @ (p[:, None] * centred)
    bound = torch.linalg.inv(fisher)
    for size in (1, 2, 4):
        surprises = [f - conditional_mean(p, b) @ f for b in combinations(range(4), size)]
        score = sum(surprises)
        hessian = sum(r.T @ (p[:, None] * r) for r in surprises)
        torch.testing.assert_close(p @ score, torch.zeros(10, dtype=F64))
        torch.testing.assert_close(score.T @ (p[:, None] * centred), hessian)  # Cov(s_C, s) = H
        inverse = torch.linalg.inv(hessian)
        excess = inverse @ score.T @ (p[:, None] * score) @ inverse - bound
        relative = torch.linalg.eigvalsh(excess) / torch.linalg.eigvalsh(bound).max()
        assert relative.min() > -1e-10
        if size == 1 and strength > 0:
            assert relative.max() > 1e-6  # three units left out: something is lost
        else:  # independent units, or at most two left out: nothing is
            assert relative.max() < 1e-10


def test_the_sandwich_is_the_covariance_of_estimates(rng, ledger):
    """500 data sets of 40,000 draws, fitted at once by Newton steps from the truth."""
    f, num_sets, n = features(4), 500, 40_000
    theta = 1.5 * torch.randn(10, generator=rng(6), dtype=F64)
    p = (f @ theta).softmax(0)
    surprises = [f - conditional_mean(p, [i]) @ f for i in range(4)]
    score = sum(surprises)
    inverse = torch.linalg.inv(sum(r.T @ (p[:, None] * r) for r in surprises))
    sandwich = inverse @ score.T @ (p[:, None] * score) @ inverse
    counts, left = torch.zeros(num_sets, 16, dtype=F64), torch.full((num_sets,), n, dtype=F64)
    g = rng(7)
    for k in range(16):  # how many of the draws that are left fall on state k
        share = (p[k] / p[k:].sum()).clamp(max=1).expand(num_sets)
        counts[:, k] = torch.binomial(left, share, generator=g)
        left = left - counts[:, k]
    weights = counts / n
    flips = torch.arange(16)[:, None] ^ (1 << torch.arange(4))
    jump = f[:, None] - f[flips]  # (state, unit, feature)
    fitted = theta.expand(num_sets, 10)
    for _ in range(8):
        miss = torch.sigmoid(-torch.einsum("sip,np->nsi", jump, fitted))
        gradient = torch.einsum("ns,nsi,sip->np", weights, miss, jump)
        spread = weights[..., None] * miss * (1 - miss)
        hessian = torch.einsum("nsi,sip,siq->npq", spread, jump, jump)
        fitted = fitted + torch.linalg.solve(hessian, gradient)
    assert gradient.abs().max() < 1e-9
    # the squared error in units of the sandwich is chi-squared with 10 degrees of freedom
    error = fitted - theta
    distance = (error @ torch.linalg.inv(sandwich / n) * error).sum(1)
    std_error = distance.std() / num_sets**0.5
    ledger(
        "squared errors of pseudolikelihood, in units of the sandwich",
        exact=10.0,
        estimate=distance.mean(),
        std_error=std_error,
    )
    naive = (error @ torch.linalg.inv(inverse / n) * error).sum(1)  # H alone, as for a likelihood
    assert (naive.mean() - 10).abs() > 4.5 * naive.std() / num_sets**0.5


# ---------------------------------------------------------------- what it cannot see


def test_the_weights_of_separated_modes_do_not_enter(rng):
    """Two modes of two neighbouring states each, three flips apart."""

    def mixture(w, right=(0b11110, 0b11111)):
        p = torch.zeros(32, dtype=F64)
        p[[0b00000, 0b00001]] = w * torch.tensor([0.3, 0.7], dtype=F64)
        p[list(right)] += (1 - w) * torch.tensor([0.6, 0.4], dtype=F64)
        return p

    class Table:
        def __init__(self, p):
            self.log_p = p.log()

        def log_prob(self, v):
            return self.log_p[(v.double() @ torch.tensor([16.0, 8, 4, 2, 1], dtype=F64)).long()]

    states = binary_states(5, dtype=F64)
    data = states[[0, 1, 30, 31, 31]]
    for size in (1, 2, 3):
        blocks = [torch.tensor(b) for b in combinations(range(5), size)]
        values = [generalized_pseudolikelihood(Table(mixture(w)), data, blocks) for w in (0.1, 0.8)]
        torch.testing.assert_close(values[0], values[1])
    blocks = [torch.tensor(b) for b in combinations(range(5), 4)]  # these reach across
    values = [generalized_pseudolikelihood(Table(mixture(w)), data, blocks) for w in (0.1, 0.8)]
    assert (values[0] - values[1]).abs() > 0.1
    joined = data[:2]  # and neighbours tell each other their weights
    values = [pseudolikelihood(Table(mixture(w, (0b00010, 0b00011))), joined) for w in (0.1, 0.8)]
    assert (values[0] - values[1]).abs() > 0.1
