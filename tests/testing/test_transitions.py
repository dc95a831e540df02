"""Transition matrices against their definitions, and every way to make a random choice."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import scipy.stats
import torch
from torch import Tensor

from companion.core import Kernel
from companion.mcmc import gibbs, metropolis_hastings, mixture
from companion.models.rbm import RBM
from companion.testing import (
    binary_states,
    detailed_balance_error,
    exact_distribution,
    stationary_error,
    transition_matrix,
    transitions,
)

F64 = {"dtype": torch.float64}


class State(NamedTuple):
    x: Tensor


def moves(move: Callable[..., Tensor]) -> Kernel:
    """A kernel of a function `move(x, generator)`."""

    def step(state: State, *, generator: torch.Generator | None = None) -> tuple[State, None]:
        return State(move(state.x, generator)), None

    return Kernel(State, step)


# ---------------------------------------------------------------- Metropolis-Hastings


LOG_P = torch.tensor([0.3, -1.0, 0.5, 1.5, -0.2, 0.0], **F64)
UP = 0.8  # the proposal prefers one direction


def ring(*, corrected: bool = True) -> Kernel:
    """Metropolis-Hastings on a ring of six states, proposing a neighbour."""

    def propose(x: Tensor, *, generator=None) -> Tensor:
        up = torch.rand(x.shape, generator=generator, device=x.device) < UP
        return (x + torch.where(up, 1, -1)) % 6

    def log_q(y: Tensor, x: Tensor) -> Tensor:
        up = ((y - x) % 6 == 1).double()
        return (up * UP + (1 - up) * (1 - UP)).log()

    def log_prob(x: Tensor) -> Tensor:
        return LOG_P.to(x.device)[x]

    return metropolis_hastings(log_prob, propose, log_q if corrected else None)


def ring_matrix() -> Tensor:
    """By the definition, entry by entry."""
    matrix = torch.zeros(6, 6, **F64)
    for i in range(6):
        for j, there, back in [((i + 1) % 6, UP, 1 - UP), ((i - 1) % 6, 1 - UP, UP)]:
            ratio = float((LOG_P[j] - LOG_P[i]).exp()) * back / there
            matrix[i, j] = there * min(1.0, ratio)
        matrix[i, i] = 1 - matrix[i].sum()
    return matrix


def test_metropolis_hastings_on_a_ring_has_the_matrix_of_its_definition(device, ledger):
    matrix = transition_matrix(ring(), torch.arange(6, device=device)).cpu()
    torch.testing.assert_close(matrix, ring_matrix(), rtol=0, atol=1e-14)
    p = LOG_P.softmax(0)
    assert (matrix.sum(1) - 1).abs().max() < 1e-14
    assert stationary_error(matrix, p) < 1e-14
    assert detailed_balance_error(matrix, p) < 1e-14
    ledger(
        "probability of staying on a ring of six, by enumeration of a kernel's choices",
        exact=ring_matrix()[2, 2],
        estimate=matrix[2, 2],
        tolerance=1e-14,
    )


def test_a_dropped_hastings_correction_is_found_out():
    matrix, p = transition_matrix(ring(corrected=False), torch.arange(6)), LOG_P.softmax(0)
    assert stationary_error(matrix, p) > 0.01
    assert detailed_balance_error(matrix, p) > 0.05


def test_frequencies_of_a_kernel_follow_its_matrix(rng):
    """What is enumerated is what the kernel does when it draws random numbers."""
    matrix, n = transition_matrix(ring(), torch.arange(6)), 20_000
    kernel = ring()
    start = torch.arange(6).repeat_interleave(n)
    end = kernel.step(kernel.init(start), generator=rng(0))[0].x.reshape(6, n)

    def p_values(matrix: Tensor) -> list[float]:
        rows = zip(end, matrix, strict=True)
        counts = [(ends.bincount(minlength=6)[row > 0], n * row[row > 0]) for ends, row in rows]
        return [
            scipy.stats.chisquare(seen, expected).pvalue if seen.sum() == n else 0.0
            for seen, expected in counts
        ]

    assert min(p_values(matrix)) > 1e-5 / 6
    assert min(p_values(transition_matrix(ring(corrected=False), torch.arange(6)))) < 1e-12


# ---------------------------------------------------------------- Gibbs


def boltzmann(x: Tensor) -> Tensor:
    """Three asymmetric, correlated bits, `(..., 3) -> (...)`."""
    x = x.double()
    fields = torch.tensor([0.5, -1.0, 0.2], device=x.device, **F64)
    return x @ fields + 1.2 * x[..., 0] * x[..., 1] - 0.7 * x[..., 1] * x[..., 2]


def conditional(x: Tensor, i: int) -> Tensor:
    """P(x_i = 1 | the others)."""
    low, high = x.clone(), x.clone()
    low[..., i], high[..., i] = 0, 1
    return torch.sigmoid(boltzmann(high) - boltzmann(low))


def sweep(*order: int, wrong: float = 1.0) -> Kernel:
    def move(x: Tensor, generator) -> Tensor:
        # Noise first, as a kernel with a pure step has it.
        noise = torch.rand(len(order), *x.shape[:-1], generator=generator, device=x.device)
        for u, i in zip(noise, order, strict=True):
            x = x.clone()
            x[..., i] = (u < wrong * conditional(x, i)).to(x.dtype)
        return x

    return moves(move)


def redraw(i: int) -> Callable[..., Tensor]:
    """The same for the package's `gibbs`, with the uniform drawn on the way."""

    def redrawn(x: Tensor, *, generator=None) -> Tensor:
        u = torch.rand(x.shape[:-1], generator=generator, device=x.device)
        x[..., i] = (u < conditional(x, i)).to(x.dtype)
        return x

    return redrawn


