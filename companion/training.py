"""`fit`: training by mini-batches that can be watched, stopped early, killed and resumed.

One generator drives a run: it shuffles the rows and it is handed to the loss. Its state, the
parameters, the optimiser, the Markov chains of the loss and the history are one checkpoint, so a
run that was killed and resumed ends bit-for-bit where the uninterrupted run does.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from companion.inputs import check_count, check_finite, check_generator
from companion.storage import Checkpoint, digest, layout, state_of, stateful

__all__ = ["History", "Loss", "Monitor", "fit"]

Loss: TypeAlias = Callable[..., Tensor]
"""`loss(v, generator=generator)`: a batch `(rows, *event)` to a scalar to be minimised."""

Monitor: TypeAlias = Callable[[nn.Module], Mapping[str, float]]
"""Quantities by name, worked out from the model without gradients."""


@dataclass(frozen=True, eq=False)
class History:
    """What `fit` recorded. Everything is float64 on the CPU, except `epochs`.

    Attributes:
        loss: mean loss over the rows of each epoch, `(num_epochs,)`. For contrastive divergence and
            its kin this number is not a likelihood and need not fall.
        epochs: number of epochs done when the monitor looked, `(k,)`, int64; it begins with 0.
        monitored: what the monitor returned then, `(k,)` each.
        best_epoch: the entry of `epochs` where the quantity `stop_on` was highest, or None.
        stopped_early: whether patience ran out before the last epoch.
    """

    loss: Tensor
    epochs: Tensor
    monitored: dict[str, Tensor]
    best_epoch: int | None
    stopped_early: bool


def fit(
    model: nn.Module,
    loss: Loss,
    data: Tensor,
    *,
    optimizer: Optimizer,
    num_epochs: int,
    batch_size: int,
    generator: torch.Generator,
    scheduler: LRScheduler | None = None,
    monitor: Monitor | None = None,
    monitor_every: int = 1,
    stop_on: str | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> History:
    """Train a model by mini-batches, in place.

    Every epoch shuffles the rows anew and uses each of them once; where `batch_size` does not
    divide their number, the last batch is smaller.

    With `checkpoint`, the whole state of the run is saved at the start and after every epoch. Call
    `fit` again with the same arguments, in a new process or the same, and it goes on from there; a
    finished run returns at once; a larger `num_epochs` prolongs it. Saved are the model, optimiser,
    scheduler, generator, history and what the loss carries: generators and any object with
    `state_dict` and `load_state_dict` (persistent chains) that `loss`, or a function it uses, has
    as a global, enclosing variable, default or partial argument, or is a method of; also in lists,
    tuples, dicts and attributes of these. Attributes of classes and Python modules, bare tensors,
    and the random numbers of Python and NumPy are not. NAdam and ASGD in double precision resume up
    to rounding: PyTorch turns the factors they keep in single precision into doubles.

    Args:
        model: the model to train.
        loss: `loss(v, generator=generator)` gives a scalar, for a batch `(rows, *event)` on the
            model's device.
        data: the rows, `(n, *event)`; on another device than the model's, they are moved batch by
            batch.
        optimizer: any optimiser of `torch.optim` whose step needs no closure.
        num_epochs: passes over the data in all, those before a resume included.
        batch_size: rows a batch.
        generator: source of all randomness, on the model's device.
        scheduler: a learning-rate schedule, stepped once an epoch.
        monitor: `monitor(model)` gives a dict of numbers. It is called before the first epoch and
            after every `monitor_every` epochs, without gradients. If it draws random numbers, let
            it seed a generator of its own each time.
        monitor_every: epochs between two looks; with `stop_on`, the last epoch gets one anyway.
        stop_on: name of a monitored quantity, the higher the better. The model, and what else the
            optimiser trains, end with the parameters that had the highest value.
        patience: stop when so many looks in a row brought no new best.
        checkpoint: file that the state of the run is saved to and resumed from.
        progress: show a progress bar.

    Returns:
        a `History`, of all epochs since the first, resumed or not.

    Raises:
        FloatingPointError: the loss, a gradient or a parameter became NaN or infinite; then the
            parameters are put back to those at which loss and gradient were last finite. Or
            `stop_on` became NaN; then they stay as they are. The checkpoint is the last one saved.
        ValueError: an argument is out of range, or the checkpoint belongs to another run.
        TypeError: an argument is of the wrong type.

    >>> model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> def squared_error(v, generator):
    ...     return (model(v[:, :1]) - v[:, 1:]).square().mean()
    >>> x = torch.linspace(-1, 1, 10, dtype=torch.float64)
    >>> history = fit(model, squared_error, torch.stack([x, 2 * x], 1), num_epochs=100,
    ...               batch_size=4, optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
    ...               generator=torch.Generator().manual_seed(0))
    >>> print(f"{model.weight.item():.6f}", history.loss.shape)
    2.000000 torch.Size([100])
    """
    from tqdm import tqdm

    _check(model, data, optimizer, generator, scheduler)
    check_count("num_epochs", num_epochs, minimum=0)
    check_count("batch_size", batch_size)
    check_count("monitor_every", monitor_every)
    if stop_on is not None and monitor is None:
        raise ValueError(f"stop_on={stop_on!r} needs a monitor that returns this quantity")
    if patience is not None and stop_on is None:
        raise ValueError("patience needs stop_on, the name of the quantity to watch")
    if patience is not None:
        check_count("patience", patience)
    own = {id(p) for p in model.parameters()}
    beside = [p for p in _trained(optimizer) if id(p) not in own]  # parameters of the loss
    record = _Record(num_epochs, stop_on, patience, beside)
    saved = None
    if checkpoint is not None:
        carried = stateful(loss, model, optimizer, scheduler, generator)
        parts = {"record": record, "model": model, "optimizer": optimizer, "scheduler": scheduler}
        parts |= {"loss": carried, "generator": generator}
        settings = _settings(model, optimizer, scheduler, carried, data, generator)
        settings |= {"batch_size": batch_size, "stop_on": stop_on, "patience": patience}
        settings |= {"monitor_every": None if monitor is None else monitor_every}
        saved = Checkpoint(checkpoint, parts, settings)
    resumed = saved is not None and saved.resume()
    if monitor is not None and not resumed:
        record.look(monitor, model)
    if saved is not None and not resumed:
        saved.save()  # whoever is interrupted in the first epoch resumes too

    last_good = [p.detach().clone() for p in _trained(optimizer)]
    with tqdm(total=num_epochs, initial=len(record.loss), disable=not progress) as bar:
        while len(record.loss) < num_epochs and not record.stopped_early():
            epoch = len(record.loss) + 1
            batches = _batches(data, batch_size, generator)
            record.loss.append(_run_epoch(epoch, loss, batches, optimizer, generator, last_good))
            if scheduler is not None:
                scheduler.step()
            if monitor is not None and epoch % monitor_every == 0:
                record.look(monitor, model)
            if saved is not None:
                saved.save()
            bar.set_postfix_str(f"loss {record.loss[-1]:.5g}", refresh=False)
            bar.update()
    # This look is not saved: a longer run that goes on from here has none at this epoch.
    if monitor is not None and stop_on is not None and record.epochs[-1] < len(record.loss):
        record.look(monitor, model)
    if record.best is not None:
        model.load_state_dict(record.best)
        _copy(record.best_beside, beside)
    return record.history()


# ---------------------------------------------------------------- one epoch


def _trained(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _batches(data: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Every row once, in random order; the last batch holds what is left."""
    order = torch.randperm(len(data), generator=generator, device=generator.device)
    for start in range(0, len(data), batch_size):
        yield data[order[start : start + batch_size].to(data.device)]


