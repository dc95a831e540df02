"""Gibbs sampling in every order: exact starts stay exact, wrong conditionals don't."""

import math

import pytest
import torch
from exact_targets import p_value
from torch import Tensor

from companion.core import sample
from companion.mcmc import GibbsState, gibbs
from companion.targets import Gaussian
from companion.testing import binary_states, discrete_invariance_test

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SCANS = pytest.mark.parametrize("scan", ["systematic", "random", "palindromic"])
PRECISION = torch.tensor([[2.0, -0.9, 0.3], [-0.9, 1.0, 0.2], [0.3, 0.2, 0.5]]).double()
MEAN = torch.tensor([1.0, -2.0, 0.5]).double()


def normal_like(x: Tensor, generator) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def coordinate(i: int, *, beta: float = 1.0, bug: str = ""):
    """Redraws coordinate i of the normal law of that mean and `beta PRECISION`."""

    def conditional(x: Tensor, *, generator=None) -> Tensor:
        precision, mean = PRECISION.to(x), MEAN.to(x)
        pull = (x - mean) @ precision[i] - precision[i, i] * (x[..., i] - mean[i])
        if bug == "sign":
            pull = -pull
        scale = beta * precision[i, i]
        noise = normal_like(pull, generator) / (scale if bug == "scale" else scale.sqrt())
        x[..., i] = mean[i] - pull / precision[i, i] + noise
        return x

    return conditional


def block(x: Tensor, *, generator=None) -> Tensor:
    """Redraws the first two coordinates together, given the third."""
    precision, mean = PRECISION.to(x), MEAN.to(x)
    factor = torch.linalg.cholesky(torch.linalg.inv(precision[:2, :2]))
    shift = (x[..., 2:] - mean[2]) * precision[:2, 2] @ torch.linalg.inv(precision[:2, :2])
    first = mean[:2] - shift + normal_like(x[..., :2], generator) @ factor.T
    return torch.cat([first, x[..., 2:]], -1)


def normal(dtype: torch.dtype, device, beta: float = 1.0) -> Gaussian:
    return Gaussian(MEAN.to(device, dtype), torch.linalg.inv(beta * PRECISION).to(device, dtype))


# ---------------------------------------------------------------- invariance


@DTYPES
@SCANS
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_exact_starts_stay_exact(rng, device, dtype, scan, beta):
    kernel = gibbs([coordinate(i, beta=beta) for i in range(3)], scan)
    assert p_value(kernel, normal(dtype, device, beta), rng(0, device)) > 1e-5


@DTYPES
@SCANS
def test_blocks_are_conditionals_too(rng, device, dtype, scan):
    kernel = gibbs([block, coordinate(2)], scan)
    assert p_value(kernel, normal(dtype, device), rng(0, device)) > 1e-5


@SCANS
@pytest.mark.parametrize("bug", ["sign", "scale"])
def test_one_wrong_conditional_is_found(rng, device, scan, bug):
    kernel = gibbs([coordinate(0, bug=bug), coordinate(1), coordinate(2)], scan)
    assert p_value(kernel, normal(torch.float64, device), rng(0, device)) < 1e-7


def test_a_conditional_at_another_temperature_is_found(rng, device):
    kernel = gibbs([coordinate(0, beta=0.4), coordinate(1, beta=0.4), coordinate(2, beta=1.0)])
    assert p_value(kernel, normal(torch.float64, device, beta=0.4), rng(0, device)) < 1e-7


def test_all_blocks_at_once_from_old_values_is_found(rng, device):
    """The synchronous update, which is no Gibbs sampler."""

    def at_once(x: Tensor, *, generator=None) -> Tensor:
        columns = [coordinate(i)(x.clone(), generator=generator)[..., i] for i in range(3)]
        return torch.stack(columns, -1)

    assert p_value(gibbs([at_once]), normal(torch.float64, device), rng(0, device)) < 1e-7


# ---------------------------------------------------------------- discrete states

FIELDS = torch.tensor([0.5, -0.3, 0.8, -1.0]).double()


def ring(x: Tensor) -> Tensor:
    """An asymmetric law of four bits in a ring."""
    return 1.2 * (x * x.roll(1, -1)).sum(-1) + x @ FIELDS.to(x)


