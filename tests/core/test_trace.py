"""`sample` and its `Trace`: what is run, kept, counted, saved and resumed."""

import dataclasses
import itertools
import math
import multiprocessing
import random
import signal
import time
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from companion.core import BlockKernel, Kernel, LogZ, Trace, sample
from companion.storage import load_state, save_state

SERVER = multiprocessing.get_context("forkserver")  # forks processes that have imported these:
SERVER.set_forkserver_preload(["pytest", "companion.core", "safetensors.torch"])

# ---------------------------------------------------------------- sample


class Count(NamedTuple):
    x: Tensor
    log_prob: Tensor | None


class Info(NamedTuple):
    accept_prob: Tensor
    accepted: Tensor


class NanInfo(NamedTuple):
    accept_prob: Tensor
    accepted: Tensor
    is_nan: Tensor


def counting(event_dims: int, log_prob: bool = True) -> Kernel:
    """Adds one to every chain at each step: draw number t shows which steps were kept."""

    def density(x: Tensor) -> Tensor | None:
        return 10.0 * x.flatten(x.ndim - event_dims)[..., 0] if event_dims else 10.0 * x

    def step(state: Count, *, generator=None) -> tuple[Count, Info]:
        x = state.x + 1
        chains = x.shape[: x.ndim - event_dims]
        accept = torch.full(chains, 0.25, dtype=x.dtype, device=x.device)
        return Count(x, density(x) if log_prob else None), Info(accept, accept > 0.5)

    return Kernel(lambda x: Count(x, density(x) if log_prob else None), step)


@pytest.mark.parametrize("chains", [(), (4,), (3, 4)])
@pytest.mark.parametrize("event", [(), (2,), (2, 3)])
def test_draws_go_right_behind_the_chains(device, chains, event):
    x0 = torch.zeros((*chains, *event), dtype=torch.float64, device=device)
    trace = sample(counting(len(event)), x0, 5)
    assert trace.x.shape == (*chains, 5, *event)
    assert trace.log_prob.shape == (*chains, 5)
    assert trace.accept_prob.shape == trace.num_nan.shape == chains
    assert trace.x.dtype == torch.float64
    assert {trace.x.device.type, trace.num_nan.device.type} == {device.type}
    last_chain = trace.x.reshape(-1, 5, math.prod(event))[-1, :, 0]
    assert last_chain.tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(trace.log_prob.reshape(-1, 5)[-1], 10 * last_chain)
    assert (trace.accept_prob == 0.25).all()


@pytest.mark.parametrize(
    ("warmup", "thin", "expected"),
    [(0, 1, [1, 2, 3]), (4, 1, [5, 6, 7]), (0, 3, [3, 6, 9]), (2, 5, [7, 12, 17])],
)
def test_warmup_and_thinning_keep_the_right_steps(warmup, thin, expected):
    trace = sample(counting(1), torch.zeros(2, 1), 3, warmup=warmup, thin=thin)
    assert trace.x[:, :, 0].tolist() == [expected, expected]
    assert trace.log_prob.tolist() == [[10 * t for t in expected]] * 2


def test_kernels_without_a_log_density_give_none():
    trace = sample(counting(1, log_prob=False), torch.zeros(2, 1), 3)
    assert trace.log_prob is None


def nan_at(steps: dict[int, list[int]]) -> Kernel:
    """Reports NaN at the given steps (from 1) in the given chains of three."""

    def step(state: Count, *, generator=None) -> tuple[Count, NanInfo]:
        x = state.x + 1
        is_nan = torch.zeros(3, dtype=torch.bool)
        is_nan[steps.get(int(x[0, 0]), [])] = True
        accept = torch.where(is_nan, 0.0, 1.0)
        return Count(x, None), NanInfo(accept, ~is_nan, is_nan)

    return Kernel(lambda x: Count(x, None), step)


def test_nan_proposals_are_counted_by_chain_after_the_warmup_and_warned_of():
    kernel = nan_at({1: [0, 1, 2], 3: [0], 4: [0, 2], 6: [0]})
    with pytest.warns(UserWarning, match=r"4 proposals had a NaN .* \(in 2 of 3 chains\)"):
        trace = sample(kernel, torch.zeros(3, 1), 2, warmup=2, thin=2)
    assert trace.num_nan.tolist() == [3, 0, 1]
    assert trace.accept_prob.tolist() == [0.25, 1.0, 0.75]  # thinned steps count, warm-up does not


