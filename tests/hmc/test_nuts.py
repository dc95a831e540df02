"""NUTS against a slow recursive version, its exact law on an orbit, and from exact starts."""

import functools
import importlib
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from companion.core import Kernel, Trace, sample
from companion.hmc import NutsInfo, nuts, nuts_step
from companion.hmc.nuts import Branch, add_point, join
from companion.mcmc.base import GradientState, init_gradient
from companion.mcmc.mass import mass_for
from companion.targets import Banana, Funnel, Gaussian, SkewedProduct
from companion.testing import assert_invariant, invariance_test

module = importlib.import_module("companion.hmc.nuts")  # its name is also the function's
F64 = {"dtype": torch.float64}
CHAINS = 10_000


def skewed(like: Tensor) -> SkewedProduct:
    matrix = [[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.5, 0.3, 2.0]]
    return SkewedProduct(torch.tensor(matrix).to(like))


def banana(like: Tensor) -> Banana:
    return Banana(torch.tensor([1.5, 0.8]).to(like), bend=0.4)


# ---------------------------------------------------------------- the slow version


class Orbit:
    """One chain's trajectory, as long as one likes: point k is k leapfrog steps from the start."""

    def __init__(self, target, e: float, mass: Tensor | None, x: Tensor, normal: Tensor) -> None:
        matrix = np.eye(len(x))
        if mass is not None:
            matrix = (mass if mass.ndim == 2 else mass.diag()).numpy()
        self.target, self.e, self.inverse = target, e, np.linalg.inv(matrix)
        self.points = {0: self.point(x.numpy(), np.linalg.cholesky(matrix) @ normal.numpy(), 0.0)}
        self.is_tree = functools.cache(self.is_tree)

    def point(self, x: np.ndarray, p: np.ndarray, half_step: float):
        """`(x, p, log_prob, grad, H)`, once p has had its last half kick."""
        value, grad = self.target.value_and_grad(torch.from_numpy(x))
        p = p + half_step * grad.numpy()
        return x, p, float(value), grad.numpy(), 0.5 * p @ self.inverse @ p - float(value)

    def __getitem__(self, k: int):
        if k not in self.points:
            sign = 1 if k > 0 else -1
            x, p, _, grad, _ = self[k - sign]
            p = p + sign * self.e / 2 * grad
            self.points[k] = self.point(x + sign * self.e * self.inverse @ p, p, sign * self.e / 2)
        return self.points[k]

    def weight(self, k: int) -> float:
        """`exp(H_0 - H_k)`."""
        return math.exp(self[0][-1] - self[k][-1])

    def is_straight(self, low: int, high: int) -> bool:
        v = self.inverse @ sum(self[k][1] for k in range(low, high + 1))
        return self[low][1] @ v > 0 and self[high][1] @ v > 0

    def joins(self, low: int, high: int, cross: bool = True) -> bool:
        """Whether the two halves of `low..high` go together."""
        middle = (low + high) // 2
        parts = [(low, high), (low, middle + 1), (middle, high)] if cross else [(low, high)]
        return all(self.is_straight(*part) for part in parts)

    def is_tree(self, low: int, high: int, cross: bool = True) -> bool:
        """Whether `low..high` and all its balanced parts are straight, by recursion."""
        if low == high:
            return self[low][-1] - self[0][-1] <= 1000
        middle = (low + high) // 2
        parts = (low, middle), (middle + 1, high)
        return all(self.is_tree(*part, cross) for part in parts) and self.joins(low, high, cross)


def slow_step(o: Orbit, max_depth: int, noise: list[Tensor]) -> tuple[int, int, int]:
    """One chain's step, with the same random numbers: which point, how deep, how many steps."""
    low = high = chosen = num_steps = 0
    weight, direction = 1.0, 1
    for depth in range(max_depth):
        u = noise[depth]
        direction = -direction if u[0] < 0.5 else direction
        length = 2**depth
        new = [high + 1 + i if direction > 0 else low - 1 - i for i in range(length)]
        for i in range(length):  # the branch ends with the first part of it that is no tree
            starts = [i + 1 - 2**j for j in range(depth + 1) if (i + 1) % 2**j == 0]
            num_steps += 1
            if not all(o.is_tree(*sorted((new[a], new[i]))) for a in starts):
                return chosen, depth, num_steps
        branch, candidate = 0.0, None
        for i, k in enumerate(new):
            share = o.weight(k)
            branch += share
            if u[2 + i] < share / branch:
                candidate = k
        if u[1] < branch / weight:
            chosen = candidate
        weight += branch
        low, high = min(low, *new), max(high, *new)
        if not o.joins(low, high):
            return chosen, depth + 1, num_steps
    return chosen, max_depth, num_steps


