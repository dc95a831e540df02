"""The pages that are made from records: the same rows on every machine, and never stale."""

import json
import math
import re

import nbformat
import pytest
from nbformat import v4

from tools.pages import (
    HEADER,
    PAGES,
    ROOT,
    RecordsError,
    Row,
    ledger_page,
    ledger_row,
    ledger_tests,
    main,
    pitfalls_page,
    run_times_page,
)

pytest_plugins = "pytester"

TESTS = """
def test_it_agrees(ledger):
    pass


def test_they_agree(ledger, rng):
    pass


def test_nothing_random():
    pass


def helper(ledger):
    pass
"""
IT, THEY = "tests/test_it.py::test_it_agrees", "tests/test_it.py::test_they_agree"


def row(what="a thing", exact=1.0, estimate=1.0, std_error=0.0, tolerance=1e-10):
    """A comparison as the fixture records it."""
    return Row(what, exact, estimate, std_error, tolerance)._asdict()


def record(root, *records):
    """Write the records, each a test and its rows, in this order."""
    path = root / "_build" / "ledger-records.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"test": test, "rows": rows}) for test, *rows in records]
    path.write_text("".join(line + "\n" for line in lines))


def chapter(root, name, title, seconds, *boxes):
    """Write a notebook with these pitfall boxes."""
    cells = [v4.new_markdown_cell(f"# {title}"), *map(v4.new_markdown_cell, boxes)]
    metadata = {"companion": {"seconds": seconds}}
    path = root / "book" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata=metadata), path)


def pitfall(title, label):
    """A pitfall box."""
    return f":::{{admonition}} Pitfall: {title}\n:class: pitfall\n:name: {label}\nNo.\n:::"


