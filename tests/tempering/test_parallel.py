"""Parallel tempering: the product law stays, round trips are as frequent as theory says."""

import itertools
import math
import warnings

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal, Uniform

from companion.core import Kernel, sample
from companion.mcmc import GibbsState, metropolis_hastings, random_walk
from companion.models.ising import Ising
from companion.models.rbm import RBM
from companion.targets import Gaussian, GaussianMixture
from companion.tempering import (
    GeometricPath,
    parallel,
    simulated_annealing,
    simulated_tempering,
    tempered_transitions,
    tune_ladder,
)
from companion.tempering.parallel import parallel_tempering, swap_step
from companion.testing import (
    binary_states,
    detailed_balance_error,
    discrete_invariance_test,
    invariance_test,
    transition_matrix,
)
from tests.mcmc.exact_targets import plant
from tests.tempering.exact_paths import F64, ExactGaussians, exact_path

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, F64])
SWAPS = pytest.mark.parametrize("swaps", ["even_odd", "random"])
Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison

RATIO = "above[:-1] - own[:-1] + below[1:] - own[1:]"
WRONG_RATIOS = {
    "sign": f"-({RATIO})",
    "lower beta only": "below[1:] - own[:-1]",
    "always": "0.0 * own[1:]",
    # Balanced all the same where no weight is above 1: `p_i(x) p_j(y) p_j(x) / p_i(x)`.
    "one point only": "above[:-1] - own[:-1]",
}


def wide(**like) -> ExactGaussians:
    """From N(0, 9) to N((1, -2), (1, 1/4)), with independent draws at every beta."""
    sd1 = [1.0, 0.5]
    return ExactGaussians([0.0, 0.0], [3.0, 3.0], [1.0, -2.0], sd1, **like)


def two_peaks(x: Tensor) -> Tensor:
    """N(0, 1) and N(10, 1), half and half; its Z is 2 sqrt(2 pi)."""
    return torch.logaddexp(-0.5 * x.square(), -0.5 * (x - 10.0).square())


def over_two_peaks(device="cpu", step_size=2.0) -> GeometricPath:
    base = Normal(torch.tensor(5.0, dtype=F64, device=device), 6.0)
    return GeometricPath(base, two_peaks, lambda density: random_walk(density, step_size))


SIX = [0.0, 0.03, 0.1, 0.25, 0.55, 1.0]


