"""Objectives from conditional probabilities, in which the partition function cancels.

Given all other units, a unit or a small block of units has few states, so its probability is a
ratio with a short sum. All three objectives score how well such conditionals predict the data:
`pseudolikelihood` and `generalized_pseudolikelihood` by their logarithm, `ratio_matching` by
squares. Each is consistent: with the data's whole law the true parameters are a minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from companion.inputs import check_count, check_generator
from companion.objectives.rows import check_binary_rows
from companion.testing import binary_states

__all__ = ["generalized_pseudolikelihood", "pseudolikelihood", "ratio_matching"]

_MAX_BLOCK = 12  # units of a block, whose 2^k states are evaluated for every row


def pseudolikelihood(
    model: Any, v: Tensor, *, num_units: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Negative log-pseudolikelihood of binary data (Besag 1975), without the partition function.

        - mean_v sum_i log p(v_i | v_-i),    p(v_i | v_-i) = sigmoid(log p~(v) - log p~(flip_i v))

    The *sum* over units and the *mean* over rows. It is consistent for the parameters but it is
    not the likelihood: as a monitor it can improve while the likelihood falls.

    Args:
        model: anything with `log_prob`, `(..., D) -> (...)`, of binary states.
        v: data, `(..., n, D)`, zeros and ones; leading dimensions are those of the model, whose
            batch may also share data `(n, D)`.
        num_units: with a number m < D, m units chosen at random without replacement, the same for
            all rows, stand for all, scaled by D / m: unbiased, and m / D of the cost.
        generator: source of randomness for that choice.

    Returns:
        scalar loss, the sum over leading dimensions; for all D units it costs D + 1 log-densities
        a row.

    Raises:
        ValueError: `v` is a vector, is empty, or holds anything but zeros and ones; `num_units` is
            out of range.

    Reference: Besag (1975), *Statistical analysis of non-lattice data*.

    >>> from companion.models.rbm import RBM
    >>> rbm = RBM(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> _ = rbm.W.data.zero_()                       # three fair coins: 3 log 2 nats
    >>> f"{pseudolikelihood(rbm, torch.tensor([[1, 0, 1]])).item():.4f}"
    '2.0794'
    """
    return _pseudolikelihood_rows(model, v, num_units, generator).mean(-1).sum()


def generalized_pseudolikelihood(
    model: Any, v: Tensor, blocks: Sequence[Tensor | tuple[Tensor, Tensor]]
) -> Tensor:
    """Negative log-probability of blocks of units, each given all the other units.

        - mean_v sum_B log p(v_B | v_-B)
        p(v_B | v_-B) = p~(v) / sum_u p~(u, v_-B)        over all states u of the block

    A composite likelihood. Blocks of one unit each give the pseudolikelihood, one block of all
    units gives the likelihood; blocks between them see the dependence inside a block whole. Blocks
    may overlap, and need not cover all units.

    Args:
        model: anything with `log_prob`, `(..., D) -> (...)`, of binary states.
        v: data, `(..., n, D)`, zeros and ones.
        blocks: the units of each block, integers `(k,)` with k at most 12. Where not all 2^k states
            can occur, as in the one-hot units of a label, a pair `(units, states)` lists those
            that can, `(m, k)`, each once.

    Returns:
        scalar loss, the sum over leading dimensions; it costs 2^k (or m) log-densities a row and
        block, and one more.

    Raises:
        ValueError: a bad `v`; no block; a block that is empty, has more than 12 units, names one
            twice or one that is not there; data in a state that a block does not list.

    Reference: Lindsay (1988), *Composite likelihood methods*; for one unit a block, Hyvärinen
    (2006), *Consistency of pseudolikelihood estimation of fully visible Boltzmann machines*.

    >>> from companion.models.boltzmann import BoltzmannMachine
    >>> machine = BoltzmannMachine(4, generator=torch.Generator().manual_seed(0))
    >>> v = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]])
    >>> whole = generalized_pseudolikelihood(machine, v, [torch.arange(4)])
    >>> bool(torch.isclose(whole, machine.log_z().value.float() - machine.log_prob(v).mean()))
    True
    """
    return _block_rows(model, v, blocks).mean(-1).sum()