def _run_epoch(
    epoch: int,
    loss: Loss,
    batches: Iterator[Tensor],
    optimizer: Optimizer,
    generator: torch.Generator,
    last_good: list[Tensor],
) -> float:
    """A step for each batch; the mean loss over the rows.

    `last_good` receives the parameters at which loss and gradient were last finite.
    """
    trained = _trained(optimizer)
    total, num_rows = 0.0, 0
    for i, v in enumerate(batches):
        value = loss(v.to(trained[0].device), generator=generator)
        if not isinstance(value, Tensor) or value.ndim > 0 or not value.requires_grad:
            raise ValueError(
                f"loss must return a scalar tensor that depends on the parameters, got {value!r}; "
                "return the mean over the batch, and detach nothing but sampled states"
            )
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        number, problem = value.item(), None
        if not math.isfinite(number):
            problem = f"the loss is {number}"
        elif not _finite(p.grad for p in trained if p.grad is not None):
            problem = "the gradient of a parameter is not finite"
        else:
            _copy(trained, last_good)
            optimizer.step()
            if not _finite(trained):
                problem = "a parameter is not finite after the step"
        if problem is not None:
            _copy(last_good, trained)
            raise FloatingPointError(
                f"{problem} in batch {i + 1} of epoch {epoch}. The parameters are back at the "
                "values at which loss and gradient were last finite. Try a lower learning rate, or "
                "look for a logarithm or a division of zero."
            )
        total += number * len(v)
        num_rows += len(v)
    return total / num_rows


def _finite(tensors: Iterable[Tensor]) -> bool:
    # One NaN or infinity spoils the sum, which is 50 times quicker than a look at every entry; a
    # sum of finite entries that overflows gets the look.
    tensors = list(tensors)
    sums = [x.sum().float() for x in tensors]
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return True
    return all(bool(x.isfinite().all()) for x in tensors)


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for x, y in zip(source, target, strict=True):
        y.copy_(x)


# ---------------------------------------------------------------- the record of a run