@pytest.fixture
def root(tmp_path):
    """A small repository with two chapters and two tests."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(TESTS)
    (tmp_path / "book/appendix").mkdir(parents=True)
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: book/intro\nparts:\n  - caption: One\n    chapters:\n"
        "      - file: book/zoo/first\n      - file: book/art/second\n"
    )
    chapter(tmp_path, "art/second.ipynb", "The second", 3.25)
    chapter(
        tmp_path,
        "zoo/first.ipynb",
        "The $n$ th",
        12.0,
        pitfall("the size `f(x)`", "pitfall-size"),
        pitfall("the name", "pitfall-name"),
    )
    record(tmp_path, (IT, row()), (THEY, row()))
    return tmp_path


# ---------------------------------------------------------------- the rows of the ledger


@pytest.mark.parametrize(
    ("comparison", "cells"),
    [
        (
            row(exact=math.pi, estimate=3.14987, std_error=0.0164),
            ("3.142", "3.150", "0.016", "0.5"),
        ),
        (row(exact=-2.0, estimate=-2.1, std_error=0.1), ("-2.00", "-2.10", "0.10", "-1.0")),
        (row(exact=0.0, estimate=-1e-4, std_error=0.1), ("0.00", "0.00", "0.10", "0.0")),
        (
            row(exact=1.5e7, estimate=1.6e7, std_error=1e6),
            ("1.50e+07", "1.60e+07", "1.0e+06", "1.0"),
        ),
        # A deterministic method: no digit of its round-off.
        (row(exact=0.0, estimate=-3e-17), ("0", "0", "none", "within 1e-10")),
        (row(exact=1 / 3, estimate=1 / 3 + 1e-12), ("0.33333333",) * 2 + ("none", "within 1e-10")),
        (row(exact=2.0, estimate=2.0004, tolerance=2e-3), ("2", "2", "none", "within 0.002")),
        (row(exact=0.5, estimate=0.5, tolerance=0.0), ("0.5", "0.5", "none", "within 0")),
    ],
)
def test_a_row_has_the_digits_that_mean_something(comparison, cells):
    assert ledger_row(Row(**comparison)) == cells


def test_round_off_changes_no_row():
    for k in range(200):
        exact, noise = math.sin(k) * 10.0 ** (k % 7), 1 + 3e-15 * math.cos(k)
        std_error = 0.01 * abs(exact) * (k % 2)
        one, other = exact * (1 + 1e-3 * (k % 2)), exact * (1 + 1e-3 * (k % 2)) * noise
        rows = (Row("x", exact, estimate, std_error, 1e-8) for estimate in (one, other))
        assert ledger_row(next(rows)) == ledger_row(next(rows))


# ---------------------------------------------------------------- the ledger


def test_rows_stand_in_the_same_order_however_they_were_recorded(root):
    records = [(f"{IT}[{k}]", row(f"first of {k}"), row(f"second of {k}")) for k in "ba"]
    record(root, *records, (THEY, row("one")))
    page = ledger_page(root)
    record(root, (THEY, row("one")), *reversed(records))
    assert ledger_page(root) == page
    whats = [line.split(" | ")[0] for line in page.splitlines() if " | 1 | " in line]
    assert whats == ["| first of a", "| second of a", "| first of b", "| second of b", "| one"]


def test_the_latest_run_of_a_test_counts(root):
    record(root, (IT, row("first"), row("second")), (THEY, row("kept")), (IT, row("third")))
    whats = [line.split(" | ")[0] for line in ledger_page(root).splitlines() if " | 1 | " in line]
    assert whats == ["| third", "| kept"]


def test_records_of_a_test_that_is_gone_are_left_out(root):
    record(root, (IT, row()), (THEY, row()), ("tests/test_it.py::test_gone[1]", row("departed")))
    assert "departed" not in ledger_page(root)


def test_records_of_some_tests_alone_make_no_ledger(root):
    record(root, (IT, row()))
    with pytest.raises(RecordsError, match=rf"no record of {THEY} \(1 of 2 tests.*make unit"):
        ledger_page(root)
    (root / "_build/ledger-records.jsonl").unlink()
    with pytest.raises(RecordsError, match="2 of 2 tests"):
        ledger_page(root)


def test_the_tests_that_use_the_ledger_are_found(root):
    assert ledger_tests(root) == {IT, THEY}
    claim = "tests/logz/test_exact.py::test_enumeration_agrees_with_a_transfer_matrix"
    assert claim in ledger_tests(ROOT)


def test_a_row_says_what_was_compared_and_by_which_test(root):
    estimate = row("|pi P - pi| of W[0, 0]", 2.0, 2.31, 0.1)
    record(root, (f"{IT}[3-x]", estimate), (THEY, row()))
    page = ledger_page(root)
    what = r"\|pi P - pi\| of W\[0, 0\]"
    assert f"| {what} | 2.00 | 2.31 | 0.10 | 3.1 | it agrees (3-x) |\n" in page
    assert "## It\n\nThe tests are in `tests/test_it.py`." in page  # a chapter's own tests
    (root / "companion").mkdir(exist_ok=True)
    (root / "companion/it.py").touch()
    assert "## companion.it\n" in ledger_page(root)
    assert "all 2 of them" in page
    assert "Of the 1 estimates" in page
    assert "3.1 standard errors." in page


# ---------------------------------------------------------------- pages made from the notebooks


def test_run_times_are_listed_in_reading_order_and_summed(root):
    rows = run_times_page(root).splitlines()[-4:]
    assert rows == [
        "| [The $n$ th](../zoo/first.ipynb) | 12.0 |",
        "| [The second](../art/second.ipynb) | 3.2 |",
        "| All | 15.2 |",
        "| On average | 7.6 |",
    ]


def test_pitfalls_are_listed_under_their_chapters(root):
    assert pitfalls_page(root).endswith(
        "\n## [The $n$ th](../zoo/first.ipynb)\n\n"
        "- [The size `f(x)`](#pitfall-size)\n- [The name](#pitfall-name)\n"
    )


# ---------------------------------------------------------------- the command line


def test_fresh_pages_pass_the_check(root):
    assert main([], root) == 0
    assert main(["--check"], root) == 0
    for name, (source, _) in PAGES.items():
        assert (root / name).read_text().startswith(HEADER.format(source=source))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_edited_by_hand_fails_the_check(root, capsys, name):
    main([], root)
    path = root / name
    edited = path.read_text() + "\nOne more.\n"
    path.write_text(edited)
    assert main(["--check"], root) == 1
    message = capsys.readouterr().err
    assert f"{name} is stale" in message
    assert "Run make pages." in message
    assert "-One more." in message
    assert path.read_text() == edited  # a check changes nothing


def stale_ledger(root):
    record(root, (IT, row(estimate=1.1, std_error=0.1)), (THEY, row()))


def stale_run_times(root):
    chapter(root, "art/second.ipynb", "The second", 4.0)


def stale_pitfalls(root):
    chapter(root, "art/second.ipynb", "The second", 3.25, pitfall("another", "pitfall-another"))


@pytest.mark.parametrize(
    ("change", "name"),
    list(zip([stale_ledger, stale_run_times, stale_pitfalls], PAGES, strict=True)),
)
def test_a_page_fails_the_check_when_its_records_change(root, capsys, change, name):
    main([], root)
    change(root)
    assert main(["--check"], root) == 1
    message = capsys.readouterr().err
    assert [page for page in PAGES if f"{page} is stale" in message] == [name]
    assert main([], root) == 0
    assert main(["--check"], root) == 0


def test_without_a_complete_run_the_ledger_is_left_as_it_is(root, capsys):
    main([], root)
    name = next(iter(PAGES))
    before = (root / name).read_text()
    record(root, (IT, row()))
    for arguments in ([], ["--check"]):
        assert main(arguments, root) == 1
        assert f"{name}: the ledger has no record of {THEY}" in capsys.readouterr().err
    assert (root / name).read_text() == before


# ---------------------------------------------------------------- the fixture


FIXTURE_TESTS = """
import math
import pytest
import torch


