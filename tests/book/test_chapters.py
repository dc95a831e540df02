"""Every chapter and page of the book, held to the checks."""

from functools import cache

import pytest
from chapter_checks import (
    BOOK_CHECKS,
    CHAPTER_CHECKS,
    PAGE_CHECKS,
    numbers_in_prose_are_glued,
)

from tools import markup
from tools.markup import page_paths
from tools.pages import PAGES as GENERATED

CHAPTERS = page_paths(".ipynb")
PAGES = page_paths(".md")
load = cache(markup.load)  # only where they are checked: every process collects the tests


def name(value):
    """How a page or check is called in a test's id."""
    return value.__name__ if callable(value) else value.relative_to(markup.ROOT).as_posix()


def report(problems):
    """Fail with all the problems, a line each."""
    problems = list(problems)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("check", CHAPTER_CHECKS, ids=name)
@pytest.mark.parametrize("chapter", CHAPTERS, ids=name)
def test_chapter(chapter, check):
    report(check(load(chapter)))


@pytest.mark.parametrize("check", PAGE_CHECKS, ids=name)
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page(page, check):
    page = load(page)
    if check is numbers_in_prose_are_glued and page.name in GENERATED:
        return  # its numbers are computed, and compared by tools/pages.py --check
    report(check(page))


@pytest.mark.parametrize("check", BOOK_CHECKS, ids=name)
def test_book(check):
    report(check([load(path) for path in CHAPTERS + PAGES]))


def test_there_are_chapters_to_check():
    assert CHAPTERS
    assert PAGES
