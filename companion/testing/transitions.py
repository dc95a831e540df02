"""The transition matrix of a kernel on finitely many states, exact, from the kernel's own code.

A statistical test sees an error only if it is large enough. On a small state space there is a
sharper one: `transition_matrix` runs the kernel once for every combination of outcomes of its
random choices and adds up their probabilities, so that invariance and detailed balance can be
checked to round-off (`companion.testing.finite_chains`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from companion.core import Kernel
from companion.inputs import check_finite

__all__ = ["transition_matrix"]

_MAX_RUNS = 2**16
_MIN_CHAINS = 1009  # more than any other dimension is likely to have: see `_Replay`


@torch.no_grad()
def transition_matrix(kernel: Kernel, states: Tensor) -> Tensor:
    """The exact transition matrix of a kernel on a finite set of states.

    All states are run as one batch of chains, once for every combination of outcomes of the random
    choices that one chain makes. All chains follow the same combination, each with its own
    probability w, and `P[i, j]` is the sum of w over those that lead from i to j. A sweep over n
    bits takes 2^n runs.

    The kernel may choose by

    - `torch.rand(...) < p`, where p may differ from chain to chain (or `<=`, `>`, `>=`): a choice
      of two. The same uniform number may be compared again, as in a choice among several.
    - `torch.randint`, `torch.multinomial`, `torch.bernoulli`.

    It is given no generator. A uniform number may be indexed and reshaped before it is compared,
    but no arithmetic is possible: write `u < p` for `u.log() < p.log()`.

    Args:
        kernel: the Markov kernel; `x` is a batch `(chains, *event)`.
        states: all states, each once, `(m, *event)`, where `kernel.init` is defined.

    Returns:
        P, `(m, m)`, float64, on the device of `states`. Its entries are as exact as the kernel's
        own probabilities: give float64 states. One step from `init` is what it describes: a stale
        log-density that a state hands to the next step does not show.

    Raises:
        ValueError: another use of a uniform number, another source of randomness of PyTorch
            (`torch.randn`; those of NumPy or Python are not seen), more than 65,536 combinations, a
            move to a state that is not listed, or a state that is listed twice.

    >>> from types import SimpleNamespace as State
    >>> def step(state, *, generator):          # forwards round a ring of three, or wait
    ...     u = torch.rand(len(state.x), generator=generator)
    ...     return State(x=torch.where(u < 0.25, (state.x + 1) % 3, state.x)), None
    >>> transition_matrix(Kernel(lambda x: State(x=x), step), torch.arange(3))
    tensor([[0.7500, 0.2500, 0.0000],
            [0.0000, 0.7500, 0.2500],
            [0.2500, 0.0000, 0.7500]], dtype=torch.float64)
    """
    check_finite("states", states)
    m = len(states)
    flat = states.reshape(m, -1)
    if len(torch.unique(flat, dim=0)) < m:
        raise ValueError("states must list every state once; some are listed twice")
    # Copies of the first state fill the batch up to a length that no other dimension has.
    batch = torch.cat([states, states[:1].expand(max(1, _MIN_CHAINS - m), *states.shape[1:])])
    replay = _Replay(batch)
    matrix = torch.zeros(m, m, dtype=torch.float64, device=states.device)
    sources: list[Any] = [torch, torch.cuda] if states.is_cuda else [torch]
    seeds = [source.get_rng_state() for source in sources]
    while not replay.done:
        start = kernel.init(batch.clone())
        with replay:
            end, _ = kernel.step(start, generator=None)
        if not all(map(torch.equal, seeds, [source.get_rng_state() for source in sources])):
            for source, seed in zip(sources, seeds, strict=True):
                source.set_rng_state(seed)
            raise ValueError(
                "the kernel draws random numbers whose outcomes cannot be enumerated; use "
                "torch.rand(...) < p, torch.randint, torch.multinomial or torch.bernoulli"
            )
        if end.x.shape != batch.shape:
            raise ValueError(
                f"the kernel turned shape {tuple(batch.shape)} into {tuple(end.x.shape)}"
            )
        weight = replay.weight[:m]
        found = (end.x[:m].reshape(m, 1, -1) == flat).all(-1)  # (from, to)
        stray = (weight > 0) & ~found.any(1)
        if stray.any():
            i = int(stray.nonzero()[0])
            raise ValueError(
                f"the kernel goes from {states[i].tolist()} to {end.x[i].tolist()}, which is not "
                "among the states"
            )
        matrix += weight[:, None] * found
        replay.advance()
    return matrix


class _Uniform(Tensor):
    """Uniform numbers that are not decided yet. Its entries are not their values but the rows in
    which `_Replay` keeps what is known of them, so that indexing and reshaping need no care."""


_LESS = {"lt", "lt_", "le", "less", "less_equal"}
_GREATER = {"gt", "gt_", "ge", "greater", "greater_equal"}
_RESHAPING = {"__get__", "__getitem__", "__len__", "size", "dim", "numel", "clone", "detach"}
_RESHAPING |= {"view", "view_as", "reshape", "flatten", "unflatten", "expand", "expand_as"}
_RESHAPING |= {"unsqueeze", "squeeze", "movedim", "transpose", "permute", "select", "gather"}
_RESHAPING |= {"unbind", "split", "tensor_split", "chunk"}


class _Replay(TorchFunctionMode):
    """Inside the block, random functions follow one combination of outcomes; `advance` goes on to
    the next. Depth first: the last choice that has an outcome left takes it.

    Chains are told apart from other dimensions by their number. A tensor without that dimension is
    shared by all chains.
    """

    def __init__(self, batch: Tensor) -> None:
        super().__init__()
        self.num_chains, self.device = len(batch), batch.device
        self.path: list[list[int]] = []  # at each choice the outcomes left, the present one first
        self.num_runs, self.done = 0, False
        self._restart()

    def _restart(self) -> None:
        self.depth = 0
        self.weight = torch.ones(self.num_chains, dtype=torch.float64, device=self.device)
        # Between which limits each uniform number lies, as far as is known, (numbers, chains).
        self.low = self.high = self.weight.new_zeros(0, self.num_chains)

    def advance(self) -> None:
        """Prepare the next combination of outcomes, or set `done`."""
        self.num_runs += 1
        while self.path and len(self.path[-1]) == 1:
            self.path.pop()
        self.done = not self.path
        if self.path:
            self.path[-1].pop(0)
        self._restart()

    def choose(self, probs: Tensor) -> int:
        """The outcome that this run takes, of those with the probabilities `(k, chains)`."""
        weights = self.weight * probs
        if self.depth == len(self.path):
            self.path.append(weights.any(1).nonzero()[:, 0].tolist())
            if self.num_runs + math.prod(map(len, self.path)) > _MAX_RUNS:
                raise ValueError(
                    f"the kernel's random choices have more than {_MAX_RUNS} combinations; take "
                    "fewer states, or a kernel that makes fewer choices a step"
                )
        outcome = self.path[self.depth][0]
        self.depth += 1
        self.weight = weights[outcome]
        return outcome

    def by_chain(self, x: Tensor) -> Tensor:
        """What each chain sees, `(entries, chains)`, in order."""
        axes = [i for i, size in enumerate(x.shape) if size == self.num_chains]
        if len(axes) > 1:
            raise ValueError(f"cannot tell which dimension of {tuple(x.shape)} counts the chains")
        if not axes:
            return x.reshape(-1, 1).expand(-1, self.num_chains)
        return x.movedim(axes[0], -1).reshape(-1, self.num_chains)

    def for_all_chains(self, values: Sequence[float], shape: Sequence[int]) -> Tensor:
        """The inverse of `by_chain` for values that are the same in all chains."""
        one = [1 if size == self.num_chains else size for size in shape]
        return (
            torch.tensor(values, device=self.device).reshape(one).expand(torch.Size(shape)).clone()
        )

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Fresh uniform numbers on [0, 1)."""
        first, count = len(self.low), math.prod(n for n in shape if n != self.num_chains)
        fresh = self.low.new_zeros(count, self.num_chains)
        self.low, self.high = torch.cat([self.low, fresh]), torch.cat([self.high, fresh + 1.0])
        rows = [float(first + i) for i in range(count)]
        return self.for_all_chains(rows, shape).double().as_subclass(_Uniform)

    def compare(self, u: Tensor, p: Any, is_less: bool) -> Tensor:
        """`u < p` if `is_less`, else `u > p`: one choice an entry, given what is known of u."""
        u, p = u.as_subclass(Tensor), torch.as_tensor(p, dtype=torch.float64, device=self.device)
        shape = (u + p).shape
        rows = self.by_chain(u.expand(shape)).long()[:, None]
        outcomes = []
        for row, limit in zip(rows, self.by_chain(p.expand(shape))[:, None], strict=True):
            low, high = self.low.gather(0, row), self.high.gather(0, row)
            below = ((limit - low) / (high - low)).clamp(0.0, 1.0)
            true = (below if is_less else 1.0 - below).nan_to_num(0.0)  # NaN compares as false
            outcomes.append(bool(self.choose(torch.cat([1.0 - true, true]))))
            if outcomes[-1] == is_less:
                self.high.scatter_(0, row, torch.fmin(high, limit))
            else:
                self.low.scatter_(0, row, torch.fmax(low, limit))
        return self.for_all_chains(outcomes, shape)

    def categorical(self, probs: Tensor) -> Tensor:
        """Integers with the probabilities in the last dimension, `(*shape, k) -> (*shape)`."""
        choices = torch.stack([self.by_chain(p) for p in probs.double().unbind(-1)], 1)
        return self.for_all_chains([self.choose(p) for p in choices], probs.shape[:-1])

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in (torch.rand, torch.rand_like):
            return self.uniform(_on_meta(func, args, kwargs).shape)
        if func is torch.randint:
            result = _on_meta(func, args, kwargs)
            ends = [*args, kwargs.get("low"), kwargs.get("high")]
            low, high = [0, *(end for end in ends if isinstance(end, int))][-2:]
            probs = self.weight.new_full((high - low,), 1.0 / (high - low))
            return low + self.categorical(probs.expand(*result.shape, -1)).to(result.dtype)
        if name == "multinomial":
            return self._multinomial(*args, **kwargs)
        if name == "bernoulli" and len(args) == 1:
            return self.compare(self.uniform(args[0].shape), args[0], True).to(args[0].dtype)
        operands = [arg for arg in args if isinstance(arg, _Uniform)]
        if name in _LESS | _GREATER and len(operands) == 1:
            is_first = operands[0] is args[0]
            return self.compare(operands[0], args[is_first], is_first == (name in _LESS))
        if _Uniform in types and name not in _RESHAPING:
            raise ValueError(
                f"the kernel uses a uniform random number in {name}(); to enumerate its outcomes "
                "it must be compared with a probability, as in torch.rand(...) < p"
            )
        return func(*args, **kwargs)

    def _multinomial(
        self, probs: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None
    ) -> Tensor:
        if num_samples > 1 and not replacement:
            raise ValueError("torch.multinomial without replacement cannot be enumerated")
        probs = probs.double() / probs.double().sum(-1, keepdim=True)
        return self.categorical(probs[..., None, :].expand(*probs.shape[:-1], num_samples, -1))


def _on_meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The result of a random function without its numbers: shape and dtype."""
    kwargs = {key: value for key, value in kwargs.items() if key != "generator"}
    return func(*args, **{**kwargs, "device": "meta"})
