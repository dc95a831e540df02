"""Checks for samplers, to be used on samplers of your own.

A Markov kernel is correct when it leaves its target invariant: chains that start from exact draws
of the target still follow the target after any number of steps. `invariance_test` puts that to a
statistical test where the target can be drawn from exactly, `discrete_invariance_test` where its
states can be enumerated. No chain has to converge, so a test takes seconds, and it sees errors that
leave means and plots alone.
"""

from companion.testing.enumeration import binary_states, enumerate_log_probs, exact_distribution
from companion.testing.finite_chains import (
    detailed_balance_error,
    mixing_time,
    reversal,
    spectral_gap,
    stationary_error,
)
from companion.testing.geweke import geweke_test
from companion.testing.invariance import (
    InvarianceResult,
    assert_invariant,
    discrete_invariance_test,
    invariance_test,
)
from companion.testing.transitions import transition_matrix

__all__ = [
    "InvarianceResult",
    "assert_invariant",
    "binary_states",
    "detailed_balance_error",
    "discrete_invariance_test",
    "enumerate_log_probs",
    "exact_distribution",
    "geweke_test",
    "invariance_test",
    "mixing_time",
    "reversal",
    "spectral_gap",
    "stationary_error",
    "transition_matrix",
]
