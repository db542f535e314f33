"""What a reader's browser does with every page: light and dark, on a desk and on a telephone.

Each gate is a function that takes an open page to a list of problems. It is applied to every page
of the book, and to a page that was spoilt on purpose, where it must find one.
"""

from __future__ import annotations

import functools
import gzip
import http.server
import importlib.util
import itertools
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from fontTools.ttLib import TTFont
from words import alt_problem, glued

from bnlib.book import colors

LARGEST = 250 * 1024  # bytes, compressed, that a page may load before it is touched
LINE = 74  # signs of code that a desk shows without scrolling
MOST = 2_700  # elements that a browser must lay out before a page is there
LONGEST = ("book", "layer", "backward.html")
FAR = 'section > [style^="--lines"]'  # what far_blocks.py puts off
WIDTHS = (1280, 375)
MODES = list(itertools.product(("light", "dark"), WIDTHS))

# axe looks at every node, and a chapter has tens of thousands of coloured words in code and boxes
# in formulas. Of each kind, one in each sort of place is enough: the others become plain text.
THIN = """() => {
  const seen = new Set();
  const place = (e) => e.closest(".highlight, .admonition, table, figure")?.className;
  for (const span of document.querySelectorAll(".highlight pre span[class]")) {
    const kind = span.className + "|" + place(span);
    if (seen.has(kind)) span.replaceWith(...span.childNodes);
    seen.add(kind);
  }
  for (const formula of document.querySelectorAll(".katex")) {
    const kind = "katex|" + place(formula);
    if (seen.has(kind)) formula.replaceChildren("x");
    seen.add(kind);
  }
}"""

# Nothing is moved by it: a formula becomes a box of its size, code keeps its letters.
HOLLOW = """() => {
  const formulas = [...document.querySelectorAll(".katex")].filter((e) => e.checkVisibility());
  const sizes = formulas.map((e) => e.getBoundingClientRect());
  formulas.forEach((e, i) => {
    e.replaceChildren();
    const { width, height } = sizes[i];
    e.style.cssText = `display: inline-block; width: ${width}px; height: ${height}px`;
  });
  for (const span of document.querySelectorAll(".highlight pre span[class]")) {
    span.replaceWith(...span.childNodes);
  }
}"""

# What decides whether text has contrast: its own colour and font, and all that is painted behind.
LOOKS = """() => {
  const looks = (window.looks ??= new Map()), known = new Map();
  const look = (e) => {
    if (!e) return ["", ""];
    if (!known.has(e)) {
      const [above, inherited] = look(e.parentElement), s = getComputedStyle(e);
      const own = [s.color, s.fontSize, s.fontWeight, s.textShadow].join();
      const painted = [s.backgroundColor, s.backgroundImage, s.opacity, s.textDecorationLine];
      const plain = own === inherited && painted.join() === "rgba(0, 0, 0, 0),none,1,none";
      known.set(e, [plain ? above : `${above}/${own},${painted}`, own]);
    }
    return known.get(e);
  };
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("");
    if (text.trim().length < 2) continue; // axe does not judge one letter
    if (!looks.has(e)) looks.set(e, []);
    looks.get(e).push(e.checkVisibility() ? look(e)[0] : "hidden");
  }
}"""
# Of the texts that look alike in every mode, on this page or on one before it, three are left, with
# what is around them. The others are not taken out: that would change which row of a table is even.
ALIKE = """(times) => {
  const kept = new Set(document.querySelectorAll("input, select, textarea"));
  const short = (text) => [...text].reduce((h, c) => (h * 31 + c.codePointAt(0)) % 2 ** 47, 7);
  for (const [e, seen] of looks) {
    const all = short(seen.join("|"));
    times[all] = 1 + (times[all] ?? 0);
    if (times[all] < 4) kept.add(e);
  }
  for (const e of [...kept]) {
    for (let above = e.parentElement; above; above = above.parentElement) kept.add(above);
  }
  for (const e of document.querySelectorAll("body *")) {
    if (kept.has(e) || e.localName === "style") continue;
    e.style.setProperty("display", "none", "important");
    e.replaceChildren();
  }
  return times;
}"""


class Visit:
    """One page, opened in one theme at one width, with what it asked for and what it said."""

    def __init__(self, browser, url, theme="light", width=1280):
        self.context = browser.new_context(
            color_scheme=theme, viewport={"width": width, "height": 800}
        )
        self.theme, self.width, self.requests, self.console = theme, width, [], []
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("console", self._heard)
        self.page.goto(url, wait_until="load")
        self.page.wait_for_timeout(100)

    def show(self, theme, width):
        """Change the colours and the width under the open page, as a reader does."""
        self.theme, self.width = theme, width
        self.page.emulate_media(color_scheme=theme)
        self.page.set_viewport_size({"width": width, "height": 800})
        self.page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
        self.page.evaluate(
            "document.getAnimations().forEach((a) => a instanceof CSSTransition && a.finish())"
        )

    def _heard(self, message):
        if message.type in ("error", "warning"):
            self.console.append(message.text)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


