"""Who descends from whom, against compositions by hand and the exact law of neutral families."""

import pytest
import torch

from companion.annealing import lineage, num_ancestors
from companion.importance import resample
from companion.monte_carlo import estimate

F64 = torch.float64


def distinct(n: int) -> torch.Tensor:
    """`[k, j]`: the probability that k independent choices among n hit j different ones."""
    law = torch.zeros(n + 1, n + 1, dtype=F64)
    law[0, 0] = 1.0
    j = torch.arange(n + 1, dtype=F64)
    for k in range(1, n + 1):
        law[k] = law[k - 1] * j / n
        law[k, 1:] += (law[k - 1] * (1 - j / n))[:-1]
    return law


def neutral(n: int, stages: int, repetitions: int, scheme, generator) -> torch.Tensor:
    """Ancestors, `(stages, n, repetitions)`, chosen by equal weights."""
    equal = torch.zeros(n, repetitions, dtype=F64)
    return torch.stack([resample(equal, scheme, generator=generator) for _ in range(stages)])


def test_a_lineage_is_the_composition_of_the_ancestors(rng, device):
    ancestors = torch.randint(7, (4, 7, 3), generator=rng(0, device), device=device)
    lines = lineage(ancestors)
    assert lines.shape == (5, 7, 3) and lines.device.type == device.type
    for r in range(3):
        for i in range(7):
            at = i
            for t in (3, 2, 1, 0):
                assert lines[t + 1, i, r] == at
                at = int(ancestors[t, at, r])
            assert lines[0, i, r] == at
    assert torch.equal(lineage(ancestors[..., 0].int()), lines[..., 0])
    # Composed in the other order, they are another family tree.
    right, wrong = (a[i].gather(0, a[1 - i]) for i, a in ((0, ancestors), (1, ancestors)))
    assert torch.equal(lineage(ancestors[:2])[0], right) and not torch.equal(right, wrong)


def test_the_number_of_ancestors_counts_different_ones(rng):
    lines = lineage(torch.randint(9, (6, 9, 5), generator=rng(1)))
    found = num_ancestors(lines)
    for t in range(7):
        for r in range(5):
            assert found[t, r] == len(set(lines[t, :, r].tolist()))
    assert (found[-1] == 9).all() and (found.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("n", [5, 20])
def test_equal_weights_leave_the_exact_number_of_ancestors_in_every_generation(rng, n, ledger):
    counts = num_ancestors(lineage(neutral(n, 8, 5000, "multinomial", rng(n))))
    law = torch.zeros(n + 1, dtype=F64)
    law[n] = 1.0
    for back in range(1, 9):
        law = law @ distinct(n)
        exact = (law * torch.arange(n + 1, dtype=F64)).sum()
        got = estimate(counts[-1 - back])
        if back == 1:
            assert exact == pytest.approx(n * (1 - (1 - 1 / n) ** n), abs=1e-12)
            what = f"ancestors of {n} particles of equal weight, one generation back"
            ledger(what, exact=exact, estimate=got.value, std_error=got.std_error)
        assert abs(got.value - exact) < 4.9 * got.std_error  # 1e-5 over the eight generations
        # As if nobody in an earlier generation had died out.
        independent = n * (1 - (1 - 1 / n) ** n)
        assert back == 1 or abs(got.value - independent) > 4.9 * got.std_error
    # Systematic resampling of equal weights loses nobody.
    assert (num_ancestors(lineage(neutral(n, 3, 100, "systematic", rng(n)))) == n).all()


@pytest.mark.parametrize("n", [10, 50])
def test_equal_weights_make_families_of_the_stated_size(rng, n):
    """The sum of the squared shares of the families is `1 - (1 - 1/n)^(R + 1)` on average."""
    founders = lineage(neutral(n, 6, 5000, "multinomial", rng(n)))[0]
    squares = estimate((founders[:, None] == founders).double().mean((0, 1)))
    exact = 1 - (1 - 1 / n) ** 7
    assert abs(squares.value - exact) < 4.5 * squares.std_error
    # Pairs of different particles only, as if none were of its own family.
    assert abs(squares.value - (1 - (1 - 1 / n) ** 6)) > 4.5 * squares.std_error


@pytest.mark.parametrize("n", [10, 50])
def test_all_descend_from_one_about_two_n_generations_back(n):
    law = distinct(n)[2:, 2:]
    generations = torch.linalg.solve(
        torch.eye(n - 1, dtype=F64) - law, torch.ones(n - 1, dtype=F64)
    )
    assert float(generations[-1]) == pytest.approx(2 * n * (1 - 1 / n), rel=0.04)


def test_ancestors_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"must be integers \(stages, n, \*batch\).*float32"):
        lineage(torch.zeros(2, 3))
    for empty in torch.zeros(3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long):
        with pytest.raises(ValueError, match="must be integers"):
            lineage(empty)
    with pytest.raises(ValueError, match="from 0 to n - 1 = 2, got 0 to 3"):
        lineage(torch.tensor([[0, 1, 3]]))
    with pytest.raises(ValueError, match="got -1 to 1"):
        lineage(torch.tensor([[0, 1, -1]]))
    with pytest.raises(ValueError, match="lines must be integers"):
        num_ancestors(torch.zeros(3, dtype=torch.long))


def test_a_genealogy_stays_on_the_device_of_its_input():
    ancestors = torch.tensor([[0, 0, 1], [1, 2, 2]], device="cpu")
    with torch.device("meta"):
        assert num_ancestors(lineage(ancestors)).device.type == "cpu"
