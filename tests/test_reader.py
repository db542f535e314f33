"""What readers expect of a page: previews, time to read, citation, search, folds, date."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from find import plain
from test_pages import Visit, axe, errors, inaccessible, overflow
from test_plotting import contrast
from website import bibtex
from words import minutes

ROOT = Path(__file__).resolve().parent.parent
WHICH = "axes/which-axes"


def visit(browser, site, page, **how):
    return Visit(browser, (site / "book" / f"{page}.html").as_uri(), **how)


# --- Previews -------------------------------------------------------------------------------------

# Of each kind one link, and what its preview must show.
TERM = (WHICH, 'a[href$="#term-Channel"]', "one index along the axis c")
CITATION = (WHICH, 'a[href*="bibliography"]', "stack overflow")
FIGURE = (WHICH, 'a[href="#fig-axis-block"]', "which cells share")
FORMULA = ("layer/backward", 'a[href="#equation-eq-backward-jacobian"]', r"\frac{\partial")
FORMULA_ELSEWHERE = ("scale/kernels", 'a[href$="forward.html#equation-eq-merge"]', r"\sum_p")
KINDS = [TERM, CITATION, FIGURE, FORMULA, FORMULA_ELSEWHERE]
IDS = ["term", "citation", "figure", "formula", "formula of another page"]


def link_of(seen, selector):
    return seen.page.locator(f"article {selector}").filter(visible=True).first


def focus(seen, link):
    """As the Tab key does, which alone makes the focus visible."""
    seen.page.keyboard.press("Tab")
    link.focus()


def repeated_ids(page):
    return page.evaluate(
        """() => { const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
          return ids.filter((id, i) => ids.indexOf(id) !== i).sort() }"""
    )


def apart(a, b):
    return a["y"] >= b["y"] + b["height"] or b["y"] >= a["y"] + a["height"]


@pytest.mark.parametrize(("page", "selector", "text"), KINDS, ids=IDS)
def test_preview_shows_what_the_link_leads_to(site, browser, page, selector, text):
    with visit(browser, site, page) as seen:
        link, box = link_of(seen, selector), seen.page.locator("#preview")
        ids = repeated_ids(seen.page)
        link.hover()
        box.wait_for(state="visible")
        assert apart(box.bounding_box(), link.bounding_box())
        assert text in (box.get_attribute("aria-label") or box.inner_text().lower())
        for formula in box.locator(".katex-html").all():
            assert formula.bounding_box()["width"] > 0
        assert repeated_ids(seen.page) == ids
        assert link.get_attribute("aria-describedby") == "preview"
        assert link.get_attribute("title") is None  # or the browser would show it as well

        # It stays while the mouse is on it, and goes when the mouse goes.
        box.hover()
        seen.page.wait_for_timeout(500)
        assert box.is_visible()
        seen.page.mouse.move(5, 5)
        box.wait_for(state="hidden")
        assert link.get_attribute("aria-describedby") is None

        # At the keyboard, on a narrow page.
        seen.show("light", 375)
        link = link_of(seen, selector)
        focus(seen, link)
        box.wait_for(state="visible")
        at, on = box.bounding_box(), link.bounding_box()
        assert at["x"] >= 0 and at["x"] + at["width"] <= 375
        assert at["y"] >= 0 and at["y"] + at["height"] <= 800
        assert apart(at, on)
        assert overflow(seen) == []
        if formula := box.locator(".katex-display").all():
            assert formula[0].evaluate("e => e.scrollWidth <= e.clientWidth")
        assert seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        seen.page.evaluate(
            """document.querySelectorAll(":is(.katex, pre):not(#preview *)")
              .forEach((e) => e.replaceChildren("x"))"""
        )
        options = {"preload": False, "resultTypes": ["violations"]}
        assert Axe().run(seen.page, "#preview", options).response["violations"] == []
        for theme in ("light", "dark"):  # axe cannot tell, because the box lies on other things
            seen.page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
            text_and_page = box.evaluate(
                """e => ["color", "backgroundColor"].map((name) =>
                  "#" + getComputedStyle(e)[name].match(/\\d+/g).slice(0, 3)
                    .map((part) => Number(part).toString(16).padStart(2, "0")).join(""))"""
            )
            assert contrast(*text_and_page) > 7
        seen.page.keyboard.press("Escape")
        box.wait_for(state="hidden")
        assert link.evaluate("e => e === document.activeElement")
        assert "preview" not in (link.get_attribute("aria-describedby") or "")
        assert errors(seen) == []


def test_preview_follows_the_focus_and_escape_dismisses_it_under_the_mouse(site, browser):
    page, selector, _ = CITATION
    with visit(browser, site, page) as seen:
        link, box = link_of(seen, f"{selector}:has(em)"), seen.page.locator("#preview")
        title = link.get_attribute("title")
        link.hover()
        box.wait_for(state="visible")
        seen.page.keyboard.press("Escape")
        link.locator("em").hover()  # another part of the same link
        seen.page.wait_for_timeout(400)
        assert not box.is_visible()
        assert link.get_attribute("title") == title
        focus(seen, link)
        box.wait_for(state="visible")
        seen.page.mouse.move(5, 5)
        seen.page.wait_for_timeout(500)
        assert box.is_visible()
        assert inaccessible(seen) == []
        seen.page.keyboard.press("Tab")
        assert title not in (box.inner_text() if box.is_visible() else "")


def test_a_touch_or_the_printer_gets_no_preview(site, browser):
    page, selector, _ = FORMULA
    url = (site / "book" / f"{page}.html").as_uri()
    context = browser.new_context(has_touch=True, viewport={"width": 375, "height": 800})
    touched = context.new_page()
    touched.goto(url)
    touched.locator(f"article {selector}").filter(visible=True).first.tap()
    touched.wait_for_url("**#equation-eq-backward-jacobian")
    touched.wait_for_timeout(400)
    assert not touched.locator("#preview").is_visible()
    context.close()
    with visit(browser, site, page) as seen:
        link_of(seen, selector).hover()
        seen.page.locator("#preview").wait_for(state="visible")
        seen.page.emulate_media(media="print")
        assert not seen.page.locator("#preview").is_visible()


def test_every_term_and_every_formula_of_another_page_can_be_previewed(site):
    terms = formulas = 0
    for path in (site / "book").rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        for title in re.findall(
            r'<a class="reference internal"([^>]*)><span class="xref std', page
        ):
            if "#term-" in title:
                assert re.search(r'title="[^"]{20,}"', title), (path.name, title)
                terms += 1
        shown = re.findall(r'<template data-preview="([^"]*)"', page)
        asked = set(re.findall(r'href="([^"]+\.html#equation-[^"]*)"', page))
        assert sorted(asked) == sorted(shown), path.name
        formulas += len(asked)
    assert terms > 30 and formulas > 5


# --- Time to read ---------------------------------------------------------------------------------


def test_reading_time():
    assert minutes(0, 0, 0) == 5
    assert minutes(4000, 0, 0) == 20
    assert minutes(4000, 300, 0) == 30
    assert minutes(4000, 300, 40) == 40


def test_notebooks_alone_say_how_long_they_take(site):
    for path in (site / "book").rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        lines = re.findall(r'</h1>\n<p class="reading-time">(.*?)</p>', page)
        if not (ROOT / path.relative_to(site)).with_suffix(".ipynb").is_file():
            assert lines == [], path.name
        else:
            assert re.fullmatch(r"About [1-9]\d minutes to read", *lines), path.name


# --- Citation -------------------------------------------------------------------------------------

CITATION_FILE = {
    "title": "A Book",
    "authors": [{"name": "the group"}, {"family-names": "Curie", "given-names": "Marie"}],
    "version": "1.2",
}


def test_bibtex_takes_every_field_from_the_citation_file():
    assert bibtex(CITATION_FILE, "2026") == (
        "@misc{a-book,\n"
        "  author = {{the group} and Curie, Marie},\n"
        "  title  = {{A Book}},\n"
        "  year   = {2026},\n"
        "  note   = {Version 1.2},\n"
        "}"
    )
    later = {**CITATION_FILE, "title": "Two", "doi": "10.1/x", "date-released": "2027-01-31"}
    entry = bibtex(later, "2026", "https://here.example/")
    assert "@misc{two," in entry and "{{Two}}" in entry and "{10.1/x}" in entry
    assert "{2027}" in entry and "{https://here.example/}" in entry


def test_citation_box_is_the_citation_file_and_can_be_copied(site, browser):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    with visit(browser, site, WHICH) as seen:
        seen.page.click(".extra_footer a")
        seen.page.wait_for_url("**/intro.html#cite-this")
        box = seen.page.locator("#cite-this")
        assert box.locator("pre").inner_text().strip() == bibtex(citation, "2026")
        box.hover()
        seen.page.evaluate(
            'document.addEventListener("copy", (e) => window.copied = e.target.value)'
        )
        box.locator("button.copybtn").click()
        assert seen.page.evaluate("window.copied").strip() == bibtex(citation, "2026")


def test_references_have_no_labels(site, epub):
    """The text cites by author and year, so a label such as [CGL83] would lead nowhere."""
    page = (site / "book" / "bibliography.html").read_text(encoding="utf-8")
    with zipfile.ZipFile(epub) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("bibliography.xhtml")]
        pages = [page, archive.read(name).decode()]
    for page in pages:
        references = BeautifulSoup(page, "html.parser").select(".citation")
        assert len(references) > 20
        assert [r.text for r in references if r.select(".label") or r.text.strip()[0] == "["] == []


# --- Search ---------------------------------------------------------------------------------------


def search(seen, address, query):
    """The addresses of the results of a query, and their text."""
    seen.page.goto(f"{address}?q={quote(query)}")
    seen.page.wait_for_selector("#search-results .search-summary")
    return seen.page.locator("#search-results li").evaluate_all(
        "all => all.map((e) => [e.querySelector('a').getAttribute('href'), e.innerText])"
    )


def test_search_finds_terms_symbols_names_and_sections(site, browser):
    """The place itself, in a page opened as a file; a term or a symbol before where it is used."""
    first = {
        "gamma": "book/notation.html#forward",
        "γ": "book/notation.html#forward",
        "ε": "book/notation.html#forward",
        "variance biased": "book/glossary.html#term-Biased-variance",
        "Bessel": "book/glossary.html#term-Bessels-correction",
        "inv_std": "book/glossary.html#term-inv_std",
        "backward passes": "book/glossary.html#term-Backward-pass",
        "normalized input": "book/glossary.html#term-Normalised-input",
        "fold_batch_norm": "book/api.html#bnlib.fold.fold_batch_norm",
        "bnlib.nn.BatchNorm2d": "book/api.html#bnlib.nn.BatchNorm2d",
        "per_channel": "book/api.html#bnlib.per_channel",
        "reduction_axes": "book/api.html#bnlib.reduction_axes",
        "any rank any layout": "book/axes/which-axes.html#any-rank-any-layout",
    }
    among = {"epsilon": "book/layer/forward.html", "channels_last": "book/axes/which-axes.html"}
    address = (site / "search.html").as_uri()
    with Visit(browser, address) as seen:
        assert not any("sections.js" in url for url in seen.requests)  # before there is a query
        for query, place in first.items():
            assert search(seen, address, query)[0][0] == place, query
        for query, page in among.items():
            found = [link.split("#")[0] for link, _ in search(seen, address, query)]
            assert page in found[:6], query
        assert search(seen, address, "gamma") == search(seen, address, "γ")
        assert search(seen, address, "zzzzz") == [] and search(seen, address, "...") == []
        assert "Nothing" in seen.page.inner_text("#search-results")
        assert errors(seen) == []


def test_quotes_of_the_search_are_clean_and_its_hits_exist(site, browser):
    address = (site / "search.html").as_uri()
    quotes = 0
    with Visit(browser, address) as seen:
        for query in ("mean", "variance", "σ", "kernel", "gradient"):
            for link, text in search(seen, address, query):
                page, _, anchor = link.partition("#")
                html = (site / page).read_text(encoding="utf-8")
                assert not anchor or f'id="{anchor}"' in html, link
                for noise in (
                    ".ipynb",
                    "Skip to main content",
                    "\\",
                    "<",
                    "{",
                    "Copy to clipboard",
                ):
                    assert noise not in text.partition("\n")[2], (query, text)
                quotes += "\n" in text
        seen.page.locator("#search-results li a").first.click()
        seen.page.wait_for_selector("article")
        assert seen.page.locator("span.highlighted, article mark").count() == 0
    assert quotes > 80


def test_search_is_accessible_and_its_icon_is_not_on_the_words(site, browser):
    with Visit(browser, (site / "search.html").as_uri() + "?q=mean", width=375) as seen:
        seen.page.wait_for_selector("#search-results li")
        for theme in ("light", "dark"):
            seen.show(theme, 375)
            assert overflow(seen) == [] and axe(seen) == []
        seen.show("light", 1280)
        seen.page.keyboard.press("Control+k")
        for form in seen.page.locator("form.bd-search").all():
            icon, field = form.locator("i"), form.locator("input")
            if field.is_visible():
                start = field.evaluate("e => parseFloat(getComputedStyle(e).paddingLeft)")
                end = icon.bounding_box()["x"] + icon.bounding_box()["width"]
                assert end <= field.bounding_box()["x"] + start


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"\gamma\hat x+\beta", "γx̂+β"),
        (r"\hat{x} = z/\sqrt{\sigma^2+\varepsilon}", "x̂ = z/√(σ^2+ε)"),
        (r"\frac1m\sum_i x_i", "1/m∑_i x_i"),
        (r"\mathrm{d}x \le 10^{-5}", "dx ≤10^−5"),
        (r"\log_2 R", "log_2 R"),
    ],
)
def test_formula_in_the_index(latex, text):
    assert plain(latex) == text


# --- Folds ----------------------------------------------------------------------------------------


def test_solutions_and_hidden_code_open_and_close_by_keyboard(site, browser):
    with visit(browser, site, WHICH) as seen:
        solution, code = (seen.page.locator(kind).first for kind in (".solution", "details.hide"))
        button, text = (
            solution.locator(".toggle-button"),
            solution.locator(".solution-content, section").first,
        )
        summary, block = code.locator("summary"), code.locator("pre").first
        assert not text.is_visible() and not block.is_visible()
        for key in ("Enter", "Space"):
            focus(seen, button)
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            assert seen.page.evaluate(outline) == "solid"
            for state in ("true", "false"):
                seen.page.keyboard.press(key)
                assert button.get_attribute("aria-expanded") == state
                assert text.is_visible() is (state == "true")
            focus(seen, summary)
            for is_open in (True, False):
                seen.page.keyboard.press(key)
                assert block.is_visible() is is_open


# --- Date of the last change ----------------------------------------------------------------------


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.invalid"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def dates_of(folder, out):
    """Build a small book with the book's own settings of dates and warnings."""
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", str(folder), str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: re.findall(r"Last updated on ([^.<]*)", (out / f"{name}.html").read_text())
        for name in ("index", "new")
    }


