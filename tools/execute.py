"""Run the book's notebooks and store their outputs: `make execute`.

    python tools/execute.py                 every notebook whose stored outputs are stale
    python tools/execute.py --all           every notebook
    python tools/execute.py book/a.ipynb    these, stale or not
    python tools/execute.py --list          name the stale ones and run nothing

A notebook is stale when its code cells, or the modules of `companion` that they import, are not
those of the run whose outputs it stores; its metadata keep the fingerprints of both. Each notebook
runs from its own folder, in a fresh kernel, on one thread, from first cell to last. When a cell
fails, or writes to stderr, the file stays as it was.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
CELL_METADATA = {"tags", "mystnb"}  # what the book gives a meaning to; the rest is editors' noise


class NotebookError(Exception):
    """A notebook that cannot be stored: what happened, and where."""


def sha256(text: str) -> str:
    """The fingerprint of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def code_of(notebook: NotebookNode) -> list[str]:
    """The sources of the code cells, in order."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


# ---------------------------------------------------------------- what is stale


def imported_names(source: str) -> set[str]:
    """The dotted names that a Python source imports, as `module` and as `module.name`."""
    names: set[str] = set()
    try:
        tree = ast.parse(source)
    except SyntaxError:  # the kernel will say where
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_sources(code: list[str], root: Path = ROOT) -> dict[str, str]:
    """The sources of the `companion` modules that the code imports, directly or through others."""
    sources: dict[str, str] = {}
    waiting = set().union(*(imported_names(TransformerManager().transform_cell(c)) for c in code))
    while waiting:
        parts = waiting.pop().split(".")
        if parts[0] != "companion":
            continue
        for length in range(1, len(parts) + 1):  # importing a.b.c imports a and a.b first
            module = root.joinpath(*parts[:length])
            for file in (module.with_suffix(".py"), module / "__init__.py"):
                name = str(file.relative_to(root))
                if file.is_file() and name not in sources:
                    sources[name] = file.read_text()
                    waiting |= imported_names(sources[name])
    return sources


def fingerprints(notebook: NotebookNode, root: Path = ROOT) -> dict[str, str]:
    """The fingerprints of a notebook's code and of the package sources behind it."""
    package = json.dumps(package_sources(code_of(notebook), root), sort_keys=True)
    return {"code_sha256": code_fingerprint(notebook), "package_sha256": sha256(package)}


def code_fingerprint(notebook: NotebookNode) -> str:
    """The fingerprint of a notebook's code alone."""
    return sha256(json.dumps(code_of(notebook)))


def why_stale(notebook: NotebookNode, root: Path = ROOT) -> str | None:
    """Why the stored outputs are not those of the present code, or None if they are."""
    stored = notebook.metadata.get("companion", {})
    if "seconds" not in stored:
        return "never executed"
    now = fingerprints(notebook, root)
    if stored.get("code_sha256") != now["code_sha256"]:
        return "its code has changed"
    if stored.get("package_sha256") != now["package_sha256"]:
        return "the package has changed"
    return None


# ---------------------------------------------------------------- run and store


def normalise(notebook: NotebookNode) -> None:
    """Drop what differs from one editor or run to the next, and name each cell by its content."""
    kept = {
        key: notebook.metadata[key] for key in ("companion", "mystnb") if key in notebook.metadata
    }
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA | kept)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in sorted(CELL_METADATA & cell.metadata.keys())}
        )
        name = sha256(cell.cell_type + cell.source)[:8]
        seen[name] = seen.get(name, 0) + 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"


def time_of_children() -> float:
    """The processor time of all processes that this one has started and seen end."""
    times = os.times()
    return times.children_user + times.children_system


# Processor time grows two- or threefold where other programs share a core's caches and clock, so it
# is measured with a yardstick: work of the kind that notebooks do, before and after each.
YARDSTICK = """
import torch
torch.set_num_threads(1)
x = torch.linspace(0.0, 1.0, 2000, dtype=torch.float64)
for _ in range(20_000):
    x = torch.where(x < 0.5, x * 1.5, x - 0.25)
"""
YARDSTICK_SECONDS = 2.1  # what it takes on the quiet machine that the budgets are meant for


def measure_yardstick() -> float:
    """The processor time of the yardstick just now, in seconds."""
    start = time_of_children()
    subprocess.run([sys.executable, "-c", YARDSTICK], check=True)
    return time_of_children() - start


def run(path: Path) -> float:
    """Execute a notebook and store its outputs in it.

    Args:
        path: the notebook.

    Returns:
        The processor time it took, the start of the kernel included, in seconds of a machine that
        takes `YARDSTICK_SECONDS` for the yardstick.

    Raises:
        NotebookError: a cell failed or wrote to stderr. The file is then unchanged.
    """
    before = path.read_bytes()
    notebook = nbformat.reads(before.decode(), as_version=4)
    prints = fingerprints(notebook)
    os.environ["OMP_NUM_THREADS"] = "1"  # the last digits depend on the number of threads
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        coalesce_streams=True,  # where printed text is cut into pieces depends on timing
        resources={"metadata": {"path": str(path.parent)}},
    )
    yardstick = measure_yardstick()
    start = time_of_children()
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:
        raise NotebookError(f"{path}: {error}") from None
    taken = time_of_children() - start
    yardstick = (yardstick + measure_yardstick()) / 2
    seconds = round(taken * YARDSTICK_SECONDS / yardstick, 1)
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise NotebookError(
                    f"{path}: cell {number} writes to stderr, which has no place in the book. "
                    f"Mend the cause, or catch it and print what matters:\n{output.text}"
                )
    notebook.metadata["companion"] = {"seconds": seconds, **prints}
    normalise(notebook)
    nbformat.validate(notebook)
    if path.read_bytes() != before:
        raise NotebookError(f"{path}: the file was edited while it ran; run it again")
    # A kill leaves the old file or the new one, never half of one.
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(nbformat.writes(notebook) + "\n")
    scratch.replace(path)
    return seconds


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run notebooks and store their outputs.")
    parser.add_argument("paths", nargs="*", type=Path, help="these notebooks, stale or not")
    parser.add_argument("--all", action="store_true", help="every notebook, stale or not")
    parser.add_argument("--list", action="store_true", help="name the stale ones, run nothing")
    options = parser.parse_args(arguments)
    paths = options.paths or sorted(
        path for path in (ROOT / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
    )
    forced = options.all or bool(options.paths)
    for path in paths:
        reason = why_stale(nbformat.read(path, as_version=4))
        if options.list:
            print(f"{path}: {reason or 'up to date'}")
        elif forced or reason:
            print(f"{path}: {reason or 'asked for'} ... ", end="", flush=True)
            try:
                print(f"{run(path.resolve())} s")
            except NotebookError as error:
                print("failed")
                print(error, file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
