"""Asymmetric targets with exact draws, one of them tempered, and bugs planted in source code."""

import inspect
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from companion.core import Kernel
from companion.inputs import draw
from companion.targets import Banana, GaussianMixture, SkewedProduct
from companion.testing import invariance_test


class TemperedSkew:
    """`beta log p~(x)` of a `SkewedProduct`: `exp(-s_i)` has a gamma law, so draws are exact."""

    def __init__(self, matrix: Tensor, beta: float) -> None:
        self.base, self.beta = SkewedProduct(matrix), beta
        rate = torch.full((len(matrix),), beta, dtype=torch.float64, device=matrix.device)
        self.law = torch.distributions.Gamma(rate, rate)

    def __call__(self, x: Tensor) -> Tensor:
        return self.beta * self.base(x)

    log_prob = __call__

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self.base.value_and_grad(x)
        return self.beta * value, self.beta * grad

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        s = -draw(self.law, n, generator=generator).log()
        return s.to(self.base.matrix) @ self.base.matrix.T


NAMES = ("skewed", "banana", "mixture", "tempered")


def target(name: str, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"):
    like = {"dtype": dtype, "device": device}
    matrix = torch.tensor([[1.0, 0.5], [-1.0, 2.0]], **like)
    if name == "skewed":
        return SkewedProduct(matrix)
    if name == "tempered":
        return TemperedSkew(matrix, beta=0.4)
    if name == "banana":
        return Banana(torch.tensor([1.5, 0.7], **like), bend=0.5)
    means = torch.tensor([[-1.5, 0.0], [1.0, 1.0]], **like)
    covariances = torch.tensor([[[1.0, 0.5], [0.5, 1.0]], [[0.5, -0.2], [-0.2, 0.3]]], **like)
    return GaussianMixture(torch.tensor([0.3, 0.7], **like), means, covariances)


def p_value(
    kernel: Kernel, law, generator: torch.Generator, *, num_chains: int = 20_000, num_steps: int = 4
) -> float:
    """Of the test that the kernel leaves the law of its exact starts as it was."""
    run = {"num_chains": num_chains, "num_steps": num_steps, "generator": generator}
    return invariance_test(kernel, law, **run).p_value


def plant(
    monkeypatch: pytest.MonkeyPatch, function: Callable, old: str, new: str, *, where=None
) -> None:
    """Replace `old` by `new` in the source of a function, there or in the module `where`."""
    home = sys.modules[function.__module__]
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in the source"
    names = dict(vars(home))
    exec(compile(source.replace(old, new), "<mutant>", "exec"), names)
    monkeypatch.setattr(where or home, function.__name__, names[function.__name__])
