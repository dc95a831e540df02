"""Write the appendix pages that are made from records: `make pages`.

    python tools/pages.py            write the pages
    python tools/pages.py --check    change nothing; fail if a page is not what the records give

- The ground-truth ledger, from the comparisons with exact answers that the tests record in
  `_build/ledger-records.jsonl` (the fixture `ledger` of tests/conftest.py).
- The run times, from the time that `make execute` stores in each notebook.
- The snippets that mislead, from the pitfall boxes of the chapters.

Only what is the same on every machine is printed: values as far as their standard error goes, and
deterministic ones as far as their tolerance.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import math
import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # run as a script, the repository is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from companion.reporting import round_to_error, typeset
from tools.execute import YARDSTICK_SECONDS
from tools.markup import ROOT, Item, Page, load, page_paths

RECORDS = "_build/ledger-records.jsonl"
MAX_DIGITS = 8  # of a deterministic value


class RecordsError(Exception):
    """Records that do not cover the tests: what is missing, and what to do."""


class Row(NamedTuple):
    """One comparison: an estimate and its exact value."""

    what: str
    exact: float
    estimate: float
    std_error: float
    tolerance: float


# ---------------------------------------------------------------- the ground-truth ledger


def ledger_records(root: Path = ROOT) -> dict[str, list[Row]]:
    """The comparisons of each test, by its pytest id, as its latest run recorded them.

    Raises:
        RecordsError: a test that uses the ledger has no record, so the records are not those of
            a complete run.
    """
    records: dict[str, list[Row]] = {}
    path = root / RECORDS
    for line in path.read_text().splitlines() if path.is_file() else []:
        record = json.loads(line)
        records[record["test"]] = [Row(**row) for row in record["rows"]]
    tests = ledger_tests(root)
    missing = sorted(tests - {name.partition("[")[0] for name in records})
    if missing:
        raise RecordsError(
            f"the ledger has no record of {missing[0]} ({len(missing)} of {len(tests)} tests are "
            "missing): run make unit, then make pages"
        )
    # What an earlier run recorded may be of a test that is gone.
    return {name: records[name] for name in sorted(records) if name.partition("[")[0] in tests}


def ledger_tests(root: Path = ROOT) -> set[str]:
    """The tests that use the fixture `ledger`, by their pytest ids without parameters."""
    tests = set()
    for path in (root / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
                continue
            if "ledger" in {argument.arg for argument in node.args.args}:
                tests.add(f"{path.relative_to(root).as_posix()}::{node.name}")
    return tests


def ledger_page(root: Path = ROOT) -> str:
    """The ledger, with a table for each file of tests."""
    records = ledger_records(root)
    rows = [row for rows in records.values() for row in rows]
    z = [abs(row.estimate - row.exact) / row.std_error for row in rows if row.std_error > 0]
    text = f"""# Ground-truth ledger

Every estimator of the package is compared with an exact answer, and the tests write down each
comparison. This page holds all {len(rows)} of them. An estimate has a standard error, and z is its
error in standard errors; a test fails beyond 4.5, which chance does about seven times in a million.
A deterministic method has no standard error: it is held to a tolerance. The last column is what the
test claims; the name of the test is the same, with underscores.

Of the {len(z)} estimates with a standard error, {sum(x < 1 for x in z)} lie within one standard
error of the exact value ({0.6827 * len(z):.0f} are expected if the standard errors are right) and
{sum(x < 2 for x in z)} within two ({0.9545 * len(z):.0f} expected). The largest error is
{max(z, default=0.0):.1f} standard errors.
"""
    for module, group in groupby(sorted(records, key=_module), key=_module):
        names = list(group)
        file = names[0].partition("::")[0]
        text += f"\n## {_title(module, root)}\n\nThe tests are in `{file}`.\n\n"
        text += "| What | Exact | Estimate | Standard error | z | The test claims |\n"
        text += "|---|---|---|---|---|---|\n"
        for name in names:
            claim, _, parameters = name.partition("::test_")[2].partition("[")
            claim = claim.replace("_", " ") + (f" ({parameters[:-1]})" if parameters else "")
            for row in records[name]:
                cells = [_escape(row.what), *map(typeset, ledger_row(row)), _escape(claim)]
                text += f"| {' | '.join(cells)} |\n"
    return text


def ledger_row(row: Row) -> tuple[str, str, str, str]:
    """Exact value, estimate, standard error and z-score, with the digits that mean something."""
    if row.std_error > 0:
        values = row.exact, row.estimate, row.std_error
        exact, estimate, error = (round_to_error(value, row.std_error) for value in values)
        z = round((row.estimate - row.exact) / row.std_error, 1) + 0.0  # no minus before a zero
        return exact, estimate, error, f"{z:.1f}"
    # As far as the tolerance goes; the digits beyond are round-off, another on each machine.
    places = math.floor(-math.log10(row.tolerance)) if row.tolerance > 0 else MAX_DIGITS
    exact, estimate = (
        f"{round(value, places) + 0.0:.{MAX_DIGITS}g}" for value in (row.exact, row.estimate)
    )
    return exact, estimate, "none", f"within {row.tolerance:g}"


def _module(test: str) -> str:
    """The module that a test is of: `models.rbm` for `tests/models/test_rbm.py::test_y`."""
    file = test.partition("::")[0].removeprefix("tests/").removesuffix(".py")
    return file.replace("test_", "").replace("/", ".")


def _title(module: str, root: Path) -> str:
    """`companion.models.rbm`, or `Gradient descent` where the tests are a chapter's own."""
    place = root / "companion" / module.replace(".", "/")
    if place.is_dir() or place.with_suffix(".py").is_file():
        return f"companion.{module}"
    return module.replace("_", " ").capitalize()


