"""Fixtures that all tests share: the devices at hand, and the ground-truth ledger."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Two short steps are compiled: helpers of the compiler would take longer to start than it takes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

RECORDS = Path(__file__).parents[1] / "_build" / "ledger-records.jsonl"
Z_LIMIT = 4.5  # standard errors: a two-sided false-alarm rate of 7e-6 a comparison

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine in turn."""
    return torch.device(request.param)


@pytest.fixture
def rng() -> Callable[..., torch.Generator]:
    """`rng(seed, device="cpu")`: a seeded generator."""

    def make(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    return make


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Compare an estimate with the exact answer and record the comparison in the book's ledger.

    `ledger(what, exact=..., estimate=..., std_error=..., tolerance=...)` asserts that the estimate
    is within 4.5 standard errors of the exact value or, for a deterministic method (standard error
    0), within `tolerance` (1e-10 unless told). Only float64 results on the CPU are recorded: others
    differ from machine to machine.
    """
    rows: list[dict[str, Any]] = []

    def check(
        what: str,
        *,
        exact: float | torch.Tensor,
        estimate: float | torch.Tensor,
        std_error: float | torch.Tensor = 0.0,
        tolerance: float = 1e-10,
    ) -> None:
        row = {"what": what, "exact": float(exact), "estimate": float(estimate)}
        row |= {"std_error": float(std_error), "tolerance": tolerance}
        error = abs(row["estimate"] - row["exact"])
        assert math.isfinite(error) and row["std_error"] >= 0, row
        assert error <= (Z_LIMIT * row["std_error"] if row["std_error"] > 0 else tolerance), row
        tensors = [x for x in (estimate, std_error) if isinstance(x, torch.Tensor)]
        same_everywhere = all(x.dtype == torch.float64 and x.device.type == "cpu" for x in tensors)
        if same_everywhere and "cuda" not in request.node.name:
            rows.append(row)

    yield check
    if rows:
        # One line a test, written at once: other processes append to the same file. Where a test
        # ran more than once its last line counts, so a run of a few tests spoils nothing.
        RECORDS.parent.mkdir(exist_ok=True)
        with RECORDS.open("a") as file:
            file.write(json.dumps({"test": request.node.nodeid, "rows": rows}) + "\n")
