"""The centred machine: the same family of laws, with parameters that are easier to learn.

    E(v, h) = - (v - mu).b' - (h - lambda).c' - (v - mu).W.(h - lambda)

With fixed offsets mu and lambda this is the machine with biases `b = b' - W lambda` and
`c = c' - mu W`, up to a constant. But its gradient is another one: that of W is a covariance,
no product of the units' means enters, and it does not change when zeros and ones change their
roles. Offsets near the units' means work best; moving them keeps the machine what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.inputs import check_real
from companion.models.rbm.model import RBM, row

__all__ = ["CentredRBM"]


class CentredRBM(RBM):
    """A centred Bernoulli-Bernoulli RBM: all that `RBM` does, learnt by the centred gradient.

    Call `recentre(v, rate)` before each update: the offsets then follow the units' means under the
    data while the law stays the same.

    Args:
        num_visible: D, as for `RBM`; so are `num_hidden` and the keywords.

    Attributes:
        W: weights, `(*batch_shape, num_visible, num_hidden)`.
        centred_b: b', `(*batch_shape, num_visible)`; `b` is the bias of the equal plain machine.
        centred_c: c', `(*batch_shape, num_hidden)`; `c` likewise.
        visible_offset: mu, a buffer, `(*batch_shape, num_visible)`; at first 1/2.
        hidden_offset: lambda, a buffer, `(*batch_shape, num_hidden)`; at first 1/2.

    Reference: Montavon and Müller (2012), *Deep Boltzmann machines and the centering trick*;
    Melchior, Fischer and Wiskott (2016), *How to center deep Boltzmann machines*.

    >>> rbm = CentredRBM(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> v = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    >>> before = rbm.log_prob(v) - rbm.log_z().value
    >>> rbm.recentre(v, rate=0.5)
    >>> bool(torch.allclose(before, rbm.log_prob(v) - rbm.log_z().value)), rbm.visible_offset
    (True, tensor([0.5000, 0.2500, 0.5000, 0.2500], dtype=torch.float64))
    """

    visible_offset: Tensor
    hidden_offset: Tensor

    def _make_biases(self, b: Tensor, c: Tensor) -> None:
        self.register_buffer("visible_offset", torch.full_like(b, 0.5))
        self.register_buffer("hidden_offset", torch.full_like(c, 0.5))
        self.centred_b, self.centred_c = nn.Parameter(b), nn.Parameter(c)

    @property
    def b(self) -> Tensor:  # type: ignore[override]
        """The visible biases of the plain machine that this one equals."""
        return self.centred_b - _times(self.W, self.hidden_offset)

    @property
    def c(self) -> Tensor:  # type: ignore[override]
        """The hidden biases of the plain machine that this one equals."""
        return self.centred_c - _times(self.W.mT, self.visible_offset)

    @torch.no_grad()
    def _set_visible_bias(self, mean: Tensor) -> None:
        self.visible_offset.copy_(mean)
        self.centred_b.copy_(torch.logit(mean) + _times(self.W, self.hidden_offset))

    @torch.no_grad()
    def recentre(self, v: Tensor, rate: float = 0.01) -> None:
        """Move the offsets towards the units' means under the data; the law does not change.

        Args:
            v: a mini-batch of data, `(n, num_visible)`, or as the batch of machines needs it.
            rate: share of the way, above 0 and at most 1: the offsets are moving averages.

        Raises:
            ValueError, TypeError: `v` is no batch of visible states, or the rate is out of range.
        """
        check_real("rate", rate, minimum=0.0, maximum=1.0 + 1e-12)
        v = self._check_units("v", v, self.num_visible)
        if v.ndim < 2:
            raise ValueError(f"v must be a matrix (n, {self.num_visible}), got {tuple(v.shape)}")
        b, c = self.b, self.c
        hidden = self.hidden_probs(v)
        for offset, x in ((self.visible_offset, v), (self.hidden_offset, hidden)):
            extra = tuple(range(x.ndim - offset.ndim - 1))
            mean = x.mean((*extra, -2))
            offset.lerp_(mean.expand_as(offset), rate)
        self.centred_b.copy_(b + _times(self.W, self.hidden_offset))
        self.centred_c.copy_(c + _times(self.W.mT, self.visible_offset))

    def _centre(self, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return v - row(self.visible_offset), hidden - row(self.hidden_offset)


def _times(weights: Tensor, offset: Tensor) -> Tensor:
    """`weights @ offset` for each machine of a batch, `(..., A, B), (..., B) -> (..., A)`."""
    return (weights @ offset[..., None])[..., 0]
