"""What every chapter and page of the book must satisfy.

A check takes a parsed page and yields a sentence for each thing that is wrong with it. The chapters
are held to `CHAPTER_CHECKS`, the pages to `PAGE_CHECKS` and all of them together to `BOOK_CHECKS`;
`test_chapter_checks.py` plants each defect in a sound chapter and sees it found.
"""

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.execute import code_fingerprint
from tools.markup import Item, Page, load, page_paths, parse, toc_names, walk
from tools.pages import is_pitfall

SECONDS_EACH, SECONDS_ON_AVERAGE = 60, 20
ALT_WORDS = 8  # "more than a few": what is seen, and what to conclude
EXERCISES = 3
OBJECTIVES = "What you will be able to do"
# The fixed second-level headings, in order; each may go on ("From scratch: in ten lines"). At least
# three sections with titles of their own come first: the question, the failure, the idea.
SECTIONS = (
    "From scratch",
    "With the companion",
    "Checked against the exact answer",
    "Pitfalls",
    "When to use what",
    "Exercises",
    "Further reading",
)
THEOREMS = ("prf:theorem", "prf:lemma", "prf:proposition", "prf:corollary")
ALLOWED_NUMBERS = Path(__file__).with_name("allowed_numbers.toml")

# 0.95, .5, 1,234.5 but not 1.0.4; 95 %, 95 per cent; 1e-5; 3 × 10⁻⁵.
NUMBER = re.compile(
    r"(?<![\w.])(?:\d[\d,]*)?\.\d+(?!\.?\d)"
    r"|\b\d[\d,.]*\s?(?:%|per\s?cent\b)"
    r"|\b\d+[eE][+-]?\d+\b"
    r"|\b\d+\s?×\s?10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+"
)
# What would be true on one machine or one day alone, or was left unfinished.
WORDING = {
    "a path of one machine": r"(?<![\w./])(?:/(?:home|root|tmp|usr|work|Users)/|[A-Z]:\\)\S*",
    "an object's address": r"\bat 0x[0-9a-fA-F]{6,}",
    "a mark of unfinished work": r"\b(?:TODO|FIXME|XXX|TBD)\b|[Ll]orem ipsum",
}


# ---------------------------------------------------------------- cells and their outputs


def every_cell_was_run_in_order(page: Page) -> Iterator[str]:
    """Execution counts 1, 2, 3, …; nbval does not compare a cell that was never run."""
    counts = [cell.execution_count for cell in page.code_cells]
    if not counts:
        yield "there is no code cell"
    if counts != list(range(1, len(counts) + 1)):
        yield f"cells were not run once each, in order: their counts are {counts}"


def no_cell_fails_or_warns(page: Page) -> Iterator[str]:
    """No error and nothing on stderr: what a reader should see of either is caught and printed."""
    for cell, output in _outputs(page):
        if output.output_type == "error":
            yield f"{_first_line(cell)} ends in {output.ename}: {output.evalue}"
        if output.output_type == "stream" and output.name == "stderr":
            yield f"{_first_line(cell)} writes to stderr: {output.text[:80]!r}"


def outputs_are_compared(page: Page) -> Iterator[str]:
    """Nothing is hidden from nbval but versions and timings, and those hold no glued number."""
    for cell in page.code_cells:
        tags = set(cell.metadata.get("tags", ()))
        where = _first_line(cell)
        if re.search(r"#\s*(?:NBVAL|PYTEST_VALIDATE)_", cell.source):
            yield f"{where} speaks to nbval in a comment: use tags"
        for tag in tags & {"nbval-skip", "skip-execution", "raises-exception"}:
            yield f"{where} has the tag {tag}"
        if "nbval-ignore-output" in tags:
            if not tags & {"versions", "timings"}:
                yield f"{where} is not compared, but has neither the tag versions nor timings"
            if any("scrapbook" in output.get("metadata", {}) for output in cell.outputs):
                yield f"{where} is not compared, but glues a number"
        if cell.source.rstrip().endswith(";"):
            yield f"{where} ends in ';', which nbval cannot compare"


