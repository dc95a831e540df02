"""Annealing paths of the RBM and its relatives: what `tests/test_annealing_paths.py` leaves out.

Increments of log weights to full precision, sparing random numbers, labels and Gaussian units; and
the likelihood of data by an estimated log Z.
"""

import math

import pytest
import torch
from torch import Tensor

from companion.core import AnnealingPath, LogZ
from companion.models.rbm import RBM, CentredRBM, GaussianRBM, LabelRBM
from companion.models.rbm.annealing import coins
from companion.models.rbm.units import softplus, softplus_change
from companion.monte_carlo import estimate
from companion.tempering import profile
from companion.testing import binary_states

F64 = torch.float64
Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison


def randomised(rbm, rng, device="cpu", dtype=F64):
    with torch.no_grad():
        for parameter in rbm.parameters():
            noise = torch.randn(parameter.shape, dtype=F64, generator=rng(0))
            parameter.copy_(0.8 * noise + 0.2)
    return rbm.to(device=device, dtype=dtype)


def path_and_points(name, rng, device="cpu", dtype=F64):
    """A path with a base that is not the machine's own, and points."""
    like = {"device": device, "dtype": dtype}
    if name == "gaussian":
        rbm = randomised(GaussianRBM(3, 4, dtype=F64), rng, device, dtype)
        base = torch.tensor([0.5, -1.0, 2.0], **like), torch.tensor([2.0, 0.7, 5.0], **like)
        points = 2.0 * torch.randn(40, 3, dtype=F64, generator=rng(1))
        return rbm.annealing_path(*base), points.to(**like)
    if name == "labels":
        rbm = randomised(LabelRBM(4, 3, 5, dtype=F64), rng, device, dtype)
        x = binary_states(4, device=device, dtype=dtype).repeat(3, 1)
        labels = torch.arange(3, device=device).repeat_interleave(16)
        bias = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.3, 0.4], **like)
        return rbm.annealing_path(bias), rbm.join(x, labels)
    rbm = randomised(RBM(4, 5, dtype=F64), rng, device, dtype)
    bias = torch.tensor([0.5, -1.0, 2.0, 0.0], **like)
    return rbm.annealing_path(bias), binary_states(4, device=device, dtype=dtype)


NAMES = ["rbm", "labels", "gaussian"]


def machine_at(path, beta):
    """The machine that the path is at beta, and by how much its log-density is larger."""
    rbm = path.rbm
    if isinstance(rbm, LabelRBM):
        at = LabelRBM(rbm.num_visible, rbm.num_labels, rbm.num_hidden, dtype=F64)
        a, d = path.base_bias[: rbm.num_visible], path.base_bias[rbm.num_visible :]
        new = {"W": beta * rbm.W, "U": beta * rbm.U, "c": beta * rbm.c}
        new |= {"b": (1 - beta) * a + beta * rbm.b, "d": (1 - beta) * d + beta * rbm.d}
        constant = 0.0
    else:
        at = GaussianRBM(rbm.num_visible, rbm.num_hidden, dtype=F64)
        own, base = torch.exp(-rbm.log_variance), 1 / path.base_variance
        precision = (1 - beta) * base + beta * own
        b = ((1 - beta) * base * path.base_mean + beta * own * rbm.b) / precision
        new = {"W": beta * (own / precision)[:, None] * rbm.W, "c": beta * rbm.c, "b": b}
        new["log_variance"] = -precision.log()
        squares = (1 - beta) * base * path.base_mean.square() + beta * own * rbm.b.square()
        constant = 0.5 * float((squares - precision * b.square()).sum().detach())
    at.load_state_dict(new)
    return at, constant


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["labels", "gaussian"])
def test_at_every_beta_the_path_is_a_machine(rng, name, beta, ledger):
    path, v = path_and_points(name, rng)
    assert isinstance(path, AnnealingPath)
    at, constant = machine_at(path, beta)
    exact = at.log_prob(v).detach() - constant
    torch.testing.assert_close(path.log_prob(v, beta), exact)
    torch.testing.assert_close(profile(path, v)(beta), exact)
    moved = path.step(v, beta, generator=rng(2))  # the sweep of that machine, same random numbers
    torch.testing.assert_close(moved, at.gibbs(v, generator=rng(2)))
    assert not torch.equal(moved, path.rbm.gibbs(v, generator=rng(2))) or beta == 1.0
    if beta == 0.0:
        ledger(
            f"log Z at beta = 0 of the path of an RBM, {name}",
            exact=at.log_z().value - constant,
            estimate=path.base_log_z,
        )
        draws = path.sample_base(20_000, generator=rng(3))
        again = at.sample_base(200_000, generator=rng(4))
        for f in (lambda x: x, torch.square):
            one, two = estimate(f(draws)), estimate(f(again))
            z = (one.value - two.value) / (one.std_error.square() + two.std_error.square()).sqrt()
            assert z.abs().max() < 5.2  # Bonferroni over at most 14: below 3e-6
    if beta == 1.0:
        torch.testing.assert_close(exact, path.rbm.log_prob(v).detach())


