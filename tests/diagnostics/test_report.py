"""Energies, divergences and the table that tells of all that looks wrong."""

import dataclasses
import math

import pytest
import torch

from companion.core import Trace, sample
from companion.diagnostics import (
    divergences,
    e_bfmi,
    ess_bulk,
    ess_tail,
    mcse_mean,
    mcse_quantile,
    mcse_sd,
    rhat,
    summary,
)
from companion.mcmc import random_walk


def trace_of(x, **changes):
    """A trace of draws `(chains, draws, *event)` whose sampler was content, but for the changes."""
    chains = x.new_zeros(x.shape[0])
    trace = Trace(x, x.new_zeros(x.shape[:2]), chains + 0.8, chains.long(), chains.long(), {})
    return dataclasses.replace(trace, **changes)


def normal(rng, *shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=rng(seed))


# ---------------------------------------------------------------- energies


def energies(rho, rng, num_chains=50, num_draws=10_000):
    """Autoregressive energies: E-BFMI is `2 (1 - rho)`, up to a bias of order 1 / draws."""
    e = normal(rng, num_chains, num_draws)
    for t in range(1, num_draws):
        e[:, t] = rho * e[:, t - 1] + math.sqrt(1.0 - rho**2) * e[:, t]
    return e


def test_e_bfmi_of_autoregressive_energies_agrees_with_theory(rng, ledger):
    energy = energies(0.7, rng)
    each = e_bfmi(energy)
    std_error = each.std() / math.sqrt(50)
    assert each.shape == (50,)
    ledger(
        "E-BFMI of autoregressive energies, rho = 0.7",
        exact=0.6,
        estimate=each.mean(),
        std_error=std_error,
    )
    thinned = e_bfmi(energy[:, ::2]).mean()  # as if every other step had been thrown away
    assert abs(thinned - 0.6) > 4.5 * std_error


def test_e_bfmi_is_that_of_arviz(rng):
    from arviz_stats.base.array import array_stats

    energy = normal(rng, 3, 100).cumsum(1)
    theirs = torch.from_numpy(array_stats.bfmi(energy.numpy()))
    torch.testing.assert_close(e_bfmi(energy), theirs)
    assert torch.equal(e_bfmi(energy.float()), e_bfmi(energy.float().double()))


def test_e_bfmi_takes_the_energies_of_a_trace_and_flattens_its_chains(rng):
    x, energy = normal(rng, 2, 3, 50, 4), normal(rng, 2, 3, 50, seed=1)
    zeros = torch.zeros(2, 3)
    trace = Trace(x, None, zeros, zeros.long(), zeros.long(), {"energy": energy})
    assert torch.equal(e_bfmi(trace), e_bfmi(energy.flatten(0, 1)))


def test_what_has_no_energies_is_refused(rng):
    energy = normal(rng, 2, 50)
    with pytest.raises(ValueError, match="this trace has no energy: .*it tells nothing"):
        e_bfmi(trace_of(energy))
    with pytest.raises(ValueError, match=r"expected energies \(chains, draws\), got shape \(50,\)"):
        e_bfmi(energy[0])
    energy[1, 3] = math.nan
    with pytest.raises(ValueError, match="the first in chain 1, draw 3"):
        e_bfmi(energy)


def test_a_constant_energy_has_no_e_bfmi(rng):
    energy = normal(rng, 3, 50)
    energy[1] = 0.1
    with pytest.warns(
        UserWarning, match="of 1 of 3 chains is constant, first of chain 1"
    ) as caught:
        result = e_bfmi(energy)
    assert caught[0].filename == __file__
    assert result.isnan().tolist() == [False, True, False]


# ---------------------------------------------------------------- divergences


def test_divergences_are_counted_and_placed(rng):
    x = normal(rng, 3, 50, 2)
    is_divergent = torch.zeros(3, 50, dtype=torch.bool)
    is_divergent[0, 4] = is_divergent[2, 9] = True
    num = torch.tensor([1, 0, 4])  # thinning kept half of those of the last chain
    found = divergences(trace_of(x, num_divergent=num, stats={"is_divergent": is_divergent}))
    assert torch.equal(found.num, num)
    assert torch.equal(found.x, torch.stack([x[0, 4], x[2, 9]]))
    assert str(found).startswith("5 divergent steps in 2 of 3 chains, at most 4 in one")


def test_a_kernel_that_knows_of_no_divergences_is_told_from_one_that_had_none(rng):
    x = normal(rng, 3, 50, 2)
    never = torch.zeros(3, 50, dtype=torch.bool)
    assert str(divergences(trace_of(x, stats={"is_divergent": never}))) == "no divergent step"
    with pytest.raises(ValueError, match="cannot tell of divergences: its kernel has no is_diverg"):
        divergences(trace_of(x))
    with pytest.raises(TypeError, match="expected a Trace, got Tensor"):
        divergences(x)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("event", [(), (3,), (2, 2)])
def test_the_summary_holds_the_estimates_and_their_errors(rng, device, event):
    x = torch.exp(normal(rng, 4, 500, *event)).to(device)
    result = summary(x)
    flat = x.flatten(0, 1)
    torch.testing.assert_close(result.mean, flat.mean(0))
    torch.testing.assert_close(result.sd, flat.std(0))
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device=device)
    torch.testing.assert_close(result.quantiles, flat.quantile(levels, 0))
    assert torch.equal(result.mcse_mean, mcse_mean(x))
    assert torch.equal(result.mcse_sd, mcse_sd(x))
    assert torch.equal(result.mcse_quantiles[2], mcse_quantile(x, 0.95))
    assert torch.equal(result.ess_bulk, ess_bulk(x))
    assert torch.equal(result.ess_tail, ess_tail(x))
    assert torch.equal(result.rhat, rhat(x))
    assert result.notes == ()
    assert result.mean.shape == event


