"""Checks for samplers, to be used on samplers of your own.

A Markov kernel is correct when it leaves its target invariant: chains that start from exact draws
of the target still follow it after any number of steps. No chain has to converge, so a test takes
seconds, and it sees errors that leave means and plots alone. Which check to take:

- `invariance_test`: the target can be drawn from exactly.
- `discrete_invariance_test`: its states can be enumerated.
- `geweke_test`: the target is the posterior of a model that can be simulated.
- `transition_matrix`, and what it tells (`stationary_error`, `detailed_balance_error`,
  `spectral_gap`, `mixing_time`, `reversal`): there are few states, and the kernel makes discrete
  choices. Nothing is left to chance, and no error is too small.

A check that cannot fail proves nothing: run it on a wrong kernel, too. `drift`, `shrink`,
`jump_back`, `skip_rejections`, `stale_log_prob` and `reuse_noise` break a kernel from outside.
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
from companion.testing.mutants import (
    drift,
    jump_back,
    reuse_noise,
    shrink,
    skip_rejections,
    stale_log_prob,
)
from companion.testing.transitions import transition_matrix

__all__ = [
    "InvarianceResult",
    "assert_invariant",
    "binary_states",
    "detailed_balance_error",
    "discrete_invariance_test",
    "drift",
    "enumerate_log_probs",
    "exact_distribution",
    "geweke_test",
    "invariance_test",
    "jump_back",
    "mixing_time",
    "reuse_noise",
    "reversal",
    "shrink",
    "skip_rejections",
    "spectral_gap",
    "stale_log_prob",
    "stationary_error",
    "transition_matrix",
]