SITES = [redraw(i) for i in range(3)]


def one_site_for_all(x: Tensor, generator) -> Tensor:
    i = torch.randint(3, (), generator=generator, device=x.device)
    return SITES[int(i)](x.clone(), generator=generator)


def site_matrix(i: int) -> Tensor:
    """One site from its conditional: states that differ elsewhere are out of reach."""
    states = binary_states(3, **F64)
    p = exact_distribution(boltzmann, 3, **F64)
    same = (states[:, None] == states)[:, :, [j for j in range(3) if j != i]].all(-1)
    weights = same * p
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_a_systematic_sweep_is_invariant_without_detailed_balance(device, dtype, ledger):
    states = binary_states(3, device=device, dtype=dtype)
    matrix = transition_matrix(sweep(0, 1, 2), states).cpu()
    expected = site_matrix(0) @ site_matrix(1) @ site_matrix(2)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-14)
    p = exact_distribution(boltzmann, 3, **F64)
    assert stationary_error(matrix, p) < 1e-14
    assert detailed_balance_error(matrix, p) > 0.01
    ledger(
        "probability of a sweep over three bits, by enumeration of the sampler's choices",
        exact=expected[2, 5],
        estimate=matrix[2, 5],
        tolerance=1e-14,
    )


def test_a_sweep_of_the_package_has_the_same_matrix():
    states = binary_states(3)
    found = transition_matrix(gibbs(SITES), states)
    torch.testing.assert_close(found, transition_matrix(sweep(0, 1, 2), states), rtol=0, atol=1e-15)


WITH_DENSITY = {"log_prob": boltzmann}  # a mixture asks for it
REVERSIBLE = {
    "palindrome": gibbs(SITES, "palindromic"),
    "random scan": gibbs(SITES, "random"),
    "one site for all": moves(one_site_for_all),
    "mixture": mixture(
        [gibbs(SITES, "random", **WITH_DENSITY), gibbs(SITES[:1], **WITH_DENSITY)], [1, 3]
    ),
}


@pytest.mark.parametrize("scan", REVERSIBLE)
def test_palindromes_random_scans_and_mixtures_are_in_detailed_balance(scan):
    sites = [site_matrix(i) for i in range(3)]
    expected = {
        "palindrome": torch.linalg.multi_dot([sites[i] for i in [0, 1, 2, 1, 0]]),
        "random scan": sum(sites) / 3,
        "one site for all": sum(sites) / 3,
        "mixture": (sum(sites) / 3 + 3 * sites[0]) / 4,
    }
    matrix = transition_matrix(REVERSIBLE[scan], binary_states(3))
    torch.testing.assert_close(matrix, expected[scan], rtol=0, atol=1e-14)
    p = exact_distribution(boltzmann, 3, **F64)
    assert stationary_error(matrix, p) < 1e-14
    assert detailed_balance_error(matrix, p) < 1e-14


def test_a_wrong_conditional_is_found_out_however_small():
    p = exact_distribution(boltzmann, 3, **F64)
    matrix = transition_matrix(sweep(0, 1, 2, wrong=1 - 1e-9), binary_states(3))
    assert 1e-10 < stationary_error(matrix, p) < 1e-9


@torch.no_grad()
def test_a_sweep_of_an_rbm_is_in_detailed_balance(rng, device, ledger):
    generator = rng(1, device)
    rbm = RBM(3, 2, generator=generator, device=device, **F64)
    for parameter in rbm.parameters():
        parameter.normal_(generator=generator)
    v = binary_states(3, device=device, **F64)
    h = binary_states(2, device=device, **F64)
    matrix = transition_matrix(moves(lambda v, g: rbm.gibbs(v, generator=g)), v)
    p = (rbm.log_prob(v) - rbm.log_z().value).exp()
    joint = torch.stack([-rbm.energy(v, row.expand(len(v), -1)) for row in h], 1)
    expected = joint.softmax(1) @ joint.softmax(0).T
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-14)
    assert stationary_error(matrix, p) < 1e-14
    assert detailed_balance_error(matrix, p) < 1e-14
    ledger(
        "probability of a sweep of an RBM, by enumeration of the sampler's choices",
        exact=expected[1, 6],
        estimate=matrix[1, 6],
        tolerance=1e-13,
    )