def code_and_outputs_belong_together(page: Page) -> Iterator[str]:
    """The outputs are those of `make execute` on this very code, and its time is recorded."""
    stored = page.notebook.metadata.get("companion", {})
    seconds = stored.get("seconds")
    if not isinstance(seconds, (int, float)):
        yield "its run time is not recorded: run make execute"
    elif not 0 < seconds <= SECONDS_EACH:
        yield f"it ran for {seconds} s; a chapter has {SECONDS_EACH} s"
    if stored.get("code_sha256") != code_fingerprint(page.notebook):
        yield "its code was edited after it was run: run make execute"


def figures_are_described(page: Page) -> Iterator[str]:
    """Alt text for every image; one image a cell, since the alt text is the cell's; no SVG."""
    for cell in page.code_cells:
        kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        images = sum(
            kind.removeprefix("application/papermill.record/").startswith("image/")
            for kind in kinds
        )
        if any("svg" in kind for kind in kinds):
            yield f"{_first_line(cell)} draws an SVG, which nbval compares and never finds equal"
        if images > 1:
            yield f"{_first_line(cell)} draws {images} images, and can describe one"
        if images and len(alt.split()) < ALT_WORDS:
            yield f"{_first_line(cell)} describes no figure (mystnb.image.alt): {alt!r}"
    for image in page.all("image"):
        if len(image.text.split()) < ALT_WORDS:
            yield f"the image {image.name} has no description: {image.text!r}"
    for figure in page.all("directive", "figure", "image"):
        if len(figure.options.get("alt", "").split()) < ALT_WORDS:
            yield f"the figure {figure.text} has no description (:alt:)"


# ---------------------------------------------------------------- numbers in the prose


def numbers_in_prose_are_glued(page: Page) -> Iterator[str]:
    """No decimal number, percentage or power of ten is typed: results change, typed ones do not."""
    phrases = [entry["text"] for entry in allowed_numbers() if fnmatch(page.name, entry["where"])]
    for prose in _prose(page):
        for phrase in phrases:
            prose = prose.replace(phrase, "")
        for number in NUMBER.finditer(prose):
            context = prose[max(0, number.start() - 30) : number.end() + 20]
            yield f"{number[0]!r} is typed in the prose (…{context}…): glue it"


def glue_matches_the_prose(page: Page) -> Iterator[str]:
    """Every glued name is used and glued once; every name used is glued, by the one helper."""
    glued = _glued(page)
    used = set()
    for role in page.all("role"):
        if role.name.startswith("glue") and role.name != "glue:text":
            yield f"{{{role.name}}}`{role.text}` shows quotes: use {{glue:text}}"
        elif role.name == "glue:text":
            target, name = _glue_reference(role.text)
            names = _glued_at((page.path.parent / target).resolve()) if target else glued
            if name not in names:
                yield f"{{glue:text}}`{role.text}` names nothing that is glued there"
            used |= {name} if not target else set()
    for name in sorted({name for name in glued if glued.count(name) > 1}):
        yield f"{name!r} is glued more than once"
    used |= {name for name in glued if name.removesuffix("-se") in used}  # an error need not be
    for name in sorted(set(glued) - used - _borrowed(page.root)[page.path.resolve()]):
        yield f"{name!r} is glued and never used"
    for cell in page.code_cells:
        if re.search(r"\bmyst_nb\b|scrapbook", cell.source):
            yield f"{_first_line(cell)} glues on its own: use companion.reporting.glue"


@cache
def allowed_numbers() -> list[dict[str, str]]:
    """What may be typed: `text` as it stands in the prose, `where`, and the `reason`."""
    return tomllib.loads(ALLOWED_NUMBERS.read_text())["allowed"]


def allowed_numbers_are_needed(pages: list[Page]) -> Iterator[str]:
    """The list of exceptions holds only what is there, with a reason."""
    for entry in allowed_numbers():
        where = [page for page in pages if fnmatch(page.name, entry["where"])]
        if not any(entry["text"] in prose for page in where for prose in _prose(page)):
            yield f"allowed_numbers.toml allows {entry['text']!r}, which stands nowhere"
        if not NUMBER.search(entry["text"]) or len(entry["reason"].split()) < 3:
            yield f"allowed_numbers.toml has no number or no reason for {entry['text']!r}"
        if not re.search(r"[^\W\d_]{2}", NUMBER.sub("", entry["text"])):
            yield f"allowed_numbers.toml allows {entry['text']!r} anywhere: add words around it"


