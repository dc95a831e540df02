"""Partition functions: exact, and estimated from draws.

Every function returns a `LogZ`, so that exact sums and Monte Carlo estimates meet on one plot.
"""

from companion.logz.exact import enumeration

__all__ = ["enumeration"]
