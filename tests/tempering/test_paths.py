"""Geometric paths: what they are at each beta, at the ends, and where a density is zero."""

import math

import pytest
import torch
from torch.distributions import Exponential, Independent, Normal, Uniform

from companion.annealing import smc
from companion.core import AnnealingPath, Kernel, LogZ
from companion.hmc import hmc
from companion.mcmc import (
    GibbsState,
    cycle,
    gibbs,
    mala,
    metropolis_hastings,
    random_walk,
    slice_sampler,
)
from companion.targets import Gaussian, GaussianMixture
from companion.tempering import (
    GeometricPath,
    advance,
    likelihood_path,
    parallel_tempering,
    profile,
    reverse_step,
    simulated_annealing,
    simulated_tempering,
    tempered_transitions,
    tune_ladder,
)
from companion.testing import (
    assert_invariant,
    binary_states,
    detailed_balance_error,
    invariance_test,
    reversal,
    stationary_error,
    transition_matrix,
)

F64 = torch.float64
BASE_MEAN, TARGET_MEAN = [0.5, -1.0], [1.0, 2.0]
BASE_COV, TARGET_COV = [[4.0, 1.0], [1.0, 3.0]], [[1.0, -0.4], [-0.4, 0.5]]


def gaussian(mean, covariance, device="cpu", dtype=F64):
    kwargs = {"dtype": dtype, "device": device}
    return Gaussian(torch.tensor(mean, **kwargs), torch.tensor(covariance, **kwargs))


def gaussian_path(kernel, device="cpu", dtype=F64, **kwargs):
    base = gaussian(BASE_MEAN, BASE_COV, device, dtype)
    return GeometricPath(base, gaussian(TARGET_MEAN, TARGET_COV, device, dtype), kernel, **kwargs)


def between(beta, device="cpu", dtype=F64):
    """The normal law at beta: precisions and precision-weighted means are mixed."""
    p0, p1 = (torch.tensor(c, dtype=F64).inverse() for c in (BASE_COV, TARGET_COV))
    m0, m1 = (torch.tensor(m, dtype=F64) for m in (BASE_MEAN, TARGET_MEAN))
    covariance = ((1 - beta) * p0 + beta * p1).inverse()
    mean = covariance @ ((1 - beta) * p0 @ m0 + beta * p1 @ m1)
    return gaussian(mean.tolist(), covariance.tolist(), device, dtype)


def walk(log_prob):
    return random_walk(log_prob, 1.0)


KERNELS = {
    "random walk": walk,
    "random walk, step by beta": lambda log_prob, beta: random_walk(log_prob, 2.0 - beta),
    "mala": lambda log_prob: mala(log_prob, 0.5),
    "hmc": lambda log_prob: hmc(log_prob, 0.4, 3, mass=torch.tensor([0.5, 2.0], dtype=F64)),
    "slice": lambda log_prob: slice_sampler(log_prob, 2.0),
}


def as_kernel(step, beta):
    def move(state, *, generator=None):
        return GibbsState(step(state.x, beta, generator=generator)), None

    return Kernel(GibbsState, move)


# ---------------------------------------------------------------- densities


def test_the_density_at_beta_is_the_geometric_mean(rng, device):
    path = gaussian_path(walk, device)
    assert isinstance(path, AnnealingPath)
    x = path.sample_base(50, generator=rng(0, device))
    for beta in (0.0, 0.3, 0.8, 1.0):
        mean = (1 - beta) * path.base.log_prob(x) + beta * path.target(x)
        torch.testing.assert_close(path.log_prob(x, beta), mean)
        torch.testing.assert_close(profile(path, x)(beta), mean)
        gap = mean - between(beta, device).log_prob(x)
        assert (gap - gap[0]).abs().max() < 1e-10  # the normal law between, up to a constant


def test_base_log_z_is_known(device, ledger):
    path = gaussian_path(walk, device)
    exact = math.log(2 * math.pi) + 0.5 * math.log(11.0)
    ledger("log Z of a Gaussian base", exact=exact, estimate=path.base_log_z)
    normal = Independent(Normal(torch.zeros(2, device=device), 1.0), 1)
    assert GeometricPath(normal, lambda x: -x.square().sum(-1), walk).base_log_z == 0.0

    law = gaussian(BASE_MEAN, BASE_COV)

    class Base:
        log_prob, sample = law.log_prob, law.sample

        def log_z(self):
            return LogZ(3.0, 0.0)

    assert GeometricPath(Base(), gaussian(TARGET_MEAN, TARGET_COV), walk).base_log_z == 3.0