# --- The gates ------------------------------------------------------------------------------------


def other_hosts(visit):
    return [url for url in visit.requests if urlsplit(url).scheme not in ("file", "data", "blob")]


def errors(visit):
    return list(visit.console)


def too_heavy(visit):
    total = sum(
        len(gzip.compress(path.read_bytes(), 6))
        for url in set(visit.requests)
        if urlsplit(url).scheme == "file" and (path := Path(unquote(urlsplit(url).path))).is_file()
    )
    return [f"{total / 1024:.0f} KB are loaded"] if total > LARGEST else []


def too_much_at_once(visit):
    """What is far down and large must wait: `far_blocks.py` and the style sheet see to that."""
    now = visit.page.evaluate(
        """() => [...document.querySelectorAll("body *")]
          .filter((e) => e.checkVisibility({ contentVisibilityAuto: true })).length"""
    )
    return [f"{now} elements are laid out at once"] if now > MOST else []


def overflow(visit):
    """Wider than the window; or left of it, where nobody can scroll to."""
    width, lost = visit.page.evaluate(
        """() => {
          const boxes = "article :is(figure, img, pre, table, p, figcaption, h1, h2, h3)";
          const lost = [...document.querySelectorAll(boxes)]
            .filter((e) => e.checkVisibility() && e.getBoundingClientRect().left < 0);
          return [document.documentElement.scrollWidth, lost.map((e) => e.outerHTML.slice(0, 80))];
        }"""
    )
    wide = [f"the page is {width} wide, the window {visit.width}"] if width > visit.width else []
    return wide + [f"left of the window: {element}" for element in lost]


def pictures(visit):
    """No real description, not loaded, no room reserved, or loaded before it is needed."""
    found = visit.page.evaluate(
        """async () => {
          const all = [...document.querySelectorAll("main img")];
          for (const image of all) {
            image.dataset.far = image.getBoundingClientRect().top > 2 * innerHeight;
            image.dataset.asked = image.loading === "lazy";
            image.loading = "eager";
          }
          await Promise.all(all.map((image) => image.decode().catch(() => 0)));
          return all.map((image) => ({
            src: image.getAttribute("src"), alt: image.alt, loaded: image.naturalWidth > 0,
            room: image.hasAttribute("width") && image.hasAttribute("height"),
            late: image.dataset.far === "false" || image.dataset.asked === "true",
          }));
        }"""
    )
    problems = []
    for image in found:
        if problem := alt_problem(image["alt"], image["src"]):
            problems.append(f"{image['src'][-30:]} {problem}")
        problems += [
            f"{image['src'][-30:]}: not {what}"
            for what in ("loaded", "room", "late")
            if not image[what]
        ]
    return problems


def cut_off(visit):
    """A result that is wider than its box on a telephone, or code on a desk."""
    visit.page.add_style_tag(content=f"{FAR} {{ content-visibility: visible !important }}")
    visit.page.evaluate("document.querySelectorAll('details').forEach((e) => (e.open = true))")
    found = visit.page.evaluate(
        """([results, longest]) => {
          const lines = (e) =>
            Math.max(...e.textContent.split("\\n").map((line) => line.trimEnd().length));
          const wide = (e) => e.scrollWidth > e.clientWidth + 1;
          const boxes = results
            ? [...document.querySelectorAll(".cell_output > .output, .cell_output pre")]
            : [...document.querySelectorAll("main pre")].filter((e) => lines(e) <= longest);
          return boxes.filter(wide).map((e) => e.textContent.trim().slice(0, 60));
        }""",
        [visit.width < 600, LINE],
    )
    return [f"cut off at {visit.width}: {text}" for text in found]


def one_way_home(visit):
    home = visit.page.locator("a.navbar-brand").first.get_attribute("href")
    return [] if home else ["no link to the front page"]


COLORS = ["color-contrast", "link-in-text-block"]


def axe(visit, **options):
    # Without `resultTypes` most of the time goes into a list of what is right.
    options = {"preload": False, "resultTypes": ["violations"], **options}
    return [
        f"{v['id']}: {v['nodes'][0]['target']} {v['nodes'][0]['html'][:90]}"
        for v in Axe().run(visit.page, options=options).response["violations"]
    ]


def inaccessible(visit):
    """What axe finds in the mode that is shown."""
    visit.page.evaluate(THIN)
    return axe(visit, rules={"label-content-name-mismatch": {"enabled": True}})


def unreachable(visit):
    """Boxes that scroll and that no key reaches, on a page that `cut_off` has unfolded."""
    visit.page.evaluate(HOLLOW)
    return axe(visit, runOnly=["scrollable-region-focusable"])