def _escape(text: str) -> str:
    """Plain text, in a table of Markdown."""
    return re.sub(r"([\\`*_\[\]<>$|{}#])", r"\\\1", text)


# ---------------------------------------------------------------- pages made from the notebooks


def run_times_page(root: Path = ROOT) -> str:
    """How long each chapter runs, and all of them together."""
    chapters = [load(path, root) for path in page_paths(".ipynb", root)]
    never = [str(_link(c)) for c in chapters if "companion" not in c.notebook.metadata]
    if never:
        raise RecordsError(f"no run time of {', '.join(never)}; run make execute")
    seconds = [chapter.notebook.metadata.companion.seconds for chapter in chapters]
    text = f"""# Chapter run times

The processor time that each notebook took when its outputs were stored, the start of Python
included, on one thread. Processors and their load differ, so it is measured against a yardstick, a
fixed piece of work of the same kind: these are seconds of a machine that does the yardstick in
{YARDSTICK_SECONDS} seconds, and yours may take half as long or three times as long. A notebook may
take a minute, and all of them twenty seconds on average.

| Chapter | Seconds |
|---|---:|
"""
    for chapter, time in zip(chapters, seconds, strict=True):
        text += f"| {_link(chapter)} | {time:.1f} |\n"
    total = math.fsum(seconds)
    text += f"| All | {total:.1f} |\n| On average | {total / max(1, len(seconds)):.1f} |\n"
    return text


def pitfalls_page(root: Path = ROOT) -> str:
    """An index of the pitfall boxes."""
    text = """# Snippets that mislead

Code that is often met, looks right, and computes something else than it says. Each entry leads to a
box that shows the snippet, what it really computes, and the evidence.
"""
    for chapter in (load(path, root) for path in page_paths(".ipynb", root)):
        boxes = [box for box in chapter.all("directive", "admonition") if is_pitfall(box)]
        if boxes:
            text += f"\n## {_link(chapter)}\n\n"
        for box in boxes:
            title = box.text.removeprefix("Pitfall:").strip()
            text += f"- [{title[:1].upper()}{title[1:]}](#{box.options.get('name', '')})\n"
    return text


def is_pitfall(box: Item) -> bool:
    """Whether a directive is a pitfall box, if perhaps a flawed one."""
    return box.text.startswith("Pitfall") or "pitfall" in box.options.get("class", "").split()


def _link(chapter: Page) -> str:
    return f"[{chapter.title}](../{chapter.path.relative_to(chapter.root / 'book').as_posix()})"


# ---------------------------------------------------------------- the command line

PAGES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "book/appendix/ground-truth-ledger.md": ("the records of the tests", ledger_page),
    "book/appendix/run-times.md": ("the run times in the notebooks", run_times_page),
    "book/appendix/snippets-that-mislead.md": ("the pitfall boxes of the chapters", pitfalls_page),
}
HEADER = "% Made by tools/pages.py from {source}. Do not edit: make pages.\n\n"


def _first_changes(old: str, new: str) -> list[str]:
    lines = old.splitlines(), new.splitlines()
    return list(difflib.unified_diff(*lines, "committed", "made now", n=0, lineterm=""))[:20]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the pages that are made from records.")
    parser.add_argument("--check", action="store_true", help="fail if a page is stale")
    check = parser.parse_args(arguments).check
    status = 0
    for name, (source, page) in PAGES.items():
        path = root / name
        try:
            text = HEADER.format(source=source) + page(root)
        except RecordsError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
            continue
        old = path.read_text() if path.is_file() else ""
        if check and text != old:
            print(f"{name} is stale: {source} say otherwise. Run make pages.", file=sys.stderr)
            print(*_first_changes(old, text), sep="\n", file=sys.stderr)
            status = 1
        elif text != old:
            path.write_text(text)
            print(f"{name}: written from {source}")
    return status


if __name__ == "__main__":
    sys.exit(main())
