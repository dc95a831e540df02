"""Log Z of a 784 x 500 RBM by AIS, beside the matrix products that it needs.

    make bench                                        all benchmarks
    .venv-bench/bin/python benchmarks/partition_functions.py

100 chains in single precision: a schedule of 300 temperatures, through `ais`, with the weights
summed in double precision. Two products of the chains with W at each temperature are the least
that Gibbs sampling needs; the general route takes three, and double precision to weigh by
differences. Times are processor time on one pinned thread, medians of interleaved runs; then the
clock's time on two threads. A schedule of 10,000 costs 33 times as much.
"""

import argparse
import statistics

import timing  # first: it sets the number of threads

import torch

from companion.annealing import ais
from companion.models.rbm import RBM
from companion.tempering import linear_schedule

torch.set_num_threads(timing.THREADS)
NUM_VISIBLE, NUM_HIDDEN, NUM_CHAINS, NUM_BETAS, TIMED = 784, 500, 100, 10_000, 300


class Protocol:
    """A path that offers no fused call, so that AIS takes the general route."""

    def __init__(self, path):
        self.base_log_z, self.sample_base = path.base_log_z, path.sample_base
        self.log_prob, self.step, self.profile = path.log_prob, path.step, path.profile


def products(rbm):
    """Two products a temperature, and nothing else."""
    v, h = torch.rand(NUM_CHAINS, NUM_VISIBLE), torch.rand(NUM_CHAINS, NUM_HIDDEN)
    weights = rbm.W.detach()

    def run():
        for _ in range(TIMED):
            v @ weights
            h @ weights.T

    return run


def main():
    parser = argparse.ArgumentParser(description="Time annealed importance sampling.")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    quick = parser.parse_args().quick
    g = torch.Generator().manual_seed(0)
    rbm = RBM(NUM_VISIBLE, NUM_HIDDEN, generator=g)
    with torch.no_grad():
        rbm.W.mul_(3.0)
        rbm.b.fill_(-1.5)
    betas = linear_schedule(TIMED + 1)  # a temperature costs the same in any schedule
    path = rbm.annealing_path(rbm.b.detach().clone())
    runs = {
        "two products": products(rbm),
        "companion, AIS": lambda: ais(path, betas, NUM_CHAINS, generator=g),
        "companion, AIS by the general route": lambda: ais(
            Protocol(path), betas, NUM_CHAINS, generator=g
        ),
    }
    threads = "one thread" if timing.THREADS == 1 else f"{timing.THREADS} threads, by the clock"
    title = (
        f"A temperature of AIS for a {NUM_VISIBLE} x {NUM_HIDDEN} RBM, {NUM_CHAINS} chains, "
        f"{threads}"
    )
    seconds = timing.compare(runs, 3 if quick else 9)
    timing.report(title, seconds, TIMED, "microseconds", "two products")
    whole = statistics.median(seconds["companion, AIS"]) * NUM_BETAS / TIMED
    print(f"\n{NUM_BETAS:,} temperatures: {whole:.0f} seconds")
    if timing.THREADS == 1:
        timing.again_on_two_threads()


if __name__ == "__main__":
    main()
