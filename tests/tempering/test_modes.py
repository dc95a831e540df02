"""The task of this part: well-separated modes of unequal weight, at equal cost.

A chain that is not tempered must be seen to fail, and each tempered method must recover the weights
of the modes with no more evaluations of the target's density.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from companion.annealing import smc
from companion.core import sample
from companion.mcmc import random_walk
from companion.models.ising import Ising
from companion.models.rbm import RBM
from companion.targets import Gaussian, GaussianMixture
from companion.tempering import (
    GeometricPath,
    linear_schedule,
    parallel_tempering,
    simulated_tempering,
    tempered_transitions,
)
from companion.testing import binary_states

F64 = torch.float64
CHAINS = 128
# Two short chains make as many evaluations as a long one, in half of the time.
MANY_CHAINS = 256  # for the methods that move at one beta after the other
REPLICATES = 64  # of sequential Monte Carlo, whose estimates of Z need many particles each
ONE_BY_ONE = ["simulated tempering", "tempered transitions"]
METHODS = ["parallel tempering", *ONE_BY_ONE, "smc"]
# Of at most 17 comparisons, with the spread of 64 replicates or more (Student's law with at
# least 63 degrees of freedom): a false-alarm rate below 1e-5.
T_LIMIT = 5.9


def grid(device):
    """Twenty-five modes in the plane, fifteen standard deviations apart."""
    options = {"dtype": F64, "device": device}
    side = torch.arange(-2.0, 3.0, **options)
    number = torch.arange(25, device=device)
    weights = torch.arange(6.0, 31.0, **options)[7 * number % 25]
    covariances = 0.04 * torch.eye(2, **options).expand(25, 2, 2)
    target = GaussianMixture(
        weights / weights.sum(), 3.0 * torch.cartesian_prod(side, side), covariances
    )
    base = Gaussian(torch.zeros(2, **options), 25.0 * torch.eye(2, **options))
    ladder = [0.0, 0.03, 0.08, 0.15, 0.25, 0.41, 0.66, 1.0]
    # Few chains visit any one mode, and the spread of few is no safe error: whole rows and columns.
    groups = torch.cat([one_hot(number // 5), one_hot(number % 5)], 1).double()
    return SimpleNamespace(
        target=target, base=base, ladder=ladder, wide=5.0, narrow=0.45, error=0.02, groups=groups
    )


def ten_dimensions(device):
    """Five modes in ten dimensions, each ten standard deviations from the others."""
    options = {"dtype": F64, "device": device}
    eye = torch.eye(10, **options)
    weights = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], **options)
    target = GaussianMixture(weights, 7.0 * eye[:5], eye.expand(5, 10, 10))
    base = Gaussian(target.mean, 6.5 * eye)
    ladder = [0.0, 0.03, 0.08, 0.15, 0.26, 0.42, 0.66, 1.0]
    groups = torch.eye(5, **options)  # each mode by itself
    return SimpleNamespace(
        target=target, base=base, ladder=ladder, wide=1.9, narrow=0.75, error=0.06, groups=groups
    )


class Counted:
    """A log-density that counts the points at which it is evaluated."""

    def __init__(self, target):
        self.target, self.count = target, 0

    def __call__(self, x):
        self.count += x[..., 0].numel()
        return self.target(x)


def finer(ladder, factor, device):
    """The same ladder with `factor` times as many steps."""
    ladder = torch.tensor(ladder, dtype=F64, device=device)
    parts = torch.arange(factor, dtype=F64, device=device) / factor
    return torch.cat([(ladder[:-1, None] + parts * ladder.diff()[:, None]).flatten(), ladder[-1:]])


def shares(method, task, budget, generator):
    """The share of each mode in each chain or replicate, `(n, modes)`, for `budget` evaluations.

    A quarter of the budget of a chain is its warm-up. Also returns the evaluations made.
    """
    device = generator.device
    counted = Counted(task.target)

    def kernel(density, beta):  # as wide as a law whose precision is mixed as the log-densities are
        size = ((1.0 - beta) / task.wide**2 + beta / task.narrow**2).rsqrt()
        return random_walk(density, size)

    num_steps = 4 if method == "smc" else 2
    path = GeometricPath(task.base, counted, kernel, num_steps=num_steps)
    counted.count = 0  # without the path's look at its densities
    num_chains = MANY_CHAINS if method in ONE_BY_ONE else CHAINS
    each = budget // (REPLICATES if method == "smc" else num_chains)
    options = {"generator": generator}

    def quarters(cost):
        return {"num_draws": 3 * each // (4 * cost), "warmup": each // (4 * cost), **options}

    def modes(x):
        return one_hot(task.target.mode_of(x), len(task.target.weights)).double()

    if method == "smc":
        betas = finer(task.ladder, 4, device)
        n = each // ((num_steps + 2) * (len(betas) - 1))
        found = smc(path, n, betas=betas, num_replicates=REPLICATES, **options)
        # each replicate is one estimate: its own weights, and its own estimate of Z before it
        weights = found.log_weights.exp()[:, None] / found.log_z.value.exp()
        share = (weights * modes(found.x)).reshape(REPLICATES, n, -1).mean(1)
        return share, counted.count
    if method == "parallel tempering":
        run = parallel_tempering(
            path, task.ladder, num_chains=num_chains, **quarters(4 * len(task.ladder))
        )
        x = run.trace.x
    elif method == "simulated tempering":
        run = simulated_tempering(path, task.ladder, num_chains=num_chains, **quarters(4))
        weight = run.level_prob[..., None] / run.level_prob.mean()
        return (weight * modes(run.x)).mean(1), counted.count
    else:
        x0 = task.base.sample(num_chains, **options)
        if method == "tempered transitions":
            ladder = finer(task.ladder, 4, device)
            move, cost = tempered_transitions(path, ladder), 8 * len(ladder)
        else:
            move, cost = random_walk(counted, task.narrow), 1
        x = sample(move, x0, **quarters(cost)).x
    return modes(x).mean(1), counted.count


@pytest.mark.parametrize("make", [grid, ten_dimensions])
def test_a_chain_that_is_not_tempered_stays_in_one_mode(rng, device, make):
    task = make(device)
    share, _ = shares("none", task, 200_000, rng(0, device))
    assert (share.amax(1) > 0.95).double().mean() > 0.9  # nearly every chain, nearly all the time
    error = (share.mean(0) - task.target.weights).abs()
    assert error.max() > 0.02  # the modes have the weights that their basins have at the start


BUDGET = 600_000


@pytest.mark.parametrize("make", [grid, ten_dimensions])
@pytest.mark.parametrize("method", METHODS)
def test_tempered_methods_recover_the_weights_of_all_modes(rng, device, make, method, ledger):
    task = make(device)
    share, cost = shares(method, task, BUDGET, rng(1, device))
    assert 0.8 * BUDGET < cost <= 1.02 * BUDGET
    weights, mean = task.target.weights, share.mean(0)
    error = share.std(0) / math.sqrt(len(share))
    assert (mean > 0).all()  # all are found
    assert (error < task.error).all()
    together = share @ task.groups
    z = (together.mean(0) - weights @ task.groups) / (together.std(0) / math.sqrt(len(share)))
    assert z.abs().max() < T_LIMIT
    heaviest = int(weights.argmax())
    ledger(
        f"weight of the heaviest of {len(weights)} modes, {method}",
        exact=weights[heaviest],
        estimate=mean[heaviest],
        std_error=error[heaviest],
    )


# ---------------------------------------------------------------- models, by enumeration


def rbm(device):
    """Eight visible units that want to be all off or all on: a barrier lies between."""
    model = RBM(8, 3, dtype=F64, device=device)
    with torch.no_grad():
        model.W.fill_(4.0)
        model.b.fill_(-5.9)
        model.c.copy_(torch.tensor([-16.0, -15.8, -16.2], dtype=F64, device=device))
    states = binary_states(8, dtype=F64, device=device)
    return model.annealing_path(), states, lambda v, generator: model.gibbs(v, generator=generator)


def ising(device):
    model = Ising(4, 4, coupling=0.8, field=0.01, dtype=F64, device=device)
    states = 2.0 * binary_states(16, dtype=F64, device=device).reshape(-1, 4, 4) - 1.0
    return model.annealing_path(), states, lambda x, generator: model.gibbs(x, generator=generator)


def number_up(x, path, states):
    """How many units are on, as one of several classes, `(..., classes)`."""
    event = states.ndim - 1
    up = (x > 0).sum(tuple(range(-event, 0)))
    return one_hot(up, states[0].numel() + 1).double()


@pytest.mark.parametrize("make", [rbm, ising])
@pytest.mark.parametrize("method", ["gibbs", *METHODS])
def test_the_law_at_beta_1_agrees_with_enumeration(rng, device, make, method):
    path, states, gibbs = make(device)
    g = rng(2, device)
    exact = path.log_prob(states, 1.0).softmax(0) @ number_up(states, path, states)
    betas = linear_schedule(9, device=device)
    if method == "gibbs":
        x = states[:1].expand(CHAINS, *states.shape[1:])
        for _ in range(500):
            x = gibbs(x, g)
        found = number_up(x, path, states)
        assert (found.mean(0) - exact).abs().max() > 0.25  # none has come to the other side
        return
    if method == "smc":
        run = smc(
            path,
            500,
            betas=finer(betas.tolist(), 2, device),
            num_replicates=REPLICATES,
            generator=g,
        )
        weight = run.log_weights.exp()[:, None] / run.log_z.value.exp()
        found = (weight * number_up(run.x, path, states)).reshape(REPLICATES, 500, -1).mean(1)
    elif method == "parallel tempering":
        run = parallel_tempering(path, betas, 300, num_chains=CHAINS, warmup=100, generator=g)
        found = number_up(run.trace.x, path, states).mean(1)
    elif method == "simulated tempering":
        run = simulated_tempering(path, betas, 375, num_chains=MANY_CHAINS, warmup=125, generator=g)
        weight = run.level_prob[..., None] / run.level_prob.mean()
        found = (weight * number_up(run.x, path, states)).mean(1)
    else:
        kernel = tempered_transitions(path, finer(betas.tolist(), 4, device))
        start = path.sample_base(CHAINS, generator=g)
        x = sample(kernel, start, 20, warmup=10, generator=g).x
        found = number_up(x, path, states).mean(1)
    error = found.std(0) / math.sqrt(len(found))
    seen = exact > 2e-3  # classes that every chain or replicate can be expected to show
    z = (found.mean(0) - exact)[seen] / error[seen]
    assert z.abs().max() < T_LIMIT and error.max() < 0.05