def mean_and_error(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the chains (the first dimension) of each chain's mean, and its standard error."""
    x = x.double().reshape(len(x), -1).mean(1)
    return x.mean(), x.std() / math.sqrt(len(x))


# ---------------------------------------------------------------- swaps, to round-off


def bits_path() -> GeometricPath:
    """Two coupled bits, from independent ones; the kernel is not used."""

    def log_prob(x: Tensor) -> Tensor:
        return 1.5 * x[..., 0] - 0.8 * x[..., 1] + 2.0 * x[..., 0] * x[..., 1]

    base = Independent(Bernoulli(torch.tensor([0.3, 0.6], dtype=F64)), 1)
    return GeometricPath(base, log_prob, lambda density: random_walk(density, 1.0))


def swap_error(turn: int) -> float:
    """Of detailed balance with respect to the product law, on all 64 states of three rungs."""
    path, betas = bits_path(), torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    near = betas[torch.tensor([[0, 0, 1], [0, 1, 2], [1, 2, 2]])][..., None]

    def step(state: GibbsState, *, generator=None):
        x = state.x.reshape(len(state.x), 3, 2).movedim(1, 0)
        active = torch.tensor([[turn == 0], [turn == 1]])
        noise = torch.rand((2, x.shape[1]), dtype=F64, generator=generator)
        # The name is looked up when it is called: a planted bug counts.
        order, _ = parallel.swap_step(path.profile(x)(near), active, noise)
        x = x.gather(0, order[..., None].expand_as(x))
        return GibbsState(x.movedim(0, 1).reshape(state.x.shape)), None

    states = binary_states(6).double()
    p = path.log_prob(states.reshape(-1, 3, 2), betas).sum(-1).softmax(0)
    return detailed_balance_error(transition_matrix(Kernel(GibbsState, step), states), p)


@pytest.mark.parametrize("turn", [0, 1])
def test_swaps_are_in_detailed_balance_with_the_product_law(turn):
    assert swap_error(turn) < 1e-12


@pytest.mark.parametrize("name", WRONG_RATIOS)
def test_wrong_swap_ratios_break_detailed_balance(monkeypatch, name):
    plant(monkeypatch, swap_step, RATIO, WRONG_RATIOS[name])
    assert swap_error(0) > 1e-3


# ---------------------------------------------------------------- the product law stays


class ProductLaw:
    """All replicas of a ladder over `wide`, `(R, 2)`, independent and exact."""

    def __init__(self, path: ExactGaussians, betas: Tensor):
        self.path, self.betas = path, betas

    def sample(self, n: int, *, generator=None) -> Tensor:
        x = self.path.sample(n * len(self.betas), self.betas.repeat(n), generator=generator)
        return x.reshape(n, len(self.betas), 2)


def everything(x: Tensor) -> Tensor:
    """Each coordinate of each replica, and products and differences of neighbours."""
    pairs = [x[:, 1:] * x[:, :-1], x[:, 1:] - x[:, :-1]]
    return torch.cat([x, *pairs], 1).flatten(1)


def product_p_value(dtype, device, rng, betas, swaps) -> float:
    betas = torch.tensor(betas, dtype=F64, device=device)
    exact = wide(dtype=dtype, device=device)
    base = Gaussian(
        *(
            torch.tensor(a, dtype=dtype, device=device)
            for a in ([0.0] * 2, [[9.0, 0.0], [0.0, 9.0]])
        )
    )
    target = Gaussian(
        *(
            torch.tensor(a, dtype=dtype, device=device)
            for a in ([1.0, -2.0], [[1.0, 0.0], [0.0, 0.25]])
        )
    )
    path = GeometricPath(base, target, lambda density, beta: random_walk(density, 1.5 - beta))

    def step(state: GibbsState, *, generator=None):
        run = parallel_tempering(
            path,
            betas,
            2,
            num_chains=len(state.x),
            x0=state.x.movedim(1, 0),
            swaps=swaps,
            generator=generator,
        )
        return GibbsState(run.x.movedim(0, 1)), None

    return invariance_test(
        Kernel(GibbsState, step),
        ProductLaw(exact, betas),
        num_chains=20_000,
        num_steps=3,
        projections=everything,
        generator=rng(0, device),
    ).p_value


@DTYPES
@pytest.mark.parametrize("betas", [[0.0, 0.2, 0.5, 1.0], [0.1, 0.3, 1.0]], ids=["base", "no base"])
@SWAPS
def test_the_product_of_all_densities_is_left_as_it_is(rng, device, dtype, betas, swaps):
    assert product_p_value(dtype, device, rng, betas, swaps) > 1e-5


@pytest.mark.parametrize("name", ["sign", "lower beta only", "always"])
@SWAPS
def test_wrong_swap_ratios_move_the_product_law(rng, device, monkeypatch, name, swaps):
    plant(monkeypatch, swap_step, RATIO, WRONG_RATIOS[name])
    assert product_p_value(F64, device, rng, [0.0, 0.2, 0.5, 1.0], swaps) < 1e-7


def flips(x: Tensor, *, generator=None) -> Tensor:
    """Proposes to flip one bit, each with the same probability."""
    site = torch.randint(x.shape[-1], x.shape[:-1], device=x.device, generator=generator)
    return (x - torch.nn.functional.one_hot(site, x.shape[-1]).to(x)).abs()


def frustrated(x: Tensor) -> Tensor:
    """Four bits: all on or all off are probable, and what lies between is not."""
    on = x.sum(-1)
    return 3.0 * (on - 2.0).square() - 0.5 * x[..., 0] + 0.3 * x[..., 1]


@pytest.mark.parametrize("swaps", ["even_odd", "random", "none"])
def test_the_law_at_beta_one_is_that_of_enumeration(rng, device, monkeypatch, swaps):
    if swaps == "none":  # the negative control: the flips alone stay where the base put them
        plant(monkeypatch, swap_step, "info.accepted & active", "info.accepted & (active < 0)")
    base = Independent(Bernoulli(torch.full((4,), 0.4, dtype=F64, device=device)), 1)
    path = GeometricPath(base, frustrated, lambda density: metropolis_hastings(density, flips))
    betas = [0.0, 0.15, 0.4, 1.0]

    def step(state: GibbsState, *, generator=None):  # from the base to the end of a run
        run = parallel_tempering(
            path,
            betas,
            1,
            num_chains=len(state.x),
            warmup=40,
            swaps="even_odd" if swaps == "none" else swaps,
            generator=generator,
        )
        return GibbsState(run.trace.x[:, 0]), None

    test = discrete_invariance_test(
        Kernel(GibbsState, step),
        frustrated,
        binary_states(4, device=device).double(),
        num_chains=5000,
        num_steps=1,
        generator=rng(0, device),
    )
    assert test.p_value < 1e-7 if swaps == "none" else test.p_value > 1e-5


# ---------------------------------------------------------------- swap probabilities


def tail_in_common(dim: int, sd_ratio: float) -> float:
    """Swap probability between normal laws about one mean: `2 P(F > sd_ratio^2)`, sd_ratio > 1.

    `E min(1, e^delta) = 2 P(delta < 0)`, as pairs the wrong way round are as probable as each other
    before and after a swap; and delta has the sign of `|x|^2 - |y|^2`.
    """
    return 2.0 * float(stats.f.sf(sd_ratio**2, dim, dim))


def swap_prob_in_one_dimension(path: ExactGaussians, low: float, high: float) -> float:
    """Swap probability by quadrature: the integral of `min(p(x) q(y), q(x) p(y))`."""
    grid = torch.linspace(-15.0, 15.0, 2001, dtype=F64)
    p, q = (
        torch.exp(path.log_prob(grid[:, None], beta) - path.log_z(beta)) * (grid[1] - grid[0])
        for beta in (low, high)
    )
    return float(torch.minimum(p[:, None] * q, q[:, None] * p).sum())


@pytest.mark.parametrize("dim", [1, 3, 20])
def test_swap_probabilities_of_concentric_normal_laws(rng, device, ledger, dim):
    zero, one = torch.zeros(dim, dtype=F64), torch.ones(dim, dtype=F64)
    path = ExactGaussians(zero, 2.0 * one, zero, one, device=device)
    betas = torch.tensor([0.0, 0.2, 1.0], dtype=F64)
    run = parallel_tempering(path, betas, 100, num_chains=1000, generator=rng(0, device))
    sd = path.moments(betas)[1][:, 0]
    for i, estimate in enumerate(run.swap_prob):
        exact = tail_in_common(dim, float(sd[i] / sd[i + 1]))
        bound = math.sqrt(exact * (1.0 - exact) / 1e5)  # of a probability's standard deviation
        ledger(
            f"swap probability in {dim} dimensions, rungs {i} and {i + 1}",
            exact=exact,
            estimate=estimate,
            std_error=bound,
        )


def test_swap_probabilities_by_quadrature(rng, device, ledger, monkeypatch):
    path = ExactGaussians([-1.0], [2.0], [3.0], [0.5], device=device)
    on_cpu = ExactGaussians([-1.0], [2.0], [3.0], [0.5])
    betas = [0.0, 0.1, 0.4, 1.0]
    exact = [swap_prob_in_one_dimension(on_cpu, *pair) for pair in itertools.pairwise(betas)]
    bound = [math.sqrt(p * (1.0 - p) / 1e5) for p in exact]
    run = parallel_tempering(path, betas, 100, num_chains=1000, generator=rng(0, device))
    for i in range(3):
        ledger(
            f"swap probability by quadrature, rungs {i} and {i + 1}",
            exact=exact[i],
            estimate=run.swap_prob[i],
            std_error=bound[i],
        )
    # Barker's rule is as invariant, but swaps less.
    plant(
        monkeypatch,
        swap_step,
        f"metropolis_accept({RATIO}, uniform)",
        f"(lambda p: MoveInfo(p, uniform < p, p > 1.0))(({RATIO}).sigmoid())",
    )
    run = parallel_tempering(path, betas, 100, num_chains=1000, generator=rng(0, device))
    assert all(run.swap_prob[i] < exact[i] - 10 * Z * bound[i] for i in range(3))


# ---------------------------------------------------------------- round trips


def expected_rate(rejection: Tensor, swaps: str) -> Tensor:
    """Round trips of all replicas an iteration, if the points are drawn anew each time.

    "random": a replica goes up or down one rung with probability (1 - r) / 2, a walk on R rungs
    with uniform law. Its commute time is `2 R sum 1 / (1 - r)` (resistances in series), and there
    are R replicas: `1 / (2 sum 1 / (1 - r))`. "even_odd": with its direction, a replica has 2 R
    places; it goes on until it is rejected and then turns, which makes the time `2 R + 2 R sum r /
    (1 - r)` there and back.
    """
    first = 2.0 if swaps == "even_odd" else 2.0 * len(rejection)
    return 1.0 / (first + 2.0 * (rejection / (1.0 - rejection)).sum())


def ladder_in_three_dimensions(device) -> tuple[ExactGaussians, list[float], Tensor]:
    """Uneven on purpose, with the exact rejection probabilities."""
    path = ExactGaussians([0.0] * 3, [3.0] * 3, [0.0] * 3, [1.0] * 3, device=device)
    betas = [0.0, 0.03, 0.2, 0.4, 1.0]
    sd = path.moments(torch.tensor(betas))[1][:, 0].tolist()
    keep = [tail_in_common(3, a / b) for a, b in itertools.pairwise(sd)]
    return path, betas, 1.0 - torch.tensor(keep, dtype=F64)


@SWAPS
def test_round_trips_are_as_frequent_as_theory_says(rng, device, ledger, swaps):
    path, betas, rejection = ladder_in_three_dimensions(device)
    run = parallel_tempering(
        path, betas, 300, num_chains=500, warmup=100, swaps=swaps, generator=rng(0, device)
    )
    rate, error = mean_and_error(run.round_trip_rate)
    exact = expected_rate(rejection, swaps)
    ledger(f"round trips an iteration, {swaps}", exact=exact, estimate=rate, std_error=error)
    # The other scheme's rate, and one without the cost of being turned back twice, are seen.
    other = expected_rate(rejection, "random" if swaps == "even_odd" else "even_odd")
    for wrong in other, 1.0 / (2.0 + 2.0 * rejection.sum()):
        assert abs(rate - wrong) > 3 * Z * error


@SWAPS
@pytest.mark.parametrize("num_rungs", [2, 3, 6])
def test_round_trips_where_every_swap_is_accepted(rng, device, ledger, swaps, num_rungs):
    path = ExactGaussians([0.0], [1.0], [0.0], [1.0], device=device)
    betas = torch.linspace(0.0, 1.0, num_rungs)
    run = parallel_tempering(
        path, betas, 600, num_chains=100, warmup=100, swaps=swaps, generator=rng(0, device)
    )
    assert run.swap_prob.min() > 1.0 - 1e-12
    if swaps == "even_odd":  # nothing is left to chance
        assert (run.round_trip_rate == 0.5).all()
        return
    rate, error = mean_and_error(run.round_trip_rate)
    exact = 0.5 / (num_rungs - 1)
    ledger(
        f"round trips over {num_rungs} rungs, random, all swaps accepted",
        exact=exact,
        estimate=rate,
        std_error=error,
    )


def count_trips(replica: Tensor) -> Tensor:
    """The definition, replica by replica, from where they are at each iteration, `(chains, n, R)`;
    the start is the first rung for replica 0 alone."""
    trips = torch.zeros(len(replica), dtype=torch.long)
    for chain, history in enumerate(replica.argsort(-1).tolist()):
        for k in range(replica.shape[-1]):
            at_target = False
            at_base = k == 0
            for rungs in history:
                if rungs[k] == 0:
                    trips[chain] += at_target
                    at_base, at_target = True, False
                elif rungs[k] == replica.shape[-1] - 1 and at_base:
                    at_target = True
    return trips


@SWAPS
def test_round_trips_are_counted_as_defined(rng, device, swaps, monkeypatch):
    path, betas, _ = ladder_in_three_dimensions(device)
    run = {"num_draws": 200, "num_chains": 10, "swaps": swaps}
    right = parallel_tempering(path, betas, **run, generator=rng(0, device))
    assert right.round_trips.tolist() == count_trips(right.replica.cpu()).tolist()
    assert right.round_trips.sum() > 50
    assert (right.round_trip_rate == right.round_trips.double() / 200).all()
    plant(monkeypatch, parallel_tempering, "2 * trip[-1].sign()", "2")  # from the middle, too
    wrong = parallel.parallel_tempering(path, betas, **run, generator=rng(0, device))
    assert wrong.round_trips.sum() > right.round_trips.sum()


# ---------------------------------------------------------------- log Z


@SWAPS
def test_stepping_stones_agree_with_the_exact_log_z(rng, device, ledger, swaps):
    path = wide(device=device, rho=0.5)
    run = parallel_tempering(
        path,
        [0.0, 0.1, 0.3, 0.6, 1.0],
        200,
        num_chains=100,
        warmup=50,
        swaps=swaps,
        generator=rng(0, device),
    )
    assert run.log_z is not None and run.log_z.std_error < 0.02
    ledger(
        f"log Z by stepping stones, {swaps}",
        exact=path.log_z(1.0),
        estimate=run.log_z.value,
        std_error=run.log_z.std_error,
    )
    base = path.base_log_z
    assert abs(run.log_z.value - base - path.log_z(1.0)) > Z * run.log_z.std_error  # without it


def test_the_standard_error_of_log_z_is_calibrated(rng, device, monkeypatch):
    # 200 repetitions at once: 40 chains each, of one run with 8,000. Slow kernels, so that draws
    # in succession and, by way of the swaps, neighbouring rungs have much in common.
    path = wide(device=device, rho=0.9)
    seen = []
    monkeypatch.setattr(parallel, "stones", lambda path, log_ratios: seen.append(log_ratios))
    parallel_tempering(
        path, [0.0, 0.1, 0.3, 0.6, 1.0], 40, num_chains=8000, warmup=60, generator=rng(0, device)
    )
    monkeypatch.undo()
    parts = seen[0].split(40, dim=1)
    estimates = [parallel.stones(path, part) for part in parts]
    error = torch.stack([e.value - path.log_z(1.0) for e in estimates])
    z = error / torch.stack([e.std_error for e in estimates])
    low, high = stats.chi2.ppf([0.5e-5, 1.0 - 0.5e-5], 200)
    assert low < z.square().sum() < high
    assert z.mean().abs() < Z / math.sqrt(200)
    # As if the rungs were independent of one another.
    relative = [(part - part.logsumexp(1, keepdim=True) + math.log(40)).expm1() for part in parts]
    wrong = torch.stack([r.var(1).sum().div(40).sqrt() for r in relative])
    assert not low < (error / wrong).square().sum() < high


def model_paths(device) -> dict:
    rbm = RBM(5, 3, dtype=F64, device=device, generator=torch.Generator(device).manual_seed(0))
    with torch.no_grad():
        rbm.W.mul_(100.0)
    ising = Ising(4, 4, coupling=0.5, field=0.1, dtype=F64, device=device)
    return {"RBM": rbm, "Ising": ising}


@pytest.mark.parametrize("name", ["RBM", "Ising"])
def test_stepping_stones_along_the_paths_of_models(rng, device, ledger, name):
    model = model_paths(device)[name]
    betas = torch.linspace(0.0, 1.0, 8, dtype=F64)
    run = parallel_tempering(
        model.annealing_path(), betas, 200, num_chains=50, warmup=50, generator=rng(0, device)
    )
    assert run.log_z is not None and run.log_z.std_error < 0.05
    ledger(
        f"log Z of the {name} by stepping stones",
        exact=model.log_z().value,
        estimate=run.log_z.value,
        std_error=run.log_z.std_error,
    )


def test_one_chain_has_no_standard_error_and_a_ladder_above_the_base_no_log_z(rng, device):
    one = parallel_tempering(wide(device=device), [0.0, 1.0], 5, generator=rng(0, device))
    assert one.log_z is not None
    assert one.log_z.value.isfinite() and one.log_z.std_error.isnan()
    above = parallel_tempering(wide(device=device), [0.1, 1.0], 5, generator=rng(0, device))
    assert above.log_z is None


# ---------------------------------------------------------------- two peaks


def test_six_temperatures_cross_where_a_random_walk_does_not(rng, device, ledger):
    x0 = torch.zeros(300, dtype=F64, device=device)
    # The random walk: fewer than 1 in 1,000 chains get over, by the density between the peaks.
    alone = sample(random_walk(two_peaks, 1.0), x0, 500, generator=rng(0, device)).x
    assert (alone > 5.0).double().mean() < 0.02
    path = over_two_peaks(device)
    run = parallel_tempering(
        path, SIX, 200, num_chains=300, warmup=200, x0=x0, generator=rng(0, device)
    )
    share, error = mean_and_error(run.trace.x > 5.0)
    assert error < 0.02
    ledger(
        "share of N(10, 1), beside as much of N(0, 1)", exact=0.5, estimate=share, std_error=error
    )
    assert run.log_z is not None
    ledger(
        "log Z of two equal peaks",
        exact=math.log(2.0) + 0.5 * math.log(2.0 * math.pi),
        estimate=run.log_z.value,
        std_error=run.log_z.std_error,
    )


def test_unequal_peaks_get_their_shares(rng, device, ledger):
    means = torch.tensor([[0.0], [10.0]], dtype=F64, device=device)
    target = GaussianMixture(
        torch.tensor([0.9, 0.1], dtype=F64, device=device), means, torch.ones_like(means)[..., None]
    )
    base = Gaussian(means.mean(0), torch.tensor([[36.0]], dtype=F64, device=device))
    path = GeometricPath(base, target, lambda density: random_walk(density, 2.0))
    x0 = means[1].expand(300, 1)  # all in the small one
    alone = sample(random_walk(target, 1.0), x0, 500, generator=rng(0, device)).x
    assert (alone > 5.0).double().mean() > 0.98
    run = parallel_tempering(
        path, SIX, 200, num_chains=300, warmup=200, x0=x0, generator=rng(0, device)
    )
    share, error = mean_and_error(run.trace.x > 5.0)
    assert error < 0.02
    ledger("share of the smaller of two peaks", exact=0.1, estimate=share, std_error=error)


# ---------------------------------------------------------------- zero densities and NaN


def test_zero_densities_raise_nothing(rng, device, ledger):
    # A uniform base, and a target that is zero below 0 and reaches beyond the base.
    edge = torch.tensor([-2.0, 2.0], dtype=F64, device=device)

    def log_prob(x: Tensor) -> Tensor:
        return torch.where(x > 0.0, -x, -torch.inf)

    path = GeometricPath(Uniform(*edge), log_prob, lambda density: random_walk(density, 1.0))
    run = parallel_tempering(
        path, [0.0, 0.3, 1.0], 150, num_chains=300, warmup=50, generator=rng(0, device)
    )
    assert (run.trace.x > 0.0).all() and run.trace.log_prob.isfinite().all()
    assert (run.trace.num_nan == 0).all()
    assert run.log_z is not None
    # Where beta < 1 the base's bounds hold: the stones lead to the target on (0, 2) until beta is
    # 0.3, and the last one sees only that part of the target.
    inside = -math.expm1(-2.0)
    ledger(
        "log Z of an exponential law from a uniform one",
        exact=math.log(inside),
        estimate=run.log_z.value,
        std_error=run.log_z.std_error,
    )


@pytest.mark.parametrize("planted", [False, True])
def test_points_of_zero_density_sink_to_the_base(rng, device, monkeypatch, planted):
    if planted:  # minus infinity less minus infinity is NaN, and NaN is rejected
        plant(monkeypatch, swap_step, ".clamp(min=0.25 * torch.finfo(levels.dtype).min)", "")

    class Corner(GeometricPath):  # a target on a sixteenth of the square; nothing moves by itself
        def step(self, x, beta, *, generator=None):
            return x

    zero = torch.zeros(2, dtype=F64, device=device)
    base = Independent(Uniform(zero, zero + 1.0), 1)
    path = Corner(
        base,
        lambda x: torch.where((x > 0.75).all(-1), x.sum(-1), -torch.inf),
        lambda density: random_walk(density, 1.0),
    )
    x0 = torch.full((50, 2), 0.1, dtype=F64, device=device)
    with warnings.catch_warnings():
        if planted:
            warnings.simplefilter("ignore")  # it is told, too, of what it rejects
        run = parallel_tempering(
            path, [0.0, 0.3, 1.0], 1, warmup=400, num_chains=50, x0=x0, generator=rng(0, device)
        )
    assert bool((run.trace.x > 0.75).all()) != planted


def test_nan_is_never_swapped_and_is_counted(rng, device):
    def log_prob(x: Tensor) -> Tensor:
        return torch.where(x < 1.0, -0.5 * x.square(), torch.nan)

    base = Normal(torch.tensor(0.0, dtype=F64, device=device), 2.0)
    path = GeometricPath(base, log_prob, lambda density: random_walk(density, 1.0))
    x0 = torch.zeros(50, dtype=F64, device=device)
    with pytest.warns(UserWarning, match=r"swaps met a NaN log-density .*in 50 of 50 chains"):
        run = parallel_tempering(
            path, [0.0, 0.4, 1.0], 100, num_chains=50, x0=x0, generator=rng(0, device)
        )
    assert (run.trace.x < 1.0).all() and run.trace.log_prob.isfinite().all()
    # 31 of a hundred draws of the base are there.
    total = float(run.trace.num_nan.sum())
    p = float(stats.norm.sf(0.5))
    assert abs(total - 5000 * p) < Z * math.sqrt(5000 * p * (1 - p))
    assert run.log_z is not None and run.log_z.value.isfinite()
    with pytest.raises(ValueError, match="not finite at the start"):  # no replica may start there
        parallel_tempering(path, [0.0, 0.4, 1.0], 1, num_chains=50, generator=rng(0, device))


# ---------------------------------------------------------------- what is kept


@SWAPS
@DTYPES
def test_what_is_kept_fits_together(rng, device, dtype, swaps):
    path = wide(dtype=dtype, device=device, rho=0.5)
    betas = [0.0, 0.3, 0.7, 1.0]
    run = parallel_tempering(
        path, betas, 30, num_chains=7, warmup=3, thin=2, swaps=swaps, generator=rng(0, device)
    )
    trace = run.trace
    assert trace.x.shape == (7, 30, 2) and run.x.shape == (4, 7, 2)
    assert trace.x.dtype == run.x.dtype == trace.log_prob.dtype == dtype
    assert trace.x.device.type == run.replica.device.type == device.type
    torch.testing.assert_close(trace.log_prob, path.log_prob(trace.x, 1.0))
    assert (run.x[-1] == trace.x[:, -1]).all()
    assert run.replica.shape == (7, 30, 4)
    assert (run.replica.sort(-1).values == torch.arange(4, device=device)).all()
    assert (trace.accept_prob == 1.0).all()  # an independent draw always moves
    assert trace.num_nan.shape == trace.num_divergent.shape == (7,)
    assert run.swap_prob.shape == (3,) and run.swap_prob.dtype == F64
    assert run.betas.tolist() == betas


def test_accept_prob_is_the_share_of_iterations_that_moved_the_top(rng, device):
    # Large steps: the point at beta = 1 moves by swaps only, or hardly.
    base = Normal(torch.tensor(0.0, dtype=F64, device=device), 3.0)
    path = GeometricPath(
        base, lambda x: -0.5 * x.square(), lambda density: random_walk(density, 30.0)
    )
    run = parallel_tempering(path, [0.0, 0.2, 1.0], 200, num_chains=5, generator=rng(0, device))
    moved = (run.trace.x.diff(dim=1) != 0).double().sum(1)
    assert (run.trace.accept_prob * 200 - moved).abs().max() <= 1.0  # the first is not in `diff`
    assert 0.2 < float(run.trace.accept_prob.mean()) < 0.7


def test_replicas_follow_the_swaps(rng, device):
    # Kernels that do nothing: each replica keeps its point, wherever it goes.
    class Still(ExactGaussians):
        def step(self, x, beta, *, generator=None):
            return x

    path = Still([0.0], [2.0], [1.0], [1.0], device=device)
    x0 = torch.randn(4, 6, 1, dtype=F64, device=device, generator=rng(0, device))
    run = parallel_tempering(
        path, [0.1, 0.3, 0.6, 1.0], 50, num_chains=6, x0=x0, generator=rng(1, device)
    )
    top = run.replica[..., -1]  # (chains, draws)
    assert (run.trace.x[..., 0] == x0[..., 0].T.gather(1, top)).all()
    assert len(top.unique()) > 1


@SWAPS
def test_one_seed_gives_one_result_however_it_is_cut(rng, device, swaps):
    path, betas = wide(device=device, rho=0.5), [0.0, 0.3, 0.7, 1.0]
    run = {"num_chains": 3, "swaps": swaps}
    whole = parallel_tempering(path, betas, 20, **run, generator=rng(0, device))
    again = parallel_tempering(path, betas, 20, **run, generator=rng(0, device))
    assert (whole.trace.x == again.trace.x).all()
    warm = parallel_tempering(path, betas, 12, **run, warmup=8, generator=rng(0, device))
    assert (warm.trace.x == whole.trace.x[:, 8:]).all()
    thin = parallel_tempering(path, betas, 5, **run, thin=4, generator=rng(0, device))
    assert (thin.trace.x == whole.trace.x[:, 3::4]).all()
    assert (thin.trace.log_prob == whole.trace.log_prob[:, 3::4]).all()
    assert (thin.replica == whole.replica[:, 3::4]).all()
    torch.testing.assert_close(thin.swap_prob, whole.swap_prob)
    assert (thin.round_trips == whole.round_trips).all()
    assert thin.log_z is not None and whole.log_z is not None
    assert thin.log_z.value == whole.log_z.value
    if swaps == "even_odd":
        return
    # With x0 a run goes on; a draw of the base, whose shape is compared, comes between.
    g = rng(0, device)
    first = parallel_tempering(path, betas, 8, **run, generator=g)
    state = g.get_state()
    second = parallel_tempering(path, betas, 12, **run, x0=first.x, generator=g)
    assert (first.trace.x == whole.trace.x[:, :8]).all()
    g.set_state(state)
    again = parallel_tempering(path, betas, 12, **run, x0=first.x, generator=g)
    assert (second.trace.x == again.trace.x).all()


def test_one_start_for_all_replicas_is_each_replica_there(rng, device):
    path, betas = wide(device=device, rho=0.5), [0.0, 0.3, 1.0]
    x0 = torch.randn(4, 2, dtype=F64, device=device, generator=rng(0, device))
    runs = [
        parallel_tempering(path, betas, 5, num_chains=4, x0=x, generator=rng(1, device)).trace.x
        for x in (x0, x0.expand(3, 4, 2))
    ]
    assert (runs[0] == runs[1]).all()


def test_numbers_and_integers_as_points(rng, device):
    def ring(x: Tensor, *, generator=None) -> Tensor:
        up = torch.rand(x.shape, device=x.device, generator=generator) < 0.5
        return (x + torch.where(up, 1, -1)) % 5

    class Any5:
        def log_prob(self, x):
            return torch.zeros(x.shape, dtype=F64, device=x.device)

        def sample(self, n, *, generator=None):
            return torch.randint(5, (n,), device=device, generator=generator)

    path = GeometricPath(Any5(), lambda x: x.double(), lambda p: metropolis_hastings(p, ring))
    run = parallel_tempering(path, [0.0, 0.5, 1.0], 50, num_chains=500, generator=rng(0, device))
    assert run.trace.x.dtype == torch.int64 and run.trace.x.shape == (500, 50)
    assert run.trace.log_prob.dtype == F64
    assert (run.trace.log_prob == run.trace.x.double()).all()
    mean, error = mean_and_error(run.trace.x[:, 20:])
    exact = (torch.arange(5.0, dtype=F64).softmax(0) * torch.arange(5.0)).sum().to(mean)
    assert abs(mean - exact) < Z * error


def test_tensors_follow_the_input(rng):
    path = wide(rho=0.5)
    mixed = exact_path(
        Gaussian(torch.zeros(2), 4.0 * torch.eye(2)), Gaussian(torch.ones(2), torch.eye(2))
    )
    x0 = torch.zeros(3, 2, dtype=F64)
    with torch.device("meta"):
        for swaps in ("even_odd", "random"):
            run = parallel_tempering(
                path,
                [0.0, 0.5, 1.0],
                4,
                num_chains=3,
                warmup=2,
                swaps=swaps,
                x0=x0,
                generator=rng(0),
            )
            for x in (run.trace.x, run.trace.log_prob, run.swap_prob, run.replica, run.x):
                assert x.device.type == "cpu"
        assert run.log_z is not None and run.log_z.value.device.type == "cpu"
        run = parallel_tempering(mixed, [0.0, 0.5, 1.0], 4, num_chains=3, generator=rng(0))
        assert run.trace.x.dtype == torch.float32


def test_the_global_generator_is_left_alone(rng):
    before = torch.get_rng_state()
    for swaps in ("even_odd", "random"):
        parallel_tempering(over_two_peaks(), SIX, 3, num_chains=2, swaps=swaps, generator=rng(0))
    assert (torch.get_rng_state() == before).all()


def test_a_progress_bar_on_request(rng, capsys):
    parallel_tempering(wide(), [0.0, 1.0], 3, warmup=2, generator=rng(0))
    assert capsys.readouterr().err == ""
    parallel_tempering(wide(), [0.0, 1.0], 3, warmup=2, generator=rng(0), progress=True)
    assert "5/5" in capsys.readouterr().err


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"num_draws": 0}, ValueError, "num_draws must be at least 1"),
        ({"num_chains": 0}, ValueError, "num_chains must be at least 1"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0"),
        ({"thin": 1.5}, TypeError, "thin must be an integer"),
        ({"swaps": "all"}, ValueError, "swaps must be one of even_odd, random; got 'all'"),
        ({"betas": [1.0]}, ValueError, "at least two rungs"),
        ({"betas": [0.0, 0.5]}, ValueError, "ascend from 0 or above to 1, got 0 to 0.5"),
        ({"betas": [0.0, 0.5, 0.5, 1.0]}, ValueError, "betas 1 and 2 are"),
        ({"x0": torch.zeros(3, 2, dtype=F64)}, ValueError, r"got \(3, 2\)"),
        ({"x0": torch.zeros(2, dtype=F64)}, ValueError, r"got \(2,\)"),
        ({"x0": torch.full((2, 2), torch.nan, dtype=F64)}, ValueError, "x0 has 4 NaN"),
        ({"x0": torch.zeros(2, 2)}, TypeError, "x0 must be torch.float64 .* got torch.float32"),
        (
            {"generator": 0, "x0": torch.zeros(2, 2, dtype=F64)},
            TypeError,
            "generator must be a torch.Generator",
        ),
    ],
)
def test_bad_input_is_explained(rng, change, error, match):
    right = {"betas": [0.0, 0.5, 1.0], "num_draws": 2, "num_chains": 2, "generator": rng(0)}
    with warnings.catch_warnings(), pytest.raises(error, match=match):
        parallel_tempering(wide(), **{**right, **change})


