"""The theorems of the chapter on gradient descent, by enumeration wherever that is possible.

The problem is least squares with rows `z` (n, d), targets `y` (n): the loss of a row is
(z . theta - y)^2, `curvature` is the Hessian of their mean, and `residual` is y - z . theta* at the
least-squares solution theta*. A displacement is theta - theta*.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison


class Problem(NamedTuple):
    z: Tensor
    y: Tensor
    solution: Tensor
    residual: Tensor
    curvature: Tensor


def least_squares(z: Tensor, y: Tensor) -> Problem:
    solution = torch.linalg.lstsq(z, y[:, None]).solution[:, 0]
    return Problem(z, y, solution, y - z @ solution, 2 * z.T @ z / len(z))


def regression(n: int, generator: torch.Generator) -> Problem:
    """A line through n points: x uniform on [0, 2], y = 3 + 2 x + noise."""
    x = 2 * torch.rand(n, dtype=torch.float64, generator=generator)
    y = 3 + 2 * x + 0.5 * torch.randn(n, dtype=torch.float64, generator=generator)
    return least_squares(torch.stack([x, torch.ones_like(x)], 1), y)


def row_gradients(p: Problem, displacement: Tensor) -> Tensor:
    """The gradient of every row's loss, `(..., n, d)`, at displacements `(..., d)`."""
    return 2 * (displacement @ p.z.T - p.residual)[..., None] * p.z


def moment_step(p: Problem, mean: Tensor, second: Tensor, rate: float, fraction: float):
    """Mean and second moment of the displacement after one more update.

    With u = (displacement, 1), a_i = (z_i, -residual_i) and G = diag(curvature, 0), the matrix
    U = E[u u'] becomes  U - rate (G U + U G) + rate^2 [(1 - fraction) G U G + fraction V],  where
    V is the mean of 4 (a_i' U a_i) z_i z_i'.
    """
    d = len(mean)
    u = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    u[:d, :d], u[:d, d], u[d, :d], u[d, d] = second, mean, mean, 1.0
    g, v = torch.zeros_like(u), torch.zeros_like(u)
    g[:d, :d] = p.curvature
    errors = torch.cat([p.z, -p.residual[:, None]], 1)
    squared = ((errors @ u) * errors).sum(1)
    v[:d, :d] = 4 * p.z.T @ (squared[:, None] * p.z) / len(p.z)
    u = u - rate * (g @ u + u @ g) + rate**2 * ((1 - fraction) * g @ u @ g + fraction * v)
    return u[:d, d], u[:d, :d]


def affine(p: Problem, rate: float, fraction: float) -> tuple[Tensor, Tensor]:
    """`moment_step` as a matrix and a vector, which act on mean and second moment in one column."""
    d = len(p.solution)

    def step(column: Tensor) -> Tensor:
        mean, second = moment_step(p, column[:d], column[d:].reshape(d, d), rate, fraction)
        return torch.cat([mean, second.reshape(-1)])

    constant = step(torch.zeros(d + d * d, dtype=torch.float64))
    basis = torch.eye(len(constant), dtype=torch.float64)
    return torch.stack([step(e) - constant for e in basis], 1), constant


def noise_floor(p: Problem, rate: float, fraction: float = 1.0) -> Tensor:
    """The second moment that an update at a constant rate leaves as it is."""
    d = len(p.solution)
    matrix, constant = affine(p, rate, fraction)
    assert torch.linalg.eigvals(matrix).abs().max() < 1
    fixed = torch.linalg.solve(torch.eye(len(constant)).double() - matrix, constant)
    return fixed[d:].reshape(d, d)


# ---------------------------------------------------------------- the full batch


