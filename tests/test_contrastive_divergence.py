"""What the chapter on contrastive divergence claims and no module's test covers, by enumeration."""

import math

import torch

from companion.models.rbm import RBM
from companion.testing import binary_states

F64 = torch.float64
NUM_VISIBLE, NUM_HIDDEN = 4, 2


def machine(rng, seed=0, size=1.5):
    rbm = RBM(NUM_VISIBLE, NUM_HIDDEN, dtype=F64)
    with torch.no_grad():
        for parameter in rbm.parameters():
            noise = torch.randn(parameter.shape, generator=rng(seed), dtype=F64)
            parameter.copy_(size * noise)
            seed += 1
    return rbm


def sweep(rbm):
    """The transition matrix of a block Gibbs sweep on the visible states."""
    v, h = binary_states(NUM_VISIBLE, dtype=F64), binary_states(NUM_HIDDEN, dtype=F64)
    up = ((v @ rbm.W + rbm.c) @ h.T).softmax(1)
    down = ((h @ rbm.W.T + rbm.b) @ v.T).softmax(1)
    return up @ down


def log_prob(rbm):
    return rbm.log_prob(binary_states(NUM_VISIBLE, dtype=F64))


def data_law(rng, seed=9):
    return torch.randn(2**NUM_VISIBLE, generator=rng(seed), dtype=F64).softmax(0)


def kl(q, log_p):
    return (q * (q.log() - log_p)).sum()


def gradient(value, rbm):
    return torch.cat(
        [x.flatten() for x in torch.autograd.grad(value, list(rbm.parameters()), retain_graph=True)]
    )


def state_gradients(rbm):
    """d log p~(v) / d theta for every state, (2^D, parameters)."""
    return torch.stack([gradient(log_prob(rbm)[i], rbm) for i in range(2**NUM_VISIBLE)])


def test_the_left_out_term_completes_the_gradient_of_the_difference(rng, ledger):
    p0 = data_law(rng)
    for k in (1, 3):
        rbm = machine(rng)
        pk = p0 @ torch.linalg.matrix_power(sweep(rbm), k)
        log_p = log_prob(rbm).log_softmax(0)
        difference = kl(p0, log_p) - kl(pk, log_p)
        assert difference > 0
        whole = -gradient(difference, rbm)
        # The terms on their own, the derivative of p_k by central differences.
        cd = (p0 - pk.detach()) @ state_gradients(rbm)
        log_ratio = (pk.log() - log_p).detach()
        left_out = torch.zeros_like(cd)
        position, step = 0, 1e-5
        for parameter in rbm.parameters():
            for entry in parameter.detach().view(-1):
                moved = []
                for sign in (1, -1):
                    entry.add_(sign * step)
                    with torch.no_grad():
                        moved.append(p0 @ torch.linalg.matrix_power(sweep(rbm), k))
                    entry.sub_(sign * step)
                left_out[position] = ((moved[0] - moved[1]) / (2 * step)) @ log_ratio
                position += 1
        ledger(
            f"gradient of KL(p0||p) - KL(p{k}||p) from CD-{k} and the term left out",
            exact=whole.norm(),
            estimate=(cd + left_out).norm(),
            tolerance=1e-8,
        )
        assert torch.allclose(whole, cd + left_out, atol=1e-8)
        assert not torch.allclose(whole, cd, atol=1e-2)  # the term is not nothing
        # The derivative of the mean of log p~ is another term.
        wrong = gradient((p0 - pk) @ log_prob(rbm), rbm)
        assert not torch.allclose(wrong, whole, atol=1e-2)


def test_the_bias_falls_like_the_power_of_the_second_eigenvalue(rng):
    num_slow = 0
    for seed in range(0, 30, 3):
        rbm, p0 = machine(rng, seed, size=2.0), data_law(rng, seed + 100)
        g = state_gradients(rbm)
        with torch.no_grad():
            p, P = log_prob(rbm).softmax(0), sweep(rbm)
        # Reversible, and no eigenvalue is negative.
        assert torch.allclose(p[:, None] * P, (p[:, None] * P).T, atol=1e-14)
        root = p.sqrt()
        eigenvalues = torch.linalg.eigvalsh(root[:, None] * P / root)
        assert eigenvalues.min() > -1e-12
        second = eigenvalues[-2]
        sd = (p @ (g - p @ g).square()).sqrt()
        chi = ((p0 - p).square() / p).sum().sqrt()
        law, biases = p0, []
        for k in range(1, 22):
            law = law @ P
            bias = (p - law) @ g
            assert (bias.abs() <= second**k * chi * sd + 1e-13).all()
            biases.append(bias.norm())
        if second > 0.25:  # then the bias has not reached round-off after 20 sweeps
            num_slow += 1
            rate = (biases[20] / biases[10]) ** 0.1
            assert math.isclose(rate, second, rel_tol=0.02)
    assert num_slow >= 3


