"""What is wanted of every page, as functions that look at it in a browser.

Each function takes a Playwright page that has loaded and returns complaints: an empty list is
success. The tests apply them to the pages of the book, and to pages broken on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from playwright.sync_api import Page, Request, Response

Theme = Literal["light", "dark"]


@contextmanager
def watched(page: Page, origin: str) -> Iterator[list[str]]:
    """Collect console errors, uncaught exceptions, and requests that fail or leave `origin`."""
    complaints: list[str] = []

    def on_request(request: Request) -> None:
        if not request.url.startswith((origin, "data:", "blob:")):
            complaints.append(f"a request leaves the site: {request.url}")

    def on_response(response: Response) -> None:
        if response.status >= 400:
            complaints.append(f"{response.status} for {response.url}")

    handlers = {
        "console": lambda m: m.type == "error" and complaints.append(f"console: {m.text}"),
        "pageerror": lambda error: complaints.append(f"exception: {error}"),
        "request": on_request,
        "requestfailed": lambda r: complaints.append(f"failed: {r.url} ({r.failure})"),
        "response": on_response,
    }
    for event, handler in handlers.items():
        page.on(event, handler)  # type: ignore[call-overload]
    try:
        yield complaints
    finally:
        for event, handler in handlers.items():
            page.remove_listener(event, handler)


def settle(page: Page) -> None:
    """Wait until MathJax, if the page has it, has set every formula, and images have loaded."""
    page.evaluate(
        """async () => {
            document.querySelectorAll('img').forEach(image => { image.loading = 'eager'; });
            if (document.querySelector('script[src*="mathjax"]')) {
                while (!window.MathJax?.startup?.promise)
                    await new Promise(done => setTimeout(done, 10));
                await window.MathJax.startup.promise;
            }
            await Promise.all([...document.images].map(image => image.decode().catch(() => null)));
            await document.fonts.ready;
        }"""
    )


def set_theme(page: Page, theme: Theme) -> None:
    """Switch as the reader's button does, at once, and open what the reader can open."""
    page.evaluate(
        """theme => {
            if (!document.getElementById('no-motion')) {
                const still = document.createElement('style');
                still.id = 'no-motion';
                still.textContent = '* {transition: none !important; animation: none !important}';
                document.head.append(still);
            }
            const root = document.documentElement.dataset;
            if (root.theme !== theme) root.theme = theme;  // setting it anew restyles the page
            if (root.mode !== theme) root.mode = theme;
            document.querySelectorAll('details').forEach(one => { one.open = true; });
            document.querySelectorAll('.toggle-hidden').forEach(
                one => one.classList.remove('toggle-hidden'));
        }""",
        theme,
    )


def bad_mathematics(page: Page) -> list[str]:
    """Formulas with an error, and formulas that were never set."""
    return page.evaluate(
        r"""() => {
            const bad = [];
            for (const error of document.querySelectorAll('mjx-merror, .MathJax_Error'))
                bad.push('error in a formula: ' + (error.title || error.textContent));
            for (const formula of document.querySelectorAll('.math'))
                if (!formula.querySelector('mjx-container'))
                    bad.push('formula not set: ' + formula.textContent.trim().slice(0, 80));
            const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walk.nextNode()) {
                const node = walk.currentNode, where = node.parentElement;
                if (where.closest('pre, code, script, style, mjx-container, .math')) continue;
                const raw = node.textContent.match(/\\[()[\]]|\$\$|\\(frac|sum|mathbb|begin)\b/);
                if (raw) bad.push('raw mathematics: ' + node.textContent.trim().slice(0, 80));
            }
            return bad;
        }"""
    )


def undrawn_images(page: Page) -> list[str]:
    """Images without pixels, and images without a text alternative."""
    return page.evaluate(
        """() => [...document.images].flatMap(image => {
            const name = image.src.slice(0, 120), bad = [];
            if (!image.complete || image.naturalWidth === 0) bad.push('not drawn: ' + name);
            if (!image.hasAttribute('alt')) bad.push('no alt text: ' + name);
            return bad;
        })"""
    )


