"""Slice sampling: exact starts stay exact for any width, planted bugs don't; cost and limits."""

import importlib
import math

import pytest
import torch
from exact_targets import NAMES, p_value, plant, target
from torch import Tensor
from torch.distributions import Exponential

from companion.core import sample
from companion.mcmc import ChainState, slice_sampler, slice_update

slices = importlib.import_module("companion.mcmc.slice")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

SETTINGS = {
    "coordinates": {"width": 2.0},
    "narrow and limited": {"width": 0.7, "max_widths": 3},
    "one width": {"width": 3.0, "max_widths": 1},
    "random directions": {"width": 2.0, "directions": "random"},
}


# ---------------------------------------------------------------- invariance


@DTYPES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_exact_starts_stay_exact(rng, device, dtype, name, setting):
    law = target(name, dtype, device)
    kernel = slice_sampler(law, **SETTINGS[setting])
    assert p_value(kernel, law, rng(0, device), num_chains=4000, num_steps=3) > 1e-5


def test_widths_may_differ_from_chain_to_chain(rng, device):
    law = target("skewed", torch.float64, device)
    widths = torch.logspace(-0.5, 1.5, 4000, dtype=torch.float64, device=device)
    kernel = slice_sampler(law, widths)
    assert p_value(kernel, law, rng(1, device), num_chains=4000, num_steps=3) > 1e-5


@pytest.mark.parametrize(
    ("setting", "old", "new"),
    [
        ("coordinates", "here + torch.log1p(-uniform())", "here + 0.5 * torch.log1p(-uniform())"),
        ("coordinates", "(value >= log_height)  #", "(value >= here.minimum(log_height + 0.5))  #"),
        ("coordinates", "in enumerate((-width, width))", "in enumerate((-width,))"),
        ("narrow and limited", "(max_widths * uniform()).floor()", "torch.zeros_like(low)"),
        ("narrow and limited", "(max_widths * uniform()).floor()", "torch.ones_like(low)"),
        ("coordinates", "active & (t >= 0), t, high)", "active & (t >= 0), 0.2 * t, high)"),
        ("one width", "low = -width * uniform()", "low = 0.0 * -width * uniform()"),
    ],
    ids=[
        "wrong law of the height",
        "slice too high",
        "steps out on one side only",
        "the whole limit on one side",
        "half of the limit on each side",
        "cuts off more than it saw",
        "interval not placed at random",
    ],
)
def test_bugs_in_the_update_are_found(rng, device, monkeypatch, setting, old, new):
    plant(monkeypatch, slice_update, old, new)
    law = target("skewed", torch.float64, device)
    kernel = slice_sampler(law, **SETTINGS[setting])
    assert p_value(kernel, law, rng(0, device)) < 1e-7


def test_a_log_density_kept_from_another_point_is_loud(rng, monkeypatch):
    """Its slice may hold no point at all: without a limit the loop would never end."""
    plant(monkeypatch, slice_update, "direction, here_new), info", "direction, here), info")
    law = target("skewed")
    kernel = slice_sampler(law, 2.0)
    x0 = law.sample(1000, generator=rng(0))
    message = r"of 1000 chains found no point of their slice.*same value"
    with pytest.raises(RuntimeError, match=message):
        sample(kernel, x0, 5, generator=rng(1))


def test_a_random_log_density_is_loud(rng):
    generator = rng(0)

    def noisy(x: Tensor) -> Tensor:
        return -0.5 * x.square() - 20 * torch.rand(x.shape, generator=generator, dtype=x.dtype)

    kernel = slice_sampler(noisy, 1.0, max_widths=1)
    state = ChainState(torch.zeros(100), torch.full((100,), 50.0))
    with pytest.raises(RuntimeError, match="100 of 100 chains"):
        kernel.step(state, generator=rng(1))


# ---------------------------------------------------------------- exact answers


