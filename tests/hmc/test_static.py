"""HMC leaves its target invariant, and none of a dozen plausible mistakes does."""

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from companion.core import Kernel, sample
from companion.hmc import HmcInfo, hmc, hmc_step, static
from companion.mcmc import mala
from companion.mcmc.base import GradientState, MoveNoise, init_gradient, move_noise
from companion.mcmc.mass import Mass, dot, mass_for
from companion.targets import Banana, Funnel, Gaussian, SkewedProduct
from companion.testing import assert_invariant, invariance_test

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
F64 = {"dtype": torch.float64}


class Tempered:
    """The density to the power beta."""

    def __init__(self, target, beta: float) -> None:
        self.target, self.beta = target, beta

    def __call__(self, x: Tensor) -> Tensor:
        return self.beta * self.target(x)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self.target.value_and_grad(x)
        return self.beta * value, self.beta * grad


def skewed(like: Tensor) -> SkewedProduct:
    matrix = [[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.5, 0.3, 2.0]]
    return SkewedProduct(torch.tensor(matrix).to(like))


def problem(name: str, like: Tensor):
    """The density given to the kernel, its exact sampler, step size, mass."""
    if name == "skewed, diagonal mass":
        return skewed(like), skewed(like), 0.57, torch.tensor([1.5, 4.0, 0.3]).to(like)
    if name == "banana, dense mass, a step size for each chain":
        target = Banana(torch.tensor([1.5, 0.8]).to(like), bend=0.4)
        step = torch.linspace(0.3, 0.8, CHAINS).to(like)
        return target, target, step, torch.tensor([[1.2, 0.5], [0.5, 1.0]]).to(like)
    if name == "Gaussian of unequal scales, dense mass":
        covariance = torch.tensor([[4.0, 1.0, 0.2], [1.0, 0.5, 0.1], [0.2, 0.1, 0.09]]).to(like)
        target = Gaussian(torch.tensor([1.0, -2.0, 0.5]).to(like), covariance)
        mass = torch.tensor([[0.6, -0.8, 0.0], [-0.8, 4.0, -2.0], [0.0, -2.0, 16.0]]).to(like)
        return target, target, 1.1, mass
    assert name == "banana at beta = 1/2, unit mass"
    scale, bend = torch.tensor([1.0, 0.7]).to(like), 0.6
    return Tempered(Banana(scale, bend), 0.5), Banana(scale * math.sqrt(2.0), bend), 0.6, None


PROBLEMS = [
    "skewed, diagonal mass",
    "banana, dense mass, a step size for each chain",
    "Gaussian of unequal scales, dense mass",
    "banana at beta = 1/2, unit mass",
]
CHAINS = 20_000


def check(kernel, sampler, generator, num_steps=4):
    return invariance_test(
        kernel, sampler, num_chains=CHAINS, num_steps=num_steps, generator=generator
    )


def acceptance(kernel: Kernel, sampler, generator: torch.Generator) -> Tensor:
    state = kernel.init(sampler.sample(CHAINS, generator=generator))
    return kernel.step(state, generator=generator)[1].accept_prob.mean()


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hmc_leaves_the_target_invariant(rng, device, name, dtype):
    like = torch.empty((), device=device, dtype=dtype)
    log_prob, sampler, step_size, mass = problem(name, like)
    kernel = hmc(log_prob, step_size, 4, mass)
    assert_invariant(check(kernel, sampler, rng(0, device)))
    # The steps are long enough that accepting and rejecting matters.
    assert 0.7 < acceptance(kernel, sampler, rng(1, device)) < 0.92


# ---------------------------------------------------------------- mistakes seen elsewhere


def standard_deviation_mass(mass: Mass, normal: Tensor) -> Tensor:
    return normal * mass.factor.square()


def energy_without_mass(mass: Mass, p: Tensor, like: Tensor) -> Tensor:
    return 0.5 * dot(p, p, like)


def energy_with_mass_not_its_inverse(mass: Mass, p: Tensor, like: Tensor) -> Tensor:
    return 0.5 * dot(p, p * mass.factor.square(), like)


def wrong_sign(log_ratio: Tensor, uniform: Tensor):
    return RIGHT["metropolis_accept"](-log_ratio, uniform)


def always(log_ratio: Tensor, uniform: Tensor):
    return RIGHT["metropolis_accept"](log_ratio.abs(), uniform)


