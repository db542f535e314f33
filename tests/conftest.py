"""What several test modules share: the built site, a browser, and the path to the extensions."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "book" / "_ext")]

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NEED_PAGES = {"site", "published", "epub", "chromium"}


def pytest_configure(config):
    config.addinivalue_line("markers", "pages: needs the built book or a browser (set by itself)")


def pytest_collection_modifyitems(items):
    for item in items:
        if NEED_PAGES & set(getattr(item, "fixturenames", ())):
            item.add_marker("pages")


def find_chromium():
    """The path of the system's Chromium; without one, tests are skipped here and fail under CI."""
    if found := next(filter(None, map(shutil.which, BROWSERS)), None):
        return found
    lacking = pytest.fail if os.environ.get("CI") else pytest.skip
    lacking("no Chromium on this machine: install chromium to run the browser tests")


def build(factory, builder, *options, to="site", strict=True, **environment):
    """Run a builder, with every warning an error or not; once, however many workers there are."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / to
    with FileLock(shared / f"{to}.{builder}.lock"):
        if not (out / f"{builder}.done").is_file():
            program = "from jupyter_book.cli.main import main; main()"
            strictness = ["-W", "-n", "--keep-going"] if strict else []
            options = [*strictness, "--path-output", str(out), *options]
            inherited = {k: v for k, v in os.environ.items() if k != "GITHUB_REPOSITORY"}
            done = subprocess.run(
                [sys.executable, "-c", program, "build", ".", *options],
                cwd=ROOT,
                env={**inherited, **environment},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            if builder == "html":
                light = [sys.executable, "-m", "tools.lean", str(out / "_build" / "html")]
                subprocess.run(light, cwd=ROOT, check=True)
            (out / f"{builder}.done").touch()
    return out / "_build" / builder


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the book's pages."""
    return build(tmp_path_factory, "html")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Some pages as the publishing workflow builds them, which knows the repository's address."""
    pages = ["short-answer", "axes/which-axes", "scale/kernels", "glossary"]
    contents = tmp_path_factory.mktemp("contents") / "_toc.yml"
    listed = "".join(f"- file: book/{page}\n" for page in pages)
    contents.write_text(f"format: jb-book\nroot: book/intro\nchapters:\n{listed}")
    options = ["--toc", str(contents)]
    address = {"GITHUB_REPOSITORY": "Some-One/axis-book"}
    return build(tmp_path_factory, "html", *options, to="published", strict=False, **address)


@pytest.fixture(scope="session")
def epub(site, tmp_path_factory):
    """The path of the book's EPUB; it is written from what the pages have read."""
    folder = build(tmp_path_factory, "epub", "--builder", "custom", "--custom-builder", "epub")
    (path,) = folder.glob("*.epub")
    return path


@pytest.fixture(scope="session")
def chromium():
    """The path of the system's Chromium."""
    return find_chromium()


@pytest.fixture(scope="session")
def browser(chromium):
    """The system's Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def reading(browser, chromium):
    """The same browser as a screen reader meets it: with all of a page in its tree."""
    options = [*OPTIONS, "--force-renderer-accessibility"]
    reading = browser.browser_type.launch(executable_path=chromium, args=options)
    yield reading
    reading.close()