def test_date_is_that_of_the_last_commit_or_is_absent(tmp_path, monkeypatch):
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["sphinx"]["config"]
    keys = [key for key in config if "git_" in key or "last_updated" in key or "suppress" in key]
    assert len(keys) == 4
    book = tmp_path / "book"
    book.mkdir()
    settings = [f"{key} = {config[key]!r}" for key in keys]
    (book / "conf.py").write_text(
        "\n".join(
            ["extensions = ['sphinx_last_updated_by_git']", "html_theme = 'basic'", *settings]
        )
    )
    (book / "index.rst").write_text("Title\n=====\n")
    (book / "new.rst").write_text(":orphan:\n\nNew\n===\n")
    none = {"index": [], "new": []}
    assert dates_of(book, tmp_path / "zip") == none  # no repository

    monkeypatch.setenv("GIT_AUTHOR_DATE", "2031-02-03T12:00:00Z")
    git(book, "init", "--quiet")
    git(book, "add", "index.rst", "conf.py")
    git(book, "commit", "--quiet", "-m", "first")
    assert dates_of(book, tmp_path / "a") == {"index": ["3 February 2031"], "new": []}

    monkeypatch.setenv("GIT_AUTHOR_DATE", "2031-02-04T12:00:00Z")
    git(book, "add", "new.rst")
    git(book, "commit", "--quiet", "-m", "second")
    both = {"index": ["3 February 2031"], "new": ["4 February 2031"]}
    assert dates_of(book, tmp_path / "b") == both

    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth", "1", book.as_uri(), str(shallow))
    assert dates_of(shallow, tmp_path / "d") == none  # the clone's one commit has every file

    monkeypatch.setenv("PATH", "")
    assert dates_of(book, tmp_path / "e") == none  # no git
