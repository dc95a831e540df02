"""A nested structure of tensors and numbers in one file that a kill cannot corrupt.

The file is a safetensors file: the tensors lie there under readable names, and the structure that
holds them together is JSON in the header. Nothing is pickled, so loading a file runs no code. A
digest of all that was saved tells a damaged file from a sound one. `Checkpoint` does this for the
parts of a run: models, optimisers, chains, generators.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from companion.carried import stateful

__all__ = ["Checkpoint", "digest", "layout", "load_state", "save_state", "state_of", "stateful"]

_KEY = "companion"  # the one metadata entry; with two, their order in the file would be random
_VERSION = 1
_DTYPES = r"bool|u?int(8|16|32|64)|b?float16|float(32|64)|float[48]_\w+|complex64"  # of safetensors


def save_state(path: str | os.PathLike[str], state: Any) -> None:
    """Save a nested structure to one file, atomically.

    The file is written beside its place under the name `path` + ".tmp", flushed to the disk and
    renamed. Whoever opens `path`, at whatever moment the process was killed, finds the old file or
    the new one, whole. Two processes must not save to the same path at the same time.

    Args:
        path: where to save; its folder must exist.
        state: tensors, numbers, strings and None in dicts (keys: strings or integers), lists and
            tuples, nested as you like. Tensors are saved from any device. They are dense and of a
            dtype that safetensors knows (complex128 is none).

    Raises:
        TypeError: something else is in `state`; the message says where.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(f"{folder}/run.safetensors", {"x": torch.arange(3), "step": (1, 0.5)})
    ...     load_state(f"{folder}/run.safetensors")
    {'x': tensor([0, 1, 2]), 'step': (1, 0.5)}
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(state, "", tensors), allow_nan=False)
    header = {"version": _VERSION, "digest": digest(structure, tensors), "state": structure}
    _write_atomically(Path(path), save(tensors, {_KEY: json.dumps(header)}))


