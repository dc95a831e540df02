"""Each check of the site rejects a page that is broken in its way, and accepts a sound one."""

import base64
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import checks
import pytest
from conftest import serve
from playwright.sync_api import Page

SOUND = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A page</title>
<link rel="icon" href="data:,"><style>body {{color: #222; background: #fff}} {style}</style></head>
<body><article>{body}</article><script>{script}</script></body></html>"""


def png(alpha: int) -> str:
    """The address of a picture of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    header = (1).to_bytes(4, "big") * 2 + bytes([8, 6, 0, 0, 0])
    pixel = zlib.compress(bytes([0, 200, 30, 30, alpha]))
    raw = chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + raw).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages of this module are put."""
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def origin(folder: Path) -> Iterator[str]:
    """The address at which they are served."""
    yield from serve(folder)


def complaints_of(page: Page, origin: str, folder: Path, **parts: str) -> dict[str, list[str]]:
    """What each check says of a page made of these parts."""
    html = SOUND.format(**({"style": "", "body": "<p>Text</p>", "script": ""} | parts))
    name = f"{len(list(folder.iterdir()))}.html"  # a new one each time, for the browser's cache
    (folder / name).write_text(html)
    page.set_viewport_size({"width": 390, "height": 844})
    with checks.watched(page, origin) as heard:
        page.goto(origin + name)
        checks.settle(page)
    said = {"watched": heard}
    for check in (
        checks.bad_mathematics,
        checks.undrawn_images,
        checks.sideways_scrolling,
        checks.cut_off,
        checks.low_contrast,
        checks.transparent_figures,
    ):
        said[check.__name__] = check(page)
    return said


GREY = "<p>Text <span style='{}'>more text</span></p>"


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"body": f"<img alt='red' src='{png(255)}'>"},
        {"body": "<p style='overflow-x: auto'><span style='display: block; width: 900px'>a"},
        {"body": "<p style='overflow-x: auto'><code>" + "a" * 200},
        {"body": GREY.format("color: #767676")},  # 4.54 to 1
        {"body": GREY.format("color: #949494; font-size: 24px")},  # 3.03 to 1, large
        {"body": "<p>Text</p>" + GREY.format("color: #fff; background: #222")},
        {"body": GREY.format("color: #fff; display: none")},
        {"body": "<p>costs <code>$$</code></p>"},
    ],
)
def test_a_sound_page_passes(tab: Page, origin: str, folder: Path, parts: dict[str, str]) -> None:
    assert not any(complaints_of(tab, origin, folder, **parts).values())


@pytest.mark.parametrize(
    ("check", "parts"),
    [
        ("watched", {"script": "console.error('oh')"}),
        ("watched", {"script": "undefined_function()"}),
        ("watched", {"body": "<script src='missing.js'></script>"}),
        ("watched", {"style": "@font-face {font-family: a; src: url('http://localhost:9/a.woff')} "
                              "p {font-family: a}"}),
        ("bad_mathematics", {"body": "<p class='math'>\\(x^2\\)</p>"}),
        ("bad_mathematics", {"body": "<p>$$ \\sum_i x_i $$</p>"}),
        ("bad_mathematics", {"body": "<mjx-container><mjx-merror title='Undefined'>"}),
        ("undrawn_images", {"body": "<img alt='none' src='data:image/png;base64,AAAA'>"}),
        ("undrawn_images", {"body": f"<img src='{png(255)}'>"}),
        ("sideways_scrolling", {"body": "<p style='width: 400px'>wide</p>"}),
        ("sideways_scrolling", {"body": "<p style='width: 400px'>wide</p>",
                                "style": "html {scroll-behavior: smooth}"}),
        ("cut_off", {"body": "<p style='overflow: hidden'><code>" + "a" * 200}),
        ("cut_off", {"body": "<div style='overflow: hidden'><h1>" + "a" * 200}),
        ("low_contrast", {"body": GREY.format("color: #777")}),  # 4.48 to 1
        ("low_contrast", {"body": GREY.format("color: #959595; font-size: 24px")}),  # 2.99 to 1
        ("low_contrast", {"body": GREY.format("opacity: 0.4")}),
        ("low_contrast", {"body": GREY.format("background: #333")}),
        ("low_contrast", {"body": GREY.format("color: rgb(0 0 0 / 30%)")}),
        ("low_contrast", {"body": "<pre><span class='n'>x</span> <span class='p'>y</span></pre>",
                          "style": "body span.p {color: #ccc}"}),
        ("low_contrast", {"body": "<mjx-math style='color: #ccc'>x</mjx-math>"}),
        ("transparent_figures", {"body": f"<img alt='red' src='{png(254)}'>"}),
    ],
)  # fmt: skip
def test_a_broken_page_is_rejected_by_its_check_alone(
    tab: Page, origin: str, folder: Path, check: str, parts: dict[str, str]
) -> None:
    said = complaints_of(tab, origin, folder, **parts)
    assert [name for name, complaints in said.items() if complaints] == [check]


@pytest.mark.parametrize(
    ("style", "shows"),
    [
        ("", True),
        ("a:focus {outline: none}", False),
        ("a:focus {outline: 0 solid red}", False),
        ("a:focus {outline: none; box-shadow: 0 0 3px red}", True),
    ],
)
def test_focus_that_does_not_show_is_found(
    tab: Page, origin: str, folder: Path, style: str, shows: bool
) -> None:
    complaints_of(tab, origin, folder, style=style, body="<a href='#here'>A link</a>")
    assert (checks.invisible_focus(tab, stops=1) == []) == shows


def test_a_page_that_the_keyboard_cannot_enter_is_found(
    tab: Page, origin: str, folder: Path
) -> None:
    complaints_of(tab, origin, folder)
    assert checks.invisible_focus(tab, stops=2) == ["the keyboard reaches nothing"]


@pytest.mark.parametrize(("ci", "status"), [("", 0), ("true", 1)])
def test_without_a_browser_a_sentence_says_so_and_ci_fails(ci: str, status: int) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", "finds_nothing", "test_navigation.py"],
        cwd=Path(__file__).parent,
        env=os.environ | {"PATH": "", "CI": ci},
        capture_output=True,
        text=True,
    )
    assert run.returncode == status
    assert "The browser tests did not run: no Chromium was found." in run.stdout
    assert "apt-get install chromium" in run.stdout
    assert ("1 error" if ci else "1 skipped") in run.stdout.splitlines()[-1]
