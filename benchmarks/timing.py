"""Fair timings: one pinned thread, processor time, peers interleaved, ratios turn by turn.

Import this module before torch and JAX: both read the number of threads when they start. With
BENCH_THREADS=2 in the environment there are two, not pinned, and the time is the clock's.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

THREADS = int(os.environ.get("BENCH_THREADS", "1"))
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = str(THREADS)
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()  # on Linux
if THREADS == 1 and CORES:
    os.sched_setaffinity(0, {max(CORES)})  # JAX's pool of threads then shares this one core


def again_on_two_threads() -> None:
    """Run this program anew, with the same arguments, as the last thing that it does."""
    if CORES:
        os.sched_setaffinity(0, CORES)  # or both threads would share the core that it inherits
    command = [sys.executable, *sys.argv]
    subprocess.run(command, env=os.environ | {"BENCH_THREADS": "2"}, check=True)


def compare(runs: dict[str, Callable[[], object]], repeats: int = 7) -> dict[str, list[float]]:
    """Seconds of each run, one number a turn; the runs take turns, after a warm-up of each."""
    clock = time.process_time if THREADS == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            begin = clock()
            run()
            seconds[name].append(clock() - begin)
    return seconds


def report(
    title: str, seconds: dict[str, list[float]], units: float, unit: str, baseline: str
) -> None:
    """Print a table: the median cost of one unit of work, and its ratio to the baseline's.

    A ratio is the median over the turns, in brackets the middle half of them: a machine that slows
    down half-way slows all runs of a turn.
    """
    print(f"\n## {title}\n")
    print(f"| | {unit} | relative to {baseline} |\n|---|---:|---:|")
    for name, turns in seconds.items():
        cost = 1e6 * statistics.median(turns) / units
        ratios = [own / base for own, base in zip(turns, seconds[baseline], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"| {name} | {cost:.3f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |")