def whole_last_kick(log_prob, x, p, grad, step_size, num_steps, mass):
    end = RIGHT["leapfrog"](log_prob, x, p, grad, step_size, num_steps, mass)
    return end._replace(p=end.p + 0.5 * step_size * end.grad)


def uphill_is_downhill(log_prob, x, p, grad, step_size, num_steps, mass):
    return RIGHT["leapfrog"](log_prob, x, p, -grad, step_size, num_steps, mass)


def log_prob_of_the_rejected(accepted, new, old):
    return RIGHT["select"](accepted, new, old)._replace(log_prob=new.log_prob)


def gradient_of_the_rejected(accepted, new, old):
    return RIGHT["select"](accepted, new, old)._replace(grad=new.grad)


RIGHT = {name: getattr(static, name) for name in ("metropolis_accept", "leapfrog", "select")}
MISTAKES = {
    "momentum of standard deviation M": ("momentum", standard_deviation_mass),
    "kinetic energy without M": ("kinetic_energy", energy_without_mass),
    "kinetic energy with M for its inverse": ("kinetic_energy", energy_with_mass_not_its_inverse),
    "sign of the acceptance": ("metropolis_accept", wrong_sign),
    "always accepted": ("metropolis_accept", always),
    "a whole last kick": ("leapfrog", whole_last_kick),
    "sign of the first gradient": ("leapfrog", uphill_is_downhill),
    "log-density of the rejected point kept": ("select", log_prob_of_the_rejected),
    "gradient of the rejected point kept": ("select", gradient_of_the_rejected),
}


def rejecting() -> tuple[Kernel, SkewedProduct]:
    """A kernel that rejects a fifth: what is wrong with rejections shows after some of them."""
    log_prob, sampler, step_size, mass = problem(PROBLEMS[0], torch.empty((), **F64))
    return hmc(log_prob, 1.2 * step_size, 2, mass), sampler


def test_hmc_that_rejects_often_leaves_the_target_invariant(rng):
    kernel, sampler = rejecting()
    assert_invariant(check(kernel, sampler, rng(0), num_steps=16))


@pytest.mark.parametrize(("place", "mistake"), MISTAKES.values(), ids=MISTAKES.keys())
def test_invariance_rejects_each_mistake(rng, monkeypatch, place, mistake):
    kernel, sampler = rejecting()
    monkeypatch.setattr(static, place, mistake)
    assert check(kernel, sampler, rng(0), num_steps=16).p_value < 1e-9


def test_invariance_rejects_a_tempered_momentum(rng, monkeypatch):
    log_prob, sampler, step_size, mass = problem(PROBLEMS[3], torch.empty((), **F64))

    def tempered(mass, p, like):
        return 0.5 * 0.5 * dot(p, p, like)

    monkeypatch.setattr(static, "kinetic_energy", tempered)
    assert check(hmc(log_prob, step_size, 4, mass), sampler, rng(0)).p_value < 1e-9


@pytest.mark.parametrize("where", ["the first state", "the last proposal"])
def test_invariance_rejects_a_rejection_that_goes_elsewhere(rng, monkeypatch, where):
    # A rejected chain stays where it is. One wrong kernel sends it back to where it began; another
    # reports where it is, but starts the next trajectory from the point that was rejected.
    proposals = []

    def remember(accepted, new, old):
        proposals.append(new)
        return RIGHT["select"](accepted, new, old)

    monkeypatch.setattr(static, "select", remember)
    right, sampler = rejecting()
    away = {}

    def init(x: Tensor) -> GradientState:
        away["start"] = right.init(x)
        return away["start"]

    def step(state: GradientState, *, generator: torch.Generator):
        if where == "the first state":
            new, info = right.step(state, generator=generator)
            return RIGHT["select"](info.accepted, new, away["start"]), info
        _, info = right.step(away["start"], generator=generator)
        away["start"] = proposals[-1]
        return RIGHT["select"](info.accepted, proposals[-1], state), info

    assert check(Kernel(init, step), sampler, rng(0), num_steps=16).p_value < 1e-9


def test_invariance_cannot_see_a_wrong_velocity(rng, monkeypatch):
    # Dynamics of a wrong Hamiltonian still preserve volume and can be reversed, and the acceptance
    # makes up for them. What is lost is the acceptance rate.
    log_prob, sampler, step_size, mass = problem(PROBLEMS[0], torch.empty((), **F64))
    monkeypatch.setattr(
        "companion.hmc.integrator.velocity", lambda mass, p: p * mass.factor.square()
    )
    kernel = hmc(log_prob, step_size, 4, mass)
    assert_invariant(check(kernel, sampler, rng(0)))
    assert acceptance(kernel, sampler, rng(1)) < 0.5


