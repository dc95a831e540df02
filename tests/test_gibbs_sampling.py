"""What the chapter on Gibbs sampling states: its theorems, by exact matrices and linear algebra.

Where a claim is about finitely many states it is checked to round-off, on random laws; so is its
negation for a plausible mistake. The one statistical test is at 4.5 standard errors.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from companion.core import sample
from companion.mcmc import gibbs
from companion.models.ising import Ising, swendsen_wang
from companion.testing import (
    binary_states,
    detailed_balance_error,
    reversal,
    stationary_error,
    transition_matrix,
)

F64 = torch.float64


def random_law(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=generator).flatten().softmax(0).reshape(shape)


def redraw_matrices(law: Tensor) -> list[Tensor]:
    """For each axis of a joint law the matrix of its redraw, on the flattened states."""
    matrices, size = [], law.numel()
    states = list(itertools.product(*map(range, law.shape)))
    for axis in range(law.ndim):
        conditional = law / law.sum(axis, keepdim=True)
        matrix = torch.zeros(size, size, dtype=F64)
        for i, a in enumerate(states):
            for j, b in enumerate(states):
                if a[:axis] + a[axis + 1 :] == b[:axis] + b[axis + 1 :]:
                    matrix[i, j] = conditional[b]
        matrices.append(matrix)
    return matrices


# ---------------------------------------------------------------- invariance and scans


def test_a_redraw_is_a_metropolis_hastings_move_that_is_always_accepted(rng):
    law = random_law(2, 3, 4, generator=rng(0))
    p = law.flatten()
    for matrix in redraw_matrices(law):
        flow = p[:, None] * matrix
        moves = matrix > 0
        ratio = flow.T[moves] / flow[moves]  # p(x') q(x | x') / p(x) q(x' | x)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-12)
        assert stationary_error(matrix, p) < 1e-15
    wrong = random_law(2, 3, 4, generator=rng(1))  # the conditionals of another law
    assert stationary_error(redraw_matrices(wrong)[0], p) > 1e-3


def test_the_reverse_of_a_sweep_is_the_sweep_in_reverse_order(rng):
    law = random_law(2, 3, 4, generator=rng(2))
    p, (a, b, c) = law.flatten(), redraw_matrices(law)
    torch.testing.assert_close(reversal(a @ b @ c, p), c @ b @ a, rtol=0, atol=1e-14)
    assert detailed_balance_error(a @ b @ c, p) > 1e-3
    assert detailed_balance_error(a @ b @ c @ b @ a, p) < 1e-15
    assert detailed_balance_error((a + b + c) / 3, p) < 1e-15


# ---------------------------------------------------------------- normal laws


def redraw_normal(alpha: float, i: int):
    def conditional(x: Tensor, *, generator=None) -> Tensor:
        noise = torch.randn(x.shape[:-1], dtype=x.dtype, generator=generator)
        x[..., i] = alpha * x[..., 1 - i] + noise
        return x

    return conditional


def test_two_normal_variables_have_the_autocorrelation_alpha_squared(rng, ledger):
    alpha, g = 0.6, rng(3)
    covariance = torch.tensor([[1.0, alpha], [alpha, 1.0]], dtype=F64) / (1 - alpha**2)
    start = torch.randn(20_000, 2, dtype=F64, generator=g) @ torch.linalg.cholesky(covariance).T
    kernel = gibbs([redraw_normal(alpha, 0), redraw_normal(alpha, 1)])
    x = sample(kernel, start, 3, generator=g).x
    for i, name in enumerate("xy"):
        for lag in (1, 2):
            product = x[:, 0, i] * x[:, lag, i] * (1 - alpha**2)
            error = product.std() / math.sqrt(len(product))
            ledger(
                f"Gibbs, two normal variables, alpha {alpha}: autocorrelation of {name}, lag {lag}",
                exact=alpha ** (2 * lag),
                estimate=product.mean(),
                std_error=error,
            )
            assert abs(product.mean() - alpha**lag) > 4.5 * error  # a sweep taken for a redraw


def gauss_seidel(precision: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """B and the covariance of the noise, by the theorem."""
    lower = precision * (block[:, None] >= block)
    diagonal = precision * (block[:, None] == block)
    inverse = torch.linalg.inv(lower)
    return torch.eye(len(block), dtype=F64) - inverse @ precision, inverse @ diagonal @ inverse.T


def sweep_by_definition(precision: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """The same by drawing block after block from its conditional law."""
    d = len(block)
    linear, noise = torch.eye(d, dtype=F64), torch.zeros(d, d, dtype=F64)
    for b in block.unique():
        own, rest = (block == b).nonzero()[:, 0], (block != b).nonzero()[:, 0]
        inverse = torch.linalg.inv(precision[own][:, own])
        step = torch.eye(d, dtype=F64)
        step[own] = 0.0
        step[own[:, None], rest] = -inverse @ precision[own][:, rest]
        linear, noise = step @ linear, step @ noise @ step.T
        noise[own[:, None], own] += inverse
    return linear, noise


@pytest.mark.parametrize("block", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 1], [0, 1, 0, 2, 1]], ids=str)
def test_gibbs_sampling_of_a_normal_law_is_the_gauss_seidel_iteration(block, rng):
    factor = torch.randn(5, 5, dtype=F64, generator=rng(4))
    precision = factor @ factor.T + 0.5 * torch.eye(5, dtype=F64)
    covariance, block = torch.linalg.inv(precision), torch.tensor(block)
    b, noise = gauss_seidel(precision, block)
    linear, by_definition = sweep_by_definition(precision, block)
    torch.testing.assert_close(linear, b, rtol=0, atol=1e-10)
    torch.testing.assert_close(by_definition, noise, rtol=0, atol=1e-10)
    torch.testing.assert_close(b @ covariance @ b.T + noise, covariance, rtol=0, atol=1e-8)
    assert torch.linalg.eigvals(b).abs().max() < 1
    # From a fixed start, after t sweeps.
    found, power = torch.zeros(5, 5, dtype=F64), torch.eye(5, dtype=F64)
    for _ in range(7):
        found, power = b @ found @ b.T + noise, b @ power
    expected = covariance - power @ covariance @ power.T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    # The sum over lags.
    a, eye = torch.arange(5, dtype=F64) - 1.0, torch.eye(5, dtype=F64)
    total, power = a @ covariance @ a, b.clone()
    for _ in range(2000):
        total, power = total + 2 * (a @ power @ covariance @ a), power @ b
    closed = a @ (eye + b) @ torch.linalg.solve(eye - b, covariance) @ a
    torch.testing.assert_close(total, closed, rtol=1e-6, atol=0)
    # The Jacobi iteration, that is all at once, is another one.
    jacobi = eye - precision / precision.diagonal()[:, None]
    assert (jacobi - b).abs().max() > 0.1


# ---------------------------------------------------------------- conditional expectations


def test_conditional_expectations_save_the_first_two_autocovariances(rng, ledger):
    law = random_law(4, 5, generator=rng(5))
    p_x, p_y = law.sum(1), law.sum(0)
    y_given_x, x_given_y = law / p_x[:, None], (law / p_y).T
    f = torch.randn(4, dtype=F64, generator=rng(6))
    f = f - p_x @ f
    h = x_given_y @ f
    step_x, step_y = y_given_x @ x_given_y, x_given_y @ y_given_x
    c = [p_x @ (f * (torch.linalg.matrix_power(step_x, k) @ f)) for k in range(400)]
    of_h = [p_y @ (h * (torch.linalg.matrix_power(step_y, k) @ h)) for k in range(400)]
    assert min(c) > -1e-15
    torch.testing.assert_close(torch.stack(of_h[:-1]), torch.stack(c[1:]), rtol=0, atol=1e-14)
    plain, conditional = c[0] + 2 * sum(c[1:]), of_h[0] + 2 * sum(of_h[1:])
    ledger(
        "Gibbs: what conditional expectations save, from the transition matrices",
        exact=c[0] + c[1],
        estimate=plain - conditional,
        tolerance=1e-12,
    )
    assert abs(plain - conditional - c[0]) > 1e-4  # more than the variance of one draw


# ---------------------------------------------------------------- conditionals without a joint law


def scans(x_given_y: Tensor, y_given_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The stationary laws of the scans that end with y, with x, and of the random one."""
    m, n = len(y_given_x), len(x_given_y)
    to_x = torch.zeros(m, n, m, n, dtype=F64)
    to_y = torch.zeros(m, n, m, n, dtype=F64)
    for i, j in itertools.product(range(m), range(n)):
        to_x[i, j, :, j] = x_given_y[j]
        to_y[i, j, i, :] = y_given_x[i]
    to_x, to_y = to_x.reshape(m * n, -1), to_y.reshape(m * n, -1)
    matrices = (to_x @ to_y, to_y @ to_x, (to_x + to_y) / 2)
    return tuple(torch.linalg.matrix_power(matrix, 2**12)[0].reshape(m, n) for matrix in matrices)