def test_nan_during_the_warmup_alone_is_no_warning():
    trace = sample(nan_at({1: [0, 1, 2]}), torch.zeros(3, 1), 2, warmup=1)
    assert trace.num_nan.tolist() == [0, 0, 0]


def test_the_graph_of_a_model_is_not_kept(rng):
    """A log-density with parameters would otherwise hold every step's graph in memory."""
    weight = torch.ones(2, requires_grad=True)

    def density(x: Tensor) -> Tensor:
        return -(weight * x).square().sum(-1)

    def step(state: Count, *, generator=None) -> tuple[Count, Info]:
        x = state.x + torch.randn(state.x.shape, generator=generator)
        accept = (density(x) - state.log_prob).exp().clamp(max=1)
        return Count(x, state.log_prob + density(x)), Info(accept, accept > 0)

    kernel = Kernel(lambda x: Count(x, density(x)), step)
    trace = sample(kernel, torch.zeros(3, 2), 4, generator=rng(3))
    assert not trace.log_prob.requires_grad
    assert not trace.accept_prob.requires_grad
    assert density(torch.ones(2)).requires_grad  # gradients are on again afterwards


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_draws": 0}, ValueError, "num_draws must be at least 1"),
        ({"num_draws": 2.0}, TypeError, "num_draws must be an integer"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0"),
        ({"thin": 0}, ValueError, "thin must be at least 1"),
        ({"x0": torch.tensor([0.0, math.nan])}, ValueError, r"x0 has 1 NaN.*index \(1,\)"),
        ({"x0": torch.zeros(0, 2)}, ValueError, "x0 is empty"),
        ({"x0": [0.0]}, TypeError, "x0 must be a torch.Tensor"),
        ({"generator": 1}, TypeError, "generator must be a torch.Generator"),
    ],
)
def test_bad_arguments_are_refused_before_the_kernel_runs(keywords, error, message):
    def fail(*args, **kwargs):
        raise AssertionError("the kernel ran")

    arguments = {"x0": torch.zeros(2), "num_draws": 2} | keywords
    with pytest.raises(error, match=message):
        sample(Kernel(fail, fail), **arguments)


def test_the_generator_reaches_the_kernel(rng):
    def step(state: Count, *, generator=None) -> tuple[Count, Info]:
        x = torch.randn(state.x.shape, generator=generator)
        return Count(x, None), Info(torch.ones(4), torch.ones(4, dtype=torch.bool))

    kernel = Kernel(lambda x: Count(x, None), step)
    first = sample(kernel, torch.zeros(4, 2), 10, generator=rng(1))
    again = sample(kernel, torch.zeros(4, 2), 10, generator=rng(1))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, sample(kernel, torch.zeros(4, 2), 10, generator=rng(2)).x)


def test_progress_is_silent_unless_asked_for(capfd):
    sample(counting(1), torch.zeros(2, 1), 3)
    assert capfd.readouterr() == ("", "")
    sample(counting(1), torch.zeros(2, 1), 3, warmup=2, thin=4, progress=True)
    assert "14/14" in capfd.readouterr().err


def test_no_tensor_of_a_trace_is_made_on_the_default_device():
    x0, kernel = torch.zeros(3, 2), counting(1)
    with torch.device("meta"):
        trace = sample(kernel, x0, 4, warmup=1)
        tensors = (trace.x, trace.log_prob, trace.accept_prob, trace.num_nan)
        assert {t.device.type for t in tensors} == {"cpu"}


# ---------------------------------------------------------------- what a kernel tells


class RichInfo(NamedTuple):
    accept_prob: Tensor
    accepted: Tensor
    is_nan: Tensor
    is_divergent: Tensor
    energy: Tensor
    num_steps: Tensor
    forces: Tensor
    name: str = "not a tensor"


def telling(chains: tuple[int, ...], device: torch.device | str = "cpu") -> Kernel:
    """At step t the energy is t, forces are (t, -t), and t = 3, 4, 8 diverge in the last chain."""

    def step(state: Count, *, generator=None) -> tuple[Count, RichInfo]:
        t = state.x[..., 0] + 1
        last = torch.zeros(chains, dtype=torch.bool, device=device)
        last.reshape(-1)[-1] = True
        diverges = last & ((t == 3) | (t == 4) | (t == 8))
        info = RichInfo(
            torch.ones_like(t),
            ~diverges,
            last & False,
            diverges,
            t,
            t.int(),
            torch.stack([t, -t], -1),
        )
        return Count(state.x + 1, -t), info

    return Kernel(lambda x: Count(x, -x[..., 0]), step)


