"""What the chapter on the movie RBM states: its theorems, by enumeration of all states."""

import itertools
import math

import pytest
import torch

from companion.data import movies
from companion.models.rbm import RBM
from companion.testing import binary_states

F64 = torch.float64


def random_machine(rng, num_hidden=2, scale=1.0):
    g = rng(0)
    rbm = RBM(6, num_hidden, dtype=F64, generator=g)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=F64, generator=g) + 0.2)
    return rbm.requires_grad_(False)


# ---------------------------------------------------------------- the ceiling


def one_unit(t):
    """The family of the theorem: logits t for a settled film, log 2 for a matter of taste."""
    taste = torch.tensor(2.0, dtype=F64).log()
    on = torch.tensor([t, taste, t, -t, -t, -t], dtype=F64)
    off = torch.tensor([-t, -t, t, t, taste, -t], dtype=F64)
    rbm = RBM(6, 1, dtype=F64).requires_grad_(False)
    rbm.b.copy_(off)
    rbm.W.copy_((on - off)[:, None])
    softplus = torch.nn.functional.softplus
    rbm.c.copy_((softplus(off).sum() - softplus(on).sum())[None])
    return rbm


def log_likelihood(rbm, likes):
    return (rbm.log_prob(likes).mean() - rbm.log_z().value).item()


def test_one_hidden_unit_reaches_the_ceiling_in_the_limit_only(ledger):
    likes = movies(dtype=F64).likes
    ceiling = 2 / 3 * math.log(1 / 3) + 1 / 3 * math.log(1 / 6)
    values = [log_likelihood(one_unit(t), likes) for t in (0.1, 0.5, 1, 2, 4, 6, 8, 10)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert all(value < ceiling for value in values)
    far = log_likelihood(one_unit(30.0), likes)
    ledger("ceiling of the movie table by one unit", exact=ceiling, estimate=far, tolerance=1e-10)

    # The formulas of the proof.
    s = torch.sigmoid(torch.tensor(1.3, dtype=F64)).item()
    rbm = one_unit(1.3)
    p = (rbm.log_prob(likes[:2]) - rbm.log_z().value).exp()
    first = 0.5 * (2 / 3 * s**5 + 1 / 3 * s**2 * (1 - s) ** 3)
    second = 0.5 * (1 / 3 * s**5 + 1 / 3 * s**3 * (1 - s) ** 2)
    torch.testing.assert_close(p, torch.tensor([first, second], dtype=F64), rtol=0, atol=1e-14)

    # Control: with both states of the unit alike, no t gets there.
    blurred = one_unit(30.0)
    blurred.W.mul_(0.5)
    assert log_likelihood(blurred, likes) < ceiling - 0.1


# ---------------------------------------------------------------- prediction


def predict(rbm, known, *, unknown_as_zero=False):
    """The theorem's formula: sum over h, with the unknown films summed out."""
    h = binary_states(rbm.num_hidden, dtype=F64)
    a = rbm.b + h @ rbm.W.T
    given = known >= 0
    log_p = h @ rbm.c + a[:, given] @ known[given]
    if not unknown_as_zero:
        log_p = log_p + torch.nn.functional.softplus(a[:, ~given]).sum(1)
    return (log_p.softmax(0) @ torch.sigmoid(a))[~given]


@pytest.mark.parametrize("known", ["1-----", "-01--1", "01-110", "------"])
def test_prediction_from_some_films_is_the_exact_conditional(known, rng, ledger):
    rbm = random_machine(rng, 3)
    known = torch.tensor([-1.0 if x == "-" else float(x) for x in known], dtype=F64)
    states = binary_states(6, dtype=F64)
    p = (rbm.log_prob(states) - rbm.log_z().value).exp()
    p = p * ((states == known) | (known < 0)).all(-1)
    exact = ((p / p.sum()) @ states)[known < 0]
    formula = predict(rbm, known)
    for film, (x, y) in enumerate(zip(exact, formula, strict=True)):
        ledger(f"movie prediction {known.tolist()} {film}", exact=x.item(), estimate=y.item())
    wrong = predict(rbm, known, unknown_as_zero=True)  # the popular pass with zeros
    assert (wrong - exact).abs().max() > 0.01


# ---------------------------------------------------------------- the bias unit


def update(weights, data, h, *, clamp):
    """One update of the popular program at rate 1, given the drawn hidden units."""
    x = torch.cat([torch.ones(len(data), 1, dtype=F64), data], 1)
    up = torch.sigmoid(x @ weights)
    up[:, 0] = 1
    down = torch.sigmoid(h @ weights.T)
    down[:, 0] = 1
    back = torch.sigmoid(down @ weights)
    sigma = back[:, 0].clone()
    if clamp:
        back[:, 0] = 1
    return (x.T @ up - down.T @ back) / len(x), down[:, 1:], sigma


def test_the_leak_adds_to_visible_biases_and_never_lowers_w00(rng):
    g = rng(0)
    data = movies(dtype=F64).likes
    for _ in range(20):
        weights = 2 * torch.randn(7, 3, dtype=F64, generator=g)
        h = (torch.rand(6, 3, generator=g) < 0.5).to(F64)
        h[:, 0] = 1
        leaky, down, sigma = update(weights, data, h, clamp=False)
        clamped, _, _ = update(weights, data, h, clamp=True)
        push = (down * (1 - sigma)[:, None]).mean(0)
        torch.testing.assert_close(leaky[1:, 0], clamped[1:, 0] + push, rtol=0, atol=1e-14)
        assert (push >= 0).all()
        torch.testing.assert_close(leaky[0, 0], (1 - sigma).mean(), rtol=0, atol=1e-14)
        assert leaky[0, 0] > 0
        assert clamped[0, 0] == 0
        assert torch.equal(leaky[:, 1:], clamped[:, 1:])
        assert (leaky[1:, 0] - clamped[1:, 0]).max() > 1e-6  # control: the leak is no CD update
