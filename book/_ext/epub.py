"""The builder ``epub``: the book as one EPUB 3 file, for readers of electronic books.

    jupyter-book build . --builder custom --custom-builder epub

It serves no other builder. The pages hold what every reading system can show: no script, no
request to any host, mathematics as MathML (see `katex_build.py`), pictures as PNG or SVG. What the
page folds away is put where a reader finds it: each chapter's solutions are at its end. The same
sources, and the same date in ``SOURCE_DATE_EPOCH``, give the same bytes.
"""

from __future__ import annotations

import html
import re
import zipfile
from pathlib import Path, PurePosixPath

from bs4 import BeautifulSoup, Comment, Tag
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.builders.epub3 import Epub3Builder
from sphinx.config import Config
from website import first_paragraph

import bnlib

ACCESSIBLE = (
    ("accessMode", "textual"),
    ("accessMode", "visual"),
    ("accessModeSufficient", "textual"),
    ("accessibilityFeature", "alternativeText"),
    ("accessibilityFeature", "MathML"),
    ("accessibilityFeature", "readingOrder"),
    ("accessibilityFeature", "structuralNavigation"),
    ("accessibilityFeature", "tableOfContents"),
    ("accessibilityHazard", "none"),
    (
        "accessibilitySummary",
        "Every figure has a description, every formula is MathML, and headings are in order.",
    ),
)
# The kinds of words in code that epub.css sets apart; the others become plain text.
KINDS = {"c1", "sd", "k", "kc", "kn", "ow", "nb", "nf", "nc", "s1", "s2", "mi", "mf", "gp", "gt"}
COVER = Path(__file__).parent.parent / "_static" / "cover.png"
COVER_ALT = "Two samples of four channels as blocks of cells; those of one colour share a mean."

PAGE = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops" \
lang="{lang}" xml:lang="{lang}">
<head>
<title>{title}</title>
<link rel="stylesheet" type="text/css" href="{root}epub.css"/>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

PACKAGE = """<?xml version="1.0" encoding="utf-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id" \
xml:lang="{lang}">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:identifier id="id">{id}</dc:identifier>
<dc:title>{title}</dc:title>
<dc:language>{lang}</dc:language>
<dc:creator>{author}</dc:creator>
<dc:description>{description}</dc:description>
<dc:rights>{copyright}</dc:rights>
<meta property="dcterms:modified">{date}</meta>
<meta property="schema:version">{version}</meta>
{accessible}
<meta name="cover" content="{cover}"/>
</metadata>
<manifest>
{manifest}
</manifest>
<spine>
{spine}
</spine>
</package>
"""

# --- One page -------------------------------------------------------------------------------------


def mend_page(body: Tag, online: str | None) -> None:
    """Turn what was written for a browser into what every reading system shows.

    ``online`` is the page's address on the web, where that is known.
    """
    for explorer in body.select(".axis-explorer"):
        note = BeautifulSoup(
            "<p>In a browser this table is a figure to touch.</p>", "html.parser"
        ).p
        if online:
            link = body_tag("a", "A figure to touch", href=online + explorer["data-start"])
            note.clear()
            note.extend([link, " takes this table's place in a browser."])
        explorer.append(note)
        del explorer["data-start"]
    for gone in body.select("style, script, .toctree-wrapper, .clearer, .sd-summary-state-marker"):
        gone.decompose()
    for comment in body.find_all(string=lambda text: isinstance(text, Comment)):
        comment.extract()
    for span in body.select(".highlight span"):
        if not KINDS.intersection(span.get("class", [])) and not is_axis(span):
            span.unwrap()
    for summary in body.select("details.hide > summary"):
        summary.string = "Code"
        del summary["aria-label"]
    for table in body.select("table[border]"):
        del table["border"]
    for corner in body.select("th"):
        if not corner.get_text(strip=True):
            corner.name = "td"
    # Roles that EPUB no longer knows.
    for entry in body.select("[role=doc-biblioentry], [role=list]"):
        del entry["role"]
    move_solutions(body)
    # sphinx-exercise calls the content of each exercise the same; no link goes there.
    seen: set[str] = set()
    for element in body.select("[id]"):
        if element["id"] in seen:
            del element["id"]
        else:
            seen.add(element["id"])
    body.smooth()


def is_axis(span: Tag) -> bool:
    return any(name.startswith("axis-") for name in span.get("class", []))


def body_tag(name: str, text: str, **attributes: str) -> Tag:
    tag = Tag(name=name, attrs=attributes)
    tag.string = text
    return tag


def move_solutions(body: Tag) -> None:
    """Put the solutions at the end of the chapter, and a link to its own after each exercise."""
    solutions = body.select("div.solution")
    if not solutions:
        return
    end = Tag(name="section", attrs={"id": "solutions"})
    end.append(body_tag("h2", "Solutions"))
    for solution in solutions:
        exercise = body.find(id=solution.select_one(".admonition-title a")["href"].lstrip("#"))
        link = Tag(name="p", attrs={"class": "to-solution"})
        link.append(body_tag("a", "Solution", href=f"#{solution['id']}"))
        exercise.append(link)
        end.append(solution.extract())
    body.find("section").append(end)


def headings(body: Tag) -> list[tuple[str, str]]:
    """The sections of the second level: (id, heading)."""
    found = body.select("section > section > h2")
    return [(h.parent["id"], " ".join(h.get_text().split())) for h in found]


# --- The builder ----------------------------------------------------------------------------------


