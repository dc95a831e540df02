"""MBAR beside pymbar: 20 states and 100,000 draws in all.

    make bench                                        all benchmarks
    .venv-bench/bin/python benchmarks/multistate.py
    .venv-bench/bin/python benchmarks/multistate.py --reference > tests/logz/pymbar_reference.json

Harmonic oscillators whose free energies are known. Both packages get the same table of
log-densities, in double precision (pymbar switches JAX to 64 bit for the whole process, so it has
one of its own). pymbar's time is that of its solution alone, not counting compilation; the
companion's includes the covariances. Processor time on one pinned thread, medians of interleaved
runs. With --reference, the numbers that tests/logz/test_multistate.py compares with.
"""

import argparse
import contextlib
import json
import sys

import timing  # first: it sets the number of threads

import numpy as np
import torch

with contextlib.redirect_stdout(sys.stderr):  # its banner
    import pymbar

from companion.logz import mbar

torch.set_num_threads(1)
F64 = torch.float64


def reference() -> None:
    """Print pymbar's answer for five oscillators, one of them without draws, at fixed points."""
    stiffness = torch.tensor([1.0, 2.0, 5.0, 9.0, 16.0], dtype=F64)
    centres = torch.tensor([0.0, 0.5, 1.2, 1.5, 2.2], dtype=F64)
    counts = [50, 60, 40, 0, 70]
    draws = []
    for n, k, centre in zip(counts, stiffness, centres, strict=True):
        u = torch.arange(1, n + 1, dtype=F64) * 0.6180339887498949 % 1.0
        draws.append((centre + torch.special.ndtri(u) / k.sqrt()).round(decimals=6))
    reduced = 0.5 * stiffness[:, None] * (torch.cat(draws) - centres[:, None]).square()
    with contextlib.redirect_stdout(sys.stderr):
        peer = pymbar.MBAR(reduced.numpy(), np.array(counts), relative_tolerance=1e-13)
        found = peer.compute_free_energy_differences()
    answer = {
        "pymbar": pymbar.__version__,
        "draws": [x.tolist() for x in draws],
        "minus_f": (-found["Delta_f"][0]).tolist(),
        "error": found["dDelta_f"].tolist(),
        "effective_sample_number": peer.compute_effective_sample_number().tolist(),
    }
    print(json.dumps(answer, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few draws: to see that it runs")
    parser.add_argument("--reference", action="store_true", help="print pymbar's reference numbers")
    args = parser.parse_args()
    if args.reference:
        reference()
        return
    num_states, num_draws = 20, 500 if args.quick else 5000
    stiffness = torch.linspace(1.0, 20.0, num_states, dtype=F64)
    centres = torch.linspace(0.0, 8.0, num_states, dtype=F64)
    noise = torch.randn(
        num_states, num_draws, dtype=F64, generator=torch.Generator().manual_seed(0)
    )
    x = centres[:, None] + noise / stiffness.sqrt()[:, None]
    table = -0.5 * stiffness[:, None] * (x.reshape(-1) - centres[:, None]).square()
    draws = list(x)
    reduced, counts = -table.numpy(), np.full(num_states, num_draws)

    def ours():
        return mbar(lambda _: table, draws)

    def peers():
        with contextlib.redirect_stdout(sys.stderr):
            return pymbar.MBAR(reduced, counts)

    seconds = timing.compare({"companion, mbar": ours, "pymbar, MBAR": peers}, repeats=5)
    title = f"MBAR, {num_states} states, {x.numel():,} draws"
    timing.report(title, seconds, 1000, "milliseconds", "pymbar, MBAR")
    found, peer = ours(), peers().compute_free_energy_differences()
    exact = -0.5 * (stiffness / stiffness[0]).log()
    values = np.abs(found.value.numpy() + peer["Delta_f"][0]).max()
    errors = np.abs(found.std_error.numpy() - peer["dDelta_f"][0]).max()
    print(f"\nLargest difference from pymbar: {values:.1g}, of the standard errors {errors:.1g}; ")
    print(
        f"from the exact values {(found.value - exact).abs().max():.3f}, "
        f"with a standard error of {found.std_error.max():.3f}."
    )


if __name__ == "__main__":
    main()
