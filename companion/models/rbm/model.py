"""The machine: its energies, its exact partition function, and block Gibbs sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from companion.core import LogZ
from companion.inputs import check_count, check_generator, check_real
from companion.models.rbm import likelihood
from companion.models.rbm.sums import log_sum_states
from companion.models.rbm.units import check_binary, small_weights, softplus

if TYPE_CHECKING:
    from companion.models.rbm.annealing import RBMPath

__all__ = ["RBM", "bernoulli", "dot", "row"]


class RBM(nn.Module):
    """A Bernoulli-Bernoulli restricted Boltzmann machine (Smolensky 1986; Hinton 2002).

    Weights start as independent normal draws of standard deviation 0.01 and biases at 0 (Hinton
    2010, section 8); `init_visible_bias` then sets b from data, which spares the first epochs.

    Args:
        num_visible: D, the number of visible units.
        num_hidden: H, the number of hidden units.
        batch_shape: of a batch of machines that are trained or sampled side by side, say `(10,)`
            for ten seeds; empty for a single machine.
        generator: source of randomness for the weights.
        device: where the parameters live.
        dtype: floating type of the parameters.

    Attributes:
        W: weights, `(*batch_shape, num_visible, num_hidden)`.
        b: visible biases, `(*batch_shape, num_visible)`.
        c: hidden biases, `(*batch_shape, num_hidden)`.

    All methods take states with any leading dimensions; boolean and integer states are cast to the
    dtype of W, another floating dtype is an error. For a batch of machines states are
    `(..., *batch_shape, n, units)`, or `(n, units)` where all machines get the same ones; what
    comes back is `(..., *batch_shape, n)`. `unbind` takes the batch apart.

    >>> rbm = RBM(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> v = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    >>> log_likelihood = rbm.log_prob(v) - rbm.log_z().value
    >>> log_likelihood.shape, bool((log_likelihood < 0).all())
    (torch.Size([2]), True)
    """

    def __init__(
        self,
        num_visible: int,
        num_hidden: int,
        *,
        batch_shape: Sequence[int] = (),
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_visible = check_count("num_visible", num_visible)
        self.num_hidden = check_count("num_hidden", num_hidden)
        self.batch_shape = tuple(check_count("batch_shape", size) for size in batch_shape)
        shape = (*self.batch_shape, num_visible, num_hidden)
        self.W = small_weights(*shape, generator=generator, device=device, dtype=dtype)
        self._make_biases(self.W.new_zeros(shape[:-1]), self.W.new_zeros(*shape[:-2], num_hidden))

    def _make_biases(self, b: Tensor, c: Tensor) -> None:
        self.b, self.c = nn.Parameter(b), nn.Parameter(c)

    @torch.no_grad()
    def init_visible_bias(self, v: Tensor, *, smoothing: float = 1.0) -> None:
        """Set b to the log-odds of the data's unit means, so that W = 0 models independent units.

        Args:
            v: data, `(..., num_visible)`; for a batch of machines `(*batch_shape, n, num_visible)`
                or the same `(n, num_visible)` for all.
            smoothing: this many imaginary ones and as many zeros are added to each unit's count
                (Laplace smoothing), so that a unit that is never on keeps a finite bias.
        """
        check_real("smoothing", smoothing, minimum=0.0)
        v = self._check_units("v", v, self.num_visible)
        if not self.batch_shape:
            v = v.reshape(-1, self.num_visible)
        rows = (*range(v.ndim - 2 - len(self.batch_shape)), v.ndim - 2)  # those of one machine
        total = math.prod(v.shape[i] for i in rows) + 2.0 * smoothing
        counts = v.sum(rows, dtype=torch.float64) + smoothing  # 16 bits do not hold a count
        self._set_visible_bias(counts / total)

    def _set_visible_bias(self, mean: Tensor) -> None:
        self.b.copy_(torch.logit(mean))

    def unbind(self) -> list[RBM]:
        """The machines of a batch, one by one, each with a copy of its own parameters."""
        return [self._member(i) for i in range(math.prod(self.batch_shape))]

    @torch.no_grad()
    def _member(self, i: int) -> RBM:
        member = type(self)(
            self.num_visible,
            self.num_hidden,
            generator=torch.Generator(self.W.device),  # leaves the global one alone
            device=self.W.device,
            dtype=self.W.dtype,
        )
        num_batch = len(self.batch_shape)
        state = {
            name: (x if num_batch == 0 else x.flatten(0, num_batch - 1)[i]).clone()
            for name, x in self.state_dict().items()
        }
        member.load_state_dict(state)
        return member

    # ------------------------------------------------------------ energies

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        """The joint energy `E(v, h)`, `(..., D), (..., H) -> (...)`; low energy is likely."""
        v = self._check_units("v", v, self.num_visible)
        h = self._check_units("h", h, self.num_hidden)
        return -dot(v, self.b) - dot(h, self.c) - ((v @ self.W) * h).sum(-1)

    def free_energy(self, v: Tensor) -> Tensor:
        """The free energy `F(v) = -log sum_h exp(-E(v, h))`, `(..., D) -> (...)`."""
        v = self._check_units("v", v, self.num_visible)
        return -dot(v, self.b) - softplus(row(self.c) + v @ self.W).sum(-1)

    def log_prob(self, v: Tensor) -> Tensor:
        """The unnormalised log-probability `-F(v)`, `(..., D) -> (...)`; subtract `log_z`."""
        return -self.free_energy(v)

    @torch.no_grad()
    def log_z(self) -> LogZ:
        """The exact log partition function, by summing over the states of the smaller layer.

        The sum runs over blocks of states: the pre-activations of a block are those of a table of
        all patterns of the first few units plus one row for the other units, so memory stays
        bounded and no product is computed twice. No gradient passes through.

        Returns:
            an exact `LogZ` (standard error 0), of the shape of the batch.

        Raises:
            ValueError: the smaller layer has more than 25 units.
        """
        return LogZ(self.log_normalizer(), 0.0)

    def log_normalizer(self) -> Tensor:
        """`log_z().value` as a function of the parameters that can be differentiated.

        By it `companion.objectives.maximum_likelihood` is exact.

        Raises:
            ValueError: the smaller layer has more than 16 units.
        """
        weights: Tensor = self.W
        own, other = self.b, self.c
        if self.num_hidden < self.num_visible:  # sum over h instead of v; v sums out in closed form
            weights, own, other = weights.mT, other, own
        return log_sum_states(weights, own, other, lambda inputs: softplus(inputs).sum(-1))

    log_likelihood = likelihood.log_likelihood

    # ------------------------------------------------------------ conditionals and sampling

    def hidden_probs(self, v: Tensor) -> Tensor:
        """`P(h_j = 1 | v)` for every hidden unit, `(..., D) -> (..., H)`."""
        v = self._check_units("v", v, self.num_visible)
        return torch.sigmoid(row(self.c) + v @ self.W)

    def visible_probs(self, h: Tensor) -> Tensor:
        """`P(v_i = 1 | h)` for every visible unit, `(..., H) -> (..., D)`."""
        h = self._check_units("h", h, self.num_hidden)
        return torch.sigmoid(row(self.b) + h @ self.W.mT)

    @torch.no_grad()
    def sample_hidden(self, v: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A draw of `h` given `v`, `(..., D) -> (..., H)`, zeros and ones in W's dtype."""
        check_generator(generator, self.W.device)
        return bernoulli(self.hidden_probs(v), generator)

    @torch.no_grad()
    def sample_visible(self, h: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A draw of `v` given `h`, `(..., H) -> (..., D)`, zeros and ones in W's dtype."""
        check_generator(generator, self.W.device)
        return bernoulli(self.visible_probs(h), generator)

    @torch.no_grad()
    def gibbs(
        self, v: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`num_steps` sweeps of block Gibbs sampling, each `h` given `v`, then `v` given `h`.

        A sweep leaves p(v) invariant and is reversible with respect to it.

        Args:
            v: current visible states, `(..., D)`.
            num_steps: number of sweeps, at least 1.
            generator: source of randomness, on W's device.

        Returns:
            new visible states, `(..., D)`, without gradient; `v` is left as it is.

        Raises:
            ValueError, TypeError: `v` is no batch of visible states, or a count is out of range.
        """
        check_count("num_steps", num_steps)
        check_generator(generator, self.W.device)
        v = self._check_units("v", v, self.num_visible)
        for _ in range(num_steps):
            h = bernoulli((v @ self.W).add_(row(self.c)).sigmoid_(), generator)
            v = bernoulli((h @ self.W.mT).add_(row(self.b)).sigmoid_(), generator)
        return v

    def contrastive_step(
        self,
        v: Tensor,
        num_steps: int = 1,
        hidden_probs: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a contrastive update and its chains, in one call with the fewest products.

        An update by one sweep costs five products of a batch with W, where sampling, weighing and
        differentiating one after the other cost six.

        Args:
            v: a mini-batch of data, `(n, D)`, or as the batch of machines needs it.
            num_steps: k, number of Gibbs sweeps; all but the first cost two products.
            hidden_probs: where persistent chains go on, `P(h = 1 | x)` as the last call returned
                it, `(..., m, H)`; None starts chains at the data.
            generator: source of randomness, on W's device.

        Returns:
            the scalar loss `mean log p~(x) - mean log p~(v)`, summed over a batch of machines and
            ready for `backward()`; the particles `x`, `(..., m, D)`; and `P(h = 1 | x)`,
            `(..., m, H)`.

        Raises:
            ValueError, TypeError: as `gibbs`.
        """
        from companion.models.rbm.phases import contrastive_step  # which imports this module

        return contrastive_step(self, v, num_steps, hidden_probs, generator=generator)

    def contrastive_update(
        self,
        v: Tensor,
        rate: float,
        num_steps: int = 1,
        hidden_probs: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Learn from a mini-batch: one step of plain gradient descent on `contrastive_step`'s loss.

        What that loss, `backward()` and a step of `torch.optim.SGD` do, but quicker: no loss is
        worked out, the products that make the gradient go straight into the parameters, and in
        single precision a coin takes 16 random bits (so the particles are other draws than those of
        `contrastive_step` by the same generator). No `grad` is read or written, and all parameters
        move, whether or not they require one.

        Args:
            v: a mini-batch of data, as for `contrastive_step`; so are `num_steps`, `hidden_probs`
                and `generator`.
            rate: the learning rate, above 0. For a batch of machines the rate of each, not divided
                by their number.

        Returns:
            the particles `x`, `(..., m, D)`, and `P(h = 1 | x)`, `(..., m, H)`, as they were before
            the parameters moved.

        Raises:
            FloatingPointError: a parameter is NaN or infinite; none has changed.
            ValueError, TypeError: as `gibbs`, or the rate is out of range.

        >>> rbm = RBM(4, 2, generator=torch.Generator().manual_seed(0))
        >>> v = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
        >>> x, probs = rbm.contrastive_update(v, 0.1, generator=torch.Generator().manual_seed(1))
        >>> x.shape, probs.shape
        (torch.Size([2, 4]), torch.Size([2, 2]))
        """
        from companion.models.rbm.phases import contrastive_update  # which imports this module

        return contrastive_update(self, v, rate, num_steps, hidden_probs, generator=generator)

    def _centre(self, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The states of both layers as their products make W's gradient."""
        return v, hidden

    def annealing_path(self, base_bias: Tensor | None = None) -> RBMPath:
        """The path from independent units to this machine, with exact conditionals.

        Args:
            base_bias: visible biases of the base, `(D,)`. None takes zeros: the path then only
                tempers the energy. To estimate log Z of a machine that has learned data, the
                log-odds of the data's unit means are a better start (`init_visible_bias` computes
                them).

        Returns:
            An `RBMPath`. It looks at the machine as it is at the time of each call.

        >>> rbm = RBM(6, 4, generator=torch.Generator().manual_seed(0))
        >>> path = rbm.annealing_path()
        >>> path.step(path.sample_base(3), 0.5).shape
        torch.Size([3, 6])
        """
        from companion.models.rbm.annealing import RBMPath  # which imports this module

        return RBMPath(self, base_bias)

    @torch.no_grad()
    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws from independent units with the visible biases alone, `(*batch_shape, n, D)`.

        This is where Markov chains start: the machine's law if W were 0.
        """
        check_count("n", n)
        check_generator(generator, self.W.device)
        probs = torch.sigmoid(self.b)[..., None, :]
        return bernoulli(probs.expand(*self.batch_shape, n, -1), generator)

    # ------------------------------------------------------------ input checks

    def _check_units(self, name: str, x: Tensor, num_units: int) -> Tensor:
        """Return `x` in W's dtype, or say why it is no batch of states of `num_units` units."""
        x = check_binary(name, x, num_units, self.W)
        if self.batch_shape:
            self._check_batch(name, x)
        return x

    def _check_batch(self, name: str, x: Tensor) -> None:
        batch, given = self.batch_shape, tuple(x.shape[:-2])
        if x.ndim < 2 or (given and given[-len(batch) :] != batch):
            raise ValueError(
                f"{name} must be (n, {x.shape[-1]}), the same states for all machines, or (..., "
                f"{', '.join(map(str, batch))}, n, {x.shape[-1]}) for a batch of machines of shape "
                f"{batch}; got {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        """Sizes, for `print(rbm)`."""
        batch = f", batch_shape={self.batch_shape}" if self.batch_shape else ""
        return f"num_visible={self.num_visible}, num_hidden={self.num_hidden}{batch}"


def bernoulli(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Zeros and ones with the given probabilities: three times as fast as `torch.bernoulli`."""
    # In 16 bits uniform numbers are multiples of 1/256 or so, and rare units would be on too often.
    dtype = probs.dtype if probs.dtype.itemsize > 2 else torch.float32
    noise = torch.rand(probs.shape, generator=generator, device=probs.device, dtype=dtype)
    # In place: as quick as `noise < probs` without the mask and its conversion.
    return noise.lt_(probs).to(probs.dtype)


def row(bias: Tensor) -> Tensor:
    """A bias as it is added to states: for a batch of machines the same for all rows."""
    return bias if bias.ndim == 1 else bias[..., None, :]


def dot(x: Tensor, bias: Tensor) -> Tensor:
    """The product of states and a bias, `(..., n, units), (*batch, units) -> (..., *batch, n)`."""
    return x @ bias if bias.ndim == 1 else (x @ bias[..., None])[..., 0]