def test_incompatible_conditionals_have_a_law_for_each_order(rng):
    g = rng(7)
    x_given_y = torch.randn(4, 3, dtype=F64, generator=g).softmax(1)
    y_given_x = torch.randn(3, 4, dtype=F64, generator=g).softmax(1)
    ends_y, ends_x, mixed = scans(x_given_y, y_given_x)
    assert (ends_y - ends_x).abs().max() > 0.01
    for axis in (0, 1):
        torch.testing.assert_close(ends_y.sum(axis), ends_x.sum(axis), rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed, (ends_y + ends_x) / 2, rtol=0, atol=1e-12)

    law = random_law(3, 4, generator=g)
    x_given_y, y_given_x = (law / law.sum(0)).T, law / law.sum(1)[:, None]
    ratio = (x_given_y.T / y_given_x).log()  # log u(x) + log v(y): no interaction
    double_centred = ratio - ratio.mean(0) - ratio.mean(1)[:, None] + ratio.mean()
    assert double_centred.abs().max() < 1e-12
    for found in scans(x_given_y, y_given_x):
        torch.testing.assert_close(found, law, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- spins and bonds


def clusters(num_sites: int, edges: list[tuple[int, int]]) -> list[int]:
    root = list(range(num_sites))
    for _ in range(num_sites):
        for a, b in edges:
            root[a] = root[b] = min(root[a], root[b])
    return root


def test_spins_and_bonds_have_the_ising_model_as_their_marginal(ledger):
    """On a ring of four sites with a chord, bond by bond and spin by spin."""
    coupling, edges = 0.6, [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)]
    r = 1 - math.exp(-2 * coupling)
    spins = 2.0 * binary_states(4, dtype=F64) - 1
    bits = binary_states(len(edges), dtype=F64)
    joint = torch.ones(len(spins), len(bits), dtype=F64)
    for e, (i, j) in enumerate(edges):
        equal = (spins[:, i] == spins[:, j]).to(F64)[:, None]
        joint *= torch.where(bits[:, e] == 1, r * equal, 1 - r)
    joint /= joint.sum()
    energy = sum(spins[:, i] * spins[:, j] for i, j in edges)
    p = (coupling * energy).softmax(0)
    torch.testing.assert_close(joint.sum(1), p, rtol=0, atol=1e-14)
    wrong = (2 * coupling * energy).softmax(0)
    assert (joint.sum(1) - wrong).abs().max() > 0.01
    # Given the spins: a bond is set with probability r between equal ones, whatever the others.
    given_spins = joint / joint.sum(1, keepdim=True)
    equal = torch.stack([spins[:, i] == spins[:, j] for i, j in edges], 1).to(F64)
    torch.testing.assert_close(given_spins @ bits, r * equal, rtol=0, atol=1e-14)
    both = given_spins @ (bits[:, 0] * bits[:, 2])
    torch.testing.assert_close(both, r * r * equal[:, 0] * equal[:, 2], rtol=0, atol=1e-14)
    step = given_spins @ (joint / joint.sum(0)).T  # bonds given spins, then spins given bonds
    assert stationary_error(step, p) < 1e-14
    assert detailed_balance_error(step, p) < 1e-14
    # Given the bonds: every cluster has one sign, and all choices are equally likely.
    square = torch.zeros((), dtype=F64)
    for b, column in zip(bits, joint.T, strict=True):
        root = clusters(4, [edge for edge, bit in zip(edges, b, strict=True) if bit])
        fits = torch.stack([spins[:, i] == spins[:, root[i]] for i in range(4)]).all(0)
        assert fits.sum() == 2 ** len(set(root))
        uniform = fits.to(F64) / fits.sum()
        torch.testing.assert_close(column / column.sum(), uniform, rtol=0, atol=1e-13)
        square += column.sum() * sum(root.count(c) ** 2 for c in set(root)) / 16
    ledger(
        "Ising, four sites: mean square cluster size over N^2",
        exact=p @ spins.mean(1).square(),
        estimate=square,
        tolerance=1e-13,
    )


def test_swendsen_wang_has_exactly_the_ising_model_as_its_law():
    model = Ising(1, 2, torch.tensor(0.7, dtype=F64))  # two bonds join the pair
    spins = (2.0 * binary_states(2, dtype=F64) - 1).reshape(-1, 1, 2)
    matrix, p = transition_matrix(swendsen_wang(model), spins), model.log_prob(spins).softmax(0)
    assert stationary_error(matrix, p) < 1e-14
    assert detailed_balance_error(matrix, p) < 1e-14
    weaker = Ising(1, 2, torch.tensor(0.35, dtype=F64))  # bonds set with 1 - exp(-K)
    assert stationary_error(transition_matrix(swendsen_wang(weaker), spins), p) > 0.01
