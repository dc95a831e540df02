"""How far a set of chains can be trusted, and how precise its estimates are."""

from companion.diagnostics.convergence import (
    autocorrelation,
    ess_bulk,
    ess_tail,
    integrated_autocorrelation_time,
    mcse_mean,
    mcse_quantile,
    mcse_sd,
    rhat,
)
from companion.diagnostics.report import Divergences, Summary, divergences, e_bfmi, summary

__all__ = [
    "Divergences",
    "Summary",
    "autocorrelation",
    "divergences",
    "e_bfmi",
    "ess_bulk",
    "ess_tail",
    "integrated_autocorrelation_time",
    "mcse_mean",
    "mcse_quantile",
    "mcse_sd",
    "rhat",
    "summary",
]