@dataclass
class _Record:
    """The history while it is written, and the best parameters so far."""

    num_epochs: int
    stop_on: str | None
    patience: int | None
    beside: list[Tensor]
    loss: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    monitored: dict[str, list[float]] = field(default_factory=dict)
    best: dict[str, Tensor] | None = None
    best_beside: list[Tensor] = field(default_factory=list)

    def look(self, monitor: Monitor, model: nn.Module) -> None:
        """Call the monitor and write down what it says."""
        with torch.no_grad():
            seen = {name: float(value) for name, value in monitor(model).items()}
        if not self.epochs:
            self.monitored = {name: [] for name in seen}
        if seen.keys() != self.monitored.keys():
            raise ValueError(
                f"the monitor returned {sorted(seen)} and before that {sorted(self.monitored)}; "
                "let it return the same quantities every time"
            )
        if self.stop_on is not None and self.stop_on not in seen:
            raise ValueError(f"stop_on={self.stop_on!r} is none of the monitored {sorted(seen)}")
        if self.stop_on is not None and math.isnan(seen[self.stop_on]):
            raise FloatingPointError(
                f"{self.stop_on} is NaN after {len(self.loss)} epochs, and the parameters are as "
                "they were then; call the monitor to see where it comes from"
            )
        self.epochs.append(len(self.loss))
        for name, value in seen.items():
            self.monitored[name].append(value)
        if self.stop_on is not None and self._since_best() == 0:
            self.best = {name: x.detach().clone() for name, x in model.state_dict().items()}
            self.best_beside = [p.detach().clone() for p in self.beside]

    def stopped_early(self) -> bool:
        return self.patience is not None and self._since_best() >= self.patience

    def _since_best(self) -> int:
        """Looks since the first that saw the highest value."""
        values = self.monitored[self.stop_on or ""]
        return len(values) - 1 - values.index(max(values))

    def history(self) -> History:
        numbers = functools.partial(torch.tensor, dtype=torch.float64, device="cpu")
        return History(
            loss=numbers(self.loss),
            epochs=torch.tensor(self.epochs, dtype=torch.int64, device="cpu"),
            monitored={name: numbers(values) for name, values in self.monitored.items()},
            best_epoch=None if self.stop_on is None else self.epochs[-1 - self._since_best()],
            stopped_early=len(self.loss) < self.num_epochs,
        )

    def state_dict(self) -> dict[str, Any]:
        names = ("loss", "epochs", "monitored", "best", "best_beside")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["loss"]) > self.num_epochs:
            raise ValueError(
                f"the checkpoint is at epoch {len(state['loss'])}, beyond num_epochs="
                f"{self.num_epochs}; ask for at least as many, or give another path"
            )
        for name, value in state.items():
            setattr(self, name, value)


# ---------------------------------------------------------------- checkpoints


def _settings(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    carried: dict[str, Any],
    data: Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:
    """What tells one run from another, in a form that can be compared and shown."""
    known = {id(p) for x in (model, *carried.values()) for p in getattr(x, "parameters", tuple)()}
    if any(id(p) not in known for p in _trained(optimizer)):
        raise ValueError(
            "the optimizer trains tensors that are neither the model's parameters nor those of an "
            "object that the loss uses, so no checkpoint would hold them; make them parameters of "
            "the model"
        )
    settings = {
        "optimizer": type(optimizer).__name__,
        "scheduler": type(scheduler).__name__,
        "data": f"{layout('', data)['']}, digest {digest('', {'data': data})[:16]}",
        "generator": f"{generator.device.type}, seed {generator.initial_seed()}",
        **layout("model", model.state_dict()),
        **layout("loss", state_of(carried)),
    }
    # A scheduler changes the learning rate of the groups (its start value stays as initial_lr) and
    # perhaps their momentum, which is compared in the defaults alone.
    for i, group in enumerate([optimizer.defaults, *optimizer.param_groups]):
        for name in optimizer.defaults.keys() - ({"momentum", "betas"} if i else set()):
            value = group.get(f"initial_{name}", group[name])
            settings[f"optimizer.{name}" if i == 0 else f"optimizer.{i - 1}.{name}"] = str(value)
    return settings


# ---------------------------------------------------------------- input checks


def _check(
    model: nn.Module,
    data: Tensor,
    optimizer: Optimizer,
    generator: torch.Generator,
    scheduler: LRScheduler | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be one of torch.optim, got {type(optimizer).__name__}")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError("ReduceLROnPlateau needs a metric at each step; use a schedule in epochs")
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise ValueError(f"the model's parameters must be on one device, got {devices or 'none'}")
    if generator is None:
        raise TypeError("fit needs a generator: torch.Generator(device).manual_seed(seed)")
    check_generator(generator, devices.pop())
    check_finite("data", data)
    if data.ndim == 0:
        raise ValueError("data must have a row for each observation, (n, *event); it is a scalar")
    if {id(p) for p in _trained(optimizer)}.isdisjoint(id(p) for p in model.parameters()):
        raise ValueError(
            "the optimizer trains none of the model's parameters; make it from model.parameters()"
        )