def half_line(device="cpu") -> GeometricPath:
    """A target above 20 that no walk from the base reaches."""
    zero = torch.zeros((), dtype=F64, device=device)
    return GeometricPath(
        Normal(zero, 1.0),
        lambda x: torch.where(x > 20.0, -x, -torch.inf),
        lambda density: random_walk(density, 0.1),
    )


def test_replicas_that_never_reached_the_target_are_told(rng, device):
    x0 = torch.full((3, 10), 21.0, dtype=F64, device=device)
    x0[1:, :2] = 0.0  # two chains of ten begin outside, at two rungs
    run = {"num_chains": 10, "generator": rng(0, device)}
    with pytest.warns(UserWarning, match="had density zero at their own beta after") as caught:
        found = parallel_tempering(half_line(device), [0.0, 0.5, 1.0], 5, x0=x0, **run)
    assert caught[0].filename == __file__
    assert 10 <= int(str(caught[0].message).split()[0]) <= 2 * 2 * 5
    # No draw of the base has density at the next beta: Z would be zero.
    assert found.log_z.value == -math.inf
    assert found.log_z.std_error == math.inf and not found.log_z.converged
    with pytest.warns(UserWarning, match="density zero"):
        one = parallel_tempering(half_line(device), [0.0, 1.0], 5, generator=rng(0, device))
    assert one.log_z.std_error == math.inf and not one.log_z.converged