@pytest.mark.parametrize("mass", [None, [0.6, 2.0], [[1.2, 0.5], [0.5, 1.0]]])
def test_batch_of_chains_does_what_the_slow_version_does_to_each(rng, mass):
    target, n, max_depth = banana(torch.empty((), **F64)), 60, 6
    mass = None if mass is None else torch.tensor(mass, **F64)
    steps = torch.logspace(-1.3, -0.2, n, **F64)
    state = init_gradient(target, target.sample(n, generator=rng(0)))
    normal = torch.randn(n, 2, generator=rng(1), **F64)
    noise = []

    def uniform(m: int) -> Tensor:
        noise.append(torch.rand(m, n, generator=rng(len(noise)), **F64))
        return noise[-1]

    new, info = nuts_step(target, steps, max_depth, mass_for(mass)(state), state, normal, uniform)
    while len(noise) < max_depth:
        uniform(2 ** len(noise) + 2)
    for c in range(n):
        o = Orbit(target, float(steps[c]), mass, state.x[c], normal[c])
        chosen, depth, num_steps = slow_step(o, max_depth, [u[:, c] for u in noise])
        found = [t[c].numpy() for t in (new.x, new.log_prob, new.grad, info.energy)]
        for a, b in zip(found, (o[chosen][i] for i in (0, 2, 3, 4)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        assert (info.tree_depth[c], info.num_steps[c]) == (depth, num_steps)
        assert info.accepted[c] == (chosen != 0)
    assert info.tree_depth.unique().numel() >= 4  # short and long trajectories in one batch


# ---------------------------------------------------------------- the exact law on an orbit


def law(o: Orbit, start: int, max_depth: int, mistake: str = "") -> dict[int, float]:
    """The probability with which a step from point `start` ends at each point of the orbit."""
    cross = mistake != "no cross checks"
    result: dict[int, float] = {}

    def weight(points) -> float:
        return sum(o.weight(k) for k in points) + 1e-300

    def within(points: list[int]) -> dict[int, float]:
        """Law of the candidate of a branch, built in the order of `points`."""
        if mistake == "last point":
            return {points[-1]: 1.0}
        if mistake == "biased within" and len(points) > 1:
            half = len(points) // 2
            a = min(1.0, weight(points[half:]) / weight(points[:half]))
            first, second = within(points[:half]), within(points[half:])
            return {k: (1 - a) * q for k, q in first.items()} | {
                k: a * q for k, q in second.items()
            }
        return {k: o.weight(k) / weight(points) for k in points}

    def grow(low: int, high: int, depth: int, candidate: dict[int, float], share: float) -> None:
        if depth == max_depth:
            stop(candidate, share)
            return
        length = 2**depth
        for new in (range(high + 1, high + 1 + length), range(low - 1, low - 1 - length, -1)):
            points = list(new)
            is_tree = mistake == "no checks within" or o.is_tree(min(new), max(new), cross)
            if not is_tree:
                stop(candidate, share / 2)
                continue
            a = min(1.0, weight(points) / weight(range(low, high + 1)))
            a = 1.0 if mistake == "always the new half" else a
            drawn = {k: (1 - a) * q for k, q in candidate.items()}
            if a > 0:
                drawn |= {k: a * q for k, q in within(points).items()}
            ends = min(low, *new), max(high, *new)
            if o.joins(*ends, cross):
                grow(*ends, depth + 1, drawn, share / 2)
            else:
                stop(drawn, share / 2)

    def stop(candidate: dict[int, float], share: float) -> None:
        for k, q in candidate.items():
            result[k] = result.get(k, 0.0) + share * q

    grow(start, start, 0, {start: 1.0}, 1.0)
    return result


def imbalance(o: Orbit, max_depth: int, mistake: str = "") -> float:
    """By how much the step changes the weight of point 0, relative to it: 0 if invariant."""
    reach = 2**max_depth - 1
    inflow = sum(
        o.weight(k) * law(o, k, max_depth, mistake).get(0, 0.0)
        for k in range(-reach, reach + 1)
        if o.weight(k) > 1e-250
    )
    return abs(inflow - 1.0)


def orbits(rng, n: int, e: float = 0.5) -> list[Orbit]:
    target = banana(torch.empty((), **F64))
    x = target.sample(n, generator=rng(0))
    normal = torch.randn(n, 2, generator=rng(1), **F64)
    return [Orbit(target, e, None, a, b) for a, b in zip(x, normal, strict=True)]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # far out, of no weight
def test_law_of_the_slow_version_is_invariant_on_every_orbit(rng):
    for o in orbits(rng, 10):
        assert sum(law(o, 0, 4).values()) == pytest.approx(1.0, abs=1e-12)
        assert imbalance(o, 4) < 1e-12
        # The cross checks make trajectories shorter; it is invariant without them as well.
        assert imbalance(o, 4, "no cross checks") < 1e-12


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize(
    "mistake", ["no checks within", "biased within", "last point", "always the new half"]
)
def test_law_of_each_mistake_is_not_invariant(rng, mistake):
    worst = max(imbalance(o, 4, mistake) for o in orbits(rng, 10))
    assert worst > 0.02


def test_batch_follows_the_exact_law_on_an_orbit(rng):
    n, max_depth = 20_000, 3
    p_values = []
    for o in orbits(rng, 8):
        x, normal = (torch.from_numpy(t) for t in o[0][:2])
        state = init_gradient(o.target, x.expand(n, 2))
        g = rng(2)
        new, _ = nuts_step(
            o.target,
            o.e,
            max_depth,
            mass_for(None)(state),
            state,
            normal.expand(n, 2),
            lambda m, g=g: torch.rand(m, n, generator=g, **F64),
        )
        exact = {k: q for k, q in law(o, 0, max_depth).items() if n * q > 5}
        at = torch.from_numpy(np.stack([o[k][0] for k in exact]))
        distance, index = (new.x[:, None] - at).norm(dim=-1).min(1)
        found = distance < 1e-8
        counts = index[found].bincount(minlength=len(exact)).numpy()
        # The points left out are too rare for a chi-square test: at most 5 expected of each.
        left_out = n * (1 - sum(exact.values()))
        assert abs(n - counts.sum() - left_out) < 20
        expected = np.array(list(exact.values())) * counts.sum() / sum(exact.values())
        assert len(expected) > 2
        p_values.append(scipy.stats.chisquare(counts, expected).pvalue)
    assert min(p_values) > 1e-5 / len(p_values)
    assert scipy.stats.chisquare(counts).pvalue < 1e-9  # not all points alike


# ---------------------------------------------------------------- exact starts


def wrong_kernel(target, step_size, monkeypatch, name: str, make) -> Kernel:
    """NUTS with one part exchanged: for each step anew, as `make` gives it."""
    right = nuts(target, step_size)

    def step(state: GradientState, *, generator: torch.Generator):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, make())
            return right.step(state, generator=generator)

    return Kernel(right.init, step)


def problem(name: str, like: Tensor):
    """The density, its exact sampler, step size, mass."""
    if name == "skewed, diagonal mass":
        return skewed(like), skewed(like), 0.6, torch.tensor([1.5, 4.0, 0.3]).to(like)
    if name == "banana, dense mass, a step size for each chain":
        step = torch.linspace(0.3, 0.9, CHAINS).to(like)
        return banana(like), banana(like), step, torch.tensor([[1.2, 0.5], [0.5, 1.0]]).to(like)
    if name == "Gaussian of unequal scales, dense mass":
        covariance = torch.tensor([[4.0, 1.0, 0.2], [1.0, 0.5, 0.1], [0.2, 0.1, 0.09]]).to(like)
        target = Gaussian(torch.tensor([1.0, -2.0, 0.5]).to(like), covariance)
        mass = torch.tensor([[0.6, -0.8, 0.0], [-0.8, 4.0, -2.0], [0.0, -2.0, 16.0]]).to(like)
        return target, target, 1.2, mass
    assert name == "banana at beta = 1/2, unit mass"
    scale = torch.tensor([1.0, 0.7]).to(like)
    cold = Banana(scale, bend=0.6)

    def tempered(x: Tensor) -> Tensor:
        return 0.5 * cold(x)

    return tempered, Banana(scale * math.sqrt(2.0), bend=0.6), 0.6, None


PROBLEMS = [
    "skewed, diagonal mass",
    "banana, dense mass, a step size for each chain",
    "Gaussian of unequal scales, dense mass",
    "banana at beta = 1/2, unit mass",
]


def check(kernel: Kernel, sampler, generator: torch.Generator, num_steps: int = 4):
    return invariance_test(
        kernel, sampler, num_chains=CHAINS, num_steps=num_steps, generator=generator
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in PROBLEMS), (PROBLEMS[1], torch.float32)],
)
def test_nuts_leaves_the_target_invariant(rng, device, name, dtype):
    log_prob, sampler, step_size, mass = problem(name, torch.empty((), device=device, dtype=dtype))
    kernel = nuts(log_prob, step_size, mass)
    assert_invariant(check(kernel, sampler, rng(0, device)))
    state = kernel.init(sampler.sample(CHAINS, generator=rng(1, device)))
    info = kernel.step(state, generator=rng(2, device))[1]
    assert 0.6 < info.accept_prob.mean() < 0.95 and 1.5 < info.tree_depth.double().mean() < 4


