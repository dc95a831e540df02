"""What kernels share: bad starts are named by chain, NaN means reject, noise comes in order."""

import math

import pytest
import torch

from companion.mcmc import (
    ChainState,
    GibbsState,
    GradientState,
    MoveInfo,
    expand,
    init_chains,
    init_gradient,
    metropolis_accept,
    select,
)
from companion.mcmc.base import check_floating, check_step_size, move_noise, per_chain

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def bowl(x):
    return -0.5 * x.square().sum(-1)


# ---------------------------------------------------------------- starts


@DTYPES
@pytest.mark.parametrize("chains", [(), (4,), (2, 3)])
def test_states_have_the_shapes_of_chains_and_events(device, dtype, chains):
    x = torch.ones(*chains, 5, dtype=dtype, device=device)
    with torch.device("meta"):
        plain, full = init_chains(bowl, x), init_gradient(bowl, x)
    for state in (plain, full):
        assert state.log_prob.shape == chains
        assert (state.log_prob.dtype, state.log_prob.device.type) == (dtype, device.type)
        assert (state.log_prob == -2.5).all()
    assert torch.equal(full.grad, -x)


def test_states_carry_no_graph():
    scale = torch.nn.Parameter(torch.ones(()))
    x = torch.ones(3, 2, requires_grad=True)
    for init in (init_chains, init_gradient):
        state = init(lambda x: -(scale * x).square().sum(-1), x)
        assert not any(a.requires_grad for a in state)


def test_bad_starts_are_counted_and_named_by_chain():
    x = torch.tensor([1.0, -1.0, 0.0, 2.0])
    match = r"log-density .* start of 2 of 4 chains: nan at chain 1, -inf at chain 2\."
    for init in (init_chains, init_gradient):
        with pytest.raises(ValueError, match=match):
            init(torch.log, x)
    grid = torch.ones(2, 3)
    grid[1, 2] = 0.0
    with pytest.raises(ValueError, match=r"1 of 6 chains: -inf at chain \(1, 2\)"):
        init_chains(torch.log, grid)
    with pytest.raises(
        ValueError, match=r"5 of 5 chains: .* chain 0, .* chain 1, .* chain 2, \.\.\."
    ):
        init_chains(torch.log, torch.zeros(5))
    with pytest.raises(ValueError, match="inf at chain 0"):
        init_chains(lambda x: 1 / x, torch.zeros(2))


def test_an_infinite_gradient_is_a_bad_start():
    x = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"the gradient is not finite .* 1 of 2 chains: .*chain 1"):
        init_gradient(lambda x: -x.sqrt().sum(-1), x)


def test_a_density_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"leading dimensions of x, \(4, 3\); got \(3,\)"):
        init_chains(lambda x: x.sum(0), torch.ones(4, 3))
    with pytest.raises(ValueError, match="got float"):
        init_chains(lambda x: 1.0, torch.ones(4, 3))


def test_gradients_need_floating_points_and_densities_do_not():
    x = torch.ones(4, 3, dtype=torch.long)
    assert init_chains(lambda x: x.sum(-1).float(), x).x.dtype == torch.long
    with pytest.raises(TypeError, match=r"floating .* got torch.int64"):
        init_gradient(bowl, x)
    with pytest.raises(TypeError, match=r"got torch.bool"):
        check_floating(x.bool())


# ---------------------------------------------------------------- accepting


@DTYPES
def test_acceptance_is_the_metropolis_probability_and_nan_is_rejected(device, dtype):
    ratio = torch.tensor(
        [2.0, 0.0, -1.0, -math.inf, math.inf, math.nan], dtype=dtype, device=device
    )
    expected = torch.tensor([1.0, 1.0, math.exp(-1), 0.0, 0.0, 0.0], dtype=dtype, device=device)
    with torch.device("meta"):
        info = metropolis_accept(ratio, torch.zeros_like(ratio))
    torch.testing.assert_close(info.accept_prob, expected)
    assert info.accepted.tolist() == [True, True, True, False, False, False]  # 0 < 0 is false
    assert info.is_nan.tolist() == [False] * 4 + [True] * 2  # infinity would never be left
    high = metropolis_accept(ratio, torch.full_like(ratio, 1 - torch.finfo(dtype).eps))
    assert high.accepted.tolist() == [True, True, False, False, False, False]


