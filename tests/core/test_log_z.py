"""`LogZ`: one type for every estimate of a partition function."""

import dataclasses
import math
import pickle

import pytest
import torch

from companion.core import LogZ


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_log_z_is_float64_on_the_device_of_its_value(device, dtype):
    log_z = LogZ(
        torch.tensor([1, 2], dtype=dtype, device=device),
        torch.tensor([0.1, 0.2]),
        log_weights=torch.zeros(5, 2),
        ess=torch.tensor(3.0),
        covariance=torch.eye(2),
        discretization=0.1,
    )
    for name in ("value", "std_error", "log_weights", "ess", "covariance", "discretization"):
        field = getattr(log_z, name)
        assert (field.dtype, field.device.type) == (torch.float64, device.type), name


def test_log_z_of_numbers_has_no_other_fields():
    log_z = LogZ(2, 0)
    assert (log_z.value.item(), log_z.std_error.item()) == (2.0, 0.0)
    assert log_z.log_weights is log_z.ess is log_z.covariance is log_z.discretization is None
    assert log_z.converged
    assert not LogZ(2, 0, converged=False).converged


def test_one_standard_error_serves_a_whole_vector():
    log_z = LogZ(torch.tensor([1.0, 2.0, 3.0]), 0.0)
    assert log_z.std_error.tolist() == [0.0, 0.0, 0.0]


def test_log_z_carries_the_gradient_of_an_exact_value():
    b = torch.tensor(1.0, requires_grad=True)
    LogZ(torch.nn.functional.softplus(b), 0.0).value.backward()
    torch.testing.assert_close(b.grad, torch.sigmoid(b.detach()))


def test_log_z_interval_is_the_normal_one():
    low, high = LogZ(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.0])).interval(
        0.6826894921370859
    )
    assert low.tolist() == pytest.approx([-1.0, 5.0])
    assert high.tolist() == pytest.approx([3.0, 5.0])
    assert low.dtype == torch.float64
    for level in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(ValueError, match="level must be a finite number above 0.0 and below 1"):
            LogZ(1.0, 1.0).interval(level)


def test_log_z_survives_pickling_and_replacement():
    log_z = LogZ(torch.tensor([1.0, 2.0]), 0.5, ess=torch.tensor(9.0))
    again = pickle.loads(pickle.dumps(log_z))
    assert torch.equal(again.value, log_z.value)
    assert torch.equal(again.ess, log_z.ess)
    moved = dataclasses.replace(log_z, value=log_z.value + 1, converged=False)
    assert moved.value.tolist() == [2.0, 3.0]
    assert not moved.converged


def test_log_z_does_not_move_to_the_default_device():
    value = torch.zeros(2)
    with torch.device("meta"):
        assert LogZ(value, 0.1).interval()[1].device.type == "cpu"
        assert LogZ(1.0, 0.1).value.device.type == "cpu"
