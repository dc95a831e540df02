"""`sample` and its `Trace`: what is run, kept, counted, saved and resumed."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from companion.core import Kernel, LogZ, Trace, sample

# ---------------------------------------------------------------- sample


class Count(NamedTuple):
    x: Tensor
    log_prob: Tensor | None


class Info(NamedTuple):
    accept_prob: Tensor
    accepted: Tensor


class NanInfo(NamedTuple):
    accept_prob: Tensor
    accepted: Tensor
    is_nan: Tensor


def counting(event_dims: int, log_prob: bool = True) -> Kernel:
    """Adds one to every chain at each step: draw number t shows which steps were kept."""

    def density(x: Tensor) -> Tensor | None:
        return 10.0 * x.flatten(x.ndim - event_dims)[..., 0] if event_dims else 10.0 * x

    def step(state: Count, *, generator=None) -> tuple[Count, Info]:
        x = state.x + 1
        chains = x.shape[: x.ndim - event_dims]
        accept = torch.full(chains, 0.25, dtype=x.dtype, device=x.device)
        return Count(x, density(x) if log_prob else None), Info(accept, accept > 0.5)

    return Kernel(lambda x: Count(x, density(x) if log_prob else None), step)


@pytest.mark.parametrize("chains", [(), (4,), (3, 4)])
@pytest.mark.parametrize("event", [(), (2,), (2, 3)])
def test_draws_go_right_behind_the_chains(device, chains, event):
    x0 = torch.zeros((*chains, *event), dtype=torch.float64, device=device)
    trace = sample(counting(len(event)), x0, 5)
    assert trace.x.shape == (*chains, 5, *event)
    assert trace.log_prob.shape == (*chains, 5)
    assert trace.accept_prob.shape == trace.num_nan.shape == chains
    assert trace.x.dtype == torch.float64
    assert {trace.x.device.type, trace.num_nan.device.type} == {device.type}
    last_chain = trace.x.reshape(-1, 5, math.prod(event))[-1, :, 0]
    assert last_chain.tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(trace.log_prob.reshape(-1, 5)[-1], 10 * last_chain)
    assert (trace.accept_prob == 0.25).all()


@pytest.mark.parametrize(
    ("warmup", "thin", "expected"),
    [(0, 1, [1, 2, 3]), (4, 1, [5, 6, 7]), (0, 3, [3, 6, 9]), (2, 5, [7, 12, 17])],
)
def test_warmup_and_thinning_keep_the_right_steps(warmup, thin, expected):
    trace = sample(counting(1), torch.zeros(2, 1), 3, warmup=warmup, thin=thin)
    assert trace.x[:, :, 0].tolist() == [expected, expected]
    assert trace.log_prob.tolist() == [[10 * t for t in expected]] * 2


def test_kernels_without_a_log_density_give_none():
    trace = sample(counting(1, log_prob=False), torch.zeros(2, 1), 3)
    assert trace.log_prob is None


def nan_at(steps: dict[int, list[int]]) -> Kernel:
    """Reports NaN at the given steps (from 1) in the given chains of three."""

    def step(state: Count, *, generator=None) -> tuple[Count, NanInfo]:
        x = state.x + 1
        is_nan = torch.zeros(3, dtype=torch.bool)
        is_nan[steps.get(int(x[0, 0]), [])] = True
        accept = torch.where(is_nan, 0.0, 1.0)
        return Count(x, None), NanInfo(accept, ~is_nan, is_nan)

    return Kernel(lambda x: Count(x, None), step)


def test_nan_proposals_are_counted_by_chain_after_the_warmup_and_warned_of():
    kernel = nan_at({1: [0, 1, 2], 3: [0], 4: [0, 2], 6: [0]})
    with pytest.warns(UserWarning, match=r"4 proposals had a NaN .* \(in 2 of 3 chains\)"):
        trace = sample(kernel, torch.zeros(3, 1), 2, warmup=2, thin=2)
    assert trace.num_nan.tolist() == [3, 0, 1]
    assert trace.accept_prob.tolist() == [0.25, 1.0, 0.75]  # thinned steps count, warm-up does not


def test_nan_during_the_warmup_alone_is_no_warning():
    trace = sample(nan_at({1: [0, 1, 2]}), torch.zeros(3, 1), 2, warmup=1)
    assert trace.num_nan.tolist() == [0, 0, 0]


def test_the_graph_of_a_model_is_not_kept(rng):
    """A log-density with parameters would otherwise hold every step's graph in memory."""
    weight = torch.ones(2, requires_grad=True)

    def density(x: Tensor) -> Tensor:
        return -(weight * x).square().sum(-1)

    def step(state: Count, *, generator=None) -> tuple[Count, Info]:
        x = state.x + torch.randn(state.x.shape, generator=generator)
        accept = (density(x) - state.log_prob).exp().clamp(max=1)
        return Count(x, state.log_prob + density(x)), Info(accept, accept > 0)

    kernel = Kernel(lambda x: Count(x, density(x)), step)
    trace = sample(kernel, torch.zeros(3, 2), 4, generator=rng(3))
    assert not trace.log_prob.requires_grad
    assert not trace.accept_prob.requires_grad
    assert density(torch.ones(2)).requires_grad  # gradients are on again afterwards


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_draws": 0}, ValueError, "num_draws must be at least 1"),
        ({"num_draws": 2.0}, TypeError, "num_draws must be an integer"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0"),
        ({"thin": 0}, ValueError, "thin must be at least 1"),
        ({"x0": torch.tensor([0.0, math.nan])}, ValueError, r"x0 has 1 NaN.*index \(1,\)"),
        ({"x0": torch.zeros(0, 2)}, ValueError, "x0 is empty"),
        ({"x0": [0.0]}, TypeError, "x0 must be a torch.Tensor"),
        ({"generator": 1}, TypeError, "generator must be a torch.Generator"),
    ],
)
def test_bad_arguments_are_refused_before_the_kernel_runs(keywords, error, message):
    def fail(*args, **kwargs):
        raise AssertionError("the kernel ran")

    arguments = {"x0": torch.zeros(2), "num_draws": 2} | keywords
    with pytest.raises(error, match=message):
        sample(Kernel(fail, fail), **arguments)


