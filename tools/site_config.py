"""Sphinx extension: what the site's configuration takes from the place where the site is built.

- `GITHUB_REPOSITORY` (set by GitHub's workflows, `owner/name`): the repository's address. The
  buttons that need it (launch on Colab or Binder, repository, edit), and the links from the API
  reference to the source, appear only when it is set.
- `BOOK_ONLINE`: when it is set, names of PyTorch, NumPy and Python in the API reference link to
  their own documentation, if that can be reached. Otherwise no network is used.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import urllib.error
import urllib.request
from operator import attrgetter
from pathlib import Path
from typing import Any

import pybtex.plugin  # type: ignore[import-untyped]
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging

log = logging.getLogger(__name__)
PACKAGE = Path(__file__).resolve().parents[1] / "companion"


def add_repository(config: Config, repository: str) -> None:
    """Point the launch, repository and edit buttons at `repository`, an `owner/name` on GitHub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"GITHUB_REPOSITORY must read owner/name, got {repository!r}")
    config.html_theme_options |= {
        "repository_url": f"https://github.com/{repository}",
        "repository_branch": "main",
        "path_to_docs": "",
        "use_repository_button": True,
        "use_edit_page_button": True,
        "launch_buttons": {
            "notebook_interface": "jupyterlab",
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        },
    }


def source_address(repository: str, info: dict[str, str]) -> str | None:
    """Where on GitHub the source of a documented name is, or None if it has no lines of its own."""
    try:
        documented = attrgetter(info["fullname"])(sys.modules[info["module"]])
        documented = inspect.unwrap(getattr(documented, "fget", None) or documented)
        path = Path(inspect.getfile(documented)).resolve().relative_to(PACKAGE)
        lines, first = inspect.getsourcelines(documented)
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return None  # a constant, an alias, something of another project
    where = f"{path.as_posix()}#L{first}-L{first + len(lines) - 1}"
    return f"https://github.com/{repository}/blob/main/{PACKAGE.name}/{where}"


def within_reach(mapping: dict[str, Any]) -> dict[str, Any]:
    """The entries of an intersphinx mapping whose inventory can be fetched."""
    reached = {}
    for name, (url, inventory) in mapping.items():
        try:
            urllib.request.urlopen(f"{url}/objects.inv", timeout=20).close()
        except (urllib.error.URLError, TimeoutError) as error:
            log.info("no links to the documentation of %s: %s", name, error)
        else:
            reached[name] = (url, inventory)
    return reached


def configure(app: Sphinx, config: Config) -> None:
    """Fill in what depends on the environment, before the theme and the extensions read it."""
    config.html_theme_options.pop("repository_url", None)  # the default is Jupyter Book's own
    if repository := os.environ.get("GITHUB_REPOSITORY"):
        add_repository(config, repository)
        config.linkcode_resolve = lambda domain, info: source_address(repository, info)
    online = bool(os.environ.get("BOOK_ONLINE"))
    config.intersphinx_mapping = within_reach(config.intersphinx_mapping) if online else {}
    config.nitpick_ignore_regex = [
        ("py:obj", r"(?s).*"),  # single backticks in docstrings: most of them are not names
        ("py:class", r"companion\.mcmc\.base\.S"),  # a type variable
        ("py:.*", r"(?s)(?!companion\b).*"),  # other projects' names: known only when online
    ]


def drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Take the scripts of Thebe from a page: unused here, they break it and would call a CDN."""
    for files in ("script_files", "css_files"):
        context[files] = [
            one
            for one in context.get(files, [])
            if "thebe" not in f"{one.filename} {one.attributes.get('body')}".lower()
        ]


def tidy_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, None] | None:
    """Show no arguments for a protocol: it is never called."""
    return ("", None) if what == "class" and getattr(obj, "_is_protocol", False) else None


def show_formulas(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Set an indented paragraph of a docstring as it stands: it is a formula or code."""
    sections = {"Args:", "Returns:", "Raises:", "Attributes:", "Yields:", "Note:", "Example:"}
    for i in reversed(range(2, len(lines))):
        before = lines[i - 2]
        opens = lines[i].startswith("    ") and not lines[i - 1] and before[:1].strip()
        if opens and before not in sections and not before.startswith(("- ", ">>>")):
            lines[i:i] = [".. code-block:: text", ""]


def skip_member(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool:
    """Leave out what only Python says of a member, such as "Alias for field number 0"."""
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")


def link_alias(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Link a type alias such as `LogProb`: a signature asks for a class, and it is a variable."""
    if node.get("refdomain") != "py" or node.get("reftype") != "class":
        return None
    python, target = env.get_domain("py"), node["reftarget"]
    return python.resolve_xref(env, node["refdoc"], app.builder, "data", target, node, contnode)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    # Asked anew for each citation, it would read what is known of all installed packages each time.
    pybtex.plugin.entry_points = functools.cache(pybtex.plugin.entry_points)
    app.connect("missing-reference", link_alias)
    app.setup_extension("sphinx.ext.autodoc")
    if os.environ.get("GITHUB_REPOSITORY"):
        app.setup_extension("sphinx.ext.linkcode")
    app.connect("autodoc-process-docstring", show_formulas, priority=1)  # before napoleon
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("html-page-context", drop_thebe)
    app.connect("config-inited", configure, priority=1)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
