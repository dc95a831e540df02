"""The book's pages, parsed as the site parses them: headings, directives, roles, links, prose.

`load(path)` reads a chapter (.ipynb) or a page (.md) into a `Page`: a list of `Item`s in reading
order. A directive holds the items of its argument and body, and `Page.all()` walks through those,
too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import yaml
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser

ROOT = Path(__file__).resolve().parents[1]

# Directives whose body is no prose, and those whose argument is none (a label, a file, a language).
NO_PROSE = {"bibliography", "code", "code-block", "eval-rst", "literalinclude", "math", "raw"}
NO_PROSE |= {"tableofcontents", "toctree"}
NO_TITLE = {"figure", "glue", "image", "include", "solution", "solution-start"}
HIDDEN = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands in prose for code, mathematics and roles


@dataclass(frozen=True)
class Item:
    """A piece of a page.

    Attributes:
        kind: `heading`, `directive`, `role`, `link`, `image`, `code`, `table`, `cell` or `prose`.
        name: the directive, role or heading level (`1` to `6`), the language of a code block.
        text: title, argument, role content, link target, alt text, source, or prose without code,
            mathematics and roles.
        options: a directive's options.
        children: the items within a directive.
        cell: the notebook cell that a `cell` is.
    """

    kind: str
    name: str = ""
    text: str = ""
    options: dict[str, str] = field(default_factory=dict)
    children: tuple[Item, ...] = ()
    cell: Any = None


@dataclass(frozen=True)
class Page:
    """A chapter or page: where it is (under `root`), its items, and its notebook, if it is one."""

    path: Path
    items: tuple[Item, ...]
    notebook: Any = None
    root: Path = ROOT

    @property
    def name(self) -> str:
        """The path from the root of the repository."""
        return self.path.relative_to(self.root).as_posix()

    @property
    def title(self) -> str:
        """The text of the first heading, as written."""
        return next((item.text for item in self.items if item.kind == "heading"), "")

    @property
    def code_cells(self) -> list[Any]:
        """The notebook's code cells, in order."""
        return [item.cell for item in self.items if item.kind == "cell"]

    def all(self, kind: str, *names: str) -> Iterator[Item]:
        """Every item of a kind, wherever it stands; of these names, where any are given."""
        return (
            item
            for item in walk(self.items)
            if item.kind == kind and (not names or item.name in names)
        )


def load(path: Path, root: Path = ROOT) -> Page:
    """Read and parse a chapter (.ipynb) or a page (.md)."""
    if path.suffix == ".md":
        return Page(path, tuple(parse(path.read_text())), root=root)
    return from_notebook(path, nbformat.read(path, as_version=4), root)


def from_notebook(path: Path, notebook: Any, root: Path = ROOT) -> Page:
    """A notebook, parsed; `path` says where it is, or is going to be."""
    items: list[Item] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            items += parse(cell.source)
        elif cell.cell_type == "code":
            items.append(Item("cell", text=cell.source, cell=cell))
    return Page(path, tuple(items), notebook, root)


def toc_names(root: Path = ROOT) -> list[str]:
    """The files that the table of contents names, in reading order, as it names them."""

    def names(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("root", "file", "glob"):
                    yield value
                else:
                    yield from names(value)
        elif isinstance(node, list):
            for entry in node:
                yield from names(entry)

    return list(names(yaml.safe_load((root / "_toc.yml").read_text())))


def page_paths(suffix: str, root: Path = ROOT) -> list[Path]:
    """The files of the book that end so, in the order of the table of contents."""
    order = {name: place for place, name in enumerate(toc_names(root))}
    paths = (path for path in (root / "book").rglob(f"*{suffix}") if path.name[0] != ".")

    def place(path: Path) -> tuple[int, str]:
        name = path.relative_to(root).with_suffix("").as_posix()
        return order.get(name, len(order)), name

    return sorted((p for p in paths if ".ipynb_checkpoints" not in p.parts), key=place)


def walk(items: tuple[Item, ...] | list[Item]) -> Iterator[Item]:
    """The items, each followed by those within it."""
    for item in items:
        yield item
        yield from walk(item.children)


# ---------------------------------------------------------------- parsing


@cache
def _parser() -> MarkdownIt:
    extensions = yaml.safe_load((ROOT / "_config.yml").read_text())["parse"]
    config = MdParserConfig(enable_extensions=set(extensions["myst_enable_extensions"]))
    return create_md_parser(config, RendererHTML)


def parse(text: str) -> list[Item]:
    """The items of a piece of MyST Markdown."""
    items: list[Item] = []
    heading = ""
    for token in _parser().parse(text):
        if token.type == "heading_open":
            heading = token.tag[1:]
        elif token.type == "inline":
            if heading:
                items.append(Item("heading", heading, token.content))
            heading = ""
            items += _inline(token)
        elif token.type == "table_open":
            items.append(Item("table"))
        elif token.type == "html_block":
            items.append(Item("prose", text=_words(re.sub(r"<[^>]*>", " ", token.content))))
        elif token.type in ("fence", "colon_fence"):
            items.append(_fence(token.info.strip(), token.content))
    return items


def _inline(token: Token) -> list[Item]:
    """The prose of a paragraph or heading, and the roles, links and images in it."""
    items: list[Item] = []
    prose = ""
    for child in token.children or []:
        if child.type == "text":
            prose += child.content
        elif child.type in ("softbreak", "hardbreak"):
            prose += " "
        elif child.type == "myst_role":
            items.append(Item("role", child.meta["name"], child.content))
            prose += HIDDEN
        elif child.type == "link_open":
            items.append(Item("link", text=str(child.attrGet("href") or "")))
        elif child.type == "image":
            items.append(Item("image", str(child.attrGet("src") or ""), child.content))
        elif child.type == "code_inline":
            items.append(Item("code", text=child.content))
            prose += HIDDEN
        elif child.type.startswith("math"):
            prose += HIDDEN
    return [Item("prose", text=_words(prose)), *items]


def _fence(info: str, content: str) -> Item:
    """A code block or, where its first word is in braces, a directive."""
    directive = re.match(r"\{([^}]+)\}\s*(.*)", info)
    if not directive:
        return Item("code", info.split(" ")[0], content)
    name, argument = directive.groups()
    options, body = _options(content)
    children: list[Item] = []
    if name.partition(":")[0] not in NO_PROSE | NO_TITLE:
        children += parse(argument)
    if name not in NO_PROSE:
        children += parse(body)
    return Item("directive", name, argument, options, tuple(children))


def _options(content: str) -> tuple[dict[str, str], str]:
    """The options at the head of a directive, and the rest of it."""
    if content.startswith("---\n"):
        head, _, body = content[4:].partition("\n---")
        return {key: str(value) for key, value in yaml.safe_load(head).items()}, body
    options: dict[str, str] = {}
    lines = content.splitlines()
    while lines and (option := re.match(r":([\w-]+):(.*)", lines[0])):
        options[option[1]] = option[2].strip()
        lines.pop(0)
        while lines and re.match(r"\s+\S", lines[0]):
            options[option[1]] += " " + lines.pop(0).strip()
    return options, "\n".join(lines)


def _words(text: str) -> str:
    return " ".join(text.split())
