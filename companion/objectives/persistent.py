"""Objectives whose Markov chains go on from one update to the next.

The chains follow a target that moves: after each update the model is another one. They stay near
equilibrium while learning is slow beside their mixing. The plain method moves them by the model's
own sweeps, the fast one lets the model push them away from where they are, the tempered one gives
them a ladder of easier models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from companion.core import AnnealingPath, with_gradients
from companion.inputs import check_count, check_generator, check_real
from companion.tempering import check_betas, profile, swap_step

__all__ = ["FastPersistentChains", "PersistentChains", "TemperedChains"]


class _Chains:
    """What the three have in common: a generator, and a state that can be saved."""

    generator: torch.Generator | None
    _saved: tuple[str, ...]

    def state_dict(self) -> dict[str, Tensor]:
        """The chains and, if they have a generator of their own, its state."""
        state = {name: getattr(self, name) for name in self._saved}
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: the chains' number, shape or dtype differs.
        """
        for name in self._saved:
            saved, own = state[name], getattr(self, name)
            if saved.shape != own.shape or saved.dtype != own.dtype:
                raise ValueError(
                    f"the saved chains are {tuple(saved.shape)} of {saved.dtype}, these are "
                    f"{tuple(own.shape)} of {own.dtype}"
                )
        for name in self._saved:
            setattr(self, name, state[name].to(getattr(self, name).device, copy=True))
        if self.generator is not None and "generator" in state:
            self.generator.set_state(state["generator"].cpu())


