"""What `sample` keeps of a run in progress, and how a checkpoint puts it on disk and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from companion.core.contracts import Kernel
from companion.storage import Checkpoint, digest, layout, load_state, save_state

__all__ = ["PROBABILITY_UNITS", "Run", "moves", "open_checkpoint"]

PROBABILITY_UNITS = 2**32
_COUNTED = ("accept_prob", "is_nan", "is_divergent")
_NOT_KEPT = ("x", "log_prob", "accept_prob", "accepted", "is_nan")  # of an info, draw by draw
_BLOCK_STEPS, _BLOCK_BYTES = 64, 2**20
_STEPS_A_CALL = 16  # of a kernel that makes several: then a call costs little beside its work


def moves(
    kernel: Kernel, state: Any, steps: range, every: int, generator: torch.Generator | None
) -> Iterator[tuple[Any, Any]]:
    """State and info of every step, several in one call where the kernel can.

    A call ends at multiples of `every` at the latest, where the generator is saved.
    """
    several = getattr(kernel, "steps", None)
    while steps:
        room = min(len(steps), every - steps.start % every)
        if several is not None and room >= _STEPS_A_CALL:
            made = several(state, _STEPS_A_CALL, generator=generator)
        else:
            made = [kernel.step(state, generator=generator)]
        yield from made
        state, _ = made[-1]
        steps = steps[len(made) :]


class Run:
    """The state of the chains, the sums over their steps, and the draws kept so far.

    Steps are gathered in blocks: to write one small tensor into a large one costs several
    microseconds, whereas a block of them is stacked and written at once. A block holds at most 64
    steps, and no more than a megabyte of draws unless one draw is larger.

    Attributes:
        state: the kernel's state.
        steps: steps made so far, warm-up included.
        counts: sums over all steps after the warm-up, by name, `(*chains)` each. They are whole
            numbers, which have the same sum in whatever blocks they come: probabilities are counted
            in units of 2^-32.
        draws: the draws by name, `(num_draws, *chains, ...)`; the first `num_kept` are filled.
    """

    def __init__(self, state: Any, num_draws: int, num_steps: int, path: Path | None) -> None:
        self.state, self.steps = state, 0
        self.counts: dict[str, Tensor] = {}
        self.draws: dict[str, Tensor] = {}
        self.num_kept = 0
        self._num_draws, self._num_steps, self._path = num_draws, num_steps, path
        self._num_saved = self._num_shards = 0
        self._infos: list[Any] = []  # the block: of every step, and of every kept draw
        self._kept: list[tuple[Any, Any]] = []
        self._block = 1  # steps; until the first draw has told its size

    def add(self, state: Any, info: Any, keep: bool) -> None:
        """Count a step after the warm-up and, if asked to, keep its draw."""
        self._infos.append(info)
        if keep:
            self._kept.append((state, info))
        if len(self._infos) >= self._block:
            self.write_block()

    def write_block(self) -> None:
        """Add the steps of the block to the counts, and write its draws to their places."""
        infos, kept = self._infos, self._kept
        if infos and not self.counts:
            for name in _COUNTED:
                if hasattr(infos[0], name):
                    self.counts[name] = torch.zeros_like(getattr(infos[0], name), dtype=torch.int64)
        for name, total in self.counts.items() if infos else ():
            values = torch.stack([getattr(info, name) for info in infos])
            if name == "accept_prob":
                values = values.double().mul_(PROBABILITY_UNITS).round_().long()
            total += values.sum(0)
        if kept and not self.draws:
            self._allocate(*kept[0])
        for name, column in self.draws.items():
            if kept:
                of_state = name in ("x", "log_prob")
                latest = [getattr(state if of_state else info, name) for state, info in kept]
                torch.stack(latest, out=column[self.num_kept : self.num_kept + len(kept)])
        self.num_kept += len(kept)
        infos.clear()
        kept.clear()

    def _allocate(self, state: Any, info: Any) -> None:
        columns = {"x": state.x, "log_prob": state.log_prob}
        for name in getattr(info, "_fields", ()):
            if name not in _NOT_KEPT:
                columns[name] = getattr(info, name)
        chains = self.counts["accept_prob"].shape
        for name, first in columns.items():
            if not isinstance(first, Tensor):
                continue
            if first.shape[: len(chains)] != chains:
                raise ValueError(
                    f"{name} must begin with the dimensions of the chains, {tuple(chains)} as in "
                    f"accept_prob; its shape is {tuple(first.shape)}"
                )
            self.draws[name] = first.new_empty((self._num_draws, *first.shape))
        self._size_block()

    def _size_block(self) -> None:
        if self.draws:
            row = self.draws["x"].nbytes // self._num_draws
            self._block = max(1, min(_BLOCK_STEPS, _BLOCK_BYTES // row))

    # ------------------------------------------------------------ to disk and back

    def save_draws(self) -> None:
        """Save the draws that no file holds yet, in a file of their own."""
        if self.num_kept > self._num_saved:
            new = {k: x[self._num_saved : self.num_kept] for k, x in self.draws.items()}
            save_state(self._shard(self._num_shards), new)
            self._num_shards, self._num_saved = self._num_shards + 1, self.num_kept

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "state": _pack(self.state),
            "counts": self.counts,
            "num_kept": self.num_kept,
            "num_shards": self._num_shards,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        if saved["steps"] > self._num_steps:
            raise ValueError(
                f"the checkpoint is at step {saved['steps']}, beyond the {self._num_steps} steps "
                "asked for; ask for at least as many draws, or give another path"
            )
        device = self.state.x.device
        counts = {name: total.to(device) for name, total in saved["counts"].items()}
        draws: dict[str, Tensor] = {}
        first = 0
        for i in range(saved["num_shards"]):
            shard = load_state(self._shard(i))
            for name, rows in shard.items():
                if name not in draws:
                    shape = (self._num_draws, *rows.shape[1:])
                    draws[name] = torch.empty(shape, dtype=rows.dtype, device=device)
                draws[name][first : first + len(rows)] = rows
            first += len(shard["x"])
        if first != saved["num_kept"]:
            raise ValueError(
                f"the files {self._path}.draws-* hold {first} draws and {self._path} tells of "
                f"{saved['num_kept']}: they belong to different runs; delete them to start again"
            )
        self.state = _unpack(saved["state"], self.state, device)
        self.steps, self.counts, self.draws = saved["steps"], counts, draws
        self.num_kept = self._num_saved = first
        self._num_shards = saved["num_shards"]
        self._size_block()

    def _shard(self, i: int) -> str:
        return f"{self._path}.draws-{i:05d}"


def _pack(node: Any) -> Any:
    """A state for `save_state`: with the strides of its tensors, which decide how sums round."""
    if isinstance(node, Tensor):
        return {"tensor": node, "stride": node.stride()}
    return tuple(map(_pack, node)) if isinstance(node, tuple) else node


def _unpack(node: Any, like: Any, device: torch.device) -> Any:
    if isinstance(node, dict):
        x = node["tensor"].to(device)
        if 0 in node["stride"]:  # expanded: it would share memory with itself
            return x
        return torch.empty_strided(x.shape, node["stride"], dtype=x.dtype, device=device).copy_(x)
    if isinstance(node, tuple):
        fields = [_unpack(a, b, device) for a, b in zip(node, like, strict=True)]
        return like._make(fields) if hasattr(like, "_make") else tuple(fields)
    return node


def open_checkpoint(
    path: str | os.PathLike[str],
    run: Run,
    kernel: Kernel,
    x0: Tensor,
    generator: torch.Generator,
    settings: dict[str, Any],
) -> Checkpoint:
    """A `Checkpoint` of the run and its generator, to be compared with what made them.

    A kernel is two functions, which cannot be saved. What it does can be compared: the settings
    tell where one step from `x0` leads, with random numbers of its own.
    """
    own = torch.Generator(generator.device).manual_seed(0)
    state, info = kernel.step(run.state, generator=own)
    seen = {"x": state.x, "log_prob": state.log_prob, "accept_prob": info.accept_prob}
    sizes = {name: x.double().abs().mean() for name, x in seen.items() if x is not None}
    settings = settings | {
        "x0": f"{layout('', x0)['']}, digest {digest('', {'x0': x0})[:16]}",
        "generator": f"{generator.device.type}, seed {generator.initial_seed()}",
        "the kernel's first step": ", ".join(f"|{k}| {x:.4g}" for k, x in sizes.items()),
    }
    return Checkpoint(path, {"run": run, "generator": generator}, settings)
