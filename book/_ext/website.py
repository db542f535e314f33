"""The book as a site: what a page is about, how to cite it, and the links that need an address.

The address is known only where the book is published: GitHub Actions sets ``GITHUB_REPOSITORY``
to ``owner/name``. Anywhere else the pages have no link to launch, edit or download, hence no dead
one, and no tags for previews, no site map and no page for lost readers.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective

# --- The address ----------------------------------------------------------------------------------

CARD = "_static/card.png"  # drawn by tools/identity.py
CARD_ALT = "Two samples of four channels as blocks of cells; those of one colour share a mean."
CARD_SIZE = (1200, 630)


def repository() -> str:
    return os.environ.get("GITHUB_REPOSITORY", "")


def settings(repository: str) -> tuple[str, dict]:
    """The address of the pages and the theme's options for ``owner/name``."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"expected GITHUB_REPOSITORY as owner/name, got {repository!r}")
    owner, name = repository.split("/")
    pages = f"https://{owner.lower()}.github.io/"
    if name.lower() != f"{owner.lower()}.github.io":
        pages += f"{name}/"
    return pages, {
        "repository_url": f"https://github.com/{repository}",
        "repository_branch": "main",
        "path_to_docs": "",
        "use_repository_button": True,
        "use_edit_page_button": True,
        "use_issues_button": True,
        "launch_buttons": {
            "notebook_interface": "jupyterlab",
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        },
    }


def downloads(base: str, name: str) -> str:
    """The sentence of the front page about the files that are published beside the pages."""
    return (
        f"The whole book is also [one zip of web pages]({base}{name}.zip), which opens in a "
        f"browser without a network, and [an EPUB]({base}{name}.epub)."
    )


def fill(app: Sphinx, config: Config) -> None:
    text = ""
    if repository():
        base, options = settings(repository())
        root = urlsplit(base).path
        config.html_baseurl = config.ogp_site_url = base
        config.html_theme_options = {**config.html_theme_options, **options}
        config.ogp_type, config.ogp_site_name = "article", config.html_title
        config.ogp_image, config.ogp_image_alt = base + CARD, CARD_ALT
        config.ogp_custom_meta_tags = (
            f'<meta property="og:image:width" content="{CARD_SIZE[0]}" />',
            f'<meta property="og:image:height" content="{CARD_SIZE[1]}" />',
            '<meta name="twitter:card" content="summary_large_image" />',
        )
        config.sitemap_url_scheme = "{link}"
        config.sitemap_excludes = ["404.html", "genindex.html", "search.html"]
        config.notfound_urls_prefix = root
        config.notfound_context = {
            "title": "No such page",
            "body": "<h1>No such page</h1><p>The page may have moved. Try the list of chapters, "
            f'the search, or <a href="{root}">the front page</a>.</p>',
        }
        text = downloads(base, config.epub_basename)
    config.myst_substitutions = {**config.myst_substitutions, "downloads": text}