class PersistentChains(_Chains):
    """Stochastic maximum likelihood, also called persistent contrastive divergence.

    (Younes 1989; Tieleman 2008.) The negative particles are a set of Markov chains that go on from
    one update to the next. If the chains are in equilibrium the gradient is unbiased; they stay
    near it only while the learning rate is small beside their mixing time.

    A model that offers `contrastive_step` (`RBM` does) gets its fused call. It keeps what the
    hidden units were given at the end of the last update, under the parameters of that time. Where
    plain gradient descent will do, `update` is quicker than `loss` and an optimiser.

    Args:
        model: an unnormalised model with `log_prob`, `gibbs` and `sample_base`.
        num_chains: number of chains; the noise of the negative phase falls with its square root.
        generator: source of randomness for the chains, on the model's device.

    Attributes:
        x: the chains' present states, `(num_chains, D)`.

    >>> from companion.models.rbm import RBM
    >>> g = torch.Generator().manual_seed(0)
    >>> rbm = RBM(4, 2, generator=g)
    >>> chains = PersistentChains(rbm, num_chains=10, generator=g)
    >>> chains.loss(torch.tensor([[1, 1, 0, 0]])).backward()
    >>> chains.x.shape
    torch.Size([10, 4])
    """

    def __init__(
        self, model: Any, num_chains: int, *, generator: torch.Generator | None = None
    ) -> None:
        check_count("num_chains", num_chains)
        self.model = model
        self.generator = generator
        self._is_fused = hasattr(model, "contrastive_step")
        self._saved = ("x", "hidden_probs") if self._is_fused else ("x",)
        self.x = model.sample_base(num_chains, generator=generator)

    @property
    def x(self) -> Tensor:
        """The chains' present states, `(num_chains, D)`; may be set, by assignment."""
        return self._x

    @x.setter
    def x(self, x: Tensor) -> None:
        self._x = x
        if self._is_fused:
            self.hidden_probs = self.model.hidden_probs(x).detach()

    def loss(
        self, v: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Advance the chains by `num_steps` and return the loss for a mini-batch of data.

        Args:
            v: a mini-batch of data, `(n, D)`; n need not equal the number of chains.
            num_steps: Gibbs steps of every chain before this update.
            generator: takes the place of the chains' own generator.

        Returns:
            scalar loss `mean log p~(x) - mean log p~(v)` over chains x and data v, summed over a
            batch of machines.
        """
        generator = generator or self.generator
        if self._is_fused:
            loss, self._x, self.hidden_probs = self.model.contrastive_step(
                v, num_steps, self.hidden_probs, generator=generator
            )
            return cast(Tensor, loss)
        positive = self.model.log_prob(v).mean(-1).sum()  # checks v before the chains move
        self.x = self.model.gibbs(self.x, num_steps, generator=generator)
        return cast(Tensor, self.model.log_prob(self.x).mean(-1).sum() - positive)

    def update(
        self,
        v: Tensor,
        rate: float,
        num_steps: int = 1,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Advance the chains and learn, in place: `loss` and a step of plain gradient descent.

        Args:
            v: a mini-batch of data, as for `loss`; so are `num_steps` and `generator`.
            rate: the learning rate, above 0.

        Raises:
            TypeError: the model offers no `contrastive_update` (`RBM` does).
            FloatingPointError, ValueError: as `RBM.contrastive_update`; chains and parameters are
                as they were.
        """
        update = getattr(self.model, "contrastive_update", None)
        if update is None:
            raise TypeError(
                f"{type(self.model).__name__} has no contrastive_update; take loss() and an "
                "optimiser of torch.optim"
            )
        self._x, self.hidden_probs = update(
            v, rate, num_steps, self.hidden_probs, generator=generator or self.generator
        )


class FastPersistentChains(_Chains):
    """Fast persistent contrastive divergence, FPCD (Tieleman and Hinton 2009).

    The chains see other parameters than the data do: fast weights are added, which learn at a rate
    of their own from the same gradient and fade. Where the chains linger, the fast weights make
    those states less likely until the chains leave, so they get about even while the slow
    parameters hardly move. What the chains follow is no equilibrium of the model, and the gradient
    is biased however slow the learning.

    Args:
        model: an `nn.Module` with `log_prob`, `gibbs` and `sample_base`.
        num_chains: number of chains.
        fast_rate: learning rate of the fast weights; that of the first updates of the slow ones is
            a good start.
        decay: what is left of the fast weights after an update, from 0 (none) to below 1.
        generator: source of randomness for the chains, on the model's device.

    Attributes:
        x: the chains' present states, `(num_chains, D)`.
        fast: the fast weights, one tensor for all parameters one after the other.

    >>> from companion.models.rbm import RBM
    >>> g = torch.Generator().manual_seed(0)
    >>> rbm = RBM(4, 2, generator=g)
    >>> chains = FastPersistentChains(rbm, num_chains=10, fast_rate=0.1, generator=g)
    >>> chains.loss(torch.tensor([[1, 1, 0, 0]])).backward()
    >>> chains.x.shape, chains.fast.shape
    (torch.Size([10, 4]), torch.Size([14]))
    """

    _saved = ("x", "fast")

    def __init__(
        self,
        model: Any,
        num_chains: int,
        *,
        fast_rate: float,
        decay: float = 0.95,
        generator: torch.Generator | None = None,
    ) -> None:
        check_count("num_chains", num_chains)
        self.fast_rate = check_real("fast_rate", fast_rate, minimum=0.0)
        if decay != 0.0:
            check_real("decay", decay, minimum=0.0, maximum=1.0)
        self.model = model
        self.decay, self.generator = decay, generator
        self._pushed: Any = copy.deepcopy(model)
        self.x = self.model.sample_base(num_chains, generator=generator)
        self.fast = torch.zeros_like(nn.utils.parameters_to_vector(model.parameters()).detach())

    def loss(
        self, v: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Advance the chains and the fast weights; return the loss, as `PersistentChains.loss`."""
        parameters = list(self.model.parameters())
        learned = [p for p in parameters if p.requires_grad]
        with torch.enable_grad():
            positive = self.model.log_prob(v).mean(-1).sum()  # checks v before the chains move
            self._push(parameters)
            generator = generator or self.generator
            self.x = self._pushed.gibbs(self.x, num_steps, generator=generator)
            loss = self.model.log_prob(self.x).mean(-1).sum() - positive
            gradients = torch.autograd.grad(loss, learned)
        found = iter(gradients)
        flat = torch.cat(
            [
                (next(found) if p.requires_grad else torch.zeros_like(p)).flatten()
                for p in parameters
            ]
        )
        self.fast = self.decay * self.fast - self.fast_rate * flat
        return with_gradients(loss.detach(), learned, gradients)

    @torch.no_grad()
    def _push(self, parameters: list[nn.Parameter]) -> None:
        """Set the chains' own model to the slow parameters and the fast ones together."""
        self._pushed.load_state_dict(self.model.state_dict())
        pushed = list(self._pushed.parameters())
        total = nn.utils.parameters_to_vector(parameters) + self.fast
        nn.utils.vector_to_parameters(total, pushed)


class TemperedChains(_Chains):
    """Stochastic maximum likelihood with parallel tempering inside.

    (Desjardins et al. 2010; Cho, Raiko and Ilin 2010.) For each negative particle there are chains
    at all betas of a ladder. They move, and neighbours swap, so that what crosses between modes at
    a small beta arrives at beta = 1. Only the chains at beta = 1 are negative particles.

    Args:
        model: a model with `log_prob` and, unless `path` is given, `annealing_path()`.
        num_chains: number of chains at each beta.
        betas: the ladder, ascending to 1, `(R,)`.
        path: an `AnnealingPath` to the model as it is at the time of each call.
        generator: source of randomness for the chains, on the model's device.

    Attributes:
        replicas: the chains' present states, `(R, num_chains, D)`.
        x: those at beta = 1, the negative particles, `(num_chains, D)`.
        swap_prob: mean probability of a swap between neighbours in the last call, `(R - 1,)`.

    >>> from companion.models.rbm import RBM
    >>> g = torch.Generator().manual_seed(0)
    >>> rbm = RBM(4, 2, generator=g)
    >>> chains = TemperedChains(rbm, num_chains=10, betas=[0.0, 0.5, 1.0], generator=g)
    >>> chains.loss(torch.tensor([[1, 1, 0, 0]])).backward()
    >>> chains.replicas.shape, chains.x.shape
    (torch.Size([3, 10, 4]), torch.Size([10, 4]))
    """

    _saved = ("replicas", "turn")

    def __init__(
        self,
        model: Any,
        num_chains: int,
        betas: Tensor | Sequence[float],
        *,
        path: AnnealingPath | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_count("num_chains", num_chains)
        self.model = model
        self.path: AnnealingPath = self.model.annealing_path() if path is None else path
        self.generator = generator
        x = self.path.sample_base(num_chains, generator=generator)
        self.betas = check_betas(betas, x.device)
        # Every rung begins with draws of its own, not with copies.
        more = [
            self.path.sample_base(num_chains, generator=generator)
            for _ in range(len(self.betas) - 1)
        ]
        self.replicas = torch.stack([x, *more])
        self.turn = torch.zeros((), dtype=torch.int64, device=x.device)  # even or odd pairs
        self.swap_prob = self.betas.new_full((len(self.betas) - 1,), torch.nan)

    @property
    def x(self) -> Tensor:
        """The negative particles, `(num_chains, D)`."""
        return self.replicas[-1]

    def loss(
        self, v: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Advance all chains and return the loss for a mini-batch of data.

        Args:
            v: a mini-batch of data, `(n, D)`.
            num_steps: how often every chain moves, each time followed by swaps of neighbours, the
                even and the odd pairs in turn. A move costs as much as one of `PersistentChains`
                for each beta.
            generator: takes the place of the chains' own generator.

        Returns:
            scalar loss `mean log p~(x) - mean log p~(v)`, as that of `PersistentChains`.
        """
        check_count("num_steps", num_steps)
        generator = generator or self.generator
        check_generator(generator, self.replicas.device)
        positive = self.model.log_prob(v).mean(-1).sum()  # checks v before the chains move
        with torch.no_grad():
            for _ in range(num_steps):
                self._sweep(generator)
        return cast(Tensor, self.model.log_prob(self.x).mean(-1).sum() - positive)

    def _sweep(self, generator: torch.Generator | None) -> None:
        chains = self.replicas.shape[1:-1]
        betas = self.betas.view(-1, *[1] * len(chains))
        x = self.path.step(self.replicas, betas, generator=generator)
        if len(betas) > 1:
            at = profile(self.path, x)
            below, above = betas.roll(1, 0), betas.roll(-1, 0)
            levels = torch.stack([at(below), at(betas), at(above)])
            pair = torch.arange(len(betas) - 1, device=x.device).view(-1, *[1] * len(chains))
            noise = torch.rand(
                (len(betas) - 1, *chains), generator=generator, device=x.device, dtype=levels.dtype
            )
            order, info = swap_step(levels, (pair + self.turn) % 2 == 0, noise)
            x = x.gather(0, order[..., None].expand_as(x))
            self.swap_prob = info.accept_prob.flatten(1).mean(1)
            self.turn = 1 - self.turn
        self.replicas = x