def last_point():
    def wrong(log_prob, mass, step_size, energy_0, uniform, b: Branch):
        return add_point(log_prob, mass, step_size, energy_0, 0.0 * uniform, b)

    return wrong


def no_checks_within():
    """Of the joins only those of whole trajectories count: at 1, 2 + 2, 4 + 4, ... points."""
    joins = 0

    def wrong(a, b, going, are_points):
        nonlocal joins
        joins += 1
        # Of the first 2^(k + 1) - 1 joins the last joins two trajectories of 2^k points.
        whole, checked = join(a, b, going, are_points)
        return whole, checked if joins & (joins + 1) == 0 else going

    return wrong


def always_the_new_half():
    def wrong(*arguments):
        *rest, uniform = arguments

        def rigged(n: int) -> Tensor:
            u = uniform(n)
            u[1] = -1.0
            return u

        return nuts_step(*rest, rigged)

    return wrong


MISTAKES = {
    "no checks within": ("join", no_checks_within),
    "last point": ("add_point", last_point),
    "always the new half": ("nuts_step", always_the_new_half),
}


@pytest.mark.parametrize(("name", "make"), MISTAKES.values(), ids=MISTAKES.keys())
def test_invariance_rejects_each_mistake(rng, monkeypatch, name, make):
    target = skewed(torch.empty((), **F64))
    kernel = wrong_kernel(target, 0.5, monkeypatch, name, make)
    assert check(kernel, target, rng(0)).p_value < 1e-9