def test_points_outside_during_the_warm_up_are_nobody_s_business(rng):
    path = GeometricPath(
        Normal(torch.zeros((), dtype=F64), 1.0),
        lambda x: torch.where(x > 0.0, -x, -torch.inf),
        lambda density: random_walk(density, 1.0),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel_tempering(path, SIX, 5, num_chains=50, warmup=200, generator=rng(0))
        run = {"num_chains": 50, "num_steps": 50, "num_rounds": 3}
        tune_ladder(path, SIX, **run, generator=rng(0))  # its first rounds are a warm-up


@pytest.mark.parametrize("name", ["parallel", "simulated", "tune", "cool", "transitions"])
def test_a_batch_of_machines_is_refused(rng, name):
    path, g = RBM(4, 3, batch_shape=(3,)).annealing_path(), rng(0)
    betas = [0.0, 0.5, 1.0]
    run = {
        "parallel": lambda: parallel_tempering(path, betas, 5, generator=g),
        "simulated": lambda: simulated_tempering(path, betas, 5, warmup=2, generator=g),
        "tune": lambda: tune_ladder(path, betas, generator=g),
        "cool": lambda: simulated_annealing(path, betas, 5, generator=g),
        "transitions": lambda: tempered_transitions(path, betas),
    }[name]
    with pytest.raises(ValueError, match=r"a batch of machines \(3,\): unbind the machines"):
        run()
