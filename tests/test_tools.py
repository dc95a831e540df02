"""`make execute` stores what the code printed, only that, and nothing when it went wrong."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools import execute

v4 = nbformat.v4


def write(path: Path, *cells: str) -> Path:
    """A notebook of code cells, with the noise that editors leave in one."""
    notebook = v4.new_notebook(cells=[v4.new_code_cell(cell) for cell in cells])
    notebook.metadata = {"kernelspec": {"name": "mine", "display_name": "Mine"}, "vscode": {"a": 1}}
    notebook.metadata["language_info"] = {"name": "python", "version": "3.99.1"}
    notebook.cells[0].metadata = {"tags": ["hide-input"], "execution": {"iopub.status": "now"}}
    notebook.cells[0].metadata["ExecuteTime"] = {"duration": 3}
    nbformat.write(notebook, path)
    return path


def stored(path: Path) -> str:
    """What the last output of the last cell says."""
    return nbformat.read(path, as_version=4).cells[-1].outputs[-1].text


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a `companion` of three modules: `a` imports `b`, and `c` stands apart."""
    folder = tmp_path / "companion"
    folder.mkdir()
    sources = {"__init__": "", "a": "from companion import b\n", "b": "x = 1\n", "c": "y = 1\n"}
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return tmp_path


# ---------------------------------------------------------------- what is stale


def test_a_notebook_depends_on_the_modules_that_it_imports_and_on_theirs(package: Path) -> None:
    needed = {"companion/__init__.py", "companion/a.py", "companion/b.py"}
    for code in ("import companion.a", "from companion import a", "from companion.a import b as x"):
        assert execute.package_sources([code], package).keys() == needed
    assert execute.package_sources(["%matplotlib inline\nimport json"], package) == {}
    assert execute.package_sources(["this is no Python"], package) == {}


def test_the_real_package_is_found() -> None:
    modules = {
        "__init__",
        "core/__init__",
        "core/contracts",
        "core/log_z",
        "core/runs",
        "core/trace",
    }
    modules |= {"carried", "inputs", "storage"}
    assert {f"companion/{module}.py" for module in modules} == set(
        execute.package_sources(["from companion.core import sample"])
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("a cell", "its code has changed"),
        ("prose", None),
        ("companion/a.py", "the package has changed"),
        ("companion/b.py", "the package has changed"),
        ("companion/c.py", None),
    ],
)
def test_a_notebook_is_stale_when_its_code_or_the_package_behind_it_has_changed(
    package: Path, change: str, reason: str | None
) -> None:
    code = v4.new_code_cell("from companion.a import x")
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("Prose"), code])
    assert execute.why_stale(notebook, package) == "never executed"
    notebook.metadata["companion"] = {"seconds": 1.0, **execute.fingerprints(notebook, package)}
    assert execute.why_stale(notebook, package) is None
    if change == "a cell":
        code.source += "\nx + 1"
    elif change == "prose":
        notebook.cells[0].source = "Other prose"
    else:
        package.joinpath(change).write_text("from companion import b\nx = 2\n")
    assert execute.why_stale(notebook, package) == reason


def test_only_stale_notebooks_are_run_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book" / "part").mkdir(parents=True)
    fresh = write(tmp_path / "book" / "part" / "a.ipynb", "1")
    write(tmp_path / "book" / "part" / "b.ipynb", "1")
    notebook = nbformat.read(fresh, as_version=4)
    notebook.metadata["companion"] = {"seconds": 1.0, **execute.fingerprints(notebook)}
    nbformat.write(notebook, fresh)
    ran: list[str] = []
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setattr(execute, "run", lambda path: ran.append(path.name) or 0.1)

    assert execute.main(["--list"]) == 0
    assert ran == []
    assert "up to date" in capsys.readouterr().out
    execute.main([])
    assert ran == ["b.ipynb"]
    execute.main([str(fresh)])
    assert ran == ["b.ipynb", "a.ipynb"]
    execute.main(["--all"])
    assert ran == ["b.ipynb", "a.ipynb", "a.ipynb", "b.ipynb"]


# ---------------------------------------------------------------- run and store