def test_nuts_is_not_rejected_there(rng):
    target = skewed(torch.empty((), **F64))
    assert_invariant(check(nuts(target, 0.5), target, rng(0)))


# ---------------------------------------------------------------- exact answers


def test_moments_of_the_gaussian_of_correlation_95(rng, ledger):
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]], **F64)
    target = Gaussian(torch.zeros(2, **F64), covariance)
    # Chains are independent: the error of a mean is that of the means of the chains.
    x = target.sample(1000, generator=rng(0))
    trace = sample(nuts(target, 0.3), x, 50, generator=rng(1))
    a, b = trace.x.unbind(-1)
    kinetic = trace.stats["energy"] + trace.log_prob
    for what, exact, values in (
        ("mean, Gaussian of correlation .95, by NUTS", 0.0, a),
        ("variance, Gaussian of correlation .95, by NUTS", 1.0, a.square()),
        ("covariance, Gaussian of correlation .95, by NUTS", 0.95, a * b),
        ("mean kinetic energy at the end of a step of NUTS, d = 2", 1.0, kinetic),
    ):
        means = values.mean(1)
        ledger(
            what,
            exact=exact,
            estimate=means.mean(),
            std_error=means.std() / math.sqrt(len(means)),
        )


def test_trajectories_grow_as_the_step_shrinks(rng):
    target = Gaussian(torch.zeros(10, **F64), torch.eye(10, **F64))
    x = target.sample(500, generator=rng(0))
    lengths = []
    for e in (0.4, 0.2, 0.1):
        kernel = nuts(target, e)
        info = kernel.step(kernel.init(x), generator=rng(1))[1]
        lengths.append(e * info.num_steps.double().mean())
    # A quarter to half a turn of the circle, whatever the step (doubling makes it coarse).
    assert all(math.pi / 2 < length < 2 * math.pi for length in lengths)


