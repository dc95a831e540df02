"""Tuned ladders: all swaps are rejected alike, as on ladders known in closed form."""

import math

import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from companion.tempering import ladder as ladder_module
from companion.tempering import linear_schedule
from companion.tempering.ladder import tune_ladder
from companion.tempering.parallel import parallel_tempering
from tests.mcmc.exact_targets import plant
from tests.tempering.exact_paths import F64, ExactGaussians

Z = 4.5  # two-sided false-alarm rate 7e-6 a comparison
RUN = {"num_chains": 100, "num_steps": 20, "num_rounds": 6}
LAST = 100 * 20 * 2**5  # swaps of a pair in the last round; half as many before the last cut


def narrowing(device="cpu", dim=3, sd=5.0, dtype=F64) -> ExactGaussians:
    """From N(0, sd^2) to N(0, 1), exact draws: equal rejections have precisions in geometric
    progression, as a swap depends on the ratio of two."""
    one = torch.ones(dim, dtype=F64)
    return ExactGaussians(0.0 * one, sd * one, 0.0 * one, one, dtype=dtype, device=device)


def shifting(device="cpu") -> ExactGaussians:
    """From N(0, 1) to N(6, 1): the mean is linear in beta, and so are the rungs."""
    return ExactGaussians([0.0], [1.0], [6.0], [1.0], device=device)


def best(name: str, num: int) -> tuple[torch.Tensor, float]:
    """The ladder of `num` rungs, and the rejection of each of its swaps."""
    share = linear_schedule(num)
    if name == "shifting":
        step = 6.0 / (num - 1)
        return share, 1.0 - 2.0 * float(stats.norm.sf(step / math.sqrt(2.0)))
    precision = 25.0 ** (share - 1.0)
    ratio = float(precision[1] / precision[0])
    return (precision - 0.04) / 0.96, 1.0 - 2.0 * float(stats.f.sf(ratio, 3, 3))


PATHS = {"narrowing": narrowing, "shifting": shifting}


def is_equal(ladder, rejection: float) -> bool:
    """All rejections are the same, up to the noise of the last measurement and of the cut before
    it, which is measured by half as many swaps."""
    variance = rejection * (1.0 - rejection)  # of a probability with this mean, at most
    error = math.sqrt(variance * (1.0 / LAST + 2.0 / LAST))
    return bool(((ladder.rejection - rejection).abs() < Z * error).all())


@pytest.mark.parametrize("name", PATHS)
def test_the_ladder_is_that_of_theory(rng, device, ledger, name):
    path, start = PATHS[name](device), linear_schedule(6) ** (1.0 if name == "narrowing" else 2.0)
    ladder = tune_ladder(path, start, **RUN, generator=rng(0, device))
    betas, rejection = best(name, 6)
    assert is_equal(ladder, rejection)
    # A rung is off by what the cumulated rejections are, divided by their slope.
    cumulated = math.sqrt(5 * rejection * (1.0 - rejection) * 2.0 / LAST)
    slope = rejection / betas.diff().max()
    assert ((ladder.betas.cpu() - betas).abs() < Z * cumulated / slope).all()
    variance = rejection * (1.0 - rejection)
    ledger(
        f"communication barrier of a ladder of 6 rungs, {name}",
        exact=5 * rejection,
        estimate=ladder.barrier,
        std_error=5 * math.sqrt(variance / (5 * LAST)),
    )
    # The control: one round measures where it began.
    untuned = tune_ladder(
        path, start, num_chains=100, num_steps=640, num_rounds=1, generator=rng(0, device)
    )
    assert untuned.betas.tolist() == pytest.approx(start.tolist())
    assert not is_equal(untuned, rejection)


def test_cutting_by_acceptance_instead_of_rejection_is_found(rng, device, monkeypatch):
    plant(monkeypatch, tune_ladder, "1.0 - run.swap_prob", "run.swap_prob")
    ladder = ladder_module.tune_ladder(
        narrowing(device), linear_schedule(6), **RUN, generator=rng(0, device)
    )
    ladder = ladder_module.Ladder(ladder.betas, 1.0 - ladder.rejection, ladder.barrier)
    assert not is_equal(ladder, best("narrowing", 6)[1])


def test_the_barrier_of_a_fine_ladder_is_that_of_the_path(rng, device, ledger):
    # Lambda = integral of E|V - V'| / 2, where V is the log-density ratio at two draws at beta.
    # V has the standard deviation 6 at every beta of `shifting`: E|V - V'| = 2 * 6 / sqrt(pi).
    exact, _ = quad(lambda beta: 6.0 / math.sqrt(math.pi), 0.0, 1.0)
    n, num_chains, num_steps = 160, 100, 200
    ladder = tune_ladder(
        shifting(device),
        linear_schedule(n + 1),
        num_chains=num_chains,
        num_steps=num_steps,
        num_rounds=1,
        generator=rng(0, device),
    )
    assert abs(best("shifting", n + 1)[1] * n - exact) < 1e-3  # what is left of coarseness
    # Efron and Stein: another draw at a rung changes the sum by at most |V - V'| / n, since what it
    # adds to one rejection it takes from the other. So the variance is at most (n + 1) (6 / n)^2.
    std_error = 6.0 / n * math.sqrt((n + 1) / (num_chains * num_steps))
    ledger(
        "communication barrier of a shifted normal law",
        exact=exact,
        estimate=ladder.barrier,
        std_error=std_error,
    )


