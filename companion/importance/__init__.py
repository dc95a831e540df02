"""Importance sampling: draws from one density, weights that make them stand for another."""

from companion.importance.proposals import adapt_proposal, defensive_mixture
from companion.importance.sampling import ImportanceResult, importance_sampling
from companion.importance.weights import (
    bootstrap_std_error,
    effective_sample_size,
    log_mean_weight,
    pareto_k,
    psis,
    resample,
)

__all__ = [
    "ImportanceResult",
    "adapt_proposal",
    "bootstrap_std_error",
    "defensive_mixture",
    "effective_sample_size",
    "importance_sampling",
    "log_mean_weight",
    "pareto_k",
    "psis",
    "resample",
]