# ---------------------------------------------------------------- the batch


def test_a_step_costs_as_many_gradients_as_its_longest_trajectory(rng):
    calls = []

    class Counting(Banana):
        def value_and_grad(self, x):
            calls.append(x)
            return super().value_and_grad(x)

    target = Counting(torch.tensor([1.5, 0.8], **F64), bend=0.4)
    kernel = nuts(target, 0.2)
    state = kernel.init(target.sample(100, generator=rng(0)))
    calls.clear()
    _, info = kernel.step(state, generator=rng(1))
    assert len(calls) == info.num_steps.max() > info.num_steps.min()


def test_trajectories_are_cut_at_max_depth(rng):
    target = banana(torch.empty((), **F64))
    kernel = nuts(target, 0.01, max_depth=3)
    info = kernel.step(kernel.init(target.sample(100, generator=rng(0))), generator=rng(1))[1]
    assert info.num_steps.max() == 7 and info.tree_depth.max() == 3
    assert (info.num_steps == 7).double().mean() > 0.9  # few are about to turn back by themselves
    assert_invariant(check(nuts(target, 0.6, max_depth=2), target, rng(2)))


def test_nuts_runs_with_any_number_of_chain_and_event_dimensions(rng):
    scalar = nuts(lambda x: -0.5 * x.square(), 1.0)
    assert sample(scalar, torch.zeros(7), 5, generator=rng(0)).x.shape == (7, 5)
    assert sample(scalar, torch.zeros(()), 5, generator=rng(0)).x.shape == (5,)
    matrix = nuts(lambda x: -0.5 * x.square().sum((-2, -1)), 0.3, torch.full((3, 2), 2.0))
    trace = sample(matrix, torch.zeros(2, 4, 3, 2), 5, generator=rng(0))
    assert trace.x.shape == (2, 4, 5, 3, 2) and trace.stats["tree_depth"].shape == (2, 4, 5)
    assert sample(matrix, torch.zeros(3, 2), 5, generator=rng(0)).x.shape == (5, 3, 2)


def test_each_chain_of_a_batch_may_have_its_own_density(rng, ledger):
    betas = torch.tensor([0.25, 1.0, 4.0], **F64)[:, None]

    def log_prob(x: Tensor) -> Tensor:
        return -0.5 * betas * x.square().sum(-1)

    x = torch.randn(3, 2000, 2, generator=rng(0), **F64) / betas[:, :, None].sqrt()
    trace = sample(nuts(log_prob, 0.8 / betas.sqrt()), x, 5, generator=rng(1))
    second = (trace.x.square().sum(-1) * betas[:, :, None]).mean(-1)
    for i, beta in enumerate(betas[:, 0].tolist()):
        ledger(
            f"mean of beta |x|^2 by NUTS at beta = {beta}, three of them in one batch, d = 2",
            exact=2.0,
            estimate=second[i].mean(),
            std_error=second[i].std() / math.sqrt(2000),
        )


# ---------------------------------------------------------------- where things go wrong


def test_a_trajectory_into_nan_ends_there_and_is_counted(rng):
    def log_prob(x: Tensor) -> Tensor:  # the square root is NaN below 0
        return -x.sqrt().pow(2).sum(-1)

    x = torch.rand(500, 2, generator=rng(0), **F64) + 0.1
    with pytest.warns(UserWarning, match="NaN log-density .* were rejected"):
        trace = sample(nuts(log_prob, 0.5), x, 20, generator=rng(1))
    assert (trace.x > 0).all() and (trace.num_nan > 0).any()
    assert (trace.num_divergent >= trace.num_nan).all() and trace.accept_prob.isfinite().all()


