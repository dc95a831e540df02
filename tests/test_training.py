"""`fit`: what a run does, what it records, when it stops, and that a kill changes nothing."""

import functools
import itertools
import math
import multiprocessing
import random
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from companion.models.rbm import RBM
from companion.objectives import PersistentChains, contrastive_divergence
from companion.storage import load_state, save_state
from companion.testing import binary_states
from companion.training import fit

SERVER = multiprocessing.get_context("forkserver")  # forks processes that have imported these:
SERVER.set_forkserver_preload(
    ["pytest", "torch._dynamo", "companion.training", "companion.models.rbm"]
)


class Coins(nn.Module):
    """Independent binary units; the maximum of the likelihood is known: the logits of the means."""

    def __init__(self, num_units, device=None):
        super().__init__()
        zeros = torch.zeros(num_units, dtype=torch.float64, device=device or "cpu")
        self.logits = nn.Parameter(zeros)

    def log_prob(self, v):
        return (v * self.logits - nn.functional.softplus(self.logits)).sum(-1)

    def loss(self, v, *, generator):
        return -self.log_prob(v).mean()


class NoisyChains:
    """A loss with a state of its own: a random walk that pulls the parameters after it."""

    def __init__(self, model, generator):
        self.model = model
        self.x = torch.randn(len(model.logits), generator=generator, dtype=torch.float64)

    def loss(self, v, *, generator):
        step = torch.randn(self.x.shape, generator=generator, dtype=torch.float64)
        self.x = 0.9 * self.x + 0.1 * step
        return self.model.loss(v, generator=generator) + (self.x * self.model.logits).sum()

    def state_dict(self):
        return {"x": self.x}

    def load_state_dict(self, state):
        self.x = state["x"].clone()