@pytest.mark.parametrize("chains", [(), (4,), (3, 4)])
def test_what_a_kernel_tells_is_kept_of_the_step_that_led_to_each_draw(device, chains):
    x0 = torch.zeros((*chains, 2), dtype=torch.float64, device=device)
    trace = sample(telling(chains, device), x0, 3, warmup=2, thin=2)
    assert trace.stats.keys() == {"is_divergent", "energy", "num_steps", "forces"}
    assert (trace.stats["energy"] == torch.tensor([4.0, 6.0, 8.0], device=device)).all()
    assert trace.stats["energy"].shape == (*chains, 3)
    assert torch.equal(trace.stats["energy"], -trace.log_prob)
    assert trace.stats["num_steps"].dtype == torch.int32
    assert trace.stats["forces"].shape == (*chains, 3, 2)
    assert torch.equal(trace.stats["forces"][..., 1], -trace.stats["energy"])
    assert trace.stats["is_divergent"].reshape(-1, 3)[-1].tolist() == [True, False, True]
    divergent = trace.num_divergent.reshape(-1).tolist()  # of all steps, kept or not
    assert divergent == [0] * (len(divergent) - 1) + [3]
    assert trace.num_divergent.dtype == torch.int64


@pytest.mark.filterwarnings("ignore:.*proposals had a NaN log-density")
def test_the_acceptance_is_the_mean_over_all_steps_after_the_warmup(rng, device):
    probs = []

    def noting(state, *, generator=None):
        state, info = walk().step(state, generator=generator)
        probs.append(info.accept_prob)
        return state, info

    x0 = torch.zeros(3, 2, dtype=torch.float64, device=device)
    trace = sample(Kernel(walk().init, noting), x0, 50, warmup=9, thin=3, generator=rng(0, device))
    mean = torch.stack(probs[9:]).mean(0)
    torch.testing.assert_close(trace.accept_prob, mean, rtol=0.0, atol=1e-9)


def test_kernels_that_tell_nothing_more_have_no_statistics():
    trace = sample(counting(1), torch.zeros(3, 2), 4)
    assert trace.stats == {}
    assert trace.num_divergent.tolist() == [0, 0, 0]


def test_long_runs_are_written_block_by_block_without_a_gap(device):
    """More steps than a block holds, and draws larger than a block."""
    for size, num_draws in ((1, 1001), (200_000, 3)):
        x0 = torch.zeros(1, size, dtype=torch.float64, device=device)
        trace = sample(counting(1), x0, num_draws, warmup=70, thin=2)
        expected = 70 + 2 * torch.arange(1.0, num_draws + 1, dtype=torch.float64, device=device)
        assert torch.equal(trace.x[0, :, -1], expected)
        assert torch.equal(trace.log_prob[0], 10 * expected)
        assert trace.accept_prob.item() == 0.25


def test_no_more_than_a_block_of_states_is_held_in_memory():
    alive = weakref.WeakSet()

    def step(state: Count, *, generator=None) -> tuple[Count, Info]:
        x = state.x + 1
        alive.add(x)
        assert len(alive) <= 66  # a block, the chains' place, and this one
        return Count(x, None), Info(torch.ones(2), torch.ones(2, dtype=torch.bool))

    trace = sample(Kernel(lambda x: Count(x, None), step), torch.zeros(2, 1), 500)
    assert trace.x[0, -1, 0] == 500


def test_a_field_without_the_dimensions_of_the_chains_is_named():
    class Wrong(NamedTuple):
        accept_prob: Tensor
        accepted: Tensor
        energy: Tensor

    def step(state: Count, *, generator=None) -> tuple[Count, Wrong]:
        return state, Wrong(torch.ones(3), torch.ones(3, dtype=torch.bool), torch.ones(4))

    kernel = Kernel(lambda x: Count(x, None), step)
    with pytest.raises(ValueError, match=r"energy must begin with .* chains, \(3,\).*is \(4,\)"):
        sample(kernel, torch.zeros(3, 1), 2)