# ---------------------------------------------------------------- equivalences


MASSES = [None, torch.tensor([1.5, 4.0, 0.3], **F64), torch.eye(3, **F64) + 0.4]


@pytest.mark.parametrize("mass", MASSES, ids=["identity", "diagonal", "dense"])
@pytest.mark.parametrize("step_size", [0.5, torch.linspace(0.1, 0.6, 50, **F64)])
def test_hmc_with_one_step_is_mala(rng, mass, step_size):
    target = skewed(torch.empty((), **F64))
    x = target.sample(50, generator=rng(0))
    a = sample(hmc(target, step_size, 1, mass), x, 50, generator=rng(1))
    b = sample(mala(target, step_size, mass), x, 50, generator=rng(1))
    torch.testing.assert_close(a.x, b.x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.accept_prob, b.accept_prob, rtol=1e-10, atol=1e-10)
    assert 0.3 < a.accept_prob.mean() < 0.995
    two = sample(hmc(target, step_size, 2, mass), x, 50, generator=rng(1))
    assert (two.x - b.x).abs().max() > 0.1


def test_chains_of_a_batch_are_the_chains_alone(rng):
    target, mass = skewed(torch.empty((), **F64)), torch.tensor([1.5, 4.0, 0.3], **F64)
    x = target.sample(6, generator=rng(0)).reshape(2, 3, 3)
    steps = torch.linspace(0.2, 0.6, 3, **F64)  # broadcasts over the leading dimension
    kernel = hmc(target, steps, 5, mass)
    state = kernel.init(x)
    noise = move_noise(state, rng(1))
    new, info = hmc_step(target, steps, 5, mass_for(mass)(state), state, noise)
    assert new.x.shape == (2, 3, 3) and info.energy.shape == (2, 3)
    for i, j in ((0, 0), (0, 2), (1, 1)):
        one = init_gradient(target, x[i, j])
        alone, _ = hmc_step(
            target,
            float(steps[j]),
            5,
            mass_for(mass)(one),
            one,
            MoveNoise(noise.normal[i, j], noise.uniform[i, j]),
        )
        torch.testing.assert_close(alone.x, new.x[i, j])