def test_gradient_descent_follows_the_powers_of_its_contraction(rng, ledger):
    p = regression(100, rng(0))
    rate, num_updates = 0.01, 250
    start = torch.randn(2, dtype=torch.float64, generator=rng(1))
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=rate)
    for _ in range(num_updates):
        optimizer.zero_grad()
        (p.z @ theta - p.y).square().mean().backward()
        optimizer.step()

    def closed_form(curvature: Tensor) -> Tensor:
        contraction = torch.eye(2, dtype=torch.float64) - rate * curvature
        power = torch.linalg.matrix_power(contraction, num_updates)
        return p.solution + power @ (start - p.solution)

    exact, found = closed_form(p.curvature), theta.detach()
    for name, i in (("slope", 0), ("intercept", 1)):
        ledger(
            f"{name} after 250 updates of gradient descent, against its closed form",
            exact=exact[i],
            estimate=found[i],
        )
    # A Hessian without the factor 2 of the square is noticed.
    assert not torch.allclose(closed_form(p.curvature / 2), found, atol=1e-3)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_descent_converges_exactly_below_two_over_the_largest_curvature(rng, dimension):
    z = torch.randn(40, dimension, dtype=torch.float64, generator=rng(dimension))
    p = least_squares(z, torch.randn(40, dtype=torch.float64, generator=rng(7)))
    curvatures = torch.linalg.eigvalsh(p.curvature)

    def factor(rate: float) -> float:
        """Growth per update of a random displacement after many of them: an oracle by running."""
        x = torch.randn(dimension, dtype=torch.float64, generator=rng(8)).numpy()
        curvature = p.curvature.numpy()
        for _ in range(3000):
            x = x - rate * (curvature @ x)
            growth = math.sqrt(x @ x)
            x = x / growth
        return growth

    limit = 2 / float(curvatures[-1])
    assert factor(0.99 * limit) < 1 < factor(1.01 * limit)
    # The best rate, and its factor.
    best = 2 / float(curvatures[0] + curvatures[-1])
    kappa = float(curvatures[-1] / curvatures[0])
    if dimension > 1:
        assert factor(best) == pytest.approx((kappa - 1) / (kappa + 1), abs=1e-9)
        assert factor(0.97 * best) > factor(best) < factor(1.03 * best)


def test_momentum_contracts_by_the_square_root_of_the_condition_number(rng):
    p = regression(100, rng(0))
    low, high = torch.linalg.eigvalsh(p.curvature).tolist()
    root = math.sqrt(high / low)
    factor = (root - 1) / (root + 1)
    rate, momentum = 4 / (math.sqrt(high) + math.sqrt(low)) ** 2, factor**2
    eye = torch.eye(2, dtype=torch.float64)

    def radius(momentum: float) -> float:
        """Spectral radius of (theta, velocity) -> after an update of torch.optim.SGD."""
        velocity = torch.cat([p.curvature, momentum * eye], 1)
        update = torch.cat([torch.cat([eye, 0 * eye], 1) - rate * velocity, velocity])
        return float(torch.linalg.eigvals(update).abs().max())

    # At the optimum the two roots of a mode coincide, which costs half of the digits.
    assert radius(momentum) == pytest.approx(factor, abs=1e-6)
    assert radius(0.9 * momentum) > factor < radius(1.1 * momentum)

    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=rate, momentum=momentum)
    for _ in range(60):
        optimizer.zero_grad()
        (p.z @ theta - p.y).square().mean().backward()
        optimizer.step()
    assert (theta.detach() - p.solution).norm() < 1e-10


def test_forgetting_zero_grad_is_momentum_one(rng):
    p = regression(100, rng(0))
    start = torch.randn(2, dtype=torch.float64, generator=rng(1))

    def run(momentum: float, forget: bool) -> Tensor:
        theta = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([theta], lr=0.01, momentum=momentum)
        path = []
        for _ in range(150):
            if not forget:
                optimizer.zero_grad()
            (p.z @ theta - p.y).square().mean().backward()
            optimizer.step()
            path.append(theta.detach() - p.solution)
        return torch.stack(path)

    forgotten = run(0.0, forget=True)
    assert torch.allclose(forgotten, run(1.0, forget=False), atol=1e-10)
    assert not torch.allclose(forgotten, run(0.9, forget=False), atol=1e-1)
    # Each mode swings for ever: u_{t+1} - 2 u_t + u_{t-1} = -rate * curvature * u_t.
    swing = forgotten[2:] - 2 * forgotten[1:-1] + forgotten[:-2]
    assert torch.allclose(swing, -0.01 * forgotten[1:-1] @ p.curvature, atol=1e-10)


# ---------------------------------------------------------------- some of the rows


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("replacement", [True, False])
def test_minibatch_gradients_have_the_stated_mean_and_covariance(rng, batch_size, replacement):
    n = 6
    p = regression(n, rng(0))
    rows = row_gradients(p, torch.tensor([0.7, -0.4], dtype=torch.float64))
    every = itertools.product if replacement else itertools.permutations
    options = {"repeat": batch_size} if replacement else {"r": batch_size}
    batches = torch.tensor(list(every(range(n), **options)))
    gradients = rows[batches].mean(1)  # of every batch there is, all equally likely
    covariance = gradients.T.cov(correction=0)
    single = rows.T.cov(correction=0)
    assert torch.allclose(gradients.mean(0), rows.mean(0), atol=1e-12)
    fraction = 1.0 if replacement else (n - batch_size) / (n - 1)
    assert torch.allclose(covariance, fraction * single / batch_size, atol=1e-12)
    if batch_size > 1:  # the other kind of batch has another covariance
        other = 1.0 if not replacement else (n - batch_size) / (n - 1)
        assert not torch.allclose(covariance, other * single / batch_size, atol=1e-3)


