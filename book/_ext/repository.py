"""Links that need the repository's address: launch, edit, issues, downloads, canonical addresses.

The address is known only where the book is published: GitHub Actions sets ``GITHUB_REPOSITORY``
to ``owner/name``. Anywhere else the pages have none of these links, hence no dead one. It serves
every builder.
"""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath

from sphinx.application import Sphinx
from sphinx.config import Config


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
    repository = os.environ.get("GITHUB_REPOSITORY", "")
    text = ""
    if repository:
        config.html_baseurl, options = settings(repository)
        config.html_theme_options = {**config.html_theme_options, **options}
        text = downloads(config.html_baseurl, config.epub_basename)
    config.myst_substitutions = {**config.myst_substitutions, "downloads": text}


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
    repository = os.environ.get("GITHUB_REPOSITORY", "")
    if doctree is None or not repository or context.get("page_source_suffix") != ".ipynb":
        return
    code = app.builder.highlighter.highlight_block(  # type: ignore[attr-defined]
        colab_cell(repository, pagename), "ipython3"
    )
    context["body"] = context["body"].replace(
        "</h1>",
        '</h1>\n<details class="colab"><summary>To run it in Colab</summary>'
        f"<p>Paste this into a new first cell, and run it first:</p>{code}</details>",
        1,
    )


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", fill, priority=100)
    # Before the line on the reading time, which comes between it and the title.
    app.connect("html-page-context", add_colab_cell, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
