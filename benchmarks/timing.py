"""Fair timings: one pinned thread, processor time, peers interleaved, medians.

Import this module before torch and JAX: both read the number of threads when they start. With
BENCH_THREADS=2 in the environment there are two, not pinned, and the time is the clock's.
"""

import os
import statistics
import time
from collections.abc import Callable

THREADS = int(os.environ.get("BENCH_THREADS", "1"))
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = str(THREADS)
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
if THREADS == 1 and hasattr(
    os, "sched_setaffinity"
):  # Linux; JAX's pool of threads then shares this one core
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def compare(runs: dict[str, Callable[[], object]], repeats: int = 7) -> dict[str, float]:
    """Median time of each run, in seconds; the runs take turns, after one warm-up each.

    A machine that slows down half-way slows all of them, so their ratios hold.
    """
    clock = time.process_time if THREADS == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            begin = clock()
            run()
            seconds[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, seconds: dict[str, float], units: float, unit: str, baseline: str) -> None:
    """Print a table: cost of one unit of work, and the ratio to the baseline's."""
    print(f"\n## {title}\n")
    print(f"| | {unit} | relative to {baseline} |\n|---|---:|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {1e6 * value / units:.3f} | {value / seconds[baseline]:.2f} |")
