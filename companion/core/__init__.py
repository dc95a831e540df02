"""The five contracts that hold the package together, and `sample`, which runs a kernel.

1. A *log-density* is any callable `(..., *event) -> (...)`, unnormalised allowed (`LogProb`).
2. A *kernel* is a pair of functions (`Kernel`): `state = kernel.init(x)` and
   `state, info = kernel.step(state, generator=g)`.
3. A *trace* is what `sample` returns (`Trace`): draws of shape `(chains, draws, *event)`.
4. An *annealing path* joins a tractable density to the target (`AnnealingPath`).
5. Every estimate of a partition function is a `LogZ`.

The input checks that all modules share are in `companion.inputs`.
"""

from companion.core.contracts import (
    AnnealingPath,
    BlockKernel,
    Info,
    Kernel,
    LogProb,
    State,
    gradient,
    value_and_grad,
    with_gradients,
)
from companion.core.log_z import LogZ
from companion.core.trace import Trace, sample

__all__ = [
    "AnnealingPath",
    "BlockKernel",
    "Info",
    "Kernel",
    "LogProb",
    "LogZ",
    "State",
    "Trace",
    "gradient",
    "sample",
    "value_and_grad",
    "with_gradients",
]
