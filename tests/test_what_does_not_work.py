"""What the chapter on what does not work claims about estimates of Z that fail."""

import math

import torch
from torch.distributions import Normal

from companion.importance import log_mean_weight
from companion.models.rbm import RBM
from companion.testing import binary_states

F64 = torch.float64


def log_mean(log_terms, dim=-1):
    return log_terms.logsumexp(dim) - math.log(log_terms.shape[dim])


def test_two_replicas_give_the_second_moment(rng, ledger):
    rbm = RBM(6, 3, dtype=F64).requires_grad_(False)
    for i, parameter in enumerate((rbm.W, rbm.b, rbm.c)):
        parameter.copy_(torch.randn(parameter.shape, dtype=F64, generator=rng(i)))
    a = torch.randn(6, dtype=F64, generator=rng(3))
    v = binary_states(6, dtype=F64)
    log_q = v @ a - torch.nn.functional.softplus(a).sum()
    exact = (2 * rbm.log_prob(v) - log_q).logsumexp(0)

    def replicas(weights, hidden_biases):
        machine = RBM(6, len(hidden_biases), dtype=F64).requires_grad_(False)
        machine.W.copy_(weights)
        machine.b.copy_(2 * rbm.b - a)
        machine.c.copy_(hidden_biases)
        return machine.log_z().value + torch.nn.functional.softplus(a).sum()

    found = replicas(torch.cat([rbm.W, rbm.W], 1), torch.cat([rbm.c, rbm.c]))
    ledger("second moment of an RBM's weights, by two replicas", exact=exact, estimate=found)
    doubled = replicas(2 * rbm.W, 2 * rbm.c)  # h = h': the square of each term, not of the sum
    assert abs(doubled - exact) > 0.1


def test_what_no_draw_has_seen_does_not_count_nor_show_in_the_error_bar(rng):
    """Four states; the last one has most of p and is seen by no draw of 20, in half of the runs."""
    q = torch.tensor([0.5, 0.3, 0.17, 0.03], dtype=F64)
    p_tilde = torch.tensor([0.6, 0.3, 0.6, 9.0], dtype=F64)
    n, runs = 20, 40_000
    x = torch.multinomial(q, runs * n, True, generator=rng(0)).view(runs, n)
    all_in = (x < 3).all(1)
    share = all_in.double().mean()
    expected = q[:3].sum() ** n
    assert abs(share - expected) < 4.5 * (expected * (1 - expected) / runs) ** 0.5
    assert expected >= 1 - n * q[3]

    w = (p_tilde / q)[x[all_in]]
    z_hat, squared_error = w.mean(1), w.var(1) / n
    seen = p_tilde[:3].sum() / q[:3].sum()  # Z p(A) / q(A)
    std_error = z_hat.std() / len(z_hat) ** 0.5
    assert abs(z_hat.mean() - seen) < 4.5 * std_error
    assert abs(z_hat.mean() - p_tilde.sum()) > 100 * std_error  # Z, which they know nothing of
    within = q[:3] / q[:3].sum()
    values = (p_tilde / q)[:3]
    variance = (within @ values.square() - (within @ values) ** 2) / n
    error_of_variance = squared_error.std() / len(z_hat) ** 0.5
    assert abs(squared_error.mean() - variance) < 4.5 * error_of_variance
    unconditional = (q @ (p_tilde / q).square() - p_tilde.sum() ** 2) / n
    assert abs(squared_error.mean() - unconditional) > 100 * error_of_variance

    # The reciprocal estimate, from draws of p that miss a state of q.
    p = torch.tensor([0.5, 0.3, 0.17, 0.03], dtype=F64)
    q = torch.tensor([0.1, 0.1, 0.1, 0.7], dtype=F64)
    w = (q / (5 * p))[x[all_in]].mean(1)  # Z = 5
    std_error = w.std() / len(w) ** 0.5
    assert abs(w.mean() - q[:3].sum() / (5 * p[:3].sum())) < 4.5 * std_error
    assert abs(w.mean() - 1 / 5) > 100 * std_error


