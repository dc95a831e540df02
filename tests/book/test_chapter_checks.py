"""Each check finds the defect that it is for, planted in a chapter that is sound otherwise."""

from pathlib import Path

import chapter_checks as checks
import nbformat
import pytest
from nbformat import v4

from tools.execute import fingerprints
from tools.markup import Page, from_notebook, load

GLUE = "application/papermill.record/"
ALT = "A straight line that falls from left to right, as it should."


def glued(name, text):
    """The output of `glue`."""
    scrapbook = {"scrapbook": {"name": name, "mime_prefix": GLUE}}
    return v4.new_output("display_data", data={GLUE + "text/plain": repr(text)}, metadata=scrapbook)


def picture(kind="image/png"):
    """The output of a figure."""
    return v4.new_output("display_data", data={kind: "AAAA", "text/plain": "<Figure>"})


def printed(text, name="stdout"):
    """What a cell prints."""
    return v4.new_output("stream", name=name, text=text)


def exercise(number):
    """An exercise, its solution and the code of that."""
    text = f":::{{exercise}} The next one\n:label: ex-{number}\nHow many?\n:::\n\n"
    text += f":::{{solution}} ex-{number}\nAs many as before.\n:::"
    return v4.new_markdown_cell(text), v4.new_code_cell("print(1)", outputs=[printed("1\n")])


