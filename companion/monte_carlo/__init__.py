"""Monte Carlo estimates with error bars, variance reduction, and exact draws by rejection."""

from companion.monte_carlo.estimates import (
    Estimate,
    estimate,
    expectation,
    proportion_interval,
    samples_needed,
)
from companion.monte_carlo.rejection import RejectionResult, rejection_sampling
from companion.monte_carlo.variance_reduction import (
    antithetic,
    control_variates,
    quasi_monte_carlo,
    stratified,
)

__all__ = [
    "Estimate",
    "RejectionResult",
    "antithetic",
    "control_variates",
    "estimate",
    "expectation",
    "proportion_interval",
    "quasi_monte_carlo",
    "rejection_sampling",
    "samples_needed",
    "stratified",
]
