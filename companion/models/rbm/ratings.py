"""The machine of ratings: softmax visible units, most of them missing.

    E(v, h) = - sum_{q rated} (b_{q, v_q} + sum_j W_{q, v_q, j} h_j) - c.h

A user has a visible unit for each item rated, and no others: users are machines of different sizes
that share their weights. The law is that of the ratings *given which items are
rated*, so its partition function depends on the set of rated items; why an item was not rated is
not modelled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.core import LogZ
from companion.inputs import check_count, check_generator, check_real
from companion.models.rbm.model import bernoulli
from companion.models.rbm.sums import log_sum_states
from companion.models.rbm.units import (
    categorical,
    check_binary,
    check_whole,
    small_weights,
    softplus,
)

__all__ = ["RatingRBM"]

_SETS_AT_ONCE = 1000  # sets of rated items whose sums are kept for a block of hidden states


class RatingRBM(nn.Module):
    """A restricted Boltzmann machine for recommendation (Salakhutdinov, Mnih and Hinton 2007).

    Data are integers `(users, items)`: ratings 0..K-1, and -1 where there is none.

    `contrastive_divergence(rbm, ratings, k)` works as it is: `gibbs` redraws a user's own rated
    items and keeps the others missing, so each particle belongs to the machine of its user.
    `PersistentChains` does not apply: users who rated different items are different machines, with
    different laws and partition functions, so no set of chains serves them all. (It would take one
    chain for each user.) That is why `sample_base` and `log_z` ask which items are rated.

    Weights start as independent normal draws of standard deviation 0.01 and biases at 0;
    `init_from_data` sets the visible biases.

    Args:
        num_items: I, the number of items.
        num_ratings: K, the number of different ratings, at least 2.
        num_hidden: H, the number of hidden units.
        generator: source of randomness for the weights.
        device: where the parameters live.
        dtype: floating type of the parameters.

    Attributes:
        W: weights, `(num_items, num_ratings, num_hidden)`.
        b: visible biases, `(num_items, num_ratings)`.
        c: hidden biases, `(num_hidden,)`.

    All methods take ratings with any leading dimensions.

    Reference: Salakhutdinov, Mnih and Hinton (2007), *Restricted Boltzmann machines for
    collaborative filtering*.

    >>> rbm = RatingRBM(3, 5, 2, generator=torch.Generator().manual_seed(0))
    >>> ratings = torch.tensor([[4, -1, 0], [-1, -1, 2]])
    >>> rbm.gibbs(ratings, generator=torch.Generator().manual_seed(1))
    tensor([[ 0, -1,  2],
            [-1, -1,  2]])
    >>> rbm.predict(ratings).shape
    torch.Size([2, 3, 5])
    """

    def __init__(
        self,
        num_items: int,
        num_ratings: int,
        num_hidden: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_items = check_count("num_items", num_items)
        self.num_ratings = check_count("num_ratings", num_ratings, minimum=2)
        self.num_hidden = check_count("num_hidden", num_hidden)
        self.W = small_weights(
            num_items, num_ratings, num_hidden, generator=generator, device=device, dtype=dtype
        )
        self.b = nn.Parameter(self.W.new_zeros(num_items, num_ratings))
        self.c = nn.Parameter(self.W.new_zeros(num_hidden))

    @torch.no_grad()
    def init_from_data(self, ratings: Tensor, *, smoothing: float = 1.0) -> None:
        """Set b to the log-frequencies of each item's ratings, so that W = 0 models them.

        Args:
            ratings: data, `(users, items)`; missing entries are left out of the counts.
            smoothing: this much is added to the count of every rating of every item, so that a
                rating that never occurs keeps a finite bias.
        """
        check_real("smoothing", smoothing, minimum=0.0)
        one_hot = self._one_hot(self._check_ratings(ratings))
        # 16 bits do not hold a count
        counts = one_hot.reshape(-1, *self.b.shape).sum(0, dtype=torch.float64) + smoothing
        self.b.copy_((counts / counts.sum(-1, keepdim=True)).log())

    # ------------------------------------------------------------ energies

    def energy(self, ratings: Tensor, h: Tensor) -> Tensor:
        """The joint energy `E(v, h)`, `(..., I), (..., H) -> (...)`; low energy is likely."""
        v = self._one_hot(self._check_ratings(ratings)).flatten(-2)
        h = check_binary("h", h, self.num_hidden, self.W)
        weights, bias = self._flat_parameters()
        return -(v @ bias) - h @ self.c - ((v @ weights) * h).sum(-1)

    def free_energy(self, ratings: Tensor) -> Tensor:
        """The free energy `F(v) = -log sum_h exp(-E(v, h))`, `(..., I) -> (...)`."""
        v = self._one_hot(self._check_ratings(ratings)).flatten(-2)
        weights, bias = self._flat_parameters()
        return -(v @ bias) - softplus(self.c + v @ weights).sum(-1)

    def log_prob(self, ratings: Tensor) -> Tensor:
        """The unnormalised log-probability `-F(v)`, `(..., I) -> (...)`.

        Missing entries add nothing, and parameters of items that nobody rated get no gradient.
        Subtract `log_z(ratings >= 0)`, which differs from user to user.
        """
        return -self.free_energy(ratings)

    @torch.no_grad()
    def log_z(self, rated: Tensor) -> LogZ:
        """The exact log partition function of the machine with the rated items alone.

        It sums over the states of the hidden layer, once for all sets of rated items. No gradient
        passes through.

        Args:
            rated: which items are rated, boolean, `(..., I)`; for the users of a data set,
                `ratings >= 0`.

        Returns:
            an exact `LogZ` (standard error 0) of shape `(...)`.

        Raises:
            ValueError, TypeError: there are more than 25 hidden units, or a bad mask.

        >>> rbm = RatingRBM(2, 5, 1, generator=torch.Generator().manual_seed(0))
        >>> _ = rbm.W.data.zero_()                      # 2 * 5 states of one item, 2 * 25 of two
        >>> rbm.log_z(torch.tensor([[True, False], [True, True]])).value.exp()
        tensor([10.0000, 50.0000], dtype=torch.float64)
        """
        masks = self._check_rated(rated).reshape(-1, self.num_items)
        sets, which = torch.unique(masks, dim=0, return_inverse=True)
        weights, bias = self._flat_parameters()

        def log_sums(some: Tensor) -> Tensor:
            def sum_out(inputs: Tensor) -> Tensor:
                return inputs.reshape(-1, *self.b.shape).logsumexp(-1) @ some.T

            return log_sum_states(weights.T, self.c, bias, sum_out)

        totals = torch.cat([log_sums(some) for some in sets.double().split(_SETS_AT_ONCE)])
        return LogZ(totals[which].reshape(rated.shape[:-1]), 0.0)

    # ------------------------------------------------------------ prediction

    def predict(self, ratings: Tensor) -> Tensor:
        """The probability of each rating of each item, given the other ratings of the user.

            p(v_q = k | v_-q)  ~  exp(b_qk) prod_j (1 + exp(a_j + W_qkj)),

        with `a_j` the input of hidden unit j from the rated items other than q. It is exact, the
        hidden units being summed out. For an item that the user did not rate this is the prediction
        from all ratings of that user; for one that is rated, that rating is left out, so the same
        numbers tell how well it would have been predicted.

        Args:
            ratings: `(..., I)`, -1 for missing.

        Returns:
            probabilities, `(..., I, K)`, differentiable. Memory is a tensor `(..., I, K, H)`: hand
            in many users in batches.
        """
        v = self._one_hot(self._check_ratings(ratings))
        inputs = self.c + v.flatten(-2) @ self.W.flatten(0, 1)
        own = torch.einsum("...qk,qkj->...qj", v, self.W)
        others = inputs[..., None, :] - own
        return (self.b + softplus(others[..., None, :] + self.W).sum(-1)).softmax(-1)

    def expected_rating(self, ratings: Tensor) -> Tensor:
        """The mean of `predict`, `sum_k k p(v_q = k | v_-q)`, `(..., I) -> (..., I)`.

        Of all predictions it has the least mean squared error under the model.
        """
        probs = self.predict(ratings)
        return probs @ torch.arange(self.num_ratings, device=probs.device, dtype=probs.dtype)

    # ------------------------------------------------------------ conditionals and sampling

    def hidden_probs(self, ratings: Tensor) -> Tensor:
        """`P(h_j = 1 | v)` for every hidden unit, `(..., I) -> (..., H)`."""
        v = self._one_hot(self._check_ratings(ratings)).flatten(-2)
        return torch.sigmoid(self.c + v @ self.W.flatten(0, 1))

    def visible_probs(self, h: Tensor) -> Tensor:
        """`P(v_q = k | h)` for every item and rating, `(..., H) -> (..., I, K)`."""
        return self._logits(check_binary("h", h, self.num_hidden, self.W)).softmax(-1)

    @torch.no_grad()
    def sample_hidden(self, ratings: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A draw of `h` given the ratings, `(..., I) -> (..., H)`, zeros and ones in W's dtype."""
        check_generator(generator, self.W.device)
        return bernoulli(self.hidden_probs(ratings), generator)

    @torch.no_grad()
    def sample_visible(self, h: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A draw of the ratings of all items given `h`, `(..., H) -> (..., I)`, int64."""
        check_generator(generator, self.W.device)
        return categorical(self._logits(check_binary("h", h, self.num_hidden, self.W)), generator)

    @torch.no_grad()
    def gibbs(
        self, ratings: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`num_steps` sweeps of block Gibbs sampling: `h` given the ratings, then they given `h`.

        Rated entries are drawn anew, missing ones stay missing. A sweep leaves the law of the
        ratings, given which items are rated, invariant and is reversible with respect to it.

        Args:
            ratings: current states, `(..., I)`, -1 for missing.
            num_steps: number of sweeps, at least 1.
            generator: source of randomness, on W's device.

        Returns:
            new ratings, `(..., I)`, of the same dtype; `ratings` is left as it is.

        Raises:
            ValueError, TypeError: bad ratings, or a count is out of range.
        """
        check_count("num_steps", num_steps)
        check_generator(generator, self.W.device)
        v = self._check_ratings(ratings)
        rated, weights = v >= 0, self.W.flatten(0, 1)
        for _ in range(num_steps):
            inputs = self.c + self._one_hot(v).flatten(-2) @ weights
            h = bernoulli(torch.sigmoid(inputs), generator)
            v = torch.where(rated, categorical(self._logits(h), generator), -1)
        return v.to(ratings.dtype)

    @torch.no_grad()
    def sample_base(self, rated: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Ratings of the rated items from the biases b alone, -1 elsewhere.

        This is where Markov chains start: the machine's law if W were 0.

        Args:
            rated: which items are rated, boolean, `(..., I)`.
            generator: source of randomness, on W's device.

        Returns:
            `(..., I)`, int64.

        Raises:
            ValueError, TypeError: a bad mask. A number of chains is not enough, which is why
                `PersistentChains` does not apply.
        """
        check_generator(generator, self.W.device)
        rated = self._check_rated(rated)
        drawn = categorical(self.b.expand(*rated.shape, -1), generator)
        return torch.where(rated, drawn, -1)

    def _logits(self, h: Tensor) -> Tensor:
        """Log-probabilities of each item's ratings given `h`, unnormalised, `(..., I, K)`."""
        weights, bias = self._flat_parameters()
        return (bias + h @ weights.T).reshape(*h.shape[:-1], *self.b.shape)

    def _one_hot(self, ratings: Tensor) -> Tensor:
        """`(..., I) -> (..., I, K)` in W's dtype; a missing rating is all zeros."""
        values = torch.arange(self.num_ratings, device=ratings.device)
        return (ratings[..., None] == values).to(self.W.dtype)

    def _flat_parameters(self) -> tuple[Tensor, Tensor]:
        """Weights `(I K, H)` and biases `(I K,)`."""
        return self.W.flatten(0, 1), self.b.flatten()

    # ------------------------------------------------------------ input checks

    def _check_ratings(self, ratings: Tensor) -> Tensor:
        top = self.num_ratings - 1
        v = check_whole("ratings", ratings, minimum=-1, maximum=top, device=self.W.device)
        self._check_items("ratings", v)
        return v

    def _check_rated(self, rated: Tensor) -> Tensor:
        if not isinstance(rated, Tensor) or rated.dtype != torch.bool:
            got = rated.dtype if isinstance(rated, Tensor) else type(rated).__name__
            raise TypeError(
                "rated must be a boolean tensor that says which items are rated (ratings >= 0), "
                f"got {got}: each set of rated items is a machine of its own, so Markov chains of "
                "one do not serve another"
            )
        self._check_items("rated", rated)
        if rated.numel() == 0:
            raise ValueError(f"rated is an empty batch: its shape is {tuple(rated.shape)}")
        if rated.device != self.W.device:
            raise ValueError(f"rated is on {rated.device} but the machine is on {self.W.device}")
        return rated

    def _check_items(self, name: str, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.num_items:
            raise ValueError(
                f"{name} must have shape (..., {self.num_items}), one entry for each item, got "
                f"{tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        """Sizes, for `print(rbm)`."""
        return (
            f"num_items={self.num_items}, num_ratings={self.num_ratings}, "
            f"num_hidden={self.num_hidden}"
        )