def test_the_callback_sees_every_kept_draw():
    seen = []

    def callback(i, state, info):
        seen.append((i, state.x[0, 0].item(), info.accept_prob.tolist()))

    sample(counting(1), torch.zeros(2, 1), 3, warmup=4, thin=2, callback=callback)
    assert seen == [(i, 6.0 + 2 * i, [0.25, 0.25]) for i in range(3)]


def test_what_the_callback_raises_ends_the_run():
    def callback(i, state, info):
        if i == 1:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        sample(counting(1), torch.zeros(2, 1), 3, callback=callback)


# ---------------------------------------------------------------- checkpoints


class Walk(NamedTuple):
    x: Tensor
    log_prob: Tensor
    memory: tuple[Tensor, None, int]  # a state may be nested


class WalkInfo(NamedTuple):
    accept_prob: Tensor
    accepted: Tensor
    is_nan: Tensor
    is_divergent: Tensor
    energy: Tensor


def walk(scale: float = 1.0, pause: float = 0.0) -> Kernel:
    """A random-walk Metropolis kernel on a skewed density, with a NaN now and then."""

    def log_prob(x: Tensor) -> Tensor:
        return (x - x.exp()).sum(-1)

    def step(state: Walk, *, generator=None) -> tuple[Walk, WalkInfo]:
        time.sleep(pause)
        x, chains = state.x, state.x.shape[:-1]
        like = {"dtype": x.dtype, "device": x.device, "generator": generator}
        y = x + scale * torch.randn(x.shape, **like)
        u = torch.rand(chains, **like)
        y_log_prob = torch.where(y[..., 0] > 1.5, math.nan, log_prob(y))
        accept_prob = (y_log_prob - state.log_prob).exp().clamp(max=1).nan_to_num(0.0)
        accepted = u < accept_prob
        moved = Walk(
            torch.where(accepted[..., None], y, x),
            torch.where(accepted, y_log_prob, state.log_prob),
            (state.memory[0] + x, None, state.memory[2] + 1),
        )
        info = WalkInfo(accept_prob, accepted, y_log_prob.isnan(), u > 0.9, u + moved.memory[2])
        return moved, info

    return Kernel(lambda x: Walk(x, log_prob(x), (torch.zeros_like(x), None, 0)), step)


def run(path=None, num_draws=40, *, x0=None, seed=1, kernel=None, dtype=torch.float64, **options):
    x0 = torch.zeros(3, 2, dtype=dtype) if x0 is None else x0
    g = torch.Generator(x0.device).manual_seed(seed)
    options = {"warmup": 7, "thin": 3, "save_every": 10} | options
    trace = sample(
        walk() if kernel is None else kernel, x0, num_draws, generator=g, checkpoint=path, **options
    )
    return trace, g.get_state()


def assert_same(first, second):
    """Bit for bit the same trace, and the same generator afterwards."""
    (a, g), (b, h) = first, second
    assert torch.equal(g, h)
    assert a.stats.keys() == b.stats.keys()
    for field in dataclasses.fields(Trace):
        one, two = getattr(a, field.name), getattr(b, field.name)
        for name in a.stats if field.name == "stats" else [None]:
            p, q = (one, two) if name is None else (one[name], two[name])
            assert torch.equal(p, q), (field.name, name)
            assert p.dtype == q.dtype


class Stop(Exception):
    """Raised by a callback in place of a kill."""


def stop_after(num_draws):
    def callback(i, state, info):
        if i == num_draws:
            raise Stop

    return callback


nan_expected = pytest.mark.filterwarnings("ignore:.*proposals had a NaN log-density")


@nan_expected
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("save_every", [1, 4, 10, 1000])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, device, dtype, save_every):
    x0 = torch.zeros(3, 2, dtype=dtype, device=device)
    for num_draws in (3, 17, 30):
        with pytest.raises(Stop):
            run(tmp_path / "a", callback=stop_after(num_draws), x0=x0, save_every=save_every)
    assert_same(run(tmp_path / "a", x0=x0, save_every=save_every), run(x0=x0))
    assert run(x0=x0)[0].num_nan.sum() > 0