def test_a_gaussian_path_starts_at_the_machine_s_own_normals_unless_told(rng):
    rbm = randomised(GaussianRBM(3, 4, dtype=F64), rng)
    path = rbm.annealing_path()
    same = rbm.annealing_path(rbm.b.detach(), rbm.log_variance.exp().detach())
    v = path_and_points("gaussian", rng)[1]
    torch.testing.assert_close(path.log_prob(v, 0.4), same.log_prob(v, 0.4))
    torch.testing.assert_close(path.base_log_z, same.base_log_z)
    draws = rbm.sample_base(5, generator=rng(5))
    torch.testing.assert_close(path.sample_base(5, generator=rng(5)), draws)


@pytest.mark.parametrize("name", NAMES)
def test_advance_weighs_and_moves(rng, device, name):
    path, v = path_and_points(name, rng, device)
    tall = torch.tensor([[0.0], [0.2], [0.9]], dtype=F64, device=device)
    other = torch.tensor([[0.1], [0.0], [1.0]], dtype=F64, device=device)
    ladder = v.expand(3, *v.shape)
    for x, beta, after in ((v, 0.3, 0.5), (v, 0.5, 0.3), (ladder, tall, other), (v, 0.0, 1.0)):
        moved, increment = path.advance(x, beta, after, generator=rng(6, device))
        at = profile(path, x)
        torch.testing.assert_close(increment, at(after) - at(beta), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moved, path.step(x, after, generator=rng(6, device)))
        assert increment.dtype == F64
    # a wrong one: weighs where it has moved to
    wrong = profile(path, moved)
    assert (increment - (wrong(after) - wrong(beta))).abs().max() > 0.01


# ---------------------------------------------------------------- precision


def test_increments_in_single_precision_add_up_over_ten_thousand_betas(rng, device):
    """With other inputs at every beta, as in a walk: so that no errors cancel in the sum."""
    betas = torch.linspace(0.0, 1.0, 10_001, dtype=F64, device=device)[:, None]
    total, wrong = torch.zeros(2, 2, dtype=F64, device=device)
    exact = total.clone()
    for k in range(0, 10_000, 1000):
        inputs = 6.0 * torch.randn(1000, 2, 500, generator=rng(k)).to(device)
        low, high = betas[k : k + 1000], betas[k + 1 : k + 1001]
        for i in range(1000) if k % 5000 == 0 else ():  # one by one, as `advance` does
            now, then = float(low[i]), float(high[i])
            total += softplus_change(inputs[i], now, then, torch.sigmoid(then * inputs[i]))
        if k % 5000:
            total += softplus_change(inputs, low, high).sum(0)
        exact += softplus_change(inputs.double(), low, high).sum(0)
        ends = [softplus(b.to(inputs)[..., None] * inputs).sum(-1).double() for b in (low, high)]
        wrong += (ends[1] - ends[0]).sum(0)
    assert exact.min() > 500
    assert (total - exact).abs().max() < 2e-4
    assert (wrong - exact).abs().max() > 5e-4  # differences of sums in single precision