def test_hmc_runs_without_event_dimensions_and_with_two(rng):
    scalar = hmc(lambda x: -0.5 * x.square(), 1.0, 3)
    assert sample(scalar, torch.zeros(7), 5, generator=rng(0)).x.shape == (7, 5)
    matrix = hmc(lambda x: -0.5 * x.square().sum((-2, -1)), 0.3, 3, torch.full((3, 2), 2.0))
    assert sample(matrix, torch.zeros(4, 3, 2), 5, generator=rng(0)).x.shape == (4, 5, 3, 2)
    assert sample(matrix, torch.zeros(3, 2), 5, generator=rng(0)).x.shape == (5, 3, 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("gradient", ["its own", "by autograd"])
def test_compiled_and_eager_steps_agree(rng, gradient):
    target = skewed(torch.empty((), **F64))
    log_prob = target if gradient == "its own" else target.log_prob
    x = target.sample(20, generator=rng(0))
    mass = torch.tensor([1.5, 4.0, 0.3], **F64)
    traces = [
        sample(hmc(log_prob, 0.4, 3, mass, compile=compile), x, 18, generator=rng(1))
        for compile in (False, True)  # sixteen steps in one call, and two
    ]
    torch.testing.assert_close(traces[0].x, traces[1].x)


# ---------------------------------------------------------------- exact answers


def exact_acceptance(e: float, num_steps: int, d: int) -> float:
    """Mean acceptance of HMC on `N(0, I_d)`.

    The leapfrog map of a coordinate and its momentum is a matrix S of determinant 1. With s > 1 the
    larger eigenvalue of `S^T S`, the energy error is `D = ((s - 1) A - (1 - 1/s) B) / 2` for
    chi-squared A and B of d degrees of freedom; and `E[min(1, exp(-D))] = 2 P(D < 0)`, as the law
    of D is that of -D weighted by `exp(-D)`.
    """
    step = torch.tensor([[1 - e * e / 2, e], [-e + e**3 / 4, 1 - e * e / 2]], **F64)
    flow = torch.linalg.matrix_power(step, num_steps)
    s = float(torch.linalg.eigvalsh(flow.T @ flow)[-1])
    return float(2.0 * scipy.stats.f.cdf(1 / s, d, d))


@pytest.mark.parametrize(("e", "num_steps", "d"), [(1.5, 2, 1), (0.8, 3, 10), (0.5, 2, 100)])
def test_acceptance_on_the_standard_normal_law_is_exact(rng, ledger, e, num_steps, d):
    target = Gaussian(torch.zeros(d, **F64), torch.eye(d, **F64))
    n = 40_000
    kernel = hmc(target, e, num_steps)
    rate = kernel.step(kernel.init(target.sample(n, generator=rng(0))), generator=rng(1))[1]
    ledger(
        f"acceptance of HMC, {num_steps} steps of {e} on N(0, I), d = {d}",
        exact=exact_acceptance(e, num_steps, d),
        estimate=rate.accept_prob.mean(),
        std_error=rate.accept_prob.std() / math.sqrt(n),
    )
    accepted = rate.accepted.double()
    assert abs(accepted.mean() - rate.accept_prob.mean()) < Z * accepted.std() / math.sqrt(n)
    # One step more or less would be noticed.
    off = exact_acceptance(e, num_steps + 1, d) - float(rate.accept_prob.mean())
    assert abs(off) > Z * float(rate.accept_prob.std()) / math.sqrt(n)


def test_moments_of_the_gaussian_of_correlation_95(rng, ledger):
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]], **F64)
    target = Gaussian(torch.zeros(2, **F64), covariance)
    # Chains are independent: the error of a mean is that of the means of the chains.
    x = target.sample(1000, generator=rng(0))
    trace = sample(hmc(target, 0.2, 10), x, 100, generator=rng(1))
    a, b = trace.x.unbind(-1)
    for what, exact, values in (
        ("mean", 0.0, a),
        ("variance", 1.0, a.square()),
        ("covariance", 0.95, a * b),
    ):
        means = values.mean(1)
        ledger(
            f"{what}, Gaussian of correlation .95, by HMC",
            exact=exact,
            estimate=means.mean(),
            std_error=means.std() / math.sqrt(len(means)),
        )
    # The kinetic energy of the point kept has mean d / 2: so the energy less the potential.
    kinetic = (trace.stats["energy"] + trace.log_prob).mean(1)
    ledger(
        "mean kinetic energy at the end of a step of HMC, d = 2",
        exact=1.0,
        estimate=kinetic.mean(),
        std_error=kinetic.std() / math.sqrt(len(kinetic)),
    )


def test_energy_is_that_of_the_point_kept(rng):
    target = skewed(torch.empty((), **F64))
    kernel, x = hmc(target, 0.6, 3), target.sample(1000, generator=rng(0))
    state = kernel.init(x)
    noise = move_noise(state, rng(1))
    _, info = hmc_step(target, 0.6, 3, mass_for(None)(state), state, noise)
    before = 0.5 * noise.normal.square().sum(-1) - state.log_prob
    end = static.leapfrog(target, x, noise.normal, state.grad, 0.6, 3)
    after = 0.5 * end.p.square().sum(-1) - end.log_prob
    assert 0.2 < info.accepted.double().mean() < 0.8
    torch.testing.assert_close(info.energy, torch.where(info.accepted, after, before))


# ---------------------------------------------------------------- where things go wrong


def test_a_trajectory_into_nan_is_rejected_and_counted(rng):
    def log_prob(x: Tensor) -> Tensor:  # the square root is NaN below 0
        return -x.sqrt().pow(2).sum(-1)

    x = torch.rand(500, 2, generator=rng(0), **F64) + 0.1
    with pytest.warns(UserWarning, match="NaN log-density .* were rejected"):
        trace = sample(hmc(log_prob, 0.5, 3), x, 20, generator=rng(1))
    assert (trace.x > 0).all() and (trace.num_nan > 0).any()
    assert (trace.num_divergent >= trace.num_nan).all()
    assert (trace.accept_prob < 1).any() and trace.accept_prob.isfinite().all()