@pytest.fixture
def quick_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that need not be timed do without the measurement, which takes longer than they do."""
    monkeypatch.setattr(execute, "measure_yardstick", lambda: execute.YARDSTICK_SECONDS)


@pytest.mark.usefixtures("quick_yardstick")
def test_a_run_stores_outputs_and_leaves_no_noise(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.ipynb",
        "import os, pathlib\nx = 20",
        "print(pathlib.Path.cwd().name == 'here', x + 1, os.environ['OMP_NUM_THREADS'])",
    )
    (tmp_path / "here").mkdir()
    path = path.rename(tmp_path / "here" / "a.ipynb")
    seconds = execute.run(path)
    assert stored(path) == "True 21 1\n"
    raw = json.loads(path.read_text())
    assert raw["metadata"]["companion"].pop("seconds") == seconds > 0
    assert raw["metadata"]["companion"].keys() == {"code_sha256", "package_sha256"}
    assert raw["metadata"]["kernelspec"]["name"] == "python3"
    assert raw["metadata"]["language_info"].keys() == {"name", "pygments_lexer"}
    assert raw["metadata"].keys() == {"companion", "kernelspec", "language_info"}
    assert [cell["metadata"] for cell in raw["cells"]] == [{"tags": ["hide-input"]}, {}]
    assert [cell["execution_count"] for cell in raw["cells"]] == [1, 2]
    assert execute.why_stale(nbformat.read(path, as_version=4)) is None

    # Another run of it, from a copy with other cell identities, gives the same file.
    for cell in raw["cells"]:
        cell["id"] = f"other-{cell['id']}"
    (tmp_path / "here" / "b.ipynb").write_text(json.dumps(raw))
    execute.run(tmp_path / "here" / "b.ipynb")
    again = json.loads((tmp_path / "here" / "b.ipynb").read_text())
    del again["metadata"]["companion"]["seconds"]
    for cell in raw["cells"]:
        cell["id"] = cell["id"].removeprefix("other-")
    assert again == raw


@pytest.mark.usefixtures("quick_yardstick")
def test_the_time_of_a_run_is_that_of_its_computations(tmp_path: Path) -> None:
    busy = "import time\nend = time.process_time() + 2\nwhile time.process_time() < end: pass"
    path = write(tmp_path / "a.ipynb", busy, "print(time.process_time())")
    working = execute.run(path)
    assert working > float(stored(path)) - 0.1  # what the kernel says; tenths are stored
    path = write(tmp_path / "b.ipynb", "import time\ntime.sleep(4)", "print(time.process_time())")
    waiting = execute.run(path)
    assert 0 < waiting < float(stored(path)) + 2  # what the kernel says, and not the wait


def test_equal_cells_have_different_identities() -> None:
    notebook = v4.new_notebook(cells=[v4.new_code_cell("x = 1") for _ in range(3)])
    execute.normalise(notebook)
    assert len({cell.id for cell in notebook.cells}) == 3
    nbformat.validate(notebook)


@pytest.mark.usefixtures("quick_yardstick")
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("1 / 0", "division by zero"),
        ("import warnings\nwarnings.warn('mind this')", "(?s)cell 2 writes to stderr.*mind this"),
        ("import os\nos._exit(3)", "(?i)kernel died"),
    ],
)
def test_a_notebook_that_goes_wrong_keeps_its_file(
    tmp_path: Path, code: str, sentence: str
) -> None:
    path = write(tmp_path / "a.ipynb", "x = 1", code, "print(2)")
    before = path.read_bytes()
    with pytest.raises(execute.NotebookError, match=sentence):
        execute.run(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("quick_yardstick")
def test_a_notebook_that_is_edited_while_it_runs_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", "open('a.ipynb', 'a').write(' ')")
    with pytest.raises(execute.NotebookError, match="edited while it ran"):
        execute.run(path)
    assert path.read_text().endswith("\n ")  # the edit is still there


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    wait = "import time\ntime.sleep(0.5)"
    paths = [write(tmp_path / f"{i}.ipynb", wait, f"print({i})") for i in range(2)]
    quick = "import execute; execute.measure_yardstick = lambda: 1.0; "
    quick += "raise SystemExit(execute.main({!r}))"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", quick.format([str(path)])],
            cwd=Path(execute.__file__).parent,
            stdout=subprocess.PIPE,
        )
        for path in paths
    ]
    assert [process.communicate() and process.returncode for process in runs] == [0, 0]
    assert [stored(path) for path in paths] == ["0\n", "1\n"]


@pytest.mark.usefixtures("quick_yardstick")
def test_a_failing_cell_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.ipynb", "undefined")
    assert execute.main([str(path)]) == 1
    assert "NameError" in capsys.readouterr().err


def test_run_times_are_in_seconds_of_the_machine_of_the_yardstick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.ipynb", "x = 1")
    clock = iter([100.0, 112.0])
    monkeypatch.setattr(execute, "time_of_children", lambda: next(clock))
    yardsticks = iter([2.0 * execute.YARDSTICK_SECONDS, 4.0 * execute.YARDSTICK_SECONDS])
    monkeypatch.setattr(execute, "measure_yardstick", lambda: next(yardsticks))
    assert execute.run(path) == 4.0  # twelve seconds on a machine three times as slow


def test_the_yardstick_takes_processor_time() -> None:
    assert 0.1 < execute.measure_yardstick() < 60