def coin_data(num_rows=50, num_units=3, device="cpu"):
    g = torch.Generator().manual_seed(99)
    probs = torch.linspace(0.2, 0.7, num_units, dtype=torch.float64)
    return (
        (torch.rand(num_rows, num_units, generator=g, dtype=torch.float64) < probs)
        .double()
        .to(device)
    )


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def equal(a, b):
    """Equal in every bit, through nested dicts, lists and tuples."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---------------------------------------------------------------- what a run does


def test_every_epoch_uses_every_row_once_in_a_new_order(rng):
    data = torch.arange(110.0, dtype=torch.float64)[:, None]
    model, seen = Coins(1), []

    def loss(v, generator):
        seen.append(v[:, 0].tolist())
        return model.logits.sum()

    fit(model, loss, data, optimizer=sgd(model), num_epochs=3, batch_size=40, generator=rng(0))
    assert [len(batch) for batch in seen] == [40, 40, 30] * 3
    epochs = [seen[i] + seen[i + 1] + seen[i + 2] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(110)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != sorted(epochs[0])


def test_fit_is_the_loop_one_would_write_by_hand(rng, device):
    data = coin_data(device=device)

    def run(by_hand):
        g, model = rng(1, device), Coins(3, device)
        optimizer = sgd(model, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        if not by_hand:
            fit(
                model,
                model.loss,
                data,
                optimizer=optimizer,
                scheduler=scheduler,
                num_epochs=5,
                batch_size=20,
                generator=g,
            )
            return model.logits
        for _ in range(5):
            for rows in torch.randperm(50, generator=g, device=device).split(20):
                loss = model.loss(data[rows], generator=g)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
        return model.logits

    assert torch.equal(run(by_hand=False), run(by_hand=True))


def test_rows_left_over_by_the_batches_bias_nothing(rng, ledger):
    # 110 rows in batches of 100, and 100 chains. At the maximum of the likelihood the model's means
    # are the data's; who divides the sum over the 10 rows left by 100, as if the batch were full,
    # ends far from there.
    def mean_of_the_model(left_over_is_scaled):
        g = rng(0)
        v = torch.zeros(110, 4, dtype=torch.float64)
        for unit in range(4):
            v[torch.randperm(110, generator=g)[:57], unit] = 1
        rbm = RBM(4, 2, generator=g, dtype=torch.float64)
        chains = PersistentChains(rbm, 100, generator=g)

        def unscaled(v, generator):
            return chains.loss(v, generator=generator) + (1 - len(v) / 100) * rbm.log_prob(v).mean()

        optimizer = sgd(rbm)
        fit(
            rbm,
            chains.loss if left_over_is_scaled else unscaled,
            v,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 1 / (1 + 0.05 * e)),
            num_epochs=400,
            batch_size=100,
            generator=g,
        )
        states = binary_states(4, dtype=torch.float64)
        return (rbm.log_prob(states).softmax(0) @ states).mean().item()

    ledger(
        "mean of the visible units of an RBM trained on 110 rows in batches of 100",
        exact=57 / 110,
        estimate=mean_of_the_model(left_over_is_scaled=True),
        std_error=0.002,  # the root mean square error over 20 seeds
    )
    assert abs(mean_of_the_model(left_over_is_scaled=False) - 57 / 110) > 0.1


def test_fit_leaves_the_global_generator_alone(rng):
    before = torch.get_rng_state()
    model = Coins(3)
    fit(
        model,
        NoisyChains(model, rng(1)).loss,
        coin_data(),
        optimizer=sgd(model),
        num_epochs=2,
        batch_size=7,
        generator=rng(0),
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_fit_makes_no_tensor_on_the_default_device(tmp_path, rng):
    model, data, g = Coins(3), coin_data(), rng(0)
    for num_epochs in (1, 2):  # the second resumes
        with torch.device("meta"):
            history = fit(
                model,
                lambda v, generator: model.loss(v, generator=generator),
                data,
                optimizer=sgd(model, momentum=0.5),
                num_epochs=num_epochs,
                batch_size=7,
                generator=g,
                monitor=lambda model: {"sum": model.logits.sum()},
                stop_on="sum",
                checkpoint=tmp_path / "run",
            )
        found = {history.loss.device, history.epochs.device, history.monitored["sum"].device}
        assert {device.type for device in found} == {"cpu"}


def test_data_elsewhere_is_moved_batch_by_batch(rng, device):
    model = Coins(3, device)
    fit(
        model,
        model.loss,
        coin_data(),
        optimizer=sgd(model),
        num_epochs=1,
        batch_size=7,
        generator=rng(0, device),
    )
    assert model.logits.abs().min() > 0


def test_the_progress_bar_goes_to_stderr_and_only_if_asked(rng, capsys):
    for progress in (False, True):
        model = Coins(3)
        fit(
            model,
            model.loss,
            coin_data(),
            optimizer=sgd(model),
            num_epochs=2,
            batch_size=50,
            generator=rng(0),
            progress=progress,
        )
        out, err = capsys.readouterr()
        assert out == ""
        assert ("2/2" in err) == progress


# ---------------------------------------------------------------- what a run records


def test_history_holds_the_mean_loss_over_the_rows(rng):
    model = Coins(1)
    data = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    history = fit(
        model,
        lambda v, generator: v.mean() + 0 * model.logits.sum(),
        data,
        optimizer=sgd(model),
        num_epochs=2,
        batch_size=2,
        generator=rng(0),
    )
    assert history.loss.dtype == torch.float64
    assert history.loss.tolist() == pytest.approx([3.0, 3.0], abs=1e-12)
    assert (history.epochs.numel(), history.monitored, history.best_epoch) == (0, {}, None)
    assert not history.stopped_early


def test_the_monitor_looks_before_the_first_epoch_and_then_every_so_often(rng):
    model, gradients = Coins(3), []

    def monitor(watched):
        assert watched is model
        gradients.append(torch.is_grad_enabled())
        return {"log-likelihood": watched.log_prob(coin_data()).mean(), "one": 1}

    history = fit(
        model,
        model.loss,
        coin_data(),
        optimizer=sgd(model),
        num_epochs=7,
        batch_size=50,
        generator=rng(0),
        monitor=monitor,
        monitor_every=3,
    )
    assert history.epochs.tolist() == [0, 3, 6]
    assert gradients == [False] * 3
    assert history.monitored["one"].tolist() == [1, 1, 1]
    # With one batch an epoch, the loss of epoch k is that of the parameters after k - 1 epochs.
    expected = (-history.loss[[0, 3, 6]]).tolist()
    assert history.monitored["log-likelihood"].tolist() == pytest.approx(expected, abs=1e-12)


def scripted(values, *, num_epochs=10, patience=None, monitor_every=1, checkpoint=None, rng=None):
    """A run whose monitored quantity follows a script; the parameter counts the epochs."""
    model, looks = Coins(1), iter(values)
    history = fit(
        model,
        lambda v, generator: -model.logits.sum(),
        torch.zeros(4, 1, dtype=torch.float64),
        optimizer=sgd(model, lr=1.0),
        num_epochs=num_epochs,
        batch_size=4,
        generator=rng(0),
        monitor=lambda model: {"score": next(looks)},
        monitor_every=monitor_every,
        stop_on="score",
        patience=patience,
        checkpoint=checkpoint,
    )
    return model.logits.item(), history


@pytest.mark.parametrize(
    ("values", "patience", "stops_after", "best"),
    [
        ([0, 1, 2, 1, 1, 9], 2, 4, 2),
        ([5, 1, 1, 9], 2, 2, 0),
        ([0, 1, 0, 2, 1, 3, 2, 2, 2, 9], 3, 8, 5),
        ([0, 1, 1, 1, 9], 2, 3, 1),  # a tie is no new best
        ([-math.inf, -math.inf, 1, 0, 9], 1, 1, 0),
        (list(range(11)), 1, 10, 10),
        ([0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1], None, 10, 1),
    ],
)
def test_training_stops_when_patience_ends_and_the_best_parameters_come_back(
    values, patience, stops_after, best, rng
):
    parameter, history = scripted(values, patience=patience, rng=rng)
    assert len(history.loss) == stops_after
    assert history.stopped_early == (stops_after < 10)
    assert parameter == history.best_epoch == best
    assert history.monitored["score"].tolist() == values[: stops_after + 1]


@pytest.mark.parametrize(("values", "best"), [([0, 5], 9), ([5, 0], 0)])
def test_the_last_epoch_can_be_the_best_though_no_look_was_due(values, best, rng):
    parameter, history = scripted(values, num_epochs=9, monitor_every=10, rng=rng)
    assert history.epochs.tolist() == [0, 9]
    assert parameter == history.best_epoch == best
    assert len(history.loss) == 9 and not history.stopped_early


def test_the_extra_look_at_the_end_leaves_no_trace_in_a_longer_run(tmp_path, rng):
    options = {"monitor_every": 4, "patience": 1, "rng": rng}
    path = tmp_path / "run"
    first = scripted([0, 1, 7], num_epochs=6, checkpoint=path, **options)
    assert (first[0], first[1].epochs.tolist()) == (6, [0, 4, 6])
    again = scripted([7], num_epochs=6, checkpoint=path, **options)
    longer = scripted([2, 3], num_epochs=12, checkpoint=path, **options)
    whole = scripted([0, 1, 2, 3], num_epochs=12, **options)
    for (parameter, history), (expected, other) in ((again, first), (longer, whole)):
        assert parameter == expected
        assert equal(vars(history), vars(other))
    # Patience that runs out in that look neither cuts the run short nor stops a longer one.
    path = tmp_path / "stopped"
    first = scripted([5, 6, 1], num_epochs=6, checkpoint=path, **options)
    longer = scripted([7, 8], num_epochs=12, checkpoint=path, **options)
    assert not first[1].stopped_early
    assert longer[1].epochs.tolist() == [0, 4, 8, 12]


def test_a_nan_in_the_watched_quantity_is_an_error(rng):
    model, scores = Coins(1), iter([0, 1, math.nan])
    with pytest.raises(FloatingPointError, match="score is NaN after 2 epochs, .* as they were"):
        fit(
            model,
            lambda v, generator: -model.logits.sum(),
            torch.zeros(4, 1, dtype=torch.float64),
            optimizer=sgd(model, lr=1.0),
            num_epochs=10,
            batch_size=2,
            generator=rng(0),
            monitor=lambda model: {"score": next(scores)},
            stop_on="score",
        )
    assert model.logits.item() == 4  # two epochs of two steps: none is taken back


def test_histories_are_compared_by_identity(rng):
    one, two = (scripted([0, 1], num_epochs=1, rng=rng)[1] for _ in range(2))
    assert one == one and one != two
    assert len({one, two, one}) == 2


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("bad", ["loss nan", "loss inf", "gradient", "step"])
@pytest.mark.parametrize("batch", [1, 3])
def test_divergence_is_named_and_the_last_good_parameters_come_back(bad, batch, tmp_path, rng):
    model, good, calls = Coins(3), [], []
    optimizer = sgd(model)

    def loss(v, generator):
        calls.append(1)
        value = model.loss(v, generator=generator)
        if len(calls) < 3 + batch:  # three batches an epoch: this one is in epoch 2
            good.append(model.logits.detach().clone())
            return value
        if bad == "gradient":
            return value + (model.logits[0] - model.logits[0].detach()).sqrt()  # 0, slope infinite
        if bad == "step":
            good.append(model.logits.detach().clone())
            optimizer.param_groups[0]["lr"] = 1e308
            return value * 1e10
        return value * float(bad.removeprefix("loss "))

    path = tmp_path / "run"
    run = functools.partial(
        fit,
        model,
        loss,
        coin_data(),
        optimizer=optimizer,
        batch_size=20,
        generator=rng(0),
        checkpoint=path,
    )
    run(num_epochs=1)
    before = path.read_bytes()
    what = {"gradient": "the gradient", "step": "a parameter"}.get(bad, f"the {bad[:4]} is")
    with pytest.raises(FloatingPointError, match=rf"{what}.* in batch {batch} of epoch 2\."):
        run(num_epochs=5)
    # After a resume nothing older than the checkpoint is known.
    expected = load_state(path)["parts"]["model"]["logits"] if batch == 1 else good[-1]
    assert torch.equal(model.logits, expected)
    assert torch.isfinite(model.logits).all()
    assert path.read_bytes() == before


def test_a_finite_gradient_whose_sum_overflows_is_no_divergence(rng):
    model = Coins(3)
    with torch.no_grad():
        model.logits.fill_(1e308)
    fit(
        model,
        lambda v, generator: (0 * model.logits).sum(),
        coin_data(),
        optimizer=sgd(model),
        num_epochs=1,
        batch_size=50,
        generator=rng(0),
    )
    assert model.logits.tolist() == [1e308] * 3


# ---------------------------------------------------------------- resume


def make_run(path, kind="sgd", seed=0):
    """Everything of a run, made anew as a restarted script makes it."""
    g = torch.Generator().manual_seed(seed)
    model = Coins(3)
    chains = NoisyChains(model, g)
    if kind == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    else:
        optimizer = sgd(model, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.9)

    def run(num_epochs, **changes):
        arguments = {
            "loss": chains.loss,
            "data": coin_data(),
            "optimizer": optimizer,
            "scheduler": scheduler,
            "batch_size": 20,
            "generator": g,
            "monitor": lambda model: {"score": model.log_prob(coin_data()).mean()},
            "monitor_every": 2,
            "stop_on": "score",
            "checkpoint": path,
        }
        history = fit(model, num_epochs=num_epochs, **(arguments | changes))
        parts = (model, optimizer, scheduler, chains)
        return [part.state_dict() for part in parts] + [g.get_state(), vars(history)]

    return run


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("first", [0, 1, 4, 9, 10])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(kind, first, tmp_path):
    whole = make_run(tmp_path / "whole", kind)(10)
    make_run(tmp_path / "parts", kind)(first)
    resumed = make_run(tmp_path / "parts", kind)(10)
    assert equal(resumed, whole)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_run_goes_on_with_the_same_objects_too(tmp_path):
    run = make_run(tmp_path / "parts")
    run(3)
    assert equal(run(10), make_run(tmp_path / "whole")(10))


def test_a_checkpoint_does_not_change_the_run(tmp_path):
    assert equal(make_run(None)(5), make_run(tmp_path / "run")(5))


@pytest.mark.parametrize(
    "part", ["model", "optimizer", "scheduler", "loss", "generator", "record", "best"]
)
def test_a_resume_that_forgets_one_part_ends_elsewhere(part, tmp_path):
    # The negative control of the tests above: each part of the checkpoint matters to them.
    whole = make_run(tmp_path / "whole")(10)
    for name, num_epochs in (("early", 2), ("late", 6)):
        make_run(tmp_path / name)(num_epochs)
    early, late = (load_state(tmp_path / name) for name in ("early", "late"))
    if part == "best":
        late["parts"]["record"]["best"] = {"logits": torch.ones(3, dtype=torch.float64)}
        late["parts"]["record"]["monitored"]["score"][0] = 0.0  # so no later look replaces it
    else:
        late["parts"][part] = early["parts"][part]
    save_state(tmp_path / "mixed", late)
    assert not equal(make_run(tmp_path / "mixed")(10), whole)


def test_a_finished_run_returns_at_once(tmp_path):
    whole = make_run(tmp_path / "run")(4)

    def never(*_, **__):
        raise AssertionError("a finished run did some work")

    before = (tmp_path / "run").stat().st_mtime_ns
    run = make_run(tmp_path / "run")
    assert equal(run(4, monitor=never), whole)
    assert (tmp_path / "run").stat().st_mtime_ns == before


def test_a_run_that_stopped_early_stays_stopped(tmp_path, rng):
    first = scripted([0, 1, 0, 0], patience=2, checkpoint=tmp_path / "run", rng=rng)
    again = scripted([], num_epochs=20, patience=2, checkpoint=tmp_path / "run", rng=rng)
    assert first[0] == again[0] == 1
    assert equal(vars(first[1]), vars(again[1]))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("batch", [2, 5])
def test_an_interrupted_run_goes_on_with_the_same_objects(kind, batch, tmp_path, monkeypatch):
    # There are three batches an epoch: before batch 2, no epoch is done yet.
    whole = make_run(tmp_path / "whole", kind)(10)
    run, calls, loss = make_run(tmp_path / "parts", kind), itertools.count(1), Coins.loss

    def interrupted(*args, **options):
        if next(calls) == batch:
            raise KeyboardInterrupt
        return loss(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Coins, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(10)
    assert equal(run(10), whole)


# ---------------------------------------------------------------- what the loss carries


class Holder:
    """Keeps chains as an attribute, which the loss may be a method of or the object itself."""

    def __init__(self, chains):
        self.chains = chains

    def loss(self, v, generator):
        return self.chains.loss(v, 2, generator=generator)

    def __call__(self, v, generator):
        return self.loss(v, generator)


@dataclass(slots=True)
class SlottedHolder:
    chains: PersistentChains

    def __call__(self, v, generator):
        return self.chains.loss(v, 2, generator=generator)


class ModuleHolder(nn.Module):
    """Its own state is a buffer; the chains are no part of it."""

    def __init__(self, chains):
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))
        self.chains = chains

    def forward(self, v, generator):
        self.num_calls += 1
        return self.chains.loss(v, 2, generator=generator)


class GlobalUser:
    def __call__(self, v, generator):
        return use_global(v, generator)


def use_global(v, generator):
    return GLOBAL_CHAINS.loss(v, 2, generator=generator)


def set_global(chains):
    global GLOBAL_CHAINS
    GLOBAL_CHAINS = chains


def call_first(outer, v, generator):
    return (outer[0] if isinstance(outer, nn.Sequential) else outer.chains)(v, generator)


def through_a_helper(chains):
    def helper(v, generator):
        return chains.loss(v, 2, generator=generator)

    return lambda v, generator: helper(v, generator)


def with_a_generator_of_its_own(chains):
    noise = torch.Generator().manual_seed(1)

    def loss(v, generator):
        scale = torch.rand((), generator=noise, dtype=torch.float64)
        return scale * contrastive_divergence(chains.model, v, generator=generator)

    return loss


FORMS = {
    "method": lambda chains: chains.loss,
    "partial": lambda chains: functools.partial(chains.loss, num_steps=2),
    "argument of a partial": lambda chains: functools.partial(
        lambda c, v, generator: c.loss(v, 2, generator=generator), chains
    ),
    "closure": lambda chains: lambda v, generator: chains.loss(v, 2, generator=generator),
    "default": lambda chains: lambda v, generator, c=chains: c.loss(v, 2, generator=generator),
    "keyword default": lambda chains: (
        lambda v, *, generator, c=chains: c.loss(v, 2, generator=generator)
    ),
    "list": lambda chains: (
        lambda v, generator, kept=[chains]: kept[0].loss(v, 2, generator=generator)
    ),
    "dict of tuples": lambda chains: (
        lambda v, generator, kept={"a": (0, chains)}: kept["a"][1].loss(v, 2, generator=generator)
    ),
    "method of an object": lambda chains: Holder(chains).loss,
    "callable object": Holder,
    "object with slots": SlottedHolder,
    "object in an object": lambda chains: functools.partial(call_first, Holder(Holder(chains))),
    "module": ModuleHolder,
    "module in a module": lambda chains: functools.partial(
        call_first, nn.Sequential(ModuleHolder(chains))
    ),
    "helper": through_a_helper,
    "decorated": lambda chains: torch.enable_grad()(through_a_helper(chains)),
    "global": lambda chains: set_global(chains) or use_global,
    "global of a helper": lambda chains: set_global(chains) or GlobalUser(),
    "generator": with_a_generator_of_its_own,
}


def run_with_chains(form, path, num_epochs):
    g = torch.Generator().manual_seed(0)
    rbm = RBM(3, 2, generator=g, dtype=torch.float64)
    rbm.W.data.mul_(150)  # chains of weakly coupled units would forget where they began
    chains = PersistentChains(rbm, 5, generator=g)
    history = fit(
        rbm,
        FORMS[form](chains),
        coin_data(),
        optimizer=torch.optim.Adam(rbm.parameters()),
        num_epochs=num_epochs,
        batch_size=20,
        generator=g,
        checkpoint=path,
    )
    return rbm.state_dict(), chains.state_dict(), g.get_state(), vars(history)


@pytest.mark.parametrize("form", FORMS)
def test_the_chains_are_saved_however_the_loss_reaches_them(form, tmp_path):
    run_with_chains(form, tmp_path / "parts", 2)
    resumed = run_with_chains(form, tmp_path / "parts", 4)
    assert equal(resumed, run_with_chains(form, tmp_path / "whole", 4))


@pytest.mark.parametrize("form", ["closure", "module", "generator"])
def test_a_run_whose_chains_are_forgotten_ends_elsewhere(form, tmp_path, monkeypatch):
    # The negative control of the test above.
    monkeypatch.setattr("companion.training.stateful", lambda *_: {})
    run_with_chains(form, tmp_path / "parts", 2)
    resumed = run_with_chains(form, tmp_path / "parts", 4)
    assert not equal(resumed[0], run_with_chains(form, tmp_path / "whole", 4)[0])


class OwnNormaliser(nn.Module):
    """A loss with a parameter of its own, as noise-contrastive estimation has."""

    def __init__(self, model):
        super().__init__()
        self.log_z = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.reach = [model]  # in a list, so that it is no submodule

    def forward(self, v, *, generator):
        return self.reach[0].loss(v, generator=generator) + (self.log_z - 1).square()


def test_parameters_of_the_loss_are_saved_with_it(tmp_path, rng):
    def run(path, num_epochs):
        model = Coins(3)
        loss = OwnNormaliser(model)
        fit(
            model,
            loss,
            coin_data(),
            optimizer=torch.optim.Adam([*model.parameters(), loss.log_z], lr=0.1),
            num_epochs=num_epochs,
            batch_size=20,
            generator=rng(0),
            checkpoint=path,
        )
        return model.state_dict(), loss.state_dict()

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    assert equal(run(tmp_path / "parts", 6), whole)
    assert whole[1]["log_z"] != 0


@pytest.mark.parametrize("parts", [[6], [2, 6]])
def test_parameters_of_the_loss_come_back_with_the_best_ones_of_the_model(parts, tmp_path, rng):
    seen, best = {}, 1
    for num_epochs in parts:
        model = Coins(3)
        loss = OwnNormaliser(model)

        def monitor(model, loss=loss):
            epoch = len(seen)
            seen[epoch] = [x.detach().clone() for x in (model.logits, loss.log_z)]
            return {"score": -abs(epoch - best)}

        history = fit(
            model,
            loss,
            coin_data(),
            optimizer=torch.optim.Adam([*model.parameters(), loss.log_z], lr=0.1),
            num_epochs=num_epochs,
            batch_size=20,
            generator=rng(0),
            monitor=monitor,
            stop_on="score",
            checkpoint=tmp_path / "run",
        )
    assert history.best_epoch == best
    assert equal([model.logits.detach(), loss.log_z.detach()], seen[best])
    assert not equal(seen[6][1], seen[best][1])


# ---------------------------------------------------------------- checkpoints that do not fit


def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_touched(tmp_path, rng):
    path = tmp_path / "run"
    make_run(path)(3)
    before = path.read_bytes()
    model = Coins(3)
    rescaled = coin_data()
    rescaled[0, 0] = 1 - rescaled[0, 0]

    def attempt(match, seed=0, kind="sgd", **changes):
        run = make_run(path, kind, seed)
        with pytest.raises(ValueError, match=match):
            run(5, **changes)

    attempt("batch_size was 20 and is 10", batch_size=10)
    attempt("monitor_every was 2 and is 3", monitor_every=3)
    attempt("stop_on was 'score' and is None", stop_on=None)
    attempt("patience was None and is 4", patience=4)
    attempt("data was .* and is", data=rescaled)
    attempt("data was .*50, 3.* and is .*49, 3", data=coin_data()[:49])
    attempt("generator was 'cpu, seed 0' and is 'cpu, seed 1'", seed=1)
    attempt("optimizer was 'SGD' and is 'Adam'", kind="adam")
    attempt("scheduler was 'StepLR' and is 'NoneType'", scheduler=None)
    attempt(r"loss\.self\.x was .* and is None", loss=lambda v, generator: model.logits.sum())
    with pytest.raises(ValueError, match="at epoch 3, beyond num_epochs=2"):
        make_run(path)(2)

    other = Coins(4)
    with pytest.raises(ValueError, match=r"model\.logits was 'float64 \(3,\)' and is"):
        fit(
            other,
            other.loss,
            coin_data(),
            optimizer=sgd(other),
            num_epochs=5,
            batch_size=20,
            generator=rng(0),
            checkpoint=path,
        )
    assert other.logits.tolist() == [0] * 4
    assert path.read_bytes() == before


class Counter:
    """A state without tensors, which the layouts in the settings do not show."""

    def __init__(self):
        self.calls = 0

    def state_dict(self):
        return vars(self).copy()

    def load_state_dict(self, state):
        vars(self).update(state)


def test_a_loss_that_carries_other_objects_is_refused_and_nothing_is_touched(tmp_path, rng):
    def run(model, loss):
        optimizer = sgd(model)
        options = {"optimizer": optimizer, "num_epochs": 2, "batch_size": 20, "generator": rng(0)}
        fit(model, loss, coin_data(), checkpoint=tmp_path / "run", **options)

    def loss_of(model, name):
        def loss(v, generator, **counters):
            counters[name].calls += 1
            return model.loss(v, generator=generator)

        return functools.partial(loss, **{name: Counter()})

    model = Coins(3)
    run(model, loss_of(model, "before"))
    assert model.logits.abs().min() > 0
    model = Coins(3)
    with pytest.raises(ValueError, match=r"loss held \['before'\] and holds \['after'\]"):
        run(model, loss_of(model, "after"))
    assert model.logits.tolist() == [0] * 3


@pytest.mark.parametrize("option", [{"lr": 0.2}, {"momentum": 0.5}, {"weight_decay": 0.1}])
def test_another_optimiser_option_is_noticed(option, tmp_path, rng):
    def run(**options):
        model = Coins(3)
        fit(
            model,
            model.loss,
            coin_data(),
            optimizer=sgd(model, **options),
            num_epochs=2,
            batch_size=20,
            generator=rng(0),
            checkpoint=tmp_path / "run",
        )

    run()
    run()
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=rf"optimizer\.{name} was .* and is '{value}'"):
        run(**option)


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "run"
    make_run(path)(2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        make_run(path)(4)
    path.write_text("notes")
    with pytest.raises(ValueError, match="was not written by companion"):
        make_run(path)(4)
    assert path.read_text() == "notes"
    save_state(path, {"x": 1})
    with pytest.raises(ValueError, match="is no checkpoint"):
        make_run(path)(4)


# ---------------------------------------------------------------- killed


def killed_run(path):
    """What the killed process does: an RBM by persistent chains, one short epoch after another."""
    torch.set_num_threads(1)
    finish(path)


def finish(path, num_epochs=150):
    g = torch.Generator().manual_seed(3)
    rbm = RBM(3, 2, generator=g, dtype=torch.float64)
    chains = PersistentChains(rbm, 8, generator=g)
    optimizer = torch.optim.Adam(rbm.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, gamma=0.9)
    history = fit(
        rbm,
        chains.loss,
        coin_data(num_rows=20),
        optimizer=optimizer,
        scheduler=scheduler,
        num_epochs=num_epochs,
        batch_size=15,
        generator=g,
        monitor=lambda rbm: {
            "log-likelihood": rbm.log_prob(coin_data(20)).mean() - rbm.log_z().value
        },
        monitor_every=5,
        stop_on="log-likelihood",
        checkpoint=path,
    )
    parts = (rbm, optimizer, scheduler, chains)
    return [part.state_dict() for part in parts] + [g.get_state(), vars(history)]


def test_killed_again_and_again_a_run_ends_bit_for_bit_where_it_would_have(tmp_path):
    path = tmp_path / "killed"
    moments = random.Random(0)
    epochs = []  # at which the kills found the run

    def last_save():
        return path.stat().st_mtime_ns if path.exists() else None

    while len(epochs) < 3:
        before = last_save()
        process = SERVER.Process(target=killed_run, args=(path,))
        process.start()
        while process.is_alive() and last_save() == before:  # let each get a little further
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.06))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before the kill came
            break
        assert process.exitcode == -signal.SIGKILL
        # Whatever the moment, the file is whole: load_state checks its digest.
        epochs.append(len(load_state(path)["parts"]["record"]["loss"]))
    assert len(epochs) >= 2
    assert all(0 <= a < b for a, b in itertools.pairwise(epochs))
    resumed = finish(path)
    assert equal(resumed, finish(tmp_path / "whole"))
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not equal(resumed, finish(None, num_epochs=149))


# ---------------------------------------------------------------- with a real model


def test_an_rbm_learns_by_contrastive_divergence(rng):
    g = rng(0)
    v = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64).repeat(20, 1)
    rbm = RBM(4, 3, generator=g, dtype=torch.float64)

    def log_likelihood(rbm):
        return {"train": (rbm.log_prob(v) - rbm.log_z().value).mean()}

    history = fit(
        rbm,
        functools.partial(contrastive_divergence, rbm),
        v,
        optimizer=sgd(rbm, lr=0.2),
        num_epochs=300,
        batch_size=10,
        generator=g,
        monitor=log_likelihood,
        monitor_every=50,
    )
    train = history.monitored["train"]
    assert train[0] == pytest.approx(-4 * math.log(2), abs=0.01)  # nothing learnt yet: four coins
    assert train[-1] > -math.log(2) - 0.5  # nearly all mass on the two patterns
    assert (train <= -math.log(2)).all()  # the entropy of the data bounds every model


# ---------------------------------------------------------------- bad input


def bad_call(rng, **changes):
    model = changes.pop("model", None) or Coins(3)
    arguments = {
        "loss": lambda v, generator: model.logits.sum(),
        "data": coin_data(),
        "num_epochs": 2,
        "batch_size": 10,
        "generator": rng(0),
    } | changes
    if "optimizer" not in arguments:
        arguments["optimizer"] = sgd(model)
    return fit(model, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"num_epochs": -1}, ValueError, "num_epochs must be at least 0"),
        ({"num_epochs": 2.0}, TypeError, "num_epochs must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"monitor_every": 0}, ValueError, "monitor_every must be at least 1"),
        ({"patience": 0, "stop_on": "x", "monitor": dict}, ValueError, "patience must be at"),
        ({"patience": 3}, ValueError, "patience needs stop_on"),
        ({"stop_on": "x"}, ValueError, "needs a monitor"),
        ({"data": torch.zeros(0, 3)}, ValueError, "data is empty"),
        ({"data": torch.tensor([[math.nan]])}, ValueError, "data has 1 NaN"),
        ({"data": torch.tensor(1.0)}, ValueError, "it is a scalar"),
        ({"data": [[1.0]]}, TypeError, r"data must be a torch\.Tensor"),
        ({"generator": None}, TypeError, "fit needs a generator"),
        ({"generator": 0}, TypeError, r"generator must be a torch\.Generator"),
        ({"model": nn.Identity(), "optimizer": sgd(Coins(2))}, ValueError, "one device, got none"),
        ({"optimizer": sgd(Coins(2))}, ValueError, "trains none of the model's parameters"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be"),
        ({"loss": lambda v, generator: 1.0}, ValueError, "scalar tensor .* got 1.0"),
        ({"loss": lambda v, generator: v.mean()}, ValueError, "depends on the parameters"),
        ({"checkpoint": "/nowhere/at/all"}, ValueError, "there is no folder /nowhere/at"),
    ],
)
def test_bad_input_gets_a_sentence(changes, error, match, rng):
    with pytest.raises(error, match=match):
        bad_call(rng, **changes)


def test_bad_models_monitors_and_schedulers_get_a_sentence(rng, tmp_path):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        fit(
            len,
            len,
            coin_data(),
            optimizer=sgd(Coins(1)),
            num_epochs=1,
            batch_size=1,
            generator=rng(0),
        )
    model = Coins(3)
    with pytest.raises(ValueError, match="loss must return a scalar"):
        bad_call(rng, model=model, loss=lambda v, generator: model.logits)
    optimizer = sgd(model)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(TypeError, match="ReduceLROnPlateau"):
        bad_call(rng, model=model, optimizer=optimizer, scheduler=plateau)
    with pytest.raises(ValueError, match=r"stop_on='y' is none of the monitored \['x'\]"):
        bad_call(rng, monitor=lambda model: {"x": 1}, stop_on="y")
    names = iter("xy")
    with pytest.raises(ValueError, match=r"returned \['y'\] and before that \['x'\]"):
        bad_call(rng, monitor=lambda model: {next(names): 1})
    stray = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="no checkpoint would hold them"):
        bad_call(
            rng,
            model=model,
            optimizer=torch.optim.SGD([*model.parameters(), stray], lr=0.1),
            checkpoint=tmp_path / "run",
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_a_generator_on_another_device_is_refused(rng):
    with pytest.raises(ValueError, match="the generator is on cuda"):
        bad_call(rng, generator=rng(0, "cuda"))
