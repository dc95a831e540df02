"""The comparison of stored outputs with a new run: strict, but for timings and versions."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

SANITIZE = Path(__file__).with_name("sanitize.cfg")


def sanitized(text: str) -> str:
    """The text that nbval compares."""
    # As nbval reads the file.
    for regex, by in re.findall(r"^regex: (.*)$\n^replace: (.*)$", SANITIZE.read_text(), re.M):
        text = re.sub(regex, by, text)
    return text


def cell(printed: str, glued: str, time: str) -> nbformat.NotebookNode:
    """A cell that prints 0.7854, glues 0.785 and says how long it took, with these outputs."""
    source = "from companion.reporting import glue\n"
    source += "print(0.7854, 'took 1.0 s')\nglue('pi', 0.78539, digits=3)"
    outputs = [
        v4.new_output("stream", name="stdout", text=f"{printed} took {time} s\n"),
        v4.new_output(
            "display_data",
            data={"application/papermill.record/text/plain": f"'{glued}'"},
            metadata={"scrapbook": {"name": "pi", "mime_prefix": "application/papermill.record/"}},
        ),
    ]
    return v4.new_code_cell(source, execution_count=1, outputs=outputs)


def test_a_changed_digit_fails_and_a_changed_timing_does_not(tmp_path):
    cells = [
        cell("0.7854", "0.785", "1.0"),
        cell("0.7854", "0.785", "12.3"),
        cell("0.7855", "0.785", "1.0"),
        cell("0.7854", "0.786", "1.0"),
    ]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "chapter.ipynb")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--color=no"),
            *("--nbval", "--nbval-current-env", f"--nbval-sanitize-with={SANITIZE}"),
        ],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.findall(r"^(PASSED|FAILED) \S+::Cell (\d)", run.stdout, re.M)
    outcomes = {int(number): outcome for outcome, number in found}
    expected = ["PASSED", "PASSED", "FAILED", "FAILED"]
    assert [outcomes.get(number) for number in range(4)] == expected, run.stdout + run.stderr


@pytest.mark.parametrize(
    "text",
    [
        "0.7918 ± 0.0041",
        "error 3.1 s",
        "acceptance 0.78 after 12 sweeps",
        "log Z took the value 23.278",
        "PyTorch gives 0.7918",
        "step size 0.1",
    ],
)
def test_results_are_not_sanitized(text):
    assert sanitized(text) == text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("training took 1.2 s", "training took 13.4 s"),
        ("it took 12 ms", "it took 9.5 ms"),
        ("PyTorch 2.13.0+cpu, Python 3.11.7", "PyTorch 2.14.1, Python 3.12.0"),
    ],
)
def test_timings_and_versions_are_sanitized(one, other):
    assert sanitized(one) == sanitized(other) != one