def test_numbers_are_shown_as_far_as_their_errors_allow(rng):
    x = normal(rng, 4, 1000, 2) * torch.tensor([1.0, 1e-3]) + torch.tensor([100.0, 0.0])
    lines = str(summary(x)).splitlines()
    assert " ".join(lines[0].split()) == "mean sd 5 % 50 % 95 % ESS bulk ESS tail R-hat"
    assert lines[1].split()[:5] == ["x[0]", "100.012", "±", "0.016", "1.001"]
    assert lines[2].split()[:5] == ["x[1]", "(-5.0", "±", "1.6)e-05", "0.001000"]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 3


def test_coordinates_are_named_by_their_index(rng):
    assert str(summary(normal(rng, 4, 100))).splitlines()[1].split()[0] == "x"
    text = str(summary(normal(rng, 4, 100, 2, 2)))
    assert all(f"x[{i}, {j}]" in text for i in range(2) for j in range(2))


def test_long_tables_are_cut_but_their_worst_coordinate_is_named(rng):
    x = normal(rng, 4, 600, 30)
    x[0, :, 25] += 2.0
    result = summary(x)
    text = str(result)
    assert "... and 10 more coordinates" in text
    assert "x[19]" in text
    assert any("R-hat is above 1.01" in n and "at x[25]" in n for n in result.notes)
    assert any("effective sample size is below 400 in 1 of 30" in n for n in result.notes)
    assert repr(result) == text


@pytest.mark.filterwarnings("error")
def test_a_stuck_chain_shows_in_the_table_instead_of_a_warning(rng):
    x = normal(rng, 4, 500, 2)
    x[1, :, 0] = 7.0
    result = summary(x)
    row = str(result).splitlines()[1]
    assert row.count("nan") == 3  # error of the mean, both effective sizes
    constant, r_hat = result.notes  # said once
    assert "a chain is constant (the first is chain 1 at coordinate (0,))" in constant
    assert "R-hat is above 1.01 in 1 of 2 coordinates" in r_hat


@pytest.mark.filterwarnings("error")
def test_one_chain_is_noted(rng):
    assert any(n.startswith("one chain: R-hat") for n in summary(normal(rng, 1, 1000)).notes)


def slow(rng, x):
    return normal(rng, *x.shape[:2], seed=1).cumsum(1)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"num_nan": torch.tensor([0, 2, 0, 1])}, "3 proposals had a NaN log-density"),
        ({"num_divergent": torch.tensor([0, 7, 0, 0])}, "7 divergent steps in 1 of 4 chains"),
        ({"stats": {"energy": "slow"}}, "E-BFMI is below 0.3 in 4 of 4 chains"),
        (
            {"stats": {"tree_depth": torch.tensor([[9, 10, 3, 4]] * 4).repeat(1, 250)}},
            "25.0% of the trees reached max_depth=10",
        ),
        (
            {"accept_prob": torch.tensor([0.8, 0.05, 0.9, 0.02])},
            "2 of 4 chains accept fewer than 10 % of their proposals, the lowest 2.0%",
        ),
    ],
)
def test_the_summary_of_a_trace_tells_of_the_samplers_trouble(rng, change, note):
    x = normal(rng, 4, 1000)
    if change.get("stats", {}).get("energy") == "slow":
        change = {"stats": {"energy": slow(rng, x)}}
    (found,) = summary(trace_of(x, **change)).notes
    assert found.startswith(note)
    assert f"- {note}" in str(summary(trace_of(x, **change)))


def test_a_content_sampler_has_no_notes(rng):
    x = normal(rng, 4, 1000)
    stats = {
        "energy": normal(rng, 4, 1000, seed=1),
        "tree_depth": torch.full((4, 1000), 9),
        "is_divergent": torch.zeros(4, 1000, dtype=torch.bool),
    }
    assert summary(trace_of(x, stats=stats)).notes == ()
    assert summary(trace_of(x, stats=stats), max_depth=9).notes != ()


def test_a_constant_energy_is_noted_and_not_warned_of(rng):
    trace = trace_of(normal(rng, 4, 1000), stats={"energy": torch.zeros(4, 1000)})
    (note,) = summary(trace).notes
    assert note.startswith("the energy of 4 of 4 chains is constant")


def test_a_real_run_has_the_right_moments_by_its_own_errors(rng, ledger):
    """A random walk on `N((1, -2), diag(1, 4))`; its starts are exact."""
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    sd = torch.tensor([1.0, 2.0], dtype=torch.float64)
    target = torch.distributions.Independent(torch.distributions.Normal(mean, sd), 1)
    x0 = mean + sd * normal(rng, 20, 2)
    kernel = random_walk(target.log_prob, 2.0)
    result = summary(sample(kernel, x0, 2000, generator=rng(1)))
    for i in range(2):
        ledger(
            f"mean of coordinate {i} by a random walk, with its MCSE",
            exact=mean[i],
            estimate=result.mean[i],
            std_error=result.mcse_mean[i],
        )
        ledger(
            f"standard deviation of coordinate {i} by a random walk, with its MCSE",
            exact=sd[i],
            estimate=result.sd[i],
            std_error=result.mcse_sd[i],
        )