@pytest.mark.parametrize("directions", ["coordinates", "random"])
def test_moments_of_a_skewed_law(rng, ledger, directions):
    law = target("skewed")
    x0 = law.sample(1000, generator=rng(2))
    x = sample(slice_sampler(law, 4.0, directions=directions), x0, 30, generator=rng(3)).x
    centred = x - law.mean
    for what, exact, values in (
        ("mean of x_2", law.mean[1], x[..., 1]),
        ("variance of x_1", law.covariance[0, 0], centred[..., 0].square()),
        ("covariance of x_1 and x_2", law.covariance[0, 1], centred.prod(-1)),
    ):
        means = values.mean(1)  # chains are independent, so their means tell the error
        ledger(
            f"{what} of a skewed law, by slice sampling along {directions}",
            exact=exact,
            estimate=means.mean(),
            std_error=means.std() / math.sqrt(len(means)),
        )


def test_one_update_of_a_uniform_law_is_an_exact_draw(rng, ledger):
    """Its slices are the whole support, so the start is forgotten at once."""

    def unit(x: Tensor) -> Tensor:
        return torch.where((x > 0) & (x < 1), 0.0, -math.inf).to(x)

    def one_step(max_widths: int) -> tuple[Tensor, Tensor]:
        kernel = slice_sampler(unit, 0.3, max_widths=max_widths)
        x0 = torch.full((50_000,), 0.01, dtype=torch.float64)
        x = kernel.step(kernel.init(x0), generator=rng(4))[0].x
        return x.mean(), x.std() / math.sqrt(len(x))

    mean, se = one_step(100_000)
    ledger(
        "mean of a uniform law, one slice update after 0.01", exact=0.5, estimate=mean, std_error=se
    )
    # A limit keeps the law, but not that: the share of one side may not reach to the end.
    mean, se = one_step(10)
    assert abs(mean - 0.5) > 4.5 * se


# ---------------------------------------------------------------- cost and limits