def test_a_tensor_of_betas_evaluates_both_densities_once(rng, device):
    calls = []
    target = gaussian(TARGET_MEAN, TARGET_COV, device)

    def log_prob(x):
        calls.append(len(x))
        return target(x)

    path = GeometricPath(gaussian(BASE_MEAN, BASE_COV, device), log_prob, walk)
    x = path.sample_base(7, generator=rng(1, device))
    calls.clear()
    betas = torch.tensor([0.0, 0.2, 0.9, 1.0], dtype=F64, device=device)[:, None]
    for found in (path.log_prob(x, betas), profile(path, x)(betas)):
        assert found.shape == (4, 7)
        for i in range(4):
            assert torch.equal(found[i], path.log_prob(x, float(betas[i])))
    assert calls[:2] == [7, 7]


def test_ends_are_exact_where_the_other_density_is_zero(device):
    box = Uniform(torch.zeros((), device=device), 1.0)
    path = GeometricPath(box, lambda x: x.log(), walk)  # log of a negative number is NaN
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0], device=device)
    assert path.log_prob(x, 0.0).tolist() == [-math.inf, 0.0, 0.0, -math.inf]
    at_one = path.log_prob(x, 1.0)
    assert at_one[0].isnan() and at_one[1] == -math.inf
    assert float(at_one[3]) == pytest.approx(math.log(2))
    betas = torch.tensor([[0.0], [0.5], [1.0]], device=device)
    found = path.log_prob(x, betas)
    assert torch.equal(found[0], path.log_prob(x, 0.0))
    assert torch.equal(found[2, 1:], at_one[1:])
    assert found[1, 1] == found[1, 3] == -math.inf


def test_the_derivative_in_beta_is_right_at_the_ends_as_well(device):
    base, target = (
        lambda x: -0.5 * x.square().sum(-1),
        lambda x: torch.where(x.sum(-1) > 0, x.prod(-1), -math.inf),
    )
    like = {"dtype": F64, "device": device}
    law = Gaussian(torch.zeros(2, **like), torch.eye(2, **like))
    path = GeometricPath(law, target, lambda density: random_walk(density, 1.0))
    x = torch.tensor([[2.0, 0.5], [0.5, 1.0], [-3.0, 1.0]], **like)
    for beta in (0.0, 0.3, 1.0):
        b = torch.full((3,), beta, **like).requires_grad_()
        value = profile(path, x)(b)
        (slope,) = torch.autograd.grad(value.sum(), b)
        torch.testing.assert_close(slope[:2], (target(x) - base(x))[:2])
        assert not slope[2].isfinite()  # infinite, and never a number
        assert (value[:2] == (1.0 - beta) * base(x)[:2] + beta * target(x)[:2]).all()


def test_float32_points_have_float64_profiles(rng, device):
    path = gaussian_path(walk, device, torch.float32)
    x = path.sample_base(5, generator=rng(2, device))
    beta = torch.tensor([0.25], dtype=F64, device=device)
    assert profile(path, x)(beta).dtype == profile(path, x)(0.25).dtype == F64
    assert path.log_prob(x, beta).dtype == torch.float32
    assert path.step(x, beta, generator=rng(3, device)).dtype == torch.float32


def test_paths_without_a_profile_do_without(rng):
    class Plain:
        base_log_z = 0.0
        sample_base = staticmethod(lambda n, *, generator=None: torch.zeros(n))
        log_prob = staticmethod(lambda x, beta: -beta * x.square())
        step = staticmethod(lambda x, beta, *, generator=None: x + beta)

    x = torch.ones(3)
    assert profile(Plain(), x)(0.5).tolist() == [-0.5] * 3
    assert profile(Plain(), x)(0.5).dtype == F64
    assert reverse_step(Plain(), x, 0.5).tolist() == [1.5] * 3
    moved, increment = advance(Plain(), x, 0.25, 0.5)
    assert moved.tolist() == [1.5] * 3 and increment.tolist() == [-0.25] * 3