@nan_expected
def test_a_run_stopped_in_its_warmup_goes_on_there(tmp_path):
    calls = []

    def stopping(kernel, at):
        def step(state, *, generator=None):
            calls.append(None)
            if len(calls) == at:
                raise Stop
            return kernel.step(state, generator=generator)

        return Kernel(kernel.init, step)

    options = {"warmup": 50, "save_every": 20}
    with pytest.raises(Stop):
        run(tmp_path / "a", kernel=stopping(walk(), 46), **options)
    assert load_state(tmp_path / "a")["parts"]["run"]["steps"] == 40
    calls.clear()
    resumed = run(tmp_path / "a", kernel=stopping(walk(), 0), **options)
    assert len(calls) == 1 + 10 + 40 * 3  # one to compare the kernels by
    assert_same(resumed, run(**options))


@nan_expected
def test_a_finished_run_returns_at_once_and_more_draws_prolong_it(tmp_path):
    assert_same(run(tmp_path / "a", 20), run(None, 20))
    assert_same(run(tmp_path / "a", 20, callback=stop_after(0)), run(None, 20))
    assert_same(run(tmp_path / "a", 40), run(None, 40))
    with pytest.raises(ValueError, match="at step 127, beyond the 97 steps asked for"):
        run(tmp_path / "a", 30)


def in_blocks(kernel, record):
    """The kernel, with several steps in one call; a call that is made is recorded."""

    def steps(state, n, *, generator=None):
        record.append(n)
        made = [(state, None)]
        for _ in range(n):
            made.append(kernel.step(made[-1][0], generator=generator))
        return made[1:]

    return BlockKernel(kernel.init, kernel.step, steps)


@nan_expected
@pytest.mark.parametrize("save_every", [1, 10, 20, 33, 1000])
def test_steps_made_several_in_one_call_are_the_steps_made_one_by_one(tmp_path, save_every):
    plain, record = run(save_every=save_every), []
    kernel = in_blocks(walk(), record)
    assert_same(run(kernel=kernel), plain)
    assert record == [16] * 7  # of 7 + 40 * 3 steps, and the rest one by one
    record.clear()
    with pytest.raises(Stop):
        run(tmp_path / "a", kernel=kernel, callback=stop_after(25), save_every=save_every)
    assert_same(run(tmp_path / "a", kernel=kernel, save_every=save_every), plain)
    assert (len(record) > 0) == (save_every > 16)  # no call goes beyond a save
    assert_same(run(tmp_path / "a", kernel=walk(), save_every=save_every), plain)


def test_a_copy_of_a_kernel_with_another_step_makes_no_blocks():
    kernel = in_blocks(counting(0), record := [])
    _, step = kernel
    other = kernel._replace(step=lambda state, *, generator=None: step(step(state)[0]))
    assert sample(other, torch.zeros(2), 40).x[0].tolist() == list(range(2, 82, 2))
    assert record == []
    assert sample(kernel, torch.zeros(2), 40).x[0].tolist() == list(range(1, 41))
    assert record == [16, 16]


@nan_expected
def test_every_draw_is_written_once(tmp_path):
    run(tmp_path / "a", 40)
    shards = sorted(tmp_path.glob("a.draws-*"))
    rows = [len(load_state(shard)["x"]) for shard in shards]
    assert sum(rows) == 40
    assert max(rows) == 4  # ten steps, three a draw
    assert (tmp_path / "a").stat().st_size < 16_000  # generator and chains, however long the run


@nan_expected
def test_strides_survive_for_they_decide_how_sums_round(tmp_path):
    x0 = torch.zeros(5, 3, dtype=torch.float64).T
    strides = []

    def record(i, state, info):
        strides.append(state.x.stride())
        stop_after(20)(i, state, info)

    with pytest.raises(Stop):
        run(tmp_path / "a", x0=x0, callback=record)
    resumed = run(tmp_path / "a", x0=x0, callback=lambda i, s, _: strides.append(s.x.stride()))
    assert set(strides) == {(1, 3)}
    assert_same(resumed, run(x0=x0))