# ---------------------------------------------------------------- ways to choose


def biased(x: Tensor) -> Tensor:
    return (x + 1.0) / 8


def row_of(move: Callable[..., Tensor], num_states: int = 4, row: int = 1) -> list[float]:
    """One row of a matrix on the states 0, 1, ..., rounded."""
    matrix = transition_matrix(moves(move), torch.arange(num_states, **F64))
    assert (matrix.sum(1) - 1).abs().max() < 1e-14
    return [round(p, 12) for p in matrix[row].tolist()]


@pytest.mark.parametrize(
    "choose",
    [
        lambda u, p: u < p,
        lambda u, p: u <= p,
        lambda u, p: p > u,
        lambda u, p: p >= u,
        lambda u, p: ~(u > p),
        lambda u, p: ~(u >= p),
        lambda u, p: ~(p < u),
        lambda u, p: torch.lt(u, p),
        lambda u, p: ~torch.greater_equal(u, p),
    ],
)
def test_every_comparison_of_a_uniform_is_a_coin(choose):
    def move(x: Tensor, g) -> Tensor:
        return choose(torch.rand(x.shape, generator=g), biased(x)).double()

    assert row_of(move) == [0.75, 0.25, 0, 0]


@pytest.mark.parametrize(
    "reshape",
    [
        lambda u: u,
        lambda u: u[:, None][:, 0],
        lambda u: u.unsqueeze(0).expand(3, -1)[2],
        lambda u: u.reshape(1, -1).movedim(0, -1).squeeze(1),
        lambda u: next(iter(u[None])),
        lambda u: u[None].T.unbind(1)[0],
        lambda u: u.view(len(u), 1).flatten(),
        lambda u: u[: u.shape[0]].clone(),
    ],
)
def test_a_uniform_may_be_reshaped_before_it_is_compared(reshape):
    def move(x: Tensor, g) -> Tensor:
        return (reshape(torch.rand_like(x)) < biased(x)).double()

    assert row_of(move) == [0.75, 0.25, 0, 0]


def test_a_uniform_keeps_its_value_when_it_is_compared_again():
    def same(x: Tensor, g) -> Tensor:
        u = torch.rand(x.shape, generator=g)
        return (u < 0.3).double() + (u > 0.3).double()  # always one of both

    def three(x: Tensor, g) -> Tensor:
        u = torch.rand(x.shape, generator=g)
        return torch.where(u < 0.2, 0.0, torch.where(u < 0.7, 1.0, 2.0)).double()

    def counts(x: Tensor, g) -> Tensor:
        limits = torch.tensor([0.1, 0.4, 0.8], **F64).expand(len(x), -1)
        return (torch.rand(len(x), 1, generator=g) > limits).sum(1).double()

    def fresh(x: Tensor, g) -> Tensor:
        return sum((torch.rand(x.shape, generator=g) < 0.5).double() for _ in range(2))

    assert row_of(same) == [0, 1, 0, 0]
    assert row_of(three) == [0.2, 0.5, 0.3, 0]
    assert row_of(counts) == [0.1, 0.3, 0.4, 0.2]
    assert row_of(fresh) == [0.25, 0.5, 0.25, 0]