@pytest.mark.parametrize(("batch_size", "num_updates"), [(1, 4), (2, 3)])
@pytest.mark.parametrize("replacement", [True, False])
def test_the_mean_square_of_sgd_follows_its_recursion(rng, batch_size, num_updates, replacement):
    n, rates = 3, (0.2, 0.05, 0.1, 0.3)[:num_updates]
    p = regression(n, rng(0))
    start = torch.tensor([0.7, -0.4], dtype=torch.float64)
    every = itertools.product if replacement else itertools.permutations
    options = {"repeat": batch_size} if replacement else {"r": batch_size}
    batches = list(every(range(n), **options))
    # Every sequence of batches that can happen, all equally likely.
    index = torch.tensor(list(itertools.product(batches, repeat=num_updates)))
    theta = start.expand(len(index), 2)
    mean, second = start, torch.outer(start, start)
    fraction = 1 / batch_size * (1 if replacement else (n - batch_size) / (n - 1))
    for t, rate in enumerate(rates):
        rows = row_gradients(p, theta).gather(1, index[:, t, :, None].expand(-1, -1, 2))
        theta = theta - rate * rows.mean(1)
        mean, second = moment_step(p, mean, second, rate, fraction)
        exact = theta.T @ theta / len(theta)
        assert torch.allclose(mean, theta.mean(0), atol=1e-12)
        assert torch.allclose(second, exact, atol=1e-12)
    _, ignored = moment_step(p, mean, second, 0.1, 0.0)  # what the noise adds is no trifle
    _, kept = moment_step(p, mean, second, 0.1, fraction)
    assert (kept - ignored).diagonal().sum() > 1e-4


@pytest.mark.parametrize(("batch_size", "rate"), [(1, 0.03), (20, 0.2)])
def test_simulated_sgd_ends_at_its_noise_floor(rng, ledger, batch_size, rate):
    p = regression(100, rng(0))
    runs, g = 3000, rng(1)
    x = torch.zeros(runs, 2, dtype=torch.float64)  # start at the solution, then relax
    for _ in range(round(18 / rate)):  # what is left of the start is e^-10 of it
        z = torch.randint(100, (runs, batch_size), generator=g)
        error = (p.z[z] @ x[:, :, None])[..., 0] - p.residual[z]
        x = x - rate * 2 * (error[..., None] * p.z[z]).mean(1)
    squared = x.square().sum(1)
    floor = noise_floor(p, rate, 1 / batch_size).diagonal().sum()
    std_error = squared.std() / math.sqrt(runs)
    ledger(
        f"mean squared distance of SGD to the least-squares line (batch {batch_size}, "
        f"rate {rate:g})",
        exact=floor,
        estimate=squared.mean(),
        std_error=std_error,
    )
    # Twice the batch would be noticed.
    wrong = noise_floor(p, rate, 1 / (2 * batch_size)).diagonal().sum()
    assert abs(squared.mean() - wrong) > Z * std_error


def test_the_noise_floor_shrinks_like_the_rate(rng):
    p = regression(100, rng(0))
    still = row_gradients(p, torch.zeros(2).double()).T.cov(correction=0)
    # To first order in the rate the floor solves  H X + X H = C.
    exact = scipy.linalg.solve_continuous_lyapunov(p.curvature.numpy(), still.numpy())
    errors = []
    for rate in (1e-2, 1e-3, 1e-4):
        scaled = noise_floor(p, rate) / rate
        errors.append(float((scaled - torch.from_numpy(exact)).norm()))
    assert errors[0] < 0.1 and errors[2] == pytest.approx(errors[0] / 100, rel=0.2)


# ---------------------------------------------------------------- rates that shrink


def mean_squares(p: Problem, start: Tensor, rates: Tensor, batch_size: int) -> Tensor:
    """E |theta_t - theta*|^2 before the first update and after each of them."""
    # The update is a polynomial of degree 2 in the rate, so two rates tell all about it.
    (plus, constant), (minus, _) = (affine(p, rate, 1 / batch_size) for rate in (1.0, -1.0))
    linear, squared = (plus - minus) / 2, (plus + minus) / 2 - torch.eye(len(plus)).double()
    state = torch.cat([start, torch.outer(start, start).reshape(-1)]).numpy()
    linear, squared, constant = linear.numpy(), squared.numpy(), constant.numpy()
    result = [state[2] + state[5]]
    for rate in rates.tolist():
        state = state + rate * (linear @ state) + rate**2 * (squared @ state + constant)
        result.append(state[2] + state[5])
    return torch.tensor(result, dtype=torch.float64)