def test_evaluations_are_counted_for_each_chain(rng):
    calls = 0

    def bell(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -0.5 * x.square().sum(-1)

    x = torch.randn(200, 3, generator=rng(5))
    kernel = slice_sampler(bell, 2.0)
    _, info = kernel.step(kernel.init(x), generator=rng(6))
    assert info.num_evals.max() <= calls - 1  # one was for the start
    assert info.num_evals.min() >= 9  # each line: both ends, and a point that fits
    assert info.num_evals.double().mean() < 3 * 8
    alone = slice_sampler(lambda x: -0.5 * x.square(), 2.0, max_widths=1)
    _, info = alone.step(alone.init(x[:, 0]), generator=rng(6))
    assert info.num_evals.min() == 1  # nothing to step out for, and the first point fits


def test_a_reached_limit_is_told(rng):
    x = torch.zeros(100)
    for max_widths, reached in ((2, True), (100, False)):
        kernel = slice_sampler(lambda x: -0.5 * x.square(), 0.2, max_widths=max_widths)
        trace = sample(kernel, x, 20, generator=rng(7))
        assert (trace.stats["at_limit"].double().mean() > 0.5) == reached
        assert trace.stats["num_evals"].shape == (100, 20)
    assert not trace.stats["at_limit"].any()


def test_the_tails_of_a_heavy_law_are_reached(rng):
    """Cauchy slices are as long as 1 / sqrt(u): the limit must not break the law."""

    class Cauchy:
        def log_prob(self, x: Tensor) -> Tensor:
            return -x.square().log1p()

        def sample(self, n: int, *, generator=None) -> Tensor:
            return (math.pi * (torch.rand(n, dtype=torch.float64, generator=generator) - 0.5)).tan()

    law = Cauchy()
    kernel = slice_sampler(law.log_prob, 1.0, max_widths=20)
    assert p_value(kernel, law, rng(8), num_chains=10_000, num_steps=3) > 1e-5


# ---------------------------------------------------------------- what is not allowed


def test_nan_and_minus_infinity_are_outside_and_nan_is_counted(rng):
    law = Exponential(torch.ones((), dtype=torch.float64))
    x0 = -torch.rand(200, dtype=torch.float64, generator=rng(9)).log()
    for below in (-math.inf, math.nan):
        kernel = slice_sampler(lambda x, below=below: torch.where(x > 0, -x, below), 1.0)
        assert p_value(kernel, law, rng(10), num_chains=4000, num_steps=3) > 1e-5
        if math.isnan(below):
            with pytest.warns(UserWarning, match="NaN"):
                trace = sample(kernel, x0, 20, generator=rng(11))
        else:
            trace = sample(kernel, x0, 20, generator=rng(11))
        assert (trace.x > 0).all()
        assert (trace.num_nan.sum() > 500) == math.isnan(below)


@pytest.mark.parametrize("directions", ["coordinates", "random"])
def test_an_infinite_density_does_not_hold_chains_for_ever(rng, directions):
    def log_prob(x: Tensor) -> Tensor:
        return torch.where((x[..., 0] - 1.5).abs() < 0.5, math.inf, -0.5 * x.square().sum(-1))

    kernel = slice_sampler(log_prob, 2.0, directions=directions)
    with pytest.warns(UserWarning, match="NaN"):
        trace = sample(kernel, torch.zeros(200, 2), 20, generator=rng(0))
    assert trace.log_prob.isfinite().all() and trace.num_nan.sum() > 200
    assert (trace.x.diff(dim=1) != 0).any(-1).all()


def test_widths_do_not_change_the_dtype_of_the_chains(rng):
    widths = torch.full((3,), 2.0, dtype=torch.float64)
    law = target("skewed", torch.float32)
    kernels = [slice_sampler(law, width) for width in (2.0, widths, widths.float(), widths[0])]
    x = torch.zeros(3, 2)
    states = [kernel.step(kernel.init(x), generator=rng(0))[0] for kernel in kernels]
    for state in states:
        assert state.x.dtype == state.log_prob.dtype == torch.float32
        assert torch.equal(state.x, states[0].x)


def test_bad_starts_and_arguments_are_refused(device):
    with pytest.raises(ValueError, match="nan at chain 1"):
        slice_sampler(torch.log, 1.0).init(torch.tensor([1.0, -1.0]))
    with pytest.raises(TypeError, match="floating"):
        slice_sampler(torch.square, 1.0).init(torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="width must be"):
        slice_sampler(torch.square, 0.0)
    with pytest.raises(ValueError, match="max_widths"):
        slice_sampler(torch.square, 1.0, max_widths=0)
    with pytest.raises(ValueError, match=r"directions must be one of .* got 'diagonal'"):
        slice_sampler(torch.square, 1.0, directions="diagonal")
    with pytest.raises(ValueError, match="does not broadcast to the chains"):
        slice_sampler(torch.square, torch.ones(3)).init(torch.ones(5))
    blank = ChainState(torch.zeros(5, device="meta"), torch.zeros(5, device="meta"))
    with pytest.raises(ValueError, match=r"the generator is on .* but the tensors are on meta"):
        slice_sampler(torch.square, 1.0).step(blank, generator=torch.Generator(device))


@DTYPES
@pytest.mark.parametrize("setting", SETTINGS)
def test_everything_follows_the_chains(rng, device, dtype, setting):
    law = target("skewed", dtype, device)
    kernel = slice_sampler(law, **SETTINGS[setting])
    x = law.sample(12, generator=rng(0, device)).reshape(3, 4, 2)
    with torch.device("meta"):
        state = kernel.init(x)
        for _ in range(3):
            state, info = kernel.step(state, generator=rng(1, device))
    assert state.x.shape == (3, 4, 2)
    assert {field.shape for field in info} == {(3, 4)} and state.log_prob.shape == (3, 4)
    assert (state.x.dtype, state.x.device.type) == (dtype, device.type)
    torch.testing.assert_close(state.log_prob, law(state.x))
    assert (state.x != x).all() or setting == "random directions"
    single, _ = kernel.step(kernel.init(x[0, 0]), generator=rng(1, device))
    assert single.x.shape == (2,) and single.log_prob.shape == ()


def test_events_may_have_any_number_of_dimensions(rng):
    for event in ((), (2, 3)):
        dims = tuple(range(-len(event), 0))
        for directions in ("coordinates", "random"):

            def bell(x: Tensor, dims=dims) -> Tensor:
                return -0.5 * (x.square().sum(dims) if dims else x.square())

            kernel = slice_sampler(bell, 2.0, directions=directions)
            state, _ = kernel.step(kernel.init(torch.zeros(5, *event)), generator=rng(0))
            assert state.x.shape == (5, *event) and (state.x != 0).all()