@pytest.mark.parametrize("units", [1, 2, 3, 5, 8, 250])
def test_changes_are_exact_also_where_they_are_extreme(rng, units):
    a = (
        torch.randn(7, units, dtype=F64, generator=rng(8))
        * torch.tensor([1e-3, 1.0, 1e3, 0.0] * 2)[:7, None].double()
    )
    for beta, after in ((0.0, 1.0), (0.3, 0.3 + 1e-3), (0.9, 0.2), (0.5, 0.5), (0.0, 1e-9)):
        exact = (softplus(after * a) - softplus(beta * a)).sum(-1)
        torch.testing.assert_close(softplus_change(a, beta, after), exact, rtol=1e-12, atol=1e-12)
        known = softplus_change(a, beta, after, torch.sigmoid(after * a))
        torch.testing.assert_close(known, exact, rtol=1e-12, atol=1e-12)
        tensors = (torch.tensor(b, dtype=F64).expand(7) for b in (beta, after))
        torch.testing.assert_close(softplus_change(a, *tensors), exact, rtol=1e-12, atol=1e-12)
        single = softplus_change(a.float(), beta, after)
        torch.testing.assert_close(single, exact, rtol=1e-5, atol=1e-12)
    tiny = softplus_change(a.float(), 0.5, 0.5 + 1e-7)
    torch.testing.assert_close(
        tiny, 1e-7 * (a * (0.5 * a).sigmoid()).sum(-1), rtol=1e-5, atol=1e-12
    )


# ---------------------------------------------------------------- random numbers


def rates(draw, p: Tensor, rng) -> tuple[Tensor, float]:
    """z-scores of how often units are on, and the correlation of units in neighbouring states."""
    g, num_calls, n = rng(9), 1500, 2000
    total, together = torch.zeros(len(p), dtype=F64), 0.0
    for _ in range(num_calls):
        h = draw(p.expand(n, -1).clone(), g)
        total += h.sum(0)
        half = h[:, 2] - p[2]
        together += float((half[1:] * half[:-1]).mean())
    count = num_calls * n
    error = (p.double() * (1 - p.double()) / count).sqrt()
    return (total / count - p) / error.clamp(min=1e-300), together / num_calls


def test_spared_random_numbers_are_exact(rng):
    p = torch.tensor([2.0**-18, 1e-3, 0.3, 0.5 + 2.0**-18, 1 - 2.0**-17, 0.0, 1.0])

    def whole_steps(probs, generator):  # the same with 16 bits alone
        bits = torch.randint(65536, probs.shape, generator=generator)
        return (bits < 65536 * probs).float()

    z, together = rates(coins, p, rng)
    assert z.abs().max() < 5.0  # Bonferroni over 7: below 5e-6
    # states share u, which matters once in 65,536 times: no correlation is seen
    assert abs(together) < Z * 0.21 / math.sqrt(1500 * 2000)
    assert rates(whole_steps, p, rng)[0].abs().max() > 8.0


def test_coins_have_the_shape_and_dtype_of_their_probabilities(rng, device):
    for shape in ((3,), (1, 1), (2, 3, 5)):
        for dtype in (torch.float32, F64):
            probs = torch.full(shape, 0.5, dtype=dtype, device=device)
            h = coins(probs, rng(10, device))
            assert h.shape == shape and h.dtype == dtype and h.device == probs.device
            assert ((h == 0) | (h == 1)).all() and (probs == 0.5).all()
            assert torch.equal(h, coins(probs, rng(10, device)))
    with torch.device("meta"):
        assert coins(torch.ones(3, device="cpu"), rng(11)).device.type == "cpu"


# ---------------------------------------------------------------- what is refused