def write_robots(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.name == "html":
        site_map = f"User-agent: *\nSitemap: {app.config.html_baseurl}sitemap.xml\n"
        (Path(app.outdir) / "robots.txt").write_text(site_map)


def colab_cell(repository: str, pagename: str) -> str:
    """What to run first in Colab, which opens a notebook without the files around it."""
    address = f"https://github.com/{repository}"
    folder = f"/content/{repository.split('/')[1]}"
    return (
        f"!git clone --quiet --depth 1 {address} {folder}\n"
        f'%pip install --quiet "{folder}[book]"\n'
        f"%cd {folder}/{PurePosixPath(pagename).parent}"
    )


def add_colab_cell(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    if doctree is None or not repository() or context.get("page_source_suffix") != ".ipynb":
        return
    code = app.builder.highlighter.highlight_block(  # type: ignore[attr-defined]
        colab_cell(repository(), pagename), "ipython3"
    )
    context["body"] = context["body"].replace(
        "</h1>",
        '</h1>\n<details class="colab"><summary>To run it in Colab</summary>'
        f"<p>Paste this into a new first cell, and run it first:</p>{code}</details>",
        1,
    )


# --- What a page is about -------------------------------------------------------------------------
# For search engines, and for whoever gets a link. The EPUB takes its description from here too.

LONGEST = 160


def first_paragraph(doctree: nodes.document) -> str:
    """The text of the first paragraph that says something; of "The question", in a chapter."""
    sections = [s for s in doctree.findall(nodes.section) if s[0].astext() == "The question"]
    for paragraph in (sections[0] if sections else doctree).findall(nodes.paragraph):
        formulas = [formula.astext() for formula in paragraph.findall(nodes.math)]
        if isinstance(paragraph.parent, nodes.section) and not any("\\" in f for f in formulas):
            text = re.sub(r"\s*\[[^\]]*\]", "", " ".join(paragraph.astext().split()))
            if len(text) > 60:
                return shorten(text)
    return ""


def shorten(text: str) -> str:
    """At most `LONGEST` characters, ended at a word."""
    if len(text) <= LONGEST:
        return text
    return text[: LONGEST - 1].rsplit(" ", 1)[0].rstrip(" ,;:") + "\u2026"


def describe(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    if doctree is None:
        return
    title = html.unescape(re.sub(r"<[^>]+>", "", context["title"]))
    about = first_paragraph(doctree) or f"{title}: a page of {app.config.html_title}."
    about = html.escape(about)
    context["metatags"] += f'<meta name="description" content="{about}" />\n'
    # sphinxext-opengraph would take the list of what a chapter teaches.
    context["meta"] = {**(context["meta"] or {}), "og:description": about}


# --- How to cite it -------------------------------------------------------------------------------
# From CITATION.cff alone. Every page's foot leads to the front page's entry.

FILE = "CITATION.cff"
ANCHOR = "cite-this"


def author_name(author: dict) -> str:
    """A person as ``Family, Given``; a group in braces, which keep BibTeX from splitting it."""
    if "name" in author:
        return f"{{{author['name']}}}"
    return f"{author['family-names']}, {author['given-names']}"


def bibtex(citation: dict, year: str, address: str = "") -> str:
    """The BibTeX entry of a citation file; `year` is used where it has no date of release."""
    fields = {
        "author": " and ".join(map(author_name, citation["authors"])),
        "title": f"{{{citation['title']}}}",
        "year": str(citation.get("date-released", year))[:4],
        "note": f"Version {citation['version']}",
    }
    if doi := citation.get("doi"):
        fields["doi"] = doi
    if address:
        fields["url"] = address
    key = re.sub(r"\W+", "-", citation["title"].lower()).strip("-")
    lines = "".join(f"  {name:<6} = {{{value}}},\n" for name, value in fields.items())
    return f"@misc{{{key},\n{lines}}}"


class CiteThis(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / FILE
        self.env.note_dependency(str(path))
        citation = yaml.safe_load(path.read_text(encoding="utf-8"))
        entry = bibtex(citation, self.config.copyright, self.config.html_baseurl)
        block = nodes.literal_block(entry, entry, language="bibtex", ids=[ANCHOR])
        return [block]


def add_citation_link(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    front = context["pathto"](app.config.root_doc).removesuffix("#")
    context["theme_extra_footer"] = f'<a href="{front}#{ANCHOR}">Cite this book</a>'


def setup(app: Sphinx) -> dict:
    app.add_directive("cite-this", CiteThis)
    app.connect("config-inited", fill, priority=100)
    # Before the line on the reading time, which comes between the cell and the title.
    app.connect("html-page-context", add_colab_cell, priority=400)
    # Before sphinxext-opengraph.
    app.connect("html-page-context", describe, priority=400)
    app.connect("html-page-context", add_citation_link)
    if repository():
        for extension in ("sphinxext.opengraph", "sphinx_sitemap", "notfound.extension"):
            app.setup_extension(extension)
        app.connect("build-finished", write_robots)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
