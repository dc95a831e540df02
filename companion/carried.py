"""What a function carries from call to call: found, so that a checkpoint can save it."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["stateful"]

# Where `stateful` does not look: what holds no state of a run, or more than can be searched.
_LEAVES = (bool, int, float, complex, str, bytes, type, type(None), ModuleType, Tensor)
_FOREIGN = sys.stdlib_module_names - {"functools", "types"} | {"torch", "numpy"}
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


def stateful(function: Callable[..., Any], *others: Any) -> dict[str, Any]:
    """The objects whose state a function carries from call to call, by name.

    The search goes through the globals, enclosing variables, defaults and partial arguments of the
    function, the object it is a method of, the functions among these, lists, tuples, dicts and the
    attributes of objects. It enters no Python modules, no classes, no objects of PyTorch but neural
    modules, and not the globals of functions of other installed packages.

    Args:
        function: a function, method, partial function or callable object.
        others: objects that do not count, nor do their submodules. What else they hold does.

    Returns:
        what has `load_state_dict`, without the submodules of what was found, and generators.

    >>> layer = torch.nn.Linear(1, 1)
    >>> [list(stateful(f)) for f in (lambda x: layer(x), layer.forward, layer, torch.exp)]
    [['layer'], ['self'], ['self'], []]
    >>> stateful(layer.forward, layer)
    {}
    >>> list(stateful(lambda x, parts={"first": [layer]}: x))
    ['parts.first.0']
    """
    found: dict[str, Any] = {}
    covered = {id(part) for x in others for part in _modules(x)}
    seen: set[int] = set()
    queue: list[tuple[str, Any]] = [("", function)]
    # It grows while it is read, so what is near gets the short names. It also keeps all of it
    # alive: no id is used twice.
    for name, x in queue:
        if id(x) in seen or isinstance(x, _LEAVES):
            continue
        seen.add(id(x))
        has_state = isinstance(x, torch.Generator) or hasattr(x, "load_state_dict")
        if has_state and id(x) not in covered:
            new = name or "self"
            while new in found:
                new += "'"
            found[new] = x
        covered.update(map(id, _modules(x)))
        for key, inner in _held_by(x, is_own=not name):
            if not isinstance(inner, _LEAVES):
                own_name = f"{name}.{key}".strip(".") if key != "" else name
                queue.append((own_name, inner))
    return found


def _modules(x: Any) -> list[Any]:
    return list(x.modules()) if isinstance(x, nn.Module) else [x]


def _held_by(x: Any, is_own: bool) -> Iterator[tuple[str | int, Any]]:
    """What an object refers to, by name; the globals of an installed function only if `is_own`."""
    if isinstance(x, functools.partial):
        yield from enumerate(x.args)
        yield from x.keywords.items()
        yield "", x.func
    elif inspect.isfunction(x):
        code, values = x.__code__, x.__defaults__ or ()
        if is_own or not code.co_filename.startswith(_INSTALLED):
            for name in sorted(_global_names(code) & x.__globals__.keys()):
                yield name, x.__globals__[name]
        for name, cell in zip(code.co_freevars, x.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                yield name, cell.cell_contents
        yield from zip(code.co_varnames[code.co_argcount - len(values) :], values, strict=False)
        yield from [*(x.__kwdefaults__ or {}).items(), *vars(x).items()]
    elif inspect.isroutine(x):
        yield from [("self", getattr(x, "__self__", None)), ("", getattr(x, "__func__", None))]
    elif isinstance(x, (list, tuple)):
        yield from enumerate(x)
    elif isinstance(x, dict):
        yield from ((k if isinstance(k, (str, int)) else i, x[k]) for i, k in enumerate(x))
    if isinstance(x, nn.Module):
        common = vars(nn.Module())  # buffers, hooks and the like
        yield from x.named_children()
        yield from ((name, value) for name, value in vars(x).items() if name not in common)
        yield "", getattr(type(x), "forward", None)
    elif type(x).__module__.partition(".")[0] not in _FOREIGN:
        state = object.__getstate__(x)  # the attributes, and the slots if the class has any
        for attributes in state if isinstance(state, tuple) else (state,):
            yield from (attributes or {}).items()
        yield "", inspect.getattr_static(type(x), "__call__", None)


def _global_names(code: CodeType) -> set[str]:
    """The globals that a function uses, and the functions written inside it."""
    names = {op.argval for op in dis.get_instructions(code) if op.opname == "LOAD_GLOBAL"}
    return names.union(*(_global_names(c) for c in code.co_consts if inspect.iscode(c)))