def inaccessible_in_some_mode(visit, judged=None):
    """What axe finds at both widths, and of colours also in both themes; and errors.

    The dark theme differs from the light one in its colours alone. This leaves the page in pieces.
    `judged` counts the looks of texts over the pages that share it.
    """
    visit.page.evaluate(THIN)
    rules = {"label-content-name-mismatch": {"enabled": True}}
    rules |= {name: {"enabled": False} for name in COLORS}
    problems = []
    for width in WIDTHS:
        visit.show("light", width)
        problems += axe(visit, rules=rules)
    for mode in MODES:
        visit.show(*mode)
        visit.page.evaluate(LOOKS)
    problems += errors(visit)  # of all modes; below, scripts miss what is gone
    times = visit.page.evaluate(ALIKE, judged or {})
    if judged is not None:
        judged.update(times)
    for mode in MODES:
        visit.show(*mode)
        problems += [f"{mode}: {problem}" for problem in axe(visit, runOnly=COLORS)]
    return problems


GATES = (
    other_hosts,
    errors,
    too_heavy,
    too_much_at_once,
    overflow,
    one_way_home,
    pictures,
)


def pages_of(site):
    found = [p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]
    return [p for p in found if 'http-equiv="Refresh"' not in p.read_text(encoding="utf-8")]


def test_every_page(site, browser):
    """Each theme and each width is opened once; the other two modes are come to from there."""
    problems, judged = {}, {}
    for path in pages_of(site):
        found = []
        for theme, width in (("dark", 375), ("light", 1280)):
            with Visit(browser, path.as_uri(), theme, width) as visit:
                shown = visit.page.evaluate("document.documentElement.dataset.theme")
                assert shown == theme
                found += [problem for gate in GATES for problem in gate(visit)]
                if theme == "light":
                    found += inaccessible_in_some_mode(visit, judged) + other_hosts(visit)
                else:
                    found += cut_off(visit) + unreachable(visit)
                    visit.show(theme, 1280)
                    found += cut_off(visit)
        if found:
            problems[path.relative_to(site).as_posix()] = found
    assert problems == {}


# --- Each gate can fail, on a page that passes it above -------------------------------------------

HEAVY = "".join(f"<!-- {i * 7919 % 100003:x} {i * 104729 % 999983:x} -->" for i in range(60_000))


SMALL = "src='../_static/minus.png' width=1 height=1"
FAR_DOWN = "<div style='height: 3000px'></div>"
PALE = (
    "<style>@media {} {{ .pale {{ color: #888; background: #777 }}}}</style><p class=pale>pale</p>"
)
SCROLLS = (
    "<p tabindex=-1 style='width: 9rem; overflow: auto; white-space: nowrap'>"
    "a line of text that is wider than its box and that no key can move</p>"
)
NO_BRAND = "<script>document.querySelector('a.navbar-brand').removeAttribute('href')</script>"


