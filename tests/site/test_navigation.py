"""A reader finds the way: by the search, by the keyboard, by the links."""

from urllib.parse import urldefrag, urljoin

import checks
from conftest import SITE
from playwright.sync_api import Page


def test_search_finds_a_word_of_a_chapter_and_leads_to_it(page: Page, site: str) -> None:
    page.goto(site + "book/intro.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("coverage")
    page.keyboard.press("Enter")
    result = page.locator("#search-results a[href*='monte-carlo/estimation']").first
    result.wait_for()
    result.click()
    page.wait_for_url("**/monte-carlo/estimation.html*")
    assert "coverage" in page.locator("article").inner_text().lower()


def test_search_for_what_the_book_does_not_hold_finds_nothing(page: Page, site: str) -> None:
    page.goto(site + "search.html?q=xyzzyplugh")
    page.get_by_text("did not match any documents").wait_for()
    assert page.locator("#search-results li").count() == 0


def test_the_keyboard_shows_where_it_is(page: Page, site: str) -> None:
    for name in ("book/intro.html", "book/monte-carlo/estimation.html"):
        page.goto(site + name)
        checks.settle(page)
        for theme in ("light", "dark"):
            checks.set_theme(page, theme)
            assert checks.invisible_focus(page) == [], theme


def test_the_button_switches_to_dark_and_the_next_page_stays_dark(page: Page, site: str) -> None:
    page.goto(site + "book/intro.html")
    theme = page.locator("html")
    for _ in range(3):  # light, dark, or as the system has it
        if theme.get_attribute("data-mode") == "dark":
            break
        page.locator("button.theme-switch-button:visible").click()
    assert theme.get_attribute("data-theme") == "dark"
    page.goto(site + "book/how-to-use.html")
    assert theme.get_attribute("data-theme") == "dark"


def test_every_link_within_the_site_leads_to_a_page_and_a_place_on_it(
    page: Page, site: str
) -> None:
    targets: dict[str, set[str]] = {}
    links: set[tuple[str, str]] = set()
    for path in SITE.rglob("*.html"):
        name = path.relative_to(SITE).as_posix()
        if name.startswith("_static"):
            continue
        found = page.evaluate(
            """text => {
                const tree = new DOMParser().parseFromString(text, 'text/html');
                return {
                    ids: [...tree.querySelectorAll('[id], a[name]')].map(one => one.id || one.name),
                    links: [...tree.querySelectorAll('a[href]')].map(a => a.getAttribute('href')),
                };
            }""",
            path.read_text(),
        )
        targets[site + name] = {"", *found["ids"]}
        links |= {(name, urljoin(site + name, link)) for link in found["links"]}
    bad = []
    for name, link in sorted(links):
        address, place = urldefrag(link)
        if address.startswith(site) and "?" not in address:
            file = SITE / address.removeprefix(site)
            if not file.exists() or (address in targets and place not in targets[address]):
                bad.append(f"{name}: {link.removeprefix(site)}")
    assert bad == []
