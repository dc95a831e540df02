"""Markov chains: cost of a gradient and of a step, beside BlackJAX, NumPyro and emcee.

    make bench                                        all benchmarks
    .venv-bench/bin/python benchmarks/markov_chains.py

Every package runs the same algorithm on the same target in single precision with the same step
size, and keeps its draws. Times are processor time on one pinned thread, medians of interleaved
runs; compilation is not counted, but the time of the first call is shown.

NUTS is not quite the same algorithm: the companion stops a trajectory by Stan's criterion, and both
peers take half of the momenta at its ends off their sum first, which stops it sooner. The leapfrog
steps a draw are printed beside the times.
"""

import argparse
import time
from collections.abc import Callable

import timing  # first: it sets the number of threads

import blackjax
import emcee
import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpyro.infer import HMC, NUTS

from companion.core import sample
from companion.hmc import hmc, nuts
from companion.mcmc import random_walk
from companion.targets import Gaussian, LogisticRegression

torch.set_num_threads(1)
NUM_LEAPFROG = 10
Run = Callable[[], object]


# ---------------------------------------------------------------- targets


def correlated_gaussian(dim: int) -> tuple[Gaussian, Callable, float]:
    """N(0, S) with S_ij = 0.9^|i-j|: the target, its log-density in JAX, a step size for HMC."""
    index = torch.arange(float(dim))
    covariance = 0.9 ** (index[:, None] - index).abs()
    precision = jnp.asarray(torch.linalg.inv(covariance.double()).float().numpy())
    return Gaussian(torch.zeros(dim), covariance), lambda x: -0.5 * x @ precision @ x, 0.2


