"""What the diagnostics take for draws, and what they say of chains that never moved."""

import math
import re

import pytest
import torch

from companion.core import Trace
from companion.diagnostics import (
    autocorrelation,
    ess_bulk,
    ess_tail,
    integrated_autocorrelation_time,
    mcse_mean,
    mcse_quantile,
    mcse_sd,
    rhat,
    summary,
)

ONE_A_COORDINATE = {
    "integrated_autocorrelation_time": integrated_autocorrelation_time,
    "ess_bulk": ess_bulk,
    "ess_tail": ess_tail,
    "mcse_mean": mcse_mean,
    "mcse_sd": mcse_sd,
    "mcse_quantile": lambda x: mcse_quantile(x, 0.3),
    "rhat": rhat,
}
ALL = ONE_A_COORDINATE | {"autocorrelation": lambda x: autocorrelation(x, 3), "summary": summary}
each = pytest.mark.parametrize("name", ONE_A_COORDINATE)
every = pytest.mark.parametrize("name", ALL)


def normal(shape, rng, device="cpu", dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, device=device, generator=rng(seed, device))


def as_trace(x, num_chain_dims):
    chains = torch.zeros(x.shape[:num_chain_dims], device=x.device)
    return Trace(x, None, chains + 1.0, chains.long(), chains.long(), {})


@each
@pytest.mark.parametrize("event", [(), (2,), (2, 3)])
def test_every_coordinate_gets_a_float64_number(rng, device, name, event):
    x = normal((4, 100, *event), rng, device, torch.float32)
    result = ALL[name](x)
    assert result.shape == event
    assert result.dtype == torch.float64
    assert result.device.type == device.type
    assert result.isfinite().all()
    torch.testing.assert_close(result, ALL[name](x.double()), rtol=0.0, atol=0.0)
    for index in torch.cartesian_prod(*map(torch.arange, event)) if event else ():
        column = x[(..., *(index.reshape(-1).tolist()))]
        torch.testing.assert_close(result[tuple(index.reshape(-1))], ALL[name](column))


@each
def test_a_trace_has_its_chain_dimensions_flattened(rng, name):
    x = normal((2, 3, 100, 2), rng)
    expected = ALL[name](x.flatten(0, 1))
    assert torch.equal(ALL[name](as_trace(x, 2)), expected)
    assert torch.equal(ALL[name](as_trace(x.flatten(0, 1), 1)), expected)
    one = x[0, 0]
    if name != "rhat":
        assert torch.equal(ALL[name](as_trace(one, 0)), ALL[name](one[None]))


@each
def test_neither_scale_nor_location_of_the_draws_matters(rng, name):
    """ArviZ by itself takes draws that lie within 1e-15 of one another for constant."""
    x = (normal((4, 100, 2), rng).cumsum(1) * 2**20).round() / 2**20  # no sum below is rounded
    expected = ALL[name](x)
    for scale in (2.0**-66, 2.0**-500, 2.0**500):
        factor = scale if name.startswith("mcse") else 1.0
        torch.testing.assert_close(ALL[name](scale * x) / factor, expected, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(ALL[name](x + 2**20), expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_discrete_draws_count_as_numbers(rng, dtype):
    x = (normal((4, 200), rng) > 0.5).to(dtype)
    for name, statistic in ONE_A_COORDINATE.items():
        if name != "mcse_quantile":
            assert torch.equal(statistic(x), statistic(x.double())), name
    assert "x" in str(summary(x))


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_an_error_that_names_chain_and_draw(rng, name, value):
    x = normal((4, 50, 2), rng)
    x[2, 17, 1] = x[3, 5, 0] = value
    message = (
        r"2 of 400 draws are NaN or infinite, the first in chain 2, draw 17, coordinate \(1,\)"
    )
    with pytest.raises(ValueError, match=message):
        ALL[name](x)
    with pytest.raises(ValueError, match="the first in chain 2, draw 17: find out"):
        ALL[name](x[..., 1])


@every
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4, 3), ValueError, "3 draws a chain are too few, 4 are the least"),
        (torch.zeros(100), ValueError, r"\(100,\); one chain of shape \(draws,\) is x\[None\]"),
        (torch.zeros(0, 100), ValueError, r"one or more of each; got \(0, 100\)"),
        (torch.zeros(4, 100, 0), ValueError, r"one or more of each; got \(4, 100, 0\)"),
        (torch.zeros(4, 100) + 1j, TypeError, "complex draws"),
        ([[0.0] * 100], TypeError, "expected draws as a tensor, or a Trace; got list"),
    ],
)
def test_what_are_no_draws_is_refused(name, x, error, message):
    with pytest.raises(error, match=message):
        ALL[name](x)


@each
def test_a_stuck_chain_has_neither_effective_size_nor_error(rng, name):
    """Nor have the other chains, of the same coordinate; that of others is left alone."""
    x = normal((4, 200, 2, 2), rng)
    stuck = x.clone()
    stuck[3, :, 1, 0] = 0.1
    if name == "rhat":
        assert rhat(stuck)[1, 0] > 1.1  # the others moved: this one is far from them
        return
    message = (
        r"in 1 of 4 coordinates a chain is constant \(the first is chain 3 at coordinate \(1, 0\)"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        result = ALL[name](stuck)
    assert caught[0].filename == __file__
    assert result[1, 0].isnan()
    others = torch.tensor([[True, True], [False, True]])
    assert torch.equal(result[others], ALL[name](x)[others])


@each
@pytest.mark.parametrize("num_chains", [1, 4])
@pytest.mark.filterwarnings("ignore:one chain")
def test_chains_that_are_all_stuck_at_the_same_place_have_no_diagnostics(name, num_chains):
    with pytest.warns(UserWarning, match=r"in 1 of 1 coordinates a chain is constant .* chain 0\)"):
        assert ALL[name](torch.full((num_chains, 100), 0.1)).isnan()


def test_a_chain_that_moved_once_has_hardly_an_effective_draw():
    x = torch.zeros(4, 1000, dtype=torch.float64)
    x[:, 500:] = 1.0
    assert ess_bulk(x) < 10
    assert integrated_autocorrelation_time(x) > 400


@every
def test_no_tensor_is_made_on_the_default_device(rng, name):
    x = normal((4, 50, 2), rng)
    with torch.device("meta"):
        result = ALL[name](x)
    if name == "summary":
        assert re.search(r"x\[1\]", str(result))
        result = result.mcse_quantiles
    assert result.device.type == "cpu"
