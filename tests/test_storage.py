"""Saved states: what comes back, what is refused, and what survives a kill in mid-save."""

import functools
import json
import math
import multiprocessing
import os
import signal
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

from companion.storage import Checkpoint, digest, layout, load_state, save_state, stateful


def same(a, b):
    """Equal in structure, types and every bit; -0.0 differs from 0.0 and NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b)) and type(a) is type(b)
    return type(a) is type(b) and repr(a) == repr(b)


STATE = {
    "weights": torch.tensor([[0.1, -0.0], [math.nan, math.inf]], dtype=torch.float64),
    "narrow": [torch.ones(3, dtype=dtype) for dtype in (torch.bool, torch.bfloat16, torch.uint8)],
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "strided": torch.arange(6.0).reshape(2, 3).T,
    "optimizer": {0: {"step": torch.tensor(1.0)}, 1: {}, "betas": (0.9, 0.999)},
    "numbers": [1, 2.5, -math.inf, math.nan, True, None, 0.1 + 0.2, 10**30],
    "text": "β ≤ 1, \"quoted\" \\ and {'tensor': 'x'}",
    "a": {"b": torch.tensor(1.0)},
    "a.b": torch.tensor(2.0),
    "__metadata__": torch.tensor(3.0),
    "__metadata__'": torch.tensor(4.0),
    "nothing": {},
    "tuples": ((), (1, (2,))),
}


def test_every_bit_comes_back(tmp_path):
    save_state(tmp_path / "s", STATE)
    assert same(load_state(tmp_path / "s"), STATE)
    changed = {**STATE, "strided": STATE["strided"] + torch.tensor(1e-6)}
    assert not same(load_state(tmp_path / "s"), changed)


@pytest.mark.parametrize("state", [torch.arange(3), 1.5, None, [], "text", {}])
def test_a_state_may_be_a_single_thing(tmp_path, state):
    save_state(tmp_path / "s", state)
    assert same(load_state(tmp_path / "s"), state)


def test_dict_and_tuple_subclasses_come_back_plain(tmp_path):
    save_state(tmp_path / "s", OrderedDict(x=torch.finfo(torch.float32).eps))
    assert type(load_state(tmp_path / "s")) is dict


def test_tensors_that_share_memory_or_need_gradients_are_saved(tmp_path, device):
    x = torch.arange(4.0, device=device).requires_grad_()
    save_state(tmp_path / "s", {"x": x, "view": x[:2]})
    back = load_state(tmp_path / "s")
    assert not back["x"].requires_grad
    assert back["x"].device.type == "cpu"
    assert back["x"].tolist() == [0, 1, 2, 3]
    assert back["view"].tolist() == [0, 1]


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save_state(tmp_path / name, STATE)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_other_tools_can_read_the_tensors(tmp_path):
    from safetensors.numpy import load_file

    save_state(tmp_path / "s", {"model": {"W": torch.eye(2)}, "chains": [torch.zeros(3)]})
    arrays = load_file(tmp_path / "s")
    assert sorted(arrays) == ["chains.0", "model.W"]
    assert arrays["model.W"].tolist() == [[1, 0], [0, 1]]


def test_states_are_saved_and_loaded_whatever_the_default_device(tmp_path):
    with torch.device("meta"):
        save_state(tmp_path / "s", STATE)
        assert same(load_state(tmp_path / "s"), STATE)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {"f": len}}, r"model\.f, of type builtin_function_or_method"),
        ([1, {2}], r"cannot save 1, of type set"),
        ({"x": {1.5: 0}}, r"the key 1\.5 of x"),
        (object(), r"the state, of type object"),
        ({"z": [torch.zeros(2, dtype=torch.complex128)]}, r"z\.0, .* of complex128 on cpu"),
        ({"W": torch.eye(2).to_sparse()}, r"W, a torch\.sparse_coo tensor of float32"),
        ({"W": torch.zeros(2, device="meta")}, r"W, a torch\.strided tensor of float32 on meta"),
        (torch.empty(2, dtype=torch.int4), r"state, .* of int4"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path / "s", state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_tensor_is_refused(tmp_path):
    x = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"cannot save x, .* of qint8"):
        save_state(tmp_path / "s", {"x": x})


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_state(tmp_path / "s")


def test_every_truncation_and_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "s"
    save_state(path, {"x": torch.arange(4.0), "n": 3})
    sound = path.read_bytes()
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        with pytest.raises(ValueError, match="damaged"):
            load_state(path)
    unnoticed = []
    for i in range(len(sound)):
        path.write_bytes(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :])
        try:
            state = load_state(path)
        except ValueError:
            continue
        # Blanks that pad the header may change; what is loaded may not.
        unnoticed.append(same(state, {"x": torch.arange(4.0), "n": 3}))
    assert all(unnoticed)


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "s")
    torch.save({"x": torch.zeros(2)}, tmp_path / "t")
    for name in "st":
        with pytest.raises(ValueError, match="not written by companion"):
            load_state(tmp_path / name)


def test_a_file_of_another_format_version_says_so(tmp_path):
    from safetensors.torch import save_file

    header = json.dumps({"version": 2, "digest": digest("{}", {}), "state": "{}"})
    save_file({}, tmp_path / "s", {"companion": header})
    with pytest.raises(ValueError, match="format 2"):
        load_state(tmp_path / "s")


# ---------------------------------------------------------------- checkpoints of a run


def sampler_run(path, num_steps, *, step_size=0.5, seed=0):
    """A chain with two generators, adapted by an optimiser: what a sampler would checkpoint."""
    noise, other = (torch.Generator().manual_seed(seed + i) for i in range(2))
    scale = torch.nn.Linear(1, 1, dtype=torch.float64)
    torch.nn.init.ones_(scale.weight), torch.nn.init.zeros_(scale.bias)
    optimizer = torch.optim.Adam(scale.parameters())
    parts = {"kernel": {"scale": scale, "schedule": None}, "adam": optimizer, "noise": noise}
    run = Checkpoint(path, parts | {"other": other}, {"step_size": step_size})
    resumed = run.resume()
    for _ in range(num_steps):
        x = torch.randn(5, 1, generator=noise, dtype=torch.float64)
        u = torch.rand(5, 1, generator=other, dtype=torch.float64)
        optimizer.zero_grad()
        (scale(x) - step_size * u).square().sum().backward()
        optimizer.step()
        run.save()
    return resumed, [scale.state_dict(), optimizer.state_dict(), noise.get_state()]


def test_a_checkpoint_brings_all_parts_back(tmp_path):
    resumed, whole = sampler_run(tmp_path / "whole", 6)
    assert not resumed
    sampler_run(tmp_path / "parts", 4)
    resumed, parts = sampler_run(tmp_path / "parts", 2)
    assert resumed
    assert same([dict(parts[0]), *parts[1:]], [dict(whole[0]), *whole[1:]])
    assert not same(dict(sampler_run(tmp_path / "new", 5)[1][0]), dict(whole[0]))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    sampler_run(tmp_path / "run", 1)
    with pytest.raises(ValueError, match=r"step_size was 0\.5 and is 0\.25"):
        sampler_run(tmp_path / "run", 1, step_size=0.25)
    save_state(tmp_path / "run", {"x": 1})
    with pytest.raises(ValueError, match="is no checkpoint"):
        sampler_run(tmp_path / "run", 1)
    with pytest.raises(ValueError, match="there is no folder"):
        Checkpoint(tmp_path / "nowhere" / "run", {}, {})


def test_stateful_objects_are_found_wherever_a_function_keeps_them():
    layer, other = torch.nn.Linear(1, 1), torch.nn.Linear(2, 2)

    def enclosing(x):
        return layer(x)

    def argument(model, x, *, chains=None):
        return x

    partial = functools.partial(functools.partial(argument, layer), chains=other)
    assert stateful(enclosing) == {"layer": layer}
    assert stateful(layer.forward) == {"self": layer}
    assert stateful(layer) == {"self": layer}
    assert stateful(partial) == {"0": layer, "chains": other}
    assert stateful(partial, layer) == {"chains": other}
    assert stateful(argument) == stateful(math.exp) == stateful(torch.nn.Linear) == {}


LAYER = torch.nn.Linear(1, 1)


def uses_a_global(x):
    return [LAYER(y) for y in x]


def test_the_search_for_state_goes_through_what_a_function_uses():
    generator, layer = torch.Generator(), torch.nn.Linear(1, 1)
    kept = SimpleNamespace(parts=[{"a": layer, 2: (generator, generator)}])
    kept.itself = kept

    def loss(x):
        return kept, later

    def helper(x, first=None, *, second=loss):
        return uses_a_global(x)

    assert stateful(helper) == {
        "uses_a_global.LAYER": LAYER,
        "second.kept.parts.0.a": layer,
        "second.kept.parts.0.2.0": generator,
    }
    assert stateful(helper, generator, LAYER) == {"second.kept.parts.0.a": layer}
    later = layer
    assert stateful(loss, layer) == {"kept.parts.0.2.0": generator}


class Caller(torch.nn.Module):
    def forward(self, x):
        return LAYER(x)


def test_a_module_that_is_called_uses_what_its_forward_uses():
    caller = Caller()
    assert stateful(caller) == {"self": caller, "LAYER": LAYER}
    assert stateful(lambda x: caller(x), caller) == {"caller.LAYER": LAYER}


def test_submodules_are_saved_with_their_module_and_what_else_they_hold_by_itself():
    inner = torch.nn.Linear(1, 1)
    inner.generator = torch.Generator()
    outer = torch.nn.Sequential(inner)
    expected = {"self": outer, "0.generator": inner.generator}
    assert stateful(outer) == expected
    assert stateful(outer, outer) == {"0.generator": inner.generator}
    assert stateful(functools.partial(outer, inner), outer) == {"0.generator": inner.generator}


def test_the_search_stays_out_of_modules_classes_and_libraries():
    class Model:
        layer = LAYER

    data = torch.utils.data.DataLoader([LAYER])
    assert stateful(lambda x: (Model, data, math, torch)) == {}


def test_a_checkpoint_of_other_parts_is_refused_and_nothing_is_touched(tmp_path):
    def run(**parts):
        return Checkpoint(tmp_path / "run", parts, {})

    layer = torch.nn.Linear(1, 1)
    run(layer=layer, loss={"a": layer}, schedule=None).save()
    before = layer.weight.item()
    with torch.no_grad():
        layer.weight += 1
    for parts, match in [
        ({"layer": layer}, r"the run held \['layer', 'loss', 'schedule'\] and holds \['layer'\]"),
        ({"loss": {"b": layer}, "schedule": None}, r"loss held \['a'\] and holds \['b'\]"),
        ({"loss": {"a": layer}, "schedule": layer}, "schedule was no part"),
        ({"loss": {"a": None}, "schedule": None}, r"loss\.a was a part"),
        ({"loss": {}, "schedule": {"a": layer}}, "schedule held something else"),
    ]:
        with pytest.raises(ValueError, match=match):
            run(**({"layer": layer} | parts)).resume()
        assert layer.weight.item() == before + 1
    assert run(layer=layer, loss={"a": layer}, schedule=None).resume()
    assert layer.weight.item() == before


def test_layout_names_every_tensor():
    state = {"W": torch.zeros(2, 3), "inner": {0: torch.tensor(True)}, "n": 3}
    assert layout("m", state) == {"m.W": "float32 (2, 3)", "m.inner.0": "bool ()"}


# ---------------------------------------------------------------- killed while saving

SERVER = multiprocessing.get_context("forkserver")  # forks processes that have imported torch
SERVER.set_forkserver_preload(["pytest", "companion.storage", "safetensors.torch"])
STAGES = ["half written", "before the flush", "before the rename", "after the rename"]


class HalfWritten:
    """A file whose first write is cut in two by `die`."""

    def __init__(self, file, die):
        self.file, self.die = file, die

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.die()


def save_and_die(path, stage):
    """In a process of its own: save `{"x": ones}` and be killed at the given stage."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    folder = type(path)
    if stage == "half written":
        whole = folder.open
        folder.open = lambda self, mode: HalfWritten(whole(self, mode), die)
    elif stage == "before the flush":
        os.fsync = die
    elif stage == "before the rename":
        folder.replace = die
    else:
        replace = folder.replace

        def replace_and_die(self, target):
            replace(self, target)
            die()

        folder.replace = replace_and_die
    save_state(path, {"x": torch.ones(1000)})


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_stage_leaves_the_old_file_or_the_new_one(tmp_path, stage):
    path = tmp_path / "s"
    save_state(path, {"x": torch.zeros(1000)})
    process = SERVER.Process(target=save_and_die, args=(path, stage))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    expected = float(stage == "after the rename")
    assert load_state(path)["x"].unique().tolist() == [expected]
    left = path.with_name("s.tmp")
    assert left.exists() == (stage != "after the rename")
    if stage == "half written":
        assert 0 < left.stat().st_size < path.stat().st_size
    save_state(path, {"x": torch.full((1000,), 2.0)})  # what the kill left is no obstacle
    assert load_state(path)["x"].unique().tolist() == [2.0]
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
