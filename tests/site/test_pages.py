"""Every page of the built site works in a real browser: desk and phone, light and dark."""

import checks
import pytest
from conftest import SITE
from playwright.sync_api import Page

PAGES = sorted(
    name
    for path in SITE.rglob("*.html")
    if not (name := path.relative_to(SITE).as_posix()).startswith("_static")
    and name != "index.html"  # leads to the first page
)
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1400, "height": 900}


def test_the_front_door_leads_to_this_book(page: Page, site: str) -> None:
    page.goto(site)
    page.wait_for_url(site + "book/intro.html")
    assert "Sampling the Intractable" in page.title()
    assert "Sampling the Intractable" in page.locator("article h1").inner_text()


@pytest.mark.parametrize("name", PAGES)
def test_page(tab: Page, site: str, name: str) -> None:
    tab.set_viewport_size(DESK)  # type: ignore[arg-type]
    complaints: list[str] = []
    with checks.watched(tab, site) as heard:
        tab.goto(site + name)
        checks.settle(tab)
        complaints += heard
    complaints += checks.bad_mathematics(tab)
    complaints += checks.undrawn_images(tab)
    complaints += checks.transparent_figures(tab)
    # Each change of theme restyles the whole page: the phone begins with the desk's last.
    for size, device, themes in (
        (DESK, "desk", ("light", "dark")),
        (PHONE, "phone", ("dark", "light")),
    ):
        tab.set_viewport_size(size)  # type: ignore[arg-type]
        for theme in themes:
            checks.set_theme(tab, theme)
            complaints += [f"{device}, {theme}: {bad}" for bad in checks.low_contrast(tab)]
        complaints += [f"{device}: {bad}" for bad in checks.sideways_scrolling(tab)]
        complaints += [f"{device}: {bad}" for bad in checks.cut_off(tab)]
    assert not complaints, "\n".join(complaints)