@pytest.mark.parametrize(
    ("gate", "spoil"),
    [
        (other_hosts, "<img alt='' src='https://example.invalid/x.png'>"),
        (errors, "<script>undefinedFunction()</script>"),
        (errors, "<script>console.error('no')</script>"),
        (too_heavy, HEAVY),
        (too_much_at_once, "<b></b>" * MOST),
        (overflow, "<div style='width: 2000px; height: 1px'></div>"),
        (overflow, "<p style='margin-left: -5000px'>lost</p>"),
        (pictures, f"<img {SMALL} alt='figure.png'>"),
        (pictures, "<img src='missing.png' width=1 height=1 alt='A picture that is not there.'>"),
        (pictures, "<img src='../_static/minus.png' alt='A picture without its own size.'>"),
        (pictures, f"{FAR_DOWN}<img {SMALL} alt='A picture that nobody has come near to.'>"),
        (cut_off, f"<pre style='width: 200px; overflow: auto'>{'x' * LINE}</pre>"),
        (one_way_home, NO_BRAND),
        (inaccessible, "<p style='color: #aaa; background: #fff'>too pale</p>"),
        (inaccessible_in_some_mode, "<button></button>"),
        (unreachable, SCROLLS),
        (inaccessible_in_some_mode, "<button aria-label='Open'>Close</button>"),
        (inaccessible_in_some_mode, PALE.format("(prefers-color-scheme: dark)")),
        (inaccessible_in_some_mode, PALE.format("(width < 500px)")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_gate_can_fail(site, browser, gate, spoil):
    plain = site / "book" / "glossary.html"
    html = plain.read_text(encoding="utf-8")
    spoilt = site / "_static" / "spoilt.html"  # where no other test looks for pages
    spoilt.write_text(re.sub(r"(<article[^>]*>)", lambda m: m[1] + spoil, html, count=1))
    try:
        with Visit(browser, spoilt.as_uri()) as visit:
            assert gate(visit)
    finally:
        spoilt.unlink()


@pytest.mark.parametrize("ci", [True, False])
def test_without_a_browser_ci_fails_and_others_skip(monkeypatch, ci):
    spec = importlib.util.spec_from_file_location("shared", Path(__file__).with_name("conftest.py"))
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "true" if ci else "")
    lacking = pytest.fail if ci else pytest.skip
    with pytest.raises(lacking.Exception, match="no Chromium on this machine"):
        shared.find_chromium()


# --- Pages as they are published ------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(published, tmp_path_factory):
    """The address of the published pages, which are in a folder of their host."""
    root = tmp_path_factory.mktemp("host")
    (root / "axis-book").symlink_to(published)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{host.server_port}/axis-book/"
        host.shutdown()


@pytest.mark.parametrize("name", ["404.html", "book/intro.html", "book/axes/which-axes.html"])
def test_published_page(server, browser, name):
    """What only published pages have: launch, edit and issue buttons, and the page for the lost."""
    with Visit(browser, server + name, "dark", 375) as visit:
        assert errors(visit) + overflow(visit) + one_way_home(visit) == []
        visit.show("light", 1280)
        assert errors(visit) + overflow(visit) + one_way_home(visit) == []
        assert visit.page.evaluate("document.styleSheets[0].cssRules.length") > 99
        assert [url for url in visit.requests if not url.startswith((server, "data:"))] == []
        assert inaccessible_in_some_mode(visit) == []


def test_no_page_asks_for_what_is_not_there(server, browser):
    """Over HTTP, where a browser would ask for a favicon."""
    for name in ("", "index.html", "book/glossary.html", "search.html"):
        context = browser.new_context()
        page, missing = context.new_page(), []
        page.on(
            "response", lambda r, missing=missing: missing.append(r.url) if r.status >= 400 else 0
        )
        page.goto(server + name)
        page.wait_for_timeout(400)
        assert missing == [], name
        assert page.locator("link[rel=icon]").get_attribute("href").startswith("data:image/svg")
        context.close()


def test_the_lost_find_home(server, browser):
    with Visit(browser, f"{server}404.html") as visit:
        visit.page.click("article a")
        visit.page.wait_for_url(f"{server}book/intro.html")


# --- What readers do ------------------------------------------------------------------------------


def test_keyboard_sees_where_it_is(site, browser):
    """Every stop of the Tab key on the first screen has a visible outline; the first skips."""
    with Visit(browser, (site / "book" / "glossary.html").as_uri()) as visit:
        stops = []
        for _ in range(25):
            visit.page.keyboard.press("Tab")
            stops.append(
                visit.page.evaluate(
                    """() => {
                      const e = document.activeElement, s = getComputedStyle(e);
                      return [e.textContent.trim().slice(0, 20), s.outlineStyle, s.outlineWidth];
                    }"""
                )
            )
        assert stops[0][0] == "Skip to main content"
        # The skip link is its own sign: it appears when it has the focus.
        others = [stop for stop in stops if stop[0] != stops[0][0]]
        assert len(others) > 15
        assert [s for s in others if s[1] == "none" or s[2] == "0px"] == []


def test_keyboard_stays_in_the_window(site, browser):
    """No stop lies in a closed drawer, forwards from the top or backwards from the end."""
    with Visit(browser, site.joinpath(*LONGEST).as_uri(), width=375) as visit:
        for key in ("Tab", "Shift+Tab"):
            visit.page.goto(site.joinpath(*LONGEST).as_uri())
            for _ in range(12):
                visit.page.keyboard.press(key)
                left, right, name = visit.page.evaluate(
                    """() => {
                      const e = document.activeElement, r = e.getBoundingClientRect();
                      return [r.left, r.right, e.textContent.trim()];
                    }"""
                )
                assert right > 0 and left < 375, name


@pytest.mark.parametrize("name", ["layer/forward", "axes/which-axes", "scale/distributed"])
def test_contents_list_follows_the_reader(site, browser, name):
    """In every part of the page one entry is marked, the one that is read, and it is in view."""
    with Visit(browser, (site / "book" / f"{name}.html").as_uri()) as visit:
        page, seen = visit.page, []
        for _ in range(200):
            page.mouse.wheel(0, 600)
            page.evaluate(
                "() => new Promise((f) => requestAnimationFrame(() => setTimeout(f, 30)))"
            )
            marked, at, below, over = page.evaluate(
                """() => {
                  const marked = document.querySelectorAll("#pst-page-toc-nav a[aria-current]");
                  const box = document.querySelector(".bd-sidebar-secondary");
                  const list = box.getBoundingClientRect();
                  const at = marked[0].getBoundingClientRect();
                  const end = Math.min(list.bottom, innerHeight);
                  const view = at.top >= list.top && at.bottom <= end;
                  const read = document.getElementById(marked[0].hash.slice(1));
                  const { top, bottom } = read.getBoundingClientRect();
                  const over = scrollY + innerHeight >= document.documentElement.scrollHeight - 1;
                  return [marked.length, view, top < innerHeight && bottom > 0, over];
                }"""
            )
            seen.append(page.evaluate("document.querySelector('a[aria-current]').hash"))
            assert (marked, at, below) == (1, True, True), seen[-1]
            if over:
                break
        assert over and seen[-1] == "#further-reading" and len(set(seen)) > 12
        styled = "e => getComputedStyle(e).color"
        shown = page.locator("#pst-page-toc-nav a[aria-current]").evaluate(styled)
        assert shown != page.locator("#pst-page-toc-nav a:not(.active)").first.evaluate(styled)


def test_dark_mode_switch_is_kept(site, browser):
    with Visit(browser, (site / "book" / "glossary.html").as_uri()) as visit:
        seen = set()
        for _ in range(3):
            visit.page.click(".theme-switch-button")
            seen.add(visit.page.evaluate("document.documentElement.dataset.mode"))
        assert seen == {"light", "dark", "auto"}
        assert errors(visit) == []


def test_solution_is_open_without_scripts(site, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((site / "book" / "axes" / "which-axes.html").as_uri())
    assert page.locator(".solution > .admonition-title + *").first.is_visible()
    context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_need_no_scripts(site, browser, theme):
    """The theme of the reader's system, and the axes' colours, are those with scripts."""
    looks = []
    for scripts in (True, False):
        context = browser.new_context(java_script_enabled=scripts, color_scheme=theme)
        page = context.new_page()
        page.goto(site.joinpath(*LONGEST).as_uri())
        looks.append(
            [
                page.locator(selector)
                .filter(visible=True)
                .first.evaluate(
                    "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
                )
                for selector in ("body", "article p a", ".axis-n", ".axis-w", "pre", "pre .k", "th")
            ]
        )
        assert page.locator(f"img.on-{theme}").first.is_visible()
        context.close()
    assert looks[0] == looks[1]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("mode", [None, "light", "dark"])
def test_colours_never_change_while_a_page_opens(site, browser, theme, mode):
    context = browser.new_context(color_scheme=theme)
    page = context.new_page()
    if mode:
        page.add_init_script(f"localStorage.setItem('mode', '{mode}')")
    page.add_init_script(
        """window.themes = [];
        new MutationObserver(() => themes.push(document.documentElement.dataset.theme))
          .observe(document, { subtree: true, attributeFilter: ["data-theme"] })"""
    )
    page.goto((site / "book" / "glossary.html").as_uri())
    page.wait_for_timeout(100)
    assert set(page.evaluate("themes")) == {mode or theme}
    context.close()


# --- Letters and lines ----------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "low", "high"), [(1280, 64, 72), (375, 36, 44)])
def test_lines_have_a_length_that_the_eye_can_follow(site, browser, width, low, high):
    with Visit(browser, (site / "book" / "data-credits.html").as_uri(), width=width) as visit:
        signs = visit.page.evaluate(
            """() => {
              const text = [...document.querySelectorAll("article section > p")]
                .map((e) => e.textContent).join(" ").replace(/\\s+/g, " ");
              const paragraph = document.querySelector("article section > p");
              const room = paragraph.offsetWidth;
              paragraph.style = "white-space: nowrap; width: max-content; max-width: none";
              paragraph.textContent = text;
              return text.length * room / paragraph.offsetWidth;
            }"""
        )
        assert low < signs < high


def test_fonts_are_small_and_are_the_ones_that_are_shown(site, browser):
    fonts = list((site / "_static" / "fonts").glob("*.woff2"))
    assert len(fonts) == 4 and (site / "_static" / "fonts" / "LICENSE").is_file()
    for path in fonts:
        font = TTFont(path)
        assert path.stat().st_size < 16_000, path.name
        assert set(range(33, 127)) <= set(font.getBestCmap()), path.name
        # Their licence reserves the name "Source" for the whole fonts.
        named = {record.nameID for record in font["name"].names if "Source" in str(record)}
        assert named == {0}, path.name
    with Visit(browser, (site / "book" / "layer" / "forward.html").as_uri()) as visit:
        session = visit.context.new_cdp_session(visit.page)
        session.send("DOM.enable"), session.send("CSS.enable")
        root = session.send("DOM.getDocument")["root"]["nodeId"]

        def shown(selector):
            visit.page.evaluate(
                """(selector) => {
                  const seen = (e) => e.checkVisibility({ contentVisibilityAuto: true });
                  [...document.querySelectorAll(selector)].find(seen).dataset.seen = selector;
                }""",
                selector,
            )
            where = {"nodeId": root, "selector": f"[data-seen='{selector}']"}
            node = session.send("DOM.querySelector", where)
            used = session.send("CSS.getPlatformFontsForNode", {"nodeId": node["nodeId"]})
            return [font["isCustomFont"] for font in used["fonts"]]

        for selector in ("article h1", "section section > p", "article pre", "article em"):
            assert shown(selector)[0], selector
        assert shown("figcaption, .reading-time") == [False]


def test_nothing_jumps_when_the_letters_come_late(site, browser):
    context = browser.new_context(viewport={"width": 375, "height": 800})
    page = context.new_page()
    late = []

    def hold(route):
        late.append(route)

    page.route("**/fonts/source-*.woff2", hold)
    page.goto((site / "book" / "layer" / "forward.html").as_uri(), wait_until="commit")
    page.wait_for_timeout(1500)
    family = 'document.fonts.check("18px Book Serif")'
    assert len(late) >= 2 and not page.evaluate(family)
    for route in late:
        route.continue_()
    page.wait_for_function(family)
    page.wait_for_timeout(300)
    shift = page.evaluate(
        """() => new Promise((done) => {
          let sum = 0;
          new PerformanceObserver((list) => {
            for (const entry of list.getEntries()) sum += entry.value;
          }).observe({ type: "layout-shift", buffered: true });
          setTimeout(() => done(sum), 200);
        })"""
    )
    context.close()
    assert shift < 0.05


# --- What is laid out late ------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_room_kept_for_far_blocks_is_what_they_need(site, browser, width):
    with Visit(browser, site.joinpath(*LONGEST).as_uri(), width=width) as visit:
        heights = f"""() => [...document.querySelectorAll('{FAR}')]
          .filter((e) => !e.closest(".dropdown")).map((e) => e.offsetHeight)"""
        kept = visit.page.evaluate(heights)
        visit.page.add_style_tag(content=f"{FAR} {{ content-visibility: visible !important }}")
        real = visit.page.evaluate(heights)
    assert len(kept) > 20 and kept != real
    assert abs(sum(kept) - sum(real)) < 0.05 * sum(real)
    assert sum(abs(a - b) for a, b in zip(kept, real, strict=True)) < 0.12 * sum(real)


@pytest.mark.parametrize("width", WIDTHS)
def test_link_leads_to_its_target(site, browser, width):
    with Visit(browser, site.joinpath(*LONGEST).as_uri(), width=width) as visit:
        page = visit.page
        far = page.locator(f"{FAR}.math[id]").last.get_attribute("id")
        for target in ("exercises", far, "the-question"):
            page.evaluate("id => { location.hash = id }", target)
            page.wait_for_timeout(300)
            top = page.evaluate(
                "id => document.getElementById(id).getBoundingClientRect().top", target
            )
            assert 30 < top < 130, (target, top)


def test_far_blocks_are_found_and_printed(site, browser):
    with Visit(browser, site.joinpath(*LONGEST).as_uri()) as visit:
        page = visit.page
        words = page.evaluate(
            f"""() => [...document.querySelectorAll('{FAR} pre')]
              .filter((e) => !e.closest(".dropdown")).at(-1).textContent.trim().split("\\n")[0]"""
        )
        assert len(words) > 10 and not page.evaluate("scrollY")
        assert page.evaluate("words => find(words)", words)
        page.wait_for_function("scrollY > 5000")
        page.emulate_media(media="print")
        assert page.locator(FAR).first.evaluate("e => getComputedStyle(e).contentVisibility") == (
            "visible"
        )


def test_far_blocks_are_read_aloud(site, reading):
    """The tree that a screen reader gets has every formula, and none of their LaTeX."""
    page = reading.new_page()
    page.goto(site.joinpath(*LONGEST).as_uri())
    folded = ".dropdown, details > :not(summary)"
    formulas = page.evaluate(
        f"[...document.querySelectorAll('article math')].filter(e => !e.closest('{folded}')).length"
    )
    sources = page.evaluate("[...document.querySelectorAll('annotation')].map(e => e.textContent)")
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    page.close()
    roles = [node.get("role", {}).get("value") for node in nodes]
    spoken = {node.get("name", {}).get("value") for node in nodes}
    assert formulas > 300 and roles.count("MathMLMath") >= formulas
    assert not spoken & {source for source in sources if "\\" in source}


def test_only_boxes_that_scroll_are_stops(site, browser):
    with Visit(browser, site.joinpath(*LONGEST).as_uri(), width=375) as visit:
        page = visit.page
        for _ in range(60):
            page.mouse.wheel(0, 800)
            page.wait_for_timeout(20)
        page.wait_for_timeout(300)
        stops = page.evaluate(
            """() => [...document.querySelectorAll("main pre")]
              .filter((e) => e.checkVisibility())
              .map((e) => [e.scrollWidth > e.clientWidth, e.tabIndex === 0])"""
        )
        assert [True, True] in stops and [False, False] in stops
        assert all(scrolls == stop for scrolls, stop in stops)


def test_print_has_no_furniture(site, browser):
    chapter = site / "book" / "axes" / "which-axes.html"
    with Visit(browser, chapter.as_uri(), theme="dark") as visit:
        visit.page.emulate_media(media="print")
        furniture = ("button.copybtn", "button.toggle-button", ".ax-foot")
        for hidden in (".bd-sidebar-primary", ".bd-header-article", *furniture):
            assert visit.page.locator(hidden).count(), hidden
            assert not visit.page.locator(hidden).first.is_visible(), hidden
        wide = visit.page.evaluate(
            """() => [...document.querySelectorAll("article pre")]
              .filter(e => e.scrollWidth > e.clientWidth + 1)
              .filter(e => getComputedStyle(e).whiteSpace === "pre")
              .length"""
        )
        assert wide == 0
        # Code longer than a page must break, or the page before it stays blank.
        stuck = visit.page.evaluate(
            """() => [...document.querySelectorAll("article pre")]
              .filter((e) => e.offsetHeight > 300)
              .map((e) => {
                while (e && getComputedStyle(e).breakInside === "auto") e = e.parentElement;
                return e?.className;
              })"""
        )
        assert stuck and set(stuck) == {None}


def test_paper_has_all_of_a_page_that_nobody_has_scrolled(site, browser, tmp_path):
    """As by the browser's menu: no key, and of the mouse only that it has moved there."""
    with Visit(browser, site.joinpath(*LONGEST).as_uri()) as visit:
        page = visit.page
        page.wait_for_timeout(500)
        assert not page.evaluate("[...document.images].every((e) => e.naturalWidth)")
        page.mouse.move(9, 9)
        page.wait_for_function("[...document.images].every((e) => e.complete && e.naturalWidth)")
        # Drawings are lines on paper, photographs are pictures.
        sizes = page.evaluate(
            """[...document.images].filter((e) => !e.src.endsWith(".svg"))
              .map((e) => [e.naturalWidth, e.naturalHeight])"""
        )
        drawn = re.findall(rb"/Subtype /Image\s+/Width (\d+)\s+/Height (\d+)", page.pdf())
        assert {tuple(size) for size in sizes} <= {(int(w), int(h)) for w, h in drawn}
        page.emulate_media(media="print")
        blank = page.evaluate(
            f"""() => [...document.querySelectorAll('{FAR} *')]
              .filter((e) => e.checkVisibility({{ contentVisibilityAuto: true }})
                !== e.checkVisibility()).length"""
        )
        assert blank == 0 and page.locator(FAR).count() > 20
        assert page.locator("details.hide:not([open])").evaluate_all(
            "all => all.length && all.every((e) => !e.checkVisibility())"
        )


def test_paper_is_white_and_has_every_figure(site, browser, tmp_path):
    with Visit(browser, site.joinpath(*LONGEST).as_uri(), theme="dark") as visit:
        page = visit.page
        loaded = "[...document.images].every((e) => e.complete && e.naturalWidth)"
        assert not page.evaluate(loaded)
        page.evaluate(
            """() => {
              window.printed = [];
              const watch = () => printed.push(getComputedStyle(document.body).color);
              for (const kind of ["beforeprint", "afterprint"]) addEventListener(kind, watch);
            }"""
        )
        screen = page.evaluate("getComputedStyle(document.body).color")
        page.keyboard.press("Control")  # the first half of Ctrl+P
        page.wait_for_function(loaded)
        page.pdf(path=tmp_path / "chapter.pdf")
        assert page.evaluate("printed") == ["rgb(31, 36, 43)", screen]
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_paper_has_answers_and_solutions_at_its_end(site, browser, tmp_path):
    """Beside a question they would be read before it; without scripts they stand there."""
    with Visit(browser, (site / "book" / "axes" / "which-axes.html").as_uri()) as visit:
        page = visit.page
        page.evaluate(
            """() => addEventListener("beforeprint", () => {
              const shown = (e) => e.checkVisibility({ contentVisibilityAuto: true });
              const all = (s) => [...document.querySelectorAll(s)];
              const last = document.querySelector("article .paper-end");
              window.paper = {
                title: document.querySelector("article h1").textContent,
                last: last === last.parentElement.lastElementChild,
                right: last.textContent.split("Right:").length - 1,
                solutions: last.querySelectorAll(".solution").length,
                ids: last.querySelectorAll("[id]").length,
              };
            })"""
        )
        asked = page.locator(".quiz-right").count()
        solved = page.locator("article .solution").count()
        page.pdf(path=tmp_path / "a.pdf")
        paper = page.evaluate("paper")
        assert paper.pop("title").startswith("1. ")
        assert paper == {"last": True, "right": asked, "solutions": solved, "ids": 0}
        assert asked >= 3 and solved >= 3
        assert page.locator(".paper-end").count() == 0  # the screen has its own again
        page.emulate_media(media="print")
        assert page.locator("article h1").first.is_visible()
        assert not page.locator("#jb-print-docs-body").is_visible()
        parted = "e => getComputedStyle(e).breakInside"
        assert page.locator("li:has(> [role=group])").first.evaluate(parted) == "avoid"
        page.evaluate("document.documentElement.dataset.paper = ''")
        hidden = "article [role=group] .sd-card-body, article .solution"
        assert page.locator(hidden).filter(visible=True).count() == 0
        assert page.locator("article [role=group] summary").first.is_visible()


def test_a_figure_too_small_to_read_can_be_enlarged(site, browser):
    wide = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 900 300'/>"
    spoilt = site / "book" / "wide.html"
    html = (site / "book" / "glossary.html").read_text(encoding="utf-8")
    figure = "<figure><img src='{}' alt='A plot of two curves.' width={} height=300></figure>"
    (site / "_images" / "wide.svg").write_text(wide)
    small = figure.format("../_images/wide.svg", 500)
    large = figure.format("../_images/wide.svg", 900)
    spoilt.write_text(re.sub(r"(<article[^>]*>)", lambda m: m[1] + large + small, html, count=1))
    try:
        with Visit(browser, spoilt.as_uri(), width=375) as visit:
            page = visit.page
            images = page.locator("article figure img")
            assert [i.get_attribute("role") for i in images.all()] == ["button", None]
            for key in ("Enter", "Space", None):
                if key:
                    images.first.focus()
                    page.keyboard.press(key)
                else:
                    images.first.click()
                box = page.locator("dialog.enlarged")
                assert box.locator("img").bounding_box()["width"] == 900
                assert overflow(visit) == [] and axe(visit) == []
                page.keyboard.press("Escape")
                assert not box.is_visible()
            visit.show("light", 1280)
            page.wait_for_function("!document.querySelector('article img[role=button]')")
    finally:
        spoilt.unlink()
        (site / "_images" / "wide.svg").unlink()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_copy_button_covers_no_code(site, browser, width):
    """Where it is always there, for want of a mouse."""
    context = browser.new_context(
        has_touch=True, is_mobile=True, viewport={"width": width, "height": 800}
    )
    page = context.new_page()
    page.goto((site / "book" / "axes" / "which-axes.html").as_uri())
    for block in page.locator("div.highlight:has(> button.copybtn)").filter(visible=True).all()[:3]:
        block.scroll_into_view_if_needed()
        button = block.locator("button.copybtn").bounding_box()
        first = block.locator("pre").evaluate(
            """e => { const r = new Range(); r.selectNodeContents(e);
              return r.getClientRects()[0].top }"""
        )
        assert button["y"] + button["height"] <= first + 4
    context.close()


def test_a_formula_is_not_parted_from_its_comma(site, browser):
    """At no width; the formula may be broken inside, or a long one would widen the page."""
    with Visit(browser, site.joinpath(*LONGEST).as_uri()) as visit:
        parted, broken = visit.page.evaluate(
            """() => {
              const comma = (text) => {
                const range = new Range();
                range.setStart(text, 0);
                range.setEnd(text, 1);
                return range.getBoundingClientRect();
              };
              let parted = 0, broken = 0;
              for (const formula of document.querySelectorAll("section > p .math")) {
                const next = formula.nextSibling;
                if (next?.nodeType !== Node.TEXT_NODE || !/^[,.;:)]/.test(next.data)) continue;
                const parts = [...formula.querySelectorAll(".katex-html > .base")];
                const paragraph = formula.closest("p");
                for (let width = 150; width < 300; width += 10) {
                  paragraph.style.width = width + "px";
                  const last = parts.at(-1).getBoundingClientRect();
                  parted += comma(next).left < last.left;
                  const first = parts[0].getBoundingClientRect();
                  broken += parts.length > 1 && last.left < first.right - 1;
                }
                paragraph.style.width = "";
              }
              return [parted, broken];
            }"""
        )
    assert parted == 0 and broken > 0


def test_a_figure_has_a_copy_for_each_page(site, browser):
    """In the shades of the page; paper gets the light one."""
    with Visit(browser, site.joinpath(*LONGEST).as_uri()) as visit:
        for theme, shown in (("light", "on-light"), ("dark", "on-dark"), ("print", "on-light")):
            visit.page.emulate_media(media="print" if theme == "print" else "screen")
            if theme != "print":
                visit.page.evaluate("(t) => (document.documentElement.dataset.theme = t)", theme)
            seen = visit.page.evaluate(
                "[...document.querySelectorAll('figure img')].filter(i => i.checkVisibility())"
                ".map(i => [i.className, i.getAttribute('src')])"
            )
            assert seen and {kind for kind, _ in seen} == {shown}, theme
            shade = getattr(colors.INK, "dark" if shown == "on-dark" else "light")
            for _, source in seen:
                svg = site.joinpath(*LONGEST).parent.joinpath(source).resolve().read_text()
                assert shade in svg


@pytest.mark.parametrize(
    "text",  # where ~ stands for a no-break space
    ["3~×~3~×~64 and N~×~H", "is 53~% of it, γ~=~1, β~=~−1", "width = 3, 9 = 3 + 6, a = (1, 2)"],
)
def test_products_percentages_and_values_are_not_broken(text):
    assert glued(text.replace("~", " ")) == text.replace("~", "\N{NO-BREAK SPACE}")


def test_ids_are_unique(site):
    for path in pages_of(site):
        ids = re.findall(r'<[^<>]*\sid="([^"]+)"', (site / path).read_text(encoding="utf-8"))
        assert len(ids) == len(set(ids)), (path, {i for i in ids if ids.count(i) > 1})
