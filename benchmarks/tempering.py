"""Sequential Monte Carlo and parallel tempering beside BlackJAX's adaptive tempered SMC.

    make bench                                        all benchmarks
    .venv-bench/bin/python benchmarks/tempering.py

One task: five modes of unequal weight in ten dimensions, from a normal base, by random-walk
Metropolis with the same step sizes, in single precision. Every run counts its evaluations of the
target's density, which both packages are given as the same formula. Times are processor time on one
pinned thread, medians of interleaved runs, not counting compilation; errors of log Z and of the
weights are root mean squares over independent runs.
"""

import argparse
import math
import statistics

import timing  # first: it sets the number of threads

import blackjax
import blackjax.smc.resampling
import jax
import jax.numpy as jnp
import numpy as np
import torch

from companion.annealing import adaptive_schedule, smc
from companion.mcmc import random_walk
from companion.tempering import GeometricPath, parallel_tempering, tune_ladder

torch.set_num_threads(1)
DIM, MOVES, TARGET_ESS = 10, 10, 0.5
WEIGHTS = [0.4, 0.25, 0.2, 0.1, 0.05]
STEP = 0.9  # one for all betas: BlackJAX's kernel does not know beta


class Counted:
    """A log-density that counts the points at which it is evaluated."""

    def __init__(self, target) -> None:
        self.target, self.count = target, 0

    def __call__(self, x):
        self.count += x[..., 0].numel()
        return self.target(x)


class Base:
    """The normal law N(0, 9 I)."""

    def log_prob(self, x):
        return x.square().sum(-1) / -18.0 - LOG_NORM

    def sample(self, n, *, generator=None):
        return 3.0 * torch.randn(n, DIM, generator=generator)


LOG_NORM = DIM * (0.5 * math.log(2 * math.pi) + math.log(3.0))
CENTRES = 5.0 * torch.eye(DIM)[:5]
BIAS = torch.tensor(WEIGHTS).log() - 12.5 - 0.5 * DIM * math.log(2 * math.pi)


def log_target(x):
    """The mixture of N(c_k, I): log sum_k w_k exp(-|x - c_k|^2 / 2), normalised."""
    return _parts(x).logsumexp(-2) - 0.5 * x.square().sum(-1)


def _parts(x):  # components before points: reductions over a short last dimension are slow
    return CENTRES @ x.mT + BIAS[:, None]


def in_jax():
    """The same two log-densities."""
    centres, bias = jnp.asarray(CENTRES.numpy()), jnp.asarray(BIAS.numpy())

    def prior(x):
        return (x @ x) / -18.0 - LOG_NORM

    def target(x):
        return jax.nn.logsumexp(centres @ x + bias) - 0.5 * (x @ x)

    return prior, target


def in_blackjax(num_particles: int):
    """A run: `key -> (log Z, particles, stages)`; every stage moves all particles `MOVES` times."""
    log_prior, target = in_jax()
    kernel = blackjax.additive_step_random_walk.build_kernel()
    normal = blackjax.mcmc.random_walk.normal(jnp.full(DIM, STEP))

    def move(key, state, logdensity):
        return kernel(key, state, logdensity, normal)

    algorithm = blackjax.adaptive_tempered_smc(
        log_prior,
        lambda x: target(x) - log_prior(x),
        move,
        blackjax.additive_step_random_walk.init,
        {},
        blackjax.smc.resampling.systematic,
        TARGET_ESS,
        num_mcmc_steps=MOVES,
    )

    @jax.jit
    def run(key):
        key, start = jax.random.split(key)
        state = algorithm.init(3.0 * jax.random.normal(start, (num_particles, DIM)))

        def more(carry):
            return carry[0].tempering_param < 1.0

        def stage(carry):
            state, key, log_z, stages = carry
            key, now = jax.random.split(key)
            state, info = algorithm.step(now, state)
            return state, key, log_z + info.log_likelihood_increment, stages + 1

        state, _, log_z, stages = jax.lax.while_loop(more, stage, (state, key, 0.0, 0))
        return log_z, state.particles, stages

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few runs: to see that it runs")
    num_runs = 3 if parser.parse_args().quick else 40
    n = 4000
    counted = Counted(log_target)
    path = GeometricPath(
        Base(), counted, lambda density: random_walk(density, STEP), num_steps=MOVES
    )
    frozen = adaptive_schedule(path, n, TARGET_ESS, generator=torch.Generator().manual_seed(99))
    ladder = tune_ladder(
        path,
        torch.linspace(0, 1, 8) ** 2,
        num_chains=100,
        num_steps=20,
        num_rounds=4,
        generator=torch.Generator().manual_seed(98),
    ).betas
    chains, draws = 400, 20

    def shares(x, weight):
        modes = torch.nn.functional.one_hot(_parts(x).argmax(-2), 5).double()
        return (weight[:, None] * modes).sum(0) / weight.sum()

    def by_smc(seed: int, betas):
        found = smc(
            path,
            n,
            betas=betas,
            target_ess=TARGET_ESS,
            ess_threshold=1.0,
            generator=torch.Generator().manual_seed(seed),
        )
        return float(found.log_z.value), shares(found.x, found.log_weights.softmax(0))

    def by_tempering(seed: int):
        found = parallel_tempering(
            path,
            ladder,
            draws,
            num_chains=chains,
            warmup=draws // 4,
            generator=torch.Generator().manual_seed(seed),
        )
        x = found.trace.x.reshape(-1, DIM)
        return float(found.log_z.value), shares(x, torch.ones(len(x), dtype=torch.float64))

    peer = in_blackjax(n)
    stages: list[int] = []

    def by_blackjax(seed: int):
        log_z, particles, number = jax.block_until_ready(peer(jax.random.PRNGKey(seed)))
        stages.append(int(number))
        x = torch.from_numpy(np.array(particles))
        return float(log_z), shares(x, torch.ones(len(x), dtype=torch.float64))

    runs = {
        "companion, smc, adapted and run again": lambda seed: by_smc(seed, None),
        "companion, smc, schedule given": lambda seed: by_smc(seed, frozen),
        "companion, parallel tempering": by_tempering,
        "BlackJAX, adaptive tempered SMC": by_blackjax,
    }
    exact = torch.tensor(WEIGHTS, dtype=torch.float64)
    evaluations, errors = {}, {}
    for name, run in runs.items():
        counted.count = 0
        found = [run(seed) for seed in range(num_runs)]
        # BlackJAX: the weights, the kernel's start and its moves, as in a path of ours
        peers = n * (MOVES + 2) * sum(stages) if name.startswith("BlackJAX") else 0
        evaluations[name] = (counted.count + peers) / num_runs
        log_z = torch.tensor([value for value, _ in found])
        weights = torch.stack([share for _, share in found]) - exact
        errors[name] = log_z.square().mean().sqrt(), weights.square().sum(1).mean().sqrt()
    seconds = timing.compare({k: (lambda run=run: run(0)) for k, run in runs.items()}, repeats=5)
    print(f"\n## Five modes in {DIM} dimensions, {num_runs} runs, log Z = 0\n")
    print(
        "| | evaluations | µs each | RMS error of log Z | times sqrt(millions) | of the weights |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for name in runs:
        count, (log_z, weights) = evaluations[name], errors[name]
        each = 1e6 * statistics.median(seconds[name]) / count
        scaled = log_z * (count / 1e6) ** 0.5
        print(
            f"| {name} | {count:,.0f} | {each:.3f} | {log_z:.4f} | {scaled:.4f} | {weights:.4f} |"
        )


if __name__ == "__main__":
    main()