def last_mean_square(p: Problem, start: Tensor, rates: Tensor, batch_size: int) -> float:
    """The last of `mean_squares` alone: the updates of (state, 1), multiplied pair by pair."""
    updates = torch.eye(7, dtype=torch.float64).repeat(len(rates), 1, 1)
    (plus, constant), (minus, _) = (affine(p, rate, 1 / batch_size) for rate in (1.0, -1.0))
    linear, squared = (plus - minus) / 2, (plus + minus) / 2 - torch.eye(len(plus)).double()
    rate = rates[:, None, None]
    updates[:, :6, :6] += rate * linear + rate**2 * squared
    updates[:, :6, 6] = rate[..., 0] ** 2 * constant
    while len(updates) > 1:  # a power of two
        updates = updates[1::2] @ updates[::2]
    state = torch.cat([start, torch.outer(start, start).reshape(-1), torch.ones(1).double()])
    state = updates[0] @ state
    return float(state[2] + state[5])


def test_products_of_updates_end_where_the_updates_do(rng):
    p, start = regression(100, rng(0)), torch.tensor([-0.5, -3.0], dtype=torch.float64)
    rates = 1 / (torch.arange(64, dtype=torch.float64) + 20)
    exact = float(mean_squares(p, start, rates, 5)[-1])
    assert last_mean_square(p, start, rates, 5) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 10])
def test_decaying_rates_converge_and_constant_ones_reach_a_floor(rng, batch_size):
    p = regression(100, rng(0))
    mu = float(torch.linalg.eigvalsh(p.curvature)[0])
    largest = float(2 * p.z.square().sum(1).max())
    noise = float(row_gradients(p, torch.zeros(2).double()).square().sum(1).mean())
    start = torch.tensor([-0.5, -3.0], dtype=torch.float64)
    t = torch.arange(6000, dtype=torch.float64)
    c = 2 / mu
    schedules = {
        "constant": torch.full_like(t, 0.04),
        "decaying": c / (t + 2 * largest * c),
        "slower": 0.04 * (1 + t / 100) ** -0.7,
        "too fast": 0.04 * (1 + t / 10) ** -2.0,
    }
    a = {name: mean_squares(p, start, rates, batch_size) for name, rates in schedules.items()}
    for name, rates in schedules.items():
        assert rates.max() <= 1 / (2 * largest)
        bound = (1 - mu * rates) * a[name][:-1] + 2 * noise * rates**2
        assert (a[name][1:] <= bound).all()
        # Without the noise term the inequality is false where noise ever dominates.
        noiseless = (a[name][1:] <= (1 - mu * rates) * a[name][:-1]).all()
        assert noiseless == (name == "too fast")
    # (a) a floor, below the bound, but not zero;
    floor = noise_floor(p, 0.04, 1 / batch_size).trace()
    assert floor <= 2 * 0.04 * noise / mu
    assert a["constant"][-1] == pytest.approx(float(floor), rel=1e-6)
    # (b) shrinking rates with an infinite sum go below any floor, those with a finite sum stop;
    assert a["slower"][-1] < floor / 5
    assert a["too fast"][-1] > floor and a["too fast"][-1] > 0.99 * a["too fast"][3000]
    # (c) K / (t + t0), and far below that floor with time.
    t0 = 2 * largest * c
    k = max(float(a["decaying"][0]) * t0, 2 * c**2 * noise / (c * mu - 1))
    assert (a["decaying"] <= k / (torch.arange(6001) + t0)).all()
    assert a["decaying"][-1] < floor / 5


def test_the_schedule_c_over_t_has_the_exponent_of_its_slow_mode_or_one(rng):
    p = regression(100, rng(0))
    mu = float(torch.linalg.eigvalsh(p.curvature)[0])
    start = torch.tensor([-0.5, -3.0], dtype=torch.float64)
    t = torch.arange(2**16, dtype=torch.float64)

    def exponent(c: float) -> float:
        """Of the mean square in t, over the last three doublings."""
        rates = c / (t + 20 * c)
        early, late = (last_mean_square(p, start, rates[:n], 1) for n in (2**13, 2**16))
        return (math.log(early) - math.log(late)) / math.log(8)

    assert exponent(2 / mu) == pytest.approx(1.0, abs=0.02)
    assert exponent(0.2 / mu) == pytest.approx(0.4, abs=0.02)  # 2 c mu, when that is below 1


