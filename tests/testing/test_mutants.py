"""Each mutant makes the error that it says, and the invariance test rejects it."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from companion.core import Kernel, sample
from companion.mcmc import metropolis_hastings, random_walk
from companion.targets import GaussianMixture
from companion.testing import (
    InvarianceResult,
    assert_invariant,
    drift,
    invariance_test,
    jump_back,
    reuse_noise,
    shrink,
    skip_rejections,
    stale_log_prob,
    transition_matrix,
)

F64 = {"dtype": torch.float64}


def peak_on_a_hill(**like) -> GaussianMixture:
    """Half the mass is narrow, so that the places differ in how often they reject."""
    means, variances = torch.tensor([[0.0], [1.0]], **like), torch.tensor([1.0, 0.01], **like)
    return GaussianMixture(torch.ones(2, **like), means, variances[:, None, None])


def normal() -> Normal:
    return Normal(torch.tensor(0.0, **F64), torch.tensor(1.0, **F64))


MUTANTS = {
    "drift": lambda kernel: drift(kernel, 0.1),
    "shrink": lambda kernel: shrink(kernel, 0.9),
    "jump_back": jump_back,
    "skip_rejections": skip_rejections,
    "stale_log_prob": stale_log_prob,
    "reuse_noise": reuse_noise,
}

# ---------------------------------------------------------------- found out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mutant", ["", *MUTANTS])
def test_every_mutant_is_rejected_and_what_it_broke_is_not(rng, device, dtype, mutant):
    target = peak_on_a_hill(dtype=dtype, device=device)
    kernel = random_walk(target, 0.5)
    num_chains = 2000 if mutant == "skip_rejections" else 10_000  # it takes many tries
    run = {"num_chains": num_chains, "num_steps": 10, "generator": rng(0, device)}
    if mutant:
        assert invariance_test(MUTANTS[mutant](kernel), target, **run).p_value < 1e-9
    else:
        assert_invariant(invariance_test(kernel, target, **run))


def on_a_normal_target(mutant, generator, num_steps: int) -> InvarianceResult:
    kernel, run = mutant(random_walk(normal().log_prob, 2.0)), {"num_chains": 5000}
    return invariance_test(kernel, normal(), num_steps=num_steps, generator=generator, **run)


@pytest.mark.parametrize("mutant", [jump_back, stale_log_prob, reuse_noise])
def test_one_step_does_not_show_what_a_state_remembers(rng, mutant):
    """The first step of these is right."""
    assert_invariant(on_a_normal_target(mutant, rng(1), 1))


def test_an_easy_target_hides_a_jump_back(rng):
    assert_invariant(on_a_normal_target(jump_back, rng(2), 10))


@pytest.mark.parametrize(("num_steps", "seen"), [(1, 0.2), (10, 0.07)])
def test_drift_and_shrinking_are_found_down_to_the_size_that_is_stated(rng, num_steps, seen):
    for size, found in [(seen, True), (0.01, False)]:
        for mutant in (lambda k, s=size: drift(k, s), lambda k, s=size: shrink(k, 1 - s)):
            assert (on_a_normal_target(mutant, rng(3), num_steps).p_value < 1e-5) == found


# ---------------------------------------------------------------- what each of them does


class State(NamedTuple):
    x: Tensor
    log_prob: Tensor


class Info(NamedTuple):
    accept_prob: Tensor
    accepted: Tensor


def counter(*accepted: list[bool]) -> Kernel:
    """x counts the steps of each of two chains; which of them are accepted is given."""
    steps = iter(accepted)

    def init(x: Tensor) -> State:
        return State(x, 10 * x[:, 0])

    def step(state: State, *, generator=None) -> tuple[State, Info]:
        moved = torch.tensor(next(steps))
        return init(state.x + moved[:, None].double()), Info(moved.double(), moved)

    return Kernel(init, step)


def run(kernel: Kernel, num_steps: int) -> tuple[list[list[float]], list[list[float]]]:
    state, xs, log_probs = kernel.init(torch.zeros(2, 1, **F64)), [], []
    for _ in range(num_steps):
        state, _ = kernel.step(state)
        xs.append(state.x[:, 0].tolist())
        log_probs.append(state.log_prob.tolist())
    return xs, log_probs


YES, NO = [True, True], [False, False]


def test_drift_and_shrink_change_x_and_evaluate_the_density_there():
    assert run(drift(counter(YES, YES), 0.5), 2) == ([[1.5, 1.5], [3, 3]], [[15, 15], [30, 30]])
    assert run(shrink(counter(YES, YES), 0.5), 2) == (
        [[0.5, 0.5], [0.75, 0.75]],
        [[5, 5], [7.5, 7.5]],
    )


def test_jump_back_goes_to_the_start_after_a_rejection():
    kernel = counter(YES, YES, [True, False], [True, True])
    expected = [[1, 1], [2, 2], [3, 0], [4, 1]]
    assert run(jump_back(kernel), 4) == (expected, [[10 * a, 10 * b] for a, b in expected])


def test_skip_rejections_tries_each_chain_until_it_moves():
    kernel = counter([True, False], [True, False], [False, True], YES)
    assert run(skip_rejections(kernel), 2) == ([[1, 1], [2, 2]], [[10, 10], [20, 20]])
    assert run(skip_rejections(counter(NO, NO, NO, YES), max_tries=3), 2)[0] == [[0, 0], [1, 1]]


def test_stale_log_prob_stays_that_of_the_start():
    xs, log_probs = run(stale_log_prob(counter(YES, NO, YES)), 3)
    assert xs == [[1, 1], [1, 1], [2, 2]]
    assert log_probs == [[0, 0]] * 3


def test_reuse_noise_gives_every_step_the_same_numbers(rng):
    def step(state: State, *, generator) -> tuple[State, None]:
        return State(torch.rand(3, generator=generator), state.log_prob), None

    kernel = reuse_noise(Kernel(lambda x: State(x, x), step))
    generator = rng(4)
    state, first = kernel.init(torch.zeros(3)), torch.rand(3, generator=rng(4))
    for _ in range(3):
        state, _ = kernel.step(state, generator=generator)
        assert torch.equal(state.x, first)
    again, _ = kernel.step(kernel.init(torch.zeros(3)), generator=generator)
    assert not torch.equal(again.x, first)  # another run, other numbers


def test_accepted_points_alone_follow_the_target_times_its_acceptance(ledger):
    """On a ring of five, with the exact matrix of the mutant."""
    log_p = torch.tensor([0.0, 1.0, -0.5, 2.0, 0.3], **F64)

    def propose(x: Tensor, *, generator) -> Tensor:
        return (x + torch.where(torch.rand(x.shape, generator=generator) < 0.5, 1, -1)) % 5

    kernel, states = metropolis_hastings(lambda x: log_p[x], propose), torch.arange(5)
    matrix = transition_matrix(kernel, states)
    stay = torch.diag(matrix.diagonal())
    moves = matrix - stay
    # Up to three tries: the first move that is made, or none.
    tries = sum(torch.linalg.matrix_power(stay, k) @ moves for k in range(3))
    expected = tries + torch.linalg.matrix_power(stay, 3)
    found = transition_matrix(skip_rejections(kernel, max_tries=3), states)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    # With as many tries as it takes, the accepted points have this law.
    jumps = moves / moves.sum(1, keepdim=True)
    law = log_p.exp() * moves.sum(1)
    law = law / law.sum()
    error = float((law @ jumps - law).abs().max())
    ledger(
        "how far the accepted points of Metropolis-Hastings move the target times its acceptance",
        exact=0.0,
        estimate=error,
        tolerance=1e-14,
    )
    assert float((log_p.softmax(0) - law).abs().max()) > 0.1


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_kernels_of_any_batch_of_chains(rng, mutant):
    def log_prob(x: Tensor) -> Tensor:
        return -0.5 * x.square().sum(-1)

    kernel = MUTANTS[mutant](random_walk(log_prob, 1.0))
    for chains in [(), (7,), (2, 3)]:
        x0, generator = torch.zeros(*chains, 2, **F64), rng(5)
        with torch.device("meta"):
            trace = sample(kernel, x0, 4, generator=generator)
        assert trace.x.shape == (*chains, 4, 2)
        assert trace.log_prob.shape == (*chains, 4)
        assert trace.x.isfinite().all()


def test_mutants_refuse_what_they_cannot_break():
    no_density = Kernel(lambda x: Info(x, x), lambda state, *, generator=None: (state, None))
    kernel = stale_log_prob(no_density)
    with pytest.raises(ValueError, match="no log_prob that could go stale"):
        kernel.step(kernel.init(torch.zeros(2)))
    kernel = reuse_noise(counter(YES))
    with pytest.raises(ValueError, match="rewinds a generator"):
        kernel.step(kernel.init(torch.zeros(2, 1)))
    with pytest.raises(ValueError, match="factor"):
        shrink(kernel, 0.0)
    with pytest.raises(ValueError, match="max_tries"):
        skip_rejections(kernel, 0)