def test_a_point_of_weight_zero_keeps_it(rng):
    path = GeometricPath(Uniform(0.0, 1.0), lambda x: -x, walk)
    x = torch.tensor([0.5, 3.0])
    _, increment = advance(path, x, 0.5, 0.75, generator=rng(4))
    assert increment[0] == pytest.approx(-0.125) and increment[1] == -math.inf
    _, increment = advance(path, x, 0.5, 1.0, generator=rng(4))  # to where its density is positive
    assert increment[1] == -math.inf


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("beta", [0.0, 0.35, 1.0])
def test_steps_leave_every_density_of_the_path_invariant(rng, device, name, beta):
    def make(log_prob, beta):  # the constructor with the mass on its device
        with torch.device(device):
            return KERNELS[name](log_prob, beta) if "by beta" in name else KERNELS[name](log_prob)

    path = gaussian_path(make, device, num_steps=2)
    settings = {"num_chains": 4000, "num_steps": 3}
    target = between(beta, device)
    right = as_kernel(path.step, beta)
    assert_invariant(invariance_test(right, target, generator=rng(5, device), **settings))
    wrong = as_kernel(path.step, beta + 0.35 if beta < 0.5 else 0.5)
    assert invariance_test(wrong, target, generator=rng(5, device), **settings).p_value < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_replica_moves_at_its_own_beta(rng, device, dtype):
    path = gaussian_path(lambda log_prob: hmc(log_prob, 0.4, 3), device, dtype)
    betas = torch.tensor([0.0, 0.35, 1.0], dtype=dtype, device=device)
    g = rng(6, device)
    n = 20_000
    x = torch.stack([between(float(b), device, dtype).sample(n, generator=g) for b in betas])
    for _ in range(5):
        x = path.step(x, betas[:, None], generator=g)
    for i, beta in enumerate((0.0, 0.35, 1.0)):
        exact = between(beta, device)
        se = (exact.covariance.diagonal() / n).sqrt()
        assert ((x[i].double().mean(0) - exact.mean) / se).abs().max() < 4.75  # six comparisons
        cov = x[i].double().T.cov()
        d = exact.covariance.diagonal()
        spread = ((d[:, None] * d + exact.covariance.square()) / n).sqrt()
        assert ((cov - exact.covariance) / spread).abs().max() < 4.9
    gap = (between(0.0, device).mean - between(0.35, device).mean).abs().max()
    assert gap > 0.1  # replicas at a neighbour's beta would be seen


@pytest.mark.parametrize("name", KERNELS)
def test_chains_that_start_where_the_density_is_zero_raise_nothing(rng, name):
    base = Independent(Uniform(-torch.ones(1, dtype=F64), 1.0, validate_args=False), 1)

    def log_prob(x):
        inside = (x > 0).all(-1)
        return torch.where(inside, -x.square().sum(-1), -torch.inf)

    def make(density):
        if name == "hmc":
            return hmc(density, 0.4, 3)
        if name == "slice":
            return slice_sampler(density, 2.0, max_widths=10)
        return KERNELS[name](density, 1.0) if "by beta" in name else KERNELS[name](density)

    path = GeometricPath(base, log_prob, make, num_steps=400 if "walk" in name else 40)
    x = torch.tensor([[-0.5], [0.5], [1.3]], dtype=F64)
    moved = path.step(x, 0.5, generator=rng(7))
    assert moved.isfinite().all()
    assert path.log_prob(moved, 0.5)[1] > -math.inf  # none leads from inside to outside
    if "walk" in name:  # others may be carried too far away to come back in time
        assert (path.log_prob(moved, 0.5) > -math.inf).all()


def flips(log_prob):
    """A kernel for each of three bits, which proposes to flip it in two of three steps."""

    def flip(i):
        def propose(x, *, generator=None):
            turn = torch.rand(x.shape[:-1], generator=generator) < 2.0 / 3.0
            x = x.clone()
            x[..., i] = torch.where(turn, 1.0 - x[..., i], x[..., i])
            return x

        return metropolis_hastings(log_prob, propose)

    return flip(0), flip(1), flip(2)


class Bits:
    """Independent bits, as a base."""

    probs = torch.tensor([0.3, 0.6, 0.5], dtype=F64)

    def sample(self, n, *, generator=None):
        return (torch.rand(n, 3, generator=generator) < self.probs).double()

    def log_prob(self, x):
        return (x * self.probs.logit() + (-self.probs).log1p()).sum(-1)


def test_a_sweep_and_its_reverse_kernel_are_reversals(rng):
    def log_prob(x):
        return 1.5 * x[..., 0] * x[..., 1] - 2.0 * x[..., 1] * x[..., 2] + 0.3 * x[..., 2]

    path = GeometricPath(
        Bits(),
        log_prob,
        lambda density: cycle(*flips(density)),
        reverse_kernel=lambda density: cycle(*reversed(flips(density))),
    )
    states = binary_states(3, dtype=F64)
    for beta in (0.0, 0.4, 1.0):
        pi = path.log_prob(states, beta).softmax(0)
        there = transition_matrix(as_kernel(path.step, beta), states)
        back = transition_matrix(as_kernel(path.reverse_step, beta), states)
        assert stationary_error(there, pi) < 1e-12
        if beta > 0:  # at 0 the bits are independent, and their moves commute
            assert detailed_balance_error(there, pi) > 1e-3
        torch.testing.assert_close(back, reversal(there, pi), rtol=0, atol=1e-12)


