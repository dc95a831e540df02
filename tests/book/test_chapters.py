"""Every chapter and page of the book, held to the checks."""

import pytest
from chapter_checks import (
    BOOK_CHECKS,
    CHAPTER_CHECKS,
    PAGE_CHECKS,
    numbers_in_prose_are_glued,
)

from tools.markup import load, page_paths
from tools.pages import PAGES as GENERATED

CHAPTERS = [load(path) for path in page_paths(".ipynb")]
PAGES = [load(path) for path in page_paths(".md")]


def name(value):
    """How a page or check is called in a test's id."""
    return value.name if hasattr(value, "name") else value.__name__


def report(problems):
    """Fail with all the problems, a line each."""
    problems = list(problems)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("check", CHAPTER_CHECKS, ids=name)
@pytest.mark.parametrize("chapter", CHAPTERS, ids=name)
def test_chapter(chapter, check):
    report(check(chapter))


@pytest.mark.parametrize("check", PAGE_CHECKS, ids=name)
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page(page, check):
    if check is numbers_in_prose_are_glued and page.name in GENERATED:
        return  # its numbers are computed, and compared by tools/pages.py --check
    report(check(page))


@pytest.mark.parametrize("check", BOOK_CHECKS, ids=name)
def test_book(check):
    report(check(CHAPTERS + PAGES))


def test_there_are_chapters_to_check():
    assert CHAPTERS
    assert PAGES