def sideways_scrolling(page: Page) -> list[str]:
    """What sticks out of the window to the right so that the page scrolls sideways."""
    return page.evaluate(
        """() => {
            const width = document.documentElement.clientWidth;
            const scroller = document.scrollingElement;
            const before = scroller.scrollLeft;
            // at once: the theme scrolls smoothly, and nothing would have moved yet
            scroller.scrollTo({left: 1000, behavior: 'instant'});
            const moved = scroller.scrollLeft;
            scroller.scrollTo({left: before, behavior: 'instant'});
            if (moved === 0) return [];
            const wide = [...document.body.querySelectorAll('*')]
                .filter(one => one.getBoundingClientRect().right > width + 1)
                .slice(0, 5)
                .map(one => one.tagName.toLowerCase() + '.' + one.className);
            return [`scrolls ${moved} px sideways; too wide: ${wide.join(', ')}`];
        }"""
    )


def cut_off(page: Page) -> list[str]:
    """Code, formulas and headings that end behind the edge of a box that does not scroll."""
    return page.evaluate(
        """() => {
            const bad = [];
            const kinds = 'code, pre, mjx-container, table, img, h1, h2, h3, h4, h5, h6';
            for (const one of document.querySelectorAll(kinds)) {
                if (!one.checkVisibility({checkVisibilityCSS: true})) continue;
                const words = document.createRange();  // a heading is as wide as the page
                words.selectNodeContents(one);
                const {right, width} = (/^H/.test(one.tagName) ? words : one)
                    .getBoundingClientRect();
                if (width < 2) continue;
                for (let box = one.parentElement; box; box = box.parentElement) {
                    const flow = getComputedStyle(box).overflowX;
                    if (flow === 'auto' || flow === 'scroll') break;
                    const edge = box.getBoundingClientRect().right;
                    if (flow === 'visible' || right <= edge + 1) continue;
                    bad.push(`cut off in ${box.className}: ${one.textContent.slice(0, 60)}`);
                    break;
                }
            }
            return bad;
        }"""
    )