def test_gibbs_kernels_need_no_density(rng):
    def make(log_prob, beta):
        def redraw(x, *, generator=None):
            scale = (2.0 - beta).sqrt()[..., None]
            return scale * torch.randn(x.shape, dtype=x.dtype, generator=generator)

        return gibbs([redraw])

    base = Independent(Normal(torch.zeros(1, dtype=F64), 1.0), 1)
    path = GeometricPath(base, lambda x: -x.square().sum(-1), make)
    x = torch.zeros(3, 4, 1, dtype=F64)
    assert (
        path.step(x, torch.tensor([[0.0], [0.5], [1.0]], dtype=F64), generator=rng(8)).shape
        == x.shape
    )


# ---------------------------------------------------------------- from the prior to the posterior


def test_likelihood_path_tempers_the_likelihood_alone(rng):
    prior = Exponential(torch.tensor(2.0, dtype=F64))
    path = likelihood_path(prior, lambda x: -0.5 * (x - 1.0).square(), walk)
    x = torch.tensor([0.5, 1.0, -1.0], dtype=F64)
    found = path.log_prob(x, 0.25)
    exact = math.log(2.0) - 2.0 * x - 0.125 * (x - 1.0).square()
    torch.testing.assert_close(found[:2], exact[:2])
    assert found[2] == -math.inf  # outside of the prior's support
    assert path.base_log_z == 0.0


# ---------------------------------------------------------------- bad input


def test_what_makes_no_path_is_refused():
    normal = Independent(Normal(torch.zeros(2), 1.0), 1)

    def log_prob(x):
        return -x.square().sum(-1)

    with pytest.raises(TypeError, match="base must be"):
        GeometricPath(torch.zeros(2), log_prob, walk)
    with pytest.raises(TypeError, match="log_prob must be a function"):
        GeometricPath(normal, torch.zeros(2), walk)
    with pytest.raises(TypeError, match="kernel must be a function"):
        GeometricPath(normal, log_prob, walk(log_prob))
    with pytest.raises(TypeError, match=r"got a function of \(log_prob, step_size\)"):
        GeometricPath(normal, log_prob, random_walk)
    with pytest.raises(ValueError, match=r"batch shape \(2,\)"):
        GeometricPath(Normal(torch.zeros(2), 1.0), log_prob, walk)
    with pytest.raises(ValueError, match=r"gave \(2,\) and \(2, 2\)"):
        GeometricPath(normal, lambda x: -x.square(), walk)
    with pytest.raises(ValueError, match="num_steps"):
        GeometricPath(normal, log_prob, walk, num_steps=0)


class Elsewhere(torch.Generator):
    """A generator that says it is on another device."""

    device = torch.device("cuda")


def test_every_method_refuses_what_is_no_path_and_a_generator_elsewhere():
    def log_prob(x):
        return -x.square()

    runs = {
        "parallel": lambda path, g: parallel_tempering(path, [0.0, 1.0], 2, generator=g),
        "ladder": lambda path, g: tune_ladder(path, [0.0, 1.0], generator=g),
        "simulated": lambda path, g: simulated_tempering(
            path, [0.0, 1.0], 2, warmup=0, generator=g
        ),
        "annealing": lambda path, g: simulated_annealing(path, [1.0], 2, generator=g),
        "smc": lambda path, g: smc(path, 10, generator=g),
    }
    for run in runs.values():
        with pytest.raises(TypeError, match="path must be an AnnealingPath, got function"):
            run(log_prob, None)
        path = GeometricPath(Normal(0.0, 1.0), log_prob, walk)
        with pytest.raises(ValueError, match="the generator is on cuda but"):
            run(path, Elsewhere())
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator"):
            run(path, 0)
    with pytest.raises(TypeError, match="path must be an AnnealingPath, got function"):
        tempered_transitions(log_prob, [0.0, 1.0])


def test_paths_follow_the_device_of_their_tensors(rng):
    means, covariances = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.eye(2).expand(2, 2, 2)
    target = GaussianMixture(torch.tensor([1.0, 2.0]), means, covariances)
    base = gaussian(BASE_MEAN, BASE_COV, dtype=torch.float32)
    path = GeometricPath(base, target, lambda density: mala(density, 0.3))
    x = path.sample_base(4, generator=rng(9))
    beta = torch.tensor([[0.5], [1.0]])
    with torch.device("meta"):
        made = GeometricPath(base, target, lambda density: mala(density, 0.3))
        assert made.step(x.expand(2, 4, 2), beta, generator=rng(9)).device.type == "cpu"
        assert profile(made, x)(beta).device.type == "cpu"
        assert made.base_log_z.device.type == "cpu"
