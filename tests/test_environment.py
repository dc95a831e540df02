"""One set of versions: what make, conda, Binder and CI install is what the package asks for."""

import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = SpecifierSet(PYPROJECT["project"]["requires-python"])


def read_lock(text: str) -> dict[str, Version]:
    """The pins of a lock; raises ValueError at a line that is not an exact public version."""
    pins = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s+*;]+)", line)
            if not match:
                raise ValueError(f"not an exact version without local suffix: {line!r}")
            pins[canonicalize_name(match[1])] = Version(match[2])
    return pins


def unmet(requirements: list[str], pins: dict[str, Version]) -> list[str]:
    """The requirements that no pin satisfies."""
    parsed = [Requirement(line) for line in requirements]
    return [
        str(one)
        for one in parsed
        if (pin := pins.get(canonicalize_name(one.name))) is None or pin not in one.specifier
    ]


def needed(names: set[str]) -> set[str]:
    """Everything that the named packages require here, themselves included."""
    found: set[str] = set()
    waiting = {(name, "") for name in names}
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        seen.add((name, extra))
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                child = canonicalize_name(one.name)
                waiting |= {(child, e) for e in {"", *one.extras}} - seen
    return found


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    """The pins of requirements.lock."""
    return read_lock((ROOT / "requirements.lock").read_text())


def all_requirements() -> list[str]:
    """What pyproject.toml asks for: to build, to run, and in every extra that make installs."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    return [
        *PYPROJECT["build-system"]["requires"],
        *PYPROJECT["project"]["dependencies"],
        *(line for name in ("book", "test") for line in extras[name]),
    ]


def test_every_requirement_is_pinned_to_a_version_that_satisfies_it(
    pins: dict[str, Version],
) -> None:
    assert unmet(all_requirements(), pins) == []
    # The same check finds a missing pin and one out of range.
    wrong = pins | {"sphinx-proof": Version("0.0.1")}
    del wrong["torch"]
    assert sorted(unmet(all_requirements(), wrong)) == ["sphinx-proof==0.4.0", "torch>=2.13"]


@pytest.mark.parametrize("line", ["torch==2.13.0+cpu", "torch>=2.13", "torch", "-e .", "a==1.*"])
def test_a_lock_holds_exact_public_versions_only(line: str) -> None:
    with pytest.raises(ValueError, match="not an exact version"):
        read_lock(f"# a comment\nnumpy==2.4.6\n{line}\n")


def test_the_lock_holds_what_is_needed_and_nothing_else(pins: dict[str, Version]) -> None:
    wanted = {canonicalize_name(Requirement(line).name) for line in all_requirements()}
    reached = needed(wanted)
    assert pins.keys() - reached == set(), "pinned, but nothing asks for them"
    # The CUDA build of PyTorch brings libraries of its own; which, depends on the platform.
    of_torch = needed({"torch"}) - {"torch"}
    assert reached - of_torch - pins.keys() == set(), "needed, but not pinned"


def test_the_installed_versions_are_those_of_the_lock(pins: dict[str, Version]) -> None:
    installed = {name: Version(importlib.metadata.version(name)).public for name in pins}
    assert installed == {name: str(version) for name, version in pins.items()}


def test_the_peers_of_the_benchmarks_have_a_lock_of_their_own(pins: dict[str, Version]) -> None:
    peers = read_lock((ROOT / "requirements-bench.lock").read_text())
    assert unmet(PYPROJECT["project"]["optional-dependencies"]["bench"], peers) == []
    # The two are installed together, and the book never needs a peer.
    assert peers.keys() & pins.keys() == set()


def test_conda_and_binder_install_the_same_lock() -> None:
    environment: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    (python,) = (entry.split("=", 1)[1] for entry in conda if entry.startswith("python="))
    assert python in PYTHONS
    # Versions come from the lock alone.
    assert [entry for entry in conda if not entry.startswith("python=")] == ["pip"]


def test_every_place_uses_the_same_python() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    workflow = yaml.safe_load((ROOT / ".github/workflows/book.yml").read_text())
    (setup,) = (
        step["with"]["python-version"]
        for step in workflow["jobs"]["test"]["steps"]
        if step.get("uses", "").startswith("actions/setup-python")
    )
    oldest = str(PYTHONS).removeprefix(">=")
    assert f"python={setup}" in environment["dependencies"]
    assert setup == oldest == PYPROJECT["tool"]["mypy"]["python_version"]
    makefile = (ROOT / "Makefile").read_text()
    assert f"({oldest.replace('.', ', ')})" in makefile


def test_the_workflow_runs_what_ci_runs_and_publishes_main_only() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/book.yml").read_text())
    assert {"run": "bash .ci/run"} in workflow["jobs"]["test"]["steps"]
    assert workflow["jobs"]["publish"]["needs"] == "test"
    assert workflow["jobs"]["publish"]["if"] == "github.ref == 'refs/heads/main'"
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")


@pytest.mark.parametrize(
    ("python", "sentence"),
    [
        (None, "There is no './python' here: install Python 3.11 or newer"),
        ("exit 1", "The book needs Python 3.11 or newer, and './python' is older"),
        ('case "$*" in *ensurepip*) exit 1;; esac', "sudo apt-get install python3-venv"),
    ],
)
def test_a_python_that_will_not_do_gets_one_clear_sentence(
    tmp_path: Path, python: str | None, sentence: str
) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    if python is not None:
        (tmp_path / "python").write_text(f"#!/bin/sh\n{python}\n")
        (tmp_path / "python").chmod(0o755)
    command = ["make", "--no-print-directory", ".venv/.ready", "PYTHON=./python"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert len(run.stdout.splitlines()) == 1
    assert sentence in run.stdout
    assert not (tmp_path / ".venv").exists()


def test_help_names_every_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)
    run = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    told = re.findall(r"^make (\w+) ", run.stdout, re.M)
    assert {"help", *told} == set(phony.split())
