"""The fifth contract: every estimate of a partition function is a `LogZ`."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from companion.inputs import check_real

__all__ = ["LogZ"]


@dataclass(frozen=True, init=False, eq=False)
class LogZ:
    """An estimate of the logarithm of a partition function (or of a ratio of two).

    Attributes:
        value: log Z, a float64 tensor (a vector where a method gives several at once).
        std_error: standard error of `value`, a float64 tensor of its shape; 0 for exact methods.
        log_weights: log importance weights, float64, or None.
        ess: effective sample size, or None.
        converged: whether the method's own iteration converged.
        covariance: covariance of the entries of a vector `value`, or None.
        discretization: about how far off a numerical integral is apart from its Monte Carlo error,
            which alone is in `std_error`; or None.

    >>> LogZ(2.0, 0.1).interval()
    (tensor(1.8040, dtype=torch.float64), tensor(2.1960, dtype=torch.float64))
    """

    value: Tensor
    std_error: Tensor
    log_weights: Tensor | None = None
    ess: Tensor | None = None
    converged: bool = True
    covariance: Tensor | None = None
    discretization: Tensor | None = None

    def __init__(
        self,
        value: Tensor | float,
        std_error: Tensor | float,
        log_weights: Tensor | None = None,
        ess: Tensor | None = None,
        converged: bool = True,
        covariance: Tensor | None = None,
        discretization: Tensor | float | None = None,
    ) -> None:
        as_float64 = {"value": value, "std_error": std_error, "log_weights": log_weights}
        as_float64 |= {"ess": ess, "covariance": covariance, "discretization": discretization}
        like = value if isinstance(value, Tensor) else torch.zeros((), device="cpu")
        for name, given in as_float64.items():
            field = None
            if given is not None:
                field = torch.as_tensor(given, dtype=torch.float64, device=like.device)
            object.__setattr__(self, name, field)
        object.__setattr__(self, "std_error", self.std_error.expand(self.value.shape))
        object.__setattr__(self, "converged", converged)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The normal confidence interval `value -/+ z std_error` of the given level."""
        check_real("level", level, minimum=0.0, maximum=1.0)
        half = NormalDist().inv_cdf(0.5 + level / 2.0) * self.std_error
        return self.value - half, self.value + half