def load_state(path: str | os.PathLike[str]) -> Any:
    """Load what `save_state` saved, its tensors on the CPU.

    Args:
        path: the file.

    Returns:
        the structure as it was saved (subclasses of dict and tuple come back as dict and tuple).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or `save_state` did not write it.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads((file.metadata() or {})[_KEY])
        version, saved_digest, structure = (header[k] for k in ("version", "digest", "state"))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or was not written by companion.storage.save_state "
            f"({type(error).__name__}: {error}); give another path, or delete the file"
        ) from error
    if version != _VERSION:
        raise ValueError(
            f"{path} has format {version} and this version of companion reads format "
            f"{_VERSION}; load it with the version that wrote it"
        )
    if saved_digest != digest(str(structure), tensors):
        raise ValueError(
            f"{path} is damaged: its contents do not match their digest; use a copy, or delete it"
        )
    return _decode(json.loads(structure), tensors)


class Checkpoint:
    """The state of a run in one file: `resume()` before the first step, `save()` after each.

    Args:
        path: the file; its folder must exist.
        parts: objects with `state_dict` and `load_state_dict`, generators, None, and dicts of
            these, by name. They are loaded in this order.
        settings: numbers and texts by name that must be the same when the run is resumed.

    Raises:
        ValueError: the folder does not exist.

    >>> import tempfile
    >>> generator = torch.Generator().manual_seed(0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = Checkpoint(f"{folder}/run", {"generator": generator}, {"num_chains": 4})
    ...     first = run.resume()                      # there is nothing yet to resume from
    ...     run.save()
    ...     x = torch.rand(2, generator=generator)
    ...     first, run.resume(), bool((torch.rand(2, generator=generator) == x).all())
    (False, True, True)
    """

    def __init__(
        self, path: str | os.PathLike[str], parts: dict[str, Any], settings: dict[str, Any]
    ) -> None:
        self.path, self.parts, self.settings = Path(path), parts, settings
        if not self.path.parent.is_dir():
            raise ValueError(f"there is no folder {self.path.parent} for the checkpoint; make it")

    def save(self) -> None:
        """Replace the file by the present state of all parts."""
        save_state(self.path, {"settings": self.settings, "parts": state_of(self.parts)})

    def resume(self) -> bool:
        """Load all parts; False, and nothing done, if there is no file.

        Raises:
            ValueError: the file is damaged, foreign, or was saved under other settings or with
                other parts; then no part has been touched.
        """
        if not self.path.exists():
            return False
        saved = load_state(self.path)
        if not isinstance(saved, dict) or saved.keys() != {"settings", "parts"}:
            raise ValueError(f"{self.path} is no checkpoint; give another path")
        then, now = saved["settings"], self.settings
        different = [
            f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ] + _misfits("", self.parts, saved["parts"])
        if different:
            raise ValueError(
                f"{self.path} belongs to a run with other arguments: {'; '.join(different)}. Give "
                "the same arguments, or another path, or delete the file to start again"
            )
        _load_into(self.parts, saved["parts"])
        return True


def layout(name: str, state: Any) -> dict[str, str]:
    """Type and shape of every tensor in a nested state, by its name in there.

    >>> layout("model", {"W": torch.zeros(2, 3), "b": torch.zeros(2)})
    {'model.W': 'float32 (2, 3)', 'model.b': 'float32 (2,)'}
    """
    if isinstance(state, Tensor):
        return {name: f"{str(state.dtype).removeprefix('torch.')} {tuple(state.shape)}"}
    found: dict[str, str] = {}
    if isinstance(state, dict):
        for key, value in state.items():
            found |= layout(_join(name, key), value)
    return found


def state_of(part: Any) -> Any:
    """The state of an object, a generator or None; of a dict of these, a dict of states."""
    if isinstance(part, dict):
        return {name: state_of(inner) for name, inner in part.items()}
    if isinstance(part, torch.Generator):
        return part.get_state()
    return None if part is None else part.state_dict()


def _misfits(name: str, part: Any, state: Any) -> list[str]:
    """Where parts and a saved state are not made of the same things."""
    if isinstance(part, dict):
        if not isinstance(state, dict) or state.keys() != part.keys():
            then = sorted(map(str, state)) if isinstance(state, dict) else "something else"
            return [f"{name or 'the run'} held {then} and holds {sorted(part)}"]
        return [x for key in part for x in _misfits(_join(name, key), part[key], state[key])]
    if (part is None) != (state is None):
        return [f"{name} was {'no' if state is None else 'a'} part of it"]
    return []


def _load_into(part: Any, state: Any) -> None:
    if isinstance(part, dict):
        for name, inner in part.items():
            _load_into(inner, state[name])
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    elif part is not None:
        part.load_state_dict(state)


def digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a text and of the bytes of named tensors, as 64 hexadecimal digits."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _encode(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`node` as JSON; its tensors go to `tensors`, and what JSON lacks becomes a tagged dict."""
    if isinstance(node, Tensor):
        name = name or "state"
        dtype, is_dense = str(node.dtype).removeprefix("torch."), node.layout == torch.strided
        if not re.fullmatch(_DTYPES, dtype) or not is_dense or node.is_nested or node.is_meta:
            raise TypeError(
                f"cannot save {name}, a {node.layout} tensor of {dtype} on {node.device}: tensors "
                "must be dense, have values and be of a dtype that safetensors knows; convert it"
            )
        # {"a.b": x, "a": {"b": y}} asks for the same name twice; the header has one for itself.
        while name in tensors or name == "__metadata__":
            name += "'"
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[name] = node.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(node, float) and not math.isfinite(node):
        return {"float": repr(node)}
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, (list, tuple)):
        items = [_encode(item, _join(name, i), tensors) for i, item in enumerate(node)]
        return items if isinstance(node, list) else {"tuple": items}
    if isinstance(node, dict):
        for key in node:
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise TypeError(
                    f"cannot save the key {key!r} of {name or 'the state'}: "
                    "keys must be strings or integers"
                )
        pairs = [[key, _encode(value, _join(name, key), tensors)] for key, value in node.items()]
        return {"dict": pairs}
    raise TypeError(
        f"cannot save {name or 'the state'}, of type {type(node).__name__}: only tensors, numbers, "
        "strings and None, in dicts, lists and tuples, can be saved"
    )


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, value),) = node.items()
    if tag == "tensor":
        return tensors[value]
    if tag == "float":
        return float(value)
    if tag == "tuple":
        return tuple(_decode(item, tensors) for item in value)
    return {key: _decode(item, tensors) for key, item in value}


def _join(name: str, key: str | int) -> str:
    return f"{name}.{key}" if name else str(key)


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # the bytes reach the disk before the name does
    temporary.replace(path)
    if os.name == "posix":  # and so does the name, before the caller goes on
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