def test_fewer_than_exp_kl_draws_see_nothing_and_more_are_enough(rng):
    """Both bounds, for log rho = N(-L, 2 L) under q and so N(L, 2 L) under p; L = 6."""
    level, runs = 6.0, 400
    sd = math.sqrt(2 * level)
    noise = torch.randn(runs, 2**13, dtype=F64, generator=rng(0))
    a = torch.linspace(0, 18, 181, dtype=F64)
    below = Normal(torch.tensor(level, dtype=F64), sd).cdf(a)  # P_p(log rho <= a)
    wrong = Normal(torch.tensor(-level, dtype=F64), sd).cdf(a)  # under q: a plausible slip
    sizes, spread = [4, 64, 2**13], {}
    for n in sizes:
        ratio = log_mean(sd * noise[:, :n] - level).exp()
        seen = (ratio >= 0.5).double().mean()
        far = (ratio - 1).abs()
        limit = (n / a.exp() + below / 0.5).min()
        assert seen <= limit + 4.5 * 0.5 / runs**0.5
        enough = ((a.exp() / n).sqrt() + 2 * (1 - below)).min()
        assert far.mean() <= enough + 4.5 * far.std() / runs**0.5
        slip = ((a.exp() / n).sqrt() + 2 * (1 - wrong)).min()
        spread[n] = seen, far.clamp(max=1.0), slip
    assert spread[4][0] < 0.2 and spread[2**13][0] > 0.7  # a cut-off: exp(6) is 403
    # Under the law of the proposal nothing seems to be missing, and the bound is broken.
    _, clipped, slip = spread[4]
    assert clipped.mean() - slip > 4.5 * clipped.std() / runs**0.5


def test_the_harmonic_mean_has_a_variance_only_if_the_prior_is_narrow():
    """The second moment on longer and longer grids; the tail's index from the exact normal law."""
    y, sigma = 1.0, 1.0

    def second_moment(tau, half):
        theta = torch.linspace(-half, half, 20_001, dtype=F64)
        log_ratio = Normal(0.0, tau).log_prob(theta) - Normal(theta, sigma).log_prob(
            torch.tensor(y, dtype=F64)
        )
        return torch.trapezoid(log_ratio.exp(), theta)

    narrow = [second_moment(0.9, half) for half in (20.0, 40.0)]
    assert abs(narrow[1] / narrow[0] - 1) < 1e-6
    for tau in (1.1, 10.0):
        assert second_moment(tau, 40.0) > 1e6 * second_moment(tau, 20.0) / 1e3

    for tau in (0.5, 1.0, 3.0):
        s = (tau**-2 + sigma**-2) ** -0.5
        m = s**2 * y / sigma**2
        log_u = torch.tensor([2e4, 2.1e4], dtype=F64)  # beyond what float64 holds as u
        distance = sigma * (2 * log_u - math.log(2 * math.pi * sigma**2)).sqrt()
        tails = torch.stack([(y + distance - m) / s, (m - y + distance) / s])
        log_tail = torch.special.log_ndtr(-tails).logsumexp(0)
        slope = -(log_tail[1] - log_tail[0]) / (log_u[1] - log_u[0])
        alpha = 1 + sigma**2 / tau**2
        assert abs(slope / alpha - 1) < 0.02
        assert abs(slope / (1 + tau**2 / sigma**2) - 1) > 0.02 or tau == sigma  # upside down


def test_the_harmonic_mean_reports_the_prior_mass_that_it_has_seen(rng, ledger):
    """Right for a narrow prior; for a vague one too high by -log of the prior mass met."""
    y, runs, n = 1.0, 40, 10_000
    noise = torch.randn(n, runs, dtype=F64, generator=rng(0))
    for tau in (0.5, 30.0):
        s = (tau**-2 + 1) ** -0.5
        theta = s**2 * y + s * noise
        log_like = Normal(theta, 1.0).log_prob(torch.tensor(y, dtype=F64))
        exact = Normal(0.0, math.hypot(tau, 1.0)).log_prob(torch.tensor(y, dtype=F64))
        if tau == 0.5:
            inverse = log_mean_weight(-log_like[:, 0])
            ledger(
                "log evidence by the harmonic mean, prior narrower than the likelihood",
                exact=exact,
                estimate=-inverse.value,
                std_error=inverse.std_error,
            )
            continue
        error = -log_mean(-log_like, 0) - exact
        low, high = (theta.amin(0), theta.amax(0))
        met = Normal(0.0, tau).cdf(high) - Normal(0.0, tau).cdf(low)
        off = error + met.log()  # zero, if the prediction is right
        assert error.median() > 1.5
        assert abs(off.median()) < 0.25
        assert (error > 0).double().mean() > 0.9
        printed = log_like.neg().softmax(0).square().sum(0).sqrt().median()
        assert error.median() > 8 * printed