def bit(i: int, *, bug: bool = False):
    def conditional(x: Tensor, *, generator=None) -> Tensor:
        odds = 1.2 * (x[..., i - 1] + x[..., (i + 1) % 4]) + FIELDS[i].to(x)
        p = (odds * (0.8 if bug else 1.0)).sigmoid()
        u = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
        x[..., i] = (u < p).to(x)
        return x

    return conditional


@DTYPES
@SCANS
def test_bits_keep_their_law_and_a_wrong_temperature_is_found(rng, device, dtype, scan):
    states = binary_states(4, device=device, dtype=dtype)
    run = {"num_chains": 20_000, "num_steps": 6}
    for bug in (False, True):
        kernel = gibbs([bit(i, bug=bug) for i in range(4)], scan, log_prob=ring)
        found = discrete_invariance_test(kernel, ring, states, generator=rng(0, device), **run)
        assert (found.p_value < 1e-7) == bug
        assert bug or found.p_value > 1e-5


def flow(scan: str, generator, n: int = 400_000) -> Tensor:
    """Counts of (before, after) in one step from exact starts of a law of two bits."""

    def pair(x: Tensor) -> Tensor:
        return 1.5 * x[..., 0] * x[..., 1] - 0.5 * x[..., 0]

    def redraw(i: int):
        def conditional(x: Tensor, *, generator=None) -> Tensor:
            odds = 1.5 * x[..., 1 - i] - (0.5 if i == 0 else 0.0)
            x[..., i] = (torch.rand(len(x), generator=generator) < odds.sigmoid()).to(x)
            return x

        return conditional

    states = binary_states(2)
    start = torch.multinomial(pair(states).softmax(0), n, True, generator=generator)
    kernel = gibbs([redraw(0), redraw(1)], scan, log_prob=pair)
    end, _ = kernel.step(kernel.init(states[start]), generator=generator)
    label = (end.x @ torch.tensor([2.0, 1.0])).long()
    return (4 * start + label).bincount(minlength=16).reshape(4, 4).double()


@SCANS
def test_only_the_systematic_sweep_is_not_its_own_reverse(rng, scan):
    counts = flow(scan, rng(1))
    there, back = (counts.triu(1), counts.T.triu(1))
    z = ((there - back) / (there + back).clamp(min=1).sqrt()).abs().max()  # six comparisons
    assert (z > 10) if scan == "systematic" else (z < 4.9)


# ---------------------------------------------------------------- a law with known answers


def halves(a: float):
    """Conditionals of the normal pair of precision `[[1, -a], [-a, 1]]`."""

    def redraw(i: int):
        def conditional(x: Tensor, *, generator=None) -> Tensor:
            x[..., i] = a * x[..., 1 - i] + normal_like(x[..., i], generator)
            return x

        return conditional

    return [redraw(0), redraw(1)]


def test_two_variables_agree_with_the_exact_moments_and_autocorrelation(rng, ledger):
    a, chains = 0.5, 2000
    cov = torch.tensor([[1.0, a], [a, 1.0]]).double() / (1 - a * a)
    x0 = Gaussian(torch.zeros(2).double(), cov).sample(chains, generator=rng(2))
    x = sample(gibbs(halves(a)), x0, 100, generator=rng(3)).x
    lagged = (x[:, 1:, 0] * x[:, :-1, 0]).mean(1)
    for what, exact, means in (
        ("variance", 4 / 3, x[..., 0].square().mean(1)),
        ("covariance", 2 / 3, x.prod(-1).mean(1)),
        ("lag-1 autocovariance of x_1", a**2 * 4 / 3, lagged),
    ):
        se = means.std() / math.sqrt(chains)
        ledger(
            f"{what} of a normal pair of correlation 1/2, by Gibbs sampling",
            exact=exact,
            estimate=means.mean(),
            std_error=se,
        )
    # The autocorrelation is the squared correlation, not the correlation.
    assert abs(lagged.mean() - a * 4 / 3) > 4.5 * lagged.std() / math.sqrt(chains)


def test_an_improper_law_is_loud(rng):
    """For a > 1 no joint law has these conditionals, and the chain runs away."""
    kernel = gibbs(halves(1.5))
    with pytest.warns(UserWarning, match="NaN"):
        trace = sample(kernel, torch.zeros(20, 2), 300, generator=rng(4))
    assert trace.num_nan.min() > 0 and trace.x.isfinite().all()


# ---------------------------------------------------------------- what a step is