# ---------------------------------------------------------------- the anatomy of a chapter


def sections_stand_in_order(page: Page) -> Iterator[str]:
    """Title, objectives, question with a picture, failure, idea, then the fixed sections."""
    if len([i for i in page.items if i.kind == "heading" and i.name == "1"]) != 1:
        yield "a chapter has one title (#)"
    sections = _sections(page)
    titles = [title for title, _ in sections]
    opening = sections[0][1]
    objectives = [i for i in opening if i.kind == "directive" and i.text == OBJECTIVES]
    if not objectives or objectives[0].options.get("class") != "objectives":
        yield f"it must open with an admonition {OBJECTIVES!r} of class objectives"
    elif len([i for i in objectives[0].children if i.kind == "prose"]) < 3:
        yield "it has fewer than two objectives"
    places = []
    for fixed in SECTIONS:
        found = [place for place, title in enumerate(titles) if title.startswith(fixed)]
        if len(found) != 1:
            yield f"it must have one section '## {fixed}', not {len(found)}"
        places += found[:1]
    if places != sorted(places):
        yield f"its sections are not in the order {SECTIONS}"
    if places and places[-1] != len(titles) - 1:
        yield f"the last section must be {SECTIONS[-1]!r}, not {titles[-1]!r}"
    if places and places[0] < 4:
        yield f"three sections come before {SECTIONS[0]!r}: the question, the failure, the idea"
    if len(titles) > 1 and not any(map(_is_figure, walk(sections[1][1]))):
        yield f"the question ({titles[1]!r}) has no picture"
    for fixed in SECTIONS[:3]:
        if not any(item.kind == "cell" for item in _section(page, fixed)):
            yield f"{fixed!r} has no code"
    choice = walk(_section(page, "When to use what"))
    if not any(i.kind == "table" or i.name == "list-table" for i in choice):
        yield "'When to use what' has no table"
    reading = walk(_section(page, "Further reading"))
    if not any(i.kind == "role" and i.name.startswith("cite") for i in reading):
        yield "'Further reading' cites nothing"


def pitfalls_show_evidence(page: Page) -> Iterator[str]:
    """A pitfall box has a title, a label, the snippet, and what it gives as a glued number."""
    boxes = [box for box in page.all("directive", "admonition") if is_pitfall(box)]
    if not any(box in boxes for box in walk(_section(page, "Pitfalls"))):
        yield "'Pitfalls' holds no pitfall box"
    for box in boxes:
        inside = list(walk(box.children))
        if not re.match(r"Pitfall: \S", box.text) or box.options.get("class") != "pitfall":
            yield f"{box.text!r} must read 'Pitfall: …' and have ':class: pitfall'"
        if not box.options.get("name", "").startswith("pitfall-"):
            yield f"{box.text!r} needs ':name: pitfall-…', by which the appendix links to it"
        if not any(i.kind == "code" and i.name for i in inside):
            yield f"{box.text!r} shows no snippet (a fenced block with its language)"
        if not any(i.kind == "role" and i.name == "glue:text" for i in inside):
            yield f"{box.text!r} gives no evidence: glue what the snippet computes"


def exercises_are_solved(page: Page) -> Iterator[str]:
    """Each exercise is followed by its solution, and the solution by code that was run."""
    items = _section(page, "Exercises")
    exercises = [i for i in items if i.kind == "directive" and i.name == "exercise"]
    if len(exercises) < EXERCISES:
        yield f"it has {len(exercises)} exercises; a chapter has at least {EXERCISES}"
    if len(exercises) != len(list(page.all("directive", "exercise", "exercise-start"))):
        yield "an exercise stands outside the section 'Exercises', within a box, or is gated"
    starts = [items.index(exercise) for exercise in exercises] + [len(items)]
    for start, end in pairwise(starts):
        label = items[start].options.get("label", "")
        rest = items[start + 1 : end]
        solution = next((i for i in rest if i.kind == "directive" and i.name == "solution"), None)
        if not label.startswith("ex-"):
            yield f"the exercise {items[start].text!r} needs a label 'ex-…'"
        elif solution is None or solution.text != label:
            yield f"the exercise {label} is not followed by its solution"
        elif not any(i.kind == "cell" for i in rest[rest.index(solution) :]):
            yield f"the solution of {label} is not followed by code"