def test_frequency_of_acceptance_is_its_probability(rng):
    n = 200_000
    uniform = torch.rand(n, generator=rng(0), dtype=torch.float64)
    info = metropolis_accept(torch.full((n,), math.log(0.3), dtype=torch.float64), uniform)
    se = math.sqrt(0.3 * 0.7 / n)
    rate = float(info.accepted.double().mean())
    assert abs(rate - 0.3) < 4.5 * se
    assert abs((1 - rate) - 0.3) > 4.5 * se  # the complement would be seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frequency_of_acceptance_is_its_probability_in_half_precision_too(rng, device, dtype):
    n, p = 400_000, 2.0**-10  # a quarter of the spacing of bfloat16, twice that of float16
    log_prob = torch.zeros(n, dtype=dtype, device=device)
    noise = move_noise(ChainState(torch.zeros_like(log_prob), log_prob), rng(0, device))
    ratio = torch.full_like(log_prob, math.log(p))
    p = float(ratio[0].exp())
    se = math.sqrt(p / n)
    rate = metropolis_accept(ratio, noise.uniform).accepted.double().mean()
    assert abs(rate - p) < 4.5 * se
    wrong = torch.rand(n, dtype=dtype, device=device, generator=rng(0, device))
    rate = metropolis_accept(ratio, wrong).accepted.double().mean()
    assert abs(rate - p) > 4.5 * se or dtype == torch.float16


def test_selection_is_by_chain_over_every_field():
    accepted = torch.tensor([[True, False, False]])
    ones, zeros = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
    new, old = (GradientState(a, a[..., 0], a) for a in (ones, zeros))
    kept = select(accepted, new, old)
    assert isinstance(kept, GradientState)
    assert kept.log_prob.tolist() == [[1, 0, 0]]
    assert torch.equal(kept.x, kept.grad) and torch.equal(kept.x[..., 1], kept.log_prob)
    assert select(accepted, GibbsState(ones), GibbsState(zeros)).log_prob is None


def test_expand_appends_event_dimensions():
    like = torch.ones(4, 3, 2)
    assert expand(torch.ones(4), like).shape == (4, 1, 1)
    assert expand(torch.ones(4, 3, 2), like).shape == (4, 3, 2)


# ---------------------------------------------------------------- noise and step sizes


@DTYPES
def test_noise_is_normal_first_then_uniform(rng, device, dtype):
    state = ChainState(torch.ones(4, 3, dtype=dtype, device=device), torch.ones(4, device=device))
    with torch.device("meta"):
        noise = move_noise(state, rng(0, device))
    g = rng(0, device)
    assert torch.equal(noise.normal, torch.randn(4, 3, dtype=dtype, device=device, generator=g))
    assert torch.equal(noise.uniform, torch.rand(4, device=device, generator=g))


def test_a_generator_on_another_device_is_refused(device):
    state = ChainState(torch.ones(4, 3, device="meta"), torch.ones(4, device="meta"))
    with pytest.raises(ValueError, match=r"the generator is on .* but the tensors are on meta"):
        move_noise(state, torch.Generator(device))


def test_step_sizes_broadcast_over_the_chains():
    state = ChainState(torch.zeros(2, 4, 3), torch.zeros(2, 4))
    assert per_chain(0.5, state) == 0.5
    for shape in [(), (4,), (2, 1), (2, 4)]:
        assert per_chain(torch.ones(shape), state).shape == (2, 4, 1)
    assert per_chain(torch.ones(4, dtype=torch.float64), state).dtype == torch.float32
    column = per_chain(torch.tensor([[1.0], [2.0]]), state)
    assert column[0].unique() == 1 and column[1].unique() == 2
    with pytest.raises(ValueError, match=r"shape \(3,\) .* chains, \(2, 4\)"):
        per_chain(torch.ones(3), state)


def test_step_sizes_must_be_positive_and_finite():
    assert check_step_size("step_size", 1) == 1.0
    for bad in (0.0, -1.0, math.inf, math.nan, torch.tensor([1.0, 0.0]), torch.tensor(math.nan)):
        with pytest.raises(ValueError, match="step_size"):
            check_step_size("step_size", bad)
    with pytest.raises(TypeError, match="step_size must be a number"):
        check_step_size("step_size", "large")


def test_infos_are_named_tuples_of_the_contract():
    assert MoveInfo._fields == ("accept_prob", "accepted", "is_nan")
    assert ChainState._fields == ("x", "log_prob")
    assert GradientState._fields == ("x", "log_prob", "grad")
    assert GibbsState._fields == ("x", "log_prob")