def test_a_trajectory_into_infinite_density_ends_there_and_is_counted(rng):
    def run(inside: float) -> Trace:
        def log_prob(x: Tensor) -> Tensor:
            return torch.where((x - 1.5).abs() < 0.5, inside, -0.5 * x.square())

        return sample(nuts(log_prob, 0.5), torch.zeros(200, **F64), 50, generator=rng(0))

    with pytest.warns(UserWarning, match="NaN log-density .* were rejected"):
        trace = run(math.inf)
    assert torch.equal(trace.x, run(-math.inf).x)  # it counts as a place of no density
    assert trace.log_prob.isfinite().all() and trace.num_nan.sum() > 200
    assert (trace.num_divergent >= trace.num_nan).all() and trace.stats["energy"].isfinite().all()
    assert (trace.x.diff(dim=1) != 0).double().mean(1).min() > 0.1


def test_a_region_of_density_zero_is_never_entered(rng):
    class HalfNormal:
        def __call__(self, x: Tensor) -> Tensor:
            return torch.where((x > 0).all(-1), -0.5 * x.square().sum(-1), -torch.inf)

        def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self(x), -x

        def sample(self, n: int, *, generator) -> Tensor:
            return torch.randn(n, 2, generator=generator, **F64).abs()

        log_prob = __call__

    target = HalfNormal()
    assert_invariant(check(nuts(target, 0.5), target, rng(0)))
    trace = sample(nuts(target, 0.5), target.sample(500, generator=rng(1)), 20, generator=rng(2))
    assert (trace.x > 0).all() and not trace.num_nan.any() and trace.num_divergent.sum() > 100


def test_divergences_of_the_funnel_are_counted_where_it_is_narrow(rng):
    funnel = Funnel(torch.tensor(3.0, **F64), num_leaves=9)
    x = funnel.sample(500, generator=rng(0))
    trace = sample(nuts(funnel, 0.3, max_depth=6), x, 10, generator=rng(1))
    necks = x[:, 0] < -3
    assert trace.num_divergent[necks].double().mean() > 5 * trace.num_divergent[~necks].sum() / 500
    assert trace.num_divergent.sum() > 100
    easy = Gaussian(torch.zeros(2, **F64), torch.eye(2, **F64))
    assert not sample(nuts(easy, 0.3), x[:, :2], 10, generator=rng(1)).num_divergent.any()


def test_a_bad_start_is_named_by_chain():
    kernel = nuts(lambda x: x.log().sum(-1), 0.1)
    with pytest.raises(ValueError, match="1 of 3 chains: nan at chain 1"):
        kernel.init(torch.tensor([[1.0], [-1.0], [2.0]]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step_size": 0.0}, ValueError, "step_size must be a finite number above 0"),
        ({"max_depth": 0}, ValueError, "max_depth must be at least 1"),
        ({"mass": 2.0}, TypeError, "mass must be a torch.Tensor or None"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        nuts(lambda x: -x.square().sum(-1), **{"step_size": 0.1} | arguments)


def test_what_does_not_fit_the_points_is_refused(rng):
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="mass must have the shape of a point"):
        nuts(lambda x: -x.square().sum(-1), 0.1, torch.ones(3)).init(x)
    with pytest.raises(ValueError, match="does not broadcast to the chains"):
        nuts(lambda x: -x.square().sum(-1), torch.ones(3)).init(x)
    kernel = nuts(lambda x: -x.square().sum(-1), 0.1)
    with pytest.raises(TypeError, match=r"must be a torch.Generator or None"):
        kernel.step(kernel.init(x), generator=0)


def test_nuts_follows_its_inputs_device_and_needs_no_global_generator(rng):
    target = skewed(torch.empty((), **F64))
    x, mass = target.sample(5, generator=rng(0)), torch.eye(3, **F64) + 0.4
    before = torch.get_rng_state()
    torch.set_default_device("meta")
    try:
        trace = sample(nuts(target, 0.3, mass), x, 4, generator=rng(1))
    finally:
        torch.set_default_device(None)
    assert trace.x.device.type == "cpu" and trace.x.dtype == torch.float64
    assert torch.equal(before, torch.get_rng_state())
    kernel = nuts(target, 0.3)
    assert isinstance(kernel.step(kernel.init(x))[1], NutsInfo)
