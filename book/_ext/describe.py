"""Say to search engines, and to whoever gets a link, what a page is about.

The description is the page's first paragraph of prose, as plain text. With an address (see
`repository.py`) there are also a picture for link previews, a site map and a page for lost readers.
It serves the builder ``html``; `epub.py` takes its own description from the same paragraph.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from urllib.parse import urlsplit

from docutils import nodes
from sphinx.application import Sphinx

LONGEST = 160
CARD = "_static/social-card.png"  # drawn by tools/social_card.py
CARD_ALT = "Four photographs as red, green and blue planes; those of one colour share a mean."
CARD_SIZE = (1200, 630)


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


def add_tags(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    title = re.sub(r"<[^>]+>", "", context.get("title") or app.config.html_title or "")
    about = first_paragraph(doctree) if doctree is not None else ""
    about = about or f"{html.unescape(title)}: a page of {app.config.html_title}."
    tags = {"og:title": html.unescape(title), "og:type": "article", "og:description": about}
    tags["og:site_name"] = app.config.html_title
    if base := app.config.html_baseurl:
        tags["og:url"] = base + app.builder.get_target_uri(pagename)
        tags["og:image"], tags["og:image:alt"] = base + CARD, CARD_ALT
        tags["og:image:width"], tags["og:image:height"] = map(str, CARD_SIZE)
    lines = [f'<meta name="description" content="{html.escape(about)}" />']
    lines += [f'<meta property="{k}" content="{html.escape(v)}" />' for k, v in tags.items()]
    if base:
        lines.append('<meta name="twitter:card" content="summary_large_image" />')
    context["metatags"] = context.get("metatags", "") + "\n".join(lines) + "\n"


def write_site_files(app: Sphinx, exception: Exception | None) -> None:
    base = app.config.html_baseurl
    if exception is not None or app.builder.name != "html" or not base:
        return
    out = Path(app.outdir)
    pages = sorted(app.builder.get_target_uri(name) for name in app.env.found_docs)
    urls = "".join(f"<url><loc>{html.escape(base + page)}</loc></url>" for page in pages)
    (out / "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{urls}</urlset>\n',
        encoding="utf-8",
    )
    (out / "robots.txt").write_text(f"User-agent: *\nSitemap: {base}sitemap.xml\n")
    # Served in the place of any missing page, so its links start from the site's root.
    lost = (out / "genindex.html").read_text(encoding="utf-8")
    lost = lost.replace("<head>", f'<head><base href="{urlsplit(base).path}" />', 1)
    text = (
        "<h1>No such page</h1><p>The page may have moved. Try the list of chapters, the search, or "
        f'<a href="{app.builder.get_target_uri(app.config.root_doc)}">the front page</a>.</p>'
    )
    lost = re.sub(
        r"(<article[^>]*>).*?(</article>)", rf"\g<1>{text}\g<2>", lost, count=1, flags=re.DOTALL
    )
    (out / "404.html").write_text(lost, encoding="utf-8")


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", add_tags)
    app.connect("build-finished", write_site_files, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