def ratio_matching(
    model: Any, v: Tensor, *, num_units: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Ratio matching of binary data (Hyvärinen 2007), without the partition function.

        mean_v sum_i g_i(v)^2,      g_i(v) = p(flip_i v) / (p(v) + p(flip_i v)) = 1 - p(v_i | v_-i)

    It was derived by matching the model's ratios p(flip_i v) / p(v) to the data's, mapped to (0, 1)
    by `u -> 1 / (1 + u)`; what is left of the squared distance, up to a constant of the data, is
    this. So it is the quadratic score of the same conditionals of which the pseudolikelihood is the
    logarithmic score: also minimal at the truth, but bounded. A state that the model
    holds for nearly impossible costs at most 1 a unit, and its gradient vanishes.

    Args:
        model: anything with `log_prob`, `(..., D) -> (...)`, of binary states.
        v: data, `(..., n, D)`, zeros and ones.
        num_units: as in `pseudolikelihood`.
        generator: source of randomness for the choice of units.

    Returns:
        scalar loss, the sum over leading dimensions, at the cost of the pseudolikelihood.

    Raises:
        ValueError: as `pseudolikelihood`.

    Reference: Hyvärinen (2007), *Some extensions of score matching*.

    >>> from companion.models.rbm import RBM
    >>> rbm = RBM(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> _ = rbm.W.data.zero_()                       # three fair coins: 3 (1/2)^2
    >>> f"{ratio_matching(rbm, torch.tensor([[1, 0, 1]])).item():.4f}"
    '0.7500'
    """
    return _ratio_rows(model, v, num_units, generator).mean(-1).sum()


def _pseudolikelihood_rows(
    model: Any, v: Tensor, num_units: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The row's values, `(..., n)`."""
    log_odds = _log_odds(model, v, num_units, generator)
    return -v.shape[-1] * logsigmoid(log_odds).mean(0)


def _ratio_rows(
    model: Any, v: Tensor, num_units: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    log_odds = _log_odds(model, v, num_units, generator)
    return v.shape[-1] * torch.sigmoid(-log_odds).square().mean(0)


def _log_odds(
    model: Any, v: Tensor, num_units: int | None, generator: torch.Generator | None
) -> Tensor:
    """`log p(v_i | v_-i) / p(1 - v_i | v_-i)` of all units or of some, `(units, ..., n)`."""
    check_binary_rows(v)
    check_generator(generator, v.device)
    num_visible = v.shape[-1]
    units = torch.arange(num_visible, device=v.device)
    if num_units is not None:
        if check_count("num_units", num_units) > num_visible:
            raise ValueError(f"num_units is {num_units} but v has only {num_visible} units")
        units = torch.randperm(num_visible, generator=generator, device=v.device)[:num_units]
    log_prob = model.log_prob(v)
    v = v.expand(*log_prob.shape, num_visible)  # a batch of models may share its data
    flip = torch.zeros(len(units), num_visible, dtype=torch.bool, device=v.device)
    flip.scatter_(1, units[:, None], True)
    flip = flip.view(len(units), *[1] * (v.ndim - 1), num_visible)
    flipped = torch.where(flip, v == 0, v != 0).to(v.dtype)
    return log_prob - model.log_prob(flipped)


def _block_rows(model: Any, v: Tensor, blocks: Sequence[Tensor | tuple[Tensor, Tensor]]) -> Tensor:
    check_binary_rows(v)
    listed = [_block(block, v) for block in blocks]
    if not listed:
        raise ValueError("blocks is empty: there is no unit to predict")
    log_prob = model.log_prob(v)
    v = v.expand(*log_prob.shape, v.shape[-1])  # a batch of models may share its data
    total = torch.zeros_like(log_prob)
    for units, states in listed:  # blocks may differ in size
        others = v.repeat(len(states), *[1] * v.ndim)
        others[..., units] = states.view(len(states), *[1] * (v.ndim - 1), -1)
        total = total + model.log_prob(others).logsumexp(0) - log_prob
    return total


def _block(block: Tensor | tuple[Tensor, Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
    """The units and the states of a block, on the device of `v` and in its dtype."""
    listed = isinstance(block, tuple) and len(block) == 2 and torch.as_tensor(block[1]).ndim > 0
    given, states = block if listed else (block, None)
    units = torch.as_tensor(given, device=v.device)
    if units.ndim != 1 or not len(units) or units.is_floating_point():
        raise ValueError(f"a block must be a vector of unit numbers, got {given!r}")
    if len(torch.unique(units)) < len(units) or units.min() < 0 or units.max() >= v.shape[-1]:
        raise ValueError(
            f"a block must name units 0 to {v.shape[-1] - 1}, each once, got {units.tolist()}"
        )
    if states is None:
        if len(units) > _MAX_BLOCK:
            raise ValueError(
                f"a block's 2^k states are evaluated for every row: k may be {_MAX_BLOCK} at most, "
                f"got {len(units)}; take smaller blocks, or list the states that can occur"
            )
        return units, binary_states(len(units), device=v.device).to(v.dtype)
    states = torch.as_tensor(states, device=v.device).to(v.dtype)
    if states.ndim != 2 or states.shape[1] != len(units):
        raise ValueError(f"states must be (m, {len(units)}), got {tuple(states.shape)}")
    if len(torch.unique(states, dim=0)) < len(states):
        raise ValueError("a block's states must be listed once; some are listed twice")
    found = (v[..., None, units] == states).all(-1).any(-1)
    if not found.all():
        first = tuple(torch.nonzero(~found)[0].tolist())
        raise ValueError(
            f"row {first} is in a state that its block does not list: {v[first][units].tolist()}"
        )
    return units, states
