"""Fixtures that all tests share: the devices at hand, and the ground-truth ledger."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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
def ledger(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare an estimate with the exact answer and record the comparison in the book's ledger.

    `ledger(what, exact=..., estimate=..., std_error=..., tolerance=...)` asserts that the estimate
    is within 4.5 standard errors of the exact value or, for a deterministic method (standard error
    0), within `tolerance` (1e-10 unless told). Only float64 results on the CPU are recorded.
    """

    def check(
        what: str,
        *,
        exact: float,
        estimate: float,
        std_error: float = 0.0,
        tolerance: float = 1e-10,
    ) -> None:
        exact, estimate, std_error = float(exact), float(estimate), float(std_error)
        row = {"test": request.node.nodeid, "what": what, "exact": exact}
        row |= {"estimate": estimate, "std_error": std_error, "tolerance": tolerance}
        RECORDS.parent.mkdir(exist_ok=True)
        with RECORDS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        error = abs(estimate - exact)
        assert math.isfinite(error) and std_error >= 0, row
        assert error <= (Z_LIMIT * std_error if std_error > 0 else tolerance), row

    return check