def test_each_chain_may_look_at_another_of_its_uniforms():
    """Chains in even states use the first number, others the second; then all use the first."""

    def move(x: Tensor, g) -> Tensor:
        u = torch.rand(len(x), 2, generator=g)
        own = u.gather(1, (x % 2).long()[:, None])[:, 0]
        return (own < 0.25).double() + 2 * (u[:, 0] < 0.5).double()

    assert row_of(move, row=0) == [0.5, 0, 0.25, 0.25]  # the same number twice
    assert row_of(move, row=1) == [0.375, 0.125, 0.375, 0.125]


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        (lambda x, g: torch.randint(4, x.shape, generator=g), [0.25] * 4),
        (lambda x, g: torch.randint(1, 3, (len(x),), generator=g), [0, 0.5, 0.5, 0]),
        (lambda x, g: torch.randint(low=1, high=3, size=x.shape), [0, 0.5, 0.5, 0]),
        (lambda x, g: torch.randint(3, x.shape, dtype=torch.float64), [0.333333333333] * 3 + [0]),
        (lambda x, g: torch.bernoulli(biased(x), generator=g), [0.75, 0.25, 0, 0]),
        (
            lambda x, g: torch.multinomial(
                torch.stack([x, torch.ones_like(x), 2 * x], 1), 1, generator=g
            )[:, 0],
            [0.25, 0.25, 0.5, 0],
        ),
        (
            lambda x, g: torch.multinomial(
                torch.tensor([1.0, 3.0]), len(x), replacement=True, generator=g
            ),
            [0.25, 0.75, 0, 0],
        ),
        (lambda x, g: torch.rand(()) < torch.full_like(x, 0.25), [0.75, 0.25, 0, 0]),
        (
            lambda x, g: torch.distributions.Categorical(probs=torch.ones(len(x), 3)).sample(),
            [0.333333333333] * 3 + [0],
        ),
        (lambda x, g: (torch.rand(x.shape) < x * torch.nan).double(), [1, 0, 0, 0]),
        (lambda x, g: (torch.rand(x.shape) > x * torch.nan).double(), [1, 0, 0, 0]),
        (lambda x, g: x, [0, 1, 0, 0]),
    ],
)
def test_other_random_functions_are_enumerated_too(move, expected):
    assert row_of(move) == pytest.approx(expected, abs=2e-12)


# ---------------------------------------------------------------- refusals


def uniform(x: Tensor) -> Tensor:
    return torch.rand(x.shape, **F64)


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda x, g: uniform(x).log() < biased(x).log(), r"in log\(\).*must be compared"),
        (lambda x, g: 1 - uniform(x), r"in __rsub__\(\)"),
        (lambda x, g: (4 * uniform(x)).floor(), r"in __rmul__\(\)|in mul\(\)"),
        (lambda x, g: torch.where(x > 0, uniform(x), x), r"in where\(\)"),
        (lambda x, g: torch.stack([uniform(x), x])[1], r"in stack\(\)"),
        (lambda x, g: x + uniform(x), r"in add\(\)"),
        (lambda x, g: x.index_put((torch.tensor([0]),), uniform(x)[0]), r"in index_put\(\)"),
        (lambda x, g: uniform(x) < uniform(x), r"in lt\(\)"),
        (lambda x, g: x * float(uniform(x)[0]), r"in __float__\(\)"),
        (lambda x, g: uniform(x).round(), r"in round\(\)"),
        (lambda x, g: x + torch.randn(x.shape), "cannot be enumerated"),
        (lambda x, g: x[torch.randperm(len(x))], "cannot be enumerated"),
        (lambda x, g: torch.empty_like(x).uniform_(), "cannot be enumerated"),
        (lambda x, g: torch.multinomial(torch.ones(len(x), 3), 2)[:, 0], "without replacement"),
        (lambda x, g: x + 1, r"goes from 3.0 to 4.0, which is not among"),
        (lambda x, g: x[:2], r"into \(2,\)"),
        (lambda x, g: (torch.rand(len(x), 17) < 0.5).sum(1), "more than 65536 combinations"),
        (lambda x, g: (torch.rand(2 * len(x)) < 0.5)[: len(x)], "more than 65536 combinations"),
        (lambda x, g: (torch.rand(len(x), len(x)) < 0.5)[0], "which dimension"),
    ],
)
def test_what_cannot_be_enumerated_is_refused_with_a_sentence(move, message):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        transition_matrix(moves(move), torch.arange(4, **F64))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kernel_that_may_choose_for_ever_is_refused(monkeypatch):
    def move(x: Tensor, g) -> Tensor:
        while torch.rand(()) < 0.5:
            pass
        return x

    monkeypatch.setattr(transitions, "_MAX_RUNS", 20)
    with pytest.raises(ValueError, match="more than 20 combinations"):
        transition_matrix(moves(move), torch.arange(4))


def test_states_must_be_listed_once():
    with pytest.raises(ValueError, match="listed twice"):
        transition_matrix(gibbs(SITES), binary_states(3)[[0, 1, 1]])


def test_more_states_than_the_smallest_batch_are_no_trouble():
    def move(x: Tensor, g) -> Tensor:
        return (x + (torch.rand(x.shape, generator=g) < 0.25)) % 1200

    matrix = transition_matrix(moves(move), torch.arange(1200))
    assert torch.equal(matrix.diagonal(), torch.full((1200,), 0.75, **F64))
    assert torch.equal(matrix.diagonal(1), torch.full((1199,), 0.25, **F64))
    assert matrix.sum() == 1200


def test_no_tensor_is_made_on_the_default_device():
    states = binary_states(3, **F64)
    expected = transition_matrix(sweep(0, 1, 2), states)
    with torch.device("meta"):
        assert torch.equal(transition_matrix(sweep(0, 1, 2), states), expected)