@pytest.mark.parametrize("k", ["a", "b"])
def test_agrees(ledger, k):
    ledger(f"mean {k}", exact=0.0, estimate=0.44, std_error=0.1)
    ledger(f"sum {k}", exact=1.0, estimate=torch.tensor(1.0, dtype=torch.float64))


def test_float32(ledger):
    ledger("half precision", exact=0.0, estimate=torch.tensor(0.0))


@pytest.mark.parametrize("k", ["cuda"])
def test_elsewhere(ledger, k):
    ledger("on another device", exact=0.0, estimate=0.0)


def test_fails_far_off(ledger):
    ledger("4.6 standard errors", exact=0.0, estimate=0.46, std_error=0.1)


def test_fails_beyond_the_tolerance(ledger):
    ledger("deterministic", exact=1.0, estimate=1.0 + 2e-10)


def test_fails_on_nan(ledger):
    ledger("not a number", exact=0.0, estimate=math.nan, std_error=1.0)


def test_fails_on_a_nan_error(ledger):
    ledger("no error", exact=0.0, estimate=0.0, std_error=math.nan)
"""


def test_the_fixture_records_what_agrees_and_refuses_the_rest(pytester):
    root = pytester.path
    (root / "tests").mkdir()
    (root / "tests/conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (root / "tests/test_it.py").write_text(FIXTURE_TESTS)
    run = pytester.runpytest_inprocess("-rA", "--color=no", "--import-mode=importlib")
    found = re.findall(r"^(PASSED|FAILED) \S+::test_(\S+)", run.stdout.str(), re.M)
    assert {name: "fails" in name for _, name in found} == {
        name: outcome == "FAILED" for outcome, name in found
    }, run.stdout.str() + run.stderr.str()
    assert len(found) == 8
    records = [
        json.loads(line) for line in (root / "_build/ledger-records.jsonl").read_text().splitlines()
    ]
    rows = {r["test"].partition("::")[2]: [row["what"] for row in r["rows"]] for r in records}
    assert rows == {
        "test_agrees[a]": ["mean a", "sum a"],
        "test_agrees[b]": ["mean b", "sum b"],
    }
