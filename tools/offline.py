"""Pack the built book into one zip file that opens without a server and without a network.

    python tools/offline.py

The zip holds one folder; open its `index.html`. Two runs on the same pages give the same bytes.
The built EPUB, which is one file already, is laid beside it.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "batch-normalization-axis-by-axis"


def pack(site: Path, target: Path) -> None:
    """Write every file of `site` into `target`, under one folder."""
    if not (site / "index.html").is_file():
        raise FileNotFoundError(f"expected a built book with an index.html in {site}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(p for p in site.rglob("*") if p.is_file() and p != target):
            name = f"{NAME}/{path.relative_to(site).as_posix()}"
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())


if __name__ == "__main__":
    site = ROOT / "_build" / "html"
    folder = ROOT / "_build" / "offline"
    try:
        pack(site, folder / f"{NAME}.zip")
        shutil.copyfile(ROOT / "_build" / "epub" / f"{NAME}.epub", folder / f"{NAME}.epub")
    except FileNotFoundError as problem:
        sys.exit(f"{problem}: run `make offline`, which builds both first")
    for made in sorted(folder.iterdir()):
        print(f"{made.relative_to(ROOT)}: {made.stat().st_size / 1e6:.1f} MB")