# ---------------------------------------------------------------- each row once


def test_reshuffling_leaves_a_bias_like_the_rate_and_a_cloud_like_its_power_three_halves(rng):
    """At the ends of epochs, exactly, over all orders of four rows."""
    p = regression(4, rng(3))
    orders = list(itertools.permutations(range(4)))
    hessians = 2 * p.z[:, :, None] * p.z[:, None, :]
    pushes = row_gradients(p, torch.zeros(2).double())

    def settled(rate: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance that an epoch leaves as they are."""
        # Every row's update as a matrix that acts on (displacement, 1).
        update = torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)
        update[:, :2, :2] -= rate * hessians
        update[:, :2, 2] = -rate * pushes
        epochs = [torch.linalg.multi_dot(list(update[list(order)])) for order in orders]
        mean_epoch = torch.stack([torch.kron(e, e) for e in epochs]).mean(0)
        keep = torch.eye(8, dtype=torch.float64) - mean_epoch[:8, :8]
        u = torch.cat([torch.linalg.solve(keep, mean_epoch[:8, 8]), torch.ones(1).double()])
        u = u.reshape(3, 3)
        return u[:2, 2], u[:2, :2] - torch.outer(u[:2, 2], u[:2, 2])

    # The second-order move of an epoch that starts at the solution, for every order.
    moves = []
    for order in orders:
        before, move = torch.zeros(2).double(), torch.zeros(2).double()
        for i in order:
            move = move + hessians[i] @ before
            before = before + pushes[i]
        moves.append(move)
    assert before.norm() < 1e-12  # the pushes cancel, which is the point of reshuffling
    moves = torch.stack(moves)
    bias = torch.linalg.solve(4 * p.curvature, moves.mean(0))
    cloud = scipy.linalg.solve_continuous_lyapunov(
        4 * p.curvature.numpy(), moves.T.cov(correction=0).numpy()
    )
    rate = 1e-4
    mean, covariance = settled(rate)
    assert torch.allclose(mean / rate, bias, rtol=1e-2)
    assert torch.allclose(covariance / rate**3, torch.from_numpy(cloud), rtol=1e-2, atol=1e-3)
    # With replacement the cloud is of another order, and not biased at all.
    assert noise_floor(p, rate).trace() > 1e3 * covariance.trace()


# ---------------------------------------------------------------- loops that ignore their batches


def loop(p: Problem, loader: DataLoader, num_epochs: int, *, uses: str) -> Tensor:
    """Mini-batch descent as it is meant, or with a slip of the name in its inner line."""
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    for _ in range(num_epochs):
        for z_batch, y_batch in loader:
            z, y = (z_batch, y_batch) if uses == "batch" else (p.z, p.y)
            optimizer.zero_grad()
            (z @ theta - y).square().mean().backward()
            optimizer.step()
    return theta.detach()


def load(z: Tensor, y: Tensor, generator: torch.Generator) -> DataLoader:
    return DataLoader(TensorDataset(z, y), batch_size=20, shuffle=True, generator=generator)


def test_two_shuffles_unmask_a_loop_that_ignores_its_batches(rng):
    p = regression(100, rng(0))
    for seed in range(0, 10, 2):
        right, wrong = (
            [loop(p, load(p.z, p.y, rng(s)), 1, uses=uses) for s in (seed, seed + 1)]
            for uses in ("batch", "everything")
        )
        assert not torch.equal(*right)
        assert torch.equal(*wrong)


def test_a_loader_of_other_data_unmasks_a_loop_that_ignores_its_batches(rng):
    p = regression(100, rng(0))
    target = torch.tensor([-7.0, 1.0], dtype=torch.float64)
    ends = {
        uses: loop(p, load(p.z, p.z @ target, rng(0)), 90, uses=uses)
        for uses in ("batch", "everything")
    }
    # The other data have no noise, so that even mini-batches converge to their solution.
    assert torch.allclose(ends["batch"], target, atol=1e-4)
    assert torch.allclose(ends["everything"], p.solution, atol=1e-4)


def test_a_loader_draws_its_batches_without_replacement(rng):
    rows = torch.arange(100)
    for seed in range(5):
        batches = [
            batch
            for (batch,) in DataLoader(
                TensorDataset(rows), batch_size=20, shuffle=True, generator=rng(seed)
            )
        ]
        assert [len(batch) for batch in batches] == [20] * 5
        assert torch.equal(torch.cat(batches).sort().values, rows)
        assert not torch.equal(torch.cat(batches), rows)