@pytest.mark.parametrize("acceptance", [0.4, 0.7, 0.9])
def test_the_number_of_rungs_follows_the_acceptance_asked_for(rng, device, acceptance):
    ladder = tune_ladder(
        narrowing(device),
        linear_schedule(4),
        acceptance=acceptance,
        **RUN,
        generator=rng(0, device),
    )
    num = len(ladder.betas) - 1
    # One step more or fewer would be no nearer.
    miss = [
        abs(1.0 - best("narrowing", k + 1)[1] - acceptance)
        for k in (num - 1, num, num + 1)
        if k > 0
    ]
    found = abs(float(1.0 - ladder.rejection.mean()) - acceptance)
    assert found < min(miss) + 0.02
    assert ladder.rejection.std() < 0.02


def test_ends_stay_and_rungs_ascend(rng, device):
    start = torch.tensor([0.05, 0.5, 0.8, 0.9, 1.0], dtype=F64)
    for acceptance in (None, 0.6):
        ladder = tune_ladder(
            narrowing(device),
            start,
            acceptance=acceptance,
            num_chains=10,
            num_steps=10,
            num_rounds=4,
            generator=rng(0, device),
        )
        assert ladder.betas[0] == 0.05 and ladder.betas[-1] == 1.0
        assert (ladder.betas.diff() > 0.0).all()
        assert ladder.betas.device.type == ladder.rejection.device.type == device.type
        assert ladder.betas.dtype == ladder.rejection.dtype == ladder.barrier.dtype == F64
        assert ladder.rejection.shape == (len(ladder.betas) - 1,)
        assert ladder.barrier == ladder.rejection.sum()


def test_where_nothing_is_rejected_the_rungs_stay_and_two_are_enough(rng, device):
    still = narrowing(device, sd=1.0)
    run = {"num_chains": 2, "num_steps": 5, "num_rounds": 3}
    ladder = tune_ladder(still, linear_schedule(4), **run, generator=rng(0, device))
    torch.testing.assert_close(ladder.betas.cpu(), linear_schedule(4))
    assert ladder.barrier < 1e-12
    ladder = tune_ladder(still, linear_schedule(4), acceptance=0.5, **run, generator=rng(0, device))
    assert ladder.betas.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_one_seed_gives_one_ladder_and_tensors_follow_the_input(rng, dtype):
    run = {"num_chains": 4, "num_steps": 5, "num_rounds": 3, "acceptance": 0.5}
    path = narrowing(dtype=dtype)
    first = tune_ladder(path, linear_schedule(4), **run, generator=rng(0))
    before = torch.get_rng_state()
    with torch.device("meta"):
        second = tune_ladder(path, [0.0, 1 / 3, 2 / 3, 1.0], **run, generator=rng(0))
    assert (torch.get_rng_state() == before).all()
    assert second.betas.device.type == "cpu"
    torch.testing.assert_close(first.betas, second.betas)
    other = tune_ladder(path, linear_schedule(4), **run, generator=rng(1))
    assert first.betas.tolist() != other.betas.tolist()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"num_rounds": 0}, ValueError, "num_rounds must be at least 1"),
        ({"num_chains": 0}, ValueError, "num_chains must be at least 1"),
        (
            {"acceptance": 1.0},
            ValueError,
            "acceptance must be a finite number above 0.0 and below 1.0",
        ),
        ({"acceptance": "high"}, TypeError, "acceptance must be a number"),
        ({"betas": [0.0, 0.5]}, ValueError, "ascend from 0 or above to 1"),
        ({"betas": [1.0]}, ValueError, "at least two rungs"),
    ],
)
def test_bad_input_is_explained(rng, change, error, match):
    with pytest.raises(error, match=match):
        tune_ladder(**{"path": narrowing(), "betas": [0.0, 1.0], "generator": rng(0), **change})


def test_a_round_goes_on_from_where_the_last_one_ended(rng, monkeypatch):
    starts, ends = [], []

    def watched(*args, x0, **kwargs):
        run = parallel_tempering(*args, x0=x0, **kwargs)
        starts.append(x0)
        ends.append(run.x)
        return run

    monkeypatch.setattr(ladder_module, "parallel_tempering", watched)
    run = {"num_chains": 3, "num_steps": 4, "generator": rng(0)}
    tune_ladder(narrowing(), linear_schedule(5), num_rounds=3, **run)
    assert starts[0] is None
    assert torch.equal(starts[1], ends[0]) and torch.equal(starts[2], ends[1])
    starts.clear(), ends.clear()
    # Another number of rungs: each takes the points of the old rung as far up.
    tune_ladder(narrowing(), linear_schedule(9), num_rounds=2, acceptance=0.3, **run)
    num = len(starts[1])
    assert num < 9 and torch.equal(starts[1][0], ends[0][0])
    assert torch.equal(starts[1][-1], ends[0][-1])