def logistic(num_rows: int = 1000, dim: int = 25) -> tuple[LogisticRegression, Callable, float]:
    """The posterior of a logistic regression on made data, with a normal prior of unit scale."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(num_rows, dim, generator=g)
    labels = features @ torch.randn(dim, generator=g) / 5 > torch.randn(num_rows, generator=g)
    x, y = jnp.asarray(features.numpy()), jnp.asarray(labels.float().numpy())

    def log_prob(theta):
        logits = x @ theta
        return (y * logits - jax.nn.softplus(logits)).sum() - 0.5 * (theta**2).sum()

    return LogisticRegression(features, labels.float(), prior_scale=1.0), log_prob, 0.03


class ByAutograd:
    """A log-density that hides its own gradient, so that autograd supplies it."""

    def __init__(self, target) -> None:
        self.target = target

    def __call__(self, x):
        return self.target.log_prob(x)


# ---------------------------------------------------------------- runs


def ours(kernel, x0: torch.Tensor, num_steps: int) -> Run:
    return lambda: sample(kernel, x0, num_steps, generator=torch.Generator().manual_seed(1))


def in_blackjax(algorithm, x0: torch.Tensor, num_steps: int) -> Run:
    start = jnp.asarray(x0.numpy())

    @jax.jit
    def run(key):
        def one(state, key):
            state, info = jax.vmap(algorithm.step)(jax.random.split(key, len(x0)), state)
            return state, (state.position, state.logdensity, info)

        state = jax.vmap(algorithm.init)(start)
        return jax.lax.scan(one, state, jax.random.split(key, num_steps))[1]

    return lambda: jax.block_until_ready(run(jax.random.PRNGKey(1)))


def in_numpyro(kernel, x0: torch.Tensor, num_steps: int) -> Run:
    keys = jax.random.split(jax.random.PRNGKey(1), len(x0))
    state = kernel.init(
        keys, 0, init_params=jnp.asarray(x0.numpy()), model_args=(), model_kwargs={}
    )

    @jax.jit
    def run(state):
        def one(state, _):
            state = kernel.sample(state, (), {})
            return state, (state.z, state.potential_energy, state.accept_prob, state.num_steps)

        return jax.lax.scan(one, state, length=num_steps)[1]

    return lambda: jax.block_until_ready(run(state))


def products(target, x0: torch.Tensor, num_gradients: int) -> Run:
    """The matrix products that so many gradients need, and nothing else."""
    if isinstance(target, Gaussian):
        factors = [target.covariance]
    else:
        factors = [target.features.T.contiguous(), target.features]

    def run() -> None:
        for _ in range(num_gradients):
            y = x0
            for factor in factors:
                y = y @ factor

    return run


# ---------------------------------------------------------------- tables


def bench_hmc(name: str, target, log_prob, step_size: float, chains: int, steps: int) -> None:
    dim = len(target.covariance) if isinstance(target, Gaussian) else target.features.shape[1]
    x0 = 0.1 * torch.randn(chains, dim, generator=torch.Generator().manual_seed(0))
    gradients = NUM_LEAPFROG * steps
    peer = blackjax.hmc(log_prob, step_size, jnp.ones(x0.shape[1]), NUM_LEAPFROG)
    other = HMC(
        potential_fn=lambda x: -log_prob(x),
        step_size=step_size,
        trajectory_length=step_size * NUM_LEAPFROG,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    autograd = ByAutograd(target)
    kernels = {
        "companion": hmc(target, step_size, NUM_LEAPFROG),
        "companion, autograd": hmc(autograd, step_size, NUM_LEAPFROG),
    }
    # The compiler takes up to a minute for each: only where it is most likely to pay.
    if chains != 100:
        kernels["companion, compile=True"] = hmc(target, step_size, NUM_LEAPFROG, compile=True)
    if chains == 1000:
        kernels["companion, autograd, compile=True"] = hmc(
            autograd, step_size, NUM_LEAPFROG, compile=True
        )
    runs = {"matrix products alone": products(target, x0, gradients)}
    runs |= {key: ours(kernel, x0, steps) for key, kernel in kernels.items()}
    runs |= {"BlackJAX": in_blackjax(peer, x0, steps), "NumPyro": in_numpyro(other, x0, steps)}
    seconds = timing.compare(runs)
    title = f"HMC on {name}, {chains} chain{'s' if chains > 1 else ''}"
    timing.report(title, seconds, gradients * chains, "µs a gradient and chain", "BlackJAX")


def bench_nuts(name: str, target, log_prob, step_size: float, chains: int, steps: int) -> None:
    x0 = target.sample(chains, generator=torch.Generator().manual_seed(0))
    peer = blackjax.nuts(log_prob, step_size, jnp.ones(x0.shape[1]))
    other = NUTS(
        potential_fn=lambda x: -log_prob(x),
        step_size=step_size,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    runs = {
        "companion": ours(nuts(target, step_size), x0, steps),
        "BlackJAX": in_blackjax(peer, x0, steps),
        "NumPyro": in_numpyro(other, x0, steps),
    }
    lengths = {
        "companion": float(runs["companion"]().stats["num_steps"].double().mean()),
        "BlackJAX": float(np.mean(runs["BlackJAX"]()[2].num_integration_steps)),
        "NumPyro": float(np.mean(runs["NumPyro"]()[3])),
    }
    seconds = timing.compare(runs, repeats=3)
    title = f"NUTS on {name}, {chains} chain{'s' if chains > 1 else ''}"
    timing.report(title, seconds, steps * chains, "µs a draw", "BlackJAX")
    print("\nLeapfrog steps a draw:", ", ".join(f"{k} {v:.1f}" for k, v in lengths.items()))


def bench_random_walk(chains: int = 1000, dim: int = 10, steps: int = 200) -> None:
    target, log_prob, _ = correlated_gaussian(dim)
    x0 = target.sample(chains, generator=torch.Generator().manual_seed(0))
    scale = 0.3
    peer = blackjax.additive_step_random_walk(
        log_prob, blackjax.mcmc.random_walk.normal(jnp.full(dim, scale))
    )
    precision = torch.linalg.inv(target.covariance.double()).numpy()

    def in_emcee(move) -> Run:
        start = x0.double().numpy()

        def vectorised(x):
            return -0.5 * np.einsum("ni,ij,nj->n", x, precision, x, optimize=True)

        def run() -> object:
            sampler = emcee.EnsembleSampler(chains, dim, vectorised, vectorize=True, moves=move)
            return sampler.run_mcmc(start, steps)

        return run

    runs = {
        "companion": ours(random_walk(target, scale), x0, steps),
        "companion, compiled": ours(random_walk(target, scale, compile=True), x0, steps),
        "BlackJAX": in_blackjax(peer, x0, steps),
        "emcee, Gaussian moves": in_emcee(emcee.moves.GaussianMove(scale**2)),
        "emcee, stretch moves": in_emcee(emcee.moves.StretchMove()),
    }
    title = f"Random-walk Metropolis, {chains} chains in {dim} dimensions"
    timing.report(title, timing.compare(runs), steps * chains, "µs a step and chain", "BlackJAX")


def first_call() -> None:
    """What the first step costs: nobody waits for a compiler unless they ask for one."""
    target, _, step_size = correlated_gaussian(100)
    print("\n## First step of HMC, compilation included\n")
    for compiled in (False, True):
        kernel = hmc(target, step_size, NUM_LEAPFROG, compile=compiled)
        begin = time.perf_counter()
        sample(kernel, torch.zeros(7, 100), 1, generator=torch.Generator().manual_seed(0))
        print(f"- compile={compiled}: {time.perf_counter() - begin:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps: to see that it runs")
    fewer = 20 if parser.parse_args().quick else 1
    targets = {
        "a correlated normal law in 100 dimensions": correlated_gaussian(100),
        "logistic regression, 1,000 rows and 25 features": logistic(),
    }
    for name, (target, log_prob, step_size) in targets.items():
        for chains, steps in ((1, 400), (100, 100), (1000, 20)):
            bench_hmc(name, target, log_prob, step_size, chains, max(1, steps // fewer))
    target, log_prob, step_size = targets["a correlated normal law in 100 dimensions"]
    for chains, steps in ((1, 200), (100, 40), (1000, 10)):
        bench_nuts(
            "the same normal law", target, log_prob, step_size, chains, max(1, steps // fewer)
        )
    bench_random_walk(steps=max(1, 200 // fewer))
    first_call()


if __name__ == "__main__":
    main()