def test_a_trajectory_to_infinite_density_is_rejected_and_counted(rng):
    def log_prob(x: Tensor) -> Tensor:
        return torch.where((x - 1.5).abs() < 0.5, torch.inf, -0.5 * x.square())

    with pytest.warns(UserWarning, match="NaN log-density .* were rejected"):
        trace = sample(hmc(log_prob, 0.5, 3), torch.zeros(200, **F64), 50, generator=rng(0))
    assert trace.log_prob.isfinite().all() and trace.num_nan.sum() > 200
    assert (trace.num_divergent >= trace.num_nan).all() and trace.accept_prob.min() > 0.1


def test_a_trajectory_into_density_zero_is_rejected(rng):
    class HalfNormal:
        def __call__(self, x: Tensor) -> Tensor:
            return torch.where((x > 0).all(-1), -0.5 * x.square().sum(-1), -torch.inf)

        def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self(x), -x

        def sample(self, n: int, *, generator) -> Tensor:
            return torch.randn(n, 2, generator=generator, **F64).abs()

        log_prob = __call__

    target = HalfNormal()
    assert_invariant(check(hmc(target, 0.5, 3), target, rng(0)))
    trace = sample(hmc(target, 0.5, 3), target.sample(500, generator=rng(1)), 20, generator=rng(2))
    assert (trace.x > 0).all() and not trace.num_nan.any() and trace.num_divergent.sum() > 100


def test_divergences_of_the_funnel_are_counted(rng):
    funnel = Funnel(torch.tensor(3.0, **F64), num_leaves=9)
    x = funnel.sample(500, generator=rng(0))
    trace = sample(hmc(funnel, 0.3, 10), x, 20, generator=rng(1))
    assert trace.num_divergent.sum() > 100
    assert (trace.stats["is_divergent"].sum(1) == trace.num_divergent).all()
    # They happen in the neck, where the leaves are narrow.
    necks = x[:, 0] < -3
    assert trace.num_divergent[necks].double().mean() > 5 * trace.num_divergent[~necks].sum() / 500
    easy = Gaussian(torch.zeros(2, **F64), torch.eye(2, **F64))
    assert not sample(hmc(easy, 0.3, 10), x[:, :2], 20, generator=rng(1)).num_divergent.any()


def test_a_bad_start_is_named_by_chain():
    kernel = hmc(lambda x: x.log().sum(-1), 0.1, 3)
    with pytest.raises(ValueError, match="1 of 3 chains: nan at chain 1"):
        kernel.init(torch.tensor([[1.0], [-1.0], [2.0]]))
    with pytest.raises(TypeError, match="must be floating"):
        kernel.init(torch.ones(3, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step_size": 0.0}, ValueError, "step_size must be a finite number above 0"),
        ({"step_size": torch.tensor([0.1, -0.1])}, ValueError, "step_size must be positive"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"num_steps": 2.0}, TypeError, "num_steps must be an integer"),
        ({"mass": 2.0}, TypeError, "mass must be a torch.Tensor or None"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        hmc(lambda x: -x.square().sum(-1), **{"step_size": 0.1, "num_steps": 3} | arguments)


def test_what_does_not_fit_the_points_is_refused_by_init():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="mass must have the shape of a point"):
        hmc(lambda x: -x.square().sum(-1), 0.1, 3, torch.ones(3)).init(x)
    with pytest.raises(ValueError, match="does not broadcast to the chains"):
        hmc(lambda x: -x.square().sum(-1), torch.ones(3), 3).init(x)


def test_a_step_costs_its_number_of_leapfrog_steps_in_gradients(rng):
    calls = []

    def log_prob(x: Tensor) -> Tensor:
        calls.append(x)
        return -0.5 * x.square().sum(-1)

    kernel = hmc(log_prob, 0.1, 7)
    state = kernel.init(torch.zeros(3, 2))
    kernel.step(state, generator=rng(0))
    assert len(calls) == 1 + 7


def test_hmc_follows_its_inputs_device_and_needs_no_global_generator(rng):
    target = skewed(torch.empty((), **F64))
    x, mass = target.sample(5, generator=rng(0)), torch.eye(3, **F64) + 0.4
    before = torch.get_rng_state()
    torch.set_default_device("meta")
    try:
        trace = sample(hmc(target, 0.3, 3, mass), x, 4, generator=rng(1))
    finally:
        torch.set_default_device(None)
    assert trace.x.device.type == "cpu" and trace.x.dtype == torch.float64
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(hmc(target, 0.3, 3).step(hmc(target, 0.3, 3).init(x))[1], HmcInfo)