def test_bad_bases_and_states_are_refused(rng):
    labels, gaussian = LabelRBM(4, 3, 5), GaussianRBM(3, 4)
    for make, wrong, what in (
        (labels.annealing_path, (torch.zeros(4),), r"base_bias must be \(7,\)"),
        (labels.annealing_path, (torch.full((7,), math.nan),), "NaN"),
        (gaussian.annealing_path, (torch.zeros(4),), r"base_mean must be \(3,\)"),
        (gaussian.annealing_path, (None, torch.zeros(3).double()), "base_variance must be"),
        (gaussian.annealing_path, (None, torch.tensor([1.0, 0.0, 1.0])), "at index 1 it is 0"),
    ):
        with pytest.raises(ValueError, match=what):
            make(*wrong)
    with pytest.raises(ValueError, match="one label"):
        labels.annealing_path().step(torch.zeros(2, 7), 0.5)
    with pytest.raises(TypeError, match="generator"):
        gaussian.annealing_path().step(torch.zeros(2, 3), 0.5, generator=3)


def test_paths_follow_their_machine(rng):
    for name in NAMES:
        path, v = path_and_points(name, rng, dtype=torch.float32)
        assert path.log_prob(v, 0.5).dtype == path.step(v, 0.5).dtype == torch.float32
        assert profile(path, v)(0.5).dtype == path.base_log_z.dtype == F64
        before = path.log_prob(v, 1.0)
        with torch.no_grad():
            path.rbm.W.mul_(2.0)
        assert not torch.equal(before, path.log_prob(v, 1.0))
        assert not before.requires_grad and not path.base_log_z.requires_grad
        with torch.device("meta"):
            x, increment = path.advance(path.sample_base(3), 0.1, 0.2)
            assert x.device.type == increment.device.type == "cpu"


# ---------------------------------------------------------------- likelihood


@pytest.mark.parametrize("name", [*NAMES, "centred"])
def test_the_likelihood_of_all_states_sums_to_one_and_its_errors_are_told_apart(rng, name, ledger):
    if name == "centred":
        rbm, v = randomised(CentredRBM(4, 5, dtype=F64), rng), binary_states(4, dtype=F64)
    else:
        path, v = path_and_points(name, rng)
        rbm = path.rbm
    exact = rbm.log_z()
    found = rbm.log_likelihood(v, LogZ(exact.value, 0.2))
    assert found.rows.shape == (len(v),) and found.rows.dtype == F64
    if name != "gaussian":
        ledger(f"probabilities of all states, {name}", exact=1.0, estimate=found.rows.exp().sum())
    rows = rbm.log_prob(v).detach() - exact.value
    torch.testing.assert_close(found.value, rows.mean())
    # four times the rows: half the sampling error, the same error of log Z
    more = rbm.log_likelihood(v.repeat(4, 1), LogZ(exact.value, 0.2))
    assert more.sampling_error / found.sampling_error == pytest.approx(0.5, rel=0.03)
    assert found.log_z_error == more.log_z_error == 0.2
    torch.testing.assert_close(found.sampling_error, rows.std() / math.sqrt(len(v)))
    assert not found.value.requires_grad


def test_a_batch_of_machines_has_likelihoods_of_its_own(rng):
    batch = randomised(RBM(4, 5, batch_shape=(3,), dtype=F64), rng)
    v = binary_states(4, dtype=F64)
    found = batch.log_likelihood(v, batch.log_z())
    torch.testing.assert_close(found.rows.exp().sum(-1), torch.ones(3, dtype=F64))
    one = batch.unbind()[1]
    torch.testing.assert_close(found.value[1], one.log_likelihood(v, one.log_z()).value)
    with pytest.raises(ValueError, match=r"shape of the batch of machines, \(3,\), got \(\)"):
        batch.log_likelihood(v, one.log_z())
    with pytest.raises(ValueError, match="at least two|at least 2"):
        one.log_likelihood(v[:1], one.log_z())
