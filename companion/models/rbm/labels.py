"""The machine of data and labels: binary visible units and one softmax unit.

    E(x, y, h) = - b.x - d_y - c.h - x.W.h - U_y.h

It models the joint law of a binary vector x and its label y in 0..K-1. The hidden units sum out in
closed form, so p(y | x) is exact: the machine is a classifier as well as a generator of either
given the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from companion.core import LogZ
from companion.inputs import check_count, check_generator, check_real
from companion.models.rbm import likelihood
from companion.models.rbm.model import bernoulli
from companion.models.rbm.sums import log_sum_states
from companion.models.rbm.units import (
    categorical,
    check_binary,
    check_whole,
    small_weights,
    softplus,
)

if TYPE_CHECKING:
    from companion.models.rbm.relatives import LabelRBMPath

__all__ = ["LabelRBM"]


class LabelRBM(nn.Module):
    """A restricted Boltzmann machine of binary units and a label (Hinton, Osindero and Teh 2006).

    A joint state is the concatenation `v = [x, one-hot(y)]`, `(..., D + K)`, made by `join` and
    taken apart by `split`, so objectives and samplers take it as they take states of an `RBM`. The
    label's units are one unit of K states, though, not K binary ones: an objective that flips
    single binary units (pseudolikelihood, ratio matching) would leave the states that exist and is
    refused with a sentence. `generalized_pseudolikelihood` takes the label as a block,
    `(D + arange(K), eye(K))`.

    Three ways to learn, after Larochelle and Bengio (2008): *generative*, the likelihood of (x, y)
    (`contrastive_divergence`, `PersistentChains`); *discriminative*, the cross-entropy
    `nll_loss(rbm.class_log_probs(x), labels)`, whose gradient is exact; or a weighted sum of both.

    Weights start as independent normal draws of standard deviation 0.01 and biases at 0;
    `init_from_data` sets the visible biases.

    Args:
        num_visible: D, the number of binary visible units.
        num_labels: K, the number of labels, at least 2.
        num_hidden: H, the number of hidden units.
        generator: source of randomness for the weights.
        device: where the parameters live.
        dtype: floating type of the parameters.

    Attributes:
        W: weights of x, `(num_visible, num_hidden)`.
        b: biases of x, `(num_visible,)`.
        c: hidden biases, `(num_hidden,)`.
        U: weights of the label, `(num_labels, num_hidden)`.
        d: biases of the label, `(num_labels,)`.

    All methods take states with any leading dimensions.

    Reference: Larochelle and Bengio (2008), *Classification using discriminative restricted
    Boltzmann machines*.

    >>> rbm = LabelRBM(4, 3, 2, generator=torch.Generator().manual_seed(0))
    >>> x, labels = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]), torch.tensor([2, 0])
    >>> rbm.join(x, labels)
    tensor([[1., 0., 1., 0., 0., 0., 1.],
            [0., 0., 0., 1., 1., 0., 0.]])
    >>> torch.nn.functional.nll_loss(rbm.class_log_probs(x), labels).backward()
    >>> rbm.U.grad.shape, rbm.b.grad                       # p(y | x) does not depend on b
    (torch.Size([3, 2]), None)
    """

    def __init__(
        self,
        num_visible: int,
        num_labels: int,
        num_hidden: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_visible = check_count("num_visible", num_visible)
        self.num_labels = check_count("num_labels", num_labels, minimum=2)
        self.num_hidden = check_count("num_hidden", num_hidden)
        self.W = small_weights(
            num_visible, num_hidden, generator=generator, device=device, dtype=dtype
        )
        self.U = small_weights(
            num_labels, num_hidden, generator=generator, device=device, dtype=dtype
        )
        self.b = nn.Parameter(self.W.new_zeros(num_visible))
        self.c = nn.Parameter(self.W.new_zeros(num_hidden))
        self.d = nn.Parameter(self.W.new_zeros(num_labels))

    @torch.no_grad()
    def init_from_data(self, v: Tensor, *, smoothing: float = 1.0) -> None:
        """Set b to the log-odds of the data's unit means, d to the log-frequencies of the labels.

        Args:
            v: joint states, `(n, D + K)`.
            smoothing: so many imaginary rows are added for each state of each unit, so that a unit
                that is never on and a label that never occurs keep finite biases.
        """
        check_real("smoothing", smoothing, minimum=0.0)
        v = self._check_visible(v).reshape(-1, self.num_visible + self.num_labels)
        counts = v.sum(0, dtype=torch.float64) + smoothing  # 16 bits do not hold a count
        units, labels = counts[: self.num_visible], counts[self.num_visible :]
        self.b.copy_(torch.logit(units / (len(v) + 2.0 * smoothing)))
        self.d.copy_((labels / labels.sum()).log())

    # ------------------------------------------------------------ joint states

    def join(self, x: Tensor, labels: Tensor) -> Tensor:
        """The joint states `[x, one-hot(y)]`, `(..., D), (...) -> (..., D + K)`, in W's dtype.

        Raises:
            ValueError, TypeError: `x` is no batch of binary states, `labels` has other leading
                dimensions, or holds anything but the integers 0..K-1.
        """
        x = check_binary("x", x, self.num_visible, self.W)
        labels = self._check_labels(labels)
        if labels.shape != x.shape[:-1]:
            raise ValueError(
                f"labels must have shape {tuple(x.shape[:-1])}, one for each state of x, got "
                f"{tuple(labels.shape)}"
            )
        return self._join(x, labels)

    def split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of joint states, `(..., D + K)`: x, `(..., D)`, and labels, `(...)`, int64."""
        v = self._check_visible(v)
        return v[..., : self.num_visible], v[..., self.num_visible :].argmax(-1)

    # ------------------------------------------------------------ energies

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        """The joint energy `E(x, y, h)`, `(..., D + K), (..., H) -> (...)`."""
        v = self._check_visible(v)
        h = check_binary("h", h, self.num_hidden, self.W)
        weights, bias = self._visible_parameters()
        return -(v @ bias) - h @ self.c - ((v @ weights) * h).sum(-1)

    def free_energy(self, v: Tensor) -> Tensor:
        """The free energy `F(x, y) = -log sum_h exp(-E(x, y, h))`, `(..., D + K) -> (...)`."""
        v = self._check_visible(v)
        weights, bias = self._visible_parameters()
        return -(v @ bias) - softplus(self.c + v @ weights).sum(-1)

    def log_prob(self, v: Tensor) -> Tensor:
        """The unnormalised log-probability `-F(x, y)`, `(..., D + K) -> (...)`."""
        return -self.free_energy(v)

    def class_log_probs(self, x: Tensor) -> Tensor:
        """`log p(y | x)` of every label, `(..., D) -> (..., K)`, exact and differentiable.

            log p(y | x) = d_y + sum_j softplus(c_j + (x.W)_j + U_yj) - log of the sum over labels

        Memory is a tensor `(..., K, H)`.
        """
        x = check_binary("x", x, self.num_visible, self.W)
        inputs = (self.c + x @ self.W)[..., None, :] + self.U
        return (self.d + softplus(inputs).sum(-1)).log_softmax(-1)

    @torch.no_grad()
    def log_z(self) -> LogZ:
        """The exact log partition function, by summing over the states of the hidden layer.

        The visible layer is summed out in closed form. No gradient passes through.

        Returns:
            an exact `LogZ` (standard error 0).

        Raises:
            ValueError: there are more than 25 hidden units.
        """
        return LogZ(self.log_normalizer(), 0.0)

    def log_normalizer(self) -> Tensor:
        """`log_z().value` as a scalar that can be differentiated, float64.

        By it `companion.objectives.maximum_likelihood` is exact.

        Raises:
            ValueError: there are more than 16 hidden units.
        """
        weights, bias = self._visible_parameters()

        def sum_out(inputs: Tensor) -> Tensor:
            x, label = inputs[:, : self.num_visible], inputs[:, self.num_visible :]
            return softplus(x).sum(-1) + label.logsumexp(-1)

        return log_sum_states(weights.T, self.c, bias, sum_out)

    log_likelihood = likelihood.log_likelihood

    # ------------------------------------------------------------ conditionals and sampling

    def hidden_probs(self, v: Tensor) -> Tensor:
        """`P(h_j = 1 | x, y)` for every hidden unit, `(..., D + K) -> (..., H)`."""
        v = self._check_visible(v)
        return torch.sigmoid(self.c + v @ self._visible_parameters()[0])

    def visible_probs(self, h: Tensor) -> Tensor:
        """`P(x_i = 1 | h)`, then `P(y = k | h)`, `(..., H) -> (..., D + K)`."""
        h = check_binary("h", h, self.num_hidden, self.W)
        return torch.cat(
            [torch.sigmoid(self.b + h @ self.W.T), (self.d + h @ self.U.T).softmax(-1)], -1
        )

    @torch.no_grad()
    def sample_hidden(self, v: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A draw of `h` given `x` and `y`, `(..., D + K) -> (..., H)`, zeros and ones."""
        check_generator(generator, self.W.device)
        return bernoulli(self.hidden_probs(v), generator)

    @torch.no_grad()
    def sample_visible(self, h: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A draw of the joint state given `h`, `(..., H) -> (..., D + K)`; x and y are independent
        given h."""
        check_generator(generator, self.W.device)
        h = check_binary("h", h, self.num_hidden, self.W)
        return self._join(*self._draw_visible(h, generator))

    @torch.no_grad()
    def gibbs(
        self, v: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`num_steps` sweeps of block Gibbs sampling, each `h` given `(x, y)`, then `(x, y)`.

        A sweep leaves p(x, y) invariant and is reversible with respect to it.

        Args:
            v: current joint states, `(..., D + K)`.
            num_steps: number of sweeps, at least 1.
            generator: source of randomness, on W's device.

        Returns:
            new joint states, `(..., D + K)`, without gradient; `v` is left as it is.

        Raises:
            ValueError, TypeError: `v` is no batch of joint states, or a count is out of range.
        """
        check_count("num_steps", num_steps)
        check_generator(generator, self.W.device)
        x, labels = self.split(v)
        for _ in range(num_steps):
            h = bernoulli(torch.sigmoid(self.c + self.U[labels] + x @ self.W), generator)
            x, labels = self._draw_visible(h, generator)
        return self._join(x, labels)

    @torch.no_grad()
    def sample_given_label(
        self, labels: Tensor, num_steps: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws of `x` for given labels, by block Gibbs sampling with the label held fixed.

        The chains start from independent units with the biases b. Their law tends to p(x | y) as
        `num_steps` grows; after few steps it is still near the start.

        Args:
            labels: `(...)`, integers 0..K-1; repeat a label to get several draws.
            num_steps: number of sweeps, at least 1.
            generator: source of randomness, on W's device.

        Returns:
            `(..., D)`, zeros and ones in W's dtype.

        Raises:
            ValueError, TypeError: bad labels, or a count out of range.
        """
        check_count("num_steps", num_steps)
        check_generator(generator, self.W.device)
        hidden_bias = self.c + self.U[self._check_labels(labels)]
        x = bernoulli(torch.sigmoid(self.b).expand(*labels.shape, -1), generator)
        for _ in range(num_steps):
            h = bernoulli(torch.sigmoid(hidden_bias + x @ self.W), generator)
            x = bernoulli(torch.sigmoid(self.b + h @ self.W.T), generator)
        return x

    def annealing_path(self, base_bias: Tensor | None = None) -> LabelRBMPath:
        """The path from independent units to this machine, with exact conditionals.

        Args:
            base_bias: biases of the base, `(D + K,)`, of the units of x and then of the labels.
                None takes zeros; `init_from_data` computes the data's own, a better start.

        Returns:
            A `LabelRBMPath`. It looks at the machine as it is at the time of each call.
        """
        from companion.models.rbm.relatives import LabelRBMPath  # which imports this module

        return LabelRBMPath(self, base_bias)

    @torch.no_grad()
    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` joint states from the biases b and d alone, `(n, D + K)`.

        This is where Markov chains start: the machine's law if W and U were 0.
        """
        check_count("n", n)
        check_generator(generator, self.W.device)
        return self._join(*self._draw_visible(self.c.new_zeros(n, self.num_hidden), generator))

    def _draw_visible(self, h: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        x = bernoulli(torch.sigmoid(self.b + h @ self.W.T), generator)
        return x, categorical(self.d + h @ self.U.T, generator)

    def _join(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([x, one_hot(labels, self.num_labels).to(x.dtype)], -1)

    def _visible_parameters(self) -> tuple[Tensor, Tensor]:
        """Weights `(D + K, H)` and biases `(D + K,)` of the joint states."""
        return torch.cat([self.W, self.U]), torch.cat([self.b, self.d])

    # ------------------------------------------------------------ input checks

    def _check_visible(self, v: Tensor) -> Tensor:
        v = check_binary("v", v, self.num_visible + self.num_labels, self.W)
        total = v[..., self.num_visible :].sum(-1)
        if (total != 1).any():
            first = tuple(torch.nonzero(total != 1)[0].tolist())
            raise ValueError(
                f"the last {self.num_labels} units of v are one label: exactly one of them is on, "
                f"but at index {first} there are {int(total[first])}. Make joint states with join; "
                "an objective that flips single units does not apply to labels; "
                "generalized_pseudolikelihood takes them as a block."
            )
        return v

    def _check_labels(self, labels: Tensor) -> Tensor:
        return check_whole(
            "labels", labels, minimum=0, maximum=self.num_labels - 1, device=self.W.device
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(rbm)`."""
        return (
            f"num_visible={self.num_visible}, num_labels={self.num_labels}, "
            f"num_hidden={self.num_hidden}"
        )
