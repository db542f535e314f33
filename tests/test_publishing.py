"""The pages beyond their text: addresses, descriptions, lean files, and the zip."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from PIL import Image
from website import LONGEST, colab_cell, settings, shorten

from tools.lean.far_blocks import FIRST, MANY, put_off
from tools.lean.pages import mend_page, replace_all, spoken
from tools.lean.styles import drop_unused_variables, purge, squeeze

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("offline", ROOT / "tools" / "offline.py")
offline = importlib.util.module_from_spec(spec)
spec.loader.exec_module(offline)


def soup(path, until=None):
    html = path.read_text(encoding="utf-8")
    return BeautifulSoup(html.partition(until)[0] if until else html, "html.parser")


# --- Addresses ------------------------------------------------------------------------------------


def test_address_of_the_pages():
    assert settings("Some-One/a.book")[0] == "https://some-one.github.io/a.book/"
    assert settings("one/one.github.io")[0] == "https://one.github.io/"
    assert settings("a/b")[1]["repository_url"] == "https://github.com/a/b"
    for wrong in ("a", "a/b/c", "a b/c", "https://github.com/a/b"):
        with pytest.raises(ValueError, match="owner/name"):
            settings(wrong)


PAGES = "https://some-one.github.io/axis-book/"
GITHUB = "https://github.com/Some-One/axis-book"
ADDRESSED = (
    "link[rel=canonical], [property^='og:'], [name='twitter:card'], "
    ".colab, .dropdown-launch-buttons, .dropdown-source-buttons, .btn-source-issues-button"
)


def test_without_an_address_there_is_no_such_link(site):
    chapter = soup(site / "book" / "axes" / "which-axes.html")
    assert chapter.select(ADDRESSED) == []
    assert "url" not in soup(site / "book" / "intro.html").select_one("#cite-this").text
    everything = "".join(p.read_text(encoding="utf-8") for p in site.rglob("*.html"))
    for host in ("mybinder.org", "colab.research", "github.io", "/edit/", "/issues/new"):
        assert host not in everything, host
    for name in ("sitemap.xml", "robots.txt", "404.html"):
        assert not (site / name).exists()


@pytest.mark.parametrize("name", ["book/axes/which-axes", "book/scale/kernels", "book/glossary"])
def test_with_an_address_every_link_leads_to_this_page(published, name):
    page = soup(published / f"{name}.html")
    links = {a["href"] for a in page.select("a[href^=http]")}
    source = name + (".md" if name.endswith("glossary") else ".ipynb")
    assert (ROOT / source).is_file()
    assert f"{GITHUB}/edit/main/{source}" in links
    assert any(link.startswith(f"{GITHUB}/issues/new?") and name in link for link in links)
    launch = {
        f"https://mybinder.org/v2/gh/Some-One/axis-book/main?urlpath=lab/tree/{source}",
        f"https://colab.research.google.com/github/Some-One/axis-book/blob/main/{source}",
    }
    assert launch & links == (launch if source.endswith(".ipynb") else set())
    assert page.select_one("link[rel=canonical]")["href"] == f"{PAGES}{name}.html"

    tags = {m["property"]: m["content"] for m in page.select("meta[property]")}
    assert tags["og:url"] == f"{PAGES}{name}.html"
    assert page.title.text.startswith(tags["og:title"])
    assert tags["og:type"] == "article"
    assert tags["og:site_name"] == "Batch Normalization, Axis by Axis"
    assert tags["og:description"] == page.select_one("meta[name=description]")["content"]
    assert tags["og:image"].startswith(PAGES)
    with Image.open(published / tags["og:image"].removeprefix(PAGES)) as card:
        assert (str(card.width), str(card.height)) == (
            tags["og:image:width"],
            tags["og:image:height"],
        )
    assert page.select_one("meta[name='twitter:card']")["content"] == "summary_large_image"


def test_with_an_address_there_are_a_site_map_a_page_for_the_lost_and_a_url_to_cite(published):
    listed = re.findall(r"<loc>(.*?)</loc>", (published / "sitemap.xml").read_text())
    written = {p.relative_to(published).as_posix() for p in (published / "book").rglob("*.html")}
    assert {address.removeprefix(PAGES) for address in listed} == written
    assert f"Sitemap: {PAGES}sitemap.xml" in (published / "robots.txt").read_text()
    lost = soup(published / "404.html")
    assert lost.select_one("article a")["href"] == "/axis-book/"
    named = [tag.get("href") or tag.get("src") for tag in lost.select("[href], script[src]")]
    # It is served in the place of any missing page: a relative link would lead nowhere.
    assert [name for name in named if not re.match(r"/axis-book/|https:|data:|#", name)] == []
    assert f"{{{PAGES}}}" in soup(published / "book" / "intro.html").select_one("#cite-this").text


def test_colab_gets_the_files_around_the_notebook(published):
    cell = soup(published / "book" / "scale" / "kernels.html").select_one(".colab pre").text.strip()
    assert cell == colab_cell("Some-One/axis-book", "book/scale/kernels")
    clone, install, change = cell.splitlines()
    assert clone == f"!git clone --quiet --depth 1 {GITHUB} /content/axis-book"
    assert install == '%pip install --quiet "/content/axis-book[book]"'
    assert change == "%cd /content/axis-book/book/scale"


def test_extra_for_the_chapters_has_what_they_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for name in extras for line in extras[name]]
    named = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
    named |= {"bnlib", "PIL"} | sys.stdlib_module_names  # scikit-image needs Pillow
    named |= {"sklearn"} if "scikit_learn" in named else set()
    named |= {"skimage"} if "scikit_image" in named else set()
    imported = set()
    for path in (ROOT / "book").rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
            imported.update(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE))
    assert {"torch", "onnxruntime", "triton"} <= imported
    assert imported - named == set()


def test_binder_installs_the_extra_with_the_tested_versions():
    lines = (ROOT / ".binder" / "requirements.txt").read_text().splitlines()
    assert ".[book]" in lines and "-c ../requirements.txt" in lines
    makefile = (ROOT / "Makefile").read_text()
    assert [line for line in lines if "==" in line] == re.findall(r"jupyterlab-myst==\S+", makefile)


# --- Descriptions ---------------------------------------------------------------------------------


def test_descriptions_are_plain_and_all_different(site):
    found = {}
    for page in (site / "book").rglob("*.html"):
        html = soup(page, until="</head>")
        (text,) = [m["content"] for m in html.select("meta[name=description]")]
        assert 30 < len(text) <= LONGEST + 40, (page.name, text)
        assert not re.search(r"[\\$<>]|\{", text), (page.name, text)
        found[page.name] = text
    assert len(set(found.values())) == len(found), found


def test_long_description_ends_at_a_word():
    text = shorten("word " * 100)
    assert len(text) <= LONGEST and text.endswith("word\u2026")
    assert shorten("short") == "short"


# --- Far blocks -----------------------------------------------------------------------------------


def test_only_large_blocks_far_down_are_put_off():
    many, lines = "<b>x</b>" * MANY, "line\nline\n"
    above = f"<p>{many}</p><div><pre>{lines * FIRST}</pre></div>"
    formula = f'<div class="math"><i class="strut" style="height:4em;"></i>{many}</div>'
    below = (
        f"<p>small</p><p class='a'>{many}</p><div><pre>{lines * 5}{many}</pre></div>{formula}"
        f"<div><img src='x.png' />{many}</div><div class='dropdown'>{many}</div>"
    )
    html = f"<section>{above}{below}</section><p>{many}</p>"
    found = put_off(html)
    style = re.compile(r' style="--lines:([\d.]+);--chars:(\d+)"')
    assert style.sub("", found) == html
    assert style.findall(found) == [("0.4", str(MANY)), ("9.2", "0"), ("4.1", "0")]
    assert '<p style="--lines:0.4' in found and "'dropdown' style" not in found


def test_text_for_screen_readers_alone_takes_no_room():
    hidden = f'<i class="katex-mathml">{"<b>long</b>" * MANY}</i>'
    above = f"<p>{'word ' * 100 * FIRST}</p>"
    found = put_off(f"<section>{above}<p>{hidden}seen</p></section>")
    assert '--chars:4"' in found


# --- Lean files -----------------------------------------------------------------------------------


def test_what_is_light_is_refused(site):
    """A second pass would lose the scripts and say what is hidden twice."""
    command = [sys.executable, "-m", "tools.lean", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "build the book anew" in done.stderr and "Traceback" not in done.stderr


def test_style_and_script_are_small(site):
    files = [*(site / "_static").glob("book.*.css"), *(site / "_static").glob("book.*.js")]
    assert len(files) == 2
    assert sum(len(gzip.compress(path.read_bytes(), 6)) for path in files) < 76 * 1024


def test_code_has_no_element_for_plain_words(site):
    code = soup(site / "book" / "layer" / "forward.html").select(".highlight pre")
    assert len(code) > 20 and any(block.select(".k, .kn") for block in code)
    assert not [block for block in code if block.select(".n, .nn, .p, .w")]


def test_change_in_the_theme_is_an_error():
    assert replace_all("a b a", "a", "c", "x") == "c b c"
    with pytest.raises(ValueError, match="expected 'z' in the script"):
        replace_all("a b", "z", "c", "the script")


def test_purge_keeps_what_can_match_and_nothing_else():
    css = """@charset "utf-8"; /* .c { } */ .a, .b > p { color: red } .gone { x: y }
      a[href=".zip"]:hover::after { content: "{;}" }  .a:not(.gone) { top: 0 }
      @media print { .b { top: 1px } .gone { top: 2px } } @media screen { .gone { top: 0 } }
      @font-face { font-family: F; src: url(f.woff2) } .a:is(.x, .y) { left: 0 }"""
    kept = squeeze(purge(css, {"a"}))
    assert ".a{color: red}" in kept
    assert 'content: "{;}"' in kept and ":not(.gone)" in kept and ".a:is(.x,.y)" in kept
    assert "@font-face" in kept
    assert ".b" not in kept and "@media" not in kept and ".gone{" not in kept


def test_unused_variables_go_and_used_ones_stay():
    css = ":root{--a:1px;--b:var(--c);--c:2px;--d:3px}p{top:var(--a)}"
    left = drop_unused_variables(css, "getPropertyValue('--d')")
    assert "--a:1px" in left and "--d:3px" in left
    assert "--b" not in left and "--c" not in left


def test_formula_keeps_the_full_stop_behind_it():
    base = '<span class="base"><span class="mord">x</span></span>'
    formula = '<span class="math"><span class="katex">{}{}</span></span>'
    short = formula.format("", f'<span class="katex-html">{base}</span>')
    long = formula.format("", f'<span class="katex-html">{base * 2}</span>')
    whole = mend_page(f"<p>{long}, {short} and {short}). {long}.</p>")
    assert whole == (
        f'<p>{long}, {short} and <span style="white-space:nowrap">{short}).</span> {long}.</p>'
    )


def test_formula_in_words():
    words = {
        "N, C": "N, C",
        r"\gamma\,r\,\mathrm{d}x": "gamma r dx",
        r"1/\sqrt{\sigma^2+1} = 10^{-5}": "1/sqrt(sigma^2+1) = 10^(-5)",
    }
    assert {latex: spoken(latex) for latex in words} == words


def test_one_style_sheet_one_script_and_few_files(site):
    page = soup(site / "book" / "axes" / "which-axes.html")
    assert len(page.select("link[rel=stylesheet]")) == 1
    assert len(page.select("script[src]")) == 1
    assert len(page.select("meta[name=viewport]")) == 1
    names = {p.name for p in (site / "_static").rglob("*")}
    assert not [n for n in names if "fontawesome" in n or n.endswith((".map", ".ttf"))]


def test_icons_have_their_glyphs(site):
    """An icon whose glyph is missing from the subset is an empty box, which no other test sees."""
    (style,) = (site / "_static").glob("book.*.css")
    css = style.read_text(encoding="utf-8")
    import base64
    import io

    from fontTools.ttLib import TTFont

    glyphs = set()
    for data in re.findall(r"data:font/woff2;base64,([A-Za-z0-9+/=]+)", css):
        glyphs |= set(TTFont(io.BytesIO(base64.b64decode(data))).getBestCmap())
    assert 10 < len(glyphs) < 120
    used = set()
    for page in site.rglob("*.html"):
        used.update(
            re.findall(r"\bfa-[a-z-]+", " ".join(re.findall(r'class="([^"]*)"', page.read_text())))
        )
    used -= {"fa-solid", "fa-regular", "fa-brands", "fa-lg"}
    assert {"fa-bars", "fa-download", "fa-magnifying-glass"} <= used
    for name in used:
        code = re.search(rf'\.{name}:before[^{{]*\{{content:\s*"\\([0-9a-f]+)"', css)
        assert code and int(code[1], 16) in glyphs, name


# --- The zip --------------------------------------------------------------------------------------


def test_zip_opens_without_a_server(site, browser, tmp_path):
    target = tmp_path / "book.zip"
    offline.pack(site, target)
    first = target.read_bytes()
    offline.pack(site, target)
    assert target.read_bytes() == first
    with zipfile.ZipFile(target) as archive:
        archive.extractall(tmp_path)
    page = browser.new_page()
    asked, problems = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((tmp_path / offline.NAME / "index.html").as_uri())
    page.wait_for_url("**/intro.html")
    page.click("nav.bd-docs-nav a:has-text('Which axes?')")
    page.wait_for_url("**/which-axes.html")
    assert page.locator("article h1").inner_text().startswith("1. Which axes?")
    cell = page.locator(".axis-explorer [role=gridcell]").last
    cell.click()
    assert "n=1, c=3" in page.locator(".axis-explorer [aria-live]").first.inner_text()
    page.goto(f"{(tmp_path / offline.NAME / 'search.html').as_uri()}?q=Bessel")
    page.wait_for_selector("#search-results li a")
    assert problems == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    page.close()


def test_zip_needs_a_built_book(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.html"):
        offline.pack(tmp_path, tmp_path / "x.zip")