def sound_notebook():
    """A chapter in which nothing is wrong."""
    described = {"mystnb": {"image": {"alt": ALT}, "figure": {"caption": "It falls."}}}
    cells = [
        """# The title

:::{admonition} What you will be able to do
:class: objectives
- **Say** how large it is.
- **Draw** it.
:::""",
        "## The question\n\nHow large is it? Python 3.11.7 says, as does `0.5`, or $0.5$.",
        v4.new_code_cell("plt.show()", metadata=described, outputs=[picture()]),
        "## It cannot be guessed",
        """## The idea

:::{prf:theorem} It is large
:label: thm-large
See {cite:t}`neal2001annealed`. Checked by `tests/test_it.py::test_it_is_large`.
:::""",
        "## From scratch: one line",
        v4.new_code_cell("print(1 + 1)", outputs=[printed("2\n")]),
        "## With the companion\n\nIt is {glue:text}`size` ± {glue:text}`size-se`.",
        v4.new_code_cell(
            "glue('size', 0.5, 0.1)", outputs=[glued("size", "0.50"), glued("size-se", "0.10")]
        ),
        "## Checked against the exact answer\n\n[The page](page) has it.",
        v4.new_code_cell("assert abs(size - 0.5) < 0.45"),
        """## Pitfalls

:::{admonition} Pitfall: the size of one
:class: pitfall
:name: pitfall-size-of-one
```python
size = 1
```
This is {glue:text}`one`.
:::""",
        v4.new_code_cell("glue('one', 1)", outputs=[glued("one", "1")]),
        "## When to use what\n\n| You have | Use |\n|---|---|\n| one | it |",
        "## Exercises",
        *exercise(1),
        *exercise(2),
        *exercise(3),
        "## Further reading\n\n- {cite:t}`neal2001annealed`",
    ]
    made = [v4.new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    notebook = v4.new_notebook(cells=made)
    for count, cell in enumerate(code_cells(notebook), start=1):
        cell.execution_count = count
    notebook.metadata.companion = {"seconds": 12.3, **fingerprints(notebook)}
    return notebook


def code_cells(notebook):
    """The code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def root(tmp_path):
    """A small repository around the chapter."""
    files = {
        "_toc.yml": "format: jb-book\nroot: book/page\nchapters:\n  - file: book/chapter\n",
        "book/page.md": "# A page\n",
        "book/references.bib": "@article{neal2001annealed,\n  year = {2001}\n}\n",
        "tests/test_it.py": "def test_it_is_large():\n    pass\n\n\nclass TestIt:\n"
        "    def test_within(self):\n        pass\n\n\ndef helper():\n    pass\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def page_of(notebook, root: Path) -> Page:
    """The notebook as the chapter of that repository."""
    return from_notebook(root / "book" / "chapter.ipynb", notebook, root)


# ---------------------------------------------------------------- defects


def text(old, new):
    """Replace what stands once in the chapter's text or code."""

    def plant(notebook):
        found = [cell for cell in notebook.cells if old in cell.source]
        assert len(found) == 1, f"{old!r} stands in {len(found)} cells"
        found[0].source = found[0].source.replace(old, new)

    return plant


def output(place, *outputs):
    """Replace the outputs of a code cell."""

    def plant(notebook):
        code_cells(notebook)[place].outputs = list(outputs)

    return plant


def metadata(place, **entries):
    """Set metadata of a code cell."""

    def plant(notebook):
        code_cells(notebook)[place].metadata.update(entries)

    return plant


def stored(**entries):
    """Set what is recorded of the run."""

    def plant(notebook):
        notebook.metadata.companion.update(entries)

    return plant


def drop(start):
    """Leave out the cell that starts so."""

    def plant(notebook):
        notebook.cells.remove(next(c for c in notebook.cells if c.source.startswith(start)))

    return plant


def swap(one, other):
    """Exchange the cells that start so."""

    def plant(notebook):
        starts = [cell.source for cell in notebook.cells]
        a, b = (next(i for i, s in enumerate(starts) if s.startswith(x)) for x in (one, other))
        notebook.cells[a], notebook.cells[b] = notebook.cells[b], notebook.cells[a]

    return plant


def typed(sentence):
    """Put a sentence where prose stands."""
    return text("## It cannot be guessed", f"## It cannot be guessed\n\n{sentence}")


def count(place, value):
    """Set an execution count."""

    def plant(notebook):
        code_cells(notebook)[place].execution_count = value

    return plant


ERROR = v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
DEFECTS = {
    checks.every_cell_was_run_in_order: [
        (count(1, None), "not run once each"),
        (count(1, 7), "not run once each"),
        (lambda notebook: notebook.cells.__setitem__(slice(1, None), []), "no code cell"),
    ],
    checks.no_cell_fails_or_warns: [
        (output(1, ERROR), "ends in ValueError: no"),
        (output(1, printed("careful", "stderr")), "writes to stderr"),
    ],
    checks.outputs_are_compared: [
        (text("print(1 + 1)", "# NBVAL_IGNORE_OUTPUT\nprint(1 + 1)"), "in a comment"),
        (text("print(1 + 1)", "print(1 + 1); # one\nprint(2);"), "ends in ';'"),
        (metadata(1, tags=["nbval-skip"]), "has the tag nbval-skip"),
        (metadata(1, tags=["raises-exception"]), "has the tag raises-exception"),
        (metadata(1, tags=["nbval-ignore-output"]), "neither the tag versions nor timings"),
        (metadata(2, tags=["nbval-ignore-output", "timings"]), "but glues a number"),
    ],
    checks.code_and_outputs_belong_together: [
        (text("print(1 + 1)", "print(2)"), "edited after it was run"),
        (stored(code_sha256="0"), "edited after it was run"),
        (stored(seconds=None), "not recorded"),
        (stored(seconds=60.1), "ran for 60.1 s"),
        (stored(seconds=0), "ran for 0 s"),
        (lambda notebook: notebook.metadata.pop("companion"), "not recorded"),
    ],
    checks.figures_are_described: [
        (metadata(0, mystnb={}), "describes no figure"),
        (metadata(0, mystnb={"image": {"alt": "A falling line"}}), "describes no figure"),
        (output(0, picture("image/svg+xml")), "draws an SVG"),
        (output(0, picture(), picture("image/jpeg")), "draws 2 images"),
        (typed("![A line](line.png)"), "the image line.png has no description"),
        (typed("```{figure} line.png\nIt falls.\n```"), "the figure line.png has no description"),
    ],
    checks.numbers_in_prose_are_glued: [
        (typed("It is 0.95 large."), "'0.95' is typed"),
        (typed("It is −.95, or 1,234.5 in all."), "'.95' is typed"),
        (typed("It is **12.5** large."), "'12.5' is typed"),
        (typed("In 95 % of runs."), "'95 %' is typed"),
        (typed("In 95% of runs."), "'95%' is typed"),
        (typed("In 5 per cent of runs."), "'5 per cent' is typed"),
        (typed("An error of 1e-5."), "'1e-5' is typed"),
        (typed("An error of 3 × 10⁻⁵."), "'3 × 10⁻⁵' is typed"),
        (typed("It is 1.3x as large."), "'1.3' is typed"),
        (typed("- It is `so`: 0.95\n"), "'0.95' is typed"),
        (typed("| a | b |\n|---|---|\n| 1 | 0.95 |"), "'0.95' is typed"),
        (typed("[It is 0.95](page)"), "'0.95' is typed"),
        (typed("<b>0.95</b>"), "'0.95' is typed"),
        (typed(":::{note}\n:class: tip\nIt is 0.95.\n:::"), "'0.95' is typed"),
        (typed("````{tip} A title\n:::{note}\nIt is 0.95.\n:::\n````"), "'0.95' is typed"),
        (text("The next one\n:label: ex-1", "At 0.95\n:label: ex-1"), "'0.95' is typed"),
        (text("Pitfall: the size of one", "Pitfall: 0.95"), "'0.95' is typed"),
        (text("## The idea", "## The idea of 0.95"), "'0.95' is typed"),
        (metadata(0, mystnb={"image": {"alt": ALT + " It ends at 0.95."}}), "'0.95' is typed"),
        (metadata(0, mystnb={"figure": {"caption": "It ends at 0.95."}}), "'0.95' is typed"),
        (typed("![A line that ends at 0.95](line.png)"), "'0.95' is typed"),
    ],
    checks.glue_matches_the_prose: [
        (text("`size` ±", "`sise` ±"), "`sise` names nothing"),
        (text("{glue:text}`size` ±", "{glue}`size` ±"), "shows quotes"),
        (text("{glue:text}`size` ±", "{glue:text}`size:.2f` ±"), "names nothing"),
        (text("{glue:text}`size` ±", "{glue:text}`page.md::size` ±"), "names nothing"),
        (text("This is {glue:text}`one`", "This is it"), "'one' is glued and never used"),
        (text("It is {glue:text}`size` ± {glue:text}`size-se`.", ""), "'size' is glued and never"),
        (output(4, glued("one", "1"), glued("one", "1")), "glued more than once"),
        (text("glue('one', 1)", "from myst_nb import glue\nglue('one', 1)"), "on its own"),
    ],
    checks.sections_stand_in_order: [
        (text("# The title", "The title"), "one title"),
        (text("# The title", "# The title\n\n# Another"), "one title"),
        (text("What you will be able to do", "Goals"), "must open with an admonition"),
        (text(":class: objectives", ":class: tip"), "must open with an admonition"),
        (text("- **Draw** it.\n", ""), "fewer than two objectives"),
        (text("## From scratch", "## By hand"), "one section '## From scratch', not 0"),
        (text("## The idea", "## From scratch"), "one section '## From scratch', not 2"),
        (text("## Pitfalls", "### Pitfalls"), "one section '## Pitfalls', not 0"),
        (swap("## From scratch", "## With the companion"), "not in the order"),
        (text("- {cite:t}`neal2001annealed`", "## Notes"), "last section must be"),
        (text("## It cannot be guessed", "It cannot be guessed"), "three sections come before"),
        (drop("plt.show()"), "has no picture"),
        (drop("print(1 + 1)"), "'From scratch' has no code"),
        (drop("glue('size'"), "'With the companion' has no code"),
        (drop("assert abs"), "'Checked against the exact answer' has no code"),
        (text("| You have | Use |\n|---|---|\n| one | it |", "Use it."), "has no table"),
        (text("- {cite:t}`neal2001annealed`", "None."), "cites nothing"),
    ],
    checks.pitfalls_show_evidence: [
        (text("{admonition} Pitfall: the", "{note} The"), "holds no pitfall box"),
        (text("Pitfall: the size of one", "The size of one"), "must read 'Pitfall: …'"),
        (text(":class: pitfall", ":class: warning"), "must read 'Pitfall: …'"),
        (text(":name: pitfall-size-of-one\n", ""), "needs ':name: pitfall-…'"),
        (text("```python\nsize = 1\n```", "The size is one."), "shows no snippet"),
        (text("This is {glue:text}`one`", "This is it"), "gives no evidence"),
    ],
    checks.exercises_are_solved: [
        (drop(":::{exercise} The next one\n:label: ex-2"), "it has 2 exercises"),
        (text("{solution} ex-2", "{solution} ex-3"), "ex-2 is not followed by its solution"),
        (text("{solution} ex-2", "{note}"), "ex-2 is not followed by its solution"),
        (text(":label: ex-2", ":label: second"), "needs a label"),
        (text("{exercise} The next one\n:label: ex-2", "{exercise-start}\n:label: ex-2"), "gated"),
        (typed(":::{exercise}\n:label: ex-4\nHow?\n:::"), "outside the section"),
        (lambda notebook: notebook.cells.pop(-2), "solution of ex-3 is not followed by code"),
    ],
    checks.theorems_name_their_tests: [
        (text("Checked by `tests/test_it.py::test_it_is_large`.", ""), "names no test"),
        (text("::test_it_is_large", "::test_it_is_small"), "which does not exist"),
        (text("::test_it_is_large", "::helper"), "which does not exist"),
        (text("tests/test_it.py::", "tests/test_that.py::"), "which does not exist"),
        (text(":label: thm-large\n", ""), "has no label"),
        (typed(":::{prf:lemma}\n:label: lem\nSmall.\n:::"), "the prf:lemma '' names no test"),
    ],
    checks.links_lead_somewhere: [
        (text("(page)", "(pages)"), "the link to pages leads nowhere"),
        (text("(page)", "(page.rst#title)"), "the link to page.rst#title leads nowhere"),
    ],
    checks.citations_are_in_the_bibliography: [
        (typed("See {cite}`neal2001annealed, other1999`."), "'other1999' is cited, but"),
        (typed("See {cite:p}`other1999`."), "'other1999' is cited, but"),
    ],
    checks.formulas_are_whole: [
        (typed("The factor is $n(n\n- 1)$ there."), "torn apart: 'The factor is $n(n'"),
    ],
    checks.words_are_fit_to_print: [
        (typed("It is in /home/me/book."), "one machine: '/home/me/book.'"),
        (typed("It is in C:\\Users\\me."), "one machine: 'C:"),
        (output(1, printed("<X at 0x7f3a2b4c>\n")), "address: 'at 0x7f3a2b4c'"),
        (output(2, glued("size", "<X at 0x7f3a2b4c>")), "address: 'at 0x7f3a2b4c'"),
        (text("print(1 + 1)", "print(1 + 1)  # TODO: more"), "unfinished work: 'TODO'"),
        (typed("FIXME"), "unfinished work: 'FIXME'"),
    ],
}
CASES = [(check, plant, found) for check, cases in DEFECTS.items() for plant, found in cases]


def test_the_sound_chapter_passes_every_check(root):
    page = page_of(sound_notebook(), root)
    assert {check.__name__: list(check(page)) for check in checks.CHAPTER_CHECKS} == {
        check.__name__: [] for check in checks.CHAPTER_CHECKS
    }


@pytest.mark.parametrize(("check", "plant", "found"), CASES)
def test_a_planted_defect_is_found(root, check, plant, found):
    notebook = sound_notebook()
    plant(notebook)
    problems = list(check(page_of(notebook, root)))
    assert any(found in problem for problem in problems), problems


def test_every_check_has_a_defect_to_find():
    assert set(DEFECTS) == set(checks.CHAPTER_CHECKS)


# ---------------------------------------------------------------- what is let through


@pytest.mark.parametrize(
    "sentence",
    [
        "It takes 60 s, since 1998, for 1,797 digits.",
        "Version 1.0.4, or 3.11.7.",
        "`0.95`, $0.95$ and\n\n```python\nx = 0.95\n```\n\n$$x = 0.95$$",
        "A grid of 2 × 10 points. The last of 10. The next.",
        "{ref}`0.95 <thm-large>` and [a page](page.md#a-0.95)",
        ":::{figure} line.png\n:alt: " + ALT + "\n:width: 0.5\nIt falls.\n:::",
        "```{math}\n:label: eq\nx = 0.95\n```",
        "% It was 0.95 before.",
        "### A section of one's own\n\n## Another",
    ],
)
def test_harmless_text_passes_every_check(root, sentence):
    notebook = sound_notebook()
    typed(sentence)(notebook)
    page = page_of(notebook, root)
    assert [problem for check in checks.CHAPTER_CHECKS for problem in check(page)] == []


def test_the_letters_of_a_picture_are_no_words(root):
    notebook = sound_notebook()
    drawn = picture()
    drawn.data["image/png"] = "TODO"
    output(0, drawn)(notebook)
    assert list(checks.words_are_fit_to_print(page_of(notebook, root))) == []


def test_a_timing_need_not_be_compared(root):
    notebook = sound_notebook()
    metadata(1, tags=["nbval-ignore-output", "timings"])(notebook)
    assert list(checks.outputs_are_compared(page_of(notebook, root))) == []


def test_a_chapter_without_code_of_the_companion_may_use_pytorch(root):
    notebook = sound_notebook()
    text("## With the companion", "## With PyTorch")(notebook)
    assert list(checks.sections_stand_in_order(page_of(notebook, root))) == []


def test_a_theorem_may_name_a_test_of_a_class(root):
    assert checks.test_exists(root, "tests/test_it.py::TestIt::test_within")
    assert not checks.test_exists(root, "tests/test_it.py::TestIt::test_without")


def test_a_page_may_use_what_a_chapter_glues(root):
    notebook = sound_notebook()
    text("This is {glue:text}`one`.", "This is {glue:text}`size`.")(notebook)
    nbformat.write(notebook, root / "book/chapter.ipynb")
    chapter = load(root / "book/chapter.ipynb", root)
    (root / "book/page.md").write_text("It is {glue:text}`chapter.ipynb::one:s`.")
    page = load(root / "book/page.md", root)
    assert list(checks.glue_matches_the_prose(page)) == []
    assert list(checks.glue_matches_the_prose(chapter)) == []
    (root / "book/page.md").write_text("It is {glue:text}`chapter.ipynb::two:s`.")
    page = load(root / "book/page.md", root)
    assert any("names nothing" in problem for problem in checks.glue_matches_the_prose(page))


# ---------------------------------------------------------------- the book as a whole


@pytest.fixture
def book(root):
    """The chapter and the page of the small repository."""
    return [page_of(sound_notebook(), root), load(root / "book/page.md", root)]


@pytest.fixture
def allow(monkeypatch):
    """`allow(text, ...)`: the list of numbers that may be typed."""

    def set_to(*entries):
        keys = ("text", "where", "reason")
        allowed = [dict(zip(keys, entry, strict=True)) for entry in entries]
        monkeypatch.setattr(checks, "allowed_numbers", lambda: allowed)

    set_to()
    return set_to


def test_the_sound_book_passes_every_check(book, allow):
    assert [problem for check in checks.BOOK_CHECKS for problem in check(book)] == []


def test_a_number_is_allowed_only_in_its_words_and_its_place(root, allow):
    notebook = sound_notebook()
    typed("The 95 % interval.")(notebook)
    page = page_of(notebook, root)
    allow(("95 % interval", "book/*", "a level that we chose"))
    assert list(checks.numbers_in_prose_are_glued(page)) == []
    assert list(checks.allowed_numbers_are_needed([page])) == []
    for entry in [("95 % region", "book/*"), ("95 % interval", "book/other/*")]:
        allow((*entry, "a level that we chose"))
        assert list(checks.numbers_in_prose_are_glued(page)) != []
        assert any("stands nowhere" in x for x in checks.allowed_numbers_are_needed([page]))


@pytest.mark.parametrize(
    ("words", "reason", "found"),
    [
        ("the title", "a reason of its own", "no number or no reason"),
        ("95 % interval", "because", "no number or no reason"),
        ("95 %", "a reason of its own", "add words around it"),
    ],
)
def test_an_allowance_needs_a_number_words_and_a_reason(root, allow, words, reason, found):
    notebook = sound_notebook()
    typed("In the title, a 95 % interval.")(notebook)
    allow((words, "book/*", reason))
    problems = list(checks.allowed_numbers_are_needed([page_of(notebook, root)]))
    assert any(found in problem for problem in problems), problems


def test_a_page_that_the_table_of_contents_leaves_out_is_found(book, root):
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/page\n")
    assert list(checks.everything_is_in_the_table_of_contents(book)) == [
        "book/chapter.ipynb is not in _toc.yml"
    ]


def test_a_reference_that_nothing_cites_is_found(book, root):
    with (root / "book/references.bib").open("a") as file:
        file.write("\n@book{unread1999,\n  year = {1999}\n}\n")
    assert list(checks.every_reference_is_cited(book)) == [
        "'unread1999' is in book/references.bib, but is cited nowhere"
    ]


def test_chapters_that_are_too_slow_on_average_are_found(book, root):
    pages = book[1:]  # a page without code does not count
    for seconds in (12.0, 28.0, 20.3):
        notebook = sound_notebook()
        stored(seconds=seconds)(notebook)
        pages.append(page_of(notebook, root))
    assert list(checks.chapters_are_quick_on_average(pages[:3])) == []  # 20.0 s, one of them 28
    assert list(checks.chapters_are_quick_on_average(pages)) == [
        "chapters run for 20.1 s on average; they have 20 s"
    ]