def theorems_name_their_tests(page: Page) -> Iterator[str]:
    """A theorem box names the test that checks it, `tests/test_x.py::test_y`, and it exists."""
    for box in page.all("directive", *THEOREMS):
        inside = (i.text for i in walk(box.children) if i.kind == "code")
        tests = [text for text in inside if re.fullmatch(r"tests/[\w/]+\.py(::\w+)+", text)]
        if not box.options.get("label"):
            yield f"the {box.name} {box.text!r} has no label"
        if not tests:
            yield f"the {box.name} {box.text!r} names no test (`tests/test_x.py::test_y`)"
        for test in tests:
            if not test_exists(page.root, test):
                yield f"the {box.name} {box.text!r} names {test}, which does not exist"


def test_exists(root: Path, test: str) -> bool:
    """Whether `tests/test_x.py::test_y` or `…::TestClass::test_y` is in the source."""
    file, *names = test.split("::")
    if not (root / file).is_file() or not names[-1].startswith("test_"):
        return False
    body = _statements((root / file).resolve())
    for name in names:
        found = [node for node in body if getattr(node, "name", None) == name]
        if not found:
            return False
        body = found[0].body
    return True


test_exists.__test__ = False  # not a test itself, whatever its name


@cache
def _statements(path: Path) -> list[Any]:
    return ast.parse(path.read_text()).body


# ---------------------------------------------------------------- links, citations, words


def links_lead_somewhere(page: Page) -> Iterator[str]:
    """A relative link is to a file of the repository (the suffix of a page may be left out)."""
    for link in page.all("link"):
        target = link.text.partition("#")[0]
        if not target or re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        files = (page.path.parent / (target + suffix) for suffix in ("", ".md", ".ipynb"))
        if not any(file.is_file() for file in files):
            yield f"the link to {link.text} leads nowhere"


def citations_are_in_the_bibliography(page: Page) -> Iterator[str]:
    """Every key cited is in book/references.bib."""
    for key in sorted(_cited(page) - bibliography(page.root)):
        yield f"{key!r} is cited, but is not in book/references.bib"


def bibliography(root: Path) -> set[str]:
    """The keys of book/references.bib."""
    return set(re.findall(r"^@\w+\{([^,\s]+),", (root / "book/references.bib").read_text(), re.M))


def formulas_are_whole(page: Page) -> Iterator[str]:
    """A line that begins like a list ends the paragraph, and with it the formula that it is in."""
    for text in _prose(page):
        if "$" in text:
            yield f"a dollar sign is left in the text, of a formula torn apart: {text[-60:]!r}"


def words_are_fit_to_print(page: Page) -> Iterator[str]:
    """Nothing that holds on one machine alone, nothing left unfinished, in text, code or output."""
    texts = [item.text for item in walk(page.items)] + list(_prose(page))
    for _, output in _outputs(page):
        data = output.get("data", {}).items()
        texts += [output.get("text", ""), *(str(x) for kind, x in data if "text/" in kind)]
    for what, pattern in WORDING.items():
        for found in sorted({m[0] for text in texts for m in re.finditer(pattern, text)}):
            yield f"{what}: {found!r}"


# ---------------------------------------------------------------- the book as a whole


def everything_is_in_the_table_of_contents(pages: list[Page]) -> Iterator[str]:
    """A page that the table of contents does not name is not built, nor found by a reader."""
    patterns = [pattern for page in pages[:1] for pattern in toc_names(page.root)]
    for page in pages:
        name = page.name.rpartition(".")[0]
        if not any(fnmatch(name, pattern) for pattern in patterns):
            yield f"{page.name} is not in _toc.yml"


def every_reference_is_cited(pages: list[Page]) -> Iterator[str]:
    """The bibliography lists what the book uses."""
    cited = set().union(*map(_cited, pages))
    for key in sorted(set().union(*(bibliography(page.root) for page in pages[:1])) - cited):
        yield f"{key!r} is in book/references.bib, but is cited nowhere"