def test_orders_of_the_scans(rng):
    seen: list[int] = []

    def note(i: int):
        def conditional(x: Tensor, *, generator=None) -> Tensor:
            seen.append(i)
            x[..., i] += 1
            return x

        return conditional

    blocks = [note(i) for i in range(3)]
    for scan, order in (("systematic", [0, 1, 2]), ("palindromic", [0, 1, 2, 1, 0])):
        seen.clear()
        kernel = gibbs(blocks, scan)
        kernel.step(kernel.init(torch.zeros(4, 3)), generator=rng(0))
        assert seen == order
    kernel = gibbs(blocks, "random")
    state, _ = kernel.step(kernel.init(torch.zeros(3000, 3)), generator=rng(0))
    assert (state.x.sum(-1) == 1).all()  # each chain one block, of its own choice
    assert (state.x.mean(0) - 1 / 3).abs().max() < 4.7 * math.sqrt(2 / 9 / 3000)
    seen.clear()
    kernel.step(kernel.init(torch.zeros(1, 3)), generator=rng(0))
    assert len(seen) == 1  # one chain pays for one block


def test_earlier_draws_are_not_changed_in_place(rng):
    kernel = gibbs(halves(0.5))
    start = torch.zeros(5, 2)
    first, _ = kernel.step(kernel.init(start), generator=rng(0))
    kept = first.x.clone()
    kernel.step(first, generator=rng(1))
    assert torch.equal(first.x, kept) and (start == 0).all()


def test_the_log_density_is_carried_if_it_is_given(rng):
    x0 = torch.zeros(5, 2)
    pair = Gaussian(torch.zeros(2), torch.eye(2))
    trace = sample(gibbs(halves(0.0), log_prob=pair), x0, 4, generator=rng(0))
    torch.testing.assert_close(trace.log_prob, pair(trace.x))
    assert sample(gibbs(halves(0.0)), x0, 4, generator=rng(0)).log_prob is None


@DTYPES
@SCANS
def test_everything_follows_the_chains(rng, device, dtype, scan):
    x = torch.zeros(3, 4, 3, dtype=dtype, device=device)
    for log_prob in (None, normal(dtype, device)):
        kernel = gibbs([coordinate(i) for i in range(3)], scan, log_prob=log_prob)
        with torch.device("meta"):
            state = kernel.init(x)
            for _ in range(3):
                state, info = kernel.step(state, generator=rng(1, device))
        assert (state.x.shape, state.x.dtype, state.x.device.type) == (x.shape, dtype, device.type)
        assert {field.shape for field in info} == {(3, 4)}
        single, info = kernel.step(kernel.init(x[0, 0]), generator=rng(1, device))
        assert single.x.shape == (3,) and info.accepted.shape == ()


def test_events_may_have_other_dimensions(rng):
    def flip(x: Tensor, *, generator=None) -> Tensor:
        return 1 - x

    for event, dtype in (((), torch.long), ((4, 4), torch.float32)):
        x0 = torch.zeros(7, *event, dtype=dtype)
        trace = sample(gibbs([flip], event_ndim=len(event)), x0, 2, generator=rng(0))
        assert trace.x.shape == (7, 2, *event) and (trace.x[:, 0] == 1).all()
        assert trace.accept_prob.shape == (7,)


def test_bad_arguments_are_refused(device):
    with pytest.raises(ValueError, match="conditionals is empty"):
        gibbs([])
    with pytest.raises(ValueError, match=r"scan must be one of .* got 'checkerboard'"):
        gibbs(halves(0.5), "checkerboard")
    with pytest.raises(ValueError, match=r"must be finite.* shape \(3, 2\), 1 entries"):
        gibbs(halves(0.5)).init(torch.tensor([[0.0, 1.0], [math.nan, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="event dimensions"):
        gibbs(halves(0.5), event_ndim=3).init(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="inf at chain 1"):
        gibbs(halves(0.5), log_prob=lambda x: x.log().sum(-1)).init(
            torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        )
    kernel = gibbs([*halves(0.5), lambda x, *, generator: x[..., 0]])
    with pytest.raises(ValueError, match=r"conditional 2 must return x whole, \(5, 2\) .* \(5,\)"):
        kernel.step(kernel.init(torch.zeros(5, 2)))
    with pytest.raises(ValueError, match=r"the generator is on .* but the tensors are on meta"):
        kernel.step(GibbsState(torch.zeros(5, 2, device="meta")), generator=torch.Generator(device))
