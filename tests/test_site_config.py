"""The site's configuration: what depends on the environment, and what the toc must hold."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
import yaml

from companion.core import AnnealingPath, Kernel, LogZ
from tools import site_config

ROOT = Path(__file__).parents[1]
MAPPING = {"torch": ("http://127.0.0.1:9", None)}  # nothing listens there


def configured(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Any:
    """The configuration that the extension makes in this environment."""
    for name in ("GITHUB_REPOSITORY", "BOOK_ONLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = SimpleNamespace(
        html_theme_options={"repository_url": "https://example.org", "launch_buttons": {}},
        intersphinx_mapping=dict(MAPPING),
    )
    site_config.configure(None, config)  # type: ignore[arg-type]
    return config


def test_buttons_point_at_the_repository_that_the_site_is_built_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = configured(monkeypatch, GITHUB_REPOSITORY="someone/book").html_theme_options
    assert options["repository_url"] == "https://github.com/someone/book"
    assert options["use_edit_page_button"]
    assert options["launch_buttons"].keys() >= {"colab_url", "binderhub_url"}


def test_names_of_the_reference_lead_to_the_lines_of_their_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve = configured(monkeypatch, GITHUB_REPOSITORY="someone/book").linkcode_resolve
    address = resolve("py", {"module": "companion.core", "fullname": "LogZ.interval"})
    where, first, last = re.split("#L|-L", address)
    assert where == "https://github.com/someone/book/blob/main/companion/core/log_z.py"
    lines = (ROOT / "companion/core/log_z.py").read_text().splitlines()[int(first) - 1 : int(last)]
    assert lines[0].strip().startswith("def interval(") and lines[-1].strip().startswith("return ")
    for module, name in (("core", "LogProb"), ("core.log_z", "Tensor"), ("core", "nothing")):
        nowhere = {"module": f"companion.{module}", "fullname": name}
        assert resolve("py", nowhere) is None  # an alias, another project's, none at all


def test_without_a_repository_there_are_no_buttons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured(monkeypatch).html_theme_options == {"launch_buttons": {}}


def test_a_strange_repository_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="owner/name"):
        configured(monkeypatch, GITHUB_REPOSITORY='a/b"><script>')


def test_other_projects_documentation_is_left_alone_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert configured(monkeypatch).intersphinx_mapping == {}
    assert configured(monkeypatch, BOOK_ONLINE="1").intersphinx_mapping == {}  # out of reach
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda url, timeout: SimpleNamespace(close=lambda: None)
    )
    assert configured(monkeypatch, BOOK_ONLINE="1").intersphinx_mapping == MAPPING


def public_modules(folder: Path) -> set[str]:
    """The modules that users import; a package that exports names itself counts as one."""
    name = ".".join(folder.relative_to(ROOT).parts)
    if "__all__" in (folder / "__init__.py").read_text():
        return {name}
    modules = {f"{name}.{path.stem}" for path in folder.glob("[!_]*.py")}
    inner = (path.parent for path in folder.glob("*/__init__.py"))
    return modules.union(*map(public_modules, inner))


def test_every_module_has_its_page_in_the_reference() -> None:
    modules = public_modules(ROOT / "companion")
    pages = {path.stem: path.read_text() for path in (ROOT / "book/api").glob("companion.*.md")}
    assert pages.keys() == modules
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n") and f".. automodule:: {name}\n" in text


def test_every_page_stands_in_the_table_of_contents() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())

    def entries(node: dict[str, Any]) -> list[str]:
        inner = node.get("parts", []) + node.get("chapters", []) + node.get("sections", [])
        own = [node[key] for key in ("root", "file", "glob") if key in node]
        return own + [entry for child in inner for entry in entries(child)]

    listed = {
        str(path.relative_to(ROOT).with_suffix(""))
        for entry in entries(toc)
        for path in ROOT.glob(entry if entry.endswith("*") else entry + ".*")
    }
    present = {
        str(path.relative_to(ROOT).with_suffix(""))
        for suffix in ("md", "ipynb")
        for path in (ROOT / "book").rglob(f"*.{suffix}")
        if ".ipynb_checkpoints" not in path.parts
    }
    assert present == listed
    assert len(entries(toc)) == len(set(entries(toc)))


def test_the_reference_shows_no_noise() -> None:
    class Shape(Protocol):
        x: int

    signature = ("(*args, **kwargs)", "")
    assert site_config.tidy_signature(None, "class", "", Shape, None, *signature) == ("", None)  # type: ignore[arg-type]
    assert site_config.tidy_signature(None, "class", "", AnnealingPath, None, *signature)  # type: ignore[arg-type]
    assert site_config.tidy_signature(None, "class", "", LogZ, None, *signature) is None  # type: ignore[arg-type]
    assert site_config.skip_member(None, "class", "init", Kernel.init, False, None)  # type: ignore[arg-type]
    assert not site_config.skip_member(None, "class", "x", LogZ.interval, False, None)  # type: ignore[arg-type]


def test_an_indented_paragraph_of_a_docstring_is_set_as_it_stands() -> None:
    lines = ["Sum up.", "", "    - sum_i x_i", "    + 1", "", "Args:", "    x: a", "", "    b"]
    site_config.show_formulas(None, "function", "", None, None, lines)  # type: ignore[arg-type]
    assert lines[2:6] == [".. code-block:: text", "", "    - sum_i x_i", "    + 1"]
    assert lines[6:] == ["", "Args:", "    x: a", "", "    b"]