def chapters_are_quick_on_average(pages: list[Page]) -> Iterator[str]:
    """A complete test run executes every notebook, so their mean time is held to a limit, too."""
    notebooks = [page.notebook for page in pages if page.notebook]
    seconds = [n.metadata.get("companion", {}).get("seconds") or 0.0 for n in notebooks]
    mean = sum(seconds) / max(1, len(seconds))
    if mean > SECONDS_ON_AVERAGE:
        yield f"chapters run for {mean:.1f} s on average; they have {SECONDS_ON_AVERAGE} s"


PAGE_CHECKS = (
    numbers_in_prose_are_glued,
    glue_matches_the_prose,
    figures_are_described,
    links_lead_somewhere,
    citations_are_in_the_bibliography,
    theorems_name_their_tests,
    formulas_are_whole,
    words_are_fit_to_print,
)
CHAPTER_CHECKS = (
    *PAGE_CHECKS,
    every_cell_was_run_in_order,
    no_cell_fails_or_warns,
    outputs_are_compared,
    code_and_outputs_belong_together,
    sections_stand_in_order,
    pitfalls_show_evidence,
    exercises_are_solved,
)
BOOK_CHECKS = (
    allowed_numbers_are_needed,
    everything_is_in_the_table_of_contents,
    every_reference_is_cited,
    chapters_are_quick_on_average,
)


# ---------------------------------------------------------------- helpers


def _outputs(page: Page) -> Iterator[tuple[Any, Any]]:
    return ((cell, output) for cell in page.code_cells for output in cell.outputs)


def _first_line(cell: Any) -> str:
    return f"the cell {next(iter(cell.source.splitlines()), '')!r}"


def _prose(page: Page) -> Iterator[str]:
    """All text that a reader takes for text: paragraphs, titles, descriptions and captions."""
    yield from (item.text for item in page.all("prose"))
    yield from (image.text for image in page.all("image"))
    yield from (item.options.get("alt", "") for item in page.all("directive"))
    for cell in page.code_cells:
        mystnb = cell.metadata.get("mystnb", {})
        yield " ".join(mystnb.get("image", {}).get("alt", "").split())
        caption = mystnb.get("figure", {}).get("caption", "")
        yield from (item.text for item in parse(caption) if item.kind == "prose")


def _glued(page: Page) -> list[str]:
    metadata = (output.get("metadata", {}) for _, output in _outputs(page))
    return [entry["scrapbook"]["name"] for entry in metadata if "scrapbook" in entry]


@cache
def _glued_at(path: Path) -> list[str]:
    return _glued(load(path)) if path.suffix == ".ipynb" and path.is_file() else []


def _glue_reference(text: str) -> tuple[str, str]:
    """Page (empty: this one) and name of a `{glue:text}`; another page's needs the format `:s`."""
    target, _, name = text.rpartition("::")
    return target, name.removesuffix(":s") if target else name


@cache
def _borrowed(root: Path) -> dict[Path, set[str]]:
    """For each page the names glued there that other pages use, as `path::name:s`."""
    names: dict[Path, set[str]] = defaultdict(set)
    for other in (load(p, root) for suffix in (".ipynb", ".md") for p in page_paths(suffix, root)):
        for role in other.all("role", "glue:text"):
            target, name = _glue_reference(role.text)
            if target:
                names[(other.path.parent / target).resolve()].add(name)
    return names


def _cited(page: Page) -> set[str]:
    roles = (role for role in page.all("role") if role.name.partition(":")[0] == "cite")
    return {key.strip() for role in roles for key in role.text.split(",")}


def _sections(page: Page) -> list[tuple[str, list[Item]]]:
    """The second-level sections, and first what stands before them."""
    sections: list[tuple[str, list[Item]]] = [("", [])]
    for item in page.items:
        if item.kind == "heading" and item.name == "2":
            # Where the book has no code of its own, the library that one would use takes its place.
            title = re.sub("^With PyTorch", "With the companion", item.text)
            sections.append((title, []))
        else:
            sections[-1][1].append(item)
    return sections


def _section(page: Page, fixed: str) -> list[Item]:
    return next((items for title, items in _sections(page) if title.startswith(fixed)), [])


def _is_figure(item: Item) -> bool:
    outputs = item.cell.outputs if item.kind == "cell" else []
    drawn = any(kind.startswith("image/") for output in outputs for kind in output.get("data", {}))
    return drawn or item.kind == "image" or item.name in ("figure", "image")