def low_contrast(page: Page) -> list[str]:
    """Text too faint on what lies behind it: under 4.5 to 1, or 3 to 1 where it is large (WCAG)."""
    return page.evaluate(
        r"""() => {
            const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
                .getContext('2d', {willReadFrequently: true});
            const known = new Map();
            const rgba = colour => {
                if (!known.has(colour)) {
                    context.clearRect(0, 0, 1, 1);
                    context.fillStyle = colour;
                    context.fillRect(0, 0, 1, 1);
                    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
                    known.set(colour, [r, g, b, a / 255]);
                }
                return known.get(colour);
            };
            const over = (top, below, opacity = 1) => {
                const a = top[3] * opacity;
                return [0, 1, 2].map(i => a * top[i] + (1 - a) * below[i]).concat(1);
            };
            const luminance = ([r, g, b]) => [r, g, b]
                .map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const styles = new Map();
            const styleOf = one => {
                if (!styles.has(one)) styles.set(one, getComputedStyle(one));
                return styles.get(one);
            };
            // Of an element from its parent's: what many texts have in common is worked out once.
            const remembered = (from, root) => {
                const seen = new Map([[null, root]]);
                const get = one => {
                    if (!seen.has(one)) seen.set(one, from(one, get(one.parentElement)));
                    return seen.get(one);
                };
                return get;
            };
            const behind = remembered((one, below) => {
                const layer = rgba(styleOf(one).backgroundColor);
                return layer[3] > 0 ? over(layer, below) : below;
            }, [255, 255, 255, 1]);
            const opacity = remembered(
                (one, product) => product * parseFloat(styleOf(one).opacity), 1);
            const texts = new Map(), kinds = new Map();
            const unread = new Set(['SCRIPT', 'STYLE', 'NOSCRIPT', 'MJX-ASSISTIVE-MML']);
            const walk = document.createTreeWalker(
                document.body,
                NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT,
                node => unread.has(node.nodeName)
                    ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
            while (walk.nextNode()) {
                if (walk.currentNode.nodeType !== Node.TEXT_NODE) continue;
                const text = walk.currentNode.textContent.trim();
                const one = walk.currentNode.parentElement;
                if (!text || texts.has(one)) continue;
                // Code is thousands of spans: one of each class in a parent stands for the others.
                if (one.tagName === 'SPAN' && one.attributes.length === 1 && one.className
                    && one.closest('pre')) {
                    const parent = one.parentElement;
                    if (!kinds.has(parent)) kinds.set(parent, new Set());
                    if (kinds.get(parent).has(one.className)) continue;
                    kinds.get(parent).add(one.className);
                }
                texts.set(one, text);
            }
            document.querySelectorAll('mjx-math').forEach(one => texts.set(one, 'formula'));
            const bad = new Map();
            for (const [one, text] of texts) {
                const style = styleOf(one);
                if (!one.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
                const box = one.getBoundingClientRect();
                if (box.width < 2 || box.height < 2) continue;  // for screen readers only
                const ground = behind(one);
                const ink = over(rgba(style.color), ground, opacity(one));
                const [low, high] = [luminance(ink), luminance(ground)].sort((a, b) => a - b);
                const ratio = (high + 0.05) / (low + 0.05);
                const size = parseFloat(style.fontSize), bold = parseInt(style.fontWeight) >= 700;
                const wanted = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
                if (ratio < wanted) {
                    const name = one.tagName.toLowerCase() + '.' + one.className;
                    bad.set(name, `${ratio.toFixed(2)} < ${wanted}: "${text.slice(0, 40)}" in ` +
                        `${name} (${one.parentElement?.className}), ${style.color} on ` +
                        `rgb(${ground.slice(0, 3).map(Math.round)})`);
                }
            }
            return [...bad.values()];
        }"""
    )


def transparent_figures(page: Page) -> list[str]:
    """Figures that let the page's colour through: no ink suits the light and the dark page."""
    return page.evaluate(
        """() => [...document.querySelectorAll('article img')].flatMap(image => {
            if (!image.naturalWidth) return [];
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
            for (let i = 3; i < data.length; i += 4)
                if (data[i] < 255) return ['transparent: ' + image.src.slice(0, 120)];
            return [];
        })"""
    )


def invisible_focus(page: Page, stops: int = 12) -> list[str]:
    """Elements that look the same with the keyboard's focus as without it, from the first on."""
    page.evaluate("document.activeElement?.blur(); document.body.focus()")
    bad = []
    reached = 0
    for _ in range(stops):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """async () => {
                const one = document.activeElement;
                if (!one || one === document.body) return null;
                const name = one.tagName.toLowerCase() + '.' + one.className;
                const still = () => Promise.all(
                    document.getAnimations().map(motion => motion.finished.catch(() => null)));
                const drawn = [one, ...one.children].filter(part => {
                    const box = part.getBoundingClientRect();
                    return box.width > 1 && box.height > 1;
                });
                const look = () => drawn.map(part => {
                    const s = getComputedStyle(part);
                    const ring = s.outlineStyle === 'none' || parseFloat(s.outlineWidth) === 0
                        ? 'none' : s.outline;
                    return [ring, s.boxShadow, s.backgroundColor, s.borderColor, s.textDecoration]
                        .join('|');
                }).join('||');
                await still();
                const focused = look();
                one.blur();
                await still();
                const plain = look();
                one.focus({preventScroll: true, focusVisible: true});
                return {name, same: focused === plain};
            }"""
        )
        if found:
            reached += 1
            if found["same"]:
                bad.append(f"focus does not show on {found['name']}")
    return bad if reached else ["the keyboard reaches nothing"]