def test_the_generator_reaches_the_kernel(rng):
    def step(state: Count, *, generator=None) -> tuple[Count, Info]:
        x = torch.randn(state.x.shape, generator=generator)
        return Count(x, None), Info(torch.ones(4), torch.ones(4, dtype=torch.bool))

    kernel = Kernel(lambda x: Count(x, None), step)
    first = sample(kernel, torch.zeros(4, 2), 10, generator=rng(1))
    again = sample(kernel, torch.zeros(4, 2), 10, generator=rng(1))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, sample(kernel, torch.zeros(4, 2), 10, generator=rng(2)).x)


def test_progress_is_silent_unless_asked_for(capfd):
    sample(counting(1), torch.zeros(2, 1), 3)
    assert capfd.readouterr() == ("", "")
    sample(counting(1), torch.zeros(2, 1), 3, warmup=2, thin=4, progress=True)
    assert "14/14" in capfd.readouterr().err


def test_no_tensor_of_a_trace_is_made_on_the_default_device():
    x0, kernel = torch.zeros(3, 2), counting(1)
    with torch.device("meta"):
        trace = sample(kernel, x0, 4, warmup=1)
        tensors = (trace.x, trace.log_prob, trace.accept_prob, trace.num_nan)
        assert {t.device.type for t in tensors} == {"cpu"}


# ---------------------------------------------------------------- Trace


@pytest.mark.parametrize("chains", [(), (4,), (3, 4)])
def test_arviz_gets_chains_draws_and_event(chains):
    pytest.importorskip("arviz_base")
    trace = sample(counting(2), torch.zeros(*chains, 2, 3), 5)
    tree = trace.to_arviz()
    num_chains = math.prod(chains)
    assert tree["posterior"]["x"].shape == (num_chains, 5, 2, 3)
    assert tree["posterior"]["x"].dims[:2] == ("chain", "draw")
    assert tree["sample_stats"]["lp"].shape == (num_chains, 5)
    assert tree["posterior"]["x"].values[-1, :, 0, 0].tolist() == [1, 2, 3, 4, 5]


def test_arviz_gets_no_log_density_where_there_is_none():
    pytest.importorskip("arviz_base")
    tree = sample(counting(1, log_prob=False), torch.zeros(2, 1), 5).to_arviz()
    assert "sample_stats" not in tree.children


def test_results_are_frozen_and_compare_by_identity():
    trace = sample(counting(1), torch.zeros(2, 1), 3)
    log_z = LogZ(torch.zeros(2), 0.0)
    for result, name in ((trace, "x"), (log_z, "value")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, name, None)
        assert result == result  # tensors of several entries have no truth value to compare by
        assert result != dataclasses.replace(result)
    assert isinstance(trace, Trace)