class BookEpub(Epub3Builder):
    """Sphinx's builder for the text; its own pages, package document and zip file."""

    def init(self) -> None:
        super().init()
        self.pages: dict[str, Tag] = {}

    def copy_assets(self) -> None:
        """Copy nothing of what the HTML pages load; other extensions need the folder."""
        (Path(self.outdir) / "_static").mkdir(parents=True, exist_ok=True)

    def handle_page(self, pagename, addctx, templatename="page.html", *args, **kwargs) -> None:
        soup = BeautifulSoup(f"<body>{addctx['body']}</body>", "html.parser")
        base = self.config.html_baseurl
        mend_page(soup.body, f"{base}{pagename}.html" if base else None)
        self.pages[pagename] = soup.body

    def finish(self) -> None:
        self.finish_tasks.join()
        files = self.contents()
        target = Path(self.outdir) / f"{self.config.epub_basename}.epub"
        with zipfile.ZipFile(target, "w") as archive:
            for name, data in files.items():
                entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                entry.external_attr = 0o644 << 16
                # A reading system finds the type at a fixed place, which it may not be packed for.
                stored = name == "mimetype"
                entry.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
                archive.writestr(entry, data, compresslevel=9)

    def parts(self) -> list[tuple[str | None, list[str]]]:
        """The parts of the book in their order: (title, names of the chapters)."""
        trees = self.env.get_doctree(self.config.root_doc).findall(addnodes.toctree)
        return [
            (None, [self.config.root_doc]),
            *((tree["caption"], [name for _, name in tree["entries"]]) for tree in trees),
        ]

    def contents(self) -> dict[str, bytes | str]:
        """Every file of the EPUB, the type first."""
        title, author = self.config.epub_title, self.config.author
        chapters = [name for _, names in self.parts() for name in names]
        pictures: dict[bytes, str] = {}
        for source, name in self.images.items():
            first = pictures.setdefault((Path(self.srcdir) / source).read_bytes(), name)
            if first != name:  # the same picture in two chapters
                for page in self.pages.values():
                    for image in page.select(f"img[src$='/{name}']"):
                        image["src"] = image["src"].replace(name, first)
        files: dict[str, bytes | str] = {}
        for name in chapters:
            files[f"{name}.xhtml"] = self.page(
                name, self.pages[name].h1.get_text(), self.pages[name].decode_contents().strip()
            )
        says = html.escape(f"{title}, by {author}. {COVER_ALT}")
        cover = f'<div class="cover"><img src="cover.png" alt="{says}"/></div>'
        files = {
            "cover.xhtml": self.page("cover", title, cover),
            "nav.xhtml": self.page("nav", "Contents", self.navigation()),
            **files,
            "epub.css": Path(__file__).with_suffix(".css").read_bytes(),
            "cover.png": COVER.read_bytes(),
        }
        # matplotlib gives the same picture, drawn twice in a figure, the same id; nothing uses it.
        files.update(
            (f"{self.imagedir}/{name}", re.sub(rb'(<image\b[^>]*?) id="[^"]*"', rb"\1", data))
            for data, name in pictures.items()
        )
        return {
            "mimetype": self.template("mimetype"),
            "META-INF/container.xml": self.template("container.xml"),
            "content.opf": self.package(files, ["cover", "nav", *chapters]),
            **files,
        }

    def page(self, name: str, title: str, body: str) -> str:
        return PAGE.format(
            lang=self.config.epub_language,
            title=html.escape(title),
            root="../" * name.count("/"),
            body=body,
        )

    def navigation(self) -> str:
        def entry(address: str, text: str, inside: str = "") -> str:
            return f'<li><a href="{address}">{html.escape(text)}</a>{inside}</li>'

        def chapter(name: str) -> str:
            page = self.pages[name]
            inside = "".join(entry(f"{name}.xhtml#{i}", text) for i, text in headings(page))
            title = " ".join(page.h1.get_text().split())
            return entry(f"{name}.xhtml", title, f"<ol>{inside}</ol>" if inside else "")

        lines = []
        for caption, names in self.parts():
            inside = "".join(map(chapter, names))
            lines.append(
                f"<li><span>{html.escape(caption)}</span><ol>{inside}</ol></li>"
                if caption
                else inside
            )
        return f'<nav epub:type="toc"><h1>Contents</h1><ol>{"".join(lines)}</ol></nav>'

    def template(self, name: str) -> bytes:
        return (Path(self.template_dir) / name).read_bytes()

    def package(self, files: dict[str, bytes | str], spine: list[str]) -> str:
        """The package document; Sphinx's says neither what holds MathML nor what is accessible."""
        manifest = []
        for name, data in files.items():
            properties = [
                word
                for word, holds in (
                    ("nav", name == "nav.xhtml"),
                    ("cover-image", name == "cover.png"),
                    ("mathml", isinstance(data, str) and "<math" in data),
                )
                if holds
            ]
            extra = f' properties="{" ".join(properties)}"' if properties else ""
            kind = self.media_types[PurePosixPath(name).suffix]
            manifest.append(
                f'<item id="{self.make_id(name)}" href="{name}" media-type="{kind}"{extra}/>'
            )
        front = self.env.get_doctree(self.config.root_doc)
        self.config.epub_description = first_paragraph(front)
        return PACKAGE.format(
            **self.content_metadata(),
            cover=self.make_id("cover.png"),
            accessible="\n".join(
                f'<meta property="schema:{key}">{html.escape(text)}</meta>'
                for key, text in ACCESSIBLE
            ),
            manifest="\n".join(manifest),
            spine="\n".join(
                f'<itemref idref="{self.make_id(f"{name}.xhtml")}"/>' for name in spine
            ),
        )


def configure(app: Sphinx, config: Config) -> None:
    """The book has one title, and carries the library's number; without one Sphinx warns."""
    config.epub_title, config.version = config.html_title, bnlib.__version__


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", configure)
    app.add_builder(BookEpub, override=True)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