@nan_expected
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thin": 2}, "thin was 3 and is 2"),
        ({"warmup": 8}, "warmup was 7 and is 8"),
        ({"seed": 2}, "generator was 'cpu, seed 1' and is 'cpu, seed 2'"),
        ({"x0": torch.full((3, 2), 0.1, dtype=torch.float64)}, "x0 was .*digest"),
        ({"x0": torch.zeros(4, 2, dtype=torch.float64)}, r"x0 was 'float64 \(3, 2\)"),
        ({"kernel": walk(scale=1.01)}, r"the kernel's first step was '\|x\|"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    with pytest.raises(Stop):
        run(tmp_path / "a", callback=stop_after(20))
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a", **change)
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert_same(run(tmp_path / "a"), run())


@nan_expected
def test_missing_and_foreign_draws_are_noticed(tmp_path):
    path = tmp_path / "a"
    run(path)
    shard = tmp_path / "a.draws-00002"
    rows = load_state(shard)
    save_state(shard, {name: x[:-1] for name, x in rows.items()})
    with pytest.raises(ValueError, match="hold 39 draws and .* tells of 40"):
        run(path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="a.draws-00002"):
        run(path)


def test_a_checkpoint_needs_a_generator_and_a_folder(tmp_path):
    with pytest.raises(TypeError, match="a checkpoint needs a generator"):
        sample(walk(), torch.zeros(3, 2), 5, checkpoint=tmp_path / "a")
    with pytest.raises(ValueError, match="there is no folder"):
        run(tmp_path / "no" / "a")
    with pytest.raises(ValueError, match="save_every must be at least 1"):
        run(save_every=0)


def killed_run(path):
    """What the killed process does."""
    torch.set_num_threads(1)
    run(path, 400, kernel=walk(pause=1e-4), save_every=9)


@nan_expected
def test_killed_again_and_again_a_run_ends_bit_for_bit_where_it_would_have(tmp_path):
    path = tmp_path / "killed"
    moments = random.Random(0)
    steps = []  # at which the kills found the run

    def last_save():
        return path.stat().st_mtime_ns if path.exists() else None

    while len(steps) < 3:
        before = last_save()
        process = SERVER.Process(target=killed_run, args=(path,))
        process.start()
        while process.is_alive() and last_save() == before:  # let each get a little further
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before the kill came
            break
        assert process.exitcode == -signal.SIGKILL
        steps.append(load_state(path)["parts"]["run"]["steps"])
    assert len(steps) >= 2
    assert all(0 < a < b for a, b in itertools.pairwise(steps))
    assert steps[-1] < 7 + 400 * 3
    assert_same(run(path, 400), run(None, 400))


# ---------------------------------------------------------------- Trace


@pytest.mark.parametrize("chains", [(), (4,), (3, 4)])
def test_arviz_gets_chains_draws_and_event(chains):
    pytest.importorskip("arviz_base")
    trace = sample(counting(2), torch.zeros(*chains, 2, 3), 5)
    tree = trace.to_arviz()
    num_chains = math.prod(chains)
    assert tree["posterior"]["x"].shape == (num_chains, 5, 2, 3)
    assert tree["posterior"]["x"].dims[:2] == ("chain", "draw")
    assert tree["sample_stats"]["lp"].shape == (num_chains, 5)
    assert tree["posterior"]["x"].values[-1, :, 0, 0].tolist() == [1, 2, 3, 4, 5]


def test_arviz_gets_no_log_density_where_there_is_none():
    pytest.importorskip("arviz_base")
    tree = sample(counting(1, log_prob=False), torch.zeros(2, 1), 5).to_arviz()
    assert "sample_stats" not in tree.children


def test_results_are_frozen_and_compare_by_identity():
    trace = sample(counting(1), torch.zeros(2, 1), 3)
    log_z = LogZ(torch.zeros(2), 0.0)
    for result, name in ((trace, "x"), (log_z, "value")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, name, None)
        assert result == result  # tensors of several entries have no truth value to compare by
        assert result != dataclasses.replace(result)
    assert isinstance(trace, Trace)


def test_arviz_gets_the_statistics_under_its_own_names():
    pytest.importorskip("arviz_base")
    trace = sample(telling((4,)), torch.zeros(4, 2), 5)
    stats = sample(telling((4,)), torch.zeros(4, 2), 5).to_arviz()["sample_stats"]
    assert set(stats.data_vars) == {
        *("lp", "acceptance_rate", "diverging", "energy", "n_steps", "forces")
    }
    assert stats["acceptance_rate"].dims == ("chain",)
    assert stats["acceptance_rate"].values.tolist() == [1.0] * 4
    assert stats["diverging"].dims == ("chain", "draw")
    assert stats["diverging"].values.tolist() == trace.stats["is_divergent"].tolist()
    assert stats["forces"].shape == (4, 5, 2)
