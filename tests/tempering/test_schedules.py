"""Schedules: their closed forms, their ends, and the betas that are refused."""

import math

import pytest
import torch

from companion.tempering import (
    check_betas,
    geometric_schedule,
    linear_schedule,
    sigmoid_schedule,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "make", [linear_schedule, sigmoid_schedule, lambda n: geometric_schedule(n, 1e-4)]
)
@pytest.mark.parametrize("num", [3, 4, 30, 10_001])
def test_schedules_ascend_from_zero_to_one_exactly(make, num):
    betas = make(num)
    assert betas.shape == (num,) and betas.dtype == torch.float64
    assert betas[0] == 0.0 and betas[-1] == 1.0
    assert torch.equal(check_betas(betas, CPU, from_zero=True), betas)


def test_steps_are_equal_in_what_they_are_even_in():
    torch.testing.assert_close(
        linear_schedule(7).diff(), torch.full((6,), 1 / 6, dtype=torch.float64)
    )
    log_betas = geometric_schedule(9, 0.01)[1:].log()
    assert log_betas[0] == pytest.approx(math.log(0.01))
    torch.testing.assert_close(log_betas.diff(), (-log_betas[0] / 7).expand(7))


def test_sigmoid_is_a_scaled_logistic_curve():
    u = torch.linspace(-1, 1, 11, dtype=torch.float64)
    for s in (0.5, 4.0, 12.0):
        low, high = torch.sigmoid(torch.tensor([-s, s], dtype=torch.float64))
        exact = (torch.sigmoid(s * u) - low) / (high - low)
        torch.testing.assert_close(sigmoid_schedule(11, s), exact)
    betas = sigmoid_schedule(11)
    torch.testing.assert_close(betas + betas.flip(0), torch.ones(11, dtype=torch.float64))
    torch.testing.assert_close(
        sigmoid_schedule(11, 1e-3), linear_schedule(11), rtol=1e-6, atol=1e-6
    )


def test_geometric_makes_swaps_of_a_normal_law_equally_probable(rng):
    # beta ~ precision: the acceptance between beta and beta' depends on their ratio alone
    betas = geometric_schedule(6, 1e-3)[1:]
    x = torch.randn(
        2, 200_000, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    energies = 0.5 * x.square().squeeze(-1)
    low = energies[0] / betas[:-1]
    high = energies[1] / betas[1:]
    accept = ((betas[1:] - betas[:-1]) * (high - low)).clamp(max=0).exp()
    mean, error = accept.mean(0), accept.std(0) / math.sqrt(len(accept))
    assert ((mean - mean.mean()) / error).abs().max() < 4.8
    # of one dimension and ratio r the acceptance is 1 - (2 / pi) (atan sqrt(r) - atan 1 / sqrt(r))
    ratio = float(betas[1] / betas[0])
    exact = 4.0 / math.pi * math.atan(1.0 / math.sqrt(ratio))
    assert abs(float(mean[0]) - exact) < 4.8 * float(error[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_betas_are_made_where_asked(device):
    assert sigmoid_schedule(5, device=device).device.type == device
    assert geometric_schedule(5, 0.1, device=device).device.type == device
    assert linear_schedule(5, device=device).device.type == device


def test_betas_are_checked():
    assert check_betas([0.5, 1.0], CPU).dtype == torch.float64
    assert check_betas(torch.tensor([1.0]), CPU).tolist() == [1.0]
    for wrong, message in [
        ([0.0, 0.5], "to 1"),
        ([-0.1, 1.0], "from 0 or above"),
        ([0.0, 0.5, 0.5, 1.0], "betas 1 and 2 are 0.5 and 0.5"),
        ([0.0, 0.7, 0.5, 1.0], "betas 1 and 2"),
        ([0.0, math.nan, 1.0], "NaN"),
        ([[0.0, 1.0]], "one row"),
        ([], "empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_betas(wrong, CPU)
    for wrong in ([0.1, 1.0], [1.0]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            check_betas(wrong, CPU, from_zero=True)


def test_counts_and_shapes_are_checked():
    with pytest.raises(ValueError, match="num must be at least 2"):
        linear_schedule(1)
    with pytest.raises(ValueError, match="num must be at least 3"):
        geometric_schedule(2, 0.1)
    with pytest.raises(ValueError, match="smallest"):
        geometric_schedule(5, 1.0)
    with pytest.raises(ValueError, match="steepness"):
        sigmoid_schedule(5, 0.0)
    with pytest.raises(TypeError, match="num must be an integer"):
        linear_schedule(5.0)