def test_persistent_chains_lag_no_further_than_the_bound(rng):
    def distance(p, q):
        return 0.5 * (p - q).abs().sum()

    def run(rate):
        """The law of infinitely many chains beside the model, along a training run."""
        rbm, p0 = machine(rng, size=0.5), data_law(rng)
        law, last, rows = torch.full((16,), 1 / 16, dtype=F64), None, []
        for _ in range(round(20 / rate)):
            with torch.no_grad():
                P, p = sweep(rbm), log_prob(rbm).softmax(0)
            law = law @ P
            rho = 0.5 * (P[:, None] - P[None]).abs().sum(-1).max()
            moved = distance(p, last) if last is not None else torch.zeros((), dtype=F64)
            rows.append(torch.stack([distance(law, p), rho, moved]))
            last = p
            step = gradient((p0 - law) @ log_prob(rbm), rbm)
            with torch.no_grad():
                sizes = [x.numel() for x in rbm.parameters()]
                for parameter, dx in zip(rbm.parameters(), step.split(sizes), strict=True):
                    parameter.add_(rate * dx.view_as(parameter))
        return torch.stack(rows)

    lags = {}
    for rate in (0.4, 0.1):
        lag, rho, moved = run(rate).T
        assert rho.max() < 1
        start, factor, delta = lag[0], rho[1:].max(), moved[1:].max()
        t = torch.arange(len(lag), dtype=F64)
        assert (lag <= factor**t * start + factor / (1 - factor) * delta + 1e-14).all()
        lags[rate] = lag[len(lag) // 4 :].max()
    assert lags[0.1] < 0.5 * lags[0.4]  # a quarter of the rate: the lag falls with it


def test_one_hidden_unit_rests_where_the_likelihood_does(rng):
    v = binary_states(4, dtype=F64)
    for num_hidden in (1, 2):
        W = 1.5 * torch.randn(4, num_hidden, generator=rng(1), dtype=F64)
        h = binary_states(num_hidden, dtype=F64)
        up, down = (v @ W @ h.T).softmax(1), (h @ W.T @ v.T).softmax(1)
        p = (v @ W @ h.T).logsumexp(1).softmax(0)
        g = torch.sigmoid(v @ W)
        # Data with all the model's moments that the gradient sees, and yet another law.
        moments = torch.cat(
            [torch.ones(16, 1, dtype=F64), v, g, (v[:, :, None] * g[:, None]).flatten(1)], 1
        )
        away = torch.randn(16, generator=rng(2), dtype=F64)
        away -= moments @ torch.linalg.lstsq(moments, away).solution
        p0 = p + 0.5 * away / (away / p).abs().max()
        assert p0.min() > 0 and (p0 - p).abs().max() > 1e-4
        assert ((p0 - p) @ moments).abs().max() < 1e-12
        moved = (p0 @ up @ down - p).abs().max()
        assert (moved < 1e-12) == (num_hidden == 1)


def test_late_and_noisy_chains_are_a_pendulum_in_gusts_of_wind():
    """The variance of a parameter, from the linear process itself and not from its formula."""
    rate, curvature, tau, variance = 0.2, 2.4, 100.0, 0.03
    gusts = torch.tensor([0.0, 4.0 * variance / tau], dtype=F64).diag()

    def stationary(drift):
        """The covariance S of dx = A x dt + noise: A S + S A' + gusts = 0."""
        eye = torch.eye(2, dtype=F64)
        system = torch.kron(drift, eye) + torch.kron(eye, drift)
        return torch.linalg.solve(system, -gusts.flatten()).view(2, 2)

    follows = 2.0 / tau * torch.tensor([[0.0, 0.0], [curvature, -1.0]], dtype=F64)
    learns = torch.tensor([[0.0, -rate], [0.0, 0.0]], dtype=F64)
    theta = stationary(learns + follows)[0, 0]
    torch.testing.assert_close(
        theta, torch.tensor(rate * tau * variance / (2 * curvature), dtype=F64)
    )
    # Noise of the same memory that does not follow the machine, beside an exact slope.
    alone = torch.tensor([[-rate * curvature, -rate], [0.0, -2.0 / tau]], dtype=F64)
    noise = stationary(alone)
    torch.testing.assert_close(noise[1, 1], torch.tensor(variance, dtype=F64))
    torch.testing.assert_close(noise[0, 0], theta / (1 + rate * curvature * tau / 2))
